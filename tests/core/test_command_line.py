"""The real script as whoever runs it meets it: options, messages, signals, log."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import ota_server
from ota_server import Config, LogLines
from tests.conftest import put, wait_until
from tests.core.wire import (
    PATIENCE,
    SCRIPT,
    Script,
    Wire,
    copy_of_script,
    dial,
    request,
    started,
)
from tests.data.make_images import esp32_image
from tests.devices import Esp8266

LOCAL = ("--host", "127.0.0.1", "--port", "0")
SLOW = 32768  # bytes of receive buffer of a client that makes the server wait
CHECK = ("/firmware", "x-ESP8266-version: 1.0.0")


def run(
    directory: Path,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """What the script did that ends by itself; `before` comes before the command."""
    return subprocess.run(
        [*before, sys.executable, "-I", str(copy_of_script(directory)), *map(str, options)],
        env=env or {},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=directory,
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what is wrong."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert re.fullmatch(r"ota-server: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


@contextmanager
def serving(folder: Path, *options: str | Path, **more: Any) -> Iterator[Script]:
    """The script with the folder, once it has checked the newest image."""
    with started(folder.parent, "--dir", folder, *LOCAL, *options, **more) as script:
        script.wait_for(*CHECK)
        yield script


@pytest.fixture
def big_folder(folder: Path) -> Path:
    """The firmware folder with a large image in it."""
    put(folder / "big-1.0.0.bin", esp32_image("big", "1.0.0", payload=bytes(1 << 20)))
    return folder


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A firmware folder with nothing in it."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


# -- 1. Help and options ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--help",), ("-h",), ("--help", "--port", "9000")])
def test_help_names_every_option_and_a_line_to_try(options: Sequence[str], tmp_path: Path) -> None:
    result = run(tmp_path, *options)
    assert (result.returncode, result.stderr) == (0, "")
    names = {each.name.replace("_", "-") for each in dataclasses.fields(Config)}
    others = {"notify-socket", "inherited", "watchdog", "journal", "us-username", "us-password"}
    others |= {"admin-email", "admin-password"}
    for name in (names - others) | {"help", "version"}:
        assert re.search(rf"^ +(-h, )?--{name}\b", result.stdout, re.MULTILINE), name
    assert "curl -i -H 'x-ESP8266-version: 1.0.0' http://" in result.stdout
    assert "openssl req -x509" in result.stdout
    assert "OTA_PORT" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_version_is_the_modules(tmp_path: Path) -> None:
    result = run(tmp_path, "--version")
    assert result.returncode == 0
    assert result.stdout == f"ota-server {ota_server.__version__}\n"


def test_help_of_a_terminal_with_80_columns_has_no_longer_lines(tmp_path: Path) -> None:
    lines = run(tmp_path, "--help", env={"COLUMNS": "80"}).stdout.splitlines()
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("level", ["info", "INFO", "Warning", "debug", "error"])
def test_log_level_is_read_in_any_case(level: str, folder: Path) -> None:
    with serving(folder, "--log", level) as script:
        assert script.end(signal.SIGTERM) == 0  # lines are written together
        assert ("-> 1.10.0" in script.log) is (level.upper() in {"INFO", "DEBUG"})


def a_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("way", ["option", "option-with-sign", "environment"])
def test_port_is_taken_as_a_number(way: str, folder: Path) -> None:
    port = str(a_port())
    options = {"option": ("--port", port), "option-with-sign": (f"--port={port}",)}.get(way, ())
    env = {} if options else {"OTA_PORT": port}
    place = ("--dir", folder, "--host", "127.0.0.1")
    with started(folder.parent, *place, *options, env=env) as script:
        assert str(script.port) == port
        script.wait_for(*CHECK)


def test_environment_stands_for_every_option(folder: Path, certificate: Path) -> None:
    env = {
        "OTA_DIR": str(folder),
        "OTA_HOST": "127.0.0.1",
        "OTA_PORT": "0",
        "OTA_LOG": "warning",
        "OTA_CERT": str(certificate),
        "OTA_KEY": str(certificate),
        "OTA_MAX_CONNECTIONS": "9",
        "OTA_RATE": "100",
    }
    with started(folder.parent, env=env, ca=certificate) as script:
        assert script.line.startswith("https://127.0.0.1:")
        assert f" serves {folder}: " in script.line
        script.wait_for(*CHECK)
        assert script.log == ""


def test_option_wins_over_environment(folder: Path) -> None:
    env = {"OTA_DIR": "/nowhere", "OTA_LOG": "error", "OTA_PORT": "1", "OTA_HOST": "192.0.2.1"}
    with serving(folder, "--log", "info", env=env) as script:
        wait_until(lambda: "-> 1.10.0" in script.log)


def test_empty_environment_variable_is_none(folder: Path) -> None:
    with serving(folder, env={"OTA_LOG": "", "OTA_CERT": "", "OTA_MAX_CONNECTIONS": ""}):
        pass


# -- 2. What is wrong is said in one line -------------------------------------------------------


WRONG = [
    pytest.param(("--log", "loud"), "loud", id="level"),
    pytest.param(("--port", "http"), "'http'", id="port-word"),
    pytest.param(("--port", "-1"), "--port", id="port-negative"),
    pytest.param(("--port", "65536"), "65535", id="port-too-high"),
    pytest.param(("--port",), "--port", id="port-missing"),
    pytest.param(("--max-connections", "many"), "'many'", id="connections"),
    pytest.param(("--max-connections", "0"), "--max-connections", id="no-connections"),
    pytest.param(("--rate", "fast"), "'fast'", id="rate"),
    pytest.param(
        ("--rate", "9", "--host", "unix:ota"), "--rate needs linux and tcp", id="rate-unix"
    ),
    pytest.param(("--host", "unix:/nowhere/at/all"), "unix:/nowhere/at/all", id="unix-nowhere"),
    pytest.param(("--host", "unix:"), "unix:", id="unix-without-path"),
    pytest.param(("--host", "unix:alone"), "in use", id="unix-no-socket"),
    pytest.param(("--host", f"unix:/{'long' * 40}"), "too long", id="unix-too-long"),
    pytest.param(("--colour",), "--colour", id="unknown-option"),
    pytest.param(("firmware",), "firmware", id="stray-word"),
    pytest.param(("--dir", "/nowhere/at/all"), "/nowhere/at/all", id="no-directory"),
    pytest.param(("--dir", "alone/ota_server.py"), "alone/ota_server.py", id="file-for-directory"),
    pytest.param(("--host", "192.0.2.1"), "192.0.2.1", id="foreign-address"),
    pytest.param(("--host", "no.such.host.invalid"), "no.such.host.invalid", id="no-such-host"),
    pytest.param(("--cert", "/nowhere.pem"), "/nowhere.pem", id="no-certificate"),
    pytest.param(("--cert", "alone/ota_server.py"), "alone/ota_server.py", id="no-pem"),
    pytest.param(("--key", "/nowhere.pem"), "--key", id="key-without-certificate"),
    pytest.param(("--admit", "whitelist"), ": --admit needs --state", id="admit-without-state"),
    pytest.param(("--mqtt", "mqtt://me:x@h"), ": --mqtt needs --state\n", id="mqtt-without-state"),
    pytest.param(("--backup", "kept.db"), ": --backup needs --state", id="backup-without-state"),
    pytest.param(("--public-url", "ota.example"), ": --public-url begins with http", id="no-url"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_setting_is_one_clear_line(options: Sequence[str], words: str, empty: Path) -> None:
    text = complaint(run(empty.parent, "--dir", empty, *LOCAL, *options))
    assert words in text.lower()


@pytest.mark.parametrize("name", ["OTA_PORT", "OTA_LOG", "OTA_DIR", "OTA_CERT"])
def test_wrong_setting_in_the_environment_is_one_clear_line(name: str, empty: Path) -> None:
    env = {"OTA_DIR": str(empty), "OTA_HOST": "127.0.0.1", "OTA_PORT": "0", name: "/nowhere"}
    assert "/nowhere" in complaint(run(empty.parent, env=env)).lower()


def test_port_in_use_is_one_clear_line(empty: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        place = ("--dir", empty, "--host", "127.0.0.1", "--port", port)
        text = complaint(run(empty.parent, *place))
    assert port in text
    assert "in use" in text


def self_signed(pem: Path) -> Path:
    """Another certificate with its key, by the line that --help gives."""
    start = ota_server.EPILOG.index("openssl req")
    line = ota_server.EPILOG[start:].replace("\\\n", " ").replace("192.168.1.5", "127.0.0.1")
    subprocess.run(line.replace("ota.pem", str(pem)).split(), check=True, capture_output=True)
    return pem


def only(pem: Path, kind: str, target: Path) -> Path:
    """A file with one part of a PEM file: "CERTIFICATE" or "PRIVATE KEY"."""
    part = re.search(rf"-+BEGIN {kind}-+.*?-+END {kind}-+\n", pem.read_text(), re.DOTALL)
    assert part is not None
    target.write_text(part[0])
    return target


def test_certificate_and_key_may_be_two_files(folder: Path, certificate: Path) -> None:
    cert = only(certificate, "CERTIFICATE", folder.parent / "cert.pem")
    key = only(certificate, "PRIVATE KEY", folder.parent / "key.pem")
    with serving(folder, "--cert", cert, "--key", key, ca=certificate) as script:
        assert script.line.startswith("https://")


@pytest.mark.parametrize("flaw", ["no-key", "key-of-another", "key-missing", "garbage", "locked"])
def test_certificate_that_does_not_do_is_one_clear_line(
    flaw: str, tmp_path: Path, certificate: Path
) -> None:
    cert = only(certificate, "CERTIFICATE", tmp_path / "cert.pem")
    key = tmp_path / "key.pem"
    if flaw == "key-of-another":
        only(self_signed(tmp_path / "other.pem"), "PRIVATE KEY", key)
    elif flaw == "garbage":
        key.write_text("-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n")
    elif flaw == "locked":
        lock = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", str(certificate)]
        subprocess.run([*lock, "-out", str(key)], check=True, capture_output=True)
    options = () if flaw == "no-key" else ("--key", key)
    place = ("--dir", tmp_path / "alone", *LOCAL)
    result = run(tmp_path, *place, "--cert", cert, "--log", "error", *options)
    assert str(cert) in complaint(result)


@pytest.fixture
def powerless() -> tuple[str, ...]:
    """What comes before a command that is to have no rights beyond its user's, not even root."""
    if os.getuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, as root may do everything")
    return ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@pytest.mark.parametrize("what", ["directory", "key"])
