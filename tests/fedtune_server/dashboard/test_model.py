"""What the page shows, from the desk's records and a run's ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.certificates import days_left
from fedtune.export.ledger_facts import LedgerFacts
from fedtune.export.quantities import UNKNOWN
from fedtune_server.dashboard.attention import (
    attention,
    troubled_processes,
)
from fedtune_server.dashboard.feed import Feed, Readings
from fedtune_server.dashboard.model import chosen_run, parts
from fedtune_server.dashboard.readings import Reading, RunReader
from fedtune_server.dashboard.timeline import current_round
from fedtune_server.desk.view import Refusal, RunEntry, SiteEntry, SiteReport

from .conftest import HOSTILE, T0, FakeDesk, plan

Tree = Mapping[str, Any]


def shown(desk: FakeDesk, wanted: str = "", at_s: float = 340) -> dict[str, Tree]:
    """The parts, as the page receives them."""
    readings = Readings(desk, Path("no.crt"), Path("no.json"))
    return {
        name: json.loads(json.dumps(part))
        for name, part in parts(readings.deployment(wanted, T0 + timedelta(seconds=at_s))).items()
    }


def test_a_running_run_is_shown_before_the_newest(desk: FakeDesk) -> None:
    desk.add_run("spring")
    desk.add_run("summer", state="finished")
    for wanted, found in (("", "spring"), ("summer", "summer"), ("nobody", "spring")):
        run = chosen_run(desk.runs(), wanted)
        assert run is not None
        assert run.name == found
    assert chosen_run([], "") is None


def test_a_row_of_the_fleet_has_plan_state_step_bytes_memory_and_speed(told: FakeDesk) -> None:
    row = shown(told)["site/south"]
    assert row["plan"] == "nf4, ranks 2 to 16, micro-batch 4"
    assert (row["mark"], row["state"]) == ("busy", "training")
    assert (row["round"], row["step"], row["steps"]) == (3, 7, 20)
    assert (row["down"], row["up"]) == ("4.00 MB", "1.00 MB")
    assert (row["used"], row["predicted"], row["allowed"]) == ("1.25 GB", "1.40 GB", "2.00 GB")
    assert row["used_share"] == pytest.approx(0.625)
    assert (row["link_down"], row["link_up"]) == ("2.40 MB/s", "310 kB/s")
    assert row["device"] == "Linux, 8 cores, 16 GB"


def test_a_new_plan_is_the_one_that_is_shown(told: FakeDesk) -> None:
    changed = {"peak_bytes": [1_400_000_000, 700_000_000], "micro_batch": [4, 1]}
    changed |= {"format": ["nf4", "q3"], "rank_max": [16, 2], "seconds": [20.0, 35.0]}
    told.tell("spring", "replanned", 331, round=2, device="south", changed=changed)
    found = shown(told)
    assert found["site/south"]["plan"] == "q3, rank 2, micro-batch 1"
    assert found["site/south"]["predicted"] == "700 MB"
    assert {s["device"]: s["planned_s"] for s in found["round"]["spans"]}["south"] == 35.0


def test_sites_of_the_registry_and_devices_of_the_run_share_a_table(told: FakeDesk) -> None:
    told.site_entries = told.site_entries[2:]  # two devices of the run lost their entry
    found = shown(told)
    assert sorted(found["fleet"]["order"]) == sorted(["north", "south", "west", "east", HOSTILE])
    assert found["site/west"]["state"] == "invited"
    assert found["site/east"]["state"] == "not in the registry"


def test_a_site_that_is_offline_or_revoked_is_marked_bad(desk: FakeDesk) -> None:
    desk.site_entries = [
        SiteEntry("gone", "enrolled", False, ""),
        SiteEntry("out", "revoked", True, ""),
        SiteEntry("here", "enrolled", True, ""),
    ]
    found = shown(desk)
    marks = {name: found[f"site/{name}"]["mark"] for name in ("gone", "out", "here")}
    assert marks == {"gone": "bad", "out": "bad", "here": "good"}


def test_losses_are_those_of_the_ledger(told: FakeDesk) -> None:
    loss = shown(told)["loss"]
    assert loss["held_out"] == [[0, 4.0], [1, 2.0]]
    assert loss["train"] == [[1, 3.9], [2, 1.95]]
    assert loss["x_ticks"] == [0, 1, 2]
    assert min(loss["y_ticks"]) <= 1.95
    assert max(loss["y_ticks"]) >= 4.0


def test_a_long_curve_is_thinned_and_keeps_its_last_point(desk: FakeDesk) -> None:
    desk.add_run("long")
    for number in range(1, 1202):
        desk.tell("long", "round_finished", number, round=number, train_loss=1.0 / number)
    points = shown(desk)["loss"]["train"]
    assert len(points) <= 400
    assert points[-1][0] == 1201


def test_the_time_line_says_who_works_reported_refused_and_is_late(told: FakeDesk) -> None:
    line = shown(told)["round"]
    spans = {span["device"]: span for span in line["spans"]}
    assert (line["round"], line["closed_s"], line["over"]) == (3, None, False)
    assert (spans["south"]["outcome"], spans["south"]["end_s"]) == ("at work", None)
    assert (spans["north"]["outcome"], spans["north"]["end_s"]) == ("reported", 12.0)
    assert (spans["east"]["outcome"], spans["east"]["end_s"]) == ("late", 30.0)
    assert (spans[HOSTILE]["outcome"], spans[HOSTILE]["note"]) == ("refused", f"norm {HOSTILE}")
    assert {span["planned_s"] for span in line["spans"]} == {20.0}


def test_a_repeated_round_starts_anew_for_whom_it_asks(desk: FakeDesk) -> None:
    desk.add_run("spring")
    desk.tell("spring", "round_started", 0, round=1, devices=["a", "b"])
    desk.tell("spring", "device_reported", 5, round=1, device="a", staleness=0)
    desk.tell("spring", "device_refused", 6, round=1, device="b", reason="no")
    desk.tell("spring", "round_repeated", 8, round=1, attempt=2, devices=["b"], good=["a"])
    desk.tell("spring", "device_reported", 9, round=1, device="c", staleness=1)
    line = shown(desk)["round"]
    spans = {span["device"]: (span["outcome"], span["start_s"]) for span in line["spans"]}
    assert line["attempt"] == 2
    assert spans == {"a": ("reported", 0.0), "b": ("at work", 8.0), "c": ("joined late", 9.0)}


@pytest.mark.parametrize("kind", ["run_interrupted", "run_failed"])
def test_the_time_line_ends_with_the_run(told: FakeDesk, kind: str) -> None:
    told.tell("spring", kind, 345, reason="the operator stopped it")
    found = shown(told)["round"]
    spans = {span["device"]: (span["outcome"], span["end_s"]) for span in found["spans"]}
    assert spans["south"] == ("cut off", 45.0)  # it was at work
    assert spans["north"] == ("reported", 12.0)
    assert (found["over"], found["closed_s"]) == (True, None)


def test_before_the_first_round_there_is_no_time_line(desk: FakeDesk) -> None:
    desk.add_run("spring")
    desk.tell("spring", "run_started", 0, run="spring-1")
    assert shown(desk)["round"] == {"round": 0, "spans": []}
    assert current_round((), LedgerFacts()) is None


def test_refusals_of_sites_calls_and_updates_stand_together(told: FakeDesk) -> None:
    found = shown(told)["refusals"]["refusals"]
    assert [(each["what"], each["who"]) for each in found] == [
        ("update, round 3", HOSTILE),
        ("call", HOSTILE),
    ]


def test_work_that_a_site_would_not_do_is_shown_once(told: FakeDesk) -> None:
    """The site tells it at once, and the run when the site's answer comes."""
    told.refused.append(Refusal(told.refused[0].time, "north", "work", "not at this hour"))
    told.refused.append(Refusal(told.refused[0].time, "south", "work", "not at this hour"))
    told.tell("spring", "device_refused", 341, round=3, device="north", reason="not at this hour")
    found = shown(told)["refusals"]["refusals"]
    assert [each["what"] for each in found if each["who"] == "north"] == ["update, round 3"]
    assert [each["what"] for each in found if each["who"] == "south"] == ["work"]


