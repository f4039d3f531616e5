"""What a rollout makes of a bad release: thousands of emulated devices, simulated days in seconds.

Rules, grants and SQL are the real ones; there are no sockets, time is simulated, and the disk is a
folder in memory. Three releases follow each other: a good one; one that bricks 30 % of the devices
and that 10 % take back; a good one again, for those that are left. All that a device does is ask.
Of the updates to a good one, 1 % break off, are taken back, or keep the device away for days.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import heapq
import logging
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.report import Sheet, say
from ota_fleet import Known, remember, with_stock
from ota_fleet.files import Store
from ota_fleet.history import History
from ota_fleet.registry import Registry
from ota_fleet.rollout import HALTED, Plan, Stage, share_of
from ota_fleet.rollouts import Notify, nobody
from ota_fleet.stock import Stock
from ota_server import (
    STATELESS,
    Config,
    Facts,
    Image,
    Refused,
    Release,
    Report,
    Site,
    Transfer,
    Version,
    decide,
)

PROJECT, SIZE = "lamp", 400_000  # bytes
BEGIN = 1_800_000_000  # UTC seconds
HOUR, DAY = 3_600, 86_400
BATCH = 300  # simulated seconds between two batches of check-ins; a grant writes what waits, too
NEVER = 1e6  # seconds of real time between two batches: simulated time makes them
WARM_UP = 2 * DAY  # then the server knows how often each device asks
AFTER = 12 * HOUR  # that a release which has halted is looked at
POLLS = ((600, 0.003), (HOUR, 0.03), (6 * HOUR, 0.2), (DAY, 0.767))  # seconds, share of the devices
JITTER = 0.1  # of an interval, up and down
AWAY = 0.01  # of the devices vanish each day, for 1 to 3 days
AT_START = 0.8  # of the devices ask when they have restarted, too
HICCUPS = 0.01  # of the updates to a good release do not work at once
FIRST = 20  # devices of the first stage


# -- 1. A server without sockets -------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """UTC seconds; whoever holds it moves it."""

    now: float = BEGIN

    def __call__(self) -> float:
        """The time."""
        return self.now


class Shelf:
    """A catalog of images that have no bytes."""

    def __init__(self, *releases: Release) -> None:
        self._releases: dict[str, list[Release]] = {}
        self._nothing = FileIO(os.devnull)
        self.put(*releases)

    def put(self, *releases: Release) -> None:
        """Adds releases."""
        for each in releases:
            found = [*self._releases.get(each.project, ()), each]
            found.sort(key=lambda release: release.version, reverse=True)
            self._releases[each.project] = found

    def newest(self) -> Mapping[str, Version]:
        """The newest version of each project."""
        return {project: found[0].version for project, found in self._releases.items()}

    def projects(self) -> Sequence[str]:
        """All projects."""
        return sorted(self._releases)

    def releases(self, project: str) -> Sequence[Release]:
        """Newest first. Refused: 404, there is no such project."""
        if project not in self._releases:
            raise Refused(404, "there is no such project")
        return self._releases[project]

    def open(self, release: Release) -> Image:
        """The image, as far as it is here."""
        facts = release.facts
        return Image(self._nothing, release.size, facts.md5, facts.sha256, release.identity)

    def close(self) -> None:
        """No image can be opened any more."""
        self._nothing.close()


def release_of(version: str, kind: str = "sketch", at: float = BEGIN) -> Release:
    """A release, whose digests are those of its name."""
    name = f"{PROJECT}-{version}.{kind}.bin"
    md5 = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    running = frozenset({md5} if kind == "sketch" else ())
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    facts = Facts("esp8266", running=running, md5=md5, sha256=sha256)
    identity = (0, 0, SIZE, int(at) * 10**9, int(at) * 10**9)
    return Release(PROJECT, Version.parse(version), kind, f"/{name}", name, identity, facts)


Carried = Callable[..., None]


class Server(NamedTuple):
    """All that decides and remembers."""

    clock: Clock
    shelf: Shelf
    known: Known
    site: Site

    def carry(self, device: str, release: Release, part: range = range(SIZE)) -> Carried:
        """Tells that an image begins to leave; who calls what this gives back, how it ended."""
        image = self.shelf.open(release)

        def tell(sent: int, *, over: bool = True) -> None:
            moved = Transfer(device, image, part, functools.partial(int, sent), over)
            for each in self.site.carriers:
                each(moved)

        tell(0, over=False)
        return tell


@contextmanager
def serving(
    folder: Path,
    clock: Clock,
    shelf: Shelf,
    notify: Notify = nobody,
    *,
    every: float = NEVER,
    proxied: bool = False,
) -> Iterator[Server]:
    """A server with a memory; batches are written every so many seconds, or by a flush()."""
    with ExitStack() as ends:
        ends.callback(shelf.close)
        registry = Registry(folder / "fleet.db", max_devices=10**6, every=every)
        ends.callback(registry.close)
        store = Store(str(folder / "files"), registry, clock())
        ends.callback(store.close)
        stock = Stock(shelf, registry, store)
        ends.callback(stock.close)
        known = Known.of(registry, notify, clock, proxied=proxied)
        history = History(registry)
        tell = functools.partial(remember, known, history, stock.resolve, now=clock)
        site = Site(Config(dir=str(folder)), shelf, STATELESS, (), (), (tell,), ())
        yield Server(clock, shelf, known, with_stock(site, stock, known))


# -- 2. Devices ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Device:
    """One that asks for as long as it lives."""

    mac: str
    every: int  # seconds between two questions, about
    asks_at_start: bool
    runs: Release

    def report(self) -> Report:
        """What it says when it asks."""
        md5 = self.runs.facts.md5
        report = Report(PROJECT, "192.0.2.1", self.runs.version, self.mac, "esp8266")
        return report._replace(free_space=1 << 20, sketch_md5=md5)


class Nature(NamedTuple):
    """What a release does to devices."""

    version: str
    bricks: float = 0.0  # the share of the devices that it silences for ever
    returns: float = 0.0  # the share that takes it back by itself, whenever it is given

    @property
    def is_good(self) -> bool:
        """Whether it runs everywhere in the end."""
        return not (self.bricks or self.returns)


GOOD, BAD, BETTER = Nature("2.0.0"), Nature("3.0.0", 0.3, 0.1), Nature("4.0.0")


@dataclass(slots=True)
class Trial:
    """What came of a release."""

    nature: Nature
    plan: Plan
    began: float  # UTC seconds, as all times
    reached: set[str] = field(default_factory=set)  # devices that were granted it
    bricked: int = 0
    stages: list[float] = field(default_factory=list)  # when each one opened
    halted: float = 0  # 0: it did not
    most: float = 0  # when 95 % of the devices that live ran it
    all: float = 0
    beyond_stage: int = 0  # grants
    beyond_pace: int = 0
    cpu: float = 0  # seconds
    granted: deque[int] = field(default_factory=deque)  # within the period

    def after(self, at: float) -> float | None:
        """Hours since it began; None: not at all."""
        return (at - self.began) / HOUR if at else None


Event = tuple[float, int, Callable[[], None]]  # when, a number of its own, what happens


class World:
    """A server, its devices, and what happens next."""

    def __init__(self, server: Server, devices: int, seed: int) -> None:
        self.server, self._random = server, random.Random(seed)  # noqa: S311 - no secret
        self._queue: list[Event] = []
        self._number = 0
        first = server.shelf.releases(PROJECT)[-1]
        self.devices = [self._device(number, first) for number in range(devices)]
        self.alive, self.running = devices, Counter({first.version.text: devices})
        self.trial: Trial | None = None
        self.run(WARM_UP, lambda: False)

    def _device(self, number: int, first: Release) -> Device:
        intervals, weights = zip(*POLLS, strict=True)
        every = int(self._random.choices(intervals, weights)[0])
        mac = f"5C:CF:7F:{number >> 16:02X}:{number >> 8 & 255:02X}:{number & 255:02X}"
        device = Device(mac, every, self._random.random() < AT_START, first)
        self._later(self._random.uniform(0, every), self._poll, device)
        return device

    def run(self, seconds: float, is_over: Callable[[], bool]) -> None:
        """Lets time pass, at most so much."""
        clock = self.server.clock
        end = clock.now + seconds
        while self._queue[0][0] < end and not is_over():
            at, _, step = heapq.heappop(self._queue)
            if at // BATCH > clock.now // BATCH:
                clock.now = at // BATCH * BATCH
                self.server.known.grants.sweep()
                self._look()
            clock.now = at
            step()

    def _later(self, seconds: float, step: Callable[[Device], None], device: Device) -> None:
        self._number += 1
        at = self.server.clock.now + seconds
        event: Event = (at, self._number, functools.partial(step, device))
        heapq.heappush(self._queue, event)

    def _poll(self, device: Device) -> None:
        outcome = decide(self.server.site, device.report())
        if isinstance(outcome, Release):
            self._count(device, outcome)
            fetched = functools.partial(
                self._fetched, outcome, self.server.carry(device.mac, outcome)
            )
            self._later(self._random.uniform(20, 90), fetched, device)
        else:
            self._later(self._gap(device), self._poll, device)

    def _gap(self, device: Device) -> float:
        """Until it asks again, in seconds."""
        gap = device.every * self._random.uniform(1 - JITTER, 1 + JITTER)
        is_away = self._random.random() < AWAY * device.every / DAY
        return gap + is_away * self._random.uniform(1, 3) * DAY

    def _fetched(self, release: Release, left: Carried, device: Device) -> None:
        """A download ends, one way or the other."""
        fate = self._fate(release, device)
        left(SIZE // 2 if fate == "breaks" else SIZE)
        if fate == "bricks":
            self.alive -= 1
            self.running[device.runs.version.text] -= 1
            return
        if fate in {"runs", "away"}:
            self.running[device.runs.version.text] -= 1
            self.running[release.version.text] += 1
            device.runs = release
        gap = self._random.uniform(15, 60) if device.asks_at_start else self._gap(device)
        away = self._random.uniform(1, 3) * DAY if fate == "away" else 0
        self._later(away or gap, self._poll, device)

    def _fate(self, release: Release, device: Device) -> str:
        assert self.trial is not None
        nature = self.trial.nature
        if release.version.text != nature.version or nature.is_good:
            is_good = self._random.random() >= HICCUPS
            return "runs" if is_good else self._random.choice(("breaks", "returns", "away"))
        luck = share_of(device.mac, "fate", nature.version) / 100
        if luck < nature.bricks:
            self.trial.bricked += 1
            return "bricks"
        return "returns" if luck < nature.bricks + nature.returns else "runs"

    # -- What is looked at -------------------------------------------------------------------------

    def give(self, nature: Nature, plan: Plan, days: float) -> Trial:
        """Publishes a release, and looks until all have it, or it has halted, or so many days."""
        clock, rollouts = self.server.clock, self.server.known.rollouts
        self.server.shelf.put(release_of(nature.version, at=clock.now))
        began, cpu = clock.now, time.process_time()
        self.trial = trial = Trial(nature, plan, began, stages=[began])
        rollouts.create(PROJECT, Version.parse(nature.version), plan, "bench", int(began))
        self.run(days * DAY, self._is_over)
        trial.cpu = time.process_time() - cpu
        return trial

    def _is_over(self) -> bool:
        trial = self.trial
        assert trial is not None
        return bool(trial.all or (trial.halted and self.server.clock.now > trial.halted + AFTER))

    def _look(self) -> None:
        """Notes what has changed since the last batch."""
        trial, now = self.trial, self.server.clock.now
        if trial is None:
            return
        found = self.server.known.rollouts.current(PROJECT, trial.nature.version)
        assert found is not None
        while len(trial.stages) <= found[0].stage:
            trial.stages.append(now)
        if found[0].state == HALTED:
            trial.halted = trial.halted or now
        if self.running[trial.nature.version] >= 0.95 * self.alive:
            trial.most = trial.most or now
        if self.running[trial.nature.version] == self.alive:
            trial.all = trial.all or now

    def _count(self, device: Device, release: Release) -> None:
        """Holds a grant against the plan, by other means than those that granted it."""
        trial, now = self.trial, int(self.server.clock.now)
        assert trial is not None
        if release.version.text != trial.nature.version:
            return
        plan, granted = trial.plan, trial.granted
        found = self.server.known.rollouts.current(PROJECT, trial.nature.version)
        assert found is not None
        if device.mac not in trial.reached:
            trial.reached.add(device.mac)
            share, taken = share_of(device.mac, PROJECT, trial.nature.version), len(trial.reached)
            lets_in = any(
                share < stage.percent and (not stage.count or taken <= stage.count)
                for stage in plan.stages[: found[0].stage + 1]
            )
            trial.beyond_stage += trial.halted > 0 or not lets_in
        while granted and granted[0] <= now - plan.period:
            granted.popleft()
        granted.append(now)
        trial.beyond_pace += 0 < plan.pace < len(granted)


# -- 3. Figures ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What to simulate."""

    devices: int
    pace: int  # grants an hour; 0: any number
    seed: int
    days: float  # that a release is given at most


