"""`fedtune probe`: what it shows of a machine, with torch and without, and the catalogue."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

from fedtune.catalogue import CATALOGUE
from fedtune.cli.main import main
from fedtune.devices.measurement import Measurement
from fedtune.devices.memory import FreeMemory
from fedtune.devices.probe import Report
from fedtune.settings import DeviceClassSection

MEASURED = Measurement(
    accelerator="cuda",
    threads=8,
    matmul_flops_per_s={"fp32": 5e13, "bf16": 6.12e14},
    memory_bandwidth_bytes_per_s=4.2e12,
    compute="bf16",
    formats=("fp32", "bf16", "q4"),
    failed_formats={"bnb-nf4": "OSError: no library"},
    kernels="compiled CUDA kernels",
    accelerator_name="NVIDIA H200",
    capability="9.0",
    accelerator_total_bytes=150 * 10**9,
    measured="2026-11-27",
)


class Pretended:
    def facts(self) -> dict[str, str]:
        return {"gpu": "NVIDIA H200"}

    def measure(self, report: Report) -> Measurement:
        return MEASURED

    def free_accelerator_bytes(self) -> int:
        return 140 * 10**9


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("fedtune.cli.probe._measurer", Pretended)
    monkeypatch.setattr(
        "fedtune.devices.probe.free_memory",
        lambda: FreeMemory(10**11, "control group", 2 * 10**11),
    )


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["probe", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("h200")
def test_a_person_reads_everything_that_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    for words in (
        "100 GB free of 200 GB, limited by the control group",
        "NVIDIA H200, compute capability 9.0, 140 GB free of 150 GB",
        "50.0 TFLOP/s (GPU)",
        "612 TFLOP/s (GPU, what train.compute = 'auto' picks)",
        "4.2 TB/s, read and written",
        "fp32, bf16, q4 (each tried)",
        "OSError: no library",
        "compiled CUDA kernels",
        "measured 2026-11-27 (now)",
    ):
        assert words in text
    assert "kept from an earlier probe; --fresh measures anew" in shown(capsys)
    assert "measured 2026-11-27 (now)" in shown(capsys, "--fresh")


@pytest.mark.usefixtures("h200")
def test_the_section_it_prints_is_one_of_a_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, mark, section = shown(capsys).partition("[fleet.this]")
    tree = tomllib.loads(mark + section)["fleet"]["this"]
    parsed = DeviceClassSection.model_validate(tree)
    assert parsed.memory == int(0.9 * 140 * 10**9)
    assert parsed.flops_per_s == 6.12e14
    assert parsed.formats == ("fp32", "bf16", "q4")


@pytest.mark.usefixtures("h200")
def test_a_program_reads_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(shown(capsys, "--json"))
    assert tree["measurement"]["matmul_flops_per_s"]["bf16"] == 6.12e14
    assert tree["measurement"]["failed_formats"] == {"bnb-nf4": "OSError: no library"}
    assert tree["profile"]["accelerator_memory_bytes"] == int(0.9 * 140 * 10**9)
    assert tree["profile"]["compute"] == "bf16"
    assert tree["memory"]["limit"] == "control group"


def test_without_torch_it_says_which_extra_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fedtune.train.measure_device", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = shown(capsys)
    assert "usable cores" in text
    assert "free of" in text
    assert "pip install 'fedtune[train]'" in text
    tree = json.loads(shown(capsys, "--json"))
    assert tree["measurement"] is None
    assert tree["profile"] is None
    assert tree["cores"] >= 1


def test_a_bad_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--link", "coordinator:8080"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --link needs an http:// or https:// address")
    assert error.count("\n") == 1


def test_the_catalogue_is_listed_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--catalogue")
    for name in CATALOGUE:
        assert name in text
    tree = json.loads(shown(capsys, "--catalogue", "--json"))
    assert list(tree) == list(CATALOGUE)
    assert tree["h200"]["sources"]["memory_bytes"].startswith("https://www.nvidia.com/")
    assert tree["h200"]["budget_bytes"] == CATALOGUE["h200"].budget_bytes
