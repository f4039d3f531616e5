"""The files of examples/proxies, as they are, with the real proxies and three real instances.

Each proxy runs on a machine of its own, set up by the commands that its file begins with. Proxies
come balanced (an instance sends the bytes) and offloaded (the proxy does, where --accel says so).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import put, wait_until
from tests.core.test_tls import OVERHEAD, relay
from tests.core.wire import PATIENCE, Answer, Wire, client_context, dial
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Device, Esp32, Esp8266

from .machine import ADDRESS, Machine, lines_to_type, machine, words
from .test_install import ROOT, program

FILES = ROOT / "examples" / "proxies"
XSENDFILE = Path("/usr/lib/apache2/modules/mod_xsendfile.so")
PORTS = (8071, 8072, 8073)
BIG = "/big/big-2.0.0.bin"
ODD = "50% more; a+b#c d-1.0.0.bin"  # a name that has to be escaped on its way
FOREIGN = "größer-1.0.0.bin"
WORD = "secret-of-all"  # the token of all instances: credentials have to pass too
HOST = "ota.example:8443"  # as the clients write it, who come through some router's port
HOP = {"connection", "date", "server", "content-length"}  # of each connection; compared apart
OFFLOADING = {"x-accel-redirect", "x-sendfile"}  # between instance and proxy only


@functools.cache
def big_image() -> bytes:
    """An image that does not fit into all the buffers on its way."""
    return esp32_image("big", "2.0.0", payload=hashlib.shake_128(b"proxy").digest(2 << 20))


@functools.cache
def images() -> Mapping[str, bytes]:
    """What the firmware folder holds."""
    return {
        "firmware-1.0.0.bin": esp8266_image("firmware", "1.0.0"),
        "firmware-2.0.0.bin": esp8266_image("firmware", "2.0.0", payload=bytes(range(256)) * 40),
        "sensor-1.0.0.bin": esp32_image("sensor", "1.0.0"),
        "sensor-2.0.0.bin": esp32_image("sensor", "2.0.0", payload=bytes(range(256)) * 40),
        "big-2.0.0.bin": big_image(),
        "moved-1.0.0.bin": esp32_image("moved", "1.0.0"),
        ODD: esp8266_image("odd", "1.0.0"),
        FOREIGN: esp8266_image("foreign", "1.0.0"),
    }


def path_of(name: str) -> str:
    """Where a file is fetched by its name."""
    return quote(f"/{name.rpartition('-')[0]}/{name}")


def without(headers: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """The other fields."""
    return {name: value for name, value in headers.items() if name not in names}


def md5(data: bytes) -> str:
    """As x-MD5 says it."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# -- 1. The proxies, and what is behind them ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proxy:
    """One proxy: its file, its programs, how it runs in the foreground."""

    file: str
    programs: tuple[str, ...]
    command: str  # in a shell, inside
    pem: str  # where its file wants certificate and key
    log: str = ""  # of requests
    accel: str = ""  # the option that lets it send the bytes
    sockets: bool = False  # the instances listen on unix sockets, as its file says at the beginning


NGINX = Proxy(
    "nginx.conf",
    ("nginx",),
    "exec nginx -g 'daemon off;'",
    "/etc/ssl/private/ota.pem",
    log="var/log/nginx/ota.log",
)
APACHE = Proxy(
    "apache.conf",
    ("apache2", "a2enmod"),
    ". /etc/apache2/envvars; mkdir -p $APACHE_RUN_DIR; exec apache2 -D FOREGROUND",
    "/etc/ssl/private/ota.pem",
    log="var/log/apache2/ota.log",
)
CADDY = Proxy(
    "Caddyfile",
    ("caddy",),
    "exec caddy run --config /etc/caddy/Caddyfile",
    "/etc/caddy/ota.pem",
)
TRAEFIK = Proxy(
    "traefik.yml",
    ("traefik",),
    "exec traefik --configfile=/etc/traefik/traefik.yml",
    "/etc/traefik/ota.pem",
)
PROXIES = {
    "nginx-balanced": NGINX,
    "nginx-offloaded": replace(NGINX, accel="--accel nginx:/_fw/", sockets=True),
    "apache-balanced": APACHE,
    "apache-offloaded": replace(APACHE, accel="--accel apache"),
    "caddy": CADDY,
    "traefik": TRAEFIK,
}
NGINXES = [name for name in PROXIES if name.startswith("nginx")]
IN_C = [*NGINXES, *(name for name in PROXIES if name.startswith("apache"))]  # TLS by OpenSSL


