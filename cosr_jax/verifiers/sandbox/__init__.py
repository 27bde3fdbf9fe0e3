"""Runs untrusted programs: warm fork servers behind an isolation layer, driven from asyncio.

``host`` is the parent's side: a ``Sandbox`` is one server process with the common libraries
imported, and each ``Case`` a few forks of it that see neither each other nor the machine.  Nothing
is imported here, because the server imports this package too and is to stay small.
"""
