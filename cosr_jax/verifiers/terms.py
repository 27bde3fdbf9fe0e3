"""Typed terms over integers, rationals, truth values and bit vectors, written as SMT-LIB text.

Every term that reaches the solver is built here, operator by operator, with its sorts checked:
what a student wrote is never handed on as text.  Names are printed with a prefix ("v." variables,
"f." functions), so that no name can mean anything to the solver.

SMT-LIB gives every division a value, also by zero, and leaves the value open.  Here a goal must
hold *and* evaluate no division by zero on the way (``definedness``), as if "and", "or", "=>" and
"ite" stopped as early as they can.

Sorts and operators: https://smt-lib.org/theories.shtml (Core, Ints, Reals, FixedSizeBitVectors).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

INT, REAL, BOOL = "Int", "Real", "Bool"
MAX_BITS = 64
MAX_DIGITS = 40

_BIT_VECTOR = re.compile(r"\(_ BitVec ([1-9][0-9]*)\)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Refusal(Exception):
    """A text that is no admissible term; the category is one of ``cosr_jax.types.CATEGORIES``."""

    def __init__(self, category: str, detail: str):
        super().__init__(detail)
        self.category = category
        self.detail = detail


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A variable, literal, application, or "let" (values, then the body that sees ``names``)."""

    op: str  # as printed
    args: tuple[Term, ...]
    sort: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.names:
            *values, body = self.args
            pairs = " ".join(f"({n} {v})" for n, v in zip(self.names, values, strict=True))
            return f"(let ({pairs}) {body})"
        return f"({self.op} {' '.join(map(str, self.args))})" if self.args else self.op


@dataclasses.dataclass(frozen=True)
class Signature:
    """A function's name and sorts."""

    name: str
    parameters: tuple[str, ...]
    result: str

    @property
    def symbol(self) -> str:
        return f"f.{self.name}"


@dataclasses.dataclass(frozen=True)
class Function:
    """A definition: ``body`` over the variables ``names``, one for each parameter."""

    signature: Signature
    names: tuple[str, ...]
    body: Term


@dataclasses.dataclass(frozen=True)
class Goals:
    """What must be shown: each goal follows from the assumptions, whatever the variables are.

    Assumptions never call the student's function, so that no definition can make them false.
    """

    asked: Signature  # what the student defines
    variables: tuple[tuple[str, str], ...]  # name and sort
    functions: tuple[Function, ...]  # the task's own, in order of definition
    assumptions: tuple[Term, ...]
    goals: tuple[Term, ...]


def check_name(name: str) -> str:
    """``name``, if it is plain.

    Raises:
      Refusal: it is no identifier of up to 64 ASCII letters, digits and underscores.
    """
    if not _NAME.fullmatch(name):
        raise Refusal("syntax_error", f"{name[:40]!r} is no plain name")
    return name


def bit_vector(bits: int) -> str:
    """The sort of vectors of ``bits`` bits.

    Raises:
      Refusal: not in 1 ... ``MAX_BITS``.
    """
    if not 1 <= bits <= MAX_BITS:
        raise Refusal("forbidden", f"bit vectors have 1 to {MAX_BITS} bits, not {bits}")
    return f"(_ BitVec {bits})"


def variable(name: str, sort: str) -> Term:
    return Term(f"v.{name}", (), sort)


def truth(value: bool) -> Term:
    return Term("true" if value else "false", (), BOOL)


def integer(value: int) -> Term:
    """Raises ``Refusal`` above ``MAX_DIGITS`` digits."""
    if abs(value) >= 10**MAX_DIGITS:
        raise Refusal("forbidden", f"a number has more than {MAX_DIGITS} digits")
    literal = Term(str(abs(value)), (), INT)
    return Term("-", (literal,), INT) if value < 0 else literal


def decimal(text: str) -> Term:
    """A rational written as digits, point and digits."""
    if len(text) > MAX_DIGITS:
        raise Refusal("forbidden", f"a number has more than {MAX_DIGITS} digits")
    return Term(text, (), REAL)


def bits(value: int, width: int) -> Term:
    """Raises ``Refusal`` if ``value`` does not fit."""
    sort = bit_vector(width)
    if not 0 <= value < 1 << width:
        raise Refusal("syntax_error", f"{value} does not fit into {width} bits")
    return Term(f"(_ bv{value} {width})", (), sort)


