"""Emulated devices that update, loop, take updates back, die and lie; what the server makes of it.

The devices are those of devices.py, the server is the real one with a memory. What came of an
update is read as another process would: from the registry.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ota_fleet import Known
from ota_fleet import registry as registry_module
from ota_fleet.attempts import BROKEN, PROVEN, RETURNED, SILENT, Attempt
from ota_fleet.rollout import Plan, Stage
from ota_server import Version
from tests.conftest import put, wait_until
from tests.core.wire import Stand, dial, standing
from tests.data.make_images import esp32_image, esp8266_image, esp8266_signed, gzip_image
from tests.devices import Device, Esp32, Esp32Newest, Esp8266
from tests.fleet.test_fleet import registry_of, remembering

OK, NO_UPDATES, FAILED = "HTTP_UPDATE_OK", "HTTP_UPDATE_NO_UPDATES", "HTTP_UPDATE_FAILED"
LARGE = bytes(3 << 20)  # more than any socket's buffers hold


@dataclass(frozen=True)
class Shop:
    """A server with a memory, and what it has noted."""

    stand: Stand
    known: Known

    def device(self, kind: type[Device] = Esp8266, version: str = "1.0.0", **options: Any) -> Any:
        """A device of project bulb, an ESP8266, or lamp, an ESP32, that runs this version."""
        project = "bulb" if kind is Esp8266 else "lamp"
        image = (esp8266_image if kind is Esp8266 else esp32_image)(project, version)
        usual = {"path": f"/{project}", "image": image, "tls_ca": self.stand.ca}
        where: dict[str, Any] = {"host": "127.0.0.1", "port": self.stand.port}
        return kind(**where | usual | options)

    def attempts(self, device: Device) -> list[Attempt]:
        """Those of a device, the first one first."""
        return self.known.grants.attempts(device.mac)[::-1]

    def came_to(self, device: Device, *outcomes: str) -> None:
        """Waits until a device's attempts have these outcomes."""
        wait_until(lambda: [each.outcome for each in self.attempts(device)] == [*outcomes])

    def begin(self, plan: Plan, project: str = "bulb") -> int:
        """Begins a rollout of 1.10.0; gives back its id."""
        version = Version.parse("1.10.0")
        return self.known.rollouts.create(project, version, plan, "me", int(self.known.now())).id


