#!/usr/bin/env python3
r"""Gives every ESP8266 and ESP32 the newest firmware that is right for it, over the air.

Copy this file to a Raspberry Pi and start it; it needs Python 3.11 and nothing else:

    python3 ota_server.py --dir /my-firmware-directory

How a request flows, which is also the order of the sections; each uses only what stands above it:

    bytes -> Loop -> parse_head -> Request -> guards -> route -> read_report -> Report
                                                                     |
             catalog.releases(project) -> [Release...] --------------+
                                          rules ---------------------+-> choose
                                                                           |
    bytes <- Loop <- Reply <- endpoint translates <- Release | Objection <-+-> Event -> listeners

The options are in read_config(); this is what --help says below them:

Each option can stand in the environment instead, as OTA_DIR, OTA_PORT, OTA_MAX_CONNECTIONS...
The folder holds <project>-<version>.bin, or <project>/<any name with a version>.bin.

Commands instead of options; each has its own --help:
  ota_server.py sign URL       prints a URL that opens one image for an hour
  ota_server.py check URL      asks as a device would and says what is wrong
  ota_server.py publish FILE   brings a release to a server that takes uploads
  ota_server.py explain URL    says rule by rule why a device gets a release, or not

Try it as a device would ask:
  curl -i -H 'x-ESP8266-version: 1.0.0' http://localhost:8000/firmware

A certificate that small devices take; an ESP8266 wants an address as DNS:<ip>, others as IP:<ip>:
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -subj /CN=ota -addext subjectAltName=DNS:192.168.1.5,IP:192.168.1.5 -keyout ota.pem -out ota.pem
"""

from __future__ import annotations

import argparse
import base64
import errno
import functools
import hashlib
import hmac
import html
import ipaddress
import json
import logging
import os
import re
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import zlib
from calendar import timegm
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate, parsedate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, FileIO
from itertools import chain, count, zip_longest
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol, TextIO
from urllib.parse import quote, unquote

__version__ = "0.1.0"

# -- 1. Words and limits ---------------------------------------------------------------------------

MAX_HEAD = 8 * 1024  # bytes of a request's head; a device sends about 450
MAX_BODY = 8 * 1024  # bytes of a body nobody asked for that are read to keep the connection
MAX_VERSION = 128  # characters of the normal form; nobody wrote a longer one
MAX_UNPACKED = 16 << 20  # bytes: the largest flash of an ESP8266; stops a gzip bomb
MAX_TAIL = 8 * 1024  # bytes behind an image that can be padding and signature
MAX_NOTES = 16 * 1024  # bytes of release notes that are shown
MAX_SUMMARY = 255  # characters of them in a manifest: Home Assistant takes no more
MAX_FILES = 40_000  # open at once; even where the system sets no limit
MAX_THREADS = 32  # endpoints that block, at once; more wait their turn
BACKLOG = 4096  # connections the kernel keeps for us; 5, the standard, lost 162 of 300 devices
ACCEPT_BURST = 64  # connections accepted before the open ones get their turn again
REQUESTS = 16  # answered on one connection before the others get their turn
CHUNK = 64 * 1024  # bytes read at once while a file is checked
TURN = 512 * 1024  # bytes one download sends before the others get their turn
PIECE = 16 * 1024  # bytes of a TLS record at most, and of an image's first bytes
DEVICE_RECORD = 4 * 1024  # bytes of a TLS record to a device, which must hold a whole one in memory
SEND_BUFFER = 64 * 1024  # bytes in the kernel per download, whose own choice would be 2.5 MB
TLS_SEND_BUFFER = 32 * 1024  # the same under TLS, until the reader turns out to be fast
AT_ONCE = 32 * 1024  # bytes of an image that are read and sent at once, where all are taken
LAST = 8 * 1024  # bytes of an image that are sent last, when the kernel holds fewer others
LAST_BUFFER = LAST // 2  # bytes in the kernel before them, which doubles this
MIN_RATE = 1024  # bytes/s at which a body must come in the end
DEFER_SECONDS = 1  # the kernel keeps a connection from us while it is silent
SCAN_SECONDS = 1.0  # between two looks at the folder: changes are seen within 2 s
SETTLE_NS = 100_000_000  # a file changed less than this long ago may still be written
COARSE_SETTLE_NS = 2_100_000_000  # the same where mtime is a whole second: FAT counts in twos
RETRY_SECONDS = 30  # what Retry-After says with a 503
SIGNED_SECONDS = 3600  # how long a signed URL is good, unless told
COMPLAIN_SECONDS = 60  # between two lines about the same trouble

STARVED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))  # there is just no room
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))  # nor on the disk
LOST = frozenset((errno.EACCES, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS))
UNWRITABLE = STARVED | LOST | {errno.ESTALE}  # a folder; a socket does not fail so

log = logging.getLogger("ota")


class Refused(Exception):
    """A request that is not served: an HTTP status and a sentence for whoever holds the device.

    Raised anywhere below answer(), caught only there and where the loop reads a head.
    """

    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers  # to go with the reply


class Deferred(Exception):
    """What was asked has to wait for something: a thread answers it, not the loop."""


def shown(text: str) -> str:
    """Foreign text made safe for a sentence: quoted, cut."""
    return ascii(text[:64])


def printable(text: str) -> str:
    """Text made safe for a terminal: quoted if it must be."""
    return text if text.isprintable() else ascii(text)


# -- 2. Versions: which release is newer -----------------------------------------------------------

_NUMBER = r"(?:0|[1-9][0-9]*+)"  # SemVer 2: no leading zeros
_IDENTIFIER = rf"(?:[0-9]*+[A-Za-z-][0-9A-Za-z-]*+|{_NUMBER})"  # SemVer 9
_PRERELEASE = rf"(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*+))?"
_BUILD = r"(\+[0-9A-Za-z-]++(?:\.[0-9A-Za-z-]++)*+)?"  # SemVer 10
_VERSION = re.compile(rf"[vV]?({_NUMBER})\.({_NUMBER})(?:\.({_NUMBER}))?{_PRERELEASE}{_BUILD}")


def _precedence(identifier: str) -> tuple[bool, int, str]:
    """What orders identifiers of a pre-release: numbers first, by value; SemVer 11.4."""
    return not identifier.isdecimal(), int(identifier) if identifier.isdecimal() else 0, identifier


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A semantic version; ordered by SemVer 2.0.0 section 11, so build metadata does not count."""

    precedence: tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]
    text: str = field(compare=False)  # normal form: 1.2 becomes 1.2.0, v1.2.3 becomes 1.2.3

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a fleet says the same few again and again
    def parse(cls, text: str) -> Version:
        """The version that `text` names. ValueError: it names none; the message is a sentence."""
        match = _VERSION.fullmatch(text) if len(text) <= MAX_VERSION else None
        if match is None:
            raise ValueError(f"{shown(text)} is no version such as 1.2.3")
        major, minor, patch, prerelease, build = match.groups(default="")
        identifiers = tuple(map(_precedence, filter(None, prerelease.split("."))))
        normal = f"{major}.{minor}.{patch or 0}{'-' * bool(prerelease)}{prerelease}{build}"
        if len(normal) > MAX_VERSION:
            raise ValueError(f"{shown(text)} is too long: it is no version such as 1.2.3")
        return cls((int(major), int(minor), int(patch or 0), not prerelease, identifiers), normal)

    @property
    def prerelease(self) -> bool:
        """Whether SemVer 9 calls it a pre-release, which no device gets unasked."""
        return not self.precedence[3]

    def __str__(self) -> str:
        """The normal form."""
        return self.text


UNVERSIONED = Version.parse("0.0.0-unversioned")  # of a file that can be had by its name only


# -- 3. Images: what is inside a .bin, and is it whole ---------------------------------------------
# Layouts: esp_app_format.h, esp_image_format.c (ESP-IDF); elf2bin.py, eboot.c (ESP8266 core);
# littlefs SPEC.md; spiffs_nucleus.h SPIFFS_MAGIC; fatgen103; mongoose-os fw_meta.py.

ESP32_CHIPS = {  # chip_id of the header
    0: "esp32", 2: "esp32s2", 5: "esp32c3", 9: "esp32s3", 12: "esp32c2", 13: "esp32c6",
    16: "esp32h2", 18: "esp32p4", 20: "esp32c61", 23: "esp32c5", 25: "esp32h21", 28: "esp32h4",
    31: "esp32e22", 32: "esp32s31",
}  # fmt: skip
# KiB, by the high nibble of byte 3
ESP8266_FLASH = {0: 512, 1: 256, 2: 1024, 3: 2048, 4: 4096, 8: 8192, 9: 16384}
SKETCH_AT = 0x1000  # where the ESP8266 core puts the sketch, behind its boot loader
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
UNKNOWN_CHIP = "no device"  # of a file that is no image
_WRONG = "is damaged or half copied: its {} is wrong"
_CUT = "is cut off: the file ends before the image does"
_TRAILING = "has bytes behind its end that are no signature; is it a merged factory image?"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a whole image says of itself; digests are lower-case hex."""

    chip: str = ""  # esp8266, esp32, esp32c3... or UNKNOWN_CHIP; "": any
    running: frozenset[str] = frozenset()  # sketch-md5s, sketch-sha256 of a device that runs it
    flash_size: int = 0  # bytes of flash it is built for; 0: the device does not compare
    packed: bool = False  # by gzip: only an ESP8266 unpacks
    flash_mode: int = 3  # of an ESP8266: 0 QIO, 1 QOUT, 2 DIO, 3 DOUT, which suits every board
    by_mode: tuple[str, ...] = ()  # the sketch-md5 of an ESP8266 of each of these flash modes
    md5: str = ""  # of the file
    sha256: str = ""


class _Walk:
    """Reads an image from front to back in pieces and takes digests on the way."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.ahead = b""
        self.position = self._crc = 0
        self.digests: list[hashlib._Hash] = []

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file, without taking them."""
        while len(self.ahead) < size and (chunk := next(self.chunks, b"")):
            self.ahead += chunk
        return self.ahead[:size]

    def read(self, size: int, *, masked: bool = False) -> bytes:
        """The next `size` bytes; `masked` ones are zeros to the CRC. ValueError: cut off."""
        piece = self.peek(size)
        if len(piece) < size:
            raise ValueError(_CUT)
        self.ahead = self.ahead[size:]
        self.position += size
        for digest in self.digests:
            digest.update(piece)
        self._crc = zlib.crc32((bytes(size) if masked else piece).translate(_MIRRORED), self._crc)
        return piece

    def crc(self) -> int:
        """CRC-32/MPEG-2 of all that was read: zlib's CRC is the same one, mirrored."""
        return int(f"{self._crc ^ 0xFFFFFFFF:032b}"[::-1], 2)

    def xor(self, size: int) -> int:
        """All of the next `size` bytes xored."""
        total = 0
        for start in range(0, size, CHUNK):
            total ^= xor_bytes(self.read(min(size - start, CHUNK)))
        return total

    def is_sound(self, segments: int, checksum: int = 0xEF) -> bool:
        """Reads the segments and, at the end of a padding to 16, the checksum over their bytes."""
        for _ in range(segments):
            checksum ^= self.xor(int.from_bytes(self.read(8)[4:], "little"))
        return self.read(16 - self.position % 16)[-1] == checksum


def xor_bytes(data: bytes) -> int:
    """All bytes of `data` xored; folds one long integer, as a loop over bytes takes 50 ms a MB."""
    value, size = int.from_bytes(data, "little"), len(data)
    while size > 1:
        half = (size + 1) // 2
        value, size = (value >> (8 * half)) ^ (value & ((1 << (8 * half)) - 1)), half
    return value


def _esp32(walk: _Walk) -> Facts:
    """Checks an image of the ESP32 family."""
    walk.digests = md5, sha256 = [hashlib.md5(usedforsecurity=False), hashlib.sha256()]
    header = walk.read(24)
    if not walk.is_sound(header[1]):
        raise ValueError(_WRONG.format("checksum"))
    appended = sha256.hexdigest()
    if header[23] == 1 and walk.read(32).hex() != appended:
        raise ValueError(_WRONG.format("appended SHA-256"))
    tail = walk.peek(MAX_TAIL + 1)
    sector = tail[-walk.position % 4096 :]  # Secure Boot v2 signs in a 4 KiB sector, magic 0xE7
    if len(tail) not in {0, 68, 512} and not (len(sector) == 4096 and sector[0] == 0xE7):
        raise ValueError(_TRAILING)
    chip = int.from_bytes(header[12:14], "little")
    return Facts(ESP32_CHIPS.get(chip, f"esp32-id-{chip}"), frozenset((md5.hexdigest(), appended)))


def _esp8266(walk: _Walk) -> Facts:
    """Checks an image for the ESP8266."""
    start = walk.read(3)
    # The Updater writes the device's own flash mode over byte 2: one image, four digests.
    md5s = [hashlib.md5(start[:2] + bytes((mode,)), usedforsecurity=False) for mode in range(4)]
    walk.digests = [*md5s, sha256 := hashlib.sha256(start)]
    size = ESP8266_FLASH.get(walk.read(5)[0] >> 4, 0) << 10
    if not walk.is_sound(start[1]):
        raise ValueError(_WRONG.format("checksum"))
    if walk.position <= SKETCH_AT:
        walk.read(SKETCH_AT - walk.position)
        _sketch(walk)
    by_mode = tuple(md5.hexdigest() for md5 in md5s)
    tail = walk.peek(MAX_TAIL + 1).removeprefix(sha256.digest())  # ESP8266_RTOS_SDK appends it
    if tail and not 0 < int.from_bytes(tail[-4:], "little") == len(tail) - 4:  # signing.py
        raise ValueError(_TRAILING)
    return Facts("esp8266", frozenset(by_mode), size, flash_mode=start[2], by_mode=by_mode)


def _sketch(walk: _Walk) -> None:
    """Checks the sketch behind the boot loader: elf2bin.py write_bin() and add_crc()."""
    header, size = walk.read(8), int.from_bytes(walk.read(8)[4:], "little")
    if header[0] != 0xE9:
        raise ValueError("is no ESP8266 image: there is no sketch at 0x1000")
    words = walk.read(8, masked=True)
    sound = walk.is_sound(header[1] - 1, 0xEF ^ xor_bytes(words) ^ walk.xor(size - 8))
    if int.from_bytes(words[:4], "little") == walk.position:  # the CRC came after the checksum
        if int.from_bytes(words[4:], "little") != walk.crc():
            raise ValueError(_WRONG.format("CRC"))
    elif not sound:  # old cores wrote no CRC: the words are code like the rest
        raise ValueError(_WRONG.format("checksum"))


def unpacked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """What a gzip file holds, in pieces of at most CHUNK bytes.

    Raises:
        ValueError: it is not whole, or something follows: eboot takes the last four bytes as the
            size. The message completes "name.bin ...".
    """
    unpack = zlib.decompressobj(wbits=31)
    size = 0
    for chunk in chunks:
        try:
            while piece := unpack.decompress(chunk, CHUNK):
                size += len(piece)
                yield piece
                chunk = unpack.unconsumed_tail  # noqa: PLW2901
        except zlib.error as err:
            raise ValueError(_WRONG.format("gzip data")) from err
        if size > MAX_UNPACKED:
            raise ValueError(f"unpacks to more than {MAX_UNPACKED >> 20} MiB")
        if unpack.unused_data:
            raise ValueError("has bytes behind the gzip data, which brick a device")
    if not unpack.eof:
        raise ValueError(_CUT)


