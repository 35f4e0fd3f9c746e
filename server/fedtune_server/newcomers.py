"""Sites that are there before the run can use them, or come after it has begun.

At the start a site may not be ready: its copy of the base is still on its way. It is asked again
until enough are ready. Later, between rounds, nodes of the roster that are not in the fleet are
asked what they are; one that fits joins at the next round, and one of the run's own devices that
had been away takes up its plan of before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from fedtune.errors import RoundError, RunError
from fedtune.records import Event, SiteReport
from fedtune.wire.flower import PROFILE, to_record
from fedtune.wire.messages import TaskSpec, encode_task_spec
from fedtune_server.exchange import post, read_answer
from fedtune_server.fleet import (
    Emit,
    Fleet,
    announce,
    excluded,
    gather_fleet,
    judged_report,
    stands_for_too_many,
    tell_changed_data,
)
from fedtune_server.presence import Again
from fedtune_server.returning import asked_again, began_anew
from fedtune_server.roster import Roster

_ASK_AGAIN_S = 5.0
"""Between two looks at who is ready; chosen: a site's own polls take 3 s."""
_PROFILE_S = 120.0
"""Longest wait for what a site says of itself at the start, which may measure its machine first."""
_FIRST_ANSWER_S = 15.0
"""Longest that a round waits for a newcomer's first answer; a site answers in 3 to 6 s."""
_INVITATION_S = 600.0
"""How long a newcomer may take to answer while rounds go on."""


def gather_live(grid: Grid, roster: Roster, task: TaskSpec, emit: Emit) -> Fleet:
    """The fleet of those that are ready, once enough are.

    Raises:
        RoundError: too few were ready in time; the last reasons are in the ledger.
    """
    told: set[tuple[object, object]] = set()
    end = time.monotonic() + roster.patience_s
    again = Again(roster, roster.patience_s, emit)
    while True:
        events: list[Event] = []
        fleet, reason = None, ""
        deadline_s = min(_PROFILE_S, roster.patience_s)
        nodes = sorted(roster.here(grid))
        try:
            fleet = gather_fleet(
                grid, nodes, task, deadline_s, events.append, roster.objection, roster.called, again
            )
        except RunError as error:
            reason = f"; {error}"
        ready = len(fleet.names) if fleet is not None else 0
        for event in events:
            key = (event.fields.get("device"), event.fields.get("reason"))
            if event.kind == "site_excluded" and key not in told:
                told.add(key)
                emit(event)
        if fleet is not None and ready >= roster.needed:
            for event in events:
                if event.kind != "site_excluded":
                    emit(event)
            return fleet
        if time.monotonic() > end:
            kept_out = {
                str(event.fields["device"]): str(event.fields["reason"])
                for event in events
                if event.kind == "site_excluded"
            }
            why = "".join(f"; {device}: {words}" for device, words in list(kept_out.items())[:5])
            raise RoundError(
                f"expected {roster.needed} sites that can take part within {roster.patience_s:g} s "
                f"(deployment.deadline_s), found {ready}{reason or why}"
            )
        time.sleep(min(_ASK_AGAIN_S, roster.patience_s / 10))


@dataclass(frozen=True, slots=True)
class _Invitation:
    node: int
    activated: str
    sent: float


