"""Dialogues with the real Server over sockets, plain and by TLS."""

from __future__ import annotations

import collections
import errno
import functools
import hashlib
import itertools
import logging
import os
import re
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import ota_server
from ota_server import DirectoryCatalog, Limits, Reply, Request, Route, Site, text_reply
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Wire, descriptors, dial, request, standing, started
from tests.data.make_images import esp32_image

BIG = "/big/big-1.0.0.bin"  # where the large image is
SMALL = "/firmware/firmware-1.10.0.bin"
SLOW = 32768  # bytes of receive buffer of a client that makes the server wait


@functools.cache
def large_image(seed: int = 0) -> bytes:
    """An image so large that most of it leaves by sendfile, and a kernel cannot buffer it."""
    payload = hashlib.shake_128(bytes([seed])).digest(2 << 20)
    image = esp32_image("big", "1.0.0", payload=payload)
    assert len(image) > 4 * (ota_server.LAST + ota_server.SEND_BUFFER + ota_server.PIECE)
    return image


@pytest.fixture(params=["plain", "tls"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None without TLS."""
    return certificate if request.param == "tls" else None


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """The firmware folder with a large image in it."""
    put(folder / "big-1.0.0.bin", large_image())
    return folder


def catalog_of(site: Site) -> DirectoryCatalog:
    """The site's catalog, to make it look at its folder now."""
    assert isinstance(site.catalog, DirectoryCatalog)
    return site.catalog


# -- 1. Keeping and closing connections -----------------------------------------------------------

PERSISTENCE = [
    pytest.param("1.1", (), True, id="1.1"),
    pytest.param("1.1", ("Connection: keep-alive",), True, id="1.1-keep-alive"),
    pytest.param("1.1", ("Connection: close",), False, id="1.1-close"),
    pytest.param("1.1", ("Connection: TE, Close",), False, id="1.1-list-with-close"),
    pytest.param("1.0", (), False, id="1.0"),
    pytest.param("1.0", ("Connection: keep-alive",), True, id="1.0-keep-alive"),
    pytest.param("1.0", ("Connection: Keep-Alive, TE",), True, id="1.0-list-with-keep-alive"),
    pytest.param("1.0", ("Connection: close",), False, id="1.0-close"),
]


@pytest.mark.parametrize("path", ["/healthz", SMALL, "/", "/nobody"])
@pytest.mark.parametrize(("http", "fields", "stays"), PERSISTENCE)
def test_connection_stays_as_the_client_says_and_the_end_is_announced(
    http: str, fields: tuple[str, ...], *, stays: bool, path: str, ca: Path | None, folder: Path
) -> None:
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        wire.send(request(path, *fields, http=http))
        assert wire.reply().closes is not stays
        if stays:
            wire.send(request(path, *fields, http=http))
            wire.reply()
        else:
            assert wire.rest() == b""


def test_pipelined_requests_are_answered_in_order(ca: Path | None, folder: Path) -> None:
    checks = [request("/firmware", f"x-ESP8266-version: {v}") for v in ("1.10.0", "1.0.0", "x")]
    more = [request("/nobody"), request("/"), request("/favicon.ico"), request()]
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        wire.send(b"".join([*checks, *more, *checks]))
        replies = [wire.reply() for _ in range(10)]
    assert [reply.status for reply in replies] == [304, 200, 400, 404, 200, 200, 200, 304, 200, 400]
    newest = (folder / "firmware-1.10.0.bin").read_bytes()
    assert replies[1].body == replies[8].body == newest
    assert replies[4].body.startswith(b"<!doctype html>")
    assert replies[6].body == b"ok\n"


@pytest.mark.parametrize("path", ["/", "/healthz", "/favicon.ico", SMALL, "/firmware", "/nobody"])
def test_head_gets_the_fields_of_get_and_no_body(path: str, ca: Path | None, folder: Path) -> None:
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        replies = [
            wire.ask(path, "x-ESP32-nothing: 1", method=method) for method in ("GET", "HEAD", "GET")
        ]
    fields = [{k: v for k, v in r.headers.items() if k != "date"} for r in replies]
    assert fields[0] == fields[1] == fields[2]
    assert replies[0].status == replies[1].status
    assert (len(replies[0].body) > 0, len(replies[1].body)) == (True, 0)


def test_head_dribbled_byte_by_byte_is_read(ca: Path | None, folder: Path) -> None:
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        for byte in request("/firmware", "x-ESP8266-version: 1.0.0", "Content-Length: 0"):
            wire.send(bytes([byte]))
        assert wire.reply().headers["x-version"] == "1.10.0"


def test_client_that_has_said_all_still_gets_its_reply(big_folder: Path) -> None:
    with standing(site_of(big_folder)) as stand, stand.dial() as wire:
        wire.send(request() + request(BIG))
        wire.link.shutdown(socket.SHUT_WR)
        assert wire.reply().body == b"ok\n"
        assert wire.reply().body == large_image()
        assert wire.rest() == b""


@pytest.mark.parametrize("agent", ["ESP8266-http-Update", "curl/8.5.0"])
@pytest.mark.parametrize("path", [SMALL, "/firmware"])
def test_head_and_first_bytes_of_the_image_come_in_one_piece(
    path: str, agent: str, ca: Path | None, folder: Path
) -> None:
    fields = (f"User-Agent: {agent}", "x-ESP8266-version: 1.0.0")
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        wire.send(request(path, *fields))
        first = wire.link.recv(65536)
        assert len(first.partition(b"\r\n\r\n")[2]) >= 1024


def test_client_that_goes_in_mid_download_leaves_nothing_open(
    ca: Path | None, big_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with standing(site_of(big_folder), ca) as stand:
        assert stand.is_fine()
        wait_until(lambda: any("of 5456 bytes" in line for line in caplog.messages))
        before = descriptors()
        with stand.dial(receive_buffer=SLOW) as wire:
            wire.send(request(BIG))
            assert wire.head().status == 200
            assert descriptors() > before
            abort = struct.pack("ii", 1, 0)  # SO_LINGER: a reset instead of an orderly end
            wire.link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
        wait_until(lambda: descriptors() <= before)
        assert stand.is_fine()
    line = next(line for line in caplog.messages if "bytes of big-1.0.0.bin" in line)
    assert re.fullmatch(r"- 127\.0\.0\.1 was sent \d+ of \d+ bytes of big-1\.0\.0\.bin", line)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# -- 2. Bodies that nobody asked for --------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1000, ota_server.MAX_BODY])
@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("POST", 405), ("HEAD", 200)])
def test_small_unwanted_body_is_dropped_and_the_connection_goes_on(
    method: str, status: int, size: int, ca: Path | None, folder: Path
) -> None:
    body = b"GET /nobody HTTP/1.1\r\nHost: x\r\n\r\n".ljust(size, b"z")[:size]
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        wire.send(request("/healthz", f"Content-Length: {size}", method=method) + body)
        assert wire.reply(method).status == status
        assert wire.check().status == 200


@pytest.mark.parametrize("size", [ota_server.MAX_BODY + 1, 200_000])
def test_large_unwanted_body_is_refused_readably(size: int, ca: Path | None, folder: Path) -> None:
    limits = Limits(linger=0.3, tick=0.02)
    with standing(site_of(folder), ca, limits=limits) as stand, stand.dial() as wire:
        wire.send(request("/firmware", f"Content-Length: {size}", method="PUT") + bytes(size))
        answer = wire.reply()
        assert (answer.status, answer.closes) == (413, True)
        assert answer.body.endswith(b"\n")
        assert wire.rest() == b""
        assert stand.is_fine()


@pytest.mark.parametrize("size", [100, 100_000])
def test_client_that_expects_100_continue_gets_its_final_status_at_once(
    size: int, folder: Path
) -> None:
    with standing(site_of(folder)) as stand, stand.dial() as wire:
        wire.link.settimeout(2)
        fields = ("Expect: 100-continue", f"Content-Length: {size}")
        assert wire.ask("/firmware", *fields, method="PUT").status in {405, 413, 417}


# -- 3. Heads without end -------------------------------------------------------------------------


def head_of(size: int) -> bytes:
    """A head of exactly so many bytes."""
    empty = request("/healthz", "x-fill: ")
    return request("/healthz", "x-fill: " + "f" * (size - len(empty)))


def test_head_of_8_kb_is_read_and_the_connection_goes_on(ca: Path | None, folder: Path) -> None:
    with standing(site_of(folder), ca) as stand, stand.dial() as wire:
        wire.send(head_of(ota_server.MAX_HEAD))
        assert (wire.reply().status, wire.check().status) == (200, 200)


@pytest.mark.parametrize("size", [ota_server.MAX_HEAD + 1, 3 * ota_server.MAX_HEAD])
def test_larger_head_gets_431_and_the_end(size: int, ca: Path | None, folder: Path) -> None:
    limits = Limits(linger=0.3, tick=0.02)
    with standing(site_of(folder), ca, limits=limits) as stand, stand.dial() as wire:
        wire.send(head_of(size))
        answer = wire.reply()
        assert (answer.status, answer.closes, wire.rest()) == (431, True, b"")


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"GET /" + b"a" * 1000, id="request-line"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b"a" * 1000, id="field"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100, id="fields"),
        pytest.param(b"\r\n" * 500, id="empty-lines"),
        pytest.param(b"\n" * 500, id="line-feeds"),
        pytest.param(b"\x16\x03\x01" + bytes(1000), id="tls"),
    ],
)
def test_client_that_never_stops_sending_is_cut_off(piece: bytes, folder: Path) -> None:
    limits = Limits(linger=0.3, tick=0.02)
    with standing(site_of(folder), limits=limits) as stand, stand.dial() as wire:
        flood = itertools.chain([piece], itertools.repeat(piece[-500:], 200_000))
        with pytest.raises(ConnectionError):  # a reset or a broken pipe; not a timeout
            collections.deque(map(wire.send, flood), 0)
        assert stand.is_fine()


