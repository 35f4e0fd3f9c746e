"""`python -m fedtune_client.node HOME`: Flower's node of a site, which survives what links do.

It goes on over failed requests and heartbeats, signs by the coordinator's clock, counts what it
sends and receives, and ends with its reason where the coordinator refuses it for good. Its
executor reaches it on loopback, with a secret that other users of the machine cannot read.
"""

from __future__ import annotations

import argparse
import hmac
import logging
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.exit_codes import EXIT_CONFIG, EXIT_RESTART, EXIT_WANTED
from fedtune.deploy.flower_process import (
    leave,
    start_log,
    talk_to_the_coordinator_alone,
)
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.memory import return_freed_memory
from fedtune.errors import DeploymentError
from fedtune_client.executor_secret import executor_secret
from fedtune_client.link_state import LinkState

if TYPE_CHECKING:
    import httpx

REFUSAL_HEADER = "fedtune-refusal"
SESSION_HEADER = "fedtune-session"
POLL_HEADER = "fedtune-poll"
FLOWERS_POLL_S, LEAST_POLL_S, MOST_POLL_S = 3.0, 0.5, 60.0
_FINAL = ("site", "superseded")
"""Refusals after which asking again is of no use."""

_log = logging.getLogger("fedtune.node")


def main(arguments: Sequence[str]) -> None:
    """The process; it never returns."""
    parser = argparse.ArgumentParser("python -m fedtune_client.node", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--insecure", action="store_true", help="plaintext")
    options = parser.parse_args(arguments)
    return_freed_memory()
    home = SiteHome(options.home)
    talk_to_the_coordinator_alone(home.state / "flower")
    start_log("node", home.logs)
    try:
        run(home, insecure=options.insecure)
    except DeploymentError as error:
        _log.error("%s", error)
        leave(EXIT_CONFIG)


def run(home: SiteHome, *, insecure: bool = False) -> None:
    """Be the site's node until SIGTERM; ends the process.

    Raises:
        DeploymentError: the home is not complete.
    """
    settings = home.settings().site
    for path in (home.node_key, *(() if insecure else (home.ca_certificate,))):
        if not path.is_file():
            raise DeploymentError(f"{path} is missing; make it with: fedtune client join")
    secret = executor_secret(home.state)
    from fedtune.flwr_compat import (
        correct_clock,
        expire_tasks_of_a_lost_executor,
        forget_messages_of_ended_runs,
        guard_node_app,
        run_node,
        watch_node_requests,
    )

    start_log("node", home.logs)
    link = LinkState(home.state)
    correct_clock(lambda: link.clock_offset_s)
    watch = Watch(link)
    watch_node_requests(watch)
    expire_tasks_of_a_lost_executor(_begin_anew)
    forget_messages_of_ended_runs()
    guard_node_app(lambda app: ExecutorDoor(app, secret))
    ca = None if insecure else str(home.ca_certificate)
    if insecure:
        _log.warning("--insecure: this site speaks plaintext; anybody on the way can read it")
    measure_clock(settings.server, ca, link)
    code = EXIT_RESTART
    try:
        run_node(
            [
                *("--superlink", settings.server),
                *(("--root-certificates", ca) if ca else ()),
                *("--auth-supernode-private-key", str(home.node_key)),
                *("--host", "127.0.0.1", "--port", str(settings.node_port)),
                *("--isolation", "process"),
            ],
            plaintext=insecure,
            poll_s=lambda: watch.poll_s,
        )
        _log.warning("Flower's loop has ended; asking to be started again")
    except SystemExit as end:
        code = EXIT_WANTED if end.code in (0, None) else EXIT_RESTART
    except Exception:  # noqa: BLE001  the edge of a process, logged in full
        _log.exception("Flower's node raised; asking to be started again")
    leave(code)


def _begin_anew() -> None:
    """A node that is started again is activated again, and its coordinator asks it again."""
    _log.warning("the executor died amid its reply; asking to be started again")
    leave(EXIT_RESTART)


def measure_clock(server: str, ca_certificate: str | None, link: LinkState) -> None:
    """Ask the coordinator for the time before anything is signed; without an answer, go on.

    Args:
        ca_certificate: path; None: plaintext.
    """
    import ssl

    import httpx

    url = f"{'https' if ca_certificate else 'http'}://{server}/health"
    verify = ssl.create_default_context(cafile=ca_certificate) if ca_certificate else True
    started = time.monotonic()
    try:
        with httpx.Client(verify=verify, timeout=10.0, trust_env=False) as client:
            client.get(url)  # opens the connection
            started = time.monotonic()
            answer = client.get(url)
    except httpx.HTTPError as error:
        _log.warning("the coordinator at %s does not answer yet (%s)", server, error)
        return
    link.coordinator_says(answer.headers.get("date", ""), time.monotonic() - started)


class Watch:
    """Stands around every request of the node: counts, reads the time, ends on a final refusal.

    Attributes:
        poll_s: seconds between two questions for a message, as the coordinator wants it.
    """

    def __init__(self, link: LinkState, end: Callable[[int], object] = leave) -> None:
        self._link = link
        self._end = end
        self._session = secrets.token_hex(8)
        self.poll_s = FLOWERS_POLL_S

    def __call__(
        self, request: httpx.Request, send: Callable[[], httpx.Response]
    ) -> httpx.Response:
        request.headers[SESSION_HEADER] = self._session
        started = time.monotonic()
        answer = send()
        seconds = time.monotonic() - started
        self._link.coordinator_says(answer.headers.get("date", ""), seconds)
        self.poll_s = wanted_poll_s(answer.headers.get(POLL_HEADER, ""), self.poll_s)
        self._link.exchanged(len(request.content), _size(answer), seconds)
        if answer.status_code in (401, 403):
            self._refused(answer)
        return answer

    def _refused(self, answer: httpx.Response) -> None:
        """Flower takes 403 for the end of a run and 401 for a wanted end; these are neither."""
        reason = answer.read().decode("utf-8", "replace")[:500]
        if answer.headers.get(REFUSAL_HEADER) in _FINAL:
            _log.error("the coordinator refuses this site: %s", reason)
            self._end(EXIT_CONFIG)
        elif answer.status_code == 401:
            _log.error("the coordinator does not know this node any more: %s", reason)
            self._end(EXIT_RESTART)


def wanted_poll_s(text: str, before: float) -> float:
    """How often to ask, by what an answer says; what it had been, if it says nothing of use."""
    try:
        found = float(text)
    except ValueError:
        return before
    return min(MOST_POLL_S, max(LEAST_POLL_S, found)) if found == found else before


def _size(answer: httpx.Response) -> int:
    text = answer.headers.get("content-length", "0")
    return int(text) if text.isdigit() else 0


class ExecutorDoor:
    """The app that a node serves on loopback, for whoever knows the secret."""

    def __init__(self, app: Any, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, self._expected):
                start = {"type": "http.response.start", "status": 401, "headers": []}
                await send(start)
                await send({"type": "http.response.body", "body": b"the executor's secret, please"})
                return
        await self._app(scope, receive, send)


if __name__ == "__main__":
    main(sys.argv[1:])
