"""The run of a group's own coordinator: it plays what its site of the level above is asked.

    site above -> mailbox -> SubCoordinator -> this coordinator's sites -> mailbox -> site above

It lasts until the operator stops it. A process that takes its place goes on with the question that
is still there; one that was answered and is asked again, because the answer was lost on its way up,
gets the same answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedtune.deploy.mailbox import Answer, Ask, Mailbox
from fedtune.deploy.site_task import SiteTask, read_site_task, site_task
from fedtune.errors import FedtuneError, ProtocolError, RunError, StoppedError
from fedtune.records import BACKBONE_FORMATS, Event, ModelShapes
from fedtune.settings import RunConfig
from fedtune.wire.flower import TRAIN
from fedtune.wire.messages import decode_train_instruction
from fedtune_server.coordinator import installed_versions
from fedtune_server.hierarchy.answering import answer
from fedtune_server.hierarchy.sub_coordinator import Group, SubCoordinator
from fedtune_server.ledger import Ledger
from fedtune_server.roster import Roster
from fedtune_server.run_folder import RunFolder

_POLL_S = 0.2
_ALIVE_S = 2.0
_OWN = ("cuda_graph", "tune_allocator", "name")
"""Of a `SiteTask`: how a machine computes, and the run's name, may differ between levels."""


def answer_above(
    config: RunConfig,
    shapes: ModelShapes,
    grid: Grid,
    roster: Roster,
    mailbox: Mailbox,
    watch: Callable[[Event], None],
    check: Callable[[], object],
) -> Path:
    """Answer what a site of the level above is asked, until this process is interrupted.

    Args:
        config: of the group; `deployment.group` is the site's name.
        roster: tells the group's own sites.
        watch: told of every event, beside the ledger.
        check: asked between questions; raises StoppedError where the run was stopped.

    Raises:
        KeyboardInterrupt: it was; the folder says so.
        StoppedError: the run was stopped; the folder says `interrupted`.
        RunError: the folder is of another run.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.enter(config.folder, config))
        goes_on = folder.run != ""
        folder.run = folder.run or f"{config.run.name}-{os.urandom(4).hex()}"
        ledger = stack.enter_context(Ledger(folder.ledger))

        def emit(event: Event) -> None:
            ledger.append(event)
            watch(event)

        wanted = Wanted(mailbox)
        group = SubCoordinator(
            Group(config.deployment.group, "group", roster.needed),
            config, shapes, WantedGrid(grid, wanted), folder, emit, roster,
        )  # fmt: skip
        folder.write_status("running", folder.reached)
        emit(_begins(config, folder, roster.expected, goes_on=goes_on))
        for note in folder.notes:
            emit(Event("warning", {"text": note}))
        try:
            with _said_to_be_alive(mailbox):
                Answering(config, group, folder, mailbox, wanted).play(check)
        except BaseException as error:
            _end(folder, error, emit)
            raise
    return config.folder


class Wanted:
    """Whether the question at hand still waits for its answer.

    Attributes:
        number: its id; that of the newest question, if it is for the same work.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.number, self._work = "", b""

    def begin(self, asked: Ask) -> None:
        """A question is at hand."""
        self.number, self._work = asked.id, work_of(asked)

    def check(self) -> None:
        """Go on, or not.

        Raises:
            StoppedError: the level above no longer waits.
        """
        with suppress(ProtocolError):
            if self._mailbox.asked() == self.number:
                return
            asked = self._mailbox.take()
            if asked is not None and work_of(asked) == self._work:
                self.number = asked.id  # the site's process died, and the next one asks again
                return
        raise StoppedError("the level above no longer waits for the group's answer")


class WantedGrid(Grid):  # type: ignore[misc]  # Flower has no types
    """A grid that is not waited on for what nobody wants any more."""

    def __init__(self, grid: Grid, wanted: Wanted) -> None:
        self._grid, self._wanted = grid, wanted

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        self._wanted.check()
        return self._grid.get_node_ids()  # type: ignore[no-any-return]

    def get_nodes(self) -> Any:
        self._wanted.check()
        return self._grid.get_nodes()

    def push_messages(self, messages: Any) -> Any:
        self._wanted.check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Any) -> Any:
        self._wanted.check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self._grid.send_and_receive(messages, timeout=timeout)


