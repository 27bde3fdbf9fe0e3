"""Near-verbatim copies of prompts: the same words, whatever the case, blanks and punctuation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def fold(prompt: str) -> str:
    """``prompt`` without case, blanks and punctuation: near-verbatim copies fold to one text.

    What is left stands one blank apart.  Signs of arithmetic stay, as "12 + 7" and "12 - 7" are two
    questions; hyphens, slashes and asterisks between words go.
    """
    text = unicodedata.normalize("NFKC", prompt).translate(_SIGNS).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c not in "$`")
    text = _THOUSANDS.sub("", _AROUND_SIGN.sub(r"\1", text))
    return " ".join(_TOKEN.findall(text))


_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "\u2014": "-"})
_AROUND_SIGN = re.compile(r"(?<![ \t])[ \t]*+([-+*/^=<>%()])[ \t]*+")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_TOKEN = re.compile(
    r"""[0-9]+(?:\.[0-9]+)?                            # number
      | [^\W\d_]+ | [^\W_]                             # word, digit of another script
      | [+=<>^%]
      | (?:(?<=[0-9)])|(?<=(?<![a-z])[a-z]))[-*/](?=[0-9(\\-]|[a-z](?![a-z]))   # no hyphen
      | (?<=[-+*/^])\( | \)(?=[-+*/^])                 # brackets that change the value
    """,
    re.VERBOSE,
)


class Phrases:
    """Finds whether a prompt contains one of many phrases.

    Args:
      phrases: folded texts; empty ones are in no prompt.
    """

    #: Phrases are looked up by so many words from their beginning.
    _WORDS = 8

    def __init__(self, phrases: Iterable[str]):
        self._by_start: dict[tuple[str, ...], list[str]] = {}
        for phrase in dict.fromkeys(phrases):
            if phrase:
                start = tuple(phrase.split()[: self._WORDS])
                self._by_start.setdefault(start, []).append(phrase)
        self._lengths = sorted({len(start) for start in self._by_start})

    def found_in(self, folded: str) -> bool:
        """Whether ``folded`` holds a phrase: whole words, in one piece."""
        words = folded.split()
        padded = f" {folded} "
        starts = {
            start
            for length in self._lengths
            for i in range(len(words) - length + 1)
            if (start := tuple(words[i : i + length])) in self._by_start
        }
        return any(f" {phrase} " in padded for s in starts for phrase in self._by_start[s])
