"""vLLM's side of ``bench_train``, on its CPU backend: eager, one process.

A fresh adapter adds nothing, so the student's own weights are the merged ones.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from bench_work import Channel, Job, clock, rollout_prompts

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that this process's memory is all of it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from vllm import LLM, SamplingParams, TokensPrompt


def rollout(job: Job, channel: Channel) -> None:
    """Sampling at temperature 1 without decoding text; no prompt is taken from an earlier call."""
    sizes = job.sizes
    longest = sizes.rollout_prompt_tokens + sizes.rollout_new_tokens
    engine = LLM(
        job.student,
        dtype=job.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_seqs=sizes.rollout_prompts,
        disable_log_stats=True,
    )
    vocab = engine.llm_engine.model_config.get_vocab_size()
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in rollout_prompts(vocab, sizes)]

    def generate(number: int, **settings: Any) -> list[Any]:
        params = SamplingParams(
            max_tokens=number, ignore_eos=True, detokenize=False, top_p=1.0, top_k=0, **settings
        )
        outputs = [answer.outputs[0] for answer in engine.generate(prompts, params, use_tqdm=False)]
        lengths = {len(output.token_ids) for output in outputs}
        if lengths != {number}:
            raise RuntimeError(f"completions of {sorted(lengths)} tokens, expected {number}")
        return outputs

    def sample() -> None:
        generate(sizes.rollout_new_tokens, temperature=1.0)

    first_s, _ = clock(sample)
    greedy = generate(sizes.greedy_tokens, temperature=0.0, logprobs=0)
    check = [output.cumulative_logprob / sizes.greedy_tokens for output in greedy]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["vllm"] = importlib.import_module("vllm").__version__
    threads = f"vLLM, torch: {torch.get_num_threads()} (intra-op)"
    channel.ready(
        "vLLM CPU, eager", {"rollout": first_s}, check, threads=threads, versions=versions
    )
    while channel.go_on():
        channel.done(rollout=clock(sample)[0])
