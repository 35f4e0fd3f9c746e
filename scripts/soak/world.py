"""A real coordinator and three real sites for faults to befall: `faults.Deployment` in processes.

One federation serves case after case, each with a run of its own; what a case broke and did not
mend is started anew before the next. Sites reach the coordinator over wires of ours.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.real_sites import ROOT, Federation, FederationError, wait_for
from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.deploy.certificates import SERVER_DAYS, KeyPair, make_server_certificate
from fedtune.deploy.homes import CoordinatorHome
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint
from fedtune_server.desk.player import read_status
from scripts.soak.cable import Link
from scripts.soak.faults import Fault
from scripts.soak.netem import Network
from scripts.soak.wire import Shape, Wire

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 3
INJECTED = Path(__file__).parent / "injected"
DISK_BYTES = 64_000_000
"""Of the small file systems that the coordinator and the sites live in, where root mounts them."""

_MODULES = {
    "link": "fedtune_server.link",
    "runner": "fedtune_server.runner",
    "run": "fedtune_server.runner",
    "desk": "fedtune_server.desk",
    "node": "fedtune_client.node",
    "executor": "fedtune_client.executor",
}


class World:
    """A federation, the run that all cases play, and the wires to it.

    Args:
        folder: empty; everything is kept below it.
        base: folder of a small base model.
        mount: give each place a small file system of its own; needs root.
        net: where the places are; None: on loopback, with wires of ours between them.
        local_steps: of a device's round; more make it longer.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        *,
        mount: bool = False,
        net: Network | None = None,
        local_steps: int = 80,
    ) -> None:
        self.folder, self._base, self._stack = folder, base, ExitStack()
        self.net = net
        self._tree = _tree(base, folder, local_steps)
        self.routes = folder / "routes"
        self.routes.mkdir(parents=True)
        places = folder / "places"
        for who in ("coordinator", *SITES):
            (places / who).mkdir(parents=True)
            (folder / f"{who}.clock").write_bytes(struct.pack("d", 0.0))
            if mount:
                _mount(self._stack, places / who)
        rows = {site: _rows(folder / f"{site}.jsonl", at) for at, site in enumerate(SITES)}
        self.federation = Federation(places, base, rows, self._environments(), net)
        self.wires: dict[str, tuple[Wire, Wire]] = {}

    def _environments(self) -> Mapping[str, Mapping[str, str]]:
        places = {"coordinator": {"FEDTUNE_SOAK_ROUTES": str(self.routes)}}
        places |= {s: {"FEDTUNE_SOAK_CLOCK": str(self.folder / f"{s}.clock")} for s in SITES}
        return {who: {**more, "PYTHONPATH": str(INJECTED)} for who, more in places.items()}

    def __enter__(self) -> World:
        self._stack.enter_context(self.federation)
        self.federation.start_server()
        ports = (self.federation.port, self.federation.service_port)
        for site in SITES:
            self.federation.join(site)
            if self.net is not None:
                continue
            link, service = (self._stack.enter_context(Wire(port)) for port in ports)
            self.wires[site] = (link, service)
            self.federation.set(
                site, server=f"127.0.0.1:{link.port}", service=f"127.0.0.1:{service.port}"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, site: str, **changes: Any) -> None:
        """Change what a site's wires do."""
        for wire in self.wires.get(site, ()):
            for key, value in changes.items():
                setattr(wire.shape, key, value)

    @property
    def network(self) -> Network:
        """Of a world in namespaces."""
        assert self.net is not None
        return self.net

    def mend(self) -> None:
        """Start what is not running, and wait until all is well."""
        for site in SITES:
            self.shape(site, **vars(Shape()))
            if self.net is not None:
                self.net.heal(site)
                self.net.shape(site, Link())
            (self.folder / f"{site}.clock").write_bytes(struct.pack("d", 0.0))
        for path in self.routes.iterdir():
            path.unlink()
        fed = self.federation
        if fed.server is None or fed.server.process.poll() is not None:
            fed.start_server()
        for site in SITES:
            if site not in fed.sites or fed.sites[site].process.poll() is not None:
                fed.start_site(site, wait=False)
        wait_for("the coordinator's health", fed.healthy, 90)
        for site in SITES:
            fed.wait_for_site(site, 120)

    def simulated(self) -> str:
        """Play the run in a simulation, which makes its plan; the digest of its result."""
        folder = Path(self._tree["outputs"]["folder"])
        if not folder.exists():
            simulate_config(parse_run_config(self._tree, "soak"), watch=lambda event: None)
        return result_of(folder)

    def simulated_by(self, plan: Path) -> str:
        """Play the run in a simulation that follows a plan; the digest of its result."""
        folder = self.folder / f"simulated-{plan.parent.name}"
        tree = {
            **self._tree,
            "fleet": {"site": {"count": len(SITES), "memory": "8 GB", "formats": ["fp32"]}},
            "plan": {"file": str(plan)},
            "outputs": {"folder": str(folder), "exports": []},
        }
        simulate_config(parse_run_config(tree, "soak"), watch=lambda event: None)
        return result_of(folder)

    def run_file(self, name: str, rounds: int, *, measures: bool = False) -> dict[str, Any]:
        """The run of a case, with the simulated run's plan, or one that it makes by measuring."""
        plan = Path(self._tree["outputs"]["folder"]) / "plan.json"
        planned: dict[str, Any] = {"plan": {"file": str(plan)}}
        if measures:
            planned = {"plan": {"replan": False}, "importance": {"method": "sensitivity"}}
        kept = {k: v for k, v in self._tree.items() if k not in ("outputs", "simulation")}
        return {
            **kept,
            "run": {**self._tree["run"], "name": name, "rounds": rounds},
            "data": {"max_tokens": 40},
            **planned,
            "outputs": {"exports": []},
        }

    @contextmanager
    def start(self, case: Fault) -> Iterator[Befallen]:
        """Hand in a case's run, with everything well; afterwards it has ended."""
        self.simulated()
        self.mend()
        slug = re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")
        name = f"{slug}-{int(time.time()) % 100_000}"
        tree = self.run_file(name, case.rounds or ROUNDS, measures=case.measures)
        self.federation.hand_in(tree)
        befallen = Befallen(self, name)
        try:
            yield befallen
        finally:
            befallen.finish()


