"""The coordinator that a verb speaks to, and a run there that is followed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from fedtune.cli.amounts import one_line
from fedtune.cli.display import JsonLines, LiveDisplay
from fedtune.deploy.channel import CALL_S, open_channel, spoken, spoken_errors
from fedtune.deploy.operator import OperatorFile, find_operator_file
from fedtune.errors import ProtocolError
from fedtune.export.run_place import holds_run, run_place
from fedtune.export.watching import LedgerListener
from fedtune.records import Event
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import RunServiceStub

EXIT_NOT_FINISHED = 2
EXIT_INTERRUPTED = 130

CoordinatorFile = Annotated[
    Path | None,
    typer.Option(
        "--coordinator",
        metavar="FILE",
        help="the coordinator's operator.toml; else $FEDTUNE_OPERATOR, else "
        "fedtune-server/operator.toml",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="without TLS, as the coordinator was started: anyone reads on"),
]

_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A coordinator that can be asked.

    Attributes:
        service: HOST:PORT.
    """

    service: str
    stub: Any  # generated code has no types

    def ask(self, method: str, request: Any) -> Any:
        """The answer to one call.

        Raises:
            DeploymentError: the coordinator does not answer, or refuses with a reason.
        """
        with spoken_errors(self.service):
            return getattr(self.stub, method)(request, timeout=CALL_S)

    def run(self, name: str) -> pb.RunInfo:
        """A run.

        Raises:
            DeploymentError: there is none of that name, or the coordinator does not answer.
        """
        found: pb.RunInfo = self.ask("GetRun", pb.RunName(name=name))
        return found


@contextmanager
def coordinator(file: Path | None, insecure: bool = False) -> Iterator[Coordinator]:
    """The coordinator of an operator file.

    Raises:
        DeploymentError: there is no such file, or it is not one.
    """
    operator = OperatorFile.read(find_operator_file(file))
    if insecure:
        warn_of_plain(operator.service)
    channel = open_channel(
        operator.service, operator.ca.encode("ascii", "replace"), operator.token, insecure=insecure
    )
    try:
        yield Coordinator(operator.service, RunServiceStub(channel))  # type: ignore[no-untyped-call]
    finally:
        channel.close()


def is_elsewhere(name: str, file: Path | None) -> bool:
    """Whether a run is to be looked for at a coordinator: one is named, or none is here."""
    return file is not None or (_may_be_there(name) and not holds_run(run_place(name)))


def _may_be_there(name: str) -> bool:
    return Path(name).parts == (name,) and find_operator_file(None).is_file()


def say_which(place: Path, name: str) -> None:
    """Say that a run of this machine is shown, where a coordinator may have one of that name."""
    if _may_be_there(name):
        _say(f"{place} on this machine; for {name} at the coordinator give --coordinator FILE")


def warn_of_plain(service: str) -> None:
    """Say what is lost without TLS."""
    typer.echo(
        f"warning: --insecure: {service} is spoken to without TLS; the token can be read on the "
        "way",
        err=True,
    )


def follow(at: Coordinator, name: str, *, json_lines: bool) -> None:
    """Show a run until it ends, or Ctrl-C, which leaves it going.

    Raises:
        Exit: with 2 if the run ended and is not finished, with 130 after Ctrl-C.
        DeploymentError: there is no such run.
    """
    display = (
        JsonLines()
        if json_lines
        else LiveDisplay(without_end="was not seen to end", to_go_on=f"fedtune resume {name}")
    )
    try:
        with display:
            for event in run_events(at, name, _say):
                display(event)
    except KeyboardInterrupt:
        _say(
            f"run {name} goes on at the coordinator; follow it with: fedtune watch {name}, "
            f"stop it with: fedtune stop {name}"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    ended = at.run(name)
    reason = f": {one_line(ended.reason, 1000)}" if ended.reason else ""
    _say(f"run {name} {ended.state} at round {ended.round} of {ended.rounds}{reason}")
    if ended.state != "finished":
        raise typer.Exit(EXIT_NOT_FINISHED)


def run_events(
    at: Coordinator,
    name: str,
    say: Callable[[str], object],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Event]:
    """A run's events and the alarms among them, until it ends; a lost connection is opened again.

    Raises:
        DeploymentError: there is no such run, or the coordinator refuses.
    """
    listener, after, failures = LedgerListener(), 0, 0
    while True:
        request = pb.WatchRunRequest(name=name, after=after)
        try:
            for event in at.stub.WatchRun(request):
                failures = 0
                if event.line <= after:
                    yield listener.replaced()
                after = event.line
                yield from listener.hear(_line(event.json))
            return
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
                raise spoken(error, at.service) from None
            failures += 1
            if failures == 1:
                say(f"{spoken(error, at.service)} It is asked again; the run needs no watcher.")
            sleep(min(_LONGEST_PAUSE_S, 0.5 * 2.0**failures))


def _line(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ProtocolError("the coordinator sent a line of the ledger that is not a JSON object")
    return found


def _say(text: str) -> None:
    typer.echo(text, err=True)
