"""A site's stream to the coordinator: its standing out, orders to stop in.

Training never waits for it: it has a thread of its own, and what cannot be sent is dropped.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from fedtune.deploy.channel import spoken as in_words
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import SiteServiceStub
from fedtune_client.standing import StandingBoard
from fedtune_client.stopping import Stop

PERIOD_S: Final = 5.0
"""Longest time between two reports."""
_LEAST_S: Final = 0.5
"""Shortest time between two reports, however often the standing changes."""
_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 30.0
_MOST_RUNS: Final = 10_000
"""Names that one order may hold."""

_log = logging.getLogger(__name__)


class Presence:
    """Keeps a site's stream to its coordinator open.

    Args:
        connect: makes a channel with the site's token; nothing is sent before the first call.
        status: what to tell now.
        board: whose changes are told at once.
        stop: takes the orders.
    """

    def __init__(
        self,
        connect: Callable[[], Any],  # grpc has no types
        status: Callable[[], pb.SiteStatus],
        board: StandingBoard,
        stop: Stop,
        period_s: float = PERIOD_S,
    ) -> None:
        self._connect, self._status, self._board, self._stop = connect, status, board, stop
        self._period_s = period_s
        self._ending = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Begin; comes back at once."""
        self._thread.start()

    def close(self, wait_s: float = 1.0) -> None:
        """End the stream and its thread."""
        self._ending.set()
        call = self._call
        if call is not None:
            call.cancel()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        pause_s, spoken = _FIRST_RETRY_S, ""
        while not self._ending.is_set():
            try:
                if self._connected():
                    pause_s, spoken = _FIRST_RETRY_S, ""
            except grpc.RpcError as error:
                reason = str(in_words(error))
                # The same words once, not every half minute for weeks.
                if reason != spoken and not self._ending.is_set():
                    _log.warning("no presence at the coordinator: %s", reason[:500])
                spoken = reason
            except (OSError, ValueError) as error:  # the CA or the token cannot be read
                _log.warning("no presence at the coordinator: %s", error)
            finally:
                # An old list says nothing of a run that was resumed meanwhile.
                self._stop.order(())
            self._ending.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LAST_RETRY_S)

    def _connected(self) -> bool:
        """One stream, until it ends; whether the coordinator said something on it."""
        heard = False
        channel = self._connect()
        over = threading.Event()
        try:
            self._call = SiteServiceStub(channel).Connect(  # type: ignore[no-untyped-call]  # generated
                self._reports(over)
            )
            for order in self._call:
                heard = True
                self._stop.order(order.stopped_runs[:_MOST_RUNS])
        except grpc.RpcError:
            if not heard:
                raise
        finally:
            over.set()
            self._board.change()  # wakes the thread that waits to report
            self._call = None
            channel.close()
        return heard

    def _reports(self, over: threading.Event) -> Iterator[pb.SiteStatus]:
        version = -1
        while not (over.is_set() or self._ending.is_set()):
            yield self._status()
            if self._ending.wait(_LEAST_S):
                return
            version = self._board.wait(version, self._period_s)