class Befallen:
    """One run of a world; see `faults.Deployment`."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name, self._began = world, name, time.monotonic()
        self._ended_s = 0.0

    # ------------------------------------------------------------ what is there

    def pids(self, who: str) -> Sequence[int]:
        place, _, part = who.partition("/")
        fed = self._world.federation
        started = fed.server if place == "coordinator" else fed.sites.get(place)
        found = started.tree() if started is not None else []
        if part == "supervisor":
            found = found[:1]
        elif part:
            found = [process for process in found if _plays(process, part)]
        return [process.pid for process in found]

    def home(self, who: str) -> Path:
        fed = self._world.federation
        return fed.home if who == "coordinator" else fed.site_home(who)

    def call(self, who: str, action: str, **details: object) -> None:
        getattr(self, f"_{action.replace('-', '_')}")(who, **details)

    # ------------------------------------------------------------ what can be done to it

    def _shape(self, who: str, **changes: object) -> None:
        self._world.shape(who, **changes)

    def _link(self, who: str, **link: Any) -> None:
        self._world.network.shape(who, Link(**link))

    def _cut(self, who: str) -> None:
        self._world.network.cut(who)

    def _heal(self, who: str) -> None:
        self._world.network.heal(who)

    def _start(self, who: str) -> None:
        """Start a place whose processes were killed, as a machine does that has power again."""
        fed = self._world.federation
        started = fed.server if who == "coordinator" else fed.sites[who]
        assert started is not None
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(10)
        wait_for(f"{who} to be gone", lambda: not _alive(self.home(who)), 20)
        if who == "coordinator":
            fed.start_server()
        else:
            fed.start_site(who, wait=False)

    def _stop(self, who: str) -> None:
        fed = self._world.federation
        started = fed.server if who == "coordinator" else fed.sites[who]
        assert started is not None
        started.stop()

    def _fail_routes(self, who: str, routes: Sequence[str] = (), how: str = "") -> None:
        for route in routes:
            (self._world.routes / (how + route.replace("/", "+"))).touch()

    def _set_clock(self, who: str, seconds: float = 0.0) -> None:
        with (self._world.folder / f"{who}.clock").open("r+b") as file:
            file.write(struct.pack("d", seconds))

    def _limit_memory(self, who: str, more_bytes: int = 0) -> None:
        """Let a process have so much more address space than it has now."""
        for pid in self.pids(who):
            process = psutil.Process(pid)
            most = process.memory_info().vms + more_bytes
            process.rlimit(psutil.RLIMIT_AS, (most, most))

    def _expire(self, who: str, seconds: float = 20.0) -> None:
        """Give the coordinator a certificate that ends soon, and have it serve that."""
        home = CoordinatorHome(self._world.federation.home)
        authority = KeyPair(home.ca_key.read_bytes(), home.ca_certificate.read_bytes())
        lasts = datetime.timedelta(days=SERVER_DAYS - 1)
        now = datetime.datetime.now(datetime.UTC)
        pair = make_server_certificate(
            authority, "127.0.0.1", now - lasts + datetime.timedelta(seconds=seconds)
        )
        home.certificate.write_bytes(pair.certificate)
        home.key.write_bytes(pair.key)
        self._stop(who)
        self._world.federation.start_server()

    def _rotate(self, who: str) -> None:
        fed = self._world.federation
        fed.fedtune("server", "rotate", "--dir", str(fed.home))
        self._stop(who)
        fed.start_server()

    # ------------------------------------------------------------ what became of it

    def progress(self) -> float:
        done, opened = 0.0, 0.0
        for event in self._events():
            if event["kind"] == "round_started":
                opened = 0.0
            elif event["kind"] == "device_reported":
                opened += 1 / (len(SITES) + 1)
            elif event["kind"] == "checkpoint_saved":
                done, opened = float(str(event["round"])), 0.0
        return done + opened if self._folder.exists() else -1.0

    def working(self, who: str) -> bool:
        """Whether a site has been given a round's work whole, and has not said that it did it."""
        _, found, after = self._said(who).rpartition("Receiving: train.lora")
        return bool(found) and "Received successfully" in after and "did train.lora" not in after

    def asked(self, who: str, message: str) -> bool:
        """As a site's node says."""
        _, found, after = self._said(who).rpartition(f"Receiving: {message}")
        answered = f"Sending: {message}" in after
        return bool(found) and "Received successfully" in after and not answered

    def _said(self, who: str) -> str:
        path = self._world.federation.folder / f"{who.partition('/')[0]}.out"
        return path.read_text(encoding="utf-8", errors="replace")[-50_000:]

    def wait(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while True:
            with suppress(OSError, ValueError):
                path = self._world.federation.home / "queue" / f"{self._name}.json"
                if ended := json.loads(path.read_bytes()).get("ended"):
                    self._ended_s = time.monotonic()
                    return str(ended)
            if time.monotonic() >= end:
                return ""
            time.sleep(0.2)

    def result(self) -> str:
        return result_of(self._folder)

    def simulated(self) -> str:
        return self._world.simulated_by(self._folder / "plan.json")

    def missing(self) -> Mapping[str, Sequence[int]]:
        """Devices that a round which was started has no update of."""
        asked: dict[int, set[str]] = {}
        came: dict[int, set[str]] = {}
        named: set[str] = set()
        for event in self._events():
            round = int(str(event.get("round", 0)))
            if event["kind"] == "round_started":
                asked.setdefault(round, set()).update(SITES)
            elif event["kind"] == "device_reported":
                came.setdefault(round, set()).add(str(event["device"]))
            elif event["kind"] in ("device_refused", "device_late", "site_excluded"):
                named.add(str(event["device"]))
        missing: dict[str, list[int]] = {}
        for round, devices in sorted(asked.items()):
            for device in sorted(devices - came.get(round, set())):
                if device in named:
                    missing.setdefault(device, []).append(round)
        return missing

    def reason(self) -> str:
        path = self._world.federation.home / "queue" / f"{self._name}.json"
        with suppress(OSError, ValueError):
            return str(json.loads(path.read_bytes()).get("reason", ""))
        return ""

    def numbers(self) -> dict[str, float]:
        """What was measured: seconds of the run, and how often it and its devices began anew."""
        kinds = [str(event["kind"]) for event in self._events()]
        restarts = 0.0
        with suppress(OSError, ValueError):
            path = self._world.federation.home / "queue" / f"{self._name}.json"
            restarts = float(json.loads(path.read_bytes()).get("restarts", 0))
        return {
            "run_s": round(self._ended_s - self._began, 1),
            "played_again": restarts,
            "asked_again": float(kinds.count("device_asked_again")),
            "refused": float(kinds.count("device_refused")),
            "missing": float(sum(map(len, self.missing().values()))),
            "routes_not_asked": float(len(list(self._world.routes.iterdir()))),
        }

    def finish(self) -> None:
        """See to it that the run has ended, so that the next case has the sites to itself."""
        if not self._ended_s:
            fed = self._world.federation
            with suppress(FederationError, OSError):
                self._world.mend()
                fed.fedtune("stop", self._name, check=False)
                self.wait(30)

    def left(self) -> Sequence[int]:
        """Processes of the places that no supervisor has; where all is well, none."""
        fed = self._world.federation
        kept: set[int] = set()
        for started in [*fed.sites.values(), *([fed.server] if fed.server else [])]:
            kept |= {process.pid for process in started.tree()}
        strays = [p.pid for p in _alive(fed.folder) if p.pid not in kept]
        if strays:
            time.sleep(5.0)  # an orphan is ended by its guard within a few seconds
        return [p.pid for p in _alive(fed.folder) if p.pid in strays]

    @property
    def _folder(self) -> Path:
        return self._world.federation.run_folder(self._name)

    def _events(self) -> list[dict[str, object]]:
        return self._world.federation.events(self._name)

    def status(self) -> Mapping[str, object]:
        return read_status(self._folder)


def result_of(folder: Path) -> str:
    """Digest of the adapter of a run's last checkpoint."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return ""
    digest = hashlib.sha256()
    for _, matrix in sorted(read_checkpoint(newest).adapter.matrices.items()):
        for array in (matrix.u, matrix.sigma, matrix.v):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _plays(process: psutil.Process, part: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return _MODULES[part] in words and ("--task" in words) == (part == "run")


def _alive(folder: Path) -> list[psutil.Process]:
    """Processes that work in a home below a folder; ended ones that nobody has reaped are not."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in w for w in words):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def _mount(stack: ExitStack, folder: Path) -> None:
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(words, check=True, timeout=10)
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False, timeout=10)


