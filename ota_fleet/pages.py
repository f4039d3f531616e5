"""The web administration: which page a path means, who may see it, and how its forms are taken.

    loop    -- guard(): signed in, role, no other server's page --> refused before a body comes
    threads -- answer(): GET  -> Page.show(Call) -> Sheet in its frame
                         POST -> csrf -> Page.act(Call) -> See: 303 to a GET, what was done is told
                                 Refused: the same page with the sentence, and what was filled in

A page is a row of a table: extend() puts those of several rooms together.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs, quote, unquote

from ota_fleet.accounts import (
    BEARER,
    SAFE,
    Accounts,
    Actor,
    allow,
    cookie_name,
    cookie_of,
    cookie_text,
    is_forged,
    same,
)
from ota_fleet.api import NOBODY, is_text, pattern_of, sentences
from ota_fleet.api import Call as Asked
from ota_fleet.files import room
from ota_fleet.forms import Part, is_form, read_form, text_of
from ota_fleet.html import STATIC, Frame, Sheet, a, framed, page, tag, url
from ota_server import (
    UNCACHED,
    Refused,
    Reply,
    Request,
    Route,
    Site,
    body_reply,
)

AT_ONCE = 2  # pages that are made: devices that ask share the interpreter with them
MAX_FORM = 256 * 1024  # bytes of a form without files
MAX_FIELDS = 2_500  # a list of devices has a box for each
MAX_SAID = 500  # characters that are told after something was done: a cookie holds 4 KB
HOME, SIGN_IN = "/admin", "/admin/sign-in"
BELOW = re.compile("(?s)/admin(?:/.*)?")
FOR_EVER = ("Cache-Control", "public, max-age=31536000, immutable")


class See(NamedTuple):
    """What was done: the browser goes on to a page, which tells it."""

    path: str  # url() made it
    said: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Call(NamedTuple):
    """What a page is asked."""

    site: Site
    request: Request
    actor: Actor  # NOBODY where everybody may
    names: Mapping[str, str]  # of the path
    query: Mapping[str, Sequence[str]]
    form: Mapping[str, Sequence[str]] = {}  # of a POST; also of one that failed, to be shown again
    files: Sequence[Part] = ()  # of a form with files: where they are in request.body

    def asked(self, name: str, default: str = "") -> str:
        """A value of the query."""
        return self.query.get(name, (default,))[-1]

    def given(self, name: str, default: str = "") -> str:
        """A value of the form, where there is one, as it was filled in."""
        return self.form.get(name, (default,))[-1]

    def all_given(self, name: str) -> Sequence[str]:
        """All values of a field."""
        return self.form.get(name, ())


@dataclass(frozen=True, slots=True)
class Page:
    """A row of the table."""

    path: str  # with {name}s; {device} may hold any text
    role: str  # who may see it; "": everybody
    show: Callable[[Call], Sheet | Reply | See] | None = None  # None: there is no GET
    act: Callable[[Call], See | Sheet | Reply] | None = None  # of POST; None: there is none
    acts: str = "publisher"  # who may do that
    link: str = ""  # its text in the navigation; "": it is not there
    most: int = MAX_FORM  # bytes of a POST

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that it has."""
        return ("GET", "HEAD") * (self.show is not None) + ("POST",) * (self.act is not None)