def call(signature: Signature, args: Sequence[Term]) -> Term:
    """Raises ``Refusal`` on a wrong number or sort of arguments."""
    if len(args) != len(signature.parameters):
        raise _ill(f"{signature.name} takes {len(signature.parameters)} arguments, not {len(args)}")
    fitted = [as_sort(a, sort) for a, sort in zip(args, signature.parameters, strict=True)]
    return Term(signature.symbol, tuple(fitted), signature.result)


def let(names: Sequence[str], values: Sequence[Term], body: Term) -> Term:
    """``body``, in which each of ``names`` stands for its value."""
    return Term("let", (*values, body), body.sort, tuple(f"v.{name}" for name in names))


def as_sort(term: Term, sort: str) -> Term:
    """``term``, an integer taken as a rational where one is wanted; other sorts must be equal."""
    if term.sort == INT and sort == REAL:
        return Term("to_real", (term,), REAL)
    if term.sort != sort:
        raise _ill(f"{sort} expected where there is {term.sort}")
    return term


def apply(op: str, args: Sequence[Term]) -> Term:
    """An operator applied.

    Raises:
      Refusal: there is no such operator ("forbidden"), or the arguments do not fit it.
    """
    rule = _OPERATORS.get(op)
    if rule is None:
        raise Refusal("forbidden", f"{op[:40]!r} is none of the operators allowed here")
    return rule(op, tuple(args))


def conjunction(parts: Iterable[Term]) -> Term:
    """All of ``parts``; "true" if there are none."""
    kept = tuple(parts)
    return Term("and", kept, BOOL) if len(kept) > 1 else kept[0] if kept else truth(True)


def definedness(term: Term, partial: frozenset[str]) -> Term | None:
    """Under which condition ``term`` evaluates without a division by zero; None: always.

    ``partial`` holds the symbols of the functions f.x for which a predicate d.x says that.
    """
    inner = [definedness(arg, partial) for arg in term.args]
    if term.names:
        *values, body = inner
        if body is not None:
            body = Term("let", (*term.args[:-1], body), BOOL, term.names)
        return _all([*values, body])
    if term.op in ("and", "=>", "or") and any(inner[1:]):
        return _short_circuit(term.op, term.args, inner)
    if term.op == "ite" and any(inner[1:]):
        branches = [part or truth(True) for part in inner[1:]]
        return _all([inner[0], Term("ite", (term.args[0], *branches), BOOL)])
    own = None
    if term.op in ("/", "div", "mod"):
        zero = Term("0.0" if term.sort == REAL else "0", (), term.sort)
        own = Term("not", (Term("=", (term.args[1], zero), BOOL),), BOOL)
    elif term.op in partial:
        own = Term(f"d.{term.op[2:]}", term.args, BOOL)
    return _all([*inner, own])


def _all(parts: Iterable[Term | None]) -> Term | None:
    kept = [part for part in parts if part is not None]
    return conjunction(kept) if kept else None


def _short_circuit(op: str, args: Sequence[Term], inner: Sequence[Term | None]) -> Term | None:
    """Each argument must be defined only where those before it do not decide."""
    rest = inner[-1]
    for arg, part in zip(args[-2::-1], inner[-2::-1], strict=True):
        if rest is not None:
            rest = Term(
                "or", (arg, rest) if op == "or" else (Term("not", (arg,), BOOL), rest), BOOL
            )
        rest = _all([part, rest])
    return rest


def smt_script(goals: Goals, answer: Function) -> tuple[str, list[str]]:
    """What the solver is told, and the terms that must follow from it, one for each goal."""
    lines = [f"(declare-const v.{name} {sort})" for name, sort in goals.variables]
    partial: set[str] = set()
    for function in (answer, *goals.functions):  # the task's own may call the student's
        lines.append(_definition("f", function, function.body, function.signature.result))
        condition = definedness(function.body, frozenset(partial))
        if condition is not None:
            lines.append(_definition("d", function, condition, BOOL))
            partial.add(function.signature.symbol)

    def whole(term: Term) -> str:
        return str(_all([definedness(term, frozenset(partial)), term]))

    lines += [f"(assert {whole(term)})" for term in goals.assumptions]
    return "\n".join(lines), [whole(term) for term in goals.goals]


def _definition(prefix: str, function: Function, body: Term, sort: str) -> str:
    signature = function.signature
    pairs = " ".join(
        f"(v.{name} {of})" for name, of in zip(function.names, signature.parameters, strict=True)
    )
    return f"(define-fun {prefix}.{signature.name} ({pairs}) {sort} {body})"


def mentions(term: Term, symbols: frozenset[str]) -> bool:
    """Whether ``term`` calls one of ``symbols``."""
    return term.op in symbols or any(mentions(arg, symbols) for arg in term.args)


