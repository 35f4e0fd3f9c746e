"""A whole run of the coordinator with devices that compute nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate.server_step import ServerStep
from fedtune.config import parse_run_config
from fedtune.errors import PlanError, RoundError
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint
from fedtune.wire.flower import TRAIN
from fedtune_server.coordinator import Coordinator, installed_versions
from fedtune_server.from_config import server_step
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
Tree = dict[str, dict[str, Any]]

TREE: Tree = {
    "run": {"name": "unit", "rounds": 4, "round_deadline_s": 30.0},
    "model": {"path": "not/read/here"},
    "data": {"train": "not-read.jsonl", "max_tokens": 16},
    "fleet": {"any": {"count": 3, "memory": "1 GB"}},
    "lora": {"rank_max": 3, "rank_cap": 6},
    "train": {"batch_size": 4, "local_steps": 3, "learning_rate": 0.1},
    "importance": {"method": "uniform"},
    "outputs": {"keep_checkpoints": 2},
}


@pytest.fixture
def tree() -> Tree:
    return copy.deepcopy(TREE)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Play a run of a fake fleet; returns the adapter."""
    with RunFolder.create(tmp_path) as folder:

        def run(fake: Any, tree: Tree, fault: Any = None) -> Any:
            config = parse_run_config(tree, "test")
            coordinator = Coordinator(config, fake.shapes, folder, fake.events.append)
            with fake.grid(fault) as grid:
                return coordinator.run(grid, Counted(len(fake.names)))

        yield run


Play = Callable[..., Any]


def test_a_run_says_what_happens_in_order(fleet_of: FleetOf, play: Play, tree: Tree) -> None:
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    every_round = ["round_started", *["device_reported"] * 3, "updates_compared", "round_finished"]
    every_round += ["checkpoint_saved"]
    assert [event.kind for event in fake.events] == [
        "run_started",
        *["site_reported"] * 3,
        "planned",
        "leaves_device",
        "checkpoint_saved",
        *every_round * 4,
        "evaluated",
        "run_finished",
    ]
    (started,) = fake.all("run_started")
    assert started["devices"] == 3
    assert str(started["run"]).startswith("unit-")
    assert started["versions"] == installed_versions()
    (finished,) = fake.all("run_finished")
    assert finished["held_out_loss_before"] == pytest.approx(140 / 60)
    assert finished["held_out_loss_after"] == pytest.approx(140 / 60)


