"""Images: what is inside a .bin, and that nothing but a whole one gets through."""

from __future__ import annotations

import functools
import gzip
import hashlib
import operator
import os
import struct
import time
import zlib
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import ESP32_CHIPS, Facts, inspect, xor_bytes
from tests.data.make_images import (
    SIGNATURE,
    esp32_image,
    esp8266_image,
    esp8266_signed,
    gzip_image,
    rtos_image,
)
from tests.devices import Esp32, Esp8266

ESP8266 = esp8266_image("app", "1.0.0")
ESP8266_OLD = esp8266_image("app", "1.0.0", crc=False)
ESP32 = esp32_image("app", "1.0.0")
ESP32_NO_HASH = esp32_image("app", "1.0.0", hash_appended=False)
RTOS = rtos_image("app", "1.0.0")
PACKED = gzip_image(ESP8266)
SECTOR = b"\xe7" + bytes(4095)  # of a Secure Boot v2 signature

WHOLE = [
    pytest.param(ESP8266, id="esp8266"),
    pytest.param(ESP8266_OLD, id="esp8266 of a core without CRC"),
    pytest.param(ESP32, id="esp32"),
    pytest.param(ESP32_NO_HASH, id="esp32 without SHA-256"),
    pytest.param(PACKED, id="gzip"),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images") / "image.bin"


def facts_of(path: Path, data: bytes) -> Facts:
    path.write_bytes(data)
    with FileIO(path) as file:
        return inspect(file)


def padded(image: bytes) -> bytes:
    """The image filled up to the next sector of 4 KiB."""
    return image + b"\xff" * (-len(image) % 4096)


# -- 1. Whole images ------------------------------------------------------------------------------


@pytest.mark.parametrize("image", WHOLE)
def test_digests_are_those_of_the_file(scratch: Path, image: bytes) -> None:
    facts = facts_of(scratch, image)
    assert facts.md5 == hashlib.md5(image, usedforsecurity=False).hexdigest()
    assert facts.sha256 == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize(
    ("image", "chip", "packed"),
    [
        pytest.param(ESP8266, "esp8266", False, id="esp8266"),
        pytest.param(ESP8266_OLD, "esp8266", False, id="esp8266 of a core without CRC"),
        pytest.param(esp8266_signed(ESP8266), "esp8266", False, id="signed"),
        pytest.param(esp8266_signed(ESP8266_OLD), "esp8266", False, id="signed without CRC"),
        pytest.param(esp8266_signed(ESP8266, bytes(512)), "esp8266", False, id="RSA-4096"),
        pytest.param(RTOS, "esp8266", False, id="RTOS SDK"),
        pytest.param(RTOS[:-32], "esp8266", False, id="RTOS SDK without SHA-256"),
        pytest.param(PACKED, "esp8266", True, id="gzip"),
        pytest.param(gzip_image(ESP8266_OLD), "esp8266", True, id="gzip without CRC"),
        pytest.param(ESP32, "esp32", False, id="esp32"),
        pytest.param(ESP32_NO_HASH, "esp32", False, id="esp32 without SHA-256"),
    ],
)
def test_chip_and_packing_are_found(scratch: Path, image: bytes, chip: str, packed: bool) -> None:
    facts = facts_of(scratch, image)
    assert (facts.chip, facts.packed) == (chip, packed)


@pytest.mark.parametrize(
    ("number", "chip"),
    [  # esp_app_format.h, esptool
        pytest.param(0, "esp32", id="ESP32"),
        pytest.param(2, "esp32s2", id="S2"),
        pytest.param(5, "esp32c3", id="C3"),
        pytest.param(9, "esp32s3", id="S3"),
        pytest.param(12, "esp32c2", id="C2"),
        pytest.param(13, "esp32c6", id="C6"),
        pytest.param(16, "esp32h2", id="H2"),
        pytest.param(18, "esp32p4", id="P4"),
        pytest.param(20, "esp32c61", id="C61"),
        pytest.param(23, "esp32c5", id="C5"),
        pytest.param(25, "esp32h21", id="H21"),
        pytest.param(28, "esp32h4", id="H4"),
        pytest.param(31, "esp32e22", id="E22"),
        pytest.param(32, "esp32s31", id="S31"),
        pytest.param(77, "esp32-id-77", id="one that comes later"),
        pytest.param(0xFFFF, "esp32-id-65535", id="the highest number"),
    ],
)
def test_every_chip_of_the_esp32_family_is_known(scratch: Path, number: int, chip: str) -> None:
    assert facts_of(scratch, esp32_image("app", "1.0.0", chip_id=number)).chip == chip
    assert ESP32_CHIPS.get(number, chip) == chip


@pytest.mark.parametrize("crc", [True, False], ids=["crc", "no crc"])
@pytest.mark.parametrize("tail", ["", "signed", "gzip"])
def test_running_digests_are_what_an_esp8266_of_any_flash_mode_reports(
    scratch: Path, crc: bool, tail: str
) -> None:
    image = esp8266_image("app", "1.0.0", crc=crc)
    file = {"": image, "signed": esp8266_signed(image), "gzip": gzip_image(image)}[tail]
    modes = [Esp8266(host="x", port=80, image=image, flash_mode=mode) for mode in range(4)]
    assert facts_of(scratch, file).running == {device.sketch_md5 for device in modes}


@pytest.mark.parametrize("tail", [b"", bytes(68), bytes(512)], ids=["", "signed", "arduino"])
@pytest.mark.parametrize("image", [ESP32, ESP32_NO_HASH], ids=["hash", "no hash"])
def test_running_digests_are_what_an_esp32_reports(
    scratch: Path, image: bytes, tail: bytes
) -> None:
    device = Esp32(host="x", port=80, image=image)
    expected = {device.sketch_md5, device.sketch_sha256.lower()}
    assert facts_of(scratch, image + tail).running == expected


@pytest.mark.parametrize(
    ("code", "size"),
    [
        pytest.param(0, 512 << 10, id="512K"),
        pytest.param(1, 256 << 10, id="256K"),
        pytest.param(2, 1 << 20, id="1M"),
        pytest.param(3, 2 << 20, id="2M"),
        pytest.param(4, 4 << 20, id="4M"),
        pytest.param(8, 8 << 20, id="8M"),
        pytest.param(9, 16 << 20, id="16M"),
        pytest.param(7, 0, id="a number nobody gave"),
    ],
)
def test_flash_size_is_read_where_the_device_compares_it(
    scratch: Path, code: int, size: int
) -> None:
    image = esp8266_image("app", "1.0.0", flash_size_code=code)
    assert facts_of(scratch, image).flash_size == size
    assert not facts_of(scratch, gzip_image(image)).flash_size
    assert not facts_of(scratch, ESP32).flash_size


def test_image_larger_than_one_piece_is_read_whole(scratch: Path) -> None:
    payload = bytes(range(256)) * 1000
    for image in (
        esp8266_image("app", "1.0.0", payload=payload),
        esp8266_image("app", "1.0.0", payload=payload, crc=False),
        esp32_image("app", "1.0.0", payload=payload),
    ):
        assert facts_of(scratch, image).sha256 == hashlib.sha256(image).hexdigest()


# -- 2. Damaged and half copied ones ---------------------------------------------------------------


@pytest.mark.parametrize("image", WHOLE)
def test_image_cut_off_anywhere_is_refused(scratch: Path, image: bytes) -> None:
    scratch.write_bytes(image)
    for size in range(len(image) - 1, 0, -1):
        os.truncate(scratch, size)
        with FileIO(scratch) as file, pytest.raises(ValueError, match=r"^is cut off"):
            inspect(file)


def test_empty_file_is_no_image(scratch: Path) -> None:
    with pytest.raises(ValueError, match="is no image"):
        facts_of(scratch, b"")


def test_signature_cut_off_anywhere_is_refused(scratch: Path) -> None:
    signed = esp8266_signed(ESP8266)
    for size in range(len(ESP8266) + 1, len(signed)):
        with pytest.raises(ValueError, match="behind its end"):
            facts_of(scratch, signed[:size])


def test_digest_of_the_rtos_sdk_cut_off_anywhere_is_refused(scratch: Path) -> None:
    for size in range(len(RTOS) - 31, len(RTOS)):
        with pytest.raises(ValueError, match="behind its end"):
            facts_of(scratch, RTOS[:size])
    with pytest.raises(ValueError, match="is cut off"):
        facts_of(scratch, RTOS[:-33])


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(ESP8266, id="esp8266"),
        pytest.param(RTOS, id="RTOS SDK"),
        pytest.param(ESP32, id="esp32"),
        pytest.param(PACKED, id="gzip"),
    ],
)
def test_flipped_bit_in_any_byte_is_refused(scratch: Path, image: bytes) -> None:
    scratch.write_bytes(image)
    for at in range(len(image)):
        if image is PACKED and 4 <= at < 10:
            continue  # time, compressor and system in the gzip header: nobody checks or uses them
        flipped = bytes([image[at] ^ 1 << (at * 5 % 8)])
        with FileIO(scratch, "r+") as file:
            file.seek(at)
            file.write(flipped)
            file.seek(0)
            with pytest.raises(ValueError, match=r"^(is|has|unpacks) "):
                inspect(file)
            file.seek(at)
            file.write(image[at : at + 1])


