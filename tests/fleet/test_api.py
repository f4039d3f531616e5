"""The JSON API: what each operation does, who may, and what is refused how."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

import ota_server
from ota_fleet.accounts import ROLES, Accounts
from ota_fleet.api import read_cursor, write_cursor
from ota_fleet.ledger import Ledger
from ota_fleet.openapi import BASE, MAX_JSON
from ota_fleet.registry import Registry, Sighting, normal_id
from ota_fleet.rows import Entry
from ota_fleet.upload import FIELDS
from ota_server import Image, Refused, Reply, Site, answer, parse_head, shown
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Stand, request, standing
from tests.data.make_images import esp32_image, esp8266_image
from tests.test_house import ROOT

EMAIL, PASSWORD = "ada@example.org", "correct horse"
NOW = 1_700_000_000  # UTC seconds
MACS = [f"5C:CF:7F:00:00:0{number}" for number in range(5)]
LAMP, NEW = (esp32_image("lamp", version) for version in ("1.0.0", "2.0.0"))
PLAIN = esp8266_image("firmware", "2.0.0")  # does not say what it is


class Answer(NamedTuple):
    """A reply, read."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def data(self) -> Any:
        """The JSON."""
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        """Why it was refused, if it is a problem as RFC 9457 has it."""
        assert self.headers["content-type"] == "application/problem+json"
        assert set(self.data) == {"type", "title", "status", "detail"}
        assert (self.data["type"], self.data["status"]) == ("about:blank", self.status)
        return str(self.data["detail"])


def read(reply: Reply) -> Answer:
    """What a client sees; the file of an image is closed."""
    body = reply.body
    if isinstance(body, Image):
        with body.file as file:
            file.seek(reply.part.start)
            body = file.read(len(reply.part))
    return Answer(reply.status, {name.lower(): value for name, value in reply.headers}, body)


class House(NamedTuple):
    """A site with a memory, and tokens for it."""

    site: Site
    tokens: Mapping[str, str]  # by role; "lamp": a publisher's of this project only

    def ask(self, who: str, method: str, path: str, body: object = None, *fields: str) -> Answer:
        """The reply to a request by who has this token; a body is JSON, or bytes as they are."""
        given = [f"Authorization: Bearer {self.tokens[who]}"] if who else []
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if method in {"POST", "PUT", "PATCH"}:
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            has_kind = any(each.lower().startswith("content-type") for each in fields)
            given += [f"Content-Type: {kind}"] * (not has_kind)
            given += [f"Content-Length: {len(data) if body is not None else 0}"]
        target = path if path.startswith("/") else f"{BASE}/{path}"
        head = parse_head(request(target, *given, *fields, method=method), "192.0.2.9")
        with tempfile.TemporaryFile() as file:
            if body is not None:
                file.write(data)
                file.seek(0)
            return read(answer(self.site, head._replace(body=file)))

    def admin(self, method: str, path: str, body: object = None, *fields: str) -> Answer:
        """The same by an administrator."""
        return self.ask("admin", method, path, body, *fields)

    @property
    def state(self) -> Path:
        """Its folder."""
        return Path(self.site.config.state)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A registry with an account, devices and tokens, to be copied; and the tokens."""
    path = tmp_path_factory.mktemp("furnished") / "fleet.db"
    registry = Registry(path)
    accounts = Accounts(Ledger(registry), secure=False, now=lambda: NOW)
    accounts.open_account(EMAIL, PASSWORD, "admin", who="test")
    tokens = {role: accounts.mint(role, role, "", who="test")[1] for role in (*ROLES, "device")}
    tokens["lamp"] = accounts.mint("lamp", "publisher", "lamp", who="test")[1]
    for number, mac in enumerate(MACS):
        project = ("firmware", "lamp")[number % 2]
        digests = None, None
        registry.seen(
            Sighting(mac, project, "esp8266", f"1.{number}.0", *digests, 4096, None, "192.0.2.1",
                     NOW + number, downloaded=False)
        )  # fmt: skip
    registry.admit("firmware", MACS[0])
    registry.close()
    return path, tokens


@contextmanager
def opened(folder: Path, furnished: tuple[Path, dict[str, str]], **options: Any) -> Iterator[House]:
    """A house over a folder, with a copy of what is furnished."""
    state = folder.parent / "state"
    state.mkdir()
    shutil.copy(furnished[0], state)
    site = site_of(folder, state=str(state), **options)
    try:
        yield House(site, furnished[1])
    finally:
        for close in site.closers:
            close()


@pytest.fixture
def house(folder: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[House]:
    """`firmware` in the folder, `lamp` 1.0.0 uploaded."""
    with opened(folder, furnished) as house:
        assert house.admin("PUT", "projects/lamp", {"aliases": ["bulb"]}).status == 200
        assert house.admin("PUT", "projects/lamp/releases/1.0.0", LAMP).status == 201
        wish = {"url": "http://127.0.0.1:1/", "events": ["release.new"]}  # nobody is there
        assert house.admin("POST", "webhooks", wish).data["id"] == 1
        yield house


def is_part(wanted: object, found: object) -> bool:
    """Whether objects have at least these fields, and lists these very items."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(name in found and is_part(wanted[name], found[name]) for name in wanted)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(is_part, wanted, found))
    return wanted == found


# -- 1. What the operations do --------------------------------------------------------------------


def named(row: tuple[Any, ...]) -> str:
    """What a row of a table is called."""
    body = "image" if isinstance(row[3], bytes) else json.dumps(row[3])
    return f"{row[1]} {row[2]} {body[:40]} {row[0]}"


