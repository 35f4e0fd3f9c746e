"""What torch says of this machine: plausible figures, a profile, and threads put back."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fedtune.kernels.dispatch import paths  # noqa: E402
from fedtune.records import BACKBONE_FORMATS  # noqa: E402
from fedtune.train import measure_device  # noqa: E402
from fedtune.train.compute import compute_dtype  # noqa: E402
from fedtune.train.measure_device import (  # noqa: E402
    DTYPES,
    TorchMeasurer,
    copy_bytes_per_s,
    matmul_flops_per_s,
    probe_profile,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    threads = torch.get_num_threads()
    measured = TorchMeasurer().measure(steps.append)
    assert steps == [
        "multiplying in fp32",
        "multiplying in bf16",
        "multiplying in fp16",
        "copying memory",
        "trying backbone formats",
    ]
    assert torch.get_num_threads() == threads
    assert set(measured.formats) | set(measured.failed_formats) == set(BACKBONE_FORMATS)
    assert DTYPES[measured.compute] == compute_dtype("auto", CPU)
    assert measured.kernels == paths()["cpu"]
    # Any machine that runs this is between a slow core and a rack.
    assert 1e8 < measured.matmul_flops_per_s["fp32"] < 1e14
    assert 1e8 < measured.memory_bandwidth_bytes_per_s < 1e13
    assert measured.matmul_flops_per_s.keys() <= DTYPES.keys()


def test_no_more_threads_are_used_than_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_device, "usable_cores", lambda: 1)
    used: list[int] = []
    monkeypatch.setattr(
        measure_device,
        "matmul_flops_per_s",
        lambda dtype, device: used.append(torch.get_num_threads()) or 1.0,
    )
    monkeypatch.setattr(measure_device, "copy_bytes_per_s", lambda device: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measured = TorchMeasurer().measure(lambda step: None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(used) == {1}
    assert measured.threads == 1


def _pretend(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    """Products of a side take so long; others fail."""

    def product(side: int, dtype: torch.dtype, device: torch.device) -> float:
        if side not in seconds:
            raise RuntimeError("not implemented for 'Half'")
        return seconds[side]

    monkeypatch.setattr(measure_device, "_product_seconds", product)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, 0.0),  # no such product
        ({256: 0.1, 512: 0.001}, 2 * 256**3 / 0.1),  # the next would take too long
        ({256: 0.001, 512: 0.004, 1024: 0.02}, 2 * 1024**3 / 0.02),  # the largest counts
        ({256: 0.001, 512: 0.004}, 2 * 512**3 / 0.004),  # no memory for the next
    ],
)
def test_products_grow_until_they_take_long_enough(
    seconds: dict[int, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, seconds)
    assert matmul_flops_per_s(torch.float32, CPU) == pytest.approx(expected)


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_device, "_best_seconds", lambda work, device: work() is None or 0.5)
    monkeypatch.setitem(measure_device._COPY_BYTES, "cpu", 1 << 20)
    assert copy_bytes_per_s(CPU) == 2 * (1 << 20) / 0.5


def test_a_probe_made_with_other_kernels_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TorchMeasurer().facts()
    monkeypatch.setattr(measure_device, "paths", lambda: {"cpu": "compiled C (another)"})
    assert TorchMeasurer().facts() != before


def test_the_profile_of_this_machine_needs_no_more_than_a_name(tmp_path: Path) -> None:
    profile = probe_profile("site", tmp_path, memory_bytes=10**8)
    assert profile.name == "site"
    assert profile.budget_bytes == 10**8
    assert profile.accelerator == "cpu"
    assert DTYPES[profile.compute] == compute_dtype("auto", CPU)
    assert "torch" in profile.versions
    (kept,) = tmp_path.iterdir()
    assert probe_profile("site", tmp_path, memory_bytes=10**8) == profile
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")
def test_a_gpu_is_measured_where_there_is_one(tmp_path: Path) -> None:
    measurer = TorchMeasurer()
    assert measurer.facts()["gpu"] == torch.cuda.get_device_name(0)
    measured = measurer.measure(lambda step: None)
    assert measured.accelerator == "cuda"
    assert measured.capability == ".".join(map(str, torch.cuda.get_device_capability(0)))
    assert measured.compute in ("bf16", "fp16")
    rates = measured.matmul_flops_per_s
    assert rates[measured.compute] > rates["fp32"] > 1e11
    # All but bitsandbytes' formats are our own to run.
    own = {name for name in BACKBONE_FORMATS if not name.startswith("bnb-")}
    assert own <= set(measured.formats), measured.failed_formats
    free, total = torch.cuda.mem_get_info(0)
    assert measured.accelerator_total_bytes == total
    assert abs(measurer.free_accelerator_bytes() - free) < 0.1 * total
    assert probe_profile("site", tmp_path).budget_bytes <= 0.9 * total
