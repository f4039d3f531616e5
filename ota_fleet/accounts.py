"""Who asks, and may they: people with a password, programs and devices with a token.

    request with a token or a cookie -- actor() --> Actor: name, role, project
    e-mail and password -- sign_in() --> a session, whose cookie the browser keeps
    secret of the log -- set_up() --> the first administrator

The loop asks, so what it needs is in memory. Tokens and the secrets of sessions are random, shown
once and kept as SHA-256; passwords are what people think of, so scrypt (RFC 7914) makes each guess
dear. Rows are in `ledger.py`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from ota_fleet.ledger import Ledger
from ota_fleet.rows import Account, Session, Token, clean, normal_id
from ota_server import Catalog, Refused, Request, given_token, read_path, shown

ROLES = ("viewer", "publisher", "admin")  # each may what the ones before it may
DEVICE = "device"  # stands apart: reads images, and its own of the two-step protocol
MIN_PASSWORD, MAX_PASSWORD = 10, 1000  # characters
MAX_EMAIL = 254  # characters: RFC 5321 4.5.3.1.3
MAX_NAME = 64  # characters of a token's name
SESSION_SECONDS = 14 * 24 * 3600
MAX_SESSIONS = 20  # of an account; the oldest goes
HASHES = 2  # passwords that are hashed at once: each needs 16 MB and a processor
MAX_WAITING = 8  # threads with a password: the others are for everybody else
TRIES = 10  # wrong passwords at once, of an account and of an address
PAUSE = 60.0  # seconds, after which there is one more
MAX_COUNTED = 10_000  # accounts and addresses whose tries are counted, some 3 MB each
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))  # change nothing: RFC 9110 9.2.1
BEARER = ("WWW-Authenticate", 'Bearer realm="ota-server"')  # no browser pops up a dialogue

_COST = (1 << 14, 8, 5)  # n, r, p: OWASP's for 16 MB
_RANK = {role: rank for rank, role in enumerate(ROLES)}
_MAC_FIELDS = ("x-esp8266-sta-mac", "x-esp32-sta-mac", "x-mgos-device-id")

log = logging.getLogger("ota.accounts")


class Actor(NamedTuple):
    """Who asks."""

    name: str  # for the audit: an e-mail address, or "token 3 (CI)"
    role: str  # one of ROLES, or "device"
    project: str = ""  # "": all
    device: str = ""  # normal_id; "": none
    account: int = 0  # 0: it is a token
    csrf: str = ""  # what a request that changes something must carry; "": no cookie was used


# -- 1. Passwords ----------------------------------------------------------------------------------


def hashed(password: str, salt: bytes) -> str:
    """What is stored of a password: how it is hashed, with which salt, and the hash."""
    return _scrypt(password, *_COST, salt)


def is_password(password: str, stored: str) -> bool:
    """Whether this is the password of which that is stored."""
    _, n, r, p, salt, _ = stored.split("$")
    again = _scrypt(password, int(n), int(r), int(p), base64.b64decode(salt))
    return hmac.compare_digest(again, stored)


def _scrypt(password: str, n: int, r: int, p: int, salt: bytes) -> str:
    # One keyboard writes an umlaut as one character, another as two: RFC 8265 4.2.2.
    data = unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")
    key = hashlib.scrypt(data, salt=salt, n=n, r=r, p=p, dklen=32)
    words = (base64.b64encode(each).decode() for each in (salt, key))
    return "$".join(("scrypt", str(n), str(r), str(p), *words))


# Compared for who has no account, so that it takes as long; no password has this hash.
_NOBODY = "$".join(("scrypt", *map(str, _COST), base64.b64encode(bytes(16)).decode(), "-"))


def checked_email(text: str) -> str:
    """The address in lower case, looked at lightly. ValueError: a sentence."""
    email = text.strip().lower()
    user, at, host = email.rpartition("@")
    if not (user and at and host and email.isprintable()) or " " in email:
        raise ValueError(f"{shown(text)} is no e-mail address")
    if len(email) > MAX_EMAIL:
        raise ValueError(f"an e-mail address has at most {MAX_EMAIL} characters")
    return email


def checked_password(text: str) -> str:
    """The password. ValueError: a sentence, which does not hold it."""
    if not MIN_PASSWORD <= len(text) <= MAX_PASSWORD:
        raise ValueError(f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} characters")
    return text


def checked_role(text: str, *others: str) -> str:
    """One of the roles. ValueError: a sentence."""
    known = (*ROLES, *others)
    if text not in known:
        raise ValueError(f"{shown(text)} is no role: {', '.join(known)}")
    return text


# -- 2. How often somebody may try -----------------------------------------------------------------


class Throttle:
    """Counts tries by a key: TRIES at once, one more each PAUSE seconds. One thread at a time."""

    def __init__(self) -> None:
        self._free_at: dict[str, float] = {}  # UTC seconds, when nothing will be counted any more

    def wait(self, key: str, now: float) -> float:
        """Seconds until the next try; 0: none."""
        return max(0.0, self._debt(key, now) - (TRIES - 1) * PAUSE)

    def count(self, key: str, now: float, tries: int = 1) -> None:
        """Adds tries; less than none takes them back."""
        debt = self._debt(key, now) + tries * PAUSE
        self._free_at.pop(key, None)
        if debt <= 0:
            return
        if len(self._free_at) >= MAX_COUNTED:  # who tried least is not the one to remember
            del self._free_at[min(self._free_at, key=self._free_at.__getitem__)]
        self._free_at[key] = now + debt

    def _debt(self, key: str, now: float) -> float:
        return min(max(0.0, self._free_at.get(key, now) - now), TRIES * PAUSE)  # clocks jump


def network(address: str) -> str:
    """What counts as one address: of IPv6, everybody has 2^64."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(ip), 64), strict=False))
    return address


