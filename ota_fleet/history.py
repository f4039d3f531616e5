"""What was decided, over time: for people who ask how the fleet is.

    loop -- note(event) --+-> the last 1,000, in memory                       --> recent()
                          +-> registry's next batch --> visits of each device --> visits()
                                                    +-> tally of each hour    --> hours()
                              device table, now and then --> spread of a day  --> spread()

A project has its own name here; what devices call it by an alias is found with it.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter, deque
from sqlite3 import Connection
from typing import NamedTuple, Self

from ota_fleet.registry import MAX_PAGE, Registry, normal_id
from ota_fleet.rows import clean
from ota_server import Event, Release

RECENT = 1_000  # decisions that are kept in memory, some 2 MB
VISITS = 30  # that stay of each device
MAX_SAID = 20_000  # devices of which the last visit is kept in memory, some 8 MB
HOUR = 3_600  # seconds
DAY = 24 * HOUR
MONTH = 31 * DAY  # who was not seen for so long is not missed any more; tallies stay as long
SPREAD_DAYS = 400  # so that a year can be compared with the one before
SPREAD_SECONDS = 600  # between two looks at all devices, some 10 ms each

_TALLY = """INSERT INTO tally (hour, project, checks, downloads) VALUES (?, ?, ?, ?)
ON CONFLICT (hour, project) DO UPDATE SET
    checks = tally.checks + excluded.checks, downloads = tally.downloads + excluded.downloads"""
_LAST = """SELECT project, version, offered, code, reason FROM visit
WHERE device = ? ORDER BY number DESC LIMIT 1"""
_VISIT = """INSERT INTO visit (at, device, project, version, offered, code, reason)
VALUES (?, ?, ?, ?, ?, ?, ?)"""
_OLD_VISITS = """DELETE FROM visit WHERE device = ? AND number <= (
    SELECT number FROM visit WHERE device = ? ORDER BY number DESC LIMIT 1 OFFSET ?)"""
_VISITS = """SELECT number, at, project, version, offered, code, reason FROM visit
WHERE device = ? ORDER BY number DESC LIMIT ?"""
# Versions that hardly anybody runs are left out: somebody may make up one for every check-in.
_SPREAD = """INSERT INTO spread (day, project, version, devices)
SELECT ?, project, version, COUNT(*) FROM device WHERE last_seen >= ?
GROUP BY project, version ORDER BY COUNT(*) DESC LIMIT 500"""
_ENDED = (  # of what a day ends; the last are of devices that were forgotten in an outage
    "DELETE FROM tally WHERE hour < ?",
    "DELETE FROM spread WHERE day < ?",
    "DELETE FROM visit WHERE device NOT IN (SELECT id FROM device)",
)
_OF_PROJECT = " AND project IN (SELECT ? UNION ALL SELECT name FROM alias WHERE alias.project = ?)"
_HOURS = "SELECT hour, SUM(checks), SUM(downloads) FROM tally WHERE hour >= ?"
_BY_HOUR = " GROUP BY hour ORDER BY hour"
_DAYS = "SELECT day, version, SUM(devices) FROM spread WHERE day >= ?"
_BY_DAY = " GROUP BY day, version ORDER BY day, SUM(devices) DESC, version"
_COUNTS = """SELECT COALESCE(alias.project, found.project), version, SUM(devices), SUM(hour),
    SUM(day), SUM(month), SUM(failing)
FROM (SELECT project, version, COUNT(*) AS devices, COUNT(*) FILTER (WHERE last_seen >= ?) AS hour,
    COUNT(*) FILTER (WHERE last_seen >= ?) AS day, COUNT(*) FILTER (WHERE last_seen >= ?) AS month,
    COUNT(*) FILTER (WHERE last_seen >= ? AND offers >= 3) AS failing
    FROM device GROUP BY project, version) AS found
