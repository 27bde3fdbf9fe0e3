r"""Where a free text states its one answer, under rules that would rather find none.

``extraction`` reads the forms that a student is asked for, and ``value_correct`` forgives the form
by a simple rule; here the question is what a careful reader would take for *the* answer of a text
that keeps to no form.  A model may then be asked to point at it (``run.adapter``), but only what
these rules find can be taken, whatever the model says.  There is an answer if

- the final part of the text, reasoning aside, is short plain prose that was not cut, in which
  nothing negates, hedges, supposes, corrects, compares, quotes or talks about the task, and which
  copies no run of words and no sentence of the task;
- its last sentence says so: "The answer is 12", "Result: 12 cm"; or "So she has 12 cups" and
  "Therefore 5 + 7 = 12", where nothing but calculations came before; or the text is one such
  sentence, one calculation or one value;
- the value is that sentence's only number besides a calculation's, whole, with nothing behind it
  but its unit and words of the task;
- no other sentence that speaks of an answer or result names another value, nor does the extractor.
"""

from __future__ import annotations

import dataclasses
import re

from cosr_jax.verifiers.extraction import extract_answer, final_text
from cosr_jax.verifiers.units import canonical_unit


@dataclasses.dataclass(frozen=True)
class Statement:
    """A stated answer.  Half-open ranges of characters of ``text``.

    ``value`` is the number; ``answer`` begins there too and ends with its unit, ``sentence`` with
    the sentence, so that a quotation of the answer ends between ``value`` and ``sentence``.
    """

    text: str  # the final part of the completion
    value: tuple[int, int]
    answer: tuple[int, int]
    sentence: tuple[int, int]

    @property
    def written(self) -> str:
        """The answer as the student wrote it, unit included."""
        return self.text[slice(*self.answer)]

    def is_pointed_at(self, quote: str, occurrence: int) -> bool:
        """Whether a quotation, the ``occurrence``-th from 1 of its kind, is of the answer."""
        if not quote or occurrence < 1:
            return False
        place = -1
        for _ in range(occurrence):
            place = self.text.find(quote, place + 1)
            if place < 0:
                return False
        return place == self.value[0] and self.value[1] <= place + len(quote) <= self.sentence[1]


#: Longer texts and sentences are no plain answers, in characters.
_LONGEST, _LONGEST_SENTENCE = 4_000, 300
#: So many words in a row that stand in the task as well are a quotation.
_QUOTED_WORDS = 6

# Words that leave a doubt whether, or of what, a value is the answer; a few are of other languages.
_DOUBTFUL = """
    not no nor none neither never without cannot cant can't isn't aren't wasn't doesn't don't
    didn't won't wouldn't couldn't shouldn't hasn't haven't isnt doesnt dont wont or either whether
    maybe perhaps possibly probably likely presumably apparently might may could would should if
    unless suppose supposing assume assuming imagine pretend guess guessing think believe feel seem
    seems hope unsure uncertain sure certain wrong incorrect incorrectly false untrue mistake
    mistaken mistakenly error invalid impossible hypothetical hypothetically example instance
    instead rather except but however although though yet actually wait hmm oops sorry correction
    corrected redo retry again check checking verify alternatively alternative another other others
    different about approximately approx roughly around nearly almost between least most more less
    fewer greater smaller larger than over under up down beyond range estimate estimated rounded
    round question questions problem task exercise puzzle asked ask asks given say says said saying
    claim claims claimed told tell tells quote quoted prompt statement stated expected gold
    reference key hint teacher someone somebody anyone student students friend people they opposite
    ignore forget joke kidding unknown undefined undetermined know depends until unlike far
    previous previously old earlier before once was were let take set try trying plug substitute
    where when which because since as like also first second versus vs half twice double thrice
    triple dozen dozens hundred hundreds thousand thousands million millions billion billions
    squared cubed factorial plus minus times divided remainder mod modulo negative positive point
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty
    seventy eighty ninety eleven twelve ten nine eight seven six five four three two one zero nicht
    kein keine falsch oder pas faux ou nie ni jamais incorrecto sino aber mais pero
"""
_DOUBT = frozenset(_DOUBTFUL.split())
#: Words that may stand behind a value, besides its unit and words of the task.
_TAIL = frozenset(
    ("left", "remaining", "remain", "total", "in", "all", "altogether", "now", "each", "of", "them")
)

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_VALUE = (
    rf"(?P<value>[-\u2212]?[$\u20ac\u00a3]?{_DIGITS}(?:/[0-9]+)? ?(?:%|\\%)?"
    r"|[-\u2212]?\\[dt]?frac\{[0-9]+\}\{[0-9]+\})"
)
_OPEN, _CLOSE = r"(?:\$|\\\()?[*_]{0,2}", r"[*_]{0,2}(?:(?<![$])\$|\\\))?[*_]{0,2}"
_TAIL_WORDS = r"(?P<tail>(?: [A-Za-z]+(?:/[A-Za-z]+)?(?:\^[23])?){0,5})[*_]{0,2}"
_END = rf"{_OPEN}{_VALUE}{_CLOSE}{_TAIL_WORDS}"
_WORDS = r"(?:[A-Za-z]+(?:'s)?,? )"
_SO = r"(?:(?:so|thus|therefore|hence|finally|in conclusion|in total|altogether|in all),? )"
_VERB = (
    r"(?:is|are|equals|has|have|gets?|makes?|gives?|leaves?|remains?|costs?|needs?|pays?|earns?"
    r"|takes?|spends?|contains?|holds?|sells?|buys?|weighs?|walks?|runs?|reads?) "
)
_CLAUSE = rf"{_WORDS}{{0,10}}{_VERB}(?:now |only |a total of |in total )?"
# Possessive, as the digits of a number could be read in pieces as well.
_TERMS = rf"(?:(?>{_DIGITS})%?|[ ()+*/^$\u2212\u00d7\u00b7\u00f7-])++"
_OPERATES = r"(?=[^=]*[0-9)] ?[+*/^\u2212\u00d7\u00b7\u00f7-][^=]*[0-9)] ?=)"  # "9 = 12" does not
_CALCULATION = rf"(?:{_WORDS}{{0,10}}{_VERB})?(?:{_OPERATES}{_TERMS}|[A-Za-z] ?)=\s*"


