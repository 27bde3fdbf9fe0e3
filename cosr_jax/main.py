"""The command line: ``cosr train | eval | export | plan | verify | rejudge | doctor`` and others.

Flags are absl's and ``--config`` follows ml_collections' conventions.  JAX is imported only once a
command runs, so help and mistakes answer at once.  Exit codes: 0 done, 1 unexpected failure (or a
failed check of ``cosr doctor``), 2 a mistake in what the user gave, 130 interrupted, 143 terminated
(a run has saved and the same command resumes), 141 nobody reads the output.
"""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

import cosr_jax
from cosr_jax.config_args import load_config, override, split_overrides, suggest
from cosr_jax.types import UserError

if TYPE_CHECKING:
    from cosr_jax.config import RunConfig, VerifierConfig

_STDOUT = 1  # the process's own, whatever sys.stdout is


@dataclasses.dataclass(frozen=True)
class Call:
    """What the user wrote after the command's name."""

    arguments: tuple[str, ...]  # all of it, as it was
    flags: flags.FlagValues
    overrides: list[str]  # the --config.section.key=value among the arguments


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: ``define`` adds its flags, ``run`` returns the exit code."""

    summary: str
    usage: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[Call], int]
    takes_config: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``cosr`` with ``argv`` (without the program's name) and returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(error, f"cosr: {_one_line(error)}", 2, args)
    except KeyboardInterrupt as error:
        resume = "; the same command resumes" if args[:1] == ["train"] else ""
        return _fail(error, f"cosr: interrupted{resume}", 130, args)
    except BrokenPipeError as error:
        if _stdout_is_open():
            return _unexpected(error, args)
        # Whoever read our output has gone, as in "cosr plan | head": say nothing, and keep the
        # interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        return 141
    except Exception as error:
        return _unexpected(error, args)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"cosr_jax {cosr_jax.__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command", suggest(name, COMMANDS, "commands: "))
    command = COMMANDS[name]
    overrides, others = split_overrides(args[1:])
    values = flags.FlagValues()
    command.define(values)
    flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
    if any(a in ("-h", "--help", "-help") for a in others):
        print(_command_help(name, command, values))
        return 0
    if overrides and not command.takes_config:
        raise UserError(f"{overrides[0]}: cosr {name} takes no settings", f"see cosr {name} --help")
    _parse(values, others, name)
    # Orbax alone writes about sixty lines for each save at the default level.
    logging.set_verbosity(logging.WARNING)
    return command.run(Call(tuple(args[1:]), values, overrides))


def _parse(values: flags.FlagValues, args: list[str], name: str) -> None:
    values.set_gnu_getopt(True)
    remedy = f"see cosr {name} --help"
    try:
        extra = values(["cosr", *map(_with_underscores, args)])[1:]
    except flags.UnrecognizedFlagError as error:
        flag = error.flagname
        hint = suggest(flag, list(values), f"{remedy}; flags: ")
        raise UserError(f"--{flag} is not a flag of cosr {name}", hint) from error
    except flags.Error as error:
        raise UserError(_one_line(error), remedy) from error
    if extra:
        raise UserError(f"{extra[0]!r} belongs to no flag", f"write --name=value; {remedy}")


def _with_underscores(argument: str) -> str:
    """``--token-file=x-y`` as ``--token_file=x-y``, which is how flags are named."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name[:2] == "--" else argument


def _train_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    _define_workdir(values, "folder of the run; the same command on it resumes")
    flags.DEFINE_bool(
        "allow_config_change",
        False,
        "resume although settings differ from the run's saved ones",
        flag_values=values,
    )


def _train(call: Call) -> int:
    config = _required_config(call, "train")
    workdir = _required_workdir(call, "train")
    from cosr_jax.run import loop

    outcome = loop.train(
        config,
        workdir=workdir,
        allow_config_change=call.flags.allow_config_change,
        arguments=call.arguments,
    )
    return 128 + outcome if isinstance(outcome, signal.Signals) else 0


def _eval_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    _define_workdir(values, "measure this run's best checkpoint")
    flags.DEFINE_string(
        "suite",
        None,
        "JSON-lines tasks to measure instead of the probes (config.eval.suite_file)",
        flag_values=values,
    )


def _eval(call: Call) -> int:
    overrides = call.overrides
    if call.flags.suite is not None:
        if not Path(call.flags.suite).is_file():
            raise UserError(f"--suite={call.flags.suite}: there is no such file", "check the path")
        overrides = [*call.overrides, f"--config.eval.suite_file={call.flags.suite}"]
    workdir = None if call.flags.workdir is None else _checked_workdir(call.flags.workdir)
    if call.flags.config is None:
        if workdir is None:
            raise UserError(
                "--workdir and --config are missing",
                "give --workdir of a run, or --config to measure the base student",
            )
        config = override(_saved_config(workdir), overrides)
    else:
        if workdir is not None and (workdir / "config.yaml").exists():
            raise UserError(
                f"--config={call.flags.config}: the run in {workdir} has its own settings",
                "leave --config out, or name a new --workdir to measure the base student",
            )
        config = load_config(call.flags.config, overrides)
    from cosr_jax.run import evaluate

    evaluate.evaluate(config, workdir)
    return 0