LEFT JOIN alias ON alias.name = found.project
GROUP BY 1, 2 ORDER BY 1, SUM(devices) DESC, 2"""
_LOOPING = """SELECT COALESCE(alias.project, loop.project), COUNT(DISTINCT device)
FROM loop LEFT JOIN alias ON alias.name = loop.project GROUP BY 1"""
_VERSIONS = """SELECT version FROM device WHERE version <> '' GROUP BY version
ORDER BY COUNT(*) DESC, version LIMIT ?"""
_TROUBLE = """SELECT id, project, version, last_seen, offered, offers FROM device
WHERE last_seen >= ? AND """
# A 3, so that the index device_failing, which has that, too, is used.
_FAILING = _TROUBLE + "offers >= 3 ORDER BY last_seen DESC LIMIT ?"
_SILENT = _TROUBLE + "last_seen < ? ORDER BY last_seen DESC, id DESC LIMIT ?"


class Decision(NamedTuple):
    """What one device asked, and what it got. "": it did not say, or there was none."""

    number: int  # higher than that of any before it, also by an earlier process
    at: int  # UTC seconds
    address: str
    device: str
    project: str  # as it called it
    version: str  # that it runs
    offered: str
    code: str  # of the objection
    reason: str

    @classmethod
    def of(cls, number: int, at: int, event: Event) -> Self:
        """Reads an event."""
        report, outcome = event
        device, project = normal_id(report.device or ""), clean(report.project)
        who = report.address, device, project, clean(report.version or "")
        if isinstance(outcome, Release):
            return cls(number, at, *who, clean(outcome.version), "", "")
        return cls(number, at, *who, "", outcome.code, clean(outcome.reason))


class Visit(NamedTuple):
    """A decision about a device that was not like the one before, or an offer."""

    number: int
    at: int  # UTC seconds
    project: str
    version: str  # that it ran; "": it did not say
    offered: str  # "": nothing
    code: str  # of the objection; "": there was none
    reason: str


class Hour(NamedTuple):
    """How busy an hour was."""

    at: int  # UTC seconds, when it began
    checks: int
    downloads: int  # checks that were given an image


class Share(NamedTuple):
    """How many devices ran a version, at the end of a day."""

    at: int  # UTC seconds, when the day began
    version: str  # "": they did not say
    devices: int  # of those that were seen in the 31 days before


class Count(NamedTuple):
    """How many devices of a project run a version."""

    project: str
    version: str  # "": they did not say
    devices: int  # all that are known; the others are among them
    hour: int  # seen in the last hour
    day: int
    month: int  # seen in the last 31 days; but for those of the last day, they are silent
    failing: int


class Trouble(NamedTuple):
    """A device that somebody should look after."""

    device: str
    project: str
    version: str
    last_seen: int  # UTC seconds
    offered: str  # the version that it was given last; "": nothing
    offers: int  # how often, in a row


class History:
    """What was decided. Every function may be called from any thread; `now` is UTC seconds."""

    def __init__(self, registry: Registry) -> None:
        """Begins with what the registry holds."""
        self._registry = registry
        self._queue = registry.in_batches(self._write)
        self._recent: deque[tuple[int, int, Event]] = deque(maxlen=RECENT)
        self._lock = threading.Lock()  # of the numbers, which must come in order
        self._last = 0
        self._spread_at = -SPREAD_SECONDS  # UTC seconds
        self._day = 0
        self._said: dict[str, tuple[str, ...]] = {}  # by device: its last visit
        registry.watch(self._forget)

    def _forget(self) -> None:
        """Another server may have written one."""
        self._said = {}

    # -- Decisions ---------------------------------------------------------------------------------

    def note(self, event: Event, at: int) -> None:
        """Remembers a decision; waits for nothing. It is on the disk within about a second."""
        with self._lock:  # milliseconds, so that numbers rise when the server starts again
            self._last = max(self._last + 1, at * 1_000)
            entry = (self._last, at, event)
            self._recent.append(entry)
        self._queue(entry)

    def recent(self, after: int = 0, device: str = "", limit: int = 100) -> list[Decision]:
        """The last decisions of this process, the newest first, with a number above `after`.

        `device` is an id, "" for all.
        """
        with self._lock:
            entries = [entry for entry in self._recent if entry[0] > after]
        device = normal_id(device)
        found = (Decision.of(*entry) for entry in reversed(entries))
        chosen = [each for each in found if device in {"", each.device}]
        return chosen[: max(1, limit)]

    def visits(self, device: str, limit: int = VISITS) -> list[Visit]:
        """What happened to a device, the newest first; none is older than its last 30."""
        rows = self._registry.rows(_VISITS, normal_id(device), _page(limit))
        return [Visit(*row) for row in rows]

    # -- The fleet ---------------------------------------------------------------------------------

    def hours(self, project: str = "", since: int = 0) -> list[Hour]:
        """Each hour of the last 31 days in which somebody asked; project "": of all together."""
        chosen, names = (_OF_PROJECT, [clean(project)] * 2) if project else ("", [])
        rows = self._registry.rows(_HOURS + chosen + _BY_HOUR, since // HOUR, *names)
        return [Hour(hour * HOUR, *rest) for hour, *rest in rows]

    def spread(self, project: str, since: int = 0) -> list[Share]:
        """The versions of each of the last 400 days, the oldest day first, the most used first."""
        statement = _DAYS + _OF_PROJECT + _BY_DAY
        rows = self._registry.rows(statement, since // DAY, *[clean(project)] * 2)
        return [Share(day * DAY, *rest) for day, *rest in rows]

    def counts(self, now: int) -> list[Count]:
        """All projects and versions that devices have, by project, the most used first."""
        since = now - HOUR, now - DAY, now - MONTH, now - MONTH
        return [Count(*row) for row in self._registry.rows(_COUNTS, *since)]

    def looping(self) -> dict[str, int]:
        """How many devices of a project are refused what they were given in vain."""
        return dict(self._registry.rows(_LOOPING))

    def versions(self, limit: int = 200) -> list[str]:
        """What devices say that they run, the most used first."""
        return [version for (version,) in self._registry.rows(_VERSIONS, _page(limit))]

    def silent(self, now: int, limit: int = 100) -> list[Trouble]:
        """Devices not seen for a day but in the last 31, those that fell silent last first."""
        rows = self._registry.rows(_SILENT, now - MONTH, now - DAY, _page(limit))
        return [Trouble(*row) for row in rows]

    def failing(self, now: int, limit: int = 100) -> list[Trouble]:
        """Devices that were given one version again and again but do not run it, newest first.

        An objection, such as that they run the newest, or another version that they run, ends it.
        """
        rows = self._registry.rows(_FAILING, now - MONTH, _page(limit))
        return [Trouble(*row) for row in rows]

    # -- Batches -----------------------------------------------------------------------------------

    def _write(self, connection: Connection, entries: list[tuple[int, int, Event]]) -> None:
        """Part of a batch's transaction, behind its check-ins."""
        decisions = [Decision.of(*entry) for entry in entries]
        _write_tally(connection, decisions)
        self._write_visits(connection, [each for each in decisions if each.device])
        now = decisions[-1].at
        if abs(now - self._spread_at) >= SPREAD_SECONDS:  # the clocks of small servers jump
            self._write_spread(connection, now)

    def _write_visits(self, connection: Connection, decisions: list[Decision]) -> None:
        """Those that are worth a row."""
        said: dict[str, tuple[str, ...]] = {}
        rows = []
        for each in decisions:
            last = said.get(each.device) or self._said.get(each.device)
            if last is None:
                last = connection.execute(_LAST, (each.device,)).fetchone() or ()
            said[each.device] = each[4:]
            if each.offered or last != each[4:]:
                rows.append((each.at, each.device, *each[4:]))
        connection.executemany(_VISIT, rows)
        connection.executemany(_OLD_VISITS, {(row[1], row[1], VISITS) for row in rows})
        self._registry.once_written(functools.partial(self._keep, said))

    def _keep(self, said: dict[str, tuple[str, ...]]) -> None:
        self._said.update(said)
        if len(self._said) > MAX_SAID:
            self._said = {}

    def _write_spread(self, connection: Connection, now: int) -> None:
        """Counts all devices for this day; a new one ends what is too old."""
        day = now // DAY
        connection.execute("DELETE FROM spread WHERE day = ?", (day,))
        connection.execute(_SPREAD, (day, now - MONTH))
        if day != self._day:
            ages = ((now - MONTH) // HOUR,), (day - SPREAD_DAYS,), ()
            for statement, values in zip(_ENDED, ages, strict=True):
                connection.execute(statement, values)
            self._said = {}
        self._spread_at, self._day = now, day


def _page(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))


def _write_tally(connection: Connection, decisions: list[Decision]) -> None:
    checks = Counter((each.at // HOUR, each.project) for each in decisions)
    downloads = Counter((each.at // HOUR, each.project) for each in decisions if each.offered)
    connection.executemany(_TALLY, [(*key, checks[key], downloads[key]) for key in checks])
