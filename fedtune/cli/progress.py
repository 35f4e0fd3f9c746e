"""What a display knows of a run: the sum of the events so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedtune.cli.amounts import one_line
from fedtune.records import Event

_NOTICES = 5
_ROUNDS_FOR_PACE = 5


@dataclass(slots=True)
class DeviceRow:
    """One device in the current round."""

    name: str
    state: Literal["waiting", "training", "reported", "refused", "late"] = "waiting"
    loss_before: float | None = None
    train_loss: float | None = None
    moved_bytes: float | None = None
    seconds: float | None = None


@dataclass(slots=True)
class RunProgress:
    """How far a run is.

    Attributes:
        at_once: devices that train at the same time, in the order of their names; 0: all.
        finished_rounds: rounds that were joined.
        held_out: rounds that the measured adapter had seen -> held-out loss.
        notices: the last warnings, refusals and new plans.
        outcome: `finished`, `interrupted`, `failed`, or empty while the run goes on.
    """

    at_once: int = 0
    run: str = ""
    folder: str = ""
    rounds: int = 0
    devices: int = 0
    round: int = 0
    finished_rounds: int = 0
    rows: dict[str, DeviceRow] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    train_loss: float | None = None
    accuracy: float | None = None
    notices: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTICES))
    warnings: int = 0
    refused: int = 0
    download_bytes: float = 0.0
    upload_bytes: float = 0.0
    pace: deque[float] = field(default_factory=lambda: deque(maxlen=_ROUNDS_FOR_PACE))
    seconds: float | None = None
    outcome: Literal["", "finished", "interrupted", "failed"] = ""
    failure: str = ""
    exports: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take one event into account; an unknown one changes nothing."""
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            handler(self, event.fields)

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining rounds take at the pace of the last ones."""
        if not self.pace or not self.rounds:
            return None
        return (self.rounds - self.finished_rounds) * sum(self.pace) / len(self.pace)

    @property
    def loss_curve(self) -> list[float]:
        """Held-out losses in the order of rounds."""
        return [loss for _, loss in sorted(self.held_out.items())]

    def note(self, text: str) -> None:
        """Keep a line for the list of notices."""
        self.notices.append(one_line(text))

    def mark_training(self) -> None:
        """Say of the first silent devices that they train, and of the others that they wait."""
        silent = [row for row in self.rows.values() if row.state in ("waiting", "training")]
        for position, row in enumerate(silent):
            row.state = "training" if not self.at_once or position < self.at_once else "waiting"


def _run_started(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.run = one_line(fields.get("run", ""))
    progress.folder = one_line(fields.get("folder", ""))
    progress.rounds = int(number(fields, "rounds") or 0)
    progress.devices = int(number(fields, "devices") or 0)


def _run_resumed(progress: RunProgress, fields: Mapping[str, object]) -> None:
    _run_started(progress, fields)
    progress.finished_rounds = int(number(fields, "round") or 0)
    progress.note(f"goes on after round {progress.finished_rounds}")


def _site_excluded(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.note(f"{fields.get('device')} is left out: {fields.get('reason')}")


def _awaited(progress: RunProgress, fields: Mapping[str, object]) -> None:
    """Of `sites_awaited`, before the start, and `round_waits`."""
    here, missing = _names(fields.get("here")), _names(fields.get("missing"))
    waits = f"round {fields.get('round')} waits" if "round" in fields else "the run waits"
    absent = f"; missing: {', '.join(missing)}" if missing else ""
    if here and not missing:
        progress.note(f"all sites are here: {', '.join(here)}")
        return
    progress.note(
        f"{waits} for {fields.get('needed')} sites, here: {', '.join(here) or 'none'}{absent}"
    )


def _site_joined(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.note(f"{fields.get('device')} takes part from round {fields.get('round')} on")


def _device_asked_again(progress: RunProgress, fields: Mapping[str, object]) -> None:
    does = "does its round" if "round" in fields else f"is asked {fields.get('message')}"
    progress.note(f"{fields.get('device')} is back, and {does} again")


def _names(value: object) -> list[str]:
    return [one_line(name) for name in value] if isinstance(value, (list, tuple)) else []


def _calibration_refused(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.note(f"{fields.get('device')} is planned unmeasured: {fields.get('reason')}")


def _round_started(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.round = int(number(fields, "round") or 0)
    progress.rows = {name: DeviceRow(name) for name in sorted(_names(fields.get("devices")))}
    progress.mark_training()


def _device_reported(progress: RunProgress, fields: Mapping[str, object]) -> None:
    name = one_line(fields.get("device"))
    row = progress.rows.setdefault(name, DeviceRow(name))
    row.state = "reported"
    row.loss_before = number(fields, "loss_before")
    row.train_loss = number(fields, "train_loss")
    row.moved_bytes = (number(fields, "download_bytes") or 0) + (
        number(fields, "upload_bytes") or 0
    )
    row.seconds = number(fields, "seconds")
    progress.mark_training()


def _device_refused(progress: RunProgress, fields: Mapping[str, object]) -> None:
    name = one_line(fields.get("device"))
    progress.rows.setdefault(name, DeviceRow(name)).state = "refused"
    progress.refused += 1
    progress.note(f"round {fields.get('round')}, {name} refused: {fields.get('reason')}")
    progress.mark_training()


def _device_late(progress: RunProgress, fields: Mapping[str, object]) -> None:
    name = one_line(fields.get("device"))
    progress.rows.setdefault(name, DeviceRow(name)).state = "late"


def _round_repeated(progress: RunProgress, fields: Mapping[str, object]) -> None:
    names = fields.get("devices")
    asked = [one_line(name) for name in names] if isinstance(names, (list, tuple)) else []
    for name in asked:
        progress.rows[name] = DeviceRow(name)
    progress.note(
        f"round {fields.get('round')} is played again with {', '.join(asked) or 'nobody new'}: "
        f"{fields.get('good')} updates are good so far"
    )
    progress.mark_training()


def _replanned(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.note(
        f"after round {fields.get('round')}, {one_line(fields.get('device'))} planned anew: "
        f"{fields.get('change')}; {fields.get('reason')}"
    )


def _round_finished(progress: RunProgress, fields: Mapping[str, object]) -> None:
    finished = int(number(fields, "round") or 0)
    progress.finished_rounds = finished
    progress.train_loss = number(fields, "train_loss")
    progress.download_bytes += number(fields, "download_bytes") or 0.0
    progress.upload_bytes += number(fields, "upload_bytes") or 0.0
    seconds = number(fields, "seconds")
    if seconds is not None:
        progress.pace.append(seconds)
    held_out = number(fields, "held_out_loss")
    if held_out is not None:
        # It was measured before this round trained: it is the loss after the round before.
        progress.held_out[finished - 1] = held_out


def _evaluated(progress: RunProgress, fields: Mapping[str, object]) -> None:
    held_out = number(fields, "held_out_loss")
    if held_out is not None:
        progress.held_out[int(number(fields, "round") or 0)] = held_out
    progress.accuracy = number(fields, "accuracy")


def _warning(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.warnings += 1
    progress.note(str(fields.get("text", "")))


def _alarm(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.note(f"alarm: {fields.get('text', '')}")


def _exported(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.outcome = "finished"  # a run whose exports alone were left says no more than this
    for name, target in (("paths", progress.exports), ("skipped", progress.skipped)):
        found = fields.get(name)
        if isinstance(found, Mapping):
            target |= {one_line(kind): one_line(text) for kind, text in found.items()}


def _run_finished(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.outcome = "finished"
    progress.seconds = number(fields, "seconds")
    before = number(fields, "held_out_loss_before")
    after = number(fields, "held_out_loss_after")
    if before is not None:
        progress.held_out.setdefault(0, before)
    if after is not None:
        progress.held_out.setdefault(progress.finished_rounds, after)


def _run_interrupted(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.outcome = "interrupted"


def _run_failed(progress: RunProgress, fields: Mapping[str, object]) -> None:
    progress.outcome = "failed"
    progress.failure = one_line(fields.get("reason", ""))


_HANDLERS = {
    "run_started": _run_started,
    "run_resumed": _run_resumed,
    "sites_awaited": _awaited,
    "site_excluded": _site_excluded,
    "site_joined": _site_joined,
    "round_waits": _awaited,
    "device_asked_again": _device_asked_again,
    "calibration_refused": _calibration_refused,
    "round_started": _round_started,
    "device_reported": _device_reported,
    "device_refused": _device_refused,
    "device_late": _device_late,
    "round_repeated": _round_repeated,
    "round_finished": _round_finished,
    "replanned": _replanned,
    "evaluated": _evaluated,
    "warning": _warning,
    "alarm": _alarm,
    "exported": _exported,
    "run_finished": _run_finished,
    "run_interrupted": _run_interrupted,
    "run_failed": _run_failed,
}


def number(fields: Mapping[str, object], name: str) -> float | None:
    """A field as a finite number, or None."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None