@dataclass(slots=True)
class Stand:
    """A proxy with three instances behind it."""

    proxy: Proxy
    machine: Machine
    ca: Path
    instances: dict[int, subprocess.Popen[str]] = field(default_factory=dict)  # by port

    def start_instances(self) -> None:
        """Starts those that do not run, by the commands in the proxy's file."""
        started = []
        for line in self.to_type("python3 "):
            port = int(re.findall(r"807\d", line)[0])
            if port not in self.instances:
                command = [*words(line), *self.proxy.accel.split(), "--token", WORD]
                self.instances[port] = self.machine.start(*command, log=str(port))
                started.append(self.instances[port])
        for instance in started:
            assert instance.stdout
            assert instance.stdout.readline(), self.log()

    def to_type(self, first: str) -> Sequence[str]:
        """The commands with this first word in the comment of the proxy's file."""
        lines = lines_to_type((FILES / self.proxy.file).read_text())
        mine = [line for line in lines if line.startswith(first)]
        if first == "python3 ":
            return [line for line in mine if ("unix:" in line) == self.proxy.sockets]
        return [line for line in mine if self.proxy.sockets or "unix:" not in line]

    def kill(self, port: int) -> None:
        """Ends an instance without a warning."""
        instance = self.instances.pop(port)
        instance.send_signal(signal.SIGKILL)
        with instance:
            instance.wait(PATIENCE)

    def log(self, port: int | None = None) -> str:
        """What an instance has logged, or all have."""
        ports = PORTS if port is None else (port,)
        return "".join((self.machine.folder / str(each)).read_text() for each in ports)

    @contextmanager
    def dial(self, *, receive_buffer: int = 0) -> Iterator[Wire]:
        """A connection to the proxy."""
        with dial(443, self.ca, host=ADDRESS, receive_buffer=receive_buffer) as wire:
            yield wire

    @contextmanager
    def dial_instance(self, port: int) -> Iterator[Wire]:
        """A connection to an instance."""
        if not self.proxy.sockets:
            with dial(port) as wire:
                yield wire
            return
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(PATIENCE)
            link.connect(str(self.machine.path(f"run/ota-{port}.sock")))
            yield Wire(link)

    def ask(
        self, path: str = "/healthz", *fields: str, method: str = "GET", http: str = "1.1"
    ) -> Answer:
        """The proxy's reply to one request on a connection of its own."""
        with self.dial() as wire:
            return ask(wire, path, *fields, method=method, http=http)

    def direct(self, path: str, *fields: str, method: str = "GET", port: int = 8071) -> Answer:
        """An instance's reply to that request, as the proxy would pass it on."""
        with self.dial_instance(port) as wire:
            return ask(wire, path, *fields, "X-Forwarded-Proto: https", method=method)

    def esp8266(self, path: str = "/ota/firmware") -> Esp8266:
        """A new ESP8266 with the sketch `firmware`."""
        image = images()["firmware-1.0.0.bin"]
        return Esp8266(
            host=ADDRESS, port=443, path=path, image=image, tls_ca=self.ca, user=f"user:{WORD}"
        )

    def esp32(self, path: str = "/ota/sensor") -> Esp32:
        """A new ESP32 with the sketch `sensor` and room for the large image."""
        image = images()["sensor-1.0.0.bin"]
        device = Esp32(
            host=ADDRESS, port=443, path=path, image=image, tls_ca=self.ca, user=f"user:{WORD}"
        )
        device.free_space = 2**24
        return device

    def is_ready(self) -> bool:
        """Whether every instance has checked every file, and the proxy answers."""
        asked = itertools.product(self.instances, map(path_of, images()))
        try:
            heads = (self.direct(path, method="HEAD", port=port) for port, path in asked)
            return all(head.status == 200 for head in itertools.chain(heads, [self.ask()]))
        except (ConnectionError, ssl.SSLError):  # not yet
            return False


