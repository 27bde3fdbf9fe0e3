r"""Brings the ways of writing one thing to one way; what is written keeps its value.

``normalise`` is for spaces, signs, sizes, fonts and synonyms of LaTeX and Unicode.  The other
functions find the structure that brackets and commas give to a text.
"""

from __future__ import annotations

import re

#: Ends a row of a matrix in normalised text.
ROW = "\ue000"  # a private character, no blank

_REPLACED = (
    (r"\\", ROW),
    *(("\u2212", "-"), ("\u2013", "-"), ("\u00d7", r"\times "), ("\u00f7", r"\div ")),
    *(
        ("\u22c5", r"\cdot "),
        ("\u2219", r"\cdot "),
        ("{:}", ":"),
        ("\u03c0", r"\pi "),
        ("\u00b7", r"\cdot "),
    ),
    *(("\u221e", r"\infty "), ("\u2264", r"\le "), ("\u2265", r"\ge "), ("\u2260", r"\ne ")),
    *(("\u222a", r"\cup "), ("\u2208", r"\in "), ("\u2205", r"\emptyset "), ("\u00b1", r"\pm ")),
    *(("\u211d", r"\mathbb{R}"), ("\u03b8", r"\theta "), ("\u2236", ":"), (r"\colon", ":")),
    *(("\u00bd", r"\frac12"), ("\u00bc", r"\frac14"), ("\u00be", r"\frac34")),
    *((r"\displaystyle", ""), (r"\%", "%"), (r"\$", "$")),
    *((r",\! ", ","), (r"\!", ""), ("{,}", ",")),
    *((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac")),
    *((r"\dbinom", r"\binom"), (r"\tbinom", r"\binom"), (r"\bar{", r"\overline{")),
    *((r"\varnothing", r"\emptyset"), (r"\mathbb R", r"\mathbb{R}"), (r"\mid", "|")),
    *((r"^{\circ}", "\u00b0"), (r"^\circ", "\u00b0"), (r"^{\,\circ}", "\u00b0")),
    *((r"\circ", "\u00b0"), (r"\degree", "\u00b0"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}")),
    *((r"\langle", "("), (r"\rangle", ")"), (r"\lvert", "|"), (r"\rvert", "|"), (r"\vert", "|")),
    *((r"\lbrack", "["), (r"\rbrack", "]"), (r"\lparen", "("), (r"\rparen", ")")),
    *((f"\\{space}", " ") for space in (",", ";", ":", " ", "\n", "quad", "qquad", "thinspace")),
    *((space, " ") for space in ("~", "\u00a0", "\u2009", "\u200a", "\u202f")),
)
_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol"
    r"|operatorname)\s?\{([^{}]*)\}"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SIZES = re.compile(r"\\(?:left|right|limits|[bB]igg?[lrm]?)(?![A-Za-z])")
_FONTS = re.compile(r"\{\\(?:rm|bf|it)\s+([^{}]*)\}")
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}")
_DOTTED = re.compile(r"(?<=\.)([0-9]*)\\dot\s?\{([0-9])\}")
_ROOT = re.compile(r"([\u221a\u221b])\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")
_ORDINAL = re.compile(r"(?<=[0-9])\s?(?:\^\s?\{?)?\s?(?:st|nd|rd|th)\s?\}?(?![A-Za-z])")
_SAME_WORDS = {
    **dict.fromkeys((r"\emptyset", r"\{ \}", "no solution", "no solutions"), r"\{\}"),
    **dict.fromkeys(("infinity", "oo", r"+\infty", "+oo"), r"\infty"),
    **dict.fromkeys(("-infinity", "-oo"), r"-\infty"),
    "dne": "does not exist",
}


def normalise(text: str) -> str:
    """One notation for signs, spaces, fonts and synonyms; the value written is left as it is."""
    text = _without_stops(text.strip())
    for left, right in _DELIMITERS:
        inner = text.removeprefix(left).removesuffix(right)
        if len(inner) == len(text) - len(left) - len(right) and left not in inner:
            text = inner.strip()
    for old, new in _REPLACED:
        if old in text:
            text = text.replace(old, new)
    text = _SIZES.sub(" ", text)
    text = _FONTS.sub(r" \1 ", _TEXT.sub(r" \1 ", text))
    text = _RAISED.sub(_raised, _ROOT.sub(_root, text))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _DOTTED.sub(r"\1\\overline{\2}", text))
    text = " ".join(text.replace(ROW, f" {ROW} ").split()).replace(" ^", "^")
    text = _without_stops(_ORDINAL.sub("", text))
    return _SAME_WORDS.get(text.lower(), text)


def _without_stops(text: str) -> str:
    stripped = text.rstrip(".,; ")
    return text[: len(stripped) + 1] if stripped.endswith("\\") else stripped


def _raised(match: re.Match[str]) -> str:
    return (
        "^{"
        + match[0].translate(dict(zip(map(ord, _SUPERSCRIPTS), "0123456789-", strict=True)))
        + "}"
    )


def _root(match: re.Match[str]) -> str:
    index = "[3]" if match[1] == "\u221b" else ""
    return rf"\sqrt{index}{{{match[2] or match[3]}}}"


_AROUND_MARKS = re.compile(r"\s*([^\w\s\\])\s*")


def squeeze(text: str) -> str:
    """Normalised ``text`` without the blanks that cannot matter."""
    return _AROUND_MARKS.sub(r"\1", text)


_OPENING, _CLOSING = "([{", ")]}"


def closes_at_end(text: str) -> bool:
    """Whether the bracket that opens ``text`` is closed by its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0:
            return i == len(text) - 1
    return False


def peel(text: str) -> str:
    """``text`` without round brackets and bare braces around all of it."""
    text = text.strip()
    while text and text[0] in "({" and closes_at_end(text):
        text = text[1:-1].strip()
    return text


def split_items(text: str, separators: str = ",;") -> list[str]:
    """Items between separators outside all brackets."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0 and char in separators:
            items.append(text[start:i].strip())
            start = i + 1
    return [*items, text[start:].strip()]


_MATRIX = re.compile(
    r"(?P<factor>[^&]*?)\\begin\s?\{(?P<kind>[pbB]?matrix|array)\}(?:\{[^{}]*\})?"
    r"(?P<body>[^\\]*(?:\\(?!begin|end)[^\\]*)*)\\end\s?\{(?P=kind)\}"
)


def matrix(text: str) -> tuple[str, list[list[str]]] | None:
    """The factor before a normalised LaTeX matrix, and its rows of cells; None for others."""
    match = _MATRIX.fullmatch(peel(text))
    if match is None:
        return None
    rows = [row.strip() for row in match["body"].split(ROW)]
    if rows and not rows[-1]:
        rows.pop()
    return match["factor"].strip(), [[cell.strip() for cell in row.split("&")] for row in rows]
