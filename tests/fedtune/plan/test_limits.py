from __future__ import annotations

import pytest

from fedtune.plan.limits import longest


@pytest.mark.parametrize("limit", range(-1, 12))
def test_longest_is_the_last_number_that_fits(limit: int) -> None:
    found = longest(1, 9, lambda number: number <= limit)
    assert found == (None if limit < 1 else min(limit, 9))
