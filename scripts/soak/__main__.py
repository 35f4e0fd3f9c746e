"""Play parts of the soak, each within its time.

python -m scripts.soak fuzz netem --seconds 600 --out soak.jsonl
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from scripts.soak import guided
from scripts.soak.faults import DISTANCES, FAULTS, KILLS, LOST, ROUTES, UNDISTURBED, Fault, play
from scripts.soak.fuzz import fuzz_in_processes, keep, unlike
from scripts.soak.netem import network, why_not
from scripts.soak.results import Journal, Result, Tell, failed, table


@dataclass(frozen=True)
class Budget:
    """What a part may take.

    Attributes:
        folder: for what it keeps.
        only: regular expression of the names of cases; empty: all.
    """

    seconds: float
    inputs: int
    seed: int
    processes: int
    folder: Path
    only: str = ""


DEADLINE_S = 480.0
"""Of a run that something befalls: one takes about a minute, and Flower takes one to see a loss."""


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


def _faults(
    part: str, faults: Sequence[Fault], *, distant: bool = False
) -> Callable[[Budget, Tell], None]:
    """A part that lets faults happen to a real federation.

    Args:
        distant: the coordinator and the sites are in network namespaces.
    """

    def play_faults(budget: Budget, tell: Tell) -> None:
        from scripts.soak.world import ROUNDS, SITES, World, clear, make_base

        if distant and (reason := why_not()):
            tell(Result(part, "all", "skipped", 0.0, reason))
            return
        chosen = [f for f in (UNDISTURBED, *faults) if re.search(budget.only, f.name)]
        folder = clear(budget.folder / part)
        mount = sys.platform == "linux" and os.geteuid() == 0
        until = time.monotonic() + budget.seconds
        with ExitStack() as stack:
            base = make_base(folder / "base")
            net = stack.enter_context(network(("coordinator", *SITES))) if distant else None
            world = stack.enter_context(World(folder, base, mount=mount, net=net))
            play(
                chosen, world.start, tell, part=part, rounds=ROUNDS, deadline_s=DEADLINE_S,
                until=until, seed=budget.seed, expected=world.simulated(),
            )  # fmt: skip

    return play_faults


def play_tests(budget: Budget, tell: Tell) -> None:
    """The tests that take too long for every change, such as a group of sites over real links."""
    began = time.monotonic()
    folder = Path(__file__).resolve().parents[2] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "soak"]
    try:
        done = subprocess.run(
            [*command, str(folder)],
            capture_output=True, text=True, timeout=budget.seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        words, good = f"not over within {budget.seconds:g} s", False
    else:
        lines = done.stdout.strip().splitlines()
        named = [line.partition(" - ")[0] for line in lines if line.startswith("FAILED")]
        words, good = "; ".join([*lines[-1:], *named]) or done.stderr[-200:], not done.returncode
    state = "passed" if good else "failed"
    tell(Result("tests", "all", state, time.monotonic() - began, words))  # type: ignore[arg-type]


PARTS: Mapping[str, Callable[[Budget, Tell], None]] = {
    "fuzz": play_fuzz,
    "guided": lambda budget, tell: guided.play(budget.seconds, budget.folder, tell),
    "netem": _faults("netem", DISTANCES, distant=True),
    "kills": _faults("kills", KILLS),
    "routes": _faults("routes", ROUTES),
    "lost": _faults("lost", LOST),
    "faults": _faults("faults", FAULTS),
    "all-faults": _faults("all-faults", (*FAULTS, *KILLS, *ROUTES, *LOST)),
    "tests": play_tests,
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
    parser.add_argument("--only", default="", metavar="REGEX", help="names of cases; all")
    chosen = parser.parse_args(arguments)
    for part in chosen.parts:
        if part not in PARTS:
            parser.error(f"expected parts of {', '.join(PARTS)}, found {part}")
    budget = Budget(
        chosen.seconds, chosen.inputs, chosen.seed, chosen.processes, chosen.folder, chosen.only
    )
    journal = Journal(chosen.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and what was started ends
    # A shell that starts this in the background has it, and all below it, ignore Ctrl-C; tests
    # interrupt commands by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
