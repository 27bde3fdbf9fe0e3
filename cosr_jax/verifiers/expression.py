r"""Reads LaTeX or plain notation of an expression into a tree, without evaluating anything.

One small grammar for both, so that no text of a student ever reaches a parser of sympy, which
evaluates what it is given (sympy issue 10805).  Conventions, where notation leaves a choice:

- ``1/2x`` is read from the left: half of x.  ``2\frac{1}{3}`` is a mixed number.
- Letters side by side are a product; ``e`` is Euler's number and ``i`` the imaginary unit.
- ``\sin 2x`` takes the product that follows; ``\sin^{-1}`` is the inverse function.
- A logarithm without a base has an unknown one: it equals neither ``\ln`` nor one to the base 10.

``cost`` says when a tree is too expensive to evaluate.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

MAX_TOKENS = 300
_MAX_DEPTH = 40
_MAX_LITERAL_DIGITS = 400


class Unreadable(ValueError):
    """A text that is no expression."""


class Node(NamedTuple):
    """An operation on ``args``, or a leaf with a ``value``.

    op: "number" (Fraction), "variable" and "constant" (name), "+", "*", "/", "^" (two arguments),
      "neg", "abs", "factorial", "floor", "ceil", "root" (radicand, index), "binomial",
      "log" (argument, base), or the name of a function.
    """

    op: str
    args: tuple[Node, ...] = ()
    value: Fraction | str = ""


_NAMES = """
    sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln exp log sqrt abs
    factorial floor ceil cbrt binom
"""
FUNCTIONS = frozenset(_NAMES.split())
_SAME_NAME = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_GREEK = frozenset(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho
    sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega""".split()  # noqa: SIM905
)
_TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)"
    r"|(?P<mark>\*\*|[-+*/^(){}\[\]|!_%\u00b0])|(?P<blank>\s+)"
)
_TEN_TO = re.compile(r"[0-9.][eE][-+]?[0-9]")
_OPENING = {"(": ")", "[": "]", "{": "}"}
_TIMES = frozenset(("*", "\\cdot", "\\times"))
_OVER = frozenset(("/", "\\div"))


def parse(text: str) -> Node:
    """The tree of ``text``.

    Raises:
      Unreadable: it is no expression, or longer than ``MAX_TOKENS``, or too deep.
    """
    try:
        return _Parser(_tokens(text)).whole()
    except RecursionError as error:
        raise Unreadable("too deep") from error


def _tokens(text: str) -> list[str]:
    if match := _TEN_TO.search(text):  # those in range are quantities
        raise Unreadable(match[0])
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) >= MAX_TOKENS:
            raise Unreadable(f"{text[position : position + 20]!r}")
        position = match.end()
        if match["blank"]:
            continue
        if word := match["word"]:
            tokens += _letters(word)
        elif command := match["command"]:
            tokens.append(f"\\{_SAME_NAME.get(command, command)}")
        else:
            tokens.append("^" if match[0] == "**" else match[0])
    return tokens


def _letters(word: str) -> list[str]:
    name = _SAME_NAME.get(word, word)
    if name in FUNCTIONS or name == "pi":
        return [f"\\{name}"]
    if len(word) > 3:
        raise Unreadable(word)
    return list(word)


