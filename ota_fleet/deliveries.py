"""What a webhook is sent, how, and when again: a signed POST. No SQL, no thread of its own.

Webhook, Delivery -- send() --> "" for a 2xx in time, else why not --> pause_of(tries)
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader, RawIOBase
from socket import socket
from ssl import SSLContext
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from ota_fleet.rows import clean
from ota_server import __version__, printable

EVENTS = (
    "rollout.halted", "rollout.finished", "device.silent", "device.looping", "device.unknown",
    "release.new",
)  # fmt: skip
MAX_URL = 2_000  # characters
MIN_SECRET, MAX_SECRET = 16, 255  # characters
CONNECT = 5.0  # seconds for a connection, to each address of a name
TIMEOUT = 10.0  # seconds for an answer
MAX_ANSWER = 64 * 1024  # bytes of an answer's body that are read, so that who sends it can end
FIRST, LONGEST = 60, 6 * 3_600  # seconds between tries


@dataclass(frozen=True, slots=True)
class Webhook:
    """Somebody who wants to know what happens."""

    id: int
    url: str
    events: tuple[str, ...]  # of EVENTS; none: all
    secret: str = field(repr=False)  # of signatures
    who: str  # made it
    at: int  # UTC seconds

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Reads a row, in which the events are JSON."""
        number, url, events, *rest = row
        return cls(number, url, tuple(json.loads(events)), *rest)

    def wants(self, event: str) -> bool:
        """Whether it is told of such an event."""
        return not self.events or event in self.events

    @property
    def name(self) -> str:
        """What the log calls it: what is behind the host may be a secret."""
        parts = urlsplit(self.url)
        return f"{self.id} ({parts.scheme}://{parts.netloc})"


class Delivery(NamedTuple):
    """An event on its way to a webhook."""

    id: int
    webhook: int
    event: str
    body: str  # JSON, but for the id
    due: int  # UTC seconds; while it is under way, until when nobody else sends it
    tries: int
    failure: str  # of the last try; "": there was none

    @property
    def at(self) -> int:
        """When it happened, in UTC seconds."""
        return int(json.loads(self.body)["at"])

    @property
    def payload(self) -> bytes:
        """The body of the POST, the same for each try."""
        return json.dumps({"id": self.id, **json.loads(self.body)}).encode()


def body_of(event: str, at: int, data: Mapping[str, object]) -> str:
    """What is kept of an event; any database takes it."""
    body = json.dumps({"event": event, "at": at, "data": data}, ensure_ascii=False)
    return body.encode("utf-8", "replace").decode()  # without halves of surrogate pairs


def pause_of(tries: int, dice: float) -> int:
    """Seconds until the next try behind so many; `dice`, 0 to 1, keeps servers from a crowd."""
    return int(min(FIRST << (tries - 1), LONGEST) * (0.75 + dice / 2))


# -- 1. What a webhook may be ----------------------------------------------------------------------


def checked_url(text: str) -> str:
    """The URL, without a fragment. ValueError: a sentence, which does not hold it."""
    if len(text) > MAX_URL:
        raise ValueError(f"a URL has at most {MAX_URL} characters")
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("a URL is of plain ASCII without spaces: percent-encode what is not")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as err:
        raise ValueError("no host is called so, or no port has this number") from err
    if parts.scheme not in {"http", "https"} or not host or port == 0:
        raise ValueError("this is no URL such as https://example.org/hook")
    if "@" in parts.netloc:
        raise ValueError("a URL with a user or password is shown: the signature says who asks")
    return text.partition("#")[0]


def checked_secret(text: str) -> str:
    """The secret, a new one if there is none. ValueError: a sentence, which does not hold it."""
    if text and not (MIN_SECRET <= len(text) <= MAX_SECRET and re.fullmatch("[!-~]+", text)):
        raise ValueError(f"a secret has {MIN_SECRET} to {MAX_SECRET} characters of plain ASCII")
    return text or secrets.token_urlsafe(32)


# -- 2. How it is sent -----------------------------------------------------------------------------


def signature(secret: str, body: bytes, at: int) -> str:
    """X-OTA-Signature of a body that is sent at a time, in UTC seconds."""
    digest = hmac.new(secret.encode(), b"%d.%b" % (at, body), "sha256").hexdigest()
    return f"t={at},v1={digest}"


def send(webhook: Webhook, delivery: Delivery, at: int, trust: Callable[[], SSLContext]) -> str:
    """Why the receiver did not take it; "": it did. `trust` says which authorities are believed."""
    parts, body = urlsplit(webhook.url), delivery.payload
    fields = {
        "Content-Type": "application/json",
        "User-Agent": f"ota-server/{__version__}",
        "Connection": "close",
        "X-OTA-Event": delivery.event,
        "X-OTA-Delivery": str(delivery.id),
        "X-OTA-Signature": signature(webhook.secret, body, at),
    }
    host, target = parts.hostname or "", parts.path or "/"
    connection = HTTPConnection(host, parts.port, timeout=CONNECT)
    if parts.scheme == "https":
        connection = HTTPSConnection(host, parts.port, timeout=CONNECT, context=trust())
    try:
        with closing(connection):
            target += f"?{parts.query}" * bool(parts.query)
            status = _post(connection, target, body, fields)
    except TimeoutError:
        return f"it did not answer within {TIMEOUT:g} s"
    except (OSError, HTTPException) as err:
        why = err.strerror if isinstance(err, OSError) else None
        return clean(printable(why or str(err) or type(err).__name__))
    return "" if 200 <= status < 300 else f"it answered {status}"


def _post(connection: HTTPConnection, target: str, body: bytes, fields: Mapping[str, str]) -> int:
    """The status. OSError, HTTPException: there is none, in time.

    No redirect is followed. Some of the answer's body is read, as it may be too long to be sent to
    who does not listen; a receiver that does not end it has said what counts.
    """
    connection.connect()
    link: socket = connection.sock
    link.settimeout(TIMEOUT)
    connection.request("POST", target, body, dict(fields))
    hurried = _Hurried(link, time.monotonic() + TIMEOUT)
    with HTTPResponse(hurried, method="POST") as response:  # type: ignore[arg-type]
        response.begin()
        with suppress(OSError, HTTPException):
            response.read(MAX_ANSWER)
        return response.status


class _Hurried(RawIOBase):
    """What comes through a socket until a time, in monotonic seconds; then TimeoutError.

    A socket's own timeout is for each byte.
    """

    def __init__(self, link: socket, until: float) -> None:
        self._link = link
        self._until = until

    def makefile(self, _mode: str) -> BufferedReader:
        """What HTTPResponse asks of a socket."""
        return BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receives some bytes."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._link.settimeout(left)
        return self._link.recv_into(buffer)
