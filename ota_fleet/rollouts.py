"""Rollouts as rows: which there are, who is in them, what their devices came to.

    loop    -- objection() --> memory, which says no to nearly all; a yes is asked again of SQL
    grants  -- admit(), moved() inside their transaction --> rollout, member, result
    threads -- create(), control(), get(), listed()

What a rollout makes of its results is in `rollout.py`. Nobody waits for a time to come: what time
changes is seen when a device asks. A release without a rollout gets one with its first grant, by
the plan of its project, or one that only watches it.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Any, NamedTuple

from ota_fleet import rollout as pure
from ota_fleet.assignments import Assignments
from ota_fleet.policy import STABLE
from ota_fleet.registry import MAX_PAGE, Registry, normal_id
from ota_fleet.rollout import (
    ABORTED,
    FINISHED,
    HALTED,
    PAUSED,
    RUNNING,
    WATCHED,
    Asker,
    Counts,
    Plan,
    Results,
    Rollout,
    advance,
    plan_of,
    plan_text,
)
from ota_fleet.rows import MAX_INTEGER, clean, parsed
from ota_server import Objection, Refused, Release, Report, Version, shown

Notify = Callable[[Connection, str, Mapping[str, object]], None]
CROWDED = 5  # seconds for which nobody asks again whether there is room for a download
COUNTED = {"": "open", "proven": "proven", "returned": "returned", "broken": "broken",
           "silent": "silent"}  # what a standing is in Counts  # fmt: skip

_FIELDS = """SELECT id, project, version, plan, state, stage, opened, reason, created, who, excused
FROM rollout """
_LATEST = _FIELDS + "WHERE project = ? AND version = ? ORDER BY id DESC LIMIT 1"
_LISTED = (
    _FIELDS
    + """WHERE id < ? AND (? = '' OR project = ?) AND (? = 1 OR plan <> ?
    OR state IN ('halted', 'paused'))
