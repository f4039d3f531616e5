"""Home Assistant: what it is told of devices, when, and what its button does."""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_fleet import Known, remember
from ota_fleet import entities as entities_module
from ota_fleet.broker import Broker
from ota_fleet.history import History
from ota_fleet.homeassistant import config_of, config_topic, node_of, state_of, state_topic
from ota_fleet.mqtt import prepare, start
from ota_fleet.outlook import awaited
from ota_fleet.registry import normal_id
from ota_fleet.rows import Device
from ota_fleet.summons import Summons
from ota_server import DirectoryCatalog, Release, Version
from tests.conftest import put, site_of, wait_until
from tests.core.test_access import ask
from tests.core.test_s3 import ESP8266
from tests.data.make_images import esp8266_image
from tests.fleet.brokers import Ear, Mosquitto, listening
from tests.fleet.brokers import broker as broker  # noqa: PLC0414 - a fixture
from tests.fleet.brokers import furnished_broker as furnished_broker  # noqa: PLC0414 - a fixture
from tests.fleet.test_history import decided, release
from tests.fleet.test_mqtt import MAC, SERVER, STATUS, Notes, Talk, talking, url_in, waiting
from tests.fleet.test_mqtt import config_of as settings_of
from tests.fleet.test_mqtt import path as path  # noqa: PLC0414 - a fixture
from tests.fleet.test_mqtt import quick as quick  # noqa: PLC0414 - a fixture
from tests.fleet.test_registry import SIGHTING, mac, opened

LAMP = Device(
    MAC, "lamp", "esp8266", "1.0.0", "", None, "", "192.0.2.7", 1, 2, 3, "", (), "", admitted=False
)
OURS = Broker("broker")
NEW = replace(release("2.0.0"), notes="It is brighter.")

# -- 1. What is said -------------------------------------------------------------------------------


def accepted(state: Mapping[str, Any]) -> bool:
    """Whether Home Assistant takes it: MQTT_JSON_UPDATE_SCHEMA of its mqtt/update.py."""
    texts = {"installed_version", "latest_version", "title", "release_summary", "release_url"}
    share = state.get("update_percentage")
    return (
        state.keys() <= texts | {"in_progress", "update_percentage"}
        and all(isinstance(state[name], str) for name in texts & state.keys())
        and state.get("release_url", SERVER).startswith(("http://", "https://"))
        and isinstance(state.get("in_progress"), bool)
        and (share is None or (isinstance(share, int) and 0 <= share <= 100))
    )


def test_state_of_a_device_that_could_run_something_newer() -> None:
    assert json.loads(state_of(LAMP, NEW, None, SERVER)) == {
        "installed_version": "1.0.0",
        "latest_version": "2.0.0",
        "title": "lamp",
        "release_summary": "It is brighter.",
        "release_url": f"{SERVER}/admin/projects/lamp/releases/2.0.0",
        "in_progress": False,
        "update_percentage": None,
    }


def test_state_of_a_device_that_has_the_newest() -> None:
    state = json.loads(state_of(LAMP, None, None, SERVER))
    assert (state["installed_version"], state["latest_version"]) == ("1.0.0", "1.0.0")
    assert state["release_summary"] == ""  # else the one before would stay


PARTS = [((0, 100), 0), ((40, 100), 40), ((299, 300), 99), ((300, 300), 100), ((9, 0), 100)]


@pytest.mark.parametrize(("progress", "share"), PARTS)
def test_progress_is_a_percentage(progress: tuple[int, int], share: int) -> None:
    state = json.loads(state_of(LAMP, NEW, progress, SERVER))
    assert (state["in_progress"], state["update_percentage"]) == (True, share)


BYTES = st.integers(0)


@given(
    st.text(), st.text(), st.text(max_size=600), st.none() | st.tuples(BYTES, BYTES), st.booleans()
)
def test_home_assistant_takes_every_state(
    project: str, version: str, notes: str, progress: tuple[int, int] | None, newer: bool
) -> None:
    project, version = (text.encode("utf-8", "replace").decode() for text in (project, version))
    device = replace(LAMP, project=project, version=version)
    found = replace(NEW, notes=notes) if newer else None
    state = json.loads(state_of(device, found, progress, SERVER))
    assert accepted(state)
    assert len(state["release_summary"]) <= 255


