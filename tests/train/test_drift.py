"""Two hundred steps beside PEFT's: the same loss curve, step by step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosr_jax.config import LoraConfig, StudentConfig, TrainConfig
from cosr_jax.student.peft import export_adapter
from cosr_jax.student.weights import load_student
from cosr_jax.train.batching import batch_shape, sft_batch
from cosr_jax.train.losses import SftObjective
from cosr_jax.train.step import init_state, make_train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks it
]

STEPS, ROWS, TIME, RATE = 200, 8, 24, 2e-3
LORA = LoraConfig(rank=4, alpha=8.0)
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def test_the_loss_stays_within_a_hundredth_of_pefts_at_every_step(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, initializer_range=0.1)
    model = transformers.LlamaForCausalLM(config).float()
    model.save_pretrained(tmp_path / "student")
    student = load_student(StudentConfig(str(tmp_path / "student")), LORA)
    export_adapter(student, LORA, tmp_path / "adapter", base_name=str(tmp_path / "student"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).train()
    # Text with something to learn: each row counts up from its own start, with some noise.
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 96, (STEPS, ROWS, TIME)) * (rng.random((STEPS, ROWS, TIME)) < 0.1)
    batches = (rng.integers(0, 96, (STEPS, ROWS, 1)) + np.arange(TIME) + noise) % 96

    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    train = TrainConfig()
    step = make_train_step(student, SftObjective(), train)
    state = init_state(jax.tree.map(jnp.copy, student.lora), train)
    shape = batch_shape(ROWS, train.microbatch_size, 1, TIME - 1)
    curves: list[tuple[float, float]] = []
    for rows in batches:
        batch = sft_batch([(row[:1], row[1:]) for row in rows.tolist()], shape)
        state, metrics = step(state, student.base, batch, RATE)
        ids = torch.tensor(rows)
        optimizer.zero_grad(set_to_none=True)
        loss = theirs(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        optimizer.step()
        curves.append((float(metrics["loss"]), loss.item()))
    ours, peers = np.array(curves).T
    drift = np.abs(ours - peers) / peers
    print(f"loss {peers[0]:.3f} -> {peers[-1]:.3f}; largest drift {drift.max():.2e}")
    assert peers[-10:].mean() < 0.8 * peers[:10].mean()
    assert drift.max() <= 0.01
