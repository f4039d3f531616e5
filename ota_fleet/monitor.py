"""How the server is, for programs: /metrics for Prometheus, /readyz for who sends it requests.

    loop, threads -- note(event) --+
    loop -- carry(transfer) -------+-> counters of this process --+
    loop -- pulse(seconds) --------+                              +-> families --> /metrics
    Sources, now and then -------------> what SQL holds ----------+
    catalog, registry, hooks: can they be used? from memory ------+-> /readyz

The text is the exposition format 0.0.4. Nothing in it grows with the devices: of projects and their
versions the most used have a series, the rest of them together one called "other".
"""

from __future__ import annotations

import platform
import re
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from ota_fleet.accounts import Accounts, same
from ota_fleet.files import room
from ota_fleet.history import History
from ota_fleet.hooks import Hooks
from ota_fleet.registry import Registry, Search
from ota_fleet.rollout import STATES
from ota_server import (
    UNCACHED,
    Event,
    Refused,
    Release,
    Reply,
    Request,
    Route,
    Site,
    Transfer,
    __version__,
    body_reply,
    given_token,
    text_reply,
)

PATHS = re.compile("/metrics")  # of which the guards of the core leave the credentials to this room
KIND = "text/plain; version=0.0.4; charset=utf-8"
MAX_PROJECTS = 100  # that have series of their own
MAX_VERSIONS = 20  # of a project
OTHER = "other"
KEPT = 5.0  # seconds for which what SQL says is not asked again
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]  # what is behind the name of the family, labels, value


class Family(NamedTuple):
    """Samples that mean the same."""

    name: str
    kind: str  # counter, gauge, histogram
    help: str
    samples: Iterable[Sample]

    def lines(self) -> Iterator[str]:
        """As the exposition format writes them."""
        text = self.help.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {self.name} {text}\n# TYPE {self.name} {self.kind}\n"
        for end, labels, value in self.samples:
            pairs = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
            yield f"{self.name}{end}{f'{{{pairs}}}' if pairs else ''} {value}\n"


def escaped(text: str) -> str:
    """A label's value between its quotes."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def counter(name: str, about: str, value: float) -> Family:
    """A family of one number that only rises while the process lives."""
    return Family(name, "counter", about, [("", {}, value)])


def gauge(name: str, about: str, values: Mapping[str, float] | float, label: str = "") -> Family:
    """A family of one number, or of one for each value of a label."""
    by_label = values if isinstance(values, Mapping) else {"": values}
    samples = [("", {label: key} if label else {}, value) for key, value in by_label.items()]
    return Family(name, "gauge", about, samples)


# -- 1. What SQL says ------------------------------------------------------------------------------


class Sources(NamedTuple):
    """Who is asked what SQL says; that may wait for the disk."""

    registry: Registry
    history: History
    hooks: Hooks
    attempts: Callable[[], Mapping[str, int]]  # by outcome; "": not known yet
    rollouts: Callable[[], Mapping[str, int]]  # by state

    def families(self, now: int) -> Iterator[Family]:
        """All of it, at a time in UTC seconds."""
        counts = self.history.counts(now)
        devices = folded({(each.project, each.version): each.devices for each in counts})
        samples = [
            ("", {"project": project, "version": version}, number)
            for (project, version), number in devices.items()
        ]
        yield Family("ota_devices", "gauge", "Devices, by what they say that they run.", samples)
        projects = {project for project, _ in devices}
        failing, looping, silent = (Counter(dict.fromkeys(projects, 0)) for _ in range(3))
        for each in counts:
            project = each.project if each.project in projects else OTHER
            failing[project] += each.failing
            silent[project] += each.month - each.day
        for name, number in self.history.looping().items():
            looping[name if name in projects else OTHER] += number
        text = "Devices that got one version three times or more, last time they asked."
        yield gauge("ota_devices_failing", text, failing, "project")
        text = "Devices that are not given what they got in vain, until somebody says so."
        yield gauge("ota_devices_looping", text, looping, "project")
        text = "Devices not seen for a day, but in the last 31."
        yield gauge("ota_devices_silent", text, silent, "project")
        text = "Devices that nobody admitted to their project."
        unknown = self.registry.count(Search(state="unknown"))
        yield gauge("ota_devices_unknown", text, unknown)
        attempts = {outcome or "open": number for outcome, number in self.attempts().items()}
        yield gauge("ota_attempts", "Attempts that are kept, by outcome.", attempts, "outcome")
        rollouts = dict.fromkeys(STATES, 0) | dict(self.rollouts())
        yield gauge("ota_rollouts", "Rollouts, by state.", rollouts, "state")
        text = "Deliveries that wait for a webhook."
        yield gauge("ota_deliveries_waiting", text, self.hooks.waiting())


def folded(devices: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Numbers by project and version, with those that are too many together as "other"."""
    totals: Counter[str] = Counter()
    for (project, _), number in devices.items():
        totals[project] += number
    kept = {project for project, _ in totals.most_common(MAX_PROJECTS)}
    versions: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    for (project, version), number in sorted(devices.items(), key=lambda each: -each[1]):
        if project not in kept:
            found[OTHER, OTHER] += number
            continue
        versions[project] += 1
        found[project, version if versions[project] <= MAX_VERSIONS else OTHER] += number
    return dict(sorted(found.items()))


