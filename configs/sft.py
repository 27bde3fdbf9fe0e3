"""Expert iteration: SFT on the student's own verified samples, never GRPO.

Reproduces: the method of STaR (arXiv:2203.14465) in the quickstart's setting.  Asking that every
group be informative before GRPO may run (curator.min_informative = 1) leaves the curator only its
SFT arms, which makes this the baseline that GRPO has to beat.

Takes: about as long as the quickstart, a few minutes on 2 CPU cores.
Expected: not measured yet; compare its report.md with the quickstart's.

    cosr train --config=configs/sft.py --workdir=runs/sft
"""

from ml_collections import ConfigDict

from cosr_jax.config import default_config
from cosr_jax.config_args import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, seed=0, rounds=20)
    config = default_config()
    config.seed = options.seed
    config.curator.focus = ("addition/2",)
    config.curator.min_informative = 1.0
    config.eval.test = (
        "addition_2digit=addition/2:250",
        "one_digit=addition/1:30,subtraction/1:30,multiplication/1:30",
    )
    config.eval.validation = "addition/2:100,addition/1:10,subtraction/1:10"
    config.train.max_rounds = options.rounds
    return config
