from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedtune.cli import export as verb
from fedtune.records import ExportReport


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(verb.export)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str], str]]:
    """What the verb asks for; nothing is exported."""
    made: list[tuple[Path, list[str], str]] = []

    def record(folder: Path, formats: list[str], base: str) -> ExportReport:
        made.append((folder, formats, base))
        return ExportReport({"merged": "exports/merged"}, {"onnx": "no such operator"})

    monkeypatch.setattr(verb, "export_run", record)
    return made


def test_every_format_is_written_unless_some_are_named(
    app: typer.Typer, calls: list[tuple[Path, list[str], str]], tmp_path: Path
) -> None:
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code == 0
    named = ["--format", "peft", "--format", "report", "--base", "org/model"]
    assert CliRunner().invoke(app, [str(tmp_path), *named]).exit_code == 0
    assert calls == [
        (tmp_path, ["merged", "peft", "onnx", "report"], ""),
        (tmp_path, ["peft", "report"], "org/model"),
    ]


@pytest.mark.usefixtures("calls")
def test_the_output_is_a_line_per_export(app: typer.Typer, tmp_path: Path) -> None:
    lines = CliRunner().invoke(app, [str(tmp_path)]).output.splitlines()
    assert lines == ["merged   exports/merged", "onnx     skipped: no such operator"]


@pytest.mark.usefixtures("calls")
def test_json_output_is_one_object(app: typer.Typer, tmp_path: Path) -> None:
    output = CliRunner().invoke(app, [str(tmp_path), "--json"]).output
    assert json.loads(output) == {
        "paths": {"merged": "exports/merged"},
        "skipped": {"onnx": "no such operator"},
    }


def test_an_unknown_format_is_refused_with_the_valid_ones(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path), "--format", "gguf"])
    assert result.exit_code == 2
    assert "peft" in result.output
