"""A coordinator that answers another one: its devices are one device of the level above.

    profile query -> ask the own devices, plan them, answer with their sums
    train         -> a round with the own devices, joined; one update goes up
    evaluate      -> the own devices measure; one loss goes up

No number of a single device goes up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.serverapp import Grid

from fedtune.errors import ProtocolError
from fedtune.records import (
    Contribution,
    DevicePlan,
    DeviceProfile,
    Dispatch,
    Event,
    FormatName,
    LoraScale,
    ModelShapes,
    SiteReport,
)
from fedtune.settings import RunConfig
from fedtune.wire.feedback import encode_update
from fedtune.wire.fields import MAX_COUNT
from fedtune.wire.messages import (
    EvaluateInstruction,
    EvaluateReport,
    TaskSpec,
    TrainInstruction,
    TrainReport,
)
from fedtune.wire.packing import tensors_digest
from fedtune.wire.tensors import unpack_dispatch
from fedtune_server.deadlines import Allowances
from fedtune_server.evaluation import measure
from fedtune_server.fleet import Emit, Fleet, fleet_of, gather_fleet, without_unannounced_groups
from fedtune_server.from_config import round_terms
from fedtune_server.hierarchy.group_rule import (
    GroupRule,
    as_factors,
    rank_needed,
    trained_state,
    whole_state,
    within,
)
from fedtune_server.newcomers import gather_live
from fedtune_server.open_round import OpenRounds
from fedtune_server.planning import Planning
from fedtune_server.presence import Again, Live, Presence
from fedtune_server.roster import Counted, Roster
from fedtune_server.round import train
from fedtune_server.run_folder import RunFolder
from fedtune_server.sampling import Draw
from fedtune_server.terms import RoundTerms


@dataclass(frozen=True, slots=True)
class Group:
    """How a group shows itself to the level above.

    Attributes:
        name: as a device of that level.
        device_class: section of that level's [fleet]; its `devices_max` must allow the group.
        devices: that must be there before the group answers, where they are counted only.
        link_bytes_per_s: between the two coordinators.
        formats: that the class above may plan; no backbone is held, so they mean nothing here.
    """

    name: str
    device_class: str
    devices: int
    link_bytes_per_s: float = 1e7
    formats: tuple[FormatName, ...] = ("fp32",)


@dataclass(frozen=True, slots=True)
class _Run:
    """What is known of one run of the level above."""

    fleet: Fleet
    plans: Mapping[str, DevicePlan]
    allowances: Allowances


class SubCoordinator:
    """Asks its own devices what it is asked, and answers with what they come to together.

    Args:
        config: of the group: its fleet and plan, its wire, its defence. `aggregate.weights` and the
            [train] section must be those of the level above, or devices count otherwise there.
        shapes: of the base model.
        grid: of the group's own devices.
        folder: where the group keeps its plan and its open rounds.
        emit: told of every event below; none goes up.
        roster: tells the group's devices from other nodes of the grid; default: all nodes are.

    Attributes:
        group: how it shows itself; may be replaced between messages.
        within_s: longest that a round or a measurement may take, in seconds; None: as the
            configuration says. May be replaced between messages.
    """

    def __init__(
        self,
        group: Group,
        config: RunConfig,
        shapes: ModelShapes,
        grid: Grid,
        folder: RunFolder,
        emit: Emit,
        roster: Roster | None = None,
    ) -> None:
        self.group, self._config, self._shapes = group, config, shapes
        self.within_s: float | None = None
        self._grid, self._folder, self._emit = grid, folder, emit
        self._roster = roster or Counted(group.devices)
        self._open_rounds = OpenRounds(folder.open_rounds)
        self._runs: dict[str, _Run] = {}
        self._warned = False

    def describe(self, spec: TaskSpec) -> SiteReport:
        """Answer the profile query for all devices of the group.

        Raises:
            RunError: no device of the group can take part.
            RoundError: too few of them are there.
        """
        fleet = self._gather(spec)
        self._runs = {spec.run: self._planned(fleet)}
        reports = fleet.reports.values()
        return SiteReport(
            profile=self._profile([each.profile for each in reports]),
            base_digest=self._shapes.digest,
            train_samples=sum(each.train_samples for each in reports),
            held_out_samples=sum(each.held_out_samples for each in reports),
            train_tokens=sum(each.train_tokens for each in reports),
            dense=next(iter(reports)).dense,
            labels=fleet.labels,
            devices=sum(each.devices for each in reports),
        )

    def train(self, order: TrainInstruction, packed: bytes) -> tuple[TrainReport, bytes]:
        """Play a round with the own devices; the report and the packed update of them all.

        Raises:
            ProtocolError: the instruction or its tensors do not fit each other or the group.
            RoundError: too few devices of the group returned a good update.
        """
        started = time.perf_counter()
        self._check(order.run, order.base_digest, order.plan.device)
        run, terms = self._run(order.run, order.labels), self._terms(order)
        sent = self._unpacked(order, packed, run.fleet)
        plans = [within(plan, order.plan) for plan in run.plans.values()]
        self._warn_of_cut(sent, order.plan, plans)
        outcome = train(
            self._grid,
            run.fleet,
            GroupRule(whole_state(sent, self._shapes.matrices, order.round), order.plan.ranks()),
            trained_state(sent, order.round),
            plans,
            order.optimizer,
            terms,
            order.round,
            self._open_rounds,
            evaluate=order.evaluate,
            emit=self._emit,
            draw=Draw(self._config.run.devices_per_round, order.seed),
            live=self._live(run),
        )
        joined = outcome.joined
        factors = {
            name: as_factors(joined.matrices[name], pair) for name, pair in sent.trained.items()
        }
        tensors, _ = encode_update(sent, factors, joined.dense, order.codec)
        report = TrainReport(
            run=order.run,
            round=order.round,
            device=self.group.name,
            base_digest=order.base_digest,
            samples=sum(each.update.samples for each in outcome.good),
            tokens=sum(each.update.tokens for each in outcome.good),
            tensors_digest=tensors_digest(tensors),
            metrics={
                **_together(outcome.good),
                "seconds": time.perf_counter() - started,
                "dropped_energy": max(joined.dropped_energy.values(), default=0.0),
            },
            devices=sum(each.update.devices for each in outcome.good),
            held_samples=sum(_held(each, run.fleet) for each in outcome.good),
        )
        self._open_rounds.close(order.round)
        return report, tensors

    def evaluate(self, order: EvaluateInstruction, packed: bytes) -> EvaluateReport:
        """Held-out loss of what was sent, over the own devices.

        Raises:
            ProtocolError: as for `train`.
        """
        self._check(order.run, order.base_digest, order.plan.device)
        run, terms = self._run(order.run, order.labels), self._terms(order)
        sent = self._unpacked(order, packed, run.fleet)
        number, live = order.round + 1, self._live(run)
        here = run.plans.keys() if live is None else live.presence.here().keys()
        measured = measure(
            self._grid,
            run.fleet,
            GroupRule(whole_state(sent, self._shapes.matrices, number), order.plan.ranks()),
            trained_state(sent, number),
            [within(plan, order.plan) for name, plan in run.plans.items() if name in here],
            terms,
            self._emit,
            Again(self._roster, terms.deadline_s, self._emit) if self._roster.live else None,
        )
        metrics = _means(measured.values(), {"held_out_loss": "held_out_units"})
        if measured and all("accuracy" in each for each in measured.values()):
            metrics |= _means(measured.values(), {"accuracy": "held_out_units"})
        return EvaluateReport(order.run, order.round, self.group.name, metrics)

    # ------------------------------------------------------------ the own fleet

    def _gather(self, spec: TaskSpec) -> Fleet:
        deadline_s = self._config.run.round_deadline_s
        if spec.base_digest != self._shapes.digest:
            raise ProtocolError(
                f"{self.group.name}: the run is on another base model ({spec.base_digest[:12]}); "
                "copy the model of the level above to this group"
            )
        nodes = self._roster.wait(self._grid, deadline_s, self._emit)
        if self._roster.live:
            fleet = gather_live(self._grid, self._roster, spec, self._emit)
        else:
            fleet = gather_fleet(self._grid, nodes, spec, deadline_s, self._emit)
        most = {name: each.devices_max for name, each in self._config.fleet.items()}
        return without_unannounced_groups(fleet, most, self._emit)

    def _planned(self, fleet: Fleet) -> _Run:
        planning = Planning(
            self._config, self._shapes, fleet, "planned", self._folder, self._emit, None
        )
        settings = self._config
        allowances = Allowances(settings.deployment.slack, settings.run.round_deadline_s)
        return _Run(fleet, planning.plan().by_device(), allowances)

    def _live(self, run: _Run) -> Live | None:
        """How a round deals with devices that come and go; None where they stay."""
        if not self._roster.live:
            return None
        presence = Presence(self._grid, run.fleet.nodes, self._roster)
        return Live(presence, run.allowances, self._roster.patience_s)

    def _run(self, run: str, labels: tuple[str, ...]) -> _Run:
        """The run as it was planned; after a restart of this coordinator planned as before."""
        if run not in self._runs:
            spec = TaskSpec(
                run=run,
                task=self._config.model.task,
                base_digest=self._shapes.digest,
                matrices=tuple(matrix.name for matrix in self._shapes.matrices),
                seed=self._config.run.seed,
            )
            self._runs = {run: self._planned(self._gather(spec))}
        known = self._runs[run]
        fleet = fleet_of(known.fleet.nodes, known.fleet.reports)
        dense = next(iter(fleet.reports.values())).dense
        shapes = {
            name: tuple(len(labels) if axis == 0 else axis for axis in shape)
            for name, shape in dense.items()
        }
        return replace(known, fleet=replace(fleet, labels=labels, dense_shapes=shapes))

    def _profile(self, profiles: Sequence[DeviceProfile]) -> DeviceProfile:
        """As fast as its slowest device; memory is no limit, since nothing is trained here."""
        rates = [set(each.matmul_flops_per_s) for each in profiles]
        return DeviceProfile(
            name=self.group.name,
            device_class=self.group.device_class,
            cpu_threads=1,
            memory_bytes=MAX_COUNT,
            matmul_flops_per_s={
                name: min(each.matmul_flops_per_s[name] for each in profiles)
                for name in sorted(set.intersection(*rates))
            },
            memory_bandwidth_bytes_per_s=min(p.memory_bandwidth_bytes_per_s for p in profiles),
            link_bytes_per_s=self.group.link_bytes_per_s,
            formats=self.group.formats,
        )

    # ------------------------------------------------------------ one instruction

    def _terms(self, order: TrainInstruction | EvaluateInstruction) -> RoundTerms:
        terms = round_terms(self._config, self._shapes, order.run, None, 1.0)
        seed = order.seed if isinstance(order, TrainInstruction) else self._config.run.seed
        # Work that comes late is for a start that this group no longer has.
        policy = replace(terms.policy, mode="sync", late="refuse")
        deadline_s = min(terms.deadline_s, self.within_s or terms.deadline_s)
        return replace(terms, seed=seed, scale=order.scale, policy=policy, deadline_s=deadline_s)

    def _check(self, run: str, base_digest: str, device: str) -> None:
        if base_digest != self._shapes.digest:
            raise ProtocolError(
                f"{self.group.name}: the instruction of {run} is for another base model "
                f"({base_digest[:12]})"
            )
        if device != self.group.name:
            raise ProtocolError(f"{self.group.name}: the instruction is for device {device!r}")

    def _unpacked(
        self, order: TrainInstruction | EvaluateInstruction, packed: bytes, fleet: Fleet
    ) -> Dispatch:
        if tensors_digest(packed) != order.tensors_digest:
            raise ProtocolError(
                f"{self.group.name}: the tensors do not have the sha256 they were sent with"
            )
        scale: LoraScale = order.scale
        shapes = self._shapes.by_name()
        return unpack_dispatch(packed, order.plan, shapes, fleet.dense_shapes, scale)

    def _warn_of_cut(self, sent: Dispatch, plan: DevicePlan, plans: Sequence[DevicePlan]) -> None:
        """Say once a run that the group cannot return all that its devices learn."""
        shapes = self._shapes.by_name()
        for name, pair in sent.trained.items():
            warm = int(np.count_nonzero(pair.b.any(axis=0)))
            whole = min(shapes[name].out_features, shapes[name].in_features)
            needed = min(whole, rank_needed(name, warm, plans))
            if pair.rank < needed and not self._warned:
                self._warned = True
                text = (
                    f"{name} needs rank {needed} for all that the devices of {plan.device} learn, "
                    f"and its plan gives {pair.rank}; raise `rank` of the class "
                    f"{self.group.device_class} at the level above"
                )
                self._emit(Event("warning", {"text": text}))


def _held(contribution: Contribution, fleet: Fleet) -> int:
    update = contribution.update
    return update.held_samples or fleet.reports[update.device].train_samples


def _together(good: Sequence[Contribution]) -> dict[str, float]:
    """Losses of the devices, each weighted by the units that it was measured over."""
    metrics = [each.update.metrics for each in good]
    return _means(metrics, {"held_out_loss": "held_out_units", "train_loss": "train_units"})


def _means(
    metrics: Collection[Mapping[str, float]], units_of: Mapping[str, str]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for value, units in units_of.items():
        known = [m for m in metrics if m.get(units, 0) > 0 and value in m]
        total = math.fsum(m[units] for m in known)
        if total > 0:
            found[value] = math.fsum(m[value] * m[units] for m in known) / total
            found[units] = total
    return found
