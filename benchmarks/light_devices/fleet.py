"""A real coordinator with many light devices: its home, their keys, their processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from real_sites import HOST, ROOT, Federation, FederationError, environment, wait_for
from safetensors.numpy import save_file

from fedtune.deploy.certificates import make_node_key
from fedtune.deploy.homes import CoordinatorHome
from fedtune.flwr_compat import Control
from fedtune_server.operator_token import OperatorToken
from fedtune_server.registry import Registry
from light_devices import WIDTH, name

HEADS, VOCABULARY = 8, 1000
_ENDS = {"exported": "finished", "run_failed": "failed", "run_interrupted": "interrupted"}
_PER_PROCESS = 50
"""Devices of one process, whose threads share one interpreter."""


def write_base(folder: Path, layers: int) -> Path:
    """A base in the form of a Llama, all of zeros, whose matrices are `WIDTH` square."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    square, row = np.zeros((WIDTH, WIDTH), np.float16), np.zeros(WIDTH, np.float16)
    tensors = {
        "model.embed_tokens.weight": np.zeros((VOCABULARY, WIDTH), np.float16),
        "model.norm.weight": row.copy(),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}"
        for matrix in ("q", "k", "v", "o"):
            tensors[f"{start}.self_attn.{matrix}_proj.weight"] = square.copy()
        for matrix in ("gate", "up", "down"):
            tensors[f"{start}.mlp.{matrix}_proj.weight"] = square.copy()
        tensors[f"{start}.input_layernorm.weight"] = row.copy()
        tensors[f"{start}.post_attention_layernorm.weight"] = row.copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class ManySites(Federation):
    """A coordinator with light devices that are enrolled; none runs yet.

    Args:
        folder: empty; everything is kept below it.
        base: see `write_base`.
    """

    def __init__(self, folder: Path, base: Path, devices: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, base, {})
        registry = Registry(CoordinatorHome(self.home).registry)
        self._keys = {}
        for device in map(name, range(devices)):
            key = make_node_key()
            registry.enrol(registry.invite(device).secret, key.public)
            self._keys[device] = key.private.decode("ascii")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._orders: list[Path] = []

    def start_devices(self) -> None:
        """Start the processes of the devices; they connect by themselves."""
        names = list(self._keys)
        for first in range(0, len(names), _PER_PROCESS):
            order = self.folder / f"devices-{first}.json"
            devices = [{"name": n, "key": self._keys[n]} for n in names[first:][:_PER_PROCESS]]
            facts = {
                "server": f"{HOST}:{self.port}",
                "ca": str(CoordinatorHome(self.home).ca_certificate),
                "base": str(self.base),
                "devices": devices,
            }
            order.write_text(json.dumps(facts), encoding="utf-8")
            self._orders.append(order)
            with order.with_suffix(".out").open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "light_devices.nodes", str(order)],
                        env=environment(
                            PYTHONPATH=str(ROOT / "benchmarks"),
                            FLWR_TELEMETRY_ENABLED="0",
                            FLWR_DISABLE_UPDATE_CHECK="1",
                        ),
                        stdout=output,
                        stderr=output,
                    )
                )

    def wait_for_devices(self, within_s: float = 300.0) -> None:
        """Return once all devices are connected.

        Raises:
            FederationError: they are not within the time.
        """
        home = CoordinatorHome(self.home)
        token = OperatorToken(home.operator_file).read()
        control = Control(f"{HOST}:{self.port}", home.ca_certificate.read_bytes(), token)

        def all_there() -> bool:
            if any(process.poll() is not None for process in self._processes):
                raise FederationError(f"a process of devices has ended; see {self.folder}")
            return sum(node.status == "online" for node in control.nodes()) >= len(self._keys)

        try:
            wait_for("all devices", all_there, within_s, every_s=1.0)
        finally:
            control.close()

    def wait_until_ended(self, name: str, within_s: float) -> Mapping[str, object]:
        """What the run came to, by its ledger: to ask by a command would be a load of its own."""
        found: dict[str, object] = {}

        def ended() -> bool:
            for event in self.events(name):
                if event["kind"] in _ENDS:
                    found.update(event, state=_ENDS[str(event["kind"])])
            return bool(found)

        wait_for(f"the end of {name}", ended, within_s, every_s=1.0)
        return found

    def stop_devices(self) -> dict[str, tuple[int, float, float]]:
        """End the devices; their requests by kind: how many, median and 95th percentile in s.

        Quantiles are those of the slowest process.
        """
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        found: dict[str, tuple[int, float, float]] = {}
        for process, order in zip(self._processes, self._orders, strict=True):
            process.wait(20)
            done = json.loads(order.with_name(order.name + ".done").read_text(encoding="utf-8"))
            for kind, (count, median, late) in done["requests"].items():
                old = found.get(kind, (0, 0.0, 0.0))
                found[kind] = (old[0] + count, max(old[1], median), max(old[2], late))
        self._processes.clear()
        return found

    def tree(self) -> list[psutil.Process]:
        """All processes of the coordinator and of the devices."""
        found = self.server.tree() if self.server else []
        for process in self._processes:
            if process.poll() is None:
                found.append(psutil.Process(process.pid))
        return found

    def close_devices(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def many_sites(folder: Path, base: Path, devices: int) -> Iterator[ManySites]:
    """A coordinator that runs, with devices that connect to it; all ended at the end."""
    with ManySites(folder, base, devices) as sites:
        try:
            sites.start_server()
            sites.start_devices()
            yield sites
        finally:
            sites.close_devices()
