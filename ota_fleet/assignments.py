"""What people decided about who gets releases, as rows; the loop asks memory.

    threads -- put(), approve(), shelve() --> policy, approval, shelf in the registry
    loop    <-- policy(), group(), is_approved(), channel() <-- memory, read again by watch()

A device's pin, channel and group stand in its own row, which Registry.annotate() writes; what else
is said of one device, of a group or of a project is a policy. Projects by their own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any, NamedTuple

from ota_fleet.policy import (
    BETA,
    NOTHING,
    SCOPES,
    STABLE,
    Policy,
    channel_of,
    check_word,
    checked,
    merged,
)
from ota_fleet.registry import Registry, normal_id
from ota_fleet.rows import clean
from ota_server import Release, Version

MAX_MERGED = 20_000  # policies of devices that are kept: some 5 MB

_POLICIES = """SELECT scope, name, channel, pin, hold, hours, approval, floors, plan, since, again
FROM policy"""
_PUT = """INSERT INTO policy (scope, name, channel, pin, hold, hours, approval, floors, plan, since,
    again)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (scope, name) DO UPDATE SET channel = excluded.channel, pin = excluded.pin,
    hold = excluded.hold, hours = excluded.hours, approval = excluded.approval,
    floors = excluded.floors, plan = excluded.plan, since = excluded.since,
    again = excluded.again"""
_DROP = "DELETE FROM policy WHERE scope = ? AND name = ?"
_SAID = """SELECT id, pin, channel, team, labels FROM device
WHERE pin <> '' OR channel <> '' OR team <> '' OR labels <> '[]'"""
_TEAMS = "SELECT team, COUNT(*) FROM device WHERE team <> '' GROUP BY team"
_LEAVE = "UPDATE device SET team = '' WHERE team = ?"
_APPROVALS = "SELECT device, project, version, at, who FROM approval"
_APPROVE = """INSERT INTO approval (device, project, version, at, who) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING"""
_DISAPPROVE = "DELETE FROM approval WHERE device = ? AND project = ? AND version = ?"
_SHELVES = "SELECT project, version, channel FROM shelf"
_SHELVE = """INSERT INTO shelf (project, version, channel) VALUES (?, ?, ?)
ON CONFLICT (project, version) DO UPDATE SET channel = excluded.channel
WHERE shelf.channel <> excluded.channel"""
_UNSHELVE = "DELETE FROM shelf WHERE project = ? AND version = ?"


class Approval(NamedTuple):
    """Somebody wants a device to have a version."""

    device: str
    project: str
    version: str  # in its normal form
    at: int  # UTC seconds
    who: str


class Said(NamedTuple):
    """What a device's own row says."""

    policy: Policy  # pin and channel
    group: str
    labels: Sequence[str]


UNSAID = Said(NOTHING, "", ())