# -- 2. What this process did ----------------------------------------------------------------------


class Counters:
    """Numbers since the start. What is told here costs its caller about a microsecond."""

    def __init__(self, resolve: Callable[[str], str]) -> None:
        """`resolve` gives the name of a project for its alias."""
        self._resolve = resolve
        self._lock = threading.Lock()  # of decisions: threads make some, the loop the others
        self._decisions: dict[tuple[str, str], int] = {}
        self._projects: set[str] = set()
        self._begun = self._completed = self._broken = self._bytes = 0
        self._pulses = [0] * (len(BOUNDS) + 1)
        self._busy = 0.0  # seconds

    def note(self, event: Event) -> None:
        """The listener."""
        outcome = event.outcome
        code = "update" if isinstance(outcome, Release) else outcome.code
        key = self._resolve(event.report.project), code
        with self._lock:
            if key not in self._decisions:
                key = self._fitted(key)
            self._decisions[key] += 1

    def _fitted(self, key: tuple[str, str]) -> tuple[str, str]:
        """Where a decision counts. A counter must not fall: who was "other" first stays so."""
        if len(self._projects) < MAX_PROJECTS:
            self._projects.add(key[0])
        if key[0] not in self._projects:
            key = OTHER, key[1]
        self._decisions.setdefault(key, 0)
        return key

    def carry(self, transfer: Transfer) -> None:
        """The carrier."""
        if not transfer.over:
            self._begun += 1
            return
        sent = transfer.sent()
        self._bytes += sent
        if sent == len(transfer.part):
            self._completed += 1
        else:
            self._broken += 1

    def pulse(self, seconds: float) -> None:
        """A turn of the loop."""
        self._pulses[bisect_left(BOUNDS, seconds)] += 1
        self._busy += seconds

    def families(self) -> Iterator[Family]:
        """All of it."""
        with self._lock:
            decisions = dict(self._decisions)
        text = "Checks of devices, by what was decided; update: it gets an image."
        samples = [
            ("", {"project": project, "code": code}, number)
            for (project, code), number in sorted(decisions.items())
        ]
        yield Family("ota_decisions_total", "counter", text, samples)
        completed, broken = self._completed, self._broken
        begun = max(self._begun, completed + broken)
        yield counter("ota_downloads_begun_total", "Images that began to leave.", begun)
        yield counter("ota_downloads_completed_total", "Images that left whole.", completed)
        text = "Images that did not leave whole."
        yield counter("ota_downloads_broken_off_total", text, broken)
        yield counter("ota_sent_bytes_total", "Bytes of images that left.", self._bytes)
        text = "Images on their way."
        yield gauge("ota_downloads_under_way", text, begun - completed - broken)
        yield self._latency()

    def _latency(self) -> Family:
        """For how long others had to wait while the loop was busy."""
        sums = [*accumulate(self._pulses)]
        samples: list[Sample] = [
            ("_bucket", {"le": str(bound)}, number)
            for bound, number in zip((*BOUNDS, "+Inf"), sums, strict=True)
        ]
        samples += [("_sum", {}, self._busy), ("_count", {}, sums[-1])]
        text = "How long each turn of the loop took, in which all who wait have theirs."
        return Family("ota_loop_busy_seconds", "histogram", text, samples)


