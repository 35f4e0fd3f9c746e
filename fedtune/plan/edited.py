"""A plan from a file: read, checked against the devices and the base, and priced anew.

Whatever a person wrote is either what the run does, or is refused in one line before anything is
loaded. What binds here are facts: memory, formats, sizes of matrices, and the limits of the run
file (`lora.rank_cap`, `data.max_tokens`, `upload`, `plan.round_seconds`). What the run file pins or
prefers for the planner is not asked again, because the file stands in the planner's place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedtune.errors import PlanError
from fedtune.plan.forms import parse_form
from fedtune.plan.predict import Prediction, predict
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.shortfall import human_bytes
from fedtune.plan.written import Entry, WrittenPlan, listed, nearest
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    FleetPlan,
    MatrixForm,
    MatrixPlan,
    MatrixShape,
    ModelShapes,
)

_WAYS = {
    "weights": "a format of fewer bits",
    "correction": "a lower rank behind the + of a format",
    "adapters": "lower ranks",
    "optimiser": "lower ranks",
    "activations": "a lower micro_batch or sequence_length, or checkpointing",
    "transient": "a lower micro_batch or sequence_length",
    "workspace": "another base model, since one matrix is unpacked at a time",
}
"""Part of the peak -> what in an entry lowers it."""


def unknown_devices(written: WrittenPlan, known: Collection[str]) -> str:
    """A line that names the devices of the file that the run does not have; empty if none."""
    strangers = sorted(set(written.devices) - set(known))
    if not strangers:
        return ""
    return f"the plan names devices that the run does not have: {listed(strangers)}" + nearest(
        strangers[0], known, f"; the run has {listed(sorted(known))}"
    )


def follow_plan(
    written: WrittenPlan,
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    pins: Mapping[str, Pins] | None = None,
    calibration: Mapping[str, CostCalibration] | None = None,
) -> FleetPlan:
    """The plan of each device as the file has it, with predictions of its own.

    Args:
        profiles: of the devices that take part; the file may name more.
        pins: device class -> what the run file fixes; of it, only the limit of what is sent.
        calibration: device class -> what a measured step said of the predictions.

    Raises:
        PlanError: the file is for another base, lacks a device or a key, or asks of a device what
            it cannot do.
    """
    _check_base(written, shapes)
    _check_complete(written, profiles)
    by_name, known = shapes.by_name(), tuple(m.name for m in shapes.matrices)
    for place, entry in _entries(written):
        _check_matrices(place, entry, known)
    made: dict[tuple[object, ...], DevicePlan] = {}
    plans = []
    for profile in sorted(profiles, key=lambda profile: profile.name):
        own, usual = _entries_of(written, profile)
        # Devices that differ in nothing but their names are read once.
        key = (profile.name if own else "", id(usual), repr(replace(profile, name="-")))
        if key not in made:
            where = f"device {profile.name} ({profile.device_class})"
            plan = _Reading(where, own or Entry(), usual, settings).plan(by_name, profile)
            measured = (calibration or {}).get(profile.device_class)
            cost = predict(plan, profile, shapes, settings, measured)
            limits = (pins or {}).get(profile.device_class, Pins())
            _check_cost(where, profile, cost, settings, limits)
            made[key] = _priced(plan, cost)
        plans.append(replace(made[key], device=profile.name))
    return FleetPlan(tuple(plans))


def _priced(plan: DevicePlan, cost: Prediction) -> DevicePlan:
    return replace(
        plan,
        peak_bytes=cost.peak_bytes,
        seconds=cost.seconds,
        download_bytes=cost.download_bytes,
        upload_bytes=cost.upload_bytes,
        binding="the plan's file",
    )


class _Reading:
    """One device's entry over its class's, and the checks of each value on the way to a plan."""

    def __init__(self, where: str, own: Entry, usual: Entry, settings: PlanSettings) -> None:
        self._where, self._own, self._usual, self._settings = where, own, usual, settings

    def plan(self, shapes: Mapping[str, MatrixShape], profile: DeviceProfile) -> DevicePlan:
        """The device's plan, without predictions."""
        batch_size, micro_batch = self._number("batch_size"), self._number("micro_batch")
        if batch_size % micro_batch:
            raise self._refused(
                f"batch_size {batch_size} is no multiple of micro_batch {micro_batch}"
            )
        tokens, longest = self._number("sequence_length"), self._settings.sequence_length
        if tokens > longest:
            raise self._refused(
                f"sequence_length is {tokens}, and samples have at most data.max_tokens = {longest}"
            )
        matrices = tuple(self._matrix(shape, profile) for shape in shapes.values())
        trained = [shapes[matrix.name].layer for matrix in matrices if matrix.rank > 0]
        if not trained:
            raise self._refused("no matrix has a rank above 0, so that nothing would be trained")
        return DevicePlan(
            device=profile.name,
            matrices=matrices,
            micro_batch=micro_batch,
            batch_size=batch_size,
            sequence_length=tokens,
            local_steps=self._number("local_steps"),
            checkpointing=bool(self._value("checkpointing")),
            first_trained_layer=min(trained),
        )

    def _matrix(self, shape: MatrixShape, profile: DeviceProfile) -> MatrixPlan:
        form, rank = self._form(shape, profile), self._rank(shape)
        return MatrixPlan(
            name=shape.name,
            rank=rank,
            format=form.format,
            tail_rank=self._tail(shape, rank),
            block_size=form.block_size,
            correction_rank=min(form.correction_rank, shape.out_features, shape.in_features),
        )

    def _form(self, shape: MatrixShape, profile: DeviceProfile) -> MatrixForm:
        text = self._of_matrix("format", "formats", shape.name)
        try:
            form = parse_form(text)
        except ValueError as error:
            raise self._refused(f"format {text!r} of {shape.name}: {error}") from None
        if form.format not in profile.formats:
            raise self._refused(
                f"{shape.name} is to be held as {form.format}, and the device supports "
                f"{', '.join(profile.formats)}"
            )
        return form

    def _rank(self, shape: MatrixShape) -> int:
        rank = int(self._of_matrix("rank", "ranks", shape.name))
        side = min(shape.out_features, shape.in_features)
        if not 0 <= rank <= side:
            raise self._refused(
                f"rank {rank} of {shape.name}: expected 0 to {side}, the shorter side of its "
                f"{shape.out_features} x {shape.in_features}"
            )
        if rank > self._settings.rank_cap:
            raise self._refused(
                f"rank {rank} of {shape.name}: the coordinator keeps at most lora.rank_cap = "
                f"{self._settings.rank_cap}"
            )
        return rank

    def _tail(self, shape: MatrixShape, rank: int) -> int:
        """As the planner has it: at most `tail`, the cap's rest, and the matrix's rest."""
        tail, most = int(self._value("tail")), self._settings.tail_max
        if self._settings.whole_tail:
            return min(self._settings.rank_cap, shape.out_features, shape.in_features)
        if not 0 <= tail <= most:
            raise self._refused(
                f"tail is {tail}: expected 0 to {most}, by lora.tail_rank and aggregate.rule"
            )
        cap = min(self._settings.rank_cap, shape.out_features, shape.in_features)
        return max(0, min(tail, cap - rank))

    def _number(self, key: str) -> int:
        return int(self._value(key))

    def _value(self, key: str) -> Any:  # a key's type is checked when the file is read
        for entry in (self._own, self._usual):
            value = getattr(entry, key)
            if value is not None:
                return value
        raise self._refused(f"neither its entry nor its class's has {key}")

    def _of_matrix(self, key: str, single: str, name: str) -> Any:  # as `_value`
        """What single matrices are given goes before what an entry gives to all."""
        for entry in (self._own, self._usual):
            if name in getattr(entry, single):
                return getattr(entry, single)[name]
            if getattr(entry, key) is not None:
                return getattr(entry, key)
        raise self._refused(f"{name} has no {key}: give one in {single}, or one for all as {key}")

    def _refused(self, reason: str) -> PlanError:
        return PlanError(f"the plan of {self._where}: {reason}")


