"""What an operation of the JSON API is, and what follows from that alone: checks and a document.

    Operation --> document(): OpenAPI 3.1, for people and their tools
              `-> read_query(), read_body(): what a request says, if it is as the document says

A schema is the part of JSON Schema 2020-12 that stands in SHAPES; one schema does both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, NoReturn
from urllib.parse import unquote_plus

from ota_fleet.accounts import ROLES, cookie_name
from ota_fleet.registry import MAX_LABELS, MAX_PAGE
from ota_fleet.rows import ADMIT, MAX_LONG, MAX_PARTITION, MAX_TEXT
from ota_server import Refused, __version__, shown

BASE = "/api/v1"
MAX_JSON = 64 << 10  # bytes of a body that is no upload
JSON = "application/json"
LINES = "application/jsonl"
PROBLEM = "application/problem+json"
Schema = Mapping[str, Any]

# -- 1. Schemas ------------------------------------------------------------------------------------

SHAPES: Mapping[str, tuple[type, str]] = {
    "string": (str, "a text"),
    "integer": (int, "a whole number"),
    "boolean": (bool, "true or false"),
    "array": (list, "a list"),
    "object": (dict, "an object"),
}


def text(about: str = "", **limits: Any) -> Schema:
    """A string; `limits` as in JSON Schema."""
    return _described("string", about, limits)


def number(about: str = "", **limits: Any) -> Schema:
    """An integer."""
    return _described("integer", about, limits)


def flag(about: str = "") -> Schema:
    """A boolean."""
    return _described("boolean", about, {})


def several(items: Schema, about: str = "", **limits: Any) -> Schema:
    """A list of such items."""
    return _described("array", about, {"items": items, **limits})


def record(optional: Iterable[str] | None = (), **fields: Schema) -> Schema:
    """An object with these fields and no others; `optional` may be missing, None: all may."""
    needed = [] if optional is None else [name for name in fields if name not in optional]
    properties = {"type": "object", "properties": fields, "additionalProperties": False}
    return {**properties, "required": needed} if needed else properties


def _described(kind: str, about: str, limits: Mapping[str, Any]) -> Schema:
    return {"type": kind, **({"description": about} if about else {}), **limits}


def check(schema: Schema, value: object, name: str) -> None:
    """Refused: 422, the value is not as the schema says; the sentence names the field."""
    shape, called = SHAPES[schema["type"]]
    if not isinstance(value, shape) or (isinstance(value, bool) and shape is int):
        _wrong(name, f"is to be {called}")
    if "enum" in schema and value not in schema["enum"]:
        words = ", ".join(each or '""' for each in schema["enum"])
        _wrong(name, f"is to be one of {words}")
    if isinstance(value, str):
        _check_text(schema, value, name)
    elif isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            _wrong(name, f"has more than {schema['maxItems']} items")
        for position, item in enumerate(value):
            check(schema["items"], item, f"{name}[{position}]")
    elif isinstance(value, dict):
        _check_object(schema, value, name)
    elif isinstance(value, int):
        least, most = schema.get("minimum", value), schema.get("maximum", value)
        if not least <= value <= most:
            _wrong(name, f"is to be from {least} to {most}")


def _check_text(schema: Schema, value: str, name: str) -> None:
    least, most = schema.get("minLength", 0), schema.get("maxLength", len(value))
    if not least <= len(value) <= most:
        _wrong(name, f"is to have from {least} to {most} characters")
    if re.search("[\0\ud800-\udfff]", value):  # neither SQLite nor UTF-8 can hold them all
        _wrong(name, "has a character that cannot be kept")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        _wrong(name, f"is to be {schema['description']}")


def _check_object(schema: Schema, value: Mapping[str, Any], name: str) -> None:
    fields = schema["properties"]
    for key, item in value.items():
        if key not in fields:
            _wrong(shown(key), f"is not known here; known: {', '.join(fields)}")
        check(fields[key], item, key if name == "the body" else f"{name}.{key}")
    for key in schema.get("required", ()):
        if key not in value:
            _wrong(key, "is missing")


def _wrong(name: str, why: str) -> NoReturn:
    raise Refused(422, f"{name} {why}")


# -- 2. Operations ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path: a row of the table."""

    method: str
    path: str  # below BASE; {name} is a parameter
    role: str  # who may, at least; "": everybody
    summary: str
    run: Callable[[Any], Any]  # gets a Call; gives back a Reply, or what becomes JSON
    query: Mapping[str, Schema] | None = None  # parameters, of which none is needed; None: none
    body: Schema | None = None  # of JSON
    upload: bool = False  # takes an image
    anywhere: bool = False  # for who is of one project, too: `run` looks whether it is of that
    answer: Schema | None = None  # of JSON
    kind: str = JSON  # of the answer
    status: int = 200  # of success
    refusals: Sequence[int] = ()  # beside those that any operation may have

    @property
    def names(self) -> list[str]:
        """Of the parameters in the path."""
        return re.findall(r"{(\w+)}", self.path)


