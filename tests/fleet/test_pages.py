"""The pages: what each shows to whom, what its forms do, and what no text in them can do."""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit
from xml.etree.ElementTree import Element

import html5lib
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ota_server
from ota_fleet import home_pages
from ota_fleet.accounts import ROLES, TRIES, Accounts
from ota_fleet.history import DAY, Count, Share
from ota_fleet.html import (
    STATIC,
    Head,
    Html,
    Series,
    a,
    ago,
    area,
    bars,
    chart,
    choice,
    e,
    form,
    join,
    note,
    pager,
    size_of,
    table,
    tag,
    url,
    when,
)
from ota_fleet.ledger import Ledger
from ota_fleet.pages import MAX_FIELDS, MAX_FORM, Page, Pages, own_path
from ota_fleet.registry import Registry, Sighting
from ota_server import Reply, Site, answer, parse_head, unnamed_file
from tests.conftest import put
from tests.core.wire import request, standing
from tests.data.make_images import esp32_image, esp8266_image
from tests.fleet.test_fleet import remembering
from tests.test_house import ROOT

PASSWORD = "correct horse"  # noqa: S105
PEOPLE = {role: f"{role}@example.org" for role in ROLES}
MAC = "5C:CF:7F:00:00:01"
FORM = "application/x-www-form-urlencoded"
NOT_HTML = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
XSS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</textarea></title></style><svg/onload=alert(1)>",
    "javascript:alert(1)//",
    "{{7*7}}<!--",
    "&lt;b&gt;&amp;",
)


# -- A browser, as far as these pages need one -----------------------------------------------------


class Seen(NamedTuple):
    """A reply, read."""

    status: int
    fields: tuple[tuple[str, str], ...]
    text: str

    def field(self, name: str) -> str:
        """A header field; "": it is not there."""
        return next((value for key, value in self.fields if key.lower() == name.lower()), "")

    @property
    def tree(self) -> Element:
        """What a browser makes of it. html5lib.html5parser.ParseError: it is not well-formed."""
        parser = html5lib.HTMLParser(namespaceHTMLElements=False, strict=True)
        tree = parser.parse(self.text)
        assert isinstance(tree, Element)
        return tree

    def texts(self, name: str, **attributes: str) -> list[str]:
        """What elements hold as text."""
        return [
            " ".join("".join(each.itertext()).split())
            for each in self.tree.iter(name)
            if all(each.get(key) == value for key, value in attributes.items())
        ]

    @property
    def alert(self) -> str:
        """Why it did not work."""
        return "; ".join(self.texts("p", role="alert"))

    @property
    def said(self) -> str:
        """What was done."""
        return "; ".join(self.texts("p", role="status"))

    @property
    def csrf(self) -> str:
        """What its forms send."""
        found = {
            each.get("value", "") for each in self.tree.iter("input") if each.get("name") == "csrf"
        }
        assert len(found) <= 1
        return found.pop() if found else ""

    def control(self, name: str) -> Element:
        """The last control with this name."""
        kinds = "input", "select", "textarea", "button"
        return [
            each for each in self.tree.iter() if each.tag in kinds and each.get("name") == name
        ][-1]


@dataclass
class Browser:
    """Somebody who looks at pages: keeps cookies, and follows where a form leads."""

    site: Site
    cookies: dict[str, str] = field(default_factory=dict)
    peer: str = "192.0.2.9"

    def ask(self, method: str, path: str, *fields: str, body: bytes | None = None) -> Seen:
        """The reply to one request."""
        jar = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        given = [f"Cookie: {jar}"] * bool(jar) + [f"Content-Length: {len(body or b'')}"] * (
            body is not None
        )
        head = parse_head(request(path, *given, *fields, method=method), self.peer)
        with tempfile.TemporaryDirectory() as folder, unnamed_file(folder) as file:
            file.write(body or b"")
            file.seek(0)
            raw = FileIO(file.fileno(), closefd=False)
            return self._read(answer(self.site, head._replace(body=raw)))

    def _read(self, reply: Reply) -> Seen:
        assert isinstance(reply.body, bytes)
        for name, value in reply.headers:
            assert value.isprintable()
            assert value.isascii()
            if name == "Set-Cookie":
                key, _, rest = value.partition("=")
                self.cookies[key] = rest.partition(";")[0]
                if "Max-Age=0" in rest:
                    del self.cookies[key]
        return Seen(reply.status, reply.headers, reply.body.decode())

    def get(self, path: str, *fields: str) -> Seen:
        """A page."""
        return self.ask("GET", path, *fields)

    def send(self, path: str, *fields: str, **values: Any) -> Seen:
        """What a form that is sent is answered; with the page's own csrf, unless it is given."""
        if "csrf" not in values:
            values = {"csrf": self.csrf, **values}
        words = urlencode(
            {key: value for key, value in values.items() if value is not None}, doseq=True
        )
        kind = [f"Content-Type: {FORM}"] * (
            not any("content-type" in each.lower() for each in fields)
        )
        return self.ask(
            "POST", path, "Sec-Fetch-Site: same-origin", *kind, *fields, body=words.encode()
        )

    def do(self, path: str, **values: Any) -> Seen:
        """A form that is taken, and the page that it leads to."""
        sent = self.send(path, **values)
        assert sent.status == 303, sent.alert
        return self.get(sent.field("Location"))

    @property
    def csrf(self) -> str:
        """Of the session."""
        seen = self.get("/admin/account")
        return seen.csrf if seen.status == 200 else ""

    def sign_in(self, email: str, password: str = PASSWORD) -> Seen:
        """The answer to e-mail address and password."""
        return self.send("/admin/sign-in", csrf=None, email=email, password=password)


