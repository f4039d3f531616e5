"""What the fleet remembers: devices and who is admitted; others keep what is theirs through it.

    loop    -- seen(sighting) --> queue --> one thread, a transaction a second --> DIR/fleet.db
    threads -- admit(), put_app() ... --> write(): one lock, a transaction each --^      |
    anybody <-- devices(), app() ... <-- rows(): connections that only read <------------+
    loop <-- admitted(), pin() ... <-- memory, read again when anybody else has written <-+

Readers never wait for a writer, and `seen()` waits for nobody. A check-in of the last second may be
lost when the machine dies; what the other functions wrote is on the disk when they return. Times
(UTC seconds) come from the caller. SQL is here, in `tables.py` and `schema.py`, and in rooms
that use a registry: docs/decisions/0007 names them. It is what SQLite and PostgreSQL share, but
where it says otherwise; values are parameters only.
"""

from __future__ import annotations

import functools
import json
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from sqlite3 import Connection
from time import monotonic
from typing import Any, Generic, TypeVar

from ota_fleet import searches
from ota_fleet.policy import check_word
from ota_fleet.rows import (
    MAX_LONG,
    MAX_TEXT,
    App,
    Device,
    Search,
    Sighting,
    StoredFile,
    by_version,
    clean,
    normal_id,
)
from ota_fleet.schema import WAIT, connect, pragma, prepare, save, transaction
from ota_fleet.tables import CROWD_OUT, FORGET
from ota_server import Version

__all__ = ["App", "Device", "Registry", "Search", "Sighting", "StoredFile", "normal_id"]

BATCH_SECONDS = 1.0  # between two batches: what a dying machine forgets
MAX_BATCH = 2_000  # check-ins of one transaction, some 80 ms: others wait that long for the lock
MAX_QUEUED = 20_000  # check-ins that wait for a locked or full disk, some 10 MB; older ones go
MAX_DEVICES = 10_000
MAX_LABELS = 32
MAX_PAGE = 1_000  # rows of one page of a list
MAX_IDLE = 8  # connections kept for the next readers
MAX_WAITING = 8  # threads that wait for their turn to write
SOON = 0.5  # seconds, after which whoever has not even such a place gives up
EVERYTHING = Search()
STALE = 10.0  # seconds; who has not written for so long does not write any more
READ_WAIT = 0.2  # seconds; nothing of ours makes a reader wait, another program may

log = logging.getLogger("ota.registry")

# What a device does not say stays as it was, unless what it says makes that untrue: a digest is of
# a version, a version of a project. "some ESP32" does not replace the very chip, which a MAC keeps
# for life. Who has no address asked for nothing: it said by MQTT what it runs. The last to arrive
# is right, whatever its time: the clocks of small servers jump.
_SEEN = """
INSERT INTO device (id, project, chip, version, image, free_space, sdk, address,
                    first_seen, last_seen, downloads, offered, offers)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    project = COALESCE(NULLIF(excluded.project, ''), device.project),
    chip = CASE WHEN excluded.chip = '' OR excluded.chip LIKE 'some %' AND device.chip <> ''
        THEN device.chip ELSE excluded.chip END,
    version = CASE WHEN excluded.version = '' AND excluded.project IN ('', device.project)
        THEN device.version ELSE excluded.version END,
    image = CASE WHEN excluded.image = '' AND excluded.project IN ('', device.project)
        AND excluded.version IN ('', device.version) THEN device.image ELSE excluded.image END,
    free_space = COALESCE(excluded.free_space, device.free_space),
    sdk = COALESCE(NULLIF(excluded.sdk, ''), device.sdk), last_seen = excluded.last_seen,
    address = COALESCE(NULLIF(excluded.address, ''), device.address),
    interval = CASE WHEN excluded.last_seen - device.last_seen < 60 OR device.offered <> ''
        THEN device.interval
        WHEN device.interval = 0 THEN excluded.last_seen - device.last_seen
        WHEN excluded.last_seen - device.last_seen > 4 * device.interval
        THEN device.interval + (3 * device.interval) / 8
        ELSE device.interval + (excluded.last_seen - device.last_seen - device.interval) / 8 END,
    missed = 0, downloads = device.downloads + excluded.downloads,
    offers = CASE WHEN excluded.address = '' THEN device.offers
        WHEN excluded.offered = '' THEN 0 WHEN excluded.version = '' THEN device.offers
        WHEN (excluded.project, excluded.version, excluded.offered)
        = (device.project, device.version, device.offered) THEN device.offers + 1 ELSE 1 END,
    offered = CASE WHEN excluded.address = '' OR excluded.offered <> '' AND excluded.version = ''
        THEN device.offered ELSE excluded.offered END
"""
_VERSIONS = "SELECT version, id FROM device WHERE "
_COUNT = "SELECT COUNT(*) FROM device WHERE "
_ADMISSIONS = """SELECT device FROM admission WHERE project = ? AND device > ?
ORDER BY device LIMIT ?"""
_NOTE = """UPDATE device SET notes = COALESCE(?, notes), labels = COALESCE(?, labels),
    pin = COALESCE(?, pin), channel = COALESCE(?, channel), team = COALESCE(?, team) WHERE id = ?"""
