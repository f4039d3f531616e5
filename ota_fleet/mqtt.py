"""The connection to an MQTT broker: made, kept, made again, in a thread of its own.

    prepare(config) --> Broker, or why not      start(...) --> Link --> Conversation says and hears

The only room that needs more than the standard library: paho-mqtt, 1.6 or 2, imported when there is
a broker. Each connection has a client of its own, so that nothing of the one before is said twice:
a trigger that nobody acknowledged is in the registry, and its URL is signed anew. The session is
clean, too: what a device said while the broker could not reach this server would be heard as if it
said so now. paho's own loop is not used, as select() takes no descriptor above 1023.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ota_fleet.broker import Broker, read_url
from ota_fleet.conversation import Conversation, Message
from ota_fleet.entities import Seams
from ota_fleet.registry import Registry
from ota_fleet.summons import Summons
from ota_server import Config, Event, shown

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

__all__ = ["Seams", "Summons", "prepare", "start"]

KEEPALIVE = 30  # seconds in which the broker hears of us, or sends our last will
FIRST, LAST = 1.0, 60.0  # seconds between two tries: twice as long each time
STEADY = 30.0  # seconds that a connection holds before the next failure counts as the first
MAX_UNACKED = 100  # messages on their way to the broker; then nothing new is said
TICK = 1.0  # seconds between two turns, if there is nothing to say
PAUSE = 0.02  # seconds, if there is: for other threads
FAREWELL = 2.0  # seconds for the last words
PATIENCE = 5.0  # seconds for the thread to end
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

log = logging.getLogger("ota.mqtt")


def prepare(config: Config) -> Broker | None:
    """What --mqtt says; None: nothing. ValueError: it cannot be done, in a sentence."""
    if not config.mqtt:
        return None
    broker = read_url(config.mqtt)
    try:
        _paho()
        _tls(broker)
    except ImportError as err:
        how = "pip install 'ota-server[mqtt]', or apt install python3-paho-mqtt"
        raise ValueError(f"--mqtt needs paho-mqtt: {how}") from err
    except OSError as err:
        raise ValueError(f"--mqtt: ca={broker.ca}: {_words(err)}") from err
    if not config.public_url.startswith(("http://", "https://")):
        guessed = config.port and not config.inherited and not config.host.startswith("unix:")
        if config.public_url or not guessed:
            raise ValueError("--mqtt needs --public-url http://..., for devices to come back to")
    return broker


class Running(NamedTuple):
    """What a site has of it."""

    listen: Callable[[Event], None]  # for Site.listeners
    close: Callable[[], None]  # for Site.closers, before that of the registry


def start(
    broker: Broker, config: Config, registry: Registry, summons: Summons, seams: Seams
) -> Running:
    """Begins to connect, and to talk once it is; waits for nothing."""
    if broker.command and "{" not in broker.command:
        log.info("all devices are told to ask on %s: for a topic each, put {mac} into command=",
                 shown(broker.command))  # fmt: skip
    talk = Conversation(broker, config, registry, summons, seams)
    return Running(talk.listen, Link(broker, client_id(config), talk).close)


def client_id(config: Config) -> str:
    """What the broker calls this server: always the same, and what no other one is called.

    Two with one id would end each other's connections, so the address is part of it.
    """
    own = socket.gethostname(), os.path.realpath(config.state), config.host, str(config.port)
    return "ota-" + hashlib.sha256("\0".join(own).encode()).hexdigest()[:16]  # 23 at most: MQTT 3.1


def pause_after(failures: int, chance: float) -> float:
    """Seconds until the next try, after so many in a row; `chance`, from 0 to 1, spreads them."""
    return min(FIRST * 2.0 ** min(failures - 1, 16), LAST) * (0.5 + chance / 2)


def _paho() -> Any:
    """The module. ImportError: it is not there."""
    import paho.mqtt.client  # noqa: PLC0415 - few need it

    return paho.mqtt.client


def _tls(broker: Broker) -> ssl.SSLContext | None:
    """None: plain text. OSError: the CA's file does not do."""
    return ssl.create_default_context(cafile=broker.ca or None) if broker.secure else None


def _words(err: OSError) -> str:
    """Why something failed."""
    return getattr(err, "verify_message", "") or err.strerror or str(err)


