"""What must never be sent to a device: every row that the notes on real devices head DON'T.

Each rule is held against all that can be asked here, and then by the emulated devices, which say
what became of them: an update that is refused is fine, a device that hangs, crashes, is stuck until
somebody restarts it, or never starts again is not.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import ota_server
from ota_server import Catalog, Image, Limits, Release, Site
from tests.conftest import put, site_of
from tests.core.wire import PATIENCE, Answer, Stand, Wire, client_context, request, standing
from tests.data.make_images import esp32_image, esp8266_image, esp8266_signed, gzip_image
from tests.devices import Bricked, Crashed, Device, Esp32, Esp8266

OLD8266, OLD32 = esp8266_image("old", "1.0.0"), esp32_image("old", "1.0.0")
PROJECTS = {  # all that may lie in a folder, whole or not, in version 2.0.0
    "plain": esp8266_image("plain", "2.0.0"),
    "packed": gzip_image(esp8266_image("packed", "2.0.0")),
    "signed": esp8266_signed(esp8266_image("signed", "2.0.0")),
    "signed-packed": esp8266_signed(gzip_image(esp8266_image("signed-packed", "2.0.0"))),
    "packed-signed": gzip_image(esp8266_signed(esp8266_image("packed-signed", "2.0.0"))),
    "packed-and-more": gzip_image(esp8266_image("packed-and-more", "2.0.0")) + b"\0",
    "packed-twice": gzip_image(gzip_image(esp8266_image("packed-twice", "2.0.0"))),
    "packed-esp32": gzip_image(esp32_image("packed-esp32", "2.0.0")),
    "packed-qio": gzip_image(esp8266_image("packed-qio", "2.0.0", flash_mode=0)),
    "packed-dout": gzip_image(esp8266_image("packed-dout", "2.0.0", flash_mode=3)),
    "esp32": esp32_image("esp32", "2.0.0"),
    "esp32c3": esp32_image("esp32c3", "2.0.0", chip_id=5),
    "cut": esp32_image("cut", "2.0.0")[:-1],
    "half": esp8266_image("half", "2.0.0")[:3000],
    "one-byte": b"\xe9",
    "nothing": b"",
    "page": b"<!doctype html>",
    "large": esp32_image("large", "2.0.0", payload=bytes(3 << 20)),
}


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them."""
    folder = tmp_path_factory.mktemp("rules") / "firmware"
    for project, image in PROJECTS.items():
        put(folder / project / f"{project}-2.0.0.bin", image)
    return folder


@pytest.fixture(scope="module", params=["plain", "tls"])
def stand(
    request: pytest.FixtureRequest, folder_of_all: Path, certificate: Path
) -> Iterator[Stand]:
    """A server for all rules."""
    ca = certificate if request.param == "tls" else None
    limits = Limits(linger=0.3, tick=0.02)
    with standing(site_of(folder_of_all), ca, limits=limits) as stand:
        yield stand


FAMILIES = {
    "esp8266": ("User-Agent: ESP8266-http-Update", "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56"),
    "esp32": ("User-Agent: ESP32-http-Update", "x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC"),
    "idf": ("User-Agent: ESP32 HTTP Client/1.0",),
    "micropython": (),
}
PATHS = ["/", "/healthz", "/nobody", "/x/large/large-2.0.0.bin", "/no/such.bin", "/..", "//x"]
PATHS += [f"/{project}" for project in PROJECTS]
WISHES = ["", "TE: trailers, chunked", "Accept-Encoding: gzip, br", "Expect: 100-continue"]