class House(NamedTuple):
    """A site with a memory, and somebody of each role who is signed in."""

    site: Site
    viewer: Browser
    publisher: Browser
    admin: Browser

    def by(self, role: str) -> Browser:
        """Who has this role; "": nobody."""
        return Browser(self.site) if not role else getattr(self, role)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A registry with accounts, devices and a token, to be copied; and the sessions by role."""
    path = tmp_path_factory.mktemp("furnished") / "fleet.db"
    cookies = {}
    with closing(Registry(path)) as registry:
        accounts = Accounts(Ledger(registry), secure=False)
        for role, email in PEOPLE.items():
            accounts.open_account(email, PASSWORD, role, who="test")
            head = parse_head(request("/admin/sign-in", method="POST"), "192.0.2.9")
            cookies[role] = (
                accounts.sign_in(head, email, PASSWORD)[1].partition(";")[0].removeprefix("ota=")
            )
        accounts.mint("CI", "publisher", "", who="test")
        sighting(registry, MAC)
    return path, cookies


def sighting(
    registry: Registry, device: str, project: str = "firmware", version: str = "1.9.0"
) -> None:
    """A device that was just here."""
    registry.seen(
        Sighting(device, project, "esp8266", version, None, None, 4096, "2.2.1", "192.0.2.1",
                 int(time.time()), downloaded=False)
    )  # fmt: skip


@contextmanager
def living(folder: Path, furnished: tuple[Path, dict[str, str]], **options: Any) -> Iterator[House]:
    """A house over a folder, with a copy of what is furnished."""
    state = folder.parent / "state"
    state.mkdir()
    shutil.copy(furnished[0], state)
    with remembering(folder, **options) as site:
        yield House(site, *(Browser(site, {"ota": furnished[1][role]}) for role in ROLES))


@pytest.fixture
def house(folder: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[House]:
    """`firmware` 1.0.0, 1.9.0 and 1.10.0 in the folder; one device, with 1.9.0."""
    with living(folder, furnished) as house:
        yield house


def rows_of(site: Site) -> list[tuple[re.Pattern[str], Page]]:
    """The table of the site's pages."""
    owners = (getattr(route.endpoint, "__self__", None) for route in site.routes)
    pages = next(each for each in owners if isinstance(each, Pages))
    return pages.table


def state_of(site: Site) -> str:
    """Everything that is remembered, but for check-ins, and which releases were told of."""
    with closing(sqlite3.connect(Path(site.config.state) / "fleet.db")) as database:
        own = (line for line in database.iterdump() if "announced" not in line)
        return "\n".join(own)


# -- 1. Every page ---------------------------------------------------------------------------------

PAGES: list[tuple[str, str, str]] = [  # path, who sees it, who changes something by a POST
    ("/admin", "viewer", ""),
    ("/admin/sign-in", "", "anybody"),
    ("/admin/sign-out", "-", "viewer"),
    ("/admin/setup", "", "anybody"),
    ("/admin/accounts", "admin", "admin"),
    ("/admin/tokens", "admin", "admin"),
    ("/admin/account", "viewer", "viewer"),
]
OTHERS = [  # which have tests of their own
    ("/admin/devices", "viewer", "publisher"),
    ("/admin/devices.csv", "viewer", ""),
    ("/admin/devices/{device}", "viewer", "publisher"),
    ("/admin/projects", "viewer", "publisher"),
    ("/admin/projects/{project}", "viewer", "publisher"),
    ("/admin/projects/{project}/policy", "viewer", "publisher"),
    ("/admin/projects/{project}/releases/{version}", "viewer", "publisher"),
    ("/admin/projects/{project}/releases/{version}/{name}", "viewer", ""),
    ("/admin/groups", "viewer", "publisher"),
    ("/admin/groups/{group}", "viewer", "publisher"),
    ("/admin/rollouts", "viewer", ""),
    ("/admin/rollouts/new", "publisher", "publisher"),
    ("/admin/rollouts/{rollout}", "viewer", "publisher"),
    ("/admin/webhooks", "admin", "admin"),
    ("/admin/upload", "publisher", "publisher"),
    ("/admin/admissions", "viewer", "publisher"),
    ("/admin/activity", "viewer", ""),
    ("/admin/activity.json", "viewer", ""),
]
WHO = ("", *ROLES)
SHOWN = [(path, who, role) for path, role, _ in PAGES if role in ROLES for who in WHO]


def check_page(seen: Seen, kept: str = "no-store") -> None:
    """What holds for all pages: safe to show, whole, and fit for a screen reader."""
    check_fields(seen, kept)
    tree = seen.tree
    assert tree.get("lang") == "en"
    assert [len(list(tree.iter(name))) for name in ("header", "main", "footer", "h1", "title")] == [
        1
    ] * 5
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert len(ids) == len(set(ids))
    for each in tree.iter():
        check_element(each)
    check_labels(tree)


