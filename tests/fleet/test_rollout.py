"""Rollouts: stages open while a release proves good, and never for one that is bad."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from itertools import product
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ota_fleet.attempts import BROKEN, FAILURES, OPEN, OUTCOMES, PROVEN, RETURNED, SILENT
from ota_fleet.rollout import (
    ABORTED,
    CONTROLS,
    FINISHED,
    HALTED,
    MAX_DEVICES,
    MAX_SECONDS,
    MAX_STAGES,
    PAUSED,
    RUNNING,
    STATES,
    WATCHED,
    Asker,
    Counts,
    Plan,
    Results,
    Rollout,
    Stage,
    advance,
    control,
    is_meant,
    lacking,
    objection,
    plan_of,
    plan_text,
    read_plan,
    share_of,
)
from ota_server import Refused, Version

NOW = 1_000_000
HOUR = 3_600
ONE = Plan((Stage(count=1), Stage()))  # one device first
early = partial(Stage, proven=1)  # over as soon as one has proven it
BEFORE = Version.parse("1.0.0")


def mac(number: int) -> str:
    """The MAC address of one of many devices."""
    return f"5C:CF:7F:{number >> 16:02X}:{number >> 8 & 255:02X}:{number & 255:02X}"


def rollout_of(plan: Plan, **more: Any) -> Rollout:
    """The rollout of 2.0.0 by a plan, opened now."""
    return Rollout(7, "firmware", "2.0.0", plan, **{"opened": NOW, **more})


def single(stage: Stage, **more: Any) -> Rollout:
    """One whose first stage is this; behind it, all may have the release."""
    return rollout_of(Plan((stage, Stage())), **more)


def asker(number: int = 1, **more: Any) -> Asker:
    """A device that runs 1.0.0."""
    return Asker(mac(number), **{"version": BEFORE, **more})


def asker_at(low: float, high: float) -> Asker:
    """The first device whose share of 2.0.0 lies between two."""
    devices = (asker(number) for number in range(10_000))
    return next(e for e in devices if low <= share_of(e.device, "firmware", "2.0.0") < high)


# -- The share of a device -------------------------------------------------------------------------

DEVICES = [mac(number) for number in range(20_000)]


def test_share_is_the_hash_of_device_and_release() -> None:
    digest = sha256(b"5C:CF:7F:00:00:01\nfirmware\n2.0.0").hexdigest()
    assert share_of(mac(1), "firmware", "2.0.0") == int(digest[:12], 16) / 2**48 * 100


def test_shares_are_spread_evenly_over_the_fleet() -> None:
    shares = [share_of(device, "firmware", "2.0.0") for device in DEVICES]
    assert all(0 <= share < 100 for share in shares)
    buckets = Counter(int(share) for share in shares)
    assert sum((buckets[each] - 200) ** 2 / 200 for each in range(100)) < 150  # chi-squared, 99


def test_other_releases_begin_with_other_devices() -> None:
    firsts = [
        {device for device in DEVICES if share_of(device, project, version) < 10}
        for project, version in (("firmware", "2.0.0"), ("firmware", "2.0.1"), ("fan", "2.0.0"))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 150 < len(firsts[one] & firsts[other]) < 250  # a hundredth of all


# -- Plans and results, any of them ----------------------------------------------------------------

PERCENT = st.integers(1, 100)
FEW = st.integers(0, 6)
STAGES = st.builds(
    Stage, percent=PERCENT, count=FEW, group=st.sampled_from(["", "", "lab"]), proven=FEW,
    wait=st.sampled_from([0, 0, HOUR]), threshold=st.integers(0, 100), minimum=FEW,
)  # fmt: skip
COUNTS = st.builds(Counts, FEW, FEW, FEW, FEW, FEW)


def is_plan(plan: Plan) -> bool:
    """Whether a plan can be like this."""
    try:
        return read_plan(asdict(plan)) == plan
    except ValueError:
        return False


PLANS = st.builds(
    Plan, stages=st.lists(STAGES, min_size=1, max_size=4).map(tuple), pace=FEW, at_once=FEW,
    below=st.sampled_from(["", "1.5.0"]), group=st.sampled_from(["", "lab"]),
    label=st.sampled_from(["", "indoor"]), urgent=st.booleans(),
).filter(is_plan)  # fmt: skip
RESULTS = st.dictionaries(st.integers(0, 3), COUNTS)
ROLLOUTS = st.builds(
    rollout_of, PLANS, state=st.sampled_from(STATES), stage=st.integers(0, 3),
    excused=st.lists(FEW, max_size=4).map(tuple),
).filter(lambda rollout: rollout.stage < len(rollout.plan.stages))  # fmt: skip
TIMES = st.integers(NOW, NOW + 2 * HOUR)
ASKERS = st.builds(
    asker, st.integers(0, 999), version=st.sampled_from([None, BEFORE, Version.parse("1.5.0")]),
    group=st.sampled_from(["", "lab"]), labels=st.sampled_from([(), ("indoor",)]),
    is_member=st.booleans(),
)  # fmt: skip


@given(ROLLOUTS, RESULTS, TIMES)
def test_advance_says_the_same_twice_and_never_goes_back(
    rollout: Rollout, results: Results, now: int
) -> None:
    after = advance(rollout, results, now)
    assert advance(after, results, now) == after
    assert after.stage >= rollout.stage
    assert after.opened == (now if after.stage > rollout.stage else rollout.opened)
    assert replace(rollout, state="", stage=0, opened=0, reason="", excused=()) == replace(
        after, state="", stage=0, opened=0, reason="", excused=()
    )


@given(ROLLOUTS, RESULTS, TIMES)
def test_only_a_running_rollout_goes_on_by_itself(
    rollout: Rollout, results: Results, now: int
) -> None:
    after = advance(rollout, results, now)
    assert after.state in {RUNNING, HALTED, FINISHED} or rollout.state != RUNNING
    if rollout.state != RUNNING:
        assert after == rollout


@given(ROLLOUTS, RESULTS, TIMES)
def test_later_is_never_less(rollout: Rollout, results: Results, now: int) -> None:
    sooner, later = (advance(rollout, results, at) for at in (now, now + HOUR))
    assert later.stage >= sooner.stage
    assert advance(sooner, results, now + HOUR).stage >= sooner.stage


@given(ROLLOUTS, RESULTS, TIMES)
def test_more_failures_never_open_more(rollout: Rollout, results: Results, now: int) -> None:
    rollout = replace(rollout, excused=())
    worse = {at: Counts(0, each.proven, each.failed + each.open) for at, each in results.items()}
    good, bad = advance(rollout, results, now), advance(rollout, worse, now)
    assert bad.stage <= good.stage or bad.state == HALTED == good.state
    if good.state == HALTED and rollout.stage == good.stage:
        assert bad.state == HALTED


@given(ROLLOUTS, RESULTS, ASKERS, st.data())
def test_later_stage_never_takes_a_device_out(
    rollout: Rollout, results: Results, asker: Asker, data: st.DataObject
) -> None:
    if objection(rollout, results, asker) is None:
        stage = data.draw(st.integers(rollout.stage, len(rollout.plan.stages) - 1))
        assert objection(replace(rollout, stage=stage), results, asker) is None


@given(ASKERS, PERCENT, PERCENT)
def test_larger_share_only_adds_devices(asker: Asker, one: int, other: int) -> None:
    less, more = (single(Stage(percent=percent)) for percent in sorted((one, other)))
    if objection(less, {}, asker) is None:
        assert objection(more, {}, asker) is None


@given(ROLLOUTS, RESULTS, ASKERS)
def test_who_is_meant_gets_it_and_who_is_not_does_not(
    rollout: Rollout, results: Results, asker: Asker
) -> None:
    rollout, asker = replace(rollout, state=RUNNING), asker._replace(is_member=False)
    assert is_meant(rollout, results, asker) == (objection(rollout, results, asker) is None)


@given(ROLLOUTS, RESULTS, TIMES)
def test_stage_that_lacks_devices_does_not_end(
    rollout: Rollout, results: Results, now: int
) -> None:
    rollout = replace(rollout, state=RUNNING, plan=replace(rollout.plan, urgent=False))
    if lacking(rollout, results):
        after = advance(rollout, results, now)
        assert (after.stage, after.state == FINISHED) == (rollout.stage, False)


@given(ROLLOUTS, RESULTS, ASKERS)
def test_nobody_gets_what_does_not_run_and_is_not_finished(
    rollout: Rollout, results: Results, asker: Asker
) -> None:
    found = objection(rollout, results, asker)
    if found is None:
        assert rollout.state in {RUNNING, FINISHED}
        assert rollout.plan.group in {"", asker.group}
        assert not rollout.plan.label or rollout.plan.label in asker.labels
        assert not rollout.plan.below or (asker.version and str(asker.version) < "1.5.0")
    else:
        flags = found.deny, found.final, found.foreign, found.usual
        assert flags == (False, False, False, True)  # an older release may come


# -- When a stage is over, and when a release is bad -----------------------------------------------


@pytest.mark.parametrize(
    ("stage", "counts", "seconds", "state", "number"),
    [
        pytest.param(early(), Counts(), 0, RUNNING, 0, id="nobody-yet"),
        pytest.param(early(), Counts(proven=1), 0, FINISHED, 1, id="proven"),
        pytest.param(early(proven=0), Counts(), 0, RUNNING, 0, id="one-proof-at-least"),
        pytest.param(Stage(), Counts(proven=4), 0, RUNNING, 0, id="usually-five-proofs"),
        pytest.param(Stage(), Counts(proven=5), 0, FINISHED, 1, id="five-proofs"),
        pytest.param(Stage(count=1), Counts(proven=1), 0, FINISHED, 1, id="but-of-one-place-one"),
        pytest.param(early(proven=3), Counts(proven=2), 0, RUNNING, 0, id="not-enough-proofs"),
        pytest.param(early(proven=3), Counts(proven=3), 0, FINISHED, 1, id="enough-proofs"),
        pytest.param(early(proven=3, count=2), Counts(proven=2), 0, FINISHED, 1, id="all-places"),
        pytest.param(early(wait=60), Counts(proven=1), 59, RUNNING, 0, id="waits"),
        pytest.param(early(wait=60), Counts(proven=1), 60, FINISHED, 1, id="has-waited"),
        pytest.param(early(), Counts(open=1, proven=1), 0, RUNNING, 0, id="one-is-out"),
        pytest.param(early(), Counts(open=1, proven=8), 0, RUNNING, 0, id="out-of-9-is-too-many"),
        pytest.param(early(), Counts(open=1, proven=9), 0, FINISHED, 1, id="out-of-10-is-not"),
        pytest.param(early(), Counts(1, 18, 1), 0, FINISHED, 1, id="out-and-failed"),
        pytest.param(early(), Counts(2, 18, 1), 0, RUNNING, 0, id="out-and-failed-too-many"),
        pytest.param(early(), Counts(0, 3, 1), 0, RUNNING, 0, id="too-few-to-judge"),
        pytest.param(early(), Counts(0, 4, 1), 0, HALTED, 0, id="returned"),
        pytest.param(early(), Counts(0, 4, 0, 1), 0, HALTED, 0, id="broken"),
        pytest.param(early(), Counts(0, 4, 0, 0, 1), 0, HALTED, 0, id="silent"),
        pytest.param(early(), Counts(99, 4, 1), 0, HALTED, 0, id="open-ones-are-no-excuse"),
        pytest.param(early(threshold=20), Counts(0, 4, 1), 0, FINISHED, 1, id="at-the-threshold"),
        pytest.param(early(threshold=19), Counts(0, 4, 1), 0, HALTED, 0, id="above-the-threshold"),
        pytest.param(early(threshold=0, minimum=0), Counts(0, 99, 1), 0, HALTED, 0, id="none-may"),
        pytest.param(early(threshold=100), Counts(0, 1, 99), 0, FINISHED, 1, id="all-may"),
        pytest.param(early(threshold=100), Counts(0, 0, 99), 0, RUNNING, 0, id="all-may-none-ran"),
        pytest.param(early(minimum=0), Counts(0, 0, 1), 0, HALTED, 0, id="first-failure"),
        pytest.param(early(count=2), Counts(0, 1, 1), 0, HALTED, 0, id="all-places-are-decided"),
        pytest.param(early(count=3), Counts(1, 1, 1), 0, RUNNING, 0, id="one-place-is-open"),
    ],
)
def test_stage_is_over_or_halts_by_what_its_devices_came_to(
    stage: Stage, counts: Counts, seconds: int, state: str, number: int
) -> None:
    plan = Plan((stage, early(threshold=100)))
    results = {0: counts, 1: Counts(proven=1)}  # the second stage would be over at once
    after = advance(rollout_of(plan), results, NOW + seconds)
    assert (after.state, after.stage) == (state, number)
    assert bool(after.reason) is (state != RUNNING)


def test_reason_of_a_halt_counts_what_failed() -> None:
    after = advance(single(Stage()), {0: Counts(3, 4, 2, 0, 1)}, NOW)
    expected = "3 of 7 devices of stage 1 failed (2 returned, 1 silent), more than 10 %"
    assert (after.state, after.reason) == (HALTED, expected)
    excused = advance(single(early(), excused=(1,)), {0: Counts(0, 4, 2)}, NOW)
    assert excused.reason == (
        "1 of 5 devices of stage 1 failed (2 returned; 1 of them no longer counted), more than 10 %"
    )


def test_earlier_stage_whose_devices_roll_back_late_halts_the_rollout() -> None:
    plan = Plan((Stage(count=5), Stage(percent=50), Stage()))
    late = {0: Counts(0, 4, 1), 1: Counts(proven=100)}
    after = advance(rollout_of(plan, stage=1), late, NOW)
    assert (after.state, after.stage) == (HALTED, 1)
    assert after.reason.startswith("1 of 5 devices of stage 1 failed")


def test_one_look_opens_as_many_stages_as_are_over() -> None:
    plan = Plan((Stage(percent=5), Stage(percent=20), Stage(percent=50, wait=HOUR), Stage()))
    results = {number: Counts(proven=10) for number in range(4)}
    after = advance(rollout_of(plan), results, NOW + 5)
    assert (after.stage, after.opened) == (2, NOW + 5)
    assert advance(after, results, NOW + 4 + HOUR) == after
    end = advance(after, results, NOW + 5 + HOUR)
    assert (end.state, end.stage, end.reason) == (FINISHED, 3, "every stage has proven it")


@pytest.mark.parametrize(
    "last",
    [Stage(percent=50), Stage(count=100), Stage(group="lab")],
    ids=["share", "count", "group"],
)
def test_rollout_whose_last_stage_is_not_for_all_waits_for_somebody_to_finish_it(
    last: Stage,
) -> None:
    rollout = rollout_of(Plan((last,)))
    good = {0: Counts(proven=100)}
    assert advance(rollout, good, NOW) == rollout
    assert advance(rollout, {0: Counts(proven=50, silent=50)}, NOW).state == HALTED
    assert control(rollout, good, "finish", "", NOW).state == FINISHED


def test_stage_without_a_place_of_its_own_holds_nobody_up() -> None:
    plan = Plan((Stage(percent=10), Stage(percent=50, count=20), Stage()))
    after = advance(rollout_of(plan), {0: Counts(proven=50)}, NOW)
    assert (after.state, after.stage) == (RUNNING, 2)


# -- Stories ---------------------------------------------------------------------------------------


def standing(*devices: str) -> Results:
    """Results of a first stage whose devices came to this."""
    counts = Counter(devices)
    return {0: Counts(*(counts[each] for each in (OPEN, *OUTCOMES)))}


def test_one_device_first_that_proves_it_opens_the_next_stage() -> None:
    rollout = rollout_of(ONE)
    assert objection(rollout, {}, asker(1)) is None
    taken = standing(OPEN)
    assert advance(rollout, taken, NOW) == rollout
    assert objection(rollout, taken, asker(2)) is not None
    assert objection(rollout, taken, asker(1, is_member=True)) is None
    after = advance(rollout, standing(PROVEN), NOW)
    assert (after.state, after.stage) == (RUNNING, 1)
    assert objection(after, standing(PROVEN), asker(2)) is None


@pytest.mark.parametrize("failure", FAILURES)
def test_one_device_first_that_fails_halts_it_and_the_next_one_needs_somebody(
    failure: str,
) -> None:
    failed = standing(failure)
    halted = advance(rollout_of(ONE), failed, NOW)
    assert halted.state == HALTED
    assert objection(halted, failed, asker(1, is_member=True)) is not None
    again = control(halted, failed, "resume", "it had no power", NOW + 5)
    assert advance(again, failed, NOW + 5) == again
    assert (again.state, again.stage, again.excused) == (RUNNING, 0, (1, 0))
    assert objection(again, failed, asker(2)) is None  # a place for one more
    both = standing(failure, OPEN)
    assert objection(again, both, asker(3)) is not None
    assert advance(again, both, NOW + 5) == again
    assert advance(again, standing(failure, failure), NOW + 5).state == HALTED
    assert advance(again, standing(failure, PROVEN), NOW + 5).stage == 1


def test_excuse_ends_with_the_failure_it_was_for() -> None:
    stage = Stage(minimum=2)
    rollout = single(stage, excused=(2, 0))
    back = standing(PROVEN, PROVEN, PROVEN, OPEN)  # both of them came back after all
    mended = advance(rollout, back, NOW)
    assert mended == replace(rollout, excused=(0, 0))
    assert advance(mended, standing(PROVEN, PROVEN, PROVEN, RETURNED), NOW).state == HALTED


def test_excused_failures_do_not_count_and_new_ones_do() -> None:
    rollout = single(early(), state=HALTED)
    resumed = control(rollout, {0: Counts(0, 3, 2)}, "resume", "", NOW)
    assert resumed.excused == (2, 0)
    assert advance(resumed, {0: Counts(1, 3, 2)}, NOW) == resumed
    assert advance(resumed, {0: Counts(0, 4, 2)}, NOW).stage == 1
    assert advance(resumed, {0: Counts(0, 3, 3)}, NOW) == resumed  # four, too few to judge
    assert advance(resumed, {0: Counts(0, 4, 3)}, NOW).state == HALTED
    assert advance(resumed, {0: Counts(1, 8, 2)}, NOW) == resumed  # 1 of 9, not of 11
    assert advance(resumed, {0: Counts(1, 9, 2)}, NOW).stage == 1


def test_pause_excuses_nothing() -> None:
    paused = control(rollout_of(ONE), standing(OPEN), "pause", "lunch", NOW)
    failed = standing(SILENT)
    assert advance(paused, failed, NOW) == paused
    resumed = control(paused, failed, "resume", "", NOW)
    assert (resumed.state, resumed.excused) == (RUNNING, ())
    assert advance(resumed, failed, NOW).state == HALTED


def test_wait_begins_anew_when_somebody_resumes() -> None:
    paused = single(early(wait=HOUR), state=PAUSED)
    good = {0: Counts(proven=1)}
    resumed = control(paused, good, "resume", "", NOW + 9 * HOUR)
    assert advance(resumed, good, NOW + 10 * HOUR - 1) == resumed
    assert advance(resumed, good, NOW + 10 * HOUR).stage == 1


def test_urgent_skips_all_waiting_but_that_of_the_first_stage() -> None:
    slow = Stage(percent=10, proven=5, wait=HOUR)
    plan = Plan((slow, replace(slow, percent=20), replace(slow, percent=50), Stage()), urgent=True)
    rollout = rollout_of(plan)
    good = {0: Counts(proven=5)}
    assert advance(rollout, {}, NOW + 9 * HOUR) == rollout
    assert advance(rollout, {0: Counts(proven=4)}, NOW + 9 * HOUR) == rollout
    assert advance(rollout, good, NOW + HOUR - 1) == rollout
    after = advance(rollout, good, NOW + HOUR)
    assert (after.state, after.stage) == (RUNNING, 3)
    assert advance(rollout, standing(*[PROVEN] * 4, BROKEN), NOW + HOUR).state == HALTED
    assert advance(rollout_of(Plan((slow,), urgent=True)), good, NOW).stage == 0


def test_release_of_which_nobody_made_a_plan_is_for_all_until_it_is_bad() -> None:
    watched = rollout_of(WATCHED)
    assert watched.is_watched
    assert not rollout_of(Plan()).is_watched
    assert objection(watched, {}, asker()) is None
    assert objection(watched, {}, Asker("")) is None
    assert advance(watched, {0: Counts(0, 4, 5)}, NOW) == watched
    halted = advance(watched, {0: Counts(0, 4, 6)}, NOW)
    assert halted.state == HALTED
    found = objection(halted, {}, Asker(""))
    assert found is not None
    assert str(found) == (
        "halted: the rollout of 2.0.0 is halted: "
        "6 of 10 devices of stage 1 failed (6 returned), more than 50 %"
    )


# -- Why a device waits ----------------------------------------------------------------------------

LAB = Plan((Stage(group="lab", percent=50), Stage(percent=10), Stage(count=3), Stage()))
FULL = {0: Counts(1, 1), 2: Counts(proven=1)}


@pytest.mark.parametrize(
    ("rollout", "asks", "sentence"),
    [
        pytest.param(rollout_of(Plan()), asker(), "", id="for-all"),
        pytest.param(rollout_of(Plan()), Asker(""), "", id="for-all-and-nobody"),
        pytest.param(
            rollout_of(LAB), asker_at(0, 50),
            "waiting-for-stage: the rollout of 2.0.0 is at stage 1 of 4: "
            "it is for the group 'lab', the device is in none", id="group",
        ),
        pytest.param(
            rollout_of(LAB), asker_at(0, 50)._replace(group="hall"),
            "waiting-for-stage: the rollout of 2.0.0 is at stage 1 of 4: "
            "it is for the group 'lab', the device is in 'hall'", id="other-group",
        ),
        pytest.param(rollout_of(LAB), asker_at(0, 50)._replace(group="lab"), "", id="in-group"),
        pytest.param(
            rollout_of(LAB), asker_at(50, 50.2)._replace(group="lab"),
            "waiting-for-stage: the rollout of 2.0.0 is at stage 1 of 4: "
            "50 % of the devices may have it, this one comes at 50.[01][0-9] %", id="share",
        ),
        pytest.param(rollout_of(LAB, stage=1), asker_at(0, 10), "", id="in-share"),
        pytest.param(
            rollout_of(LAB, stage=1), asker_at(10, 50)._replace(group="lab"), "",
            id="let-in-by-an-earlier-stage",
        ),
        pytest.param(
            rollout_of(LAB, stage=2), asker_at(60, 100),
            "waiting-for-stage: the rollout of 2.0.0 is at stage 3 of 4: "
            "its 3 places are taken", id="count",
        ),
        pytest.param(
            rollout_of(ONE), asker(),
            "waiting-for-stage: the rollout of 2.0.0 is at stage 1 of 2: its place is taken",
            id="one-place",
        ),
        pytest.param(rollout_of(LAB), asker(is_member=True), "", id="member-tries-again"),
        *(
            pytest.param(
                rollout_of(LAB, stage=stage), Asker("", BEFORE),
                f"waiting-for-stage: the rollout of 2.0.0 is at stage {stage + 1} of 4: "
                "who does not say its MAC and what it runs waits for the last",
                id=f"nobody-{stage}",
            )
            for stage in range(3)
        ),
        pytest.param(rollout_of(LAB, stage=3), Asker(""), "", id="nobody-at-the-last"),
        *(
            pytest.param(
                rollout_of(Plan((stage,))), Asker(""),
                "waiting-for-stage: the rollout of 2.0.0 is at stage 1 of 1: "
                "who does not say its MAC and what it runs waits for the last",
                id=f"nobody-at-a-last-one-{name}",
            )
            for name, stage in {
                "of-a-share": Stage(percent=99), "of-a-count": Stage(count=9),
                "of-a-group": Stage(group="lab"),
            }.items()
        ),
        pytest.param(
            rollout_of(Plan(group="lab")), asker(group="hall", is_member=True),
            "not-targeted: the rollout of 2.0.0 is for the group 'lab', the device is in 'hall'",
            id="not-in-the-group",
        ),
        pytest.param(rollout_of(Plan(group="lab")), asker(group="lab"), "", id="is-in-the-group"),
        pytest.param(
            rollout_of(Plan(label="indoor")), asker(labels=("outdoor",)),
            "not-targeted: the rollout of 2.0.0 is for devices with the label 'indoor'",
            id="without-the-label",
        ),
        pytest.param(rollout_of(Plan(label="indoor")), asker(labels=("indoor",)), "", id="label"),
        pytest.param(
            rollout_of(Plan(below="1.0.0")), asker(),
            "not-targeted: the rollout of 2.0.0 is for devices below 1.0.0, this one runs 1.0.0",
            id="not-below",
        ),
        pytest.param(
            rollout_of(Plan(below="1.0.0")), asker(version=None),
            "not-targeted: the rollout of 2.0.0 is for devices below 1.0.0, "
            "this one does not say what it runs", id="says-no-version",
        ),
        pytest.param(rollout_of(Plan(below="1.0.1")), asker(), "", id="below"),
        pytest.param(
            rollout_of(Plan(below="1.0.0"), state=FINISHED), asker(),
            "not-targeted: the rollout of 2.0.0 is for devices below 1.0.0, this one runs 1.0.0",
            id="not-below-when-finished",
        ),
        pytest.param(rollout_of(LAB, state=FINISHED), asker(), "", id="finished"),
        pytest.param(rollout_of(LAB, state=FINISHED), Asker(""), "", id="finished-nobody"),
        pytest.param(
            rollout_of(LAB, state=PAUSED, reason="lunch"), asker(is_member=True),
            "paused: the rollout of 2.0.0 is paused: lunch", id="paused",
        ),
        pytest.param(
            rollout_of(LAB, state=HALTED), asker(is_member=True),
            "halted: the rollout of 2.0.0 is halted", id="halted",
        ),
        pytest.param(
            rollout_of(LAB, state=ABORTED, reason="it smokes"), asker(is_member=True),
            "aborted: the rollout of 2.0.0 is aborted: it smokes", id="aborted",
        ),
    ],
)  # fmt: skip
def test_device_that_waits_is_told_why(rollout: Rollout, asks: Asker, sentence: str) -> None:
    assert re.fullmatch(sentence, str(objection(rollout, FULL, asks) or ""))


# -- What people do with it ------------------------------------------------------------------------

RESULT_OF = {
    ("pause", RUNNING): PAUSED,
    ("resume", PAUSED): RUNNING,
    ("resume", HALTED): RUNNING,
    ("abort", RUNNING): ABORTED,
    ("abort", PAUSED): ABORTED,
    ("abort", HALTED): ABORTED,
    ("finish", RUNNING): FINISHED,
    ("finish", PAUSED): FINISHED,
}


@pytest.mark.parametrize(("do", "state"), list(product(CONTROLS, STATES)))
def test_what_may_be_done_depends_on_the_state(do: str, state: str) -> None:
    rollout = rollout_of(LAB, state=state, stage=1, reason="before")
    if (do, state) in RESULT_OF:
        after = control(rollout, FULL, do, "because", NOW + 9)
        assert (after.state, after.reason) == (RESULT_OF[do, state], "because")
        assert (after.stage, after.plan) == (1, LAB)
        assert after.opened == (NOW + 9 if do == "resume" else NOW)
        assert after.excused == ((0, 0, 0, 0) if (do, state) == ("resume", HALTED) else ())
    else:
        with pytest.raises(Refused, match=f"a rollout that is {state} has nothing to {do}") as why:
            control(rollout, FULL, do, "", NOW)
        assert why.value.status == 409


@pytest.mark.parametrize("state", STATES)
def test_next_stage_is_opened_by_hand_only_while_it_runs(state: str) -> None:
    rollout = rollout_of(LAB, state=state)
    if state == RUNNING:
        after = control(rollout, FULL, "advance", "", NOW + 9)
        assert after == replace(rollout, stage=1, opened=NOW + 9)
        return
    with pytest.raises(Refused, match=f"is {state} opens no stage: resume it first") as why:
        control(rollout, FULL, "advance", "", NOW)
    assert why.value.status == 409


def test_behind_the_last_stage_there_is_none_to_open() -> None:
    with pytest.raises(Refused, match="its last stage is open already: finish it, if it is good"):
        control(rollout_of(LAB, stage=3), {}, "advance", "", NOW)


# -- Plans -----------------------------------------------------------------------------------------


@given(PLANS)
def test_plan_that_was_kept_is_the_same(plan: Plan) -> None:
    assert plan_of(plan_text(plan)) == plan
    assert read_plan(json.loads(plan_text(plan))) == plan


def test_what_a_plan_does_not_say_is_as_usual() -> None:
    assert read_plan({}) == Plan() == Plan((Stage(),))
    assert read_plan({"stages": [{"count": 1}, {}], "below": "v7.2"}) == Plan(
        (Stage(count=1), Stage()), below="7.2.0"
    )
    assert plan_of(plan_text(WATCHED)) == WATCHED


@pytest.mark.parametrize(
    "stages",
    [
        [{"group": "lab"}, {"percent": 5}, {}],
        [{"count": 1}, {"percent": 5}, {}],
        [{"count": 5}, {"count": 5}, {}],
        [{"percent": 5}, {"percent": 5, "wait": 60}],
        [{}] * MAX_STAGES,
    ],
)
def test_plan_whose_stages_grow_is_taken(stages: list[dict[str, Any]]) -> None:
    assert len(read_plan({"stages": stages}).stages) == len(stages)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ([], "a plan is an object with fields"),
        ({"stages": {}}, "stages of a plan is a list"),
        ({"stages": "5"}, "stages of a plan is a list"),
        ({"stages": ["5"]}, "stage 1 is an object with fields"),
        ({"stages": []}, "a rollout has 1 to 20 stages"),
        ({"stages": [{}] * (MAX_STAGES + 1)}, "a rollout has 1 to 20 stages"),
        ({"speed": 9}, "a plan has no 'speed'"),
        ({"stages": [{}, {"share": 9}]}, "stage 2 has no 'share'"),
        ({"pace": "9"}, "pace of a plan is a whole number"),
        ({"pace": 9.0}, "pace of a plan is a whole number"),
        ({"pace": True}, "pace of a plan is a whole number"),
        ({"pace": None}, "pace of a plan is a whole number"),
        ({"urgent": 1}, "urgent of a plan is true or false"),
        ({"group": 1}, "group of a plan is a text"),
        ({"stages": [{"percent": "5"}]}, "percent of stage 1 is a whole number"),
        ({"stages": [{"percent": 0}]}, "stage 1: percent is 1 to 100, threshold 0 to 100"),
        ({"stages": [{"percent": 101}]}, "stage 1: percent is 1 to 100, threshold 0 to 100"),
        ({"stages": [{}, {"threshold": -1}]}, "stage 2: percent is 1 to 100, threshold 0 to 100"),
        ({"stages": [{"threshold": 101}]}, "stage 1: percent is 1 to 100, threshold 0 to 100"),
        ({"stages": [{"count": -1}]}, "count of stage 1 is 0 to 10000000"),
        ({"stages": [{"proven": MAX_DEVICES + 1}]}, "proven of stage 1 is 0 to 10000000"),
        ({"stages": [{"wait": -1}]}, "wait of stage 1 is 0 to 10000000"),
        ({"stages": [{"minimum": -1}]}, "minimum of stage 1 is 0 to 10000000"),
        ({"pace": -1}, "pace is 0 to 10000000"),
        ({"at_once": -1}, "at_once is 0 to 10000000"),
        ({"patience": MAX_DEVICES + 1}, "patience is 0 to 10000000"),
        ({"period": 0}, "period is 1 to 31622400 seconds"),
        ({"period": MAX_SECONDS + 1}, "period is 1 to 31622400 seconds"),
        ({"below": "seven"}, "'seven' is no version such as 1.2.3"),
        (
            {"stages": [{"percent": 50}, {"percent": 20}]},
            "stage 2 has fewer devices than the one before it",
        ),
        (
            {"stages": [{}, {"count": 5}, {"count": 3}]},
            "stage 3 has fewer devices than the one before it",
        ),
    ],
)
def test_plan_that_cannot_be_is_refused_with_a_sentence(plan: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_plan(plan)


def test_plan_that_is_no_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        plan_of("{")


# -- A fleet ---------------------------------------------------------------------------------------


class Fleet(RuleBasedStateMachine):
    """Devices ask, come to something, time passes, people interfere; what must hold, holds."""

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, tuple[int, str]] = {}  # stage and standing
        self.now = NOW

    @initialize(plan=PLANS)
    def begin(self, plan: Plan) -> None:
        """A rollout that nobody was granted yet."""
        self.rollout = rollout_of(replace(plan, group="", label="", below=""))

    @property
    def results(self) -> Results:
        """The members, counted."""
        found: dict[int, Counter[str]] = {}
        for stage, came_to in self.members.values():
            found.setdefault(stage, Counter())[came_to] += 1
        return {
            at: Counts(*(each[name] for name in (OPEN, *OUTCOMES))) for at, each in found.items()
        }

    def look(self) -> None:
        """What everybody does first: sees how the rollout stands."""
        before, results = self.rollout, self.results
        after = advance(before, results, self.now)
        for number in range(before.stage, after.stage):
            self.check_opening(before, after, number)
        if after.state == HALTED and before.state == RUNNING:
            assert any(self.is_bad(after, number) for number in range(after.stage + 1))
        self.rollout = after

    def check_opening(self, before: Rollout, after: Rollout, number: int) -> None:
        """A stage was left: were all that are still open to fail, it would be no bad one."""
        if after.plan.urgent and number:
            return
        stage, counts = after.plan.stages[number], self.results.get(number, Counts())
        excused = after.excused[number] if after.excused else 0
        lost = counts.failed + counts.open - excused
        assert lost * 100 <= stage.threshold * (lost + counts.proven)
        assert counts.proven >= min(stage.proven, counts.devices - excused)
        if number == before.stage:
            assert self.now >= before.opened + stage.wait
        else:
            assert stage.wait == 0  # it was opened just now

    def is_bad(self, rollout: Rollout, number: int) -> bool:
        """Whether more of a stage failed than may, of those that nobody has put up with."""
        stage = rollout.plan.stages[number]
        came_to = [each for at, each in self.members.values() if at == number and each != OPEN]
        failed = sum(each != PROVEN for each in came_to)
        excused = rollout.excused[number] if rollout.excused else 0
        decided = len(came_to) - excused
        return decided > 0 and (failed - excused) * 100 > stage.threshold * decided

    @rule(number=st.integers(0, 40), group=st.sampled_from(["", "lab"]))
    def ask(self, number: int, group: str) -> None:
        """A device asks; if nothing speaks against it, it is granted the release."""
        self.look()
        device = mac(number)
        who = asker(number, group=group, is_member=device in self.members)
        if objection(self.rollout, self.results, who):
            return
        assert self.rollout.state in {RUNNING, FINISHED}
        if self.rollout.state == RUNNING and not who.is_member:
            stages = self.rollout.plan.stages[: self.rollout.stage + 1]
            room = [each.count + sum(self.rollout.excused) for each in stages if each.count]
            assert len(room) < len(stages) or len(self.members) < max(room)
            self.members[device] = self.rollout.stage, OPEN

    @precondition(lambda self: self.members)
    @rule(data=st.data(), outcome=st.sampled_from([OPEN, *OUTCOMES, PROVEN, PROVEN]))
    def settle(self, data: st.DataObject, outcome: str) -> None:
        """A device came to something, perhaps to something else than before."""
        device = data.draw(st.sampled_from(sorted(self.members)))
        self.members[device] = self.members[device][0], outcome
        self.look()

    @rule(seconds=st.integers(1, HOUR))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now += seconds
        self.look()

    @rule(do=st.sampled_from(["pause", "resume", "resume", "resume", "advance"]))
    def interfere(self, do: str) -> None:
        """Somebody does what is possible."""
        self.look()
        before = self.rollout
        try:
            self.rollout = control(before, self.results, do, "", self.now)
        except Refused:
            return
        assert self.rollout.stage == before.stage + (do == "advance")

    @invariant()
    def nothing_is_left_to_see(self) -> None:
        """Two who look at once see the same."""
        after = advance(self.rollout, self.results, self.now)
        assert advance(after, self.results, self.now) == after
        if after.state == RUNNING:
            for number in range(after.stage + 1):
                stage, counts = after.plan.stages[number], self.results.get(number, Counts())
                excused = after.excused[number] if after.excused else 0
                if counts.decided - excused >= max(1, stage.minimum):
                    assert not self.is_bad(after, number)


Fleet.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestFleet = Fleet.TestCase


@settings(max_examples=150)
@given(
    plan=PLANS,
    threshold=st.integers(0, 49),
    more=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    pace=st.integers(1, 10),
)
def test_bad_release_never_gets_past_its_first_stage(
    plan: Plan, threshold: int, more: float, seed: int, pace: int
) -> None:
    stages = tuple(replace(each, threshold=threshold, group="") for each in plan.stages)
    plan = Plan(stages, urgent=plan.urgent)
    least = max(0.01, 2 * threshold / 100)
    bricks = least + (1 - least) * more  # the part of the devices that do not survive it
    chance = random.Random(seed)  # noqa: S311 - a test
    rollout, members = rollout_of(plan), dict[str, str]()
    fleet = [mac(number) for number in range(60)]
    late: list[tuple[str, str]] = []  # what became of them, before anybody knows

    def results() -> Results:
        return standing(*members.values())

    for turn in range(30):
        granted = 0
        for device in chance.sample(fleet, len(fleet)):
            rollout = advance(rollout, results(), NOW + turn * HOUR)
            who = Asker(device, BEFORE, is_member=device in members)
            if device in members or granted == pace or objection(rollout, results(), who):
                continue
            granted += 1
            count = len(members)
            is_bad = ceil((count + 1) * bricks) > ceil(count * bricks)
            late.append((device, chance.choice(FAILURES) if is_bad else PROVEN))
            members[device] = OPEN
        chance.shuffle(late)
        for _ in range(chance.randint(0, len(late))):
            device, came_to = late.pop()
            members[device] = came_to
    members.update(late)
    rollout = advance(rollout, results(), NOW + 99 * HOUR)
    assert rollout.stage == 0
    first = plan.stages[0]
    share = sum(share_of(device, "firmware", "2.0.0") < first.percent for device in fleet)
    assert len(members) <= min(first.count or 60, share, 30 * pace)
    if len(members) >= max(1, min(first.minimum, first.count or 60)):
        assert rollout.state == HALTED
