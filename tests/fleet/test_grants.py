"""Grants by hand: what is promised, what becomes of it, and that nothing is promised in vain.

Rules, registry and grants are the real ones; the time is what a test says it is.
"""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bench.simulation import (
    BEGIN,
    DAY,
    HOUR,
    PROJECT,
    SIZE,
    Clock,
    Server,
    Shelf,
    release_of,
    serving,
)
from ota_fleet import Known
from ota_fleet.assignments import Approval
from ota_fleet.attempts import (
    BROKEN,
    LEAST_PATIENCE,
    MOST_PATIENCE,
    OPEN,
    PROVEN,
    RETURNED,
    SILENT,
    USUAL_PATIENCE,
)
from ota_fleet.grants import KEPT, START
from ota_fleet.policy import Policy
from ota_fleet.registry import EVERYTHING
from ota_fleet.rollout import ABORTED, HALTED, RUNNING, Counts, Plan, Stage, plan_text
from ota_fleet.rollouts import results_of
from ota_server import Event, Objection, Refused, Release, Report, Version, decide
from tests.conftest import wait_until
from tests.test_house import ROOT

MAC = "5C:CF:7F:12:34:56"
OLD, NEW, NEXT = map(release_of, ("1.0.0", "2.0.0", "3.0.0"))
STRANGE = "0123456789abcdef" * 2  # an MD5 that nobody knows
# A mistake of ours: it cannot be written.
WRONG = replace(NEW, facts=replace(NEW.facts, running=frozenset({b"no text"})))  # type: ignore[arg-type]


def mac(number: int) -> str:
    """One of many devices."""
    return f"5C:CF:7F:00:{number >> 8:02X}:{number & 255:02X}"


def said(
    runs: str = "1.0.0", md5: str = "", device: str = MAC, sha256: str = "", **more: Any
) -> Report:
    """What a device says when it asks; "": it does not say."""
    version = Version.parse(runs) if runs else None
    report = Report(PROJECT, "192.0.2.7", version, device, "esp8266", **more)
    return report._replace(sketch_md5=md5 or None, sketch_sha256=sha256 or None)


@dataclass
class Desk:
    """A server, who asks it, and what it has told."""

    server: Server
    events: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)

    @property
    def known(self) -> Known:
        """What it remembers."""
        return self.server.known

    def ask(self, runs: str = "1.0.0", md5: str = "", device: str = MAC, **more: Any) -> str:
        """The version that a device is given a while later, or why not."""
        self.wait()
        outcome = decide(self.server.site, said(runs, md5, device, **more))
        return outcome.version.text if isinstance(outcome, Release) else outcome.code

    def send(self, release: Release = NEW, sent: int = SIZE, device: str = MAC) -> None:
        """So many bytes of an image leave."""
        left = self.server.carry(device, release)
        self.wait()
        left(sent)

    def part(self, start: int, stop: int, release: Release = NEW, device: str = MAC) -> None:
        """The bytes of a range leave."""
        self.server.carry(device, release, range(start, stop))(stop - start)

    def wait(self, seconds: float = 60) -> None:
        """Time passes, and what was queued is written."""
        self.server.clock.now += seconds
        self.known.registry.flush()

    def fall_silent(self, seconds: float) -> None:
        """Time passes, in which nobody asks and the server looks now and then."""
        end = self.server.clock.now + seconds
        while self.server.clock.now < end:
            self.server.clock.now = min(end, self.server.clock.now + HOUR / 2)
            self.known.grants.sweep()

    def outcomes(self, device: str = MAC) -> list[str]:
        """What became of the device's attempts, the first one first."""
        self.known.registry.flush()
        return [each.outcome for each in self.known.grants.attempts(device)][::-1]

    def begin(self, plan: Plan, version: str = "2.0.0") -> int:
        """Begins a rollout; gives back its id."""
        now = int(self.server.clock())
        return self.known.rollouts.create(PROJECT, Version.parse(version), plan, "me", now).id

    def results(self, version: str = "2.0.0") -> Mapping[int, Counts]:
        """What the devices of a rollout have come to, by stage, as the loop knows it."""
        found = self.known.rollouts.current(PROJECT, version)
        assert found is not None
        return found[1]

    def state(self, version: str = "2.0.0") -> str:
        """The state of a rollout, as the loop knows it."""
        found = self.known.rollouts.current(PROJECT, version)
        assert found is not None
        return found[0].state


