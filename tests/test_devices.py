"""The emulated devices against what was measured on the real client code.

The server here is a script: it reads one request and sends bytes that somebody wrote down. So these
tests say nothing about our server; they say that the emulators may be believed when they do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.data.make_images import (
    crc8266,
    esp32_image,
    esp8266_image,
    esp8266_signed,
    fatfs_image,
    fatfs_wl_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
    tasmota32_image,
    tasmota_image,
    write_examples,
)
from tests.devices import (
    Bricked,
    Crashed,
    Device,
    Esp32,
    Esp8266,
    check_esp32,
    check_esp8266,
    name_matches,
)

OK, NO_UPDATES, FAILED = "HTTP_UPDATE_OK", "HTTP_UPDATE_NO_UPDATES", "HTTP_UPDATE_FAILED"
OLD, NEW = esp8266_image("blinds", "1.0.0"), esp8266_image("blinds", "1.1.0")
OLD32, NEW32 = esp32_image("sensor", "1.0.0"), esp32_image("sensor", "1.1.0")
HTML = b"<!DOCTYPE html><title>It works</title>"


@dataclass(slots=True)
class Script:
    """A server that answers one request: where it listens, and what it read."""

    port: int
    requests: list[bytes] = field(default_factory=list)


@contextlib.contextmanager
def serve_once(reply: bytes, *, hold: bool = False) -> Iterator[Script]:
    """A server that reads one request, sends these bytes and ends the connection.

    With `hold` it waits until the client has ended the connection: the client sees a stall.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = Script(listener.getsockname()[1])

        def serve() -> None:
            with contextlib.suppress(OSError):  # a client that leaves early, or never comes
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(10)
                    script.requests.append(_read_request(connection))
                    connection.sendall(reply)
                    if not hold:
                        connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield script
        finally:
            listener.settimeout(0)
            with contextlib.suppress(OSError):  # wakes an accept() that nobody came to
                socket.create_connection(("127.0.0.1", script.port), 1).close()
            thread.join(10)


