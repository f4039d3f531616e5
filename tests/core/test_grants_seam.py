"""The seams of a site with a memory: a grant before an image, what leaves, why, and the pulse."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ota_server import (
    Catalog,
    Event,
    Image,
    Limits,
    Objection,
    Release,
    Report,
    Request,
    Site,
    Transfer,
    Version,
    answer,
)
from tests.conftest import put, site_of, wait_until
from tests.core.wire import descriptors, request, standing
from tests.data.make_images import esp32_image, esp8266_image

MAC = "5C:CF:7F:12:34:56"
MAC_FIELD = f"x-ESP8266-STA-MAC: {MAC}"
VERSION = "x-ESP8266-version: 1.0.0"
MD5 = f"x-ESP8266-sketch-md5: {'0' * 32}"
LARGE = 4 << 20  # bytes: more than the kernel keeps for a client that does not read
PEER = "127.0.0.1"


def yes(_report: Report, _release: Release) -> Objection | None:
    """Whatever the rules allow."""
    return None


@dataclass(slots=True)
class Memory:
    """What a site with a memory was asked and told."""

    verdict: Callable[[Report, Release], Objection | None] = yes
    asked: list[tuple[Report, Release]] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)
    heard: list[Event] = field(default_factory=list)
    begun: list[Transfer] = field(default_factory=list)
    over: list[tuple[Transfer, int]] = field(default_factory=list)  # and the bytes sent
    pulses: list[float] = field(default_factory=list)

    def grant(self, report: Report, release: Release) -> Objection | None:
        """Notes who asks for what."""
        self.asked.append((report, release))
        self.threads.add(threading.current_thread())
        return self.verdict(report, release)

    def carry(self, transfer: Transfer) -> None:
        """Notes what begins and what ends."""
        if transfer.over:
            self.over.append((transfer, transfer.sent()))
        else:
            assert transfer.sent() == 0
            self.begun.append(transfer)

    @property
    def wanted(self) -> list[str]:
        """The versions that were asked for."""
        return [str(release.version) for _, release in self.asked]

    def site(self, folder: Path, **settings: int | str) -> Site:
        """A site with this memory."""
        site = site_of(folder, **settings)
        return replace(
            site,
            grant=self.grant,
            carriers=(self.carry,),
            pulses=(self.pulses.append,),
            listeners=(*site.listeners, self.heard.append),
        )


@pytest.fixture
def memory() -> Memory:
    """One that grants everything."""
    return Memory()


# -- Who is asked for a grant, and where -----------------------------------------------------------


def test_other_checks_go_on_while_a_grant_waits(folder: Path, memory: Memory) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(_report: Report, _release: Release) -> None:
        inside.set()
        assert go_on.wait(10)

    memory.verdict = slow
    with standing(memory.site(folder)) as stand, ExitStack() as stack:
        slowly, other, newest = (stack.enter_context(stand.dial()) for _ in range(3))
        stack.callback(go_on.set)
        slowly.send(request("/firmware", VERSION, MAC_FIELD))
        assert inside.wait(10)
        assert other.check().status == 200  # who cannot be held to it waits for nobody
        assert other.ask("/healthz").status == 200
        assert newest.ask("/firmware", "x-ESP8266-version: 1.10.0", MAC_FIELD).status == 304
        assert memory.wanted == ["1.10.0"]
        go_on.set()
        found = slowly.reply()
    assert found.status == 200
    assert found.body == (folder / "firmware-1.10.0.bin").read_bytes()


@pytest.mark.parametrize(
    ("path", "fields", "method", "wanted"),
    [
        pytest.param("/firmware", (VERSION, MAC_FIELD), "GET", ["1.10.0"], id="mac-and-version"),
        pytest.param("/x/firmware/latest.bin", (MAC_FIELD, MD5), "GET", ["1.10.0"], id="mac-md5"),
        pytest.param("/firmware?version=1.0.0&id=7", (), "GET", ["1.10.0"], id="id-and-version"),
        pytest.param(
            "/x/firmware/firmware-1.9.0.bin", (VERSION, MAC_FIELD), "GET", ["1.9.0"], id="by-name"
        ),
        pytest.param("/firmware", (VERSION,), "GET", [], id="no-mac"),
        pytest.param("/x/firmware/latest.bin", (MAC_FIELD,), "GET", [], id="no-version-nor-digest"),
        pytest.param("/x/firmware/firmware-1.9.0.bin", (), "GET", [], id="browser"),
        pytest.param("/firmware", (VERSION, MAC_FIELD), "HEAD", [], id="head"),
        pytest.param(
            "/firmware", (VERSION, MAC_FIELD, "x-ESP8266-mode: version"), "GET", [], id="only-asks"
        ),
        pytest.param(
            "/x/firmware/firmware-1.9.0.bin.md5", (VERSION, MAC_FIELD), "GET", [], id="md5"
        ),
        pytest.param("/firmware/manifest.json", (VERSION, MAC_FIELD), "GET", [], id="manifest"),
    ],
)
def test_only_who_can_prove_an_image_needs_a_grant(
    folder: Path, memory: Memory, path: str, fields: Sequence[str], method: str, wanted: list[str]
) -> None:
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        loop = next(each for each in threading.enumerate() if "serve_forever" in each.name)
        assert wire.ask(path, *fields, method=method).status == 200
    assert memory.wanted == wanted
    assert loop not in memory.threads


@pytest.mark.parametrize("fields", [(), ("x-ESP32-version: 1.0.0",)], ids=["id", "version"])
def test_manifest_of_esp32fota_needs_no_grant(
    folder: Path, memory: Memory, fields: Sequence[str]
) -> None:
    put(folder / "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0"))
    said = "x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC", f"x-ESP32-sketch-sha256: {'0' * 64}", *fields
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        assert wire.ask("/sensor/esp32fota.json", *said).status == 200
    assert memory.asked == []


SKETCH, SYSTEM = "sketch", "littlefs"
DEVICE = Report("firmware", PEER, device=MAC)
RUNS = Version.parse("1.0.0")


@pytest.mark.parametrize(
    ("report", "accountable"),
    [
        pytest.param(DEVICE._replace(version=RUNS), True, id="version"),
        pytest.param(DEVICE._replace(sketch_md5="0" * 32), True, id="md5"),
        pytest.param(DEVICE._replace(sketch_sha256="0" * 64), True, id="sha256"),
        pytest.param(DEVICE._replace(version=RUNS, asks="rest"), True, id="rest"),
        pytest.param(DEVICE._replace(version=RUNS, asks="answer"), False, id="no-byte"),
        pytest.param(DEVICE, False, id="says-nothing"),
        pytest.param(DEVICE._replace(version=RUNS, device=None), False, id="nobody"),
        pytest.param(DEVICE._replace(kind=SYSTEM, version=RUNS), True, id="filesystem-version"),
        # Its digest is that of the sketch beside it.
        pytest.param(DEVICE._replace(kind=SYSTEM, sketch_md5="0" * 32), False, id="filesystem-md5"),
        pytest.param(DEVICE._replace(kind="zip", version=RUNS), True, id="mongoose"),
    ],
)
def test_accountable_is_who_will_tell_what_it_runs(report: Report, accountable: bool) -> None:
    assert report.is_accountable() is accountable


@pytest.mark.parametrize(
    ("text", "asks", "status"),
    [
        pytest.param("bytes=0-", "image", 206, id="all"),
        pytest.param("bytes=00-99", "image", 206, id="beginning"),
        pytest.param("bytes=100-", "rest", 206, id="behind"),
        pytest.param("Bytes=100-199", "rest", 206, id="middle"),
        pytest.param("bytes=-100", "rest", 206, id="end"),
        pytest.param("bytes=5-6,8-9", "image", 200, id="several"),
        pytest.param("lines=5-", "image", 200, id="other-unit"),
        pytest.param("bytes=9-5", "image", 200, id="nonsense"),
        pytest.param("bytes=-0", "image", 416, id="nothing"),
        pytest.param("bytes=99999999-", "rest", 416, id="behind-the-end"),
    ],
)
def test_grant_knows_who_asks_for_the_rest(
    folder: Path, memory: Memory, text: str, asks: str, status: int
) -> None:
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        assert wire.ask("/firmware", VERSION, MAC_FIELD, f"Range: {text}").status == status
    assert [report.asks for report, _ in memory.asked] == [asks]


# -- What a grant decides --------------------------------------------------------------------------


def but(
    *versions: str, final: bool = False, deny: bool = False
) -> Callable[[Report, Release], Objection | None]:
    """A grant of all versions but these."""

    def verdict(_report: Report, release: Release) -> Objection | None:
        if str(release.version) not in versions:
            return None
        return Objection("paced", f"{release.version} is for others first", deny, final)

    return verdict


@pytest.mark.parametrize(
    ("verdict", "status", "version", "wanted"),
    [
        pytest.param(yes, 200, "1.10.0", ["1.10.0"], id="granted"),
        pytest.param(but("1.10.0"), 200, "1.9.0", ["1.10.0", "1.9.0"], id="next-best"),
        pytest.param(but("1.10.0", "1.9.0"), 304, "", ["1.10.0", "1.9.0"], id="none"),
        pytest.param(but("1.10.0", final=True), 304, "", ["1.10.0"], id="final"),
        pytest.param(but("1.10.0", final=True, deny=True), 403, "", ["1.10.0"], id="denied"),
    ],
)
def test_who_is_refused_gets_what_is_left(
    folder: Path,
    memory: Memory,
    verdict: Callable[[Report, Release], Objection | None],
    status: int,
    version: str,
    wanted: list[str],
) -> None:
    memory.verdict = verdict
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        found = wire.ask("/firmware", VERSION, MAC_FIELD)
    assert (found.status, found.headers.get("x-version", "")) == (status, version)
    assert memory.wanted == wanted
    if not version:
        assert found.headers["x-ota-reason"] == "paced: 1.10.0 is for others first"
    assert len(memory.heard) == 1  # the refused ones are no decision
    outcome = memory.heard[0].outcome
    assert (str(outcome.version) if isinstance(outcome, Release) else outcome.code) == (
        version or "paced"
    )


@dataclass(frozen=True, slots=True)
class Forgetful:
    """A catalog that makes its releases anew whenever it is asked."""

    catalog: Catalog

    def newest(self) -> dict[str, Version]:
        """As the catalog."""
        return dict(self.catalog.newest())

    def projects(self) -> Sequence[str]:
        """As the catalog."""
        return self.catalog.projects()

    def releases(self, project: str) -> Sequence[Release]:
        """Equal ones, none of which is the same."""
        return [replace(release) for release in self.catalog.releases(project)]

    def open(self, release: Release) -> Image:
        """As the catalog."""
        return self.catalog.open(release)


def test_refused_release_is_recognised_when_a_catalog_makes_it_anew(
    folder: Path, memory: Memory
) -> None:
    def verdict(report: Report, release: Release) -> Objection | None:
        assert len(memory.asked) < 9, "it is asked for ever"
        return but("1.10.0")(report, release)

    memory.verdict = verdict
    site = memory.site(folder)
    with standing(replace(site, catalog=Forgetful(site.catalog))) as stand, stand.dial() as wire:
        assert wire.ask("/firmware", VERSION, MAC_FIELD).headers["x-version"] == "1.9.0"
    assert memory.wanted == ["1.10.0", "1.9.0"]


def test_grant_that_fails_is_a_500_and_no_image(
    folder: Path, memory: Memory, said: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_report: Report, _release: Release) -> None:
        raise OSError("the disk is full")

    memory.verdict = fail
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        assert wire.check().status == 200  # all that is opened once is open
        before = descriptors()
        found = wire.ask("/firmware", VERSION, MAC_FIELD)
        assert (found.status, found.headers["content-type"][:10]) == (500, "text/plain")
        assert b"disk" not in found.body
        assert wire.check().status == 200
        wait_until(lambda: descriptors() <= before)
    assert [line for line in said() if "failed" in line] == [f"ERROR {PEER} GET '/firmware' failed"]
    assert caplog.text.count("Traceback") == 1
    assert [event.report.device for event in memory.heard] == [None, None]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param((VERSION, MAC_FIELD), id="in-a-thread"),
        pytest.param((VERSION,), id="on-the-loop"),
        pytest.param(("x-ESP8266-version: 1.10.0", MAC_FIELD), id="nothing-newer"),
    ],
)
def test_every_decision_is_told_once(
    folder: Path, memory: Memory, lines: Callable[[str], list[str]], fields: Sequence[str]
) -> None:
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        wire.ask("/firmware", *fields)
    assert len(memory.heard) == 1
    assert len(lines(" firmware 1.")) == 1


# -- What leaves -----------------------------------------------------------------------------------


@pytest.fixture(params=["http", "https"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None over HTTP."""
    return certificate if request.param == "https" else None


