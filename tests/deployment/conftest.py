"""One federation for all tests that need one: to start it takes most of their time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from tests.deployment.federated import SITES


def real_sites() -> ModuleType:
    """The harness, which benchmarks share."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "real_sites" / "__init__.py"
    spec = importlib.util.spec_from_file_location("real_sites", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each site's own rows."""
    folder, words = tmp_path_factory.mktemp("rows"), ("red", "green", "blue", "white")
    files = {}
    for at, site in enumerate(SITES):
        lines = [
            json.dumps({"prompt": f"{words[i % 4]} {words[(i + at) % 4]}", "response": words[at]})
            for i in range(24 + 8 * at)
        ]
        files[site] = folder / f"{site}.jsonl"
        files[site].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def federation(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> Iterator[Any]:
    with real_sites().federation(
        tmp_path_factory.mktemp("federation"), tiny_llama, rows, "--dashboard"
    ) as started:
        yield started


@pytest.fixture(scope="session")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> tuple[Path, Mapping[str, object]]:
    """The same run in a simulation: its folder, and its settings."""
    folder = tmp_path_factory.mktemp("simulated")
    tree: dict[str, Any] = {
        "run": {"name": "undisturbed", "rounds": 3, "minimum_devices": 3},
        "model": {"path": str(tiny_llama)},
        "data": {"sites": {site: str(path) for site, path in rows.items()}, "max_tokens": 40},
        "fleet": {"site": {"count": 3, "memory": "64 MB", "formats": ["fp32"]}},
        "lora": {"rank_max": 4, "rank_cap": 8},
        "train": {"local_steps": 2, "batch_size": 4, "compute": "fp32", "keep_optimizer": True},
        "wire": {"up": "int8"},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder / "run"), "exports": []},
        "deployment": {"sites": list(SITES), "deadline_s": 120},
    }
    simulate_config(parse_run_config(tree, "test"), watch=lambda event: None)
    return folder / "run", tree
