"""The emulated clients against what was measured on the real code, or read in its source.

The server here is a script again: it answers one request after the other with bytes that somebody
wrote down, so these tests say nothing about our server.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.clients import (
    Answer,
    AutoConnect,
    Esp32Fota,
    EspHome,
    EspIdf,
    MongooseOs,
    Stop,
    Tasmota,
    Tasmota32,
    Url,
    WebTools,
)
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    gzip_image,
    mongoose_zip,
    tasmota32_image,
    tasmota_image,
)
from tests.devices import Esp32Newest, Esp8266, Link

OLD, NEW = esp32_image("sensor", "1.0.0"), esp32_image("sensor", "1.1.0")
LARGE = esp32_image("sensor", "1.1.0", payload=bytes(range(256)) * 40)
SHA256 = hashlib.sha256(NEW).hexdigest()


@dataclass(slots=True)
class Script:
    """A server with an answer for each request: where it listens, and what it read."""

    port: int
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def first_lines(self) -> list[str]:
        """What was asked, each with its Range."""
        lines = []
        for request in self.requests:
            span = re.search(rb"\r\nRange: (\S+)", request)
            lines.append(
                request.partition(b" HTTP/")[0].decode() + (f" {span[1].decode()}" if span else "")
            )
        return lines


@contextlib.contextmanager
def serve(*answers: bytes, keep: bool = False) -> Iterator[Script]:
    """A server that sends these answers in turn.

    It ends the connection after each, or with `keep` when the client does; after the last in any
    case.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script, left = Script(listener.getsockname()[1]), list(answers)

        def converse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                script.connections += 1
                while left and (request := _read_request(connection)):
                    script.requests.append(request)
                    connection.sendall(_filled(left.pop(0), script))
                    if not keep:
                        break
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        def run() -> None:
            while left:
                with contextlib.suppress(OSError):  # a client that leaves early
                    converse()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield script
        finally:
            left.clear()
            with contextlib.suppress(OSError):  # wakes an accept() that nobody came to
                socket.create_connection(("127.0.0.1", script.port), 1).close()
            thread.join(10)


def _filled(answer: bytes, script: Script) -> bytes:
    """The answer with the server's address; its Content-Length is that of the filled body."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if b"{server}" not in answer and b"{port}" not in body:
        return answer
    head, body = (
        part.replace(b"{server}", script.url.encode()).replace(b"{port}", b"%d" % script.port)
        for part in (head, body)
    )
    return re.sub(rb"(?<=Content-Length: )\d+", b"%d" % len(body), head) + end + body


def _read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request and (data := connection.recv(4096)):
        request += data
    return request


def reply(
    body: bytes = b"", *fields: str, status: str = "200 OK", length: int | None = None
) -> bytes:
    """A response; its length is that of the body, unless told; -1 leaves it out."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", *fields, *([f"Content-Length: {size}"] if size >= 0 else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def as_json(value: object) -> bytes:
    """A response with this document."""
    return reply(json.dumps(value).encode(), "Content-Type: application/json")


def head(size: int) -> bytes:
    """The answer to a HEAD for an image of this size."""
    return reply(b"", length=size)


def piece(image: bytes, start: int, stop: int, *fields: str) -> bytes:
    """A 206 with these bytes of the image."""
    span = f"Content-Range: bytes {start}-{stop - 1}/{len(image)}"
    return reply(image[start:stop], span, *fields, status="206 Partial Content")


def idf(url: str, **options: Any) -> EspIdf:
    """An ESP32 with ESP-IDF, and little patience."""
    return EspIdf(url=url, image=OLD, timeout=0.5, **options)


# -- ESP-IDF --------------------------------------------------------------------------------------

CHUNKED = f"{len(NEW):x}\r\n".encode() + NEW + b"\r\n0\r\n\r\n"
TE = "Transfer-Encoding: chunked"


def test_esp_idf_sends_the_captured_request() -> None:
    with serve(reply(status="304 Not Modified")) as server:
        device = idf(f"{server.url}/ok?version=1.0.0", headers={"x-my": "1"})
        assert device.update() == "ESP_ERR_HTTP_NOT_MODIFIED"
    assert server.requests == [
        (
            "GET /ok?version=1.0.0 HTTP/1.1\r\nUser-Agent: ESP32 HTTP Client/1.0\r\n"
            f"Host: 127.0.0.1:{server.port}\r\nx-my: 1\r\n\r\n"
        ).encode()
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(reply(NEW), "ESP_OK", id="plain"),
        pytest.param(reply(CHUNKED, TE, length=-1), "ESP_OK", id="chunked"),
        pytest.param(reply(NEW, length=-1), "ESP_OK", id="until-the-end"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + reply(NEW), "ESP_OK", id="100"),
        pytest.param(reply(NEW, "x-MD5: 1"), "ESP_OK", id="md5-is-ignored"),
        pytest.param(reply(NEW, "Connection: close"), "ESP_OK", id="close"),
        pytest.param(reply(CHUNKED, TE), "ESP_FAIL", id="chunked-with-length"),
        pytest.param(reply(NEW, length=len(NEW) + 1), "ESP_FAIL", id="short"),
        pytest.param(reply(NEW + b"more", length=len(NEW)), "ESP_FAIL", id="long"),
        pytest.param(reply(NEW[:1000]), "ESP_FAIL", id="below-1024"),
        pytest.param(reply(gzip_image(LARGE)), "ESP_ERR_INVALID_VERSION", id="gzip"),
        pytest.param(
            reply(esp32_image("sensor", "2.0.0", chip_id=9)), "ESP_ERR_INVALID_VERSION", id="s3"
        ),
        pytest.param(
            reply(esp8266_image("blinds", "2.0.0")), "ESP_ERR_INVALID_VERSION", id="esp8266"
        ),
        pytest.param(
            reply(NEW[:1200] + b"\0" + NEW[1201:]), "ESP_ERR_OTA_VALIDATE_FAILED", id="corrupt"
        ),
        pytest.param(reply(OLD), "same version", id="same-version"),
        pytest.param(
            reply(esp32_image("sensor", "2.0.0", payload=bytes(2**20))),
            "ESP_ERR_INVALID_SIZE",
            id="too-big",
        ),
        pytest.param(b"", "ESP_FAIL", id="closed-at-once"),
        pytest.param(reply(b"no", status="401 Unauthorized"), "ESP_FAIL", id="401"),
        pytest.param(reply(status="416 ?"), "ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE", id="416"),
        *[
            pytest.param(reply(NEW, status=f"{code} ?"), "ESP_FAIL", id=str(code))
            for code in (400, 403, 404, 410, 429, 500, 503)
        ],
    ],
)
def test_esp_idf_takes_an_answer_as_measured(answer: bytes, expected: str) -> None:
    with serve(answer) as server:
        device = idf(server.url, partition=2**20)
        assert device.update() == expected
    assert device.version == ("1.1.0" if expected == "ESP_OK" else "1.0.0")


