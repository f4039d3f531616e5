"""Hostile and broken bytes: each gets a 4xx or 5xx or is harmless, and never a trace in the log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ota_server import Limits
from tests.conftest import site_of
from tests.core.wire import Wire, dial, request, standing

OPEN, CLOSED = False, True  # what becomes of the connection
LIMITS = Limits(linger=0.3, tick=0.02)


def get(*lines: bytes, first: bytes = b"GET /healthz HTTP/1.1") -> bytes:
    """A head with a Host and these lines, as they are."""
    return b"\r\n".join((first, b"Host: ota", *lines, b"", b""))


def line(first: bytes) -> bytes:
    """A head with this request line."""
    return get(first=first)


def target(path: bytes) -> bytes:
    """A head that asks for this."""
    return get(first=b"GET " + path + b" HTTP/1.1")


def row(name: str, head: bytes, status: int, *, closes: bool = CLOSED) -> Any:
    """One case: what is sent, the status expected, whether the connection ends."""
    return pytest.param(head, status, closes, id=name)


LINES = [  # RFC 9112 2.2 and 3
    row("bare-lf", b"GET /healthz HTTP/1.1\nHost: ota\n\n", 400),
    row("one-bare-lf", b"GET /healthz HTTP/1.1\r\nHost: ota\nx: y\r\n\r\n", 400),
    row("bare-cr", get(b"x: a\rb"), 400),
    row("bare-cr-ends-line", b"GET /healthz HTTP/1.1\rHost: ota\r\r\n\r\n", 400),
    row("http-0.9", b"GET /healthz\r\n\r\n", 400),
    row("http-0.9-with-host", line(b"GET /healthz"), 400),
    row("http-1.2", line(b"GET /healthz HTTP/1.2"), 505),
    row("http-2.0", line(b"GET /healthz HTTP/2.0"), 505),
    row("http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    row("http-11", line(b"GET /healthz HTTP/11"), 400),
    row("http-01.1", line(b"GET /healthz HTTP/01.1"), 400),
    row("http-1.1_0", line(b"GET /healthz HTTP/1.1_0"), 400),
    row("http-1.+1", line(b"GET /healthz HTTP/1.+1"), 400),
    row("http-lower-case", line(b"GET /healthz http/1.1"), 400),
    row("other-protocol", line(b"GET /healthz ICY/1.1"), 400),
    row("blank-behind-version", line(b"GET /healthz HTTP/1.1 "), 400),
    row("two-blanks", line(b"GET  /healthz HTTP/1.1"), 400),
    row("tab-for-blank", line(b"GET\t/healthz HTTP/1.1"), 400),
    row("blank-first", line(b" GET /healthz HTTP/1.1"), 400),
    row("form-feed-for-blank", line(b"GET\x0c/healthz HTTP/1.1"), 400),
    row("blank-in-target", line(b"GET /health z HTTP/1.1"), 400),
    row("method-no-token", line(b"G@T /healthz HTTP/1.1"), 400),
    row("method-lower-case", line(b"get /healthz HTTP/1.1"), 405, closes=OPEN),
    row("method-unknown", line(b"BREW /healthz HTTP/1.1"), 405, closes=OPEN),
    row("method-long", line(b"M" * 4000 + b" /healthz HTTP/1.1"), 405, closes=OPEN),
    row("method-trace", line(b"TRACE /healthz HTTP/1.1"), 405, closes=OPEN),
    row("one-empty-line-before", b"\r\n" + get(), 200, closes=OPEN),
]
TARGETS = [  # RFC 9112 3.2, RFC 3986
    row("no-slash", target(b"firmware"), 400),
    row("empty", line(b"GET  HTTP/1.1"), 400),
    row("asterisk", target(b"*"), 400),
    row("options-asterisk", line(b"OPTIONS * HTTP/1.1"), 204, closes=OPEN),
    row("authority", line(b"CONNECT ota:443 HTTP/1.1"), 400),
    row("fragment", target(b"/healthz#x"), 400),
    row("absolute", target(b"http://ota/healthz"), 200, closes=OPEN),
    row("absolute-other-scheme", target(b"ftp://ota/healthz"), 400),
    row("absolute-user", target(b"http://me@ota/healthz"), 400),
    row("absolute-no-host", target(b"http:///healthz"), 400),
    row("bad-percent", target(b"/%zz"), 400),
    row("cut-percent", target(b"/firmware%2"), 400),
    row("nul", target(b"/firmware%00"), 400),
    row("escape", target(b"/%1b[31mfirmware"), 400),
    row("encoded-line-end", target(b"/x%0d%0aSet-Cookie:%20a=b"), 400),
    row("raw-utf-8", target("/fürmware".encode()), 400),
    row("raw-escape", target(b"/\x1b[31m"), 400),
    row("quote", target(b'/"firmware"'), 400),
    row("backslash", target(b"/..\\..\\secret"), 400),
    row("dot-dot", target(b"/../../../../etc/passwd"), 404, closes=OPEN),
    row("encoded-dot-dot", target(b"/%2e%2e/%2e%2e/etc/passwd"), 404, closes=OPEN),
    row("encoded-slashes", target(b"/..%2f..%2fetc%2fpasswd"), 404, closes=OPEN),
    row("dot-dot-bin", target(b"/firmware/../firmware-1.0.0.bin"), 404, closes=OPEN),
    row("two-slashes", target(b"//evil.example/x"), 404, closes=OPEN),
    row("curly-braces", target(b"/{0}"), 400),
    row("encoded-not-utf-8", target(b"/%ff%fe"), 404, closes=OPEN),
    row("long-path", target(b"/" + b"a" * 7000), 404, closes=OPEN),
    row("format-specifiers", target(b"/%25s%25n%7B0%7D%7Bx!r%7D"), 404, closes=OPEN),
]
HOSTS = [  # RFC 9112 3.2
    row("no-host", b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    row("no-host-1.0", b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    row("two-hosts", get(b"Host: ota"), 400),
    row("two-hosts-other-case", get(b"hOST: evil"), 400),
    row("host-list", b"GET /healthz HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    row("host-empty", b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 400),
    row("host-user", b"GET /healthz HTTP/1.1\r\nHost: me@ota\r\n\r\n", 400),
    row("host-path", b"GET /healthz HTTP/1.1\r\nHost: ota/x\r\n\r\n", 400),
    row("host-markup", b"GET / HTTP/1.1\r\nHost: <script>\r\n\r\n", 400),
    row("host-port-word", b"GET /healthz HTTP/1.1\r\nHost: ota:http\r\n\r\n", 400),
    row("host-ipv6", b"GET /healthz HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200, closes=OPEN),
    row("host-broken-ipv6", b"GET /healthz HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
]
FIELDS = [  # RFC 9112 5, RFC 9110 5.5
    row("fold", get(b"x: a\r\n b"), 400),
    row("fold-with-tab", get(b"x: a\r\n\tb"), 400),
    row("fold-first", b"GET /healthz HTTP/1.1\r\n Host: ota\r\n\r\n", 400),
    row("blank-before-colon", get(b"x : y"), 400),
    row("no-colon", get(b"nonsense"), 400),
    row("no-name", get(b": y"), 400),
    row("name-no-token", get(b"x(y): z"), 400),
    row("name-not-ascii", get("x-ä: y".encode()), 400),
    row("nul-in-value", get(b"x: a\0b"), 400),
    row("escape-in-value", get(b"User-Agent: \x1b]0;owned\x07"), 400),
    row("delete-in-value", get(b"x: \x7f"), 400),
    row("high-bytes-in-value", get(b"User-Agent: \x80\xff\x9b31m"), 200, closes=OPEN),
    row("no-value", get(b"x:"), 200, closes=OPEN),
    row("many", get(*[b"x: y"] * 1000), 200, closes=OPEN),
    row("too-many", get(*[b"x: y"] * 2000), 431),
    row("two-versions", get(b"x-ESP8266-version: 1.0.0", b"x-esp8266-version: 9.0.0"), 400),
    row("two-ranges", get(b"Range: bytes=0-1", b"Range: bytes=5-6"), 400),
    row("two-authorizations", get(b"Authorization: a", b"Authorization: b"), 400),
    row("two-agents", get(b"User-Agent: a", b"User-Agent: b"), 400),
]
LENGTHS = [  # RFC 9112 6.3: request smuggling
    row("both", get(b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
    row("chunked", get(b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 501),
    row("coding-unknown", get(b"Transfer-Encoding: xchunked"), 501),
    row("coding-empty", get(b"Transfer-Encoding:"), 501),
    row("coding-in-1.0", get(b"Transfer-Encoding: chunked", first=b"GET / HTTP/1.0"), 400),
    row("two-lengths", get(b"Content-Length: 0", b"Content-Length: 5"), 400),
    row("two-same-lengths", get(b"Content-Length: 0", b"Content-Length: 0"), 400),
    row("length-list", get(b"Content-Length: 0, 0"), 400),
    row("length-empty", get(b"Content-Length:"), 400),
    row("length-plus", get(b"Content-Length: +5"), 400),
    row("length-minus", get(b"Content-Length: -1"), 400),
    row("length-underscore", get(b"Content-Length: 1_0"), 400),
    row("length-hex", get(b"Content-Length: 0x1f"), 400),
    row("length-arabic-digits", get("Content-Length: ٣".encode()), 400),
    row("length-blank-inside", get(b"Content-Length: 1 0"), 400),
    row("length-immense", get(b"Content-Length: " + b"9" * 5000), 400),
    row("length-large", get(b"Content-Length: 999999999999"), 413),
    row("length-zeros", get(b"Content-Length: 00"), 200, closes=OPEN),
]
NOT_HTTP = [
    row("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
    row("tls-first-byte", b"\x16", 400),
    row("ssl-2", b"\x80\x2e\x01\x00\x02\x00\x15", 400),
    row("nul", b"\0", 400),
    row("high-byte", b"\xff\xfb\x01", 400),
    row("blank", b" ", 400),
    row("socks", b"\x05\x01\x00", 400),
    row("ssh", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    row("smtp", b"EHLO ota\r\n\r\n", 400),
    row("line-feed", b"\n", 400),
    row("proxy-protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(), 400),
]


def ask(*fields: bytes) -> bytes:
    """A request for /firmware."""
    return get(*fields, first=b"GET /firmware HTTP/1.1")


def check(field: bytes) -> bytes:
    """An update check with one more line."""
    return ask(b"x-ESP8266-version: 1.0.0", field)


EARLY = b"Mon, 01 Jan 0001 00:00:00 +2359"  # before the year 1
HUGE = b"9" * 120 + b".0.0"


DEVICES = [
    row("version-long", ask(b"x-ESP8266-version: " + b"1" * 7000), 400, closes=OPEN),
    row("version-huge-number", ask(b"x-ESP8266-version: " + HUGE), 304, closes=OPEN),
    row("space-minus", check(b"x-ESP8266-free-space: -1"), 400, closes=OPEN),
    row("space-float", check(b"x-ESP8266-free-space: 1e9"), 400, closes=OPEN),
    row("space-long", check(b"x-ESP8266-free-space: " + b"9" * 5000), 400, closes=OPEN),
    row("chip-size-word", check(b"x-ESP8266-chip-size: big"), 400, closes=OPEN),
    row("mac-odd", check(b"x-ESP8266-STA-MAC: %s%s%n <script>"), 200, closes=OPEN),
    row("range-long", check(b"Range: bytes=" + b"9" * 5000 + b"-"), 200, closes=OPEN),
    row("range-many", check(b"Range: bytes=" + b",".join([b"0-"] * 1000)), 200, closes=OPEN),
    row("range-odd", check(b"Range: bytes=--1"), 200, closes=OPEN),
    row("date-odd", check(b"If-Modified-Since: Mon, 99 Foo 0000 99:99:99"), 200, closes=OPEN),
    row("date-early", check(b"If-Modified-Since: " + EARLY), 200, closes=OPEN),
    row("etag-odd", check(b'If-None-Match: "\xff", , "'), 200, closes=OPEN),
]
ROWS = [*LINES, *TARGETS, *HOSTS, *FIELDS, *LENGTHS, *NOT_HTTP, *DEVICES]


def assert_clean(caplog: pytest.LogCaptureFixture) -> None:
    """No error, no trace, and no byte that could drive a terminal."""
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info]
    assert all(message.isprintable() for message in caplog.messages)


def assert_answered(wire: Wire, status: int, *, closes: bool) -> None:
    """This status, one line that says why, and the end or not, as announced."""
    answer = wire.reply()
    assert (answer.status, answer.closes) == (status, closes)
    if status >= 400:
        assert answer.body.count(b"\n") == 1
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    if closes:
        assert wire.rest() == b""
    else:
        assert wire.check().status == 200


@pytest.mark.parametrize(("head", "status", "closes"), ROWS)
def test_hostile_head_is_answered_at_once_and_harms_nobody(
    head: bytes, status: int, *, closes: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with standing(site_of(folder), limits=LIMITS) as stand:
        with stand.dial() as wire:
            wire.send(head)
            assert_answered(wire, status, closes=closes)
        assert stand.is_fine()
    assert_clean(caplog)


@pytest.mark.parametrize(("head", "status", "closes"), [LINES[0], TARGETS[0], LENGTHS[0]])
def test_hostile_head_by_tls_is_answered_too(
    head: bytes, status: int, *, closes: bool, folder: Path, certificate: Path
) -> None:
    with standing(site_of(folder), certificate, limits=LIMITS) as stand, stand.dial() as wire:
        wire.send(head)
        assert_answered(wire, status, closes=closes)


def test_smuggled_request_behind_a_refused_head_is_not_answered(folder: Path) -> None:
    head = get(b"Content-Length: 4", b"Transfer-Encoding: chunked")
    with standing(site_of(folder), limits=LIMITS) as stand, stand.dial() as wire:
        wire.send(head + b"0\r\n\r\n" + request("/favicon.ico"))
        assert wire.reply().status == 400
        assert wire.rest() == b""


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(request(), id="http"),
        pytest.param(request("/firmware", "x-ESP8266-version: 1.0.0", http="1.0"), id="device"),
        pytest.param(b"PUT /x HTTP/1.1\r\nHost: ota\r\n\r\n", id="put"),
    ],
)
def test_plain_http_to_the_tls_port_is_told_to_use_https(
    data: bytes, folder: Path, certificate: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with standing(site_of(folder), certificate, limits=LIMITS) as stand:
        with dial(stand.port) as wire:
            wire.send(data)
            answer = wire.reply()
            assert (answer.status, answer.closes) == (400, True)
            assert b"https://" in answer.body
            assert wire.rest() == b""
        assert stand.is_fine()
    assert_clean(caplog)


BROKEN_HELLOS = [
    pytest.param(bytes(300), id="zeros"),
    pytest.param(b"\x16\x03\x01\0\x05hello", id="no-handshake"),
    pytest.param(b"\x80\x2e\x01\0\x02".ljust(300, b"\0"), id="ssl-2"),
]


@pytest.mark.parametrize("data", BROKEN_HELLOS)
def test_broken_handshake_is_one_line_in_the_log(
    data: bytes, folder: Path, certificate: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with standing(site_of(folder), certificate, limits=LIMITS) as stand:
        with dial(stand.port) as wire:
            wire.send(data)
            wire.rest()
        assert stand.is_fine()
    assert sum("speaks no TLS" in message for message in caplog.messages) == 1
    assert_clean(caplog)
