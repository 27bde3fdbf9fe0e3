"""The suite's skills of writing small Python functions, as exercises with references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cosr_jax.tasks.code_problems import Exercise
from cosr_jax.tasks.splits import Dice

_NUMBER = ("x", "n", "number", "value")
_LIST = ("xs", "nums", "numbers", "values", "items")
_TEXT = ("s", "text", "word", "string")
_DICT = ("d", "data", "table", "mapping")
_WORDS = (
    *("apple", "bird", "blue", "book", "cat", "cold", "day", "dog", "end", "fish", "fox", "gold"),
    *("green", "hat", "high", "home", "ice", "key", "lake", "lamp", "leaf", "light", "low", "map"),
    *("milk", "moon", "north", "ok", "open", "pen", "rain", "red", "rock", "salt", "sea", "ship"),
    *("snow", "star", "stop", "sun", "tea", "tree", "up", "warm", "west", "wind", "wood", "yes"),
)
#: Divisors that only multiples of their product share.
_DIVISORS = tuple((a, b) for a in range(2, 12) for b in range(a + 1, 20) if math.gcd(a, b) == 1)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = (("plus", "+"), ("minus", "-"))
_STEPS = (*_SIGNS, ("times", "*"))
_ORDERS = (("greater than", ">"), ("less than", "<"), ("at least", ">="), ("at most", "<="))

Inputs = list[tuple[Any, ...]]


def _around(*numbers: int) -> Inputs:
    """Single arguments: each number and its neighbours, zero, and one far below."""
    near = {n + d for n in numbers for d in (-1, 0, 1)}
    return [(n,) for n in sorted(near | {0, -40}, key=lambda n: (n <= 1, n))]


def _lists(dice: Dice, *numbers: int, may_be_empty: bool = True) -> Inputs:
    """Single list arguments: around ``numbers``, multiples of them, repeats, one item, no item."""
    near = [n + d for n in numbers for d in (-1, 0, 1)]
    drawn = [
        dice.shuffled([*near, *(dice.between(-30, 120) for _ in range(3))]),
        dice.shuffled([*(k * n for n in numbers for k in (1, 2, 3)), 0, -7, 1]),
        [3, numbers[0], numbers[0]],
        [dice.between(-9, 9)],
    ]
    return [(xs,) for xs in drawn] + ([([],)] if may_be_empty else [])


def _two(dice: Dice, low: int, high: int) -> tuple[int, int]:
    """Two different numbers, the smaller first."""
    first = dice.between(low, high - 1)
    return first, dice.between(first + 1, high)


def _condition(dice: Dice, x: str = "x", *, with_multiples: bool = True) -> tuple[str, str, int]:
    """What to ask of a number x: in words after "is", as an expression, and its constant."""
    c = dice.between(2, 80)
    words, sign = dice.choice((*_ORDERS, ("divisible by", "%")) if with_multiples else _ORDERS)
    return f"{words} {c}", f"{x} % {c} == 0" if sign == "%" else f"{x} {sign} {c}", c


def formulas(level: int, dice: Dice) -> Exercise:
    """The argument and a constant; a line; two variables; a parabola; quotient and remainder."""
    a, b, c = dice.between(2, 15), dice.between(2, 15), dice.between(2, 99)
    word, sign = dice.choice(_SIGNS)
    if level == 1:
        word, sign = dice.choice((*_STEPS, ("divided by", "//")))
        does = f"@ {word} {c}" + (", rounded down to an integer" if sign == "//" else "")
        result = f"@ {sign} {c}"
    elif level == 2:
        does, result = f"{a} times @ {word} {c}", f"{a} * @ {sign} {c}"
    elif level == 3:
        return Exercise(
            f"returns {a} times x {word} {b} times y",
            ("x",),
            f"return {a} * x {sign} {b} * y",
            [(3, -2), (0, 0), (1, 0), (0, 1), (10, 7)],
            others=", y",
        )
    elif level == 4:
        does = f"{a} times the square of @, plus {b} times @, {word} {c}"
        result = f"{a} * @ ** 2 + {b} * @ {sign} {c}"
    else:
        does = (
            f"{a} times the quotient of @ divided by {c} (rounded down), plus the remainder of @ "
            f"divided by {b}"
        )
        result = f"{a} * (@ // {c}) + @ % {b}"
    return Exercise(f"returns {does}", _NUMBER, f"return {result}", _around(c, a * b))


def conditions(level: int, dice: Dice) -> Exercise:
    """A comparison; a range; a choice of two numbers; of three words; by two divisors."""
    a, b = _two(dice, 2, 60)
    first, second, third = dice.shuffled(_WORDS)[:3]
    said, test, c = _condition(dice, "@")
    inputs = _around(a, b)
    if level == 1:
        does, body = f"True if @ is {said}, and False otherwise", f"return {test}"
        inputs = _around(c, 2 * c)
    elif level == 2:
        place, body = dice.choice(
            (
                (f"between {a} and {b}, both included", f"return {a} <= @ <= {b}"),
                (f"less than {a} or greater than {b}", f"return @ < {a} or @ > {b}"),
            )
        )
        does = f"True if @ is {place}, and False otherwise"
    elif level == 3:
        does, body = f"{a} if @ is {said}, and {b} otherwise", f"return {a} if {test} else {b}"
        inputs = _around(c, 2 * c)
    elif level == 4:
        does = (
            f"'{first}' if @ is less than {a}, '{second}' if @ is greater than {b}, and '{third}' "
            "otherwise"
        )
        body = (
            f"if @ < {a}:\n    return '{first}'\nif @ > {b}:\n    return '{second}'\n"
            f"return '{third}'"
        )
    else:
        a, b = dice.choice(_DIVISORS)
        does = (
            f"'{first}' if @ is divisible by {a} only, '{second}' if by {b} only, '{third}' if by "
            "both, and @ itself otherwise"
        )
        body = (
            f"if @ % {a} == 0 and @ % {b} == 0:\n    return '{third}'\n"
            f"if @ % {a} == 0:\n    return '{first}'\n"
            f"if @ % {b} == 0:\n    return '{second}'\nreturn @"
        )
        inputs = [(n,) for n in (a, b, a * b, a * b + 1, 2 * a, 2 * b, 0, 1)]
    return Exercise(f"returns {does}", _NUMBER, body, inputs)


def aggregates(level: int, dice: Dice) -> Exercise:
    """Sum, extreme or length with a constant; a count; sums: under a condition, of multiples, of
    products with positions."""
    said, test, c = _condition(dice)
    a, inputs = dice.between(2, 12), _lists(dice, c)
    if level == 1:
        what, call = dice.choice(
            (
                ("the sum of the list @", "sum"),
                ("the length of the list @", "len"),
                ("the largest number in the list @", "max"),
                ("the smallest number in the list @", "min"),
            )
        )
        word, sign = dice.choice(_STEPS)
        does, result = f"{what} {word} {c}", f"{call}(@) {sign} {c}"
        inputs = _lists(dice, c, may_be_empty=call in ("sum", "len"))
    elif level == 2:
        does, result = f"how many numbers in the list @ are {said}", f"sum(1 for x in @ if {test})"
    elif level == 3:
        does = f"the sum of the numbers in the list @ that are {said}"
        result = f"sum(x for x in @ if {test})"
    elif level == 4:
        does = f"the sum of {a} times each number in the list @ that is {said}"
        result = f"sum({a} * x for x in @ if {test})"
    else:
        does = (
            "the sum of the numbers in the list @, each multiplied by its position, where "
            f"positions begin at {c}, plus {a}"
        )
        result = f"sum(i * x for i, x in enumerate(@, {c})) + {a}"
    return Exercise(f"returns {does}", _LIST, f"return {result}", inputs)


def mappings(level: int, dice: Dice) -> Exercise:
    """Each number with a constant; a line; some replaced; differences; running totals."""
    said, test, limit = _condition(dice)
    a, c = dice.between(2, 12), dice.between(2, 99)
    word, sign = dice.choice(_SIGNS)
    inputs = _lists(dice, c)
    if level == 1:
        word, sign = dice.choice(_STEPS)
        does, body = f"each number in the list @ {word} {c}", f"return [x {sign} {c} for x in @]"
    elif level == 2:
        does = f"{a} times each number in the list @ {word} {c}"
        body = f"return [{a} * x {sign} {c} for x in @]"
    elif level == 3:
        does = f"the numbers of the list @, but {a} in the place of each that is {said}"
        body = f"return [{a} if {test} else x for x in @]"
        inputs = _lists(dice, limit)
    elif level == 4:
        does = (
            "the differences between neighbours in the list @, each later number minus the one "
            f"before it, {word} {c}"
        )
        body = f"return [y - x {sign} {c} for x, y in zip(@, @[1:])]"
    else:
        modulus = dice.between(5, 60)
        does = (
            f"the running totals of the list @, starting from {c}, each as its remainder divided "
            f"by {modulus}"
        )
        body = (
            f"total, totals = {c}, []\nfor x in @:\n    total += x\n"
            f"    totals.append(total % {modulus})\nreturn totals"
        )
    return Exercise(f"returns a list of {does}", _LIST, body, inputs)


def filters(level: int, dice: Dice) -> Exercise:
    """By size; by remainder; by two conditions; with a change; sorted and without repeats."""
    said, test, c = _condition(dice, with_multiples=False)
    a, b = dice.between(2, 9), dice.between(2, 40)
    inputs = _lists(dice, c, a * c)
    if level == 1:
        does, result = f"the numbers in the list @ that are {said}", f"[x for x in @ if {test}]"
    elif level == 2:
        rest = dice.between(0, min(b - 1, 4))
        does = f"the numbers in the list @ whose remainder divided by {b} is {rest}"
        result = f"[x for x in @ if x % {b} == {rest}]"
        inputs = [(xs,) for xs in ([b, b + rest, 2 * b + rest, 3 * b + 1, 0, 1, rest], [-b], [])]
    elif level == 3:
        words, sign = dice.choice(_ORDERS)
        c = a * dice.between(2, 12)  # a multiple, so that the difference of > and >= shows
        does = f"the numbers in the list @ that are {words} {c} and divisible by {a}"
        result = f"[x for x in @ if x {sign} {c} and x % {a} == 0]"
        inputs = [
            ([c - 2 * a, c - 1, c, c + 1, c + a],),
            ([a * c, 1, -a, c - a, 0],),
            ([c],),
            ([],),
        ]
    elif level == 4:
        does = f"{a} times each number in the list @ that is {said}"
        result = f"[{a} * x for x in @ if {test}]"
    else:
        does = (
            f"the different numbers in the list @ that are {said}, from largest to smallest, each "
            f"plus {b}"
        )
        result = f"[x + {b} for x in sorted(set(@), reverse=True) if {test}]"
    return Exercise(f"returns a list of {does}", _LIST, f"return {result}", inputs)


def strings(level: int, dice: Dice) -> Exercise:
    """A word added; a slice; a letter replaced; chosen words joined; letters of a set doubled."""
    count, letters = dice.between(2, 40), dice.shuffled(_ALPHABET)[:3]
    texts = ["the quick brown fox jumps over the lazy dog", _ALPHABET + _ALPHABET[::-1], "Aa", ""]
    if level == 1:
        word = dice.choice(_WORDS)
        does, result = dice.choice(
            (
                (f"@ followed by '{word}'", f"@ + '{word}'"),
                (f"'{word}' followed by @", f"'{word}' + @"),
                (f"@ repeated {count} times", f"@ * {count}"),
            )
        )
    elif level == 2:
        does, result = dice.choice(
            (
                (f"the first {count} characters of @", f"@[:{count}]"),
                (f"the last {count} characters of @", f"@[-{count}:]"),
                (f"@ without its first {count} characters", f"@[{count}:]"),
                (f"@ without its last {count} characters", f"@[:-{count}]"),
            )
        )
    elif level == 3:
        old, new, other = letters
        does, result = f"@ with every '{old}' replaced by '{new}'", f"@.replace('{old}', '{new}')"
        texts.append(f"{old}{new}{old.upper()}{other}{old}")
    elif level == 4:
        length, mark = dice.between(2, 8), dice.choice("-+/*=<>%")
        word, sign = dice.choice((("longer", ">"), ("shorter", "<")))
        how, method = dice.choice(
            (("", ""), (" in upper case", ".upper()"), (" reversed", "[::-1]"))
        )
        does = f"the words of @ that are {word} than {length} characters{how}, joined by '{mark}'"
        result = f"'{mark}'.join(w{method} for w in @.split() if len(w) {sign} {length})"
        texts = ["a bc def ghij klmno pqrstu vwxyzab cdefghij klmnopqrs", *texts, "  two   blanks "]
    else:
        group = "".join(sorted(letters))
        does = f"@ reversed, with every character that is in '{group}' written twice"
        result = f"''.join(c * 2 if c in '{group}' else c for c in reversed(@))"
        texts = [f"{group}-{letters[0]}", *texts]
    return Exercise(f"returns {does}", _TEXT, f"return {result}", [(text,) for text in texts])


def loops(level: int, dice: Dice) -> Exercise:
    """Multiples summed; powers; by two divisors; halving and its like; a recurrence."""
    a, b = dice.choice(_DIVISORS)
    c = dice.between(2, 99)
    counts: Inputs = [(3,), (0,), (1,), (2,), (10,)]
    if level == 1:
        word, sign = dice.choice((("times", "*"), ("plus", "+")))
        does = f"returns the sum of k {word} {c} over all integers k from 1 to @"
        body = f"return sum(k {sign} {c} for k in range(1, @ + 1))"
    elif level == 2:
        word, power = dice.choice((("squares", 2), ("cubes", 3)))
        does = f"returns the sum of the {word} of all integers from {c} to @, both included"
        body = f"return sum(k ** {power} for k in range({c}, @ + 1))"
        counts = [(c + 2,), (c,), (c + 1,), (c - 1,), (0,), (c + 9,)]
    elif level == 3:
        what, term = dice.choice((("the sum of all", "k"), ("how many", "1")))
        word, joint = dice.choice((("or", "or"), ("and", "and")))
        does = f"returns {what} integers from 1 to @ are divisible by {a} {word} by {b}"
        if term == "k":
            does = does.replace("@ are", "@ that are")
        body = f"return sum({term} for k in range(1, @ + 1) if k % {a} == 0 {joint} k % {b} == 0)"
        counts = [(n,) for n in (a * b, 0, a, b - 1, b, a * b - 1, 2 * a * b + 1)]
    elif level == 4:
        divisor, limit = dice.between(2, 12), dice.between(1, 40)
        does = (
            f"counts how many times @ has to be divided by {divisor}, rounding down each time, "
            f"until it is at most {limit}, and returns the count"
        )
        body = f"count = 0\nwhile @ > {limit}:\n    @ //= {divisor}\n    count += 1\nreturn count"
        counts = [
            (limit * divisor**3 + 1,),
            (0,),
            (limit,),
            (limit + 1,),
            (limit * divisor + divisor,),
        ]
    else:
        p, q = dice.between(1, 5), dice.between(1, 5)
        does = (
            f"returns term @, counted from 0, of the sequence that starts with {a}, {b}, where "
            f"each later term is {p} times the one before plus {q} times the one before that"
        )
        body = (
            f"this, following = {a}, {b}\nfor _ in range(@):\n"
            f"    this, following = following, {p} * following + {q} * this\nreturn this"
        )
        counts = [(4,), (0,), (1,), (2,), (9,)]
    return Exercise(does, ("n",), body, counts)


def dictionaries(level: int, dice: Dice) -> Exercise:
    """A default; keys by value; built from a list; counted; grouped."""
    said, test, c = _condition(dice, "v", with_multiples=False)
    word = dice.choice(_WORDS)
    names: Sequence[str] = _DICT
    numbers = _lists(dice, c)
    key, expression = dice.choice(
        (
            (f"remainder divided by {c}", f"x % {c}"),
            (f"quotient divided by {c}, rounded down", f"x // {c}"),
        )
    )
    if level == 1:
        does = f"returns the value of the key '{word}' in the dictionary @, or {c} without that key"
        body = f"return @.get('{word}', {c})"
        inputs: Inputs = [({word: -1},), ({},), ({"x": 1, word: 0},), ({word.upper(): 1},)]
    elif level == 2:
        does = f"returns a sorted list of the keys of the dictionary @ whose values are {said}"
        body = f"return sorted(k for k, v in @.items() if {test})"
        inputs = [({"b": c, "a": c + 1, "d": c - 1, "c": c + 1, "e": c - 1},), ({},), ({"a": c},)]
    elif level == 3:
        step, sign = dice.choice(_STEPS)
        c = dice.between(2, 99)
        does = f"returns a dictionary that maps each number in the list @ to that number {step} {c}"
        body, names, inputs = f"return {{x: x {sign} {c} for x in @}}", _LIST, numbers
    elif level == 4:
        does = (
            f"returns a dictionary that maps each {key}, of the numbers in the list @ to how many "
            "of them have it"
        )
        body = (
            f"counts = {{}}\nfor x in @:\n    counts[{expression}] = "
            f"counts.get({expression}, 0) + 1\nreturn counts"
        )
        names, inputs = _LIST, numbers
    else:
        does = (
            f"returns a dictionary that maps each {key}, of the numbers in the list @ to the list "
            "of those that have it, in their order"
        )
        body = (
            f"groups = {{}}\nfor x in @:\n    groups.setdefault({expression}, []).append(x)\n"
            "return groups"
        )
        names, inputs = _LIST, numbers
    return Exercise(does, names, body, inputs)


def changes(level: int, dice: Dice) -> Exercise:
    """Lists changed in place: one more item; each number; removal; replacement; an order."""
    (a, b), c = _two(dice, 2, 99), dice.between(2, 80)
    inputs = _lists(dice, c)
    if level == 1:
        does, body = dice.choice(
            (
                (f"adds {a} at the end of the list @", f"@.append({a})"),
                (f"puts {a} at the beginning of the list @", f"@.insert(0, {a})"),
            )
        )
    elif level == 2:
        word, sign = dice.choice(_STEPS)
        does = f"replaces each number in the list @ by that number {word} {a}"
        body = f"@[:] = [x {sign} {a} for x in @]"
    elif level == 3:
        said, kept = dice.choice(
            (
                ("greater than", "x <= {c}"),
                ("less than", "x >= {c}"),
                ("equal to", "x != {c}"),
                ("divisible by", "x % {c} != 0"),
            )
        )
        does = f"removes all numbers that are {said} {c} from the list @"
        body = f"@[:] = [x for x in @ if {kept.format(c=c)}]"
    elif level == 4:
        does = f"replaces {a} by {b} and {b} by {a} wherever they stand in the list @"
        body = f"@[:] = [{b} if x == {a} else {a} if x == {b} else x for x in @]"
        inputs = [([a, 1, b, a],), ([b],), ([],), ([a + 1, b - 1],), ([b, b, a, -a],)]
    else:
        said, key = dice.choice(
            (
                (f"the distance of its numbers from {c}, the nearest first", f"abs(x - {c})"),
                (f"the remainder of its numbers divided by {c}, the smallest first", f"x % {c}"),
            )
        )
        does, body = f"sorts the list @ by {said}", f"@.sort(key=lambda x: {key})"
    does += ", in place, and returns nothing"
    return Exercise(does, _LIST, body, inputs, changes=True)
