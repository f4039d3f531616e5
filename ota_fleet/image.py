r"""What is inside a .bin: kind, chip, project, version, digests. Reads one file, does nothing else.

    file -> _Look: one pass, digests and markers -> _recognised: a kind, or why it is of no use
         -> inspect(): is it whole -> header, descriptor, manifest, markers -> Description

Whether an image is whole is the core's to say; a sentence helps who picked the wrong file.
Where project and version come from, the first that knows wins:

1. `update?dev=NAME&ver=v1.2.3\0` in the bytes: what the sketch itself will ask for (S3, server.py
   upload()); or `update?dev=NAME&ver=` and, elsewhere, one single `v1.2.3` that is no SDK's;
2. the descriptor of ESP-IDF and ESP8266_RTOS_SDK; manifest.json of Mongoose OS;
3. the name of the file, which is told apart: a name can be wrong, and then differs.

Sources: esp_app_format.h, esp_app_desc.h, esp_bootloader_desc.h (ESP-IDF); esp_app_format.h (RTOS
SDK); elf2bin.py, signing.py (ESP8266 core); bin_signing.py (arduino-esp32); esptool bin_image.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import struct
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from itertools import chain

from ota_fleet.rows import parsed
from ota_server import (
    CHUNK,
    ESP32_CHIPS,
    ESP8266_FLASH,
    UNKNOWN_CHIP,
    Facts,
    Identity,
    Version,
    identity_of,
    inspect,
    read_name,
    unpacked,
)

HEAD = 8 * 1024  # bytes of the contents that tell the kind; FAT shows itself last, at 4606
TAIL = 4 * 1024  # bytes at their end: the sector of a Secure Boot v2 signature
LONGEST = 256  # bytes of a marker at most
MAX_MARKS = 8  # different ones; two that differ say nothing
MODES = ("qio", "qout", "dio", "dout")  # byte 2 of a header
DESCRIPTOR = struct.Struct("<II8x32s32s16s16s32s32s")  # esp_app_desc_t: magic 0xABCD5432...
RSA = frozenset((128, 256, 384, 512))  # bytes of a signature, as signing.py makes it
PARTITIONS = range(0x6000, 0x11000, 0x1000)  # where a table can be; at 0x8000 in nearly all
BOOT_LOADERS = (0, 0x1000, 0x2000)  # in flash, by chip: where a merged file may begin

_MARK = re.compile(
    rb"update\?dev=([A-Za-z0-9._-]{1,64}+)(?:(&ver=)([A-Za-z0-9.+-]{0,128}+))?([\0&])"
)
_LOOSE = b"&ver=\0"
_ALONE = re.compile(rb"[vV](?<=[^ -~].)[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}(?=\0)")  # a C string
_ENDING = re.compile(r"(?:\.(?:littlefs|spiffs|fatfs))?\.(?:bin|bin\.gz|zip)\Z", re.IGNORECASE)
_LIBRARY = re.compile(r"arduino-lib-builder|esp-idf: ")  # project or version: not of the sketch
_BUILD = "not the application: upload the .bin beside it, such as firmware.bin"
_KINDS = tuple(  # the first that fits the head; a sentence: why it is never offered
    (kind, re.compile(pattern, re.DOTALL), sentence)
    for kind, pattern, sentence in (
        ("zip", rb"PK\x03\x04", ""),
        ("littlefs", rb".{8}littlefs", ""),
        ("fatfs", rb"(?:.{4096})?.{11}\0[\x02\x04\x08\x10].{497}\x55\xaa", ""),
        ("bootloader", rb"\xe9.{31}\x50.{7}v?[0-9]+\.[0-9]", f"is a boot loader, {_BUILD}"),
        ("sketch", rb"\xe9", ""),
        ("empty", rb"\Z", "is empty"),
        ("partitions", rb"\xaa\x50[\0\x01].{29}(?:\xaa\x50|\xeb\xeb|\xff\xff|\Z)",
         f"is a partition table, {_BUILD}"),
        ("otadata", rb"\x01\0\0\0\xff{20}", f"is boot_app0.bin, {_BUILD}"),
        ("nonos", rb"\xea\x04.{4}\x10\x40", "is for another boot loader: of the ESP8266 NONOS SDK"),
        ("mcuboot", rb"\x3d\xb8\xf3\x96", "is for another boot loader: MCUboot, as Zephyr uses it"),
        ("elf", rb"\x7fELF", "is an ELF file: upload the .bin that is made of it"),
        ("uf2", rb"UF2\n", "is a UF2 file for a USB drive: upload the .bin that is made with it"),
        ("hex", rb":[0-9A-Fa-f]{10}", "is Intel HEX: upload the .bin that is made with it"),
        ("html", rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!|\?xml|html|head|body))",
         "is a web page: a download failed, or led to a page about the file"),
        ("archive", rb".{257}ustar|7z\xbc|Rar!|\xfd7zXZ|BZh[1-9]", "is an archive: unpack it"),
        ("text", rb"[\t\n\r -~]{16}|[\t\n\r -~]+\Z", "is text, not an image"),
    )
)  # fmt: skip
_UNKNOWN = "is no whole image or file system for an ESP: its first bytes are"
_FACTORY = (
    "is a merged factory image, to be flashed by cable: upload its application alone, which is "
    "the {size} bytes at 0x{at:x} (partition {label}), and a file of its own in the build"
)


@dataclass(frozen=True, slots=True)
class Description:
    """What a file is and says of itself. Texts are the file's own: printable, not trusted."""

    size: int  # bytes, as it is: packed if it is packed
    md5: str  # of the file; lower-case hex, as all digests
    sha256: str
    kind: str = "unknown"  # sketch, littlefs, spiffs, fatfs, zip; else factory, bootloader, elf...
    whole: str = ""  # why it cannot be offered, completes "name.bin ..."; "": it can
    chip: str = UNKNOWN_CHIP  # esp8266, esp32, esp32c3...; "": any
    packed: bool = False  # by gzip; all but size, md5 and sha256 is then of what it holds
    project: str = ""  # "": it does not say
    version: Version | None = None
    version_text: str = ""  # as the file writes it, even if it is no version, such as "1"
    secure_version: int = 0  # what ESP-IDF's anti-rollback compares
    idf: str = ""  # version of the SDK it was built with
    built: str = ""  # date and time as the compiler writes them: "Jan  1 2026 12:00:00"
    elf_sha256: str = ""
    flash_size: int = 0  # bytes, as the header says; 0: unknown
    flash_mode: str = ""  # qio, qout, dio, dout
    min_revision: int = 0  # of the chip: major * 100 + minor
    max_revision: int = 0  # 0: not said
    signed: str = ""  # esp8266, arduino, secure-boot-v1, secure-boot-v2; nobody checked it here
    running: frozenset[str] = frozenset()  # Facts.running: what a device that runs it may report
    named_project: str = ""  # what the name of the file says
    named_version: Version | None = None