@contextmanager
def open_shop(folder: Path, ca: Path | None = None, **settings: Any) -> Iterator[Shop]:
    """A server over a folder."""
    with (
        remembering(folder, **settings) as site,
        registry_of(site) as registry,
        standing(site, ca) as stand,
    ):
        yield Shop(stand, Known.of(registry))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices say is written at once."""
    monkeypatch.setattr(registry_module, "BATCH_SECONDS", 0.02)


@pytest.fixture
def goods(tmp_path: Path) -> Path:
    """Two versions for each of two chips."""
    folder = tmp_path / "firmware"
    for version in ("1.0.0", "1.10.0"):
        put(folder / f"bulb-{version}.bin", esp8266_image("bulb", version))
        put(folder / f"lamp-{version}.bin", esp32_image("lamp", version))
    return folder


@pytest.fixture
def shop(goods: Path) -> Iterator[Shop]:
    """A server over them."""
    with open_shop(goods) as found:
        yield found


KINDS = pytest.mark.parametrize("kind", [Esp8266, Esp32, Esp32Newest])


# -- 1. It runs, or it does not --------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_device_that_runs_its_update_has_proven_it(
    kind: type[Device], secure: bool, goods: Path, certificate: Path
) -> None:
    with open_shop(goods, certificate if secure else None) as shop:
        device = shop.device(kind)
        assert device.update() == OK
        assert [each.outcome for each in shop.attempts(device)] == [""]
        assert device.update() == NO_UPDATES
        shop.came_to(device, PROVEN)
        (attempt,) = shop.attempts(device)
        assert (attempt.before, attempt.version) == ("1.0.0", "1.10.0")
        assert attempt.sent == attempt.size


@KINDS
def test_device_that_takes_it_back_has_returned(kind: type[Device], shop: Shop) -> None:
    device = shop.device(kind, boots=1)
    assert (device.update(), device.version) == (OK, "1.0.0")
    assert device.update() == OK
    shop.came_to(device, RETURNED, "")


@KINDS
def test_device_that_takes_it_back_later_had_proven_it(kind: type[Device], shop: Shop) -> None:
    device = shop.device(kind, boots=3)
    assert (device.update(), device.version) == (OK, "1.10.0")
    device.reboot()
    assert device.update() == NO_UPDATES
    shop.came_to(device, PROVEN)
    device.reboot()
    assert (device.version, device.update()) == ("1.0.0", OK)
    shop.came_to(device, RETURNED, "")


@KINDS
def test_device_that_loops_gets_it_three_times_and_reads_why_no_more(
    kind: type[Device], shop: Shop
) -> None:
    device = shop.device(kind, boots=1)
    assert [device.update() for _ in range(3)] == [OK] * 3
    assert [device.update() for _ in range(2)] == [NO_UPDATES] * 2
    assert device.last_headers["x-ota-reason"].startswith(
        "loop: 1.10.0 was given 3 times in full and the device does not run it"
    )
    shop.came_to(device, *[RETURNED] * 3)
    assert [loop.device for loop in shop.known.grants.loops()] == [device.mac]
    assert shop.known.grants.forgive(device.mac)
    wait_until(lambda: device.update() == OK)


@KINDS
def test_device_that_never_comes_back_is_silent_and_the_rollout_halts(
    kind: type[Device], shop: Shop
) -> None:
    plan = Plan((Stage(count=1, minimum=1), Stage()), patience=1)
    number = shop.begin(plan, "bulb" if kind is Esp8266 else "lamp")
    device, other = shop.device(kind, dies=True), shop.device(kind, mac="24:6F:28:00:00:01")
    assert (device.update(), device.update()) == (OK, "")

    def is_silent() -> bool:
        shop.known.grants.sweep()
        return [each.outcome for each in shop.attempts(device)] == [SILENT]

    wait_until(is_silent)
    rollout = shop.known.rollouts.get(number)[0]
    assert (rollout.state, rollout.reason) == (
        "halted", "1 of 1 devices of stage 1 failed (1 silent), more than 10 %",
    )  # fmt: skip

    def is_told() -> bool:
        assert other.update() == NO_UPDATES
        return bool(other.last_headers["x-ota-reason"].startswith("halted: "))

    wait_until(is_told)


def test_device_that_leaves_in_the_middle_has_broken_off(goods: Path) -> None:
    put(goods / "bulb-1.10.0.bin", esp8266_image("bulb", "1.10.0", payload=LARGE))
    with open_shop(goods) as shop:
        device = shop.device(free_space=8 << 20)
        device.last_request = device.request()
        with dial(shop.stand.port, receive_buffer=4096) as wire:
            wire.send(device.last_request)
            assert wire.head().status == 200
            wire.read(10_000)
        wait_until(lambda: 0 < shop.attempts(device)[0].sent < len(LARGE))
        assert device.update() == OK
        assert device.update() == NO_UPDATES
        shop.came_to(device, BROKEN, PROVEN)


def test_image_that_a_device_does_not_take_is_no_success(shop: Shop) -> None:
    device = shop.device(Esp32, stuck=True)  # an update that was left open
    assert device.update() == FAILED
    device.reboot()
    assert (device.update(), device.update()) == (OK, NO_UPDATES)
    shop.came_to(device, RETURNED, PROVEN)


# -- 2. Who says what ------------------------------------------------------------------------------


def test_mac_in_lower_case_is_the_same_device(shop: Shop) -> None:
    device = shop.device()
    upper, lower = device.mac, device.mac.lower()
    assert device.update() == OK
    device.mac = lower
    assert device.update() == NO_UPDATES
    shop.came_to(device, PROVEN)
    device.mac = upper
    shop.came_to(device, PROVEN)
    assert len(shop.known.registry.devices()) == 1


@KINDS
def test_device_that_says_it_runs_the_new_version_and_does_not_is_found_out(
    kind: type[Device], shop: Shop
) -> None:
    device = shop.device(kind, boots=1)
    assert (device.update(), device.version) == (OK, "1.0.0")
    device.claims = "1.10.0"
    assert device.update() == NO_UPDATES
    shop.came_to(device, RETURNED)


@KINDS
def test_device_that_always_says_the_old_version_has_proven_it_by_its_digest(
    kind: type[Device], shop: Shop
) -> None:
    device = shop.device(kind, claims="1.0.0")
    assert (device.update(), device.update()) == (OK, NO_UPDATES)
    assert device.last_headers["x-ota-reason"].startswith("same-image: ")
    shop.came_to(device, PROVEN)


@KINDS
def test_device_that_says_no_digest_proves_it_by_its_version(
    kind: type[Device], shop: Shop
) -> None:
    device = shop.device(kind, tells_digest=False)
    assert (device.update(), device.update()) == (OK, NO_UPDATES)
    shop.came_to(device, PROVEN)


def test_device_that_says_neither_and_loops_is_stopped(shop: Shop) -> None:
    """Its version is typed into the sketch, and nobody raised it."""
    device = shop.device(claims="1.0.0", tells_digest=False)
    assert [device.update() for _ in range(4)] == [OK, OK, OK, NO_UPDATES]
    shop.came_to(device, *[RETURNED] * 3)


# -- 3. Forms of images, and of addresses ----------------------------------------------------------


@pytest.mark.parametrize("mode", range(4))
def test_device_of_any_flash_mode_proves_it(mode: int, shop: Shop) -> None:
    device = shop.device(flash_mode=mode, claims="1.0.0")  # so only the digest tells
    assert (device.update(), device.update()) == (OK, NO_UPDATES)
    shop.came_to(device, PROVEN)


def test_packed_image_is_proven_by_what_comes_out_of_it(goods: Path) -> None:
    (goods / "bulb-1.10.0.bin").unlink()
    put(goods / "bulb-1.10.0.bin.gz", gzip_image(esp8266_image("bulb", "1.10.0", flash_mode=3)))
    with open_shop(goods) as shop:
        device = shop.device(flash_mode=3, claims="1.0.0")
        assert (device.update(), device.version, device.update()) == (OK, "1.10.0", NO_UPDATES)
        shop.came_to(device, PROVEN)


def test_signed_image_is_proven(goods: Path) -> None:
    signed = esp8266_signed(esp8266_image("bulb", "1.10.0"))
    put(goods / "bulb-1.10.0.bin", signed)
    with open_shop(goods) as shop:
        device = shop.device()
        assert (device.update(), device.update()) == (OK, NO_UPDATES)
        shop.came_to(device, PROVEN)


@pytest.mark.parametrize(
    ("kind", "path", "tells_version"),
    [
        pytest.param(Esp8266, "/any/thing/bulb", True, id="s1"),
        pytest.param(Esp8266, "/update?dev=bulb&ver=v{}", False, id="s3"),
        pytest.param(Esp32, "/update?dev=lamp&ver=v{}", False, id="s3-esp32"),
        pytest.param(Esp32, "/firmware/lamp/latest.bin?version={}", False, id="latest"),
        pytest.param(Esp32, "/lamp.bin", True, id="project-bin"),
        pytest.param(Esp8266, "/bulb/bulb-1.10.0.bin", True, id="by-name"),
    ],
)
def test_any_address_leads_to_a_proof(
    kind: type[Device], path: str, tells_version: bool, shop: Shop
) -> None:
    device = shop.device(kind, path=path.format("1.0.0"), tells_version=tells_version)
    assert device.update() == OK
    device.path = path.format("1.10.0")
    assert device.update() == NO_UPDATES
    shop.came_to(device, PROVEN)


def test_client_that_says_its_id_in_the_address_proves_it(shop: Shop) -> None:
    def ask(version: str, *fields: str) -> int:
        with shop.stand.dial() as wire:
            path = f"/lamp/latest.bin?version={version}&id=24:6f:28:aa:bb:cc"
            return wire.ask(path, *fields).status

    size = len(esp32_image("lamp", "1.10.0"))
    pieces = [ask("1.0.0", f"Range: bytes={at}-{at + 999}") for at in range(0, size, 1000)]
    assert pieces == [206] * len(pieces)
    assert ask("1.10.0") == 304
    shop.came_to(shop.device(Esp32), PROVEN)
    (attempt,) = shop.attempts(shop.device(Esp32))
    assert attempt.sent == size


# -- 4. Many ---------------------------------------------------------------------------------------


def test_ten_devices_at_once_and_a_stage_of_three(shop: Shop) -> None:
    shop.begin(Plan((Stage(count=3, proven=3, minimum=3), Stage())))
    devices = [shop.device(mac=f"5C:CF:7F:00:00:{number:02X}") for number in range(10)]

    def update_all(those: list[Device]) -> list[str]:
        found = [""] * len(those)

        def update(number: int) -> None:
            found[number] = those[number].update()

        threads = [threading.Thread(target=update, args=(number,)) for number in range(len(those))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return found

    assert sorted(update_all(devices)) == [NO_UPDATES] * 7 + [OK] * 3
    first = [device for device in devices if device.version == "1.10.0"]
    others = [device for device in devices if device not in first]
    for device in others:
        reason = device.last_headers["x-ota-reason"]
        assert reason.startswith("waiting-for-stage: the rollout of 1.10.0 is at stage 1 of 2: ")
    assert update_all(first) == [NO_UPDATES] * 3
    wait_until(lambda: others[0].update() == OK)
    assert update_all(others[1:]) == [OK] * 6
    assert update_all(devices) == [NO_UPDATES] * 10
    for device in devices:
        shop.came_to(device, PROVEN)