DEVICE, LAMPS, FIRST = (
    f"devices/{MACS[0]}",
    "projects/lamp/releases",
    "projects/lamp/releases/1.0.0",
)
FOLDER = "projects/firmware/releases/1.10.0"
OWN = f"devices/{MACS[1]}"  # a device of lamp
GREET = {"email": "Bob@Example.org", "password": "0123456789", "role": "viewer"}
DONE: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the answer holds
    ("", "GET", "openapi.json", None, 200, {"openapi": "3.1.0"}),
    ("viewer", "GET", "session", None, 200, {"role": "viewer", "project": "", "csrf": ""}),
    ("viewer", "DELETE", "session", None, 204, None),
    ("", "POST", "session", {"email": EMAIL, "password": PASSWORD}, 201, {"name": EMAIL}),
    ("admin", "GET", "accounts", None, 200, {"items": [{"email": EMAIL, "role": "admin"}]}),
    ("admin", "POST", "accounts", GREET, 201, {"email": "bob@example.org", "role": "viewer"}),
    ("admin", "PATCH", "accounts/1", {"password": "another horse"}, 200, {"email": EMAIL}),
    ("admin", "PATCH", "accounts/1", {}, 200, {"id": 1}),
    ("admin", "GET", "tokens?limit=2", None, 200, {"items": [{"id": 1}, {"id": 2}]}),
    ("admin", "POST", "tokens", {"name": "CI", "role": "publisher"}, 201,
     {"name": "CI", "role": "publisher", "project": "", "device": ""}),
    ("admin", "DELETE", "tokens/1", None, 204, None),
    ("viewer", "GET", "devices", None, 200, {"items": [{"id": mac} for mac in MACS], "next": None}),
    ("viewer", "GET", "devices?project=lamp", None, 200,
     {"items": [{"id": MACS[1], "project": "lamp"}, {"id": MACS[3]}]}),
    ("viewer", "GET", "devices?q=5ccf7f000002", None, 200, {"items": [{"id": MACS[2]}]}),
    ("viewer", "GET", "devices?q=192.0.2.1%2B", None, 200, {"items": []}),
    ("viewer", "GET", "devices?version=v1.3", None, 200, {"items": [{"id": MACS[3]}]}),
    ("viewer", "GET", "devices?chip=esp32", None, 200, {"items": []}),
    ("viewer", "GET", "devices?label=attic", None, 200, {"items": []}),
    ("viewer", "GET", "devices?sort=-last_seen&limit=2", None, 200,
     {"items": [{"id": MACS[4]}, {"id": MACS[3]}]}),
    ("viewer", "GET", "devices?sort=version&limit=1", None, 200, {"items": [{"id": MACS[0]}]}),
    ("lamp", "GET", "devices", None, 200, {"items": [{"id": MACS[1]}, {"id": MACS[3]}]}),
    ("lamp", "GET", f"devices/{MACS[1]}", None, 200, {"id": MACS[1]}),
    ("viewer", "GET", DEVICE, None, 200,
     {"id": MACS[0], "free_space": 4096, "labels": [], "admitted": True, "last_seen": NOW}),
    ("viewer", "GET", "devices/5ccf7f000000", None, 200, {"id": MACS[0]}),
    ("viewer", "GET", "devices/5c%3Acf%3A7f%3A00%3A00%3A00", None, 200, {"id": MACS[0]}),
    ("publisher", "PATCH", DEVICE, {"notes": "ä", "labels": ["b", "a"], "pin": "v1.2"}, 200,
     {"notes": "ä", "labels": ["a", "b"], "pin": "1.2.0", "channel": ""}),
    ("publisher", "PATCH", DEVICE, {"channel": "beta"}, 200, {"pin": "", "channel": "beta"}),
    ("publisher", "PATCH", DEVICE, {"group": "attic", "channel": "nightly"}, 200,
     {"group": "attic", "channel": "nightly", "interval": 0}),
    ("publisher", "PATCH", DEVICE, {}, 200, {"notes": ""}),
    ("publisher", "DELETE", DEVICE, None, 204, None),
    ("viewer", "GET", "projects", None, 200, {"items": [
        {"name": "firmware", "created": 0, "newest": "1.10.0"},
        {"name": "lamp", "aliases": ["bulb"], "newest": "1.0.0"}]}),
    ("lamp", "GET", "projects", None, 200, {"items": [{"name": "lamp"}]}),
    ("viewer", "GET", "projects/bulb", None, 200, {"name": "lamp", "chips": []}),
    ("publisher", "PUT", "projects/new", {"chips": ["esp32", "esp8266"]}, 200,
     {"name": "new", "chips": ["esp32", "esp8266"], "aliases": [], "newest": ""}),
    ("lamp", "PUT", "projects/lamp", {"chips": ["esp32"]}, 200, {"aliases": ["bulb"]}),
    ("lamp", "PUT", "projects/lamp", {"aliases": []}, 200, {"aliases": []}),
    ("lamp", "PUT", "projects/lamp", {"partition_size": 1310720, "admit": "whitelist"}, 200,
     {"partition_size": 1310720, "admit": "whitelist", "aliases": ["bulb"]}),
    ("viewer", "GET", "projects/firmware/admissions", None, 200,
     {"items": [MACS[0]], "next": None}),
    ("publisher", "PUT", "projects/bulb/admissions/aabbccddeeff", None, 204, None),
    ("publisher", "DELETE", f"projects/firmware/admissions/{MACS[0]}", None, 204, None),
    ("viewer", "GET", "projects/firmware/releases", None, 200, {"items": [
        {"version": "1.10.0", "source": "folder"}, {"version": "1.9.0"}, {"version": "1.0.0"}]}),
    ("viewer", "GET", LAMPS, None, 200, {"items": [
        {"version": "1.0.0", "source": "upload", "chip": "esp32", "size": len(LAMP),
         "sha256": hashlib.sha256(LAMP).hexdigest(), "withdrawn": None, "flaw": ""}]}),
    ("publisher", "POST", "projects/bulb/releases", NEW, 201, {"version": "2.0.0"}),
    ("publisher", "POST", "releases", NEW, 201, {"project": "lamp", "version": "2.0.0"}),
    ("lamp", "POST", "releases", NEW, 201, {"project": "lamp"}),
    ("publisher", "PUT", "projects/firmware/releases/2.0.0", PLAIN, 201, {"version": "2.0.0"}),
    ("publisher", "POST", "releases?replace=1", LAMP, 200, {"version": "1.0.0"}),
    ("publisher", "PUT", FIRST, LAMP, 200, {"version": "1.0.0"}),
    ("viewer", "GET", FIRST, None, 200, {"version": "1.0.0", "images": [{"kind": "sketch"}]}),
    ("viewer", "GET", "projects/bulb/releases/v1.0", None, 200, {"project": "lamp"}),
    ("publisher", "PATCH", FIRST, {"notes": "better"}, 200, {"images": [{"notes": "better"}]}),
    ("publisher", "PATCH", FOLDER, {"withdrawn": True, "reason": "hot"}, 200,
     {"images": [{"withdrawn": "hot"}]}),
    ("publisher", "PATCH", FOLDER, {"withdrawn": False}, 200, {"images": [{"withdrawn": None}]}),
    ("admin", "DELETE", FIRST, None, 204, None),
    ("admin", "POST", "webhooks", {"url": "http://127.0.0.1:1/x#y", "events": ["release.new"]},
     201, {"id": 2, "url": "http://127.0.0.1:1/x", "events": ["release.new"]}),
    ("admin", "POST", "webhooks", {"url": "https://[::1]/", "secret": "a" * 16}, 201,
     {"events": [], "secret": "a" * 16}),
    ("admin", "GET", "webhooks", None, 200, {"items": [{"id": 1, "events": ["release.new"]}]}),
    ("admin", "POST", "webhooks/1/test", None, 202, {"delivery": 1}),
    ("admin", "GET", "webhooks/1/deliveries", None, 200, {"items": [], "next": None}),
    ("admin", "DELETE", "webhooks/1", None, 204, None),
    ("admin", "GET", "audit/verified", None, 200, {"sound": True}),
    ("admin", "GET", "audit?limit=1", None, 200, {"items": [{"number": 1, "who": "test"}]}),
]  # fmt: skip


@pytest.mark.parametrize("row", DONE, ids=named)
def test_operation_does_what_it_says(row: tuple[Any, ...], house: House) -> None:
    who, method, path, body, status, wanted = row
    reply = house.ask(who, method, path, body)
    assert reply.status == status, reply.body
    assert is_part(wanted, reply.data if reply.body else None), reply.data
    assert reply.headers["cache-control"] in {"no-store", "no-cache"}


CHANGES = [row for row in DONE if row[1] != "GET" and "session" not in row[2]]
SILENT = [  # nothing changed
    "PATCH accounts/1 {}", f"PATCH {DEVICE} {{}}", "PUT projects/lamp/releases/1.0.0 bytes",
    "POST releases?replace=1 bytes",
]  # fmt: skip


