"""Which isolation layers work here: each is tried out, not guessed from versions."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

from cosr_jax.types import UserError
from cosr_jax.verifiers.judges import Limits
from cosr_jax.verifiers.sandbox.layers import LAYERS
from cosr_jax.verifiers.sandbox.process import Member, SandboxError, ServerProcess

_log = logging.getLogger(__name__)

_LIMITS = Limits(wall_s=10.0, memory_mb=64, file_mb=1)
#: What has been found out in this process: why a layer does not work, or "" if it does.
_found: dict[str, str] = {}
_announced: set[str] = set()


def check_name(layer: str) -> None:
    """
    Raises:
      UserError: ``layer`` is neither "auto" nor the name of a layer.
    """
    names = ["auto", *(known.name for known in LAYERS)]
    if layer not in names:
        raise UserError(f"{layer!r} is no isolation layer", f"choose among {', '.join(names)}")


async def probe(layer: str) -> str:
    """Why ``layer`` does not work on this machine, or "" if it does.

    A server is started behind it, and a member tries what a student must not be able to do.
    """
    if layer not in _found:
        _found[layer] = await _try(layer)
    return _found[layer]


async def choose(wanted: str) -> str:
    """The layer to use: ``wanted``, or for "auto" the strongest that works.

    Raises:
      UserError: it does not work here; nothing weaker is taken instead.
    """
    candidates = [layer for layer in LAYERS if wanted in ("auto", layer.name)]
    for layer in candidates:
        if not await probe(layer.name):
            if layer.name not in _announced:
                _announced.add(layer.name)
                _log.info("sandbox layer %s: %s", layer.name, layer.promise)
            return layer.name
        if wanted == "auto":
            _log.info("sandbox layer %s does not work here: %s", layer.name, _found[layer.name])
    if wanted == "auto":
        reasons = "; ".join(f"{layer.name}: {_found[layer.name]}" for layer in LAYERS)
        raise UserError(f"no isolation layer works on this machine ({reasons})", LAYERS[0].remedy)
    raise UserError(
        f"the isolation layer {wanted!r} does not work on this machine: {_found[wanted]}",
        candidates[0].remedy,
    )


async def _try(layer: str) -> str:
    server = ServerProcess(layer, ["cosr_jax.verifiers.sandbox.selftest"])
    try:
        await server.start()
    except SandboxError as error:
        return _last_line(str(error))
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        with theirs:
            member = Member(
                "cosr_jax.verifiers.sandbox.selftest:escape", (theirs.fileno(),), b"", _LIMITS
            )
            case = server.spawn([member])
        await case.wait(0)
        answer = await asyncio.get_running_loop().sock_recv(ours, 1 << 16)
        escapes = json.loads(answer or b'["the self-test gave no answer"]')
        return "" if not escapes else f"it lets a program {', '.join(escapes)}"
    except SandboxError as error:
        return _last_line(str(error))
    finally:
        ours.close()
        await server.close()


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
