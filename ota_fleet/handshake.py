"""What a TLS server shows before anything is encrypted: pure bytes, no sockets.

client_hello() writes what a device with TLS 1.2 says first; read_flight() reads what comes back:
version, max_fragment_length, certificates, record sizes. Python's ssl can neither ask for
max_fragment_length nor show a chain that it does not trust; in TLS 1.2 both are in the clear.
read_certificate() reads as much of a certificate as a device judges.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

FRAGMENT = 1024  # bytes of a record that the hello asks for: README's setBufferSizes(1024, 512)
_FRAGMENT_CODE = b"\x02"  # 1024 in RFC 6066 4
_ALERT, _HANDSHAKE = 21, 22  # content types, RFC 5246 6.2.1
_SERVER_HELLO, _CERTIFICATE, _CERTIFICATE_REQUEST, _DONE = 2, 11, 13, 14  # RFC 5246 7.4
# ECDHE with AES-GCM, ChaCha20, AES-CBC, then RSA: what BearSSL and mbedTLS have in common, and SCSV
_SUITES = "c02bc02cc02fc030cca9cca8c023c027c009c013c00ac014009c009d003c002f00ff"
_GROUPS = "001700180019001d"  # P-256, P-384, P-521, x25519
# ECDSA and RSA with SHA-2 and SHA-1; Ed25519 and Ed448 last, only so that such a key is seen
_SIGNATURES = "04030503060304010501060102030201" + "08070808"
_RSA = "2a864886f70d010101"  # OIDs in hex: RFC 8017 A.1, RFC 5480 2.1.1.1
_CURVES = {"2a8648ce3d030107": "P-256", "2b81040022": "P-384", "2b81040023": "P-521"}
_EDWARDS = {"2b6570": "Ed25519", "2b6571": "Ed448"}  # RFC 8410 3
_COMMON_NAME, _ALTERNATIVE_NAMES = "550403", "551d11"  # RFC 5280 A.1


@dataclass(frozen=True, slots=True)
class Flight:
    """What a server answered to the hello; the defaults are what silence looks like."""

    tls: bool = False  # the first bytes are a TLS record
    version: int = 0  # 0x0303 is TLS 1.2; 0: no ServerHello
    fragment: bool = False  # it keeps to max_fragment_length
    certificates: tuple[bytes, ...] = ()  # DER, as sent: the server's own first
    wants_certificate: bool = False  # of the client
    alert: int = -1  # RFC 5246 7.2
    ended: bool = False  # nothing more will come before the client speaks
    start: bytes = b""  # the first bytes, whatever they are


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a device judges in a certificate."""

    subject: str  # its common name, else the last part of its name
    issuer: str
    key: str  # "RSA 2048", "P-256", "Ed25519"; an OID where it is none of those known
    begins: float  # UTC seconds
    ends: float  # UTC seconds
    names: tuple[tuple[str, str], ...]  # kind ("DNS", "IP", "CN"), name; CN only if no other exists


def client_hello(host: str, random: bytes) -> bytes:
    """The first record of a TLS 1.2 client that asks for small records; `random` has 32 bytes."""
    name = host.encode("ascii")
    extensions = (
        _extension(0, _sized(b"\0" + _sized(name, 2), 2)),
        _extension(1, _FRAGMENT_CODE),
        _extension(10, _sized(bytes.fromhex(_GROUPS), 2)),
        _extension(11, b"\1\0"),
        _extension(13, _sized(bytes.fromhex(_SIGNATURES), 2)),
    )
    suites = _sized(bytes.fromhex(_SUITES), 2)
    body = b"\3\3" + random + b"\0" + suites + b"\1\0" + _sized(b"".join(extensions), 2)
    return b"\x16\3\1" + _sized(b"\1" + _sized(body, 3), 2)


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Content type and content of each whole TLS record."""
    while len(data) >= 5 and len(data) >= 5 + (size := int.from_bytes(data[3:5], "big")):
        yield data[0], data[5 : 5 + size]
        data = data[5 + size :]


def read_flight(data: bytes) -> Flight:
    """What is known of the server after these bytes, which may be incomplete."""
    if data[:2] not in {b"\x15\3", b"\x16\3"}:
        return Flight(start=data[:256], ended=len(data) > 1)
    plain = list(records(data))
    alert = next((content[1] for kind, content in plain if kind == _ALERT and content[1:]), -1)
    said = dict(_messages(b"".join(content for kind, content in plain if kind == _HANDSHAKE)))
    version, fragment = _read_hello(said.get(_SERVER_HELLO, b""))
    return Flight(
        tls=True,
        version=version,
        fragment=fragment and all(len(content) <= FRAGMENT for _, content in plain),
        certificates=tuple(_chain(said.get(_CERTIFICATE, b"")[3:])),
        wants_certificate=_CERTIFICATE_REQUEST in said,
        alert=alert,
        ended=alert >= 0 or _DONE in said,
        start=data[:256],
    )


def read_certificate(der: bytes) -> Certificate:
    """A certificate, RFC 5280 4.1. Raises ValueError: it cannot be read."""
    (_, outer), *_ = _elements(der)
    (_, signed), *_ = _elements(outer)
    parts = [part for part in _elements(signed) if part[0] != 0xA0]  # without [0] version
    (_, issuer), (_, validity), (_, subject), (_, key) = _exactly(parts[2:6], 4)
    begins, ends = map(_time, _exactly(list(_elements(validity)), 2))
    extensions = next((content for tag, content in parts if tag == 0xA3), b"")
    names = tuple(_alternative_names(extensions)) or (("CN", _name(subject)),)
    return Certificate(_name(subject), _name(issuer), _key(key), begins, ends, names)


def _sized(data: bytes, width: int) -> bytes:
    """The data behind its length in `width` bytes."""
    return len(data).to_bytes(width, "big") + data


def _extension(number: int, data: bytes) -> bytes:
    """RFC 5246 7.4.1.4."""
    return number.to_bytes(2, "big") + _sized(data, 2)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each whole handshake message; they need not end where records do."""
    while len(data) >= 4 and len(data) >= 4 + (size := int.from_bytes(data[1:4], "big")):
        yield data[0], data[4 : 4 + size]
        data = data[4 + size :]


