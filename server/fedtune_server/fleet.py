"""Who takes part: wait for the devices, ask each what it is, and check that they fit together."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.serverapp import Grid

from fedtune.errors import ProtocolError, RoundError, RunError
from fedtune.records import DeviceProfile, Event, SiteReport
from fedtune.wire.flower import PROFILE, to_record
from fedtune.wire.messages import TaskSpec, decode_site_report, encode_task_spec
from fedtune_server.presence import Again
from fedtune_server.questions import ask

Emit = Callable[[Event], None]
Objection = Callable[[int, str], str]
"""Node and the name that it gives itself -> why it does not take part; empty where it may."""

_POLL_S = 0.05
_MOST_DENSE = 2**26
"""Parameters of a task head; with 4096 hidden features and 10,000 labels there are 41 million."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The devices of a run, by name, in the order of their names.

    Attributes:
        labels: class names of all sites together, sorted; empty unless classifying.
        dense_shapes: shapes of the parameters that are trained whole.
    """

    nodes: Mapping[str, int]
    reports: Mapping[str, SiteReport]
    labels: tuple[str, ...]
    dense_shapes: Mapping[str, tuple[int, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.reports)


def wait_for_nodes(grid: Grid, expected: int, deadline_s: float) -> list[int]:
    """Node ids, once `expected` of them are there.

    Raises:
        RoundError: fewer came within the deadline.
    """
    end = time.monotonic() + deadline_s
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > end:
            raise RoundError(
                f"expected {expected} devices within {deadline_s:g} s, found {len(nodes)}; "
                "start the missing devices or lower the counts under [fleet]"
            )
        time.sleep(_POLL_S)
    return nodes[:expected]


def gather_fleet(
    grid: Grid,
    nodes: Sequence[int],
    task: TaskSpec,
    deadline_s: float,
    emit: Emit,
    objection: Objection = lambda node, name: "",
    called: Callable[[int], str] = "node {}".format,
    again: Again | None = None,
) -> Fleet:
    """Ask every node what it is and keep those that can take part.

    A device that fails, or holds another base, is excluded with its reason; the run goes on.

    A device whose name is taken, or that would train other parameters whole than most, is left
    out as well: one device cannot stop the others.

    Args:
        called: what a person calls a node that has not said its name.
        again: how nodes that come and go are asked again; default: they stay.

    Raises:
        RunError: none can take part.
    """
    reports: dict[str, SiteReport] = {}
    node_of: dict[str, int] = {}
    last_reason = "no device answered"
    for node, report in ask_profiles(grid, nodes, task, deadline_s, objection, called, again):
        if isinstance(report, SiteReport) and report.profile.name in reports:
            name = report.profile.name
            report = f"another device is called {name!r}; give it a name of its own"
        if isinstance(report, str):
            last_reason = report
            emit(excluded(called(node), report))
            continue
        reports[report.profile.name], node_of[report.profile.name] = report, node
    reports = _of_one_kind(dict(sorted(reports.items())), emit)
    if not reports:
        raise RunError(f"no device can take part; the last reason: {last_reason}")
    for report in reports.values():
        announce(report, emit)
    _tell_missing_labels(reports, emit)
    return fleet_of({name: node_of[name] for name in reports}, reports)


def ask_profiles(
    grid: Grid,
    nodes: Sequence[int],
    task: TaskSpec,
    deadline_s: float,
    objection: Objection = lambda node, name: "",
    called: Callable[[int], str] = "node {}".format,
    again: Again | None = None,
) -> Iterator[tuple[int, SiteReport | str]]:
    """What each node says of itself, as it comes, or why it cannot take part."""
    request = encode_task_spec(task)
    by_token = {f"node {node}": node for node in nodes}
    contents = {token: to_record(PROFILE, request) for token in by_token}
    for answer in ask(
        grid, contents, by_token, kind=PROFILE, group="profile", deadline_s=deadline_s,
        again=again, called=lambda token: called(by_token[token]),
    ):  # fmt: skip
        node = by_token[answer.device]
        yield node, judged_report(answer.failure, answer.body, task, node, objection)


def judged_report(
    failure: str, body: bytes, task: TaskSpec, node: int, objection: Objection
) -> SiteReport | str:
    """What a node's answer says of it, or why it cannot take part."""
    try:
        report = _read_report(failure, body, task)
    except ProtocolError as error:
        return str(error)
    return objection(node, report.profile.name) or report


