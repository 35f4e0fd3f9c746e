"""Where the coordinator has its distortion table from, and what the plan makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.errors import PlanError, ProtocolError
from fedtune.records import DeviceProfile, DistortionTable, MatrixForm
from fedtune.wire.distortion import distortion_json, read_distortion
from fedtune_server.coordinator import Coordinator
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
FORMATS = ("q4", "q2")


def table(digest: str, names: Sequence[str], forms: Sequence[MatrixForm]) -> DistortionTable:
    """The first matrix loses far more than the others."""
    loss = {"q2": 9.0, "q4": 1.0, "fp32": 0.0}
    errors = {
        name: tuple(loss[form.format] * (100.0 if name == names[0] else 1.0) for form in forms)
        for name in names
    }
    return DistortionTable(digest, tuple(forms), errors)


def play(
    folder: Path, fake: Any, plan: dict[str, object], measured: list[Sequence[MatrixForm]] | None
) -> list[dict[str, Any]]:
    """One run of two devices, of which one has few bits; the rows of its plan."""
    names = [matrix.name for matrix in fake.shapes.matrices]

    def measure(forms: Sequence[MatrixForm], emit: object) -> DistortionTable:
        assert measured is not None
        measured.append(forms)
        return table(fake.shapes.digest, names, forms)

    profile = DeviceProfile("a", "small", 1, 10**9, formats=FORMATS)  # type: ignore[arg-type]
    fake.change("a", profile=profile)
    tree: dict[str, Any] = {
        "run": {"name": "unit", "rounds": 1},
        "model": {"path": "not/read/here"},
        "data": {"train": "not-read.jsonl", "max_tokens": 16},
        "fleet": {"small": {"count": 2, "memory": "1 GB", "formats": FORMATS}},
        "lora": {"rank_max": 2, "rank_cap": 4},
        "plan": {"correction_rank": 0, **plan},
    }
    config = parse_run_config(tree, "test")
    with RunFolder.create(folder) as held, fake.grid() as grid:
        coordinator = Coordinator(
            config,
            fake.shapes,
            held,
            fake.events.append,
            measure=None if measured is None else measure,
        )
        coordinator.run(grid, Counted(len(fake.names)))
    (planned,) = fake.all("planned")
    return list(planned["devices"])


def test_the_base_is_measured_once_when_a_plan_can_use_it(
    fleet_of: FleetOf, tmp_path: Path
) -> None:
    fake, asked = fleet_of("a", "b"), list[Sequence[MatrixForm]]()
    play(tmp_path, fake, {}, asked)
    assert [tuple(form.format for form in forms) for forms in asked] == [("fp32", "q2", "q4")]
    held = read_distortion(tmp_path / "distortion.json")
    assert held.base_digest == fake.shapes.digest
    (found,) = fake.all("distortion_found")
    assert found == {"source": "measured", "forms": 3, "matrices": 2}


def test_nothing_is_measured_where_no_plan_can_use_it(fleet_of: FleetOf, tmp_path: Path) -> None:
    fake, asked = fleet_of("a", "b"), list[Sequence[MatrixForm]]()
    rows = play(tmp_path, fake, {"widths": "uniform"}, asked)
    assert asked == []
    assert [row["format"] for row in rows] == ["q4", "fp32"]
    assert not (tmp_path / "distortion.json").exists()


def test_without_a_table_every_device_is_uniform(fleet_of: FleetOf, tmp_path: Path) -> None:
    fake = fleet_of("a", "b")
    assert [row["format"] for row in play(tmp_path, fake, {}, None)] == ["q4", "fp32"]
    assert fake.all("distortion_found") == []


def test_a_file_goes_before_measuring(fleet_of: FleetOf, tmp_path: Path) -> None:
    fake, asked = fleet_of("a", "b"), list[Sequence[MatrixForm]]()
    names = [matrix.name for matrix in fake.shapes.matrices]
    forms = (MatrixForm("q4", 64), MatrixForm("q2", 64))
    path = tmp_path / "table.json"
    whole = table(fake.shapes.digest, names, forms)
    path.write_text(json.dumps(distortion_json(whole)), encoding="utf-8")
    play(tmp_path / "run", fake, {"distortion": str(path)}, asked)
    assert asked == []
    assert read_distortion(tmp_path / "run" / "distortion.json") == whole
    assert fake.all("distortion_found")[0]["source"] == str(path)


def test_a_file_of_another_base_ends_the_run(fleet_of: FleetOf, tmp_path: Path) -> None:
    fake = fleet_of("a", "b")
    path = tmp_path / "table.json"
    other = table("e" * 64, ["layers.0.up"], (MatrixForm("q4", 64),))
    path.write_text(json.dumps(distortion_json(other)), encoding="utf-8")
    with pytest.raises(PlanError, match="is of base eeeeeeeeeeee, and the run's base is dddd"):
        play(tmp_path / "run", fake, {"distortion": str(path)}, None)


def test_a_file_that_is_not_there_ends_the_run(fleet_of: FleetOf, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"cannot be read .*fedtune measure"):
        play(tmp_path / "run", fleet_of("a", "b"), {"distortion": "none.json"}, None)
