"""The devices of a run that are there, what is known of them all, and the plans they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.serverapp import Grid

from fedtune.errors import PlanError
from fedtune.records import DevicePlan, DeviceProfile, Event, FleetPlan, ModelShapes, SiteReport
from fedtune.settings import RunConfig
from fedtune.wire.messages import TaskSpec
from fedtune_server.fleet import Emit, Fleet, ask_again
from fedtune_server.newcomers import Newcomers, with_newcomers
from fedtune_server.planning import Planning
from fedtune_server.presence import Again
from fedtune_server.replan import Replanner
from fedtune_server.round import Outcome
from fedtune_server.sampling import Draw
from fedtune_server.state import RunState

_ASK_AGAIN_S = 60.0
"""Longest wait for the new profiles of devices that refused their plans; a site answers at once."""


class Lineup:
    """Who plays the next round, and with which plan.

    Args:
        fleet: the devices that are there.
        planning: knows the reports of all devices of the run, also of those that are away.
        plan: in force.
        deadline_s: of what devices are asked beside rounds.
        again: how they are asked that again; None: they stay.

    Attributes:
        fleet: as it is now.
    """

    def __init__(
        self,
        config: RunConfig,
        shapes: ModelShapes,
        fleet: Fleet,
        task: TaskSpec,
        planning: Planning,
        plan: FleetPlan,
        newcomers: Newcomers,
        deadline_s: float,
        again: Again | None,
        emit: Emit,
    ) -> None:
        self._config, self._task, self._planning = config, task, planning
        self._newcomers, self._emit = newcomers, emit
        self._deadline_s, self._again = min(deadline_s, _ASK_AGAIN_S), again
        self.fleet = fleet
        self._replanner = Replanner(
            [report.profile for report in planning.known.reports.values()],
            plan,
            planning.again,
            shapes,
            config.plan.replan_threshold,
            # A plan that a person wrote is followed as long as its devices can.
            reports=not config.plan.file,
            emit=emit,
        )

    def go_on(self, state: RunState) -> None:
        """Stand where a saved state was."""
        self._replanner.go_on(state.plans, state.held)

    def put_down(self, state: RunState) -> RunState:
        """The state with what is now held true of the devices."""
        return replace(
            state,
            plans=dict(self._replanner.plans),
            held=self._replanner.held,
            known=self._planning.known,
        )

    @property
    def plans(self) -> list[DevicePlan]:
        """Of the devices that are there, in their order."""
        return [self._replanner.plans[name] for name in self.fleet.names]

    def draw(self, state: RunState) -> Draw:
        """Who of them takes part in a round."""
        config = self._config
        caps = {
            name: config.fleet[report.profile.device_class].rounds_max
            for name, report in self.fleet.reports.items()
            if report.profile.device_class in config.fleet
        }
        count, seed = config.run.devices_per_round, config.run.seed
        return Draw(count, seed, config.rounds.sampling, state.turns, caps)

    def plan_failed(
        self, grid: Grid, failed: tuple[str, ...], number: int
    ) -> Mapping[str, DevicePlan]:
        """Plans for a round that is played again, because too many devices refused theirs."""
        if self._config.plan.replan:
            now = self._ask_again(grid, failed)
            self._replanner.after_round(number, {}, now)
        return self._replanner.plans

    def after_round(self, grid: Grid, outcome: Outcome, number: int) -> None:
        """Plan anew whom a round asks for, and let those in that came meanwhile."""
        if self._config.plan.replan:
            refused: Mapping[str, DeviceProfile] = {}
            if outcome.failed:
                refused = self._ask_again(grid, outcome.failed)
            self._replanner.after_round(number, outcome.metrics, refused)
        self._admit(grid, number)
        self._planning.say_what_leaves(self._replanner.plans.values())

    def _ask_again(self, grid: Grid, failed: tuple[str, ...]) -> Mapping[str, DeviceProfile]:
        """What devices that refused their plans say of themselves now."""
        return ask_again(grid, self.fleet, failed, self._task, self._deadline_s, self._again)

    def _admit(self, grid: Grid, number: int) -> None:
        """Let those in that came since the last round."""
        known = self._planning.known.reports
        found = self._newcomers.come(grid, self.fleet, known)
        for name, (node, report) in found.items():
            new = name not in known
            if new:
                try:
                    self._plan_one_more(number, report)
                except PlanError as error:
                    self._newcomers.turned_away(node, name, f"it can carry no plan: {error}")
                    continue
            known = self._planning.known.reports
            self.fleet = with_newcomers(self.fleet, {name: (node, report)}, known)
            fields = {"round": number + 1, "device": name, "new": new, "plan": self._row(name)}
            self._emit(Event("site_joined", fields))

    def _plan_one_more(self, number: int, report: SiteReport) -> None:
        """Plan a device beside the others.

        Raises:
            PlanError: it can carry no plan; all is as before.
        """
        before = self._planning.known.reports
        self._planning.admit(dict(sorted({**before, report.profile.name: report}.items())))
        try:
            self._replanner.admit(number, report.profile, self._planning.again)
        except PlanError:
            self._planning.admit(before)
            raise

    def _row(self, name: str) -> object:
        """A device's plan for a person, after `plan.json` holds it."""
        plans = tuple(self._replanner.plans[each] for each in sorted(self._replanner.plans))
        rows = self._planning.write(FleetPlan(plans))
        return next(row for row in rows if row["device"] == name)
