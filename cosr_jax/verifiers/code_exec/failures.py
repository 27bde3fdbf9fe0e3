"""Which category an exception of the student's program belongs to."""

from __future__ import annotations

import errno

_TOO_MUCH_WRITTEN = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


def category_of(error: BaseException) -> str:
    """The failure category of a program that ends with this exception.

    The sandbox refuses system calls with EPERM or EACCES, and ends writing with EFBIG or ENOSPC.
    """
    chain = [error, error.__cause__, *(a for a in error.args if isinstance(a, BaseException))]
    if any(isinstance(each, MemoryError) for each in chain):
        return "memory_limit"
    if any(isinstance(each, PermissionError) for each in chain):
        return "forbidden"
    for each in chain:
        if isinstance(each, OSError) and each.errno in _TOO_MUCH_WRITTEN:
            return "output_limit"
    if isinstance(error, ImportError):
        return "missing_import"
    return "runtime_error"
