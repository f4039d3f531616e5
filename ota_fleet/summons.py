"""Devices that are to be told to ask for their image: a queue that outlives outages and restarts.

    find(), among() -> Targets -> call() -> rows of the table summons, one due after the other
    claim() -> those that are due, for this process alone -> trigger() -> the broker -> answered()

A row is deleted once the broker has what it says. Until then it belongs to whoever claimed it for
LEASE seconds, and then to the next one who does. Times are UTC seconds, and come from the caller.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from sqlite3 import Connection
from typing import NamedTuple
from urllib.parse import quote

from ota_fleet.broker import topic_for
from ota_fleet.registry import Registry
from ota_fleet.rows import clean, normal_id
from ota_server import SIGNED_SECONDS, signed

MAX_TARGETS = 100_000  # devices of one call, some 20 MB
MAX_TRIES = 20  # what ends the connection each time it is sent must not block the others for ever
LEASE = 60  # seconds that the broker has to acknowledge
LATE = 5  # seconds; what is later waited for a broker, or for this program

_TARGETS = "SELECT id, project, team FROM device WHERE "
_BY = {
    "device": "id = ?",
    "group": "team = ?",
    "label": "replace(labels, ?, '') <> labels",
}
_OF_PROJECT = """ AND project IN (SELECT ? UNION ALL
    SELECT name FROM alias WHERE alias.project = ?)"""
_IN_ORDER = " ORDER BY id LIMIT ?"
_QUEUED = "SELECT topic, body, id FROM summons"
_CALL = "INSERT INTO summons (device, topic, body, due) VALUES (?, ?, ?, ?)"
_DUE = """SELECT summons.id, device, topic, body, tries, COALESCE(version, '')
FROM summons LEFT JOIN device ON device.id = summons.device
WHERE due <= ? ORDER BY due, summons.id LIMIT ?"""
_CLAIM = "UPDATE summons SET due = ?, tries = tries + 1 WHERE id = ? AND tries = ?"
_DROP = "DELETE FROM summons WHERE id = ?"
_EARLIEST = "SELECT MIN(due) FROM summons"
_SHIFT = "UPDATE summons SET due = due + ?"

Busy = sqlite3.OperationalError  # others write, or the disk is full: it is tried again

log = logging.getLogger("ota.mqtt")


class Target(NamedTuple):
    """A device that may be called."""

    device: str
    project: str  # "": it never said
    group: str  # "": none


class Summon(NamedTuple):
    """What is to be said now."""

    id: int
    device: str  # "": all that listen to the topic
    topic: str
    project: str  # whose image it is to ask for
    tries: int  # before this one
    version: str  # that the device runs; "": it never said


class Summons:
    """The queue. Every function may be called from any thread."""

    def __init__(self, registry: Registry, template: str) -> None:
        """`template` gives the topic of a device; "": there is none, and nobody is told."""
        self._registry = registry
        self.template = template
        self.answered = registry.in_batches(_drop)  # takes the id of what the broker has

    def find(self, by: str, value: str | int, project: str = "") -> list[Target]:
        """Devices by "device", "group" or "label", of a project if one is given.

        There may be one more than MAX_TARGETS.
        """
        if by == "label":
            value = "\n" + json.dumps(clean(value), ensure_ascii=False)  # as it stands in the list
        elif by == "device":
            value = normal_id(str(value))
        only, names = (_OF_PROJECT, [clean(project)] * 2) if project else ("", [])
        statement = _TARGETS + _BY[by] + only + _IN_ORDER
        rows = self._registry.rows(statement, value, *names, MAX_TARGETS + 1)
        return [Target(*row) for row in rows]

    def among(self, devices: Iterable[str]) -> list[Target]:
        """Those of the devices that are known."""
        return [each for device in devices for each in self.find("device", device)]

    def call(self, targets: Sequence[Target], stagger: int, now: int, project: str = "") -> int:
        """Lets devices be told, one each `stagger` seconds; gives back how many topics that are.

        They are to ask for an image of `project`, or of their own; who has none is left out. What
        waits for the same topic is replaced. Devices that share one are told together.
        """
        told: dict[tuple[str, str], list[str]] = {}
        for each in targets:
            if wanted := clean(project or each.project):
                topic = topic_for(self.template, *each)
                told.setdefault((topic, wanted), []).append(each.device)
        rows = [
            (devices[0] if len(devices) == 1 else "", *key, now + place * stagger)
            for place, (key, devices) in enumerate(told.items())
        ]
        with self._registry.writing() as connection:
            queued = connection.execute(_QUEUED).fetchall()
            _drop(connection, [number for *key, number in queued if tuple(key) in told])
            connection.executemany(_CALL, rows)
        return len(rows)

    def take_back(self, project: str = "") -> int:
        """Forgets what was not said yet, of one project or of all; gives back how many."""
        statement = "DELETE FROM summons WHERE (? = '' OR body = ?)"
        return self._registry.write(statement, *[clean(project)] * 2)

    def claim(self, now: int, most: int) -> list[Summon]:
        """What is due and nobody else says meanwhile."""
        found = [Summon(*row) for row in self._registry.rows(_DUE, now, most)]
        if not found:
            return []
        with self._registry.writing() as connection:
            hopeless = [each for each in found if each.tries >= MAX_TRIES]
            _drop(connection, [each.id for each in hopeless])
            claimed = [each for each in found if _is_ours(connection, each, now)]
        for each in hopeless:
            log.warning("%s never took what %r is to be told", each.topic, each.device)
        return claimed

    def resume(self, now: int) -> None:
        """After an outage: everything moves by as much as the first is late.

        So what was to be told one after the other still is.
        """
        with self._registry.writing() as connection:
            (earliest,) = connection.execute(_EARLIEST).fetchone()
            if earliest is not None and now - earliest > LATE:
                connection.execute(_SHIFT, (now - earliest,))


def _is_ours(connection: Connection, summon: Summon, now: int) -> bool:
    """Whether it is claimed now; False: it was, or it is gone."""
    values = now + LEASE, summon.id, summon.tries
    return connection.execute(_CLAIM, values).rowcount == 1


def _drop(connection: Connection, ids: Iterable[int]) -> None:
    connection.executemany(_DROP, [(number,) for number in ids])


def trigger(summon: Summon, server: str, key: bytes, now: int) -> bytes:
    """The message, as firmware expects it that is told so (S2's).

    The URL is below `server`, which ends with no slash; with a key it is signed, and good from now.
    """
    url = f"{server}/{quote(summon.project, safe='')}/latest.bin"
    said = {"id": summon.device, "version": summon.version if summon.device else ""}
    query = "&".join(f"{name}={quote(text, safe=':')}" for name, text in said.items() if text)
    url += "?" * bool(query) + query
    if key:
        url = signed(key, url, now + SIGNED_SECONDS)
    return json.dumps({"type": "ota_trigger", "url": url}, separators=(",", ":")).encode()