def questions() -> Iterator[tuple[str, bytes]]:
    """All that a device, or somebody who says that he is one, may ask; and the method."""
    for family, path in itertools.product(FAMILIES, PATHS):
        names = ("x-ESP8266", "x-ESP32") if family == "micropython" else (f"x-{family.upper()}",)
        versions = [f"{name}-version: {v}" for name in names for v in ("1.0.0", "2.0.0", "odd")]
        for fields in ((), *((each,) for each in versions)):
            yield "GET", request(path, *FAMILIES[family], *fields, http="1.0")
    for wish, path, method in itertools.product(WISHES, PATHS, ("GET", "HEAD", "POST")):
        fields = ("x-ESP8266-version: 1.0.0", "Connection: close", *filter(None, [wish]))
        yield method, request(path, *fields, method=method)
    for path in PATHS:
        mode = ("x-ESP8266-version: 1.0.0", "x-ESP8266-mode: version", "Connection: close")
        yield "GET", request(path, *FAMILIES["esp8266"], *mode)
    yield "GET", b"nonsense\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and all bytes that came back before the end."""

    question: bytes
    answer: Answer
    behind: bytes  # what came after the promised length


@pytest.fixture(scope="module")
def exchanges(folder_of_all: Path) -> list[Exchange]:
    """Every question with its answer, each by a connection of its own."""
    found: list[Exchange] = []
    with standing(site_of(folder_of_all), limits=Limits(linger=0.3, tick=0.02)) as stand:
        for method, question in questions():
            with stand.dial() as wire:
                wire.send(question)
                found.append(Exchange(question, wire.reply(method), wire.rest()))
    return found


def emulators(stand: Stand) -> Iterator[Device]:
    """Devices of all kinds that run 1.0.0, one for each project; flash modes have their own row."""
    for project in PROJECTS.keys() - {"packed-qio"}:
        place: dict[str, Any] = {"host": "127.0.0.1", "port": stand.port, "path": f"/{project}"}
        place |= {"tls_ca": stand.ca, "timeout": PATIENCE, "stall": PATIENCE}
        yield Esp8266(image=OLD8266, **place)
        yield Esp32(image=OLD32, **place)
        yield Esp32(image=esp32_image("old", "1.0.0", chip_id=5), chip="esp32c3", **place)


def test_no_answer_crashes_sticks_or_bricks_a_device(stand: Stand) -> None:
    """No Crashed, no Bricked; what is sent fits or is not sent."""
    updated = set()
    for device in emulators(stand):
        before = device.image
        outcome = device.update()
        assert not device.stuck, device.path
        # 9: the image is for another chip of its family, of which a device says nothing
        assert device.last_error in {0, -102, -103, 9}, (device.path, device.last_error_string)
        assert (outcome == "HTTP_UPDATE_OK") is (device.image != before)
        if outcome == "HTTP_UPDATE_OK":
            updated.add((type(device).__name__, device.path[1:]))
            assert device.version == "2.0.0"
    assert {("Esp8266", "plain"), ("Esp8266", "signed"), ("Esp32", "esp32")} <= updated


# -- 1 --------------------------------------------------------------------------------------------


def test_dont_1_nothing_is_chunked_coded_or_preliminary(exchanges: list[Exchange]) -> None:
    """Arduino's clients take no chunks and fail on 100."""
    for each in exchanges:
        assert each.answer.status >= 200, each.question
        for name in ("transfer-encoding", "content-encoding", "te", "trailer", "upgrade"):
            assert name not in each.answer.headers, each.question


# -- 2 --------------------------------------------------------------------------------------------


def test_dont_2_no_206_unasked_and_no_status_that_arduino_does_not_know(
    exchanges: list[Exchange],
) -> None:
    """204, 201 and 308 are "wrong HTTP code" to them, and so is 206."""
    assert {each.answer.status for each in exchanges} <= {200, 304, 400, 403, 404, 405}


# -- 3 --------------------------------------------------------------------------------------------


def test_dont_3_nobody_is_sent_elsewhere(exchanges: list[Exchange]) -> None:
    """MicroPython fails on a Location where none belongs; device headers get lost on the way."""
    for each in exchanges:
        assert not {"location", "refresh", "content-location"} & each.answer.headers.keys()
        assert each.answer.status not in {301, 302, 303, 307, 308}


# -- 4 --------------------------------------------------------------------------------------------


