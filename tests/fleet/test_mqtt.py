"""MQTT: what is queued, said and heard, against a real mosquitto."""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ota_server
from ota_fleet import mqtt as mqtt_module
from ota_fleet.broker import (
    Broker,
    filter_of,
    read_state,
    read_url,
    topic_for,
    words_in,
)
from ota_fleet.mqtt import Seams, client_id, pause_after, prepare, start
from ota_fleet.registry import Registry
from ota_fleet.summons import LEASE, MAX_TRIES, Summon, Summons, Target, trigger
from ota_server import Config, Event, Release, Version, parse_head
from tests.conftest import wait_until
from tests.core.test_access import ask, site_with
from tests.core.wire import PATIENCE, request
from tests.fleet.brokers import Mosquitto, example_conf, listening, started
from tests.fleet.brokers import broker as broker  # noqa: PLC0414 - a fixture
from tests.fleet.brokers import furnished_broker as furnished_broker  # noqa: PLC0414 - a fixture
from tests.fleet.test_history import release
from tests.fleet.test_registry import SIGHTING, mac, opened
from tests.test_house import ROOT

NOW = 1_700_000_000  # UTC seconds
SERVER = "https://ota.example"
KEY = b"0123456789abcdef"


# -- 1. What --mqtt says ---------------------------------------------------------------------------

PLAIN = Broker("broker")
URLS: list[tuple[str, dict[str, Any]]] = [
    ("mqtt://broker", {}),
    ("MQTT://Broker/", {}),
    ("mqtt://broker:1884", {"port": 1884}),
    ("mqtts://broker", {"port": 8883, "secure": True}),
    ("mqtts://broker:1?ca=/my%20ca", {"port": 1, "secure": True, "ca": "/my ca"}),
    ("mqtt://me:p%40%3a%2f%23%C3%A9@broker", {"user": "me", "password": "p@:/#é"}),
    ("mqtt://me@broker", {"user": "me"}),
    ("mqtt://[fd00::1]:1884", {"host": "fd00::1", "port": 1884}),
    ("mqtt://broker/home/ota/", {"prefix": "home/ota"}),
    ("mqtt://broker?discovery=&state=&command=", {"discovery": "", "state": "", "command": ""}),
    ("mqtt://broker/x?command=/c/{device}", {"prefix": "x", "command": "/c/{device}"}),
    ("mqtt://broker?state={group}/{mac}", {"state": "{group}/{mac}"}),
    ("mqtt://broker?discovery=ha", {"discovery": "ha"}),
]


@pytest.mark.parametrize(("text", "settings"), URLS, ids=[text for text, _ in URLS])
def test_url_says_everything_about_the_broker(text: str, settings: dict[str, Any]) -> None:
    assert read_url(text) == replace(PLAIN, **settings)


WRONG_URLS = [
    ("broker", "mqtts://user:password@broker"),
    ("", "mqtts://user:password@broker"),
    ("http://broker", "mqtt:// or mqtts://"),
    ("mqtt://", "mqtts://user:password@broker"),
    ("mqtt://broker:0", "0 is no port, 65535 is the last one"),
    ("mqtt://me:sec@[fd00::1]:65536/x?state=", "65536 is no port, 65535 is the last one"),
    ("mqtt://me:70000/sec@broker", "%2F"),
    ("mqtt://broker:1234567890", "mqtts://user:password@broker"),
    ("mqtt://broker:many", "mqtts://user:password@broker"),
    ("mqtt://[fd00::1", "mqtts://user:password@broker"),
    ("mqtt://me:sec#ret@broker", "%23"),
    ("mqtt://me:sec/ret@broker", "%2F"),
    ("mqtt://:secret@broker", "no user"),
    ("mqtt://me:%ff@broker", "UTF-8"),
    ("mqtt://broker?qos=2", "'qos' is none of ca, command, state, discovery"),
    ("mqtt://broker?state=a&state=b", "twice"),
    ("mqtt://broker?ca=/etc/ca.pem", "mqtts://"),
    ("mqtt://broker?command=/cmd/{name}", "{name}, but {device}, {mac}, {project}, {group}"),
    ("mqtt://broker?command=/cmd/{device!r}", "{device!r}"),
    ("mqtt://broker?command=/cmd/{", "no topic"),
    ("mqtt://broker?command=/cmd/%2B", "no topic to publish on: in a topic write {mac}"),
    ("mqtt://broker?state=/state/+", "no topic to publish on: in a topic write {mac}"),
    ("mqtt://broker?state=/state/%23", "{mac} in the place of + or #"),
    ("mqtt://broker?state=/state/#", "# ends a URL: in a topic write {mac}"),
    ("mqtt://me:sec@broker#", "# ends a URL"),
    ("mqtt://broker?discovery={device}", "{device}, but nothing"),
    ("mqtt://broker/ota+", "no topic"),
    ("mqtt://broker?state=a%00", "no topic"),
]