def test_esp_idf_sees_another_chip_after_one_kilobyte() -> None:
    with serve(reply(esp32_image("sensor", "2.0.0", chip_id=9))) as server:
        device = idf(server.url)
        device.update()
    assert device.received == 1024


def test_esp_idf_cannot_send_a_line_of_more_than_512_bytes() -> None:
    fits = "/" + "x" * (512 - len("GET / HTTP/1.1\r\n"))
    with serve(reply(NEW)) as server:
        assert idf(server.url + fits).update() == "ESP_OK"
        device = idf(server.url + fits + "x")
        assert (device.update(), device.reason) == ("ESP_FAIL", "Out of buffer")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("asks", "keep", "expected"),
    [
        pytest.param("WWW-Authenticate: Basic realm=x", True, "ESP_OK", id="basic"),
        pytest.param("WWW-Authenticate: Basic realm=x", False, "ESP_FAIL", id="closed-after-401"),
        pytest.param("X-None: 1", True, "ESP_FAIL", id="no-question"),
    ],
)
def test_esp_idf_answers_a_401_on_the_same_connection(asks: str, keep: bool, expected: str) -> None:
    denied = reply(b"who?", asks, status="401 Unauthorized")
    with serve(denied, reply(NEW), keep=keep) as server:
        assert idf(server.url, user="me:secret").update() == expected
    if expected == "ESP_OK":
        assert b"Authorization: Basic bWU6c2VjcmV0" in server.requests[1]
        assert server.connections == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_esp_idf_follows_a_redirect(code: int) -> None:
    moved = reply(b"there", "Location: {server}/new", status=f"{code} Moved")
    with serve(moved, reply(NEW), keep=True) as server:
        assert idf(server.url).update() == "ESP_OK"
    assert server.first_lines == ["GET /", "GET /new"]


def test_esp_idf_follows_a_loop_for_ever() -> None:
    moved = reply(b"", "Location: {server}/", status="302 Found")
    with serve(*[moved] * 30, keep=True) as server:
        device = idf(server.url)
        assert (device.update(), device.reason) == ("ESP_FAIL", "redirected without end")


