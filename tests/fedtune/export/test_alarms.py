"""Which events deserve attention: each alarm once, and again only after its cause had gone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest

from fedtune.export.alarms import Alarm, Alarms
from fedtune.export.ledger_facts import Line

START = datetime(2026, 1, 1, tzinfo=UTC)


def line(second: float, kind: str, **fields: object) -> Line:
    return {"time": (START + timedelta(seconds=second)).isoformat(), "kind": kind} | fields


def heard(lines: Iterable[Line], alarms: Alarms | None = None) -> list[Alarm]:
    alarms = alarms or Alarms(1000)
    return [alarm for each in lines for alarm in alarms.hear(each)]


def finished(number: int, **fields: object) -> Line:
    return line(number, "round_finished", round=number, **fields)


def test_a_quiet_run_gives_no_alarm() -> None:
    losses = [5.0, 4.0, 4.1, 4.2, 3.9, None, 3.8]
    rounds = [finished(i, held_out_loss=loss, dropped_energy=0.04) for i, loss in enumerate(losses)]
    assert heard(rounds) == []


def test_a_loss_that_rises_three_rounds_running_is_one_alarm() -> None:
    losses = [5.0, 3.0, 3.1, None, 3.2, 3.5, 3.9, 3.4, 3.5, 3.6, 3.7]
    rounds = [finished(i, held_out_loss=loss) for i, loss in enumerate(losses)]
    first, second = heard(rounds)
    assert first.name == second.name == "loss"
    assert "rose 3 rounds running, 3.0000 to 3.5000; lower train.learning_rate" in first.text
    assert "3.4000 to 3.7000" in second.text


def test_a_cap_that_cuts_off_much_is_one_alarm_until_it_does_not() -> None:
    shares = [0.0, 0.2, 0.3, 0.01, 0.05, None]
    found = heard([finished(i, dropped_energy=share) for i, share in enumerate(shares)])
    assert [alarm.name for alarm in found] == ["rank-cap"] * 2
    assert "round 1: the rank cap cut off 20.0% of the energy" in found[0].text
    assert "round 4" in found[1].text


def refused(number: int, device: str) -> Line:
    return line(number, "device_refused", round=number, device=device, reason="too large")


def test_a_round_in_which_all_are_refused_is_an_alarm() -> None:
    begin = line(0, "round_started", round=2, devices=["a", "b"])
    assert heard([begin, refused(2, "a")]) == []
    (found,) = heard([begin, refused(2, "a"), refused(2, "b")])
    assert (found.name, found.text) == ("refused", "round 2: all 2 refused; the last, b: too large")
    (found,) = heard([line(0, "round_started", round=1, devices=["a"]), refused(1, "a")])
    assert "the only device refused" in found.text


def test_a_device_that_is_refused_again_and_again_is_an_alarm() -> None:
    def played(number: int, good: bool) -> list[Line]:
        start = line(number, "round_started", round=number, devices=["a", "b"])
        told = line(number, "device_reported", device="a") if good else refused(number, "a")
        return [start, told]

    rounds = [played(i, good) for i, good in enumerate([False, False, True, False, False, False])]
    lines = [each for pair in rounds for each in pair]
    assert heard(lines[:-1]) == [], "a good update between them ends the row"
    found = heard(lines)
    assert [(alarm.name, alarm.text) for alarm in found] == [
        ("device", "a was refused 3 times running: too large")
    ]


def silent(alarms: Alarms, second: float) -> Alarm | None:
    return alarms.silence(START + timedelta(seconds=second))


def test_before_the_plan_the_deadline_is_awaited() -> None:
    alarms = Alarms(300)
    assert silent(alarms, 9999) is None  # nothing has begun
    heard([line(0, "run_started")], alarms)
    assert silent(alarms, 299) is None
    found = silent(alarms, 301)
    assert found is not None
    assert found.name == "silence"
    assert "no event for 301 s, expected one within 300 s" in found.text
    assert silent(alarms, 400) is None, "once"
    heard([line(401, "site_reported")], alarms)
    assert silent(alarms, 702) is not None, "and again after an event"


@pytest.mark.parametrize(
    ("planned", "pause", "deadline", "expected"),
    [
        (100.0, 1, 1000, 300),  # three times the plan
        (100.0, 200, 1000, 600),  # three times the longest pause: devices take turns
        (1.0, 2, 1000, 60),  # seconds are no silence
        (900.0, 1, 1000, 1000),  # at most the deadline
    ],
)
def test_after_the_plan_three_times_the_usual_is_awaited(
    planned: float, pause: float, deadline: float, expected: float
) -> None:
    alarms = Alarms(deadline)
    heard([line(0, "planned", makespan_seconds=planned), line(pause, "round_started")], alarms)
    assert alarms.expected_s == expected
    assert silent(alarms, pause + expected - 1) is None
    assert silent(alarms, pause + expected + 1) is not None


def test_the_time_between_two_sittings_of_a_run_is_no_pause() -> None:
    alarms = Alarms(1e9)
    heard([line(0, "planned", makespan_seconds=100.0), line(9e6, "run_resumed")], alarms)
    assert alarms.expected_s == 300
