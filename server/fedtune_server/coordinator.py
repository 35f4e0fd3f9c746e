"""The whole job of a coordinator, from the first question to the last checkpoint.

    gather the fleet -> plan it -> rounds of (dispatch, train, check, join, checkpoint) -> measure

`Coordinator.run` reads like that line. It needs no torch and never loads the base: shapes come
from the model folder's headers. Everything that happens is emitted as an event; the ledger, the
metrics and a display are listeners.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from flwr.serverapp import Grid

from fedtune.aggregate.rules import make_rule
from fedtune.aggregate.server_step import apply_server_step
from fedtune.records import (
    Event,
    FleetPlan,
    FloatArray,
    GlobalAdapter,
    ModelShapes,
)
from fedtune.settings import RunConfig
from fedtune.wire.checkpoint import as_written, prune_checkpoints, write_checkpoint
from fedtune.wire.file_digests import checkpoint_saved
from fedtune.wire.messages import TaskSpec
from fedtune_server.clock import Clock
from fedtune_server.deadlines import LOADING_S, Allowances
from fedtune_server.defend import check_root
from fedtune_server.distortion import Measure
from fedtune_server.evaluation import evaluate
from fedtune_server.fleet import (
    Emit,
    Fleet,
    find_again,
    gather_fleet,
    without_unannounced_groups,
)
from fedtune_server.flights import Flights
from fedtune_server.from_config import optimizer_spec, round_terms, server_step
from fedtune_server.lineup import Lineup
from fedtune_server.newcomers import Newcomers, gather_live
from fedtune_server.open_round import OpenRounds
from fedtune_server.planning import Planning
from fedtune_server.presence import Again, Live, Presence
from fedtune_server.roster import Roster
from fedtune_server.round import train
from fedtune_server.run_folder import RunFolder
from fedtune_server.saved_state import Saved, state_checkpoint
from fedtune_server.state import RunState, with_turns
from fedtune_server.taken_up import take_up

_HEAD_STD = 0.02
"""Standard deviation of a fresh task head; the initialiser range of BERT and Llama."""

_REPORTED_PACKAGES = ("fedtune", "flwr", "numpy", "torch", "transformers", "bitsandbytes")


class Coordinator:
    """Plays one run on a grid.

    Args:
        config: the run's settings; the parts below this class get plain values.
        shapes: of the base model.
        folder: where the run is kept.
        emit: told of every event.
        patience: how many times `run.round_deadline_s` a round may take; above 1 where devices
            devices take turns on one machine.
        measure: called for the distortion table if a plan can use one and the config names none;
            None where the base is not at hand.
        clock: that rounds go by; default: this machine's.
        saved: the state that a run goes on from; None: it starts.
    """

    def __init__(
        self,
        config: RunConfig,
        shapes: ModelShapes,
        folder: RunFolder,
        emit: Emit,
        patience: float = 1.0,
        measure: Measure | None = None,
        clock: Clock | None = None,
        saved: Saved | None = None,
    ) -> None:
        self._config, self._shapes, self._folder, self._emit = config, shapes, folder, emit
        self._measure = measure
        self._open_rounds = OpenRounds(folder.open_rounds)
        self._flights = Flights(clock)
        self._saved = saved
        folder.run = folder.run or f"{config.run.name}-{os.urandom(4).hex()}"
        self._run_id = folder.run
        self._step = server_step(config)
        self._rule = make_rule(config.aggregate.rule, self._step.join_cap, seed=config.run.seed)
        self._terms = round_terms(config, shapes, self._run_id, clock, patience)

    def run(self, grid: Grid, roster: Roster) -> GlobalAdapter:
        """Play the run to its end.

        Args:
            roster: tells the run's devices from other nodes of the grid.

        Raises:
            RoundError: too few devices came, or too few of a round's updates were good.
            PlanError: a device cannot carry any plan.
            RunError: no device can take part.
        """
        started = time.perf_counter()
        begin = self._begin if self._saved is None else partial(self._go_on, self._saved)
        lineup, state = begin(grid, roster)
        allowances = Allowances(self._config.deployment.slack, self._terms.round_deadline_s)
        while state.round < self._config.run.rounds:
            live = self._live(grid, roster, lineup.fleet, allowances)
            state = self._round(grid, lineup, state, live)
        live = self._live(grid, roster, lineup.fleet, allowances)
        after = self._evaluate(grid, lineup, state, live, self._again(roster))
        fields = {
            "seconds": time.perf_counter() - started,
            "planned_seconds": state.planned_seconds,
            "held_out_loss_before": state.held_out_loss_before,
            "held_out_loss_after": after,
        }
        self._emit(Event("run_finished", fields))
        return state.adapter

    def _begin(self, grid: Grid, roster: Roster) -> tuple[Lineup, RunState]:
        """Gather the fleet, plan it, and save that."""
        self._folder.write_status("running", 0)  # from here on the run has its id
        self._announce(roster.expected)
        self._open_rounds.forget_all_but(None)
        fleet = self._gather(grid, roster, self._emit)
        check_root(self._terms.defence, fleet.names)
        if fleet.labels:
            self._folder.write_json("labels.json", list(fleet.labels))
        heads = self._fresh_heads(fleet)
        planning = self._planning(fleet)
        planning.measure(grid, self._run_id, heads, self._terms.deadline_s, self._again(roster))
        lineup = self._lineup(fleet, planning, planning.plan(), roster)
        start = self._rule.start(self._shapes.matrices, heads)
        return lineup, self._save(lineup.put_down(RunState(run=self._run_id, adapter=start)))

    def _go_on(self, saved: Saved, grid: Grid, roster: Roster) -> tuple[Lineup, RunState]:
        """Find the fleet again, and stand where the saved state was."""
        state = saved.state
        # Answers to a round count if they began from this state, and not from one that was lost.
        self._open_rounds.forget_all_but(None if saved.skipped else state.round + 1)
        known = state.known
        fleet = find_again(
            lambda emit: self._gather(grid, roster, emit),
            known.reports,
            self._emit,
            live=roster.live,
        )
        planning = self._planning(replace(fleet, reports=known.reports))
        planning.go_on(known, state.plans.values())
        lineup = self._lineup(fleet, planning, FleetPlan(tuple(state.plans.values())), roster)
        lineup.go_on(state)
        self._folder.write_status("running", state.round)
        return lineup, state

    def _announce(self, devices: int) -> None:
        config = self._config
        self._emit(
            Event(
                "run_started",
                {
                    "run": self._run_id,
                    "folder": str(self._folder.path),
                    "rounds": config.run.rounds,
                    "devices": devices,
                    "rule": config.aggregate.rule,
                    "seed": config.run.seed,
                    "versions": installed_versions(),
                },
            )
        )

    def _gather(self, grid: Grid, roster: Roster, emit: Emit) -> Fleet:
        nodes = roster.wait(grid, self._terms.deadline_s, self._emit)
        if roster.live:
            fleet = gather_live(grid, roster, self._task(), emit)
        else:
            fleet = gather_fleet(grid, nodes, self._task(), self._terms.deadline_s, emit)
        return without_unannounced_groups(fleet, self._devices_max(), emit)

    def _devices_max(self) -> dict[str, int]:
        """Class of devices -> devices that one site of it may stand for."""
        return {name: each.devices_max for name, each in self._config.fleet.items()}

    def _task(self) -> TaskSpec:
        return TaskSpec(
            run=self._run_id,
            task=self._config.model.task,
            base_digest=self._shapes.digest,
            matrices=tuple(matrix.name for matrix in self._shapes.matrices),
            seed=self._config.run.seed,
        )

    def _planning(self, fleet: Fleet) -> Planning:
        return Planning(
            self._config,
            self._shapes,
            fleet,
            self._rule.tail,
            self._folder,
            self._emit,
            self._measure,
        )

    def _lineup(self, fleet: Fleet, planning: Planning, plan: FleetPlan, roster: Roster) -> Lineup:
        task, deadline_s = self._task(), self._terms.deadline_s
        newcomers = Newcomers(roster, task, self._devices_max(), self._emit)
        return Lineup(
            self._config, self._shapes, fleet, task, planning, plan, newcomers, deadline_s,
            self._again(roster), self._emit,
        )  # fmt: skip

    def _fresh_heads(self, fleet: Fleet) -> dict[str, FloatArray]:
        """Seeded values for the parameters that the base does not have."""
        rng = np.random.default_rng([self._config.run.seed, 2])
        heads: dict[str, FloatArray] = {}
        for name, shape in sorted(fleet.dense_shapes.items()):
            values = rng.normal(0.0, _HEAD_STD, shape) if len(shape) > 1 else np.zeros(shape)
            heads[name] = values.astype(np.float32)
        return heads

    def _evaluate(
        self,
        grid: Grid,
        lineup: Lineup,
        state: RunState,
        live: Live | None,
        again: Again | None,
    ) -> float | None:
        """The held-out loss of the last adapter; of the devices that are there."""
        plans, terms = lineup.plans, self._terms
        if live is not None:
            here = live.presence.here()
            plans = [plan for plan in plans if plan.device in here]
            reports = lineup.fleet.reports
            allowed = [live.allowances.seconds(p, reports[p.device].profile) for p in plans]
            longest = max(allowed, default=0.0) + LOADING_S  # a plan counts no such pass
            terms = replace(terms, deadline_s=min(longest, terms.deadline_s))
        return evaluate(
            grid, lineup.fleet, self._rule, state.adapter, plans, terms, self._emit, again
        )

    def _live(
        self, grid: Grid, roster: Roster, fleet: Fleet, allowances: Allowances
    ) -> Live | None:
        """How a round deals with devices that come and go; None where they stay."""
        if not roster.live:
            return None
        return Live(Presence(grid, fleet.nodes, roster), allowances, roster.patience_s)

    def _again(self, roster: Roster) -> Again | None:
        """As `_live`, for what devices are asked beside rounds."""
        return Again(roster, self._terms.deadline_s, self._emit) if roster.live else None

    def _round(self, grid: Grid, lineup: Lineup, state: RunState, live: Live | None) -> RunState:
        """Play one round, and save what it leads to."""
        config, fleet = self._config, lineup.fleet
        number = state.round + 1
        plans = lineup.plans
        outcome = train(
            grid,
            fleet,
            self._rule,
            state.adapter,
            plans,
            optimizer_spec(config, number),
            self._terms,
            number,
            self._open_rounds,
            evaluate=self._measures(number),
            emit=self._emit,
            draw=lineup.draw(state),
            flights=self._flights,
            live=live,
            plan_anew=lambda failed: lineup.plan_failed(grid, failed, number),
            already=take_up(
                self._rule, state.adapter, plans, fleet, self._terms, number, self._open_rounds
            ),
        )
        adapter, server = self._server_step(state, outcome.joined)
        if number < config.run.rounds:
            lineup.after_round(grid, outcome, number)
        state = replace(
            state,
            adapter=adapter,
            server=server,
            turns=with_turns(state.turns, outcome.asked, number),
            held_out_loss_before=(
                outcome.held_out_loss if number == 1 else state.held_out_loss_before
            ),
            planned_seconds=state.planned_seconds + outcome.planned_seconds,
        )
        state = self._save(lineup.put_down(state))
        for played in outcome.rounds:
            self._open_rounds.close(played)
        return state

    def _server_step(
        self, state: RunState, joined: GlobalAdapter
    ) -> tuple[GlobalAdapter, Mapping[str, GlobalAdapter]]:
        """What the server's optimiser makes of a round, and its own states after it."""
        return apply_server_step(state.server, state.adapter, joined, self._step)

    def _measures(self, number: int) -> bool:
        every = self._config.train.evaluate_every
        return every > 0 and (number - 1) % every == 0

    def _save(self, state: RunState) -> RunState:
        """Save a state; what is given back is what would be read again."""
        state = replace(
            state,
            adapter=as_written(state.adapter),
            server={name: as_written(each) for name, each in state.server.items()},
        )
        self._checkpoint(state)
        self._folder.write_status("running", state.round)
        return state

    def _checkpoint(self, state: RunState) -> None:
        written = state_checkpoint(state, self._shapes.digest)
        path = write_checkpoint(
            self._folder.checkpoints, written.adapter, written.extra, written.meta
        )
        self._emit(checkpoint_saved(path, state.round))
        prune_checkpoints(self._folder.checkpoints, self._config.outputs.keep_checkpoints)


def installed_versions() -> Mapping[str, str]:
    """Versions of the packages that decide a run's numbers, where they are installed."""
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
