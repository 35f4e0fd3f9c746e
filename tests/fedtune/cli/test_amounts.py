"""Amounts are short, and round the way a person expects."""

from __future__ import annotations

import pytest

from fedtune.cli.amounts import bytes_text, one_line, seconds_text, sparkline


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_900, "99.9 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (8 * 10**9, "8.0 GB"),
        (3 * 10**12, "3.0 TB"),
    ],
)
def test_sizes_are_in_powers_of_1000(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.00126, "1.3 ms"),
        (0.00994, "9.9 ms"),
        (0.00996, "0.01 s"),
        (0.416, "0.42 s"),
        (0.996, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7830, "2 h 10 min"),
    ],
)
def test_durations_grow_coarser(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_a_sparkline_spans_from_lowest_to_highest() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([3.0, float("nan"), 1.0], ascii_only=True) == "@_"
    assert sparkline([1.0, 1.0]) == "▅▅"
    assert sparkline([]) == ""


def test_a_long_sparkline_keeps_its_width_and_its_last_value() -> None:
    line = sparkline([float(i) for i in range(1000)], width=10)
    assert len(line) == 10
    assert line[-1] == "█"


def test_a_text_from_a_device_becomes_one_harmless_line() -> None:
    assert one_line("a\x1b[31m\nb\r\tc") == "a [31m b  c"
    assert one_line("x" * 300) == "x" * 197 + "..."