# -- 3. What is asked ------------------------------------------------------------------------------


class Monitor:
    """The endpoints, and what hears of all that is counted."""

    def __init__(
        self,
        accounts: Accounts,
        resolve: Callable[[str], str],
        sources: Sources,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`resolve` gives the name of a project for its alias."""
        self._accounts, self._sources, self._now = accounts, sources, now
        self._started = now()
        self._counters = Counters(resolve)
        self.note, self.carry = self._counters.note, self._counters.carry
        self.pulse = self._counters.pulse
        self._turn = threading.Lock()  # of who asks the sources
        self._read_at = -KEPT  # monotonic seconds
        self._kept = ""

    def routes(self) -> tuple[Route, ...]:
        """Those of the two."""
        return (
            Route(PATHS, self.metrics, blocking=True),
            Route(re.compile("/readyz"), self.readyz, guarded=False),
        )

    # -- /readyz

    def readyz(self, site: Site, _request: Request) -> Reply:
        """Whether requests are in good hands here; a sentence for each thing that is wrong."""
        wrong = [*self._wrong(site)]
        return text_reply(503 if wrong else 200, "\n".join(wrong) or "ok", UNCACHED)

    def _wrong(self, site: Site) -> Iterator[str]:
        """Sentences, from memory only: a disk that hangs must not hold this up."""
        try:
            site.catalog.projects()
        except Refused as refused:
            yield refused.reason
        if not self._sources.registry.is_writing():
            yield "check-ins cannot be written just now: the log says why, or the disk hangs"
        if not self._sources.hooks.is_reading():
            yield "the registry cannot be read just now: the log says why, or the disk hangs"

    # -- /metrics

    def metrics(self, site: Site, request: Request) -> Reply:
        """All families. Refused: 401, 403, as for the API; --token opens this, too."""
        token, given = site.config.token, given_token(request._replace(query=""))
        if not (token and same(given, token)):
            self._accounts.require(request, "viewer")
        ready = not any(self._wrong(site))
        families = *self._own(ready=ready), *self._counters.families()
        text = "".join(line for family in families for line in family.lines()) + self._stored()
        return body_reply(200, KIND, text.encode("utf-8", "replace"), UNCACHED)

    def _own(self, *, ready: bool) -> Iterator[Family]:
        """What is known of this process."""
        labels = {"version": __version__, "python": platform.python_version()}
        yield Family("ota_build_info", "gauge", "Always 1.", [("", labels, 1)])
        text = "When the process started, in UTC seconds."
        yield gauge("process_start_time_seconds", text, self._started)
        yield gauge("ota_ready", "Whether /readyz says ok.", int(ready))
        text = "Check-ins that are not written yet."
        yield gauge("ota_checkins_waiting", text, self._sources.registry.waiting())

    def _stored(self) -> str:
        """What SQL holds, as it was some seconds ago, or longer while the disk hangs."""
        age = time.monotonic() - self._read_at
        if age >= KEPT and self._turn.acquire(timeout=0 if self._kept else KEPT):
            try:
                with room():
                    families = [*self._sources.families(int(self._now()))]
                self._kept = "".join(line for family in families for line in family.lines())
                self._read_at = time.monotonic()
            finally:
                self._turn.release()
        return self._kept
