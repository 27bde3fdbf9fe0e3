"""Reads goals and answers written in a strict part of SMT-LIB 2.7 (https://smt-lib.org).

A goal is a script of these commands, and no others:

    (declare-fun NAME (SORT ...) SORT)            once: what the student defines
    (declare-const NAME SORT)                     a variable; goals must hold for all its values
    (define-fun NAME ((NAME SORT) ...) SORT TERM) for the goals' own use
    (assert TERM)                                 an assumption, or, if it calls the student's
                                                  function, a goal

The answer is one ``define-fun`` of the declared name and sorts, or a lone term where the function
has no parameters.  It sees its parameters and nothing else: a constant that the goals range over
is out of its reach, so that it cannot be picked after them.  Sorts are Int, Real, Bool and
(_ BitVec 1...64); operators are those of ``terms``, and ``let``.  There are no quantifiers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cosr_jax.verifiers import terms
from cosr_jax.verifiers.terms import Function, Goals, Refusal, Signature, Term

MAX_CHARACTERS = 8_000
MAX_DEPTH = 60

_TOKEN = re.compile(r"\s+|;[^\n]*|([()])|([^\s()\";|]{1,200})")
_NUMERAL = re.compile(r"0|[1-9][0-9]*")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]*)\.[0-9]+")
_BITS = re.compile(r"#b([01]+)|#x([0-9a-fA-F]+)")
_RESERVED = terms.OPERATORS | {"let", "true", "false", "forall", "exists", "match", "par", "as"}

Expression = str | list["Expression"]


def read_goals(text: str) -> Goals:
    """A task's script.

    Raises:
      Refusal: it is not of the form above.
    """
    reader = _Script()
    for command in _expressions(text):
        reader.run(command)
    return reader.goals()


def read_answer(text: str, asked: Signature) -> Function:
    """The student's definition.

    Raises:
      Refusal: with the category of the failure.
    """
    expressions = _expressions(text)
    if len(expressions) != 1:
        raise Refusal("syntax_error", f"one term expected, not {len(expressions)}")
    (expression,) = expressions
    if isinstance(expression, list) and expression[:1] == ["define-fun"]:
        function = _definition(expression, {})
        name, parameters = function.signature.name, function.signature.parameters
        if (name, parameters) != (asked.name, asked.parameters):
            raise Refusal("missing_entry_point", f"defines {_shown(function.signature)}")
        return Function(asked, function.names, terms.as_sort(function.body, asked.result))
    if isinstance(expression, list) and expression and str(expression[0]) in _COMMANDS:
        raise Refusal("forbidden", f"{expression[0]} is not for answers")
    if asked.parameters:
        raise Refusal("missing_entry_point", f"no (define-fun {asked.name} ...)")
    return Function(asked, (), terms.as_sort(_term(expression, {}, {}), asked.result))


_COMMANDS = {
    *("assert", "assume", "check-sat", "check-sat-assuming", "constraint", "declare-const"),
    *("declare-datatypes", "declare-fun", "declare-sort", "declare-var", "define-const"),
    *("define-fun-rec", "define-funs-rec", "define-sort", "echo", "eval", "exit", "get-info"),
    *("get-model", "get-value", "include", "pop", "push", "reset", "set-info", "set-logic"),
    *("set-option", "simplify", "synth-fun"),
}


def _shown(signature: Signature) -> str:
    return f"{signature.name} ({' '.join(signature.parameters)})"


def _expressions(text: str) -> list[Expression]:
    if len(text) > MAX_CHARACTERS:
        raise Refusal("forbidden", f"more than {MAX_CHARACTERS} characters")
    stack: list[list[Expression]] = [[]]
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Refusal("syntax_error", f"{text[position : position + 20]!r} is no term")
        position = match.end()
        if match[1] == "(":
            if len(stack) > MAX_DEPTH:
                raise Refusal("forbidden", f"more than {MAX_DEPTH} parentheses deep")
            stack.append([])
        elif match[1] == ")":
            if len(stack) == 1:
                raise Refusal("syntax_error", "a parenthesis closes that was not opened")
            closed = stack.pop()
            stack[-1].append(closed)
        elif match[2]:
            stack[-1].append(match[2])
    if len(stack) > 1:
        raise Refusal("syntax_error", "a parenthesis is not closed")
    return stack[0]


class _Script:
    """A goal script as far as it has been read."""

    def __init__(self) -> None:
        self._asked: Signature | None = None
        self._variables: dict[str, str] = {}
        self._signatures: dict[str, Signature] = {}
        self._functions: list[Function] = []
        self._assertions: list[Term] = []

    def run(self, command: Expression) -> None:
        head = command[0] if isinstance(command, list) and command else command
        match command:
            case ["declare-fun", str(name), list(parameters), result]:
                if self._asked:
                    raise Refusal("syntax_error", "a second declare-fun")
                sorts = tuple(map(_sort, parameters))
                self._asked = Signature(self._new(name), sorts, _sort(result))
                self._signatures[name] = self._asked
            case ["declare-const", str(name), sort]:
                self._variables[self._new(name)] = _sort(sort)
            case ["define-fun", str(name), *_]:
                self._new(name)
                function = _definition(command, self._signatures)
                self._signatures[name] = function.signature
                self._functions.append(function)
            case ["assert", expression]:
                term = _term(expression, self._variables, self._signatures)
                self._assertions.append(terms.as_sort(term, terms.BOOL))
            case _:
                raise Refusal("forbidden", f"{str(head)[:40]!r} is no command of a goal")

    def _new(self, name: str) -> str:
        if name in self._variables or name in self._signatures:
            raise Refusal("syntax_error", f"{name} is declared twice")
        return _own_name(name)

    def goals(self) -> Goals:
        if self._asked is None:
            raise Refusal("syntax_error", "no declare-fun says what is asked")
        calling = {self._asked.symbol}
        for function in self._functions:
            if terms.mentions(function.body, frozenset(calling)):
                calling.add(function.signature.symbol)
        goals = [t for t in self._assertions if terms.mentions(t, frozenset(calling))]
        if not goals:
            raise Refusal("syntax_error", f"no assertion calls {self._asked.name}")
        assumptions = [t for t in self._assertions if t not in goals]
        return Goals(
            self._asked,
            tuple(self._variables.items()),
            tuple(self._functions),
            tuple(assumptions),
            tuple(goals),
        )


def _own_name(name: str) -> str:
    if name in _RESERVED:
        raise Refusal("forbidden", f"{name} means something already")
    return terms.check_name(name)


def _sort(expression: Expression) -> str:
    match expression:
        case "Int" | "Real" | "Bool":
            return str(expression)
        case ["_", "BitVec", str(width)] if _NUMERAL.fullmatch(width) and len(width) <= 3:
            return terms.bit_vector(int(width))
    raise Refusal("forbidden", f"{str(expression)[:40]} is none of the sorts allowed here")


def _definition(expression: Sequence[Expression], signatures: Mapping[str, Signature]) -> Function:
    match expression:
        case ["define-fun", str(name), list(pairs), result, body]:
            _own_name(name)
            parameters = dict(_parameter(pair) for pair in pairs)
            if len(parameters) < len(pairs):
                raise Refusal("syntax_error", "two parameters have one name")
            sort = _sort(result)
            term = terms.as_sort(_term(body, parameters, signatures), sort)
            signature = Signature(name, tuple(parameters.values()), sort)
            return Function(signature, tuple(parameters), term)
    raise Refusal("syntax_error", "write (define-fun NAME ((NAME SORT) ...) SORT TERM)")


def _parameter(pair: Expression) -> tuple[str, str]:
    match pair:
        case [str(name), sort]:
            return _own_name(name), _sort(sort)
    raise Refusal("syntax_error", "write a parameter as (NAME SORT)")


def _term(
    expression: Expression, variables: Mapping[str, str], signatures: Mapping[str, Signature]
) -> Term:
    if isinstance(expression, str):
        return _atom(expression, variables, signatures)
    match expression:
        case ["let", list(pairs), body]:
            names, values = [], []
            for pair in pairs:
                match pair:
                    case [str(name), value]:
                        names.append(_own_name(name))
                        values.append(_term(value, variables, signatures))
                    case _:
                        raise Refusal("syntax_error", "write a binding as (NAME TERM)")
            if not names or len(set(names)) < len(names):
                raise Refusal("syntax_error", "let binds no name, or one twice")
            inner = {**variables, **{n: v.sort for n, v in zip(names, values, strict=True)}}
            return terms.let(names, values, _term(body, inner, signatures))
        case ["_", str(literal), str(width)] if re.fullmatch(r"bv[0-9]{1,20}", literal):
            if _NUMERAL.fullmatch(width) and len(width) <= 3:
                return terms.bits(int(literal[2:]), int(width))
        case ["forall" | "exists", *_]:
            raise Refusal("forbidden", "quantifiers are not allowed")
        case [str(head), *rest] if rest:
            args = [_term(arg, variables, signatures) for arg in rest]
            if head in signatures:
                return terms.call(signatures[head], args)
            return terms.apply(head, args)
    raise Refusal("syntax_error", f"{str(expression)[:60]} is no term")


def _atom(text: str, variables: Mapping[str, str], signatures: Mapping[str, Signature]) -> Term:
    if text in ("true", "false"):
        return terms.truth(text == "true")
    if text in variables:
        return terms.variable(text, variables[text])
    if text in signatures:
        return terms.call(signatures[text], ())
    if len(text) <= terms.MAX_DIGITS and _NUMERAL.fullmatch(text):
        return terms.integer(int(text))
    if _DECIMAL.fullmatch(text):
        return terms.decimal(text)
    if match := _BITS.fullmatch(text):
        digits, width = (match[1], len(match[1])) if match[1] else (match[2], 4 * len(match[2]))
        if width <= terms.MAX_BITS:
            return terms.bits(int(digits, 2 if match[1] else 16), width)
    raise Refusal("syntax_error", f"{text[:40]!r} is not known here")
