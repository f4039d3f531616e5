"""What concerns a whole project: its newest release, who needs a version, another name.

    offered(), needing() <- stock, device table, for who decides about a release
    rename() -> every row with the old name, in one transaction; that is an alias then

Devices that call a project by an alias are its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ota_fleet.ledger import Ledger
from ota_fleet.rows import check_project, parsed
from ota_fleet.stock import Stock
from ota_server import Refused, Version, shown

_RUNNING = "SELECT id, version, image, pin FROM device WHERE project = ? ORDER BY id"
_MADE = "INSERT INTO project (name, created) VALUES (?, ?) ON CONFLICT DO NOTHING"
_FREED = "DELETE FROM alias WHERE name = ?"
# What was withdrawn of an earlier project with the new name, or who was admitted to it, stays so.
_MOVES = (
    """DELETE FROM withdrawal WHERE project = ?
    AND sha256 IN (SELECT sha256 FROM withdrawal WHERE project = ?)""",
    """DELETE FROM admission WHERE project = ?
    AND device IN (SELECT device FROM admission WHERE project = ?)""",
    """DELETE FROM policy WHERE scope = 'project' AND name = ?
    AND EXISTS (SELECT 1 FROM policy WHERE scope = 'project' AND name = ?)""",
    """DELETE FROM approval WHERE project = ?
    AND (device, version) IN (SELECT device, version FROM approval WHERE project = ?)""",
    """DELETE FROM shelf WHERE project = ?
    AND version IN (SELECT version FROM shelf WHERE project = ?)""",
    """DELETE FROM announced WHERE project = ?
    AND version IN (SELECT version FROM announced WHERE project = ?)""",
    "UPDATE policy SET name = ? WHERE scope = 'project' AND name = ?",
    "UPDATE approval SET project = ? WHERE project = ?",
    "UPDATE shelf SET project = ? WHERE project = ?",
    "UPDATE announced SET project = ? WHERE project = ?",
    "UPDATE rollout SET project = ? WHERE project = ?",
    "UPDATE attempt SET project = ? WHERE project = ?",
    "UPDATE loop SET project = ? WHERE project = ?",
    "UPDATE project SET name = ? WHERE name = ?",
    "UPDATE alias SET project = ? WHERE project = ?",
    "UPDATE release SET project = ? WHERE project = ?",
    "UPDATE withdrawal SET project = ? WHERE project = ?",
    "UPDATE admission SET project = ? WHERE project = ?",
    "UPDATE token SET project = ? WHERE project = ?",
)
_NAMED = "INSERT INTO alias (name, project) VALUES (?, ?)"


class Need(NamedTuple):
    """A device that needs a version."""

    device: str
    runs: bool
    pinned: bool  # to it


def offered(stock: Stock, project: str) -> tuple[str, str]:
    """The newest version that devices get unasked; or "", and why there is none."""
    try:
        releases = stock.releases(project)
    except Refused as refused:
        return "", refused.reason
    for each in releases:
        if not each.version.prerelease and stock.why_withdrawn(each) is None:
            return str(each.version), ""
    return "", "every release is withdrawn, or a pre-release"


def has_release(stock: Stock, project: str, version: Version) -> bool:
    """Whether a project has a release of a version, from memory."""
    try:
        return any(each.version == version for each in stock.releases(project))
    except Refused:
        return False


def absent(stock: Stock, project: str, versions: Iterable[str]) -> list[str]:
    """Those of these versions of which a project has no release; "" is none of them."""
    found = dict.fromkeys(each for each in versions if each)
    return [each for each in found if not has_release(stock, project, Version.parse(each))]


def chips_of(stock: Stock, project: str) -> set[str]:
    """The chips that a project is for, and those of its images, as far as they are known."""
    found = stock.project(project)
    try:
        chips = {each.release.facts.chip for each in stock.images(project)}
    except Refused:  # the folder's cannot be known just now
        chips = set()
    return {*(found.chips if found else ()), *chips} - {""}


def needing(stock: Stock, ledger: Ledger, project: str, version: Version) -> list[Need]:
    """The devices of a project that run a version, as they say, or are to run it; by id."""
    found = stock.project(project)
    if found is None:
        return []
    digests: set[str] = set()
    for each in stock.images(found.name):
        if each.release.version == version:
            facts = each.release.facts
            digests |= {facts.md5, facts.sha256, *facts.running}
    needs = (
        Need(device, _means(runs, version) or image in digests, _means(pin, version))
        for name in (found.name, *found.aliases)
        for device, runs, image, pin in ledger.registry.rows(_RUNNING, name)
    )
    return sorted(each for each in needs if each.runs or each.pinned)


def _means(text: str, version: Version) -> bool:
    """Whether a device that says this says that version."""
    return parsed(text) == version  # what a device says need not be one


def rename(stock: Stock, ledger: Ledger, old: str, new: str, who: str, at: int) -> None:
    """Gives a project another name; the one that it has becomes an alias.

    Raises:
        Refused: 404, there is none; 409, it lies in the folder, or the name is another's; 422.
    """
    project = stock.project(old)
    if project is None:
        raise Refused(404, f"there is no project {shown(old)}")
    old = project.name
    if any(each.source == "folder" for each in stock.images(old)):
        reason = f"{shown(old)} has files in the firmware folder, which are called so"
        raise Refused(409, f"{reason}: rename them there, or upload them instead")
    other = stock.project(new)
    if new == old or (other and other.name != old):
        raise Refused(409, f"{shown(new)} is the name of {'this' if new == old else 'a'} project")
    aliases = tuple(sorted({*project.aliases, old} - {new}))
    check_project(replace(project, name=new, aliases=aliases))
    try:
        with ledger.recording(who, "rename project", at) as (connection, what):
            connection.execute(_MADE, (old, project.created or at))
            connection.execute(_FREED, (new,))
            for statement in _MOVES:
                connection.execute(statement, (new, old))
            connection.execute(_NAMED, (old, new))
            what.append(f"{old} to {new}")
    except sqlite3.IntegrityError as err:
        raise Refused(409, f"somebody just made a project {shown(new)}") from err
