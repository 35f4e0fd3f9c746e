"""A site that stands for the sites of a coordinator on this machine: it hands on what it is asked.

    message -> policy -> the run of the group's coordinator -> its answer

Nothing is trained here: messages go to the mailbox of the coordinator that `client.toml` names
under `group.coordinator`, where its run answers for all its sites (docs/hierarchy.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config import is_insecure
from fedtune.deploy.homes import CoordinatorHome, SiteHome, SiteSettings
from fedtune.deploy.mailbox import Answer, Mailbox
from fedtune.deploy.site_task import TASK_KEY, SiteTask, read_site_task
from fedtune.devices.measurement import package_versions
from fedtune.errors import DeploymentError, FedtuneError, ProtocolError, RunError, StoppedError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.wire.calibration import decode_calibration_instruction
from fedtune.wire.flower import (
    CALIBRATE,
    EVALUATE,
    TRAIN,
    from_record,
    make_forwarding_app,
    to_record,
)
from fedtune.wire.messages import (
    decode_evaluate_instruction,
    decode_task_spec,
    decode_train_instruction,
)
from fedtune_client.deployed import Coordinator
from fedtune_client.gauges import Gauges, Ticker
from fedtune_client.link_speed import known_link, probe_link
from fedtune_client.policy import Asked, Policy, Readings
from fedtune_client.presence import Presence
from fedtune_client.standing import StandingBoard, State
from fedtune_client.stopping import Stop
from fedtune_client.traffic_day import TrafficDay

SILENCE_S: Final = 120.0
"""How long the group's run may be away, as while its process is started again; chosen."""
_POLL_S: Final = 0.2
_SHARE: Final = 0.9
"""Of the time that the level above gives, what the group's own round may take."""
_WAY_S: Final = 5.0
"""Taken off as well, for the way up: a node polls every 3 s."""
_LEAST_S: Final = 10.0

_log = logging.getLogger(__name__)
_groups: dict[Path, GroupSite] = {}


def client_app(home: Path) -> ClientApp:
    """The app of the site that lives in a folder; begins its presence and its metrics.

    Raises:
        DeploymentError: `client.toml` is not right, or the group's coordinator is not there.
    """
    path = home.absolute()
    if path not in _groups:
        site = SiteHome(path)
        _groups[path] = GroupSite(site, site.settings())
        _groups[path].start()
    return make_group_site_app(_groups[path])


def interrupt(home: Path, reason: str) -> None:
    """Wait no longer for the group's answer; an error with this reason goes up."""
    if site := _groups.get(home.absolute()):
        site.stop.now(reason)


def close(home: Path) -> None:
    """End what `client_app` began, in about a second."""
    if site := _groups.pop(home.absolute(), None):
        site.close()


def make_group_site_app(site: GroupSite) -> ClientApp:
    """Build the app that answers a coordinator's messages with what the group says."""

    def answered(kind: str, message: Message, context: Context) -> Message:
        body, packed = from_record(message.content, kind)
        task = read_site_task(context.run_config)
        found = site.answer(kind, task, body, packed, message.metadata.ttl)
        return Message(to_record(kind, found.body, found.tensors), reply_to=message)

    return make_forwarding_app(answered)