@pytest.mark.parametrize(
    ("image", "first", "last"),
    [
        pytest.param(ESP8266, 0, 24, id="esp8266 header"),
        pytest.param(ESP8266, 0x1000, 0x1020, id="esp8266 sketch header, length and CRC"),
        pytest.param(ESP8266, len(ESP8266) - 16, len(ESP8266), id="esp8266 padding and checksum"),
        pytest.param(ESP32, 0, 40, id="esp32 header and descriptor"),
        pytest.param(ESP32, len(ESP32) - 48, len(ESP32), id="esp32 checksum and SHA-256"),
    ],
)
def test_every_flipped_bit_of_a_header_or_checksum_is_refused(
    scratch: Path, image: bytes, first: int, last: int
) -> None:
    for at in range(first, last):
        for bit in range(8):
            flipped = image[:at] + bytes([image[at] ^ 1 << bit]) + image[at + 1 :]
            with pytest.raises(ValueError, match=r"^(is|has) "):
                facts_of(scratch, flipped)


@pytest.mark.parametrize("image", [ESP8266_OLD, ESP32_NO_HASH], ids=["esp8266", "esp32"])
def test_without_crc_or_hash_the_checksum_finds_a_flipped_bit_in_the_code(
    scratch: Path, image: bytes
) -> None:
    marker = image.index(b"OTA-EXAMPLE")
    for at in (*range(0x20, 0x200), *range(marker, marker + 21)):
        flipped = image[:at] + bytes([image[at] ^ 16]) + image[at + 1 :]
        with pytest.raises(ValueError, match="checksum is wrong"):
            facts_of(scratch, flipped)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(ESP8266, id="esp8266"),
        pytest.param(ESP32, id="esp32"),
        pytest.param(PACKED, id="gzip"),
        pytest.param(esp8266_signed(ESP8266), id="signed"),
    ],
)
def test_copy_into_preallocated_zeros_is_refused_until_it_is_done(
    scratch: Path, image: bytes
) -> None:
    whole = len(image.rstrip(b"\0"))
    for size in sorted({*range(0, whole, 13), *range(whole - 40, whole)}):
        with pytest.raises(ValueError, match=r"^(is|has|unpacks) "):
            facts_of(scratch, image[:size].ljust(len(image), b"\0"))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 32, 260, 4096, 100_000])
