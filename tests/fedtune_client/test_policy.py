"""A site's policy on a piece of work."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.errors import PolicyError
from fedtune_client.battery import Battery, battery, temperature_c
from fedtune_client.policy import Asked, Policy, Readings

DIGEST = "ab" * 32
WORK = Asked("clinic-7", DIGEST, peak_bytes=2_000_000, steps=20)
FRIDAY_NOON = datetime(2026, 11, 27, 12, 0)


def policy(folder: Path, text: str, now: datetime = FRIDAY_NOON, **readings: Any) -> Policy:
    file = folder / "policy.toml"
    file.write_text(text, encoding="utf-8")
    quiet: dict[str, Any] = {"battery": lambda: None, "temperature_c": lambda: None}
    return Policy(file, Readings(lambda: 500, lambda: now, **{**quiet, **readings}))


ALLOWED = [
    "",
    "allowed_runs = ['other', 'clinic-?']",
    f"allowed_base_digests = ['{DIGEST}']",
    "max_steps = 20",
    "memory = 2000000",
    "hours = ['11:59-12:01']",
    "hours = ['22:00-06:00', '12:00-13:00']",
    "hours = ['00:00-24:00']",
    "weekdays = ['mon', 'fri']",
    "max_bytes_per_day = 501",
    "minimum_battery_percent = 90",
    "on_mains_only = true",
    "maximum_temperature_c = 20",
]
REFUSED = [
    ("allowed_runs = ['Clinic-*']", "run clinic-7 is not one of allowed_runs (Clinic-*)"),
    ("allowed_runs = []", "is not one of allowed_runs (none)"),
    (f"allowed_base_digests = ['{'0' * 64}']", "base abababababab is not one of"),
    ("max_steps = 19", "at most 19 steps in a round, the plan has 20"),
    ("memory = 1999999", "memory for a plan is 1999999 bytes, this one needs 2000000"),
    ("hours = ['12:01-11:59']", "found fri 12:00 there; try again at 2026-11-27 12:01"),
    ("hours = ['06:00-12:00']", "try again at 2026-11-28 06:00"),
    ("weekdays = ['thu']", "it works at thu, found fri 12:00 there; try again at 2026-12-03 00:00"),
    ("weekdays = ['mon']\nhours = ['08:00-18:00']", "try again at 2026-11-30 08:00"),
    ("max_bytes_per_day = 500", "max_bytes_per_day is 500, found 500 today"),
]


@pytest.mark.parametrize("text", ALLOWED)
def test_work_within_the_policy_is_done(tmp_path: Path, text: str) -> None:
    policy(tmp_path, text).check(WORK)


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_work_outside_the_policy_is_refused_with_what_it_says(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(PolicyError, match=re.escape(words)) as caught:
        policy(tmp_path, text).check(WORK)
    assert str(caught.value).startswith("this site's policy: ")


@pytest.mark.parametrize(
    ("hour", "allowed"), [(21, False), (22, True), (0, True), (5, True), (6, False)]
)
def test_hours_may_go_over_midnight(tmp_path: Path, hour: int, allowed: bool) -> None:
    site = policy(tmp_path, "hours = ['22:00-06:00']", FRIDAY_NOON.replace(hour=hour))
    if allowed:
        site.check(WORK)
        return
    with pytest.raises(PolicyError, match="try again at 2026-11-27 22:00"):
        site.check(WORK)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Battery(80, True), "minimum_battery_percent is 90, found 80"),
        (Battery(95, False), "on_mains_only, found this machine on its battery"),
        (Battery(95, True), ""),
        (Battery(95, None), ""),
    ],
)
def test_the_battery_counts_where_there_is_one(tmp_path: Path, found: Battery, words: str) -> None:
    text = "minimum_battery_percent = 90\non_mains_only = true"
    site = policy(tmp_path, text, battery=lambda: found)
    if not words:
        site.check(WORK)
        return
    with pytest.raises(PolicyError, match=words):
        site.check(WORK)


def test_a_hot_machine_does_not_begin(tmp_path: Path) -> None:
    site = policy(tmp_path, "maximum_temperature_c = 70", temperature_c=lambda: 70.6)
    with pytest.raises(PolicyError, match="maximum_temperature_c is 70, found 71"):
        site.check(WORK)


def test_a_file_that_changes_counts_at_once_and_a_damaged_one_refuses(tmp_path: Path) -> None:
    site = policy(tmp_path, "max_steps = 1")
    with pytest.raises(PolicyError, match="at most 1 steps"):
        site.check(WORK)
    site.path.write_text("max_steps = 200", encoding="utf-8")
    site.check(WORK)
    site.path.write_text("max_steps = ", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(PolicyError, match="accepts nothing"):
            site.check(WORK)
    site.path.unlink()
    with pytest.raises(PolicyError, match="cannot be read"):
        site.check(WORK)
    site.path.write_text("max_steps = 200", encoding="utf-8")
    site.check(replace(WORK, steps=200))


def test_a_file_is_read_once_while_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = policy(tmp_path, "")
    os.utime(site.path, ns=(1, 1))
    site.check(WORK)
    monkeypatch.setattr("fedtune_client.policy.read_policy", lambda path: pytest.fail("read again"))
    site.check(WORK)


class Sensor:
    def __init__(self, current: float) -> None:
        self.current = current


def test_sensors_that_are_not_there_or_not_connected_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sensors = {"cpu": [Sensor(51.0), Sensor(0.0)], "none": [Sensor(255.0)], "disk": [Sensor(40.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    assert temperature_c() == 51.0

    def fails() -> object:
        raise OSError("no /sys")

    monkeypatch.setattr(psutil, "sensors_temperatures", fails, raising=False)
    monkeypatch.setattr(psutil, "sensors_battery", fails, raising=False)
    assert temperature_c() is None
    assert battery() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    monkeypatch.delattr(psutil, "sensors_battery")
    assert temperature_c() is None
    assert battery() is None
