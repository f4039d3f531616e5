"""Replies: ranges, conditions and headers; then answer(site, Request), without sockets."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import (
    RETRY_SECONDS,
    DirectoryCatalog,
    Event,
    Image,
    Objection,
    Refused,
    Release,
    Reply,
    Report,
    Request,
    Route,
    Site,
    Version,
    answer,
    build_site,
    image_reply,
    is_not_modified,
    parse_head,
    parse_range,
    refusal,
    render,
    text_reply,
)
from tests.conftest import put, site_of
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Esp32, Esp8266

PEER = "192.0.2.7"
OLD = {"x-esp8266-version": "1.0.0"}
DEVICE = OLD | {"x-esp8266-sta-mac": "5C:CF:7F:12:34:56", "user-agent": "ESP8266-http-Update"}
MODIFIED = 784111777  # Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110 5.6.7
ETAG = '"abc"'


def request_of(target: str, headers: dict[str, str] | None = None, method: str = "GET") -> Request:
    path, _, query = target.partition("?")
    return Request(method, path, query, headers or {}, PEER)


def ask(
    site: Site, target: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[Reply, bytes]:
    """The reply and what would be sent behind its head; the file is closed."""
    reply = answer(site, request_of(target, headers, method))
    if isinstance(reply.body, bytes):
        return reply, reply.body
    with reply.body.file as file:
        return reply, file.read()[reply.part.start : reply.part.stop]


def text_of(site: Site, target: str, headers: dict[str, str] | None = None) -> str:
    return ask(site, target, headers)[1].decode()


def status_of(site: Site, target: str, headers: dict[str, str] | None = None) -> int:
    return ask(site, target, headers)[0].status


@pytest.fixture
def site(folder: Path) -> Site:
    return site_of(folder)


@pytest.fixture
def mixed(tmp_path: Path) -> Site:
    """A site with `node` 1.0.0 for the ESP8266 and 2.0.0 for the ESP32."""
    put(tmp_path / "mixed" / "node-1.0.0.bin", esp8266_image("node", "1.0.0"))
    put(tmp_path / "mixed" / "node-2.0.0.bin", esp32_image("node", "2.0.0"))
    return site_of(tmp_path / "mixed")


# -- 1. Ranges: RFC 9110 14 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("bytes=0-0", range(1), id="first byte"),
        pytest.param("bytes=0-9", range(10), id="first ten"),
        pytest.param("bytes=10-19", range(10, 20), id="in the middle"),
        pytest.param("bytes=90-", range(90, 100), id="from 90 on"),
        pytest.param("bytes=0-", range(100), id="all from 0 on"),
        pytest.param("bytes=99-99", range(99, 100), id="last byte"),
        pytest.param("bytes=90-1000", range(90, 100), id="end beyond the file"),
        pytest.param("bytes=-1", range(99, 100), id="suffix of one"),
        pytest.param("bytes=-10", range(90, 100), id="suffix"),
        pytest.param("bytes=-100", range(100), id="suffix of all"),
        pytest.param("bytes=-1000", range(100), id="suffix longer than the file"),
        pytest.param("BYTES=0-9", range(10), id="upper case"),
        pytest.param(" bytes=0-9 ", range(10), id="blanks around"),
        pytest.param("bytes=00-09", range(10), id="leading zeros"),
        pytest.param(f"bytes=5-{'9' * 15}", range(5, 100), id="15 digits"),
    ],
)
def test_range_is_read(text: str, expected: range) -> None:
    assert parse_range(text, 100) == expected


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="none"),
        pytest.param("bytes", id="unit alone"),
        pytest.param("bytes=", id="empty"),
        pytest.param("bytes=-", id="hyphen alone"),
        pytest.param("Bytes=-", id="hyphen alone, upper case"),
        pytest.param("bytes=--1", id="two hyphens"),
        pytest.param("bytes=9-0", id="end before start"),
        pytest.param("bytes=0-1,5-6", id="two ranges"),
        pytest.param("bytes=0-1, 5-6", id="two ranges and a blank"),
        pytest.param("bytes=0-1,", id="comma behind"),
        pytest.param("bytes = 0-1", id="blanks around ="),
        pytest.param("bytes=0 - 1", id="blanks around -"),
        pytest.param("bytes=+0-1", id="sign"),
        pytest.param("bytes=0x0-1", id="hexadecimal"),
        pytest.param("bytes=0_0-1", id="underscore"),
        pytest.param("bytes=a-b", id="letters"),
        pytest.param("bytes=\N{ARABIC-INDIC DIGIT ONE}-", id="arabic digit"),
        pytest.param("bytes=0-\N{SUPERSCRIPT TWO}", id="superscript"),
        pytest.param("items=0-1", id="another unit"),
        pytest.param("kilobytes=0-1", id="unit that ends in bytes"),
        pytest.param(f"bytes={'9' * 100}-", id="100 digits"),
        pytest.param("bytes=0-" + "9" * 5000, id="5,000 digits"),
    ],
)
def test_what_is_no_single_range_is_ignored(text: str) -> None:
    assert parse_range(text, 100) is None


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("bytes=100-", id="just behind the end"),
        pytest.param("bytes=100-200", id="behind the end"),
        pytest.param(f"bytes={'9' * 15}-", id="far behind the end"),
        pytest.param("bytes=-0", id="suffix of nothing"),
    ],
)
def test_range_behind_the_end_is_416_that_names_the_size(text: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_range(text, 100)
    assert caught.value.status == 416
    assert caught.value.headers == (("Content-Range", "bytes */100"),)


@settings(deadline=None, max_examples=300)
@given(
    st.binary(min_size=1, max_size=50),
    st.one_of(st.none(), st.integers(0, 60)),
    st.one_of(st.none(), st.integers(0, 60)),
)
def test_range_is_a_slice(data: bytes, first: int | None, last: int | None) -> None:
    text = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is not None:
        expected = data[first : None if last is None else last + 1]
    else:
        expected = data[-last:] if last else b""
    if (first is None and last is None) or (None not in (first, last) and first > last):  # type: ignore[operator]
        assert parse_range(text, len(data)) is None
    elif not expected:
        with pytest.raises(Refused):
            parse_range(text, len(data))
    else:
        part = parse_range(text, len(data))
        assert part is not None
        assert data[part.start : part.stop] == expected


@settings(deadline=None, max_examples=300)
@given(st.text("bytesBYTES=-,0123456789 ", max_size=14), st.integers(1, 20))
def test_any_range_is_a_part_nothing_or_416(text: str, size: int) -> None:
    try:
        part = parse_range(text, size)
    except Refused as refused:
        status = refused.status
    else:
        status = 416
        assert part is None or 0 <= part.start < part.stop <= size
    assert status == 416


# -- 2. Conditions: RFC 9110 13 --------------------------------------------------------------------

BEFORE, AT, AFTER = (formatdate(MODIFIED + each, usegmt=True) for each in (-60, 0, 60))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param({}, False, id="no condition"),
        pytest.param({"if-none-match": ETAG}, True, id="none-match"),
        pytest.param({"if-none-match": f"W/{ETAG}"}, True, id="none-match, weak"),
        pytest.param({"if-none-match": "*"}, True, id="none-match, any"),
        pytest.param({"if-none-match": '"x"'}, False, id="none-match, another"),
        pytest.param({"if-none-match": "abc"}, False, id="none-match without quotes"),
        pytest.param({"if-none-match": ""}, False, id="none-match, empty"),
        pytest.param({"if-none-match": f'"x", {ETAG}'}, True, id="none-match, list"),
        pytest.param({"if-none-match": f'"x",W/{ETAG}'}, True, id="none-match, list, no blank"),
        pytest.param({"if-none-match": '"x", "y"'}, False, id="none-match, list of others"),
        pytest.param({"if-modified-since": AT}, True, id="modified-since its date"),
        pytest.param({"if-modified-since": AFTER}, True, id="modified-since later"),
        pytest.param({"if-modified-since": BEFORE}, False, id="modified-since earlier"),
        pytest.param({"if-modified-since": "yesterday"}, False, id="modified-since no date"),
        pytest.param({"if-modified-since": ""}, False, id="modified-since nothing"),
        pytest.param(
            {"if-none-match": '"x"', "if-modified-since": AT}, False, id="none-match before date"
        ),
        pytest.param(
            {"if-none-match": ETAG, "if-modified-since": BEFORE}, True, id="none-match wins"
        ),
        pytest.param({"if-match": ETAG}, False, id="match"),
        pytest.param({"if-match": "*"}, False, id="match any"),
        pytest.param({"if-match": f'"x", {ETAG}'}, False, id="match in a list"),
        pytest.param({"if-match": ETAG, "if-none-match": ETAG}, True, id="match, then none-match"),
        pytest.param(
            {"if-match": ETAG, "if-unmodified-since": BEFORE}, False, id="match before date"
        ),
        pytest.param({"if-unmodified-since": AT}, False, id="unmodified-since its date"),
        pytest.param({"if-unmodified-since": AFTER}, False, id="unmodified-since later"),
        pytest.param({"if-unmodified-since": "soon"}, False, id="unmodified-since no date"),
        pytest.param(
            {"if-unmodified-since": AFTER, "if-modified-since": AFTER}, True, id="both dates"
        ),
    ],
)
def test_condition_says_whether_the_client_has_it(headers: dict[str, str], expected: bool) -> None:
    assert is_not_modified(headers, ETAG, MODIFIED) is expected


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"if-match": '"x"'}, id="another tag"),
        pytest.param({"if-match": '"x", "y"'}, id="other tags"),
        pytest.param({"if-match": f"W/{ETAG}"}, id="weak tag"),
        pytest.param({"if-match": ""}, id="empty"),
        pytest.param({"if-unmodified-since": BEFORE}, id="changed since"),
        pytest.param({"if-match": '"x"', "if-none-match": ETAG}, id="match before none-match"),
        pytest.param({"if-match": '"x"', "if-unmodified-since": AFTER}, id="match before date"),
    ],
)
def test_failed_precondition_is_412(headers: dict[str, str]) -> None:
    with pytest.raises(Refused) as caught:
        is_not_modified(headers, ETAG, MODIFIED)
    assert caught.value.status == 412


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/New_York"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another place on earth."""
    if sys.platform == "win32":
        pytest.skip("Windows has no tzset()")
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "date",
    [
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", id="IMF-fixdate"),
        pytest.param("Sunday, 06-Nov-94 08:49:37 GMT", id="RFC 850"),
        pytest.param("Sun Nov  6 08:49:37 1994", id="asctime"),
    ],
)
def test_date_of_each_form_is_read_as_utc_wherever_the_server_stands(date: str) -> None:
    assert is_not_modified({"if-modified-since": date}, ETAG, MODIFIED)
    assert not is_not_modified({"if-modified-since": date}, ETAG, MODIFIED + 1)