def test_a_site_that_is_gone_uses_no_memory_and_an_old_refusal_is_no_state(
    desk: FakeDesk,
) -> None:
    desk.add_run("spring")
    for name, online, state in (("a", True, "idle"), ("b", True, "refusing"), ("c", False, "idle")):
        report = SiteReport(state=state, memory_bytes=10**9, last_refusal="not at this hour")
        desk.site_entries.append(SiteEntry(name, "enrolled", online, "", report))
    rows = {name: shown(desk)[f"site/{name}"] for name in "abc"}
    assert [rows[name]["used"] for name in "abc"] == ["1.00 GB", "1.00 GB", "\N{EN DASH}"]
    assert [rows[name]["refusal"] for name in "abc"] == ["", "not at this hour", ""]
    assert [rows[name]["online"] for name in "abc"] == [True, True, False]


def test_a_privacy_budget_is_absent_until_an_event_names_an_epsilon(told: FakeDesk) -> None:
    assert shown(told)["privacy"]["spent"] == []
    told.tell("spring", "privacy_spent", 331, round=3, device="north", epsilon=1.234, delta=1e-5)
    told.tell("spring", "privacy_spent", 332, round=3, device="north", epsilon=2.5, delta=1e-5)
    assert shown(told)["privacy"]["spent"] == [
        {"who": "north", "epsilon": "2.5", "delta": "1.0e-05", "budget": UNKNOWN}
    ]


