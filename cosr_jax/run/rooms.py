"""Builds every room of a run from its config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jax.sharding import Mesh

from cosr_jax.config import RunConfig, VerifierConfig, parse_cells, parse_suites
from cosr_jax.curator.llm import LlmCurator
from cosr_jax.curator.procedural import ProceduralCurator
from cosr_jax.protocols import Curator, TaskSource
from cosr_jax.rollout.jax_sampler import JaxSampler
from cosr_jax.run.adapter import Adapter
from cosr_jax.run.checker import Checker, make_checklist
from cosr_jax.run.programs import CountedProgram, heap_set_aside, keep_programs
from cosr_jax.sharding import make_mesh
from cosr_jax.student.chat import Chat
from cosr_jax.student.model import Student
from cosr_jax.student.sources import resolve_source
from cosr_jax.student.weights import load_student
from cosr_jax.tasks import make_source
from cosr_jax.tasks.admission import Admission
from cosr_jax.tasks.probes import ProbeSet, build_probes
from cosr_jax.tasks.replay import ReplayBuffer
from cosr_jax.train.batching import BatchShape, batch_shape
from cosr_jax.train.losses import GrpoObjective, SftObjective
from cosr_jax.train.step import batch_shards, make_logprobs_fn, make_train_step
from cosr_jax.types import Plan, SamplingParams
from cosr_jax.verifiers.dispatch import Workers
from cosr_jax.verifiers.front import FACTORIES, LocalFront
from cosr_jax.verifiers.judges import Judge
from cosr_jax.verifiers.pool import VerifierPool


@dataclasses.dataclass(frozen=True)
class Rooms:
    """What a student needs to be sampled and measured."""

    mesh: Mesh | None
    student: Student
    chat: Chat
    engine: JaxSampler
    verifier: VerifierPool
    checker: Checker | None = None  # of pages, where config has a checklist
    adapter: Adapter | None = None  # of answers, where config wants one

    @property
    def advisers(self) -> dict[str, Checker | Adapter]:
        """Those who ask models beside the curator, by name."""
        named = {"checker": self.checker, "adapter": self.adapter}
        return {name: adviser for name, adviser in named.items() if adviser is not None}


@dataclasses.dataclass(frozen=True)
class School:
    """What training needs on top: tasks, probes, the curator and the compiled steps."""

    source: TaskSource
    admission: Admission
    replay: ReplayBuffer
    curator: Curator
    validation: ProbeSet
    tests: tuple[ProbeSet, ...]
    sampling: SamplingParams
    shapes: dict[str, BatchShape]  # by algorithm
    steps: dict[str, Callable]  # by algorithm; (state, base, batch, rate) -> (state, metrics)
    logprobs: Callable  # (lora, base, batch) -> (logprobs, entropies)


#: (config, cells of the task source) -> who plans the rounds.
CuratorMaker = Callable[[RunConfig, tuple[str, ...]], Curator]


def make_curator(config: RunConfig, cells: tuple[str, ...]) -> Curator:
    """The curator that ``config.curator.kind`` names."""
    generations, steps = config.rollout.num_generations, config.train.steps_per_round
    has_kl = config.grpo.kl_coef > 0
    procedural = ProceduralCurator(config.curator, cells, generations, steps, has_kl)
    if config.curator.kind == "llm":
        return LlmCurator(config.curator, procedural, config.seed)
    return procedural


def training_mesh(config: RunConfig) -> Mesh | None:
    """The configured mesh over all devices; None on a single device."""
    mesh = make_mesh(config.mesh)
    return mesh if mesh.size > 1 else None


@contextlib.contextmanager
def open_rooms(config: RunConfig, tell: Callable[[str], None] | None = None) -> Iterator[Rooms]:
    """Loads the student and starts the verifiers; ends the verifiers on the way out.

    ``tell`` gets a line on how far loading has come, every few seconds.
    """
    keep_programs()
    if config.student.compute_dtype == "float32":
        # Accelerators multiply float32 in fewer bits unless told otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")
    checker = Checker(config) if config.verifier.checklist else None
    mesh = training_mesh(config)
    student = load_student(config.student, config.lora, mesh, config.seed, tell)
    chat = Chat(resolve_source(config.student.source), config.student.system_prompt)
    engine = JaxSampler(student, chat, config.rollout, mesh)
    with open_verifier(config, checker) as verifier, heap_set_aside():
        adapter = Adapter(config, verifier) if config.verifier.adapt != "never" else None
        yield Rooms(mesh, student, chat, engine, verifier, checker, adapter)


def open_verifier(config: RunConfig, checker: Checker | None) -> VerifierPool:
    """The verifiers; with a checker, pages get its opinion as well."""
    if checker is None:
        return VerifierPool(config.verifier)
    checklist = make_checklist(config, checker)

    def web(verifier: VerifierConfig, workers: Workers) -> Judge:
        from cosr_jax.verifiers.web import WebJudge  # needs the extra [web]

        return WebJudge(max_pages=verifier.workers, checklist=checklist)

    factories = {**FACTORIES, "web": web}
    return VerifierPool(config.verifier, lambda verifier: LocalFront(verifier, factories))


def open_school(
    config: RunConfig, rooms: Rooms, make_curator: CuratorMaker = make_curator
) -> School:
    """Builds tasks, probes, curator and steps.  Steps compile at their first call."""
    source = make_source(config.tasks)
    curator = make_curator(config, source.cells())
    if isinstance(curator, LlmCurator) and curator.budget:
        for adviser in rooms.advisers.values():
            adviser.share(curator.budget)
    validation, tests = make_probes(config, source)
    reserved = [task for probe in (validation, *tests) for task in probe.tasks]
    rollout, train = config.rollout, config.train
    samples = rollout.prompts_per_step * rollout.num_generations
    grpo = GrpoObjective(config.grpo, rollout.temperature, samples * rollout.max_new_tokens)
    dropout_seed = config.seed if config.lora.dropout > 0 else None
    shards = batch_shards(rooms.mesh)

    def shape(rows: int) -> BatchShape:
        return batch_shape(
            rows,
            train.microbatch_size,
            rollout.max_prompt_tokens,
            rollout.max_new_tokens,
            shards,
        )

    return School(
        source=source,
        admission=Admission(rooms.verifier.judge, reserved),
        replay=ReplayBuffer(config.tasks.replay_capacity),
        curator=curator,
        validation=validation,
        tests=tests,
        sampling=SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k
        ),
        shapes={"grpo": shape(samples), "sft": shape(config.sft.batch_size)},
        steps={
            name: CountedProgram(
                f"{name} step",
                make_train_step(rooms.student, objective, train, rooms.mesh, dropout_seed),
            )
            for name, objective in (("grpo", grpo), ("sft", SftObjective()))
        },
        logprobs=CountedProgram(
            "logprobs", make_logprobs_fn(rooms.student, train, rollout.temperature, rooms.mesh)
        ),
    )


def make_probes(config: RunConfig, source: TaskSource) -> tuple[ProbeSet, tuple[ProbeSet, ...]]:
    """The validation probes, which steer the run, and the test suites, which only report it."""
    cells = parse_cells(config.eval.validation, "config.eval.validation")
    validation = build_probes(source, "validation", cells, "validation")
    tests = tuple(
        build_probes(source, name, cells, "test")
        for name, cells in parse_suites(config.eval.test).items()
    )
    return validation, tests


def learning_rate(config: RunConfig, plan: Plan) -> float:
    """The rate of the plan's steps, before the schedule."""
    rates = {"sft": config.train.sft_learning_rate, "grpo": config.train.learning_rate}
    return rates[plan.algorithm] * plan.learning_rate_scale


def copy_state(state: nnx.State) -> nnx.State:
    """A copy that survives the donation of ``state``, committed to its devices.

    Steps return committed arrays; begun with others, every program would be compiled twice.
    """
    return jax.tree.map(lambda x: jax.device_put(jax.numpy.copy(x), x.sharding), state)
