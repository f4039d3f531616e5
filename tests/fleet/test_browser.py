"""The pages in a real Chromium, by a real server: what people do, and what nobody can do to them.

Every window listens: a dialogue, an error of a script, a broken policy or a question to another
host fails the test that heard it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from ota_fleet.accounts import Accounts
from ota_fleet.attempts import USUAL_PATIENCE
from ota_fleet.html import url
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry, Sighting
from ota_fleet.rollout import Plan, Stage, plan_text
from tests.conftest import put, wait_until
from tests.core.wire import PATIENCE, Script, Stand
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Esp32, Esp8266
from tests.fleet import test_pages
from tests.fleet.test_device_pages import NOW, mac, sighting
from tests.fleet.test_fleet import fleet
from tests.fleet.test_pages import MAC, PASSWORD, PEOPLE, XSS
from tests.fleet.test_release_pages import BOUNDARY, form_of
from tests.fleet.test_rollout_pages import NEWEST, ONE, RELEASE, Town, built, looping

furnished = test_pages.furnished

PROGRAMS = "chromium", "chromium-browser", "google-chrome"
OPTIONS = [
    *("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),  # also as root, in a box
    "--disable-features=LocalNetworkAccessChecks",  # not every browser has them: we do not count on
]
PHONE: ViewportSize = {"width": 320, "height": 640}  # WCAG 2.2, 1.4.10: nothing wider
WIDE: ViewportSize = {"width": 1100, "height": 800}
STILL = {"viewport": WIDE, "reduced_motion": "reduce"}  # colours are what they are, at once
EVIL = "http://evil.example"  # another site
ADA = ("E-mail address", "ada@example.org"), ("Password", PASSWORD)
NEIGHBOUR = "http://127.0.0.1:1"  # another origin, but the same site: it gets the cookies


# -- A browser, a server ---------------------------------------------------------------------------


@contextmanager
def chromium_browser() -> Iterator[Browser]:
    """The Chromium of this machine; skips where something for it is missing."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("needs chromium")
    if sys.platform == "linux" and find_library("atomic") is None:
        pytest.skip("needs libatomic1, for what Playwright runs on")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for all: it takes a second to start. A session's would stay in the way of asyncio."""
    with chromium_browser() as browser:
        yield browser


class Home(NamedTuple):
    """A server with a fleet, and what opens it."""

    script: Script | Stand
    cookies: Mapping[str, str]  # of sessions, by role
    token: str  # of an administrator

    @property
    def base(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.script.port}"

    def call(self, method: str, path: str, body: object = None) -> Any:
        """What the API answers; bytes go as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else None
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        fields = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        return json.loads(self.ask(method, f"/api/v1/{path}", data, fields) or b"null")

    def ask(self, method: str, path: str, data: bytes | None, fields: Mapping[str, str]) -> bytes:
        """The body of a reply. HTTPError: it is none of 200."""
        asked = Request(self.base + path, data, dict(fields), method=method)
        with build_opener(Stay).open(asked, timeout=PATIENCE) as reply:
            return bytes(reply.read())

    def publish(self, project: str, *versions: str) -> None:
        """A project, and releases of it for the ESP32."""
        self.call("PUT", f"projects/{project}", {"chips": ["esp32"]})
        for version in versions:
            self.call("POST", "releases", esp32_image(project, version))

    def esp32(self, project: str, version: str, mac: str) -> Esp32:
        """A device that asks for a project."""
        image = esp32_image(project, version)
        return Esp32(host="127.0.0.1", port=self.script.port, path=f"/{project}", image=image,
                     mac=mac)  # fmt: skip

    def knows(self, *macs: str) -> None:
        """Waits until the server has written down that these were here."""
        here = {*macs}
        wait_until(lambda: here <= {each["id"] for each in self.call("GET", "devices")["items"]})

    def draft(self, name: str, data: bytes) -> None:
        """A file that somebody has looked at, and did not publish yet."""
        cookie = {"Cookie": f"ota={self.cookies['publisher']}"}
        shown = self.ask("GET", "/admin/upload", None, cookie).decode()
        body = form_of(shown.partition('data-csrf="')[2].partition('"')[0], (name, data))
        fields = {"Content-Type": BOUNDARY, "X-OTA-Script": "1", **cookie}
        self.ask("POST", "/admin/upload", body, fields)

    def seconds(self, path: str) -> float:
        """How long a page takes, at best."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            self.ask("GET", path, None, {"Cookie": f"ota={self.cookies['admin']}"})
            times.append(time.perf_counter() - began)
        return min(times)


class Stay(HTTPRedirectHandler):
    """Follows nothing."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere."""


