"""Sites: held-out rows, lazily read files, and a count that matches the fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.data.rows import Row
from fedtune.data.sites import hold_out, open_site, open_sites, read_test_rows
from fedtune.errors import ConfigError, DataError
from fedtune.settings import DataSection, PartitionSection


def write(path: Path, count: int, **extra: object) -> str:
    lines = [json.dumps({"prompt": f"p{i}", "response": f"r{i}", **extra}) for i in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def per_site(tmp_path: Path, **counts: int) -> DataSection:
    return DataSection(
        sites={name: write(tmp_path / f"{name}.jsonl", count) for name, count in counts.items()}
    )


@pytest.mark.parametrize(
    ("rows", "fraction", "held"),
    [(9, 0.1, 0), (10, 0.01, 1), (100, 0.25, 25), (10, 0.0, 0), (1, 0.9, 0), (2, 0.9, 1)],
)
def test_a_fraction_is_held_out_and_something_stays(rows: int, fraction: float, held: int) -> None:
    site = hold_out("a", [Row("f", i, {}) for i in range(rows)], fraction, 0)
    assert (len(site.train), len(site.held_out)) == (rows - held, held)
    assert not {row.line for row in site.train} & {row.line for row in site.held_out}
    assert [row.line for row in site.train] == sorted(row.line for row in site.train)


def test_what_is_held_out_follows_from_seed_and_name() -> None:
    rows = [Row("f", i, {}) for i in range(50)]

    def lines(name: str, seed: int) -> set[int]:
        return {row.line for row in hold_out(name, rows, 0.2, seed).held_out}

    assert lines("a", 0) == lines("a", 0)
    assert lines("a", 0) != lines("b", 0)
    assert lines("a", 0) != lines("a", 1)


def test_held_out_rows_are_the_same_on_every_machine() -> None:
    # Recorded from numpy 2.4.6's PCG64; a change here breaks the continuation of older runs.
    site = hold_out("north", [Row("f", i, {}) for i in range(20)], 0.2, 7)
    assert [row.line for row in site.held_out] == [3, 5, 7, 19]


def test_one_file_per_site_is_read_when_asked_for_and_once(tmp_path: Path) -> None:
    data = per_site(tmp_path, south=3, north=12)
    sites = open_sites(data, devices=2, seed=0)
    assert sites.names == sites.declared == ("north", "south")
    (tmp_path / "south.jsonl").write_text("broken", encoding="utf-8")
    north = sites.site("north")
    (tmp_path / "north.jsonl").unlink()
    assert sites.site("north") is north
    assert (len(north.train), len(north.held_out)) == (11, 1)
    with pytest.raises(DataError, match=r"south\.jsonl:1: not JSON"):
        sites.site("south")


def test_a_device_opens_its_own_file_alone_and_holds_out_the_same_rows(tmp_path: Path) -> None:
    data = per_site(tmp_path, north=12, south=30)
    together = open_sites(data, devices=2, seed=5).site("south")
    (tmp_path / "north.jsonl").unlink()
    assert open_site(data, "south", devices=2, seed=5) == together
    with pytest.raises(
        ConfigError, match="there is no site 'sout' with rows; did you mean 'south'"
    ):
        open_site(data, "sout", devices=2, seed=5)


def test_a_device_opens_its_part_of_a_common_file(tmp_path: Path) -> None:
    data = DataSection(train=write(tmp_path / "all.jsonl", 40))
    sites = open_sites(data, devices=4, seed=1)
    assert open_site(data, "site-03", devices=4, seed=1) == sites.site("site-03")
    lines = [row.line for name in sites.names for row in sites.site(name).train]
    lines += [row.line for name in sites.names for row in sites.site(name).held_out]
    assert sorted(lines) == list(range(1, 41))
    with pytest.raises(
        ConfigError, match="there is no site 'x' with rows; sites: site-01, site-02"
    ):
        sites.site("x")


def test_an_empty_site_is_left_out_with_a_warning(tmp_path: Path) -> None:
    sites = open_sites(per_site(tmp_path, a=1, b=0, c=1), devices=3, seed=0)
    assert sites.names == ("a", "c")
    assert len(sites) == 2
    assert sites.declared == ("a", "b", "c")
    assert sites.warnings == (f"site b is left out: {tmp_path / 'b.jsonl'} holds no rows",)
    with pytest.raises(ConfigError, match="no site 'b' with rows"):
        sites.site("b")


def test_only_empty_sites_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no site has rows"):
        open_sites(per_site(tmp_path, a=0, b=0), devices=2, seed=0)


def test_a_missing_file_is_an_error_at_once(tmp_path: Path) -> None:
    data = DataSection(sites={"a": str(tmp_path / "none.jsonl")})
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        open_sites(data, devices=1, seed=0)


def test_sites_and_devices_must_be_as_many(tmp_path: Path) -> None:
    data = per_site(tmp_path, a=1, b=1)
    with pytest.raises(ConfigError, match="names 2 sites, but the counts in fleet add up to 3 dev"):
        open_sites(data, devices=3, seed=0)
    with pytest.raises(ConfigError, match=r"add up to 2, or remove entries of data\.sites"):
        open_sites(data, devices=1, seed=0)


def test_a_field_with_more_values_than_devices_says_how_to_keep_fewer(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": "p", "response": "r", "client": c}) for c in "aabc"),
        encoding="utf-8",
    )
    data = DataSection(train=str(path), partition=PartitionSection(by="field"))
    with pytest.raises(ConfigError, match=r"'client' into 3 sites.* 2 devices.*partition\.largest"):
        open_sites(data, devices=2, seed=0)
    kept = data.model_copy(update={"partition": PartitionSection(by="field", largest=2)})
    assert open_sites(kept, devices=2, seed=0).names == ("a", "b")


def test_a_row_without_the_field_is_named(tmp_path: Path) -> None:
    data = DataSection(
        train=write(tmp_path / "all.jsonl", 2), partition=PartitionSection(by="field")
    )
    with pytest.raises(DataError, match=r"all\.jsonl:1: missing key 'client'"):
        open_sites(data, devices=1, seed=0)


def test_test_rows_are_thinned_by_the_stride(tmp_path: Path) -> None:
    assert read_test_rows(DataSection(train="t")) == ()
    data = DataSection(train="t", test=write(tmp_path / "test.jsonl", 7), test_stride=3)
    assert [row.line for row in read_test_rows(data)] == [1, 4, 7]


def test_restaurants_are_sites(shared_folder: Path) -> None:
    data = DataSection(
        train=str(shared_folder / "data" / "e2e_nlg" / "train.jsonl"),
        partition=PartitionSection(by="field", largest=12),
    )
    sites = open_sites(data, devices=12, seed=0)
    assert "The Eagle" in sites.names
    eagle = sites.site("The Eagle")
    assert (len(eagle.train), len(eagle.held_out)) == (612, 67)
