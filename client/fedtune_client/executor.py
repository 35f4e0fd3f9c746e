"""`python -m fedtune_client.executor HOME`: does the site's work, one message after another, warm.

Flower starts a new process per message, which imports torch and loads the base anew. This one
stays, with its base loaded; and it runs the installed app, never what came with a run. A failure
becomes an error reply. When the process itself dies, its node says so for it, as soon as the next
executor asks for work (`expire_tasks_of_a_lost_executor`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.exit_codes import EXIT_CONFIG, EXIT_RESTART, EXIT_WANTED
from fedtune.deploy.flower_process import (
    leave,
    start_log,
    talk_to_the_coordinator_alone,
)
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.site_task import read_site_task
from fedtune.errors import DeploymentError, FedtuneError
from fedtune_client.executor_secret import executor_secret
from fedtune_client.link_state import read_link_state

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from fedtune.flwr_compat import TaskSource

APP = "fedtune_client.deployed"
GROUP_APP = "fedtune_client.group"
"""Of a site that stands for a coordinator's sites."""
POLL_S = 0.3
MOST_WAIT_S = 5.0
LAST_REPLY_S = 15.0
"""From the end of memory to the end of the process: time for its last reply."""
STOP_S = 3.5
"""From SIGTERM to the end of the process, whatever the app does."""

_STOPPING = "the site's executor is being stopped"
_log = logging.getLogger("fedtune.executor")


@dataclass(frozen=True, slots=True)
class App:
    """What an installed module of a site offers.

    Attributes:
        handle: a ClientApp.
        begin: a task is about to be taken; what interrupted those before does not count for it.
        interrupt: makes the work at hand raise before its next step; may be called any time.
        close: ends what runs beside the work.
    """

    handle: Callable[[Any, Any], Any]
    begin: Callable[[], None]
    interrupt: Callable[[str], None]
    close: Callable[[], None]


def main(arguments: Sequence[str]) -> None:
    """The process; it never returns."""
    parser = argparse.ArgumentParser("python -m fedtune_client.executor", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--app", help=f"installed module with client_app(home); {APP}")
    parser.add_argument("--insecure", action="store_true", help="for the app; see the node")
    options = parser.parse_args(arguments)
    home = SiteHome(options.home)
    talk_to_the_coordinator_alone(home.state / "flower")
    start_log("executor", home.logs)
    try:
        settings = home.settings()
        secret = executor_secret(home.state)
        usual = GROUP_APP if settings.group.coordinator else APP
        app = load(options.app or usual, home.path)
    except FedtuneError as error:
        _log.error("%s", error)
        leave(EXIT_CONFIG)
        return
    start_log("executor", home.logs)
    worker = Executor(f"127.0.0.1:{settings.site.node_port}", secret, app, home.state)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, lambda *_: worker.stop())
    code = worker.run()
    app.close()
    leave(code)