@contextmanager
def living(
    folder: Path,
    furnished: tuple[Path, dict[str, str]],
    sightings: Iterable[Sighting] = (),
    more: Callable[[Registry], None] = Registry.flush,
) -> Iterator[Home]:
    """The real script over a folder and a copy of what is furnished, and some more devices.

    `more` writes what else the registry is to hold.
    """
    state = folder.parent / "state"
    state.mkdir()
    shutil.copy(furnished[0], state)
    with closing(Registry(state / "fleet.db")) as registry:
        _, token = Accounts(Ledger(registry), secure=False).mint("t", "admin", "", who="test")
        for each in sightings:
            registry.seen(each)
        registry.flush()
        more(registry)
    with fleet(folder) as script:
        script.wait_for("/firmware", "x-ESP8266-version: 1.0.0")
        yield Home(script, furnished[1], token)


def fill_shelf(folder: Path, *versions: str) -> Path:
    """A firmware folder."""
    for version in versions:
        put(folder / f"firmware-{version}.bin", esp8266_image("firmware", version))
    return folder


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, furnished: tuple[Path, dict[str, str]]
) -> Iterator[Home]:
    """`firmware` in the folder, `lamp` uploaded, devices of both, and a draft."""
    folder = fill_shelf(tmp_path_factory.mktemp("home") / "firmware", "1.0.0", "1.9.0", "1.10.0")
    with living(folder, furnished) as home:
        home.publish("lamp", "1.0.0", "1.1.0")
        home.draft("lamp-2.0.0.bin", esp32_image("lamp", "2.0.0"))
        bulb = home.esp32("lamp", "1.0.0", "24:6F:28:00:00:01")
        assert bulb.update() == "HTTP_UPDATE_OK"
        assert bulb.update() == "HTTP_UPDATE_NO_UPDATES"
        plug = Esp8266(host="127.0.0.1", port=home.script.port, path="/firmware", mac=MAC,
                       image=esp8266_image("firmware", "1.0.0"))  # fmt: skip
        assert plug.update() == "HTTP_UPDATE_OK"
        home.knows(bulb.mac, plug.mac)
        stages = [{"count": 1}, {"percent": 10, "group": "attic"}, {}]
        home.call("POST", "projects/lamp/rollouts", {"version": "1.1.0", "stages": stages})
        home.call("POST", "webhooks", {"url": "http://127.0.0.1:1/hook?key=abc"})
        home.call("PUT", "groups/attic", {"window": "Mon-Fri 22:00-05:00 Europe/Berlin"})
        home.call("PATCH", url("devices", bulb.mac), {"group": "attic"})
        yield home