def test_entity_says_where_its_state_and_its_device_are() -> None:
    node = node_of(OURS, MAC)
    config = json.loads(config_of(OURS, LAMP, SERVER))
    assert node == "ota_5ccf7f123456"
    assert config_topic(OURS, node) == f"homeassistant/update/{node}/firmware/config"
    assert config["state_topic"] == state_topic(OURS, node) == f"ota/device/{node}/update"
    assert config["command_topic"] == f"ota/device/{node}/install"
    assert (config["payload_install"], config["availability_topic"]) == ("INSTALL", STATUS)
    assert (config["unique_id"], config["name"]) == (f"{node}_firmware", None)
    assert config["device"] == {
        "identifiers": [node],
        "connections": [["mac", MAC.lower()]],
        "name": "lamp 123456",
        "model": "esp8266",
        "sw_version": "1.0.0",
        "configuration_url": f"{SERVER}/admin/devices/5C%3ACF%3A7F%3A12%3A34%3A56",
    }


def test_device_without_a_mac_has_no_connection() -> None:
    config = json.loads(config_of(OURS, replace(LAMP, id="kitchen", version="", chip=""), SERVER))
    assert config["device"]["name"] == "kitchen"
    assert config["device"].keys() == {"identifiers", "name", "configuration_url"}


IDS = st.text(st.characters(codec="utf-8")).filter(str.strip)


@given(st.lists(IDS, unique_by=normal_id))
def test_every_device_has_a_node_of_its_own(ids: list[str]) -> None:
    nodes = {node_of(replace(OURS, prefix="home/ota"), normal_id(each)) for each in ids}
    assert len(nodes) == len(ids)
    assert all(re.fullmatch("home_ota_[a-zA-Z0-9_-]+", node) for node in nodes)


class Failing(dict[str, Release]):
    """What cannot be looked up."""

    def get(self, *_: object) -> NoReturn:
        """Fails."""
        raise RuntimeError("a rule failed")


FAILING = Failing()

# -- 2. When it is said ----------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait long for what changed, or for what the broker has."""
    monkeypatch.setattr(entities_module, "QUIET", 0.2)
    monkeypatch.setattr(entities_module, "CHECK", 0.1)
    monkeypatch.setattr(entities_module, "SETTLE", 0.1)


pytestmark = pytest.mark.usefixtures("hasty")
NODE = "ota_5ccf7f123456"
CONFIG = f"homeassistant/update/{NODE}/firmware/config"
STATE = f"ota/device/{NODE}/update"
INSTALL = f"ota/device/{NODE}/install"
ALL = ("homeassistant/#", "ota/#")


@contextmanager
def at_home(broker: Mosquitto) -> Iterator[Ear]:
    """Home Assistant, as far as it listens."""
    with listening(broker, "homeassistant", *ALL) as ear:
        yield ear


@contextmanager
def with_lamp(path: Path, url: str, notes: Notes | None = None) -> Iterator[Talk]:
    """A server that knows one device, for which there is something newer."""
    notes = notes or Notes(latest={MAC: NEW})
    with opened(path) as registry:
        registry.seen(SIGHTING._replace(device=MAC, project="lamp", version="1.0.0"))
    with talking(path, url, notes) as talk:
        yield talk


def test_entity_is_there_for_who_comes_later(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()):
        with at_home(broker) as first:
            first.wait_for(STATE, installed_version="1.0.0", latest_version="2.0.0")
        with at_home(broker) as later:
            assert later.wait(CONFIG).retained
            assert later.wait(STATE).retained
            assert later.wait(STATUS).payload == b"online"


def test_what_the_broker_has_is_not_said_again(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()), at_home(broker) as ear:
        ear.wait(STATE)
    with at_home(broker) as ear, with_lamp(path, broker.url()):
        ear.wait(STATE, 2)
        assert len(ear.on(CONFIG)) == 1


def test_what_the_broker_lost_is_said_again(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()):
        for _ in range(2):
            with at_home(broker) as ear:
                ear.wait(CONFIG)
                ear.wait(STATE)
                broker.kill()
            broker.start()