DATE_WORDS = ["Mon,", "1", "99", "Jan", "Foo", "0001", "9999", "99999", "00:00:00", "9:9", "-2359"]
DATES = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"[MSma-z]{0,3},? [0-9]{1,2} (Jan|Nov) [0-9]{1,5} [0-9:.]{0,9} [GMT+0-9-]{0,6}"),
    st.lists(st.sampled_from([*DATE_WORDS, "GMT"]), max_size=7).map(" ".join),
)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(["if-modified-since", "if-unmodified-since"]), DATES)
def test_any_date_is_a_condition_none_or_412(name: str, text: str) -> None:
    try:
        is_not_modified({name: text}, ETAG, MODIFIED)
    except Refused as refused:
        status = refused.status
    else:
        status = 412
    assert status == 412


# -- 3. The reply with an image --------------------------------------------------------------------


@pytest.fixture
def opened(site: Site) -> Iterator[tuple[Release, Image]]:
    release = site.catalog.releases("firmware")[0]
    image = site.catalog.open(release)
    with image.file:
        yield release, image


def test_image_comes_with_exactly_these_headers(opened: tuple[Release, Image]) -> None:
    release, image = opened
    data = Path(release.path).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    reply = image_reply(request_of("/firmware"), release, image, "no-transform")
    assert (reply.status, reply.body, reply.part) == (200, image, range(len(data)))
    assert sorted(reply.headers) == sorted(
        (
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(len(data))),
            ("Content-Disposition", 'attachment; filename="firmware-1.10.0.bin"'),
            ("Accept-Ranges", "bytes"),
            ("x-MD5", hashlib.md5(data, usedforsecurity=False).hexdigest()),
            ("x-SHA256", sha256),
            ("x-version", "1.10.0"),
            ("ETag", f'"{sha256[:32]}"'),
            ("Last-Modified", formatdate(release.modified, usegmt=True)),
            ("Cache-Control", "no-transform"),
        )
    )