# -- 4. Images: whole, in part, and changed while they are sent -----------------------------------


def refused_sendfile(*_: int) -> int:
    """What os.sendfile does on a file system that does not know it."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("way", ["default", "SelectSelector", "no-sendfile", "sendfile-refused"])
def test_large_image_arrives_identical(
    way: str, ca: Path | None, big_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if way == "SelectSelector":
        options["selector"] = selectors.SelectSelector()
    if way == "no-sendfile":
        monkeypatch.delattr(os, "sendfile")
    if way == "sendfile-refused":
        monkeypatch.setattr(os, "sendfile", refused_sendfile)
    with standing(site_of(big_folder), ca, **options) as stand, stand.dial() as wire:
        for _ in range(2):
            answer = wire.ask(BIG)
            assert answer.body == large_image()
            assert answer.headers["x-md5"] == hashlib.md5(answer.body).hexdigest()  # noqa: S324


RANGES = [
    pytest.param("bytes=0-", 206, slice(None), id="all"),
    pytest.param("bytes=0-0", 206, slice(0, 1), id="first-byte"),
    pytest.param("bytes=100-199", 206, slice(100, 200), id="middle"),
    pytest.param("bytes=1000000-", 206, slice(1_000_000, None), id="rest"),
    pytest.param("bytes=-300000", 206, slice(-300_000, None), id="last-bytes"),
    pytest.param("bytes=2000000-99999999", 206, slice(2_000_000, None), id="end-is-clamped"),
    pytest.param("bytes=0-1,5-6", 200, slice(None), id="several-are-ignored"),
    pytest.param("lines=0-1", 200, slice(None), id="other-unit-is-ignored"),
    pytest.param("bytes=9-1", 200, slice(None), id="backwards-is-ignored"),
    pytest.param("bytes=99999999-", 416, slice(0), id="behind-the-end"),
    pytest.param("bytes=-0", 416, slice(0), id="last-none"),
]


@pytest.mark.parametrize(("text", "status", "part"), RANGES)
def test_range_is_a_slice_of_the_image(
    text: str, status: int, part: slice, ca: Path | None, big_folder: Path
) -> None:
    with standing(site_of(big_folder), ca) as stand, stand.dial() as wire:
        answer = wire.ask(BIG, f"Range: {text}")
        assert wire.check().status == 200
    assert answer.status == status
    size = len(large_image())
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{size}"
        return
    assert answer.body == large_image()[part]
    if answer.status == 206:
        start, stop, _ = part.indices(size)
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"


def test_interrupted_download_is_resumed(ca: Path | None, big_folder: Path) -> None:
    with standing(site_of(big_folder), ca) as stand:
        with stand.dial() as wire:
            wire.send(request(BIG))
            etag = wire.head().headers["etag"]
            first = wire.read(700_001)
        with stand.dial() as wire:
            resume = f"Range: bytes={len(first)}-", f"If-Range: {etag}"
            answer = wire.ask(BIG, *resume)
            assert (answer.status, first + answer.body) == (206, large_image())
            put(big_folder / "big-1.0.0.bin", large_image(1))
            catalog_of(stand.server.site).scan()
            assert wire.ask(BIG, *resume).body == large_image(1)
            assert wire.ask(BIG, resume[0], f"If-Match: {etag}").status == 412
            assert wire.ask(BIG, f"If-None-Match: {etag}").status == 200


def test_running_download_goes_on_from_a_file_that_is_replaced(
    ca: Path | None, big_folder: Path
) -> None:
    site = site_of(big_folder)
    with standing(site, ca) as stand, stand.dial(receive_buffer=SLOW) as wire:
        wire.send(request(BIG))
        size = int(wire.head().headers["content-length"])
        new = put(big_folder / ".new", large_image(1), age=30)
        new.replace(big_folder / "big-1.0.0.bin")
        assert catalog_of(site).scan()
        assert wire.read(size) == large_image()
        assert wire.ask(BIG).body == large_image(1)


def test_running_download_goes_on_from_a_file_that_is_removed(
    ca: Path | None, big_folder: Path
) -> None:
    site = site_of(big_folder)
    with standing(site, ca) as stand, stand.dial(receive_buffer=SLOW) as wire:
        wire.send(request(BIG))
        size = int(wire.head().headers["content-length"])
        (big_folder / "big-1.0.0.bin").unlink()
        assert catalog_of(site).scan()
        assert wire.read(size) == large_image()
        assert wire.ask(BIG).status == 404


def rewritten(path: Path) -> None:
    """Writes another image into the same file."""
    with path.open("r+b") as file:
        file.write(large_image(1))


def truncated(path: Path) -> None:
    """Cuts the file off."""
    os.truncate(path, 100_000)


def grown(path: Path) -> None:
    """Writes something behind its end."""
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("spoil", [rewritten, truncated, grown])
def test_download_of_a_file_that_is_written_to_ends_early(
    spoil: Callable[[Path], None],
    ca: Path | None,
    big_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with standing(site_of(big_folder), ca) as stand:
        with stand.dial(receive_buffer=SLOW) as wire:
            wire.send(request(BIG))
            size = int(wire.head().headers["content-length"])
            spoil(big_folder / "big-1.0.0.bin")
            assert len(wire.rest()) < size
        assert stand.is_fine()
        with stand.dial() as wire:  # not looked at yet: neither the old bytes nor the new ones
            assert wire.ask(BIG).status == 503
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("bytes of big-1.0.0.bin" in message for message in warned)


# -- 5. Those who are silent, slow or too many ----------------------------------------------------


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"", id="silent"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01", id="half-a-client-hello"),
        pytest.param(b"GET /firmware HTTP/1.0\r\nHost: ", id="half-a-head"),
    ],
)
def test_silent_clients_do_not_hold_others(opening: bytes, ca: Path | None, folder: Path) -> None:
    with standing(site_of(folder), ca) as stand, ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(dial(stand.port)).send(opening)
        assert stand.is_fine()


def test_stalled_downloads_do_not_hold_others(ca: Path | None, big_folder: Path) -> None:
    with standing(site_of(big_folder), ca) as stand, ExitStack() as stack:
        for _ in range(10):
            wire = stack.enter_context(stand.dial(receive_buffer=SLOW))
            wire.send(request(BIG))
            assert wire.head().status == 200
        assert stand.is_fine()


def half_a_head(wire: Wire) -> None:
    """A client that stops in the middle of its head."""
    wire.send(b"GET /firm")


def idle_after_a_reply(wire: Wire) -> None:
    """A client that keeps its connection and asks nothing."""
    assert wire.check().status == 200


def half_a_body(wire: Wire) -> None:
    """A client that promises a body and sends a part of it."""
    wire.send(request("/firmware", "Content-Length: 10") + b"12345")


def second_half_head(wire: Wire) -> None:
    """A client that stops in the middle of its second head."""
    assert wire.check().status == 200
    wire.send(b"GET /firm")


DEADLINES = [
    pytest.param(half_a_head, Limits(head=0.5, tick=0.02), id="head"),
    pytest.param(second_half_head, Limits(head=0.5, tick=0.02), id="second-head"),
    pytest.param(half_a_body, Limits(head=0.5, tick=0.02), id="body"),
    pytest.param(idle_after_a_reply, Limits(idle=0.5, tick=0.02), id="idle"),
    pytest.param(lambda wire: None, Limits(head=0.5, tick=0.02), id="nothing"),
]


@pytest.mark.parametrize(("begin", "limits"), DEADLINES)
def test_client_that_waits_too_long_is_dropped(
    begin: Callable[[Wire], None], limits: Limits, ca: Path | None, folder: Path
) -> None:
    with standing(site_of(folder), ca, limits=limits) as stand, stand.dial() as wire:
        begin(wire)
        assert wire.rest() == b""


def test_head_that_trickles_in_for_ever_is_cut_off(folder: Path) -> None:
    limits = Limits(head=0.5, tick=0.02)
    with standing(site_of(folder), limits=limits) as stand, stand.dial() as wire:
        wire.link.settimeout(0.02)
        wire.send(b"GET / HTTP/1.1\r\n")
        for _ in range(250):  # 5 s
            try:
                ended = not wire.link.recv(1)
            except TimeoutError:
                ended = False
            except ConnectionError:  # it closed with a byte of ours unread
                ended = True
            if ended:
                return
            with suppress(ConnectionError):
                wire.send(b"x")
    pytest.fail("it is still connected")


@pytest.mark.parametrize("opening", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half"])
def test_handshake_that_does_not_end_is_cut_off(
    opening: bytes, certificate: Path, folder: Path
) -> None:
    limits = Limits(handshake=0.5, tick=0.02)
    with standing(site_of(folder), certificate, limits=limits) as stand, dial(stand.port) as wire:
        wire.send(opening)
        assert wire.rest() == b""


def test_client_that_stops_reading_is_dropped_and_the_file_closed(
    ca: Path | None, big_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(progress=0.4, tick=0.02)
    with standing(site_of(big_folder), ca, limits=limits) as stand:
        before = descriptors()
        with stand.dial(receive_buffer=SLOW) as wire:
            wire.send(request(BIG))
            assert wire.head().status == 200
            wait_until(lambda: descriptors() <= before + 1)  # this client's own
            with suppress(TimeoutError):
                assert len(wire.rest()) < len(large_image())
    assert [r.message for r in caplog.records if "bytes of big-1.0.0.bin" in r.message]


def test_slow_reader_is_not_dropped_while_bytes_flow(big_folder: Path) -> None:
    limits = Limits(head=0.5, idle=0.5, handshake=0.5, tick=0.02)  # progress: 60 s
    with ExitStack() as stack:
        stand = stack.enter_context(standing(site_of(big_folder), limits=limits))
        wire = stack.enter_context(stand.dial(receive_buffer=SLOW))
        wire.send(request(BIG))
        size = int(wire.head().headers["content-length"])
        with stand.dial() as other:  # dropped for idleness: more than 0.5 s have gone by
            other.check()
            assert other.rest() == b""
        assert wire.read(size) == large_image()


def test_one_connection_too_many_waits_and_is_served_when_another_leaves(
    ca: Path | None, folder: Path
) -> None:
    with standing(site_of(folder, max_connections=2), ca) as stand, ExitStack() as stack:
        first = ExitStack()
        wires = [first.enter_context(stand.dial()), stack.enter_context(stand.dial())]
        for wire in wires:
            assert wire.check().status == 200
        served = threading.Event()

        def third() -> None:
            if stand.is_fine():
                served.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not served.wait(0.3)
        first.close()
        assert served.wait(10)
        thread.join(10)
        assert wires[1].check().status == 200


def test_process_out_of_descriptors_recovers(folder: Path) -> None:
    if os.name != "posix":
        pytest.skip("needs ulimit")
    options = ("--dir", folder, "--port", "0", "--host", "127.0.0.1", "--max-connections", "1000")
    few = ("sh", "-c", 'ulimit -n 32 && exec "$@"', "sh")
    with started(folder.parent, *options, before=few) as script:
        script.wait_for("/firmware", "x-ESP8266-version: 1.0.0")
        with ExitStack() as stack:
            wires = [stack.enter_context(script.dial()) for _ in range(60)]
            assert wires[0].check().status == 200
            for wire in wires[1:]:
                wire.send(b"G")  # who is silent costs no descriptor
            wait_until(lambda: "Too many open files" in script.log)
            assert wires[0].ask().status == 200
            assert wires[0].check().status == 503  # no descriptor for the image, and it says so
        script.wait_for("/firmware", "x-ESP8266-version: 1.0.0")
        assert script.process.poll() is None
        assert script.log.count("connections cannot be accepted") == 1
        assert "Traceback" not in script.log


# -- 6. Endpoints that block ----------------------------------------------------------------------


@dataclass(slots=True)
class Slow:
    """An endpoint that waits until it is released, and counts who is inside."""

    gate: threading.Event = field(default_factory=threading.Event)
    inside: list[str] = field(default_factory=list)  # names of threads

    def __call__(self, site: Site, request: Request) -> Reply:
        """Answers when the gate opens."""
        del site
        self.inside.append(threading.current_thread().name)
        assert self.gate.wait(20)
        return text_reply(200, request.path)


def site_with(folder: Path, endpoint: Callable[[Site, Request], Reply]) -> Site:
    """A site with a blocking endpoint under /slow."""
    site = site_of(folder)
    route = Route(re.compile("/slow.*"), endpoint, blocking=True)
    return replace(site, routes=(route, *site.routes))


def test_blocking_endpoint_does_not_delay_checks(ca: Path | None, folder: Path) -> None:
    slow = Slow()
    with standing(site_with(folder, slow), ca) as stand, stand.dial() as wire:
        wire.send(request("/slow") + request("/firmware", "x-ESP8266-version: 1.0.0"))
        wait_until(lambda: bool(slow.inside))
        assert stand.is_fine()
        slow.gate.set()
        assert wire.reply().body == b"/slow\n"
        assert wire.reply().headers["x-version"] == "1.10.0"


def test_path_that_no_route_matches_is_404_without_a_trace(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = site_of(folder)
    only_health = tuple(route for route in site.routes if route.pattern.pattern == "/healthz")
    with standing(replace(site, routes=only_health)) as stand, stand.dial() as wire:
        assert wire.ask("/healthz").status == 200
        assert wire.ask("/elsewhere").status == 404
    assert "Traceback" not in caplog.text


def test_threads_are_bounded_and_nobody_is_forgotten(folder: Path) -> None:
    slow = Slow()
    count = ota_server.MAX_THREADS + 8
    with standing(site_with(folder, slow)) as stand, ExitStack() as stack:
        wires = [stack.enter_context(stand.dial()) for _ in range(count)]
        for number, wire in enumerate(wires):
            wire.send(request(f"/slow{number}"))
        wait_until(lambda: len(slow.inside) == ota_server.MAX_THREADS)
        assert stand.is_fine()
        assert len(slow.inside) == ota_server.MAX_THREADS
        slow.gate.set()
        assert [w.reply().body for w in wires] == [b"/slow%d\n" % n for n in range(count)]


def test_client_that_leaves_a_blocking_endpoint_does_no_harm(folder: Path) -> None:
    slow = Slow()
    with standing(site_with(folder, slow)) as stand:
        before = descriptors()
        with stand.dial() as wire:
            wire.send(request("/slow"))
            wait_until(lambda: bool(slow.inside))
        slow.gate.set()
        wait_until(lambda: descriptors() <= before)
        assert stand.is_fine()


def test_failing_endpoint_is_a_bare_500_with_its_trace_in_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(site: Site, request: Request) -> Reply:
        raise RuntimeError("secret")

    with standing(site_with(folder, broken)) as stand, stand.dial() as wire:
        answer = wire.ask("/slow")
        assert (answer.status, b"secret" in answer.body) == (500, False)
        assert wire.check().status == 200
    assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR"]


def test_reply_that_cannot_be_sent_costs_only_its_own_connection(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(site: Site, request: Request) -> Reply:
        del site, request
        return Reply(200, (("X-Text", "\N{SNOWMAN}"), ("Content-Length", "0")))

    with standing(site_with(folder, broken)) as stand, stand.dial() as wire:
        wire.send(request("/slow"))
        assert wire.rest() == b""
        assert stand.is_fine()
    assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR"]


# -- 7. Addresses, ends ---------------------------------------------------------------------------


def listening_on(site: Site, host: str) -> Site:
    """The site on another address."""
    return replace(site, config=replace(site.config, host=host))


needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")


@needs_ipv6
@pytest.mark.parametrize(
    ("listen", "ask"),
    [("::1", "::1"), ("", "127.0.0.1"), ("", "::1"), ("0.0.0.0", "127.0.0.1")],  # noqa: S104
)
def test_device_reaches_the_server_by_ipv4_and_ipv6(
    listen: str, ask: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    site = listening_on(site_of(folder), listen)
    with standing(site) as stand, dial(stand.port, host=ask) as wire:
        assert wire.check().status == 200
    assert caplog.messages[0].startswith(f"- {ask} firmware 1.0.0 -> 1.10.0")


def test_drained_server_ends_with_its_last_download(ca: Path | None, big_folder: Path) -> None:
    limits = Limits(tick=60)  # so nothing here waits for a look at the clock
    with standing(site_of(big_folder), ca, limits=limits) as stand, ExitStack() as stack:
        idle = stack.enter_context(stand.dial())
        slow = stack.enter_context(stand.dial(receive_buffer=SLOW))
        assert idle.check().status == 200
        slow.send(request(BIG))
        assert slow.head().status == 200
        stand.server.drain()
        assert idle.rest() == b""
        assert slow.rest() == large_image()


def test_drained_server_does_not_wait_longer_than_its_grace(
    big_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(grace=0.3, tick=0.02)
    with ExitStack() as stack:
        stand = stack.enter_context(standing(site_of(big_folder), limits=limits))
        wire = stack.enter_context(stand.dial(receive_buffer=SLOW))
        wire.send(request(BIG))
        assert wire.head().status == 200
        stand.server.drain()
        wait_until(lambda: any("bytes of big-1.0.0.bin" in line for line in caplog.messages))
        assert len(wire.rest()) < len(large_image())
