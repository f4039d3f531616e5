"""What an answer means to a device: data in, findings out. No sockets, no clock.

What a device makes of an answer is from the sources that docs/protocols.md names.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime

from ota_fleet.findings import WAITING, Finding, fail, warn
from ota_fleet.handshake import FRAGMENT, Certificate, Flight, read_certificate
from ota_fleet.probe import Answer, Asked, Target, request
from ota_server import Facts, inspect, printable

CHAIN = 4096  # bytes of certificates that a buffer which was made smaller still holds
RECORD = 4096 + 64  # bytes of a record in half of an ESP8266's memory; 64 are encryption's own
HEAD_SECONDS = 4.0  # esp_http_client waits 5 s, ESPHome 4.5, the others 8
BODY_SECONDS = 0.1  # HTTPUpdate.cpp:292: delay(100), then one look
SENT_BUFFER = 512  # bytes of esp_http_client's own, which must hold a request line
DAY = 86_400.0  # seconds
DEVICES = {"esp8266": "an ESP8266", "esp32": "an ESP32", "esp-idf": "ESP-IDF"}
_FIELD = r"(?:x-ESP[\w-]+|MAC|version)"
_LACKS = (
    rf"\b(?:no|without|missing|needs) (?:an? )?{_FIELD}|{_FIELD}\S* (?:is |are )?(?:missing|needed)"
)
MISSING = re.compile(_LACKS, re.IGNORECASE)  # how servers say that a field did not arrive
ERRORS = {  # what getLastError() says; any other status is -104
    "esp8266": {401: -108, 403: -103, 404: -102},  # ESP8266httpUpdate.cpp:244-377
    "esp32": {403: -103, 404: -102},  # HTTPUpdate.cpp:250-376
}


# -- 1. Before anything is asked ------------------------------------------------------------------


def of_url(kind: str, target: Target, token: str) -> Iterator[Finding]:
    """What is wrong with the address itself."""
    line = request(kind, target, Asked()).partition(b"\r\n")[0]
    if kind == "esp-idf" and len(line) > SENT_BUFFER:
        yield fail("url-long", f"ESP-IDF has {SENT_BUFFER} bytes for a line of {len(line)}")
    if kind == "esp-idf" and not target.secure:
        yield warn("plain-http", "esp_https_ota refuses http:// unless it was built to allow it")
    if not target.secure and (token or re.search(r"[?&]token=", target.path)):
        yield warn("token-clear", "without TLS everybody on the way can read the token")


def of_error(target: Target, err: OSError, timeout: float) -> Finding:
    """What kept an answer from coming."""
    where = f"{target.host} port {target.port}"
    if isinstance(err, socket.gaierror):
        return fail("name", f"the name {printable(target.host)} does not resolve: {err.strerror}")
    if isinstance(err, TimeoutError):
        return fail(
            "timeout", f"{where} did not answer within {timeout:g} s; devices wait 5 to 8 s"
        )
    if isinstance(err, ConnectionRefusedError):
        return fail("refused", f"nothing listens on {where}, or a firewall says so")
    if isinstance(err, ConnectionError):
        return fail("closed", f"{where} broke off the connection")
    if isinstance(err, ssl.SSLError):
        why = err.reason or str(err)
        return fail("tls-handshake", f"{where} breaks off TLS 1.2: {why.replace('_', ' ').lower()}")
    return fail("unreachable", f"{where} cannot be reached: {err.strerror or err}")


# -- 2. TLS ---------------------------------------------------------------------------------------


def of_flight(
    kinds: Sequence[str], target: Target, flight: Flight, now: float
) -> Iterator[Finding]:
    """What the server shows before anything is encrypted."""
    if not flight.tls and flight.start:
        yield fail("http-port", f"port {target.port} answers https:// with plain text")
    elif not flight.tls:
        yield fail("closed", f"port {target.port} ends the connection when TLS begins")
    elif flight.version and flight.version != 0x0303:
        yield fail("tls-version", f"the server chose TLS 1.{flight.version - 0x0301}, not TLS 1.2")
    elif flight.alert == 70:  # protocol_version
        yield fail("tls-version", "the server speaks no TLS 1.2, and devices have no TLS 1.3")
    elif not flight.certificates:
        yield fail(
            "tls-handshake", f"the server takes no cipher of a device (alert {flight.alert})"
        )
    else:
        yield from _of_hello(flight, small="esp8266" in kinds)
        yield from _of_certificates(kinds, target, flight.certificates, now)


def _of_hello(flight: Flight, *, small: bool) -> Iterator[Finding]:
    """Sizes and demands; `small`: an ESP8266 is among those that ask."""
    size = sum(map(len, flight.certificates))
    if small and not flight.fragment:
        sentence = f"records of {FRAGMENT} bytes were asked for (MFLN), the server does not do it"
        yield warn("tls-fragment", f"{sentence}: setBufferSizes({FRAGMENT}, 512) would fail")
    if flight.wants_certificate:
        yield warn("tls-client-certificate", "the server asks the client for a certificate")
    if size > CHAIN:
        count = len(flight.certificates)
        yield warn("tls-chain-size", f"the {count} certificates have {size} bytes, over {CHAIN}")


def _of_certificates(
    kinds: Sequence[str], target: Target, sent: Sequence[bytes], now: float
) -> Iterator[Finding]:
    """Dates and keys of all, names of the first."""
    try:
        certificates = [read_certificate(der) for der in sent]
    except ValueError as err:
        yield fail("tls-certificate", f"a certificate cannot be read: {err}")
        return
    for certificate in certificates:
        yield from of_certificate(certificate, now)
    first = certificates[0]
    for kind in kinds:
        if not is_named(kind, first.names, target.host):
            names = printable(", ".join(f"{sort}:{name}" for sort, name in first.names))
            sentence = f"{DEVICES[kind]} does not find {target.host} in the certificate: {names}"
            yield fail("tls-name", sentence)
    yield Finding("ok", "tls", f"TLS 1.2, {first.key}, {sum(map(len, sent))} bytes of certificates")


def of_certificate(certificate: Certificate, now: float) -> Iterator[Finding]:
    """Dates and key of one."""
    name, key = printable(certificate.subject), certificate.key
    days = abs(certificate.ends - now) / DAY
    if certificate.ends < now:
        yield fail("tls-expired", f"the certificate of {name} ended {days:.0f} days ago")
    elif days < 14:
        yield warn("tls-expired", f"the certificate of {name} ends in {days:.0f} days")
    if certificate.begins > now:
        yield fail("tls-not-yet-valid", f"the certificate of {name} is not valid yet")
    size = int(key[4:]) if key.startswith("RSA ") else 2048
    if not (key.startswith(("RSA ", "P-")) and 2048 <= size <= 4096):
        yield fail("tls-key", f"the key of {name} is {key}, which not every device can use")


def is_named(kind: str, names: Sequence[tuple[str, str]], host: str) -> bool:
    """Whether this kind of device finds the host in the certificate.

    An ESP8266 compares only DNS entries, even with an address: bearssl x509_minimal.t0. The others
    compare addresses too: mbedtls x509_crt_verify_name(). CN stands there only without others.
    """
    sorts = {"DNS", "CN"} if kind == "esp8266" else {"DNS", "CN", "IP"}
    try:
        wanted = {host.lower(), str(ipaddress.ip_address(host))}
    except ValueError:
        wanted = {host.lower(), "*." + host.lower().partition(".")[2]}
    return any(sort in sorts and name.lower() in wanted for sort, name in names)


def of_trust(code: int, sent: Sequence[bytes], *, told: bool) -> Iterator[Finding]:
    """What OpenSSL says of the chain; `told`: --cacert was given."""
    if code in {20, 21}:  # X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY, ..._VERIFY_LEAF_SIGNATURE
        last = read_certificate(sent[-1])
        sentence = f"{printable(last.issuer)}, who signed {printable(last.subject)}"
        yield fail("tls-chain", f"{sentence}, was neither sent nor is trusted here")
    elif code in {18, 19} and not told:  # X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT, ..._IN_CHAIN
        yield warn("tls-untrusted", "it signed itself: only a sketch that holds it will trust it")
    elif code:
        yield fail("tls-untrusted", f"the chain is not trusted (OpenSSL verify error {code})")


# -- 3. The answer --------------------------------------------------------------------------------


def of_clock(answer: Answer, now: float) -> Iterator[Finding]:
    """The server's Date beside the clock of this computer."""
    try:
        ahead = parsedate_to_datetime(answer.get("Date")).timestamp() - now
    except (ValueError, TypeError):  # none, or unreadable; no device looks at it
        return
    if abs(ahead) > DAY:
        side = "ahead" if ahead > 0 else "behind"
        yield fail("clock", f"the server's clock is {abs(ahead) / DAY:.1f} days {side}")


