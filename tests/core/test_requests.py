"""Requests: what real devices send is read, and what could be read in two ways is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import Refused, Request, Version, parse_head, read_report

PEER = "192.0.2.7"

ESP8266 = """\
GET /update HTTP/1.0
Host: 127.0.0.1:18266
User-Agent: ESP8266-http-Update
Connection: close
x-ESP8266-Chip-ID: 12648430
x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56
x-ESP8266-AP-MAC: 5E:CF:7F:12:34:56
x-ESP8266-free-space: 1794048
x-ESP8266-sketch-size: 299952
x-ESP8266-sketch-md5: 14cc0cfb6b4b2feab2c588b4ab77380c
x-ESP8266-chip-size: 4194304
x-ESP8266-sdk-version: 2.2.2-dev(38a443e)
x-ESP8266-mode: sketch
x-ESP8266-version: 1.0
Content-Length: 0
"""
ESP8266_BASIC = ESP8266.replace("Connection:", "Authorization: Basic dTpw\nConnection:")
ESP32 = """\
GET /update HTTP/1.0
Host: 127.0.0.1:18232
User-Agent: ESP32-http-Update
Connection: close
Cache-Control: no-cache
x-ESP32-BASE-MAC: 24:6F:28:AA:BB:CC
x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC
x-ESP32-AP-MAC: 24:6F:28:AA:BB:CD
x-ESP32-free-space: 1310720
x-ESP32-sketch-size: 399968
x-ESP32-sketch-md5: df615266c370fbaa95e1f2ddc701fad7
x-ESP32-sketch-sha256: 72C3342B72C3342B72C3342B72C3342B72C3342B72C3342B72C3342B72C3BEC2
x-ESP32-chip-size: 4194304
x-ESP32-sdk-version: v5.3.2-282-gcfea4f7c98-dirty
x-ESP32-mode: sketch
x-ESP32-version: 1.2.3
"""
IDF = """\
GET /ok HTTP/1.1
User-Agent: ESP32 HTTP Client/1.0
Host: 127.0.0.1:18232
Range: bytes=65536-131071
"""
ESPHOME = """\
GET /firmware HTTP/1.1
Host: ota.local
User-Agent: ESPHome/2026.6.5 (https://esphome.io)
Connection: close
"""
MICROPYTHON = """\
GET /firmware HTTP/1.1
Host: ota.local
Connection: close
"""
MICROPYTHON_OLD = """\
GET /firmware HTTP/1.0
Host: ota.local
User-Agent: MicroPython Client
"""
TASMOTA = ESP8266.replace("sion: 1.0", "sion: 14.1.0(tasmota)")
MONGOOSE = """\
GET /firmware HTTP/1.1
Host: ota.local:8000
Connection: close
X-MGOS-Device-ID: esp8266_DA84C1 5CCF7FDA84C1
X-MGOS-FW-Version: esp8266 1.0 20170414-161024/???
User-Agent: app/1.0 (MongooseOS/2.20; esp8266)
"""
CURL = """\
GET /firmware?x=1 HTTP/1.1
Host: localhost:8000
User-Agent: curl/8.5.0
Accept: */*
x-ESP8266-version: 1.0.0
"""
BROWSER = """\
GET / HTTP/1.1
Host: [fd00::1]:8000
User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8
Accept-Language: de,en-US;q=0.7,en;q=0.3
Accept-Encoding: gzip, deflate
Connection: keep-alive
Upgrade-Insecure-Requests: 1
Priority: u=0, i
"""


def wire(text: str) -> bytes:
    """The head on the wire."""
    return text.replace("\n", "\r\n").encode() + b"\r\n"


def head(*fields: str, line: str = "GET /firmware HTTP/1.1", host: str = "Host: ota") -> bytes:
    """A head of these lines; without the Host line if it is empty."""
    return "".join(f"{each}\r\n" for each in (line, host, *fields, "") if each).encode() + b"\r\n"


def parsed(data: bytes) -> Request:
    return parse_head(data, PEER)


def status_of(data: bytes) -> int:
    """With what status the head is refused."""
    with pytest.raises(Refused) as caught:
        parsed(data)
    assert "\n" not in caught.value.reason
    return caught.value.status


# -- 1. What real clients send ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "keep_alive"),
    [
        pytest.param(ESP8266, "/update", False, id="ESP8266httpUpdate"),
        pytest.param(ESP8266_BASIC, "/update", False, id="ESP8266httpUpdate with a password"),
        pytest.param(ESP32, "/update", False, id="HTTPUpdate of the ESP32"),
        pytest.param(IDF, "/ok", True, id="esp_https_ota"),
        pytest.param(ESPHOME, "/firmware", False, id="ESPHome"),
        pytest.param(MICROPYTHON, "/firmware", False, id="MicroPython requests"),
        pytest.param(MICROPYTHON_OLD, "/firmware", False, id="micropython-ota-updater"),
        pytest.param(TASMOTA, "/update", False, id="Tasmota"),
        pytest.param(MONGOOSE, "/firmware", False, id="Mongoose OS"),
        pytest.param(CURL, "/firmware", True, id="curl"),
        pytest.param(BROWSER, "/", True, id="Firefox"),
    ],
)
def test_head_of_a_real_client_is_read(text: str, path: str, keep_alive: bool) -> None:
    request = parsed(wire(text))
    assert (request.method, request.path, request.keep_alive) == ("GET", path, keep_alive)
    assert (request.peer, request.secure, request.body_size) == (PEER, False, 0)
    fields = dict(line.split(": ", 1) for line in text.splitlines()[1:])
    assert request.headers == {name.lower(): value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("text", "version", "chip", "free_space"),
    [
        pytest.param(ESP8266, "1.0.0", "esp8266", 1794048, id="ESP8266"),
        pytest.param(ESP32, "1.2.3", "some ESP32", 1310720, id="ESP32"),
        pytest.param(CURL, "1.0.0", "esp8266", None, id="curl"),
    ],
)
def test_report_is_read_from_a_real_head(
    text: str, version: str, chip: str, free_space: int | None
) -> None:
    report = read_report("app", parsed(wire(text)).headers, PEER)
    assert report.version == Version.parse(version)
    assert (report.chip, report.free_space) == (chip, free_space)


def test_request_knows_that_it_came_by_tls() -> None:
    assert parse_head(head(), PEER, secure=True).secure


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        pytest.param("/", "/", "", id="root"),
        pytest.param("/firmware", "/firmware", "", id="project"),
        pytest.param("/a/b/firmware", "/a/b/firmware", "", id="deep"),
        pytest.param("/firmware?x=1&y=%20", "/firmware", "x=1&y=%20", id="query stays as it is"),
        pytest.param("/firmware?", "/firmware", "", id="empty query"),
        pytest.param("/firmware?a?b/c", "/firmware", "a?b/c", id="question mark in the query"),
        pytest.param("/my%20app", "/my app", "", id="blank"),
        pytest.param("/caf%C3%A9", "/café", "", id="UTF-8"),
        pytest.param("/caf%e9", "/caf\udce9", "", id="no UTF-8, as os.fsdecode() has it"),
        pytest.param("/%2e%2e/x", "/../x", "", id="dots"),
        pytest.param("/a%2fb", "/a/b", "", id="slash"),
        pytest.param("/%253f", "/%3f", "", id="decoded once"),
        pytest.param("/a%3fb?c", "/a?b", "c", id="question mark in the path"),
        pytest.param("/%3Cscript%3E", "/<script>", "", id="angle brackets"),
        pytest.param("/a+b", "/a+b", "", id="plus is no blank"),
        pytest.param("//firmware", "//firmware", "", id="two slashes"),
        pytest.param("/-._~!$&'()*+,;=:@", "/-._~!$&'()*+,;=:@", "", id="all that may stand bare"),
        pytest.param("http://ota/firmware?x", "/firmware", "x", id="absolute"),
        pytest.param("HTTPS://ota:8443/firmware", "/firmware", "", id="absolute, upper case"),
        pytest.param("http://ota", "/", "", id="absolute without path"),
        pytest.param("http://ota?x=1", "/", "x=1", id="absolute, query alone"),
    ],
)
def test_target_is_read(target: str, path: str, query: str) -> None:
    request = parsed(head(line=f"GET {target} HTTP/1.1"))
    assert (request.path, request.query) == (path, query)


def test_authority_of_an_absolute_target_is_the_host() -> None:
    request = parsed(head(line="GET http://real:8000/firmware HTTP/1.1", host="Host: other"))
    assert request.headers["host"] == "real:8000"


def test_asterisk_is_a_target_of_options_only() -> None:
    request = parsed(head(line="OPTIONS * HTTP/1.1"))
    assert (request.method, request.path) == ("OPTIONS", "/")
    assert status_of(head(line="GET * HTTP/1.1")) == 400


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "M-SEARCH", "get", "BREW"])
def test_any_token_is_a_method(method: str) -> None:
    assert parsed(head(line=f"{method} / HTTP/1.1")).method == method


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("ota", id="name"),
        pytest.param("ota.local:8000", id="port"),
        pytest.param("192.168.1.5", id="IPv4"),
        pytest.param("[::1]:8000", id="IPv6"),
        pytest.param("ota:", id="empty port"),
    ],
)
def test_host_is_read(host: str) -> None:
    assert parsed(head(host=f"Host: {host}")).headers["host"] == host


def test_host_may_be_missing_in_http_1_0() -> None:
    assert "host" not in parsed(head(line="GET / HTTP/1.0", host="")).headers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("x-a: b", "b", id="one blank"),
        pytest.param("x-a:b", "b", id="none"),
        pytest.param("x-a: \t b \t ", "b", id="blanks and tabs around"),
        pytest.param("X-A: b", "b", id="upper case"),
        pytest.param("x-a:", "", id="empty"),
        pytest.param("x-a: \t", "", id="blanks only"),
        pytest.param("x-a: b  c\td", "b  c\td", id="blanks inside stay"),
        pytest.param("x-a: b: c", "b: c", id="colon inside"),
    ],
)
def test_field_is_read_without_outer_blanks(field: str, value: str) -> None:
    assert parsed(head(field)).headers["x-a"] == value


def test_field_of_high_bytes_is_read() -> None:
    request = parsed(b"GET / HTTP/1.1\r\nHost: ota\r\nx-a: caf\xe9\r\n\r\n")
    assert request.headers["x-a"] == "caf\xe9"


@pytest.mark.parametrize(
    "name",
    ["If-None-Match", "If-Match", "Accept", "Connection", "X-Forwarded-For", "Cache-Control"],
)
def test_field_that_may_repeat_is_joined(name: str) -> None:
    fields = (f"{name}: a", "Accept-Language: de", f"{name.upper()}: b", f"{name}: c")
    assert parsed(head(*fields)).headers[name.lower()] == "a, b, c"


@pytest.mark.parametrize(
    ("http", "connection", "keep_alive"),
    [
        pytest.param("1.1", None, True, id="1.1"),
        pytest.param("1.1", "close", False, id="1.1 close"),
        pytest.param("1.1", "Close", False, id="1.1 Close"),
        pytest.param("1.1", "keep-alive", True, id="1.1 keep-alive"),
        pytest.param("1.1", "Upgrade, HTTP2-Settings", True, id="1.1 something else"),
        pytest.param("1.1", "keep-alive, close", False, id="1.1 both"),
        pytest.param("1.1", "TE,close", False, id="1.1 close in a list"),
        pytest.param("1.1", "", True, id="1.1 empty"),
        pytest.param("1.0", None, False, id="1.0"),
        pytest.param("1.0", "close", False, id="1.0 close"),
        pytest.param("1.0", "keep-alive", True, id="1.0 keep-alive"),
        pytest.param("1.0", "Keep-Alive", True, id="1.0 Keep-Alive"),
        pytest.param("1.0", "Keep-Alive, close", False, id="1.0 both"),
        pytest.param("1.0", "", False, id="1.0 empty"),
    ],
)
def test_connection_stays_open(http: str, connection: str | None, keep_alive: bool) -> None:
    fields = () if connection is None else (f"Connection: {connection}",)
    assert parsed(head(*fields, line=f"GET / HTTP/{http}")).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("text", "size"),
    [
        pytest.param("0", 0, id="zero"),
        pytest.param("5", 5, id="five"),
        pytest.param("007", 7, id="leading zeros"),
        pytest.param("9" * 15, 10**15 - 1, id="15 digits"),
    ],
)
def test_content_length_is_read(text: str, size: int) -> None:
    assert parsed(head(f"Content-Length: {text}")).body_size == size


# -- 2. What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param(["Content-Length: 5", "Content-Length: 6"], 400, id="two lengths"),
        pytest.param(["Content-Length: 5", "content-length: 5"], 400, id="twice the same length"),
        pytest.param(["Content-Length: 5, 5"], 400, id="two lengths in one field"),
        pytest.param(["Content-Length: +5"], 400, id="plus"),
        pytest.param(["Content-Length: -5"], 400, id="minus"),
        pytest.param(["Content-Length: -0"], 400, id="minus zero"),
        pytest.param(["Content-Length: 5_0"], 400, id="underscore"),
        pytest.param(["Content-Length: 0x5"], 400, id="hexadecimal"),
        pytest.param(["Content-Length: 5.0"], 400, id="fraction"),
        pytest.param(["Content-Length: 5 0"], 400, id="blank inside"),
        pytest.param(["Content-Length:"], 400, id="empty length"),
        pytest.param(["Content-Length: " + "9" * 16], 400, id="16 digits"),
        pytest.param(["Content-Length: " + "9" * 5000], 400, id="5,000 digits"),
        pytest.param(["Content-Length: \N{ARABIC-INDIC DIGIT THREE}"], 400, id="arabic digit"),
        pytest.param(["Content-Length: \N{FULLWIDTH DIGIT FIVE}"], 400, id="wide digit"),
        pytest.param(["Content-Length: ²"], 400, id="superscript"),
        pytest.param(
            ["Content-Length: 5", "Transfer-Encoding: chunked"], 400, id="length and encoding"
        ),
        pytest.param(
            ["Transfer-Encoding: chunked", "Content-Length: 5"], 400, id="encoding and length"
        ),
        pytest.param(
            ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], 400, id="two encodings"
        ),
        pytest.param(["Host: other"], 400, id="two hosts"),
        pytest.param(["host: ota"], 400, id="the same host twice"),
        pytest.param(["Authorization: a", "Authorization: b"], 400, id="two authorizations"),
        pytest.param(["Range: bytes=0-1", "Range: bytes=2-3"], 400, id="two ranges"),
        pytest.param(["If-Range: a", "If-Range: b"], 400, id="two If-Range"),
        pytest.param(["User-Agent: a", "User-Agent: b"], 400, id="two user agents"),
        pytest.param(
            ["x-ESP8266-version: 1.0.0", "x-esp8266-VERSION: 2.0.0"], 400, id="two versions"
        ),
        pytest.param(["x-ESP32-STA-MAC: a", "x-ESP32-STA-MAC: a"], 400, id="two MACs"),
        pytest.param(["x-a : b"], 400, id="blank before the colon"),
        pytest.param(["x-a\t: b"], 400, id="tab before the colon"),
        pytest.param(["Transfer-Encoding : chunked"], 400, id="smuggled encoding"),
        pytest.param([" x-a: b"], 400, id="blank at the start"),
        pytest.param(["x-a: b", " c"], 400, id="folded line"),
        pytest.param(["x-a: b", "\tc"], 400, id="line folded by a tab"),
        pytest.param(["x-a"], 400, id="no colon"),
        pytest.param([": b"], 400, id="no name"),
        pytest.param(["x a: b"], 400, id="blank in the name"),
        pytest.param(["x(a): b"], 400, id="name that is no token"),
        pytest.param(["xä: b"], 400, id="umlaut in the name"),
        pytest.param(["x-a: b\x00c"], 400, id="NUL"),
        pytest.param(["x-a: b\x0bc"], 400, id="vertical tab"),
        pytest.param(["x-a: b\x7fc"], 400, id="DEL"),
        pytest.param(["x-a: b\rc"], 400, id="bare CR"),
        pytest.param(["x-a: b\nx-c: d"], 400, id="bare LF"),
        pytest.param(["x-a: b\n"], 400, id="LF CR LF"),
        pytest.param(["x-a: b\r"], 400, id="CR CR LF"),
    ],
)
def test_fields_are_refused(fields: list[str], status: int, http: str) -> None:
    assert status_of(head(*fields, line=f"GET /firmware HTTP/{http}")) == status


@pytest.mark.parametrize("coding", ["chunked", "identity", "gzip, chunked", "xchunked", ""])
def test_transfer_encoding_is_not_implemented_and_wrong_in_http_1_0(coding: str) -> None:
    field = f"Transfer-Encoding: {coding}"
    assert status_of(head(field)) == 501
    assert status_of(head(field, line="GET / HTTP/1.0")) == 400


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("", id="missing"),
        pytest.param("Host:", id="empty"),
        pytest.param("Host: a b", id="blank"),
        pytest.param("Host: a, b", id="list"),
        pytest.param("Host: a/b", id="slash"),
        pytest.param("Host: http://a", id="URL"),
        pytest.param("Host: user@a", id="user"),
        pytest.param("Host: a?b", id="query"),
        pytest.param("Host: a#b", id="fragment"),
        pytest.param("Host: a:b", id="port that is no number"),
        pytest.param("Host: a:1:2", id="two ports"),
        pytest.param("Host: ::1", id="IPv6 without brackets"),
        pytest.param("Host: [::1", id="half a bracket"),
        pytest.param('Host: a"><script>', id="markup"),
        pytest.param("Host: ä", id="umlaut"),
        pytest.param("Host: :80", id="port alone"),
    ],
)
def test_host_is_refused(host: str) -> None:
    assert status_of(head(host=host)) == 400
    if host:
        assert status_of(head(host=host, line="GET / HTTP/1.0")) == 400


@pytest.mark.parametrize("http", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("firmware", id="no slash"),
        pytest.param("", id="empty"),
        pytest.param("*", id="asterisk"),
        pytest.param("?x=1", id="query alone"),
        pytest.param("/%zz", id="percent and no digits"),
        pytest.param("/%", id="percent alone"),
        pytest.param("/%4", id="one digit"),
        pytest.param("/%u0041", id="%u"),
        pytest.param("/?%zz", id="percent in the query"),
        pytest.param('/"', id="quote"),
        pytest.param("/<a>", id="angle brackets"),
        pytest.param("/a\\b", id="backslash"),
        pytest.param("/a^b", id="caret"),
        pytest.param("/a`b", id="backtick"),
        pytest.param("/{a}", id="braces"),
        pytest.param("/a|b", id="bar"),
        pytest.param("/[a]", id="brackets"),
        pytest.param("/a#b", id="fragment"),
        pytest.param("/a b", id="blank"),
        pytest.param("/a\tb", id="tab"),
        pytest.param("/ä", id="umlaut"),
        pytest.param("/a\x00b", id="raw NUL"),
        pytest.param("/a%00b", id="NUL"),
        pytest.param("/a%0ab", id="line feed"),
        pytest.param("/a%0D%0Ab", id="CR LF"),
        pytest.param("/a%1bb", id="escape"),
        pytest.param("/a%7f", id="DEL"),
        pytest.param("http://", id="absolute without host"),
        pytest.param("http:///a", id="absolute with an empty host"),
        pytest.param("http://user@ota/a", id="absolute with a user"),
        pytest.param("ftp://ota/a", id="another scheme"),
        pytest.param("javascript:alert(1)", id="script"),
        pytest.param("ota:443", id="authority"),
        pytest.param("http://ota/a#b", id="absolute with a fragment"),
    ],
)
def test_target_is_refused(target: str, http: str) -> None:
    assert status_of(head(line=f"GET {target} HTTP/{http}")) == 400


@pytest.mark.parametrize(
    ("line", "status"),
    [
        pytest.param("CONNECT ota:443 HTTP/1.1", 400, id="CONNECT"),
        pytest.param("GET /", 400, id="HTTP/0.9 without a version"),
        pytest.param("GET / HTTP/0.9", 505, id="HTTP/0.9"),
        pytest.param("GET / HTTP/1.2", 505, id="HTTP/1.2"),
        pytest.param("GET / HTTP/2.0", 505, id="HTTP/2.0"),
        pytest.param("PRI * HTTP/2.0", 505, id="preface of HTTP/2"),
        pytest.param("GET / HTTP/2", 400, id="HTTP/2"),
        pytest.param("GET / HTTP/1", 400, id="HTTP/1"),
        pytest.param("GET / HTTP/1.1_0", 400, id="HTTP/1.1_0"),
        pytest.param("GET / HTTP/01.1", 400, id="HTTP/01.1"),
        pytest.param("GET / HTTP/1.10", 400, id="HTTP/1.10"),
        pytest.param("GET / HTTP/1.\N{ARABIC-INDIC DIGIT ONE}", 400, id="arabic digit"),
        pytest.param("GET / HTTP/+1.1", 400, id="sign"),
        pytest.param("GET / HTTP/1 .1", 400, id="blank in the version"),
        pytest.param("GET / http/1.1", 400, id="lower case"),
        pytest.param("GET / HTTPS/1.1", 400, id="HTTPS"),
        pytest.param("GET  / HTTP/1.1", 400, id="two blanks"),
        pytest.param("GET /  HTTP/1.1", 400, id="two blanks before the version"),
        pytest.param("GET / HTTP/1.1 ", 400, id="blank at the end"),
        pytest.param(" GET / HTTP/1.1", 400, id="blank at the start"),
        pytest.param("GET\t/\tHTTP/1.1", 400, id="tabs"),
        pytest.param("G@T / HTTP/1.1", 400, id="method that is no token"),
        pytest.param("/ HTTP/1.1", 400, id="no method"),
        pytest.param("\x16\x03\x01\x02", 400, id="TLS"),
        pytest.param("SSH-2.0-OpenSSH_9.2", 400, id="SSH"),
    ],
)
def test_request_line_is_refused(line: str, status: int) -> None:
    assert status_of(head(line=line)) == status


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="an empty line"),
        pytest.param(b"\r\n\r\n", id="two empty lines"),
        pytest.param(b"GET / HTTP/1.1\nHost: ota\n\n", id="LF everywhere"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: ota\r\n", id="no empty line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: ota\r\n\r\nx", id="more than the head"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: ota\r\n\n", id="LF for the empty line"),
        pytest.param(b"\r\nGET / HTTP/1.1\r\nHost: ota\r\n\r\n", id="empty line before"),
        pytest.param(b"\xef\xbb\xbfGET / HTTP/1.1\r\nHost: ota\r\n\r\n", id="byte order mark"),
    ],
)
def test_what_is_no_head_is_refused(data: bytes) -> None:
    assert status_of(data) == 400


# -- 3. Hostile bytes ------------------------------------------------------------------------------

PIECES = st.one_of(
    st.sampled_from([b"\r\n", b"\n", b": ", b" ", b"\t", b"GET / HTTP/1.1\r\n", b"Host: ota\r\n"]),
    st.sampled_from([b"Content-Length: ", b"Transfer-Encoding: ", b"chunked", b"0", b"http://"]),
    st.binary(max_size=6),
)


@settings(deadline=None, max_examples=500)
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=12).map(b"".join)))
def test_random_bytes_are_a_request_or_refused(data: bytes) -> None:
    try:
        request = parsed(data)
    except Refused as refused:
        status = refused.status
    else:
        status = 400 if request.path.startswith("/") else 0
    assert status in {400, 501, 505}


@settings(deadline=None)
@given(
    st.lists(st.text("abcxyz-", min_size=1, max_size=8).map("q".__add__), unique=True, max_size=5),
    st.text("!~azAZ059:;,\"'()<> ", max_size=20),
)
def test_fields_come_out_as_they_went_in(names: list[str], value: str) -> None:
    request = parsed(head(*(f"{name}: {value}" for name in names)))
    assert request.headers == {"host": "ota"} | dict.fromkeys(names, value.strip())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n" + b"a:" * 4000 + b"\r\n\r", id="colons"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b" " * 8000 + b"\r", id="blanks"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b"a\t " * 2700 + b"\x00\r\n\r\n", id="tabs"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 2000, id="fields without end"),
        pytest.param(b"GET /" + b"%41" * 2600 + b"% HTTP/1.1\r\nHost: a\r\n\r\n", id="percents"),
        pytest.param(b"GET " + b"/" * 8000 + b'" HTTP/1.1\r\nHost: a\r\n\r\n', id="slashes"),
        pytest.param(b"A" * 8000, id="letters"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: " + b"a." * 4000 + b"@\r\n\r\n", id="dots"),
        pytest.param(b"GET /" + b"?a=" * 2600 + b"# HTTP/1.1\r\nHost: a\r\n\r\n", id="queries"),
    ],
)
def test_head_made_to_take_long_is_refused_all_the_same(data: bytes) -> None:
    for _ in range(50):  # a regex that backtracks needs minutes for one
        assert status_of(data) == 400
