"""A run's numbers as JSON lines and as TensorBoard events.

`metrics.jsonl` gets one line per device and round, one per round, and one per evaluation.
TensorBoard's global step is the round, with one exception that makes the curve right: a round
measures held-out loss before it trains, so that loss belongs to the adapter after the round
before, and `loss/held_out` has the number of rounds that the measured adapter has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fedtune.records import Event
from fedtune.wire.durable import write_durably, writing
from fedtune.wire.events import event_object, json_line
from fedtune_server.curves import Curves

_KINDS = frozenset({"device_reported", "device_refused", "round_finished", "evaluated"})
_Add = Callable[[str, object, int], None]


class MetricsWriter:
    """Takes a run's events and writes its numbers; continues files that exist.

    Args:
        metrics: the JSON-lines file.
        tensorboard: folder of TensorBoard's event files; is created when missing.
        after: the round after which a run goes on: what is there of later ones is removed, since
            they are played again; None: nothing is.

    Raises:
        RunError: the disk is full or cannot be written.
    """

    def __init__(self, metrics: Path, tensorboard: Path, after: int | None = None) -> None:
        self._path = metrics
        with writing(metrics):
            _cut(metrics, after)
            self._file = metrics.open("a", encoding="utf-8", newline="\n")
        self._curves = Curves(tensorboard, None if after is None else after + 1)

    def __call__(self, event: Event) -> None:
        """Write what an event says in numbers; other events are ignored.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        if event.kind not in _KINDS:
            return
        with writing(self._path):
            self._file.write(json_line(event_object(event)) + "\n")
            self._file.flush()
        add = _CURVES.get(event.kind)
        if add is not None:
            add(event.fields, self._add)

    def close(self) -> None:
        """Flush and close all files."""
        with suppress(OSError):  # what a full disk did not take was told of when it was written
            self._file.close()
        self._curves.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, tag: str, value: object, step: int) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._curves.add(tag, float(value), step)


def _cut(path: Path, after: int | None) -> None:
    """Remove a last line that was being written when the process was killed, and later rounds."""
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _stays(line, after)]
    if len(kept) != len(lines):
        write_durably(path, b"".join(kept))


def _stays(line: bytes, after: int | None) -> bool:
    if after is None:
        return True
    try:
        return int(json.loads(line)["round"]) <= after
    except (ValueError, KeyError, TypeError):
        return False


def _device_curves(fields: Mapping[str, object], add: _Add) -> None:
    device, step = _tag(fields["device"]), _round(fields)
    add(f"loss/train/{device}", fields.get("train_loss"), step)
    add(f"loss/held_out/{device}", fields.get("loss_before"), step - 1)
    add(f"seconds/device/{device}", fields.get("seconds"), step)
    add(f"memory/peak_bytes/{device}", fields.get("peak_bytes"), step)


def _round_curves(fields: Mapping[str, object], add: _Add) -> None:
    step = _round(fields)
    add("loss/held_out", fields.get("held_out_loss"), step - 1)
    add("loss/train", fields.get("train_loss"), step)
    add("bytes/down", fields.get("download_bytes"), step)
    add("bytes/up", fields.get("upload_bytes"), step)
    add("seconds/round", fields.get("seconds"), step)
    add("devices/reported", fields.get("reported"), step)
    add("devices/refused", fields.get("refused"), step)
    add("energy/dropped", fields.get("dropped_energy"), step)


def _evaluation_curves(fields: Mapping[str, object], add: _Add) -> None:
    step = _round(fields)
    add("loss/held_out", fields.get("held_out_loss"), step)
    add("accuracy/held_out", fields.get("accuracy"), step)
    devices = fields.get("devices")
    if isinstance(devices, Mapping):
        for device, loss in devices.items():
            add(f"loss/held_out/{_tag(device)}", loss, step)


_CURVES: dict[str, Callable[[Mapping[str, object], _Add], None]] = {
    "device_reported": _device_curves,
    "round_finished": _round_curves,
    "evaluated": _evaluation_curves,
}


def _round(fields: Mapping[str, object]) -> int:
    value = fields["round"]
    assert isinstance(value, int)
    return value


def _tag(device: object) -> str:
    """A device's name as a part of a TensorBoard tag; a slash would open a group."""
    return re.sub(r"[^\w.-]", "_", str(device))
