from __future__ import annotations

import random

import pytest

from fedtune.deploy.back_off import BackOff, Waits
from fedtune.deploy.exit_codes import EXIT_RESTART


class _NoChance(random.Random):
    def random(self) -> float:
        return 0.0


class _FullChance(random.Random):
    def random(self) -> float:
        return 1.0


def test_waits_double_from_one_second_to_a_minute() -> None:
    back_off = BackOff(Waits(), _NoChance())
    waits = [back_off.wait_s(lived_s=0.1, exit_code=1) for _ in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_chance_adds_at_most_a_quarter_and_never_passes_the_longest_wait() -> None:
    back_off = BackOff(Waits(), _FullChance())
    waits = [back_off.wait_s(lived_s=0.1, exit_code=1) for _ in range(8)]
    assert waits == [1.25, 2.5, 5, 10, 20, 40, 60, 60]


def test_ten_minutes_of_health_start_from_the_first_wait() -> None:
    back_off = BackOff(Waits(), _NoChance())
    for _ in range(6):
        back_off.wait_s(lived_s=1.0, exit_code=1)
    assert back_off.wait_s(lived_s=599.0, exit_code=1) == 60
    assert back_off.wait_s(lived_s=600.0, exit_code=1) == 1
    assert not back_off.in_crash_loop


def test_a_thousand_ends_do_not_overflow() -> None:
    back_off = BackOff(Waits(), _NoChance())
    assert {back_off.wait_s(lived_s=0.0, exit_code=1) for _ in range(1100)} <= {
        1, 2, 4, 8, 16, 32, 60,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "loop"), [(1, True), (-9, True), (0, False), (EXIT_RESTART, False)]
)
def test_five_failures_are_a_crash_loop_and_requests_for_a_restart_are_not(
    code: int, loop: bool
) -> None:
    back_off = BackOff(Waits(), _NoChance())
    for _ in range(4):
        back_off.wait_s(lived_s=0.0, exit_code=code)
    assert not back_off.in_crash_loop
    back_off.wait_s(lived_s=0.0, exit_code=code)
    assert back_off.in_crash_loop is loop
    back_off.lived(600.0)
    assert not back_off.in_crash_loop
