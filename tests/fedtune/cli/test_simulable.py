"""A run file for real sites, given to verbs that try runs on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.main import main

_TOML = """
[run]
name = "ward"
[model]
path = "base"
[data]
max_tokens = 64
[deployment]
sites = ["a", "b"]
"""


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        ("simulate", "[fleet.NAME] with count and memory and data.train or data.sites"),
        ("check", "[fleet.NAME] with count and memory and data.train or data.sites"),
        ("plan", "[fleet.NAME] with count and memory"),
    ],
)
def test_a_run_file_for_real_sites_says_in_one_line_what_a_trial_needs(
    verb: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(_TOML, encoding="utf-8")
    assert main([verb, str(path)]) != 0
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.endswith(
        "run ward is for real sites (deployment.sites): fedtune run plays it; to try it on this "
        f"machine, add {missing}"
    )
