"""Rounds of a simulated fleet: devices side by side, one by one, and in Flower's Ray backend.

    python benchmarks/simulate.py [--quick] [--json]

stories260k on e2e_nlg, dealt out evenly to 8, 64 and 1,000 devices of two classes: half hold the
base in `q4` and train rank 4, half in `int8` and rank 8. Two local steps of four samples, one torch
thread per device; a held-out loss in every round as far as a site has rows for it (ten or more).
`side by side` is the default, 16 devices in one pass; `one by one` sets
`simulation.devices_per_pass` to 1; `Ray` has two workers, and is left out at 1,000 devices.

Every run is a process of its own, `fedtune simulate`. A device-round is one device's part in one
round, the coordinator's work for it included; the first round is left out of the rate, because the
devices tokenise their rows and load the base in it. Whole seconds are those of the process. Peak
memory: the largest sum of what the processes of the run have in memory for themselves and share,
sampled ten times a second (for Ray that is its own processes too). The adapters of a fleet must be
the same bytes however it is run.

`--quick` takes fewer rounds: 8 devices beside Ray, and 24 beside one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reporting import parse_arguments, print_json, publish, table

ROOT = Path(__file__).resolve().parents[1]
SIDE_BY_SIDE, ONE_BY_ONE, RAY = "side by side", "one by one", "Ray, 2 workers"
WAYS: Mapping[str, tuple[str, ...]] = {
    SIDE_BY_SIDE: (),
    ONE_BY_ONE: ("simulation.devices_per_pass=1",),
    RAY: ("simulation.backend=ray", "simulation.workers=2"),
}
FULL = {8: 12, 64: 6, 1000: 2}
"""Devices -> rounds, the first of which is not timed."""
QUICK = {8: 2, 24: 2}
LEFT_OUT = {False: {(1000, RAY)}, True: {(8, ONE_BY_ONE), (24, RAY)}}

RUN = """\
[run]
seed = 7
[model]
path = "{model}"
[data]
train = "{rows}"
max_tokens = 64
[data.partition]
by = "iid"
[fleet.small]
count = {half}
memory = "1 GB"
format = "q4"
rank = 4
[fleet.large]
count = {half}
memory = "1 GB"
format = "int8"
rank = 8
[lora]
rank_cap = 16
[train]
local_steps = 2
batch_size = 4
[simulation]
threads = 1
[outputs]
exports = []
"""


@dataclass(frozen=True)
class Played:
    """One run.

    Attributes:
        rate: device-rounds per second after the first round.
        seconds: of the whole process.
        digest: sha256 of the final adapter.
    """

    devices: int
    way: str
    rate: float
    seconds: float
    peak_bytes: int
    digest: str


def play(shared: Path, folder: Path, devices: int, rounds: int, way: str) -> Played:
    """Play a run of a fleet in a process of its own.

    Raises:
        RuntimeError: the run failed.
    """
    run_file, output = folder / f"{devices}.toml", folder / f"{devices} {way}"
    model, rows = shared / "models" / "stories260k", shared / "data" / "e2e_nlg" / "train.jsonl"
    run_file.write_text(RUN.format(model=model, rows=rows, half=devices // 2), encoding="utf-8")
    settings = (f"run.rounds={rounds}", f"outputs.folder={output}", *WAYS[way])
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "fedtune", "simulate", str(run_file), *options]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, "--json"],
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        with _watched(process.pid) as peak:
            code = process.wait()
        seconds = time.perf_counter() - started
        if code != 0:
            errors.seek(0)
            text = errors.read().decode("utf-8", "replace")[-2000:]
            raise RuntimeError(f"{way} with {devices} devices failed:\n{text}")
    return Played(
        devices, way, devices / _round_seconds(output), seconds, peak.bytes, _digest(output)
    )


def _environment() -> dict[str, str]:
    paths = [
        str(ROOT),
        str(ROOT / "server"),
        str(ROOT / "client"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _round_seconds(output: Path) -> float:
    """Mean seconds of a round after the first, from the events that the run left."""
    lines = (output / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    finished = [float(e["seconds"]) for e in found if e["kind"] == "round_finished"]
    return sum(finished[1:]) / len(finished[1:])


def _digest(output: Path) -> str:
    """Of the tensors of the last checkpoint; its other contents name the run."""
    (path,) = sorted((output / "checkpoints").glob("*.safetensors"))[-1:]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[start:]).hexdigest()


# ---------------------------------------------------------------- memory


class _watched:
    """Samples the memory of a process and its children while it is open.

    Attributes:
        bytes: the largest sum so far.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = max(self.bytes, sum(map(_held_bytes, _tree(self._pid))))


def _tree(pid: int) -> Iterator[int]:
    """A process and everything that descends from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _parent(entry)
            parents.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += parents.get(found, [])


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _held_bytes(pid: int) -> int:
    """Resident bytes, those shared with other processes by their share."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


# ---------------------------------------------------------------- the table


def rows_of(played: list[Played]) -> list[dict[str, object]]:
    """Each rate, and in brackets how many times that of the fleet's slowest way it is."""
    base = {p.devices: p.rate for p in sorted(played, key=lambda p: p.rate, reverse=True)}
    return [
        {
            "devices": p.devices,
            "": p.way,
            "device-rounds per s": f"{p.rate:.1f} ({p.rate / base[p.devices]:.2f})",
            "whole run, s": f"{p.seconds:.1f}",
            "peak MB": f"{p.peak_bytes / 1e6:.0f}",
        }
        for p in played
    ]


def figures(played: list[Played]) -> dict[str, object]:
    """Key figures at the largest fleet that all ways have played, and at the largest of all."""
    by = {(p.devices, p.way): p for p in played}
    fleets = sorted({p.devices for p in played})
    against_ray = max(p.devices for p in played if p.way == RAY)
    largest = by[fleets[-1], SIDE_BY_SIDE]
    beside = {n: by[n, SIDE_BY_SIDE] for n in fleets}
    return {
        "speedup_stacked": round(largest.rate / by[fleets[-1], ONE_BY_ONE].rate, 3),
        "speedup_vs_ray": round(beside[against_ray].rate / by[against_ray, RAY].rate, 3),
        "device_rounds_per_s": round(largest.rate, 2),
        "peak_bytes": largest.peak_bytes,
        **{f"{n}: device_rounds_per_s": round(p.rate, 2) for n, p in beside.items()},
        **{
            f"{n}: speedup_stacked": round(p.rate / by[n, ONE_BY_ONE].rate, 3)
            for n, p in beside.items()
            if (n, ONE_BY_ONE) in by
        },
    }


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    played: list[Played] = []
    with tempfile.TemporaryDirectory() as name:
        for devices, rounds in (QUICK if arguments.quick else FULL).items():
            for way in WAYS:
                if (devices, way) in LEFT_OUT[arguments.quick]:
                    continue
                played.append(play(arguments.shared, Path(name), devices, rounds, way))
                print(f"{devices} devices, {way}: {played[-1].rate:.1f} per s", flush=True)
            digests = {p.digest for p in played if p.devices == devices}
            if len(digests) != 1:
                raise RuntimeError(f"{devices} devices: the adapters depend on how they are run")
    found = table(rows_of(played))
    print("\n" + found)
    if not arguments.quick:
        text = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        publish("Simulated fleets", "python benchmarks/simulate.py", f"{text}\n\n{found}")
    if arguments.json:
        print_json(figures(played))
    return 0


if __name__ == "__main__":
    sys.exit(main())
