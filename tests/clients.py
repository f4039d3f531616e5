"""Emulated clients that are not the Arduino libraries of devices.py: what else asks for firmware.

They stand in a file of their own because devices.py would pass 900 lines with them, and because
they share little with it: most speak HTTP/1.1, some keep the connection, some read a manifest
first. As there, each is written from the client's own source, which its docstring names, and knows
nothing of the server; what was measured on the real code (`docs/protocols.md` tells it) wins over
what the source seems to say. Results are the clients' own words.

Order and spelling of request fields are those of the sources where a server could care; a browser
and ESPHome send more fields than here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import urllib.parse
import zlib
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tests.devices import (
    CHIP_IDS,
    Bricked,
    Esp32,
    Esp8266,
    Failed,
    Link,
    basic_credentials,
    check_esp32,
    check_esp8266,
    dial,
    host_field,
    version_of,
)

REDIRECTS = (301, 302, 303, 307, 308)
ENDLESS = 20  # redirects, after which an emulator says what a device would never find out


class Stop(Exception):
    """An update ended here; the argument is what the client calls it."""


def need(fulfilled: object, word: str) -> None:
    """Raises Stop with this word unless it is fulfilled."""
    if not fulfilled:
        raise Stop(word)


# -- 1. What they share ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Url:
    """A URL, taken apart as all of them do."""

    scheme: str
    host: str
    port: int
    path: str  # with the query
    user: str = ""  # "user:password"

    @classmethod
    def parse(cls, text: str) -> Url:
        """Raises Stop for what is no http or https URL."""
        shape = re.fullmatch(r"(https?)://(?:([^/@]*)@)?([^/:]+)(?::(\d+))?(/.*)?", text)
        if not shape:
            raise Stop("bad URL")
        scheme, user, host, port, path = shape.groups()
        number = int(port or {"http": 80, "https": 443}[scheme])
        return cls(scheme, host, number, path or "/", urllib.parse.unquote(user or ""))


@dataclass(slots=True)
class Answer:
    """The head of a response, and the connection whose next bytes are the body."""

    link: Link
    status: int
    fields: Mapping[str, str]  # names in lower case

    @property
    def length(self) -> int:
        """Content-Length, -1 when there is none."""
        return int(self.fields.get("content-length", -1))

    def body(self, timeout: float) -> bytes:
        """As many bytes as Content-Length says. Raises Stop when there are fewer, or no length."""
        if "transfer-encoding" in self.fields or self.length < 0:
            raise Stop("no length")
        data = self.link.take(self.length, timeout)
        if len(data) < self.length:
            raise Stop("connection lost")
        return data


@dataclass(slots=True, kw_only=True)
class Client(ABC):
    """A client with a URL: connects, asks, reads a head. The rest differs."""

    url: str
    tls_ca: Path | None = None  # PEM; what https is verified with
    timeout: float = 5.0  # seconds to connect, for a head, and between two pieces of a body
    requests: list[str] = field(default_factory=list)  # every head that was sent
    link: Link | None = None  # the connection; a new one ends it

    NAMES: ClassVar[Sequence[str]] = ("DNS", "IP Address")  # kinds of subjectAltName: mbedtls

    def connect(self, url: Url) -> Link:
        """Raises Stop("connection failed") for whatever prevents it, a certificate included."""
        self.close()
        secure = self.tls_ca if url.scheme == "https" else None
        if url.scheme == "https" and not secure:
            raise Stop("connection failed")
        try:
            connection = dial((url.host, url.port), url.host, secure, self.NAMES, self.timeout)
        except OSError as error:
            raise Stop("connection failed") from error
        self.link = Link(connection)
        return self.link

    def ask(self, link: Link, lines: Sequence[str]) -> Answer:
        """Sends these lines, without the empty ones, and reads the head of the answer."""
        head = "\r\n".join(line for line in lines if line) + "\r\n\r\n"
        self.requests.append(head)
        try:
            link.socket.sendall(head.encode())
            status, fields = link.head(self.timeout)
        except (OSError, Failed) as error:
            raise Stop("connection lost") from error
        if not status:
            raise Stop("no HTTP server")
        return Answer(link, status, fields)

    def close(self) -> None:
        """Ends the connection, as the devices do: without a TLS close_notify."""
        if self.link:
            self.link.socket.close()
        self.link = None


class ArduinoClient(Client):
    """HTTPClient of arduino-esp32 as other libraries use it: HTTP/1.1, strict redirects.

    HTTPClient.cpp sendHeader() and sendRequest(): up to 10 redirects of 301, 302, 303, 307; only
    of the same scheme when absolute. The first header fields of a request are lost on the way.
    """

    __slots__ = ()

    AGENT: ClassVar[str] = "ESP32HTTPClient"

    def get(self, url: str, *fields: str) -> Answer:
        """The answer to a GET with these fields, after redirects."""
        for _ in range(10):
            parsed = Url.parse(url)
            lines = [
                f"GET {parsed.path} HTTP/1.1",
                f"Host: {host_field(parsed.host, parsed.port)}",
                f"User-Agent: {self.AGENT}",
                "Connection: keep-alive",
                "Accept-Encoding: identity;q=1,chunked;q=0.1,*;q=0",
            ]
            if parsed.user:
                lines.append(f"Authorization: {basic_credentials(parsed.user)}")
            answer = self.ask(self.connect(parsed), [*lines, *fields])
            location = answer.fields.get("location", "")
            if answer.status not in (301, 302, 303, 307) or not location:
                return answer
            url, fields = self._redirected(parsed, location), ()
        return answer

    @staticmethod
    def _redirected(url: Url, location: str) -> str:
        """Where it leads: setURL(), HTTPClient.cpp:1442-1469."""
        if location.startswith("/"):
            return f"{url.scheme}://{host_field(url.host, url.port)}{location}"
        if not location.startswith(url.scheme + "://"):
            raise Stop("wrong HTTP code")
        return location


# -- 2. ESP-IDF -----------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class EspIdf(Client):
    """esp_https_ota() of ESP-IDF 6.2: esp_https_ota.c, esp_http_client.c. See update().

    The application asks nothing but the URL, and stops when the descriptor in the image says the
    version that runs, as its examples do with esp_https_ota_get_img_desc().
    """

    image: bytes  # what runs
    chip: str = "esp32"  # a key of CHIP_IDS
    partition: int = 1536 * 1024  # bytes of the next app partition
    headers: Mapping[str, str] = field(default_factory=dict)  # set in http_client_init_cb
    user: str = ""  # "user:password"; needs CONFIG_ESP_HTTP_CLIENT_ENABLE_BASIC_AUTH
    compares: bool = True  # stops when the image has the version that runs
    partial: bool = False  # partial_http_download: in pieces
    piece: int = 64 * 1024  # max_http_request_size
    persistent: bool = True  # pieces on one connection
    resume: bool = False  # ota_resumption
    written: bytes = b""  # what an interrupted update left in the partition
    if_range: str = ""  # an ETag that the application kept with `written`
    received: int = 0  # bytes of bodies that were read
    reason: str = ""  # behind the last failure
    _authorization: str = ""

    TX_BUFFER: ClassVar[int] = 512  # esp_http_client.c:1819; the request line must fit
    HEADER: ClassVar[int] = 1024  # esp_https_ota.c:22: read in one go

    @property
    def version(self) -> str:
        """The version of the running image."""
        return version_of(self.image)

    def update(self) -> str:
        """ESP_OK, after which the new image runs, or the name of an error.

        304 is ESP_ERR_HTTP_NOT_MODIFIED, but with `partial`, where HEAD and a GET of one byte come
        first and understand 200 and 206 only, ESP_FAIL. "same version" is the application's word.
        """
        try:
            body = self._download()
            check_esp32(body, self.chip)
        except Stop as stop:
            self.reason = str(stop)
            own = self.reason == "same version" or self.reason.startswith("ESP_")
            return self.reason if own else "ESP_FAIL"
        except Bricked:
            return "ESP_ERR_OTA_VALIDATE_FAILED"
        finally:
            self.close()
        self.image, self.written = body, b""
        return "ESP_OK"

    def check(self) -> int:
        """The status of a HEAD that the application sends on its own: esp_http_client_perform()."""
        try:
            return self._perform("HEAD", "").status
        finally:
            self.close()

    def _download(self) -> bytes:
        """esp_https_ota_begin() and all of esp_https_ota_perform()."""
        body = bytearray(self.written if self.resume and len(self.written) >= self.HEADER else b"")
        total = self._ask_length() if self.partial else 0
        answer = self._open(self._first_range(len(body), total))
        if self._is_refused(answer):
            body.clear()
            self.close()
            restart = f"bytes=0-{self.piece - 1}" if total > self.piece else ""
            answer = self._open(restart)
        while True:
            self._read(answer, body)
            if not self.partial or len(body) >= total:
                return bytes(body)
            if not self.persistent or answer.fields.get("connection", "").lower() == "close":
                self.close()
            last = "" if total - len(body) <= self.piece else str(len(body) + self.piece - 1)
            answer = self._open(f"bytes={len(body)}-{last}")

    def _is_refused(self, answer: Answer) -> bool:
        """Whether the download has to begin again without a range: _http_handle_response_code()."""
        if answer.status == 416:
            if self.resume:
                return True
            raise Stop("ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE")
        return self.resume and not self.partial and answer.status != 206

    def _ask_length(self) -> int:
        """The length of the image: HEAD, or else GET of the first byte."""
        answer = self._perform("HEAD", "")
        if answer.status != 200:
            answer = self._perform("GET", "bytes=0-0")
            if answer.status not in (200, 206):
                raise Stop("ESP_FAIL")
        length = answer.length
        if answer.status == 206:
            length = int(answer.fields.get("content-range", "/-1").rpartition("/")[2])
        if length < 0:
            raise Stop("ESP_FAIL")
        self.close()
        return length

    def _first_range(self, start: int, total: int) -> str:
        if not self.partial:
            return f"bytes={start}-" if self.resume else ""
        end = start + self.piece - 1 if total > self.piece + start else total
        return f"bytes={start}-{end}" if end - start < total else ""

    def _open(self, span: str) -> Answer:
        """_http_connect(): an answer that brings an image, or 416."""
        answer = self._perform("GET", span)
        if answer.status == 304:
            raise Stop("ESP_ERR_HTTP_NOT_MODIFIED")
        if answer.status >= 400 and answer.status != 416:
            raise Stop("ESP_FAIL")
        return answer

    def _perform(self, method: str, span: str) -> Answer:
        """An answer that is no redirect and no question for a password.

        Both are asked again on the same socket, even when the server said that it closes it.
        """
        for _ in range(ENDLESS):
            url = Url.parse(self.url)
            link = self.link or self.connect(url)
            answer = self.ask(link, self._lines(url, method, span))
            if answer.status == 100:
                answer.status, answer.fields = link.head(self.timeout)
            if answer.status in REDIRECTS:
                self._follow(url, answer)
            elif answer.status == 401 and self.user and not self._authorization:
                if "basic" not in answer.fields.get("www-authenticate", "").lower():
                    raise Stop("ESP_FAIL")
                self._authorization = basic_credentials(self.user)
            else:
                return answer
            if method == "GET" and answer.length > 0:
                answer.body(self.timeout)
        raise Stop("redirected without end")

    def _lines(self, url: Url, method: str, span: str) -> list[str]:
        first = f"{method} {url.path} HTTP/1.1"
        if len(first) + 2 > self.TX_BUFFER:
            raise Stop("Out of buffer")
        given = [f"{name}: {value}" for name, value in self.headers.items()]
        return [
            first,
            "User-Agent: ESP32 HTTP Client/1.0",
            f"Host: {host_field(url.host, url.port)}",
            *given,
            f"Authorization: {self._authorization}" if self._authorization else "",
            f"Range: {span}" if span else "",
            f"If-Range: {self.if_range}" if span and self.if_range else "",
        ]

    def _follow(self, url: Url, answer: Answer) -> None:
        """esp_http_client_set_redirection(), esp_http_client.c:1180-1190."""
        location = answer.fields.get("location", "")
        if url.scheme == "https" and not location.startswith("https://"):
            raise Stop("ESP_FAIL")
        self.url = urllib.parse.urljoin(self.url, location)
        after = Url.parse(self.url)
        if (after.scheme, after.host, after.port) != (url.scheme, url.host, url.port):
            self.close()
            self._authorization = ""

    def _read(self, answer: Answer, body: bytearray) -> None:
        """Adds the body of this answer; the first 1024 bytes of an image are looked at first."""
        left = self._left(answer)
        if not body:
            head = answer.link.take(self.HEADER, self.timeout)
            self.received += len(head)
            if len(head) < self.HEADER:
                raise Stop("ESP_FAIL")
            self._check_head(head)
            body += head
            left -= len(head)
        rest = answer.link.take(left, self.timeout) if left else b""
        self.received += len(rest)
        body += rest
        if len(body) > self.partition:
            raise Stop("ESP_ERR_INVALID_SIZE")
        if len(rest) < left and answer.length >= 0:
            raise Stop("ESP_FAIL")  # ESP_ERR_HTTP_INCOMPLETE_DATA
        if answer.link.buffer:
            raise Stop("ESP_FAIL")  # bytes behind the body: http_parser

    def _left(self, answer: Answer) -> int:
        """Bytes of the body; when only the end of the connection tells, more than there can be."""
        if "transfer-encoding" in answer.fields:
            if answer.length >= 0:
                raise Stop("ESP_FAIL")  # http_parser refuses both
            answer.link.buffer = bytearray(_dechunk(answer.link, self.timeout))
            return len(answer.link.buffer)
        return answer.length if answer.length >= 0 else self.partition + 1

    def _check_head(self, head: bytes) -> None:
        """esp_ota_check_image_validity(), and what the application compares."""
        if int.from_bytes(head[12:14], "little") != CHIP_IDS[self.chip]:
            raise Stop("ESP_ERR_INVALID_VERSION")
        if self.compares and head[48:80] == self.image[48:80]:
            raise Stop("same version")


@dataclass(slots=True, kw_only=True)
class Esp32Fuota(Client):
    """PascalBod's esp32-fuota: fuota_b.c ota_update_b(), always by HTTPS; `url` has no path."""

    image: bytes  # what runs
    device: str  # its id, put into the URL as it is
    app_ver: str
    user: str  # "user:password", sent unasked: HTTP_AUTH_TYPE_BASIC
    chip: str = "esp32"
    path: bytearray = field(default_factory=lambda: bytearray(256))  # static, never cleared

    URL: ClassVar[int] = 512  # REQUEST_URL_MAX_LENGTH

    def update(self) -> str:
        """An ota_status_t; after OTA_UPDATED the new image runs."""
        own = {"Authorization": basic_credentials(self.user)}
        asked = f"{self.url}/devices/{self.device}?app_ver={self.app_ver}"
        try:
            need(len(asked) <= self.URL, "OTA_PARAM_ERR")
            name = self._planned(EspIdf(url=asked, image=b"", headers=own, tls_ca=self.tls_ca))
            fetched = f"{self.url}/files/{name}"
            need(len(fetched) <= self.URL, "OTA_PARAM_ERR")
        except Stop as stop:
            return str(stop)
        ota = EspIdf(url=fetched, image=self.image, chip=self.chip, headers=own, compares=False)
        ota.tls_ca = self.tls_ca
        if ota.update() != "ESP_OK":
            return "OTA_CONN_ERR"
        self.image = ota.image
        return "OTA_UPDATED"

    def _planned(self, client: EspIdf) -> str:
        """What stands in the buffer for the path, once an answer was read into it."""
        try:
            answer = client._perform("GET", "")
        except Stop as stop:
            raise Stop("OTA_CONN_ERR") from stop
        try:
            refused = dict.fromkeys((400, 403), "OTA_PARAM_ERR")
            ends = refused | dict.fromkeys((204, 404), "OTA_NO_UPDATE")
            need(answer.status == 200, ends.get(answer.status, "OTA_SYS_ERR"))
            need(answer.length < len(self.path), "OTA_PARAM_ERR")
            read = answer.link.take(max(0, answer.length), self.timeout)
        finally:
            client.close()
        self.path[: len(read)] = read
        return bytes(self.path).partition(b"\0")[0].decode("latin-1")