def test_the_last_events_come_newest_first_and_clipped(told: FakeDesk) -> None:
    told.tell("spring", "warning", 333, text="x" * 10_000)
    lines = shown(told)["ledger"]["lines"]
    assert lines[0]["kind"] == "warning"
    assert len(lines[0]["text"]) == 300
    assert len(lines) <= 30


def test_amounts_in_events_have_their_unit(told: FakeDesk) -> None:
    fields = {"free_bytes": 14_900_000_000, "seconds": 13.3, "planned_seconds": 5.0}
    told.tell("spring", "round_finished", 342, round=3, **fields, paths={"report": "r.html"})
    text = shown(told)["ledger"]["lines"][0]["text"]
    assert text == "round 3, free 14.9 GB, seconds 13.3 s, planned 5.00 s, paths r.html"


def test_the_parts_do_not_change_with_time_alone(told: FakeDesk) -> None:
    assert shown(told, at_s=340) == shown(told, at_s=350)


def test_a_ledger_that_cannot_be_read_is_an_alarm_and_no_error(told: FakeDesk) -> None:
    with (told.folder("spring") / "ledger.jsonl").open("a", encoding="utf-8") as ledger:
        ledger.write("not json\n")
    (alarm,) = (a for a in shown(told)["alarms"]["alarms"] if a["name"] == "ledger")
    assert "is not a JSON object" in alarm["text"]


# ---------------------------------------------------------------- attention


def test_alarms_of_the_events_are_shown_with_their_time(told: FakeDesk) -> None:
    for number, loss in enumerate((2.1, 2.2, 2.3), start=3):
        told.tell("spring", "round_finished", 340 + number, round=number, held_out_loss=loss)
    (alarm,) = (a for a in shown(told, at_s=350)["alarms"]["alarms"] if a["name"] == "loss")
    assert alarm["time"].startswith("2026-11-27T10:05:45")


def test_silence_is_an_alarm_until_the_next_event(told: FakeDesk) -> None:
    readings = Readings(told, Path("no.crt"), Path("no.json"))

    def names(at_s: float) -> list[str]:
        found = readings.deployment("", T0 + timedelta(seconds=at_s)).attention
        return [each.name for each in found]

    assert "silence" not in names(340)
    assert names(2000).count("silence") == 1
    assert names(2010).count("silence") == 1
    told.tell("spring", "device_reported", 2012, round=3, device="south", staleness=0)
    assert "silence" not in names(2013)


def test_a_site_that_nobody_waits_for_is_no_alarm(desk: FakeDesk) -> None:
    desk.add_run("spring", state="stopped", devices=("north", "south"))
    desk.add_run("summer", devices=("south",))
    desk.site_entries = [
        SiteEntry("north", "enrolled", False, ""),  # of a stopped run
        SiteEntry("south", "revoked", False, ""),  # by the operator's own will
    ]
    assert shown(desk)["alarms"]["alarms"] == []


def test_a_site_that_a_running_run_needs_and_is_offline_is_an_alarm(told: FakeDesk) -> None:
    found = shown(told)["alarms"]["alarms"]
    assert [a["text"] for a in found if a["name"] == "offline"] == [
        "site east takes part in run spring and is offline; last seen"
    ]
    told.run_entries = []
    assert not [a for a in shown(told)["alarms"]["alarms"] if a["name"] == "offline"]


