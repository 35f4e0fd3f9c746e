"""The end of a run at a coordinator that has no torch, and at one that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli import with_base
from fedtune.config import parse_run_config
from fedtune.records import Event, ExportReport
from fedtune.settings import RunConfig


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Which exports were asked for, in order."""
    asked: list[tuple[str, ...]] = []

    def export_run(folder: Path, formats: tuple[str, ...]) -> ExportReport:
        asked.append(tuple(formats))
        return ExportReport({})

    monkeypatch.setattr("fedtune.export.run_export.export_run", export_run)
    return asked


def config(exports: list[str]) -> RunConfig:
    return parse_run_config(
        {"model": {"path": "base"}, "data": {}, "deployment": {"sites": ["*"]},
         "outputs": {"exports": exports}},
        "test",
    )  # fmt: skip


@pytest.mark.parametrize("torch", [True, False])
def test_a_coordinator_writes_the_exports_that_it_can_and_says_how_to_get_the_rest(
    written: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: bool
) -> None:
    monkeypatch.setattr(with_base, "can_compute", lambda: torch)
    events: list[Event] = []
    with_base.finish_deployed_run(config(["merged", "peft"]), tmp_path, events.append)
    assert written == [("merged", "peft") if torch else (), ("report",)]
    warnings = [str(e.fields["text"]) for e in events if e.kind == "warning"]
    assert len(warnings) == (0 if torch else 1)
    if not torch:
        assert "cannot write merged, peft; pip install 'fedtune[train]'" in warnings[0]
    assert events[-1].kind == "exported"


def test_nothing_is_missing_where_no_export_is_wanted(
    written: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(with_base, "can_compute", lambda: False)
    events: list[Event] = []
    with_base.finish_deployed_run(config([]), tmp_path, events.append)
    assert [event.kind for event in events] == ["exported"]
