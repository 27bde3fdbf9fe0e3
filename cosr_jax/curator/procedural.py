"""The embedded curator: mastery estimates, strategy arms and a bandit, without any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.config import CuratorConfig
from cosr_jax.curator import bandit, strategies, tuning
from cosr_jax.curator.curriculum import mixture_share, nearest_the_zone
from cosr_jax.curator.mastery import CellMastery
from cosr_jax.protocols import Curator, Lab
from cosr_jax.types import CellEvidence, Diagnosis, Plan, UserError

#: Change of validation accuracy over one round that counts as reward 1 (its negative as 0).
_FULL_GAIN = 0.2
#: Drop under the best validation score after which steps are halved; smaller ones are noise.
_REGRESSION = 0.08


def reward_of_gain(gain: float) -> float:
    """A gain in validation accuracy as a bandit reward in [0, 1]; no change is 1/2."""
    return min(max(0.5 + 0.5 * gain / _FULL_GAIN, 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be done in a round."""

    context: str  # the bandit's
    proposals: Mapping[str, strategies.Proposal]  # by strategy, in the bandit's order

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.proposals)


class ProceduralCurator(Curator):
    """Plans from measured rates alone; see ``protocols.Curator``.

    The same sequence of calls gives the same plans, also across ``state_dict``.

    Args:
      config: thresholds and the focus; an empty focus is whatever is nearest the zone.
      cells: the task source's grid, as "skill/level".
      num_generations: samples in a GRPO group.
      steps_per_round: optimizer steps in a plan.
      has_kl: whether GRPO steps have a KL term, which ``tuning`` may scale.

    Raises:
      UserError: focus or guard names a cell that is not in ``cells``, or one twice.
      ValueError: ``cells`` is empty, or a number is too small.
    """

    def __init__(
        self,
        config: CuratorConfig,
        cells: Sequence[str],
        num_generations: int,
        steps_per_round: int,
        has_kl: bool = False,
    ):
        if not cells or num_generations < 2 or steps_per_round < 1:
            raise ValueError(
                f"{len(cells)} cells, {num_generations} generations, {steps_per_round} steps: "
                "needs at least 1, 2 and 1"
            )
        for key, named in (("focus", config.focus), ("guard", config.guard)):
            for cell in named:
                if cell not in cells:
                    raise UserError(
                        f"config.curator.{key}: {cell!r} is not a cell of the task source",
                        f"choose from {', '.join(cells)}",
                    )
            if len(set(named)) < len(named):
                raise UserError(
                    f"config.curator.{key}: {named!r} names a cell twice", "name each once"
                )
        self._config = config
        self._cells = tuple(cells)
        self._group_size = num_generations
        self._steps = steps_per_round
        self._has_kl = has_kl
        self._masteries = {cell: CellMastery() for cell in self._cells}
        self._bandit: bandit.BanditState = {}
        self._peaks: dict[str, float] = {}
        self._last_plan: Plan | None = None
        self._decisions: list[dict[str, Any]] = []
        self._tunings: bandit.BanditState = {}  # rule -> arms, see ``tuning``
        self._trial = ("", "")  # rule and arm of the last plan; "" without one

    @property
    def cells(self) -> tuple[str, ...]:
        """The whole grid."""
        return self._cells

    @property
    def skills(self) -> tuple[str, ...]:
        """The grid's skills, in its order."""
        return tuple(dict.fromkeys(cell.rpartition("/")[0] for cell in self._cells))

    @property
    def masteries(self) -> Mapping[str, CellMastery]:
        """The current estimate of every cell, e.g. for a heat map."""
        return dict(self._masteries)

    @property
    def rates(self) -> Mapping[str, float]:
        """Mean estimated pass rate of the cells that were measured."""
        return {c: m.pass_rate.mean for c, m in self._masteries.items() if m.samples > 0}

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One {"round", "strategy", "context", "reason", "gain"} per plan; gain None till known."""
        return [dict(decision) for decision in self._decisions]

    def wanted_diagnosis(self) -> tuple[str, ...]:
        """Cells whose estimate is too old or thin to plan on, to be sampled before ``plan``.

        At the start these are the focus cells, their neighbours and the guarded cells (with an
        empty focus, all cells).  After an SFT round they are the focus, its neighbours and what was
        trained: SFT changes the student without measuring it.  After a GRPO round they are those
        with less than one group's worth of faded samples, without the trained ones, whose rollouts
        count.
        """
        if self._last_plan is None:
            if not self._config.focus:
                return self._cells
            wanted = {*self._surroundings(), *self._config.guard}
            return tuple(cell for cell in self._cells if cell in wanted)
        trained = {cell for cell, _ in self._last_plan.mixture}
        if self._last_plan.algorithm == "sft":
            wanted = trained | set(self._surroundings())
            return tuple(cell for cell in self._cells if cell in wanted)
        return tuple(
            cell
            for cell in self._surroundings()
            if cell not in trained and self._masteries[cell].samples < self._group_size
        )

    def plan(self, diagnosis: Diagnosis, lab: Lab | None = None) -> Plan:
        """Takes in the evidence and orders the next round; the lab is not needed.

        Raises:
          ValueError: evidence of an unknown cell, or impossible counts.
        """
        self.observe(diagnosis)
        return self.commit(diagnosis, self.own_choice(diagnosis, self.options()))

    def own_choice(self, diagnosis: Diagnosis, options: Options) -> Plan:
        """The plan that measured gains speak for, and why; not yet the round's."""
        plan = self.order(diagnosis, options, self.select(options, options.names))
        reason = plan.reason + self.bounds(options, options.names)
        return dataclasses.replace(plan, reason=reason)

    def options(self) -> Options:
        """What the measurements allow now."""
        view = self._view()
        where = strategies.context(view)
        arm = self._bandit.get(where, {}).get("format_drill")
        drill_pays = arm is None or arm.value > reward_of_gain(0.0)
        proposals = strategies.propose(dataclasses.replace(view, drill_pays=drill_pays))
        return Options(where, {proposal.strategy: proposal for proposal in proposals})

    def select(
        self, options: Options, names: Sequence[str], prior: Mapping[str, float] | None = None
    ) -> str:
        """The one of ``names`` that measured gains speak for; ``prior`` as in ``bandit.bounds``."""
        return bandit.select(self._bandit, options.context, names, self._config.exploration, prior)

    def bounds(
        self, options: Options, names: Sequence[str], prior: Mapping[str, float] | None = None
    ) -> str:
        """The bounds behind ``select``, for a reason; "" where there was no choice."""
        if len(names) < 2:
            return ""
        factor = self._config.exploration
        bounds = bandit.bounds(self._bandit, options.context, names, factor, prior)
        return "; bounds: " + ", ".join(f"{name} {ucb:.2f}" for name, ucb in bounds.items())

    def order(self, diagnosis: Diagnosis, options: Options, name: str) -> Plan:
        """The plan that carries out one of the options."""
        chosen = options.proposals[name]
        scale, caution = _learning_rate_scale(diagnosis)
        return Plan(
            strategy=chosen.strategy,
            algorithm=chosen.algorithm,
            mixture=chosen.mixture,
            steps=self._steps,
            # Nothing can be reviewed before the first round.
            replay_fraction=chosen.replay_fraction if self._last_plan else 0.0,
            learning_rate_scale=scale,
            context=options.context,
            reason=chosen.reason + caution,
        )

    def commit(self, diagnosis: Diagnosis, plan: Plan) -> Plan:
        """Takes ``plan`` as the round's, whoever made it; its gain is due next.

        Returns:
          The plan with the change of a hyper-parameter that is due, if one is.
        """
        plan = self._tuned(diagnosis, plan)
        self._last_plan = plan
        for cell, _ in plan.mixture:
            self._peaks.setdefault(cell, 0.0)
        self._decisions.append(
            {
                "round": diagnosis.round,
                "strategy": plan.strategy,
                "context": plan.context,
                "reason": plan.reason,
                "gain": None,
            }
        )
        return plan

    def _tuned(self, diagnosis: Diagnosis, plan: Plan) -> Plan:
        """``plan`` with the change that its measurements call for and past gains do not forbid."""
        self._trial = ("", "")
        if plan.algorithm != "grpo":
            return plan
        view = self._view()
        shares = {cell: view.share(cell) for cell, _ in plan.mixture}
        change = tuning.propose(
            self._config,
            tuning.Situation(
                group_size=self._group_size,
                has_kl=self._has_kl,
                has_fallen=_learning_rate_scale(diagnosis)[0] < 1.0,
                gains=[decision["gain"] for decision in self._decisions],
                informative=mixture_share(plan.mixture, shares),
            ),
        )
        if change is None:
            return plan
        is_ordered = tuning.is_ordered(self._tunings, change, self._config.exploration)
        self._trial = (change.name, change.name if is_ordered else tuning.AS_CONFIGURED)
        return change.applied(plan) if is_ordered else plan

    def observe_gain(self, plan: Plan, gain: float) -> None:
        """Credits ``plan``'s strategy, in its context, with the change of validation accuracy.

        Raises:
          ValueError: ``plan`` is not the latest, its gain is known already, or ``gain`` is not
            finite.
        """
        if plan != self._last_plan or self._decisions[-1]["gain"] is not None:
            raise ValueError(f"no gain is due for the plan {plan.strategy!r} ({plan.reason})")
        reward = reward_of_gain(gain)
        self._bandit = bandit.update(self._bandit, plan.context, plan.strategy, reward)
        rule, arm = self._trial
        if rule:
            self._tunings = bandit.update(self._tunings, rule, arm, reward)
        self._decisions[-1]["gain"] = gain

    def state_dict(self) -> dict[str, Any]:
        """As in the protocol; configuration is not part of it."""
        return {
            "masteries": {cell: m.to_dict() for cell, m in self._masteries.items()},
            "bandit": bandit.to_dict(self._bandit),
            "peaks": dict(self._peaks),
            "last_plan": self._last_plan.to_dict() if self._last_plan else None,
            "decisions": self.decisions,
            "tunings": bandit.to_dict(self._tunings),
            "trial": list(self._trial),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As in the protocol.

        Raises:
          ValueError: the state is of another grid of cells.
        """
        if state["masteries"].keys() != self._masteries.keys():
            odd = sorted(state["masteries"].keys() ^ self._masteries.keys())
            raise ValueError(f"curator state of another grid; cells that differ: {odd}")
        self._masteries = {
            cell: CellMastery.from_dict(state["masteries"][cell]) for cell in self._cells
        }
        self._bandit = bandit.from_dict(state["bandit"])
        self._peaks = dict(state["peaks"])
        plan = state["last_plan"]
        self._last_plan = None if plan is None else Plan.from_dict(plan)
        self._decisions = [dict(decision) for decision in state["decisions"]]
        self._tunings = bandit.from_dict(state.get("tunings", {}))
        rule, arm = state.get("trial", ("", ""))
        self._trial = (rule, arm)

    def observe(self, diagnosis: Diagnosis) -> None:
        """Takes in the evidence of a round; the first part of ``plan``.

        Raises:
          ValueError: evidence of an unknown cell, or impossible counts.
        """
        for evidence in diagnosis.evidence:
            if evidence.cell not in self._masteries:
                raise ValueError(f"evidence of {evidence.cell!r}, which is not in the grid")
        fresh: dict[str, CellEvidence] = {}
        for evidence in diagnosis.evidence:  # a cell may come twice: from training and diagnosis
            cell = evidence.cell
            fresh[cell] = fresh[cell] + evidence if cell in fresh else evidence
        # SFT moves the student without measuring it: what was counted before is no longer true.
        moved = self._last_plan is not None and self._last_plan.algorithm == "sft"
        for cell, mastery in self._masteries.items():
            known = mastery.faded(self._config.discount)
            if cell in fresh:
                known = (CellMastery() if moved else known).observe(fresh[cell])
            self._masteries[cell] = known
        for cell, peak in self._peaks.items():
            if cell in fresh:
                self._peaks[cell] = max(peak, self._masteries[cell].pass_rate.interval()[0])

    def _focus(self) -> tuple[str, ...]:
        if self._config.focus:
            return self._config.focus
        return nearest_the_zone(self._masteries, self._cells, self._group_size)

    def _surroundings(self) -> tuple[str, ...]:
        """Focus, one level around it, and the next level not mastered, in grid order."""
        view = self._view()
        wanted = set(view.focus)
        for cell in view.focus:
            for near in (
                strategies.neighbour(self._cells, cell, -1),
                strategies.neighbour(self._cells, cell, 1),
                strategies.harder_unmastered(view, cell),
            ):
                if near is not None:
                    wanted.add(near)
        return tuple(cell for cell in self._cells if cell in wanted)

    def informative_share(self, cell: str) -> float:
        """Expected share of groups of a cell from which GRPO can learn, in [0, 1]."""
        return self._view().share(cell)

    def _view(self) -> strategies.View:
        return strategies.View(
            config=self._config,
            cells=self._cells,
            focus=self._focus(),
            masteries=self._masteries,
            group_size=self._group_size,
            peaks=self._peaks,
            drill_pays=True,
        )


def _learning_rate_scale(diagnosis: Diagnosis) -> tuple[float, str]:
    """Half steps while validation accuracy is clearly under its best, and why."""
    now, best = diagnosis.probe_score, diagnosis.best_score
    if now is None or best is None or best - now <= _REGRESSION:
        return 1.0, ""
    return 0.5, f"; half the learning rate, as validation is at {now:.2f} after {best:.2f}"