ORDER BY id DESC LIMIT ?"""
)
_ADD = """INSERT INTO rollout (project, version, plan, state, stage, opened, reason, created, who,
    excused)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"""
_CHANGE = """UPDATE rollout SET plan = ?, state = ?, stage = ?, opened = ?, reason = ?, excused = ?
WHERE id = ?"""
_RESULTS = "SELECT stage, standing, devices FROM result WHERE rollout = ?"
_ALL_RESULTS = "SELECT rollout, stage, standing, devices FROM result"
_ALL_MEMBERS = """SELECT rollout, device FROM member
WHERE rollout IN (SELECT id FROM rollout WHERE state = 'running' AND plan <> ?)"""
_MEMBER = "SELECT stage, standing FROM member WHERE rollout = ? AND device = ?"
_MEMBERS = """SELECT device, stage, standing FROM member
WHERE rollout = ? AND (? < 0 OR stage = ?) AND device > ? ORDER BY device LIMIT ?"""
_JOIN = "INSERT INTO member (rollout, device, stage, standing) VALUES (?, ?, ?, '')"
_STAND = "UPDATE member SET standing = ? WHERE rollout = ? AND device = ?"
_COUNT = """INSERT INTO result (rollout, stage, standing, devices) VALUES (?, ?, ?, ?)
ON CONFLICT (rollout, stage, standing) DO UPDATE SET devices = result.devices + excluded.devices"""
_FAILED = """SELECT device, stage, standing FROM member
WHERE rollout = ? AND standing IN ('returned', 'broken', 'silent') ORDER BY stage, device LIMIT ?"""
_OTHERS = """SELECT id, version FROM device
WHERE project IN (SELECT ? UNION ALL SELECT name FROM alias WHERE project = ?) AND NOT EXISTS (
    SELECT 1 FROM member WHERE member.rollout = ? AND member.device = device.id)"""
_PACE = """SELECT COUNT(*), MIN(granted) FROM attempt
WHERE rollout = ? AND granted > ? AND granted <= ?"""
_BUSY = "SELECT COUNT(*) FROM attempt WHERE rollout = ? AND outcome = '' AND busy > ?"
_STATES = "SELECT state, COUNT(*) FROM rollout GROUP BY state"

log = logging.getLogger("ota.rollouts")


def nobody(_connection: Connection, _event: str, _data: Mapping[str, object]) -> None:
    """Who wants to know of events, where nobody does."""


class Member(NamedTuple):
    """A device in a rollout."""

    device: str
    stage: int  # in which it was granted the release first
    standing: str  # outcome of its last decided attempt; "": none is


@dataclass(slots=True)
class _View:
    """What the loop knows of a rollout."""

    rollout: Rollout
    results: Results
    members: set[str] = field(default_factory=set)
    closed_until: float = 0  # UTC seconds
    closed: Objection | None = None  # until then: what the last transaction said


class Rollouts:
    """The rows; see the module for who calls what."""

    def __init__(
        self,
        registry: Registry,
        assignments: Assignments,
        *,
        notify: Notify = nobody,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Begins with what the registry holds; `notify` is told inside a transaction."""
        self._registry = registry
        self._assignments = assignments
        self._notify = notify
        self._now = now
        self._views: dict[tuple[str, str], _View] = {}  # replaced whole, or by a key
        self._showing = threading.Lock()  # who changes them
        self._missed: list[Callable[[], None]] | None = None  # shown while read() is reading
        registry.watch(self.read)

    # -- What the loop asks ------------------------------------------------------------------------

    def objection(self, report: Report, release: Release) -> Objection | None:
        """Why a device has to wait for a release, from memory; the last word is admit()'s."""
        now = int(self._now())
        view = self._view_of(release, now)
        if view is None:
            return None
        asker = self._asker(report, view.members)
        found = pure.objection(view.rollout, view.results, asker)
        if found:  # else it is time alone that could have changed it, and for the better
            found = pure.objection(advance(view.rollout, view.results, now), view.results, asker)
        if found:
            return found
        paced = now < view.closed_until and view.rollout.state == RUNNING
        return view.closed if paced and report.asks != "rest" else None

    def standing(self, report: Report, release: Release) -> str:
        """Why a device does not have to wait, in a sentence, from memory."""
        now = int(self._now())
        unstaged = Rollout(0, release.project, release.version.text, WATCHED)
        view = self._view_of(release, now) or _View(unstaged, {})
        rollout = advance(view.rollout, view.results, now)
        return pure.standing(rollout, view.results, self._asker(report, view.members))

    def _view_of(self, release: Release, now: int) -> _View | None:
        """The rollout of a release, or what it will be; None: it will only be watched."""
        key = release.project, release.version.text
        view = self._views.get(key)
        if view is None and (plan := self.plan_of(release)) is not WATCHED:
            return _View(Rollout(0, *key, plan, opened=now), {})
        return view

    def plan_of(self, release: Release) -> Plan:
        """By which a release goes out, from memory."""
        if view := self._views.get((release.project, release.version.text)):
            return view.rollout.plan
        policy = self._assignments.own("project", release.project)
        # When the file came here; when it was written says nothing, as copies may keep that.
        came = release.identity[-1] // 1_000_000_000
        return _read(policy.plan) if policy.plan and came >= policy.since else WATCHED

    def _asker(self, report: Report, members: Iterable[str]) -> Asker:
        if not report._replace(asks="image").is_accountable():  # a HEAD is answered as the GET
            return Asker("", report.version)
        device = normal_id(report.device or "")
        group, labels = self._assignments.group(device), self._assignments.labels(device)
        return Asker(device, report.version, group, labels, device in members)

    def read(self) -> None:
        """Takes what the registry holds now."""
        with self._showing:
            missed = self._missed = []
        results: dict[int, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        for rollout, stage, standing, devices in self._registry.rows(_ALL_RESULTS):
            results[rollout][stage][COUNTED[standing]] = devices
        members: dict[int, set[str]] = defaultdict(set)
        for rollout, device in self._registry.rows(_ALL_MEMBERS, plan_text(WATCHED)):
            members[rollout].add(device)
        views = {}
        for row in self._registry.rows(_FIELDS + "ORDER BY id"):  # the last one of a version counts
            each = _rollout(row)
            found = {stage: Counts(**counts) for stage, counts in results[each.id].items()}
            views[each.project, each.version] = _View(each, found, members[each.id])
        with self._showing:
            self._views = views
            for show in missed:
                show()
            self._missed = None

    # -- Inside a transaction of grants ------------------------------------------------------------

    def admit(
        self, connection: Connection, report: Report, release: Release, now: int
    ) -> tuple[Objection | None, Rollout | None]:
        """Makes a device a member, if it may have the release now; gives back of which rollout."""
        key = release.project, release.version.text
        rows = connection.execute(_LATEST, key).fetchall()
        rollout = _rollout(rows[0]) if rows else Rollout(0, *key, self.plan_of(release), opened=now)
        results = results_of(connection, rollout.id)
        after = advance(rollout, results, now)
        device = normal_id(report.device or "")
        member = connection.execute(_MEMBER, (rollout.id, device)).fetchone()
        asker = self._asker(report, (device,) if member else ())
        said = pure.objection(after, results, asker)
        if said is None and after.state == RUNNING:
            said = self._paced(connection, key, after, now)
        if said and not after.id:
            return said, None
        after = self._written(connection, rollout, after, now)
        if said is None and member is None:
            connection.execute(_JOIN, (after.id, device, after.stage))
            connection.execute(_COUNT, (after.id, after.stage, "", 1))
            results = results_of(connection, after.id)
        self._show(after, results, () if said else (device,))
        return said, None if said else after

    def _paced(
        self, connection: Connection, key: tuple[str, str], rollout: Rollout, now: int
    ) -> Objection | None:
        """Why there is no room just now, of which the loop will know."""
        plan, found, until = rollout.plan, None, now + CROWDED
        if plan.pace:
            count, first = connection.execute(
                _PACE, (rollout.id, now - plan.period, now)
            ).fetchone()
            if count >= plan.pace:
                until = first + plan.period
                clock = datetime.fromtimestamp(until, UTC).strftime("%H:%M:%S UTC")
                reason = f"{count} devices had it in {plan.period} s, the next may at {clock}"
                reason = f"the rollout of {rollout.version} is paced: {reason}"
                found = Objection("paced", reason, usual=True)
        if plan.at_once and not found:
            busy = connection.execute(_BUSY, (rollout.id, now)).fetchone()[0]
            if busy >= plan.at_once:
                reason = f"{busy} devices download {rollout.version} just now, no more may"
                found = Objection("paced", reason, usual=True)
        if found:
            self._registry.once_written(functools.partial(self._close, key, found, until))
        return found

    def _close(self, key: tuple[str, str], said: Objection, until: float) -> None:
        if view := self._views.get(key):
            view.closed, view.closed_until = said, until

    def moved(
        self, connection: Connection, moves: Iterable[tuple[int, str, str]], now: int
    ) -> None:
        """Notes what devices came to: rollout, device, standing; and what follows from it."""
        touched = set()
        for number, device, standing in moves:
            member = connection.execute(_MEMBER, (number, device)).fetchone()
            if member is None or member[1] == standing:
                continue
            stage, before = member
            connection.execute(_STAND, (standing, number, device))
            connection.execute(_COUNT, (number, stage, before, -1))
            connection.execute(_COUNT, (number, stage, standing, 1))
            touched.add(number)
        for number in sorted(touched):
            for row in connection.execute(_FIELDS + "WHERE id = ?", (number,)).fetchall():
                rollout, results = _rollout(row), results_of(connection, number)
                after = advance(rollout, results, now)
                self._show(self._written(connection, rollout, after, now), results)

    def _written(
        self, connection: Connection, before: Rollout, after: Rollout, now: int
    ) -> Rollout:
        """Writes a rollout that is new, or has changed, and tells who wants to know."""
        if not after.id:
            after = replace(after, created=now)
            return replace(after, id=int(connection.execute(_ADD, _row(after)).fetchall()[0][0]))
        if after != before:
            row = _row(after)
            connection.execute(_CHANGE, (*row[2:7], row[9], after.id))
            if after.state != before.state and after.state in {HALTED, FINISHED}:
                data = {each: getattr(after, each) for each in ("project", "version", "reason")}
                self._notify(connection, f"rollout.{after.state}", {"rollout": after.id, **data})
                level = logging.WARNING if after.state == HALTED else logging.INFO
                tell = functools.partial(log.log, level, "rollout %d of %s %s is %s: %s", after.id)
                said = after.project, after.version, after.state, after.reason
                self._registry.once_written(functools.partial(tell, *said))
        return after

    def _show(self, rollout: Rollout, results: Results, members: Iterable[str] = ()) -> None:
        """Lets the loop see it, as soon as it is written."""
        show = functools.partial(self._shown, rollout, results, tuple(members))
        self._registry.once_written(functools.partial(self._show_now, show))

    def _show_now(self, show: Callable[[], None]) -> None:
        with self._showing:
            if self._missed is not None:
                self._missed.append(show)
            show()

    def _shown(self, rollout: Rollout, results: Results, members: Iterable[str]) -> None:
        key = rollout.project, rollout.version
        view = self._views.get(key)
        if view is None or view.rollout.id < rollout.id:
            self._views[key] = _View(rollout, results, set(members))
        elif view.rollout.id == rollout.id:
            view.rollout, view.results = rollout, results
            view.members.update(members)

    # -- For people --------------------------------------------------------------------------------

    def create(self, project: str, version: Version, plan: Plan, who: str, at: int) -> Rollout:
        """Begins a rollout. Refused: 409, there is one under way."""
        rollout = Rollout(0, clean(project), str(version), plan, opened=at, created=at, who=who)
        with self._registry.writing() as connection:
            self._make_room(connection, rollout, at)
            return self._written(connection, rollout, rollout, at)

    def _make_room(self, connection: Connection, rollout: Rollout, at: int) -> None:
        """Ends the one before, if nobody made a plan for that."""
        for row in connection.execute(_LATEST, (rollout.project, rollout.version)).fetchall():
            before = _rollout(row)
            now = advance(before, results_of(connection, before.id), at)
            if now.state in {RUNNING, PAUSED} and not now.is_watched:
                why = f"the rollout of {now.version} is {now.state}: abort or finish it first"
                raise Refused(409, why)
            if now.state in {RUNNING, PAUSED}:
                now = replace(now, state=ABORTED, reason="a rollout with a plan took its place")
                self._written(connection, before, now, at)

    def control(self, number: int, do: str, reason: str, at: int) -> Rollout:
        """Pauses, resumes, aborts, finishes, or opens the next stage; see rollout.control().

        Raises:
            Refused: 404, there is none; 409, that is not possible now.
        """
        with self._registry.writing() as connection:
            row = connection.execute(_FIELDS + "WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise Refused(404, f"there is no rollout {number}")
            rollout, results = _rollout(row), results_of(connection, number)
            rollout = advance(rollout, results, at)
            after = pure.control(rollout, results, do, clean(reason), at)
            return self._written(connection, _rollout(row), after, at)

    def get(self, number: int) -> tuple[Rollout, Results]:
        """A rollout as it stands now, and its results. Refused: 404, there is none."""
        rows = self._registry.rows(_FIELDS + "WHERE id = ?", min(number, MAX_INTEGER))
        if not rows:
            raise Refused(404, f"there is no rollout {number}")
        return self.with_results([_rollout(rows[0])])[0]

    def with_results(self, rollouts: Iterable[Rollout]) -> list[tuple[Rollout, Results]]:
        """Each as it stands now, and its results."""
        now = int(self._now())
        with self._registry.reading() as connection:
            found = [(each, results_of(connection, each.id)) for each in rollouts]
        return [(advance(each, results, now), results) for each, results in found]

    def current(self, project: str, version: str) -> tuple[Rollout, Results] | None:
        """That of a version which counts, from memory; None: nobody was granted it yet."""
        view = self._views.get((project, version))
        return (view.rollout, view.results) if view else None

    def listed(
        self,
        project: str = "",
        before: int = MAX_INTEGER,
        limit: int = 100,
        *,
        watched: bool = True,
    ) -> list[Rollout]:
        """A page of rollouts, the newest first, from below the id `before`; at most MAX_PAGE.

        `watched` False: but for those that are only looked after, as long as they do not halt.
        """
        limit = max(1, min(limit, MAX_PAGE))
        values = before, project, project, int(watched), plan_text(WATCHED), limit
        return [_rollout(row) for row in self._registry.rows(_LISTED, *values)]

    def under_way(self) -> list[Rollout]:
        """Those that count and that somebody may want to look at, from memory; newest first."""
        found = (view.rollout for view in self._views.values())
        chosen = (
            each
            for each in found
            if each.state in {PAUSED, HALTED} or (each.state == RUNNING and not each.is_watched)
        )
        return sorted(chosen, key=lambda each: each.id, reverse=True)

    def failed(self, number: int, limit: int = 100) -> list[tuple[str, int, str]]:
        """Devices that did not get to run it: device, stage, and what it came to instead."""
        return self._registry.rows(_FAILED, number, limit)

    def newcomers(self, rollout: Rollout, results: Results, channel: str, enough: int) -> int:
        """How many known devices would come into the open stage if they asked; at most `enough`.

        `channel` is that of the release.
        """
        version, found = Version.parse(rollout.version), 0
        names = rollout.project, rollout.project, rollout.id
        for device, runs in self._registry.rows(_OTHERS, *names):
            policy, running = self._assignments.policy(device, rollout.project), parsed(runs)
            is_older = running is None or running < version
            if not is_older or policy.pin or policy.hold == "yes":
                continue
            group, labels = self._assignments.group(device), self._assignments.labels(device)
            asker = Asker(device, running, group, labels)
            if channel in {STABLE, policy.channel} and pure.is_meant(rollout, results, asker):
                found += 1
                if found >= enough:
                    break
        return found

    def members(
        self, number: int, stage: int = -1, after: str = "", limit: int = 100
    ) -> list[Member]:
        """A page of the devices in a rollout, by id; -1: of all stages."""
        values = number, stage, stage, after, max(1, min(limit, MAX_PAGE))
        return [Member(*row) for row in self._registry.rows(_MEMBERS, *values)]

    def states(self) -> dict[str, int]:
        """How many rollouts are in each state."""
        return dict(self._registry.rows(_STATES))

    def name_of(self, number: int) -> str:
        """A rollout as the audit calls it. Refused: 404."""
        rollout = self.get(number)[0]
        return f"{number} of {shown(rollout.project)[1:-1]} {rollout.version}"


def results_of(connection: Connection, rollout: int) -> dict[int, Counts]:
    """What the stages of a rollout have, as part of a transaction."""
    found: dict[int, dict[str, int]] = {}
    for stage, standing, devices in connection.execute(_RESULTS, (rollout,)):
        found.setdefault(stage, {})[COUNTED[standing]] = devices
    return {stage: Counts(**counts) for stage, counts in found.items()}


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Plan:
    """A plan that was kept; nearly all are the same few."""
    return WATCHED if text == plan_text(WATCHED) else plan_of(text)


def _rollout(row: Sequence[Any]) -> Rollout:
    values = [*row[:3], _read(row[3]), *row[4:10], tuple(json.loads(row[10]))]
    return Rollout(*values)


def _row(rollout: Rollout) -> tuple[str | int, ...]:
    """All but the id."""
    return (
        rollout.project, rollout.version, plan_text(rollout.plan), rollout.state, rollout.stage,
        rollout.opened, rollout.reason, rollout.created, rollout.who,
        json.dumps(rollout.excused),
    )  # fmt: skip