def _filesystem(kind: str, head: bytes, size: int) -> None:
    """Checks that a filesystem is as long as it says. ValueError: it is none, or cut off."""

    def number(at: int, width: int = 4) -> int:
        return int.from_bytes(head[at : at + width], "little")

    wanted = size
    if kind == "littlefs":
        sound, wanted = head[8:16] == b"littlefs", number(24) * number(28)
    elif kind == "spiffs":  # a magic in each block counts those that follow
        sound = any(
            all(
                number(at + max(unit, 2 * block // unit) - 4, 2)
                == (0x0529 ^ unit ^ (size - at) // block) & 0xFFFF
                for at in range(0, min(size, CHUNK), block)
            )
            for unit in (128, 256, 512, 1024)
            for block in (4096, 8192, 16384, 32768, 65536)
        )
    else:
        start = 0 if head[510:512] == b"\x55\xaa" else 4096  # wear levelling: a sector before it
        sound = head[start + 510 : start + 512] == b"\x55\xaa"
        wanted = number(start + 11, 2) * (number(start + 19, 2) or number(start + 32))
        wanted += 2 * start * (1 - -(64 + size // 256) // 4096)  # what else wear levelling keeps
    if not sound:
        raise ValueError(f"is no {kind} image, or not whole")
    if not 0 < wanted <= size:
        raise ValueError(_CUT)


def _mongoose(file: FileIO) -> Facts:
    """Checks what Mongoose OS takes: a zip with a manifest.json first and every CRC right."""
    import zipfile  # noqa: PLC0415 - few need it, and it takes memory

    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = sum(each.file_size for each in members)
            if size > MAX_UNPACKED or any(each.compress_type for each in members):
                raise ValueError("is compressed inside or too large: no device unpacks it")
            if broken := archive.testzip():
                raise ValueError(_WRONG.format(f"CRC of {printable(broken)}"))
            first = {each.filename.rpartition("/")[2]: each for each in members[:1]}
            about = json.loads(archive.read(first["manifest.json"]))
        chips = {chip: chip for chip in ("esp8266", *ESP32_CHIPS.values())}
        needed = [about[name] for name in ("platform", "version", "build_id", "parts")]
        return Facts(chips[needed[0].lower()])
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, OverflowError) as err:
        raise ValueError(_WRONG.format("zip data")) from err  # OSError: an offset before the file
    except (LookupError, AttributeError, TypeError, json.JSONDecodeError, UnicodeError) as err:
        raise ValueError("is no Mongoose OS firmware: no manifest.json of an ESP first") from err


def inspect(file: FileIO, kind: str = "sketch") -> Facts:
    """What `file`, read from here on, is, if it is a whole image of that kind for an ESP.

    Raises:
        ValueError: it is not; the message completes "name.bin ...".
        OSError: it cannot be read.
    """
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        while chunk := file.read(CHUNK):
            md5.update(chunk)
            sha256.update(chunk)
            yield chunk

    walk = _Walk(chunks())
    packed = walk.peek(1) == b"\x1f"
    if packed:
        walk = _Walk(unpacked(chain((walk.ahead,), walk.chunks)))
    head = walk.peek(CHUNK)
    if kind == "sketch":
        if head[:1] != b"\xe9":
            raise ValueError("is no image for an ESP: it begins with neither 0xE9 nor 0x1F")
        # Bytes 8 to 11: on an ESP8266 a load address in its RAM, in the ESP32 family pin settings.
        facts = _esp8266(walk) if head[11:12] in {b"\x3f", b"\x40"} else _esp32(walk)
    else:
        size = len(walk.ahead) + sum(map(len, walk.chunks))
        facts = _mongoose(file) if kind == "zip" else Facts("esp8266" if packed else "")
        if kind != "zip":
            _filesystem(kind, head, size)
    if packed and facts.chip != "esp8266":
        raise ValueError("is packed, and only an ESP8266 unpacks")
    facts = replace(facts, md5=md5.hexdigest(), sha256=sha256.hexdigest())
    return replace(facts, packed=True, flash_size=0) if packed else facts  # no device looks inside


# -- 4. Catalog: which releases there are ----------------------------------------------------------

# Device, inode, size in bytes, mtime and ctime in ns: as long as they stay, so do the bytes. ctime
# because touch -r, cp -p and rsync --times set mtime back: docs/decisions/0005-what-a-file-is.md.
Identity = tuple[int, int, int, int, int]
_Notes = tuple[Identity, str]  # of a file with release notes, and its text
_NAME = r"(?:(?P<project>.+{})[-_ ])?(?P<version>[vV]?[0-9]+\.[0-9]+{})"
_ENDINGS = r"(?:\.(?P<filesystem>littlefs|spiffs|fatfs))?\.(?P<ending>bin|bin\.gz|zip)"
_FILE_NAME = re.compile(rf"(?s)(?P<stem>.+?){_ENDINGS}")
_RELEASE_NAME = re.compile(_NAME.format("", r"(?:\.[0-9]+)?(?:\+.*)?"))
_OTHER_NAME = re.compile(_NAME.format("?", ".*"))
_VERSION_INSIDE = re.compile(r"[vV]?[0-9]+\.[0-9.]+|(?:.*[-_ ])?[vV]?[0-9]+\.[0-9.]+[-+].*")
_UNREADABLE = "cannot be read" + (f" by uid {os.getuid()}" if sys.platform != "win32" else "")


@dataclass(frozen=True, slots=True)
class Release:
    """One image that may be offered; the facts are those of the bytes with this identity."""

    project: str
    version: Version
    kind: str  # "sketch" | "littlefs" | "spiffs" | "fatfs" | "zip", for Mongoose OS
    path: str  # of the file itself, where the listed name is a link
    name: str  # as listed, without the folder
    identity: Identity
    facts: Facts = Facts()
    notes: str = ""  # what the .md file beside it says

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[2]

    @property
    def modified(self) -> int:
        """When the file was last written, UTC seconds."""
        return self.identity[3] // 1_000_000_000


@dataclass(frozen=True, slots=True)
class Image:
    """An open image: everything is of this one descriptor. Whoever holds it closes `file`."""

    file: FileIO
    size: int  # bytes
    md5: str  # lower-case hex
    sha256: str
    identity: Identity

    def is_unchanged(self) -> bool:
        """Whether the file still holds the checked bytes; a rename may have changed its ctime."""
        return identity_of(os.fstat(self.file.fileno()))[:4] == self.identity[:4]


class Catalog(Protocol):
    """Where releases come from. Each method may raise Refused(503): not to be known just now."""

    def newest(self) -> Mapping[str, Version]:
        """By project, the newest version that is promised, checked or not; never Refused."""

    def projects(self) -> Sequence[str]:
        """All project names, sorted, even of those none of whose files can be offered."""

    def releases(self, project: str) -> Sequence[Release]:
        """The project's whole releases, newest first, never none. Refused(404): there are none."""

    def open(self, release: Release) -> Image:
        """The release's bytes. Refused(503): they are no longer those that were checked."""


def identity_of(status: os.stat_result) -> Identity:
    """What stays the same as long as a file's bytes do."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_name(stem: str) -> tuple[str, Version]:
    """Project and version in a file name without its end; the project is "" if it names none.

    A plain version at the very end wins: `my-app-2.0-1.2.3` is 1.2.3 of `my-app-2.0`; else the
    first one: `app-1.0.0-rc.1` is a pre-release of `app`. ValueError completes "name.bin ...".
    """
    match = _RELEASE_NAME.fullmatch(stem) or _OTHER_NAME.fullmatch(stem)
    if match is None:
        raise ValueError("has no version in its name, such as name-1.2.3.bin")
    if _VERSION_INSIDE.fullmatch(match["project"] or ""):
        raise ValueError("has two versions in its name")
    try:
        return match["project"] or "", Version.parse(match["version"])
    except ValueError as err:
        raise ValueError(f"has a name whose version cannot be read: {err}") from err


def _kind_of(match: re.Match[str]) -> str:
    """The kind of a file whose name is as _FILE_NAME says."""
    return "zip" if match["ending"] == "zip" else match["filesystem"] or "sketch"


def _promised(entry: os.DirEntry[str], folder: str, inside: str) -> Release:
    """The release that a directory entry promises. ValueError: none; completes "name ..."."""
    if entry.name.startswith("."):
        raise ValueError("is a dot file")
    if entry.is_dir():
        os.scandir(entry.path).close()  # raises again what kept _entries() out
    match = _FILE_NAME.fullmatch(entry.name)
    if match is None:
        raise ValueError("does not end in .bin, .bin.gz or .zip")
    try:
        project, version = read_name(match["stem"])
    except ValueError:
        if not folder:
            raise
        project, version = folder, UNVERSIONED
    if version.prerelease and version != UNVERSIONED:
        raise ValueError(f"is a pre-release, {version}")
    if not (folder or project):
        raise ValueError("has no project in its name, such as name-1.2.3.bin")
    path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
    if not path.startswith(inside):
        raise ValueError("is a link that leaves the firmware folder")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no file")
    identity = identity_of(status)
    return Release(folder or project, version, _kind_of(match), path, entry.name, identity)


def _is_still(release: Release, entry: os.DirEntry[str]) -> bool:
    """Whether a directory entry is a file that nobody has touched since it became `release`."""
    # A link's own identity is never that of its file: what a link stands for is looked up again.
    return identity_of(entry.stat(follow_symlinks=False)) == release.identity


def _entries(root: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every file in the folder, with "", and in each folder in it, with that folder's name."""
    for entry in os.scandir(root):
        try:
            is_folder = entry.is_dir() and not entry.name.startswith(".")
            inner = os.scandir(os.path.realpath(entry.path)) if is_folder else None
        except OSError as err:  # as _promised() will say
            if err.errno in STARVED:
                raise
            inner = None
        yield from ((entry, ""),) if inner is None else ((file, entry.name) for file in inner)


def _open_file(path: str, flags: int) -> int:
    """A descriptor of the file itself: through no link, and no pipe that would be waited for."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _reason(err: ValueError | OSError) -> str:
    """Why a file is not offered; completes "name ..."."""
    return str(err) if isinstance(err, ValueError) else f"{_UNREADABLE}: {err.strerror}"


def _rank(release: Release) -> tuple[object, ...]:
    """What orders releases: version; plain before packed, which is for small flash; age."""
    return release.version.precedence, not release.name.endswith(".gz"), release.identity[3]


@dataclass(frozen=True, slots=True)
class _Shelf:
    """What is known of one project."""

    listed: list[Release]  # by name only, by rank
    whole: tuple[Release, ...]  # checked, in the same order
    broken: list[str]  # sentences
    waiting: list[Release]  # for a check, in the same order


def _any(file: FileIO) -> Facts:
    """What is known of a file that is no image, or no whole one: no device gets it."""
    digests = []
    for name in ("md5", "sha256"):
        file.seek(0)
        digests.append(hashlib.file_digest(file, name).hexdigest())
    return Facts(UNKNOWN_CHIP, md5=digests[0], sha256=digests[1])


class DirectoryCatalog:
    """The releases in a folder: `<project>-<version>.bin` or `<project>/<any name>.bin`.

    One thread looks at the folder every second and checks the files that are new to it. Everybody
    else reads values that are replaced whole, so nothing is locked.
    """

    def __init__(self, directory: str, *, any_file: bool = False, max_open: int = 0) -> None:
        """Lists the folder, so that a wrong one is an OSError at start; checks no file yet.

        With `any_file`, people get by name what is no image; `max_open` images at once, 0: all.
        """
        self._directory = directory
        self._any_file = any_file
        self._max_open = max_open
        self._open: list[FileIO] = []  # some of them closed since
        self._notes: dict[str, _Notes] = {}  # by listed path without the end
        self._told: dict[str, str] = {}  # by path: what the log has said of it
        self._facts: dict[Identity, Facts | str] = {}  # str: why it is not offered
        self._known: dict[tuple[str, str], Release] = {}  # by folder and listed path
        self._shelves: dict[str, _Shelf] = {}
        self._newest: tuple[object, Mapping[str, Version]] = None, {}
        self._outage = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="catalog", daemon=True)
        self._list()

    def start(self) -> None:
        """Begins to check and to watch."""
        self._thread.start()

    def close(self) -> None:
        """Ends the watching."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def newest(self) -> Mapping[str, Version]:
        """See Catalog; made once after each look at the folder."""
        shelves = self._shelves
        if self._newest[0] is not shelves:
            self._newest = shelves, {n: shelves[n].listed[0].version for n in sorted(shelves)}
        return self._newest[1]

    def projects(self) -> Sequence[str]:
        """See Catalog."""
        if self._outage:
            raise Refused(503, self._outage)
        return sorted(self._shelves)

    def releases(self, project: str) -> Sequence[Release]:
        """See Catalog."""
        shelf = self._shelves.get(project)
        if self._outage:
            raise Refused(503, self._outage)
        if shelf is None:
            raise Refused(404, f"no project {shown(project)}: its files are called name-1.2.3.bin")
        if shelf.whole:
            return shelf.whole
        if shelf.waiting:
            reason = f"{shown(project)} is not checked yet: ask again; if it stays so, see the log"
            raise Refused(503, reason)
        raise Refused(404, f"no file of {shown(project)} can be offered: {'; '.join(shelf.broken)}")

    def open(self, release: Release) -> Image:
        """See Catalog."""
        self._open = [file for file in self._open if not file.closed]
        if 0 < self._max_open <= len(self._open):
            raise Refused(503, f"{self._max_open} downloads are on their way: ask again later")
        try:
            file = FileIO(release.name, opener=lambda _, flags: _open_file(release.path, flags))
        except OSError as err:
            raise Refused(503, f"{release.name} {_reason(err)}") from err
        if self._max_open:
            self._open.append(file)
        if identity_of(os.fstat(file.fileno())) != release.identity:
            file.close()
            raise Refused(503, f"{release.name} is just being replaced: ask again in a moment")
        return Image(file, release.size, release.facts.md5, release.facts.sha256, release.identity)

    def scan(self) -> bool:
        """Looks at the folder and checks what is new; gives back whether a second was enough."""
        deadline = time.monotonic() + SCAN_SECONDS
        try:
            self._list()
        except OSError as err:
            if err.errno in STARVED:  # says nothing of the folder: what was known stays
                self._tell(logging.WARNING, self._directory, _reason(err))
            elif not self._outage:
                log.error("the firmware folder %s %s", self._directory, _reason(err))  # noqa: TRY400
                self._outage = "the firmware folder cannot be read just now: ask again later"
            return True
        if self._outage:
            log.warning("the firmware folder %s is back", self._directory)
            self._outage = ""
        return self._check_new(deadline)

    def _watch(self) -> None:
        finished = False
        while not self._closing.wait(SCAN_SECONDS if finished else 0):
            try:
                finished = self.scan()
            except Exception:
                log.exception("looking at the firmware folder failed")
                finished = True

    def _list(self) -> None:
        """Shelves what the folder's file names promise. OSError: the folder cannot be read."""
        root = os.path.realpath(self._directory)
        paths: set[str] = set()
        known: dict[tuple[str, str], Release] = {}
        queues: dict[str, list[Release]] = {}
        notes: dict[str, _Notes] = {}
        for entry, folder in _entries(root):
            paths.add(entry.path)
            try:
                if entry.name.endswith(".md"):
                    notes[entry.path[:-3]] = self._read_notes(entry)
                    continue
                release = self._known.get((folder, entry.path))
                if release is None or not _is_still(release, entry):
                    release = _promised(entry, folder, os.path.join(root, ""))
                    paths.add(release.path)
            except (ValueError, OSError) as err:
                self._tell(logging.INFO, entry.path, _reason(err))
                continue
            known[folder, entry.path] = release
        if notes or self._notes:
            self._note(known, notes)
        for release in known.values():
            queues.setdefault(release.project, []).append(release)
        self._known = known
        self._told = {path: text for path, text in self._told.items() if path in paths}
        for project, queue in queues.items():
            queue.sort(key=_rank, reverse=True)
            if project not in self._shelves or self._shelves[project].listed != queue:
                self._shelve(project, queue)
        self._shelves = {project: self._shelves[project] for project in queues}
        if len(self._facts) > len(known):  # some are of files that are gone
            identities = {release.identity for release in known.values()}
            self._facts = {key: facts for key, facts in self._facts.items() if key in identities}

    def _read_notes(self, entry: os.DirEntry[str]) -> _Notes:
        """Identity and text of release notes. OSError: they cannot be read."""
        identity, text = self._notes.get(entry.path[:-3], (None, ""))
        found = identity_of(entry.stat(follow_symlinks=False))
        if identity != found:
            with FileIO(entry.path, opener=_open_file) as file:
                text = (file.read(MAX_NOTES) or b"").decode("utf-8", "replace").strip()
        return found, text

    def _note(self, known: dict[tuple[str, str], Release], notes: dict[str, _Notes]) -> None:
        """Puts the notes into those releases that are new, or into all if there are other notes."""
        changed, self._notes = notes != self._notes, notes
        for key, release in known.items():
            if changed or self._known.get(key) is not release:
                match = _FILE_NAME.fullmatch(key[1])
                text = notes.get(match["stem"], (None, ""))[1] if match else ""
                known[key] = replace(release, notes=text)

    def _check_new(self, deadline: float) -> bool:
        """Checks what is listed and unknown; gives back whether the time was enough.

        The newest of every project first, then the second: who asks early gets the right one.
        """
        shelves = self._shelves
        queues = (shelf.waiting for shelf in shelves.values() if shelf.waiting)
        late = False
        for release in filter(None, chain.from_iterable(zip_longest(*queues))):
            if late := self._closing.is_set() or time.monotonic() > deadline:
                break
            self._check(release)
            if release is shelves[release.project].listed[0]:
                self._shelve(release.project, shelves[release.project].listed)
        for project, shelf in shelves.items():
            if shelf.waiting:
                self._shelve(project, shelf.listed)
        return not late

    def _check(self, release: Release) -> None:
        """Finds the facts of one file, unless it is still changing."""
        age = abs(time.time_ns() - release.identity[3])
        if age < (COARSE_SETTLE_NS if release.identity[3] % 1_000_000_000 == 0 else SETTLE_NS):
            return  # clocks of file systems are coarse: one more write could leave mtime as it is
        try:
            with FileIO(release.path, opener=_open_file) as file:
                try:
                    facts: Facts | str = inspect(file, release.kind)
                except ValueError as err:
                    facts = _any(file) if self._any_file else str(err)
                if identity_of(os.fstat(file.fileno())) == release.identity:
                    self._facts[release.identity] = facts
                    self._told.pop(release.path, None)
                    if isinstance(facts, str):
                        self._tell(logging.WARNING, release.path, facts)
        except OSError as err:  # not remembered: it may be readable in a moment
            self._tell(logging.WARNING, release.path, _reason(err))

    def _tell(self, level: int, path: str, reason: str) -> None:
        """Logs once why a file is not offered."""
        if self._told.get(path) != reason:
            log.log(level, "%s is not offered: it %s", printable(path), reason)
        self._told[path] = reason

    def _shelve(self, project: str, queue: list[Release]) -> None:
        """Sorts a project's files into whole, broken and waiting."""
        found = [(release, self._facts.get(release.identity)) for release in queue]
        waiting = [release for release, facts in found if facts is None]
        broken = [f"{release.name} {facts}" for release, facts in found if isinstance(facts, str)]
        sound = [replace(each, facts=facts) for each, facts in found if isinstance(facts, Facts)]
        whole: dict[tuple[object, ...], Release] = {}
        for release in sound:
            facts, name = release.facts, release.name * (release.version == UNVERSIONED)
            newer = whole.setdefault(
                (release.version, release.kind, facts.chip, facts.packed, name), release
            )
            if newer.path != release.path:
                reason = f"has the version of {printable(newer.name)}, which is newer"
                self._tell(logging.WARNING, release.path, reason)
        self._shelves[project] = _Shelf(queue, tuple(whole.values()), broken, waiting)


# -- 5. Reports: what a device says of itself ------------------------------------------------------

FILESYSTEMS = ("littlefs", "spiffs", "fatfs")
ESP32_FAMILY = "some ESP32"  # no header tells which chip of the family it is
ANY_ESP = "some ESP"  # ESPHome: no header tells even the family
UNKNOWN_ESP = "one that does not say its chip, and there are images for several chips"
_AGENTS = {"ESP32": ESP32_FAMILY, "ESP82": "esp8266"}  # by their first characters
_FIELDS = (
    "version", "sta-mac", "mode", "free-space", "chip-size", "sketch-md5", "sketch-sha256",
    "sdk-version",
)  # fmt: skip
_ESP8266_FIELDS = [f"x-esp8266-{name}" for name in _FIELDS]
_ESP32_FIELDS = [f"x-esp32-{name}" for name in _FIELDS]
_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}[:-]?){5}[0-9A-Fa-f]{2}")
_ID = re.compile(r"(?!\.+$)[!-~]{1,64}")  # esp32FOTA: a number that is made of its MAC
_KINDS = {  # by the mode of the request; any other is "filesystem", whichever it is
    None: "sketch", "": "sketch", "sketch": "sketch", "version": "sketch", "zip": "zip",
    "littlefs": "littlefs", "fatfs": "fatfs",
}  # fmt: skip
_TASMOTA = re.compile(r"([0-9]++\.[0-9]++\.[0-9]++)[0-9.]*+\((.*)\)")  # 14.1.0.2(release-tasmota)
_RESCUE = re.compile(r"(?:.*-)?(?:minimal|safeboot)")  # what Tasmota runs only to get the next one


class Report(NamedTuple):
    """What a device says when it asks. None: it did not say."""

    project: str
    address: str  # IP address
    version: Version | None = None  # the one it runs
    device: str | None = None  # MAC address, as it sent it but in upper case; or its ?id=
    chip: str | None = None  # as in Facts, or ESP32_FAMILY, or ANY_ESP
    kind: str = "sketch"  # as in Release, or "filesystem": any
    free_space: int | None = None  # bytes
    chip_size: int | None = None  # bytes of flash
    sketch_md5: str | None = None  # of the running image, lower-case hex
    sketch_sha256: str | None = None  # the digest appended to it, lower-case hex; ESP32 only
    flash_mode: int | None = None  # as in Facts; see recognised()
    sdk: str | None = None  # as sent
    asks: str = "image"  # or "rest": what is behind its beginning; "answer": no byte of it

    def is_accountable(self) -> bool:
        """Whether its next check-in will tell if it runs what it now gets."""
        digest = self.kind == "sketch" and (self.sketch_md5 or self.sketch_sha256)  # no other has
        return bool(self.device and (self.version or digest)) and self.asks != "answer"


def parameter(query: str, name: str) -> str:
    """The first value of a parameter in a query, percent-decoded; "" if there is none."""
    for each in query.split("&"):
        key, _, value = each.partition("=")
        if key == name:
            return unquote(value)  # a plus stays one: sketches write versions as they are
    return ""


def _mongoose_fields(headers: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
    """What Mongoose OS says, in the words of the others, and its chip: mgos_ota_http_client.c."""
    arch, version, *_ = (*headers["x-mgos-fw-version"].split(), "", "")
    mac = headers.get("x-mgos-device-id", "").rpartition(" ")[2]
    family = "x-esp8266" if arch.lower() == "esp8266" else "x-esp32"
    fields = {f"{family}-version": version, f"{family}-sta-mac": mac, f"{family}-mode": "zip"}
    return fields, shown(arch.lower())[1:-1]  # a device for esp32 would take the zip of an esp32c3


def read_report(project: str, headers: Mapping[str, str], address: str, query: str = "") -> Report:
    """What the x-ESP8266-* or x-ESP32-* headers say: ESP8266httpUpdate.cpp, HTTPUpdate.cpp.

    Without a version there, `?version=` or `?ver=` tells it; without a MAC, `?id=` who it is.

    Raises:
        Refused: 400, a version or number in them cannot be read.
    """
    if "x-mgos-fw-version" in headers:
        headers, arch = _mongoose_fields(headers)
        return read_report(project, headers, address, query)._replace(chip=arch)
    agent = headers.get("user-agent", "")
    names, chip = _ESP32_FIELDS, None
    if "x-esp8266-version" in headers or "x-esp8266-sta-mac" in headers:
        names, chip = _ESP8266_FIELDS, "esp8266"
    elif "x-esp32-version" in headers or "x-esp32-sta-mac" in headers:
        chip = ESP32_FAMILY
    # All that is left after a redirect; and own code may send the only header that S1 knows.
    chip = _AGENTS.get(agent[:5]) or chip or (ANY_ESP if agent.startswith("ESPHome") else None)
    running, mac, mode, space, flash, md5, sha256, sdk = map(headers.get, names)
    if query and not running:
        running = parameter(query, "version") or parameter(query, "ver")
    if running and running[-1] == ")" and (tasmota := _TASMOTA.fullmatch(running)):
        # It refuses by itself what is too big, and only then asks for its smaller self.
        space = flash = None
        rescued = _RESCUE.fullmatch(tasmota[2]) or _RESCUE.fullmatch(project)
        running = "0.0.0-0" if rescued else tasmota[1]  # the lowest of all
    try:
        version = Version.parse(running) if running else None
    except ValueError as err:
        raise Refused(400, f"{names[0]}: {err}") from err
    device = mac.upper() if mac and _MAC.fullmatch(mac) else None
    if device is None and query and _ID.fullmatch(given := parameter(query, "id")):
        device = given
    kind = _KINDS.get(mode, "filesystem")
    free_space = None if space is None else _bytes(names[3], space)
    chip_size = None if flash is None else _bytes(names[4], flash)
    md5 = md5.lower() if md5 else None
    sha256 = sha256.lower() if sha256 else None
    room = (free_space, chip_size)
    return Report(project, address, version, device, chip, kind, *room, md5, sha256, sdk=sdk)


@functools.lru_cache(maxsize=1024)  # a fleet says the same few again and again
def _bytes(name: str, text: str) -> int:
    """A field that counts bytes."""
    if not (text.isdecimal() and text.isascii() and len(text) < 16):
        raise Refused(400, f"{name}: {shown(text)} is no number of bytes")
    return int(text)


# -- 6. Rules: who gets what -----------------------------------------------------------------------


class Objection(NamedTuple):
    """Why a device does not get a release."""

    code: str  # stable, for scripts
    reason: str  # a sentence for a person
    deny: bool = False  # the device should show an error (403) instead of "no update" (304)
    final: bool = False  # it gets no older release either
    foreign: bool = False  # the release is for other devices: what else is wrong does not count
    usual: bool = False  # a normal day: nobody needs to look

    def __str__(self) -> str:
        """Code and sentence."""
        return f"{self.code}: {self.reason}"


Rule = Callable[[Report, Release], Objection | None]
Outcome = Release | Objection
# The chips of images that a device is never, which says no more than that
_NO_CHIP = {"", UNKNOWN_CHIP}
FOREIGN = {ESP32_FAMILY: _NO_CHIP | {"esp8266"}, ANY_ESP: _NO_CHIP, None: _NO_CHIP}


def only_newer(report: Report, release: Release) -> Objection | None:
    """A device goes up, never down, and not to the version that it runs."""
    if report.version is None or release.version > report.version:
        return None
    newest, running = release.version.text, report.version.text
    reason = f"{newest} is not newer than {running}, which the device runs"
    return Objection("not-newer", reason, final=True)


def same_image(report: Report, release: Release) -> Objection | None:
    """A device does not get the image it runs, whatever version it says it is: no update loops."""
    if release.facts.running.isdisjoint((report.sketch_md5, report.sketch_sha256)):
        return None
    reason = f"the device runs this very image of {release.version}, whatever version it says"
    return Objection("same-image", reason, final=True)


def enough_room(report: Report, release: Release) -> Objection | None:
    """A sketch goes only where there is room for it; a filesystem has a partition of its own."""
    wanted, free = release.facts.flash_size, report.free_space
    if free is not None and release.size > free and release.kind == "sketch":
        reason = f"{release.version} has {release.size} bytes, the device {free} free"
    elif report.chip_size is not None and wanted > report.chip_size:
        reason = f"{release.version} is built for {wanted} bytes of flash, not {report.chip_size}"
    else:
        return None
    return Objection("too-big", reason)


def right_chip(report: Report, release: Release) -> Objection | None:
    """An image goes only to its chip: an ESP8266 takes an ESP32 image and never starts again."""
    chip = release.facts.chip
    if not chip or report.chip is None or report.chip == chip != UNKNOWN_CHIP:
        return None
    if chip not in FOREIGN.get(report.chip, {chip}):
        return None
    reason = f"{release.version} is for {chip}, the device is {report.chip}"
    return Objection("wrong-chip", reason, deny=True, foreign=True)


def right_kind(report: Report, release: Release) -> Objection | None:
    """A sketch never becomes a filesystem, nor the other way round."""
    if report.kind == release.kind:
        return None
    if report.kind == "filesystem" and release.kind in FILESYSTEMS:
        return None
    reason = f"{release.version} is a {release.kind}, the device asks for a {report.kind}"
    return Objection("wrong-kind", reason, foreign=True)


def right_flash_mode(report: Report, release: Release) -> Objection | None:
    """A packed image goes only to its own flash mode, which the Updater patches in others."""
    mode = release.facts.flash_mode
    if report.chip is None or not release.facts.packed or mode in {3, report.flash_mode}:
        return None
    reason = f"{release.version} is packed with flash mode {mode}, the device may have another"
    return Objection("flash-mode", reason)


def fit_unasked(_report: Report, release: Release) -> Objection | None:
    """What has no version or is no image is only for who asks for this very file.

    So is a pre-release, and a packed filesystem, which most cores write as it is: doc/ota_updates,
    ATOMIC_FS_UPDATE.
    """
    packed = release.facts.packed and release.kind in FILESYSTEMS
    if not (packed or release.version.prerelease or release.facts.chip == UNKNOWN_CHIP):
        return None
    early = "a pre-release" * (release.version != UNVERSIONED and release.version.prerelease)
    why = "a packed filesystem" if packed else early or "no image with a version in its name"
    return Objection("by-name-only", f"{printable(release.name)} is {why}", foreign=True)


SAFETY: tuple[Rule, ...] = (same_image, right_chip, right_kind, right_flash_mode, enough_room)
STATELESS: tuple[Rule, ...] = (only_newer, *SAFETY, fit_unasked)
UNASKED = (only_newer, fit_unasked)


def is_for(rules: Iterable[Rule], report: Report, release: Release) -> bool:
    """Whether no rule says that a release is for others, or for nobody."""
    said = filter(None, (rule(report, release) for rule in rules))
    return not any(each.foreign or each.code == "withdrawn" for each in said)


def choose(report: Report, releases: Iterable[Release], rules: Sequence[Rule]) -> Outcome:
    """The first of `releases`, newest first and at least one, that no rule objects to.

    Else the objection that says most: a final denial; then what was found first; last that a
    release is for other devices, whose other flaws do not count.
    """
    said = alien = None
    closed = False
    for release in releases:
        found = foreign = None
        for rule in rules:
            if objection := rule(report, release):
                closed = closed or objection.final
                if objection.deny and objection.final:
                    return objection
                if objection.deny or objection.foreign:
                    foreign = foreign or objection
                found = found or objection
        if alien is None or (foreign and foreign.deny and not alien.deny):
            alien = foreign
        if not (found or closed):
            return release
        if not foreign:
            said = said or found
            if closed:
                break
    outcome = said or alien
    assert outcome is not None
    return outcome


# -- 7. Requests: bytes become a Request -----------------------------------------------------------
# RFC 9112, strictly: what two programs could read in two ways is refused.

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # noqa: S105 - RFC 9110 5.6.2
_FIELD_LINE = rf"{_TOKEN}:[\t -~\x80-\xff]*+\r\n"
_HEAD = re.compile(rf"({_TOKEN}) ([!-~]++) HTTP/([0-9]\.[0-9])\r\n((?:{_FIELD_LINE})*+)\r\n")
_AUTHORITY = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]*+)?"  # RFC 3986 3.2
_PCHARS = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/{}]++|%[0-9A-Fa-f]{{2}})*+"  # RFC 3986 3.3
_PATH, _QUERY = _PCHARS.format(""), _PCHARS.format("?")
_TARGET = re.compile(rf"(?:[Hh][Tt][Tt][Pp][Ss]?://({_AUTHORITY}))?(/{_PATH})?(?:\?({_QUERY}))?")
_HOST = re.compile(_AUTHORITY)
# A bare LF, TLS or other bytes: what begins so will never be a head.
_NO_HEAD = re.compile(rb"(?<!\r)\n|\A(?!\r\Z)[^!-~]")
_SINGLE = frozenset(  # fields that must not repeat; others are joined by commas, RFC 9110 5.3
    ("authorization", "content-length", "content-type", "expect", "host", "if-modified-since",
     "if-range", "if-unmodified-since", "range", "transfer-encoding", "user-agent")
)  # fmt: skip