def check_fields(seen: Seen, kept: str = "no-store") -> None:
    """The fields of a reply that keep other pages and other people out."""
    policy = dict(
        part.strip().split(" ", 1) for part in seen.field("Content-Security-Policy").split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["style-src"] == policy["script-src"] == policy["form-action"] == "'self'"
    assert "unsafe" not in str(policy)
    assert seen.field("X-Frame-Options") == "DENY"
    assert seen.field("X-Content-Type-Options") == "nosniff"
    assert seen.field("Referrer-Policy") == "same-origin"
    assert seen.field("Cache-Control") == kept
    assert seen.field("Content-Type") == "text/html; charset=utf-8"


def check_element(each: Element) -> None:
    """No script and no style of its own, no way to another server."""
    assert isinstance(each.tag, str)
    assert each.tag.rpartition("}")[2] not in {"style", "iframe", "object", "embed", "base", "img"}
    for name, value in each.attrib.items():
        assert not name.lower().startswith("on"), name
        assert name not in {"style", "srcdoc"}
        if name in {"href", "src", "action", "formaction"}:
            assert re.match(r"/(?!/)|\?|#", value), value
    if each.tag == "script":
        assert each.get("src") in STATIC
        assert not each.text
    if each.tag == "form" and each.get("method") == "post":
        assert any(child.get("name") == "csrf" for child in each.iter("input")) or is_public(each)


def is_public(each: Element) -> bool:
    """Whether a form is for who is not signed in."""
    return each.get("action") in {"/admin/sign-in", "/admin/setup"}


def check_labels(tree: Element) -> None:
    """Every control has a name, every table a caption and heads, every picture a title."""
    labelled = {control for label in tree.iter("label") for control in label.iter()}
    for each in tree.iter():
        if each.tag in {"input", "select", "textarea"} and each.get("type") != "hidden":
            assert each in labelled or each.get("aria-label"), each.attrib
        if each.tag == "button":
            assert each.get("aria-label") or "".join(each.itertext()).strip()
        if each.tag == "table":
            assert [child.tag for child in each] == ["caption", "thead", "tbody"]
            heads = list(each.iter("th"))
            assert all("".join(head.itertext()).strip() for head in heads)
            assert all(len(row) == len(heads) for row in each.iter("tr"))
        if each.get("role") == "img":
            assert each[0].tag.endswith("title")
        if each.tag == "nav":
            assert each.get("aria-label")


def test_the_table_has_every_page(house: House) -> None:
    found = [
        (
            row.path,
            row.role if row.show else "-",
            (row.acts if row.role else "anybody") * bool(row.act),
        )
        for _, row in rows_of(house.site)
    ]
    assert sorted(found) == sorted(PAGES + OTHERS)


@pytest.mark.parametrize(("path", "who", "role"), SHOWN)
def test_page_is_shown_to_who_may_see_it(house: House, path: str, who: str, role: str) -> None:
    seen = house.by(who).get(path)
    if not who:
        assert (seen.status, urlsplit(seen.field("Location")).path) == (303, "/admin/sign-in")
        return
    check_page(seen)
    assert seen.status == (200 if ROLES.index(who) >= ROLES.index(role) else 403)
    if seen.status == 403:
        assert f"the role {role} is needed" in seen.alert


def test_page_that_is_not_there_says_so_to_who_is_signed_in(house: House) -> None:
    for path in ("/admin/nothing", "/admin/sign-in/x", "/admin/%FF", "/admin/%3Cb%3E"):
        seen = house.viewer.get(path)
        check_page(seen)
        assert (seen.status, seen.alert) == (404, "there is no such page")
        assert house.by("").get(path).status == 303


@pytest.mark.parametrize("path", [path for path, role, _ in PAGES if role != "-"])
def test_head_is_a_get_without_its_body(house: House, path: str) -> None:
    got, headed = (house.admin.ask(method, path) for method in ("GET", "HEAD"))
    assert (headed.status, headed.text) == (got.status, "")
    assert headed.field("Content-Length") == got.field("Content-Length")


@pytest.mark.parametrize("path", [path for path, _, acts in PAGES if not acts])
def test_page_without_a_form_takes_no_post(house: House, path: str) -> None:
    assert house.admin.send(path).status == 405


def test_navigation_has_what_one_may_see(house: House) -> None:
    links = {role: set(house.by(role).get("/admin").texts("a")) for role in ROLES}
    assert {"Accounts", "Tokens"} <= links["admin"]
    assert links["viewer"].isdisjoint({"Accounts", "Tokens"})
    current = [
        each for each in house.admin.get("/admin/tokens").tree.iter("a") if each.get("aria-current")
    ]
    assert [(each.text, each.get("aria-current")) for each in current] == [("Tokens", "page")]


# -- 2. Who may ----------------------------------------------------------------------------------

ACTS = [(path, acts) for path, _, acts in PAGES if acts in ROLES]


@pytest.mark.parametrize(("path", "acts"), ACTS)
@pytest.mark.parametrize("csrf", ["", "0" * 64, "of another session"])
def test_form_without_the_right_secret_is_refused(
    house: House, path: str, acts: str, csrf: str
) -> None:
    other = house.by(next(role for role in ROLES if role != acts)).csrf
    before = state_of(house.site)
    seen = house.by(acts).send(path, csrf=other if csrf.startswith("of") else csrf, do="mint")
    assert (seen.status, state_of(house.site)) == (403, before)
    assert "of an earlier session" in seen.alert
    check_page(seen)


FOREIGN = [
    "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: http://evil.example",
    "Origin: null", "Origin: http://ota.evil.example",
]  # fmt: skip


@pytest.mark.parametrize("field", FOREIGN)
@pytest.mark.parametrize("path", [path for path, _, acts in PAGES if acts])
def test_form_of_another_server_is_refused(house: House, path: str, field: str) -> None:
    """Before its body is received, and signing in as well."""
    values = {"csrf": house.admin.csrf, "email": PEOPLE["viewer"], "password": PASSWORD}
    before = state_of(house.site)
    sent = house.admin.ask(
        "POST", path, field, f"Content-Type: {FORM}", body=urlencode(values).encode()
    )
    assert (sent.status, state_of(house.site)) == (403, before)
    assert "a page of another server sent this" in sent.alert


POWERLESS = [
    (path, who)
    for path, acts in ACTS
    for who in WHO
    if not who or ROLES.index(who) < ROLES.index(acts)
]


@pytest.mark.parametrize(("path", "who"), POWERLESS)
def test_who_has_not_the_role_changes_nothing(house: House, path: str, who: str) -> None:
    before = state_of(house.site)
    seen = house.by(who).send(path, do="open", sure="1", id="1", name="x", role="admin",
                              email="eve@example.org", password=PASSWORD)  # fmt: skip
    assert (seen.status, state_of(house.site)) == (403 if who else 401, before)


FORGED = [(), ("Authorization: Bearer ota_none",), ("Authorization: Basic YTpi",),
          ("Cookie: ota=none; __Host-ota=none", "X-CSRF-Token: none")]  # fmt: skip


@pytest.mark.parametrize("fields", FORGED, ids=["nothing", "bearer", "basic", "cookie"])
def test_nothing_is_written_without_a_session(house: House, fields: tuple[str, ...]) -> None:
    paths = [re.sub(r"{\w+}", "x", path) for path, _, _ in PAGES]
    before = state_of(house.site)
    for path in (*paths, "/admin/x", "/admin/static/x", "/admin//account", "/ADMIN/account"):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
            body = urlencode({"email": "eve@example.org", "password": PASSWORD, "role": "admin",
                              "do": "open", "sure": "1", "id": "1"})  # fmt: skip
            kind = f"Content-Type: {FORM}"
            seen = Browser(house.site).ask(method, path, kind, *fields, body=body.encode())
            assert seen.status != 500, (method, path)
            if method == "POST":
                assert seen.status in {303, 401, 403, 404, 405, 409}, path
    assert state_of(house.site) == before


def test_token_opens_no_page(house: House) -> None:
    """It is for programs, which have the API; a page's session has a secret against forgery."""
    words = {
        "csrf": house.admin.csrf,
        "do": "mint",
        "name": "x",
        "role": "admin",
        "project": "",
        "device": "",
    }
    token = re.search("ota_[A-Za-z0-9_-]{32}", house.admin.send("/admin/tokens", **words).text)
    assert token is not None
    field = f"Authorization: Bearer {token[0]}"
    assert Browser(house.site).get("/admin", field).status == 303
    assert Browser(house.site).send("/admin/accounts", field, do="open").status == 401


def test_secret_may_come_in_a_header(house: House) -> None:
    """As scripts send it that have no form."""
    field = f"X-CSRF-Token: {house.viewer.csrf}"
    assert house.viewer.send("/admin/account", field, csrf=None, do="end").status == 303


def test_token_of_images_does_not_shut_the_pages_but_networks_do(
    folder: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    networks = ota_server.read_config(["--allow", "192.0.2.0/24"], {}).allow
    with living(folder, furnished, token="secret", allow=networks) as house:  # noqa: S106
        assert house.viewer.get("/admin").status == 200
        house.viewer.peer = "198.51.100.1"
        assert house.viewer.get("/admin").status == 403
        assert house.viewer.get(next(iter(STATIC))).status == 403


# -- 3. Signing in -------------------------------------------------------------------------------

NEXT = [
    ("", "/admin"),
    ("/admin", "/admin"),
    ("/admin/devices?q=a%20b&sort=-id", "/admin/devices?q=a%20b&sort=-id"),
    ("/admin?x=1", "/admin?x=1"),
    ("//evil.example", "/admin"),
    ("/\\evil.example", "/admin"),
    ("/admin\\@evil.example", "/admin"),
    ("/admin/\\evil", "/admin"),
    ("/administrator", "/admin"),
    ("/admin.evil.example", "/admin"),
    ("https://evil.example/admin", "/admin"),
    ("javascript:alert(1)", "/admin"),
    ("/", "/admin"),
    ("/admin/\r\nSet-Cookie: x=y", "/admin"),
    ("/admin/ä", "/admin"),
    ("/admin/\t/evil", "/admin"),
]


@pytest.mark.parametrize(("given_", "wanted"), NEXT)
def test_after_signing_in_one_goes_on_here_only(given_: str, wanted: str) -> None:
    assert own_path(given_) == wanted


def test_one_signs_in_and_comes_back(house: House) -> None:
    browser = Browser(house.site)
    seen = browser.get("/admin/account?x=%3Cb%3E")
    assert seen.status == 303
    assert parse_qs(urlsplit(seen.field("Location")).query) == {
        "next": ["/admin/account?x=%3Cb%3E"]
    }
    page = browser.get(seen.field("Location"))
    check_page(page)
    there = page.control("next").get("value")
    sent = browser.send("/admin/sign-in", email=PEOPLE["viewer"], password=PASSWORD, next=there)
    assert (sent.status, sent.field("Location")) == (303, "/admin/account?x=%3Cb%3E")
    assert re.fullmatch(r"ota=[\w-]{32}; Path=/; Max-Age=1209600; HttpOnly; SameSite=Strict",
                        sent.field("Set-Cookie"))  # fmt: skip
    assert PEOPLE["viewer"] in browser.get("/admin").text
    assert browser.get("/admin/sign-in?next=/admin/account").field("Location") == "/admin/account"


@pytest.mark.parametrize("email", [PEOPLE["viewer"], "nobody@example.org", *XSS])
def test_wrong_password_shows_the_form_again(house: House, email: str) -> None:
    browser = Browser(house.site)
    seen = browser.sign_in(email, "wrong")
    check_page(seen)
    assert (seen.status, seen.alert) == (401, "the e-mail address or the password is wrong")
    assert seen.control("email").get("value") == email
    assert not seen.control("password").get("value")
    assert browser.cookies == {}


def test_who_guesses_has_to_wait(house: House) -> None:
    browser = Browser(house.site)
    statuses = [
        browser.sign_in(PEOPLE["admin"], f"wrong {number}").status for number in range(TRIES)
    ]
    assert statuses == [401] * TRIES
    seen = browser.sign_in(PEOPLE["admin"])
    check_page(seen)
    assert (seen.status, seen.alert[:24]) == (429, "too many wrong passwords")
    assert 0 < int(seen.field("Retry-After")) <= 60


def test_who_signs_out_is_out(house: House) -> None:
    kept = dict(house.viewer.cookies)
    seen = house.viewer.do("/admin/sign-out")
    assert (seen.said, house.viewer.cookies) == ("You are signed out.", {})
    assert Browser(house.site, kept).get("/admin").status == 303


def test_link_of_another_server_finds_who_is_signed_in(house: House) -> None:
    """A cookie that is SameSite=Strict comes along on the second way only."""
    there = "/admin/sign-in?next=%2Fadmin%2Faccount"
    seen = Browser(house.site).get(there, "Sec-Fetch-Site: cross-site")
    assert (seen.status, seen.field("Refresh")) == (200, "0; url=/admin/account")
    assert seen.field("X-Frame-Options") == "DENY"
    assert Browser(house.site).get(there, "Sec-Fetch-Site: same-origin").field("Refresh") == ""


def test_first_administrator_is_made_by_the_link_of_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with remembering(folder) as site:
        secret = caplog.text.partition("/admin/setup#")[2].split()[0]
        browser = Browser(site)
        assert (
            browser.get(browser.get("/admin").field("Location")).field("Location") == "/admin/setup"
        )
        check_page(browser.get("/admin/setup"))
        words = {"csrf": None, "secret": secret, "email": "Ada@Example.org", "password": "short"}
        seen = browser.send("/admin/setup", **words)
        check_page(seen)
        assert (seen.status, seen.control("email").get("value")) == (422, "Ada@Example.org")
        assert seen.control("secret").get("value") == secret
        assert (
            browser.send("/admin/setup", **{**words, "secret": "x", "password": PASSWORD}).status
            == 403
        )
        sent = browser.send("/admin/setup", **{**words, "password": PASSWORD})
        assert sent.status == 303
        page = browser.get("/admin")
        assert page.said == "Welcome. This is your fleet."
        assert "ada@example.org" in page.text
        assert browser.get("/admin/setup").status == 303
        assert Browser(site).send("/admin/setup", **words).status == 303
        assert secret not in page.text


# -- 4. Accounts, tokens, one's own account --------------------------------------------------------


def emails(seen: Seen) -> list[str]:
    """Those in the list."""
    return [
        text.removesuffix(" you") for text in seen.texts("td", **{"data-label": "E-mail address"})
    ]


def test_accounts_are_opened_changed_and_closed(house: House) -> None:
    do = house.admin.do
    seen = do(
        "/admin/accounts", do="open", email="Bob@Example.org", password=PASSWORD, role="viewer"
    )
    assert (seen.said, emails(seen)[-1]) == ("Now bob@example.org may sign in.", "bob@example.org")
    bob = Browser(house.site)
    assert bob.sign_in("bob@example.org").status == 303
    assert do("/admin/accounts", do="role", id=4, role="publisher").said == "The role is set."
    assert "publisher" in bob.get("/admin/account").text
    seen = do("/admin/accounts", do="password", id=4, password="another horse")  # noqa: S106
    assert (seen.said, bob.get("/admin").status) == (
        "The password is set, the sessions are over.",
        303,
    )
    assert bob.sign_in("bob@example.org", "another horse").status == 303
    seen = do("/admin/accounts", do="close", id=4, sure=1)
    assert "bob@example.org" not in emails(seen)
    assert bob.get("/admin").status == 303
    with closing(sqlite3.connect(Path(house.site.config.state) / "fleet.db")) as database:
        lines = database.execute(
            "SELECT who, action FROM audit ORDER BY number DESC LIMIT 4"
        ).fetchall()
    assert lines == [
        (PEOPLE["admin"], f"{act} account") for act in ("close", "change", "change", "open")
    ]


NEW = {"do": "open", "email": "x@y", "password": PASSWORD, "role": "viewer"}
MINT = {"do": "mint", "name": "x", "role": "viewer"}
CHANGE = {"do": "password", "old": PASSWORD, "password": PASSWORD}
WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("/admin/accounts", {**NEW, "email": "x"}, 422, "no e-mail"),
    ("/admin/accounts", {**NEW, "password": "short"}, 422, "has 10 to"),
    ("/admin/accounts", {**NEW, "role": "king"}, 422, "no role"),
    ("/admin/accounts", {**NEW, "email": PEOPLE["viewer"]}, 409, "already"),
    ("/admin/accounts", {"do": "role", "id": 3, "role": "viewer"}, 409, "last administrator"),
    ("/admin/accounts", {"do": "close", "id": 3, "sure": 1}, 409, "last administrator"),
    ("/admin/accounts", {"do": "password", "id": 3, "password": PASSWORD}, 422, "present one"),
    ("/admin/accounts", {"do": "close", "id": 1}, 422, "sure"),
    ("/admin/accounts", {"do": "close", "id": 99, "sure": 1}, 404, "no account 99"),
    ("/admin/accounts", {"do": "close", "id": "1 OR 1", "sure": 1}, 404, "no number"),
    ("/admin/accounts", {"do": "close", "id": "9" * 30, "sure": 1}, 404, "no number"),
    ("/admin/accounts", {"do": "fly", "id": 1}, 422, "does not say what to do"),
    ("/admin/accounts", {}, 404, "no number"),
    ("/admin/tokens", {**MINT, "name": ""}, 422, "a name of"),
    ("/admin/tokens", {**MINT, "role": "king"}, 422, "no role"),
    ("/admin/tokens", {**MINT, "device": MAC}, 422, "role device"),
    ("/admin/tokens", {"do": "revoke", "id": 1}, 422, "sure"),
    ("/admin/tokens", {"do": "revoke", "id": 99, "sure": 1}, 404, "no token 99"),
    ("/admin/account", {**CHANGE, "old": "wrong"}, 403, "present password"),
    ("/admin/account", {**CHANGE, "password": "short"}, 422, "has 10 to"),
]


@pytest.mark.parametrize(("path", "words", "status", "why"), WRONG)
def test_form_that_is_refused_is_shown_again_with_the_reason(
    house: House, path: str, words: dict[str, Any], status: int, why: str
) -> None:
    seen = house.admin.send(path, **words)
    check_page(seen)
    assert (seen.status, why in seen.alert) == (status, True), seen.alert
    for name in ("email", "name"):
        if name in words and words.get("do") in {"open", "mint"}:
            assert seen.control(name).get("value") == words[name]
    assert PASSWORD not in seen.text


def test_token_is_shown_once(house: House) -> None:
    words = {"do": "mint", "name": "CI of the lamp", "role": "publisher", "project": "firmware"}
    seen = house.admin.send("/admin/tokens", **words)
    check_page(seen)
    token, *_ = seen.texts("code")
    assert re.fullmatch(r"ota_[\w-]{32}", token)
    assert house.admin.get("/admin/tokens").text.count(token) == 0
    line = seen.texts("code")[1]
    path = line.partition("http://ota")[2]
    found = Browser(house.site).get(path, f"Authorization: Bearer {token}")
    assert (found.status, [each["id"] for each in json.loads(found.text)["items"]]) == (200, [MAC])
    assert (
        house.admin.do("/admin/tokens", do="revoke", id=2, sure=1).said
        == "Token 2 opens nothing any more."
    )
    assert Browser(house.site).get(path, f"Authorization: Bearer {token}").status == 401


def test_own_password_is_changed_by_who_knows_it(house: House) -> None:
    other = Browser(house.site)
    other.sign_in(PEOPLE["viewer"])
    seen = house.viewer.do("/admin/account", do="password", old=PASSWORD, password="another horse")  # noqa: S106
    assert seen.said == "The password is changed."
    assert seen.texts("td", **{"data-label": "Which"}) == ["this browser"]
    assert other.get("/admin").status == 303
    assert other.sign_in(PEOPLE["viewer"]).status == 401
    assert other.sign_in(PEOPLE["viewer"], "another horse").status == 303


def test_other_sessions_are_ended(house: House) -> None:
    other = Browser(house.site)
    other.sign_in(PEOPLE["viewer"])
    assert len(house.viewer.get("/admin/account").texts("td", **{"data-label": "Which"})) == 2
    assert house.viewer.do("/admin/account", do="end").said == "The other sessions are over."
    assert (other.get("/admin").status, house.viewer.get("/admin").status) == (303, 200)
    assert house.publisher.get("/admin").status == 200


# -- 5. Forms --------------------------------------------------------------------------------------


def test_what_was_done_is_told_once(house: House) -> None:
    house.viewer.send("/admin/account", do="end")
    assert house.viewer.get("/admin/account").said == "The other sessions are over."
    assert house.viewer.get("/admin/account").said == ""


@pytest.mark.parametrize("text", [*XSS, "x" * 5000, "%00%0d%0aSet-Cookie: a=b", "%ff"])
def test_what_is_told_cannot_be_more_than_text(house: House, text: str) -> None:
    """Another program of this host may have set the cookie."""
    house.viewer.cookies["ota-said"] = text.replace(";", "%3b")
    seen = house.viewer.get("/admin")
    check_page(seen)
    assert len(seen.said) <= 500


def test_script_is_told_where_to_go_on(house: House) -> None:
    """It cannot see a redirect; the message is for the page that it goes to."""
    seen = house.viewer.send("/admin/account", "X-OTA-Script: 1", do="end")
    assert (seen.status, seen.field("X-OTA-Next")) == (200, "/admin/account")
    assert house.viewer.get("/admin", "X-OTA-Script: 1").said == ""
    assert house.viewer.get("/admin").said == "The other sessions are over."


def multipart(csrf: str, *more: bytes) -> bytes:
    """A form as browsers send it with files."""
    head = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    return head % (b"csrf", csrf.encode()) + head % (b"do", b"end") + b"".join(more) + b"--b--\r\n"


BODIES: list[tuple[str, bytes, int]] = [  # CSRF stands for the secret
    (FORM, b"csrf=CSRF&do=end", 303),
    (f"{FORM}; charset=utf-8", b"csrf=CSRF&do=end", 303),
    ("multipart/form-data; boundary=b", b"MULTIPART", 303),
    ("multipart/form-data", b"MULTIPART", 400),
    ("multipart/form-data; boundary=b", b"--b", 400),
    ("text/plain", b"csrf=CSRF&do=end", 415),
    ("application/json", b'{"csrf": "CSRF"}', 415),
    ("", b"csrf=CSRF&do=end", 415),
    (FORM, b"", 403),
    (FORM, b"csrf=CSRF" + b"&a" * MAX_FIELDS, 413),
    (FORM, b"\xff\xfe=%ff&csrf=CSRF&do=end", 303),
]


@pytest.mark.parametrize(("kind", "body", "status"), BODIES)
def test_body_is_a_form(house: House, kind: str, body: bytes, status: int) -> None:
    csrf = house.viewer.csrf
    data = body.replace(b"CSRF", csrf.encode()).replace(b"MULTIPART", multipart(csrf))
    fields = [f"Content-Type: {kind}"] * bool(kind)
    assert house.viewer.ask("POST", "/admin/account", *fields, body=data).status == status


def test_body_that_is_no_upload_has_to_be_small(house: House) -> None:
    data = b"a=" + b"x" * MAX_FORM
    kind = f"Content-Type: {FORM}"
    assert house.viewer.ask("POST", "/admin/account", kind, body=data).status == 413


def test_real_server_asks_who_it_is_before_it_takes_a_body(house: House) -> None:
    with standing(house.site) as stand:
        with stand.dial() as wire:
            assert wire.ask("/admin").status == 303
            reply = wire.ask(
                "/admin/tokens", "Content-Length: 1000", "Expect: 100-continue", method="POST"
            )
            assert reply.status == 401
        with stand.dial() as wire:
            fields = "Content-Length: 99999999", f"Cookie: ota={house.admin.cookies['ota']}"
            assert wire.ask("/admin/account", *fields, method="POST").status == 413
        with stand.dial() as wire:
            body = urlencode({"email": PEOPLE["viewer"], "password": PASSWORD})
            fields = f"Content-Type: {FORM}", f"Content-Length: {len(body)}"
            wire.send(request("/admin/sign-in", *fields, method="POST") + body.encode())
            reply = wire.reply("POST")
            assert (reply.status, reply.headers["location"]) == (303, "/admin")
            cookie = reply.headers["set-cookie"].partition(";")[0]
            assert wire.ask("/admin", f"Cookie: {cookie}").status == 200


# -- 6. Static files -------------------------------------------------------------------------------


def test_static_files_are_kept_for_ever_under_the_digest_of_their_content(house: House) -> None:
    seen = house.viewer.get("/admin")
    urls = [each.get("href") for each in seen.tree.iter("link") if each.get("rel") == "stylesheet"]
    urls += [each.get("src") for each in seen.tree.iter("script")]
    assert sorted(filter(None, urls)) == sorted(STATIC)
    for path in STATIC:
        assert re.fullmatch(r"/admin/static/admin-[0-9a-f]{16}\.(css|js)", path)
        found = Browser(house.site).get(path)
        assert (found.status, found.field("Cache-Control")) == (
            200,
            "public, max-age=31536000, immutable",
        )
        assert found.field("Content-Type").startswith(("text/css", "text/javascript"))
    for path in ("/admin/static/admin.css", "/admin/static/..%2fhtml.py", "/admin/static/"):
        assert Browser(house.site).get(path).status in {303, 404}


def test_static_files_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"] == {"ota_fleet": ["static/*"]}
    inside = {path.suffix for path in (ROOT / "ota_fleet" / "static").iterdir()}
    assert inside == {".css", ".js"}  # what install.sh copies


def test_static_files_ask_no_other_server_and_build_no_html_of_text() -> None:
    for path, (_, data) in STATIC.items():
        text = data.decode()
        assert "//" not in re.sub(r"(?m)(^| )// .*$", "", text), path
        for word in (
            "innerHTML =",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "@import",
            "url(",
        ):
            assert word not in text, word


# -- 7. No text is more than text ------------------------------------------------------------------


@given(st.text(), st.text())
def test_any_text_comes_back_as_it_is(text: str, other: str) -> None:
    """In an element and in an attribute; what no page can have is replaced."""
    seen = Seen(200, (), f"<!doctype html><title>x</title>{tag('p', text, title=other)}")
    (found,) = seen.tree.iter("p")
    wanted, title = (NOT_HTML.sub("\ufffd", each) for each in (text, other))
    assert (found.text or "") == wanted
    assert found.get("title") == title
    assert len(found) == 0


@given(st.lists(st.text()))
def test_text_stays_text_however_it_is_put_together(texts: list[str]) -> None:
    inner = join(texts, [tag("b", each) for each in texts], between=", ")
    assert e(inner) is inner
    assert html.unescape(re.sub("</?b>", "", inner)) == NOT_HTML.sub("\ufffd", ", ".join(texts * 2))


def test_html_in_an_attribute_is_text() -> None:
    assert tag("p", title=Html('"><script>')) == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    assert tag("p", Html("<b>") + "<i>") == "<p>&lt;b&gt;&lt;i&gt;</p>"


def test_no_link_leads_away() -> None:
    for href in ("javascript:alert(1)", "https://evil.example", "evil", "data:text/html,x"):
        with pytest.raises(AssertionError):
            a("x", href)
        with pytest.raises(AssertionError):
            form(href, "")


@pytest.mark.parametrize("text", XSS)
def test_account_and_token_are_shown_as_text(house: House, text: str) -> None:
    email = f"{text}@example.org".replace(" ", "\u2003").lower()
    words = {"password": PASSWORD, "role": "admin"}
    if "\u2003" not in email:
        seen = house.admin.do("/admin/accounts", do="open", email=email, **words)
        check_page(seen)
        assert emails(seen)[-1] == email
        browser = Browser(house.site)
        browser.sign_in(email)
        check_page(browser.get("/admin"))
        assert email in browser.get("/admin").texts("a")
        check_page(browser.get("/admin/account"))
    seen = house.admin.send(
        "/admin/tokens", do="mint", name=text, role="device", project=text, device=text
    )
    check_page(seen)
    assert text in seen.texts("td", **{"data-label": "Name"})
    assert text in seen.texts("td", **{"data-label": "Device"})


@pytest.mark.parametrize("text", XSS)
def test_field_that_is_filled_in_again_is_text(house: House, text: str) -> None:
    for path, name in (("accounts", "email"), ("tokens", "name"), ("tokens", "device")):
        words = {"do": "open" if path == "accounts" else "mint", "role": "king", name: text}
        seen = house.admin.send(f"/admin/{path}", **words)
        check_page(seen)
        assert (seen.status, seen.control(name).get("value")) == (422, text)
    seen = Browser(house.site).get(url("/admin/sign-in", next=text))
    check_page(seen)


@pytest.mark.parametrize("text", XSS)
def test_what_a_device_says_is_text(house: House, text: str) -> None:
    with closing(Registry(Path(house.site.config.state) / "fleet.db")) as registry:
        sighting(registry, text, text, text)
        sighting(registry, f"{text}2", "firmware", text)
    with closing(sqlite3.connect(Path(house.site.config.state) / "fleet.db")) as database, database:
        database.execute("UPDATE device SET offers = 3, offered = ?", (text,))
        database.execute(
            "INSERT INTO spread VALUES (?, 'firmware', ?, 3)", (int(time.time()) // DAY, text)
        )
    seen = house.viewer.get("/admin")
    check_page(seen)
    assert text in seen.texts("h2")
    assert text in seen.texts("td", **{"data-label": "Device"})
    assert f"{text} (3 times)" in seen.texts("td", **{"data-label": "Was given"})
    assert seen.text.count("<script") == 1


# -- 8. The overview -------------------------------------------------------------------------------


def test_overview_counts_devices_and_shows_their_versions(house: House) -> None:
    with closing(Registry(Path(house.site.config.state) / "fleet.db")) as registry:
        for number in range(8):
            sighting(
                registry,
                f"5C:CF:7F:00:01:0{number}",
                version="1.10.0" if number < 5 else f"1.{number}.0",
            )
    seen = house.viewer.get("/admin")
    figures = dict(zip(seen.texts("dt"), seen.texts("dd"), strict=True))
    assert (figures["Devices"], figures["Projects"], figures["Silent"]) == ("9", "1", "0")
    assert (figures["Seen in the last hour"], figures["Failing"]) == ("9", "0")
    assert "55 % of 9 devices run it." in seen.texts("p")
    assert "1.10.0 5" in seen.texts("li")


def test_overview_shows_who_needs_a_look_first(house: House) -> None:
    old = int(time.time()) - 3 * DAY
    with closing(sqlite3.connect(Path(house.site.config.state) / "fleet.db")) as database, database:
        columns = [each[1] for each in database.execute("PRAGMA table_info(device)")]
        names = ", ".join(columns[1:])
        copy = f"INSERT INTO device (id, {names}) SELECT ?, {names} FROM device"  # noqa: S608
        for number in range(8):
            database.execute(f"{copy} WHERE id = ?", (f"silent {number}", MAC))
        database.execute("UPDATE device SET last_seen = ? WHERE id LIKE 'silent%'", (old,))
        database.execute("UPDATE device SET offers = 3, offered = '1.10.0' WHERE id = ?", (MAC,))
    seen = house.viewer.get("/admin")
    check_page(seen)
    first = seen.texts("td", **{"data-label": "Device"})
    assert (first[0], first[1], len(first)) == (MAC, "silent 7", 7)
    assert [each.get("href") for each in seen.tree.iter("a") if each.text == "All of them"] == [
        "/admin/devices?state=silent"
    ]
    assert "3 d ago" in seen.texts("time")


def forget_devices(house: House) -> None:
    """As if none had ever asked."""
    path = Path(house.site.config.state) / "fleet.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM device")


def test_overview_of_nothing_says_how_to_begin(
    tmp_path: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    (tmp_path / "firmware").mkdir()
    with living(tmp_path / "firmware", furnished) as house:
        forget_devices(house)
        for browser in (house.viewer, house.publisher):
            seen = browser.get("/admin")
            check_page(seen)
            assert "No device has asked yet" in seen.texts("h2")
            assert ("Upload a firmware" in seen.texts("a")) == (browser is house.publisher)


@pytest.mark.parametrize(
    ("image", "titles"),
    [
        (b"", ["Arduino, ESP8266", "Arduino, ESP32"]),
        (esp8266_image("lamp", "1.2.0"), ["Arduino, ESP8266"]),
        (esp32_image("lamp", "1.2.0"), ["Arduino, ESP32"]),
    ],
)
def test_overview_of_nothing_has_the_line_of_the_chip_that_is_known(
    image: bytes, titles: list[str], tmp_path: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    (tmp_path / "firmware").mkdir()
    if image:
        put(tmp_path / "firmware/lamp-1.2.0.bin", image)
    with living(tmp_path / "firmware", furnished) as house:
        forget_devices(house)
        seen = house.viewer.get("/admin")
    name = "lamp" if image else "firmware"
    assert seen.texts("h3") == titles
    assert all(f"http://ota/{name}" in each for each in seen.texts("pre"))
    assert ("ESPhttpUpdate" in seen.text) == ("Arduino, ESP8266" in titles)


def test_name_in_quotes_at_the_beginning_of_a_sentence_stays_as_it_is() -> None:
    found = [fragment(note(text, kind="warn")).tree.find(".//p") for text in ("'attic'", "it", "")]
    assert [each is not None and "data-quoted" in each.attrib for each in found] == [
        True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/admin/", "/admin"),
        ("/admin//", "/admin"),
        ("/admin/devices/?q=a%20b", "/admin/devices?q=a%20b"),
        (f"/admin/devices/{MAC}/", url("/admin/devices", MAC)),
        ("/admin/projects/firmware/", "/admin/projects/firmware"),
        ("/admin/no%3Csuch/", "/admin/no%3Csuch"),
        ("/admin/sign-in/", "/admin/sign-in"),
    ],
)
def test_path_with_a_slash_behind_it_leads_to_the_page(path: str, there: str, house: House) -> None:
    seen = house.viewer.get(path)
    assert (seen.status, seen.field("Location")) == (303, there)


def test_no_more_than_two_pages_are_made_at_once(house: House) -> None:
    barrier = threading.Barrier(3)

    def show(_call: object) -> Reply:
        try:
            barrier.wait(0.5)
        except threading.BrokenBarrierError:
            return Reply(204, ())
        return Reply(200, ())

    with closing(Registry(Path(house.site.config.state) / "fleet.db")) as registry:
        pages = Pages([Page("/admin/slow", "", show)], Accounts(Ledger(registry), secure=False))
        asked = parse_head(request("/admin/slow"), "192.0.2.1")
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: pages.answer(house.site, asked), range(4)))
    assert [each.status for each in replies] == [204] * 4


def test_project_whose_releases_are_all_withdrawn_says_so(house: House) -> None:
    stock = house.site.catalog
    for release in stock.releases("firmware"):
        stock.withdraw("firmware", release.version, "bad", "test", 1)  # type: ignore[attr-defined]
    seen = house.viewer.get("/admin")
    assert "every release is withdrawn, or a pre-release" in seen.texts("p")


def test_overview_shows_the_projects_with_the_most_devices(house: House) -> None:
    with closing(Registry(Path(house.site.config.state) / "fleet.db")) as registry:
        for number in range(40):
            for each in range(1 + number // 39):
                sighting(registry, f"{number:08X}{each:04X}", f"project{number:02}", "1.0.0")
        registry.flush()
    seen = house.viewer.get("/admin")
    check_page(seen)
    titles = [each for each in seen.texts("h2") if each.startswith("project")]
    assert (titles[0], titles[1], len(titles) <= home_pages.MAX_CARDS) == (
        "project39", "project00", True
    )  # fmt: skip
    assert any(re.fullmatch("All 4. projects", each) for each in seen.texts("a"))


def test_overview_of_a_large_fleet_is_quick(
    folder: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    """Each page renders under 100 ms with 10,000 devices; here with a wide margin."""
    with living(folder, furnished) as house:
        with closing(Registry(Path(house.site.config.state) / "fleet.db")) as registry:
            for number in range(10_000):
                sighting(registry, f"{number:012X}", f"project{number % 40}", f"1.{number % 7}.0")
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert house.viewer.get("/admin").status == 200
            times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_bar_has_the_newest_release_first_and_joins_what_hardly_anybody_runs() -> None:
    counts = [Count("x", f"1.{number}.0", 10 - number, 0, 0, 0, 0) for number in range(9)]
    counts.append(Count("x", "", 3, 0, 0, 0, 0))
    versions = home_pages.coloured(counts, "2.0.0")
    assert versions == ["2.0.0", "1.0.0", "1.1.0", "1.2.0", "1.3.0"]
    amounts = [0, 10, 9, 8, 7, 6 + 5 + 4 + 3 + 2 + 3]
    found = home_pages.shares(counts, versions)
    assert found == list(zip([*versions, "others"], amounts, strict=True))
    assert home_pages.shares(counts[-1:], home_pages.coloured(counts[-1:], "")) == [("not told", 3)]


def test_spread_is_a_chart_and_a_table_of_days() -> None:
    days = [Share(day * DAY, version, day) for day in (1, 2) for version in ("1.0.0", "", "x")]
    chart_ = home_pages.spread_chart(days, ["1.0.0", ""])
    seen = Seen(200, (), f"<!doctype html><title>x</title>{chart_}")
    assert seen.texts("td") == ["1970-01-03", "2", "2", "2", "1970-01-02", "1", "1", "1"]
    assert seen.texts("th")[1:] == ["1.0.0", "not told", "others"]


# -- 9. Words and pictures -------------------------------------------------------------------------


def fragment(inner: Html) -> Seen:
    """A page of this alone, which is well-formed."""
    seen = Seen(200, (), f"<!doctype html><title>x</title>{inner}")
    check_labels(seen.tree)
    return seen


AGES = [
    (0, "just now"),
    (59, "just now"),
    (60, "1 min ago"),
    (3599, "59 min ago"),
    (3600, "1 h ago"),
    (86399, "23 h ago"),
    (86400, "1 d ago"),
    (10**7, "115 d ago"),
]


@pytest.mark.parametrize(("seconds", "words"), AGES)
def test_age_is_said_as_people_do(seconds: int, words: str) -> None:
    assert ago(seconds) == words


def test_moment_has_its_time_for_machines_and_for_who_asks() -> None:
    assert (
        when(0, 60)
        == '<time datetime="1970-01-01T00:00:00Z" title="1970-01-01 00:00:00 UTC">1 min ago</time>'
    )
    assert ">in 1 d<" in when(90_000, 0)
    assert ">soon<" in when(1, 0)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (9_999, "9999 bytes"), (412_345, "412 KB"), (12_345_678, "12.3 MB")],
)
def test_size_is_said_as_people_do(size: int, words: str) -> None:
    assert size_of(size) == words


URLS: list[tuple[tuple[str, ...], Mapping[str, str], str]] = [
    (("/admin",), {}, "/admin"),
    (("/admin/devices", "5C:CF"), {}, "/admin/devices/5C%3ACF"),
    (
        ("/admin/devices", "a/b?c#d%"),
        {"q": "x y", "sort": ""},
        "/admin/devices/a%2Fb%3Fc%23d%25?q=x+y",
    ),
    (("/admin/devices", "\udcff"), {}, "/admin/devices/%FF"),
    (("/admin",), {"class_": "x"}, "/admin?class=x"),
]


@pytest.mark.parametrize(("names", "query", "wanted"), URLS)
def test_url_holds_any_name(names: tuple[str, ...], query: Mapping[str, str], wanted: str) -> None:
    assert url(*names, **query) == wanted


@pytest.mark.parametrize("amounts", [[], [0.0], [5.0], [0.0, 0.0], [1, 5, 3], [1e9, 1]])
@pytest.mark.parametrize("stacked", [False, True])
def test_chart_is_a_picture_with_its_numbers(amounts: list[float], stacked: bool) -> None:
    series = [Series("<a>", amounts), Series("b", amounts)]
    seen = fragment(
        chart("So & so", [f"{at}:00" for at in range(len(amounts))], series, stacked=stacked)
    )
    assert len(seen.texts("tr")) == (len(amounts) + 1 if amounts else 0)
    assert "nan" not in seen.text
    numbers = re.findall(r'(?:d|x|y|x1|y1)="([^"]*)"', seen.text)
    found = [float(each) for text in numbers for each in re.findall(r"-?[\d.]+", text)]
    assert all(-1 <= each <= 620 for each in found)


@pytest.mark.parametrize("amounts", [[], [0], [1], [1, 2, 3, 4, 5, 6, 7, 8], [0, 0]])
def test_bar_is_filled_by_its_shares(amounts: list[float]) -> None:
    seen = fragment(bars([(f"<{amount}>", amount) for amount in amounts], "Devices"))
    widths = [float(each) for each in re.findall(r'width="([\d.]+)" height="1"', seen.text)]
    assert len(widths) == len(amounts)
    assert abs(sum(widths) - (100 if any(amounts) else 0)) < 0.1


def test_table_without_rows_is_a_sentence() -> None:
    assert table(("A",), [], "As", "No A.") == '<p class="empty">No A.</p>'
    heads: list[str | Head] = [Head("A", "/admin?sort=a", "ascending"), "B", ""]
    seen = fragment(table(heads, [(1, None, tag("b", 2))], "As"))
    assert [each.get("aria-sort") for each in seen.tree.iter("th")] == ["ascending", None, None]
    assert seen.texts("th") == ["A", "B", "Actions"]
    with pytest.raises(ValueError, match="shorter"):
        table(("A", "B"), [(1,)], "As")


def test_fields_hold_what_they_are_given() -> None:
    inner = join(
        area("Notes", "notes", "\n<b>\n"), choice("Chip", "chip", ["esp32", ("", "any")], "esp32")
    )
    seen = fragment(inner)
    assert seen.control("notes").text == "\n<b>\n"
    assert [each.get("selected") for each in seen.tree.iter("option")] == ["", None]


def test_pager_has_links_that_lead_somewhere() -> None:
    assert fragment(pager("", "/admin?cursor=x")).texts("a") == ["Next page"]
    assert fragment(pager("/admin", "", "3 of 4")).texts("span") == ["3 of 4"]