@contextmanager
def standing(folder: Path, *releases: Release, **options: Any) -> Iterator[Desk]:
    """A server with these releases; closed at the end."""
    events: list[tuple[str, Mapping[str, object]]] = []

    def notify(_connection: sqlite3.Connection, event: str, data: Mapping[str, object]) -> None:
        events.append((event, data))

    folder.mkdir(exist_ok=True)
    with serving(
        folder, options.pop("clock", Clock()), Shelf(*releases), notify, **options
    ) as server:
        yield Desk(server, events)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A server with 1.0.0 and 2.0.0."""
    with standing(tmp_path / "state", OLD, NEW) as found:
        yield found


# -- 1. What becomes of an attempt -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "back", "outcome"),
    [
        pytest.param(SIZE, ("2.0.0", NEW.facts.md5), PROVEN, id="by-digest"),
        pytest.param(SIZE, ("1.0.0", NEW.facts.md5), PROVEN, id="by-digest-of-an-old-version"),
        pytest.param(SIZE, ("2.0.0", ""), PROVEN, id="by-version"),
        pytest.param(SIZE, ("2.0.0", STRANGE), PROVEN, id="by-version-with-a-new-digest"),
        pytest.param(0, ("2.0.0", NEW.facts.md5), PROVEN, id="by-digest-though-nothing-is-noted"),
        pytest.param(SIZE, ("1.0.0", OLD.facts.md5), RETURNED, id="old"),
        pytest.param(SIZE, ("1.0.0", ""), RETURNED, id="old-by-version"),
        pytest.param(SIZE, ("2.0.0", OLD.facts.md5), RETURNED, id="old-says-it-is-new"),
        pytest.param(SIZE - 1, ("1.0.0", OLD.facts.md5), BROKEN, id="broken"),
        pytest.param(0, ("1.0.0", ""), BROKEN, id="nothing-left"),
    ],
)
def test_next_check_tells_what_became_of_it(
    sent: int, back: tuple[str, str], outcome: str, desk: Desk
) -> None:
    assert desk.ask(md5=OLD.facts.md5) == "2.0.0"
    desk.send(sent=sent)
    assert desk.outcomes() == [OPEN]
    desk.known.rollouts.control(1, "pause", "", int(desk.server.clock()))  # nobody gets it again
    desk.ask(*back)
    assert desk.outcomes() == [outcome]


def test_device_that_does_not_come_back_is_silent_and_somebody_hears_of_it(desk: Desk) -> None:
    assert desk.ask() == "2.0.0"
    granted = int(desk.server.clock())
    desk.send()
    desk.fall_silent(USUAL_PATIENCE - 1)
    assert desk.outcomes() == [OPEN]
    desk.fall_silent(1)
    assert desk.outcomes() == [SILENT]
    data = {"device": MAC, "project": PROJECT, "version": "2.0.0", "since": granted}
    assert desk.events == [("device.silent", data)]
    desk.fall_silent(DAY)
    assert len(desk.events) == 1


@pytest.mark.parametrize(("runs", "outcome"), [("2.0.0", PROVEN), ("1.0.0", RETURNED)])
def test_device_that_was_silent_may_come_back(runs: str, outcome: str, desk: Desk) -> None:
    desk.ask()
    desk.send()
    desk.fall_silent(2 * DAY)
    assert (desk.outcomes(), desk.results()) == ([SILENT], {0: Counts(silent=1)})
    desk.ask(runs)
    assert desk.outcomes()[0] == outcome
    assert desk.results()[0] == Counts(**{outcome: 1})


def test_device_that_had_proven_it_and_takes_it_back_has_returned(desk: Desk) -> None:
    desk.ask(md5=OLD.facts.md5)
    desk.send()
    assert desk.ask("2.0.0", NEW.facts.md5) == "not-newer"
    desk.wait()
    assert desk.results() == {0: Counts(proven=1)}
    desk.wait(20 * DAY)
    assert desk.ask("1.0.0", OLD.facts.md5) == "2.0.0"
    assert desk.outcomes() == [RETURNED, OPEN]
    assert desk.results() == {0: Counts(returned=1)}


def test_device_that_broke_off_tries_again(desk: Desk) -> None:
    desk.ask()
    desk.send(sent=SIZE // 2)
    assert desk.ask() == "2.0.0"
    desk.send()
    assert desk.ask("2.0.0") == "not-newer"
    assert desk.outcomes() == [BROKEN, PROVEN]
    assert desk.results() == {0: Counts(proven=1)}


def test_download_in_pieces_is_one_attempt(desk: Desk) -> None:
    desk.ask()
    third = SIZE // 3
    desk.part(0, third)
    for start, stop in ((third, 2 * third), (2 * third, SIZE)):
        assert desk.ask(asks="rest") == "2.0.0"
        desk.part(start, stop)
    assert desk.ask() == "2.0.0"
    assert desk.outcomes() == [RETURNED, OPEN]


def test_pieces_with_a_gap_are_no_full_download(desk: Desk) -> None:
    desk.ask()
    desk.part(0, 100)
    assert desk.ask(asks="rest") == "2.0.0"
    desk.part(200, SIZE)
    desk.ask()
    assert desk.outcomes() == [BROKEN, OPEN]


def test_download_that_was_given_up_goes_on_as_the_same_attempt(desk: Desk) -> None:
    desk.ask()
    desk.part(0, 100)
    desk.ask("1.0.0", asks="answer")  # it is back, and says so
    assert (desk.outcomes(), desk.results()) == ([BROKEN], {0: Counts(broken=1)})
    assert desk.ask(asks="rest") == "2.0.0"
    assert (desk.outcomes(), desk.results()) == ([OPEN], {0: Counts(open=1)})
    desk.part(100, SIZE)
    desk.ask("2.0.0")
    assert desk.outcomes() == [PROVEN]


def test_device_that_asks_twice_before_a_byte_has_left_has_one_attempt(desk: Desk) -> None:
    assert [desk.ask(), desk.ask()] == ["2.0.0", "2.0.0"]
    assert desk.outcomes() == [OPEN]
    desk.server.carry(MAC, NEW)  # it lost the connection, which nobody has noticed
    assert desk.ask() == "2.0.0"
    assert desk.outcomes() == [OPEN]


def test_what_left_is_noted_late_but_counts(desk: Desk) -> None:
    desk.ask()
    left = desk.server.carry(MAC, NEW)
    desk.wait(2 * HOUR)  # another server sent it, and does not say so
    desk.ask(asks="answer")
    assert desk.outcomes() == [BROKEN]
    left(SIZE)
    assert desk.outcomes() == [RETURNED]
    assert desk.results() == {0: Counts(returned=1)}


def test_check_of_a_device_that_downloads_tells_nothing(desk: Desk) -> None:
    desk.ask()
    desk.server.carry(MAC, NEW)
    desk.ask(asks="answer")
    assert desk.outcomes() == [OPEN]


def test_device_that_says_the_same_again_and_again_is_heard_once(desk: Desk) -> None:
    heard = desk.known.registry._pending[1].queue
    desk.ask(asks="answer")
    desk.wait()
    for runs, waiting in (("1.0.0", 0), ("1.0.0", 0), ("1.5.0", 1)):
        desk.server.clock.now += 60
        decide(desk.server.site, said(runs, asks="answer"))
        assert len(heard) == waiting


def test_check_that_was_made_before_the_grant_tells_nothing_of_it(desk: Desk) -> None:
    """Another server may write what it heard a second later."""
    desk.ask()
    desk.send()
    before = Event(said(), Objection("paused", "the rollout is paused"))
    desk.known.grants.hear(before, int(desk.server.clock()) - 120)
    assert desk.outcomes() == [OPEN]


def test_device_that_says_after_the_update_what_it_said_before_has_returned(desk: Desk) -> None:
    for _ in range(2):
        desk.ask(asks="answer")
    desk.ask()
    desk.send()
    desk.ask(asks="answer")
    assert desk.outcomes() == [RETURNED]


def test_version_that_comes_by_another_way_proves_it(desk: Desk) -> None:
    desk.ask()
    desk.send()
    desk.known.grants.hear_version(MAC.lower(), "2.0.0", int(desk.server.clock()))
    assert desk.outcomes() == [PROVEN]


def test_version_that_is_none_takes_no_check_in_with_it(desk: Desk) -> None:
    """The FUOTA server's devices say any text."""
    desk.ask()
    desk.send()
    desk.ask("2.0.0")
    desk.wait()
    desk.known.grants.hear_version(MAC, "the newest", int(desk.server.clock()))
    desk.ask("2.0.0", device=mac(1))
    desk.wait()
    assert desk.known.registry.device(mac(1)) is not None