def end_within(seconds: float) -> None:
    """Have the system end this process, whatever it waits for.

    Without memory a thread may not come to its start, and who started it waits for that. Windows
    has no such timer.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, which nobody handles


def load(module_name: str, home: Path) -> App:
    """The app of an installed module: `client_app(home)`, and the rest of `App` where it has it.

    Raises:
        DeploymentError: there is no such module or function.
    """
    try:
        module = importlib.import_module(module_name)
        handle = module.client_app(home)
    except (ImportError, AttributeError) as error:
        raise DeploymentError(
            f"expected an installed module {module_name} with client_app(home); {error}"
        ) from error

    def call(name: str, *more: str) -> None:
        if (function := getattr(module, name, None)) is not None:
            function(home, *more)

    return App(
        handle,
        lambda: call("begin"),
        lambda reason: call("interrupt", reason),
        lambda: call("close"),
    )


class Executor:
    """Asks a node for work and does it, until it is told to stop.

    Args:
        address: HOST:PORT of the node.
        state: the site's state folder, where the node says how wrong this machine's clock is.
    """

    def __init__(
        self, address: str, secret: str, app: App, state: Path, most_wait_s: float = MOST_WAIT_S
    ) -> None:
        self._address = address
        self._secret = secret
        self._app = app
        self._state = state
        self._most_wait_s = most_wait_s
        self._stopping = threading.Event()
        self._wait_s = POLL_S
        self._clock_offset_s = 0.0
        self._code = EXIT_WANTED

    def stop(self) -> None:
        """End soon: the work at hand is interrupted, and the process ends even if that fails."""
        if not self._stopping.is_set():
            self._stopping.set()
            threading.Thread(target=self._end_late, daemon=True).start()
            self._app.interrupt(_STOPPING)

    def run(self) -> int:
        """Work; returns the exit code that the process should end with."""
        from fedtune.flwr_compat import TaskSource, correct_clock

        correct_clock(lambda: self._clock_offset_s)
        source = TaskSource("client", self._address, None, self._secret)
        _log.info("waiting for work from the node at %s", self._address)
        while not self._stopping.is_set():
            if not self._step(source):
                self._stopping.wait(self._wait_s)
        source.close()
        return self._code

    def _step(self, source: TaskSource) -> bool:
        """Ask for a task and do it; False: there is none."""
        import httpx

        try:
            found = source.acquire()
        except httpx.HTTPError as error:
            if self._wait_s == POLL_S:
                _log.warning("the node is not there (%s); waiting for it", error)
            self._wait_s = min(self._most_wait_s, 2 * self._wait_s)
            return False
        if self._wait_s > POLL_S:
            _log.info("the node is there")
        self._wait_s = POLL_S
        if found is None:
            return False
        try:
            self._work(found[0])
        except (httpx.HTTPError, RuntimeError) as error:  # the node went away, and the task with it
            _log.error("the task is lost, its node does not answer as it should: %s", error)
        return True

    def _work(self, task_token: str) -> None:
        from fedtune.flwr_compat import ClientTask

        self._clock_offset_s = read_link_state(self._state)["clock_offset_s"]
        # Before anybody can say that the task is gone: what comes from now on is meant for it.
        self._app.begin()
        if self._stopping.is_set():  # the signal came while the task was acquired
            self._app.interrupt(_STOPPING)
        task = ClientTask(self._address, self._secret, task_token, self._gone)
        try:
            message, context = task.receive()
            started = time.monotonic()
            reply = self._reply(message, context)
            task.reply(reply)
            fields = {
                "kind": message.metadata.message_type,
                "round": message.metadata.group_id,
                "seconds": round(time.monotonic() - started, 3),
                "failed": reply.has_error(),
            }
            _log.info("did %s", fields["kind"], extra={"fields": fields})
        finally:
            task.close()

    def _reply(self, message: Message, context: Context) -> Message:
        """What the app answers; whatever it raises becomes an error reply."""
        from fedtune.flwr_compat import error_reply

        try:
            read_site_task(context.run_config)
            reply: Message = self._app.handle(message, context)
        except FedtuneError as error:
            _log.warning("refused %s: %s", message.metadata.message_type, error)
            return error_reply(message, error)
        except MemoryError as error:
            end_within(LAST_REPLY_S)
            _log.exception("out of memory; asking to be started again")
            self._code = EXIT_RESTART
            self._stopping.set()
            return error_reply(message, error)
        except Exception as error:  # noqa: BLE001  any failure of an app becomes a reply
            _log.exception("%s failed", message.metadata.message_type)
            return error_reply(message, error)
        return reply

    def _gone(self) -> None:
        """The node has forgotten the task: its reply would go nowhere."""
        _log.warning("the node has given this task up; stopping the work")
        self._app.interrupt("the coordinator no longer waits for it")

    def _end_late(self) -> None:
        time.sleep(STOP_S)
        leave(self._code)


if __name__ == "__main__":
    main(sys.argv[1:])
