"""Named classes of devices for fleets that are planned on paper or simulated.

A vendor gives peaks: figures that no program reaches. `peak_flops_per_s` and
`peak_memory_bandwidth` are those peaks, each with its source, and what a plan counts with is a
share of them, said here once. A measured machine (`fedtune probe`) is always the better answer.

It stands below the settings because a run file may name a class of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fedtune.records import BACKBONE_FORMATS, ComputeName, FormatName

MATMUL_SHARE: Final = 0.5
"""Of the peak arithmetic, what the products of a training step reach. Chosen after what was
measured of float32 products of 1024 to 4096 rows on a Zen 3 server: 50 to 65 of 112 GFLOP/s per
core. Products of small micro-batches reach less, large ones on GPUs up to 0.7."""
BANDWIDTH_SHARE: Final = 0.8
"""Of the peak bandwidth, what copying reaches. An H200 copies at 4246 of 4800 GB/s
(docs/benchmarks.md), which is 0.88; CPUs lose more to their caches' write-allocation."""
HOST_MEMORY_SHARE: Final = 0.75
"""Of a machine's memory, what training may have; the rest is the operating system's, the
interpreter's and that of other programs. Chosen. For a GPU with memory of its own see below."""
GPU_MEMORY_SHARE: Final = 0.9
"""Of a GPU's own memory; the rest is the driver's, the CUDA context's (about 0.5 GB) and lost
between blocks of the allocator. Chosen."""

OWN_FORMATS: Final[tuple[FormatName, ...]] = tuple(
    name for name in BACKBONE_FORMATS if not name.startswith("bnb-")
)
"""They need nothing but torch, so they run on every class; bitsandbytes is not built for all."""

FigureName = Literal[
    "memory_bytes", "peak_flops_per_s", "peak_memory_bandwidth_bytes_per_s", "link_bytes_per_s"
]


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """A kind of device, by its vendor's figures.

    Attributes:
        title: which product the figures are of.
        accelerator: `cuda` where products run on an NVIDIA GPU, else `cpu`.
        memory_bytes: of the place where training happens. A vendor's GB is read as 10^9 bytes, the
            smaller of its two meanings.
        shares_memory: whether an operating system lives in the same memory.
        peak_flops_per_s: by dtype; dense products, sums in float32. A dtype that is not named is
            not faster than `fp32`.
        link_bytes_per_s: to and from a coordinator. It is the site's line that decides it, not the
            device, so it is an assumption.
        compute: the dtype that `train.compute = "auto"` picks on it.
        sources: figure -> where it is from, or how it was found.
    """

    name: str
    title: str
    accelerator: Literal["cpu", "cuda"]
    cpu_threads: int
    memory_bytes: int
    shares_memory: bool
    peak_flops_per_s: Mapping[ComputeName, float]
    peak_memory_bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    compute: ComputeName
    sources: Mapping[FigureName, str]
    formats: tuple[FormatName, ...] = OWN_FORMATS

    @property
    def budget_bytes(self) -> int:
        """Memory that a training process may use."""
        share = HOST_MEMORY_SHARE if self.shares_memory else GPU_MEMORY_SHARE
        return int(self.memory_bytes * share)

    @property
    def flops_per_s(self) -> dict[str, float]:
        """What products are taken to reach, by dtype."""
        return {dtype: peak * MATMUL_SHARE for dtype, peak in self.peak_flops_per_s.items()}

    @property
    def memory_bandwidth_bytes_per_s(self) -> float:
        """What reading and writing memory is taken to reach."""
        return self.peak_memory_bandwidth_bytes_per_s * BANDWIDTH_SHARE


_GB: Final = 10**9
_TERA: Final = 1e12
_SITE_LINE: Final = "assumed: a site's line of 100 Mbit/s, both ways; set `link` to your own"
_ROOM_LINE: Final = "assumed: 1 Gbit/s in a machine room; set `link` to your own"
_NVIDIA: Final = "https://www.nvidia.com/en-us/data-center"
_ADA: Final = (
    "NVIDIA Ada GPU architecture whitepaper, appendix A: 82.6 TFLOP/s in float32 and 165.2 dense "
    "with float32 sums on 128 SMs at 2.52 GHz"
)
_HOPPER: Final = "H100 architecture whitepaper, table 3: 66.9 (float32), 989.4 (bf16, fp16 dense)"
_ZEN3: Final = (
    "two 256-bit FMA pipes per core are 32 operations in a cycle (AMD publication 56665, Software "
    "Optimization Guide for Zen 3)"
)