def test_only_what_changed_is_said(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()) as talk, at_home(broker) as ear:
        ear.wait(STATE)
        talk.registry.admit("lamp", mac(1))  # may change what a device gets, and does not
        talk.notes.latest[MAC] = replace(NEW, version=Version.parse("3.0.0"))
        talk.notes.newest["lamp"] = Version.parse("3.0.0")
        ear.wait_for(STATE, latest_version="3.0.0")
        assert (len(ear.on(CONFIG)), len(ear.on(STATE))) == (1, 2)


def test_all_devices_are_said_however_many(broker: Mosquitto, path: Path) -> None:
    with opened(path) as registry:
        for number in range(120):  # in several turns
            registry.seen(SIGHTING._replace(device=mac(number)))
    with at_home(broker) as ear, talking(path, broker.url()):
        nodes = {node_of(OURS, mac(number)) for number in range(120)}
        wanted = {topic(OURS, node) for node in nodes for topic in (config_topic, state_topic)}
        wait_until(lambda: wanted <= {each.topic for each in ear.heard})
        assert len(ear.heard) == len(wanted) + 1  # and that the server is there


def test_what_fails_here_is_in_the_log_and_the_server_goes_on(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    notes = Notes()
    with with_lamp(path, broker.url(), notes), at_home(broker) as ear:
        ear.wait(STATE)
        notes.latest = FAILING
        notes.newest["lamp"] = NEW.version
        wait_until(lambda: len(lines("ERROR the conversation with the broker failed")) >= 2)
        notes.latest = {MAC: NEW}
        ear.wait_for(STATE, latest_version="2.0.0")


def test_device_that_is_forgotten_loses_its_entity(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()) as talk, at_home(broker) as ear:
        ear.wait(STATE)
        assert talk.registry.forget(MAC)
        assert ear.wait(CONFIG, 2).payload == ear.wait(STATE, 2).payload == b""


def test_device_that_was_forgotten_meanwhile_loses_its_entity(
    broker: Mosquitto, path: Path
) -> None:
    with with_lamp(path, broker.url()), at_home(broker) as ear:
        ear.wait(STATE)
    with opened(path) as registry:
        registry.forget(MAC)
    foreign = "homeassistant/update/ota_77/firmware/config"
    with at_home(broker) as ear, talking(path, broker.url()):
        ear.say(foreign, {"state_topic": "other/device/ota_77/update"}, retain=True)
        assert ear.wait(CONFIG, 2).payload == b""
        assert ear.on(foreign)[-1].payload


def test_without_discovery_nothing_is_said(broker: Mosquitto, path: Path) -> None:
    url = broker.url(discovery="", command="/switch/cmd/{mac}")
    with at_home(broker) as ear, with_lamp(path, url) as talk:
        ear.wait(STATUS)
        talk.summons.call(talk.summons.find("device", MAC), 0, int(time.time()))
        wait_until(lambda: waiting(talk) == [])
        assert {each.topic for each in ear.heard} == {STATUS}


def test_progress_is_said_once_a_second_at_most(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()) as talk, at_home(broker) as ear:
        ear.wait(STATE)
        began = time.monotonic()
        sent = 0

        def is_far() -> bool:
            nonlocal sent
            sent += 1
            talk.notes.live["5ccf7f123456"] = (sent, 10_000)
            return any(each.data["update_percentage"] for each in ear.on(STATE))

        wait_until(is_far)
        assert ear.on(STATE)[-1].data["in_progress"]
        assert len(ear.on(STATE)) - 1 <= 1 + (time.monotonic() - began) / entities_module.PROGRESS
        talk.notes.live.clear()
        ear.wait_for(STATE, in_progress=False, update_percentage=None)


# -- 3. The button ---------------------------------------------------------------------------------


def test_install_approves_the_newest_and_tells_the_device(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    command = "/switch/cmd/5ccf7f123456"
    with (
        with_lamp(path, broker.url()) as talk,
        at_home(broker) as ear,
        listening(broker, "homeassistant", command) as device,
    ):
        ear.wait(STATE)
        ear.say(INSTALL, b"WHATEVER")
        ear.say("ota/device/ota_unknown/install", b"INSTALL")
        ear.say(INSTALL, b"INSTALL")
        url = url_in(device.wait(command).payload)
        assert url == f"{SERVER}/lamp/latest.bin?id={MAC}&version=1.0.0"
        assert talk.notes.approved == [(MAC, "lamp", "2.0.0")]
        (line,) = lines(f"INFO '{INSTALL}': ")
        assert line.endswith("b'WHATEVER' is ignored, a button says INSTALL")
        (line,) = lines("INFO Home Assistant wants an update of 'ota_unknown'")
        assert line.endswith("no device is known by that name")


def test_install_of_what_is_not_there_is_said(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    with with_lamp(path, broker.url(), Notes()) as talk, at_home(broker) as ear:
        ear.wait(STATE)
        ear.say(INSTALL, b"INSTALL")
        wait_until(lambda: bool(lines(f"Home Assistant wants an update of '{NODE}'")))
        assert (talk.notes.approved, waiting(talk)) == ([], [])


def test_install_from_before_is_not_meant_any_more(broker: Mosquitto, path: Path) -> None:
    with at_home(broker) as ear:
        ear.say(INSTALL, b"INSTALL", retain=True)
        with with_lamp(path, broker.url()) as talk:
            ear.wait(STATE)
            ear.say(INSTALL, b"INSTALL")
            wait_until(lambda: bool(talk.notes.approved))
            assert len(talk.notes.approved) == 1


def test_install_waits_for_a_registry_that_others_write_to(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    notes = Notes(latest={MAC: NEW})
    failing = [sqlite3.OperationalError("database is locked")] * 2
    seams = notes.seams()

    def approve(*wish: str) -> None:
        if failing:
            raise failing.pop()
        seams.approve(*wish)

    locked = replace(seams, approve=approve)
    config = settings_of(mqtt=broker.url(), state=str(path.parent))
    with opened(path) as registry, at_home(broker) as ear:
        registry.seen(SIGHTING._replace(device=MAC, project="lamp", version="1.0.0"))
        registry.flush()
        ours = prepare(config)
        assert ours
        running = start(ours, config, registry, Summons(registry, ""), locked)
        with closing(running):
            ear.wait(STATE)
            ear.say(INSTALL, b"INSTALL")
            wait_until(lambda: bool(notes.approved))
    assert len(lines("MQTT has to wait for the registry: database is locked")) == 1


# -- 4. A site -------------------------------------------------------------------------------------


def test_device_that_asks_is_seen_in_home_assistant(
    broker: Mosquitto, path: Path, folder: Path
) -> None:
    site = site_of(folder)
    catalog = site.catalog
    assert isinstance(catalog, DirectoryCatalog)
    seams = Notes().seams()
    seams = replace(seams, latest=functools.partial(awaited, site), newest=catalog.newest)
    config = settings_of(mqtt=broker.url(), state=str(path.parent))
    with opened(path) as registry, at_home(broker) as ear:
        ours = prepare(config)
        assert ours
        running = start(ours, config, registry, Summons(registry, ours.command), seams)
        noted = functools.partial(remember, Known.of(registry), History(registry), str)
        site = replace(site, listeners=(*site.listeners, noted, running.listen))
        with closing(running):
            device = normal_id(ESP8266.partition(": ")[2])
            topic = state_topic(ours, node_of(ours, device))
            assert ask(site, "/firmware", "x-ESP8266-version: 1.9.0", ESP8266).status == 200
            ear.wait_for(topic, installed_version="1.9.0", latest_version="1.10.0")
            put(folder / "firmware-2.0.0.bin", esp8266_image("firmware", "2.0.0"))
            put(folder / "firmware-2.0.0.md", b"Brighter still.")
            assert catalog.scan()
            ear.wait_for(topic, latest_version="2.0.0", release_summary="Brighter still.")
            assert ask(site, "/firmware", "x-ESP8266-version: 2.0.0", ESP8266).status == 304
            ear.wait_for(topic, installed_version="2.0.0", latest_version="2.0.0")


def test_listener_never_waits(broker: Mosquitto, path: Path) -> None:
    with with_lamp(path, broker.url()) as talk:
        locked, done = threading.Event(), threading.Event()

        def hold() -> None:
            with talk.registry.writing():
                locked.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert locked.wait(10)
        event = decided()
        began = time.monotonic()
        for _ in range(1_000):
            talk.listen(event)
        took = time.monotonic() - began
        done.set()
        thread.join()
        assert took < 0.5
