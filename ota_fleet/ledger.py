"""Who may do what, and who did what: accounts, sessions, tokens and the audit, as rows.

Secrets are not here: of tokens and sessions there are digests, of passwords what accounts.py makes
of them. Everything goes through the registry, as its threads and promises are those of all rows.
"""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import astuple

from ota_fleet.registry import MAX_PAGE, Registry
from ota_fleet.rows import MAX_INTEGER, MAX_LONG, Entry, Token, clean
from ota_fleet.schema import transaction

_TOKENS = "SELECT id, name, role, project, digest, device, created FROM token "
_MINT = """INSERT INTO token (name, role, project, digest, device, created)
VALUES (?, ?, ?, ?, ?, ?) RETURNING id"""
_HEAD = "SELECT number, digest FROM audit_head"  # PostgreSQL: FOR UPDATE where one is added
_ENTRIES = """SELECT number, at, who, action, what, digest
FROM audit WHERE number > ? ORDER BY number LIMIT ?"""

log = logging.getLogger("ota.ledger")


class Ledger:
    """Rows about people, what they hold and what they did; may be used from any thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    # -- Tokens ------------------------------------------------------------------------------------

    def add_token(self, token: Token) -> int:
        """Remembers a token, whose id does not count; gives back its id, never used again.

        Raises:
            ValueError: there is one with this digest.
        """
        texts = token.name, token.role, token.project, token.digest, token.device
        values = *map(clean, texts), token.created
        try:
            with self._registry.writing() as connection:
                return int(connection.execute(_MINT, values).fetchall()[0][0])
        except sqlite3.IntegrityError as err:
            raise ValueError("this token is known already") from err

    def token_by_digest(self, digest: str) -> Token | None:
        """The token with this digest; None: unknown or revoked."""
        rows = self._registry.rows(_TOKENS + "WHERE digest = ?", clean(digest))
        return Token(*rows[0]) if rows else None

    def tokens(self) -> list[Token]:
        """All tokens, the oldest first."""
        return [Token(*row) for row in self._registry.rows(_TOKENS + "ORDER BY id")]

    def revoke_token(self, token: int) -> bool:
        """Forgets a token by its id, so that it opens nothing; False: there is none."""
        return self._registry.write("DELETE FROM token WHERE id = ?", min(token, MAX_INTEGER)) > 0

    # -- Audit -------------------------------------------------------------------------------------

    def audit(self, who: str, action: str, what: str, at: int) -> None:
        """Adds an entry; nothing here changes or removes one."""
        texts = clean(who), clean(action), clean(what, MAX_LONG)
        with self._registry.writing() as connection:
            last, previous = connection.execute(_HEAD).fetchone()
            entry = Entry(last + 1, at, *texts)
            row = (*astuple(entry)[:-1], entry.follows(previous))
            connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", row)
            connection.execute("UPDATE audit_head SET number = ?, digest = ?", (row[0], row[-1]))
        log.info("audit %d %s %r %r %r", row[0], row[-1], *(text[:64] for text in texts))

    def audit_log(self, after: int = 0, limit: int = 100) -> list[Entry]:
        """A page of entries, the oldest first, from behind the number `after`; at most MAX_PAGE."""
        rows = self._registry.rows(_ENTRIES, min(after, MAX_INTEGER), max(1, min(limit, MAX_PAGE)))
        return [Entry(*row) for row in rows]

    def verify_audit(self) -> bool:
        """True: no entry was changed, moved or taken out, the last ones included."""
        # PostgreSQL: BEGIN ISOLATION LEVEL REPEATABLE READ; it is one moment that is looked at.
        with self._registry.reading() as connection, transaction(connection, "BEGIN"):
            number, digest = 0, ""
            for row in connection.execute(_ENTRIES, (-MAX_INTEGER, MAX_INTEGER)):
                entry = Entry(*row)
                number, digest = number + 1, entry.follows(digest)
                if (entry.number, entry.digest) != (number, digest):
                    return False
            return connection.execute(_HEAD).fetchall() == [(number, digest)]