def read_query(operation: Operation, query: str) -> dict[str, Any]:
    """The parameters of a query as sent, by the schemas. Refused: 422."""
    known, found = operation.query or {}, {}
    for each in filter(None, query.split("&")):
        name, _, value = each.partition("=")
        schema = known.get(name)
        if schema is None:
            _wrong(f"?{shown(unquote_plus(name))}", f"is not known here; known: {[*known]}")
        if name in found:
            _wrong(f"?{name}", "stands there twice")
        given: str | int = unquote_plus(value)
        if schema["type"] == "integer" and re.fullmatch("-?[0-9]{1,19}", unquote_plus(value)):
            given = int(given)
        check(schema, given, f"?{name}")
        found[name] = given
    return found


def read_body(operation: Operation, body: BinaryIO | None) -> dict[str, Any]:
    """The JSON of a body, by the schema. Refused: 400, it is no JSON; 422."""
    data = body.read(MAX_JSON) if body is not None else b""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as err:
        why = "it is nested too deep" if isinstance(err, RecursionError) else err
        raise Refused(400, f"the body is no JSON in UTF-8: {why}") from err
    assert operation.body is not None
    check(operation.body, value, "the body")
    result: dict[str, Any] = value
    return result


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands there twice")
    return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


# -- 3. The document -------------------------------------------------------------------------------

ALWAYS = (400, 422)  # whatever is asked
GUARDED = (401, 403)
SENDING = (411, 413, 507)
WORDS = text("percent-encoded")
PROBLEMS = {
    "description": "Why it was refused, in the form of RFC 9457.",
    "type": "object",
    "properties": {
        "type": text(),
        "title": text(),
        "status": number(),
        "detail": text("a sentence that helps"),
    },
    "required": ["type", "title", "status", "detail"],
}


