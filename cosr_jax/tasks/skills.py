"""The suite's maths skills: from a level and a random stream to a question with its worked answer.

Levels of one skill never share a question.  Worked answers are short, since the first students
can learn to write a few dozen tokens and no more: up to level 3 they take at most 24 tokens of a
tokenizer that splits numbers into digits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from cosr_jax.tasks.splits import Dice

#: Ends every prompt; what counts as an answer must not depend on the skill.
INSTRUCTION = "Put the final answer in \\boxed{}."


class Question(NamedTuple):
    """A question before it becomes a task."""

    content: str  # the same for all wordings and orders that ask the same
    ask: str  # as put to the student, without the instruction about the answer's form
    answer: str
    steps: str = ""  # what a worked answer writes before the boxed answer
    unit: str = ""  # may be left out of an answer, and is in worked ones, but must not be wrong


Skill = Callable[[int, Dice], Question]

_EVALUATE = ("What is {}?", "Calculate {}.", "Work out {}.", "Find the value of {}.")


def _digits(dice: Dice, count: int) -> int:
    """A number with exactly ``count`` digits; 0 has one."""
    return dice.between(10 ** (count - 1) if count > 1 else 0, 10**count - 1)


def addition(level: int, dice: Dice) -> Question:
    """Two numbers of one, two and three digits; three of two digits; three of three digits."""
    digits, terms = ((1, 2), (2, 2), (3, 2), (2, 3), (3, 3))[level - 1]
    numbers = [_digits(dice, digits) for _ in range(terms)]
    total = " + ".join(map(str, numbers))
    steps = f"{total} =" if terms == 2 else f"{numbers[0] + numbers[1]} + {numbers[2]} ="
    content = "+".join(map(str, sorted(numbers, reverse=True)))
    return Question(content, dice.choice(_EVALUATE).format(total), str(sum(numbers)), steps)


def subtraction(level: int, dice: Dice) -> Question:
    """One, two and three digits without sign; three digits below zero; a chain of three."""
    digits = (1, 2, 3, 3, 3)[level - 1]
    small, large = sorted((_digits(dice, digits), _digits(dice, digits)))
    if level == 5:
        third = _digits(dice, digits)
        difference = f"{large} - {small} - {third}"
        steps = f"{large - small} - {third} ="
        value = large - small - third
        content = "-".join(map(str, (large, *sorted((small, third), reverse=True))))
    else:
        # Level 4 keeps clear of level 3 by being negative: equal numbers are moved apart.
        first, second = (small, large + (small == large)) if level == 4 else (large, small)
        difference, value = f"{first} - {second}", first - second
        steps = f"{difference} ="
        content = f"{first}-{second}"
    return Question(content, dice.choice(_EVALUATE).format(difference), str(value), steps)


def multiplication(level: int, dice: Dice) -> Question:
    """Digits of the factors: 1 x 1, 2 x 1, 3 x 1, 2 x 2, 3 x 2; from level 2 by place values."""
    digits = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2))[level - 1]
    large, small = (_digits(dice, count) for count in digits)
    if level > 1 and small < 10:
        small = dice.between(2, 9)  # times 0 or 1 would not be of this level
    unit = 10 ** (len(str(large)) - 1)
    head = large // unit * unit
    steps = f"{large} * {small} =" if level == 1 else f"{small * head} + {small * (large - head)} ="
    ordered = sorted((large, small), reverse=True)
    product = " * ".join(map(str, dice.shuffled(ordered)))
    content = "*".join(map(str, ordered))
    return Question(content, dice.choice(_EVALUATE).format(product), str(large * small), steps)


def division(level: int, dice: Dice) -> Question:
    """Tables; quotients of two, then three digits; by a two-digit number; of two fractions."""
    if level == 5:
        (a, b), (c, d) = (dice.shuffled(range(2, 10))[:2] for _ in range(2))
        quotient = f"({a}/{b}) / ({c}/{d})"
        value = Fraction(a * d, b * c)
        content, steps = quotient.replace(" ", ""), f"({a} * {d}) / ({b} * {c}) ="
    else:
        low, high = ((1, 9), (10, 99), (100, 999), (11, 99))[level - 1]
        value = Fraction(dice.between(low, high))
        divisor = dice.between(11, 99) if level == 4 else dice.between(2, 9)
        dividend = divisor * value
        quotient = f"{dividend} / {divisor}"
        content, steps = f"{dividend}/{divisor}", f"{quotient} ="
    return Question(content, dice.choice(_EVALUATE).format(quotient), str(value), steps)


def _term(number: int) -> str:
    """A number as the later term of a sum, with its sign set apart."""
    return f"{'-' if number < 0 else '+'} {abs(number)}"


def equations(level: int, dice: Dice) -> Question:
    """x + a = b; x +- a = b; ax + b = c; the same with negatives; ax + b = cx + d."""
    if level <= 2:
        x = _digits(dice, level)
        added = max(1, _digits(dice, level)) * (1 if level == 1 else dice.choice((1, -1)))
        equation = f"x {_term(added)} = {x + added}"
        steps = f"x = {x + added} {_term(-added)} ="
    elif level <= 4:
        factor = dice.between(2, 9) if level == 3 else dice.between(11, 25)
        x = dice.between(1, 9) if level == 3 else dice.between(-20, 20)
        added = dice.between(1, 9) if level == 3 else dice.choice((1, -1)) * dice.between(10, 99)
        right = factor * x + added
        equation = f"{factor}x {_term(added)} = {right}"
        steps = f"{factor}x = {factor * x}, x ="
    else:
        right_factor, more, x = dice.between(2, 9), dice.between(2, 9), dice.between(-12, 12)
        added = dice.choice((1, -1)) * dice.between(1, 50)
        constant = more * x + added
        factor = right_factor + more
        side = f"{right_factor}x" + (f" {_term(constant)}" if constant else "")
        equation = f"{factor}x {_term(added)} = {side}"
        steps = f"{more}x = {more * x}, x ="
    template = dice.choice(
        ("Solve for x: {}.", "What is x if {}?", "Find x such that {}.", "Solve {} for x.")
    )
    return Question(equation.replace(" ", ""), template.format(equation), str(x), steps)


def sequences(level: int, dice: Dice) -> Question:
    """Constant steps up; down or wide; constant ratio; growing steps; sums of the last two."""
    if level <= 2:
        start = dice.between(0, 9) if level == 1 else dice.between(20, 99)
        step = dice.between(1, 9)
        if level == 2:
            step = dice.choice((step + 2, -step))
        terms = [start + step * n for n in range(5)]
        steps = f"{terms[3]} {_term(step)} ="
    elif level == 3:
        start, ratio = dice.between(1, 30), dice.between(2, 5)
        terms = [start * ratio**n for n in range(5)]
        steps = f"{terms[3]} * {ratio} ="
    elif level == 4:
        start, step, growth = dice.between(0, 20), dice.between(1, 9), dice.between(1, 6)
        terms = [start + step * n + growth * n * (n - 1) // 2 for n in range(6)]
        steps = f"{terms[4]} {_term(step + 4 * growth)} ="
    else:
        terms = [dice.between(1, 20), dice.between(1, 20)]
        while len(terms) < 7:
            terms.append(terms[-2] + terms[-1])
        steps = f"{terms[4]} + {terms[5]} ="
    shown = ", ".join(map(str, terms[:-1]))
    template = dice.choice(
        (
            "What number comes next: {}?",
            "Find the next term of the sequence {}.",
            "Continue the sequence {} by one number.",
        )
    )
    return Question(shown.replace(" ", ""), template.format(shown), str(terms[-1]), steps)


def sorting(level: int, dice: Dice) -> Question:
    """Three digits; four and five two-digit numbers; six with negatives; eight of three digits."""
    count, low, high = ((3, 0, 9), (4, 10, 99), (5, 10, 99), (6, -99, 99), (8, 100, 999))[level - 1]
    numbers: set[int] = set()
    while len(numbers) < count:
        numbers.add(dice.between(low, high))
    ordered = sorted(numbers)
    mixed = dice.shuffled(ordered)
    while mixed == ordered:  # copying the question must never be an answer
        mixed = dice.shuffled(ordered)
    template = dice.choice(
        (
            "Sort these numbers from smallest to largest: {}.",
            "Write {} in increasing order.",
            "Put the numbers {} in ascending order.",
        )
    )
    answer = ", ".join(map(str, ordered))
    return Question(answer.replace(" ", ""), template.format(", ".join(map(str, mixed))), answer)


def counting(level: int, dice: Dice) -> Question:
    """How often a letter stands among 4, 6, 9, 13 and 18 letters."""
    length = (4, 6, 9, 13, 18)[level - 1]
    letter, *others = dice.shuffled("abcdefghkmnprstuwxyz")[:4]
    count = dice.between(1, length // 2)
    rest = [dice.choice(others) for _ in range(length - count)]
    letters = " ".join(dice.shuffled([letter] * count + rest))
    template = dice.choice(
        (
            "How many times does the letter {0} occur in: {1}?",
            "Count the letter {0} in: {1}.",
            "In the list {1}, how often is the letter {0}?",
        )
    )
    content = f"{letter} in {letters.replace(' ', '')}"
    steps = " ".join([letter] * count) + " ="
    return Question(content, template.format(letter, letters), str(count), steps)


#: (larger unit, smaller unit, how many of the smaller make one of the larger)
_UNITS = (
    ("minutes", "seconds", 60),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("centimetres", "millimetres", 10),
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
)

#: (unit, the next smaller one, the one below that, factor between the first two, the last two)
_UNIT_CHAINS = (
    ("hours", "minutes", "seconds", 60, 60),
    ("days", "hours", "minutes", 24, 60),
    ("weeks", "days", "hours", 7, 24),
    ("metres", "centimetres", "millimetres", 100, 10),
    ("kilometres", "metres", "centimetres", 1000, 100),
)


def units(level: int, dice: Dice) -> Question:
    """To the smaller unit, one and two digits; to the larger; from two units; from three."""
    if level == 5:
        top, middle, bottom, upper, lower = dice.choice(_UNIT_CHAINS)
        a, b, c = dice.between(2, 9), dice.between(2, upper - 1), dice.between(2, lower - 1)
        amount, target = f"{a} {top} {b} {middle} {c} {bottom}", bottom
        parts = (a * upper * lower, b * lower, c)
        value, steps = sum(parts), " + ".join(map(str, parts)) + " ="
    else:
        large, small, factor = dice.choice(_UNITS)
        number = dice.between(2, 9) if level == 1 else dice.between(10, 99)
        if level <= 2:
            amount, target, value = f"{number} {large}", small, number * factor
            steps = f"{number} * {factor} ="
        elif level == 3:
            amount, target, value = f"{number * factor} {small}", large, number
            steps = f"{number * factor} / {factor} ="
        else:
            rest = dice.between(2, factor - 1)
            amount, target = f"{number} {large} {rest} {small}", small
            value = number * factor + rest
            steps = f"{number * factor} + {rest} ="
    template = dice.choice(
        ("How many {1} are {0}?", "Convert {0} to {1}.", "Write {0} as a number of {1}.")
    )
    ask = template.format(amount, target)
    return Question(f"{amount} in {target}", ask, str(value), steps, unit=target)


MATH_SKILLS: dict[str, Skill] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "division": division,
    "equations": equations,
    "sequences": sequences,
    "sorting": sorting,
    "counting": counting,
    "units": units,
}