# -- 3. What a request says ------------------------------------------------------------------------


def digest_of(secret: str) -> str:
    """What is stored of a token, or of a session's secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def is_forged(request: Request) -> bool:
    """Whether a browser says that a page of another server sent this: Fetch Metadata, Origin."""
    where = request.headers.get("sec-fetch-site")
    if where is not None:
        return where not in {"same-origin", "none"}
    origin = request.headers.get("origin")
    if origin is None:  # no browser
        return False
    return origin.partition("://")[2].lower() != request.headers.get("host", "").lower()


def allow(actor: Actor, role: str, project: str = "") -> None:
    """Refused: 403, who has not this role, or not for this project; "": what is of none."""
    if _RANK.get(actor.role, -1) < _RANK[role]:
        raise Refused(403, f"{actor.name} is {actor.role}: the role {role} is needed for this")
    if actor.project not in {"", project}:
        raise Refused(403, f"{actor.name} is for {shown(actor.project)} only")


def same(given: str, secret: str) -> bool:
    """Whether two texts are the same, in a time that does not tell how far."""
    pair = (each.encode("utf-8", "surrogatepass") for each in (given, secret))
    return hmac.compare_digest(*pair)


# -- 4. Accounts -----------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What the loop looks at; replaced whole."""

    tokens: dict[str, Token]  # by digest
    accounts: dict[int, Account]
    sessions: dict[str, Session]  # by digest


