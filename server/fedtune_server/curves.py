"""Scalars as TensorBoard's event files, written by the caller's own thread.

tensorboardX's SummaryWriter hands them to a thread. On a full disk that thread ends, its queue of
ten fills, and whoever adds the next scalar waits for ever. Curves are a convenience: on a disk that
does not take them they end, and the run goes on.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from io import FileIO
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event as BoardEvent
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

_VERSION = "brain.Event:2"

_log = logging.getLogger(__name__)


class Curves:
    """One event file, beside those of earlier starts.

    Args:
        folder: is made when missing.
        first_step: what older files have at this step and beyond is not shown; None: all is.
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        self._file: FileIO | None = None
        # Readers take the files in the order of their names, which begin with whole seconds.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{now % 10**9:09d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / name).open("ab", buffering=0)
        except OSError as error:
            self._end(error)
        self._write(BoardEvent(wall_time=time.time(), file_version=_VERSION))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(BoardEvent(step=first_step, file_version=_VERSION))
            self._write(BoardEvent(step=first_step, session_log=start))

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        point = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(BoardEvent(step=step, wall_time=time.time(), summary=point))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: BoardEvent) -> None:
        """Append a record: length, its checksum, the event, its checksum."""
        if self._file is None:
            return
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        try:
            self._file.write(length + checksums[0] + data + checksums[1])
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        _log.warning("the curves for TensorBoard end here: %s", error)
        self.close()
