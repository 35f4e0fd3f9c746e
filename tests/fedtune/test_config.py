"""The run file: what it accepts, and one readable line for everything that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.config import load_run_config, parse_run_config
from fedtune.errors import ConfigError
from fedtune.settings import RunConfig, parse_bytes

SMALL = """
[model]
path = "some/model"
[data]
train = "rows.jsonl"
[fleet.laptop]
count = 2
memory = "8 GB"
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_three_sections_are_a_complete_run_file(write: Write) -> None:
    config = load_run_config(write(SMALL))
    assert config.devices == 2
    assert config.fleet["laptop"].memory == 8_000_000_000
    assert config.lora.targets == ("all-linear",)
    assert config.folder == Path("runs/run")


def test_a_byte_order_mark_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALL, encoding="utf-8-sig")
    assert load_run_config(path).devices == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("8 GB", 8 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), (" 7 b ", 7), (12, 12)],
)
def test_sizes_are_read_with_their_unit(text: object, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_plain_text_stands_for_a_list_of_one(write: Write) -> None:
    path = write(SMALL)
    assert load_run_config(path, ["lora.targets=q_proj"]).lora.targets == ("q_proj",)
    assert load_run_config(path, ["lora.targets=q_proj, v_proj"]).lora.targets == (
        "q_proj",
        "v_proj",
    )
    assert load_run_config(path, ["fleet.laptop.formats=fp32"]).fleet["laptop"].formats == ("fp32",)
    assert load_run_config(path, ["outputs.exports=peft"]).outputs.exports == ("peft",)
    assert load_run_config(path, ["outputs.exports="]).outputs.exports == ()


def test_overrides_take_toml_values_and_plain_texts(write: Write) -> None:
    config = load_run_config(
        write(SMALL),
        [
            "run.rounds=3",
            "train.learning_rate = 1e-3",
            "model.path=C:\\models\\one",
            'data.prompt_template="Q: {prompt}\\nA:"',
            "plan.checkpointing=false",
            "fleet.board.count=1",
            "fleet.board.memory=4 GB",
        ],
    )
    assert config.run.rounds == 3
    assert config.train.learning_rate == 1e-3
    assert config.model.path == "C:\\models\\one"
    assert config.data.prompt_template == "Q: {prompt}\nA:"
    assert not config.plan.checkpointing
    assert config.fleet["board"].memory == 4 * 10**9


def test_an_override_of_a_text_stays_a_text(write: Write) -> None:
    config = load_run_config(write(SMALL), ["run.name=2024-01-31", "model.revision=12"])
    assert (config.run.name, config.model.revision) == ("2024-01-31", "12")


def test_naming_one_source_of_data_drops_the_other(write: Write) -> None:
    path = write(SMALL)
    sites = load_run_config(path, ["data.sites.north=n.jsonl", "data.sites.south=s.jsonl"])
    assert sites.data.sites == {"north": "n.jsonl", "south": "s.jsonl"}
    assert sites.data.train == ""
    whole = load_run_config(path, ['data.sites={north = "n.jsonl"}'])
    assert whole.data.train == ""
    back = load_run_config(path, ["data.sites.north=n.jsonl", "data.train=all.jsonl"])
    assert (back.data.train, back.data.sites) == ("all.jsonl", {})


def test_paths_beside_the_run_file_become_absolute(write: Write, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    config = load_run_config(write(SMALL))
    assert Path(config.data.train) == (tmp_path / "rows.jsonl").resolve()
    assert config.model.path == "some/model"


def test_an_effective_config_reads_back_the_same(write: Write, tmp_path: Path) -> None:
    config = load_run_config(write(SMALL), ["fleet.laptop.format=nf4"])
    saved = tmp_path / "config.json"
    saved.write_text(config.model_dump_json(), encoding="utf-8")
    assert load_run_config(saved) == config


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["run.rounds=0"], "--set: run.rounds = 0: expected a value greater than or equal to 1"),
        (["train.learning_rate=inf"], "train.learning_rate = inf: expected a finite number"),
        (["run.name=a/b"], "run.name = 'a/b': expected letters, digits"),
        (["run=5"], "run = 5: expected a section, written as [run]"),
        (["fleet.laptop=3"], "fleet.laptop = 3: expected a section, written as [fleet.laptop]"),
        (["lora.targets=5"], "lora.targets = 5: expected a list, or a text with commas"),
        (["lora.targets=[]"], "lora.targets = []: expected at least 1 of them"),
        (["model.path="], "model.path = '': expected a text"),
        (["wire.up=fp8"], "wire.up = 'fp8': expected 'fp32', 'fp16', 'bf16'"),
        (["fleet.laptop.format=fp8"], "fleet.laptop.format = 'fp8': expected 'fp32', 'bf16'"),
        (["fleet.laptop.memory=8 XB"], "= '8 XB': expected a size such as '8 GB' or '512 MiB'"),
        (["fleet={}"], "missing key fleet; add at least one [fleet.NAME] section"),
        (["lora.rnk_max=4"], "--set: unknown key lora.rnk_max; did you mean rank_max?"),
        (["lora.rank-max=4"], "unknown key lora.rank-max; did you mean rank_max?"),
        (["lorra.rank=4"], "unknown key lorra; did you mean lora?"),
        (["data.alpha=1"], "unknown key data.alpha; did you mean data.partition.alpha?"),
        (
            ["wire.up=q3", "simulation.backend=ray"],
            "wire.up = 'q3' with wire.error_feedback goes with simulation.backend = 'inprocess'",
        ),
        (["wire.colour=1"], "unknown key wire.colour; valid keys: down"),
        (["fleet.laptop.memry=1"], "unknown key fleet.laptop.memry; did you mean memory?"),
        (["fleet.board.count=1"], "missing key fleet.board.memory; budget of one training"),
        (["run.rounds"], "--set needs section.key=value, got 'run.rounds'"),
        (["run.rounds.x=1", "run.rounds.y.z=1"], "run.rounds"),
        (["model.path.x=1"], "model.path is a value, not a section"),
        (["data.train="], "expected exactly one of data.train and data.sites, found neither"),
        (["data.prompt_template=hello"], "expected a text that contains {prompt}"),
        (["data.format=text-label"], "'sequence-classification' goes with data.format"),
        (
            ["train.keep_optimizer=true", "train.optimizer=sgd"],
            "train.keep_optimizer goes with train.optimizer = 'adamw', found 'sgd'",
        ),
        (
            ["train.keep_optimizer=true", "simulation.backend=ray"],
            "train.keep_optimizer goes with simulation.backend = 'inprocess': 'ray' moves devices",
        ),
        (
            ["train.way=s2ft", "lora.start=eva"],
            "train.way 's2ft' takes the place of lora.start = 'eva'",
        ),
        (
            ["aggregate.rule=flora", "aggregate.momentum=0.5"],
            "'flora' goes with aggregate.server_step = 1, aggregate.momentum = 0, "
            "aggregate.optimizer = 'average' and aggregate.keep_dropped = false; found "
            "aggregate.momentum = 0.5; use 'delta' for others",
        ),
        (
            ["aggregate.rule=zero-pad", "aggregate.optimizer=adam", "lora.rank_max=4"],
            "'zero-pad' goes with aggregate.server_step = 1, aggregate.momentum = 0, "
            "aggregate.optimizer = 'average' and aggregate.keep_dropped = false; found "
            "aggregate.optimizer = 'adam'",
        ),
        (
            ["aggregate.rule=flora", "aggregate.keep_dropped=true"],
            "found aggregate.keep_dropped = True; use 'delta' for others",
        ),
        (
            ["aggregate.optimizer=adam"],
            "aggregate.optimizer 'adam' needs aggregate.server_step of at most 0.1, by which "
            "weights move in a round; found 1; try 0.001",
        ),
        (
            ["train.way=s2ft", "aggregate.rule=zero-pad"],
            "'zero-pad' averages A apart from B, and with train.way = 's2ft' devices choose",
        ),
        (
            ["lora.start=pissa", "aggregate.rule=zero-pad"],
            "'zero-pad' averages A apart from B, and with lora.start = 'pissa' devices choose",
        ),
        (
            ["plan.shortest_sequence=512"],
            "plan.shortest_sequence = 512: expected at most data.max_tokens = 256",
        ),
        (
            ["defence.method=multi-krum"],
            "defence.method 'multi-krum' goes with aggregate.weights 'uniform' or 'tokens', found "
            "'samples'",
        ),
        (
            ["defence.method=clip", "aggregate.weights=uniform", "aggregate.rule=flexlora"],
            "'clip' shortens differences, and aggregate.rule 'flexlora' does not join by",
        ),
        (
            ["defence.method=root-cosine", "aggregate.weights=uniform"],
            "'root-cosine' needs defence.root_site, the name of a site",
        ),
        (
            [
                "defence.method=root-cosine",
                "aggregate.weights=uniform",
                "defence.root_site=hq",
                "run.devices_per_round=1",
            ],
            "root site in every round: expected run.devices_per_round = 0, found 1",
        ),
        (
            [
                "defence.method=root-cosine",
                "aggregate.weights=uniform",
                "defence.root_site=hq",
                "rounds.close_fraction=0.5",
            ],
            "expected rounds.mode = 'sync' without close_count and close_fraction",
        ),
        (["run.minimum_devices=3"], "run.minimum_devices = 3: expected at most 2, the devices"),
        (["run.devices_per_round=3"], "run.devices_per_round = 3: expected at most 2"),
        (
            ["run.devices_per_round=1", "run.minimum_devices=2"],
            "run.minimum_devices = 2: expected at most run.devices_per_round = 1",
        ),
        (
            ["fleet.laptop.format=nf4", "fleet.laptop.formats=fp32"],
            "fleet.laptop.format = 'nf4': expected one of fleet.laptop.formats (fp32)",
        ),
        (
            ["fleet.laptop.micro_batch=3"],
            "fleet.laptop.micro_batch = 3: expected a divisor of train.batch_size = 16",
        ),
        (
            ["fleet.laptop.rank=8", "fleet.laptop.rank_max=4"],
            "fleet.laptop.rank = 8: expected at most fleet.laptop.rank_max = 4",
        ),
    ],
)
def test_refusals_name_the_key_and_what_is_allowed(
    write: Write, overrides: list[str], line: str
) -> None:
    assert line in refusal(write(SMALL), *overrides)


