"""A run as a person sees it, and as a program reads it: two listeners for the same events.

`LiveDisplay` keeps a picture of the run in place on a terminal, and prints one plain line per
event of interest where there is none, such as in a log file. `JsonLines` prints every event as one
JSON object.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line, seconds_text
from fedtune.cli.pictures import (
    device_table,
    headline,
    importance_line,
    leaving_line,
    loss_line,
    notice_lines,
    plan_lines,
    plan_table,
    summary,
)
from fedtune.cli.progress import RunProgress, number
from fedtune.records import Event
from fedtune.wire.events import event_object, json_line

_FRAMES_PER_S = 4


class JsonLines:
    """Prints every event as one JSON object on one line.

    Args:
        stream: default: standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout

    def __call__(self, event: Event) -> None:
        """Print one event."""
        self._stream.write(json_line(event_object(event)) + "\n")
        self._stream.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.flush()


class LiveDisplay:
    """Shows a run while it goes on, and its summary when the context ends.

    Args:
        console: where to show it; default: standard output.
        at_once: devices that train at the same time, in the order of their names; 0: all.
        without_end: what to say in the summary of a run whose end was not seen.
        to_go_on: what a person does to continue a run that did not finish.
    """

    def __init__(
        self,
        console: Console | None = None,
        at_once: int = 0,
        without_end: str = "stopped",
        to_go_on: str = "give the same command again",
    ) -> None:
        self._console = console if console is not None else Console()
        self._without_end, self._to_go_on = without_end, to_go_on
        self._progress = RunProgress(at_once=at_once)
        self._lock = threading.Lock()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                refresh_per_second=_FRAMES_PER_S,
                transient=True,
            )

    def __call__(self, event: Event) -> None:
        """Take one event into account and show it."""
        with self._lock:
            if self._is_another_run(event):
                self._progress = RunProgress(at_once=self._progress.at_once)
            self._progress.add(event)
        shown = _ALWAYS.get(event.kind)
        if shown is not None:
            shown(self, event)
        elif self._live is None and event.kind in _PLAIN:
            self._print(_PLAIN[event.kind](self._progress, event))

    def __enter__(self) -> LiveDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._progress.run:
            self._console.print(
                summary(self._progress, self._ascii_only, self._without_end, self._to_go_on)
            )

    @property
    def _ascii_only(self) -> bool:
        return not self._console.encoding.lower().startswith("utf")

    def _is_another_run(self, event: Event) -> bool:
        """Whether a new run begins in the folder of the one that was shown."""
        run = self._progress.run
        return event.kind == "run_started" and run not in ("", one_line(event.fields.get("run")))

    def _picture(self) -> RenderableType:
        """The live picture; the terminal's own thread asks for it."""
        with self._lock:
            progress = self._progress
            if not progress.run:
                return Text("starting", style="dim")
            parts: list[RenderableType] = [headline(progress)]
            if progress.rows and not progress.outcome:
                parts.append(device_table(progress))
            if progress.held_out:
                parts.append(loss_line(progress, self._ascii_only))
            return Group(*parts, *notice_lines(progress))

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _show_plan(self, event: Event) -> None:
        rows = event.fields.get("devices")
        if not isinstance(rows, (list, tuple)):
            return
        if self._live is not None:
            self._console.print(plan_table(rows, self._console.width))
        else:
            for line in plan_lines(rows):
                self._print(line)

    def _show_leaving(self, event: Event) -> None:
        tensors = event.fields.get("tensors")
        if isinstance(tensors, (list, tuple)) and tensors:
            self._print(leaving_line(tensors, event.fields.get("stage")))

    def _show_importance(self, event: Event) -> None:
        self._print(importance_line(event.fields))


# ---------------------------------------------------------------- without a terminal


def _started_line(progress: RunProgress, event: Event) -> str:
    return (
        f"run {progress.run}: {progress.rounds} rounds, {progress.devices} devices, "
        f"folder {progress.folder}"
    )


def _resumed_line(progress: RunProgress, event: Event) -> str:
    return (
        f"run {progress.run} goes on after round {progress.finished_rounds} of {progress.rounds}, "
        f"folder {progress.folder}"
    )


def _site_line(progress: RunProgress, event: Event) -> str:
    fields = event.fields
    return (
        f"{one_line(fields.get('device'))} ({one_line(fields.get('device_class'))}): "
        f"{fields.get('train_samples')} samples to train on, "
        f"{fields.get('held_out_samples')} held out, "
        f"{bytes_text(number(fields, 'memory_bytes') or 0)} memory"
    )


def _round_line(progress: RunProgress, event: Event) -> str:
    fields = event.fields
    parts = [f"round {fields.get('round')}/{progress.rounds}"]
    for name, text in (("held_out_loss", "held-out loss"), ("train_loss", "train loss")):
        loss = number(fields, name)
        if loss is not None:
            parts.append(f"{text} {loss:.4f}" + (" before it" if name == "held_out_loss" else ""))
    parts.append(f"{fields.get('reported')} reported")
    if fields.get("refused"):
        parts.append(f"{fields.get('refused')} refused")
    if fields.get("late"):
        parts.append(f"{fields.get('late')} late")
    down, up = number(fields, "download_bytes") or 0, number(fields, "upload_bytes") or 0
    parts.append(f"{bytes_text(down)} down, {bytes_text(up)} up")
    parts.append(seconds_text(number(fields, "seconds") or 0))
    left = progress.seconds_left
    if left:
        parts.append(f"about {seconds_text(left)} left")
    return ", ".join(parts)


def _notice_line(progress: RunProgress, event: Event) -> str:
    return f"warning: {progress.notices[-1]}"


def _last_notice_line(progress: RunProgress, event: Event) -> str:
    return progress.notices[-1]


def _evaluated_line(progress: RunProgress, event: Event) -> str:
    loss = number(event.fields, "held_out_loss")
    line = f"after round {event.fields.get('round')}: "
    line += "held-out loss not measured" if loss is None else f"held-out loss {loss:.4f}"
    accuracy = number(event.fields, "accuracy")
    return line if accuracy is None else f"{line}, accuracy {accuracy:.1%}"


_PLAIN: dict[str, Callable[[RunProgress, Event], str]] = {
    "run_started": _started_line,
    "run_resumed": _resumed_line,
    "site_reported": _site_line,
    "sites_awaited": _last_notice_line,
    "site_excluded": _notice_line,
    "site_joined": _last_notice_line,
    "round_waits": _last_notice_line,
    "device_asked_again": _last_notice_line,
    "calibration_refused": _notice_line,
    "device_refused": _notice_line,
    "round_repeated": _notice_line,
    "warning": _notice_line,
    "alarm": _last_notice_line,
    "round_finished": _round_line,
    "replanned": _last_notice_line,
    "evaluated": _evaluated_line,
}

_ALWAYS: dict[str, Callable[[LiveDisplay, Event], None]] = {
    "importance_found": LiveDisplay._show_importance,
    "planned": LiveDisplay._show_plan,
    "leaves_device": LiveDisplay._show_leaving,
}
