"""The suite's web skills: small pages with declared elements, actions and states.

What is asked is written out from the requirements that are checked, so that the question holds all
that the checker wants, and nothing else.  Steps use other numbers and names than the question shows
where it shows an example, so that a page has to compute.  Levels of one skill never share a
question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cosr_jax.tasks.problems import Course, Problem
from cosr_jax.tasks.splits import Dice
from cosr_jax.types import WebChecks

_CONTRAST = 4.5
_WIDTHS = (360, 1280)

Element = Mapping[str, Any]


def _page(title: str, body: str, script: str = "") -> str:
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{title}</title></head>',
        "<body>",
        f"<h1>{title}</h1>",
        body,
        *([f"<script>\n{script}\n</script>"] if script else []),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts)


def _problem(
    content: str,
    wishes: Sequence[str],
    page: str,
    expect: Sequence[Element],
    steps: Sequence[Element] = (),
) -> Problem:
    requirements = {
        "expect": list(expect),
        "steps": list(steps),
        "contrast": _CONTRAST,
        "widths": list(_WIDTHS),
    }
    ask = "Make a web page. " + " ".join(wishes)
    checks = WebChecks(json.dumps(requirements))
    return Problem(content, ask, f"```html\n{page}\n```", checks=checks)


def _click(name: str, *states: Element, role: str = "button") -> Element:
    return {"do": "click", "target": {"role": role, "name": name}, "expect": list(states)}


def _type(name: str, text: str, *states: Element) -> Element:
    target = {"role": "textbox", "name": name}
    return {"do": "type", "target": target, "text": text, "expect": list(states)}


def _heading(title: str) -> Element:
    return {"role": "heading", "name": title, "text": title}


def _status(text: object) -> Element:
    return {"role": "status", "text": str(text)}


_THINGS = (
    *("Apples", "Boats", "Clouds", "Doors", "Eggs", "Flowers", "Games", "Hats", "Islands"),
    *("Jars", "Kites", "Lamps", "Maps", "Nests", "Orders", "Pages", "Quilts", "Rivers"),
    *("Stones", "Tickets", "Umbrellas", "Visits", "Windows", "Yards"),
)
_VERBS = ("Add", "Count", "Next", "More", "Step", "Go", "Raise", "Grow")
_STATUS = 'an <output> element (role "status")'


def documents(level: int, dice: Dice) -> Problem:
    """A heading and text; a list; a link and a picture's label; a form's fields; a table."""
    title, *others = dice.shuffled(_THINGS)
    number = dice.between(2, 99)
    wishes = [f'It has the heading "{title}".']
    expect: list[Element] = [_heading(title)]
    if level == 1:
        text = f"We have {number} {others[0].lower()}"
        wishes.append(f'A paragraph says "{text}".')
        expect.append({"role": "paragraph", "text": text})
        content, body = f"{title}: {text}", f"<p>{text}</p>"
    elif level == 2:
        items = others[: dice.between(2, 6)]
        wishes.append(f"A list has the items {', '.join(items)}, in this order.")
        expect += [
            {"role": "listitem", "count": len(items)},
            {"role": "list", "text": " ".join(items)},
        ]
        content = f"{title}: {' '.join(items)}"
        body = "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
    elif level == 3:
        link, image = others[:2]
        wishes += [
            f'A link says "{link}" and leads to #{link.lower()}.',
            f'A picture, drawn as inline SVG with role "img", has the label "{image}".',
        ]
        expect += [
            {"role": "link", "name": link, "text": link},
            {"role": "img", "name": image},
        ]
        content = f"{title}: {link} {image}"
        body = (
            f'<p><a href="#{link.lower()}">{link}</a></p>\n'
            f'<svg role="img" aria-label="{image}" width="40" height="40">'
            '<circle cx="20" cy="20" r="18"/></svg>'
        )
    elif level == 4:
        text, box, button = others[:3]
        wishes += [
            f'A text field has the label "{text}" and the value "{number}".',
            f'A ticked checkbox has the label "{box}".',
            f'A button says "{button}".',
        ]
        expect += [
            {"role": "textbox", "name": text, "value": str(number)},
            {"role": "checkbox", "name": box, "checked": True},
            {"role": "button", "name": button},
        ]
        content = f"{title}: {text} {number} {box} {button}"
        body = (
            f'<p><label>{text} <input value="{number}"></label></p>\n'
            f'<p><label><input type="checkbox" checked> {box}</label></p>\n'
            f'<p><button type="button">{button}</button></p>'
        )
    else:
        rows = [(other, dice.between(1, 99)) for other in others[: dice.between(2, 5)]]
        shown = ", ".join(f"{name} {amount}" for name, amount in rows)
        wishes.append(
            f'A table has the column headers "Name" and "Amount" and these rows: {shown}.'
        )
        expect += [
            {"role": "columnheader", "name": "Name"},
            {"role": "columnheader", "name": "Amount"},
            {"role": "cell", "count": 2 * len(rows)},
            {"role": "table", "text": f"Name Amount {shown.replace(',', '')}"},
        ]
        content = f"{title}: {shown}"
        cells = "".join(f"<tr><td>{name}</td><td>{amount}</td></tr>" for name, amount in rows)
        body = f"<table><tr><th>Name</th><th>Amount</th></tr>{cells}</table>"
    return _problem(content, wishes, _page(title, body), expect)


def counters(level: int, dice: Dice) -> Problem:
    """Up by one; by a step; up and down; with a reset; within bounds."""
    title, verb = dice.choice(_THINGS), dice.choice(_VERBS)
    start = dice.between(0, 50)
    step = 1 if level == 1 else dice.between(2, 9)
    wishes = [
        f'It has the heading "{title}", and {_STATUS} that shows {start}.',
        f'A click on the button "{verb}" adds {step} to that number.',
    ]
    buttons, rules = [verb], [("n + " + str(step))]
    expect = [_heading(title), {"role": "button", "name": verb}, _status(start)]
    content = f"{level} {title} {verb} {start} {step}"
    top = None
    if level >= 3:
        buttons.append("Back")
        rules.append(f"n - {step}")
        wishes.append(f'A click on the button "Back" takes {step} from it.')
    if level >= 4:
        buttons.append("Reset")
        rules.append(str(start))
        wishes.append(f'A click on the button "Reset" makes it {start} again.')
    if level == 5:
        top = start + step * dice.between(2, 4) - 1
        rules[0] = f"Math.min(n + {step}, {top})"
        rules[1] = f"Math.max(n - {step}, {start})"
        content += f" to {top}"
        wishes.append(f"It never goes below {start} or above {top}, but stops there.")
    steps, value = [], start
    order = [0, 0, 1, 0, 0, 0, 2, 0] if level >= 4 else [0, 0, 1, 1, 1] if level == 3 else [0, 0, 0]
    for index in order:
        value = (value + step, value - step, start)[index]
        if top is not None:
            value = max(start, min(value, top))
        steps.append(_click(buttons[index], _status(value)))
    body = "\n".join(
        [
            *(f'<button type="button" id="b{i}">{b}</button>' for i, b in enumerate(buttons)),
            f'<output id="shown">{start}</output>',
        ]
    )
    lines = [f"let n = {start};"]
    lines += [
        f'document.getElementById("b{i}").onclick = () => {{\n'
        f'  n = {rule};\n  document.getElementById("shown").textContent = n;\n}};'
        for i, rule in enumerate(rules)
    ]
    return _problem(content, wishes, _page(title, body, "\n".join(lines)), expect, steps)


#: (what happens to the text, as asked for, JavaScript of it, the same in Python)
_CHANGES = (
    ("in capital letters", "text.toUpperCase()", str.upper),
    ("in small letters", "text.toLowerCase()", str.lower),
    ("backwards", '[...text].reverse().join("")', lambda text: text[::-1]),
    ("twice, without a blank between", "text + text", lambda text: text * 2),
)
_WORDS = ("Ada", "bicycle", "Copper", "delta", "Ember", "forest", "Grape", "harbour", "Iris")


def fields(level: int, dice: Dice) -> Problem:
    """A greeting; a changed text; a sum; a greeting by Enter; a sum of which one part is ticked."""
    title, label, other = dice.shuffled(_THINGS)[:3]
    button = dice.choice(_VERBS)
    hello = dice.choice(("Hello", "Welcome", "Good day", "Thank you", "Goodbye"))
    words = dice.shuffled(_WORDS)[:2]
    wishes = [f'It has the heading "{title}", a text field with the label "{label}",']
    expect = [_heading(title), {"role": "textbox", "name": label, "value": ""}, _status("")]
    inputs = [f'<p><label>{label} <input id="first"></label></p>']
    value = 'document.getElementById("first").value'
    begin = f'and {_STATUS} that is empty. After a click on the button "{button}" it shows '
    steps: list[Element] = []
    is_form = level == 4
    if level in (1, 4):
        said, result = f"{hello}, {{}}!", f'"{hello}, " + {value} + "!"'
        wishes.append(begin + f'"{hello}, Bo!" if the field holds "Bo", and so on for any text.')
        content = f"{level} {title} {label} {button} {hello}"
        for word in words:
            steps += [_type(label, word), _click(button, _status(said.format(word)))]
        if is_form:
            wishes.append("The key Enter in the field does the same.")
            steps += [
                _type(label, "Zoe"),
                {"do": "press", "key": "Enter", "expect": [_status(said.format("Zoe"))]},
            ]
    elif level == 2:
        asked, code, change = dice.choice(_CHANGES)
        result = code.replace("text", value)
        wishes.append(f"{begin}the field's text {asked}.")
        content = f"2 {title} {label} {button} {asked}"
        for word in words:
            steps += [_type(label, word), _click(button, _status(change(word)))]
    else:
        extra = dice.between(2, 50)
        result = f"Number({value})"
        wishes[0] += f' another with the label "{other}",'
        expect.append({"role": "textbox", "name": other, "value": ""})
        inputs.append(f'<p><label>{other} <input id="second"></label></p>')
        result += ' + Number(document.getElementById("second").value)'
        wishes.append(f"{begin}the sum of the two whole numbers in the fields.")
        content = f"{level} {title} {label} {other} {button}"
        if level == 5:
            inputs.append('<p><label><input type="checkbox" id="bonus"> Bonus</label></p>')
            result += f' + (document.getElementById("bonus").checked ? {extra} : 0)'
            wishes.append(f'If the checkbox "Bonus" is ticked, the sum is {extra} more.')
            expect.append({"role": "checkbox", "name": "Bonus", "checked": False})
            content += f" {extra}"
        for bonus in (0, extra) if level == 5 else (0, 0):
            a, b = dice.between(10, 99), dice.between(-9, 99)
            if bonus:
                ticked = {"role": "checkbox", "name": "Bonus", "checked": True}
                steps.append(_click("Bonus", ticked, role="checkbox"))
            steps += [_type(label, str(a)), _type(other, str(b))]
            steps.append(_click(button, _status(a + b + bonus)))
    body = "\n".join(
        [
            *(["<form id='form'>"] if is_form else []),
            *inputs,
            f'<p><button type="{"submit" if is_form else "button"}" id="go">{button}</button></p>',
            *(["</form>"] if is_form else []),
            '<output id="shown"></output>',
        ]
    )
    show = f'document.getElementById("shown").textContent = {result};'
    if is_form:
        script = (
            'document.getElementById("form").onsubmit = event => {\n'
            f"  event.preventDefault();\n  {show}\n}};"
        )
    else:
        script = f'document.getElementById("go").onclick = () => {{\n  {show}\n}};'
    return _problem(content, wishes, _page(title, body, script), expect, steps)


def disclosures(level: int, dice: Dice) -> Problem:
    """Text that a button shows; and hides; two texts; tabs; a dialog that closes."""
    title, first, second = dice.shuffled(_THINGS)[:3]
    number = dice.between(2, 99)
    text = f"There are {number} {first.lower()}"
    hidden, shown = {"role": "paragraph", "visible": False}, {"role": "paragraph", "text": text}
    expect: list[Element] = [_heading(title), {"role": "button", "name": first}]
    content = f"{level} {title} {first} {number}"
    toggle = 'document.getElementById("{0}").onclick = () => {{\n  {1}\n}};'
    reveal = 'document.getElementById("text").hidden = {};'
    opening = f'It has the heading "{title}" and a button "{first}".'
    body = f'<button type="button" id="one">{first}</button>\n<p id="text" hidden>{text}</p>'
    steps: list[Element]
    if level <= 2:
        expect.append(hidden)
        wishes = [opening, f'A click on it shows the paragraph "{text}", hidden until then.']
        steps = [_click(first, shown)]
        script = toggle.format("one", reveal.format("false"))
        if level == 2:
            wishes.append("The next click hides it again, and so on.")
            steps += [_click(first, hidden), _click(first, shown)]
            negated = reveal.format('!document.getElementById("text").hidden')
            script = toggle.format("one", negated)
    elif level == 3:
        expect += [{"role": "button", "name": second}, hidden]
        wishes = [
            opening,
            f'A click on it shows the paragraph "{text}", hidden until then; a click on the '
            f'button "{second}" hides it.',
        ]
        content += f" {second}"
        body += f'\n<button type="button" id="two">{second}</button>'
        shows, hides = reveal.format("false"), reveal.format("true")
        script = toggle.format("one", shows) + "\n" + toggle.format("two", hides)
        steps = [_click(first, shown), _click(first, shown), _click(second, hidden)]
        steps.append(_click(first, shown))
    elif level == 4:
        other = f"Here are {number + 1} {second.lower()}"
        wishes = [
            f'It has the heading "{title}", two buttons "{first}" and "{second}", and one '
            f'paragraph. A click on "{first}" makes it say "{text}", a click on "{second}" makes '
            f'it say "{other}". At first it says "{text}".'
        ]
        content += f" {second}"
        expect += [{"role": "button", "name": second}, shown]
        body = (
            f'<button type="button" id="one">{first}</button>\n'
            f'<button type="button" id="two">{second}</button>\n<p id="text">{text}</p>'
        )
        say = 'document.getElementById("text").textContent = "{}";'
        script = toggle.format("one", say.format(text)) + "\n"
        script += toggle.format("two", say.format(other))
        steps = [_click(second, {"role": "paragraph", "text": other}), _click(first, shown)]
    else:
        wishes = [
            opening,
            f'A click on it opens a dialog (role "dialog") with the text "{text}" and the button '
            '"Close", which closes it.',
        ]
        inside = {"role": "dialog", "contains": text}
        closed = {"role": "dialog", "visible": False}
        expect.append(closed)
        body = (
            f'<button type="button" id="one">{first}</button>\n'
            f'<dialog id="text"><p>{text}</p><button type="button" id="two">Close</button></dialog>'
        )
        script = toggle.format("one", 'document.getElementById("text").showModal();') + "\n"
        script += toggle.format("two", 'document.getElementById("text").close();')
        steps = [_click(first, inside), _click("Close", closed), _click(first, inside)]
    return _problem(content, wishes, _page(title, body, script), expect, steps)


WEB = Course(
    "web",
    "All text has a contrast of at least 4.5, and nothing is wider than a screen of 360 pixels. "
    "Answer with one HTML file in a code block, which loads nothing else.",
    {
        "web_documents": documents,
        "web_counters": counters,
        "web_fields": fields,
        "web_disclosures": disclosures,
    },
)
