"""Who asks, and may they: passwords, sessions, tokens, roles, and what must never work."""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ota_fleet
import ota_server
from ota_fleet import accounts as room
from ota_fleet.accounts import (
    DEVICE,
    MAX_COUNTED,
    MAX_PASSWORD,
    MAX_SESSIONS,
    MAX_WAITING,
    PAUSE,
    ROLES,
    SESSION_SECONDS,
    TRIES,
    Accounts,
    Actor,
    Throttle,
    allow,
    checked_email,
    hashed,
    is_forged,
    is_password,
    network,
)
from ota_fleet.ledger import Ledger
from ota_fleet.rows import Account, Session
from ota_fleet.two_step import Credentials
from ota_server import Refused, Request, Site, parse_head
from tests.conftest import put, site_of, wait_until
from tests.core.test_access import ask, basic, bearer, text_of
from tests.core.wire import request, standing
from tests.data.make_images import esp8266_image
from tests.fleet.test_fleet import registry_of, remembering
from tests.fleet.test_registry import opened
from tests.test_house import ROOT

NOW = 1_800_000_000  # UTC seconds
PASSWORD = "correct horse battery"  # noqa: S105
ADA, BOB, EVE = "ada@example.org", "bob@example.org", "eve@example.org"
MAC, OTHER = "5C:CF:7F:12:34:56", "5C:CF:7F:12:34:57"
HOSTILE = ["", "\0", "a\0b", "\ud800", "x" * 1_000_000, "'; DROP TABLE account; --", "%", "ä" * 300,
           "\r\nSet-Cookie: x=y", "__Host-ota=x", "{}", "\u202e", "ota_" + "A" * 32]  # fmt: skip


@dataclass(slots=True)
class Clock:
    """UTC seconds that stand still."""

    at: float = NOW

    def __call__(self) -> float:
        """The time."""
        return self.at


def cheap(password: str) -> str:
    """A password as it is stored, but hashed in no time."""
    return room._scrypt(password, 2, 1, 1, b"salt")


@dataclass(frozen=True, slots=True)
class House:
    """Accounts, what they stand on, and their clock."""

    accounts: Accounts
    ledger: Ledger
    clock: Clock
    path: Path

    def person(self, email: str = ADA, role: str = "admin") -> int:
        """Somebody who may sign in with PASSWORD."""
        return self.ledger.add_account(Account(0, email, role, cheap(PASSWORD), NOW), "test")

    def token(self, role: str, project: str = "", device: str = "") -> str:
        """A new token."""
        return self.accounts.mint("t", role, project, device, who="test")[1]

    def enter(self, email: str = ADA, **how: Any) -> tuple[Actor, str]:
        """Somebody who signed in, and the field of the cookie."""
        actor, cookie = self.accounts.sign_in(head(**how), email, PASSWORD)
        return actor, f"Cookie: {cookie.partition(';')[0]}"

    def refused(self, email: str, password: str, peer: str = "192.0.2.1") -> int:
        """The status of a vain attempt to sign in."""
        with pytest.raises(Refused) as caught:
            self.accounts.sign_in(head(peer=peer), email, password)
        return caught.value.status

    def stored(self) -> bytes:
        """All that is on the disk."""
        return b"".join(each.read_bytes() for each in self.path.parent.glob("fleet.db*"))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """An empty one."""
    path, clock = tmp_path / "fleet.db", Clock()
    with opened(path) as registry:
        ledger = Ledger(registry)
        yield House(Accounts(ledger, secure=False, now=clock), ledger, clock, path)


def head(
    *fields: str, method: str = "GET", target: str = "/api/v1/x", peer: str = "192.0.2.1",
    secure: bool = False,
) -> Request:  # fmt: skip
    """A request that came."""
    return parse_head(request(target, *fields, method=method), peer, secure=secure)


def status_of(call: Callable[[], object]) -> int:
    """200, or as it was refused."""
    try:
        call()
    except Refused as refused:
        return refused.status
    return 200


# -- 1. Passwords ---------------------------------------------------------------------------------


def test_hash_is_the_one_of_rfc_7914() -> None:
    key = bytes.fromhex("7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2")
    salt, key64 = (base64.b64encode(each).decode() for each in (b"SodiumChloride", key))
    assert is_password("pleaseletmein", f"scrypt$16384$8$1${salt}${key64}")
    assert not is_password("pleaseletmeim", f"scrypt$16384$8$1${salt}${key64}")