class Accounts:
    """People, their sessions, and tokens. What does not change anything never blocks."""

    def __init__(
        self, ledger: Ledger, *, secure: bool, now: Callable[[], float] = time.time
    ) -> None:
        """With `secure` cookies are for TLS only, also where a request does not say it came so."""
        self._ledger = ledger
        self._secure = secure
        self._now = now
        self._setup = secrets.token_urlsafe(24)
        self._turn = threading.Lock()  # of what follows
        self._by_account, self._by_address = Throttle(), Throttle()
        self._familiar: dict[tuple[str, str], None] = {}  # account and address that signed in
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        # Threads of their own: 16 MB of each thread that ever hashed would stay with it.
        self._hashing = ThreadPoolExecutor(HASHES, "passwords")
        ledger.registry.watch(self._read)

    def close(self) -> None:
        """Ends the threads that hash; once more does nothing."""
        self._hashing.shutdown()

    def _read(self) -> None:
        self._known = _Known(
            {token.digest: token for token in self._ledger.tokens()},
            {account.id: account for account in self._ledger.accounts()},
            {session.digest: session for session in self._ledger.sessions()},
        )

    # -- Who asks

    def actor(self, request: Request) -> Actor | None:
        """Who asks, by Bearer, password of Basic, or cookie; None: nobody who is known."""
        return self.holder(given_token(request._replace(query=""))) or self._person(request)

    def holder(self, text: str) -> Actor | None:
        """Who has this token; None: it is none."""
        token = self._known.tokens.get(digest_of(text)) if text else None
        if token is None:
            return None
        return Actor(f"token {token.id} ({token.name})", token.role, token.project, token.device)

    def _person(self, request: Request) -> Actor | None:
        secret = self._cookie(request)
        session = self._known.sessions.get(digest_of(secret)) if secret else None
        if session is None or session.expires <= self._now():
            return None
        account = self._known.accounts.get(session.account)
        return _actor(account, secret) if account else None

    def require(self, request: Request, role: str, project: str = "") -> Actor:
        """Who asks, and may: has the role, for this project; "": for what is of no project.

        Raises:
            Refused: 401, nobody who is known; 403, somebody who may not, or whom a page of
                another server made ask.
        """
        actor = self.actor(request)
        if actor is None:
            given = "authorization" in request.headers or self._cookie(request)
            reason = (
                "the token or session is not known, or over" if given else "a credential is needed"
            )
            raise Refused(401, f"{reason}: a token as Bearer, or sign in", BEARER)
        self._stop_forgery(request, actor)
        allow(actor, role, project)
        return actor

    def _stop_forgery(self, request: Request, actor: Actor) -> None:
        """Refused: 403. What a browser adds by itself, Basic too, proves nothing."""
        if request.method in SAFE:
            return
        scheme = request.headers.get("authorization", "").partition(" ")[0]
        if scheme.lower() != "bearer" and is_forged(request):
            raise Refused(403, "a page of another server sent this, or a proxy changed the Host")
        if actor.csrf and not same(request.headers.get("x-csrf-token", ""), actor.csrf):
            raise Refused(403, "X-CSRF-Token is missing or wrong: GET the session, which tells it")

    # -- People

    @property
    def setup_secret(self) -> str:
        """What the first administrator proves to have read the log with; "": there is one."""
        return "" if self._known.accounts else self._setup

    def accounts(self) -> list[Account]:
        """All accounts, the oldest first."""
        return list(self._known.accounts.values())

    def set_up(self, secret: str, email: str, password: str) -> None:
        """Makes the first administrator.

        Raises:
            Refused: 403, the secret is wrong; 409, there is one.
            ValueError: a sentence about e-mail address or password.
        """
        if self._known.accounts:
            raise Refused(409, "there is an administrator already: sign in")
        if not same(secret, self._setup):
            raise Refused(403, "this link is not the one in the log: it is new after each start")
        self._open(email, password, "admin", "set-up", first=True)

    def open_account(self, email: str, password: str, role: str, *, who: str) -> int:
        """Makes an account; gives back its id. Refused: 409, there is one. ValueError: as above."""
        return self._open(email, password, role, who)

    def _open(self, email: str, password: str, role: str, who: str, *, first: bool = False) -> int:
        email, role = checked_email(email), checked_role(role)
        text = self._hash(password)
        account = Account(0, email, role, text, int(self._now()))
        return self._ledger.add_account(account, who, first=first)

    def change_account(
        self, account: int, password: str | None = None, role: str | None = None, *, who: str
    ) -> None:
        """Sets password or role; None: it stays. A new password ends all sessions.

        Raises:
            Refused: 404, there is no such account; 409, the last administrator has to stay one.
            ValueError: as set_up().
        """
        role = "" if role is None else checked_role(role)
        text = "" if password is None else self._hash(password)
        now = int(self._now())
        if not self._ledger.change_account(account, who, now, role=role, password=text):
            raise _no_account(account)

    def close_account(self, account: int, *, who: str) -> None:
        """Forgets an account. Refused: 404, 409, as change_account()."""
        if not self._ledger.close_account(account, who, int(self._now())):
            raise _no_account(account)

    # -- Sessions

    def sign_in(self, request: Request, email: str, password: str) -> tuple[Actor, str]:
        """Who signed in, and the text of Set-Cookie.

        Raises:
            Refused: 401, e-mail address or password is wrong; 429, too many were; 503, others
                are signing in; 403, a page of another server sent this.
        """
        if is_forged(request):
            raise Refused(403, "a page of another server sent this, or a proxy changed the Host")
        email, address = email.strip().lower()[:MAX_EMAIL], network(request.peer)
        account = next((each for each in self.accounts() if each.email == email), None)
        with self._a_place():
            self._count(email, address)
            stored = account.password if account else _NOBODY
            fits = len(password) <= MAX_PASSWORD and self._fits(password, stored)
        secret = secrets.token_urlsafe(24)
        if account is None or not fits or not self._begin(account, secret):
            if account:
                log.info("%s: a wrong password for %s", request.peer, email)
            raise Refused(401, "the e-mail address or the password is wrong", BEARER)
        self._forgive(email, address)
        log.info("%s: %s signs in", request.peer, email)
        return _actor(account, secret), self._set_cookie(request, secret, SESSION_SECONDS)

    def sign_out(self, request: Request) -> str:
        """Ends the session of a request; gives back the text of Set-Cookie."""
        if secret := self._cookie(request):
            self._ledger.end(digest_of(secret))
        return self._set_cookie(request, "", 0)

    def sessions(self, request: Request) -> list[tuple[Session, bool]]:
        """Those of who asks, the newest first, and whether the request is of it."""
        own = self._known.sessions.get(digest_of(self._cookie(request)))
        now = self._now()
        found = [
            (each, each == own)
            for each in self._known.sessions.values()
            if own and each.account == own.account and each.expires > now
        ]
        return sorted(found, key=lambda pair: pair[0].created, reverse=True)

    def sign_out_others(self, request: Request) -> None:
        """Ends the sessions of who asks, but for the one that the request is of."""
        for session, is_this in self.sessions(request):
            if not is_this:
                self._ledger.end(session.digest)

    def _begin(self, account: Account, secret: str) -> bool:
        now = int(self._now())
        session = Session(digest_of(secret), account.id, now, now + SESSION_SECONDS)
        return self._ledger.begin(session, account.password, MAX_SESSIONS)

    def _is_secure(self, request: Request) -> bool:
        return self._secure or request.secure

    def _cookie(self, request: Request) -> str:
        """The secret of a session that the browser has; by TLS, none that a plain page left."""
        return cookie_of(request, cookie_name(secure=self._is_secure(request)))

    def _set_cookie(self, request: Request, secret: str, seconds: int) -> str:
        secure = self._is_secure(request)
        return cookie_text(cookie_name(secure=secure), secret, seconds, secure=secure)

    def _count(self, email: str, address: str) -> None:
        """Counts a try before it is known to be wrong, as many may come at once. Refused: 429."""
        now = self._now()
        with self._turn:
            # Else whoever guesses locks the owner of the account out.
            known = (email, address) in self._familiar
            counted = [(self._by_address, address)] + [(self._by_account, email)] * (not known)
            wait = max(throttle.wait(key, now) for throttle, key in counted)
            if wait > 0:
                again = ("Retry-After", str(math.ceil(wait)))
                log.warning("%s: too many wrong passwords", address)
                raise Refused(429, f"too many wrong passwords: wait {math.ceil(wait)} s", again)
            for throttle, key in counted:
                throttle.count(key, now)

    def _forgive(self, email: str, address: str) -> None:
        """What was right does not count; the address may have tried others' passwords, too."""
        now = self._now()
        with self._turn:
            self._by_address.count(address, now, -1)
            self._by_account.count(email, now, -TRIES)
            self._familiar[email, address] = None
            if len(self._familiar) > MAX_COUNTED:
                del self._familiar[next(iter(self._familiar))]

    # -- Hashing

    @contextmanager
    def _a_place(self) -> Iterator[None]:
        """Refused: 503, so many threads have a password to hash that others would wait."""
        if not self._waiting.acquire(blocking=False):
            raise Refused(503, "many are signing in just now: try again")
        try:
            yield
        finally:
            self._waiting.release()

    def _fits(self, password: str, stored: str) -> bool:
        return self._hashing.submit(is_password, password, stored).result()

    def _hash(self, password: str) -> str:
        password = checked_password(password)
        with self._a_place():
            return self._hashing.submit(hashed, password, secrets.token_bytes(16)).result()

    # -- Tokens

    def tokens(self) -> list[Token]:
        """All tokens, the oldest first."""
        return list(self._known.tokens.values())

    def mint(
        self, name: str, role: str, project: str, device: str = "", *, who: str
    ) -> tuple[int, str]:
        """A new token: its id, and the token, which nobody can tell again. ValueError: a sentence.

        `project` "": for all; `device`, with the role "device": the only one that it is for.
        """
        name = name.strip()
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise ValueError(f"a token has a name of 1 to {MAX_NAME} characters")
        if not (project.isprintable() and device.isprintable()):
            raise ValueError("project and device hold only what can be printed")
        if checked_role(role, DEVICE) != DEVICE and device:
            raise ValueError(f"a token for one device has the role {DEVICE}")
        text = f"ota_{secrets.token_urlsafe(24)}"
        row = (0, name, role, clean(project), digest_of(text), normal_id(device), int(self._now()))
        return self._ledger.add_token(Token(*row), who), text

    def revoke(self, token: int, *, who: str) -> None:
        """Forgets a token, which opens nothing from now on. Refused: 404, there is none."""
        if not self._ledger.revoke_token(token, who, int(self._now())):
            raise Refused(404, f"there is no token {token}")


