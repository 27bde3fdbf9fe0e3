"""A curator of one's own: practises the cells in turn, the worst of the last round first.

Takes: as long as the config that it is given.

python docs/own_curator.py configs/quickstart.py runs/own
"""

import sys
from pathlib import Path

from cosr_jax.config_args import load_config
from cosr_jax.protocols import Curator
from cosr_jax.run import loop
from cosr_jax.types import Plan


class WorstFirst(Curator):
    """Half of each round on the cell with the lowest pass rate, half on the others."""

    def __init__(self, config, cells):
        self.cells, self.steps = cells, config.train.steps_per_round

    def wanted_diagnosis(self):
        return self.cells  # sampled before each plan

    def plan(self, diagnosis, lab):
        rates = {e.cell: e.passed / max(1, e.samples) for e in diagnosis.evidence}
        worst = min(rates, key=rates.get)
        others = [(cell, 0.5 / (len(rates) - 1)) for cell in rates if cell != worst]
        mixture = ((worst, 0.5), *others) if others else ((worst, 1.0),)
        why = f"{worst} passes {rates[worst]:.2f}, the least of all"
        return Plan("worst_first", "grpo", mixture, self.steps, 0.0, 1.0, "", why)


if __name__ == "__main__":
    loop.train(load_config(sys.argv[1], []), Path(sys.argv[2]), make_curator=WorstFirst)
