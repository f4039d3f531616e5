"""How the operator's commands ask a server from outside: one request to its API, one answer.

arguments -> Remote -> exchange() -> Answer -> sentence(), where it is no success
`-> OSError, HTTPException -> trouble(), a sentence too
"""

from __future__ import annotations

import argparse
import io
import json
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from email.message import Message
from functools import partial
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    responses,
)
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from ota_fleet.probe import Target, read_url
from ota_server import CHUNK, Refused, printable

SAYS_FIRST = 1.0  # seconds in which a server says what it thinks of the head, or gets the body
MAX_ANSWER = 64 * 1024  # bytes of an answer that are read
MAX_SENTENCE = 500  # characters of it that are shown
INTERIM, END = b"HTTP/1.1 1", b"\r\n\r\n"  # of a head: RFC 9110 15.2

NO_API = "is this the URL of an ota-server with --state?"
HINTS = {  # what it means when no ota-server wrote the answer
    401: "the proxy wants credentials of its own",
    403: "the proxy lets nobody in from here",
    404: NO_API,
    405: NO_API,
    413: "the proxy takes no file of this size: raise its limit (nginx: client_max_body_size)",
    502: "the proxy does not reach the server",
    503: "the proxy does not reach the server",
    504: "the proxy does not reach the server in time",
}


class Unreachable(Exception):
    """No answer that counts, and another try would be of no use."""


# -- 1. Which server -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remote:
    """A server, and how it is asked."""

    to: Target  # its path is what stands before /api/v1, such as /ota
    token: str
    tls: ssl.SSLContext
    timeout: float  # seconds of silence

    def fields(self, command: str) -> tuple[tuple[str, str], ...]:
        """What every request of a command says."""
        return (
            ("Authorization", f"Bearer {self.token}"),
            ("Accept", "application/json"),
            ("User-Agent", f"ota-server-{command}"),
            ("Connection", "close"),
        )


def add_options(parser: argparse.ArgumentParser, about_token: str) -> None:
    """The options that read_remote() reads."""
    option = parser.add_argument
    option("--token", default="", help=about_token)
    text = "certificate to trust (default: what this system trusts)"
    option("--ca", "--cacert", metavar="PEM", help=text)
    text = "of silence before the server is given up (default: 30)"
    option("--timeout", metavar="SECONDS", type=float, default=30.0, help=text)


def read_remote(url: str, given: argparse.Namespace, name: str, token: str | None) -> Remote:
    """What the options say; `token` is what stands in the environment under this name.

    Raises:
        ValueError: a sentence says what is wrong.
    """
    if not 0 < given.timeout < 1e6:
        raise ValueError("--timeout: more than 0 seconds")
    text = _token(given.token or token or "", name)
    return Remote(_base(url), text, _trusting(given.ca), given.timeout)


def _base(url: str) -> Target:
    target = read_url(url)
    if "?" in target.path:
        raise ValueError("the server: a URL without a query, such as https://ota.example")
    return replace(target, path=target.path.rstrip("/"))


def _token(text: str, name: str) -> str:
    """It stands in a header, and never in a message."""
    text = text.strip()  # a secret of CI often ends with a line
    if not re.fullmatch("[!-~]+", text):
        raise ValueError(f"a token is needed: {name} or --token, printable ASCII without spaces")
    return text


def _trusting(ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as err:  # of which ssl.SSLError is one
        raise ValueError(f"--ca {ca}: no certificate in PEM form: {err.strerror or err}") from err


# -- 2. One request --------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A request."""

    method: str
    path: str
    fields: tuple[tuple[str, str], ...]
    body: BinaryIO
    size: int  # bytes
    told: Callable[[int], None] = lambda _: None  # how many are on their way


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Message
    body: bytes

    @property
    def data(self) -> dict[str, Any]:
        """The JSON object in it; {} if there is none."""
        try:
            data = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}