def outcome_of(stand: Stand, device: type[Device], project: str, **options: Any) -> str:
    """What update() gives back; Bricked rises."""
    image = OLD32 if device is Esp32 else OLD8266
    place: dict[str, Any] = {"host": "127.0.0.1", "port": stand.port, "path": f"/{project}"}
    return device(image=image, tls_ca=stand.ca, **place, **options).update()


@pytest.mark.parametrize("project", ["packed-and-more", "signed-packed", "packed-twice"])
def test_dont_4_gzip_with_bytes_behind_it_is_never_offered(stand: Stand, project: str) -> None:
    """The boot loader takes the last four bytes as the size: it never starts again."""
    assert outcome_of(stand, Esp8266, project) == "HTTP_UPDATE_FAILED"


@pytest.mark.parametrize("project", [name for name in PROJECTS if "packed" in name])
def test_dont_4_gzip_never_goes_to_an_esp32(stand: Stand, project: str) -> None:
    with stand.dial() as wire:
        answer = wire.ask(f"/{project}", *FAMILIES["esp32"], "x-ESP32-version: 1.0.0")
        assert answer.status in {403, 404}
        answer = wire.ask(f"/{project}/{project}-2.0.0.bin", *FAMILIES["esp32"])
        assert answer.status in {403, 404}
    assert outcome_of(stand, Esp32, project) == "HTTP_UPDATE_FAILED"


@pytest.mark.parametrize("flash_mode", [0, 1, 2, 3], ids=["QIO", "QOUT", "DIO", "DOUT"])
@pytest.mark.parametrize("project", ["packed-qio", "packed", "packed-dout"])
def test_dont_4_gzip_never_goes_to_a_board_wired_for_another_flash_mode(
    stand: Stand, project: str, flash_mode: int
) -> None:
    """The Updater patches the mode of a plain image; of a packed one nobody does."""
    try:
        outcome_of(stand, Esp8266, project, flash_mode=flash_mode)
    except Bricked as flaw:
        pytest.fail(f"a board of mode {flash_mode} does not start again: {flaw}")


def test_dont_4_plain_image_may_have_any_flash_mode(stand: Stand) -> None:
    for flash_mode in range(4):
        assert outcome_of(stand, Esp8266, "plain", flash_mode=flash_mode) == "HTTP_UPDATE_OK"


# -- 5 --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A catalog whose file is spoilt at the worst moment: it is open, nothing is sent yet."""

    catalog: Catalog
    spoil: Callable[[str], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.catalog, name)

    def open(self, release: Release) -> Image:
        """The image, whose file is not what it was."""
        image = self.catalog.open(release)
        self.spoil(release.path)
        return image


def emptied(path: str) -> None:
    """Cuts all off."""
    os.truncate(path, 0)


def cut_to_one_byte(path: str) -> None:
    """Cuts nearly all off."""
    os.truncate(path, 1)


def touched(path: str) -> None:
    """Makes it look rewritten."""
    os.utime(path)


def spoilt_site(folder: Path, spoil: Callable[[str], None]) -> Site:
    """A site whose one image is spoilt once it is open."""
    put(folder / "sensor-2.0.0.bin", esp32_image("sensor", "2.0.0"))
    site = site_of(folder)
    return replace(site, catalog=Spoilt(site.catalog, spoil))


@pytest.mark.parametrize("spoil", [emptied, cut_to_one_byte, touched])
@pytest.mark.parametrize("way", ["http", "https"])
def test_dont_5_a_head_never_comes_without_its_body(
    way: str, spoil: Callable[[str], None], tmp_path: Path, certificate: Path
) -> None:
    """An ESP32 dereferences NULL: if the body cannot be had, the head must not come either."""
    ca = certificate if way == "https" else None
    with standing(spoilt_site(tmp_path / "firmware", spoil), ca) as stand, stand.dial() as wire:
        wire.send(request("/sensor", *FAMILIES["esp32"], "x-ESP32-version: 1.0.0", http="1.0"))
        assert not wire.rest().startswith(b"HTTP/1.1 2")
        try:
            assert outcome_of(stand, Esp32, "sensor") == "HTTP_UPDATE_FAILED"
        except Crashed as head:
            pytest.fail(f"a head without a body: {head}")


