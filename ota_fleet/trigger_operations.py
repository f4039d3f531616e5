"""What the JSON API can do about triggers: devices are told by MQTT to ask for their image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ota_fleet import openapi
from ota_fleet.accounts import allow
from ota_fleet.api import Call, sentences, within
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import Operation, record
from ota_fleet.rows import MAX_INTEGER
from ota_fleet.summons import MAX_TARGETS, Summons, Target
from ota_server import Refused, Site, shown

WAYS = ("device", "group", "label", "rollout")
STAGGER = 5  # seconds between two devices, unless told
WISH = record(
    None,
    device=openapi.NAME,
    group=openapi.NAME,
    label=openapi.NAME,
    rollout=openapi.number("its devices that may have the release now", minimum=1,
                           maximum=MAX_INTEGER),
    project=openapi.text("of a device: whose image it is to fetch; else only its devices"),
    stagger=openapi.number("seconds from one to the next", minimum=0, maximum=3_600,
                           default=STAGGER),
)  # fmt: skip
CALLED = record(
    triggers=openapi.number("messages, one each topic"),
    until=openapi.number("UTC seconds, when the last is due"),
)
TAKEN_BACK = record(triggers=openapi.number("that were not sent yet"))


@dataclass(frozen=True, slots=True)
class TriggerOperations:
    """The functions, and what they work on."""

    summons: Summons
    ledger: Ledger
    resolve: Callable[[str], str]  # a project's own name for its alias
    members: Callable[[Site, int], Iterable[str]]  # of a rollout, who may have it now
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Operation, ...]:
        """All operations, in the order of the document."""
        return (
            Operation(
                "POST", "/triggers", "publisher", "Tells devices by MQTT to ask for their image: "
                "one device, a group, a label, or a rollout", self.call, body=WISH, answer=CALLED,
                status=202, anywhere=True, refusals=(404,),
            ),
            Operation(
                "DELETE", "/triggers", "publisher", "Takes back what was not sent yet",
                self.take_back, answer=TAKEN_BACK, anywhere=True, refusals=(409,),
            ),
        )  # fmt: skip

    def call(self, call: Call) -> dict[str, Any]:
        """POST triggers."""
        self._ask_whether_anybody_hears()
        project = within(call.actor, self.resolve(call.body.get("project", "")))
        stagger, now = call.body.get("stagger", STAGGER), int(self.now())
        by, value = _way(call)
        targets = self._targets(call.site, by, value, project)
        for each in targets:
            allow(call.actor, "publisher", each.project)
        with sentences(), self.ledger.recording(call.actor.name, "trigger", now) as (_, what):
            count = self.summons.call(targets, stagger, now, project)
            if not count:
                raise ValueError("they never said of which project they are: name one")
            what.append(f"{by} {value}, {stagger} s apart: {len(targets)}")
        return {"triggers": count, "until": now + (count - 1) * stagger}

    def take_back(self, call: Call) -> dict[str, Any]:
        """DELETE triggers."""
        self._ask_whether_anybody_hears()
        project = within(call.actor, "")
        who, now = call.actor.name, int(self.now())
        with self.ledger.recording(who, "take back triggers", now) as (_, what):
            if count := self.summons.take_back(project):
                what.append(f"{count} {f'of {project}' if project else 'of all projects'}")
        return {"triggers": count}

    def _ask_whether_anybody_hears(self) -> None:
        """Refused: 409, nobody does."""
        if not self.summons.template:
            raise Refused(409, "there is no MQTT broker, or no topic: start the server with --mqtt")

    def _targets(self, site: Site, by: str, value: str | int, project: str) -> list[Target]:
        """Who is meant. Refused: 404, nobody; 422, too many."""
        if by == "rollout":
            found = self.summons.among(self.members(site, int(value)))
            found = [each for each in found if project in {"", each.project}]
        else:
            found = self.summons.find(by, value, project if by != "device" else "")
        if not found:
            raise Refused(404, f"no device is there by the {by} {shown(str(value))}")
        if len(found) > MAX_TARGETS:
            raise Refused(422, f"more than {MAX_TARGETS} devices are meant: choose fewer")
        return found


def _way(call: Call) -> tuple[str, Any]:
    """How devices are chosen. Refused: 422, not by exactly one way."""
    given = [name for name in WAYS if name in call.body]
    if len(given) != 1:
        raise Refused(422, f"say one of {', '.join(WAYS)}, and no other")
    return given[0], call.body[given[0]]