# ---------------------------------------------------------------- checks


def _check_base(written: WrittenPlan, shapes: ModelShapes) -> None:
    again = "make a plan for this one with: fedtune plan RUN.toml"
    digest, headers = written.base.digest, written.base.headers
    if digest and shapes.digest:
        if digest != shapes.digest:
            raise PlanError(
                f"the plan is for base {digest[:12]}, and the run's base is "
                f"{shapes.digest[:12]}; {again}"
            )
    elif headers and shapes.headers:
        if headers != shapes.headers:
            raise PlanError(
                f"the plan is for a base with headers {headers[:12]}, and the run's base has "
                f"{shapes.headers[:12]}: another architecture, dtype or split of files; {again}"
            )
    else:
        raise PlanError(f"the plan does not say for which base it is (base.headers); {again}")


def _check_complete(written: WrittenPlan, profiles: Sequence[DeviceProfile]) -> None:
    """Refuse a device without an entry, and an entry of a class that is not there."""
    without = [
        profile
        for profile in profiles
        if profile.name not in written.devices and profile.device_class not in written.classes
    ]
    if without:
        raise PlanError(
            f"the plan has no entry for {listed(sorted(p.name for p in without))}; add them to "
            f"its devices, or {without[0].device_class!r} to its classes"
        )
    for name, entry in written.devices.items():
        named = entry if isinstance(entry, str) else entry.class_
        if named is not None and named not in written.classes:
            raise PlanError(
                f"the plan of device {name} names class {named!r}, which its classes do not have"
                + nearest(named, written.classes, f": {listed(sorted(written.classes)) or 'none'}")
            )


