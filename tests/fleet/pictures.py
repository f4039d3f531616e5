"""Pictures of the pages, for people who want to see them before they install anything.

    python -m tests.fleet.pictures [DIRECTORY]

writes docs/pictures. The past of the fleet is made up by the rooms that remember it; then a real
server gets images by its API, devices update themselves, and a file is dropped on a page.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Page

from ota_fleet.accounts import Accounts
from ota_fleet.history import DAY, HOUR, History
from ota_fleet.html import url
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_server import ESP32_FAMILY, Event, parse_head
from tests.conftest import wait_until
from tests.core.wire import request
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Device, Esp32, Esp8266
from tests.fleet.test_browser import Home, Windows, chromium_browser, drop, said
from tests.fleet.test_fleet import fleet
from tests.fleet.test_history import FINE, decided, told
from tests.test_house import ROOT

WIDTH = 1100  # pixels
WHO, PASSWORD = "ada@example.org", "correct horse"
NOW = int(time.time())
SIZES = {"esp8266": 390_000, "esp32": 980_000, "esp32c3": 870_000}  # bytes of an image
CHIP_IDS = {"esp32": 0, "esp32c3": 5}


class Kind(NamedTuple):
    """A project of the house, and how many of its devices run which version."""

    project: str
    chip: str
    address: str  # the first five bytes of its MACs
    versions: dict[str, int]  # the oldest first

    @property
    def runs(self) -> list[str]:
        """The version of each device."""
        return [version for version, many in self.versions.items() for _ in range(many)]

    def image(self, version: str) -> bytes:
        """A release, of a believable size."""
        payload = bytes(SIZES[self.chip])
        if self.chip == "esp8266":
            return esp8266_image(self.project, version, payload=payload)
        return esp32_image(self.project, version, chip_id=CHIP_IDS[self.chip], payload=payload)

    def mac(self, number: int) -> str:
        """Of one of its devices."""
        return f"{self.address}:{(number * 37 + 11) % 256:02X}"

    def stays(self, number: int, version: str) -> Event:
        """One asked, and ran the newest."""
        why = FINE._replace(reason=f"{version} is not newer than {version}, which the device runs")
        report, outcome = decided(why, self.mac(number), version, self.project)
        chip = "esp8266" if self.chip == "esp8266" else ESP32_FAMILY
        report = report._replace(address=f"192.168.1.{20 + number}", chip=chip)
        return Event(report, outcome)

    def device(self, home: Home, number: int, version: str) -> Device:
        """One that asks now."""
        where = {"host": "127.0.0.1", "port": home.script.port, "path": f"/{self.project}"}
        if self.chip == "esp8266":
            return Esp8266(**where, mac=self.mac(number), image=self.image(version))  # type: ignore[arg-type]
        return Esp32(**where, mac=self.mac(number), image=self.image(version), chip=self.chip)  # type: ignore[arg-type]


FLEET = (
    Kind("garden-valve", "esp8266", "5C:CF:7F:3A:20", {"1.3.0": 1, "1.4.2": 3, "1.5.0": 21}),
    Kind("hall-lamp", "esp32c3", "DC:54:75:C1:08", {"2.0.1": 2, "2.1.0": 9, "2.2.0": 34}),
    Kind("weather-station", "esp32", "24:6F:28:9B:44", {"0.9.3": 4, "1.0.0": 14}),
)


def had_run(versions: Sequence[str], final: str, number: int, days: int) -> str:
    """The version of a device so many days ago: a release needs a week to get around."""
    steps = (days > 5 + number % 6) + (days > 19 + number % 7)
    return versions[max(0, versions.index(final) - steps)]


def remember_a_month(registry: Registry) -> None:
    """What the server would know if it had run for a month."""
    history = History(registry)
    for days in range(30, 0, -1):
        told(registry, history, *(
            kind.stays(number, had_run([*kind.versions], version, number, days))
            for kind in FLEET for number, version in enumerate(kind.runs)
        ), at=NOW - days * DAY)  # fmt: skip
    for hours in range(23, -1, -1):
        busy = 0.55 + 0.4 * math.sin((NOW / HOUR - hours - 9) / 24 * 2 * math.pi)
        told(registry, history, *(
            kind.stays(number, version)
            for kind in FLEET for number, version in enumerate(kind.runs[1:], 1)
            if (number * 7 + hours * 3) % 20 < 20 * busy
        ), at=NOW - hours * HOUR - 120)  # fmt: skip
    lamp = FLEET[1]  # one of them does not start with what it gets
    told(registry, history, *(decided("2.2.0", lamp.mac(2), "2.1.0", lamp.project),) * 4,
         at=NOW - 300)  # fmt: skip


@contextmanager
def living() -> Iterator[Home]:
    """The real server of such a house."""
    with tempfile.TemporaryDirectory() as directory:
        folder, state = Path(directory, "firmware"), Path(directory, "state")
        folder.mkdir()
        state.mkdir()
        with closing(Registry(state / "fleet.db")) as registry:
            accounts = Accounts(Ledger(registry), secure=False)
            accounts.open_account(WHO, PASSWORD, "admin", who=WHO)
            _, token = accounts.mint("CI", "admin", "", who=WHO)
            asked = parse_head(request("/admin/sign-in", method="POST"), "192.0.2.9")
            session = accounts.sign_in(asked, WHO, PASSWORD)[1].partition(";")[0]
            remember_a_month(registry)
        with fleet(folder) as script:
            home = Home(script, {"admin": session.removeprefix("ota=")}, token)
            furnish(home)
            yield home


def furnish(home: Home) -> None:
    """Releases by the API, and devices that ask for them."""
    for kind in FLEET:
        home.call("PUT", f"projects/{kind.project}", {"chips": [kind.chip]})
        for version in kind.versions:
            here = f"projects/{kind.project}/releases/{version}"
            home.call("PUT", here, kind.image(version))
    lamp, valve = FLEET[1], FLEET[0]
    place = {"notes": "Above the stairs, needs a ladder", "labels": ["hall", "beta"]}
    home.call("PATCH", url("devices", lamp.mac(5)), place)
    home.call("PATCH", url("devices", valve.mac(2)), {"labels": ["pond"], "pin": "1.4.2"})
    for kind in FLEET:
        for number in range(2, 7):
            kind.device(home, number, kind.runs[number]).update()
    updated = lamp.device(home, 5, "2.1.0")
    updated.update()
    updated.update()
    home.knows(updated.mac)
    roll_out(home, FLEET[2], "1.1.0")


def roll_out(home: Home, kind: Kind, version: str) -> None:
    """A release that most devices start, but not all."""
    home.call("PUT", f"projects/{kind.project}/releases/{version}", kind.image(version))
    stages = [{"count": 1, "minimum": 1, "threshold": 0},
              {"count": 14, "proven": 12, "wait": HOUR, "threshold": 25},
              {"proven": 10, "wait": 7 * DAY}]  # fmt: skip
    plan = {"version": version, "stages": stages, "pace": 20}
    rollout = home.call("POST", f"projects/{kind.project}/rollouts", plan)["id"]
    for number, runs in enumerate(kind.runs[:12]):
        device = kind.device(home, number, runs)
        assert device.update() == "HTTP_UPDATE_OK"
        if number in {4, 9}:  # it starts the old image again
            device.image = kind.image(runs)
        if number != 11:
            device.update()
        if not number:
            wait_until(lambda: home.call("GET", f"rollouts/{rollout}")["stage"] == 2)


def take(page: Page, path: Path, tall: int) -> None:
    """A picture of a page, so many pixels from its top; small, where pngquant is there."""
    page.set_viewport_size({"width": WIDTH, "height": tall})
    page.screenshot(path=path)
    if program := shutil.which("pngquant"):
        few = ["--nofs", "--strip", "--speed", "1", "--force", "--ext", ".png", "64"]
        subprocess.run([program, *few, path], check=True)


def main(arguments: Sequence[str]) -> int:
    """Takes them all."""
    directory = Path(*arguments) if arguments else ROOT / "docs" / "pictures"
    directory.mkdir(parents=True, exist_ok=True)
    with living() as home, chromium_browser() as browser, ExitStack() as stack:
        page = Windows(browser, stack).open(home, "admin", color_scheme="light")
        lamp = FLEET[1]
        for name, tall, path in (
            ("overview", 1250, "/admin"),
            ("devices", 800, "/admin/devices?project=hall-lamp&sort=-last_seen"),
            ("device", 1010, url("/admin/devices", lamp.mac(5))),
            ("activity", 850, "/admin/activity"),
            ("rollout", 1120, "/admin/rollouts?project=weather-station"),
        ):
            page.goto(path)
            if name == "rollout":
                page.get_by_role("link", name="weather-station 1.1.0").click()
            take(page, directory / f"{name}.png", tall)
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "hall-lamp.ino.bin")
        file.write_bytes(lamp.image("2.3.0"))
        drop(page, file)
        said(page, "Nothing is published yet")
        page.get_by_label("Notes").fill("Fades instead of blinking.")
        take(page, directory / "upload.png", 1080)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
