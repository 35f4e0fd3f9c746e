"""`fedtune check`: what it shows of a run, and what it refuses before a run would."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedtune.cli.main import main

pytest.importorskip("transformers")

RUN = """
[run]
seed = 3
[model]
path = {model}
[data]
train = "rows.jsonl"
[fleet.small]
count = 2
memory = "1 GB"
[fleet.large]
count = 1
memory = "2 GB"
"""


@pytest.fixture
def run_file(tmp_path: Path, stories260k: Path) -> Path:
    rows = [{"prompt": f"Number {i}?", "response": f"It is {i}.\nYes."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(model=json.dumps(str(stories260k))), encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["check", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["check", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_sites_model_and_samples_are_shown(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run_file)
    for name in ("site-01", "site-02", "site-03", "small", "large"):
        assert name in text
    assert "adapted  35 matrices, 226,560 of 260,032 parameters" in text
    assert "as is    model.embed_tokens\n" in text
    assert "devices  3: 2 small (1.0 GB), 1 large (2.0 GB)" in text
    samples = [line for line in text.splitlines() if "[[" in line and "<s>" in line]
    assert len(samples) == 2
    assert "?\\n [[It is " in samples[0]
    assert samples[0].rstrip().endswith("\\nYes.</s>]]")


def test_the_number_of_samples_is_chosen(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, run_file, "--samples", 3).count("[[It is") == 3


def test_the_same_facts_come_as_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(shown(capsys, run_file, "--json", "--samples", 1))
    assert sum(site["train_rows"] + site["held_out_rows"] for site in facts["sites"]) == 40
    assert all(site["tokens"] > site["longest"] > 0 for site in facts["sites"])
    assert sorted(site["device_class"] for site in facts["sites"]) == ["large", "small", "small"]
    assert facts["model"]["matrices"]["model.layers.0.mlp.up_proj"] == [172, 64]
    assert len(facts["model"]["digest"]) == 64
    (sample,) = facts["samples"]
    assert len(sample["tokens"]) == len(sample["loss_mask"])
    assert [learned for _, learned in sample["pieces"]] == [False, True]
    assert facts["warnings"] == []


def test_without_samples_no_tokenizer_is_needed(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "adapted  35 matrices" in shown(capsys, run_file, "--samples", 0)
    assert "pip install 'fedtune[train]'" in refused(capsys, run_file)


def test_long_samples_are_a_warning_and_only_long_ones_an_error(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run_file, "--set", "data.max_tokens=18")
    assert "samples cut to data.max_tokens = 18" in text
    assert ", cut)" in text
    error = refused(capsys, run_file, "--set", "data.max_tokens=5")
    assert "no site has a sample to train on; site site-03 is left out: all of its" in error


def test_a_site_without_held_out_rows_is_no_error_but_none_at_all_is_said(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_file.parent / "few.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 6, encoding="utf-8")
    text = shown(capsys, run_file, "--set", f"data.train={rows}")
    assert "warning: no site holds out a row" in text


def test_what_a_run_would_refuse_is_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, run_file, "--set", "lora.targets=qproj")
    assert "did you mean 'q_proj'?" in error
    error = refused(capsys, run_file, "--set", "fleet.large.count=60")
    assert "40 rows cannot be split over 62 sites" in error
    error = refused(capsys, run_file, "--set", "data.partition.by=field")
    assert "rows.jsonl:1: missing key 'client'" in error
    error = refused(capsys, run_file, "--set", "model.path=./none/at/all")
    assert "there is no model folder ./none/at/all" in error
    error = refused(capsys, run_file, "--set", "run.round=3")
    assert "--set: unknown key run.round; did you mean rounds?" in error


def test_classes_are_united_over_the_sites_and_shown(
    tmp_path: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for site, label in (("north", "good"), ("south", "bad")):
        line = json.dumps({"text": "A fine day.", "label": label})
        (tmp_path / f"{site}.jsonl").write_text(f"{line}\n" * 3, encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(
        f"[model]\npath = {json.dumps(str(minilm))}\ntask = 'sequence-classification'\n"
        "[data]\nformat = 'text-label'\nsites = {north = 'north.jsonl', south = 'south.jsonl'}\n"
        "[fleet.any]\ncount = 2\nmemory = '1 GB'\n",
        encoding="utf-8",
    )
    text = shown(capsys, path)
    assert "labels   2: bad, good" in text
    assert "[CLS] a fine day. [SEP] -> [[good]]" in text
    (tmp_path / "south.jsonl").write_text('{"text": "x", "label": "good"}\n' * 3, encoding="utf-8")
    assert "classification needs at least two labels" in refused(capsys, path)
