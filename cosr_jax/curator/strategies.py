"""The strategy arms: which of them the measurements allow, and what each would have practised.

Every function is pure.  ``propose`` lists the eligible arms of a ``View``; the bandit picks one.

  format_drill  SFT where the value is already right, so that the form alone is learnt
  review        what was trained and has fallen, with much replay
  raise         GRPO with the next level mixed in, once a focus cell nears mastery
  lower         one level easier, or worked examples where even that gives no signal
  study         SFT on worked answers of the focus cells, until they are mastered
  reinforce     GRPO on the focus cells in the zone

GRPO needs groups with differing rewards.  Where fewer than ``min_informative`` of them are
expected, no GRPO arm is eligible, and where that leaves no arm at all the no-signal gate orders
SFT on verified samples instead.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from cosr_jax.config import CuratorConfig
from cosr_jax.curator.curriculum import informative_share, mixture, mixture_share
from cosr_jax.curator.mastery import CellMastery

#: Arms in the order in which the bandit tries them: those with the narrowest condition first.
STRATEGIES = ("format_drill", "review", "raise", "lower", "study", "reinforce")

_DRY = 0.5  # informative share under which a cell's level should move
_EVEN = 0.5  # pass rate over which a dry cell is too easy rather than too hard
_FORM_COST = 0.1  # right values lost to the form that make a drill worth a round beside GRPO
_VALUE_KNOWN = 0.5  # value-correct rate over which a cell can carry a format drill
_NEIGHBOUR = 0.5  # relevance of a focus cell's neighbour; that of a focus cell is 1
_FALL = 0.15  # drop of a pass rate, beyond both intervals, that calls for review
_REVIEW_REPLAY = 0.5  # share of replay in a review round


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One eligible arm with its orders."""

    strategy: str
    algorithm: Literal["sft", "grpo"]
    mixture: tuple[tuple[str, float], ...]
    replay_fraction: float
    reason: str


@dataclasses.dataclass(frozen=True)
class View:
    """What the arms look at: the state of knowledge before a round."""

    config: CuratorConfig
    cells: tuple[str, ...]  # the whole grid
    focus: tuple[str, ...]  # cells to bring to mastery now
    masteries: Mapping[str, CellMastery]  # one for each cell of the grid
    group_size: int
    peaks: Mapping[str, float]  # trained cell -> highest lower bound its pass rate has had
    drill_pays: bool  # no format drill in this context yet, or they raised the probe score

    def passes(self, cell: str) -> float:
        return self.masteries[cell].pass_rate.mean

    def share(self, cell: str) -> float:
        """Expected share of informative groups."""
        return informative_share(self.masteries[cell], self.group_size)

    def is_measured(self, cell: str) -> bool:
        return self.masteries[cell].samples > 0.0

    def is_mastered(self, cell: str) -> bool:
        return self.is_measured(cell) and self.passes(cell) > self.config.zone_high

    @property
    def focus_pass(self) -> float:
        """Mean strict pass rate of the focus cells."""
        return statistics.fmean(self.passes(cell) for cell in self.focus)

    @property
    def focus_value(self) -> float:
        """Mean value-correct rate of the focus cells."""
        return statistics.fmean(self.masteries[cell].value_rate.mean for cell in self.focus)

    @property
    def focus_format(self) -> float:
        """Mean share of answers in the accepted form over the focus cells."""
        return statistics.fmean(self.masteries[cell].format_rate.mean for cell in self.focus)

    @property
    def needs_format(self) -> bool:
        return self.focus_format < self.config.format_target


def neighbour(cells: Sequence[str], cell: str, step: int) -> str | None:
    """The cell of the same skill ``step`` places harder (or easier, if negative) in the grid."""
    skill = cell.rpartition("/")[0]
    ladder = sorted((c for c in cells if c.rpartition("/")[0] == skill), key=_level)
    place = ladder.index(cell) + step
    return ladder[place] if 0 <= place < len(ladder) else None


def harder_unmastered(view: View, cell: str) -> str | None:
    """The easiest cell above ``cell`` in its skill that is not mastered yet."""
    step = 1
    while (above := neighbour(view.cells, cell, step)) is not None and view.is_mastered(above):
        step += 1
    return above


def context(view: View) -> str:
    """Coarse buckets of the measurements: the bandit's context."""
    form = "low" if view.needs_format else "ok"
    passes = view.focus_pass
    config = view.config
    level = "low" if passes < config.zone_low else "high" if passes > config.zone_high else "mid"
    return f"format:{form} mastery:{level}"


