"""The core with a memory: what --state wires, and what it does not without it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import ota_fleet
import ota_server
from ota_fleet.api import BELOW
from ota_fleet.registry import Registry
from ota_fleet.rules import not_whitelisted
from ota_server import Event, Objection, Report, Site
from tests.conftest import put, site_of, wait_until
from tests.core.test_access import ask, text_of
from tests.core.test_load import all_at_once, assert_calm, device
from tests.core.test_s3 import ESP8266, bulb, lamp
from tests.core.wire import PATIENCE, Script, copy_of_script, standing, started
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Esp8266
from tests.test_house import ROOT

CHECK = ("/firmware", "x-ESP8266-version: 1.0.0", ESP8266)
MAC = ESP8266.partition(": ")[2]


@contextmanager
def remembering(folder: Path, **settings: Any) -> Iterator[Site]:
    """A site with a memory, beside the firmware folder; closed at the end."""
    site = site_of(folder, state=str(folder.parent / "state"), **settings)
    try:
        yield site
    finally:
        close(site)


def close(site: Site) -> None:
    """What the program does at its end; once more does nothing."""
    for each in site.closers:
        each()


@contextmanager
def registry_of(site: Site) -> Iterator[Registry]:
    """What another process sees of the site's registry."""
    registry = Registry(Path(site.config.state) / "fleet.db")
    try:
        yield registry
    finally:
        registry.close()


def with_fleet(directory: Path) -> Path:
    """The script with the fleet beside it, as installed."""
    script = copy_of_script(directory)
    beside = script.parent / "ota_fleet"
    if not beside.exists():
        shutil.copytree(ROOT / "ota_fleet", beside, ignore=shutil.ignore_patterns("__pycache__"))
    return script


@contextmanager
def fleet(
    folder: Path,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
    before: tuple[str, ...] = (),
    ca: Path | None = None,
) -> Iterator[Script]:
    """The real script with --state, isolated; `before` comes before the command."""
    directory = folder.parent
    with_fleet(directory)
    usual = ("--dir", folder, "--host", "127.0.0.1", "--port", "0", "--state", directory / "state")
    tls = ("--cert", ca) if ca else ()
    with started(directory, *usual, *tls, *options, env=env, before=before, ca=ca) as script:
        yield script


# -- 1. One program -------------------------------------------------------------------------------

