"""The catalogue: every figure has its source, and a run file can name its classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.catalogue import (
    BANDWIDTH_SHARE,
    CATALOGUE,
    GPU_MEMORY_SHARE,
    HOST_MEMORY_SHARE,
    MATMUL_SHARE,
    DeviceClass,
    section_values,
)
from fedtune.config import load_run_config, parse_run_config
from fedtune.errors import ConfigError
from fedtune.settings import RunConfig

FIGURES = {
    "memory_bytes",
    "peak_flops_per_s",
    "peak_memory_bandwidth_bytes_per_s",
    "link_bytes_per_s",
}


def config(**section: object) -> RunConfig:
    tree = {
        "model": {"path": "base"},
        "data": {"train": "rows.jsonl"},
        "fleet": {"board": {"count": 1, **section}},
    }
    return parse_run_config(tree, "run.toml")


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.name)
def test_every_figure_of_a_class_has_a_source(entry: DeviceClass) -> None:
    assert set(entry.sources) == FIGURES
    assert all(len(source) > 8 for source in entry.sources.values())


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.name)
def test_a_class_is_consistent_with_itself(entry: DeviceClass) -> None:
    assert entry.name == next(name for name, value in CATALOGUE.items() if value is entry)
    assert entry.compute in entry.peak_flops_per_s
    assert entry.peak_flops_per_s[entry.compute] == max(entry.peak_flops_per_s.values())
    assert entry.shares_memory or entry.accelerator == "cuda"
    assert entry.accelerator == "cuda" or entry.compute == "fp32"
    assert not any(name.startswith("bnb") for name in entry.formats)


def test_a_plan_counts_with_less_than_the_vendor_gives() -> None:
    for entry in CATALOGUE.values():
        share = HOST_MEMORY_SHARE if entry.shares_memory else GPU_MEMORY_SHARE
        assert entry.budget_bytes == int(entry.memory_bytes * share)
        for dtype, rate in entry.flops_per_s.items():
            assert rate == entry.peak_flops_per_s[dtype] * MATMUL_SHARE  # type: ignore[index]
        peak = entry.peak_memory_bandwidth_bytes_per_s
        assert entry.memory_bandwidth_bytes_per_s == peak * BANDWIDTH_SHARE
    assert max(BANDWIDTH_SHARE, MATMUL_SHARE, HOST_MEMORY_SHARE, GPU_MEMORY_SHARE) < 1


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_device_fills_in_what_its_section_leaves_out(name: str) -> None:
    section, device = config(device=name).fleet["board"], CATALOGUE[name]
    assert section.memory == device.budget_bytes
    assert section.flops_per_s == device.flops_per_s[device.compute]
    assert section.memory_bandwidth == int(device.memory_bandwidth_bytes_per_s)
    assert section.link == int(device.link_bytes_per_s)
    assert section.formats == device.formats
    assert set(section_values(device)) <= set(type(section).model_fields)


def test_what_a_section_sets_itself_holds() -> None:
    section = config(device="raspberry-pi-5", memory="1 GB", formats=["nf4"], link=7).fleet["board"]
    assert (section.memory, section.formats, section.link) == (10**9, ("nf4",), 7)
    assert section.flops_per_s == CATALOGUE["raspberry-pi-5"].flops_per_s["fp32"]


def test_the_effective_configuration_holds_the_figures_themselves() -> None:
    first = config(device="gpu-8gb", link=7)
    dumped = first.model_dump(mode="json")
    assert dumped["fleet"]["board"]["memory"] == CATALOGUE["gpu-8gb"].budget_bytes
    # Read again, they are the section's own, whatever the catalogue has by then.
    dumped["fleet"]["board"]["memory"] = 5
    again = parse_run_config(dumped, "config.json").fleet["board"]
    assert (again.memory, again.link, again.device) == (5, 7, "gpu-8gb")
    assert RunConfig.model_validate_json(first.model_dump_json()) == first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raspbery_pi5", r"fleet\.board\.device = 'raspbery_pi5': .*did you mean 'raspberry-pi-5'"),
        ("H100", "did you mean 'h100'"),
        ("toaster-with-wings", "fedtune probe --catalogue"),
    ],
)
def test_an_unknown_device_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(device=name)


def test_without_a_device_memory_is_still_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"missing key fleet\.board\.memory"):
        config()
    with pytest.raises(ConfigError, match=r"fleet\.board\.device = 5"):
        config(device=5, memory=1000)


def test_a_device_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\npath = "base"\n[data]\ntrain = "x.jsonl"\n[fleet.a]\ncount = 1\n',
        encoding="utf-8",
    )
    section = load_run_config(path, ["fleet.a.device=t4"]).fleet["a"]
    assert section.memory == CATALOGUE["t4"].budget_bytes
