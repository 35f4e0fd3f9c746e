"""A person sees where a run stands, with a terminal and without; a program reads JSON lines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from fedtune.cli.display import JsonLines, LiveDisplay
from fedtune.cli.pictures import importance_line
from fedtune.cli.progress import RunProgress
from fedtune.records import Event

NAMES = ["site-0", "site-1", "site-2"]


def plan(device: str, kind: str = "small", ranks: tuple[int, int] = (4, 8)) -> dict[str, object]:
    return {
        "device": device,
        "device_class": kind,
        "format": "nf4",
        "ranks": {},
        "rank_min": ranks[0],
        "rank_max": ranks[1],
        "trained_matrices": 35,
        "micro_batch": 4,
        "batch_size": 16,
        "sequence_length": 128,
        "checkpointing": True,
        "peak_bytes": 812_000_000,
        "budget_bytes": 1_000_000_000,
        "seconds": 12.3,
        "download_bytes": 812_345,
        "upload_bytes": 412_345,
        "binding": "memory",
    }


def start(devices: int = 3) -> Iterator[Event]:
    yield Event(
        "run_started", {"run": "demo-1", "folder": "runs/demo", "rounds": 4, "devices": devices}
    )
    yield Event(
        "planned",
        {"devices": [plan("site-0"), plan("site-1"), plan("site-2", "large", (16, 16))]},
    )
    yield Event(
        "leaves_device",
        {"tensors": [{"name": "q.a", "bytes": 2000}, {"name": "v.b", "bytes": 1000}]},
    )


def begin(number: int, names: list[str] = NAMES) -> Event:
    return Event("round_started", {"round": number, "devices": names})


def reported(number: int, device: str) -> Event:
    return Event(
        "device_reported",
        {
            "round": number,
            "device": device,
            "loss_before": 3.25,
            "train_loss": 2.5,
            "download_bytes": 81_000,
            "upload_bytes": 40_000,
            "seconds": 1.2,
        },
    )


def finished(number: int, loss: float | None) -> Event:
    return Event(
        "round_finished",
        {
            "round": number,
            "reported": 3,
            "refused": 0,
            "held_out_loss": loss,
            "train_loss": 2.5,
            "seconds": 10.0,
            "download_bytes": 243_000,
            "upload_bytes": 120_000,
        },
    )


REFUSED = Event(
    "device_refused", {"round": 1, "device": "site-1", "reason": "norm [bold]too\x1b[31m\nlarge"}
)
END = Event(
    "run_finished", {"seconds": 127.0, "held_out_loss_before": 3.0, "held_out_loss_after": 1.5}
)


def whole_run() -> Iterator[Event]:
    yield from start()
    yield Event("warning", {"text": "site-2: 3 samples are longer than 128 tokens"})
    for number, loss in enumerate([3.0, 2.5, 2.0, 1.75], start=1):
        yield begin(number)
        yield from (reported(number, name) for name in NAMES)
        yield finished(number, loss)
    yield REFUSED
    yield Event("evaluated", {"round": 4, "held_out_loss": 1.5, "accuracy": 0.875})
    yield END
    yield Event(
        "exported",
        {"paths": {"merged": "runs/demo/exports/merged"}, "skipped": {"onnx": "no exporter"}},
    )


def plain(events: Iterator[Event], width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    with LiveDisplay(Console(file=stream, width=width, force_terminal=False)) as display:
        for event in events:
            display(event)
    stream.flush()
    return raw.getvalue().decode(encoding)


def picture(display: LiveDisplay, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    console.print(display._picture())
    return console.export_text()


def terminal(at_once: int = 0, width: int = 100) -> LiveDisplay:
    return LiveDisplay(Console(file=io.StringIO(), width=width, force_terminal=True), at_once)


def printed(events: Iterator[Event]) -> str:
    """What stays on a terminal above the picture."""
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True, color_system=None)
    with LiveDisplay(console) as display:
        for event in events:
            display(event)
    return stream.getvalue()


def test_without_a_terminal_each_round_is_one_line_of_plain_text() -> None:
    text = plain(whole_run())
    rounds = [line for line in text.splitlines() if line.startswith("round ")]
    assert rounds[0] == (
        "round 1/4, held-out loss 3.0000 before it, train loss 2.5000, 3 reported, "
        "243 kB down, 120 kB up, 10 s, about 30 s left"
    )
    assert len(rounds) == 4
    assert "left" not in rounds[-1]
    assert all(c == "\n" or c.isprintable() for c in text)


MEASURED = [
    Event("leaves_device", {"stage": "calibration", "tensors": [{"name": "q.left", "bytes": 400}]}),
    Event("calibration_refused", {"device": "site-1", "reason": "no memory"}),
    Event(
        "importance_found",
        {
            "method": "spectrum",
            "source": "measured",
            "tokens": 23214,
            "top": {"l.0.down": 0.0623, "l.1.up": 0.05, "l.2.up": 0.04, "l.3.up": 0.03},
        },
    ),
]


@pytest.mark.parametrize("shown", [plain, printed])
def test_what_was_measured_before_the_plan_is_said(
    shown: Callable[[Iterator[Event]], str],
) -> None:
    text = shown(iter(MEASURED))
    assert (
        "once, before the plan, a device sends at most 1 tensors, 400 B, from q.left to "
        "q.left; no sample leaves it\n"
    ) in text
    assert (
        "importance: spectrum, measured on 23,214 tokens; most gain in l.0.down (6.2%), "
        "l.1.up (5.0%), l.2.up (4.0%)\n"
    ) in text


def test_a_measurement_that_is_not_used_is_a_warning() -> None:
    assert "warning: site-1 is planned unmeasured: no memory" in plain(iter(MEASURED)).splitlines()


@pytest.mark.parametrize(
    ("source", "words"), [("drawn", "drawn by the seed"), ("runs/a/i.json", "from runs/a/i.json")]
)
def test_importance_that_was_not_measured_says_where_it_is_from(source: str, words: str) -> None:
    line = importance_line({"method": "random", "source": source, "tokens": 0, "top": {}})
    assert line.startswith("importance: random, ")
    assert line.endswith(words)


def test_without_a_terminal_the_plan_is_a_line_per_group_of_equal_devices() -> None:
    lines = plain(start()).splitlines()
    assert (
        "plan: site-0 and 1 more (small): nf4 +ckpt, rank 4-8 on 35 matrices, batch 4 x 4, "
        "812 MB of 1.0 GB, 12 s a round, 812 kB down, 412 kB up; limited by memory"
    ) in lines
    assert any(line.startswith("plan: site-2 (large): nf4 +ckpt, rank 16 on") for line in lines)
    assert (
        "each round a device sends at most 2 tensors, 3.0 kB, from q.a to v.b; no sample leaves it"
    ) in lines


def test_a_text_from_a_device_can_neither_mark_up_nor_control_the_terminal() -> None:
    text = plain(iter([*start(), begin(1), REFUSED]))
    assert "round 1, site-1 refused: norm [bold]too [31m large" in text
    assert "\x1b" not in text


def test_the_summary_says_what_came_out() -> None:
    summary = plain(whole_run()).partition("run demo-1 finished")[2]
    assert " in 2 min 07 s" in summary
    for words in (
        "4 of 4",
        "held-out loss 3.0000 → 1.5000  █▆▃▂▁",
        "87.5%",
        "972 kB to the devices, 480 kB back",
        "1 update; the reasons are in ledger.jsonl",
        "runs/demo/exports/merged",
        "not written: no exporter",
        "runs/demo",
    ):
        assert words in summary


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Event("run_interrupted", {"round": 1}), "run demo-1 interrupted in round 1"),
        (Event("run_failed", {"reason": "no\ndisk"}), "run demo-1 failed: no disk"),
        (Event("unknown_kind", {}), "run demo-1 stopped"),
    ],
)
def test_a_run_that_did_not_finish_says_so(event: Event, words: str) -> None:
    assert words in plain(iter([*start(), begin(1), event]))


def test_a_stream_that_cannot_encode_blocks_gets_ascii() -> None:
    text = plain(whole_run(), encoding="ascii")
    assert "3.0000 -> 1.5000  @" in text


def test_a_terminal_shows_the_round_its_devices_and_the_losses() -> None:
    display = terminal()
    for event in [*start(), begin(1), reported(1, "site-0")]:
        display(event)
    text = picture(display)
    assert "demo-1" in text
    assert "round 1 of 4" in text
    assert "site-0   reported     3.2500       2.5000   121 kB   1.2 s" in text
    assert text.count("training") == 2
    display(finished(1, 3.0))
    display(begin(2))
    display(finished(2, 2.0))
    display(begin(3))
    text = picture(display)
    assert "round 3 of 4, about 20 s left" in text
    assert "held-out loss 3.0000 → 2.0000  █▁" in text


def test_devices_that_take_turns_wait_for_the_one_at_work() -> None:
    display = terminal(at_once=1)
    for event in [*start(), begin(1), reported(1, "site-0")]:
        display(event)
    states = [line.split()[:2] for line in picture(display).splitlines() if "site-" in line]
    assert states == [["site-0", "reported"], ["site-1", "training"], ["site-2", "waiting"]]


def test_a_large_fleet_shows_those_at_work_and_counts_the_rest() -> None:
    display = terminal(at_once=2)
    names = [f"site-{i:03d}" for i in range(100)]
    for event in [*start(), begin(1, names), *(reported(1, name) for name in names[:50])]:
        display(event)
    text = picture(display)
    assert len(text.splitlines()) < 20
    assert "site-050" in text
    assert "site-051" in text
    assert "and 88 more" in text
    assert "40 reported, 48 waiting" in text


def test_recent_warnings_and_refusals_are_in_the_picture() -> None:
    display = terminal()
    for event in [*start(), begin(1), REFUSED]:
        display(event)
    for number in range(5):
        display(Event("warning", {"text": f"warning {number}"}))
    text = picture(display)
    assert [f"warning {n}" in text for n in range(5)] == [True] * 5
    assert "norm" not in text
    assert "refused" in text


def test_a_new_plan_is_one_line_with_its_change_and_its_reason() -> None:
    replanned = Event(
        "replanned",
        {
            "round": 2,
            "device": "site-1",
            "reason": "a step took 0.84 s in 2 rounds in a row, planned 0.40 s",
            "change": "local_steps 10 -> 4",
        },
    )
    words = (
        "after round 2, site-1 planned anew: local_steps 10 -> 4; a step took 0.84 s in 2 rounds"
    )
    assert words in plain(iter([*start(), begin(3), replanned]), width=200)
    display = terminal(width=200)
    for event in [*start(), begin(3), replanned]:
        display(event)
    assert words in picture(display, width=200)


@pytest.mark.parametrize("width", [80, 140])
def test_the_plan_is_a_table_that_fits_the_terminal(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    with LiveDisplay(console) as display:
        for event in start():
            display(event)
    text = stream.getvalue()
    assert "812 MB of 1.0 GB" in text
    assert "and 1 more" in text
    assert ("35" in text) == (width == 140)
    assert "…" not in text.split("each round")[0]


def test_a_terminal_is_left_with_the_summary_and_its_cursor() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    with LiveDisplay(console) as display:
        for event in whole_run():
            display(event)
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "finished" in text.rpartition("\x1b[?25h")[2]


def test_nothing_is_summed_up_before_a_run_has_started() -> None:
    assert plain(iter([])) == ""


def test_json_lines_are_one_object_per_event() -> None:
    stream = io.StringIO()
    with JsonLines(stream) as lines:
        lines(Event("round_finished", {"round": 1, "held_out_loss": float("nan")}))
        lines(Event("run_finished", {"seconds": 1.0}))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"kind": "round_finished", "round": 1, "held_out_loss": None},
        {"kind": "run_finished", "seconds": 1.0},
    ]


def test_events_with_missing_fields_do_not_stop_the_display() -> None:
    kinds = [
        "run_started",
        "site_reported",
        "site_excluded",
        "planned",
        "leaves_device",
        "round_started",
        "device_reported",
        "device_refused",
        "device_late",
        "round_repeated",
        "round_finished",
        "evaluated",
        "warning",
        "exported",
        "run_finished",
    ]
    plain(iter([Event(kind) for kind in kinds]))
    display = terminal()
    for kind in kinds:
        display(Event(kind))
    picture(display)


def test_a_run_that_replaces_another_is_shown_from_nothing() -> None:
    again = Event("run_started", {"run": "demo-2", "folder": "runs/demo", "rounds": 9})
    alarm = Event("alarm", {"alarm": "replaced", "text": "the run was replaced"})
    shown = plain(iter([*whole_run(), alarm, again]))
    assert "alarm: the run was replaced" in shown
    end = shown[shown.index("run demo-2 stopped") :]
    assert "rounds   0 of 9" in end
    assert "refused" not in end


def test_late_devices_and_repeated_rounds_are_shown() -> None:
    repeated = {"round": 1, "attempt": 2, "devices": ["site-1"], "good": 2}
    events = [
        *start(),
        begin(1),
        Event("device_late", {"round": 1, "device": "site-2", "seconds": 9.0}),
        Event("round_repeated", repeated),
    ]
    assert "warning: round 1 is played again with site-1: 2 updates are good so far" in plain(
        iter(events), width=200
    )
    display = terminal()
    for event in events:
        display(event)
    assert {name: row.state for name, row in display._progress.rows.items()}["site-2"] == "late"
    assert "late" in picture(display)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (
            "sites_awaited",
            {"needed": 3, "here": ["a"], "missing": ["b", "c"]},
            "the run waits for 3 sites, here: a; missing: b, c",
        ),
        (
            "sites_awaited",
            {"needed": 2, "here": ["a", "b", "c"], "missing": []},
            "all sites are here: a, b, c",
        ),
        (
            "round_waits",
            {"round": 2, "needed": 2, "here": [], "missing": ["a"]},
            "round 2 waits for 2 sites, here: none; missing: a",
        ),
        ("site_joined", {"round": 3, "device": "b"}, "b takes part from round 3 on"),
        ("device_asked_again", {"round": 3, "device": "b"}, "b is back, and does its round again"),
        (
            "device_asked_again",
            {"device": "b", "message": "query.calibration"},
            "b is back, and is asked query.calibration again",
        ),
    ],
)
def test_a_person_sees_sites_come_and_go(kind: str, fields: dict[str, object], words: str) -> None:
    progress = RunProgress()
    progress.add(Event(kind, fields))
    assert progress.notices[-1] == words
