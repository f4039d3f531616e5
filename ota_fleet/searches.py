"""How devices are looked for, in SQL: what a Search and its order mean to the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ota_fleet.rows import Device, Search, clean

# To its project, whose alias it may say.
ADMITTED = """EXISTS (SELECT 1 FROM admission WHERE admission.device = device.id
    AND admission.project IN (device.project,
        (SELECT alias.project FROM alias WHERE alias.name = device.project)))"""
_SAID = """SELECT id, project, chip, version, image, free_space, sdk, address,
    first_seen, last_seen, downloads, notes, labels, pin, """
DEVICES = _SAID + ADMITTED + ", offered, offers, channel, team, interval FROM device WHERE "
# Labels are a line each, so that one is found as it is and no part of another. A tab keeps the
# fields apart. lower() is for ASCII in SQLite, for all letters in PostgreSQL. The + keeps away an
# index that would take the place of the order's.
FOUND = """+last_seen >= ? AND +last_seen < ? AND (? = '' OR chip = ?) AND (? = '' OR version = ?)
    AND (? = '' OR team = ?)
    AND (? = '' OR replace(labels, ?, '') <> labels) AND (? = '%%' OR lower(id || '\t'
    || replace(id, ':', '') || '\t' || project || '\t' || chip || '\t' || version || '\t'
    || address || '\t' || notes || '\t' || labels) LIKE lower(?) ESCAPE '!')"""
OF_PROJECT = "project = ? AND "
ALSO_CALLED = """project IN (SELECT ? UNION ALL SELECT name FROM alias WHERE alias.project = ?)
    AND """
STATES = {  # in which devices may be looked for
    "": "",
    "admitted": ADMITTED + " AND ",
    "unknown": "NOT " + ADMITTED + " AND ",
    "failing": "offers >= 3 AND ",
    "pinned": "pin <> '' AND ",
    "looping": "EXISTS (SELECT 1 FROM loop WHERE loop.device = device.id) AND ",
}
SORTED = {  # what is behind a place, and the order
    "id": (" AND id > ?", " ORDER BY id LIMIT ?"),
    "-id": (" AND id < ?", " ORDER BY id DESC LIMIT ?"),
    "project": (" AND (project, id) > (?, ?)", " ORDER BY project, id LIMIT ?"),
    "-project": (" AND (project, id) < (?, ?)", " ORDER BY project DESC, id DESC LIMIT ?"),
    "last_seen": (" AND (last_seen, id) > (?, ?)", " ORDER BY last_seen, id LIMIT ?"),
    "-last_seen": (" AND (last_seen, id) < (?, ?)", " ORDER BY last_seen DESC, id DESC LIMIT ?"),
}
CHIPS = "SELECT DISTINCT chip FROM device WHERE chip <> '' ORDER BY chip LIMIT ?"
LABELS = "SELECT DISTINCT labels FROM device WHERE labels <> '[]' LIMIT ?"


def where(search: Search, rows: Callable[..., list[object]]) -> tuple[str, tuple[str | int, ...]]:
    """What a search is in SQL, and its values; `rows` gives what a statement finds.

    Raises:
        KeyError: there is no such state.
    """
    names, of_project = [clean(search.project)] * bool(search.project), ""
    if names:  # with an alias there is no index for the order
        also = rows("SELECT 1 FROM alias WHERE project = ? LIMIT 1", *names)
        of_project, names = (ALSO_CALLED, names * 2) if also else (OF_PROJECT, names)
    return STATES[search.state] + of_project + FOUND, (*names, *search.values())


def all_of(devices: Callable[..., Sequence[Device]], search: Search, most: int) -> Iterator[Device]:
    """All devices of a search, however many; `devices` gives a page of at most `most` of them."""
    after: Sequence[str | int] = ()
    while found := devices(search, after, most):
        yield from found
        after = search.place(found[-1])
