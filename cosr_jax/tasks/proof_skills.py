"""The suite's proof skills: terms that a solver shows, and witnesses that a program checks.

Three kinds (see ``types.ProofChecks``): properties in Python's syntax, goals in SMT-LIB, and
witnesses.  Solutions are planted, so that each problem has one; of witnesses any other counts too.
Levels of one skill never share a question.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

from cosr_jax.tasks.problems import Course, Problem
from cosr_jax.tasks.splits import Dice
from cosr_jax.types import ProofChecks


def _answered(content: str, ask: str, answer: str, checks: ProofChecks) -> Problem:
    return Problem(content, ask, f"<answer>{answer}</answer>", checks=checks)


# --- Properties of a Python expression ---


def _property(
    content: str,
    goals: Sequence[str],
    answer: str,
    variables: Mapping[str, str],
    sort: str = "Int",
    parameters: str = "a",
    assume: Sequence[str] = (),
) -> Problem:
    """The student finds f; its parameters and result are of ``sort``, like all variables."""
    instance = {
        "function": "f",
        "parameters": dict.fromkeys(parameters, sort),
        "returns": sort,
        "variables": dict(variables),
        "assume": list(assume),
    }
    numbers = "integers" if sort == "Int" else "real numbers"
    names = " and ".join(variables)
    condition = f" with {' and '.join(assume)}" if assume else ""
    ask = (
        f"Write a Python expression in {' and '.join(parameters)} for "
        f"f({', '.join(parameters)}) such that for all {numbers} {names}{condition}: "
        f"{'; '.join(goals)}."
    )
    return _answered(
        content, ask, answer, ProofChecks("property", "\n".join(goals), json.dumps(instance))
    )


def bounds(level: int, dice: Dice) -> Problem:
    """Distance to a number; at least a number; between two; distance to an interval; wrapped."""
    low = dice.between(2, 400)
    high = low + dice.between(2, 400)
    whole = {"x": "Int"}
    if level == 1:
        goals = ["f(x) >= 0", f"f(x) == x - {low} or f(x) == {low} - x"]
        return _property(f"distance {low}", goals, f"abs(a - {low})", whole)
    if level == 2:
        goals = [f"f(x) >= {low}", "f(x) >= x", f"f(x) == x or f(x) == {low}"]
        return _property(f"at least {low}", goals, f"max(a, {low})", whole)
    if level == 3:
        goals = [
            f"{low} <= f(x) <= {high}",
            f"f(x) == x or x < {low} or x > {high}",
            f"f(x) == {low} or x >= {low}",
            f"f(x) == {high} or x <= {high}",
        ]
        return _property(f"within {low} {high}", goals, f"min(max(a, {low}), {high})", whole)
    if level == 4:
        goals = [
            f"f(x) == 0 or x < {low} or x > {high}",
            f"f(x) == {low} - x or x >= {low}",
            f"f(x) == x - {high} or x <= {high}",
        ]
        answer = f"max({low} - a, a - {high}, 0)"
        return _property(f"outside {low} {high}", goals, answer, whole)
    modulus = dice.between(3, 60)
    goals = [f"{low} <= f(x) < {low + modulus}", f"(f(x) - x) % {modulus} == 0"]
    return _property(f"wrap {low} {modulus}", goals, f"(a - {low}) % {modulus} + {low}", whole)


def inverses(level: int, dice: Dice) -> Problem:
    """Undoes a sum; a line; a quotient; a whole multiple with remainder; two lines at once."""
    added = dice.between(2, 300)
    factor, divisor = dice.between(2, 30), dice.between(2, 30)
    if level == 1:
        return _property(f"+{added}", [f"f(x + {added}) == x"], f"a - {added}", {"x": "Int"})
    if level == 2:
        goal = f"f({factor} * x + {added}) == x"
        answer = f"(a - {added}) / {factor}"
        return _property(f"*{factor}+{added}", [goal], answer, {"x": "Real"}, "Real")
    if level == 3:
        goal = f"f(({factor} * x - {added}) / {divisor}) == x"
        answer = f"({divisor} * a + {added}) / {factor}"
        content = f"*{factor}-{added}/{divisor}"
        return _property(content, [goal], answer, {"x": "Real"}, "Real")
    if level == 4:
        factor = dice.between(2, 200)
        goal = f"f({factor} * x + r + {added}) == x"
        assume = ["0 <= r", f"r < {factor}"]
        answer = f"(a - {added}) // {factor}"
        return _property(
            f"//{factor}-{added}", [goal], answer, {"x": "Int", "r": "Int"}, assume=assume
        )
    p, q, r, s = (dice.between(1, 9) for _ in range(4))
    s += p * s == q * r  # the lines must not be parallel
    goal = f"f({p} * x + {q} * y, {r} * x + {s} * y) == x"
    answer = f"({s} * a - {q} * b) / ({p * s - q * r})"
    content = f"{p} {q} {r} {s}"
    return _property(content, [goal], answer, {"x": "Real", "y": "Real"}, "Real", "ab")


# --- Goals in SMT-LIB ---


def _smtlib(content: str, ask: str, script: str, answer: str) -> Problem:
    return _answered(content, f"{ask}\n\n{script}\n", answer, ProofChecks("smtlib", script))


_DEFINE = "Define {0} in SMT-LIB, as (define-fun {0} ...), so that each assertion that calls {0} "
_VALID = "follows from the others, whatever the constants are."


def definitions(level: int, dice: Dice) -> Problem:
    """A bound; a line by its steps; the larger of two; a sign; a whole quotient rounded up."""
    first, second = dice.between(2, 500), dice.between(2, 60)
    third = first + dice.between(1, 90)
    if level == 1:
        script = (
            "(declare-fun c () Int)\n"
            f"(assert (>= (* {second} c) {first}))\n(assert (< (* {second} (- c 1)) {first}))"
        )
        ask = "Which number makes all assertions true?"
        return _smtlib(f"least {second} {first}", ask, script, str(-(-first // second)))
    one = "(declare-fun f (Int) Int)\n(declare-const x Int)\n"
    head = "(define-fun f ((a Int)) Int "
    ask = _DEFINE.format("f") + _VALID
    if level == 2:
        script = (
            f"{one}(assert (= (f 0) {first}))\n(assert (= (f (+ x 1)) (+ (f x) {second})))\n"
            # By steps alone f is any function of period 1 more; a line has the same slope anywhere.
            f"(assert (= (- (f x) {first}) (* {second} x)))"
        )
        answer = f"{head}(+ (* {second} a) {first}))"
        return _smtlib(f"line {first} {second}", ask, script, answer)
    if level == 3:
        script = (
            f"{one}(assert (>= (f x) (+ x {first})))\n(assert (>= (f x) (* {second} x)))\n"
            f"(assert (or (= (f x) (+ x {first})) (= (f x) (* {second} x))))"
        )
        sides = f"(+ a {first}) (* {second} a)"
        answer = f"{head}(ite (> {sides}) {sides}))"
        return _smtlib(f"larger {first} {second}", ask, script, answer)
    if level == 4:
        script = (
            f"{one}(assert (=> (< x {first}) (= (f x) (- {second}))))\n"
            f"(assert (=> (and (>= x {first}) (< x {third})) (= (f x) 0)))\n"
            f"(assert (=> (>= x {third}) (= (f x) {second})))"
        )
        answer = f"{head}(ite (< a {first}) (- {second}) (ite (< a {third}) 0 {second})))"
        return _smtlib(f"steps {first} {third} {second}", ask, script, answer)
    script = (
        f"{one}(assert (>= (* {second} (f x)) (+ x {first})))\n"
        f"(assert (< (* {second} (- (f x) 1)) (+ x {first})))"
    )
    answer = f"{head}(div (+ a {first + second - 1}) {second}))"
    return _smtlib(f"ceiling {second} {first}", ask, script, answer)


def invariants(level: int, dice: Dice) -> Problem:
    """Of a loop: a bound; a remainder; a sum; a sum from anywhere; squares from anywhere."""
    start, step = dice.between(0, 99), dice.between(2, 60)
    if level <= 2:
        head = "(define-fun inv ((x Int)) Bool "
        if level == 1:
            missed = f"(>= x {start})"
            answer, content = f"{head}(>= x {start}))", f"from {start} by {step}"
            claim = f"x is never below {start}"
        else:
            target = start + step * dice.between(2, 40) + dice.between(1, step - 1)
            missed = f"(distinct x {target})"
            answer = f"{head}(= (mod x {step}) {start % step}))"
            content, claim = f"from {start} by {step} past {target}", f"x is never {target}"
        code = f"x = {start}\nwhile True:\n    x += {step}"
        script = (
            "(declare-fun inv (Int) Bool)\n(declare-const x Int)\n"
            f"(assert (inv {start}))\n(assert (=> (inv x) (inv (+ x {step}))))\n"
            f"(assert (=> (inv x) {missed}))"
        )
    else:
        step = dice.between(2, 9) if level == 5 else dice.between(2, 600)
        first = dice.between(1, 99) if level == 4 else 0
        total = 0 if level == 3 else dice.between(100, 999)
        grown = f"(* {step} i)"
        addend, more = str(step), str(step)
        if level == 4:
            grown = f"(+ {total} (* {step} (- i {first})))"
        elif level == 5:
            grown = f"(+ {total} (* {step} i i))"
            addend, more = f"(* {step} (+ (* 2 i) 1))", f"{step} * (2 * i + 1)"
        result = grown.replace("i", "n")
        code = f"i, s = {first}, {total}\nwhile i < n:\n    s += {more}\n    i += 1"
        claim = f"s = {result} at the end, if n >= {first} at the start"
        content = f"level {level} from {first} {total} by {step}"
        answer = f"(define-fun inv ((i Int) (s Int) (n Int)) Bool (and (= s {grown}) (<= i n)))"
        script = (
            "(declare-fun inv (Int Int Int) Bool)\n"
            "(declare-const i Int)\n(declare-const s Int)\n(declare-const n Int)\n"
            f"(assert (=> (>= n {first}) (inv {first} {total} n)))\n"
            f"(assert (=> (and (inv i s n) (< i n)) (inv (+ i 1) (+ s {addend}) n)))\n"
            f"(assert (=> (and (inv i s n) (not (< i n))) (= s {result})))"
        )
    ask = (
        f"Find an invariant of this loop that shows that {claim}:\n\n{code}\n\n"
        f"{_DEFINE.format('inv')}holds."
    )
    return _smtlib(content, ask, script, answer)


# --- Witnesses ---


def _witness(program: str, content: str, ask: str, answer: object, instance: object) -> Problem:
    checks = ProofChecks("witness", program, json.dumps(instance))
    return _answered(content, ask, json.dumps(answer), checks)


_PRIMES = tuple(n for n in range(2, 1000) if all(n % d for d in range(2, int(n**0.5) + 1)))


def factors(level: int, dice: Dice) -> Problem:
    """Two small primes; three; four; three of two digits; three of three digits."""
    count, low, high = ((2, 2, 50), (3, 2, 30), (4, 2, 30), (3, 30, 99), (3, 100, 999))[level - 1]
    primes = [p for p in _PRIMES if low <= p <= high]
    chosen = sorted(dice.choice(primes) for _ in range(count))
    number = 1
    for prime in chosen:
        number *= prime
    ask = f"Write {number} as a product of primes. List the primes, each as often as it is needed."
    # The number of factors keeps levels apart.
    return _witness("factorisation", f"{count} of {number}", ask, chosen, {"number": number})


def _edges(edges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a}-{b}" for a, b in edges)


def _drawn_edges(pairs: Sequence[tuple[int, int]], count: int, dice: Dice) -> list[tuple[int, int]]:
    return sorted(dice.shuffled(pairs)[:count])


def colouring(level: int, dice: Dice) -> Problem:
    """Six to ten nodes in three colours, hidden in the edges."""
    nodes = level + 5
    colours = [dice.between(1, 3) for _ in range(nodes - 1)]
    colours.append(1 + colours[0] % 3)  # so that there is an edge
    pairs = [
        (a, b)
        for a in range(1, nodes + 1)
        for b in range(a + 1, nodes + 1)
        if colours[a - 1] != colours[b - 1]
    ]
    edges = _drawn_edges(pairs, nodes + level, dice)
    ask = (
        f"Nodes 1 to {nodes} are joined by these edges: {_edges(edges)}. Give each node a colour "
        "1, 2 or 3, so that joined nodes differ. List the colours of the nodes in order."
    )
    instance = {"nodes": nodes, "edges": edges, "colours": 3}
    return _witness("graph_colouring", f"{nodes}: {_edges(edges)}", ask, colours, instance)


def scheduling(level: int, dice: Dice) -> Problem:
    """Three to seven jobs on two machines without a gap; some must wait for others."""
    jobs = level + 2
    durations = [dice.between(1, 9) for _ in range(jobs)]
    free = [0, 0]
    plan = []
    for duration in durations:  # each job to the machine that is free first
        machine = free.index(min(free))
        plan.append([machine + 1, free[machine]])
        free[machine] += duration
    ends = [start + duration for (_, start), duration in zip(plan, durations, strict=True)]
    pairs = [
        (a + 1, b + 1) for a in range(jobs) for b in range(a + 1, jobs) if ends[a] <= plan[b][1]
    ]
    before = _drawn_edges(pairs, level, dice)
    waits = "; ".join(f"job {a} ends before job {b} starts" for a, b in before)
    named = ", ".join(map(str, durations))
    ask = (
        f"Two machines, 1 and 2, run jobs that take {named} hours. All must be done by hour "
        f"{max(free)}, and {waits or 'the order is free'}. Give [machine, start] of each job, as a "
        "list in the order of the jobs; the first start is 0."
    )
    instance = {"durations": durations, "machines": 2, "deadline": max(free), "before": before}
    content = f"{named} by {max(free)}: {_edges(before)}"
    return _witness("scheduling", content, ask, plan, instance)


def subsets(level: int, dice: Dice) -> Problem:
    """Some of four to twelve numbers that have a given sum."""
    count, high = ((4, 20), (6, 30), (8, 60), (10, 99), (12, 400))[level - 1]
    numbers = dice.shuffled(range(2, high + 1))[:count]
    chosen = numbers[: dice.between(2, count - 2)]
    shown = sorted(numbers)
    ask = (
        f"Choose some of the numbers {', '.join(map(str, shown))} so that their sum is "
        f"{sum(chosen)}. Each may be used once. List the chosen numbers."
    )
    instance = {"numbers": shown, "target": sum(chosen)}
    content = f"{sum(chosen)} of {','.join(map(str, shown))}"
    return _witness("subset_sum", content, ask, sorted(chosen), instance)


def paths(level: int, dice: Dice) -> Problem:
    """Through all of five to nine nodes, each once."""
    nodes = level + 4
    path = dice.shuffled(range(1, nodes + 1))
    steps = {(min(pair), max(pair)) for pair in itertools.pairwise(path)}
    others = [
        (a, b) for a in range(1, nodes + 1) for b in range(a + 1, nodes + 1) if (a, b) not in steps
    ]
    edges = sorted((*steps, *_drawn_edges(others, level + 1, dice)))
    ask = (
        f"Nodes 1 to {nodes} are joined by these edges: {_edges(edges)}. Find a path along edges "
        "that visits every node exactly once. List its nodes in order."
    )
    instance = {"nodes": nodes, "edges": edges}
    return _witness("hamiltonian_path", f"{nodes}: {_edges(edges)}", ask, path, instance)


PROOF = Course(
    "proof",
    "Put the final answer between <answer> and </answer>.",
    {
        "proof_bounds": bounds,
        "proof_inverses": inverses,
        "proof_definitions": definitions,
        "proof_invariants": invariants,
        "witness_factors": factors,
        "witness_colouring": colouring,
        "witness_scheduling": scheduling,
        "witness_subsets": subsets,
        "witness_paths": paths,
    },
)
