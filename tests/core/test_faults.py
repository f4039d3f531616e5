"""What a computer does to a server: no descriptors, no disk, no log, no time, and the end."""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ota_server import Limits
from tests.conftest import put, site_of, wait_until
from tests.core.test_command_line import CHECK, SLOW, begin_download, self_signed, serving
from tests.core.test_load import all_at_once, assert_calm, device, held, tell
from tests.core.wire import PATIENCE, Script, client_context, dial, request, standing, started
from tests.data.make_images import esp32_image, esp8266_image

BIG = "/big/big-1.0.0.bin"
YEAR = 365 * 86400  # seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux' /proc")


@functools.cache
def big_image(seed: int = 0, size: int = 1 << 20) -> bytes:
    """An image that no kernel buffers whole; all of one size have the same length."""
    return esp32_image("big", "1.0.0", payload=hashlib.shake_128(bytes([seed])).digest(size))


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """The firmware folder with a large image in it."""
    put(folder / "big-1.0.0.bin", big_image())
    return folder


def shell(words: str) -> tuple[str, ...]:
    """What comes before a command for which a shell is to do something first."""
    return ("sh", "-c", f'{words} && exec "$@"', "sh")


# -- 1. Descriptors -------------------------------------------------------------------------------


def test_soft_limit_of_open_files_is_raised_to_the_hard_one(folder: Path) -> None:
    with serving(folder, before=shell("ulimit -Sn 200 && ulimit -Hn 3000")) as script:
        text = Path(f"/proc/{script.process.pid}/limits").read_text()
    limits = re.search(r"^Max open files +(\d+) +(\d+)", text, re.MULTILINE)
    assert limits is not None
    assert limits.groups() == ("3000", "3000")


def test_more_devices_than_descriptors_wait_and_are_all_served(folder: Path) -> None:
    image = (folder / "firmware-1.10.0.bin").read_bytes()
    with serving(folder, before=shell("ulimit -n 64")) as script:
        visits = all_at_once(script.port, [device(number) for number in range(200)])
        assert {(visit.error, visit.status) for visit in visits} == {("", 200)}
        assert all(visit.body == image for visit in visits)
        assert script.log.count("max-connections is reached") <= 1
        assert_calm(script)


@pytest.mark.parametrize("options", [(), ("--max-connections", "1000")], ids=["own", "too-many"])
def test_server_out_of_descriptors_complains_once_and_recovers(
    options: tuple[str, ...], folder: Path
) -> None:
    with serving(folder, *options, before=shell("ulimit -n 64")) as script, ExitStack() as stack:
        before = held(script)
        with ExitStack() as idle:
            for _ in range(80):
                idle.enter_context(script.dial()).send(b"GET /")
            wait_until(lambda: " WARNING " in script.log)
            assert held(script) <= 64
            wires = [stack.enter_context(script.dial()) for _ in range(40)]
            for wire in wires:
                wire.send(request(*CHECK, "Connection: close"))
        for wire in wires:
            answer = wire.reply()
            assert answer.status == 200 or (answer.status, bool(options)) == (503, True)
            wire.link.close()  # as a device does; until then the server may wait for it
        wait_until(lambda: held(script) <= before)
        script.wait_for(*CHECK)
        assert script.log.count("wait") + script.log.count("cannot be accepted") == 1
        assert_calm(script)


# -- 2. Disk --------------------------------------------------------------------------------------


def assert_never_wrong(script: Script, statuses: set[int]) -> None:
    """A device that asks now gets its image whole, or one of these."""
    with script.dial() as wire:
        answer = wire.check()
    assert answer.status in statuses | {200}
    if answer.status == 200:
        assert answer.headers["x-md5"] == hashlib.md5(answer.body).hexdigest()  # noqa: S324


