"""Every shipped run file loads, and its `prepare.py` makes rows that it can use."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fedtune.config import load_run_config
from fedtune.data.sites import open_sites

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN_FILES = sorted(EXAMPLES.glob("*/run.toml"))


def prepare_of(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", EXAMPLES / example / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.parent.name)
def test_the_run_file_loads(path: Path) -> None:
    config = load_run_config(path)
    assert config.devices >= 2


def test_there_are_run_files() -> None:
    assert {path.parent.name for path in RUN_FILES} >= {"e2e-restaurants", "medquad-hospitals"}


@pytest.mark.parametrize(
    ("example", "data", "sites"),
    [("e2e-restaurants", "e2e_nlg", 12), ("medquad-hospitals", "medquad", 9)],
)
def test_the_sites_are_as_many_as_the_devices(
    example: str, data: str, sites: int, shared_folder: Path
) -> None:
    train = shared_folder / "data" / data / "train.jsonl"
    config = load_run_config(EXAMPLES / example / "run.toml", [f"data.train={train}"])
    opened = open_sites(config.data, devices=config.devices, seed=config.run.seed)
    assert len(opened) == sites
    assert all(opened.site(name).held_out for name in opened.names)


def test_restaurant_rows_come_from_the_csv() -> None:
    text = 'mr,ref\n"name[Aromi], food[Chinese]","Aromi, Chinese."\n"food[Thai]",No name.\n'
    assert list(prepare_of("e2e-restaurants").rows_of(text)) == [
        {"prompt": "name[Aromi], food[Chinese]", "response": "Aromi, Chinese.", "client": "Aromi"}
    ]


def test_hospital_rows_come_from_the_archive() -> None:
    prepare = prepare_of("medquad-hospitals")
    pair = '<QAPair><Question qtype="causes">Why  A ?</Question><Answer>{}</Answer></QAPair>'
    document = (
        '<Document source="NHLBI"><QAPairs>'
        + pair.format("Because\n  of B.")
        + pair.format("Asked twice.")
        + '<QAPair><Question qtype="causes">Long?</Question><Answer>'
        + "x" * 1201
        + "</Answer></QAPair><QAPair><Question>None?</Question><Answer></Answer></QAPair>"
        + "</QAPairs></Document>"
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("MedQuAD-master/8_NHLBI/0000001.xml", document)
        archive.writestr("MedQuAD-master/readme.txt", "not XML")
    with zipfile.ZipFile(packed) as archive:
        assert prepare.rows_of(archive) == [
            {"prompt": "Why A ?", "response": "Because of B.", "client": "NHLBI", "qtype": "causes"}
        ]