class _Heard(io.RawIOBase):
    """A connection as HTTPResponse reads it: what came too early, then what comes."""

    def __init__(self, link: socket.socket, early: bytes) -> None:
        self._link, self._early = link, early

    def makefile(self, _mode: str) -> io.BufferedReader:
        """A file over it."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, space: Any) -> int:
        """Takes as much as there is; gives back how many bytes."""
        if not self._early:
            return self._link.recv_into(space)
        piece, self._early = self._early[: len(space)], self._early[len(space) :]
        space[: len(piece)] = piece
        return len(piece)


def exchange(remote: Remote, sent: Sent) -> Answer:
    """One connection, one answer. OSError, HTTPException: none came. Refused: the file changed."""
    target = remote.to
    kind = partial(HTTPSConnection, context=remote.tls) if target.secure else HTTPConnection
    with closing(kind(target.host, target.port, timeout=remote.timeout)) as connection:
        connection.putrequest(sent.method, target.path + sent.path, skip_accept_encoding=True)
        for field in sent.fields:
            connection.putheader(*field)
        connection.endheaders()
        link: socket.socket = connection.sock
        early = _early(link, remote.timeout) if ("Expect", "100-continue") in sent.fields else b""
        if early:
            return _answer(link, early)
        try:
            _send(connection, sent)
        except OSError as lost:
            try:  # it may have said why before it closed
                return _answer(link)
            except (OSError, HTTPException):
                raise lost from None
        return _answer(link)


def _early(link: socket.socket, timeout: float) -> bytes:
    """The beginning of an answer that does not want the body; b"": it is wanted.

    Who has not said so within a second has never heard of the question: RFC 9110 10.1.1.
    """
    link.settimeout(min(SAYS_FIRST, timeout))
    try:
        said = link.recv(CHUNK)
    except TimeoutError:
        return b""
    finally:
        link.settimeout(timeout)
    while INTERIM.startswith(said[: len(INTERIM)]) and END not in said and len(said) < MAX_ANSWER:
        more = link.recv(CHUNK)
        if not more:
            raise ConnectionAbortedError("it closed before it had said anything")
        said += more
    head, _, final = said.partition(END)
    return final if head.startswith(INTERIM) else said


def _send(connection: HTTPConnection, sent: Sent) -> None:
    """Sends the body, from its beginning."""
    sent.body.seek(0)
    left = sent.size
    while left:
        piece = sent.body.read(min(CHUNK, left))
        if not piece:
            raise Refused(0, "the file became shorter while it was read: publish it when it rests")
        connection.send(piece)
        left -= len(piece)
        sent.told(sent.size - left)


def _answer(link: socket.socket, early: bytes = b"") -> Answer:
    # of a socket it asks for makefile() only
    with HTTPResponse(_Heard(link, early)) as response:  # type: ignore[arg-type]
        response.begin()
        body = response.read(MAX_ANSWER)
        if response.length and len(body) < MAX_ANSWER:
            raise IncompleteRead(body, response.length)
        return Answer(response.status, response.headers, body)


# -- 3. What it means ------------------------------------------------------------------------------


def trouble(err: Exception) -> str:
    """What kept an answer from coming. Unreachable: it would keep the next one, too."""
    if isinstance(err, ssl.SSLCertVerificationError):
        raise Unreachable(
            f"the server's certificate is not trusted: {err.verify_message}; "
            "name the one that it has, or its CA, by --ca PEM"
        )
    if isinstance(err, socket.gaierror) and err.errno != socket.EAI_AGAIN:
        raise Unreachable(f"the URL names no host that is known: {err.strerror}")
    if isinstance(err, ConnectionRefusedError):
        return "nobody listens at this address"
    if isinstance(err, TimeoutError):
        return "the server is silent"
    lost = (ConnectionError, IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError)
    if isinstance(err, lost):
        return "the connection was lost"
    if isinstance(err, ssl.SSLError):
        raise Unreachable(f"no TLS with the server: {err.reason}; is it http:// instead?")
    if isinstance(err, HTTPException):
        raise Unreachable("what answers speaks no HTTP/1: is it https:// instead?")
    return f"the server is not reached: {getattr(err, 'strerror', None) or err}"


def sentence(answer: Answer, path: str = "") -> str:
    """What a person should read of an answer that is no success; `path` is that of the server."""
    status = f"{answer.status} {responses.get(answer.status, '')}".rstrip()
    kind, said, hint = answer.headers.get_content_type(), "", HINTS.get(answer.status, "")
    if kind.endswith("json"):
        said, hint = str(answer.data.get("detail") or answer.data.get("title") or ""), ""
    elif kind == "text/plain" and answer.body:  # as the core writes it; the API never does
        said, hint = answer.body.decode("utf-8", "replace"), NO_API if answer.status < 500 else ""
    if 300 <= answer.status < 400:
        said = f"it leads to {answer.headers.get('Location', 'nowhere')}: name that instead"
        hint = ""
    if path and hint == NO_API:
        hint = f"name only the server's address, without {path}"
    said = printable(" ".join(said.split()))[:MAX_SENTENCE]
    return f"{status}: " + ("; ".join(filter(None, (said, hint))) or "nothing says why")


def quoted(text: str) -> str:
    """One segment of a path, whatever it is."""
    return quote(text, safe="", errors="surrogatepass")
