"""A main loop's sleep, which signals, other threads and the ends of processes cut short.

Handlers only count; what they mean is done in the loop. A `threading.Event` would not do: setting
it inside a handler, while the same thread waits for it, may deadlock.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any

_STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")
_WAKES = ("SIGCHLD",)


class Wake:
    """While it is entered, in the main thread, signals that ask for an end are counted here."""

    def __init__(self) -> None:
        self._stops = 0
        self._ours, self._others = socket.socketpair()
        for end in (self._ours, self._others):
            end.setblocking(False)
        self._handlers: dict[signal.Signals, Any] = {}  # Any: what signal.signal returns
        self._wakeup_before = -1

    @property
    def stops(self) -> int:
        """How often an end was asked for."""
        return self._stops

    def ask_to_stop(self) -> None:
        """Count one more; from any thread."""
        self._stops += 1
        self._rouse()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something happens, at most so long."""
        select.select([self._ours], [], [], max(0.0, timeout_s))
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass

    def __enter__(self) -> Wake:
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(
                self._others.fileno(), warn_on_full_buffer=False
            )
            for name in (*_STOPS, *_WAKES):
                number = getattr(signal, name, None)
                # A service that is started with nohup goes on when its terminal closes.
                if number is None or (
                    name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
                ):
                    continue
                handler = self._stop if name in _STOPS else self._ignore
                self._handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_before)
        self._handlers.clear()
        self._ours.close()
        self._others.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """SIGCHLD: that it came is enough."""

    def _rouse(self) -> None:
        with contextlib.suppress(OSError):
            self._others.send(b".")