def ask(wire: Wire, path: str, *fields: str, method: str = "GET", http: str = "1.1") -> Answer:
    """The reply to the one request of a connection, which must end with its last byte."""
    fields = (f"Host: {HOST}", *fields, "Connection: close")
    if not any(line.startswith("Authorization: ") for line in fields):
        fields = (f"Authorization: Bearer {WORD}", *fields)
    wire.send("\r\n".join((f"{method} {path} HTTP/{http}", *fields, "", "")).encode())
    head, _, body = wire.rest().partition(b"\r\n\r\n")
    first, *sent = head.decode("ascii").split("\r\n")
    pairs = [line.split(": ", 1) for line in sent]
    headers = {name.lower(): value for name, value in pairs}
    assert re.match(r"HTTP/1\.[01] \d{3} ", first), first
    assert len(headers) == len(pairs), f"a field came twice: {sent}"
    assert "transfer-encoding" not in headers, "devices do not read chunks"
    status = int(first[9:12])
    if method != "HEAD" and status not in {304, 416}:  # Apache's own page comes without a length
        assert int(headers["content-length"]) == len(body)
    return Answer(status, headers, body)


@contextmanager
def standing(proxy: Proxy, folder: Path) -> Iterator[Stand]:
    """The proxy, its file, three instances, all ready."""
    for name in ("openssl", *proxy.programs):
        program(name)
    if proxy.accel == "--accel apache" and not XSENDFILE.exists():
        pytest.skip(f"{XSENDFILE} is missing")
    with machine(folder) as inner:
        for name, image in images().items():
            put(inner.firmware / name, image)
        stand = Stand(proxy, inner, certificate(folder))
        inner.run("\n".join((f"install -D {stand.ca} {proxy.pem}", *stand.to_type("sudo "))))
        with inner.entered():
            stand.start_instances()
            beside = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
            inner.start("env", beside, "sh", "-c", proxy.command, log="proxy")
            wait_until(stand.is_ready)
            yield stand


def certificate(folder: Path) -> Path:
    """Key and certificate of the machine in one file, as the README makes them."""
    pem = folder / "ota.pem"
    key = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=ota"
    names = f"subjectAltName=DNS:ota.example,DNS:{ADDRESS},IP:{ADDRESS}"
    command = [*key.split(), "-addext", names, "-keyout", str(pem), "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True)
    return pem


@pytest.fixture(scope="module", params=PROXIES)
def everywhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    """Each proxy in turn, once for all tests of this module."""
    with standing(PROXIES[request.param], tmp_path_factory.mktemp(request.param)) as stand:
        yield stand


@pytest.fixture
def stand(everywhere: Stand) -> Iterator[Stand]:
    """The same; what a test has killed runs again."""
    with everywhere.machine.entered():
        yield everywhere
        if len(everywhere.instances) < len(PORTS):
            everywhere.start_instances()
            wait_until(everywhere.is_ready)


# -- 2. What passes through -----------------------------------------------------------------------


def test_devices_get_their_update_and_then_nothing(stand: Stand) -> None:
    for device in (stand.esp8266(), stand.esp32()):
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "2.0.0")
        assert (device.update(), device.last_status) == ("HTTP_UPDATE_NO_UPDATES", 304)
        assert device.last_headers["x-ota-reason"].startswith("not-newer: ")


def test_devices_are_told_why_they_get_nothing(stand: Stand) -> None:
    foreign, lost = stand.esp32("/ota/firmware"), stand.esp8266("/ota/toaster")
    assert (foreign.update(), foreign.last_error) == ("HTTP_UPDATE_FAILED", -103)
    assert foreign.last_headers["x-ota-reason"].startswith("wrong-chip: ")
    assert (lost.update(), lost.last_error) == ("HTTP_UPDATE_FAILED", -102)


