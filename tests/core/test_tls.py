"""TLS as devices need it: small records, resumed sessions, whatever version they speak."""

from __future__ import annotations

import functools
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ota_server
from tests.conftest import put, site_of
from tests.core.wire import PATIENCE, Answer, Wire, client_context, request, standing
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Esp32

APPLICATION_DATA = 23  # RFC 8446 5.1
OVERHEAD = 64  # bytes that encryption may add to a record here; RFC 8446 5.2 allows 256
BIG = "/big/big-2.0.0.bin"
VERSIONS = [
    pytest.param(ssl.TLSVersion.TLSv1_2, id="tls-1.2"),
    pytest.param(ssl.TLSVersion.TLSv1_3, id="tls-1.3"),
]


@functools.cache
def large_image(chip: str = "esp32") -> bytes:
    """An image of some hundred records."""
    payload = hashlib.shake_128(b"tls").digest(512 << 10)
    make = functools.partial(esp8266_image if chip == "esp8266" else esp32_image, payload=payload)
    return make("big", "2.0.0")


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """The firmware folder with a large image in it."""
    put(folder / "big-2.0.0.bin", large_image())
    put(folder / "big" / "esp8266-2.0.0.bin", large_image("esp8266"))
    return folder


@dataclass(slots=True)
class Relay:
    """Carries one connection to a port and records what comes back."""

    port: int
    received: bytearray = field(default_factory=bytearray)

    def records(self) -> list[int]:
        """The lengths of all records with application data."""
        lengths, position = list[int](), 0
        while position + 5 <= len(self.received):
            kind = self.received[position]
            size = int.from_bytes(self.received[position + 3 : position + 5], "big")
            if kind == APPLICATION_DATA:
                lengths.append(size)
            position += 5 + size
        return lengths


def carry(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    """Carries bytes one way until the source ends, then says so to the target."""
    try:
        while data := source.recv(65536):
            record += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # either side has reset its connection
        pass


@contextmanager
def relay(port: int, host: str = "127.0.0.1") -> Iterator[Relay]:
    """A relay in front of a port, for one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        between = Relay(listener.getsockname()[1])

        def run() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection((host, port), PATIENCE) as server:
                client.settimeout(PATIENCE)
                back = threading.Thread(target=carry, args=(server, client, between.received))
                back.start()
                carry(client, server, bytearray())
                back.join(PATIENCE)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield between
        finally:
            thread.join(2 * PATIENCE)


@contextmanager
def secure_wire(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None
) -> Iterator[Wire]:
    """A TLS connection of this context, perhaps with a session to resume."""
    plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
    with context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as link:
        yield Wire(link)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("agent", "chip", "limit"),
    [
        pytest.param("ESP8266-http-Update", "esp8266", ota_server.DEVICE_RECORD, id="ESP8266"),
        pytest.param("ESP32-http-Update", "esp32", ota_server.DEVICE_RECORD, id="ESP32"),
        pytest.param("curl/8.5.0", "esp32", 16384, id="other"),
    ],
)
def test_records_are_as_small_as_the_client_needs(
    version: ssl.TLSVersion,
    agent: str,
    chip: str,
    limit: int,
    certificate: Path,
    big_folder: Path,
) -> None:
    path = {"esp32": BIG, "esp8266": "/big/esp8266-2.0.0.bin"}[chip]
    context = client_context(certificate)
    context.maximum_version = version
    with (
        standing(site_of(big_folder), certificate) as stand,
        relay(stand.port) as between,
        secure_wire(context, between.port) as wire,
    ):
        answer = wire.ask(path, f"User-Agent: {agent}", "Connection: close")
    assert answer.body == large_image(chip)
    assert max(between.records()) <= limit + OVERHEAD
    assert max(between.records()) >= limit // 2


def test_whole_update_of_a_device_comes_in_records_of_4_kb(
    certificate: Path, big_folder: Path
) -> None:
    with standing(site_of(big_folder), certificate) as stand, relay(stand.port) as between:
        image = esp32_image("big", "1.0.0")
        device = Esp32(
            host="127.0.0.1", port=between.port, path="/big", image=image, tls_ca=certificate
        )
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "2.0.0")
    assert max(between.records()) <= 4096 + OVERHEAD


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("protocol", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("limit", [512, 2048])
def test_max_fragment_length_is_honoured(
    protocol: str, limit: int, certificate: Path, big_folder: Path
) -> None:
    with standing(site_of(big_folder), certificate) as stand, relay(stand.port) as between:
        where = ["-connect", f"127.0.0.1:{between.port}", "-CAfile", str(certificate)]
        options = ["-quiet", "-verify_return_error", "-maxfraglen", str(limit), protocol]
        output = subprocess.run(
            ["openssl", "s_client", *where, *options],
            input=request(BIG, "Connection: close"),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        ).stdout
    assert output.partition(b"\r\n\r\n")[2] == large_image()
    assert max(between.records()) <= limit + OVERHEAD


def resumed(context: ssl.SSLContext, port: int, connections: int) -> Sequence[bool]:
    """For each of some connections in turn, whether it resumed the session of the one before."""
    outcomes, session = [], None
    for _ in range(connections):
        with secure_wire(context, port, session) as wire:
            assert isinstance(wire.link, ssl.SSLSocket)
            answer: Answer = wire.ask("/firmware", "x-ESP8266-version: 1.0.0", "Connection: close")
            assert (answer.status, wire.rest()) == (200, b"")
            outcomes.append(bool(wire.link.session_reused))
            session = wire.link.session
    return outcomes


@pytest.mark.parametrize(
    ("version", "without"),
    [
        pytest.param(ssl.TLSVersion.TLSv1_2, 0, id="tls-1.2-ticket"),
        pytest.param(ssl.TLSVersion.TLSv1_2, ssl.OP_NO_TICKET, id="tls-1.2-session-id"),
        pytest.param(ssl.TLSVersion.TLSv1_3, 0, id="tls-1.3-ticket"),
    ],
)
def test_session_is_resumed(
    version: ssl.TLSVersion, without: int, certificate: Path, folder: Path
) -> None:
    context = client_context(certificate)
    context.maximum_version = version
    context.options |= without  # BearSSL, the library of the ESP8266, knows session IDs only
    with standing(site_of(folder), certificate) as stand:
        assert resumed(context, stand.port, 3) == [False, True, True]


def test_old_tls_is_refused(certificate: Path, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with standing(site_of(folder), certificate) as stand:
        with pytest.raises(ssl.SSLError), secure_wire(context, stand.port):
            pass
        assert stand.is_fine()


def test_client_that_distrusts_the_certificate_leaves_without_harm(
    certificate: Path, folder: Path
) -> None:
    with standing(site_of(folder), certificate) as stand:
        with (
            pytest.raises(ssl.SSLCertVerificationError),
            secure_wire(ssl.create_default_context(), stand.port),
        ):
            pass
        assert stand.is_fine()


def test_server_ends_with_close_notify(certificate: Path, folder: Path) -> None:
    with standing(site_of(folder), certificate) as stand, stand.dial() as wire:
        wire.ask("/firmware", "x-ESP8266-version: 1.0.0", "Connection: close")
        assert isinstance(wire.link, ssl.SSLSocket)
        assert wire.link.recv(1) == b""  # a bare end would raise SSLEOFError