@pytest.fixture
def large(shelf: Path) -> Path:
    """A folder with one image that no kernel keeps for a client that does not read."""
    image = esp8266_image("firmware", "2.0.0", payload=bytes(LARGE))
    put(shelf / "firmware-2.0.0.bin", image)
    return shelf


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        pytest.param((), slice(None), id="whole"),
        pytest.param(("Range: bytes=100-299",), slice(100, 300), id="part"),
        pytest.param(("Range: bytes=70000-",), slice(70000, None), id="rest"),
    ],
)
def test_carriers_hear_of_every_byte_that_left(
    large: Path, memory: Memory, ca: Path | None, fields: Sequence[str], part: slice
) -> None:
    image = (large / "firmware-2.0.0.bin").read_bytes()
    with standing(memory.site(large), ca) as stand, stand.dial() as wire:
        found = wire.ask("/firmware", VERSION, MAC_FIELD, *fields)
        assert found.body == image[part]
        wait_until(lambda: len(memory.over) == 1)
    (begun,) = memory.begun
    ((over, sent),) = memory.over
    assert sent == len(found.body) == len(begun.part) == len(over.part)
    assert begun.part == over.part == range(len(image))[part]
    assert begun.recipient == over.recipient == f"{MAC} {PEER}"
    assert begun.image.sha256 == over.image.sha256 == hashlib.sha256(image).hexdigest()
    assert (begun.over, over.over) == (False, True)