class Request(NamedTuple):
    """One request, read and checked."""

    method: str
    path: str  # percent-decoded, once
    query: str  # as sent
    headers: Mapping[str, str]  # names in lower case, values without outer blanks
    peer: str  # IP address
    secure: bool = False  # came by TLS
    keep_alive: bool = False  # the client may send another one
    body_size: int = 0  # bytes that follow the head
    body: BinaryIO | None = None  # those bytes, where a route takes them; closed after answer()


def split_head(data: bytes) -> tuple[bytes, bytes]:
    """The head that `data` begins with, up to and with the empty line, and what is behind it.

    Without a whole head the first is empty. Refused: 400 or 431, there will never be one.
    """
    data = data.removeprefix(b"\r\n")  # RFC 9112 2.2
    end = data.find(b"\r\n\r\n") + 4
    if end > MAX_HEAD or (end < 4 and len(data) >= MAX_HEAD):
        raise Refused(431, f"the head of the request has more than {MAX_HEAD} bytes")
    if end < 4 and _NO_HEAD.search(data):
        raise Refused(400, "this is no HTTP request with CR LF line ends")
    return (data[:end], data[end:]) if end >= 4 else (b"", data)


def parse_head(head: bytes, peer: str, *, secure: bool = False) -> Request:
    """The request in `head`, up to and with the empty line.

    Raises:
        Refused: 400, 501 or 505; where the next request begins is not known.
    """
    match = _HEAD.fullmatch(head.decode("latin-1"))
    if match is None:
        reason = "the head is not METHOD /path HTTP/1.1 and lines like Name: value, with CR LF ends"
        raise Refused(400, reason)
    method, target, http, fields = match.groups()
    if http not in {"1.1", "1.0"}:
        raise Refused(505, f"HTTP/{http} is not spoken here: use HTTP/1.1")
    lines = fields.split("\r\n")
    del lines[-1]  # empty
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip("\t ")
    if len(headers) < len(lines):
        headers = _joined(lines)
    host, path, query = _read_target(method, target, headers.get("host"), http)
    if host:
        headers["host"] = host
    options = headers.get("connection", "").lower()
    stays = http == "1.1" or "keep-alive" in options
    keep_alive = stays and "close" not in options and "expect" not in headers
    return Request(method, path, query, headers, peer, secure, keep_alive, body_size(headers, http))


def _joined(lines: Iterable[str]) -> dict[str, str]:
    """Fields, repeated ones joined by commas: RFC 9110 5.3. Refused: 400, one must not repeat."""
    headers: dict[str, str] = {}
    for line in lines:
        field, _, value = line.partition(":")
        name, value = field.lower(), value.strip("\t ")
        if name in headers and (name in _SINGLE or name.startswith("x-esp")):
            raise Refused(400, f"the field {shown(name)} stands twice in the head")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


@functools.lru_cache(maxsize=64)  # a fleet asks for the same few again and again
def _read_target(method: str, target: str, host: str | None, http: str) -> tuple[str, str, str]:
    """Host, path and query; the authority of an absolute target is the Host (RFC 9112 3.2)."""
    if target.startswith("./"):  # AutoConnectUpdate.cpp puts "." before the name: no RFC allows it
        target = target[1:]
    match = _TARGET.fullmatch("/" if (method, target) == ("OPTIONS", "*") else target)
    if match is None or match.group(1, 2) == (None, None):
        raise Refused(400, "the request target is no path such as /firmware")
    authority, path, query = match.groups(default="")
    if (host is None and http == "1.1") or (host is not None and not _HOST.fullmatch(host)):
        raise Refused(400, "HTTP/1.1 needs one Host field, a host name with an optional port")
    if "%" in path:
        path = unquote(path, errors="surrogateescape")
        if any(char < " " or char == "\x7f" for char in path):
            raise Refused(400, "the request target holds a control character")
    return authority or host or "", path or "/", query


