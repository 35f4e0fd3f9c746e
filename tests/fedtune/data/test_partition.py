"""Splits of one file over sites: every row once, no site empty, the same from the same seed."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.partition import split_rows
from fedtune.data.rows import Row
from fedtune.errors import DataError
from fedtune.settings import PartitionSection

By = Literal["iid", "dirichlet", "quantity"]
SPLITS: tuple[By, ...] = ("iid", "dirichlet", "quantity")


def rows_of(count: int, labels: int = 3) -> list[Row]:
    return [Row("f", i + 1, {"label": i % labels, "client": f"c{i % 4}"}) for i in range(count)]


def split(
    rows: list[Row], section: PartitionSection, sites: int, seed: int = 0
) -> dict[str, list[int]]:
    return split_rows(rows, section, sites, np.random.default_rng(seed))


@settings(deadline=None, max_examples=60)
@given(
    by=st.sampled_from(SPLITS),
    count=st.integers(1, 60),
    sites=st.integers(1, 12),
    alpha=st.sampled_from([1e-4, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_goes_to_exactly_one_site_and_no_site_is_empty(
    by: By, count: int, sites: int, alpha: float, seed: int
) -> None:
    section = PartitionSection(by=by, alpha=alpha)
    if count < sites:
        with pytest.raises(DataError, match=f"{count} rows cannot be split over {sites} sites"):
            split(rows_of(count), section, sites, seed)
        return
    parts = split(rows_of(count), section, sites, seed)
    assert len(parts) == sites
    assert all(part and part == sorted(part) for part in parts.values())
    assert sorted(i for part in parts.values() for i in part) == list(range(count))
    assert parts == split(rows_of(count), section, sites, seed)


@pytest.mark.parametrize("by", SPLITS)
def test_another_seed_gives_another_split(by: By) -> None:
    section = PartitionSection(by=by)
    assert split(rows_of(100), section, 4, 0) != split(rows_of(100), section, 4, 1)


def test_even_splits_differ_by_one_row_at_most() -> None:
    sizes = [len(part) for part in split(rows_of(103), PartitionSection(by="iid"), 10).values()]
    assert max(sizes) - min(sizes) == 1


def test_names_of_drawn_sites_sort_in_their_order() -> None:
    names = list(split(rows_of(200), PartitionSection(by="iid"), 120))
    assert names[0] == "site-001"
    assert names == sorted(names)
    assert next(iter(split(rows_of(9), PartitionSection(by="iid"), 3))) == "site-01"


def test_a_smaller_alpha_skews_the_labels_more() -> None:
    rows = rows_of(1200)

    def purity(alpha: float) -> float:
        parts = split(rows, PartitionSection(by="dirichlet", alpha=alpha), 4)
        tops = [Counter(i % 3 for i in part).most_common(1)[0][1] for part in parts.values()]
        return sum(tops) / len(rows)

    assert purity(0.05) > 0.7 > 0.45 > purity(1000.0)


def test_a_smaller_alpha_skews_the_sizes_more() -> None:
    def largest(alpha: float) -> int:
        parts = split(rows_of(1000), PartitionSection(by="quantity", alpha=alpha), 5)
        return max(len(part) for part in parts.values())

    assert largest(0.1) > 400 > 230 > largest(10_000.0)


def test_a_split_by_field_makes_one_site_per_value() -> None:
    rows = [Row("f", 1, {"client": value}) for value in ("b", 1, "a", "b", True, "a", "b")]
    parts = split(rows, PartitionSection(by="field"), 4)
    assert parts == {"1": [1], "a": [2, 5], "b": [0, 3, 6], "true": [4]}


def test_the_largest_sites_are_kept_and_ties_go_by_name() -> None:
    rows = [Row("f", 1, {"client": value}) for value in "ccbbaad"]
    parts = split(rows, PartitionSection(by="field", largest=2), 2)
    assert parts == {"a": [4, 5], "b": [2, 3]}


def test_a_row_without_the_key_is_named() -> None:
    rows = [Row("f", 1, {"client": "a"}), Row("f", 2, {"other": "a"})]
    with pytest.raises(DataError, match="f:2: missing key 'client'"):
        split(rows, PartitionSection(by="field"), 1)
    with pytest.raises(DataError, match="f:1: missing key 'label'"):
        split(rows, PartitionSection(by="dirichlet"), 1)
