r"""Finds the program in a completion: the one extractor for data, reward and evaluation.

Sources, in the order in which they are asked for the entry point:

  1. fenced blocks (backticks or tildes, closed or not); the last that defines the entry point
  2. stretches of code between paragraphs of prose, outside of all fences; likewise
  3. blocks that are labelled as another language

An import of the name counts where nothing else binds it: a usage example imports it, too.

If nothing defines it, the last Python block is the program, which then fails for the lack of its
entry point.  For a script the last block that reads standard input counts, else the last Python
block.  Blocks of shells, consoles, outputs and data are never programs.

Nothing is repaired: the program is a stretch of the text, from the start of a line to the end of
one, without the indentation or quotation marks of its fence.  Nothing of it is executed, and only
code that the length limit cut is parsed, to tell whether it is whole.  Work is linear in the length
of the text.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence

from cosr_jax.verifiers.extraction import Span, final_text
from cosr_jax.verifiers.fences import FOREIGN, NO_PROGRAMS, PYTHON, Block, fenced_blocks
from cosr_jax.verifiers.python_text import STATEMENT, Literals, defines, without_strings


@dataclasses.dataclass(frozen=True)
class CodeExtraction:
    """What was found.

    Attributes:
      code: the student's program as written; "" when there is none.
      category: "" when there is a program, else "no_code" or "truncated".
    """

    code: str
    category: str = ""


def extract_code(text: str, entry_point: str | None, finish_reason: str = "stop") -> CodeExtraction:
    """The program of ``text``, the completion as the student emitted it.

    Args:
      text: any string.
      entry_point: the name that the program must define; None or "" for a script.
      finish_reason: "stop", or "length" when the token limit cut the completion.

    Returns:
      The program; or none, with the category "truncated" when the length limit cut the completion
      before the program was whole and "no_code" otherwise.
    """
    was_cut = finish_reason == "length"
    name = entry_point.partition(".")[0].partition("(")[0].strip() if entry_point else ""
    final = final_text(text)
    for region in _regions(final):
        block = _choose(final[slice(*region)], name)
        if block is None:
            continue
        if was_cut and not block.is_closed and not _parses(block.code):
            return CodeExtraction("", "truncated")
        return CodeExtraction(block.code)
    return CodeExtraction("", "truncated" if was_cut else "no_code")


_READS_STDIN = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(\s*0\b|\bos\.read\(\s*0\b|\bfileinput\b")


def _choose(text: str, name: str) -> Block | None:
    """The block of ``text`` that is the program; ``name`` is its entry point, "" for a script."""
    blocks = fenced_blocks(text)
    fenced = [b for b in blocks if b.label not in NO_PROGRAMS and b.code.strip()]
    ours = [block for block in fenced if block.label not in FOREIGN]
    loose = list(_unfenced(text, blocks))
    if name:
        others = [block for block in fenced if block.label in FOREIGN]
        for imports in (False, True):
            for sources in (ours, loose, others):
                for block in reversed(sources):
                    if defines(block.code, name, imports):
                        return block
    else:
        for sources in (ours, loose):
            for block in reversed(sources):
                if _READS_STDIN.search(without_strings(block.code)):
                    return block
    for block in reversed(ours):
        if PYTHON.fullmatch(block.label):
            return block
    for block in reversed([*loose, *ours]):
        if STATEMENT.search(without_strings(block.code)):
            return block
    return None


_MENTION = r"""(?P<quote>["'`])<answer>[^"'`\n]*(?P=quote)"""
_ANSWER = re.compile(rf"{_MENTION}|(?P<open><answer>)")
_ANSWER_END = "</answer>"


def _regions(text: str) -> Iterator[Span]:
    """Where to look for the program: the last <answer>, or all of a text without one.

    Tags inside a closed block, or between quotes, are part of a program.  A tag that is not closed
    may be a mere mention: what stands before it comes next.
    """
    if "<answer>" not in text:
        yield (0, len(text))
        return
    inside = [block.span for block in fenced_blocks(text) if block.is_closed]
    starts = [m.end() for m in _outside(_ANSWER.finditer(text), inside) if m["open"]]
    ends = [m.start() for m in _outside(re.finditer(_ANSWER_END, text), inside)]
    limit = len(text)
    for start in reversed(starts):
        end = next((e for e in ends if start <= e <= limit), None)
        yield (start, limit if end is None else end)
        if end is not None:
            return
        limit = start - len("<answer>")
    yield (0, limit)


def _outside(matches: Iterator[re.Match[str]], spans: Sequence[Span]) -> Iterator[re.Match[str]]:
    """The matches that start in none of ``spans``; both are in order."""
    rest = iter(spans)
    span = next(rest, None)
    for match in matches:
        while span and span[1] <= match.start():
            span = next(rest, None)
        if not span or match.start() < span[0]:
            yield match


def _parses(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the student's invalid escapes are nobody's concern here
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
    return True


# --- Code among prose ---

_BULLET = re.compile(r"[ \t]*(?:[-*\u2022]|[0-9]+[.)])[ \t]+[*_`]*[A-Za-z]+[^\w\s(=]* [A-Za-z]")
_WORDS = re.compile(
    r"(?!(?:assert|await|del|global|lambda|nonlocal|not|pass|raise|return|yield|elif|else|except"
    r"|finally|if|for|while|with|case|match|import|from|class|def|async)\b)"
    r"[*_`>#\"'(]*[A-Za-z][A-Za-z'\u2019-]*[,:.!]?[*_`\"']*(?:[ ]+[\w*`\"'(\u2019]|[ ]*$)"
)
_DOCSTRINGS = ('"""', "'''", 'r"""', "r'''")


_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?:(?: {4}|\t)[^\n]*(?:\n|\Z)|\n)+")


def _unfenced(text: str, fenced: Sequence[Block]) -> Iterator[Block]:
    """Stretches of code between prose, outside of ``fenced``."""
    position = 0
    for start, end in (*(block.span for block in fenced), (len(text), len(text))):
        between = text[position:start]
        yield from _indented(between)
        yield from _stretches(between)
        position = end


def _indented(text: str) -> Iterator[Block]:
    """Code that Markdown sets off by indentation alone: behind a blank line or at the start."""
    for match in _INDENTED.finditer(text):
        code = re.sub(r"^(?: {4}|\t)", "", match[0], flags=re.MULTILINE)
        if STATEMENT.match(code.lstrip("\n")):
            yield Block("", code, match.end() < len(text), match.span())


def _stretches(text: str) -> Iterator[Block]:
    """Code between prose: from a line that can only be a statement to the next line of prose."""
    if not STATEMENT.search(text):
        return
    start: int | None = None
    comments: int | None = None  # where those right before the code start
    position = 0
    literals = Literals(text)
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if start is None:
            if line.startswith("#"):
                comments = position if comments is None else comments
            elif STATEMENT.match(line) or line.startswith(_DOCSTRINGS):
                start = position if comments is None else comments
                literals.restart(position)
            elif line.strip():
                comments = None
        elif _is_prose(line) and not literals.cover(position):
            yield Block("", text[start:position], True, (start, position))
            start = comments = None
        position += len(line)
    if start is not None:
        yield Block("", text[start:], False, (start, position))


def _is_prose(line: str) -> bool:
    if _BULLET.match(line):
        return True
    return bool(not line[:1].isspace() and _WORDS.match(line) and not STATEMENT.match(line))
