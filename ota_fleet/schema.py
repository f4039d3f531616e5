"""The registry's file: made, examined, brought up to date, copied. What it holds is in `tables.py`.

What is refused stays as it is, byte for byte: somebody may want to rescue what is in it. An empty
registry never takes the place of a damaged one.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from ota_fleet.tables import SCRIPTS

if sys.platform != "win32":
    import fcntl

WAIT = 5.0  # seconds that a writer waits for another program

APPLICATION = 1330921798
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite puts beside a file


def connect(path: Path, wait: float = WAIT, mode: str = "rw") -> Connection:
    """A connection to a file that exists, for any thread, but one at a time; see transaction()."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(
        uri, timeout=wait, isolation_level=None, check_same_thread=False, uri=True
    )


def pragma(connection: Connection, statement: str) -> Any:
    """The single value that a PRAGMA answers; they are SQLite's alone."""
    return connection.execute(statement).fetchone()[0]


@contextmanager
def transaction(connection: Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[Connection]:
    """All of it, or nothing. IMMEDIATE is SQLite's: who reads first and writes then may fail."""
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def prepare(path: Path) -> None:
    """Makes the file where there is none, or brings it up to date; only its owner can read it.

    Raises:
        RuntimeError: a sentence for the operator; nothing was changed.
    """
    try:
        with _held(path.parent):  # who starts at the same time waits for what this one makes
            if not os.path.lexists(path):
                _make(path)
            if not path.stat().st_mode & stat.S_IWUSR:  # a backup that was kept so: SQLite would
                path.chmod(0o600)  # give its mode to the files beside it
            _examine(path)
            with closing(connect(path)) as connection:
                _migrate(connection, path)
            path.chmod(0o600)  # one that was copied back has what umask gave it
    except sqlite3.OperationalError as err:
        raise RuntimeError(f"the registry {path} cannot be opened: {err}") from err
    except (sqlite3.DatabaseError, UnicodeError) as err:
        raise _damaged(path, str(err)) from err
    except OSError as err:
        raise RuntimeError(f"the registry {path} cannot be opened: {err.strerror}") from err


def _damaged(path: Path, why: str) -> RuntimeError:
    cure = "put a backup in its place, or move it away to begin with an empty one"
    return RuntimeError(f"the registry {path} is damaged ({why}): {cure}")


def _make(path: Path) -> None:
    """A new registry gets its name once it is whole, so that a kill leaves no half one."""
    for end in _BESIDE:
        if os.path.lexists(f"{path}{end}"):
            raise _damaged(path, f"it is gone, but its {path.name}{end} is there")
    new = _fresh(path, ".new")
    with closing(connect(new)) as connection:
        _run(connection, SCRIPTS)
        _log_ahead(connection, path)
    new.replace(path)


def _examine(path: Path) -> None:
    """Refuses what is no registry, a damaged one, one of a newer release; changes nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise RuntimeError(f"the registry {path} is no file")
    with path.open("rb") as file:
        head = file.read(16)
    if head != b"SQLite format 3\0":  # an empty file too: SQLite would take it for a new database
        raise _damaged(path, "it is no SQLite file" if head else "it is empty")
    with closing(connect(path, mode="ro")) as connection:
        if pragma(connection, "PRAGMA application_id") != APPLICATION:
            raise RuntimeError(f"{path} is the database of another program, or damaged")
        version = pragma(connection, "PRAGMA user_version")
        if version > len(SCRIPTS):
            raise RuntimeError(
                f"the registry {path} was written by a newer ota-server (version {version} of its "
                f"tables, this one knows {len(SCRIPTS)}): update this one, or restore a backup"
            )
        found = pragma(connection, "PRAGMA integrity_check(1)")
        if found != "ok" or version < 1:
            raise _damaged(path, " ".join(found.split()) if version > 0 else f"version {version}")


def _migrate(connection: Connection, path: Path) -> None:
    """Runs the scripts that the file has not seen yet."""
    version = pragma(connection, "PRAGMA user_version")
    try:
        _run(connection, SCRIPTS[version:])
    except sqlite3.Error as err:
        connection.rollback()
        if err.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # locked, or a full disk
            raise
        raise _damaged(path, f"its tables are not those of version {version}: {err}") from err
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        _run(model, SCRIPTS)
        missing = _columns(model) - _columns(connection)
    if missing:
        raise _damaged(path, f"{' '.join(max(missing)).strip()} is missing")
    _log_ahead(connection, path)


def _run(connection: Connection, scripts: tuple[str, ...]) -> None:
    for script in scripts:
        connection.executescript(script)


def _columns(connection: Connection) -> set[tuple[str, str]]:
    """Tables with their columns, and indexes. SQLite's; PostgreSQL: information_schema."""
    statement = """SELECT entry.name, COALESCE(info.name, '') FROM sqlite_master AS entry
        LEFT JOIN pragma_table_xinfo(entry.name) AS info"""
    return set(connection.execute(statement))


def _log_ahead(connection: Connection, path: Path) -> None:
    if pragma(connection, "PRAGMA journal_mode = WAL") != "wal":
        raise RuntimeError(f"the registry {path} needs a disk of this machine, no network's")


def _fresh(path: Path, end: str) -> Path:
    """An empty file beside `path` that only its owner can read."""
    new = path.with_name(path.name + end)
    _sweep(new)  # of one that was killed
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return new


def _sweep(path: Path) -> None:
    for end in ("", *_BESIDE):
        Path(f"{path}{end}").unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time; the names it gives in the folder outlive a power cut."""
    if sys.platform == "win32":  # has neither
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a share of the network may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
        yield
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(connection: Connection, path: Path, file: Path) -> None:
    """Copies the registry at `path` as it is at one moment, while others write.

    `file` is replaced only by a copy that is whole and sound; only its owner can read it.

    Raises:
        RuntimeError: `file` is the registry itself.
        RuntimeError, sqlite3.Error, OSError: the copy is not sound, or cannot be written.
    """
    if file.exists() and file.samefile(path):
        raise RuntimeError(f"{file} is the registry itself: give the backup another name")
    with _held(file.parent):
        part = _fresh(file, ".part")
        try:
            with closing(connect(part)) as copy:
                connection.backup(copy)  # all pages in one step: one moment, and no writer waits
                found = pragma(copy, "PRAGMA integrity_check(1)")
            if found != "ok":
                raise _damaged(path, found)
            part.replace(file)
        finally:
            _sweep(part)


def backup(argv: Sequence[str], _environ: Mapping[str, str]) -> int:
    """The command --backup: folder of the state, and the file to make; gives back the status."""
    state, file = map(Path, argv)
    path = state / "fleet.db"
    try:
        if not path.exists():
            sys.stderr.write(f"ota-server: there is no {path}\n")
            return 2
        with closing(connect(path)) as connection:
            save(connection, path, file)
    except (RuntimeError, sqlite3.Error, OSError) as err:
        sys.stderr.write(f"ota-server: {path} is not copied to {file}: {err}\n")
        return 1
    sys.stdout.write(f"{file} holds what {path} remembers; images are in {state / 'files'}\n")
    return 0