def test_device_that_only_asks_whether_there_is_an_update_says_what_it_runs(tmp_path: Path) -> None:
    with standing(tmp_path / "state", OLD, NEW) as desk:
        desk.ask()
        desk.send()
        desk.server.shelf.put(NEXT)
        assert desk.ask("2.0.0", asks="answer") == "3.0.0"
        assert desk.outcomes() == [PROVEN]


def test_who_cannot_prove_anything_leaves_no_row(desk: Desk) -> None:
    assert desk.ask("", device=MAC) == "2.0.0"
    assert decide(desk.server.site, said()._replace(device=None)) == NEW
    assert desk.ask(asks="answer") == "2.0.0"
    assert desk.known.grants.attempts() == []


def test_doctor_takes_no_place_and_leaves_no_row(desk: Desk) -> None:
    desk.begin(Plan((Stage(count=1),)))
    for runs in ("1.0.0", "2.0.0", "1.0.0"):
        desk.ask(runs, device="00:00:5E:00:53:01")
    assert desk.known.grants.attempts() == []
    assert desk.known.registry.count(EVERYTHING) == 0
    assert (desk.state(), desk.results()) == (RUNNING, {})
    assert desk.ask() == "2.0.0"


def test_mac_may_be_written_in_any_way(desk: Desk) -> None:
    desk.ask(device=MAC.lower())
    desk.send(device=MAC.replace(":", "-"))
    desk.ask("2.0.0", device=MAC.replace(":", ""))
    assert desk.outcomes(MAC) == desk.outcomes(MAC.lower()) == [PROVEN]
    assert desk.results() == {0: Counts(proven=1)}


def test_download_under_way_is_seen_from_outside(desk: Desk) -> None:
    desk.ask()
    begun = desk.server.carry(MAC, NEW)
    assert desk.known.grants.live() == {MAC: (0, SIZE)}
    anew = desk.server.carry(MAC, NEW, range(100, SIZE))
    begun(50)  # its first connection ends, which nobody had noticed
    assert desk.known.grants.live() == {MAC: (100, SIZE)}
    anew(SIZE - 100)
    assert desk.known.grants.live() == {}
    desk.server.carry("- 192.0.2.1", NEW)
    assert desk.known.grants.live() == {}


# -- 2. Loops --------------------------------------------------------------------------------------


def fail(desk: Desk, times: int, device: str = MAC) -> None:
    """A device gets the whole image so often, and does not run it."""
    for _ in range(times):
        assert desk.ask(md5=OLD.facts.md5, device=device) == "2.0.0"
        desk.send(device=device)


def test_device_that_was_given_an_image_in_full_three_times_does_not_get_it_again(
    desk: Desk, lines: Callable[[str], list[str]]
) -> None:
    fail(desk, 3)
    assert [desk.ask(md5=OLD.facts.md5) for _ in range(3)] == ["loop"] * 3
    assert desk.outcomes() == [RETURNED] * 3
    (loop,) = desk.known.grants.loops()
    assert (loop.device, loop.project, loop.version) == (MAC, PROJECT, "2.0.0")
    named = {"device": MAC, "project": PROJECT, "version": "2.0.0"}
    assert desk.events == [("device.looping", named)]
    (warning,) = lines("in vain")  # once, not at each check
    assert warning.startswith(f"WARNING {MAC} {PROJECT} 2.0.0 was given in vain, 3 times")
    other = mac(1)
    assert desk.ask(device=other) == "2.0.0"
    desk.server.shelf.put(NEXT)
    assert desk.ask(md5=OLD.facts.md5) == "3.0.0"


def test_device_that_loops_is_given_it_again_when_somebody_says_so(desk: Desk) -> None:
    fail(desk, 3)
    assert desk.ask() == "loop"
    assert desk.known.grants.forgive(MAC.lower())
    assert desk.known.grants.loops() == []
    fail(desk, 3)
    assert desk.ask() == "loop"
    assert [event for event, _ in desk.events] == ["device.looping"] * 2
    assert not desk.known.grants.forgive(mac(9))


def test_broken_downloads_are_no_loop(desk: Desk) -> None:
    for _ in range(5):
        assert desk.ask() == "2.0.0"
        desk.send(sent=SIZE - 1)
    assert desk.ask() == "2.0.0"


def test_downloads_that_a_proxy_sends_count_as_sent(tmp_path: Path) -> None:
    with standing(tmp_path / "state", OLD, NEW, proxied=True) as desk:
        assert [desk.ask() for _ in range(4)] == ["2.0.0"] * 3 + ["loop"]
        assert desk.outcomes() == [RETURNED] * 3


def test_loop_that_another_server_found_is_known_here(tmp_path: Path) -> None:
    with pair(tmp_path / "state") as (here, there):
        fail(here, 3)
        assert here.ask() == "loop"
        there.known.registry.refresh()
        assert there.known.grants.is_looping(MAC, NEW.facts.sha256)
        here.known.grants.forgive(MAC)
        there.known.registry.refresh()
        assert there.ask() == "2.0.0"


@contextmanager
def pair(folder: Path, *more: Release, **options: Any) -> Iterator[tuple[Desk, Desk]]:
    """Two servers on one registry, at the same time of the day."""
    clock = Clock()
    with ExitStack() as both:
        found = [
            both.enter_context(standing(folder, OLD, NEW, *more, clock=clock, **options))
            for _ in range(2)
        ]
        yield found[0], found[1]


# -- 3. What devices call an image -----------------------------------------------------------------


def prove(desk: Desk, md5: str, device: str = MAC, before: str = OLD.facts.md5) -> None:
    """A device updates, and calls the new image so."""
    assert desk.ask(md5=before, device=device) == "2.0.0"
    desk.send(device=device)
    desk.ask("2.0.0", md5, device)
    desk.wait()


def test_digest_of_a_signed_image_is_learned(desk: Desk) -> None:
    prove(desk, STRANGE)
    assert desk.known.grants.learned(NEW.facts.sha256) == {STRANGE}
    other = mac(1)
    assert desk.ask("", OLD.facts.md5, other) == "2.0.0"  # which does not say its version
    desk.send(device=other)
    assert desk.ask("", STRANGE, other) == "same-image"
    assert desk.outcomes(other) == [PROVEN]


def test_another_server_learns_it_too(tmp_path: Path) -> None:
    with pair(tmp_path / "state") as (here, there):
        prove(here, STRANGE)
        there.known.registry.refresh()
        assert there.ask("", STRANGE, mac(1)) == "same-image"


