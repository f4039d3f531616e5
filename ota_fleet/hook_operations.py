"""What the JSON API can do with webhooks: its rows in the table, and what each of them does.

A secret is told once, by what made the webhook. The audit names the host of a URL only, as what is
behind it may be a secret of whoever is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ota_fleet import openapi
from ota_fleet.api import Call, listed, page_of, read_cursor, read_number, sentences, without
from ota_fleet.deliveries import EVENTS, MAX_SECRET, MAX_URL, MIN_SECRET, Delivery
from ota_fleet.hooks import Hooks
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import Operation, page, record

_FIELDS = {
    "url": openapi.text("where to; http or https", minLength=1, maxLength=MAX_URL),
    "events": openapi.several(
        openapi.text(enum=[*EVENTS]), "of which it is told; none: all", maxItems=len(EVENTS)
    ),
}
_WEBHOOK = record(id=openapi.number(), **_FIELDS, who=openapi.text("made it"), at=openapi.WHEN)
_SECRET = openapi.text("of signatures", minLength=MIN_SECRET, maxLength=MAX_SECRET)
_WISH = record(("events", "secret"), **_FIELDS, secret=_SECRET)
_MADE = record(**_WEBHOOK["properties"], secret=openapi.text("shown this once only"))
_DELIVERY = record(
    id=openapi.number("X-OTA-Delivery"),
    event=openapi.text(),
    at=openapi.WHEN,
    due=openapi.number("when it is tried next, in UTC seconds"),
    tries=openapi.number("so far"),
    failure=openapi.text("why the last one did; empty: there was none"),
)


@dataclass(frozen=True, slots=True)
class HookOperations:
    """The functions, and what they work on."""

    hooks: Hooks
    ledger: Ledger
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Operation, ...]:
        """All operations, in the order of the document."""
        one = "/webhooks/{webhook}"
        return (
            Operation(
                "GET", "/webhooks", "admin", "Who is told of events, but no secrets",
                self.list_webhooks, query=openapi.PAGE, answer=page(_WEBHOOK),
            ),
            Operation(
                "POST", "/webhooks", "admin", "Has a URL told of events, by signed POSTs",
                self.add, body=_WISH, answer=_MADE, status=201,
            ),
            Operation(
                "DELETE", one, "admin", "Tells it nothing any more", self.remove, status=204
            ),
            Operation(
                "POST", one + "/test", "admin", "Tells it of an event `ping`", self.test,
                answer=record(delivery=openapi.number("X-OTA-Delivery")), status=202,
            ),
            Operation(
                "GET", one + "/deliveries", "admin", "What it is still to be told, and why that "
                "failed", self.list_deliveries, query=openapi.PAGE, answer=page(_DELIVERY),
            ),
        )  # fmt: skip

    def list_webhooks(self, call: Call) -> dict[str, Any]:
        """GET webhooks."""
        found = map(without("secret"), self.hooks.webhooks())
        return listed(found, call, lambda each: each["id"])

    def add(self, call: Call) -> dict[str, Any]:
        """POST webhooks."""
        wish = {"events": [], "secret": "", **call.body}
        who, at = call.actor.name, int(self.now())
        with sentences(), self.ledger.recording(who, "add webhook", at) as (_, what):
            made = self.hooks.add(**wish, who=who)
            what.append(f"{made.name} for {', '.join(made.events) or 'all'}")
        return asdict(made)

    def remove(self, call: Call) -> None:
        """DELETE webhooks/{webhook}."""
        number = read_number(call.path["webhook"])
        who, at = call.actor.name, int(self.now())
        with self.ledger.recording(who, "remove webhook", at) as (_, what):
            what.append(self.hooks.remove(number).name)

    def test(self, call: Call) -> dict[str, Any]:
        """POST webhooks/{webhook}/test."""
        number = read_number(call.path["webhook"])
        who, at = call.actor.name, int(self.now())
        with self.ledger.recording(who, "test webhook", at) as (_, what):
            webhook, delivery = self.hooks.ping(number)
            what.append(webhook.name)
        return {"delivery": delivery}

    def list_deliveries(self, call: Call) -> dict[str, Any]:
        """GET webhooks/{webhook}/deliveries."""
        limit = call.query.get("limit", 100)
        (after,) = read_cursor(call.query.get("cursor", ""), int) or [0]
        found = self.hooks.deliveries(read_number(call.path["webhook"]), after, limit)
        return page_of(found, limit, lambda each: [each.id], _described)


def _described(delivery: Delivery) -> dict[str, Any]:
    names = ("id", "event", "at", "due", "tries", "failure")
    return {name: getattr(delivery, name) for name in names}
