"""Webhooks: what is told, to whom, how often; and receivers that are ill, slow or hostile."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import re
import signal
import socket
import sqlite3
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ota_server
from ota_fleet import Known, remember
from ota_fleet import deliveries as sending
from ota_fleet import hooks as hooks_module
from ota_fleet.deliveries import (
    EVENTS,
    FIRST,
    LONGEST,
    Webhook,
    checked_secret,
    checked_url,
    pause_of,
    signature,
)
from ota_fleet.history import DAY, HOUR, MONTH, History
from ota_fleet.hooks import CALM, LEASE, MAX_TRIES, MAX_WEBHOOKS, NAMED, SWEPT, Hooks
from ota_fleet.ledger import Ledger
from ota_fleet.probe import REQUESTS
from ota_fleet.projects import rename
from ota_fleet.registry import Registry
from ota_fleet.rows import Project
from ota_server import Event, Objection, Refused, Report, Version
from tests.conftest import put, wait_until
from tests.core.wire import PATIENCE, standing
from tests.data.make_images import esp8266_image
from tests.fleet.test_api import House
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - fixtures
from tests.fleet.test_api import house as house  # noqa: PLC0414
from tests.fleet.test_fleet import fleet
from tests.fleet.test_history import decided
from tests.fleet.test_registry import MAC, by_hand, mac
from tests.fleet.test_stock import Bench, image
from tests.test_house import ROOT

NOW = 1_700_000_000  # UTC seconds
SECRET = "correct-horse-battery"  # noqa: S105
DATA = {"project": "lamp", "version": "2.0.0"}
BARRED = Objection("not-whitelisted", "it is not admitted", deny=True, final=True)


# -- 1. Receivers ----------------------------------------------------------------------------------


class Heard(NamedTuple):
    """A POST as it came."""

    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def data(self) -> Any:
        """The JSON."""
        return json.loads(self.body)

    def is_signed(self, secret: str = SECRET) -> bool:
        """Whether the signature is that of the body, as the protocols say."""
        match = re.fullmatch("t=([0-9]+),v1=([0-9a-f]{64})", self.headers["x-ota-signature"])
        assert match
        key = secret.encode()
        wanted = hmac.new(key, match[1].encode() + b"." + self.body, hashlib.sha256)
        return wanted.hexdigest() == match[2]


class Receiver:
    """A real HTTP server that notes what it is told, and answers with `status`."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.status = 204
        self.fields: dict[str, str] = {}  # of its answers

    def take(self, heard: Heard) -> int:
        """Notes a POST; gives back the status of the answer."""
        self.heard.append(heard)
        return self.status

    @property
    def events(self) -> list[str]:
        """What it was told, in order."""
        return [each.headers["x-ota-event"] for each in self.heard]


class Listening(NamedTuple):
    """A receiver, and where it is."""

    receiver: Receiver
    url: str


@contextmanager
def listening(ca: Path | None = None) -> Iterator[Listening]:
    """A receiver on a free port, by TLS if there is a certificate."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        """Hands on what comes."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(receiver.take(Heard(self.path, headers, body)))
            for field in receiver.fields.items():
                self.send_header(*field)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if ca:
        tls = ota_server.tls_context(str(ca), "")
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
    with serving(server) as port:
        yield Listening(receiver, f"http{'s' * bool(ca)}://127.0.0.1:{port}/hook?x=1")


@contextmanager
def serving(server: HTTPServer) -> Iterator[int]:
    """The port of a server that runs in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


@contextmanager
def misbehaving(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The URL of somebody who does this with each connection, until the event says enough."""
    enough = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def work() -> None:
            while True:
                link, _ = server.accept()
                if enough.is_set():
                    link.close()
                    return
                threads.append(threading.Thread(target=treat, args=(link,)))
                threads[-1].start()

        def treat(link: socket.socket) -> None:
            with link, suppress(OSError):  # the other side has enough of it
                assert link.recv(1 << 20).startswith(b"POST ")
                answer(link, enough)

        threads = [threading.Thread(target=work)]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            enough.set()
            with closing(socket.create_connection(server.getsockname())):
                pass
            for thread in threads:
                thread.join(PATIENCE)


@pytest.fixture
def there() -> Iterator[Listening]:
    """A receiver."""
    with listening() as there:
        yield there


# -- 2. A desk with webhooks -----------------------------------------------------------------------


class Desk:
    """Hooks over a stock and its registry, with a clock that moves by hand."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.registry = bench, bench.registry
        self.time = float(NOW)
        self.known = Known.of(bench.registry, now=lambda: self.time)
        self.hooks = self.another(bench.registry)
        self.hooks.sweep(NOW)  # the server is there

    def another(self, registry: Registry) -> Hooks:
        """Those of another server, or of the next process."""
        stock = self.bench.stock
        return Hooks(registry, stock, stock.resolve, now=lambda: self.time, dice=lambda: 0.5)

    def add(self, url: str, *events: str) -> Webhook:
        """A webhook whose secret is known."""
        return self.hooks.add(url, events, SECRET, "ada")

    def tell(self, event: str = "release.new", **data: object) -> None:
        """Something happened."""
        with self.registry.writing() as connection:
            self.hooks.notify(connection, event, data or DATA)

    def work(self, hooks: Hooks | None = None) -> None:
        """Lets hooks do all that is due, and waits for the answers."""
        hooks = hooks or self.hooks
        hooks.turn()  # finds what has happened
        hooks.turn()
        while lanes := [*hooks._lanes.values()]:
            for lane in lanes:
                lane.join(PATIENCE)
                assert not lane.is_alive()
            hooks.turn()

    def pass_(self, seconds: float, step: float = HOUR / 2) -> None:
        """Time goes by, with a turn now and then."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + step)
            self.work()

    def waiting(self) -> list[tuple[str, int, str]]:
        """Event, tries and last failure of all that waits."""
        rows = self.registry.rows("SELECT event, tries, failure FROM delivery ORDER BY id")
        return [(event, tries, failure) for event, tries, failure in rows]

    def due_in(self) -> int:
        """Seconds until the next try."""
        return int(self.registry.rows("SELECT MIN(due) FROM delivery")[0][0] - self.time)

    def see(self, *events: Event, history: History | None = None) -> None:
        """Devices ask, as the site's listeners hear it, and the batch is written."""
        for event in events:
            self.hooks.note(event)
            who = self.bench.stock.resolve
            remember(self.known, history or self.history, who, event, lambda: self.time)
        self.registry.flush()

    @functools.cached_property
    def history(self) -> History:
        """What the site remembers with."""
        return History(self.registry)

    def settle(self) -> None:
        """The catalog is known, as some seconds after the very first start."""
        for _ in range(CALM + 1):
            self.hooks.look()