def test_what_others_call_another_image_is_not_learned(desk: Desk) -> None:
    desk.ask("1.0.0", STRANGE, mac(1))
    prove(desk, STRANGE)
    assert desk.known.grants.learned(NEW.facts.sha256) == frozenset()


def test_who_has_not_fetched_all_of_it_teaches_nothing(desk: Desk) -> None:
    desk.ask()
    desk.send(sent=SIZE - 1)
    desk.ask("2.0.0", STRANGE)
    assert desk.outcomes() == [OPEN]
    assert desk.known.grants.learned(NEW.facts.sha256) == frozenset()


def test_a_device_that_lies_keeps_no_other_from_its_update(desk: Desk) -> None:
    """It says that it runs 2.0.0, by the digest that the others have, of whom nobody has asked."""
    prove(desk, STRANGE)
    honest = mac(1)
    assert desk.ask("1.0.0", STRANGE, honest) == "2.0.0"
    desk.send(device=honest)
    desk.ask("1.0.0", STRANGE, honest)
    assert desk.outcomes(honest)[0] == RETURNED


def test_few_digests_are_learned_of_one_image(desk: Desk) -> None:
    for number in range(20):
        prove(desk, f"{number:032x}", mac(number))
    assert len(desk.known.grants.learned(NEW.facts.sha256)) == 16


# -- 4. Lanes, pins, versions given again ----------------------------------------------------------


def test_sketch_and_filesystem_are_under_way_beside_each_other(tmp_path: Path) -> None:
    files = release_of("2.0.0", "littlefs")
    with standing(tmp_path / "state", OLD, NEW, files) as desk:
        assert desk.ask(kind="littlefs") == "2.0.0"
        desk.send(files)
        assert desk.ask(md5=OLD.facts.md5) == "2.0.0"
        desk.send()
        assert desk.ask("2.0.0", kind="littlefs", md5=OLD.facts.md5) == "not-newer"
        assert desk.outcomes() == [PROVEN, OPEN]
        assert desk.ask("2.0.0", NEW.facts.md5) == "not-newer"
        assert desk.outcomes() == [PROVEN, PROVEN]