def reply(
    body: bytes = NEW, *fields: str, status: str = "200 OK", length: int | None = None
) -> bytes:
    """A response; its length is that of the body, unless told."""
    lines = [
        f"HTTP/1.1 {status}",
        *fields,
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def esp8266(port: int, image: bytes = OLD, **options: Any) -> Esp8266:
    """An ESP8266 that knows this server, and has little patience."""
    return Esp8266(host="127.0.0.1", port=port, image=image, timeout=0.5, stall=0.5, **options)


def esp32(port: int, image: bytes = OLD32, **options: Any) -> Esp32:
    """An ESP32 that knows this server, and has little patience."""
    return Esp32(host="127.0.0.1", port=port, image=image, timeout=0.5, stall=0.5, **options)


def outcome(
    make: Callable[..., Device], answer: bytes, *, hold: bool = False, **options: Any
) -> tuple[str, int]:
    """What update() gives back for this answer, and the error."""
    with serve_once(answer, hold=hold) as server:
        device = make(server.port, **options)
        return device.update(), device.last_error


def md5(data: bytes) -> str:
    """The value of x-MD5."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def without_length(answer: bytes) -> bytes:
    """The answer without its Content-Length."""
    head, body = answer.split(b"\r\n\r\n", 1)
    return head.partition(b"\r\nContent-Length")[0] + b"\r\n\r\n" + body


def _read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request and (data := connection.recv(4096)):
        request += data
    return request


# -- What they send -------------------------------------------------------------------------------


def test_esp8266_sends_the_captured_request() -> None:
    """Every byte, in the order of the capture."""
    with serve_once(reply(b"", status="304 Not Modified")) as server:
        device = esp8266(server.port, path="/u?p=1", user="me:secret", flash_mode=3)
        flash = OLD[:2] + b"\3" + OLD[3:]
        assert device.update() == NO_UPDATES
    assert server.requests == [device.last_request]
    assert (
        device.last_request
        == (
            f"GET /u?p=1 HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n"
            "User-Agent: ESP8266-http-Update\r\nAuthorization: Basic bWU6c2VjcmV0\r\n"
            "Connection: close\r\nx-ESP8266-Chip-ID: 1193046\r\n"
            "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56\r\nx-ESP8266-AP-MAC: 5E:CF:7F:12:34:56\r\n"
            f"x-ESP8266-free-space: 1794048\r\nx-ESP8266-sketch-size: {len(OLD)}\r\n"
            f"x-ESP8266-sketch-md5: {md5(flash)}\r\nx-ESP8266-chip-size: 4194304\r\n"
            "x-ESP8266-sdk-version: 2.2.2-dev(38a443e)\r\nx-ESP8266-mode: sketch\r\n"
            "x-ESP8266-version: 1.0.0\r\nContent-Length: 0\r\n\r\n"
        ).encode()
    )


def test_esp32_sends_the_captured_request() -> None:
    """Every byte, in the order of the capture; the SHA-256 is the one inside the image."""
    with serve_once(reply(b"", status="304 Not Modified")) as server:
        device = esp32(server.port, user="me:secret")
        assert device.update() == NO_UPDATES
    assert server.requests == [device.last_request]
    assert (
        device.last_request
        == (
            f"GET /update HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n"
            "User-Agent: ESP32-http-Update\r\nConnection: close\r\n"
            "Authorization: Basic bWU6c2VjcmV0\r\nCache-Control: no-cache\r\n"
            "x-ESP32-BASE-MAC: 24:6F:28:AA:BB:CC\r\nx-ESP32-STA-MAC: 24:6F:28:AA:BB:CC\r\n"
            "x-ESP32-AP-MAC: 24:6F:28:AA:BB:CD\r\nx-ESP32-free-space: 1310720\r\n"
            f"x-ESP32-sketch-size: {len(OLD32)}\r\nx-ESP32-sketch-md5: {md5(OLD32)}\r\n"
            f"x-ESP32-sketch-sha256: {OLD32[-32:].hex().upper()}\r\nx-ESP32-chip-size: 4194304\r\n"
            "x-ESP32-sdk-version: v5.3.2-282-gcfea4f7c98-dirty\r\nx-ESP32-mode: sketch\r\n"
            "x-ESP32-version: 1.0.0\r\n\r\n"
        ).encode()
    )


def test_a_sketch_without_version_sends_none() -> None:
    """The header is absent, not empty; so is the port when it is the usual one."""
    request = esp8266(443, esp8266_image("blinds", "")).request()
    assert b"-version: \r\n" not in request
    assert b"x-ESP8266-version" not in request
    assert b"Host: 127.0.0.1\r\n" in request
    assert b"Authorization" not in request


# -- What they accept -----------------------------------------------------------------------------

CHUNKED = f"{len(NEW):x}\r\n".encode() + NEW + b"\r\n0\r\n\r\n"
BARE_LF = b"HTTP/1.0 200\ncontent-length: %d\nx-md5:  %s \nno colon\n\n"
TE_CHUNKED = "Transfer-Encoding: chunked"

COMMON = [
    pytest.param(reply(b"", status="304 Not Modified"), (NO_UPDATES, 0), id="304"),
    pytest.param(reply(HTML, status="304 Not Modified"), (NO_UPDATES, 0), id="304-with-body"),
    pytest.param(reply(HTML, status="403 Forbidden"), (FAILED, -103), id="403"),
    pytest.param(reply(HTML, status="404 Not Found"), (FAILED, -102), id="404"),
    *[
        pytest.param(reply(status=f"{code} ?"), (FAILED, -104), id=str(code))
        for code in (100, 201, 202, 204, 206, 308, 400, 410, 429, 500, 503)
    ],
    pytest.param(reply(b"", "Location: /new", status="302 Found"), (FAILED, -104), id="302"),
    pytest.param(without_length(reply()), (FAILED, -101), id="no-length"),
    pytest.param(reply(length=0), (FAILED, -101), id="length-0"),
    pytest.param(without_length(reply(CHUNKED, TE_CHUNKED)), (FAILED, -101), id="chunked"),
    pytest.param(reply(CHUNKED, TE_CHUNKED), (FAILED, -106), id="chunked-with-length"),
    pytest.param(reply(NEW, "Transfer-Encoding: gzip"), (FAILED, -9), id="other-coding"),
    pytest.param(reply(HTML), (FAILED, -106), id="html"),
    pytest.param(reply(length=2**21), (FAILED, -100), id="too-big"),
    pytest.param(b"", (FAILED, -5), id="closed-at-once"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", (FAILED, -5), id="closed-in-the-head"),
    pytest.param(b"SSH-2.0-server\r\n\r\n", (FAILED, -7), id="not-http"),
]


@pytest.mark.parametrize("device", [esp8266, esp32])
@pytest.mark.parametrize(("answer", "expected"), COMMON)
def test_both_take_an_answer_as_measured(
    device: Callable[..., Device], answer: bytes, expected: tuple[str, int]
) -> None:
    """The table of measured answers, as far as both devices agree."""
    assert outcome(device, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(reply(), (OK, 0), id="plain"),
        pytest.param(reply(gzip_image(NEW)), (OK, 0), id="gzip"),
        pytest.param(reply(gzip_image(NEW), "Content-Encoding: gzip"), (OK, 0), id="gzip-coding"),
        pytest.param(reply(esp8266_signed(NEW)), (OK, 0), id="signed"),
        pytest.param(reply(NEW + b"more", length=len(NEW)), (OK, 0), id="longer-body"),
        pytest.param(BARE_LF % (len(NEW), md5(NEW).encode()) + NEW, (OK, 0), id="bare-lf"),
        pytest.param(reply(NEW, f"X-mD5: {md5(NEW).upper()}"), (OK, 0), id="md5-upper-case"),
        pytest.param(reply(NEW, "x-MD5:"), (OK, 0), id="md5-empty"),
        pytest.param(reply(NEW, f"x-MD5: {md5(OLD)}"), (FAILED, 7), id="md5-wrong"),
        pytest.param(
            reply(gzip_image(NEW), f"x-MD5: {md5(NEW)}"), (FAILED, 7), id="md5-before-gzip"
        ),
        pytest.param(reply(NEW, f'x-MD5: "{md5(NEW)}"'), (FAILED, -105), id="md5-quoted"),
        pytest.param(
            reply(NEW, *[f"x-MD5: {md5(NEW)}"] * 2), (FAILED, -105), id="md5-twice-is-joined"
        ),
        pytest.param(reply(HTML, status="401 Unauthorized"), (FAILED, -108), id="401"),
        pytest.param(reply(NEW[:-1], length=len(NEW)), (FAILED, 6), id="short-body"),
        pytest.param(reply(NEW[:3], length=len(NEW)), (FAILED, -106), id="3-bytes"),
        pytest.param(reply(b"", length=len(NEW)), (FAILED, -106), id="no-body"),
        pytest.param(reply(b"\x1fnot gzip"), (FAILED, 10), id="half-gzip-magic"),
        pytest.param(reply(NEW, "Transfer-Encoding: identity"), (FAILED, -9), id="identity-coding"),
        pytest.param(
            reply(esp8266_image("blinds", "2.0.0", flash_size_code=8)), (FAILED, -107), id="8-mb"
        ),
    ],
)
def test_esp8266_takes_an_answer_as_measured(answer: bytes, expected: tuple[str, int]) -> None:
    """The table of measured answers for ESP8266httpUpdate."""
    assert outcome(esp8266, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(reply(NEW32), (OK, 0), id="plain"),
        pytest.param(reply(NEW32, f"x-MD5: {md5(NEW32).upper()}"), (OK, 0), id="md5-upper-case"),
        pytest.param(
            reply(NEW32, f"x-MD5: {md5(OLD32)}", f"x-md5: {md5(NEW32)}"), (OK, 0), id="last-md5"
        ),
        pytest.param(reply(NEW32, "Transfer-Encoding: identity"), (OK, 0), id="identity-coding"),
        pytest.param(reply(NEW32, f"x-MD5: {md5(OLD32)}"), (FAILED, 7), id="md5-wrong"),
        pytest.param(reply(NEW32, "x-MD5: 1"), (FAILED, -105), id="md5-malformed"),
        pytest.param(reply(HTML, status="401 Unauthorized"), (FAILED, -104), id="401"),
        pytest.param(reply(gzip_image(NEW32)), (FAILED, -106), id="gzip"),
        pytest.param(reply(NEW32[:-1], length=len(NEW32)), (FAILED, 6), id="short-body"),
        pytest.param(reply(NEW), (FAILED, 9), id="image-for-esp8266"),
        pytest.param(
            reply(esp32_image("sensor", "2.0.0", chip_id=9)), (FAILED, 9), id="image-for-s3"
        ),
        pytest.param(reply(NEW32[:400] + b"\0" + NEW32[401:]), (FAILED, 9), id="corrupt"),
        pytest.param(reply(NEW32[:-1] + b"\0"), (FAILED, 9), id="corrupt-digest"),
    ],
)
def test_esp32_takes_an_answer_as_measured(answer: bytes, expected: tuple[str, int]) -> None:
    """The table of measured answers for HTTPUpdate."""
    assert outcome(esp32, answer) == expected


@pytest.mark.parametrize(
    ("device", "answer", "error"),
    [
        pytest.param(esp8266, b"", -11, id="esp8266-no-head"),
        pytest.param(esp8266, reply(NEW[:99], length=len(NEW)), 6, id="esp8266-half-a-body"),
        pytest.param(esp32, b"HTTP/1.1 200 OK\r\n", -11, id="esp32-half-a-head"),
        pytest.param(esp32, reply(b"", length=len(NEW32)), -106, id="esp32-body-after-100-ms"),
        pytest.param(esp32, reply(NEW32[:99], length=len(NEW32)), 6, id="esp32-half-a-body"),
    ],
)
def test_a_device_gives_up_on_a_server_that_stalls(
    device: Callable[..., Device], answer: bytes, error: int
) -> None:
    """The connection stays open, and nothing more comes."""
    assert outcome(device, answer, hold=True) == (FAILED, error)


def test_nobody_listens() -> None:
    """A refused connection is an error of the HTTP client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    device = esp8266(port)
    assert (device.update(), device.last_error) == (FAILED, -1)
    assert device.last_error_string == "connection failed"


# -- What becomes of them -------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [NEW, gzip_image(NEW), esp8266_signed(NEW)])
def test_esp8266_runs_the_new_sketch_after_the_update(sent: bytes) -> None:
    """Its report is that of the new image."""
    with serve_once(reply(sent)) as server:
        device = esp8266(server.port)
        assert device.update() == OK
    assert device.version == "1.1.0"
    assert device.sketch_size == len(NEW)
    assert device.sketch_md5 == md5(NEW)


def test_esp8266_adapts_the_flash_mode_of_an_image() -> None:
    """The MD5 holds for the bytes received, the device reports that of its flash."""
    with serve_once(reply(NEW, f"x-MD5: {md5(NEW)}")) as server:
        device = esp8266(server.port, flash_mode=0)
        assert device.update() == OK
    assert device.sketch_md5 == md5(NEW[:2] + b"\0" + NEW[3:])


def test_esp32_runs_the_new_sketch_after_the_update() -> None:
    """Its report is that of the new image."""
    with serve_once(reply(NEW32 + bytes(512), length=len(NEW32) + 512)) as server:
        device = esp32(server.port)
        assert device.update() == OK
    assert device.version == "1.1.0"
    assert device.sketch_size == len(NEW32)
    assert device.sketch_sha256 == hashlib.sha256(NEW32[:-32]).hexdigest().upper()


@pytest.mark.parametrize(("device", "image", "error"), [(esp8266, NEW, 15), (esp32, NEW32, 0)])
def test_a_malformed_md5_blocks_a_device_until_it_is_rebooted(
    device: Callable[..., Device], image: bytes, error: int
) -> None:
    """The update is left open, so that no other can begin."""
    blocked = device(0)
    outcomes = []
    for answer in (reply(image, "x-MD5: 1"), reply(image)):
        with serve_once(answer) as server:
            blocked.port = server.port
            outcomes.append((blocked.update(), blocked.last_error))
    blocked.reboot()
    with serve_once(reply(image)) as server:
        blocked.port = server.port
        outcomes.append((blocked.update(), blocked.last_error))
    assert outcomes == [(FAILED, -105), (FAILED, error), (OK, 0)]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(NEW32, id="image-for-esp32"),
        pytest.param(NEW[:-16], id="cut-off-file"),
        pytest.param(NEW[:0x1100] + b"\0" + NEW[0x1101:], id="corrupt-sketch"),
        pytest.param(NEW[:0x100] + b"\0" + NEW[0x101:], id="corrupt-loader"),
        pytest.param(gzip_image(NEW32), id="gzip-of-image-for-esp32"),
        pytest.param(esp8266_signed(gzip_image(NEW)), id="signed-gzip"),
        pytest.param(gzip_image(NEW)[:99] + struct.pack("<I", len(NEW)), id="cut-off-gzip"),
        pytest.param(b"\x1f\x8bnot gzip at all", id="no-gzip"),
        pytest.param(gzip_image(esp8266_image("blinds", "2", flash_mode=0)), id="gzip-of-qio"),
    ],
)
def test_an_image_that_kills_an_esp8266_raises(body: bytes) -> None:
    """The device would take it: nothing but the server can prevent that."""
    with serve_once(reply(body, f"x-MD5: {md5(body)}")) as server:
        device = esp8266(server.port)
        with pytest.raises(Bricked):
            device.update()
    assert device.bricked