ASKED = """\
import os, runpy, signal, sys
def say(*_):
    rooms = sorted(name for name in sys.modules if name.startswith("ota_fleet"))
    sites = {id(each.Site) for each in list(sys.modules.values()) if hasattr(each, "Site")}
    os.write(1, (" ".join([str(len(sites)), *rooms]) + chr(10)).encode())
signal.signal(signal.SIGUSR1, say)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def modules(directory: Path, *options: str | Path) -> list[str]:
    """How many classes are called Site in the running script, and the rooms it has imported."""
    script = with_fleet(directory)
    command: list[str | Path] = [sys.executable, "-I", "-c", ASKED, script, *options, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory) as process:
        try:
            assert process.stdout is not None
            assert " serves " in process.stdout.readline()
            process.send_signal(signal.SIGUSR1)
            return process.stdout.readline().split()
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="asks by a signal")
def test_the_script_is_imported_once_by_the_fleet(folder: Path) -> None:
    count, *rooms = modules(folder.parent, "--dir", folder, "--state", folder.parent / "state")
    assert (count, "ota_fleet.registry" in rooms) == ("1", True)


@pytest.mark.skipif(sys.platform == "win32", reason="asks by a signal")
def test_nothing_of_the_fleet_is_imported_without_state(folder: Path) -> None:
    assert modules(folder.parent, "--dir", folder) == ["1"]


def test_script_with_state_updates_devices_and_stops_cleanly(folder: Path) -> None:
    with fleet(folder) as script:
        script.wait_for(*CHECK)
        device = Esp8266(
            host="127.0.0.1",
            port=script.port,
            path="/firmware",
            image=esp8266_image("firmware", "1.0.0"),
        )
        assert device.update() == "HTTP_UPDATE_OK"
        assert script.end(signal.SIGTERM) == 0
        assert "Traceback" not in script.log


def test_script_runs_from_any_folder_and_not_isolated(folder: Path) -> None:
    options = ("--dir", folder, "--state", folder.parent / "state", "--port", "0")
    command: list[str | Path] = [sys.executable, with_fleet(folder.parent), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        assert " serves " in process.stdout.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert (folder.parent / "state" / "fleet.db").exists()


def spoil(state: Path) -> None:
    """A database that is none."""
    state.mkdir()
    (state / "fleet.db").write_bytes(b"no database" * 1000)


def block(state: Path) -> None:
    """A file where the folder should be."""
    state.write_text("")


@pytest.mark.parametrize("harm", [spoil, block])
def test_state_that_cannot_be_used_is_one_line_and_status_2(
    harm: Callable[[Path], None], folder: Path
) -> None:
    state = folder.parent / "state"
    harm(state)
    command: list[str | Path] = [
        sys.executable,
        "-I",
        with_fleet(folder.parent),
        "--dir",
        folder,
        "--state",
        state,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(state) in done.stderr


def test_the_script_alone_says_that_the_fleet_is_missing(folder: Path) -> None:
    script = copy_of_script(folder.parent)
    command: list[str | Path] = [
        sys.executable,
        "-I",
        "-S",
        script,
        "--dir",
        folder,
        "--state",
        folder.parent / "s",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr == (
        "ota-server: --state needs the folder ota_fleet beside ota_server.py: copy it, too\n"
    )


@pytest.mark.parametrize(
    "argv",
    [["--admit", "whitelist"], ["--admit", "nobody"], ["--max-image", "0"], ["--max-image", "x"]],
)
def test_wrong_option_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        ota_server.read_config(argv, {})


@pytest.mark.parametrize(
    ("argv", "environ", "port"),
    [
        ([], {}, 8000),
        ([], {"US_SERVER_PORT": "50000"}, 50000),
        ([], {"US_SERVER_PORT": "50000", "OTA_PORT": "81"}, 81),
        (["--port", "82"], {"US_SERVER_PORT": "50000"}, 82),
        ([], {"US_SERVER_PORT": ""}, 8000),
    ],
)
def test_us_server_port_is_the_default(argv: list[str], environ: dict[str, str], port: int) -> None:
    assert ota_server.read_config(argv, environ).port == port


def test_credentials_come_from_the_environment_and_are_not_shown() -> None:
    environ = {"US_AUTH_USERNAME": "sesame", "US_AUTH_PASSWORD": "open"}
    config = ota_server.read_config([], environ)
    assert (config.us_username, config.us_password) == ("sesame", "open")
    assert "sesame" not in repr(config)
    assert "'open'" not in repr(config)


def test_wrong_broker_is_a_sentence_about_the_broker(folder: Path) -> None:
    options = ("--dir", folder, "--state", folder.parent / "state", "--mqtt", "mqtt://broker:65536")
    done = subprocess.run(
        [sys.executable, with_fleet(folder.parent), *options],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ota-server: --mqtt: 65536 is no port, 65535 is the last one\n"


def backup(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """What --backup does and says."""
    options = ("--state", folder.parent / "state", "--backup", file)
    return subprocess.run(
        [sys.executable, "-I", with_fleet(folder.parent), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_backup_is_made_while_the_server_runs_and_can_be_put_back(folder: Path) -> None:
    kept = folder.parent / "kept.db"
    with fleet(folder) as script:
        script.wait_for(*CHECK)
        with closing(Registry(folder.parent / "state" / "fleet.db")) as registry:
            wait_until(lambda: registry.device(MAC) is not None)
        done = backup(folder, kept)
        script.wait_for(*CHECK)  # it went on
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{kept} holds what " in done.stdout
    restored = folder.parent / "restored"
    restored.mkdir()
    kept.replace(restored / "fleet.db")
    with closing(Registry(restored / "fleet.db")) as registry:
        assert [device.id for device in registry.devices()] == [MAC]


def test_backup_that_cannot_be_made_says_why(folder: Path) -> None:
    with remembering(folder):
        pass
    file = folder.parent / "nowhere" / "kept.db"
    done = backup(folder, file)
    assert (done.returncode, done.stdout, file.exists()) == (1, "", False)
    assert re.fullmatch(f"ota-server: .*fleet.db is not copied to {file}: .*\n", done.stderr)


def test_backup_of_nothing_is_wrong_usage_and_makes_nothing(folder: Path) -> None:
    state, file = folder.parent / "state", folder.parent / "kept.db"
    done = backup(folder, file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ota-server: there is no {state}/fleet.db\n"
    assert (file.exists(), state.exists()) == (False, False)


# -- 2. Who was here ------------------------------------------------------------------------------


def test_check_of_a_device_is_remembered(folder: Path) -> None:
    fields = (
        "x-ESP8266-version: 1.10.0", "x-ESP8266-STA-MAC: 5c:cf:7f:12:34:56",
        "x-ESP8266-free-space: 1794048", "x-ESP8266-sketch-md5: 14cc0cfb6b4b2feab2c588b4ab77380c",
        "x-ESP8266-sdk-version: 2.2.2",
    )  # fmt: skip
    with remembering(folder) as site, registry_of(site) as registry:
        before = registry.device(MAC)
        assert ask(site, "/firmware", *fields, peer="192.0.2.7").status == 304
        wait_until(lambda: registry.device(MAC) is not None)
        seen = registry.device(MAC)
    assert before is None
    assert seen is not None
    assert (seen.project, seen.chip, seen.version) == ("firmware", "esp8266", "1.10.0")
    assert (seen.free_space, seen.sdk, seen.address) == (1794048, "2.2.2", "192.0.2.7")
    assert (seen.image, seen.downloads) == ("14cc0cfb6b4b2feab2c588b4ab77380c", 0)


def test_download_is_counted_and_closing_writes_what_is_queued(folder: Path) -> None:
    with remembering(folder) as site:
        assert [ask(site, *CHECK).status for _ in range(3)] == [200] * 3
    with registry_of(site) as registry:
        seen = registry.device(MAC)
    assert seen is not None
    assert (seen.downloads, seen.first_seen <= seen.last_seen) == (3, True)


def test_who_does_not_say_who_it_is_is_not_remembered(folder: Path) -> None:
    with remembering(folder) as site:
        assert ask(site, "/firmware", "x-ESP8266-version: 1.0.0").status == 200
        assert ask(site, "/firmware/latest.bin").status == 200
    with registry_of(site) as registry:
        assert registry.devices() == []


@pytest.mark.parametrize(
    ("target", "device"),
    [
        ("/firmware/esp32fota.json?id=207350034223892", "207350034223892"),
        ("/firmware?version=1.0.0&id=5ccf7f123456", MAC),
        ("/firmware?version=1.0.0&id=%0aINFO", None),
        ("/firmware?version=1.0.0&id=two%20words", None),
        (f"/firmware?version=1.0.0&id={'x' * 65}", None),
        ("/firmware?version=1.0.0&id=", None),
    ],
)
def test_who_says_no_mac_may_say_an_id(target: str, device: str | None, folder: Path) -> None:
    with remembering(folder) as site:
        ask(site, target)
    with registry_of(site) as registry:
        assert [each.id for each in registry.devices()] == ([device] if device else [])


def test_sightings_arrive_from_the_real_script(folder: Path) -> None:
    with fleet(folder) as script:
        script.wait_for(*CHECK)
        assert script.end(signal.SIGTERM) == 0
    registry = Registry(folder.parent / "state" / "fleet.db")
    assert [device.id for device in registry.devices()] == [MAC]
    registry.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux' /proc")
def test_a_thousand_devices_at_once_get_their_image_and_are_remembered(folder: Path) -> None:
    image = (folder / "firmware-1.10.0.bin").read_bytes()
    with fleet(folder, "--log", "warning") as script:
        visits = all_at_once(script.port, [device(number) for number in range(1000)])
        assert_calm(script)
        assert script.end(signal.SIGTERM) == 0
    assert {(visit.error, visit.status) for visit in visits} == {("", 200)}
    assert all(visit.body == image for visit in visits)
    with closing(Registry(folder.parent / "state" / "fleet.db")) as registry:
        assert len(registry.devices(limit=1000)) == 1000
        assert all(each.downloads == 1 for each in registry.devices(limit=1000))


def test_log_still_tells_each_decision(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), remembering(folder) as site:
        ask(site, *CHECK)
    assert f"{MAC} " in caplog.text


# -- 3. S3's whitelist ----------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two platforms of S3."""
    folder = tmp_path / "bin"
    put(folder / "bulb-1.10.0.bin", esp8266_image("bulb", "1.10.0"))
    put(folder / "lamp-1.10.0.bin", esp32_image("lamp", "1.10.0"))
    return folder