def _sentence(*beginnings: str) -> tuple[re.Pattern[str], ...]:
    """Patterns of sentences that begin like one of these and end with a value."""
    return tuple(re.compile(rf"{begin}{_END}", re.IGNORECASE) for begin in beginnings)


_STRONG = _sentence(
    rf"{_SO}?(?:(?:the|my|our) )?(?:final |correct |right |exact )?(?:answer|result|solution)"
    r"(?: to (?:the|this) [a-z]+ | )?(?:is equal to|comes to|equals|is|=|:)[:=]?[*_]*\s+"
)
_CONCLUSION = _sentence(_SO + _CLAUSE, _SO + _CALCULATION)
_ALONE = _sentence(_CLAUSE, _CALCULATION, "")

_SENTENCE = re.compile(r"(?:[^.;\n]|\.(?=\S))+")
_NUMBER = re.compile(rf"{_DIGITS}")
_TOKEN = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*|[0-9]+(?:[.,][0-9]+)*")
_PLAIN = re.compile(r"[\t\n\x20-\x7e\u2212\u00d7\u00b7\u00f7\u20ac\u00a3\u2019]*")
_FORMS = re.compile(r"```|~~~|^\s*>|\\boxed|\\fbox|<|####|\"|''|`|\.\.|[?!~]|^\s*[|]", re.MULTILINE)
_SPEAKS_OF_AN_ANSWER = re.compile(r"(?i)\b(?:answers?|results?|solutions?|conclusion)\b")
_ONLY_A_CALCULATION = re.compile(rf"[A-Za-z ]{{0,60}}(?:{_TERMS}=)+{_TERMS}")


