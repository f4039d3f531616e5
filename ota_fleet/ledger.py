"""Who may do what, and who did what: accounts, sessions, tokens and the audit, as rows.

Secrets are not here: of tokens and sessions there are digests, of passwords what accounts.py makes
of them. Everything goes through the registry, as its threads and promises are those of all rows.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from sqlite3 import Connection

from ota_fleet.registry import MAX_PAGE, Registry
from ota_fleet.rows import (
    MAX_INTEGER,
    MAX_LONG,
    Account,
    Entry,
    Session,
    Token,
    clean,
    escaped,
    normal_id,
)
from ota_fleet.schema import transaction
from ota_server import Refused

_TOKENS = "SELECT id, name, role, project, digest, device, created FROM token "
_MINT = """INSERT INTO token (name, role, project, digest, device, created)
VALUES (?, ?, ?, ?, ?, ?) RETURNING id"""
_ACCOUNTS = "SELECT id, email, role, password, created FROM account "
_OPEN = "INSERT INTO account (email, role, password, created) VALUES (?, ?, ?, ?) RETURNING id"
_ADMINS = "SELECT COUNT(*) FROM account WHERE role = 'admin'"
# With another password than the one that was just compared, it is not the same account any more.
_BEGIN = """INSERT INTO session (digest, account, created, expires)
SELECT ?, id, ?, ? FROM account WHERE id = ? AND password = ?"""
_MAKE_ROOM = """DELETE FROM session WHERE expires <= ? OR account = ? AND digest NOT IN (
    SELECT digest FROM session WHERE account = ? ORDER BY created DESC, digest LIMIT ?)"""
_HEAD = "SELECT number, digest FROM audit_head"  # PostgreSQL: FOR UPDATE where one is added
_ENTRIES = """SELECT number, at, who, action, what, digest
FROM audit WHERE number > ? ORDER BY number LIMIT ?"""
_NEWEST = """SELECT number, at, who, action, what, digest FROM audit
WHERE number < ? AND (? = '%%'
    OR lower(who || '\t' || action || '\t' || what) LIKE lower(?) ESCAPE '!')
