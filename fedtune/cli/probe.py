"""`fedtune probe`: what this machine can carry, and the catalogue of device classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.catalogue import (
    BANDWIDTH_SHARE,
    CATALOGUE,
    GPU_MEMORY_SHARE,
    HOST_MEMORY_SHARE,
    MATMUL_SHARE,
    DeviceClass,
)
from fedtune.cli.amounts import bytes_text
from fedtune.config import cache_folder
from fedtune.devices.measurement import Measurement
from fedtune.devices.probe import MEMORY_SHARE, Measurer, Probe, profile_of
from fedtune.devices.probe import probe as probe_machine

_NO_TORCH = "torch is not installed: pip install 'fedtune[train]' to measure speed and formats"


def probe(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="measure anew, whatever an earlier probe left")
    ] = False,
    link: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="a file of some megabytes on the coordinator's machine (http, https), to "
            "measure the link with; at most 16 MB and 5 s",
        ),
    ] = "",
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="list the device classes that a run file may name")
    ] = False,
) -> None:
    """Measure this machine: memory, cores, speed by dtype, and which backbone formats run."""
    if catalogue:
        _show_catalogue(as_json)
        return
    with Console(stderr=True).status("looking at the machine") as status:
        found = probe_machine(
            _measurer(),
            cache_folder() / "devices",
            fresh=fresh,
            link_url=link,
            report=lambda step: status.update(step),
        )
    if as_json:
        typer.echo(json.dumps(_as_json(found)))
        return
    console = Console()
    console.print(_table(_facts(found)))
    for line in _closing(found):
        console.print(Text(line), soft_wrap=True)


def _measurer() -> Measurer | None:
    try:
        from fedtune.train.measure_device import TorchMeasurer
    except ImportError:
        return None
    return TorchMeasurer()


def _as_json(found: Probe) -> dict[str, object]:
    """Everything that was found, and the profile that a site would send."""
    tree: dict[str, object] = asdict(found)
    tree["profile"] = None if found.measurement is None else asdict(profile_of(found, "this"))
    return tree


# ---------------------------------------------------------------- the machine


def _table(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _facts(found: Probe) -> Iterator[tuple[str, str]]:
    memory = found.memory
    yield "processor", f"{found.processor}, {found.cores} usable cores"
    limit = "" if memory.limit == "machine" else f", limited by the {memory.limit}"
    total = bytes_text(memory.total_bytes)
    yield "memory", f"{bytes_text(memory.free_bytes)} free of {total}{limit}"
    if found.measurement is not None:
        yield from _measured_facts(found, found.measurement)
    if found.link_bytes_per_s:
        yield "link", f"{bytes_text(found.link_bytes_per_s)}/s from the coordinator"
    versions = (f"{name} {number}" for name, number in found.versions.items())
    yield "versions", ", ".join(versions)


def _measured_facts(found: Probe, measured: Measurement) -> Iterator[tuple[str, str]]:
    if measured.accelerator != "cpu":
        free = bytes_text(found.accelerator_free_bytes)
        yield (
            "GPU",
            f"{measured.accelerator_name}, compute capability {measured.capability}, {free} free "
            f"of {bytes_text(measured.accelerator_total_bytes)}",
        )
    threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
    place = "GPU" if measured.accelerator != "cpu" else threads
    for name, rate in measured.matmul_flops_per_s.items():
        chosen = ", what train.compute = 'auto' picks" if name == measured.compute else ""
        yield f"{name} products", f"{_flops_text(rate)} ({place}{chosen})"
    yield "copying", f"{bytes_text(measured.memory_bandwidth_bytes_per_s)}/s, read and written"
    yield "formats", f"{', '.join(measured.formats) or 'none'} (each tried)"
    for name, reason in measured.failed_formats.items():
        yield f"not {name}", reason
    yield "kernels", measured.kernels


def _flops_text(rate: float) -> str:
    """Operations per second in powers of 1000: `47.0 GFLOP/s`, `612 TFLOP/s`."""
    value, unit = (rate / 1e12, "TFLOP/s") if rate >= 0.9995e12 else (rate / 1e9, "GFLOP/s")
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"


def _closing(found: Probe) -> Iterator[str]:
    measured = found.measurement
    if measured is None:
        yield _NO_TORCH
        return
    kept = "kept from an earlier probe; --fresh measures anew" if found.from_cache else "now"
    yield f"\nmeasured {measured.measured} ({kept}); memory is asked for every time"
    yield f"as a class of a run file, with {MEMORY_SHARE:.0%} of the free memory:\n"
    yield from _section(found)


def _section(found: Probe) -> Iterator[str]:
    """The machine as a class of a simulated fleet."""
    profile = profile_of(found, "this")
    rates = profile.matmul_flops_per_s
    formats = ", ".join(f'"{name}"' for name in profile.formats)
    yield "[fleet.this]"
    yield "count = 1"
    yield f"memory = {profile.budget_bytes}"
    yield f"flops_per_s = {rates.get(profile.compute, 0.0):.3g}"
    yield f"memory_bandwidth = {int(profile.memory_bandwidth_bytes_per_s)}"
    if profile.link_bytes_per_s:
        yield f"link = {int(profile.link_bytes_per_s)}"
    yield f"formats = [{formats}]"


# ---------------------------------------------------------------- the catalogue


def _show_catalogue(as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: _class_json(entry) for name, entry in CATALOGUE.items()}))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("device", no_wrap=True)
    for name in ("memory", "fp32\nTFLOP/s", "16 bit\nTFLOP/s", "memory\nGB/s", "link\nMB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("figures of")
    for entry in CATALOGUE.values():
        table.add_row(*(Text(cell) for cell in _cells(entry)))
    console = Console()
    console.print(table)
    console.print(
        Text(
            f"What a plan counts with: of the vendor's peaks {MATMUL_SHARE:.0%} of the arithmetic "
            f"and {BANDWIDTH_SHARE:.0%} of the bandwidth; of the memory {GPU_MEMORY_SHARE:.0%} "
            f"where it is a GPU's own and {HOST_MEMORY_SHARE:.0%} where a system lives in it. The "
            "link is an assumption. --json has the peaks and the source of each."
        ),
        soft_wrap=True,
    )


def _cells(entry: DeviceClass) -> Iterator[str]:
    rates = entry.flops_per_s
    half = rates.get("bf16", rates.get("fp16"))
    yield entry.name
    yield bytes_text(entry.budget_bytes)
    yield f"{rates['fp32'] / 1e12:.3g}"
    yield "-" if half is None else f"{half / 1e12:.3g}"
    yield f"{entry.memory_bandwidth_bytes_per_s / 1e9:.0f}"
    yield f"{entry.link_bytes_per_s / 1e6:.3g}"
    yield entry.title.removeprefix("NVIDIA ")


def _class_json(entry: DeviceClass) -> dict[str, object]:
    """Peaks, what is made of them, and their sources."""
    return asdict(entry) | {
        "budget_bytes": entry.budget_bytes,
        "flops_per_s": entry.flops_per_s,
        "memory_bandwidth_bytes_per_s": entry.memory_bandwidth_bytes_per_s,
    }