def test_version_is_given_once_more_to_who_runs_it(desk: Desk) -> None:
    runs = "2.0.0", NEW.facts.md5
    desk.known.assignments.put("device", MAC, Policy(again="2.0.0"))
    assert desk.ask(*runs) == "2.0.0"
    desk.send(sent=SIZE // 2)
    assert desk.ask(*runs) == "2.0.0"  # it broke off
    assert desk.outcomes() == [BROKEN, OPEN]
    desk.send()
    assert desk.ask(*runs) == "not-newer"
    assert desk.outcomes() == [BROKEN, PROVEN]
    assert desk.known.assignments.own("device", MAC).again == ""


def test_version_that_a_proxy_sends_is_given_once_more_only_once(tmp_path: Path) -> None:
    with standing(tmp_path / "state", OLD, NEW, proxied=True) as desk:
        desk.known.assignments.put("device", MAC, Policy(again="2.0.0", hold="no"))
        assert [desk.ask("2.0.0") for _ in range(3)] == ["2.0.0", "not-newer", "not-newer"]
        desk.known.registry.refresh()
        assert desk.known.assignments.own("device", MAC) == Policy(hold="no")


def test_pinned_device_goes_down_and_is_in_no_rollout(desk: Desk) -> None:
    assert desk.ask("2.0.0", NEW.facts.md5) == "not-newer"
    desk.wait()
    assert desk.known.registry.annotate(MAC, pin="1.0.0")
    assert desk.ask("2.0.0", NEW.facts.md5) == "1.0.0"
    desk.send(OLD)
    assert desk.ask("1.0.0", OLD.facts.md5) == "not-newer"
    desk.wait()
    (attempt,) = desk.known.grants.attempts(MAC)
    assert (attempt.outcome, attempt.rollout, attempt.before) == (PROVEN, 0, "2.0.0")
    assert desk.known.rollouts.listed() == []


@pytest.mark.parametrize(
    ("pin", "floors", "steps"),
    [
        pytest.param("", ("2.0.0",), ["1.0.0", "2.0.0", "4.0.0"], id="through-a-floor"),
        pytest.param(
            "", ("2.0.0", "3.0.0"), ["1.0.0", "2.0.0", "3.0.0", "4.0.0"], id="through-two"
        ),
        pytest.param("3.0.0", ("2.0.0",), ["1.0.0", "2.0.0", "3.0.0"], id="pinned-above"),
        pytest.param("2.0.0", ("3.0.0",), ["1.0.0", "2.0.0"], id="pinned-below"),
        pytest.param("1.0.0", ("3.0.0",), ["2.0.0", "1.0.0"], id="pinned-down"),
        pytest.param("", ("2.5.0",), ["1.0.0", "2.0.0"], id="a-floor-that-is-not-there"),
    ],
)
def test_device_goes_through_floors(
    pin: str, floors: tuple[str, ...], steps: list[str], tmp_path: Path
) -> None:
    with standing(tmp_path / "state", OLD, NEW, NEXT, release_of("4.0.0")) as desk:
        if pin:
            desk.ask("9.0.0")
            desk.wait()
            desk.known.registry.annotate(MAC, pin=pin)
        desk.known.assignments.put("project", PROJECT, Policy(floors=floors))
        gone = steps[:1]
        while (given := desk.ask(gone[-1])) in {"1.0.0", "2.0.0", "3.0.0", "4.0.0"}:
            gone.append(given)
            desk.send(release_of(given))
        assert gone == steps


def test_device_that_is_given_the_next_floor_at_once_has_proven_the_one_before(
    tmp_path: Path,
) -> None:
    with standing(tmp_path / "state", OLD, NEW, NEXT) as desk:
        desk.known.assignments.put("project", PROJECT, Policy(floors=("2.0.0",)))
        assert desk.ask() == "2.0.0"
        desk.send()
        assert desk.ask("2.0.0") == "3.0.0"
        assert desk.outcomes() == [PROVEN, OPEN]


# -- 5. What people decided ------------------------------------------------------------------------


def test_device_on_hold_gets_nothing(desk: Desk) -> None:
    desk.known.assignments.put("device", MAC, Policy(hold="yes"))
    assert (desk.ask(), desk.ask(device=mac(1))) == ("on-hold", "2.0.0")
    assert desk.outcomes() == []


def test_window_opens_by_the_clock(desk: Desk) -> None:
    desk.known.assignments.put("project", PROJECT, Policy(window="09:00-10:00 UTC"))
    desk.server.clock.now = BEGIN - BEGIN % DAY + 9 * HOUR - 61
    assert desk.ask() == "outside-window"
    assert desk.ask() == "2.0.0"


def test_approval_is_used_up_when_the_version_runs(desk: Desk) -> None:
    desk.known.assignments.put("device", MAC, Policy(approval="yes"))
    assert desk.ask() == "waiting-for-approval"
    desk.known.assignments.approve(Approval(MAC, PROJECT, "2.0.0", 1, "me"))
    assert desk.ask() == "2.0.0"
    desk.send(sent=1)
    assert desk.ask() == "2.0.0"
    desk.send()
    desk.ask("2.0.0")
    assert desk.outcomes() == [BROKEN, PROVEN]
    desk.known.registry.refresh()
    assert desk.known.assignments.approvals(MAC) == []


def test_prerelease_is_for_devices_on_its_channel(tmp_path: Path) -> None:
    with standing(tmp_path / "state", OLD, NEW, release_of("3.0.0-rc.1")) as desk:
        desk.ask("2.0.0")
        desk.wait()
        assert desk.ask("2.0.0") == "not-newer"
        desk.known.registry.annotate(MAC, channel="beta")
        assert desk.ask("2.0.0") == "3.0.0-rc.1"


# -- 6. Rollouts in rows ---------------------------------------------------------------------------

PLAN = Plan((Stage(count=2, proven=2, minimum=2, threshold=50), Stage()))


def test_first_stage_gives_no_more_than_its_places_until_it_is_proven(desk: Desk) -> None:
    desk.begin(PLAN)
    one, two, three = map(mac, range(3))
    assert [desk.ask(device=each) for each in (one, two)] == ["2.0.0"] * 2
    assert desk.ask(device=three) == "waiting-for-stage"
    desk.send(device=one)
    desk.ask("2.0.0", device=one)
    assert desk.ask(device=three) == "waiting-for-stage"
    desk.send(device=two)
    desk.ask("2.0.0", device=two)
    assert desk.ask(device=three) == "2.0.0"
    assert desk.results() == {0: Counts(proven=2), 1: Counts(open=1)}


def test_version_alone_opens_no_stage_until_all_bytes_have_left(desk: Desk) -> None:
    desk.begin(PLAN)
    for each in map(mac, range(2)):
        desk.ask(device=each)
        desk.wait(START + 1)
        desk.ask("2.0.0", device=each)
    assert (desk.state(), desk.results()) == (RUNNING, {0: Counts(open=2)})
    assert desk.ask(device=mac(2)) == "waiting-for-stage"


def test_who_fetches_no_byte_has_no_say(desk: Desk) -> None:
    for each in map(mac, range(20)):
        desk.ask("1.0.0", device=each)
        desk.wait(START + 1)
        desk.ask("1.1.0", device=each)
    assert (desk.state(), desk.results()) == (RUNNING, {0: Counts(open=20)})
    assert desk.ask(device=mac(21)) == "2.0.0"


def test_pace_lets_a_download_in_pieces_go_on(desk: Desk) -> None:
    desk.server.shelf.put(release_of("1.5.0"))
    desk.begin(Plan(pace=1, period=HOUR))
    desk.ask(asks="image")
    desk.part(0, SIZE // 2)
    assert desk.ask(device=mac(1)) == "1.5.0"
    assert desk.ask(asks="rest") == "2.0.0"


@pytest.mark.parametrize(("do", "why"), [("pause", "paused"), ("abort", "aborted")])
def test_download_in_pieces_never_goes_on_with_another_release(
    do: str, why: str, desk: Desk
) -> None:
    desk.server.shelf.put(release_of("1.5.0"))
    number = desk.begin(PLAN)
    desk.ask()
    desk.part(0, SIZE // 2)
    desk.known.rollouts.control(number, do, "it gets warm", int(desk.server.clock.now))
    assert desk.ask(asks="rest") == why
    assert desk.outcomes() == [OPEN]
    assert desk.ask() == "1.5.0"


def test_newer_release_is_not_what_a_download_in_pieces_goes_on_with(desk: Desk) -> None:
    desk.ask()
    desk.part(0, SIZE // 2)
    desk.server.shelf.put(NEXT)
    assert desk.ask(asks="rest") == "other-image"
    assert desk.ask() == "3.0.0"


def test_pin_of_a_group_is_within_the_rollout(desk: Desk) -> None:
    number = desk.begin(PLAN)
    registry, assignments = desk.known.registry, desk.known.assignments
    assignments.put("group", "attic", Policy(pin="2.0.0"))
    desk.ask("2.0.0")
    desk.wait()
    registry.annotate(MAC, group="attic")
    desk.known.rollouts.control(number, "pause", "", int(desk.server.clock.now))
    assert desk.ask() == "paused"
    registry.annotate(MAC, pin="2.0.0")
    assert desk.ask() == "2.0.0"


def test_pace_ends_with_the_rollout(desk: Desk) -> None:
    number = desk.begin(Plan(pace=1, period=HOUR))
    assert [desk.ask(device=each) for each in (mac(0), mac(1))] == ["2.0.0", "paced"]
    desk.known.rollouts.control(number, "finish", "", int(desk.server.clock.now))
    assert [desk.ask(device=each) for each in (mac(1), mac(2))] == ["2.0.0"] * 2


def test_rollout_halts_and_somebody_hears_of_it(
    desk: Desk, lines: Callable[[str], list[str]]
) -> None:
    number = desk.begin(PLAN)
    for each in map(mac, range(2)):
        desk.ask(device=each)
        desk.send(device=each)
        desk.ask(device=each)
    assert desk.state() == HALTED
    reason = "2 of 2 devices of stage 1 failed (2 returned), more than 50 %"
    named = {"project": PROJECT, "version": "2.0.0", "reason": reason}
    assert desk.events == [("rollout.halted", {"rollout": number, **named})]
    warning = f"WARNING rollout {number} of {PROJECT} 2.0.0 is halted: {reason}"
    assert lines("rollout ") == [warning]
    assert [desk.ask(device=mac(number)) for number in (0, 1, 2)] == ["halted"] * 3
    assert desk.ask(device=mac(0), asks="rest") == "halted"


def test_what_people_do_with_a_rollout_holds_at_once(desk: Desk) -> None:
    number = desk.begin(Plan())
    for do, code in (("pause", "paused"), ("resume", "2.0.0"), ("abort", "aborted")):
        desk.known.rollouts.control(number, do, "", int(desk.server.clock()))
        assert desk.ask() == code


def test_release_without_a_plan_is_watched(desk: Desk) -> None:
    for each in map(mac, range(10)):
        assert desk.ask(device=each) == "2.0.0"
        desk.send(device=each)
        desk.ask(device=each)
    assert desk.state() == HALTED
    assert desk.ask(device=mac(10)) == "halted"


def test_plan_takes_the_place_of_watching(desk: Desk) -> None:
    desk.ask(device=mac(1))
    first = desk.known.rollouts.listed()[0]
    assert first.is_watched
    number = desk.begin(PLAN)
    assert desk.known.rollouts.get(first.id)[0].state == ABORTED
    assert desk.known.rollouts.get(number)[0].state == RUNNING
    desk.ask()
    assert desk.results() == {0: Counts(open=1)}
    desk.send(device=mac(1))
    desk.ask(device=mac(1))
    assert desk.known.rollouts.get(first.id)[0].state == ABORTED


def test_rollout_is_not_begun_twice_until_it_is_over(desk: Desk) -> None:
    number = desk.begin(PLAN)
    with pytest.raises(Refused, match="is running: abort or finish it first"):
        desk.begin(PLAN)
    desk.known.rollouts.control(number, "abort", "", 1)
    assert desk.begin(PLAN) > number


def test_rollout_that_time_has_ended_can_be_followed_by_another(desk: Desk) -> None:
    number = desk.begin(Plan((Stage(proven=1, wait=HOUR),)))
    desk.ask()
    desk.send()
    desk.ask("2.0.0")
    desk.wait(HOUR)
    assert desk.begin(PLAN) > number


def test_pace_is_kept_by_the_clock(desk: Desk) -> None:
    desk.begin(Plan(pace=2, period=HOUR))
    given = [desk.ask(device=mac(number)) for number in range(3)]
    assert given == ["2.0.0", "2.0.0", "paced"]
    desk.wait(HOUR - 180)
    assert desk.ask(device=mac(3)) == "2.0.0"  # an hour behind the first one
    assert desk.ask(device=mac(2), md5=STRANGE) == "2.0.0"
    assert desk.ask(device=mac(4)) == "paced"


def test_so_many_downloads_at_once(desk: Desk) -> None:
    desk.begin(Plan(at_once=1))
    assert desk.ask(device=mac(0)) == "2.0.0"
    assert desk.ask(device=mac(0)) == "2.0.0"  # the same one, once more
    left = desk.server.carry(mac(0), NEW)
    assert desk.ask(device=mac(1)) == "paced"
    left(SIZE)
    assert desk.ask(device=mac(1)) == "2.0.0"
    desk.wait(START + 1)  # it has never fetched it
    assert desk.ask(device=mac(2)) == "2.0.0"
    assert desk.ask(device=mac(1)) == "paced"
    assert desk.ask(device=mac(1), asks="rest") == "2.0.0"  # between two pieces nobody is busy


@pytest.mark.parametrize("later", [0, 60])
def test_plan_of_a_project_is_for_files_that_came_after_it(later: int, tmp_path: Path) -> None:
    """Whenever they were written: cp -p and rsync keep that."""
    came = BEGIN + later
    new = replace(NEW, identity=(0, 0, SIZE, 10**9, came * 10**9))
    with standing(tmp_path / "state", OLD, new) as desk:
        policy = Policy(plan=plan_text(PLAN), since=BEGIN + 30)
        desk.known.assignments.put("project", PROJECT, policy)
        given = [desk.ask(device=mac(number)) for number in range(3)]
        assert given == ["2.0.0", "2.0.0", "waiting-for-stage" if later else "2.0.0"]


def test_patience_of_a_plan_counts_from_the_end_of_the_download(desk: Desk) -> None:
    desk.begin(Plan(patience=600))
    desk.ask()
    left = desk.server.carry(MAC, NEW)
    desk.wait()
    desk.fall_silent(HOUR - 120)  # a slow network
    assert desk.outcomes() == [OPEN]
    left(SIZE)
    desk.wait(599)
    assert desk.outcomes() == [OPEN]
    desk.fall_silent(1)
    assert desk.outcomes() == [SILENT]


def test_project_that_is_gone_takes_no_check_in_with_it(desk: Desk) -> None:
    desk.ask()
    desk.send()
    with desk.known.registry.writing() as connection:
        connection.execute("DELETE FROM rollout")
    desk.ask("2.0.0")
    assert desk.outcomes() == [PROVEN]


# -- 7. How long a device has ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "patience"),
    [
        pytest.param(0, USUAL_PATIENCE, id="it-asks-for-the-first-time"),
        pytest.param(30, USUAL_PATIENCE, id="only-retries"),
        pytest.param(300, LEAST_PATIENCE, id="minutes"),
        pytest.param(HOUR, 4 * HOUR, id="an-hour"),
        pytest.param(DAY, 4 * DAY, id="a-day"),
        pytest.param(7 * DAY, MOST_PATIENCE, id="a-week"),
    ],
)
def test_deadline_comes_of_how_often_a_device_asks(
    every: int, patience: int, tmp_path: Path
) -> None:
    with standing(tmp_path / "state", OLD) as desk:
        for _ in range(10 * bool(every)):
            desk.server.clock.now += every
            decide(desk.server.site, said())
            desk.known.registry.flush()
        desk.server.shelf.put(NEW)
        desk.server.clock.now += every
        decide(desk.server.site, said())
        (attempt,) = desk.known.grants.attempts(MAC)
        assert attempt.deadline - attempt.granted == patience


def test_time_for_which_no_server_was_there_makes_no_device_silent(tmp_path: Path) -> None:
    clock = Clock()
    with standing(tmp_path / "state", OLD, NEW, clock=clock) as desk:
        desk.ask()
        desk.send()
        desk.wait()
    clock.now += 3 * DAY
    with standing(tmp_path / "state", OLD, NEW, clock=clock) as desk:
        desk.fall_silent(HOUR)
        assert desk.outcomes() == [OPEN]
        desk.fall_silent(DAY)
        assert desk.outcomes() == [SILENT]


def test_clock_that_jumps_makes_no_device_silent(desk: Desk) -> None:
    """A Raspberry Pi has none, and knows the time a minute after its start."""
    desk.ask()
    desk.send()
    desk.server.clock.now += 3 * DAY
    assert desk.ask(device=mac(1)) == "2.0.0"
    assert desk.outcomes() == [OPEN]
    desk.fall_silent(DAY + HOUR)
    assert desk.outcomes() == [SILENT]


def test_time_that_was_excused_is_so_once(desk: Desk) -> None:
    desk.ask()
    desk.wait()
    (before,) = desk.known.grants.attempts(MAC)
    desk.server.clock.now += 3 * DAY
    with pytest.raises(TypeError):
        desk.known.grants.grant(said(device=mac(2)), WRONG)
    for _ in range(3):
        desk.ask(device=mac(1))
    (after,) = desk.known.grants.attempts(MAC)
    assert after.deadline - before.deadline == 3 * DAY + 2 * 60


def test_restart_does_not_give_more_time(tmp_path: Path) -> None:
    clock = Clock()
    with standing(tmp_path / "state", OLD, NEW, clock=clock) as desk:
        desk.ask()
    for _ in range(25):
        clock.now += HOUR - 60
        with standing(tmp_path / "state", OLD, NEW, clock=clock) as desk:
            desk.ask(device=mac(1))
            if desk.outcomes() == [SILENT]:
                return
    pytest.fail("it never became silent")


# -- 8. What is forgotten --------------------------------------------------------------------------


def test_attempts_of_a_device_are_kept_up_to_a_number(desk: Desk) -> None:
    for _ in range(KEPT + 5):
        desk.ask()
        desk.send(sent=1)
    assert len(desk.outcomes()) == KEPT


def test_rollout_counts_devices_that_were_forgotten(desk: Desk) -> None:
    """Else those that it has bricked would make room for others."""
    desk.begin(Plan((Stage(count=3, minimum=3), Stage())))
    for number in range(3):
        desk.ask(device=mac(number))
        desk.send(device=mac(number))
    desk.ask("2.0.0", device=mac(0))
    desk.wait()
    for number in range(3):
        assert desk.known.registry.forget(mac(number))
    assert desk.results() == {0: Counts(proven=1, silent=2)}
    assert desk.known.grants.attempts() == []
    assert desk.ask(device=mac(4)) == "halted"


def test_device_that_was_forgotten_begins_anew(desk: Desk) -> None:
    fail(desk, 3)
    assert desk.ask() == "loop"
    assert desk.known.registry.forget(MAC)
    assert desk.ask() == "2.0.0"
    assert desk.outcomes() == [OPEN]


def test_attempts_can_be_listed(desk: Desk) -> None:
    number = desk.begin(Plan())
    for each in range(3):
        desk.ask(device=mac(each))
    desk.send(device=mac(1))
    desk.ask("2.0.0", device=mac(1))
    desk.wait()
    grants = desk.known.grants
    newest, *rest = grants.attempts()
    assert newest.device == mac(2)
    assert grants.attempts(before=newest.id) == rest
    assert grants.attempts(rollout=number, limit=2) == [newest, rest[0]]
    assert grants.attempts(rollout=number + 1) == []
    assert [each.device for each in grants.attempts(mac(1), before=newest.id)] == [mac(1)]
    assert grants.tally() == {OPEN: 2, PROVEN: 1}


# -- 9. Together, or not at all --------------------------------------------------------------------


def wish(desk: Desk, report: Report, release: Release = NEW) -> Callable[[], object]:
    """Who asks for a grant in a thread of its own, which has begun; gives back what came of it."""
    found: list[object] = []

    def ask() -> None:
        try:
            found.append(desk.known.grants.grant(report, release))
        except (Refused, TypeError) as err:
            found.append(err)

    thread = threading.Thread(target=ask)
    thread.start()

    def end() -> object:
        thread.join(20)
        (outcome,) = found
        return outcome

    return end


def wait_for_wishes(desk: Desk, count: int) -> None:
    """Waits until so many wait behind the one that is served."""
    wait_until(lambda: len(desk.known.grants._wishes) == count)


@contextmanager
def busy(desk: Desk) -> Iterator[Callable[[], object]]:
    """While somebody else writes and a first wish waits for that; gives back what comes of it."""
    with desk.known.registry._lock:
        first = wish(desk, said(device=mac(255)))
        wait_until(lambda: desk.known.grants._turn.locked() and not desk.known.grants._wishes)
        yield first


def test_whatever_waits_is_granted_in_one_transaction(desk: Desk) -> None:
    statements: list[str] = []
    desk.known.registry._often.set_trace_callback(statements.append)
    with busy(desk) as first:
        others = [wish(desk, said(device=mac(number))) for number in range(8)]
        wait_for_wishes(desk, 8)
    assert [first(), *(each() for each in others)] == [None] * 9
    assert statements.count("COMMIT") == 2
    assert len(desk.known.grants.attempts()) == 9


def test_grant_is_on_the_disk_when_it_is_given(desk: Desk) -> None:
    statements: list[str] = []
    desk.known.registry._often.set_trace_callback(statements.append)
    desk.known.grants.grant(said(), NEW)
    desk.known.registry.flush()
    settings = [each for each in statements if "synchronous" in each or each == "COMMIT"]
    assert settings == [
        "PRAGMA synchronous = FULL", "COMMIT", "PRAGMA synchronous = NORMAL",
    ]  # fmt: skip


def refuse_writing(desk: Desk) -> None:
    """The disk is full, or cannot be written any more."""
    desk.known.registry._often.execute("PRAGMA query_only = 1")


def write_again(desk: Desk) -> None:
    """It can be written again."""
    desk.known.registry._often.execute("PRAGMA query_only = 0")


def test_nobody_gets_an_image_that_cannot_be_noted(
    desk: Desk, lines: Callable[[str], list[str]]
) -> None:
    refuse_writing(desk)
    with busy(desk) as first:
        others = [wish(desk, said(device=mac(number))) for number in range(4)]
        wait_for_wishes(desk, 4)
    refused = [first(), *(each() for each in others)]
    assert [each.status for each in refused if isinstance(each, Refused)] == [503] * 5
    assert lines("ERROR no image is given, as that cannot be noted: attempt to write a readonly")
    assert desk.known.grants.attempts() == []
    write_again(desk)
    assert desk.ask() == "2.0.0"


def test_nobody_gets_an_image_while_another_program_locks_the_registry(
    desk: Desk, tmp_path: Path
) -> None:
    desk.known.registry._often.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(tmp_path / "state" / "fleet.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refused) as refused:
            decide(desk.server.site, said())
        assert refused.value.status == 503
        other.rollback()
    assert desk.ask() == "2.0.0"


def test_mistake_in_one_grant_gives_an_image_to_nobody(desk: Desk) -> None:
    with busy(desk) as first:
        others = [wish(desk, said(device=mac(number))) for number in range(2)]
        wait_for_wishes(desk, 2)
        bad = wish(desk, said(device=mac(2)), WRONG)
        wait_for_wishes(desk, 3)
        others.append(wish(desk, said(device=mac(3))))
        wait_for_wishes(desk, 4)
    assert first() is None
    outcomes = [bad(), *(each() for each in others)]
    assert sum(isinstance(each, TypeError) for each in outcomes) == 1  # whose turn it was
    assert sum(isinstance(each, Refused) and each.status == 503 for each in outcomes) == 3
    assert [each.device for each in desk.known.grants.attempts()] == [mac(255)]
    assert desk.ask(device=mac(3)) == "2.0.0"


def test_check_ins_are_not_lost_with_a_grant_that_fails(desk: Desk) -> None:
    desk.ask(device=mac(1))
    desk.send(device=mac(1))
    desk.server.clock.now += 60
    decide(desk.server.site, said("2.0.0", device=mac(1)))  # is queued
    with pytest.raises(TypeError):
        desk.known.grants.grant(said(), WRONG)
    refuse_writing(desk)
    with pytest.raises(Refused):
        desk.known.grants.grant(said(), NEW)
    write_again(desk)
    assert desk.outcomes(mac(1)) == [PROVEN]
    seen = desk.known.registry.device(mac(1))
    assert seen is not None
    assert seen.version == "2.0.0"


def test_place_that_was_not_written_is_not_taken(desk: Desk) -> None:
    desk.begin(Plan((Stage(count=1, minimum=1, proven=1), Stage(count=2)), pace=1, period=DAY))
    with pytest.raises(TypeError):
        desk.known.grants.grant(said(device=mac(1)), WRONG)
    assert desk.ask(device=mac(2)) == "2.0.0"


def test_memory_keeps_what_is_granted_while_it_is_read(tmp_path: Path) -> None:
    with standing(tmp_path / "state", OLD, NEW) as desk:
        desk.begin(Plan((Stage(count=1, minimum=1), Stage(count=2))))
        registry = desk.known.registry
        grants = [functools.partial(desk.known.grants.grant, said(device=mac(1)), NEW)]
        rows = registry.rows

        def slow(statement: str, *values: Any) -> list[Any]:
            found = rows(statement, *values)
            if "FROM member" in statement and grants:
                assert grants.pop()() is None
            return found

        registry.rows = slow  # type: ignore[method-assign]
        desk.known.rollouts.read()
        assert desk.results() == {0: Counts(open=1)}
        assert desk.ask(device=mac(2)) == "waiting-for-stage"
        assert desk.ask(device=mac(1)) == "2.0.0"  # it has the place


# -- 10. Two servers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "most"),
    [
        pytest.param(Plan((Stage(count=7, proven=7), Stage())), 7, id="places"),
        pytest.param(Plan(pace=5, period=DAY), 5, id="pace"),
        pytest.param(Plan(at_once=3), 3, id="at-once"),
        pytest.param(Plan((Stage(count=9, proven=9), Stage()), pace=4), 4, id="both"),
    ],
)
def test_two_servers_together_give_no_more_than_the_plan(
    plan: Plan, most: int, tmp_path: Path
) -> None:
    with pair(tmp_path / "state") as desks:
        desks[0].begin(plan)
        given: list[str] = []

        def ask(number: int) -> None:
            desk = desks[number % 2]
            for device in range(number * 10, number * 10 + 10):
                for _ in range(2):
                    outcome = decide(desk.server.site, said(device=mac(device)))
                    if outcome == NEW:
                        given.append(mac(device))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(set(given)) == most
        with desks[1].known.registry.reading() as connection:
            assert sum(each.devices for each in results_of(connection, 1).values()) == most


def test_both_servers_give_the_same_answer_within_a_second(tmp_path: Path) -> None:
    with pair(tmp_path / "state", every=0.05) as (here, there):
        number = here.begin(PLAN)
        device = said(device=mac(9))

        def answers() -> set[str]:
            outcomes = [desk.known.rollouts.objection(device, NEW) for desk in (here, there)]
            return {each.code if each else "yes" for each in outcomes}

        wait_until(lambda: answers() == {"yes"}, 1)
        here.ask(device=mac(1))
        there.ask(device=mac(2))
        wait_until(lambda: answers() == {"waiting-for-stage"}, 1)
        there.known.rollouts.control(number, "pause", "", 1)
        wait_until(lambda: answers() == {"paused"}, 1)
        here.known.rollouts.control(number, "resume", "", 1)
        for desk, each in ((here, 2), (there, 1)):  # each comes back to the other one
            desk.send(device=mac(each))
            desk.ask("2.0.0", device=mac(each))
        wait_until(lambda: answers() == {"yes"}, 1)


def test_what_a_device_says_again_is_news_if_another_server_has_granted_it_something(
    tmp_path: Path,
) -> None:
    with pair(tmp_path / "state") as (here, there):
        for _ in range(2):
            here.ask(asks="answer")
        assert there.ask() == "2.0.0"
        there.send()
        there.wait()
        here.known.registry.refresh()
        here.ask(asks="answer")
        assert here.outcomes() == [RETURNED]


KILLED = """
import sys
from pathlib import Path
from bench.simulation import Clock, Shelf, release_of, serving
from tests.fleet.test_grants import NEW, mac, said

with serving(Path(sys.argv[1]), Clock(), Shelf(NEW), every=0.02) as server:
    for number in range(1 << 16):
        server.known.grants.grant(said(device=mac(number)), NEW)
        print(mac(number), flush=True)  # its image begins to leave
"""


def test_kill_loses_no_grant_of_an_image_that_began_to_leave(tmp_path: Path) -> None:
    for number in range(int(os.environ.get("OTA_KILLS", "3"))):
        state = tmp_path / f"state{number}"
        state.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(state)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            given = [process.stdout.readline().strip() for _ in range(20 + 7 * number)]
            process.send_signal(signal.SIGKILL)
            given += process.stdout.read().split()
        given = [each for each in given if len(each) == len(MAC)]
        with standing(state, OLD, NEW) as desk:
            noted = {each.device for each in desk.known.grants.attempts(limit=1000)}
            assert set(given[-1000:]) <= noted or len(given) > 1000
            assert desk.known.rollouts.get(1)[1][0].open >= len(given)
            assert_books(desk)


def assert_books(desk: Desk) -> None:
    """What is counted of each rollout is what its members are."""
    with desk.known.registry.reading() as connection:
        counted = connection.execute(
            "SELECT rollout, stage, standing, devices FROM result WHERE devices <> 0"
        ).fetchall()
        members = connection.execute(
            "SELECT rollout, stage, standing, COUNT(*) FROM member GROUP BY 1, 2, 3"
        ).fetchall()
    assert sorted(counted) == sorted(members)
