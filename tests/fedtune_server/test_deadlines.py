"""How long devices may take, by their plans and links."""

from __future__ import annotations

import pytest

from fedtune.records import DevicePlan, DeviceProfile
from fedtune_server.deadlines import FLOWER_S, LOADING_S, Allowances, expected_seconds

_MBIT = 125_000.0
_SEVEN_B = 160_000_000
"""Bytes of an adapter of rank 16 over the 224 matrices of a 7B model, in fp32."""


def plan(compute_s: float, size: int, link: float) -> DevicePlan:
    transfer = 2 * size / link if link else 0.0
    return DevicePlan(
        "a", (), 1, 1, 16, 1, seconds=compute_s + transfer, download_bytes=size, upload_bytes=size
    )


def profile(link: float) -> DeviceProfile:
    return DeviceProfile("a", "any", 1, 10**9, link_bytes_per_s=link)


@pytest.mark.parametrize("link", [_MBIT, 0.0])
def test_a_large_adapter_over_a_slow_link_has_the_time_that_it_takes(link: float) -> None:
    takes = 60.0 + 2 * _SEVEN_B / _MBIT  # 43 minutes
    assert expected_seconds(plan(60.0, _SEVEN_B, link), profile(link)) == pytest.approx(takes)
    allowed = Allowances(3.0, 86_400.0).seconds(plan(60.0, _SEVEN_B, link), profile(link))
    assert allowed == pytest.approx(3 * takes + FLOWER_S + LOADING_S)


def test_a_silent_device_on_a_fast_link_is_given_up_soon() -> None:
    allowances = Allowances(3.0, 3600.0)
    first = allowances.seconds(plan(10.0, 1_000_000, 1e7), profile(1e7))
    assert first == pytest.approx(3 * 10.2 + FLOWER_S + LOADING_S)
    allowances.learn({"a": 8.0})
    assert allowances.seconds(plan(10.0, 1_000_000, 1e7), profile(1e7)) == pytest.approx(
        3 * 10.2 + FLOWER_S
    )


def test_a_device_may_take_what_it_took_before() -> None:
    allowances = Allowances(2.0, 3600.0)
    allowances.learn({"a": 400.0})
    allowances.learn({"a": 90.0, "b": 1.0})  # the longest counts
    assert allowances.seconds(plan(10.0, 1000, 1e7), profile(1e7)) == 800.0


def test_no_device_may_take_longer_than_the_rounds_deadline() -> None:
    allowances = Allowances(3.0, 100.0)
    assert allowances.seconds(plan(60.0, _SEVEN_B, _MBIT), profile(_MBIT)) == 100.0


def test_a_device_that_was_silent_may_take_twice_as_long_until_it_answers() -> None:
    allowances = Allowances(3.0, 3600.0)
    work = plan(10.0, 1000, 1e7), profile(1e7)
    first = allowances.seconds(*work)
    allowances.learn({}, ["a"])
    assert allowances.seconds(*work) == pytest.approx(2 * first)
    allowances.learn({"a": 8.0})
    assert allowances.seconds(*work) < first