def test_carriers_see_how_far_a_download_is_and_where_it_broke_off(
    large: Path, memory: Memory, ca: Path | None
) -> None:
    size = (large / "firmware-2.0.0.bin").stat().st_size
    with standing(memory.site(large), ca) as stand:
        with stand.dial(receive_buffer=4096) as wire:
            wire.send(request("/firmware", VERSION, MAC_FIELD))
            assert wire.head().status == 200
            wire.read(1000)
            (begun,) = memory.begun
            wait_until(lambda: begun.sent() > 0)
            first = begun.sent()
            assert 1000 <= first < size
            wire.read(600_000)
            wait_until(lambda: begun.sent() >= 600_000)
            assert memory.over == []
        wait_until(lambda: len(memory.over) == 1)
    ((over, sent),) = memory.over
    assert 600_000 <= sent < size == len(over.part)


def test_second_image_on_a_connection_is_counted_by_itself(folder: Path, memory: Memory) -> None:
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        first = wire.ask("/x/firmware/firmware-1.9.0.bin", VERSION, MAC_FIELD)
        second = wire.ask("/firmware", VERSION, MAC_FIELD, "Range: bytes=0-9")
        wait_until(lambda: len(memory.over) == 2)
    assert [sent for _, sent in memory.over] == [len(first.body), 10]
    assert len(second.body) == 10