@pytest.mark.parametrize("location", ["http://127.0.0.1/x", "/x"])
def test_esp_idf_stays_with_https(location: str) -> None:
    with socket.socket() as unused:
        answer = Answer(Link(unused), 302, {"location": location})
        with pytest.raises(Stop):
            idf("https://127.0.0.1/")._follow(Url.parse("https://127.0.0.1/"), answer)


def test_esp_idf_takes_an_image_in_pieces_on_one_connection() -> None:
    pieces = [piece(LARGE, at, min(at + 4096, len(LARGE))) for at in range(0, len(LARGE), 4096)]
    with serve(head(len(LARGE)), *pieces, keep=True) as server:
        assert idf(server.url, partial=True, piece=4096).update() == "ESP_OK"
    assert server.first_lines == [
        "HEAD /",
        "GET / bytes=0-4095",
        "GET / bytes=4096-8191",
        "GET / bytes=8192-",
    ]
    assert server.connections == 2  # it hangs up after HEAD


@pytest.mark.parametrize(("announced", "expected"), [(True, "ESP_OK"), (False, "ESP_FAIL")])
def test_a_server_that_closes_between_pieces_must_say_so(announced: bool, expected: str) -> None:
    fields = ["Connection: close"] * announced
    pieces = [piece(LARGE, 0, 8192, *fields), piece(LARGE, 8192, len(LARGE), *fields)]
    with serve(head(len(LARGE)), *pieces) as server:
        assert idf(server.url, partial=True, piece=8192).update() == expected


def test_esp_idf_needs_no_range_for_what_fits_in_one_piece() -> None:
    with serve(head(len(NEW)), reply(NEW)) as server:
        assert idf(server.url, partial=True).update() == "ESP_OK"
    assert server.first_lines == ["HEAD /", "GET /"]


def test_esp_idf_asks_for_one_byte_where_head_is_refused() -> None:
    answers = [reply(status="405 ?"), piece(NEW, 0, 1), reply(NEW)]
    with serve(*answers, keep=True) as server:
        assert idf(server.url, partial=True).update() == "ESP_OK"
    assert server.first_lines == ["HEAD /", "GET / bytes=0-0", "GET /"]


def test_esp_idf_in_pieces_does_not_understand_304() -> None:
    answers = [reply(status="304 Not Modified")] * 2
    with serve(*answers, keep=True) as server:
        assert idf(server.url, partial=True).update() == "ESP_FAIL"


@pytest.mark.parametrize(
    ("answers", "lines"),
    [
        pytest.param([piece(LARGE, 2048, len(LARGE))], ["GET / bytes=2048-"], id="206"),
        pytest.param([reply(LARGE), reply(LARGE)], ["GET / bytes=2048-", "GET /"], id="200"),
        pytest.param(
            [reply(status="416 ?"), reply(LARGE)], ["GET / bytes=2048-", "GET /"], id="416"
        ),
    ],
)
def test_esp_idf_goes_on_where_it_stopped(answers: list[bytes], lines: list[str]) -> None:
    with serve(*answers) as server:
        device = idf(server.url, resume=True, written=LARGE[:2048], if_range='"1"')
        assert device.update() == "ESP_OK"
    assert server.first_lines == lines
    assert b'\r\nIf-Range: "1"\r\n' in server.requests[0]
    assert device.image == LARGE


def test_esp_idf_that_may_resume_asks_for_a_range_at_once() -> None:
    with serve(piece(NEW, 0, len(NEW))) as server:
        assert idf(server.url, resume=True).update() == "ESP_OK"
    assert server.first_lines == ["GET / bytes=0-"]


# -- The newest arduino-esp32 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(reply(NEW, f"x-SHA256: {SHA256}"), ("HTTP_UPDATE_OK", 0), id="right"),
        pytest.param(reply(NEW, f"x-sha256: {SHA256.upper()}"), ("HTTP_UPDATE_OK", 0), id="upper"),
        pytest.param(reply(NEW, "x-SHA256: 1"), ("HTTP_UPDATE_FAILED", -109), id="malformed"),
        pytest.param(reply(NEW, f"x-SHA256: {'0' * 64}"), ("HTTP_UPDATE_FAILED", -109), id="wrong"),
        pytest.param(reply(status="204 None"), ("HTTP_UPDATE_NO_UPDATES", 0), id="204"),
        pytest.param(reply(status="304 None"), ("HTTP_UPDATE_NO_UPDATES", 0), id="304"),
    ],
)
def test_the_newest_esp32_takes_an_answer_as_measured(
    answer: bytes, expected: tuple[str, int]
) -> None:
    with serve(answer) as server:
        device = Esp32Newest(host="127.0.0.1", port=server.port, image=OLD, timeout=0.5, stall=0.5)
        assert (device.update(), device.last_error) == expected


