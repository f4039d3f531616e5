"""The examples lead somewhere: what a user pastes asks for what the server has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ota_server import Request, answer
from tests.conftest import put, running, site_of
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    gzip_image,
    mongoose_zip,
    tasmota32_image,
    tasmota_image,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVER = re.compile(r"http://(?:[^/@\s]+@)?192\.168\.1\.5:8000(/[^\s\"'`?<>]*)")


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """A folder with the projects that the examples name."""
    folder = tmp_path / "firmware"
    put(folder / "firmware-1.1.0.bin", esp8266_image("firmware", "1.1.0"))
    put(folder / "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0"))
    put(folder / "lamp-1.1.0.zip", mongoose_zip("lamp", "1.1.0"))
    put(folder / "tasmota-14.2.0.bin.gz", gzip_image(tasmota_image("14.2.0")))
    put(folder / "tasmota32-14.2.0.bin", tasmota32_image("14.2.0"))
    return folder


def texts() -> list[Path]:
    """The examples, without the images."""
    return sorted(
        path
        for path in EXAMPLES.rglob("*")
        if path.is_file() and path.suffix not in {".bin", ".pyc"}
    )


def test_every_url_in_the_examples_is_answered(firmware: Path) -> None:
    site, asked = site_of(firmware), set()
    for path in texts():
        for url in SERVER.findall(path.read_text()):
            asked.add(url)
            version = {"lamp": ("x-mgos-fw-version", "esp32 1.0.0 1")}.get(url[1:], ("", ""))
            request = Request("GET", url, "version=1.0.0", dict([version]), "127.0.0.1")
            reply = answer(site, request)
            if not isinstance(reply.body, bytes):
                reply.body.file.close()
            assert (path.name, url, reply.status) == (path.name, url, 200)
    assert {"/sensor/latest.bin", "/sensor/manifest.json", "/lamp", "/tasmota.bin.gz"} <= asked


def test_shellcheck_has_nothing_to_say_about_the_script() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not command:
        pytest.skip("the program shellcheck is not installed")
    subprocess.run([command, "--severity=style", str(EXAMPLES / "curl.sh")], check=True)


@pytest.mark.parametrize("token", ["", "T0ken"])
def test_the_script_downloads_and_checks(firmware: Path, tmp_path: Path, token: str) -> None:
    if not shutil.which("curl"):
        pytest.skip("the program curl is not installed")
    file, image = "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0")
    with running(site_of(firmware, token=token)) as server:
        environment = {
            "PATH": "/usr/bin:/bin",
            "SERVER": f"http://127.0.0.1:{server.server_address[1]}",
            "PROJECT": "sensor",
            "TOKEN": token,
        }
        for here in (0, 100, None):  # bytes of an earlier try; None: the whole file
            if here is not None:
                (tmp_path / file).write_bytes(image[:here])
            done = subprocess.run(
                ["sh", str(EXAMPLES / "curl.sh")],
                cwd=tmp_path,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            assert f"{file}: OK" in done.stdout
            assert '"latest":"1.1.0"' in done.stdout.replace(" ", "")
            assert (tmp_path / file).read_bytes() == image
