"""Whatever bytes come: the readers refuse or read, nothing else, and in time that grows as they do.

The tables of the other tests say what is right for known input; here the input is made of valid
input that went wrong.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import (
    Facts,
    Refused,
    Version,
    inspect,
    parse_head,
    parse_range,
    read_name,
    read_report,
)
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    esp8266_signed,
    fatfs_image,
    fatfs_wl_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
)
from tests.devices import CHIP_IDS, Bricked, check_esp32, check_esp8266, eboot_copy

often = settings(max_examples=300, deadline=None)
HEAD = (
    b"GET http://ota:80/a/firmware?x=%41 HTTP/1.1\r\nHost: ota:8000\r\n"
    b"User-Agent: ESP8266-http-Update\r\nConnection: close, te\r\nContent-Length: 12\r\n"
    b"x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56\r\nx-ESP8266-free-space: 1794048\r\n"
    b"x-ESP8266-version: 1.0.0-rc.1+build\r\nRange: bytes=0-99\r\nTransfer-Encoding: x\r\n\r\n"
)
WORDS = [
    *(b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b":", b",", b"%", b"%2e%2e/", b"\r\n ", b"\xff"),
    *(b"HTTP/1.1", b"HTTP/9.9", b"Host: a\r\n", b"Content-Length: 5\r\n", b"1_0", b"-1", b"+"),
    *(b"Transfer-Encoding: chunked\r\n", b"[::1]", b"http://", b"9" * 50, "\u0661".encode()),
]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes], words: list[bytes]) -> bytes:
    """One of the originals with some of its bytes replaced, taken out, doubled or moved."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 2, 4, 16, 300])))
        piece = draw(
            st.one_of(
                st.sampled_from(words),
                st.binary(max_size=8),
                st.just(data[start:stop] * 2),
                st.just(b"".join(data[i : i + 1] for i in reversed(range(start, stop)))),
            )
        )
        data = data[:start] + piece + data[stop:]
    return data


T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def tried(error: type[E], call: Callable[..., T], *args: Any) -> T | E:
    """What the call gives back, or the one error that it may raise."""
    try:
        return call(*args)
    except error as err:
        return err


# -- 1. Requests ----------------------------------------------------------------------------------


@often
@given(mutated([HEAD, HEAD.replace(b"Transfer-Encoding: x\r\n", b"")], WORDS))
def test_mutated_head_is_refused_or_read_and_its_report_too(head: bytes) -> None:
    request = tried(Refused, parse_head, head, "192.0.2.1")
    if isinstance(request, Refused):
        assert request.status in {400, 501, 505}
        assert request.reason.isprintable()
        return
    assert re.fullmatch(r"/[^\x00-\x1f\x7f]*", request.path)
    assert request.body_size >= 0
    assert "transfer-encoding" not in request.headers
    assert not any(c in value for value in request.headers.values() for c in "\r\n\0")
    with suppress(Refused):
        read_report("firmware", request.headers, "192.0.2.1")


FIELDS = st.sampled_from(
    [
        f"{prefix}{name}"
        for prefix in ("x-esp8266-", "x-esp32-", "")
        for name in ("version", "sta-mac", "free-space", "chip-size", "sketch-md5", "mode")
    ]
    + ["user-agent", "x-esp32-sketch-sha256", "x-mgos-fw-version", "x-mgos-device-id"]
)
VALUES = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=40),
    st.from_regex(r"[-+]?[0-9_]{1,20}", fullmatch=True),
    st.sampled_from(
        ["1.0.0", "5C:CF:7F:12:34:56", "sketch", "ESP32", "ESP8266", "\u00b2", "", "1.0.0(x)"]
    ),
)


@often
@given(st.dictionaries(FIELDS, VALUES, max_size=8))
def test_report_of_any_fields_is_refused_with_400_or_read(headers: dict[str, str]) -> None:
    report = tried(Refused, read_report, "firmware", headers, "192.0.2.1")
    if isinstance(report, Refused):
        assert report.status == 400
        assert report.reason.isascii()
        return
    assert report.kind in {"sketch", "filesystem", "littlefs", "fatfs", "zip"}
    assert (report.free_space or 0) >= 0
    assert report.device is None or re.fullmatch("[0-9A-F:-]{12,17}", report.device)


@often
@given(
    st.one_of(
        st.text(max_size=40),
        st.from_regex(r"\s?[bB]ytes\s?=\s?[0-9]{0,17}-[0-9]{0,17}(,[0-9]*-)?", fullmatch=True),
    ),
    st.integers(0, 1 << 25),
)
def test_any_range_is_a_part_of_the_file_or_ignored_or_416(text: str, size: int) -> None:
    part = tried(Refused, parse_range, text, size)
    if isinstance(part, Refused):
        assert part.status == 416
        assert part.headers == (("Content-Range", f"bytes */{size}"),)
        return
    assert part is None or (0 <= part.start < part.stop <= size and part.step == 1)


# -- 2. Names -------------------------------------------------------------------------------------

