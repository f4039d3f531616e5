"""What requests and answers hold about rollouts, attempts and who gets what; see openapi.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ota_fleet.attempts import OUTCOMES, Attempt
from ota_fleet.openapi import NAME, PAGE, VERSION, WHEN, Schema, flag, number, record, several, text
from ota_fleet.policy import ANSWERS, MAX_FLOORS, MAX_WINDOW, Policy
from ota_fleet.rollout import (
    CONTROLS,
    MAX_DEVICES,
    MAX_SECONDS,
    MAX_STAGES,
    STATES,
    Counts,
    Results,
    Rollout,
    missing,
    plan_of,
)
from ota_fleet.rows import MAX_LONG, MAX_TEXT

# -- 1. Plans and rollouts -------------------------------------------------------------------------


def _amount(about: str, least: int = 0, most: int = MAX_DEVICES, **more: Any) -> Schema:
    return number(about, minimum=least, maximum=most, **more)


STAGE: Mapping[str, Schema] = {
    "percent": _amount("of the devices that may have it", 1, 100, default=100),
    "count": _amount("devices of this stage and those before at most; 0: any number"),
    "group": text("only devices of this group", maxLength=MAX_TEXT),
    "proven": _amount(
        "devices that must have proven it; all of a stage with fewer places", default=5
    ),
    "wait": _amount("seconds that the stage stays open at least"),
    "threshold": _amount("percent of failures, of those known; more halt it", 0, 100, default=10),
    "minimum": _amount(
        "devices of which one knows before that counts; all of a stage with fewer places", default=5
    ),
}
GOALS: Mapping[str, Schema] = {
    "pace": _amount("grants in a period at most; 0: any number"),
    "period": _amount("seconds", 1, MAX_SECONDS, default=3600),
    "at_once": _amount("downloads at a time; 0: any number"),
    "patience": _amount("seconds for a device to come back; 0: by its own interval"),
    "below": text("only devices that run something older than this version", maxLength=MAX_TEXT),
    "group": text("only devices of this group", maxLength=MAX_TEXT),
    "label": text("only devices with this label", maxLength=MAX_TEXT),
    "urgent": flag("behind the first stage, no stage waits"),
}
PLAN: Mapping[str, Schema] = {
    "stages": several(record(None, **STAGE), maxItems=MAX_STAGES),
    **GOALS,
}
COUNTS = record(**{each: number() for each in Counts._fields})
BEGUN = record([*PLAN], version=NAME, **PLAN)
ROLLOUT = record(
    id=number(),
    project=text(),
    version=VERSION,
    state=text(enum=[*STATES]),
    stage=number("the one that is open, from 1"),
    opened=WHEN,
    missing=text("what that stage has to show before the next one opens; empty: nothing"),
    reason=text("why it is not running"),
    created=WHEN,
    who=text("empty: it began by itself"),
    watched=flag("nobody made a plan: it only stops by itself"),
    stages=several(record(**STAGE, counts=COUNTS)),
    **GOALS,
)
CONTROL = record(
    ["reason"],
    do=text("advance: opens the next stage", enum=[*CONTROLS, "advance"]),
    reason=text(maxLength=MAX_LONG),
)
OF_PROJECT: Mapping[str, Schema] = {"project": text("its name or alias"), **PAGE}
OF_STAGE: Mapping[str, Schema] = {
    "stage": number("only of this one, from 1", minimum=1, maximum=MAX_STAGES),
    **PAGE,
}
OUTCOME = text("empty: nobody knows yet", enum=["", *OUTCOMES])
MEMBER = record(
    device=text(), stage=number("in which it was given the release first, from 1"), outcome=OUTCOME
)
ATTEMPT = record(
    id=number(),
    device=text(),
    lane=text(enum=["sketch", "filesystem"]),
    project=text(),
    version=VERSION,
    sha256=text("of the file"),
    size=number("bytes"),
    sent=number("bytes that have left"),
    rollout=number("0: none"),
    before=text("the version that it ran; empty: it did not say"),
    granted=WHEN,
    deadline=number("UTC seconds; from then on it is silent"),
    ended=number("UTC seconds; 0: nobody knows the outcome yet"),
    outcome=OUTCOME,
)


def rollout_json(rollout: Rollout, results: Results, now: int) -> dict[str, Any]:
    """A rollout as ROLLOUT has it."""
    goals = asdict(rollout.plan)
    stages = [
        {**stage, "counts": results.get(position, Counts())._asdict()}
        for position, stage in enumerate(goals.pop("stages"))
    ]
    own = {each: getattr(rollout, each) for each in ROLLOUT["properties"] if hasattr(rollout, each)}
    return {
        **own,
        "stage": rollout.stage + 1,
        "missing": missing(rollout, results, now),
        "watched": rollout.is_watched,
        "stages": stages,
        **goals,
    }


def attempt_json(attempt: Attempt) -> dict[str, Any]:
    """An attempt as ATTEMPT has it."""
    return {each: getattr(attempt, each) for each in ATTEMPT["properties"]}


# -- 2. Who gets what ------------------------------------------------------------------------------

ANSWER = text("empty: as it is said elsewhere", enum=[*ANSWERS])
CHANNEL = text("everybody has stable; empty: as it is said elsewhere", maxLength=64)
PIN = text("the one version to run, also downwards; empty: none", maxLength=MAX_TEXT)
SAID: Mapping[str, Schema] = {
    "hold": ANSWER,
    "window": text(
        "such as Mon-Fri 22:00-05:00 Europe/Berlin, without a zone in UTC; always; empty: as it is "
        "said elsewhere",
        maxLength=MAX_WINDOW,
    ),
    "approval": ANSWER,
}
FLOORS = several(NAME, "versions that no device jumps over", maxItems=MAX_FLOORS)
AGAIN = text("the version that it is given once more", maxLength=MAX_TEXT)
OF_DEVICE: Mapping[str, Schema] = {**SAID, "again": AGAIN}
OF_GROUP: Mapping[str, Schema] = {"channel": CHANNEL, "pin": PIN, **SAID}
OF_ALL: Mapping[str, Schema] = {
    "channel": CHANNEL,
    **SAID,
    "floors": FLOORS,
    "plan": {
        "description": "by which new releases go out; {}: they are only watched",
        **record(None, **PLAN),
    },
}
HOLDS = record(channel=CHANNEL, pin=PIN, **SAID, floors=FLOORS, again=AGAIN)
DEVICE_POLICY = record(**OF_DEVICE, holds=HOLDS)
GROUP_POLICY = record(name=text(), **OF_GROUP)
PROJECT_POLICY = record(
    **OF_ALL, since=number("UTC seconds: older releases do not go by that plan")
)
APPROVAL = record(device=text(), project=text(), version=VERSION, at=WHEN, who=text())
SHELF = record(channel=text("empty: as its number says, beta for a pre-release", maxLength=64))


def policy_json(policy: Policy, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy says, of these fields."""
    found = {each: getattr(policy, each) for each in fields if hasattr(policy, each)}
    if "plan" in found:
        found["plan"] = asdict(plan_of(policy.plan)) if policy.plan else {}
    return found


# -- 3. Why ----------------------------------------------------------------------------------------

ASKED: Mapping[str, Schema] = {
    "device": text("need not be known, if there is a project"),
    "version": text("of the release; empty: what it gets, or the newest"),
    "project": text("empty: that of the device"),
    "running": text("the version that it runs; empty: what it said last"),
}
VERDICT = record(
    rule=text("its name"),
    code=text("of its objection; empty: it has none"),
    denies=flag("the device is told by 403, not by 304"),
    sentence=text(),
)
CANDIDATE = record(
    version=text(), name=text("of the file"), gets=flag(), code=text(), reason=text("a sentence")
)
EXPLANATION = record(
    ["rollout"],
    device=text(),
    known=flag(),
    project=text(),
    running=text("empty: it does not say"),
    version=text("of the release that this is about"),
    name=text("of its file"),
    gets=flag("it would get that release now"),
    code=text("of the objection; empty: there is none"),
    reason=text("a sentence"),
    looping=flag("it was given that release too often in vain"),
    verdicts=several(VERDICT, "of all rules, in their order"),
    releases=several(CANDIDATE, "the newest first"),
    rollout=ROLLOUT,
    attempts=several(ATTEMPT, "the last ones of the device"),
)