_CLASSES: Final = (
    DeviceClass(
        name="raspberry-pi-5",
        title="Raspberry Pi 5, 8 GB",
        accelerator="cpu",
        cpu_threads=4,
        memory_bytes=8 * _GB,
        shares_memory=True,
        peak_flops_per_s={"fp32": 153.6e9},
        peak_memory_bandwidth_bytes_per_s=17.1e9,
        link_bytes_per_s=12.5e6,
        compute="fp32",
        sources={
            "memory_bytes": "https://www.raspberrypi.com/products/raspberry-pi-5/",
            "peak_flops_per_s": "4 Cortex-A76 cores at 2.4 GHz (product page above); two 128-bit "
            "FMA pipes per core are 16 operations in a cycle (Arm Cortex-A76 Software Optimization "
            "Guide, section 3)",
            "peak_memory_bandwidth_bytes_per_s": "LPDDR4X-4267 (product page above) on 32 bits",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="laptop-cpu",
        title="laptop with an AMD Ryzen 5 5625U, 16 GB",
        accelerator="cpu",
        cpu_threads=6,
        memory_bytes=16 * _GB,
        shares_memory=True,
        peak_flops_per_s={"fp32": 441.6e9},
        peak_memory_bandwidth_bytes_per_s=51.2e9,
        link_bytes_per_s=12.5e6,
        compute="fp32",
        sources={
            "memory_bytes": "chosen: the usual memory of a laptop of its kind",
            "peak_flops_per_s": "6 cores at 2.3 GHz, the base clock, which 15 W sustain "
            f"(https://www.amd.com/en/products/specifications/processors.html); {_ZEN3}",
            "peak_memory_bandwidth_bytes_per_s": "two channels of DDR4-3200 (AMD, as above)",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="desktop-cpu",
        title="desktop with an AMD Ryzen 7 5700X, 32 GB",
        accelerator="cpu",
        cpu_threads=8,
        memory_bytes=32 * _GB,
        shares_memory=True,
        peak_flops_per_s={"fp32": 870.4e9},
        peak_memory_bandwidth_bytes_per_s=51.2e9,
        link_bytes_per_s=12.5e6,
        compute="fp32",
        sources={
            "memory_bytes": "chosen: the usual memory of a desktop of its kind",
            "peak_flops_per_s": "8 cores at 3.4 GHz, the base clock "
            f"(https://www.amd.com/en/products/specifications/processors.html); {_ZEN3}",
            "peak_memory_bandwidth_bytes_per_s": "two channels of DDR4-3200 (AMD, as above)",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="jetson-orin-nano",
        title="NVIDIA Jetson Orin Nano Super, 8 GB",
        accelerator="cuda",
        cpu_threads=6,
        memory_bytes=8 * _GB,
        shares_memory=True,
        peak_flops_per_s={"fp32": 2.09 * _TERA, "bf16": 17 * _TERA, "fp16": 17 * _TERA},
        peak_memory_bandwidth_bytes_per_s=102e9,
        link_bytes_per_s=12.5e6,
        compute="bf16",
        sources={
            "memory_bytes": "https://developer.nvidia.com/blog/"
            "nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/",
            "peak_flops_per_s": "the same table: 17 TFLOP/s in fp16 (bf16 is as fast on Ampere); "
            "float32: 1024 cores at 1.02 GHz, two operations in a cycle",
            "peak_memory_bandwidth_bytes_per_s": "the same table; 68 GB/s before the Super mode",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="jetson-agx-orin",
        title="NVIDIA Jetson AGX Orin, 64 GB",
        accelerator="cuda",
        cpu_threads=12,
        memory_bytes=64 * _GB,
        shares_memory=True,
        peak_flops_per_s={"fp32": 5.3 * _TERA, "bf16": 42.5 * _TERA, "fp16": 42.5 * _TERA},
        peak_memory_bandwidth_bytes_per_s=204.8e9,
        link_bytes_per_s=12.5e6,
        compute="bf16",
        sources={
            "memory_bytes": "Jetson AGX Orin Series technical brief (NVIDIA, TB_10749)",
            "peak_flops_per_s": "the same brief: 5.3 TFLOP/s in float32; tensor cores 170 sparse "
            "INT8 TOP/s, a quarter of it dense in fp16 (bf16 is as fast on Ampere)",
            "peak_memory_bandwidth_bytes_per_s": "the same brief",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="gpu-8gb",
        title="NVIDIA GeForce RTX 4060, 8 GB",
        accelerator="cuda",
        cpu_threads=8,
        memory_bytes=8 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 15.1 * _TERA, "bf16": 30.2 * _TERA, "fp16": 30.2 * _TERA},
        peak_memory_bandwidth_bytes_per_s=272e9,
        link_bytes_per_s=12.5e6,
        compute="bf16",
        sources={
            "memory_bytes": "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/"
            "rtx-4060-4060ti/",
            "peak_flops_per_s": f"24 SMs at 2.46 GHz (product page above); per SM as in: {_ADA}",
            "peak_memory_bandwidth_bytes_per_s": "128 bits of GDDR6 at 17 Gbit/s (product page)",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="gpu-24gb",
        title="NVIDIA GeForce RTX 4090, 24 GB",
        accelerator="cuda",
        cpu_threads=8,
        memory_bytes=24 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 82.6 * _TERA, "bf16": 165.2 * _TERA, "fp16": 165.2 * _TERA},
        peak_memory_bandwidth_bytes_per_s=1008e9,
        link_bytes_per_s=12.5e6,
        compute="bf16",
        sources={
            "memory_bytes": "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/"
            "rtx-4090/",
            "peak_flops_per_s": _ADA,
            "peak_memory_bandwidth_bytes_per_s": "the same whitepaper: 384 bits at 21 Gbit/s",
            "link_bytes_per_s": _SITE_LINE,
        },
    ),
    DeviceClass(
        name="t4",
        title="NVIDIA T4, 16 GB",
        accelerator="cuda",
        cpu_threads=8,
        memory_bytes=16 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 8.1 * _TERA, "fp16": 65 * _TERA},
        peak_memory_bandwidth_bytes_per_s=320e9,
        link_bytes_per_s=125e6,
        compute="fp16",
        sources={
            "memory_bytes": f"{_NVIDIA}/tesla-t4/",
            "peak_flops_per_s": "the same page; it has no bf16 (compute capability 7.5)",
            "peak_memory_bandwidth_bytes_per_s": "the same page",
            "link_bytes_per_s": _ROOM_LINE,
        },
    ),
    DeviceClass(
        name="a100-40gb",
        title="NVIDIA A100 SXM, 40 GB",
        accelerator="cuda",
        cpu_threads=16,
        memory_bytes=40 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 19.5 * _TERA, "bf16": 312 * _TERA, "fp16": 312 * _TERA},
        peak_memory_bandwidth_bytes_per_s=1555e9,
        link_bytes_per_s=125e6,
        compute="bf16",
        sources={
            "memory_bytes": f"{_NVIDIA}/a100/",
            "peak_flops_per_s": "the same page; TF32 (156 TFLOP/s) is not what torch uses unasked",
            "peak_memory_bandwidth_bytes_per_s": "the same page",
            "link_bytes_per_s": _ROOM_LINE,
        },
    ),
    DeviceClass(
        name="a100-80gb",
        title="NVIDIA A100 SXM, 80 GB",
        accelerator="cuda",
        cpu_threads=16,
        memory_bytes=80 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 19.5 * _TERA, "bf16": 312 * _TERA, "fp16": 312 * _TERA},
        peak_memory_bandwidth_bytes_per_s=2039e9,
        link_bytes_per_s=125e6,
        compute="bf16",
        sources={
            "memory_bytes": f"{_NVIDIA}/a100/",
            "peak_flops_per_s": "the same page; TF32 (156 TFLOP/s) is not what torch uses unasked",
            "peak_memory_bandwidth_bytes_per_s": "the same page",
            "link_bytes_per_s": _ROOM_LINE,
        },
    ),
    DeviceClass(
        name="h100",
        title="NVIDIA H100 SXM, 80 GB",
        accelerator="cuda",
        cpu_threads=16,
        memory_bytes=80 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 66.9 * _TERA, "bf16": 989.4 * _TERA, "fp16": 989.4 * _TERA},
        peak_memory_bandwidth_bytes_per_s=3350e9,
        link_bytes_per_s=125e6,
        compute="bf16",
        sources={
            "memory_bytes": f"{_NVIDIA}/h100/",
            "peak_flops_per_s": _HOPPER,
            "peak_memory_bandwidth_bytes_per_s": f"{_NVIDIA}/h100/",
            "link_bytes_per_s": _ROOM_LINE,
        },
    ),
    DeviceClass(
        name="h200",
        title="NVIDIA H200 SXM, 141 GB",
        accelerator="cuda",
        cpu_threads=16,
        memory_bytes=141 * _GB,
        shares_memory=False,
        peak_flops_per_s={"fp32": 66.9 * _TERA, "bf16": 989.4 * _TERA, "fp16": 989.4 * _TERA},
        peak_memory_bandwidth_bytes_per_s=4800e9,
        link_bytes_per_s=125e6,
        compute="bf16",
        sources={
            "memory_bytes": f"{_NVIDIA}/h200/",
            "peak_flops_per_s": f"that of an H100: {_HOPPER}",
            "peak_memory_bandwidth_bytes_per_s": f"{_NVIDIA}/h200/",
            "link_bytes_per_s": _ROOM_LINE,
        },
    ),
)

CATALOGUE: Final[Mapping[str, DeviceClass]] = {entry.name: entry for entry in _CLASSES}
"""Name -> class, from the weakest to the strongest."""


def unknown_device(name: str) -> str:
    """What to say of a name that the catalogue does not have."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), CATALOGUE, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(CATALOGUE)}"
    return f"a device of the catalogue (fedtune probe --catalogue); {hint}"


def section_values(device: DeviceClass) -> dict[str, object]:
    """What a `[fleet.NAME]` section of a run file gets from its device, by key."""
    return {
        "memory": device.budget_bytes,
        "flops_per_s": device.flops_per_s[device.compute],
        "memory_bandwidth": int(device.memory_bandwidth_bytes_per_s),
        "link": int(device.link_bytes_per_s),
        "formats": device.formats,
    }
