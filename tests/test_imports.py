"""Imports go one way, and the rooms that must start fast stay free of JAX."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import cosr_jax

PACKAGE = Path(cosr_jax.__file__).parent
BASE = {"types", "protocols", "config", "buckets"}
#: What each room (a folder or a module) may import; rooms side by side never know each other.
ALLOWED = {
    "types": set(),
    "buckets": set(),
    "protocols": {"types"},
    "config": {"types"},
    "config_args": {"types", "config"},
    "curator": BASE,
    "tasks": BASE,
    "verifiers": BASE,
    "sharding": BASE,
    "student": BASE | {"sharding"},
    "rollout": BASE | {"sharding", "student"},
    "train": BASE | {"sharding", "student"},
    "run": BASE
    | {"sharding", "student", "rollout", "train", "curator", "tasks", "verifiers", "config_args"},
    "main": BASE | {"config_args", "run", "verifiers"},
}
JAX_FREE = (
    "types",
    "protocols",
    "config",
    "buckets",
    "config_args",
    "curator",
    "tasks",
    "verifiers",
    "main",
)
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax")
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    return name.split(".")[1]


def imported(path: Path) -> set[str]:
    """Full names of all modules, or names in them, that a file imports anywhere in it."""
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(relative, package)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def own_rooms(names: set[str]) -> set[str]:
    rooms = {room(n) for n in names if n.startswith("cosr_jax.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path):
    here = room(module_name(path))
    foreign = own_rooms(imported(path)) - {here} - ALLOWED[here]
    assert not foreign, f"{module_name(path)} may not import {sorted(foreign)}"


def test_every_room_has_a_rule_and_every_rule_a_room():
    assert {room(module_name(p)) for p in MODULES} == set(ALLOWED)


def test_a_forbidden_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "cosr_jax")
    path = tmp_path / "cosr_jax" / "tasks" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from ..verifiers import pool\n    import cosr_jax.student.lora\n"
    )
    assert own_rooms(imported(path)) == {"verifiers", "student"}


def test_jax_free_rooms_import_no_jax_even_indirectly():
    names = [module_name(p) for p in MODULES if room(module_name(p)) in JAX_FREE]
    assert len(names) >= len(JAX_FREE)
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