def describe(file: FileIO, name: str = "") -> Description:
    """What `file` is, read from its start; `name` is what somebody called it, with or without path.

    One piece of it is in memory at a time. OSError: it cannot be read; all else is in `whole`.
    """
    look = _Look(file)
    about = Description(file.seek(0, 2), look.md5.hexdigest(), look.sha256.hexdigest())
    kind, flaw = _recognised(look)
    facts = Facts(UNKNOWN_CHIP)
    if not flaw:
        kind, flaw, facts = _inspected(file, kind, look)
    head = look.head
    if part := _application(file) if flaw and not look.packed else None:
        kind, (head, flaw) = "factory", part
    about = replace(about, kind=kind, whole=flaw, packed=look.packed, running=facts.running)
    about = replace(about, chip=facts.chip, signed=_signature(facts, look))
    if kind in {"sketch", "factory", "bootloader"}:
        about = _with_marks(_with_header(about, head), look, file)
    elif kind == "zip" and not flaw:
        about = _with_manifest(about, file)
    project, version = _named(name)
    about = replace(about, named_project=project, named_version=version)
    return replace(about, version=parsed(about.version_text))


def described(path: str, name: str) -> Description:
    """The same of what lies at `path`, which is read again only when it has changed."""
    return _described(path, name, identity_of(os.stat(path)))


@functools.lru_cache(maxsize=256)  # a person looks at the same few again and again
def _described(path: str, name: str, _identity: Identity) -> Description:
    with FileIO(path) as file:
        return describe(file, name)


def _named(name: str) -> tuple[str, Version | None]:
    """Project and version in a file name, by the rules of the firmware folder; or nothing."""
    stem = _ENDING.sub("", name[-255:].replace("\\", "/").rpartition("/")[2])
    try:
        return read_name(stem)
    except ValueError:
        return "", None


# -- 1. One pass over the bytes --------------------------------------------------------------------


def _chunks(file: FileIO, *digests: hashlib._Hash) -> Iterator[bytes]:
    """The whole file in pieces, taking digests."""
    file.seek(0)
    while chunk := file.read(CHUNK):
        for digest in digests:
            digest.update(chunk)
        yield chunk