def excluded(device: str, reason: str) -> Event:
    """Tells of a device that cannot take part."""
    return Event("site_excluded", {"device": device, "reason": reason})


def without_unannounced_groups(fleet: Fleet, most: Mapping[str, int], emit: Emit) -> Fleet:
    """The fleet without sites that would count as more devices than the run file allows them.

    Args:
        most: class of devices -> devices that a site of it may stand for; others: one.

    Raises:
        RunError: none is left.
    """
    kept = {}
    for name, report in fleet.reports.items():
        if reason := stands_for_too_many(report, most):
            emit(excluded(name, reason))
        else:
            kept[name] = fleet.nodes[name]
    if not kept:
        raise RunError("no device can take part: each stands for more devices than its class may")
    reports = {name: fleet.reports[name] for name in kept}
    return fleet if len(kept) == len(fleet.nodes) else fleet_of(kept, reports)


def stands_for_too_many(report: SiteReport, most: Mapping[str, int]) -> str:
    """Why a site would count as more devices than the run file allows; empty where it may."""
    allowed = most.get(report.profile.device_class, 1)
    if report.devices <= allowed:
        return ""
    return (
        f"{report.profile.name} stands for {report.devices} devices, and its class "
        f"{report.profile.device_class!r} allows {allowed}; raise devices_max of the class"
    )


def fleet_of(nodes: Mapping[str, int], reports: Mapping[str, SiteReport]) -> Fleet:
    """The fleet of some nodes; its labels and heads are those of all the reports.

    Args:
        nodes: device -> node, of the devices that are there.
        reports: device -> what it said before the first round; of all devices of the run.
    """
    labels = _labels(reports)
    dense = next(iter(reports.values())).dense
    return Fleet(
        nodes=nodes,
        reports={name: report for name, report in reports.items() if name in nodes},
        labels=labels,
        dense_shapes={
            name: tuple(len(labels) if axis == 0 else axis for axis in shape)
            for name, shape in dense.items()
        },
    )


def find_again(
    gather: Callable[[Emit], Fleet], known: Mapping[str, SiteReport], emit: Emit, *, live: bool
) -> Fleet:
    """The fleet of a run that goes on: those of its devices that are there.

    What they said before the first round stands, since the run was planned with it; data that is
    other than it was then is told of.

    Args:
        gather: finds the devices that are there now.
        live: devices come and go: one that the run does not know may still join it.

    Raises:
        RunError: none of them is there.
    """
    told: list[Event] = []
    now = gather(told.append)
    for event in told:
        if event.kind in ("site_excluded", "sites_awaited", "device_asked_again"):
            emit(event)
    for name in sorted(now.reports.keys() - known.keys()):
        if not live:
            reason = (
                f"{name} was not there when the run was planned; it can take part in the next run"
            )
            emit(excluded(name, reason))
    for name in known.keys() & now.reports.keys():
        tell_changed_data(now.reports[name], known[name], emit)
    for name in sorted(known.keys() - now.reports.keys()):
        emit(excluded(name, f"{name} did not come back; the run goes on without it"))
    found = {name: now.nodes[name] for name in known if name in now.nodes}
    if not found:
        raise RunError(
            f"none of the run's devices came back; expected {', '.join(list(known)[:5])}, found "
            f"{', '.join(list(now.reports)[:5])}; start the sites under their names of before"
        )
    return fleet_of(found, known)


def tell_changed_data(now: SiteReport, before: SiteReport, emit: Emit) -> None:
    """Warn of data that is other than it was when the run was planned."""
    if _data(now) != _data(before):
        name = before.profile.name
        text = f"the data of {name} changed while the run was interrupted; the plan stays"
        emit(Event("warning", {"text": text}))


def _data(report: SiteReport) -> tuple[object, ...]:
    return report.train_samples, report.held_out_samples, report.train_tokens, report.labels