@pytest.mark.parametrize(
    ("name", "disposition"),
    [
        pytest.param("my app-1.0.bin", 'filename="my app-1.0.bin"', id="blank"),
        pytest.param(
            'a"b-1.0.bin', "filename=\"a?b-1.0.bin\"; filename*=UTF-8''a%22b-1.0.bin", id="quote"
        ),
        pytest.param(
            "a\\b-1.0.bin", "filename=\"a?b-1.0.bin\"; filename*=UTF-8''a%5Cb-1.0.bin", id="\\"
        ),
        pytest.param(
            "café-1.0.bin", "filename=\"caf?-1.0.bin\"; filename*=UTF-8''caf%C3%A9-1.0.bin", id="é"
        ),
        pytest.param(
            "caf\udce9-1.0.bin",
            "filename=\"caf?-1.0.bin\"; filename*=UTF-8''caf%E9-1.0.bin",
            id="?",
        ),
        pytest.param(
            "a\r\nx: y-1.0.bin",
            "filename=\"a??x: y-1.0.bin\"; filename*=UTF-8''a%0D%0Ax%3A%20y-1.0.bin",
            id="line break",
        ),
    ],
)
def test_file_name_is_safe_in_content_disposition(
    opened: tuple[Release, Image], name: str, disposition: str
) -> None:
    release = dataclasses.replace(opened[0], name=name)
    reply = image_reply(request_of("/firmware"), release, opened[1], "no-cache")
    assert dict(reply.headers)["Content-Disposition"] == f"attachment; {disposition}"


@settings(deadline=None)
@given(name=st.text(max_size=40), keep_alive=st.booleans(), now=st.integers(0, 2**32))
def test_head_never_holds_a_line_break_from_a_file_name(
    name: str, keep_alive: bool, now: int
) -> None:
    release = Release("p", Version.parse("1.0.0"), "sketch", "/srv/p", name, (1, 2, 3, 4, 5))
    with Path(os.devnull).open("rb", buffering=0) as file:
        image = Image(file, 3, "0" * 32, "1" * 64, release.identity)
        reply = image_reply(request_of("/p"), release, image, "no-cache")
    head = render(reply, now=now, keep_alive=keep_alive)
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert len(lines) == 1 + len(reply.headers) + 3
    assert not re.search(rb"[\x00-\x1f\x7f-\xff]", b"".join(lines))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_part_of_an_image_is_206_for_get_alone(site: Site, folder: Path, method: str) -> None:
    data = (folder / "firmware-1.10.0.bin").read_bytes()
    reply, body = ask(site, "/firmware", OLD | {"range": "bytes=100-199"}, method)
    headers = dict(reply.headers)
    if method == "HEAD":  # RFC 9110 14.2: Range is defined for GET alone
        assert (reply.status, body, headers["Content-Length"]) == (200, b"", str(len(data)))
        return
    assert (reply.status, body) == (206, data[100:200])
    assert headers["Content-Length"] == "100"
    assert headers["Content-Range"] == f"bytes 100-199/{len(data)}"
    assert headers["x-MD5"] == hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_parts_of_an_image_make_the_whole(site: Site, folder: Path) -> None:
    data = (folder / "firmware-1.10.0.bin").read_bytes()
    steps = range(0, len(data), 1000)
    headers = [OLD | {"range": f"bytes={at}-{at + 999}"} for at in steps]
    assert b"".join(ask(site, "/firmware", each)[1] for each in headers) == data