def test_file_without_permission_is_one_clear_line(
    what: str, powerless: tuple[str, ...], certificate: Path, empty: Path
) -> None:
    secret = empty.parent / "secret"
    if what == "directory":
        secret.mkdir(mode=0)
        options: tuple[str | Path, ...] = ("--dir", secret)
    else:
        shutil.copy(certificate, secret)
        secret.chmod(0)
        options = ("--dir", empty, "--cert", secret)
    result = run(empty.parent, *LOCAL, *options, before=powerless)
    assert re.search(f"{secret}.*Permission denied", complaint(result))


def test_port_without_permission_is_one_clear_line(powerless: tuple[str, ...], empty: Path) -> None:
    lowest = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not lowest.exists() or int(lowest.read_text()) <= 1:
        pytest.skip("needs ports that are not for everybody: ip_unprivileged_port_start")
    place = ("--dir", empty, "--host", "127.0.0.1", "--port", "1")
    text = complaint(run(empty.parent, *place, before=powerless))
    assert "--port 1: Permission denied" in text


# -- 3. Start -----------------------------------------------------------------------------------


def test_start_line_names_url_directory_projects_and_newest_versions(folder: Path) -> None:
    put(folder / "lamp" / "v0.1.bin", esp32_image("lamp", "0.1"))
    with serving(folder) as script:
        url = f"http://127.0.0.1:{script.port}/"
        assert script.line == f"{url} serves {folder}: firmware 1.10.0, lamp 0.1.0\n"