def body_size(headers: Mapping[str, str], http: str) -> int:
    """Bytes of body behind the head: RFC 9112 6.3, where nothing may be ambiguous."""
    if "transfer-encoding" in headers:
        if "content-length" in headers or http == "1.0":
            raise Refused(400, "Transfer-Encoding together with Content-Length or HTTP/1.0")
        raise Refused(501, "Transfer-Encoding is not read here: send a Content-Length")
    length = headers.get("content-length")
    if length is not None and not (length.isdecimal() and length.isascii() and len(length) < 16):
        raise Refused(400, "Content-Length is no number")
    return int(length) if length else 0


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
LOCAL = "unix"  # the peer of a unix socket


@functools.lru_cache(maxsize=1024)
def is_in(address: str, networks: tuple[Network, ...]) -> bool:
    """Whether an IP address is in one of the networks."""
    with suppress(ValueError):
        return any(ipaddress.ip_address(address.removeprefix("::ffff:")) in net for net in networks)
    return False


def forwarded(request: Request, trusted: tuple[Network, ...]) -> Request:
    """The request as it came to the proxies that are trusted, by what they say in X-Forwarded-*.

    Who asks is the last address that is none of theirs; what stands before it, anybody can write.
    """
    peer, headers = request.peer, request.headers
    if peer != LOCAL and not (trusted and is_in(peer, trusted)):
        return request
    for hop in reversed(headers.get("x-forwarded-for", "").split(",")):
        if "%" in hop or not is_in(hop.strip(), EVERYWHERE):  # a zone could be any text
            break
        peer = hop.strip()
        if not is_in(peer, trusted):
            break
    proto = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
    host = headers.get("x-forwarded-host", "").rpartition(",")[2].strip()
    if _HOST.fullmatch(host):
        headers = {**headers, "host": host}
    secure = proto == "https" if proto else request.secure
    return request._replace(peer=peer, headers=headers, secure=secure)


# -- 8. Replies: data, which only the loop sends ---------------------------------------------------


class Reply(NamedTuple):
    """What goes back. Whoever takes a Reply closes its Image."""

    status: int
    headers: tuple[tuple[str, str], ...]  # as sent; Date, Server and Connection are added
    body: bytes | Image = b""
    part: range = range(0)  # the bytes of the Image that are sent
    recipient: str = ""  # of the Image, for the log: MAC and IP address


def body_reply(status: int, kind: str, body: bytes, *headers: tuple[str, str]) -> Reply:
    """A body that is in memory."""
    entity = (("Content-Type", kind), ("Content-Length", str(len(body))))
    return Reply(status, (*entity, ("X-Content-Type-Options", "nosniff"), *headers), body)


def text_reply(status: int, text: str, *headers: tuple[str, str]) -> Reply:
    """One line for a person."""
    body = f"{text}\n".encode("utf-8", "backslashreplace")
    return body_reply(status, "text/plain; charset=utf-8", body, *headers)


def json_reply(data: object, *headers: tuple[str, str]) -> Reply:
    """Compact JSON: devices read it into a few KB."""
    body = json.dumps(data, separators=(",", ":")).encode()
    return body_reply(200, "application/json", body, ("Cache-Control", "no-cache"), *headers)


UNCACHED = ("Cache-Control", "no-store")


def refusal(refused: Refused, _path: str = "") -> Reply:
    """What a refused client reads; a 503 says when to come again."""
    headers = [("X-OTA-Reason", plain(refused.reason)), UNCACHED]
    if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(("Retry-After", str(RETRY_SECONDS)))
    return text_reply(refused.status, refused.reason, *headers, *refused.headers)


def plain(text: str) -> str:
    """Text that can stand in a field, also between quotes: one line of ASCII."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return "".join(char if " " <= char <= "~" and char not in '"\\' else "?" for char in text)


# UTC seconds as RFC 9110 5.6.7 writes them
http_date = functools.lru_cache(maxsize=64)(functools.partial(formatdate, usegmt=True))


def image_reply(request: Request, release: Release, image: Image, cache: str) -> Reply:
    """The bytes asked for, or that nothing changed: RFC 9110 13 and 14.

    Raises:
        Refused: 412 or 416.
    """
    etag, modified = f'"{image.sha256[:32]}"', http_date(release.modified)
    validators = (("ETag", etag), ("Last-Modified", modified), ("Cache-Control", cache))
    if is_not_modified(request.headers, etag, release.modified):
        return Reply(304, validators)
    part = None
    if request.method == "GET" and request.headers.get("if-range", etag) in {etag, modified}:
        part = parse_range(request.headers.get("range", ""), image.size)
    length = str(image.size if part is None else len(part))
    entity = ("Content-Type", "application/octet-stream"), ("Content-Length", length)
    saving = ("Content-Disposition", attachment(release.name)), ("Accept-Ranges", "bytes")
    facts = ("x-MD5", image.md5), ("x-SHA256", image.sha256), ("x-version", release.version.text)
    headers = (*entity, *saving, *facts[: 2 + (release.version != UNVERSIONED)], *validators)
    if part is None:
        return Reply(200, headers, image, range(image.size))
    where = ("Content-Range", f"bytes {part.start}-{part.stop - 1}/{image.size}")
    return Reply(206, (*headers, where), image, part)


@functools.lru_cache(maxsize=64)
def attachment(name: str) -> str:
    """What makes a browser save a file under its name: RFC 6266 4.3."""
    coded = f"; filename*=UTF-8''{quote(name, errors='surrogateescape')}"
    return f'attachment; filename="{plain(name)}"{coded * (plain(name) != name)}'


def is_not_modified(headers: Mapping[str, str], etag: str, modified: int) -> bool:
    """Whether the client has it already: RFC 9110 13.2.2, in its order. Refused: 412."""

    def names(tags: str) -> bool:
        return tags.strip() == "*" or etag in (tag.strip() for tag in tags.split(","))

    def since(name: str) -> float:
        with suppress(ValueError, OverflowError):  # each of the three forms means UTC
            return timegm(parsedate(headers.get(name, "")) or ())
        return float("nan")  # RFC 9110 13.1.3: no date, no condition

    matches = names(headers["if-match"]) if "if-match" in headers else None
    if matches is False or (matches is None and modified > since("if-unmodified-since")):
        raise Refused(412, "the image is no longer the one you began with")
    if "if-none-match" in headers:
        return names(headers["if-none-match"].replace("W/", ""))
    return modified <= since("if-modified-since")


def parse_range(text: str, size: int) -> range | None:
    """The one byte range asked for; None, to be ignored, for several and for what is none.

    Raises:
        Refused: 416, it begins behind the end (RFC 9110 14.1.2, 15.5.17).
    """
    match = re.fullmatch(r"(?i)bytes=([0-9]{0,99})-([0-9]{0,99})", text.strip())
    first, last = match.groups() if match else ("", "")
    if first == last == "" or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise Refused(416, f"the file has {size} bytes", ("Content-Range", f"bytes */{size}"))
    return range(start, stop)


_STATUS_LINES = {int(status): f"HTTP/1.1 {int(status)} {status.phrase}" for status in HTTPStatus}


def render(reply: Reply, now: float, *, keep_alive: bool = False) -> bytes:
    """A reply's head and, if it is in memory, its body; `now` is UTC seconds."""
    connection = "keep-alive" if keep_alive else "close"
    end = f"Server: ota-server\r\nConnection: {connection}\r\nDate: {http_date(int(now))}\r\n\r\n"
    lines = (_STATUS_LINES[reply.status], *map(": ".join, reply.headers), end)
    head = "\r\n".join(lines).encode("ascii")
    return head + reply.body if isinstance(reply.body, bytes) else head


# -- 9. Site: what is wired together ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; read_config() makes it."""

    dir: str
    host: str = ""  # "": every address, IPv4 and IPv6; or unix:<path of a socket>
    port: int = 8000
    log: str = "INFO"
    cert: str = ""  # "": plain HTTP
    key: str = ""  # "": in the same file as the certificate
    max_connections: int = 1000
    max_downloads: int = 0  # images on their way at once; 0: as many as connections
    rate: int = 0  # KB/s of one download at most; 0: as fast as it goes
    token: str = field(default="", repr=False)  # "": none is needed
    token_file: str = ""
    sign_key: bytes = field(default=b"", repr=False)  # of signed URLs; b"": there are none
    allow: tuple[Network, ...] = ()  # who may ask; (): everybody
    cors: str = "*"  # the origin whose pages may read images and manifests; "": none
    listing: bool = True
    trust_proxy: tuple[Network, ...] = ()  # whose X-Forwarded-* are believed
    accel: str = ""  # "nginx:/prefix/" or "apache": the proxy sends the images
    state: str = ""  # folder in which the fleet is remembered; "": it is not
    admit: str = "OPEN"  # "WHITELIST": only devices that were admitted get images; needs `state`
    max_image: int = 16  # MB of an upload at most
    keep: int = 0  # uploaded versions of a project that stay, beside those that run; 0: all
    max_devices: int = 10_000  # that are remembered, but for those which a person knows
    public_url: str = ""  # what devices and people call the server; "": as far as it knows
    mqtt: str = field(default="", repr=False)  # URL of a broker; "": none
    backup: str = ""  # copy what is remembered there, and serve nothing
    admin_email: str = ""  # of the first account, which is made if there is none
    admin_password: str = field(default="", repr=False)
    us_username: str = field(default="", repr=False)  # S4's, for everybody; "": it is not spoken
    us_password: str = field(default="", repr=False)
    www_dir: str = ""  # S0: with favicon.ico; files of any content can be had by name
    notify_socket: str = ""  # where systemd listens; "": nowhere
    inherited: str = ""  # how many sockets systemd passes; "": none
    watchdog: float = 0  # seconds within which systemd wants to hear from the loop; 0: never
    journal: bool = False  # what goes to stderr goes to the journal


class Event(NamedTuple):
    """A decision that was made."""

    report: Report
    outcome: Outcome


class Transfer(NamedTuple):
    """An image that begins to leave, or of which no more will."""

    recipient: str  # as of the Reply
    image: Image
    part: range
    sent: Callable[[], int]  # bytes of the part so far, until it is over; from any thread
    over: bool


def at_once(_report: Report, _release: Release) -> Objection | None:
    """The grant of a site without a memory: whatever the rules allow."""
    return None


def defer(_report: Report, _release: Release) -> NoReturn:
    """The grant on the loop of a site with a memory: Deferred, as that has to write."""
    raise Deferred


Endpoint = Callable[["Site", Request], Reply]


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Which paths an endpoint answers."""

    pattern: re.Pattern[str]  # of the whole path
    endpoint: Endpoint
    methods: tuple[str, ...] = ("GET", "HEAD")
    blocking: bool = False  # runs in a thread, not on the loop
    guarded: bool = True
    body: int = 0  # bytes of a body at most; 0: it takes none


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Everything that answers a request, built once."""

    config: Config
    catalog: Catalog
    rules: tuple[Rule, ...]
    guards: tuple[Callable[[Request], None], ...]  # each may raise Refused
    routes: tuple[Route, ...]  # the first that matches; the last matches everything
    listeners: tuple[Callable[[Event], None], ...]
    closers: tuple[Callable[[], None], ...]
    unasked: tuple[Rule, ...] = UNASKED  # of `rules`: do not hold for who asks for a file by name
    refusal: Callable[[Refused, str], Reply] = refusal  # as a path's client reads it
    grant: Callable[[Report, Release], Objection | None] = at_once  # for who is accountable
    carriers: tuple[Callable[[Transfer], None], ...] = ()  # told of each image that leaves
    pulses: tuple[Callable[[float], None], ...] = ()  # told how long the loop was busy, in seconds

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a process has one site
    def route(self, path: str) -> Route:
        """The first route that matches. Refused: 404."""
        for route in self.routes:
            if route.pattern.fullmatch(path):
                return route
        raise Refused(404, "nothing is here")

    def by_name(self) -> tuple[Rule, ...]:
        """The rules that hold for who asks for a file by its name."""
        return tuple(rule for rule in self.rules if rule not in self.unasked)


Ask = Callable[[Site, Report, Sequence[Release], Sequence[Rule]], Outcome]
# Cache-Control: an image is chosen by who asks, so no cache may hand it to the next one.
NAMED = "private, no-transform"
NEWEST = f"{NAMED}, no-cache"  # what the next release changes


def judge(
    site: Site, report: Report, among: Sequence[Release] = (), rules: Sequence[Rule] = ()
) -> Outcome:
    """What this device would get, of `among` if that is given. Refused: see Catalog.releases()."""
    releases = site.catalog.releases(report.project)
    among = among or releases
    return choose(recognised(report, releases, among), among, rules or site.rules)


def decide(
    site: Site, report: Report, among: Sequence[Release] = (), rules: Sequence[Rule] = ()
) -> Outcome:
    """What this device gets, of which every listener hears; every device protocol asks here.

    An image is granted before it is promised. Where that is refused, it gets what is left.
    """
    outcome = judge(site, report, among, rules)
    asks = report.is_accountable()
    while asks and isinstance(outcome, Release) and (objection := site.grant(report, outcome)):
        rules = (*(rules or site.rules), functools.partial(not_granted, outcome, objection))
        outcome = judge(site, report, among, rules)
    event = Event(report, outcome)
    for listener in site.listeners:
        listener(event)
    return outcome


def not_granted(
    wanted: Release, objection: Objection, _report: Report, release: Release
) -> Objection | None:
    """The rule that a release whose grant was refused is not for this device, this time."""
    return objection if release == wanted else None  # a catalog may make them anew


def recognised(report: Report, releases: Sequence[Release], among: Sequence[Release]) -> Report:
    """The report, with what it tells of the device that it runs one of `releases`.

    That is the very chip of an ESP32; where those `among` which it may get one are for several and
    it runs none, nobody knows which it needs: an ESP8266 with ESPHome would start an ESP32's image
    and never again. Of an ESP8266 it is the flash mode, if that matters.
    """
    if report.chip in FOREIGN:
        for release in releases:
            if report.sketch_sha256 in release.facts.running:
                return report._replace(chip=release.facts.chip)
        chips = {release.facts.chip for release in among if release.kind == report.kind}
        several = len(chips - FOREIGN[report.chip]) > 1
        return report._replace(chip=UNKNOWN_ESP) if several else report
    for release in releases if report.sketch_md5 and among[0].facts.packed else ():
        if report.sketch_md5 in release.facts.by_mode:
            return report._replace(flash_mode=release.facts.by_mode.index(report.sketch_md5))
    return report


def log_decision(event: Event) -> None:
    """One line a decision, so that `grep <mac>` tells a device's story."""
    report, outcome = event.report, event.outcome
    usual = isinstance(outcome, Release) or outcome.final or outcome.usual
    level = logging.INFO if usual else logging.WARNING
    if log.isEnabledFor(level):
        verdict = f"-> {outcome.version}" if isinstance(outcome, Release) else f"stays, {outcome}"
        who = (report.device or "-", report.address, printable(report.project) or "-")
        log.log(level, "%s %s %s %s %s", *who, report.version or "-", verdict)


def answer(site: Site, request: Request) -> Reply:
    """The reply to a request. Never raises, but Deferred: see Refused; anything else is a 500."""
    try:
        if site.config.trust_proxy or request.peer == LOCAL:
            request = forwarded(request, site.config.trust_proxy)
        reply = _endpoint(site, request)(site, request)
    except Refused as refused:
        log.info("%s refused, %s: %s", request.peer, refused.status, printable(refused.reason))
        reply = site.refusal(refused, request.path)
    except Deferred:  # by the loop, to the loop
        raise
    except Exception:
        log.exception("%s %s %s failed", request.peer, request.method, shown(request.path))
        reply = site.refusal(Refused(500, "the server failed; its log says how"), request.path)
    if request.method != "HEAD":
        return reply
    if isinstance(reply.body, Image):
        reply.body.file.close()
    return reply._replace(body=b"")


def admitted(site: Site, request: Request) -> Route:
    """The route of a request that every guard lets through. Refused: one does not."""
    route = site.route(request.path)
    asks = request.method == "OPTIONS"  # a browser, without a token, whether it may send one
    for guard in site.guards if route.guarded and not asks else ():
        guard(request)
    return route


def _endpoint(site: Site, request: Request) -> Endpoint:
    """Who answers. Refused: 405, or as a guard says."""
    route = admitted(site, request)
    if request.method in route.methods:
        return route.endpoint
    allowed = ("Allow", ", ".join((*route.methods, "OPTIONS")))
    if request.method == "OPTIONS":
        fields = ("Access-Control-Allow-Headers", "Authorization, Range")
        return lambda *_: Reply(204, (allowed, *_cors(site), fields))
    raise Refused(405, f"{shown(request.method)} is not possible here", allowed)


def _cors(site: Site) -> tuple[tuple[str, str], ...]:
    """The field that lets pages of other servers read a reply: the Fetch standard, 3.2.3."""
    return (("Access-Control-Allow-Origin", site.config.cors),) if site.config.cors else ()


# -- 10. Access: who may ask for what --------------------------------------------------------------


