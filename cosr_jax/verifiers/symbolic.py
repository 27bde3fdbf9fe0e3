r"""Equality of two expressions, proved with sympy.  Imported by worker processes only.

LaTeX is read by latex2sympy2_extended, the parser of Math-Verify, and plain text through ``ast``:
sympy's own ``parse_expr`` and ``sympify`` evaluate what they are given (sympy issue 10805) and are
never called.  Math-Verify's ``verify`` is not used either: it rounds, so that it takes 1/2^99 for
1/2^98 (its issue 14), and its alarm fails in threads (issue 50).  Here a difference must be zero
exactly: sampling at high precision can only refute equality, never establish it.
"""

from __future__ import annotations

import ast
import contextlib
import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.evalf import PrecisionExhausted

_DIGITS = 200
_FUNCTIONS = {
    "sqrt": sympy.sqrt,
    "abs": sympy.Abs,
    "exp": sympy.exp,
    "log": sympy.log,
    "ln": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "factorial": sympy.factorial,
}
_CONSTANTS = {"pi": sympy.pi}
_OPERATORS: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


class Unreadable(ValueError):
    """A text that is no expression."""


def symbolically_equal(given: str, gold: str) -> bool:
    """Whether two expressions, admitted by ``symbolic_refusal``, are proved to be equal.

    A ``given`` that cannot be read equals nothing; neither does one whose equality cannot be shown.

    Raises:
      Unreadable: ``gold`` is no expression.
    """
    b = parse(gold)
    try:
        a = parse(given)
    except Unreadable:
        return False
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(
            _is_zero(x - y) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    if isinstance(a, sympy.Rel) and isinstance(b, sympy.Rel):
        return bool(a.canonical == b.canonical)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(a == b)
    if a.free_symbols != b.free_symbols and not (a - b).has(sympy.Symbol):
        return False
    return a == b or _is_zero(a - b)


def parse(text: str) -> Any:
    """A sympy object from LaTeX or plain notation.

    Raises:
      Unreadable: it is neither, or it holds an undefined value such as 1/0.
    """
    try:
        if re.search(r"[\\{}|!<>=\[\]]", text):
            # Unlike the default, symbols keep their case, and nothing is mended beforehand.
            value = latex2sympy(
                text,
                normalization_config=None,
                conversion_config=ConversionConfig(lowercase_symbols=False),
            )
        else:
            value = _from_ast(_python_notation(text))
        if value is None:
            raise Unreadable(text)
        value = value.doit() if hasattr(value, "doit") else value
    except (MemoryError, Unreadable):
        raise
    except Exception as error:  # the parser raises bare Exception on bad input
        raise Unreadable(f"{text!r}: {type(error).__name__}") from error
    if hasattr(value, "has") and value.has(sympy.nan, sympy.zoo):
        raise Unreadable(f"{text!r} is undefined")
    return _exact(value)


def _exact(value: Any) -> Any:
    """Decimals as the rationals they write: 0.5 is 1/2."""
    if not hasattr(value, "atoms"):
        return value
    floats = value.atoms(sympy.Float)
    return value.xreplace({f: sympy.Rational(str(f)) for f in floats})


def _python_notation(text: str) -> str:
    """Writes products out: ``2xy(x+1)`` is ``2*x*y*(x+1)``; names of functions stay whole."""
    tokens = re.findall(r"[A-Za-z]+|[0-9.]+|\*\*|\S", text.replace("^", "**"))
    written: list[str] = []
    for token in tokens:
        is_name = token in _FUNCTIONS or token in _CONSTANTS
        for part in (token,) if is_name or not token.isalpha() else token:
            before = written[-1] if written else "*"
            ends_operand = before[-1].isalnum() or before[-1] in ".)"
            if ends_operand and before not in _FUNCTIONS and (part[0].isalnum() or part[0] in ".("):
                written.append("*")
            written.append(part)
    return "".join(written)


def _from_ast(text: str) -> sympy.Expr:
    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return sympy.Rational(str(Fraction(ast.get_source_segment(text, node) or "")))
            case ast.Name(id=name) if name in _CONSTANTS:
                return _CONSTANTS[name]
            case ast.Name(id=name) if len(name) == 1:
                return sympy.Symbol(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -build(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return build(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](build(left), build(right))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if (
                name in _FUNCTIONS
            ):
                return _FUNCTIONS[name](build(argument))
        raise Unreadable(text)

    return build(ast.parse(text, mode="eval").body)


def _is_zero(difference: sympy.Expr) -> bool:
    if difference.is_Rational:
        return bool(difference == 0)
    if _differs_somewhere(difference):
        return False
    for simplify in (sympy.expand, sympy.radsimp, sympy.simplify):
        if simplify(difference) == 0:
            return True
    return difference.equals(0) is True


def _differs_somewhere(difference: sympy.Expr) -> bool:
    """Whether the value at some fixed rational point is provably not zero."""
    symbols = sorted(difference.free_symbols, key=str)
    for shift in range(3):
        point = {s: sympy.Rational(7 + 3 * i + shift, 5 + 2 * shift) for i, s in enumerate(symbols)}
        value = difference.subs(point)
        if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
            continue
        if value.is_Rational:
            if value != 0:
                return True
            continue
        # Strict evaluation raises unless two digits are certain; a true zero has none.
        with contextlib.suppress(PrecisionExhausted):
            if value.evalf(2, maxn=_DIGITS, strict=True) != 0:
                return True
    return False