def test_start_line_of_an_empty_folder_says_so(empty: Path) -> None:
    with started(empty.parent, "--dir", empty, *LOCAL) as script:
        assert script.line.endswith(f"serves {empty}: no firmware yet\n")
        with script.dial() as wire:
            assert wire.ask().status == 200


def test_start_line_by_default_names_an_address_that_answers(folder: Path) -> None:
    with started(folder.parent, "--dir", folder, "--port", "0") as script:
        host = re.match(r"http://([0-9.]+):", script.line)
        assert host is not None
        with dial(script.port, host=host[1]) as wire:
            assert wire.ask().status == 200


def test_it_runs_without_any_environment(folder: Path) -> None:
    with serving(folder, env={}) as script:
        device = Esp8266(
            host="127.0.0.1",
            port=script.port,
            path="/firmware",
            image=(folder / "firmware-1.0.0.bin").read_bytes(),
        )
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.10.0")


def test_default_directory_is_firmware_in_the_home(folder: Path) -> None:
    env = {"HOME": str(folder.parent)}
    with started(folder.parent, *LOCAL, env=env) as script:
        assert f" serves {folder}: firmware 1.10.0\n" in script.line


def test_home_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    assert "/nowhere/firmware" in complaint(run(tmp_path, *LOCAL, env={"HOME": "/nowhere"}))


