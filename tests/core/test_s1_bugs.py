"""The bugs of the server that this one succeeds, each a test that ours passes."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import pytest

import ota_server
from ota_server import Catalog, DirectoryCatalog, Facts, Image, Release, Version
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Script, Stand, dial, request, standing, started
from tests.data.make_images import esp8266_image
from tests.devices import Esp8266

LOCAL = ("--host", "127.0.0.1", "--port", "0")
CHECK = request("/firmware", "x-ESP8266-version: 1.0.0", "Connection: close", http="1.0")
SECONDS = 5  # how long a device of the original waited


@contextmanager
def serving(folder: Path, *options: str | Path, ca: Path | None = None) -> Iterator[Script]:
    """The real script with this folder, without any environment."""
    tls = ("--cert", ca) if ca else ()
    with started(folder.parent, "--dir", folder, *LOCAL, *tls, *options, ca=ca) as script:
        script.wait_for("/firmware", "x-ESP8266-version: 1.0.0")
        yield script


def offered(folder: Path, project: str, version: str = "0.0.1") -> str:
    """The version that a device of this project is offered; empty when the project is unknown."""
    with standing(site_of(folder)) as stand, stand.dial() as wire:
        answer = wire.ask(f"/{project}", f"x-ESP8266-version: {version}")
    assert answer.status in {200, 304, 404}
    return answer.headers.get("x-version", "") if answer.status != 404 else ""


# -- 1. Starting ----------------------------------------------------------------------------------


def test_port_given_as_text_does_not_crash(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with serving(folder, "--port", str(port)) as script:
        assert script.port == port


def test_log_level_in_lower_case_does_not_crash(folder: Path) -> None:
    with serving(folder, "--log", "info") as script:
        wait_until(lambda: "firmware 1.0.0 -> 1.10.0" in script.log)


def test_missing_home_does_not_crash(folder: Path) -> None:
    with serving(folder) as script:  # no environment at all
        assert script.process.poll() is None


def test_https_works_although_ssl_wrap_socket_is_gone(folder: Path, certificate: Path) -> None:
    with serving(folder, ca=certificate) as script:
        device = Esp8266(
            host="127.0.0.1",
            port=script.port,
            path="/firmware",
            image=(folder / "firmware-1.0.0.bin").read_bytes(),
            tls_ca=certificate,
        )
        assert device.update() == "HTTP_UPDATE_OK"


# -- 2. One holds all -----------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_one_silent_client_does_not_freeze_everybody(
    *, tls: bool, folder: Path, certificate: Path
) -> None:
    with standing(site_of(folder), certificate if tls else None) as stand, dial(stand.port):
        assert stand.is_fine()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_one_stalled_download_does_not_freeze_everybody(
    *, tls: bool, folder: Path, certificate: Path
) -> None:
    put(folder / "big-1.0.0.bin", esp8266_image("big", "1.0.0", payload=bytes(1 << 20)))
    ca = certificate if tls else None
    with standing(site_of(folder), ca) as stand, stand.dial(receive_buffer=4096) as stalled:
        stalled.send(request("/big/big-1.0.0.bin"))
        assert stalled.head().status == 200
        assert stand.is_fine()


def test_300_devices_at_once_are_all_served_in_time(folder: Path) -> None:
    with serving(folder, "--log", "warning") as script, ExitStack() as stack:
        script.process.send_signal(signal.SIGSTOP)  # so that they really come at once
        wires = [stack.enter_context(script.dial()) for _ in range(300)]
        for wire in wires:
            wire.link.settimeout(SECONDS)
            wire.send(CHECK)
        script.process.send_signal(signal.SIGCONT)
        replies = [wire.reply() for wire in wires]
    newest = (folder / "firmware-1.10.0.bin").read_bytes()
    assert [(reply.status, reply.body == newest) for reply in replies] == [(200, True)] * 300


# -- 3. Which version, whose ----------------------------------------------------------------------


def test_1_10_is_newer_than_1_9(tmp_path: Path) -> None:
    for version in ("1.9", "1.10", "1.2.10"):
        put(tmp_path / f"firmware-{version}.bin", esp8266_image("firmware", version))
    assert offered(tmp_path, "firmware", "1.9") == "1.10.0"
    assert offered(tmp_path, "firmware", "1.10") == ""


@pytest.mark.parametrize("turn", range(4))
def test_newest_is_not_the_first_entry_of_the_folder(turn: int, tmp_path: Path) -> None:
    versions = ["1.0.0", "3.0.0", "2.0.0", "0.9.9"]
    for version in versions[turn:] + versions[:turn]:
        put(tmp_path / f"firmware-{version}.bin", esp8266_image("firmware", version))
    assert offered(tmp_path, "firmware") == "3.0.0"


def test_project_sensor_does_not_get_the_firmware_of_sensor2(tmp_path: Path) -> None:
    for project in ("sensor2", "sensor-2-old", "my-sensor"):
        put(tmp_path / f"{project}-1.0.0.bin", esp8266_image(project, "1.0.0"))
    assert offered(tmp_path, "sensor") == ""
    assert offered(tmp_path, "sensor2") == "1.0.0"


@pytest.mark.parametrize("project", ["my-app", "esp32", "my-app-2.0", "a-1", "v2", "x.y", "1"])
def test_project_names_may_hold_hyphens_digits_and_dots(project: str, tmp_path: Path) -> None:
    put(tmp_path / f"{project}-1.0.0.bin", esp8266_image(project, "1.0.0"))
    put(tmp_path / "my-1.0.0.bin", esp8266_image("my", "9.9.9"))
    assert offered(tmp_path, project) == "1.0.0"


# -- 4. Files that come, change and go ------------------------------------------------------------


@pytest.mark.parametrize("ending", [".part", ".tmp", ".filepart", "~", ".bin.part", ".zip", ""])
def test_file_that_is_no_bin_is_not_served(ending: str, folder: Path) -> None:
    put(folder / f"firmware-2.0.bin{ending or '.'}", esp8266_image("firmware", "2.0"))
    put(folder / ".firmware-2.1.bin", esp8266_image("firmware", "2.1"))
    assert offered(folder, "firmware") == "1.10.0"


@pytest.mark.parametrize("share", [0, 1, 100, 4096, 4112, 5000, -16, -1])
def test_file_that_is_still_being_copied_is_not_served(share: int, folder: Path) -> None:
    image = esp8266_image("firmware", "2.0.0")
    path = put(folder / "firmware-2.0.0.bin", image[:share])
    site = site_of(folder)
    assert isinstance(site.catalog, DirectoryCatalog)
    with standing(site) as stand, stand.dial() as wire:
        assert wire.check().headers["x-version"] == "1.10.0"
        assert wire.ask("/firmware/firmware-2.0.0.bin").status == 404
        put(path, image, age=30)
        assert site.catalog.scan()
        answer = wire.check()
        assert (answer.headers["x-version"], answer.body) == ("2.0.0", image)
        assert answer.headers["x-md5"] == hashlib.md5(image).hexdigest()  # noqa: S324


def newest(script: Script) -> str:
    """The version that the script offers now."""
    with script.dial() as wire:
        return wire.check().headers.get("x-version", "")


def test_files_are_added_replaced_renamed_and_removed_while_it_runs(folder: Path) -> None:
    with serving(folder) as script:
        assert newest(script) == "1.10.0"
        hidden = put(folder / "upload", esp8266_image("firmware", "2.0.0"))
        path = hidden.rename(folder / "firmware-2.0.0.bin")
        wait_until(lambda: newest(script) == "2.0.0", 2)
        path = path.rename(folder / "firmware-1.11.0.bin")
        wait_until(lambda: newest(script) == "1.11.0", 2)
        again = esp8266_image("firmware", "1.11.0", seed=1)
        put(folder / ".new", again, age=30).replace(path)
        wait_until(lambda: script.wait_for("/x/firmware/firmware-1.11.0.bin").body == again, 2)
        path.unlink()
        wait_until(lambda: newest(script) == "1.10.0", 2)
        assert "Traceback" not in script.log


def test_folder_that_vanishes_and_comes_back_heals_by_itself(folder: Path) -> None:
    with serving(folder) as script:
        away = folder.rename(folder.with_name("away"))
        answer = script.wait_for("/firmware", "x-ESP8266-version: 1.0.0", status=503)
        assert int(answer.headers["retry-after"]) > 0
        script.wait_for("/healthz", status=503)
        away.rename(folder)
        wait_until(lambda: newest(script) == "1.10.0", 3)
        assert "Traceback" not in script.log


# -- 5. What a reply gives away, what it costs ----------------------------------------------------


@pytest.mark.parametrize("path", ["/firmware", "/x/firmware", "/firmware/firmware-1.10.0.bin"])
def test_replies_do_not_leak_the_path_of_the_folder(path: str, folder: Path) -> None:
    with standing(site_of(folder)) as stand, stand.dial() as wire:
        answer = wire.ask(path, "x-ESP8266-version: 1.0.0")
        pages = [wire.ask("/"), wire.ask("/nobody"), wire.ask("/firmware/firmware-3.bin")]
    name = "firmware-1.10.0.bin"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    for each in (answer, *pages):
        assert str(folder) not in "".join(each.headers.values()) + each.body.decode("latin-1")


def test_file_is_inspected_once_however_many_devices_ask(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected: list[int] = []
    inspect = ota_server.inspect

    def counting(file: FileIO, kind: str) -> Facts:
        inspected.append(os.fstat(file.fileno()).st_ino)
        return inspect(file, kind)

    monkeypatch.setattr(ota_server, "inspect", counting)
    site = site_of(folder)
    assert isinstance(site.catalog, DirectoryCatalog)
    with standing(site) as stand, stand.dial() as wire:
        for _ in range(5):
            assert wire.check().status == 200
            assert site.catalog.scan()
    assert sorted(inspected) == sorted(path.stat().st_ino for path in folder.iterdir())


class CountingFile(FileIO):
    """A file that counts the bytes that are read from it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        data = super().read(-1 if size is None else size)
        assert data is not None
        self.count += len(data)
        return data


