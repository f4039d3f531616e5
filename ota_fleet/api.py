"""The JSON API below /api/v1: which operation a request means, who may, and how it is answered.

    loop    -- guard(): path, role, size and kind of the body --> refused before a body is sent
    threads -- answer(): the same again, query and body as the table says --> Operation.run(Call)

What the operations do is in `operations.py`, what follows from the table alone in `openapi.py`.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from io import FileIO
from typing import Any, NamedTuple

from ota_fleet.accounts import Accounts, Actor, allow
from ota_fleet.files import room
from ota_fleet.forms import is_form
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import (
    BASE,
    JSON,
    LINES,
    MAX_JSON,
    PROBLEM,
    Operation,
    document,
    read_body,
    read_query,
)
from ota_fleet.rows import MAX_INTEGER, Device, Project, parsed
from ota_fleet.stock import Stock
from ota_fleet.upload import FORM
from ota_server import (
    RETRY_SECONDS,
    UNCACHED,
    Image,
    Refused,
    Reply,
    Request,
    Route,
    Site,
    Version,
    attachment,
    body_reply,
    identity_of,
    shown,
    unnamed_file,
)

NOBODY = Actor("", "")
BELOW = re.compile("(?s)/api(?:/.*)?")


class Call(NamedTuple):
    """What an operation is asked, checked."""

    site: Site
    request: Request
    actor: Actor  # NOBODY where everybody may
    path: Mapping[str, str]  # parameters
    query: Mapping[str, Any]  # those that were given
    body: Mapping[str, Any]


class Api:
    """Routes, guard and endpoint of a table of operations."""

    def __init__(
        self,
        table: Sequence[Operation],
        accounts: Accounts,
        resolve: Callable[[str], str],
        most: int,
    ) -> None:
        """`resolve` gives a project's own name for its alias; `most` is bytes of an upload."""
        self._accounts = accounts
        self._resolve = resolve
        self._most = most
        about = Operation(
            "GET", "/openapi.json", "", "This document", self.document, answer={"type": "object"}
        )
        self._table = *table, about
        self._paths: dict[re.Pattern[str], dict[str, Operation]] = {}
        # The id of a device may have slashes: what stands behind one is looked for before.
        for each in sorted(self._table, key=lambda each: each.path.endswith("{device}")):
            methods = self._paths.setdefault(pattern_of(each.path), {})
            methods[each.method] = each
            if each.method == "GET":
                methods["HEAD"] = each

    def routes(self) -> tuple[Route, ...]:
        """One for each path; the last is for all that is not there."""
        return (
            *(self._route(pattern, methods) for pattern, methods in self._paths.items()),
            Route(BELOW, self.answer, ()),
        )

    def _route(self, pattern: re.Pattern[str], methods: Mapping[str, Operation]) -> Route:
        bodies = [MAX_JSON * (each.body is not None) for each in methods.values()]
        if any(each.upload for each in methods.values()):
            bodies.append(self._most)
        return Route(pattern, self.answer, tuple(methods), blocking=True, body=max(bodies))

    def guard(self, request: Request) -> None:
        """Never waits, so that the loop can ask before it receives a body.

        Raises:
            Refused: 401, 403, 404; 413 or 415, the body is none that will be read.
        """
        if BELOW.fullmatch(request.path) is None:
            return
        operation, names = self._find(request)
        if operation is None:
            return  # answer() says which methods there are
        self._actor(operation, names, request)
        kind = request.headers.get("content-type", "")
        most = self._most - FORM
        if operation.upload and request.body_size > most and not is_form(kind):
            raise Refused(413, f"the image has {request.body_size} bytes, at most {most} are taken")
        if operation.body is None:
            return
        if request.body_size > MAX_JSON:
            raise Refused(413, f"the body has {request.body_size} bytes, not at most {MAX_JSON}")
        if kind.partition(";")[0].strip().lower() != JSON:
            raise Refused(415, f"send JSON, with Content-Type: {JSON}")

    def answer(self, site: Site, request: Request) -> Reply:
        """The endpoint of all paths."""
        operation, names = self._find(request)
        assert operation is not None  # as the routes have its methods only
        actor = self._actor(operation, names, request)
        query = read_query(operation, request.query)
        body = read_body(operation, request.body) if operation.body is not None else {}
        with room():
            result = operation.run(Call(site, request, actor, names, query, body))
        if isinstance(result, Reply):
            return result
        if operation.status == HTTPStatus.NO_CONTENT:
            return Reply(204, (UNCACHED,))
        return json_of(operation.status, result)

    def document(self, call: Call) -> dict[str, Any]:
        """GET openapi.json."""
        return document(self._table, secure=call.request.secure)

    def _find(self, request: Request) -> tuple[Operation | None, Mapping[str, str]]:
        """The operation, None if the path has no such method, and its parameters. Refused: 404."""
        for pattern, methods in self._paths.items():
            if match := pattern.fullmatch(request.path):
                names = match.groupdict()
                if not all(map(is_text, names.values())):
                    raise Refused(404, "nothing is here: the path is no UTF-8")
                return methods.get(request.method), names
        raise Refused(404, f"nothing is here; what there is stands in {BASE}/openapi.json")

    def _actor(self, operation: Operation, names: Mapping[str, str], request: Request) -> Actor:
        """Who asks. Refused: 401, 403."""
        if not operation.role:
            return NOBODY
        project = self._resolve(names.get("project", ""))
        if operation.anywhere and (known := self._accounts.actor(request)):
            project = known.project
        return self._accounts.require(request, operation.role, project)