def _dechunk(link: Link, timeout: float) -> bytes:
    """A chunked body: RFC 9112 7.1."""
    body = b""
    while size := int(link.line(timeout).partition(";")[0], 16):
        body += link.take(size, timeout)
        link.line(timeout)
    link.line(timeout)
    return body


# -- 3. Manifests ---------------------------------------------------------------------------------


def _parse(text: bytes) -> Any:
    """Raises Stop when it is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Stop("JSON Parsing failed") from error


@dataclass(slots=True, kw_only=True)
class Esp32Fota(ArduinoClient):
    """esp32FOTA: esp32FOTA.cpp execHTTPcheck(), checkJSONManifest() and execOTA()."""

    name: str  # the firmware type of the sketch, which the manifest must repeat exactly
    image: bytes  # what runs
    chip: str = "esp32"
    device_id: str = ""  # with use_device_id, the eFuse MAC as a decimal number
    headers: Sequence[str] = ()  # setExtraHTTPHeader()
    partition: int = 1310720  # bytes of the next app partition
    keeps_files: bool = False  # certificates lie in the file system, which is not overwritten then
    filesystem: bytes = b""  # what the last update wrote
    firmware_url: str = ""
    filesystem_url: str = ""
    reason: str = ""

    BUFFER: ClassVar[int] = 2048  # JSON_FW_BUFF_SIZE

    @property
    def version(self) -> str:
        """The version of the running sketch."""
        return version_of(self.image)

    def exec_http_check(self) -> bool:
        """Whether a manifest entry of this type has a higher version."""
        separator = "&" if "?" in self.url else "?"
        url = self.url + (f"{separator}id={self.device_id}" if self.device_id else "")
        try:
            answer = self.get(url, *self.headers)
            need(answer.status in (200, 301), f"Error on HTTP request (httpCode={answer.status})")
            text = answer.body(self.timeout)
            need(len(text) <= self.BUFFER, "JSON Parsing failed (NoMemory)")
            manifest = _parse(text)
        except Stop as stop:
            self.reason = str(stop)
            return False
        finally:
            self.close()
        entries = manifest if isinstance(manifest, list) else [manifest]
        return any(self._check(entry) for entry in entries)

    def exec_ota(self) -> bool:
        """Whether the new sketch runs; the file system comes first."""
        try:
            if self.filesystem_url:
                need(not self.keeps_files, "Cowardly refusing to overwrite U_SPIFFS")
                self.filesystem = self._fetch(self.filesystem_url)
            image = self._fetch(self.firmware_url)
            need(len(image) <= self.partition, "Not enough space to begin OTA")
            check_esp32(image, self.chip)
        except (Stop, Bricked) as flaw:
            self.reason = str(flaw)
            return False
        finally:
            self.close()
        self.image = image
        return True

    def _check(self, entry: Mapping[str, Any]) -> bool:
        """checkJSONManifest(): with "url" every other key that leads somewhere is ignored."""
        if entry.get("type") != self.name:
            return False
        self.firmware_url = self.filesystem_url = ""
        if isinstance(entry.get("url"), str):
            self.firmware_url = entry["url"]
        elif isinstance(entry.get("port"), int) and "bin" in entry and "host" in entry:
            scheme = "https" if entry["port"] in (443, 4433) else "http"
            server = f"{scheme}://{entry['host']}:{entry['port']}"
            self.firmware_url = server + entry["bin"]
            files = [entry[key] for key in ("littlefs", "spiffs", "fatfs") if key in entry]
            self.filesystem_url = server + files[0] if files else ""
        else:
            self.reason = "JSON manifest was missing one of the required keys"
            return False
        return _semver(entry.get("version", 0)) > _semver(self.version)

    def _fetch(self, url: str) -> bytes:
        """getHTTPStream(): 200 or 301, and a length above 0."""
        answer = self.get(url, *self.headers)
        need(answer.status in (200, 301), f"Server responded with HTTP Status '{answer.status}'")
        need(answer.length > 0, "There was no content in the http response")
        return answer.body(self.timeout)


def _semver(version: int | str) -> tuple[int, ...]:
    """Major, minor and patch: semver.c; a bare number is a major version."""
    numbers = [int(part) for part in re.findall(r"\d+", str(version))[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


@dataclass(slots=True, kw_only=True)
class EspHome(Client):
    """ESPHome 2026.6.5: http_request_update.cpp and ota_http_request.cpp.

    `url` is the manifest's for check(), the image's for flash().
    """

    image: bytes  # what runs
    chip: str = "esp32"
    family: str = "ESP32"  # ESPHOME_VARIANT, or ESP8266
    user: str = ""  # "user:password", written into the URLs
    md5: str = ""  # from the configuration or the manifest
    md5_url: str = ""
    timeout: float = 4.5
    title: str = ""
    latest_version: str = ""
    summary: str = ""
    release_url: str = ""
    firmware_url: str = ""

    AGENT: ClassVar[str] = "ESPHome/2026.6.5 (https://esphome.io)"
    REDIRECT_LIMIT: ClassVar[int] = 3

    @property
    def version(self) -> str:
        """The project's version, of the running image."""
        return version_of(self.image)

    def check(self) -> str:
        """UPDATE_STATE_AVAILABLE, UPDATE_STATE_NO_UPDATE or what went wrong: update_task()."""
        try:
            manifest = _parse(self._fetch(self.url))
            self._take(manifest)
        except Stop as stop:
            return str(stop)
        finally:
            self.close()
        self.firmware_url = self._merged(self.firmware_url)
        same = self.latest_version in ("", self.version)  # whichever differs is taken, older too
        return "UPDATE_STATE_NO_UPDATE" if same else "UPDATE_STATE_AVAILABLE"

    def perform(self) -> str:
        """What flash() says about the image that check() found."""
        return self.flash(self.firmware_url)

    def flash(self, url: str) -> str:
        """OTA_RESPONSE_OK, after which the new image runs, or the name of an error: do_ota_()."""
        try:
            expected = self.md5 or self._fetch_md5()
            body = self._fetch(url)
            digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
            if digest[:32] != expected[:32]:  # strncmp(): upper case does not match
                return "OTA_RESPONSE_ERROR_MD5_MISMATCH"
            (check_esp8266 if self.family == "ESP8266" else self._check_esp32)(body)
        except Stop as stop:
            return str(stop)
        except Bricked:
            return "OTA_RESPONSE_ERROR_UPDATE_END"
        finally:
            self.close()
        self.image = body
        return "OTA_RESPONSE_OK"

    def _check_esp32(self, body: bytes) -> None:
        check_esp32(body, self.chip)

    def _fetch_md5(self) -> str:
        """The first 32 bytes of a file that has at least as many: http_get_md5_()."""
        text = self._fetch(self.md5_url) if self.md5_url else b""
        if len(text) < 32:
            raise Stop("OTA_MD5_INVALID")
        return text[:32].decode("latin-1")

    def _fetch(self, url: str) -> bytes:
        """The body of a 200, after at most three redirects: http_request_arduino.cpp start()."""
        user, headers = self.user, [f"User-Agent: {self.AGENT}"]
        for _ in range(1 + self.REDIRECT_LIMIT):
            parsed = Url.parse(url)
            basic = basic_credentials(user or parsed.user)
            lines = [
                f"GET {parsed.path} HTTP/1.1",
                f"Host: {host_field(parsed.host, parsed.port)}",
                *headers,
                f"Authorization: {basic}" if basic else "",
            ]
            answer = self.ask(self.connect(parsed), lines)
            if answer.status == 200:
                return answer.body(self.timeout)
            if answer.status not in REDIRECTS:
                break
            url = urllib.parse.urljoin(url, answer.fields.get("location", ""))
        raise Stop("OTA_CONNECTION_ERROR")

    def _take(self, manifest: Any) -> None:
        """The fields of the first build for this chip."""
        try:
            self.title, self.latest_version = manifest["name"], manifest["version"]
            build = next(each for each in manifest["builds"] if each["chipFamily"] == self.family)
            ota = build["ota"]
            self.firmware_url, self.md5 = ota["path"], ota["md5"]
        except (KeyError, TypeError, StopIteration) as error:
            raise Stop("Failed to parse manifest JSON") from error
        self.summary, self.release_url = ota.get("summary", ""), ota.get("release_url", "")

    def _merged(self, path: str) -> str:
        """An absolute URL, which it is already when "http" stands anywhere in it."""
        if "http" in path:
            return path
        if path.startswith("/"):
            return self.url[: self.url.index("/", 8)] + path
        return self.url[: self.url.rindex("/") + 1] + path