class Answering:
    """Takes questions from a mailbox, one after another."""

    def __init__(
        self,
        config: RunConfig,
        group: SubCoordinator,
        folder: RunFolder,
        mailbox: Mailbox,
        wanted: Wanted,
    ) -> None:
        self._config, self._group, self._folder = config, group, folder
        self._mailbox, self._wanted = mailbox, wanted
        self._done = ""
        self._last: tuple[bytes, Answer] | None = None

    def play(self, check: Callable[[], object]) -> None:
        """Answer until interrupted, or until `check` raises."""
        while True:
            check()
            self.step()
            time.sleep(_POLL_S)

    def step(self) -> None:
        """Answer the question that waits, if there is one that was not answered yet."""
        try:
            asked = self._mailbox.take() if self._mailbox.asked() != self._done else None
        except ProtocolError:
            return  # not ours; whoever asks next replaces it
        if asked is None or asked.id == self._done:
            return
        self._wanted.begin(asked)
        found = self._known(asked) or self._answer(asked)
        self._done = self._wanted.number
        self._mailbox.answer(self._done, found)

    def _known(self, asked: Ask) -> Answer | None:
        """The answer that this very work was given before."""
        if self._last is not None and self._last[0] == work_of(asked):
            return self._last[1]
        return None

    def _answer(self, asked: Ask) -> Answer:
        try:
            shown, within_s = self._read(asked.about)
            self._group.group, self._group.within_s = shown, within_s
            body, tensors = answer(self._group, asked.kind, asked.body, asked.tensors)
        except FedtuneError as error:
            return Answer(str(error) or type(error).__name__)
        found = Answer("", body, tensors)
        if asked.kind == TRAIN:
            self._last = work_of(asked), found
            round = decode_train_instruction(asked.body).round
            self._folder.write_status("running", min(round, self._config.run.rounds))
        return found

    def _read(self, about: Mapping[str, object]) -> tuple[Group, float]:
        """How the site above shows itself, and how long it waits.

        Raises:
            ProtocolError: the run above is not the group's.
        """
        check_same_task(read_site_task(about), site_task(self._config), self._group.group.name)
        speed, within_s = about.get("link_bytes_per_s"), about.get("within_s")
        device_class, formats = about.get("device_class"), about.get("formats")
        if (
            not isinstance(speed, int | float)
            or not isinstance(within_s, int | float)
            or not isinstance(device_class, str)
            or not isinstance(formats, list)
            or not (speed >= 0 and within_s > 0)
        ):
            raise ProtocolError("the site above says of itself what no site of this version does")
        known = tuple(name for name in BACKBONE_FORMATS if name in formats) or ("fp32",)
        name, devices = self._config.deployment.group, self._group.group.devices
        return Group(name, device_class, devices, float(speed), known), float(within_s)


def check_same_task(above: SiteTask, own: SiteTask, group: str) -> None:
    """Refuse work whose rows would become other samples here than at the level above.

    Raises:
        ProtocolError: the first key that differs.
    """
    there, here = above.model_dump(exclude=set(_OWN)), own.model_dump(exclude=set(_OWN))
    for key, value in _flat(there):
        found = dict(_flat(here)).get(key)
        if found != value:
            raise ProtocolError(
                f"{group}: {key} is {json.dumps(value)[:100]} above and "
                f"{json.dumps(found)[:100]} in the group's run file; make them equal, and hand the "
                "group's run in again"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def work_of(asked: Ask) -> bytes:
    """What two questions for the same work have in common: an instruction names its tensors."""
    return hashlib.sha256(asked.kind.encode() + b"\0" + asked.body).digest()


@contextmanager
def _said_to_be_alive(mailbox: Mailbox) -> Iterator[None]:
    over = threading.Event()

    def say() -> None:
        while not over.is_set():
            mailbox.alive()
            over.wait(_ALIVE_S)

    thread = threading.Thread(target=say, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_ALIVE_S)


def _begins(config: RunConfig, folder: RunFolder, devices: int, *, goes_on: bool) -> Event:
    fields: dict[str, object] = {
        "run": folder.run,
        "folder": str(folder.path),
        "rounds": config.run.rounds,
        "devices": devices,
        "versions": installed_versions(),
    }
    if goes_on:
        return Event("run_resumed", fields | {"round": folder.reached, "skipped": 0})
    fields |= {"rule": config.aggregate.rule, "seed": config.run.seed}
    return Event("run_started", fields)


def _end(folder: RunFolder, error: BaseException, emit: Callable[[Event], None]) -> None:
    """Leave word of how it ended; where the disk takes none, what ended it is said anyway."""
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit, StoppedError))
    named = str(error) if isinstance(error, FedtuneError) else repr(error)
    with suppress(RunError):
        folder.write_ending("interrupted" if interrupted else "failed")
    with suppress(RunError):
        if interrupted:
            emit(Event("run_interrupted", {"round": folder.reached}))
        else:
            emit(Event("run_failed", {"reason": named}))
