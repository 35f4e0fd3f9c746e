"""Play parts of the soak, each within its time.

python -m scripts.soak fuzz netem --seconds 600 --out soak.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.soak import guided
from scripts.soak.fuzz import fuzz_in_processes, keep, unlike
from scripts.soak.netem import Link, why_not
from scripts.soak.results import Journal, Result, Tell, failed, table


@dataclass(frozen=True)
class Budget:
    """What a part may take.

    Attributes:
        folder: for what it keeps.
    """

    seconds: float
    inputs: int
    seed: int
    processes: int
    folder: Path


def play_fuzz(budget: Budget, tell: Tell) -> None:
    """Readers of outside bytes, on bytes that nobody wrote."""
    began = time.monotonic()
    done = fuzz_in_processes(budget.inputs, budget.seed, budget.processes, budget.seconds)
    kinds = unlike(done.findings)
    kept = keep(kinds, budget.folder / "findings")
    seconds = time.monotonic() - began
    for finding, path in zip(kinds, kept, strict=True):
        tell(Result("fuzz", finding.target, "failed", 0.0, f"{finding.what}; see {path}"))
    numbers = {"inputs": done.inputs, "refused": done.refused, "slowest_s": done.slowest_s}
    words = f"{done.inputs} inputs, {done.refused} refused, {len(done.findings)} findings"
    tell(Result("fuzz", "all readers", "failed" if kinds else "passed", seconds, words, numbers))


def play_netem(budget: Budget, tell: Tell) -> None:
    """What this kernel can do to a link."""
    cases = {
        "delay": Link(delay_ms=100),
        "loss": Link(loss_percent=2),
        "1 Mbit/s": Link(rate="1mbit"),
        "all": Link(delay_ms=100, jitter_ms=10, loss_percent=2, rate="1mbit"),
    }
    for case, link in cases.items():
        began = time.monotonic()
        reason = why_not(link)
        state = "skipped" if reason else "passed"
        tell(Result("netem", case, state, time.monotonic() - began, reason))  # type: ignore[arg-type]


def _deployments(part: str) -> Callable[[Budget, Tell], None]:
    """A part that needs a deployment to befall: its table is in `faults`, nothing starts one."""

    def play(budget: Budget, tell: Tell) -> None:
        tell(Result(part, "all", "skipped", 0.0, "nothing starts a deployment for it"))

    return play


PARTS: Mapping[str, Callable[[Budget, Tell], None]] = {
    "fuzz": play_fuzz,
    "guided": lambda budget, tell: guided.play(budget.seconds, budget.folder, tell),
    "netem": play_netem,
    "kills": _deployments("kills"),
    "faults": _deployments("faults"),
    "load": _deployments("load"),
    "adapter7b": _deployments("adapter7b"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.soak", description="The long proof: play parts of the soak."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each part; 3600")
    parser.add_argument("--inputs", type=int, default=10**6, help="of `fuzz`; 1000000")
    parser.add_argument("--seed", type=int, default=1, help="of every draw; 1")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="of `fuzz`; the cores"
    )
    parser.add_argument("--out", type=Path, help="file for a JSON line per case; is appended to")
    parser.add_argument("--folder", type=Path, default=Path("soak"), help="for what is kept; soak")
    chosen = parser.parse_args(arguments)
    for part in chosen.parts:
        if part not in PARTS:
            parser.error(f"expected parts of {', '.join(PARTS)}, found {part}")
    budget = Budget(chosen.seconds, chosen.inputs, chosen.seed, chosen.processes, chosen.folder)
    journal = Journal(chosen.out)
    for part in chosen.parts or PARTS:
        began = time.monotonic()
        try:
            PARTS[part](budget, journal)
        except Exception as error:  # noqa: BLE001 - the other parts go on
            journal(failed(part, "the part", error, time.monotonic() - began))
    print(table(journal.results))
    return 1 if journal.failed else 0


if __name__ == "__main__":
    sys.exit(main())