def test_the_newest_esp32_is_not_stuck_after_a_malformed_digest() -> None:
    with serve(reply(NEW, "x-MD5: 1"), reply(NEW)) as server:
        device = Esp32Newest(host="127.0.0.1", port=server.port, image=OLD, timeout=0.5, stall=0.5)
        assert (device.update(), device.last_error) == ("HTTP_UPDATE_FAILED", -105)
        assert device.update() == "HTTP_UPDATE_OK"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"{SHA256}  sensor-1.1.0.bin\n".encode(), "HTTP_UPDATE_OK", id="sha256sum"),
        pytest.param(f"SHA256 (x) = {SHA256}".encode(), "HTTP_UPDATE_OK", id="bsd"),
        pytest.param(b" " * 500 + SHA256.encode(), "HTTP_UPDATE_FAILED", id="behind-512-bytes"),
        pytest.param(SHA256.encode() + b"0", "HTTP_UPDATE_FAILED", id="65-digits"),
    ],
)
def test_the_newest_esp32_reads_a_digest_from_a_file_of_its_own(text: bytes, expected: str) -> None:
    with serve(reply(text), reply(NEW)) as server:
        device = Esp32Newest(host="127.0.0.1", port=server.port, image=OLD, timeout=0.5, stall=0.5)
        device.sha256_path = "/x.sha256"
        assert device.update() == expected
    assert server.requests[0].startswith(b"GET /x.sha256 HTTP/1.0\r\n")
    assert b"x-ESP32" not in server.requests[0]


@pytest.mark.parametrize(
    ("mode", "partitions", "error"),
    [
        ("littlefs", ("littlefs",), 0),
        ("flashfs", ("fatfs",), 0),
        ("spiffs", ("littlefs",), -108),
        ("fatfs", (), -108),
    ],
)
def test_the_newest_esp32_writes_the_partition_it_has(
    mode: str, partitions: tuple[str, ...], error: int
) -> None:
    with serve(reply(b"files")) as server:
        device = Esp32Newest(host="127.0.0.1", port=server.port, image=OLD, mode=mode)
        device.partitions = partitions
        device.update()
    assert f"x-ESP32-mode: {mode}\r\n".encode() in server.requests[0]
    assert (device.last_error, device.filesystem) == (error, b"" if error else b"files")


# -- esp32FOTA ------------------------------------------------------------------------------------


def fota(url: str, **options: Any) -> Esp32Fota:
    """An ESP32 with esp32FOTA for the type "sensor"."""
    return Esp32Fota(url=url, name="sensor", image=OLD, timeout=0.5, **options)


@pytest.mark.parametrize(
    ("manifest", "newer"),
    [
        pytest.param({"type": "sensor", "version": "1.1.0", "url": "u"}, True, id="newer"),
        pytest.param({"type": "sensor", "version": "1.10.0", "url": "u"}, True, id="10-above-9"),
        pytest.param({"type": "sensor", "version": 2, "url": "u"}, True, id="number"),
        pytest.param({"type": "sensor", "version": 1, "url": "u"}, False, id="same-number"),
        pytest.param({"type": "sensor", "version": "1.0.0", "url": "u"}, False, id="same"),
        pytest.param({"type": "sensor", "version": "0.9.0", "url": "u"}, False, id="older"),
        pytest.param({"type": "lamp", "version": "1.1.0", "url": "u"}, False, id="other-type"),
        pytest.param({"type": "Sensor", "version": "1.1.0", "url": "u"}, False, id="other-case"),
        pytest.param({"type": "sensor", "version": "1.1.0"}, False, id="nothing-to-fetch"),
        pytest.param(
            [{"type": "lamp"}, {"type": "sensor", "version": "1.1.0", "url": "u"}], True, id="array"
        ),
        pytest.param({"type": "sensor", "version": "2.0.0", "url": "u" * 2048}, False, id="2-kb"),
    ],
)
def test_esp32fota_takes_a_newer_entry_of_its_type(manifest: object, newer: bool) -> None:
    with serve(as_json(manifest)) as server:
        assert fota(f"{server.url}/fota.json").exec_http_check() is newer


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"{}", status="404 Not Found"),
        reply(b"{}", status="304 Not Modified"),
        reply(b"2\r\n{}\r\n0\r\n\r\n", TE, length=-1),
        reply(b"<html>"),
        reply(b"", status="302 Found"),
    ],
)
def test_esp32fota_refuses_any_other_answer(answer: bytes) -> None:
    with serve(answer) as server:
        device = fota(f"{server.url}/fota.json")
        assert not device.exec_http_check()
    assert device.reason