GROWTH = """
import sys, threading
from pathlib import Path
from ota_fleet.accounts import Accounts
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_server import Refused, Request

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

def sign_in(number):
    try:
        head = Request("POST", "/", "", {}, f"192.0.2.{number}")
        accounts.sign_in(head, f"a{number}@b.c", "x" * 12)
    except Refused as refused:
        print(refused.status)

registry = Registry(sys.argv[1])
accounts = Accounts(Ledger(registry), secure=False)
before = memory()
for first in range(0, 20, 5):
    threads = [threading.Thread(target=sign_in, args=(first + n,)) for n in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
print(memory() - before)
accounts.close()
registry.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_threads_that_sign_in(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "fleet.db")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    *statuses, growth = map(int, done.stdout.split())
    assert statuses == [401] * 20
    assert growth < 60  # MB


def test_password_is_stored_with_its_costs_and_salt() -> None:
    first, second = (hashed(PASSWORD, salt) for salt in (bytes(16), b"0123456789abcdef"))
    assert first.startswith("scrypt$16384$8$5$AAAAAAAAAAAAAAAAAAAAAA==$")
    assert first.rpartition("$")[2] != second.rpartition("$")[2]
    assert is_password(PASSWORD, first)


@pytest.mark.parametrize("text", ["pässwörter", "a\0b", "\ud800", "🦆" * 10, ""], ids=ascii)
def test_any_text_can_be_compared(text: str) -> None:
    assert is_password(text, cheap(text))
    assert not is_password(f"{text}x", cheap(text))


def test_umlaut_is_one_however_the_keyboard_writes_it() -> None:
    assert is_password("gru\u0308n", cheap("gr\u00fcn"))


def test_salt_is_another_for_everybody(house: House) -> None:
    for email in (ADA, BOB):
        house.accounts.open_account(email, PASSWORD, "viewer", who="test")
    first, second = (each.password.split("$") for each in house.accounts.accounts())
    assert first[:4] == second[:4] == ["scrypt", "16384", "8", "5"]
    assert len({first[4], second[4]}) == len({first[5], second[5]}) == 2


@pytest.mark.parametrize(
    ("password", "taken"),
    [("x" * 9, False), ("x" * 10, True), ("", False), ("x" * MAX_PASSWORD, True),
     ("x" * (MAX_PASSWORD + 1), False), ("x" * 1_000_000, False), ("aaaaaaaaaa", True)],
    ids=lambda value: str(value)[:10] + str(len(str(value))),
)  # fmt: skip
def test_only_the_length_of_a_password_counts(password: str, taken: bool, house: House) -> None:
    spent = time.thread_time()
    if not taken:
        with pytest.raises(ValueError, match="a password has 10 to 1000 characters"):
            house.accounts.open_account(ADA, password, "admin", who="test")
        assert time.thread_time() - spent < 0.05  # it was not hashed
        return
    house.accounts.open_account(ADA, password, "admin", who="test")
    assert house.accounts.sign_in(head(), ADA, password)[0].name == ADA


@pytest.mark.parametrize(
    ("text", "email"),
    [("Ada@Example.ORG", ADA), (f"  {ADA}\n", ADA), ("admin@localhost", "admin@localhost"),
     ("a+b@x", "a+b@x"), ("ä@ö.de", "ä@ö.de"), ("@x", ""), ("x@", ""), ("x", ""), ("", ""),
     ("a b@x", ""), ("a\0@x", ""), ("\ud800@x", ""), ("a@x\r\nb", ""), ("a" * 255 + "@x", "")],
    ids=ascii,
)  # fmt: skip
def test_email_address_is_in_lower_case_or_refused(text: str, email: str) -> None:
    try:
        assert checked_email(text) == email
    except ValueError:
        assert not email


# -- 2. Roles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ROLES)
@pytest.mark.parametrize("role", [*ROLES, DEVICE])
def test_a_role_may_what_the_ones_before_it_may(role: str, needed: str, house: House) -> None:
    may = role != DEVICE and ROLES.index(role) >= ROLES.index(needed)
    got = status_of(lambda: house.accounts.require(head(bearer(house.token(role))), needed))
    assert got == (200 if may else 403)


@pytest.mark.parametrize(
    ("own", "asked", "status"),
    [("", "", 200), ("", "lamp", 200), ("lamp", "lamp", 200), ("lamp", "sensor", 403),
     ("lamp", "", 403), ("lamp", "lam", 403), ("lamp", "Lamp", 403)],
)  # fmt: skip
def test_token_of_a_project_is_for_that_one(
    own: str, asked: str, status: int, house: House
) -> None:
    me = head(bearer(house.token("admin", own)), method="PUT")
    assert status_of(lambda: house.accounts.require(me, "publisher", asked)) == status


def test_refusal_says_who_may_what() -> None:
    with pytest.raises(Refused, match="ada is viewer: the role admin is needed"):
        allow(Actor("ada", "viewer"), "admin")
    with pytest.raises(Refused, match="CI is for 'lamp' only"):
        allow(Actor("CI", "admin", "lamp"), "viewer", "sensor")


@pytest.mark.parametrize(
    "fields",
    [(), ("Authorization: Bearer",), (bearer("ota_x"),), ("Cookie: ota=x",), (basic("a", "b"),),
     ("Cookie: ota=",), ("Cookie: =", "Authorization: Digest x"), ("Cookie: ;;=;",),
     (bearer("t\u00f6ken"),), ("Authorization: Basic !",)],
)  # fmt: skip
def test_nobody_who_is_known_is_401_without_a_dialogue(
    fields: tuple[str, ...], house: House
) -> None:
    house.person()
    with pytest.raises(Refused) as caught:
        house.accounts.require(head(*fields), "viewer")
    assert caught.value.status == 401
    assert dict(caught.value.headers)["WWW-Authenticate"].startswith("Bearer ")
    assert house.accounts.actor(head(*fields)) is None


def test_token_in_a_query_opens_no_api(house: House) -> None:
    token = house.token("admin")
    assert house.accounts.actor(head(target=f"/api/v1/x?token={token}")) is None


# -- 3. Tokens ------------------------------------------------------------------------------------


def test_token_is_told_once_and_stored_as_its_digest(house: House) -> None:
    number, token = house.accounts.mint("CI", "publisher", "lamp", who=ADA)
    assert (len(token), token[:4]) == (36, "ota_")
    row = house.accounts.tokens()[0]
    assert (row.id, row.name, row.role, row.project, row.created) == (
        number, "CI", "publisher", "lamp", NOW,
    )  # fmt: skip
    actor = house.accounts.actor(head(bearer(token)))
    assert actor == Actor(f"token {number} (CI)", "publisher", "lamp")
    assert actor == house.accounts.actor(head(basic("anybody", token)))
    assert token.encode() not in house.stored()
    assert token[4:].encode() not in house.stored()


def test_token_that_was_revoked_opens_nothing_at_once(house: House) -> None:
    number, token = house.accounts.mint("CI", "publisher", "", who=ADA)
    house.accounts.revoke(number, who=BOB)
    assert house.accounts.actor(head(bearer(token))) is None
    assert status_of(lambda: house.accounts.revoke(number, who=BOB)) == 404
    assert status_of(lambda: house.accounts.revoke(10**40, who=BOB)) == 404


def test_another_process_mints_and_revokes(house: House) -> None:
    with opened(house.path) as registry:
        other = Accounts(Ledger(registry), secure=False)
        number, token = other.mint("CI", "publisher", "", who=ADA)
        wait_until(lambda: house.accounts.actor(head(bearer(token))) is not None)
        other.revoke(number, who=ADA)
        wait_until(lambda: house.accounts.actor(head(bearer(token))) is None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("", "viewer", ""), "a name of 1 to 64"),
        ((" ", "viewer", ""), "a name of 1 to 64"),
        (("x" * 65, "viewer", ""), "a name of 1 to 64"),
        (("a\nb", "viewer", ""), "a name of 1 to 64"),
        (("a", "root", ""), "'root' is no role: viewer, publisher, admin, device"),
        (("a", "viewer", "p\0"), "only what can be printed"),
        (("a", "device", "", "\ud800"), "only what can be printed"),
        (("a", "admin", "", MAC), "has the role device"),
    ],
)
def test_token_that_makes_no_sense_is_refused(
    words: tuple[str, ...], sentence: str, house: House
) -> None:
    with pytest.raises(ValueError, match=sentence):
        house.accounts.mint(*words, who=ADA)
    assert house.accounts.tokens() == []


# -- 4. People ------------------------------------------------------------------------------------


def test_who_signs_in_is_known_by_the_cookie(house: House) -> None:
    number = house.person(role="publisher")
    actor, cookie = house.enter()
    assert actor[:5] == (ADA, "publisher", "", "", number)
    assert len(actor.csrf) == 64
    assert house.accounts.actor(head(cookie)) == actor
    assert house.accounts.actor(head(f"Cookie: a=b; {cookie.partition(' ')[2]}; c=d")) == actor
    again, second = house.enter(f"{ADA.upper()} ")
    assert (again.csrf != actor.csrf, second != cookie) == (True, True)


def test_unknown_address_and_wrong_password_are_answered_alike(house: House) -> None:
    house.accounts.open_account(ADA, PASSWORD, "admin", who="test")
    spent, said = [], []
    for email in (ADA, "nobody@example.org", "no address"):
        start = time.thread_time()
        with pytest.raises(Refused) as caught:
            house.accounts.sign_in(head(), email, "wrong password")
        spent.append(time.thread_time() - start)
        said.append((caught.value.status, caught.value.reason, caught.value.headers))
    assert said[0] == said[1] == said[2]
    assert said[0][0] == 401
    assert min(spent) > max(spent) / 3  # seconds of this thread: all are hashed


def test_account_is_opened_once(house: House) -> None:
    number = house.accounts.open_account(ADA, PASSWORD, "admin", who=BOB)
    with pytest.raises(Refused, match=r"an account for .* already") as caught:
        house.accounts.open_account("ADA@example.org", PASSWORD, "viewer", who=BOB)
    assert caught.value.status == 409
    assert [(each.id, each.role) for each in house.accounts.accounts()] == [(number, "admin")]
    with pytest.raises(ValueError, match=r"'root' is no role: viewer, publisher, admin$"):
        house.accounts.open_account(BOB, PASSWORD, "root", who=BOB)
    with pytest.raises(ValueError, match="no role"):
        house.accounts.open_account(BOB, PASSWORD, DEVICE, who=BOB)


def test_new_password_ends_the_sessions_and_counts_from_now_on(house: House) -> None:
    number = house.person()
    _, cookie = house.enter()
    house.accounts.change_account(number, "another password", who=BOB)
    assert house.accounts.actor(head(cookie)) is None
    assert house.ledger.sessions() == []
    assert house.refused(ADA, PASSWORD) == 401
    assert house.accounts.sign_in(head(), ADA, "another password")[0].name == ADA


def test_new_role_counts_at_once(house: House) -> None:
    house.person(BOB)
    number = house.person()
    _, cookie = house.enter()
    house.accounts.change_account(number, role="viewer", who=BOB)
    actor = house.accounts.actor(head(cookie))
    assert actor is not None
    assert actor.role == "viewer"


def test_account_that_is_closed_opens_nothing(house: House) -> None:
    house.person(BOB)
    number = house.person()
    _, cookie = house.enter()
    house.accounts.close_account(number, who=BOB)
    assert house.accounts.actor(head(cookie)) is None
    assert house.refused(ADA, PASSWORD) == 401
    assert house.ledger.sessions() == []
    assert house.person() > number  # no id is used twice


def test_last_administrator_stays(house: House) -> None:
    number = house.person()
    house.person(BOB, "publisher")
    closing = functools.partial(house.accounts.close_account, number, who=ADA)
    lowering = functools.partial(house.accounts.change_account, number, role="viewer", who=ADA)
    for change in (closing, lowering, functools.partial(lowering, password="another password")):  # noqa: S106
        with pytest.raises(Refused, match="the last administrator") as caught:
            change()
        assert caught.value.status == 409
    house.accounts.change_account(number, role="admin", who=ADA)  # which changes nothing
    assert house.accounts.sign_in(head(), ADA, PASSWORD)[0].role == "admin"
    house.person(EVE)
    house.accounts.close_account(number, who=EVE)
    assert [each.email for each in house.accounts.accounts()] == [BOB, EVE]


def test_of_administrators_who_close_each_other_one_stays(house: House) -> None:
    numbers = [house.person(f"{each}@x") for each in range(8)]
    with ThreadPoolExecutor(8) as pool:
        calls = [functools.partial(house.accounts.close_account, n, who="x") for n in numbers]
        assert sorted(pool.map(status_of, calls)) == [200] * 7 + [409]
    assert len(house.accounts.accounts()) == 1


@pytest.mark.parametrize("number", [0, -1, 7, 10**40])
def test_unknown_account_is_404(number: int, house: House) -> None:
    house.person()
    assert status_of(lambda: house.accounts.close_account(number, who=ADA)) == 404
    assert status_of(lambda: house.accounts.change_account(number, role="viewer", who=ADA)) == 404


def test_every_change_stands_in_the_audit(house: House) -> None:
    house.person()
    number = house.accounts.open_account(BOB, PASSWORD, "viewer", who=ADA)
    house.accounts.change_account(number, "another password", "publisher", who=ADA)
    house.accounts.close_account(number, who=ADA)
    token, _ = house.accounts.mint("door", DEVICE, "lamp", MAC, who=ADA)
    house.accounts.revoke(token, who=ADA)
    assert [(each.who, each.action, each.what) for each in house.ledger.audit_log()][1:] == [
        (ADA, "open account", f"{BOB} viewer"),
        (ADA, "change account", f"{BOB} from viewer to publisher, {BOB} has a new password"),
        (ADA, "close account", BOB),
        (ADA, "mint token", f"1 (door) device of lamp of {MAC}"),
        (ADA, "revoke token", f"1 (door) device of lamp of {MAC}"),
    ]
    assert house.ledger.verify_audit()


def test_what_was_refused_stands_in_no_audit(house: House) -> None:
    number = house.person()
    status_of(lambda: house.accounts.close_account(number, who=ADA))
    status_of(lambda: house.accounts.close_account(99, who=ADA))
    status_of(lambda: house.accounts.open_account(ADA, PASSWORD, "viewer", who=ADA))
    assert len(house.ledger.audit_log()) == 1


# -- 5. Sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("always", "secure", "name"),
    [(False, False, "ota"), (False, True, "__Host-ota"), (True, False, "__Host-ota"),
     (True, True, "__Host-ota")],
)  # fmt: skip
def test_cookie_is_as_strict_as_the_connection_allows(
    always: bool,
    secure: bool,
    name: str,
    house: House,
) -> None:
    house.person()
    accounts = Accounts(house.ledger, secure=always)
    _, cookie = accounts.sign_in(head(secure=secure), ADA, PASSWORD)
    pair, *words = cookie.split("; ")
    usual = ["Path=/", "Max-Age=1209600", "HttpOnly", "SameSite=Strict"]
    assert words == usual + ["Secure"] * (name != "ota")
    assert pair.partition("=")[0] == name
    field = f"Cookie: {pair}"
    assert accounts.actor(head(field, secure=secure)) is not None
    end = accounts.sign_out(head(field, secure=secure))
    assert end == cookie.replace(pair, f"{name}=").replace("1209600", "0")
    assert accounts.actor(head(field, secure=secure)) is None


def test_cookie_of_a_plain_page_opens_nothing_by_tls(house: House) -> None:
    house.person()
    _, cookie = house.enter()
    assert house.accounts.actor(head(cookie, secure=True)) is None
    assert house.accounts.actor(head(cookie.replace("ota=", "__Host-ota="))) is None


def test_session_ends_after_14_days(house: House) -> None:
    house.person()
    _, cookie = house.enter()
    house.clock.at = NOW + SESSION_SECONDS - 1
    assert house.accounts.actor(head(cookie)) is not None
    house.clock.at = NOW + SESSION_SECONDS
    assert house.accounts.actor(head(cookie)) is None
    house.enter()
    assert len(house.ledger.sessions()) == 1  # what is over was swept


def test_account_has_at_most_20_sessions_and_the_oldest_goes(house: House) -> None:
    house.person()
    house.person(BOB)
    house.enter(BOB)
    cookies = []
    for _ in range(MAX_SESSIONS + 3):
        house.clock.at += 1
        cookies.append(house.enter()[1])
    alive = [house.accounts.actor(head(cookie)) is not None for cookie in cookies]
    assert alive == [False] * 3 + [True] * MAX_SESSIONS
    assert len(house.ledger.sessions()) == MAX_SESSIONS + 1


def test_session_that_begins_while_the_password_changes_opens_nothing(house: House) -> None:
    number = house.person()
    before = house.accounts.accounts()[0].password
    house.accounts.change_account(number, "another password", who=ADA)
    session = Session("digest", number, NOW, NOW + 99)
    assert not house.ledger.begin(session, before, MAX_SESSIONS)
    assert house.ledger.sessions() == []


def test_session_outlives_a_restart_and_is_known_to_all_processes(house: House) -> None:
    house.person()
    actor, cookie = house.enter()
    with opened(house.path) as registry:
        other = Accounts(Ledger(registry), secure=False, now=house.clock)
        assert other.actor(head(cookie)) == actor
        other.sign_out(head(cookie))
        wait_until(lambda: house.accounts.actor(head(cookie)) is None)


def test_sign_out_without_a_session_does_no_harm(house: House) -> None:
    assert house.accounts.sign_out(head()).startswith("ota=; ")
    assert house.accounts.sign_out(head("Cookie: ota=x")).startswith("ota=; ")


# -- 6. Pages of other servers --------------------------------------------------------------------

SAME, CROSS = "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"


@pytest.mark.parametrize(
    ("fields", "forged"),
    [
        ((), False),
        ((SAME,), False),
        (("Sec-Fetch-Site: none",), False),
        ((CROSS,), True),
        (("Sec-Fetch-Site: same-site",), True),
        (("Sec-Fetch-Site: anything",), True),
        (("Sec-Fetch-Site:",), True),
        (("Origin: http://ota",), False),
        (("Origin: https://OTA",), False),
        (("Origin: http://ota:8000",), True),
        (("Origin: http://ota.evil.example",), True),
        (("Origin: null",), True),
        (("Origin:",), True),
        ((SAME, "Origin: http://behind-a-proxy"), False),
        ((CROSS, "Origin: http://ota"), True),
    ],
)
def test_browser_says_whose_page_it_was(fields: tuple[str, ...], *, forged: bool) -> None:
    assert is_forged(head(*fields, method="POST")) is forged


RIGHT, WRONG, NONE = "right", "wrong", "none"


@pytest.mark.parametrize(
    ("who", "method", "csrf", "fields", "status"),
    [
        ("cookie", "GET", NONE, (), 200),
        ("cookie", "HEAD", NONE, (CROSS,), 200),
        ("cookie", "POST", NONE, (), 403),
        ("cookie", "POST", NONE, (SAME,), 403),
        ("cookie", "POST", WRONG, (SAME,), 403),
        ("cookie", "POST", RIGHT, (), 200),
        ("cookie", "POST", RIGHT, (SAME,), 200),
        ("cookie", "POST", RIGHT, (CROSS,), 403),
        ("cookie", "POST", RIGHT, ("Origin: http://evil.example",), 403),
        ("cookie", "PUT", NONE, (), 403),
        ("cookie", "PATCH", NONE, (), 403),
        ("cookie", "DELETE", NONE, (), 403),
        ("cookie", "BREW", NONE, (), 403),
        ("cookie", "DELETE", RIGHT, (), 200),
        ("bearer", "POST", NONE, (), 200),
        ("bearer", "POST", NONE, (CROSS,), 200),  # a page that has the token may use it
        ("bearer", "POST", WRONG, (), 200),
        ("basic", "POST", NONE, (), 200),
        ("basic", "POST", NONE, (CROSS,), 403),  # browsers remember it, and send it by themselves
        ("basic", "POST", NONE, ("Origin: http://evil.example",), 403),
        ("both", "POST", NONE, (), 200),
        ("stale", "POST", NONE, (), 403),  # the cookie behind a token that is not known
        ("stale", "POST", RIGHT, (), 200),
    ],
)
def test_who_a_browser_speaks_for_must_have_wanted_it(
    who: str, method: str, csrf: str, fields: tuple[str, ...], status: int, house: House
) -> None:
    house.person()
    actor, cookie = house.enter()
    token = house.token("admin")
    given = {
        "cookie": (cookie,), "bearer": (bearer(token),), "basic": (basic("x", token),),
        "both": (bearer(token), cookie), "stale": (bearer("x"), cookie),
    }[who]  # fmt: skip
    word = {RIGHT: actor.csrf, WRONG: "0" * 64}.get(csrf)
    proof = (f"X-CSRF-Token: {word}",) if word else ()
    asked = head(*given, *proof, *fields, method=method)
    assert status_of(lambda: house.accounts.require(asked, "admin")) == status


def test_word_of_one_session_is_not_that_of_another(house: House) -> None:
    house.person()
    (first, _), (_, cookie) = house.enter(), house.enter()
    asked = head(cookie, f"X-CSRF-Token: {first.csrf}", method="POST")
    assert status_of(lambda: house.accounts.require(asked, "admin")) == 403


def test_page_of_another_server_signs_nobody_in(house: House) -> None:
    house.person()
    for field in (CROSS, "Origin: http://evil.example"):
        asked = head(field, method="POST")
        assert status_of(lambda: house.accounts.sign_in(asked, ADA, PASSWORD)) == 403  # noqa: B023
    assert house.ledger.sessions() == []


# -- 7. Throttling --------------------------------------------------------------------------------


def test_account_is_throttled_whoever_tries(house: House) -> None:
    house.person()
    house.person(BOB)
    got = [house.refused(ADA, "wrong", f"198.51.100.{n}") for n in range(TRIES + 2)]
    assert got == [401] * TRIES + [429] * 2
    with pytest.raises(Refused) as caught:
        house.accounts.sign_in(head(peer="203.0.113.1"), ADA, PASSWORD)  # which is right
    assert (caught.value.status, caught.value.headers) == (429, (("Retry-After", "60"),))
    house.enter(BOB)
    house.clock.at += PAUSE - 0.5
    assert house.refused(ADA, PASSWORD) == 429
    house.clock.at += 0.5
    house.enter(ADA)
    assert [house.refused(ADA, "wrong", f"198.51.100.{n}") for n in range(TRIES)] == [401] * TRIES


def test_unknown_account_is_throttled_alike(house: House) -> None:
    for n in range(TRIES):
        house.accounts._count("nobody@x", f"198.51.100.{n}")
    assert house.refused("Nobody@x", "wrong") == 429


def test_address_is_throttled_whomever_it_tries(house: House) -> None:
    house.person()
    people = [house.person(f"{n}@x", "viewer") for n in range(TRIES)]
    assert [house.refused(f"{n}@x", "wrong") for n in range(len(people))] == [401] * TRIES
    assert house.refused(ADA, PASSWORD) == 429
    house.enter(peer="192.0.2.2")


def test_who_knows_one_password_guesses_no_other(house: House) -> None:
    for email in (ADA, EVE):
        house.person(email)
    peer = "198.51.100.1"
    for _ in range(TRIES):
        house.enter(EVE, peer=peer)
        assert house.refused(ADA, "wrong", peer) == 401
    assert house.refused(ADA, "wrong", peer) == 429
    assert status_of(lambda: house.enter(EVE, peer=peer)) == 429


def test_who_guesses_does_not_lock_out_who_signed_in_before(house: House) -> None:
    house.person()
    house.enter()
    got = [house.refused(ADA, "wrong", f"198.51.100.{n}") for n in range(TRIES + 1)]
    assert got[-1] == 429
    house.enter()


def test_who_signed_in_long_ago_is_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_COUNTED", 2)
    house.person()
    for n in range(3):
        house.enter(peer=f"198.51.100.{n}")
    assert list(house.accounts._familiar) == [
        (ADA, "198.51.100.1"),
        (ADA, "198.51.100.2"),
    ]


def test_right_password_does_not_count(house: House) -> None:
    house.person()
    for _ in range(2 * TRIES):
        house.enter()


def test_tries_at_the_same_time_count_each(house: House) -> None:
    house.person()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: house.refused(ADA, "wrong"), range(3 * TRIES)))
    assert (got.count(401), got.count(429)) == (TRIES, 2 * TRIES)


@pytest.mark.parametrize(
    ("address", "counted"),
    [("192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("unix", "unix"),
     ("fe80::1%eth0", "fe80::/64"), ("::ffff:192.0.2.7", "::ffff:192.0.2.7"), ("", "")],
)  # fmt: skip
def test_addresses_of_one_network_are_one(address: str, counted: str) -> None:
    assert network(address) == counted


def test_what_is_counted_is_bounded_and_who_tried_most_is_not_forgotten() -> None:
    throttle = Throttle()
    throttle.count("target", NOW, TRIES)
    for n in range(MAX_COUNTED + 500):
        throttle.count(f"{n}", NOW)
    assert len(throttle._free_at) == MAX_COUNTED
    assert throttle.wait("target", NOW) == PAUSE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 300), st.booleans()), max_size=40))
def test_never_more_tries_than_promised(steps: list[tuple[float, bool]]) -> None:
    throttle, now, tried = Throttle(), float(NOW), []
    for pause, back in steps:
        now += pause
        if not throttle.wait("x", now):
            throttle.count("x", now)
            tried.append(now)
        if back:
            assert throttle.wait("x", now - 10**6) <= PAUSE  # the clock was set back
    for start, end in itertools.combinations(tried, 2):
        within = sum(start <= each <= end for each in tried)
        assert within <= TRIES + (end - start) / PAUSE + 1e-6


def test_threads_with_a_password_are_few(house: House) -> None:
    house.person()
    places = [house.accounts._a_place() for _ in range(MAX_WAITING)]
    for place in places:
        place.__enter__()
    with pytest.raises(Refused) as caught:
        house.enter()
    assert caught.value.status == 503
    for place in places:
        place.__exit__(None, None, None)
    for _ in range(TRIES + 1):  # what found no place was no try
        house.enter()


# -- 8. The first administrator -------------------------------------------------------------------


def test_link_of_the_log_works_once(house: House) -> None:
    secret = house.accounts.setup_secret
    assert len(secret) == 32
    assert secret.encode() not in house.stored()
    house.accounts.set_up(secret, "Ada@example.org", PASSWORD)
    assert house.accounts.setup_secret == ""
    assert house.accounts.sign_in(head(), ADA, PASSWORD)[0].role == "admin"
    for again in (secret, "", "x"):
        with pytest.raises(Refused, match="there is an administrator already") as caught:
            house.accounts.set_up(again, EVE, PASSWORD)
        assert caught.value.status == 409
    assert [entry.who for entry in house.ledger.audit_log()] == ["set-up"]


@pytest.mark.parametrize("secret", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_wrong_link_makes_nobody(secret: str, house: House) -> None:
    assert status_of(lambda: house.accounts.set_up(secret, EVE, PASSWORD)) == 403
    assert house.accounts.accounts() == []


@pytest.mark.parametrize(("email", "password"), [("x", PASSWORD), (ADA, "short")])
def test_link_works_again_after_a_mistake(email: str, password: str, house: House) -> None:
    with pytest.raises(ValueError, match=r"password|address"):
        house.accounts.set_up(house.accounts.setup_secret, email, password)
    house.accounts.set_up(house.accounts.setup_secret, ADA, PASSWORD)


def test_of_many_who_use_the_link_at_once_one_is_first(house: House) -> None:
    secret, barrier = house.accounts.setup_secret, threading.Barrier(4)

    def use(n: int) -> int:
        barrier.wait()
        return status_of(lambda: house.accounts.set_up(secret, f"{n}@x", PASSWORD))

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(use, range(4))) == [200, 409, 409, 409]
    assert len(house.accounts.accounts()) == 1


def test_link_of_another_process_is_void_once_there_is_an_account(house: House) -> None:
    with opened(house.path) as registry:
        other = Accounts(Ledger(registry), secure=False)
        secret = other.setup_secret
        house.accounts.set_up(house.accounts.setup_secret, ADA, PASSWORD)
        assert status_of(lambda: other.set_up(secret, EVE, PASSWORD)) == 409
    assert len(house.ledger.accounts()) == 1


def test_first_account_comes_from_the_environment_and_only_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for word in (PASSWORD, "another password"):
        with caplog.at_level("DEBUG"), remembering(folder, admin_email=ADA, admin_password=word):
            pass
    with opened(folder.parent / "state" / "fleet.db") as registry:
        accounts = Accounts(Ledger(registry), secure=False)
        assert accounts.sign_in(head(), ADA, PASSWORD)[0].role == "admin"
        assert len(accounts.accounts()) == 1
    assert "/admin/setup#" not in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(("email", "password"), [("x", PASSWORD), (ADA, ""), (ADA, "short")])
def test_environment_that_makes_no_account_is_an_error(
    email: str, password: str, folder: Path
) -> None:
    with (
        pytest.raises(ValueError, match=r"^ADMIN_EMAIL, ADMIN_PASSWORD: .*(address|password)"),
        remembering(folder, admin_email=email, admin_password=password),
    ):
        pass


def test_servers_that_start_together_make_one_account(
    house: House, folder: Path, said: Callable[[], list[str]]
) -> None:
    with opened(house.path) as registry:
        slow = Accounts(Ledger(registry), secure=False)
        site = site_of(folder, admin_email=ADA, admin_password=PASSWORD)
        ota_fleet.begin(house.accounts, site)
        ota_fleet.begin(slow, site)
    assert [account.email for account in house.ledger.accounts()] == [ADA]
    assert said()[-1] == "INFO ADMIN_EMAIL is not used: there is an account"


def test_log_says_that_the_environment_makes_no_second_account(
    folder: Path, lines: Callable[[str], list[str]]
) -> None:
    for told in (0, 1):
        with remembering(folder, admin_email=ADA, admin_password=PASSWORD):
            assert len(lines("INFO ADMIN_EMAIL is not used")) == told


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"host": "192.0.2.7", "port": 8123}, "http://192.0.2.7:8123/admin/setup#"),
        ({"host": "::1", "port": 443, "cert": "x"}, "https://[::1]:443/admin/setup#"),
        ({"host": "unix:/run/ota"}, "at /admin/setup#"),
        ({"inherited": "1"}, "at /admin/setup#"),
    ],
)
def test_link_of_the_log_is_a_whole_url_where_it_is_known(
    settings: dict[str, Any],
    url: str,
    folder: Path,
    house: House,
    lines: Callable[[str], list[str]],
) -> None:
    site = site_of(folder)
    ota_fleet.begin(
        house.accounts,
        dataclasses.replace(site, config=dataclasses.replace(site.config, **settings)),
    )
    (line,) = lines("/admin/setup#")
    assert url in line


def test_log_tells_the_link_until_there_is_an_account(
    folder: Path, said: Callable[[], list[str]]
) -> None:
    with remembering(folder) as site, registry_of(site) as registry:
        told = [line for line in said() if "/admin/setup#" in line]
        assert len(told) == 1
        assert told[0].startswith("WARNING there is no account yet")
        account = Account(0, ADA, "admin", cheap(PASSWORD), NOW)
        Ledger(registry).add_account(account, "test")
    with remembering(folder):
        assert len([line for line in said() if "/admin/setup#" in line]) == 1


# -- 9. Images -------------------------------------------------------------------------------------

FIRMWARE = "/firmware?version=0.1"


@pytest.fixture
def locked(folder: Path) -> Iterator[tuple[Site, Accounts]]:
    """A site with --token and two projects, and its accounts."""
    put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))
    with remembering(folder, token="tok") as site:  # noqa: S106
        guard = next(each for each in site.guards if isinstance(each, Credentials))
        yield site, guard.accounts


@pytest.mark.parametrize(
    ("token", "target", "fields", "opens"),
    [
        (("device", "", ""), FIRMWARE, (), True),
        (("device", "", ""), "/firmware/firmware-1.0.0.bin", (), True),
        (("device", "", ""), "/lamp/latest.bin", (), True),
        (("device", "lamp", ""), FIRMWARE, (), False),
        (("device", "firmware", ""), FIRMWARE, (), True),
        (("device", "firmware", ""), "/firmware/firmware-1.0.0.bin", (), True),
        (("device", "firmware", ""), "/firmware-1.0.0.bin", (), True),
        (("device", "firmware", ""), "/firmware/lamp-1.0.0.bin", (), False),
        (("device", "firmware", ""), "/lamp/latest.bin", (), False),
        (("device", "firmware", ""), "/update?dev=lamp&ver=0.1", (), False),
        (("device", "firmware", ""), "/firmware/versions", (), True),
        (("device", "firmware", ""), "/", (), False),
        (("device", "firm", ""), FIRMWARE, (), False),
        (("device", "", MAC), FIRMWARE, (), True),  # who does not say who it is
        (("device", "", MAC), FIRMWARE, (f"x-ESP8266-STA-MAC: {MAC}",), True),
        (("device", "", MAC), FIRMWARE, (f"x-ESP8266-STA-MAC: {MAC.lower()}",), True),
        (("device", "", MAC.replace(":", "")), FIRMWARE, (f"x-ESP32-STA-MAC: {MAC}",), True),
        (("device", "", MAC), FIRMWARE, (f"x-ESP8266-STA-MAC: {OTHER}",), False),
        (("device", "", MAC), FIRMWARE, (f"x-ESP32-STA-MAC: {OTHER}",), False),
        (("device", "", MAC), FIRMWARE, ("x-ESP8266-STA-MAC: nonsense",), False),
        (("device", "", MAC), FIRMWARE,
         (f"x-ESP8266-STA-MAC: {MAC}", f"x-ESP32-STA-MAC: {OTHER}"), False),
        (("device", "", MAC), FIRMWARE, (f"x-MGOS-Device-ID: esp32_123456 {MAC}",), True),
        (("device", "", MAC), FIRMWARE, (f"x-MGOS-Device-ID: esp32_123456 {OTHER}",), False),
        (("device", "lamp", MAC), FIRMWARE, (f"x-ESP8266-STA-MAC: {MAC}",), False),
        (("viewer", "", ""), FIRMWARE, (), False),
        (("publisher", "", ""), FIRMWARE, (), True),
        (("publisher", "lamp", ""), FIRMWARE, (), False),
        (("admin", "", ""), FIRMWARE, (), True),
    ],
)  # fmt: skip
def test_token_of_the_fleet_opens_images_that_are_for_it(
    token: tuple[str, str, str],
    target: str,
    fields: tuple[str, ...],
    opens: bool,
    locked: tuple[Site, Accounts],
) -> None:
    site, accounts = locked
    number, text = accounts.mint("t", *token, who="test")
    in_query = f"{target}{'&' if '?' in target else '?'}token={text}"
    for asked in (
        ask(site, target, bearer(text), *fields),
        ask(site, target, basic("any", text), *fields),
        ask(site, in_query, *fields),
    ):
        assert (asked.status != 401) == opens
    assert ask(site, target, bearer("tok"), *fields).status != 401  # the old one still does
    accounts.revoke(number, who="test")
    assert ask(site, target, bearer(text), *fields).status == 401


def test_who_signed_in_downloads_by_the_cookie(locked: tuple[Site, Accounts]) -> None:
    site, accounts = locked
    with registry_of(site) as registry:
        for email, role in ((ADA, "publisher"), (BOB, "viewer")):
            account = Account(0, email, role, cheap(PASSWORD), NOW)
            Ledger(registry).add_account(account, "test")
        wait_until(lambda: len(accounts.accounts()) == 2)
    for email, status in ((ADA, 200), (BOB, 401)):
        _, cookie = accounts.sign_in(head(), email, PASSWORD)
        assert ask(site, FIRMWARE, f"Cookie: {cookie.partition(';')[0]}").status == status


def test_token_of_another_process_opens_images_until_it_is_revoked(
    locked: tuple[Site, Accounts],
) -> None:
    site, _ = locked
    with registry_of(site) as registry:
        accounts = Accounts(Ledger(registry), secure=False)
        number, token = accounts.mint("door", DEVICE, "firmware", who=ADA)
        wait_until(lambda: ask(site, FIRMWARE, bearer(token)).status == 200)
        accounts.revoke(number, who=ADA)
        wait_until(lambda: ask(site, FIRMWARE, bearer(token)).status == 401)


@pytest.mark.parametrize("fields", [(), (bearer("wrong"),), (bearer("ota_" + "A" * 32),)])
def test_without_a_token_the_core_refuses_as_before(
    fields: tuple[str, ...], locked: tuple[Site, Accounts]
) -> None:
    site, _ = locked
    reply = ask(site, FIRMWARE, *fields)
    assert reply.status == 401
    assert "as Bearer, password of Basic, or ?token=" in text_of(reply)


def test_token_opens_nothing_to_who_may_not_ask(folder: Path) -> None:
    nets = ota_server.read_config(["--allow", "10.0.0.0/8"], {}).allow
    with remembering(folder, allow=nets, token="tok") as site:  # noqa: S106
        assert ask(site, FIRMWARE, bearer("tok")).status == 403


# -- 10. Never ------------------------------------------------------------------------------------


def test_no_secret_is_in_the_log_or_on_the_disk(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        setup = house.accounts.setup_secret
        house.accounts.set_up(setup, ADA, PASSWORD)
        actor, cookie = house.enter()
        house.refused(ADA, "a wrong one, mistyped")
        house.refused("a password as address", "x")
        number = house.accounts.open_account(BOB, "the password of bob", "viewer", who=ADA)
        house.accounts.change_account(number, "another one of bob", who=ADA)
        token = house.token("publisher")
        house.accounts.require(head(bearer(token)), "publisher")
        status_of(lambda: house.accounts.require(head(bearer(f"{token}x")), "viewer"))
        status_of(lambda: house.accounts.set_up("not the secret", ADA, PASSWORD))
    secrets = [
        setup, PASSWORD, actor.csrf, cookie.partition("=")[2], "a wrong one, mistyped",
        "a password as address", "the password of bob", "another one of bob", token, token[4:],
        "not the secret",
    ]  # fmt: skip
    for secret in secrets:
        assert secret not in caplog.text
        assert secret.encode() not in house.stored()
        assert base64.b64encode(secret.encode())[:-4] not in house.stored()
    shown = repr((house.accounts.accounts(), house.ledger.sessions(), house.accounts.tokens()))
    assert not any(secret in shown for secret in secrets)
    assert "scrypt" not in shown


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_text_signs_nobody_in_and_breaks_nothing(text: str, house: House) -> None:
    house.person()
    assert house.refused(ADA, text) == 401
    spent = time.thread_time()
    assert house.refused(text, "x" * 1_000_000) == 401
    assert time.thread_time() - spent < 0.1  # it was not hashed
    with pytest.raises(ValueError, match="e-mail address"):
        house.accounts.open_account(text, PASSWORD, "viewer", who=text)
    with pytest.raises(ValueError, match="is no role"):
        house.accounts.open_account(BOB, PASSWORD, text, who=text)
    assert status_of(lambda: house.accounts.close_account(99, who=text)) == 404
    assert house.accounts.holder(text) is None
    house.ledger.audit(text, text, text, NOW)
    assert house.ledger.verify_audit()
    house.enter()


@settings(max_examples=150, deadline=None)
@given(
    cookie=st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")),
    field=st.text(st.characters(min_codepoint=32, max_codepoint=126)),
)
def test_whatever_a_request_carries_it_is_nobody(
    cookie: str, field: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked = head(method="POST")
    headers = {
        **asked.headers, "cookie": f"ota={cookie}; {field}", "authorization": field,
        "x-csrf-token": cookie, "origin": field, "sec-fetch-site": field,
    }  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "hostile.db"
    with opened(path) as registry:
        accounts = Accounts(Ledger(registry), secure=False)
        assert accounts.actor(asked._replace(headers=headers)) is None
        assert status_of(lambda: accounts.require(asked._replace(headers=headers), "viewer")) == 401


def test_who_asks_waits_for_nobody(house: House) -> None:
    house.person()
    _, cookie = house.enter()
    token = house.token("viewer")
    house.ledger.registry.close()  # now who reads a row fails
    assert house.accounts.require(head(cookie), "admin").name == ADA
    assert house.accounts.require(head(bearer(token)), "viewer").role == "viewer"
    assert status_of(lambda: house.accounts.require(head(bearer("x")), "viewer")) == 401


def test_checks_are_answered_while_passwords_are_hashed(locked: tuple[Site, Accounts]) -> None:
    site, accounts = locked
    done: list[int] = []

    def guess(n: int) -> None:
        done.append(status_of(lambda: accounts.sign_in(head(), f"{n}@x", "a wrong password")))

    with standing(site) as stand, ThreadPoolExecutor(8) as pool:
        for n in range(8):
            pool.submit(guess, n)
        with stand.dial() as wire:
            while not done:
                start = time.monotonic()
                assert wire.ask(FIRMWARE, bearer("tok")).status == 200
                assert time.monotonic() - start < 5
    assert sorted(done) == [401] * 8
