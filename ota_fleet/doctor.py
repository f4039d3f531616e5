"""The operator's doctor: `ota_server.py check URL` asks as a device would and says what is wrong.

The order of asking, which is the order on this page: the port, TLS, the image for each kind of
device, then the same again on the newest version, by HEAD, by Range, and without the token.
probe.py carries the bytes, diagnosis.py judges; here findings are only put in a row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from ota_fleet import diagnosis
from ota_fleet.diagnosis import DEVICES
from ota_fleet.findings import Finding, fail
from ota_fleet.handshake import Flight
from ota_fleet.probe import (
    Answer,
    Asked,
    Target,
    ask,
    authorization,
    greet,
    read_url,
    request,
    tls_context,
    trust,
)
from ota_server import Parser, Version

DESCRIPTION = """Asks the public URL of a project as devices do, byte for byte, and says what is
wrong and how to mend it. Ends with 0 if all is well, with 1 if something is wrong."""
PART_END = 2000  # the last byte asked for by Range, of an image that has as many


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator wants to know."""

    target: Target
    kinds: tuple[str, ...]  # of devices
    chosen: bool = False  # by --as: this kind must get an image
    version: str = "0.0.1"  # that the device claims to run
    token: str = ""
    cacert: str | None = None  # PEM file
    timeout: float = 8.0  # seconds


def read_options(argv: Sequence[str]) -> Options:
    """What the arguments say. SystemExit: --help, or they are wrong and stderr has said why."""
    parser = Parser(prog="ota_server.py check", description=DESCRIPTION)
    option = parser.add_argument
    option("url", metavar="URL", help="what stands in the sketch, such as https://host/project")
    option("--as", dest="kind", choices=tuple(DEVICES), help="default: esp8266, then esp32")
    option("--version", default="0.0.1", help="the version it claims to run (default: 0.0.1)")
    option("--token", default="", help="the token that it sends")
    text = "what the sketch trusts (default: what this system does)"
    option("--cacert", "--ca", metavar="PEM", help=text)
    option("--timeout", type=float, default=8.0, help="seconds, at most (default: 8)")
    given = parser.parse_args(argv)
    try:
        Version.parse(given.version)
        target = read_url(given.url)
        tls_context(given.cacert)
    except ValueError as err:
        parser.error(str(err))
    except OSError as err:
        parser.error(f"--cacert {given.cacert}: no certificate in PEM form: {err.strerror or err}")
    if not (given.token.isascii() and given.token.isprintable()):
        parser.error("--token: only printable ASCII can be sent")
    if not given.timeout > 0:
        parser.error("--timeout: more than 0 seconds")
    kinds = (given.kind,) if given.kind else ("esp8266", "esp32")
    extra = given.version, given.token, given.cacert, given.timeout
    return Options(target, kinds, bool(given.kind), *extra)


def check(options: Options, now: float) -> Iterator[Finding]:
    """Every finding once, in the order of asking; `now` is in UTC seconds."""
    said = set[Finding]()
    for finding in _findings(options, now):
        if finding.code == "wrong-chip" and finding.level == "FAIL" and not options.chosen:
            finding = finding._replace(level="warn")  # noqa: PLW2901 - this URL is for the others
        if finding not in said:
            said.add(finding)
            yield finding


def main(argv: Sequence[str], _environ: Mapping[str, str], out: TextIO = sys.stdout) -> int:
    """Checks what `argv` names; 0: well, 1: something is wrong, 2: wrong usage."""
    try:
        options = read_options(argv)
    except SystemExit as err:  # argparse has said why, or has helped
        return int(err.code or 0)
    counts = {"ok": 0, "warn": 0, "FAIL": 0}
    for finding in check(options, time.time()):
        counts[finding.level] += 1
        out.write(f"{finding.level:4} {finding.code}: {finding.sentence}\n")
        out.write(f"     {finding.cure}\n" if finding.cure else "")
    out.write(f"ok: {counts['ok']}, warn: {counts['warn']}, FAIL: {counts['FAIL']}\n")
    return 1 if counts["FAIL"] else 0


def _findings(options: Options, now: float) -> Iterator[Finding]:
    """All findings, the same one perhaps for several kinds of device."""
    target, timeout = options.target, options.timeout
    for kind in options.kinds:
        yield from diagnosis.of_url(kind, target, options.token)
    try:
        if target.secure:
            flight = _flight(options)
            yield from diagnosis.of_flight(options.kinds, target, flight, now)
            if not flight.certificates:
                return
            why = trust(target, timeout, options.cacert)
            yield from diagnosis.of_trust(why, flight.certificates, told=bool(options.cacert))
        yield from _devices(options, now)
    except OSError as err:
        yield diagnosis.of_error(target, err, timeout)


