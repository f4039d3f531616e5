"""The operator's `ota_server.py publish FILE --to URL`: brings a release to a server, as CI does.

How it flows, which is also the order on this page:

    arguments -> Options -> exchange(): one request -> persist(): again, until it is answered
                                                          |
    0, and a line with the URL <- publish(): is it there <-+-> Refused: 1, Unreachable: 3

The file is sent only once the server has looked at everything else (RFC 9110 10.1.1). The same
bytes under the same version are one release, so a try that nobody answered is made again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from functools import partial
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    responses,
)
from typing import Any, BinaryIO, NamedTuple, TextIO
from urllib.parse import quote

from ota_fleet.probe import Target, read_url
from ota_fleet.rows import MAX_LONG
from ota_server import CHUNK, Parser, Refused, printable

DESCRIPTION = """Brings a firmware or a file system to a server that was started with --state.
Ends with 0: it is published, or was there already; 1: the server refuses it; 2: wrong usage;
3: the server is not reachable, or gives no answer after six tries."""
PAUSES = (1, 2, 4, 8, 16)  # seconds before another try
LONGEST = 60  # seconds of a Retry-After that are waited
SAYS_FIRST = 1.0  # seconds in which a server says what it thinks of the head, or gets the body
MAX_ANSWER = 64 * 1024  # bytes of an answer that are read
MAX_SENTENCE = 500  # characters of it that are shown
FINAL = frozenset((501, 505, 507, 511))  # of 5xx: the next try would get the same
INTERIM, END = b"HTTP/1.1 1", b"\r\n\r\n"  # of a head: RFC 9110 15.2
REDRAW = 0.1  # seconds between two looks of the bar

NO_API = "is --to the URL of an ota-server with --state?"
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


# -- 1. What is asked for --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator wants."""

    path: str  # of the file
    to: Target  # its path is what stands before /api/v1, such as /ota
    token: str
    tls: ssl.SSLContext
    project: str = ""  # "": the image says it
    version: str = ""
    notes: str = ""  # "": those that are there stay
    replace: bool = False
    timeout: float = 30.0  # seconds of silence


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """What the arguments say. SystemExit: --help, or they are wrong and stderr has said why."""
    parser = Parser(prog="ota_server.py publish", description=DESCRIPTION, allow_abbrev=False)
    option = parser.add_argument
    option("file", metavar="FILE", help="such as firmware.bin, littlefs.bin")
    option("--to", metavar="URL", required=True, help="of the server: https://ota.example")
    text = "of a publisher; better in OTA_UPLOAD_TOKEN: arguments stand in the list of processes"
    option("--token", default="", help=text)
    option("--project", default="", help="default: what the image says")
    option("--version", default="", help="default: what the image says; with --project")
    option("--notes", metavar="FILE", help="release notes, text in UTF-8")
    option("--replace", action="store_true", help="even if it is not newer than what is there")
    text = "certificate to trust (default: what this system trusts)"
    option("--ca", "--cacert", metavar="PEM", help=text)
    text = "of silence before another try (default: 30)"
    option("--timeout", metavar="SECONDS", type=float, default=30.0, help=text)
    given = parser.parse_args(argv)
    if given.version and not given.project:
        parser.error("--version needs --project")
    if not 0 < given.timeout < 1e6:
        parser.error("--timeout: more than 0 seconds")
    try:
        return Options(
            _file(given.file),
            _base(given.to),
            _token(given.token or environ.get("OTA_UPLOAD_TOKEN", "")),
            _trusting(given.ca),
            given.project,
            given.version,
            _notes(given.notes) if given.notes else "",
            given.replace,
            given.timeout,
        )
    except ValueError as err:
        parser.error(str(err))


