"""Writes docs/configuration.md from the field docs of cosr_jax/config.py.

python tools/make_config_docs.py          # write
python tools/make_config_docs.py --check  # exit with 1 if the file is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from cosr_jax.config import RunConfig

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
INTRO = """\
# Configuration

<!-- Written by tools/make_config_docs.py from cosr_jax/config.py; do not edit by hand. -->

A config file starts from the defaults below, changes a few lines and returns the result:

```python
from cosr_jax.config import default_config


def get_config(arg=""):
    config = default_config()
    config.train.learning_rate = 1e-4
    return config
```

Any setting can be changed on the command line. Booleans take a bare flag, tuples a quoted Python
tuple or the flag repeated:

```
cosr train --config=configs/quickstart.py --workdir=runs/x --config.train.learning_rate=3e-4 \\
    --config.lora.rank_stabilised --noconfig.grpo.scale_advantages \\
    --config.eval.test="('sums=addition/*:50', 'all=*:5')"
```

What follows a colon, as in `--config=configs/quickstart.py:seed=1,rounds=5`, goes to
`get_config(arg)`; `cosr_jax.config_args.parse_arg` reads it. The resolved settings are saved as
`config.yaml` in the workdir. Unknown keys, wrong types and values out of range are refused.
"""


def render() -> str:
    """The whole page as Markdown."""
    defaults = RunConfig()
    top = [f for f in dataclasses.fields(RunConfig) if f.metadata]
    sections = [f for f in dataclasses.fields(RunConfig) if not f.metadata]
    parts = [INTRO, _table("config", defaults, top)]
    for field in sections:
        parts += _section(field.name, getattr(defaults, field.name))
    return "\n".join(parts)


def _section(name: str, section: Any) -> list[str]:
    """A section's page parts, then those of the sections within it."""
    doc = type(section).__doc__ or ""
    parts = [f"## {name}\n"]
    if not doc.startswith(f"{type(section).__name__}("):  # not the one that dataclass makes up
        parts.append(f"{doc}\n")
    fields = dataclasses.fields(section)
    parts.append(_table(f"config.{name}", section, [f for f in fields if f.metadata]))
    for inner in fields:
        if not inner.metadata:
            parts += _section(f"{name}.{inner.name}", getattr(section, inner.name))
    return parts


def _table(prefix: str, section: Any, fields: list[dataclasses.Field[Any]]) -> str:
    rows = ["| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for field in fields:
        default = f"`{getattr(section, field.name)!r}`"
        cells = [f"`{prefix}.{field.name}`", default, _allowed(field.metadata)]
        cells.append(field.metadata["doc"])
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows) + "\n"


def _allowed(meta: Any) -> str:
    if meta["choices"] is not None:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    signs = (("low", "≥"), ("above", ">"), ("high", "≤"))
    return ", ".join(f"{sign} {meta[key]}" for key, sign in signs if meta[key] is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    page = render()
    if check:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page:
            return 0
        print(f"{TARGET.name} is out of date; run python tools/make_config_docs.py")
        return 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
