"""The releases of the firmware folder and those that were uploaded, as one catalog.

    folder's catalog -------------------------+--> releases(project) --> devices
    add(body, row) -> Store, then its row     |
        -> memory -> checked: is it whole? ---+

Whatever was written, by this server or another one with the same state, is read again into memory;
the loop looks only there. A row says that an image was uploaded once; whether the file is still
what it was is found out at every start, by a thread, the newest of each project first.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from http import HTTPStatus
from itertools import chain, filterfalse, zip_longest
from operator import attrgetter
from typing import Any, BinaryIO

from ota_fleet.files import Found, Store
from ota_fleet.registry import Registry
from ota_fleet.rows import (
    MAX_LONG,
    Pile,
    Project,
    Rank,
    Stocked,
    StoredRelease,
    Tables,
    check_project,
    clean,
    merged,
    outdated,
    parsed,
    rank,
    tables_of,
)
from ota_fleet.schema import transaction
from ota_server import Catalog, Facts, Image, Refused, Release, Version, printable, shown

LOOK_SECONDS = 60.0  # between two looks at what is stored, unless there is a reason
AGAIN_SECONDS = 1.0  # the same while something cannot be read

_ALL = (
    "SELECT name, chips, created, partition_size, admit FROM project",
    "SELECT name, project FROM alias ORDER BY name",
    """SELECT project, version, kind, chip, packed, name, sha256, md5, size, notes, uploaded, who
    FROM release""",
    "SELECT project, sha256, reason FROM withdrawal",
)
_ADD = "INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REMOVE = """DELETE FROM release
WHERE project = ? AND version = ? AND kind = ? AND chip = ? AND packed = ?"""
_NOTE = "UPDATE release SET notes = ? WHERE project = ? AND version = ?"
_WITHDRAW = """INSERT INTO withdrawal (project, sha256, at, who, reason) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (project, sha256) DO UPDATE SET
    at = excluded.at, who = excluded.who, reason = excluded.reason"""
_RESTORE = "DELETE FROM withdrawal WHERE project = ? AND sha256 = ?"
_PUT = """INSERT INTO project (name, chips, created, partition_size, admit) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (name) DO UPDATE SET chips = excluded.chips,
    partition_size = excluded.partition_size, admit = excluded.admit"""
_UNNAME = "DELETE FROM alias WHERE project = ?"
_NAMED = """SELECT project FROM alias WHERE name = ? UNION SELECT name FROM project WHERE name = ?
UNION SELECT project FROM release WHERE project = ?"""
_HAS_RELEASES = "SELECT 1 FROM release WHERE project = ?"
_TOKENS = """SELECT id FROM token WHERE project = ?
OR project IN (SELECT name FROM alias WHERE project = ?) ORDER BY id"""
_RUNNING = "SELECT DISTINCT version, image, pin FROM device WHERE project = ?"

_FORGET = (  # what was said of a project that a later one of its name shall not have
    "DELETE FROM admission WHERE project = ?",
    "DELETE FROM policy WHERE scope = 'project' AND name = ?",
    "DELETE FROM approval WHERE project = ?",
    "DELETE FROM shelf WHERE project = ?",
    "DELETE FROM rollout WHERE project = ?",
)

UNKNOWN = Project("")

log = logging.getLogger("ota.stock")

Also = Callable[[], object]


class Stock:
    """The catalog of a site with a memory; see Catalog for what the loop asks.

    All other functions wait for the disk, may be called from any thread, and have done on the disk
    what they did when they return. Names of projects may be aliases, but for put_project().
    """

    def __init__(self, folder: Catalog, registry: Registry, store: Store) -> None:
        """Begins to check what was uploaded."""
        self._folder = folder
        self._registry = registry
        self._store = store
        self._rows_read: list[list[Any]] = []
        self._tables = Tables()
        self._found: dict[tuple[str, str], Found] = {}  # by SHA-256 and kind
        self._piles: Mapping[str, Pile] = {}  # replaced whole: read without a lock
        self._told: set[str] = set()  # aliases that are files' names as well
        self._cache: dict[str, tuple[Sequence[Release], Pile, Sequence[Release]]] = {}
        self._sorting = threading.Lock()  # who changes the piles
        self._checking = threading.Lock()  # who reads a file
        self._wake = threading.Event()
        self._closing = threading.Event()
        registry.watch(self._read)
        self._thread = threading.Thread(target=self._work, name="stock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the checking; once more does nothing."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

    @property
    def store(self) -> Store:
        """Where the bytes are."""
        return self._store

    # -- What the loop asks ------------------------------------------------------------------------

    def newest(self) -> Mapping[str, Version]:
        """See Catalog."""
        found = dict(self._folder.newest())
        for project, rows in self._tables.releases.items():
            newest = Version.parse(rows[0].version)
            found[project] = max(newest, found.get(project, newest))
        for project in {project for project, _ in self._tables.withdrawn} & found.keys():
            with suppress(Refused):  # files may not be checked yet
                images = [each for each in self.images(project) if each.withdrawn is None]
                del found[project]
                found |= {project: max(each.release.version for each in images)} if images else {}
        return dict(sorted(found.items()))

    def projects(self) -> Sequence[str]:
        """See Catalog."""
        return sorted({*self._folder.projects(), *self._piles})

    def releases(self, project: str) -> Sequence[Release]:
        """See Catalog; `project` may be an alias."""
        project = self.resolve(project)
        pile = self._piles.get(project)
        if pile is None:
            return self._folder.releases(project)
        try:
            folder = self._folder.releases(project)
        except Refused as refused:
            if not pile.whole:
                raise self._refusal(project, pile, refused) from None
            folder = ()
        found = self._cache.get(project)
        if found is None or found[0] is not folder or found[1] is not pile:
            found = folder, pile, merged(folder, pile)
            self._cache[project] = found
        return found[2]

    def open(self, release: Release) -> Image:
        """See Catalog."""
        try:
            return self._folder.open(release)
        except Refused:
            self._wake.set()  # its file may be another one now
            raise

    def why_withdrawn(self, release: Release) -> str | None:
        """The reason why somebody took it back, which may be ""; None: nobody did."""
        return self._tables.withdrawn.get((release.project, release.facts.sha256))

    def partition_size(self, project: str) -> int:
        """Bytes that the devices of a project, by its own name, have for a sketch; 0: not known."""
        return self._tables.projects.get(project, UNKNOWN).partition_size

    def admit(self, project: str) -> str:
        """Who gets images of a project, by its own name: see Project."""
        return self._tables.projects.get(project, UNKNOWN).admit

    def is_open(self, project: str, usual: str) -> bool:
        """Whether a project's images are for every device; `usual` is what --admit says."""
        return (self.admit(project) or usual.lower()) == "open"

    def _refusal(self, project: str, pile: Pile, refused: Refused) -> Refused:
        """Why there is nothing to offer, where the folder has nothing either."""
        if pile.waiting:
            reason = f"{shown(project)} is not checked yet: ask again; if it stays so, see the log"
            return Refused(503, reason)
        if refused.status != HTTPStatus.NOT_FOUND:
            return refused
        if pile.flawed:
            reason = f"no file of {shown(project)} can be offered: {'; '.join(pile.flawed)}"
            return Refused(404, reason)
        if project in self._folder.newest():
            return refused
        return Refused(404, f"the project {shown(project)} has no release yet: upload one")

    # -- Memory ------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Takes what the registry holds now, if that is something else."""
        with self._registry.reading() as connection, transaction(connection, "BEGIN"):
            rows = [connection.execute(statement).fetchall() for statement in _ALL]
        if rows == self._rows_read:
            return
        with self._sorting:
            self._rows_read, self._tables = rows, tables_of(*rows)
            self._sort()
        if any(pile.waiting for pile in self._piles.values()):
            self._wake.set()

    def _sort(self) -> None:
        names = {*self._tables.projects, *self._tables.releases}
        self._piles = {project: self._pile(project) for project in names}
        self._cache = {}

    def _pile(self, project: str) -> Pile:
        """What is known of a project's rows."""
        whole: list[tuple[Rank, Release]] = []
        flawed: list[str] = []
        rows = self._tables.releases.get(project, ())
        for row in rows:
            release, flaw = self._release(row)
            if not flaw:  # it comes after a file of the folder from the same second
                whole.append((rank(release, (row.uploaded + 1) * 10**9), release))
            elif (row.sha256, row.kind) in self._found:
                flawed.append(f"{row.name} {flaw}")
        return Pile(whole, flawed, len(whole) + len(flawed) < len(rows))

    def _release(self, row: StoredRelease) -> tuple[Release, str]:
        """What a row stands for, and why it cannot be offered."""
        version = Version.parse(row.version)
        identity, facts = self._found.get((row.sha256, row.kind), (None, "is not checked yet"))
        if identity and isinstance(facts, Facts):
            path = self._store.path(row.sha256)
            flaw = ""
        else:
            path, flaw, identity = "", str(facts), (0, 0, row.size, row.uploaded * 10**9, 0)
            facts = Facts(row.chip, packed=row.packed, md5=row.md5, sha256=row.sha256)
        name, text = row.name, row.notes
        return Release(row.project, version, row.kind, path, name, identity, facts, text), flaw

    # -- Checks ------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The thread that checks files."""
        again = LOOK_SECONDS
        while not self._closing.is_set():
            self._wake.wait(again)
            self._wake.clear()
            try:
                self._check_all()
            except Exception:
                log.exception("looking at the uploaded images failed; it is tried again")
            waiting = any(pile.waiting for pile in self._piles.values())
            again = AGAIN_SECONDS if waiting else LOOK_SECONDS

    def _check_all(self) -> None:
        """Checks what is new or has changed, the newest of each project first."""
        before = dict(self._found)
        rows = self._tables.releases.values()
        for row in filter(None, chain.from_iterable(zip_longest(*rows))):
            if self._closing.is_set():
                return
            self._check(row)
        if self._found != before:
            with self._sorting:
                rows = self._tables.releases.values()
                named = {(row.sha256, row.kind) for row in chain.from_iterable(rows)}
                self._found = {key: found for key, found in self._found.items() if key in named}
                self._sort()  # two projects may have the same bytes

    def _check(self, row: StoredRelease) -> None:
        """Finds out whether a file is what the row says, unless that is known of this file."""
        key, path = (row.sha256, row.kind), self._store.path(row.sha256)
        with self._checking:
            try:
                found = self._store.look(*key, self._found.get(key))
            except OSError as err:  # not remembered: it may be readable in a moment
                log.warning("%s is not offered: it cannot be read: %s", path, err.strerror)
                return
            if found == self._found.get(key):
                return
            if found[0] is None:  # another server may just have deleted it, with its row
                self._registry.refresh()
            with self._sorting:
                if row not in self._tables.releases.get(row.project, ()):
                    return
                self._found[key] = found
                self._piles = {**self._piles, row.project: self._pile(row.project)}
        if isinstance(found[1], str):
            name = printable(f"{row.project}/{row.name}")
            log.error("%s is not offered: it %s: %s", name, found[1], path)

    # -- Releases ----------------------------------------------------------------------------------

    def add(self, body: BinaryIO, row: StoredRelease, also: Also) -> Stocked:
        """Keeps an image and its row, in the place of one with the same version, kind and chip.

        Devices are offered it when this returns. The row's digests and size are those of the body.
        What `also` writes belongs to the same transaction.

        Raises:
            Refused: 409, another server just wrote such a row.
            OSError, sqlite3.Error: it cannot be kept; nothing changed.
        """
        rows = self._rows(row.project, Version.parse(row.version))
        twins = [each for each in rows if each.slot == row.slot]
        with self._store.keeping(body) as (kept, connection):
            assert (kept.sha256, kept.md5, kept.size) == (row.sha256, row.md5, row.size)
            _remove(connection, twins)
            try:
                connection.execute(_ADD, astuple(row))
            except sqlite3.IntegrityError as err:
                reason = f"another upload of {row.project} {row.version} was faster: look at it"
                raise Refused(409, reason) from err
            also()
        self._check(row)
        if dropped := [each.sha256 for each in twins if each.sha256 != row.sha256]:
            self._store.drop(*dropped)
        return self._stocked(row)

    def images(self, project: str) -> Iterator[Stocked]:
        """All releases of a project, also those that are not offered; in no order. Refused: 503."""
        tables, project = self._tables, self.resolve(project)
        for row in tables.releases.get(project, ()):
            yield self._stocked(row)
        for each in self._in_folder(project):
            withdrawn = tables.withdrawn.get((project, each.facts.sha256))
            yield Stocked(each, "folder", each.modified, "", withdrawn)

    def _stocked(self, row: StoredRelease) -> Stocked:
        release, flaw = self._release(row)
        withdrawn = self._tables.withdrawn.get((row.project, row.sha256))
        return Stocked(release, "upload", row.uploaded, row.who, withdrawn, flaw)

    def entries(self, project: str, after: str = "", limit: int = 100) -> list[Stocked]:
        """A page of them, newest first, from behind the cursor `after`.

        Raises:
            Refused: 404, no such project; 422, no such cursor.
        """
        if self.project(project) is None:
            raise Refused(404, f"there is no project {shown(project)}")
        found = sorted(self.images(project), key=Stocked.place)
        found.sort(key=attrgetter("release.version"), reverse=True)
        if after:
            found = [each for each in found if each.is_behind(after)]
        return found[:limit]

    def withdraw(self, project: str, version: Version, reason: str, who: str, at: int) -> None:
        """Takes a version back, all of its images. Refused: 404, there is none."""
        project = self.resolve(project)
        words = at, clean(who), clean(reason, MAX_LONG)
        found = self.of_version(project, version)
        rows = [(project, each.release.facts.sha256, *words) for each in found]
        with self._registry.writing() as connection:
            connection.executemany(_WITHDRAW, rows)

    def restore(self, project: str, version: Version) -> None:
        """Offers again what was withdrawn; Refused: 404, there is no such version."""
        project = self.resolve(project)
        found = self.of_version(project, version)
        with self._registry.writing() as connection:
            rows = [(project, each.release.facts.sha256) for each in found]
            connection.executemany(_RESTORE, rows)

    def note(self, project: str, version: Version, text: str) -> None:
        """Sets the notes of a version. Refused: 404 none; 409 not uploaded; 422 too long."""
        if len(text) > MAX_LONG:
            raise Refused(422, f"notes have at most {MAX_LONG} characters")
        rows = self._uploaded(project, version)
        with self._registry.writing() as connection:
            values = [(clean(text, MAX_LONG), row.project, row.version) for row in rows]
            connection.executemany(_NOTE, values)

    def delete(self, project: str, version: Version, also: Also = tuple) -> bool:
        """Deletes a version that was uploaded, all of its images; False: there is none.

        Bytes that were withdrawn stay so, if they ever come again. What `also` writes belongs to
        the same transaction.

        Raises:
            Refused: 409, it lies in the firmware folder.
        """
        try:
            self._delete(self._uploaded(project, version), also)
        except Refused as refused:
            if refused.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    def prune(
        self, project: str, keep: int, new: str = "", also: Callable[[str], object] = str
    ) -> None:
        """Deletes what is older than the newest `keep` versions and that no device needs.

        Versions of a kind, chip and, as those are many, of pre-releases count for themselves. One
        that was withdrawn does not count. What a device of the project runs stays, and what it
        is to run, and the image with the SHA-256 `new`. `also` gets what goes, in words: what it
        writes belongs to the transaction.
        """
        try:
            needed = self._needed(project, new)
            rows = self._tables.releases.get(self.resolve(project), ())
            old = [*filterfalse(needed, outdated(rows, keep, self._tables.withdrawn))]
            words = ", ".join(f"{row.version} {row.sha256}" for row in old)
            self._delete(old, lambda: also(f"{printable(project)} {words}"))
        except (OSError, sqlite3.Error) as err:  # it can wait for the next time
            log.warning("old releases of %s cannot be deleted: %s", printable(project), err)

    def _needed(self, project: str, new: str) -> Callable[[StoredRelease], bool]:
        """Whether a device of the project runs what a row stands for, or is to run it; or `new`."""
        self._registry.flush()
        project = self.resolve(project)
        names = (project, *(name for name, of in self._tables.aliases.items() if of == project))
        devices = [row for name in names for row in self._registry.rows(_RUNNING, name)]
        digests = {new, *(image for _, image, _ in devices)}
        versions = {parsed(text) for version, _, pin in devices for text in (version, pin)}

        def is_needed(row: StoredRelease) -> bool:
            """By its version, or by any digest that a device may report of it."""
            release, _ = self._release(row)
            known = {row.sha256, row.md5, *release.facts.running}
            return release.version in versions or not known.isdisjoint(digests)

        return is_needed

    def _delete(self, rows: Sequence[StoredRelease], also: Also) -> None:
        if rows:
            with self._registry.writing() as connection:
                _remove(connection, rows)
                also()
            self._store.drop(*(row.sha256 for row in rows))
        for row in rows:
            log.info("%s %s is deleted: %s", printable(row.project), row.version, row.sha256)

    def _in_folder(self, project: str) -> Sequence[Release]:
        """What the folder has of a project. Refused: 503, that is not to be known just now."""
        try:
            return self._folder.releases(project)
        except Refused as refused:
            if refused.status != HTTPStatus.NOT_FOUND and project in self._folder.newest():
                raise
            return ()

    def _rows(self, project: str, version: Version) -> list[StoredRelease]:
        rows = self._tables.releases.get(self.resolve(project), ())
        return [row for row in rows if Version.parse(row.version) == version]

    def _uploaded(self, project: str, version: Version) -> list[StoredRelease]:
        """The rows of a version, at least one. Refused: 404 none; 409 it is in the folder."""
        rows = self._rows(project, version)
        if not rows:
            self.of_version(project, version)
            reason = f"{version} of {shown(project)} lies in the firmware folder: change it there"
            raise Refused(409, reason)
        return rows

    def of_version(self, project: str, version: Version) -> list[Stocked]:
        """All images of a version, in no order. Refused: 404, there are none."""
        found = [each for each in self.images(project) if each.release.version == version]
        if not found:
            raise Refused(404, f"there is no {version} of {shown(project)}")
        return found

    # -- Projects ----------------------------------------------------------------------------------

    def resolve(self, project: str) -> str:
        """The name of the project that has this alias; any other as it is, and that of files."""
        owner = self._tables.aliases.get(project)
        if owner is None or project not in self._folder.newest():
            return owner or project
        if project not in self._told:
            self._told.add(project)
            reason = "its devices get these, not that: rename them, or take back the alias"
            names = printable(project), printable(owner)
            log.error("%s is files in the folder, and an alias of %s: %s", *names, reason)
        return project

    def project(self, name: str) -> Project | None:
        """The project with this name or alias; None: there is none."""
        name = self.resolve(name)
        if name in self._tables.projects:
            return self._tables.projects[name]
        known = name in self._tables.releases or name in self._folder.newest()
        return Project(name, made=False) if known else None

    def put_project(self, project: Project) -> None:
        """Makes a project, or changes one, but for when it was made.

        Raises:
            Refused: 409, a name is another project's; 422, it is none, or a chip is not known.
        """
        check_project(project)
        aliases = [(alias, project.name) for alias in project.aliases]
        with self._registry.writing() as connection:
            self._check_names(connection, project)
            chips = json.dumps(sorted(set(project.chips)))
            row = project.name, chips, project.created, project.partition_size, project.admit
            connection.execute(_PUT, row)
            connection.execute(_UNNAME, (project.name,))
            try:
                connection.executemany("INSERT INTO alias (name, project) VALUES (?, ?)", aliases)
            except sqlite3.IntegrityError as err:
                raise Refused(409, "an alias is another project's, or stands there twice") from err

    def _check_names(self, connection: sqlite3.Connection, project: Project) -> None:
        """Refused: 409. Memory does not know yet what somebody else wrote a moment ago."""
        for name in (project.name, *project.aliases):
            owners = {owner for (owner,) in connection.execute(_NAMED, (name,) * 3)}
            if not owners and name in self._folder.newest():
                owners = {name}
            if others := owners - {project.name}:
                what = "the project" if name in others else "an alias of"
                raise Refused(409, f"{name} is {what} {shown(others.pop())} already")
        if project.name in project.aliases:
            raise Refused(409, f"{project.name} is the project {shown(project.name)} already")

    def drop_project(self, name: str) -> bool:
        """Deletes a project with its aliases; False: there was none to delete.

        Who was admitted to it is not to a later one of that name, unless files keep it alive.

        Raises:
            Refused: 409, it has releases that were uploaded, or tokens.
        """
        name = self.resolve(name)
        with self._registry.writing() as connection:
            if connection.execute(_HAS_RELEASES, (name,)).fetchone():
                raise Refused(409, f"{shown(name)} has releases: delete them first")
            if name not in self._folder.newest():
                if tokens := connection.execute(_TOKENS, (name, name)).fetchall():
                    ids = ", ".join(str(number) for (number,) in tokens)
                    raise Refused(409, f"{shown(name)} has tokens: revoke them first, {ids}")
                for statement in _FORGET:
                    connection.execute(statement, (name,))
            connection.execute(_UNNAME, (name,))
            return connection.execute("DELETE FROM project WHERE name = ?", (name,)).rowcount > 0


def _remove(connection: sqlite3.Connection, rows: Iterable[StoredRelease]) -> None:
    keys = [(row.project, row.version, row.kind, row.chip, row.packed) for row in rows]
    connection.executemany(_REMOVE, keys)
