"""The closed loop, whole: measure, plan, practise, judge, step, measure again.

Each round the curator plans from what was measured, the student answers tasks or studies worked
ones, verifiers judge, one compiled step updates the adapters, and the change of validation accuracy
flows back to the curator.  The loop ends when convergence says so; the best checkpoint is kept and
measured on test suites that neither curator nor convergence ever saw.

Everything random takes its seed from the run's seed and the step, and everything else that the
future depends on is in the checkpoint, so a killed run resumes to the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosr_jax.config import RunConfig, config_hash
from cosr_jax.run import convergence
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.checkpoint import CheckpointStore
from cosr_jax.run.evaluation import ProbeResult, judged_by_domain, measure
from cosr_jax.run.judging import JudgeClock, too_few_verdicts
from cosr_jax.run.laboratory import Laboratory
from cosr_jax.run.logbook import Logbook
from cosr_jax.run.metrics import overlap
from cosr_jax.run.practice import (
    count_evidence,
    derive_seed,
    draw_tasks,
    failed_samples,
    merge_evidence,
    sample_groups,
)
from cosr_jax.run.progress import Progress
from cosr_jax.run.report import RunReport, render_terminal, write_report
from cosr_jax.run.reporting import training_report
from cosr_jax.run.rooms import (
    CuratorMaker,
    Rooms,
    School,
    copy_state,
    learning_rate,
    make_curator,
    open_rooms,
    open_school,
)
from cosr_jax.run.signals import StopRequest
from cosr_jax.run.state import LoopState, RoundTally
from cosr_jax.run.statistics import standard_error
from cosr_jax.run.workdir import Workdir, open_workdir
from cosr_jax.tasks.probes import ProbeSet
from cosr_jax.train.batching import TrainBatch, grpo_batch, sft_batch
from cosr_jax.train.step import TrainState, init_state
from cosr_jax.types import CellEvidence, Diagnosis, Plan, RolloutGroup, Task, UserError
from cosr_jax.verifiers.canaries import CanaryWatch

#: GRPO steps of a round before its share of informative groups may end it.
_STEPS_BEFORE_GATE = 2


def train(
    config: RunConfig,
    workdir: Path,
    allow_config_change: bool = False,
    arguments: tuple[str, ...] = (),
    make_curator: CuratorMaker = make_curator,
) -> RunReport | signal.Signals:
    """Trains until convergence, or goes on where an earlier call on ``workdir`` was stopped.

    Args:
      config: all settings.
      workdir: the run's folder; made if absent.
      allow_config_change: resume although settings differ from the saved ones.
      arguments: of the command line, for the report's next commands.
      make_curator: (config, cells of the task source) -> who plans the rounds.

    Returns:
      The report, which is also in the workdir; or the signal that asked to stop before the end.

    Raises:
      UserError: a setting, file or folder cannot be used.
    """
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(open_workdir(workdir, config, allow_config_change))
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(Progress())
        progress.phase(f"loading the student {config.student.source}")
        rooms = stack.enter_context(open_rooms(config, progress.phase))
        school = open_school(config, rooms, make_curator)
        store = stack.enter_context(CheckpointStore(files.checkpoints, config.checkpoint.keep))
        run = Run(config, files, rooms, school, store, progress)
        stack.enter_context(run.logbook)
        report = run.to_the_end(stop, arguments)
    if report is None:
        print(f"stopped by {stop.requested}; the same command resumes", file=sys.stderr)
        return signal.Signals[stop.requested]
    render_terminal(report)
    return report


class Run:
    """One run in progress.  ``to_the_end`` is the loop; the rest are its steps, in order."""

    def __init__(
        self,
        config: RunConfig,
        files: Workdir,
        rooms: Rooms,
        school: School,
        store: CheckpointStore,
        progress: Progress,
    ):
        self.config, self.files, self.rooms, self.school = config, files, rooms, school
        self.store, self.progress = store, progress
        self.watch = CanaryWatch(
            rooms.verifier, config.verifier.canary_every, config.verifier.accept, files.samples
        )
        self.judge_clock = JudgeClock()
        self.state = LoopState()
        self.arrays = init_state(copy_state(rooms.student.lora), config.train, rooms.mesh)
        self._saved_step = -1
        self._verifier_failed = False
        self._started = time.monotonic()
        rows = self._restore()
        self.logbook = Logbook(files, config, self.state.step, rows)
        self.rooms.engine.set_adapters(self.arrays.lora)

    def to_the_end(self, stop: StopRequest, arguments: tuple[str, ...]) -> RunReport | None:
        """Runs until a reason to end is found, then reports; None if ``stop`` came first."""
        if self.state.score is None:
            self.measure_baseline()
        while not self.state.status:
            if self.state.plan is None:
                self.state.plan = self.plan_round()
            while not self.round_is_over(self.state.plan):
                if stop.poll(self.state.step):
                    self.save()
                    return None
                self.take_step(self.state.plan)
                is_due = self.state.step % self.config.checkpoint.every_steps == 0
                if is_due and not self.round_is_over(self.state.plan):
                    self.save()  # the end of a round saves with the measurement that follows
            if not self._verifier_failed:
                self.finish_round(self.state.plan)
        return self.report(arguments)

    def measure_baseline(self) -> None:
        """Measures the untrained student: the test suites' "before", and the first validation."""
        results = []
        for probe in (*self.school.tests, self.school.validation):
            self.progress.phase(f"measuring the student on {probe.name} ({len(probe.tasks)} tasks)")
            results.append(self.measure(probe))
            self.check_verifier(judged_by_domain(probe, results[-1]), f"{probe.name} tasks")
            if self._verifier_failed:
                raise UserError(
                    self.state.reason, "see cosr doctor, then run the same command again"
                )
        *before, validation = results
        self.state.before = {p.name: r for p, r in zip(self.school.tests, before, strict=True)}
        self.take_score(validation)
        self.logbook.curves(self.state)
        self.note_opinions()
        self.save(is_best=True)

    def plan_round(self) -> Plan:
        """Samples what the curator wants to know, and lets it decide."""
        state, curator = self.state, self.school.curator
        for adviser in self.rooms.advisers.values():
            adviser.start_round(state.round + 1)
        evidence = list(state.evidence)
        wanted = curator.wanted_diagnosis()
        if wanted:
            self.progress.phase(f"diagnosing {', '.join(wanted)}")
            evidence += self.diagnose(wanted)
        best = state.convergence.best
        diagnosis = Diagnosis(
            round=state.round + 1,
            evidence=tuple(evidence),
            probe_score=state.score,
            best_score=None if best is None else best.score,
            failures=tuple(state.failures),
        )
        lab = self.laboratory()
        plan = curator.plan(diagnosis, lab)
        unseen = [task.prompt for task in plan.authored if task.task_id not in lab.admitted]
        if unseen:
            raise ValueError(f"the plan has tasks that the lab did not admit: {unseen[0]!r}")
        state.evidence, state.failures = [], []
        self.progress.phase(f"round {state.round + 1}: {plan.strategy}, because {plan.reason}")
        self.logbook.plan(state, plan, curator)
        self.note_opinions()
        return plan

    def laboratory(self) -> Laboratory:
        """Where the curator checks, before the coming round, what it believes."""
        config, school = self.config, self.school
        return Laboratory(
            config.seed,
            self.state.round + 1,
            school.source,
            school.admission,
            school.replay.tasks(),
            lambda tasks, count, seed: self.sample(tasks, seed, count),
            self.watch,
            self.rooms.chat,
            config.rollout.max_prompt_tokens,
        )

    def diagnose(self, cells: tuple[str, ...]) -> list[CellEvidence]:
        """Answers a few fresh training tasks of each cell."""
        config, state = self.config, self.state
        seed = derive_seed(config.seed, "diagnosis", state.round)
        rng = np.random.default_rng(seed)
        tasks: dict[str, Task] = {}
        for cell in cells:
            for _ in range(config.curator.diagnosis_samples):
                task = self.school.source.draw(cell, int(rng.integers(2**31)), "train")
                tasks.setdefault(task.key, task)
        groups = self.sample(list(tasks.values()), seed)
        tally = RoundTally()
        tally.count(groups)
        self.check_verifier(tally.by_domain, "samples for the diagnosis")
        self.keep_failures(groups)
        return count_evidence(groups, config.verifier.accept)

    def keep_failures(self, groups: list[RolloutGroup]) -> None:
        """Notes the latest wrong answers, for the curator."""
        latest = [*self.state.failures, *failed_samples(groups)]
        self.state.failures = latest[max(0, len(latest) - self.config.curator.max_failures) :]

    def take_step(self, plan: Plan) -> None:
        """One batch and its optimizer step(s), logged."""
        state, started, clock = self.state, time.monotonic(), self.judge_clock
        before = clock.busy_s, clock.waited_s
        groups: list[RolloutGroup] = []
        metrics: dict[str, float] = {}
        if plan.algorithm == "grpo":
            batch, groups = self.practise(plan)
        else:
            batch = self.study(plan)
        rollout_s = time.monotonic() - started
        if batch is not None:
            metrics = self.update(plan, batch)
        state.step += 1
        state.tally.steps += 1
        if metrics and groups:
            state.tally.entropy = metrics["entropy"]
            state.tally.updates_on_samples += 1
        timing = {"rollout_s": rollout_s, "step_s": time.monotonic() - started}
        timing |= overlap("judge", clock.busy_s - before[0], clock.waited_s - before[1])
        row = self.logbook.step(state, plan, groups, metrics, timing, self.rooms.verifier.stats())
        self.progress.step(row)
        self.note_opinions()
        self.stop_on_trouble(metrics)

    def practise(self, plan: Plan) -> tuple[TrainBatch | None, list[RolloutGroup]]:
        """The student's own answers, judged: a GRPO batch of the groups with a signal."""
        config, state, school = self.config, self.state, self.school
        seed = derive_seed(config.seed, "practice", state.step)
        prompts, size = config.rollout.prompts_per_step, config.rollout.num_generations
        # Groups of another size share out the same number of samples, so batches keep their shape.
        count = prompts * size // (plan.group_size or size)
        tasks = draw_tasks(
            plan,
            count,
            school.source,
            school.replay,
            school.admission,
            seed,
            least=min(count, prompts),
        )
        adapter = self.rooms.adapter if config.verifier.adapt == "rewards" else None
        groups = self.sample(tasks, seed, plan.group_size, adapter)
        school.replay.add(tasks)
        state.tally.count(groups)
        self.keep_failures(groups)
        evidence = count_evidence(groups, config.verifier.accept)
        if plan.group_size:  # whether such groups are mixed says nothing about the usual ones
            evidence = [dataclasses.replace(e, groups=0, informative_groups=0) for e in evidence]
        state.evidence = merge_evidence([*state.evidence, *evidence])
        batch, _ = grpo_batch(
            groups, school.shapes["grpo"], scale_advantages=config.grpo.scale_advantages
        )
        return batch, groups

    def study(self, plan: Plan) -> TrainBatch:
        """Worked answers that the verifier has passed and the length limit admits: an SFT batch."""
        config, school, chat = self.config, self.school, self.rooms.chat
        seed = derive_seed(config.seed, "study", self.state.step)

        def fits(task: Task) -> bool:
            return len(chat.encode_completion(task.solution)) <= config.rollout.max_new_tokens

        tasks = draw_tasks(
            plan,
            config.sft.batch_size,
            school.source,
            school.replay,
            school.admission,
            seed,
            fits,
        )
        school.replay.add(tasks)
        examples = [
            (chat.encode_prompt(task.prompt), chat.encode_completion(task.solution))
            for task in tasks
        ]
        return sft_batch(examples, school.shapes["sft"])

    def update(self, plan: Plan, batch: TrainBatch) -> dict[str, float]:
        """Moves the adapters and hands them to the rollout engine."""
        config, base = self.config, self.rooms.student.base
        if plan.algorithm != self.state.algorithm:
            # The size of SFT's gradients says nothing about GRPO's, nor their direction.
            fresh = init_state(copy_state(self.arrays.lora), config.train, self.rooms.mesh)
            self.arrays = dataclasses.replace(self.arrays, opt_state=fresh.opt_state)
            self.state.algorithm = plan.algorithm
        if plan.algorithm == "grpo" and config.grpo.kl_coef > 0:
            batch = dataclasses.replace(batch, kl_scale=jnp.float32(plan.kl_scale))
        updates = config.grpo.updates_per_batch if plan.algorithm == "grpo" else 1
        if updates > 1:
            old, _ = self.school.logprobs(self.arrays.lora, base, batch)
            batch = dataclasses.replace(batch, old_logprobs=old)
        for _ in range(updates):
            self.arrays, metrics = self.school.steps[plan.algorithm](
                self.arrays, base, batch, learning_rate(config, plan)
            )
        self.rooms.engine.set_adapters(self.arrays.lora)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def round_is_over(self, plan: Plan) -> bool:
        """Whether all steps are done, or the run ends, or GRPO has too few informative groups."""
        tally, gate = self.state.tally, self.config.curator.min_informative
        share = tally.informative_share
        is_hopeless = tally.steps >= _STEPS_BEFORE_GATE and share is not None and share < gate
        return tally.steps >= plan.steps or self.state.status != "" or is_hopeless

    def finish_round(self, plan: Plan) -> None:
        """Measures, rewards the curator, tests for convergence, saves."""
        state = self.state
        if state.tally.steps < plan.steps and not state.status:
            self.progress.note(
                f"round {state.round + 1} cut short: {state.tally.informative_share:.0%} of groups "
                f"informative, under {self.config.curator.min_informative:.0%}"
            )
        self.progress.phase("measuring the student on the validation tasks")
        with self.asking_ahead():
            result = self.measure(self.school.validation)
        self.check_verifier(judged_by_domain(self.school.validation, result), "validation tasks")
        if self._verifier_failed:
            return
        self.note_opinions()
        state.round += 1
        previous = state.score
        decision = self.take_score(result)
        assert previous is not None and state.score is not None
        self.school.curator.observe_gain(plan, state.score - previous)
        if decision.stop and not state.status:
            state.status, state.reason = decision.status, decision.reason
        elif state.round >= self.config.train.max_rounds and not state.status:
            state.status, state.reason = "completed", f"all {state.round} rounds are done"
        self.progress.round(self.logbook.round(state, plan))
        self.logbook.calls(state, self.school.curator)
        state.plan, state.tally = None, RoundTally()
        self.save(is_best=decision.is_best)

    def asking_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Has the curator ask what it can while the student is measured, if a round may follow.

        Not where advisers ask during the measurement, from the same budget: which call comes first
        must not decide what the rest may cost.
        """
        state, curator = self.state, self.school.curator
        is_last = state.status != "" or state.round + 1 >= self.config.train.max_rounds
        if is_last or self.rooms.advisers:
            return contextlib.nullcontext()
        return curator.asking_ahead(state.round + 2, state.evidence, state.failures)

    def take_score(self, result: ProbeResult) -> convergence.Decision:
        """Adds a validation measurement to the run's history and asks whether to stop."""
        state, tally = self.state, self.state.tally
        state.convergence, decision = convergence.update(
            self.config.convergence,
            state.convergence,
            convergence.Measurement(
                step=state.step,
                score=result.accuracy,
                standard_error=standard_error(result.accuracy, result.num_judged),
                entropy=tally.entropy if tally.updates_on_samples else None,
                truncated_share=tally.share(tally.truncated, tally.samples),
                informative_share=tally.informative_share,
            ),
        )
        return decision

    def stop_on_trouble(self, metrics: dict[str, float]) -> None:
        """Ends the run when updates are not finite, or when the verifier cannot do its work."""
        state, config = self.state, self.config
        if metrics.get("nonfinite", 0) >= config.train.max_nonfinite:
            state.status = "stopped"
            state.reason = (
                f"{int(metrics['nonfinite'])} updates in a row were not finite; "
                "lower config.train.learning_rate"
            )
        self.check_verifier(state.tally.by_domain, "samples of the round")

    def check_verifier(self, counts: Mapping[str, Sequence[int]], what: str) -> None:
        """Ends the run when too many verdicts are missing, of all or of one domain.

        Unlike every other end this one is not saved: it says nothing about the student, so the same
        command tries again from the last checkpoint.

        Args:
          counts: by domain, how many verdicts there should be and how many are missing.
          what: was judged, for the reason.
        """
        reason = too_few_verdicts(counts, what, self.config.verifier.max_error_rate)
        if reason:
            self._verifier_failed = True
            self.state.status, self.state.reason = "stopped", reason

    def report(self, arguments: tuple[str, ...]) -> RunReport:
        """Measures the best checkpoint on the test suites and writes the report."""
        best = self.restore_best()
        self.rooms.engine.set_adapters(best.lora)
        after = {}
        for probe in self.school.tests:
            self.progress.phase(f"measuring the best checkpoint on {probe.name}")
            after[probe.name] = self.measure(probe)
        checker = self.rooms.checker
        report = training_report(
            self.config,
            self.state,
            self.school,
            after,
            self.wall_s(),
            self.files.path,
            arguments,
            checker.figures() if checker else None,
        )
        write_report(self.files.path, report)
        self.logbook.finish(report)
        return report

    def note_opinions(self) -> None:
        """Logs what the checker of pages and the adapter of answers were asked since last time."""
        for adviser in self.rooms.advisers.values():
            self.logbook.opinions(self.state, adviser)

    def measure(self, probe: ProbeSet) -> ProbeResult:
        """Greedy answers to every task of ``probe``, judged."""
        rooms = self.rooms
        limit = self.config.eval.max_new_tokens
        result = measure(probe.tasks, rooms.engine, rooms.chat, self.watch, limit, rooms.adapter)
        self.state.generated_tokens += result.generated_tokens
        return result

    def sample(
        self, tasks: list[Task], seed: int, count: int = 0, adapter: Adapter | None = None
    ) -> list[RolloutGroup]:
        """A judged group of ``count`` samples of each task; 0: ``rollout.num_generations``."""
        rooms = self.rooms
        groups = sample_groups(
            tasks,
            count or self.config.rollout.num_generations,
            self.school.sampling,
            rooms.engine,
            rooms.chat,
            self.watch,
            seed,
            adapter,
            self.judge_clock,
        )
        self.state.generated_tokens += sum(len(c.token_ids) for g in groups for c in g.completions)
        return groups

    def wall_s(self) -> float:
        """Seconds of all sessions of this run."""
        return self.state.wall_s + time.monotonic() - self._started

    def save(self, is_best: bool = False) -> None:
        """Saves arrays and host state as one step, unless this step is saved already."""
        if self._saved_step == self.state.step:
            return
        host = {
            "config": config_hash(self.config),
            "probes": self.probe_hashes(),
            "loop": dataclasses.replace(self.state, wall_s=self.wall_s()).to_dict(),
            "curator": self.school.curator.state_dict(),
            "replay": self.school.replay.state_dict(),
            "rows": self.logbook.sync(),
        }
        for name, adviser in self.rooms.advisers.items():
            host[name] = adviser.state_dict()
        self.store.save(self.state.step, self.arrays, host, is_best=is_best)
        self._saved_step = self.state.step

    def restore_best(self) -> TrainState:
        """The arrays of the best step."""
        self.store.wait()
        return self.store.restore(self.arrays, self.store.best_step()).arrays

    def _restore(self) -> dict[str, int]:
        """Goes back to the latest undamaged checkpoint; returns the logs' lengths at that time."""
        if self.store.latest_step() is None:
            return {}
        restored = self.store.restore(self.arrays)
        host: dict[str, Any] = restored.host_state
        where = f"{self.store.directory}, step {restored.step}"
        if host["probes"] != self.probe_hashes():
            raise UserError(
                f"{where} was measured on other tasks than config.eval and config.tasks ask for",
                "take these sections back, or start in a new workdir",
            )
        self.arrays = restored.arrays
        self.state = LoopState.from_dict(host["loop"])
        try:
            self.school.curator.load_state_dict(host["curator"])
        except ValueError as error:
            raise UserError(
                f"{where}: {error}", "take config.tasks back, or a new workdir"
            ) from error
        self.school.replay.load_state_dict(host["replay"])
        for name, adviser in self.rooms.advisers.items():
            if name in host:
                adviser.load_state_dict(host[name])
        self._saved_step = restored.step
        self.progress.note(f"resuming after step {restored.step}")
        is_changed = host["config"] != config_hash(self.config)
        if self.state.status and is_changed and self.state.round < self.config.train.max_rounds:
            self.progress.note(f"going on with another config after: {self.state.reason}")
            self.state.status = self.state.reason = ""
        return host["rows"]

    def probe_hashes(self) -> list[list[str]]:
        """Name and content of all that the student is measured on."""
        return [[p.name, p.sha256] for p in (*self.school.tests, self.school.validation)]
