"""Emulated devices: what an ESP8266 and an ESP32 send, and what they make of the answer.

They are written from the devices' own C sources, which the docstrings name, and know nothing of
the server: raw bytes over a socket, the checks in the order of the source, the error numbers of
the source. A device holds its running image; a successful update() restarts into the new one. An
update that a real device would not survive raises, so that no test can overlook it. Unlike a real
device, which retries for up to a minute, they see at once that a connection has ended, and they
close it as the devices do: without a TLS close_notify.

Sources: ESP8266httpUpdate.cpp, ESP8266HTTPClient.cpp, Updater.cpp, Esp.cpp and eboot.c of
esp8266/Arduino; HTTPUpdate.cpp, HTTPClient.cpp and Updater.cpp of arduino-esp32 3.1.3, and for
Esp32Newest those of its master a5f17797. Whatever does not use these libraries as they are stands
in clients.py.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import operator
import re
import socket
import ssl
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

APP_OFFSET = 0x1000  # where the sketch begins in the flash of an ESP8266: Esp.cpp sketchSize()
LENGTH, CRC = 0x1010, 0x1014  # two u32 of a core with CRC: tools/elf2bin.py:34-35
FLASH_MODE = 2  # the byte that Updater.cpp _writeBuffer() sets to the device's own mode
FLASH_SIZES = {0: 2**19, 1: 2**18, 2: 2**20, 3: 2**21, 4: 2**22, 8: 2**23, 9: 2**24}
CHIP_IDS = {"esp32": 0, "esp32s2": 2, "esp32c3": 5, "esp32s3": 9, "esp32c2": 12, "esp32c6": 13}
CHIP_IDS |= {"esp32h2": 16, "esp32p4": 18, "esp32c61": 20, "esp32c5": 23}  # esp_app_format.h:20-33
MARKER = re.compile(rb"OTA-EXAMPLE (\S+) ([^\0]*)\0")  # what the test images carry

# last_error -> getLastErrorString(). HTTPClient.h, ESP8266httpUpdate.h:46-57, Updater.h.
ERRORS = {-1: "connection failed", -2: "send header failed", -5: "connection lost"}
ERRORS |= {-7: "no HTTP server", -9: "Transfer-Encoding not supported", -11: "read Timeout"}
ERRORS |= {-100: "Not enough space", -101: "Server did not report size"}
ERRORS |= {-102: "File not found (404)", -103: "Forbidden (403)", -104: "Wrong HTTP code"}
ERRORS |= {-105: "Faulty MD5", -106: "Verify bin header failed", -108: "Unauthorized (401)"}
ERRORS |= {-107: "New binary does not fit flash size", -109: "Wrong SHA256"}
ERRORS |= {6: "Stream Read Timeout"}
ERRORS |= {7: "MD5 Check Failed", 9: "Could Not Activate The Firmware", 10: "Wrong Magic Byte"}
ERRORS |= {15: "Update already running"}


class Failed(Exception):
    """An update ended with this error number; update() keeps it as last_error."""


class Bricked(Exception):
    """A device cannot start this image: the offset where it is wrong, and why."""


class Crashed(Exception):
    """A device dereferenced NULL because the body was missing, and restarted."""


# -- 1. The connection ----------------------------------------------------------------------------


@dataclass(slots=True)
class Link:
    """A connection as the network client of a device sees it: bytes that have come, and the end."""

    socket: socket.socket
    buffer: bytearray = field(default_factory=bytearray)  # received, not yet read
    ended: bool = False  # by the server, or by a broken connection

    def fill(self, timeout: float) -> bool:
        """True when more bytes came within the time; False also when there will be none."""
        self.socket.settimeout(timeout)
        try:
            data = b"" if self.ended else self.socket.recv(65536)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        self.buffer += data
        self.ended = not data
        return bool(data)

    def line(self, timeout: float) -> str:
        """The next line, trimmed. Raises Failed(-5) for the end, Failed(-11) after the timeout."""
        while b"\n" not in self.buffer:
            if not self.fill(timeout):
                raise Failed(-5 if self.ended else -11)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode("latin-1").strip()

    def peek(self, count: int, timeout: float) -> bytes:
        """That many bytes, fewer when no piece came within the timeout. They stay unread."""
        while len(self.buffer) < count and self.fill(timeout):
            pass
        return bytes(self.buffer[:count])

    def take(self, count: int, timeout: float) -> bytes:
        """As peek(), and they are read."""
        data = self.peek(count, timeout)
        del self.buffer[: len(data)]
        return data

    def head(self, timeout: float) -> tuple[int, dict[str, str]]:
        """Status (0: none) and header fields: handleHeaderResponse() in either HTTPClient.cpp.

        A bare LF ends a line, a line without a colon is nothing, any status line counts. Names in
        lower case; values trimmed, those of a repeated field joined by a comma.
        """
        status, fields = 0, dict[str, str]()
        while line := self.line(timeout):
            if line.startswith("HTTP/1."):
                status = _to_int(line[9:])
            elif line.find(":") > 0:
                name, value = line.lower().partition(":")[0], line.partition(":")[2].strip()
                fields[name] = f"{fields[name]},{value}" if fields.get(name) else value
        return status, fields


def dial(
    where: tuple[str, int], host: str, tls_ca: Path | None, names: Sequence[str], timeout: float
) -> socket.socket:
    """A connection; with `tls_ca` over TLS 1.2 to a host that its certificate names.

    `names` are the kinds of subjectAltName that count. Raises OSError for whatever prevents it.
    """
    plain = socket.create_connection(where, timeout)
    if not tls_ca:
        return plain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # Python's rules for names are not those of the devices
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(tls_ca)
    secure = context.wrap_socket(plain, server_hostname=host)
    if not name_matches(secure.getpeercert() or {}, host, names):
        secure.close()
        raise ssl.SSLCertVerificationError(host)
    return secure


def host_field(host: str, port: int) -> str:
    """The value of Host: the port is left out when it is one of the usual ones."""
    return host if port in (80, 443) else f"{host}:{port}"


def basic_credentials(user: str) -> str:
    """The value of Authorization for "user:password"; empty when there is no user."""
    return user and "Basic " + base64.b64encode(user.encode()).decode()


def name_matches(certificate: Mapping[str, Any], host: str, kinds: Sequence[str]) -> bool:
    """True when the certificate, as getpeercert() gives it, has a name of these kinds for the host.

    The common name counts when there are no other names; `*.` stands for the first label.
    """
    names = certificate.get("subjectAltName")
    if names is None:
        subject = (pair for part in certificate.get("subject", ()) for pair in part)
        names = [("DNS", name) for kind, name in subject if kind == "commonName"]
    accepted = (host.lower(), "*." + host.lower().partition(".")[2])
    return any(kind in kinds and name.lower() in accepted for kind, name in names)


def _to_int(text: str) -> int:
    """Arduino's String::toInt(): the number that the text begins with, or 0."""
    digits = re.match(r"\s*[+-]?\d+", text, re.ASCII)
    return int(digits[0]) if digits else 0