@pytest.mark.parametrize(
    ("days", "words"),
    [(20.4, "ends in 20 days"), (-1.0, "has ended"), (40.0, None), (None, None)],
)
def test_a_certificate_that_ends_within_a_month_is_an_alarm(
    days: float | None, words: str | None
) -> None:
    found = [a.text for a in attention((), (), Reading(), days, {})]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_crash_loops_of_runs_and_processes_and_failed_runs_are_alarms() -> None:
    def run(name: str, state: str, restarts: int, reason: str = "") -> RunEntry:
        return RunEntry(name, "", state, 1, 2, "", "", restarts, reason, ())  # type: ignore[arg-type]

    runs = [run("a", "running", 3, "died"), run("b", "running", 2), run("c", "failed", 0, "why")]
    found = [a.text for a in attention(runs, (), Reading(), None, {"link": "stands still"})]
    assert found == [
        "the process link stands still",
        "run a was started again 3 times: died",
        "run c failed: why",
    ]


def test_days_left_come_from_the_certificate(home: Any, renew: Any) -> None:
    renew(12.5)
    days = days_left(home.certificate)
    assert days == pytest.approx(12.5, abs=0.01)
    home.certificate.write_text("no certificate", encoding="utf-8")
    assert days_left(home.certificate) is None


def test_crash_loops_are_read_from_the_supervisors_file(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.json"
    assert troubled_processes(path) == {}
    bad = {"restarts": 6, "crash_loop": True, "last_error": "disk full"}
    refused = {"state": "refused", "crash_loop": False, "last_error": "no certificate"}
    fine = {"restarts": 9, "crash_loop": False, "state": "up"}
    children = {"link": bad, "desk": fine, "runner": 3, "other": refused}
    path.write_text(json.dumps({"children": children}), encoding="utf-8")
    assert troubled_processes(path) == {
        "link": "is in a crash loop (6 restarts): disk full",
        "other": "does not go on, and a restart would not help: no certificate",
    }
    for text in ("[]", "{", '{"children": []}', " " * 1_000_001):
        path.write_text(text, encoding="utf-8")
        assert troubled_processes(path) == {}


# ---------------------------------------------------------------- the reader and the feed


def test_a_replaced_run_is_read_anew(desk: FakeDesk) -> None:
    desk.add_run("spring")
    desk.tell("spring", "planned", 0, devices=[plan("old")])
    reader = RunReader(desk.folder("spring"))
    assert [view.device for view in reader.read(T0).devices] == ["old"]
    (desk.folder("spring") / "ledger.jsonl").unlink()
    desk.tell("spring", "planned", 1, devices=[plan("new")])
    found = reader.read(T0)
    assert [view.device for view in found.devices] == ["new"]
    assert len(found.lines) == 1


class _Look:
    """Parts that a test changes, and a clock that it turns."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, object]] = {"a": {"v": 1}, "b": {"v": 1}}
        self.time, self.looks, self.cost = 0.0, 0, 0.0

    def __call__(self, run: str) -> dict[str, dict[str, object]]:
        self.looks += 1
        self.time += self.cost
        return {name: dict(part) for name, part in self.parts.items()}


def test_a_feed_sends_what_changed_since_an_id_and_all_to_strangers() -> None:
    look = _Look()
    feed = Feed(look, lambda: look.time)
    first = feed.since("")
    assert first.whole
    assert set(first.parts) == {"a", "b"}
    look.parts["b"] = {"v": 2}
    look.time = 1.0
    second = feed.since("", first.id)
    assert not second.whole
    assert second.parts == {"b": '{"v": 2}'}
    assert feed.since("", second.id).parts == {}
    assert feed.since("", second.id).id == second.id
    for stranger in ("", "x", "x-1", f"{first.id}0-", "é-²"):
        assert feed.since("", stranger).whole
    assert json.loads(second.json(T0)) == {
        "time": "2026-11-27T10:00:00.000+00:00",
        "whole": False,
        "parts": {"b": {"v": 2}},
    }


def test_a_feed_looks_at_most_once_a_second_and_less_often_when_looks_are_slow() -> None:
    look = _Look()
    feed = Feed(look, lambda: look.time)
    feed.since("")
    look.time = 0.9
    feed.since("")
    assert look.looks == 1
    look.time, look.cost = 1.0, 2.0
    feed.since("")
    look.time = 12.9
    feed.since("")
    assert look.looks == 2
    look.time = 13.0
    feed.since("")
    assert look.looks == 3


def test_a_feed_keeps_few_runs() -> None:
    look = _Look()
    feed = Feed(look, lambda: look.time)
    for index in range(50):
        feed.since(f"run-{index}")
    assert len(feed._kept) == 8
