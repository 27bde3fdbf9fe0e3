"""How long to wait before asking a server again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_FIRST_S, _LONGEST_S = 1.0, 60.0


def backoff_s(retry: int, rng: random.Random) -> float:
    """Seconds before retry 0, 1, ...: doubling from 1 to 60, the upper half of it by chance.

    The chance keeps clients that failed together from coming back together.
    """
    longest = min(_FIRST_S * 2.0 ** min(retry, 30), _LONGEST_S)
    return longest * (1.0 + rng.random()) / 2.0


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks us to wait; None where it does not say, or not readably.

    Args:
      headers: looked up as ``Retry-After`` (seconds or an HTTP date, RFC 9110 section 10.2.3) and
        ``retry-after-ms`` (OpenAI's own); their case is the mapping's business.
      now: Unix time in seconds, for dates.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
        return max(date.timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0.0 else None
