"""The command `publish`: beside servers made by hand, each wrong in one way, and the real one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pty
import re
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

import ota_server
from ota_fleet import client
from ota_fleet.publish import LONGEST, PAUSES, main
from tests.conftest import running, site_of
from tests.core.wire import PATIENCE, Script, client_context
from tests.data.make_images import esp32_image, littlefs_image
from tests.fleet.sick import scripted
from tests.fleet.test_fleet import fleet

TOKEN = "ota_a-token_that-nobody.else~has"  # noqa: S105
TRIES = len(PAUSES) + 1
IMAGE = esp32_image("sensor", "1.2.0")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


# -- 1. Servers made by hand -----------------------------------------------------------------------


class Peer:
    """A connection, as its server sees it."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._data = bytearray()

    def head(self) -> str:
        """The request's head."""
        while b"\r\n\r\n" not in self._data:
            assert self._more()
        return self._taken(self._data.index(b"\r\n\r\n") + 4).decode("latin-1").strip()

    def body(self, size: int) -> bytes:
        """So many bytes of the body, or those that come."""
        while len(self._data) < size and self._more():
            pass
        return self._taken(size)

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        self._link.settimeout(seconds)
        try:
            return not self._data and not self._link.recv(1)
        except TimeoutError:
            return True
        finally:
            self._link.settimeout(PATIENCE)

    def say(self, *data: bytes) -> None:
        """Sends these pieces, each by itself."""
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in data:
            self._link.sendall(piece)

    def _more(self) -> bool:
        data = self._link.recv(65536)
        self._data += data
        return bool(data)

    def _taken(self, size: int) -> bytes:
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken


Act = Callable[[Peer], object]


@dataclass(slots=True)
class Stage:
    """A server that is acted by hand."""

    port: int = 0
    scheme: str = "http"
    heads: list[str] = field(default_factory=list)  # of the requests so far

    @property
    def url(self) -> str:
        """What --to says."""
        return f"{self.scheme}://127.0.0.1:{self.port}"


@contextlib.contextmanager
def acting(*acts: Act, tls: ssl.SSLContext | None = None) -> Iterator[Stage]:
    """A server of which each connection meets the next act, and in the end the last one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stage = Stage(listener.getsockname()[1], "https" if tls else "http")
        over = threading.Event()

        def serve() -> None:
            left = list(acts)
            while True:
                plain, _ = listener.accept()
                if over.is_set():
                    plain.close()
                    return
                plain.settimeout(PATIENCE)
                with plain, contextlib.suppress(OSError):  # a client that leaves
                    link = plain if tls is None else tls.wrap_socket(plain, True)
                    peer = Peer(link)
                    stage.heads.append(peer.head())
                    (left.pop(0) if len(left) > 1 else left[0])(peer)
                    link.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield stage
        finally:
            over.set()
            socket.create_connection(listener.getsockname(), PATIENCE).close()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def reply(status: str, body: str | bytes = b"", *fields: str, kind: str = "text/html") -> bytes:
    """The bytes of an answer."""
    body = body.encode() if isinstance(body, str) else body
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {kind}")
    return "\r\n".join((*lines, *fields, "", "")).encode() + body


def problem(status: str, detail: str, *fields: str) -> bytes:
    """The same as the API says it."""
    body = json.dumps({"type": "about:blank", "status": int(status[:3]), "detail": detail})
    return reply(status, body, *fields, kind="application/problem+json")


def saying(*data: bytes) -> Act:
    """An act that says this to the head, and ends."""
    return lambda peer: peer.say(*data)


BUSY = problem("503 Service Unavailable", "one moment", "Retry-After: 0")


# -- 2. The command --------------------------------------------------------------------------------


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """What the build has left."""
    file = tmp_path / "firmware.bin"
    file.write_bytes(IMAGE)
    return file


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run leaves."""

    status: int
    out: str
    err: str
    waits: list[float]


Run = Callable[..., Outcome]