def _actor(account: Account, secret: str) -> Actor:
    csrf = hmac.new(secret.encode("latin-1"), b"csrf", "sha256").hexdigest()
    return Actor(account.email, account.role, account=account.id, csrf=csrf)


def _no_account(account: int) -> Refused:
    return Refused(404, f"there is no account {account}")


def cookie_name(*, secure: bool) -> str:
    """With __Host- no other server of the domain, and no plain page, can set it: RFC 6265bis."""
    return "__Host-ota" if secure else "ota"


def cookie_of(request: Request, name: str) -> str:
    """What a browser keeps under a name; "": nothing."""
    pairs = (each.strip().partition("=") for each in request.headers.get("cookie", "").split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def cookie_text(name: str, value: str, seconds: int, *, secure: bool) -> str:
    """Set-Cookie of what no script reads and no other site's page makes a browser send."""
    words = f"{name}={value}", "Path=/", f"Max-Age={seconds}", "HttpOnly", "SameSite=Strict"
    return "; ".join((*words, *("Secure",) * secure))


# -- 5. Images -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opening:
    """The guard of images for who has a token of the fleet; for all others, the one it wraps."""

    accounts: Accounts
    catalog: Catalog
    guard: Callable[[Request], None]

    def __call__(self, request: Request) -> None:
        """Refused: as the other guard says."""
        if not self.opens(request):
            self.guard(request)

    def opens(self, request: Request) -> bool:
        """Whether the request comes from who may have what it asks for."""
        actor = self.accounts.holder(given_token(request)) or self.accounts.actor(request)
        if actor is None or actor.role not in {DEVICE, *ROLES[1:]}:
            return False
        if actor.project and read_path(self.catalog, request).project != actor.project:
            return False
        names = (request.headers.get(each, "").rpartition(" ")[2] for each in _MAC_FIELDS)
        return not actor.device or all(normal_id(each) == actor.device for each in names if each)