# -- 2. Images, as a device sees them -------------------------------------------------------------


def walk(image: bytes, start: int, header: int) -> tuple[int, int]:
    """Where the image that starts there ends, filled up to 16 bytes, and its XOR checksum.

    Raises Bricked when the segments do not lead to an end within these bytes.
    """
    count = image[start + 1] if image[start : start + 1] == b"\xe9" else 0
    if not 1 <= count <= 16:
        raise Bricked(start, "no image begins here")
    position, checksum = start + header, 0xEF
    for _ in range(count):
        size = int.from_bytes(image[position + 4 : position + 8], "little")
        checksum ^= _xor(image[position + 8 : position + 8 + size])
        position += 8 + size
    end = (position + 16) & ~15
    if end > len(image):
        raise Bricked(start, "the image that begins here is cut off")
    return end, checksum


def check_esp8266(flash: bytes) -> None:
    """Raises Bricked when an ESP8266 cannot start this flash.

    The boot ROM checks the loader at 0. Nobody checks the sketch before it runs: what is wrong
    with its XOR checksum, or with its CRC when it has one, is a crash at every start.
    """
    end, checksum = walk(flash, 0, 8)
    if end > APP_OFFSET or flash[end - 1] != checksum:
        raise Bricked(0, "the eboot loader is damaged")
    end, checksum = walk(flash, APP_OFFSET, 8)
    length, crc = struct.unpack_from("<II", flash, LENGTH)
    if length == end:  # a core with CRC; its checksum was taken before the two words were known
        checksum ^= _xor(flash[LENGTH : CRC + 4])
        blank = flash[:LENGTH] + bytes(8) + flash[CRC + 4 : end]
        if crc not in {_crc(with_flash_mode(blank, mode)) for mode in range(4)}:
            raise Bricked(CRC, "wrong CRC")
    if flash[end - 1] != checksum:
        raise Bricked(end - 1, "wrong checksum")


