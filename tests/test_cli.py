"""The command line: what it prints, what it imports, how it hands over and how it ends."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import cosr_jax
from cosr_jax.config import RunConfig, to_dict
from cosr_jax.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the modules of run/ and records how main calls them."""
    seen = []

    def recorder(name):
        def call(*args, **kwargs):
            seen.append((name, args, kwargs))
            return 0

        return call

    import cosr_jax.run

    for module, names in {
        "loop": ["train"],
        "evaluate": ["evaluate"],
        "export": ["export"],
        "plan": ["plan"],
        "doctor": ["doctor"],
        "rejudge": ["run"],
    }.items():
        fake = types.ModuleType(f"cosr_jax.run.{module}")
        for name in names:
            setattr(fake, name, recorder(f"{module}.{name}"))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(cosr_jax.run, module, fake, raising=False)
    return seen


@pytest.fixture
def workdir(tmp_path):
    """A folder with the saved settings of a run."""
    saved = to_dict(RunConfig(seed=11))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_its_flags(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: cosr {name} ") and "--debug" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cosr_jax {cosr_jax.__version__}\n"


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["train", QUICKSTART, "--config.sed=1"], ["trian"]]
)
def test_help_and_mistakes_import_no_jax(args):
    code = (
        "import sys\n"
        "from cosr_jax.main import main\n"
        f"code = main({args!r})\n"
        "loaded = [m for m in ('jax', 'flax', 'optax', 'orbax', 'transformers', 'numpy')\n"
        "          if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    expected = 0 if "--help" in args else 2
    assert done.returncode == expected, done.stderr
    assert len(done.stderr.splitlines()) == (0 if expected == 0 else 1)


def test_train_hands_over_the_resolved_config(calls, tmp_path):
    args = ["train", QUICKSTART + ":seed=3", f"--workdir={tmp_path / 'run'}"]
    args += ["--config.train.learning_rate=3e-4", "--config.train.max_rounds", "7"]
    args += ["--config.eval.test=('a=addition/2:20', 'b=*:1')", "--config.lora.rank_stabilised"]
    args += ["--noconfig.grpo.scale_advantages", "--config.curator.focus=addition/1"]
    assert main(args) == 0
    [(name, (config,), kwargs)] = calls
    assert name == "loop.train"
    assert kwargs == {
        "workdir": tmp_path / "run",
        "allow_config_change": False,
        "arguments": tuple(args[1:]),  # for the report's "next commands"
    }
    assert isinstance(config, RunConfig)
    assert (config.seed, config.train.learning_rate, config.train.max_rounds) == (3, 3e-4, 7)
    assert config.eval.test == ("a=addition/2:20", "b=*:1")
    assert config.lora.rank_stabilised and not config.grpo.scale_advantages
    assert config.curator.focus == ("addition/1",)
    assert not (tmp_path / "run").exists()  # the run makes its folder, not the command line


def test_flags_may_follow_their_value_by_a_space_and_the_last_override_wins(calls, tmp_path):
    path = QUICKSTART.partition("=")[2]
    args = ["train", "--config.seed=1", "--config", path, "--workdir", str(tmp_path)]
    assert main([*args, "--allow_config_change", "--config.seed", "2"]) == 0
    [(_, (config,), kwargs)] = calls
    assert config.seed == 2 and kwargs["allow_config_change"] is True


def test_eval_of_a_run_uses_its_saved_settings(calls, workdir):
    suite = workdir / "suite.jsonl"
    suite.write_text("", encoding="utf-8")
    args = ["eval", f"--workdir={workdir}", f"--suite={suite}", "--config.eval.max_new_tokens=9"]
    assert main(args) == 0
    [(name, (config, where), _)] = calls
    assert (name, where) == ("evaluate.evaluate", workdir)
    assert (config.seed, config.eval.suite_file, config.eval.max_new_tokens) == (11, str(suite), 9)


def test_eval_of_the_base_student_needs_a_config_only(calls):
    assert main(["eval", QUICKSTART]) == 0
    [(_, (config, where), _)] = calls
    assert where is None and config.curator.focus == ("addition/2",)


@pytest.mark.parametrize(
    ("flag", "step"), [([], "best"), (["--step=latest"], "latest"), (["--step=12"], 12)]
)
def test_export_hands_over_its_flags(calls, workdir, flag, step):
    assert main(["export", f"--workdir={workdir}", "--format=merged", "--out=x", *flag]) == 0
    assert calls == [
        ("export.export", (workdir,), {"format": "merged", "step": step, "out": Path("x")})
    ]


def test_flags_may_be_written_with_dashes(calls, workdir):
    assert main(["train", QUICKSTART, f"--workdir={workdir}-x", "--allow-config-change"]) == 0
    ((_, _, options),) = calls
    assert options["allow_config_change"] is True
    assert options["workdir"] == Path(f"{workdir}-x")


def test_rejudge_goes_by_the_run_or_by_every_form(calls, workdir):
    assert main(["rejudge", f"--workdir={workdir}", "--config.verifier.wall_s=9"]) == 0
    assert main(["rejudge", "--samples=a.jsonl", "--output=b.jsonl"]) == 0
    (_, (own, source, _), _), (_, (every, file, output), _) = calls
    assert (own.accept, own.wall_s, source) == (("boxed",), 9.0, workdir)
    assert "hashes" in every.accept
    assert (file, output) == (Path("a.jsonl"), "b.jsonl")


@pytest.mark.parametrize("args", [[], ["--workdir=a", "--samples=b"]])
def test_rejudge_wants_one_source(calls, args, capsys):
    assert main(["rejudge", *args]) == 2
    assert "give one of --workdir and --samples" in capsys.readouterr().err
    assert not calls


def test_plan_hands_over_its_topology(calls):
    assert main(["plan", QUICKSTART, "--topology=v5e:4x4"]) == 0
    [(name, (config, topology), _)] = calls
    assert (name, topology) == ("plan.plan", "v5e:4x4") and isinstance(config, RunConfig)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_an_unexpected_failure_is_one_line_and_debug_shows_where(calls, monkeypatch, capsys):
    monkeypatch.setattr("cosr_jax.run.plan.plan", raising(ZeroDivisionError("a\nb")))
    assert main(["plan", QUICKSTART]) == 1
    line = "cosr: unexpected ZeroDivisionError: a b; run with --debug for the traceback\n"
    assert capsys.readouterr().err == line
    assert main(["plan", QUICKSTART, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_one_line(calls, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("cosr_jax.run.loop.train", raising(KeyboardInterrupt()))
    assert main(["train", QUICKSTART, f"--workdir={tmp_path}"]) == 130
    assert capsys.readouterr().err == "cosr: interrupted; the same command resumes\n"


def test_a_broken_pipe_elsewhere_is_not_taken_for_a_closed_stdout(calls, monkeypatch, capsys):
    monkeypatch.setattr("cosr_jax.run.plan.plan", raising(BrokenPipeError("a worker has gone")))
    assert main(["plan", QUICKSTART]) == 1
    assert "a worker has gone" in capsys.readouterr().err


def test_output_that_nobody_reads_ends_silently():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cosr_jax.main", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_of_the_real_process_exits_with_130():
    code = (
        "import os, signal, sys, types, cosr_jax.run\n"
        "from cosr_jax.main import main\n"
        "cosr_jax.run.plan = plan = types.ModuleType('plan')\n"
        "plan.plan = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.exit(main(['plan', {QUICKSTART!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (130, "cosr: interrupted\n")