def propose(view: View) -> tuple[Proposal, ...]:
    """The eligible arms in the order of ``STRATEGIES``; at least one."""
    drill = _format_drill(view)
    # Rewards would teach the form as well, but a step of SFT costs a fraction of one of GRPO.
    if drill and view.drill_pays:
        return (drill,)
    reinforce = _reinforce(view)
    if reinforce and view.focus_value - view.focus_pass < _FORM_COST:
        drill = None  # GRPO has its signal, and mends what little the form still costs
    study = _study(view) if reinforce else None  # without a signal the gate orders it anyway
    arms = (drill, _review(view), _raise(view), _lower(view), study, reinforce)
    return tuple(arm for arm in arms if arm is not None) or (_no_signal_gate(view),)


def _format_drill(view: View) -> Proposal | None:
    if not view.needs_format:
        return None
    values = {c: view.masteries[c].value_rate.mean for c in view.cells if view.is_measured(c)}
    carriers = {c: v for c, v in values.items() if v >= _VALUE_KNOWN}
    if carriers:
        why = "where the value is mostly right"
    else:
        carriers = dict.fromkeys(_easiest(view), 1.0)
        why = "the easiest, as no measured cell has its value mostly right"
    for cell in view.config.guard:  # a form learnt on some skills alone is unlearnt on others
        carriers.setdefault(cell, _VALUE_KNOWN)
    weights = mixture(carriers)
    return Proposal(
        "format_drill",
        "sft",
        weights,
        view.config.replay_fraction,
        f"formatted share {view.focus_format:.2f} of the focus is under the target "
        f"{view.config.format_target:.2f} ({_numbers(view, view.focus)}): SFT on the form in "
        f"cells {why} ({_numbers(view, _names(weights))})",
    )


def _review(view: View) -> Proposal | None:
    fallen = [
        cell
        for cell in view.cells
        if cell in view.peaks
        and view.masteries[cell].pass_rate.interval()[1] < view.peaks[cell] - _FALL
    ]
    if not fallen:
        return None
    falls = ", ".join(f"{c} {view.peaks[c]:.2f} -> {view.passes(c):.2f}" for c in fallen)
    replay = max(_REVIEW_REPLAY, view.config.replay_fraction)
    reason = f"pass rate fell since training ({falls})"
    weights = mixture({cell: view.share(cell) for cell in fallen})
    share = _expected_share(view, weights)
    if share >= view.config.min_informative:
        reason += f", expected informative share {share:.2f}: GRPO with replay share {replay:.2f}"
        return Proposal("review", "grpo", weights, replay, reason)
    weights = mixture(dict.fromkeys(fallen, 1.0))
    return Proposal("review", "sft", weights, replay, f"{reason}; {_no_signal(view, share)}")


def _raise(view: View) -> Proposal | None:
    harder = [cell for cell in _harder(view) if view.is_measured(cell)]
    harder = [cell for cell in harder if view.share(cell) >= view.config.min_informative]
    scores = {cell: view.share(cell) for cell in _known(view)}
    for cell in harder:
        scores.setdefault(cell, _NEIGHBOUR * view.share(cell))
    weights = mixture(scores)
    if not any(cell in harder for cell in _names(weights)):
        return None
    if (share := _expected_share(view, weights)) < view.config.min_informative:
        return None
    return Proposal(
        "raise",
        "grpo",
        weights,
        view.config.replay_fraction,
        f"the focus nears mastery ({_numbers(view, view.focus)}; over {view.config.zone_high:.2f} "
        f"is mastered): GRPO with the next level mixed in ({_numbers(view, harder)}), expected "
        f"informative share {share:.2f}",
    )


def _lower(view: View) -> Proposal | None:
    if view.needs_format and view.drill_pays:
        return None  # low pass rates say little about difficulty while the form is missing
    low = [
        cell
        for cell in _known(view)
        if view.passes(cell) < view.config.zone_low and view.share(cell) < _DRY
    ]
    if not low:
        return None
    below = _unique(neighbour(view.cells, cell, -1) for cell in low)
    # Where the values are right already, an easier level has only form left to teach.
    easier = [
        cell
        for cell in below
        if view.is_measured(cell) and view.masteries[cell].value_rate.mean <= view.config.zone_high
    ]
    out_of_reach = (
        f"pass rate is under {view.config.zone_low:.2f} and groups are seldom mixed "
        f"({_numbers(view, low)}; one level easier: {_numbers(view, below) if below else 'none'})"
    )
    scores = {cell: view.share(cell) for cell in easier}
    for cell in low:
        scores.setdefault(cell, _NEIGHBOUR * view.share(cell))
    weights = mixture(scores)
    share = _expected_share(view, weights)
    replay = view.config.replay_fraction
    if share >= view.config.min_informative:
        if not any(cell in easier for cell in _names(weights)):
            return None  # it would be reinforce under another name
        reason = f"{out_of_reach}: GRPO one level easier, expected informative share {share:.2f}"
        return Proposal("lower", "grpo", weights, replay, reason)
    weights = mixture(dict.fromkeys((*low, *easier), 1.0))
    reason = f"{out_of_reach}; {_no_signal(view, share)}"
    return Proposal("lower", "sft", weights, replay, reason)