@pytest.mark.parametrize("http", ["1.0", "1.1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ["firmware-2.0.0.bin", "big-2.0.0.bin", ODD, FOREIGN])
def test_image_comes_as_the_instance_promises_it(
    stand: Stand, method: str, http: str, name: str
) -> None:
    path = path_of(name)
    promised = stand.direct(path, method="HEAD").headers
    gzip = "Accept-Encoding: gzip, deflate, br, zstd"
    answer = stand.ask(path, gzip, method=method, http=http)
    assert answer.status == 200
    assert answer.body == (images()[name] if method == "GET" else b"")
    assert answer.headers["content-length"] == str(len(images()[name]))
    assert answer.headers["x-md5"] == md5(images()[name])
    kept = without(promised, HOP | OFFLOADING)
    assert {"x-sha256", "x-version", "etag", "last-modified", "content-disposition"} <= kept.keys()
    assert kept.items() <= answer.headers.items()
    assert not answer.headers.keys() & (OFFLOADING | {"content-encoding"})


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        pytest.param("/", (), 200, id="page"),
        pytest.param("/healthz", (), 200, id="health"),
        pytest.param("/firmware/versions", (), 200, id="versions"),
        pytest.param("/firmware/manifest.json", (), 200, id="manifest"),
        pytest.param("/sensor/esp32fota.json", (), 200, id="esp32fota"),
        pytest.param("/firmware/latest.bin.md5", (), 200, id="md5"),
        pytest.param("/firmware", ("x-ESP8266-version: 2.0.0",), 304, id="nothing-new"),
        pytest.param("/firmware", ("x-ESP32-version: 1.0.0",), 403, id="wrong-chip"),
        pytest.param("/firmware", (), 400, id="by-name-only"),
        pytest.param("/toaster", ("x-ESP8266-version: 1.0.0",), 404, id="unknown"),
        pytest.param("/firmware/versions", ("Authorization: Bearer x",), 401, id="wrong-token"),
    ],
)
def test_text_comes_as_the_instance_sends_it(
    stand: Stand, path: str, fields: Sequence[str], status: int
) -> None:
    sent = stand.direct(path, *fields)
    came = stand.ask(path, *fields, "Accept-Encoding: gzip")
    assert (came.status, came.body) == (sent.status, sent.body)
    assert came.status == status
    assert without(sent.headers, HOP).items() <= came.headers.items()
    assert status == 304 or came.headers["content-length"] == str(len(sent.body))
    assert "content-encoding" not in came.headers


@pytest.mark.parametrize(
    ("fields", "status", "part"),
    [
        pytest.param(("Range: bytes=0-99",), 206, slice(0, 100), id="first"),
        pytest.param(("Range: bytes=5000-",), 206, slice(5000, None), id="rest"),
        pytest.param(("Range: bytes=-7",), 206, slice(-7, None), id="last"),
        pytest.param(("Range: bytes=0-1,5-6",), 200, slice(None), id="two"),
        pytest.param(("Range: bytes=0-99", "If-Range: {etag}"), 206, slice(0, 100), id="if-range"),
        pytest.param(("Range: bytes=0-99", "If-Range: {date}"), 206, slice(0, 100), id="if-date"),
        pytest.param(("Range: bytes=0-99", 'If-Range: "old"'), 200, slice(None), id="if-range-old"),
        pytest.param(("If-None-Match: {etag}",), 304, slice(0), id="none-match"),
        pytest.param(('If-None-Match: "old", {etag}',), 304, slice(0), id="none-match-of-two"),
        pytest.param(('If-None-Match: "old"',), 200, slice(None), id="none-match-old"),
        pytest.param(("If-Modified-Since: {date}",), 304, slice(0), id="modified-since"),
        pytest.param(
            ('If-None-Match: "old"', "If-Modified-Since: {date}"), 200, slice(None), id="tag-first"
        ),
    ],
)
def test_parts_and_conditions_mean_the_same(
    stand: Stand, fields: Sequence[str], status: int, part: slice
) -> None:
    image, path = images()["sensor-2.0.0.bin"], "/sensor/sensor-2.0.0.bin"
    known = stand.direct(path, method="HEAD").headers
    filled = [line.format(etag=known["etag"], date=known["last-modified"]) for line in fields]
    answer = stand.ask(path, *filled)
    assert (answer.status, answer.body) == (status, image[part])
    assert answer.headers["etag"] == known["etag"]
    if status == 206:
        start, stop, _ = part.indices(len(image))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(image)}"
        assert answer.headers["x-md5"] == known["x-md5"]


def test_range_behind_the_end_is_416(stand: Stand) -> None:
    size = len(images()["sensor-2.0.0.bin"])
    answer = stand.ask("/sensor/sensor-2.0.0.bin", f"Range: bytes={size}-")
    assert answer.status == 416
    if stand.proxy.accel != "--accel apache":  # which sends a page of its own
        assert answer.headers["content-range"] == f"bytes */{size}"