_ADMIT = "INSERT INTO admission (project, device) VALUES (?, ?) ON CONFLICT DO NOTHING"
_EXPEL = "DELETE FROM admission WHERE project = ? AND device = ?"
_APPS = "SELECT device_id, app_ver, update_file_path FROM device_app "
_PUT_APP = """INSERT INTO device_app (device_id, app_ver, update_file_path) VALUES (?, ?, ?)
ON CONFLICT (device_id) DO UPDATE SET
    app_ver = excluded.app_ver, update_file_path = excluded.update_file_path"""
_DROP_APP = "DELETE FROM device_app WHERE device_id = ?"
_FILES = "SELECT path, sha256, md5, size FROM stored_file WHERE path = ?"
_NAMED = """SELECT sha256 FROM stored_file WHERE sha256 = ?
UNION ALL SELECT sha256 FROM release WHERE sha256 = ?
UNION ALL SELECT sha256 FROM draft WHERE sha256 = ? LIMIT 1"""
_ALL_NAMED = """SELECT sha256 FROM stored_file UNION SELECT sha256 FROM release
UNION SELECT sha256 FROM draft"""
_PUT = """INSERT INTO stored_file (path, sha256, md5, size) VALUES (?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET
    sha256 = excluded.sha256, md5 = excluded.md5, size = excluded.size"""


T = TypeVar("T")


class _Pending(Generic[T]):
    """What waits for a batch."""

    def __init__(self, write: Callable[[Connection, list[T]], None]) -> None:
        self.write = write
        self.queue: deque[T] = deque(maxlen=MAX_QUEUED)
        self.batch: list[T] = []  # taken from the queue, not written

    def take(self) -> list[T]:
        """What one transaction takes of it."""
        while self.queue and len(self.batch) < MAX_BATCH:
            self.batch.append(self.queue.popleft())
        batch, self.batch = self.batch, []
        return batch


Taken = list[tuple[_Pending[Any], list[Any]]]  # a batch of each


class Turn:
    """A lock for which few wait, and none for long, so that threads are left for everybody else.

    Entering raises sqlite3.OperationalError, with SQLITE_BUSY, where it would be too long.
    """

    def __init__(self, seconds: float, most: int = MAX_WAITING) -> None:
        """At most so many wait, at most so long."""
        self.lock = threading.RLock()
        self._seconds = seconds
        self._places = threading.BoundedSemaphore(most)

    def __enter__(self) -> None:
        if not (self.lock.acquire(blocking=False) or self._wait()):
            busy = sqlite3.OperationalError("others are writing")
            busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise busy

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def _wait(self) -> bool:
        if not self._places.acquire(timeout=min(SOON, self._seconds)):
            return False
        try:
            return self.lock.acquire(timeout=self._seconds)
        finally:
            self._places.release()