@pytest.fixture
def strict(shop: Path) -> Iterator[Site]:
    """A site where nobody was admitted yet."""
    with remembering(shop, admit="WHITELIST") as site:
        yield site


S3 = "/update?dev=bulb&ver=v1.0.2"
NAMED = "/bulb/bulb-1.10.0.bin"


@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        pytest.param(S3, (ESP8266,), 400, id="s3"),
        pytest.param("/firmware" + S3, (ESP8266,), 400, id="s3-below-a-folder"),
        pytest.param("/bulb", ("x-ESP8266-version: 1.0.2", ESP8266), 403, id="s1"),
        pytest.param("/bulb", ("x-ESP8266-version: 1.0.2",), 403, id="no-mac"),
        pytest.param("/bulb/latest.bin", (ESP8266,), 403, id="latest"),
        pytest.param(NAMED, (ESP8266,), 403, id="by-name"),
        pytest.param(NAMED, (), 403, id="by-name-without-mac"),
        pytest.param("/bulb.bin", (), 403, id="project-bin"),
        pytest.param("/lamp/esp32fota.json", (), 404, id="manifest-esp32fota"),
        pytest.param("/lamp/manifest.json", (), 404, id="manifest-esphome"),
    ],
)
def test_device_that_was_not_admitted_gets_nothing(
    target: str, fields: tuple[str, ...], status: int, strict: Site
) -> None:
    reply = ask(strict, target, *fields)
    assert (reply.status, "not-whitelisted: " in text_of(reply)) == (status, True)