@dataclass
class Windows:
    """Opens windows of a browser, each with cookies of its own, and listens to all of them."""

    browser: Browser
    stack: ExitStack
    heard: list[str] = field(default_factory=list)  # what no page may do

    def open(self, home: Home | str, role: str = "", **options: Any) -> Page:
        """A window for a server, as somebody with a role; "": nobody is signed in."""
        base = home if isinstance(home, str) else home.base
        context = self.stack.enter_context(
            self.browser.new_context(**{**STILL, "base_url": base, **options})
        )
        if role and isinstance(home, Home):
            session: Any = {"name": "ota", "value": home.cookies[role], "url": base}
            context.add_cookies([session])
        context.set_default_timeout(1000 * PATIENCE)
        context.on("dialog", self._dialog)
        context.on("weberror", lambda error: self.heard.append(f"error: {error.error}"))
        context.on("console", self._console)
        context.on("request", lambda asked: self._request(base, asked.url))
        return context.new_page()

    def _dialog(self, dialog: Any) -> None:
        self.heard.append(f"dialogue: {dialog.message}")
        dialog.dismiss()

    def _console(self, message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.heard.append(f"console: {message.text}")

    def _request(self, base: str, asked: str) -> None:
        if not asked.startswith((f"{base}/", "data:", "blob:")):
            self.heard.append(f"asked for {asked}")


@pytest.fixture
def windows(chromium: Browser) -> Iterator[Windows]:
    """Windows that are closed at the end; nothing was heard."""
    with ExitStack() as stack:
        windows = Windows(chromium, stack)
        yield windows
    assert windows.heard == []


def press(page: Page, name: str) -> None:
    """Presses a button."""
    page.get_by_role("button", name=name, exact=True).click()


def fill(page: Page, *fields: tuple[str, str]) -> None:
    """Fills in fields, each by its label."""
    for label, value in fields:
        page.get_by_label(label).first.fill(value)


def said(page: Page, text: str) -> None:
    """Waits until the page tells this was done."""
    expect(page.locator("main > [role=status]")).to_contain_text(text)


def image(directory: Path, name: str, data: bytes) -> Path:
    """A file to upload."""
    path = directory / name
    path.write_bytes(data)
    return path


# -- 1. What people do -----------------------------------------------------------------------------


def test_first_account_is_made_by_the_link_of_the_log(folder: Path, windows: Windows) -> None:
    with fleet(folder) as script:
        link = re.search(r"/admin/setup#\S+", script.log)
        assert link
        page = windows.open(f"http://127.0.0.1:{script.port}")
        page.goto(link[0])
        expect(page.get_by_label("Secret")).to_have_value(link[0].partition("#")[2])
        assert "#" not in page.url  # not for who looks over a shoulder, nor for bookmarks
        fill(page, *ADA)
        press(page, "Make the first account")
        said(page, "Welcome")
        before: list[Any] = [*page.context.cookies()]
        press(page, "Sign out")
        said(page, "You are signed out")
        page.context.add_cookies(before)  # what somebody may have copied opens nothing
        page.goto("/admin/devices?q=7f")
        fill(page, ADA[0], ("Password", "wrong horse"))
        press(page, "Sign in")
        expect(page.get_by_role("alert")).to_be_visible()
        fill(page, ADA[1])
        press(page, "Sign in")
        expect(page.get_by_role("heading", name="Devices")).to_be_visible()
        assert page.url.endswith("/admin/devices?q=7f")


def drop(page: Page, *paths: Path) -> None:
    """Drags files from outside the browser over the page, and lets them go."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [*map(str, paths)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "dragOver", "drop"):
        event = {"type": kind, "x": 300, "y": 300, "data": data}
        session.send("Input.dispatchDragEvent", event)
        if kind == "dragOver":
            expect(page.get_by_text("Drop the firmware here")).to_be_visible()


def slow(page: Page, upload: int) -> None:
    """From now on this many bytes a second leave the page, -1: as many as can."""
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": upload}
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", limits)


def test_dropped_file_is_looked_at_and_published(
    home: Home, windows: Windows, tmp_path: Path
) -> None:
    home.publish("radio", "1.0.0")
    page = windows.open(home, "publisher")
    page.goto("/admin")
    slow(page, 400_000)
    data = esp32_image("radio", "1.2.0", payload=bytes(600_000))
    drop(page, image(tmp_path, "radio.bin", data))
    wait_until(lambda: 0 < page.evaluate("document.querySelector('progress')?.value ?? 0") < 1)
    expect(page.get_by_role("progressbar", name="radio.bin")).to_be_visible()
    expect(page.get_by_role("dialog")).to_contain_text("%")
    said(page, "Nothing is published yet")
    radio = home.esp32("radio", "1.0.0", "24:6F:28:00:00:02")
    assert radio.update() == "HTTP_UPDATE_NO_UPDATES"
    draft = page.locator("section", has_text="radio.bin")
    for text in ("ready", "1.2.0", "esp32", f"{len(data):,} bytes", "v5.3.2"):
        expect(draft).to_contain_text(text)
    draft.get_by_label("Notes").fill("Sounds <better>")
    draft.get_by_role("button", name="Publish").click()
    said(page, "radio 1.2.0 is published")
    page.goto("/admin/projects/radio/releases/1.2.0")
    expect(page.get_by_label("What is new")).to_have_value("Sounds <better>")
    assert radio.update() == "HTTP_UPDATE_OK"
    assert radio.version == "1.2.0"


def test_several_files_are_dropped_and_what_is_none_is_told(
    home: Home, windows: Windows, tmp_path: Path
) -> None:
    page = windows.open(home, "publisher")
    page.goto("/admin/devices")
    drop(
        page,
        image(tmp_path, "empty.bin", b""),
        image(tmp_path, "lamp-1.5.0.bin", esp32_image("lamp", "1.5.0")),
        image(tmp_path, "lamp-1.6.0.bin", esp32_image("lamp", "1.6.0")),
    )
    said_why = page.get_by_role("dialog").get_by_role("alert")
    expect(said_why.or_(page.get_by_text("Nothing is published yet")).first).to_be_visible()
    if said_why.count():
        expect(said_why).to_contain_text("empty.bin")
        press(page, "Go on with the others")
    for name in ("lamp-1.5.0.bin", "lamp-1.6.0.bin"):
        draft = page.locator("section", has=page.get_by_role("heading", name=name))
        draft.get_by_role("button", name="Discard").click()
        said(page, "The file is discarded")


def test_device_is_admitted_and_pinned(home: Home, windows: Windows) -> None:
    home.publish("valve", "1.0.0", "1.1.0", "1.2.0")
    valve = home.esp32("valve", "1.0.0", "24:6F:28:00:00:03")
    page = windows.open(home, "publisher")
    page.goto("/admin/projects/valve")
    page.get_by_label("Who gets its images").select_option("whitelist")
    press(page, "Save")
    said(page, "The settings are saved")
    assert valve.update() == "HTTP_UPDATE_FAILED"
    home.knows(valve.mac)
    page.goto(url("/admin/devices", state="unknown", project="valve"))
    page.get_by_role("link", name=valve.mac).click()
    press(page, "Admit to valve")
    said(page, "The device is admitted")
    page.get_by_label("Pin").select_option("1.1.0")
    form = page.locator("form").filter(has=page.get_by_label("Pin"))
    form.get_by_role("button", name="Save", exact=True).click()
    said(page, "It is saved")
    assert valve.update() == "HTTP_UPDATE_OK"
    assert valve.version == "1.1.0"


def test_devices_are_ticked_and_labelled_together(home: Home, windows: Windows) -> None:
    home.publish("fan", "1.0.0")
    macs = [f"24:6F:28:00:01:0{number}" for number in range(3)]
    for each in macs:
        home.esp32("fan", "1.0.0", each).update()
    home.knows(*macs)
    page = windows.open(home, "publisher")
    page.goto("/admin/devices?project=fan")
    expect(page.get_by_role("row")).to_have_count(4)
    page.get_by_label("Select all of this page").check()
    page.get_by_label("Label to add").fill("attic")
    press(page, "Add label")
    said(page, "3 devices labelled")
    page.get_by_label(f"Select {macs[0]}").check()
    press(page, "Forget")
    press(page, "Forget them")
    said(page, "1 device forgotten")
    assert [each["labels"] for each in home.call("GET", "devices?label=attic")["items"]] == [
        ["attic"]
    ] * 2


def test_release_is_withdrawn_and_restored(home: Home, windows: Windows) -> None:
    home.publish("pump", "1.0.0", "2.0.0")
    pump = home.esp32("pump", "1.0.0", "24:6F:28:00:00:04")
    page = windows.open(home, "publisher")
    page.goto("/admin/projects/pump")
    page.get_by_role("link", name="2.0.0").first.click()
    fill(page, ("Why", "It <b>floods</b>"))
    press(page, "Withdraw")
    said(page, "is withdrawn")
    expect(page.get_by_role("main")).to_contain_text("It <b>floods</b>")
    assert pump.update() == "HTTP_UPDATE_NO_UPDATES"
    press(page, "Restore")
    said(page, "is offered again")
    assert pump.update() == "HTTP_UPDATE_OK"


def test_token_is_copied_and_shown_once(home: Home, windows: Windows) -> None:
    page = windows.open(home, "admin", permissions=["clipboard-read", "clipboard-write"])
    page.goto("/admin/tokens")
    fill(page, ("Name", "robot"))
    press(page, "Make")
    press(page, "Copy the token")
    expect(page.get_by_role("button", name="Copy the token")).to_have_text("Copied")
    token = page.evaluate("navigator.clipboard.readText()")
    assert home._replace(token=token).call("GET", "session")["role"] == "publisher"
    page.goto("/admin/tokens")
    assert token not in page.content()


def test_viewer_has_no_form_and_cannot_write(home: Home, windows: Windows) -> None:
    page = windows.open(home, "viewer")
    for path in PATHS:
        reply = page.goto(path)
        assert reply
        if path in {"/admin/upload", "/admin/rollouts/new", *ADMINS}:
            assert reply.status == 403, path
        elif path not in NOBODYS and path != "/admin/account":
            forms = page.locator("form[method=post]").evaluate_all(
                "forms => forms.map(form => new URL(form.action).pathname)"
            )
            assert forms == ["/admin/sign-out"], path
            assert not page.evaluate("document.body.dataset.drop"), path
    page.goto("/admin")
    for path in ("/admin/projects", "/admin/devices", "/admin/upload", "/admin/accounts"):
        status = page.evaluate(
            """async path => (await fetch(path, {method: "POST", body: new URLSearchParams(
                {csrf: document.body.dataset.csrf, name: "mine", do: "open"})})).status""",
            path,
        )
        assert status == 403, path
    assert "mine" not in {each["name"] for each in home.call("GET", "projects")["items"]}


def test_decision_comes_to_a_page_that_is_open(home: Home, windows: Windows) -> None:
    page = windows.open(home, "viewer")
    page.goto("/admin/activity")
    page.evaluate("window.mark = 1")
    home.esp32("lamp", "1.0.0", "24:6F:28:00:00:05").update()
    row = page.locator("#decisions tr", has_text="24:6F:28:00:00:05")
    expect(row).to_contain_text("1.1.0", timeout=1000 * PATIENCE)
    assert page.evaluate("window.mark") == 1  # it was not loaded again


def test_part_that_says_nothing_new_is_left_alone(home: Home, windows: Windows) -> None:
    """Who selects a text there would lose it every few seconds."""
    device = home.esp32("lamp", "1.1.0", "24:6F:28:00:00:07")
    device.update()
    page = windows.open(home, "viewer")
    page.goto(url("/admin/activity", device=device.mac))
    row = page.locator("#decisions tbody tr")
    row.evaluate("row => { row.mark = 1; row.closest('[data-live]').dataset.live = 0.1 }")
    for _ in range(2):  # the second is asked for when the first is done with
        with page.expect_response(url("**/admin/activity", device=device.mac)):
            pass
    assert row.evaluate("row => row.mark") == 1


@contextmanager
def town_of(
    folder: Path, furnished: tuple[Path, dict[str, str]], windows: Windows
) -> Iterator[tuple[Town, Page]]:
    """A server whose time is the test's, and somebody at a window whose time is that, too."""
    with built(folder, furnished) as town:
        page = windows.open(Home(town.stand, furnished[1], ""), "publisher")
        page.clock.install()
        yield town, page


def choose_own_stages(page: Page) -> None:
    """Shows where stages are filled in."""
    page.get_by_label("Stages").first.select_option("As filled in below")
    page.get_by_text("Stages of its own").click()


def later(page: Page) -> None:
    """Lets a page look again at what is live."""
    page.clock.run_for(11_000)


def test_rollout_is_begun_and_its_bars_move(
    folder: Path, furnished: tuple[Path, dict[str, str]], windows: Windows
) -> None:
    with town_of(folder, furnished, windows) as (town, page):
        page.goto(RELEASE)
        page.get_by_role("link", name="Begin a rollout").click()
        choose_own_stages(page)
        for label, text in (("Percent", "100"), ("Devices at most", "4"), ("Proven", "3"),
                            ("Open for", ""), ("Failures, %", "70")):  # fmt: skip
            page.get_by_label(f"{label}, stage 2").fill(text)
        press(page, "Begin the rollout")
        said(page, f"The rollout of firmware {NEWEST} begins")
        first, second = (page.locator("#stages .stages > li").nth(n) for n in range(2))
        devices = [town.device(number) for number in range(4)]
        assert [town.update(each) for each in devices[:2]] == [True, False]
        later(page)
        expect(first).to_contain_text("open 1")
        town.update(devices[0])
        later(page)
        expect(first).to_contain_text("proven 1")
        expect(second.get_by_role("heading")).to_contain_text("open")
        town.fall_back(devices[1])
        assert [town.update(each) for each in devices[1:]] == [True] * 3
        town.update(devices[2])
        later(page)
        expect(second.locator(".keys")).to_have_text(bars_of(proven=1, returned=1, open=1))
        town.wait(2 * USUAL_PATIENCE)
        town.update(devices[0])
        later(page)
        expect(second.locator(".keys")).to_have_text(bars_of(proven=1, silent=2))
        expect(page.locator("#failed")).to_contain_text(devices[3].mac)


def bars_of(**standings: int) -> re.Pattern[str]:
    """What stands below a bar."""
    names = {"proven": "proven", "returned": "returned", "broken": "broken off", "silent": "silent",
             "open": "open"}  # fmt: skip
    words = (f"{text} {standings.get(name, 0)}" for name, text in names.items())
    return re.compile(r"\s*".join(words))


def test_halt_keeps_a_rollout_from_the_next_device(
    folder: Path, furnished: tuple[Path, dict[str, str]], windows: Windows
) -> None:
    with town_of(folder, furnished, windows) as (town, page):
        town.begin(Stage(count=1), Stage())
        page.goto(ONE)
        assert town.update(town.device(1))
        town.update(town.device(1, NEWEST))
        press(page, "Halt")
        said(page, "is halted: nobody else gets it")
        expect(page.get_by_role("button", name="Halt")).to_have_count(0)
        assert not town.update(town.device(2))
        press(page, "Go on")
        said(page, "goes on")
        assert town.update(town.device(2))
        press(page, "Abort")  # a reason is needed, says the browser
        page.get_by_label("Why").fill("It flickers")
        press(page, "Abort")
        said(page, "is aborted")
        expect(page.get_by_role("main")).to_contain_text("Aborted: It flickers")
        assert not town.update(town.device(3))


def test_device_that_loops_is_let_try_again(
    folder: Path, furnished: tuple[Path, dict[str, str]], windows: Windows
) -> None:
    with town_of(folder, furnished, windows) as (town, page):
        device = looping(town)
        page.goto("/admin")
        page.locator("#looping").get_by_role("link", name=device.mac).click()
        expect(page.locator("#attempts")).to_contain_text("it does not get it any more")
        expect(page.locator("#attempts").get_by_text("returned")).to_have_count(3)
        press(page, "Let it try again")
        said(page, "It may try again")
        assert town.update(device)
        later(page)
        expect(page.locator("#attempts tbody tr").first).to_contain_text("open")
        town.update(device)
        later(page)
        expect(page.locator("#attempts tbody tr").first).to_contain_text("proven")


# -- 2. Other ways to use it -----------------------------------------------------------------------


def test_everything_works_without_a_script(folder: Path, windows: Windows, tmp_path: Path) -> None:
    with fleet(folder) as script:
        secret = re.search(r"/admin/setup#(\S+)", script.log)
        assert secret
        page = windows.open(f"http://127.0.0.1:{script.port}", java_script_enabled=False)
        page.goto("/admin")
        fill(page, ("Secret", secret[1]), *ADA)
        press(page, "Make the first account")
        said(page, "Welcome")
        press(page, "Sign out")
        fill(page, *ADA)
        press(page, "Sign in")
        page.get_by_role("link", name="Upload", exact=True).click()
        lamp = image(tmp_path, "lamp.bin", esp32_image("lamp", "1.0.0"))
        page.get_by_label("Firmware").set_input_files(lamp)
        press(page, "Look inside")
        said(page, "Nothing is published yet")
        press(page, "Make the project lamp")
        said(page, "The project lamp is made")
        press(page, "Publish")
        said(page, "lamp 1.0.0 is published")
        page.get_by_role("link", name="Begin a rollout").click()
        choose_own_stages(page)
        page.get_by_label("Percent, stage 2").fill("25")
        page.get_by_label("Open for, stage 2").fill("soon")
        press(page, "Begin the rollout")
        expect(page.get_by_role("alert")).to_contain_text("'soon' is no time")
        page.get_by_label("Open for, stage 2").fill("2 h")
        press(page, "Begin the rollout")
        said(page, "The rollout of lamp 1.0.0 begins")
        expect(page.get_by_role("main")).to_contain_text("2. 25 % of the devices")
        press(page, "Halt")
        said(page, "is halted")
        page.goto("/admin/projects/lamp/releases/1.0.0")
        fill(page, ("Why", "no good"))
        press(page, "Withdraw")
        said(page, "is withdrawn")
        page.goto("/admin/projects/lamp")
        assert page.get_by_role("button", name="Copy").count() == 0  # what cannot work is hidden
        assert page.locator("[data-all]:visible").count() == 0


def tab_to(page: Page, role: str, name: str) -> None:
    """Goes on with the keyboard until something has the focus, which is seen at each step."""
    wanted = page.get_by_role(role, name=name, exact=True).first  # type: ignore[arg-type]
    for _ in range(80):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                const box = at.getBoundingClientRect();
                return [at.tagName, style.outlineStyle, box.width > 0 && box.right > 0];
            }"""
        )
        if at[0] != "BODY":
            assert at[1] != "none", at
            assert at[2], at
        if wanted.evaluate("each => each === document.activeElement"):
            return
    pytest.fail(f"no way to {name}")


def test_keyboard_is_enough(home: Home, windows: Windows, tmp_path: Path) -> None:
    home.publish("horn", "1.0.0")
    page = windows.open(home)
    horn = image(tmp_path, "horn.bin", esp32_image("horn", "1.1.0"))
    page.on("filechooser", lambda chooser: chooser.set_files(horn))  # early: it takes its time
    page.goto("/admin/upload")
    page.keyboard.type(PEOPLE["publisher"])
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Upload")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Firmware")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Firmware")).to_have_value(re.compile("horn.bin"))
    tab_to(page, "button", "Look inside")
    page.keyboard.press("Enter")
    said(page, "Nothing is published yet")
    tab_to(page, "link", "Skip to content")
    page.keyboard.press("Enter")
    tab_to(page, "textbox", "Notes What is new. ESPHome and Home Assistant show it.")
    page.keyboard.type("Louder")
    draft = page.locator("section", has_text="horn.bin")
    for _ in range(3):
        page.keyboard.press("Tab")
        if draft.get_by_role("button", name="Publish").evaluate(
            "each => each === document.activeElement"
        ):
            break
    page.keyboard.press("Enter")
    said(page, "horn 1.1.0 is published")


NOBODYS = "/admin/sign-in", "/admin/nowhere"
ADMINS = "/admin/accounts", "/admin/tokens", "/admin/webhooks"
LAMP = "/admin/projects/lamp"
ROLLOUT = "/admin/rollouts/2"  # the first one began by itself
PATHS = [
    *NOBODYS,
    *ADMINS,
    "/admin",
    "/admin/account",
    "/admin/devices",
    url("/admin/devices", MAC),
    "/admin/admissions",
    "/admin/projects",
    LAMP,
    f"{LAMP}/releases/1.1.0",
    f"{LAMP}/policy",
    "/admin/groups",
    "/admin/groups/attic",
    "/admin/rollouts",
    "/admin/rollouts/new",
    ROLLOUT,
    "/admin/upload",
    "/admin/activity",
]


def flaws(page: Page, **options: object) -> list[str]:
    """What axe finds that keeps somebody from using the page."""
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(Axe().axe_script)
    found = page.evaluate("options => axe.run(options)", {"resultTypes": ["violations"], **options})
    return [
        f"{each['id']}: {node['html']} {node['failureSummary']}"
        for each in found["violations"]
        if each["impact"] in {"serious", "critical"}
        for node in each["nodes"]
    ]


def assert_narrow(page: Page) -> None:
    """Nobody has to scroll sideways."""
    wide = page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            return [...document.querySelectorAll("main *, footer")]
                .filter(each => each.getBoundingClientRect().right > width)
                .map(each => each.outerHTML.slice(0, 300));
        }"""
    )
    assert wide == [], page.url