@pytest.mark.parametrize("image", WHOLE)
def test_zeros_behind_an_image_are_refused(scratch: Path, image: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="bytes behind"):
        facts_of(scratch, image + bytes(count))


# -- 3. What may follow an image -------------------------------------------------------------------


@pytest.mark.parametrize("image", [ESP32, ESP32_NO_HASH], ids=["hash", "no hash"])
@pytest.mark.parametrize("count", [68, 512])
def test_esp32_image_with_a_signature_is_accepted(scratch: Path, image: bytes, count: int) -> None:
    assert facts_of(scratch, image + bytes(count)).chip == "esp32"


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(ESP32, id="padded to the sector"),
        pytest.param(ESP32_NO_HASH, id="without SHA-256"),
        pytest.param(
            esp32_image("app", "1.0.0", payload=bytes(4096 - len(ESP32) % 4096)), id="just a sector"
        ),
    ],
)
def test_esp32_image_with_a_secure_boot_sector_is_accepted(scratch: Path, image: bytes) -> None:
    assert facts_of(scratch, padded(image) + SECTOR).chip == "esp32"


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\0", id="one byte"),
        pytest.param(bytes(67), id="67"),
        pytest.param(bytes(69), id="69"),
        pytest.param(bytes(511), id="511"),
        pytest.param(bytes(513), id="513"),
        pytest.param(SECTOR, id="sector at no multiple of 4 KiB"),
        pytest.param(padded(ESP32)[len(ESP32) :], id="padding alone"),
        pytest.param(padded(ESP32)[len(ESP32) :] + SECTOR[:-1], id="cut sector"),
        pytest.param(padded(ESP32)[len(ESP32) :] + SECTOR + b"\0", id="sector and a byte"),
        pytest.param(padded(ESP32)[len(ESP32) :] + bytes(4096), id="sector without magic"),
        pytest.param(padded(ESP32)[len(ESP32) :] + SECTOR * 2, id="two sectors"),
        pytest.param(ESP32, id="a second image"),
    ],
)
def test_other_bytes_behind_an_esp32_image_are_refused(scratch: Path, tail: bytes) -> None:
    with pytest.raises(ValueError, match="behind its end"):
        facts_of(scratch, ESP32 + tail)


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\0", id="one byte"),
        pytest.param(SIGNATURE, id="signature without its length"),
        pytest.param(SIGNATURE + struct.pack("<I", 255), id="too short a length"),
        pytest.param(SIGNATURE + struct.pack(">I", 256), id="length in the wrong order"),
        pytest.param(b"\xff" * 4096, id="erased flash"),
        pytest.param(bytes(9000) + struct.pack("<I", 9000), id="no signature is that long"),
        pytest.param(ESP8266, id="a second image"),
    ],
)
def test_other_bytes_behind_an_esp8266_image_are_refused(scratch: Path, tail: bytes) -> None:
    with pytest.raises(ValueError, match="behind its end"):
        facts_of(scratch, ESP8266 + tail)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(
            ESP32.ljust(0x8000, b"\xff") + b"\xaa\x50" + bytes(3070) + ESP32,
            "merged factory image",
            id="C3: boot loader at 0",
        ),
        pytest.param(
            b"\xff" * 0x1000 + ESP32.ljust(0xF000, b"\xff") + ESP32,
            "neither 0xE9 nor 0x1F",
            id="ESP32: boot loader at 0x1000",
        ),
        pytest.param(ESP8266 + b"\xff" * 0x10000, "merged", id="ESP8266: dump of the flash"),
    ],
)
def test_merged_factory_image_is_refused(scratch: Path, image: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        facts_of(scratch, image)


# -- 4. Packed ones ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\0", id="a zero"),
        pytest.param(bytes(512), id="zeros"),
        pytest.param(bytes(70_000), id="zeros beyond what is read at once"),
        pytest.param(SIGNATURE + struct.pack("<I", 256), id="a signature, which bricks"),
        pytest.param(PACKED, id="a second gzip member"),
    ],
)
def test_bytes_behind_gzip_data_are_refused(scratch: Path, tail: bytes) -> None:
    with pytest.raises(ValueError, match="behind the gzip data, which brick"):
        facts_of(scratch, PACKED + tail)