@dataclass(slots=True, kw_only=True)
class WebTools(Client):
    """ESP Web Tools in a browser on another site: esp-web-tools src/flash.ts, Fetch standard."""

    family: str = "ESP32"  # what the serial port says
    origin: str = "https://installer.example"
    flash: dict[int, bytes] = field(default_factory=dict)  # offset -> what was written there

    def install(self) -> str:
        """The name and version that were written, or what went wrong."""
        try:
            manifest = _parse(self._fetch(self.url))
            builds = [each for each in manifest["builds"] if each["chipFamily"] == self.family]
            need(builds, f"Your {self.family} board is not supported.")
            for part in builds[0]["parts"]:
                url = urllib.parse.urljoin(self.url, part["path"])
                self.flash[part["offset"]] = self._fetch(url)
        except Stop as stop:
            return str(stop)
        finally:
            self.close()
        return f"{manifest['name']} {manifest['version']}"

    def _fetch(self, url: str) -> bytes:
        """The body of a 200 that this origin may read: Fetch standard, "CORS check"."""
        parsed = Url.parse(url)
        lines = [
            f"GET {parsed.path} HTTP/1.1",
            f"Host: {host_field(parsed.host, parsed.port)}",
            "Accept: */*",
            f"Origin: {self.origin}",
            "User-Agent: Mozilla/5.0",
            "Accept-Encoding: gzip, deflate, br",
        ]
        answer = self.ask(self.connect(parsed), lines)
        if answer.fields.get("access-control-allow-origin") not in ("*", self.origin):
            raise Stop("Failed to fetch")
        if answer.status != 200:
            raise Stop(f"Downloading firmware {url} failed: {answer.status}")
        return answer.body(self.timeout)