class Assignments:
    """The rows; functions that write may wait for the disk, the others never do."""

    def __init__(self, registry: Registry) -> None:
        """Begins with what the registry holds."""
        self._registry = registry
        self._policies: Mapping[tuple[str, str], Policy] = {}  # replaced whole, as all of these
        self._said: Mapping[str, Said] = {}
        self._approved: Mapping[tuple[str, str, str], Approval] = {}
        self._shelves: Mapping[tuple[str, str], str] = {}
        self._merged: dict[tuple[str, str], Policy] = {}
        registry.watch(self.read)

    # -- What the loop asks ------------------------------------------------------------------------

    def policy(self, device: str | None, project: str) -> Policy:
        """What holds for a device and a project, by what is said nearest to it."""
        if not (self._policies or self._said):
            return NOTHING
        key, kept = (device or "", project), self._merged  # read() may replace all of it meanwhile
        found = kept.get(key)
        if found is None:
            said = self._said.get(normal_id(key[0]), UNSAID)
            own = self._policies.get(("device", normal_id(key[0])), NOTHING)
            team = self._policies.get(("group", said.group), NOTHING) if said.group else NOTHING
            found = merged((said.policy, own, team, self.own("project", project)))
            if len(kept) < MAX_MERGED:
                kept[key] = found
        return found

    def own(self, scope: str, name: str) -> Policy:
        """What is said of one project, group or device alone; without a device's own row."""
        return self._policies.get((scope, name), NOTHING)

    def own_pin(self, device: str | None) -> str:
        """The pin of the device itself, not of its group; "": none."""
        return self._said.get(normal_id(device or ""), UNSAID).policy.pin if self._said else ""

    def group(self, device: str) -> str:
        """The group of a device; "": none."""
        return self._said.get(normal_id(device), UNSAID).group if self._said else ""

    def labels(self, device: str) -> Sequence[str]:
        """The labels of a device."""
        return self._said.get(normal_id(device), UNSAID).labels if self._said else ()

    def is_approved(self, device: str, project: str, version: str) -> bool:
        """Whether somebody wants this device to have this version."""
        return (normal_id(device), project, version) in self._approved

    def channel(self, release: Release) -> str:
        """The channel that a release is on."""
        return self.shelf(release.project, release.version)

    def shelf(self, project: str, version: Version) -> str:
        """The same of a version of a project."""
        return channel_of(version, self._shelves.get((project, version.text), ""))

    # -- Policies ----------------------------------------------------------------------------------

    def put(self, scope: str, name: str, policy: Policy) -> None:
        """Says something of a project, group or device; NOTHING: that it is as all others.

        Raises:
            ValueError: a sentence says why not.
        """
        name = _name(scope, name)
        if scope == "device":
            policy = replace(policy, pin="", channel="")
        policy = checked(policy)
        if policy == NOTHING:
            self._registry.write(_DROP, scope, name)
            return
        values: list[Any] = list(astuple(policy))
        values[5] = json.dumps(policy.floors)
        self._registry.write(_PUT, scope, name, *values)

    def change(self, scope: str, name: str, said: Mapping[str, Any], at: int) -> bool:
        """Says some of a Policy anew, while the rest stays; False: nothing is different.

        Another plan holds for releases from `at` on, UTC seconds. ValueError: see put().
        """
        name = _name(scope, name)
        with self._registry.writing() as connection:
            rows = connection.execute(_POLICIES + " WHERE scope = ? AND name = ?", (scope, name))
            before = next((_policy(row) for row in rows), NOTHING)
            after = checked(replace(before, **said))
            if after.plan != before.plan:
                after = replace(after, since=at if after.plan else 0)
            if after != before:
                self.put(scope, name, after)
        return after != before

    def forget_again(self, device: str) -> None:
        """Lets the loop see at once that a device was given its version once more."""
        key = "device", device
        self._policies = {**self._policies, key: replace(self.own(*key), again="")}
        self._merged = {}

    def use_up(self, approval: tuple[str, str, str]) -> None:
        """Lets the loop see at once that an approval has done its work."""
        self._approved = {key: each for key, each in self._approved.items() if key != approval}

    def groups(self) -> list[str]:
        """All groups that a device is in, or of which something is said; sorted."""
        said = (name for scope, name in self._policies if scope == "group")
        return sorted({*self.sizes(), *said})

    def sizes(self) -> dict[str, int]:
        """How many devices are in each group that has any."""
        return dict(self._registry.rows(_TEAMS))

    def channels(self) -> list[str]:
        """All channels of which anything is said, from memory; sorted."""
        said = (each.policy.channel for each in self._said.values())
        put = (each.channel for each in self._policies.values())
        return sorted({STABLE, BETA, *said, *put, *self._shelves.values()} - {""})

    def drop_group(self, name: str) -> None:
        """Takes a group away, with what is said of it; its devices are in none then."""
        with self._registry.writing() as connection:
            connection.execute(_DROP, ("group", name))
            connection.execute(_LEAVE, (name,))

    # -- Approvals and channels --------------------------------------------------------------------

    def approve(self, approval: Approval) -> bool:
        """Lets a device have a version where that needs an approval; False: it could already."""
        device, project, version, at, who = approval
        values = normal_id(device), clean(project), clean(version), at, clean(who)
        return self._registry.write(_APPROVE, *values) > 0

    def disapprove(self, device: str, project: str, version: str) -> bool:
        """Takes an approval back; False: there was none."""
        return self._registry.write(_DISAPPROVE, normal_id(device), project, version) > 0

    def approvals(self, device: str) -> list[Approval]:
        """What was approved for a device."""
        device = normal_id(device)
        return [each for each in self._approved.values() if each.device == device]

    def shelve(self, project: str, version: Version, channel: str) -> bool:
        """Puts a version on a channel; "": on that which its number says; False: it is there.

        Raises:
            ValueError: no channel is called so.
        """
        if not channel:
            return self._registry.write(_UNSHELVE, clean(project), str(version)) > 0
        check_word(channel, "channel")
        return self._registry.write(_SHELVE, clean(project), str(version), channel) > 0

    # -- Memory ------------------------------------------------------------------------------------

    def read(self) -> None:
        """Takes what the registry holds now."""
        rows = self._registry.rows
        policies = {(row[0], row[1]): _policy(row) for row in rows(_POLICIES)}
        self._said = {
            device: Said(
                Policy(channel, pin) if channel or pin else NOTHING, team, json.loads(said)
            )
            for device, pin, channel, team, said in rows(_SAID)
        }
        found = (Approval(*row) for row in rows(_APPROVALS))
        self._approved = {each[:3]: each for each in found}
        self._shelves = {(project, version): to for project, version, to in rows(_SHELVES)}
        self._policies, self._merged = policies, {}


def _policy(row: Sequence[Any]) -> Policy:
    """Of a row, in which the floors are JSON."""
    values = list(row[2:])
    values[5] = tuple(json.loads(values[5]))
    return Policy(*values)


def _name(scope: str, name: str) -> str:
    """Of what a policy is, as it stands in its row. ValueError: no group is called so."""
    assert scope in SCOPES
    if scope == "group":
        check_word(name, "group")
    return normal_id(name) if scope == "device" else clean(name)