@pytest.mark.parametrize("written", [MAC, MAC.lower(), MAC.replace(":", ""), MAC.replace(":", "-")])
def test_device_that_was_admitted_gets_its_image(written: str, strict: Site) -> None:
    with registry_of(strict) as registry:
        assert registry.admit("bulb", written)
    wait_until(lambda: ask(strict, S3, ESP8266).status == 200)
    for target in ("/bulb/latest.bin", NAMED):
        assert ask(strict, target, ESP8266).status == 200
    bare = f"x-ESP8266-STA-MAC: {MAC.replace(':', '')}"
    assert ask(strict, S3, bare).status == 200
    other = "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:57"
    assert ask(strict, S3, other).status == 400
    assert ask(strict, "/update?dev=lamp&ver=v1.0.2", ESP8266).status in {400, 403}


def test_device_that_was_expelled_gets_nothing_any_more(strict: Site) -> None:
    with registry_of(strict) as registry:
        registry.admit("bulb", MAC)
        wait_until(lambda: ask(strict, S3, ESP8266).status == 200)
        registry.expel("bulb", MAC)
        wait_until(lambda: ask(strict, S3, ESP8266).status == 400)


def test_unknown_device_is_remembered_to_be_admitted(strict: Site) -> None:
    with registry_of(strict) as registry:
        assert ask(strict, S3, ESP8266).status == 400
        wait_until(lambda: registry.device(MAC) is not None)
        seen = registry.device(MAC)
    assert seen is not None
    assert (seen.project, seen.version, seen.downloads) == ("bulb", "1.0.2", 0)
    assert not seen.admitted


def test_other_mistakes_keep_their_answers(strict: Site) -> None:
    with registry_of(strict) as registry:
        registry.admit("lamp", MAC)
        wait_until(lambda: ask(strict, "/update?dev=lamp&ver=v1.0.2", ESP8266).status == 403)
    assert ask(strict, "/update?dev=none&ver=v1.0.2", ESP8266).status == 400
    assert ask(strict, "/update?dev=bulb&ver=v1.0.2").status == 400


@pytest.mark.parametrize(("make", "mac"), [(bulb, MAC), (lamp, "24:6F:28:AA:BB:CC")])
def test_sketch_of_s3_waits_for_its_admission(make: Any, mac: str, strict: Site) -> None:
    with registry_of(strict) as registry, standing(strict) as stand:
        device = make(stand.port, mac=mac)
        assert (device.update(), device.last_status) == ("HTTP_UPDATE_FAILED", 400)
        registry.admit("bulb" if make is bulb else "lamp", mac)
        wait_until(lambda: device.update() == "HTTP_UPDATE_OK")
        assert device.version == "1.10.0"


def test_everybody_is_admitted_unless_told(shop: Path) -> None:
    with remembering(shop) as site:
        assert ask(site, S3, ESP8266).status == 200


def test_registry_that_fails_lets_nobody_in(strict: Site) -> None:
    def fail(_project: str, _device: str | None) -> bool:
        raise RuntimeError("no registry")

    failing = not_whitelisted(fail)
    function = getattr(failing, "func", None)
    others = (each for each in strict.rules if getattr(each, "func", None) is not function)
    site = dataclasses.replace(strict, rules=(*others, failing))
    assert ask(site, S3, ESP8266).status == 500


# -- 4. Documents ---------------------------------------------------------------------------------


def test_every_route_of_the_fleet_stands_in_the_protocols(folder: Path) -> None:
    with remembering(folder, us_username="u", us_password="p") as site:  # noqa: S106
        own = [
            route
            for route in site.routes
            if route not in ota_server.ROUTES
            and not BELOW.fullmatch(route.pattern.pattern)
            and "/admin" not in route.pattern.pattern
        ]
    text = (ROOT / "docs" / "protocols.md").read_text()
    table = "".join(
        text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for title in ("S4: FUOTA server", "Monitoring")
    )
    rows = re.findall(r"^\| `([A-Z]+) .*?\| (\w+) \|", table, re.MULTILINE)
    wanted = {
        (method, getattr(route.endpoint, "__name__", ""))
        for route in own
        for method in route.methods
    }
    assert set(rows) == {(method, name) for method, name in wanted if method != "HEAD"}


def test_what_is_wired_stands_on_one_screen() -> None:
    source = Path(ota_fleet.__file__).read_text()
    lines = textwrap.dedent(source.partition("def extend")[2].partition("\ndef ")[0]).splitlines()
    assert len(lines) <= 50


def test_event_without_a_device_is_nobody(folder: Path) -> None:
    with remembering(folder) as site:
        site.listeners[-1](Event(Report("firmware", "192.0.2.1"), Objection("x", "y")))
    with registry_of(site) as registry:
        assert registry.devices() == []
