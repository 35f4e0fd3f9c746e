"""How an order to stop reaches the training loop: it looks before each of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from fedtune.errors import StoppedError


class Watch(Protocol):
    """Who watches an agent at work."""

    def check(self) -> None:
        """Before each pass; raises to stop the work."""
        ...

    def step(self, done: int) -> None:
        """So many optimiser steps of the round are done; raises to stop the work."""
        ...


class _Unwatched:
    def check(self) -> None:
        return

    def step(self, done: int) -> None:
        return


UNWATCHED: Final[Watch] = _Unwatched()
"""Of an agent that nobody watches, as in a simulation."""


class Stop:
    """Whether the work at hand is still wanted; safe to use from several threads, and in signals.

    Work that is stopped raises in its own thread, at a place where nothing is half done: what a
    device carries from round to round is written after its last step alone.

    There is no lock, because a signal may come while the thread that it interrupts holds one: each
    attribute is replaced as a whole.
    """

    def __init__(self) -> None:
        self._runs: frozenset[str] = frozenset()
        self._reason = ""

    def order(self, runs: Iterable[str]) -> None:
        """Take the coordinator's whole list of runs to work for no longer."""
        self._runs = frozenset(runs)

    def now(self, reason: str) -> None:
        """Stop the work at hand, whatever run it is for."""
        self._reason = reason

    def begin(self) -> None:
        """New work is about to be taken; what stopped the work before does not count for it.

        To be called before anybody can say that the new work is gone: after that, an order to
        stop it would be lost.
        """
        self._reason = ""

    def check(self, run: str) -> None:
        """Go on, or not.

        Raises:
            StoppedError: the run is on the coordinator's list, or the work at hand was stopped.
        """
        reason = self._reason
        if reason:
            raise StoppedError(f"{run}: stopped: {reason}")
        if run in self._runs:
            raise StoppedError(f"{run}: the operator has stopped this run")
