"""Sections on the run: its rounds, joining, messages, where it happens, what it leaves."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

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
    server_step: float = Field(1.0, gt=0, description="factor of each round's joined update")
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last update kept; 0: none")


class WireSection(Section):
    """How tensors travel."""

    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the adapters in messages; float16 halves the bytes"
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


ExportName = Literal["merged", "peft", "onnx"]


class OutputsSection(Section):
    """What is left on disk."""

    folder: str = Field("", description="the run folder; empty: runs/<run.name>")
    exports: Annotated[tuple[ExportName, ...], BeforeValidator(split_text)] = Field(
        get_args(ExportName), description="what is written when the run ends; [] for nothing"
    )
    keep_checkpoints: int = Field(3, ge=1, description="how many of the last rounds to keep")