@pytest.mark.parametrize(
    ("method", "version", "status"),
    [("HEAD", "1.0.0", 200), ("GET", "1.10.0", 304), ("GET", "one", 400)],
)
def test_carriers_hear_of_nothing_that_is_no_image(
    folder: Path, memory: Memory, method: str, version: str, status: int
) -> None:
    with standing(memory.site(folder)) as stand, stand.dial() as wire:
        said = f"x-ESP8266-version: {version}"
        assert wire.ask("/firmware", said, MAC_FIELD, method=method).status == status
    assert (memory.begun, memory.over) == ([], [])


def test_pulse_tells_how_long_the_loop_was_busy_and_not_how_long_it_waited(
    folder: Path, memory: Memory
) -> None:
    def dawdle(_event: Event) -> None:
        threading.Event().wait(0.3)

    site = memory.site(folder)
    site = replace(site, listeners=(*site.listeners, dawdle))
    with standing(site, limits=Limits(tick=0.2)) as stand, stand.dial() as wire:
        wait_until(lambda: len(memory.pulses) >= 3)
        idle = min(memory.pulses)
        assert wire.check().status == 200
        wait_until(lambda: max(memory.pulses) >= 0.3)
    assert 0 <= idle < 0.1


# -- Why -------------------------------------------------------------------------------------------