def test_esp8266_keeps_its_sketch_when_zeros_follow_the_gzip() -> None:
    """It says OK and runs the old one: an endless loop of updates."""
    with serve_once(reply(gzip_image(NEW) + bytes(8))) as server:
        device = esp8266(server.port)
        assert device.update() == OK
    assert device.image == OLD


@pytest.mark.parametrize("body", [b"", b"\xe9"])
def test_esp32_crashes_when_the_body_is_missing(body: bytes) -> None:
    """A length and then the end of the connection: a null pointer in the library."""
    with serve_once(reply(body, length=len(NEW32))) as server, pytest.raises(Crashed):
        esp32(server.port).update()


@pytest.mark.parametrize("device", [esp8266, esp32])
def test_a_file_system_may_begin_with_any_byte(device: Callable[..., Device]) -> None:
    """The sketch stays; nothing looks at the first byte."""
    with serve_once(reply(b"any bytes")) as server:
        updated = device(server.port, mode="spiffs")
        assert updated.update() == OK
    assert b"-mode: spiffs\r\n" in updated.last_request
    assert updated.filesystem == b"any bytes"
    assert updated.version == "1.0.0"


@pytest.mark.parametrize(
    ("answer", "version", "error"),
    [
        pytest.param(reply(b"", "x-version: 1.1.0"), "1.1.0", 0, id="200"),
        pytest.param(reply(b""), "", -104, id="200-without-version"),
        pytest.param(reply(b"", "x-version: 1", status="304 ?"), "", -104, id="304"),
        pytest.param(b"", "", -5, id="closed"),
    ],
)
def test_esp8266_asks_for_the_available_version(answer: bytes, version: str, error: int) -> None:
    """mode=version; only a 200 with x-version will do."""
    with serve_once(answer) as server:
        device = esp8266(server.port)
        assert (device.get_available_version(), device.last_error) == (version, error)
    assert b"x-ESP8266-mode: version\r\n" in device.last_request


