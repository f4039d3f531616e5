"""Who gets a release when: stages, which open one after the other while the release proves good.

    advance(rollout, results, now)            -> the rollout as it stands: later stage, or halted
    objection(rollout, results, asker, now)   -> why this device has to wait, or None

Pure: no clock, no I/O. A stage is a share of the devices, chosen by a hash of device and release,
so that a larger share only adds devices; or a number of them, the first that ask; or both. What a
stage lets in, those behind it let in, too. A stage ends when enough devices have proven the
release, and even if all that are still open failed, not too many would have. A rollout halts as
soon as too many have. The last stage ends the rollout if it is for all; else somebody does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple

from ota_server import Objection, Refused, Version, shown

RUNNING, PAUSED, HALTED, ABORTED, FINISHED = "running", "paused", "halted", "aborted", "finished"
STATES = (RUNNING, PAUSED, HALTED, ABORTED, FINISHED)
MAX_STAGES = 20
MAX_DEVICES = 10_000_000
MAX_SECONDS = 366 * 86_400


@dataclass(frozen=True, slots=True)
class Stage:
    """Who may have the release, and what must be seen before the next stage opens."""

    percent: int = 100  # of the devices
    count: int = 0  # devices of this stage and those before it at most; 0: any number
    group: str = ""  # only devices of this group; "": of any
    proven: int = 5  # devices that must have proven it; all of a stage with fewer places
    wait: int = 0  # seconds that it stays open at least
    threshold: int = 10  # percent of failures, of those decided; more halt the rollout
    minimum: int = 5  # devices decided before that counts; all of a stage with fewer places


@dataclass(frozen=True, slots=True)
class Plan:
    """How a release is to go out."""

    stages: tuple[Stage, ...] = (Stage(),)
    pace: int = 0  # grants in a period at most; 0: any number
    period: int = 3_600  # seconds
    at_once: int = 0  # downloads at a time; 0: any number
    patience: int = 0  # seconds for a device to come back; 0: by its own interval
    below: str = ""  # only devices that run something older; "": any
    group: str = ""  # only devices of this group; "": of any
    label: str = ""  # only devices with this label; "": with any
    urgent: bool = False  # behind the first stage, no stage waits


# What holds for a release of which nobody made a plan: all may have it, until it turns out bad.
WATCHED = Plan((Stage(proven=10, wait=30 * 86_400, threshold=50, minimum=10),))


@dataclass(frozen=True, slots=True)
class Rollout:
    """A release on its way to the fleet."""

    id: int  # 0: nobody was granted it yet
    project: str
    version: str  # in its normal form
    plan: Plan
    state: str = RUNNING
    stage: int = 0  # the one that is open
    opened: int = 0  # UTC seconds, when it was
    reason: str = ""  # why it is not running
    created: int = 0  # UTC seconds
    who: str = ""  # "": by itself
    excused: tuple[int, ...] = ()  # failures of each stage that somebody has put up with

    @property
    def is_watched(self) -> bool:
        """Whether it is only looked after, as nobody made a plan."""
        return self.plan == WATCHED


class Counts(NamedTuple):
    """The devices of a stage, by what their last decided attempt came to."""

    open: int = 0  # none of theirs is decided
    proven: int = 0
    returned: int = 0
    broken: int = 0
    silent: int = 0

    @property
    def failed(self) -> int:
        """Those that did not get to run it."""
        return self.returned + self.broken + self.silent

    @property
    def decided(self) -> int:
        """Those of which one knows."""
        return self.failed + self.proven

    @property
    def devices(self) -> int:
        """All."""
        return self.decided + self.open


Results = Mapping[int, Counts]  # by stage


class Asker(NamedTuple):
    """The device that asks."""

    device: str  # "": it does not say, or could not prove anything
    version: Version | None = None  # that it runs
    group: str = ""
    labels: Sequence[str] = ()
    is_member: bool = False  # of the rollout: it was granted the release before


# -- 1. How a rollout goes on ----------------------------------------------------------------------


def advance(rollout: Rollout, results: Results, now: int) -> Rollout:
    """The rollout as it stands at a time (UTC seconds); only a running one changes."""
    if rollout.state == RUNNING:
        rollout = _mended(rollout, results)
    while rollout.state == RUNNING:
        if reason := _failure(rollout, results):
            return replace(rollout, state=HALTED, reason=reason)
        is_last = rollout.stage + 1 == len(rollout.plan.stages)
        if not _is_over(rollout, results, now) or (is_last and not _is_for_all(rollout)):
            return rollout
        if is_last:
            reason = "every stage has proven it"
            return replace(rollout, state=FINISHED, reason=reason)
        rollout = replace(rollout, stage=rollout.stage + 1, opened=now)
    return rollout


def _mended(rollout: Rollout, results: Results) -> Rollout:
    """Without excuses for failures that are none any more: they would excuse the next ones."""
    failures = (results.get(number, Counts()).failed for number in range(len(rollout.excused)))
    excused = tuple(map(min, rollout.excused, failures))
    return rollout if excused == rollout.excused else replace(rollout, excused=excused)


def _failure(rollout: Rollout, results: Results) -> str:
    """Why the release is bad, in a sentence; "": it does not look so."""
    for number, stage in enumerate(rollout.plan.stages[: rollout.stage + 1]):
        counts = results.get(number, Counts())
        excused = _excused(rollout, number)
        failed, decided = counts.failed - excused, counts.decided - excused
        enough = decided >= max(1, min(stage.minimum, places(rollout, number, results)))
        if enough and failed * 100 > stage.threshold * decided:
            parts = zip(counts[2:], Counts._fields[2:], strict=True)
            words = ", ".join(f"{amount} {word}" for amount, word in parts if amount)
            also = f"; {excused} of them no longer counted" * bool(excused)
            share = f"{failed} of {decided} devices of stage {number + 1} failed"
            return f"{share} ({words}{also}), more than {stage.threshold} %"
    return ""


def _is_over(rollout: Rollout, results: Results, now: int) -> bool:
    """Whether the open stage has shown enough."""
    number = rollout.stage
    stage, counts = rollout.plan.stages[number], results.get(number, Counts())
    if rollout.plan.urgent and 0 < number < len(rollout.plan.stages) - 1:
        return True
    return (
        counts.proven >= _wanted(rollout, number, results)
        and now >= rollout.opened + stage.wait
        and not _is_doubtful(stage, counts, _excused(rollout, number))
    )


def _wanted(rollout: Rollout, number: int, results: Results) -> int:
    """How many devices of a stage have to prove the release."""
    return min(max(1, rollout.plan.stages[number].proven), places(rollout, number, results))


def _is_doubtful(stage: Stage, counts: Counts, excused: int) -> bool:
    """Whether too many would have failed if nobody came back any more."""
    doubtful = counts.failed + counts.open - excused
    return doubtful * 100 > stage.threshold * (counts.devices - excused)


def _is_for_all(rollout: Rollout) -> bool:
    """Whether its last stage leaves nobody out."""
    stage = rollout.plan.stages[-1]
    return stage.percent == 100 and not (stage.count or stage.group)


def lacking(rollout: Rollout, results: Results) -> int:
    """How many more devices the open stage needs at least before it can be over."""
    counts = results.get(rollout.stage, Counts())
    return max(0, _wanted(rollout, rollout.stage, results) - counts.devices)


def _excused(rollout: Rollout, number: int) -> int:
    return rollout.excused[number] if number < len(rollout.excused) else 0


def places(rollout: Rollout, number: int, results: Results) -> int:
    """How many devices can be of a stage: its count has those of the stages before, too."""
    count = rollout.plan.stages[number].count
    return max(0, count - _taken(rollout, results, number)) if count else MAX_DEVICES


def _taken(rollout: Rollout, results: Results, before: int = MAX_STAGES) -> int:
    """Places that devices have in the stages before one; failures put up with make room."""
    found = ((each.devices, number) for number, each in results.items() if number < before)
    return sum(devices - _excused(rollout, number) for devices, number in found)


# -- 2. Who may have it ----------------------------------------------------------------------------


def share_of(device: str, project: str, version: str) -> float:
    """Where a device stands among all, for this release: 0 <= share < 100."""
    digest = sha256(f"{device}\n{project}\n{version}".encode()).digest()
    return int.from_bytes(digest[:6]) * 100 / (1 << 48)


def objection(rollout: Rollout, results: Results, asker: Asker) -> Objection | None:
    """Why a device does not get the release, as far as stages and state say so."""
    name = f"the rollout of {rollout.version}"
    if target := _off_target(rollout.plan, asker):
        return Objection("not-targeted", f"{name} is {target}", usual=True)
    if rollout.state == FINISHED:
        return None
    if rollout.state != RUNNING:
        why = f": {rollout.reason}" if rollout.reason else ""
        return Objection(rollout.state, f"{name} is {rollout.state}{why}", usual=True)
    if asker.is_member:
        return None
    if reason := _waits(rollout, results, asker):
        where = f"{name} is at stage {rollout.stage + 1} of {len(rollout.plan.stages)}"
        return Objection("waiting-for-stage", f"{where}: {reason}", usual=True)
    return None


def is_meant(rollout: Rollout, results: Results, asker: Asker) -> bool:
    """Whether a device would come into the open stage, if it asked."""
    return not (_off_target(rollout.plan, asker) or _waits(rollout, results, asker))


def _off_target(plan: Plan, asker: Asker) -> str:
    """Why a device is none of those that the release is for; "": it is."""
    if plan.group and asker.group != plan.group:
        return f"for the group {shown(plan.group)}, the device is {_group(asker)}"
    if plan.label and plan.label not in asker.labels:
        return f"for devices with the label {shown(plan.label)}"
    if plan.below and asker.version is None:
        return f"for devices below {plan.below}, this one does not say what it runs"
    if plan.below and asker.version and asker.version >= Version.parse(plan.below):
        return f"for devices below {plan.below}, this one runs {asker.version}"
    return ""


def _group(asker: Asker) -> str:
    return f"in {shown(asker.group)}" if asker.group else "in none"


def _waits(rollout: Rollout, results: Results, asker: Asker) -> str:
    """Why no stage that is open has room for a device; "": one has."""
    stages = rollout.plan.stages
    if not asker.device:
        free = rollout.stage + 1 == len(stages) and _is_for_all(rollout)
        return "" if free else "who does not say its MAC and what it runs waits for the last"
    share = share_of(asker.device, rollout.project, rollout.version)
    taken = _taken(rollout, results)
    reasons = [_is_full(each, asker, share, taken) for each in stages[: rollout.stage + 1]]
    return reasons[-1] if all(reasons) else ""


def _is_full(stage: Stage, asker: Asker, share: float, taken: int) -> str:
    """Why a stage does not have room for a device; "": it has."""
    if stage.group and asker.group != stage.group:
        return f"it is for the group {shown(stage.group)}, the device is {_group(asker)}"
    if share >= stage.percent:
        return f"{stage.percent} % of the devices may have it, this one comes at {share:.2f} %"
    if stage.count and taken >= stage.count:
        return f"its {stage.count} places are taken" if stage.count > 1 else "its place is taken"
    return ""


# -- 3. What people do with it ---------------------------------------------------------------------

# What may be done in which state, and what comes of it
CONTROLS: Mapping[str, tuple[Sequence[str], str]] = {
    "pause": ((RUNNING,), PAUSED),
    "resume": ((PAUSED, HALTED), RUNNING),
    "abort": ((RUNNING, PAUSED, HALTED), ABORTED),
    "finish": ((RUNNING, PAUSED), FINISHED),  # one that has halted is resumed before
}


def control(rollout: Rollout, results: Results, do: str, reason: str, now: int) -> Rollout:
    """The rollout after somebody did something with it, a key of CONTROLS; or "advance".

    Once one that has halted is resumed, the failures there are count no longer; the wait begins
    anew.

    Raises:
        Refused: 409, that is not possible in its state.
    """
    if do == "advance":
        return _opened(rollout, now)
    states, state = CONTROLS[do]
    if rollout.state not in states:
        raise Refused(409, f"a rollout that is {rollout.state} has nothing to {do}")
    if do == "resume":
        rollout = replace(rollout, opened=now)
    if do == "resume" and rollout.state == HALTED:
        failed = (results.get(each, Counts()).failed for each in range(len(rollout.plan.stages)))
        rollout = replace(rollout, excused=tuple(failed))
    return replace(rollout, state=state, reason=reason)


def _opened(rollout: Rollout, now: int) -> Rollout:
    """With its next stage open, as somebody does not want to wait."""
    if rollout.state != RUNNING:
        raise Refused(409, f"a rollout that is {rollout.state} opens no stage: resume it first")
    if rollout.stage + 1 == len(rollout.plan.stages):
        raise Refused(409, "its last stage is open already: finish it, if it is good")
    return replace(rollout, stage=rollout.stage + 1, opened=now)


# -- 4. In words -----------------------------------------------------------------------------------


def standing(rollout: Rollout, results: Results, asker: Asker) -> str:
    """Why a device to which objection() says nothing may have the release, in a sentence."""
    name = f"the rollout of {rollout.version}"
    if rollout.state == FINISHED:
        return f"{name} is finished"
    if rollout.is_watched:
        return f"{rollout.version} has no stages: all may have it, until too many fail"
    if asker.is_member:
        return f"{name} has given it to the device before"
    where = f"{name} is at stage {rollout.stage + 1} of {len(rollout.plan.stages)}"
    return f"{where}: {_lets_in(rollout, results, asker)}"


def _lets_in(rollout: Rollout, results: Results, asker: Asker) -> str:
    """Why a stage that is open has room for a device, the last one that has."""
    share = share_of(asker.device, rollout.project, rollout.version)
    taken = _taken(rollout, results)
    stages = rollout.plan.stages[: rollout.stage + 1]
    fitting = (each for each in reversed(stages) if not _is_full(each, asker, share, taken))
    stage, found = next(fitting, stages[-1]), []
    if stage.group:
        found.append(f"the device is in the group {shown(stage.group)}")
    if stage.percent < 100:
        found.append(f"it is in the {stage.percent} % that may have it: {share:.2f} %")
    if stage.count:
        found.append(f"{taken} of {stage.count} places are taken")
    return ", ".join(found) or "all devices may have it"


def missing(rollout: Rollout, results: Results, now: int) -> str:
    """What keeps a running rollout at its stage, in a sentence; "": nothing, or it does not run."""
    if rollout.state != RUNNING:
        return ""
    number = rollout.stage
    if _is_over(rollout, results, now):
        is_last = number + 1 == len(rollout.plan.stages)
        return "" if not is_last or _is_for_all(rollout) else "somebody has to finish it"
    stage, counts = rollout.plan.stages[number], results.get(number, Counts())
    more, until = _wanted(rollout, number, results) - counts.proven, rollout.opened + stage.wait
    found = []
    if more > 0:
        found.append(f"{more} more {'device has' if more == 1 else 'devices have'} to prove it")
    if now < until:
        clock = datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%d %H:%M UTC")
        found.append(f"it stays open until {clock}")
    if _is_doubtful(stage, counts, _excused(rollout, number)):
        also = f", with the {counts.open} of which nobody knows yet" * bool(counts.open)
        found.append(f"no more than {stage.threshold} % may have failed{also}")
    return ", ".join(found)


# -- 5. Plans as JSON ------------------------------------------------------------------------------

_TYPES: Mapping[type, str] = {
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
}


def plan_text(plan: Plan) -> str:
    """A plan as it is kept."""
    return json.dumps(asdict(plan), separators=(",", ":"), sort_keys=True)


def read_plan(data: Mapping[str, Any]) -> Plan:
    """A plan of the fields of Plan and Stage; what is missing is as there.

    Raises:
        ValueError: no plan can be like this; a sentence says why.
    """
    rest = _fields(Plan, data, "a plan")
    found = enumerate(rest.pop("stages", [{}]), 1)
    stages = (Stage(**_fields(Stage, each, f"stage {number}")) for number, each in found)
    plan = Plan(tuple(stages), **rest)
    _check_plan(plan)
    return replace(plan, below=str(Version.parse(plan.below)) if plan.below else "")


def _fields(kind: type[Plan | Stage], data: Any, what: str) -> dict[str, Any]:
    """What is said of a plan or a stage. ValueError: it has no such field, or no such value."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is an object with fields")  # noqa: TRY004 - so it was written
    usual = {each.name: type(each.default) for each in fields(kind)}
    for name, value in data.items():
        if name not in usual:
            raise ValueError(f"{what} has no {shown(str(name))}")
        if (tuple if type(value) is list else type(value)) is not usual[name]:
            raise ValueError(f"{name} of {what} is {_TYPES[usual[name]]}")
    return dict(data)


