"""Checking programs: a problem that is hard to solve, and a solution that is easy to check.

A task names its program and gives an instance, in JSON; the student gives a witness, a list of
integers or a list of such lists, as JSON ("[2, 3]") or plainly ("2, 3"):

  program             instance                                           witness
  factorisation       {"number": n}                                      its prime factors, each as
                                                                         often as it divides n
  graph_colouring     {"nodes": n, "edges": [[a, b]], "colours": k}      a colour 1..k of each node
  scheduling          {"durations": [d], "machines": m, "deadline": t,   [machine, start] of each
                       "before": [[i, j]]}                               job; i ends before j starts
  subset_sum          {"numbers": [x], "target": t}                      some of the numbers
  hamiltonian_path    {"nodes": n, "edges": [[a, b]]}                    all nodes, in order

Nodes, jobs and machines are numbered from 1.  Arithmetic is exact; nothing is searched for.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosr_jax.verifiers.blocks import extract_block
from cosr_jax.verifiers.extraction import Extraction, extract_answer
from cosr_jax.verifiers.terms import Refusal

MAX_CHARACTERS = 20_000
MAX_DIGITS = 40
_MAX_SIZE = 1000  # of an instance: nodes, jobs, numbers

#: The forms that count, besides a fence; the last number of a text is no witness.
_METHODS = ("boxed", "answer_tag", "hashes", "phrase", "bare")

_PLAIN = re.compile(r"-?[0-9]+(?:(?:\s*,\s*|\s+)-?[0-9]+)*")
_SEPARATOR = re.compile(r"[\s,]+")

#: Says what is wrong with a witness; "" if nothing is.
Program = Callable[[list[Any]], str]


def load(name: str, instance: str) -> Program:
    """The checking program ``name`` for one instance.

    Raises:
      ValueError: there is no such program, or the instance is not of its form.
    """
    if name not in _PROGRAMS:
        raise ValueError(f"no checking program is called {name!r}")
    try:
        fields = json.loads(instance)
        return _PROGRAMS[name](fields)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"instance of {name}: {error!r}") from error


def extract(text: str, finish_reason: str = "stop") -> Extraction:
    """The witness in a completion: a box, a tag, a fenced block, a phrase, or nothing else."""
    found = extract_answer(text, finish_reason)
    if found.method in ("boxed", "answer_tag"):
        return found
    block = extract_block(text, finish_reason)
    if not block.category and (block.method == "fence" or _is_list(block.answer)):
        return block
    if found.method in _METHODS or found.category:
        return found
    return Extraction("", "", block.category or "no_answer")


def read(text: str) -> list[Any]:
    """The witness as integers in lists.

    Raises:
      Refusal: it is anything else, or too large.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise Refusal("forbidden", f"more than {MAX_CHARACTERS} characters")
    if _PLAIN.fullmatch(text):
        return [_integer(number) for number in _SEPARATOR.split(text)]
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_no_number, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise Refusal("syntax_error", f"no list of integers: {text[:40]!r}") from error
    if not isinstance(value, list) or not all(_is_whole(v) or _is_row(v) for v in value):
        raise Refusal("syntax_error", f"no list of integers: {text[:40]!r}")
    return value


