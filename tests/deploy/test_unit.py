"""The systemd unit: checked by systemd's own tools, its settings held against the server's help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ota_server

from .test_install import ROOT, SETTINGS, install, program, run

UNIT = ROOT / "ota-server.service"
SOCKET = ROOT / "ota-server.socket"
TEXT = UNIT.read_text()
SERVER = ROOT / "ota_server.py"
# The flags of another server, which are no settings: they stand in nobody's environment.
COMPATIBILITY = {"--www-dir", "--firmware-dir", "--url-firmware", "--no-certs", "--no-token"}


def values(key: str) -> list[str]:
    """Return every value that the unit gives to a key, comments not counted."""
    return re.findall(rf"^{key}=(.*)$", TEXT, re.MULTILINE)


def help_text() -> str:
    """Return what the server itself says about its options."""
    return subprocess.run(
        [sys.executable, str(SERVER), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def options_in(text: str) -> set[str]:
    """Return the flags a text uses, the OTA_ variables among them as the flags they stand for."""
    variables = re.findall(r"\bOTA_([A-Z_]+)\b", text)
    return {"--" + name.lower().replace("_", "-") for name in variables}


@pytest.fixture
def local_unit(tmp_path: Path) -> Path:
    """Return a copy of the unit whose programs exist here: verify looks for them."""
    text = TEXT.replace("/opt/ota-server/ota_server.py", str(SERVER))
    text = text.replace("/usr/bin/python3", os.path.realpath(sys.executable))
    (tmp_path / SOCKET.name).write_bytes(SOCKET.read_bytes())
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/bin/kill", program("kill")))
    return copy


@pytest.mark.parametrize("name", [UNIT.name, SOCKET.name])
def test_systemd_finds_no_fault_in_the_unit(local_unit: Path, name: str) -> None:
    """Only lines about this unit count: other units of a bare machine may be incomplete."""
    search_path = os.environ | {"SYSTEMD_UNIT_PATH": f"{local_unit.parent}:"}
    command = [program("systemd-analyze"), "verify", "--man=no", str(local_unit.parent / name)]
    said = run(command, env=search_path).stderr.splitlines()
    assert [line for line in said if "ota-server" in line] == []


def test_exposure_is_at_most_1_3(local_unit: Path) -> None:
    """The score of systemd itself, 10.0 for a service without any hardening."""
    command = [program("systemd-analyze"), "security", "--offline=true", "--no-pager"]
    done = run([*command, "--threshold=13", str(local_unit)])
    assert "Overall exposure level for ota-server.service" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("Type", ["notify"]),
        ("NotifyAccess", ["main"]),
        ("User", ["ota-server"]),
        ("After", ["network.target"]),
        ("EnvironmentFile", ["-/etc/default/ota-server"]),
        ("Environment", ["OTA_DIR=/srv/firmware"]),
        ("ExecStart", ["/usr/bin/python3 -I /opt/ota-server/ota_server.py"]),
        ("ExecReload", ["/bin/kill -HUP $MAINPID"]),
        ("RuntimeDirectory", ["ota-server"]),
        ("WantedBy", ["multi-user.target"]),
    ],
)
def test_unit_agrees_with_installer_and_server(key: str, expected: list[str]) -> None:
    """Each of these lines is relied upon by install.sh or by ota_server.py."""
    assert values(key) == expected


def test_stopping_waits_longer_than_the_drain() -> None:
    """The server gives running downloads 30 s; systemd must not kill it before."""
    assert int(values("TimeoutStopSec")[0]) > 30


def test_watchdog_waits_much_longer_than_a_turn_of_the_loop() -> None:
    """The loop looks at the clock each second; a slow card may hold it up for some."""
    assert 10 <= int(values("WatchdogSec")[0]) <= 60


def test_socket_listens_where_the_server_would() -> None:
    """So that enabling it changes no device's URL; systemd's own queue was 128 long once."""
    text = SOCKET.read_text()
    [port] = re.findall(r"port to listen on \(default: (\d+)\)", help_text())
    assert re.findall(r"^([A-Z]\w+=.*)$", text, re.MULTILINE)[1:] == [
        f"ListenStream={port}",
        f"Backlog={ota_server.BACKLOG}",
        "WantedBy=sockets.target",
    ]


def test_wrong_setting_ends_with_the_status_that_is_not_restarted() -> None:
    """It also proves that -I, as in ExecStart, does not hide OTA_ variables from the server."""
    environment = os.environ | {"OTA_PORT": "no-port"}
    done = run([sys.executable, "-I", str(SERVER)], env=environment)
    assert [str(done.returncode)] == values("RestartPreventExitStatus"), done.stderr


def test_server_knows_every_setting_of_the_unit() -> None:
    """Comments included: people copy them."""
    assert options_in(TEXT) >= {"--dir", "--cert"}
    assert options_in(TEXT + SOCKET.read_text()) <= options_in_help()


def test_default_settings_file_offers_what_the_server_knows(tmp_path: Path) -> None:
    """Every setting of the server that makes sense in a file is there, and no other."""
    install(tmp_path)
    offered = options_in((tmp_path / SETTINGS).read_text())
    assert offered == options_in_help() - {"--help", "--version", "--backup"} - COMPATIBILITY


def test_default_settings_file_changes_nothing(tmp_path: Path) -> None:
    """All settings are commented out, and none has a comment behind it: systemd would keep that."""
    install(tmp_path)
    for line in (tmp_path / SETTINGS).read_text().splitlines():
        assert line == "" or line.startswith("# ") or re.fullmatch(r"#(OTA|ADMIN)_[A-Z_]+=\S+", line)


def options_in_help() -> set[str]:
    """Return the long options that `ota_server.py --help` names."""
    return set(re.findall(r"--[a-z][a-z-]*", help_text()))