VERSIONS = [b"1.2.3", b"v1.2", b"1.2.3-rc.1+b.1", b"0.0.0", b"10.20.30-0a.b+c"]
NAMES = [b"app-1.2.3", b"my app_2.0-1.2.3", b"v1.0", b"app-1.0.0-rc.1+x", b"a+b-1.0+c-2.0"]
PARTS = [b".", b"-", b"+", b"_", b"v", b"0", b"01", b"9" * 130, b"\n", "\u0661".encode(), b"/"]


@often
@given(mutated(VERSIONS, PARTS))
def test_mutated_version_is_a_value_error_or_one_that_reads_as_itself(data: bytes) -> None:
    version = tried(ValueError, Version.parse, os.fsdecode(data))
    if isinstance(version, ValueError):
        assert str(version).isascii()
        return
    assert Version.parse(str(version)) == version


@often
@given(mutated(NAMES, PARTS))
def test_mutated_file_name_is_a_value_error_or_holds_what_was_read(data: bytes) -> None:
    stem = os.fsdecode(data)
    named = tried(ValueError, read_name, stem)
    if isinstance(named, ValueError):
        return
    project, version = named
    assert stem.startswith(project)
    assert str(version.precedence[0]) in stem


# -- 3. Images ------------------------------------------------------------------------------------

ESP8266 = esp8266_image("fuzz", "1.0.0")
IMAGES = [
    ESP8266,
    esp8266_image("fuzz", "1.0.0", crc=False),
    esp8266_signed(ESP8266),
    gzip_image(ESP8266),
    esp32_image("fuzz", "1.0.0"),
    esp32_image("fuzz", "1.0.0", chip_id=5, hash_appended=False),
]
CORNERS = [b"\xe9", b"\x1f\x8b", b"\0" * 16, b"\xff" * 16, b"\xff\xff\xff\xff", b"\xe9\x10\2\x40"]


@pytest.fixture(scope="module")
def file() -> Iterator[FileIO]:
    """A file for images."""
    with tempfile.TemporaryFile(buffering=0) as file:
        assert isinstance(file, FileIO)
        yield file


def facts_of(file: FileIO, image: bytes, kind: str = "sketch") -> Facts:
    """What inspect() says of these bytes."""
    file.seek(0)
    file.truncate()
    file.write(image)
    file.seek(0)
    return inspect(file, kind)


def start(facts: Facts, image: bytes) -> None:
    """Starts the image on the chip it is for. Bricked: it does not start."""
    if facts.chip == "esp8266":
        check_esp8266(eboot_copy(b"", image))
    elif facts.chip in CHIP_IDS:
        check_esp32(image, facts.chip)


def assert_harmless(file: FileIO, image: bytes) -> None:
    """It is refused, or it starts; the emulator of the chip, which knows no server, says so."""
    facts = tried(ValueError, facts_of, file, image)
    if isinstance(facts, ValueError):
        assert str(facts).isprintable()
        return
    flaw = tried(Bricked, start, facts, image)
    assert flaw is None, f"an {facts.chip} gets it and does not start again: {flaw}"


@often
@given(data=mutated(IMAGES, CORNERS))
def test_mutated_image_is_a_value_error_or_starts_on_its_chip(file: FileIO, data: bytes) -> None:
    assert_harmless(file, data)


@often
@given(data=mutated(IMAGES, CORNERS))
def test_mutated_image_that_is_packed_is_a_value_error_or_starts(file: FileIO, data: bytes) -> None:
    assert_harmless(file, gzip_image(data))


