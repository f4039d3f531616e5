"""Hostile and broken bytes: each gets a 4xx or 5xx or is harmless, and never a trace in the log.

What is right is said by RFC 9110 and RFC 9112; where they leave a choice, the stricter reading.
"""

from __future__ import annotations

import collections
import itertools
import logging
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ota_server import MAX_BODY, MAX_HEAD, Limits
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Stand, Wire, descriptors, dial, request, standing
from tests.data.make_images import esp32_image, esp8266_image

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
    row("http-1.10", line(b"GET /healthz HTTP/1.10"), 400),
    row("http-0.9-by-name", line(b"GET /healthz HTTP/0.9"), 505),
    row("http-3.0", line(b"GET /healthz HTTP/3.0"), 505),
    row("http-9.9", line(b"GET /healthz HTTP/9.9"), 505),
    row("http-arabic-digits", line("GET /healthz HTTP/\u0661.\u0661".encode()), 400),
    row("version-missing-number", line(b"GET /healthz HTTP/"), 400),
    row("no-break-space", line(b"GET\xa0/healthz HTTP/1.1"), 400),
    row("vertical-tab", line(b"GET /healthz\x0bHTTP/1.1"), 400),
    row("nul-in-line", line(b"GET /health\0z HTTP/1.1"), 400),
    row("method-missing", line(b"/healthz HTTP/1.1"), 400),
    row("method-alone", line(b"GET"), 400),
    row("method-nul", line(b"GET\0 /healthz HTTP/1.1"), 400),
    row("method-delete", line(b"DELETE /firmware HTTP/1.1"), 405, closes=OPEN),
    row("method-connect-path", line(b"CONNECT / HTTP/1.1"), 405, closes=OPEN),
    row("http-2-preface-in-full", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 505),
    row("http-2-upgrade", get(b"Connection: Upgrade", b"Upgrade: h2c"), 200, closes=OPEN),
    row("websocket-upgrade", get(b"Connection: Upgrade", b"Upgrade: websocket"), 200, closes=OPEN),
    row("many-empty-lines", b"\r\n" * 5000, 400),
    row("line-without-end", b"GET /" + b"a" * MAX_HEAD, 431),
    row("method-without-end", b"M" * (MAX_HEAD + 1), 431),
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
    row("encoded-dot-dot-twice", target(b"/%252e%252e/%252e%252e/etc/passwd"), 404, closes=OPEN),
    row("encoded-backslash", target(b"/..%5c..%5cetc%5cpasswd"), 404, closes=OPEN),
    row("mixed-dots", target(b"/.%2e/%2e./etc/passwd"), 404, closes=OPEN),
    row("overlong-slash", target(b"/..%c0%af..%c0%afetc/passwd"), 404, closes=OPEN),
    row("overlong-dot", target(b"/%c0%ae%c0%ae/etc/passwd"), 404, closes=OPEN),
    row("iis-unicode", target(b"/%u002e%u002e/etc/passwd"), 400),
    row("full-width-dots", target(b"/%ef%bc%8e%ef%bc%8e/etc/passwd"), 404, closes=OPEN),
    row("four-dots", target(b"/....//....//etc/passwd"), 404, closes=OPEN),
    row("semicolon-dots", target(b"/..;/..;/etc/passwd"), 404, closes=OPEN),
    row("dot-dot-at-the-end", target(b"/firmware/.."), 404, closes=OPEN),
    row("only-dot-dot", target(b"/.."), 404, closes=OPEN),
    row("project-dot-dot", target(b"/../secret-1.0.0.bin"), 404, closes=OPEN),
    row("encoded-dot-dot-bin", target(b"/firmware/..%2fsecret-1.0.0.bin"), 404, closes=OPEN),
    row("absolute-path-bin", target(b"/firmware//etc/secret-1.0.0.bin"), 404, closes=OPEN),
    row("nul-before-bin", target(b"/firmware/secret%00.bin"), 400),
    row("drive-letter", target(b"/C:/secret-1.0.0.bin"), 404, closes=OPEN),
    row("alternate-stream", target(b"/firmware/firmware-1.0.0.bin::$DATA"), 404, closes=OPEN),
    row("dot-file", target(b"/.git/config"), 404, closes=OPEN),
    row("proc", target(b"/../../proc/self/environ"), 404, closes=OPEN),
    row("query-dots", target(b"/healthz?../../etc/passwd"), 200, closes=OPEN),
    row("absolute-dots", target(b"http://ota/../../etc/passwd"), 404, closes=OPEN),
    row("absolute-other-host", target(b"http://evil.example/healthz"), 200, closes=OPEN),
    row("absolute-blank-port", target(b"http://ota:/healthz"), 200, closes=OPEN),
    row("absolute-two-schemes", target(b"http://http://ota/"), 404, closes=OPEN),
    row("slashes-only", target(b"/" * 7000), 404, closes=OPEN),
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
    row("host-zone", b"GET /healthz HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n", 400),
    row("host-nul", b"GET /healthz HTTP/1.1\r\nHost: o\0ta\r\n\r\n", 400),
    row("host-blank-before-colon", b"GET /healthz HTTP/1.1\r\nHost : ota\r\n\r\n", 400),
    row("host-absolute-and-none", line(b"GET http://ota/healthz HTTP/1.1")[:-13] + b"\r\n", 400),
    row(
        "host-long",
        b"GET /healthz HTTP/1.1\r\nHost: " + b"a" * 7000 + b"\r\n\r\n",
        200,
        closes=OPEN,
    ),
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
    row("name-long", get(b"x" * 7000 + b": y"), 200, closes=OPEN),
    row("value-long", get(b"x: " + b"y" * 7000), 200, closes=OPEN),
    row("value-too-long", get(b"x: " + b"y" * MAX_HEAD), 431),
    row("name-blank-inside", get(b"x y: z"), 400),
    row("name-tab-behind", get(b"x\t: z"), 400),
    row("name-quoted", get(b'"x": z'), 400),
    row("vertical-tab-in-value", get(b"x: a\x0bb"), 400),
    row("line-of-cr", get(b"\r"), 400),
    row("lf-in-value", get(b"x: a\nHost: evil"), 400),
    row("underscores-for-hyphens", get(b"Content_Length: 5"), 200, closes=OPEN),
    row("colons", get(b"x:::::"), 200, closes=OPEN),
    row("connection-odd", get(b"Connection: ,,;=close;"), 200),
    row("expect-continue", get(b"Expect: 100-continue"), 200),
    row("expect-odd", get(b"Expect: 200-maybe"), 200),
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
    row("chunked-upper-case", get(b"TRANSFER-ENCODING: CHUNKED"), 501),
    row("chunked-tab", get(b"Transfer-Encoding:\tchunked"), 501),
    row("chunked-twice", get(b"Transfer-Encoding: chunked, chunked"), 501),
    row("chunked-not-last", get(b"Transfer-Encoding: chunked, identity"), 501),
    row("coding-identity", get(b"Transfer-Encoding: identity"), 501),
    row("coding-gzip-chunked", get(b"Transfer-Encoding: gzip, chunked"), 501),
    row("coding-quoted", get(b'Transfer-Encoding: "chunked"'), 501),
    row("two-codings", get(b"Transfer-Encoding: x", b"Transfer-Encoding: chunked"), 400),
    row("coding-folded", get(b"Transfer-Encoding:\r\n chunked"), 400),
    row("coding-blank-before-colon", get(b"Transfer-Encoding : chunked"), 400),
    row("coding-behind-cr", get(b"x: y\rTransfer-Encoding: chunked"), 400),
    row("coding-behind-lf", get(b"x: y\nTransfer-Encoding: chunked"), 400),
    row("both-other-order", get(b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    row("both-with-zero", get(b"Content-Length: 0", b"Transfer-Encoding: chunked"), 400),
    row("chunk-size-immense", get(b"Transfer-Encoding: chunked") + b"f" * 40 + b"\r\n", 501),
    row("two-lengths-of-two-cases", get(b"Content-Length: 1", b"CONTENT-LENGTH: 2"), 400),
    row("length-folded", get(b"Content-Length:\r\n 5"), 400),
    row("length-vertical-tab", get(b"Content-Length: \x0b5"), 400),
    row("length-semicolon", get(b"Content-Length: 5;5"), 400),
    row("length-float", get(b"Content-Length: 5.0"), 400),
    row("length-exponent", get(b"Content-Length: 1e3"), 400),
    row("length-quoted", get(b'Content-Length: "5"'), 400),
    row("length-nul", get(b"Content-Length: 5\0"), 400),
    row("length-2-to-the-64", get(b"Content-Length: 18446744073709551616"), 400),
    row("length-one-too-many", get(b"Content-Length: %d" % (MAX_BODY + 1)), 413),
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
    row("range-two-dashes", check(b"Range: bytes=0-1-2"), 200, closes=OPEN),
    row("range-blank", check(b"Range: bytes= 0 - 1"), 200, closes=OPEN),
    row("range-plus", check(b"Range: bytes=+0-1"), 200, closes=OPEN),
    row("range-hex", check(b"Range: bytes=0x0-0x9"), 200, closes=OPEN),
    row("range-arabic-digits", check("Range: bytes=\u0661-\u0662".encode()), 200, closes=OPEN),
    row("range-no-unit", check(b"Range: 0-1"), 200, closes=OPEN),
    row("range-empty", check(b"Range:"), 200, closes=OPEN),
    row("range-overlapping", check(b"Range: bytes=" + b"0-,0-," * 500 + b"0-"), 200, closes=OPEN),
    row("range-behind-the-end", check(b"Range: bytes=999999999999999-"), 416, closes=OPEN),
    row("range-suffix-zero", check(b"Range: bytes=-0"), 416, closes=OPEN),
    row("range-suffix-huge", check(b"Range: bytes=-999999999999999"), 206, closes=OPEN),
    row("if-range-odd", check(b'Range: bytes=0-0\r\nIf-Range: "'), 200, closes=OPEN),
    row("if-match-odd", check(b'If-Match: "'), 412, closes=OPEN),
    row("version-nul", ask(b"x-ESP8266-version: 1.0.0%00"), 400, closes=OPEN),
    row(
        "version-arabic-digits", ask("x-ESP8266-version: \u0661.\u0660".encode()), 400, closes=OPEN
    ),
    row("version-of-two-families", check(b"x-ESP32-version: 9.0.0"), 200, closes=OPEN),
    row("mode-odd", check(b"x-ESP8266-mode: ../../etc"), 304, closes=OPEN),
    row("md5-odd", check(b"x-ESP8266-sketch-md5: " + b"f" * 7000), 200, closes=OPEN),
    row("etag-odd", check(b'If-None-Match: "\xff", , "'), 200, closes=OPEN),
]


def asked(name: str, path: bytes, status: int = 404) -> Any:
    """One target of a route for a dialect; the connection stays."""
    return row(f"dialect-{name}", target(path), status, closes=OPEN)


def mongoose(words: bytes) -> bytes:
    """A check by Mongoose OS for a project that has no zip."""
    return ask(b"X-MGOS-FW-Version: " + words, b"X-MGOS-Device-ID: \xff " + b"A" * 3000)


NAME, LONG = b"/firmware-1.10.0.bin", b"a" * 3000
DIALECTS = [
    *(
        asked(f"long-{number}", path)
        for number, path in enumerate(
            [
                b"/" + LONG + b".bin",
                b"/" + LONG + b".bin.gz.md5",
                b"/" + LONG + b"/latest.bin",
                b"/" + LONG + b"-minimal.bin.gz",
                b"/" + LONG + b"/manifest.json",
                b"/" + LONG + b"/esp32fota.json",
                b"/" + LONG + b"/versions",
                b"/firmware/" + b"1." * 1500 + b".bin",
                b"/firmware/" + b"1.0-" * 1500 + b".littlefs.bin.gz",
                b"/firmware/" + b".bin" * 1500,
                b"/firmware/" + b".md5" * 1500,
                b"/firmware/latest" + b"-minimal" * 500 + b".bin",
                b"/a" * 1500 + b"/fan/latest.bin",
                b"/update?dev=" + LONG[:0] + b"&x=" + LONG,
            ]
        )
    ),
    asked("long-prefix", b"/a" * 1500 + NAME, 200),
    row("dialect-dot-slash", line(b"GET ." + NAME + b" HTTP/1.1"), 200, closes=OPEN),
    row("dialect-dot-slash-up", target(b"./../secret-1.0.0.bin"), 404, closes=OPEN),
    row("dialect-dot-slash-url", target(b"./http://ota/firmware.bin"), 200, closes=OPEN),
    row("dialect-dot-dot-slash", target(b"../secret-1.0.0.bin"), 400),
    row("dialect-dot", target(b"."), 400),
    asked("md5-md5", NAME + b".md5.md5"),
    asked("sha256-md5", NAME + b".sha256.md5"),
    asked("md5-alone", b"/.md5"),
    asked("md5-of-nothing", b"/firmware/.md5", 400),
    asked("md5-of-the-page", b"/.sha256"),
    asked("md5-slash", NAME + b".md5/", 400),
    asked("md5-capitals", NAME + b".MD5"),
    asked("md5-of-a-secret", b"/../secret-1.0.0.bin.md5"),
    asked("md5-of-a-secret-coded", b"/%2e%2e/secret-1.0.0.bin.sha256"),
    asked("latest-alone", b"/latest"),
    asked("latest-bin-alone", b"/latest.bin"),
    asked("latest-of-dots", b"/../latest.bin"),
    asked("latest-of-one-dot", b"/./latest.bin"),
    asked("latest-of-slashes", b"//latest.bin"),
    asked("latest-twice", b"/firmware/latest/latest.bin"),
    asked("latest-other", b"/firmware/latest-secret.bin"),
    asked("latest-zip", b"/firmware/latest.zip"),
    row("dialect-latest-nul", target(b"/firmware/latest%00.bin"), 400),
    asked("bin-alone", b"/.bin"),
    asked("gz-alone", b"/.bin.gz"),
    asked("zip-alone", b"/firmware/.zip"),
    asked("dots-bin", b"/...bin"),
    asked("dots-and-bin", b"/firmware/...bin"),
    asked("littlefs-alone", b"/.littlefs.bin"),
    asked("backslashes", b"/firmware/..%5c..%5csecret-1.0.0.bin"),
    asked("coded-slash", b"/firmware%2ffirmware-1.10.0.bin", 200),
    asked("coded-slashes-up", b"/..%2f..%2fsecret-1.0.0.bin.gz"),
    asked("surrogate", b"/%ed%a0%80.bin"),
    asked("surrogate-latest", b"/%ed%a0%80/latest.bin.md5"),
    asked("no-utf-8-manifest", b"/%ff/manifest.json"),
    asked("no-utf-8-file", b"/firmware/%ff-1.0.0.bin"),
    asked("next-line", b"/%c2%85/versions"),
    asked("right-to-left", b"/%e2%80%ae/esp32fota.json"),
    row("dialect-line-end", target(b"/x%0d%0aX:%20y/latest.bin"), 400),
    row("dialect-escape", target(b"/%1b%5b31m.bin"), 400),
    row("dialect-nul-in-file", target(b"/firmware/%00firmware-1.10.0.bin"), 400),
    asked("manifest-alone", b"/manifest.json"),
    asked("manifest-of-dots", b"/../manifest.json"),
    asked("manifest-of-slashes", b"//manifest.json"),
    asked("manifest-slash", b"/fan/manifest.json/"),
    asked("fota-slash", b"/fan/esp32fota.json/"),
    asked("fota-id", b"/firmware/esp32fota.json?id=" + LONG),
    asked("versions-alone", b"/versions"),
    asked("versions-of-dots", b"/../versions"),
    asked("catalog-below", b"/firmware/_catalog", 400),
    asked("catalog-slash", b"/_catalog/"),
    asked("catalog-of-a-path", b"/_catalog?op=list&path=../../etc", 200),
    asked("catalog-of-nothing", b"/_catalog?" + b"&" * 3000, 200),
    asked("update-slash", b"/update/?dev=..&ver=1.0"),
    asked("update-dots", b"/update?dev=..&ver=1.0", 400),
    asked("update-nul", b"/update?dev=%00&ver=%00", 400),
    asked("update-line-end", b"/update?dev=a%0d%0aX:y&ver=1.0%0a", 400),
    asked("update-no-utf-8", b"/update?dev=%ff%fe&ver=1.0", 400),
    asked("update-surrogate", b"/update?dev=%ed%a0%80&ver=1.0", 400),
    asked("update-many", b"/update?" + b"dev=a&" * 800, 400),
    asked("version-escape", b"/firmware?version=%1b%5b31m", 400),
    asked("version-nul", b"/firmware?version=1.0.0%00", 400),
    asked("version-no-utf-8", b"/firmware?version=%ff", 400),
    asked("version-long", b"/firmware?version=" + b"1" * 7000, 400),
    asked("version-bracket", b"/firmware?version=1.1." + b"1" * 6000 + b")", 400),
    asked("token-odd", b"/firmware/latest.bin?token=%00%ff&sig=%zz"[:-3], 200),
    row("mgos-empty", mongoose(b""), 400, closes=OPEN),
    row("mgos-escape", mongoose(b"\x9b31m 1.0 \x9b"), 403, closes=OPEN),
    row("mgos-long", mongoose(b"a" * 3000 + b" 1.0"), 403, closes=OPEN),
    row("mgos-many-words", mongoose(b"a " * 1500), 400, closes=OPEN),
    row("mgos-odd-version", mongoose(b"esp32 %n"), 400, closes=OPEN),
    row("tasmota-odd", ask(b"x-ESP8266-version: 1.0.0(" + b"(" * 3000 + b")"), 200, closes=OPEN),
    row(
        "forwarded-odd",
        ask(b"X-Forwarded-For: %s, \xff", b"X-Forwarded-Host: a b"),
        400,
        closes=OPEN,
    ),
]
ROWS = [*LINES, *TARGETS, *HOSTS, *FIELDS, *LENGTHS, *NOT_HTTP, *DEVICES, *DIALECTS]


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


@pytest.fixture(scope="module", params=["plain", "tls"])
def stand(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: Path
) -> Iterator[Stand]:
    """One server for all rows, so that what one leaves behind would meet the next."""
    folder = tmp_path_factory.mktemp("hostile") / "firmware"
    for version in ("1.0.0", "1.10.0"):
        put(folder / f"firmware-{version}.bin", esp8266_image("firmware", version))
    put(folder / "big-1.0.0.bin", esp32_image("big", "1.0.0", payload=bytes(1 << 20)))
    put(folder.parent / "secret-1.0.0.bin", esp8266_image("secret", "1.0.0"))
    ca = certificate if request.param == "tls" else None
    with standing(site_of(folder), ca, limits=LIMITS) as stand:
        yield stand


@pytest.mark.parametrize(("head", "status", "closes"), ROWS)
def test_hostile_head_is_answered_at_once_and_harms_nobody(
    head: bytes, status: int, *, closes: bool, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with stand.dial() as wire:
        wire.send(head)
        assert_answered(wire, status, closes=closes)
    assert stand.is_fine()
    assert_clean(caplog)


def dialogue(name: str, data: bytes, *statuses: int) -> Any:
    """One case of several requests: what is sent at once, and every reply before the end."""
    return pytest.param(data, statuses, id=name)


CLOSE = b"Connection: close"
TUNNEL = request("/favicon.ico")  # what somebody tries to smuggle; its answer would be a 200
POST, HEAD = b"POST /healthz HTTP/1.1", b"HEAD /healthz HTTP/1.1"
CHUNKED = b"Transfer-Encoding: chunked"
DIALOGUES = [  # RFC 9112 9.3: in order, and nothing behind the end
    dialogue("two", get() + get(CLOSE), 200, 200),
    dialogue("fifty", get() * 49 + get(CLOSE), *[200] * 50),
    dialogue("good-then-bad", get() + line(b"GET / HTTP/9.9") + get(), 200, 505),
    dialogue("bad-then-good", get(b"x y: z") + get(), 400),
    dialogue("good-then-half", get() + b"GET /", 200),
    dialogue("good-then-tls", get() + b"\x16\x03\x01\x02\x00", 200, 400),
    dialogue("good-then-http-2", get() + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 200, 505),
    dialogue("good-then-line-feed", get() + b"\n" + get(), 200, 400),
    dialogue("behind-close", get(CLOSE) + TUNNEL, 200),
    dialogue("behind-1.0", get(first=b"GET /healthz HTTP/1.0") + TUNNEL, 200),
    dialogue("behind-head-with-close", get(CLOSE, first=HEAD) + TUNNEL, 200),
    dialogue("in-a-body", get(b"Content-Length: %d" % len(TUNNEL), CLOSE) + TUNNEL, 200),
    dialogue(
        "in-a-body-of-post", get(b"Content-Length: %d" % len(TUNNEL), first=POST) + TUNNEL, 405
    ),
    dialogue("body-then-good", get(b"Content-Length: 3") + b"abc" + get(CLOSE), 200, 200),
    dialogue("body-too-long", get(b"Content-Length: 3") + b"abcdef" + get(), 200, 405),
    dialogue("body-and-line-end", get(b"Content-Length: 3") + b"abc\r\n" + get(CLOSE), 200, 200),
    dialogue("length-0-then-body", get(b"Content-Length: 0") + b"0\r\n\r\n" + TUNNEL, 200, 400),
    dialogue("no-length-then-body", get(first=POST) + b"a=b&c=d\r\n\r\n" + TUNNEL, 405, 400),
    dialogue("cl-te", get(b"Content-Length: 4", CHUNKED) + b"0\r\n\r\n" + TUNNEL, 400),
    dialogue("te-cl", get(CHUNKED, b"Content-Length: 4") + b"5c\r\n" + TUNNEL, 400),
    dialogue("te-0", get(CHUNKED) + b"0\r\n\r\n" + TUNNEL, 501),
    dialogue("te-te", get(CHUNKED, b"Transfer-encoding: cow") + b"0\r\n\r\n" + TUNNEL, 400),
    dialogue("te-extension", get(CHUNKED) + b"2;\nxx\r\n0\r\n\r\n" + TUNNEL, 501),
    dialogue("te-in-the-second", get() + get(CHUNKED) + b"0\r\n\r\n" + TUNNEL, 200, 501),
    dialogue("two-lengths", get(b"Content-Length: 0", b"Content-Length: 44") + TUNNEL, 400),
    dialogue("lf-ends-the-head", get()[:-2] + b"\n" + TUNNEL, 400),
    dialogue("cr-ends-the-head", get()[:-2] + b"\r" + TUNNEL, 400),
    dialogue("expect-and-body", get(b"Expect: 100-continue", b"Content-Length: 44") + TUNNEL, 200),
    dialogue("body-too-large", get(b"Content-Length: 99999") + TUNNEL, 413),
    dialogue("head-too-large", get(b"x: " + b"y" * MAX_HEAD) + TUNNEL, 431),
]


def say_no_more(wire: Wire) -> None:
    """Closes one direction, below the TLS layer: no device sends a close_notify."""
    socket.socket.shutdown(wire.link, socket.SHUT_WR)


def rest_of(wire: Wire) -> bytes:
    """All bytes to the end, which OpenSSL tells those who said no close_notify by an alert."""
    try:
        return wire.rest()
    except ssl.SSLError:
        return b""


@pytest.mark.parametrize(("data", "statuses"), DIALOGUES)
def test_requests_in_a_row_are_answered_in_order_and_none_is_smuggled_in(
    data: bytes, statuses: Sequence[int], stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    method = "HEAD" if data.startswith(b"HEAD") else "GET"
    with stand.dial() as wire:
        wire.send(data)
        answers = [wire.reply(method) for _ in statuses]
        assert [answer.status for answer in answers] == list(statuses)
        if not answers[-1].closes:
            say_no_more(wire)
        assert rest_of(wire) == b""
    assert stand.is_fine()
    assert_clean(caplog)


CUTS = [  # where a client leaves in the middle of something
    pytest.param(b"", id="nothing"),
    pytest.param(b"G", id="method"),
    pytest.param(b"GET /firmware", id="target"),
    pytest.param(b"GET /firmware HTTP/1.1\r\nHo", id="field"),
    pytest.param(get()[:-2], id="head-without-its-end"),
    pytest.param(get()[:-1], id="head-without-its-last-byte"),
    pytest.param(get(b"Content-Length: 100") + b"abc", id="body"),
    pytest.param(get(b"Content-Length: 99999") + b"abc", id="refused-body"),
    pytest.param(get(b"Expect: 100-continue", b"Content-Length: 9", first=POST), id="expect"),
    pytest.param(request("/big/big-1.0.0.bin"), id="download"),
    pytest.param(request("/big/big-1.0.0.bin") * 5, id="downloads-in-a-row"),
    pytest.param(get() * 80, id="requests-in-a-row"),
    pytest.param(request("/"), id="page"),
]


def half_close(wire: Wire) -> None:
    """Says that nothing more comes, reads what does, and leaves."""
    say_no_more(wire)
    rest_of(wire)


def reset(wire: Wire) -> None:
    """Ends the connection as a device does that loses its power and comes back."""
    abort = struct.pack("ii", 1, 0)  # SO_LINGER: no orderly end
    wire.link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
    wire.link.close()


def reset_in_the_reply(wire: Wire) -> None:
    """Waits for something, or for a moment, and then does the same."""
    wire.link.settimeout(0.02)
    with suppress(OSError):  # nothing comes, or the end
        wire.link.recv(1)
    reset(wire)


@pytest.mark.parametrize("leave", [half_close, reset, reset_in_the_reply])
@pytest.mark.parametrize("data", CUTS)
def test_client_that_leaves_in_the_middle_leaves_nothing_behind(
    leave: Callable[[Wire], None], data: bytes, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    before = descriptors()
    with stand.dial() as wire:
        wire.send(data)
        leave(wire)
    wait_until(lambda: descriptors() <= before)
    assert stand.is_fine()
    assert_clean(caplog)


ENDLESS = [
    pytest.param(b"GET /", b"a" * 500, id="target"),
    pytest.param(b"", b"M" * 500, id="method"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 80, id="fields"),
    pytest.param(b"GET / HTTP/1.1\r\nx: ", b"a" * 500, id="value"),
    pytest.param(get(b"Content-Length: 999999999"), bytes(500), id="body"),
    pytest.param(get(CHUNKED), b"1\r\na\r\n" * 80, id="chunks"),
    pytest.param(get(b"x y: z"), get() * 10, id="requests-behind-a-refused-one"),
    pytest.param(b"", bytes(500), id="zeros"),
]


@pytest.mark.parametrize(("opening", "piece"), ENDLESS)
def test_client_that_never_stops_sending_gets_its_4xx_or_its_end(
    opening: bytes, piece: bytes, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    flood = itertools.chain([opening], itertools.repeat(piece, 200_000))
    ended = pytest.raises((ConnectionError, ssl.SSLError))  # and no timeout
    with stand.dial() as wire, ended:
        collections.deque(map(wire.send, flood), 0)
    assert stand.is_fine()
    assert_clean(caplog)


def test_there_are_150_hostile_rows_and_no_two_the_same() -> None:
    rows = [each.values[0] for each in (*ROWS, *DIALOGUES)]
    assert len(set(rows)) == len(rows) >= 150


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
        pytest.param(b"GET /", id="no more than TLS reads"),
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
