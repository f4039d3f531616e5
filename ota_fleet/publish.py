"""The operator's `ota_server.py publish FILE --to URL`: brings a release to a server, as CI does.

How it flows, which is also the order on this page:

    arguments -> Options -> exchange(): one request -> persist(): again, until it is answered
                                                          |
    0, and a line with the URL <- publish(): is it there <-+-> Refused: 1, Unreachable: 3

The file is sent only once the server has looked at everything else (RFC 9110 10.1.1). The same
bytes under the same version are one release, so a try that nobody answered is made again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import partial
from http.client import HTTPException
from typing import Any, BinaryIO, TextIO

from ota_fleet.client import (
    Answer,
    Remote,
    Sent,
    Unreachable,
    add_options,
    exchange,
    quoted,
    read_remote,
    sentence,
    trouble,
)
from ota_fleet.rows import MAX_LONG
from ota_server import CHUNK, Parser, Refused, printable

DESCRIPTION = """Brings a firmware or a file system to a server that was started with --state.
Ends with 0: it is published, or was there already; 1: the server refuses it; 2: wrong usage;
3: the server is not reachable, or gives no answer after six tries."""
TOKEN = "OTA_UPLOAD_TOKEN"  # noqa: S105 - where it is
PAUSES = (1, 2, 4, 8, 16)  # seconds before another try
LONGEST = 60  # seconds of a Retry-After that are waited
FINAL = frozenset((501, 505, 507, 511))  # of 5xx: the next try would get the same
REDRAW = 0.1  # seconds between two looks of the bar


# -- 1. What is asked for --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator wants."""

    path: str  # of the file
    remote: Remote
    project: str = ""  # "": the image says it
    version: str = ""
    notes: str = ""  # "": those that are there stay
    replace: bool = False


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """What the arguments say. SystemExit: --help, or they are wrong and stderr has said why."""
    parser = Parser(prog="ota_server.py publish", description=DESCRIPTION, allow_abbrev=False)
    option = parser.add_argument
    option("file", metavar="FILE", help="such as firmware.bin, littlefs.bin")
    option("--to", metavar="URL", required=True, help="of the server: https://ota.example")
    option("--project", default="", help="default: what the image says")
    option("--version", default="", help="default: what the image says; with --project")
    option("--notes", metavar="FILE", help="release notes, text in UTF-8")
    option("--replace", action="store_true", help="even if it is not newer than what is there")
    text = "of a publisher; better in OTA_UPLOAD_TOKEN: arguments stand in the list of processes"
    add_options(parser, text)
    given = parser.parse_args(argv)
    if given.version and not given.project:
        parser.error("--version needs --project")
    try:
        return Options(
            _file(given.file),
            read_remote(given.to, given, TOKEN, environ.get(TOKEN)),
            given.project,
            given.version,
            _notes(given.notes) if given.notes else "",
            given.replace,
        )
    except ValueError as err:
        parser.error(str(err))


