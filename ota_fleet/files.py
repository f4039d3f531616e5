"""Files that were uploaded: bytes under their own SHA-256.

    put(path, body) -> DIR/files/<sha256> -> a row: path, digests, size
    open(path) -> is there such a row? -> DIR/files/<sha256>
    keeping(body) -> DIR/files/<sha256> -> a release's row, which stock.py writes
    put_draft(body) -> DIR/files/<sha256> -> a draft's row

A path is only ever looked up among rows; what lies in the folder is called after its content. So
the same bytes are stored once, under however many paths and as however many releases.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from sqlite3 import Connection
from typing import BinaryIO, NamedTuple

from ota_fleet.registry import Registry
from ota_fleet.rows import MAX_INTEGER, Draft, StoredFile, clean
from ota_server import FULL, Facts, Identity, Refused, identity_of, inspect, printable

if sys.platform != "win32":
    import fcntl

PIECE = 1 << 20  # bytes that are hashed or copied at once

UNNAMED_SECONDS = 30 * 86_400  # that bytes stay which no row names any more

_UNNAMED = "unnamed"  # the end of their names
_OURS = re.compile(  # names that are given here
    r"[0-9a-f]{64}(?:\.unnamed|(?:\.[0-9a-f]{16})?\.part)?"
)

_DRAFTS = "SELECT id, sha256, name, who, at FROM draft "
_PUT_DRAFT = "INSERT INTO draft (sha256, name, who, at) VALUES (?, ?, ?, ?) RETURNING id"
_DROP_DRAFT = "DELETE FROM draft WHERE id = ? RETURNING sha256"
_DROP_DRAFTS = "DELETE FROM draft WHERE at < ? RETURNING sha256"

log = logging.getLogger("ota.files")


@contextmanager
def room() -> Iterator[None]:
    """Makes a full disk a 507, and a database in which others write a 503."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as err:
        code = err.errno if isinstance(err, OSError) else err.sqlite_errorcode & 0xFF
        if isinstance(err, sqlite3.Error) and code == sqlite3.SQLITE_BUSY:
            raise Refused(503, "the database is busy: try again") from err
        if code not in (FULL if isinstance(err, OSError) else {sqlite3.SQLITE_FULL}):
            raise
        raise Refused(507, "there is no room left on the disk: make some, send it again") from err


Found = tuple[Identity | None, Facts | str]  # str: why it is not offered; None: there is no file


class Kept(NamedTuple):
    """What bytes are called here, and how many there are; digests are lower-case hex."""

    sha256: str
    md5: str
    size: int  # bytes