def _export_flags(values: flags.FlagValues) -> None:
    _define_workdir(values, "folder of the run")
    flags.DEFINE_enum(
        "format",
        "peft",
        ["peft", "merged"],
        "a PEFT adapter, or a Hugging Face folder with the adapter merged into the weights",
        flag_values=values,
    )
    flags.DEFINE_string("step", "best", "best, latest, or the number of a step", flag_values=values)
    flags.DEFINE_string(
        "out", None, "folder to write; default: WORKDIR/export/FORMAT", flag_values=values
    )


def _export(call: Call) -> int:
    workdir = _required_workdir(call, "export")
    named = call.flags.step in ("best", "latest")
    if not named and not call.flags.step.isdecimal():
        raise UserError(f"--step={call.flags.step} is not a step", "write best, latest or a number")
    _saved_config(workdir)  # says what is missing before JAX starts
    step = call.flags.step if named else int(call.flags.step)
    out = None if call.flags.out is None else Path(call.flags.out)
    from cosr_jax.run import export

    export.export(workdir, format=call.flags.format, step=step, out=out)
    return 0


def _plan_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        "compile for these TPU chips, e.g. v5e:4x4 (needs the topology extra); "
        "default: the devices that are here",
        flag_values=values,
    )


def _plan(call: Call) -> int:
    config = _required_config(call, "plan")
    from cosr_jax.run import plan

    plan.plan(config, call.flags.topology)
    return 0


def _verify_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_bool(
        "stdio",
        False,
        "read cases as JSON lines on stdin, write answers to stdout",
        flag_values=values,
    )


def _verify(call: Call) -> int:
    if not call.flags.stdio:
        raise UserError(
            "cosr verify: --stdio is missing", "write cosr verify --stdio < cases.jsonl"
        )
    config = _verifier_config(call)
    from cosr_jax.verifiers import stdio

    return stdio.serve(config)


def _verifier_serve_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on", flag_values=values)
    flags.DEFINE_integer(
        "port", 8600, "port to listen on; 0: a free one", 0, 65535, flag_values=values
    )
    flags.DEFINE_string(
        "token_file", "", "file with the token that clients must show", flag_values=values
    )


def _verifier_serve(call: Call) -> int:
    config = _verifier_config(call)
    try:
        from cosr_jax.verifiers import service
    except ImportError as error:
        raise UserError(
            "cosr verifier-serve needs aiohttp", "pip install 'cosr-jax[serve]'"
        ) from error
    token = service.read_token(call.flags.token_file, "--token_file")
    return service.serve(config, call.flags.host, call.flags.port, token)


def _rejudge_flags(values: flags.FlagValues) -> None:
    _define_config(values)
    _define_workdir(values, "judge this run's saved completions again, by its own config")
    flags.DEFINE_string("samples", None, "one file of saved completions", flag_values=values)
    flags.DEFINE_string(
        "output", "", "file to write; default: rejudged.jsonl in the workdir", flag_values=values
    )


def _rejudge(call: Call) -> int:
    if (call.flags.workdir is None) == (call.flags.samples is None):
        raise UserError(
            "cosr rejudge: give one of --workdir and --samples",
            "write e.g. --workdir=runs/first, or --samples=runs/first/samples/train.jsonl",
        )
    if call.flags.samples is not None:
        source, config = Path(call.flags.samples), _verifier_config(call)
    else:
        source = _checked_workdir(call.flags.workdir)
        if call.flags.config is None:
            config = override(_saved_config(source), call.overrides).verifier
        else:
            config = _verifier_config(call)
    from cosr_jax.run import rejudge

    return rejudge.run(config, source, call.flags.output)


def _verifier_config(call: Call) -> VerifierConfig:
    """``config.verifier``; without --config every form of an answer counts that the protocol
    knows, and there are as many workers as cores.
    """
    if call.flags.config is not None:
        return load_config(call.flags.config, call.overrides).verifier
    from cosr_jax.config import RunConfig

    defaults = RunConfig()
    verifier = dataclasses.replace(
        defaults.verifier,
        accept=("boxed", "answer_tag", "hashes", "phrase", "bare"),
        workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2,
    )
    return override(dataclasses.replace(defaults, verifier=verifier), call.overrides).verifier


def _doctor_flags(values: flags.FlagValues) -> None:
    _define_workdir(values, "also check that this folder can hold a run")
    flags.DEFINE_string(
        "curator",
        None,
        "check this language-model server instead: its URL, or 'URL model=... key=... input=... "
        "output=...' as in config.curator.llm.endpoints",
        flag_values=values,
    )


