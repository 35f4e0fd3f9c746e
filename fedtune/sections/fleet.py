"""Sections on the devices, and on how a plan for them is found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fedtune.catalogue import CATALOGUE, section_values, unknown_device
from fedtune.records import FormatName, ImportanceMethod
from fedtune.sections.section import Bytes, Section, split_text


class DeviceClassSection(Section):
    """One class of devices in the fleet, and how many there are."""

    count: int = Field(ge=1, description="devices of this class; each holds one site")
    device: str = Field(
        "",
        description="a device of the catalogue (`fedtune probe --catalogue`), for `memory`, "
        "`flops_per_s`, `memory_bandwidth`, `link` and `formats` where they are not set",
    )
    sites: Annotated[tuple[str, ...], BeforeValidator(split_text)] = Field(
        (), description="sites that sit on this class; the others are dealt out by the seed"
    )
    memory: Bytes = Field(gt=0, description="budget of one training process on the device, bytes")
    flops_per_s: float = Field(
        1e10,
        gt=0,
        description="floating-point operations per second in the dtype that it computes in",
    )
    memory_bandwidth: Bytes = Field(10**10, gt=0, description="bytes per second")
    link: Bytes = Field(10**7, gt=0, description="bytes per second to and from the coordinator")
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(split_text)] = Field(
        ("fp32", "bf16", "int8", "q4", "nf4"),
        min_length=1,
        description="backbone formats that the device may use",
    )
    upload: Bytes = Field(
        0, description="largest update that a device sends in a round, such as '5 MB'; 0: no limit"
    )
    rank_max: int = Field(0, ge=0, description="own limit of the rank; 0: lora.rank_max")
    rank: int = Field(0, ge=0, description="pin every matrix to this rank; 0: planned")
    format: FormatName | None = Field(
        None, description="pin the backbone's format; without this key: planned"
    )
    correction_rank: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="pin the rank of the frozen pair that repairs each matrix of 4 bits or fewer; "
        "without this key: planned",
    )
    rounds_max: int = Field(
        0, ge=0, description="rounds of a run that a device takes part in at most; 0: no limit"
    )
    micro_batch: int = Field(0, ge=0, description="pin the samples per forward pass; 0: planned")
    devices_max: int = Field(
        1,
        ge=1,
        description="most devices that a site of this class may stand for, as their coordinator; "
        "1: it is a device itself (docs/hierarchy.md)",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: object) -> object:
        """What a section does not set itself, it has from its device.

        It happens before anything is checked, so that the effective configuration holds the figures
        themselves, and a run is the same when the catalogue has changed.
        """
        if not isinstance(values, dict) or not isinstance(values.get("device"), str):
            return values
        device = CATALOGUE.get(values["device"])
        return values if device is None else section_values(device) | values

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if name and name not in CATALOGUE:
            raise ValueError(unknown_device(name))
        return name


class ImportanceSection(Section):
    """How the weights that matter are found before the fleet is planned."""

    method: ImportanceMethod = Field(
        "sensitivity",
        description="what the gain of a further rank is read from: |weight x gradient| "
        "(`sensitivity`), spectra of the gradient (`spectrum`), the inputs (`activation`), the "
        "sensitivity of singular triplets (`adalora`), nothing (`uniform`), or a draw (`random`)",
    )
    batches: int = Field(
        4, ge=1, description="batches of `train.batch_size` samples that a device measures on"
    )
    devices: int = Field(
        0, ge=0, description="devices that measure, drawn by the seed; 0: all of them"
    )
    file: str = Field(
        "",
        description="a report that an earlier run left (`importance.json`); empty: measured by "
        "the devices before round 1",
    )


class PlanSection(Section):
    """Limits and aims of the whole fleet's plan."""

    round_seconds: float = Field(
        0.0, ge=0, description="longest planned round in seconds; 0: no limit"
    )
    makespan_weight: float = Field(
        1.0,
        ge=0,
        description="how much a shorter round counts; a plan is chosen by gain to the power of "
        "`gain_weight` over seconds to the power of this; 0: only what is learned counts",
    )
    gain_weight: float = Field(
        2.0, ge=0, description="how much what the devices learn in a round counts; see above"
    )
    steps: Literal["planned", "equal"] = Field(
        "planned",
        description="`planned`: slow devices take fewer local steps; `equal`: all take "
        "`train.local_steps`, unless `round_seconds` forbids it",
    )
    max_bytes: Bytes = Field(
        0, description="largest update of any device in a round, such as '5 MB'; 0: no limit"
    )
    shortest_sequence: int = Field(
        0,
        ge=0,
        description="a device that cannot carry samples of `data.max_tokens` may cut them down "
        "to this many tokens; 0: it may not",
    )
    solver: Literal["milp", "greedy"] = Field(
        "milp",
        description="`milp`: a mixed-integer program refines the greedy plan within "
        "`solver_seconds`; `greedy`: the greedy plan",
    )
    solver_seconds: float = Field(
        20.0, gt=0, description="longest time that the whole fleet's programs may take"
    )
    file: str = Field(
        "", description="a plan to follow, as `fedtune plan` writes it (`--plan`); empty: planned"
    )
    replan: bool = Field(
        True, description="plan a device anew when its time or memory is not as planned"
    )
    replan_threshold: float = Field(
        0.25,
        gt=0,
        description="share by which measured seconds may differ from the plan's before it is "
        "made anew",
    )
    checkpointing: bool = Field(True, description="allow gradient checkpointing to save memory")
    widths: Literal["mixed", "uniform"] = Field(
        "mixed",
        description="`mixed`: memory that a backbone of 4 bits or fewer leaves buys single "
        "matrices a better form; `uniform`: all matrices of a device alike",
    )
    distortion: str = Field(
        "",
        description="for `mixed`: a table of what each matrix loses in each form, as `fedtune "
        "measure` writes it; empty: measured where the base is at hand, as in a simulation",
    )
    correction_rank: int = Field(
        8,
        ge=0,
        le=1024,
        description="for `mixed`: highest rank of the frozen pair that repairs a matrix on its "
        "device; 0: no pairs",
    )
