"""What the JSON API can do: the table of its operations, and what each of them does.

    TABLE row --> a function of Operations: Call --> what becomes JSON, a Reply, or Refused

Who may is in the table, and was asked before. Where a token is for one project, and the path names
none, the function looks itself: `within`. Whatever changes something stands in the audit, in the
same transaction. Times are UTC seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from typing import Any

from ota_fleet.accounts import ROLES, Account, Accounts, Actor, allow
from ota_fleet.api import Call, json_of, page_of, read_cursor, write_cursor
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import (
    Operation,
    Schema,
    document,
    flag,
    number,
    record,
    several,
    text,
)
from ota_fleet.registry import MAX_LABELS, MAX_PAGE, Device, Registry, Search
from ota_fleet.rows import MAX_INTEGER, MAX_LONG, MAX_TEXT, Entry, Token
from ota_server import (
    UNCACHED,
    Image,
    Refused,
    Reply,
    Version,
    attachment,
    identity_of,
    shown,
    unnamed_file,
)

# -- 1. Shapes -------------------------------------------------------------------------------------

WHEN = number("UTC seconds")
NAME = text(minLength=1, maxLength=MAX_TEXT)
VERSION = text("a semantic version such as 1.2.3, in its normal form")
PAGE: Mapping[str, Schema] = {
    "limit": number("items of a page at most", minimum=1, maximum=MAX_PAGE, default=100),
    "cursor": text("where the page begins: `next` of the page before"),
}
SORTS = [f"{down}{by}" for by in ("id", "last_seen", "version", "project") for down in ("", "-")]
NUMBER = text("a number", pattern="^[0-9]{1,18}$")

DEVICE = record(
    id=text("a MAC address as AA:BB:CC:DD:EE:FF, or what the device gave"),
    project=text("what it asked for last; empty, here and below: it never said"),
    chip=text(),
    version=text("the one it runs"),
    image=text("digest of what it runs: SHA-256, or MD5, in hex"),
    free_space={"type": ["integer", "null"], "description": "bytes"},
    sdk=text(),
    address=text("IP address"),
    first_seen=WHEN,
    last_seen=WHEN,
    downloads=number("images it was given"),
    notes=text(),
    labels=several(text()),
    pin=text("the one version it is to run; empty: the newest"),
    admitted=flag("to its project"),
)
NOTES = record(
    None,
    notes=text(maxLength=MAX_LONG),
    labels=several(NAME, maxItems=MAX_LABELS),
    pin=text("a version; empty: none", maxLength=MAX_TEXT),
)
ACCOUNT = record(
    id=number(), email=text(), role=text(enum=[*ROLES]), created=WHEN
)
PASSWORD = text(maxLength=1000)
CREDENTIALS = record(email=NAME, password=PASSWORD)
SESSION = record(
    name=text("who it is, as in the audit"),
    role=text(),
    project=text("the only one; empty: all"),
    csrf=text("X-CSRF-Token of what changes something; empty: none is needed"),
)
TOKEN = record(
    id=number(),
    name=text(),
    role=text(enum=[*ROLES, "device"]),
    project=text("the only one; empty: all"),
    device=text("the only one; empty: it is for none"),
    created=WHEN,
)
ENTRY = record(
    number=number("1, 2, 3... without a gap"),
    at=WHEN,
    who=text(),
    action=text(),
    what=text(),
    digest=text("SHA-256, in hex, of the digest before and of the JSON of the other five, a list"),
)


def page(items: Schema) -> Schema:
    """What a list answers."""
    following = {"type": ["string", "null"], "description": "the next ?cursor=; null: no more"}
    return record(items=several(items), next=following)


@contextmanager
def sentences() -> Iterator[None]:
    """Makes a ValueError, whose message is a sentence, a 422."""
    try:
        yield
    except ValueError as err:
        raise Refused(422, str(err)) from err


def listed(found: Iterable[Any], call: Call, place: Callable[[Any], str | int]) -> dict[str, Any]:
    """A page of what is all in memory, by its place; asdict() makes the items."""
    ordered = sorted(found, key=place)
    if ordered:
        after = read_cursor(call.query.get("cursor", ""), type(place(ordered[0])))
        ordered = [each for each in ordered if not after or place(each) > after[0]]
    limit = call.query.get("limit", 100)
    more = len(ordered) > limit
    items = ordered[:limit]
    return {"items": items, "next": write_cursor([place(items[-1])]) if more else None}
