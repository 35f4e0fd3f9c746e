"""`fedtune simulate`: what it prints, what it overrides, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.wire.checkpoint import latest_checkpoint

_TOML = """
[run]
name = "told"
rounds = 2
[model]
path = '{model}'
[data]
train = '{rows}'
max_tokens = 40
[fleet.any]
count = 2
memory = "32 MB"
formats = ["fp32"]
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

Simulate = Callable[..., Any]


@pytest.fixture
def run_file(tiny_llama: Path, colour_rows: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    text = _TOML.format(model=tiny_llama, rows=colour_rows, folder=tmp_path / "out")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def simulate(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """Run the verb on the run file; returns exit code, standard output and standard error."""

    def call(*options: str) -> tuple[int, str, str]:
        code = main(["simulate", str(run_file), *options])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_json_output_is_the_events_and_nothing_else(simulate: Simulate, tmp_path: Path) -> None:
    code, out, err = simulate("--json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert all(next(iter(event)) == "kind" for event in events)
    ledger = (tmp_path / "out" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert [event["kind"] for event in events] == [json.loads(line)["kind"] for line in ledger]
    assert [events[0]["kind"], events[-1]["kind"]] == ["run_started", "exported"]
    assert [e["round"] for e in events if e["kind"] == "round_finished"] == [1, 2]
    assert events[-1]["paths"] == {"report": str(tmp_path / "out" / "report.html")}


def test_without_json_a_person_reads_a_summary(simulate: Simulate, tmp_path: Path) -> None:
    code, out, err = simulate()
    assert (code, err) == (0, "")
    assert "round 2" in out
    assert "{" not in out
    assert (tmp_path / "out" / "report.html").stat().st_size > 0


def test_settings_on_the_command_line_go_before_the_files(
    simulate: Simulate, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    code, out, _ = simulate(
        "--json", "--set", "run.rounds=1", "--set", f"outputs.folder={folder.as_posix()}"
    )
    assert code == 0
    assert sum(json.loads(line)["kind"] == "round_finished" for line in out.splitlines()) == 1
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["run"]["rounds"] == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_replaced_only_when_asked(simulate: Simulate, tmp_path: Path) -> None:
    once = ("--json", "--set", "run.rounds=1")
    assert simulate(*once)[0] == 0
    code, out, err = simulate(*once)
    assert (code, out) == (2, "")
    assert "already holds a run (finished at round 1)" in err
    assert "pass --overwrite" in err
    assert simulate("--json", "--overwrite")[0] == 0
    path = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert path is not None
    assert path.name == "round-0002.safetensors"


def test_a_test_file_gives_the_worth_of_the_merged_model(
    simulate: Simulate, colour_rows: Path
) -> None:
    code, out, _ = simulate(
        "--json", "--set", "run.rounds=1", "--set", "outputs.exports=merged",
        "--set", f"data.test={colour_rows.as_posix()}", "--set", "data.test_stride=12",
    )  # fmt: skip
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    (tested,) = [event for event in events if event["kind"] == "tested"]
    assert tested["rows"] == 8
    assert tested["merged_loss"] > 0
    assert set(events[-1]["paths"]) == {"merged", "report"}


@pytest.fixture
def plan_path(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Path]:
    """Plan the run file on paper, edit the plan of its one class, and write it."""

    def make(**edits: object) -> Path:
        assert main(["plan", str(run_file), "--json", "--output", str(tmp_path)]) == 0
        capsys.readouterr()
        path = tmp_path / "plan.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["classes"]["any"] |= edits
        path.write_text(json.dumps(tree), encoding="utf-8")
        return path

    return make


def test_a_plan_on_paper_is_what_the_run_plans(
    simulate: Simulate, plan_path: Callable[..., Path], tmp_path: Path
) -> None:
    paper = json.loads(plan_path().read_text(encoding="utf-8"))
    assert simulate("--json", "--set", "run.rounds=1")[0] == 0
    ran = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert ran["base"]["headers"] == paper["base"]["headers"]
    assert ran["base"]["digest"] is not None
    for key in ("run", "made_with", "predicted", "classes", "devices"):
        assert ran[key] == paper[key], key


def test_an_edited_plan_is_what_the_run_does(
    simulate: Simulate, plan_path: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj"
    path = plan_path(rank=0, ranks={name: 1}, tail=0, local_steps=2, micro_batch=2)
    code, out, err = simulate("--json", "--set", "run.rounds=1", "--plan", str(path))
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    (planned,) = [event for event in events if event["kind"] == "planned"]
    for row in planned["devices"]:
        assert row["ranks"] == {name: 1}
        assert (row["local_steps"], row["micro_batch"]) == (2, 2)
        assert row["binding"] == "the plan's file"
    reported = [event for event in events if event["kind"] == "device_reported"]
    assert {event["samples"] for event in reported} == {2 * 4}
    sent = 4 * (32 + 32)
    assert all(sent <= event["upload_bytes"] < 2 * sent + 2000 for event in reported)
    # The folder's own plan is such a file again.
    again = simulate(
        "--json", "--set", "run.rounds=1", "--plan", str(tmp_path / "out" / "plan.json"),
        "--set", f"outputs.folder={(tmp_path / 'again').as_posix()}",
    )  # fmt: skip
    assert again[0] == 0


# ---------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"rank": 5, "ranks": {}}, "the coordinator keeps at most lora.rank_cap = 4"),
        ({"format": "nf4"}, "is to be held as nf4, and the device supports fp32"),
        ({"micro_batch": 3}, "batch_size 4 is no multiple of micro_batch 3"),
        ({"batch_size": 4096, "micro_batch": 4096}, "more than its budget of 32 MB"),
    ],
)
def test_an_edit_that_cannot_be_followed_is_refused_before_anything_is_loaded(
    simulate: Simulate,
    plan_path: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    edits: dict[str, object],
    words: str,
) -> None:
    path = plan_path(**edits)
    monkeypatch.setitem(sys.modules, "torch", None)  # to need it would be another error
    code, out, err = simulate("--json", "--plan", str(path))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("run.round=3", "--set: unknown key run.round; did you mean rounds?"),
        ("run.rounds=0", "--set: run.rounds = 0: expected a value greater"),
        ("run.rounds", "--set needs section.key=value, got 'run.rounds'"),
        ("fleet.any.count=3000", "96 rows cannot be split over 3000 sites; give"),
        ("data.train=no/rows.jsonl", "no/rows.jsonl"),
        ("model.path=no/such/model/here", "no/such/model/here"),
        ("lora.targets=ghost", "ghost"),
        ("importance.file=no/importance.json", "no/importance.json"),
        ("plan.distortion=no/distortion.json", "no/distortion.json cannot be read"),
    ],
)
def test_what_cannot_be_run_is_one_line_on_stderr_and_leaves_nothing(
    simulate: Simulate, tmp_path: Path, setting: str, words: str
) -> None:
    code, out, err = simulate("--json", "--set", setting)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_says_why_on_both_sides(simulate: Simulate) -> None:
    code, out, err = simulate("--json", "--set", "fleet.any.memory=1 kB")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    last = json.loads(out.splitlines()[-1])
    assert last["kind"] == "run_failed"
    assert f"error: {last['reason']}\n" == err


def test_without_torch_the_extra_is_named(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = simulate("--json")
    assert (code, out) == (2, "")
    assert "simulating devices needs the package torch; install it with: pip install" in err
    assert not (tmp_path / "out").exists()


def test_a_half_installed_fedtune_says_so(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.cli.apps.entry_points", lambda **_: ())
    code, _, err = simulate("--json")
    assert code == 2
    assert err.startswith("error: fedtune is not installed whole: no entry point '")


def test_an_interrupted_run_exits_130(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune_client.agent.Agent.accept", interrupt)
    code, out, err = simulate("--json")
    assert (code, err) == (130, "")
    assert json.loads(out.splitlines()[-1]) == {"kind": "run_interrupted", "round": 0}
    status = json.loads((tmp_path / "out" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["round"]) == ("interrupted", 0)
