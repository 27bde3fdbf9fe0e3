"""What fuzzing found stays mended, and a little fuzzing with each run of the tests."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_FILE = Path(__file__).parents[2] / "tools" / "fuzz_verifiers.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_verifiers", _FILE)
assert _SPEC and _SPEC.loader
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

# Only a fuzzing process watches for execution: an audit hook cannot be taken away again.
FOUND = sorted(path for path in fuzz.CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_mended(path):
    fuzz.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_with_findings_exists():
    assert {path.parent.name for path in FOUND} <= fuzz.TARGETS.keys()


TOKENS = [token.replace("\\\\", "\\").replace('\\"', '"') for token in fuzz._TOKENS]
PIECES = st.one_of(
    st.sampled_from(TOKENS),
    st.sampled_from(["\n", " ", ",", "(", ")", "[", "]", "{", "}", "$", ".", "-", "=", "<", "\0"]),
    st.integers(0, 10**6).map(str),
    st.text(max_size=3),
)
TEXTS = st.lists(PIECES, max_size=25).map(lambda pieces: "".join(pieces).encode("utf-8", "replace"))


@pytest.mark.parametrize("name", ["answers", "code", "maths", "cases", "wire"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, more=TEXTS)
def test_a_little_fuzzing(name, text, more):
    fuzz.TARGETS[name](text + b"\0" + more)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=100))
def test_any_bytes_are_a_message_or_refused(data):
    fuzz.wire(data)


LONG = (
    *(
        "{",
        "}",
        "(",
        "[",
        "9",
        " ",
        ",",
        "\\",
        "/",
        ".",
        "-",
        "^",
        "_",
        "|",
        "!",
        "%",
        "\u00b0",
        "=",
    ),
    *(
        "answer is ",
        r"\boxed{",
        r"\frac",
        r"\sqrt",
        r"\pm ",
        r"\cup ",
        ":",
        "1:",
        "x=",
        "1,",
        "100,",
        "(100,",
        "1 and ",
        "a ",
        "$",
    ),
    *(
        r"\text{",
        r"\text{2}",
        r"\begin{pmatrix}",
        r"\\",
        "&",
        " and ",
        "```",
        "~~~\n",
        "'",
        '"',
        "#",
        "<",
        "<answer>",
    ),
    *(
        "1 000",
        "x_1",
        "e",
        "(1,",
        r"\{",
        r"\log_",
        "3:45",
        "1/",
        "0.",
        "\n",
        "\t",
        "\ufeff",
        "\u202f",
    ),
)


@pytest.mark.parametrize("piece", LONG)
def test_a_hundred_kilobytes_of_anything_take_no_time_outside_of_a_worker(piece):
    text = (piece * 100_000)[:100_000].encode()
    for name in ("answers", "code", "maths"):
        with fuzz.watched(0.5):  # 50 ms on a quiet machine
            fuzz.TARGETS[name](text)
    with fuzz.watched(0.5):
        fuzz.code(b"```" + text)
    with fuzz.watched(0.5):
        fuzz.maths(text[:1000] + b"\0" + text[:999])
    # Nearly a formula, as short as formulas are: a pattern that can read a piece in two ways would
    # try them all.
    for start in ("", "answer is ", "(", "x = "):
        with fuzz.watched(0.5):
            fuzz.answers((start + piece * 300)[:250].encode() + b"\0")
