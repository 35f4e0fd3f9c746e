"""Few sites ask often, many seldom, and those that are gone do not count."""

from __future__ import annotations

from fedtune_server.link.pace import LEAST_S, MOST_S, Pace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def paced(sites: int, clock: Clock, pace: Pace) -> float:
    for number in range(sites):
        pace.poll_s(f"site-{number}")
    clock.now += 10.0
    return pace.poll_s("site-0")


def test_three_sites_ask_every_second_and_two_hundred_every_ten() -> None:
    found = [paced(sites, clock := Clock(), Pace(clock)) for sites in (3, 200, 5000)]
    assert found == [LEAST_S, 10.0, MOST_S]


def test_a_site_that_is_gone_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert paced(200, clock, pace) == 10.0
    clock.now += 100.0
    assert paced(3, clock, pace) == LEAST_S
