"""Plan devices anew, between rounds, when they are not what their plans took them for.

`fedtune_server.drift` says which devices, and what is held true of them now: slower or faster by a
factor, or with less or more memory. The whole fleet is then planned once more, since its aims are
common; but only the devices that gave a reason take their new plan. The others keep theirs, unless
ranks would no longer nest.

A new plan that changes what a device does is one ledger line. One that corrects only what is
predicted of it is taken without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fedtune.errors import PlanError
from fedtune.export.quantities import bytes_text, seconds_text
from fedtune.records import DevicePlan, DeviceProfile, Event, FleetPlan, ModelShapes
from fedtune_server.drift import (
    LONGEST_REST,
    SETTLED_ROUNDS,
    Finding,
    Standing,
    judge,
    lowered,
    planned_step_seconds,
    reading,
)
from fedtune_server.plan_change import PlanChange, plan_change
from fedtune_server.state import Held

Solve = Callable[[Sequence[DeviceProfile]], FleetPlan]
"""Plans the whole fleet; raises PlanError where a device can carry no plan."""


@dataclass(frozen=True, slots=True)
class Due:
    """A device to plan anew: what was held true of it before, and why that no longer stands."""

    profile: DeviceProfile
    standing: Standing
    finding: Finding
    reason: str


class Replanner:
    """Holds the plans in force of a run's devices.

    Args:
        profiles: of all devices, as they reported before the first round.
        plan: the one of the first round.
        solve: plans the whole fleet as it was planned first.
        threshold: share by which the measured seconds of a step may differ from the planned.
        reports: whether what devices measure counts; False: only that they refused a plan.
        emit: told of every new plan.
    """

    def __init__(
        self,
        profiles: Sequence[DeviceProfile],
        plan: FleetPlan,
        solve: Solve,
        shapes: ModelShapes,
        threshold: float,
        reports: bool,
        emit: Callable[[Event], None],
    ) -> None:
        self._profiles = {profile.name: profile for profile in profiles}
        self._own_bytes = {profile.name: profile.budget_bytes for profile in profiles}
        self._standings = {name: Standing(own) for name, own in self._own_bytes.items()}
        self._plans = plan.by_device()
        self._hopeless = dict.fromkeys(self._profiles, 0.0)
        self._solve, self._shapes, self._threshold = solve, shapes, threshold
        self._reports, self._emit = reports, emit

    @property
    def held(self) -> Mapping[str, Held]:
        """Device -> what is held true of it, to go on from with `go_on`."""
        return {
            name: Held(profile, self._standings[name], self._hopeless[name])
            for name, profile in self._profiles.items()
        }

    def go_on(self, plans: Mapping[str, DevicePlan], held: Mapping[str, Held]) -> None:
        """Take the place of a replanner that had these plans in force, and held this true."""
        self._plans = dict(plans)
        self._profiles = {name: each.profile for name, each in held.items()}
        self._standings = {name: each.standing for name, each in held.items()}
        self._hopeless = {name: each.hopeless_bytes for name, each in held.items()}

    def admit(self, round: int, profile: DeviceProfile, solve: Solve) -> None:
        """Plan a device that joins, with the others; they keep their plans if ranks still nest.

        Args:
            round: the last that was played.
            solve: plans the whole fleet, the newcomer among them.

        Raises:
            PlanError: it can carry no plan; nothing has changed then.
        """
        name, own = profile.name, profile.budget_bytes
        standing = Standing(own)
        solve([held_profile(profile, standing)])  # alone first: the error is then the newcomer's
        before = (self._solve, self._profiles, self._standings)
        self._solve = solve
        self._profiles = dict(sorted((self._profiles | {name: profile}).items()))
        self._standings = self._standings | {name: standing}
        try:
            fleet = solve(self._held()).by_device()
        except PlanError:
            self._solve, self._profiles, self._standings = before
            raise
        self._own_bytes[name], self._hopeless[name] = own, 0.0
        plans = dict(sorted((self._plans | {name: fleet[name]}).items()))
        moved = fleet if ranks_nest(fleet.values()) and not ranks_nest(plans.values()) else {}
        self._plans = plans
        for other in sorted(moved.keys() - {name}):
            self._replace(round, other, fleet[other], self._follower(other, [name]))

    def _replace(self, round: int, name: str, plan: DevicePlan, why: Due) -> None:
        before, self._plans[name] = self._plans[name], plan
        self._hopeless[name] = 0.0
        change = plan_change(before, plan, self._profiles[name], self._shapes)
        if change:
            self._emit(_replanned(round, name, why, change))

    @property
    def plans(self) -> Mapping[str, DevicePlan]:
        """Device -> the plan that it follows from now on."""
        return self._plans

    def after_round(
        self,
        round: int,
        metrics: Mapping[str, Mapping[str, float]],
        refused: Mapping[str, DeviceProfile],
    ) -> None:
        """Take a round's reports into account, and plan anew whom they ask for.

        Args:
            metrics: device -> what it measured.
            refused: devices that refused their plan -> what they say of themselves now.
        """
        due = {
            name: found
            for name, said in sorted(metrics.items())
            if self._reports and (found := self._judged(name, round, said)) is not None
        }
        for name, profile in sorted(refused.items()):
            if (found := self._refused(name, round, profile)) is not None:
                due[name] = found
        if due:
            self._plan_anew(round, due)

    def _judged(self, name: str, round: int, metrics: Mapping[str, float]) -> Due | None:
        plan = self._plans[name]
        standing, finding = judge(
            self._standings[name],
            reading(metrics),
            round=round,
            peak_bytes=plan.peak_bytes,
            step_seconds=planned_step_seconds(plan, self._profiles[name]),
            own_bytes=self._own_bytes[name],
            threshold=self._threshold,
        )
        if finding is None:
            self._standings[name] = standing
            return None
        return self._due(name, standing, finding, _words(finding))

    def _refused(self, name: str, round: int, profile: DeviceProfile) -> Due | None:
        """Take over what a device says of itself, if that explains why it refused its plan."""
        standing, plan = self._standings[name], self._plans[name]
        missing = sorted({m.format for m in plan.matrices} - set(profile.formats))
        allowed = profile.budget_bytes
        finding = Finding("refusal", allowed, plan.peak_bytes)
        words = f"it refused its plan: it does not run {', '.join(missing)} any more"
        if allowed < plan.peak_bytes:
            standing, finding = lowered(standing, allowed, "refusal", round, plan.peak_bytes)
            words = _words(finding)
        elif not missing:
            return None
        profile = replace(profile, device_class=self._profiles[name].device_class)
        return self._due(name, standing, finding, words, profile)

    def _due(
        self,
        name: str,
        standing: Standing,
        finding: Finding,
        reason: str,
        profile: DeviceProfile | None = None,
    ) -> Due | None:
        """Hold a finding true; None if a plan for it has been looked for in vain."""
        if finding.cause != "time" and finding.measured <= self._hopeless[name]:
            return None
        due = Due(self._profiles[name], self._standings[name], finding, reason)
        self._standings[name] = standing
        self._profiles[name] = profile or self._profiles[name]
        return due

    def _plan_anew(self, round: int, due: dict[str, Due]) -> None:
        try:
            solved = self._solve(self._held())
        except PlanError:
            due = self._possible(round, due)
            if not due:
                return
            solved = self._solve(self._held())
        fleet = solved.by_device()
        mixed = self._plans | {name: fleet[name] for name in due}
        if ranks_nest(fleet.values()) and not ranks_nest(mixed.values()):
            due = due | {name: self._follower(name, due) for name in fleet.keys() - due.keys()}
        for name, why in sorted(due.items()):
            self._replace(round, name, fleet[name], why)

    def _follower(self, name: str, due: Collection[str]) -> Due:
        """A device that is planned anew only because others are."""
        plan = self._plans[name]
        reason = f"ranks would no longer nest with those of {', '.join(due)}"
        finding = Finding("fleet", plan.seconds, plan.seconds)
        return Due(self._profiles[name], self._standings[name], finding, reason)

    def _possible(self, round: int, due: Mapping[str, Due]) -> dict[str, Due]:
        """Those that can carry a plan; the others keep theirs and rest, and one line says so."""
        possible = {}
        for name, why in due.items():
            try:
                self._solve(self._held([name]))
            except PlanError as error:
                self._profiles[name] = why.profile
                self._standings[name] = replace(
                    why.standing, ratios=(), room=(), rests_until=round + LONGEST_REST
                )
                if why.finding.cause != "time":
                    self._hopeless[name] = why.finding.measured
                text = f"{name} cannot be planned anew ({why.reason}) and keeps its plan: {error}"
                self._emit(Event("warning", {"text": text}))
                continue
            possible[name] = why
        return possible

    def _held(self, names: Sequence[str] = ()) -> list[DeviceProfile]:
        """Profiles as they are held true now; of all devices unless some are named."""
        return [
            held_profile(self._profiles[name], self._standings[name])
            for name in names or self._profiles
        ]


def ranks_nest(plans: Collection[DevicePlan]) -> bool:
    """Whether of each two devices one trains at least the rank of the other in every matrix."""
    distinct = {tuple(sorted(plan.ranks().items())): plan.ranks() for plan in plans}
    order = sorted(distinct.values(), key=lambda ranks: sum(ranks.values()))
    return all(
        rank <= larger.get(matrix, 0)
        for smaller, larger in pairwise(order)
        for matrix, rank in smaller.items()
    )


def held_profile(profile: DeviceProfile, standing: Standing) -> DeviceProfile:
    """A profile whose rates and budget are those that the device has shown to have."""
    on_host = profile.accelerator == "cpu"
    budget = standing.budget_bytes
    return replace(
        profile,
        memory_bytes=budget if on_host else profile.memory_bytes,
        accelerator_memory_bytes=profile.accelerator_memory_bytes if on_host else budget,
        matmul_flops_per_s={
            dtype: rate / standing.slowness for dtype, rate in profile.matmul_flops_per_s.items()
        },
        memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s / standing.slowness,
    )


def _words(finding: Finding) -> str:
    """The reason of a new plan, for a person."""
    if finding.cause == "time":
        return (
            f"a step took {seconds_text(finding.measured)} in {SETTLED_ROUNDS} rounds in a row, "
            f"planned {seconds_text(finding.planned)}"
        )
    measured, planned = bytes_text(finding.measured), bytes_text(finding.planned)
    if finding.cause == "refusal":
        return f"it refused its plan: it allows {measured}, the plan takes {planned}"
    if finding.measured < finding.planned:
        return f"{measured} of memory are free, the plan takes {planned}"
    return f"plans may take {measured} of memory again, instead of {planned}"


def _replanned(round: int, device: str, why: Due, change: PlanChange) -> Event:
    finding = why.finding
    timed, sized = finding.cause == "time", finding.cause in ("memory", "refusal")
    return Event(
        "replanned",
        {
            "round": round,
            "device": device,
            "cause": finding.cause,
            "reason": why.reason,
            "change": change.words(),
            "measured_step_seconds": finding.measured if timed else None,
            "planned_step_seconds": finding.planned if timed else None,
            "measured_bytes": int(finding.measured) if sized else None,
            "planned_bytes": int(finding.planned) if sized else None,
            "changed": change.fields(),
        },
    )