def plan_for(case: Case) -> Plan:
    """Twenty devices, then a tenth of them, then all.

    More than 10 % of failures halt it; who is not back after two days is one.
    """
    few = max(1, case.devices // 100)
    stages = (
        Stage(count=FIRST, proven=FIRST - 2, minimum=FIRST),
        Stage(percent=10, proven=few, wait=2 * HOUR, minimum=FIRST),
        Stage(proven=few, wait=30 * DAY, minimum=FIRST),  # until then it can still halt
    )
    return Plan(stages, pace=case.pace, patience=2 * DAY)


@contextmanager
def world_of(case: Case) -> Iterator[World]:
    """Devices that all run 1.0.0, and a server that has known them for two days."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - else on the disk
    with TemporaryDirectory(dir=place) as folder:
        shelf = Shelf(release_of("1.0.0"))
        with serving(Path(folder), Clock(), shelf) as server:
            yield World(server, case.devices, case.seed)


def trials(case: Case) -> list[Trial]:
    """The three releases, one after the other."""
    logging.getLogger("ota").setLevel(logging.ERROR)  # what halts stands in the table
    with world_of(case) as world:
        return [world.give(each, plan_for(case), case.days) for each in (GOOD, BAD, BETTER)]


def _row(case: Case, trial: Trial) -> tuple[str, ...]:
    nature = trial.nature
    what = "good" if nature.is_good else "bad"
    stages = ", ".join(_hours(trial.after(at)) for at in trial.stages)
    return (
        f"{nature.version}, {what}, {f'{case.pace:,} an hour' if case.pace else 'no pace'}",
        f"{len(trial.reached):,}", f"{trial.bricked:,}", stages, _hours(trial.after(trial.halted)),
        _hours(trial.after(trial.most)), _hours(trial.after(trial.all)), f"{trial.cpu:.1f}",
    )  # fmt: skip


def _hours(found: float | None) -> str:
    return "-" if found is None else f"{found:.1f}"


def _judge(sheet: Sheet, found: Sequence[tuple[Case, Trial]]) -> None:
    """The goals, over all that was simulated."""
    bad = [(case, trial) for case, trial in found if not trial.nature.is_good]
    good = [trial for _, trial in found if trial.nature.is_good]
    for pace in sorted({case.pace for case, _ in bad}):
        most = max(len(trial.reached) for case, trial in bad if case.pace == pace)
        what = f"devices that a bad release reaches, {f'pace {pace}' if pace else 'no pace'}"
        sheet.goal(what, most, f"<= {FIRST + pace}", "{:.0f}", f"stage {FIRST} + pace {pace}")
    never = {
        "bad releases that did not halt": (not trial.halted for _, trial in bad),
        "good releases that halted": (trial.halted > 0 for trial in good),
        "good releases that did not reach 95 %": (not trial.most for trial in good),
        "grants beyond the open stages": (trial.beyond_stage for _, trial in found),
        "grants beyond the pace": (trial.beyond_pace for _, trial in found),
    }
    for what, counts in never.items():
        of = good if "good" in what else bad if "bad" in what else found
        sheet.goal(what, sum(counts), "<= 0", "{:.0f}", f"of {len(of)} releases")


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    title = __doc__.splitlines()[0].rstrip(".")
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--days", type=float, default=10, help="that a release is given at most")
    parser.add_argument("--seed", type=int, default=1, help="of the first world")
    parser.add_argument("--worlds", type=int, default=10, help="more, with a twentieth of devices")
    options = parser.parse_args()
    whole, few = options.devices, max(200, options.devices // 20)
    cases = [Case(whole, pace, options.seed, options.days) for pace in (0, whole // 40)]
    for number in range(1, options.worlds + 1):
        pace = few // 40 * (number % 2)
        cases.append(Case(few, pace, options.seed + number, options.days))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(cases, pool.map(trials, cases), strict=True))
    say(f"## {title}")
    say(f"{whole:,} devices; and {options.worlds} times {few:,}, of which only the goals tell")
    sheet = Sheet()
    headings = "release", "reached", "bricked", "stages open after h", "halted"
    rows = [_row(case, trial) for case in cases[:2] for trial in found[case]]
    sheet.table((*headings, "95 %", "all", "CPU s"), rows)
    _judge(sheet, [(case, trial) for case in cases for trial in found[case]])
    return sheet.finish()


if __name__ == "__main__":
    sys.exit(main())
