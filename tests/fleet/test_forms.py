"""Forms with files: what browsers and curl send, and what nobody should."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import EmailMessage
from email.policy import HTTP
from io import FileIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_fleet.forms import MAX_FIELD, MAX_PARTS, PIECE, is_form, parameters, read_form, text_of
from ota_server import Refused

B = "XyZ"
TYPE = f"multipart/form-data; boundary={B}"
FIELD = b'Content-Disposition: form-data; name="version"\r\n\r\n1.2.3'
NAMED = b'Content-Disposition: form-data; name="file"; filename="lamp.bin"\r\n\r\n'

Read = list[tuple[str, str | None, bytes]]  # name, file name and bytes of each part


def form(*parts: bytes, boundary: str = B, end: bytes = b"--\r\n") -> bytes:
    """A form of parts that are written out."""
    line = f"--{boundary}".encode()
    return b"".join(line + b"\r\n" + part + b"\r\n" for part in parts) + line + end


@contextmanager
def opened(data: bytes) -> Iterator[FileIO]:
    """The bytes as a file."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with FileIO(file.fileno(), closefd=False) as raw:
            yield raw


def read(data: bytes, content_type: str = TYPE) -> Read:
    """What the form holds."""
    with opened(data) as file:
        found: Read = []
        for part in read_form(file, content_type):
            file.seek(part.start)
            found.append((part.name, part.filename, file.read(part.size)))
        return found


# -- 1. What clients send -------------------------------------------------------------------------

CURL = (
    b"--------------------------d74496d66958873e\r\n"
    b'Content-Disposition: form-data; name="file"; filename="lamp-1.2.3.bin"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\xe9\0\xff\r\n"
    b"--------------------------d74496d66958873e\r\n"
    b'Content-Disposition: form-data; name="notes"\r\n\r\nZ\xc3\xbcrich\r\n'
    b"--------------------------d74496d66958873e--\r\n"
)
FIREFOX = (
    b"-----------------------------9051914041544843365972754266\r\n"
    b'Content-Disposition: form-data; name="notes"\r\n\r\n\r\n'
    b"-----------------------------9051914041544843365972754266\r\n"
    b'Content-Disposition: form-data; name="file"; filename="my %22lamp%22.bin"\r\n'
    b"Content-Type: application/macbinary\r\n\r\n\xe9\r\n"
    b"-----------------------------9051914041544843365972754266--\r\n"
)
REQUESTS = (
    b"--a0b1\r\n"
    b'Content-Disposition: form-data; name="file"; filename="lamp.bin"\r\n\r\n\xe9\r\n'
    b"--a0b1--\r\n"
)


@pytest.mark.parametrize(
    ("data", "boundary", "found"),
    [
        pytest.param(
            CURL, "------------------------d74496d66958873e",
            [("file", "lamp-1.2.3.bin", b"\xe9\0\xff"), ("notes", None, "Zürich".encode())],
            id="curl",
        ),
        pytest.param(
            FIREFOX, "---------------------------9051914041544843365972754266",
            [("notes", None, b""), ("file", "my %22lamp%22.bin", b"\xe9")], id="firefox",
        ),
        pytest.param(REQUESTS, "a0b1", [("file", "lamp.bin", b"\xe9")], id="python-requests"),
        pytest.param(form(FIELD), B, [("version", None, b"1.2.3")], id="field"),
        pytest.param(form(), B, [], id="empty"),
        pytest.param(form(end=b"--"), B, [], id="no-line-end"),
        pytest.param(b"preamble\r\n" + form(FIELD) + b"epilogue", B,
            [("version", None, b"1.2.3")], id="preamble-and-epilogue"),
        pytest.param(form(FIELD).replace(b"XyZ\r", b"XyZ \t\r"), B,
            [("version", None, b"1.2.3")], id="padding"),
        pytest.param(form(NAMED), B, [("file", "lamp.bin", b"")], id="empty-file"),
        pytest.param(form(FIELD, FIELD), B, [("version", None, b"1.2.3")] * 2, id="twice"),
        pytest.param(form(NAMED + b"\n--XyZ--\n--XyZ\r--XyZ"), B,
            [("file", "lamp.bin", b"\n--XyZ--\n--XyZ\r--XyZ")], id="boundary-in-the-data"),
        pytest.param(form(NAMED + b"\r\n--XyY\r\n-\r\n--\r\n"), B,
            [("file", "lamp.bin", b"\r\n--XyY\r\n-\r\n--\r\n")], id="nearly-a-boundary"),
        pytest.param(form(b"content-disposition:form-data;NAME=version\r\n\r\n1"), B,
            [("version", None, b"1")], id="lower-case-and-no-quotes"),
    ],
)  # fmt: skip
def test_form_is_read(data: bytes, boundary: str, found: Read) -> None:
    assert read(data, f"multipart/form-data; boundary={boundary}") == found
    assert read(data, f'Multipart/Form-Data; charset=utf-8; boundary="{boundary}"') == found


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ('form-data; name="file"; filename="a.bin"', "a.bin"),
        ('form-data; name="file"; filename=a.bin', "a.bin"),
        ('form-data; name="file"; filename="say \\"hi\\".bin"', 'say "hi".bin'),
        ('form-data; name="file"; filename="C:\\new\\a.bin"', "C:\\new\\a.bin"),
        ('form-data; name="file"; filename=""', ""),
        ('form-data; name="file"; filename="a; name=b.bin"', "a; name=b.bin"),
        ('form-data; name="file"; filename="?.bin"; filename*=UTF-8\'\'%C3%BC.bin', "ü.bin"),
        ('form-data; name="file"', None),
    ],
)
def test_name_of_a_file_is_read_as_it_was_meant(field: str, name: str | None) -> None:
    part = f"Content-Disposition: {field}\r\n\r\nx".encode()
    assert read(form(part)) == [("file", name, b"x")]