def is_dark(page: Page) -> bool:
    """Whether the ground is."""
    found = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", found)[:3])) < 3 * 128


@pytest.mark.parametrize("path", PATHS)
def test_page_is_for_everybody(home: Home, windows: Windows, path: str) -> None:
    """By axe, in light and dark; on a phone."""
    page = windows.open(home, "" if path == "/admin/sign-in" else "admin", color_scheme="light")
    page.goto(path)
    for each in page.locator("details").all():
        each.evaluate("each => each.open = true")
    assert not is_dark(page)
    assert flaws(page) == []
    page.emulate_media(color_scheme="dark")
    assert is_dark(page)
    assert flaws(page, runOnly=["color-contrast"]) == []
    page.set_viewport_size(PHONE)
    assert_narrow(page)
    assert flaws(page, runOnly=["target-size", "scrollable-region-focusable"]) == []


def test_long_names_have_room_on_a_phone(home: Home, windows: Windows) -> None:
    name, version = "long-" * 12 + "name", "1.0.0-" + "a" * 25
    home.call("PUT", f"projects/{name}", {"chips": ["esp32"], "aliases": ["wider"]})
    home.call("POST", "releases", esp32_image("wider", version))
    device = home.esp32("wider", version, "24:6F:28:00:00:06")
    assert device.update() == "HTTP_UPDATE_NO_UPDATES"
    home.knows(device.mac)
    home.call("PATCH", url("devices", device.mac), {"labels": ["l" * 64], "notes": "n" * 200})
    page = windows.open(home, "admin", viewport=PHONE)
    for path in (
        "/admin", "/admin/devices", url("/admin/devices", device.mac), "/admin/activity",
        "/admin/projects", f"/admin/projects/{name}",
        f"/admin/projects/{name}/releases/{version}", f"/admin/admissions?project={name}",
    ):  # fmt: skip
        page.goto(path)
        assert_narrow(page)