# -- 4. AutoConnect -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class AutoConnect(ArduinoClient):
    """AutoConnectUpdate: AutoConnectUpdate.cpp _onCatalog() and update().

    A person picks a name from the list; the device then asks for it as HTTPUpdate does, without a
    version. `uri` stands before the name as it is, so the default gives `GET ./<name>`.
    """

    device: Esp8266 | Esp32
    uri: str = "."

    OBJECT: ClassVar[int] = 256  # AUTOCONNECT_UPDATE_CATALOG_JSONBUFFER_SIZE

    @property
    def version(self) -> str:
        """The version of the running sketch."""
        return self.device.version

    def catalog(self) -> list[str]:
        """The names of all sketches. Raises Stop for a list that a device cannot read."""
        family = "ESP8266" if isinstance(self.device, Esp8266) else "ESP32"
        server = f"{self.url}/_catalog?op=list&path={self.uri}"
        try:
            answer = self._get_as(server, f"{family}HTTPClient")
            need(answer.status == 200, f"Update server responds ({answer.status})")
            entries = _parse(answer.body(self.timeout))
        finally:
            self.close()
        if any(len(json.dumps(entry)) > self.OBJECT for entry in entries):
            raise Stop("Invalid catalog list: NoMemory")
        return [entry["name"] for entry in entries if entry["type"] == "bin"]

    def update(self, name: str) -> str:
        """What HTTPUpdate says about this sketch."""
        self.device.path, self.device.tells_version = f"{self.uri}/{name}", False
        return self.device.update()

    def _get_as(self, url: str, agent: str) -> Answer:
        """A GET as in ArduinoClient, by another agent."""
        parsed = Url.parse(url)
        host = host_field(parsed.host, parsed.port)
        lines = [f"GET {parsed.path} HTTP/1.1", f"Host: {host}", f"User-Agent: {agent}"]
        return self.ask(self.connect(parsed), [*lines, "Connection: close"])