def check_esp32(image: bytes, chip: str) -> None:
    """Raises Bricked when this chip does not activate the image: esp_image_format.c."""
    end, checksum = walk(image, 0, 24)
    if int.from_bytes(image[12:14], "little") != CHIP_IDS[chip]:
        raise Bricked(12, "for another chip")
    if image[end - 1] != checksum:
        raise Bricked(end - 1, "wrong checksum")
    if image[23] and image[end : end + 32] != hashlib.sha256(image[:end]).digest():
        raise Bricked(end, "wrong SHA-256")


def eboot_copy(flash: bytes, received: bytes) -> bytes:
    """What begins the flash of an ESP8266 after a restart: eboot.c copy_raw().

    The last four bytes of a compressed file say how much comes out of it, whatever they are. Zero
    or a negative number leave the flash as it was. Raises Bricked when not as much comes out.
    """
    if received[:2] != b"\x1f\x8b":
        return received
    left = int.from_bytes(received[-4:], "little", signed=True)
    if left <= 0:
        return flash
    try:
        copied = zlib.decompressobj(wbits=31).decompress(received, left)  # a window of 32 KiB
    except zlib.error as error:
        raise Bricked(0, "eboot cannot decompress it") from error
    if len(copied) < left:
        raise Bricked(len(received) - 4, "less than this comes out")
    return copied


def with_flash_mode(image: bytes, mode: int) -> bytes:
    """The image with another flash mode, 0 to 3, in its header."""
    return image[:FLASH_MODE] + bytes([mode]) + image[FLASH_MODE + 1 :]


def _xor(data: bytes) -> int:
    return functools.reduce(operator.xor, data, 0)


