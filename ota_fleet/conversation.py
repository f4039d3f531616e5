"""What is said and heard on the topics, whoever carries it.

    turn() --> summons that are due; what is new for Home Assistant
    hear() --> what a device runs --> registry, and who judges attempts
           `-> Install, in Home Assistant --> approval, and a summons

All but listen() belongs to one thread. Nothing is said before begin(), which tells how.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ota_fleet.broker import Broker, Nameless, filter_of, read_state, words_in
from ota_fleet.entities import Entities, Seams
from ota_fleet.homeassistant import (
    INSTALL,
    OFFLINE,
    ONLINE,
    config_topic,
    install_topic,
    status_topic,
)
from ota_fleet.registry import Registry, Sighting
from ota_fleet.summons import Busy, Summons, trigger
from ota_server import Config, Event, own_url, printable, shown

AT_ONCE = 20  # triggers on their way to the broker
MAX_NAMELESS = 100  # topics that the log names

log = logging.getLogger("ota.mqtt")


class Message(NamedTuple):
    """What is said, or was heard."""

    topic: str
    payload: bytes
    retain: bool = False  # the broker is to keep it; of what was heard: it did, so it is old


Say = Callable[[Message, Callable[[], None] | None], None]  # the latter once the broker has it


class Conversation:
    """What the server says, and what it makes of what it hears."""

    def __init__(
        self, broker: Broker, config: Config, registry: Registry, summons: Summons, seams: Seams
    ) -> None:
        """Begins with nothing to say."""
        self._broker = broker
        self._config = config
        self._registry = registry
        self._summons = summons
        self._seams = seams
        self._entities = Entities(broker, registry, seams, self._call)
        self._say: Say = _unheard
        self._status = status_topic(broker)
        self._buttons = install_topic(broker, "{device}")
        self._configs = config_topic(broker, "{device}")
        self._resumed = self._ended = self._outage = False
        self._flying = 0  # triggers
        self._nameless: set[str] = set()  # topics of which the log says so
        self.will = Message(self._status, OFFLINE, retain=True)  # when the connection breaks

    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        found = [self._status]
        if self._broker.discovery:
            found += [self._buttons, self._configs]
        if self._broker.state:
            found.append(self._broker.state)
        return tuple(map(filter_of, found))

    def listen(self, event: Event) -> None:
        """The listener that lets Home Assistant see each decision; from any thread."""
        if event.report.device is not None and self._broker.discovery:
            self._entities.noticed(event.report.device)

    # -- What is said ------------------------------------------------------------------------------

    def begin(self, say: Say) -> None:
        """There is a connection. What the one before did not answer for, it never will."""
        self._say, self._flying, self._resumed = say, 0, False
        say(self.will._replace(payload=ONLINE), None)
        server = server_of(self._config)
        self._entities.begin(self._retain, server, time.monotonic())

    def end(self) -> None:
        """The last words."""
        self._ended = True
        self._say(self.will, None)

    def turn(self) -> bool:
        """Says some of what there is to say; True: there is more."""
        try:
            if self._summons.template:
                self._summon(int(time.time()))
            more = bool(self._broker.discovery) and self._entities.turn(time.monotonic())
        except Busy as err:
            if not self._outage:
                log.warning("MQTT has to wait for the registry: %s", err)
            self._outage = True
            return False
        self._outage = False
        return more

    def _summon(self, now: int) -> None:
        """Says what is due."""
        if not self._resumed:
            self._summons.resume(now)
            self._resumed = True
        if self._flying > AT_ONCE // 2:  # a transaction is for several
            return
        for each in self._summons.claim(now, AT_ONCE - self._flying):
            text = trigger(each, server_of(self._config), self._config.sign_key, now)
            self._flying += 1
            self._say(Message(each.topic, text), functools.partial(self._arrived, each.id))
            who = printable(each.device) or "-"
            log.info("%s is told to ask for %s", who, printable(each.project))

    def _arrived(self, summon: int) -> None:
        self._flying -= 1
        self._summons.answered(summon)

    def _call(self, device: str) -> None:
        """Lets one device be told at once."""
        if self._summons.template:
            self._summons.call(self._summons.find("device", device), 0, int(time.time()))

    def _retain(self, topic: str, payload: bytes) -> None:
        self._say(Message(topic, payload, retain=True), None)

    # -- What is heard -----------------------------------------------------------------------------

    def hear(self, message: Message) -> None:
        """Makes of a message what it means; waits for nothing."""
        topic = message.topic
        if topic == self._status:
            if message.payload == OFFLINE and not (message.retain or self._ended):
                self._say(
                    self.will._replace(payload=ONLINE), None
                )  # another one's; this one is there
        elif node := words_in(self._buttons, topic):
            self._hear_button(node["device"], message)
        elif self._broker.discovery and (node := words_in(self._configs, topic)):
            self._entities.hear(node["device"], message.payload, time.monotonic())
        elif (words := words_in(self._broker.state, topic)) is not None:
            self._hear_state(words, message)

    def _hear_button(self, node: str, message: Message) -> None:
        if message.payload != INSTALL:
            said = shown(message.topic), message.payload[:64], INSTALL.decode()
            log.info("%s: %r is ignored, a button says %s", *said)
        elif not message.retain:
            self._entities.install(node)

    def _hear_state(self, words: Mapping[str, str], message: Message) -> None:
        if message.retain:  # the device may have said so long ago
            return
        try:
            device, project, version, is_busy = read_state(words, message.payload)
        except ValueError as err:
            self._complain(message, err)
            return
        at = int(time.time())
        self._registry.seen(
            Sighting(
                device=device,
                project=self._seams.resolve(project),
                chip=None,
                version=version,
                sketch_md5=None,
                sketch_sha256=None,
                free_space=None,
                sdk=None,
                address="",
                at=at,
                downloaded=False,
            )
        )
        if not is_busy:
            self._seams.hear(device, str(version), at)
        if self._broker.discovery:
            self._entities.noticed(device)

    def _complain(self, message: Message, why: ValueError) -> None:
        """Tells the log what is ignored: once of each topic that names no device, else at debug."""
        topic, level = message.topic, logging.DEBUG
        is_news = isinstance(why, Nameless) and topic not in self._nameless
        if is_news and len(self._nameless) < MAX_NAMELESS:
            self._nameless.add(topic)
            level = logging.INFO
        log.log(level, "%s: %r: %s", shown(topic), message.payload[:64], why)


def _unheard(_message: Message, _done: Callable[[], None] | None) -> None:
    """What is said where there is no connection."""


def server_of(config: Config) -> str:
    """The URL that devices and people know, without a slash at its end."""
    return (config.public_url or own_url(config, (config.host, config.port))).rstrip("/")
