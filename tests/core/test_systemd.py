"""Unix sockets, what systemd hands over, and paced downloads: real processes and descriptors."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from ota_server import Limits, LogLines, Reply, Request, Route, Site, text_reply
from tests.conftest import put, site_of, wait_until
from tests.core.test_command_line import LOCAL, complaint, record, run
from tests.core.test_server import BIG, SLOW, large_image
from tests.core.wire import (
    PATIENCE,
    Wire,
    client_context,
    copy_of_script,
    dial,
    request,
    standing,
    started,
)

CHECK = request("/firmware", "x-ESP8266-version: 1.0.0", "Connection: close")
# Only the process itself knows its number: this becomes the script, as what systemd forks does.
BECOME = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(params=["plain", "tls"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None without TLS."""
    return certificate if request.param == "tls" else None


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket's."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """The firmware folder with a large image in it."""
    put(folder / "big-1.0.0.bin", large_image())
    return folder


@contextmanager
def dial_file(path: Path | str, ca: Path | None = None) -> Iterator[Wire]:
    """A connection to a unix socket, by TLS if there is a certificate to trust."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PATIENCE)
        link.connect(str(path))
        if ca is None:
            yield Wire(link)
            return
        with client_context(ca).wrap_socket(link, server_hostname="127.0.0.1") as secure:
            yield Wire(secure)


def at_file(site: Site, path: Path) -> Site:
    """The site on a unix socket."""
    return replace(site, config=replace(site.config, host=f"unix:{path}"))


# -- 1. Unix sockets ------------------------------------------------------------------------------


def test_unix_socket_is_listened_on_named_and_removed_at_the_end(folder: Path, short: Path) -> None:
    path = short / "ota.sock"
    with started(folder.parent, "--dir", folder, "--host", f"unix:{path}") as script:
        assert script.line.startswith(f"unix:{path} serves {folder}: ")
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with dial_file(path) as wire:
            wait_until(lambda: wire.check().status == 200)
            assert wire.check("1.10.0").status == 304
        assert script.end(signal.SIGTERM) == 0
        assert not path.exists()
        assert "- unix firmware 1.0.0 -> 1.10.0" in script.log
        assert "Traceback" not in script.log


def test_large_image_arrives_identical_by_a_unix_socket(
    ca: Path | None, big_folder: Path, short: Path
) -> None:
    site = at_file(site_of(big_folder), short / "s")
    with standing(site, ca), dial_file(short / "s", ca) as wire:
        for _ in range(2):
            assert wire.ask(BIG).body == large_image()
        assert wire.ask().status == 200


def test_socket_file_of_a_dead_server_is_replaced(folder: Path, short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short / "s"))
    with standing(at_file(site_of(folder), short / "s")), dial_file(short / "s") as wire:
        assert wire.check().status == 200


def test_socket_file_of_a_living_server_is_left_alone(folder: Path, short: Path) -> None:
    with standing(at_file(site_of(folder), short / "s")):
        result = run(folder.parent, "--dir", folder, "--host", f"unix:{short / 's'}")
        assert "in use" in complaint(result)
        with dial_file(short / "s") as wire:
            assert wire.check().status == 200


def test_file_that_is_no_socket_is_left_alone(folder: Path, short: Path) -> None:
    (short / "s").write_text("precious")
    result = run(folder.parent, "--dir", folder, "--host", f"unix:{short / 's'}")
    assert "in use" in complaint(result)
    assert (short / "s").read_text() == "precious"


def test_next_server_may_start_while_the_last_one_finishes(big_folder: Path, short: Path) -> None:
    site = at_file(site_of(big_folder), short / "s")
    with ExitStack() as stack:
        with standing(site) as old:
            slow = stack.enter_context(dial_file(short / "s"))
            slow.send(request(BIG))
            assert slow.head().status == 200
            old.server.drain()
            wait_until(lambda: not (short / "s").exists())
            stack.enter_context(standing(site))
            assert slow.rest() == large_image()
        with dial_file(short / "s") as wire:
            assert wire.check().status == 200


# -- 2. Socket activation -------------------------------------------------------------------------


@contextmanager
def activated(
    folder: Path,
    passed: int,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """The script, started as systemd does with a socket, once it has said where it listens."""
    script = [sys.executable, "-I", str(copy_of_script(folder.parent)), "--dir", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-I", "-c", BECOME, str(passed), *script, *map(str, options)],
        env={"LISTEN_FDS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(passed,),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """What it says at start."""
    assert process.stdout is not None
    return process.stdout.readline()


def listener(family: socket.AddressFamily, short: Path) -> socket.socket:
    """A socket that listens, as systemd makes it."""
    made = socket.socket(family)
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    addresses = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}
    made.bind(addresses.get(family, str(short / "s")))
    made.listen()
    return made


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_socket_of_systemd_is_taken_instead_of_host_and_port(
    family: socket.AddressFamily, folder: Path, short: Path
) -> None:
    with listener(family, short) as sock:
        address = sock.getsockname()
        with activated(folder, sock.fileno(), "--host", "192.0.2.1", "--port", "1") as process:
            urls = {socket.AF_INET: "http://127.0.0.1", socket.AF_INET6: "http://[::1]"}
            url = f"{urls[family]}:{address[1]}/" if family in urls else f"unix:{address}"
            assert line_of(process).startswith(f"{url} serves ")
            with socket.socket(family) as link:
                link.settimeout(PATIENCE)
                link.connect(address)
                wire = Wire(link)
                wait_until(lambda: wire.check().status == 200)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        if family == socket.AF_UNIX:
            assert os.path.exists(address)  # it is systemd's


def test_sockets_for_another_process_are_none_of_ours(folder: Path) -> None:
    env = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    with started(folder.parent, "--dir", folder, *LOCAL, env=env) as script:
        script.wait_for("/healthz")


@pytest.mark.parametrize("kind", ["two", "datagram", "silent", "file"])
def test_socket_of_systemd_that_does_not_do_is_one_clear_line(
    kind: str, folder: Path, short: Path
) -> None:
    with ExitStack() as stack:
        passed: int
        if kind == "file":
            passed = stack.enter_context((short / "f").open("w")).fileno()
        elif kind == "two":
            passed = stack.enter_context(listener(socket.AF_INET, short)).fileno()
        else:
            kinds = {"datagram": socket.SOCK_DGRAM, "silent": socket.SOCK_STREAM}
            passed = stack.enter_context(socket.socket(socket.AF_INET, kinds[kind])).fileno()
        env = {"LISTEN_FDS": "2" if kind == "two" else "1"}
        with activated(folder, passed, env=env) as process:
            said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert said[0] == ""
    assert re.fullmatch(r"ota-server: the socket from systemd: [^\n]+\n", said[1]), said[1]


def test_no_connection_is_lost_over_restarts(
    ca: Path | None, folder: Path, short: Path, certificate: Path
) -> None:
    options = ("--cert", certificate) if ca else ()
    statuses: list[int] = []
    failures: list[Exception] = []
    ended = threading.Event()

    def ask_for_ever(port: int) -> None:
        while not ended.is_set():
            try:
                with dial(port, ca) as wire:
                    wire.send(CHECK)
                    statuses.append(wire.reply().status)
            except (OSError, EOFError) as err:
                failures.append(err)
                return

    def wait_for_answers(count: int) -> None:
        wait_until(lambda: len(statuses) > count or bool(failures))

    with listener(socket.AF_INET, short) as sock, ExitStack() as stack:
        port = sock.getsockname()[1]
        devices = [threading.Thread(target=ask_for_ever, args=(port,)) for _ in range(4)]
        try:
            for turn in range(5):
                with activated(folder, sock.fileno(), *options, "--log", "error") as process:
                    assert line_of(process)
                    if turn == 0:
                        for device in devices:
                            device.start()
                            stack.callback(device.join, 2 * PATIENCE)
                    asked = len(statuses)
                    wait_for_answers(asked + 40)
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(PATIENCE) == 0
            with activated(folder, sock.fileno(), *options) as process:
                asked = len(statuses)
                wait_for_answers(asked + 8)
                ended.set()
                for device in devices:
                    device.join(2 * PATIENCE)
        finally:
            ended.set()
    assert failures == []
    assert set(statuses) <= {200, 503}  # 503: the image is not checked yet


# -- 3. The end -----------------------------------------------------------------------------------


def hear(link: socket.socket, incoming: ssl.MemoryBIO) -> None:
    """Gives TLS what the server says next, which must be something."""
    assert incoming.write(link.recv(65536))


def test_client_that_came_before_the_end_is_still_answered(ca: Path | None, folder: Path) -> None:
    with standing(site_of(folder), ca) as stand, ExitStack() as stack:
        place = ("127.0.0.1", stand.port)
        link = stack.enter_context(socket.create_connection(place, PATIENCE))
        if ca is None:
            link.sendall(CHECK[:9])
        else:  # the first bytes of its handshake, the rest when the server is about to stop
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client_context(ca).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            hello = outgoing.read()
            link.sendall(hello[:9])
        assert stand.is_fine()
        stand.server.drain()
        wait_until(lambda: stand.server.socket.fileno() < 0)
        if ca is None:
            link.sendall(CHECK[9:])
            assert Wire(link).reply().closes
            return
        link.sendall(hello[9:])
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                hear(link, incoming)
        tls.write(CHECK)
        link.sendall(outgoing.read())
        received = b""
        while b"\r\n\r\n" not in received:
            try:
                received += tls.read(65536)
            except ssl.SSLWantReadError:
                hear(link, incoming)
        assert received.startswith(b"HTTP/1.1 200 ")


def test_request_that_comes_as_the_server_is_told_to_stop_is_answered(
    ca: Path | None, folder: Path
) -> None:
    asked, told = threading.Event(), threading.Event()

    def slow(_site: Site, _request: Request) -> Reply:
        asked.set()
        told.wait(PATIENCE)
        return text_reply(200, "late")

    site = site_of(folder)
    site = replace(site, routes=(Route(re.compile("/slow"), slow), *site.routes))
    limits = Limits(tick=60)
    with standing(site, ca, limits=limits) as stand, stand.dial() as kept, stand.dial() as other:
        assert kept.check().status == 200
        other.send(request("/slow"))
        assert asked.wait(PATIENCE)
        kept.send(CHECK)  # while the loop is busy
        stand.server.drain()
        told.set()
        assert other.reply().status == 200
        assert kept.reply().status == 200


# -- 4. Watchdog ----------------------------------------------------------------------------------


@contextmanager
def notified(short: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The socket on which systemd is told things, and the environment that names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(PATIENCE)
        systemd.bind(str(short / "notify"))
        yield systemd, {"NOTIFY_SOCKET": str(short / "notify")}


def test_watchdog_hears_from_an_idle_loop_in_time(folder: Path, short: Path) -> None:
    with notified(short) as (systemd, env):
        watched = env | {"WATCHDOG_USEC": "800000"}
        with started(folder.parent, "--dir", folder, *LOCAL, env=watched):
            assert systemd.recv(100) == b"READY=1"
            start = time.monotonic()
            for _ in range(6):
                assert systemd.recv(100) == b"WATCHDOG=1"
            assert time.monotonic() - start < 6 * 0.4 + 1  # and a second for a busy machine


def test_watchdog_does_not_hear_from_a_loop_that_hangs(folder: Path, short: Path) -> None:
    """The file of tokens becomes a pipe that nobody writes to: whoever reads it waits."""
    tokens = short / "tokens"
    tokens.write_text("secret")
    options = ("--dir", folder, "--token-file", tokens, *LOCAL)
    with (
        notified(short) as (systemd, env),
        started(folder.parent, *options, env=env | {"WATCHDOG_USEC": "400000"}) as script,
    ):
        script.wait_for("/healthz")
        os.mkfifo(short / "pipe")
        os.replace(short / "pipe", tokens)
        with script.dial() as wire:
            wire.send(request("/firmware", "Authorization: Bearer secret"))
            systemd.settimeout(0.8)  # two periods of the watchdog
            with pytest.raises(TimeoutError):
                deque(iter(lambda: systemd.recv(100), b""))  # what was said before
            systemd.settimeout(PATIENCE)
            tokens.write_text("secret")
            assert wire.reply().status == 400  # no version: the loop goes on
            assert systemd.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
def test_without_a_watchdog_of_ours_nobody_is_told(
    env: Mapping[str, str], folder: Path, short: Path
) -> None:
    with notified(short) as (systemd, place):
        with started(folder.parent, "--dir", folder, *LOCAL, env={**place, **env}) as script:
            script.wait_for("/healthz")
            assert script.end(signal.SIGTERM) == 0
        assert [systemd.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


# -- 5. Journal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "start"),
    [
        (logging.DEBUG, "<7>DEBUG "),
        (logging.INFO, "<6>INFO "),
        (logging.WARNING, "<4>WARNING "),
        (logging.ERROR, "<3>ERROR "),
        (logging.CRITICAL, "<2>CRITICAL "),
    ],
)
def test_line_for_the_journal_begins_with_its_priority(level: int, start: str) -> None:
    stream = StringIO()
    lines = LogLines(stream, journal=True)
    lines.handle(record(level, "it is %s", "so"))
    lines.flush()
    assert stream.getvalue() == f"{start}it is so\n"


def test_each_line_of_a_trace_has_the_priority() -> None:
    stream = StringIO()
    try:
        int("two\nlines")
    except ValueError:
        trace = record(logging.ERROR, "it failed")
        trace.exc_info = sys.exc_info()
    LogLines(stream, journal=True).handle(trace)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 5
    assert all(line.startswith("<3>") for line in lines)
    assert lines[0] == "<3>ERROR it failed"
    assert lines[-1].startswith("<3>ValueError: ")


@pytest.mark.parametrize("same", [True, False], ids=["journal", "redirected"])
def test_priorities_are_written_only_into_the_journal(*, same: bool, folder: Path) -> None:
    log = folder.parent / "log"
    log.touch()
    status = log.stat()
    stream = f"{status.st_dev}:{status.st_ino + (not same)}"
    options = ("--dir", folder, *LOCAL, "--log", "debug")
    with started(folder.parent, *options, env={"JOURNAL_STREAM": stream}) as script:
        script.wait_for("/firmware", "x-ESP8266-version: 1.0.0")
        assert script.end(signal.SIGTERM) == 0
        found = re.findall(r"^(<\d>)?.*INFO - 127", script.log, re.MULTILINE)
    assert found
    assert set(found) == {"<6>" if same else ""}


# -- 6. Paced downloads ---------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs SO_MAX_PACING_RATE")
PACE = (socket.SOL_SOCKET, 47)


@needs_linux
def test_download_is_paced_and_the_connection_behind_it_is_not(
    ca: Path | None, big_folder: Path
) -> None:
    with ExitStack() as stack:
        stand = stack.enter_context(standing(site_of(big_folder, rate=3000), ca))
        wire = stack.enter_context(stand.dial(receive_buffer=SLOW))
        assert wire.check("1.10.0").status == 304
        wait_until(lambda: len(stand.server._connections) == 1)
        [connection] = stand.server._connections
        assert connection.socket.getsockopt(*PACE) == -1
        wire.send(request(BIG))
        size = int(wire.head().headers["content-length"])
        assert connection.socket.getsockopt(*PACE) == 3000 * 1024
        assert wire.read(size) == large_image()
        assert wire.check("1.10.0").status == 304
        assert connection.socket.getsockopt(*PACE) == -1


@needs_linux
def test_paced_download_takes_its_time(big_folder: Path) -> None:
    with standing(site_of(big_folder, rate=1000)) as stand:
        with stand.dial(receive_buffer=SLOW) as wire:
            start = time.monotonic()
            assert wire.ask(BIG).body == large_image()
        assert time.monotonic() - start > 1  # 2 MB, of which loopback sends some without a pause


@needs_linux
@pytest.mark.parametrize("rate", [999_999_999, 2_097_152])
def test_rate_beyond_what_the_kernel_counts_is_the_highest(rate: int, folder: Path) -> None:
    with standing(site_of(folder, rate=rate)) as stand, stand.dial() as wire:
        assert wire.check().status == 200