def _is_list(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) or (text.startswith("[") and text.endswith("]"))


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise Refusal("forbidden", f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _no_number(text: str) -> Any:
    raise Refusal("syntax_error", f"{text[:40]} is no integer")


def _is_whole(value: object) -> bool:
    return type(value) is int  # a truth value is none


def _is_row(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _factorisation(fields: Mapping[str, Any]) -> Program:
    number = _natural(fields["number"], 2, 10**24)

    def check(witness: list[Any]) -> str:
        if not _flat(witness):
            return "the factors must be integers"
        product = 1
        for factor in witness:
            if factor < 2 or product > number:
                return f"{factor} is no prime factor of {number}"
            product *= factor
        if product != number:
            return f"the product is {product}, not {number}"
        composite = next((factor for factor in witness if not is_prime(factor)), None)
        return f"{composite} is not prime" if composite else ""

    return check


def _graph_colouring(fields: Mapping[str, Any]) -> Program:
    nodes, colours = _natural(fields["nodes"], 1), _natural(fields["colours"], 1)
    edges = _pairs(fields["edges"], nodes)

    def check(witness: list[Any]) -> str:
        if not _flat(witness) or len(witness) != nodes:
            return f"{nodes} colours are needed, one for each node"
        if not all(1 <= colour <= colours for colour in witness):
            return f"colours are 1 to {colours}"
        clash = next((e for e in edges if witness[e[0] - 1] == witness[e[1] - 1]), None)
        return f"neighbours {clash[0]} and {clash[1]} have one colour" if clash else ""

    return check


def _scheduling(fields: Mapping[str, Any]) -> Program:
    durations = [_natural(d, 1) for d in _items(fields["durations"])]
    machines, deadline = _natural(fields["machines"], 1), _natural(fields["deadline"], 1)
    before = _pairs(fields["before"], len(durations))

    def check(witness: list[Any]) -> str:
        if len(witness) != len(durations) or not all(_is_row(w) and len(w) == 2 for w in witness):
            return f"{len(durations)} pairs [machine, start] are needed"
        spans = []
        for job, ((machine, start), duration) in enumerate(zip(witness, durations, strict=True), 1):
            if not 1 <= machine <= machines:
                return f"job {job} is on machine {machine} of {machines}"
            if start < 0 or start + duration > deadline:
                return f"job {job} runs from {start} to {start + duration}, not within {deadline}"
            spans.append((machine, start, start + duration))
        for first, second in itertools.pairwise(sorted(spans)):
            if first[0] == second[0] and second[1] < first[2]:
                return f"two jobs run on machine {first[0]} at {second[1]}"
        late = next((p for p in before if spans[p[0] - 1][2] > spans[p[1] - 1][1]), None)
        return f"job {late[1]} starts before job {late[0]} ends" if late else ""

    return check


def _subset_sum(fields: Mapping[str, Any]) -> Program:
    numbers = collections.Counter(
        _natural(n, -(10**12), 10**12) for n in _items(fields["numbers"])
    )  # fmt: skip
    target = _natural(fields["target"], -(10**15), 10**15)

    def check(witness: list[Any]) -> str:
        if not witness or not _flat(witness):
            return "some of the numbers are needed"
        extra = collections.Counter(witness) - numbers
        if extra:
            return f"{next(iter(extra))} is not there, or not so often"
        return "" if sum(witness) == target else f"the sum is {sum(witness)}, not {target}"

    return check


def _hamiltonian_path(fields: Mapping[str, Any]) -> Program:
    nodes = _natural(fields["nodes"], 1)
    edges = {frozenset(edge) for edge in _pairs(fields["edges"], nodes)}

    def check(witness: list[Any]) -> str:
        if not _flat(witness) or sorted(witness) != list(range(1, nodes + 1)):
            return f"the nodes 1 to {nodes} are needed, each once"
        missing = next((p for p in itertools.pairwise(witness) if frozenset(p) not in edges), None)
        return f"no edge joins {missing[0]} and {missing[1]}" if missing else ""

    return check


_PROGRAMS: dict[str, Callable[[Mapping[str, Any]], Program]] = {
    "factorisation": _factorisation,
    "graph_colouring": _graph_colouring,
    "scheduling": _scheduling,
    "subset_sum": _subset_sum,
    "hamiltonian_path": _hamiltonian_path,
}


def _flat(witness: Sequence[Any]) -> bool:
    return all(map(_is_whole, witness))


def _natural(value: object, low: int, high: int = 10**9) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is no integer from {low} to {high}")
    return value


def _items(values: object) -> list[Any]:
    if not isinstance(values, list) or not 1 <= len(values) <= _MAX_SIZE:
        raise ValueError(f"{values!r:.40} is no list of 1 to {_MAX_SIZE}")
    return values


def _pairs(values: object, nodes: int) -> list[tuple[int, int]]:
    """Pairs of two different nodes."""
    if nodes > _MAX_SIZE or not isinstance(values, list) or len(values) > _MAX_SIZE**2:
        raise ValueError("a graph of that size is not checked")
    pairs = [tuple(_natural(v, 1, nodes) for v in _items(pair)) for pair in values]
    if not all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs):
        raise ValueError("an edge joins two different nodes")
    return [(a, b) for a, b in pairs]


#: Enough for all numbers below 3.3 * 10^24 (Sorenson and Webster, arXiv:1509.00864).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(number: int) -> bool:
    """Whether ``number``, below 3.3 * 10^24, is prime; by the test of Miller and Rabin.

    Raises:
      ValueError: the number is too large for the bases to be a proof.
    """
    if number >= 3317044064679887385961981:
        raise ValueError(f"{number} is too large")
    if number < 2:
        return False
    for prime in _BASES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return not any(_is_witness(base, odd, twos, number) for base in _BASES)


def _is_witness(base: int, odd: int, twos: int, number: int) -> bool:
    """Whether ``base`` shows that ``number`` is composite."""
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return False
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return False
    return True