class Link:
    """The connection, one after the other until close()."""

    def __init__(self, broker: Broker, name: str, talk: Conversation) -> None:
        """Begins at once; `name` is the client id."""
        self._broker = broker
        self._name = name
        self._talk = talk
        self._unacked: dict[int, Callable[[], None] | None] = {}  # by id of the message
        self._is_open = False  # the broker let us in
        self._refusal = ""  # why it did not
        self._next = 0.0  # monotonic seconds, when there is a turn again
        self._told: set[str] = set()  # what the log says of this outage
        self._closing = threading.Event()
        self._bell, self._ear = socket.socketpair()  # wakes the thread
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye, and ends; once more does nothing."""
        if not self._closing.is_set():
            self._bell.send(b".")  # first: at its end the thread closes both sides
            self._closing.set()
            self._thread.join(PATIENCE)  # not for ever: it may be looking up a name

    # -- The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                why = self._converse()
            except OSError as err:
                why = _words(err)
            except Exception as err:
                log.exception("the conversation with the broker failed")
                why = f"{type(err).__name__} here"
            if not self._closing.is_set():
                self._complain(why)
                failures = 1 if time.monotonic() - began > STEADY else failures + 1
                self._closing.wait(pause_after(failures, random.random()))  # noqa: S311 - no secret
        self._bell.close()
        self._ear.close()

    def _complain(self, why: str) -> None:
        """Tells the log, of each reason once an outage."""
        if why not in self._told:
            self._told.add(why)
            log.warning("no connection to the MQTT broker %s: %s", self._broker.host, why)

    def _converse(self) -> str:
        """One connection; gives back why it ended. OSError: there was none."""
        self._refusal = ""
        self._unacked.clear()
        client = self._client()
        try:
            self._connect(client)
            with selectors.DefaultSelector() as selector:
                selector.register(self._ear, READ)
                while not self._closing.is_set():
                    if why := self._step(client, selector, self._take_turn()):
                        return why
                selector.unregister(self._ear)
                self._say_goodbye(client, selector)
        finally:
            self._is_open = False
            if left := client.socket():
                left.close()
        return ""

    def _client(self) -> Client:
        """A new one, of either version of paho."""
        paho = _paho()
        api = getattr(paho, "CallbackAPIVersion", None)
        version = (api.VERSION2,) if api else ()
        client: Client = paho.Client(*version, client_id=self._name, reconnect_on_failure=False)
        if self._broker.user:
            client.username_pw_set(self._broker.user, self._broker.password)
        if context := _tls(self._broker):
            client.tls_set_context(context)
        will = self._talk.will
        client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        client.max_inflight_messages_set(MAX_UNACKED)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _connect(self, client: Client) -> None:
        """Opens the connection, with TLS where that is wanted. OSError: why not."""
        try:
            client.connect(self._broker.host, self._broker.port, KEEPALIVE)
        except (ssl.SSLError, ConnectionResetError) as err:  # who knows no TLS just hangs up
            if not self._broker.secure or isinstance(err, ssl.SSLCertVerificationError):
                raise
            raise OSError(f"{_words(err)}; is this a TLS port? Try mqtt://") from err

    def _take_turn(self) -> float:
        """Lets what there is be said; gives back how many seconds to wait for an answer."""
        if not self._is_open or len(self._unacked) >= MAX_UNACKED:
            return TICK
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PAUSE * self._talk.turn()
        return self._next - now if self._next > now else TICK

    def _step(self, client: Client, selector: selectors.BaseSelector, wait: float) -> str:
        """Waits, reads and writes; gives back why that is over, "": it is not."""
        link: Any = client.socket()
        if link is None:
            return self._refusal or "it ended the connection"
        watch = selector.modify if link in selector.get_map() else selector.register
        watch(link, READ | WRITE * client.want_write())
        if not (self._broker.secure and link.pending()):  # else there is something to read already
            selector.select(wait)
        error = client.loop_read() or (client.want_write() and client.loop_write())
        error = error or client.loop_misc()
        return self._refusal or str(_paho().error_string(error)) if error else ""

    def _say_goodbye(self, client: Client, selector: selectors.BaseSelector) -> None:
        """So that no last will is needed."""
        if not self._is_open:
            return
        self._talk.end()
        until = time.monotonic() + FAREWELL
        while self._unacked and (left := until - time.monotonic()) > 0:
            if self._step(client, selector, left):
                return
        client.disconnect()

    # -- What paho calls, in version 2 with a few arguments more -----------------------------------

    def _on_connect(
        self, client: Client, _: object, _flags: object, code: Any, *_more: Any
    ) -> None:
        if code != 0:
            self._refusal = _paho().connack_string(code) if isinstance(code, int) else str(code)
            return
        self._is_open = True
        self._told.clear()
        log.info("connected to the MQTT broker %s", self._broker.host)
        client.subscribe([(each, 1) for each in self._talk.filters()])
        self._talk.begin(functools.partial(self._send, client))

    def _on_message(self, _client: Client, _: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # nothing of ours
            return
        self._talk.hear(Message(topic, bytes(message.payload), retain=bool(message.retain)))

    def _on_publish(self, _client: Client, _: object, number: int, *_more: Any) -> None:
        if done := self._unacked.pop(number, None):
            done()

    def _send(self, client: Client, message: Message, done: Callable[[], None] | None) -> None:
        sent = client.publish(message.topic, message.payload, qos=1, retain=message.retain)
        self._unacked[sent.mid] = done
