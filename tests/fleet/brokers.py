"""A real mosquitto on free ports, with passwords, an ACL and TLS; and a client that listens."""

from __future__ import annotations

import json
import queue
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
import pytest

from tests.conftest import wait_until
from tests.core.wire import PATIENCE
from tests.test_house import ROOT

USERS = {
    "server": "s3cret:/?#@", "kitchen": "k1tchen", "homeassistant": "ha",
    "ota-server": "x", "5ccf7f123456": "y",
}  # fmt: skip
EXAMPLE = ROOT / "examples" / "mqtt"
ACL = """\
user server
topic write /switch/cmd/#
topic read /switch/state/#
topic readwrite ota/#
topic readwrite homeassistant/#
user homeassistant
topic readwrite homeassistant/#
topic readwrite ota/#
topic write /switch/state/#
topic read /switch/cmd/#
pattern read /switch/cmd/%u
pattern write /switch/state/%u
"""
CONF = """\
user root
allow_anonymous false
password_file {folder}/passwords
acl_file {folder}/acl
persistence false
log_dest none
max_queued_messages 0
listener {port} 127.0.0.1
listener {tls_port} 127.0.0.1
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
"""
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def certify(folder: Path) -> None:
    """A CA of our own, ca.pem, and what it says of the broker on 127.0.0.1."""
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for line in (
        f"req -x509 {curve} -days 2 -subj /CN=ours -keyout ca.key -out ca.pem",
        f"req {curve} -subj /CN=broker -keyout broker.key -out broker.csr",
        "x509 -req -in broker.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile names -out broker.pem",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)


@dataclass
class Mosquitto:
    """A broker, which can be killed and started again where it was."""

    folder: Path
    conf: str = CONF
    port: int = 0
    tls_port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins to listen; on other ports, if this is the first time and they are taken."""
        fixed = bool(self.port)
        for _ in range(20):
            if not fixed:
                self.port, self.tls_port = free_port(), free_port()
            if self._try():
                return
        pytest.fail("mosquitto does not listen")

    def _try(self) -> bool:
        ports = {"port": self.port, "tls_port": self.tls_port}
        (self.folder / "conf").write_text(self.conf.format(folder=self.folder, **ports))
        process = subprocess.Popen([str(MOSQUITTO), "-c", str(self.folder / "conf")])
        wait_until(lambda: process.poll() is not None or is_open(self.tls_port))
        if process.poll() is not None:  # somebody else was faster
            return False
        self.process = process
        return True

    def kill(self) -> None:
        """Ends it without a word, with all that it retained."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE)

    def url(self, user: str = "server", *, secure: bool = False, **options: str) -> str:
        """What --mqtt says; without options the topics have a device in them."""
        password = "".join(f"%{ord(char):02x}" for char in USERS[user])
        options = {"command": "/switch/cmd/{mac}", "state": "/switch/state/{mac}", **options}
        if secure:
            options = {"ca": str(self.folder / "ca.pem"), **options}
        where = f"127.0.0.1:{self.tls_port if secure else self.port}"
        words = "&".join(f"{name}={value}" for name, value in options.items())
        return f"mqtt{'s' * secure}://{user}:{password}@{where}/ota?{words}"


def is_open(port: int) -> bool:
    """Whether somebody listens."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE):
        return True
    return False


@pytest.fixture(scope="module")
def furnished_broker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a broker."""
    if MOSQUITTO is None:
        pytest.skip("needs mosquitto")
    folder = tmp_path_factory.mktemp("mosquitto")
    certify(folder)
    (folder / "acl").write_text(ACL)
    (folder / "passwords").touch(0o600)
    for user, password in USERS.items():
        command = ["mosquitto_passwd", "-b", str(folder / "passwords"), user, password]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def example_conf(folder: Path, passwords: str) -> str:
    """The example of a configuration, as it is used here, with the certificates of its README."""
    (folder / "ota.acl").write_text((EXAMPLE / "acl").read_text())
    (folder / "ota.passwords").touch(0o600)
    (folder / "ota.passwords").write_text(passwords)
    text = (EXAMPLE / "README.md").read_text().replace("192.168.1.5", "127.0.0.1")
    lines = "\n".join(re.findall("^    ((?:openssl|printf) .*)", text, re.MULTILINE))
    subprocess.run(["sh", "-ec", lines], cwd=folder, check=True, capture_output=True)
    text = (EXAMPLE / "mosquitto.conf").read_text()
    for before, after in (
        ("1883", "{port}"),
        ("8883", "{tls_port} 127.0.0.1"),
        ("/etc/mosquitto/certs/", "{folder}/"),
        ("/etc/mosquitto/", "{folder}/"),
    ):
        assert before in text
        text = text.replace(before, after)
    return f"user root\n{text}"


@contextmanager
def started(broker: Mosquitto) -> Iterator[Mosquitto]:
    """The broker, as long as it is needed."""
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@pytest.fixture
def broker(furnished_broker: Path) -> Iterator[Mosquitto]:
    """One that runs."""
    with started(Mosquitto(furnished_broker)) as broker:
        yield broker


class Heard(NamedTuple):
    """A message."""

    topic: str
    payload: bytes
    retained: bool

    @property
    def data(self) -> Any:
        """The JSON."""
        return json.loads(self.payload)


@dataclass
class Ear:
    """A client that hears what it may."""

    client: mqtt.Client
    heard: list[Heard] = field(default_factory=list)
    ready: queue.Queue[str] = field(default_factory=queue.Queue)

    def on(self, topic: str) -> list[Heard]:
        """What came on a topic."""
        return [each for each in self.heard if each.topic == topic]

    def wait(self, topic: str, count: int = 1) -> Heard:
        """The last message on a topic, once there are so many."""
        wait_until(lambda: len(self.on(topic)) >= count)
        return self.on(topic)[-1]

    def wait_for(self, topic: str, **fields: object) -> Mapping[str, Any]:
        """The last JSON object on a topic, once it has these fields."""

        def has() -> bool:
            found = self.on(topic)
            if not (found and found[-1].payload):
                return False
            return all(found[-1].data.get(name) == value for name, value in fields.items())

        wait_until(has)
        data: Mapping[str, Any] = self.on(topic)[-1].data
        return data

    def say(self, topic: str, payload: object, *, retain: bool = False) -> None:
        """Publishes bytes, or JSON; the broker has it when this returns."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload)
        self.client.publish(topic, data, 1, retain).wait_for_publish(PATIENCE)


@contextmanager
def listening(broker: Mosquitto, user: str, *topics: str) -> Iterator[Ear]:
    """Somebody who has subscribed to these topics."""
    api = getattr(mqtt, "CallbackAPIVersion", None)  # paho 1.6 has none
    client: mqtt.Client = mqtt.Client(*((api.VERSION2,) if api else ()))
    client.username_pw_set(user, USERS[user])
    ear = Ear(client)
    subscribed = threading.Event()

    def on_message(_client: object, _: object, message: mqtt.MQTTMessage) -> None:
        ear.heard.append(Heard(message.topic, bytes(message.payload), bool(message.retain)))

    client.on_message = on_message
    client.on_connect = lambda *_: ear.ready.put("connected")
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    try:
        ear.ready.get(timeout=PATIENCE)
        if topics:
            client.subscribe([(topic, 1) for topic in topics])
            assert subscribed.wait(PATIENCE)
        yield ear
    finally:
        client.disconnect()
        client.loop_stop()