# -- 4. Signals ---------------------------------------------------------------------------------


def begin_download(stack: ExitStack, script: Script) -> tuple[Wire, int]:
    """A download whose client stops reading after the head, and the body's size."""
    wire = stack.enter_context(script.dial(receive_buffer=SLOW))
    wire.send(request("/big/big-1.0.0.bin"))
    head = wire.head()
    assert head.status == 200
    return wire, int(head.headers["content-length"])


def idle_wire(stack: ExitStack, script: Script) -> Wire:
    """A connection that waits for its next request: it ends when the server begins to stop."""
    wire = stack.enter_context(script.dial())
    assert wire.check().status == 200
    return wire


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_idle_server_ends_at_once_with_status_0(number: signal.Signals, folder: Path) -> None:
    with serving(folder) as script:
        assert script.end(number) == 0
        assert "Traceback" not in script.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_running_download_is_finished_before_the_end(
    number: signal.Signals, big_folder: Path, certificate: Path
) -> None:
    with ExitStack() as stack:
        script = stack.enter_context(serving(big_folder, "--cert", certificate, ca=certificate))
        script.wait_for("/big/big-1.0.0.bin")
        (slow, size), idle = begin_download(stack, script), idle_wire(stack, script)
        script.process.send_signal(number)
        assert idle.rest() == b""
        again = idle_again(script)
        assert script.process.poll() is None
        assert slow.read(size) == (big_folder / "big-1.0.0.bin").read_bytes()
        assert script.process.wait(PATIENCE) == 0
        assert not again
        assert "Traceback" not in script.log


def idle_again(script: Script) -> bool:
    """Whether somebody who comes now is served, without much ado."""
    with socket.socket() as late:
        late.settimeout(0.3)
        try:
            late.connect(("127.0.0.1", script.port))
            late.sendall(b"x")
            return bool(late.recv(1))
        except OSError:
            return False


def test_second_sigterm_ends_it_at_once(big_folder: Path) -> None:
    with ExitStack() as stack:
        script = stack.enter_context(serving(big_folder))
        script.wait_for("/big/big-1.0.0.bin")
        (slow, size), idle = begin_download(stack, script), idle_wire(stack, script)
        script.process.send_signal(signal.SIGTERM)
        assert idle.rest() == b""
        assert script.end(signal.SIGTERM) == 0
        assert len(slow.rest()) < size
        assert "Traceback" not in script.log


def certificate_of(port: int) -> str:
    """The certificate that a new connection is shown."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=PATIENCE)


def test_sighup_rereads_the_certificate_and_keeps_the_old_when_it_is_broken(
    folder: Path, certificate: Path
) -> None:
    pem = Path(shutil.copy(certificate, folder.parent / "ota.pem"))
    other = self_signed(folder.parent / "other.pem")
    with serving(folder, "--cert", pem, ca=certificate) as script, script.dial() as wire:
        old = certificate_of(script.port)
        shutil.copy(other, pem)
        assert certificate_of(script.port) == old
        script.process.send_signal(signal.SIGHUP)
        wait_until(lambda: certificate_of(script.port) != old)
        assert wire.check().status == 200  # whoever was connected stays so
        with dial(script.port, other) as new:
            assert new.check().status == 200
        new_one = certificate_of(script.port)
        pem.write_text("broken")
        script.process.send_signal(signal.SIGHUP)
        wait_until(lambda: f"the certificate {pem} stays as it was" in script.log)
        assert certificate_of(script.port) == new_one
        assert "Traceback" not in script.log


def test_sighup_without_tls_changes_nothing(folder: Path) -> None:
    with serving(folder) as script, script.dial() as wire:
        script.process.send_signal(signal.SIGHUP)
        assert wire.check().status == 200
        assert script.end(signal.SIGTERM) == 0


# -- 5. systemd, log ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_ready_and_stopping(kind: str, folder: Path) -> None:
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets need Linux")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "notify"
        systemd.settimeout(PATIENCE)
        systemd.bind("\0" + str(place) if kind == "abstract" else str(place))
        address = f"@{place}" if kind == "abstract" else str(place)
        with serving(folder, env={"NOTIFY_SOCKET": address}) as script:
            assert systemd.recv(100) == b"READY=1"
            assert script.end(signal.SIGTERM) == 0
            assert systemd.recv(100) == b"STOPPING=1"


def test_systemd_is_told_stopping_before_the_last_download_ends(big_folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "notify"
        systemd.settimeout(2)
        systemd.bind(str(place))
        script = stack.enter_context(serving(big_folder, env={"NOTIFY_SOCKET": str(place)}))
        script.wait_for("/big/big-1.0.0.bin")
        begin_download(stack, script)
        assert systemd.recv(100) == b"READY=1"
        script.process.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"


TRACE = """
import logging, sys, ota_server
logging.basicConfig(handlers=[ota_server.LogLines(sys.stderr)])
try:
    int("x")