class _Parser:
    """Recursive descent over ``tokens``."""

    def __init__(self, tokens: list[str]):
        self._tokens = [*tokens, ""]
        self._at = 0
        self._depth = 0
        self._bars = 0
        self._number_end = -1  # behind the last number, in braces or not, that is no argument

    def whole(self) -> Node:
        node = self._sum()
        if self._next:
            raise Unreadable(self._next)
        return node

    @property
    def _next(self) -> str:
        return self._tokens[self._at]

    def _take(self, token: str = "") -> str:
        found = self._next
        if not found or (token and found != token):
            raise Unreadable(found or "end")
        self._at += 1
        return found

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        node = self._product()
        while self._next in ("+", "-"):
            sign = self._take()
            right = self._product()
            node = Node("+", (node, right if sign == "+" else Node("neg", (right,))))
        self._depth -= 1
        return node

    def _product(self) -> Node:
        if self._next in ("+", "-"):
            sign = self._take()
            node = self._product()
            return node if sign == "+" else Node("neg", (node,))
        node = self._power()
        while True:
            if self._next in _TIMES:
                self._take()
                node = Node("*", (node, self._signed_power()))
            elif self._next in _OVER:
                self._take()
                node = Node("/", (node, self._signed_power()))
            elif self._starts_factor():
                if self._joins_digits():
                    raise Unreadable("two numbers side by side")
                node = Node("*", (node, self._power()))
            else:
                return node

    def _joins_digits(self) -> bool:
        """Whether TeX would print two numbers as one: ``2 5``, ``{2}5``, ``2{5}``."""
        following = self._tokens[self._at + (self._next == "{")]
        return self._number_end == self._at and following[:1] in tuple(".0123456789")

    def _signed_power(self) -> Node:
        if self._next in ("+", "-"):
            sign = self._take()
            node = self._power()
            return node if sign == "+" else Node("neg", (node,))
        return self._power()

    def _starts_factor(self) -> bool:
        token = self._next
        if token in ("(", "[", "{"):
            return True
        if token == "|":
            return not self._bars
        if token.startswith("\\"):
            return token not in _TIMES | _OVER | {"\\rfloor", "\\rceil"}
        return bool(token) and (token.isalnum() or token[0] in ".0123456789")

    def _power(self) -> Node:
        base = self._postfix()
        while self._next == "^":
            self._take()
            base = self._marked(Node("^", (base, self._exponent())))
        return base

    def _exponent(self) -> Node:
        if self._next in ("+", "-"):
            sign = self._take()
            node = self._exponent()
            return node if sign == "+" else Node("neg", (node,))
        node = self._atom()
        if self._next == "^":  # a tower without braces, read from the right
            self._take()
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise Unreadable("too deep")
            node = Node("^", (node, self._exponent()))
            self._depth -= 1
        return node

    def _postfix(self) -> Node:
        first = self._next
        node = self._atom()
        if node.op == "number" and first[:1] in tuple("{.0123456789"):
            self._number_end = self._at
        return self._marked(node)

    def _marked(self, node: Node) -> Node:
        """``node`` with the marks behind it: factorials, percent, degrees."""
        while self._next in ("!", "%", "\u00b0"):
            mark = self._take()
            if mark == "!":
                if self._next == "!":
                    raise Unreadable("!!")  # the double factorial is another function
                node = Node("factorial", (node,))
            elif mark == "%":
                node = Node("/", (node, _number(100)))
            else:
                node = Node("/", (Node("*", (node, Node("constant", value="pi"))), _number(180)))
        return node

    def _atom(self) -> Node:
        token = self._take()
        if token in _OPENING:
            bars, self._bars = self._bars, 0
            node = self._sum()
            self._take(_OPENING[token])
            self._bars = bars
            return node
        if token == "|":
            self._bars += 1
            node = self._sum()
            self._take("|")
            self._bars -= 1
            return Node("abs", (node,))
        if token[0] in ".0123456789":
            return self._mixed(_decimal(token))
        if token.isalpha():
            return self._name(token)
        if token.startswith("\\"):
            return self._command(token[1:])
        raise Unreadable(token)

    def _mixed(self, whole: Fraction) -> Node:
        number = Node("number", value=whole)
        if self._next != "\\frac" or whole.denominator != 1:
            return number
        start = self._at
        self._take()
        top, bottom = self._group(), self._group()
        if top.op == bottom.op == "number":
            assert isinstance(top.value, Fraction) and isinstance(bottom.value, Fraction)
            if 0 <= top.value < bottom.value:
                return Node("number", value=whole + top.value / bottom.value)
        self._at = start
        return number

    def _name(self, letter: str) -> Node:
        if self._next == "_":
            self._take()
            return Node("variable", value=f"{letter}_{self._subscript()}")
        if letter in ("e", "i"):
            return Node("constant", value=letter)
        return Node("variable", value=letter)

    def _subscript(self) -> str:
        if self._next != "{":
            return self._take()
        self._take()
        written = ""
        while self._next != "}":
            token = self._take()
            if not token.isalnum():
                raise Unreadable(token)
            written += token
        self._take("}")
        return written

    def _command(self, name: str) -> Node:
        if name == "frac":
            return Node("/", (self._group(), self._group()))
        if name == "binom":
            if self._next == "(":
                raise Unreadable(name)
            return Node("binomial", (self._group(), self._group()))
        if name == "sqrt":
            index = _number(2)
            if self._next == "[":
                index = self._atom()
            return Node("root", (self._group(), index))
        if name == "cbrt":
            return Node("root", (self._group(), _number(3)))
        if name in ("lfloor", "lceil"):
            node = self._sum()
            self._take(f"\\r{name[1:]}")
            return Node(name[1:], (node,))
        if name == "pi":
            return Node("constant", value="pi")
        if name == "infty":
            return Node("constant", value="infinity")
        if name in FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self._name_of(name)
        raise Unreadable(f"\\{name}")

    def _name_of(self, greek: str) -> Node:
        if self._next == "_":
            self._take()
            return Node("variable", value=f"\\{greek}_{self._subscript()}")
        return Node("variable", value=f"\\{greek}")

    def _group(self) -> Node:
        """An argument: a group, or one digit or letter or command, as TeX reads it."""
        token = self._next
        if token in ("{", "("):
            return self._atom()
        if token[:1].isdigit() and token.isdigit():
            if len(token) == 1:
                self._take()
            else:  # "\frac12": the digits are two arguments
                self._tokens[self._at] = token[1:]
            return Node("number", value=Fraction(int(token[0])))
        if token.isalpha():
            return self._name(self._take())
        if token.startswith("\\"):
            return self._atom()
        raise Unreadable(token or "end")

    def _function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        while self._next in ("_", "^"):
            mark = self._take()
            if mark == "_" and name == "log" and base is None:
                base = self._group()
            elif mark == "^" and power is None:
                power = self._exponent()
            else:
                raise Unreadable(mark)
        if power is not None and power == Node("neg", (_number(1),)):
            if name not in _INVERSES:
                raise Unreadable(f"{name}^-1")
            name, power = _INVERSES[name], None
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        argument = self._argument()
        self._depth -= 1
        node = Node(name, (argument,) if base is None else (argument, base))
        return node if power is None else Node("^", (node, power))

    def _argument(self) -> Node:
        """``(x)``, or the product that follows: ``2x`` in ``\\sin 2x \\cos x``."""
        if self._next in ("(", "{", "["):
            return self._atom()
        node = self._power()
        while self._starts_factor() and not self._starts_function():
            node = Node("*", (node, self._power()))
        if self._next == "/" and self._tokens[self._at + 1].isdigit():
            self._take()
            node = Node("/", (node, self._power()))
        return node

    def _starts_function(self) -> bool:
        return self._next[1:] in FUNCTIONS - {"sqrt", "cbrt", "binom"} or self._next in _OPENING


