"""Plan files: the same plan after writing and reading, and each edit that cannot be followed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import PlanError
from fedtune.plan.describe import form_text
from fedtune.plan.edited import follow_plan, unknown_devices
from fedtune.plan.forms import BLOCK_SIZES, parse_form
from fedtune.plan.plan_file import checksum, plan_file, plan_text
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.shortfall import human_bytes
from fedtune.plan.solve import plan_fleet
from fedtune.plan.written import WrittenPlan, read_plan
from fedtune.records import (
    CostCalibration,
    DeviceProfile,
    FleetPlan,
    MatrixForm,
    MatrixShape,
    ModelShapes,
)

UP, DOWN = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
SHAPES = ModelShapes(
    digest="d" * 64,
    model_type="llama",
    hidden_size=64,
    intermediate_size=172,
    layers=3,
    attention_heads=4,
    vocabulary=512,
    matrices=tuple(
        MatrixShape(name.format(layer), *sides, layer)
        for layer in range(3)
        for name, sides in ((DOWN, (64, 172)), (UP, (172, 64)))
    ),
    other_parameters=40_000,
    headers="e" * 64,
)
SETTINGS = PlanSettings(
    rank_max=8, rank_cap=12, batch_size=8, local_steps=3, sequence_length=32, tail=True
)


def profile(name: str, device_class: str, memory: int, **fields: Any) -> DeviceProfile:
    known = {
        "formats": ("fp32", "nf4"),
        "link_bytes_per_s": 1e6,
        "matmul_flops_per_s": {"fp32": 1e9},
        "memory_bandwidth_bytes_per_s": 1e9,
        **fields,
    }
    return DeviceProfile(name, device_class, 1, memory, **known)


FLEET = (
    profile("anna", "till", 1_400_000, formats=("nf4",)),
    profile("bert", "till", 1_400_000, formats=("nf4",)),
    profile("carl", "desk", 50_000_000),
)
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def planned() -> FleetPlan:
    return plan_fleet(FLEET, SHAPES, SETTINGS)


@pytest.fixture(scope="module")
def tree(planned: FleetPlan) -> dict[str, Any]:
    written = plan_text(plan_file(planned, FLEET, SHAPES, SETTINGS, "first"))
    found: dict[str, Any] = json.loads(written)
    return found


def written(tree: dict[str, Any], edit: Edit = lambda tree: None) -> WrittenPlan:
    edited = copy.deepcopy(tree)
    edit(edited)
    return WrittenPlan.model_validate(edited)


def refusal(tree: dict[str, Any], edit: Edit, **given: Any) -> str:
    known = {"profiles": FLEET, "shapes": SHAPES, "settings": SETTINGS, **given}
    with pytest.raises(PlanError) as caught:
        follow_plan(written(tree, edit), **known)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- the same plan again


def test_a_plan_that_nobody_edited_is_the_planners(planned: FleetPlan, tree: Any) -> None:
    followed = follow_plan(written(tree), FLEET, SHAPES, SETTINGS)
    assert [replace(plan, binding="") for plan in followed.devices] == [
        replace(plan, binding="", seconds=pytest.approx(plan.seconds)) for plan in planned.devices
    ]
    assert {plan.binding for plan in followed.devices} == {"the plan's file"}


def test_devices_of_one_class_share_an_entry_and_say_only_where_they_differ(
    planned: FleetPlan,
) -> None:
    anna, bert, carl = planned.devices
    names = [m.name for m in bert.matrices]
    other = replace(
        bert,
        local_steps=2,
        matrices=(
            replace(bert.matrices[0], rank=1, format="nf4", block_size=32),
            *bert.matrices[1:],
        ),
    )
    plan = FleetPlan((anna, other, carl))
    tree = json.loads(plan_text(plan_file(plan, FLEET, SHAPES, SETTINGS, "first")))
    assert sorted(tree["classes"]) == ["desk", "till"]
    assert tree["devices"]["anna"] == "till"
    own = dict(tree["devices"]["bert"])
    assert own.pop("predicted")["limited_by"] == bert.binding
    assert own["class"] == "till"
    assert own["local_steps"] == 2
    assert own["ranks"] == {names[0]: 1}
    assert own["formats"] == {names[0]: "nf4/32"}
    followed = follow_plan(written(tree), FLEET, SHAPES, SETTINGS).devices[1]
    assert followed.matrices[0].form == MatrixForm("nf4", 32)
    assert followed.ranks()[names[0]] == 1
    assert followed.local_steps == 2
    assert followed.matrices[1:] == bert.matrices[1:]


def test_the_file_is_the_same_each_time_and_marks_an_edit(planned: FleetPlan, tree: Any) -> None:
    again = plan_text(plan_file(planned, FLEET[::-1], SHAPES, SETTINGS, "first"))
    assert json.loads(again) == tree
    assert checksum(tree) == tree["checksum"]
    edited = copy.deepcopy(tree)
    edited["classes"]["till"]["rank"] += 1
    assert checksum(edited) != edited["checksum"]


def test_a_device_that_the_file_does_not_name_follows_its_class(tree: Any) -> None:
    followed = follow_plan(written(tree, lambda t: t.pop("devices")), FLEET, SHAPES, SETTINGS)
    assert followed == follow_plan(written(tree), FLEET, SHAPES, SETTINGS)


def test_devices_can_do_without_classes(tree: Any) -> None:
    def own(tree: dict[str, Any]) -> None:
        classes = tree.pop("classes")
        tree["devices"] = {name: classes[entry] for name, entry in tree["devices"].items()}

    followed = follow_plan(written(tree, own), FLEET, SHAPES, SETTINGS)
    assert followed == follow_plan(written(tree), FLEET, SHAPES, SETTINGS)


def test_an_edit_of_a_class_is_followed_and_priced_anew(tree: Any) -> None:
    def smaller(tree: dict[str, Any]) -> None:
        desk = tree["classes"]["desk"]
        desk |= {"rank": 2, "ranks": {UP.format(2): 5, DOWN.format(0): 0, UP.format(0): 0}}
        desk |= {"format": "nf4", "formats": {UP.format(1): "fp32"}, "tail": 3}
        desk |= {"micro_batch": 2, "batch_size": 6, "sequence_length": 16, "local_steps": 9}
        desk |= {"checkpointing": True}

    before, after = (
        follow_plan(written(tree, edit), FLEET, SHAPES, SETTINGS).by_device()
        for edit in (lambda t: None, smaller)
    )
    carl = after["carl"]
    assert carl.ranks() == {
        DOWN.format(1): 2, UP.format(1): 2, DOWN.format(2): 2, UP.format(2): 5,
    }  # fmt: skip
    assert carl.first_trained_layer == 1
    forms = {m.name: form_text(m.form) for m in carl.matrices}
    assert forms[UP.format(1)] == "fp32"
    assert set(forms.values()) == {"fp32", "nf4/64"}
    assert {m.tail_rank for m in carl.matrices} == {3}
    assert (carl.micro_batch, carl.batch_size, carl.sequence_length) == (2, 6, 16)
    assert (carl.local_steps, carl.checkpointing) == (9, True)
    assert carl.peak_bytes < before["carl"].peak_bytes
    assert carl.upload_bytes == 4 * (64 + 172) * 11
    assert after["anna"] == before["anna"]


def test_what_a_device_says_for_all_matrices_goes_before_its_classs_single_ones(tree: Any) -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree["classes"]["till"]["ranks"] = {UP.format(0): 7}
        tree["devices"]["bert"] = {"class": "till", "rank": 1}

    followed = follow_plan(written(tree, edit), FLEET, SHAPES, SETTINGS).by_device()
    assert set(followed["bert"].ranks().values()) == {1}
    assert followed["anna"].ranks()[UP.format(0)] == 7


def test_a_tail_never_goes_beyond_what_the_coordinator_keeps(tree: Any) -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree["classes"]["desk"] |= {"rank": 11, "ranks": {UP.format(0): 12}, "tail": 4}

    carl = follow_plan(written(tree, edit), FLEET, SHAPES, SETTINGS).by_device()["carl"]
    assert {m.name: m.tail_rank for m in carl.matrices} == {
        m.name: 0 if m.name == UP.format(0) else 1 for m in carl.matrices
    }


def test_a_whole_tail_is_the_rules_and_not_the_files(tree: Any) -> None:
    settings = replace(SETTINGS, whole_tail=True, rank_cap=4096)
    fleet = [replace(device, memory_bytes=10**8) for device in FLEET]
    followed = follow_plan(written(tree), fleet, SHAPES, settings)
    assert {m.tail_rank for plan in followed.devices for m in plan.matrices} == {64}


def test_a_plan_from_headers_alone_holds_for_a_base_of_these_headers(tree: Any) -> None:
    paper = written(tree, lambda t: t["base"].update(digest=None))
    assert follow_plan(paper, FLEET, SHAPES, SETTINGS).devices
    # and a plan of a finished run for shapes of which nobody has read the weights
    on_paper = replace(SHAPES, digest="")
    assert follow_plan(written(tree), FLEET, on_paper, SETTINGS).devices


def test_a_measured_class_is_priced_by_its_measurement(tree: Any) -> None:
    slow = {"desk": CostCalibration(seconds_factor=3.0)}
    plain, measured = (
        follow_plan(written(tree), FLEET, SHAPES, SETTINGS, calibration=given).by_device()
        for given in (None, slow)
    )
    assert measured["carl"].seconds > 2 * plain["carl"].seconds
    assert measured["anna"] == plain["anna"]
    tight = {"till": CostCalibration(bytes_factor=2.0)}
    assert "more than its budget" in refusal(tree, lambda t: None, calibration=tight)


# ---------------------------------------------------------------- what cannot be followed


def desk(**values: Any) -> Edit:
    return lambda tree: tree["classes"]["desk"].update(values)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (desk(rank=13), "rank 13 of model.layers.0.mlp.down_proj: the coordinator keeps at most "
         "lora.rank_cap = 12"),
        (desk(ranks={UP.format(1): 65}), "rank 65 of model.layers.1.mlp.up_proj: expected 0 to "
         "64, the shorter side of its 172 x 64"),
        (desk(rank=-1), "rank -1 of"),
        (desk(rank=0, ranks={}), "no matrix has a rank above 0"),
        (desk(micro_batch=3), "batch_size 8 is no multiple of micro_batch 3"),
        (desk(sequence_length=33), "sequence_length is 33, and samples have at most "
         "data.max_tokens = 32"),
        (desk(format="q4"), "is to be held as q4, and the device supports fp32, nf4"),
        (desk(format="nf5"), "format 'nf5' of model.layers.0.mlp.down_proj: expected FORMAT, "
         "FORMAT/BLOCK or FORMAT/BLOCK+RANK, such as nf4"),
        (desk(formats={UP.format(1): "nf4/48"}), "expected a block of 32, 64, 128"),
        (desk(formats={UP.format(1): "fp32+8"}), "fp32 has neither blocks nor a pair"),
        (desk(tail=13), "tail is 13: expected 0 to 12"),
        (desk(rank=None, ranks={}), "model.layers.0.mlp.down_proj has no rank: give one in ranks, "
         "or one for all as rank"),
        (desk(local_steps=None), "neither its entry nor its class's has local_steps"),
        (desk(ranks={"model.layers.1.mlp.up_prj": 2}), "the plan of class desk: ranks names "
         "matrix 'model.layers.1.mlp.up_prj', which the base does not have or lora.targets "
         "leaves out; did you mean 'model.layers.1.mlp.up_proj'?"),
        (desk(formats={"head": "nf4"}), "formats names matrix 'head'"),
        (lambda t: t["devices"].update(carl="desq"), "the plan of device carl names class 'desq', "
         "which its classes do not have; did you mean 'desk'?"),
        (lambda t: (t["devices"].pop("carl"), t["classes"].pop("desk")), "the plan has no entry "
         "for carl; add them to its devices, or 'desk' to its classes"),
        (lambda t: t["base"].update(digest="f" * 64), "the plan is for base ffffffffffff, and the "
         "run's base is dddddddddddd; make a plan for this one with: fedtune plan RUN.toml"),
        (lambda t: t["base"].update(digest=None, headers="f" * 64), "headers ffffffffffff, and "
         "the run's base has eeeeeeeeeeee"),
        (lambda t: t["base"].update(digest=None, headers=None), "does not say for which base"),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_followed_is_refused(tree: Any, edit: Edit, words: str) -> None:
    assert words in refusal(tree, edit)


def test_a_plan_over_a_budget_says_by_how_much_and_what_takes_most(tree: Any) -> None:
    def whole(tree: dict[str, Any]) -> None:
        tree["classes"]["till"].update(rank=12, micro_batch=8, checkpointing=False)

    fleet = [replace(device, memory_bytes=10**8) for device in FLEET]
    needs = follow_plan(written(tree, whole), fleet, SHAPES, SETTINGS).devices[0].peak_bytes
    error = refusal(tree, whole)
    assert error.startswith("the plan of device anna (till) needs ")
    assert f"{human_bytes(needs - 1_400_000)} more than its budget of 1.4 MB" in error
    assert "its largest part, activations, takes" in error
    assert "choose a lower micro_batch or sequence_length, or checkpointing" in error
    exactly = [replace(device, memory_bytes=needs) for device in FLEET[:2]]
    assert follow_plan(written(tree, whole), [*exactly, FLEET[2]], SHAPES, SETTINGS).devices


def test_limits_of_what_is_sent_and_of_a_rounds_time_still_hold(tree: Any) -> None:
    sends = follow_plan(written(tree), FLEET, SHAPES, SETTINGS).by_device()["carl"].upload_bytes
    pins = {"desk": Pins(upload_bytes=sends)}
    assert follow_plan(written(tree), FLEET, SHAPES, SETTINGS, pins).devices
    error = refusal(tree, lambda t: None, pins={"desk": Pins(upload_bytes=sends - 1)})
    assert "a round, and fleet.desk.upload is" in error
    error = refusal(tree, lambda t: None, settings=replace(SETTINGS, round_seconds=1e-3))
    assert "s a round, and plan.round_seconds is 0.001" in error


def test_pins_of_the_planner_do_not_bind_a_file(tree: Any) -> None:
    pins = {"desk": Pins(rank=3, rank_max=1, format="nf4", micro_batch=1)}
    plain = follow_plan(written(tree), FLEET, SHAPES, SETTINGS)
    assert follow_plan(written(tree), FLEET, SHAPES, SETTINGS, pins) == plain


def test_devices_that_the_run_does_not_have_are_named(tree: Any) -> None:
    plan = written(tree, lambda t: t["devices"].update(berta="till", zoe="till"))
    assert unknown_devices(plan, ["anna", "bert", "carl"]) == (
        "the plan names devices that the run does not have: berta, zoe; did you mean 'bert'?"
    )
    assert unknown_devices(written(tree), ["anna", "bert", "carl", "dora"]) == ""


# ---------------------------------------------------------------- the file itself


def of_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    assert "plan.json" in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_as_it_was_written(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(tree), encoding="utf-8")
    assert read_plan(path) == written(tree)
    path.write_text(plan_text(tree), encoding="utf-8-sig")  # as some editors on Windows save it
    assert read_plan(path) == written(tree)


def test_what_is_no_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"write one with: fedtune plan RUN\.toml"):
        read_plan(tmp_path / "none.json")
    assert "is not a plan of layout fedtune-plan-1" in of_file(tmp_path, "[]")
    assert "is not a plan of layout" in of_file(tmp_path, '{"layout": "fedtune-plan-2"}')
    broken = of_file(tmp_path, '{\n "layout": "fedtune-plan-1"\n "run": "a"\n}')
    assert "is not JSON" in broken
    assert "in line 3" in broken
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="not JSON in UTF-8"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (desk(microbatch=2), "unknown key classes.desk.microbatch; did you mean 'micro_batch'?"),
        (desk(micro_batch=0), "classes.desk.micro_batch is 0: expected greater than or equal to 1"),
        (desk(local_steps="5"), "classes.desk.local_steps is '5': expected a valid integer"),
        (desk(rank=2.5), "classes.desk.rank is 2.5: expected a valid integer"),
        (desk(ranks={UP.format(0): True}), "ranks.model.layers.0.mlp.up_proj is True"),
        (lambda t: t["devices"].update(carl={"clas": "desk"}), "unknown key devices.carl.clas; "
         "did you mean 'class'?"),
        (lambda t: t["devices"].update(carl=3), "devices.carl is 3: expected a valid string"),
        (lambda t: t.update(device={}), "unknown key device; did you mean 'devices'?"),
        (lambda t: t.pop("base"), "missing key base"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_type_is_named(tree: Any, tmp_path: Path, edit: Edit, words: str) -> None:
    edited = copy.deepcopy(tree)
    edit(edited)
    assert words in of_file(tmp_path, json.dumps(edited))


def test_forms_are_read_as_they_are_written() -> None:
    for form in (MatrixForm("q3", 64, 8), MatrixForm("nf4", 128), MatrixForm("bf16")):
        assert parse_form(form_text(form)) == form
    assert parse_form("q4+8") == MatrixForm("q4", 64, 8)
    assert parse_form("bnb-nf4") == MatrixForm("bnb-nf4")


def test_the_blocks_are_those_that_a_matrix_can_be_quantised_in() -> None:
    codebooks = pytest.importorskip("fedtune.quant.codebooks")
    assert codebooks.BLOCKS == BLOCK_SIZES
