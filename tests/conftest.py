"""What the tests share: firmware folders, a running server, a certificate."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ota_server
from ota_server import Config, DirectoryCatalog, Limits, Server, Site
from tests.data.make_images import esp8266_image

QUICK = Limits(
    handshake=0.3, head=0.3, idle=0.3, progress=0.5, grace=5.0, linger=0.3, tick=0.02
)  # seconds


def put(path: Path, data: bytes, *, age: float = 60.0) -> Path:
    """Writes a file as if `age` seconds ago, as the catalog leaves alone what is still hot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    written = path.stat().st_mtime - age
    os.utime(path, (written, written))
    return path


def site_of(folder: Path, **settings: int | str) -> Site:
    """A site over a folder whose files are all checked; nobody watches the folder."""
    config = Config(dir=str(folder), host="127.0.0.1", port=0, **settings)  # type: ignore[arg-type]
    catalog = DirectoryCatalog(config.dir)
    assert catalog.scan()
    return ota_server.build_site(config, catalog)


@contextmanager
def running(site: Site, **options: object) -> Iterator[Server]:
    """The real Server on a free port, in a thread; `options` go to Server."""
    server = Server(site, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that another thread or process does, bounded."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail(f"it did not happen within {seconds} s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A firmware folder with `firmware` 1.0.0, 1.9.0 and 1.10.0 for the ESP8266."""
    directory = tmp_path / "firmware"
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        put(directory / f"firmware-{version}.bin", esp8266_image("firmware", version))
    return directory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KB, of which an empty registry takes 180."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("needs mount and the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """An empty firmware folder."""
    folder = tmp_path / "firmware"
    folder.mkdir()
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log so far, a line each."""
    caplog.set_level(logging.INFO, "ota")
    return lambda: [f"{each.levelname} {each.getMessage()}" for each in caplog.records]


@pytest.fixture
def lines(said: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """The log lines so far that hold a text."""
    return lambda text: [line for line in said() if text in line]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and P-256 certificate for 127.0.0.1 in one file, made by the line that --help gives."""
    pem = tmp_path_factory.mktemp("tls") / "ota.pem"
    start = ota_server.EPILOG.index("openssl req")
    line = ota_server.EPILOG[start:].replace("\\\n", " ").replace("192.168.1.5", "127.0.0.1")
    subprocess.run(line.replace("ota.pem", str(pem)).split(), check=True, capture_output=True)
    return pem
