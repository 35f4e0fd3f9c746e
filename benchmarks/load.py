"""What a coordinator spends on a round, by the number of devices, and where it saturates.

    python benchmarks/load.py [--quick] [--json] [--devices N] [--only link|coordinator]

Light devices follow the protocol and train nothing: they add noise to what they are sent. So all
time is that of messages, checks, joins and checkpoints. The model's shapes are those of a
transformer of 8 layers and width 512 (56 matrices), rank 8: 1.8 MB an update in float32.

`coordinator`: each fleet is a process of its own, whose devices take turns in it on the in-process
grid. What is counted is the coordinator alone, without a link; the processor's time of the devices
is counted apart.

`link`: `fedtune server start` with all its processes: TLS, signed requests, the guard, SQLite. The
devices are threads of a few other processes; each has its own key and connection, polls as a site's
node does and sends heartbeats. All share this machine. `idle` is before the run, all devices there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

FLEETS = (10, 50, 200)
QUICK_FLEETS = (4, 12)
LINK_FLEETS = (10, 50, 100, 200)
QUICK_LINK_FLEETS = (5,)
ROUNDS, LINK_ROUNDS = 3, 2
RANK = 8
ROLES = ("link", "run", "runner", "desk", "devices")
LINK_WORDS = """\
Light devices train nothing, so a round is the way of 1.8 MB to each of them and back. Devices share
the machine with the coordinator, and `seconds` are those of a machine on which other work was done
where `of a core` is far below 100 %: seconds of processor and memory say what a link takes. With
twice the devices they double; [flower.md](flower.md#how-many-devices-a-link-carries) says why.

At commit 768b29e, before Flower's layers, its look for lost tasks and the form of small tensors
were changed, 20 devices took 11 to 15 s of the link's processor a round; right after it 6 s. Before
the link held messages back until they were whole (01561ff), 200 devices took 175 s a round and
161 s of its processor, on the same machine in the same hour as the table. On a machine where
25 processes wait for two cores it is more, because devices that wait ask again."""
IDLE_S = 15.0
PATIENCE_S = 3600.0


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


def load(devices: int, layers: int) -> Loaded:
    """Play a run of light devices, and what it cost."""
    import resource

    from light_devices import LightFleet, shapes

    from fedtune.config import parse_run_config
    from fedtune.records import Event
    from fedtune_server.coordinator import Coordinator
    from fedtune_server.roster import Counted
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
            coordinator.run(grid, Counted(devices))
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


@dataclass(frozen=True)
class Linked:
    """One fleet at a real link, per round; means over the rounds.

    Attributes:
        cpu_s: seconds of processor by kind of process.
        idle_share: of a core, that the link takes while devices only poll.
        peak_mb: by kind of process.
        requests: of all devices.
        poll_s: median and 95th percentile of the seconds that a question for a message takes.
        reported: devices whose updates counted.
        start_s: from the start of the run to its plan: profiles, measurements.
    """

    devices: int
    seconds: float
    cpu_s: dict[str, float]
    idle_share: float
    peak_mb: dict[str, float]
    requests: float
    poll_s: tuple[float, float]
    reported: float
    start_s: float


def run_file(base: Path, devices: int, rounds: int) -> dict[str, object]:
    """What is handed in."""
    return {
        "run": {"name": "load", "rounds": rounds},
        "model": {"path": str(base)},
        "data": {"max_tokens": 16},
        "fleet": {"light": {"count": devices, "memory": "64 GB", "rank": RANK}},
        "lora": {"rank_max": RANK, "rank_cap": 32},
        "importance": {"method": "uniform"},
        "plan": {"solver": "greedy"},
        "deployment": {"sites": ["*"], "minimum": devices, "deadline_s": 600},
        "outputs": {"exports": []},
    }


def load_link(devices: int, layers: int, rounds: int) -> Linked:
    """Play a run of light devices at a real link, and what it cost."""
    from light_devices.fleet import many_sites, write_base
    from usage import Usage

    with tempfile.TemporaryDirectory() as name:
        base = write_base(Path(name) / "base", layers)
        with many_sites(Path(name) / "sites", base, devices) as sites, Usage(sites.tree) as usage:
            sites.wait_for_devices()
            began = time.time()
            time.sleep(IDLE_S)
            idle = usage.cpu_s("link", began, time.time()) / (time.time() - began)
            run = sites.hand_in(run_file(base, devices, rounds))
            ended = sites.wait_until_ended(run, PATIENCE_S)
            if ended["state"] != "finished":
                raise RuntimeError(f"the run came to {ended['state']}: {ended.get('reason')}")
            requests, counted = sites.stop_devices(), sites.events(run)
            first, *marks = (
                at(event) for event in counted if event["kind"] in ("run_started", "round_started")
            )
            finished = [event for event in counted if event["kind"] == "round_finished"]
            begin, end = marks[0], at(finished[-1])
            return Linked(
                devices=devices,
                seconds=(end - begin) / rounds,
                cpu_s={role: usage.cpu_s(role, begin, end) / rounds for role in ROLES},
                idle_share=idle,
                peak_mb={role: usage.peak_mb(role) for role in ROLES},
                requests=(sum(count for count, _, _ in requests.values())) / rounds,
                poll_s=requests["pull-messages"][1:],
                reported=sum(int(event["reported"]) for event in finished) / rounds,
                start_s=begin - first,
            )


def at(event: Mapping[str, object]) -> float:
    """When an event of the ledger was, in seconds since 1970."""
    return datetime.fromisoformat(str(event["time"])).timestamp()


def link_rows(found: Sequence[Linked]) -> list[dict[str, str]]:
    """A row for each fleet."""
    return [
        {
            "devices": str(each.devices),
            "seconds a round": f"{each.seconds:.1f}",
            "link's processor, s": f"{each.cpu_s['link']:.1f}",
            "of a core": f"{each.cpu_s['link'] / each.seconds:.0%}",
            "of a core, idle": f"{each.idle_share:.0%}",
            "run's processor, s": f"{each.cpu_s['run']:.1f}",
            "desk's, s": f"{each.cpu_s['desk']:.1f}",
            "devices', s": f"{each.cpu_s['devices']:.1f}",
            "a poll takes, ms (95 %)": f"{1e3 * each.poll_s[0]:.0f} ({1e3 * each.poll_s[1]:.0f})",
            "peak of link, run, desk, MB": ", ".join(
                f"{each.peak_mb[role]:.0f}" for role in ("link", "run", "desk")
            ),
            "reported": f"{each.reported:.0f}",
            "start, s": f"{each.start_s:.0f}",
        }
        for each in found
    ]


def coordinator_rows(found: Sequence[Loaded]) -> list[dict[str, str]]:
    """A row for each fleet."""
    return [
        {
            "devices": str(each.devices),
            "seconds a round": f"{each.seconds:.2f}",
            "of the coordinator's processor": f"{each.cpu_s:.2f}",
            "of the devices'": f"{each.devices_cpu_s:.2f}",
            "peak memory": f"{each.peak_mb:.0f} MB",
            "uploaded": f"{each.upload_mb:.0f} MB",
        }
        for each in found
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, nargs="+", help="other fleets at the link")
    parser.add_argument("--only", choices=("link", "coordinator"), help="only this part")


def alone(fleets: Sequence[int], layers: int) -> list[Loaded]:
    """Each fleet without a link, in a process of its own."""
    found = []
    for devices in fleets:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(load, devices, layers).result())
    return found


def main() -> int:
    options = parse_arguments(__doc__ or "", _options)
    fleets, layers, rounds = (QUICK_FLEETS, 1, 1) if options.quick else (FLEETS, 8, LINK_ROUNDS)
    at_link = options.devices or (QUICK_LINK_FLEETS if options.quick else LINK_FLEETS)
    results: dict[str, object] = {}
    if options.only != "link":
        found = alone(fleets, layers)
        print(table(coordinator_rows(found)))
        results |= {f"{each.devices} devices": asdict(each) for each in found}
        if not options.quick:
            title = "Load of a coordinator, without a link"
            publish(title, "python benchmarks/load.py", table(coordinator_rows(found)))
    if options.only != "coordinator":
        linked = [load_link(devices, layers, rounds) for devices in at_link]
        print(table(link_rows(linked)))
        results |= {f"{each.devices} devices at a link": asdict(each) for each in linked}
        if not options.quick:
            chosen = "".join(f" {devices}" for devices in options.devices or ())
            command = "python benchmarks/load.py --only link" + (chosen and f" --devices{chosen}")
            title = "Load of a coordinator, with its link"
            publish(title, command, f"{LINK_WORDS}\n\n{table(link_rows(linked))}")
    if options.json:
        print_json(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
