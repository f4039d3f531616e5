"""Who gets what, where memory has a say; the rules of ota_server beside these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from ota_fleet.attempts import looping
from ota_fleet.policy import STABLE, Policy, is_open, next_floor, opens_at
from ota_server import (
    UNVERSIONED,
    Objection,
    Release,
    Report,
    Rule,
    Version,
    fit_unasked,
    only_newer,
    same_image,
    shown,
)

FINAL = Version.parse("1.0.0")  # any version that is no pre-release
MAX_REASON = 120  # characters of what a person typed: a device has room for short fields


def not_whitelisted(is_admitted: Callable[[str, str | None], bool]) -> Rule:
    """The rule that devices get images of a project only if they are admitted to it.

    `is_admitted` is asked for project and device on the loop, so it must not wait for anything.
    """
    return functools.partial(_not_whitelisted, is_admitted)


def _not_whitelisted(
    is_admitted: Callable[[str, str | None], bool], report: Report, release: Release
) -> Objection | None:
    if is_admitted(release.project, report.device):
        return None
    who = report.device or "a device that does not say its MAC"
    reason = f"{who} is not admitted to {shown(release.project)}"
    return Objection("not-whitelisted", reason, deny=True, final=True)


def withdrawn(reason_of: Callable[[Release], str | None]) -> Rule:
    """The rule that nobody gets what was taken back, but perhaps an older release.

    `reason_of` gives what a person typed when it was, None if it was not, on the loop.
    """
    return functools.partial(_withdrawn, reason_of)


def _withdrawn(
    reason_of: Callable[[Release], str | None], _report: Report, release: Release
) -> Objection | None:
    reason = reason_of(release)
    if reason is None:
        return None
    why = " ".join(reason.split())[:MAX_REASON]
    return Objection(
        "withdrawn", f"{release.version} was withdrawn{': ' * bool(why)}{why}", usual=True
    )


def fits_partition(size_of: Callable[[str], int]) -> Rule:
    """The rule that a sketch fits where the devices of its project keep one.

    `size_of` gives the bytes of that for a project, 0 if nobody knows, on the loop.
    """
    return functools.partial(_fits_partition, size_of)


def _fits_partition(
    size_of: Callable[[str], int], _report: Report, release: Release
) -> Objection | None:
    room = size_of(release.project)
    if not room or release.size <= room or release.kind != "sketch":
        return None
    reason = f"{release.version} has {release.size} bytes, the partition for it {room}"
    return Objection("too-big", reason)


PolicyOf = Callable[[str | None, str], Policy]  # of a device for a project; it must not wait


def towards_target(policy_of: PolicyOf) -> Rule:
    """only_newer, but for a device with a pin: it gets that version alone, also downwards.

    On its way it goes through the floors of the project. `again` lets it have what it runs.
    """
    return functools.partial(_towards_target, policy_of)


def _towards_target(policy_of: PolicyOf, report: Report, release: Release) -> Objection | None:
    policy = policy_of(report.device, release.project)
    again = policy.again and report.version == Version.parse(policy.again)
    if not (policy.pin or again):
        return only_newer(report, release)
    target = Version.parse(policy.again if again else policy.pin)
    if report.version == target and not again:
        reason = f"the device runs {policy.pin}, to which it is pinned"
        return Objection("not-newer", reason, final=True)
    floor = next_floor(policy.floors, report.version)
    if release.version == target:
        return None
    if release.version == floor and floor < target:
        return only_newer(report, release)
    reason = f"the device is pinned to {policy.pin}, this is {release.version}"
    return Objection("pinned", reason, usual=True)


def not_again(policy_of: PolicyOf, learned: Callable[[str], frozenset[str]]) -> Rule:
    """same_image, which does not end the search for the version to which a device is pinned.

    `learned` gives digests by which devices call the image with a SHA-256, on the loop.
    """
    return functools.partial(_not_again, policy_of, learned)


def _not_again(
    policy_of: PolicyOf,
    learned: Callable[[str], frozenset[str]],
    report: Report,
    release: Release,
) -> Objection | None:
    objection = same_image(report, release)
    if objection is None:
        called = {report.sketch_md5, report.sketch_sha256}
        if release.kind != "sketch" or learned(release.facts.sha256).isdisjoint(called):
            return None
        if report.version not in {None, release.version}:  # others may have lied
            return None
        reason = f"the device runs {release.version}, by what others call that image"
        objection = Objection("same-image", reason, final=True)
    policy = policy_of(report.device, release.project)
    if policy.again and release.version == Version.parse(policy.again) == report.version:
        return None
    if policy.pin and release.version != Version.parse(policy.pin):
        return objection._replace(final=False)
    return objection


def fit_for(policy_of: PolicyOf, channel_of: Callable[[Release], str]) -> Rule:
    """fit_unasked, and what is on another channel than the device goes to those that are pinned.

    `channel_of` gives the channel of a release, on the loop: it must not wait. Everybody has what
    is stable; a device on a channel has what is on that, too, such as pre-releases on beta.
    """
    return functools.partial(_fit_for, policy_of, channel_of)


def _fit_for(
    policy_of: PolicyOf,
    channel_of: Callable[[Release], str],
    report: Report,
    release: Release,
) -> Objection | None:
    objection = fit_unasked(report, release)
    if release.version == UNVERSIONED:
        return objection
    channel = channel_of(release)
    if objection is None and channel == STABLE:
        return None
    policy = policy_of(report.device, release.project)
    wanted = policy.pin and release.version == Version.parse(policy.pin)
    if wanted or (not policy.pin and channel in {STABLE, policy.channel}):
        return fit_unasked(report, replace(release, version=FINAL))  # all but that still holds
    if objection:
        return objection
    own = policy.channel or STABLE
    reason = f"{release.version} is on the channel {channel}, the device on {own}"
    return Objection("other-channel", reason, foreign=True, usual=True)


def not_held(policy_of: PolicyOf) -> Rule:
    """The rule that a device gets nothing as long as somebody holds it."""
    return functools.partial(_not_held, policy_of)


def _not_held(policy_of: PolicyOf, report: Report, release: Release) -> Objection | None:
    if policy_of(report.device, release.project).hold != "yes":
        return None
    return Objection("on-hold", "somebody holds the device, its group or its project", final=True)


def above_floors(policy_of: PolicyOf, has: Callable[[str, Version], bool]) -> Rule:
    """The rule that a device does not jump over a version that all must go through.

    `has` says on the loop whether a project has a release of a version.
    """
    return functools.partial(_above_floors, policy_of, has)


def _above_floors(
    policy_of: PolicyOf,
    has: Callable[[str, Version], bool],
    report: Report,
    release: Release,
) -> Objection | None:
    floors = policy_of(report.device, release.project).floors
    floor = next_floor(floors, report.version) if floors else None
    if floor is None or release.version <= floor:
        return None
    there = "" if has(release.project, floor) else ", which is not there"
    return Objection(
        "floor", f"from {report.version} it goes through {floor} first{there}", usual=True
    )


def in_window(policy_of: PolicyOf, now: Callable[[], float]) -> Rule:
    """The rule that images are given in a maintenance window; `now` is UTC seconds."""
    return functools.partial(_in_window, policy_of, now)


def _in_window(
    policy_of: PolicyOf, now: Callable[[], float], report: Report, release: Release
) -> Objection | None:
    window = policy_of(report.device, release.project).window
    at = int(now()) if window else 0
    if not window or is_open(window, at):
        return None
    opens = datetime.fromtimestamp(opens_at(window, at), UTC).strftime("%Y-%m-%d %H:%M UTC")
    reason = f"the maintenance window {shown(window)} is closed, it opens at {opens}"
    return Objection("outside-window", reason, usual=True)


def approved(policy_of: PolicyOf, is_approved: Callable[[str, str, str], bool]) -> Rule:
    """The rule that some devices get only what somebody approved for them.

    `is_approved` is asked for device, project and version on the loop: it must not wait.
    """
    return functools.partial(_approved, policy_of, is_approved)


def _approved(
    policy_of: PolicyOf,
    is_approved: Callable[[str, str, str], bool],
    report: Report,
    release: Release,
) -> Objection | None:
    policy, version = policy_of(report.device, release.project), release.version.text
    if policy.approval != "yes" or policy.pin == version:
        return None
    if report.device and is_approved(report.device, release.project, version):
        return None
    reason = f"nobody has approved {version} for the device yet"
    return Objection("waiting-for-approval", reason, usual=True)


def not_looping(is_looping: Callable[[str, str], bool]) -> Rule:
    """The rule that a device is not given again and again what it does not get to run.

    `is_looping` is asked for device and SHA-256 on the loop: it must not wait.
    """
    return functools.partial(_not_looping, is_looping)


def _not_looping(
    is_looping: Callable[[str, str], bool], report: Report, release: Release
) -> Objection | None:
    if not report.device or not is_looping(report.device, release.facts.sha256):
        return None
    return looping(release)


class Stages(Protocol):
    """Releases that go out in stages. It is asked on the loop: it must not wait itself."""

    def objection(self, report: Report, release: Release) -> Objection | None:
        """Why a device has to wait for a release."""

    def standing(self, report: Report, release: Release) -> str:
        """Why it does not have to, in a sentence."""


def in_rollout(pin_of: Callable[[str | None], str], stages: Stages) -> Rule:
    """The rule that a release goes out in stages, but to a device that is itself pinned to it.

    `pin_of` gives the device's own pin: that of a group may be one of the whole fleet.
    """
    return functools.partial(_in_rollout, pin_of, stages)


def _in_rollout(
    pin_of: Callable[[str | None], str], stages: Stages, report: Report, release: Release
) -> Objection | None:
    if pin_of(report.device) == release.version.text:
        return None
    return stages.objection(report, release)