@pytest.mark.parametrize("row", CHANGES, ids=named)
def test_change_stands_in_the_audit_with_who_made_it(row: tuple[Any, ...], house: House) -> None:
    who, method, path, body, *_ = row
    before = house.admin("GET", "audit").data["items"]
    house.ask(who, method, path, body)
    after = house.admin("GET", "audit").data["items"]
    words = f"{method} {path} {'bytes' if isinstance(body, bytes) else json.dumps(body)}"
    assert len(after) == len(before) + (words not in SILENT), after[len(before) :]
    for entry in after[len(before) :]:
        assert re.fullmatch(rf"token [0-9]+ \({who}\)", entry["who"])
        assert entry["action"]
        assert entry["what"]


def test_admission_twice_is_one_entry(house: House) -> None:
    path = f"projects/firmware/admissions/{MACS[1]}"
    entries = len(house.admin("GET", "audit").data["items"])
    assert [house.admin("PUT", path).status for _ in range(2)] == [204, 204]
    assert len(house.admin("GET", "audit").data["items"]) == entries + 1
    assert house.admin("GET", "projects/firmware/admissions").data["items"] == MACS[:2]


def test_id_of_a_device_may_be_any_text_but_only_a_mac_is_admitted(house: House) -> None:
    for name in ("a/b", "ä ö", "%2F", "..", "x/"):
        path = f"projects/firmware/admissions/{quote(name, safe='')}"
        reply = house.admin("PUT", path)
        assert (reply.status, reply.detail) == (422, f"{shown(name)} is no MAC address")
        with closing(Registry(house.state / "fleet.db")) as registry:
            registry.admit("firmware", name)  # as earlier versions let everybody do
        wait_until(lambda: house.admin("DELETE", path).status == 204, 3)  # noqa: B023


def test_token_is_shown_once_and_opens_what_it_is_for_until_it_is_taken_back(house: House) -> None:
    wish = {"name": "CI", "role": "publisher", "project": "lamp"}
    made = house.admin("POST", "tokens", wish).data
    listed = house.admin("GET", "tokens").data["items"]
    assert made.pop("token").startswith("ota_")
    assert made in listed
    assert not any("token" in each or "digest" in each for each in listed)
    assert made["created"] >= NOW
    assert house.admin("DELETE", f"tokens/{made['id']}").status == 204
    assert made not in house.admin("GET", "tokens").data["items"]


def test_password_is_nowhere_in_an_answer(house: House) -> None:
    house.admin("POST", "accounts", GREET)
    for path in ("accounts", "audit", "audit.jsonl", "tokens"):
        body = house.admin("GET", path).body
        assert b"scrypt" not in body
        assert b"0123456789" not in body


def test_audit_that_was_tampered_with_is_not_sound(house: House) -> None:
    with closing(sqlite3.connect(house.state / "fleet.db", isolation_level=None)) as connection:
        connection.execute("UPDATE audit SET who = 'eve' WHERE number = 3")
    assert house.admin("GET", "audit/verified").data == {"sound": False}
    assert house.ask("publisher", "GET", "audit/verified").status == 403