@pytest.fixture
def desk(folder: Path, tmp_path: Path) -> Iterator[Desk]:
    """One whose catalog has `firmware` 1.0.0, 1.9.0 and 1.10.0."""
    bench = Bench(folder, tmp_path)
    desk = Desk(bench)
    yield desk
    desk.hooks.close()
    bench.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for an answer."""
    monkeypatch.setattr(sending, "TIMEOUT", 0.3)


# -- 3. What is told -------------------------------------------------------------------------------


def test_event_is_told_and_signed(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.tell("rollout.halted", rollout=3, reason="6 of 10 failed — bäd")
    desk.work()
    (heard,) = there.receiver.heard
    assert heard.target == "/hook?x=1"
    assert heard.data == {
        "id": 1,
        "event": "rollout.halted",
        "at": NOW,
        "data": {"rollout": 3, "reason": "6 of 10 failed — bäd"},
    }
    assert heard.headers["content-type"] == "application/json"
    assert (heard.headers["x-ota-event"], heard.headers["x-ota-delivery"]) == (
        "rollout.halted",
        "1",
    )
    assert heard.headers["x-ota-signature"].startswith(f"t={NOW},v1=")
    assert heard.is_signed()
    assert not heard.is_signed("another secret")
    assert desk.waiting() == []


def test_only_who_wants_an_event_is_told(desk: Desk) -> None:
    with listening() as some, listening() as every:
        desk.add(some.url, "rollout.halted", "device.looping")
        desk.add(every.url)
        for event in EVENTS:
            desk.tell(event)
        desk.work()
        assert some.receiver.events == ["rollout.halted", "device.looping"]
        assert every.receiver.events == list(EVENTS)


def test_what_was_taken_back_is_not_told(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    with suppress(ZeroDivisionError), desk.registry.writing() as connection:
        desk.hooks.notify(connection, "rollout.halted", DATA)
        raise ZeroDivisionError
    desk.tell("rollout.finished")
    desk.work()
    assert there.receiver.events == ["rollout.finished"]


@pytest.mark.parametrize("text", ["\udcff", "\0", '"\\\n', "ä" * 5000, "\U0001f525"])
def test_any_text_of_a_device_arrives_as_json(text: str, desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.tell("device.silent", device=text)
    desk.work()
    (heard,) = there.receiver.heard
    assert heard.data["data"]["device"] == text.encode("utf-8", "replace").decode()
    assert heard.is_signed()


def test_webhook_that_is_gone_is_told_nothing(desk: Desk, there: Listening) -> None:
    webhook = desk.add(there.url)
    desk.tell()
    desk.hooks.remove(webhook.id)
    desk.tell()
    desk.work()
    assert (there.receiver.heard, desk.waiting(), desk.hooks.webhooks()) == ([], [], [])


def test_there_are_not_too_many_webhooks(desk: Desk) -> None:
    for _ in range(MAX_WEBHOOKS):
        desk.add("http://192.0.2.1/")
    with pytest.raises(Refused, match="32 webhooks") as refused:
        desk.add("http://192.0.2.1/")
    assert refused.value.status == 409


def test_https_is_believed_with_a_certificate_of_the_systems_authorities_only(
    desk: Desk, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(certificate) as there:
        desk.add(there.url)
        desk.tell()
        desk.work()
        assert not there.receiver.heard
        ((_, tries, failure),) = desk.waiting()
        assert (tries, "CERTIFICATE_VERIFY_FAILED" in failure) == (1, True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        del desk.hooks._trust
        desk.pass_(90)
        assert there.receiver.heard[0].is_signed()


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://192.0.2.1", "http://192.0.2.1"),
        ("https://example.org:8443/a/b?c=d&e#f", "https://example.org:8443/a/b?c=d&e"),
        ("http://[::1]:80/", "http://[::1]:80/"),
        ("HTTP://Example.org/", "HTTP://Example.org/"),
    ],
)
def test_url_that_a_webhook_can_have(url: str, kept: str) -> None:
    assert checked_url(url) == kept


@pytest.mark.parametrize(
    "url",
    [
        "", "/", "example.org", "//example.org/", "ftp://example.org/", "file:///etc/passwd",
        "http:///x", "http://", "https://?x", "http://a b/", "http://a/\n", "http://ä/",
        "http://me@example.org/", "http://me:secret@example.org/", "http://@example.org/",
        "http://example.org:0/", "http://example.org:65536/", "http://example.org:x/",
        "http://[::1/", "http://a..b/", f"http://{'a' * 64}/", f"http://a/{'x' * 2000}",
    ],
)  # fmt: skip
def test_url_that_no_webhook_can_have_is_a_sentence_without_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(a|this|no) ") as error:
        checked_url(url)
    assert not url or url not in str(error.value).replace("https://example.org/hook", "")


@given(st.text(max_size=40))
def test_no_text_as_url_is_anything_but_a_sentence_or_a_url(text: str) -> None:
    for each in (text, f"http://{text}", f"https://a:{text}"):
        url = None
        with suppress(ValueError):
            url = checked_url(each)
        assert url is None or re.fullmatch("https?://[!-~]+", url, re.IGNORECASE)


def test_secret_is_made_or_long_enough() -> None:
    assert checked_secret(SECRET) == SECRET
    assert len({checked_secret("") for _ in range(9)}) == 9
    for wrong in ("x" * 15, "x" * 256, "x" * 16 + " ", "ä" * 16):
        with pytest.raises(ValueError, match="16 to 255") as error:
            checked_secret(wrong)
        assert wrong not in str(error.value)


def test_signature_is_what_openssl_makes_of_it() -> None:
    command = ["openssl", "dgst", "-sha256", "-hmac", SECRET]
    done = subprocess.run(command, input=b"1700000000.{}", capture_output=True, check=True)
    wanted = done.stdout.split()[-1].decode()
    assert signature(SECRET, b"{}", NOW) == f"t=1700000000,v1={wanted}"


# -- 4. Again and again ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
def test_any_2xx_is_good(status: int, desk: Desk, there: Listening) -> None:
    there.receiver.status = status
    desk.add(there.url)
    desk.tell()
    desk.work()
    assert (len(there.receiver.heard), desk.waiting()) == (1, [])


@pytest.mark.parametrize("status", [300, 304, 400, 401, 404, 410, 429, 500, 503, 599])
def test_anything_else_is_tried_again_after_a_minute(
    status: int, desk: Desk, there: Listening
) -> None:
    there.receiver.status = status
    desk.add(there.url)
    desk.tell()
    desk.work()
    assert desk.waiting() == [("release.new", 1, f"it answered {status}")]
    desk.time += 59
    desk.work()
    assert len(there.receiver.heard) == 1
    there.receiver.status = 204
    desk.time += 1
    desk.work()
    first, second = there.receiver.heard
    assert (second.body, second.headers["x-ota-delivery"]) == (first.body, "1")
    assert second.headers["x-ota-signature"].startswith(f"t={NOW + 60},")
    assert second.is_signed()
    assert desk.waiting() == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status: int, desk: Desk, there: Listening) -> None:
    with listening() as elsewhere:
        there.receiver.status = status
        there.receiver.fields = {"Location": elsewhere.url}
        desk.add(there.url)
        desk.tell()
        desk.work()
        assert not elsewhere.receiver.heard
        assert desk.waiting() == [("release.new", 1, f"it answered {status}")]


def test_what_never_arrives_is_given_up_after_12_tries_with_a_warning(
    desk: Desk, there: Listening, lines: Callable[[str], list[str]]
) -> None:
    there.receiver.status = 500
    desk.add(there.url)
    desk.tell()
    desk.work()
    pauses = []
    while desk.waiting():
        pauses.append(desk.due_in())
        desk.time += pauses[-1]
        desk.work()
    assert pauses == [*(60 << turn for turn in range(9)), 6 * HOUR, 6 * HOUR]
    assert len(there.receiver.heard) == MAX_TRIES
    assert len({each.body for each in there.receiver.heard}) == 1
    (line,) = lines("given up")
    where = there.url.partition("/hook")[0]
    text = f"WARNING webhook 1 ({where}): release.new is given up after 12 tries: it answered 500"
    assert line == text


def test_what_is_older_than_a_day_is_tried_once_more(
    desk: Desk, there: Listening, lines: Callable[[str], list[str]]
) -> None:
    there.receiver.status = 500
    desk.add(there.url)
    desk.tell()
    desk.time += DAY
    desk.work()
    assert (len(there.receiver.heard), desk.waiting()) == (1, [])
    assert lines("given up after 1 tries")


@given(st.integers(1, MAX_TRIES), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_and_stay_below_six_hours_and_a_quarter(tries: int, dice: float) -> None:
    assert FIRST * 0.75 - 1 <= pause_of(tries, dice) <= LONGEST * 1.25
    assert pause_of(tries, dice) <= pause_of(tries + 1, dice)
    assert sum(pause_of(each, dice) for each in range(1, MAX_TRIES)) < 26 * HOUR


def test_one_event_that_is_refused_does_not_hold_up_the_others(
    desk: Desk, there: Listening
) -> None:
    class Picky(Receiver):
        def take(self, heard: Heard) -> int:
            super().take(heard)
            return 400 if heard.data["id"] == 1 else 204

    picky = Picky()
    there.receiver.take = picky.take  # type: ignore[method-assign]
    desk.add(there.url)
    for _ in range(3):
        desk.tell()
    desk.work()
    assert [each.data["id"] for each in picky.heard] == [1, 2, 3]
    assert desk.waiting() == [("release.new", 1, "it answered 400")]


def test_clock_that_was_wrong_holds_nothing_up(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.time += 10 * MONTH
    desk.tell()
    desk.time = NOW
    desk.work()
    assert len(there.receiver.heard) == 1


def test_deliveries_of_one_webhook_come_in_order(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    for number in range(50):
        desk.tell("device.silent", number=number)
    desk.work()
    assert [each.data["data"]["number"] for each in there.receiver.heard] == [*range(50)]


# -- 5. Receivers that are ill or hostile ----------------------------------------------------------


def silent(_link: socket.socket, enough: threading.Event) -> None:
    enough.wait(PATIENCE)


def drip(link: socket.socket, enough: threading.Event) -> None:
    """A byte now and then, so that no socket times out."""
    while not enough.wait(0.05):
        link.sendall(b"x")


def drip_fields(link: socket.socket, enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\n")
    while not enough.wait(0.05):
        link.sendall(b"X: y\r\n")


def endless_interim(link: socket.socket, enough: threading.Event) -> None:
    while not enough.is_set():
        link.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def endless_line(link: socket.socket, enough: threading.Event) -> None:
    while not enough.is_set():
        link.sendall(bytes(65536))


def endless_fields(link: socket.socket, enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\n")
    while not enough.is_set():
        link.sendall(b"X: y\r\n" * 1000)


def garbage(link: socket.socket, _enough: threading.Event) -> None:
    link.sendall(b"\x16\x03\x01\r\n\r\n")


def gone(link: socket.socket, _enough: threading.Event) -> None:
    link.shutdown(socket.SHUT_RDWR)


def no_status(link: socket.socket, _enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 two hundred\r\n\r\n")


def endless_body(link: socket.socket, enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not enough.is_set():
        link.sendall(bytes(65536))


def dripping_body(link: socket.socket, enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while not enough.wait(0.05):
        link.sendall(b"x")


def bad_chunks(link: socket.socket, _enough: threading.Event) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("receiver", "why"),
    [
        (silent, "it did not answer within"),
        (drip, "it did not answer within"),
        (drip_fields, "it did not answer within"),
        (endless_interim, "it did not answer within"),
        (endless_line, "status line"),
        (endless_fields, "got more than 100 headers"),
        (garbage, r"\x16\x03"),
        (gone, "closed connection without response"),
        (no_status, "two hundred"),
        (endless_body, ""),  # has said what counts
        (dripping_body, ""),
        (bad_chunks, ""),
    ],
)
def test_no_receiver_holds_a_delivery_for_long(
    receiver: Callable[[socket.socket, threading.Event], None], why: str, desk: Desk
) -> None:
    with misbehaving(receiver) as url:
        desk.add(url)
        desk.tell()
        began = time.monotonic()
        desk.work()
        assert time.monotonic() - began < 5
    if not why:
        assert desk.waiting() == []
        return
    ((_, tries, failure),) = desk.waiting()
    assert (tries, why in failure) == (1, True), failure
    assert failure.isprintable()
    assert len(failure) <= 255


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://nobody.invalid/"])
def test_receiver_that_is_not_there_is_tried_again(url: str, desk: Desk) -> None:
    desk.add(url)
    desk.tell()
    desk.work()
    ((_, tries, failure),) = desk.waiting()
    assert (tries, bool(failure)) == (1, True)


def test_receivers_that_hang_delay_no_other(desk: Desk, there: Listening) -> None:
    with misbehaving(silent) as url:
        for _ in range(3):
            desk.add(url)
        desk.add(there.url)
        for _ in range(5):
            desk.tell()
        desk.hooks.turn()  # three lanes hang from here on
        for count in range(1, 6):
            wait_until(lambda: len(there.receiver.heard) == count)  # noqa: B023
            wait_until(lambda: bool(desk.hooks._answered))
            desk.hooks.turn()
        assert len(desk.hooks._lanes) == 3


@pytest.mark.usefixtures("quick")
def test_who_waited_longest_comes_next(desk: Desk, there: Listening) -> None:
    with misbehaving(silent) as url:
        for _ in range(8):
            desk.add(url)
        desk.add(there.url)
        for _ in range(2):
            desk.tell()
        for _ in range(3):  # turns of four lanes: the ninth is in the third
            desk.hooks.turn()
            assert len(desk.hooks._lanes) == 4
            for lane in [*desk.hooks._lanes.values()]:
                lane.join(PATIENCE)
        assert len(there.receiver.heard) == 1


def test_failure_of_ours_is_told_in_the_log_and_tried_again(
    desk: Desk,
    there: Listening,
    monkeypatch: pytest.MonkeyPatch,
    lines: Callable[[str], list[str]],
) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError

    desk.add(there.url)
    desk.tell()
    monkeypatch.setattr(sending, "_post", fail)
    desk.work()
    monkeypatch.undo()
    assert len(lines("ERROR")) == 1
    assert desk.waiting()[0][1:] == (1, "the server failed; its log says how")
    desk.pass_(90)
    assert len(there.receiver.heard) == 1


# -- 6. How much waits -----------------------------------------------------------------------------


def test_queue_is_bounded_and_strangers_push_out_nothing_but_strangers(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, lines: Callable[[str], list[str]]
) -> None:
    monkeypatch.setattr(hooks_module, "MAX_WAITING", 5)
    desk.add("http://127.0.0.1:1/")
    for event in ("rollout.halted", "device.silent", "device.unknown", "release.new"):
        desk.tell(event)
    assert not lines("dropped")
    for _ in range(3):
        desk.tell("device.looping")
    kept = ["rollout.halted", "release.new", *["device.looping"] * 3]
    assert [event for event, *_ in desk.waiting()] == kept
    for _ in range(9):
        desk.tell("rollout.finished")
    assert [event for event, *_ in desk.waiting()] == ["rollout.finished"] * 5
    assert lines("dropped") == ["WARNING 5 deliveries wait for webhooks: the oldest are dropped"]
    assert desk.hooks.waiting() == 5


def test_page_of_deliveries_says_why_they_wait(desk: Desk, there: Listening) -> None:
    there.receiver.status = 500
    webhook = desk.add(there.url)
    for _ in range(5):
        desk.tell()
    desk.work()
    found = desk.hooks.deliveries(webhook.id, after=2, limit=2)
    assert [(each.id, each.at, each.tries, each.failure) for each in found] == [
        (3, NOW, 1, "it answered 500"),
        (4, NOW, 1, "it answered 500"),
    ]
    with pytest.raises(Refused):
        desk.hooks.deliveries(webhook.id + 1)


# -- 7. Several servers, kills, restarts -----------------------------------------------------------


def test_two_servers_send_each_delivery_once(
    desk: Desk, there: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "PAUSE", 0.01)
    for _ in range(3):
        desk.add(there.url)
    with closing(Registry(desk.bench.state / "fleet.db")) as registry:
        both = [desk.hooks, desk.another(registry)]
        for hooks in both:
            hooks.start()
        for number in range(60):
            desk.tell("device.silent", number=number)
        wait_until(lambda: not desk.waiting(), 30)
        for hooks in both:
            hooks.close()
    ids = [each.data["id"] for each in there.receiver.heard]
    assert sorted(ids) == [*range(1, 181)]


def test_try_of_a_server_that_died_is_made_by_another_once_its_time_is_over(
    desk: Desk, there: Listening
) -> None:
    desk.add(there.url)
    desk.tell()
    with desk.registry.writing() as connection:  # it claims, and is never heard of again
        assert hooks_module._claim(connection, 1, int(desk.time))
    desk.time += LEASE - 1
    desk.work()
    assert not there.receiver.heard
    desk.time += 1
    desk.work()
    assert len(there.receiver.heard) == 1


def test_answer_that_comes_after_its_time_changes_nothing(desk: Desk, there: Listening) -> None:
    webhook = desk.add(there.url)
    desk.tell()
    with desk.registry.writing() as connection:
        late = hooks_module._claim(connection, webhook.id, NOW)
        desk.time += LEASE
        early = hooks_module._claim(connection, webhook.id, NOW + LEASE)
        assert late
        assert early
        desk.hooks._settle(connection, NOW + LEASE, webhook, late, "too late")
        assert hooks_module._claim(connection, webhook.id, NOW + LEASE) is None
    assert desk.waiting() == [("release.new", 0, "")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9")
def test_delivery_outlives_a_kill(folder: Path, there: Listening) -> None:
    there.receiver.status = 500
    state = folder.parent / "state"
    state.mkdir()
    with closing(Registry(state / "fleet.db")) as registry:
        row = there.url, "[]", SECRET, "ada", NOW
        values = "(url, events, secret, who, at) VALUES (?, ?, ?, ?, ?)"
        registry.write(f"INSERT INTO webhook {values}", *row)
        body = json.dumps({"event": "rollout.halted", "at": int(time.time()), "data": DATA})
        values = "(webhook, event, body, due) VALUES (1, 'rollout.halted', ?, 0)"
        registry.write(f"INSERT INTO delivery {values}", body)
    with fleet(folder) as script:
        wait_until(lambda: len(there.receiver.heard) == 1)
        wait_until(lambda: bool(tries(state)))
        assert script.end(signal.SIGKILL) == -signal.SIGKILL
    there.receiver.status = 204
    with by_hand(state / "fleet.db") as connection:
        connection.execute("UPDATE delivery SET due = 0")  # a minute is over
    with fleet(folder) as script:
        wait_until(lambda: len(there.receiver.heard) == 2)
        wait_until(lambda: not waits(state))
        assert script.end(signal.SIGTERM) == 0
        assert "Traceback" not in script.log
        assert SECRET not in script.log
    assert all(each.is_signed() for each in there.receiver.heard)


def waits(state: Path) -> list[Any]:
    """Tries of all that is still to be delivered."""
    with by_hand(state / "fleet.db") as connection:
        return [tries for (tries,) in connection.execute("SELECT tries FROM delivery")]


def tries(state: Path) -> int:
    """How often the only one was tried."""
    return int(waits(state)[0])


def test_stopping_waits_for_no_receiver_and_notes_what_was_answered(
    desk: Desk, there: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "LAST_WORDS", 0.2)
    with misbehaving(silent) as url:
        desk.add(there.url)
        desk.add(url)
        desk.tell()
        desk.hooks.turn()
        began = time.monotonic()
        desk.hooks.close()
        desk.hooks.close()
        assert time.monotonic() - began < 5
        assert len(there.receiver.heard) == 1
        assert len(desk.waiting()) == 1


def test_database_that_is_locked_is_told_once_and_nothing_is_lost(
    desk: Desk,
    there: Listening,
    monkeypatch: pytest.MonkeyPatch,
    lines: Callable[[str], list[str]],
) -> None:
    monkeypatch.setattr(hooks_module, "PAUSE", 0.01)
    desk.add(there.url)
    desk.tell()
    for connection in (desk.registry._surely, desk.registry._often):
        connection.execute("PRAGMA busy_timeout = 20")
    with by_hand(desk.bench.state / "fleet.db") as other:
        other.execute("BEGIN IMMEDIATE")
        desk.hooks.start()
        wait_until(lambda: desk.hooks._outage)
        assert not there.receiver.heard
        other.execute("ROLLBACK")
    wait_until(lambda: len(there.receiver.heard) == 1)
    wait_until(lambda: not desk.waiting())
    assert len(lines("webhooks are told nothing")) == 1


# -- 8. New releases -------------------------------------------------------------------------------


def told(there: Listening) -> list[str]:
    """The releases that were told."""
    data = [each.data["data"] for each in there.receiver.heard]
    return [f"{each['project']} {each['version']}" for each in data]


def scan(desk: Desk) -> None:
    """The catalog looks at its folder, and hooks at it."""
    assert desk.bench.folder.scan()
    desk.hooks.look()
    desk.work()


def test_releases_of_the_very_first_start_are_no_news(
    desk: Desk, folder: Path, there: Listening
) -> None:
    desk.add(there.url)
    desk.hooks.look()
    put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))  # its check took a while
    scan(desk)
    desk.settle()
    put(folder / "lamp-1.1.0.bin", esp8266_image("lamp", "1.1.0"))
    put(folder / "lamp-1.1.0.md", b"brighter")
    scan(desk)
    assert told(there) == ["lamp 1.1.0"]
    assert there.receiver.heard[0].data["data"]["notes"] == "brighter"


def test_first_release_of_an_empty_catalog_is_news(
    shelf: Path, tmp_path: Path, there: Listening
) -> None:
    bench = Bench(shelf, tmp_path)
    desk = Desk(bench)
    desk.add(there.url)
    desk.settle()
    desk.bench.add("1.0.0")
    desk.hooks.look()
    desk.work()
    assert told(there) == ["lamp 1.0.0"]
    desk.hooks.close()
    bench.close()


def test_release_is_told_once_whatever_becomes_of_it(
    desk: Desk, folder: Path, there: Listening
) -> None:
    desk.add(there.url)
    desk.settle()
    file = put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))
    scan(desk)
    file.unlink()
    scan(desk)
    put(file, esp8266_image("lamp", "1.0.0", seed=7))
    scan(desk)
    put(folder / "lamp" / "readme.bin", esp8266_image("lamp", "9.9.9"))  # has no version
    scan(desk)
    put(folder / "lamp-1.2.0.bin", b"no image")
    scan(desk)
    assert told(there) == ["lamp 1.0.0"]


def test_uploaded_release_is_told_like_one_of_the_folder(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.settle()
    desk.bench.add("1.0.0")
    desk.bench.add("1.1.0", image("1.1.0"))
    desk.hooks.look()
    desk.work()
    assert told(there) == ["lamp 1.0.0", "lamp 1.1.0"]


def test_release_that_came_while_the_server_was_off_is_told(
    desk: Desk, folder: Path, there: Listening
) -> None:
    desk.add(there.url)
    desk.settle()
    put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))
    assert desk.bench.folder.scan()
    desk.hooks = desk.another(desk.registry)
    desk.hooks.look()
    desk.work()
    assert told(there) == ["lamp 1.0.0"]


def test_two_servers_tell_of_a_release_once(desk: Desk, folder: Path, there: Listening) -> None:
    desk.add(there.url)
    desk.settle()
    with closing(Registry(desk.bench.state / "fleet.db")) as registry:
        other = desk.another(registry)
        put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))
        assert desk.bench.folder.scan()
        threads = [threading.Thread(target=each.look) for each in (desk.hooks, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        desk.work()
        desk.work(other)
        assert told(there) == ["lamp 1.0.0"]
        other.close()


def test_folder_that_was_away_brings_no_news(desk: Desk, folder: Path, there: Listening) -> None:
    desk.add(there.url)
    away = folder.rename(folder.with_name("away"))
    assert desk.bench.folder.scan()
    desk.settle()  # at the first start, too
    away.rename(folder)
    scan(desk)
    desk.settle()
    folder.rename(away)
    scan(desk)
    away.rename(folder)
    scan(desk)
    assert told(there) == []


def test_project_with_another_name_is_no_news(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "release.new")
    desk.settle()
    desk.bench.add("1.0.0")
    desk.hooks.look()
    rename(desk.bench.stock, Ledger(desk.registry), "lamp", "light", "ada", NOW)
    desk.hooks.look()
    desk.bench.add("1.1.0", image("1.1.0"), project="light")
    desk.hooks.look()
    desk.work()
    assert told(there) == ["lamp 1.0.0", "light 1.1.0"]


def test_news_that_cannot_be_written_are_told_later(
    desk: Desk, folder: Path, there: Listening
) -> None:
    desk.add(there.url)
    desk.settle()
    put(folder / "lamp-1.0.0.bin", esp8266_image("lamp", "1.0.0"))
    assert desk.bench.folder.scan()
    desk.registry._surely.execute("PRAGMA busy_timeout = 20")
    with by_hand(desk.bench.state / "fleet.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError):
            desk.hooks.look()
        other.execute("ROLLBACK")
    desk.hooks.look()
    desk.work()
    assert told(there) == ["lamp 1.0.0"]


# -- 9. Silent devices -----------------------------------------------------------------------------


def silences(there: Listening) -> list[tuple[str, int]]:
    """The devices that were said to be silent, and since when, in seconds from NOW."""
    found = [each.data["data"] for each in there.receiver.heard]
    return [(each["device"], each["since"] - NOW) for each in found]


def ask(desk: Desk, *devices: str) -> None:
    """Devices of `lamp` check in."""
    desk.see(*(decided(device=device) for device in devices))


def test_device_is_silent_after_a_day_and_that_is_told_once(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "device.silent")
    desk.registry.write("INSERT INTO alias (name, project) VALUES ('lamp', 'light')")
    ask(desk, MAC)
    desk.pass_(DAY)
    assert silences(there) == []
    desk.pass_(120)
    (heard,) = there.receiver.heard
    wanted = {"device": MAC, "project": "light", "version": "1.0.0", "since": NOW}
    assert heard.data["data"] == wanted
    desk.pass_(3 * DAY)
    assert len(there.receiver.heard) == 1


@pytest.mark.parametrize(("interval", "days"), [(0, 1), (HOUR, 1), (6 * HOUR, 1), (DAY, 4)])
def test_device_that_asks_seldom_has_four_of_its_intervals(
    interval: int, days: int, desk: Desk, there: Listening
) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, MAC)
    desk.registry.write("UPDATE device SET interval = ?", interval)
    desk.pass_(days * DAY)
    assert silences(there) == []
    desk.pass_(120)
    assert silences(there) == [(MAC, 0)]


def test_server_that_was_off_calls_nobody_silent_whom_it_did_not_hear(
    desk: Desk, there: Listening
) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, MAC, mac(1))
    desk.time += 3 * DAY
    desk.hooks = desk.another(desk.registry)
    desk.pass_(HOUR)
    ask(desk, MAC)
    assert silences(there) == []
    desk.pass_(DAY)
    assert silences(there) == [(mac(1), 0)]


def test_clock_that_jumps_ahead_makes_nobody_silent(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, MAC)
    desk.work()
    desk.time += 300 * DAY
    desk.work()
    assert silences(there) == []


def test_many_silent_devices_are_told_in_portions(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, *(mac(number) for number in range(SWEPT + 7)))
    desk.pass_(DAY)
    desk.time += 60
    desk.work()
    assert len(there.receiver.heard) == SWEPT
    desk.time += 60
    desk.work()
    assert len({device for device, _ in silences(there)}) == SWEPT + 7


def test_two_servers_tell_of_a_silent_device_once(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, MAC)
    desk.pass_(DAY)
    other = desk.another(desk.registry)
    desk.time += 61
    other.sweep(int(desk.time))  # it was off, as far as it knows
    other._began = 0
    for hooks in (other, desk.hooks):
        hooks.sweep(int(desk.time))
    desk.work()
    assert silences(there) == [(MAC, 0)]


def test_who_is_gone_for_a_month_is_not_missed(desk: Desk, there: Listening) -> None:
    desk.add(there.url, "device.silent")
    ask(desk, MAC)
    desk.registry.write("UPDATE device SET interval = ?", MONTH)
    desk.pass_(2 * MONTH, DAY / 25)
    assert silences(there) == []


# -- 10. Unknown devices ---------------------------------------------------------------------------


def strangers(there: Listening) -> list[tuple[int, list[tuple[str, str]]]]:
    """Count, and devices with the reason, of each delivery."""
    found = [each.data["data"] for each in there.receiver.heard]
    return [(each["count"], [(x["device"], x["why"]) for x in each["devices"]]) for each in found]


def test_device_that_nobody_has_seen_is_told_with_what_it_says(
    desk: Desk, there: Listening
) -> None:
    desk.bench.stock.put_project(Project("light", aliases=("lamp",)))
    desk.add(there.url)
    ask(desk, MAC.lower().replace(":", "-"), MAC)
    ask(desk, MAC)
    desk.time += 1
    ask(desk, MAC)
    desk.work()
    (heard,) = there.receiver.heard
    seen = {"project": "light", "version": "1.0.0", "address": "192.0.2.7"}
    wanted = {"count": 1, "devices": [{"device": MAC, **seen, "why": "new"}]}
    assert (heard.data["event"], heard.data["data"]) == ("device.unknown", wanted)


@pytest.mark.parametrize("kind", ["esp8266", "esp32"])
def test_doctor_leaves_no_trace(kind: str, desk: Desk, there: Listening) -> None:
    device = re.search("STA-MAC: (.*)", REQUESTS[kind])
    assert device is not None
    desk.add(there.url)
    ask(desk, device[1], device[1].lower().replace(":", ""))
    desk.work()
    assert strangers(there) == []
    assert desk.registry.device(device[1]) is None
    assert (desk.history.hours(), desk.history.recent()) == ([], [])


def test_flood_of_strangers_is_one_delivery_that_names_some(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    ask(desk, *(mac(number) for number in range(1_000)))
    desk.work()
    ((count, devices),) = strangers(there)
    assert (count, len(devices)) == (1_000, NAMED)


def test_device_without_an_id_is_nobody(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.see(decided(device=None), decided(BARRED, device=None))
    desk.work()
    assert there.receiver.heard == []


def test_device_is_known_after_a_restart_and_to_other_servers(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    ask(desk, MAC)
    desk.time += 1
    with closing(Registry(desk.bench.state / "fleet.db")) as registry:
        other = desk.another(registry)
        for hooks in (other, desk.another(desk.registry)):
            hooks.note(decided(device=MAC))
        registry.flush()
        desk.registry.flush()
    desk.work()
    assert strangers(there) == [(1, [(MAC, "new")])]


def test_device_that_is_not_admitted_is_told_once(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    ask(desk, MAC)
    for _ in range(2):
        desk.time += 1
        desk.see(decided(BARRED), decided(BARRED, device=mac(1)))
    desk.hooks = desk.another(desk.registry)  # the next process
    desk.time += 1
    desk.see(decided(BARRED), decided(BARRED, device=mac(1)))
    desk.work()
    assert strangers(there) == [
        (1, [(MAC, "new")]),
        (2, [(MAC, "not-whitelisted"), (mac(1), "new")]),
    ]


def test_what_is_known_of_devices_does_not_grow_for_ever(
    desk: Desk, there: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "MAX_MET", 10)
    desk.add(there.url)
    for _ in range(2):
        ask(desk, *(mac(number) for number in range(25)))
        desk.time += 1
    desk.work()
    assert len(desk.hooks._met) <= 10
    assert [count for count, _ in strangers(there)] == [25]


def test_batch_that_fails_tells_once_it_is_written(desk: Desk, there: Listening) -> None:
    desk.add(there.url)
    desk.registry._often.execute("PRAGMA busy_timeout = 20")
    with by_hand(desk.bench.state / "fleet.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError):
            ask(desk, MAC)
        other.execute("ROLLBACK")
    desk.registry.flush()
    desk.work()
    assert strangers(there) == [(1, [(MAC, "new")])]


# -- 11. By the API, and by a real server ----------------------------------------------------------


def test_secret_is_told_once_and_is_nowhere_else(
    house: House, there: Listening, said: Callable[[], list[str]]
) -> None:
    url = there.url.replace("/hook", "/secret-path")
    made = house.admin("POST", "webhooks", {"url": url}).data
    assert len(made["secret"]) >= 40
    assert house.admin("POST", f"webhooks/{made['id']}/test").status == 202
    wait_until(lambda: bool(there.receiver.heard))
    assert there.receiver.heard[0].is_signed(made["secret"])
    assert there.receiver.events == ["ping"]
    listed = house.admin("GET", "webhooks")
    assert {key: value for key, value in made.items() if key != "secret"} in listed.data["items"]
    seen = [listed.body, *(house.admin("GET", path).body for path in ("audit", "audit.jsonl"))]
    assert made["secret"].encode() not in b"".join(seen)
    assert b"secret-path" not in b"".join(seen[1:])
    assert made["secret"] not in "".join(said())
    assert "secret-path" not in "".join(said())
    assert made["secret"] not in repr(house.site)


def test_device_that_loops_is_told_by_a_real_server(house: House, there: Listening) -> None:
    wish = {"url": there.url, "events": ["device.looping"], "secret": SECRET}
    assert house.admin("POST", "webhooks", wish).status == 201
    check = "/firmware", "x-ESP8266-version: 1.0.0", f"x-ESP8266-STA-MAC: {MAC}"
    with standing(house.site) as stand:

        def is_told() -> bool:
            with stand.dial() as wire:
                assert wire.ask(*check).status in {200, 304}
            return bool(there.receiver.heard)

        wait_until(is_told)
    (heard,) = there.receiver.heard
    assert heard.data["data"] == {"device": MAC, "project": "firmware", "version": "1.10.0"}
    assert heard.is_signed()


def test_wrong_url_is_not_in_the_log(house: House, said: Callable[[], list[str]]) -> None:
    wish = {"url": "http://me:my-password@192.0.2.1/"}
    assert house.admin("POST", "webhooks", wish).status == 422
    assert "my-password" not in "".join(said())


def test_waiting_deliveries_say_why_by_the_api(house: House, there: Listening) -> None:
    there.receiver.status = 503
    number = house.admin("POST", "webhooks", {"url": there.url}).data["id"]
    house.admin("POST", f"webhooks/{number}/test")

    def waiting() -> Any:
        return house.admin("GET", f"webhooks/{number}/deliveries").data["items"]

    wait_until(lambda: [each["failure"] for each in waiting()] == ["it answered 503"])
    (delivery,) = waiting()
    assert (delivery["event"], delivery["tries"]) == ("ping", 1)
    assert 30 < delivery["due"] - delivery["at"] < 80


def test_webhook_comes_with_its_entry_in_the_audit_or_not_at_all(house: House) -> None:
    with closing(sqlite3.connect(house.state / "fleet.db")) as connection:
        connection.execute(
            "CREATE TRIGGER shut BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'shut'); END"
        )
    assert house.admin("POST", "webhooks", {"url": "http://127.0.0.1:1/"}).status == 500
    assert house.admin("POST", "webhooks/1/test").status == 500
    assert house.admin("DELETE", "webhooks/1").status == 500
    assert [each["id"] for each in house.admin("GET", "webhooks").data["items"]] == [1]
    assert house.admin("GET", "webhooks/1/deliveries").data["items"] == []


def test_receiver_of_the_documentation_takes_what_is_signed_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    lines = text[text.index("    import hashlib, hmac") :].partition("\n\nA receiver")[0]
    end = 'http.server.ThreadingHTTPServer(("", 8090), Receiver).serve_forever()'
    program = textwrap.dedent(lines).replace(end, 'server = HTTPServer(("127.0.0.1", 0), Receiver)')
    names: dict[str, Any] = {"HTTPServer": HTTPServer}
    monkeypatch.setenv("SECRET", SECRET)
    exec(program, names)  # noqa: S102 - it is ours
    names["Receiver"].log_message = lambda *_: None
    with serving(names["server"]) as port:
        desk.time = time.time()
        desk.add(f"http://127.0.0.1:{port}/")
        desk.tell()
        desk.work()
        assert desk.waiting() == []
        desk.registry.write("UPDATE webhook SET secret = 'another-secret-of-somebody'")
        desk.tell()
        desk.work()
        assert desk.waiting() == [("release.new", 1, "it answered 403")]


# -- 12. Many devices ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (hooks_module._WITH_DUE, "delivery_due"),
        (hooks_module._SILENT, "device_by_age"),
        (hooks_module._LAST_SEEN, "device_by_age"),
        (hooks_module._FIRST_SEEN, "sqlite_autoindex_device_1"),
        (hooks_module._REFUSED, "visit_by_device"),
    ],
)
def test_statement_uses_its_index(statement: str, index: str, desk: Desk) -> None:
    values = [0] * statement.count("?")
    rows = desk.registry.rows("EXPLAIN QUERY PLAN " + statement, *values)
    assert index in "\n".join(row[3] for row in rows)


def test_device_that_is_known_costs_the_loop_next_to_nothing(desk: Desk) -> None:
    event = Event(Report("lamp", "192.0.2.7", Version.parse("1.0.0"), MAC), BARRED)
    desk.hooks.note(event)
    began = time.perf_counter()
    for _ in range(10_000):
        desk.hooks.note(event)
    assert time.perf_counter() - began < 0.1  # 10 us each; it takes less than one
