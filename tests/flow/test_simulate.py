"""The main job, from a run file's settings to a merged model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedtune.aggregate.rules import RULES
from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.errors import DataError, FedtuneError, ModelError, PlanError, RoundError, RunError
from fedtune.records import Event
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint
from fedtune.wire.ledger_chain import verify_ledger

Tree = dict[str, dict[str, Any]]
Play = Callable[[Tree], Any]


def _adapter_bytes(folder: Path) -> bytes:
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    return path.read_bytes()


def test_three_classes_of_devices_train_unequally_in_one_round(tree: Tree, play: Play) -> None:
    played = play(tree)
    by_class = {str(row["device_class"]): row for row in played.one("planned")["devices"]}
    assert {name: row["format"] for name, row in by_class.items()} == {
        "server": "fp32",
        "laptop": "int8",
        "board": "nf4",
    }
    assert by_class["server"]["rank_max"] == 8
    assert by_class["laptop"]["rank_max"] == 4
    assert len(set(by_class["board"]["ranks"].values())) > 1  # the upload limit cuts per matrix
    assert by_class["server"]["micro_batch"] > by_class["board"]["micro_batch"]
    assert {row["batch_size"] for row in by_class.values()} == {8}
    for row in by_class.values():
        assert row["peak_bytes"] <= row["budget_bytes"]
    reports = played.all("device_reported")
    assert len(reports) == 8
    uploads = {str(r["device"]): int(r["upload_bytes"]) for r in reports}
    planned = {str(row["device"]): row for row in played.one("planned")["devices"]}
    board = next(name for name, row in planned.items() if row["device_class"] == "board")
    assert uploads[board] == min(uploads.values())


def test_a_device_of_few_bits_spends_what_it_has_left_on_single_matrices(
    tree: Tree, play: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    tree["fleet"]["board"] |= {"formats": ["q2", "q3"], "format": "q2", "memory": "1.3 MB"}
    pinned = play(copy.deepcopy(tree) | {"outputs": {"folder": str(tmp_path / "a"), "exports": []}})
    del tree["fleet"]["board"]["format"]
    mixed = play(tree)
    rows = [
        next(r for r in played.one("planned")["devices"] if r["device_class"] == "board")
        for played in (pinned, mixed)
    ]
    assert all("+" in form for form in rows[0]["forms"].values())  # repaired, not widened
    assert all(row["peak_bytes"] <= row["budget_bytes"] for row in rows)
    assert mixed.one("distortion_found")["matrices"] == 14
    assert (mixed.folder / "distortion.json").exists()
    assert mixed.all("device_refused") == []
    losses = mixed.one("run_finished")
    assert losses["held_out_loss_after"] < losses["held_out_loss_before"]


def test_the_loss_falls(tree: Tree, play: Play) -> None:
    tree["run"]["rounds"] = 4
    tree["train"] |= {"local_steps": 5, "learning_rate": 3e-2}
    finished = play(tree).one("run_finished")
    # The base is random and its embeddings stay: the adapter alone has to do it.
    assert finished["held_out_loss_after"] < finished["held_out_loss_before"] - 1.0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_plays_a_run(tree: Tree, play: Play, rule: str) -> None:
    tree["aggregate"] = {"rule": rule}
    tree["fleet"]["board"]["memory"] = "1.5 MB"  # flora sends everything it has
    played = play(tree)
    assert played.all("device_refused") == []
    finished = played.one("run_finished")
    assert finished["held_out_loss_after"] < finished["held_out_loss_before"]


def test_a_fixed_seed_gives_the_same_adapter_bytes_twice(tree: Tree, play: Play) -> None:
    other = copy.deepcopy(tree)
    other["outputs"]["folder"] += "-again"
    third = copy.deepcopy(other)
    third["outputs"]["folder"] += "-and-again"
    third["run"]["seed"] = 1
    first = _adapter_bytes(play(tree).folder)
    assert first == _adapter_bytes(play(other).folder)
    assert first != _adapter_bytes(play(third).folder)


def test_the_merged_model_is_base_plus_adapter_and_loads_alone(
    tree: Tree, play: Play, tiny_llama: Path
) -> None:
    tree["outputs"]["exports"] = ["merged", "peft"]
    folder = play(tree).folder
    AutoModelForCausalLM.from_pretrained(folder / "exports" / "merged")
    base = load_file(tiny_llama / "model.safetensors")
    merged = load_file(folder / "exports" / "merged" / "model.safetensors")
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    adapter = read_checkpoint(path).adapter
    assert set(base) == set(merged)
    for name, weight in base.items():
        update = adapter.matrices.get(name.removesuffix(".weight"))
        expected = weight.double()
        if update is not None:
            assert np.linalg.norm(update.product()) > 0
            expected = expected + torch.from_numpy(update.product())
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


def test_a_run_leaves_everything_that_the_folder_page_lists(tree: Tree, play: Play) -> None:
    tree["outputs"]["exports"] = ["merged", "peft", "onnx"]
    folder = play(tree).folder
    for name in (
        "config.json",
        "plan.json",
        "status.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "checkpoints/round-0002.safetensors",
        "exports/merged/model.safetensors",
        "exports/peft/adapter_model.safetensors",
        "exports/model.onnx",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert any((folder / "tensorboard").iterdir())
    lines = verify_ledger(folder / "ledger.jsonl")
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["run_started", "exported"]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_what_leaves_a_device_is_listed_before_the_first_round(tree: Tree, play: Play) -> None:
    played = play(tree)
    kinds = [event.kind for event in played.events]
    assert kinds.index("leaves_device") < kinds.index("round_started")
    before, every_round = (fields["tensors"] for fields in played.all("leaves_device"))
    assert all(t["name"].endswith(".sensitivity") for t in before)
    assert all(name.endswith((".a", ".b")) for name in (t["name"] for t in every_round))


def test_two_hundred_devices_share_three_backbones(
    tree: Tree, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedtune.model.backbone as backbone

    built: list[object] = []
    loaded: list[object] = []
    build, load = backbone.Backbone, backbone.stream_base
    monkeypatch.setattr(backbone, "Backbone", lambda *a: (built.append(a), build(*a))[1])
    monkeypatch.setattr(backbone, "stream_base", lambda *a: (loaded.append(a), load(*a))[1])
    tree["run"] = {"name": "many", "rounds": 1, "seed": 77}
    tree["importance"] = {"method": "uniform"}
    tree["data"] |= {"partition": {"by": "iid"}, "held_out_fraction": 0.0}
    rows = Path(tree["data"]["train"]).read_text(encoding="utf-8")
    many = Path(tree["outputs"]["folder"]).with_name("many.jsonl")
    many.write_text(rows * 3, encoding="utf-8")
    tree["data"]["train"] = str(many)
    for name, count in (("server", 60), ("laptop", 80), ("board", 60)):
        tree["fleet"][name]["count"] = count
    tree["train"] |= {"local_steps": 1, "batch_size": 2, "evaluate_every": 0}
    # A folder of its own, so that no earlier test has filled the process's shelf.
    model = Path(tree["model"]["path"])
    own = many.with_name("model")
    own.mkdir()
    for file in model.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    tree["model"]["path"] = str(own)
    played = play(tree)
    assert played.one("round_finished")["reported"] == 200
    assert len(built) == 3
    assert len(loaded) == 1


# ---------------------------------------------------------------- trouble


def test_an_interrupted_run_says_so(tree: Tree) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "round_started" and event.fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_config(parse_run_config(tree, "test"), watch=interrupt)
    folder = Path(tree["outputs"]["folder"])
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert verify_ledger(folder / "ledger.jsonl")[-1]["kind"] == "run_interrupted"


def test_a_fault_of_ours_leaves_a_folder_that_says_failed(tree: Tree) -> None:
    def fault(event: Event) -> None:
        if event.kind == "round_started" and event.fields["round"] == 2:
            raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError):
        simulate_config(parse_run_config(tree, "test"), watch=fault)
    folder = Path(tree["outputs"]["folder"])
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["round"]) == ("failed", 1)
    assert "a fault" in str(verify_ledger(folder / "ledger.jsonl")[-1]["reason"])


def test_float16_halves_the_bytes_both_ways(tree: Tree, play: Play) -> None:
    del tree["fleet"]["board"]["upload"]  # it would buy more rank with what is saved
    half = copy.deepcopy(tree)
    half["wire"] = {"down": "fp16", "up": "fp16"}
    half["outputs"]["folder"] += "-half"
    whole = play(tree).all("round_finished")[-1]
    less = play(half).all("round_finished")[-1]
    for key in ("download_bytes", "upload_bytes"):
        assert less[key] < 0.65 * whole[key]  # the headers of tensors this small stay


def test_a_finished_run_is_not_overwritten(tree: Tree, play: Play) -> None:
    play(tree)
    with pytest.raises(RunError, match=r"already holds a run \(finished at round 2\)"):
        play(tree)


def test_one_bad_device_is_refused_and_the_round_goes_on(
    tree: Tree, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune_client.agent import Agent

    accept = Agent.accept

    def fail_in_the_east(self: Agent, *arguments: Any) -> Any:
        if self.name == "east":
            raise MemoryError("no memory left")
        return accept(self, *arguments)

    monkeypatch.setattr(Agent, "accept", fail_in_the_east)
    played = play(tree)
    assert [f["device"] for f in played.all("device_refused")] == ["east", "east"]
    assert "no memory left" in str(played.all("device_refused")[0]["reason"])
    assert [f["reported"] for f in played.all("round_finished")] == [3, 3]


def test_a_round_without_enough_devices_ends_the_run(
    tree: Tree, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune_client.agent import Agent

    def fail(self: Agent, *arguments: Any) -> Any:
        raise MemoryError("no memory left")

    monkeypatch.setattr(Agent, "accept", fail)
    with pytest.raises(RoundError, match="round 1 needs updates of 1 devices, got 0 good and 12"):
        play(tree)
    folder = Path(tree["outputs"]["folder"])
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_an_update_that_was_changed_on_the_way_is_refused(
    tree: Tree, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune_client.agent import Agent

    report_of = Agent.report

    def tamper(self: Agent, *arguments: Any) -> Any:
        report, packed = report_of(self, *arguments)
        return report, packed[:-1] + b"\x7f" if self.name == "east" else packed

    monkeypatch.setattr(Agent, "report", tamper)
    (first, _) = play(tree).all("device_refused")
    assert first["device"] == "east"
    assert "do not have the reported sha256" in str(first["reason"])


def test_a_missing_model_folder_leaves_nothing_behind(tree: Tree, play: Play) -> None:
    tree["model"]["path"] = "no/such/model/anywhere"
    _refused(tree, play, ModelError, "no/such/model/anywhere")


def test_a_broken_line_is_named_and_leaves_nothing_behind(
    tree: Tree, play: Play, tmp_path: Path
) -> None:
    rows = Path(tree["data"]["train"]).read_text(encoding="utf-8").splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*rows[:6], '{"prompt": "red', *rows[6:]]), encoding="utf-8")
    tree["data"]["train"] = str(broken)
    _refused(tree, play, DataError, r"broken\.jsonl.*7")


def test_a_budget_that_no_plan_fits_names_what_is_missing(tree: Tree, play: Play) -> None:
    tree["fleet"]["board"]["memory"] = "50 kB"
    with pytest.raises(PlanError, match=r"memory budget of 50 kB, and the smallest plan needs"):
        play(tree)


def test_a_site_whose_samples_are_all_too_long_is_left_out_by_name(
    tree: Tree, play: Play, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(tree["data"]["train"]).read_text().splitlines()]
    for row in rows:
        if row["client"] == "east":
            row["prompt"] *= 20
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["data"]["train"] = str(path)
    played = play(tree)
    (excluded,) = played.all("site_excluded")
    assert "east is left out: all of its" in str(excluded["reason"])
    assert [f["reported"] for f in played.all("round_finished")] == [3, 3]


def test_an_empty_site_is_a_named_warning(tree: Tree, play: Play, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("north", "south", "east", "west")}
    for name, path in files.items():
        text = Path(tree["data"]["train"]).read_text(encoding="utf-8")
        path.write_text("" if name == "west" else text, encoding="utf-8")
    tree["data"] = {"sites": {name: str(path) for name, path in files.items()}, "max_tokens": 40}
    played = play(tree)
    assert "site west is left out" in str(played.all("warning")[0]["text"])
    assert [f["reported"] for f in played.all("round_finished")] == [3, 3]


def _refused(tree: Tree, play: Play, error: type[FedtuneError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        play(tree)
    assert "\n" not in str(caught.value)
    assert not Path(tree["outputs"]["folder"]).exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'fedtune[ray]'")
def test_ray_gives_the_same_bytes_as_the_inprocess_backend(
    tree: Tree, play: Play, tmp_path: Path
) -> None:
    other = copy.deepcopy(tree)
    other["outputs"]["folder"] += "-ray"
    other["simulation"] = {"threads": 1, "backend": "ray", "workers": 2}
    # In a process of its own, because Ray leaves open files behind.
    path = tmp_path / "ray.json"
    path.write_text(json.dumps(other), encoding="utf-8")
    command = [sys.executable, "-m", "fedtune", "simulate", str(path), "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert _adapter_bytes(play(tree).folder) == _adapter_bytes(Path(other["outputs"]["folder"]))


def test_a_missing_accelerator_is_named(tree: Tree, play: Play) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    tree["simulation"]["accelerator"] = "cuda"
    with pytest.raises(RoundError):
        play(tree)
    lines = verify_ledger(Path(tree["outputs"]["folder"]) / "ledger.jsonl")
    reasons = [str(line["reason"]) for line in lines if line["kind"] == "device_refused"]
    assert "profile says cuda, and torch finds no such device" in reasons[0]