def test_esp32fota_installs_by_url() -> None:
    manifest = {"type": "sensor", "version": "1.1.0", "url": "{server}/new.bin", "littlefs": "/fs"}
    with serve(as_json(manifest), reply(NEW)) as server:
        device = fota(f"{server.url}/fota.json?x=1", device_id="77")
        assert device.exec_http_check()
        assert device.exec_ota()
    assert device.version == "1.1.0"
    assert server.first_lines == ["GET /fota.json?x=1&id=77", "GET /new.bin"]
    assert device.filesystem == b""  # beside a URL nothing else counts


@pytest.mark.parametrize("key", ["littlefs", "spiffs", "fatfs"])
def test_esp32fota_installs_a_file_system_by_host_port_and_path(key: str) -> None:
    where = {"host": "127.0.0.1", "port": 65535, "bin": "/new.bin", key: "/fs.bin"}
    answer = as_json({"type": "sensor", "version": "1.1.0", **where})
    with serve(answer.replace(b"65535", b"{port}"), reply(b"files"), reply(NEW)) as server:
        device = fota(server.url)
        assert device.exec_http_check()
        assert device.exec_ota()
    assert device.filesystem == b"files"
    assert server.first_lines[1:] == ["GET /fs.bin", "GET /new.bin"]


def test_esp32fota_does_not_overwrite_its_certificates() -> None:
    device = fota("http://127.0.0.1/", keeps_files=True)
    device.filesystem_url = "http://127.0.0.1/fs.bin"
    assert not device.exec_ota()
    assert device.reason.startswith("Cowardly")


@pytest.mark.parametrize(
    "answer",
    [reply(NEW, length=-1), reply(NEW, status="404 ?"), reply(NEW[:-1]), reply(gzip_image(NEW))],
)
def test_esp32fota_keeps_its_sketch_when_the_download_fails(answer: bytes) -> None:
    with serve(answer) as server:
        device = fota(server.url)
        device.firmware_url = f"{server.url}/new.bin"
        assert not device.exec_ota()
    assert device.version == "1.0.0"


# -- ESPHome and ESP Web Tools --------------------------------------------------------------------

MD5 = hashlib.md5(NEW, usedforsecurity=False).hexdigest()


def manifest(path: str, version: str = "1.1.0", md5: str = MD5) -> dict[str, Any]:
    """A manifest with one build that ESPHome and ESP Web Tools both understand."""
    ota = {"path": path, "md5": md5, "summary": "Faster", "release_url": "http://x/notes"}
    build = {"chipFamily": "ESP32", "ota": ota, "parts": [{"path": path, "offset": 0x10000}]}
    return {"name": "sensor", "version": version, "builds": [{"chipFamily": "ESP32-C3"}, build]}


def home(url: str, **options: Any) -> EspHome:
    """An ESP32 with ESPHome."""
    return EspHome(url=url, image=OLD, **options)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("{server}/fw/new.bin", "/fw/new.bin"),
        ("/fw/new.bin", "/fw/new.bin"),
        ("new.bin", "/sensor/new.bin"),
        ("v1/new.bin", "/sensor/v1/new.bin"),
    ],
)
def test_esphome_installs_what_the_manifest_names(path: str, asked: str) -> None:
    with serve(as_json(manifest(path)), reply(NEW)) as server:
        device = home(f"{server.url}/sensor/manifest.json", user="me:secret")
        assert device.check() == "UPDATE_STATE_AVAILABLE"
        assert device.perform() == "OTA_RESPONSE_OK"
    assert server.first_lines == ["GET /sensor/manifest.json", f"GET {asked}"]
    assert (device.version, device.summary, device.title) == ("1.1.0", "Faster", "sensor")
    for request in server.requests:
        assert b"\r\nUser-Agent: ESPHome/2026.6.5 (https://esphome.io)\r\n" in request
        assert b"\r\nAuthorization: Basic " + base64.b64encode(b"me:secret") in request