def test_byte_behind_gzip_data_that_end_with_a_piece_is_refused(scratch: Path) -> None:
    noise = hashlib.shake_128(b"noise").digest(60_000)
    image = esp8266_image("app", "1.0.0", payload=noise)
    room = 64 * 1024 - len(gzip_image(image))
    header = b"\x1f\x8b\x08\x10" + bytes(6) + b"c" * (room - 1) + b"\0"  # RFC 1952: a comment
    packed = header + gzip_image(image)[10:]
    assert len(packed) == 64 * 1024
    assert facts_of(scratch, packed).packed
    with pytest.raises(ValueError, match="behind the gzip data"):
        facts_of(scratch, packed + b"\0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(gzip_image(ESP32), "packed, and only an ESP8266 unpacks", id="esp32"),
        pytest.param(gzip_image(b"hello"), "is no image", id="text"),
        pytest.param(gzip_image(b""), "is no image", id="nothing"),
        pytest.param(gzip_image(PACKED), "is no image", id="gzip in gzip"),
        pytest.param(gzip_image(ESP8266[:-1]), "is cut off", id="image cut off before packing"),
        pytest.param(gzip_image(ESP8266 + b"\0"), "behind its end", id="byte behind, then packed"),
        pytest.param(PACKED[:-8] + bytes(4) + PACKED[-4:], "gzip data", id="wrong CRC"),
        pytest.param(PACKED[:-4] + struct.pack("<I", 256), "gzip data", id="wrong size"),
        pytest.param(b"\x1f\x9d\x90" + bytes(50), "gzip data", id="compress"),
        pytest.param(b"\x1f\x8b\x07" + bytes(50), "gzip data", id="unknown method"),
        pytest.param(zlib.compress(ESP8266), "is no image", id="zlib without gzip"),
    ],
)
def test_gzip_that_no_device_unpacks_is_refused(scratch: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        facts_of(scratch, data)


def test_gzip_bomb_is_refused_quickly(scratch: Path) -> None:
    head = struct.pack("<BBBBIII", 0xE9, 1, 2, 0x40, 0x4010F000, 0x4010F000, 0xFFFFFFF0)
    bomb = gzip.compress(head + bytes(200 << 20), compresslevel=1)
    before = time.process_time()
    with pytest.raises(ValueError, match="unpacks to more than 16 MiB"):
        facts_of(scratch, bomb)
    assert time.process_time() - before < 5


# -- 5. No images --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"<!doctype html><title>404</title>", id="web page"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="zip"),
        pytest.param(b"\xea\x04" + bytes(100), id="0xEA: NONOS SDK v2"),
        pytest.param(b"\x7fELF" + bytes(100), id="ELF"),
        pytest.param(b":020000040000FA\n", id="Intel HEX"),
        pytest.param(b"\xff" * 5000, id="erased flash"),
        pytest.param(bytes(5000), id="zeros"),
        pytest.param(b"UF2\nWQ]\x9e" + bytes(504), id="UF2"),
    ],
)
def test_what_is_no_image_is_refused(scratch: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match="begins with neither 0xE9 nor 0x1F"):
        facts_of(scratch, data)