def signature(key: bytes, path: str, query: str) -> str:
    """HMAC-SHA256 of a decoded path, coded again, and a query as sent; lower-case hex."""
    # A question mark in the path is %3F there: else it could be moved to where the query begins.
    text = f"{quote(path, errors='surrogateescape')}?{query}".encode("utf-8", "surrogateescape")
    return hmac.new(key, text, "sha256").hexdigest()


def signed(key: bytes, url: str, expires: int) -> str:
    """The URL with what lets in whoever has it until `expires`, UTC seconds."""
    url, _, query = url.partition("#")[0].partition("?")
    query = f"{query}&expires={expires}".removeprefix("&")
    path = "/" + unquote(url.partition("://")[2].partition("/")[2], errors="surrogateescape")
    return f"{url}?{query}&sig={signature(key, path, query)}"


def is_signed(key: bytes, request: Request, now: float) -> bool:
    """Whether the URL has a signature; `now` is UTC seconds. Refused: 403, that is not good."""
    query, _, given = request.query.rpartition("&sig=")
    if not (key and query):
        return False
    if not hmac.compare_digest(given, signature(key, request.path, query)):
        raise Refused(403, "the signature does not belong to this URL")
    expires = int([*re.findall("(?:^|&)expires=([0-9]{1,12})$", query), "0"][0])
    if expires < now:
        raise Refused(403, f"this link was good until {http_date(expires)}")
    return True


def given_token(request: Request) -> str:
    """Bearer's, or Basic's password, as ESP-IDF and old cores know only that; else ?token=."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(text).decode("latin-1").partition(":")[2]
    return text.strip() if scheme.lower() == "bearer" else parameter(request.query, "token")


@functools.lru_cache(maxsize=4)
def _tokens_in(path: str, _identity: Identity) -> Mapping[str, str]:
    """Tokens by project, as long as the file is the same. ValueError: it holds none."""
    with open(path, encoding="utf-8") as file:
        text = file.read().strip()
    tokens = json.loads(text) if text.startswith("{") else {"*": text}
    for project, token in tokens.items():
        if not (project and isinstance(token, str) and re.fullmatch("[!-~]+", token)):
            raise ValueError(f"the token of {shown(project)} is not one word of plain ASCII")
    return tokens


class Wanted(NamedTuple):
    """What a path asks for."""

    project: str
    name: str = ""  # of one file; "": the newest image
    kind: str = ""  # as in Release; "": the path does not say


_LATEST = re.compile(r"latest(-minimal|-safeboot)?")  # suffixes of Tasmota
_ABOUT = {"manifest.json", "esp32fota.json", "versions", "_catalog"}  # of all, without parent


@functools.lru_cache(maxsize=64)  # a fleet asks for the same few again and again
def _read(path: str) -> tuple[Wanted, str | None]:
    """What a path says by itself; and, if it names a file, what stands before that."""
    _, parent, last = ("", "", *path.rstrip("/").split("/"))[-3:]
    name = _image_path(last)
    if not name or name in _ABOUT:
        return Wanted(parent), None
    file = _FILE_NAME.fullmatch(name)
    stem, kind = (file["stem"], _kind_of(file)) if file else (name, "")
    if parent and (latest := _LATEST.fullmatch(stem)):
        return Wanted(parent + (latest[1] or ""), kind=kind), None
    return (Wanted(stem, name, kind), parent) if file else (Wanted(last), None)


def read_path(catalog: Catalog, request: Request) -> Wanted:
    """What the request is about; guards and endpoints must ask the same function."""
    found, parent = _read(request.path)
    if request.query and request.path.rstrip("/").endswith("/update"):
        found = found._replace(project=parameter(request.query, "dev") or "update")
    return found if parent is None else _wanted_file(catalog, found, parent)


def _wanted_file(catalog: Catalog, found: Wanted, parent: str) -> Wanted:
    """A file of the folder or project that stands before it, else the newest of its name."""
    projects = [parent]
    if parent != "..":  # which stands for nothing here
        with suppress(ValueError):
            projects.append(read_name(found.project)[0])
    for project in projects:
        if any(release.name == found.name for release in _known(catalog, project)):
            return found._replace(project=project)
    project = parent or projects[-1]
    if project and not _known(catalog, found.project):
        return found._replace(project=project)
    return found._replace(name="")


def _image_path(path: str) -> str:
    """The path of an image, of which this may be a digest."""
    return re.sub(r"\.(?:md5|sha256)\Z", "", path)


def _known(catalog: Catalog, project: str) -> Sequence[Release]:
    """The project's releases, perhaps none."""
    try:
        return catalog.releases(project)
    except Refused as refused:
        if refused.status != HTTPStatus.NOT_FOUND:
            raise
    return ()


@functools.lru_cache(maxsize=1)
def _warn_once(text: str) -> None:
    """Logs what comes with every request."""
    log.warning(text)


@dataclass(frozen=True, slots=True)
class Access:
    """The guard that lets in who has a token, or a signed URL."""

    config: Config
    catalog: Catalog
    now: Callable[[], float] = time.time  # UTC seconds

    def tokens(self) -> Iterator[tuple[str, str]]:
        """Pairs of project, or "*" for all, and token. OSError, ValueError: as the file is."""
        if self.config.token:
            yield "*", self.config.token
        if path := self.config.token_file:
            yield from _tokens_in(path, identity_of(os.stat(path))).items()

    def __call__(self, request: Request) -> None:
        """Refused: 401, no token opens this; 403, see is_signed()."""
        if is_signed(self.config.sign_key, request, self.now()):
            return
        given = given_token(request).encode("utf-8", "replace")
        fits = functools.partial(hmac.compare_digest, given)
        try:
            opened = [project for project, token in self.tokens() if fits(token.encode())]
        except (OSError, ValueError) as err:
            _warn_once(f"--token-file {self.config.token_file}: {err}")
            raise Refused(503, "the tokens cannot be read just now: ask again later") from err
        if "*" in opened or (opened and read_path(self.catalog, request).project in opened):
            return
        reason = "the token does not open this" if given else "a token, or a signed URL, is needed"
        challenge = ("WWW-Authenticate", 'Basic realm="ota-server"')
        raise Refused(401, f"{reason}: as Bearer, password of Basic, or ?token=", challenge)


def allow_only(networks: tuple[Network, ...], request: Request) -> None:
    """The guard of --allow. Refused: 403."""
    # Also where a unix socket's proxy does not say, in words we read, for whom it asks.
    if not is_in(request.peer, networks):
        raise Refused(403, f"{request.peer} is in none of the networks that may ask")


# -- 11. Dialects: what each kind of device asks and takes -----------------------------------------


def _report(project: str, request: Request) -> Report:
    """What a request says of its device, and how much of an image it is about."""
    report = read_report(project, request.headers, request.peer, request.query)
    if request.method == "HEAD" or request.headers.get("x-esp8266-mode") == "version":
        return report._replace(asks="answer")
    with suppress(Refused):  # for the time when the size is known
        part = parse_range(request.headers.get("range", ""), sys.maxsize)
        return report._replace(asks="rest") if part and part.start else report
    return report


def reason_field(report: Report, outcome: Outcome) -> tuple[str, str]:
    """The field that says why the device gets what it gets."""
    text = str(outcome)
    if isinstance(outcome, Release):
        text = f"update: {outcome.version} in the place of {report.version or 'what it runs'}"
    return "X-OTA-Reason", plain(text)


def update(site: Site, request: Request) -> Reply:
    """/<anything>/<project>: the newest image for the device that asks (S1's contract)."""
    project = read_path(site.catalog, request).project
    report = _report(project, request)
    if report.version is None and request.headers.get("x-esp8266-mode") != "version":
        site.catalog.releases(project)  # a wrong URL is said before a missing version
        raise Refused(400, "no x-ESP8266-version or x-ESP32-version: tell update(), or ?version=")
    return _translate(site, request, report, decide(site, report), NEWEST)


def platform_update(site: Site, request: Request) -> Reply:
    """/update?dev=<project>&ver=v1.2.3 (S3's contract): what a device does wrong is a 400."""
    dev = parameter(request.query, "dev")
    if not (dev or parameter(request.query, "ver")):
        return update(site, request)
    report = _report(dev, request)
    if not (dev and report.version and report.device):
        raise Refused(400, "?dev=<project>&ver=v1.2.3 and the MAC in x-ESP...-STA-MAC are needed")
    try:
        outcome = decide(site, report)
    except Refused as refused:
        raise Refused(400 if refused.status == 404 else refused.status, refused.reason) from refused
    if isinstance(outcome, Objection) and outcome.deny and outcome.final:
        raise Refused(400, str(outcome))  # it is the device that is denied, not an image
    return _translate(site, request, report, outcome, NEWEST)


_MODES = {"x-esp8266-mode", "x-esp32-mode", "x-mgos-fw-version"}


def _picked(site: Site, request: Request, ask: Ask) -> tuple[Report, Outcome, str]:
    """Who asks, the image that the path means, and how long a cache may keep that."""
    project, name, kind = read_path(site.catalog, request)
    report = _report(project, request)
    among = site.catalog.releases(project)
    if kind and not request.headers.keys() & _MODES:  # else the device says it
        report = report._replace(kind=kind)
        among = [release for release in among if release.kind == kind]
    if name:
        among = [release for release in among if release.name == name]
    elif _image_path(request.path).endswith(".gz"):
        among = [release for release in among if release.facts.packed] or among
    if not among:
        file = _image_path(request.path.rpartition("/")[2])
        raise Refused(404, f"no file {shown(file)} of {shown(project)} can be offered")
    if not name:
        return report, ask(site, report, among, site.rules), NEWEST
    if report.chip is None and not report.is_accountable():  # a browser: the log need not tell
        ask = judge
    return report, ask(site, report, among, site.by_name()), NAMED


def download(site: Site, request: Request) -> Reply:
    """/<anything>/<project>/<file>.bin: that file; to a device still none that would harm it.

    /<project>/latest.bin and /<project>.bin: the newest image, also to who tells no version.
    """
    return _translate(site, request, *_picked(site, request, decide))


def digest_line(site: Site, request: Request) -> Reply:
    """The URL of an image and .md5 or .sha256: a line as md5sum writes it, hex first."""
    outcome = _picked(site, request, judge)[1]
    if isinstance(outcome, Objection):
        raise Refused(404, str(outcome))
    facts = outcome.facts
    text = f"{facts.md5 if request.path.endswith('.md5') else facts.sha256}  {outcome.name}"
    return text_reply(200, text, ("Cache-Control", "no-cache"), *_cors(site))


def _translate(site: Site, request: Request, report: Report, outcome: Outcome, cache: str) -> Reply:
    """A decision as status and bytes; the file is open before anything is promised."""
    if request.headers.get("x-esp8266-mode") == "version":  # getAvailableVersion() knows only 200
        version = outcome.version if isinstance(outcome, Release) else report.version
        if version:
            said = ("x-version", version.text), reason_field(report, outcome)
            return Reply(200, (*said, ("Content-Length", "0"), UNCACHED))
    if isinstance(outcome, Objection):
        if outcome.deny:
            return refusal(Refused(403, str(outcome)))
        if report.chip is None and report.version is None:  # who runs nothing has nothing new
            raise Refused(404, str(outcome))
        return Reply(304, (reason_field(report, outcome), ("Cache-Control", cache)))
    inside = outcome.path.startswith(os.path.join(os.path.realpath(site.config.dir), ""))
    offloaded = site.config.accel and inside and plain(outcome.path) == outcome.path
    if offloaded:  # ranges are the proxy's
        fields = {name: text for name, text in request.headers.items() if name != "range"}
        request = request._replace(headers=fields)
    image = site.catalog.open(outcome)
    reply = None
    try:
        reply = image_reply(request, outcome, image, cache)
        if offloaded and reply.body is image:
            reply = _by_proxy(site.config, outcome, reply)
    finally:
        if reply is None or reply.body is not image:
            image.file.close()
    recipient = f"{report.device or '-'} {request.peer}"
    more = reason_field(report, outcome), *_cors(site)
    return reply._replace(headers=(*reply.headers, *more), recipient=recipient)


def _by_proxy(config: Config, release: Release, reply: Reply) -> Reply:
    """The head alone, with where the proxy finds the bytes: X-Accel-Redirect, mod_xsendfile."""
    where = ("X-Sendfile", release.path)  # Debian's mod_xsendfile decodes nothing
    if config.accel != "apache":
        path = quote(os.path.relpath(release.path, os.path.realpath(config.dir)))
        where = ("X-Accel-Redirect", config.accel.removeprefix("nginx:") + path)
    own = {"Content-Length", "Accept-Ranges"}  # nginx would send the latter twice
    kept = (each for each in reply.headers if each[0] not in own)
    return Reply(reply.status, (*kept, ("Content-Length", "0"), where))


def link(site: Site, request: Request, release: Release) -> str:
    """The release's absolute URL, below what this path begins with, and what lets the client in."""
    folder = request.path.rpartition("/")[0].removesuffix(f"/{release.project}")
    path = quote(f"{folder}/{release.project}/{release.name}", errors="surrogateescape")
    url = f"{base_url(request)}{path}"
    if key := site.config.sign_key:
        return signed(key, url, int(time.time()) + SIGNED_SECONDS)
    token = parameter(request.query, "token")
    return f"{url}?token={quote(token)}" if token else url


def base_url(request: Request) -> str:
    """How the client reached this server."""
    return f"http{'s' * request.secure}://{request.headers.get('host', 'ota-server')}"


def versions(site: Site, request: Request) -> Reply:
    """/<anything>/<project>/versions: which there are, newest first (S0's contract)."""
    report = Report(read_path(site.catalog, request).project, request.peer)
    found = [r for r in site.catalog.releases(report.project) if r.kind not in FILESYSTEMS]
    offered = (r for r in found if is_for(site.rules, report._replace(kind=r.kind), r))
    texts = list(dict.fromkeys(str(r.version) for r in offered))
    listed = {"count": len(texts), "latest": next(iter(texts), None), "versions": texts}
    return json_reply(listed, *_cors(site))


def esp32fota(site: Site, request: Request) -> Reply:
    """/<project>/esp32fota.json: the manifest of esp32FOTA.cpp checkJSONManifest()."""
    project = read_path(site.catalog, request).project
    entry, why = _fota(site, request, project, decide)
    return json_reply(entry, why, *_cors(site))


def esp32fota_all(site: Site, request: Request) -> Reply:
    """/esp32fota.json: the same of every project, from which a device takes its own."""
    entries = []
    for project in site.catalog.projects():
        with suppress(Refused):
            entries.append(_fota(site, request, project, judge)[0])
    return json_reply(entries, *_cors(site))


def _fota(
    site: Site, request: Request, project: str, ask: Ask
) -> tuple[dict[str, str | int], tuple[str, str]]:
    """Version and address of the newest image, and of filesystems of the same version; and why."""
    report = read_report(project, request.headers, request.peer, request.query)
    # It compares by itself.
    report = report._replace(chip=ESP32_FAMILY, version=None, asks="answer")
    outcome = ask(site, report, (), ())
    if isinstance(outcome, Objection):
        raise Refused(404, str(outcome))
    links = {"bin": link(site, request, outcome)}
    for release in site.catalog.releases(project):
        same = release.version == outcome.version and release.kind in FILESYSTEMS
        if same and judge(site, report._replace(kind=release.kind), (release,)) is release:
            links.setdefault(release.kind, link(site, request, release))
    entry: dict[str, str | int] = {"type": project, "version": str(outcome.version)}
    base, why = base_url(request), reason_field(report, outcome)
    host, number = re.fullmatch("https?://(.*?)(?::([0-9]{1,5})?)?", base).groups()  # type: ignore[union-attr]
    port = int(number or (443 if request.secure else 80))
    # Beside "url" it ignores filesystems; without one, these ports mean HTTPS and others do not.
    if len(links) == 1 or request.secure != (port in {443, 4433}):
        return entry | {"url": links["bin"]}, why
    paths = {kind: url.removeprefix(base) for kind, url in links.items()}
    return entry | {"host": host, "port": port} | paths, why


def manifest(site: Site, request: Request) -> Reply:
    """/<project>/manifest.json, for ESPHome's update component and ESP Web Tools."""
    project = read_path(site.catalog, request).project
    report = Report(project, request.peer)
    chips = {each.facts.chip for each in site.catalog.releases(project) if each.kind == "sketch"}
    found = [decide(site, report._replace(chip=chip)) for chip in sorted(chips - {UNKNOWN_CHIP})]
    offered = [outcome for outcome in found if isinstance(outcome, Release)]
    if not offered:
        raise Refused(404, str(decide(site, report)))
    newest = max(release.version for release in offered)
    builds = [_build(site, request, each) for each in offered if each.version == newest]
    # Without a prompt the browser would erase the boot loader, which is in no image of ours.
    entry = {"name": project, "version": str(newest), "new_install_prompt_erase": True}
    why = reason_field(report, offered[0])
    return json_reply({**entry, "builds": builds}, why, *_cors(site))


def _build(site: Site, request: Request, release: Release) -> dict[str, object]:
    """One chip's part of a manifest: http_request_update.cpp, esp-web-tools const.ts."""
    path, chip = link(site, request, release), release.facts.chip
    family = chip.upper() if len(chip) < 6 or chip == "esp8266" else f"ESP32-{chip[5:].upper()}"
    ota = {"path": path, "md5": release.facts.md5}
    if release.notes:
        ota["summary"] = release.notes[:MAX_SUMMARY]
        anchor = quote(release.project, errors="surrogateescape")
        ota["release_url"] = f"{base_url(request)}/#{anchor}"
    offset = 0 if chip == "esp8266" else 0x10000  # app0 of every usual partition table
    parts = [{"path": path, "offset": offset}] * (not release.facts.packed)  # written as they are
    return {"chipFamily": family, "ota": ota, "parts": parts}


