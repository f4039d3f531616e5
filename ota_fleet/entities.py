"""What Home Assistant was told of each device, so that it is told what is different, and no more.

    any thread -- noticed(device) --> registry's next batch --> _noted --+
    turn(): what was noted, downloads, and all devices when releases change -+-> config, state

All but noticed() belongs to one thread. Of each device two hashes are kept, some 300 bytes. A turn
looks at few devices, so that nobody waits for it, and the loop gets its share of the time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from ota_fleet.broker import Broker
from ota_fleet.homeassistant import (
    Progress,
    config_of,
    config_topic,
    node_of,
    state_of,
    state_topic,
)
from ota_fleet.registry import EVERYTHING, Device, Registry, normal_id
from ota_fleet.summons import Busy
from ota_server import Release, Version, shown

SLICE = 25  # devices of one turn, some 10 ms
SETTLE = 0.5  # seconds until what was noted can be read: it is on its way to the disk
PROGRESS = 1.0  # seconds between two looks at downloads
QUIET = 1.0  # seconds without another message: the broker has said all that it retains
CHECK = 5.0  # seconds between two looks whether releases changed
REST = 3  # times as long as a walk over all devices took, until the next one
WALK = 600.0  # seconds until the next one, whatever changed: nobody tells of notes in a file
MAX_NOTED = 20_000  # devices; the next walk finds who was lost

Retain = Callable[[str, bytes], None]  # a message that the broker keeps
log = logging.getLogger("ota.mqtt")


@dataclass(frozen=True, slots=True)
class Seams:
    """What the rest of the fleet does for MQTT."""

    hear: Callable[[str, str, int], None]  # device, version that it runs, when; never waits
    resolve: Callable[[str], str]  # a project's own name for its alias
    latest: Callable[[Device], Release | None]  # what it gets, if nobody had to wait
    approve: Callable[[str, str, str], object]  # device, project, version: somebody wants that
    live: Callable[[], Mapping[str, Progress]]  # downloads under way, by device
    newest: Callable[[], Mapping[str, Version]]  # differs when releases came or went


class Told(NamedTuple):
    """What was said of a device: hashes, 0 for nothing."""

    device: str = ""  # "": an earlier process knew it
    config: int = 0
    state: int = 0


class Entities:
    """The entities of all devices; `call` tells a device to ask for its image."""

    def __init__(
        self, broker: Broker, registry: Registry, seams: Seams, call: Callable[[str], object]
    ) -> None:
        """Nothing is said before begin()."""
        self._broker = broker
        self._registry = registry
        self._seams = seams
        self._call = call
        self._say: Retain = lambda _topic, _payload: None
        self._server = ""
        self._told: dict[str, Told] = {}  # by node
        self._wanted: dict[str, None] = {}  # nodes whose button was pressed, in order
        self._noted: deque[tuple[float, str]] = deque(maxlen=MAX_NOTED)
        self._due: dict[str, None] = {}  # devices to look at, in order
        self._live: Mapping[str, Progress] = {}
        self._changes = 0  # of the registry
        self._walk: Iterator[object] | None = None
        self._walked: object = None  # what was the case at the last whole one since begin()
        self._clock = 0.0  # of this turn; monotonic seconds, as all times here
        self._looked = 0.0  # at downloads
        self._rest = 0.0  # until when there is no walk
        self._stale = 0.0  # from when on there is one anyway
        self.noticed = registry.in_batches(self._note)  # takes a device of which something is new
        registry.watch(self._change)

    def _note(self, _connection: object, devices: Sequence[str]) -> None:
        """Part of a batch's transaction, behind its check-ins."""
        self._noted.extend((time.monotonic(), normal_id(device)) for device in devices)

    def _change(self) -> None:
        self._changes += 1

    def begin(self, say: Retain, server: str, now: float) -> None:
        """A new connection: all is said again, but what the broker turns out to know.

        `server` is the URL that this server has, without a slash at its end.
        """
        self._say, self._server = say, server
        self._told = {node: Told(told.device) for node, told in self._told.items()}
        self._noted.clear()  # all are looked at
        self._walk = self._walked = None
        self._rest = now + QUIET

    def hear(self, node: str, config: bytes, now: float) -> None:
        """The broker has this; nobody says so but at the beginning, and of what was just said."""
        own = state_topic(self._broker, node).encode() in config  # not another server's
        if own and self._walk is None and self._walked is None:
            self._told[node] = self._told.get(node, Told())._replace(config=hash(config))
            self._rest = now + QUIET

    def install(self, node: str) -> None:
        """Somebody pressed Install."""
        self._wanted[node] = None

    def turn(self, now: float) -> bool:
        """Says some of what is new; True: there is more. Busy: later."""
        self._clock = now
        if self._walked is not None:  # else it is not known yet who a node is
            self._take_wishes()
        self._collect(now)
        if self._due:
            for device in [*islice(self._due, SLICE)]:
                self._look(device)
                del self._due[device]
        elif self._walk or self._is_time(now):
            self._step(now)
        return bool(self._due or self._walk)

    def _take_wishes(self) -> None:
        while self._wanted:
            node = next(iter(self._wanted))
            del self._wanted[node]
            try:
                self._fulfil(node)
            except Busy:
                self._wanted[node] = None
                raise

    def _fulfil(self, node: str) -> None:
        """Approves what the device could have, and tells it."""
        told = self._told.get(node, Told())
        device = self._registry.device(told.device)
        release = self._seams.latest(device) if device else None
        if device is None or release is None:
            why = "there is none" if device else "no device is known by that name"
            log.info("Home Assistant wants an update of %s: %s", shown(node), why)
            return
        self._seams.approve(device.id, release.project, str(release.version))
        self._call(device.id)
        self._due[device.id] = None

    def _collect(self, now: float) -> None:
        """Finds out which devices to look at."""
        while self._noted and now - self._noted[0][0] >= SETTLE:
            self._due[self._noted.popleft()[1]] = None
        if now - self._looked >= PROGRESS:
            live = {normal_id(device): each for device, each in self._seams.live().items()}
            self._due.update(dict.fromkeys((*live, *self._live)))
            self._live, self._looked = live, now

    def _look(self, name: str) -> None:
        """Says what is new of a device, or that there is none any more."""
        if device := self._registry.device(name):
            self._tell(device)
        else:
            self._forget(node_of(self._broker, name))

    def _tell(self, device: Device) -> str:
        """Says what is new of a device; gives back its node."""
        node, progress = node_of(self._broker, device.id), self._live.get(device.id)
        config = config_of(self._broker, device, self._server)
        state = state_of(device, self._seams.latest(device), progress, self._server)
        before, after = self._told.get(node, Told()), Told(device.id, hash(config), hash(state))
        if before.config != after.config:
            self._say(config_topic(self._broker, node), config)
        if before.state != after.state:
            self._say(state_topic(self._broker, node), state)
        self._told[node] = after
        return node

    def _forget(self, node: str) -> None:
        """Takes an entity away."""
        if self._told.pop(node, None):
            self._say(config_topic(self._broker, node), b"")
            self._say(state_topic(self._broker, node), b"")

    def _is_time(self, now: float) -> bool:
        """Whether to begin with a walk over all devices."""
        if now < self._rest:
            return False
        self._rest = now + CHECK
        return now >= self._stale or self._walked != self._case()

    def _case(self) -> object:
        """What is different when a device may get something else than before."""
        return self._changes, {**self._seams.newest()}

    def _step(self, now: float) -> None:
        """The next devices of a walk; one that an error ended begins again."""
        walk, self._walk = self._walk or self._walking(now), None
        if next(walk, None):
            self._walk = walk

    def _walking(self, began: float) -> Iterator[object]:
        """Looks at all devices, a slice at a time; then who is not there any more goes."""
        case, here = self._case(), set[str]()
        place: tuple[str | int, ...] = ()
        while page := self._registry.devices(EVERYTHING, place, SLICE):
            here.update(map(self._tell, page))
            place = EVERYTHING.place(page[-1])
            yield page
        for node in self._told.keys() - here:
            device = self._told[node].device
            if not (device and self._registry.device(device)):  # else it came meanwhile
                self._forget(node)
        took = self._clock - began
        self._walked = case
        self._rest, self._stale = self._clock + max(CHECK, REST * took), self._clock + WALK