@pytest.mark.parametrize(("text", "said"), WRONG_URLS, ids=[text for text, _ in WRONG_URLS])
def test_wrong_url_is_a_sentence_without_the_password(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\A--mqtt[: ]") as failure:
        read_url(text)
    assert said in str(failure.value)
    assert "sec" not in str(failure.value)


def test_password_is_never_shown() -> None:
    assert "s3cret" not in repr(read_url("mqtt://me:s3cret@broker"))
    assert "s3cret" not in repr(Config(dir="", mqtt="mqtt://me:s3cret@broker"))


def config_of(**settings: Any) -> Config:
    """Settings with a broker."""
    return Config(**{"dir": "", "mqtt": "mqtt://broker", "public_url": SERVER, **settings})


def test_without_a_url_there_is_nothing_to_prepare() -> None:
    assert prepare(config_of(mqtt="")) is None


@pytest.mark.parametrize(
    "settings",
    [{"port": 0}, {"host": "unix:/run/ota"}, {"inherited": "1"}, {"public_url": "ota.example"}],
    ids=str,
)
def test_devices_must_know_where_to_come_back_to(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--public-url"):
        prepare(config_of(**{"public_url": "", **settings}))
    assert prepare(config_of(public_url="")) == PLAIN


@pytest.mark.parametrize("text", [None, "no certificate"], ids=["missing", "no PEM"])
def test_ca_that_is_none_is_a_sentence(text: str | None, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    if text is not None:
        ca.write_text(text)
    with pytest.raises(ValueError, match=f"--mqtt: ca={ca}: ."):
        prepare(config_of(mqtt=f"mqtts://broker?ca={ca}"))


def test_missing_paho_is_a_sentence() -> None:
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from ota_server import Config
        from ota_fleet.mqtt import prepare
        try:
            prepare(Config(dir="", mqtt="mqtt://broker"))
        except ValueError as err:
            print(err)
    """
    command = [sys.executable, "-I", "-S", "-c", code]  # without what pip installs
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--mqtt needs paho-mqtt: pip install 'ota-server[mqtt]'")


def test_client_id_is_of_the_folder_and_the_address(tmp_path: Path) -> None:
    config = config_of(state=str(tmp_path))
    assert client_id(config) == client_id(replace(config, state=f"{tmp_path}/.", log="DEBUG"))
    others = replace(config, port=8001), replace(config, state=str(tmp_path / "other"))
    assert len({client_id(config), *map(client_id, others)}) == 3
    assert len(client_id(config)) <= 23


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_pauses_grow_to_a_minute_and_are_spread(failures: int, chance: float) -> None:
    assert 0.5 <= pause_after(failures, chance) <= 60
    assert pause_after(failures, chance) <= pause_after(failures + 1, chance)
    assert pause_after(7, chance) == pause_after(10_000, chance) == 60 * (0.5 + chance / 2)
    assert pause_after(1, 0) < pause_after(1, 1) == 1


# -- 2. Topics -------------------------------------------------------------------------------------

MAC = "5C:CF:7F:12:34:56"
TOPICS = [
    ("/switch/cmd/root", "/switch/cmd/root"),
    ("cmd/{device}", f"cmd/{MAC}"),
    ("cmd/{mac}/x", "cmd/5ccf7f123456/x"),
    ("{project}/{group}/{device}", f"lamp/attic/{MAC}"),
]


@pytest.mark.parametrize(("template", "topic"), TOPICS)
def test_template_is_filled_with_what_is_the_device_s(template: str, topic: str) -> None:
    assert topic_for(template, MAC, "lamp", "attic") == topic


def test_nobody_chooses_another_one_s_topic_by_his_id() -> None:
    topic = topic_for("cmd/{device}/{group}", "a/+/#%\0", "", "")
    assert topic == "cmd/a%2F%2B%2F%23%25%00/-"


@given(*[st.text(st.characters(codec="utf-8"), min_size=1)] * 3)
def test_what_was_filled_in_is_read_again(device: str, project: str, group: str) -> None:
    template = "a.b/{device}/x-{project}/{group}/{device}"
    topic = topic_for(template, device, project, group)
    assert words_in(template, topic) == {"device": device, "project": project, "group": group}
    assert topic.count("/") == filter_of(template).count("/")


def test_filter_takes_whole_levels() -> None:
    assert filter_of("/state/{project}/x-{mac}/now") == "/state/+/+/now"
    assert filter_of("/switch/state/root") == "/switch/state/root"
    assert words_in("/state/x-{mac}", "/state/y-5ccf7f123456") is None
    assert words_in("/state", "/state") == {}


SAME = "1.0.0"
STATES: list[tuple[dict[str, str], object, tuple[object, ...] | None]] = [  # of which device, what
    ({"device": MAC}, {"version": "1.2.3"}, (MAC, "", "1.2.3", False)),
    ({"mac": "5ccf7f123456"}, {"app_version": "v1.2"}, (MAC, "", "1.2.0", False)),
    ({}, {"fw_version": SAME, "mac": "5c-cf-7f-12-34-56"}, (MAC, "", SAME, False)),
    ({}, {"firmware": "blue", "id": "77"}, ("77", "", "blue", False)),
    ({"device": "a"}, {"version": SAME, "device": "b"}, ("a", "", SAME, False)),
    ({"device": "a", "project": "b"}, {"version": SAME, "project": "c"}, ("a", "b", SAME, False)),
    ({"device": "a", "project": "-"}, {"version": SAME, "project": "c"}, ("a", "c", SAME, False)),
    ({"device": "a"}, {"version": SAME, "state": "Downloading"}, ("a", "", SAME, True)),
    ({"device": "a"}, {"version": SAME, "state": "idle"}, ("a", "", SAME, False)),
    ({"device": "a"}, {"version": " ", "firmware": SAME}, ("a", "", SAME, False)),
    ({}, {"version": SAME}, None),
    ({"device": "a"}, {"version": 1.2}, None),
    ({"device": "a"}, {"state": "idle"}, None),
    ({"device": "a"}, [SAME], None),
    ({"device": "a"}, SAME, None),
    ({"device": "a"}, {"version": SAME, "more": "x" * 4096}, None),
]


@pytest.mark.parametrize(
    ("words", "data", "said"), STATES, ids=[str(row[:2])[:60] for row in STATES]
)
def test_state_says_which_device_runs_what(
    words: dict[str, str], data: object, said: tuple[object, ...] | None
) -> None:
    payload = json.dumps(data).encode()
    if said is None:
        with pytest.raises(ValueError, match=r"\A\w+ "):
            read_state(words, payload)
        return
    found = read_state(words, payload)
    assert found._replace(version=str(found.version)) == said
    assert found.version != said[2] or said[2] == "blue"  # a Version, if it is one


@given(st.one_of(st.binary(), st.just(b"[" * 4096), st.just(b'{"version":"\\ud800"}')))
def test_any_bytes_are_a_state_or_a_sentence(payload: bytes) -> None:
    with suppress(ValueError):
        assert read_state({"device": "a"}, payload).device == "a"


# -- 3. The queue ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, and is soon there again."""
    monkeypatch.setattr(mqtt_module, "FIRST", 0.05)
    monkeypatch.setattr(mqtt_module, "LAST", 0.2)
    monkeypatch.setattr(mqtt_module, "TICK", 0.05)


@pytest.fixture
def path(tmp_path: Path, quick: None) -> Path:
    """Where the registry is."""
    return tmp_path / "fleet.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    """One with four devices: two lamps in the attic, one of which has a label, and two doors."""
    with opened(path) as registry:
        furnish(registry)
        yield registry


def furnish(registry: Registry) -> None:
    """Lets the four devices be known."""
    for number, project in enumerate(("lamp", "lamp", "door", "door")):
        registry.seen(SIGHTING._replace(device=mac(number), project=project, version="1.0.0"))
    registry.seen(SIGHTING._replace(device="nameless", project="", version=""))
    registry.flush()
    for number in range(2):
        registry.annotate(mac(number), group="attic")
    registry.annotate(mac(1), labels=['say "yes"'])


def devices(targets: list[Target]) -> list[str]:
    """Which they are."""
    return [target.device for target in targets]


def test_devices_are_found_by_id_group_and_label(registry: Registry) -> None:
    summons = Summons(registry, "")
    assert summons.find("device", "5ccf7f000000") == [Target(mac(0), "lamp", "attic")]
    assert summons.find("device", "unknown") == []
    assert devices(summons.find("group", "attic")) == [mac(0), mac(1)]
    assert devices(summons.find("group", "attic", "door")) == []
    assert devices(summons.find("label", 'say "yes"')) == [mac(1)]
    assert devices(summons.find("label", "yes")) == []
    assert devices(summons.among([mac(3), "unknown", mac(0)])) == [mac(3), mac(0)]


def test_one_is_due_after_the_other(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{mac}")
    assert summons.call(summons.find("group", "attic"), 30, NOW) == 2
    assert summons.claim(NOW - 1, 9) == []
    assert summons.claim(NOW, 9) == [
        Summon(1, mac(0), "cmd/5ccf7f000000", "lamp", 0, "1.0.0"),
    ]
    assert summons.claim(NOW + 29, 9) == []
    assert [each.device for each in summons.claim(NOW + 30, 9)] == [mac(1)]


def test_what_is_claimed_is_nobody_else_s_until_the_lease_ends(
    registry: Registry, path: Path
) -> None:
    with opened(path) as other:
        both = Summons(registry, "cmd/{mac}"), Summons(other, "cmd/{mac}")
        both[0].call(both[0].find("device", mac(0)), 0, NOW)
        found = [each.claim(NOW, 9) for each in both]
        assert sorted(map(len, found)) == [0, 1]
        assert both[1].claim(NOW + LEASE - 1, 9) == []
        (again,) = both[1].claim(NOW + LEASE, 9)
        assert (again.id, again.tries) == (1, 1)


@pytest.mark.parametrize("workers", [2, 8])
def test_however_many_claim_each_gets_its_own(registry: Registry, path: Path, workers: int) -> None:
    summons = Summons(registry, "cmd/{device}")
    targets = [Target(str(number), "lamp", "") for number in range(100)]
    assert summons.call(targets, 0, NOW) == 100
    claimed: list[str] = []

    def work() -> None:
        with opened(path) as own:
            mine = Summons(own, "cmd/{device}")
            while found := mine.claim(NOW, 7):
                claimed.extend(each.device for each in found)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(claimed, key=int) == [target.device for target in targets]


def test_what_the_broker_has_is_deleted(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{mac}")
    summons.call(summons.find("group", "attic"), 0, NOW)
    first, _ = summons.claim(NOW, 9)
    summons.answered(first.id)
    registry.flush()
    assert [each.device for each in summons.claim(NOW + LEASE, 9)] == [mac(1)]


def test_what_waits_for_the_same_topic_is_replaced(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{mac}")
    for at in (NOW + 99, NOW):
        summons.call(summons.find("device", mac(0)), 0, at)
    assert [each.id for each in summons.claim(NOW + 99, 9)] == [2]


def test_devices_that_share_a_topic_are_told_together(registry: Registry) -> None:
    summons = Summons(registry, "/switch/cmd/root")
    everybody = [each for group in ("attic", "") for each in summons.find("group", group)]
    assert summons.call(everybody, 10, NOW) == 2
    first, second = summons.claim(NOW + 10, 9)
    assert (first.device, first.project, first.version) == ("", "lamp", "")
    assert (second.device, second.project) == ("", "door")
    assert summons.call(summons.find("device", mac(0)), 10, NOW) == 1
    assert summons.claim(NOW, 9)[0].device == mac(0)


def test_who_never_said_its_project_is_told_one_or_nothing(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{device}")
    target = summons.find("device", "nameless")
    assert summons.call(target, 0, NOW) == 0
    assert summons.call(target, 0, NOW, "lamp") == 1
    assert summons.claim(NOW, 9)[0].project == "lamp"


def test_after_an_outage_one_still_comes_after_the_other(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{mac}")
    summons.call(summons.find("group", "attic"), 60, NOW)
    summons.resume(NOW + 3)  # a moment late is on time
    assert len(summons.claim(NOW, 9)) == 1
    summons.answered(1)
    registry.flush()
    summons.call(summons.find("group", ""), 60, NOW + 120)
    summons.resume(NOW + 5_000)
    for late, device in ((0, mac(1)), (60, mac(2)), (120, mac(3))):
        (found,) = summons.claim(NOW + 5_000 + late, 9)
        assert found.device == device
        summons.answered(found.id)
        registry.flush()
    summons.resume(NOW + 9_000)


def test_what_nobody_takes_is_given_up(
    registry: Registry, lines: Callable[[str], list[str]]
) -> None:
    summons = Summons(registry, "cmd/{mac}")
    summons.call(summons.find("device", mac(0)), 0, NOW)
    tries = [len(summons.claim(NOW + LEASE * number, 9)) for number in range(MAX_TRIES + 2)]
    assert tries == [*[1] * MAX_TRIES, 0, 0]
    assert len(lines("cmd/5ccf7f000000 never took")) == 1


def test_what_was_not_sent_is_taken_back(registry: Registry) -> None:
    summons = Summons(registry, "cmd/{mac}")
    for group in ("attic", ""):
        summons.call(summons.find("group", group), 0, NOW)
    assert (summons.take_back("lamp"), summons.take_back("lamp")) == (2, 0)
    assert {each.project for each in summons.claim(NOW, 9)} == {"door"}
    assert summons.take_back() == 2


SUMMON = Summon(1, MAC, "cmd", "my lamp", 0, "1.0.0+b")


def url_in(message: bytes) -> str:
    """What a device is told to fetch."""
    data = json.loads(message)
    assert set(data) == {"type", "url"}
    assert data["type"] == "ota_trigger"
    return str(data["url"])


def test_trigger_is_a_url_that_says_who_asks() -> None:
    url = url_in(trigger(SUMMON, SERVER, b"", NOW))
    assert url == f"{SERVER}/my%20lamp/latest.bin?id={MAC}&version=1.0.0%2Bb"
    alone = url_in(trigger(SUMMON._replace(device="", version=""), SERVER, b"", NOW))
    assert alone == f"{SERVER}/my%20lamp/latest.bin"


@pytest.mark.parametrize("device", [MAC, ""])
def test_signed_trigger_opens_the_image_for_an_hour(device: str) -> None:
    url = url_in(trigger(SUMMON._replace(device=device), SERVER, KEY, NOW))
    asked = parse_head(request(url.removeprefix(SERVER)), "192.0.2.7")
    assert ota_server.is_signed(KEY, asked, NOW + 3_600)
    with pytest.raises(ota_server.Refused, match="was good until"):
        ota_server.is_signed(KEY, asked, NOW + 3_601)


def test_what_a_device_is_told_is_answered(folder: Path) -> None:
    site = site_with(folder, sign_key=KEY)
    summon = SUMMON._replace(project="firmware", version="1.0.0")
    target = url_in(trigger(summon, SERVER, KEY, int(time.time()))).removeprefix(SERVER)
    assert ask(site, target).status == 200
    assert ask(site, target.replace("1.0.0", "1.1.0")).status == 403
    assert ask(site, target.partition("?")[0]).status == 401


# -- 4. A real broker ------------------------------------------------------------------------------


@dataclass
class Notes:
    """What the rest of the fleet is asked, and answers."""

    heard: list[tuple[str, str, int]] = field(default_factory=list)
    approved: list[tuple[str, str, str]] = field(default_factory=list)
    latest: dict[str, Release] = field(default_factory=dict)
    live: dict[str, tuple[int, int]] = field(default_factory=dict)
    newest: dict[str, Version] = field(default_factory=dict)

    def seams(self) -> Seams:
        """The callables that do so."""
        return Seams(
            hear=lambda *said: self.heard.append(said),
            resolve=lambda project: {"bulb": "lamp"}.get(project, project),
            latest=lambda device: self.latest.get(device.id),
            approve=lambda *wish: self.approved.append(wish),
            live=lambda: self.live,
            newest=lambda: dict(self.newest),
        )


class Talk(NamedTuple):
    """A server's part in it."""

    registry: Registry
    summons: Summons
    listen: Callable[[Event], None]
    notes: Notes


def waiting(talk: Talk) -> list[str]:
    """The devices that are still to be told."""
    talk.registry.flush()
    return [device for (device,) in talk.registry.rows("SELECT device FROM summons")]


@contextmanager
def talking(path: Path, url: str, notes: Notes | None = None, **settings: Any) -> Iterator[Talk]:
    """What --mqtt starts, over the registry in `path`."""
    config = config_of(mqtt=url, state=str(path.parent), **settings)
    broker, notes = prepare(config), notes or Notes()
    assert broker is not None
    with opened(path) as registry:
        summons = Summons(registry, broker.command)
        running = start(broker, config, registry, summons, notes.seams())
        try:
            yield Talk(registry, summons, running.listen, notes)
        finally:
            running.close()


STATUS = "ota/server/status"
LAMP = release("2.0.0")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_trigger_reaches_the_device(broker: Mosquitto, path: Path, secure: bool) -> None:
    with (
        listening(broker, "kitchen", "/switch/cmd/kitchen") as kitchen,
        talking(path, broker.url(secure=secure), sign_key=KEY) as talk,
    ):
        talk.registry.seen(SIGHTING._replace(device="kitchen", version="1.0.0"))
        talk.registry.flush()
        assert talk.summons.call(talk.summons.find("device", "kitchen"), 0, int(time.time())) == 1
        url = url_in(kitchen.wait("/switch/cmd/kitchen").payload)
        assert url.startswith(f"{SERVER}/firmware/latest.bin?id=kitchen&version=1.0.0&expires=")
        wait_until(lambda: waiting(talk) == [])
        assert not kitchen.heard[0].retained


def test_others_do_not_hear_the_trigger_and_the_next_is_not_due(
    broker: Mosquitto, path: Path
) -> None:
    with (
        listening(broker, "homeassistant", "/switch/cmd/#") as all_of_it,
        listening(broker, "kitchen", "/switch/cmd/kitchen", "/switch/cmd/#") as kitchen,
        talking(path, broker.url(command="/switch/cmd/{mac}")) as talk,
    ):
        furnish(talk.registry)
        talk.summons.call(talk.summons.find("group", "attic"), 3_600, int(time.time()))
        all_of_it.wait("/switch/cmd/5ccf7f000000")
        wait_until(lambda: waiting(talk) == [mac(1)])
        assert (len(all_of_it.heard), kitchen.heard) == (1, [])


def test_two_servers_on_one_registry_send_each_trigger_once(broker: Mosquitto, path: Path) -> None:
    url = broker.url(command="/switch/cmd/{device}")
    topics = [f"/switch/cmd/{number}" for number in range(200)]
    with (
        listening(broker, "homeassistant", "/switch/cmd/+") as ear,
        talking(path, url, port=8001) as talk,
        talking(path, url, port=8002),
    ):
        targets = [Target(str(number), "lamp", "") for number in range(200)]
        talk.summons.call(targets, 0, int(time.time()))
        wait_until(lambda: len(ear.heard) >= 200, 30)
        wait_until(lambda: waiting(talk) == [])
    assert sorted(each.topic for each in ear.heard) == sorted(topics)


def test_summons_wait_for_a_broker_that_is_down_and_go_on_when_it_is_there(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    def has_lost(times: int) -> bool:
        return len(lines("WARNING no connection to the MQTT broker 127.0.0.1: ")) >= times

    broker.kill()
    with talking(path, broker.url(command="/switch/cmd/{mac}")) as talk:
        furnish(talk.registry)
        for outage in (1, 2):
            wait_until(functools.partial(has_lost, outage))
            soon = int(time.time()) + 2  # by then somebody listens
            talk.summons.call(talk.summons.find("device", mac(0)), 0, soon)
            broker.start()
            with listening(broker, "homeassistant", "/switch/cmd/#", STATUS) as ear:
                ear.wait("/switch/cmd/5ccf7f000000")
                assert ear.wait(STATUS).payload == b"online"
                broker.kill()
        wait_until(functools.partial(has_lost, 3))
    assert len(lines("INFO connected to")) == 2
    assert len(lines("Connection refused")) <= 3  # once an outage
    assert lines("ERROR") == []
    broker.start()


class Silent(NamedTuple):
    """What listens in the place of a broker."""

    port: int
    calls: list[int]


@contextmanager
def answering(reply: bytes) -> Iterator[Silent]:
    """Says the same to everybody, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls: list[int] = []

        def serve() -> None:
            while True:
                link, _ = server.accept()
                with link:
                    if not link.recv(1_000):
                        return
                    calls.append(1)
                    link.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Silent(server.getsockname()[1], calls)
        finally:
            socket.create_connection(server.getsockname()).close()
            thread.join(PATIENCE)


REPLIES = [
    (b"\x20\x02\x00\x05", "uthori"),
    (b"\x20\x02\x00\x04", "password"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
    (b"", ""),
]


@pytest.mark.parametrize(("reply", "why"), REPLIES, ids=[repr(row[0]) for row in REPLIES])
def test_what_goes_wrong_is_said_once_and_tried_again(
    reply: bytes, why: str, path: Path, lines: Callable[[str], list[str]]
) -> None:
    with answering(reply) as server, talking(path, f"mqtt://127.0.0.1:{server.port}") as talk:
        wait_until(lambda: len(server.calls) >= 4)
        talk.registry.seen(SIGHTING)
        talk.registry.flush()
        assert len(talk.registry.devices()) == 1
        (line,) = lines("no connection to the MQTT broker 127.0.0.1: ")
        assert why in line


def test_wrong_password_is_said(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    url = f"mqtt://server:wrong@127.0.0.1:{broker.port}"
    with talking(path, url):
        wait_until(lambda: bool(lines("WARNING no connection to the MQTT broker 127.0.0.1: ")))
        (line,) = lines("no connection")
        assert "ot authori" in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho's socket
def test_broker_without_tls_is_asked_without_it(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    with talking(path, f"mqtts://server:x@127.0.0.1:{broker.port}"):
        wait_until(lambda: bool(lines("; is this a TLS port? Try mqtt://")))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho's socket
def test_broker_with_a_certificate_of_nobody_we_trust_is_left(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    with talking(path, f"mqtts://server:x@127.0.0.1:{broker.tls_port}"):
        wait_until(lambda: bool(lines("self-signed certificate in certificate chain")))


def test_server_that_stops_says_so_at_once(broker: Mosquitto, path: Path) -> None:
    with listening(broker, "homeassistant", STATUS) as ear:
        with talking(path, broker.url()):
            assert ear.wait(STATUS).payload == b"online"
            began = time.monotonic()
        assert time.monotonic() - began < 2
        assert ear.wait(STATUS, 2).payload == b"offline"
    with listening(broker, "homeassistant", STATUS) as later:
        assert later.wait(STATUS) == (STATUS, b"offline", True)


ALONE = """if True:
    import sys
    from ota_fleet.mqtt import Seams, Summons, prepare, start
    from ota_fleet.registry import Registry
    from ota_server import Config
    state, url = sys.argv[1:]
    config = Config(dir="", state=state, mqtt=url, public_url="https://ota.example")
    registry = Registry(state + "/fleet.db")
    broker = prepare(config)
    seams = Seams(print, str, lambda _: None, print, dict, dict)
    start(broker, config, registry, Summons(registry, broker.command), seams)
    sys.stdin.read()
"""


def test_server_that_is_killed_is_said_to_be_gone(broker: Mosquitto, path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(path.parent), broker.url()]
    with (
        listening(broker, "homeassistant", STATUS) as ear,
        subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process,
    ):
        assert ear.wait(STATUS).payload == b"online"
        process.kill()
        assert ear.wait(STATUS, 2).payload == b"offline"


def test_one_of_two_servers_that_stops_leaves_the_other_there(
    broker: Mosquitto, path: Path
) -> None:
    with (
        listening(broker, "homeassistant", STATUS) as ear,
        talking(path, broker.url(), port=8001),
    ):
        ear.wait(STATUS)
        with talking(path, broker.url(), port=8002):
            ear.wait(STATUS, 2)
        ear.wait(STATUS, 4)
        said = [each.payload for each in ear.heard]
        assert said == [b"online", b"online", b"offline", b"online"]


def test_the_examples_let_everybody_do_what_he_is_there_for(
    furnished_broker: Path, path: Path, tmp_path: Path
) -> None:
    conf = example_conf(tmp_path, (furnished_broker / "passwords").read_text())
    device, command = "5ccf7f123456", "/switch/cmd/5ccf7f123456"
    entity = "ota/device/ota_5ccf7f123456"
    with (
        started(Mosquitto(tmp_path, conf)) as broker,
        listening(broker, "homeassistant", "homeassistant/#", "ota/#") as home,
        listening(broker, device, command, "/switch/cmd/#") as lamp,
        talking(path, broker.url("ota-server", secure=True)) as talk,
    ):
        talk.notes.latest[MAC] = LAMP
        home.wait(STATUS)
        lamp.say(f"/switch/state/{device}", {"version": "1.0.0", "project": "lamp"})
        home.wait_for(f"{entity}/update", installed_version="1.0.0", latest_version="2.0.0")
        home.say(f"{entity}/install", b"INSTALL")
        assert url_in(lamp.wait(command).payload).startswith(f"{SERVER}/lamp/latest.bin?id={MAC}")


TEXTS = ("README.md", "docs/protocols.md", "install.sh", "examples/mqtt/README.md")


@pytest.mark.parametrize("name", TEXTS)
def test_every_url_of_a_broker_that_is_written_down_is_one(name: str) -> None:
    found = re.findall(r"mqtts?://\w[^\s'`\"]+", (ROOT / name).read_text())
    assert found
    assert all(read_url(each).host for each in found)


# -- 5. What devices say ---------------------------------------------------------------------------


def test_what_a_device_only_says_does_not_end_that_it_fails(registry: Registry) -> None:
    given = SIGHTING._replace(device=MAC, version="1.0.0", offered="2.0.0")
    said = SIGHTING._replace(device=MAC, version="1.0.0", address="")
    for sighting in (given, said, given, said, given, said):
        registry.seen(sighting)
    registry.flush()
    device = registry.device(MAC)
    assert device is not None
    assert (device.offered, device.offers, device.address) == ("2.0.0", 3, SIGHTING.address)


def test_what_a_device_says_is_a_check_in(broker: Mosquitto, path: Path) -> None:
    url = broker.url(state="/switch/state/{device}")
    with (
        listening(broker, "kitchen") as kitchen,
        listening(broker, "homeassistant", STATUS) as other,
        talking(path, url) as talk,
    ):
        other.wait(STATUS)
        for bad in (b"", b"1.0", b"\xff\xfe", b"[" * 5_000, b'{"version": 1}'):
            kitchen.say("/switch/state/kitchen", bad)
        other.say("/switch/state/cellar", {"version": "9.0.0"}, retain=True)
        with listening(broker, "kitchen") as forger, suppress(RuntimeError):
            forger.say("/switch/state/cellar", {"version": "6.6.6"})  # mosquitto 2.0.11 hangs up
        kitchen.say("/switch/state/kitchen", {"version": "v1.2", "project": "bulb"})
        kitchen.say("/switch/state/kitchen", {"version": "1.2.0", "state": "downloading"})
        other.say("/switch/state/5ccf7f000000", {"version": "2.0.0"})
        wait_until(lambda: len(talk.notes.heard) >= 3)
        talk.registry.flush()
        said = [each[:2] for each in talk.notes.heard]
        assert said == [("cellar", "9.0.0"), ("kitchen", "1.2.0"), (mac(0), "2.0.0")]
        device = talk.registry.device("kitchen")
        assert device is not None
        assert (device.project, device.version) == ("lamp", "1.2.0")
        assert time.time() - device.last_seen < 60


def test_what_was_said_before_we_listened_is_no_check_in(broker: Mosquitto, path: Path) -> None:
    with listening(broker, "homeassistant", STATUS) as other:
        other.say("/switch/state/cellar", {"version": "1.0.0"}, retain=True)
        with talking(path, broker.url()) as talk:
            other.wait(STATUS)
            other.say("/switch/state/attic", {"version": "1.0.0"})
            wait_until(lambda: bool(talk.notes.heard))
            talk.registry.flush()
            assert [each.id for each in talk.registry.devices()] == ["attic"]


def test_by_default_the_payload_says_who_it_is(broker: Mosquitto, path: Path) -> None:
    url = broker.url(state="/switch/state/root")
    with listening(broker, "homeassistant", STATUS) as root, talking(path, url) as talk:
        root.wait(STATUS)
        root.say("/switch/state/root", {"firmware": "1.0.0"})
        root.say("/switch/state/root", {"firmware": "1.0.0", "mac": "5CCF7F000000"})
        wait_until(lambda: bool(talk.notes.heard))
        assert [each[:2] for each in talk.notes.heard] == [(mac(0), "1.0.0")]


def test_whose_message_nobody_knows_is_said_once_a_topic(
    broker: Mosquitto, path: Path, lines: Callable[[str], list[str]]
) -> None:
    url = broker.url(state="/switch/state/{project}")
    with listening(broker, "homeassistant", STATUS) as root, talking(path, url) as talk:
        root.wait(STATUS)
        for topic in ("lamp", "lamp", "door"):
            root.say(f"/switch/state/{topic}", {"version": "1.0.0"})
        root.say("/switch/state/lamp", {"version": "1.0.0", "mac": MAC})
        wait_until(lambda: bool(talk.notes.heard))
        for topic in ("lamp", "door"):
            (line,) = lines(f"INFO '/switch/state/{topic}': ")
            assert 'put {mac} into state=, or "mac" into the message' in line


@pytest.mark.parametrize(
    ("command", "is_said"),
    [("/switch/cmd/root", True), ("/cmd/{mac}", False), ("/cmd/{group}", False), ("", False)],
)
def test_one_topic_for_all_is_said_at_the_start(
    command: str, is_said: bool, path: Path, lines: Callable[[str], list[str]]
) -> None:
    with (
        answering(b"") as server,
        talking(path, f"mqtt://127.0.0.1:{server.port}?command={command}"),
    ):
        pass
    assert bool(lines("INFO all devices are told to ask on '/switch/cmd/root'")) is is_said