def test_a_run_leaves_its_plan_its_last_checkpoints_and_no_more(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    fake = fleet_of("a", "b", "c")
    adapter = play(fake, tree)
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["devices"] == {"a": "any", "b": "any", "c": "any"}
    assert plan["base"]["digest"] == fake.shapes.digest
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.safetensors"))
    assert names == ["round-0003.safetensors", "round-0004.safetensors"]
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    kept = read_checkpoint(path).adapter
    assert kept.round == adapter.round == 4
    for name, matrix in adapter.matrices.items():
        np.testing.assert_allclose(kept.matrices[name].product(), matrix.product(), atol=1e-6)
    assert not (tmp_path / "labels.json").exists()


def test_a_plan_from_a_file_is_what_the_devices_are_told(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    play(fleet_of("a", "b", "c"), tree)
    edited = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    edited["classes"]["any"] |= {"rank": 1, "local_steps": 2}
    edited["devices"] |= {"b": {"class": "any", "micro_batch": 2}, "late": "any"}
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(edited), encoding="utf-8")
    tree["plan"] = {"file": str(path)}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    plans = {order.plan.device: order.plan for order in fake.orders}
    assert {name: set(plan.ranks().values()) for name, plan in plans.items()} == {
        "a": {1}, "b": {1}, "c": {1},
    }  # fmt: skip
    assert {plan.local_steps for plan in plans.values()} == {2}
    assert [plans[name].micro_batch for name in "abc"] == [4, 2, 4]
    assert {row["binding"] for row in fake.all("planned")[0]["devices"]} == {"the plan's file"}
    # A device that the file names and that did not come stops nothing.
    (warning,) = fake.all("warning")
    assert "the plan names devices that the run does not have: late" in warning["text"]
    kept = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert kept["classes"]["any"]["local_steps"] == 2


def test_a_plan_from_a_file_that_a_device_cannot_carry_ends_the_run(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    play(fleet_of("a", "b", "c"), tree)
    tree["plan"] = {"file": str(tmp_path / "plan.json")}
    fake = fleet_of("a", "b", "c")
    profile = fake.reports["b"].profile
    fake.change("b", profile=type(profile)("b", "any", 1, 1000))
    with pytest.raises(PlanError, match=r"device b \(any\) needs .* more than its budget of 1 kB"):
        play(fake, tree)
    assert fake.orders == []


def test_what_leaves_a_device_is_listed_with_its_size(
    fleet_of: FleetOf, play: Play, tree: Tree
) -> None:
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    (leaves,) = fake.all("leaves_device")
    assert {(t["name"], *t["shape"]) for t in leaves["tensors"]} == {
        ("layers.0.up.a", 3, 8),
        ("layers.0.up.b", 12, 3),
        ("layers.0.down.a", 3, 12),
        ("layers.0.down.b", 8, 3),
    }
    for tensor in leaves["tensors"]:
        assert tensor["bytes"] == 4 * np.prod(tensor["shape"])


def test_the_status_is_the_last_round_that_was_saved(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    fake = fleet_of("a", "b", "c")
    seen: list[int] = []

    def watch(node: int, message: Any) -> None:
        if message.metadata.message_type == TRAIN:
            seen.append(RunFolder(tmp_path).read_status().round)

    play(fake, tree, watch)
    assert seen == [round for round in range(4) for _ in range(3)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_one_line_over_all_rounds(
    fleet_of: FleetOf, play: Play, tree: Tree, schedule: str
) -> None:
    tree["train"] |= {"schedule": schedule, "final_learning_rate_share": 0.1}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    of_a = [order.optimizer for order in fake.orders if order.plan.device == "a"]
    assert of_a[0].learning_rate == pytest.approx(0.1)
    assert of_a[-1].final_learning_rate == pytest.approx(0.1 if schedule == "constant" else 0.01)
    for before, after in pairwise(of_a):
        assert before.final_learning_rate == pytest.approx(after.learning_rate)


def test_optimiser_settings_reach_the_devices(fleet_of: FleetOf, play: Play, tree: Tree) -> None:
    wanted = {"weight_decay": 0.01, "beta1": 0.5, "beta2": 0.6, "max_gradient_norm": 3.0}
    wanted["proximal"] = 0.25
    tree["train"] |= {"optimizer": "sgd", **wanted}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    found = fake.orders[0].optimizer
    assert found.name == "sgd"
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("every", "measured"), [(0, []), (1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])]
)
def test_the_held_out_loss_is_measured_every_so_many_rounds(
    fleet_of: FleetOf, play: Play, tree: Tree, every: int, measured: list[int]
) -> None:
    tree["train"]["evaluate_every"] = every
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    assert [o.round for o in fake.orders if o.evaluate and o.plan.device == "a"] == measured
    before = fake.all("run_finished")[0]["held_out_loss_before"]
    assert (before is None) == (every == 0)


def test_a_round_of_some_devices_asks_those_alone(
    fleet_of: FleetOf, play: Play, tree: Tree
) -> None:
    tree["run"]["devices_per_round"] = 2
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    for started in fake.all("round_started"):
        asked = [o.plan.device for o in fake.orders if o.round == started["round"]]
        assert sorted(asked) == started["devices"]
        assert len(asked) == 2
    assert len({tuple(s["devices"]) for s in fake.all("round_started")}) > 1


def test_devices_take_turns_over_the_rounds_of_a_run(
    fleet_of: FleetOf, play: Play, tree: Tree
) -> None:
    tree["run"] |= {"devices_per_round": 1, "rounds": 6}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    asked = [order.plan.device for order in fake.orders]
    assert set(asked[:3]) == set(asked[3:]) == {"a", "b", "c"}


def test_a_class_takes_part_no_more_often_than_its_section_says(
    fleet_of: FleetOf, play: Play, tree: Tree
) -> None:
    tree["fleet"] = {
        "any": {"count": 2, "memory": "1 GB"},
        "rare": {"count": 1, "memory": "1 GB", "rounds_max": 2},
    }
    fake = fleet_of("a", "b", "c")
    fake.change("b", profile=replace(fake.reports["b"].profile, device_class="rare"))
    play(fake, tree)
    assert [f["devices"] for f in fake.all("round_started")] == [["a", "b", "c"]] * 2 + [
        ["a", "c"]
    ] * 2


@pytest.mark.parametrize(("rule", "late"), [("delta", "fold"), ("flexlora", "refuse")])
def test_only_differences_are_folded_into_a_later_round(
    fleet_of: FleetOf, play: Play, tree: Tree, rule: str, late: str
) -> None:
    tree["aggregate"] = {"rule": rule}
    tree["rounds"] = {"close_count": 2}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    folded = sum(f["folded"] for f in fake.all("round_finished"))
    reasons = [f["reason"] for f in fake.all("device_refused")]
    assert (folded > 0, bool(reasons)) == ((True, False) if late == "fold" else (False, True))
    assert all("it came after round" in reason for reason in reasons)


def test_late_updates_are_not_kept_once_they_are_joined(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    tree["rounds"] = {"close_count": 2}
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    assert sum(f["folded"] for f in fake.all("round_finished")) > 0
    assert not list((tmp_path / "open").rglob("*.tensors"))


def test_too_few_reports_end_the_run_and_keep_the_last_round(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    tree["run"]["minimum_devices"] = 3
    fake = fleet_of("a", "b", "c")

    def offline_in_round_3(node: int, message: Any) -> str | None:
        late = message.metadata.group_id == "3" and node == 1001
        return "offline" if late else None

    with pytest.raises(RoundError, match="round 3 needs updates of 3 devices, got 2 good and 3"):
        play(fake, tree, offline_in_round_3)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert path.name == "round-0002.safetensors"
    assert fake.all("run_finished") == []


def test_a_fleet_that_does_not_come_ends_the_run(
    fleet_of: FleetOf, tmp_path: Path, tree: Tree
) -> None:
    tree["run"]["round_deadline_s"] = 0.1
    fake = fleet_of("a", "b")
    with RunFolder.create(tmp_path) as folder, fake.grid() as grid:
        config = parse_run_config(tree, "test")
        coordinator = Coordinator(config, fake.shapes, folder, fake.events.append, patience=2.0)
        with pytest.raises(RoundError, match=r"expected 3 devices within 0\.2 s, found 2"):
            coordinator.run(grid, Counted(3))


def test_a_device_that_no_plan_fits_ends_the_run(fleet_of: FleetOf, play: Play, tree: Tree) -> None:
    fake = fleet_of("a", "b", "c")
    profile = fake.reports["b"].profile
    fake.change("b", profile=type(profile)("b", "any", 1, 1000))
    with pytest.raises(PlanError, match=r"\bb\b"):
        play(fake, tree)


def test_labels_are_written_and_heads_start_small_and_seeded(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    tree["model"]["task"] = "sequence-classification"
    tree["data"]["format"] = "text-label"
    tree["train"]["evaluate_every"] = 0
    adapters = []
    for seed in (1, 1, 2):
        tree["run"]["seed"] = seed
        fake = fleet_of("a", "b", "c")
        fake.heads = {"head.weight": (2, 40), "head.bias": (2,)}
        for name in fake.names:
            dense = {"head.weight": (0, 40), "head.bias": (0,)}
            fake.change(name, labels=("no", "yes"), dense=dense)
        adapters.append(play(fake, tree))
        assert fake.orders[0].labels == ("no", "yes")
    assert json.loads((tmp_path / "labels.json").read_text(encoding="utf-8")) == ["no", "yes"]
    # The fake devices send heads back as they came.
    first, same, other = (adapter.dense["head.weight"] for adapter in adapters)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    assert 0.01 < first.std() < 0.04
    np.testing.assert_array_equal(adapters[0].dense["head.bias"], np.zeros(2))


def test_versions_are_those_of_installed_packages() -> None:
    found = installed_versions()
    assert {"fedtune", "flwr", "numpy"} <= set(found)
    assert found["numpy"] == np.__version__


def test_each_checkpoint_is_told_with_its_digest(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    fake = fleet_of("a", "b", "c")
    play(fake, tree)
    told = {str(fields["file"]): fields for fields in fake.all("checkpoint_saved")}
    kept = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    assert kept
    for path in kept:
        assert told[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name == f"round-{told[path.name]['round']:04d}.safetensors"


def test_the_servers_states_are_in_every_checkpoint(
    fleet_of: FleetOf, play: Play, tree: Tree, tmp_path: Path
) -> None:
    tree["aggregate"] = {
        "optimizer": "adam",
        "server_step": 0.01,
        "momentum": 0.5,
        "beta2": 0.9,
        "adaptivity": 0.01,
        "keep_dropped": True,
    }
    fake = fleet_of("a", "b", "c")
    adapter = play(fake, tree)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    saved = read_checkpoint(path)
    assert sorted(saved.extra) == ["dropped", "momentum", "squares"]
    for name, matrix in adapter.matrices.items():
        assert saved.extra["momentum"].matrices[name].rank > 0
        assert saved.extra["squares"].dense[f"rows.{name}"].shape == matrix.u.shape[:1]
    assert saved.extra["squares"].dense["rounds"] == 4
    assert saved.extra["dropped"].round == 4


@pytest.mark.parametrize(("keep", "cap"), [(False, 6), (True, 12)])
def test_a_rule_keeps_what_the_server_step_will_cut_off(
    fleet_of: FleetOf, tree: Tree, tmp_path: Path, keep: bool, cap: int
) -> None:
    tree["aggregate"] = {"keep_dropped": keep}
    fake = fleet_of("a")
    with RunFolder.create(tmp_path) as folder:
        config = parse_run_config(tree, "test")
        coordinator = Coordinator(config, fake.shapes, folder, fake.events.append)
    assert coordinator._rule.rank_cap == cap  # type: ignore[attr-defined]


def test_the_run_files_server_step_is_the_one_that_is_taken(tree: Tree) -> None:
    tree["aggregate"] = {
        "optimizer": "adam",
        "server_step": 0.02,
        "momentum": 0.5,
        "beta2": 0.8,
        "adaptivity": 0.03,
        "keep_dropped": True,
    }
    found = server_step(parse_run_config(tree, "test"))
    assert found == ServerStep(6, 0.02, 0.5, "adam", 0.8, 0.03, keep_dropped=True)