def autoconnect(site: Site, request: Request) -> Reply:
    """/_catalog: what a device may choose from: AutoConnectUpdate.cpp, its updateserver.py."""
    report = read_report("", request.headers, request.peer)
    entries = []
    for project in site.catalog.projects():
        for release in _known(site.catalog, project):
            if is_for(site.by_name(), report, release):
                path = f"{project}/{release.name}"
                date, clock = time.strftime("%x %X", time.gmtime(release.modified)).split()
                entry = {
                    "name": quote(path, errors="surrogateescape"),  # asked as it is
                    "type": "bin",
                    "date": date,
                    "time": clock,
                    "size": release.size,
                }
                if len(json.dumps(entry)) <= 256:  # what a device has room for
                    entries.append(entry)
    return json_reply(entries)


# -- 12. Page: what a person sees ------------------------------------------------------------------

STYLE = """:root{color-scheme:light dark}body{font:1rem/1.5 system-ui;max-width:70rem;margin:auto;
padding:1rem}table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .6rem;
border-bottom:1px solid #8886}code,pre{font-size:.85em;overflow-wrap:anywhere}pre{padding:.6rem;
border:1px solid #8886;white-space:pre-wrap}@media(max-width:48rem){th{display:none}
tr{display:block;border-bottom:1px solid #8886}td{display:inline-block;border:0}}"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_SOURCES = f"default-src 'none'; img-src 'self'; style-src 'sha256-{_STYLE_HASH}'"
CONTENT_SECURITY_POLICY = f"{_SOURCES}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
ICON = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="none"
stroke="#07c" d="M6 1v14M10 1v14M1 6h14M1 10h14"/><path fill="#07c" d="M4 4h8v8H4z"/></svg>"""


def page(site: Site, request: Request) -> Reply:
    """The projects and their releases, with what to paste into a sketch."""
    if read_report("", request.headers, request.peer).chip:
        raise Refused(404, "no project in the URL: give the device http://<this server>/<project>")
    projects = "".join(_project(site, request, project) for project in site.catalog.projects())
    nothing = "<p>No firmware yet: copy a file called like name-1.2.3.bin into the folder."
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Firmware</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="/favicon.ico">'
        f"<style>{STYLE}</style><h1>Firmware</h1>{projects or nothing}<p>ota-server {__version__}"
    )
    headers = ("Content-Security-Policy", CONTENT_SECURITY_POLICY), UNCACHED
    return body_reply(200, "text/html; charset=utf-8", text.encode("utf-8", "replace"), *headers)


def _project(site: Site, request: Request, project: str) -> str:
    """One project's part of the page."""
    title = f'<h2 id="{html.escape(project)}">{html.escape(project)}</h2>'
    try:
        releases = site.catalog.releases(project)
    except Refused as refused:
        return f"{title}<p>{html.escape(refused.reason)}"
    rules, anybody = site.by_name(), Report(project, request.peer)
    known = (each for each in releases if is_for(rules, anybody._replace(kind=each.kind), each))
    rows = "".join(_row(link(site, request, each), each) for each in known)
    library = "ESPhttpUpdate" if releases[0].facts.chip == "esp8266" else "httpUpdate"
    url = html.escape(f"{base_url(request)}/{quote(project, errors='surrogateescape')}")
    return (
        f"{title}<table><tr><th>Version<th>Chip<th>Bytes<th>Date, UTC<th>SHA-256{rows}</table>"
        f"<pre>WiFiClient{'Secure' * request.secure} client;\n{library}.update(client, "
        f"&quot;{url}&quot;, FIRMWARE_VERSION);  // the version of this very sketch</pre>"
    )


def _row(url: str, release: Release) -> str:
    """One release's part of the page."""
    facts, named = release.facts, release.version == UNVERSIONED
    kind = f"{release.kind} " * (release.kind != "sketch")
    notes = f'<tr><td colspan="5">{html.escape(release.notes)}' * bool(release.notes)
    return (
        f'<tr><td><a href="{html.escape(url)}">'
        f"{html.escape(release.name) if named else release.version}</a>"
        f"<td>{kind}{facts.chip}{', gzip' * facts.packed}<td>{release.size:,}"
        f"<td>{time.strftime('%Y-%m-%d %H:%M', time.gmtime(release.modified))}"
        f"<td><code>{facts.sha256}</code>{notes}"
    )


def health(site: Site, _request: Request) -> Reply:
    """Whether the firmware folder can be read; 503 if not."""
    site.catalog.projects()
    return text_reply(200, "ok", UNCACHED)


def unlisted(_site: Site, _request: Request) -> Reply:
    """What stands in the place of a list."""
    raise Refused(404, "the list of projects is switched off")


def icon(site: Site, _request: Request) -> Reply:
    """The browser's icon; S0 lets people have their own."""
    kept = ("Cache-Control", "max-age=86400")
    if folder := site.config.www_dir:
        with suppress(OSError), open(os.path.join(folder, "favicon.ico"), "rb") as file:
            return body_reply(200, "image/x-icon", file.read(CHUNK), kept)
    return body_reply(200, "image/svg+xml", ICON, kept)


ROUTES = (
    Route(re.compile("/"), page, blocking=True),
    Route(re.compile("/healthz"), health, guarded=False),
    Route(re.compile(r"/favicon\.ico"), icon, blocking=True, guarded=False),
    Route(re.compile("/_catalog"), autoconnect, blocking=True),
    Route(re.compile(r"/esp32fota\.json"), esp32fota_all, blocking=True),
    Route(re.compile(r"(?s).*/[^/]+/esp32fota\.json"), esp32fota),
    Route(re.compile(r"(?s).*/[^/]+/manifest\.json"), manifest),
    Route(re.compile("(?s).*/[^/]+/versions"), versions),
    Route(re.compile(r"(?s).*/[^/]+\.(?:md5|sha256)"), digest_line),
    Route(re.compile(r"(?s).*/(?:[^/]+\.(?:bin|bin\.gz|zip)|[^/]+/latest)"), download),
    Route(re.compile("(?s).*/update"), platform_update),
    Route(re.compile("(?s).*"), update),
)


LISTS = (page, autoconnect, esp32fota_all)  # of all projects


def build_site(config: Config, catalog: Catalog) -> Site:
    """Everything wired, for devices of which nothing is remembered.

    Raises:
        OSError, ValueError: the file of tokens, or the folder of the fleet, is not to be used.
        ImportError: the fleet is not beside this file.
    """
    guards: list[Callable[[Request], None]] = []
    if config.allow:
        guards.append(functools.partial(allow_only, config.allow))
    if config.token or config.token_file or config.sign_key:
        guards.append(access := Access(config, catalog))
        tuple(access.tokens())
    shut = () if config.listing else LISTS
    routes = tuple(
        replace(each, endpoint=unlisted) if each.endpoint in shut else each for each in ROUTES
    )
    site = Site(config, catalog, STATELESS, tuple(guards), routes, (log_decision,), ())
    if not config.state:
        return site
    look_beside()
    from ota_fleet import extend  # noqa: PLC0415 - one of the two doors to the fleet

    return extend(site)


def look_beside() -> None:
    """Lets packages be found that lie beside this file: python -I leaves its folder out."""
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))


# -- 13. Loop: the only section with sockets -------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
UNIX = getattr(socket, "AF_UNIX", None)  # Windows has none
SO_MAX_PACING_RATE = 47  # Linux; bytes/s, where -1 is no limit
MSG_MORE = getattr(socket, "MSG_MORE", 0)  # more follows at once
NEVER = float("inf")  # monotonic seconds
Wait = tuple[int, float]  # READ, WRITE or 0 for neither; until when, monotonic seconds
Steps = Generator[Wait, None, Any]  # waits until it has what it gives back


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the loop waits, in seconds."""

    handshake: float = 10
    head: float = 20  # for a whole head
    idle: float = 15  # between two requests
    progress: float = 60  # for the next byte of a reply to leave
    grace: float = 30  # for running downloads, once the server is to stop
    fresh: float = 5  # for the first request of a client, once the server is to stop
    linger: float = 2  # for a refused client to read why
    tick: float = 1  # between two looks at the clock


def unnamed_file(folder: str) -> BinaryIO:
    """A new file that ends with its descriptor, unless it is given a name: open(2), O_TMPFILE."""
    with suppress(AttributeError, OSError):  # no Linux, or a file system that cannot
        return open(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
    import tempfile  # noqa: PLC0415 - few need it, it takes memory, and its O_EXCL forbids the name

    return tempfile.TemporaryFile(dir=folder)


def _check_body(request: Request, most: int) -> None:
    """Refused: a body like this, or of more than `most` bytes, is not taken."""
    if "content-length" not in request.headers:
        raise Refused(411, "send a Content-Length")
    if "content-range" in request.headers:  # RFC 9110 14.4
        raise Refused(400, "send all of it: a part, with Content-Range, is not taken")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "send it as it is: no Content-Encoding is undone here")
    if request.body_size > most:
        raise Refused(413, f"the body has {request.body_size} bytes, at most {most} are taken")


class Connection:
    """One client from accept to close: a generator that yields what it waits for.

    It yields a Wait, or a Request whose endpoint blocks and is then sent the Reply.
    """

    __slots__ = (
        "deadline", "events", "fileno", "idle_from", "incoming", "outgoing", "peer", "sent",
        "server", "socket", "steps", "tls",
    )  # fmt: skip

    def __init__(self, server: Server, client: socket.socket, peer: str) -> None:
        self.server = server
        self.socket = client
        client.setblocking(False)
        self.fileno = client.fileno()
        self.peer = peer  # IP address, or "unix"
        self.events = 0  # what the selector watches for it
        self.deadline = NEVER
        # Monotonic seconds: from then on nobody misses it, as no request of it is being answered.
        self.idle_from = time.monotonic() + server.limits.fresh
        self.tls: ssl.SSLObject | None = None  # between `incoming` and `outgoing`
        self.steps = self._talk() if server.tls is None else self._talk_tls(server.tls)

    def explain(self, err: OSError) -> None:
        """Says in the log why the conversation broke off, and to a client that it speaks no TLS."""
        if not isinstance(err, ssl.SSLError):
            return log.debug("%s is gone: %s", self.peer, err)
        log.info("%s speaks no TLS that fits: %s", self.peer, err.reason or err)
        farewell = self.outgoing.read()  # an alert
        if err.reason == "HTTP_REQUEST":
            farewell = render(text_reply(400, "this port speaks HTTPS: use https://"), time.time())
        self.tls = None
        with suppress(OSError):
            self.socket.send(farewell)
            self.socket.recv(MAX_HEAD)  # bytes left unread would reset the connection
        return None

    def close(self) -> None:
        """Ends the conversation, wherever it is."""
        self.steps.close()
        if self.tls is not None:
            with suppress(OSError):
                self.socket.send(self._end_tls())
        self.socket.close()

    def _talk_tls(self, context: ssl.SSLContext) -> Generator[Wait | Request, Reply | None, None]:
        """A conversation under TLS; the handshake's last words go out with the first reply."""
        deadline = time.monotonic() + self.server.limits.handshake
        self._set_no_delay()  # a reply may follow the tickets of TLS 1.3 at once
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        while self.tls is None:
            if not (yield from self._fetch(deadline)):
                raise ConnectionResetError("it closed before the handshake was over")
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                self.tls = tls
        yield from self._talk()

    def _fetch(self, deadline: float) -> Generator[Wait, None, bool]:
        """Gives the client what TLS has to say, TLS what comes back; whether anything did."""
        if self.outgoing.pending:
            yield from self._send(self.outgoing.read())
            yield READ, deadline  # the answer cannot be there yet
        data = yield from self._until(deadline, READ, self.socket.recv, MAX_HEAD)
        return self.incoming.write(data) > 0

    def _sealed(self, data: bytes, record: int = PIECE) -> bytes:
        """What goes out for `data`: under TLS, records of so many bytes."""
        if self.tls is None:
            return data
        for start in range(0, len(data), record):
            self.tls.write(memoryview(data)[start : start + record])
        return self.outgoing.read()

    def _end_tls(self) -> bytes:
        """What ends TLS: a close_notify, without which OpenSSL forgets the session."""
        if self.tls is None:
            return b""
        with suppress(ssl.SSLError):  # it wants to read the other one's, too
            self.tls.unwrap()
        self.tls = None
        return self.outgoing.read()

    def _talk(self) -> Generator[Wait | Request, Reply | None, None]:
        """Requests and replies, until one of the two sides has had enough."""
        limits = self.server.limits
        rest = b""
        for served in count():
            path = ""
            try:
                head, rest = yield from self._next_head(rest, fresh=not served)
                if not head:
                    return
                request = parse_head(head, self.peer, secure=self.server.tls is not None)
                path = request.path
                if request.body_size or request.method not in {"GET", "HEAD"}:
                    request, rest = yield from self._take_body(request, rest)
            except Refused as refused:
                yield from self._refuse(refused, path)
                return
            self.idle_from = NEVER
            reply = self.server.answer(request) or (yield request)
            assert reply is not None
            keep_alive = request.keep_alive and not self.server.draining
            is_image = isinstance(reply.body, Image)
            unread = not request.keep_alive and request.body_size > 0
            sending = self._sending(request, reply, rest, keep_alive)
            del head, request, reply  # while a slow device reads, as little as possible stays
            yield from sending
            if not keep_alive or self.server.draining:
                # Under TLS a close_notify is still to come, which would reset the end of an image.
                lingers = unread or (is_image and (self.tls is not None or self._has_unread()))
                if lingers and not self.server.draining:
                    yield from self._linger(limits.idle if is_image else limits.linger)
                return
            if is_image:  # it was lowered for the end
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                self._set_rate(-1)
            if served == 0:  # the next reply shall not wait until this one is acknowledged
                self._set_no_delay()
            if (rest or self.tls is not None) and served % REQUESTS == REQUESTS - 1:
                yield WRITE, time.monotonic() + limits.progress
            self.idle_from = -NEVER

    def _refuse(self, refused: Refused, path: str) -> Generator[Wait, None, None]:
        """Says why a request is not even read to its end."""
        log.info("%s refused, %s: %s", self.peer, refused.status, refused.reason)
        reply = self.server.site.refusal(refused, path)
        yield from self._send(self._sealed(render(reply, time.time())))
        yield from self._linger(self.server.limits.linger)

    def _set_no_delay(self) -> None:
        """Sends small replies at once; Nagle would hold them for 40 ms."""
        if self.server.address_family != UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _set_rate(self, rate: int) -> None:
        """Bytes/s from now on, if downloads have a limit at all."""
        if self.server.site.config.rate:
            rate = min(rate, 2**31 - 1)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)

    def _until(self, deadline: float, event: int, call: Callable[..., Any], *args: Any) -> Steps:
        """What `call` gives back, once the socket is ready for `event`."""
        while True:
            try:
                return call(*args)
            except BlockingIOError:
                pass
            yield event, deadline  # not inside except: what waits would hold on to the exception

    def _receive(self, deadline: float) -> Steps:
        """Some bytes; none once the client has closed, with or without close_notify."""
        fetched = False
        while self.tls is not None:
            try:
                return self.tls.read(MAX_HEAD)
            except ssl.SSLWantReadError:
                pass
            if fetched:  # nothing for us was in it, such as a change of keys: others first
                yield READ, deadline
            fetched = yield from self._fetch(deadline)
            if not fetched:
                return b""
        return (yield from self._until(deadline, READ, self.socket.recv, MAX_HEAD))

    def _next_head(self, rest: bytes, *, fresh: bool) -> Generator[Wait, None, tuple[bytes, bytes]]:
        """A head, and what came behind it; no head if the client has gone. Refused: 400, 431."""
        limits = self.server.limits
        begun = fresh  # a new connection comes with its head
        deadline = time.monotonic() + (limits.head if fresh else limits.idle)
        while True:
            if rest:
                head, rest = split_head(rest)
                if head:
                    return head, rest
            if not fresh and self.tls is None:  # TLS may hold bytes already
                yield READ, deadline
            more = yield from self._receive(deadline)
            if not more:
                return b"", b""
            if not begun and more.strip(b"\r\n"):
                begun = True
                deadline = time.monotonic() + limits.head
            rest += more

    def _take_body(self, request: Request, rest: bytes) -> Steps:
        """The request with its body, where one is taken, and what came behind it."""
        site, size = self.server.site, request.body_size
        route = site.route(request.path)
        if not route.body or request.method not in {"PUT", "POST", "PATCH"}.intersection(
            route.methods
        ):
            if size and (request.keep_alive or size > MAX_BODY):
                rest = yield from self._drop_body(size, rest)
            return request, rest
        admitted(site, forwarded(request, site.config.trust_proxy))
        _check_body(request, route.body)
        if request.headers.get("expect", "").lower() == "100-continue":
            yield from self._send(self._sealed(b"HTTP/1.1 100 Continue\r\n\r\n"))
        short = size <= MAX_BODY and route.body <= CHUNK  # there nobody needs a descriptor
        try:
            body, rest = yield from self._receive_body(
                size, rest, "" if short else site.config.state
            )
        except OSError as err:
            if err.errno in UNWRITABLE:
                reason = "the state folder cannot be written"
                self.server._complain(f"{reason}: {err}", logging.ERROR)
                raise Refused(503, f"{reason}: see the log") from err
            if err.errno in FULL:
                reason = "there is no room left for the body: make some, send it again"
                raise Refused(507, reason) from err
            raise
        return request._replace(body=body), rest

    def _receive_body(self, size: int, rest: bytes, folder: str) -> Steps:
        """A body, as a file without a name that ends with its descriptor, and what is behind it.

        Without a folder it is in memory.
        """
        limits = self.server.limits
        deadline = time.monotonic() + limits.progress + size / MIN_RATE
        with ExitStack() as opened:
            body = opened.enter_context(unnamed_file(folder) if folder else BytesIO())
            turn = missing = size - body.write(rest[:size])
            rest = rest[size:]
            while missing:
                more = yield from self._receive(min(deadline, time.monotonic() + limits.progress))
                if not more:
                    raise Refused(400, "the body is shorter than its Content-Length")
                rest = more[missing:]
                missing -= body.write(more[:missing])
                if turn - missing >= TURN:  # others first
                    turn = missing
                    yield WRITE, deadline
            body.seek(0)  # writes what is buffered, too
            opened.pop_all()
        return body, rest

    def _drop_body(self, size: int, rest: bytes) -> Generator[Wait, None, bytes]:
        """What follows a body that nobody asked for: unread, it would be the next request."""
        if size > MAX_BODY:
            raise Refused(413, "nothing here takes a body")
        deadline = time.monotonic() + self.server.limits.head
        while len(rest) < size:
            more = yield from self._receive(deadline)
            if not more:
                raise Refused(400, "the body is shorter than its Content-Length")
            rest += more
        return rest[size:]

    def _has_unread(self) -> bool:
        """Whether the client has sent more than was asked for."""
        with suppress(BlockingIOError):
            return bool(self.socket.recv(1))
        return False

    def _linger(self, seconds: float) -> Generator[Wait, None, None]:
        """Waits until the client has read: a close with bytes unread would reset the connection."""
        self.idle_from = -NEVER
        deadline = time.monotonic() + seconds
        yield from self._send(self._end_tls())
        self.socket.shutdown(socket.SHUT_WR)
        for _ in range(64):
            if not (yield from self._until(deadline, READ, self.socket.recv, CHUNK)):
                return

    def _sending(self, request: Request, reply: Reply, rest: bytes, kept: bool) -> Iterator[Wait]:
        """The generator that sends the reply."""
        data = render(reply, time.time(), keep_alive=kept)
        if not isinstance(reply.body, Image):
            sealed = self._sealed(data) if kept else self._sealed(data) + self._end_tls()
            follows = kept and rest.startswith(b"GET ") and rest.endswith(b"\r\n\r\n")
            return self._send(sealed, MSG_MORE * follows)  # with the next reply, or after 200 ms
        record = DEVICE_RECORD if request.headers.get("user-agent", "").startswith("ESP") else PIECE
        return self._send_image(data, reply, record)

    def _send(self, data: bytes, flags: int = 0) -> Generator[Wait, None, bool]:
        """Sends; gives back whether it had to wait."""
        try:  # there is room for it, nearly always
            view = memoryview(data)[self.socket.send(data, flags) :]
        except BlockingIOError:
            view = memoryview(data)
        waited = len(view) > 0
        while view:
            deadline = time.monotonic() + self.server.limits.progress
            sent = yield from self._until(deadline, WRITE, self.socket.send, view)
            view = view[sent:]
        return waited

    def _send_image(self, head: bytes, reply: Reply, record: int) -> Iterator[Wait]:
        """Head and image. The first bytes of both leave together: an ESP32 waits only 100 ms."""
        image, part, recipient = reply.body, reply.part, reply.recipient
        assert isinstance(image, Image)
        del reply  # its headers
        self.sent = 0  # bytes of the image
        try:
            size = SEND_BUFFER if self.tls is None else TLS_SEND_BUFFER
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            self._set_no_delay()
            self._set_rate(self.server.site.config.rate * 1024)
            self._announce(image, part, recipient, over=False)
            piece = self._piece(image, part.start, min(len(part), max(1, record - len(head))))
            more = MSG_MORE * (len(piece) < len(part))
            yield from self._send(self._sealed(head + piece, record), more)
            self.sent = len(piece)
            del head, piece
            if self.tls is None:
                yield from self._send_pages(image, part)
            else:
                yield from self._send_records(image, part, record)
        finally:
            image.file.close()
            self._tell(image, len(part), recipient)
            self._announce(image, part, recipient, over=True)

    def _announce(self, image: Image, part: range, recipient: str, *, over: bool) -> None:
        """Tells who wants to know that an image begins to leave, or has."""
        for tell in self.server.site.carriers:
            sent = functools.partial(getattr, self, "sent")
            tell(Transfer(recipient, image, part, sent, over))

    def _tell(self, image: Image, size: int, recipient: str) -> None:
        """One line for an image; not in the generator, whose size counts thousands of times."""
        level = logging.INFO if self.sent == size else logging.WARNING
        name = printable(os.path.basename(str(image.file.name)))
        log.log(level, "%s was sent %d of %d bytes of %s", recipient, self.sent, size, name)

    def _send_records(self, image: Image, part: range, record: int) -> Iterator[Wait]:
        """The rest of an image under TLS; several records at once to who takes them as fast."""
        turn = paused = self.sent  # where others had their turn, where we had to wait
        at_once = record
        while self.sent < len(part):
            if at_once == record and self.sent - paused >= 2 * AT_ONCE:
                at_once = AT_ONCE
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            size = min(at_once, len(part) - self.sent)
            sealed = self._sealed(self._piece(image, part.start + self.sent, size), record)
            if (yield from self._send(sealed)):
                turn = paused = self.sent
            self.sent += size
            if self.sent - turn >= TURN:
                turn = self.sent
                yield WRITE, time.monotonic() + self.server.limits.progress

    def _send_pages(self, image: Image, part: range) -> Iterator[Wait]:
        """The rest of an image, from the page cache where that is possible."""
        progress = self.server.limits.progress
        turn = self.sent
        deadline = time.monotonic() + progress
        while self.sent < len(part):
            sent = self._push(image, part.start + self.sent, part.stop)
            self.sent += sent
            left = len(part) - self.sent
            if sent:
                deadline = max(deadline, time.monotonic() + progress)
            if left == 2 * LAST:  # the socket is writable now when the kernel holds less than LAST
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LAST_BUFFER)
                deadline += 2 * progress  # so that much more has to leave before the next byte does
            if not sent or self.sent - turn >= TURN or left == LAST:
                turn = self.sent
                yield WRITE, deadline

    def _push(self, image: Image, offset: int, stop: int) -> int:
        """Sends once; gives back how many bytes the kernel took. Nothing is held while it waits.

        sendfile hands pages to the socket, not copies: what a rewrite of the file changes before
        they leave goes out changed. So the last bytes are copied, and the very last ones are sent
        when the kernel holds nothing but copies: who gets them all gets none of a rewrite.
        """
        ahead = stop - 2 * LAST - offset
        try:
            if ahead > 0 and hasattr(os, "sendfile"):
                sent = os.sendfile(self.fileno, image.file.fileno(), offset, min(ahead, TURN))
                self._require(image, sound=sent > 0)
                return sent
        except BlockingIOError:
            return 0  # caught here, not in the generator, which would keep 240 bytes of it
        except OSError as err:
            if err.errno not in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
                raise  # a file system without sendfile is no reason to fail
        left = stop - offset
        size = min(left - LAST, AT_ONCE) if left > LAST else left
        try:
            return self.socket.send(self._piece(image, offset, size))
        except BlockingIOError:
            return 0

    def _piece(self, image: Image, offset: int, size: int) -> bytes:
        """Bytes of the image, as long as it is the one that was checked."""
        image.file.seek(offset)
        piece = image.file.read(size)
        self._require(image, sound=len(piece) == size)
        return piece

    def _require(self, image: Image, *, sound: bool) -> None:
        """Raises ConnectionAbortedError unless all is `sound` and the file the one checked."""
        if not (sound and image.is_unchanged()):
            log.warning("%s changed while it was sent", printable(str(image.file.name)))
            raise ConnectionAbortedError("the file was rewritten: rather no image than a mixed one")


