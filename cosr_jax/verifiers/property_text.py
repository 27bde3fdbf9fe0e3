"""Reads properties and answers written as Python expressions; nothing is ever evaluated.

A goal is one property a line over declared variables and the student's function; its instance is

    {"function": str, "parameters": {name: sort}, "returns": sort, "variables": {name: sort},
     "assume": [expression, ...]}                 sorts are "Int", "Real" and "Bool"

The answer is an expression over the parameters, a lambda, or a ``def`` whose body only branches
and returns.  Meaning is Python's, on exact numbers: ``//`` and ``%`` round down, ``/`` is exact,
and a division by zero that is reached refutes a property.  Unlike in Python a truth value is no
number, and both branches of a conditional have one sort.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.verifiers import terms
from cosr_jax.verifiers.terms import BOOL, INT, REAL, Function, Goals, Refusal, Signature, Term

MAX_CHARACTERS = 4_000
MAX_DEPTH = 60
_MAX_POWER = 8

_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")
_BUILTINS = ("abs", "min", "max")
_COMPARISONS: dict[type, str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "=",
    ast.NotEq: "distinct",
}
_ARITHMETIC: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def read_goals(text: str, instance: str) -> Goals:
    """A task's properties.

    Raises:
      Refusal: text or instance are not of the form above.
    """
    try:
        fields = json.loads(instance)
        parameters, variables = fields["parameters"], fields["variables"]
        asked = Signature(
            _own_name(fields["function"]), tuple(map(_sort, parameters.values())),
            _sort(fields["returns"]),
        )  # fmt: skip
        scope = {_own_name(name): _sort(sort) for name, sort in variables.items()}
        assume = list(fields.get("assume", ()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal("syntax_error", f"instance of a property: {error!r}") from error
    if asked.name in scope:
        raise Refusal("syntax_error", f"{asked.name} is declared twice")

    def read(line: str, functions: Sequence[Signature]) -> Term:
        return terms.as_sort(_Reader(line, scope, functions).term(_parsed(line).body), BOOL)

    goals = tuple(read(line.strip(), [asked]) for line in text.splitlines() if line.strip())
    for goal in goals:
        if not terms.mentions(goal, frozenset([asked.symbol])):
            raise Refusal("syntax_error", f"a property does not call {asked.name}")
    if not goals:
        raise Refusal("syntax_error", "no property")
    assumptions = tuple(read(line, []) for line in assume)  # out of the student's reach
    return Goals(asked, tuple(scope.items()), (), assumptions, goals)


def read_answer(text: str, goals: Goals, instance: str) -> Function:
    """The student's definition; parameters of a def or lambda may have any names.

    Raises:
      Refusal: with the category of the failure.
    """
    asked = goals.asked
    names = tuple(json.loads(instance)["parameters"])
    text = text.strip()
    tree = _parsed(text, "exec")
    match tree.body:
        case [ast.FunctionDef(decorator_list=[]) as function]:
            if function.name != asked.name:
                raise Refusal("missing_entry_point", f"defines {function.name}")
            names = _parameters(function.args, asked)
            result = _Reader(text, _scope(names, asked)).block(function.body)
        case [ast.Expr(ast.Lambda() as function)]:
            names = _parameters(function.args, asked)
            result = _Reader(text, _scope(names, asked)).term(function.body)
        case [ast.Expr(expression)]:
            result = _Reader(text, _scope(names, asked)).term(expression)
        case _:
            raise Refusal("forbidden", "write one expression, lambda or def")
    return Function(asked, names, terms.as_sort(result, asked.result))


def _scope(names: Sequence[str], asked: Signature) -> dict[str, str]:
    return {_own_name(n): sort for n, sort in zip(names, asked.parameters, strict=True)}


def _parameters(args: ast.arguments, asked: Signature) -> tuple[str, ...]:
    if args.vararg or args.kwarg or args.kwonlyargs or args.defaults:
        raise Refusal("forbidden", "write plain parameters")
    names = tuple(arg.arg for arg in (*args.posonlyargs, *args.args))
    if len(names) != len(asked.parameters):
        raise Refusal(
            "missing_entry_point", f"{asked.name} takes {len(asked.parameters)} parameters"
        )
    return names


def _own_name(name: str) -> str:
    if not isinstance(name, str) or name in _BUILTINS:
        raise Refusal("forbidden", f"{name} means something already")
    return terms.check_name(name)


def _sort(sort: object) -> str:
    if sort not in (INT, REAL, BOOL):
        raise Refusal("syntax_error", f"{sort!r} is none of the sorts Int, Real, Bool")
    return str(sort)


def _parsed(text: str, mode: str = "eval") -> Any:
    if len(text) > MAX_CHARACTERS:
        raise Refusal("forbidden", f"more than {MAX_CHARACTERS} characters")
    if not text.isascii():  # Python folds look-alikes into one name
        raise Refusal("forbidden", "only ASCII is allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1 is 1" and its like are refused below
            return ast.parse(text, mode=mode)
    except (SyntaxError, ValueError) as error:
        raise Refusal("syntax_error", f"{type(error).__name__}: {error}"[:200]) from error
    except (RecursionError, MemoryError) as error:  # so the parser says that it is nested too deep
        raise Refusal("forbidden", "nested too deep") from error


class _Reader:
    """Turns the nodes of one text into terms."""

    def __init__(self, text: str, scope: Mapping[str, str], functions: Sequence[Signature] = ()):
        self._text = text
        self._scope = scope
        self._functions = {function.name: function for function in functions}
        self._depth = 0

    def block(self, statements: Sequence[ast.stmt]) -> Term:
        """What statements that branch and return give back."""
        self._descend()
        match statements:
            case [ast.Return(ast.expr() as value)]:
                result = self.term(value)
            case [ast.If(test=test, body=body, orelse=[]), *rest]:
                result = self._branch(self.term(test), self.block(body), self.block(rest))
            case [ast.If(test=test, body=body, orelse=rest)]:
                result = self._branch(self.term(test), self.block(body), self.block(rest))
            case _:
                raise Refusal("forbidden", "a def may only branch with if, and return on each path")
        self._depth -= 1
        return result

    def term(self, node: ast.expr) -> Term:
        self._descend()
        result = self._term(node)
        self._depth -= 1
        return result

    def _descend(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Refusal("forbidden", f"nested more than {MAX_DEPTH} deep")

    def _term(self, node: ast.expr) -> Term:
        match node:
            case ast.Constant(bool(value)):
                return terms.truth(value)
            case ast.Constant(int(value)):
                return terms.integer(value)
            case ast.Constant(float()):
                written = ast.get_source_segment(self._text, node) or ""
                if not _DECIMAL.fullmatch(written):
                    raise Refusal("forbidden", f"{written[:40]!r}: write decimals like 0.25")
                return terms.decimal(written)
            case ast.Name(name):
                if name not in self._scope:
                    raise Refusal("syntax_error", f"{name[:40]} is not known here")
                return terms.variable(name, self._scope[name])
            case ast.UnaryOp(ast.USub(), operand):
                return terms.apply("-", [self.term(operand)])
            case ast.UnaryOp(ast.Not(), operand):
                return terms.apply("not", [self.term(operand)])
            case ast.BoolOp(op, values):
                args = [self.term(value) for value in values]
                return terms.apply("and" if isinstance(op, ast.And) else "or", args)
            case ast.IfExp(test, body, orelse):
                return self._branch(self.term(test), self.term(body), self.term(orelse))
            case ast.Compare():
                return self._comparison(node)
            case ast.BinOp(left, op, right):
                return self._binary(op, left, right)
            case ast.Call(ast.Name(name), args, []):
                return self._call(name, [self.term(arg) for arg in args])
        raise Refusal("forbidden", f"{type(node).__name__} is not allowed here")

    def _branch(self, test: Term, body: Term, orelse: Term) -> Term:
        return terms.apply("ite", [test, body, orelse])

    def _comparison(self, node: ast.Compare) -> Term:
        values = [self.term(value) for value in (node.left, *node.comparators)]
        # Names that begin with a digit belong to nobody; a middle value is written once.
        names = [f"{i}.{self._depth}" for i in range(len(values))]
        shared = [terms.variable(n, v.sort) for n, v in zip(names, values, strict=True)]
        parts = []
        for index, op in enumerate(node.ops):
            if type(op) not in _COMPARISONS:
                raise Refusal("forbidden", f"{type(op).__name__} is not allowed here")
            parts.append(terms.apply(_COMPARISONS[type(op)], shared[index : index + 2]))
        return terms.let(names, values, terms.conjunction(parts))

    def _binary(self, op: ast.operator, left: ast.expr, right: ast.expr) -> Term:
        if isinstance(op, ast.Pow):
            return self._power(self.term(left), right)
        a, b = self.term(left), self.term(right)
        if type(op) in _ARITHMETIC:
            return terms.apply(_ARITHMETIC[type(op)], [a, b])
        quotient, remainder = isinstance(op, ast.FloorDiv), isinstance(op, ast.Mod)
        if not quotient and not remainder:
            raise Refusal("forbidden", f"{type(op).__name__} is not allowed here")
        if b.op.isdigit():  # then SMT-LIB means what Python means
            return terms.apply("div" if quotient else "mod", [a, b])
        # SMT-LIB's remainder is never negative; Python's has the sign of the divisor.
        names = [f"{i}.{self._depth}" for i in range(2)]
        x, y = (terms.variable(n, v.sort) for n, v in zip(names, (a, b), strict=True))
        flipped = terms.apply("div", [terms.apply("-", [x]), terms.apply("-", [y])])
        is_positive = terms.apply(">", [y, terms.integer(0)])
        body = self._branch(is_positive, terms.apply("div", [x, y]), flipped)
        if remainder:
            body = terms.apply("-", [x, terms.apply("*", [y, body])])
        return terms.let(names, [a, b], body)

    def _power(self, base: Term, exponent: ast.expr) -> Term:
        match exponent:
            case ast.Constant(int(power)) if 2 <= power <= _MAX_POWER:
                name = f"0.{self._depth}"
                factors = [terms.variable(name, base.sort)] * power
                return terms.let([name], [base], terms.apply("*", factors))
        raise Refusal("forbidden", f"** takes a written power from 2 to {_MAX_POWER}")

    def _call(self, name: str, args: list[Term]) -> Term:
        if name in self._functions:
            return terms.call(self._functions[name], args)
        if name not in _BUILTINS:
            raise Refusal("forbidden", f"{name[:40]} may not be called")
        if name == "abs":
            return terms.apply("abs", args)
        if not 2 <= len(args) <= 8:
            raise Refusal("syntax_error", f"{name} takes 2 to 8 arguments here")
        best = args[0]
        for arg in args[1:]:
            names = [f"{i}.{self._depth}" for i in range(2)]
            x, y = (terms.variable(n, v.sort) for n, v in zip(names, (best, arg), strict=True))
            is_best = terms.apply("<=" if name == "min" else ">=", [x, y])
            best = terms.let(names, [best, arg], self._branch(is_best, x, y))
        return best
