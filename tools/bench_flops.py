"""Operations of a LoRA step, by formula, for a dense decoder.

A product of [m, k] and [k, n] counts 2 m k n.  A frozen weight is used twice, forward and for the
gradient of its input: 4 operations a weight and token, not the 6 of full training.  An adapter's
weight has a gradient of its own: 6.  Causal attention counts the pairs of positions that see each
other, half the square, three times: forward, and twice that backward.  What is computed again
(``student.remat``) does not count: it is no progress.
"""

from __future__ import annotations

from typing import Any


def linears(config: Any) -> list[tuple[int, int]]:
    """(in, out) of each linear of a layer; ``config`` is a ``ModelConfig``."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    return [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)]


def causal_pairs(tokens: int) -> int:
    """(query, key) pairs of one sequence."""
    return tokens * (tokens + 1) // 2


def train_flops(config: Any, rank: int, tokens: int, predicted: int, pairs: int) -> int:
    """Operations of one step.

    Args:
      config: the student's ``ModelConfig``.
      rank: of the adapters, on every linear of the layers.
      tokens: positions that pass the layers.
      predicted: positions whose logits are needed.
      pairs: (query, key) pairs, of all sequences.
    """
    layers, shapes = config.num_hidden_layers, linears(config)
    frozen = layers * sum(n * m for n, m in shapes)
    adapters = layers * sum(rank * (n + m) for n, m in shapes)
    vocabulary = config.hidden_size * config.vocab_size
    attention = 4 * layers * config.num_attention_heads * config.head_dim * pairs
    return (4 * frozen + 6 * adapters) * tokens + 4 * vocabulary * predicted + 3 * attention


def sft_flops(config: Any, rank: int, rows: int, tokens: int) -> int:
    """Operations of a step on ``rows`` sequences of ``tokens``; all but the first are learnt."""
    every = rows * tokens
    return train_flops(config, rank, every, every - rows, rows * causal_pairs(tokens))


def group_flops(
    config: Any, rank: int, prompt: int, samples: int, completion: int, *, shared: bool
) -> tuple[int, int]:
    """(tokens through the layers, operations) of a step on one group."""
    predicted, whole = samples * completion, causal_pairs(prompt + completion)
    if shared:
        tokens = prompt + predicted
        pairs = causal_pairs(prompt) + samples * (whole - causal_pairs(prompt))
    else:
        tokens, pairs = samples * (prompt + completion), samples * whole
    return tokens, train_flops(config, rank, tokens, predicted, pairs)


def decode_bytes(config: Any, rows: int, context: int, width: int) -> int:
    """Bytes that decoding one token of each row has to read: weights once, and each row's cache.

    Args:
      config: the student's ``ModelConfig``.
      rows: sequences decoded at once.
      context: positions that each attends to.
      width: bytes of a number.
    """
    layers = config.num_hidden_layers
    weights = layers * sum(n * m for n, m in linears(config))
    weights += config.hidden_size * config.vocab_size  # the vocabulary product
    cache = rows * context * layers * 2 * config.num_key_value_heads * config.head_dim
    return (weights + cache) * width
