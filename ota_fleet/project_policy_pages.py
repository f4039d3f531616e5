"""The page of what is said of a whole project: who gets its releases when, and by which plan.

GET  -> Assignments -> Sheet
POST -> AssignmentOperations, as the API has them -> See
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ota_fleet.assignment_operations import AssignmentOperations
from ota_fleet.assignments import Assignments
from ota_fleet.html import Html, Sheet, a, button, card, facts, field, form, page, tag, url
from ota_fleet.outcomes import ROLLOUTS
from ota_fleet.pages import Call, Page, See, act_of, asked, may
from ota_fleet.plan_forms import check_untouched, plan_fields, plan_given
from ota_fleet.policy import Policy
from ota_fleet.policy_forms import absent_note, changed, policy_facts, policy_fields
from ota_fleet.projects import absent
from ota_fleet.release_pages import PROJECT, PROJECTS, project_of
from ota_fleet.rollout import WATCHED, plan_of
from ota_fleet.rows import MAX_LONG

SAID = "channel", "hold", "window", "approval", "floors"  # of a project, beside its plan
NONE = "none"  # chosen: there is no plan


@dataclass(frozen=True, slots=True)
class ProjectPolicyPages:
    """The page, and what it works on."""

    operations: AssignmentOperations

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        return (Page(f"{PROJECT}/policy", "viewer", self.show, self.change),)

    @property
    def _known(self) -> Assignments:
        return self.operations.assignments

    def show(self, call: Call) -> Sheet:
        """GET the policy of a project. Refused: 404."""
        name = project_of(self.operations.stock, call).name
        own = self._known.own("project", name)
        back = tag("p", a(name, url(PROJECTS, name)), " · ",
                   a("Its rollouts", url(ROLLOUTS, project=name)))  # fmt: skip
        lacks = absent(self.operations.stock, name, own.floors)
        said = card("", policy_summary(own), absent_note(name, lacks))
        if not may(call.actor, "publisher"):
            return page(f"Who gets {name} when", back, said)
        return page(f"Who gets {name} when", back, said, self._rules(call, name, own),
                    self._plan(call, name, own))  # fmt: skip

    def _rules(self, call: Call, name: str, own: Policy) -> Html:
        values = _values(own)
        floors = field("Not to be jumped over", "floors", call.given("floors", values["floors"]),
                       hint="Versions, with spaces between: who comes from below goes through.",
                       maxlength=MAX_LONG, spellcheck="false")  # fmt: skip
        body = form(
            policy_path(name), call.actor.csrf,
            policy_fields(call, values, self._known.channels()), floors,
            button("Save", "main", name="do", value="save"),
        )  # fmt: skip
        words = "It holds for devices of which nothing else is said, nor of their group."
        return card("For all its devices", tag("p", words), body)

    def _plan(self, call: Call, name: str, own: Policy) -> Html:
        plan = plan_of(own.plan) if own.plan else WATCHED
        none = ("none: all devices may have them, and they are watched",)
        body = form(
            policy_path(name), call.actor.csrf,
            plan_fields(call, plan, self._known.groups(), [(NONE, *none)]),
            button("Save the plan", "main", name="do", value="plan"), class_="plan",
        )  # fmt: skip
        words = "By it goes each release that is published from now on; others stay as they are."
        return card("New releases", tag("p", words), body)

    def change(self, call: Call) -> See:
        """POST the policy of a project. Refused: 404, 422."""
        name = project_of(self.operations.stock, call).name
        own = self._known.own("project", name)
        said = act_of({"save": _said, "plan": _planned}, call)(call, own)
        self.operations.put_project_policy(asked(call, {"project": name}, said))
        return See(policy_path(name), "It is saved.")


# -- Parts -----------------------------------------------------------------------------------------


def policy_path(project: str) -> str:
    """The page of what is said of a project."""
    return url(PROJECTS, project, "policy")


def policy_summary(policy: Policy) -> Html:
    """What is said of a project, in few words."""
    usual = [] if policy.plan else [("New releases", "go to everybody at once, and are watched")]
    return facts([*policy_facts(policy), *usual])


def _values(own: Policy) -> dict[str, str]:
    """What the form of a policy shows."""
    return {each: getattr(own, each) for each in SAID} | {"floors": " ".join(own.floors)}


def _said(call: Call, own: Policy) -> Mapping[str, Any]:
    said: dict[str, Any] = changed(call, _values(own))
    if "floors" in said:
        said["floors"] = re.findall(r"[^\s,]+", said["floors"])
    return said


def _planned(call: Call, _own: Policy) -> Mapping[str, Any]:
    if call.given("stages") != NONE:
        return {"plan": asdict(plan_given(call))}
    check_untouched(call)
    return {"plan": {}}
