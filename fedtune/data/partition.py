"""Splitting one file's rows over sites: by a key of the rows, evenly, or with a chosen skew.

Every row goes to exactly one site, except that `largest` leaves out the smaller sites of a split
by field. No site is left empty: too few rows are an error, and a site to which a skewed draw
gives nothing takes the last row of the site that is then the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedtune.data.rows import Row
from fedtune.errors import DataError
from fedtune.settings import PartitionSection


def split_rows(
    rows: Sequence[Row], section: PartitionSection, sites: int, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Row indices of every site, ascending; names in sorted order.

    Args:
        rows: all rows of the file.
        section: which split, and its parameters.
        sites: how many sites to make; a split by field makes as many as the field has values.
        rng: the only source of randomness; equal generators give equal splits everywhere.

    Raises:
        DataError: fewer rows than sites, or a row lacks the key that the split goes by.
    """
    if section.by == "field":
        return _by_field(rows, section.field, section.largest)
    if len(rows) < sites:
        raise DataError(
            f"{len(rows)} rows cannot be split over {sites} sites; give at least one row per "
            "device, or lower the counts in fleet"
        )
    splits: Mapping[str, Callable[[], list[list[int]]]] = {
        "iid": lambda: _evenly(len(rows), sites, rng),
        "quantity": lambda: _by_quantity(len(rows), sites, section.alpha, rng),
        "dirichlet": lambda: _by_label(
            [row.label(section.label_field) for row in rows], sites, section.alpha, rng
        ),
    }
    parts = _without_empty(splits[section.by]())
    width = max(2, len(str(sites)))
    return {f"site-{i:0{width}d}": sorted(part) for i, part in enumerate(parts, start=1)}


def _by_field(rows: Sequence[Row], field: str, largest: int) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.label(field), []).append(index)
    by_size = sorted(groups, key=lambda name: (-len(groups[name]), name))
    kept = by_size[:largest] if largest else by_size
    return {name: groups[name] for name in sorted(kept)}


def _evenly(count: int, sites: int, rng: np.random.Generator) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(rng.permutation(count), sites)]


def _by_quantity(count: int, sites: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    """Sizes from one Dirichlet draw; which rows, evenly at random."""
    order = rng.permutation(count)
    return _cut(order, rng.dirichlet(np.full(sites, alpha)))


def _by_label(
    labels: Sequence[str], sites: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Each label's rows are spread over the sites by a Dirichlet draw of their own.

    Source: Hsu, Qi and Brown (2019), https://arxiv.org/abs/1909.06335, draw each site's label
    mix; drawing each label's spread over sites instead, as most later work does, uses every row
    exactly once.
    """
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label in sorted(set(labels)):
        indices = np.array([i for i, other in enumerate(labels) if other == label])
        shares = rng.dirichlet(np.full(sites, alpha))
        for part, piece in zip(parts, _cut(rng.permutation(indices), shares), strict=True):
            part.extend(piece)
    return parts


def _cut(order: np.ndarray, shares: np.ndarray) -> list[list[int]]:
    """Cut a sequence into consecutive pieces of the given shares."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
    return [piece.tolist() for piece in np.split(order, np.clip(ends, 0, len(order)))]


def _without_empty(parts: list[list[int]]) -> list[list[int]]:
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts
