"""Tiny firmware images with the byte layout of real ones, the same bytes on every run.

    python tests/data/make_images.py [DIRECTORY]

writes the example images. Code and data in them are filler, so no chip could do anything with
them; headers, segments, checksums and digests are right, so every tool and every device that
inspects them agrees with them. The file systems are empty ones, as right after formatting, and the
zip files of Mongoose OS hold such images. Nothing of the server is imported here: what an image
looks like comes from the devices' own sources, which makes this file a second opinion on image
inspection.

Every image carries a marker, `OTA-EXAMPLE <project> <version>` and a NUL: an emulated device reads
there what a real sketch has compiled in and sends as its version.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import operator
import struct
import sys
import zipfile
import zlib
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
ESP8266_RTOS_IROM = 0x40210010  # esp8266.project.ld.in: the application partition at 0x10000
ESP32_DROM = 0x3F400020  # file offset 0x20: the flash cache maps 64 KiB pages
ESP32_IRAM = 0x40080000
ESP32_DRAM = 0x3FFF0030  # bootloader.ld
# Where the others map data in flash: esptool targets/*.py, DROM_MAP_START.
DROMS = {
    2: 0x3F000020, 5: 0x3C000020, 9: 0x3C000020, 12: 0x3C000020, 13: 0x42800020, 16: 0x42800020,
    18: 0x40000020, 20: 0x42800020, 23: 0x42000020, 25: 0x42000020, 28: 0x42000020, 31: 0x3C000020,
    32: 0x40000020,
}  # fmt: skip
PARTITIONS_AT = 0x8000  # CONFIG_PARTITION_TABLE_OFFSET
APP_AT = 0x10000  # where gen_esp32part.py puts the first application
BOOT_LOADERS_AT = {0: 0x1000, 2: 0x1000, 18: 0x2000, 23: 0x2000, 28: 0x2000}  # others: 0

LITTLEFS_MAGIC = b"littlefs"  # SPEC.md "superblock": at offset 8 of blocks 0 and 1
LITTLEFS_SUPERBLOCK = 0x0FF00008  # tag: type 0x0ff, id 0, 8 bytes
LITTLEFS_INLINE = 0x20100018  # tag: type 0x201, id 0, 24 bytes
LITTLEFS_CRC = 0x500FFC00  # tag: type 0x500, no id; its size is added
SPIFFS_MAGIC = 0x20140529  # spiffs_nucleus.h SPIFFS_MAGIC()

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


def rtos_image(
    project: str,
    version: str,
    *,
    idf: str = "v3.4-98-g9f0f4d63",
    payload: bytes = b"",
    hash_appended: bool = True,
) -> bytes:
    """An image of ESP8266_RTOS_SDK. Source: esptool bin_image.py ESP8266V3FirmwareImage.

    The descriptor is that of an ESP32, but behind the short header of an ESP8266: at 16. No field
    says that the SHA-256 follows; esptool always appends it.

    Args:
        project: the descriptor's project name, at most 31 bytes; also in the marker.
        version: the descriptor's version, at most 31 bytes; also in the marker.
        idf: the descriptor's SDK version, at most 31 bytes.
        payload: more bytes for the flash-mapped segment.
        hash_appended: False for what another tool may have made.
    """
    code = _filler("flash", 0x1400) + payload  # a real one is never as short as a boot loader
    segments = [
        (ESP8266_RTOS_IROM, _app_descriptor(project, version, idf) + code),
        (ESP8266_IRAM, _filler("iram", 0x100) + _marker(project, version)),
    ]
    image = _esp8266_part(ESP8266_IRAM, (2, 2 << 4), segments)  # DIO, 1 MB
    return image + hashlib.sha256(image).digest() if hash_appended else image


def esp32_image(  # noqa: PLR0913 - each one is a field that some test must vary
    project: str,
    version: str,
    *,
    chip_id: int = 0,
    hash_appended: bool = True,
    payload: bytes = b"",
    idf: str = "v5.3.2",
    secure_version: int = 0,
    revisions: tuple[int, int] = (0, 399),
) -> bytes:
    """An application image of the ESP32 family. Source: esp_app_format.h:20-120, esp_app_desc.h.

    Args:
        project: the descriptor's project name, at most 31 bytes; also in the marker.
        version: the descriptor's version, at most 31 bytes; also in the marker.
        chip_id: the header's chip: 0 ESP32, 2 S2, 5 C3, 9 S3, 12 C2, 13 C6... The load address
            in RAM stays that of the ESP32.
        hash_appended: ends with the SHA-256 of all before it, as every IDF build does.
        payload: more bytes for the flash-mapped segment, to make an image larger.
        idf: the descriptor's ESP-IDF version, at most 31 bytes.
        secure_version: the descriptor's, which the anti-rollback fuses are compared with.
        revisions: of the chip, at least and at most: 301 is v3.1.
    """
    descriptor = _app_descriptor(project, version, idf, secure_version)
    segments = [
        (DROMS.get(chip_id, ESP32_DROM), descriptor + _filler("drom", 0x300) + payload),
        (ESP32_IRAM, _filler("iram", 0x100) + _marker(project, version)),
    ]
    return _esp32_part(segments, chip_id, revisions, hash_appended=hash_appended)


def esp32_signed(image: bytes, kind: str) -> bytes:
    """The image with a signature that signs nothing, as the kind's tool leaves it.

    Args:
        image: for the ESP32 family.
        kind: "secure-boot-v1", espsecure's ECDSA: a version and 64 bytes; "secure-boot-v2", one
            sector of 4 KiB behind a padding to whole sectors; "arduino", tools/bin_signing.py:
            512 bytes filled up with zeros.
    """
    if kind == "secure-boot-v1":
        return image + bytes(4) + SIGNATURE[:64]
    if kind == "arduino":
        return image + SIGNATURE + bytes(512 - len(SIGNATURE))
    image += b"\xff" * (-len(image) % 4096)
    block = (
        struct.pack("<BB2x", 0xE7, 0x02) + hashlib.sha256(image).digest()
    )  # RSA-3072, its digest
    return image + block.ljust(1216, b"\0").ljust(4096, b"\xff")


def esp32_bootloader(chip_id: int = 0, idf: str = "v5.3.2") -> bytes:
    """A second stage boot loader of ESP-IDF 5.1 and newer. Source: esp_bootloader_desc.h.

    Args:
        chip_id: the header's chip.
        idf: the ESP-IDF version in its descriptor, at most 31 bytes; "" for none, as before 5.1.
    """
    text = struct.pack("<B3xI32s24s16x", 0x50, 1, _text(idf), b"Jan  1 2026 12:00:00")
    segments = [
        (ESP32_DRAM, (text if idf else b"") + _filler("boot data", 0x100)),
        (ESP32_IRAM, _filler("boot loader", 0x400)),
    ]
    return _esp32_part(segments, chip_id, (0, 399), hash_appended=True)


def partition_table(*rows: tuple[str, int, int, int, int], at: int = APP_AT) -> bytes:
    """The table as gen_esp32part.py writes it: rows of 32 bytes, the MD5 of them, erased flash.

    Args:
        rows: label, type (0 app, 1 data), subtype, offset, size; none: those of Arduino.
        at: where the first application is, when no rows are given.
    """
    rows = rows or (
        ("nvs", 1, 2, 0x9000, 0x5000),
        ("otadata", 1, 0, 0xE000, 0x2000),
        ("app0", 0, 0x10, at, 0x140000),
        ("app1", 0, 0x11, at + 0x140000, 0x140000),
        ("spiffs", 1, 0x82, at + 0x280000, 0x160000),
    )
    table = b"".join(
        struct.pack("<HBBII16sI", 0x50AA, kind, sort, offset, size, label.encode(), 0)
        for label, kind, sort, offset, size in rows
    )
    table += b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(table, usedforsecurity=False).digest()
    return table.ljust(0xC00, b"\xff")


def factory_image(
    app: bytes, *, chip_id: int = 0, padded: bool = False, table: bytes = b"", app_at: int = APP_AT
) -> bytes:
    """Boot loader, partition table and application in one file, as esptool merge-bin makes it.

    Args:
        app: the application.
        chip_id: the boot loader's chip.
        padded: begins at flash offset 0, where an ESP32 has nothing; else at the boot loader.
        table: the partition table; b"" for that of Arduino.
        app_at: where the application is in flash.
    """
    start = BOOT_LOADERS_AT.get(chip_id, 0)
    flash = (b"\xff" * start + esp32_bootloader(chip_id)).ljust(PARTITIONS_AT, b"\xff")
    flash = (flash + (table or partition_table(at=app_at))).ljust(app_at, b"\xff") + app
    return flash if padded else flash[start:]


def nonos_image() -> bytes:
    """user1.bin of the ESP8266 NONOS SDK. Source: esptool bin_image.py ESP8266V2FirmwareImage."""
    irom = struct.pack("<BBBBIII", 0xEA, 4, 2, 0x40, ESP8266_IRAM, 0, 0x400) + _filler(
        "nonos", 0x400
    )
    return irom + _esp8266_part(ESP8266_IRAM, (2, 0x40), [(ESP8266_IRAM, _filler("iram", 0x100))])


def gzip_image(image: bytes) -> bytes:
    """The image as eboot of core >= 2.7 decompresses it: the last four bytes are its length."""
    return gzip.compress(image, compresslevel=9, mtime=0)


def esp8266_signed(image: bytes, signature: bytes = SIGNATURE) -> bytes:
    """The image as tools/signing.py leaves it: signature and its length (u32) behind it.

    To sign a compressed image, compress first: a device checks the bytes it received.
    """
    return image + signature + struct.pack("<I", len(signature))


def littlefs_image(
    blocks: int = 16, *, block_size: int = 4096, version: int = 0x00020000, seed: int = 0
) -> bytes:
    """An empty file system of littlefs 2, as after formatting. Source: littlefs SPEC.md.

    Blocks 0 and 1 are the root's metadata pair: revision, superblock entry, CRC. All numbers are
    little-endian but the tags, each of which is XORed with the one before it.

    Args:
        blocks: how many; the superblock tells it, so that a shorter file is known to be cut off.
        block_size: 4096 on an ESP32, 8192 on an ESP8266 with more than 512 KB for files.
        version: major and minor in 16 bits each; 0x00020001 from the newest tools.
        seed: what the unused blocks hold, so that two file systems differ; 0 is erased flash.
    """
    sizes = (255, 0x7FFFFFFF, 1022)  # longest name, file and attribute: lfs.h LFS_NAME_MAX...
    superblock = struct.pack("<6I", version, block_size, blocks, *sizes)
    pair = [
        _littlefs_commit(revision, superblock).ljust(block_size, b"\xff") for revision in (2, 1)
    ]
    return b"".join(pair) + _unused((blocks - 2) * block_size, seed)


def spiffs_image(
    blocks: int = 16, *, block_size: int = 4096, page_size: int = 256, seed: int = 0
) -> bytes:
    """An empty SPIFFS. Sources: spiffs_nucleus.h SPIFFS_MAGIC(), spiffsgen.py SpiffsObjLuPage.

    Every block begins with pages that look its objects up. The last entry but one of the last such
    page is a magic number made of the page size and of how many blocks follow, this one included:
    the first block of a file thus tells its whole length.

    Args:
        blocks: how many.
        block_size: 4096 on an ESP32, 8192 on an ESP8266 with 1 MB for files or more.
        page_size: 256 on both.
        seed: what the data pages hold, so that two file systems differ; 0 is erased flash.
    """
    lookup = max(1, block_size // page_size * 2 // page_size) * page_size
    data = _unused(block_size - lookup, seed)
    image = b""
    for index in range(blocks):
        magic = (SPIFFS_MAGIC ^ page_size ^ (blocks - index)) & 0xFFFF
        image += b"\xff" * (lookup - 4) + struct.pack("<HH", magic, 0xFFFF) + data
    return image


def fatfs_image(sectors: int = 128, *, sector_size: int = 4096, seed: int = 0) -> bytes:
    """An empty FAT12 or FAT16. Sources: FatFs ff.c f_mkfs(), esp-idf fatfs_utils/boot_sector.py.

    The boot sector, one file allocation table of one sector, a root directory of one sector, then
    the data. Without the layer for wear levelling: see fatfs_wl_image().

    Args:
        sectors: how many; 65536 and more go into the u32 at 32.
        sector_size: 4096 on flash, 512 on a card.
        seed: what the data sectors hold, so that two file systems differ; 0 is erased flash.
    """
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        b"\xeb\xfe\x90",  # a jump nobody takes
        b"MSDOS5.0",
        sector_size,
        1,  # sectors in a cluster
        1,  # reserved sectors: this one
        1,  # file allocation tables
        sector_size // 32,  # entries of the root directory: one sector
        sectors if sectors < 0x10000 else 0,
        0xF8,  # no removable medium
        1,  # sectors of a table
        63,
        255,
        0,
        sectors if sectors >= 0x10000 else 0,
        0x80,
        0,
        0x29,  # serial number, label and type follow
        0x12345678,
        b"Espressif  ",
        b"FAT     ",
    )
    head = boot.ljust(510, b"\0") + b"\x55\xaa"
    table = b"\xf8\xff\xff".ljust(sector_size, b"\0")
    image = head.ljust(sector_size, b"\0") + table + bytes(sector_size)
    return image + _unused((sectors - 3) * sector_size, seed)


def fatfs_wl_image(sectors: int = 128, *, seed: int = 0) -> bytes:
    """A FAT in the layer for wear levelling, as FFat of an ESP32 mounts it. Source: wl_fatfsgen.py.

    One dummy sector comes first, so the boot sector is at 4096; behind the FAT there are two copies
    of the layer's state, a record of 16 bytes for each sector, and one sector of settings. Sectors
    of the file system itself are what is left of `sectors`.
    """
    size, states = 4096, -(-(64 + 16 * sectors) // 4096)
    left = sectors - 2 - 2 * states
    state = struct.pack("<8I28x", 0, left + 1, 0, 0, 16, size, 2, 0x12345678)
    settings = struct.pack("<8I", 0, sectors * size, size, size, 16, 16, 2, 32)
    after = [_with_crc(state).ljust(states * size, b"\xff")] * 2
    after.append((_with_crc(settings) + bytes(12)).ljust(size, b"\xff"))
    return b"\xff" * size + fatfs_image(left, seed=seed) + b"".join(after)


def mongoose_zip(
    project: str,
    version: str,
    *,
    platform: str = "esp32",
    app: bytes | None = None,
    build_id: str = "20260101-120000",
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A firmware of Mongoose OS. Source: ota-common mgos_updater_common.c, esp32xx updaters.

    A folder <project>-<version>/ with manifest.json first, then the parts. A device unpacks it
    while it comes in, so it must not be compressed; it takes the platform, all of the manifest's
    five fields, and a SHA-1 for each of the two parts it writes.

    Args:
        project: the manifest's name.
        version: the manifest's version.
        platform: "esp32", "esp32c3" or "esp8266".
        app: the application; None: an image for the platform's chip.
        build_id: the manifest's build_id.
        compression: another one makes a file that no device takes.
    """
    chips = {"esp32": 0, "esp32c3": 5}
    if app is None:
        app = (
            esp32_image(project, version, chip_id=chips[platform])
            if platform in chips
            else esp8266_image(project, version)
        )
    parts = {f"{project}.bin": app, "fs.bin": spiffs_image(4)}
    digests = [hashlib.sha1(part, usedforsecurity=False).hexdigest() for part in parts.values()]
    first = {"type": "app", "src": f"{project}.bin", "size": len(app), "cs_sha1": digests[0]}
    second = {"type": "fs", "src": "fs.bin", "addr": 0x190000, "cs_sha1": digests[1]}
    manifest = {
        "name": project,
        "platform": platform,
        "version": version,
        "build_id": build_id,
        "build_timestamp": "2026-01-01T12:00:00Z",
        "parts": {"fw" if platform == "esp8266" else "app": first, "fs": second},
    }
    members = {"manifest.json": json.dumps(manifest).encode()} | parts
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as file:
        for name, contents in members.items():
            entry = zipfile.ZipInfo(f"{project}-{version}/{name}", (2026, 1, 1, 12, 0, 0))
            entry.compress_type = compression
            file.writestr(entry, contents)
    return archive.getvalue()


