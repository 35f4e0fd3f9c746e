"""Sections on the run: its rounds, joining, messages, where it happens, what it leaves."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from fedtune.coding import CodecName
from fedtune.sections.section import Section, split_text


class RunSection(Section):
    """How long the run is and who takes part in a round."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="names the run folder; letters, digits, '.', '_' and '-'",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="fixes every random choice: sites, plan, batches"
    )
    rounds: int = Field(10, ge=1, description="times that the devices' adapters are joined")
    devices_per_round: int = Field(
        0, ge=0, description="devices that train in one round; 0: all of them"
    )
    minimum_devices: int = Field(1, ge=1, description="fewer reports than this fail the round")
    round_deadline_s: float = Field(
        3600.0,
        gt=0,
        description="seconds after which a round goes on without late devices; for each device in "
        "a simulation where they take turns",
    )


class RoundsSection(Section):
    """When a round closes, who is asked, and what becomes of those who are late."""

    mode: Literal["sync", "async"] = Field(
        "sync",
        description="`sync`: a round waits for its own devices; `async`: it closes after "
        "`close_count` updates of any round, and devices that reported get new work (FedBuff)",
    )
    close_count: int = Field(
        0, ge=0, description="a round closes when so many have reported; 0: `close_fraction` says"
    )
    close_fraction: float = Field(
        1.0, gt=0, le=1, description="share of a round's devices after whose reports it closes"
    )
    late: Literal["fold", "refuse"] = Field(
        "fold",
        description="`fold`: an update that comes after its round has closed counts in a later "
        "one, by its staleness (`aggregate.rule` `delta`; others refuse); `refuse`: it does not",
    )
    staleness_limit: int = Field(
        2, ge=1, le=1000, description="rounds by which an update may be late and still count"
    )
    staleness_power: float = Field(
        0.5,
        ge=0,
        le=10,
        description="an update that is s rounds late counts (1 + s) to the power of minus this",
    )
    repeats: int = Field(
        2,
        ge=0,
        le=100,
        description="times that a round of too few good updates is played again with others",
    )
    sampling: Literal["fair", "uniform"] = Field(
        "fair",
        description="for `run.devices_per_round`: `fair`: who was left out longest goes first; "
        "`uniform`: by draw",
    )


class DefenceSection(Section):
    """What protects the joined adapter from devices that send bad updates."""

    method: Literal["none", "clip", "multi-krum", "geometric-median", "root-cosine"] = Field(
        "none",
        description="`clip`: no update is longer than the others; `multi-krum`: also, those that "
        "point away from most are left out; `geometric-median`: far ones count little; "
        "`root-cosine`: an update counts by its cosine with `root_site`'s",
    )
    assumed_share: float = Field(
        0.2, ge=0, lt=0.5, description="for `multi-krum`: share of devices that may be hostile"
    )
    clip_factor: float = Field(
        1.0,
        gt=0,
        description="for all but `geometric-median`: longest update, as a multiple of the median "
        "length, or of `root_site`'s for `root-cosine`",
    )
    root_site: str = Field(
        "", description="for `root-cosine`: a site that the coordinator trusts, with clean data"
    )


class AggregateSection(Section):
    """How unequal adapters are joined."""

    rule: Literal["delta", "zero-pad", "flexlora", "flora"] = Field(
        "delta",
        description="`delta` joins differences exactly; the others are published baselines",
    )
    weights: Literal["samples", "tokens", "uniform"] = Field(
        "samples",
        description="what a device counts by: samples its site holds, tokens trained on, or all "
        "the same",
    )
    server_step: float = Field(
        1.0,
        gt=0,
        description="factor of each round's joined update; for `adam`: by how much a weight moves "
        "in a round, at most 0.1",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last update kept; 0: none")
    optimizer: Literal["average", "adam"] = Field(
        "average",
        description="`average`: the joined update, with momentum if set; `adam`: FedAdam, on the "
        "products of the factors, with squares by row and column",
    )
    beta2: float = Field(0.99, ge=0, lt=1, description="for `adam`: decay of the squares")
    adaptivity: float = Field(
        1e-3, gt=0, description="for `adam`: tau, below which a weight's changes count as small"
    )
    keep_dropped: bool = Field(
        False,
        description="add what `lora.rank_cap` cut off in a round to the next one (error feedback): "
        "as many further directions",
    )


class WireSection(Section):
    """How tensors travel."""

    down: CodecName = Field(
        "fp32",
        description="form of the adapters that are sent to the devices; `q4`, `q3`, `q2`: 4, 3 "
        "and 2 bits in blocks of 64",
    )
    up: CodecName = Field("fp32", description="form of the updates that the devices send back")
    error_feedback: bool = Field(
        True, description="a device adds what `up` rounded off to its next update"
    )


class SimulationSection(Section):
    """How `fedtune simulate` runs the fleet on this machine."""

    backend: Literal["inprocess", "ray"] = Field(
        "inprocess", description="`inprocess` needs nothing more; `ray` runs devices in parallel"
    )
    threads: int = Field(0, ge=0, description="torch threads per device; 0: all cores")
    workers: int = Field(1, ge=1, description="for `ray`: devices that train at the same time")
    devices_per_pass: int = Field(
        16,
        ge=1,
        le=1024,
        description="for `inprocess`: devices of like plans that train side by side in one pass; "
        "changes speed and memory, not the result; 1: one by one",
    )
    accelerator: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the simulated devices compute; their budgets stay their own"
    )
    clock: Literal["virtual", "measured"] = Field(
        "virtual",
        description="`virtual`: a device takes the seconds that its class predicts, and nothing "
        "is planned anew; `measured`: those that it takes on this machine",
    )
    delay: Literal["none", "lognormal", "pareto"] = Field(
        "none",
        description="for clock `virtual`: what a device's seconds in a round are multiplied by, "
        "drawn by the seed with a median of 1",
    )
    delay_spread: float = Field(
        1.0,
        gt=0,
        le=10,
        description="for `delay`: sigma of `lognormal`, or one over the exponent of `pareto`",
    )


class DeploymentSection(Section):
    """Which sites take part where `fedtune run` plays the run on real machines."""

    sites: Annotated[tuple[str, ...], BeforeValidator(split_text)] = Field(
        (),
        description="names of the sites that take part; `*`: all that are enrolled; empty: "
        "the run file is for simulations",
    )
    minimum: int = Field(
        0, ge=0, description="sites that must be there before the run starts; 0: all of `sites`"
    )
    deadline_s: float = Field(
        600.0,
        gt=0,
        description="seconds to wait for sites that are not there, at the start and in a round "
        "that needs them",
    )
    slack: float = Field(
        3.0,
        ge=1,
        description="times that a device may take what its plan and its measured link say, before "
        "a round goes on without it",
    )
    group: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,99})?$",
        description="the site of another coordinator that this one's sites are together: the run "
        "plays what is asked of that site, and no rounds of its own (docs/hierarchy.md)",
    )


ExportName = Literal["merged", "peft", "onnx"]


class OutputsSection(Section):
    """What is left on disk."""

    folder: str = Field("", description="the run folder; empty: runs/<run.name>")
    exports: Annotated[tuple[ExportName, ...], BeforeValidator(split_text)] = Field(
        get_args(ExportName), description="what is written when the run ends; [] for nothing"
    )
    keep_checkpoints: int = Field(3, ge=1, description="how many of the last rounds to keep")
