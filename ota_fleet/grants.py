"""Grants: an image is promised to a device in one transaction, before its first byte leaves.

    thread -- grant() --> all that wait, in one transaction --> attempt, and Rollouts.admit()
    loop   -- hear(), carry() --> the registry's next batch --> what became of attempts
                                  `-> Rollouts.moved() -> a stage opens, a rollout halts

What a check-in makes of an attempt is in `attempts.py`. What time alone decides, that a device is
silent, is found out by sweep(), each minute, and with every grant.
"""

from __future__ import annotations

import functools
import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sqlite3 import Connection
from typing import NamedTuple

from ota_fleet.assignments import Assignments
from ota_fleet.attempts import (
    BROKEN,
    LEAST_PATIENCE,
    MAX_FULL,
    OPEN,
    PROVEN,
    RETURNED,
    SILENT,
    Attempt,
    Said,
    can_teach,
    digests_of,
    is_news,
    lane_of,
    looping,
    outcome_of,
    patience_of,
)
from ota_fleet.registry import MAX_PAGE, Registry, normal_id
from ota_fleet.rollout import Rollout
from ota_fleet.rollouts import Notify, Rollouts, nobody
from ota_fleet.rows import MAX_INTEGER, is_example
from ota_server import Event, Objection, Refused, Release, Report, Transfer

KEPT = 30  # attempts of each device
START = 120  # seconds within which a download begins
LONGEST = 3_600  # seconds that a download is believed to be under way
SWEPT = 500  # attempts that one transaction finds silent
MAX_TOLD = 20_000  # devices of which it is known what they say, some 5 MB
MAX_LEARNED = 16  # digests by which one image is called

_FIELDS = """SELECT id, device, lane, project, version, sha256, size, digests, rollout, before,
    before_digest, granted, deadline, sent, busy, ended, outcome FROM attempt """
