"""What a coordinator spends on a round, by the number of devices, and where it saturates.

    python benchmarks/load.py [--quick] [--json]

Light devices follow the protocol and train nothing: they add noise to what they are sent. So all
time is that of messages, checks, joins and checkpoints. Each fleet is a process of its own, whose
devices take turns in it on the in-process grid: what is counted is the coordinator alone, without
a link; the processor's time of the devices is counted apart. The model's shapes are those of a
transformer of 8 layers and width 512 (56 matrices), rank 8: 1.8 MB an update in float32.

`sampled` reads processor time and memory of any processes, for the same figures of a deployment.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

FLEETS = (10, 50, 200)
QUICK_FLEETS = (4, 12)
ROUNDS = 3
RANK = 8


@dataclass(frozen=True)
class Loaded:
    """One fleet's cost, per round.

    Attributes:
        cpu_s: of the process without its devices.
        devices_cpu_s: of the devices.
        peak_mb: of the process.
        upload_mb: of all devices together.
    """

    devices: int
    seconds: float
    cpu_s: float
    devices_cpu_s: float
    peak_mb: float
    upload_mb: float


@dataclass(frozen=True)
class Sample:
    """What some processes have used together so far."""

    cpu_s: float
    resident_bytes: int


def sampled(pids: Sequence[int]) -> Sample:
    """Time and memory of processes, from /proc of Linux; those that ended count nothing."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    cpu_s, resident = 0.0, 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
            pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
        except OSError:
            continue
        cpu_s += (int(stat[11]) + int(stat[12])) / ticks
        resident += int(pages) * page
    return Sample(cpu_s, resident)


def load(devices: int, layers: int) -> Loaded:
    """Play a run of light devices, and what it cost."""
    import resource

    from light_devices import LightFleet, shapes

    from fedtune.config import parse_run_config
    from fedtune.records import Event
    from fedtune_server.coordinator import Coordinator
    from fedtune_server.run_folder import RunFolder
    from fedtune_server.simulation.grid import InProcessGrid

    tree = {
        "run": {"name": "load", "rounds": ROUNDS},
        "model": {"path": "none"},
        "data": {"train": "none.jsonl", "max_tokens": 16},
        "fleet": {"light": {"count": devices, "memory": "64 GB", "rank": RANK}},
        "lora": {"rank_max": RANK, "rank_cap": 32},
        "importance": {"method": "uniform"},
        "plan": {"solver": "greedy"},
    }
    fleet, model = LightFleet(devices, shapes(layers)), shapes(layers)
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as name, RunFolder.create(Path(name)) as folder:
        coordinator = Coordinator(parse_run_config(tree, "load"), model, folder, events.append)
        with InProcessGrid(fleet.app(), devices) as grid:
            wall, cpu = time.perf_counter(), time.process_time()
            coordinator.run(grid, devices)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            upload = grid.bytes_up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Loaded(
        devices=devices,
        seconds=wall / ROUNDS,
        cpu_s=(cpu - fleet.cpu_s) / ROUNDS,
        devices_cpu_s=fleet.cpu_s / ROUNDS,
        peak_mb=peak / 1e6,
        upload_mb=upload / ROUNDS / 1e6,
    )


def main() -> int:
    options = parse_arguments(__doc__ or "")
    fleets, layers = (QUICK_FLEETS, 1) if options.quick else (FLEETS, 8)
    found = []
    for devices in fleets:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(load, devices, layers).result())
    rows = [
        {
            "devices": each.devices,
            "seconds a round": f"{each.seconds:.2f}",
            "of the coordinator's processor": f"{each.cpu_s:.2f}",
            "of the devices'": f"{each.devices_cpu_s:.2f}",
            "peak memory": f"{each.peak_mb:.0f} MB",
            "uploaded": f"{each.upload_mb:.0f} MB",
        }
        for each in found
    ]
    print(table(rows))
    if options.json:
        print_json({f"{each.devices} devices": asdict(each) for each in found})
    if not options.quick:
        publish("Load of a coordinator, without a link", "python benchmarks/load.py", table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
