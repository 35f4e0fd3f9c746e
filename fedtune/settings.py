"""The run file as one frozen tree of settings; `fedtune.config` reads it from a file.

Defaults live in the sections and nowhere else. A section is what its stage needs to be told, so a
stage takes its own section or plain values, never the whole tree. Every key has a description: it
is the comment of `fedtune init` and the page `docs/run-file.md`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fedtune.sections.federation import (
    AggregateSection,
    DefenceSection,
    DeploymentSection,
    OutputsSection,
    RoundsSection,
    RunSection,
    SimulationSection,
    WireSection,
)
from fedtune.sections.fleet import DeviceClassSection, ImportanceSection, PlanSection
from fedtune.sections.learning import (
    DataSection,
    LoraSection,
    ModelSection,
    PartitionSection,
    TrainSection,
)
from fedtune.sections.section import Section, parse_bytes

__all__ = [
    "AggregateSection",
    "DataSection",
    "DefenceSection",
    "DeploymentSection",
    "DeviceClassSection",
    "ImportanceSection",
    "LoraSection",
    "ModelSection",
    "OutputsSection",
    "PartitionSection",
    "PlanSection",
    "RoundsSection",
    "RunConfig",
    "RunSection",
    "Section",
    "SimulationSection",
    "TrainSection",
    "WireSection",
    "parse_bytes",
]


LONGEST_ADAM_STEP = 0.1
"""Weights of a base have a root mean square of about 0.02 to 0.1; chosen."""


class RunConfig(Section):
    """Everything that defines a run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    fleet: dict[str, DeviceClassSection] = Field(default_factory=dict)
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    importance: ImportanceSection = ImportanceSection()
    plan: PlanSection = PlanSection()
    rounds: RoundsSection = RoundsSection()
    aggregate: AggregateSection = AggregateSection()
    defence: DefenceSection = DefenceSection()
    wire: WireSection = WireSection()
    simulation: SimulationSection = SimulationSection()
    deployment: DeploymentSection = DeploymentSection()
    outputs: OutputsSection = OutputsSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_sites()
        self._check_rule()
        self._check_server_step()
        self._check_defence()
        self._check_optimizer()
        self._check_way()
        if self.plan.shortest_sequence > self.data.max_tokens:
            raise ValueError(
                f"plan.shortest_sequence = {self.plan.shortest_sequence}: expected at most "
                f"data.max_tokens = {self.data.max_tokens}"
            )
        self._check_wire()
        self._check_rounds()
        self._check_turns()
        classifying = self.model.task == "sequence-classification"
        if classifying != (self.data.format == "text-label"):
            raise ValueError(
                "model.task 'sequence-classification' goes with data.format 'text-label', "
                f"and only with it; found {self.model.task!r} and {self.data.format!r}"
            )
        for key in ("devices_per_round", "minimum_devices"):
            wanted = getattr(self.run, key)
            if wanted > self.devices:
                raise ValueError(
                    f"run.{key} = {wanted}: expected at most {self.devices}, the devices in fleet"
                )
        asked = self.run.devices_per_round or self.devices
        if self.run.minimum_devices > asked:
            raise ValueError(
                f"run.minimum_devices = {self.run.minimum_devices}: expected at most "
                f"run.devices_per_round = {asked}"
            )
        for name, device_class in self.fleet.items():
            _check_pins(name, device_class, self.train.batch_size)
        return self

    def _check_sites(self) -> None:
        """Refuse a run without data or devices, unless its sites bring their own."""
        if self.deployment.sites:
            if self.deployment.minimum > self.devices and "*" not in self.deployment.sites:
                raise ValueError(
                    f"deployment.minimum = {self.deployment.minimum}: expected at most "
                    f"{self.devices}, the sites named"
                )
            return
        if not self.data.train and not self.data.sites:
            raise ValueError(
                "expected exactly one of data.train and data.sites, found neither; give one "
                "file to split, or one file per site; or, for a run on real sites, name these in "
                "deployment.sites"
            )
        if not self.fleet:
            raise ValueError(
                "missing key fleet; add at least one [fleet.NAME] section with count and memory"
            )

    def _check_rule(self) -> None:
        """Refuse what an aggregation rule cannot do, before anything runs."""
        if self.aggregate.rule == "zero-pad" and self.lora.rank_max > self.lora.rank_cap:
            raise ValueError(
                f"aggregate.rule 'zero-pad' needs lora.rank_max = {self.lora.rank_max} to be at "
                f"most lora.rank_cap = {self.lora.rank_cap}"
            )

    def _check_server_step(self) -> None:
        """Refuse a server's optimiser where sums of products are no state, or its step is a unit.

        Adam's step is by how much every weight moves in a round: 1, the default, undoes the base.
        """
        section = self.aggregate
        taken = {
            "server_step": section.server_step != 1.0,
            "momentum": section.momentum != 0.0,
            "optimizer": section.optimizer != "average",
            "keep_dropped": section.keep_dropped,
        }
        if section.rule in ("zero-pad", "flora") and any(taken.values()):
            key = next(key for key, set_ in taken.items() if set_)
            raise ValueError(
                f"aggregate.rule {section.rule!r} goes with aggregate.server_step = 1, "
                "aggregate.momentum = 0, aggregate.optimizer = 'average' and "
                f"aggregate.keep_dropped = false; found aggregate.{key} = "
                f"{getattr(section, key)!r}; use 'delta' for others"
            )
        if section.optimizer == "adam" and section.server_step > LONGEST_ADAM_STEP:
            raise ValueError(
                "aggregate.optimizer 'adam' needs aggregate.server_step of at most "
                f"{LONGEST_ADAM_STEP:g}, by which weights move in a round; found "
                f"{section.server_step:g}; try 0.001"
            )

    def _check_defence(self) -> None:
        """Refuse what would leave a way around a defence, or what it cannot do."""
        method = self.defence.method
        if method == "none":
            return
        if self.aggregate.weights == "samples":
            raise ValueError(
                f"defence.method {method!r} goes with aggregate.weights 'uniform' or 'tokens', "
                "found 'samples': a device says itself how many samples it holds, and could claim "
                "most of the weight"
            )
        rule = self.aggregate.rule
        if method != "geometric-median" and rule in ("zero-pad", "flexlora"):
            raise ValueError(
                f"defence.method {method!r} shortens differences, and aggregate.rule {rule!r} does "
                "not join by differences; use 'delta'"
            )
        if method == "root-cosine":
            self._check_root()

    def _check_root(self) -> None:
        """Refuse rounds in which the root site may not take part, or has no say."""
        if not self.defence.root_site:
            raise ValueError(
                "defence.method 'root-cosine' needs defence.root_site, the name of a site with "
                "clean data"
            )
        if self.run.devices_per_round not in (0, self.devices):
            raise ValueError(
                "defence.method 'root-cosine' needs the root site in every round: expected "
                f"run.devices_per_round = 0, found {self.run.devices_per_round}"
            )
        rounds = self.rounds
        if rounds.mode != "sync" or rounds.close_count or rounds.close_fraction < 1:
            raise ValueError(
                "defence.method 'root-cosine' needs the root site in every round: expected "
                "rounds.mode = 'sync' without close_count and close_fraction, which close a round "
                "before all have reported"
            )

    def _check_optimizer(self) -> None:
        """Refuse to keep a state that there is not, or that would be left behind."""
        if not self.train.keep_optimizer:
            return
        if self.train.optimizer != "adamw":
            raise ValueError(
                "train.keep_optimizer goes with train.optimizer = 'adamw', found "
                f"{self.train.optimizer!r}"
            )
        if self.simulation.backend == "ray":
            raise ValueError(
                "train.keep_optimizer goes with simulation.backend = 'inprocess': 'ray' moves "
                "devices between processes, and the optimiser's state would stay behind"
            )

    def _check_way(self) -> None:
        """Refuse ways to train that exclude each other, or that a rule cannot join."""
        rows = {"train.way": self.train.way == "s2ft", "lora.start": self.lora.start != "random"}
        if all(rows.values()):
            raise ValueError(
                f"train.way 's2ft' takes the place of lora.start = {self.lora.start!r}: both "
                "choose the fresh rows of A; leave lora.start at 'random'"
            )
        chosen = next((key for key, own in rows.items() if own), None)
        if chosen is not None and self.aggregate.rule == "zero-pad":
            value = self.train.way if chosen == "train.way" else self.lora.start
            raise ValueError(
                f"aggregate.rule 'zero-pad' averages A apart from B, and with {chosen} = {value!r} "
                "devices choose rows of A themselves; use 'delta'"
            )

    def _check_wire(self) -> None:
        """Refuse to keep on a device what would be left behind in another process."""
        keeps = self.wire.error_feedback and self.wire.up != "fp32"
        if keeps and self.simulation.backend == "ray":
            raise ValueError(
                f"wire.up = {self.wire.up!r} with wire.error_feedback goes with "
                "simulation.backend = 'inprocess': 'ray' moves devices between processes, and what "
                "they keep would stay behind; set wire.error_feedback to false"
            )

    def _check_rounds(self) -> None:
        """Refuse rounds that could not close, or times that nobody could tell."""
        rounds, asked = self.rounds, self.run.devices_per_round or self.devices
        least = self.run.minimum_devices
        if rounds.close_count and not least <= rounds.close_count <= asked:
            raise ValueError(
                f"rounds.close_count = {rounds.close_count}: expected a count from "
                f"run.minimum_devices = {least} to {asked}, the devices of a round"
            )
        if rounds.mode == "async":
            self._check_async()
        simulation = self.simulation
        timed = (simulation.backend, simulation.clock) == ("inprocess", "virtual")
        if simulation.delay != "none" and not timed:
            raise ValueError(
                f"simulation.delay = {simulation.delay!r} goes with simulation.backend = "
                f"'inprocess' and simulation.clock = 'virtual', found {simulation.backend!r} and "
                f"{simulation.clock!r}"
            )

    def _check_async(self) -> None:
        rounds = self.rounds
        if self.aggregate.rule != "delta":
            raise ValueError(
                "rounds.mode 'async' goes with aggregate.rule = 'delta', found "
                f"{self.aggregate.rule!r}: only differences to older adapters can be joined exactly"
            )
        if rounds.late == "refuse":
            raise ValueError(
                "rounds.mode 'async' goes with rounds.late = 'fold', found 'refuse': most of its "
                "updates are late"
            )
        if rounds.close_count == 0 and rounds.close_fraction == 1.0:
            raise ValueError(
                "rounds.mode 'async' needs rounds.close_count, or a rounds.close_fraction below 1, "
                "to say after how many updates a round closes"
            )

    def _check_turns(self) -> None:
        """Refuse limits on the devices' rounds that leave too few for the last one."""
        if not self.fleet or any(each.rounds_max == 0 for each in self.fleet.values()):
            return
        turns = sum(each.count * each.rounds_max for each in self.fleet.values())
        wanted = self.run.rounds * self.run.minimum_devices
        if turns < wanted:
            raise ValueError(
                f"fleet.*.rounds_max lets devices take part {turns} times, expected at least "
                f"{wanted}: run.rounds x run.minimum_devices; raise it or play fewer rounds"
            )

    @property
    def devices(self) -> int:
        """Number of devices in the fleet; without one, of the sites of the deployment."""
        if self.fleet:
            return sum(c.count for c in self.fleet.values())
        named = 0 if "*" in self.deployment.sites else len(self.deployment.sites)
        return named or max(1, self.run.minimum_devices, self.run.devices_per_round)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.outputs.folder or f"runs/{self.run.name}")


def _check_pins(name: str, device_class: DeviceClassSection, batch_size: int) -> None:
    """Refuse pinned values that no plan could hold."""
    pinned = device_class.format
    if pinned is not None and pinned not in device_class.formats:
        raise ValueError(
            f"fleet.{name}.format = {pinned!r}: expected one of fleet.{name}.formats "
            f"({', '.join(device_class.formats)})"
        )
    if device_class.micro_batch and batch_size % device_class.micro_batch:
        raise ValueError(
            f"fleet.{name}.micro_batch = {device_class.micro_batch}: expected a divisor of "
            f"train.batch_size = {batch_size}"
        )
    if device_class.rank_max and device_class.rank > device_class.rank_max:
        raise ValueError(
            f"fleet.{name}.rank = {device_class.rank}: expected at most "
            f"fleet.{name}.rank_max = {device_class.rank_max}"
        )