def test_range_behind_the_end_is_416(site: Site, folder: Path) -> None:
    size = (folder / "firmware-1.10.0.bin").stat().st_size
    reply, _ = ask(site, "/firmware", OLD | {"range": f"bytes={size}-"})
    assert reply.status == 416
    assert dict(reply.headers)["Content-Range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        pytest.param("ETag", 206, id="its tag"),
        pytest.param("Last-Modified", 206, id="its date"),
        pytest.param('"x"', 200, id="another tag"),
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", 200, id="another date"),
        pytest.param("W/ETag", 200, id="its tag, weak"),
        pytest.param("nonsense", 200, id="neither"),
    ],
)
def test_part_is_sent_only_of_the_image_it_was_begun_with(
    site: Site, condition: str, status: int
) -> None:
    validators = dict(ask(site, "/firmware", OLD)[0].headers)
    value = validators.get(condition, condition).replace("W/ETag", f"W/{validators['ETag']}")
    reply, body = ask(site, "/firmware", OLD | {"range": "bytes=10-", "if-range": value})
    assert reply.status == status
    assert len(body) == int(dict(reply.headers)["Content-Length"])


def test_client_that_has_the_image_gets_304_without_a_body(site: Site) -> None:
    validators = dict(ask(site, "/firmware", OLD)[0].headers)
    for name, validator in (("if-none-match", "ETag"), ("if-modified-since", "Last-Modified")):
        reply, body = ask(site, "/firmware", OLD | {name: validators[validator]})
        assert (reply.status, body) == (304, b"")
        headers = dict(reply.headers)
        for field in ("ETag", "Last-Modified", "Cache-Control"):
            assert headers[field] == validators[field]  # RFC 9110 15.4.5
        assert "Content-Length" not in headers


def test_download_begun_with_another_image_is_412(site: Site) -> None:
    assert status_of(site, "/firmware", OLD | {"if-match": '"x"'}) == 412


# -- 4. Heads and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", [True, False])
def test_head_is_rendered_in_order_with_date_server_and_connection(keep_alive: bool) -> None:
    reply = Reply(200, (("x-MD5", "0"), ("ETag", '"1"')))
    assert render(reply, now=MODIFIED, keep_alive=keep_alive).decode().split("\r\n") == [
        "HTTP/1.1 200 OK",
        "x-MD5: 0",
        'ETag: "1"',
        "Server: ota-server",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
        "Date: Sun, 06 Nov 1994 08:49:37 GMT",
        "",
        "",
    ]


@settings(deadline=None)
@given(st.sampled_from([400, 401, 403, 404, 405, 412, 416, 431, 500, 501, 503, 505]), st.text())
def test_refusal_is_one_head_whatever_its_reason(status: int, reason: str) -> None:
    reply = refusal(Refused(status, reason))
    head = render(reply, now=0, keep_alive=False).partition(b"\r\n\r\n")[0]
    assert len(head.split(b"\r\n")) == 1 + len(reply.headers) + 3
    assert head.isascii()
    assert isinstance(reply.body, bytes)
    assert dict(reply.headers)["Content-Length"] == str(len(reply.body))


def test_refusal_says_why_in_a_header_and_in_one_line_of_text() -> None:
    reply = refusal(Refused(404, 'no project "über"', ("Allow", "GET")))
    headers = dict(reply.headers)
    assert (reply.status, reply.body) == (404, 'no project "über"\n'.encode())
    assert headers["X-OTA-Reason"] == "no project ??ber?"
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Allow"] == "GET"
    assert "Retry-After" not in headers


def test_refusal_with_503_says_when_to_come_again() -> None:
    headers = dict(refusal(Refused(503, "later")).headers)
    assert headers["Retry-After"] == str(RETRY_SECONDS)


def test_text_is_one_line() -> None:
    assert text_reply(200, "ok").body == b"ok\n"


# -- 5. Answers to devices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("/firmware", id="project"),
        pytest.param("/anything/deep/firmware", id="deep"),
        pytest.param("/anything/deep/firmware?x=1", id="deep with a query"),
        pytest.param("/firmware?version=9.9.9", id="query"),
        pytest.param("/firmware/", id="slash behind"),
        pytest.param("//firmware", id="two slashes"),
        pytest.param("/../firmware", id="dots"),
    ],
)
@pytest.mark.parametrize("header", ["x-esp8266-version", "x-esp32-version"])
def test_last_part_of_the_path_is_the_project(site: Site, target: str, header: str) -> None:
    reply, body = ask(site, target, {header: "1.0.0"})
    if header == "x-esp32-version":
        assert reply.status == 403
        return
    assert reply.status == 200
    assert b"OTA-EXAMPLE firmware 1.10.0" in body


