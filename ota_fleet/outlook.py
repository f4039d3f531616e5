"""What a device got and will get, and why not more. Pure, but for what a site looks up.

Device, as it is remembered -> Report, as it would ask -> the site's rules -> Outlook
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ota_fleet.history import Decision, Visit
from ota_fleet.html import Html, badge
from ota_fleet.rows import Device, parsed
from ota_server import (
    Objection,
    Outcome,
    Refused,
    Release,
    Report,
    Rule,
    Site,
    judge,
    printable,
)

CONTENT = frozenset(("not-newer", "same-image"))  # the codes of devices that have what they need
WAITING = frozenset(  # those of devices that have to wait for somebody, or for a time
    ("waiting-for-approval", "outside-window", "waiting-for-stage", "paced", "paused")
)


class Outlook(NamedTuple):
    """What a device will get."""

    version: str  # "": it stays as it is
    code: str  # of the objection; "": there is none
    reason: str  # a sentence
    kind: str  # as of badge(): "good": an image; "bad": an error; "warn": somebody may want to look

    @property
    def word(self) -> Html:
        """The same, short."""
        return badge(self.version or self.code, self.kind)


def verdict(decided: Visit | Decision) -> Html:
    """What a device got, or the code of why it got nothing."""
    return badge(decided.offered or decided.code, "good" if decided.offered else "")


def report_of(device: Device) -> Report:
    """What a device would say if it asked now for a sketch, as far as that is known."""
    digest = {len(device.image): device.image}
    return Report(
        device.project, device.address, parsed(device.version), device.id, device.chip or None,
        free_space=device.free_space, sketch_md5=digest.get(32), sketch_sha256=digest.get(64),
        sdk=device.sdk or None,
    )  # fmt: skip


def outlook_of(site: Site, device: Device) -> Outlook:
    """What it gets when it asks again."""
    if not device.project:
        return Outlook("", "unknown", "it never said of which project it is", "warn")
    try:
        return _outlook(judge(site, report_of(device)))
    except Refused as refused:
        return Outlook("", "no-release", refused.reason, "warn")


def _outlook(outcome: Outcome) -> Outlook:
    if isinstance(outcome, Objection):
        content = outcome.code in CONTENT or outcome.usual
        kind = "bad" if outcome.deny else "" if content else "warn"
        return Outlook("", outcome.code, outcome.reason, kind)
    reason = f"{printable(outcome.name)}, {outcome.size:,} bytes, fits"
    return Outlook(str(outcome.version), "", reason, "good")


def awaited(site: Site, device: Device) -> Release | None:
    """The release that it would get if nobody had to wait; None: there is none for it."""
    rules = tuple(functools.partial(_patient, rule) for rule in site.rules)
    try:
        outcome = judge(site, report_of(device), rules=rules)
    except Refused:
        return None
    return outcome if isinstance(outcome, Release) else None


def getting(site: Site, devices: Iterable[Device], version: str) -> Iterator[str]:
    """The ids of those devices that would get a version, in its normal form, if they asked now."""
    for each in devices:
        with suppress(Refused):
            outcome = judge(site, report_of(each))
            if isinstance(outcome, Release) and outcome.version.text == version:
                yield each.id


def _patient(rule: Rule, report: Report, release: Release) -> Objection | None:
    """What a rule objects, but that the device has to wait."""
    objection = rule(report, release)
    return None if objection and objection.code in WAITING else objection