def _doctor(call: Call) -> int:
    if call.flags.curator is not None:
        if call.flags.workdir is not None:
            raise UserError("cosr doctor: --curator and --workdir", "check one at a time")
        from cosr_jax.run import curator_check

        return curator_check.check_curator(call.flags.curator)
    from cosr_jax.run import doctor

    return doctor.doctor(None if call.flags.workdir is None else Path(call.flags.workdir))


COMMANDS = {
    "train": Command(
        "train a student in the closed loop, or resume",
        "--config=FILE.py[:ARG] --workdir=DIR [--config.SECTION.KEY=VALUE ...]",
        _train_flags,
        _train,
    ),
    "eval": Command(
        "measure a run's best checkpoint, or the base student",
        "(--workdir=DIR | --config=FILE.py[:ARG]) [--suite=FILE.jsonl]",
        _eval_flags,
        _eval,
    ),
    "export": Command(
        "write the adapter for PEFT, or merged weights",
        "--workdir=DIR [--format=peft|merged] [--step=best|latest|N] [--out=DIR]",
        _export_flags,
        _export,
        takes_config=False,
    ),
    "plan": Command(
        "parameters, mesh and memory of a run, without running it",
        "--config=FILE.py[:ARG] [--topology=v5e:4x4]",
        _plan_flags,
        _plan,
    ),
    "verify": Command(
        "judge cases of any program: JSON lines in, verdicts out",
        "--stdio [--config=FILE.py[:ARG]] [--config.verifier.KEY=VALUE ...]",
        _verify_flags,
        _verify,
    ),
    "verifier-serve": Command(
        "judge cases of other hosts, over HTTP",
        "--token_file=FILE [--port=8600] [--host=127.0.0.1] [--config=FILE.py[:ARG]]",
        _verifier_serve_flags,
        _verifier_serve,
    ),
    "rejudge": Command(
        "judge saved completions again with today's rules",
        "(--workdir=DIR | --samples=FILE.jsonl) [--output=FILE] [--config=FILE.py[:ARG]]",
        _rejudge_flags,
        _rejudge,
    ),
    "doctor": Command(
        "check this machine, or a curator's server",
        "[--workdir=DIR | --curator=URL]",
        _doctor_flags,
        _doctor,
        takes_config=False,
    ),
}


def _define_config(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "config",
        None,
        "Python file with get_config, and its argument after a colon; change any setting with "
        "--config.SECTION.KEY=VALUE",
        flag_values=values,
    )


def _define_workdir(values: flags.FlagValues, meaning: str) -> None:
    flags.DEFINE_string("workdir", None, meaning, flag_values=values)


def _required_config(call: Call, name: str) -> RunConfig:
    if call.flags.config is None:
        raise UserError(
            f"cosr {name}: --config is missing", "write e.g. --config=configs/quickstart.py"
        )
    return load_config(call.flags.config, call.overrides)


def _saved_config(workdir: Path) -> RunConfig:
    from cosr_jax.run.workdir import read_config

    return read_config(workdir)


def _required_workdir(call: Call, name: str) -> Path:
    if not call.flags.workdir:
        raise UserError(f"cosr {name}: --workdir is missing", "write e.g. --workdir=runs/first")
    return _checked_workdir(call.flags.workdir)


def _checked_workdir(text: str) -> Path:
    """What must not wait until JAX is imported, or gets lost in a Path ("gs://a" is "gs:/a")."""
    if "://" in text:
        raise UserError(
            f"--workdir={text} is remote, which is not supported yet",
            "give a local or network-mounted folder and copy it afterwards",
        )
    path = Path(text)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"--workdir={text}: {nearest} is a file", "name a folder")
    return path


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}} {c.summary}" for name, c in COMMANDS.items())
    return (
        "Usage: cosr COMMAND [FLAGS]\n\n"
        f"{commands}\n\n"
        "First run:  cosr train --config=configs/quickstart.py --workdir=runs/quickstart\n"
        "Flags of a command:  cosr COMMAND --help"
    )


def _command_help(name: str, command: Command, values: flags.FlagValues) -> str:
    lines = [f"Usage: cosr {name} {command.usage}", "", f"To {command.summary}.", ""]
    for flag_name in values:
        flag = values[flag_name]
        default = "" if flag.value in (None, False, "") else f" (default: {flag.value})"
        lines.append(
            textwrap.fill(
                flag.help + default,
                width=100,
                initial_indent=f"  --{flag_name:20} ",
                subsequent_indent=" " * 25,
            )
        )
    if command.takes_config:
        lines += ["", "Every setting with its meaning and range: docs/configuration.md"]
    return "\n".join(lines)


def _fail(error: BaseException, line: str, code: int, args: Sequence[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(error)
    print(line, file=sys.stderr)
    return code


def _unexpected(error: Exception, args: Sequence[str]) -> int:
    text = f"cosr: unexpected {type(error).__name__}: {_one_line(error)}"
    hint = "" if "--debug" in args else "; run with --debug for the traceback"
    return _fail(error, text + hint, 1, args)


def _stdout_is_open() -> bool:
    """False once the reader of a piped stdout has gone; worker processes have pipes too."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