class Handler(BaseHTTPRequestHandler):
    """One request whose endpoint blocks, in a thread; the loop keeps the connection."""

    def __init__(self, errand: Any, _address: Any, server: Server) -> None:
        connection, request = errand
        reply = answer(server.site, request)
        if request.body is not None:
            request.body.close()
        server.take_back(connection, reply)


class Server(ThreadingHTTPServer):
    """The loop: it accepts, waits and sends; its threads only think where an endpoint blocks."""

    def __init__(
        self,
        site: Site,
        *,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        selector: selectors.BaseSelector | None = None,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Listens, and calls `before_waiting` whenever all is done. OSError: it cannot."""
        self.site = site
        self._quick = site if site.grant is at_once else replace(site, grant=defer)
        self.tls = tls
        self.limits = limits or Limits()
        self.draining = self._listening = False
        self._before_waiting = before_waiting
        self._selector = selector or selectors.DefaultSelector()
        self._connections: set[Connection] = set()  # that wait for something
        self._waiting: deque[tuple[Connection, Request]] = deque()  # for a thread
        self._answered: deque[tuple[Connection, Reply]] = deque()
        self._thinking = 0  # threads
        self._listen_at = self._tick_at = self._complain_at = -NEVER
        self._end = NEVER
        self._ended = threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, READ)
        self._file = ""  # of the socket, to be removed
        host = site.config.host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")  # noqa: S104
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.address_family = socket.AF_UNIX if host.startswith("unix:") else family
        super().__init__((host, site.config.port), Handler)

    def server_bind(self) -> None:
        """Binds; without the standard one's name look-up, which hangs where DNS is dead."""
        if self.site.config.inherited:
            self._inherit()
        elif self.address_family == UNIX:
            self._bind_file(self.site.config.host.removeprefix("unix:"))
        else:
            # Windows, others
            exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            self.socket.setsockopt(socket.SOL_SOCKET, exclusive, 1)
            if self.address_family == socket.AF_INET6 and not self.site.config.host:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_port = 0 if self.address_family == UNIX else self.server_address[1]

    def _inherit(self) -> None:
        """Takes the socket that systemd keeps over a restart: sd_listen_fds(3). OSError: none."""
        self.socket.close()
        self.socket = socket.socket(fileno=3)
        self.address_family = self.socket.family
        fits = self.address_family in {socket.AF_INET, socket.AF_INET6, UNIX}
        listens = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not (fits and listens and self.site.config.inherited == "1"):
            raise OSError(errno.EINVAL, "needs to be one, of TCP or unix, and to listen")

    def _bind_file(self, path: str) -> None:
        """Binds to a file, for everybody whom its folder lets in, in place of a dead server's."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a living one's queue may be full
            is_dead = probe.connect_ex(path) == errno.ECONNREFUSED
            if is_dead and stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        self.socket.bind(path)
        self._file = path
        os.chmod(path, 0o666)  # noqa: S103

    def server_activate(self) -> None:
        """Listens, with room for a building that has its power back."""
        if hasattr(socket, "TCP_DEFER_ACCEPT") and self.address_family != UNIX:
            # Linux wakes us only when a head has come.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_SECONDS)
        self.socket.listen(BACKLOG)
        self.socket.setblocking(False)

    def server_close(self) -> None:
        """Gives back every descriptor."""
        self._stop_listening()
        for each in (self._selector, self._waker, self._woken):
            each.close()

    def _stop_listening(self) -> None:
        """Who comes now hears at once that nobody listens, or waits in systemd's queue."""
        with suppress(OSError):  # as long as it listens it is surely ours, then another's perhaps
            os.unlink(self._file)
        self._file = ""
        self.socket.close()

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Runs the loop until shutdown(), or until drain() and the end of the last download."""
        try:
            while time.monotonic() < self._end and (self._connections or not self.draining):
                self._look_at_clock(time.monotonic())
                self._before_waiting()
                ready = self._selector.select(min(poll_interval, self.limits.tick))
                woken = time.monotonic()
                for key, _ in ready:
                    if key.data is not None:
                        self._advance(key.data)
                    elif key.fileobj is self.socket:
                        self._accept()
                    else:
                        self._woken.recv(1024)
                self._use_threads()
                for tell in self.site.pulses:
                    tell(time.monotonic() - woken)
        finally:
            for connection in tuple(self._connections):
                self._close(connection)
            self._ended.set()

    def answer(self, request: Request) -> Reply | None:
        """The reply, unless its endpoint has to wait for something: None, it needs a thread."""
        with suppress(Refused):  # answer() says so
            if self.site.route(request.path).blocking:
                return None
        with suppress(Deferred):
            return answer(self._quick, request)
        return None

    def drain(self) -> None:
        """Stops accepting; the loop ends with the last download or when the grace is over."""
        self._end = min(self._end, time.monotonic() + self.limits.grace)
        self.draining = True
        self._tick_at = -NEVER
        self._wake()

    def shutdown(self) -> None:
        """Ends the loop at once and waits until it has ended."""
        self._end = -NEVER
        self._wake()
        self._ended.wait()

    def take_back(self, connection: Connection, reply: Reply) -> None:
        """Takes the reply that a thread found."""
        self._answered.append((connection, reply))
        self._wake()

    def shutdown_request(self, request: Any) -> None:
        """Closes nothing when a thread ends: the loop does."""

    def _wake(self) -> None:
        with suppress(OSError):  # closed: the loop has ended
            self._waker.send(b"w")

    def _accept(self) -> None:
        """Takes connections from the backlog as long as there is room."""
        for _ in range(ACCEPT_BURST):
            if len(self._connections) >= self.site.config.max_connections:
                return self._pause("max-connections is reached: new ones wait")
            try:
                client, address = self.socket.accept()
            except (BlockingIOError, ConnectionError):
                return None
            except OSError as err:  # such as EMFILE; without a pause the loop would spin
                return self._pause(f"connections cannot be accepted: {err.strerror}")
            peer = LOCAL if self.address_family == UNIX else address[0].removeprefix("::ffff:")
            self._advance(Connection(self, client, peer))
        return None

    def _pause(self, reason: str) -> None:
        """Leaves new connections in the backlog for a tick or until one closes; seldom says so."""
        self._listen(time.monotonic() + self.limits.tick)
        self._complain(reason)

    def _complain(self, reason: str, level: int = logging.WARNING) -> None:
        """Logs what comes with every connection, but seldom."""
        now = time.monotonic()
        if now > self._complain_at:
            self._complain_at = now + COMPLAIN_SECONDS
            log.log(level, reason)

    def _advance(self, connection: Connection, reply: Reply | None = None) -> None:
        """Lets a connection go on to what it waits for next."""
        try:
            wanted = connection.steps.send(reply)
            self._connections.add(connection)
            if isinstance(wanted, Request):
                self._waiting.append((connection, wanted))
                wanted = (0, NEVER)
            events, connection.deadline = wanted
            if events != connection.events:
                self._watch(connection, events)
        except StopIteration:
            self._close(connection)
        except OSError as err:
            connection.explain(err)
            self._close(connection)
        except Exception:
            log.exception("%s: the connection failed", connection.peer)
            self._close(connection)

    def _watch(self, connection: Connection, events: int) -> None:
        """Makes the selector watch a connection for `events`."""
        if connection.events and not events:
            self._selector.unregister(connection.fileno)
        elif events and not connection.events:
            self._selector.register(connection.fileno, events, connection)
        else:
            self._selector.modify(connection.fileno, events, connection)
        connection.events = events

    def _close(self, connection: Connection) -> None:
        if connection.events:
            self._watch(connection, 0)
        connection.close()
        self._connections.discard(connection)
        if not self._listening:
            self._listen()

    def _use_threads(self) -> None:
        """Goes on with what threads have answered and gives them what waits."""
        while self._answered:
            self._thinking -= 1
            self._advance(*self._answered.popleft())
        while self._waiting and self._thinking < MAX_THREADS:
            try:
                self.process_request(self._waiting[0], ())  # type: ignore[arg-type]
            except RuntimeError as err:  # no more threads may be started: next time, perhaps
                return self._complain(str(err))
            self._thinking += 1
            self._waiting.popleft()
        return None

    def _look_at_clock(self, now: float) -> None:
        """Once a tick, ends what has waited too long and listens again if there is room."""
        if now < self._tick_at:
            return
        self._tick_at = now + self.limits.tick
        for connection in tuple(self._connections):
            is_over = self.draining and connection.idle_from <= now
            if is_over:  # unless its next request has just come
                self._advance(connection)
            if connection.deadline < now or (is_over and connection.idle_from <= now):
                self._close(connection)
        self._listen(self._listen_at)

    def _listen(self, since: float = -NEVER) -> None:
        """Watches the listening socket from `since` on, if there is room; closes it for good."""
        room = len(self._connections) < self.site.config.max_connections
        listen = room and time.monotonic() >= since and not self.draining
        if listen and not self._listening:
            self._selector.register(self.socket, READ)
        elif self._listening and not listen:
            self._selector.unregister(self.socket)
        if self.draining:
            self._stop_listening()
        self._listening, self._listen_at = listen, since


# -- 14. Command line ------------------------------------------------------------------------------


class LogLines(logging.Handler):
    """Lines for a stream, written together: a system call for each would cost a third of a check.

    flush() writes them; a warning does not wait for it. In the journal, which has its own clock,
    each begins with its priority: sd-daemon(3).
    """

    def __init__(self, stream: TextIO, *, journal: bool = False) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())  # of what is behind the level
        self._stream = stream
        self._journal = journal
        self._lines: list[str] = []
        self._writing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line: time, level, sentence; behind them a trace, if there is one."""
        start = f"{local_time(int(record.created))},{int(record.msecs):03} "
        if self._journal:
            start = f"<{'776432'[record.levelno // 10]}>"
        try:
            text = self.format(record) if record.exc_info else record.getMessage()
        except (TypeError, ValueError):  # its arguments do not fit
            return self.handleError(record)
        if self._journal:
            text = text.replace("\n", f"\n{start}")
        self._lines.append(f"{start}{record.levelname} {text}\n")
        return self.flush() if record.levelno > logging.INFO else None

    def flush(self) -> None:
        """Writes what was kept; where that fails, as on a full disk, nobody could be told."""
        if not self._lines or self._writing:  # a signal handler may log in the middle of it
            return
        with self.lock, suppress(OSError, ValueError, AttributeError):  # type: ignore[union-attr]
            self._writing = True
            lines, self._lines = self._lines, []
            self._stream.write("".join(lines))
            self._stream.flush()
        self._writing = False


@functools.lru_cache(maxsize=1)
def local_time(now: int) -> str:
    """A second, as it stands in the log; `now` is UTC seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))


EPILOG = (__doc__ or "").partition("what --help says below them:\n\n")[2]


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with it: SystemExit(2)."""
        _fail(message)


def _fail(text: str) -> NoReturn:
    """Ends the program: one line, status 2."""
    sys.stderr.write(f"ota-server: {text}\n")
    raise SystemExit(2)


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _word(*words: str) -> Callable[[str], str]:
    def word(text: str) -> str:
        if text.upper() not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(words).lower()}")
        return text.upper()

    return word


def _networks(text: str) -> tuple[Network, ...]:
    try:
        networks = text.replace(",", " ").split() or [""]
        return tuple(ipaddress.ip_network(network, strict=False) for network in networks)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{err}") from err


def _accel(text: str) -> str:
    if not re.fullmatch("apache|nginx:/(.*/)?|", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither apache nor such as nginx:/_fw/")
    return text


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: it would let everybody in")
    return text


def _key(text: str) -> bytes:
    try:
        with open(text, "rb") as file:
            key = file.read().strip()
    except OSError as err:
        raise argparse.ArgumentTypeError(f"{text}: {err.strerror}") from err
    if len(key) < 16:
        raise argparse.ArgumentTypeError(f"{text} holds no key; openssl rand -hex 32 makes one")
    return key


def _add_options(parser: Parser, environ: Mapping[str, str], connections: int) -> None:
    """All options that stand in the environment, too."""

    def option(name: str, metavar: str, default: str | None, text: str, **more: Any) -> None:
        found = environ.get(f"OTA_{name.upper().replace('-', '_')}", default)
        default = found if default is None else found or default  # empty: see _filled()
        parser.add_argument(f"--{name}", metavar=metavar, default=default, help=text, **more)

    level = _word("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    option("dir", "DIR", "~/firmware", "folder with the firmware (default: ~/firmware)")
    option("host", "HOST", "", "address, or unix:/path, to listen on (default: all, IPv4 and IPv6)")
    port = environ.get("US_SERVER_PORT") or "8000"  # S4's
    option("port", "PORT", port, "port to listen on (default: 8000)", type=_number)
    levels = "debug, info, warning, error or critical (default: info)"
    option("log", "LEVEL", "info", levels, type=level)
    option("cert", "PEM", "", "certificate chain: serve HTTPS (default: plain HTTP)")
    option("key", "PEM", "", "its key (default: in the same file)")
    text = f"open at once, more wait (default: {connections}, by the limit of open files)"
    option("max-connections", "N", str(connections), text, type=_number)
    option("max-downloads", "N", "0", "images on their way at once (default: all)", type=_number)
    option("rate", "KB", "0", "KB/s of one download at most (default: no limit)", type=_number)
    text = "needed by who asks: as Bearer, password of Basic, or ?token="
    option("token", "TOKEN", None, text, type=_filled)
    text = 'holds it, or {"project": "token"}; read when it changes'
    option("token-file", "FILE", None, text, type=_filled)
    option("sign-key-file", "FILE", None, "key of signed URLs, which need no token", type=_key)
    option("allow", "NETS", None, "networks that may ask (default: all)", type=_networks)
    option("cors", "ORIGIN", "*", "whose pages may read images, or off (default: *)")
    text = "the page and other lists of all projects (default: on)"
    option("listing", "on|off", "on", text, type=_word("ON", "OFF"))
    option("trust-proxy", "NETS", None, "networks whose X-Forwarded-* count", type=_networks)
    option("accel", "PROXY", "", "nginx:/_fw/ or apache: it sends the images", type=_accel)
    text = "folder to remember devices in and to take uploads; needs ota_fleet (default: none)"
    option("state", "DIR", "", text)
    _add_fleet(option)
    parser.add_argument("--backup", metavar="FILE", default="", help="copy fleet.db there and end")


def _add_fleet(option: Callable[..., None]) -> None:
    """What counts with --state only."""
    text = "open or whitelist: which devices get images (default: open)"
    option("admit", "WHOM", "open", text, type=_word("OPEN", "WHITELIST"))
    option("max-image", "MB", "16", "MB of an upload at most (default: 16)", type=_number)
    text = "newest uploads of a project to keep, beside what devices run (default: all)"
    option("keep", "N", "0", text, type=_number)
    option("max-devices", "N", "10000", "to remember (default: 10000)", type=_number)
    option("public-url", "URL", "", "what the server is called from outside, in links it sends")
    option("mqtt", "URL", "", "mqtts://user:password@broker/prefix; needs paho-mqtt")


NO_FLEET = "{} needs the folder ota_fleet beside ota_server.py: copy it, too"
S4 = ("USERNAME", "PASSWORD")
ADMIN = ("ADMIN_EMAIL", "ADMIN_PASSWORD")  # S3's
S0 = ("www_dir", "firmware_dir", "url_firmware", "no_certs", "no_token")


def _add_s0(parser: Parser) -> None:
    """The flags of OTA Firmware Server. One of them makes its folders and port the default."""
    group = parser.add_argument_group("for who comes from OTA Firmware Server")
    group.add_argument("--www-dir", metavar="DIR", help="holds favicon.ico (default: www)")
    group.add_argument("--firmware-dir", metavar="DIR", help="folder in it (default: firmware)")
    group.add_argument("--url-firmware", metavar="PATH", help="any is answered")
    group.add_argument("--no-certs", action="store_true", help="not certs/ca_cert.pem, ca_key.pem")
    group.add_argument("--no-token", action="store_true", help="nobody needs a token")


def _s0_defaults(options: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """What is meant where such a flag is given, and nothing else; {} without one."""
    if not any(options[name] for name in S0):
        return {}
    www = options["www_dir"] or "www"
    defaults = {"dir": os.path.join(www, options["firmware_dir"] or "firmware"), "port": "8070"}
    if not options["no_certs"]:
        defaults |= {"cert": "certs/ca_cert.pem", "key": "certs/ca_key.pem"}
    for name in set(defaults):
        defaults[name] = environ.get(f"OTA_{name.upper()}") or defaults[name]
    return defaults | {"www_dir": www}


def read_config(argv: Sequence[str], environ: Mapping[str, str], files: int = 1024) -> Config:
    """The settings, if `files` can be open. SystemExit(2): one is wrong, as stderr has said."""
    parser = Parser("ota-server", epilog=EPILOG, allow_abbrev=False)
    parser.description = "Gives every ESP8266 and ESP32 the newest firmware that is right for it."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_options(parser, environ, max(8, (files - 32) // 2))  # a download takes two
    parser.add_argument("--version", action="version", version=f"ota-server {__version__}")
    _add_s0(parser)
    options = vars(parser.parse_args(argv))
    if defaults := _s0_defaults(options, environ):
        parser.set_defaults(**defaults)
        options = vars(parser.parse_args(argv))
        if options["no_certs"]:
            options["cert"] = options["key"] = ""
        if options["no_token"]:
            options["token"] = options["token_file"] = None
        elif not (options["token"] or options["token_file"]):
            parser.error("--token is needed, or --no-token")
    for name in S0[1:]:
        del options[name]
    options["dir"] = os.path.expanduser(options["dir"])  # stays as it is where there is no home
    options["sign_key"] = options.pop("sign_key_file")
    options["listing"] = options["listing"] == "ON"
    options["cors"] = "" if options["cors"] == "off" else options["cors"]
    _check_options(parser, options)
    given = {name: value for name, value in options.items() if value is not None}
    given |= {f"us_{name.lower()}": environ.get(f"US_AUTH_{name}", "") for name in S4}
    given |= {name.lower(): environ.get(name, "") for name in ADMIN}
    return Config(**given, **_from_systemd(environ))


def _check_options(parser: Parser, options: Mapping[str, Any]) -> None:
    """SystemExit(2): they do not go together."""
    if options["port"] > 65535:
        parser.error(f"--port: {options['port']} is no port, 65535 is the last one")
    for name in ("max_connections", "max_image", "max_devices"):
        if options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 at least")
    if options["key"] and not options["cert"]:
        parser.error("--key goes with --cert")
    for name in ("admit", "mqtt", "backup"):
        if options[name] not in {"", "OPEN"} and not options["state"]:
            parser.error(f"--{name} needs --state")
    if not (options["public_url"] or "http://").startswith(("http://", "https://")):
        parser.error("--public-url begins with http:// or https://")
    if options["rate"] and (sys.platform != "linux" or options["host"].startswith("unix:")):
        parser.error("--rate needs Linux and TCP")


def _from_systemd(environ: Mapping[str, str]) -> dict[str, Any]:
    """What systemd says: sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5)."""
    pid = str(os.getpid())
    usec = environ.get("WATCHDOG_USEC") if environ.get("WATCHDOG_PID", pid) == pid else None
    journal = environ.get("JOURNAL_STREAM")
    return {
        "notify_socket": environ.get("NOTIFY_SOCKET", ""),
        "inherited": environ.get("LISTEN_FDS", "") if environ.get("LISTEN_PID") == pid else "",
        "watchdog": int(usec or 0) / 1e6,
        "journal": journal is not None and journal == f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}",
    }


def sign(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command: prints a signed URL. SystemExit(2): it cannot, as stderr has said."""
    text = "Prints a URL that opens one image, for a while and without a token."
    parser = Parser("ota-server sign", allow_abbrev=False, description=text)
    parser.add_argument("url", help="such as https://ota.example/lamp/latest.bin")
    default = environ.get("OTA_SIGN_KEY_FILE") or None
    option = functools.partial(parser.add_argument, help="(default: %(default)s)")
    option("--sign-key-file", metavar="FILE", default=default, help="the server's", type=_key)
    option("--seconds", metavar="N", default=SIGNED_SECONDS, type=_number)
    options = parser.parse_args(argv)
    if not (options.sign_key_file and options.url.startswith(("http://", "https://"))):
        parser.error("a URL with http:// or https://, and --sign-key-file FILE, are needed")
    expires = int(time.time()) + options.seconds
    sys.stdout.write(signed(options.sign_key_file, options.url, expires) + "\n")
    return 0


def by_fleet(name: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command of the fleet. SystemExit(2): ota_fleet/ is not beside this file."""
    look_beside()
    try:
        from ota_fleet import COMMANDS  # noqa: PLC0415 - one of the two doors to the fleet
    except ImportError:
        _fail(NO_FLEET.format(name))
    return COMMANDS[name](argv, environ)


def open_files() -> int:
    """How many files this process may open, once it has raised its own limit as far as it goes."""
    if sys.platform == "win32":
        return 400  # its select() takes 512 sockets
    import resource  # noqa: PLC0415 - Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    with suppress(ValueError, OSError):  # macOS allows less than its limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def tls_context(cert: str, key: str) -> ssl.SSLContext:
    """TLS 1.2 and newer. OSError, of which ssl.SSLError is one: the files do not do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(cert, key or None, password=lambda: "")  # never asks at the terminal
    return context


def notify(address: str, state: str) -> None:
    """Tells systemd: sd_notify(3)."""
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, suppress(OSError):
            notifier.sendto(state.encode(), re.sub("^@", "\0", address))


@functools.lru_cache(maxsize=1)
def still_alive(address: str, _period: float) -> None:
    """Tells systemd so, once in a period."""
    notify(address, "WATCHDOG=1")


def own_url(config: Config, address: Any) -> str:
    """What to type on another machine; asks the routing table, sends nothing."""
    if not isinstance(address, tuple):
        return "unix:" + printable(os.fsdecode(address))
    host = address[0] if config.inherited else config.host
    if host in {"", "::", "0.0.0.0"}:  # noqa: S104
        host = "127.0.0.1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
            host = probe.getsockname()[0]
    return f"http{'s' * bool(config.cert)}://{f'[{host}]' if ':' in host else host}:{address[1]}/"


def _start(config: Config, flush: Callable[[], None]) -> tuple[Server, DirectoryCatalog]:
    """A server that listens. SystemExit(2): it cannot, and stderr has said why."""

    def before_waiting() -> None:
        flush()
        if config.watchdog:  # more often than asked for, as the loop may wait as long
            still_alive(config.notify_socket, time.monotonic() // (config.watchdog / 4))

    tried = f"--cert {config.cert} --key {config.key or config.cert}"
    try:
        tls = tls_context(config.cert, config.key) if config.cert else None
        tried = f"--dir {config.dir} {_UNREADABLE}"
        any_file, max_open = bool(config.www_dir), config.max_downloads
        catalog = DirectoryCatalog(config.dir, any_file=any_file, max_open=max_open)
        given = {"token-file": config.token_file, "state": config.state}
        tried = " ".join(f"--{name} {value}" for name, value in given.items() if value)
        site = build_site(config, catalog)
        tried = f"--host {config.host or '(all)'} --port {config.port}"
        if config.inherited:
            tried = "the socket from systemd"
        return Server(site, tls=tls, before_waiting=before_waiting), catalog
    except ssl.SSLError as err:
        why = err.reason or "no private key"
        _fail(f"--cert {config.cert}: no certificate and key that fit, in PEM form: {why}")
    except OSError as err:
        _fail(f"{tried}: {err.strerror or err}")
    except ValueError as err:
        _fail(f"{err}" if f"{err}".startswith("--") else f"{tried}: {err}")  # it names its option
    except ImportError:
        _fail(NO_FLEET.format("--state"))


def _greeting(server: Server) -> str:
    """Where the server is, and what it has."""
    config = server.site.config
    newest = [f"{printable(name)} {v}" for name, v in server.site.catalog.newest().items()]
    found = ", ".join(newest[:8]) + (f" and {len(newest) - 8} more" if len(newest) > 8 else "")
    where = f"{own_url(config, server.server_address)} serves {printable(config.dir)}"
    return f"{where}: {found or 'no firmware yet'}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, or serves until SIGTERM or Ctrl-C; gives back the exit status."""
    argv, environ = sys.argv[1:] if argv is None else argv, os.environ
    if argv and argv[0] in {"check", "publish", "explain"}:
        return by_fleet(argv[0], argv[1:], environ)
    return sign(argv[1:], environ) if argv and argv[0] == "sign" else serve(argv, environ)


def serve(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until SIGTERM or Ctrl-C, and gives back the exit status."""
    server: Server | None = None

    def stop(*_: object) -> None:
        if server is None or server.draining:  # not yet started, or told twice
            raise SystemExit(0)
        notify(config.notify_socket, "STOPPING=1")
        server.drain()

    def reload(*_: object) -> None:
        try:
            if server is not None and config.cert:
                server.tls = tls_context(config.cert, config.key)
                log.info("the certificate %s was read again", config.cert)
        except OSError as err:
            log.error("the certificate %s stays as it was: %s", config.cert, err)  # noqa: TRY400

    signals = {"SIGINT": stop, "SIGTERM": stop, "SIGHUP": reload}
    for name in signals.keys() & vars(signal).keys():  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signals[name])
    config = read_config(argv, environ, open_files())
    if config.backup:
        return by_fleet("--backup", (config.state, config.backup), environ)
    lines = LogLines(sys.stderr, journal=config.journal)
    logging.basicConfig(level=config.log, handlers=[lines])
    logging.logProcesses = logging.logThreads = logging.logMultiprocessing = False  # not shown
    logging._srcfile = None  # where a line comes from is not shown
    server, catalog = _start(config, lines.flush)
    sys.stdout.write(_greeting(server))
    sys.stdout.flush()
    catalog.start()
    notify(config.notify_socket, "READY=1")
    try:
        server.serve_forever(config.watchdog / 4 or 1)
    finally:
        for close in (catalog.close, *server.site.closers, server.server_close):
            close()
        try:
            sys.stderr.flush()
        except (OSError, AttributeError):  # full or closed; else the interpreter ends with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return 0


if __name__ == "__main__":
    sys.modules.setdefault("ota_server", sys.modules["__main__"])  # for the fleet to import
    sys.exit(main())
