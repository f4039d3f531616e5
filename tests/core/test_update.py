"""The main job: devices are brought from 1.0.0 to 1.10.0, over HTTP and over HTTPS."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import put, site_of
from tests.core.wire import dial, standing, started
from tests.data.make_images import esp32_image, esp8266_image, gzip_image
from tests.devices import Device, Esp32, Esp8266

OK, NO_UPDATES, FAILED = "HTTP_UPDATE_OK", "HTTP_UPDATE_NO_UPDATES", "HTTP_UPDATE_FAILED"
MACS = {"esp8266": "5C:CF:7F:12:34:56", "esp32": "24:6F:28:AA:BB:CC"}

Make = Callable[..., Device]


def esp8266(port: int, version: str = "1.0.0", path: str = "/firmware", **options: Any) -> Esp8266:
    """An ESP8266 in the field."""
    image = options.pop("image", None) or esp8266_image("firmware", version)
    return Esp8266(host="127.0.0.1", port=port, path=path, image=image, **options)


def esp32(port: int, version: str = "1.0.0", path: str = "/sensor", **options: Any) -> Esp32:
    """An ESP32 in the field."""
    image = options.pop("image", None) or esp32_image("sensor", version)
    return Esp32(host="127.0.0.1", port=port, path=path, image=image, **options)


@pytest.fixture(params=["esp8266", "esp32"])
def make(request: pytest.FixtureRequest) -> Make:
    """How to make a device of either kind."""
    return {"esp8266": esp8266, "esp32": esp32}[request.param]


@pytest.fixture(params=["http", "https"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None over HTTP."""
    return certificate if request.param == "https" else None


@pytest.fixture
def fleet_folder(folder: Path) -> Path:
    """The firmware folder with `sensor` for the ESP32 beside `firmware` for the ESP8266."""
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        put(folder / f"sensor-{version}.bin", esp32_image("sensor", version))
    return folder


@contextmanager
def script_port(folder: Path, ca: Path | None) -> Iterator[int]:
    """The port of the real script, once it has checked both projects."""
    options = ("--dir", folder, "--port", "0", "--host", "127.0.0.1")
    tls = ("--cert", ca) if ca else ()
    with started(folder.parent, *options, *tls, ca=ca) as script:
        for project in ("firmware", "sensor"):
            script.wait_for(f"/x/{project}/{project}-1.10.0.bin")
        yield script.port


@contextmanager
def server_port(folder: Path, ca: Path | None) -> Iterator[int]:
    """The port of the server in this process."""
    with standing(site_of(folder), ca) as stand:
        yield stand.port


@pytest.mark.parametrize(
    "serve",
    [pytest.param(script_port, id="real-script"), pytest.param(server_port, id="in-process")],
)
def test_device_is_brought_from_1_0_0_to_1_10_0_and_then_gets_304(
    serve: Callable[..., Any], make: Make, ca: Path | None, fleet_folder: Path
) -> None:
    with serve(fleet_folder, ca) as port:
        device = make(port, tls_ca=ca)
        assert (device.version, device.update(), device.last_error) == ("1.0.0", OK, 0)
        name = f"{device.path[1:]}-1.10.0.bin"
        assert device.version == "1.10.0"
        assert device.image == (fleet_folder / name).read_bytes()
        assert device.last_headers["x-version"] == "1.10.0"
        assert device.last_headers["content-disposition"] == f'attachment; filename="{name}"'
        assert device.last_headers["cache-control"] == "private, no-transform, no-cache"
        assert (device.update(), device.last_status) == (NO_UPDATES, 304)
        assert device.last_headers["x-ota-reason"].startswith("not-newer: 1.10.0 is not newer")


def test_device_with_a_newer_version_than_ours_keeps_it(make: Make, fleet_folder: Path) -> None:
    with server_port(fleet_folder, None) as port:
        device = make(port, "2.0.0")
        assert (device.update(), device.version) == (NO_UPDATES, "2.0.0")


