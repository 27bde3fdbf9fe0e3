"""Mistakes in flags, settings and files: each one line with the value and the remedy, exit code 2.

Every case runs through ``main`` as the command line would.
"""

import dataclasses
from pathlib import Path

import pytest
import yaml

from cosr_jax.config import RunConfig, to_dict
from cosr_jax.main import main
from cosr_jax.run.workdir import open_workdir

CONFIG = """\
from cosr_jax.config import default_config

def get_config(arg=""):
    config = default_config()
    {change}
    return config
"""
GOOD = {"good.py": CONFIG.format(change="config.seed = 1")}


@dataclasses.dataclass(frozen=True)
class Mistake:
    args: str
    says: tuple[str, ...]  # the offending key and value, and words of the remedy
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def flag(text: str, *says: str) -> Mistake:
    """A wrong flag on an otherwise good command."""
    return Mistake(f"train --config=good.py --workdir=run {text}", says)


def setting(change: str, *says: str) -> Mistake:
    """A line of a config file that is wrong by itself or together with the others."""
    text = CONFIG.format(change=change)
    return Mistake("train --config=bad.py --workdir=run", says, {"bad.py": text})


def config_file(text: str, *says: str) -> Mistake:
    return Mistake("train --config=bad.py --workdir=run", says, {"bad.py": text})


def saved(text: str, *says: str) -> Mistake:
    """A run's saved settings, damaged."""
    return Mistake("export --workdir=run", says, {"run/config.yaml": text})


