"""Runs untrusted programs: warm fork servers behind an isolation layer, driven from asyncio.

``host`` is the parent's side.  A ``Sandbox`` is one server process with the common libraries
imported; each ``Case`` is a few forks of it that see neither each other nor the machine.
"""

from cosr_jax.verifiers.sandbox.host import Case, Exit, Member, Sandbox, SandboxError

__all__ = ["Case", "Exit", "Member", "Sandbox", "SandboxError"]