except ValueError:
    ota_server.log.exception("it failed")
"""


class Interrupted(io.StringIO):
    """A stream whose first write is interrupted by a signal handler that logs."""

    lines: LogLines

    def write(self, text: str, /) -> int:
        """Logs, then writes."""
        if not self.getvalue() and "late" not in text:
            self.lines.handle(record(logging.ERROR, "late"))
        return super().write(text)


def record(level: int, text: str, *args: object) -> logging.LogRecord:
    """What a logger makes of a line."""
    return logging.LogRecord("ota", level, "", 0, text, args, None)


def test_line_logged_while_lines_are_written_comes_after_them() -> None:
    stream = Interrupted()
    stream.lines = lines = LogLines(stream)
    lines.handle(record(logging.INFO, "one"))
    assert stream.getvalue() == ""
    lines.handle(record(logging.WARNING, "two"))
    lines.flush()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["one", "two", "late"]


def test_line_with_a_trace_names_level_and_sentence_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACE], cwd=SCRIPT.parent, check=True, capture_output=True, text=True
    )
    first, second, *_ = done.stderr.splitlines()
    assert first.partition(",")[2][4:] == "ERROR it failed"
    assert second == "Traceback (most recent call last):"


def test_line_whose_arguments_do_not_fit_raises_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    lines = LogLines(stream)
    lines.handle(record(logging.WARNING, "%d devices", "no number"))
    lines.handle(record(logging.WARNING, "fine"))
    assert "fine" in stream.getvalue()
    assert "no number" in capsys.readouterr().err


def test_systemd_that_has_gone_is_no_trouble(folder: Path) -> None:
    with serving(folder, env={"NOTIFY_SOCKET": str(folder / "nobody-listens")}) as script:
        assert script.end(signal.SIGTERM) == 0


def test_log_tells_every_decision_in_one_line_with_the_mac(folder: Path) -> None:
    image = (folder / "firmware-1.0.0.bin").read_bytes()
    mac = "5C:CF:7F:00:00:07"
    with serving(folder) as script:
        place: dict[str, Any] = {"host": "127.0.0.1", "port": script.port, "path": "/firmware"}
        device = Esp8266(image=image, mac=mac, **place)
        device.update()
        device.update()
        Esp8266(image=image, mac=mac, free_space=100, **place).update()
        wait_until(lambda: script.log.count(mac) == 4)
        story = [line for line in script.log.splitlines() if mac in line]
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    who = rf"{mac} 127\.0\.0\.1 firmware "
    assert re.fullmatch(rf"{date}INFO {who}1\.0\.0 -> 1\.10\.0", story[0])
    sent = rf"{mac} 127\.0\.0\.1 was sent 5456 of 5456 bytes of firmware-1\.10\.0\.bin"
    assert re.fullmatch(rf"{date}INFO {sent}", story[1])
    assert re.fullmatch(rf"{date}INFO {who}1\.10\.0 stays, not-newer: .*", story[2])
    assert re.fullmatch(rf"{date}WARNING {who}1\.0\.0 stays, too-big: .*", story[3])


WEIRD = [
    pytest.param(b"GET /%0a%0d%1b%5b31m HTTP/1.0\r\n\r\n", id="encoded-path"),
    pytest.param(b"GET /%c2%9b31m%e2%80%ae HTTP/1.0\r\n\r\n", id="c1-and-bidi-path"),
    pytest.param(b"GET /\x1b[31m HTTP/1.0\r\n\r\n", id="raw-path"),
    pytest.param(b"\x1b]0;owned\x07", id="no-http"),
    pytest.param(b"G\x1bT / HTTP/1.0\r\n\r\n", id="method"),
    pytest.param(b"GET /firmware HTTP/1.0\r\nx-ESP8266-version: \x9b1m\r\n\r\n", id="version"),
    pytest.param(b"GET / HTTP/1.0\r\nx-ESP8266-STA-MAC: \x9b\x85\r\n\r\n", id="mac"),
    pytest.param(b"GET /f/%1b%ff%0a.bin HTTP/1.0\r\n\r\n", id="file"),
]


@pytest.mark.parametrize("data", WEIRD)
def test_log_never_holds_what_could_drive_a_terminal(data: bytes, folder: Path) -> None:
    with serving(folder, "--log", "debug") as script:
        before = len(script.log)
        with script.dial() as wire:
            wire.send(data)
            wire.reply()
        wait_until(lambda: len(script.log) > before)
        assert all(line.isprintable() for line in script.log.splitlines())
        assert script.log.isascii()
        assert "Traceback" not in script.log


@pytest.mark.parametrize("name", ["odd\x1b[31m-1.0.0.bin", "odd\n-1.0.0.bin", "od\xff\x9b.bin"])
def test_file_name_in_the_folder_cannot_drive_a_terminal(name: str, folder: Path) -> None:
    put(folder / name, b"no image")
    with serving(folder) as script:
        wait_until(lambda: "is not offered" in script.log)
        for line in (script.line.removesuffix("\n"), *script.log.splitlines()):
            assert line.isprintable()
            assert line.startswith(("http://", "20"))


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_file_name_that_is_no_text_does_no_harm(locale: str, folder: Path) -> None:
    name = os.fsdecode(b"odd\xff-1.0.0.bin")
    put(folder / name, (folder / "firmware-1.0.0.bin").read_bytes())
    with serving(folder, env={"LC_ALL": locale}) as script, script.dial() as wire:
        assert "1.0.0" in script.line
        answer = script.wait_for("/odd%ff", "x-ESP8266-version: 0.1.0")
        assert "filename*=UTF-8''odd%FF-1.0.0.bin" in answer.headers["content-disposition"]
        assert wire.ask("/").status == 200
        assert "Traceback" not in script.log


# -- 6. main() in this process ------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """Gives back the signal handlers that main() replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("host", ["127.0.0.1", ""], ids=["one-address", "all-addresses"])
def test_main_rereads_the_certificate_and_gives_back_0_after_sigterm(
    host: str,
    folder: Path,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "ota")
    pem = Path(shutil.copy(certificate, folder.parent / "ota.pem"))
    output = folder.parent / "output"
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "nobody-listens"))
    ended = threading.Event()

    def use() -> None:
        wait_until(lambda: "\n" in output.read_text())
        with dial(
            int(output.read_text().partition("/ serves ")[0].rpartition(":")[2]), pem
        ) as wire:
            assert wire.ask().status == 200
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: any("was read again" in line for line in caplog.messages))
        pem.write_text("broken")
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: any("stays as it was" in line for line in caplog.messages))

    def use_and_stop() -> None:
        try:
            use()
        finally:
            if not ended.is_set():  # else nobody is left who expects the signal
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=use_and_stop)
    put(folder / os.fsdecode(b"odd\xff-1.0.0.bin"), b"no image")
    with output.open("w", encoding="utf-8", errors="strict") as stdout:  # as in most locales
        monkeypatch.setattr(sys, "stdout", stdout)
        thread.start()
        try:
            options = ["--dir", str(folder), "--cert", str(pem), "--host", host, "--port", "0"]
            assert ota_server.main(options) == 0
        finally:
            ended.set()
            thread.join(2 * PATIENCE)
    assert output.read_text().count("\n") == 1


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dir", "/nowhere"], "--dir /nowhere cannot be read"),
        (["--dir", ".", "--cert", "/nowhere"], "--cert /nowhere --key /nowhere: "),
        (["--dir", ".", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: "),
        (["--port", "70000"], "65535"),
        (["--port", "high"], "--port"),
        (["--log", "loud"], "--log"),
        (["--max-connections", "0"], "--max-connections"),
        (["--dir", ".", "--cert", ota_server.__file__], "--cert "),
    ],
)
def test_main_ends_with_2_and_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ota_server.main([*LOCAL, *options])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
