"""The sandbox that judges use: a fork server that can be started again."""

from __future__ import annotations

from collections.abc import Sequence

from cosr_jax.verifiers.sandbox import probe
from cosr_jax.verifiers.sandbox.process import Case, Exit, Member, SandboxError, ServerProcess

__all__ = ["Case", "Exit", "Member", "Sandbox", "SandboxError"]

#: What tasks use and what costs time to import after the fork.
PRELOAD = (
    "bisect",
    "collections",
    "collections.abc",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "time",
    "typing",
)
#: Imported too, where installed.  They cost every fork: it pays for each page of its server.
LIBRARIES = ("numpy",)


class Sandbox:
    """One warm fork server behind one isolation layer.

    Args:
      layer: "auto" for the strongest that works here, or the name of one of ``layers.LAYERS``.
      preload: modules to import before the first fork, beside the usual ones.
      libraries: the same, for modules that may not be installed.

    Raises:
      UserError: no layer has that name.
    """

    def __init__(
        self, layer: str, preload: Sequence[str] = (), libraries: Sequence[str] = LIBRARIES
    ):
        probe.check_name(layer)
        self._wanted = layer
        self._preload = (*PRELOAD, *preload)
        self._libraries = tuple(libraries)
        self._server: ServerProcess | None = None
        self._layer = ""

    @property
    def layer(self) -> str:
        """The layer in use; "" before ``start``."""
        return self._layer

    @property
    def is_alive(self) -> bool:
        """Whether the server runs, as far as is known."""
        return self._server is not None and self._server.is_alive

    async def start(self) -> None:
        """Starts the server, also after its death, and returns when it is warm.

        Raises:
          UserError: this machine lacks the layer, or every layer.
          SandboxError: the server could not be started though the layer works.
        """
        self._layer = await probe.choose(self._wanted)
        server = ServerProcess(self._layer, self._preload, self._libraries)
        await server.start()
        await self.close()
        self._server = server

    async def close(self) -> None:
        """Ends the server and everything in it, and returns when nothing is left."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    async def spawn(self, members: Sequence[Member]) -> Case:
        """Starts the members of a case, isolated from each other.

        Raises:
          SandboxError: the server is dead; ``start`` makes a new one.
          ValueError: the members have more descriptors together than one message carries.
        """
        if self._server is None:
            raise SandboxError("the sandbox is not started")
        return self._server.spawn(members)