def _ill(detail: str) -> Refusal:
    return Refusal("syntax_error", detail)


def _counted(op: str, args: Sequence[Term], least: int, most: int | None = None) -> None:
    if len(args) < least or (most is not None and len(args) > most):
        wanted = f"{least}" if most == least else f"{least} or more"
        raise _ill(f"{op} takes {wanted} arguments, not {len(args)}")


def _alike(args: Sequence[Term]) -> tuple[Term, ...]:
    """Arguments of one sort; integers become rationals beside rationals."""
    sort = REAL if any(arg.sort == REAL for arg in args) else args[0].sort
    return tuple(as_sort(arg, sort) for arg in args)


def _numbers(op: str, args: Sequence[Term]) -> tuple[Term, ...]:
    args = _alike(args)
    if args[0].sort not in (INT, REAL):
        raise _ill(f"{op} takes numbers, not {args[0].sort}")
    return args


def _arithmetic(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 1 if op == "-" else 2)
    args = _numbers(op, args)
    return Term(op, args, args[0].sort)


def _magnitude(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 1, 1)
    (arg,) = _numbers(op, args)
    shared = Term("v.0", (), arg.sort)  # no name begins with a digit
    zero = Term("0" if arg.sort == INT else "0.0", (), arg.sort)
    negated = Term("-", (shared,), arg.sort)
    body = Term("ite", (Term(">=", (shared, zero), BOOL), shared, negated), arg.sort)
    return Term("let", (arg, body), arg.sort, ("v.0",))


def _quotient(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 2, 2)
    return Term(op, tuple(as_sort(arg, REAL) for arg in args), REAL)


def _whole_quotient(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 2, 2)
    return Term(op, tuple(as_sort(arg, INT) for arg in args), INT)


def _order(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 2)
    return Term(op, _numbers(op, args), BOOL)


def _equality(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 2)
    return Term(op, _alike(args), BOOL)


def _connective(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 1 if op in ("and", "or") else 2)
    return Term(op, tuple(as_sort(arg, BOOL) for arg in args), BOOL)


def _negation(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 1, 1)
    return Term(op, (as_sort(args[0], BOOL),), BOOL)


def _choice(op: str, args: tuple[Term, ...]) -> Term:
    _counted(op, args, 3, 3)
    branches = _alike(args[1:])
    return Term(op, (as_sort(args[0], BOOL), *branches), branches[0].sort)


def _conversion(given: str, result: str) -> Callable[[str, tuple[Term, ...]], Term]:
    def rule(op: str, args: tuple[Term, ...]) -> Term:
        _counted(op, args, 1, 1)
        return Term(op, (as_sort(args[0], given),), result)

    return rule


def _vectors(least: int, most: int | None, gives: str = "") -> Callable[..., Term]:
    def rule(op: str, args: tuple[Term, ...]) -> Term:
        _counted(op, args, least, most)
        if not all(_BIT_VECTOR.fullmatch(arg.sort) for arg in args):
            raise _ill(f"{op} takes bit vectors")
        args = _alike(args)
        return Term(op, args, gives or args[0].sort)

    return rule


_OPERATORS: dict[str, Callable[[str, tuple[Term, ...]], Term]] = {
    **dict.fromkeys(("+", "-", "*"), _arithmetic),
    **dict.fromkeys(("<", "<=", ">", ">="), _order),
    **dict.fromkeys(("=", "distinct"), _equality),
    **dict.fromkeys(("and", "or", "xor", "=>"), _connective),
    **dict.fromkeys(("div", "mod"), _whole_quotient),
    "/": _quotient,
    "abs": _magnitude,
    "not": _negation,
    "ite": _choice,
    "to_real": _conversion(INT, REAL),
    "to_int": _conversion(REAL, INT),
    "is_int": _conversion(REAL, BOOL),
    **dict.fromkeys(("bvnot", "bvneg"), _vectors(1, 1)),
    **dict.fromkeys(("bvand", "bvor", "bvxor", "bvadd", "bvmul"), _vectors(2, None)),
    **dict.fromkeys(("bvsub", "bvudiv", "bvurem", "bvshl", "bvlshr", "bvashr"), _vectors(2, 2)),
    **dict.fromkeys(
        ("bvult", "bvule", "bvugt", "bvuge", "bvslt", "bvsle", "bvsgt", "bvsge"),
        _vectors(2, 2, BOOL),
    ),
}

#: Names that mean an operator, so that nothing else may be called so.
OPERATORS = frozenset(_OPERATORS)
