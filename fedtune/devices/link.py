"""How fast bytes come from a coordinator that is named by its address."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Final

from fedtune.errors import ConfigError

MOST_BYTES: Final = 16 * 10**6
MOST_SECONDS: Final = 5.0
_LEAST_BYTES: Final = 64 * 1024
"""A smaller answer comes in a few packets and says nothing of the speed."""
_PIECE: Final = 1 << 16


def link_bytes_per_s(
    url: str,
    most_bytes: int = MOST_BYTES,
    most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes per second at which one file comes down from an address, until a limit is reached.

    What it is not: it is one connection at one moment, and the way down only; the way up may be a
    tenth of it on a home line, and where that is so `link` of the run file should say it. The time
    to connect is not counted, the slow start of TCP is. A proxy or a cache on the way is measured
    with it. It is `http` or `https`; name a file of some megabytes on the coordinator's machine,
    such as a merged model of an earlier run.

    Args:
        url: `http://...` or `https://...`.
        most_bytes: read no more than this.
        most_seconds: read no longer than this; also the longest wait for any answer.

    Raises:
        ConfigError: the address is of another kind, nothing answers there, or the answer is too
            small to measure.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ConfigError(f"--link needs an http:// or https:// address, got {url!r}")
    try:
        with urllib.request.urlopen(url, timeout=most_seconds) as answer:
            received, seconds = _received(answer, most_bytes, most_seconds, clock)
    except urllib.error.HTTPError as error:
        raise ConfigError(
            f"--link {url}: the server answered {error.code} ({error.reason}); name a file that "
            "it gives to everyone"
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"--link {url}: nothing could be read ({reason}); is the coordinator's machine up?"
        ) from None
    if received < _LEAST_BYTES:
        raise ConfigError(
            f"--link {url}: expected at least {_LEAST_BYTES} bytes to measure with, got "
            f"{received}; name a larger file"
        )
    return received / seconds


def _received(
    answer: HTTPResponse, most_bytes: int, most_seconds: float, clock: Callable[[], float]
) -> tuple[int, float]:
    """Bytes read after the answer's head, and in how many seconds."""
    received, started = 0, clock()
    while received < most_bytes and clock() - started < most_seconds:
        # One read of the socket: a slow server cannot hold on to the loop for a whole piece.
        piece = answer.read1(_PIECE)
        if not piece:
            break
        received += len(piece)
    return received, max(clock() - started, 1e-9)