class Store:
    """Files in a folder, each called by its SHA-256; rows of the registry say which are needed.

    A file is there before a row names it, and goes after the last row that did. Several servers
    may use the folder: whether a file is needed is found out where nobody else can write a row.
    """

    def __init__(self, folder: str, registry: Registry, now: float) -> None:
        """Makes the folder, and removes what a crash left in it; `now` is UTC seconds.

        OSError: it is not to be used.
        """
        self._folder = folder
        self._started = now
        self._registry = registry
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _sync(os.path.dirname(os.path.abspath(folder)))
        self._claim: int | None = None
        if sys.platform == "win32":
            self._sweep()
        else:
            self._claim = os.open(folder, os.O_RDONLY)
            self._share(self._claim)

    def close(self) -> None:
        """Lets the next server sweep the folder; once more does nothing."""
        if self._claim is not None:
            os.close(self._claim)
        self._claim = None

    def path(self, digest: str) -> str:
        """Where bytes with this SHA-256 are, if they are there."""
        return os.path.join(self._folder, digest)

    def put(
        self, path: str, body: BinaryIO, also: Callable[[StoredFile], object] = lambda _: None
    ) -> StoredFile:
        """Keeps the bytes under this path, on the disk when it comes back. OSError: it cannot.

        What `also` writes belongs to the same transaction.
        """
        with self.keeping(body) as (kept, connection):
            stored = StoredFile(path, *kept)
            before = self._registry.put_file(connection, stored)
            also(stored)
        if before:
            self.drop(before)
        return stored

    @contextmanager
    def keeping(self, body: BinaryIO) -> Iterator[tuple[Kept, Connection]]:
        """The bytes, kept, and the transaction in which a row is to name them.

        Without such a row in the end they go again. OSError, sqlite3.Error: it cannot be done.
        """
        kept, part = self._prepare(body)
        try:
            with self._registry.writing() as connection:
                if part or not os.path.exists(self.path(kept.sha256)):  # somebody just dropped them
                    os.replace(part or self._part(body, kept.sha256), self.path(kept.sha256))
                    _sync(self._folder)
                yield kept, connection
        except BaseException:
            with suppress(OSError, sqlite3.Error):  # else they are swept at a later start
                if part:
                    Path(part).unlink(missing_ok=True)
                self.drop(kept.sha256)
            raise

    def _prepare(self, body: BinaryIO) -> tuple[Kept, str]:
        """Puts the bytes on the disk, and says where; "": they are there already, whole.

        They get their name in the transaction that needs them: what has one and no row may have
        lost it with a restored backup, and is no leftover of a kill.
        """
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        with FileIO(body.fileno(), closefd=False) as file:
            file.seek(0)
            while piece := file.read(PIECE):
                sha256.update(piece)
                md5.update(piece)
                size += len(piece)
        os.fsync(body.fileno())
        kept = Kept(sha256.hexdigest(), md5.hexdigest(), size)
        return kept, "" if self._holds(kept) else self._part(body, kept.sha256)

    def drop(self, *digests: str) -> None:
        """Removes the bytes that no row names any more."""
        with self._registry.writing() as connection:  # nobody names them meanwhile
            for digest in digests:
                if not self._registry.is_named(connection, digest):
                    with suppress(FileNotFoundError):
                        os.unlink(self.path(digest))

    # -- Drafts ------------------------------------------------------------------------------------

    def put_draft(self, body: BinaryIO, name: str, who: str, at: int) -> Draft:
        """Keeps an image until somebody publishes it. OSError, sqlite3.Error: it cannot be."""
        with self.keeping(body) as (kept, connection):
            row = kept.sha256, clean(name), clean(who), at
            ((number,),) = connection.execute(_PUT_DRAFT, row).fetchall()
        return Draft(number, *row)

    def drafts(self) -> list[Draft]:
        """All of them, the newest first."""
        return [Draft(*row) for row in self._registry.rows(_DRAFTS + "ORDER BY id DESC")]

    def draft(self, number: int) -> Draft | None:
        """The one with this id; None: there is none."""
        rows = self._registry.rows(_DRAFTS + "WHERE id = ?", min(number, MAX_INTEGER))
        return Draft(*rows[0]) if rows else None

    def drop_draft(self, number: int) -> bool:
        """Ends one, with its bytes if nothing else needs them; False: there is none."""
        return self._drop_drafts(_DROP_DRAFT, min(number, MAX_INTEGER))

    def drop_drafts(self, before: int) -> None:
        """Ends all that came before a time, UTC seconds."""
        self._drop_drafts(_DROP_DRAFTS, before)

    def _drop_drafts(self, statement: str, value: int) -> bool:
        with self._registry.writing() as connection:
            gone = connection.execute(statement, (value,)).fetchall()
        self.drop(*(digest for (digest,) in gone))
        return bool(gone)

    # -- Bytes -------------------------------------------------------------------------------------

    def open(self, path: str) -> tuple[StoredFile, FileIO] | None:
        """What is stored under this path, and the file, which the caller closes; None: nothing."""
        before = None
        while (stored := self._registry.file(path)) not in {None, before}:
            assert stored is not None
            try:
                file = self._open(stored)
            except FileNotFoundError:
                before = stored  # it may just have been replaced
                continue
            if os.fstat(file.fileno()).st_size == stored.size:
                return stored, file
            file.close()
            log.error("%s has not the %d bytes it was stored with", stored.sha256, stored.size)
            break
        return None

    def look(self, digest: str, kind: str, before: Found | None = None) -> Found:
        """What is there now; `before`, if it is still that file. OSError: it cannot be read."""
        path = self.path(digest)
        try:
            if before and identity_of(os.stat(path)) == before[0]:
                return before
            with FileIO(path) as file:
                facts = _facts(file, digest, kind)
                return identity_of(os.fstat(file.fileno())), facts
        except FileNotFoundError:
            return None, "is gone from the disk"

    def _open(self, stored: StoredFile) -> FileIO:
        """The bytes; their name, for the log, is that by which they are asked for."""
        real = self.path(stored.sha256)
        return FileIO(stored.path, opener=lambda _, flags: os.open(real, flags))

    def _holds(self, kept: Kept) -> bool:
        """Whether these very bytes are there already, whole."""
        with suppress(FileNotFoundError), open(self.path(kept.sha256), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == kept.sha256
        return False

    def _part(self, body: BinaryIO, digest: str) -> str:
        """Where the bytes are under a name that the next start sweeps; a copy if need be."""
        part = f"{self.path(digest)}.{secrets.token_hex(8)}.part"
        if _linked(body, part):
            return part
        try:
            with FileIO(body.fileno(), closefd=False) as file, open(part, "xb") as copy:
                file.seek(0)
                shutil.copyfileobj(file, copy, PIECE)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError:
            with suppress(OSError):
                os.unlink(part)
            raise
        return part

    def _share(self, folder: int) -> None:
        """Uses the folder together with other servers; sweeps it while there is none."""
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.debug("%s is not swept: another server uses it", printable(self._folder))
        else:
            self._sweep()
        with suppress(OSError):  # a share of the network may have no locks
            fcntl.flock(folder, fcntl.LOCK_SH)  # until it is closed

    def _sweep(self) -> None:
        """Removes what no row names; nothing at all where a new database meets old files.

        What had a name is kept for a while: with an older fleet.db, copied back from a backup, the
        rows of all later uploads are gone, and the later fleet.db may still be there.
        """
        needed = self._registry.file_digests()
        for name in os.listdir(self._folder) if needed else ():
            path = self.path(name)
            digest, _, end = name.partition(".")
            if not _OURS.fullmatch(name) or name in needed:
                continue
            if end == _UNNAMED and digest in needed:
                os.replace(path, self.path(digest))
            elif not end:
                os.utime(path, (self._started, self._started))
                os.replace(path, f"{path}.{_UNNAMED}")
                days = f"it is removed after {UNNAMED_SECONDS // 86_400} days"
                log.warning("nothing needs %s: %s, as .%s", printable(path), days, _UNNAMED)
            elif end != _UNNAMED or os.stat(path).st_mtime < self._started - UNNAMED_SECONDS:
                log.warning("%s is removed: nothing needs it", printable(path))
                os.unlink(path)


def _sync(folder: str) -> None:
    """Lets the names in a folder outlive a power cut."""
    if sys.platform == "win32":  # opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(file: FileIO, digest: str, kind: str) -> Facts | str:
    """What is known of an image, or why it is not offered; completes "name.bin ..."."""
    try:
        facts = inspect(file, kind)
    except ValueError as err:
        return str(err)
    return facts if facts.sha256 == digest else "is damaged: it is not what was uploaded"


def _linked(body: BinaryIO, target: str) -> bool:
    """Names a file that has no name: open(2), O_TMPFILE."""
    try:  # with a descriptor os.link() calls linkat(), which follows the link in /proc
        os.link(f"/proc/self/fd/{body.fileno()}", target, src_dir_fd=body.fileno())
    except (OSError, NotImplementedError):
        return False
    return True
