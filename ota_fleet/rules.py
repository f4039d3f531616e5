"""Who gets what, where memory has a say; the rules of ota_server beside these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

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


def withdrawn(is_withdrawn: Callable[[Release], bool]) -> Rule:
    """The rule that nobody gets what was taken back, but perhaps an older release.

    `is_withdrawn` is asked on the loop, so it must not wait for anything.
    """
    return functools.partial(_withdrawn, is_withdrawn)


def _withdrawn(
    is_withdrawn: Callable[[Release], bool], _report: Report, release: Release
) -> Objection | None:
    if not is_withdrawn(release):
        return None
    return Objection("withdrawn", f"{release.version} was withdrawn")


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


def towards_target(pin_of: Callable[[str], str]) -> Rule:
    """only_newer, but for a device with a pin: it gets that version alone, also downwards.

    `pin_of` gives the version that a device is to run, "" for any, on the loop: it must not wait.
    """
    return functools.partial(_towards_target, pin_of)


def _towards_target(
    pin_of: Callable[[str], str], report: Report, release: Release
) -> Objection | None:
    pin = pin_of(report.device) if report.device else ""
    if not pin:
        return only_newer(report, release)
    target = Version.parse(pin)
    if report.version == target:
        return Objection("not-newer", f"the device runs {pin}, to which it is pinned", final=True)
    if release.version != target:
        return Objection("pinned", f"the device is pinned to {pin}, this is {release.version}")
    return None


def not_again(pin_of: Callable[[str], str]) -> Rule:
    """same_image, which does not end the search for the version to which a device is pinned."""
    return functools.partial(_not_again, pin_of)


def _not_again(pin_of: Callable[[str], str], report: Report, release: Release) -> Objection | None:
    objection = same_image(report, release)
    pin = pin_of(report.device) if objection and report.device else ""
    if objection and pin and release.version != Version.parse(pin):
        return objection._replace(final=False)
    return objection


def fit_for(pin_of: Callable[[str], str], channel_of: Callable[[str], str]) -> Rule:
    """fit_unasked, but who is pinned to a pre-release may have it; on channel beta, any.

    `channel_of` gives one of CHANNELS, on the loop: it must not wait.
    """
    return functools.partial(_fit_for, pin_of, channel_of)


def _fit_for(
    pin_of: Callable[[str], str],
    channel_of: Callable[[str], str],
    report: Report,
    release: Release,
) -> Objection | None:
    objection = fit_unasked(report, release)
    if not objection or not report.device:
        return objection
    pin = pin_of(report.device)
    beta = channel_of(report.device) == "beta" and release.version != UNVERSIONED
    if (release.version == Version.parse(pin)) if pin else beta:
        return fit_unasked(report, replace(release, version=FINAL))  # all but that still holds
    return objection
