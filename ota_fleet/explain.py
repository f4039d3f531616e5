"""Why a device gets a release, or not, in sentences: what each rule says of it. Pure.

    verdicts(site, report, release) -> one Verdict for each of site.rules, in their order
    candidates(site, report)        -> one Candidate for each release of its project, newest first

What a rule objects is its own sentence; why it does not stands here. Nothing is granted: of pace
and places the rules know what memory does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ota_fleet.policy import next_floor
from ota_fleet.rules import PolicyOf, Stages
from ota_server import (
    UNVERSIONED,
    Objection,
    Refused,
    Release,
    Report,
    Rule,
    Site,
    Version,
    choose,
    is_for,
    recognised,
    shown,
)


class Verdict(NamedTuple):
    """What a rule says of a device and a release."""

    rule: str  # its stable name
    code: str  # of its objection; "": it has none
    denies: bool  # it would be told by 403, not by 304
    sentence: str


class Candidate(NamedTuple):
    """A release that the device may get."""

    release: Release
    gets: bool  # it, and no other
    code: str  # of the objection to it; "": there is none
    reason: str  # a sentence


# -- 1. What each rule says ------------------------------------------------------------------------


def verdicts(site: Site, report: Report, release: Release) -> list[Verdict]:
    """What each rule of a site says of a release. Refused: see Catalog.releases()."""
    releases = site.catalog.releases(report.project)
    known = recognised(report, releases, releases)
    return [_verdict(rule, known, release) for rule in site.rules]


def _verdict(rule: Rule, report: Report, release: Release) -> Verdict:
    name, why = RULES.get(key_of(rule), (key_of(rule), _nothing))
    if objection := rule(report, release):
        return Verdict(name, objection.code, objection.deny, objection.reason)
    return Verdict(name, "", False, why(*getattr(rule, "args", ()), report, release))


def key_of(rule: Rule) -> str:
    """What a rule is called where it is made: of a partial, the function in it."""
    function = getattr(rule, "func", rule)
    return str(getattr(function, "__name__", function)).removeprefix("_")


def _nothing(*_: object) -> str:
    return "it has nothing against it"


def _newer(report: Report, release: Release) -> str:
    if report.version is None:
        return "the device does not say which version it runs"
    return f"{release.version} is newer than {report.version}, which the device runs"


def _towards(policy_of: PolicyOf, report: Report, release: Release) -> str:
    policy, version = policy_of(report.device, release.project), release.version.text
    if policy.again == version:
        return f"the device is given {version} once more"
    if policy.pin == version:
        return f"the device is pinned to {version}"
    if policy.pin:
        return f"{version} is on the way to {policy.pin}, to which the device is pinned"
    return _newer(report, release)


def _other_image(*given: object) -> str:
    report, release = given[-2:]
    assert isinstance(report, Report)
    assert isinstance(release, Release)
    called = {report.sketch_md5, report.sketch_sha256} - {None}
    if release.kind != "sketch" or not called:
        return "the device does not say which image it runs"
    return f"the device runs another image than that of {release.version}"


def _chip(report: Report, release: Release) -> str:
    chip = release.facts.chip
    if not chip:
        return f"{release.version} is for any chip"
    if report.chip == chip:
        return f"{release.version} is for {chip}, as the device is"
    return f"{release.version} is for {chip}, the device {_of_some_chip(report.chip)}"


def _of_some_chip(chip: str | None) -> str:
    return f"is {chip}" if chip else "does not say what it is"


def _kind(report: Report, release: Release) -> str:
    return f"the device asks for a {report.kind}, {release.version} is a {release.kind}"


def _flash_mode(report: Report, release: Release) -> str:
    if not release.facts.packed:
        return "the image is not packed"
    if report.chip is None:
        return "the device does not say its chip"
    return f"the packed image has flash mode {release.facts.flash_mode}, which suits the device"


def _room(report: Report, release: Release) -> str:
    if release.kind != "sketch":
        return "only a sketch needs free space"
    if report.free_space is None:
        return "the device does not say how much space is free"
    return f"{release.version} has {release.size} bytes, the device {report.free_space} free"


def _unasked(_report: Report, release: Release) -> str:
    return f"{release.version} is an image that goes to who asks for the newest"


def _channel(
    policy_of: PolicyOf,
    channel_of: Callable[[Release], str],
    report: Report,
    release: Release,
) -> str:
    if release.version == UNVERSIONED:
        return "the file has no version, so it is on no channel"
    channel = channel_of(release)
    if policy_of(report.device, release.project).pin == release.version.text:
        return f"{release.version} is on the channel {channel}, and the device pinned to it"
    return f"{release.version} is on the channel {channel}, which the device gets"


def _restored(*_: object) -> str:
    return "nobody took it back"


def _partition(size_of: Callable[[str], int], _report: Report, release: Release) -> str:
    room = size_of(release.project)
    if release.kind != "sketch":
        return "only a sketch goes into that partition"
    if not room:
        return "nobody said how large the partition of the devices is"
    return f"{release.version} has {release.size} bytes, the partition for it {room}"


def _admitted(_is_admitted: object, report: Report, release: Release) -> str:
    who = report.device or "who does not say its MAC"
    return f"{who} may have images of {shown(release.project)}"


def _free(*_: object) -> str:
    return "nobody holds the device, its group or its project"


def _floors(policy_of: PolicyOf, _has: object, report: Report, release: Release) -> str:
    floors = policy_of(report.device, release.project).floors
    if not floors:
        return "no version has to be gone through"
    if report.version is None:
        return "the device does not say which version it runs"
    if release.version == next_floor(floors, report.version):
        return f"{release.version} has to be gone through"
    return f"none of {', '.join(floors)} is jumped over"


def _no_loop(*_: object) -> str:
    return "it was not given too often in vain"


def _approval(policy_of: PolicyOf, _is_approved: object, report: Report, release: Release) -> str:
    policy = policy_of(report.device, release.project)
    if policy.approval != "yes":
        return "no approval is needed"
    if policy.pin == release.version.text:
        return "the device is pinned to it, which is approval enough"
    return f"somebody approved {release.version} for the device"


def _window(policy_of: PolicyOf, _now: object, report: Report, release: Release) -> str:
    window = policy_of(report.device, release.project).window
    if window in {"", "always"}:
        return "no maintenance window is set"
    return f"the maintenance window {shown(window)} is open"


def _rollout(
    pin_of: Callable[[str | None], str], stages: Stages, report: Report, release: Release
) -> str:
    if pin_of(report.device) == release.version.text:
        return "the device is pinned to it, so no stage counts"
    return stages.standing(report, release)


# By key_of() a rule: its name, and why it objects to nothing, which gets what the rule gets.
RULES: Mapping[str, tuple[str, Callable[..., str]]] = {
    "only_newer": ("version", _newer),
    "towards_target": ("version", _towards),
    "same_image": ("image", _other_image),
    "not_again": ("image", _other_image),
    "right_chip": ("chip", _chip),
    "right_kind": ("kind", _kind),
    "right_flash_mode": ("flash-mode", _flash_mode),
    "enough_room": ("room", _room),
    "fit_unasked": ("channel", _unasked),
    "fit_for": ("channel", _channel),
    "withdrawn": ("withdrawal", _restored),
    "fits_partition": ("partition", _partition),
    "not_whitelisted": ("admission", _admitted),
    "not_held": ("hold", _free),
    "above_floors": ("floors", _floors),
    "not_looping": ("loop", _no_loop),
    "approved": ("approval", _approval),
    "in_window": ("window", _window),
    "in_rollout": ("rollout", _rollout),
}


# -- 2. Which release, and why no other ------------------------------------------------------------


def candidates(site: Site, report: Report) -> list[Candidate]:
    """All releases of the device's project, newest first; judge() would give the one it gets.

    Raises:
        Refused: see Catalog.releases().
    """
    releases = site.catalog.releases(report.project)
    known = recognised(report, releases, releases)
    outcome, closed = choose(known, releases, site.rules), None
    found = []
    for each in releases:
        said = choose(known, [each], site.rules)
        closed = closed or _final(site.rules, known, each)
        if isinstance(said, Release):
            said = closed or said
        if each is outcome:
            found.append(Candidate(each, True, "", "no rule objects to it"))
        elif isinstance(said, Objection):
            found.append(Candidate(each, False, said.code, said.reason))
        else:
            assert isinstance(outcome, Release)
            found.append(Candidate(each, False, "", f"the device gets {outcome.version} instead"))
    return found


def _final(rules: Sequence[Rule], report: Report, release: Release) -> Objection | None:
    """The objection that ends the search, if there is one to this release."""
    said = (rule(report, release) for rule in rules)
    return next((each for each in said if each and each.final), None)


def subject(
    found: Sequence[Candidate], site: Site, report: Report, version: Version | None = None
) -> Candidate:
    """The candidate to speak of: that of a version; without one, what it gets, or the newest.

    Of several, one that is for such devices. Refused: 404, there is no such version.
    """
    among = [each for each in found if version is None or each.release.version == version]
    if not among:
        raise Refused(404, f"there is no {version} of {shown(report.project)}")
    fitting = (each for each in among if is_for(site.rules, report, each.release))
    given = (each for each in among if each.gets)
    return next(given, None) or next(fitting, None) or among[0]
