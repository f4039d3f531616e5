"""What happens: decisions as they are made, and the audit of who changed what."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from ota_fleet.api import json_of
from ota_fleet.history import Decision, History
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    asking,
    badge,
    card,
    details,
    field,
    hidden,
    join,
    page,
    pager,
    table,
    tag,
    url,
    when,
)
from ota_fleet.ledger import Ledger
from ota_fleet.outlook import verdict
from ota_fleet.pages import Call, Page, may
from ota_fleet.rows import MAX_INTEGER, normal_id
from ota_server import Refused, Reply, shown

ACTIVITY, FEED, DEVICES = "/admin/activity", "/admin/activity.json", "/admin/devices"
DECISIONS = 50  # rows of what is live
MAX_FEED = 1_000
ENTRIES = 50  # rows of a page of the audit
MAX_WHAT = 200  # characters of an entry that are shown at once
QUICK = 1_000  # entries, some 10 ms, that are looked through whenever they are shown


@dataclass(frozen=True, slots=True)
class ActivityPages:
    """The pages, and what they look at."""

    ledger: Ledger
    history: History
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(ACTIVITY, "viewer", self.show, link="Activity"),
            Page(FEED, "viewer", self.feed),
        )

    def show(self, call: Call) -> Sheet:
        """GET activity; the audit is for administrators, as in the API."""
        device, now = call.asked("device").strip(), self.now()
        search = asking(
            ACTIVITY,
            field("Device", "device", device, type="search", hint="Its MAC address, in any form."),
            a("All devices", ACTIVITY) if device else None,
            a("More about it", url(DEVICES, normal_id(device))) if device else None,
        )
        # The script, which asks again and again, does not look at the audit.
        is_asked = "x-ota-script" not in call.request.headers
        decisions = self.history.recent(device=device, limit=DECISIONS)
        return page(
            "Activity",
            card("", search),
            card("Decisions", _decisions(decisions, now), id="decisions", data_live=3),
            self._audit(call, device, now) if is_asked and may(call.actor, "admin") else None,
        )

    def feed(self, call: Call) -> Reply:
        """GET activity.json: decisions with a number above `after`, the newest first."""
        after = number(call.asked("after", "0"), "after")
        found = self.history.recent(after, call.asked("device"), MAX_FEED)
        last = found[0].number if found else after
        return json_of(200, {"items": [each._asdict() for each in found], "last": last})

    def _audit(self, call: Call, device: str, now: float) -> Html:
        before = number(call.asked("before", str(MAX_INTEGER)), "before")
        entries = self.ledger.latest(before, device, ENTRIES + 1)
        rows = [
            (each.number, when(each.at, now), each.who, each.action, _cut(each.what))
            for each in entries[:ENTRIES]
        ]
        last = entries[ENTRIES - 1].number if len(entries) > ENTRIES else 0
        following = url(ACTIVITY, device=device, before=last) if last else ""
        first = url(ACTIVITY, device=device) if call.asked("before") else ""
        export = a("All of it, an entry a line", "/api/v1/audit.jsonl")
        return card(
            "Audit",
            self._state(call, device),
            table(("Number", "When", "Who", "Did", "What"), rows, "Audit", "Nobody changed it."),
            pager(first, following),
            tag("p", export),
            id="audit",
        )

    def _state(self, call: Call, device: str) -> Html:
        """Whether the chain of entries is whole; a long one is looked through on demand."""
        newest = self.ledger.latest(limit=1)
        if newest and newest[0].number > QUICK and not call.asked("verify"):
            return asking(ACTIVITY, hidden(device=device, verify=1), submit="Is it whole?")
        if self.ledger.verify_audit():
            return tag("p", badge("whole", "good"), " No entry was changed or taken out.")
        why = " Entries were changed or taken out: compare it with the log and with backups."
        return tag("p", badge("broken", "bad"), why, role="alert")


def number(text: str, name: str) -> int:
    """A number of a query. Refused: 422, it is none."""
    if not re.fullmatch("[0-9]{1,19}", text):
        raise Refused(422, f"{name}: {shown(text)} is no number")
    return min(int(text), MAX_INTEGER)


def _cut(what: str) -> Html:
    """What was done, and the rest of a long list on demand."""
    more = details("All of it", what) if len(what) > MAX_WHAT else None
    return join(what if more is None else f"{what[:MAX_WHAT]}...", more)


def _decisions(found: list[Decision], now: float) -> Html:
    rows = [
        (when(each.at, now),
         join(a(each.device, url(DEVICES, each.device)) if each.device else "-", " ",
              tag("small", each.address)),
         each.project, each.version, verdict(each), each.reason)
        for each in found
    ]  # fmt: skip
    heads = "When", "Device", "Project", "Ran", "Outcome", "Why"
    return table(heads, rows, "Decisions", "Nobody asked since the server started.")