def _crc(data: bytes) -> int:
    """The CRC of tools/elf2bin.py crc8266(): that of zlib, with the bits of all bytes turned."""
    mirrored = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    return int(f"{zlib.crc32(data.translate(mirrored)) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def version_of(image: bytes) -> str:
    """The version that a sketch has compiled in; empty when there is none."""
    marker = MARKER.search(image)
    return marker[2].decode() if marker else ""


# -- 3. The devices -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Device(ABC):
    """What both libraries share: HTTPUpdate.cpp began as a copy of ESP8266httpUpdate.cpp."""

    host: str  # as in the sketch's URL; what the certificate must name
    port: int
    path: str = "/update"  # with the query
    image: bytes  # what runs: the flash from 0, or the app partition
    address: str = ""  # where to connect; empty: the host
    mac: str
    chip_size: int = 2**22  # bytes of flash
    free_space: int  # bytes that a sketch may have
    fs_size: int  # bytes of the file system's partition
    before: bytes = b""  # the image that it would take back
    booted: int = 0  # times, since the last update
    mode: str = "sketch"  # or "spiffs", to update the file system
    tells_version: bool = True  # the sketch passes its version to update()
    claims: str = ""  # a version that it says whatever runs; empty: it tells the truth
    tells_digest: bool = True  # own code, which knows of none, does not
    boots: int = 0  # after which it takes an update back by itself; 0: it keeps it
    dies: bool = False  # the next image runs and never asks again
    dead: bool = False
    user: str = ""  # "user:password" for Basic
    tls_ca: Path | None = None  # PEM; with it, https
    timeout: float = 8.0  # seconds to connect, and between two pieces of the head
    stall: float = 10.0  # seconds between two pieces of the body; far more in the cores
    filesystem: bytes = b""  # what the last update of the file system wrote
    stuck: bool = False  # an update was left open: only reboot() helps
    last_error: int = 0  # a key of ERRORS; 0 after a success
    last_request: bytes = b""
    last_status: int = 0
    last_headers: dict[str, str] = field(default_factory=dict)  # lower-case names; joined by ","

    REQUEST: ClassVar[str]
    STATUSES: ClassVar[Mapping[int, int]]  # HTTP status -> error; any other is -104
    NO_UPDATES: ClassVar[Sequence[int]] = (304,)
    CODINGS: ClassVar[Sequence[str]]  # of Transfer-Encoding; any other is -9
    NAMES: ClassVar[Sequence[str]]  # the kinds of subjectAltName that count
    MD5S: ClassVar[slice]  # which x-MD5 of several count; they are joined

    @property
    def version(self) -> str:
        """The version of the running sketch, empty when it has none."""
        return version_of(self.image)

    @property
    def told_version(self) -> str:
        """The version that it sends; empty when it sends none."""
        return (self.claims or self.version) if self.tells_version else ""

    @property
    @abstractmethod
    def sketch_size(self) -> int:
        """Bytes of the running image, without what may lie behind it."""

    @property
    def sketch_md5(self) -> str:
        """The MD5 of that many bytes, 32 lower-case digits: Esp.cpp getSketchMD5()."""
        return _md5(self.image[: self.sketch_size])

    @property
    def told_md5(self) -> str:
        """The MD5 that it sends; empty when it sends none."""
        return self.sketch_md5 if self.tells_digest else ""

    @property
    def last_error_string(self) -> str:
        """What getLastErrorString() says, in a few words; empty after a success."""
        return ERRORS.get(self.last_error, "")

    def request(self, mode: str = "sketch") -> bytes:
        """The request, byte for byte; a field without a value is left out."""
        host = host_field(self.host, self.port)
        basic = basic_credentials(self.user)
        text = self.REQUEST.format(self, host=host, basic=basic, mode=mode)
        lines = [line for line in text.split("\n") if line and not line.endswith(": ")]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def update(self) -> str:
        """HTTP_UPDATE_OK, HTTP_UPDATE_NO_UPDATES or HTTP_UPDATE_FAILED: handleUpdate().

        Nothing, and nothing is sent, if the device is dead.
        """
        if self.dead:
            return ""
        self.last_error = 0
        try:
            with contextlib.closing(self._connect()) as connection:
                link = self._ask(connection, self.mode)
                if self.last_status in self.NO_UPDATES:
                    return "HTTP_UPDATE_NO_UPDATES"
                received = self._receive(link)
            if self.mode == "sketch":
                before = self.image
                self._restart_into(received)
                self.before, self.booted, self.dead = before, 0, self.dies
            else:
                self.filesystem = received
        except Failed as failure:
            self.last_error = failure.args[0]
            return "HTTP_UPDATE_FAILED"
        self.reboot()
        return "HTTP_UPDATE_OK"

    def reboot(self) -> None:
        """Starts the sketch again, which forgets an update left open; or the one before it.

        The latter as a boot loader does that is to take back what nobody has marked as good:
        bootloader_utility.c, CONFIG_BOOTLOADER_APP_ROLLBACK_ENABLE.
        """
        self.stuck = False
        self.booted += 1
        if self.before and self.booted == self.boots:
            self.image, self.before = self.before, b""

    def _connect(self) -> socket.socket:
        """The connection. Raises Failed(-1) for whatever prevents it, a certificate included."""
        self.last_request, self.last_status, self.last_headers = b"", 0, {}
        where = (self.address or self.host, self.port)
        try:
            return dial(where, self.host, self.tls_ca, self.NAMES, self.timeout)
        except OSError as error:
            raise Failed(-1) from error

    def _ask(self, connection: socket.socket, mode: str) -> Link:
        """Sends the request and notes the head of the response; the body is next in the link."""
        link = Link(connection)
        self.last_request = self.request(mode)
        try:
            connection.sendall(self.last_request)
        except OSError as error:
            raise Failed(-2) from error
        self.last_status, self.last_headers = link.head(self.timeout)
        coding = self.last_headers.get("transfer-encoding", "").lower()
        if coding and coding not in self.CODINGS:
            raise Failed(-9)
        if self.last_status == 0:
            raise Failed(-7)
        return link

    def _receive(self, link: Link) -> bytes:
        """The body, as far as handleUpdate() and runUpdate() check it."""
        if self.last_status != 200:
            raise Failed(self.STATUSES.get(self.last_status, -104))
        size = _to_int(self.last_headers.get("content-length", "").rpartition(",")[2])
        if size <= 0:
            raise Failed(-101)
        if size > (self.free_space if self.mode == "sketch" else self.fs_size):
            raise Failed(-100)
        self._check_begin(link)
        md5 = ",".join(self.last_headers.get("x-md5", "").lower().split(",")[self.MD5S])
        if md5 and len(md5) != 32:
            self.stuck = True  # returns without Update.end(): ESP8266httpUpdate.cpp:413-418
            raise Failed(-105)
        body = link.peek(size, self.stall)  # what comes behind it is never read
        if len(body) < size:
            raise Failed(6)
        if md5 and md5 != _md5(body):
            raise Failed(7)
        return body

    @abstractmethod
    def _check_begin(self, link: Link) -> None:
        """Looks at the first bytes, and at whether an update is already running."""

    @abstractmethod
    def _restart_into(self, received: bytes) -> None:
        """Makes a complete body the running image."""


@dataclass(slots=True, kw_only=True)
class Esp8266(Device):
    """An ESP8266 with ESP8266httpUpdate. update() raises Bricked when it does not start again."""

    mac: str = "5C:CF:7F:12:34:56"
    free_space: int = 1794048
    fs_size: int = 2072576
    flash_mode: int = 2  # 0 QIO, 1 QOUT, 2 DIO, 3 DOUT: what the board is wired for
    bricked: bool = False

    # ESP8266httpUpdate.cpp:166-203, ESP8266HTTPClient.cpp:817-874
    REQUEST = """\
GET {0.path} HTTP/1.0
Host: {host}
User-Agent: ESP8266-http-Update
Authorization: {basic}
Connection: close
x-ESP8266-Chip-ID: {0.chip_id}
x-ESP8266-STA-MAC: {0.mac}
x-ESP8266-AP-MAC: {0.ap_mac}
x-ESP8266-free-space: {0.free_space}
x-ESP8266-sketch-size: {0.sketch_size}
x-ESP8266-sketch-md5: {0.told_md5}
x-ESP8266-chip-size: {0.chip_size}
x-ESP8266-sdk-version: 2.2.2-dev(38a443e)
x-ESP8266-mode: {mode}
x-ESP8266-version: {0.told_version}
Content-Length: 0
"""
    STATUSES = MappingProxyType({401: -108, 403: -103, 404: -102})  # .cpp:244-377
    CODINGS = ("chunked",)
    NAMES = ("DNS",)  # even for an IP address: bearssl x509_minimal.t0
    MD5S = slice(None)  # ESP8266HTTPClient.cpp:937-947

    def __post_init__(self) -> None:
        """Flashes the first image, as over the serial line: with the board's flash mode."""
        self.image = with_flash_mode(self.image, self.flash_mode)

    @property
    def chip_id(self) -> int:
        """The last three bytes of the MAC."""
        return int(self.mac.replace(":", "")[6:], 16)

    @property
    def ap_mac(self) -> str:
        """The MAC of the access point: the local bit is set."""
        return f"{int(self.mac[:2], 16) | 2:02X}{self.mac[2:]}"

    @property
    def sketch_size(self) -> int:
        """Bytes from 0 to the end of the sketch: Esp.cpp:603-633."""
        return walk(self.image, APP_OFFSET, 8)[0]

    def get_available_version(self) -> str:
        """The version the server offers, empty on failure: getAvailableVersion(), .cpp:449-545."""
        self.last_error = 0
        try:
            with contextlib.closing(self._connect()) as connection:
                self._ask(connection, "version")
        except Failed as failure:
            self.last_error = failure.args[0]
            return ""
        version = self.last_headers.get("x-version", "") if self.last_status == 200 else ""
        self.last_error = 0 if version else -104
        return version

    def _check_begin(self, link: Link) -> None:
        """ESP8266httpUpdate.cpp:297-325, Updater.cpp begin()."""
        first = link.peek(4, self.timeout) if self.mode == "sketch" else b""
        if self.mode == "sketch" and (len(first) < 4 or first[0] not in (0xE9, 0x1F)):
            raise Failed(-106)
        if first[:1] == b"\xe9" and FLASH_SIZES.get(first[3] >> 4, 0) > self.chip_size:
            raise Failed(-107)
        if self.stuck:
            raise Failed(15)

    def _restart_into(self, received: bytes) -> None:
        if received[0] == 0x1F and received[1] != 0x8B:
            raise Failed(10)  # Updater.cpp _verifyEnd()
        if received[0] == 0xE9:
            received = with_flash_mode(received, self.flash_mode)  # Updater.cpp:378-422
        self.bricked = True  # until the opposite is known
        self.image = eboot_copy(self.image, received)
        check_esp8266(self.image)
        # A compressed image keeps its own flash mode. Quad modes need pins that a board wired for
        # dual modes has not; the higher the number, the more boards start with it.
        if self.image[FLASH_MODE] < self.flash_mode:
            raise Bricked(FLASH_MODE, "a flash mode this board is not wired for")
        self.bricked = False


@dataclass(slots=True, kw_only=True)
class Esp32(Device):
    """An ESP32 with HTTPUpdate of core 3.1.3. update() raises Crashed when there is no body."""

    chip: str = "esp32"  # a key of CHIP_IDS
    mac: str = "24:6F:28:AA:BB:CC"
    free_space: int = 1310720
    fs_size: int = 1441792

    # HTTPUpdate.cpp:166-215, HTTPClient.cpp:1127-1170
    REQUEST = """\
GET {0.path} HTTP/1.0
Host: {host}
User-Agent: ESP32-http-Update
Connection: close
Authorization: {basic}
Cache-Control: no-cache
x-ESP32-BASE-MAC: {0.mac}
x-ESP32-STA-MAC: {0.mac}
x-ESP32-AP-MAC: {0.ap_mac}
x-ESP32-free-space: {0.free_space}
x-ESP32-sketch-size: {0.sketch_size}
x-ESP32-sketch-md5: {0.told_md5}
x-ESP32-sketch-sha256: {0.told_sha256}
x-ESP32-chip-size: {0.chip_size}
x-ESP32-sdk-version: v5.3.2-282-gcfea4f7c98-dirty
x-ESP32-mode: {mode}
x-ESP32-version: {0.told_version}
"""
    STATUSES = MappingProxyType({403: -103, 404: -102})  # HTTPUpdate.cpp:250-376
    CODINGS = ("chunked", "identity")  # HTTPClient.cpp:1264-1270
    NAMES = ("DNS", "IP Address")  # mbedtls x509_crt_verify_name()
    MD5S = slice(-1, None)

    @property
    def ap_mac(self) -> str:
        """The MAC of the access point: the next one."""
        return f"{self.mac[:-2]}{int(self.mac[-2:], 16) + 1 & 0xFF:02X}"

    @property
    def sketch_size(self) -> int:
        """Bytes of the image with its digest: esp_image_metadata_t.image_len."""
        return walk(self.image, 0, 24)[0] + (32 if self.image[23] else 0)

    @property
    def sketch_sha256(self) -> str:
        """The digest at the image's end, else the image's, UPPER case: bootloader_common.c:144."""
        image = self.image[: self.sketch_size]
        return (image[-32:] if image[23] else hashlib.sha256(image).digest()).hex().upper()

    @property
    def told_sha256(self) -> str:
        """The digest that it sends; empty when it sends none."""
        return self.sketch_sha256 if self.tells_digest else ""

    def _check_begin(self, link: Link) -> None:
        """HTTPUpdate.cpp:292,317: delay(100), then ONE look at what is there."""
        first = link.peek(2, 0.1)
        if link.ended and len(first) < 2:
            raise Crashed(self.last_headers)
        if self.mode == "sketch" and first[:1] != b"\xe9":
            raise Failed(-106)
        if self.stuck:
            raise Failed(0)  # Update.begin() says "already running" and sets no number

    def _restart_into(self, received: bytes) -> None:
        try:
            check_esp32(received, self.chip)
        except Bricked as flaw:
            raise Failed(9) from flaw  # Updater.cpp _verifyEnd()
        self.image = received


@dataclass(slots=True, kw_only=True)
class Esp32Newest(Esp32):
    """An ESP32 with HTTPUpdate of master a5f17797: x-SHA256, more file systems, no stuck state."""

    partitions: Sequence[str] = ("littlefs",)  # the file systems in its partition table
    sha256_path: str = ""  # setSHA256sumUrl(), on the same server; empty: not set
    sidecar: str = ""  # what came from there

    NO_UPDATES = (204, 304)
    FILE_SYSTEMS: ClassVar[Sequence[str]] = ("spiffs", "fatfs", "littlefs")

    def _connect(self) -> socket.socket:
        """The file with the digest is fetched first, on a connection of its own."""
        self.sidecar = self._fetch_digest() if self.sha256_path else ""
        return super(Esp32Newest, self)._connect()

    def _receive(self, link: Link) -> bytes:
        """What is wrong with the SHA-256 fails; a field of the answer overrides the file."""
        if self.last_status == 200 and self.mode != "sketch" and not self._partition():
            raise Failed(-108)  # HTTP_UE_NO_PARTITION
        try:
            body = super(Esp32Newest, self)._receive(link)
        finally:
            self.stuck = False  # Update.abort() on every way out
        expected = self.last_headers.get("x-sha256", "").rpartition(",")[2] or self.sidecar
        if not expected and not self.sha256_path:
            return body
        if expected.lower() != hashlib.sha256(body).hexdigest():
            raise Failed(-109)
        return body

    def _partition(self) -> str:
        """The one that the mode writes, empty when there is none; "flashfs" takes any."""
        wanted = self.FILE_SYSTEMS if self.mode == "flashfs" else (self.mode,)
        return next((label for label in wanted if label in self.partitions), "")

    def _fetch_digest(self) -> str:
        """The first token of 64 hex digits in 512 bytes, or nothing: HTTPUpdateChecksum.cpp."""
        lines = [
            f"GET {self.sha256_path} HTTP/1.0",
            f"Host: {host_field(self.host, self.port)}",
            "User-Agent: ESP32HTTPClient",
            "Connection: close",
        ]
        with contextlib.closing(super(Esp32Newest, self)._connect()) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            link = Link(connection)
            status, _ = link.head(self.timeout)
            text = link.take(512, self.timeout).decode("latin-1") if status == 200 else ""
        token = re.search(r"(?<![0-9A-Fa-f])[0-9A-Fa-f]{64}(?![0-9A-Fa-f])", text)
        return token[0] if token else ""


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
