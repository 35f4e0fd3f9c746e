"""What a device carries from round to round, on its own disk, by the round that left it.

    devices/north-1c3a9f02/round-0007.safetensors

A coordinator that was interrupted may ask for a round again that a device has played. The device
must then start from what the round before left, not from what its own first try did: so the states
of the last rounds are kept, and a state later than the round that is played is dropped.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedtune.wire.durable import write_durably, writing

_KEPT = 4
"""A coordinator keeps three checkpoints by default and may go back to the oldest of them; the round
that follows it starts from the fourth state from the end, if its last round had begun."""
_MOST_RUNS, _MOST_DAYS = 8, 30
"""With 7B parameters and rank 16 a run leaves 2 GB: four rounds of two moments and feedback."""
_FOLDER = re.compile(r"[\w-]+-[0-9a-f]{8}")
_NAME = re.compile(r"round-(\d{4,})\.safetensors")

_log = logging.getLogger(__name__)

States = Mapping[str, Tensor]
"""Name -> tensor of all that a device carries."""


class RoundStates:
    """Keeps a device's states of one run; of other runs nothing is kept.

    Args:
        folder: is made when the first state is kept; None: states live as long as this process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._run = ""
        self._held: dict[int, States] = {}

    def before(self, run: str, round: int) -> States:
        """What the latest round before this one left; empty if none did."""
        if self._folder is None:
            held = self._held if run == self._run else {}
            earlier = max((number for number in held if number < round), default=None)
            return {} if earlier is None else held[earlier]
        for number, path in sorted(self._files(), reverse=True):
            if number < round and (found := _read(path, run)) is not None:
                return found
        return {}

    def keep(self, run: str, round: int, states: States) -> None:
        """Take what a round left.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        if self._folder is None:
            held = self._held if run == self._run else {}
            held = {number: each for number, each in held.items() if number < round}
            last = sorted(held)[1 - _KEPT :]
            self._run, self._held = run, {number: held[number] for number in last}
            self._held[round] = states
            return
        path = self._folder / f"round-{round:04d}.safetensors"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in states.items()}
        write_durably(path, save(tensors, {"run": run}))
        self._prune(run, round)

    def _prune(self, run: str, round: int) -> None:
        earlier: list[Path] = []
        for number, path in sorted(self._files()):
            if number > round or _run_of(path) != run:
                path.unlink()
            elif number < round:
                earlier.append(path)
        for path in earlier[: 1 - _KEPT]:
            path.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        if self._folder is None or not self._folder.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match[1]), path) for match, path in found if match]


def prune_runs(above: Path, current: Path) -> None:
    """Remove what old runs left at a site, which would fill its disk over the months.

    Kept are the runs of the last 30 days, the newest eight of them at most; and the current one,
    whatever the clock says. A run that goes on after its states are gone starts them anew.

    Args:
        above: the folder of the runs' folders, as `state_folder` names them.
    """
    try:
        found = [path for path in above.iterdir() if _FOLDER.fullmatch(path.name)]
        ages = sorted((path.stat().st_mtime, path) for path in found if path != current)
    except OSError:
        return
    oldest = time.time() - _MOST_DAYS * 86_400
    kept = {path for written, path in ages[1 - _MOST_RUNS :] if written >= oldest}
    for _, path in ages:
        if path not in kept:
            _log.info("what an old run left in %s is removed", path.name)
            shutil.rmtree(path, ignore_errors=True)


def state_folder(above: Path, device: str) -> Path:
    """The folder of one of several devices; its name can be read, and differs by the device's."""
    readable = re.sub(r"[^\w-]", "_", device)[:40]
    return above / f"{readable}-{zlib.crc32(device.encode('utf-8')):08x}"


def _read(path: Path, run: str) -> States | None:
    """The states in a file; None if it is of another run, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("run") != run:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        _log.warning("%s is damaged (%s); the state of the round before is used", path, error)
        return None


def _run_of(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("run", ""))
    except (OSError, SafetensorError):
        return ""