# -- Names in certificates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "names", "on_esp8266", "on_esp32"),
    [
        pytest.param("ota.lan", [("DNS", "OTA.lan")], True, True, id="dns"),
        pytest.param("ota.lan", [("DNS", "*.lan")], True, True, id="wildcard"),
        pytest.param("a.ota.lan", [("DNS", "*.lan")], False, False, id="wildcard-is-one-label"),
        pytest.param("10.0.0.1", [("IP Address", "10.0.0.1")], False, True, id="ip"),
        pytest.param("10.0.0.1", [("DNS", "10.0.0.1")], True, True, id="ip-as-dns"),
        pytest.param("cn.lan", [("DNS", "ota.lan")], False, False, id="name-and-other-dns"),
        pytest.param("cn.lan", None, True, True, id="common-name-only"),
    ],
)
def test_names_in_a_certificate_match_as_measured(
    host: str, names: list[tuple[str, str]] | None, on_esp8266: bool, on_esp32: bool
) -> None:
    """BearSSL knows dNSName only; mbedTLS also addresses."""
    certificate: dict[str, Any] = {"subject": ((("commonName", "cn.lan"),),)}
    if names is not None:
        certificate["subjectAltName"] = tuple(names)
    assert name_matches(certificate, host, Esp8266.NAMES) is on_esp8266
    assert name_matches(certificate, host, Esp32.NAMES) is on_esp32


