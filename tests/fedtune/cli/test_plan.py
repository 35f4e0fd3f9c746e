"""`fedtune plan`: what it shows and writes, without torch or a weight, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedtune.cli.main import main
from fedtune.model.shapes import read_shapes

_TOML = """
[run]
name = "paper"
[model]
path = '{model}'
[data]
train = '{rows}'
max_tokens = 64
[data.partition]
by = "field"
[fleet.till]
count = 2
memory = "2 MB"
formats = ["nf4"]
flops_per_s = 1e9
upload = "60 kB"
[fleet.desk]
count = 1
memory = "200 MB"
[fleet.tower]
count = 1
memory = "400 MB"
[lora]
rank_max = 8
[train]
batch_size = 8
local_steps = 3
[plan]
makespan_weight = 0
steps = "equal"
"""

Told = tuple[int, str, str]


@pytest.fixture
def run_file(stories260k: Path, colour_rows: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(_TOML.format(model=stories260k, rows=colour_rows), encoding="utf-8")
    return path


@pytest.fixture
def told(
    run_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Told]:
    """Run the verb in an empty folder, where torch cannot be imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)

    def call(*options: object) -> Told:
        code = main(["plan", str(run_file), *map(str, options)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


Verb = Callable[..., Told]


def of_json(told: Verb, *options: object) -> dict[str, Any]:
    code, out, err = told("--json", *options)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def refused(told: Verb, *options: object) -> str:
    code, out, err = told(*options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---------------------------------------------------------------- what is shown


def test_each_class_has_a_column_with_what_it_does_costs_and_is_limited_by(told: Verb) -> None:
    code, out, err = told()
    assert (code, err) == (0, "")
    rows = {line[:15].strip(): line[15:].split("   ") for line in out.splitlines()}
    cells = {label: [cell.strip() for cell in row if cell.strip()] for label, row in rows.items()}
    assert out.splitlines()[1].split() == ["till", "desk", "tower"]
    assert cells["backbone"] == ["nf4", "fp32", "fp32"]
    assert cells["devices"][0] == "2"
    assert re.fullmatch(r"\d+-\d+ in \d+ of 35", cells["rank"][0])
    assert cells["rank"][1:] == ["8 in 35 of 35"] * 2
    assert cells["local steps"] == ["3"] * 3
    assert cells["sequence"] == ["64 tokens"] * 3
    assert cells["memory"][0].endswith("of 2.0 MB")
    for label in ("weights", "adapters", "activations", "transient", "workspace"):
        assert label in cells, label
    for label in ("a round", "compute", "transfers", "down", "up", "micro-batch", "checkpointing"):
        assert len(cells[label]) == 3, label
    assert cells["limited by"][0].startswith("upload size")
    assert max(map(len, out.splitlines()[:30])) <= 80
    assert "a round of all 4 devices takes" in out
    assert "paced by till" in out


def test_the_ranks_are_drawn_by_matrix_and_layer(told: Verb) -> None:
    _, out, _ = told()
    (line,) = (line for line in out.splitlines() if line.startswith("self_attn.k_proj"))
    assert re.fullmatch(r"self_attn\.k_proj +[·▁▂▃▄▅▆▇█]{5}", line)
    assert "desk: rank 8 everywhere" in out
    assert "· frozen" in out


def test_a_narrow_terminal_gets_one_class_below_the_other(
    told: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = told()
    assert out.count("limited by") == 3
    assert max(len(line) for line in out.splitlines()[:30]) <= 40


def test_the_same_facts_come_as_json(told: Verb, tmp_path: Path) -> None:
    found = of_json(told)
    assert [group["class"] for group in found["groups"]] == ["till", "desk", "tower"]
    assert sorted(name for g in found["groups"] for name in g["devices"]) == [
        "east", "north", "south", "west",
    ]  # fmt: skip
    for group in found["groups"]:
        assert sum(group["memory_bytes"].values()) == group["peak_bytes"] <= group["budget_bytes"]
        seconds = group["compute_seconds"] + group["transfer_seconds"]
        assert group["seconds"] == pytest.approx(seconds)
        assert len(group["ranks"]) == len(group["forms"]) == 35
    assert found["round_seconds"] == max(group["seconds"] for group in found["groups"])
    assert found["paced_by"] == ["till"]
    assert found["plan"] == str(Path("plans") / "paper" / "plan.json")


# ---------------------------------------------------------------- what is written


def test_plan_and_picture_are_written(told: Verb, tmp_path: Path) -> None:
    groups = of_json(told, "--output", "there")["groups"]
    tree = json.loads((tmp_path / "there" / "plan.json").read_text(encoding="utf-8"))
    assert set(tree["classes"]) == {"till", "desk", "tower"}
    assert sorted(tree["devices"]) == ["east", "north", "south", "west"]
    assert tree["base"]["digest"] is None
    assert len(tree["base"]["headers"]) == 64
    assert tree["predicted"]["paced_by"] == ["till"]
    picture = ElementTree.parse(tmp_path / "there" / "plan.svg").getroot()
    cells = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}title")]
    ranks = {group["class"]: group["ranks"] for group in groups}
    rank = ranks["till"]["model.layers.2.mlp.up_proj"]
    words = f"rank {rank}" if rank else "frozen"
    assert f"till, layer 2, mlp.up_proj: {words}" in cells
    assert len(cells) == 1 + 3 * 35
    (description,) = picture.iter("{http://www.w3.org/2000/svg}desc")
    assert "desk (1 device, fp32) trains 35 of 35 matrices over 5 layers" in str(description.text)
    assert "prefers-color-scheme: dark" in "".join(picture.itertext())


def test_the_same_run_file_gives_the_same_bytes(told: Verb, tmp_path: Path) -> None:
    of_json(told)
    first = [path.read_bytes() for path in sorted((tmp_path / "plans" / "paper").iterdir())]
    of_json(told)
    again = [path.read_bytes() for path in sorted((tmp_path / "plans" / "paper").iterdir())]
    assert first == again
    assert len(first) == 2


def test_an_edited_plan_is_not_replaced_unless_asked(told: Verb, tmp_path: Path) -> None:
    of_json(told)
    path = tmp_path / "plans" / "paper" / "plan.json"
    edited = json.loads(path.read_text(encoding="utf-8"))
    edited["classes"]["desk"]["rank"] = 2
    path.write_text(json.dumps(edited), encoding="utf-8")
    assert "plan.json was edited and is not replaced; pass --plan" in refused(told)
    assert json.loads(path.read_text(encoding="utf-8")) == edited
    assert of_json(told, "--overwrite")["groups"][1]["ranks"]["model.layers.0.mlp.up_proj"] == 8
    path.write_text("not a plan", encoding="utf-8")
    assert "was edited" in refused(told)


def test_an_edited_plan_is_checked_priced_and_kept(told: Verb, tmp_path: Path) -> None:
    before = of_json(told)["groups"][1]
    path = tmp_path / "plans" / "paper" / "plan.json"
    edited = json.loads(path.read_text(encoding="utf-8"))
    edited["classes"]["desk"] |= {"rank": 2, "micro_batch": 4}
    path.write_text(json.dumps(edited), encoding="utf-8")
    after = of_json(told, "--plan", path)["groups"][1]
    assert set(after["ranks"].values()) == {2}
    assert after["micro_batch"] == 4
    assert after["peak_bytes"] < before["peak_bytes"]
    assert after["limited_by"] == "the plan's file"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["classes"]["desk"]["predicted"]["memory_bytes"]["total"] == after["peak_bytes"]
    assert of_json(told)["groups"][1]["ranks"] != after["ranks"]  # nothing is lost: it was priced


def test_an_edit_that_cannot_be_carried_out_is_refused_with_its_reason(
    told: Verb, tmp_path: Path
) -> None:
    of_json(told)
    path = tmp_path / "plans" / "paper" / "plan.json"
    edited = json.loads(path.read_text(encoding="utf-8"))
    edited["devices"] |= {"souht": "till"}
    path.write_text(json.dumps(edited), encoding="utf-8")
    assert "does not have: souht; did you mean 'south'?" in refused(told, "--plan", path)
    edited["devices"].pop("souht")
    edited["classes"]["till"] |= {"rank": 32, "ranks": {}}
    path.write_text(json.dumps(edited), encoding="utf-8")
    error = refused(told, "--plan", path)
    assert "(till) needs " in error
    assert "more than its budget of 2 MB" in error


# ---------------------------------------------------------------- options


def test_budgets_are_given_for_all_classes_or_for_one(told: Verb) -> None:
    def budgets(*options: str) -> list[int]:
        groups = of_json(told, *options)["groups"]
        return [group["budget_bytes"] for group in groups]

    assert budgets("--budget", "50 MB") == [50_000_000] * 3
    assert budgets("--budget", "50 MB", "--budget", "desk=60000000") == [
        50_000_000, 60_000_000, 50_000_000,
    ]  # fmt: skip
    assert "--budget dsk=1 GB: there is no class 'dsk'" in refused(told, "--budget", "dsk=1 GB")
    assert "--budget much: expected a size such as '8 GB'" in refused(told, "--budget", "much")
    assert "above 0" in refused(told, "--budget", "0")
    assert "memory budget of 100 kB" in refused(told, "--budget", "till=100 kB")


def test_a_deadline_bounds_the_round(told: Verb) -> None:
    free = of_json(told)["round_seconds"]
    bound = of_json(told, "--deadline", free / 2)
    assert bound["round_seconds"] <= free / 2
    assert "plan.round_seconds" in refused(told, "--deadline", "0.000001")
    assert "--deadline: plan.round_seconds = -1" in refused(told, "--deadline", "-1")


def test_the_rest_is_overridden_by_keys(told: Verb) -> None:
    groups = of_json(told, "--set", "lora.rank_max=2", "--set", "data.max_tokens=16")["groups"]
    assert {max(group["ranks"].values()) for group in groups} == {2}
    assert {group["sequence_length"] for group in groups} == {16}
    assert "--set: unknown key lora.rankmax" in refused(told, "--set", "lora.rankmax=2")


def test_importance_of_an_earlier_run_orders_the_ranks(
    told: Verb, tmp_path: Path, stories260k: Path
) -> None:
    shapes = read_shapes(stories260k, ("all-linear",))
    report = {
        "layout": "fedtune-importance-1",
        "base_digest": shapes.digest,
        "method": "spectrum",
        "tokens": 100,
        "gain_per_rank": {
            matrix.name: [1.0 if "layers.3.mlp.up" in matrix.name else 1e-6] * 8
            for matrix in shapes.matrices
        },
    }
    path = tmp_path / "importance.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    till = of_json(told, "--importance", path)["groups"][0]["ranks"]
    assert till["model.layers.3.mlp.up_proj"] == 8
    assert of_json(told)["groups"][0]["ranks"]["model.layers.3.mlp.up_proj"] < 8
    path.write_text(json.dumps({**report, "base_digest": "0" * 64}), encoding="utf-8")
    assert "is of another base model" in refused(told, "--importance", path)


# ---------------------------------------------------------------- without data, without weights


def test_without_the_data_a_plan_is_made_by_class(told: Verb, tmp_path: Path) -> None:
    found = of_json(told, "--set", "data.train=not/here.jsonl")
    assert [group["devices"] for group in found["groups"]] == [2, 1, 1]
    assert found["notes"][0].startswith("the data is not here")
    path = tmp_path / "plans" / "paper" / "plan.json"
    assert json.loads(path.read_text(encoding="utf-8"))["devices"] == {}
    # Once the data is there, its sites follow their classes.
    assert of_json(told, "--plan", path)["groups"][0]["devices"]


def test_sites_that_the_run_file_names_need_no_data(told: Verb, run_file: Path) -> None:
    missing = ["--set", "data.train=not/here.jsonl", "--set", "fleet.desk.sites=west"]
    assert [group["devices"] for group in of_json(told, *missing)["groups"]] == [2, 1, 1]
    text = run_file.read_text(encoding="utf-8")
    sites = "sites = {a = 'a.jsonl', b = 'b.jsonl', c = 'c.jsonl', d = 'd.jsonl'}"
    run_file.write_text(re.sub(r"train = '.*'", sites, text), encoding="utf-8")
    groups = of_json(told, "--set", "fleet.desk.sites=c")["groups"]
    assert sorted(name for group in groups for name in group["devices"]) == ["a", "b", "c", "d"]
    assert groups[1]["devices"] == ["c"]


def test_a_head_is_priced_from_the_config(
    tmp_path: Path,
    minilm: Path,
    letter_rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "run.toml"
    path.write_text(
        f"[model]\npath = {json.dumps(str(minilm))}\ntask = 'sequence-classification'\n"
        f"[data]\nformat = 'text-label'\ntrain = {json.dumps(str(letter_rows))}\n"
        "[fleet.any]\ncount = 2\nmemory = '1 GB'\n",
        encoding="utf-8",
    )
    assert main(["plan", str(path), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    made = json.loads((tmp_path / "plans" / "run" / "plan.json").read_text(encoding="utf-8"))
    assert made["made_with"]["dense_parameters"] == 3 * 384 + 3


LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def write_llama_70b(folder: Path, shards: int = 30) -> None:
    """The headers of Llama 3 70B; the weights are holes in the files, 141 GB of them."""
    wide, narrow, hidden = 28672, 1024, 8192
    tensors = {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden)}
    tensors["model.norm.weight"] = (hidden,)
    for layer in range(80):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {}
        end = 0
        for name in names[shard::shards]:
            size = 2
            for side in tensors[name]:
                size *= side
            header[name] = {
                "dtype": "BF16", "shape": tensors[name], "data_offsets": [end, end + size],
            }  # fmt: skip
            end += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")


def test_a_70b_base_is_planned_from_its_headers_alone(told: Verb, tmp_path: Path) -> None:
    base = tmp_path / "llama-70b"
    base.mkdir()
    try:
        write_llama_70b(base)
    except OSError as error:  # a file system without holes in files
        pytest.skip(f"no sparse files here: {error}")
    if sum(8 * 64 * path.stat().st_blocks for path in base.iterdir()) > 2**30:
        pytest.skip("this file system fills the holes of files")
    started = time.perf_counter()
    found = of_json(
        told,
        "--set", f"model.path={base.as_posix()}",
        "--budget", "till=60 GB", "--budget", "desk=150 GB", "--budget", "tower=400 GB",
        "--set", "data.max_tokens=2048", "--set", "fleet.till.upload=2 GB",
    )  # fmt: skip
    # Two seconds alone on two cores; to read the holes of the weights would take minutes.
    assert time.perf_counter() - started < 30
    till, desk, tower = found["groups"]
    assert till["format"] == "nf4"
    assert till["memory_bytes"]["weights"] < desk["memory_bytes"]["weights"]
    assert desk["memory_bytes"]["weights"] < tower["memory_bytes"]["weights"]
    assert len(till["ranks"]) == 560
    for group in found["groups"]:
        assert 30e9 < group["peak_bytes"] <= group["budget_bytes"]