@pytest.mark.parametrize("project", ["nothing", "one-byte", "half", "cut", "page"])
def test_dont_5_a_file_that_is_not_whole_is_never_promised(stand: Stand, project: str) -> None:
    for name, family in FAMILIES.items():
        with stand.dial() as wire:
            prefix = "x-ESP8266" if name == "esp8266" else "x-ESP32"
            answer = wire.ask(f"/{project}", *family, f"{prefix}-version: 1.0.0")
            assert answer.status == 404
            assert wire.ask(f"/{project}/{project}-2.0.0.bin", *family).status == 404


@pytest.mark.parametrize("family", FAMILIES)
def test_dont_5_the_first_bytes_of_the_body_come_with_the_head(stand: Stand, family: str) -> None:
    """An ESP32 looks once, 100 ms after the head, and wants the first bytes there."""
    project = "plain" if family == "esp8266" else "large"
    with stand.dial() as wire:
        wire.send(request(f"/x/{project}/{project}-2.0.0.bin", *FAMILIES[family], http="1.0"))
        first = wire.link.recv(65536)
        body = first.partition(b"\r\n\r\n")[2]
        assert body.startswith(PROJECTS[project][:1024])


# -- 6 --------------------------------------------------------------------------------------------


def test_dont_6_no_body_is_longer_or_shorter_than_promised(exchanges: list[Exchange]) -> None:
    for each in exchanges:
        assert each.behind == b"", each.question
        head = each.question.startswith(b"HEAD ")
        if each.answer.status not in {204, 304} and not head:
            assert each.answer.headers["content-length"] == str(len(each.answer.body))
        if each.answer.status == 304:
            assert each.answer.headers.get("content-length", "0") == "0"


def test_an_md5_is_that_of_the_body_and_never_malformed(exchanges: list[Exchange]) -> None:
    """One that is malformed blocks every later update until somebody restarts the device."""
    seen = 0
    for each in exchanges:
        md5 = each.answer.headers.get("x-md5")
        if md5 is None:
            assert each.answer.headers.get("content-type") != "application/octet-stream"
            continue
        seen += 1
        assert re.fullmatch("[0-9a-f]{32}", md5)
        assert re.fullmatch("[0-9a-f]{64}", each.answer.headers["x-sha256"])
        if each.answer.body:
            assert md5 == hashlib.md5(each.answer.body).hexdigest()  # noqa: S324
    assert seen > 20


# -- 7 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cipher", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"]
)
def test_dont_7_tls_1_2_without_a_client_certificate_is_enough(
    folder: Path, certificate: Path, cipher: str
) -> None:
    """The libraries of the devices know no Ed25519, and not all know TLS 1.3."""
    context = client_context(certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    with standing(site_of(folder), certificate) as stand, ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", stand.port), PATIENCE))
        link = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
        assert Wire(link).check().status == 200
        assert link.version() == "TLSv1.2"
        names = dict(link.getpeercert() or {})["subjectAltName"]
    assert set(names) == {("DNS", "127.0.0.1"), ("IP Address", "127.0.0.1")}


def test_dont_7_no_client_is_asked_for_a_certificate(certificate: Path) -> None:
    context = ota_server.tls_context(str(certificate), "")
    assert context.verify_mode is ssl.CERT_NONE
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


# -- 8 --------------------------------------------------------------------------------------------


def test_dont_8_no_time_limit_under_a_minute_is_promised_or_kept(
    exchanges: list[Exchange],
) -> None:
    """A device that erases its flash reads nothing for a while; the whole may take an hour."""
    assert Limits().progress >= 60
    assert not any("keep-alive" in each.answer.headers for each in exchanges)