# -- 3. What nobody can do -------------------------------------------------------------------------


def test_nothing_that_anybody_writes_is_run(
    folder: Path, furnished: tuple[Path, dict[str, str]], windows: Windows
) -> None:
    sightings = [
        sighting(f"x{number}{text}", project=text, version=text, chip=text, sdk=text,
                 address=text, offered=text)
        for number, text in enumerate(XSS)
    ]  # fmt: skip
    macs = [each.device for each in sightings]
    with living(folder, furnished, sightings) as home:
        home.publish("lamp", "1.0.0", "1.1.0")
        for number, text in enumerate(XSS):
            write_everywhere(home, macs[number], number, text)
        home.knows(SAYS_MUCH)
        with closing(Registry(folder.parent / "state" / "fleet.db")) as registry:
            for each in macs:  # as no API lets in
                registry.admit("lamp", each)
        page = windows.open(home, "admin")
        for path, texts in everywhere(home, macs):
            page.goto(path)
            assert_text(page, *texts)
        for path in (url("/admin/devices", q=XSS[1]), url("/admin/activity", device=XSS[1])):
            page.goto(path)
            expect(page.locator("input[type=search]")).to_have_value(XSS[1])
            assert_text(page)
        page.goto("/admin/projects")
        fill(page, ("Name", XSS[1]))
        press(page, "Make it")
        expect(page.get_by_label("Name")).to_have_value(XSS[1])
        assert_text(page)