def _file(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError as err:
        raise ValueError(f"{path}: {err.strerror}") from err
    if not (stat.S_ISREG(found.st_mode) and found.st_size and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is empty, not to be read, or no file")
    return path


def _base(url: str) -> Target:
    target = read_url(url)
    if "?" in target.path:
        raise ValueError("--to: a URL without a query, such as https://ota.example")
    return replace(target, path=target.path.rstrip("/"))


def _token(text: str) -> str:
    """It stands in a header, and never in a message."""
    text = text.strip()  # a secret of CI often ends with a line
    if not re.fullmatch("[!-~]+", text):
        raise ValueError(
            "a token is needed: OTA_UPLOAD_TOKEN or --token, printable ASCII without spaces"
        )
    return text


def _trusting(ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as err:  # of which ssl.SSLError is one
        raise ValueError(f"--ca {ca}: no certificate in PEM form: {err.strerror or err}") from err


def _notes(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_LONG + 1).strip()
    except OSError as err:
        raise ValueError(f"--notes {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ValueError(f"--notes {path}: no text in UTF-8") from err
    if len(text) > MAX_LONG:
        raise ValueError(f"--notes {path}: more than {MAX_LONG} characters")
    return text


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


def exchange(options: Options, sent: Sent) -> Answer:
    """One connection, one answer. OSError, HTTPException: none came. Refused: the file changed."""
    target = options.to
    kind = partial(HTTPSConnection, context=options.tls) if target.secure else HTTPConnection
    with closing(kind(target.host, target.port, timeout=options.timeout)) as connection:
        connection.putrequest(sent.method, target.path + sent.path, skip_accept_encoding=True)
        for field in sent.fields:
            connection.putheader(*field)
        connection.endheaders()
        link: socket.socket = connection.sock
        early = _early(link, options.timeout) if ("Expect", "100-continue") in sent.fields else b""
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


# -- 3. As often as it takes -----------------------------------------------------------------------


def persist(
    attempt: Callable[[], Answer], wait: Callable[[float], object], say: Callable[[str], None]
) -> Answer:
    """The answer that counts, good or bad. Unreachable: there is none, which says why."""
    pauses: Iterator[int] = iter(PAUSES)
    while True:
        least: float | None = None
        try:
            answer = attempt()
            if not _is_passing(answer.status):
                return answer
            why, least = sentence(answer), _retry_after(answer, time.time())
        except (OSError, HTTPException) as err:
            why = trouble(err)
        pause = next(pauses, None)
        if pause is None:
            raise Unreachable(f"{why}; that was the last of {len(PAUSES) + 1} tries")
        if least is not None and least > LONGEST:
            raise Unreachable(f"{why}; it is to be left alone for {least:.0f} s")
        seconds = pause if least is None else least
        say(f"{why}; once more in {seconds:.0f} s")
        wait(seconds)


def _is_passing(status: int) -> bool:
    return status in {408, 429} or (status >= 500 and status not in FINAL)


def _retry_after(answer: Answer, now: float) -> float | None:
    """Seconds, None if it does not say: RFC 9110 10.2.3."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    date = parsedate_tz(text)
    return max(0.0, mktime_tz(date) - now) if date else None


def trouble(err: Exception) -> str:
    """What kept an answer from coming. Unreachable: it would keep the next one, too."""
    if isinstance(err, ssl.SSLCertVerificationError):
        raise Unreachable(
            f"the server's certificate is not trusted: {err.verify_message}; "
            "name the one that it has, or its CA, by --ca PEM"
        )
    if isinstance(err, socket.gaierror) and err.errno != socket.EAI_AGAIN:
        raise Unreachable(f"--to names no host that is known: {err.strerror}")
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


def sentence(answer: Answer) -> str:
    """What a person should read of an answer that is no success."""
    status = f"{answer.status} {responses.get(answer.status, '')}".rstrip()
    kind, said, hint = answer.headers.get_content_type(), "", HINTS.get(answer.status, "")
    if kind.endswith("json"):
        said, hint = str(answer.data.get("detail") or answer.data.get("title") or ""), ""
    elif kind == "text/plain" and answer.body:  # as the core writes it; the API never does
        said, hint = answer.body.decode("utf-8", "replace"), NO_API if answer.status < 500 else ""
    if 300 <= answer.status < 400:
        said = f"it leads to {answer.headers.get('Location', 'nowhere')}: name that by --to"
        hint = ""
    said = printable(" ".join(said.split())).replace("?replace=1", "--replace")[:MAX_SENTENCE]
    return f"{status}: " + ("; ".join(filter(None, (said, hint))) or "nothing says why")


# -- 4. The command --------------------------------------------------------------------------------


class Bar:
    """How far it is, in one line of a terminal; nothing where there is none."""

    def __init__(self, out: TextIO, size: int) -> None:
        self._out, self._size = out, size
        self._width = min(40, shutil.get_terminal_size().columns - 40) if out.isatty() else 0
        self._next = 0.0  # time of the next look
        self._drawn = False

    def show(self, sent: int) -> None:
        """So many bytes are on their way."""
        now = time.monotonic()
        if self._width > 0 and (now >= self._next or sent == self._size):
            self._next, self._drawn = now + REDRAW, True
            done = "#" * (self._width * sent // self._size)
            share, size = 100 * sent // self._size, self._size / 1e6
            self._out.write(f"\r[{done:{self._width}}] {share:3} % of {size:.2f} MB")
            self._out.flush()

    def end(self) -> None:
        """What follows stands in a line of its own."""
        if self._drawn:
            self._out.write("\n")
            self._drawn = False


Persisting = Callable[[Callable[[], Answer]], Answer]


def publish(options: Options, file: BinaryIO, bar: Bar, persisting: Persisting) -> str:
    """The line that says what is there now, and where. Refused, Unreachable: it is not."""
    md5, sha256 = _digests(file)
    sent = _upload(options, sha256, md5, file)._replace(told=bar.show)
    answer = persisting(partial(exchange, options, sent))
    if answer.status == 417:  # RFC 9110 15.5.18
        fields = tuple(field for field in sent.fields if field[0] != "Expect")
        answer = persisting(partial(exchange, options, sent._replace(fields=fields)))
    bar.end()
    release = answer.data
    if 200 <= answer.status < 300 and release.get("sha256") != sha256.hex():
        raise Refused(answer.status, "what answers is no ota-server: is --to its URL?")
    _require(answer)
    if options.notes:
        noted = persisting(partial(exchange, options, _patch(options, release)))
        _require(noted, "it is published, but without its notes: ")
    return _line(options, release, new=answer.status == 201)


def _digests(file: BinaryIO) -> tuple[bytes, bytes]:
    """MD5 and SHA-256."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    while piece := file.read(CHUNK):
        md5.update(piece)
        sha256.update(piece)
    return md5.digest(), sha256.digest()


def _upload(options: Options, sha256: bytes, md5: bytes, file: BinaryIO) -> Sent:
    """The request that brings the file."""
    path = "/api/v1"
    if options.project:
        path += f"/projects/{_quoted(options.project)}"
    path += "/releases"
    size = os.fstat(file.fileno()).st_size
    if options.version:
        path += f"/{_quoted(options.version)}"
    fields = (
        *_always(options),
        ("Content-Type", "application/octet-stream"),
        ("Content-Length", str(size)),
        ("Content-Disposition", _disposition(os.path.basename(options.path))),
        ("x-MD5", md5.hex()),
        ("Repr-Digest", f"sha-256=:{base64.b64encode(sha256).decode()}:"),  # RFC 9530
        ("Expect", "100-continue"),
    )
    method = "PUT" if options.version else "POST"
    return Sent(method, path + "?replace=1" * options.replace, fields, file, size)


def _quoted(text: str) -> str:
    """One segment of a path, whatever it is."""
    return quote(text, safe="", errors="surrogatepass")


def _always(options: Options) -> tuple[tuple[str, str], ...]:
    return (
        ("Authorization", f"Bearer {options.token}"),
        ("Accept", "application/json"),
        ("User-Agent", "ota-server-publish"),
        ("Connection", "close"),
    )


def _disposition(name: str) -> str:
    """The file's name: RFC 6266 4.3, RFC 8187."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", name)
    more = "" if plain == name else f"; filename*=UTF-8''{_quoted(name)}"
    return f'attachment; filename="{plain}"{more}'


def _patch(options: Options, release: Mapping[str, Any]) -> Sent:
    """The request that brings the notes."""
    project, version = (_quoted(str(release.get(key))) for key in ("project", "version"))
    data = json.dumps({"notes": options.notes}).encode()
    kind, length = ("Content-Type", "application/json"), ("Content-Length", str(len(data)))
    path = f"/api/v1/projects/{project}/releases/{version}"
    return Sent("PATCH", path, (*_always(options), kind, length), io.BytesIO(data), len(data))


def _require(answer: Answer, before: str = "") -> None:
    if not 200 <= answer.status < 300:
        raise Refused(answer.status, before + sentence(answer))


def _line(options: Options, release: Mapping[str, Any], *, new: bool) -> str:
    target = options.to
    base = f"http{'s' * target.secure}://{target.authority}{target.path}"
    project, version, name = (str(release.get(key)) for key in ("project", "version", "name"))
    state = "is published" if new else "is there already"
    url = f"{base}/{_quoted(project)}/{_quoted(name)}"
    return printable(f"{project} {version} {state}: {url}")


def main(
    argv: Sequence[str],
    environ: Mapping[str, str],
    wait: Callable[[float], object] = time.sleep,
) -> int:
    """Publishes what `argv` names; gives back the status that --help explains."""
    try:
        options = read_options(argv, environ)
    except SystemExit as err:  # argparse has said why, or has helped
        return int(err.code or 0)
    bar = Bar(sys.stderr, os.stat(options.path).st_size)

    def say(text: str, out: TextIO = sys.stderr) -> None:
        """Whatever is said, none of it is the token."""
        bar.end()
        out.write(text.replace(options.token, "***") + "\n")  # whoever repeated it
        out.flush()

    try:
        with open(options.path, "rb") as file:
            line = publish(options, file, bar, lambda attempt: persist(attempt, wait, say))
    except Refused as refused:
        say(f"ota-server: {refused.reason}")
        return 1
    except Unreachable as unreachable:
        say(f"ota-server: {unreachable}")
        return 3
    except KeyboardInterrupt:
        say("ota-server: interrupted; a second try does no harm")
        return 130
    say(line, sys.stdout)
    return 0