class Pages:
    """Routes, guard and endpoint of a table of pages."""

    def __init__(self, table: Sequence[Page], accounts: Accounts, *, drop: str = "") -> None:
        """`drop` is the path of the page that takes dropped files."""
        self._accounts = accounts
        self.table = [(pattern_of(row.path, ""), row) for row in table]
        self._turn = threading.Semaphore(AT_ONCE)
        self._drop = next((row for row in table if row.path == drop), None)

    def routes(self) -> tuple[Route, ...]:
        """One for each path; the last is for all that is not there."""
        return (
            Route(re.compile("/admin/static/[^/]+"), static),
            *(
                Route(pattern, self.answer, row.methods, blocking=True,
                      body=row.most if row.act else 0)
                for pattern, row in self.table
            ),
            Route(BELOW, self.answer, ("GET", "HEAD")),
        )  # fmt: skip

    # -- Who may

    def guard(self, request: Request) -> None:
        """Never waits, so that the loop can ask before it receives a body.

        Raises:
            Refused: 303, sign in first; 401, 403, 404.
        """
        if BELOW.fullmatch(request.path) is None or request.path in STATIC:
            return
        if request.method not in SAFE and is_forged(request):
            raise Refused(403, "a page of another server sent this, or a proxy changed the Host")
        found = self._find(request.path)
        if found is None and request.path.endswith("/") and request.method in SAFE:
            raise _without_slash(request)
        self._actor(found[0] if found else None, request)
        if found is None:
            raise Refused(404, "there is no such page")

    def _find(self, path: str) -> tuple[Page, Mapping[str, str]] | None:
        for pattern, row in self.table:
            if (match := pattern.fullmatch(path)) and is_text(path):
                return row, match.groupdict()
        return None

    def _person(self, request: Request) -> Actor:
        """Who is signed in, NOBODY if nobody is: programs have the API."""
        actor = self._accounts.actor(request)
        return actor if actor and actor.account else NOBODY

    def _actor(self, row: Page | None, request: Request) -> Actor:
        """Who asks, and may; without a row, for what is not there. Refused: 303, 401, 403."""
        actor = self._person(request)
        role = row.role if row else "viewer"
        if not role:
            return actor
        if actor is NOBODY:
            raise _sign_in(request)
        allow(actor, row.acts if row and request.method not in SAFE else role)
        return actor

    # -- What is answered

    def answer(self, site: Site, request: Request) -> Reply:
        """The endpoint of all paths. Refused: as guard(); also as the page does."""
        found = self._find(request.path)
        if found is None:
            raise Refused(404, "there is no such page")
        row, names = found
        actor = self._actor(row, request)
        call = Call(site, request, actor, names, _fields(request.query))
        if request.method == "POST":
            return self._act(row, call)
        assert row.show is not None  # as the routes have its methods only
        try:
            with self._turn:
                return self._reply(call, row.show(call))
        except Refused as refused:  # what a device is called may end with a slash, too
            if refused.status == 404 and request.path.endswith("/"):
                raise _without_slash(request) from None
            raise

    def _act(self, row: Page, call: Call) -> Reply:
        """Does what a form says, or shows it again with the reason why not."""
        call = with_form(call)
        if call.actor.csrf and not same(_csrf(call), call.actor.csrf):
            raise Refused(403, "this form is of an earlier session: go back, load the page again")
        assert row.act is not None
        try:
            with sentences(), room():
                return self._reply(call, row.act(call))
        except Refused as refused:
            if row.show is None:
                raise
            return self._reply(call, row.show(call), refused)

    def _reply(self, call: Call, result: Sheet | Reply | See, why: Refused | None = None) -> Reply:
        if isinstance(result, Reply):
            return result
        scripted = "x-ota-script" in call.request.headers
        secure = call.request.secure or bool(call.site.config.cert)
        if isinstance(result, See):
            told = [("Set-Cookie", _telling(result.said, secure=secure))] * bool(result.said)
            return _go_on(result.path, *result.headers, *told, scripted=scripted)
        said = "" if scripted else _said(call.request, secure=secure)
        forget = [("Set-Cookie", _telling("", secure=secure))] * bool(said)
        alert, status, headers = (why.reason, why.status, why.headers) if why else ("", 200, ())
        return framed(result, self._frame(call, said, alert), status, *forget, *headers)

    def _frame(self, call: Call, said: str, alert: str) -> Frame:
        actor = call.actor
        if actor is NOBODY:
            return Frame(call.request.path, said=said, alert=alert)
        links = [(row.path, row.link) for _, row in self.table if row.link and may(actor, row.role)]
        drop = self._drop.path if self._drop and may(actor, self._drop.acts) else ""
        return Frame(
            call.request.path, actor.name, actor.role, actor.csrf, links, said, alert, drop
        )

    def refusal(
        self, others: Callable[[Refused, str], Reply], refused: Refused, path: str
    ) -> Reply:
        """A page for who is refused one; for other paths what they have."""
        if BELOW.fullmatch(path) is None:
            return others(refused, path)
        if refused.status == 303:
            return Reply(303, (*refused.headers, ("Content-Length", "0"), UNCACHED))
        back = tag("p", a("Go to the overview", HOME))
        sheet = page(TITLES.get(refused.status, "This did not work"), back)
        return framed(sheet, Frame("", alert=refused.reason), refused.status, *refused.headers)


TITLES = {401: "Sign in", 403: "Not allowed", 404: "Not found", 500: "The server failed"}


