"""The coordinator's process is killed, in any phase, and the same command goes on with its run.

A server forks each process from one that has torch imported, so that a start takes no seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.export.ledger_facts import read_ledger
from fedtune.wire.ledger_chain import verify_ledger
from fedtune_server.run_folder import RunFolder

ROUNDS = 6
LONGEST_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "fedtune.cli.main",
            "fedtune.export.merge",
            "fedtune.export.peft_adapter",
            "fedtune_client.together",
            "fedtune_server.simulation",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


class Command:
    """`fedtune simulate RUN.toml` in processes of its own."""

    def __init__(self, processes: ForkServerContext, tree: dict[str, Any], folder: Path) -> None:
        self.folder = folder / "run"
        self._processes, self._file = processes, folder / "run.json"
        folder.mkdir()
        tree["outputs"] = {"folder": str(self.folder), "exports": ["merged", "peft"]}
        self._file.write_text(json.dumps(tree), encoding="utf-8")

    def run(self, kill_after: int | None = None, and_s: float = 0.0) -> float:
        """Run it to its end, or kill it after so many more events; seconds that it took."""
        started, before = time.monotonic(), self.events()
        process = self._processes.Process(
            target=main, args=(["simulate", str(self._file), "--json"],)
        )
        process.start()
        while process.is_alive() and time.monotonic() - started < LONGEST_S:
            if kill_after is not None and self.events() - before >= kill_after:
                time.sleep(and_s)
                process.kill()
                kill_after = None
            process.join(0.003)
        assert not process.is_alive()
        process.close()
        return time.monotonic() - started

    def events(self) -> int:
        ledger = self.folder / "ledger.jsonl"
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    @property
    def finished(self) -> bool:
        folder = RunFolder(self.folder)
        return folder.status.exists() and folder.read_status().state == "finished"

    def results(self) -> dict[str, bytes]:
        """The last adapter with all of the run's state, what the devices carry, and the model."""
        wanted = (f"checkpoints/round-{ROUNDS:04d}.safetensors", "devices/*/*", "exports/*/*.safe*")
        paths = sorted(path for pattern in wanted for path in self.folder.glob(pattern))
        assert len(paths) > 3
        # A device's state names its run, and runs have names of their own.
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes().replace(self._run(), b"run")
            for path in paths
        }

    def _run(self) -> bytes:
        return RunFolder(self.folder).read_status().run.encode("utf-8")


@pytest.fixture
def settings(tree: dict[str, Any]) -> dict[str, Any]:
    """A run in which everything that can be carried from round to round is."""
    tree["run"] |= {"rounds": ROUNDS, "devices_per_round": 3, "seed": 3}
    tree["train"] |= {"keep_optimizer": True, "schedule": "cosine"}
    tree["aggregate"] = {"momentum": 0.5}
    tree["importance"] = {"method": "spectrum", "batches": 1}
    return tree


@pytest.fixture
def undisturbed(processes: ForkServerContext, settings: dict[str, Any], tmp_path: Path) -> Command:
    command = Command(processes, settings, tmp_path / "undisturbed")
    command.run()
    assert command.finished
    return command


def _check(command: Command, undisturbed: Command) -> None:
    assert command.results() == undisturbed.results()
    verify_ledger(command.folder / "ledger.jsonl")
    facts = read_ledger(command.folder / "ledger.jsonl")
    assert facts.status == "finished"
    assert sorted(facts.rounds) == list(range(1, ROUNDS + 1))
    lines = (command.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = Counter(
        (line["kind"], line["round"], line.get("device")) for line in map(json.loads, lines)
    )
    assert {key for key, times in rounds.items() if times > 1} <= {("evaluated", ROUNDS, None)}
    assert sum(kind == "device_reported" for kind, _, _ in rounds) == 3 * ROUNDS
    assert not list((command.folder / "open").iterdir())


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    processes: ForkServerContext, settings: dict[str, Any], undisturbed: Command, tmp_path: Path
) -> None:
    command, moments = Command(processes, settings, tmp_path / "killed"), random.Random(7)
    kills = 0
    while not command.finished:
        assert kills < 30
        command.run(moments.randint(0, 21), moments.uniform(0, 0.05))
        kills += 1
    assert kills > 4
    _check(command, undisturbed)


@pytest.mark.slow
def test_a_kill_at_any_of_twenty_moments_changes_nothing(
    processes: ForkServerContext, settings: dict[str, Any], undisturbed: Command, tmp_path: Path
) -> None:
    """Spread over all events, from the first question to the exports, and at random between two."""
    moments, events = random.Random(1), undisturbed.events()
    for number in range(20):
        command = Command(processes, settings, tmp_path / f"killed-{number}")
        after = moments.randint(number * events // 20, (number + 1) * events // 20)
        command.run(after, moments.uniform(0, 0.05))
        if not command.finished:
            command.run()
        assert command.finished
        _check(command, undisturbed)