MISTAKES = {
    # Commands and flags.
    "unknown command": Mistake("trian", ("'trian'", "did you mean train?")),
    "command like no other": Mistake("frobnicate", ("'frobnicate'", "train, eval, export")),
    "misspelt flag": flag("--wokdir=x", "--wokdir", "did you mean workdir?"),
    "flag without value": Mistake(
        "train --config=good.py --workdir", ("--workdir", "see cosr train --help")
    ),
    "word without flag": flag("quickly", "'quickly'", "--name=value"),
    "no config": Mistake("train --workdir=run", ("--config", "--config=configs/quickstart.py")),
    "no workdir": Mistake("train --config=good.py", ("--workdir", "--workdir=runs/first")),
    "workdir is a file": Mistake(
        "train --config=good.py --workdir=good.py", ("--workdir=good.py", "name a folder")
    ),
    "workdir under a file": Mistake(
        "train --config=good.py --workdir=good.py/run", ("good.py is a file", "name a folder")
    ),
    "remote workdir": Mistake(
        "train --config=good.py --workdir=gs://bucket/run", ("--workdir=gs://bucket/run", "local")
    ),
    "settings where none belong": Mistake(
        "doctor --config.seed=1", ("--config.seed=1", "see cosr doctor --help")
    ),
    "bad format": Mistake("export --workdir=run --format=onnx", ("onnx", "peft|merged")),
    "bad step": Mistake("export --workdir=run --step=last", ("--step=last", "best, latest")),
    # Overrides.
    "misspelt section": flag("--config.trian.seed=1", "config.trian", "did you mean config.train?"),
    "misspelt key": flag(
        "--config.train.lerning_rate=1", "config.train.lerning_rate", "config.train.learning_rate?"
    ),
    "key like no other": flag("--config.sft.xyzzy=1", "config.sft.xyzzy", "known: batch_size"),
    "whole section": flag("--config.lora=3", "config.lora is a section", "alpha, dropout"),
    "key of a value": flag("--config.seed.x=3", "config.seed is a value", "set config.seed"),
    "int written as float": flag("--config.seed=1e4", "config.seed: '1e4'", "write 10000"),
    "fraction for an int": flag("--config.lora.rank=2.5", "config.lora.rank: '2.5'", "type int"),
    "word for a float": flag(
        "--config.train.learning_rate=fast", "config.train.learning_rate: 'fast'", "float"
    ),
    "word for a bool": flag(
        "--config.lora.rank_stabilised=perhaps", "rank_stabilised: 'perhaps'", "bool"
    ),
    "number without value": flag("--config.seed", "--config.seed", "needs a value"),
    "negated number": flag("--noconfig.seed", "--noconfig.seed", "needs a value"),
    "broken tuple": flag("--config.eval.test=a=*:1,b=*:2", "config.eval.test", "\"('a', 'b')\""),
    "tuple of numbers": flag("--config.lora.targets=(1,2)", "config.lora.targets: (1, 2)", "tuple"),
    # Values.
    "under its range": flag("--config.lora.rank=0", "config.lora.rank: 0", "at least 1"),
    "over its range": flag("--config.lora.dropout=0.95", "config.lora.dropout: 0.95", "at most"),
    "on an open bound": flag("--config.lora.alpha=0", "config.lora.alpha: 0.0", "more than 0.0"),
    "not a number": flag("--config.train.learning_rate=nan", "learning_rate: nan"),
    "unknown choice": flag(
        "--config.grpo.aggregation=mean", "config.grpo.aggregation: 'mean'", "token_mean"
    ),
    "not cell:count": flag(
        "--config.eval.validation=addition", "config.eval.validation: 'addition'", "*:20"
    ),
    "suite without a name": flag("--config.eval.test=addition/2:20", "config.eval.test", "name="),
    "bad regular expression": flag("--config.lora.targets=(", "config.lora.targets: '('", "attn"),
    # Settings that exclude each other.
    "empty zone": flag("--config.curator.zone_low=0.9", "zone_low: 0.9", "zone_high"),
    "truncated sampling": flag("--config.rollout.top_p=0.9", "top_p: 0.9", "top_p=1.0"),
    "two open axes": flag("--config.mesh.data=-1", "config.mesh.fsdp: -1", "give one a size"),
    "axis of no size": flag("--config.mesh.tensor=0", "config.mesh.tensor: 0", "use 1"),
    # Config files.
    "no such file": Mistake(
        "train --config=godo.py --workdir=run", ("godo.py", "did you mean good.py?")
    ),
    "no such folder": Mistake(
        "train --config=no/such.py --workdir=run", ("no/such.py", "check the path")
    ),
    "argument unknown": Mistake(
        "train --config=arg.py:sed=1 --workdir=run",
        ("'sed=1'", "did you mean seed?"),
        {
            "arg.py": "from cosr_jax.config_args import parse_arg\n"
            "def get_config(arg): return parse_arg(arg, seed=0)\n"
        },
    ),
    "argument not taken": Mistake(
        "train --config=arg.py:small --workdir=run",
        ("'small'", "write --config=arg.py"),
        {"arg.py": "def get_config(): pass\n"},
    ),
    "argument missing": Mistake(
        "train --config=arg.py --workdir=run",
        ("needs an argument", "arg.py:ARG"),
        {"arg.py": "def get_config(size): pass\n"},
    ),
    "empty file": config_file("", "bad.py defines no get_config", "define get_config"),
    "checklist without a model": setting(
        "config.verifier.checklist = ('Polite.',); config.tasks.domains = ('web',)",
        "config.verifier.checklist: ('Polite.',)",
        "config.curator.llm.endpoints is ()",
        "checker=judge",
    ),
    "checklist without pages": setting(
        "config.verifier.checklist = ('Polite.',); "
        "config.curator.llm.endpoints = ('a http://127.0.0.1:9/v1',)",
        "config.verifier.checklist: ('Polite.',)",
        "add 'web'",
    ),
    "checklist for another host": setting(
        "config.verifier.checklist = ('Polite.',); config.verifier.url = 'http://h:1'; "
        "config.curator.llm.endpoints = ('a http://127.0.0.1:9/v1',)",
        "config.verifier.checklist: ('Polite.',)",
        "config.verifier.url 'http://h:1'",
        "empty one",
    ),
    "checklist with an item twice": setting(
        "config.verifier.checklist = ('Polite.', 'Polite.')",
        "config.verifier.checklist: 'Polite.' is there twice",
        "one sentence",
    ),
    "checklist that weighs too much": setting(
        "config.verifier.checklist_weight = 0.6",
        "config.verifier.checklist_weight: 0.6",
        "at most 0.5",
    ),
    "broken syntax": config_file("x = 1\ndef (:\n", "bad.py:2: SyntaxError", "mend"),
    "raises": config_file(
        "import os\ndef get_config():\n    return os.environ['COSR_NO_SUCH_VARIABLE']\n",
        "bad.py:3: KeyError: 'COSR_NO_SUCH_VARIABLE'",
        "--debug",
    ),
    "no return": config_file("def get_config(): pass\n", "returned NoneType", "default_config"),
    "new key in file": setting("config.sed = 1", "config.sed", "(value 1)", "config.seed?"),
    "wrong type in file": setting("config.lora.rank = 'big'", "bad.py:5", "rank", "big", "int"),
    "None in file": setting("config.lora.rank = None", "config.lora.rank: None", "int"),
    "key of a value in file": setting("config.seed.x = 1", "bad.py:5", "'x'"),
    "required placeholder": setting(
        "from ml_collections.config_dict import required_placeholder as r; config.seed = r(int)",
        "config.seed is a required placeholder",
        "default",
    ),
    # Files of a run.
    "no run": Mistake("export --workdir=nowhere", ("nowhere/config.yaml", "workdir of a run")),
    "nothing to measure": Mistake("eval", ("--workdir and --config", "base student")),
    "two sources of settings": Mistake(
        "eval --config=good.py --workdir=run",
        ("--config=good.py", "leave --config out"),
        {"run/config.yaml": yaml.safe_dump(to_dict(RunConfig()))},
    ),
    "no suite file": Mistake(
        "eval --config=good.py --suite=no.jsonl", ("--suite=no.jsonl", "check the path")
    ),
    "suite file without JSON": Mistake(
        "eval --config=good.py --suite=s.jsonl", ("s.jsonl:1", "not JSON"), {"s.jsonl": "x"}
    ),
    "suite file without a field": Mistake(
        "eval --config=good.py --suite=s.jsonl", ("s.jsonl:1", "'domain'"), {"s.jsonl": "{}"}
    ),
    "saved settings cut short": saved("seed: [1", "config.yaml", "damaged", "restore"),
    "saved settings of another kind": saved("[1, 2]", "config.yaml", "no mapping"),
    "saved settings out of range": saved("seed: -1", "config.seed: -1", "at least 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(name, capsys, tmp_path, monkeypatch):
    mistake = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    for path, text in {**GOOD, **mistake.files}.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))

    assert main(mistake.args.split(" ")) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("cosr: ") and "Traceback" not in line
    for part in mistake.says:
        assert part in line
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)) == before


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes ``cosr train`` with good.py in a fresh folder, and gives its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    Path("good.py").write_text(GOOD["good.py"], encoding="utf-8")

    def call(capsys, *args):
        assert main(["train", "--config=good.py", "--workdir=run", *args]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    return call


def test_a_workdir_in_use_is_refused(run, capsys):
    with open_workdir("run", RunConfig(seed=1)):
        line = run(capsys)
    assert "is in use by pid" in line and "another path" in line


def test_a_changed_config_is_refused_with_the_differing_keys(run, capsys):
    open_workdir("run", RunConfig(seed=1)).close()
    line = run(capsys, "--config.seed=2", "--config.lora.rank=8")
    assert "config.seed: 1 -> 2" in line and "config.lora.rank: 16 -> 8" in line
    assert "--allow_config_change" in line


@pytest.mark.parametrize(
    ("config_json", "says"),
    [
        (None, "config.json: no such file"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
        ('{"model_type": "llama"}', "'num_attention_heads' is missing"),
    ],
)
def test_a_student_that_cannot_be_used_is_named(run, capsys, config_json, says):
    Path("student").mkdir()
    if config_json is not None:
        Path("student/config.json").write_text(config_json, encoding="utf-8")
    assert says in run(capsys, "--config.student.source=./student")


def test_a_student_that_is_not_there_is_named(run, capsys):
    line = run(capsys, "--config.student.source=/no/such/student")
    assert "config.student.source: '/no/such/student' does not exist" in line


def test_debug_adds_the_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("def get_config():\n    return 1 / 0\n", encoding="utf-8")
    assert main(["train", "--config=bad.py", "--workdir=run", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "return 1 / 0" in error
    assert error.splitlines()[-1].startswith("cosr: bad.py:2: ZeroDivisionError")
