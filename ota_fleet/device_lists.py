"""Lists of devices: which are looked for, and as CSV, out and in. Pure.

fields of a query -> Search, as the registry takes it
devices -> lines of CSV
a CSV file of MAC addresses -> Line by Line, what is to be done with each
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from typing import NamedTuple

from ota_fleet.api import read_cursor
from ota_fleet.history import DAY, MONTH
from ota_fleet.html import Head, url
from ota_fleet.pages import Call
from ota_fleet.registry import Device, Search
from ota_fleet.rows import is_mac, normal_id, version_place
from ota_fleet.searches import STATES
from ota_server import Refused, shown

DEVICES = "/admin/devices"
SILENT = "silent"  # the state that is a time
STATE_NAMES = {
    "": "any",
    "failing": "failing: given one version again and again",
    SILENT: "silent: not seen for a day",
    "unknown": "unknown: not admitted",
    "admitted": "admitted",
    "pinned": "pinned to a version",
    "looping": "looping: given in full, in vain",
}
MAX_LINES = 10_000  # of a list: a form has room for so many
SORTS = {"id": "Device", "project": "Project", "version": "Runs", "last_seen": "Last seen"}
FILTERS = "q", "project", "version", "chip", "state", "label", "group", "sort"
_SAME = {"mac": "device", "mac address": "device", "id": "device", "device_id": "device"}
COLUMNS = (
    "device", "project", "version", "chip", "admitted", "pin", "labels", "notes", "sdk", "address",
    "first_seen", "last_seen", "downloads", "offered", "offers",
    "channel", "group",
)  # fmt: skip
# What a spreadsheet takes for a formula, also behind spaces and in the wide forms of East Asia.
_FORMULA = re.compile(r"\s*[=+\-@\uff0b\uff0d\uff1d\uff20]|[\t\r\n]")


# -- What is looked for ----------------------------------------------------------------------------


def asked(call: Call) -> dict[str, str]:
    """What the query says of which devices are meant."""
    return {name: text for name in FILTERS if (text := call.asked(name).strip())}


def search_of(words: Mapping[str, str], now: int) -> Search:
    """The same for the registry. Refused: 422, there is no such order, or state."""
    sort, state = words.get("sort", "id"), words.get("state", "")
    if sort.removeprefix("-") not in SORTS or state not in {*STATES, SILENT}:
        raise Refused(422, f"no devices are in the state {shown(state)}, by {shown(sort)}")
    names = "project", "q", "chip", "version", "label"
    project, text, chip, version, label = (words.get(each, "") for each in names)
    group = words.get("group", "")
    search = Search(project, text, chip, version, label, sort, state, group=group)
    if state == SILENT:
        return search._replace(state="", since=now - MONTH, until=now - DAY)
    return search._replace(since=now - MONTH) if state == "failing" else search


def place_of(call: Call, search: Search) -> Sequence[str | int]:
    """Where the page begins. Refused: 422."""
    by = search.sort.removeprefix("-")
    kinds = (str,) if by == "id" else (int if by == "last_seen" else str, str)
    return read_cursor(call.asked("cursor"), *kinds)


def heads_of(words: Mapping[str, str]) -> Iterator[str | Head]:
    """The heads of columns that sort; once more: the other way round."""
    sort = words.get("sort", "id")
    for name, label in SORTS.items():
        up = sort == name
        after = f"-{name}" if up or (name == "last_seen" and sort != "-last_seen") else name
        order = "ascending" if up else "descending" if sort == f"-{name}" else ""
        yield Head(label, url(DEVICES, **{**words, "sort": after}), order)
    yield "Chip"


def newest_first(versions: Iterable[str]) -> list[str]:
    """Versions, as a choice has them; what is none stands last."""
    return sorted(versions, key=version_place, reverse=True)


def counted(number: int, name: str = "device") -> str:
    """How many there are of something."""
    return f"{number:,} {name}{'s' * (number != 1)}"


# -- CSV -------------------------------------------------------------------------------------------


def harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: OWASP, CSV injection."""
    return f"'{text}" if _FORMULA.match(text) else text


def csv_line(cells: Iterable[object]) -> bytes:
    """A line of RFC 4180."""
    text = StringIO()
    csv.writer(text).writerow([harmless(str(each)) for each in cells])
    return text.getvalue().encode()


def label_line(device: Device) -> str:
    """Its labels, as people write them."""
    return ", ".join(device.labels)


def cells_of(device: Device) -> Iterator[object]:
    """What stands in COLUMNS."""
    yield from (device.id, device.project, device.version, device.chip)
    yield from ("yes" if device.admitted else "no", device.pin, label_line(device), device.notes)
    yield from (device.sdk, device.address)
    for at in (device.first_seen, device.last_seen):
        yield time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    yield from (device.downloads, device.offered, device.offers, device.channel, device.group)


class Line(NamedTuple):
    """A line of a list that somebody gave."""

    number: int  # 1 for the first
    device: str  # as normal_id() writes it
    project: str  # as it stands there, or the usual one
    flaw: str = ""  # why nothing is done about it, a sentence


def read_lines(text: str, project: str) -> list[Line]:
    """The lines of a list of MAC addresses; `project` is for those that say none.

    Raises:
        Refused: 413, they are too many; 422, it is no CSV.
    """
    rows = csv.reader(StringIO(text, newline=""), delimiter=_delimiter(text))
    lines: list[Line] = []
    columns: list[str] = []
    try:
        for row in rows:
            cells = [each.strip().removeprefix("'") for each in row]
            if not any(cells):
                continue
            if not (lines or columns) and (columns := _columns(cells)):
                continue
            if len(lines) == MAX_LINES:
                raise Refused(413, f"a list has at most {MAX_LINES:,} lines: take it in parts")
            named = dict(zip(columns or ["device"], cells, strict=False))
            lines.append(_line(rows.line_num, named, project))
    except csv.Error as err:
        raise Refused(422, f"line {rows.line_num} is no CSV: {err}") from err
    return lines


def _delimiter(text: str) -> str:
    """What is between cells; spreadsheets of some countries write semicolons."""
    first = text.lstrip().partition("\n")[0]
    return max(",;\t", key=first.count)


def _columns(cells: Sequence[str]) -> list[str]:
    """The names of columns; none: it is no line of names."""
    names = [_SAME.get(each.lower(), each.lower()) for each in cells]
    return names if "device" in names else []


def _line(number: int, named: Mapping[str, str], project: str) -> Line:
    device = named.get("device", "")
    line = Line(number, normal_id(device), named.get("project") or project)
    if not is_mac(device):
        return line._replace(flaw=f"{shown(device)} is no MAC address")
    if named.get("admitted", "").lower() in {"no", "0", "false"}:
        return line._replace(flaw="the list says that it is not admitted")
    return line