def ask_again(
    grid: Grid,
    fleet: Fleet,
    names: Sequence[str],
    task: TaskSpec,
    deadline_s: float,
    again: Again | None = None,
) -> dict[str, DeviceProfile]:
    """What some devices say of themselves now, of those that answer and can still take part."""
    request = encode_task_spec(task)
    contents = {name: to_record(PROFILE, request) for name in names}
    found: dict[str, DeviceProfile] = {}
    for answer in ask(
        grid, contents, fleet.nodes, kind=PROFILE, group="profile", deadline_s=deadline_s,
        again=again,
    ):  # fmt: skip
        try:
            profile = _read_report(answer.failure, answer.body, task).profile
        except ProtocolError:
            continue  # the reason of its refusal is in the ledger, and it is asked after the next
        if profile.name == answer.device:
            found[answer.device] = profile
    return found


def choose_devices(names: Sequence[str], count: int, seed: int, round: int) -> tuple[str, ...]:
    """The devices of one round: all when `count` is 0, otherwise a seeded sample, sorted."""
    if count == 0 or count >= len(names):
        return tuple(sorted(names))
    generator = np.random.default_rng([seed, round, 1])
    chosen = generator.choice(len(names), size=count, replace=False)
    return tuple(sorted(sorted(names)[index] for index in chosen))


def _read_report(failure: str, body: bytes, task: TaskSpec) -> SiteReport:
    if failure:
        raise ProtocolError(failure)
    report = decode_site_report(body)
    if report.base_digest != task.base_digest:
        raise ProtocolError(
            f"{report.profile.name} holds another base model: expected digest "
            f"{task.base_digest[:12]}, found {report.base_digest[:12]}; copy the same model there"
        )
    dense = sum(math.prod(max(axis, 1) for axis in shape) for shape in report.dense.values())
    if dense > _MOST_DENSE:
        raise ProtocolError(
            f"{report.profile.name} would train {dense} parameters whole, expected at most "
            f"{_MOST_DENSE}"
        )
    if report.train_samples == 0:
        reason = report.warnings[0] if report.warnings else "it has no sample to train on"
        raise ProtocolError(f"{report.profile.name}: {reason}")
    return report


def announce(report: SiteReport, emit: Emit) -> None:
    """Tell of a device that takes part, and of what is odd about its data."""
    profile = report.profile
    emit(
        Event(
            "site_reported",
            {
                "device": profile.name,
                "device_class": profile.device_class,
                "train_samples": report.train_samples,
                "held_out_samples": report.held_out_samples,
                "train_tokens": report.train_tokens,
                "memory_bytes": profile.budget_bytes,
                "formats": list(profile.formats),
            },
        )
    )
    for warning in report.warnings:
        emit(Event("warning", {"text": warning}))


def _labels(reports: Mapping[str, SiteReport]) -> tuple[str, ...]:
    """All labels of the fleet, sorted."""
    return tuple(sorted({label for report in reports.values() for label in report.labels}))


def _tell_missing_labels(reports: Mapping[str, SiteReport], emit: Emit) -> None:
    """Name each site that lacks some of the labels, since that skews it."""
    labels = _labels(reports)
    for name, report in reports.items():
        missing = [label for label in labels if label not in report.labels]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            text = f"{name} has no sample of {len(missing)} of {len(labels)} labels ({shown})"
            emit(Event("warning", {"text": text}))


def _of_one_kind(reports: Mapping[str, SiteReport], emit: Emit) -> dict[str, SiteReport]:
    """The reports that agree with most of the fleet on which parameters are trained whole."""
    if not reports:
        return {}
    kinds = {name: tuple(sorted(report.dense.items())) for name, report in reports.items()}
    most = Counter(kinds.values()).most_common(1)[0][0]
    for name in (name for name, kind in kinds.items() if kind != most):
        reason = (
            f"{name} would train other parameters whole than most of the fleet; install the same "
            "fedtune and transformers there"
        )
        emit(excluded(name, reason))
    return {name: report for name, report in reports.items() if kinds[name] == most}
