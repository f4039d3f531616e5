"""Forms with files: multipart/form-data, RFC 7578, read from a body that lies in a file.

    read_form(body, content type) -> parts: where the bytes of each one are

No part is held in memory; a short text is read when somebody asks for it. What two programs could
read in two ways is refused.
"""

from __future__ import annotations

import re
from io import FileIO
from typing import NamedTuple
from urllib.parse import unquote

from ota_server import Refused, shown

MAX_PARTS = 16
MAX_FIELD = 4 * 1024  # bytes of a text, and of the lines before a part
PIECE = 64 * 1024  # bytes that are searched at once

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")  # RFC 2046 5.1.1
_PARAMETER = re.compile(
    r"""\s*;\s*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s;"]*)"""
)


class Part(NamedTuple):
    """One field, or one file."""

    name: str
    filename: str | None  # None: it is a field
    start: int  # where its bytes are in the body
    size: int


def is_form(content_type: str) -> bool:
    """Whether this module reads such a body."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def parameters(field: str) -> dict[str, str]:
    """What stands behind the first word of a header field, as in `form-data; name="file"`.

    Names in lower case; RFC 5987's `filename*=UTF-8''...` is that text, as `filename*`. Refused:
    400, it cannot be read.
    """
    found: dict[str, str] = {}
    place = len(field.partition(";")[0])
    while field[place:].strip(" \t;"):
        match = _PARAMETER.match(field, place)
        if match is None or match[1].lower() in found:
            raise Refused(400, f"{shown(field)} is no word with parameters such as name=value")
        name, text = match[1].lower(), match[2]
        if text.startswith('"'):
            text = re.sub(r'\\(["\\])', r"\1", text[1:-1])
        if name.endswith("*"):
            text = unquote(text.rpartition("'")[2])
        found[name] = text
        place = match.end()
    return found


def read_form(body: FileIO, content_type: str) -> list[Part]:
    """The parts of a form. Refused: 400, it is none, or not whole."""
    boundary = parameters(content_type).get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise Refused(400, "the form has no boundary of 1 to 70 characters in its Content-Type")
    line = f"\r\n--{boundary}".encode()
    parts: list[Part] = []
    body.seek(0)
    first = body.read(len(line) - 2) == line[2:]  # without a preamble there is no line end
    place = len(line) - 2 if first else _find(body, line, 0) + len(line)
    while not _is_last(body, place):
        if len(parts) == MAX_PARTS:
            raise Refused(400, f"the form has more than {MAX_PARTS} parts")
        head = _head(body, place)
        name, filename = _disposition(head)
        start = place + len(head) + 4
        end = _find(body, line, start - 2)  # RFC 2046 5.1.1: the empty line may be the boundary's
        parts.append(Part(name, filename, start, max(end - start, 0)))
        place = end + len(line)
    return parts


def text_of(body: FileIO, part: Part) -> str:
    """The text of a field. Refused: 400, it is too long, or not UTF-8."""
    if part.size > MAX_FIELD:
        raise Refused(400, f"the field {shown(part.name)} has more than {MAX_FIELD} bytes")
    try:
        return _bytes(body, part.start, part.size).decode()
    except UnicodeDecodeError as err:
        raise Refused(400, f"the field {shown(part.name)} is no UTF-8") from err


def _is_last(body: FileIO, place: int) -> bool:
    """Whether the boundary before `place` is the one that ends the form."""
    return _bytes(body, place, 2) == b"--"


def _bytes(body: FileIO, place: int, size: int) -> bytes:
    body.seek(place)
    return body.read(size)


def _head(body: FileIO, place: int) -> bytes:
    """From behind a boundary up to the empty line that ends the lines about a part."""
    data = _bytes(body, place, MAX_FIELD)
    if data.partition(b"\r\n")[0].strip(b" \t"):
        raise Refused(400, "something stands behind the form's boundary: choose another one")
    head, end, _ = data.partition(b"\r\n\r\n")
    if end:
        return head
    if len(data) == MAX_FIELD:
        raise Refused(400, f"a part of the form begins with more than {MAX_FIELD} bytes of lines")
    raise _cut()


def _find(body: FileIO, needle: bytes, start: int) -> int:
    """Where `needle` begins, from `start` on. Refused: 400, nowhere."""
    body.seek(start)
    window = b""
    while piece := body.read(PIECE):
        window += piece
        if (at := window.find(needle)) >= 0:
            return start + at
        passed = max(len(window) - len(needle) + 1, 0)
        start, window = start + passed, window[passed:]
    raise _cut()


def _cut() -> Refused:
    return Refused(400, "the form is cut off: its last boundary is missing")


def _disposition(head: bytes) -> tuple[str, str | None]:
    """Name and file name, from the lines about a part behind its boundary. Refused: 400."""
    _, *lines = head.decode("utf-8", "replace").split("\r\n")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.lower() in fields:
            raise Refused(400, f"{shown(line)} is no line that may stand before a part")
        fields[name.lower()] = value.strip()
    if fields.get("content-transfer-encoding", "binary").lower() not in {"binary", "8bit", "7bit"}:
        raise Refused(400, "a part of the form is encoded: send its bytes as they are")
    kind, _, _ = fields.get("content-disposition", "").partition(";")
    found = parameters(fields.get("content-disposition", ""))
    if kind.strip().lower() != "form-data" or "name" not in found:
        raise Refused(400, "a part of the form has no name, as Content-Disposition gives it")
    return found["name"], found.get("filename*", found.get("filename"))