@pytest.mark.parametrize(
    ("content_type", "yes"),
    [
        (TYPE, True),
        ("MULTIPART/FORM-DATA", True),
        ("multipart/form-data ; boundary=x", True),
        ("multipart/mixed; boundary=x", False),
        ("application/octet-stream", False),
        ("application/x-www-form-urlencoded", False),
        ("", False),
    ],
)
def test_only_forms_with_files_are_forms(content_type: str, yes: bool) -> None:
    assert is_form(content_type) is yes


# -- 2. What nobody should send -------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        f"multipart/form-data; boundary={'x' * 71}",
        'multipart/form-data; boundary="ends with a blank "',
        'multipart/form-data; boundary="a\\"b"',
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary",
        "multipart/form-data; boundary=ä",
    ],
)
def test_form_without_a_sound_boundary_is_refused(content_type: str) -> None:
    with pytest.raises(Refused) as caught:
        read(form(FIELD), content_type)
    assert caught.value.status == 400


def test_boundary_of_70_characters_is_read() -> None:
    boundary = "x" * 70
    found = read(form(FIELD, boundary=boundary), f"multipart/form-data; boundary={boundary}")
    assert found == [("version", None, b"1.2.3")]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"", "cut off", id="nothing"),
        pytest.param(b"--XyZ", "cut off", id="only-a-boundary"),
        pytest.param(b"no form at all", "cut off", id="no-form"),
        pytest.param(form(FIELD, end=b""), "cut off", id="no-end"),
        pytest.param(form(FIELD, end=b"-"), "choose another one", id="half-an-end"),
        pytest.param(form(FIELD)[:-10], "cut off", id="cut-in-the-end"),
        pytest.param(form(NAMED + b"\xe9" * 100)[:-20], "cut off", id="cut-in-a-file"),
        pytest.param(b"--XyZ\r\nContent-Dispo", "cut off", id="cut-in-the-lines"),
        pytest.param(form(NAMED + b"\r\n--XyZabc"), "choose another one", id="boundary-and-more"),
        pytest.param(form(b"\r\nx"), "has no name", id="no-lines"),
        pytest.param(form(b"Content-Type: a/b\r\n\r\nx"), "has no name", id="no-disposition"),
        pytest.param(form(b"Content-Disposition: form-data\r\n\r\nx"), "no name", id="no-name"),
        pytest.param(form(b'Content-Disposition: attachment; name="a"\r\n\r\nx'), "no name",
            id="other-disposition"),
        pytest.param(form(b'Content-Disposition: form-data; name="a\r\n\r\nx'), "name=value",
            id="open-quote"),
        pytest.param(form(b"Content-Disposition: form-data; name=a; name=b\r\n\r\nx"),
            "name=value", id="two-names"),
        pytest.param(form(FIELD.replace(b"\r\n", b"\r\nContent-Disposition: x\r\n", 1)),
            "no line", id="two-dispositions"),
        pytest.param(form(b"no colon\r\n" + FIELD), "no line", id="no-colon"),
        pytest.param(form(b"Content-Transfer-Encoding: base64\r\n" + FIELD), "encoded",
            id="base64"),
        pytest.param(form(b"X: " + b"x" * MAX_FIELD + b"\r\n" + FIELD), f"more than {MAX_FIELD}",
            id="long-line"),
        pytest.param(form(b"".join(b"X%d: x\r\n" % i for i in range(1000)) + FIELD),
            f"more than {MAX_FIELD}", id="many-lines"),
        pytest.param(form(*[FIELD] * (MAX_PARTS + 1)), f"more than {MAX_PARTS}", id="many-parts"),
        pytest.param(form(FIELD).replace(b"\r\n", b"\n"), "choose another one", id="bare-lf"),
    ],
)  # fmt: skip
def test_wrong_form_is_400_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        read(data)
    assert (caught.value.status, sentence in caught.value.reason) == (400, True), caught.value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"x" * (MAX_FIELD + 1), f"more than {MAX_FIELD} bytes"),
        (b"\xff", "no UTF-8"),
    ],
)
def test_field_that_is_no_short_text_is_refused(text: bytes, sentence: str) -> None:
    with opened(form(FIELD.replace(b"1.2.3", text))) as file:
        part = read_form(file, TYPE)[0]
        with pytest.raises(Refused, match=sentence):
            text_of(file, part)