# -- 5. Mongoose OS -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class MongooseOs(Client):
    """Mongoose OS: mgos_ota_http_client.c, mgos_updater_common.c and the chips' updaters."""

    app: str  # the name in mos.yml
    archive: bytes  # the zip that was installed last
    arch: str = "esp32"  # FW_ARCHITECTURE
    mac: str = "24:6F:28:AA:BB:CC"
    device_id: str = ""
    parts: dict[str, bytes] = field(default_factory=dict)  # what the last update wrote

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of what runs."""
        return dict(json.loads(next(_members(self.archive))[1]))

    @property
    def version(self) -> str:
        """The version of what runs."""
        return str(self.manifest["version"])

    def update(self) -> str:
        """The status message; "Update applied, finalizing" when the new firmware runs."""
        url, own = Url.parse(self.url), self.manifest
        lines = [
            f"GET {url.path} HTTP/1.1",
            f"Host: {host_field(url.host, url.port)}",
            "Content-Length: 0",
            f"User-Agent: {self.app}/{own['version']} (MongooseOS/2.20.0; {self.arch})",
            f"X-MGOS-Device-ID: {self.device_id or '-'} {self.mac}",
            f"X-MGOS-FW-Version: {self.arch} {own['version']} {own['build_id']}",
            f"Authorization: {basic_credentials(url.user)}" if url.user else "",
        ]
        try:
            answer = self.ask(self.connect(url), lines)
            if answer.status == 304:
                return "Not Modified"
            need(answer.status == 200 and answer.length > 0, "Invalid HTTP response code")
            archive = answer.body(self.timeout)
            parts = self._unpack(archive)
        except Stop as stop:
            return str(stop)
        finally:
            self.close()
        self.archive, self.parts = archive, parts
        return "Update applied, finalizing"

    def _unpack(self, archive: bytes) -> dict[str, bytes]:
        """The two parts a device writes, in the order of updater_process_int()."""
        members = _members(archive)
        name, body = next(members)
        need(name == "manifest.json", f"Get {name} instead of manifest.json")
        manifest, running = _parse(body), self.manifest
        fields = ("platform", "version", "build_id", "parts")
        need(all(manifest.get(key) for key in fields), "Required manifest field missing")
        platform = manifest["platform"].lower()
        need(platform.startswith(self.arch.lower()), "Wrong platform")  # strncasecmp()
        same = all(manifest[key] == running[key] for key in ("version", "build_id"))
        need(not same, "Version is the same as current")
        files = dict(members)
        parts = {key: self._part(manifest["parts"], key, files) for key in self._wanted()}
        if self.arch in CHIP_IDS:  # esp_ota_end()
            with contextlib.suppress(Bricked):
                check_esp32(parts["app"], self.arch)
                return parts
            raise Stop("Failed to finalize app write")
        return parts

    def _wanted(self) -> tuple[str, str]:
        return ("fw" if self.arch == "esp8266" else "app", "fs")

    @staticmethod
    def _part(parts: Mapping[str, Any], key: str, files: Mapping[str, bytes]) -> bytes:
        source, digest = (parts.get(key, {}).get(each, "") for each in ("src", "cs_sha1"))
        need(len(digest) == 40 and source in files, "Incomplete update package")
        actual = hashlib.sha1(files[source], usedforsecurity=False).hexdigest()
        need(actual == digest, "Digest mismatch")
        return files[source]


def _members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Name without folder and contents of every member, as they come in.

    Only local headers are read, as a device has not got the directory at the end when it begins:
    parse_zip_file_header(). Raises Stop for what it refuses.
    """
    offset = 0
    while (magic := archive[offset : offset + 4]) != b"PK\x01\x02":
        need(magic == b"PK\x03\x04", "Malformed archive (invalid file header)")
        method, crc, packed, size, name_size, extra = struct.unpack_from(
            "<8xH4xIIIHH", archive, offset
        )
        need(method == 0, "Cannot handle compressed .zip")
        need(packed == size, "Malformed archive")
        name = archive[offset + 30 : offset + 30 + name_size].decode()
        start = offset + 30 + name_size + extra
        contents = archive[start : start + size]
        need(zlib.crc32(contents) == crc, "Invalid CRC")
        yield name.partition("/")[2] or name, contents
        offset = start + size