def test_esphome_takes_a_path_with_http_in_it_for_a_url() -> None:
    with serve(as_json(manifest("/my-http-lamp.bin"))) as server:
        device = home(f"{server.url}/manifest.json")
        device.check()
    assert device.firmware_url == "/my-http-lamp.bin"
    assert device.perform() == "bad URL"


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("1.1.0", "UPDATE_STATE_AVAILABLE"),
        ("0.9.0", "UPDATE_STATE_AVAILABLE"),
        ("1.0", "UPDATE_STATE_AVAILABLE"),
        ("1.0.0", "UPDATE_STATE_NO_UPDATE"),
        ("", "UPDATE_STATE_NO_UPDATE"),
    ],
)
def test_esphome_updates_whenever_the_versions_differ(version: str, state: str) -> None:
    with serve(as_json(manifest("/x", version))) as server:
        assert home(f"{server.url}/manifest.json").check() == state


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"{}", status="304 Not Modified"),
        reply(b"{}", status="404 Not Found"),
        reply(b"not json"),
        as_json({"name": "sensor", "version": "1.1.0", "builds": [{"chipFamily": "ESP8266"}]}),
        as_json({"name": "sensor", "builds": []}),
    ],
)
def test_esphome_does_not_understand_another_manifest(answer: bytes) -> None:
    with serve(answer) as server:
        assert not home(f"{server.url}/manifest.json").check().startswith("UPDATE_STATE")


@pytest.mark.parametrize(
    ("digest", "answer", "expected"),
    [
        pytest.param(reply(f"{MD5}  x.bin\n".encode()), reply(NEW), "OTA_RESPONSE_OK", id="md5sum"),
        pytest.param(
            reply(MD5.upper().encode()), reply(NEW), "OTA_RESPONSE_ERROR_MD5_MISMATCH", id="upper"
        ),
        pytest.param(reply(MD5[:31].encode()), reply(NEW), "OTA_MD5_INVALID", id="31-bytes"),
        pytest.param(reply(b"no", status="404 ?"), reply(NEW), "OTA_CONNECTION_ERROR", id="404"),
        pytest.param(reply(MD5.encode()), reply(NEW, length=-1), "no length", id="no-length"),
        pytest.param(
            reply(MD5.encode()), reply(NEW, status="206 ?"), "OTA_CONNECTION_ERROR", id="206"
        ),
    ],
)
def test_esphome_wants_an_md5_for_an_image(digest: bytes, answer: bytes, expected: str) -> None:
    with serve(digest, answer) as server:
        device = home(server.url, md5_url=f"{server.url}/x.md5")
        assert device.flash(f"{server.url}/x") == expected


def test_esphome_without_an_md5_does_not_ask() -> None:
    assert home("http://127.0.0.1/").flash("http://127.0.0.1/x") == "OTA_MD5_INVALID"


@pytest.mark.parametrize(
    ("hops", "expected"), [(3, "OTA_RESPONSE_OK"), (4, "OTA_CONNECTION_ERROR")]
)
def test_esphome_follows_three_redirects(hops: int, expected: str) -> None:
    moved = reply(b"", "Location: {server}/there", status="302 Found")
    with serve(*[moved] * hops, reply(NEW)) as server:
        assert home(server.url, md5=MD5).flash(f"{server.url}/x") == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["Access-Control-Allow-Origin: *"], "sensor 1.1.0"),
        (["Access-Control-Allow-Origin: https://installer.example"], "sensor 1.1.0"),
        (["Access-Control-Allow-Origin: https://other.example"], "Failed to fetch"),
        ([], "Failed to fetch"),
    ],
)
def test_a_browser_reads_only_what_it_is_allowed_to(fields: list[str], expected: str) -> None:
    text = json.dumps(manifest("fw/new.bin")).encode()
    with serve(reply(text, *fields), reply(NEW, *fields)) as server:
        browser = WebTools(url=f"{server.url}/sensor/manifest.json")
        assert browser.install() == expected
    if browser.flash:
        assert browser.flash == {0x10000: NEW}
        assert server.first_lines[1] == "GET /sensor/fw/new.bin"


# -- AutoConnect ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("uri", "asked"), [(".", "./x.bin"), ("", "/x.bin"), ("/fw", "/fw/x.bin")])
def test_autoconnect_asks_for_the_list_and_then_for_a_name(uri: str, asked: str) -> None:
    entries = [{"name": "x.bin", "type": "bin"}, {"name": "notes", "type": "file"}]
    new = esp8266_image("blinds", "1.1.0")
    with serve(as_json(entries), reply(new)) as server:
        sketch = Esp8266(host="127.0.0.1", port=server.port, image=esp8266_image("blinds", "1.0.0"))
        device = AutoConnect(url=server.url, uri=uri, device=sketch)
        assert device.catalog() == ["x.bin"]
        assert device.update("x.bin") == "HTTP_UPDATE_OK"
    assert server.first_lines == [f"GET /_catalog?op=list&path={uri}", f"GET {asked}"]
    assert b"x-ESP8266-version" not in server.requests[1]
    assert device.version == "1.1.0"


