"""No client takes what belongs to the others: turns, deadlines, the end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ota_server import Limits
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Wire, request, standing
from tests.data.make_images import esp8266_image


@contextmanager
def flood(wire: Wire, data: bytes) -> Iterator[threading.Event]:
    """Sends `data` over and over and reads what comes, until the block ends; sets when it began."""
    begun, stop = threading.Event(), threading.Event()

    def read() -> None:
        with suppress(OSError):
            while wire.link.recv(1 << 20):
                begun.set()

    def write() -> None:
        with suppress(OSError):
            while not stop.is_set():
                wire.link.sendall(data)

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        yield begun
    finally:
        stop.set()
        with suppress(OSError):
            wire.link.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


def test_client_that_pipelines_without_end_does_not_hold_others(folder: Path) -> None:
    with standing(site_of(folder)) as stand, stand.dial() as hog, stand.dial() as other:
        assert other.check().status == 200
        with flood(hog, request("/healthz") * 100) as begun:
            assert begun.wait(10)
            start = time.monotonic()
            for _ in range(5):
                assert other.check().status == 200
            assert time.monotonic() - start < 5  # a single turn of the hog lasted 12 s once


def test_line_ends_do_not_renew_the_time_for_a_head(folder: Path) -> None:
    limits = Limits(head=0.5, idle=0.5, tick=0.02)
    with standing(site_of(folder), limits=limits) as stand, stand.dial() as wire:
        assert wire.ask().status == 200
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.1):
                    wire.link.sendall(b"\r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        wire.link.settimeout(5)
        with suppress(ConnectionError):
            assert wire.link.recv(1) == b""  # a timeout would mean that it is still open
        ended.set()
        dripping.join(10)


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"\x16\x03", id="half-a-handshake"),
        pytest.param(b"GET / HT", id="half-a-head"),
    ],
)
def test_client_that_has_asked_nothing_delays_the_end_only_a_little(
    opening: bytes, folder: Path, certificate: Path
) -> None:
    ca = certificate if opening.startswith(b"\x16") else None
    limits = Limits(tick=0.02, fresh=0.3)
    with standing(site_of(folder), ca, limits=limits) as stand, ExitStack() as stack:
        place = ("127.0.0.1", stand.server.server_port)
        client = stack.enter_context(socket.create_connection(place, 10))
        client.sendall(opening)
        assert stand.is_fine()
        stand.server.drain()
        client.settimeout(10)
        with suppress(ConnectionError):
            assert client.recv(1) == b""


def test_stray_byte_behind_a_request_does_not_cut_off_the_image(folder: Path) -> None:
    image = esp8266_image("stray", "1.0.0", payload=bytes(300_000))
    put(folder / "stray-1.0.0.bin", image)
    with standing(site_of(folder)) as stand, stand.dial(receive_buffer=4096) as wire:
        wire.send(b"GET /stray/stray-1.0.0.bin HTTP/1.0\r\n\r\n")
        assert wire.head().status == 200
        wire.send(b"\r\n")
        assert wire.rest() == image


def test_rewrite_while_pages_wait_in_the_socket_is_noticed_before_the_last_bytes(
    folder: Path,
) -> None:
    image = esp8266_image("late", "1.0.0", payload=bytes(90_000))  # the kernel takes all but a bit
    path = put(folder / "late-1.0.0.bin", image)
    with standing(site_of(folder)) as stand, stand.dial(receive_buffer=4096) as wire:
        wire.send(request("/late/late-1.0.0.bin"))
        assert wire.head().status == 200
        assert stand.is_fine()  # the loop has had its turn
        with path.open("r+b") as file:
            file.write(b"\xff" * len(image))
        received = wire.rest()
        assert len(received) < len(image) or received == image


def test_rewrite_while_the_last_bytes_wait_in_the_socket_does_not_change_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ota")
    image = esp8266_image("late", "1.0.0", payload=bytes(20_000))
    path = put(folder / "late-1.0.0.bin", image)
    with standing(site_of(folder)) as stand, stand.dial(receive_buffer=4096) as wire:
        wire.send(request("/late/late-1.0.0.bin"))
        done = f"{len(image)} of {len(image)} bytes of late-1.0.0.bin"
        wait_until(lambda: any(done in line for line in caplog.messages))
        with path.open("r+b") as file:
            file.write(b"\xff" * len(image))
        head = wire.head()
        assert head.status == 200
        assert wire.read(len(image)) == image


def test_want_of_threads_is_no_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = threading.Thread.start
    refused = threading.Event()

    def start(self: threading.Thread) -> None:
        if not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        real(self)

    with standing(site_of(folder), limits=Limits(tick=0.02)) as stand, stand.dial() as wire:
        monkeypatch.setattr(threading.Thread, "start", start)
        assert wire.ask("/").status == 200
        assert refused.is_set()
        assert "can't start new thread" in caplog.text