def test_device_on_the_newest_release_gets_304_that_says_why(site: Site) -> None:
    for version in ("1.10.0", "v1.10", "1.11.0", "2.0.0"):
        reply, body = ask(site, "/firmware", {"x-esp8266-version": version})
        assert (reply.status, body) == (304, b"")
        assert dict(reply.headers)["X-OTA-Reason"].startswith("not-newer: 1.10.0 is not newer")


def test_device_that_forgot_to_bump_its_version_gets_304(site: Site) -> None:
    device = Esp8266(host="x", port=80, image=esp8266_image("firmware", "1.10.0"), flash_mode=3)
    reply, _ = ask(site, "/firmware", OLD | {"x-esp8266-sketch-md5": device.sketch_md5})
    assert reply.status == 304
    assert dict(reply.headers)["X-OTA-Reason"].startswith("same-image")


def test_question_for_the_newest_version_is_answered_with_200_and_x_version(site: Site) -> None:
    reply, _ = ask(site, "/firmware", DEVICE | {"x-esp8266-mode": "version"})
    assert (reply.status, dict(reply.headers)["x-version"]) == (200, "1.10.0")


def test_device_without_room_gets_no_image(site: Site) -> None:
    reply, _ = ask(site, "/firmware", OLD | {"x-esp8266-free-space": "4096"})
    assert reply.status == 304
    assert dict(reply.headers)["X-OTA-Reason"].startswith("too-big")


def test_sketch_never_becomes_a_filesystem(site: Site) -> None:
    reply, _ = ask(site, "/firmware", OLD | {"x-esp8266-mode": "spiffs"})
    assert reply.status == 304
    assert dict(reply.headers)["X-OTA-Reason"].startswith("wrong-kind")


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        pytest.param({"x-esp8266-version": "0.9.0"}, "1.0.0", id="ESP8266"),
        pytest.param({"x-esp32-version": "0.9.0"}, "2.0.0", id="ESP32"),
    ],
)
def test_project_of_two_families_serves_each_its_own(
    mixed: Site, headers: dict[str, str], version: str
) -> None:
    reply, _ = ask(mixed, "/node", headers)
    assert (reply.status, dict(reply.headers)["x-version"]) == (200, version)


