"""Asks as a device does: its very bytes over a socket, and what came back, with times and sizes.

A Target says where, request() what a device sends, ask() carries it there and gives an Answer;
greet() sends only the first record of TLS and trust() looks at the chain. Nothing is judged here:
that is diagnosis.py. What keeps an answer from coming is raised as the OSError that it is.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import urlsplit

from ota_fleet.handshake import Flight, client_hello, read_flight, records

MAX_HEAD = 16 * 1024  # bytes of a head; no device takes as many
MAX_BODY = 32 << 20  # bytes: the largest flash there is
MAX_FLIGHT = 256 * 1024  # bytes of a server's first words
LINGER = 0.2  # seconds in which bytes behind the promised ones, or the end, should have come
NO_TIME_CHECK = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL: dates have findings of their own
APPLICATION_DATA = 23  # RFC 5246 6.2.1
T = TypeVar("T")

# The bytes of ESP8266httpUpdate.cpp:166-187, HTTPUpdate.cpp:166-215 and esp_http_client.c, in
# their order; lines without a value are left out. There is room for any image, as nobody knows
# the device. The MACs are nobody's (RFC 7042 2.1.2), so that a server forgets who asked.
REQUESTS = {
    "esp8266": """\
{method} {path} HTTP/1.0
Host: {host}
User-Agent: ESP8266-http-Update
Authorization: {authorization}
Connection: close
x-ESP8266-Chip-ID: 1
x-ESP8266-STA-MAC: 00:00:5E:00:53:01
x-ESP8266-AP-MAC: 02:00:5E:00:53:01
x-ESP8266-free-space: 8388608
x-ESP8266-sketch-size: 299952
x-ESP8266-sketch-md5: {sketch_md5}
x-ESP8266-chip-size: 16777216
x-ESP8266-sdk-version: 2.2.2-dev(38a443e)
x-ESP8266-mode: sketch
x-ESP8266-version: {version}
Content-Length: 0
Range: {range}""",
    "esp32": """\
{method} {path} HTTP/1.0
Host: {host}
User-Agent: ESP32-http-Update
Connection: close
Authorization: {authorization}
Cache-Control: no-cache
x-ESP32-BASE-MAC: 00:00:5E:00:53:02
x-ESP32-STA-MAC: 00:00:5E:00:53:02
x-ESP32-AP-MAC: 00:00:5E:00:53:03
x-ESP32-free-space: 8388608
x-ESP32-sketch-size: 399968
x-ESP32-sketch-md5: {sketch_md5}
x-ESP32-sketch-sha256: {sketch_sha256}
x-ESP32-chip-size: 16777216
x-ESP32-sdk-version: v5.3.2-282-gcfea4f7c98-dirty
x-ESP32-mode: sketch
x-ESP32-version: {version}
Range: {range}""",
    "esp-idf": """\
{method} {path} HTTP/1.1
User-Agent: ESP32 HTTP Client/1.0
Host: {host}
Authorization: {authorization}
Range: {range}""",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A URL as a device takes it apart."""

    secure: bool  # https
    host: str  # ASCII; an IPv6 address without brackets
    port: int
    path: str  # with the query, as sent

    @property
    def authority(self) -> str:
        """The value of Host: the port stands there unless it is 80 or 443."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in {80, 443} else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is in a request beside the device's kind; empty fields are not sent."""

    version: str = ""  # that runs
    authorization: str = ""
    method: str = "GET"
    range: str = ""
    sketch_md5: str = "14cc0cfb6b4b2feab2c588b4ab77380c"  # of no image
    sketch_sha256: str = "72C3342B" * 8


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int = 0  # 0: no HTTP/1 response
    start: bytes = b""  # its first bytes, also of what is no HTTP
    fields: tuple[tuple[str, str], ...] = ()  # in their order and spelling
    body: bytes = b""
    head_seconds: float = 0.0  # from the request to the end of the head
    body_seconds: float = 0.0  # from there to the first byte of the body
    record: int = 0  # bytes of the largest TLS record with data
    interim: bool = False  # a 1xx response came before

    def all(self, name: str) -> list[str]:
        """The values of every field with this name."""
        return [value for field, value in self.fields if field.lower() == name.lower()]

    def get(self, name: str) -> str:
        """The last value with this name, empty if there is none."""
        return (self.all(name) or [""])[-1]

    @property
    def length(self) -> int | None:
        """Content-Length, None if it is missing or no number."""
        text = self.get("Content-Length")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None

    @property
    def content(self) -> bytes:
        """What a client takes of the body: without chunks, as long as promised."""
        if "chunked" in self.get("Transfer-Encoding").lower():
            return unchunked(self.body)
        return self.body[: self.length]

    @property
    def whole(self) -> bool:
        """Whether all of it came, as far as anybody can know."""
        return self.length is None or len(self.body) >= self.length


