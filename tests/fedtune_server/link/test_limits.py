"""Token buckets."""

from __future__ import annotations

from fedtune_server.link import limits
from fedtune_server.link.limits import RateLimit


def test_a_bucket_empties_and_fills_again() -> None:
    clock = [0.0]
    rate = RateLimit(2.0, 3, lambda: clock[0])
    assert [rate.spend("a") for _ in range(4)] == [True, True, True, False]
    assert rate.is_empty("a")
    assert not rate.is_empty("b")
    clock[0] = 0.5
    assert [rate.spend("a") for _ in range(2)] == [True, False]
    clock[0] = 1000.0
    assert [rate.spend("a") for _ in range(4)] == [True, True, True, False]


def test_refused_requests_do_not_keep_a_bucket_empty() -> None:
    clock = [0.0]
    rate = RateLimit(1.0, 1, lambda: clock[0])
    assert rate.spend("a")
    passed = 0
    for tenth in range(1, 41):
        clock[0] = tenth / 10
        passed += rate.spend("a")
    assert passed in (3, 4)


def test_the_number_of_names_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(limits, "_MOST_NAMES", 10)
    rate = RateLimit(1.0, 1)
    for number in range(1000):
        rate.spend(str(number))
    assert len(rate._buckets) == 10