# -- 6. Tasmota -----------------------------------------------------------------------------------


def _variant(image: bytes) -> str:
    """What stands in the brackets behind a Tasmota's version."""
    return version_of(image).partition("(")[2].rstrip(")")


def _renamed(url: str, name: str) -> str:
    """The URL of the small image: support_tasmota.ino, "Replace tasmota with tasmota-minimal".

    The name is cut at its last dash, the type begins at its first dot; a query counts as both.
    """
    base = url.rindex("/")
    dot = url.find(".", base)
    kind = url[dot:] if dot >= 0 else ""
    dash = url.rfind("-", base)
    return f"{url[: dash if dash >= 0 else len(url) - len(kind)]}-{name}{kind}"


def _target(url: str) -> tuple[str, int, str, str]:
    """Host, port, path and user: HTTPClient begin()."""
    parsed = Url.parse(url)
    return parsed.host, parsed.port, parsed.path, parsed.user


@dataclass(slots=True, kw_only=True)
class Tasmota(Esp8266):
    """Tasmota on an ESP8266 whose flash does not hold two full images: support_tasmota.ino.

    `version` is as in "14.1.0(tasmota)". A minimal image knows only how to update.
    """

    host: str = ""  # those of the URL count
    port: int = 80
    ota_url: str
    room: int = 1004 * 1024  # bytes of flash for the running image and the next one
    restarts: int = 0
    asked: list[str] = field(default_factory=list)  # the URLs

    ATTEMPTS: ClassVar[int] = 5  # OTA_ATTEMPTS; the counter goes down before each

    def upgrade(self) -> str:
        """What `Upgrade 1` reports. Any answer but an error is a success, and it restarts: 304 too.

        After a minimal image it asks again by itself.
        """
        loader, counter = False, self.ATTEMPTS
        while counter := counter - 1:
            url = self.ota_url[:199].replace("%04d", f"{self.chip_id & 0x1FFF:04d}")
            url = url.replace("%d", str(self.chip_id))
            if loader:
                url = _renamed(url, "minimal")
            if counter < self.ATTEMPTS // 2 and ".gz" not in url.lower():
                url += ".gz"
            small = _variant(self.image) == "minimal"
            outcome = self._try(url)
            if outcome != "HTTP_UPDATE_FAILED":
                self.restarts += 1
                again = outcome == "HTTP_UPDATE_OK" and _variant(self.image) == "minimal"
                return self.upgrade() if again else "Successful. Restarting"
            loader = loader or (not small and self.last_error in (-100, -107))
        return f"Failed {self.last_error_string}"

    def _try(self, url: str) -> str:
        """ESPhttpUpdate.update(); the space is what the running image leaves."""
        self.asked.append(url)
        self.host, self.port, self.path, self.user = _target(url)
        self.free_space = self.room - (self.sketch_size + 0xFFF & ~0xFFF)
        return self.update()