class Newcomers:
    """Asks those nodes of a roster that are not in the fleet, between rounds.

    Args:
        most: class of devices -> devices that a site of it may stand for; others: one.
        first_answer_s: longest wait for nodes that were never asked.
    """

    def __init__(
        self,
        roster: Roster,
        task: TaskSpec,
        most: Mapping[str, int],
        emit: Emit,
        first_answer_s: float = _FIRST_ANSWER_S,
    ) -> None:
        self._roster, self._task, self._most, self._emit = roster, task, most, emit
        self._first_answer_s = first_answer_s
        self._open: dict[str, _Invitation] = {}
        self._reasons: dict[int, str] = {}

    def come(
        self, grid: Grid, fleet: Fleet, known: Mapping[str, SiteReport]
    ) -> dict[str, tuple[int, SiteReport]]:
        """Devices that join now: name -> node and what it says of itself.

        Args:
            known: what the run's devices said first, those that are away among them.
        """
        if not self._roster.live:
            return {}
        now = time.monotonic()
        here = self._roster.here(grid)
        self._forget_lost(here, now)
        invited = {each.node for each in self._open.values()}
        strangers = sorted(here.keys() - set(fleet.nodes.values()))
        fresh = [node for node in strangers if node not in invited]
        never_asked = {node for node in fresh if node not in self._reasons}
        self._invite(grid, {node: here[node] for node in fresh}, now)
        found: dict[str, tuple[int, SiteReport]] = {}
        while self._open:
            self._take(grid, here, fleet, known, found)
            waiting = never_asked & {each.node for each in self._open.values()}
            if not waiting or time.monotonic() > now + self._first_answer_s:
                break
            time.sleep(0.5)
        return dict(sorted(found.items()))

    def turned_away(self, node: int, device: str, reason: str) -> None:
        """Tell why a node does not join; once, while the reason stays."""
        if self._reasons.get(node) != reason:
            self._reasons[node] = reason
            self._emit(excluded(device, reason))

    def _forget_lost(self, here: Mapping[int, str], now: float) -> None:
        """Forget invitations that are too old, and those that were lost with their node."""
        kept = {i: o for i, o in self._open.items() if now - o.sent < _INVITATION_S}
        lost = {i for i, o in kept.items() if began_anew(o.activated, here.get(o.node, ""))}
        for message_id in lost:
            node = kept[message_id].node
            self._reasons.setdefault(node, "")  # the round has waited for it once
            self._emit(asked_again(self._roster.called(node), PROFILE))
        self._open = {i: o for i, o in kept.items() if i not in lost}

    def _invite(self, grid: Grid, nodes: Mapping[int, str], now: float) -> None:
        """Ask nodes, each of which was activated at some time."""
        if not nodes:
            return
        by_token = {f"node {node}": node for node in nodes}
        record = to_record(PROFILE, encode_task_spec(self._task))
        contents = dict.fromkeys(by_token, record)
        ttl_s = dict.fromkeys(by_token, _INVITATION_S)
        ids = post(grid, contents, by_token, kind=PROFILE, group="profile", ttl_s=ttl_s)
        asked = {i: by_token[token] for i, token in ids.items()}
        self._open |= {i: _Invitation(node, nodes[node], now) for i, node in asked.items()}

    def _take(
        self,
        grid: Grid,
        here: Mapping[int, str],
        fleet: Fleet,
        known: Mapping[str, SiteReport],
        found: dict[str, tuple[int, SiteReport]],
    ) -> None:
        for reply in grid.pull_messages(list(self._open)):
            invitation = self._open.pop(reply.metadata.reply_to_message_id, None)
            if invitation is None:
                continue
            node = invitation.node
            answer = read_answer(f"node {node}", node, reply, PROFILE)
            report = judged_report(
                answer.failure, answer.body, self._task, node, self._roster.objection
            )
            if isinstance(report, SiteReport):
                too_many = stands_for_too_many(report, self._most)
                report = too_many or _fitting(report, here, fleet, known, found)
            if isinstance(report, str):
                self.turned_away(node, self._roster.called(node), report)
                continue
            name = report.profile.name
            self._reasons[node] = ""
            if name in known:
                tell_changed_data(report, known[name], self._emit)
            else:
                announce(report, self._emit)
            found[name] = (node, known.get(name, report))


def _fitting(
    report: SiteReport,
    here: Mapping[int, str],
    fleet: Fleet,
    known: Mapping[str, SiteReport],
    found: Mapping[str, tuple[int, SiteReport]],
) -> SiteReport | str:
    """The report, or why it does not fit a run that has begun."""
    name = report.profile.name
    if name in found or (name in fleet.nodes and fleet.nodes[name] in here):
        return f"another device is called {name!r}; give it a name of its own"
    if name in known:
        return report
    if report.dense != next(iter(known.values())).dense:
        return (
            f"{name} would train other parameters whole than the fleet; install the same fedtune "
            "and transformers there"
        )
    strange = sorted(set(report.labels) - set(fleet.labels))
    if strange:
        return (
            f"{name} has labels that the run does not know ({', '.join(strange[:5])}); it can take "
            "part in the next run"
        )
    return report


def with_newcomers(
    fleet: Fleet, found: Mapping[str, tuple[int, SiteReport]], known: Mapping[str, SiteReport]
) -> Fleet:
    """The fleet with those that join; its devices stay in the order of their names.

    Args:
        known: reports of all devices of the run, those that join among them.
    """
    nodes = dict(fleet.nodes) | {name: node for name, (node, _) in found.items()}
    return replace(
        fleet,
        nodes={name: nodes[name] for name in known if name in nodes},
        reports={name: report for name, report in known.items() if name in nodes},
    )