ORDER BY number DESC LIMIT ?"""

log = logging.getLogger("ota.ledger")


class Ledger:
    """Rows about people, what they hold and what they did; may be used from any thread.

    `who` changes something stands in the audit in the same transaction: there is no change without
    its entry, and no entry without its change.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    # -- Accounts and sessions ---------------------------------------------------------------------

    def accounts(self) -> list[Account]:
        """All accounts, the oldest first."""
        return [Account(*row) for row in self.registry.rows(_ACCOUNTS + "ORDER BY id")]

    def add_account(self, account: Account, who: str, *, first: bool = False) -> int:
        """Remembers an account, whose id does not count; gives back its id, never used again.

        Raises:
            Refused: 409, there is one with this e-mail address; or, for the first, there is any.
        """
        values = clean(account.email), account.role, account.password, account.created
        try:
            with self.recording(who, "open account", account.created) as (connection, what):
                if first and connection.execute(_ACCOUNTS + "LIMIT 1").fetchone():
                    raise Refused(409, "there is an administrator already: sign in")
                what.append(f"{account.email} {account.role}")
                return int(connection.execute(_OPEN, values).fetchall()[0][0])
        except sqlite3.IntegrityError as err:
            raise Refused(409, f"there is an account for {account.email} already") from err

    def change_account(
        self, account: int, who: str, at: int, *, role: str = "", password: str = ""
    ) -> bool:
        """Writes a role, or a hashed password, which ends all sessions; "": it stays.

        False: there is no such account. Refused: 409, see close_account().
        """
        with self.recording(who, "change account", at) as (connection, what):
            before = _account(connection, account)
            if before is None:
                return False
            if role and role != before.role:
                _keep_an_admin(connection, before)
                connection.execute("UPDATE account SET role = ? WHERE id = ?", (role, before.id))
                what.append(f"{before.email} from {before.role} to {role}")
            if password:
                statement = "UPDATE account SET password = ? WHERE id = ?"
                connection.execute(statement, (password, before.id))
                connection.execute("DELETE FROM session WHERE account = ?", (before.id,))
                what.append(f"{before.email} has a new password")
        return True

    def close_account(self, account: int, who: str, at: int) -> bool:
        """Forgets an account and its sessions; False: there is none.

        Raises:
            Refused: 409, it is the last administrator.
        """
        with self.recording(who, "close account", at) as (connection, what):
            before = _account(connection, account)
            if before is None:
                return False
            _keep_an_admin(connection, before)
            connection.execute("DELETE FROM session WHERE account = ?", (before.id,))
            connection.execute("DELETE FROM account WHERE id = ?", (before.id,))
            what.append(before.email)
        return True

    def sessions(self) -> list[Session]:
        """All sessions, also those that are over."""
        statement = "SELECT digest, account, created, expires FROM session"
        return [Session(*row) for row in self.registry.rows(statement)]

    def begin(self, session: Session, password: str, most: int) -> bool:
        """Remembers a session; those that are over go, and the account's oldest above `most`.

        False: `password`, hashed, is not the account's any more.
        """
        with self.registry.writing() as connection:
            owner = (session.account, session.account, most - 1)
            connection.execute(_MAKE_ROOM, (session.created, *owner))
            row = (session.digest, session.created, session.expires, session.account, password)
            return connection.execute(_BEGIN, row).rowcount > 0

    def end(self, digest: str) -> None:
        """Forgets a session."""
        self.registry.write("DELETE FROM session WHERE digest = ?", digest)

    # -- Tokens ------------------------------------------------------------------------------------

    def add_token(self, token: Token, who: str) -> int:
        """Remembers a token, whose id does not count; gives back its id, never used again.

        Raises:
            ValueError: there is one with this digest.
        """
        texts = token.name, token.role, token.project, token.digest, token.device
        values = *map(clean, texts), token.created
        try:
            with self.recording(who, "mint token", token.created) as (connection, what):
                number = int(connection.execute(_MINT, values).fetchall()[0][0])
                what.append(_words(number, token))
                return number
        except sqlite3.IntegrityError as err:
            raise ValueError("this token is known already") from err

    def tokens(self) -> list[Token]:
        """All tokens, the oldest first."""
        return [Token(*row) for row in self.registry.rows(_TOKENS + "ORDER BY id")]

    def revoke_token(self, token: int, who: str, at: int) -> bool:
        """Forgets a token by its id, so that it opens nothing; False: there is none."""
        with self.recording(who, "revoke token", at) as (connection, what):
            number = min(token, MAX_INTEGER)
            row = connection.execute(_TOKENS + "WHERE id = ?", (number,)).fetchone()
            if row is None:
                return False
            connection.execute("DELETE FROM token WHERE id = ?", (number,))
            what.append(_words(number, Token(*row)))
        return True

    # -- Audit -------------------------------------------------------------------------------------

    def audit(self, who: str, action: str, what: str, at: int) -> None:
        """Adds an entry; nothing here changes or removes one."""
        with self.recording(who, action, at) as (_, words):
            words.append(what)

    @contextmanager
    def recording(self, who: str, action: str, at: int) -> Iterator[tuple[Connection, list[str]]]:
        """A transaction, and what the entry about it is to say; nothing there: no entry.

        What is too long for one has several.
        """
        what: list[str] = []
        with self.registry.writing() as connection:
            yield connection, what
            for text in _packed(what):
                entry = _add(connection, at, clean(who), clean(action), text)
                self.registry.once_written(functools.partial(_tell, entry))

    def audit_log(self, after: int = 0, limit: int = 100) -> list[Entry]:
        """A page of entries, the oldest first, from behind the number `after`; at most MAX_PAGE."""
        rows = self.registry.rows(_ENTRIES, min(after, MAX_INTEGER), max(1, min(limit, MAX_PAGE)))
        return [Entry(*row) for row in rows]

    def latest(self, before: int = MAX_INTEGER, text: str = "", limit: int = 100) -> list[Entry]:
        """A page of entries, the newest first, from below the number `before`; at most MAX_PAGE.

        `text` stands somewhere in them; "": all.
        """
        text = f"%{escaped(normal_id(text))}%"
        rows = self.registry.rows(_NEWEST, before, text, text, max(1, min(limit, MAX_PAGE)))
        return [Entry(*row) for row in rows]

    def verify_audit(self) -> bool:
        """True: no entry was changed, moved or taken out, the last ones included."""
        # PostgreSQL: BEGIN ISOLATION LEVEL REPEATABLE READ; it is one moment that is looked at.
        with self.registry.reading() as connection, transaction(connection, "BEGIN"):
            number, digest = 0, ""
            for row in connection.execute(_ENTRIES, (-MAX_INTEGER, MAX_INTEGER)):
                entry = Entry(*row)
                number, digest = number + 1, entry.follows(digest)
                if (entry.number, entry.digest) != (number, digest):
                    return False
            return connection.execute(_HEAD).fetchall() == [(number, digest)]


def _packed(words: list[str]) -> Iterator[str]:
    """What entries say, each of as many words as fit."""
    line = ""
    for word in words:
        if line and len(line) + len(word) + 2 > MAX_LONG:
            yield line
            line = ""
        line = clean(f"{line}, {word}" if line else word, MAX_LONG)
    if words:
        yield line


def _add(connection: Connection, at: int, who: str, action: str, what: str) -> Entry:
    last, previous = connection.execute(_HEAD).fetchone()
    entry = Entry(last + 1, at, who, action, what)
    entry = replace(entry, digest=entry.follows(previous))
    connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", astuple(entry))
    head = "UPDATE audit_head SET number = ?, digest = ?"
    connection.execute(head, (entry.number, entry.digest))
    return entry


def _tell(entry: Entry) -> None:
    texts = (text[:64] for text in (entry.who, entry.action, entry.what))
    log.info("audit %d %s %r %r %r", entry.number, entry.digest, *texts)


def _account(connection: Connection, account: int) -> Account | None:
    row = connection.execute(_ACCOUNTS + "WHERE id = ?", (min(account, MAX_INTEGER),)).fetchone()
    return Account(*row) if row else None


def _keep_an_admin(connection: Connection, before: Account) -> None:
    """Refused: 409, without this administrator nobody could manage accounts."""
    if before.role == "admin" and connection.execute(_ADMINS).fetchone()[0] < 2:
        raise Refused(409, "this is the last administrator: make another one first")


def _words(number: int, token: Token) -> str:
    """What the audit says of a token."""
    where = [f"of {each}" for each in (token.project, token.device) if each]
    return " ".join((f"{number} ({token.name})", token.role, *where))