UPDATE = "update: 1.10.0 in the place of 1.0.0"


@pytest.mark.parametrize(
    ("path", "fields", "status", "reason"),
    [
        pytest.param("/firmware", (VERSION,), 200, UPDATE, id="image"),
        pytest.param("/firmware", (VERSION, "Range: bytes=9-"), 206, UPDATE, id="part"),
        pytest.param(
            "/x/firmware/latest.bin", (), 200, "update: 1.10.0 in the place of what it runs",
            id="of-whom-nobody-knows",
        ),
        pytest.param("/firmware", (VERSION, "If-None-Match: *"), 304, UPDATE, id="has-the-bytes"),
        pytest.param(
            "/firmware", ("x-ESP8266-version: 1.10.0",), 304,
            "not-newer: 1.10.0 is not newer than 1.10.0, which the device runs", id="newest",
        ),
        pytest.param(
            "/firmware", ("x-ESP32-version: 1.0.0",), 403,
            "wrong-chip: 1.10.0 is for esp8266, the device is some ESP32", id="other-chip",
        ),
        pytest.param("/fan", (VERSION,), 404, "no project 'fan': .*", id="no-project"),
        pytest.param("/firmware", (), 400, "no x-ESP8266-version or .*", id="no-version"),
        pytest.param("/firmware", (VERSION, "Range: bytes=99999-"), 416, "the file has .*",
                     id="no-such-part"),
        pytest.param("/firmware", (VERSION, "x-ESP8266-mode: version"), 200, UPDATE, id="asks"),
        pytest.param(
            "/firmware", ("x-ESP8266-version: 1.10.0", "x-ESP8266-mode: version"), 200,
            "not-newer: .*", id="asks-newest",
        ),
        pytest.param("/firmware/manifest.json", (), 200, "update: 1.10.0 in .*", id="manifest"),
        pytest.param("/sensor/esp32fota.json", (), 200, "update: 1.1.0 in .*", id="esp32fota"),
        pytest.param("/firmware/esp32fota.json", (), 404, "wrong-chip: .*", id="no-esp32fota"),
    ],
)  # fmt: skip
def test_every_answer_to_a_check_says_why(
    folder: Path, path: str, fields: Sequence[str], status: int, reason: str
) -> None:
    put(folder / "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0"))
    with standing(site_of(folder)) as stand, stand.dial() as wire:
        found = wire.ask(path, *fields)
    assert found.status == status
    assert re.fullmatch(reason, found.headers["x-ota-reason"])


@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
def test_answer_whose_bytes_a_proxy_sends_says_why(folder: Path, accel: str) -> None:
    fields = {"host": "ota", "x-esp8266-version": "1.0.0"}
    reply = answer(site_of(folder, accel=accel), Request("GET", "/firmware", "", fields, PEER))
    assert dict(reply.headers)["X-OTA-Reason"] == UPDATE
    assert reply.body == b""
