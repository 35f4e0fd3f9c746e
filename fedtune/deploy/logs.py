"""Logs of processes that run for weeks: one JSON object per line, in files that do not grow.

    {"time": "2026-11-27T16:20:01.250Z", "level": "info", "process": "link",
     "logger": "fedtune_server.link", "message": "listening", "fields": {"port": 9400}}

Under a supervisor a process writes its lines to its error stream, and the supervisor, which is the
only writer of a file, keeps them: the last words of a process that was killed are kept, too. Alone,
a process writes to its own file. No log ever ends a process: where a disk is full, lines are lost,
and their number is told once there is room again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from fedtune.config import is_supervised

MOST_BYTES = 10_000_000
"""Size of one log file."""
KEEP = 5
"""Files that are kept of one log: the one that is written, and older ones."""
MOST_LINE_CHARACTERS = 32_768

LogRecord: TypeAlias = Mapping[str, Any]  # JSON values

_LEVELS = ("debug", "info", "warning", "error", "critical")
_FOREIGN = ("flwr", "uvicorn", "uvicorn.error", "uvicorn.access", "grpc")
_CHATTY = ("alembic", "httpcore", "httpx", "uvicorn.access")
"""They tell of every request or step; a node asks every three seconds, for weeks."""
_RETRY_S = 1.0
"""How long a file that could not be written is left alone: opening it anew costs time."""


def log_record(
    process: str,
    level: str,
    message: str,
    *,
    logger: str = "",
    fields: Mapping[str, object] | None = None,
    exception: str = "",
    time_s: float | None = None,
) -> dict[str, Any]:
    """One line of a log, as an object.

    Args:
        time_s: seconds since 1970; default: now.
    """
    moment = datetime.fromtimestamp(time.time() if time_s is None else time_s, UTC)
    record: dict[str, Any] = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "process": process,
        "logger": logger,
        "message": message[:MOST_LINE_CHARACTERS],
    }
    if fields:
        record["fields"] = dict(fields)
    if exception:
        record["exception"] = exception[-MOST_LINE_CHARACTERS:]
    return record


def log_line(record: LogRecord) -> str:
    """The object on one line of ASCII, without its end."""
    return json.dumps(record, default=str)


def parse_line(process: str, line: str) -> dict[str, Any]:
    """The record that a process wrote; any other text becomes the message of one."""
    text = line.rstrip("\r\n")
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if (
            isinstance(found, dict)
            and isinstance(found.get("message"), str)
            and found.get("level") in _LEVELS
        ):
            return {**found, "process": process}
    return log_record(process, _guessed_level(text), text, logger="output")


def _guessed_level(text: str) -> str:
    """Python's and Flower's own forms: `ERROR : ...`, `WARNING: ...`, `ValueError: ...`."""
    first = text.split(maxsplit=1)[0].rstrip(":").lower() if text.strip() else ""
    if first in _LEVELS:
        return first
    if first in ("traceback", "fatal") or first.endswith(("error", "exception")):
        return "error"
    return "info"


class JsonFormatter(logging.Formatter):
    """Formats what the standard library's loggers are given.

    `logger.info("listening", extra={"fields": {"port": 9400}})` fills `fields`.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        return log_line(
            log_record(
                self._process,
                record.levelname.lower() if record.levelname.lower() in _LEVELS else "info",
                _message(record),
                logger=record.name,
                fields=fields if isinstance(fields, Mapping) else None,
                exception=self.formatException(record.exc_info) if record.exc_info else "",
                time_s=record.created,
            )
        )


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit the text
        return f"{record.msg} {record.args}"


class RotatingFile:
    """A log file of bounded size, with older ones beside it: `link.log`, `link.log.1`, ...

    Writing never raises: lines that a disk has no room for are counted and told of later.

    Args:
        path: the newest file.
        most_bytes: size at which a new file is begun.
        keep: files in all, at least 1.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES, keep: int = KEEP) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._keep = keep
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._bytes = 0
        self._torn = False  # the last line was cut short
        self._lost = 0
        self._retry_at = 0.0

    def write(self, line: str) -> None:
        """Append one line, given without its end."""
        with self._lock:
            if self._lost and time.monotonic() < self._retry_at:
                self._lost += 1
                return
            try:
                self._append(line)
            except OSError:
                self._lost += 1
                self._retry_at = time.monotonic() + _RETRY_S
                self._close()

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        with self._lock:
            self._close()

    def _append(self, line: str) -> None:
        if self._handle is not None and self._bytes >= self._most_bytes:
            self._close()
            self._rotate()
        if self._handle is None:
            self._open()
        if self._lost:
            words = f"{self._lost} lines of this log were lost: its disk had no room for them"
            self._put(log_line(log_record(self._path.stem, "warning", words, logger="logs")))
            self._lost = 0
        self._put(line)

    def _put(self, line: str) -> None:
        assert self._handle is not None
        content = (b"\n" if self._torn else b"") + line.encode("ascii", "backslashreplace") + b"\n"
        self._torn = True
        written = os.write(self._handle, content)
        self._bytes += written
        if written < len(content):
            raise OSError("the disk took only a part of a line")
        self._torn = False

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._handle = os.open(self._path, flags, 0o640)
        self._bytes = os.fstat(self._handle).st_size

    def _rotate(self) -> None:
        for older in range(self._keep - 1, 0, -1):
            newer = self._path if older == 1 else self._numbered(older - 1)
            if newer.exists():
                os.replace(newer, self._numbered(older))
        if self._keep == 1:
            self._path.unlink(missing_ok=True)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)


class _FileHandler(logging.Handler):
    def __init__(self, file: RotatingFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self.format(record))


class _StreamHandler(logging.StreamHandler[Any]):
    """To the error stream; a stream that is closed or full ends nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def configure(
    name: str,
    folder: Path,
    *,
    level: int = logging.INFO,
    most_bytes: int = MOST_BYTES,
    keep: int = KEEP,
) -> None:
    """Send all that this process logs to one place, as JSON lines.

    Flower's and uvicorn's loggers are taken over as they are at this moment: call it after Flower
    is imported (a second call does no harm), and give uvicorn `log_config=None`.

    Args:
        name: of the process, such as `link`; its file is `NAME.log`.
        folder: where log files lie. Under a supervisor it is not used.
        most_bytes: size of one file.
        keep: number of files.
    """
    handler: logging.Handler
    if is_supervised():
        handler = _StreamHandler(sys.stderr)
    else:
        handler = _FileHandler(RotatingFile(folder / f"{name}.log", most_bytes, keep))
    handler.setLevel(level)  # Flower sets its own logger to the finest
    handler.setFormatter(JsonFormatter(name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for foreign in _FOREIGN:
        logger = logging.getLogger(foreign)
        logger.handlers.clear()
        logger.propagate = True
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    words = f"{kind.__name__}: {error}"
    logging.getLogger("fedtune").critical(words, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        _log_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