def pattern_of(path: str, base: str = BASE) -> re.Pattern[str]:
    """Of a path below `base`. The id of a device may be any text, others have no slash."""
    pieces = re.split(r"{(\w+)}", base + path)
    for at in range(1, len(pieces), 2):
        pieces[at] = f"(?P<{pieces[at]}>{'(?s:.+)' if pieces[at] == 'device' else '[^/]+'})"
    pieces[::2] = map(re.escape, pieces[::2])
    return re.compile("".join(pieces))


def is_text(words: str) -> bool:
    """Whether it is UTF-8 all through."""
    return re.search("[\ud800-\udfff]", words) is None


def json_of(status: int, data: object, *headers: tuple[str, str]) -> Reply:
    """A body of JSON that nobody keeps."""
    return body_reply(status, JSON, json.dumps(data).encode(), UNCACHED, *headers)


def file_reply(
    lines: Iterable[bytes], folder: str, name: str, peer: str, kind: str = LINES
) -> Reply:
    """Lines of any number, by way of a file in `folder` that has no name there."""
    with unnamed_file(folder) as file:
        file.writelines(lines)
        file.flush()
        copy = FileIO(name, opener=lambda *_: os.dup(file.fileno()))
    identity = identity_of(os.fstat(copy.fileno()))
    size = identity[2]
    entity = ("Content-Type", kind), ("Content-Length", str(size))
    headers = (*entity, ("Content-Disposition", attachment(name)), UNCACHED)
    return Reply(200, headers, Image(copy, size, "", "", identity), range(size), f"- {peer}")


def problem(refused: Refused, _path: str = "") -> Reply:
    """What a refused client of the API reads: RFC 9457."""
    status = HTTPStatus(refused.status)
    data = {"type": "about:blank", "title": status.phrase, "status": status.value}
    body = json.dumps({**data, "detail": refused.reason}).encode()
    headers = [UNCACHED, *refused.headers]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(("Retry-After", str(RETRY_SECONDS)))
    return body_reply(status.value, PROBLEM, body, *headers)


def refusal_by_path(others: Callable[[Refused, str], Reply], refused: Refused, path: str) -> Reply:
    """problem() for this API, and for other paths what they have."""
    return (problem if BELOW.fullmatch(path) else others)(refused, path)


# -- Words -----------------------------------------------------------------------------------------


@contextmanager
def sentences() -> Iterator[None]:
    """Makes a ValueError, whose message is a sentence, a 422."""
    try:
        yield
    except ValueError as err:
        raise Refused(422, str(err)) from err


@contextmanager
def recording(ledger: Ledger, call: Call, action: str, at: float) -> Iterator[list[str]]:
    """A transaction, and what its entry in the audit says. ValueError in it: a 422."""
    with sentences(), ledger.recording(call.actor.name, action, int(at)) as found:
        yield found[1]