@dataclass(frozen=True, slots=True)
class CountingCatalog:
    """A catalog whose files count."""

    catalog: Catalog
    files: list[CountingFile]

    def newest(self) -> Mapping[str, Version]:
        """As it is."""
        return self.catalog.newest()

    def projects(self) -> Sequence[str]:
        """As it is."""
        return self.catalog.projects()

    def releases(self, project: str) -> Sequence[Release]:
        """As it is."""
        return self.catalog.releases(project)

    def open(self, release: Release) -> Image:
        """The image, with a file that counts."""
        image = self.catalog.open(release)
        image.file.close()
        self.files.append(CountingFile(release.path))
        return replace(image, file=self.files[-1])


def answered_with(stand: Stand, version: str, method: str = "GET") -> int:
    """The status of an update check."""
    with stand.dial() as wire:
        check = f"x-ESP8266-version: {version}"
        return wire.ask("/firmware", check, "Connection: close", method=method).status


def test_file_is_read_once_per_download_and_not_at_all_without(folder: Path) -> None:
    site = site_of(folder)
    catalog = CountingCatalog(site.catalog, [])
    with standing(replace(site, catalog=catalog)) as stand:
        assert answered_with(stand, "1.10.0") == 304
        assert catalog.files == []
        assert answered_with(stand, "1.0.0", "HEAD") == 200
        assert answered_with(stand, "1.0.0") == 200
    size = (folder / "firmware-1.10.0.bin").stat().st_size
    assert [(file.count, file.closed) for file in catalog.files] == [(0, True), (size, True)]
