"""Readers are given bytes that nobody wrote: each returns, or refuses in one line of words.

Everything else is a finding: another exception, a message of several lines or with control
characters, seconds of work for one input, memory that a declared size was enough to ask for.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from fedtune.errors import FedtuneError
from scripts.soak.targets import Target, all_targets

MOST_SECONDS = 2.0
"""Of a process's own time for one input; the slowest honest seed takes a hundredth."""
MOST_BYTES = 512 * 2**20
"""That a reader may have beyond the idle process. No seed is longer than a few kilobytes; the
largest that a reader may hold at a time is an inflated header, 16 MB, as Python objects."""
LONGEST_MESSAGE = 2000
_SHOWN = 400


@dataclass(frozen=True)
class Finding:
    """An input for which a reader did what it must not."""

    target: str
    seed: int
    what: str
    data: bytes


@dataclass
class Fuzzed:
    """What came of some inputs."""

    inputs: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Fuzzed) -> None:
        self.inputs += other.inputs
        self.refused += other.refused
        self.findings += other.findings
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest = other.slowest_s, other.slowest


def try_one(target: Target, data: bytes) -> tuple[str, bool, float]:
    """Read one input.

    Returns:
        What is wrong, or empty; whether it was refused; seconds of the process's time.
    """
    started = time.process_time()
    wrong, refused = "", False
    try:
        target.read(data)
    except FedtuneError as error:
        wrong, refused = _wrong_words(str(error)), True
    except (Exception, RecursionError, MemoryError) as error:  # noqa: BLE001 - that is the finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__}: {str(error)[:_SHOWN]} ({place.filename}:{place.lineno})"
    seconds = time.process_time() - started
    if not wrong and seconds > MOST_SECONDS:
        wrong = f"took {seconds:.1f} s"
    return wrong, refused, seconds


def _wrong_words(message: str) -> str:
    if not message:
        return "refused without words"
    if len(message) > LONGEST_MESSAGE:
        return f"refused in {len(message)} characters"
    if any(not (character.isprintable()) for character in message):
        return f"refused in words that are not printable: {message[:_SHOWN]!r}"
    return ""


def fuzz(inputs: int, seed: int, names: Sequence[str] = (), until: float = 0.0) -> Fuzzed:
    """Give every reader its share of some inputs; the same for equal arguments.

    Args:
        names: of readers; none: all.
        until: stop at this time (`time.monotonic`) at the latest; 0: when all inputs are tried.
    """
    done = Fuzzed()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning of numpy says that a check is missing
        targets = [t for t in all_targets(Path(folder)) if not names or t.name in names]
        _bound_memory()
        share = -(-inputs // len(targets))
        for target in targets:
            rng = random.Random(f"{seed} {target.name}")
            for _ in range(share):
                if until and time.monotonic() > until:
                    return done
                data = target.input(rng)
                wrong, refused, seconds = try_one(target, data)
                done.inputs += 1
                done.refused += refused
                if seconds > done.slowest_s:
                    done.slowest_s, done.slowest = seconds, target.name
                if wrong:
                    done.findings.append(Finding(target.name, seed, wrong, data))
    return done


def _bound_memory() -> None:
    """Let an allocation fail that a reader must not make; where the system knows such bounds."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def fuzz_in_processes(inputs: int, seed: int, processes: int, seconds: float = 0.0) -> Fuzzed:
    """As `fuzz`, over some processes of their own; each has its own seed."""
    until = time.monotonic() + seconds if seconds else 0.0
    rounds = max(processes, -(-inputs // 50_000))
    done = Fuzzed()
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        share = -(-inputs // rounds)
        jobs = [pool.submit(fuzz, share, seed + i, (), until) for i in range(rounds)]
        for job in jobs:
            done.add(job.result())
    return done


def unlike(findings: Sequence[Finding]) -> list[Finding]:
    """One finding of each kind: reader and exception."""
    kinds: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        kinds.setdefault((finding.target, finding.what[-60:]), finding)
    return list(kinds.values())


def keep(findings: Sequence[Finding], folder: Path) -> list[Path]:
    """Write the inputs of findings to a folder, so that they can be tried again."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for finding in findings:
        name = f"{finding.target.replace(' ', '-')}-{hashlib.sha256(finding.data).hexdigest()[:12]}"
        path = folder / name.replace("/", "_")
        path.write_bytes(finding.data)
        kept.append(path)
    return kept