SAYS_MUCH = "5C:CF:7F:00:00:99"


def write_everywhere(home: Home, mac: str, number: int, text: str) -> None:
    """Text wherever devices and people can leave it."""
    for path, name in ((url("/", text)[1:], text), ("/firmware", SAYS_MUCH)):
        with home.script.dial() as wire:
            wire.ask(path, f"User-Agent: ESP8266-http-Update {text}", "x-ESP8266-version: 1.10.0",
                     f"x-ESP8266-STA-MAC: {name}", f"x-ESP8266-sdk-version: {text}")  # fmt: skip
    here = url("devices", mac)
    home.call("PATCH", here, {"notes": text, "labels": [text]})
    home.call("PATCH", "projects/lamp/releases/1.1.0", {"notes": text, "withdrawn": True,
                                                       "reason": text})  # fmt: skip
    home.call("POST", "tokens", {"name": text, "role": "viewer"})
    home.call("POST", "accounts", {"email": f"<img/src=x/onerror=alert({number})>@example.org",
                                   "password": PASSWORD, "role": "viewer"})  # fmt: skip
    home.draft(f"{text}.bin", esp32_image("lamp", f"2.{number}.0"))
    plan = {"version": "1.0.0", "stages": [{}], "label": text}
    begun = home.call("POST", "projects/lamp/rollouts", plan)["id"]
    home.call("POST", f"rollouts/{begun}/control", {"do": "abort", "reason": text})


