"""Images that are no sketch: file systems, and the zip of Mongoose OS; only whole ones pass."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from ota_server import ESP32_CHIPS, MAX_UNPACKED, Facts, inspect
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    fatfs_image,
    fatfs_wl_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
)

WHOLE: list[Any] = [
    pytest.param("littlefs", littlefs_image(), id="littlefs"),
    pytest.param("littlefs", littlefs_image(8, block_size=8192, seed=1), id="littlefs of ESP8266"),
    pytest.param("littlefs", littlefs_image(2, version=0x00020001), id="littlefs 2.1, two blocks"),
    pytest.param("spiffs", spiffs_image(), id="spiffs"),
    pytest.param("spiffs", spiffs_image(16, block_size=8192), id="spiffs of an ESP8266"),
    pytest.param("spiffs", spiffs_image(4, block_size=8192, seed=1), id="spiffs that is used"),
    pytest.param("spiffs", spiffs_image(2, block_size=65536), id="spiffs with two magic pages"),
    pytest.param("spiffs", spiffs_image(1, page_size=128), id="spiffs of one block"),
    pytest.param("fatfs", fatfs_image(), id="fatfs"),
    pytest.param("fatfs", fatfs_image(64, sector_size=512, seed=1), id="fatfs of a card"),
    pytest.param("fatfs", fatfs_wl_image(), id="fatfs with wear levelling"),
    pytest.param("fatfs", fatfs_wl_image(256), id="fatfs whose wear levelling takes two sectors"),
]
ZIP = mongoose_zip("app", "1.0.0")
MANIFEST = {"name": "app", "platform": "esp32", "version": "1.0.0", "build_id": "1", "parts": {}}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds") / "image.bin"


def facts_of(path: Path, data: bytes, kind: str) -> Facts:
    path.write_bytes(data)
    with FileIO(path) as file:
        return inspect(file, kind)


def flaw_of(path: Path, data: bytes, kind: str) -> str:
    """Why it is not offered."""
    with pytest.raises(ValueError, match=r"^(is|has|unpacks) ") as caught:
        facts_of(path, data, kind)
    assert str(caught.value).isprintable()
    return str(caught.value)


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members, in their order."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, compression)
    return archive.getvalue()


def manifest(**fields: object) -> bytes:
    """A zip whose manifest has other fields; None takes one away."""
    entries = {name: value for name, value in (MANIFEST | fields).items() if value is not None}
    return zipped(("manifest.json", json.dumps(entries).encode()))


# -- 1. File systems -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "image"), WHOLE)
def test_whole_file_system_is_for_any_chip_and_has_the_digests_of_the_file(
    scratch: Path, kind: str, image: bytes
) -> None:
    facts = facts_of(scratch, image, kind)
    assert facts == Facts(md5=facts.md5, sha256=facts.sha256)  # so its chip is ""
    assert facts.md5 == hashlib.md5(image, usedforsecurity=False).hexdigest()
    assert facts.sha256 == hashlib.sha256(image).hexdigest()


def cuts(size: int) -> Iterator[int]:
    """Lengths to cut to: all in the first header and the last bytes, and steps between."""
    yield from range(48)
    yield from (508, 509, 510, 511, 512, 513, 4095, 4096, 4606, 4607)
    yield from range(4096, size, max(4096, size // 24 // 4096 * 4096))
    yield from range(4999, size, size // 13)
    yield from range(max(0, size - 40_000), size, 4096)
    yield from range(size - 5, size)


@pytest.mark.parametrize(("kind", "image"), WHOLE)
def test_file_system_cut_off_anywhere_is_refused(scratch: Path, kind: str, image: bytes) -> None:
    for size in filter(len(image).__gt__, cuts(len(image))):
        assert flaw_of(scratch, image[:size], kind), size


@pytest.mark.parametrize(("kind", "image"), WHOLE)
@pytest.mark.parametrize("other", ["littlefs", "spiffs", "fatfs", "zip", "sketch"])
def test_file_system_is_none_of_another_kind(
    scratch: Path, kind: str, image: bytes, other: str
) -> None:
    if other != kind:
        assert flaw_of(scratch, image, other)


@pytest.mark.parametrize("kind", ["littlefs", "spiffs", "fatfs", "zip"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0", id="one byte"),
        pytest.param(bytes(65536), id="zeros"),
        pytest.param(b"\xff" * 65536, id="erased flash"),
        pytest.param(esp8266_image("app", "1.0.0"), id="sketch of an ESP8266"),
        pytest.param(esp32_image("app", "1.0.0"), id="sketch of an ESP32"),
        pytest.param(gzip_image(b""), id="nothing, packed"),
        pytest.param(b"<!doctype html><title>404</title>" * 400, id="page"),
    ],
)
def test_what_is_no_image_of_the_kind_is_refused(scratch: Path, kind: str, data: bytes) -> None:
    assert flaw_of(scratch, data, kind)


@pytest.mark.parametrize(("kind", "image"), WHOLE)
def test_packed_file_system_is_for_an_esp8266_only(scratch: Path, kind: str, image: bytes) -> None:
    packed = gzip_image(image)
    facts = facts_of(scratch, packed, kind)
    assert (facts.chip, facts.packed) == ("esp8266", True)
    assert facts.md5 == hashlib.md5(packed, usedforsecurity=False).hexdigest()
    for size in (1, 9, 10, len(packed) // 2, len(packed) - 8, len(packed) - 1):
        assert flaw_of(scratch, packed[:size], kind).startswith("is cut off")
    assert "which brick" in flaw_of(scratch, packed + b"\0", kind)
    assert flaw_of(scratch, gzip_image(image[:-1]), kind)


def test_packed_file_system_is_no_bomb(scratch: Path) -> None:
    image = littlefs_image(2) + bytes(MAX_UNPACKED)
    assert flaw_of(scratch, gzip_image(image), "littlefs") == "unpacks to more than 16 MiB"


@pytest.mark.parametrize("kind", ["littlefs", "fatfs"])
def test_file_system_may_be_followed_by_unused_flash(scratch: Path, kind: str) -> None:
    image = littlefs_image() if kind == "littlefs" else fatfs_image()
    assert facts_of(scratch, image + b"\xff" * 4096, kind).sha256


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [
        pytest.param("littlefs", 24, 0, id="littlefs with blocks of no bytes"),
        pytest.param("littlefs", 28, 0, id="littlefs without blocks"),
        pytest.param("littlefs", 28, 0xFFFFFFFF, id="littlefs of 16 TB"),
        pytest.param("fatfs", 11, 0xFFFF, id="fatfs with huge sectors"),
        pytest.param("fatfs", 19, 0, id="fatfs without sectors"),
    ],
)
def test_file_system_of_an_impossible_size_is_cut_off(
    scratch: Path, kind: str, at: int, value: int
) -> None:
    image = littlefs_image() if kind == "littlefs" else fatfs_image()
    width = 4 if kind == "littlefs" else 2
    odd = image[:at] + value.to_bytes(width, "little") + image[at + width :]
    assert flaw_of(scratch, odd, kind).startswith("is cut off")


@pytest.mark.parametrize("version", [0x00020000, 0x00020001], ids=["2.0", "2.1"])
@pytest.mark.parametrize(("block_size", "count"), [(4096, 16), (8192, 125), (4096, 2)])
def test_file_system_of_the_real_littlefs_is_taken(
    scratch: Path, version: int, block_size: int, count: int
) -> None:
    littlefs = pytest.importorskip("littlefs")
    disk = littlefs.LittleFS(block_size=block_size, block_count=count, disk_version=version)
    if count > 2:
        with disk.open("index.html", "w") as page:
            page.write("<h1>lamp</h1>" * 300)
        for number in range(200):  # so that the superblock is written again and again
            with disk.open("config.json", "w") as file:
                file.write(json.dumps({"number": number}))
    image = bytes(disk.context.buffer)
    assert facts_of(scratch, image, "littlefs").chip == ""
    assert flaw_of(scratch, image[:-1], "littlefs").startswith("is cut off")


@pytest.mark.parametrize("options", ["-S4096", "-S512", "-S4096 -F16 -s1", "-S512 -F32 -s1"])
def test_file_system_of_the_real_mkfs_is_taken(scratch: Path, options: str) -> None:
    program = shutil.which("mkfs.fat") or shutil.which("/usr/sbin/mkfs.fat")
    if program is None:
        pytest.skip("mkfs.fat is missing: Debian package dosfstools")
    size = 36 << 20 if "-F" in options else 1 << 20  # a FAT32 has more than 65525 clusters
    scratch.unlink(missing_ok=True)
    with FileIO(scratch, "w") as file:
        file.truncate(size)
    subprocess.run([program, *options.split(), str(scratch)], check=True, capture_output=True)
    with FileIO(scratch, "r+") as file:
        assert inspect(file, "fatfs").chip == ""
        file.truncate(size - 4096)
        file.seek(0)
        with pytest.raises(ValueError, match=r"^is cut off"):
            inspect(file, "fatfs")
    scratch.unlink()


# -- 2. Mongoose OS --------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["esp32", "esp32c3", "esp8266"])
def test_zip_is_for_the_platform_of_its_manifest(scratch: Path, platform: str) -> None:
    image = mongoose_zip("app", "1.0.0", platform=platform)
    facts = facts_of(scratch, image, "zip")
    assert (facts.chip, facts.packed, facts.running) == (platform, False, frozenset())
    assert facts.sha256 == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize("chip", ["esp8266", *ESP32_CHIPS.values()])
def test_platform_is_any_chip_in_any_case_of_letters(scratch: Path, chip: str) -> None:
    assert facts_of(scratch, manifest(platform=chip.upper()), "zip").chip == chip


def test_zip_cut_off_anywhere_is_refused(scratch: Path) -> None:
    for size in (*range(0, len(ZIP), 523), *range(len(ZIP) - 60, len(ZIP))):
        assert flaw_of(scratch, ZIP[:size], "zip"), size


def test_flipped_bit_in_the_contents_of_a_zip_is_refused(scratch: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(ZIP)) as archive:
        for each in archive.infolist():
            start = each.header_offset + 30 + len(each.filename)
            for at in range(start, start + each.file_size, 97):
                flipped = ZIP[:at] + bytes([ZIP[at] ^ 1 << at % 8]) + ZIP[at + 1 :]
                assert "CRC of" in flaw_of(scratch, flipped, "zip")


def test_flipped_bit_in_a_header_of_a_zip_is_refused_or_does_not_matter(scratch: Path) -> None:
    for at in (*range(60), *range(ZIP.index(b"PK\1\2"), len(ZIP))):
        flipped = ZIP[:at] + bytes([ZIP[at] ^ 1 << at % 8]) + ZIP[at + 1 :]
        with suppress(ValueError):
            assert facts_of(scratch, flipped, "zip").chip == "esp32"


@pytest.mark.parametrize(
    "compression",
    [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
    ids=["deflate", "bzip2", "lzma"],
)
def test_compressed_zip_is_refused_whatever_is_in_it(scratch: Path, compression: int) -> None:
    """A device says "Cannot handle compressed .zip": mgos_updater_common.c."""
    image = mongoose_zip("app", "1.0.0", compression=compression)
    assert "is compressed" in flaw_of(scratch, image, "zip")
    for at in range(0, len(image), 61):
        assert flaw_of(scratch, image[:at] + b"\x55" + image[at + 1 :], "zip")


def test_zip_bomb_is_refused_before_it_is_unpacked(scratch: Path) -> None:
    bomb = zipped(("manifest.json", bytes(MAX_UNPACKED)), compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in flaw_of(scratch, bomb, "zip")


def test_zip_whose_members_overlap_is_refused_before_it_is_read(scratch: Path) -> None:
    """A thousand entries of the directory that all stand for the same bytes."""
    image = zipped(("manifest.json", json.dumps(MANIFEST).encode()), ("a", bytes(1 << 20)))
    start, end = image.index(b"PK\1\2"), image.index(b"PK\5\6")
    last = image[image.index(b"PK\1\2", start + 4) : end]
    directory = image[start:end] + last * 1000
    ending = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1002, 1002, len(directory), start, 0)
    assert "too large" in flaw_of(scratch, image[:start] + directory + ending, "zip")


def test_encrypted_zip_is_refused(scratch: Path) -> None:
    at = ZIP.index(b"PK\1\2")
    flags = ZIP[:6] + b"\1" + ZIP[7 : at + 8] + b"\1" + ZIP[at + 9 :]
    assert "zip data is wrong" in flaw_of(scratch, flags, "zip")


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        pytest.param(b"PK\5\6", 16, b"\xff\xff\xff\x7f", id="directory behind the end"),
        pytest.param(b"PK\5\6", 12, b"\xff\xff\xff\x7f", id="directory longer than the file"),
        pytest.param(b"PK\1\2", 42, b"\xff\xff\xff\x7f", id="member behind the end"),
        pytest.param(b"PK\1\2", 24, b"\xff\xff\xff\x00", id="member longer than the file"),
        pytest.param(b"PK\1\2", 28, b"\xff\xff\xff\xff", id="name longer than the directory"),
        pytest.param(b"PK\1\2", 10, b"\x63\0", id="unknown compression"),
        pytest.param(b"PK\1\2", 6, b"\xff\0", id="for a later unzip"),
        pytest.param(b"PK\3\4", 26, b"\xff\xff\xff\xff", id="odd name of a member"),
    ],
)
def test_zip_with_an_impossible_header_is_refused(
    scratch: Path, name: bytes, at: int, value: bytes
) -> None:
    start = ZIP.index(name) + at
    assert flaw_of(scratch, ZIP[:start] + value + ZIP[start + len(value) :], "zip")


@pytest.mark.parametrize("offset", [(1 << 63) - 1, (1 << 64) - 1, 1 << 62])
def test_zip64_with_an_impossible_offset_is_refused(scratch: Path, offset: int) -> None:
    end = ZIP.index(b"PK\5\6")
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, offset, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset, 1)
    ending = ZIP[end : end + 8] + b"\xff" * 12 + bytes(2)
    assert flaw_of(scratch, ZIP[:end] + record + locator + ending, "zip")
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    assert flaw_of(scratch, ZIP[:end] + record + locator + ending, "zip")


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([], id="nothing in it"),
        pytest.param([("app.bin", b"x")], id="no manifest"),
        pytest.param([("a/", b""), ("a/manifest.json", b"{}")], id="folder first"),
        pytest.param([("b", b"x"), ("manifest.json", json.dumps(MANIFEST).encode())], id="second"),
        pytest.param([("my-manifest.json", json.dumps(MANIFEST).encode())], id="another name"),
        *(
            pytest.param([("manifest.json", text)], id=name)
            for name, text in {
                "empty": b"",
                "no JSON": b"platform: esp32",
                "half": b'{"platform": "esp',
                "null": b"null",
                "number": b"1",
                "text": b'"platform"',
                "list": b'["platform"]',
                "no fields": b"{}",
                "UTF-16 cut off": b"\xff\xfe{",
                "no UTF-8": b'{"platform": "\xff"}',
                "deep": b'{"platform":' + b"[" * 100_000,
                "deep object": b'{"platform":' * 100_000,
            }.items()
        ),
    ],
)
def test_zip_without_a_readable_manifest_first_is_refused(
    scratch: Path, members: list[tuple[str, bytes]]
) -> None:
    assert flaw_of(scratch, zipped(*members), "zip")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"platform": None}, id="no platform"),
        pytest.param({"platform": 8266}, id="number"),
        pytest.param({"platform": ["esp32"]}, id="list"),
        pytest.param({"platform": {"esp32": 1}}, id="object"),
        pytest.param({"platform": ""}, id="empty, which would mean any chip"),
        pytest.param({"platform": "no device"}, id="the word for no chip"),
        pytest.param({"platform": "some ESP32"}, id="the word for some chip"),
        pytest.param({"platform": "stm32"}, id="no ESP"),
        pytest.param({"platform": "<script>alert(1)</script>"}, id="HTML"),
        pytest.param({"platform": "esp32\n2026-11-21 ERROR all is lost"}, id="line of a log"),
        pytest.param({"version": None}, id="no version"),
        pytest.param({"build_id": None}, id="no build"),
        pytest.param({"parts": None}, id="no parts"),
    ],
)
def test_zip_that_no_esp_would_take_is_refused(scratch: Path, fields: dict[str, object]) -> None:
    assert "no Mongoose OS firmware" in flaw_of(scratch, manifest(**fields), "zip")


def test_zip_of_many_entries_is_read_in_time(scratch: Path) -> None:
    members = [(f"{number}", b"") for number in range(5_000)]
    image = zipped(("manifest.json", json.dumps(MANIFEST).encode()), *members)
    assert facts_of(scratch, image, "zip").chip == "esp32"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda image: b"\x1f\x8b" + image, id="begins like gzip"),
        pytest.param(gzip_image, id="gzip"),
        pytest.param(lambda image: gzip_image(b"") + image, id="gzip before it"),
    ],
)
def test_packed_zip_is_refused(scratch: Path, spoil: Callable[[bytes], bytes]) -> None:
    assert flaw_of(scratch, spoil(mongoose_zip("app", "1.0.0", platform="esp8266")), "zip")
