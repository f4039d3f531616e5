"""Webhooks: what happened is told to who wants to know it, again until the receiver says 2xx.

    notify(), in the transaction of what happened --> a row for each webhook that wants it
    loop -- note(event) --> the registry's next batch: device.unknown --^
    thread, each second --> a look at the catalog: release.new ---------^
                        --> a sweep over devices: device.silent --------^
                        --> claims what is due --> send() in a thread --> gone, or due later

A row is claimed by putting it off for longer than a try can take, so two servers with one database
send it once. A server that dies in the middle of a try sends it again: the receiver can tell by the
id. At most one try is under way for each webhook, so one that hangs keeps nobody else waiting. What
is sent, and how, is in `deliveries.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import sqlite3
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from sqlite3 import Connection
from typing import NamedTuple

from ota_fleet.deliveries import (
    Delivery,
    Webhook,
    body_of,
    checked_secret,
    checked_url,
    pause_of,
    send,
)
from ota_fleet.history import DAY, HOUR, MONTH
from ota_fleet.registry import MAX_PAGE, Registry, normal_id
from ota_fleet.rows import MAX_INTEGER, clean, is_example
from ota_server import (
    COMPLAIN_SECONDS,
    UNVERSIONED,
    Catalog,
    Event,
    Objection,
    Refused,
    Release,
)

PING = "ping"  # of a test
MAX_WEBHOOKS = 32
MAX_WAITING = 10_000  # deliveries, some 5 MB; more push out others
MAX_TRIES = 12
LANES = 4  # deliveries under way at once
PAUSE = 1.0  # seconds between two looks at what is due
NEVER = DAY  # seconds for which nothing is put off, unless the clock was wrong
LEASE = 120  # seconds for a whole try, with the name of the host
LOOK_SECONDS = 5  # between two looks at the catalog
CALM = 3  # looks in which nothing changed, after which the first start knows all files
SWEEP_SECONDS = 60  # between two looks for silent devices
SWEPT = 100  # devices of one sweep
NAMED = 100  # devices that one delivery names
MAX_MET = 20_000  # devices that are known to be known, some 4 MB
PATIENCE = 4  # of its own intervals, after which a device is silent
STALE = 30.0  # seconds after which reading does not work any more
LAST_WORDS = 2.0  # seconds for what is under way when the server stops

NOT_ADMITTED = "not-whitelisted"  # code of the objection
_MARK = ("", "")  # stands in `announced` once it holds what there was at the first start

_WEBHOOKS = "SELECT id, url, events, secret, who, at FROM webhook "
_WITH_DUE = """SELECT id, url, events, secret, who, at FROM webhook
WHERE id IN (SELECT webhook FROM delivery WHERE due <= ? OR due > ?)"""
_ADD = "INSERT INTO webhook (url, events, secret, who, at) VALUES (?, ?, ?, ?, ?) RETURNING id"
_QUEUE = "INSERT INTO delivery (webhook, event, body, due) VALUES (?, ?, ?, ?) RETURNING id"
_WAITING = "SELECT COUNT(*) FROM delivery"
# What anybody can cause, by making up devices, never pushes out what somebody has to know.
_PUSH_OUT = """DELETE FROM delivery WHERE id IN (SELECT id FROM delivery
ORDER BY CASE WHEN event LIKE 'device.%' THEN 0 ELSE 1 END, id LIMIT ?)"""
_DELIVERIES = "SELECT id, webhook, event, body, due, tries, failure FROM delivery WHERE webhook = ?"
_LISTED = _DELIVERIES + " AND id > ? ORDER BY id LIMIT ?"
_NEXT = _DELIVERIES + " AND (due <= ? OR due > ?) ORDER BY due, id LIMIT 1"
_CLAIM = "UPDATE delivery SET due = ? WHERE id = ? AND due = ?"
_DONE = "DELETE FROM delivery WHERE id = ? AND due = ?"
_AGAIN = "UPDATE delivery SET due = ?, tries = ?, failure = ? WHERE id = ? AND due = ?"
_ANNOUNCED = "SELECT project, version FROM announced"
_ANNOUNCE = "INSERT INTO announced (project, version) VALUES (?, ?) ON CONFLICT DO NOTHING"
_LAST_SEEN = "SELECT COALESCE(MAX(last_seen), 0) FROM device"
_SILENT = """SELECT id, project, version, last_seen FROM device WHERE missed = 0
AND last_seen >= ? AND last_seen < ?
AND CASE WHEN last_seen < ? THEN ? ELSE last_seen END + ? * interval < ?
ORDER BY last_seen LIMIT ?"""
_MISS = "UPDATE device SET missed = 1 WHERE id = ? AND last_seen = ? AND missed = 0"
_FIRST_SEEN = "SELECT first_seen FROM device WHERE id = ?"
_REFUSED = "SELECT 1 FROM visit WHERE device = ? AND code = ? AND at < ? LIMIT 1"

log = logging.getLogger("ota.hooks")


class _Met(NamedTuple):
    """A device that this process sees for the first time, or sees refused for the first time."""

    device: str
    project: str
    version: str
    address: str
    code: str  # NOT_ADMITTED, or ""
    at: int  # UTC seconds


class Hooks:
    """Webhooks and what they are to be told.

    Every function may be called from any thread, but turn() and what it does by one at a time.
    """

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        resolve: Callable[[str], str] = str,
        *,
        now: Callable[[], float] = time.time,
        dice: Callable[[], float] = random.random,
    ) -> None:
        """Sends nothing before start(). `resolve` gives the name of a project for its alias."""
        self._registry, self._catalog, self._resolve = registry, catalog, resolve
        self._now, self._dice = now, dice
        self._met: set[tuple[str, str]] = set()
        self._meet = registry.in_batches(self._write_unknown)
        self._lanes: dict[int, threading.Thread] = {}  # by webhook; the hooks' thread's alone
        self._answered: deque[tuple[Webhook, Delivery, str]] = deque()  # with the failure
        self._turns = count(1)
        self._served: dict[int, int] = {}  # by webhook, the turn in which it had one
        self._shelves: Mapping[str, Sequence[Release]] = {}
        self._calm = 0  # looks in which nothing changed
        self._settled = False  # the releases of the first start are known
        self._began = 0  # UTC seconds, from when on devices can be missed
        self._swept_at: int = registry.rows(_LAST_SEEN)[0][0]  # as if until then
        self._looked_at = self._complained_at = -DAY
        self._read_at = time.monotonic()
        self._chores: tuple[Callable[[], None], ...] = ()
        self._outage = False  # that it does not work was said
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)

    def start(self, *chores: Callable[[], None]) -> None:
        """Begins to look, and to send; does the `chores` each minute."""
        self._chores = chores
        self._thread.start()

    def close(self) -> None:
        """Ends the sending; what is under way has a moment to be answered. Once more: nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        until = time.monotonic() + LAST_WORDS
        for lane in self._lanes.values():
            lane.join(max(0.0, until - time.monotonic()))
        with suppress(sqlite3.Error):  # then it is sent once more
            self._deliver(int(self._now()), ())

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        """Whom it believes: made once, as that takes 20 ms, and 1 MB for the authorities."""
        return ssl.create_default_context()

    # -- Webhooks

    def webhooks(self) -> list[Webhook]:
        """All of them, the oldest first."""
        return [Webhook.of(row) for row in self._registry.rows(_WEBHOOKS + "ORDER BY id")]

    def add(self, url: str, events: Iterable[str], secret: str, who: str) -> Webhook:
        """A new one; without a secret it gets one.

        Raises:
            ValueError: a sentence about URL or secret.
            Refused: 409, there are too many.
        """
        names = tuple(sorted({*events}))
        made = Webhook(0, checked_url(url), names, checked_secret(secret), who, int(self._now()))
        row = made.url, json.dumps(names), made.secret, clean(made.who), made.at
        with self._registry.writing() as connection:
            if len(connection.execute(_WEBHOOKS).fetchall()) >= MAX_WEBHOOKS:
                raise Refused(409, f"there are {MAX_WEBHOOKS} webhooks: take one away first")
            return replace(made, id=connection.execute(_ADD, row).fetchall()[0][0])

    def remove(self, webhook: int) -> Webhook:
        """Forgets one, and what it was to be told. Refused: 404, there is none."""
        with self._registry.writing() as connection:
            gone = _one(connection, webhook)
            connection.execute("DELETE FROM delivery WHERE webhook = ?", (gone.id,))
            connection.execute("DELETE FROM webhook WHERE id = ?", (gone.id,))
        return gone

    def ping(self, webhook: int) -> tuple[Webhook, int]:
        """Tells one that this is a test; gives back the delivery's id. Refused: 404."""
        with self._registry.writing() as connection:
            found = _one(connection, webhook)
            return found, self._queue(connection, [found], PING, {"webhook": found.id})

    def deliveries(self, webhook: int, after: int = 0, limit: int = 100) -> list[Delivery]:
        """What one is still to be told, from behind an id. Refused: 404, there is no such one."""
        with self._registry.reading() as connection:
            found = _one(connection, webhook)
            behind = max(0, min(after, MAX_INTEGER))
            values = found.id, behind, max(1, min(limit, MAX_PAGE))
            return [Delivery(*row) for row in connection.execute(_LISTED, values)]

    def waiting(self) -> int:
        """How many deliveries are not done."""
        return int(self._registry.rows(_WAITING)[0][0])

    def is_reading(self) -> bool:
        """Whether the registry could be read a moment ago; never waits."""
        return time.monotonic() - self._read_at < STALE

    # -- What happened

    def notify(self, connection: Connection, event: str, data: Mapping[str, object]) -> None:
        """Tells all who want to know, if the transaction of this connection is not taken back."""
        found = map(Webhook.of, connection.execute(_WEBHOOKS + "ORDER BY id").fetchall())
        self._queue(connection, [each for each in found if each.wants(event)], event, data)

    def _queue(
        self, connection: Connection, to: Sequence[Webhook], event: str, data: Mapping[str, object]
    ) -> int:
        """Adds a delivery to each; gives back the id of the last."""
        now, number = int(self._now()), 0
        body = body_of(event, now, data)
        for each in to:
            row = each.id, event, body, now
            number = connection.execute(_QUEUE, row).fetchall()[0][0]
        excess = connection.execute(_WAITING).fetchone()[0] - MAX_WAITING if to else 0
        if excess > 0:
            connection.execute(_PUSH_OUT, (excess,))
            if abs(now - self._complained_at) >= COMPLAIN_SECONDS:
                self._complained_at = now
                log.warning("%d deliveries wait for webhooks: the oldest are dropped", MAX_WAITING)
        return number

    # -- Devices nobody knows

    def note(self, event: Event) -> None:
        """The listener; waits for nothing. It has to hear of an event before the registry does."""
        report, outcome = event
        if report.device is None:
            return
        refused = isinstance(outcome, Objection) and outcome.code == NOT_ADMITTED
        key = report.device, NOT_ADMITTED if refused else ""
        if key in self._met or is_example(key[0]):
            return
        if len(self._met) >= MAX_MET:
            self._met.clear()
        self._met.add(key)
        who = report.project, str(report.version or ""), report.address
        self._meet(_Met(key[0], *who, key[1], int(self._now())))

    def _write_unknown(self, connection: Connection, met: list[_Met]) -> None:
        """Part of a batch's transaction, behind its check-ins: one delivery for all of them."""
        found: dict[str, dict[str, str]] = {}
        for each in met:
            device = normal_id(each.device)
            if device not in found and (why := _unknown(connection, device, each)):
                project, version = clean(self._resolve(each.project)), clean(each.version)
                seen = {"project": project, "version": version, "address": clean(each.address)}
                found[device] = {"device": device, **seen, "why": why}
        if found:
            data = {"count": len(found), "devices": [*found.values()][:NAMED]}
            self.notify(connection, "device.unknown", data)

    # -- The thread

    def _work(self) -> None:
        """The thread that looks; a failure is told once, until it is over."""
        while not self._closing.is_set():
            self._wake.wait(PAUSE)
            self._wake.clear()
            try:
                self.turn()
            except Exception:
                if not self._outage:
                    log.exception("webhooks are told nothing; it is tried again each second")
                self._outage = True
            else:
                self._outage = False

    def turn(self) -> None:
        """Does what is to be done at this time, and waits for no receiver."""
        now = int(self._now())
        due = [Webhook.of(row) for row in self._registry.rows(_WITH_DUE, now, now + NEVER)]
        self._read_at = time.monotonic()
        self._deliver(now, due)
        if abs(now - self._looked_at) >= LOOK_SECONDS:  # the clocks of small servers jump
            self._looked_at = now
            self.look()
        if abs(now - self._swept_at) >= SWEEP_SECONDS:
            self.sweep(now)
            for chore in self._chores:
                chore()

    # -- Releases

    def look(self) -> None:
        """Tells of releases that are new, in the folder or uploaded, once for all servers.

        Those of the very first start are no news. They come one by one, as their files are checked.
        """
        shelves: dict[str, Sequence[Release]] = {}
        checked = False
        with suppress(Refused):  # the folder is away
            projects = self._catalog.projects()
            checked = True
            for project in projects:
                try:
                    shelves[project] = self._catalog.releases(project)
                except Refused as refused:
                    checked &= refused.status == 404
        changed = [each for name, each in shelves.items() if each is not self._shelves.get(name)]
        self._calm = self._calm + 1 if checked and not changed else 0
        if changed or not self._settled:
            self._announce(changed)
        self._shelves = {**self._shelves, **shelves}

    def _announce(self, changed: Iterable[Sequence[Release]]) -> None:
        known = {(project, version) for project, version in self._registry.rows(_ANNOUNCED)}
        settled = _MARK in known
        fresh = {
            (each.project, str(each.version)): each.notes
            for releases in changed
            for each in reversed(releases)
            if each.version != UNVERSIONED
        }
        if not settled and self._calm >= CALM:
            fresh[_MARK] = ""
        if news := {pair: notes for pair, notes in fresh.items() if pair not in known}:
            with self._registry.granting() as connection:
                for (project, version), notes in news.items():
                    first = connection.execute(_ANNOUNCE, (project, version)).rowcount > 0
                    if first and settled:
                        data = {"project": project, "version": version, "notes": notes}
                        self.notify(connection, "release.new", data)
        self._settled = settled or _MARK in fresh

    # -- Silent devices

    def sweep(self, now: int) -> None:
        """Tells once of each device that is not seen any more, 100 at a time."""
        if now - self._swept_at > HOUR:  # the server was off, or its clock jumped: who was heard?
            self._began = now
        self._swept_at = now
        times = now - MONTH, now - DAY, self._began, self._began, PATIENCE, now
        if now < self._began + DAY or not self._registry.rows(_SILENT, *times, 1):
            return
        with self._registry.granting() as connection:
            for row in connection.execute(_SILENT, (*times, SWEPT)).fetchall():
                device, project, version, since = row
                if connection.execute(_MISS, (device, since)).rowcount:
                    seen = {"project": self._resolve(project), "version": version, "since": since}
                    self.notify(connection, "device.silent", {"device": device, **seen})

    # -- Deliveries

    def _deliver(self, now: int, due: Sequence[Webhook]) -> None:
        """Settles what was answered, and sends what is due to whoever had to wait longest."""
        answered = [*self._answered]
        done = {webhook.id for webhook, *_ in answered}
        busy = self._lanes.keys() - done
        idle = sorted(
            (each for each in due if each.id not in busy),
            key=lambda each: self._served.get(each.id, 0),
        )[: LANES - len(busy)]
        if not answered and not idle:
            return
        with self._registry.granting() as connection:
            told = [self._settle(connection, now, *each) for each in answered]
            claimed = [(each, _claim(connection, each.id, now)) for each in idle]
        for tell in told:
            tell()
            self._answered.popleft()
        self._lanes = {number: lane for number, lane in self._lanes.items() if number in busy}
        for webhook, delivery in claimed:
            if delivery is not None:
                self._served[webhook.id] = next(self._turns)
                work = functools.partial(self._try, webhook, delivery)
                lane = threading.Thread(target=work, name=f"webhook {webhook.id}", daemon=True)
                self._lanes[webhook.id] = lane
                lane.start()

    def _try(self, webhook: Webhook, delivery: Delivery) -> None:
        """The thread of one delivery."""
        try:
            failure = send(webhook, delivery, int(self._now()), lambda: self._trust)
        except Exception:
            log.exception("webhook %s: delivery %d failed", webhook.name, delivery.id)
            failure = "the server failed; its log says how"
        self._answered.append((webhook, delivery, failure))
        self._wake.set()

    def _settle(
        self, connection: Connection, now: int, webhook: Webhook, delivery: Delivery, failure: str
    ) -> Callable[[], None]:
        """Notes how a try ended, unless another server makes it meanwhile; gives what logs it."""
        name, event, claim = webhook.name, delivery.event, (delivery.id, delivery.due)
        tries = delivery.tries + 1
        if not failure:
            connection.execute(_DONE, claim)
            return functools.partial(log.info, "webhook %s: %s was taken", name, event)
        if tries < MAX_TRIES and now - delivery.at < DAY:
            pause = pause_of(tries, self._dice())
            connection.execute(_AGAIN, (now + pause, tries, failure, *claim))
            text = "webhook %s: %s again in %d s: %s"
            return functools.partial(log.info, text, name, event, pause, failure)
        connection.execute(_DONE, claim)
        text = "webhook %s: %s is given up after %d tries: %s"
        return functools.partial(log.warning, text, name, event, tries, failure)


def _one(connection: Connection, webhook: int) -> Webhook:
    row = connection.execute(_WEBHOOKS + "WHERE id = ?", (min(webhook, MAX_INTEGER),)).fetchone()
    if row is None:
        raise Refused(404, f"there is no webhook {webhook}")
    return Webhook.of(row)


def _claim(connection: Connection, webhook: int, now: int) -> Delivery | None:
    """What this server sends next; None: another one was faster."""
    row = connection.execute(_NEXT, (webhook, now, now + NEVER)).fetchone()
    if row is None:
        return None
    delivery = Delivery(*row)
    lease = now + LEASE
    claimed = connection.execute(_CLAIM, (lease, delivery.id, delivery.due)).rowcount > 0
    return delivery._replace(due=lease) if claimed else None


def _unknown(connection: Connection, device: str, met: _Met) -> str:
    """Why somebody should know of a device: "new", NOT_ADMITTED; "": nobody has to."""
    row = connection.execute(_FIRST_SEEN, (device,)).fetchone()
    if row and row[0] >= met.at:
        return "new"
    before = met.code and connection.execute(_REFUSED, (device, met.code, met.at)).fetchone()
    return "" if before else met.code
