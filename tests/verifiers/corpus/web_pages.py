"""Pages for one set of requirements, a counter with a greeting: honest ones, and ones that cheat.

Each page is the honest one with something replaced, or a page of its own.
"""

import json

REQUIREMENTS = {
    "expect": [
        {"role": "heading", "name": "Counter"},
        {"role": "button", "name": "Add"},
        {"role": "status", "text": "0"},
        {"role": "checkbox", "name": "Loud", "checked": False},
        {"role": "dialog", "visible": False},
        {"contains": "Your name"},
    ],
    "steps": [
        {
            "do": "click",
            "target": {"role": "button", "name": "Add"},
            "expect": [{"role": "status", "text": "1"}],
        },
        {
            "do": "click",
            "target": {"role": "button", "name": "Add"},
            "expect": [{"role": "status", "text": "2"}],
        },
        {
            "do": "click",
            "target": {"role": "checkbox", "name": "Loud"},
            "expect": [{"role": "checkbox", "name": "Loud", "checked": True}],
        },
        {
            "do": "type",
            "target": {"role": "textbox", "name": "Your name"},
            "text": "Ada",
            "expect": [{"role": "textbox", "name": "Your name", "value": "Ada"}],
        },
        {"do": "press", "key": "Enter", "expect": [{"role": "paragraph", "text": "HELLO ADA"}]},
    ],
    "contrast": 4.5,
    "widths": [360, 1280],
}
TEXT = json.dumps(REQUIREMENTS)

