"""compose.yaml, held against the Dockerfile and the server, and read by Docker's own tool."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from .test_dockerfile import values
from .test_install import ROOT, run
from .test_unit import options_in, options_in_help

COMPOSE = ROOT / "compose.yaml"
TEXT = COMPOSE.read_text()


def setting(key: str) -> list[str]:
    """Return what the one service says for a key: its value, or the items below it."""
    found = re.search(rf"^    {key}:(.*)\n((?:      - .*\n)*)", TEXT, re.MULTILINE)
    assert found, key
    items = re.findall(r"- (.*)", found[2]) or [found[1]]
    return [item.strip(' "') for item in items]


def default(text: str) -> str:
    """Return a value with its ${VARIABLE:-default} filled in."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def test_container_cannot_change_itself_and_comes_back() -> None:
    """Read-only root, no capability, no way to get one; started again unless it was stopped."""
    assert setting("read_only") == ["true"]
    assert setting("cap_drop") == ["ALL"]
    assert setting("security_opt") == ["no-new-privileges:true"]
    assert setting("restart") == ["unless-stopped"]


def test_user_port_and_folder_are_those_of_the_image() -> None:
    """The firmware is mounted read-only: the server never writes."""
    assert [default(user) for user in setting("user")] == values("USER")
    [port] = values("EXPOSE")
    assert [default(ports) for ports in setting("ports")] == [f"{port}:{port}"]
    [folder] = json.loads(values("VOLUME")[0])
    assert [default(volume) for volume in setting("volumes")] == [f"./firmware:{folder}:ro"]


def test_stop_waits_longer_than_the_drain() -> None:
    """The server gives running downloads 30 s; Docker alone waits 10."""
    [period] = setting("stop_grace_period")
    assert int(period.removesuffix("s")) > 30


def test_health_check_is_the_images() -> None:
    """One place says how; and Compose ignores `version`, with a warning."""
    assert not re.search(r"^ *(healthcheck|version|entrypoint|command):", TEXT, re.MULTILINE)
    assert values("HEALTHCHECK")


def test_server_knows_every_setting() -> None:
    """The commented ones, too."""
    assert options_in(TEXT.replace("OTA_USER", "").replace("OTA_...", "")) <= options_in_help()


def test_docker_itself_can_read_it() -> None:
    """Whichever form of the tool is installed."""
    for tool in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(tool[0]) and run([*tool, "version"]).returncode == 0:
            done = run([*tool, "-f", str(COMPOSE), "config"])
            assert (done.returncode, done.stderr) == (0, "")
            assert "stop_grace_period: 40s" in done.stdout
            return
    pytest.skip("the program docker-compose is missing")
