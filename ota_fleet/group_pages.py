"""The pages of groups: how many devices each has, and what is said of it.

    GET  -> Assignments -> Sheet
    POST -> AssignmentOperations, as the API has them -> See

A group is there as long as a device is in it, or something is said of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ota_fleet.assignment_operations import AssignmentOperations
from ota_fleet.assignments import Assignments
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    button,
    card,
    cards,
    check,
    count,
    facts,
    field,
    form,
    join,
    page,
    table,
    tag,
    url,
)
from ota_fleet.outcomes import DEVICES
from ota_fleet.pages import Call, Page, See, act_of, asked, may
from ota_fleet.policy import check_word
from ota_fleet.policy_forms import changed, policy_facts, policy_fields
from ota_server import Refused, shown

GROUPS = "/admin/groups"
SAID = "channel", "pin", "hold", "window", "approval"  # of a group


@dataclass(frozen=True, slots=True)
class GroupPages:
    """The pages, and what they work on."""

    operations: AssignmentOperations

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(GROUPS, "viewer", self.show_groups, self.make_group),
            Page(f"{GROUPS}/{{group}}", "viewer", self.show_group, self.change_group),
        )

    @property
    def _known(self) -> Assignments:
        return self.operations.assignments

    # -- All groups

    def show_groups(self, call: Call) -> Sheet:
        """GET groups."""
        sizes = self._known.sizes()
        rows = [
            (a(name, group_path(name)), _devices(name, sizes.get(name, 0)), self._said(name))
            for name in self._known.groups()
        ]
        empty = "There is no group yet."
        new = form(
            GROUPS, call.actor.csrf,
            field("Name", "name", call.given("name"), required=True, maxlength=64,
                  autocomplete="off", spellcheck="false", hint="Letters, digits and . _ -"),
            submit="Go on",
        )  # fmt: skip
        words = "Devices come into a group on their own pages, or ticked in the list of devices."
        return page(
            "Groups",
            tag("p", a("Devices", DEVICES)),
            card("", table(("Group", "Devices", "What is said of it"), rows, "Groups", empty),
                 tag("p", words)),
            card("Another group", new) if may(call.actor, "publisher") else None,
        )  # fmt: skip

    def _said(self, name: str) -> Html:
        said = policy_facts(self._known.own("group", name))
        return tag("span", "; ".join(f"{what}: {value}" for what, value in said))

    def make_group(self, call: Call) -> See:
        """POST groups: a group is there once something is said of it."""
        name = call.given("name").strip()
        check_word(name, "group")
        return See(group_path(name))

    # -- One group

    def show_group(self, call: Call) -> Sheet:
        """GET a group, also one of which nothing is said yet. Refused: 404, it has no such name."""
        name, known = _name(call), self._known
        own, devices = known.own("group", name), known.sizes().get(name, 0)
        back = tag("p", a("All groups", GROUPS))
        said = facts([("Devices", _devices(name, devices)), *policy_facts(own)])
        if not may(call.actor, "publisher"):
            return page(name, back, card("", said))
        here, csrf = group_path(name), call.actor.csrf
        values = {each: getattr(own, each) for each in SAID}
        body = form(
            here, csrf,
            field("Pin", "pin", call.given("pin", own.pin), spellcheck="false", maxlength=64,
                  hint="The one version that its devices get, also downwards."),
            policy_fields(call, values, known.channels()),
            button("Save", "main", name="do", value="save"),
        )  # fmt: skip
        words = (
            f"Takes away what is said of it; {count(devices, 'device')} will be in no group then."
        )
        end = form(
            here, csrf,
            check("Yes", "sure", required=True),
            button("Delete the group", "danger", name="do", value="delete"),
        )  # fmt: skip
        last = card("Delete", tag("p", words), end) if name in known.groups() else None
        return page(name, back, card("", said), card("What its devices get", body), cards(last))

    def change_group(self, call: Call) -> See:
        """POST a group. Refused: 404, 422."""
        name = _name(call)
        if act_of({"save": False, "delete": True}, call):
            if not call.given("sure"):
                raise Refused(422, "tick the box to say that you are sure")
            self.operations.drop_group(asked(call, {"group": name}))
            return See(GROUPS, f"The group {name} is deleted.")
        own = self._known.own("group", name)
        said = changed(call, {each: getattr(own, each) for each in SAID})
        self.operations.put_group(asked(call, {"group": name}, said))
        return See(group_path(name), "It is saved.")


# -- Parts -----------------------------------------------------------------------------------------


def group_path(name: str) -> str:
    """The page of a group."""
    return url(GROUPS, name)


def _name(call: Call) -> str:
    """The group of the path. Refused: 404."""
    name = call.names["group"]
    try:
        check_word(name, "group")
    except ValueError as err:
        raise Refused(404, f"there is no group {shown(name)}") from err
    return name


def _devices(name: str, number: int) -> Html:
    return join(a(f"{number:,}", url(DEVICES, group=name)) if number else "0")