REFUSED: list[Any] = [
    pytest.param(esp8266, {"path": "/sensor"}, 403, -103, "wrong-chip: ", id="8266-esp32-image"),
    pytest.param(esp32, {"path": "/firmware"}, 403, -103, "wrong-chip: ", id="32-esp8266-image"),
    pytest.param(esp8266, {"path": "/fan"}, 404, -102, "no project 'fan'", id="8266-no-project"),
    pytest.param(esp32, {"path": "/fan"}, 404, -102, "no project 'fan'", id="32-no-project"),
    pytest.param(esp8266, {"version": ""}, 400, -104, "no x-ESP8266-version", id="8266-no-version"),
    pytest.param(esp32, {"version": ""}, 400, -104, "no x-ESP8266-version", id="32-no-version"),
    pytest.param(esp8266, {"version": "one"}, 400, -104, "x-esp8266-version: 'one'", id="8266-odd"),
    pytest.param(esp32, {"version": "0.1.2.3"}, 400, -104, "x-esp32-version: '0.1", id="32-odd"),
    pytest.param(esp8266, {"free_space": 4095}, 304, 0, "too-big: 1.10.0 has ", id="8266-no-room"),
    pytest.param(esp32, {"free_space": 1000}, 304, 0, "too-big: 1.10.0 has ", id="32-no-room"),
    pytest.param(esp8266, {"chip_size": 2**20}, 304, 0, "too-big: 1.10.0 is built", id="8266-1MB"),
    pytest.param(esp8266, {"mode": "spiffs"}, 304, 0, "wrong-kind: ", id="8266-file-system"),
    pytest.param(esp32, {"mode": "spiffs"}, 304, 0, "wrong-kind: ", id="32-file-system"),
]


@pytest.mark.parametrize(("device", "options", "status", "error", "reason"), REFUSED)
def test_refused_device_is_told_why(
    device: Make, options: dict[str, Any], status: int, error: int, reason: str, fleet_folder: Path
) -> None:
    with server_port(fleet_folder, None) as port:
        refused = device(port, **options)
        before = refused.image
        result = refused.update()
        with dial(port) as wire:
            wire.send(refused.last_request)
            answer = wire.reply()
    assert result == (NO_UPDATES if status == 304 else FAILED)
    assert (refused.last_status, refused.last_error) == (status, error)
    assert refused.image == before
    assert answer.status == status
    assert answer.headers["x-ota-reason"].startswith(reason)
    assert answer.body.decode().startswith(reason if status != 304 else "")
    assert answer.body.count(b"\n") == (0 if status == 304 else 1)


@pytest.mark.parametrize("flash_mode", [0, 2], ids=["QIO", "DIO"])
def test_esp8266_whose_sketch_forgot_to_bump_its_version_does_not_loop(
    flash_mode: int, folder: Path
) -> None:
    image = esp8266_image("lamp", "1.0.0")
    put(folder / "lamp-2.0.0.bin", image)
    with server_port(folder, None) as port:
        device = esp8266(port, path="/lamp", image=image, flash_mode=flash_mode)
        assert (device.version, device.update()) == ("1.0.0", NO_UPDATES)
        assert device.last_headers["x-ota-reason"].startswith("same-image: ")


@pytest.mark.parametrize("hash_appended", [True, False], ids=["sha256-appended", "no-sha256"])
def test_esp32_whose_sketch_forgot_to_bump_its_version_does_not_loop(
    *, hash_appended: bool, folder: Path
) -> None:
    image = esp32_image("lamp", "1.0.0", hash_appended=hash_appended)
    put(folder / "lamp-2.0.0.bin", image)
    with server_port(folder, None) as port:
        device = esp32(port, path="/lamp", image=image)
        assert (device.version, device.update()) == ("1.0.0", NO_UPDATES)
        assert device.last_headers["x-ota-reason"].startswith("same-image: ")