def _chain(data: bytes) -> Iterator[bytes]:
    """The certificates of a Certificate message."""
    while len(data) >= 3:
        size = int.from_bytes(data[:3], "big")
        yield data[3 : 3 + size]
        data = data[3 + size :]


def _read_hello(body: bytes) -> tuple[int, bool]:
    """The version of a ServerHello, and whether it takes over max_fragment_length."""
    behind = body[34 + 1 + (body[34] if len(body) > 34 else 0) + 3 + 2 :]
    fragment = False
    while len(behind) >= 4:
        number, size = int.from_bytes(behind[:2], "big"), int.from_bytes(behind[2:4], "big")
        fragment = fragment or (number == 1 and behind[4 : 4 + size] == _FRAGMENT_CODE)
        behind = behind[4 + size :]
    return int.from_bytes(body[:2], "big"), fragment


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each DER element, X.690 8.1. ValueError: there is none, or it is cut."""
    while True:
        size, start = (data[1], 2) if len(data) > 1 else (0, len(data) + 1)
        if size > 0x80:
            start, size = 2 + size - 0x80, int.from_bytes(data[2 : 2 + size - 0x80], "big")
        if len(data) < start + size:
            raise ValueError("the certificate is cut off")
        yield data[0], data[start : start + size]
        data = data[start + size :]
        if not data:
            return


def _exactly(parts: list[tuple[int, bytes]], count: int) -> list[tuple[int, bytes]]:
    """The parts, as many as must be there. ValueError: there are not."""
    if len(parts) != count:
        raise ValueError("the certificate lacks a part")
    return parts


def _time(element: tuple[int, bytes]) -> float:
    """UTCTime (tag 23) or GeneralizedTime as UTC seconds: RFC 5280 4.1.2.5."""
    tag, text = element
    form = "%y%m%d%H%M%SZ" if tag == 23 else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode("ascii"), form).replace(tzinfo=UTC).timestamp()


def _name(name: bytes) -> str:
    """The common name in an X.501 name, else its last part; empty for an empty name."""
    found = ""
    for _, part in _elements(name) if name else ():
        for _, pair in _elements(part):
            (_, oid), (_, value) = _exactly(list(_elements(pair)), 2)
            found = value.decode("utf-8", "replace")
            if oid.hex() == _COMMON_NAME:
                return found
    return found


def _key(info: bytes) -> str:
    """The kind of a public key: RFC 5280 4.1.2.7."""
    (_, algorithm), (_, bits) = _exactly(list(_elements(info)), 2)
    oids = [content.hex() for _, content in _elements(algorithm)]
    if oids[0] == _RSA:
        (_, numbers), *_ = _elements(bits[1:])  # behind the count of unused bits
        (_, modulus), *_ = _elements(numbers)
        return f"RSA {int.from_bytes(modulus, 'big').bit_length()}"
    return _CURVES.get(oids[-1]) or _EDWARDS.get(oids[0], f"OID {oids[-1]}")


def _alternative_names(extensions: bytes) -> Iterator[tuple[str, str]]:
    """The DNS names and addresses of subjectAltName: RFC 5280 4.2.1.6."""
    listed = next(_elements(extensions))[1] if extensions else b""
    for _, extension in _elements(listed) if listed else ():
        parts = list(_elements(extension))
        if parts[0][1].hex() == _ALTERNATIVE_NAMES:
            for tag, value in _elements(next(_elements(parts[-1][1]))[1]):
                if tag == 0x82:
                    yield "DNS", value.decode("ascii", "replace").lower()
                elif tag == 0x87 and len(value) in {4, 16}:
                    yield "IP", str(ipaddress.ip_address(value))