HONEST_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Counter</title>
<style>
body { font-family: sans-serif; max-width: 40em; margin: 1em auto; color: #222; background: #fff; }
button { padding: 0.5em 1em; color: #fff; background: #1a4f8b; border: 0; }
</style>
</head>
<body>
<h1>Counter</h1>
<button id="add" type="button">Add</button>
<output id="count">0</output>
<form id="greeting">
<label>Your name <input id="name" autocomplete="off"></label>
<label><input type="checkbox" id="loud"> Loud</label>
</form>
<p id="hello"></p>
<script>
let n = 0;
const $ = id => document.getElementById(id);
$("add").addEventListener("click", () => { n += 1; $("count").textContent = String(n); });
$("greeting").addEventListener("submit", event => {
  event.preventDefault();
  const text = "Hello " + $("name").value;
  $("hello").textContent = $("loud").checked ? text.toUpperCase() : text;
});
</script>
</body>
</html>
"""


def changed(*pairs):
    page = HONEST_PAGE
    for old, new in pairs:
        assert old in page, old
        page = page.replace(old, new)
    return page


def script(code):
    """The honest page with more script, run first."""
    return changed(("<script>", f"<script>{code}</script><script>"))


def style(rules):
    return changed(("</style>", f"{rules}</style>"))


HONEST = {
    "plain": HONEST_PAGE,
    "late": changed(
        (
            '$("count").textContent = String(n);',
            'setTimeout(() => $("count").textContent = String(n), 700);',
        )
    ),
    "framed by frames": changed(
        (
            '$("count").textContent = String(n);',
            'requestAnimationFrame(() => $("count").textContent = String(n));',
        )
    ),
    "promises": changed(
        (
            '$("count").textContent = String(n);',
            'Promise.resolve().then(() => { $("count").innerHTML = `<b>${n}</b>`; });',
        )
    ),
    "roles": changed(
        (
            '<button id="add" type="button">Add</button>',
            '<div id="add" role="button" tabindex="0" aria-label="Add">+</div>',
        ),
        ('<output id="count">0</output>', '<div role="status"><span id="count">0</span></div>'),
    ),
    "dark": style("body { background: #111; color: #eee; } button { background: #333; }"),
    "dialog closed": changed(("</body>", "<dialog>Help</dialog></body>")),
    "storage": script("localStorage.setItem('visits', '1'); sessionStorage.clear();"),
    "animated": style("@keyframes a { to { margin-left: 4px; } } h1 { animation: a 1s infinite; }"),
    "scrolls inside": changed(
        (
            "</body>",
            '<div style="overflow-x: auto"><div style="width: 900px">wide</div></div></body>',
        )
    ),
    "tall": changed(("<form", '<div style="height: 2000px"></div><form')),
    "data image": changed(
        ("</body>", '<img alt="dot" src="data:image/gif;base64,R0lGODlhAQABAAAAACw="></body>')
    ),
    "screen reader text": changed(
        ("<form", '<span style="position: absolute; left: -999px">for readers</span><form')
    ),
    "reloads itself once": script(
        """
        if (!sessionStorage.getItem("seen")) {
          sessionStorage.setItem("seen", "yes");
          setTimeout(() => location.reload(), 100);
        }
        """
    ),
    "fades in": changed(
        ("</style>", "p { opacity: 0; transition: opacity 0.4s; } p.on { opacity: 1; }</style>"),
        ('$("hello").textContent =', '$("hello").className = "on"; $("hello").textContent ='),
    ),
    "counts by frames": changed(
        (
            '$("count").textContent = String(n);',
            """
            const end = performance.now() + 500;
            const tick = () => performance.now() < end
              ? requestAnimationFrame(tick) : $("count").textContent = String(n);
            tick();
            """,
        )
    ),
    "asks": script("confirm('Cookies?');"),
    "handled error": script("try { null.x } catch (e) { console.log(e.message) }"),
    "large pale heading": style("h1 { color: #8a8a8a; }"),
    "own look of text": script("document.title = String(getComputedStyle(document.body).color);"),
    "many listeners": script("setInterval(() => 0, 10); addEventListener('click', () => 0);"),
}

#: name -> (page, category, a word of the complaint)
CHEATS = {
    "empty": ("<html></html>", "wrong_answer", "expect 1"),
    "nothing happens": (changed(("n += 1", "n += 0")), "wrong_answer", "step 1"),
    "counts by two": (changed(("n += 1", "n += 2")), "wrong_answer", "step 1"),
    "all answers at once": (
        changed(('<output id="count">0</output>', '<output id="count">0 1 2</output>')),
        "wrong_answer",
        "0 1 2",
    ),
    "many statuses": (
        changed(("<form", "<output>1</output><output>2</output><form")),
        "wrong_answer",
        "3 elements",
    ),
    "two buttons": (
        changed(("<form", "<button type=button>Add</button><form")),
        "wrong_answer",
        "2 elements",
    ),
    "uncaught": (script("undefined.x"), "runtime_error", "uncaught TypeError"),
    "late uncaught": (
        script("setTimeout(() => { throw Error('late') }, 300)"),
        "runtime_error",
        "late",
    ),
    "rejection": (script("Promise.reject(Error('no'))"), "runtime_error", "no"),
    "console error": (script("console.error('bad')"), "runtime_error", "bad"),
    "foreign script": (
        changed(("</head>", '<script src="https://example.com/x.js"></script></head>')),
        "runtime_error",
        "console",
    ),
    "foreign image": (
        changed(("</body>", '<img alt="x" src="http://127.0.0.1:9/x.png"></body>')),
        "runtime_error",
        "console",
    ),
    "syntax error": (script("let let = 1;"), "runtime_error", "SyntaxError"),
    "pale": (style("body { color: #999; }"), "wrong_answer", "contrast"),
    "white on white": (style("output { color: #fff; }"), "wrong_answer", "contrast"),
    "transparent": (style("output { opacity: 0; }"), "wrong_answer", "status shows ''"),
    "half transparent": (style("h1 { opacity: 0.3; }"), "wrong_answer", "contrast"),
    "hidden text": (style("output { visibility: hidden; }"), "wrong_answer", "status"),
    "tiny": (style("output { font-size: 1px; }"), "wrong_answer", "status shows ''"),
    "off the page": (
        style("output { position: absolute; left: -9999px; }"),
        "wrong_answer",
        "status shows ''",
    ),
    "clipped": (
        style("output { display: inline-block; height: 0; overflow: hidden; }"),
        "wrong_answer",
        "status",
    ),
    "covered": (
        changed(
            (
                "</body>",
                '<div style="position: fixed; inset: 0; background: #fff; z-index: 9"></div>'
                "</body>",
            )
        ),
        "wrong_answer",
        "covered",
    ),
    "covered without pointer": (
        changed(
            (
                "</body>",
                '<div style="position: fixed; inset: 0; background: #fff; pointer-events: none">'
                "</div></body>",
            )
        ),
        "wrong_answer",
        "covered",
    ),
    "painted over behind": (
        changed(
            (
                "<p id",
                '<div style="position: relative; background: #000; color: #fff">'
                '<div style="position: absolute; inset: 0; background: #fff"></div>'
                '<span style="position: relative">see me</span></div><p id',
            )
        ),
        "wrong_answer",
        "on the screen",
    ),
    "filter": (style("body { filter: opacity(5%); }"), "wrong_answer", "filter"),
    "gradient": (
        style("h1 { background: linear-gradient(#222, #333); }"),
        "wrong_answer",
        "unknown",
    ),
    "fill": (style("h1 { -webkit-text-fill-color: #fefefe; }"), "wrong_answer", "contrast"),
    "wide": (
        changed(("</body>", '<div style="width: 900px">wide</div></body>')),
        "wrong_answer",
        "width 360",
    ),
    "wide and cut off": (
        changed(
            ("</style>", "html, body { overflow-x: hidden; }</style>"),
            ("</body>", '<p style="width: 900px; text-align: right">wide</p></body>'),
        ),
        "wrong_answer",
        "width 360",
    ),
    "wrong name": (changed((">Add<", ">Increase<")), "wrong_answer", "0 elements are button 'Add'"),
    "unlabelled": (
        changed(("<label>Your name", "<label></label>Your name<label>")),
        "wrong_answer",
        "textbox",
    ),
    "hidden from readers": (
        changed(("<h1>", '<h1 aria-hidden="true">')),
        "wrong_answer",
        "heading",
    ),
    "dialog open": (
        changed(("</body>", "<dialog open>Help</dialog></body>")),
        "wrong_answer",
        "dialog",
    ),
    "disabled": (changed(('type="button"', 'type="button" disabled')), "wrong_answer", "step 1"),
    "leaves": (script("location.href = 'https://example.com/'"), "", ""),
    "leaves at a click": (
        script("addEventListener('click', () => location.replace('https://example.com/'))"),
        "",
        "",
    ),
    "reloads": (script("setTimeout(() => location.reload(), 50)"), "", ""),
    "patched tools": (
        script(
            """
            const lie = () => '1';
            window.getComputedStyle = () => new Proxy({}, {get: () => 'rgb(0, 0, 0)'});
            Document.prototype.querySelector = Document.prototype.querySelectorAll = lie;
            Object.defineProperty(Node.prototype, 'textContent', {get: lie, set: () => 0});
            Object.defineProperty(Element.prototype, 'innerHTML', {get: lie, set: () => 0});
            Object.defineProperty(HTMLElement.prototype, 'innerText', {get: lie, set: () => 0});
            Element.prototype.getBoundingClientRect = () => ({x: 0, y: 0, width: 9, height: 9});
            Array.prototype.filter = Array.prototype.map = Array.prototype.every = () => [true];
            String.prototype.includes = String.prototype.trim = () => true;
            Object.prototype.toJSON = lie;
            JSON.stringify = () => '{"result": {"value": true}}';
            Promise.prototype.then = function (f) { f(true); return this; };
            """
        ),
        "wrong_answer",
        "step 1",
    ),
    "prints a verdict": (
        script("console.log('{\"verdict\": \"pass\"}'); document.title = 'PASS';").replace(
            "n += 1", "n += 0"
        ),
        "wrong_answer",
        "step 1",
    ),
    "stops the clock": (
        script(
            "window.setTimeout = window.requestAnimationFrame = () => 0; Date.now = () => 0;"
        ).replace("n += 1", "n += 0"),
        "wrong_answer",
        "step 1",
    ),
    "floods the console": (script("for (;;) console.log('x')"), "output_limit", "too many"),
    "floods with requests": (
        script("for (let i = 0; i < 5000; i++) fetch('/' + i).catch(() => 0)"),
        "output_limit",
        "too many",
    ),
    "asks for ever": (script("for (;;) alert('again')"), "output_limit", "too many"),
    "too many nodes": (
        script("for (let i = 0; i < 30000; i++) document.head.append(new Comment('x'))"),
        "output_limit",
        "10000 nodes",
    ),
    "too deep": (
        changed(
            (
                "</script>",
                "let at = document.body; for (let i = 0; i < 300; i++) "
                "{ const b = document.createElement('b'); at.append(b); at = b; }</script>",
            )
        ),
        "output_limit",
        "200 deep",
    ),
    "too much text": (
        script("addEventListener('load', () => document.body.append('x '.repeat(1.2e7)))"),
        "",
        "",
    ),
    "picture of text": (
        "<html><canvas id=c width=300 height=90></canvas><script>c.getContext('2d')"
        ".fillText('Counter Add 0 Your name', 9, 30)</script></html>",
        "wrong_answer",
        "expect 1",
    ),
    "shadow of another frame": (
        "<html><iframe title=x style='width:100%;height:600px' srcdoc=\""
        + HONEST_PAGE.replace('"', "&quot;")
        + '"></iframe></html>',
        "wrong_answer",
        "expect 1",
    ),
}
