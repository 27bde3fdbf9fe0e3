"""``cosr verify --stdio`` as another program drives it."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "cosr_jax.main", "verify", "--stdio")
FIELDS = {"id", "verdict", "score", "category", "wall_s"}

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def math_case(case_id, completion, gold="4", **fields):
    return {"id": case_id, "type": "math", "completion": completion, "gold": gold, **fields}


def start(*arguments, **options):
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def verify(lines, *arguments):
    """Answers by id (as JSON), what stood on stderr, and the exit code."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    with start(*arguments) as process:
        out, err = process.communicate(b"\n".join(lines), timeout=240)
    answers = [json.loads(line) for line in out.splitlines()]
    return answers, err.decode(), process.returncode


def test_an_empty_input_is_a_clean_end():
    assert verify([]) == ([], "", 0)


def test_every_form_that_the_protocol_knows_counts():
    texts = [r"\boxed{4}", "<answer>4</answer>", "#### 4", "The answer is 4.", "4"]
    wrong = ["2 + 2 = 4, of course", r"\boxed{5}", r"\boxed{}", "", r"<think>\boxed{4}"]
    answers, err, code = verify([math_case(text, text) for text in texts + wrong])
    verdicts = {answer["id"]: answer["verdict"] for answer in answers}
    assert verdicts == dict.fromkeys(texts, "pass") | dict.fromkeys(wrong, "fail")
    assert (err, code) == ("", 0)
    assert all(set(answer) == FIELDS for answer in answers)


def test_a_config_changes_what_counts():
    cases = [math_case(text, text) for text in (r"\boxed{4}", "#### 4")]
    answers, _, _ = verify(cases, "--config.verifier.accept=('hashes',)")
    assert {a["id"]: (a["verdict"], a["category"]) for a in answers} == {
        r"\boxed{4}": ("fail", "no_answer"),
        "#### 4": ("pass", ""),
    }


def test_bad_lines_get_an_answer_and_harm_nobody():
    lines = [
        b"not json",
        b'{"id": "cut", "type": "math", "compl',
        b"",
        b"   \r",
        math_case("good", r"\boxed{4}"),
        math_case("limits", r"\boxed{4}", limits={"wall_s": -1}),
        math_case("huge", r"\boxed{4}" + " " * (5 << 20)),
        b'{"id": "endless", "completion": "' + b"x" * (65 << 20),
        {"id": "what", "type": "poem", "completion": "x"},
        b'{"id": "windows", "type": "math", "completion": "4", "gold": "4"}\r',
    ]
    answers, err, code = verify(lines)
    verdicts = sorted((str(answer["id"]), answer["verdict"]) for answer in answers)
    assert verdicts == [
        ("None", "error"),
        ("cut", "error"),
        ("endless", "error"),
        ("good", "pass"),
        ("huge", "pass"),
        ("limits", "error"),
        ("what", "error"),
        ("windows", "pass"),
    ]
    assert all(a["score"] is None for a in answers if a["verdict"] == "error")
    assert "limits.wall_s is -1" in err
    assert code == 0


def test_answers_come_while_the_input_is_open():
    with start() as process:
        for n in range(3):
            process.stdin.write(json.dumps(math_case(n, r"\boxed{4}")).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == n
        process.stdin.close()
        assert process.wait(timeout=240) == 0


def test_a_fast_case_does_not_wait_for_a_slow_one():
    slow = code_case("while True: pass", io=[("", "x")]) | {"limits": {"wall_s": 1.0}}
    cases = [slow | {"id": n} for n in range(2)] + [math_case("fast", "4")]
    answers, _, _ = verify(cases, "--config.verifier.workers=2")
    assert [a["category"] for a in answers] == ["", "timeout", "timeout"]


def test_a_writer_who_reads_no_answer_before_the_end_is_served():
    """More answers than a pipe holds; nothing is read until every case is written."""
    count = 3000
    with start("--config.verifier.queue=16") as process:
        for n in range(count):
            process.stdin.write(json.dumps(math_case(n, "4")).encode() + b"\n")
        process.stdin.close()
        answers = [json.loads(line) for line in process.stdout]
    assert sorted(answer["id"] for answer in answers) == list(range(count))


def test_cases_from_a_file(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(math_case(n, "4")) + "\n" for n in range(10)))
    with path.open() as file:
        done = subprocess.run(COMMAND, stdin=file, capture_output=True, timeout=240, check=True)
    assert len(done.stdout.splitlines()) == 10


def test_nobody_reads_the_answers():
    with start() as process:
        process.stdout.close()
        for n in range(10):
            process.stdin.write(json.dumps(math_case(n, "4")).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=240) == 141
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_reader_who_stands_still_cannot_hold_it_back(number, code):
    with start() as process:
        for n in range(2000):  # more answers than a pipe holds
            process.stdin.write(json.dumps(math_case(n, "4")).encode() + b"\n")
        process.stdin.close()
        process.stdout.read(1)
        time.sleep(0.5)  # whether the pipe is full by now or not, the signal counts
        process.send_signal(number)
        assert process.wait(timeout=240) == code


