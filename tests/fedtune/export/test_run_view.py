"""Where a run stands, told from its folder while it goes on, when it is over, and when killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.export.run_view import RunView, view_run
from fedtune.records import Event
from fedtune_server.folder_lock import FolderLock
from fedtune_server.ledger import Ledger

NAMES = ("north", "south")


def began() -> Iterator[Event]:
    yield Event("run_started", {"run": "seen-1", "folder": "x", "rounds": 4, "devices": 2})
    for name in NAMES:
        yield Event("site_reported", {"device": name, "device_class": "small"})
    rows = [
        {"device": name, "device_class": "small", "format": "nf4", "rank_min": 1, "rank_max": 4,
         "trained_matrices": 7, "ranks": {}, "forms": {}}
        for name in NAMES
    ]  # fmt: skip
    yield Event("planned", {"devices": rows, "makespan_seconds": 2.0})


def played(number: int, loss: float | None, *, refused: str = "") -> Iterator[Event]:
    yield Event("round_started", {"round": number, "devices": list(NAMES)})
    for name in NAMES:
        if name == refused:
            reason = f"norm too large in {number}"
            yield Event("device_refused", {"round": number, "device": name, "reason": reason})
            continue
        fields = {"round": number, "device": name, "loss_before": loss, "train_loss": 2.0 - number}
        yield Event("device_reported", fields)
    entries = [
        {"device": name, "length": 2.0, "cosine": 0.5 + index / 4, "share": 0.5}
        for index, name in enumerate(NAMES)
    ]
    yield Event("updates_compared", {"round": number, "method": "none", "devices": entries})
    yield Event(
        "round_finished",
        {
            "round": number,
            "reported": 2,
            "refused": int(bool(refused)),
            "held_out_loss": loss,
            "seconds": float(number),
            "planned_seconds": 2.0,
            "download_bytes": 100,
            "upload_bytes": 10,
            "dropped_energy": number / 100,
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = {"run": {"rounds": 4, "round_deadline_s": 100}}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def tell(folder: Path, *events: Event) -> None:
    with Ledger(folder / "ledger.jsonl") as ledger:
        for event in events:
            ledger(event)


def going_on(folder: Path) -> RunView:
    """The view while a coordinator has the folder."""
    lock = FolderLock.acquire(folder)
    try:
        return view_run(folder)
    finally:
        lock.release()


def test_a_run_that_goes_on_has_its_rounds_loss_bytes_and_time_left(folder: Path) -> None:
    tell(folder, *began(), *played(1, 5.0), *played(2, 3.0), *played(3, 4.0))
    view = going_on(folder)
    assert (view.state, view.advice, view.run) == ("running", "", "seen-1")
    assert (view.round, view.rounds, view.phase) == (3, 4, "round_finished")
    assert view.held_out == ((0, 5.0), (1, 3.0), (2, 4.0))
    assert (view.held_out_first, view.held_out_last) == (5.0, 4.0)
    assert (view.held_out_best, view.best_round) == (3.0, 1)
    assert (view.seconds_per_round, view.seconds_left) == (2.0, 2.0)
    assert (view.download_bytes, view.upload_bytes) == (300, 30)
    assert (view.dropped_energy, view.dropped_energy_most) == (0.03, 0.03)
    assert view.cosines == (0.5, 0.625, 0.75)


def test_a_device_has_its_plan_loss_refusals_and_drift(folder: Path) -> None:
    changed = {"rank_max": [4, 2], "format": ["nf4", "q2"], "ranks": {"q": [4, 2]}}
    replanned = Event("replanned", {"round": 1, "device": "south", "changed": changed})
    late = Event("device_reported", {"round": 3, "device": "south", "staleness": 2})
    tell(
        folder,
        *began(),
        *played(1, 5.0, refused="north"),
        replanned,
        *played(2, 3.0, refused="north"),
        Event("round_started", {"round": 3, "devices": list(NAMES)}),
        late,
    )
    north, south = going_on(folder).devices
    assert (north.device, north.device_class, north.format) == ("north", "small", "nf4")
    assert (north.rank_min, north.rank_max, north.trained_matrices) == (1, 4, 7)
    assert (north.last_round, north.refused, north.refused_round) == (0, 2, 2)
    assert north.refused_reason == "norm too large in 2"
    assert (south.format, south.rank_max, south.last_round, south.late) == ("q2", 2, 3, 1)
    assert (south.length, south.cosine, south.share, south.refused) == (2.0, 0.75, 0.5, 0)
    assert going_on(folder).refused == 2


def test_times_are_since_the_last_event(folder: Path) -> None:
    tell(folder, *began())
    view = view_run(folder, datetime.now(UTC) + timedelta(seconds=90))
    assert view.idle_seconds == pytest.approx(90, abs=20)
    assert view.started is not None


@pytest.mark.parametrize(
    ("last", "state", "words"),
    [
        ([Event("exported", {"paths": {"merged": "m"}})], "finished", ""),
        ([Event("run_interrupted", {"round": 1})], "interrupted", "run the same command again"),
        ([Event("run_failed", {"reason": "disk full"})], "failed", "disk full; run the same"),
        ([], "stopped", "it stopped without a word; run the same command again to continue"),
        # Trained, and killed before its exports were written.
        ([Event("run_finished", {})], "stopped", "without a word"),
    ],
)
def test_a_run_that_is_over_says_how_and_what_to_do(
    folder: Path, last: list[Event], state: str, words: str
) -> None:
    tell(folder, *began(), *played(1, 5.0), *last)
    view = view_run(folder)
    assert view.state == state
    assert words in view.advice
    assert bool(words) == bool(view.advice)
    assert view.seconds_left is None


def test_a_continued_run_goes_on_and_may_have_more_rounds(folder: Path) -> None:
    interrupted = Event("run_interrupted", {"round": 1})
    tell(folder, *began(), *played(1, 5.0), interrupted, Event("run_resumed", {"round": 1}))
    assert going_on(folder).state == "running"
    settings = {"run": {"rounds": 9}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert going_on(folder).rounds == 9


def test_a_round_that_was_played_twice_counts_once(folder: Path) -> None:
    tell(folder, *began(), *played(1, 5.0), *played(1, 4.5))
    view = going_on(folder)
    assert (view.round, view.download_bytes, view.held_out) == (1, 100, ((0, 4.5),))


def test_a_folder_with_a_status_and_no_ledger_yet_is_starting(folder: Path) -> None:
    (folder / "status.json").write_text('{"state": "running"}', encoding="utf-8")
    view = going_on(folder)
    assert (view.state, view.round, view.started, view.devices) == ("starting", 0, None, ())
    assert view_run(folder).state == "stopped"
    (folder / "status.json").write_text('{"state": "failed"}', encoding="utf-8")
    assert view_run(folder).state == "failed"


def test_unknown_events_and_fields_change_nothing(folder: Path) -> None:
    tell(folder, *began(), *played(1, 5.0))
    before = going_on(folder)
    tell(
        folder,
        Event("invented_later", {"round": 9, "devices": 7}),
        Event("updates_compared", {"round": 2, "devices": [3, {"device": "odd"}]}),
    )
    after = going_on(folder)
    assert (after.state, after.round, after.held_out) == (before.state, 1, before.held_out)
    assert after.devices == before.devices


def test_a_thousand_devices_are_viewed_in_one_pass(folder: Path) -> None:
    names = [f"d{i:04d}" for i in range(1000)]
    rows = [{"device": name, "format": "nf4"} for name in names]
    events = [
        Event("device_reported", {"round": number, "device": name, "loss_before": 1.0})
        for number in range(1, 6)
        for name in names
    ]
    tell(folder, Event("planned", {"devices": rows}), *events)
    view = going_on(folder)
    assert len(view.devices) == 1000
    assert {device.last_round for device in view.devices} == {5}