KINDS = ["littlefs", "spiffs", "fatfs", "zip"]
OTHERS = [
    littlefs_image(2),
    spiffs_image(2),
    fatfs_image(4, sector_size=512),
    fatfs_wl_image(8),
    mongoose_zip("fuzz", "1.0.0", app=ESP8266[:64]),
    mongoose_zip("fuzz", "1.0.0", app=ESP8266[:64], platform="esp8266"),
    gzip_image(littlefs_image(2)),
]
ODD = [
    *(b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\x55\xaa", b"littlefs"),
    *(b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x80\0\0\0", b"{" * 300, b'"esp32"'),
]


@st.composite
def tampered(draw: st.DrawFn) -> bytes:
    """One of the others, with bytes changed where its headers are: at both ends."""
    data = bytearray(draw(st.sampled_from(OTHERS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.one_of(st.integers(0, 100), st.integers(max(0, len(data) - 300), len(data))))
        piece = draw(st.one_of(st.sampled_from(ODD), st.binary(min_size=1, max_size=8)))
        data[at : at + len(piece)] = piece
    return bytes(data)


@often
@given(st.one_of(mutated(OTHERS, ODD), tampered()), st.sampled_from(KINDS))
def test_mutated_file_system_or_zip_is_a_value_error_or_no_more_than_it_says(
    file: FileIO, data: bytes, kind: str
) -> None:
    facts = tried(ValueError, facts_of, file, data, kind)
    if isinstance(facts, ValueError):
        assert re.match("(is|has|unpacks) ", str(facts))
        assert str(facts).isprintable()
        return
    assert facts.chip in {"", "esp8266", *CHIP_IDS}
    assert facts.packed <= (facts.chip == "esp8266")
    assert facts == Facts(facts.chip, packed=facts.packed, md5=facts.md5, sha256=facts.sha256)


# -- 4. Time --------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of the quickest of some calls, whatever comes of them."""
    times = []
    for _ in range(7):
        begun = time.thread_time()
        with suppress(Refused, ValueError):
            call()
        times.append(time.thread_time() - begun)
    return max(min(times), 2e-5)  # below that the clock decides


def lines(count: int, line: bytes, end: bytes = b"\r\n") -> bytes:
    """A head of so many lines."""
    return b"GET / HTTP/1.1\r\nHost: ota\r\n" + line * count + end


def line(target: bytes) -> bytes:
    """A head with this target."""
    return b"GET " + target + b" HTTP/1.1\r\nHost: ota\r\n\r\n"


def heads(make: Callable[[int], bytes], name: str) -> Any:
    """One kind of head that grows."""
    return pytest.param(lambda n: parse_head(make(n), "192.0.2.1"), id=name)


GROWING = [
    heads(lambda n: lines(n, b"x: y\r\n"), "fields"),
    heads(lambda n: lines(n, b"x: y\r\n", b"x\r\n\r\n"), "last-line-odd"),
    heads(lambda n: lines(n, b"x:\r\n", b" \r\n\r\n"), "fold-at-the-end"),
    heads(lambda n: lines(1, b"x:" + b" " * n + b"\0\r\n"), "blanks"),
    heads(lambda n: lines(1, b"x: " + b"a " * n + b"\r\n"), "words"),
    heads(lambda n: lines(1, b"Host: " + b"a" * n + b"@\r\n"), "host"),
    heads(lambda n: b"A" * n, "method"),
    heads(lambda n: line(b"/" + b"%41" * n + b"%"), "path"),
    heads(lambda n: line(b"/" + b"?" * n + b"#"), "query"),
    heads(lambda n: line(b"http://" + b"a:" * n + b"/"), "authority"),
    pytest.param(lambda n: parse_range("bytes=" + "0-," * n, 9), id="range"),
    pytest.param(lambda n: parse_range("bytes=" + " " * n + "x", 9), id="range-of-blanks"),
    pytest.param(lambda n: read_report("", {"x-esp8266-version": "1." * n}, ""), id="version"),
    pytest.param(lambda n: read_report("", {"x-esp8266-sta-mac": "5C:" * n}, ""), id="mac"),
    pytest.param(lambda n: Version.parse("1.0.0-" + "a." * n), id="prerelease"),
    *(
        pytest.param(
            lambda n, make=make: read_report("", {"x-esp8266-version": make(n)}, ""), id=name
        )
        for name, make in {
            "tasmota-digits": lambda n: "1.1." + "1" * n + ")",
            "tasmota-dots": lambda n: "1.1.1" + "." * n + ")",
            "tasmota-brackets": lambda n: "1.1.1" + "(" * n + ")",
            "tasmota-variant": lambda n: "1.1.1(" + "minimal-" * n + ")",
        }.items()
    ),
    pytest.param(lambda n: read_report("", {"x-mgos-fw-version": "a " * n}, ""), id="mongoose"),
    pytest.param(lambda n: read_report("", {}, "", "v=1&" * n + "version=1.0"), id="query-report"),
    pytest.param(lambda n: read_report("", {}, "", "version=" + "%41" * n), id="query-version"),
]


@pytest.mark.parametrize("call", GROWING)
def test_time_grows_as_the_input_does(call: Callable[[int], object]) -> None:
    """Eight times the input: 8 times the time; 64 times if it were to grow with the square."""
    small, large = seconds(lambda: call(2_000)), seconds(lambda: call(16_000))
    assert large < 30 * small


@pytest.mark.parametrize(
    "stem", ["1.1+-" * 50 + "\n", "-1" * 125, "a-1." * 60, "v1.0.0-" * 35 + "!", "0" * 250 + "."]
)
def test_longest_file_name_is_read_at_once(stem: str) -> None:
    assert seconds(lambda: read_name(stem)) < 0.01


def again(file: FileIO) -> Facts:
    """What inspect() says of the file, from its beginning."""
    file.seek(0)
    return inspect(file)


@pytest.mark.parametrize("make", [esp8266_image, esp32_image])
def test_time_of_an_inspection_grows_as_the_image_does(
    make: Callable[..., bytes], tmp_path: Path
) -> None:
    times = []
    for size in (1 << 19, 1 << 22):
        path = tmp_path / str(size)
        path.write_bytes(make("fuzz", "1.0.0", payload=bytes(size)))
        with FileIO(path) as file:
            times.append(seconds(functools.partial(again, file)))
    assert times[1] < 30 * times[0]