def everywhere(home: Home, macs: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pages, and what must stand there as text."""
    yield "/admin", ()
    yield "/admin/devices", tuple(macs)
    yield "/admin/admissions?project=lamp", tuple(macs)
    for each, text in zip(macs, XSS, strict=True):
        yield url("/admin/devices", each), (each, text)
    yield url("/admin/devices", SAYS_MUCH), (XSS[-1],)
    yield "/admin/projects", ()
    yield "/admin/projects/lamp", ()
    yield "/admin/projects/lamp/releases/1.1.0", (XSS[-1],)
    files = (each.rpartition("/")[2].replace('"', "%22") for each in XSS)  # as browsers write them
    yield "/admin/upload", tuple(files)
    yield "/admin/accounts", ("<img/src=x/onerror=alert(1)>@example.org",)
    yield "/admin/tokens", XSS
    yield "/admin/activity", (*macs, *XSS)
    yield "/admin/rollouts", ()
    for number, text in enumerate(XSS, 1):
        yield f"/admin/rollouts/{number}", (text,)


def assert_text(page: Page, *texts: str) -> None:
    """These stand on a page as text; there are no elements, attributes or links but its own."""
    shown = " ".join(page.locator("body").inner_text().split())
    for text in texts:
        assert " ".join(text.split()) in shown, page.url
    found = page.evaluate(
        """() => [...document.querySelectorAll("*")].flatMap(each => [
            ...(/^(img|iframe|object|embed|base|style)$/i.test(each.tagName) ? [each.tagName] : []),
            ...[...each.attributes].filter(at => /^on|^style$|^srcdoc$/i.test(at.name)
                || /^(href|src|action|formaction)$/i.test(at.name)
                && !at.value.startsWith("/") && at.value !== "#main"
                && !at.value.startsWith("?")).map(at => at.name + "=" + at.value),
        ])"""
    )
    assert found == [], page.url
    assert page.evaluate("document.scripts.length") == 1
    page.set_viewport_size(PHONE)
    assert_narrow(page)
    page.set_viewport_size(WIDE)


def trap(page: Page, where: str, html: str) -> None:
    """Goes to a page of somebody else's server."""
    page.context.route(
        f"{where}/", lambda route: route.fulfill(body=html, content_type="text/html")
    )
    page.goto(f"{where}/")


@pytest.mark.parametrize("where", [EVIL, NEIGHBOUR])
def test_form_of_another_server_is_refused(home: Home, windows: Windows, where: str) -> None:
    page = windows.open(home, "admin")
    page.goto("/admin")  # somebody who is signed in
    trap(
        page,
        where,
        f"""<form method=post action="{home.base}/admin/projects">
         <input name=name value=stolen><button>Win a prize</button></form>""",
    )
    press(page, "Win a prize")
    expect(page.get_by_role("alert")).to_contain_text("another server")
    assert "stolen" not in {each["name"] for each in home.call("GET", "projects")["items"]}
    page.goto("/admin/projects")
    expect(page.get_by_role("heading", name="Projects")).to_be_visible()  # still signed in
    windows.heard.remove(f"asked for {where}/")


@pytest.mark.parametrize("where", [EVIL, NEIGHBOUR])
def test_page_in_a_frame_of_another_server_stays_empty(
    home: Home, windows: Windows, where: str
) -> None:
    page = windows.open(home, "admin")
    page.goto("/admin/tokens")
    trap(page, where, f"""<iframe src="{home.base}/admin/tokens"></iframe>""")
    expect(page.frame_locator("iframe").locator("body")).to_contain_text("refused to connect")
    assert any("frame-ancestors" in each for each in windows.heard)
    windows.heard.clear()


# -- 4. How long it takes --------------------------------------------------------------------------


def rolled_out(registry: Registry) -> None:
    """A rollout that has nearly all of a fleet in it, of which some failed and some loop."""
    plan = plan_text(Plan((Stage(count=1), Stage(percent=10, proven=9_999), Stage())))
    standings = "proven", "returned", "silent", ""
    with registry.writing() as connection:
        connection.execute(
            "INSERT INTO rollout (project, version, plan, state, stage, opened, reason, created, "
            "who, excused) VALUES ('firmware', '1.99.0', ?, 'running', 1, ?, '', ?, 'ada', '[]')",
            (plan, NOW, NOW),
        )
        connection.executemany(
            "INSERT INTO member VALUES (1, ?, ?, ?)",
            [(mac(number), number % 2, standings[number % 4]) for number in range(5_000)],
        )
        connection.executemany(
            "INSERT INTO result VALUES (1, ?, ?, 625)",
            [(stage, each) for stage in range(2) for each in standings],
        )
        connection.executemany(
            "INSERT INTO attempt (device, lane, project, version, sha256, size, digests, rollout, "
            "before, before_digest, granted, deadline, outcome) VALUES (?, 'sketch', 'firmware', "
            "'1.99.0', 'a', 9, '[]', 1, '1.0.0', '', ?, ?, ?)",
            [(mac(number % 9_999), NOW, NOW, standings[number % 3]) for number in range(100_000)],
        )
        connection.executemany(
            "INSERT INTO loop VALUES (?, 'a', 'firmware', '1.99.0', ?)",
            [(mac(number), NOW) for number in range(500)],
        )


def test_pages_of_a_large_fleet_come_at_once(
    shelf: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    """A tenth of a second is the aim; three are allowed to a machine with other work."""
    fill_shelf(shelf, *(f"1.{number}.0" for number in range(1, 100)))
    crowd = (
        sighting(mac(number), version=f"1.{number % 50}.0", at=NOW - number * 60,
                 project=f"p{number % 9}" if number % 2 else "firmware")
        for number in range(9_999)
    )  # fmt: skip
    with living(shelf, furnished, crowd, rolled_out) as home:
        cookie = {"Cookie": f"ota={home.cookies['viewer']}"}
        assert b"10,000 devices" in home.ask("GET", "/admin/devices", None, cookie)
        pages = ["/admin/projects/firmware", "/admin/projects/firmware/releases/1.98.0"]
        slow = {
            path: took
            for path in (*PATHS[2:], *pages, ONE)
            if LAMP not in path and path != ROLLOUT and (took := home.seconds(path)) > 0.3
        }
    assert slow == {}
