"""What a device was given, and what it may get: parts of its page, and what their forms do.

Device -> attempts with their outcome, what each rule says, what is said of it
POST -> Operations, as the API has them -> See
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ota_fleet.assignment_operations import AssignmentOperations
from ota_fleet.explain import candidates, subject, verdicts
from ota_fleet.html import (
    Html,
    badge,
    button,
    card,
    choice,
    details,
    form,
    hidden,
    note,
    table,
    tag,
    url,
    when,
)
from ota_fleet.operations import Operations
from ota_fleet.outcomes import DEVICES, attempts_table
from ota_fleet.outlook import awaited, report_of
from ota_fleet.pages import Call, See, asked, may
from ota_fleet.policy_forms import absent_note, changed, policy_fields
from ota_fleet.projects import absent
from ota_fleet.rollout_operations import RolloutOperations
from ota_fleet.rows import Device, parsed
from ota_server import Refused, Release, Site, Version

ATTEMPTS = 10  # that are shown
MAX_RELEASES = 25  # of which it is said why a device does not get them
OF_ROW = "pin", "channel", "group"  # what stands in the device's own row
OF_POLICY = "hold", "window", "approval"


@dataclass(frozen=True, slots=True)
class DeviceUpdates:
    """The parts, and what they work on."""

    operations: Operations
    rollouts: RolloutOperations
    assignments: AssignmentOperations

    def acts(self) -> Mapping[str, Callable[[Call, Device], See]]:
        """What its forms do."""
        return {
            "pin": self._save,
            "again": self._again,
            "approve": self._approve,
            "disapprove": self._disapprove,
            "forgive": self._forgive,
        }

    def groups(self) -> list[str]:
        """All groups."""
        return self.assignments.assignments.groups()

    def is_looping(self, device: Device) -> bool:
        """Whether there is an image that it is not given any more."""
        return self.rollouts.grants.is_looping(device.id)

    # -- What it was given -------------------------------------------------------------------------

    def attempts(self, call: Call, device: Device, now: float) -> Html:
        """The card of its attempts."""
        grants = self.rollouts.grants
        found = grants.attempts(device.id, limit=ATTEMPTS)
        loops = [self._loop(call, device, each.version) for each in grants.loops(device=device.id)]
        return card("What became of it", loops,
                    attempts_table(found, grants.live(), now, of_device=True),
                    id="attempts", data_live=5)  # fmt: skip

    def _loop(self, call: Call, device: Device, version: str) -> Html:
        words = f"{version} was given to it in full again and again, and it does not run it: "
        again = form(_path(device), call.actor.csrf,
                     button("Let it try again", name="do", value="forgive"))  # fmt: skip
        told = note(badge("looping", "bad"), " ", words, "it does not get it any more.", kind="bad")
        return tag("div", told, again if may(call.actor, "publisher") else None)

    def _forgive(self, call: Call, device: Device) -> See:
        self.rollouts.forgive(asked(call, {"device": device.id}))
        return See(_path(device), "It may try again.")

    # -- Why ---------------------------------------------------------------------------------------

    def why(self, site: Site, device: Device) -> Html | None:
        """The card of what each rule says, and of each release why not; None: there is none."""
        report = report_of(device)
        report = report._replace(project=self.operations.stock.resolve(device.project))
        try:
            found = candidates(site, report)
            release = subject(found, site, report).release
            rules = verdicts(site, report, release)
        except Refused:
            return None
        said = [(each.rule, _mark(each.code, "fine", denies=each.denies), each.sentence)
                for each in rules]  # fmt: skip
        others = [
            (each.release.version, each.release.name, _mark(each.code, "fits"), each.reason)
            for each in found[:MAX_RELEASES]
        ]
        return card(
            "Why",
            details(f"Each rule, of {release.version}",
                    table(("Checked", "Says", "Because"), said, "Rules")),
            details("Each release, and why not",
                    table(("Version", "File", "Rule", "Why"), others, "Releases")),
            id="why", data_live=10,
        )  # fmt: skip

    # -- What it may get ---------------------------------------------------------------------------

    def approval(self, call: Call, device: Device, now: float) -> Html | None:
        """What waits for an approval, and what has one; None: none is needed."""
        known, project = self.assignments.assignments, self.operations.stock.resolve(device.project)
        approvals = known.approvals(device.id)
        policy = known.policy(device.id, project)
        if policy.approval != "yes" and not approvals:
            return None
        wanted = awaited(call.site, device) if policy.approval == "yes" else None
        changes = may(call.actor, "publisher")
        rows = [
            (each.version, each.who, when(each.at, now),
             _decide(call, device, "disapprove", each.version) if changes else None)
            for each in approvals
        ]  # fmt: skip
        heads = "Version", "Approved by", "When", ""
        return card(
            "Approval",
            self._wanted(call, device, wanted, project) if wanted else None,
            table(heads, rows, "Approvals", "Nothing is approved."),
            id="approval", data_live=10,
        )  # fmt: skip

    def _wanted(self, call: Call, device: Device, release: Release, project: str) -> Html | None:
        version, known = release.version.text, self.assignments.assignments
        if known.is_approved(device.id, project, version):
            return None
        ask = _decide(call, device, "approve", version) if may(call.actor, "publisher") else None
        return tag("div", note(f"{version} waits for an approval.", kind="warn"), ask)

    def ways(self, call: Call, device: Device) -> Html:
        """The card of what lets it have another release."""
        here, csrf, known = _path(device), call.actor.csrf, self.assignments.assignments
        values = self._values(device)
        versions = [str(each.version) for each in self._releases(device)]
        words = dict.fromkeys(each for each in (*versions, device.pin) if each)
        pins = [("", "none: it gets the newest that fits"), *((each, each) for each in words)]
        pin = choice("Pin", "pin", pins, call.given("pin", device.pin),
                     hint="The one version that it gets, also downwards.")  # fmt: skip
        fields = policy_fields(call, values, known.channels(), known.groups())
        own = self.operations.stock.resolve(device.project)
        do = "expel" if device.admitted else "admit"
        text = "Take back its admission to" if device.admitted else "Admit to"
        admission = form(here, csrf, button(f"{text} {own}", name="do", value=do)) if own else None
        offer = form(here, csrf, pin, fields, button("Save", name="do", value="pin"))
        policy = known.policy(device.id, own)
        lacks = absent(self.operations.stock, own, (policy.pin, policy.again)) if own else []
        return card("What it may get", absent_note(own, lacks), offer,
                    self._once_more(call, device), admission)  # fmt: skip

    def _values(self, device: Device) -> dict[str, str]:
        own = self.assignments.assignments.own("device", device.id)
        return {
            **{name: getattr(device, name) for name in OF_ROW},
            **{name: getattr(own, name) for name in OF_POLICY},
        }

    def _releases(self, device: Device) -> Sequence[Release]:
        try:
            return self.operations.stock.releases(device.project)
        except Refused:
            return ()

    def _once_more(self, call: Call, device: Device) -> Html | None:
        """What gives it the version again that it runs."""
        again = self.assignments.assignments.own("device", device.id).again
        runs = parsed(device.version)
        if not (again or runs):
            return None
        text = f"Do not give it {again} again" if again else f"Give it {runs} again"
        return form(_path(device), call.actor.csrf, hidden(version="" if again else runs),
                    button(text, name="do", value="again"))  # fmt: skip

    def _save(self, call: Call, device: Device) -> See:
        change, names = changed(call, self._values(device)), {"device": device.id}
        row = {name: change[name] for name in OF_ROW if name in change}
        policy = {name: change[name] for name in OF_POLICY if name in change}
        if row.get("pin"):
            row["pin"] = str(Version.parse(row["pin"]))
        with self.operations.registry.writing():  # all of it, or nothing
            if row:
                self.operations.annotate(asked(call, names, row))
            if policy:
                self.assignments.put_device_policy(asked(call, names, policy))
        return See(_path(device), "It is saved.")

    def _again(self, call: Call, device: Device) -> See:
        version = call.given("version")
        body = {"again": version}
        self.assignments.put_device_policy(asked(call, {"device": device.id}, body))
        said = f"It gets {version} once more" if version else "It gets nothing once more"
        return See(_path(device), f"{said}.")

    def _approve(self, call: Call, device: Device) -> See:
        version = call.given("version")
        self.assignments.approve(asked(call, {"device": device.id, "version": version}))
        return See(_path(device), f"{version} is approved.")

    def _disapprove(self, call: Call, device: Device) -> See:
        version = call.given("version")
        self.assignments.disapprove(asked(call, {"device": device.id, "version": version}))
        return See(_path(device), f"{version} is not approved any more.")


def _path(device: Device) -> str:
    return url(DEVICES, device.id)


def _mark(code: str, fine: str, *, denies: bool = False) -> Html:
    """The code of an objection, or that there is none."""
    if not code:
        return badge(fine, "good")
    return badge(code, "bad" if denies else "warn")


def _decide(call: Call, device: Device, do: str, version: str) -> Html:
    text, kind = ("Approve", "main") if do == "approve" else ("Take back", "")
    press = button(f"{text} {version}", kind, name="do", value=do)
    return form(_path(device), call.actor.csrf, hidden(version=version), press)