def descendants(pid):
    """Pids of all live processes under ``pid``."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def started(pid):
    """When a process began, in ticks, to tell it from a later one with its pid; 0 if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signals_leave_no_process_behind(number, code):
    cases = [
        math_case(1, r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        {"id": 2, "limits": {"wall_s": 600}} | code_case("while True: pass", io=[("", "x")]),
        {"id": 3, "limits": {"wall_s": 600}} | code_case("def f(): return f()", "f", "f()"),
    ]
    with start("--config.verifier.workers=3") as process:
        for case in cases:
            process.stdin.write(json.dumps(case).encode() + b"\n")
        process.stdin.flush()
        found = {json.loads(process.stdout.readline())["id"] for _ in range(2)}
        assert found == {1, 3}
        workers = {(pid, started(pid)) for pid in descendants(process.pid)}
        assert len(workers) >= 3  # a maths worker, a server, a program
        process.send_signal(number)
        assert process.wait(timeout=240) == code
        assert b"Traceback" not in process.stderr.read()
    deadline = time.monotonic() + 120
    while left := {pid for pid, since in workers if started(pid) == since != 0}:
        assert time.monotonic() < deadline, f"{left} outlived their parent"
        time.sleep(0.05)


def test_nothing_else_reaches_stdout():
    """Not what this process prints, nor what its children print, nor what they leave there."""
    code = (
        "import os, subprocess, sys\n"
        "from cosr_jax.verifiers import maths\n"
        "real = maths.extract_answer\n"
        "def noisy(*args):\n"
        "    print('noise'); os.write(1, b'more noise'); os.system('echo child noise')\n"
        "    return real(*args)\n"
        "maths.extract_answer = noisy\n"
        "from cosr_jax.main import main\n"
        "sys.exit(main(['verify', '--stdio']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(math_case(1, "4")).encode(),
        capture_output=True,
        timeout=240,
        check=True,
    )
    assert json.loads(done.stdout)["verdict"] == "pass"
    assert done.stderr.count(b"noise") == 3


def test_stdio_has_to_be_asked_for():
    done = subprocess.run(COMMAND[:-1], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("cosr: cosr verify: --stdio is missing")


def test_help_of_verify():
    done = subprocess.run(
        [*COMMAND[:-1], "--help"], capture_output=True, text=True, timeout=240, check=True
    )
    assert "--stdio" in done.stdout


def mixed_cases(count):
    """Cases of both domains with the verdict that each must get, in a fixed random order."""
    f = "```python\ndef f(n):\n    return n * n\n```"
    kinds = [
        (math_case(0, r"\boxed{4}"), "pass"),
        (math_case(0, r"\boxed{\frac{8}{2}}"), "pass"),
        (math_case(0, r"\boxed{3}"), "fail"),
        (math_case(0, r"\boxed{2\sqrt{2}}", r"\sqrt{8}"), "pass"),
        (math_case(0, "no idea", limits="many"), "error"),
        (code_case(f, "f", "assert f(3) == 9\nassert f(-2) == 4"), "pass"),
        (code_case(f, "f", ["assert f(3) == 9", "assert f(2) == 5"]), "fail"),
        (code_case("print(int(input()) * 2)", io=[("4\n", "8\n"), ("5", "10")]), "pass"),
        (code_case("print(8)", io=[("4\n", "8\n"), ("5", "10")]), "fail"),
        (code_case("import os\ndef f(n): os._exit(0)", "f", "assert f(3) == 9"), "fail"),
        (code_case("def f(n): return 1 / 0", "f", "assert f(3) == 9"), "fail"),
        (code_case("I cannot do it.", "f", "assert f(3) == 9"), "fail"),
    ]
    order = random.Random(0)
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    order.shuffle(chosen)
    return [({**case, "id": n}, verdict) for n, (case, verdict) in enumerate(chosen)]


def code_case(completion, entry_point=None, tests=None, io=None):
    case = {"type": "code", "completion": completion, "entry_point": entry_point}
    if io is None:
        return case | {"tests": tests}
    return case | {"io": [{"stdin": given, "stdout": wanted} for given, wanted in io]}


def test_five_hundred_mixed_cases():
    cases = mixed_cases(500)
    answers, err, code = verify([case for case, _ in cases])
    assert code == 0, err
    found = {answer["id"]: answer["verdict"] for answer in answers}
    assert len(answers) == len(found) == 500
    wrong = [(n, verdict, found[n]) for n, (_, verdict) in enumerate(cases) if found[n] != verdict]
    assert wrong == []
