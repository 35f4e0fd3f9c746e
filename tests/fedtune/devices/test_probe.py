"""A probe keeps what it may, asks again for what changes, and becomes a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.devices import probe as probe_module
from fedtune.devices.measurement import Measurement, fingerprint, keep, kept, package_versions
from fedtune.devices.memory import FreeMemory
from fedtune.devices.probe import MEMORY_SHARE, Probe, Report, probe, profile_of
from fedtune.errors import ConfigError, MissingExtraError, ModelError
from fedtune.records import SiteReport
from fedtune.wire.messages import decode_site_report, encode_site_report

CPU = Measurement(
    accelerator="cpu",
    threads=4,
    matmul_flops_per_s={"fp32": 1e11, "bf16": 1.5e11},
    memory_bandwidth_bytes_per_s=2e10,
    compute="fp32",
    formats=("fp32", "q4"),
    failed_formats={"bnb-nf4": "bitsandbytes is not installed"},
    kernels="plain torch",
    measured="2026-11-27",
)
GPU = replace(
    CPU,
    accelerator="cuda",
    accelerator_name="NVIDIA H200",
    capability="9.0",
    accelerator_total_bytes=150 * 10**9,
    compute="bf16",
)
FOUND = Probe("a processor", 4, FreeMemory(10**10, "machine", 2 * 10**10), {"torch": "2.13"}, CPU)


class Counting:
    """A measurer that says how often it was asked."""

    def __init__(self, measurement: Measurement = CPU, **facts: str) -> None:
        self.measurement, self.given, self.runs, self.free = measurement, facts, 0, 0

    def facts(self) -> Mapping[str, str]:
        return self.given

    def measure(self, report: Report) -> Measurement:
        report("measuring")
        self.runs += 1
        return self.measurement

    def free_accelerator_bytes(self) -> int:
        self.free += 1
        return 10**9 * self.free


def test_a_machine_is_measured_once(tmp_path: Path) -> None:
    measurer, steps = Counting(GPU), list[str]()
    first = probe(measurer, tmp_path, report=steps.append)
    second = probe(measurer, tmp_path, report=steps.append)
    assert measurer.runs == 1
    assert steps == ["measuring"]
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.measurement == second.measurement == GPU


def test_free_memory_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(100, 0, -1))
    monkeypatch.setattr(
        probe_module, "free_memory", lambda: FreeMemory(next(left) * 10**9, "machine", 10**11)
    )
    measurer = Counting(GPU)
    found = [probe(measurer, tmp_path) for _ in range(3)]
    assert len({p.memory.free_bytes for p in found}) == 3
    assert len({p.accelerator_free_bytes for p in found}) == 3
    assert "free" not in "".join(path.read_text("utf-8") for path in tmp_path.iterdir())


def test_fresh_measures_anew_and_keeps_that(tmp_path: Path) -> None:
    probe(Counting(CPU), tmp_path)
    assert probe(Counting(GPU), tmp_path, fresh=True).measurement == GPU
    assert probe(Counting(CPU), tmp_path).measurement == GPU
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changed",
    ["processor_name", "usable_cores", "package_versions"],
)
def test_another_machine_or_version_is_another_fingerprint(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint({"gpu": "a"}, 10**10)
    assert before == fingerprint({"gpu": "a"}, 10**10 + 10**8)
    assert before != fingerprint({"gpu": "b"}, 10**10)
    assert before != fingerprint({"gpu": "a"}, 2 * 10**10)
    other: object = {"torch": "99"} if changed == "package_versions" else 77
    monkeypatch.setattr(f"fedtune.devices.measurement.{changed}", lambda: other)
    assert before != fingerprint({"gpu": "a"}, 10**10)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"formats": 3}', '{"formats": ["q99"]}'])
def test_a_kept_file_that_cannot_be_read_is_measured_anew(tmp_path: Path, text: str) -> None:
    probe(Counting(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="utf-8")
    measurer = Counting(GPU)
    assert probe(measurer, tmp_path).measurement == GPU
    assert measurer.runs == 1


def test_a_format_that_this_version_does_not_know_is_measured_anew(tmp_path: Path) -> None:
    keep(tmp_path, "name", replace(CPU, formats=("fp32", "q99")))  # type: ignore[arg-type]
    assert kept(tmp_path, "name") is None


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert probe(Counting(), tmp_path / "file" / "below").measurement == CPU
    assert probe(Counting(), None).measurement == CPU


def test_without_torch_there_are_memory_and_cores(tmp_path: Path) -> None:
    found = probe(None, tmp_path)
    assert found.measurement is None
    assert found.cores >= 1
    assert found.memory.free_bytes > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingExtraError, match=r"pip install 'fedtune\[train\]'"):
        profile_of(found, "site")


def test_a_machine_on_which_no_format_runs_has_no_profile() -> None:
    broken = replace(CPU, formats=(), failed_formats={"fp32": "RuntimeError: no"})
    with pytest.raises(ModelError, match="of fp32 it says: RuntimeError: no"):
        profile_of(replace(FOUND, measurement=broken), "site")


def test_a_link_that_cannot_be_measured_is_said_before_anything_is() -> None:
    measurer = Counting()
    with pytest.raises(ConfigError, match="--link"):
        probe(measurer, None, link_url="gopher://x")
    assert measurer.runs == 0


def test_the_link_is_measured_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "link_bytes_per_s", lambda url: 123.0)
    found = probe(Counting(), None, link_url="http://x/y")
    assert profile_of(found, "site").link_bytes_per_s == found.link_bytes_per_s == 123.0
    assert profile_of(found, "site", link_bytes_per_s=9.0).link_bytes_per_s == 9.0


def test_a_profile_counts_on_a_part_of_the_free_memory() -> None:
    assert profile_of(FOUND, "site").budget_bytes == int(10**10 * MEMORY_SHARE)
    on_gpu = replace(FOUND, measurement=GPU, accelerator_free_bytes=10**11)
    profile = profile_of(on_gpu, "site")
    assert profile.budget_bytes == int(10**11 * MEMORY_SHARE)
    assert profile.memory_bytes == int(10**10 * MEMORY_SHARE)


@pytest.mark.parametrize("measured", [CPU, GPU])
def test_a_site_can_allow_less_and_not_more(measured: Measurement) -> None:
    found = replace(FOUND, measurement=measured, accelerator_free_bytes=10**10)
    assert profile_of(found, "site", memory_bytes=10**9).budget_bytes == 10**9
    assert profile_of(found, "site", memory_bytes=10**15).budget_bytes == int(9e9)


@pytest.mark.parametrize("measured", [CPU, GPU])
def test_a_probed_profile_is_what_it_was_after_the_way_through_bytes(measured: Measurement) -> None:
    found = replace(
        FOUND, measurement=measured, accelerator_free_bytes=10**10, versions=package_versions()
    )
    profile = profile_of(found, "Krankenhaus Süd", link_bytes_per_s=1e6)
    assert profile.compute == measured.compute
    report = SiteReport(profile, "ab" * 32, 1, 1, 1)
    assert decode_site_report(encode_site_report(report)).profile == profile
