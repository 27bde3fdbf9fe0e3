"""Chat format: text to token ids and back, by the student's own tokenizer and template."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosr_jax.student.tensor_files import read_json
from cosr_jax.types import UserError

# Templates of Llama 3.2, SmolLM3 and gpt-oss write today's date into every prompt; a run that goes
# on past midnight must see the same tokens.
_TODAY = datetime.datetime(2024, 7, 26)
_TEMPLATE_ARGUMENTS = {"date_string": f"{_TODAY:%d %b %Y}"}
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
_THOUGHT, _END_OF_THOUGHT = "<think>", "\n</think>\n\n"


class Chat:
    """A student's chat format; a ``protocols.ChatTokenizer``.

    Args:
      folder: holds tokenizer.json and the chat template.
      system_prompt: the system turn; empty leaves it to the template's own default.

    Attributes:
      pad_id: token that fills rows; masked everywhere, so which one it is does not matter.
      stop_ids: tokens that end an answer, ascending.
      end_of_turn_id: the one that the template puts after an assistant's turn.
      answer_header: what the template puts between prompt and answer: nothing, an empty thought
        (Qwen3), or the name of the answer's channel (gpt-oss).
      vocab_size: number of token ids that the tokenizer knows.

    Raises:
      UserError: no tokenizer, no template, a template that refuses the system prompt, or one in
        which an answered conversation does not begin with its prompt.
    """

    def __init__(self, folder: Path, system_prompt: str = ""):
        self._folder = folder
        self._tokenizer = _load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{folder}: the tokenizer has no chat template",
                "use an instruction-tuned student, or add chat_template.jinja",
            )
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"{folder}: none of the tokenizer's chat templates is the default ({error})",
                "add the one to use as chat_template.jinja",
            ) from error
        self._template = _DATE.sub(lambda match: repr(f"{_TODAY:{match['format']}}"), template)
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.vocab_size = len(self._tokenizer)
        self.answer_header, self.end_of_turn_id = self._find_turn()
        self.stop_ids = self._find_stop_ids()
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.end_of_turn_id if pad is None else pad
        added = self._tokenizer.added_tokens_decoder
        header = self._encode(self.answer_header)
        self._is_structured = any(token in added and added[token].special for token in header)

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """One user turn, after the system turn, up to and including the assistant's header."""
        return self._encode(self._render(prompt))

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """The assistant's text, after its header, followed by the end-of-turn token."""
        return (*self._encode(self.answer_header + text), self.end_of_turn_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; with those that tell an answer from a draft (gpt-oss)."""
        if self._is_structured:
            closing = {*self.stop_ids, self.pad_id}
            token_ids = [token for token in token_ids if token not in closing]
        return self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=not self._is_structured,
            clean_up_tokenization_spaces=False,
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, prompt: str, answer: str | None = None) -> str:
        import jinja2

        turns = [*self._system, {"role": "user", "content": prompt}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=answer is None,
                **_TEMPLATE_ARGUMENTS,
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self._folder}: the chat template failed ({error})",
                "check student.system_prompt, which this template may not accept",
            ) from error

    def _find_turn(self) -> tuple[str, int]:
        """What stands before an answer, and the special token after it."""
        question, answer = "2 + 2?", "It is 4."
        prompt, whole = self._render(question), self._render(question, answer)
        shown, closing = prompt, ""
        if not whole.startswith(prompt) and prompt.rstrip().endswith(_THOUGHT):
            # Some templates open a thought in prompts alone (DeepSeek-R1's distillations).
            shown, closing = prompt.rstrip().removesuffix(_THOUGHT), _END_OF_THOUGHT
        header, begins, rest = whole.removeprefix(shown).partition(answer)
        after = self._encode(rest)
        # all_special_ids are only the named ones: Llama 3's <|eot_id|> need not be among them.
        special = self._tokenizer.added_tokens_decoder
        follows = whole.startswith(shown) and begins and after
        if not follows or after[0] not in special:
            raise UserError(
                f"{self._folder}: the chat template does not put an answer between the prompt and "
                f"a special token (after {prompt!r} came {whole!r})",
                "use a student whose template appends answers unchanged",
            )
        return closing + header, after[0]

    def _find_stop_ids(self) -> tuple[int, ...]:
        ids = {self.end_of_turn_id, self._tokenizer.eos_token_id}
        # As in transformers, the model's own end tokens count where nothing is said of generation.
        names = ("generation_config.json", "config.json")
        found = [self._folder / name for name in names if (self._folder / name).exists()]
        if found:
            declared = read_json(found[0]).get("eos_token_id")
            declared = declared if isinstance(declared, list) else [declared]
            for token in declared:
                if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                    raise UserError(
                        f"{found[0]}: eos_token_id {token!r:.100} is no token id",
                        "get the file again",
                    )
            ids |= set(declared)
        return tuple(sorted(ids - {None}))


def _load_tokenizer(folder: Path) -> Any:
    # transformers would advise on its import that PyTorch is missing, which we do not need.
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before
    if not (folder / "tokenizer_config.json").exists():
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: no such file",
            "the student's folder needs its tokenizer files",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({reason})", "get its files again"
        ) from error
