"""What the JSON API can do with rollouts, what became of them, and why a device gets what it gets.

As `operations.py` does it. A rollout is of a project, which its path does not say: _rollout() looks
whether it is that of the token. Stages count from 1 here, as they do in sentences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ota_fleet import rollout_schemas as schemas
from ota_fleet.accounts import allow
from ota_fleet.api import (
    Call,
    device_of,
    in_stock,
    page_of,
    project_of,
    read_before,
    read_cursor,
    read_number,
    recording,
    sentences,
    within,
)
from ota_fleet.assignments import Assignments
from ota_fleet.attempts import Attempt
from ota_fleet.explain import Candidate, candidates, subject, verdicts
from ota_fleet.grants import Grants
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import PAGE, Operation, page
from ota_fleet.outlook import report_of
from ota_fleet.rollout import RUNNING, Counts, Results, Rollout, lacking, read_plan
from ota_fleet.rollouts import Member, Rollouts
from ota_fleet.rows import Search, normal_id
from ota_fleet.stock import Stock
from ota_server import Refused, Report, Version, shown

MAX_RELEASES = 25  # that are explained beside the one that was asked for
MAX_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class RolloutOperations:
    """The functions, and what they work on."""

    ledger: Ledger
    stock: Stock
    rollouts: Rollouts
    grants: Grants
    assignments: Assignments
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Operation, ...]:
        """All operations, in the order of the document."""
        return (*self._of_rollouts(), *self._of_outcomes())

    # -- Rollouts ----------------------------------------------------------------------------------

    def _of_rollouts(self) -> tuple[Operation, ...]:
        one = "/rollouts/{rollout}"
        return (
            Operation(
                "GET", "/rollouts", "viewer", "Rollouts, the newest first", self.list_rollouts,
                query=schemas.OF_PROJECT, answer=page(schemas.ROLLOUT), anywhere=True,
            ),
            Operation(
                "POST", "/projects/{project}/rollouts", "publisher", "Begins a rollout",
                self.begin, body=schemas.BEGUN, answer=schemas.ROLLOUT, status=201,
            ),
            Operation(
                "GET", one, "viewer", "A rollout as it stands, and what its open stage still needs",
                self.rollout, answer=schemas.ROLLOUT, anywhere=True,
            ),
            Operation(
                "POST", one + "/control", "publisher", "Pauses, resumes, aborts or finishes a "
                "rollout, or opens its next stage", self.control, body=schemas.CONTROL,
                answer=schemas.ROLLOUT, anywhere=True,
            ),
            Operation(
                "GET", one + "/devices", "viewer", "Devices that were given the release, by id",
                self.list_members, query=schemas.OF_STAGE, answer=page(schemas.MEMBER),
                anywhere=True,
            ),
        )  # fmt: skip

    def list_rollouts(self, call: Call) -> dict[str, Any]:
        """GET rollouts."""
        limit = call.query.get("limit", 100)
        project = within(call.actor, self.stock.resolve(call.query.get("project", "")))
        found = self.rollouts.listed(project, read_before(call), limit)
        pairs = self.rollouts.with_results(found)
        return page_of(pairs, limit, lambda pair: [pair[0].id], self._json)

    def begin(self, call: Call) -> dict[str, Any]:
        """POST projects/{project}/rollouts."""
        project = project_of(self.stock, call).name
        fields, at = dict(call.body), int(self.now())
        with sentences():
            version, plan = Version.parse(fields.pop("version")), read_plan(fields)
        version = in_stock(self.stock, project, version, 422)
        with recording(self.ledger, call, "begin rollout", at) as what:
            rollout = self.rollouts.create(project, version, plan, call.actor.name, at)
            stages = len(plan.stages)
            what.append(f"{rollout.id} of {project} {version}, stages: {stages}")
        return self._whole(self.rollouts.get(rollout.id))

    def rollout(self, call: Call) -> dict[str, Any]:
        """GET rollouts/{rollout}."""
        return self._whole(self._rollout(call))

    def control(self, call: Call) -> dict[str, Any]:
        """POST rollouts/{rollout}/control."""
        number = self._rollout(call)[0].id
        do, reason = call.body["do"], call.body.get("reason", "")
        at = int(self.now())
        with recording(self.ledger, call, f"{do} rollout", at) as what:
            name = self.rollouts.name_of(number)
            self.rollouts.control(number, do, reason, at)
            what.append(f"{name}: {reason}" if reason else name)
        return self._whole(self.rollouts.get(number))

    def list_members(self, call: Call) -> dict[str, Any]:
        """GET rollouts/{rollout}/devices."""
        rollout, limit = self._rollout(call)[0], call.query.get("limit", 100)
        (after,) = read_cursor(call.query.get("cursor", ""), str) or [""]
        found = self.rollouts.members(rollout.id, call.query.get("stage", 0) - 1, after, limit)
        return page_of(found, limit, lambda member: [member.device], _member)

    def _rollout(self, call: Call) -> tuple[Rollout, Results]:
        """That of the path. Refused: 404; 403, it is of a project that is not the token's."""
        found = self.rollouts.get(read_number(call.path["rollout"]))
        allow(call.actor, call.actor.role, found[0].project)
        return found

    def _json(self, found: tuple[Rollout, Results]) -> dict[str, Any]:
        return schemas.rollout_json(*found, int(self.now()))

    def _whole(self, found: tuple[Rollout, Results]) -> dict[str, Any]:
        """With what a list does not say, as it looks at every device."""
        answer = self._json(found)
        said = filter(None, (answer["missing"], self.too_few(*found)))
        return {**answer, "missing": "; ".join(said)}

    def too_few(self, rollout: Rollout, results: Results) -> str:
        """Why the open stage may wait for ever, in a sentence; "": devices enough may come."""
        lack = 0 if rollout.state != RUNNING or rollout.is_watched else lacking(rollout, results)
        if not lack:
            return ""
        wanted = {rollout.plan.group, rollout.plan.stages[rollout.stage].group} - {""}
        if empty := sorted(wanted - self.assignments.sizes().keys()):
            return f"no device is in the group {shown(empty[0])}"
        try:
            images = self.stock.of_version(rollout.project, Version.parse(rollout.version))
        except Refused:  # it was deleted, or cannot be known just now
            return ""
        channel = self.assignments.channel(images[0].release)
        found = self.rollouts.newcomers(rollout, results, channel, lack)
        known = self.ledger.registry.count(Search(rollout.project))
        return "" if found >= lack else too_few_words(rollout, results, found, known)

    # -- What became of them -----------------------------------------------------------------------

    def _of_outcomes(self) -> tuple[Operation, ...]:
        attempts = schemas.ATTEMPT
        return (
            Operation(
                "GET", "/rollouts/{rollout}/attempts", "viewer", "Attempts to run the release, the "
                "newest first", self.of_rollout, query=PAGE, answer=page(attempts), anywhere=True,
            ),
            Operation(
                "GET", "/devices/{device}/attempts", "viewer", "Attempts of a device, the newest "
                "first", self.of_device, query=PAGE, answer=page(attempts), anywhere=True,
            ),
            Operation(
                "POST", "/devices/{device}/forgive", "publisher", "Lets a device have again what "
                "it was given in vain", self.forgive, status=204,
            ),
            Operation(
                "GET", "/explain", "viewer", "Why a device gets a release or not, rule by rule",
                self.explain, query=schemas.ASKED, answer=schemas.EXPLANATION, anywhere=True,
                refusals=(404, 503),
            ),
        )  # fmt: skip

    def of_rollout(self, call: Call) -> dict[str, Any]:
        """GET rollouts/{rollout}/attempts."""
        return self._attempts(call, rollout=self._rollout(call)[0].id)

    def of_device(self, call: Call) -> dict[str, Any]:
        """GET devices/{device}/attempts."""
        return self._attempts(call, device=device_of(self.ledger, call).id)

    def _attempts(self, call: Call, device: str = "", rollout: int = 0) -> dict[str, Any]:
        limit = call.query.get("limit", 100)
        found = self.grants.attempts(device, rollout, read_before(call), limit)
        return {
            **page_of(found, limit, lambda each: [each.id], schemas.attempt_json),
            "items": _seen(call, found),
        }

    def forgive(self, call: Call) -> None:
        """POST devices/{device}/forgive."""
        device = device_of(self.ledger, call).id
        with recording(self.ledger, call, "forgive device", self.now()) as what:
            self.grants.forgive(device)
            what.append(device)

    # -- Why ---------------------------------------------------------------------------------------

    def explain(self, call: Call) -> dict[str, Any]:
        """GET explain."""
        report, known = self._report(call)
        with sentences():
            text = call.query.get("version", "")
            version = Version.parse(text) if text else None
        found = candidates(call.site, report)
        about = subject(found, call.site, report, version)
        release = about.release
        device = report.device or ""
        last = self.grants.attempts(device, limit=MAX_ATTEMPTS) if device else []
        answer = {
            "device": device,
            "known": known,
            "project": release.project,
            "running": str(report.version or ""),
            **_candidate(about),
            "looping": self.grants.is_looping(device, release.facts.sha256),
            "verdicts": [each._asdict() for each in verdicts(call.site, report, release)],
            "releases": [_candidate(each) for each in found[:MAX_RELEASES]],
            "attempts": _seen(call, last),
        }
        if current := self.rollouts.current(release.project, release.version.text):
            answer["rollout"] = self._whole(self.rollouts.get(current[0].id))
        return answer

    def _report(self, call: Call) -> tuple[Report, bool]:
        """What the device of the query would say, and whether it is known. Refused: 403, 422."""
        name, project = (call.query.get(each, "") for each in ("device", "project"))
        known = self.ledger.registry.device(name) if name else None
        if known:
            allow(call.actor, call.actor.role, known.project)
        report = report_of(known) if known else Report("", "", device=normal_id(name) or None)
        project = within(call.actor, self.stock.resolve(project or report.project))
        if not project:
            who = f"{shown(name)} never asked, or less than 2 s ago" if name else "no ?device"
            raise Refused(422, f"{who}: add ?project, and ?running")
        running = call.query.get("running", "")
        with sentences():
            if running:
                version = Version.parse(running)
                report = report._replace(version=version, sketch_md5=None, sketch_sha256=None)
        return report._replace(project=project), known is not None


def too_few_words(rollout: Rollout, results: Results, newcomers: int, known: int) -> str:
    """That of the devices known so few can be in the open stage, and what to do."""
    found = newcomers + results.get(rollout.stage, Counts()).devices
    amount = f"only {found}" if found else "none"
    of = f"{amount} of the {known} devices known" if known > 1 else f"{amount} of {known} known"
    is_last = rollout.stage + 1 == len(rollout.plan.stages)
    way = "finish it by hand" if is_last else "open the next one by hand"
    verb = "are" if found > 1 else "is"
    return f"{of} {verb} in this stage: {way}, or begin anew with a smaller number"


def _member(member: Member) -> dict[str, Any]:
    return {"device": member.device, "stage": member.stage + 1, "outcome": member.standing}


def _seen(call: Call, attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Those that who asks may see: a device may have been of another project."""
    own = (each for each in attempts if call.actor.project in {"", each.project})
    return [schemas.attempt_json(each) for each in own]


def _candidate(found: Candidate) -> dict[str, Any]:
    release = found.release
    about = {"version": str(release.version), "name": release.name}
    return {**about, "gets": found.gets, "code": found.code, "reason": found.reason}