@pytest.fixture
def run(firmware: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, without waiting between two tries."""

    def run(stage: Stage, *options: str | Path, file: Path = firmware) -> Outcome:
        waits: list[float] = []
        argv = [str(file), "--to", stage.url, *map(str, options)]
        status = main(argv, {"OTA_UPLOAD_TOKEN": TOKEN}, waits.append)
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return Outcome(status, out, err, waits)

    return run


def command(*argv: str | Path) -> list[str]:
    """The command as a process."""
    return [sys.executable, "-I", str(Path(ota_server.__file__)), "publish", *map(str, argv)]


HTML = "<!DOCTYPE html><html><head><title>nope</title></head><body><h1>nope</h1></body></html>"
REFUSALS = {
    "401": (problem("401 Unauthorized", "no such token"), "401 Unauthorized: no such token"),
    "403": (problem("403 Forbidden", "needs the role publisher"), "needs the role publisher"),
    "409": (problem("409 Conflict", "1.2.0 is there"), "409 Conflict: 1.2.0 is there"),
    "422": (problem("422 Unprocessable Content", "it is cut off"), "it is cut off"),
    "full-disk": (problem("507 Insufficient Storage", "there is no room"), "there is no room"),
    "title-only": (
        reply("400 Bad Request", '{"title": "Bad Request"}', kind="application/json"),
        "400 Bad Request: Bad Request",
    ),
    "broken-json": (
        reply("400 Bad Request", "{", kind="application/problem+json"),
        "400 Bad Request: nothing says why",
    ),
    "json-list": (reply("400 No", "[]", kind="application/json"), "nothing says why"),
    "proxy-413": (reply("413 Too Large", HTML), "raise its limit (nginx: client_max_body_size)"),
    "proxy-403": (reply("403 Forbidden", HTML), "403 Forbidden: the proxy lets nobody in"),
    "proxy-404": (reply("404 Not Found", HTML), "is this the URL of an ota-server with --state?"),
    "no-state": (
        reply("413 Too Large", "nothing here takes a body\n", kind="text/plain"),
        "nothing here takes a body; is this the URL of an ota-server with --state?",
    ),
    "moved": (
        reply("308 Permanent Redirect", HTML, "Location: https://ota.example/"),
        "it leads to https://ota.example/: name that instead",
    ),
    "moved-nowhere": (reply("302 Found"), "it leads to nowhere"),
    "a-page": (reply("200 OK", HTML), "what answers is no ota-server: is --to its URL?"),
    "no-content": (reply("204 No Content"), "what answers is no ota-server"),
    "another-file": (
        reply("201 Created", '{"sha256": "00"}', kind="application/json"),
        "what answers is no ota-server",
    ),
    "terminal": (problem("409 Conflict", "a\x1b[2Jb\nc"), r"409 Conflict: 'a\x1b[2Jb c'"),
    "long": (problem("409 Conflict", "long " * 1000), "long long"),
    "echo": (problem("403 Forbidden", f"{TOKEN} is no token"), "*** is no token"),
    "http-1.0": (reply("409 C", "no\n", kind="text/plain").replace(b"1.1", b"1.0"), "409 Conf"),
    "after-continue": (CONTINUE + problem("409 Conflict", "after all"), "409 Conflict: after all"),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_a_refusal_is_1_with_its_reason_after_one_try(row: str, run: Run) -> None:
    answer, words = REFUSALS[row]
    with acting(saying(answer)) as stage:
        outcome = run(stage)
    assert (outcome.status, outcome.out, len(stage.heads)) == (1, "", 1)
    assert re.fullmatch(r"ota-server: [ -~]{1,700}\n", outcome.err)
    assert words in outcome.err


PASSING = {
    "busy": (BUSY, "503 Service Unavailable: one moment"),
    "too-many": (problem("429 Too Many Requests", "slowly"), "429 Too Many Requests: slowly"),
    "slow-request": (reply("408 Request Timeout"), "408 Request Timeout: nothing says why"),
    "failed": (problem("500 Internal Server Error", "its log says"), "its log says"),
    "proxy-502": (reply("502 Bad Gateway", HTML), "the proxy does not reach the server"),
    "proxy-504": (reply("504 Gateway Timeout", b""), "does not reach the server in time"),
    "bare-502": (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "the proxy does not reach the server"),
    "unknown-5xx": (reply("522 Origin Silent", HTML), "522: nothing says why"),
    "closed": (b"", "the connection was lost"),
    "closed-in-the-line": (b"HTTP/1.1 1", "the connection was lost"),
    "closed-in-the-body": (reply("409 Conflict", HTML)[:-9], "the connection was lost"),
    "closed-in-a-chunk": (
        b"HTTP/1.1 409 Conflict\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nno",
        "the connection was lost",
    ),
}


@pytest.mark.parametrize("row", PASSING)
def test_what_may_pass_is_tried_six_times_and_then_3(row: str, run: Run) -> None:
    answer, words = PASSING[row]
    with acting(saying(answer)) as stage:
        outcome = run(stage)
    assert (outcome.status, outcome.out, len(stage.heads)) == (3, "", TRIES)
    assert outcome.err.count(words) == TRIES
    assert outcome.err.endswith("; that was the last of 6 tries\n")
    assert len(outcome.waits) == len(PAUSES)


def test_pauses_grow_unless_the_server_names_them(run: Run) -> None:
    later = problem("503 Service Unavailable", "wait", "Retry-After: 7")
    odd = problem("503 Service Unavailable", "wait", "Retry-After: soon")
    past = problem("503 Service Unavailable", "wait", f"Retry-After: {formatdate(0, usegmt=True)}")
    conflict = problem("409 Conflict", "it is there")
    with acting(*map(saying, (b"", odd, later, past, BUSY, conflict))) as stage:
        outcome = run(stage)
    assert (outcome.status, outcome.waits) == (1, [1, 2, 7, 0, 0])
    assert "the connection was lost; once more in 1 s\n" in outcome.err


def test_a_server_that_wants_its_rest_gets_it(run: Run) -> None:
    with acting(saying(problem("429 No", "enough", f"Retry-After: {LONGEST + 1}"))) as stage:
        outcome = run(stage)
    assert (outcome.status, len(stage.heads), outcome.waits) == (3, 1, [])
    assert outcome.err.endswith("enough; it is to be left alone for 61 s\n")


USELESS = {
    "no-http": (b"SSH-2.0-OpenSSH_9.2\r\n", "speaks no HTTP/1: is it https:// instead?"),
    "long-head": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, "speaks no HTTP/1"),
}


@pytest.mark.parametrize("row", USELESS)
def test_what_does_not_pass_is_3_after_one_try(row: str, run: Run) -> None:
    answer, words = USELESS[row]
    with acting(saying(answer)) as stage:
        outcome = run(stage)
    assert (outcome.status, len(stage.heads)) == (3, 1)
    assert words in outcome.err


def test_a_server_that_never_answers_is_3(run: Run) -> None:
    with acting(lambda peer: peer.body(1 << 30)) as stage:
        outcome = run(stage, "--timeout", "0.1")
    assert (outcome.status, len(stage.heads)) == (3, TRIES)
    assert outcome.err.count("the server is silent") == TRIES


def test_names_that_are_no_text_do_no_harm(run: Run) -> None:
    with acting(saying(problem("404 Not Found", "no such project"))) as stage:
        outcome = run(stage, "--project", os.fsdecode(b"caf\xe9"))
    assert outcome.status == 1
    assert stage.heads[0].startswith("POST /api/v1/projects/caf%")


def test_a_port_where_nobody_listens_is_3(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run(Stage(port))
    assert (outcome.status, len(outcome.waits)) == (3, len(PAUSES))
    assert outcome.err.count("nobody listens at this address") == TRIES
    assert f"ota-server: 127.0.0.1:{port}: nobody listens" in outcome.err


def test_what_the_network_says_is_understood() -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with pytest.raises(client.Unreachable, match="names no host that is known: Name or"):
        client.trouble(unknown)
    again = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert client.trouble(again).endswith("not reached: Temporary failure in name resolution")
    assert client.trouble(OSError(113, "No route to host")).endswith("reached: No route to host")


WRONG = {
    "no-file": (("none.bin", "--to", "http://a"), "none.bin: No such file"),
    "folder": ((".", "--to", "http://a"), ". is empty, not to be read, or no file"),
    "empty": ((os.devnull, "--to", "http://a"), "is empty"),
    "no-url": (("f.bin",), "--to"),
    "no-scheme": (("f.bin", "--to", "ota.example"), "begins with http://host"),
    "password": (("f.bin", "--to", "http://u:p@a"), "password does not belong into the URL"),
    "query": (("f.bin", "--to", "http://a/?b"), "a URL without a query"),
    "version": (("f.bin", "--to", "http://a", "--version", "1.0.0"), "needs --project"),
    "notes": (("f.bin", "--to", "http://a", "--notes", "none.md"), "--notes none.md: No such"),
    "large-notes": (("f.bin", "--to", "http://a", "--notes", "large.md"), "more than 4096"),
    "binary-notes": (("f.bin", "--to", "http://a", "--notes", "f.bin"), "no text in UTF-8"),
    "no-ca": (("f.bin", "--to", "https://a", "--ca", "none.pem"), "--ca none.pem: no certificate"),
    "bad-ca": (("f.bin", "--to", "https://a", "--ca", "f.bin"), "--ca f.bin: no certificate"),
    "timeout": (("f.bin", "--to", "http://a", "--timeout", "0"), "--timeout: more than 0"),
    "token": (("f.bin", "--to", "http://a", "--token", "ä"), "a token is needed"),
    "unknown": (("f.bin", "--to", "http://a", "--force"), "unrecognized arguments"),
}


@pytest.mark.parametrize("row", WRONG)
def test_wrong_usage_is_2_and_one_line(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.bin").write_bytes(b"\xe9\xff")
    (tmp_path / "large.md").write_text("a" * 4097)
    argv, words = WRONG[row]
    assert main(argv, {"OTA_UPLOAD_TOKEN": TOKEN}) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_no_token_is_2(firmware: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(firmware), "--to", "http://a"], {}) == 2
    assert "OTA_UPLOAD_TOKEN or --token" in capsys.readouterr().err


def test_help_is_0_and_says_what_the_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("0: it is published", "1: the server refuses", "2: wrong usage", "3: the server"):
        assert words in out


# -- 3. The file on its way ------------------------------------------------------------------------


def taken(image: bytes = IMAGE, status: str = "201 Created") -> bytes:
    """What the API says of a release."""
    release = {
        "project": "sensor",
        "version": "1.2.0",
        "name": "sensor-1.2.0.bin",
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return reply(status, json.dumps(release), kind="application/json")


def taking(image: bytes = IMAGE, *before: bytes) -> Act:
    """An act that takes the file."""

    def act(peer: Peer) -> None:
        peer.say(*before)
        assert peer.body(len(image)) == image
        peer.say(taken(image))

    return act


def test_the_request_says_what_the_file_is(run: Run, firmware: Path) -> None:
    file = firmware.rename(firmware.with_name('tür "1".bin'))
    with acting(taking(IMAGE, CONTINUE)) as stage:
        outcome = run(stage, "--project", "a/b", "--version", "1.2.0+x", "--replace", file=file)
    assert outcome.status == 0
    start, *lines = stage.heads[0].split("\r\n")
    assert start == "PUT /api/v1/projects/a%2Fb/releases/1.2.0%2Bx?replace=1 HTTP/1.1"
    fields = dict(line.split(": ", 1) for line in lines)
    assert fields == {
        "Host": f"127.0.0.1:{stage.port}",
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/json",
        "User-Agent": "ota-server-publish",
        "Connection": "close",
        "Content-Type": "application/octet-stream",
        "Content-Length": str(len(IMAGE)),
        "Content-Disposition": (
            "attachment; filename=\"t_r _1_.bin\"; filename*=UTF-8''t%C3%BCr%20%221%22.bin"
        ),
        "x-MD5": hashlib.md5(IMAGE, usedforsecurity=False).hexdigest(),
        "Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(IMAGE).digest()).decode()}:",
        "Expect": "100-continue",
    }


@pytest.mark.parametrize(
    ("to", "options", "start"),
    [
        ("", (), "POST /api/v1/releases HTTP/1.1"),
        ("/ota/", ("--project", "s"), "POST /ota/api/v1/projects/s/releases HTTP/1.1"),
    ],
)
def test_the_image_says_what_nobody_else_does(
    to: str, options: tuple[str, ...], start: str, run: Run
) -> None:
    with acting(taking()) as stage:
        outcome = run(stage, *options, "--to", stage.url + to)
    assert stage.heads[0].startswith(start)
    assert outcome.out.endswith(f": {stage.url}{to.rstrip('/')}/sensor/sensor-1.2.0.bin\n")


def test_a_refusal_costs_no_body(run: Run) -> None:
    silent: list[bool] = []

    def act(peer: Peer) -> None:
        peer.say(problem("409 Conflict", "it is there"))
        silent.append(peer.is_silent(PATIENCE))  # until the client closes

    with acting(act) as stage:
        assert run(stage).status == 1
    assert silent == [True]


def test_the_file_waits_until_it_is_wanted(run: Run) -> None:
    silent: list[bool] = []

    def act(peer: Peer) -> None:
        silent.append(peer.is_silent(0.2))
        for part in (CONTINUE[:4], CONTINUE[4:12], CONTINUE[12:20]):
            peer.say(part)
            silent.append(peer.is_silent(0.05))
        taking(IMAGE, CONTINUE[20:])(peer)

    with acting(act) as stage:
        outcome = run(stage)
    assert (outcome.status, silent, len(stage.heads)) == (0, [True] * 4, 1)


def test_who_does_not_know_the_question_gets_the_file_after_a_second(run: Run) -> None:
    waited: list[float] = []

    def act(peer: Peer) -> None:
        began = time.monotonic()
        assert peer.body(1)
        waited.append(time.monotonic() - began)
        peer.body(len(IMAGE) - 1)
        peer.say(CONTINUE, taken())  # too late is no harm either

    with acting(act) as stage:
        assert run(stage).status == 0
    assert 0.9 < waited[0] < 5


def test_who_dislikes_the_question_is_not_asked_it_again(run: Run) -> None:
    with acting(saying(reply("417 Expectation Failed")), taking()) as stage:
        outcome = run(stage)
    assert (outcome.status, ["Expect" in head for head in stage.heads]) == (0, [True, False])


def test_what_is_lost_in_the_middle_is_sent_again(run: Run, tmp_path: Path) -> None:
    image = bytes(1 << 24)  # more than the kernel takes before anybody reads
    file = tmp_path / "large.bin"
    file.write_bytes(image)

    def breaking(peer: Peer) -> None:
        peer.say(CONTINUE)
        peer.body(1 << 16)

    with acting(breaking, taking(image, CONTINUE)) as stage:
        outcome = run(stage, file=file)
    assert (outcome.status, outcome.waits, len(stage.heads)) == (0, [1], 2)
    assert "the connection was lost; once more in 1 s" in outcome.err


def test_who_refuses_in_the_middle_is_understood(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(bytes(1 << 24))

    def act(peer: Peer) -> None:  # nginx, of a body that turns out to be too large
        peer.say(CONTINUE)
        peer.body(1)
        peer.say(reply("413 Request Entity Too Large", HTML))

    with acting(act) as stage:
        outcome = run(stage, file=file)
    assert (outcome.status, len(stage.heads)) == (1, 1)
    assert "raise its limit (nginx: client_max_body_size)" in outcome.err


def test_a_file_that_becomes_shorter_is_1(run: Run, firmware: Path) -> None:
    def act(peer: Peer) -> None:
        firmware.write_bytes(IMAGE[:100])
        peer.say(CONTINUE)
        peer.body(len(IMAGE))

    with acting(act) as stage:
        outcome = run(stage)
    assert (outcome.status, len(stage.heads)) == (1, 1)
    assert "the file became shorter while it was read" in outcome.err


def test_notes_follow_the_release(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_bytes(b"\xef\xbb\xbfLess noise.\n")
    said: list[bytes] = []

    def noting(peer: Peer) -> None:
        said.append(peer.body(len(b'{"notes": "Less noise."}')))
        peer.say(taken(status="200 OK"))

    busy, refusing = saying(BUSY), saying(problem("403 Forbidden", "not you"))
    with acting(taking(), busy, noting, taking(), refusing) as stage:
        good, bad = run(stage, "--notes", notes), run(stage, "--notes", notes)
    assert stage.heads[1].startswith("PATCH /api/v1/projects/sensor/releases/1.2.0 HTTP/1.1\r\n")
    assert (good.status, json.loads(said[0])) == (0, {"notes": "Less noise."})
    assert (bad.status, bad.out) == (1, "")
    assert "it is published, but without its notes: 403 Forbidden: not you" in bad.err


# -- 4. TLS ----------------------------------------------------------------------------------------


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    """A server's."""
    return ota_server.tls_context(str(certificate), "")


def test_by_tls_to_who_is_trusted(run: Run, tls: ssl.SSLContext, certificate: Path) -> None:
    with acting(saying(b""), taking(IMAGE, CONTINUE), tls=tls) as stage:
        outcome = run(stage, "--ca", certificate)
    assert (outcome.status, outcome.waits) == (0, [1])
    assert outcome.out.startswith("sensor 1.2.0 is published: https://127.0.0.1:")


def test_a_certificate_that_nobody_knows_is_3_at_once(run: Run, tls: ssl.SSLContext) -> None:
    with acting(taking(), tls=tls) as stage:
        outcome = run(stage)
    assert (outcome.status, outcome.waits, stage.heads) == (3, [], [])
    assert "the server's certificate is not trusted: self-signed certificate; " in outcome.err
    assert "by --ca PEM" in outcome.err


def test_another_name_in_the_certificate_is_3(
    run: Run, tls: ssl.SSLContext, certificate: Path
) -> None:
    with acting(taking(), tls=tls) as stage:
        outcome = run(stage, "--ca", certificate, "--to", f"https://localhost:{stage.port}")
    assert outcome.status == 3
    assert "Hostname mismatch, certificate is not valid for 'localhost'" in outcome.err


def test_the_wrong_kind_of_port_is_3(run: Run, tls: ssl.SSLContext) -> None:
    with scripted(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        outcome = run(Stage(port, "https"))
    assert (outcome.status, outcome.waits) == (3, [])
    assert "no TLS with the server: WRONG_VERSION_NUMBER; is it http:// instead?" in outcome.err
    with acting(taking(), tls=tls) as stage:
        outcome = run(Stage(stage.port))
    assert (outcome.status, len(outcome.waits)) == (3, len(PAUSES))


# -- 5. What is seen of it -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    shown: str  # on the terminal that is its stderr
    peak: int  # KB it needed at most


def on_terminal(argv: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Runs a command whose stderr is a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    with subprocess.Popen(
        argv, env={**env, "COLUMNS": "80"}, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:
            while piece := terminal.read(4096):
                shown += piece
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, out, shown.decode(), used.ru_maxrss)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    image = bytes(3 << 20)
    file = tmp_path / "large.bin"
    file.write_bytes(image)
    with acting(saying(b""), taking(image, CONTINUE)) as stage:
        ended = on_terminal(command(file, "--to", stage.url), {"OTA_UPLOAD_TOKEN": TOKEN})
    assert (ended.status, TOKEN in ended.shown + ended.out) == (0, False)
    lost, *bars = ended.shown.replace("\r\n", "\n").split("\r")
    assert lost == "the connection was lost; once more in 1 s\n"
    assert bars[-1] == f"[{'#' * 40}] 100 % of 3.15 MB\n"
    drawn = re.compile(r"\[#* *\] +([0-9]+) % of 3\.15 MB\n?")
    shares = [int(share) for bar in bars for share in drawn.findall(bar)]
    assert (shares, len(shares)) == (sorted(shares), len(bars))


def test_nothing_moves_where_there_is_no_terminal(run: Run) -> None:
    with acting(taking(IMAGE, CONTINUE)) as stage:
        assert run(stage).err == ""


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    peaks: list[int] = []
    for size in (1 << 10, 16 << 20):
        image, file = bytes(size), tmp_path / f"{size}.bin"
        file.write_bytes(image)
        with acting(taking(image, CONTINUE)) as stage:
            ended = on_terminal(command(file, "--to", stage.url), {"OTA_UPLOAD_TOKEN": TOKEN})
        assert ended.status == 0
        peaks.append(ended.peak)
    assert peaks[1] - peaks[0] < 2048


def test_a_token_from_the_environment_is_not_in_the_list_of_processes(firmware: Path) -> None:
    lines: list[bytes] = []

    def look(peer: Peer) -> None:
        lines.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        peer.say(problem("403 Forbidden", "not you"))

    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    with (
        acting(look) as stage,
        subprocess.Popen(
            command(firmware, "--to", stage.url),
            env={"OTA_UPLOAD_TOKEN": f"{TOKEN}\n"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.wait(PATIENCE) == 1
        assert f"Authorization: Bearer {TOKEN}" in stage.heads[0]
        assert process.stderr is not None
        assert TOKEN not in process.stderr.read()
    assert b"publish" in lines[0]
    assert TOKEN.encode() not in lines[0]


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_ctrl_c_is_one_line(firmware: Path) -> None:
    def act(peer: Peer) -> None:
        process.send_signal(signal.SIGINT)
        peer.body(1)

    with (
        acting(act) as stage,
        subprocess.Popen(
            command(firmware, "--to", stage.url),
            env={"OTA_UPLOAD_TOKEN": TOKEN},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "ota-server: interrupted; a second try does no harm\n"


# -- 6. The real server ----------------------------------------------------------------------------

ADMIN = {"ADMIN_EMAIL": "ada@ota.example", "ADMIN_PASSWORD": "correct horse battery"}


@dataclass(slots=True)
class Shop:
    """The real server, as its administrator sees it."""

    script: Script
    cookie: str = ""
    csrf: str = ""

    @property
    def url(self) -> str:
        """What --to says."""
        return f"http{'s' * bool(self.script.ca)}://127.0.0.1:{self.script.port}"

    def ask(self, method: str, path: str, data: object = None) -> Any:
        """What the API answers to its administrator."""
        context = client_context(self.script.ca) if self.script.ca else None
        fields = {"Content-Type": "application/json", "Cookie": self.cookie}
        fields["X-CSRF-Token"] = self.csrf
        body = None if data is None else json.dumps(data).encode()
        request = Request(f"{self.url}/api/v1{path}", body, fields, method=method)
        with urlopen(request, timeout=PATIENCE, context=context) as answer:
            if cookie := answer.headers["Set-Cookie"]:
                self.cookie = cookie.partition(";")[0]
            return json.load(answer)

    def sign_in(self) -> None:
        """Whatever is asked from now on is an administrator's."""
        names = {"email": ADMIN["ADMIN_EMAIL"], "password": ADMIN["ADMIN_PASSWORD"]}
        self.csrf = self.ask("POST", "/session", names)["csrf"]

    def token(self, role: str = "publisher", project: str = "") -> str:
        """A new one."""
        made = self.ask("POST", "/tokens", {"name": "CI", "role": role, "project": project})
        return str(made["token"])

    def releases(self, project: str = "sensor") -> list[dict[str, Any]]:
        """What is published."""
        return list(self.ask("GET", f"/projects/{project}/releases")["items"])

    def run(self, *argv: str | Path, token: str) -> int:
        """The command in this process."""
        to = ("--to", self.url) if "--to" not in argv else ()
        ca = ("--ca", self.script.ca) if self.script.ca else ()
        return main([*map(str, (*argv, *to, *ca))], {"OTA_UPLOAD_TOKEN": token}, lambda _: None)


@contextlib.contextmanager
def shop(folder: Path, *options: str, ca: Path | None = None) -> Iterator[Shop]:
    """The real server with the project `sensor`."""
    with fleet(folder, *options, env=ADMIN, ca=ca) as script:
        made = Shop(script)
        made.sign_in()
        made.ask("PUT", "/projects/sensor", {})
        yield made


@pytest.mark.parametrize("secure", [False, True])
def test_a_release_is_published_once_and_devices_get_it(
    secure: bool,
    shelf: Path,
    firmware: Path,
    certificate: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shop(shelf, ca=certificate if secure else None) as made:
        token = made.token(project="sensor")
        runs = [made.run(firmware, token=token) for _ in range(2)]
        out, err = capsys.readouterr()
        url = f"{made.url}/sensor/sensor-1.2.0.bin"
        assert (runs, err) == ([0, 0], "")
        assert out == f"sensor 1.2.0 is published: {url}\nsensor 1.2.0 is there already: {url}\n"
        with made.script.dial() as wire:
            assert wire.ask(url.removeprefix(made.url)).body == IMAGE
        with made.script.dial() as wire:
            older = wire.ask("/sensor", "x-ESP32-version: 1.1.0")
            assert (older.status, older.body) == (200, IMAGE)
        (release,) = made.releases()
    sha256 = hashlib.sha256(IMAGE).hexdigest()
    assert (release["version"], release["sha256"]) == ("1.2.0", sha256)


Cut = Callable[[int, bool], bool]  # bytes to the server so far, whether it speaks -> break off?


@dataclass(slots=True)
class Relay:
    """Passes bytes on to a server, and breaks the first connections off."""

    port: int
    cuts: list[Cut]
    passed: list[int] = field(default_factory=list)  # bytes to the server, of each connection

    def carry(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, to its end."""
        cut = self.cuts.pop(0) if self.cuts else lambda _passed, _answers: False
        self.passed.append(0)
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select(PATIENCE):
                    data = key.fileobj.recv(4096)  # type: ignore[union-attr]
                    self.passed[-1] += len(data) * (key.fileobj is client)
                    if not data or cut(self.passed[-1], key.fileobj is server):
                        return
                    key.data.sendall(data)


@contextlib.contextmanager
def relayed(port: int, *cuts: Cut) -> Iterator[Relay]:
    """A relay before this port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(listener.getsockname()[1], list(cuts))
        over = threading.Event()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client, socket.create_connection(("127.0.0.1", port)) as server:
                    if over.is_set():
                        return
                    with contextlib.suppress(OSError):
                        relay.carry(client, server)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield relay
        finally:
            over.set()
            socket.create_connection(listener.getsockname(), PATIENCE).close()
            thread.join(PATIENCE)
            assert not thread.is_alive()


LARGE = esp32_image("sensor", "1.2.0", payload=bytes(1 << 20))


def test_a_connection_that_breaks_anywhere_ends_with_one_release(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(LARGE)
    cuts: tuple[Cut, ...] = (
        lambda _passed, _answers: True,
        lambda _passed, answers: answers,  # the 100
        lambda passed, _answers: passed > len(LARGE) // 2,
        lambda passed, answers: passed > len(LARGE) and answers,  # the 201
    )
    with shop(shelf) as made, relayed(made.script.port, *cuts) as relay:
        to = ("--to", f"http://127.0.0.1:{relay.port}")
        assert made.run(file, *to, token=made.token()) == 0
        (release,) = made.releases()
    out, err = capsys.readouterr()
    assert out.startswith("sensor 1.2.0 is there already: ")  # of which nobody had heard
    assert err.count("the connection was lost; once more in ") == len(cuts)
    assert (release["size"], len(relay.passed)) == (len(LARGE), len(cuts) + 1)


DAMAGED = IMAGE[:-20] + bytes(20)
NEWER = esp32_image("sensor", "1.3.0")
PROBLEMS: dict[str, tuple[bytes, tuple[str, ...], str]] = {
    "no-project": (esp32_image("lamp", "1.0.0"), (), "create it first, PUT /api/v1/projects/lamp"),
    "other-project": (NEWER, ("--project", "lamp"), "create it first"),
    "other-version": (
        NEWER,
        ("--project", "sensor", "--version", "1.4.0"),
        "the image says it is 1.3.0, not 1.4.0",
    ),
    "no-version": (NEWER, ("--project", "sensor", "--version", "new"), "'new' is no version"),
    "lower": (esp32_image("sensor", "1.1.0"), (), "or --replace"),
    "equal": (esp32_image("sensor", "1.2.0", payload=b"other"), (), "1.2.0 of 'sensor' is there"),
    "other-chip": (esp32_image("sensor", "1.3.0", chip_id=9), (), "the image is for esp32s3"),
    "damaged": (DAMAGED, (), "is damaged or half copied"),
    "no-image": (b"hello, world, this is no image", (), "is text, not an image"),
}


def test_what_the_server_refuses_is_1_with_its_sentence(
    shelf: Path, firmware: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with shop(shelf) as made:
        token = made.token()
        assert made.run(firmware, token=token) == 0
        capsys.readouterr()
        for row, (image, options, words) in PROBLEMS.items():
            firmware.write_bytes(image)
            status, (out, err) = made.run(firmware, *options, token=token), capsys.readouterr()
            assert (row, status, out, words in err) == (row, 1, "", True), err
        assert len(made.releases()) == 1
        firmware.write_bytes(PROBLEMS["lower"][0])
        assert made.run(firmware, "--replace", token=token) == 0
        assert len(made.releases()) == 2


def test_who_may_not_publish_sends_no_file(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(2 * LARGE)
    with shop(shelf, "--max-image", "1") as made, relayed(made.script.port) as relay:
        made.ask("PUT", "/projects/lamp", {})
        rows = (
            ("ota_nobody", (), "401"),
            (made.token("viewer"), (), "403"),
            (made.token(project="lamp"), ("--project", "sensor"), "403"),
            (made.token(), (), "413"),
        )
        for token, options, words in rows:
            to = ("--to", f"http://127.0.0.1:{relay.port}")
            status, (out, err) = made.run(file, *to, *options, token=token), capsys.readouterr()
            assert (status, out, words in err) == (1, "", True), err
        assert made.releases() == []
    assert len(relay.passed) == len(rows)
    assert max(relay.passed) < 2000


def test_notes_are_published(shelf: Path, firmware: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("* no more Lärm\n", encoding="utf-8")
    with shop(shelf) as made:
        assert made.run(firmware, "--notes", notes, token=made.token()) == 0
        assert [each["notes"] for each in made.releases()] == ["* no more Lärm"]


def test_a_file_system_is_published_beside_its_firmware(shelf: Path, firmware: Path) -> None:
    with shop(shelf) as made:
        token = made.token()
        assert made.run(firmware, token=token) == 0
        firmware.write_bytes(littlefs_image())
        which = ("--project", "sensor", "--version", "1.2.0")
        assert made.run(firmware, *which, token=token) == 0
        names = {each["name"] for each in made.releases()}
    assert names == {"sensor-1.2.0.bin", "sensor-1.2.0.littlefs.bin"}


def test_a_server_without_state_says_so(shelf: Path, run: Run) -> None:
    with running(site_of(shelf)) as server:
        outcome = run(Stage(server.server_port))
    assert outcome.status == 1
    assert client.NO_API in outcome.err


def test_the_command_publishes_by_the_script(shelf: Path, firmware: Path) -> None:
    with shop(shelf) as made:
        argv = command(firmware, "--to", made.url)
        env = {"OTA_UPLOAD_TOKEN": made.token()}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sensor 1.2.0 is published: http://127.0.0.1:")