@dataclass(slots=True, kw_only=True)
class Tasmota32(Esp32):
    """Tasmota on an ESP32: support_tasmota.ino, HttpUpdateLight.cpp.

    With one app partition it starts the safeboot image of the factory partition, and that one asks.
    """

    host: str = ""  # those of the URL count
    port: int = 80
    ota_url: str
    safeboot: bytes = b""  # in the factory partition; empty: two app partitions
    restarts: int = 0
    asked: list[str] = field(default_factory=list)  # the URLs

    REQUEST = Esp32.REQUEST.replace("x-ESP32-BASE-MAC: {0.mac}\n", "")
    ATTEMPTS: ClassVar[int] = 5

    def upgrade(self) -> str:
        """What `Upgrade 1` reports; see Tasmota.upgrade(). After a failure safeboot runs on."""
        if self.safeboot and self.image != self.safeboot:
            self.restarts += 1
            self.image = self.safeboot
        for _ in range(self.ATTEMPTS - 1):
            if self._try(self.ota_url[:199]) != "HTTP_UPDATE_FAILED":
                self.restarts += 1
                return "Successful. Restarting"
        return f"Failed {self.last_error_string}"

    def upgrade_safeboot(self) -> str:
        """What the update of the factory partition reports: ota_factory. The image runs on."""
        running = self.image
        outcome = self._try(_renamed(self.ota_url[:199], "safeboot"))
        if outcome == "HTTP_UPDATE_OK":
            self.safeboot = self.image
        self.image = running
        return outcome

    def _try(self, url: str) -> str:
        self.asked.append(url)
        self.host, self.port, self.path, self.user = _target(url)
        return self.update()
