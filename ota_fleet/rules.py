"""Who gets what, where memory has a say; the rules of ota_server beside these."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ota_server import Objection, Release, Report, Rule, shown


def not_whitelisted(is_admitted: Callable[[str, str], bool]) -> Rule:
    """The rule of --admit whitelist: only devices that were admitted to a project get its images.

    `is_admitted` is asked for project and device on the loop, so it must not wait for anything.
    """
    return functools.partial(_not_whitelisted, is_admitted)


def _not_whitelisted(
    is_admitted: Callable[[str, str], bool], report: Report, release: Release
) -> Objection | None:
    if report.device is None:  # S3's contract: nothing for who does not say who it is
        who = "a device that does not say its MAC"
    elif is_admitted(release.project, report.device):
        return None
    else:
        who = report.device
    reason = f"{who} is not admitted to {shown(release.project)}"
    return Objection("not-whitelisted", reason, deny=True, final=True)
