"""Tiny firmware images with the byte layout of real ones, the same bytes on every run.

    python tests/data/make_images.py [DIRECTORY]

writes the example images. Code and data in them are filler, so no chip could do anything with
them; headers, segments, checksums and digests are right, so every tool and every device that
inspects them agrees with them. Nothing of the server is imported here: what an image looks like
comes from the devices' own sources, which makes this file a second opinion on image inspection.

Every image carries a marker, `OTA-EXAMPLE <project> <version>` and a NUL: an emulated device reads
there what a real sketch has compiled in and sends as its version.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import operator
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

MAGIC = 0xE9  # first byte of every image header: esp_app_format.h:20, elf2bin.py write_bin()
CHECKSUM_SEED = 0xEF  # the XOR checksum of all segment bytes starts here: elf2bin.py write_bin()
APP_OFFSET = 0x1000  # Arduino ESP8266: the sketch lies behind the eboot loader: elf2bin.py main()
LENGTH_AND_CRC = slice(0x1010, 0x1018)  # two u32: elf2bin.py:34-35
CRC_POLYNOMIAL = 0x04C11DB7  # elf2bin.py crc8266(), which is CRC-32/MPEG-2
APP_DESCRIPTOR_MAGIC = 0xABCD5432  # esp_app_desc.h:21
SIGNATURE = bytes(range(256))  # as long as an RSA-2048 signature; signs nothing

# Load addresses a linker script of the chip really gives; a loader goes by them.
ESP8266_EBOOT = 0x4010F000  # eboot.ld: the loader keeps clear of the sketch's instruction RAM
ESP8266_IROM0 = 0x40201010  # eagle.app.v6.common.ld: flash mapped at 0x40200000
ESP8266_IRAM = 0x40100000
ESP8266_DRAM = 0x3FFE8000
ESP32_DROM = 0x3F400020  # file offset 0x20: the flash cache maps 64 KiB pages
ESP32_IRAM = 0x40080000

Segment = tuple[int, bytes]  # load address, contents


def esp8266_image(  # noqa: PLR0913 - each one is a byte or a word that some test must vary
    project: str,
    version: str,
    *,
    flash_mode: int = 2,
    flash_size_code: int = 4,
    payload: bytes = b"",
    crc: bool = True,
    seed: int = 0,
) -> bytes:
    """An Arduino ESP8266 image: eboot, 0xAA up to 0x1000, the sketch. Source: tools/elf2bin.py.

    Args:
        project: goes into the marker.
        version: goes into the marker; an ESP8266 image has no version field.
        flash_mode: byte 2: 0 QIO, 1 QOUT, 2 DIO, 3 DOUT.
        flash_size_code: high nibble of byte 3: 0 512K, 1 256K, 2 1M, 3 2M, 4 4M, 8 8M, 9 16M.
        payload: more bytes for the flash-mapped segment, to make an image larger.
        crc: False for a core from before the CRC: the two words are ordinary data.
        seed: another number gives other filler: the same version, built again.
    """
    words = bytes(8) if crc else _filler(f"words {seed}", 8)
    flash = (flash_mode, flash_size_code << 4)
    eboot = [(ESP8266_EBOOT, _filler("eboot", 0x200))]
    sketch = [
        (ESP8266_IROM0, words + _filler(f"irom0 {seed}", 0x400) + payload),
        (ESP8266_IRAM, _filler(f"text {seed}", 0x100)),
        (ESP8266_DRAM, _marker(project, version)),
    ]
    image = _esp8266_part(ESP8266_EBOOT, flash, eboot).ljust(APP_OFFSET, b"\xaa")
    image += _esp8266_part(ESP8266_IRAM, flash, sketch)
    return _with_length_and_crc(image) if crc else image


def esp32_image(
    project: str,
    version: str,
    *,
    chip_id: int = 0,
    hash_appended: bool = True,
    payload: bytes = b"",
    idf: str = "v5.3.2",
) -> bytes:
    """An application image of the ESP32 family. Source: esp_app_format.h:20-120, esp_app_desc.h.

    Args:
        project: the descriptor's project name, at most 31 bytes; also in the marker.
        version: the descriptor's version, at most 31 bytes; also in the marker.
        chip_id: the header's chip: 0 ESP32, 2 S2, 5 C3, 9 S3, 12 C2, 13 C6... The load addresses
            stay those of the ESP32.
        hash_appended: ends with the SHA-256 of all before it, as every IDF build does.
        payload: more bytes for the flash-mapped segment, to make an image larger.
        idf: the descriptor's ESP-IDF version, at most 31 bytes.
    """
    segments = [
        (ESP32_DROM, _app_descriptor(project, version, idf) + _filler("drom", 0x300) + payload),
        (ESP32_IRAM, _filler("iram", 0x100) + _marker(project, version)),
    ]
    header = struct.pack(
        "<BBBBIB3xHBHH4xB",
        MAGIC,
        len(segments),
        2,  # SPI mode DIO
        0x2F,  # 4 MB, 80 MHz
        ESP32_IRAM,  # entry
        0xEE,  # no write-protect pin: esp_image_header_t.wp_pin
        chip_id,
        0,  # minimal chip revision, as old bootloaders read it
        0,  # minimal chip revision
        399,  # maximal chip revision 3.99
        hash_appended,
    )
    image = _with_checksum(header, segments)
    return image + hashlib.sha256(image).digest() if hash_appended else image


def gzip_image(image: bytes) -> bytes:
    """The image as eboot of core >= 2.7 decompresses it: the last four bytes are its length."""
    return gzip.compress(image, compresslevel=9, mtime=0)


def esp8266_signed(image: bytes, signature: bytes = SIGNATURE) -> bytes:
    """The image as tools/signing.py leaves it: signature and its length (u32) behind it.

    To sign a compressed image, compress first: a device checks the bytes it received.
    """
    return image + signature + struct.pack("<I", len(signature))


def crc8266(data: bytes) -> int:
    """The checksum the core keeps at 0x1014: MSB first, starts at 0xFFFFFFFF, no final XOR."""
    crc = 0xFFFFFFFF
    table = _crc_table()
    for byte in data:
        crc = (crc << 8 & 0xFFFFFFFF) ^ table[crc >> 24 ^ byte]
    return crc


def write_examples(directory: Path) -> list[Path]:
    """The example files, written to the directory, which is made when it is missing."""
    images = {
        "firmware-1.0.0.bin": esp8266_image("firmware", "1.0.0"),
        "firmware-1.9.0.bin": esp8266_image("firmware", "1.9.0"),
        "firmware-1.10.0.bin": esp8266_image("firmware", "1.10.0"),
        "sensor-esp32-0.1.bin": esp32_image("sensor-esp32", "0.1"),
        "sensor-esp32-0.2.0.bin": esp32_image("sensor-esp32", "0.2.0"),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        (directory / name).write_bytes(image)
    return [directory / name for name in images]


def main(arguments: Sequence[str]) -> int:
    """The exit status: always 0. Takes the directory to write to, and names what it wrote."""
    default = Path(__file__).resolve().parents[2] / "examples" / "firmware"
    for path in write_examples(Path(arguments[0]) if arguments else default):
        sys.stdout.write(f"{path} ({path.stat().st_size} bytes)\n")
    return 0


def _filler(name: str, size: int) -> bytes:
    """Bytes that look like code: no long runs, so that compressing them gains little."""
    return hashlib.shake_128(name.encode()).digest(size)


def _marker(project: str, version: str) -> bytes:
    return f"OTA-EXAMPLE {project} {version}\0".encode()


def _with_checksum(header: bytes, segments: Sequence[Segment]) -> bytes:
    """Header and segments, filled up to 16 bytes; the last byte is the XOR of all contents."""
    image = bytearray(header)
    checksum = CHECKSUM_SEED
    for address, contents in segments:
        data = contents + bytes(-len(contents) % 4)  # the linker keeps sections whole words long
        image += struct.pack("<II", address, len(data)) + data
        checksum = functools.reduce(operator.xor, data, checksum)
    image += bytes(15 - len(image) % 16)
    image.append(checksum)
    return bytes(image)


def _esp8266_part(entry: int, flash: tuple[int, int], segments: Sequence[Segment]) -> bytes:
    """One of the two images in an Arduino file. `flash` is what bytes 2 and 3 say about it."""
    return _with_checksum(struct.pack("<BBBBI", MAGIC, len(segments), *flash, entry), segments)


def _with_length_and_crc(image: bytes) -> bytes:
    """The image with its two words filled in: elf2bin.py add_crc().

    The tool does this last, so the XOR checksum was taken while both words were zero.
    """
    filled = bytearray(image)
    filled[LENGTH_AND_CRC] = struct.pack("<II", len(image), crc8266(image))
    return bytes(filled)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (CRC_POLYNOMIAL if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return tuple(table)


def _app_descriptor(project: str, version: str, idf: str) -> bytes:
    """The 256 bytes of esp_app_desc_t, which begin the first segment of an app."""
    return struct.pack(
        "<II8x32s32s16s16s32s32sHHBB74x",
        APP_DESCRIPTOR_MAGIC,
        0,  # secure version: no anti-rollback
        _text(version),
        _text(project),
        b"12:00:00",
        b"Jan  1 2026",
        _text(idf),
        hashlib.sha256(_marker(project, version)).digest(),  # stands for the digest of the ELF
        0,  # minimal eFuse block revision
        199,  # maximal eFuse block revision
        16,  # MMU page size, log2
        2,  # SPI mode DIO
    )


def _text(value: str) -> bytes:
    """The text for a field of 32 bytes with a NUL at its end."""
    text = value.encode()
    if len(text) > 31:
        message = f"more than 31 bytes: {value!r}"
        raise ValueError(message)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