def _rows(path: Path, at: int) -> Path:
    words = ("red", "green", "blue", "white")
    rows = (
        {"prompt": f"{words[i % 4]} {words[(i + at) % 4]}", "response": words[at]}
        for i in range(24 + 8 * at)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _tree(base: Path, folder: Path, local_steps: int) -> dict[str, Any]:
    """The run of all cases, as it is simulated."""
    return {
        "run": {"name": "simulated", "rounds": ROUNDS, "minimum_devices": 2},
        "model": {"path": str(base)},
        "data": {
            "sites": {site: str(folder / f"{site}.jsonl") for site in SITES},
            "max_tokens": 40,
        },
        "fleet": {"site": {"count": len(SITES), "memory": "64 MB", "formats": ["fp32"]}},
        "lora": {"rank_max": 4, "rank_cap": 8},
        "train": {
            "local_steps": local_steps,
            "batch_size": 4,
            "compute": "fp32",
            "keep_optimizer": True,
        },
        "wire": {"up": "int8"},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder / "simulated"), "exports": []},
        "deployment": {"sites": list(SITES), "deadline_s": 240},
    }


def make_base(folder: Path) -> Path:
    """An untrained Llama of 20 thousand parameters whose tokens are bytes; the same each time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def clear(folder: Path) -> Path:
    """An empty folder; what an earlier soak left there goes."""
    if sys.platform == "linux" and (folder / "places").is_dir():
        for place in (folder / "places").iterdir():
            if place.is_mount():
                subprocess.run(["umount", "-l", str(place)], check=False, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


__all__ = ["ROOT", "ROUNDS", "SITES", "Befallen", "World", "clear", "make_base", "result_of"]
