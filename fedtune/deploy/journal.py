"""What a supervisor and its processes say: kept in their files, and shown as it comes.

Whoever watches (a terminal, a service manager's log) may be slow or gone; lines for it then wait in
a short queue and are dropped, because a process must never wait for its reader.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.deploy.logs import KEEP, MOST_BYTES, LogRecord, RotatingFile, log_line, log_record

SUPERVISOR = "supervisor"

_WAITING_LINES = 2_000


class Journal:
    """The logs of one home.

    Args:
        folder: where the files lie, one per process.
        view: shows one record; it may raise OSError, such as when a terminal is gone.
    """

    def __init__(
        self,
        folder: Path,
        view: Callable[[LogRecord], None] | None = None,
        *,
        most_bytes: int = MOST_BYTES,
        keep: int = KEEP,
    ) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._keep = keep
        self._files: dict[str, RotatingFile] = {}
        self._lock = threading.Lock()
        self._shown: queue.Queue[LogRecord | None] = queue.Queue(_WAITING_LINES)
        self._viewer: threading.Thread | None = None
        if view is not None:
            self._viewer = threading.Thread(target=self._show, args=(view,), daemon=True)
            self._viewer.start()

    def add(self, name: str, record: LogRecord) -> None:
        """Keep and show what the process `name` said."""
        self._file(name).write(log_line(record))
        if self._viewer is not None:
            with contextlib.suppress(queue.Full):
                self._shown.put_nowait(record)

    def say(self, level: str, message: str, fields: Mapping[str, object] | None = None) -> None:
        """Keep and show what the supervisor itself says."""
        self.add(SUPERVISOR, log_record(SUPERVISOR, level, message, fields=fields))

    def close(self, wait_s: float = 0.3) -> None:
        """Show what still waits, for a moment, and close the files."""
        if self._viewer is not None:
            with contextlib.suppress(queue.Full):
                self._shown.put_nowait(None)
            self._viewer.join(wait_s)
        with self._lock:
            for file in self._files.values():
                file.close()

    def _file(self, name: str) -> RotatingFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                path = self._folder / f"{name}.log"
                file = self._files[name] = RotatingFile(path, self._most_bytes, self._keep)
            return file

    def _show(self, view: Callable[[LogRecord], None]) -> None:
        while (record := self._shown.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # the stream is gone, or closed
                view(record)