def test_both_sources_of_data_at_once_are_refused(write: Write) -> None:
    path = write(SMALL + '[data.sites]\nnorth = "n.jsonl"\n')
    assert "exactly one of data.train and data.sites, found both" in refusal(path)


def test_missing_sections_say_what_to_add(write: Write) -> None:
    assert "missing key model; add a [model] section" in refusal(write("[run]\nseed = 1\n"))
    text = refusal(write('[model]\npath = "m"\n[data]\ntrain = "t"\n'))
    assert "missing key fleet; add at least one [fleet.NAME] section" in text


def test_a_key_outside_its_section_is_pointed_home(write: Write) -> None:
    assert "unknown key local_steps; did you mean train.local_steps?" in refusal(
        write("local_steps = 3\n" + SMALL)
    )


def test_unreadable_run_files_are_refused(tmp_path: Path) -> None:
    assert "write one with: fedtune init" in refusal(tmp_path / "none.toml")
    assert "cannot be read" in refusal(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n", encoding="utf-8")
    assert f"{broken} is not valid TOML" in refusal(broken)
    broken.write_bytes(b'[run]\nname = "\xff"\n')
    assert "is not UTF-8 text (byte 14)" in refusal(broken)
    wrong = tmp_path / "config.json"
    wrong.write_text("[1]", encoding="utf-8")
    assert "must hold a JSON object of sections, found a list" in refusal(wrong)
    wrong.write_text("{", encoding="utf-8")
    assert "is not valid JSON" in refusal(wrong)


def test_a_long_value_is_cut_in_the_refusal(write: Write) -> None:
    assert len(refusal(write(SMALL), f"wire.down={'x' * 5000}")) < 200


def test_a_tree_of_plain_values_is_a_config() -> None:
    tree = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "fleet": {"a": {"count": 1, "memory": 1000}},
    }
    assert isinstance(parse_run_config(tree, "test"), RunConfig)
    with pytest.raises(ConfigError, match=r"^here: missing key model"):
        parse_run_config({}, "here")


def test_every_key_says_what_it_is() -> None:
    from fedtune.settings import DeviceClassSection, PartitionSection

    sections = [field.annotation for field in RunConfig.model_fields.values()]
    for section in [*sections, DeviceClassSection, PartitionSection]:
        for name, field in getattr(section, "model_fields", {}).items():
            if name != "partition":
                assert field.description, f"{section}.{name} has no description"