# -- 3. Who asks, and by which name ---------------------------------------------------------------


def test_log_has_the_address_of_the_device_whatever_it_claims(stand: Stand) -> None:
    mac = "5C:CF:7F:00:00:01"
    claims = ("X-Forwarded-For: 6.6.6.6", "X-Real-IP: 6.6.6.6", "Forwarded: for=6.6.6.6")
    fields = ("x-ESP8266-version: 1.0.0", f"x-ESP8266-STA-MAC: {mac}", *claims)
    assert stand.ask("/firmware", *fields).status == 200
    wait_until(lambda: mac in stand.log())
    lines = [line for line in stand.log().splitlines() if mac in line]
    assert all(f" {mac} {ADDRESS} " in line for line in lines), lines
    assert "6.6.6.6" not in stand.log()


def test_urls_have_the_name_and_port_that_the_client_used(stand: Stand) -> None:
    claims = ("X-Forwarded-Host: evil.example", "X-Forwarded-Proto: http", "X-Forwarded-Port: 1")
    manifest = json.loads(stand.ask("/x/sensor/esp32fota.json", *claims).body)
    assert manifest["url"].startswith(f"https://{HOST}/")
    assert manifest["url"].endswith("/sensor/sensor-2.0.0.bin")
    assert b"evil" not in stand.ask("/", *claims).body


@pytest.mark.parametrize("everywhere", NGINXES, indirect=True)
def test_folder_of_the_firmware_is_reached_only_through_an_instance(stand: Stand) -> None:
    for path in ("/_fw/sensor-2.0.0.bin", "/%5Ffw/sensor-2.0.0.bin", "/x/..//_fw/sensor-2.0.0.bin"):
        assert stand.ask(path, "X-Accel-Redirect: /_fw/sensor-2.0.0.bin").status == 404


@pytest.mark.parametrize("everywhere", IN_C, indirect=True)
def test_log_of_the_proxy_holds_no_token(stand: Stand) -> None:
    assert stand.ask(f"/firmware/versions?token={WORD}").status == 200
    wait_until(lambda: "/firmware/versions" in stand.machine.path(stand.proxy.log).read_text())
    assert WORD not in stand.machine.path(stand.proxy.log).read_text()


# -- 4. When something changes --------------------------------------------------------------------


def test_rewritten_file_is_new_to_whoever_has_the_old_one(stand: Stand) -> None:
    path, file = "/moved/moved-1.0.0.bin", stand.machine.firmware / "moved-1.0.0.bin"
    before, status = stand.direct(path, method="HEAD").headers, file.stat()
    image = esp32_image("m0ved", "1.0.0")
    assert len(image) == status.st_size
    file.write_bytes(image)
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))  # a proxy sees no difference

    def is_seen() -> bool:
        heads = [stand.direct(path, method="HEAD", port=port) for port in PORTS]
        return all(head.headers.get("x-md5") == md5(image) for head in heads)

    wait_until(is_seen)
    for fields in (
        (f"If-None-Match: {before['etag']}",),
        (f"If-None-Match: {before['etag']}", f"If-Modified-Since: {before['last-modified']}"),
        (f"If-Range: {before['etag']}", "Range: bytes=5-"),
    ):
        answer = stand.ask(path, *fields)
        assert (answer.status, answer.headers["x-md5"], answer.body) == (200, md5(image), image)