# -- The images -----------------------------------------------------------------------------------


def test_crc_is_the_one_of_the_core() -> None:
    """It is CRC-32/MPEG-2, whose check value is published."""
    assert crc8266(b"123456789") == 0x0376E6E7


@pytest.mark.parametrize("crc", [True, False])
def test_images_start_on_their_devices(crc: bool) -> None:
    """With the words of today's core and without; larger ones too."""
    check_esp8266(esp8266_image("blinds", "1.0.0", crc=crc, payload=bytes(100001), seed=7))
    check_esp32(esp32_image("sensor", "1.0.0", chip_id=13, hash_appended=crc), "esp32c6")


def test_littlefs_begins_with_the_bytes_that_the_real_library_writes() -> None:
    """As littlefs 2 leaves them after formatting and a first commit; 0x7d blocks of 8192 bytes."""
    real = (
        "02000000 f00ffff7 6c697474 6c656673 2fe00010 01000200 00200000 7d000000 ff000000 ffffff7f"
    )
    image = littlefs_image(0x7D, block_size=8192, version=0x00020001)
    assert image[:40] == bytes.fromhex(real)
    assert image[8192 + 8 : 8192 + 40] == image[8:40]
    assert len(image) == 0x7D * 8192


def test_littlefs_ends_its_commit_with_the_crc_of_the_specification() -> None:
    """It is over all before it and starts at all ones; the same sum fits a real superblock."""
    real = "00000000 f00ffff7 6c697474 6c656673 2fe00010 01000200 00100000 10000000"
    real += "ff000000 ffffff7f fe030000 701fffe6 8730d838"  # littlefs 2.1, 16 blocks of 4096 bytes
    for block in (bytes.fromhex(real), littlefs_image(16)[:52], littlefs_image(16)[4096:4148]):
        assert zlib.crc32(block[:48]) ^ 0xFFFFFFFF == int.from_bytes(block[48:], "little")