def _file(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError as err:
        raise ValueError(f"{path}: {err.strerror}") from err
    if not (stat.S_ISREG(found.st_mode) and found.st_size and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is empty, not to be read, or no file")
    return path


def _notes(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_LONG + 1).strip()
    except OSError as err:
        raise ValueError(f"--notes {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ValueError(f"--notes {path}: no text in UTF-8") from err
    if len(text) > MAX_LONG:
        raise ValueError(f"--notes {path}: more than {MAX_LONG} characters")
    return text


# -- 2. As often as it takes -----------------------------------------------------------------------


def persist(
    attempt: Callable[[], Answer], wait: Callable[[float], object], say: Callable[[str], None]
) -> Answer:
    """The answer that counts, good or bad. Unreachable: there is none, which says why."""
    pauses: Iterator[int] = iter(PAUSES)
    while True:
        least: float | None = None
        try:
            answer = attempt()
            if not _is_passing(answer.status):
                return answer
            why, least = _said(answer), _retry_after(answer, time.time())
        except (OSError, HTTPException) as err:
            why = trouble(err)
        pause = next(pauses, None)
        if pause is None:
            raise Unreachable(f"{why}; that was the last of {len(PAUSES) + 1} tries")
        if least is not None and least > LONGEST:
            raise Unreachable(f"{why}; it is to be left alone for {least:.0f} s")
        seconds = pause if least is None else least
        say(f"{why}; once more in {seconds:.0f} s")
        wait(seconds)


def _said(answer: Answer) -> str:
    return sentence(answer).replace("?replace=1", "--replace")


def _is_passing(status: int) -> bool:
    return status in {408, 429} or (status >= 500 and status not in FINAL)


def _retry_after(answer: Answer, now: float) -> float | None:
    """Seconds, None if it does not say: RFC 9110 10.2.3."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    date = parsedate_tz(text)
    return max(0.0, mktime_tz(date) - now) if date else None


# -- 3. The command --------------------------------------------------------------------------------


class Bar:
    """How far it is, in one line of a terminal; nothing where there is none."""

    def __init__(self, out: TextIO, size: int) -> None:
        self._out, self._size = out, size
        self._width = min(40, shutil.get_terminal_size().columns - 40) if out.isatty() else 0
        self._next = 0.0  # time of the next look
        self._drawn = False

    def show(self, sent: int) -> None:
        """So many bytes are on their way."""
        now = time.monotonic()
        if self._width > 0 and (now >= self._next or sent == self._size):
            self._next, self._drawn = now + REDRAW, True
            done = "#" * (self._width * sent // self._size)
            share, size = 100 * sent // self._size, self._size / 1e6
            self._out.write(f"\r[{done:{self._width}}] {share:3} % of {size:.2f} MB")
            self._out.flush()

    def end(self) -> None:
        """What follows stands in a line of its own."""
        if self._drawn:
            self._out.write("\n")
            self._drawn = False


Persisting = Callable[[Callable[[], Answer]], Answer]


def publish(options: Options, file: BinaryIO, bar: Bar, persisting: Persisting) -> str:
    """The line that says what is there now, and where. Refused, Unreachable: it is not."""
    md5, sha256 = _digests(file)
    sent = _upload(options, sha256, md5, file)._replace(told=bar.show)
    answer = persisting(partial(exchange, options.remote, sent))
    if answer.status == 417:  # RFC 9110 15.5.18
        fields = tuple(field for field in sent.fields if field[0] != "Expect")
        answer = persisting(partial(exchange, options.remote, sent._replace(fields=fields)))
    bar.end()
    release = answer.data
    if 200 <= answer.status < 300 and release.get("sha256") != sha256.hex():
        raise Refused(answer.status, "what answers is no ota-server: is --to its URL?")
    _require(answer)
    if options.notes:
        noted = persisting(partial(exchange, options.remote, _patch(options, release)))
        _require(noted, "it is published, but without its notes: ")
    return _line(options, release, new=answer.status == 201)


def _digests(file: BinaryIO) -> tuple[bytes, bytes]:
    """MD5 and SHA-256."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    while piece := file.read(CHUNK):
        md5.update(piece)
        sha256.update(piece)
    return md5.digest(), sha256.digest()


def _upload(options: Options, sha256: bytes, md5: bytes, file: BinaryIO) -> Sent:
    """The request that brings the file."""
    path = "/api/v1"
    if options.project:
        path += f"/projects/{quoted(options.project)}"
    path += "/releases"
    size = os.fstat(file.fileno()).st_size
    if options.version:
        path += f"/{quoted(options.version)}"
    fields = (
        *options.remote.fields("publish"),
        ("Content-Type", "application/octet-stream"),
        ("Content-Length", str(size)),
        ("Content-Disposition", _disposition(os.path.basename(options.path))),
        ("x-MD5", md5.hex()),
        ("Repr-Digest", f"sha-256=:{base64.b64encode(sha256).decode()}:"),  # RFC 9530
        ("Expect", "100-continue"),
    )
    method = "PUT" if options.version else "POST"
    return Sent(method, path + "?replace=1" * options.replace, fields, file, size)


def _disposition(name: str) -> str:
    """The file's name: RFC 6266 4.3, RFC 8187."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", name)
    more = "" if plain == name else f"; filename*=UTF-8''{quoted(name)}"
    return f'attachment; filename="{plain}"{more}'


def _patch(options: Options, release: Mapping[str, Any]) -> Sent:
    """The request that brings the notes."""
    project, version = (quoted(str(release.get(key))) for key in ("project", "version"))
    data = json.dumps({"notes": options.notes}).encode()
    kind, length = ("Content-Type", "application/json"), ("Content-Length", str(len(data)))
    path = f"/api/v1/projects/{project}/releases/{version}"
    fields = (*options.remote.fields("publish"), kind, length)
    return Sent("PATCH", path, fields, io.BytesIO(data), len(data))


def _require(answer: Answer, before: str = "") -> None:
    if not 200 <= answer.status < 300:
        raise Refused(answer.status, before + _said(answer))


def _line(options: Options, release: Mapping[str, Any], *, new: bool) -> str:
    target = options.remote.to
    base = f"http{'s' * target.secure}://{target.authority}{target.path}"
    project, version, name = (str(release.get(key)) for key in ("project", "version", "name"))
    state = "is published" if new else "is there already"
    url = f"{base}/{quoted(project)}/{quoted(name)}"
    return printable(f"{project} {version} {state}: {url}")


def main(
    argv: Sequence[str],
    environ: Mapping[str, str],
    wait: Callable[[float], object] = time.sleep,
) -> int:
    """Publishes what `argv` names; gives back the status that --help explains."""
    try:
        options = read_options(argv, environ)
    except SystemExit as err:  # argparse has said why, or has helped
        return int(err.code or 0)
    bar = Bar(sys.stderr, os.stat(options.path).st_size)

    def say(text: str, out: TextIO = sys.stderr) -> None:
        """Whatever is said, none of it is the token."""
        bar.end()
        out.write(text.replace(options.remote.token, "***") + "\n")  # whoever repeated it
        out.flush()

    try:
        with open(options.path, "rb") as file:
            line = publish(options, file, bar, lambda attempt: persist(attempt, wait, say))
    except Refused as refused:
        say(f"ota-server: {refused.reason}")
        return 1
    except Unreachable as unreachable:
        say(f"ota-server: {options.remote.to.authority}: {unreachable}")
        return 3
    except KeyboardInterrupt:
        say("ota-server: interrupted; a second try does no harm")
        return 130
    say(line, sys.stdout)
    return 0