def unchunked(body: bytes) -> bytes:
    """The data in chunks, as far as they come: RFC 9112 7.1."""
    pattern, data, position = re.compile(rb"([0-9A-Fa-f]{1,7})[^\n]*\n"), bytearray(), 0
    while match := pattern.match(body, position):
        end = match.end() + int(match[1], 16)
        data += body[match.end() : end]
        position = end + 2  # CR LF
    return bytes(data)


def read_url(text: str) -> Target:
    """The target of a URL. Raises ValueError, in words for the operator."""
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("a URL begins with http://host or https://host")
    if parts.username is not None:
        raise ValueError("a password does not belong into the URL: use --token")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not re.fullmatch("[!-~]+", path):
        raise ValueError("the path needs percent-encoding: a device sends it as it is")
    try:
        host = parts.hostname.encode("idna" if not parts.hostname.isascii() else "ascii").decode()
    except UnicodeError as err:
        raise ValueError(f"{parts.hostname!r} is no host name") from err
    secure = parts.scheme == "https"
    return Target(secure, host, parts.port or (443 if secure else 80), path)


def authorization(token: str, scheme: str) -> str:
    """The value of Authorization, Basic or Bearer; empty without a token."""
    if not token or scheme == "Bearer":
        return token and f"Bearer {token}"
    return "Basic " + base64.b64encode(f"ota:{token}".encode()).decode()


def request(kind: str, target: Target, asked: Asked) -> bytes:
    """The bytes of a request of this kind of device."""
    values = {name: getattr(asked, name) for name in Asked.__slots__}
    text = REQUESTS[kind].format_map(values | {"path": target.path, "host": target.authority})
    lines = [line for line in text.split("\n") if not line.endswith(": ")]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


def connect(target: Target, timeout: float) -> socket.socket:
    """A connection. Raises OSError; socket.gaierror when the name does not resolve."""
    try:
        return socket.create_connection((target.host, target.port), timeout)
    except UnicodeError as err:  # a label of the name is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, "no host name") from err


class Link:
    """A connection: bytes out, bytes in. The same for TLS, see TlsLink."""

    def __init__(self, plain: socket.socket) -> None:
        self._socket = plain
        self.record = 0  # bytes of the largest TLS record with data

    def send(self, data: bytes) -> None:
        """Sends all of it."""
        self._socket.sendall(data)

    def receive(self, timeout: float) -> bytes:
        """What comes next, empty at the end. TimeoutError: nothing came in time."""
        self._socket.settimeout(max(timeout, 0.001))
        try:
            return self._socket.recv(65536)
        except ConnectionError:
            return b""


class TlsLink(Link):
    """TLS by hand over the socket, so that the size of each record is seen."""

    def __init__(self, plain: socket.socket, host: str, context: ssl.SSLContext) -> None:
        super().__init__(plain)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._unread = b""  # the beginning of a record
        self._timeout = plain.gettimeout() or 0.0
        self._carry(self._tls.do_handshake)

    def send(self, data: bytes) -> None:
        """Sends all of it."""
        self._carry(lambda: self._tls.write(data))

    def receive(self, timeout: float) -> bytes:
        """What comes next, empty at the end. TimeoutError: nothing came in time."""
        self._timeout = timeout
        try:
            return self._carry(lambda: self._tls.read(65536))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # devices need no close_notify either
            return b""

    def _carry(self, step: Callable[[], T]) -> T:
        """What `step` gives once enough bytes have gone both ways."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
                data = super().receive(self._timeout)
                self._measure(data)
                self._incoming.write(data)
                if not data:
                    self._incoming.write_eof()
            finally:
                self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(ConnectionError):  # then receive() tells the end
            self._socket.sendall(self._outgoing.read())

    def _measure(self, data: bytes) -> None:
        self._unread += data
        for kind, content in records(self._unread):
            self._unread = self._unread[5 + len(content) :]
            if kind == APPLICATION_DATA:
                self.record = max(self.record, len(content))


def tls_context(cacert: str | None = None, *, verify: bool = False) -> ssl.SSLContext:
    """TLS 1.2 as devices speak it, with their rules: whatever is trusted ends a chain.

    Raises OSError: `cacert` holds no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the devices' rules for names differ; diagnosis.py has them
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DEFAULT:@SECLEVEL=1")  # as many as devices have; Python's are fewer
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_TIME_CHECK
    if cacert:
        context.load_verify_locations(cacert)
    elif verify:
        context.load_default_certs()
    return context