def _flight(options: Options) -> Flight:
    """What the server says to TLS; where it is silent, what it says to plain HTTP."""
    target, timeout = options.target, options.timeout
    flight = greet(target, timeout)
    if flight.start:
        return flight
    plain = replace(target, secure=False)
    return Flight(start=ask(plain, request("esp8266", plain, Asked()), timeout).start)


def _devices(options: Options, now: float) -> Iterator[Finding]:
    """What each kind of device meets."""
    asked = {kind: Asked(options.version, _own(options, kind)) for kind in options.kinds}
    answers = dict[str, Answer]()
    try:
        for kind in options.kinds:
            answers[kind] = _ask(options, kind, asked[kind])
    except OSError as err:  # what was answered before is judged all the same
        yield diagnosis.of_error(options.target, err, options.timeout)
    served = any(answer.status in {200, 304} for answer in answers.values())
    for kind, answer in answers.items():
        yield from diagnosis.of_clock(answer, now)
        if _speaks_tls(options, answer):
            yield fail("https-port", f"port {options.target.port} speaks TLS, not http://")
            return
        if options.token:
            yield from _token(options, kind, answer.status)
        if served and not options.chosen and diagnosis.reason(answer).startswith("wrong-chip"):
            sentence = f"{DEVICES[kind]} is refused, as the image is for another chip"
            yield Finding("ok", "wrong-chip", sentence)
        elif not (options.token and answer.status == 401):  # of which _token() has spoken
            yield from diagnosis.of_answer(kind, answer)
        if answer.status == 200:
            yield from _again(options, kind, asked[kind], answer)


def _ask(options: Options, kind: str, asked: Asked) -> Answer:
    """The answer to this kind of device."""
    return ask(options.target, request(kind, options.target, asked), options.timeout)


def _scheme(kind: str) -> str:
    """How it sends a token: Basic is the only one that Arduino knows, and off in ESP-IDF 6."""
    return "Bearer" if kind == "esp-idf" else "Basic"


def _own(options: Options, kind: str) -> str:
    """Its field Authorization."""
    return authorization(options.token, _scheme(kind))


def _speaks_tls(options: Options, answer: Answer) -> bool:
    """Whether http:// was answered by a port that speaks TLS, in whatever words."""
    if options.target.secure or answer.status not in {0, 400}:
        return False
    try:
        return greet(options.target, options.timeout).tls
    except OSError:
        return False


def _token(options: Options, kind: str, own: int) -> Iterator[Finding]:
    """The token in the other scheme, and none; by HEAD, as the image itself was asked for."""
    scheme = _scheme(kind)
    other = authorization(options.token, "Basic" if scheme == "Bearer" else "Bearer")
    asked = Asked(options.version, other, "HEAD")
    status = _ask(options, kind, asked).status
    bare = _ask(options, kind, replace(asked, authorization=""))
    yield from diagnosis.of_token(own, status, bare, scheme)


def _again(options: Options, kind: str, asked: Asked, image: Answer) -> Iterator[Finding]:
    """What is asked of a server that has given an image."""
    version = image.get("x-version")
    if version.isascii() and version.isprintable() and version and kind != "esp-idf":
        known = replace(asked, version=version)
        newest = _ask(options, kind, known)
        wholly = (
            newest if newest.status == 304 else _ask(options, kind, _running(known, image.content))
        )
        yield diagnosis.of_newest(kind, version, newest, wholly)
    try:
        head = _ask(options, kind, replace(asked, method="HEAD"))
    except OSError:
        head = Answer()
    yield from diagnosis.of_head(image, head)
    if kind == "esp-idf" and image.content:
        end = min(len(image.content), PART_END)
        part = range(end // 2, end)
        span = f"bytes={part.start}-{part.stop - 1}"
        answer = _ask(options, kind, replace(asked, range=span))
        yield from diagnosis.of_range(image, part, answer)


def _running(asked: Asked, image: bytes) -> Asked:
    """What a device says that runs this image: its digests too, if it is one."""
    try:
        digests = {len(digest): digest for digest in diagnosis.facts_of(image).running}
    except ValueError:
        return asked
    sha256 = digests.get(64, asked.sketch_sha256).upper()
    return replace(asked, sketch_md5=digests[32], sketch_sha256=sha256)