def stated_answer(completion: str, prompt: str, finish_reason: str = "stop") -> Statement | None:
    """The answer that ``completion`` states; None if there is any doubt.

    Args:
      completion: the text as the student emitted it.
      prompt: the task's, of which nothing may be quoted.
      finish_reason: "length" when the token limit cut the completion.
    """
    text = final_text(completion)
    if finish_reason != "stop" or len(text) > _LONGEST or not _PLAIN.fullmatch(text):
        return None
    tokens = [token.lower().replace("\u2019", "'") for token in _TOKEN.findall(text)]
    if _FORMS.search(text) or _DOUBT & set(tokens) or _quotes(tokens, text, prompt):
        return None
    sentences = [m for m in _SENTENCE.finditer(text) if m[0].strip(" \t*_-")]
    if not sentences:
        return None
    *before, last = sentences
    start = last.start() + len(last[0]) - len(last[0].lstrip(" \t*_"))
    end = last.start() + len(last[0].rstrip(" \t*_"))
    given = set(_NUMBER.findall(prompt))
    if end - start > _LONGEST_SENTENCE:
        return None
    match = _first(_STRONG, text, start, end)
    if match is None and _SPEAKS_OF_AN_ANSWER.search(last[0]):
        return None  # in words of its own: of somebody else's, perhaps, or of a part
    if match is None:
        if all(_adds_nothing(sentence[0], given) for sentence in before):
            match = _first(_CONCLUSION if before else _CONCLUSION + _ALONE, text, start, end)
        if match is not None and not _follows(before, match):
            return None
        # Without a word for it, a number of the task is more likely repeated than found.
        if match is None or (match["value"] in given and "=" not in match[0]):
            return None
    answer = _with_unit(match, prompt)
    if answer is None or not _agrees(text, sentences, match["value"]):
        return None
    return Statement(text, match.span("value"), answer, (start, end))


def _first(
    patterns: tuple[re.Pattern[str], ...], text: str, start: int, end: int
) -> re.Match[str] | None:
    """The first pattern's match of the whole range."""
    return next(filter(None, (p.fullmatch(text, start, end) for p in patterns)), None)


def _quotes(tokens: list[str], text: str, prompt: str) -> bool:
    """Whether the text has a run of words, or a sentence, in common with the task."""
    theirs = [token.lower() for token in _TOKEN.findall(prompt)]
    known = f" {' '.join(theirs)} "
    runs = (tokens[i : i + _QUOTED_WORDS] for i in range(len(tokens) - _QUOTED_WORDS + 1))
    if any(f" {' '.join(run)} " in known for run in runs):
        return True
    for sentence in _SENTENCE.findall(text):
        words = [token.lower() for token in _TOKEN.findall(sentence)]
        if len(words) > 2 and f" {' '.join(words)} " in known:
            return True
    return False


def _adds_nothing(sentence: str, given: set[str]) -> bool:
    """Whether a sentence before a conclusion states no value of its own.

    It calculates, or has no number, or repeats several of the task's.
    """
    if len(sentence) > _LONGEST_SENTENCE:
        return False
    if _ONLY_A_CALCULATION.fullmatch(sentence.strip()):
        return True
    numbers = set(_NUMBER.findall(sentence))
    return numbers <= given and len(numbers) != 1


def _follows(before: list[re.Match[str]], match: re.Match[str]) -> bool:
    """Whether a conclusion is what the last calculation before comes to, or goes on from it."""
    results = [sentence[0].rpartition("=")[2] for sentence in before if "=" in sentence[0]]
    if not results:
        return True
    wanted = _NUMBER.findall(match[0]) if "=" in match[0] else _NUMBER.findall(match["value"])
    return bool(wanted) and _NUMBER.findall(results[-1])[-1:] in [[number] for number in wanted]


def _with_unit(match: re.Match[str], prompt: str) -> tuple[int, int] | None:
    """The range of the value with its unit; None if other words follow that could change it."""
    start, end = match.span("value")
    tail = match["tail"].split()
    known = {token.lower() for token in _TOKEN.findall(prompt)} | _TAIL
    taken = 0
    for count in range(1, len(tail) + 1):
        words = tail[:count]
        if tail[count - 1].lower() not in _TAIL and canonical_unit(" ".join(words)) is not None:
            taken = count
    if any(word.lower() not in known for word in tail[taken:]):
        return None
    if not taken:
        return start, end
    between = match.start("tail") - end
    unit = len(" " + " ".join(tail[:taken]))
    # Marks of Markdown or mathematics between a value and its unit make it a case of doubt.
    return None if between else (start, end + unit)


def _agrees(text: str, sentences: list[re.Match[str]], value: str) -> bool:
    """Whether all that is said of an answer, and the extractor, name this value and no other."""
    number = _NUMBER.findall(value)
    for sentence in sentences[:-1]:
        named = _NUMBER.findall(sentence[0])
        if _SPEAKS_OF_AN_ANSWER.search(sentence[0]) and named and named[-1:] != number[-1:]:
            return False
    found = extract_answer(text)
    if found.method in ("boxed", "answer_tag", "hashes"):
        return False
    return not found.method or _NUMBER.findall(found.answer)[-1:] == number[-1:]
