"""From a config file, its argument and the command line to a ``RunConfig``, with one-line errors.

``ml_collections.config_flags`` reads the overrides (``--config.train.learning_rate=3e-4``); around
it this module turns every way in which a file or a flag can fail into a ``UserError``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError
from ml_collections.config_flags import config_flags

from cosr_jax.config import RunConfig, from_config_dict
from cosr_jax.types import UserError

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)


def parse_arg(arg: str, **defaults: bool | int | float | str) -> types.SimpleNamespace:
    """Reads what follows the colon in ``--config=file.py:small,rounds=5``.

    Args:
      arg: comma-separated names and name=value pairs; a bare name switches a bool on.
      **defaults: every known name with its default, whose type is the value's type.

    Raises:
      UserError: an unknown name, or a value of the wrong type.
    """
    options = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise UserError(
                f"config argument {item!r} is not known", suggest(name, defaults, "known: ")
            )
        kind = type(defaults[name])
        text = text if equals else "true"
        try:
            options[name] = flags.BooleanParser().parse(text) if kind is bool else kind(text)
        except ValueError as error:
            raise UserError(
                f"config argument {item!r} is not of type {kind.__name__}",
                f"write {name}={defaults[name]}",
            ) from error
    return types.SimpleNamespace(**options)


def suggest(name: str, known: Mapping[str, Any] | Sequence[str], otherwise: str) -> str:
    """ "did you mean X?" where a known name is near, or ``otherwise`` and all of them."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise + ", ".join(known)


def load_config(spec: str, overrides: Sequence[str]) -> RunConfig:
    """The checked settings of ``--config=spec`` with command-line overrides.

    Args:
      spec: path of a Python file with ``get_config``, with ``:argument`` if it takes one.
      overrides: flags such as ``--config.seed=1`` or ``--noconfig.grpo.scale_advantages``.

    Raises:
      UserError: the file, its argument or an override is wrong.
    """
    return _resolve(_run_config_file(spec), overrides)


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with command-line overrides, checked again.

    Raises:
      UserError: an override is wrong.
    """
    return _resolve(ConfigDict(dataclasses.asdict(config)), overrides)


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """``args`` as (config overrides, everything else); "--config.a 1" becomes "--config.a=1"."""
    overrides, others = [], []
    rest = iter(args)
    held = next(rest, None)
    while held is not None:
        following = next(rest, None)
        match = _OVERRIDE.fullmatch(held)
        if match is None:
            others.append(held)
        elif match[1] or match[3] is not None or following is None or following.startswith("--"):
            overrides.append(held)
        else:
            overrides.append(f"{held}={following}")
            following = next(rest, None)
        held = following
    return overrides, others


def _resolve(base: ConfigDict, overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        _check_key(base, override)
    values = flags.FlagValues()
    argv = ["cosr", *overrides]
    try:
        # The parser writes each override into ``base``.
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        values(argv)
    except flags.IllegalFlagValueError as error:
        raise _bad_value(base, str(error)) from error
    except flags.Error as error:
        raise UserError(_one_line(error), "write --config.section.key=value") from error
    return from_config_dict(base)


def _check_key(base: ConfigDict, override: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    assert match is not None
    negated, path, value = match[1], match[2], match[3]
    node: Any = base
    where = "config"
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{override}: {where} is a value and has no {name!r}", f"set {where}")
        if name not in node:
            near = difflib.get_close_matches(name, list(node), n=1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"known: {', '.join(node)}"
            raise UserError(f"{override}: {where}.{name} is not a setting", hint)
        node, where = node[name], f"{where}.{name}"
    if isinstance(node, ConfigDict):
        raise UserError(
            f"{override}: {where} is a section", f"set one of its keys: {', '.join(node)}"
        )
    if not isinstance(node, bool) and (negated or value is None):
        raise UserError(f"{override}: {where} needs a value", f"write --{where}={node}")


def _bad_value(base: ConfigDict, message: str) -> UserError:
    match = re.match(r"flag --([\w.]+)=(.*?): ", message, re.DOTALL)
    if match is None:
        return UserError(_one_line(message), "write --config.section.key=value")
    key, text = match[1], match[2]
    default = base
    for name in key.split(".")[1:]:
        default = default[name]
    if isinstance(default, tuple):
        return UserError(
            f"{key}: {text!r} is not a tuple of strings", f"write --{key}=\"('a', 'b')\""
        )
    if isinstance(default, int) and re.fullmatch(r"\d+e\d{1,2}", text):
        return UserError(f"{key}: {text!r} is not written as an int", f"write {int(float(text))}")
    kind = type(default).__name__
    return UserError(f"{key}: {text!r} is not of type {kind}", f"write e.g. --{key}={default}")


def _run_config_file(spec: str) -> ConfigDict:
    path, colon, arg = spec.partition(":")
    if not path:
        raise UserError(
            f"--config={spec} names no file", "write e.g. --config=configs/quickstart.py"
        )
    if not Path(path).is_file():
        here = [str(p) for p in sorted(Path(path).parent.glob("*.py"))]
        raise UserError(
            f"--config={spec}: there is no file {path}",
            suggest(path, here, "there are: ") if here else "check the path",
        )
    with _blamed_on(path):
        get_config = runpy.run_path(path).get("get_config")
    if not callable(get_config):
        raise UserError(
            f"--config={spec}: {path} defines no get_config function",
            "define get_config(arg='') and return the config from it",
        )
    _check_takes_argument(get_config, path, arg if colon else None)
    with _blamed_on(path):
        config = get_config(arg) if colon else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config returned {type(config).__name__}, not a ConfigDict",
            "start from cosr_jax.config.default_config(), change it and return it",
        )
    return ConfigDict(_plain(config, "config", path))


def _check_takes_argument(
    get_config: Callable[..., ConfigDict], path: str, arg: str | None
) -> None:
    signature = inspect.signature(get_config)
    try:
        signature.bind(*([] if arg is None else [arg]))
    except TypeError as error:
        if arg is None:
            raise UserError(f"{path}: get_config needs an argument", f"write {path}:ARG") from error
        raise UserError(
            f"{path}: get_config takes no argument (given {arg!r})", f"write --config={path}"
        ) from error


@contextlib.contextmanager
def _blamed_on(path: str) -> Iterator[None]:
    """Turns whatever a config file raises into a ``UserError`` with file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            line, text = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == path), None)
            text = _one_line(error)
        where = path if line is None else f"{path}:{line}"
        raise UserError(
            f"{where}: {type(error).__name__}: {text}", "mend the config file, or see --debug"
        ) from error


def _plain(config: ConfigDict, where: str, path: str) -> dict[str, Any]:
    """``config`` as nested dicts without references, so that overrides see plain typed values."""
    values: dict[str, Any] = {}
    for name in config:
        try:
            value = config[name]
        except RequiredValueError as error:
            raise UserError(
                f"{path}: {where}.{name} is a required placeholder, which no flag can fill",
                "give it a default in the config file, or read it from get_config's argument",
            ) from error
        is_section = isinstance(value, ConfigDict)
        values[name] = _plain(value, f"{where}.{name}", path) if is_section else value
    return values


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