def test_folder_that_moves_away_is_503_and_the_running_download_is_whole(big_folder: Path) -> None:
    with ExitStack() as stack:
        script = stack.enter_context(serving(big_folder))
        script.wait_for(BIG)
        slow, size = begin_download(stack, script)
        away = big_folder.rename(big_folder.parent / "away")
        while "cannot be read" not in script.log:
            assert_never_wrong(script, {503})
        script.wait_for("/healthz", status=503)
        assert slow.read(size) == big_image()
        away.rename(big_folder)
        script.wait_for(*CHECK)
        told = re.findall(r"(?:ERROR|WARNING) the firmware folder", script.log)
        assert len(told) == 2  # that it is gone, and that it is back
        assert "Traceback" not in script.log


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as a stick is; the folder in it comes and goes."""
    place = tmp_path / "stick"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("needs mount and the right to mount a tmpfs")
    try:
        yield place
    finally:
        while subprocess.run(["umount", "-l", place], check=False, capture_output=True).returncode:
            pass


def test_unmounted_folder_is_no_wrong_image_and_no_crash(mounted: Path) -> None:
    def fill() -> None:
        put(mounted / "firmware-1.10.0.bin", esp8266_image("firmware", "1.10.0"))
        put(mounted / "big-1.0.0.bin", big_image())

    fill()
    with ExitStack() as stack:
        script = stack.enter_context(serving(mounted))
        script.wait_for(BIG)
        slow, size = begin_download(stack, script)
        subprocess.run(["umount", "-l", mounted], check=True)
        script.wait_for(*CHECK, status=404)  # the empty folder below
        assert slow.read(size) == big_image()
        subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
        fill()
        script.wait_for(*CHECK)
        assert_calm(script)


def test_file_that_cannot_be_read_any_more_is_an_error_and_nothing_is_promised(
    folder: Path,
) -> None:
    newest = folder / "firmware-1.10.0.bin"
    with serving(folder) as script:
        newest.unlink()
        newest.symlink_to(newest)
        for _ in range(5):
            assert_never_wrong(script, {503})
        newest.unlink()
        newest.mkdir()
        answer = script.wait_for(*CHECK)
        assert answer.headers["x-version"] == "1.9.0"
        assert_calm(script)


def written_anew(path: Path, step: int) -> None:
    """Another image of the same length in the same file."""
    path.write_bytes(big_image(1 + step % 2))


def cut_off(path: Path, step: int) -> None:
    """A shorter file."""
    os.truncate(path, 1 + step * 40_000)


def rewritten_from_the_middle(path: Path, step: int) -> None:
    """The second half of another image."""
    with path.open("r+b") as file:
        file.seek(step * 40_000)
        file.write(big_image(2)[step * 40_000 :])


@pytest.mark.parametrize("way", ["http", "https"])
@pytest.mark.parametrize("spoil", [written_anew, cut_off, rewritten_from_the_middle])
def test_body_is_never_mixed_nor_padded_whenever_the_file_is_spoilt(
    spoil: Callable[[Path, int], None], way: str, big_folder: Path, certificate: Path
) -> None:
    """Whatever arrived before, the whole length never does."""
    path, ca = big_folder / "big-1.0.0.bin", certificate if way == "https" else None
    site = site_of(big_folder)
    with standing(site, ca) as stand:
        for step in range(8):
            put(path, big_image())
            assert site.catalog.scan()  # type: ignore[attr-defined]
            with stand.dial(receive_buffer=SLOW) as wire:
                wire.send(request(BIG))
                size = int(wire.head().headers["content-length"])
                received = wire.read(1 + step * 50_000)
                assert received == big_image()[: len(received)]
                spoil(path, step)
                assert len(received + wire.rest()) < size
        assert stand.is_fine()


# -- 3. Log ---------------------------------------------------------------------------------------

NO_LOG = [
    pytest.param("exec 2>&-", id="closed"),
    pytest.param("exec 2>/dev/full", id="full"),
    pytest.param("exec 2>/dev/null 0<&- ", id="no-stdin"),
]


@pytest.mark.parametrize("words", NO_LOG)
def test_server_without_a_log_goes_on_and_ends_with_status_0(
    words: str, big_folder: Path, certificate: Path
) -> None:
    options = ("--cert", certificate)
    broken = put(big_folder / "firmware-2.0.0.bin", b"broken")
    with serving(big_folder, *options, before=shell(words), ca=certificate) as script:
        assert script.wait_for(BIG).body == big_image()
        with dial(script.port) as wire:
            wire.send(request("/"))  # plain, which is worth a line
            assert wire.reply().status == 400
        put(broken, esp8266_image("firmware", "2.0.0"))
        for _ in range(10):
            assert_never_wrong(script, set())
        assert script.end(signal.SIGTERM) == 0


def test_no_connection_takes_the_place_of_a_closed_stderr(folder: Path) -> None:
    """What the interpreter itself writes to descriptor 2 would reach a device as its image."""
    with serving(folder, before=shell("exec 2>&-")) as script, ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(script.dial()).check()
        with suppress(FileNotFoundError):
            assert "socket" not in os.readlink(f"/proc/{script.process.pid}/fd/2")


# -- 4. Ends and beginnings -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["http", "https"])
def test_sigterm_under_load_finishes_what_runs(
    way: str, big_folder: Path, certificate: Path
) -> None:
    options, ca = (("--cert", certificate), certificate) if way == "https" else ((), None)
    with ExitStack() as stack:
        script = stack.enter_context(serving(big_folder, *options, ca=ca))
        script.wait_for(BIG)
        downloads = [begin_download(stack, script) for _ in range(30)]
        over, done = threading.Event(), list[int]()

        def load() -> None:
            while not over.is_set():
                visits = all_at_once(script.port, [device(number) for number in range(20)], ca)
                done.extend(visit.status for visit in visits)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            wait_until(lambda: len(done) > 100)
            script.process.send_signal(signal.SIGTERM)
            assert all(slow.read(size) == big_image() for slow, size in downloads)
            assert script.process.wait(PATIENCE) == 0
        finally:
            over.set()
            thread.join(3 * PATIENCE)
        assert set(done) <= {200, 0}  # 0: nobody listens any more
        assert_no_trace(script)


def assert_no_trace(script: Script) -> None:
    """Nothing failed that should not."""
    assert "Traceback" not in script.log
    assert " ERROR " not in script.log


def test_killed_server_is_back_within_a_second_and_trusts_no_digest_it_had(
    folder: Path,
) -> None:
    """The file that changed meanwhile has the size and the time of the one before."""
    path = folder / "firmware-2.0.0.bin"
    pauses: list[float] = []
    port = "0"
    for seed in range(4):
        image = esp8266_image("firmware", "2.0.0", seed=seed)
        put(path, image)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        begun = time.perf_counter()
        options = ("--dir", folder, "--host", "127.0.0.1", "--port", port)
        with started(folder.parent, *options) as script, script.dial() as wire:
            assert wire.ask().status == 200
            pauses.append(time.perf_counter() - begun)
            answer = script.wait_for(*CHECK)
            assert answer.body == image
            assert answer.headers["x-md5"] == hashlib.md5(image).hexdigest()  # noqa: S324
            port = str(script.port)
            assert script.end(signal.SIGKILL) == -signal.SIGKILL
    tell(f"ready after {min(pauses):.2f} s, at most {max(pauses):.2f} s")
    assert min(pauses) < 1


def test_certificate_replaced_under_load_fails_no_handshake(
    folder: Path, certificate: Path
) -> None:
    pem = Path(shutil.copy(certificate, folder.parent / "ota.pem"))
    other = self_signed(folder.parent / "other.pem")
    trusted = client_context(certificate)
    trusted.load_verify_locations(other)
    over, failures, shown = threading.Event(), list[str](), collections.Counter[bytes]()

    def shake_hands(script: Script) -> None:
        while not over.is_set():
            try:
                with dial(script.port) as wire, handshake(trusted, wire.link) as link:
                    shown[link.getpeercert(binary_form=True) or b""] += 1
                    link.sendall(request())
                    assert link.recv(100).startswith(b"HTTP/1.1 200 ")
            except (OSError, AssertionError) as err:
                failures.append(repr(err))

    with serving(folder, "--cert", pem, ca=certificate) as script:
        threads = [threading.Thread(target=shake_hands, args=(script,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(1, 11):
                new = Path(shutil.copy(other if number % 2 else certificate, pem.with_name("new")))
                new.replace(pem)
                script.process.send_signal(signal.SIGHUP)
                wait_until(functools.partial(was_read_again, script, number))
                wait_until(functools.partial(lambda count: shown.total() >= count, 10 * number))
        finally:
            over.set()
            for thread in threads:
                thread.join(2 * PATIENCE)
        assert_no_trace(script)
    tell(f"{shown.total()} handshakes while the certificate was replaced 10 times")
    assert (failures, len(shown)) == ([], 2)


def was_read_again(script: Script, times: int) -> bool:
    """Whether the log says so, that often."""
    return script.log.count("was read again") == times


def handshake(context: ssl.SSLContext, link: object) -> ssl.SSLSocket:
    """TLS over a connection."""
    return context.wrap_socket(link, server_hostname="127.0.0.1")  # type: ignore[arg-type]


# -- 5. Time --------------------------------------------------------------------------------------


@contextmanager
def jumping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """A function that moves the clock on the wall by so many seconds; the other clock stays."""
    real, real_ns, offset = time.time, time.time_ns, [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + offset[0])
        patch.setattr(time, "time_ns", lambda: real_ns() + int(offset[0] * 1e9))
        yield lambda seconds: offset.__setitem__(0, seconds)


@pytest.mark.parametrize("years", [1, -1])
def test_clock_that_jumps_moves_no_deadline(
    years: int,
    big_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = site_of(big_folder)
    limits = Limits(head=1.0, idle=1.0, tick=0.02)
    begun = time.monotonic()
    with (
        jumping(monkeypatch) as jump,
        standing(site, limits=limits) as stand,
        stand.dial(receive_buffer=SLOW) as slow,
        stand.dial() as half,
        stand.dial() as idle,
    ):
        slow.send(request(BIG))
        size = int(slow.head().headers["content-length"])
        half.send(b"GET /")
        assert idle.check().status == 200
        jump(years * YEAR)
        answer = idle.check()  # neither dropped nor confused
        year = time.gmtime().tm_year + years
        assert abs(int(answer.headers["date"][12:16]) - year) <= 1
        put(big_folder / "firmware-3.0.0.bin", esp8266_image("firmware", "3.0.0"))
        assert site.catalog.scan()  # type: ignore[attr-defined]
        assert idle.check().headers["x-version"] == "3.0.0"
        assert half.rest() == b""  # at their deadlines, not before and not a year later
        assert idle.rest() == b""
        assert 1.0 < time.monotonic() - begun < PATIENCE
        assert stand.is_fine()
        jump(0)
        assert slow.read(size) == big_image()
        assert stand.is_fine()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# -- 6. Clients that break off --------------------------------------------------------------------


def test_downloads_broken_off_at_random_leave_nothing_behind(
    big_folder: Path, certificate: Path
) -> None:
    chance = random.Random(8)  # noqa: S311 - the same every time
    with serving(big_folder, "--cert", certificate, ca=certificate) as script:
        script.wait_for(BIG)
        before = held(script)
        for _ in range(20):
            with script.dial(receive_buffer=SLOW) as wire:
                wire.send(request(BIG))
                wire.read(chance.randrange(1, 300_000))
        wait_until(lambda: held(script) <= before)
        script.wait_for(*CHECK)
        assert_calm(script)