def within(actor: Actor, project: str) -> str:
    """The project that is meant, "" for all: that of a token, if it has one. Refused: 403."""
    project = project or actor.project
    allow(actor, actor.role, project)
    return project


def about(actor: Actor) -> dict[str, Any]:
    """What somebody is told of himself."""
    return {each: getattr(actor, each) for each in ("name", "role", "project", "csrf")}


def without(secret: str) -> Callable[[Any], dict[str, Any]]:
    """What makes a dictionary of a row, but for one field."""
    return lambda row: {name: value for name, value in asdict(row).items() if name != secret}


def normal(version: str) -> str:
    """A version as it is stored; what is none, as it is."""
    return str(parsed(version) or version)


# -- What paths name -------------------------------------------------------------------------------


def device_of(ledger: Ledger, call: Call) -> Device:
    """The device of the path. Refused: 404; 403, it is of a project that is not the token's."""
    found = ledger.registry.device(call.path["device"])
    if found is None:
        raise Refused(404, f"the device {shown(call.path['device'])} is not known")
    allow(call.actor, call.actor.role, found.project)
    return found


def project_of(stock: Stock, call: Call) -> Project:
    """The project of the path, by name or alias. Refused: 404."""
    found = stock.project(call.path["project"])
    if found is None:
        raise Refused(404, f"there is no project {shown(call.path['project'])}")
    return found


def version_of(stock: Stock, call: Call) -> tuple[str, Version]:
    """Project and version of the path. Refused: 404."""
    try:
        return project_of(stock, call).name, Version.parse(call.path["version"])
    except ValueError as err:
        raise Refused(404, str(err)) from err


def in_stock(stock: Stock, project: str, version: Version, status: int = 404) -> Version:
    """The version as an image of the project has it: +build counts for nobody, but stands there.

    Raises:
        Refused: with this status, there is no such image.
    """
    found = {str(each.release.version) for each in stock.images(project)
             if each.release.version == version}  # fmt: skip
    if not found:
        raise Refused(status, f"there is no {version} of {shown(project)}")
    return version if str(version) in found else Version.parse(min(found))


# -- Pages of lists --------------------------------------------------------------------------------


def page_of(
    found: Sequence[Any],
    limit: int,
    place: Callable[[Any], Iterable[str | int]],
    form: Callable[[Any], object] = asdict,
) -> dict[str, Any]:
    """One page in its `form`, and the cursor behind it; a page that is not full is the last."""
    more = len(found) >= limit
    items = [form(each) for each in found]
    return {"items": items, "next": write_cursor(place(found[-1])) if more else None}


def read_number(text: str) -> int:
    """A number in a path. Refused: 404, it is none."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Refused(404, f"{shown(text)} is no number, so nothing is here")
    return int(text)


def write_cursor(place: Iterable[str | int]) -> str:
    """A place in a list, for nobody to read but read_cursor()."""
    return base64.urlsafe_b64encode(json.dumps([*place]).encode()).decode().rstrip("=")


def read_cursor(text: str, *kinds: type) -> list[Any]:
    """A place of such values, none if there is no cursor. Refused: 422, it is not of this list."""
    if not text:
        return []
    try:
        place = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(place, list) and [*map(type, place)] == [*kinds]:
            return place
    except (ValueError, RecursionError):
        pass
    raise Refused(422, f"?cursor {shown(text)} is not of this list: begin without one")


def read_before(call: Call) -> int:
    """The id below which a page of the newest first begins. Refused: 422."""
    place: list[int] = read_cursor(call.query.get("cursor", ""), int) or [MAX_INTEGER]
    return max(0, min(*place, MAX_INTEGER))


def listed(
    found: Iterable[Mapping[str, Any]], call: Call, place: Callable[[Any], str | int]
) -> dict[str, Any]:
    """A page of what is all in memory, by its place."""
    ordered = sorted(found, key=place)
    kinds = {type(place(each)) for each in ordered[:1]} or {str}
    after = read_cursor(call.query.get("cursor", ""), *kinds)
    ordered = [each for each in ordered if not after or place(each) > after[0]]
    limit = call.query.get("limit", 100)
    return page_of(ordered[:limit], limit, lambda each: [place(each)], dict)