def _contents(chunks: Iterator[bytes]) -> tuple[bool, Iterable[bytes]]:
    """Whether a file is packed, and what it holds. Reading that raises ValueError: see unpacked."""
    first = next(chunks, b"")
    every = chain((first,), chunks)
    packed = first[:1] == b"\x1f"
    return packed, unpacked(every) if packed else every


def _windows(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Overlapping windows; what begins before the number is in no other one, and is all in it."""
    window = b""
    for chunk in chunks:
        window += chunk
        begun = max(len(window) - LONGEST, 0)
        yield window, begun
        window = window[begun:]
    yield window, len(window)


class _Look:
    """What one pass over a file shows: digests, and both ends and markers of what it holds."""

    def __init__(self, file: FileIO) -> None:
        self.head = self.tail = b""
        self.length = 0  # bytes of the contents
        self.marks: set[tuple[str, str]] = set()  # NAME and version; "": that stands elsewhere
        self.names: set[str] = set()  # NAME without &ver=
        self.loose = False  # &ver= stands alone
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.sha256 = hashlib.sha256()
        self.inside = hashlib.md5(usedforsecurity=False)  # of the contents
        chunks = _chunks(file, self.md5, self.sha256)
        self.packed, contents = _contents(chunks)
        with suppress(ValueError):  # damaged: inspect() says so
            for window, begun in _windows(self._noted(contents)):
                self._mark(window, begun)
        deque(chunks, maxlen=0)  # what is behind the damage belongs to the digests

    def _noted(self, contents: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in contents:
            if len(self.head) < HEAD:
                self.head = (self.head + chunk)[:HEAD]
            self.tail = (self.tail + chunk)[-TAIL:]
            self.length += len(chunk)
            self.inside.update(chunk)
            yield chunk

    def _mark(self, window: bytes, begun: int) -> None:
        self.loose = self.loose or _LOOSE in window
        for match in _MARK.finditer(window):
            if match.start() >= begun or len(self.marks) + len(self.names) >= MAX_MARKS:
                break
            name, text = match[1].decode(), (match[3] or b"").decode()
            if match[2] or match[4] == b"&":
                self.marks.add((name, text))
            else:
                self.names.add(name)


# -- 2. Kinds --------------------------------------------------------------------------------------


def _recognised(look: _Look) -> tuple[str, str]:
    """The kind that the contents seem to be, and why a file of that kind is never offered."""
    if look.packed and not look.head:
        return "sketch", ""  # damaged, as inspect() will say
    for kind, pattern, sentence in _KINDS:
        if pattern.match(look.head):
            return kind, sentence
    if look.length % 4096 == 0:  # else one .pyc in 500 has what inspect() takes for its magic
        return "spiffs", ""  # which begins with anything
    return _unknown(look)


def _unknown(look: _Look) -> tuple[str, str]:
    """The same of what is nothing that is known here."""
    return "unknown", f"{_UNKNOWN} {look.head[:8].hex(' ')}"


def _inspected(file: FileIO, kind: str, look: _Look) -> tuple[str, str, Facts]:
    """The kind, why it is not whole, and what the core knows of it."""
    file.seek(0)
    try:
        return kind, "", inspect(file, kind)
    except ValueError as err:
        verdict = (kind, str(err)) if kind != "spiffs" else _unknown(look)
        return *verdict, Facts(UNKNOWN_CHIP)


def _application(file: FileIO) -> tuple[bytes, str] | None:
    """Of a merged image, the head of the first application in its partition table, and a sentence.

    Sources: esp_flash_partitions.h esp_partition_info_t, magic 0x50AA; esptool merge-bin.
    """
    for place in PARTITIONS:
        file.seek(place)
        table = file.read(0xC00)
        for row in range(0, len(table) - 31, 32):
            magic, kind, _, offset, _, label = struct.unpack_from("<HBBII16s", table, row)
            if magic != 0x50AA:
                break
            if kind == 0 and (part := _part(file, offset, _text(label))):
                return part
    return None


def _part(file: FileIO, offset: int, label: str) -> tuple[bytes, str] | None:
    """The same of an offset in flash, wherever in flash the file begins."""
    for at in (offset - start for start in BOOT_LOADERS if offset >= start):
        file.seek(at)
        head = file.read(HEAD)
        if head[:1] == b"\xe9":
            size = _end(file, at, head) - at
            return head, _FACTORY.format(size=size, at=at, label=label or "without a name")
    return None


def _end(file: FileIO, at: int, head: bytes) -> int:
    """Where the image at `at` ends: segments, a padding with the checksum, the SHA-256."""
    place = 8 if _is_small(head) else 24
    for _ in range(head[1]):
        file.seek(at + place + 4)
        place += 8 + int.from_bytes(file.read(4), "little")
    return at + place // 16 * 16 + 16 + 32 * (head[23:24] == b"\1" and not _is_small(head))


# -- 3. What an image says of itself ---------------------------------------------------------------


def _is_small(head: bytes) -> bool:
    """Whether it is for an ESP8266: a load address in its RAM where others have pin settings."""
    return head[11:12] in {b"\x3f", b"\x40"}


def _text(field: bytes) -> str:
    """The text in a field that NULs fill up; "" if it is none."""
    text = field.partition(b"\0")[0].decode("utf-8", "replace")
    return text if text.isprintable() and "\ufffd" not in text else ""


def _with_header(about: Description, head: bytes) -> Description:
    """The description with what the header says. Sources: esp_app_format.h:83-120, elf2bin.py."""
    if len(head) < 24:
        return about
    about = replace(about, flash_mode=MODES[head[2]] if head[2] < len(MODES) else "")
    code = head[3] >> 4
    if _is_small(head):
        about = replace(about, chip="esp8266", flash_size=ESP8266_FLASH.get(code, 0) << 10)
        return _with_descriptor(about, head, 16)
    number, old, least, most = struct.unpack_from("<HBHH", head, 12)
    chip = ESP32_CHIPS.get(number, f"esp32-id-{number}")
    about = replace(about, chip=chip, flash_size=1 << 20 + code if code < 8 else 0)
    about = replace(about, min_revision=least or 100 * old, max_revision=most)
    return _with_descriptor(about, head, 32)


def _with_descriptor(about: Description, head: bytes, at: int) -> Description:
    """The description with what the application descriptor says, which may be missing.

    That of Arduino-ESP32 is compiled into its libraries, and the same in every sketch: it names no
    project, no version and no date of this image.
    """
    if len(head) < at + DESCRIPTOR.size:
        return about
    magic, secure, *fields, digest = DESCRIPTOR.unpack_from(head, at)
    if magic != 0xABCD5432:
        return about
    version, project, time, date, idf = map(_text, fields)
    about = replace(about, secure_version=secure, idf=idf)
    about = replace(about, elf_sha256=digest.hex() if any(digest) else "")
    if _LIBRARY.match(project) or _LIBRARY.match(version):
        return about
    built = f"{date} {time}".strip()
    return replace(about, project=project, version_text=version, built=built)


def _with_manifest(about: Description, file: FileIO) -> Description:
    """The description with what manifest.json says, which inspect() has read already."""
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read(archive.infolist()[0]))
    texts = (manifest.get(field, "") for field in ("name", "version", "build_timestamp"))
    project, version, built = (_text(each.encode()) if type(each) is str else "" for each in texts)
    return replace(about, project=project, version_text=version, built=built)


def _with_marks(about: Description, look: _Look, file: FileIO) -> Description:
    """The description with S3's markers, which beat the descriptor; two that differ say nothing."""
    marks = look.marks | {(name, "") for name in look.names if look.loose}
    names = {name for name, _ in marks}
    texts = {text for _, text in marks if parsed(text)}
    if len(names) != 1:
        return about
    about = replace(about, project=names.pop())
    if len(texts) == 1:
        return replace(about, version_text=texts.pop())
    if texts or parsed(about.version_text):
        return about
    return replace(about, version_text=_lone_version(about, file) or about.version_text)


def _lone_version(about: Description, file: FileIO) -> str:
    """The one v1.2.3 that is a C string of its own and not that of the SDK; "": none, or several.

    Without a descriptor the SDK of an ESP32 is not known, and any version may be its own.
    """
    if about.chip != "esp8266" and not about.idf:
        return ""
    found: set[str] = set()
    with suppress(ValueError):  # damaged: inspect() says so
        for window, _ in _windows(_contents(_chunks(file))[1]):
            found.update(match[0].decode().lower() for match in _ALONE.finditer(window))
            if len(found) > 2:  # one can be the SDK's
                return ""
    sdk = re.match(r"v?(\d+\.\d+\.\d+)", about.idf)
    found -= {f"v{sdk[1]}"} if sdk else set()
    return found.pop() if len(found) == 1 else ""


def _signature(facts: Facts, look: _Look) -> str:
    """What kind of signature stands behind a whole image; its digests do not count one."""
    if not facts.running or look.inside.hexdigest() in facts.running:
        return ""
    if facts.chip == "esp8266":
        return "esp8266" if int.from_bytes(look.tail[-4:], "little") in RSA else ""
    if look.length % 4096 == 0 and look.tail[:1] == b"\xe7":
        return "secure-boot-v2"
    return "secure-boot-v1" if look.length % 16 == 4 else "arduino"
