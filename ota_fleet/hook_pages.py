"""The page of webhooks: who is told of what happens, whether that works, and one more.

GET  -> Hooks -> Sheet
POST -> HookOperations, as the API has them -> See, or the secret, which is shown once
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ota_fleet.deliveries import EVENTS, MAX_SECRET, MAX_URL, MIN_SECRET, Webhook
from ota_fleet.hook_operations import HookOperations
from ota_fleet.html import (
    Html,
    Sheet,
    badge,
    button,
    card,
    check,
    code,
    copied,
    count,
    details,
    field,
    form,
    hidden,
    join,
    note,
    page,
    table,
    tag,
    when,
)
from ota_fleet.pages import Call, Page, See, act_of, asked
from ota_server import Refused

WEBHOOKS = "/admin/webhooks"
SHOWN = 20  # deliveries of each webhook that are looked at
WORDS = {
    "rollout.halted": "a rollout halts by itself",
    "rollout.finished": "a rollout is finished",
    "device.silent": "a device does not come back",
    "device.looping": "a device was given an image too often",
    "device.unknown": "a device asks that is not admitted",
    "release.new": "there is a new release",
}


@dataclass(frozen=True, slots=True)
class HookPages:
    """The page, and what it works on."""

    operations: HookOperations

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        return (Page(WEBHOOKS, "admin", self.show, self.change, acts="admin"),)

    def show(self, call: Call) -> Sheet:
        """GET webhooks."""
        return self._sheet(call, None)

    def _sheet(self, call: Call, fresh: Html | None) -> Sheet:
        rows = [self._row(call, each) for each in self.operations.hooks.webhooks()]
        heads = "Id", "Where to", "Told of", "Made", "To be told", ""
        chosen = call.all_given("events")
        events = [check(WORDS.get(each, each), "events", each, checked=each in chosen)
                  for each in EVENTS]  # fmt: skip
        body = form(
            WEBHOOKS, call.actor.csrf,
            field("URL", "url", call.given("url"), type="url", required=True, maxlength=MAX_URL),
            field("Secret", "secret", call.given("secret"), maxlength=MAX_SECRET,
                  autocomplete="off", spellcheck="false",
                  hint=f"Of signatures, {MIN_SECRET} characters or more; empty: one is made."),
            tag("fieldset", tag("legend", "Told when"), *events,
                tag("small", "No tick: all events.")),
            button("Make it", "main", name="do", value="add"),
        )  # fmt: skip
        words = "A URL is told of what happens by a signed POST, again until it answers 2xx."
        live = tag("div", table(heads, rows, "Webhooks", "There is no webhook yet."),
                   id="webhooks", class_="live", data_live=10)  # fmt: skip
        new = card("Another webhook", tag("p", words), body)
        return page("Webhooks", fresh, card("", live), new)

    def _row(self, call: Call, webhook: Webhook) -> tuple[object, ...]:
        now, which = self.operations.now(), hidden(id=webhook.id)
        waiting = self.operations.hooks.deliveries(webhook.id, 0, SHOWN)
        failure = next((each.failure for each in waiting if each.failure), "")
        state = join(
            count(len(waiting), "event") if waiting else "nothing", " ",
            (badge("fails", "bad"), " ", failure, ", again ", when(waiting[0].due, now))
            if failure else None,
        )  # fmt: skip
        csrf = call.actor.csrf
        test = form(WEBHOOKS, csrf, which, button("Test it", name="do", value="test"))
        end = form(
            WEBHOOKS, csrf, which, check("Yes", "sure", required=True),
            button("Remove", "danger", name="do", value="remove"),
        )  # fmt: skip
        return (
            webhook.id,
            code(webhook.url),
            ", ".join(webhook.events) or "all",
            join(when(webhook.at, now), f" by {webhook.who}"),
            state,
            details("Change", test, end),
        )

    def change(self, call: Call) -> See | Sheet:
        """POST webhooks. What is shown once cannot be told by the next page: it is told here."""
        acts: Mapping[str, Callable[[Call], See | Sheet]] = {
            "add": self._add, "test": self._test, "remove": self._remove,
        }  # fmt: skip
        return act_of(acts, call)(call)

    def _add(self, call: Call) -> Sheet:
        wish = {"url": call.given("url").strip(), "secret": call.given("secret").strip()}
        made = self.operations.add(asked(call, {}, {**wish, "events": _events(call)}))
        fresh = card(
            f"Webhook {made['id']}",
            note("Copy its secret now: nobody can tell it again.", kind="warn"),
            copied(made["secret"], "the secret"),
            role="status",
        )
        return self._sheet(call._replace(form={}), fresh)

    def _test(self, call: Call) -> See:
        self.operations.test(asked(call, {"webhook": call.given("id")}))
        return See(WEBHOOKS, "It is told of a ping.")

    def _remove(self, call: Call) -> See:
        if not call.given("sure"):
            raise Refused(422, "tick the box to say that you are sure")
        self.operations.remove(asked(call, {"webhook": call.given("id")}))
        return See(WEBHOOKS, f"Webhook {call.given('id')} is told nothing any more.")


def _events(call: Call) -> list[str]:
    """Those that are ticked. Refused: 422, there is none of these."""
    found = [*call.all_given("events")]
    if not {*found} <= {*EVENTS}:
        raise Refused(422, f"events are {', '.join(EVENTS)}")
    return found