@pytest.mark.parametrize("size", [4096, 8192])
def test_spiffs_counts_its_blocks_in_every_one_of_them(size: int) -> None:
    """0x20140529 ^ 256 ^ blocks left, 16 bits: spiffs_nucleus.h SPIFFS_MAGIC()."""
    image = spiffs_image(5, block_size=size)
    words = [
        int.from_bytes(image[at + 252 : at + 254], "little") for at in range(0, 5 * size, size)
    ]
    assert words == [0x0429 ^ left for left in (5, 4, 3, 2, 1)]
    assert len(image) == 5 * size


def test_a_fat_says_where_it_begins_and_how_long_it_is() -> None:
    """On a card at 0; on flash behind the dummy sector of the layer for wear levelling."""
    for image, start, sectors in ((fatfs_image(128), 0, 128), (fatfs_wl_image(128), 4096, 124)):
        boot = image[start : start + 512]
        assert boot[510:] == b"\x55\xaa"
        assert struct.unpack_from("<H", boot, 11) == (4096,)
        assert struct.unpack_from("<H", boot, 19) == (sectors,)
        assert len(image) == 128 * 4096
    large = fatfs_image(70000, sector_size=512)
    assert struct.unpack_from("<H11xI", large, 19) == (0, 70000)


def test_two_file_systems_differ_where_they_may() -> None:
    """Another seed is another content; the size and the head stay."""
    for make in (littlefs_image, spiffs_image, fatfs_image, fatfs_wl_image):
        assert make(8, seed=1) != make(8, seed=2)
        assert len(make(8, seed=1)) == len(make(8))


def test_a_mongoose_zip_begins_with_its_manifest() -> None:
    """Not compressed, the folder first: a device reads it while it comes in."""
    for platform, part in (("esp32", "app"), ("esp32c3", "app"), ("esp8266", "fw")):
        with zipfile.ZipFile(io.BytesIO(mongoose_zip("lamp", "1.2.3", platform=platform))) as file:
            assert file.testzip() is None
            assert file.namelist()[0] == "lamp-1.2.3/manifest.json"
            assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
            manifest = json.loads(file.read("lamp-1.2.3/manifest.json"))
            app = file.read(f"lamp-1.2.3/{manifest['parts'][part]['src']}")
        assert [manifest[key] for key in ("name", "platform", "version")] == [
            "lamp",
            platform,
            "1.2.3",
        ]
        assert (
            hashlib.sha1(app, usedforsecurity=False).hexdigest()
            == manifest["parts"][part]["cs_sha1"]
        )


def test_a_tasmota_says_its_variant_behind_its_version() -> None:
    assert b" 14.1.0(minimal)\0" in tasmota_image("14.1.0", "minimal")
    assert b" 14.1.0(safeboot)\0" in tasmota32_image("14.1.0", "safeboot")
    check_esp8266(tasmota_image("14.1.0"))
    check_esp32(tasmota32_image("14.1.0"), "esp32")


def test_examples_are_the_same_on_every_run(tmp_path: Path) -> None:
    """Whoever builds them again gets no difference to commit."""
    first = {path.name: path.read_bytes() for path in write_examples(tmp_path / "a")}
    assert first == {path.name: path.read_bytes() for path in write_examples(tmp_path / "b")}
    assert len(first) == 5
