"""A budget under the smallest plan is refused before any weight is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.config import load_run_config
from fedtune.devices.simulated import simulated_profiles
from fedtune.errors import PlanError
from fedtune.model import backbone
from fedtune.model.shapes import read_shapes
from fedtune.plan.from_config import plan_settings
from fedtune.plan.solve import plan_fleet

_TOML = """
[run]
name = "tight"
rounds = 1
[model]
path = '{model}'
[data]
train = '{rows}'
max_tokens = 40
[fleet.any]
count = 2
memory = "{memory} B"
formats = ["fp32", "nf4"]
[lora]
rank_max = 2
rank_cap = 4
[train]
local_steps = 1
batch_size = 4
[simulation]
threads = 1
[outputs]
folder = '{folder}'
exports = []
"""


def run_file(folder: Path, model: Path, rows: Path, memory: int) -> Path:
    path = folder / "run.toml"
    text = _TOML.format(model=model, rows=rows, folder=folder / "out", memory=memory)
    path.write_text(text, encoding="utf-8")
    return path


def fits(path: Path, model: Path) -> bool:
    """Whether a fleet of the file's devices can be planned."""
    config = load_run_config(path, [])
    profiles = simulated_profiles(config.fleet, ("a", "b"), config.run.seed)
    settings = plan_settings(config, 0, "planned")
    try:
        plan_fleet(tuple(profiles.values()), read_shapes(model, ("all-linear",)), settings)
    except PlanError:
        return False
    return True


def smallest_budget(folder: Path, model: Path, rows: Path) -> int:
    """Least memory that can be planned with, to a thousandth."""
    low, high = 1000, 1 << 26
    while high - low > low // 1000:
        middle = (low + high) // 2
        if fits(run_file(folder, model, rows, middle), model):
            high = middle
        else:
            low = middle
    return high


def test_a_tenth_less_than_the_smallest_plan_is_refused_and_nothing_is_loaded(
    tiny_llama: Path,
    colour_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[Path] = []
    init = backbone.BackboneShelf.get

    def get(shelf: backbone.BackboneShelf, *rest: object) -> object:
        loaded.append(tmp_path)
        return init(shelf, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone.BackboneShelf, "get", get)
    smallest = smallest_budget(tmp_path, tiny_llama, colour_rows)
    path = run_file(tmp_path, tiny_llama, colour_rows, int(0.9 * smallest))
    assert main(["simulate", str(path)]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "smallest plan needs" in said
    assert "give it a memory of at least" in said
    assert not loaded
    # The watch works, and the very smallest budget does train.
    path = run_file(tmp_path, tiny_llama, colour_rows, smallest)
    assert main(["simulate", str(path), "--overwrite"]) == 0
    assert loaded