def test_esp8266_boot_loader_alone_is_refused(scratch: Path) -> None:
    eboot = ESP8266[: 8 + 8 + 0x200]
    alone = eboot + bytes(15 - len(eboot) % 16) + ESP8266[0x21F:0x220]
    for data in (alone, alone.ljust(0x1000, b"\xaa"), alone.ljust(0x2000, b"\xaa")):
        with pytest.raises(ValueError, match=r"no sketch at 0x1000|cut off"):
            facts_of(scratch, data)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([b"", b"\xe9", b"\x1f\x8b\x08\0", ESP8266[:12], ESP32[:24]]),
    st.binary(max_size=300),
)
def test_random_bytes_are_never_more_than_a_value_error(
    scratch: Path, start: bytes, data: bytes
) -> None:
    with pytest.raises(ValueError, match=r"^(is|has|unpacks) "):
        facts_of(scratch, start + data)


@settings(deadline=None)
@given(
    st.sampled_from([ESP8266, ESP8266_OLD, ESP32, ESP32_NO_HASH]),
    st.integers(0, 7000),
    st.binary(min_size=1, max_size=8),
)
def test_overwritten_image_is_whole_or_a_value_error(
    scratch: Path, image: bytes, at: int, data: bytes
) -> None:
    changed = image[:at] + data + image[at + len(data) :]
    try:
        facts = facts_of(scratch, changed)
    except ValueError:
        return
    assert facts.sha256 == hashlib.sha256(changed).hexdigest()


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_xor_is_that_of_a_loop(data: bytes) -> None:
    assert xor_bytes(data) == functools.reduce(operator.xor, data, 0)
