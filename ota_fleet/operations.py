"""What the JSON API can do: the table of its operations, and what each of them does.

    row of table() -> a function here: Call -> what becomes JSON, a Reply, or Refused

Who may is in the table and was asked before. Where a token is for one project and the path names
none, the function looks itself: within(). What changes something stands in the audit, in the same
transaction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ota_fleet import openapi
from ota_fleet.accounts import Accounts, allow
from ota_fleet.api import (
    Call,
    about,
    file_reply,
    json_of,
    listed,
    normal,
    page_of,
    read_cursor,
    read_number,
    sentences,
    within,
    without,
)
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import Operation, page, record
from ota_fleet.registry import MAX_PAGE, Device, Registry, Search, normal_id
from ota_fleet.rows import Entry, Project, Stocked, is_mac
from ota_fleet.stock import Stock
from ota_fleet.upload import Uploads
from ota_server import UNCACHED, Refused, Reply, Version, shown


@dataclass(frozen=True, slots=True)
class Operations:
    """The functions, and what they work on."""

    accounts: Accounts
    registry: Registry
    ledger: Ledger
    stock: Stock
    uploads: Uploads
    folder: str  # for files without a name
    others: tuple[Operation, ...] = ()  # of other rooms
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Operation, ...]:
        """All operations, in the order of the document."""
        return (
            *self._of_people(),
            *self._of_tokens(),
            *self._of_devices(),
            *self._of_projects(),
            *self._of_releases(),
            *self._of_audit(),
            *self.others,
        )

    @contextmanager
    def _recording(self, call: Call, action: str) -> Iterator[list[str]]:
        """A transaction, and what its entry in the audit says. ValueError in it: a 422."""
        with sentences(), self.ledger.recording(call.actor.name, action, int(self.now())) as found:
            yield found[1]

    # -- People and tokens -------------------------------------------------------------------------

    def _of_people(self) -> tuple[Operation, ...]:
        setup = record(secret=openapi.NAME, **openapi.CREDENTIALS["properties"])
        opened = record(**openapi.CREDENTIALS["properties"], role=openapi.ROLE)
        change = record(None, password=openapi.PASSWORD, role=openapi.ROLE)
        return (
            Operation(
                "POST", "/setup", "", "Makes the first administrator", self.set_up,
                body=setup, status=204, refusals=(403, 409),
            ),
            Operation(
                "POST", "/session", "", "Signs in; the session is a cookie", self.sign_in,
                body=openapi.CREDENTIALS, answer=openapi.SESSION, status=201,
                refusals=(401, 403, 429, 503),
            ),
            Operation(
                "GET", "/session", "viewer", "Who asks", self.session, answer=openapi.SESSION
            ),
            Operation("DELETE", "/session", "viewer", "Signs out", self.sign_out, status=204),
            Operation(
                "GET", "/accounts", "admin", "Who may sign in", self.list_accounts,
                query=openapi.PAGE, answer=page(openapi.ACCOUNT),
            ),
            Operation(
                "POST", "/accounts", "admin", "Makes an account", self.open_account,
                body=opened, answer=openapi.ACCOUNT, status=201, refusals=(503,),
            ),
            Operation(
                "PATCH", "/accounts/{account}", "admin", "Sets password or role; a new password "
                "ends the sessions", self.change_account, body=change, answer=openapi.ACCOUNT,
                refusals=(503,),
            ),
            Operation(
                "DELETE", "/accounts/{account}", "admin", "Takes an account away",
                self.close_account, status=204, refusals=(409,),
            ),
        )  # fmt: skip

    def _of_tokens(self) -> tuple[Operation, ...]:
        wish = {each: openapi.TOKEN["properties"][each] for each in ("name", "role")}
        more = {each: openapi.TOKEN["properties"][each] for each in ("project", "device")}
        minted = record(**openapi.TOKEN["properties"], token=openapi.text("shown this once only"))
        return (
            Operation(
                "GET", "/tokens", "admin", "Tokens, but not what they are", self.list_tokens,
                query=openapi.PAGE, answer=page(openapi.TOKEN),
            ),
            Operation(
                "POST", "/tokens", "admin", "Makes a token", self.mint,
                body=record(more, **wish, **more), answer=minted, status=201,
            ),
            Operation(
                "DELETE", "/tokens/{token}", "admin", "Takes a token back", self.revoke, status=204
            ),
        )  # fmt: skip

    def set_up(self, call: Call) -> None:
        """POST setup."""
        with sentences():
            self.accounts.set_up(**call.body)

    def sign_in(self, call: Call) -> Reply:
        """POST session."""
        actor, cookie = self.accounts.sign_in(call.request, **call.body)
        return json_of(201, about(actor), ("Set-Cookie", cookie))

    def session(self, call: Call) -> dict[str, Any]:
        """GET session."""
        return about(call.actor)

    def sign_out(self, call: Call) -> Reply:
        """DELETE session."""
        return Reply(204, (("Set-Cookie", self.accounts.sign_out(call.request)), UNCACHED))

    def list_accounts(self, call: Call) -> dict[str, Any]:
        """GET accounts."""
        found = map(without("password"), self.accounts.accounts())
        return listed(found, call, lambda each: each["id"])

    def open_account(self, call: Call) -> dict[str, Any]:
        """POST accounts."""
        with sentences():
            number = self.accounts.open_account(**call.body, who=call.actor.name)
        return self._account(number)

    def change_account(self, call: Call) -> dict[str, Any]:
        """PATCH accounts/{account}."""
        number = read_number(call.path["account"])
        with sentences():
            self.accounts.change_account(number, **call.body, who=call.actor.name)
        return self._account(number)

    def close_account(self, call: Call) -> None:
        """DELETE accounts/{account}."""
        self.accounts.close_account(read_number(call.path["account"]), who=call.actor.name)

    def _account(self, number: int) -> dict[str, Any]:
        """As it is now. Refused: 404, it just went."""
        for each in self.accounts.accounts():
            if each.id == number:
                return without("password")(each)
        raise Refused(404, f"there is no account {number}")

    def list_tokens(self, call: Call) -> dict[str, Any]:
        """GET tokens."""
        return listed(map(without("digest"), self.accounts.tokens()), call, lambda each: each["id"])

    def mint(self, call: Call) -> dict[str, Any]:
        """POST tokens."""
        wish = {"project": "", "device": "", **call.body}
        wish["project"] = self.stock.resolve(wish["project"])
        with sentences():
            number, token = self.accounts.mint(**wish, who=call.actor.name)
        known = next(each for each in self.ledger.tokens() if each.id == number)
        return {**without("digest")(known), "token": token}

    def revoke(self, call: Call) -> None:
        """DELETE tokens/{token}."""
        self.accounts.revoke(read_number(call.path["token"]), who=call.actor.name)

    # -- Devices -----------------------------------------------------------------------------------

    def _of_devices(self) -> tuple[Operation, ...]:
        return (
            Operation(
                "GET", "/devices", "viewer", "Devices, in any of several orders",
                self.list_devices, query=openapi.FILTERS, answer=page(openapi.DEVICE),
                anywhere=True,
            ),
            Operation(
                "GET", "/devices/{device}", "viewer", "What is known of a device", self.device,
                answer=openapi.DEVICE, anywhere=True,
            ),
            Operation(
                "PATCH", "/devices/{device}", "publisher", "Sets notes, labels, pin or channel",
                self.annotate, body=openapi.NOTES, answer=openapi.DEVICE,
            ),
            Operation(
                "DELETE", "/devices/{device}", "publisher", "Forgets a device, but not its "
                "admissions", self.forget, status=204,
            ),
        )  # fmt: skip

    def list_devices(self, call: Call) -> dict[str, Any]:
        """GET devices."""
        words = dict(call.query)
        limit, cursor = words.pop("limit", 100), words.pop("cursor", "")
        words["project"] = within(call.actor, words.get("project", ""))
        words["text"] = words.pop("q", "")
        words["version"] = normal(words.get("version", ""))
        search = Search(**words)
        by = search.sort.removeprefix("-")
        kinds = (str,) if by == "id" else (int if by == "last_seen" else str, str)
        found = self.registry.devices(search, read_cursor(cursor, *kinds), limit)
        return page_of(found, limit, search.place)

    def device(self, call: Call) -> dict[str, Any]:
        """GET devices/{device}."""
        return asdict(self._device(call))

    def annotate(self, call: Call) -> dict[str, Any]:
        """PATCH devices/{device}."""
        device = self._device(call).id
        with self._recording(call, "annotate device") as what:
            if call.body and self.registry.annotate(device, **call.body):
                what.append(f"{device} {json.dumps(call.body, ensure_ascii=False)}")
        return self.device(call)

    def forget(self, call: Call) -> None:
        """DELETE devices/{device}."""
        device = self._device(call).id
        with self._recording(call, "forget device") as what:
            if self.registry.forget(device):
                what.append(device)

    def _device(self, call: Call) -> Device:
        """The device of the path. Refused: 404; 403, it is of a project that is not the token's."""
        found = self.registry.device(call.path["device"])
        if found is None:
            raise Refused(404, f"the device {shown(call.path['device'])} is not known")
        allow(call.actor, call.actor.role, found.project)
        return found

    # -- Projects ----------------------------------------------------------------------------------

    def _of_projects(self) -> tuple[Operation, ...]:
        one, admitted = "/projects/{project}", "/projects/{project}/admissions"
        change = record(None, **openapi.SETTINGS)
        return (
            Operation(
                "GET", "/projects", "viewer", "All projects", self.list_projects,
                query=openapi.PAGE, answer=page(openapi.PROJECT), anywhere=True, refusals=(503,),
            ),
            Operation(
                "GET", one, "viewer", "A project, by its name or alias", self.project,
                answer=openapi.PROJECT,
            ),
            Operation(
                "PUT", one, "publisher", "Makes a project, or changes it; what is not given stays",
                self.put_project, body=change, answer=openapi.PROJECT,
            ),
            Operation(
                "DELETE", one, "admin", "Takes away a project without releases",
                self.drop_project, status=204, refusals=(409,),
            ),
            Operation(
                "GET", admitted, "viewer", "Ids of devices that --admit whitelist lets in",
                self.list_admissions, query=openapi.PAGE, answer=page(openapi.NAME),
            ),
            Operation(
                "PUT", admitted + "/{device}", "publisher", "Admits a device, seen or not",
                self.admit, status=204,
            ),
            Operation(
                "DELETE", admitted + "/{device}", "publisher", "Takes an admission back",
                self.expel, status=204,
            ),
        )  # fmt: skip

    def list_projects(self, call: Call) -> dict[str, Any]:
        """GET projects."""
        names = [call.actor.project] if call.actor.project else self.stock.projects()
        found = listed(({"name": each} for each in names), call, lambda each: each["name"])
        newest = self.stock.newest()
        known = filter(None, (self.stock.project(each["name"]) for each in found["items"]))
        return {**found, "items": [_described(each, newest) for each in known]}

    def project(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}."""
        return _described(self._project(call), self.stock.newest())

    def put_project(self, call: Call) -> dict[str, Any]:
        """PUT projects/{project}."""
        name = call.path["project"]
        before = self.stock.project(name) or Project(name)
        given: dict[str, Any] = {
            each: tuple(value) if isinstance(value, list) else value
            for each, value in call.body.items()
        }
        after = replace(before, name=name, created=before.created or int(self.now()), **given)
        with self._recording(call, "put project") as what:
            self.stock.put_project(after)
            what.append(f"{name} for {', '.join(after.chips) or 'any'}")
            what.extend(f"also {alias}" for alias in after.aliases)
            if after.partition_size:
                what.append(f"{after.partition_size} bytes each")
            if after.admit:
                what.append(f"admission {after.admit}")
        return self.project(call)

    def drop_project(self, call: Call) -> None:
        """DELETE projects/{project}."""
        name = self._project(call).name
        with self._recording(call, "drop project") as what:
            if not self.stock.drop_project(name):
                raise Refused(409, f"{shown(name)} is files in the firmware folder: remove them")
            what.append(name)

    def list_admissions(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}/admissions."""
        limit = call.query.get("limit", 100)
        (after,) = read_cursor(call.query.get("cursor", ""), str) or [""]
        found = self.registry.admissions(self._project(call).name, after, limit)
        return page_of(found, limit, lambda device: [device], str)

    def admit(self, call: Call) -> None:
        """PUT projects/{project}/admissions/{device}."""
        project, device = self._project(call).name, normal_id(call.path["device"])
        if not is_mac(device):
            raise Refused(422, f"{shown(device)} is no MAC address")
        with self._recording(call, "admit device") as what:
            if self.registry.admit(project, device):
                what.append(f"{device} to {project}")

    def expel(self, call: Call) -> None:
        """DELETE projects/{project}/admissions/{device}."""
        project, device = self._project(call).name, normal_id(call.path["device"])
        with self._recording(call, "expel device") as what:
            if not self.registry.expel(project, device):
                raise Refused(404, f"{shown(device)} is not admitted to {shown(project)}")
            what.append(f"{device} from {project}")

    def _project(self, call: Call) -> Project:
        """The project of the path, by name or alias. Refused: 404."""
        found = self.stock.project(call.path["project"])
        if found is None:
            raise Refused(404, f"there is no project {shown(call.path['project'])}")
        return found

    # -- Releases ----------------------------------------------------------------------------------

    def _of_releases(self) -> tuple[Operation, ...]:
        several = "/projects/{project}/releases"
        one, sent = several + "/{version}", openapi.RELEASE
        return (
            Operation(
                "POST", "/releases", "publisher", "Takes an image, which says of which project and "
                "version it is", self.upload, query=openapi.REPLACE, upload=True, answer=sent,
                status=201, anywhere=True, refusals=(404,),
            ),
            Operation(
                "GET", several, "viewer", "Images of a project, the newest first",
                self.list_releases, query=openapi.PAGE, answer=page(openapi.RELEASE),
            ),
            Operation(
                "POST", several, "publisher", "Takes an image, which says of which version it is",
                self.upload, query=openapi.REPLACE, upload=True, answer=sent, status=201,
            ),
            Operation(
                "GET", one, "viewer", "The images of a version", self.release,
                answer=openapi.IMAGES,
            ),
            Operation(
                "PUT", one, "publisher", "Takes an image; the same bytes again are no error",
                self.upload, query=openapi.REPLACE, upload=True, answer=sent, status=201,
            ),
            Operation(
                "PATCH", one, "publisher", "Sets notes; withdraws a version, or restores it",
                self.change_release, body=openapi.CHANGE, answer=openapi.IMAGES,
            ),
            Operation(
                "DELETE", one, "admin", "Deletes a version that was uploaded",
                self.delete_release, status=204, refusals=(409,),
            ),
        )  # fmt: skip

    def upload(self, call: Call) -> Reply:
        """POST releases, POST projects/{project}/releases, PUT of one."""
        given = (call.path.get(each, "") for each in ("project", "version"))
        return self.uploads.put(call.site, call.request, call.actor, *given)

    def list_releases(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}/releases."""
        limit = call.query.get("limit", 100)
        (after,) = read_cursor(call.query.get("cursor", ""), str) or [""]
        found = self.stock.entries(call.path["project"], after, limit)
        return page_of(found, limit, lambda each: [each.cursor], Stocked.as_json)

    def release(self, call: Call) -> dict[str, Any]:
        """GET projects/{project}/releases/{version}."""
        project, version = self._version(call)
        found = sorted(self.stock.of_version(project, version), key=lambda each: each.cursor)
        images = [each.as_json() for each in found]
        return {"project": project, "version": str(version), "images": images}

    def change_release(self, call: Call) -> dict[str, Any]:
        """PATCH projects/{project}/releases/{version}."""
        project, version = self._version(call)
        who, at, reason = call.actor.name, int(self.now()), call.body.get("reason", "")
        with self._recording(call, "change release") as what:
            if "notes" in call.body:
                self.stock.note(project, version, call.body["notes"])
                what.append(f"notes of {project} {version}")
            if call.body.get("withdrawn"):
                self.stock.withdraw(project, version, reason, who=who, at=at)
                what.append(f"withdrawn {project} {version}: {reason}")
            elif "withdrawn" in call.body:
                self.stock.restore(project, version)
                what.append(f"restored {project} {version}")
        return self.release(call)

    def delete_release(self, call: Call) -> None:
        """DELETE projects/{project}/releases/{version}."""
        project, version = self._version(call)
        what = call.actor.name, "delete release", f"{project} {version}", int(self.now())
        if not self.stock.delete(project, version, lambda: self.ledger.audit(*what)):
            raise Refused(404, f"there is no {version} of {shown(project)}")

    def _version(self, call: Call) -> tuple[str, Version]:
        """Project and version of the path. Refused: 404."""
        try:
            return self._project(call).name, Version.parse(call.path["version"])
        except ValueError as err:
            raise Refused(404, str(err)) from err

    # -- Audit -------------------------------------------------------------------------------------

    def _of_audit(self) -> tuple[Operation, ...]:
        after = openapi.number("only entries behind this one", minimum=0, maximum=(1 << 63) - 1)
        return (
            Operation(
                "GET", "/audit", "admin", "Who did what, the oldest first", self.audit,
                query=openapi.PAGE, answer=page(openapi.ENTRY),
            ),
            Operation(
                "GET", "/audit.jsonl", "admin", "The same in one file, an entry a line",
                self.export, query={"after": after}, kind=openapi.LINES,
            ),
            Operation(
                "GET", "/audit/verified", "admin", "Whether no entry was changed or taken out; "
                "reads all of them", self.verify, answer=openapi.VERIFIED,
            ),
            Operation(
                "GET", "/openapi.json", "", "This document", self.document,
                answer={"type": "object"},
            ),
        )  # fmt: skip

    def audit(self, call: Call) -> dict[str, Any]:
        """GET audit."""
        limit = call.query.get("limit", 100)
        (after,) = read_cursor(call.query.get("cursor", ""), int) or [0]
        return page_of(self.ledger.audit_log(after, limit), limit, lambda each: [each.number])

    def export(self, call: Call) -> Reply:
        """GET audit.jsonl, through a file: it may be of any length."""
        after = call.query.get("after", 0)
        lines = (f"{json.dumps(asdict(each))}\n".encode() for each in self._entries(after))
        return file_reply(lines, self.folder, "audit.jsonl", call.request.peer)

    def verify(self, _call: Call) -> dict[str, Any]:
        """GET audit/verified."""
        return {"sound": self.ledger.verify_audit()}

    def _entries(self, after: int) -> Iterator[Entry]:
        """All entries behind a number."""
        while entries := self.ledger.audit_log(after, MAX_PAGE):
            yield from entries
            after = entries[-1].number

    def document(self, call: Call) -> dict[str, Any]:
        """GET openapi.json."""
        return openapi.document(self.table(), secure=call.request.secure)


def _described(project: Project, newest: Mapping[str, Version]) -> dict[str, Any]:
    return {**without("made")(project), "newest": str(newest.get(project.name, ""))}