@pytest.mark.parametrize(
    ("target", "headers", "status", "sentence"),
    [
        pytest.param("/toaster", OLD, 404, "no project 'toaster'", id="unknown project"),
        pytest.param("/firm", OLD, 404, "no project 'firm'", id="start of a project"),
        pytest.param("/toaster", {}, 404, "no project 'toaster'", id="unknown, no version"),
        pytest.param("/firmware", {}, 400, "no x-ESP8266-version or x-ESP32-version", id="curl"),
        pytest.param(
            "/firmware", {"x-esp8266-version": ""}, 400, "no x-ESP8266-version", id="empty version"
        ),
        pytest.param(
            "/firmware", {"x-esp8266-version": "new"}, 400, "'new' is no version", id="unreadable"
        ),
        pytest.param(
            "/firmware", OLD | {"x-esp8266-free-space": "x"}, 400, "free-space", id="no number"
        ),
        pytest.param("/", DEVICE, 404, "give the device http://", id="device without a project"),
        pytest.param(
            "/firmware", {"x-esp32-version": "1.0.0"}, 403, "wrong-chip: ", id="wrong chip"
        ),
        pytest.param("/firmware/firmware-9.9.9.bin", {}, 404, "no file", id="unknown file"),
        pytest.param("/toaster/9.9.9.bin", {}, 404, "no project", id="of no project"),
        pytest.param("/firmware/..%2fsecret.bin", {}, 404, "", id="path out, not decoded"),
        pytest.param("/firmware/../../etc/passwd.bin", {}, 404, "no project", id="path out"),
        pytest.param("/\x85\u2028\udcff", OLD, 404, "no project", id="odd characters"),
    ],
)
def test_refused_request_is_told_why_in_one_line(
    site: Site, target: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    reply, body = ask(site, target, headers)
    assert reply.status == status
    text = body.decode()
    assert sentence in text
    assert text.splitlines() == [text[:-1]]
    told = dict(reply.headers)
    assert told["X-OTA-Reason"].isascii()
    assert told["X-OTA-Reason"][:10] == text[:10]
    assert told["Content-Length"] == str(len(body))


def test_file_changed_since_its_check_is_503_with_retry_after(site: Site, folder: Path) -> None:
    put(folder / "firmware-1.10.0.bin", b"other", age=5)
    reply, body = ask(site, "/firmware", OLD)
    assert reply.status == 503
    assert dict(reply.headers)["Retry-After"] == str(RETRY_SECONDS)
    assert str(folder).encode() not in body


def test_project_not_yet_checked_is_503(folder: Path, site: Site) -> None:
    fresh = build_site(site.config, DirectoryCatalog(str(folder)))
    reply, _ = ask(fresh, "/firmware", OLD)
    assert reply.status == 503
    assert "Retry-After" in dict(reply.headers)


def test_path_of_the_server_is_never_told(site: Site, folder: Path) -> None:
    put(folder / "broken-1.0.0.bin", b"x")
    assert isinstance(site.catalog, DirectoryCatalog)
    site.catalog.scan()
    for target in ("/", "/broken", "/firmware", "/toaster", "/broken/broken-1.0.0.bin", "/healthz"):
        for headers in ({}, OLD):
            reply, body = ask(site, target, headers)
            assert str(folder.parent) not in str(reply.headers)
            assert str(folder.parent).encode() not in body


# -- 6. Downloads by name --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0.0", "1.9.0", "1.10.0"])
def test_browser_gets_any_file_by_name(site: Site, folder: Path, version: str) -> None:
    name = f"firmware-{version}.bin"
    reply, body = ask(site, f"/any/where/firmware/{name}", {"user-agent": "Mozilla/5.0"})
    assert (reply.status, body) == (200, (folder / name).read_bytes())
    assert dict(reply.headers)["x-version"] == version


def test_device_may_go_down_by_name(site: Site) -> None:
    target = "/firmware/firmware-1.0.0.bin"
    assert status_of(site, target, DEVICE | {"x-esp8266-version": "1.10.0"}) == 200


def test_device_that_runs_the_named_file_gets_304(site: Site) -> None:
    device = Esp8266(host="x", port=80, image=esp8266_image("firmware", "1.9.0"))
    headers = DEVICE | {"x-esp8266-sketch-md5": device.sketch_md5}
    assert status_of(site, "/firmware/firmware-1.9.0.bin", headers) == 304
    assert status_of(site, "/firmware/firmware-1.0.0.bin", headers) == 200


@pytest.mark.parametrize(
    ("name", "headers", "status"),
    [
        pytest.param("node-2.0.0.bin", DEVICE, 403, id="ESP32 file to an ESP8266"),
        pytest.param(
            "node-2.0.0.bin",
            {"user-agent": "ESP8266-http-Update"},
            403,
            id="ESP32 file to a redirected ESP8266",
        ),
        pytest.param(
            "node-1.0.0.bin",
            {"user-agent": "ESP32 HTTP Client/1.0"},
            403,
            id="ESP8266 file to ESP-IDF",
        ),
        pytest.param("node-1.0.0.bin", {"x-esp32-version": "1.0.0"}, 403, id="ESP8266 to an ESP32"),
        pytest.param("node-2.0.0.bin", {"x-esp32-version": "9.0.0"}, 200, id="ESP32 to an ESP32"),
        pytest.param("node-1.0.0.bin", DEVICE | {"x-esp8266-free-space": "9"}, 304, id="too big"),
    ],
)
def test_device_gets_no_named_file_that_would_harm_it(
    mixed: Site, name: str, headers: dict[str, str], status: int
) -> None:
    assert status_of(mixed, f"/node/{name}", headers) == status


def test_esp32_known_by_its_image_gets_no_file_for_another_chip(tmp_path: Path) -> None:
    image = esp32_image("c3", "1.0.0", chip_id=5)
    put(tmp_path / "c3" / "c3-1.0.0.bin", image)
    put(tmp_path / "c3" / "s3-2.0.0.bin", esp32_image("c3", "2.0.0", chip_id=9))
    device = Esp32(host="x", port=80, image=image, chip="esp32c3")
    headers = {"x-esp32-version": "1.0.0", "x-esp32-sketch-sha256": device.sketch_sha256}
    site = site_of(tmp_path)
    assert status_of(site, "/c3/s3-2.0.0.bin", headers) == 403
    assert status_of(site, "/c3", headers) == 304
    stranger = {"x-esp32-version": "1.0.0"}
    assert status_of(site, "/c3", stranger) == 403  # nobody knows which of the two it needs
    assert status_of(site, "/c3/s3-2.0.0.bin", stranger) == 200  # whoever wrote that URL does


# -- 7. Methods ------------------------------------------------------------------------------------

EVERYTHING = [
    pytest.param("/", {}, id="page"),
    pytest.param("/healthz", {}, id="health"),
    pytest.param("/favicon.ico", {}, id="icon"),
    pytest.param("/firmware", OLD, id="200"),
    pytest.param("/firmware", {"x-esp8266-version": "2.0.0"}, id="304"),
    pytest.param("/firmware", {}, id="400"),
    pytest.param("/firmware", {"x-esp32-version": "1.0.0"}, id="403"),
    pytest.param("/toaster", OLD, id="404"),
    pytest.param("/firmware", OLD | {"if-match": '"x"'}, id="412"),
    pytest.param("/firmware/firmware-1.0.0.bin", {}, id="download"),
]


@pytest.mark.parametrize(("target", "headers"), EVERYTHING)
def test_head_is_get_without_the_body(site: Site, target: str, headers: dict[str, str]) -> None:
    get, _ = ask(site, target, headers)
    head, body = ask(site, target, headers, "HEAD")
    assert (head.status, head.headers, body) == (get.status, get.headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW", "get"])
@pytest.mark.parametrize("target", ["/", "/healthz", "/firmware", "/toaster"])
def test_other_method_is_405_with_allow(site: Site, target: str, method: str) -> None:
    reply, body = ask(site, target, OLD, method)
    assert reply.status == 405
    assert dict(reply.headers)["Allow"] == "GET, HEAD, OPTIONS"
    assert method.encode() in body


@pytest.mark.parametrize("target", ["/", "/firmware", "/toaster"])
def test_options_are_told(site: Site, target: str) -> None:
    reply, body = ask(site, target, {}, "OPTIONS")
    assert (reply.status, body) == (204, b"")
    assert dict(reply.headers)["Allow"] == "GET, HEAD, OPTIONS"
    assert "Content-Length" not in dict(reply.headers)  # RFC 9110 8.6: not with a 204


# -- 8. What a site can be extended with -----------------------------------------------------------


def test_endpoint_that_raises_is_500_that_leaks_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_site: Site, _request: Request) -> Reply:
        raise RuntimeError("secret detail")

    route = Route(re.compile("/broken"), broken)
    reply, body = ask(dataclasses.replace(site, routes=(route, *site.routes)), "/broken")
    assert reply.status == 500
    assert b"secret" not in body + str(reply.headers).encode()
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])


