"""A real machine as a Flower node: one long-lived process that serves run after run.

    message -> whose run -> policy -> base by its digest -> agent -> answer

Nothing of a run's code is executed: what a run brings is a `SiteTask`, and messages. This module
does not import torch before the first message, so that its absence is one line in an answer.
"""

from __future__ import annotations

import importlib.util
import logging
import ssl
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config import cache_folder, is_insecure
from fedtune.deploy.homes import SiteHome, SiteSettings
from fedtune.deploy.site_task import SiteTask, read_site_task
from fedtune.devices.measurement import package_versions
from fedtune.devices.processor import processor_name
from fedtune.devices.usage import resident_bytes
from fedtune.errors import FedtuneError, MissingExtraError, PolicyError, StoppedError
from fedtune.records import DeviceProfile, SiteReport
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.wire.calibration import CalibrationInstruction, CalibrationReport
from fedtune.wire.messages import (
    EvaluateInstruction,
    EvaluateReport,
    TaskSpec,
    TrainInstruction,
    TrainReport,
)
from fedtune_client.answering import Worker, make_answering_app
from fedtune_client.bases import Bases, Fetch, Progress
from fedtune_client.gauges import Gauges, Ticker
from fedtune_client.link_speed import known_link, probe_link
from fedtune_client.policy import Asked, Policy, Readings
from fedtune_client.presence import Presence
from fedtune_client.standing import LogTail, StandingBoard, State
from fedtune_client.stopping import Stop
from fedtune_client.traffic_day import TrafficDay

if TYPE_CHECKING:
    from fedtune_client.agent import Agent
    from fedtune_client.allowance import Idle

_MOST_AGENTS: Final = 4
"""Runs whose tokenised samples stay in memory."""
_MOST_WAIT_S: Final = 20.0
"""Longest that a profile query waits for a download; a query that is late is lost."""


_LOGGERS: Final = ("fedtune", "fedtune_client")
"""Whose lines an operator may read; the root's handlers are those of whoever writes the log."""

_log = logging.getLogger(__name__)
_devices: dict[Path, Device] = {}


def client_app(home: Path) -> ClientApp:
    """The app of the site that lives in a folder; begins its presence and its metrics.

    Raises:
        DeploymentError: `client.toml` is not there or not right.
    """
    path = home.absolute()
    if path not in _devices:
        site = SiteHome(path)
        settings = site.settings()
        device = Device(site, settings, Coordinator(site, settings, is_insecure()))
        device.start()
        _devices[path] = device
    return make_answering_app(_devices[path].worker)


def begin(home: Path) -> None:
    """A task is about to be taken; what interrupted those before it does not count for it."""
    if device := _devices.get(home.absolute()):
        device.stop.begin()


def interrupt(home: Path, reason: str) -> None:
    """Have the task at hand stop before its next pass; its answer is an error with this reason."""
    if device := _devices.get(home.absolute()):
        device.stop.now(reason)


def close(home: Path) -> None:
    """End what `client_app` began, in about a second."""
    if device := _devices.pop(home.absolute(), None):
        device.close()


class Coordinator:
    """How a site reaches its coordinator beside Flower's link."""

    def __init__(self, home: SiteHome, settings: SiteSettings, insecure: bool = False) -> None:
        self._home, self._site, self._insecure = home, settings.site, insecure

    def channel(self) -> Any:  # grpc has no types
        """A channel to its gRPC service, with the site's token."""
        # Imported here: a site whose coordinator is never asked does without.
        from fedtune.deploy.channel import open_channel

        ca_pem = b"" if self._insecure else self._home.ca_certificate.read_bytes()
        return open_channel(self._site.service, ca_pem, self._token(), insecure=self._insecure)

    def http(self) -> httpx.Client:
        """A client of its link, for what is not Flower's there."""
        scheme = "http" if self._insecure else "https"
        verify: ssl.SSLContext | bool = True
        if not self._insecure:
            verify = ssl.create_default_context(cafile=str(self._home.ca_certificate))
        return httpx.Client(
            base_url=f"{scheme}://{self._site.server}",
            headers={"authorization": f"Bearer {self._token()}"},
            verify=verify,
            timeout=10.0,
            trust_env=False,  # no proxy, and no host but the coordinator
        )

    def fetch(self, digest: str, target: Path, progress: Progress) -> None:
        """Download a base model."""
        from fedtune.deploy.download import download

        channel = self.channel()
        try:
            download(channel, pb.ManifestRequest(base_digest=digest), target, progress)
        finally:
            channel.close()

    def _token(self) -> str:
        return self._home.token.read_text(encoding="ascii").strip()