def _entries(written: WrittenPlan) -> Iterable[tuple[str, Entry]]:
    for name, entry in written.classes.items():
        yield f"class {name}", entry
    for name, device in written.devices.items():
        if isinstance(device, Entry):
            yield f"device {name}", device


def _entries_of(written: WrittenPlan, profile: DeviceProfile) -> tuple[Entry | None, Entry]:
    """The device's own entry if it has one, and that of its class."""
    found = written.devices.get(profile.name, profile.device_class)
    if isinstance(found, str):
        return None, written.classes[found]
    usual = Entry() if found.class_ is None else written.classes[found.class_]
    return found, usual


def _check_matrices(place: str, entry: Entry, known: Sequence[str]) -> None:
    names = set(known)
    for key, named in (("formats", entry.formats), ("ranks", entry.ranks)):
        for name in named:
            if name not in names:
                raise PlanError(
                    f"the plan of {place}: {key} names matrix {name!r}, which the base does not "
                    "have or lora.targets leaves out" + nearest(name, known, "")
                )


def _check_cost(
    where: str, profile: DeviceProfile, cost: Prediction, settings: PlanSettings, pins: Pins
) -> None:
    """Refuse a plan over the device's memory, its limit of what it sends, or the round's time."""
    start, budget = f"the plan of {where}", profile.budget_bytes
    over = cost.peak_bytes - budget
    if over > 0:
        part = max(cost.parts, key=cost.parts.__getitem__)
        raise PlanError(
            f"{start} needs {human_bytes(cost.peak_bytes)} of memory, {human_bytes(over)} more "
            f"than its budget of {human_bytes(budget)}; its largest part, {part}, takes "
            f"{human_bytes(cost.parts[part])}: choose {_WAYS.get(part, 'a smaller plan')}"
        )
    limits = {
        f"fleet.{profile.device_class}.upload": pins.upload_bytes,
        "plan.max_bytes": settings.upload_bytes,
    }
    for key, limit in limits.items():
        if 0 < limit < cost.upload_bytes:
            raise PlanError(
                f"{start} sends {human_bytes(cost.upload_bytes)} a round, and {key} is "
                f"{human_bytes(limit)}; choose lower ranks, or raise it"
            )
    if 0 < settings.round_seconds < cost.seconds:
        raise PlanError(
            f"{start} takes {cost.seconds:.3g} s a round, and plan.round_seconds is "
            f"{settings.round_seconds:g}; choose fewer local_steps or lower ranks"
        )
