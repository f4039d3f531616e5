"""Files that were uploaded: bytes under their own SHA-256.

    put(path, body) -> DIR/files/<sha256> -> a row: path, digests, size
    open(path) -> is there such a row? -> DIR/files/<sha256>

A path is only ever looked up among rows; what lies in the folder is called after its content. So
the same bytes are stored once, under however many paths.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from typing import BinaryIO

from ota_fleet.registry import Registry
from ota_fleet.rows import StoredFile
from ota_server import FULL, Refused, printable

PIECE = 1 << 20  # bytes that are hashed or copied at once

_OURS = re.compile(r"[0-9a-f]{64}(?:\.part)?")  # names that are given here

log = logging.getLogger("ota.files")


@contextmanager
def room() -> Iterator[None]:
    """Makes a full disk a 507."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as err:
        code = err.errno if isinstance(err, OSError) else err.sqlite_errorcode
        if code not in (FULL if isinstance(err, OSError) else {sqlite3.SQLITE_FULL}):
            raise
        raise Refused(507, "there is no room left on the disk: make some, send it again") from err


class Store:
    """Files in a folder, each called by its SHA-256; registry says which are needed and as what.

    A file is there before a row names it, and goes after the last row that did.
    """

    def __init__(self, folder: str, registry: Registry) -> None:
        """Makes the folder, and removes what a crash left in it. OSError: it is not to be used."""
        self._folder = folder
        self._registry = registry
        self._changing = threading.Lock()
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._sweep(registry.file_digests())

    def put(self, path: str, body: BinaryIO) -> StoredFile:
        """Keeps the bytes under this path, on the disk when it comes back. OSError: it cannot."""
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        while piece := body.read(PIECE):
            sha256.update(piece)
            md5.update(piece)
            size += len(piece)
        os.fsync(body.fileno())
        stored = StoredFile(path, sha256.hexdigest(), md5.hexdigest(), size)
        with self._changing:
            self._keep(body, stored)
            unused = self._registry.put_file(stored)
            if unused:
                with suppress(FileNotFoundError):
                    os.unlink(self._path(unused))
        return stored

    def open(self, path: str) -> tuple[StoredFile, FileIO] | None:
        """What is stored under this path, and the file, which the caller closes; None: nothing."""
        if found := self._open(path):
            return found
        with self._changing:  # it may just have been replaced
            return self._open(path)

    def _open(self, path: str) -> tuple[StoredFile, FileIO] | None:
        stored = self._registry.file(path)
        if stored is None:
            return None
        real = self._path(stored.sha256)
        try:  # its name, for the log, is that by which it is asked for
            file = FileIO(path, opener=lambda _, flags: os.open(real, flags))
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == stored.size:
            return stored, file
        file.close()
        log.error("%s has not the %d bytes it was stored with", real, stored.size)
        return None

    def _path(self, digest: str) -> str:
        return os.path.join(self._folder, digest)

    def _keep(self, body: BinaryIO, stored: StoredFile) -> None:
        """Gives the bytes their name, all at once, where it does not exist with them already."""
        target = self._path(stored.sha256)
        if not _linked(body, target, stored.size):
            self._copy(body, target)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _copy(self, body: BinaryIO, target: str) -> None:
        """The same where a file without a name cannot get one."""
        part = f"{target}.part"
        body.seek(0)
        try:
            with open(part, "wb") as copy:
                shutil.copyfileobj(body, copy, PIECE)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(part, target)
        except OSError:
            with suppress(OSError):
                os.unlink(part)
            raise

    def _sweep(self, needed: frozenset[str]) -> None:
        """Removes what no row names; nothing at all where a new database meets old files."""
        for name in os.listdir(self._folder) if needed else ():
            if name not in needed and _OURS.fullmatch(name):
                log.warning("%s is removed: nothing needs it", printable(self._path(name)))
                os.unlink(self._path(name))


def _linked(body: BinaryIO, target: str, size: int) -> bool:
    """Names a file that has no name: open(2), O_TMPFILE. Or it was there, with so many bytes."""
    try:  # with a descriptor os.link() calls linkat(), which follows the link in /proc
        os.link(f"/proc/self/fd/{body.fileno()}", target, src_dir_fd=body.fileno())
    except FileExistsError:
        return os.stat(target).st_size == size
    except (OSError, NotImplementedError):
        return False
    return True