def test_guard_refuses_before_anything_else(site: Site) -> None:
    def guard(request: Request) -> None:
        if "authorization" not in request.headers:
            raise Refused(401, "who are you?", ("WWW-Authenticate", "Basic"))

    closed = dataclasses.replace(site, guards=(guard,))
    for target, method in (("/", "GET"), ("/firmware", "GET"), ("/x", "GET"), ("/", "POST")):
        reply, body = ask(closed, target, {}, method)
        assert (reply.status, body) == (401, b"who are you?\n")
        assert dict(reply.headers)["WWW-Authenticate"] == "Basic"
    assert status_of(closed, "/firmware", OLD | {"authorization": "x"}) == 200


def test_guard_that_raises_is_500(site: Site) -> None:
    def guard(_: Request) -> None:
        raise OSError("no database")

    assert status_of(dataclasses.replace(site, guards=(guard,)), "/firmware", OLD) == 500


def test_rule_that_raises_is_500_and_never_an_image(site: Site) -> None:
    def rule(_: Report, release: Release) -> Objection | None:
        if str(release.version) == "1.9.0":
            return None
        raise ZeroDivisionError

    strict = dataclasses.replace(site, rules=(*site.rules, rule))
    reply, body = ask(strict, "/firmware", OLD)
    assert (reply.status, body) == (500, b"the server failed; its log says how\n")


def test_one_more_rule_decides_about_every_device(site: Site) -> None:
    def withdrawn(_: Report, release: Release) -> Objection | None:
        text = str(release.version)
        return Objection("withdrawn", "it was bad") if text == "1.10.0" else None

    reply, _ = ask(dataclasses.replace(site, rules=(*site.rules, withdrawn)), "/firmware", OLD)
    assert dict(reply.headers)["x-version"] == "1.9.0"


def test_listener_hears_of_every_decision(site: Site) -> None:
    events: list[Event] = []
    heard = dataclasses.replace(site, listeners=(*site.listeners, events.append))
    ask(heard, "/firmware", DEVICE)
    ask(heard, "/firmware", DEVICE | {"x-esp8266-version": "1.10.0"})
    ask(heard, "/toaster", DEVICE)
    offer, refusal_ = events
    assert isinstance(offer.outcome, Release)
    assert (offer.report.device, offer.report.address) == ("5C:CF:7F:12:34:56", PEER)
    assert str(offer.outcome.version) == "1.10.0"
    assert isinstance(refusal_.outcome, Objection)
    assert refusal_.outcome.code == "not-newer"


def test_listener_hears_of_a_device_that_asks_for_one_file_but_not_of_a_browser(site: Site) -> None:
    events: list[Event] = []
    heard = dataclasses.replace(site, listeners=(events.append,))
    ask(heard, "/firmware/firmware-1.0.0.bin", DEVICE)
    ask(heard, "/firmware/firmware-1.0.0.bin", {"user-agent": "Mozilla/5.0"})
    (event,) = events
    assert isinstance(event.outcome, Release)
    assert (str(event.outcome.version), event.report.device) == ("1.0.0", "5C:CF:7F:12:34:56")


def test_log_has_one_line_for_each_decision(site: Site, said: Callable[[], list[str]]) -> None:
    ask(site, "/firmware", DEVICE)
    ask(site, "/firmware", DEVICE | {"x-esp8266-version": "1.10.0"})
    ask(site, "/firmware", DEVICE | {"x-esp8266-free-space": "1"})
    up, stays, warning = (line for line in said() if "5C:CF:7F:12:34:56" in line)
    for part in ("INFO", PEER, "firmware", "1.0.0", "1.10.0"):
        assert part in up
    for part in ("INFO", PEER, "firmware", "not-newer"):
        assert part in stays
    for part in ("WARNING", PEER, "too-big"):
        assert part in warning


def test_log_holds_no_token_of_a_query(site: Site, said: Callable[[], list[str]]) -> None:
    for headers in (OLD, {}, {"authorization": "Bearer t0ken"}):
        for target in ("/firmware?token=t0ken", "/toaster?token=t0ken", "/?token=t0ken"):
            ask(site, target, headers)
    assert said()
    assert not [line for line in said() if "t0ken" in line]


def test_log_lines_of_odd_requests_are_single_lines(
    site: Site, said: Callable[[], list[str]]
) -> None:
    ask(site, "/a\x85\u2028b" + "c" * 5000, OLD)
    ask(site, "/firmware", {"x-esp8266-version": "\x1b[31m" + "9" * 5000})
    ask(site, "/firmware", OLD | {"x-esp8266-free-space": "1\x85" * 900})
    ask(site, "/", {}, "M" * 5000)
    assert len(said()) == 4
    for line in said():
        assert line.isprintable()
        assert len(line) < 400


# -- 9. What a person sees -------------------------------------------------------------------------