def document(operations: Iterable[Operation], *, secure: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document, for who asks by TLS or not."""
    paths: dict[str, Any] = {}
    for each in operations:
        paths.setdefault(BASE + each.path, {})[each.method.lower()] = _described_operation(each)
    cookie = {"type": "apiKey", "in": "cookie", "name": cookie_name(secure=secure)}
    more = "What changes something needs X-CSRF-Token, too, which GET session tells."
    schemes = {
        "token": {"type": "http", "scheme": "bearer"},
        "session": {**cookie, "description": more},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OTA update server", "version": __version__},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": {"Problem": PROBLEMS}, "securitySchemes": schemes},
    }


def _described_operation(operation: Operation) -> dict[str, Any]:
    query, names = operation.query or {}, operation.names
    parameters = [
        *({"name": each, "in": "path", "required": True, "schema": WORDS} for each in names),
        *({"name": each, "in": "query", "schema": query[each]} for each in query),
    ]
    words = re.findall("[a-z]+", operation.path)
    found: dict[str, Any] = {
        "operationId": "_".join((operation.method.lower(), *words)),
        "summary": operation.summary,
        "responses": _responses(operation),
        "security": [{"token": []}, {"session": []}] if operation.role else [],
    }
    if operation.role:
        found["description"] = f"For a {operation.role}."
    if parameters:
        found["parameters"] = parameters
    if content := _content(operation):
        found["requestBody"] = {"required": True, "content": content}
    return found


def _content(operation: Operation) -> dict[str, Any]:
    """What a request carries, by media type."""
    if operation.body is not None:
        return {JSON: {"schema": operation.body}}
    if not operation.upload:
        return {}
    image = {"type": "string", "contentMediaType": "application/octet-stream"}
    fields = dict.fromkeys(("project", "version", "notes"), text())
    form = {
        "type": "object",
        "properties": {"file": image, **fields, **REPLACE},
        "required": ["file"],
    }
    return {"application/octet-stream": {}, "multipart/form-data": {"schema": form}}


def _responses(operation: Operation) -> dict[str, Any]:
    """What comes back, by status."""
    success: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase}
    if operation.answer is not None:
        success["content"] = {operation.kind: {"schema": operation.answer}}
    elif operation.kind != JSON:
        success["content"] = {operation.kind: {}}
    found = {str(operation.status): success}
    if operation.upload:
        found["200"] = success | {"description": "It was there already"}
    statuses = {*ALWAYS, *operation.refusals}
    statuses.update(GUARDED if operation.role else ())
    statuses.update((404,) if operation.names else ())
    statuses.update((*SENDING, 409, 415) if operation.body or operation.upload else ())
    problem = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for status in sorted(statuses):
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": problem}
    # A head that is no HTTP, or a target with control characters: nobody knows of which path.
    found["400"]["content"] = {**problem, "text/plain": {"schema": {"type": "string"}}}
    return found


# -- 4. What requests and answers hold -------------------------------------------------------------

WHEN = number("UTC seconds")
NAME = text(minLength=1, maxLength=MAX_TEXT)
VERSION = text("a semantic version, in its normal form")
ONLY = text("the only project; empty: all")
PAGE: Mapping[str, Schema] = {
    "limit": number("items of a page at most", minimum=1, maximum=MAX_PAGE, default=100),
    "cursor": text("where the page begins: `next` of the page before"),
}
SORTS = [f"{down}{by}" for by in ("id", "last_seen", "version", "project") for down in ("", "-")]
FILTERS: Mapping[str, Schema] = {
    "project": text(),
    "q": text("anywhere in what is known of it; a MAC address however it is written"),
    "chip": text(),
    "version": text("the one it runs"),
    "label": text(),
    "sort": text("with - in front: downwards", enum=SORTS, default="id"),
    **PAGE,
}
CHANNEL = text("beta: also pre-releases; empty: as its group or project has it", maxLength=64)
GROUP = text("a group that things are said of together; empty: none", maxLength=64)
DEVICE = record(
    id=text("a MAC address as AA:BB:CC:DD:EE:FF, or what the device gave"),
    project=text("what it asked for last; empty, here and below: it never said"),
    chip=text(),
    version=text("the one it runs"),
    image=text("digest of what it runs: SHA-256, or MD5, in hex"),
    free_space={"type": ["integer", "null"], "description": "bytes"},
    sdk=text(),
    address=text("IP address"),
    first_seen=WHEN,
    last_seen=WHEN,
    downloads=number("images it was given"),
    notes=text(),
    labels=several(text()),
    pin=text("the one version it is to run; empty: the newest"),
    admitted=flag("to its project"),
    offered=text("the version it was given last; empty: there was a reason against it since"),
    offers=number("how often that was, in a row, while it ran the same other version"),
    channel=CHANNEL,
    group=GROUP,
    interval=number("seconds between two of its checks, about; 0: it asked only once"),
)
NOTES = record(
    None,
    notes=text(maxLength=MAX_LONG),
    labels=several(NAME, maxItems=MAX_LABELS),
    pin=text("a version; empty: none", maxLength=MAX_TEXT),
    channel=CHANNEL,
    group=GROUP,
)
ROLE = text(enum=[*ROLES])
ACCOUNT = record(id=number(), email=text(), role=ROLE, created=WHEN)
PASSWORD = text("10 characters or more", maxLength=1000)
CREDENTIALS = record(email=NAME, password=PASSWORD)
SESSION = record(
    name=text("who it is, as in the audit"),
    role=text(),
    project=ONLY,
    csrf=text("X-CSRF-Token of what changes something; empty: none is needed"),
)
TOKEN = record(
    id=number(),
    name=text(),
    role=text(enum=[*ROLES, "device"]),
    project=ONLY,
    device=text("the only one; empty: it is for none"),
    created=WHEN,
)
ENTRY = record(
    number=number("1, 2, 3... without a gap"),
    at=WHEN,
    who=text(),
    action=text(),
    what=text(),
    digest=text("SHA-256, in hex, of the digest before and of the JSON of the other five, a list"),
)
CHIPS = several(text(), "that it may be for; none: those of its earlier images", maxItems=32)
ALIASES = several(text(), "what devices or images call it as well", maxItems=32)
SETTINGS: Mapping[str, Schema] = {
    "chips": CHIPS,
    "aliases": ALIASES,
    "partition_size": number(
        "bytes that its devices have for a sketch; 0: not known", minimum=0, maximum=MAX_PARTITION
    ),
    "admit": text("who gets its images; empty: as --admit says", enum=[*ADMIT]),
}
PROJECT = record(
    name=text(),
    **SETTINGS,
    created=number("UTC seconds; 0: it is only files in the firmware folder"),
    newest=text("the newest version; empty: there is none"),
)
RELEASE = record(
    project=text(),
    version=VERSION,
    kind=text("sketch, littlefs, spiffs, fatfs or zip"),
    chip=text(),
    packed=flag("by gzip"),
    name=text("of the file"),
    size=number("bytes"),
    md5=text("of the file, in hex"),
    sha256=text(),
    notes=text(),
    source=text(enum=["upload", "folder"]),
    uploaded=WHEN,
    who=text("empty: it was put into the folder"),
    withdrawn={"type": ["string", "null"], "description": "the reason; null: it is not"},
    flaw=text("why no device gets it; empty: it is whole"),
)
IMAGES = record(project=text(), version=VERSION, images=several(RELEASE))
CHANGE = record(
    None,
    notes=text(maxLength=MAX_LONG),
    withdrawn=flag("no device gets it any more; false: they do again"),
    reason=text("why it is withdrawn", maxLength=MAX_LONG),
)
VERIFIED = record(sound=flag("no entry was changed, moved or taken out"))
REPLACE: Mapping[str, Schema] = {
    "replace": text("1: also one that is not newer, and in the place of its twin", enum=["0", "1"])
}


def page(items: Schema) -> Schema:
    """What a list answers."""
    following = {"type": ["string", "null"], "description": "the next ?cursor=; null: no more"}
    return record(items=several(items), next=following)
