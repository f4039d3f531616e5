"""What is inside a .bin: tables over sample images, and esptool as a second opinion."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import tracemalloc
import zipfile
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_fleet.image import LONGEST, Description, describe
from ota_server import CHUNK, ESP32_CHIPS, UNKNOWN_CHIP, Version, inspect
from tests.data.make_images import (
    esp32_bootloader,
    esp32_image,
    esp32_signed,
    esp8266_image,
    esp8266_signed,
    factory_image,
    fatfs_image,
    fatfs_wl_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    nonos_image,
    partition_table,
    rtos_image,
    spiffs_image,
    tasmota32_image,
)

ESP8266 = esp8266_image("lamp", "1.0.0")
ESP32 = esp32_image("lamp", "1.0.0")
RTOS = rtos_image("lamp", "1.0.0")
ARDUINO = ("arduino-lib-builder", "esp-idf: v4.4.7 38eeba213a")  # in every sketch for an ESP32
SDK = b"esp-idf: v3.3.1 38eeba213a\0v5.3.2-282-gcfea4f7c98-dirty\0SDK v9.9.9\0"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("described") / "image.bin"


def described(path: Path, data: bytes, name: str = "") -> Description:
    path.write_bytes(data)
    with FileIO(path) as file:
        return describe(file, name)


def told(about: Description, expected: dict[str, Any]) -> dict[str, Any]:
    """Of a description, the fields that are expected."""
    return {field: getattr(about, field) for field in expected}


def version(text: str) -> Version:
    return Version.parse(text)


# -- 1. Kinds, headers, descriptors ----------------------------------------------------------------

DESCRIBED: list[Any] = [
    pytest.param(
        ESP8266,
        {
            "kind": "sketch", "chip": "esp8266", "packed": False, "flash_size": 4 << 20,
            "flash_mode": "dio", "project": "", "version": None, "version_text": "", "idf": "",
            "built": "", "signed": "", "min_revision": 0, "secure_version": 0,
        },
        id="esp8266 names nothing",
    ),
    pytest.param(
        esp8266_image("lamp", "1.0.0", flash_mode=0, flash_size_code=0),
        {"flash_size": 512 << 10, "flash_mode": "qio"},
        id="esp8266 of 512 KB",
    ),
    pytest.param(
        esp8266_image("lamp", "1.0.0", flash_mode=7),
        {"chip": "esp8266", "flash_mode": "", "signed": ""},
        id="esp8266 of no flash mode",
    ),
    pytest.param(
        gzip_image(ESP8266),
        {"kind": "sketch", "chip": "esp8266", "packed": True, "flash_size": 4 << 20,
         "flash_mode": "dio", "signed": ""},
        id="packed",
    ),
    pytest.param(
        RTOS,
        {
            "kind": "sketch", "chip": "esp8266", "project": "lamp", "version": version("1.0.0"),
            "idf": "v3.4-98-g9f0f4d63", "flash_size": 1 << 20, "flash_mode": "dio", "signed": "",
            "built": "Jan  1 2026 12:00:00",
        },
        id="RTOS SDK",
    ),
    pytest.param(
        gzip_image(RTOS),
        {"packed": True, "project": "lamp", "version": version("1.0.0"), "signed": ""},
        id="RTOS SDK, packed",
    ),
    pytest.param(
        esp32_image("lamp", "v1.2", secure_version=7, revisions=(301, 399), idf="v5.5"),
        {
            "kind": "sketch", "chip": "esp32", "project": "lamp", "version": version("1.2.0"),
            "version_text": "v1.2", "secure_version": 7, "min_revision": 301, "max_revision": 399,
            "idf": "v5.5", "built": "Jan  1 2026 12:00:00", "flash_size": 4 << 20,
            "flash_mode": "dio", "packed": False, "signed": "",
            "elf_sha256": hashlib.sha256(b"OTA-EXAMPLE lamp v1.2\0").hexdigest(),
        },
        id="esp32",
    ),
    pytest.param(
        esp32_image("lamp", "1", hash_appended=False),
        {"project": "lamp", "version": None, "version_text": "1", "signed": ""},
        id="project without a version: ESP-IDF says 1",
    ),
    pytest.param(
        esp32_image("lamp", "v1.2.0-5-gcfea4f7"),
        {"version": version("1.2.0-5-gcfea4f7"), "version_text": "v1.2.0-5-gcfea4f7"},
        id="version by git describe",
    ),
    pytest.param(
        tasmota32_image("14.1.0"),
        {"project": "tasmota32", "version": None, "version_text": "14.1.0(tasmota32)"},
        id="version that is none of SemVer",
    ),
    pytest.param(
        esp32_image(*ARDUINO, idf="v4.4.7-dirty"),
        {"project": "", "version": None, "version_text": "", "built": "", "idf": "v4.4.7-dirty",
         "kind": "sketch", "whole": ""},
        id="Arduino's constant descriptor",
    ),
    pytest.param(
        esp32_image("somebody", ARDUINO[1]),
        {"project": "", "version": None},
        id="Arduino's constant version",
    ),
    pytest.param(
        esp32_image("la\x7fmp", "1.0.0\n"),
        {"project": "", "version": None, "version_text": ""},
        id="descriptor that cannot be printed",
    ),
    pytest.param(
        esp32_image("Stehlämpchen", "1.0.0"), {"project": "Stehlämpchen"}, id="umlauts",
    ),
    pytest.param(
        littlefs_image(),
        {"kind": "littlefs", "chip": "", "packed": False, "project": "", "flash_size": 0},
        id="littlefs",
    ),
    pytest.param(
        gzip_image(littlefs_image()),
        {"kind": "littlefs", "chip": "esp8266", "packed": True},
        id="littlefs, packed",
    ),
    pytest.param(spiffs_image(), {"kind": "spiffs", "chip": ""}, id="spiffs"),
    pytest.param(
        spiffs_image(4, block_size=8192, seed=1), {"kind": "spiffs"}, id="spiffs that is used"
    ),
    pytest.param(gzip_image(spiffs_image()), {"kind": "spiffs", "chip": "esp8266"}, id="packed fs"),
    pytest.param(fatfs_image(), {"kind": "fatfs", "chip": ""}, id="fatfs"),
    pytest.param(fatfs_image(64, sector_size=512), {"kind": "fatfs"}, id="fatfs of a card"),
    pytest.param(fatfs_wl_image(), {"kind": "fatfs"}, id="fatfs with wear levelling"),
    pytest.param(
        mongoose_zip("lamp", "1.0.0", platform="esp32c3"),
        {
            "kind": "zip", "chip": "esp32c3", "project": "lamp", "version": version("1.0.0"),
            "built": "2026-01-01T12:00:00Z", "signed": "", "running": frozenset(),
        },
        id="Mongoose OS",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("image", "expected"), DESCRIBED)
def test_whole_image_is_described(scratch: Path, image: bytes, expected: dict[str, Any]) -> None:
    about = described(scratch, image)
    assert told(about, expected) == expected
    assert about.whole == ""
    assert about.size == len(image)
    assert about.md5 == hashlib.md5(image, usedforsecurity=False).hexdigest()
    assert about.sha256 == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize(("image", "expected"), DESCRIBED)
def test_digests_that_a_device_reports_are_those_of_the_core(
    scratch: Path, image: bytes, expected: dict[str, Any]
) -> None:
    about = described(scratch, image)
    with FileIO(scratch) as file:
        facts = inspect(file, about.kind)
    assert (about.running, about.chip, about.packed) == (facts.running, facts.chip, facts.packed)
    assert (about.md5, about.sha256) == (facts.md5, facts.sha256)
    assert bool(about.running) is (expected.get("kind", "sketch") == "sketch")


@pytest.mark.parametrize(("number", "chip"), ESP32_CHIPS.items())
def test_every_chip_is_known(scratch: Path, number: int, chip: str) -> None:
    about = described(scratch, esp32_image("lamp", "1.0.0", chip_id=number))
    assert (about.chip, about.project, about.version) == (chip, "lamp", version("1.0.0"))


def test_unknown_chip_and_flash_size_are_told_as_such(scratch: Path) -> None:
    image = bytearray(esp32_image("lamp", "1.0.0", chip_id=999, hash_appended=False))
    image[3] = 0xFF
    about = described(scratch, bytes(image))
    assert (about.chip, about.flash_size, about.whole) == ("esp32-id-999", 0, "")


def test_revision_that_only_old_boot_loaders_read(scratch: Path) -> None:
    image = bytearray(esp32_image("lamp", "1.0.0", hash_appended=False, revisions=(0, 0)))
    image[14] = 3
    about = described(scratch, bytes(image))
    assert (about.min_revision, about.max_revision) == (300, 0)


def test_elf_digest_of_zeros_is_none(scratch: Path) -> None:
    image = bytearray(ESP32)
    image[176:208] = bytes(32)
    assert described(scratch, bytes(image)).elf_sha256 == ""


@pytest.mark.parametrize(
    ("image", "signed"),
    [
        pytest.param(esp8266_signed(ESP8266), "esp8266", id="esp8266"),
        pytest.param(esp8266_signed(ESP8266, bytes(512)), "esp8266", id="RSA-4096"),
        pytest.param(gzip_image(esp8266_signed(ESP8266)), "esp8266", id="packed after signing"),
        pytest.param(esp8266_image("lamp", "1.0.0", crc=False), "", id="old esp8266"),
        *(
            pytest.param(esp32_signed(image, kind), kind, id=f"{kind} of {size}")
            for kind in ("arduino", "secure-boot-v1", "secure-boot-v2")
            for size in range(0, 4096, 512)
            for image in [esp32_image("lamp", "1.0.0", payload=bytes(size))]
        ),
    ],
)
def test_signature_is_seen(scratch: Path, image: bytes, signed: str) -> None:
    about = described(scratch, image)
    assert (about.signed, about.whole) == (signed, "")


def test_project_of_mongoose_that_is_no_text_is_none(scratch: Path) -> None:
    archive = io.BytesIO()
    manifest = {"name": ["lamp"], "platform": "esp32", "version": 1.5, "build_id": "", "parts": {}}
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("manifest.json", json.dumps(manifest))
    about = described(scratch, archive.getvalue())
    assert (about.whole, about.project, about.version_text, about.built) == ("", "", "", "")


# -- 2. Markers in the bytes -----------------------------------------------------------------------


def sketch(payload: bytes) -> bytes:
    """A sketch for an ESP8266 with these bytes among its constants."""
    return esp8266_image("", "", payload=b"\0" + payload + b"\0")


def arduino32(payload: bytes, idf: str = "v3.3.1") -> bytes:
    """A sketch for an ESP32, whose SDK says its version in many places."""
    return esp32_image(*ARDUINO, idf=idf, payload=b"\0" + payload + b"\0")


MARKED: list[Any] = [
    pytest.param(b"update?dev=lamp&ver=v1.0.2\0", "lamp", "1.0.2", id="as in S3's README"),
    pytest.param(b"http://10.0.0.1:5000/update?dev=lamp&ver=v1.0.2\0", "lamp", "1.0.2", id="URL"),
    pytest.param(b"update?dev=SMART-LAMP&ver=V1.0.2\0", "SMART-LAMP", "1.0.2", id="capitals"),
    pytest.param(b"update?dev=SMART_LAMP&ver=v1.10.2\0", "SMART_LAMP", "1.10.2", id="underscore"),
    pytest.param(b"update?dev=lamp&ver=v1.0.2&mac=\0", "lamp", "1.0.2", id="more in the query"),
    pytest.param(b"update?dev=lamp&ver=v1.0.2-rc.1\0", "lamp", "1.0.2-rc.1", id="pre-release"),
    pytest.param(SDK + b"update?dev=lamp&ver=v1.0.2\0", "lamp", "1.0.2", id="beside an SDK"),
    pytest.param(b"v3.3.1\0update?dev=lamp&ver=v1.0.2\0v4.4.4\0", "lamp", "1.0.2", id="many"),
    pytest.param(b"update?dev=lamp&ver=v3.3.1\0v3.3.1\0", "lamp", "3.3.1", id="same as the SDK"),
    pytest.param(b"update?dev=lamp&ver=v1.0.2\0" * 40, "lamp", "1.0.2", id="again and again"),
    pytest.param(b"update?dev=lamp&ver=\0xx\0v1.0.2\0", "lamp", "1.0.2", id="version elsewhere"),
    pytest.param(b"v1.0.2\0update?dev=lamp&ver=%s\0", "lamp", "1.0.2", id="version in a format"),
    pytest.param(b"update?dev=lamp\0&ver=\0v1.0.2\0", "lamp", "1.0.2", id="all three apart"),
    pytest.param(b"update?dev=lamp&ver=\0v1.0.2\0v1.0.2\0", "lamp", "1.0.2", id="same one twice"),
    pytest.param(b"update?dev=lamp&ver=\0v1.0.2\0v1.0.3\0", "lamp", None, id="two versions"),
    pytest.param(
        b"update?dev=lamp&ver=\0v1.0.2\0v1.0.3\0v1.0.4\0v1.0.5\0", "lamp", None, id="more versions"
    ),
    pytest.param(b"update?dev=lamp&ver=\0" + SDK, "lamp", None, id="only an SDK's"),
    pytest.param(b"update?dev=lamp&ver=\0SDK v3.3.1\0v1.2\0v1.2.3 \0", "lamp", None, id="none"),
    pytest.param(b"update?dev=lamp\0v1.0.2\0", "", None, id="no ver="),
    pytest.param(b"update?dev=\0&ver=\0lamp\0v1.0.2\0", "", None, id="no name"),
    pytest.param(b"update?dev=%s&ver=%s\0lamp\0v1.0.2\0", "", None, id="name in a format"),
    pytest.param(b"update?dev=la mp&ver=v1.0.2\0", "", None, id="name with a space"),
    pytest.param(b"update?dev=lamp&ver=v1.0.2<b>\0", "lamp", None, id="end of a sentence"),
    pytest.param(b"update?dev=lamp&ver=new\0", "lamp", None, id="no version"),
    pytest.param(
        b"update?dev=lamp&ver=v1.0.2\0update?dev=lamp&ver=v1.0.3\0", "lamp", None, id="two markers"
    ),
    pytest.param(
        b"update?dev=lamp&ver=v1.0.2\0update?dev=bulb&ver=v1.0.2\0", "", None, id="two names"
    ),
    pytest.param(b"v1.0.2\0lamp\0", "", None, id="no marker at all"),
    pytest.param(SDK, "", None, id="nothing but an SDK"),
    pytest.param(b"update?dev=" + b"n" * 65 + b"&ver=v1.0.2\0", "", None, id="long name"),
    pytest.param(b"update?dev=lamp&ver=v1.0." + b"2" * 130 + b"\0", "lamp", None, id="long"),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "project", "expected"), MARKED)
@pytest.mark.parametrize("wrap", [sketch, arduino32, lambda it: gzip_image(sketch(it))],
                         ids=["esp8266", "esp32", "packed"])  # fmt: skip
def test_marker_names_project_and_version(
    scratch: Path, wrap: Any, payload: bytes, project: str, expected: str | None
) -> None:
    about = described(scratch, wrap(payload))
    assert about.whole == ""
    assert (about.project, about.version) == (project, expected and version(expected))


@pytest.mark.parametrize("idf", ["v3.3.1", "v3.3.1-dirty", "3.3.1", "v3.3.1-7-g85c43024c"])
def test_version_of_the_sdk_is_never_that_of_the_sketch(scratch: Path, idf: str) -> None:
    alone = described(scratch, arduino32(b"update?dev=lamp&ver=\0v3.3.1\0", idf))
    assert (alone.project, alone.version) == ("lamp", None)
    beside = described(scratch, arduino32(b"update?dev=lamp&ver=\0v3.3.1\0v1.0.2\0", idf))
    assert beside.version == version("1.0.2")


def test_without_a_descriptor_no_version_of_an_esp32_is_beyond_doubt(scratch: Path) -> None:
    image = bytearray(arduino32(b"update?dev=lamp&ver=\0v3.3.1\0")[:-32])
    checksum = image[-1]
    for at in range(32, 36):  # another magic: as of an SDK that was before descriptors
        checksum ^= image[at]
        image[at] = 0
    image[23], image[-1] = 0, checksum
    about = described(scratch, bytes(image))
    assert (about.whole, about.project, about.version, about.idf) == ("", "lamp", None, "")


@pytest.mark.parametrize(
    ("payload", "project", "expected"),
    [
        pytest.param(b"update?dev=bulb&ver=v2.0.0\0", "bulb", "2.0.0", id="both"),
        pytest.param(b"update?dev=bulb&ver=\0v9.9.9\0", "bulb", "1.0.0", id="descriptor's version"),
        pytest.param(b"v9.9.9\0update?dev=a&ver=v2.0.0\0update?dev=b&ver=v3.0.0\0", "lamp", "1.0.0",
                     id="markers that differ"),
        pytest.param(SDK, "lamp", "1.0.0", id="none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [esp32_image, rtos_image])
def test_marker_beats_the_descriptor(
    scratch: Path, make: Any, payload: bytes, project: str, expected: str
) -> None:
    about = described(scratch, make("lamp", "1.0.0", payload=b"\0" + payload))
    assert (about.project, about.version, about.whole) == (project, version(expected), "")


@pytest.mark.parametrize(
    "marker", [b"update?dev=lamp&ver=v1.0.2\0", b"update?dev=lamp&ver=\0v1.0.2\0"]
)
def test_marker_is_found_across_the_border_of_pieces(scratch: Path, marker: bytes) -> None:
    start = sketch(marker).index(marker)
    for shift in (*range(-len(marker) - 2, 3), -LONGEST, -LONGEST - 1, 1 - LONGEST):
        image = sketch(bytes(CHUNK + shift - start) + marker)
        assert image.index(marker) == CHUNK + shift
        about = described(scratch, image)
        assert (about.project, about.version) == ("lamp", version("1.0.2")), shift


def test_markers_without_end_are_bounded(scratch: Path) -> None:
    many = b"".join(b"update?dev=lamp-%d&ver=v1.0.%d\0" % (at, at) for at in range(20_000))
    assert described(scratch, sketch(many)).project == ""


# -- 3. Names of files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "project", "expected"),
    [
        ("", "", None),
        ("lamp-1.2.3.bin", "lamp", "1.2.3"),
        ("my-lamp-v1.2.bin", "my-lamp", "1.2.0"),
        ("lamp-1.2.3.bin.gz", "lamp", "1.2.3"),
        ("lamp-1.2.3.littlefs.bin", "lamp", "1.2.3"),
        ("lamp-1.2.3.ZIP", "lamp", "1.2.3"),
        ("C:\\fakepath\\lamp-1.2.3.bin", "lamp", "1.2.3"),
        ("../../etc/lamp-1.2.3.bin", "lamp", "1.2.3"),
        ("1.2.3.bin", "", "1.2.3"),
        ("lamp-1.2.3-rc.1.bin", "lamp", "1.2.3-rc.1"),
        ("firmware.bin", "", None),
        ("sketch.ino.bin", "", None),
        ("lamp-1.2.3.bin\n", "", None),
        ("x" * 9999 + "-1.2.3.bin", "x" * 245, "1.2.3"),
    ],
)
def test_name_of_the_file_is_told_apart(
    scratch: Path, name: str, project: str, expected: str | None
) -> None:
    about = described(scratch, ESP32, name)
    assert (about.named_project, about.named_version) == (project, expected and version(expected))
    assert (about.project, about.version) == ("lamp", version("1.0.0"))


# -- 4. Files that are something else --------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind", "sentence"),
    [
        pytest.param(b"", "empty", "is empty", id="nothing"),
        pytest.param(b"\x7fELF" + bytes(999), "elf", "is an ELF file: upload the .bin", id="ELF"),
        pytest.param(b"UF2\n" + bytes(508), "uf2", "is a UF2 file", id="UF2"),
        pytest.param(b":020000040800F2\r\n" * 9, "hex", "is Intel HEX", id="Intel HEX"),
        pytest.param(b"<!DOCTYPE html><p>404", "html", "is a web page", id="page"),
        pytest.param(b"\xef\xbb\xbf\n <HTML>", "html", "is a web page", id="page with a mark"),
        pytest.param(b"Not Found\n", "text", "is text, not an image", id="short text"),
        pytest.param(b'{"message": "Bad credentials"}', "text", "is text", id="JSON"),
        pytest.param(bytes(257) + b"ustar\0" + bytes(249), "archive", "is an archive", id="tar"),
        pytest.param(gzip_image(bytes(257) + b"ustar\0"), "archive", "is an archive", id="tar.gz"),
        pytest.param(gzip_image(b"\x7fELF"), "elf", "is an ELF file", id="packed ELF"),
        pytest.param(nonos_image(), "nonos", "is for another boot loader: of the ESP8266 NONOS SDK",
                     id="NONOS SDK"),
        pytest.param(b"\x3d\xb8\xf3\x96" + bytes(99), "mcuboot", "other boot loader: MCUboot",
                     id="MCUboot"),
        pytest.param(partition_table(), "partitions", "is a partition table, not the application",
                     id="partition table"),
        pytest.param(b"\1\0\0\0" + b"\xff" * 24 + b"\x9a\x98\x43\x47" + b"\xff" * 8160, "otadata",
                     "is boot_app0.bin", id="boot_app0"),
        pytest.param(esp32_bootloader(9), "bootloader", "is a boot loader, not the application",
                     id="boot loader"),
        pytest.param(b"\xff" * 65536, "unknown", "is no whole image .* ff ff ff ff", id="erased"),
        pytest.param(bytes(252) + b"\x29\x04" + bytes(7000), "unknown", "is no whole image",
                     id="magic of SPIFFS by chance"),
        pytest.param(bytes(65536), "unknown", "is no whole image", id="zeros"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(99), "unknown", "are 89 50 4e 47", id="picture"),
        pytest.param(spiffs_image()[:-4096], "unknown", "is no whole image", id="cut SPIFFS"),
        pytest.param(littlefs_image()[:-1], "littlefs", "is cut off", id="cut littlefs"),
        pytest.param(fatfs_wl_image()[:-1], "fatfs", "is cut off", id="cut fatfs"),
        pytest.param(mongoose_zip("a", "1.0.0")[:-1], "zip", "is damaged", id="cut zip"),
        pytest.param(ESP8266[:-1], "sketch", "is cut off", id="cut esp8266"),
        pytest.param(ESP8266[:0x800], "sketch", "is cut off", id="much cut esp8266"),
        pytest.param(b"\xe9", "sketch", "is cut off", id="one byte"),
        pytest.param(gzip_image(ESP8266)[:-1], "sketch", "is cut off", id="cut gzip"),
        pytest.param(b"\x1f\x8b", "sketch", "is cut off", id="two bytes of gzip"),
        pytest.param(b"\x1f" * 99, "sketch", "is damaged", id="no gzip"),
        pytest.param(gzip_image(ESP32), "sketch", "only an ESP8266 unpacks", id="packed esp32"),
        pytest.param(gzip_image(ESP8266) + b"\0", "sketch", "brick", id="bytes behind gzip"),
        pytest.param(ESP32 + bytes(99), "sketch", "has bytes behind its end", id="too long"),
    ],
)  # fmt: skip
def test_what_is_of_no_use_is_told_in_a_sentence(
    scratch: Path, data: bytes, kind: str, sentence: str
) -> None:
    about = described(scratch, data, "lamp-1.0.0.bin")
    assert about.kind == kind
    assert about.running == frozenset()
    assert about.signed == ""
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(about.whole)
    assert about.whole.isprintable()
    assert about.md5 == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert about.sha256 == hashlib.sha256(data).hexdigest()
    assert about.named_version == version("1.0.0")


def test_cut_image_still_says_whose_it_is(scratch: Path) -> None:
    about = described(scratch, ESP32[:-1])
    assert (about.chip, about.project, about.version) == ("esp32", "lamp", version("1.0.0"))
    short = described(scratch, ESP32[:200])
    assert (short.chip, short.flash_mode, short.project) == ("esp32", "dio", "")
    assert described(scratch, ESP32[:20]).chip == UNKNOWN_CHIP


# -- 5. Merged factory images ----------------------------------------------------------------------

NO_NAME = partition_table(("", 1, 2, 0x9000, 0x5000), ("", 0, 0, 0x20000, 0x100000))


@pytest.mark.parametrize(
    ("chip_id", "padded", "table", "app_at"),
    [
        pytest.param(0, True, b"", 0x10000, id="esp32, from 0"),
        pytest.param(0, False, b"", 0x10000, id="esp32, from its boot loader"),
        pytest.param(5, False, b"", 0x10000, id="esp32c3"),
        pytest.param(18, True, b"", 0x10000, id="esp32p4, from 0"),
        pytest.param(18, False, b"", 0x10000, id="esp32p4, from its boot loader"),
        pytest.param(9, False, b"", 0x20000, id="application at another place"),
        pytest.param(9, False, NO_NAME, 0x20000, id="partitions without names"),
    ],
)
def test_factory_image_is_refused_and_its_application_named(
    scratch: Path, chip_id: int, padded: bool, table: bytes, app_at: int
) -> None:
    app = esp32_image("lamp", "1.0.0", chip_id=chip_id)
    image = factory_image(app, chip_id=chip_id, padded=padded, table=table, app_at=app_at)
    about = described(scratch, image)
    label = "without a name" if table else "app0"
    place = f"the {len(app)} bytes at {image.index(app):#x} (partition {label})"
    assert about.whole.startswith("is a merged factory image")
    assert place in about.whole
    expected = {"kind": "factory", "chip": ESP32_CHIPS[chip_id], "project": "lamp",
                "version": version("1.0.0"), "running": frozenset()}  # fmt: skip
    assert told(about, expected) == expected


def test_factory_image_of_the_rtos_sdk_is_refused(scratch: Path) -> None:
    image = factory_image(RTOS[:-32], chip_id=5)
    about = described(scratch, image)
    assert (about.kind, about.chip, about.project) == ("factory", "esp8266", "lamp")
    assert f"the {len(RTOS) - 32} bytes at 0x10000" in about.whole


def test_boot_loader_and_table_without_an_application_are_no_factory_image(scratch: Path) -> None:
    image = factory_image(b"", chip_id=9)
    assert described(scratch, image).kind == "bootloader"
    odd = partition_table(("app0", 0, 0, 0xFFFFFFFF, 0xFFFFFFFF), ("app1", 0, 0, 0, 1))
    about = described(scratch, bytes(0x8000) + odd)
    assert (about.kind, about.whole.partition(":")[0]) == (
        "unknown", "is no whole image or file system for an ESP",
    )  # fmt: skip


def test_application_whose_segments_never_end_is_told_nevertheless(scratch: Path) -> None:
    app = b"\xe9\xff" + b"\xff" * 300
    assert "bytes at 0x10000" in described(scratch, factory_image(app, chip_id=9)).whole


# -- 6. Second opinions ----------------------------------------------------------------------------


def esptool_says(
    capsys: pytest.CaptureFixture[str], image: bytes, chip: str | None
) -> dict[str, str]:
    """What `esptool image-info` prints, by name."""
    commands = pytest.importorskip("esptool.cmds")
    capsys.readouterr()
    commands.image_info(image, chip)
    lines = capsys.readouterr().out.splitlines()
    return {name: value.strip() for line in lines for name, _, value in [line.partition(":")]}


@pytest.mark.parametrize(("number", "chip"), ESP32_CHIPS.items())
def test_esptool_agrees_about_the_esp32_family(
    scratch: Path, capsys: pytest.CaptureFixture[str], number: int, chip: str
) -> None:
    options = {"secure_version": number, "revisions": (100 + number, 399)}
    image = esp32_image("lamp", "v1.2.3", chip_id=number, **options)  # type: ignore[arg-type]
    says = esptool_says(capsys, image, None)
    about = described(scratch, image)
    assert says["Detected image type"].lower().replace("-", "") == about.chip == chip
    assert says["Chip ID"].startswith(f"{number} ")
    assert int(says["Image size"].split()[0]) == about.size
    assert says["Flash size"] == f"{about.flash_size >> 20}MB"
    assert says["Flash mode"].lower() == about.flash_mode
    low, high = (divmod(each, 100) for each in (about.min_revision, about.max_revision))
    assert says["Minimal chip revision"].startswith(f"v{low[0]}.{low[1]},")
    assert says["Maximal chip revision"] == f"v{high[0]}.{high[1]}"
    assert says["Checksum"].endswith("(valid)")
    assert says["Validation hash"].split()[0] in about.running
    assert says["Validation hash"].endswith("(valid)")
    assert says["Project name"] == about.project
    assert says["App version"] == about.version_text
    assert says["Compile time"] == about.built
    assert says["ELF file SHA256"] == about.elf_sha256
    assert says["ESP-IDF"] == about.idf
    assert int(says["Secure version"]) == about.secure_version


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("mode", range(4))
def test_esptool_agrees_about_the_flash_of_an_esp8266(
    scratch: Path, capsys: pytest.CaptureFixture[str], code: int, mode: int
) -> None:
    image = esp8266_image("lamp", "1.0.0", flash_mode=mode, flash_size_code=code)
    says = esptool_says(capsys, image, "esp8266")
    about = described(scratch, image)
    size = about.flash_size >> 10
    assert says["Flash size"] == (f"{size >> 10}MB" if size >= 1024 else f"{size}KB")
    assert says["Flash mode"].lower() == about.flash_mode
    assert says["Checksum"].endswith("(valid)")  # of the boot loader, all that esptool reads


def test_esptool_makes_the_image_of_the_rtos_sdk_that_the_sample_tool_makes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = pytest.importorskip("esptool.bin_image")
    parts = tool.ESP8266ROMFirmwareImage(io.BytesIO(RTOS))
    capsys.readouterr()  # it warns of a segment that is larger than NONOS ones
    image = tool.ESP8266V3FirmwareImage()
    image.entrypoint, image.flash_mode, image.flash_size_freq = parts.entrypoint, 2, 0x20
    image.segments = parts.segments
    assert image.save(None) == RTOS


def test_esptool_finds_the_same_parts_in_a_factory_image(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = esp32_image("lamp", "1.0.0")
    image = factory_image(app)
    about = described(scratch, image)
    size, at = len(app), int(about.whole.partition("at 0x")[2].partition(" ")[0], 16)
    assert esptool_says(capsys, image[at : at + size], None)["Project name"] == about.project
    assert "Bootloader version" in esptool_says(capsys, image, None)


@pytest.mark.parametrize(("number", "start"), [(0, 0x1000), (9, 0), (18, 0x2000), (23, 0x2000)])
@pytest.mark.parametrize("padded", [True, False], ids=["from 0", "from the boot loader"])
def test_what_esptool_merges_is_a_factory_image(
    scratch: Path, number: int, start: int, padded: bool
) -> None:
    commands = pytest.importorskip("esptool.cmds")
    app = esp32_image("lamp", "1.0.0", chip_id=number)
    parts = [(start, esp32_bootloader(number)), (0x8000, partition_table()), (0x10000, app)]
    at = 0 if padded else start
    image = commands.merge_bin(parts, ESP32_CHIPS[number], target_offset=at)
    about = described(scratch, image)
    assert (about.kind, about.chip, about.project) == ("factory", ESP32_CHIPS[number], "lamp")
    assert f"the {len(app)} bytes at {0x10000 - at:#x}" in about.whole
    for form in ("uf2", "hex"):
        commands.merge_bin(parts, ESP32_CHIPS[number], str(scratch), format=form)
        with FileIO(scratch) as file:
            assert describe(file).kind == form


@pytest.mark.parametrize(("number", "scheme"), [("1", "ecdsa256"), ("2", "ecdsa256")])
def test_what_espsecure_signs_is_signed(tmp_path: Path, number: str, scheme: str) -> None:
    espsecure = pytest.importorskip("espsecure")
    key, image, signed = (tmp_path / name for name in ("key.pem", "image.bin", "signed.bin"))
    image.write_bytes(ESP32)
    espsecure.generate_signing_key(number, scheme, str(key))
    with key.open("rb") as secret, image.open("rb") as data:
        espsecure.sign_data(
            number, [secret], str(signed), False, False, None, None, None, data
        )  # fmt: skip
    with FileIO(signed) as file:
        about = describe(file)
    assert (about.signed, about.whole) == (f"secure-boot-v{number}", "")
    assert about.running == described(image, ESP32).running


# -- 7. Any bytes ----------------------------------------------------------------------------------

SAMPLES = [
    image
    for each in DESCRIBED
    for image in [each.values[0]]
    if len(image) < 40_000
] + [
    factory_image(ESP32, chip_id=9), esp8266_signed(ESP8266), esp32_signed(ESP32, "arduino"),
    sketch(b"update?dev=lamp&ver=\0v1.0.2\0"), arduino32(b"update?dev=lamp&ver=v1.0.2\0"),
]  # fmt: skip
SKETCH_KINDS = ("sketch", "littlefs", "spiffs", "fatfs", "zip")


def is_whole(path: Path, kind: str) -> bool:
    with FileIO(path) as file:
        try:
            return bool(inspect(file, kind))
        except ValueError:
            return False


def holds(path: Path, data: bytes, name: str = "") -> None:
    """Whatever the bytes are: whole only if the core says so, and all texts can be printed."""
    about = described(path, data, name)
    assert (about.whole == "") is (about.kind in SKETCH_KINDS and is_whole(path, about.kind))
    for text in (
        about.whole,
        about.project,
        about.version_text,
        about.idf,
        about.built,
        about.chip,
    ):
        assert text.isprintable()
    assert about.sha256 == hashlib.sha256(data).hexdigest()
    assert about.size == len(data)
    assert about.version is None or about.version == Version.parse(about.version_text)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=9000), st.text(max_size=300))
def test_no_bytes_are_too_odd(scratch: Path, data: bytes, name: str) -> None:
    holds(scratch, data, name)


MAGICS = [b"\xe9", b"\x1f\x8b\x08", b"PK\3\4", b"UF2\n", b"\xaa\x50", b":", b"<", b"\xea\x04"]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(MAGICS), st.binary(max_size=600), st.integers(0, 0x8100))
def test_no_bytes_behind_a_magic_are_too_odd(
    scratch: Path, magic: bytes, data: bytes, fill: int
) -> None:
    holds(scratch, magic + data + b"\xff" * fill + partition_table() + data)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SAMPLES), st.data())
def test_changed_image_is_whole_only_if_the_core_says_so(
    scratch: Path, image: bytes, data: st.DataObject
) -> None:
    changed = bytearray(image)
    for at in data.draw(st.lists(st.integers(0, len(image) - 1), max_size=4)):
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    for at in data.draw(st.lists(st.integers(0, min(299, len(image) - 1)), max_size=3)):
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(image)), st.integers(0, len(image))))
    holds(scratch, bytes(changed[:cut]) + data.draw(st.binary(max_size=70)))


@pytest.mark.parametrize("image", [ESP8266, ESP32, RTOS, gzip_image(ESP8266)],
                         ids=["esp8266", "esp32", "RTOS SDK", "gzip"])  # fmt: skip
def test_cut_or_flipped_image_is_never_whole(scratch: Path, image: bytes) -> None:
    for at in range(0, len(image), 29):
        if at != len(image) - 32 or image is not RTOS:  # no field says that a SHA-256 follows
            assert described(scratch, image[:at]).whole
        if image[:1] != b"\x1f" or not 4 <= at < 10:  # time and system of gzip, which nobody reads
            assert described(scratch, image[:at] + bytes([image[at] ^ 4]) + image[at + 1 :]).whole


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=40), st.from_regex(r"v[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}", fullmatch=True)
)
def test_text_without_a_marker_is_never_a_version(scratch: Path, noise: bytes, text: str) -> None:
    image = sketch(noise + b"\0" + text.encode() + b"\0update?ver=" + text.encode() + b"\0" + noise)
    about = described(scratch, image)
    assert (about.project, about.version) == ("", None)


# -- 8. Large ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marker", [b"update?dev=lamp&ver=v1.0.2\0", b"update?dev=lamp&ver=\0v1.0.2\0"]
)
@pytest.mark.parametrize("wrap", [sketch, arduino32], ids=["esp8266", "esp32"])
def test_16_mb_take_hardly_longer_than_their_check(scratch: Path, wrap: Any, marker: bytes) -> None:
    noise = os.urandom(1 << 20).replace(b"\0v", b"\0w")
    scratch.write_bytes(wrap(noise * 15 + marker))
    with FileIO(scratch) as file:
        start = time.process_time()  # the machine may be busy
        inspect(file)
        checked = time.process_time()
        file.seek(0)
        about = describe(file)
        assert time.process_time() - checked < 20 * (checked - start)
    assert (about.project, about.version, about.whole) == ("lamp", version("1.0.2"), "")


@pytest.mark.parametrize("wrap", [bytes, gzip_image], ids=["plain", "packed"])
def test_memory_does_not_grow_with_the_image(scratch: Path, wrap: Any) -> None:
    scratch.write_bytes(wrap(sketch(bytes(4 << 20) + b"update?dev=lamp&ver=\0v1.0.2")))
    with FileIO(scratch) as file:
        tracemalloc.start()
        assert describe(file).version == version("1.0.2")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20


def test_versions_without_end_do_not_fill_the_memory(scratch: Path) -> None:
    many = b"".join(b"v1.%d.%d\0" % divmod(number, 1000) for number in range(300_000))
    scratch.write_bytes(sketch(b"update?dev=lamp&ver=\0" + many))
    with FileIO(scratch) as file:
        tracemalloc.start()
        assert describe(file).version is None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 << 20


def test_bomb_is_told_as_one(scratch: Path) -> None:
    about = described(scratch, gzip_image(littlefs_image() + bytes(40 << 20)))
    assert about.whole == "unpacks to more than 16 MiB"
    assert (about.kind, about.packed) == ("littlefs", True)


def test_file_that_cannot_be_read_is_an_oserror(tmp_path: Path) -> None:
    with FileIO(tmp_path / "new.bin", "w") as file, pytest.raises(OSError, match="not open"):
        describe(file)
