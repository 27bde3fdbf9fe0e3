"""The language-model curator: failures become audited weaknesses, and these verified tasks.

Each round: an analyst makes claims about failed training samples; ``audit`` tests them on fresh
answers; a planner proposes; the bandit decides on measured gains; an author writes tasks, which
prove themselves before the student sees them.  Nothing that a model says is believed before that.

Where the models are of no use (no endpoint, breaker open, budget spent, unusable answers) the
procedural curator plans alone, from the same state; the decision, the log and the report say so.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.config import CuratorConfig
from cosr_jax.curator import effectiveness
from cosr_jax.curator.analysis import Inquiry, analyse
from cosr_jax.curator.audit import Finding, audit
from cosr_jax.curator.authoring import FEWEST, Authored, write_tasks
from cosr_jax.curator.budget import Budget
from cosr_jax.curator.calls import CallError
from cosr_jax.curator.client import Client
from cosr_jax.curator.planner import FORMS, ask_for_advice, target
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.curator.rounds import Round
from cosr_jax.curator.star import STAR, own_solutions
from cosr_jax.protocols import Curator, Lab
from cosr_jax.types import CellEvidence, Diagnosis, FailedSample, Plan

#: Rounds in a row without a gain after which a failed task may be taken apart.
_STUCK_ROUNDS = 2


class _Alone(Exception):
    """The models are of no use in this round, or for the rest of it.

    Args:
      reason: from a small set, for counting, e.g. "breaker_open".
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class LlmCurator(Curator):
    """Plans with the help of language models; see ``protocols.Curator``.

    Args:
      config: the curator's settings; ``config.llm`` names the models.
      procedural: keeps the estimates and the bandit, and takes over.
      seed: of what is shown to the models.
      client: asks the models; None: made from ``config.llm``, if that names an endpoint.

    Raises:
      UserError: ``config.llm`` contradicts itself, or a key or the ``openai`` package is missing.
    """

    def __init__(
        self,
        config: CuratorConfig,
        procedural: ProceduralCurator,
        seed: int,
        client: Client | None = None,
    ):
        self._config, self._base, self._seed = config, procedural, seed
        self._records: list[dict[str, Any]] = []
        if client is None and config.llm.endpoints:
            client = Client(config.llm, seed=seed, on_call=self._note_call)
        self._client = client
        self._told_s = (0.0, 0.0)  # the client's seconds that ``take_seconds`` has told
        self._counts: collections.Counter[str] = collections.Counter()
        self._chains: list[dict[str, Any]] = []

    @property
    def budget(self) -> Budget | None:
        """What its models may cost; None where there are none."""
        return self._client.budget if self._client else None

    def wanted_diagnosis(self) -> tuple[str, ...]:
        """As the procedural curator's."""
        return self._base.wanted_diagnosis()

    def asking_ahead(
        self, round: int, evidence: Sequence[CellEvidence], failures: Sequence[FailedSample]
    ) -> contextlib.AbstractContextManager[None]:
        """Has the failures explained, unless fresh answers are wanted, which would be shown too.

        Raises:
          UserError: not one failure fits into a prompt.
        """
        if self._client is None or not failures or self.wanted_diagnosis():
            return contextlib.nullcontext()
        self._client.start_round(round)
        inquiry = self._inquiry(round, evidence, failures)
        return self._client.asking(inquiry.questions(self._client))

    def plan(self, diagnosis: Diagnosis, lab: Lab) -> Plan:
        """Takes in the evidence, asks, checks, and orders the next round."""
        self._base.observe(diagnosis)
        now = Round(diagnosis, lab, self._base.options())
        try:
            self._look(now)
            plan = self._decide(now)
        except _Alone as alone:
            now.fallback = alone.reason
            plan = self._alone(now)
        if now.fallback:
            self._counts["fallbacks"] += 1
            self._counts[f"fallback/{now.fallback}"] += 1
        chain = now.chain(plan, self._spent(now))
        self._chains.append(chain)
        self._records.append({"event": "plan", **chain})
        return self._base.commit(diagnosis, plan)

    def observe_gain(self, plan: Plan, gain: float) -> None:
        """Credits the plan's strategy, as the procedural curator does."""
        self._base.observe_gain(plan, gain)
        self._chains[-1]["gain"] = gain

    @property
    def rates(self) -> Mapping[str, float]:
        """Mean estimated pass rate of the cells that were measured."""
        return self._base.rates

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One {"round", "strategy", "context", "reason", "gain"} per plan."""
        return self._base.decisions

    @property
    def chains(self) -> list[dict[str, Any]]:
        """For each plan: failures, findings, advice, authored tasks, fallback, strategy, gain."""
        return [dict(chain) for chain in self._chains]

    def figures(self) -> Mapping[str, float]:
        """Counts of claims, tasks and fallbacks, effects, the client's; under curator/llm/."""
        values = self._client.stats() if self._client else {}
        values |= {name: float(count) for name, count in self._counts.items()}
        values |= effectiveness.figures(self._chains)
        values |= self._acceptance(values)
        return {f"curator/llm/{name}": value for name, value in sorted(values.items())}

    def _acceptance(self, values: Mapping[str, float]) -> dict[str, float]:
        """Shares of claims and tasks that were worth something, and a task's price in tokens."""
        counts, kept = self._counts, self._counts["tasks_kept"]
        spent = sum(
            values.get(f"tokens/{role}/{side}", 0.0)
            for role in ("author", "checker")
            for side in ("prompt", "completion")
        )
        shares = {
            "acceptance/claims": (counts["claims_accepted"], counts["claims"]),
            "acceptance/tasks": (kept, counts["tasks_written"]),
            "tokens_per_kept_task": (spent, kept),
        }
        return {name: part / whole for name, (part, whole) in shares.items() if whole}

    def take_records(self) -> list[dict[str, Any]]:
        """Calls and plans since the last time."""
        records, self._records[:] = list(self._records), []
        return records

    def take_seconds(self) -> tuple[float, float]:
        """As in the protocol."""
        if self._client is None:
            return 0.0, 0.0
        (told_busy, told_waited), client = self._told_s, self._client
        self._told_s = client.busy_s, client.waited_s
        return client.busy_s - told_busy, client.waited_s - told_waited

    def state_dict(self) -> dict[str, Any]:
        """As in the protocol; the client's state is part of it."""
        return {
            "procedural": self._base.state_dict(),
            "client": self._client.state_dict() if self._client else None,
            "counts": dict(self._counts),
            "chains": self.chains,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As in the protocol.

        Raises:
          ValueError: the state is of another grid of cells.
        """
        self._base.load_state_dict(state["procedural"])
        if self._client and state["client"] is not None:
            self._client.load_state_dict(state["client"])
        self._counts = collections.Counter(state["counts"])
        self._chains = [dict(chain) for chain in state["chains"]]

    def _note_call(self, record: Mapping[str, Any]) -> None:
        self._records.append({"event": "call", **record})

    def _look(self, now: Round) -> None:
        """Has the failures explained, and tests the explanations."""
        if self._client is None:
            raise _Alone("no_endpoint")
        self._client.start_round(now.diagnosis.round)
        llm, diagnosis = self._config.llm, now.diagnosis
        inquiry = self._inquiry(diagnosis.round, diagnosis.evidence, diagnosis.failures)
        try:
            analysis = analyse(self._client, inquiry)
        except CallError as error:
            raise _Alone(error.reason) from error
        for reason in analysis.lost:
            self._counts[f"analysts_lost/{reason}"] += 1
        now.findings = audit(
            analysis.weaknesses,
            diagnosis.failures,
            self._base.cells,
            now.lab,
            llm.audit_samples,
            llm.audit_alpha,
            tolerated=1.0 - self._config.zone_high,
        )
        self._counts["claims"] += len(now.findings)
        self._counts["claims_shared"] += sum(f.weakness.is_shared for f in now.findings)
        self._counts["claims_accepted"] += len(now.accepted)
        self._counts["claims_hallucinated"] += len(now.findings) - len(now.accepted)
        self._counts["ids_hallucinated"] += analysis.unknown_ids
        for reason, count in analysis.dropped.items():
            self._counts[f"claims_dropped/{reason}"] += count

    def _inquiry(
        self, round: int, evidence: Sequence[CellEvidence], failures: Sequence[FailedSample]
    ) -> Inquiry:
        llm, skills = self._config.llm, self._base.skills
        return Inquiry(
            failures,
            evidence,
            skills,
            llm.claims,
            llm.prompt_tokens,
            self._seed + round,
            llm.analysts,
        )

    def _decide(self, now: Round) -> Plan:
        """Asks for a proposal and lets the bandit choose; writes tasks if it chose to."""
        assert self._client is not None
        llm, diagnosis = self._config.llm, now.diagnosis
        arms = now.options.names
        if now.authorable:
            arms += tuple(f for f in FORMS if f != "decomposition" or self._is_stuck(now)) + STAR
        if len(arms) == 1:  # no weakness, and one thing to do: nothing to ask about
            return self._base.order(diagnosis, now.options, arms[0])
        try:
            now.advice = ask_for_advice(
                self._client,
                now.accepted,
                arms,
                self._base.decisions,
                diagnosis.evidence,
                self._base.skills,
                llm,
            )
        except CallError as error:
            raise _Alone(error.reason) from error
        prior = now.advice.prior(llm.prior_weight) if llm.prior_weight else {}
        chosen = self._base.select(now.options, arms, prior)
        choice = (
            f"; proposed was {now.advice.strategy}, which counts as {llm.prior_weight:g} rounds"
            f"{self._base.bounds(now.options, arms, prior)}"
        )
        if chosen in FORMS + STAR:
            plan = self._authored_plan(now, chosen)
        else:
            plan = self._focused(now, self._base.order(diagnosis, now.options, chosen))
        scale = plan.learning_rate_scale
        if now.advice.learning_rate_scale != 1.0:
            scale = scale * now.advice.learning_rate_scale
            scale = min(max(scale, llm.learning_rate_low), llm.learning_rate_high)
            choice += f"; learning rate scaled by {now.advice.learning_rate_scale:g}"
        return dataclasses.replace(plan, reason=plan.reason + choice, learning_rate_scale=scale)

    def _focused(self, now: Round, plan: Plan) -> Plan:
        """A round of reinforcement, half of it on an accepted weakness that the advice names."""
        assert now.advice is not None
        named = [f for f in now.accepted if f.weakness.skill in now.advice.focus]
        if plan.algorithm != "grpo" or not named:
            return plan
        now.target = target(named, now.advice)
        mixture = self._mixture(now.target, plan.mixture)
        if mixture == plan.mixture:
            return plan
        weakness = now.target.weakness
        why = f"; half of it where {weakness.skill} is weak in {weakness.kind}"
        return dataclasses.replace(plan, mixture=mixture, reason=plan.reason + why)

    def _authored_plan(self, now: Round, form: str) -> Plan:
        """A round on new tasks, beside what the procedural curator would have practised."""
        assert self._client is not None and now.advice is not None
        llm, diagnosis, advice = self._config.llm, now.diagnosis, now.advice
        now.target = target(now.authorable, advice)
        count = max(advice.num_tasks, FEWEST)
        try:
            now.authored = (
                own_solutions(form, now.target, count, llm.task_samples, now.lab)
                if form in STAR
                else self._written(now, form, count)
            )
        except CallError as error:
            raise _Alone(error.reason) from error
        authored = now.authored
        self._counts["tasks_written"] += authored.written
        self._counts["tasks_kept"] += len(authored.tasks)
        for reason, count in authored.refused.items():
            self._counts[f"tasks_refused/{reason}"] += count
        if len(authored.tasks) < FEWEST:
            raise _Alone("too_few_tasks")
        beside = self._base.own_choice(diagnosis, now.options)
        weakness = now.target.weakness
        how = "drawn with solutions of the student's own" if form in STAR else "written against it"
        return dataclasses.replace(
            beside,
            strategy=form,
            algorithm="sft" if form in ("worked", *STAR) else "grpo",
            mixture=self._mixture(now.target, beside.mixture),
            authored=authored.tasks,
            authored_share=llm.tasks_share,
            reason=(
                f"{weakness.skill} is weak in {weakness.kind} ({now.target.reason}): "
                f"{len(authored.tasks)} of {authored.written} tasks {how} are kept"
            ),
        )

    def _written(self, now: Round, form: str, count: int) -> Authored:
        """Tasks of the author's.

        Raises:
          CallError: no model gave a usable answer.
        """
        assert self._client is not None and now.advice is not None and now.target is not None
        return write_tasks(
            self._client,
            form,
            now.target,
            now.diagnosis.failures,
            count,
            now.advice.difficulty,
            self._base.cells,
            now.lab,
            self._config,
            self._seed + now.diagnosis.round,
        )

    def _is_stuck(self, now: Round) -> bool:
        """Whether what is weak is hardly ever solved, or rounds in a row gained nothing."""
        gains = [decision["gain"] for decision in self.decisions[-_STUCK_ROUNDS:]]
        gained_nothing = len(gains) == _STUCK_ROUNDS and all(
            g is not None and g <= 0 for g in gains
        )
        is_unsolved = any(finding.rate >= 1.0 - self._config.zone_low for finding in now.authorable)
        return gained_nothing or is_unsolved

    def _mixture(
        self, finding: Finding, beside: Sequence[tuple[str, float]]
    ) -> tuple[tuple[str, float], ...]:
        """Half of the weak cells from which something can be learnt, half of ``beside``."""
        shares = {cell: self._base.informative_share(cell) for cell in finding.cells}
        shares = {c: s for c, s in shares.items() if s >= self._config.min_informative}
        weights: collections.Counter[str] = collections.Counter()
        for cell, weight in beside:
            weights[cell] += weight * (0.5 if shares else 1.0)  # type: ignore[assignment]
        for cell, share in shares.items():
            weights[cell] += 0.5 * share / sum(shares.values())  # type: ignore[assignment]
        return tuple(sorted(weights.items(), key=lambda item: -item[1]))

    def _alone(self, now: Round) -> Plan:
        """What the procedural curator orders, marked."""
        plan = self._base.own_choice(now.diagnosis, now.options)
        reason = f"fallback to the procedural curator ({now.fallback}): {plan.reason}"
        return dataclasses.replace(plan, reason=reason)

    def _spent(self, now: Round) -> dict[str, float]:
        """What the round's calls have cost."""
        if self._client is None or now.fallback == "no_endpoint":
            return {"calls": 0, "tokens": 0, "dollars": 0.0}
        spent = self._client.budget.spent_in_round
        return {"calls": spent.calls, "tokens": spent.tokens, "dollars": spent.dollars}
