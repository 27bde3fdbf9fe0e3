"""A closed loop with a language-model curator whose answers are recorded.

Run as a program it records the answers anew, from the scripted curator behind a real server:

python tests/run/llm_runs.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import scripted_curator
from openai_server import Exchange, OpenAiServer, completion
from tiny_runs import finish, settings, start
from tiny_student import write_student

#: Answers of the scripted curator to every question of ``llm_settings``' run.
RECORDINGS = Path(__file__).parent / "recordings"

#: Nobody listens there.
NOWHERE = "http://127.0.0.1:9/v1"


def llm_settings(student: Path, url: str, **llm: Any) -> dict[str, Any]:
    """Three short rounds on counting letters, planned with a model."""
    endpoint = f"gpt-oss {url} model=openai/gpt-oss-20b input=0.12 output=0.48"
    curator = {
        "kind": "llm",
        "zone_low": 0.05,
        "zone_high": 0.8,
        "llm": {
            "endpoints": (endpoint,),
            "audit_samples": 16,
            "tasks_per_round": 8,
            "prompt_tokens": 4_000,
            **llm,
        },
    }
    return settings(student, curator=curator, train={"steps_per_round": 2})


def scripted(exchange: Exchange) -> None:
    """The scripted curator as a server's act; it counts four bytes as a token."""
    text = scripted_curator.reply(exchange.body)
    usage = {"prompt_tokens": len(exchange.text) // 4, "completion_tokens": len(text) // 4}
    exchange.respond(200, json.dumps(completion(text, usage=usage)).encode())


def record() -> None:
    """Replaces ``RECORDINGS``."""
    shutil.rmtree(RECORDINGS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, OpenAiServer(scripted) as server:
        student = write_student(Path(folder) / "student")
        values = llm_settings(student, server.url, mode="record", folder=str(RECORDINGS))
        finish(start(values, Path(folder) / "run", Path(folder) / "programs"))
        print((Path(folder) / "run/report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    record()