class Registry:
    """The one room with a memory. Every function may be called from any thread."""

    def __init__(
        self, path: str | Path, *, max_devices: int = MAX_DEVICES, every: float = 0
    ) -> None:
        """Opens the registry, or makes it where there is no file, and begins to write check-ins.

        Of more than `max_devices`, those seen longest ago are forgotten, unless somebody admitted
        them or wrote a note on them. `every` are the seconds between two batches; 0: as usual.

        Raises:
            RuntimeError: a sentence for the operator; the file was not changed. See prepare().
        """
        self._path = Path(path)
        self._max_devices, self._every = max_devices, every
        prepare(self._path)
        self._pending: list[_Pending[Any]] = []
        self._see = self.in_batches(self._write_sightings)
        self._outage = False  # that nothing can be written just now was said
        self._written_at = monotonic()
        self._full = False  # that devices are forgotten was said
        self._turn = Turn(WAIT)
        self._lock = self._turn.lock  # of both writing connections; SQLite has one writer anyway
        self._often = self._connection("PRAGMA synchronous = NORMAL", WAIT)  # no sync for a batch
        self._surely = self._connection("PRAGMA synchronous = FULL", WAIT)
        self._told: list[Callable[[], None]] = []  # once the transaction is on the disk
        self._idle: list[Connection] = []
        self._admitted: dict[str, frozenset[str]] = {}  # replaced whole: read without a lock
        self._watchers: list[Callable[[], None]] = []
        self._refreshing = threading.Lock()
        self._seen_version = -1
        self._closing = threading.Event()
        self.watch(self._read_memory)
        self._thread = threading.Thread(target=self._work, name="registry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes what is queued and closes the file; once more does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        try:
            self.flush()
        except sqlite3.Error as err:
            log.error("the last check-ins are lost: %s", err)  # noqa: TRY400 - no trace helps here
        with self._lock:
            self._often.close()
            self._surely.close()
        self._close_idle()

    def backup(self, file: str | Path) -> None:
        """A sound copy of the registry in one file, while others write. See save()."""
        with self.reading() as connection:
            save(connection, self._path, Path(file))

    # -- Check-ins ---------------------------------------------------------------------------------

    def seen(self, sighting: Sighting) -> None:
        """Remembers a check-in, within about a second; never waits."""
        self._see(sighting)

    def in_batches(self, write: Callable[[Connection, list[T]], None]) -> Callable[[T], None]:
        """What queues an item and waits for nobody: `write` gets it in the next check-ins' batch.

        All that is in a batch is written together, or again a second later.
        """
        pending = _Pending(write)
        self._pending.append(pending)
        return pending.queue.append

    def flush(self) -> None:
        """Waits until all that was queued is written. sqlite3.Error: it cannot be, just now."""
        most = max(len(each.queue) for each in self._pending)
        for _ in range(2 + most // MAX_BATCH):  # not for what comes meanwhile
            with self._lock:
                self._write_batch()

    def _write_batch(self) -> None:
        with self._taken() as taken:
            if taken:
                with self._telling(self._often) as connection:
                    self._write_all(connection, taken)

    @contextmanager
    def _taken(self) -> Iterator[Taken]:
        """A batch of all that is queued; what cannot be written is not lost."""
        taken = [(each, batch) for each in self._pending if (batch := each.take())]
        try:
            yield taken
        except sqlite3.OperationalError:
            self._put_back(taken)  # locked by another program, or a full disk: again in a second
            raise

    @staticmethod
    def _put_back(taken: Taken) -> None:
        for each, batch in taken:
            each.batch = batch

    def _write_all(self, connection: Connection, taken: Taken) -> None:
        for each, batch in taken:
            each.write(connection, batch)
        if taken:
            self._crowd_out(connection)

    @staticmethod
    def _write_sightings(connection: Connection, sightings: list[Sighting]) -> None:
        rows = [sighting.row() for sighting in sightings if sighting.device]
        rows.sort(key=itemgetter(0))  # as the rows on the disk; of one device they stay in order
        connection.executemany(_SEEN, rows)

    def _crowd_out(self, connection: Connection) -> None:
        known = connection.execute("SELECT COUNT(*) FROM device").fetchone()[0]
        if known <= self._max_devices:
            return
        gone = connection.execute(CROWD_OUT, (known - self._max_devices,)).fetchall()
        for statement in FORGET:
            connection.executemany(statement, gone)
        self._seen_version = -1  # who remembers something of them reads again
        if not self._full:
            self._full = True
            log.warning("max-devices %d is reached: unknown ones are forgotten", self._max_devices)

    def _work(self) -> None:
        """The thread that writes; a failure is told once, until it is over."""
        while not self._closing.wait(self._every or BATCH_SECONDS):
            try:
                self.flush()
                self.refresh()
            except Exception:
                if not self._outage:
                    log.exception("check-ins cannot be written; it is tried again each second")
                self._outage = True
            else:
                if self._outage:
                    log.warning("check-ins are written again")
                self._outage = False
                self._written_at = monotonic()

    def is_writing(self) -> bool:
        """Whether check-ins could be written a moment ago; never waits, also for a stuck disk."""
        return monotonic() - self._written_at < STALE

    def waiting(self) -> int:
        """How many check-ins are not written yet."""
        return len(self._pending[0].queue) + len(self._pending[0].batch)

    # -- Devices -----------------------------------------------------------------------------------

    def devices(
        self, search: Search = EVERYTHING, after: Sequence[str | int] = (), limit: int = 100
    ) -> list[Device]:
        """A page of devices, from behind a place(); at most MAX_PAGE.

        Raises:
            KeyError: there is no such order, or state.
        """
        where, values = searches.where(search, self.rows)
        after = [clean(each) if isinstance(each, str) else each for each in after]
        limit = max(1, min(limit, MAX_PAGE))
        if search.sort.endswith("version"):
            return self._by_version((_VERSIONS + where, *values), search.sort, after, limit)
        behind, order = searches.SORTED[search.sort]
        statement = searches.DEVICES + where + (behind if after else "") + order
        return [Device.of(row) for row in self.rows(statement, *values, *after, limit)]

    def count(self, search: Search) -> int:
        """How many devices there are of a search."""
        where, values = searches.where(search, self.rows)
        return int(self.rows(_COUNT + where, *values)[0][0])

    def words(self) -> tuple[list[str], list[str]]:
        """The chips that devices have, and the labels."""
        lists = [json.loads(text) for (text,) in self.rows(searches.LABELS, MAX_PAGE)]
        return [chip for (chip,) in self.rows(searches.CHIPS, MAX_PAGE)], sorted({*chain(*lists)})

    def _by_version(
        self, query: Sequence[Any], sort: str, after: Sequence[str | int], limit: int
    ) -> list[Device]:
        """The same in the order of SemVer, which is not SQL's."""
        with self.reading() as connection, transaction(connection, "BEGIN"):
            rows = connection.execute(query[0], query[1:])
            found = [*islice(by_version(rows, after, down=sort[0] == "-"), limit)]
            one = functools.partial(connection.execute, searches.DEVICES + "id = ?")
            return [Device.of(one((device,)).fetchone()) for device in found]

    def device(self, device: str) -> Device | None:
        """What is known of an id; None: it was never seen, or forgotten."""
        rows = self.rows(searches.DEVICES + "id = ?", normal_id(device))
        return Device.of(rows[0]) if rows else None

    def forget(self, device: str) -> bool:
        """Deletes what is known of a device, but its admission; False: nothing was."""
        with self.writing() as connection:
            for statement in FORGET:
                connection.execute(statement, (normal_id(device),))
            return self.write("DELETE FROM device WHERE id = ?", normal_id(device)) > 0

    def annotate(
        self,
        device: str,
        *,
        notes: str | None = None,
        labels: Iterable[str] | None = None,
        pin: str | None = None,
        channel: str | None = None,
        group: str | None = None,
    ) -> bool:
        """Sets notes, labels, which are sorted, pin, channel or group; None: it stays.

        Gives back False if there is no such device.

        Raises:
            ValueError: too long, too many, or an empty label; a pin that is no version; a channel
                or a group that cannot be called so.
        """
        for word, what in ((channel, "channel"), (group, "group")):
            if word:
                check_word(word, what)
        if len(notes or "") > MAX_LONG:
            raise ValueError(f"notes have at most {MAX_LONG} characters")
        words = sorted({clean(label, MAX_LONG) for label in labels or ()})
        if len(words) > MAX_LABELS or not all(0 < len(word) <= MAX_TEXT for word in words):
            raise ValueError(f"labels: at most {MAX_LABELS}, of 1 to {MAX_TEXT} characters")
        text = None if labels is None else json.dumps(words, ensure_ascii=False, indent=0)
        pin = str(Version.parse(pin)) if pin else pin
        note = notes and clean(notes, MAX_LONG)
        return self.write(_NOTE, note, text, pin, channel, group, normal_id(device)) > 0

    # -- Admission ---------------------------------------------------------------------------------

    def admit(self, project: str, device: str) -> bool:
        """Lets a device have a project's images, seen or not; False: it could already."""
        return self._change_admission(_ADMIT, project, device)

    def expel(self, project: str, device: str) -> bool:
        """Takes an admission back; False: there was none."""
        return self._change_admission(_EXPEL, project, device)

    def admitted(self, project: str) -> frozenset[str]:
        """The ids admitted to a project, from memory; of another process within a second."""
        return self._admitted.get(project, frozenset())

    def admissions(self, project: str, after: str = "", limit: int = 100) -> list[str]:
        """A page of the ids admitted to a project, from behind the id `after`; at most MAX_PAGE."""
        page = clean(project), clean(after), max(1, min(limit, MAX_PAGE))
        return [device for (device,) in self.rows(_ADMISSIONS, *page)]

    def _change_admission(self, statement: str, project: str, device: str) -> bool:
        return self.write(statement, clean(project), normal_id(device)) > 0

    # -- Memory ------------------------------------------------------------------------------------

    def watch(self, read: Callable[[], None]) -> None:
        """Calls `read` now, and again whenever anything but check-ins was written.

        Also by another process, within a second. It replaces what the loop then reads.
        """
        read()
        self._watchers.append(read)

    def refresh(self) -> None:
        """Lets all who watch() read again, if anybody else than the batches wrote."""
        with self._refreshing:  # who comes second reads what the first may have missed
            with self._lock:
                version = pragma(self._often, "PRAGMA data_version")  # PostgreSQL: LISTEN
            if version != self._seen_version:
                for read in self._watchers:
                    read()
                self._seen_version = version

    def _read_memory(self) -> None:
        found: dict[str, set[str]] = {}
        for project, device in self.rows("SELECT project, device FROM admission"):
            found.setdefault(project, set()).add(device)
        self._admitted = {project: frozenset(ids) for project, ids in found.items()}

    # -- The two-step protocol's table -------------------------------------------------------------

    def apps(self) -> list[App]:
        """All of its lines, by device id."""
        return [App(*row) for row in self.rows(_APPS + "ORDER BY device_id")]

    def app(self, device: str) -> App | None:
        """The line of a device; None: there is none."""
        rows = self.rows(_APPS + "WHERE device_id = ?", clean(device, MAX_LONG))
        return App(*rows[0]) if rows else None

    def put_app(self, app: App) -> None:
        """Writes a line, in the place of the one with its id."""
        self.write(_PUT_APP, *(clean(text, MAX_LONG) for text in astuple(app)))

    def delete_app(self, device: str) -> bool:
        """Deletes a line; False: there was none."""
        return self.write(_DROP_APP, clean(device, MAX_LONG)) > 0

    # -- Connections -------------------------------------------------------------------------------

    def _connection(self, setting: str, wait: float) -> Connection:
        connection = connect(self._path, wait)
        connection.execute(setting)
        return connection

    def file(self, path: str) -> StoredFile | None:
        """What is stored under a path of the two-step protocol; None: nothing."""
        rows = self.rows(_FILES, path)
        return StoredFile(*rows[0]) if rows else None

    def put_file(self, connection: Connection, file: StoredFile) -> str:
        """Writes a row in the place of the one with its path, as part of a transaction.

        Gives back the digest of the bytes that were under this path; "": there were none.
        """
        before = connection.execute(_FILES, (file.path,)).fetchone()
        connection.execute(_PUT, astuple(file))
        return StoredFile(*before).sha256 if before else ""

    def is_named(self, connection: Connection, digest: str) -> bool:
        """Whether a row names these bytes, as part of a transaction."""
        return connection.execute(_NAMED, (digest,) * 3).fetchone() is not None

    def file_digests(self) -> frozenset[str]:
        """The SHA-256 of all bytes that a row names."""
        return frozenset(digest for (digest,) in self.rows(_ALL_NAMED))

    def write(self, statement: str, *values: str | int | None) -> int:
        """One statement that is on the disk when this returns; gives back how many rows changed."""
        with self.writing() as connection:
            return connection.execute(statement, values).rowcount

    @contextmanager
    def granting(self) -> Iterator[Connection]:
        """A transaction behind all that was queued, on the disk when this is left.

        For what comes often and must be known: watch() reads nothing again. sqlite3.Error: see
        writing().
        """
        with self._turn, self._taken() as taken:
            self._often.execute("PRAGMA synchronous = FULL")
            try:
                with self._telling(self._often) as connection:
                    self._write_all(connection, taken)
                    try:
                        yield connection
                    except BaseException:  # what was queued is not to blame
                        self._put_back(taken)
                        raise
            finally:
                self._often.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is on the disk, and in everybody's memory, when this is left.

        What is written inside by the same thread belongs to it. sqlite3.OperationalError, with
        SQLITE_BUSY: others write for too long, or too many wait.
        """
        with self._turn:
            if self._surely.in_transaction:
                yield self._surely
                return
            with self._telling(self._surely) as connection:
                yield connection
        self.refresh()

    @contextmanager
    def _telling(self, connection: Connection) -> Iterator[Connection]:
        """A transaction that tells who wants to know that it is written."""
        self._told = []
        with transaction(connection):
            yield connection
        for tell in self._told:
            tell()

    def once_written(self, tell: Callable[[], None]) -> None:
        """Calls this when what this thread is writing is on the disk; if it never is, never.

        Also of a batch, which may wait for the disk a while longer.
        """
        self._told.append(tell)

    def rows(self, statement: str, *values: str | int) -> list[Any]:
        """What a statement finds; it cannot write."""
        with self.reading() as connection:
            return connection.execute(statement, values).fetchall()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that is this thread's until it gives it back: threads come and go."""
        if self._closing.is_set():
            raise RuntimeError("the registry is closed")
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connection("PRAGMA query_only = 1", wait=READ_WAIT)
        try:
            yield connection
        finally:
            self._idle.append(connection)
            if self._closing.is_set() or len(self._idle) > MAX_IDLE:
                self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # the last may be taken meanwhile
            while self._idle:
                self._idle.pop().close()
