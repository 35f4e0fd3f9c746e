"""What a site's own policy says to a piece of work, before the work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from fedtune.deploy.policy_file import WEEKDAYS, PolicySettings, minutes, read_policy
from fedtune.errors import PolicyError
from fedtune_client.battery import Battery, battery, temperature_c


@dataclass(frozen=True, slots=True)
class Readings:
    """Where a policy looks at the machine.

    Attributes:
        now: local time.
        bytes_today: exchanged with the coordinator since midnight.
    """

    bytes_today: Callable[[], int]
    now: Callable[[], datetime] = datetime.now
    battery: Callable[[], Battery | None] = battery
    temperature_c: Callable[[], float | None] = temperature_c


@dataclass(frozen=True, slots=True)
class Asked:
    """A piece of work, as a policy sees it.

    Attributes:
        run: the run's name.
        peak_bytes: memory that its plan takes; 0: it has none yet.
        steps: optimiser steps; 0: none.
    """

    run: str
    base_digest: str
    peak_bytes: int = 0
    steps: int = 0


@dataclass(slots=True)
class Policy:
    """A site's `policy.toml`, read again whenever it has changed."""

    path: Path
    readings: Readings
    _state: tuple[int, int, int] | None = field(default=None, init=False)
    _held: PolicySettings | PolicyError | None = field(default=None, init=False)

    def settings(self) -> PolicySettings:
        """What the file says now.

        Raises:
            PolicyError: it is not there or not right.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            self._held = None
            raise PolicyError(
                f"{self.path.name} cannot be read ({error.strerror}), so this site accepts nothing"
            ) from None
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._held is None or state != self._state:
            try:
                self._held = read_policy(self.path)
            except PolicyError as error:
                self._held = error
            self._state = state
        if isinstance(self._held, PolicyError):
            raise PolicyError(str(self._held))
        return self._held

    def check(self, asked: Asked) -> PolicySettings:
        """Allow a piece of work; returns what the policy says.

        Raises:
            PolicyError: it is not allowed, or not now.
        """
        policy = self.settings()
        reason = next(self._refusals(policy, asked), None)
        if reason is not None:
            raise PolicyError(f"this site's policy: {reason}")
        return policy

    def _refusals(self, policy: PolicySettings, asked: Asked) -> Iterator[str]:
        if not any(fnmatchcase(asked.run, pattern) for pattern in policy.allowed_runs):
            allowed = ", ".join(policy.allowed_runs) or "none"
            yield f"run {asked.run} is not one of allowed_runs ({allowed})"
        digests = policy.allowed_base_digests
        if digests and asked.base_digest not in digests:
            yield f"base {asked.base_digest[:12]} is not one of allowed_base_digests"
        if policy.max_steps and asked.steps > policy.max_steps:
            yield f"at most {policy.max_steps} steps in a round, the plan has {asked.steps}"
        if policy.memory and asked.peak_bytes > policy.memory:
            yield (
                f"memory for a plan is {policy.memory} bytes, this one needs {asked.peak_bytes}; "
                "plan again"
            )
        yield from _time_refusals(policy, self.readings.now())
        yield from self._machine_refusals(policy)

    def _machine_refusals(self, policy: PolicySettings) -> Iterator[str]:
        if policy.on_mains_only or policy.minimum_battery_percent:
            found = self.readings.battery()
            if found is not None and policy.on_mains_only and found.on_mains is False:
                yield "on_mains_only, found this machine on its battery; try again when it charges"
            if found is not None and found.percent < policy.minimum_battery_percent:
                yield (
                    f"minimum_battery_percent is {policy.minimum_battery_percent:g}, found "
                    f"{found.percent:.0f}; try again when it has charged"
                )
        if policy.maximum_temperature_c:
            hottest = self.readings.temperature_c()
            if hottest is not None and hottest > policy.maximum_temperature_c:
                yield (
                    f"maximum_temperature_c is {policy.maximum_temperature_c:g}, found "
                    f"{hottest:.0f}; try again when it has cooled down"
                )
        if policy.max_bytes_per_day:
            spent = self.readings.bytes_today()
            if spent >= policy.max_bytes_per_day:
                yield (
                    f"max_bytes_per_day is {policy.max_bytes_per_day}, found {spent} today; try "
                    "again after midnight of this site"
                )


def _time_refusals(policy: PolicySettings, now: datetime) -> Iterator[str]:
    if _open_at(policy, now):
        return
    allowed = ", ".join([*policy.weekdays, *policy.hours])
    opens = _next_opening(policy, now)
    when = "" if opens is None else f"; try again at {opens:%Y-%m-%d %H:%M} of its clock"
    found = f"{WEEKDAYS[now.weekday()]} {now:%H:%M}"
    yield f"it works at {allowed}, found {found} there{when}"


def _open_at(policy: PolicySettings, moment: datetime) -> bool:
    if policy.weekdays and WEEKDAYS[moment.weekday()] not in policy.weekdays:
        return False
    return not policy.hours or any(_within(each, moment) for each in policy.hours)


def _within(hours: str, moment: datetime) -> bool:
    first, last = (minutes(each) for each in hours.split("-"))
    at = moment.hour * 60 + moment.minute
    return first <= at < last if first <= last else at >= first or at < last


def _next_opening(policy: PolicySettings, now: datetime) -> datetime | None:
    """The first beginning of allowed hours, or of an allowed day, in the coming week."""
    starts = sorted({0, *(minutes(each.partition("-")[0]) for each in policy.hours)})
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    moments = (
        midnight + timedelta(days=days, minutes=start) for days in range(9) for start in starts
    )
    return next((each for each in moments if each > now and _open_at(policy, each)), None)