def tasmota_image(version: str, variant: str = "tasmota", *, payload: bytes = b"") -> bytes:
    """An ESP8266 image as Tasmota names it: "14.1.0(tasmota)". Source: support_tasmota.ino.

    `variant` is what stands in the brackets: CODE_IMAGE_STR, "minimal" for the small image that
    has nothing but the update in it. The marker says both, as the device reports both. Tasmota is
    built for DOUT: platformio_override_sample.ini, board_build.flash_mode.
    """
    return esp8266_image("tasmota", f"{version}({variant})", flash_mode=3, payload=payload)


def tasmota32_image(version: str, variant: str = "tasmota32", *, payload: bytes = b"") -> bytes:
    """An ESP32 image as Tasmota names it; "safeboot" is the small one. See tasmota_image()."""
    return esp32_image("tasmota32", f"{version}({variant})", payload=payload)


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


def _unused(size: int, seed: int) -> bytes:
    """What the unused part of a file system holds: erased flash, or filler."""
    return _filler(f"files {seed}", size) if seed else b"\xff" * size


def _with_crc(data: bytes) -> bytes:
    """The data and a CRC behind them: fatfs_utils/utils.py crc32(), which starts at all ones."""
    return data + struct.pack("<I", zlib.crc32(data, 0xFFFFFFFF))