class Device:
    """One site's machine, over all runs.

    Args:
        fetch: downloads a base; None: as `coordinator` does.
        readings: where the policy looks; None: at this machine.
    """

    def __init__(
        self,
        home: SiteHome,
        settings: SiteSettings,
        coordinator: Coordinator,
        fetch: Fetch | None = None,
        readings: Readings | None = None,
    ) -> None:
        self._home, self._settings, self._coordinator = home, settings, coordinator
        self.stop, self.board = Stop(), StandingBoard()
        self._traffic = TrafficDay(home.state)
        readings = readings or Readings(lambda: self._traffic.today().total)
        self.policy = Policy(home.policy_file, readings)
        digests = cache_folder() / "digests"
        wanted = fetch or coordinator.fetch
        folders = [home.path / Path(each).expanduser() for each in settings.base.folders]
        self._bases = Bases(
            folders, home.bases, wanted if settings.base.download else None, digests
        )
        self._lines = LogTail()
        self._presence = Presence(coordinator.channel, self.status, self.board, self.stop)
        gauges = Gauges(home.state / "metrics.prom")
        self._ticker = Ticker(lambda: gauges.write(self.board.now(), self._traffic.today()))
        self._agents: OrderedDict[tuple[str, str], Agent] = OrderedDict()
        self._machine: tuple[DeviceProfile, Idle] | None = None
        self._probing = threading.Lock()

    def start(self) -> None:
        """Begin presence, metrics and the first measurements."""
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._lines)
        self._presence.start()
        self._ticker.start()
        threading.Thread(target=self._know_link, name="link", daemon=True).start()
        with suppress(FedtuneError):  # whoever asks first is told
            self.machine()

    def close(self) -> None:
        """End the threads; work at hand stops before its next pass."""
        self.stop.now("the site's process ends")
        self._presence.close()
        self._ticker.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._lines)

    def worker(self, message: Message, context: Context) -> Worker:
        """Who answers a message.

        Raises:
            ProtocolError: its run is not one of fedtune's.
        """
        wait_s = max(0.0, min(_MOST_WAIT_S, message.metadata.ttl / 3))
        return DeployedWorker(self, read_site_task(context.run_config), wait_s)

    def agent(self, task: SiteTask, base_digest: str, wait_s: float) -> Agent:
        """The agent of a run and a base; made at its first message.

        Raises:
            ModelError: the base is not here.
            DataError: the site's rows cannot be read.
        """
        key = (task.model_dump_json(), base_digest)
        if key not in self._agents:
            profile, idle = self.machine()
            self.board.change(state="downloading")
            folder = self._bases.folder(base_digest, wait_s)
            self._agents[key] = self._made(task, folder, profile, idle)
        self._agents.move_to_end(key)
        while len(self._agents) > _MOST_AGENTS:
            self._agents.popitem(last=False)
        return self._agents[key]

    def machine(self) -> tuple[DeviceProfile, Idle]:
        """This machine, measured, and what the process held when it was ready for a base.

        Raises:
            MissingExtraError: what a device trains with is not installed.
        """
        if self._machine is None:
            for package in ("torch", "transformers"):
                if importlib.util.find_spec(package) is None:
                    raise MissingExtraError(package, "train", "a site that trains")
            from fedtune.train.idle import settle
            from fedtune_client.allowance import idle_now
            from fedtune_client.deployed_site import machine_profile

            settle()
            profile = machine_profile(self._settings, cache_folder() / "devices")
            self._machine = profile, idle_now()
        return self._machine

    def as_reported(self, profile: DeviceProfile) -> DeviceProfile:
        """A profile with what the policy leaves of its budget, and with the link as it is known."""
        ceiling = self.policy.settings().memory
        speed = self._know_link()
        profile = replace(profile, link_bytes_per_s=speed)
        if not ceiling or profile.budget_bytes <= ceiling:
            return profile
        if profile.accelerator == "cpu":
            return replace(profile, memory_bytes=ceiling)
        return replace(profile, accelerator_memory_bytes=ceiling)

    def status(self) -> pb.SiteStatus:
        """What the coordinator is told of this site."""
        now, traffic, link = self.board.now(), self._traffic.today(), known_link(self._home.state)
        return pb.SiteStatus(
            state=now.state,
            run=now.run,
            round=now.round,
            step=now.step,
            steps=now.steps,
            memory_bytes=resident_bytes() or 0,
            memory_allowed_bytes=now.allowed_bytes,
            bytes_down_today=traffic.down,
            bytes_up_today=traffic.up,
            link_down_bytes_per_s=link.down_bytes_per_s,
            link_up_bytes_per_s=link.up_bytes_per_s,
            last_refusal=now.last_refusal,
            log_lines=self._lines.take() if self._shares_logs() else (),
            versions=package_versions(),
            device=self._words(),
        )

    @property
    def downloading(self) -> bool:
        return self._bases.downloading

    def _made(self, task: SiteTask, folder: Path, profile: DeviceProfile, idle: Idle) -> Agent:
        from fedtune.train.allocator import keep_freed_memory
        from fedtune_client.agent import Agent
        from fedtune_client.deployed_site import site_settings
        from fedtune_client.round_states import prune_runs

        if task.tune_allocator:
            keep_freed_memory()
        settings = site_settings(
            self._home, self._settings, task, folder, profile, idle, cache_folder()
        )
        if settings.state_folder is not None:
            prune_runs(settings.state_folder.parent, settings.state_folder)
        return Agent(settings, _RunWatch(self.stop, self.board, task.name))

    def _know_link(self) -> float:
        """Bytes per second of the slower way, measured now if nobody has; 0: not known."""
        with self._probing:
            found = known_link(self._home.state)
            if found.slower:
                return found.slower
            try:
                with self._coordinator.http() as client:
                    return probe_link(client, self._home.state).slower
            except (OSError, ValueError) as error:  # the CA or the token cannot be read
                _log.warning("the link cannot be measured: %s", error)
                return 0.0

    def _shares_logs(self) -> bool:
        try:
            return self.policy.settings().share_logs
        except PolicyError:
            return False

    def _words(self) -> str:
        accelerator = "" if self._machine is None else self._machine[0].accelerator
        return f"{processor_name()}, {accelerator}" if accelerator == "cuda" else processor_name()