def test_field_of_the_most_bytes_is_read() -> None:
    with opened(form(FIELD.replace(b"1.2.3", b"x" * MAX_FIELD))) as file:
        assert text_of(file, read_form(file, TYPE)[0]) == "x" * MAX_FIELD


# -- 3. Whatever comes ----------------------------------------------------------------------------

LINE = f"\r\n--{B}".encode()
TRICKS = st.sampled_from([LINE, LINE[:-1], LINE[2:], b"\r\n", b"\r", b"--", b"-", B.encode()])
DATA = st.lists(TRICKS | st.binary(max_size=20), max_size=12).map(b"".join)


@given(DATA)
@settings(max_examples=300, deadline=None)
def test_file_is_whole_or_refused_whatever_is_in_it(data: bytes) -> None:
    body = form(FIELD, NAMED + data)
    boundary = re.search(re.escape(LINE) + b"(--)?", b"\r\n" + data)
    if boundary is None:
        assert read(body) == [("version", None, b"1.2.3"), ("file", "lamp.bin", data)]
    elif boundary[1]:
        before = data[: max(boundary.start() - 2, 0)]
        assert read(body) == [("version", None, b"1.2.3"), ("file", "lamp.bin", before)]
    else:
        with pytest.raises(Refused):  # a part without a name, or something behind the boundary
            read(body)


@pytest.mark.parametrize("size", [PIECE + shift for shift in range(-len(LINE) - 4, 6)])
def test_boundary_that_is_split_over_pieces_is_found(size: int) -> None:
    data = bytes(size - len(NAMED)).replace(b"\0", b"\xe9")
    assert read(form(NAMED + data, FIELD))[0] == ("file", "lamp.bin", data)
    tricky = (data + LINE[:-1] + b"Y")[-size:]
    assert read(form(NAMED + tricky))[0] == ("file", "lamp.bin", tricky)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_damaged_form_is_read_or_refused_and_nothing_else(
    junk: bytes, start: int, end: int
) -> None:
    body = bytearray(form(FIELD, NAMED + b"\xe9\0\xff"))
    body[start:end] = junk
    with suppress(Refused):
        for name, _, data in read(bytes(body)):
            assert (type(name), type(data)) == (str, bytes)


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_header_field_is_read_or_refused(text: str) -> None:
    with suppress(Refused):
        assert "" not in parameters(text)


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0\\"), max_size=30))
@settings(max_examples=100, deadline=None)
def test_name_in_quotes_is_read_as_the_standard_library_writes_it(name: str) -> None:
    quoted = name.replace('"', '\\"')
    assert parameters(f'form-data; name="{quoted}"') == {"name": name}
    message = EmailMessage(policy=HTTP)
    message["Content-Type"] = "multipart/form-data; boundary=x"
    message.set_param("name", "x")
    assert parameters(message["Content-Type"]) == {"boundary": "x", "name": "x"}