def _littlefs_commit(revision: int, superblock: bytes) -> bytes:
    """The one commit of a metadata block: SPEC.md, "metadata tags" and "LFS_TYPE_CRC".

    The CRC is that of zlib without its last inversion. What the tag counts behind it is padding
    up to the size that a flash page is programmed in.
    """
    commit, before = struct.pack("<I", revision), 0xFFFFFFFF
    for tag, contents in ((LITTLEFS_SUPERBLOCK, LITTLEFS_MAGIC), (LITTLEFS_INLINE, superblock)):
        commit += struct.pack(">I", tag ^ before) + contents
        before = tag
    padding = -(len(commit) + 8) % 256
    commit += struct.pack(">I", (LITTLEFS_CRC + 4 + padding) ^ before)
    return commit + struct.pack("<I", zlib.crc32(commit) ^ 0xFFFFFFFF)


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


def _esp32_part(
    segments: Sequence[Segment], chip_id: int, revisions: tuple[int, int], *, hash_appended: bool
) -> bytes:
    """An image of the ESP32 family: application or boot loader."""
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
        *revisions,
        hash_appended,
    )
    image = _with_checksum(header, segments)
    return image + hashlib.sha256(image).digest() if hash_appended else image


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


def _app_descriptor(project: str, version: str, idf: str, secure_version: int = 0) -> bytes:
    """The 256 bytes of esp_app_desc_t, which begin the first segment of an app."""
    return struct.pack(
        "<II8x32s32s16s16s32s32sHHBB74x",
        APP_DESCRIPTOR_MAGIC,
        secure_version,  # 0: no anti-rollback
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