class GroupSite:
    """One site whose work another coordinator's sites do.

    Args:
        silence_s: how long the group's run may be away.

    Raises:
        DeploymentError: there is no coordinator where `group.coordinator` says.
    """

    def __init__(
        self, home: SiteHome, settings: SiteSettings, silence_s: float = SILENCE_S
    ) -> None:
        self._home, self._settings, self._silence_s = home, settings, silence_s
        self._below = home.path / Path(settings.group.coordinator).expanduser()
        below = CoordinatorHome(self._below)
        if not below.settings_file.is_file():
            raise DeploymentError(
                f"client.toml: group.coordinator: expected a coordinator's home at {self._below}, "
                "found none; make it with: fedtune server init"
            )
        self._mailbox = Mailbox(below.group(settings.site.name))
        self._coordinator = Coordinator(home, settings, is_insecure())
        self.stop, self.board = Stop(), StandingBoard()
        self._traffic = TrafficDay(home.state)
        readings = Readings(lambda: self._traffic.today().total)
        self._policy = Policy(home.policy_file, readings)
        self._presence = Presence(self._coordinator.channel, self.status, self.board, self.stop)
        gauges = Gauges(home.state / "metrics.prom")
        self._ticker = Ticker(lambda: gauges.write(self.board.now(), self._traffic.today()))

    def start(self) -> None:
        """Begin presence, metrics and the measurement of the link."""
        self._presence.start()
        self._ticker.start()
        threading.Thread(target=self._link_bytes_per_s, name="link", daemon=True).start()

    def close(self) -> None:
        """End the threads; who waits for the group gives up."""
        self.stop.now("the site's process ends")
        self._presence.close()
        self._ticker.close()
        self._mailbox.clear()

    def answer(
        self, kind: str, task: SiteTask, body: bytes, packed: bytes | None, ttl_s: float
    ) -> Answer:
        """What the group's run answers.

        Raises:
            PolicyError: the site does not accept the work.
            StoppedError: the run was stopped, or the process is being ended.
            ProtocolError: the group refuses, with its reason.
            RunError: its run does not play, or did not answer in time.
        """
        state, asked, round = _asked(kind, task, body)
        within_s = max(_LEAST_S, _SHARE * ttl_s - _WAY_S)
        about = {
            TASK_KEY: task.model_dump_json(),
            "device_class": self._settings.device.device_class,
            "formats": list(self._settings.device.formats),
            "link_bytes_per_s": self._link_bytes_per_s(),
            "within_s": within_s,
        }
        with self._work(state, asked, round):
            self._check_there()
            number = self._mailbox.ask(kind, about, body, packed)
            try:
                found = self._wait(number, asked.run, time.monotonic() + ttl_s)
            finally:
                self._mailbox.clear()
            if found.failure:
                raise ProtocolError(found.failure)
        return found

    def status(self) -> pb.SiteStatus:
        """What the coordinator above is told of this site."""
        now, traffic, link = self.board.now(), self._traffic.today(), known_link(self._home.state)
        return pb.SiteStatus(
            state=now.state,
            run=now.run,
            round=now.round,
            bytes_down_today=traffic.down,
            bytes_up_today=traffic.up,
            link_down_bytes_per_s=link.down_bytes_per_s,
            link_up_bytes_per_s=link.up_bytes_per_s,
            last_refusal=now.last_refusal,
            versions=package_versions(),
            device="a coordinator's sites",
        )

    def _wait(self, number: str, run: str, end: float) -> Answer:
        while (found := self._mailbox.answer_to(number)) is None:
            self.stop.check(run)
            self._check_there()
            if time.monotonic() > end:
                raise RunError("the group did not answer in the time that the run gives")
            time.sleep(_POLL_S)
        return found

    def _check_there(self) -> None:
        silent_s = self._mailbox.silent_s()
        if silent_s is None or silent_s > self._silence_s:
            raise RunError(
                f"the run of the coordinator at {self._below.name} does not play; hand in one with "
                f'deployment.group = "{self._settings.site.name}" there: fedtune run'
            )

    def _link_bytes_per_s(self) -> float:
        """Of the slower way to the coordinator above, measured now if nobody has; 0: not known."""
        found = known_link(self._home.state)
        if found.slower:
            return found.slower
        try:
            with self._coordinator.http() as client:
                return probe_link(client, self._home.state).slower
        except (OSError, ValueError) as error:  # the CA or the token cannot be read
            _log.warning("the link cannot be measured: %s", error)
            return 0.0

    @contextmanager
    def _work(self, state: State, asked: Asked, round: int) -> Iterator[None]:
        """Ask the policy first, and have the site's standing say what goes on."""
        self.stop.begin()
        self.board.change(state=state, run=asked.run, round=round, step=0, steps=asked.steps)
        after: State = "idle"
        try:
            self.stop.check(asked.run)
            self._policy.check(asked)
            yield
            if state == "training":
                self.board.change(rounds_done=self.board.now().rounds_done + 1)
        except StoppedError:
            raise
        except FedtuneError as error:
            after = "refusing"
            refusals = self.board.now().refusals + 1
            self.board.change(last_refusal=str(error), refusals=refusals)
            raise
        finally:
            self.board.change(state=after, run="" if after == "idle" else asked.run)


def _asked(kind: str, task: SiteTask, body: bytes) -> tuple[State, Asked, int]:
    """A message as the policy sees it, and its round. Its memory is not this machine's.

    Raises:
        ProtocolError: it is malformed.
    """
    if kind == TRAIN:
        order = decode_train_instruction(body)
        steps = order.plan.local_steps
        return "training", Asked(task.name, order.base_digest, 0, steps), order.round
    if kind == EVALUATE:
        instruction = decode_evaluate_instruction(body)
        return "evaluating", Asked(task.name, instruction.base_digest), instruction.round
    if kind == CALIBRATE:
        digest = decode_calibration_instruction(body).base_digest
        return "evaluating", Asked(task.name, digest), 0
    return "waiting", Asked(task.name, decode_task_spec(body).base_digest), 0
