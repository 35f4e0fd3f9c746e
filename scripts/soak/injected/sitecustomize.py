"""Python runs this at the start of every process of the soak; it lets faults happen inside them.

- `FEDTUNE_SOAK_CLOCK` names a file of one double, by which this machine's clock is wrong from then
  on, in seconds; it may change while the process runs.
- `FEDTUNE_SOAK_ROUTES` names a folder; each file in it is called like a route of the link, with
  `+` for `/`, and has the next request to that route answered with HTTP 500. It is then gone. With
  `lost` before its name, the request does what it shall, and then its answer is HTTP 500.
"""

from __future__ import annotations

import os
import sys
from typing import Self


def _shift_clock(path: str) -> None:
    import datetime
    import mmap
    import struct
    import time

    with open(path, "rb") as file:
        offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real = time.time

    def shifted() -> float:
        return real() + float(struct.unpack("d", offset[:8])[0])

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls.fromtimestamp(shifted(), tz)

        @classmethod
        def utcnow(cls) -> Self:
            return cls.fromtimestamp(shifted(), datetime.UTC).replace(tzinfo=None)

    time.time = shifted
    time.time_ns = lambda: int(shifted() * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]


def _take(folder: str, name: str) -> bool:
    try:
        os.unlink(os.path.join(folder, name))
    except OSError:
        return False
    return True


async def _nobody(message: object) -> None:
    """Hears an answer in the place of who asked."""


def _fail_routes(folder: str) -> None:
    from dataclasses import replace

    from fedtune_server.link import guard, serving

    whole, make = serving.deployed_parts, guard.Guard.__init__

    async def hook(scope):  # type: ignore[no-untyped-def]
        return 500 if _take(folder, scope["path"].replace("/", "+")) else None

    def make_losing(self, flower, *others, **named):  # type: ignore[no-untyped-def]
        async def losing(scope, receive, send):  # type: ignore[no-untyped-def]
            lost = scope["type"] == "http" and _take(
                folder, "lost" + scope["path"].replace("/", "+")
            )
            await flower(scope, receive, _nobody if lost else send)
            if lost:
                await send({"type": "http.response.start", "status": 500, "headers": []})
                await send({"type": "http.response.body", "body": b"lost"})

        make(self, losing, *others, **named)

    guard.Guard.__init__ = make_losing  # type: ignore[method-assign]
    serving.deployed_parts = lambda home: replace(whole(home), hook=hook)


if _clock := os.environ.get("FEDTUNE_SOAK_CLOCK"):
    _shift_clock(_clock)
if "fedtune_server.link" in sys.orig_argv and (_routes := os.environ.get("FEDTUNE_SOAK_ROUTES")):
    _fail_routes(_routes)
