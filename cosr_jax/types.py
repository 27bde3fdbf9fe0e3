"""Frozen records that travel between rooms.  No room's behaviour lives here, and no JAX."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

NUM_LEVELS = 5

#: ``Task.source`` of tasks that a curator wrote.
AUTHORED = "curator"

#: Exclusive failure categories of a verdict; "" is a pass.  Fixed by the verifier protocol.
CATEGORIES = (
    "no_code",
    "no_answer",
    "truncated",
    "syntax_error",
    "missing_entry_point",
    "missing_import",
    "runtime_error",
    "timeout",
    "memory_limit",
    "output_limit",
    "crash",
    "forbidden",
    "wrong_answer",
)


class UserError(Exception):
    """A mistake the user can mend; the command line prints it as one line and exits with 2.

    Args:
      what: what is wrong, naming the key or file and the offending value.
      remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}; {remedy}")
        self.what = what
        self.remedy = remedy


class Outcome(enum.Enum):
    """PASS and FAIL are judgements; ERROR means the verifier could not judge."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class CodeChecks:
    """How a program is judged: tests of a function, or input and output of a script.

    ``tests`` are Python statements that see the program's public names; each is worth the same.
    """

    entry_point: str = ""  # the function or class that the tests use; "" for a script
    tests: tuple[str, ...] = ()
    io: tuple[tuple[str, str], ...] = ()  # (stdin, expected stdout), for a script


@dataclasses.dataclass(frozen=True)
class ProofChecks:
    """How a term or a witness is judged.

    kind: "smtlib" (``goal`` is an SMT-LIB script that must be valid with the student's definition,
      see ``verifiers.smt_text``), "property" (``goal`` holds properties in Python's expression
      syntax, one a line, and ``instance`` the declarations, see ``verifiers.property_text``), or
      "witness" (``goal`` names a checking program and ``instance`` is its data, see
      ``verifiers.witness``).
    """

    kind: Literal["smtlib", "property", "witness"]
    goal: str
    instance: str = ""  # JSON


@dataclasses.dataclass(frozen=True)
class WebChecks:
    """What a web page must show and do; ``requirements`` is JSON that the checker documents."""

    requirements: str


@dataclasses.dataclass(frozen=True)
class ScorerChecks:
    """An item of a task package that brings its own scorer: the generator's name and the item."""

    generator: str
    item: str  # JSON


Checks = CodeChecks | ProofChecks | WebChecks | ScorerChecks
Domain = Literal["math", "code", "proof", "web", "gym"]

#: The record that says how a domain's answers are judged; maths compares with ``Task.answer``.
CHECKS_OF_DOMAIN: Mapping[str, type[Checks] | None] = {
    "math": None,
    "code": CodeChecks,
    "proof": ProofChecks,
    "web": WebChecks,
    "gym": ScorerChecks,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem with a checkable answer.

    ``key`` is the question stripped of its wording ("addition:12+7"): two tasks with one key are
    the same question, so splits and duplicate checks go by it.
    """

    domain: Domain
    skill: str
    difficulty: float  # in [0, 1]
    prompt: str
    answer: str  # canonical answer, as the maths verifier compares it; "" elsewhere
    key: str
    solution: str = ""  # worked answer in the form that the verifier accepts
    source: str = "suite"
    checks: Checks | None = None  # of the kind in CHECKS_OF_DOMAIN

    def __post_init__(self) -> None:
        kind = CHECKS_OF_DOMAIN[self.domain]
        if type(self.checks) is not (kind or type(None)):
            raise ValueError(
                f"task {self.key!r} of domain {self.domain!r} has checks {self.checks!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Rebuilds a task from ``to_dict`` after a trip through JSON."""
        kind = CHECKS_OF_DOMAIN[values["domain"]]
        checks = kind(**_tuples(values["checks"])) if kind else None
        return cls(**{**values, "checks": checks})

    @property
    def task_id(self) -> str:
        """First 16 hex digits of the SHA-256 of domain and key: stable across runs and machines."""
        return hashlib.sha256(f"{self.domain}\n{self.key}".encode()).hexdigest()[:16]

    @property
    def level(self) -> int:
        """Difficulty as a level from 1 to ``NUM_LEVELS``."""
        return 1 + round(self.difficulty * (NUM_LEVELS - 1))

    @property
    def cell(self) -> str:
        """Where the task stands in the skill x level grid, e.g. ``"addition/2"``."""
        return f"{self.skill}/{self.level}"


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were, at any depth."""

    def convert(value: Any) -> Any:
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {name: convert(value) for name, value in values.items()}


def level_difficulty(level: int) -> float:
    """The difficulty in [0, 1] that stands for ``level`` (1 to ``NUM_LEVELS``)."""
    return (level - 1) / (NUM_LEVELS - 1)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    ``temperature`` 0 is greedy.  ``top_p`` 1 and ``top_k`` 0 switch truncation off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer.

    ``logprobs`` are those of the distribution that was sampled from: softmax(logits / temperature),
    after top-k and top-p truncation and renormalisation where those are on.  For greedy decoding
    they are of softmax(logits).
    """

    token_ids: tuple[int, ...]  # with the stop token, if one was reached
    logprobs: tuple[float, ...]  # natural log, one per token
    text: str  # decoded, without special tokens
    finish_reason: Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A completion of a rollout, as soon as it is known."""

    prompt: int  # number of its prompt in the call
    sample: int  # number among the prompt's samples
    completion: Completion


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One verifier's answer about one completion."""

    outcome: Outcome
    reward: float  # in [0, 1]; ignored on ERROR
    category: str = ""  # one of CATEGORIES on FAIL, "" otherwise
    answer: str = ""  # what was extracted as the student's answer
    method: str = ""  # how it was found: "boxed", "answer_tag", ... "" when there was none
    value_correct: bool = False  # the value is right, whatever its form
    seconds: float = 0.0  # wall time spent judging
    detail: str = ""  # for people and for the curator, e.g. "TimeoutError: 2 s"
    is_subjective: bool = False  # a language model's opinion lowered it
    unanswered: int = 0  # items of a checklist that nobody answered: it stands without them
    is_left_out: bool = False  # of training, by ``config.verifier.train_on_subjective``

    @property
    def is_trainable(self) -> bool:
        """Whether training may use its reward."""
        return self.outcome is not Outcome.ERROR and not self.is_left_out


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """One task, its sampled completions and their verdicts (same order and length)."""

    task: Task
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...] = ()

    def judged(self, verdicts: Sequence[Verdict]) -> RolloutGroup:
        """This group with one verdict for each completion.

        Raises:
          ValueError: the numbers differ.
        """
        if len(verdicts) != len(self.completions):
            raise ValueError(f"{len(verdicts)} verdicts for {len(self.completions)} completions")
        return dataclasses.replace(self, verdicts=tuple(verdicts))

    @property
    def is_informative(self) -> bool:
        """Whether the rewards to train on differ, so that not all advantages in it are zero."""
        rewards = {v.reward for v in self.verdicts if v.is_trainable}
        return len(rewards) > 1