def greet(target: Target, timeout: float) -> Flight:
    """What the server says to the first record of TLS."""
    data, flight = b"", Flight()
    with connect(target, timeout) as plain:
        link = Link(plain)
        link.send(client_hello(target.host, os.urandom(32)))
        while not flight.ended and len(data) < MAX_FLIGHT and (piece := link.receive(timeout)):
            data += piece
            flight = read_flight(data)
    return flight


def trust(target: Target, timeout: float, cacert: str | None) -> int:
    """0, or why the chain is not trusted: a code of X509_verify_cert(3). Raises OSError."""
    with connect(target, timeout) as plain:
        try:
            TlsLink(plain, target.host, tls_context(cacert, verify=True))
        except ssl.SSLCertVerificationError as err:
            return err.verify_code
    return 0


def ask(target: Target, sent: bytes, timeout: float) -> Answer:
    """The answer to these bytes. OSError: none came."""
    with connect(target, timeout) as plain:
        link = TlsLink(plain, target.host, tls_context()) if target.secure else Link(plain)
        began = time.monotonic()
        link.send(sent)
        return _read(link, sent, began, timeout)


def _read(link: Link, sent: bytes, began: float, timeout: float) -> Answer:
    """Reads an answer as long as something may still come."""
    head, rest = _read_head(link, began, timeout, b"")
    interim = False
    while re.match(rb"HTTP/1\.[01] 1\d\d", head):
        interim = True
        head, rest = _read_head(link, began, timeout, rest)
    seconds = time.monotonic() - began
    status = re.match(rb"HTTP/1\.[0-9] +(\d{3})\b", head)
    code, fields = int(status[1]) if status else 0, tuple(_fields(head))
    answer = Answer(code, head[:256], fields, head_seconds=seconds, interim=interim)
    if sent.startswith(b"HEAD ") or answer.status in {0, 204, 304}:
        return answer
    body, later = _read_body(link, rest, answer.length, timeout)
    return replace(answer, body=body, body_seconds=later, record=link.record)


def _read_head(link: Link, began: float, timeout: float, data: bytes) -> tuple[bytes, bytes]:
    """The head with its empty line, and what is behind it; all there is if it is no HTTP/1."""
    while b"HTTP/1."[: len(data)] == data[:7]:
        if end := re.search(rb"\r?\n\r?\n", data):  # devices take a bare LF
            return data[: end.end()], data[end.end() :]  # of a large body, perhaps
        if len(data) > MAX_HEAD:
            break
        piece = link.receive(began + timeout - time.monotonic())
        data += piece
        if not piece and data.startswith(b"HTTP/1."):
            raise ConnectionAbortedError("the head has no end")
        if not piece:
            break
    return data, b""


def _read_body(link: Link, data: bytes, wanted: int | None, timeout: float) -> tuple[bytes, float]:
    """All that comes, and the seconds until it began to come."""
    began = first = time.monotonic()
    body = bytearray(data)
    with contextlib.suppress(TimeoutError, ssl.SSLError):  # a body that breaks off is too short
        while len(body) < MAX_BODY:
            last_chunk = wanted is None and body.endswith(b"0\r\n\r\n")
            enough = last_chunk or (wanted is not None and len(body) >= wanted)
            piece = link.receive(LINGER if enough else timeout)
            if not piece:
                break
            first = first if body else time.monotonic()
            body += piece
    return bytes(body), first - began


def _fields(head: bytes) -> Iterator[tuple[str, str]]:
    """Names and values of a head, as a device reads it: ESP8266HTTPClient.cpp:880-989."""
    for line in head.decode("latin-1").split("\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()
