"""A building that has its power back, and those who want the server to wait for them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import resource
import selectors
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import put, wait_until
from tests.core.test_command_line import CHECK, serving
from tests.core.test_requests import ESP8266
from tests.core.wire import PATIENCE, Script, Wire, client_context, dial, request
from tests.data.make_images import esp32_image

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
LATEST = 1.0  # seconds that a check may take while others attack; the figure is printed
DEVICE_TIMEOUT = 5.0  # seconds: the shortest patience of a device, esp_https_ota's
DEVICE = (  # the captured head, for {}: the last two bytes of its MAC address
    ESP8266.replace("/update", "/firmware")
    .replace("version: 1.0\n", "version: 1.0.0\n")
    .replace("5C:CF:7F:12:34:56", "5C:CF:7F:00:{:02X}:{:02X}")
    .replace("\n", "\r\n")
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux' /proc")


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    """Thousands of descriptors for the clients; skips where the system does not give them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip(f"needs 6,000 open files, has {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- 1. Clients and servers -----------------------------------------------------------------------


@dataclass(slots=True)
class Visit:
    """What one client of many came back with."""

    received: bytearray = field(default_factory=bytearray)
    seconds: float = 0.0  # from its connect to the end of the connection
    error: str = "still waiting"  # empty once the server has ended the connection in order

    @property
    def status(self) -> int:
        """The status of the reply; 0: none came."""
        match = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", self.received)
        return int(match[1]) if match else 0

    @property
    def body(self) -> bytes:
        """What came behind the head."""
        return bytes(self.received.partition(b"\r\n\r\n")[2])


Steps = Generator[tuple[socket.socket, int], None, None]


def _ready(link: socket.socket, event: int, call: Callable[..., Any], *args: Any) -> Any:
    """What `call` gives back, once the socket is ready for it; a generator for `yield from`."""
    while True:
        try:
            return call(*args)
        except (BlockingIOError, ssl.SSLWantReadError):
            yield link, event
        except ssl.SSLWantWriteError:
            yield link, WRITE


def _steps(port: int, data: bytes, tls: ssl.SSLContext | None, visit: Visit) -> Steps:
    """One client: it connects, sends, reads to the end, and yields what it waits for."""
    begun = time.perf_counter()
    link = socket.socket()
    try:
        link.setblocking(False)
        link.connect_ex(("127.0.0.1", port))
        yield link, WRITE
        link.getpeername()  # OSError: nobody listens
        if tls is not None:
            link = tls.wrap_socket(link, server_hostname="127.0.0.1", do_handshake_on_connect=False)
            yield from _ready(link, READ, link.do_handshake)
        sent = yield from _ready(link, WRITE, link.send, data)
        assert sent == len(data)
        while piece := (yield from _ready(link, READ, link.recv, 65536)):
            visit.received += piece
        visit.error = ""
    except OSError as err:
        visit.error = str(err)
    finally:
        visit.seconds = time.perf_counter() - begun
        link.close()


def all_at_once(port: int, requests: Sequence[bytes], ca: Path | None = None) -> list[Visit]:
    """Clients that all begin at the same instant, in one thread; each ends on its own."""
    tls = client_context(ca) if ca else None
    visits = [Visit() for _ in requests]
    steps = [_steps(port, data, tls, visit) for data, visit in zip(requests, visits, strict=True)]
    end = time.monotonic() + 2 * PATIENCE
    with selectors.DefaultSelector() as selector:

        def advance(each: Steps) -> None:
            with suppress(StopIteration):
                selector.register(*next(each), each)

        for each in steps:
            advance(each)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(0.1):
                selector.unregister(key.fileobj)
                advance(key.data)
    for each in steps:
        each.close()
    return visits


def device(number: int) -> bytes:
    """The whole head of an ESP8266 with a MAC of its own."""
    return DEVICE.format(number >> 8, number & 0xFF).encode() + b"\r\n"


SHIM = """\
import functools, importlib.util, sys
spec = importlib.util.spec_from_file_location("ota_server", sys.argv[3])
ota_server = sys.modules["ota_server"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ota_server)
limits = ota_server.Limits(**{})
ota_server.Server = functools.partial(ota_server.Server, limits=limits)
sys.exit(ota_server.main(sys.argv[4:]))
"""


@contextmanager
def limited(
    folder: Path, *options: str | Path, ca: Path | None = None, **limits: float
) -> Iterator[Script]:
    """The script in a process of its own, with shorter deadlines than anybody can ask for."""
    before = sys.executable, "-I", "-c", SHIM.format(limits)
    tls = ("--cert", ca) if ca else ()
    with serving(folder, *tls, *options, before=before, ca=ca) as script:
        yield script


def held(script: Script) -> int:
    """How many descriptors the server has."""
    return len(os.listdir(f"/proc/{script.process.pid}/fd"))


def resident(script: Script) -> int:
    """Bytes of memory that the server has."""
    pages = Path(f"/proc/{script.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def tell(figure: str) -> None:
    """Shows a measured figure: pytest -s."""
    sys.stdout.write(f"\n{figure}\n")


def assert_calm(script: Script) -> None:
    """It runs and has nothing to complain of."""
    assert script.process.poll() is None
    assert "Traceback" not in script.log
    assert " ERROR " not in script.log


# -- 2. All at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["http", "https"])
def test_a_thousand_devices_at_the_same_instant_all_get_their_image(
    way: str, folder: Path, certificate: Path
) -> None:
    ca = certificate if way == "https" else None
    options = ("--cert", certificate) if ca else ()
    image = (folder / "firmware-1.10.0.bin").read_bytes()
    with serving(folder, *options, "--log", "warning", ca=ca) as script:
        visits = all_at_once(script.port, [device(number) for number in range(1000)], ca)
        assert_calm(script)
    assert {visit.error for visit in visits} == {""}
    assert {visit.status for visit in visits} == {200}
    assert all(visit.body == image for visit in visits)
    slowest = max(visit.seconds for visit in visits)
    tell(f"1,000 devices by {way}: the last has its image after {slowest:.2f} s")
    assert slowest < DEVICE_TIMEOUT


def test_check_by_tls_never_waits_for_a_delayed_ack(folder: Path, certificate: Path) -> None:
    """With Nagle's algorithm a reply behind the tickets of TLS 1.3 waits 40 ms and more."""
    with serving(folder, "--cert", certificate, ca=certificate) as script:
        quickest = min(seconds_of_a_check(script) for _ in range(10))
    tell(f"a check by TLS takes {quickest * 1e3:.1f} ms")
    assert quickest < 0.035


# -- 3. Slow attackers ----------------------------------------------------------------------------


@dataclass(slots=True)
class Attack:
    """Connections that stay open as long as they may and cost as much as they can."""

    port: int
    count: int
    pulse: bytes  # what each sends again and again
    links: dict[int, socket.socket] = field(default_factory=dict)  # by descriptor; still open
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    begun: float = field(default_factory=time.monotonic)
    pulses: int = 0

    def begin(self, opening: bytes) -> None:
        """Connects all of them."""
        for _ in range(self.count):
            link = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
            if opening:
                link.send(opening)
            link.setblocking(False)
            self.links[link.fileno()] = link
            self.selector.register(link, READ)
        self.begun = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since all of them are connected."""
        return time.monotonic() - self.begun

    def go_on(self) -> int:
        """Lets each one send something every second; gives back how many were not dropped."""
        due = int(self.age * self.count) - self.pulses if self.pulse else 0
        self.pulses += due
        for link in list(self.links.values())[: min(due, len(self.links))]:
            with suppress(OSError):
                link.send(self.pulse)
            self.links[link.fileno()] = self.links.pop(link.fileno())  # to the end of the queue
        for key, _ in self.selector.select(0):
            link = self.links[key.fd]
            with suppress(ConnectionError):
                if link.recv(1):
                    continue
            self.selector.unregister(link)
            self.links.pop(key.fd).close()
        return len(self.links)

    def end(self) -> None:
        """Closes what is left."""
        self.selector.close()
        for link in self.links.values():
            link.close()


ATTACKS = [
    pytest.param(2000, b"GET /firm", b"w", False, id="a-byte-a-second"),
    pytest.param(2000, b"", b"", False, id="never-send"),
    pytest.param(500, b"", b"", True, id="tls-never-shake-hands"),
    pytest.param(500, b"\x16\x03\x01", b"", True, id="tls-begin-to-shake-hands"),
]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def seconds_of_a_check(script: Script) -> float:
    """How long a device waits for its image, from connect to the last byte."""
    begun = time.perf_counter()
    with script.dial() as wire:
        assert wire.check().status == 200
    return time.perf_counter() - begun


@pytest.mark.parametrize(("count", "opening", "pulse", "secure"), ATTACKS)
def test_slow_attackers_hold_nobody_and_are_dropped_at_their_deadline(
    count: int, opening: bytes, pulse: bytes, *, secure: bool, folder: Path, certificate: Path
) -> None:
    """A connection that says nothing may wait in the kernel for ever: it costs no descriptor."""
    deadline = 1.0
    ca = certificate if secure else None
    latencies: list[float] = []
    with limited(folder, ca=ca, handshake=deadline, head=deadline, tick=0.05) as script:
        before = held(script)
        attack = Attack(script.port, count, pulse)
        try:
            attack.begin(opening)
            while attack.go_on() and (attack.age < deadline or held(script) > before + 8):
                assert attack.age < deadline + PATIENCE, f"{held(script)} are still held"
                latencies.append(seconds_of_a_check(script))
            tell(
                f"{count} attackers: no cost after {attack.age:.2f} s; "
                f"{len(latencies)} checks meanwhile, p50 {quantile(latencies, 0.5) * 1e3:.1f} ms, "
                f"p99 {quantile(latencies, 0.99) * 1e3:.1f} ms"
            )
        finally:
            attack.end()
        assert_calm(script)
    assert len(latencies) > 20
    assert quantile(latencies, 0.99) < LATEST


@functools.cache
def large_image() -> bytes:
    """An image that takes a slow reader some seconds."""
    return esp32_image("big", "1.0.0", payload=hashlib.shake_128(b"load").digest(400 << 10))


@dataclass(slots=True)
class Reader:
    """A client that reads at its own pace."""

    link: socket.socket
    rate: float  # bytes per second
    begun: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def go_on(self) -> None:
        """Reads what is due."""
        due = int((time.monotonic() - self.begun) * self.rate) - len(self.received)
        while due > 0 and not self.ended:
            try:
                piece = self.link.recv(min(due, 1460))
            except BlockingIOError:
                return
            except ConnectionError:
                piece = b""
            self.ended = not piece
            self.received += piece
            due -= len(piece)


def reader(stack: ExitStack, port: int, rate: float) -> Reader:
    """One with the small window and the small packets of a device, that asks for the image."""
    link = stack.enter_context(socket.socket())
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    link.connect(("127.0.0.1", port))
    link.sendall(request("/big/big-1.0.0.bin", "Connection: close"))
    link.setblocking(False)
    return Reader(link, rate)


def test_slow_reader_is_never_cut_and_one_that_hardly_reads_is(folder: Path) -> None:
    """Time runs 60 times as fast: 2 KB/s are 120, a slow GPRS 50, a byte a minute one a second."""
    put(folder / "big-1.0.0.bin", large_image())
    with ExitStack() as stack:
        script = stack.enter_context(limited(folder, progress=1.0, tick=0.05))
        script.wait_for("/big/big-1.0.0.bin")
        whole = f"of {len(large_image())} bytes of big-1.0.0.bin"
        wait_until(lambda: whole in script.log)  # the line of the download above
        before = script.log.count(whole)
        honest = [reader(stack, script.port, speed) for speed in (120_000, 120_000, 50_000) * 2]
        stalled = [reader(stack, script.port, 1) for _ in range(5)]
        end = time.monotonic() + 2 * PATIENCE
        pace = threading.Event()
        while not all(each.ended for each in honest) and time.monotonic() < end:
            for each in (*honest, *stalled):
                each.go_on()
            pace.wait(0.005)
        assert all(each.received.endswith(large_image()) for each in honest)
        wait_until(lambda: script.log.count(whole) == before + len(honest + stalled))
        lines = [line for line in script.log.splitlines() if whole in line][before:]
        assert sum(" WARNING " in line for line in lines) == len(stalled)
        assert_calm(script)


# -- 4. Memory ------------------------------------------------------------------------------------

CHECKS, WARM = 200_000, 10_000
PIPELINED, ALONE = 900, 100  # checks of a round: on a connection that stays, on one each
KEPT = 4  # connections that stay
MAY_GROW = 2 << 20  # bytes, from the first WARM checks to the last


def check(number: int, *fields: str) -> bytes:
    """The check of a device that has the newest image and a MAC of its own."""
    mac = (0x5CCF7F << 24 | number).to_bytes(6, "big").hex(":").upper()
    return request(CHECK[0], "x-ESP8266-version: 1.10.0", f"x-ESP8266-STA-MAC: {mac}", *fields)


def check_many(port: int, wire: Wire, numbers: range, size: int) -> None:
    """A round: the devices with these numbers all get their 304, of `size` bytes if kept alive."""
    wire.send(b"".join(map(check, numbers[:PIPELINED])))
    replies = wire.read(PIPELINED * size)
    assert replies.count(b"HTTP/1.1 304 ") == PIPELINED
    assert replies.endswith(b"\r\n\r\n")
    alone = [check(number, "Connection: close") for number in numbers[PIPELINED:]]
    visits = all_at_once(port, alone)
    assert [(visit.status, visit.error) for visit in visits] == [(304, "")] * ALONE


def test_memory_does_not_grow_with_the_number_of_checks(folder: Path) -> None:
    """What stays of a connection, 110 bytes or more, or of a check, 11 or more, would be seen."""
    begun = time.monotonic()
    with serving(folder, "--log", "warning") as script, ExitStack() as stack:
        kept = [stack.enter_context(dial(script.port)) for _ in range(KEPT)]
        size = 0
        for wire in kept:
            wire.send(check(0))
            size = len(wire.link.recv(65536))
        figures: list[int] = []
        for first in range(0, CHECKS, PIPELINED + ALONE):
            if first == WARM:
                figures.append(resident(script))
            numbers = range(first, first + PIPELINED + ALONE)
            check_many(script.port, kept[first // len(numbers) % KEPT], numbers, size)
        figures.append(resident(script))
        assert_calm(script)
    before, after = figures
    tell(
        f"{CHECKS} checks, {CHECKS * ALONE // (PIPELINED + ALONE)} of them on new connections, in "
        f"{time.monotonic() - begun:.1f} s: {before >> 10} KiB became {after >> 10} KiB"
    )
    assert after - before < MAY_GROW