_LAST = _FIELDS + "WHERE device = ? AND lane = ? ORDER BY id DESC LIMIT 1"
_LAST_OF = _FIELDS + "WHERE device = ? AND sha256 = ? ORDER BY id DESC LIMIT 1"
_OVERDUE = _FIELDS + "WHERE outcome = '' AND deadline <= ? AND busy <= ? ORDER BY deadline LIMIT ?"
_OF_DEVICE, _OF_ROLLOUT = "device = ? AND ", "rollout = ? AND "  # each has its index
_BELOW = "id < ? ORDER BY id DESC LIMIT ?"
_ADD = """INSERT INTO attempt (device, lane, project, version, sha256, size, digests, rollout,
    before, before_digest, granted, deadline, busy, sent, patience)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_SETTLE = "UPDATE attempt SET outcome = ?, ended = ? WHERE id = ?"
_LEFT = """UPDATE attempt SET sent = ?, busy = ?,
    deadline = CASE WHEN outcome = '' THEN ? + patience ELSE deadline END WHERE id = ?"""
_AGAIN = """UPDATE attempt SET outcome = '', ended = 0, busy = ?, deadline = ? + patience
WHERE id = ?"""
_PRUNE = """DELETE FROM attempt WHERE device = ? AND id <= (
    SELECT id FROM attempt WHERE device = ? ORDER BY id DESC LIMIT 1 OFFSET ?)"""
_FULL = """SELECT COUNT(*) FROM attempt WHERE device = ? AND sha256 = ? AND forgiven = 0
    AND sent >= size AND outcome <> 'proven'"""
_FORGIVE = "UPDATE attempt SET forgiven = 1 WHERE device = ?"
_LOOP = """INSERT INTO loop (device, sha256, project, version, at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING"""
_LOOPS = """SELECT device, sha256, project, version, at FROM loop WHERE ? IN ('', device)
ORDER BY at DESC, device LIMIT ?"""
_LEARN = "INSERT INTO learned (sha256, digest) VALUES (?, ?) ON CONFLICT DO NOTHING"
_LEARNED = "SELECT sha256, digest FROM learned"
_ELSEWHERE = "SELECT 1 FROM device WHERE image = ? AND version <> ? LIMIT 1"
_INTERVAL = "SELECT interval FROM device WHERE id = ?"
_ONCE = "UPDATE policy SET again = '' WHERE scope = 'device' AND name = ? AND again = ?"
_APPROVED = "DELETE FROM approval WHERE device = ? AND project = ? AND version = ?"
_LAST_HEARD = "SELECT COALESCE(MAX(last_seen), 0) FROM device"
_EXCUSE = "UPDATE attempt SET deadline = deadline + ? WHERE outcome = ''"
_TALLY = "SELECT outcome, COUNT(*) FROM attempt GROUP BY outcome"

log = logging.getLogger("ota.grants")


class Loop(NamedTuple):
    """A device that was given an image MAX_FULL times in full and does not run it."""

    device: str
    sha256: str
    project: str
    version: str
    at: int  # UTC seconds


Words = tuple[str, str, str | None, str | None]  # kind, version, MD5, SHA-256: as a device said it


class _Heard(NamedTuple):
    """What a device said when it was given nothing."""

    device: str
    lane: str
    said: Said
    at: int  # UTC seconds
    words: Words | None = None  # None: what it says may be of before it has restarted


class _Left(NamedTuple):
    """What left of an image, so far or at all."""

    device: str
    sha256: str
    start: int
    stop: int
    at: int  # UTC seconds
    over: bool


@dataclass(slots=True)
class _Wish:
    """Somebody waits for a grant."""

    report: Report
    release: Release
    tried: bool = False
    done: bool = False  # else nothing is given
    objection: Objection | None = None


class Grants:
    """The rows of attempts; see the module for who calls what."""

    def __init__(
        self,
        registry: Registry,
        assignments: Assignments,
        rollouts: Rollouts,
        *,
        notify: Notify = nobody,
        now: Callable[[], float] = time.time,
        proxied: bool = False,
    ) -> None:
        """`proxied`: what a proxy sends for us counts as sent, as nobody tells us."""
        self._registry, self._assignments, self._rollouts = registry, assignments, rollouts
        self._notify, self._now, self._proxied = notify, now, proxied
        self._wishes: deque[_Wish] = deque()
        self._turn = threading.Lock()  # who grants for all that wait
        self._live: dict[str, Transfer] = {}  # by device; of this process
        self._loops: Mapping[str, frozenset[str]] = {}  # replaced whole
        self._learned: Mapping[str, frozenset[str]] = {}
        self._note = registry.in_batches(self._write)
        registry.watch(self.read)
        self._told: dict[str, Words] = {}  # by device: what would be no news from it
        self._swept_at: int = registry.rows(_LAST_HEARD)[0][0] or int(now())  # as if until then

    # -- What the loop asks ------------------------------------------------------------------------

    def is_looping(self, device: str, sha256: str = "") -> bool:
        """Whether a device is not given an image any more; "": any."""
        found = self._loops.get(normal_id(device), ()) if self._loops else ()
        return sha256 in found if sha256 else bool(found)

    def learned(self, sha256: str) -> frozenset[str]:
        """Digests by which devices call an image, beside those that it says."""
        return self._learned.get(sha256, frozenset())

    def live(self) -> dict[str, tuple[int, int]]:
        """Downloads under way: by device, the bytes that have left, and all there are."""
        found = tuple(self._live.items())
        return {device: (each.part.start + each.sent(), each.image.size) for device, each in found}

    def read(self) -> None:
        """Takes what the registry holds now."""
        self._told = {}  # another server may have granted something meanwhile
        loops: dict[str, set[str]] = {}
        for device, sha256, *_ in self._registry.rows(_LOOPS, "", MAX_INTEGER):
            loops.setdefault(device, set()).add(sha256)
        learned: dict[str, set[str]] = {}
        for sha256, digest in self._registry.rows(_LEARNED):
            learned.setdefault(sha256, set()).add(digest)
        self._loops = {device: frozenset(found) for device, found in loops.items()}
        self._learned = {sha256: frozenset(found) for sha256, found in learned.items()}

    # -- Grants ------------------------------------------------------------------------------------

    def grant(self, report: Report, release: Release) -> Objection | None:
        """The last word about an image: None, and the row is on the disk; or why not.

        There is no row for who can never prove that it runs it, nor for the doctor. Refused: 503,
        it cannot be written.
        """
        if not report.is_accountable() or is_example(report.device or ""):
            return None
        wish = _Wish(report, release)
        self._wishes.append(wish)
        with self._turn:
            if not wish.tried:
                self._grant_all()
        if not wish.done:
            raise Refused(503, "no image is given, as that cannot be noted: see the log")
        return wish.objection

    def _grant_all(self) -> None:
        """Grants to all that wait, in one transaction: the disk is waited for once."""
        wishes = [self._wishes.popleft() for _ in range(len(self._wishes))]
        for wish in wishes:  # whoever waits meanwhile does not wait for the disk once more
            wish.tried = True
        try:
            with self._registry.granting() as connection:
                now = int(self._now())
                self._sweep(connection, now)
                for wish in wishes:
                    wish.objection = self._grant(connection, wish.report, wish.release, now)
        except sqlite3.Error as err:
            log.error("no image is given, as that cannot be noted: %s", err)  # noqa: TRY400
            return
        for wish in wishes:
            wish.done = True

    def _grant(
        self, connection: Connection, report: Report, release: Release, now: int
    ) -> Objection | None:
        device, objection, rollout = normal_id(report.device or ""), None, None
        last = self._last(connection, _LAST, device, lane_of(release.kind))
        goes_on = last is not None and _goes_on(last, report, release)
        if last and report.asks == "rest" and last.outcome == OPEN and not goes_on:
            return _other_image(last, release)
        if last and not goes_on:
            self._settle(connection, last, Said.by(report), now)
        if not goes_on and self._loops_now(connection, device, release, now):
            return looping(release)
        if self._assignments.own_pin(device) != release.version.text:
            # What somebody wants of one device is no experiment.
            objection, rollout = self._rollouts.admit(connection, report, release, now)
        if last and goes_on and _may_go_on(last, report, objection, now):
            if last.outcome:
                self._rollouts.moved(connection, [(last.rollout, device, OPEN)], now)
            if not last.is_full:  # what it asks for again and again does not keep it from silence
                connection.execute(_AGAIN, (now + START, now, last.id))
            objection = None
        elif objection is None:
            self._add(connection, report, release, rollout, now)
        if objection is None:
            self._told.pop(device, None)
        return objection

    def _add(
        self,
        connection: Connection,
        report: Report,
        release: Release,
        rollout: Rollout | None,
        now: int,
    ) -> None:
        device, said = normal_id(report.device or ""), Said.by(report)
        row = connection.execute(_INTERVAL, (device,)).fetchone()
        wanted = rollout.plan.patience if rollout else 0
        patience = wanted or patience_of(row[0] if row else 0)
        connection.execute(_ADD, (
            device, lane_of(release.kind), release.project, release.version.text,
            release.facts.sha256, release.size, json.dumps(digests_of(release)),
            rollout.id if rollout else 0, said.version, said.digest,
            now, now + patience, now + START, release.size * self._proxied, patience,
        ))  # fmt: skip
        connection.execute(_PRUNE, (device, device, KEPT))
        if self._proxied:
            self._given_again(connection, device, release.version.text)

    def _given_again(self, connection: Connection, device: str, version: str) -> None:
        """Ends what somebody asked for: to give a device the version that it runs once more."""
        connection.execute(_ONCE, (device, version))
        if self._assignments.own("device", device).again == version:
            forget = functools.partial(self._assignments.forget_again, device)
            self._registry.once_written(forget)

    def _loops_now(self, connection: Connection, device: str, release: Release, now: int) -> bool:
        """Whether a device was given an image too often, which is noted."""
        sha256 = release.facts.sha256
        count = connection.execute(_FULL, (device, sha256)).fetchone()[0]
        if count < MAX_FULL:
            return False
        found = Loop(device, sha256, release.project, release.version.text, now)
        if connection.execute(_LOOP, found).rowcount:
            data = {each: getattr(found, each) for each in ("device", "project", "version")}
            self._notify(connection, "device.looping", data)
            text = "%s %s %s was given in vain, %d times in full: not again until somebody says so"
            tell = functools.partial(log.warning, text, device, found.project, found.version, count)
            self._registry.once_written(tell)
        self._registry.once_written(functools.partial(self._stop, device, sha256))
        return True

    def _stop(self, device: str, sha256: str) -> None:
        self._loops = {**self._loops, device: self._loops.get(device, frozenset()) | {sha256}}

    # -- What became of them -----------------------------------------------------------------------

    def hear(self, event: Event, at: int) -> None:
        """The listener that notes what a device says it runs; never waits.

        What it says with a grant, that has noted itself.
        """
        report, outcome = event
        version = report.version.text if report.version else ""
        words = report.kind, version, report.sketch_md5, report.sketch_sha256
        if not report.device or self._told.get(report.device) == words:
            return
        granted = isinstance(outcome, Release) and report.is_accountable()
        if not granted and report.asks != "rest":  # who fetches the rest has not restarted
            lane, said = lane_of(report.kind), Said.by(report)
            self._note(_Heard(normal_id(report.device), lane, said, at, words))

    def hear_version(self, device: str, version: str, at: int) -> None:
        """The same, of who says its version by another way, perhaps just before it restarts."""
        said = Said(version, "", "")
        self._note(_Heard(normal_id(device), "sketch", said, at))

    def carry(self, transfer: Transfer) -> None:
        """Notes what leaves; never waits."""
        device = normal_id(transfer.recipient.partition(" ")[0])
        if device == "-":
            return
        live = self._live.get(device)
        if not transfer.over:
            self._live[device] = transfer
        elif live and live.image is transfer.image:  # else it has begun anew meanwhile
            del self._live[device]
        start = transfer.part.start
        stop = start + transfer.sent() * transfer.over
        at = int(self._now())
        self._note(_Left(device, transfer.image.sha256, start, stop, at, transfer.over))

    def sweep(self) -> None:
        """Finds out who is silent. sqlite3.Error: it cannot, just now."""
        with self._registry.granting() as connection:
            self._sweep(connection, int(self._now()))

    def _write(self, connection: Connection, items: list[_Heard | _Left]) -> None:
        """Part of a batch's transaction, behind its check-ins."""
        for item in items:
            if isinstance(item, _Left):
                self._leave(connection, item)
                continue
            last = self._last(connection, _LAST, item.device, item.lane)
            is_told = last is None
            if last and item.at >= last.granted and (last.is_full or last.busy <= item.at):
                surely = item.words is not None
                is_told = self._settle(connection, last, item.said, item.at, surely=surely)
            if is_told and item.words:  # else it downloads, elsewhere; or that tells nothing
                self._told[item.device] = item.words
        if len(self._told) > MAX_TOLD:
            self._told = {}

    def _leave(self, connection: Connection, item: _Left) -> None:
        attempt = self._last(connection, _LAST_OF, item.device, item.sha256)
        if attempt is None:
            return
        sent = max(attempt.sent, item.stop) if item.start <= attempt.sent else attempt.sent
        busy = 0 if item.over else item.at + LONGEST
        connection.execute(_LEFT, (sent, busy, item.at, attempt.id))
        if sent >= attempt.size and attempt.before == attempt.version:
            self._given_again(connection, attempt.device, attempt.version)
        if attempt.outcome == BROKEN and sent >= attempt.size:  # it was back before we knew
            self._end(connection, attempt, RETURNED, item.at)

    def _settle(
        self, connection: Connection, attempt: Attempt, said: Said, at: int, *, surely: bool = True
    ) -> bool:
        """What a check-in makes of an attempt; whether it tells anything at all."""
        same = said.version in {"", attempt.version}  # else others may have lied
        outcome = outcome_of(attempt, said, self.learned(attempt.sha256) if same else frozenset())
        if not is_news(attempt, outcome) or not (surely or outcome == PROVEN):
            return outcome != OPEN
        self._end(connection, attempt, outcome, at)
        if outcome == PROVEN:
            approval = attempt.device, attempt.project, attempt.version
            if connection.execute(_APPROVED, approval).rowcount:
                use_up = functools.partial(self._assignments.use_up, approval)
                self._registry.once_written(use_up)
            if can_teach(attempt, said):
                self._learn(connection, attempt, said)
        return True

    def _learn(self, connection: Connection, attempt: Attempt, said: Said) -> None:
        """Notes what a device calls an image, unless others call another one so."""
        known = self.learned(attempt.sha256)
        others = connection.execute(_ELSEWHERE, (said.digest, attempt.version)).fetchone()
        if others or len(known) >= MAX_LEARNED:
            return
        connection.execute(_LEARN, (attempt.sha256, said.digest))
        keep = functools.partial(self._learn_now, attempt.sha256, said.digest)
        self._registry.once_written(keep)

    def _learn_now(self, sha256: str, digest: str) -> None:
        self._learned = {**self._learned, sha256: self.learned(sha256) | {digest}}

    def _sweep(self, connection: Connection, now: int) -> None:
        away = now - self._swept_at
        if away > LEAST_PATIENCE:  # the server was off, or its clock jumped: who was heard?
            connection.execute(_EXCUSE, (away,))
        self._registry.once_written(functools.partial(setattr, self, "_swept_at", now))
        for row in connection.execute(_OVERDUE, (now, now, SWEPT)).fetchall():
            attempt = Attempt.of(row)
            self._end(connection, attempt, SILENT, now)
            data = {"device": attempt.device, "project": attempt.project}
            more = {"version": attempt.version, "since": attempt.granted}
            self._notify(connection, "device.silent", data | more)

    def _end(self, connection: Connection, attempt: Attempt, outcome: str, at: int) -> None:
        connection.execute(_SETTLE, (outcome, at, attempt.id))
        log.info(
            "%s %s %s -> %s %s", attempt.device, attempt.project, attempt.before or "-",
            attempt.version, outcome,
        )  # fmt: skip
        # Who has not fetched a byte says nothing of the image: strangers could, by asking twice.
        if attempt.rollout and (attempt.sent or outcome != BROKEN):
            self._rollouts.moved(connection, [(attempt.rollout, attempt.device, outcome)], at)

    @staticmethod
    def _last(connection: Connection, statement: str, device: str, which: str) -> Attempt | None:
        row = connection.execute(statement, (device, which)).fetchone()
        return Attempt.of(row) if row else None

    # -- For people --------------------------------------------------------------------------------

    def attempts(
        self, device: str = "", rollout: int = 0, before: int = MAX_INTEGER, limit: int = 100
    ) -> list[Attempt]:
        """A page of attempts, the newest first, from below the id `before`; at most MAX_PAGE.

        Of a device, or of a rollout; "" and 0: of all.
        """
        where = _OF_DEVICE * bool(device) + _OF_ROLLOUT * bool(rollout)
        chosen = (each for each in (normal_id(device), rollout) if each)
        values = *chosen, before, max(1, min(limit, MAX_PAGE))
        rows = self._registry.rows(_FIELDS + "WHERE " + where + _BELOW, *values)
        return [Attempt.of(row) for row in rows]

    def loops(self, limit: int = 100, device: str = "") -> list[Loop]:
        """Devices that are not given an image any more, the last first; or one of them."""
        return [Loop(*row) for row in self._registry.rows(_LOOPS, normal_id(device), limit)]

    def forgive(self, device: str) -> bool:
        """Lets a device have again what it was given in vain; False: there was nothing."""
        device = normal_id(device)
        with self._registry.writing() as connection:
            connection.execute(_FORGIVE, (device,))
            return connection.execute("DELETE FROM loop WHERE device = ?", (device,)).rowcount > 0

    def tally(self) -> dict[str, int]:
        """How many attempts there are of each outcome; "": not known yet."""
        return dict(self._registry.rows(_TALLY))


def _goes_on(last: Attempt, report: Report, release: Release) -> bool:
    """Whether a request belongs to the download that the device was granted before."""
    if last.sha256 != release.facts.sha256:
        return False
    if report.asks == "rest":
        return last.outcome in {OPEN, BROKEN}
    return last.outcome == OPEN and last.sent == 0 and Said.by(report).version == last.before


def _other_image(last: Attempt, release: Release) -> Objection:
    """Why a device that has begun with one image gets no bytes of another behind them."""
    reason = f"the rest of {last.version} was asked for, not of {release.version}: begin anew"
    return Objection("other-image", reason, final=True, usual=True)


def _may_go_on(last: Attempt, report: Report, objection: Objection | None, now: int) -> bool:
    """Whether it may, for which there is room as long as it is believed to be under way."""
    if objection is None:
        return True
    return objection.code == "paced" and (report.asks == "rest" or last.busy > now)
