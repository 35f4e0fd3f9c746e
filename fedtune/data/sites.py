"""The sites of a run: who they are, and which rows each trains on and holds out.

A site's held-out rows depend on the seed, the site's name and its own rows alone, so a device in
the field that opens only its own file holds out the same rows as a simulation of the whole fleet.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.data.partition import split_rows
from fedtune.data.rows import Kind, Row, holds_rows, read_rows, required_kinds
from fedtune.errors import ConfigError, DataError
from fedtune.settings import DataSection

MINIMUM_ROWS_TO_HOLD_OUT = 10
"""From this many rows on, a site holds out at least one when the fraction is positive.

Chosen: one row of ten costs a tenth of the training data, which is about the default fraction.
"""


@dataclass(frozen=True, slots=True)
class Site:
    """One site's rows; a row is in exactly one of the two parts."""

    name: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


class Sites:
    """The sites of a run, read when first asked for and kept.

    Attributes:
        declared: names of all sites, sorted; as many as the fleet has devices, so the n-th name
            belongs to the n-th device even when an empty site is left out.
        names: names of the sites that have rows, sorted.
        warnings: one line for every site that is left out.
    """

    def __init__(
        self,
        data: DataSection,
        *,
        seed: int,
        rows: Mapping[str, Sequence[Row]],
        files: Mapping[str, Path],
    ) -> None:
        self._data = data
        self._seed = seed
        self._rows = dict(rows)
        self._files = {name: path for name, path in files.items() if holds_rows(path)}
        self._opened: dict[str, Site] = {}
        self.declared = tuple(sorted({*rows, *files}))
        self.names = tuple(sorted({*self._rows, *self._files}))
        self.warnings = tuple(
            f"site {name} is left out: {files[name]} holds no rows"
            for name in self.declared
            if name not in self.names
        )

    def site(self, name: str) -> Site:
        """One site's rows, held-out ones apart.

        Raises:
            ConfigError: no site of that name has rows.
            DataError: a line of the site's file is broken.
        """
        if name not in self.names:
            raise ConfigError(_unknown(name, self.names))
        if name not in self._opened:
            rows = self._rows.get(name)
            if rows is None:
                rows = read_rows(self._files[name], required_kinds(self._data))
            self._opened[name] = hold_out(name, rows, self._data.held_out_fraction, self._seed)
        return self._opened[name]

    def __len__(self) -> int:
        return len(self.names)


def open_sites(data: DataSection, *, devices: int, seed: int) -> Sites:
    """All sites of a run.

    One file is read and split at once; files of their own are read when a site is asked for.

    Args:
        data: where the rows are and how they are split.
        devices: devices in the fleet; each holds one site.
        seed: of the run.

    Raises:
        ConfigError: there are more or fewer sites than devices.
        DataError: a file cannot be read, a line is broken, or no site has rows.
    """
    if data.sites:
        files = {name: Path(text) for name, text in data.sites.items()}
        _check_count(len(files), devices, "data.sites names", "or remove entries of data.sites")
        sites = Sites(data, seed=seed, rows={}, files=files)
        if not sites.names:
            raise DataError("no site has rows; every file in data.sites is empty")
        return sites
    rows = read_rows(Path(data.train), _split_kinds(data))
    section = data.partition
    rng = np.random.default_rng([seed, *_words("partition")])
    parts = split_rows(rows, section, devices, rng)
    what = f"{data.train} splits by its key {section.field!r} into"
    _check_count(len(parts), devices, what, "or keep fewer with data.partition.largest")
    return Sites(
        data,
        seed=seed,
        rows={name: [rows[i] for i in indices] for name, indices in parts.items()},
        files={},
    )


def open_site(data: DataSection, name: str, *, devices: int, seed: int) -> Site:
    """One site alone, as a device in the field opens it; other sites' files are not touched.

    Raises:
        ConfigError: no such site, or (one file for all) more or fewer sites than devices.
        DataError: the file cannot be read or a line is broken.
    """
    if not data.sites:
        return open_sites(data, devices=devices, seed=seed).site(name)
    if name not in data.sites:
        raise ConfigError(_unknown(name, tuple(data.sites)))
    rows = read_rows(Path(data.sites[name]), required_kinds(data))
    return hold_out(name, rows, data.held_out_fraction, seed)


def read_test_rows(data: DataSection) -> tuple[Row, ...]:
    """Every `test_stride`-th row of the test file; empty without one.

    Raises:
        DataError: the file cannot be read or a line is broken.
    """
    if not data.test:
        return ()
    return tuple(read_rows(Path(data.test), required_kinds(data))[:: data.test_stride])


def hold_out(name: str, rows: Sequence[Row], fraction: float, seed: int) -> Site:
    """Split a site's rows, each part in the file's order.

    `fraction` of the rows, rounded down, are held out: at least one from ten rows on (unless the
    fraction is 0), and never the last row that is left to train on.
    """
    count = int(len(rows) * fraction)
    if fraction > 0 and len(rows) >= MINIMUM_ROWS_TO_HOLD_OUT:
        count = max(count, 1)
    rng = np.random.default_rng([seed, *_words(f"held-out:{name}")])
    chosen = set(rng.permutation(len(rows))[:count].tolist())
    return Site(
        name=name,
        train=tuple(row for i, row in enumerate(rows) if i not in chosen),
        held_out=tuple(row for i, row in enumerate(rows) if i in chosen),
    )


def _words(text: str) -> list[int]:
    """A name as seed words: the same on every machine, unlike `hash`."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def _split_kinds(data: DataSection) -> dict[str, Kind]:
    kinds = required_kinds(data)
    by_split = {"field": data.partition.field, "dirichlet": data.partition.label_field}
    key = by_split.get(data.partition.by)
    return {**kinds, key: "label"} if key else kinds


def _check_count(sites: int, devices: int, what: str, to_lower: str) -> None:
    if sites != devices:
        hint = f", {to_lower}" if sites > devices else ""
        raise ConfigError(
            f"{what} {sites} sites, but the counts in fleet add up to {devices} devices; make "
            f"the counts add up to {sites}{hint}"
        )


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"sites: {', '.join(sorted(known))}"
    return f"there is no site {name!r} with rows; {hint}"
