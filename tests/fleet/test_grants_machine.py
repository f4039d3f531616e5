"""Grants under whatever devices and people do, in any order: what always holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.simulation import DAY, HOUR, SIZE, Carried
from ota_fleet.attempts import MAX_FULL
from ota_fleet.rollout import CONTROLS, FINISHED, RUNNING, Plan, Rollout, Stage
from ota_server import Refused, Release, decide
from tests.fleet.test_grants import NEW, OLD, STRANGE, Desk, assert_books, mac, said, standing

DEVICES = st.integers(0, 5)
PLANS = st.builds(
    lambda first, second, pace, at_once: Plan(
        (first, second, Stage(proven=2)), pace=pace, at_once=at_once, patience=6 * HOUR
    ),
    st.builds(
        Stage,
        count=st.integers(1, 3),
        proven=st.integers(1, 3),
        minimum=st.integers(1, 3),
        threshold=st.sampled_from((0, 10, 50, 100)),
    ),
    st.builds(
        Stage,
        percent=st.sampled_from((30, 60)),
        wait=st.sampled_from((0, HOUR)),
        threshold=st.sampled_from((10, 50)),
        minimum=st.integers(1, 3),
    ),
    st.integers(0, 2),
    st.integers(0, 2),
)
FORMS: Mapping[str, tuple[str, str]] = {  # how a device says what it runs: version, MD5
    "both": ("{0}", "{1}"), "version": ("{0}", ""), "digest": ("", "{1}"),
    "signed": ("{0}", STRANGE), "lie": ("1.0.0", "{1}"),
}  # fmt: skip


@dataclass
class Board:
    """A device: what it runs, how it says so, and what it downloads."""

    mac: str
    runs: Release = OLD
    form: str = "both"
    full: int = 0  # downloads of the whole image, since it ran that or somebody forgave it
    left: Carried | None = None


class Fleet(RuleBasedStateMachine):
    """Devices ask, download, come back or do not; people pause, resume, abort; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = ExitStack()
        place = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
        folder = self.ends.enter_context(TemporaryDirectory(dir=place))
        self.desk: Desk = self.ends.enter_context(standing(Path(folder) / "state", OLD, NEW))
        self.boards = [Board(mac(number)) for number in range(6)]
        self.stages: dict[int, int] = {}
        self.granted: dict[int, list[int]] = {}  # by rollout: when
        self.number = 0

    def teardown(self) -> None:
        """Closes the registry."""
        self.ends.close()

    @property
    def now(self) -> int:
        """UTC seconds."""
        return int(self.desk.server.clock())

    @property
    def rollout(self) -> Rollout:
        """The one that counts, as it stands now."""
        return self.desk.known.rollouts.get(self.number)[0]

    @initialize(plan=PLANS, forms=st.lists(st.sampled_from(sorted(FORMS)), min_size=6, max_size=6))
    def begin(self, plan: Plan, forms: list[str]) -> None:
        """A rollout, and devices that say what they run in this way or that."""
        self.number = self.desk.begin(plan)
        for board, form in zip(self.boards, forms, strict=True):
            board.form = form

    # -- Devices -----------------------------------------------------------------------------------

    @rule(number=DEVICES, rest=st.booleans())
    def ask(self, number: int, rest: bool) -> None:
        """A device asks, perhaps for the rest of an image; whatever it gets, it may have."""
        board, before = self.boards[number], self.rollout
        runs = board.runs.version, board.runs.facts.md5
        version, md5 = (text.format(*runs) for text in FORMS[board.form])
        report = said(version, md5, board.mac, asks="rest" if rest else "image")
        self.desk.server.clock.now += 1
        if decide(self.desk.server.site, report) != NEW:
            return
        self.look_at_grant(board, before, rest)
        board.left = self.desk.server.carry(board.mac, NEW)

    def look_at_grant(self, board: Board, before: Rollout, rest: bool) -> None:
        """A grant is one that the rollout, as it was, allowed."""
        assert before.state in {RUNNING, FINISHED}
        assert board.full < MAX_FULL
        attempt = self.desk.known.grants.attempts(board.mac, limit=1)[0]
        assert (attempt.sha256, attempt.outcome) == (NEW.facts.sha256, "")
        plan, times = before.plan, self.granted.setdefault(self.number, [])
        if attempt.granted == self.now:
            times.append(self.now)
        if self.rollout.state == FINISHED:  # all may have it, as fast as they ask
            return
        if plan.pace:
            assert sum(at > self.now - plan.period for at in times) <= plan.pace
        if plan.at_once and not rest:  # what has begun goes on
            rows = self.desk.known.grants.attempts(rollout=self.number, limit=1000)
            assert sum(each.busy > self.now and not each.outcome for each in rows) <= plan.at_once

    @precondition(lambda self: any(board.left for board in self.boards))
    @rule(number=DEVICES, share=st.sampled_from((0, 1, 2)))
    def receive(self, number: int, share: int) -> None:
        """A download ends: with nothing, half of it, or all."""
        board = self.boards[number]
        if board.left:
            board.left(SIZE * share // 2)
            board.left = None
            board.full += share == 2

    @rule(number=DEVICES, new=st.booleans())
    def restart(self, number: int, new: bool) -> None:
        """A device runs the new image, or the old one, whatever it has downloaded."""
        board = self.boards[number]
        board.runs, board.left = (NEW if new else OLD), None

    @rule(number=DEVICES, form=st.sampled_from(sorted(FORMS)))
    def speak(self, number: int, form: str) -> None:
        """A device says otherwise what it runs."""
        self.boards[number].form = form

    # -- People and time ---------------------------------------------------------------------------

    @rule(do=st.sampled_from((*CONTROLS, "advance")))
    def control(self, do: str) -> None:
        """Somebody does something with the rollout, as far as that is possible."""
        with suppress(Refused):
            self.desk.known.rollouts.control(self.number, do, "", self.now)

    @precondition(lambda self: self.rollout.state not in {"running", "paused"})
    @rule(plan=PLANS)
    def begin_anew(self, plan: Plan) -> None:
        """Somebody begins another rollout of the same version."""
        self.number = self.desk.begin(plan)

    @rule(number=DEVICES)
    def forgive(self, number: int) -> None:
        """Somebody lets a device try again."""
        self.desk.known.grants.forgive(self.boards[number].mac)
        self.boards[number].full = 0

    @rule(seconds=st.sampled_from((60, HOUR, DAY)))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.desk.fall_silent(seconds)

    # -- What always holds -------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        """What is counted is what there is, and no stage has more than its places."""
        self.desk.known.registry.flush()
        assert_books(self.desk)
        for rollout in self.desk.known.rollouts.listed():
            results = self.desk.known.rollouts.get(rollout.id)[1]
            taken = sum(results[at].devices for at in sorted(results)[:1] if at == 0)
            assert self.stages.get(rollout.id, 0) <= rollout.stage
            self.stages[rollout.id] = rollout.stage
            if rollout.stage == 0 and rollout.state != FINISHED:
                count = rollout.plan.stages[0].count
                assert taken <= count + sum(rollout.excused)


Fleet.TestCase.settings = settings(
    max_examples=int(os.environ.get("OTA_EXAMPLES", "25")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFleet = Fleet.TestCase