def may(actor: Actor, role: str) -> bool:
    """Whether somebody has a role; "": everybody has."""
    try:
        allow(actor, role or "viewer")
    except Refused:
        return False
    return True


def static(_site: Site, request: Request) -> Reply:
    """The stylesheet or the script; its name changes with its content. Refused: 404."""
    if request.path not in STATIC:
        raise Refused(404, "this is of another version: load the page again")
    kind, data = STATIC[request.path]
    return body_reply(200, kind, data, FOR_EVER)


def _go_on(path: str, *headers: tuple[str, str], scripted: bool = False) -> Reply:
    """Post/Redirect/Get. A script would follow a redirect and never know: it is told the path."""
    status, name = (200, "X-OTA-Next") if scripted else (303, "Location")
    return Reply(status, ((name, path), *headers, ("Content-Length", "0"), UNCACHED))


# -- Forms -----------------------------------------------------------------------------------------


def _fields(text: str) -> dict[str, list[str]]:
    """The fields of a query or a form. Refused: 413, they are too many."""
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as err:
        raise Refused(413, f"the form has more than {MAX_FIELDS} fields") from err


def with_form(call: Call) -> Call:
    """The call with what its body says. Refused: 400, 413, 415."""
    body, kind = call.request.body, call.request.headers.get("content-type", "")
    assert body is not None
    if is_form(kind):
        form: dict[str, list[str]] = {}
        with FileIO(body.fileno(), closefd=False) as file:
            parts = read_form(file, kind)
            for part in parts:
                if part.filename is None:
                    form.setdefault(part.name, []).append(text_of(file, part))
        return call._replace(form=form, files=[each for each in parts if each.filename is not None])
    if kind.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise Refused(415, "a page takes what its form sends")
    if call.request.body_size > MAX_FORM:
        raise Refused(413, f"a form without files has at most {MAX_FORM} bytes")
    return call._replace(form=_fields(body.read().decode("ascii", "replace")))


T = TypeVar("T")


def act_of(acts: Mapping[str, T], call: Call) -> T:
    """What the button that was pressed stands for. Refused: 422, nothing."""
    if call.given("do") not in acts:
        raise Refused(422, "the form does not say what to do")
    return acts[call.given("do")]


def typed(text: str) -> str:
    """As it was typed: a form has line ends of its own."""
    return text.replace("\r\n", "\n")


def asked(call: Call, names: Mapping[str, str], body: Mapping[str, object] | None = None) -> Asked:
    """The same as the API's operations are asked it."""
    return Asked(call.site, call.request, call.actor, names, {}, body or {})


def _csrf(call: Call) -> str:
    return call.given("csrf") or call.request.headers.get("x-csrf-token", "")


# -- Cookies and the way to sign in ----------------------------------------------------------------


def _said_name(*, secure: bool) -> str:
    return f"{cookie_name(secure=secure)}-said"


def _telling(text: str, *, secure: bool) -> str:
    """Set-Cookie of what the next page tells, once; "": it did."""
    age = 60 if text else 0  # seconds
    value = quote(text[:MAX_SAID], safe="", errors="replace")
    return cookie_text(_said_name(secure=secure), value, age, secure=secure)


def _said(request: Request, *, secure: bool) -> str:
    return unquote(cookie_of(request, _said_name(secure=secure)))[:MAX_SAID]


def _target(path: str, query: str) -> str:
    """A decoded path and a query as they stand in a URL."""
    return quote(path, safe="/", errors="surrogateescape") + f"?{query}" * bool(query)


def _without_slash(request: Request) -> Refused:
    """What sends a browser to the page that is meant."""
    there = _target(request.path.rstrip("/"), request.query)
    return Refused(303, "there is no slash behind a page", ("Location", there))


def _sign_in(request: Request) -> Refused:
    """What sends a browser to where one signs in, and back."""
    if request.method not in SAFE:
        return Refused(401, "the session is over: sign in, then do it again", BEARER)
    here = _target(request.path, request.query)
    there = url(SIGN_IN, next=here if here != HOME else "")
    return Refused(303, "sign in first", ("Location", there))


def own_path(text: str) -> str:
    """Where to go on, if that is one of these pages; else the first of them."""
    return text if re.fullmatch(r"/admin(?:[/?][!-~]*)?", text) and "\\" not in text else HOME