def of_answer(kind: str, answer: Answer) -> Iterator[Finding]:
    """What this kind of device makes of an answer to its first request."""
    if answer.interim:
        yield fail("interim", f"a 1xx response comes first: {says(kind, 100)}")
    if answer.head_seconds > HEAD_SECONDS:
        yield warn(
            "head-late", f"the head came after {answer.head_seconds:.1f} s, devices wait 4.5"
        )
    if answer.status == 200:
        yield from of_image(kind, answer)
    elif answer.status == 304:
        why = reason(answer) or "no reason given"
        waiting = warn("nothing-newer", f"304, no image was seen: {why}")
        yield waiting._replace(advice=WAITING.get(why.partition(":")[0], ""))
    else:
        yield of_status(kind, answer)


def says(kind: str, status: int) -> str:
    """What this kind of device says to a status that is neither 200 nor 304."""
    if kind == "esp-idf":
        return "esp_https_ota fails"
    return f"{DEVICES[kind]} says {ERRORS[kind].get(status, -104)}"


def reason(answer: Answer) -> str:
    """Why, in the server's words."""
    first = answer.body[:160].decode("utf-8", "replace").strip().partition("\n")[0]
    foreign = first.startswith("<") or "\ufffd" in first  # a page, or no text at all
    return printable(answer.get("X-OTA-Reason")[:160] or ("" if foreign else first))