def test_page_lists_projects_releases_and_what_to_paste(site: Site, folder: Path) -> None:
    reply, body = ask(site, "/", {"host": "pi.local:8000", "user-agent": "Mozilla/5.0"})
    text = html.unescape(body.decode())
    headers = dict(reply.headers)
    assert (reply.status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Length"] == str(len(body))
    assert headers["Cache-Control"] == "no-store"
    assert '<h2 id="firmware">firmware</h2>' in text
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        path = folder / f"firmware-{version}.bin"
        assert f"{path.stat().st_size:,}" in text
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
        written = time.strftime("%Y-%m-%d %H:%M", time.gmtime(path.stat().st_mtime))
        assert written in text
        assert f'href="http://pi.local:8000/firmware/{path.name}"' in text
    assert text.index("1.10.0") < text.index("1.9.0") < text.index("1.0.0")
    assert 'ESPhttpUpdate.update(client, "http://pi.local:8000/firmware", ' in text


def test_links_of_the_page_lead_to_the_files(site: Site, folder: Path) -> None:
    put(folder / "my app" / "ärger+1-1.0.0.bin", esp8266_image("my app", "1.0.0"))
    put(folder / os.fsdecode(b"caf\xe9-1.0.0.bin"), esp8266_image("cafe", "1.0.0"))
    assert isinstance(site.catalog, DirectoryCatalog)
    site.catalog.scan()
    links = re.findall(r'href="http://ota(/[^"]+)"', text_of(site, "/", {"host": "ota"}))
    assert len(links) == 5
    for link in links:
        head = f"GET {html.unescape(link)} HTTP/1.1\r\nHost: ota\r\n\r\n".encode()
        reply = answer(site, parse_head(head, PEER))
        assert isinstance(reply.body, Image)
        reply.body.file.close()


def test_page_over_tls_links_to_https(site: Site) -> None:
    request = request_of("/", {"host": "pi.local"})._replace(secure=True)
    text = html.unescape(bytes(answer(site, request).body).decode())  # type: ignore[arg-type]
    assert "WiFiClientSecure" in text
    assert '"https://pi.local/firmware"' in text
    assert "http://" not in text


def test_page_for_an_esp32_project_shows_the_library_of_the_esp32(tmp_path: Path) -> None:
    put(tmp_path / "node-1.0.0.bin", esp32_image("node", "1.0.0"))
    text = text_of(site_of(tmp_path), "/", {"host": "ota"})
    assert "httpUpdate.update(" in text
    assert "ESPhttpUpdate" not in text


def test_page_of_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    assert "name-1.2.3.bin" in text_of(site_of(tmp_path), "/")


def test_page_says_why_a_project_offers_nothing(tmp_path: Path) -> None:
    put(tmp_path / "app-1.0.0.bin", esp8266_image("app", "1.0.0")[:-1])
    text = html.unescape(text_of(site_of(tmp_path), "/"))
    assert "app-1.0.0.bin is cut off" in text


@pytest.mark.parametrize("name", ["<script>alert(1)<", '"><img src=x onerror=alert(1)>', "a'&amp;"])
def test_names_and_host_are_text_on_the_page(tmp_path: Path, name: str) -> None:
    put(tmp_path / name.replace("/", "") / f"{name}-1.0.0.bin", esp8266_image("a", "1.0.0"))
    put(tmp_path / f"{name}-2.0.0.bin", b"broken")
    text = text_of(site_of(tmp_path), "/", {"host": f'"{name}'})
    assert "<script" not in text
    assert "<img" not in text
    assert "onerror=alert(1)>" not in text
    assert f'<h2 id="{html.escape(name)}">{html.escape(name)}</h2>' in text
    assert set(re.findall(r"<(\w+)", text)) <= set(
        "html meta title link style h1 h2 p table tr th td a code pre".split()  # noqa: SIM905
    )


def test_page_allows_its_own_style_and_nothing_else(site: Site) -> None:
    reply, body = ask(site, "/")
    policy = dict(reply.headers)["Content-Security-Policy"]
    (style,) = re.findall(r"(?s)<style>(.*?)</style>", body.decode())
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    for directive in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert directive in policy
    assert "unsafe" not in policy
    assert b" style=" not in body
    assert b"<script" not in body
    assert "//" not in body.decode().replace("http://ota-server", "").replace(";  //", "")


def test_health_is_200_until_the_folder_is_gone(site: Site, folder: Path) -> None:
    assert isinstance(site.catalog, DirectoryCatalog)
    assert ask(site, "/healthz")[1] == b"ok\n"
    away = folder.rename(folder.parent / "away")
    site.catalog.scan()
    for target, headers in (("/healthz", {}), ("/firmware", OLD), ("/", {})):
        reply, _ = ask(site, target, headers)
        assert reply.status == 503
        assert dict(reply.headers)["Retry-After"] == str(RETRY_SECONDS)
    away.rename(folder)
    site.catalog.scan()
    assert status_of(site, "/healthz") == status_of(site, "/firmware", OLD) == 200


def test_icon_is_a_small_picture(site: Site) -> None:
    reply, body = ask(site, "/favicon.ico")
    assert (reply.status, dict(reply.headers)["Content-Type"]) == (200, "image/svg+xml")
    assert body.startswith(b"<svg")
    assert len(body) < 1000