@dataclass(slots=True)
class Fleet:
    """Devices that update all the time, each from the old version, until stopped."""

    make: Callable[[], Device]
    outcomes: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def live(self) -> None:
        """One of them: what fails once may not fail twice in a row."""
        while not self.over.is_set():
            outcome = self.make().update()
            if outcome == "HTTP_UPDATE_FAILED":
                self.outcomes.append("again")
                outcome = self.make().update()
            self.outcomes.append(outcome)

    @contextmanager
    def living(self, count: int) -> Iterator[None]:
        """That many at once."""
        threads = [threading.Thread(target=self.live) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            for thread in threads:
                thread.join(PATIENCE)

    def go_on(self, count: int) -> None:
        """Waits for so many more outcomes."""
        goal = len(self.outcomes) + count
        wait_until(lambda: len(self.outcomes) >= goal)


def test_dead_instance_costs_a_device_nothing(stand: Stand) -> None:
    stand.kill(8071)
    assert {stand.esp8266().update() for _ in range(6)} == {"HTTP_UPDATE_OK"}


def test_instance_killed_in_mid_run_costs_a_device_one_retry_at_most(stand: Stand) -> None:
    fleet = Fleet(stand.esp8266)
    with fleet.living(4):
        fleet.go_on(20)
        stand.kill(8072)
        fleet.go_on(60)
    counts = Counter(fleet.outcomes)
    assert counts.keys() <= {"HTTP_UPDATE_OK", "again"}
    assert counts["again"] <= 4, "only what was on its way when it was killed"


def test_killed_in_the_middle_of_a_download(stand: Stand) -> None:
    image, mac = big_image(), "24:6F:28:00:00:02"
    fields = ("x-ESP32-version: 1.0.0", f"x-ESP32-STA-MAC: {mac}", f"Authorization: Bearer {WORD}")
    with stand.dial(receive_buffer=4096) as wire:
        request = (f"GET {BIG} HTTP/1.0", f"Host: {HOST}", *fields, "", "")
        wire.send("\r\n".join(request).encode())
        start = wire.read(100_000)
        wait_until(lambda: mac in stand.log())
        [port] = [port for port in PORTS if mac in stand.log(port)]
        stand.kill(port)
        head, _, received = (start + wire.rest()).partition(b"\r\n\r\n")
    assert f"content-length: {len(image)}\r\n".encode() in head.lower() + b"\r\n"
    assert received == image[: len(received)], "never other bytes"
    assert (len(received) == len(image)) == bool(stand.proxy.accel)
    device = stand.esp32("/big")
    assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "2.0.0")


# -- 5. TLS that small devices can do -------------------------------------------------------------


@pytest.mark.parametrize("everywhere", IN_C, indirect=True)
@pytest.mark.parametrize("limit", [512, 1024])
def test_max_fragment_length_is_honoured(stand: Stand, limit: int) -> None:
    with relay(443, ADDRESS) as between:
        output = s_client(stand, between.port, "-tls1_2", "-maxfraglen", str(limit))
    assert output.partition(b"\r\n\r\n")[2] == images()["sensor-2.0.0.bin"]
    assert max(between.records()) <= limit + OVERHEAD


@pytest.mark.parametrize("everywhere", NGINXES, indirect=True)
def test_records_of_nginx_suit_a_device_that_asks_for_nothing(stand: Stand) -> None:
    with relay(443, ADDRESS) as between:
        s_client(stand, between.port, "-tls1_2")
    assert max(between.records()) <= 2048 + OVERHEAD


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"), id="tls-1.2"),
        pytest.param(("-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"), id="tls-1.3"),
    ],
)
def test_one_curve_and_one_cipher_of_a_device_are_enough(
    stand: Stand, options: Sequence[str]
) -> None:
    with relay(443, ADDRESS) as between:
        output = s_client(stand, between.port, *options, "-groups", "P-256")
    assert output.partition(b"\r\n\r\n")[2] == images()["sensor-2.0.0.bin"]


def s_client(stand: Stand, port: int, *options: str) -> bytes:
    """What a client of OpenSSL gets that asks for an image."""
    openssl = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-quiet"]
    verify = ["-CAfile", str(stand.ca), "-verify_return_error", "-servername", "ota.example"]
    path = f"/sensor/sensor-2.0.0.bin?token={WORD}"
    request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
    done = subprocess.run(
        [*openssl, *verify, *options],
        input=request.encode(),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("everywhere", IN_C, indirect=True)
def test_session_is_resumed_by_its_id(stand: Stand) -> None:
    context = client_context(stand.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET  # BearSSL, the library of the ESP8266, knows only ids
    session, resumed = None, []
    for _ in range(3):
        plain = socket.create_connection((ADDRESS, 443), PATIENCE)
        with context.wrap_socket(plain, server_hostname=ADDRESS, session=session) as link:
            assert ask(Wire(link), "/healthz").status == 200
            resumed.append(bool(link.session_reused))
            session = link.session
    assert resumed == [False, True, True]