def test_document_has_every_field_of_a_form(house: House) -> None:
    content = house.ask("", "GET", "openapi.json").data["paths"][f"{BASE}/releases"]["post"]
    form = content["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"file", *FIELDS}


def test_deletion_that_cannot_be_entered_is_not_made(house: House) -> None:
    with closing(sqlite3.connect(house.state / "fleet.db")) as connection:
        connection.execute(
            "CREATE TRIGGER shut BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'shut'); END"
        )
    assert house.admin("DELETE", "projects/lamp/releases/1.0.0").status == 500
    assert house.ask("viewer", "GET", "projects/lamp/releases/1.0.0").status == 200


def test_change_of_a_busy_database_is_503_and_reading_goes_on(house: House) -> None:
    with closing(sqlite3.connect(house.state / "fleet.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = house.admin("PUT", "projects/tree", {})
        assert (answer.status, answer.detail) == (503, "the database is busy: try again")
        assert answer.headers["retry-after"] == "30"
        assert house.ask("viewer", "GET", "devices").status == 200
    assert house.admin("PUT", "projects/tree", {}).status == 200


def test_first_administrator_is_made_with_the_secret_of_the_log(
    folder: Path, lines: Callable[[str], list[str]]
) -> None:
    site = site_of(folder, state=str(folder.parent / "state"))
    house = House(site, {})
    (line,) = lines("/admin/setup#")
    wish = {"email": EMAIL, "password": PASSWORD}
    try:
        assert house.ask("", "POST", "setup", {**wish, "secret": "guess"}).status == 403
        secret = line.partition("#")[2].split()[0]
        assert house.ask("", "POST", "setup", {**wish, "secret": secret}).status == 204
        assert house.ask("", "POST", "setup", {**wish, "secret": secret}).status == 409
        assert house.ask("", "POST", "session", wish).data["role"] == "admin"
    finally:
        for close in site.closers:
            close()


def test_first_administrator_may_stand_in_the_settings(folder: Path) -> None:
    wish = {"admin_email": EMAIL, "admin_password": PASSWORD}
    for _ in range(2):  # the second time there is one
        site = site_of(folder, state=str(folder.parent / "state"), **wish)
        signed = House(site, {}).ask("", "POST", "session", {"email": EMAIL, "password": PASSWORD})
        assert signed.data["role"] == "admin"
        for close in site.closers:
            close()


def test_export_is_the_audit_a_line_each_and_its_chain_holds(house: House) -> None:
    for number in range(1100):
        house.admin("PUT", f"projects/firmware/admissions/5ccf7f00{number:04x}")
    reply = house.admin("GET", "audit.jsonl")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/jsonl")
    assert int(reply.headers["content-length"]) == len(reply.body)
    entries = [Entry(**json.loads(line)) for line in reply.body.splitlines()]
    assert len(entries) > 1100
    digest = ""
    for number, entry in enumerate(entries, 1):
        digest = entry.follows(digest)
        assert (entry.number, entry.digest) == (number, digest)
    rest = house.admin("GET", "audit.jsonl?after=1090").body
    assert rest == b"".join(reply.body.splitlines(keepends=True)[1090:])
    assert house.admin("GET", f"audit.jsonl?after={(1 << 63) - 1}").body == b""
    assert house.admin("HEAD", "audit.jsonl").body == b""


def test_withdrawn_release_is_said_to_be_and_alias_is_the_project(house: House) -> None:
    reply = house.admin("PATCH", "projects/bulb/releases/1.0", {"withdrawn": True, "reason": "x"})
    assert reply.data["images"][0]["withdrawn"] == "x"
    assert house.admin("GET", LAMPS).data["items"][0]["withdrawn"] == "x"
    house.admin("PUT", f"projects/bulb/admissions/{MACS[1]}")
    assert house.admin("GET", "projects/lamp/admissions").data["items"] == [MACS[1]]


def test_session_is_a_cookie_that_changes_nothing_without_its_csrf(house: House) -> None:
    reply = house.ask("", "POST", "session", {"email": EMAIL, "password": PASSWORD})
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    with_it = functools.partial(house.ask, "")
    field = f"Cookie: {cookie.partition(';')[0]}"
    assert with_it("GET", "session", None, field).data == reply.data
    path = f"projects/firmware/admissions/{MACS[1]}"
    csrf = f"X-CSRF-Token: {reply.data['csrf']}"
    assert with_it("PUT", path, None, field).status == 403
    assert with_it("PUT", path, None, field, f"{csrf}0").status == 403
    assert with_it("PUT", path, None, field, csrf, "Sec-Fetch-Site: cross-site").status == 403
    assert with_it("PUT", path, None, field, csrf).status == 204
    assert with_it("DELETE", "session", None, field).status == 403
    assert with_it("DELETE", "session", None, field, csrf).status == 204
    assert with_it("GET", "session", None, field).status == 401


def test_guessing_passwords_is_slowed_down(house: House) -> None:
    wrong = {"email": EMAIL, "password": "wrong"}
    replies = [house.ask("", "POST", "session", wrong) for _ in range(12)]
    assert [each.status for each in replies] == [401] * 10 + [429] * 2
    assert int(replies[-1].headers["retry-after"]) > 0
    assert replies[-1].detail


# -- 2. What is refused ---------------------------------------------------------------------------

BROKEN = [  # a body that is none
    (b"", 400, "no JSON"), (b"{", 400, "no JSON"), (b'{"notes": NaN}', 400, "NaN"),
    (b'{"notes": "a", "notes": "b"}', 400, "twice"), (b'{"notes": "\xff"}', 400, "UTF-8"),
    (b"[" * 50_000, 400, "deep"), (b"9" * 5000, 400, "no JSON"), (b'"text"', 422, "an object"),
    (b"[]", 422, "an object"), (b"null", 422, "an object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "why"), BROKEN, ids=lambda text: repr(text)[:20])
def test_body_that_is_no_json_object_is_refused(
    body: bytes, status: int, why: str, house: House
) -> None:
    reply = house.admin("PATCH", DEVICE, body, "Content-Type: application/json; charset=utf-8")
    assert (reply.status, why in reply.detail) == (status, True), reply.detail


LONG, URL = "x" * 4097, "http://192.0.2.1/"
REFUSED: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the sentence says
    ("admin", "GET", "nothing", None, 404, "openapi.json"),
    ("", "GET", "/api", None, 404, "openapi.json"),
    ("", "BREW", "/api/v2/devices", None, 404, "nothing is here"),
    ("admin", "GET", "devices/", None, 404, "nothing is here"),
    ("admin", "GET", "projects//releases", None, 404, "nothing is here"),
    ("admin", "GET", "projects/%ff", None, 404, "UTF-8"),
    ("", "DELETE", "devices", None, 405, "not possible"),
    ("", "BREW", DEVICE, None, 405, "not possible"),
    ("", "GET", "devices", None, 401, "token"),
    ("admin", "GET", "devices?limit=0", None, 422, "?limit is to be from 1 to 1000"),
    ("admin", "GET", "devices?limit=1001", None, 422, "?limit"),
    ("admin", "GET", "devices?limit=x", None, 422, "?limit is to be a whole number"),
    ("admin", "GET", "devices?limit=%D9%A1", None, 422, "?limit"),
    ("admin", "GET", "devices?limit=1&limit=2", None, 422, "twice"),
    ("admin", "GET", "devices?lable=x", None, 422, "'lable' is not known here"),
    ("admin", "GET", "devices?sort=color", None, 422, "?sort is to be one of id, -id"),
    ("admin", "GET", "devices?q=%00", None, 422, "?q has a character"),
    ("admin", "GET", "devices?cursor=x", None, 422, "cursor"),
    ("admin", "GET", "devices?cursor=%ff", None, 422, "cursor"),
    ("admin", "GET", f"devices?cursor={write_cursor([1])}", None, 422, "of this list"),
    ("admin", "GET", f"devices?sort=version&cursor={write_cursor(['x'])}", None, 422, "of this"),
    ("admin", "GET", f"audit?cursor={write_cursor(['x'])}", None, 422, "of this list"),
    ("admin", "GET", f"{LAMPS}?cursor={write_cursor(['x'])}", None, 422, "cursor"),
    ("admin", "GET", "audit.jsonl?after=-1", None, 422, "?after"),
    ("admin", "GET", "session?token=x", None, 422, "'token' is not known here"),
    ("lamp", "GET", "devices?project=firmware", None, 403, "'lamp' only"),
    ("lamp", "GET", DEVICE, None, 403, "'lamp' only"),
    ("lamp", "PATCH", DEVICE, {}, 403, "'lamp' only"),
    ("lamp", "DELETE", DEVICE, None, 403, "'lamp' only"),
    ("lamp", "PATCH", OWN, {"pin": "0.0.1"}, 403, "'lamp' only"),  # any device may say it is one
    ("lamp", "DELETE", OWN, None, 403, "'lamp' only"),
    ("lamp", "GET", "projects/firmware", None, 403, "'lamp' only"),
    ("lamp", "POST", "releases", esp32_image("firmware", "2.0.0"), 403, "'lamp'"),
    ("lamp", "PUT", "projects/firmware/releases/2.0.0", PLAIN, 403, "'lamp' only"),
    ("device", "GET", "devices", None, 403, "viewer"),
    ("admin", "GET", "devices/none", None, 404, "'none' is not known"),
    ("admin", "PATCH", "devices/none", {}, 404, "'none' is not known"),
    ("admin", "DELETE", "devices/none", None, 404, "'none' is not known"),
    ("admin", "PATCH", DEVICE, {"colour": 1}, 422, "'colour' is not known here; known: notes"),
    ("admin", "PATCH", DEVICE, {"notes": 1}, 422, "notes is to be a text"),
    ("admin", "PATCH", DEVICE, {"notes": None}, 422, "notes is to be a text"),
    ("admin", "PATCH", DEVICE, {"notes": LONG}, 422, "notes is to have from 0 to 4096"),
    ("admin", "PATCH", DEVICE, {"notes": "\0"}, 422, "notes has a character"),
    ("admin", "PATCH", DEVICE, {"notes": "\ud800"}, 422, "notes has a character"),
    ("admin", "PATCH", DEVICE, {"labels": "x"}, 422, "labels is to be a list"),
    ("admin", "PATCH", DEVICE, {"labels": ["x", 2]}, 422, "labels[1] is to be a text"),
    ("admin", "PATCH", DEVICE, {"labels": [""]}, 422, "labels[0]"),
    ("admin", "PATCH", DEVICE, {"labels": ["x"] * 33}, 422, "more than 32"),
    ("admin", "PATCH", DEVICE, {"pin": "newest"}, 422, "'newest' is no version"),
    ("admin", "PATCH", DEVICE, {"channel": "every night"}, 422, "no name for a channel"),
    ("admin", "PATCH", DEVICE, {"group": "-"}, 422, "no name for a group"),
    ("admin", "PATCH", FOLDER, {"withdrawn": 1}, 422, "withdrawn is to be true or false"),
    ("admin", "PATCH", FOLDER, {"notes": "x"}, 409, "firmware folder"),
    ("admin", "PATCH", "projects/lamp/releases/9.9.9", {"notes": "x"}, 404, "9.9.9"),
    ("admin", "GET", "projects/lamp/releases/9.9.9", None, 404, "9.9.9"),
    ("admin", "GET", "projects/lamp/releases/new", None, 404, "'new' is no version"),
    ("admin", "DELETE", "projects/lamp/releases/9.9.9", None, 404, "9.9.9"),
    ("admin", "DELETE", FOLDER, None, 409, "firmware folder"),
    ("admin", "GET", "projects/none/releases", None, 404, "'none'"),
    ("admin", "GET", "projects/none/admissions", None, 404, "'none'"),
    ("admin", "PUT", "projects/none/admissions/x", None, 404, "'none'"),
    ("admin", "DELETE", "projects/lamp/admissions/x", None, 404, "'x' is not admitted"),
    ("admin", "GET", "projects/none", None, 404, "'none'"),
    ("admin", "DELETE", "projects/none", None, 404, "'none'"),
    ("admin", "DELETE", "projects/lamp", None, 409, "releases"),
    ("admin", "DELETE", "projects/firmware", None, 409, "firmware folder"),
    ("admin", "PUT", "projects/api", {}, 422, "'api' is no name"),
    ("admin", "PUT", "projects/bulb", {}, 409, "alias"),
    ("admin", "PUT", "projects/new", {"aliases": ["firmware"]}, 409, "firmware"),
    ("admin", "PUT", "projects/new", {"chips": ["esp33"]}, 422, "'esp33'"),
    ("admin", "PUT", "projects/new", {"chips": {}}, 422, "chips is to be a list"),
    ("admin", "PUT", "projects/new", {"partition_size": -1}, 422, "from 0 to"),
    ("admin", "PUT", "projects/new", {"admit": "some"}, 422, "one of"),
    ("admin", "PUT", "projects/none/releases/1.0.0", NEW, 404, "PUT /api/v1/projects/none"),
    ("admin", "PUT", FIRST, NEW, 422, "2.0.0"),
    ("admin", "PUT", "projects/firmware/releases/1.0.0", PLAIN, 409, "1.10.0"),
    ("admin", "POST", "releases", PLAIN, 422, "which project"),
    ("admin", "POST", "releases", b"no image", 422, "image"),
    ("admin", "POST", "releases?replace=perhaps", NEW, 422, "?replace"),
    ("admin", "POST", "accounts", {}, 422, "email is missing"),
    ("admin", "POST", "accounts", {**GREET, "role": "boss"}, 422, "role is to be one of viewer"),
    ("admin", "POST", "accounts", {**GREET, "password": "short"}, 422, "password has 10"),
    ("admin", "POST", "accounts", {**GREET, "email": "bob"}, 422, "e-mail"),
    ("admin", "POST", "accounts", {**GREET, "email": EMAIL}, 409, EMAIL),
    ("admin", "PATCH", "accounts/1", {"role": "viewer"}, 409, "last administrator"),
    ("admin", "PATCH", "accounts/9", {}, 404, "no account 9"),
    ("admin", "PATCH", "accounts/x", {}, 404, "'x' is no number"),
    ("admin", "DELETE", "accounts/1", None, 409, "last administrator"),
    ("admin", "DELETE", f"accounts/{10**18}", None, 404, "no number"),
    ("admin", "DELETE", "tokens/999", None, 404, "no token 999"),
    ("admin", "POST", "tokens", {"name": "", "role": "viewer"}, 422, "name"),
    ("admin", "POST", "tokens", {"name": "x", "role": "viewer", "device": "y"}, 422, "device"),
    ("admin", "POST", "webhooks", {}, 422, "url is missing"),
    ("admin", "POST", "webhooks", {"url": "ftp://192.0.2.1/"}, 422, "no URL such as"),
    ("admin", "POST", "webhooks", {"url": URL, "events": ["x"]}, 422, "events[0] is to be one of"),
    ("admin", "POST", "webhooks", {"url": URL, "secret": "x"}, 422, "from 16 to 255 characters"),
    ("admin", "POST", "webhooks", {"url": f"{URL}{'x' * 2000}"}, 422, "from 1 to 2000 characters"),
    ("admin", "DELETE", "webhooks/9", None, 404, "no webhook 9"),
    ("admin", "POST", "webhooks/9/test", None, 404, "no webhook 9"),
    ("admin", "POST", f"webhooks/{'9' * 18}/test", None, 404, "no webhook"),
    ("admin", "GET", "webhooks/x/deliveries", None, 404, "'x' is no number"),
    ("publisher", "POST", "webhooks", {"url": URL}, 403, "admin"),
    ("", "POST", "session", {"email": EMAIL, "password": "wrong"}, 401, "is wrong"),
    ("", "POST", "setup", {**GREET, "secret": "x"}, 422, "'role'"),
    ("", "POST", "setup", {"secret": "", "email": EMAIL, "password": PASSWORD}, 422, "secret"),
    ("", "POST", "setup", {"secret": "x", "email": EMAIL, "password": PASSWORD}, 409, "sign in"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=named)
def test_refusal_is_a_problem_that_says_what_is_wrong(row: tuple[Any, ...], house: House) -> None:
    who, method, path, body, status, why = row
    reply = house.ask(who, method, path, body)
    assert (reply.status, why in reply.detail) == (status, True), reply.detail


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_body_must_say_that_it_is_json(kind: str, house: House) -> None:
    reply = house.admin("PATCH", DEVICE, {}, f"Content-Type: {kind}")
    assert (reply.status, "application/json" in reply.detail) == (415, True)


def test_body_of_json_is_small(house: House) -> None:
    reply = house.admin("PATCH", FIRST, b" " * (MAX_JSON + 1), "Content-Type: application/json")
    assert (reply.status, str(MAX_JSON) in reply.detail) == (413, True)


def test_405_says_what_is_possible(house: House) -> None:
    reply = house.ask("", "POST", DEVICE, {})
    assert reply.headers["allow"] == "GET, HEAD, PATCH, DELETE, OPTIONS"


def test_other_paths_keep_their_refusals(house: House) -> None:
    reply = house.ask("", "GET", "/nothing/at/all.bin")
    assert (reply.status, reply.headers["content-type"]) == (404, "text/plain; charset=utf-8")


def test_failure_is_a_problem_that_tells_nothing(
    house: House, said: Callable[[], list[str]]
) -> None:
    with closing(sqlite3.connect(house.state / "fleet.db")) as database:
        database.execute("DROP TABLE device")
    reply = house.admin("GET", "devices")
    assert (reply.status, reply.detail) == (500, "the server failed; its log says how")
    assert any("ERROR" in line for line in said())


def test_full_disk_is_a_507(folder: Path, furnished: Any, small_disk: Path) -> None:
    shutil.copy(furnished[0], small_disk)
    site = site_of(folder, state=str(small_disk))
    house = House(site, furnished[1])
    try:
        with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 10)):
                pass
        reply = house.admin("POST", "tokens", {"name": "x" * 64, "role": "viewer"})
        replies = [house.admin("PATCH", DEVICE, {"notes": "x" * 4000}) for _ in range(20)]
        assert 507 in {reply.status, *(each.status for each in replies)}
        assert next(each for each in (reply, *replies) if each.status == 507).detail
    finally:
        for close in site.closers:
            close()


# -- 3. Who may -----------------------------------------------------------------------------------

MAY = {  # the least role; "": everybody
    "POST /setup": "", "POST /session": "", "GET /openapi.json": "",
    "GET /session": "viewer", "DELETE /session": "viewer",
    "GET /accounts": "admin", "POST /accounts": "admin",
    "PATCH /accounts/{account}": "admin", "DELETE /accounts/{account}": "admin",
    "GET /tokens": "admin", "POST /tokens": "admin", "DELETE /tokens/{token}": "admin",
    "GET /devices": "viewer", "GET /devices/{device}": "viewer",
    "PATCH /devices/{device}": "publisher", "DELETE /devices/{device}": "publisher",
    "GET /projects": "viewer", "GET /projects/{project}": "viewer",
    "PUT /projects/{project}": "publisher", "DELETE /projects/{project}": "admin",
    "GET /projects/{project}/admissions": "viewer",
    "PUT /projects/{project}/admissions/{device}": "publisher",
    "DELETE /projects/{project}/admissions/{device}": "publisher",
    "GET /projects/{project}/releases": "viewer",
    "POST /projects/{project}/releases": "publisher", "POST /releases": "publisher",
    "GET /projects/{project}/releases/{version}": "viewer",
    "PUT /projects/{project}/releases/{version}": "publisher",
    "PATCH /projects/{project}/releases/{version}": "publisher",
    "DELETE /projects/{project}/releases/{version}": "admin",
    "GET /audit": "admin", "GET /audit/verified": "admin", "GET /audit.jsonl": "admin",
    "GET /rollouts": "viewer", "POST /projects/{project}/rollouts": "publisher",
    "GET /rollouts/{rollout}": "viewer", "POST /rollouts/{rollout}/control": "publisher",
    "GET /rollouts/{rollout}/devices": "viewer", "GET /rollouts/{rollout}/attempts": "viewer",
    "GET /devices/{device}/attempts": "viewer", "POST /devices/{device}/forgive": "publisher",
    "GET /explain": "viewer", "POST /triggers": "publisher", "DELETE /triggers": "publisher",
    "GET /devices/{device}/policy": "viewer", "PUT /devices/{device}/policy": "publisher",
    "GET /projects/{project}/policy": "viewer", "PUT /projects/{project}/policy": "publisher",
    "GET /projects/{project}/releases/{version}/channel": "viewer",
    "PUT /projects/{project}/releases/{version}/channel": "publisher",
    "GET /groups": "viewer", "GET /groups/{group}": "viewer",
    "PUT /groups/{group}": "publisher", "DELETE /groups/{group}": "publisher",
    "GET /devices/{device}/approvals": "viewer",
    "PUT /devices/{device}/approvals/{version}": "publisher",
    "DELETE /devices/{device}/approvals/{version}": "publisher",
    "GET /webhooks": "admin", "POST /webhooks": "admin", "DELETE /webhooks/{webhook}": "admin",
    "POST /webhooks/{webhook}/test": "admin", "GET /webhooks/{webhook}/deliveries": "admin",
}  # fmt: skip


def test_every_operation_stands_in_the_protocols() -> None:
    text = (ROOT / "docs" / "protocols.md").read_text()
    table = text.partition("## The API")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([A-Z]+ /.*?)` \| (\w+) \|", table, re.MULTILINE)
    assert dict(found) == {operation: role or "everybody" for operation, role in MAY.items()}


RANKS = {"": -1, "device": -1, "viewer": 0, "publisher": 1, "admin": 2}


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory, furnished: Any) -> Iterator[House]:
    """A house that no test changes."""
    folder = tmp_path_factory.mktemp("still") / "firmware"
    put(folder / "firmware-1.0.0.bin", esp8266_image("firmware", "1.0.0"))
    with opened(folder, furnished) as house:
        yield house


def filled(template: str) -> str:
    """A path of nothing that is there."""
    return re.sub(r"{\w+}", "none", template)


@pytest.mark.parametrize("who", RANKS)
@pytest.mark.parametrize("operation", MAY)
def test_operation_asks_for_its_role(operation: str, who: str, still: House) -> None:
    method, _, template = operation.partition(" ")
    upload = method != "PATCH" and "/releases" in template
    path = filled(template).removeprefix("/") + "?wrong=1" * (template != "/session")
    reply = still.ask(who, method, path, b"no image" if upload else {})
    least = MAY[operation]
    if least and RANKS[who] < RANKS[least]:
        assert reply.status == (403 if who else 401)
        if not who:
            assert reply.headers["www-authenticate"].startswith("Bearer ")
    else:
        assert reply.status not in {401, 403, 500}


def test_table_of_roles_is_whole(still: House) -> None:
    paths = still.ask("", "GET", "openapi.json").data["paths"]
    found = {
        f"{method.upper()} {path.removeprefix(BASE)}": about.get("description", "")
        for path, methods in paths.items()
        for method, about in methods.items()
    }
    assert found == {name: f"For a {role}." if role else "" for name, role in MAY.items()}


def test_token_of_the_core_opens_no_api_and_the_networks_hold(folder: Path, furnished: Any) -> None:
    nets = ota_server.read_config(["--allow", "10.0.0.0/8,192.0.2.0/24"], {}).allow
    with opened(folder, furnished, token="tok", allow=nets) as house:  # noqa: S106
        assert house.ask("viewer", "GET", "devices").status == 200
        assert house.ask("", "GET", "openapi.json").status == 200
        core = "Authorization: Bearer tok"
        assert house.ask("", "GET", "devices", None, core).status == 401
        assert house.ask("", "GET", "/firmware/latest.bin", None, core).status == 200
        assert house.ask("", "GET", "/firmware/latest.bin").status == 401
        head = parse_head(request(f"{BASE}/devices"), "198.51.100.1")
        refused = read(answer(house.site, head))
        assert (refused.status, "in none of the networks" in refused.detail) == (403, True)


# -- 4. Lists -------------------------------------------------------------------------------------

LISTS = [
    "accounts", "tokens", "devices", "projects", "projects/p/admissions", "projects/p/releases",
    "webhooks", "webhooks/1/deliveries", "audit",
    *(f"devices?sort={sort}" for sort in ("-id", "last_seen", "-version", "project")),
    "devices?project=p", "devices?q=5c",
]  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, furnished: Any) -> Iterator[House]:
    """Some of everything."""
    folder = tmp_path_factory.mktemp("full") / "firmware"
    for number in range(7):
        put(folder / f"p-1.{number}.0.bin", esp8266_image("p", f"1.{number}.0"))
        put(folder / f"p{number}-1.0.0.bin", esp8266_image(f"p{number}", "1.0.0"))
    with opened(folder, furnished) as house:
        registry = Registry(house.state / "fleet.db")
        accounts = Accounts(Ledger(registry), secure=False)
        for number in range(13):
            registry.admit("p", f"device {number}")
            accounts.mint(f"token {number}", "viewer", "", who="test")
            seen = (f"5c{number:010x}", f"p{number % 3 or ''}", None, f"{number % 5}.0.0", None)
            at = NOW + number % 4
            registry.seen(Sighting(*seen, None, None, None, "", at, downloaded=False))
            assert house.admin("POST", "webhooks", {"url": "http://127.0.0.1:1/"}).status == 201
            row = "ping", '{"at": 1}', int(time.time()) + 40_000  # not soon
            registry.write(
                "INSERT INTO delivery (webhook, event, body, due) VALUES (1, ?, ?, ?)", *row
            )
        registry.close()
        house.admin("POST", "accounts", GREET)
        yield house


@settings(max_examples=15, deadline=None, derandomize=True)
@given(limits=st.lists(st.integers(1, 12), min_size=1, max_size=4))
@pytest.mark.parametrize("path", LISTS)
def test_pages_of_a_list_are_the_list(path: str, limits: list[int], full: House) -> None:
    join = "&" if "?" in path else "?"
    whole = full.admin("GET", f"{path}{join}limit=1000").data
    assert whole["next"] is None
    assert len(whole["items"]) > 1
    found: list[object] = []
    cursor = ""
    for turn in range(200):
        limit = limits[turn % len(limits)]
        more = f"&cursor={quote(cursor)}" if cursor else ""
        page = full.admin("GET", f"{path}{join}limit={limit}{more}").data
        assert len(page["items"]) <= limit
        found += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert found == whole["items"]


@given(st.lists(st.integers() | st.text(), max_size=4))
def test_cursor_is_read_as_it_was_written(place: list[Any]) -> None:
    text = write_cursor(place)
    assert re.fullmatch("[A-Za-z0-9_-]*", text)
    assert read_cursor(text, *map(type, place)) == place


@given(st.text() | st.binary().map(lambda data: write_cursor([data.hex()])))
def test_cursor_that_is_none_is_refused(text: str) -> None:
    try:
        assert read_cursor(text, int) == [] or text
    except Refused as refused:
        assert refused.status == 422  # noqa: PT017 - or it is none


def test_page_of_ten_thousand_devices_is_quicker_than_all_pages(
    folder: Path, furnished: Any
) -> None:
    with opened(folder, furnished) as house:
        registry = Registry(house.state / "fleet.db")
        for number in range(10_000):
            version = f"{number % 5}.{number % 300}.{number % 7}"
            seen = (f"5c{number:010x}", f"p{number % 20}", "esp8266", version, None, None, 1, None)
            registry.seen(Sighting(*seen, "", NOW + number, downloaded=False))
        registry.close()

        def quickest(*targets: str) -> float:
            """Seconds for these lists, when nobody else is at work."""

            def once() -> float:
                began = time.perf_counter()
                assert {house.admin("GET", each).status for each in targets} == {200}
                return time.perf_counter() - began

            return min(once() for _ in range(5))

        ends = [write_cursor([normal_id(f"5c{number:010x}")]) for number in range(0, 10_000, 1000)]
        whole = quickest(*(f"devices?limit=1000&cursor={end}" for end in ends))
        for path in ("", "sort=-last_seen", "sort=version", "project=p7", "q=5c", "sort=-version"):
            first = house.admin("GET", f"devices?{path}").data
            assert len(first["items"]) == 100
            target = f"devices?{path}&cursor={first['next']}"
            assert quickest(target) < whole / 2, path  # all of 9,000 versions are sorted for one


# -- 5. The document ------------------------------------------------------------------------------


def test_document_is_valid_and_is_what_the_routes_are(still: House) -> None:
    document = still.ask("", "GET", "openapi.json").data
    validate(document)
    own = [route for route in still.site.routes if route.pattern.fullmatch(f"{BASE}/nothing")]
    assert [route.methods for route in own[:1]] == [()]  # the one for what is not there
    found = {still.site.route(BASE + filled(path.removeprefix(BASE))): methods
             for path, methods in document["paths"].items()}  # fmt: skip
    assert len(found) == len(document["paths"])
    for route, methods in found.items():
        wanted = {method.upper() for method in methods} | ({"HEAD"} if "get" in methods else set())
        assert set(route.methods) == wanted
        assert route.blocking
    api = [route for route in still.site.routes if r"api" in route.pattern.pattern]
    assert len(api) == len(found) + 1


def test_document_says_what_each_operation_takes_and_gives(still: House) -> None:
    document = still.ask("", "GET", "openapi.json").data
    names = [
        about["operationId"] for methods in document["paths"].values() for about in methods.values()
    ]
    assert len(names) == len(set(names))
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            assert about["summary"], path
            bodiless = ("/admissions/", "/approvals/", "/forgive")
            assert ("requestBody" in about) == (
                method in {"post", "put", "patch"}
                and not any(each in path for each in bodiless)
                and not path.endswith("/test")
            )
            assert about["responses"]["422"]["content"].keys() == {"application/problem+json"}


# -- 6. Nobody writes without a credential --------------------------------------------------------

METHODS = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "post",
    "PROPFIND", "COPY", "MOVE", "MKCOL", "LINK",
)  # fmt: skip
BODIES = {  # what each would take, if somebody sent it who may
    "setup": {"secret": "x", "email": "eve@example.org", "password": PASSWORD},
    "session": {"email": EMAIL, "password": "wrong"},
    "accounts": {**GREET, "role": "admin"}, "accounts/1": {"password": "another horse"},
    "tokens": {"name": "x", "role": "admin"}, DEVICE: {"notes": "x", "pin": "1.0.0"},
    "projects/lamp": {"aliases": ["x"]}, "projects/lamp/rollouts": {"version": "1.0.0"},
    "rollouts/1/control": {"do": "abort"}, f"{DEVICE}/policy": {"hold": "yes"},
    "projects/lamp/policy": {"hold": "yes"}, "groups/attic": {"hold": "yes"},
    f"{FIRST}/channel": {"channel": "beta"},
    "webhooks": {"url": "http://192.0.2.1/"}, "triggers": {"group": "attic"},
}  # fmt: skip
CORE = [
    "/", "/healthz", "/favicon.ico", "/esp32fota.json", "/firmware", "/firmware/",
    "/firmware.bin", "/update?dev=x",
    "/firmware/latest.bin", "/firmware/versions", "/firmware/manifest.json", "/_catalog",
    "/firmware/firmware-1.10.0.bin", "/firmware/esp32fota.json", "/firmware/latest.bin.md5",
    "/devices", "/devices/x", "/files/x", "/files/a/b", "/api", "/api/", "/api/v1", "/api/v1/x",
    "/api/v2/devices", "//api/v1/devices", "/API/v1/devices", "/admin", "/admin/setup", "/state",
    "/fleet.db", "/api/v1/../v1/devices", "/metrics", "/readyz",
]  # fmt: skip
FORGED = [(), ("Authorization: Bearer ota_none",), ("Authorization: Basic YTpi",),
          ("Cookie: ota=none; __Host-ota=none", "X-CSRF-Token: none")]  # fmt: skip


def state_of(house: House) -> str:
    """A digest of every row and every file, but for what the server notes by itself."""
    own = ("tally", "spread", "announced")
    found = hashlib.sha256()
    with closing(sqlite3.connect(house.state / "fleet.db")) as database:
        for line in database.iterdump():
            if not line.startswith(tuple(f'INSERT INTO "{table}"' for table in own)):
                found.update(line.encode())
    for root in (house.state, Path(house.site.config.dir)):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("fleet.db"):
                found.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return found.hexdigest()


def targets(site: Site, house: House) -> list[str]:
    """Paths of every route but those of pages, which have a test of their own (test_pages.py)."""
    real = {"account": "1", "token": "1", "device": MACS[0], "project": "lamp", "version": "1.0.0"}
    real |= {"rollout": "1", "group": "attic"}
    real["webhook"] = "1"
    paths = house.ask("", "GET", "openapi.json").data["paths"]
    found = [*CORE, *(re.sub(r"{(\w+)}", lambda name: real[name[1]], path) for path in paths)]
    hit = {id(site.route(path.partition("?")[0])) for path in found}
    missed = [route.pattern.pattern for route in site.routes if id(route) not in hit]
    assert [pattern for pattern in missed if not pattern.startswith(("/admin", "(?s)/admin"))] == []
    return found


@pytest.mark.parametrize("fields", FORGED, ids=["nothing", "bearer", "basic", "cookie"])
def test_nothing_is_written_without_a_credential(
    fields: tuple[str, ...], folder: Path, furnished: Any
) -> None:
    with opened(folder, furnished, us_username="u", us_password="p") as house:  # noqa: S106
        house.admin("PUT", "projects/lamp", {"aliases": ["bulb"]})
        house.admin("PUT", "projects/lamp/releases/1.0.0", LAMP)
        assert house.admin("POST", "projects/lamp/rollouts", {"version": "1.0.0"}).status == 201
        before = state_of(house)
        statuses = set()
        for target in targets(house.site, house):
            for method in METHODS:
                body = BODIES.get(
                    target.removeprefix(f"{BASE}/"), {"notes": "x", "withdrawn": True}
                )
                for data in (body, NEW) if method in {"POST", "PUT"} else (body,):
                    reply = house.ask("", method, target, data, *fields)
                    statuses.add(reply.status)
                    assert reply.status != 500, (method, target)
                    if reply.status < 300:
                        assert method in {"GET", "HEAD", "OPTIONS"}, (method, target)
        assert state_of(house) == before
    assert {401, 403, 404, 405} <= statuses


def test_real_server_writes_nothing_without_a_credential(house: House) -> None:
    before = state_of(house)
    with standing(house.site) as stand:
        for method, path in ((each[1], each[2]) for each in DONE if each[1] != "GET"):
            reply = curl(stand, "", method, path, b"{}" if "releases" not in path else NEW)
            assert reply.status in {401, 413, 415, 422}, (method, path)
    assert state_of(house) == before


# -- 7. By a real server --------------------------------------------------------------------------


def curl(
    stand: Stand, token: str, method: str, path: str, body: bytes | None = None, **fields: str
) -> Answer:
    """A client of its own: one connection, one request."""
    with closing(HTTPConnection("127.0.0.1", stand.port, timeout=10)) as client:
        given = {"Authorization": f"Bearer {token}"} if token else {}
        kind = {"Content-Type": "application/json"} if body is not None else {}
        client.request(method, f"{BASE}/{path}", body, {**given, **kind, **fields})
        reply = client.getresponse()
        return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())


@pytest.fixture
def stand(house: House) -> Iterator[Stand]:
    """The house, open to the street."""
    with standing(house.site) as stand:
        yield stand


def test_day_of_an_operator(house: House, stand: Stand) -> None:
    say = functools.partial(curl, stand, house.tokens["admin"])
    assert say("PUT", "projects/garage", b'{"chips": ["esp8266"]}').status == 200
    image = esp8266_image("garage", "3.0.0")
    stream = {"Content-Type": "application/octet-stream"}
    assert say("PUT", "projects/garage/releases/3.0.0", image, **stream).status == 201
    assert say("PUT", "projects/garage/releases/3.0.0", image, **stream).status == 200
    assert say("PATCH", DEVICE, json.dumps({"pin": "3.0.0"}).encode()).data["pin"] == "3.0.0"
    with stand.dial() as wire:
        found = wire.ask("/garage", "x-ESP8266-version: 1.0.0")
    assert (found.status, found.body) == (200, image)
    assert say("DELETE", "projects/garage/releases/3.0.0").status == 204
    assert say("DELETE", "projects/garage").status == 204
    lines = say("GET", "audit.jsonl").body.splitlines()
    assert [json.loads(line)["action"] for line in lines[-5:]] == [
        "put project", "upload", "annotate device", "delete release", "drop project",
    ]  # fmt: skip


def test_image_comes_as_a_form(house: House, stand: Stand) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.bin"\r\n\r\n'
    form += NEW + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = curl(stand, house.tokens["publisher"], "POST", "releases", form, **kind)
    assert (reply.status, reply.data["version"]) == (201, "2.0.0")


@pytest.mark.parametrize(
    ("token", "path", "fields", "status"),
    [
        ("", FIRST, (), 401),
        ("viewer", FIRST, (), 403),
        ("lamp", "projects/firmware/releases/2.0.0", (), 403),
        ("publisher", "releases/1.0.0", (), 404),
        ("publisher", FIRST, ("Content-Length: 99999999",), 413),
        ("publisher", FIRST, ("Content-Length: 16777217",), 413),
        ("publisher", DEVICE, ("Content-Type: text/plain",), 415),
        ("publisher", DEVICE, ("Content-Length: 99999",), 413),
    ],
)
def test_refusal_comes_before_the_body_is_sent(
    token: str, path: str, fields: tuple[str, ...], status: int, house: House, stand: Stand
) -> None:
    method = "PATCH" if path == DEVICE else "PUT"
    given = [f"Authorization: Bearer {house.tokens[token]}"] if token else []
    given += [] if any("Length" in each for each in fields) else ["Content-Length: 5000"]
    with stand.dial() as wire:
        wire.send(request(f"{BASE}/{path}", *given, *fields, "Expect: 100-continue", method=method))
        head = wire.head()  # and no 100 before it
        body = wire.read(int(head.headers["content-length"]))
    reply = Answer(head.status, head.headers, body)
    assert reply.status == status
    assert reply.detail


def test_body_is_asked_for_where_it_is_taken(house: House, stand: Stand) -> None:
    given = f"Authorization: Bearer {house.tokens['publisher']}"
    length = f"Content-Length: {len(LAMP)}"
    with stand.dial() as wire:
        wire.send(request(f"{BASE}/{FIRST}", given, length, "Expect: 100-continue", method="PUT"))
        assert wire.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(LAMP)
        assert wire.reply().status == 200


@pytest.mark.parametrize("target", [f"{BASE}/{DEVICE}", f"{BASE}/none", "/api"])
@pytest.mark.parametrize(
    ("method", "fields", "statuses"),
    [
        ("PATCH", (), {411, 404}),
        ("PATCH", ("Content-Length: 99999999",), {413, 404}),
        ("BREW", (), {405, 404}),
        ("BREW", ("Content-Length: 99999999",), {413}),
    ],
)
def test_what_the_loop_refuses_is_a_problem_too(
    target: str, method: str, fields: tuple[str, ...], statuses: set[int], house: House,
    stand: Stand,
) -> None:  # fmt: skip
    given = (f"Authorization: Bearer {house.tokens['admin']}", "Content-Type: application/json")
    with stand.dial() as wire:
        reply = wire.ask(target, *given, *fields, method=method)
    found = Answer(reply.status, reply.headers, reply.body)
    assert found.status in statuses
    assert found.detail


def test_put_without_a_body_needs_no_length(house: House, stand: Stand) -> None:
    given = f"Authorization: Bearer {house.tokens['publisher']}"
    with stand.dial() as wire:
        path = f"{BASE}/projects/firmware/admissions/{MACS[1]}"
        assert wire.ask(path, given, method="PUT").status == 204
        assert wire.ask(f"{BASE}/{DEVICE}", given).status == 200  # on the same connection


def test_other_server_with_the_same_state_is_heard_of(house: House, stand: Stand) -> None:
    with closing(Registry(house.state / "fleet.db")) as other:
        _, token = Accounts(Ledger(other), secure=False).mint("x", "viewer", "", who="test")
    wait_until(lambda: curl(stand, token, "GET", "session").status == 200)
