"""What torch can say of the machine it runs on: speeds by dtype, the GPU, the formats that run.

Every figure is the best of some repeats, because other programs only ever make it worse. All of it
takes a few seconds: it is asked for once and kept (`fedtune.devices.measurement`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Final, Literal

import torch

from fedtune.devices.measurement import Measurement
from fedtune.devices.memory import free_memory
from fedtune.devices.probe import Report, probe, profile_of
from fedtune.devices.processor import usable_cores
from fedtune.errors import ModelError
from fedtune.kernels.dispatch import paths
from fedtune.records import ComputeName, DeviceProfile
from fedtune.train.compute import compute_dtype
from fedtune.train.format_trials import try_formats

DTYPES: Final[Mapping[ComputeName, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_FIRST_SIDE: Final = 256
_LARGEST_SIDE: Final = {"cpu": 1024, "cuda": 8192}
"""Sides of the square matrices that are multiplied. They double until products take long enough to
time, or reach the last: larger ones are no faster."""
_PRODUCT_S: Final = 0.4
"""Longest time of one product; without instructions for it, bf16 on a CPU takes 60 times as long
as float32, and the next larger matrices eight times that."""
_REPEATS_S: Final = 0.25
_MOST_REPEATS: Final = 20
_COPY_BYTES: Final = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Larger than any cache that a copy could stay in."""


class TorchMeasurer:
    """Measures the GPU where torch sees one, else the CPU. See `fedtune.devices.probe.Measurer`.

    Args:
        accelerator: what to measure, whatever else there is.

    Raises:
        ModelError: it is a GPU, and torch sees none.
    """

    def __init__(self, accelerator: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        there = torch.cuda.is_available()
        if accelerator == "cuda" and not there:
            raise ModelError("the accelerator is set to cuda, and torch finds no such device")
        on_gpu = there and accelerator != "cpu"
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")

    def facts(self) -> Mapping[str, str]:
        """The GPU, the threads, and the kernels, with which formats are tried."""
        kernels = {"kernels": paths()[str(self.device)]}
        if self.device.type == "cpu":
            return {"threads": str(_threads()), **kernels}
        return {
            **kernels,
            "gpu": torch.cuda.get_device_name(self.device),
            "capability": self._capability(),
            "runtime": str(torch.version.cuda or torch.version.hip),
        }

    def free_accelerator_bytes(self) -> int:
        """Free memory of the GPU, with what this process holds on to without using it."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def measure(self, report: Report) -> Measurement:
        """Measure speeds, and try the formats."""
        with _usable_threads() as threads:
            rates: dict[str, float] = {}
            for name, dtype in DTYPES.items():
                report(f"multiplying in {name}")
                rate = matmul_flops_per_s(dtype, self.device)
                if rate:
                    rates[name] = rate
            report("copying memory")
            bandwidth = copy_bytes_per_s(self.device)
            report("trying backbone formats")
            compute = compute_dtype("auto", self.device)
            trials = try_formats(self.device, compute)
        on_gpu = self.device.type == "cuda"
        return Measurement(
            accelerator=self.device.type,
            threads=threads,
            matmul_flops_per_s=rates,
            memory_bandwidth_bytes_per_s=bandwidth,
            compute=next(name for name, dtype in DTYPES.items() if dtype == compute),
            formats=trials.formats,
            failed_formats=trials.failed,
            kernels=paths()[str(self.device)],
            accelerator_name=torch.cuda.get_device_name(self.device) if on_gpu else "",
            capability=self._capability() if on_gpu else "",
            accelerator_total_bytes=torch.cuda.mem_get_info(self.device)[1] if on_gpu else 0,
            measured=date.today().isoformat(),
        )

    def _capability(self) -> str:
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{major}.{minor}"


def probe_profile(
    name: str,
    cache: Path | None,
    *,
    device_class: str = "probed",
    memory_bytes: int = 0,
    link_bytes_per_s: float = 0.0,
    fresh: bool = False,
) -> DeviceProfile:
    """The profile of this very machine, for a site that answers the profile query with it.

    Args:
        name: the site's own name.
        cache: folder of kept measurements (`cache_folder() / "devices"`); None: measure.

    The others are those of `fedtune.devices.probe`: `profile_of`, and `fresh` of `probe`.
    """
    found = probe(TorchMeasurer(), cache, fresh=fresh)
    return profile_of(found, name, device_class, memory_bytes, link_bytes_per_s)


# ---------------------------------------------------------------- speeds


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of square products in a dtype; 0 where torch has none."""
    side, rate = _FIRST_SIDE, 0.0
    while True:
        try:
            seconds = _product_seconds(side, dtype, device)
        except RuntimeError:  # "not implemented for 'Half'"; or no memory for larger ones
            return rate
        rate = 2.0 * side**3 / seconds
        if side >= _LARGEST_SIDE[device.type] or 8 * seconds > _PRODUCT_S:
            return rate
        side *= 2


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _best_seconds(lambda: torch.mm(left, right, out=out), device)


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes per second that are read and written by a copy, added up."""
    on_cpu = device.type == "cpu"
    free = free_memory().free_bytes if on_cpu else torch.cuda.mem_get_info(device)[0]
    # On a device that is nearly full, a smaller copy rather than none.
    elements = max(1 << 20, min(_COPY_BYTES[device.type], free // 8)) // 4
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return 2.0 * 4 * elements / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time that it took; the first call is a warm-up and never counts."""
    best, started = float("inf"), time.perf_counter()
    for run in range(_MOST_REPEATS):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        if run:
            best = min(best, ended - begun)
        if run >= 2 and ended - started > _REPEATS_S:
            break
    return best


def _threads() -> int:
    """Threads that a training process uses well: torch's choice, but no more than it may run."""
    return min(torch.get_num_threads(), usable_cores())


@contextmanager
def _usable_threads() -> Iterator[int]:
    """Compute with as many threads as this process may run; torch does not see quotas."""
    before, threads = torch.get_num_threads(), _threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
