"""What the JSON API can do about who gets what: policies, groups, approvals, channels.

As `operations.py` does it. A group is of no project, and any device may say that it is of one: so
whose token is for one project changes its own policy and approvals, but no group and no device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ota_fleet import rollout_schemas as schemas
from ota_fleet.api import (
    Call,
    device_of,
    in_stock,
    listed,
    project_of,
    recording,
    sentences,
    version_of,
)
from ota_fleet.assignments import Approval, Assignments
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import PAGE, Operation, page, record
from ota_fleet.rollout import plan_text, read_plan
from ota_fleet.rows import Device
from ota_fleet.stock import Stock
from ota_server import Refused, Version, shown


@dataclass(frozen=True, slots=True)
class AssignmentOperations:
    """The functions, and what they work on."""

    ledger: Ledger
    stock: Stock
    assignments: Assignments
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Operation, ...]:
        """All operations, in the order of the document."""
        return (*self._of_policies(), *self._of_groups(), *self._of_approvals())

    # -- Policies ----------------------------------------------------------------------------------

    def _of_policies(self) -> tuple[Operation, ...]:
        device, project = "/devices/{device}/policy", "/projects/{project}/policy"
        shelf = "/projects/{project}/releases/{version}/channel"
        return (
            Operation(
                "GET", device, "viewer", "What is said of a device alone, and what holds for it",
                self.device_policy, answer=schemas.DEVICE_POLICY, anywhere=True,
            ),
            Operation(
                "PUT", device, "publisher", "Says something of a device; what is not given stays",
                self.put_device_policy, body=record(None, **schemas.OF_DEVICE),
                answer=schemas.DEVICE_POLICY,
            ),
            Operation(
                "GET", project, "viewer", "What is said of a project", self.project_policy,
                answer=schemas.PROJECT_POLICY,
            ),
            Operation(
                "PUT", project, "publisher", "Says something of a project; what is not given stays",
                self.put_project_policy, body=record(None, **schemas.OF_ALL),
                answer=schemas.PROJECT_POLICY,
            ),
            Operation(
                "GET", shelf, "viewer", "The channel that a version is on", self.channel,
                answer=schemas.SHELF,
            ),
            Operation(
                "PUT", shelf, "publisher", "Puts a version on a channel", self.put_channel,
                body=schemas.SHELF, answer=schemas.SHELF,
            ),
        )  # fmt: skip

    def device_policy(self, call: Call) -> dict[str, Any]:
        """GET devices/{device}/policy."""
        device = device_of(self.ledger, call)
        own = self.assignments.own("device", device.id)
        all_of_it = self.assignments.policy(device.id, self.stock.resolve(device.project))
        holds = schemas.policy_json(all_of_it, schemas.HOLDS["properties"])
        return {**schemas.policy_json(own, schemas.OF_DEVICE), "holds": holds}

    def put_device_policy(self, call: Call) -> dict[str, Any]:
        """PUT devices/{device}/policy."""
        self._put(call, "device", device_of(self.ledger, call).id, call.body)
        return self.device_policy(call)

    def project_policy(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}/policy."""
        own = self.assignments.own("project", project_of(self.stock, call).name)
        return schemas.policy_json(own, schemas.PROJECT_POLICY["properties"])

    def put_project_policy(self, call: Call) -> dict[str, Any]:
        """PUT projects/{project}/policy."""
        said = dict(call.body)
        with sentences():
            if plan := said.get("plan"):
                said["plan"] = plan_text(read_plan(plan))
            elif "plan" in said:
                said["plan"] = ""
        if "floors" in said:
            said["floors"] = tuple(said["floors"])
        self._put(call, "project", project_of(self.stock, call).name, said)
        return self.project_policy(call)

    def _put(self, call: Call, scope: str, name: str, said: Mapping[str, Any]) -> None:
        at = int(self.now())
        with recording(self.ledger, call, f"put {scope} policy", at) as what:
            if self.assignments.change(scope, name, said, at):
                what.append(f"{name} {json.dumps(call.body, ensure_ascii=False)}")

    def channel(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}/releases/{version}/channel."""
        return {"channel": self.assignments.shelf(*self._shelved(call))}

    def put_channel(self, call: Call) -> dict[str, Any]:
        """PUT projects/{project}/releases/{version}/channel."""
        project, version = self._shelved(call)
        before, wanted = self.channel(call)["channel"], call.body["channel"]
        with recording(self.ledger, call, "put channel", self.now()) as what:
            if self.assignments.shelve(project, version, wanted):
                what.append(f"{project} {version} from {before} to {wanted or 'its own'}")
        return self.channel(call)

    def _shelved(self, call: Call) -> tuple[str, Version]:
        """Project and version of the path, of which there is an image. Refused: 404."""
        project, version = version_of(self.stock, call)
        return project, in_stock(self.stock, project, version)

    # -- Groups ------------------------------------------------------------------------------------

    def _of_groups(self) -> tuple[Operation, ...]:
        one, answer = "/groups/{group}", schemas.GROUP_POLICY
        return (
            Operation(
                "GET", "/groups", "viewer", "Groups, and what is said of them", self.list_groups,
                query=PAGE, answer=page(answer),
            ),
            Operation("GET", one, "viewer", "What is said of a group", self.group, answer=answer),
            Operation(
                "PUT", one, "publisher", "Says something of a group; what is not given stays",
                self.put_group, body=record(None, **schemas.OF_GROUP), answer=answer,
            ),
            Operation(
                "DELETE", one, "publisher", "Takes a group away; its devices are in none then",
                self.drop_group, status=204,
            ),
        )  # fmt: skip

    def list_groups(self, call: Call) -> dict[str, Any]:
        """GET groups."""
        found = map(self._group, self.assignments.groups())
        return listed(found, call, lambda each: str(each["name"]))

    def group(self, call: Call) -> dict[str, Any]:
        """GET groups/{group}."""
        return self._group(self._known(call))

    def put_group(self, call: Call) -> dict[str, Any]:
        """PUT groups/{group}."""
        self._put(call, "group", call.path["group"], call.body)
        return self._group(call.path["group"])

    def drop_group(self, call: Call) -> None:
        """DELETE groups/{group}."""
        name = self._known(call)
        with recording(self.ledger, call, "drop group", self.now()) as what:
            self.assignments.drop_group(name)
            what.append(name)

    def _group(self, name: str) -> dict[str, Any]:
        own = self.assignments.own("group", name)
        return {"name": name, **schemas.policy_json(own, schemas.OF_GROUP)}

    def _known(self, call: Call) -> str:
        """The group of the path. Refused: 404."""
        name = call.path["group"]
        if name not in self.assignments.groups():
            raise Refused(404, f"there is no group {shown(name)}")
        return name

    # -- Approvals ---------------------------------------------------------------------------------

    def _of_approvals(self) -> tuple[Operation, ...]:
        several = "/devices/{device}/approvals"
        one = several + "/{version}"
        return (
            Operation(
                "GET", several, "viewer", "Versions that somebody approved for a device",
                self.list_approvals, query=PAGE, answer=page(schemas.APPROVAL), anywhere=True,
            ),
            Operation(
                "PUT", one, "publisher", "Approves a version of its project for a device",
                self.approve, status=204, anywhere=True, refusals=(409,),
            ),
            Operation(
                "DELETE", one, "publisher", "Takes an approval back", self.disapprove, status=204,
                anywhere=True, refusals=(409,),
            ),
        )  # fmt: skip

    def list_approvals(self, call: Call) -> dict[str, Any]:
        """GET devices/{device}/approvals."""
        device = device_of(self.ledger, call)
        found = (
            each._asdict()
            for each in self.assignments.approvals(device.id)
            if call.actor.project in {"", each.project}
        )
        return listed(found, call, lambda each: f"{each['project']}/{each['version']}")

    def approve(self, call: Call) -> None:
        """PUT devices/{device}/approvals/{version}."""
        device, project, version = self._wanted(call)
        version = in_stock(self.stock, project, version)
        at, who = int(self.now()), call.actor.name
        with recording(self.ledger, call, "approve", at) as what:
            if self.assignments.approve(Approval(device.id, project, str(version), at, who)):
                what.append(f"{project} {version} for {device.id}")

    def disapprove(self, call: Call) -> None:
        """DELETE devices/{device}/approvals/{version}."""
        device, project, version = self._wanted(call)
        with recording(self.ledger, call, "take back approval", self.now()) as what:
            if not self.assignments.disapprove(device.id, project, str(version)):
                raise Refused(404, f"nobody approved {version} for {device.id}")
            what.append(f"{project} {version} for {device.id}")

    def _wanted(self, call: Call) -> tuple[Device, str, Version]:
        """Device, project and version of an approval. Refused: 403, 404, 409."""
        device = device_of(self.ledger, call)
        if not device.project:
            raise Refused(409, f"{device.id} has not said yet of which project it is")
        try:
            version = Version.parse(call.path["version"])
        except ValueError as err:
            raise Refused(404, str(err)) from err
        return device, self.stock.resolve(device.project), version