@pytest.mark.parametrize(
    "answer",
    [reply(b"[]", status="403 ?"), as_json([{"name": "x" * 256, "type": "bin"}]), reply(b"<html>")],
)
def test_autoconnect_cannot_read_another_list(answer: bytes) -> None:
    with serve(answer) as server:
        sketch = Esp8266(host="127.0.0.1", port=server.port, image=esp8266_image("blinds", "1.0.0"))
        with pytest.raises(Stop):
            AutoConnect(url=server.url, device=sketch).catalog()


# -- Mongoose OS ----------------------------------------------------------------------------------


def mongoose(url: str, **options: Any) -> MongooseOs:
    """A lamp that runs 1.0.0."""
    return MongooseOs(url=url, app="lamp", archive=mongoose_zip("lamp", "1.0.0"), **options)


def test_mongoose_os_says_who_it_is() -> None:
    with serve(reply(status="304 Not Modified")) as server:
        assert mongoose(f"{server.url}/lamp", device_id="esp32_1").update() == "Not Modified"
    assert server.requests == [
        (
            f"GET /lamp HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 0\r\n"
            "User-Agent: lamp/1.0.0 (MongooseOS/2.20.0; esp32)\r\n"
            "X-MGOS-Device-ID: esp32_1 24:6F:28:AA:BB:CC\r\n"
            "X-MGOS-FW-Version: esp32 1.0.0 20260101-120000\r\n\r\n"
        ).encode()
    ]


ZIP = mongoose_zip("lamp", "1.1.0")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(reply(ZIP), "Update applied, finalizing", id="zip"),
        pytest.param(
            reply(mongoose_zip("lamp", "1.1.0", platform="esp32c3")),
            "Failed to finalize app write",  # the name is compared as far as its own reaches
            id="esp32c3",
        ),
        pytest.param(
            reply(mongoose_zip("lamp", "1.1.0", platform="esp8266")), "Wrong platform", id="esp8266"
        ),
        pytest.param(
            reply(mongoose_zip("lamp", "1.0.0")), "Version is the same as current", id="same"
        ),
        pytest.param(
            reply(mongoose_zip("lamp", "1.1.0", compression=zipfile.ZIP_DEFLATED)),
            "Cannot handle compressed .zip",
            id="deflated",
        ),
        pytest.param(reply(ZIP[:200] + b"\0" + ZIP[201:]), "Invalid CRC", id="corrupt"),
        pytest.param(reply(NEW), "Malformed archive (invalid file header)", id="no-zip"),
        pytest.param(reply(ZIP, length=-1), "Invalid HTTP response code", id="no-length"),
        pytest.param(reply(ZIP, status="404 ?"), "Invalid HTTP response code", id="404"),
        pytest.param(reply(ZIP, length=len(ZIP) + 1), "connection lost", id="short"),
    ],
)
def test_mongoose_os_takes_an_answer_as_in_its_source(answer: bytes, expected: str) -> None:
    with serve(answer) as server:
        device = mongoose(f"{server.url}/lamp")
        assert device.update() == expected
    assert (device.version == "1.1.0") is expected.startswith("Update applied")


def test_mongoose_os_on_an_esp8266_wants_other_parts() -> None:
    new = mongoose_zip("lamp", "1.1.0", platform="esp8266")
    with serve(reply(new)) as server:
        device = mongoose(f"{server.url}/lamp", arch="esp8266")
        assert device.update() == "Update applied, finalizing"
    assert set(device.parts) == {"fw", "fs"}


# -- Tasmota --------------------------------------------------------------------------------------


def tasmota(url: str, version: str = "14.1.0", variant: str = "tasmota", **options: Any) -> Tasmota:
    """A small switch with little flash."""
    image = tasmota_image(version, variant)
    return Tasmota(ota_url=url, image=image, timeout=0.5, stall=0.5, **options)


def test_a_tasmota_tries_four_times_the_last_time_for_gzip() -> None:
    denied = [reply(b"", status="404 Not Found")] * 4
    with serve(*denied) as server:
        device = tasmota(f"{server.url}/api/tasmota.bin")
        assert device.upgrade() == "Failed File not found (404)"
    assert server.first_lines == [*["GET /api/tasmota.bin"] * 3, "GET /api/tasmota.bin.gz"]
    assert b"x-ESP8266-version: 14.1.0(tasmota)\r\n" in server.requests[0]
    assert device.restarts == 0


def test_a_tasmota_restarts_after_304() -> None:
    with serve(reply(status="304 Not Modified")) as server:
        device = tasmota(f"{server.url}/tasmota.bin.gz")
        assert device.upgrade() == "Successful. Restarting"
    assert device.restarts == 1