def plan_of(text: str) -> Plan:
    """A plan that was kept by plan_text(). ValueError: it is none."""
    return read_plan(json.loads(text))


def _check_plan(plan: Plan) -> None:
    """ValueError: no plan can be like this."""
    if not 1 <= len(plan.stages) <= MAX_STAGES:
        raise ValueError(f"a rollout has 1 to {MAX_STAGES} stages")
    amounts = {"pace": plan.pace, "at_once": plan.at_once, "patience": plan.patience}
    for number, stage in enumerate(plan.stages, 1):
        amounts |= {
            f"count of stage {number}": stage.count,
            f"proven of stage {number}": stage.proven,
            f"wait of stage {number}": stage.wait,
            f"minimum of stage {number}": stage.minimum,
        }
        if not (1 <= stage.percent <= 100 and 0 <= stage.threshold <= 100):
            raise ValueError(f"stage {number}: percent is 1 to 100, threshold 0 to 100")
    if wrong := [name for name, amount in amounts.items() if not 0 <= amount <= MAX_DEVICES]:
        raise ValueError(f"{wrong[0]} is 0 to {MAX_DEVICES}")
    if not 1 <= plan.period <= MAX_SECONDS:
        raise ValueError(f"period is 1 to {MAX_SECONDS} seconds")
    _check_growth(plan.stages)


def _check_growth(stages: Sequence[Stage]) -> None:
    """ValueError: a stage would take away what one before it gave."""
    for number, (before, after) in enumerate(pairwise(stages), 2):
        fewer = after.percent < before.percent and not before.count and not before.group
        if fewer or 0 < after.count < before.count:
            raise ValueError(f"stage {number} has fewer devices than the one before it")