def _study(view: View) -> Proposal | None:
    """Worked answers teach quickly what is seldom right; what comes of it, the bandit measures."""
    if view.needs_format:
        return None
    open_cells = [cell for cell in _known(view) if not view.is_mastered(cell)]
    if not open_cells:
        return None
    weights = mixture(dict.fromkeys(open_cells, 1.0))
    return Proposal(
        "study",
        "sft",
        weights,
        view.config.replay_fraction,
        f"not mastered yet, which begins over {view.config.zone_high:.2f} "
        f"({_numbers(view, _names(weights))}): SFT on verified worked answers",
    )


def _reinforce(view: View) -> Proposal | None:
    weights = mixture({cell: view.share(cell) for cell in _known(view)})
    share = _expected_share(view, weights)
    if share < view.config.min_informative:
        return None
    return Proposal(
        "reinforce",
        "grpo",
        weights,
        view.config.replay_fraction,
        f"expected informative share {share:.2f} is over {view.config.min_informative:.2f} "
        f"({_numbers(view, _names(weights))}): GRPO at this level",
    )


def _no_signal_gate(view: View) -> Proposal:
    """No arm is eligible: SFT on the next level if the focus is mastered, else on the focus."""
    share = max(view.share(cell) for cell in view.focus)
    if all(view.is_mastered(cell) for cell in view.focus) and (harder := _harder(view)):
        strategy, chosen = "raise", harder
    else:
        strategy = "reinforce"
        chosen = [c for c in view.focus if not view.is_mastered(c)] or list(view.focus)
    return Proposal(
        strategy,
        "sft",
        mixture(dict.fromkeys(chosen, 1.0)),
        view.config.replay_fraction,
        f"{_no_signal(view, share)} ({_numbers(view, _unique([*view.focus, *chosen]))})",
    )


def _harder(view: View) -> list[str]:
    """One level above each focus cell that is mastered, or passed often and running dry."""
    ready = [
        cell
        for cell in view.focus
        if view.is_mastered(cell)
        or (view.is_measured(cell) and view.passes(cell) >= _EVEN and view.share(cell) < _DRY)
    ]
    return _unique(harder_unmastered(view, cell) for cell in ready)


def _known(view: View) -> list[str]:
    """The measured focus cells; all of them before the first measurement."""
    return [cell for cell in view.focus if view.is_measured(cell)] or list(view.focus)


def _easiest(view: View) -> list[str]:
    """The easiest cell of each focus skill."""
    skills = _unique(cell.rpartition("/")[0] for cell in view.focus)
    return [min((c for c in view.cells if c.rpartition("/")[0] == s), key=_level) for s in skills]


def _level(cell: str) -> int:
    return int(cell.rpartition("/")[2])


def _names(weights: Sequence[tuple[str, float]]) -> list[str]:
    return [cell for cell, _ in weights]


def _unique(cells: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(cell for cell in cells if cell is not None))


def _expected_share(view: View, weights: Sequence[tuple[str, float]]) -> float:
    return mixture_share(weights, {cell: view.share(cell) for cell, _ in weights})


def _no_signal(view: View, share: float) -> str:
    return (
        f"no signal: expected informative share {share:.2f} is under "
        f"{view.config.min_informative:.2f}, so SFT on verified samples instead of GRPO"
    )


def _numbers(view: View, cells: Sequence[str], shown: int = 3) -> str:
    """The measured rates of the first ``shown`` cells, for a reason."""
    parts = []
    for cell in cells[:shown]:
        m = view.masteries[cell]
        if m.samples == 0.0:
            parts.append(f"{cell} not measured")
        else:
            parts.append(
                f"{cell} passes {m.pass_rate.mean:.2f}, value {m.value_rate.mean:.2f}, "
                f"form {m.format_rate.mean:.2f}"
            )
    if len(cells) > shown:
        parts.append(f"and {len(cells) - shown} more")
    return "; ".join(parts)