def test_a_tasmota_without_room_goes_by_way_of_the_minimal_image() -> None:
    small, new = tasmota_image("14.2.0", "minimal"), tasmota_image("14.2.0", payload=bytes(30000))
    with serve(reply(new), reply(small), reply(new)) as server:
        device = tasmota(f"{server.url}/tasmota.bin")
        device.image = tasmota_image("14.1.0", payload=bytes(30000))
        device.room = 64 * 1024
        assert device.upgrade() == "Successful. Restarting"
    assert server.first_lines == [
        "GET /tasmota.bin",
        "GET /tasmota-minimal.bin",
        "GET /tasmota.bin",
    ]
    assert b"x-ESP8266-version: 14.2.0(minimal)\r\n" in server.requests[2]
    assert (device.version, device.restarts) == ("14.2.0(tasmota)", 2)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("/api/tasmota", "/api/tasmota-minimal"),
        ("/api/tasmota.bin.gz", "/api/tasmota-minimal.bin.gz"),
        ("/ard-uino/tasmota-DE.bin.gz", "/ard-uino/tasmota-minimal.bin.gz"),
        ("/tasmota.bin.gz?token=abc", "/tasmota-minimal.bin.gz?token=abc"),
        ("/tasmota.bin?token=a-c", "/tasmota.bin?token=a-minimal.bin?token=a-c"),
        ("/tasmota/latest.bin.gz", "/tasmota/latest-minimal.bin.gz"),
    ],
)
def test_a_tasmota_makes_the_name_of_the_minimal_image(name: str, small: str) -> None:
    big = reply(tasmota_image("14.2.0"), length=2**21)
    with serve(big, reply(b"", status="404 ?")) as server:
        tasmota(server.url + name).upgrade()
    assert server.first_lines[:2] == [f"GET {name}", f"GET {small}"]


def test_a_tasmota_puts_its_number_into_the_url() -> None:
    with serve(reply(status="304 ?"), reply(status="304 ?")) as server:
        tasmota(f"{server.url}/%d/tasmota.bin", mac="5C:CF:7F:12:34:56").upgrade()
        tasmota(f"{server.url}/%04d/tasmota.bin", mac="5C:CF:7F:00:00:07").upgrade()
    assert server.first_lines == ["GET /1193046/tasmota.bin", "GET /0007/tasmota.bin"]


def test_a_tasmota_cuts_a_url_of_200_characters() -> None:
    with serve(reply(status="304 ?")) as server:
        device = tasmota(f"{server.url}/{'x' * 200}")
        device.upgrade()
    assert len(device.asked[0]) == 199


def test_a_tasmota_logs_in_by_its_url() -> None:
    with serve(reply(status="304 ?")) as server:
        tasmota(f"http://x:T1@127.0.0.1:{server.port}/tasmota.bin.gz").upgrade()
    assert b"\r\nAuthorization: Basic eDpUMQ==\r\n" in server.requests[0]


def test_a_tasmota_on_an_esp32_lets_safeboot_ask() -> None:
    new = tasmota32_image("14.2.0")
    with serve(reply(new)) as server:
        device = Tasmota32(
            ota_url=f"{server.url}/tasmota32.bin",
            image=tasmota32_image("14.1.0"),
            safeboot=tasmota32_image("14.0.0", "safeboot"),
        )
        assert device.upgrade() == "Successful. Restarting"
    assert b"x-ESP32-version: 14.0.0(safeboot)\r\n" in server.requests[0]
    assert b"BASE-MAC" not in server.requests[0]
    assert (device.version, device.restarts) == ("14.2.0(tasmota32)", 2)


def test_a_tasmota_on_an_esp32_updates_its_safeboot() -> None:
    with serve(reply(tasmota32_image("14.2.0", "safeboot"))) as server:
        device = Tasmota32(
            ota_url=f"{server.url}/tasmota32.bin",
            image=tasmota32_image("14.1.0"),
            safeboot=tasmota32_image("14.0.0", "safeboot"),
        )
        assert device.upgrade_safeboot() == "HTTP_UPDATE_OK"
    assert server.first_lines == ["GET /tasmota32-safeboot.bin"]
    assert device.version == "14.1.0(tasmota32)"


def test_a_tasmota_on_an_esp32_stays_in_safeboot_when_nothing_comes() -> None:
    with serve(*[reply(b"", status="404 ?")] * 4) as server:
        device = Tasmota32(
            ota_url=f"{server.url}/tasmota32.bin",
            image=tasmota32_image("14.1.0"),
            safeboot=tasmota32_image("14.0.0", "safeboot"),
        )
        assert device.upgrade().startswith("Failed")
    assert device.version == "14.0.0(safeboot)"