def _number(value: int) -> Node:
    return Node("number", value=Fraction(value))


def _decimal(text: str) -> Fraction:
    if len(text) > _MAX_LITERAL_DIGITS:
        raise Unreadable("too many digits")
    return Fraction(text.removesuffix(".") or "0")


# --- Equations and inequalities ---

_RELATION = re.compile(
    r"<=|>=|!=|[<>=]|\\(?:leqslant|geqslant|leq|geq|neq|le|ge|ne|lt|gt)(?![A-Za-z])"
)
_OPERATORS = {
    **{"\\leqslant": "<=", "\\leq": "<=", "\\le": "<=", "\\lt": "<", "\\neq": "!=", "\\ne": "!="},
    **{"\\geqslant": ">=", "\\geq": ">=", "\\ge": ">=", "\\gt": ">"},
}


def split_relations(text: str) -> tuple[list[str], list[str]]:
    """Sides and operators of ``1 < x \\le 2``: (["1", "x", "2"], ["<", "<="])."""
    sides = [side.strip() for side in _RELATION.split(text)]
    operators = [match[0] for match in _RELATION.finditer(text)]
    return sides, [_OPERATORS.get(operator, operator) for operator in operators]


# --- What can be said without algebra ---


def variables(node: Node) -> frozenset[str]:
    """The names of the variables."""
    if node.op == "variable":
        return frozenset((str(node.value),))
    return frozenset().union(*map(variables, node.args))


def rational(node: Node) -> Fraction | None:
    """The value of a tree of rational operations that ``cost.refusal`` admits; None for others.

    Raises:
      Unreadable: the value is undefined, such as 1/0.
    """
    if node.op == "number":
        assert isinstance(node.value, Fraction)
        return node.value
    values = [rational(argument) for argument in node.args]
    if not values or any(value is None for value in values):
        return None
    a, b = Fraction(values[0] or 0), Fraction(values[-1] or 0)
    match node.op:
        case "+":
            return a + b
        case "*":
            return a * b
        case "neg":
            return -a
        case "abs":
            return abs(a)
        case "/" | "^" if (node.op == "/" and b == 0) or (a == 0 and b <= 0):
            if node.op == "/" or a == b == 0 or b < 0:
                raise Unreadable("division by zero, or 0^0")
            return None
        case "/":
            return a / b
        case "^" if b.denominator == 1:
            return Fraction(a ** int(b))
        case "factorial" if a.denominator == 1 and a >= 0:
            return Fraction(math.factorial(int(a)))
        case "binomial" if a.denominator == b.denominator == 1 and a >= 0 and b >= 0:
            return Fraction(math.comb(int(a), int(b)))
    return None
