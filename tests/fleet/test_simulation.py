"""The simulation of bench/, small: what a plan promises holds, whatever the luck."""

from __future__ import annotations

import pytest

from bench.simulation import (
    BAD,
    BETTER,
    DAY,
    FIRST,
    GOOD,
    HOUR,
    PROJECT,
    Case,
    Nature,
    Trial,
    plan_for,
    world_of,
)
from ota_fleet.attempts import OPEN, RETURNED, SILENT
from ota_fleet.rollout import FINISHED, HALTED, RUNNING, Plan, Stage

DEVICES = 500


def assert_kept(trial: Trial) -> None:
    """No grant was beyond what the plan allows."""
    assert (trial.beyond_stage, trial.beyond_pace) == (0, 0)


@pytest.mark.parametrize(("seed", "pace"), [(1, 0), (2, 12), (3, 0), (4, 12)])
def test_bad_release_reaches_the_first_stage_and_the_pace_and_good_ones_all(
    seed: int, pace: int
) -> None:
    case = Case(DEVICES, pace, seed, days=10)
    with world_of(case) as world:
        rollouts, plan = world.server.known.rollouts, plan_for(case)
        good = world.give(GOOD, plan, case.days)
        assert (len(good.reached), good.bricked, good.halted) == (DEVICES, 0, 0)
        bad = world.give(BAD, plan, case.days)
        assert (len(bad.reached), bad.most) == (FIRST, 0)
        assert 0 < bad.halted - bad.began <= plan.patience + DAY / 2  # that fill the first stage
        assert rollouts.get(2)[0].state == HALTED
        better = world.give(BETTER, plan, case.days)
        assert (len(better.reached), better.halted) == (DEVICES - bad.bricked, 0)
        assert len(good.stages) == len(better.stages) == len(plan.stages)
        for trial in (good, bad, better):
            assert_kept(trial)
        if pace:
            assert good.all - good.began >= (DEVICES / pace - 1) * HOUR
        world.run(4 * DAY, lambda: False)
        tally = world.server.known.grants.tally()
        assert (tally.get(OPEN, 0), tally[SILENT]) == (0, bad.bricked)


def test_pace_alone_bounds_a_bad_release() -> None:
    """Without stages it reaches what the pace lets through until enough have failed."""
    plan = Plan((Stage(minimum=10),), pace=20, patience=6 * HOUR)
    with world_of(Case(DEVICES, 20, 5, days=10)) as world:
        bad = world.give(BAD, plan, 10)
        assert 0 < bad.halted - bad.began <= 7 * HOUR
        assert len(bad.reached) <= 20 * (1 + (bad.halted - bad.began) // HOUR)
        assert_kept(bad)


def test_release_that_all_take_back_is_given_three_times_to_each_at_most() -> None:
    plan = Plan((Stage(threshold=100),))
    with world_of(Case(100, 0, 6, days=10)) as world:
        bad = world.give(Nature("2.0.0", returns=1.0), plan, 10)
        assert (len(bad.reached), bad.halted) == (100, 0)
        assert world.server.known.grants.tally() == {RETURNED: 300}
        assert len(world.server.known.grants.loops(1000)) == 100


def test_good_release_finishes_by_itself() -> None:
    plan = Plan((Stage(count=5, proven=4, threshold=20), Stage(proven=50, wait=DAY)))
    with world_of(Case(100, 0, 7, days=5)) as world:
        good = world.give(GOOD, plan, 5)
        found = world.server.known.rollouts.current(PROJECT, "2.0.0")
        assert found is not None
        assert (good.halted, len(good.reached)) == (0, 100)
        assert found[0].state in {RUNNING, FINISHED}
        world.run(2 * DAY, lambda: False)
        assert world.server.known.rollouts.get(1)[0].state == FINISHED
