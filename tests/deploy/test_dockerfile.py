"""The Dockerfile, read as Docker reads it; its health check is really run."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core.wire import started

from .test_install import ROOT, program, run
from .test_unit import options_in, options_in_help

DOCKERFILE = ROOT / "Dockerfile"
IGNORE = ROOT / ".dockerignore"


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, rest) in order, continued lines joined, comments dropped."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def values(name: str) -> list[str]:
    """Return what follows each instruction of that name."""
    return [rest for instruction, rest in instructions() if instruction == name]


def health_command() -> list[str]:
    """Return the health check's exec-form command."""
    [check] = values("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert all(isinstance(word, str) for word in command)
    return list(command)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Yield the port of a server that answers every GET with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    paths: list[str] = []
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
    assert paths == ["/healthz"]


def checked(port: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
    """Return the finished health check of whatever listens on a port of this machine."""
    [python, *arguments] = health_command()
    assert python == "python3"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTA_")}
    return run([sys.executable, *arguments], env=clean | {"OTA_PORT": str(port)} | settings)


@pytest.mark.parametrize(("wanted", "called"), [("", ""), ("paho-mqtt", "paho-mqtt")])
def test_image_has_no_package_unless_one_is_named(wanted: str, called: str, tmp_path: Path) -> None:
    """The instruction is really run, with a python3 that only says what it was asked."""
    [line] = (rest for rest in values("RUN") if "pip" in rest)
    said = tmp_path / "said"
    stand_in = tmp_path / "python3"
    stand_in.write_text(f'#!/bin/sh\nprintf %s "$5" > {said}\n')
    stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WITH": wanted}
    assert run(["sh", "-c", line], env=env).returncode == 0
    assert (said.read_text() if said.exists() else "") == called
    assert values("ARG") == ['WITH=""']


def test_health_check_passes_while_the_server_is_well() -> None:
    """200 from /healthz."""
    with answering(200) as port:
        done = checked(port)
    assert (done.returncode, done.stderr) == (0, "")


def test_health_check_fails_when_the_firmware_cannot_be_read() -> None:
    """503 from /healthz; Docker reserves every status but 0 and 1."""
    with answering(503) as port:
        assert checked(port).returncode == 1


def test_health_check_fails_when_nobody_listens() -> None:
    """The port is bound but not listened on, so that nobody else can answer there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert checked(bound.getsockname()[1]).returncode == 1


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "127.0.0.1"])  # noqa: S104
def test_health_check_asks_the_address_that_is_listened_on(host: str, folder: Path) -> None:
    """All addresses among them; a single one might not answer on 127.0.0.1."""
    env = {"OTA_HOST": host, "OTA_DIR": str(folder), "OTA_PORT": "0"}
    with started(folder.parent, env=env) as script:
        assert checked(script.port, OTA_HOST=host).returncode == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("place", ["port", "unix"])
def test_health_check_asks_as_the_settings_say(
    place: str, scheme: str, folder: Path, certificate: Path
) -> None:
    """A unix socket, HTTPS, and a server that lets nobody else in: /healthz is open."""
    with tempfile.TemporaryDirectory() as directory:  # its path is short enough for a socket's
        host = f"unix:{directory}/ota.sock" if place == "unix" else "127.0.0.1"
        env = {"OTA_HOST": host, "OTA_CERT": str(certificate) if scheme == "https" else ""}
        closed = {"OTA_TOKEN": "secret", "OTA_ALLOW": "192.0.2.0/24"}
        more = {"OTA_DIR": str(folder), "OTA_PORT": "0"}
        with started(folder.parent, env=env | closed | more) as script:
            done = checked(script.port, **env)
            assert (done.returncode, done.stderr) == (0, "")
        assert checked(script.port, **env).returncode == 1


def test_health_check_needs_nothing_but_python() -> None:
    """The slim image has neither curl nor wget, and no shell is started for it."""
    assert health_command()[:3] == ["python3", "-I", "-c"]
    assert not re.search("curl|wget|urllib", health_command()[3])


def test_base_is_a_plain_python_image() -> None:
    """No `# syntax=` line: it would fetch a parser from a registry for every build."""
    [base] = values("FROM")
    assert re.fullmatch(r"python:3\.\d+-slim", base)
    assert not re.search(r"^#\s*syntax", DOCKERFILE.read_text(), re.IGNORECASE | re.MULTILINE)


def test_server_is_process_1_and_takes_options() -> None:
    """Exec form: signals reach the server, and what follows the image's name is appended."""
    assert json.loads(values("ENTRYPOINT")[0]) == ["python3", "-I", "/app/ota_server.py"]
    assert values("CMD") == []
    assert values("STOPSIGNAL") == ["SIGINT"]  # which Python handles before the server does


def test_user_is_a_number_and_not_root() -> None:
    """Orchestrators that forbid root cannot look up a name."""
    assert values("USER") == ["10001:10001"]


def test_user_cannot_change_the_program() -> None:
    """Copied as root, and nothing after that gives it away."""
    assert values("COPY") == ["ota_server.py /app/", "ota_fleet /app/ota_fleet/"]
    assert re.findall("chown .*? (/\\S+)", DOCKERFILE.read_text()) == ["/state"]


def test_documented_call_finds_port_and_folder() -> None:
    """`docker run -p 8000:8000 -v /my-firmware-directory:/firmware IMAGE`."""
    assert values("EXPOSE") == ["8000"]
    assert json.loads(values("VOLUME")[0]) == ["/firmware"]
    assert values("ENV") == ["OTA_DIR=/firmware"]
    assert "docker run -p 8000:8000 -v /my-firmware-directory:/firmware" in DOCKERFILE.read_text()


def test_server_knows_every_setting_of_the_image() -> None:
    """The health check's variables among them."""
    used = options_in(DOCKERFILE.read_text())
    assert used == {"--dir", "--host", "--port", "--cert", "--state", "--mqtt"}
    assert used <= options_in_help()


def test_build_context_is_exactly_what_is_copied() -> None:
    """Firmware, keys and .git never travel to the Docker daemon."""
    first, *exceptions = IGNORE.read_text().split()
    assert first == "*"
    copied = {source for rest in values("COPY") for source in rest.split()[:-1]}
    packages = {source for source in copied if "." not in source}
    python = {f"{package}/*.py" for package in packages}  # and nothing that Python compiled
    wanted = copied - packages | python | {f"{package}/static/*" for package in packages}
    assert set(exceptions) == {f"!{source}" for source in wanted}


def test_everything_copied_exists() -> None:
    """A build must not fail on a fresh clone."""
    for rest in values("COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()


def test_hadolint_has_nothing_to_say() -> None:
    """Informational remarks count."""
    done = run([program("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)])
    assert (done.returncode, done.stdout) == (0, "")
