"""Zone of proximal development: practise where a group of samples is likely to be mixed.

A group of G samples at pass rate p teaches GRPO something only when it is neither all right nor
all wrong, which has probability 1 - p^G - (1 - p)^G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cosr_jax.curator.mastery import Beta, CellMastery, log_beta

#: Groups' worth of trust in the model p^G against counted groups: tasks of one cell differ in p,
#: which the model does not know (half at 0 and half at 1 look like 0.5, and no group is mixed).
_MODEL_GROUPS = 2.0


def informative_probability(p: float, group_size: int) -> float:
    """Probability that a group at pass rate ``p`` is neither all right nor all wrong."""
    return 1.0 - p**group_size - (1.0 - p) ** group_size


def expected_informative(rate: Beta, group_size: int) -> float:
    """``informative_probability`` averaged over a Beta posterior of the pass rate.

    E[p^G] = B(a + G, b) / B(a, b), and likewise with a and b exchanged for E[(1 - p)^G].
    """
    a, b, g = rate.a, rate.b, group_size
    all_right = math.exp(log_beta(a + g, b) - log_beta(a, b))
    all_wrong = math.exp(log_beta(a, b + g) - log_beta(a, b))
    return min(max(1.0 - all_right - all_wrong, 0.0), 1.0)


def informative_share(mastery: CellMastery, group_size: int) -> float:
    """Expected share of informative groups of a cell: counted groups, with the model as prior."""
    model = expected_informative(mastery.pass_rate, group_size)
    counted = mastery.informative_groups
    return (_MODEL_GROUPS * model + counted) / (_MODEL_GROUPS + mastery.groups)


def mixture(
    scores: Mapping[str, float], *, max_cells: int = 8, min_relative: float = 0.15
) -> tuple[tuple[str, float], ...]:
    """Cell weights proportional to ``scores``, for the few best cells.

    All weight on the best cell would maximise the expected score, but draw one kind of task only;
    so cells share in proportion, and those under ``min_relative`` of the best are dropped.

    Args:
      scores: cell -> score >= 0, for example informative share times relevance.  Order decides
        ties.
      max_cells: cells kept at most.
      min_relative: smallest score kept, as a fraction of the best.

    Returns:
      (cell, weight) pairs, the heaviest first; weights sum to 1.  Where every score is 0, the
      first ``max_cells`` cells weigh the same.

    Raises:
      ValueError: there are no scores, or one is negative or not finite.
    """
    if not scores:
        raise ValueError("a mixture needs at least one cell")
    for cell, score in scores.items():
        if not (math.isfinite(score) and score >= 0.0):
            raise ValueError(f"score of {cell} is {score}")
    best = max(scores.values())
    if best == 0.0:
        kept = [(cell, 1.0) for cell in scores][:max_cells]
    else:
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:max_cells]
        # Relative to the best, so that subnormal scores do not overflow when normalised.
        kept = [(cell, s / best) for cell, s in ranked if s / best >= min_relative]
    total = math.fsum(weight for _, weight in kept)
    return tuple((cell, weight / total) for cell, weight in kept)


def mixture_share(weights: Sequence[tuple[str, float]], shares: Mapping[str, float]) -> float:
    """Expected informative share of a mixture: the weighted mean of its cells' ``shares``."""
    return math.fsum(weight * shares[cell] for cell, weight in weights)


def nearest_the_zone(
    masteries: Mapping[str, CellMastery], cells: Sequence[str], group_size: int, count: int = 8
) -> tuple[str, ...]:
    """The ``count`` cells whose groups would be mixed most often once the form is right.

    They are ranked by value-correct rate, so that a student without the form is not all out of
    reach.  Cells without evidence rank between those in the zone and the hopeless ones.
    """
    score = {c: expected_informative(masteries[c].value_rate, group_size) for c in cells}
    return tuple(sorted(cells, key=lambda c: -score[c])[:count])