@dataclasses.dataclass(frozen=True)
class CellEvidence:
    """Counts of one skill x level cell over freshly judged samples; ERROR verdicts are left out."""

    cell: str
    samples: int = 0
    passed: int = 0
    value_correct: int = 0  # right value, whatever the form (at least ``passed``)
    formatted: int = 0  # answer given in the accepted form, right or wrong
    groups: int = 0
    informative_groups: int = 0

    def __add__(self, other: CellEvidence) -> CellEvidence:
        if self.cell != other.cell:
            raise ValueError(f"cannot add evidence of {other.cell} to {self.cell}")
        return CellEvidence(
            self.cell,
            *(
                getattr(self, f.name) + getattr(other, f.name)
                for f in dataclasses.fields(self)
                if f.name != "cell"
            ),
        )


@dataclasses.dataclass(frozen=True)
class FailedSample:
    """One wrong answer to a training task.  The text is the student's: data, never instructions."""

    task: Task
    text: str
    verdict: Verdict  # a FAIL; its ``seconds`` are 0, so that equal runs keep equal records

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        verdict = {**dataclasses.asdict(self.verdict), "outcome": self.verdict.outcome.value}
        return {"task": self.task.to_dict(), "text": self.text, "verdict": verdict}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FailedSample:
        """Rebuilds a sample from ``to_dict`` after a trip through JSON."""
        verdict = {**values["verdict"], "outcome": Outcome(values["verdict"]["outcome"])}
        return cls(Task.from_dict(values["task"]), values["text"], Verdict(**verdict))


@dataclasses.dataclass(frozen=True)
class AdmissionResult:
    """The admitted tasks, in the order given, and how many were refused for which reason."""

    tasks: tuple[Task, ...]
    refused: Mapping[str, int]  # count by reason


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the curator may know before it plans a round: training evidence, never probe content."""

    round: int
    evidence: tuple[CellEvidence, ...]  # judged since the previous plan
    probe_score: float | None  # validation accuracy in [0, 1]; None before the first measurement
    best_score: float | None
    failures: tuple[FailedSample, ...] = ()  # the latest failed training samples, oldest first


@dataclasses.dataclass(frozen=True)
class Plan:
    """One round's orders: what to practise, by which algorithm, for how long, and why."""

    strategy: str
    algorithm: Literal["sft", "grpo"]
    mixture: tuple[tuple[str, float], ...]  # (cell, weight), weights sum to 1
    steps: int
    replay_fraction: float  # share of prompts drawn from the replay buffer, in [0, 1]
    learning_rate_scale: float
    context: str  # the bandit's context, e.g. "format:low mastery:low"
    reason: str  # the measurements that led here, in words
    authored: tuple[Task, ...] = ()  # tasks written for this round, drawn beside the mixture
    authored_share: float = 0.0  # share of prompts drawn from them, in [0, 1]
    kl_scale: float = 1.0  # factor of ``grpo.kl_coef`` in this round
    group_size: int = 0  # samples of a task in this round; 0: ``rollout.num_generations``

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Rebuilds a plan from ``to_dict`` after a trip through JSON."""
        mixture = tuple((cell, float(weight)) for cell, weight in values["mixture"])
        authored = tuple(Task.from_dict(task) for task in values.get("authored", ()))
        return cls(**{**values, "mixture": mixture, "authored": authored})