@pytest.mark.parametrize(
    ("running", "available"), [("1.0.0", "1.10.0"), ("1.10.0", "1.10.0"), ("2.0.0", "2.0.0")]
)
def test_esp8266_asks_which_version_is_right_for_it_without_downloading(
    running: str, available: str, folder: Path
) -> None:
    with server_port(folder, None) as port:
        device = esp8266(port, running)
        assert (device.get_available_version(), device.last_error) == (available, 0)
        assert device.version == running


def test_gzip_image_updates_an_esp8266(ca: Path | None, folder: Path) -> None:
    image = esp8266_image("firmware", "2.0.0")
    put(folder / "firmware-2.0.0.bin", gzip_image(image))
    with server_port(folder, ca) as port:
        device = esp8266(port, tls_ca=ca)
        assert (device.update(), device.version, device.image) == (OK, "2.0.0", image)
        assert device.update() == NO_UPDATES


def test_gzip_image_is_kept_from_an_esp32(folder: Path) -> None:
    put(folder / "sensor-2.0.0.bin", gzip_image(esp8266_image("sensor", "2.0.0")))
    with server_port(folder, None) as port:
        device = esp32(port)
        assert (device.update(), device.last_error) == (FAILED, -103)


def test_twenty_devices_update_at_once(ca: Path | None, fleet_folder: Path) -> None:
    with server_port(fleet_folder, ca) as port:
        devices: list[Device] = [
            make(port, tls_ca=ca, mac=f"5C:CF:7F:00:00:{number:02X}")
            for number in range(10)
            for make in (esp8266, esp32)
        ]
        barrier = threading.Barrier(len(devices))
        outcomes: list[str] = []

        def update(device: Device) -> None:
            barrier.wait(10)
            outcomes.append(device.update())

        threads = [threading.Thread(target=update, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert outcomes == [OK] * 20
    assert {device.version for device in devices} == {"1.10.0"}


def test_each_chip_of_a_mixed_project_gets_its_own_image(folder: Path) -> None:
    mixed = folder / "mixed"
    images = {
        "esp8266": esp8266_image("mixed", "1.1.0"),
        "esp32": esp32_image("mixed", "1.1.0"),
        "esp32c3": esp32_image("mixed", "1.1.0", chip_id=5),
    }
    for chip, image in images.items():
        put(mixed / f"{chip}-1.1.0.bin", image)
    old = {
        "esp32": esp32_image("mixed", "1.0.0"),
        "esp32c3": esp32_image("mixed", "1.0.0", chip_id=5),
    }
    for chip, image in old.items():
        put(mixed / f"{chip}-1.0.0.bin", image)
    with server_port(folder, None) as port:
        devices: dict[str, Device] = {"esp8266": esp8266(port, path="/mixed")}
        for chip, image in old.items():
            devices[chip] = esp32(port, path="/mixed", image=image, chip=chip)
        for chip, device in devices.items():
            assert device.update() == OK, chip
            assert device.image == images[chip]
            assert device.update() == NO_UPDATES, chip


def test_log_tells_a_devices_story_in_one_line_a_decision(
    make: Make, fleet_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    with server_port(fleet_folder, None) as port:
        device = make(port)
        device.update()
        device.update()
        project = device.path[1:]
        other = {"sensor": "/firmware", "firmware": "/sensor"}[project]
        make(port, "0.9.0", path=other).update()
    story = [line for line in caplog.messages if device.mac in line]
    assert len(story) == 4
    assert story[0].endswith(f"127.0.0.1 {project} 1.0.0 -> 1.10.0")
    assert re.search(r"was sent (\d+) of \1 bytes of ", story[1])
    assert f"{project} 1.10.0 stays, not-newer: " in story[2]
    assert "stays, wrong-chip: " in story[3]


def test_query_and_leading_path_segments_do_not_matter(folder: Path) -> None:
    with server_port(folder, None) as port:
        device = esp8266(port, path="/any/thing/firmware?mac=5C:CF:7F:12:34:56&x=%2F")
        assert (device.update(), device.version) == (OK, "1.10.0")
