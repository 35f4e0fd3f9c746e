"""The way of an adapter with the shapes of a 7B model, to three sites and back.

    python benchmarks/adapter.py [--quick] [--json]

Rank 16 on the 224 matrices of Llama 2 7B (seven in each of 32 layers): 40 million numbers, 160 MB
in float32. Each of three sites is sent its own and returns another. Nothing is trained: link,
runner, nodes and executors are the processes of a deployment, with TLS, signed requests and SQLite,
and the apps in them only send and return. `packed` is one array, as fedtune sends it; `tensors` is
an array for each of the 448 tensors, as Flower's own examples do.

Peak memory is the kernel's for each process; that of a kind is the largest. `not from files` leaves
out what is mapped from files, which for the link is its database.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from echo import ORDER, PATIENCE_S, RESULT
from real_sites import HOST, ROOT, environment, fedtune, free_ports, wait_for
from reporting import parse_arguments, print_json, publish, table
from usage import Usage

from fedtune.deploy.certificates import make_node_key
from fedtune.deploy.homes import CoordinatorHome, SiteHome
from fedtune.errors import DeploymentError
from fedtune.flwr_compat import Control, FlowerRun, run_fab

SITES, RANK, LAYERS = 3, 16, 32
SHAPES = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
ROLES = ("link", "run", "node", "executor")
QUICK_LAYERS = 2
TITLE, COMMAND = "The way of an adapter", "python benchmarks/adapter.py"
WORDS = """\
Rank 16 on the 224 matrices of Llama 2 7B, 160 MB in float32, to three sites and back, each with its
own; nothing is trained. Processes, TLS, signatures and SQLite are those of a deployment. The run's
process holds what it sent to all sites (480 MB here), until they have answered; a node holds what
came and what goes; the link holds what is under way, and maps up to 256 MB of its database.
Seconds of a round depend on what else the machine did, those of processor and memory hardly do."""
_TASK = {
    "name": "echo",
    "seed": 0,
    "task": "causal-lm",
    "data": {},
    "compute": "fp32",
    "cuda_graph": "auto",
    "tune_allocator": False,
}


@dataclass(frozen=True)
class Way:
    """What a round of one form took.

    Attributes:
        seconds: from the first byte that is sent to the last that came back.
        pushed_s: of these, until the link held all that was sent.
        cpu_s: seconds of processor by kind of process; of all sites together.
        peak_mb, anonymous_mb: by kind of process; of the largest.
    """

    form: str
    megabytes: float
    seconds: float
    pushed_s: float
    cpu_s: dict[str, float]
    peak_mb: dict[str, float]
    anonymous_mb: dict[str, float]


def numbers(layers: int) -> list[int]:
    """How many numbers each tensor holds."""
    return [RANK * side for _ in range(layers) for shape in SHAPES for side in shape]


class Deployment:
    """A coordinator and its sites below one folder, each process started by itself."""

    def __init__(self, folder: Path) -> None:
        from fedtune_server.registry import Registry

        first, *ports = free_ports(4 + SITES)
        self._folder = folder
        fedtune("server", "init", str(folder / "coordinator"), "--host", HOST, "--port", str(first))
        self.home = CoordinatorHome(folder / "coordinator")
        self.address = f"{HOST}:{first}"
        registry = Registry(self.home.registry)
        self.sites = []
        for number, port in enumerate(ports[3:]):
            site, key = SiteHome(folder / f"site-{number}"), make_node_key()
            registry.enrol(registry.invite(f"site-{number}").secret, key.public)
            site.path.mkdir()
            site.ca_certificate.write_bytes(self.home.ca_certificate.read_bytes())
            site.node_key.write_bytes(key.private)
            site.settings_file.write_text(
                f'[site]\nname = "site-{number}"\nserver = "{self.address}"\n'
                f'service = "{HOST}:{ports[0]}"\nnode_port = {port}\n',
                encoding="utf-8",
            )
            self.sites.append(site)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all processes."""
        self._start("fedtune_server.link", self.home.path)
        self._start("fedtune_server.runner", self.home.path, "--app", "echo:server")
        for site in self.sites:
            self._start("fedtune_client.node", site.path)
            self._start("fedtune_client.executor", site.path, "--app", "echo")

    def _start(self, module: str, home: Path, *options: str) -> None:
        with (self._folder / "output.txt").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(home), *options],
                    env=environment(PYTHONPATH=str(ROOT / "benchmarks")),
                    stdout=output,
                    stderr=output,
                )
            )

    def tree(self) -> list[psutil.Process]:
        """All processes."""
        found = []
        for process in self._processes:
            if process.poll() is None:
                top = psutil.Process(process.pid)
                found += [top, *top.children(recursive=True)]
        return found

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def play(self, order: dict[str, object]) -> list[dict[str, float]]:
        """Play an order; what its rounds took."""
        (self.home.path / ORDER).write_text(json.dumps(order), encoding="utf-8")
        token = str(_operator_token(self.home))
        control = Control(self.address, self.home.ca_certificate.read_bytes(), token)
        wait_for("the link", lambda: _answers(control), 180)
        fab = run_fab({"fedtune-run": "echo", "fedtune-task": json.dumps(_TASK)})
        run = control.start_run(fab)
        ended: FlowerRun | None = None

        def over() -> bool:
            nonlocal ended
            with suppress(DeploymentError):  # a link that is busy answers late
                ended = control.runs()[run]
            return ended is not None and ended.status == "finished"

        try:
            wait_for("the run", over, PATIENCE_S, 2.0)
        finally:
            control.close()
        assert ended is not None
        if ended.sub_status != "completed":
            raise RuntimeError(f"{ended.details}; see {self._folder / 'output.txt'}")
        rounds: list[dict[str, float]] = json.loads((self.home.path / RESULT).read_text("utf-8"))
        return rounds