class _RunWatch:
    """Watches an agent: the loop asks it before each pass, and tells it of each step."""

    def __init__(self, stop: Stop, board: StandingBoard, run: str) -> None:
        self._stop, self._board, self._run = stop, board, run

    def check(self) -> None:
        self._stop.check(self._run)

    def step(self, done: int) -> None:
        self._board.change(step=done)
        self._stop.check(self._run)


class DeployedWorker:
    """Answers one message of one run; see `fedtune_client.answering.Worker`.

    Every method raises PolicyError where the site does not accept the work, StoppedError where the
    run was stopped, and what the agent raises.
    """

    def __init__(self, device: Device, task: SiteTask, wait_s: float) -> None:
        self._device, self._task, self._wait_s = device, task, wait_s

    def describe(self, spec: TaskSpec) -> SiteReport:
        """The site's profile, within its policy."""
        with self._work("waiting", Asked(self._task.name, spec.base_digest)):
            report = self._agent(spec.base_digest, "waiting").describe(spec)
            return replace(report, profile=self._device.as_reported(report.profile))

    def calibrate(
        self, order: CalibrationInstruction, packed: bytes
    ) -> tuple[CalibrationReport, bytes]:
        """What a plan is made from."""
        asked = Asked(self._task.name, order.base_digest, order.plan.peak_bytes)
        with self._work("evaluating", asked):
            return self._agent(order.base_digest, "evaluating").calibrate(order, packed)

    def train(self, order: TrainInstruction, packed: bytes) -> tuple[TrainReport, bytes]:
        """One round."""
        plan = order.plan
        asked = Asked(self._task.name, order.base_digest, plan.peak_bytes, plan.local_steps)
        with self._work("training", asked, order.round):
            answer = self._agent(order.base_digest, "training").train(order, packed)
        board = self._device.board
        board.change(rounds_done=board.now().rounds_done + 1)
        return answer

    def evaluate(self, order: EvaluateInstruction, packed: bytes) -> EvaluateReport:
        """Held-out loss."""
        asked = Asked(self._task.name, order.base_digest, order.plan.peak_bytes)
        with self._work("evaluating", asked, order.round):
            return self._agent(order.base_digest, "evaluating").evaluate(order, packed)

    def _agent(self, base_digest: str, state: State) -> Agent:
        agent = self._device.agent(self._task, base_digest, self._wait_s)
        self._device.board.change(state=state, allowed_bytes=agent.allowed_bytes)
        return agent

    @contextmanager
    def _work(self, state: State, asked: Asked, round: int = 0) -> Iterator[None]:
        """Ask the policy first, and have the site's standing say what goes on."""
        device, board = self._device, self._device.board
        board.change(state=state, run=asked.run, round=round, step=0, steps=asked.steps)
        after: State = "idle"
        try:
            device.stop.check(asked.run)
            device.policy.check(asked)
            yield
        except StoppedError as error:
            _log.info("%s", error)
            raise
        except FedtuneError as error:
            after = "downloading" if device.downloading else "refusing"
            _log.warning("refused: %s", error)
            refusals = board.now().refusals + 1
            board.change(last_refusal=str(error), refusals=refusals)
            raise
        finally:
            board.change(state=after, run="" if after == "idle" else asked.run)