def of_status(kind: str, answer: Answer) -> Finding:
    """A status that brings no image."""
    status, why = answer.status, reason(answer)
    sentence = f"{status}{why and ', ' + why}: {says(kind, status)}"
    if status == 0:
        start = ascii(answer.start[:32])
        code, text = (
            ("not-http", f"is no HTTP/1: {start}") if answer.start else ("closed", "is empty")
        )
        return fail(code, f"the answer to {DEVICES[kind]} {text}")
    if 300 <= status < 400:
        return fail("redirect", _redirect(kind, answer))
    if status == 400 and MISSING.search(why):
        code = "version-needed" if kind == "esp-idf" else "lost-request-header"
        return fail(code, f"the server misses what a device sends: {sentence}")
    codes = {401: "unauthorized", 403: "forbidden", 404: "not-found"}
    group = {4: "bad-request", 5: "server-error"}.get(status // 100, "status")
    return fail(codes.get(status, group), sentence)


def _redirect(kind: str, answer: Answer) -> str:
    """Where it leads and what is lost on the way: ESP8266HTTPClient.cpp:481-537 and others."""
    place = printable(answer.get("Location").partition("?")[0][:160]) or "nowhere"
    if kind == "esp-idf":
        return f"{answer.status} to {place}: esp_https_ota follows only on a connection kept open"
    never = "; none goes from http:// to https://" if place.startswith("https://") else ""
    follows = f"{says(kind, answer.status)}, or loses its fields if told to follow"
    return f"{answer.status} to {place}: {follows}{never}"


def of_image(kind: str, answer: Answer) -> Iterator[Finding]:
    """A 200: its length, its digests, its body, its speed."""
    arduino = kind != "esp-idf"
    yield from _of_length(kind, answer)
    if coding := answer.get("Content-Encoding").strip().lower().replace("identity", ""):
        yield fail("compressed", f"Content-Encoding: {printable(coding)}, which devices ignore")
    if arduino:
        yield from _of_md5(answer)
    sha256 = answer.get("x-SHA256").lower()
    if sha256 and answer.whole and sha256 != hashlib.sha256(answer.content).hexdigest():
        yield fail(
            "sha256-wrong", "x-SHA256 is not that of the body: new cores of the ESP32 refuse"
        )
    yield from _of_content(kind, answer)
    if kind == "esp32" and answer.body_seconds > BODY_SECONDS:
        late = f"{answer.body_seconds * 1000:.0f} ms after the head"
        yield fail("body-late", f"the body comes {late}, an ESP32 looks once after 100 ms: -106")
    if kind == "esp8266" and answer.record > RECORD:
        sentence = f"TLS records have up to {answer.record} bytes"
        yield warn("tls-record", f"{sentence}: an ESP8266 needs its buffer of 16 KB for them")
    if arduino and not answer.get("x-version"):
        yield warn("version-missing", "no x-version: whether updates end is not known here")


def _of_length(kind: str, answer: Answer) -> Iterator[Finding]:
    """Content-Length and Transfer-Encoding, and whether they are true."""
    got, promised = len(answer.body), answer.length
    coding = answer.get("Transfer-Encoding").lower()
    level = warn if kind == "esp-idf" else fail
    if coding.replace("identity", ""):
        sentence = f"Transfer-Encoding: {printable(coding[:64])}, which has no length"
        yield level("chunked", f"{sentence}: an ESP8266 and an ESP32 say -101")
    elif promised is None:
        yield level("no-length", "no Content-Length: an ESP8266 and an ESP32 say -101")
    elif got < promised:
        sentence = f"{got} of {promised} bytes came: an ESP8266 waits 60 s, an ESP32 40 min"
        yield fail("body-short", sentence)
    elif got > promised:
        level = fail if kind == "esp-idf" else warn
        yield level("body-long", f"{got} bytes came, {promised} were promised: ESP-IDF fails")


def _of_md5(answer: Answer) -> Iterator[Finding]:
    """x-MD5, which a wrong form of leaves a device stuck: httpUpdate.cpp:413-418."""
    values = [part.strip() for value in answer.all("x-MD5") for part in value.split(",")]
    if not values:
        yield warn("md5-missing", "no x-MD5: a device cannot see that bytes changed on the way")
    elif len(values) > 1:
        yield fail("md5-doubled", f"x-MD5 stands there {len(values)} times: -105 until a restart")
    elif not re.fullmatch("[0-9A-Fa-f]{32}", values[0]):
        sentence = f"x-MD5 is {values[0][:64]!a}, no 32 hex digits: -105 until a restart"
        yield fail("md5-malformed", sentence)
    elif answer.whole and values[0].lower() != _md5(answer.content):
        yield fail("md5-wrong", "x-MD5 is not that of the body: update error 7")
    elif values[0] != values[0].lower():
        yield warn("md5-upper", "x-MD5 is in upper case, and some clients compare letters")


def _of_content(kind: str, answer: Answer) -> Iterator[Finding]:
    """What the body is."""
    first, packed = answer.content[:1], answer.content[:1] == b"\x1f"
    if packed and kind != "esp8266":
        yield fail(
            "wrong-chip", f"{DEVICES[kind]} was given a packed image, which it cannot unpack"
        )
        return
    if first != b"\xe9" and not packed:
        sentence = (
            f"the body begins with {answer.content[:24]!a}: {DEVICES[kind]} takes images only"
        )
        yield fail("not-an-image", sentence)
        return
    try:
        chip = facts_of(answer.content).chip
    except ValueError as err:
        if answer.whole:  # otherwise what is wrong has been said
            yield fail("damaged", f"the image {err}")
        return
    if (chip == "esp8266") != (kind == "esp8266"):
        yield fail("wrong-chip", f"{DEVICES[kind]} was given an image for {chip}: it may not start")
    version = printable(answer.get("x-version")[:64])
    size = f"{version + ', ' if version else ''}{len(answer.content)} bytes for {chip}"
    yield Finding(
        "ok", "image", f"as {DEVICES[kind]}: {size}, head after {answer.head_seconds:.2f} s"
    )


def facts_of(body: bytes) -> Facts:
    """What the core knows of an image. Raises ValueError: it is none, or damaged."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(body)
        file.seek(0)
        return inspect(file)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# -- 4. What is asked after the image -------------------------------------------------------------


def of_newest(kind: str, version: str, by_version: Answer, by_image: Answer) -> Finding:
    """The answers to a device that runs what it was given: told by version only, and wholly."""
    version = printable(version[:64])
    if by_version.status == 304:
        return Finding("ok", "newest", f"{DEVICES[kind]} on {version} is left alone")
    if by_image.status == 304:
        return warn(
            "loop", f"only the digest of the image, not its version {version}, ends updates"
        )
    got = by_version.status
    return fail("loop", f"{DEVICES[kind]} on {version} gets {got} again: it updates for ever")


def of_head(image: Answer, head: Answer) -> Iterator[Finding]:
    """HEAD beside GET."""
    if head.status != image.status:
        yield warn("head", f"HEAD gets {head.status or 'no answer'}, GET {image.status}")
    elif head.get("Content-Length") != image.get("Content-Length"):
        yield warn("head", "HEAD does not say the Content-Length of GET")


def of_range(image: Answer, asked: range, part: Answer) -> Iterator[Finding]:
    """The answer to a Range: esp_https_ota.c:387-508."""
    where = f"bytes {asked.start}-{asked.stop - 1}/{len(image.content)}"
    if part.status != 206:
        yield warn("range", f"a Range gets {part.status}, not 206: downloads are never resumed")
    elif part.body != image.content[asked.start : asked.stop] or part.get("Content-Range") != where:
        yield fail("range", f"{where} was asked for, other bytes came: resuming spoils the image")
    else:
        yield Finding("ok", "range", "parts of the image can be fetched")


def of_token(own: int, other: int, bare: Answer, scheme: str) -> Iterator[Finding]:
    """Statuses with the token in the device's scheme, in the other scheme, and the bare answer."""
    second = "Basic" if scheme == "Bearer" else "Bearer"
    if own == 401 and other in {200, 304}:
        yield fail(f"token-{scheme.lower()}", f"the token is taken as {second}, not as {scheme}")
    elif own == 401:
        yield fail("token-wrong", "the token is refused, as Basic and as Bearer")
    elif other == 401:
        yield warn(f"token-{second.lower()}", f"the token is taken as {scheme}, not as {second}")
    if bare.status in {200, 304}:
        yield fail("token-open", "the image is given to whoever asks without the token")
    elif bare.status == 401 and not bare.get("WWW-Authenticate"):
        yield warn("no-challenge", "a 401 without WWW-Authenticate: ESP-IDF gives up")
    elif bare.status == 401 and own in {200, 304}:
        yield Finding("ok", "token", f"needed, and taken as {scheme}")