def _operator_token(home: CoordinatorHome) -> str:
    from fedtune_server.operator_token import OperatorToken

    return OperatorToken(home.operator_file).read()


def _answers(control: Control) -> bool:
    try:
        control.runs()
    except DeploymentError:
        return False
    return True


@contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """A deployment that runs, ended at the end."""
    made = Deployment(folder)
    try:
        made.start()
        yield made
    finally:
        made.close()


def measure(folder: Path, form: str, layers: int, rounds: int) -> Way:
    """Play rounds of one form in processes of their own; the last one counts."""
    folder.mkdir(parents=True)
    with deployment(folder) as made, Usage(made.tree) as usage:
        order = {"form": form, "sites": SITES, "rounds": rounds, "numbers": numbers(layers)}
        last = made.play(order)[-1]
    began, ended = last["began"], last["ended"]
    return Way(
        form=form,
        megabytes=4 * sum(numbers(layers)) / 1e6,
        seconds=ended - began,
        pushed_s=last["pushed"] - began,
        cpu_s={role: usage.cpu_s(role, began, ended) for role in ROLES},
        peak_mb={role: usage.peak_mb(role) for role in ROLES},
        anonymous_mb={role: usage.anonymous_mb(role) for role in ROLES},
    )


def rows(ways: list[Way]) -> list[dict[str, str]]:
    """A row for each kind of process of each form."""
    names = {"run": "run (coordinator)", "node": "node (each)", "executor": "executor (each)"}
    return [
        {
            "form": way.form,
            "MB": f"{way.megabytes:.0f}",
            "seconds a round": f"{way.seconds:.1f}",
            "process": names.get(role, role),
            "processor of all of them, s": f"{way.cpu_s[role]:.1f}",
            "peak, MB": f"{way.peak_mb[role]:.0f}",
            "not from files, MB": f"{way.anonymous_mb[role]:.0f}",
            "peak over one adapter": f"{way.peak_mb[role] / way.megabytes:.1f}",
        }
        for way in ways
        for role in ROLES
    ]


def page(ways: list[Way]) -> str:
    """The section of the page."""
    return f"{WORDS}\n\n{table(rows(ways))}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--form", choices=("packed", "tensors"), help="only this one")


def main() -> int:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    options = parse_arguments(__doc__ or "", _options)
    layers, rounds = (QUICK_LAYERS, 1) if options.quick else (LAYERS, 2)
    forms = [options.form or "packed"]
    if not options.quick and options.form is None:
        forms.append("tensors")
    with tempfile.TemporaryDirectory() as name:
        ways = [measure(Path(name) / form, form, layers, rounds) for form in forms]
    print(table(rows(ways)))
    if options.json:
        print_json({way.form: asdict(way) for way in ways})
    if not options.quick:
        publish(TITLE, COMMAND + f" --form {options.form}" * bool(options.form), page(ways))
    return 0


if __name__ == "__main__":
    sys.exit(main())
