"""The chat format: prompts are prefixes of conversations, and nothing is lost on the way back."""

import json
import subprocess
import sys

import pytest
from gguf_fixtures import CHAT_TEMPLATE, LETTERS, TOKENS, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from cosr_jax.student.chat import Chat
from cosr_jax.student.gguf_weights import convert_gguf
from cosr_jax.types import UserError


def make_folder(tmp_path, template=CHAT_TEMPLATE, **metadata):
    folder = tmp_path / "student"
    folder.mkdir()
    metadata = {"tokenizer.chat_template": template, **metadata}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=metadata), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("chat"))


def pieces(ids):
    return [TOKENS[i] for i in ids]


def text_of(ids):
    return "".join(pieces(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def test_prompt_ends_with_the_assistant_s_header(folder):
    chat = Chat(folder)
    assert text_of(chat.encode_prompt("1+1?")) == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_system_prompt_replaces_the_template_s_own(folder):
    ids = Chat(folder, system_prompt="be brief").encode_prompt("hi")
    assert text_of(ids).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert "be kind" not in text_of(ids)


TEXT = st.text(
    alphabet=[c for c in LETTERS if c not in "ĠĊ"] + [" ", "\n"], min_size=1, max_size=30
).filter(lambda text: text == text.strip())


@given(prompt=TEXT, answer=TEXT)
@settings(max_examples=40, deadline=None)
def test_prompt_and_completion_make_up_the_conversation(folder, prompt, answer):
    chat = Chat(folder)
    whole = chat._tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    ids = chat.encode_prompt(prompt) + chat.encode_completion(answer)
    assert text_of(ids) + "\n" == whole
    assert chat.decode(chat.encode_completion(answer)) == answer


def test_special_tokens_and_sizes(folder):
    chat = Chat(folder)
    assert chat.encode_completion("12") == (TOKENS.index("1"), TOKENS.index("2"), 2)
    assert (chat.end_of_turn_id, chat.stop_ids, chat.vocab_size) == (2, (2,), 96)
    assert chat.pad_id == 2  # no pad token: the end of turn fills in
    assert chat.decode([1, TOKENS.index("he"), 2, 0]) == "he"


def test_a_declared_pad_token_and_further_end_tokens_are_taken(tmp_path):
    folder = make_folder(
        tmp_path, **{"tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.eos_token_id": 0}
    )
    declared = folder / "generation_config.json"
    declared.write_text(json.dumps({"eos_token_id": [0, 5]}), encoding="utf-8")
    chat = Chat(folder)
    assert (chat.pad_id, chat.stop_ids, chat.end_of_turn_id) == (0, (0, 2, 5), 2)


def test_the_date_in_a_template_stands_still(tmp_path):
    template = "{{ date_string if date_string is defined else strftime_now('%c') }}" + CHAT_TEMPLATE
    assert text_of(Chat(make_folder(tmp_path, template)).encode_prompt("a")).startswith("26 Jul")


def test_a_date_that_the_template_asks_for_stands_still(tmp_path):
    template = '{{ strftime_now("%Y-%m-%d") }}' + CHAT_TEMPLATE
    prompt = text_of(Chat(make_folder(tmp_path, template)).encode_prompt("a"))
    assert prompt.startswith("2024-07-26<|im_start|>")


def test_channels_of_an_answer_are_kept_in_its_text(tmp_path):
    """As in gpt-oss: roles and channels are special tokens, without which drafts are answers."""
    begin, channel, content, done, end = (f"<|unused_{i}|>" for i in range(5))
    template = (
        "{% for m in messages %}" + begin + "{{ m['role'] }}{% if m['role'] == 'assistant' %}"
        f"{channel}final{content}{{{{ m['content'] }}}}{done}{{% else %}}"
        f"{content}{{{{ m['content'] }}}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin}assistant{{% endif %}}"
    )
    chat = Chat(make_folder(tmp_path, template))
    ids = chat.encode_prompt("1") + chat.encode_completion("2")
    assert (
        text_of(ids) == f"{begin}user{content}1{end}{begin}assistant{channel}final{content}2{done}"
    )
    assert pieces([chat.end_of_turn_id]) == [done]
    assert text_of(chat.stop_ids) == f"<|im_end|>{done}"
    draft = f"{channel}analysis{content}3?{end}{begin}assistant{channel}final{content}2"
    completion = chat._encode(draft + done)
    assert chat.decode(completion) == draft


@pytest.mark.parametrize(
    ("answered", "prompted", "header"),
    [
        ("<think>\n\n</think>\n\n{{ m['content'] }}", "", "<think>\n\n</think>\n\n"),  # Qwen3
        ("<think>\n\n</think>\n\n{{ m['content'] }}", "<think>\n", "\n</think>\n\n"),
        ("{{ m['content'] }}", "<think>\n", "\n</think>\n\n"),  # DeepSeek-R1-Distill
    ],
)
def test_an_answer_without_thoughts_has_the_template_s_empty_thought(
    tmp_path, answered, prompted, header
):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        f"{answered}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompted}{{% endif %}}"
    )
    chat = Chat(make_folder(tmp_path, template))
    assert chat.answer_header == header
    assert chat.encode_completion("12") == (*chat._encode(header), *chat._encode("12"), 2)
    assert chat.decode(chat.encode_completion("12")).endswith("12")


def test_the_model_s_end_tokens_count_where_nothing_is_said_of_generation(tmp_path):
    folder = make_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 2]}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert Chat(folder).stop_ids == (2, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert Chat(folder).stop_ids == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match="eos_token_id '</s>' is no token id"):
        Chat(folder)


REFUSALS = {
    "no template": (None, "", "has no chat template"),
    "no end of turn": (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "",
        "special token",
    ),
    "answer changed": (
        CHAT_TEMPLATE.replace("m['content'] }}", "m['content'] | upper }}"),
        "",
        "does not put an answer",
    ),
    "no system turn": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE,
        "be brief",
        "no system role",
    ),
    "syntax": ("{% for %}", "", "chat template failed"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_templates_that_cannot_be_used_are_refused(name, tmp_path):
    template, system, says = REFUSALS[name]
    folder = make_folder(tmp_path, template)
    with pytest.raises(UserError, match=says) as caught:
        Chat(folder, system)
    assert str(folder) in str(caught.value)


def test_missing_and_broken_tokenizer_files_are_named(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        Chat(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: no such file"):
        Chat(folder)


def test_works_silently_where_torch_is_not_installed(folder):
    """As in the quickstart's environment: an import of torch fails there."""
    program = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "torch" else found(name, package))
sys.modules["torch"] = None
from pathlib import Path
from cosr_jax.student.chat import Chat
print(Chat(Path({str(folder)!r})).encode_completion("12"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"({TOKENS.index('1')}, {TOKENS.index('2')}, 2)\n"
    assert done.stderr == ""
