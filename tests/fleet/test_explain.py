"""Why a device gets a release, or not: by rule, by the API and by the command; never otherwise."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ota_server
from ota_fleet import explain_command, rules
from ota_fleet.explain import RULES, candidates, key_of, subject, verdicts
from ota_fleet.outlook import WAITING, awaited, report_of
from ota_fleet.policy import NOTHING, Policy
from ota_fleet.rollout import FINISHED, RUNNING, STATES
from ota_fleet.rows import Device
from ota_server import (
    ANY_ESP,
    ESP32_FAMILY,
    STATELESS,
    UNKNOWN_CHIP,
    Config,
    Facts,
    Objection,
    Refused,
    Release,
    Report,
    Rule,
    Site,
    Version,
    judge,
)
from tests.core.wire import PATIENCE, Stand, standing
from tests.fleet.sick import scripted
from tests.fleet.test_api import MACS, House
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - a fixture
from tests.fleet.test_api import house as house  # noqa: PLC0414 - a fixture
from tests.fleet.test_rollout_operations import PLAN, ROLLOUTS, check, download
from tests.test_house import ROOT

MAC, MD5 = "5C:CF:7F:00:00:01", "0123456789abcdef" * 2
V = Version.parse


class Stages:
    """A rollout that lets in the devices that it names."""

    def __init__(self, *devices: str | None) -> None:
        self._devices = devices

    def objection(self, report: Report, _release: Release) -> Objection | None:
        """Why a device has to wait."""
        code = Objection("waiting-for-stage", "not yet")
        return None if report.device in self._devices else code

    def standing(self, _report: Report, _release: Release) -> str:
        """Why it does not."""
        return "the stage is open"


def release_of(version: str, **facts: Any) -> Release:
    """A release of lamp; `kind` and `size` are not facts."""
    kind, size = facts.pop("kind", "sketch"), facts.pop("size", 5000)
    return Release("lamp", V(version), kind, "", f"lamp-{version}.bin", (0, 0, size, 0, 0),
                   Facts(**{"chip": "esp8266", "sha256": version} | facts))  # fmt: skip


@dataclasses.dataclass
class Shelf:
    """A catalog of one project."""

    found: Sequence[Release]

    def newest(self) -> Mapping[str, Version]:
        """See Catalog."""
        return {}

    def projects(self) -> Sequence[str]:
        """See Catalog."""
        return ["lamp"]

    def releases(self, _project: str) -> Sequence[Release]:
        """See Catalog."""
        if not self.found:
            raise Refused(404, "there is nothing")
        return self.found

    def open(self, _release: Release) -> ota_server.Image:
        """See Catalog."""
        raise AssertionError


def rules_of(policy: Policy = NOTHING, **more: Any) -> tuple[Rule, ...]:
    """All rules there are, over what a test says."""
    said: dict[str, Any] = {"withdrawn": (), "room": 0, "admitted": True, "approved": False}
    said |= {"looping": False, "stages": Stages(MAC), "now": 0, "channel": "stable"}
    said |= {"learned": frozenset(), "absent": ()} | more

    def policy_of(_device: str | None, _project: str) -> Policy:
        return policy

    return (
        rules.towards_target(policy_of),
        rules.not_again(policy_of, lambda _: said["learned"]),
        *ota_server.SAFETY[1:],
        rules.fit_for(policy_of, lambda _: str(said["channel"])),
        rules.withdrawn(lambda each: "bad" if str(each.version) in said["withdrawn"] else None),
        rules.fits_partition(lambda _: int(said["room"])),
        rules.not_whitelisted(lambda *_: bool(said["admitted"])),
        rules.not_held(policy_of),
        rules.above_floors(policy_of, lambda _, version: str(version) not in said["absent"]),
        rules.not_looping(lambda *_: bool(said["looping"])),
        rules.approved(policy_of, lambda *_: bool(said["approved"])),
        rules.in_window(policy_of, lambda: float(said["now"])),
        rules.in_rollout(lambda device: policy_of(device, "").pin, said["stages"]),
    )


def site_over(found: Sequence[Release], rules: Sequence[Rule]) -> Site:
    """A site without sockets and routes."""
    return Site(Config(""), Shelf(found), tuple(rules), (), (), (), ())


REPORT = Report("lamp", "192.0.2.1", V("1.0.0"), MAC, "esp8266", sketch_md5=MD5, free_space=9000)


# -- 1. Each rule ----------------------------------------------------------------------------------


def test_no_rule_of_a_site_with_a_memory_is_without_words(house: House) -> None:
    missing = [key_of(rule) for rule in house.site.rules if key_of(rule) not in RULES]
    assert missing == []
    names = [RULES[key_of(rule)][0] for rule in house.site.rules]
    assert len(set(names)) == len(names)


def test_no_rule_of_the_core_is_without_words() -> None:
    assert [rule for rule in STATELESS if key_of(rule) not in RULES] == []


@pytest.mark.parametrize("key", RULES)
def test_words_are_of_a_rule_that_there_is(key: str) -> None:
    assert callable(getattr(rules, key, None) or getattr(ota_server, key))


def test_rule_of_others_is_called_by_its_function() -> None:
    def only_on_mondays(_report: Report, _release: Release) -> Objection | None:
        return None

    site = site_over([release_of("1.1.0")], [only_on_mondays])
    (found,) = verdicts(site, REPORT, release_of("1.1.0"))
    assert found == ("only_on_mondays", "", False, "it has nothing against it")


NIGHT = Policy(window="00:00-24:00")
FINE: list[tuple[str, Policy, dict[str, Any], dict[str, Any], str]] = [
    # rule, policy, what differs in the report, in the rules or the release; the sentence
    ("version", NOTHING, {}, {}, "1.1.0 is newer than 1.0.0, which the device runs"),
    ("version", NOTHING, {"version": None}, {}, "the device does not say which version it runs"),
    ("version", Policy(pin="1.1.0"), {}, {}, "the device is pinned to 1.1.0"),
    ("version", Policy(again="1.1.0"), {"version": V("1.1.0")}, {},
     "the device is given 1.1.0 once more"),
    ("version", Policy(pin="2.0.0", floors=("1.1.0",)), {}, {},
     "1.1.0 is on the way to 2.0.0, to which the device is pinned"),
    ("image", NOTHING, {}, {}, "the device runs another image than that of 1.1.0"),
    ("image", NOTHING, {"sketch_md5": None}, {}, "the device does not say which image it runs"),
    ("chip", NOTHING, {}, {}, "1.1.0 is for esp8266, as the device is"),
    ("chip", NOTHING, {}, {"chip": ""}, "1.1.0 is for any chip"),
    ("chip", NOTHING, {"chip": ESP32_FAMILY}, {"chip": "esp32c3"},
     "1.1.0 is for esp32c3, the device is some ESP32"),
    ("chip", NOTHING, {"chip": None}, {}, "1.1.0 is for esp8266, the device does not say what it "
     "is"),
    ("kind", NOTHING, {}, {}, "the device asks for a sketch, 1.1.0 is a sketch"),
    ("flash-mode", NOTHING, {}, {}, "the image is not packed"),
    ("flash-mode", NOTHING, {}, {"packed": True},
     "the packed image has flash mode 3, which suits the device"),
    ("flash-mode", NOTHING, {"chip": None}, {"packed": True}, "the device does not say its chip"),
    ("room", NOTHING, {}, {}, "1.1.0 has 5000 bytes, the device 9000 free"),
    ("room", NOTHING, {"free_space": None}, {}, "the device does not say how much space is free"),
    ("room", NOTHING, {"kind": "filesystem"}, {"kind": "littlefs"},
     "only a sketch needs free space"),
    ("channel", NOTHING, {}, {}, "1.1.0 is on the channel stable, which the device gets"),
    ("channel", Policy(channel="beta"), {}, {"channel": "beta"},
     "1.1.0 is on the channel beta, which the device gets"),
    ("channel", Policy(pin="1.1.0"), {}, {"channel": "beta"},
     "1.1.0 is on the channel beta, and the device pinned to it"),
    ("withdrawal", NOTHING, {}, {}, "nobody took it back"),
    ("partition", NOTHING, {}, {},
     "nobody said how large the partition of the devices is"),
    ("partition", NOTHING, {}, {"room": 6000}, "1.1.0 has 5000 bytes, the partition for it 6000"),
    ("partition", NOTHING, {"kind": "littlefs"}, {"kind": "littlefs"},
     "only a sketch goes into that partition"),
    ("admission", NOTHING, {}, {}, f"{MAC} may have images of 'lamp'"),
    ("admission", NOTHING, {"device": None}, {},
     "who does not say its MAC may have images of 'lamp'"),
    ("hold", NOTHING, {}, {}, "nobody holds the device, its group or its project"),
    ("floors", NOTHING, {}, {}, "no version has to be gone through"),
    ("floors", Policy(floors=("1.1.0", "2.0.0")), {}, {}, "1.1.0 has to be gone through"),
    ("floors", Policy(floors=("0.9.0",)), {}, {}, "none of 0.9.0 is jumped over"),
    ("floors", Policy(floors=("0.9.0",)), {"version": None}, {},
     "the device does not say which version it runs"),
    ("loop", NOTHING, {}, {}, "it was not given too often in vain"),
    ("approval", NOTHING, {}, {}, "no approval is needed"),
    ("approval", Policy(approval="yes"), {}, {"approved": True},
     "somebody approved 1.1.0 for the device"),
    ("approval", Policy(approval="yes", pin="1.1.0"), {}, {},
     "the device is pinned to it, which is approval enough"),
    ("window", NOTHING, {}, {}, "no maintenance window is set"),
    ("window", Policy(window="always"), {}, {}, "no maintenance window is set"),
    ("window", NIGHT, {}, {}, "the maintenance window '00:00-24:00' is open"),
    ("rollout", NOTHING, {}, {}, "the stage is open"),
    ("rollout", Policy(pin="1.1.0"), {}, {}, "the device is pinned to it, so no stage counts"),
]  # fmt: skip
OF_RELEASE = {"chip", "packed", "kind", "size"}


@pytest.mark.parametrize(
    ("rule", "policy", "said", "more", "sentence"), FINE, ids=[f"{r[0]}: {r[4]}" for r in FINE]
)
def test_rule_that_is_fine_says_why(
    rule: str, policy: Policy, said: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    release = release_of("1.1.0", **{key: more[key] for key in OF_RELEASE & more.keys()})
    given = rules_of(policy, **{key: more[key] for key in more.keys() - OF_RELEASE})
    found = verdicts(site_over([release], given), REPORT._replace(**said), release)
    (one,) = (each for each in found if each.rule == rule)
    assert one == (rule, "", False, sentence)


OBJECTED: list[tuple[str, Policy, dict[str, Any], dict[str, Any], str, bool]] = [
    ("version", NOTHING, {"version": V("1.1.0")}, {}, "not-newer", False),
    ("version", Policy(pin="0.9.0"), {}, {}, "pinned", False),
    ("image", NOTHING, {}, {"running": frozenset((MD5,))}, "same-image", False),
    ("image", NOTHING, {"version": None}, {"learned": frozenset((MD5,))}, "same-image", False),
    ("chip", NOTHING, {"chip": "esp32"}, {}, "wrong-chip", True),
    ("kind", NOTHING, {"kind": "filesystem"}, {}, "wrong-kind", False),
    ("flash-mode", NOTHING, {}, {"packed": True, "flash_mode": 2}, "flash-mode", False),
    ("room", NOTHING, {"free_space": 10}, {}, "too-big", False),
    ("channel", NOTHING, {}, {"channel": "beta"}, "other-channel", False),
    ("channel", NOTHING, {}, {"chip": UNKNOWN_CHIP}, "by-name-only", False),
    ("withdrawal", NOTHING, {}, {"withdrawn": ("1.1.0",)}, "withdrawn", False),
    ("partition", NOTHING, {}, {"room": 10}, "too-big", False),
    ("admission", NOTHING, {}, {"admitted": False}, "not-whitelisted", True),
    ("hold", Policy(hold="yes"), {}, {}, "on-hold", False),
    ("floors", Policy(floors=("1.0.5",)), {}, {}, "floor", False),
    ("loop", NOTHING, {}, {"looping": True}, "loop", False),
    ("approval", Policy(approval="yes"), {}, {}, "waiting-for-approval", False),
    ("window", Policy(window="Mon 00:00-24:00"), {}, {}, "outside-window", False),  # a Thursday
    ("rollout", NOTHING, {}, {"stages": Stages()}, "waiting-for-stage", False),
]


@pytest.mark.parametrize(
    ("rule", "policy", "said", "more", "code", "denies"),
    OBJECTED,
    ids=[f"{row[0]}: {row[4]} {row[1].pin}" for row in OBJECTED],
)
def test_rule_that_objects_has_its_own_sentence(
    rule: str, policy: Policy, said: dict[str, Any], more: dict[str, Any], code: str, denies: bool
) -> None:
    of_release = OF_RELEASE | {"running", "flash_mode"}
    release = release_of("1.1.0", **{key: more[key] for key in of_release & more.keys()})
    given = rules_of(policy, **{key: more[key] for key in more.keys() - of_release})
    report = REPORT._replace(**said)
    found = verdicts(site_over([release], given), report, release)
    at, one = next((at, each) for at, each in enumerate(found) if each.rule == rule)
    objection = given[at](report, release)
    assert objection is not None
    assert one == (rule, code, denies, objection.reason)
    assert len(found) == len(given)


@pytest.mark.parametrize(
    ("gone", "end"), [((), "first"), (("1.0.5",), "first, which is not there")]
)
def test_floor_without_a_release_is_said_to_be_not_there(gone: tuple[str, ...], end: str) -> None:
    release = release_of("1.1.0")
    site = site_over([release], rules_of(Policy(floors=("1.0.5",)), absent=gone))
    found = next(each for each in verdicts(site, REPORT, release) if each.rule == "floors")
    assert found.sentence.endswith(f"it goes through 1.0.5 {end}")


def test_every_code_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text().partition("## How it decides")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE))
    of_rollouts = {"not-targeted", "paced", *STATES} - {RUNNING, FINISHED}
    assert rows == {row[4] for row in OBJECTED} | of_rollouts


# -- 2. What it says is what is decided ------------------------------------------------------------

VERSIONS = ("1.0.0", "1.1.0", "1.2.0-rc.1", "1.2.0", "2.0.0", "2.0.0+b1")
versions = st.sampled_from(VERSIONS)
texts = st.sampled_from(("", *VERSIONS))
reports = st.builds(
    Report,
    st.just("lamp"),
    st.just("192.0.2.1"),
    st.none() | versions.map(V),
    st.sampled_from([None, MAC, "5C:CF:7F:00:00:02"]),
    st.sampled_from([None, "esp8266", "esp32", "esp32c3", ESP32_FAMILY, ANY_ESP]),
    st.sampled_from(["sketch", "filesystem", "littlefs"]),
    st.sampled_from([None, 100, 9000]),
    sketch_md5=st.sampled_from([None, MD5, "1.1.0", "2.0.0"]),
    sketch_sha256=st.sampled_from([None, "1.2.0"]),
)


@st.composite
def shelves(draw: st.DrawFn) -> list[Release]:
    """Some releases, newest first, which run what their version is called."""
    found = [
        release_of(
            version,
            kind=draw(st.sampled_from(["sketch", "sketch", "littlefs"])),
            size=draw(st.sampled_from([50, 5000])),
            chip=draw(st.sampled_from(["esp8266", "esp8266", "esp32", "esp32c3", UNKNOWN_CHIP])),
            running=frozenset((version,)),
            packed=draw(st.booleans()),
            flash_mode=draw(st.sampled_from([2, 3])),
        )
        for version in draw(st.lists(versions, min_size=1, max_size=7))
    ]
    found.sort(key=lambda each: each.version, reverse=True)
    return [dataclasses.replace(each, path=str(at)) for at, each in enumerate(found)]


policies = st.builds(
    Policy,
    channel=st.sampled_from(["", "beta"]),
    pin=texts,
    hold=st.sampled_from(["", "", "", "yes"]),
    window=st.sampled_from(["", "", "Mon 00:00-24:00"]),
    approval=st.sampled_from(["", "", "yes"]),
    floors=st.lists(versions, max_size=2).map(tuple),
    again=texts,
)
known = st.fixed_dictionaries(
    {},
    optional={
        "withdrawn": st.lists(versions, max_size=2),
        "room": st.sampled_from([0, 100]),
        "admitted": st.sampled_from([True, True, True, False]),
        "approved": st.booleans(),
        "looping": st.sampled_from([False, False, False, True]),
        "stages": st.sampled_from([Stages(MAC), Stages(None, MAC)]),
        "channel": st.sampled_from(["stable", "stable", "beta"]),
    },
)


@settings(max_examples=400)
@given(reports, shelves(), policies, known)
def test_it_says_that_a_device_gets_a_release_if_and_only_if_it_does(
    report: Report, found: list[Release], policy: Policy, more: dict[str, Any]
) -> None:
    site = site_over(found, rules_of(policy, **more))
    outcome = judge(site, report)
    said = candidates(site, report)
    assert [each.release for each in said] == found
    assert [each.release for each in said if each.gets] == [
        each for each in found if each is outcome
    ]
    about = subject(said, site, report)
    assert about.gets == isinstance(outcome, Release)
    assert about.release is outcome or not about.gets
    for each in said:
        codes = {one.code for one in verdicts(site, report, each.release)} - {""}
        assert each.reason
        assert not (each.gets and (codes or each.code))
        if not each.code and not each.gets:  # only because another one comes before
            assert isinstance(outcome, Release)
            assert not codes
            assert found.index(outcome) < found.index(each.release)
        if codes and not each.gets:
            assert each.code in codes


@settings(max_examples=200)
@given(reports, shelves(), policies, known)
def test_whoever_waits_gets_what_is_awaited_once_nothing_is_to_be_waited_for(
    report: Report, found: list[Release], policy: Policy, more: dict[str, Any]
) -> None:
    device = device_of(report)
    site = site_over(found, rules_of(policy, **more))
    patient = dataclasses.replace(policy, approval="no", window="always")
    open_to_all = Stages("x", MAC, "5C:CF:7F:00:00:02")
    then = site_over(found, rules_of(patient, **more | {"stages": open_to_all}))
    outcome = judge(then, report_of(device))
    assert awaited(site, device) is (outcome if isinstance(outcome, Release) else None)


def device_of(report: Report) -> Device:
    """Who would say that, as it is remembered."""
    version, image = str(report.version or ""), report.sketch_md5 or ""
    return Device(report.device or "x", "lamp", report.chip or "", version, image,
                  report.free_space, "", "", 0, 0, 0, "", (), "", admitted=False)  # fmt: skip


@pytest.mark.parametrize("code", sorted(WAITING))
def test_a_release_is_awaited_whatever_one_waits_for(code: str) -> None:
    def waits(_report: Report, _release: Release) -> Objection | None:
        return Objection(code, "later")

    newest = release_of("1.1.0")
    assert awaited(site_over([newest], [*STATELESS, waits]), device_of(REPORT)) is newest


@pytest.mark.parametrize("code", ["on-hold", "halted", "aborted", "loop", "not-targeted", "floor"])
def test_nothing_is_awaited_that_would_not_come(code: str) -> None:
    def objects(_report: Report, _release: Release) -> Objection | None:
        return Objection(code, "never")

    site = site_over([release_of("1.1.0")], [*STATELESS, objects])
    assert awaited(site, device_of(REPORT)) is None


def test_nothing_is_awaited_where_nothing_is() -> None:
    assert awaited(site_over([], STATELESS), device_of(REPORT)) is None


def test_of_a_version_that_is_for_a_chip_is_spoken_first() -> None:
    found = [release_of("1.1.0", chip="esp32"), release_of("1.1.0", size=9999)]
    site = site_over(found, rules_of())
    about = subject(candidates(site, REPORT), site, REPORT, V("1.1.0"))
    assert (about.release, about.code) == (found[1], "too-big")


def test_what_ends_the_search_is_said_of_all_that_is_older() -> None:
    runs = release_of("1.2.0", running=frozenset((MD5,)))
    found = [release_of("1.3.0", size=9999), runs, release_of("1.1.0")]
    said = candidates(site_over(found, rules_of()), REPORT)
    assert [each.code for each in said] == ["too-big", "same-image", "same-image"]
    assert "1.2.0" in said[2].reason


# -- 3. By the API ---------------------------------------------------------------------------------

LAMP = f"device={MACS[1]}"


def asked(house: House, query: str, who: str = "viewer") -> Any:
    """What GET /explain answers."""
    reply = house.ask(who, "GET", f"explain?{query}")
    assert reply.status == 200, reply.body
    return reply.data


def test_known_device_is_explained_by_what_it_said_last(house: House) -> None:
    found = asked(house, f"device={MACS[0].replace(':', '').lower()}")
    assert {each: found[each] for each in ("device", "known", "project", "running", "version")} == {
        "device": MACS[0], "known": True, "project": "firmware", "running": "1.0.0",
        "version": "1.10.0",
    }  # fmt: skip
    assert len(found["verdicts"]) == len(house.site.rules)
    assert (found["gets"], found["code"], found["looping"]) == (False, "too-big", False)
    assert [each["version"] for each in found["releases"]] == ["1.10.0", "1.9.0", "1.0.0"]
    assert [each["code"] for each in found["releases"]] == ["too-big", "too-big", "not-newer"]
    assert (found["attempts"], "rollout" in found) == ([], False)


def test_device_that_is_not_known_is_explained_by_what_it_would_say(house: House) -> None:
    found = asked(house, "device=aabbccddeeff&project=firmware&running=1.0")
    assert (found["device"], found["known"]) == ("AA:BB:CC:DD:EE:FF", False)
    assert (found["running"], found["version"], found["gets"]) == ("1.0.0", "1.10.0", True)
    nobody = asked(house, "project=firmware&version=1.9.0")
    assert (nobody["device"], nobody["running"], nobody["version"]) == ("", "", "1.9.0")
    assert (nobody["gets"], nobody["reason"]) == (False, "the device gets 1.10.0 instead")


def test_device_may_be_asked_about_as_if_it_ran_something_else(house: House) -> None:
    found = asked(house, f"{LAMP}&running=1.0.0&project=bulb", "lamp")
    assert (found["project"], found["running"], found["code"]) == ("lamp", "1.0.0", "wrong-chip")
    assert [each["code"] for each in found["verdicts"] if each["denies"]] == ["wrong-chip"]


def test_rollout_and_attempts_stand_in_the_explanation(house: House) -> None:
    assert house.admin("POST", ROLLOUTS, PLAN).status == 201
    first, second = ("24:6F:28:00:00:0" + str(number) for number in range(2))
    check(house, first)
    download(house, first)
    found = asked(house, f"device={second}&project=firmware&running=1.0.0&version=1.10.0")
    assert (found["code"], found["rollout"]["state"]) == ("waiting-for-stage", "running")
    assert found["rollout"]["stages"][0]["counts"]["open"] == 1
    assert "its place is taken" in found["reason"]
    member = asked(house, f"device={first}&project=firmware&running=1.0.0")
    assert member["verdicts"][-1]["sentence"] == (
        "the rollout of 1.10.0 has given it to the device before"
    )
    assert [each["version"] for each in member["attempts"]] == ["1.10.0"]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (None, "1.10.0 has no stages: all may have it, until too many fail"),
        ([{}], "the rollout of 1.10.0 is at stage 1 of 1: all devices may have it"),
        ([{"percent": 99, "count": 3}, {}], "the rollout of 1.10.0 is at stage 1 of 2: it is in "
         "the 99 % that may have it: 78.91 %, 0 of 3 places are taken"),
        ([{"count": 3}, {"group": "attic"}], "the rollout of 1.10.0 is at stage 1 of 2: 0 of 3 "
         "places are taken"),
    ],
)  # fmt: skip
def test_stage_says_why_a_device_may_have_a_release(
    stages: object, sentence: str, house: House
) -> None:
    if stages is not None:
        house.admin("POST", ROLLOUTS, {"version": "1.10.0", "stages": stages})
    found = asked(house, "device=24:6F:28:00:00:00&project=firmware&running=1.0.0")
    assert found["verdicts"][-1] == {
        "rule": "rollout", "code": "", "denies": False, "sentence": sentence,
    }  # fmt: skip


def test_explaining_gives_nothing_and_writes_nothing(house: House) -> None:
    asked(house, "device=24:6F:28:00:00:00&project=firmware&running=1.0.0")
    assert house.admin("GET", "rollouts").data["items"] == []
    assert house.admin("GET", "devices/24:6F:28:00:00:00").status == 404


@pytest.mark.parametrize(
    ("who", "query", "status", "why"),
    [
        ("viewer", "", 422, "no ?device: add ?project, and ?running"),
        ("viewer", "device=none", 422, "'none' never asked, or less than 2 s ago: add ?project"),
        ("viewer", f"device={MACS[0]}&version=new", 422, "'new' is no version"),
        ("viewer", f"device={MACS[0]}&running=old", 422, "'old' is no version"),
        ("viewer", f"device={MACS[0]}&version=9.9.9", 404, "there is no 9.9.9 of 'firmware'"),
        ("viewer", f"device={MACS[0]}&project=none", 404, "none"),
        ("viewer", f"device={MACS[0]}&colour=red", 422, "'colour' is not known here"),
        ("lamp", f"device={MACS[0]}", 403, "'lamp' only"),
        ("lamp", f"{LAMP}&project=firmware", 403, "'lamp' only"),
        ("lamp", "device=x&project=firmware", 403, "'lamp' only"),
        ("device", LAMP, 403, "viewer"),
        ("", LAMP, 401, "token"),
    ],
)
def test_question_that_has_no_answer_is_refused(
    who: str, query: str, status: int, why: str, house: House
) -> None:
    reply = house.ask(who, "GET", f"explain?{query}")
    assert (reply.status, why in reply.detail) == (status, True), reply.detail


# -- 4. By the command -----------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]
TOKEN = "ota_a-token_that-nobody.else~has"  # noqa: S105


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command: status, output, complaint."""

    def run(*argv: str, token: str = TOKEN) -> tuple[int, str, str]:
        environ = {"OTA_UPLOAD_TOKEN": token, "OTA_TOKEN": "other"} if token else {}
        status = explain_command.main(argv, environ)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def stand(house: House) -> Iterator[Stand]:
    """The house, open to the street."""
    with standing(house.site) as stand:
        yield stand


def test_command_prints_a_line_for_each_rule(house: House, stand: Stand, run: Run) -> None:
    url = f"http://127.0.0.1:{stand.port}"
    status, out, err = run(url, "--device", MACS[0], token=house.tokens["viewer"])
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[:2] == ["firmware 1.10.0 (firmware-1.10.0.bin)", f"{MACS[0]}, runs 1.0.0"]
    assert "  ok  version     1.10.0 is newer than 1.0.0, which the device runs" in lines
    room = "too-big: 1.10.0 has 5456 bytes, the device 4096 free"
    assert f"  no  room        {room}" in lines
    assert lines[-1] == f"It would not get 1.10.0: {room}"
    assert lines.index("Other releases:") == 3 + len(house.site.rules) + 1
    others = [line.split()[:3] for line in lines if line.split()[1:2] in (["1.9.0"], ["1.0.0"])]
    assert others == [["no", "1.9.0", "too-big:"], ["no", "1.0.0", "not-newer:"]]


def test_command_says_what_it_gets_and_what_became_of_it(
    house: House, stand: Stand, run: Run
) -> None:
    assert house.admin("POST", ROLLOUTS, PLAN).status == 201
    check(house, "24:6F:28:00:00:00")
    url = f"http://127.0.0.1:{stand.port}/"
    status, out, _ = run(
        url, "--device", "246f28000000", "--project", "firmware", "--running", "1.0.0",
        "--version", "1.10", "--token", house.tokens["lamp"], token=house.tokens["viewer"],
    )  # fmt: skip
    assert (status, out) == (2, "")  # the option wins, and its token is for another project
    status, out, _ = run(
        url, "--device", "246f28000000", "--project", "firmware", "--running", "1.0.0",
        "--version", "1.10", token=house.tokens["viewer"],
    )  # fmt: skip
    lines = out.splitlines()
    assert (status, lines[-1]) == (0, "It would get 1.10.0: no rule objects to it")
    assert any(
        line.startswith("Rollout 1 is running, stage 1 of 3: 1 open, 0 proven") for line in lines
    )
    assert lines[lines.index("Its last attempts:") + 1].endswith("UTC  1.10.0  nobody knows yet")


URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("argv", "token", "why"),
    [
        ((), TOKEN, "the following arguments are required: URL, --device"),
        ((URL,), TOKEN, "--device"),
        (("127.0.0.1", "--device", "x"), TOKEN, "begins with http://host"),
        ((f"{URL}/?x=1", "--device", "x"), TOKEN, "a URL without a query"),
        ((URL, "--device", "x"), "", "a token is needed: OTA_UPLOAD_TOKEN or --token"),
        ((URL, "--device", "x", "--timeout", "0"), TOKEN, "--timeout: more than 0"),
        ((URL, "--device", "x", "--ca", "none.pem"), TOKEN, "--ca none.pem: no certificate"),
        ((URL, "--device", "x", "--force"), TOKEN, "unrecognized arguments: --force"),
        ((URL, "--device", "x"), TOKEN, "127.0.0.1:1: nobody listens at this address"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    argv: Sequence[str], token: str, why: str, run: Run
) -> None:
    status, out, err = run(*argv, token=token)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ota-server: ")
    assert why in err
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "what answers is no ota-server"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "with --state?"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://a/\r\nContent-Length: 0\r\n\r\n",
         "it leads to https://a/: name that instead"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 32\r\n\r\n"
         + TOKEN.encode(), "***"),
        (b"no HTTP", "speaks no HTTP/1"),
        (b"", "the connection was lost"),
    ],
)  # fmt: skip
def test_server_that_does_not_answer_is_one_line_and_status_2(
    answer: bytes, why: str, run: Run
) -> None:
    with scripted(lambda _: answer) as port:
        status, out, err = run(f"http://127.0.0.1:{port}", "--device", "x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert why in err
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (
            ("--device", "none"),
            "422 Unprocessable Entity: 'none' never asked, or less than 2 s ago: "
            "add --project, and --running\n",
        ),
        (("--device", MACS[0], "--version", "9.9.9"), "404 Not Found: there is no 9.9.9"),
    ],
)
def test_refusal_of_the_server_is_its_sentence(
    query: Sequence[str], why: str, house: House, stand: Stand, run: Run
) -> None:
    status, out, err = run(f"http://127.0.0.1:{stand.port}", *query, token=house.tokens["viewer"])
    assert (status, out) == (2, "")
    assert err.startswith(f"ota-server: {why}")


def test_project_in_the_url_is_said(house: House, stand: Stand, run: Run) -> None:
    url = f"http://127.0.0.1:{stand.port}/firmware"
    status, _, err = run(url, "--device", MACS[0], token=house.tokens["viewer"])
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith("; name only the server's address, without /firmware\n")


def test_the_script_explains(house: House, stand: Stand) -> None:
    argv = [f"http://127.0.0.1:{stand.port}", "--device", "x", "--project", "firmware"]
    script = Path(ota_server.__file__)
    done = subprocess.run(
        [sys.executable, "-I", str(script), "explain", *argv], check=False, capture_output=True,
        text=True, timeout=PATIENCE * 3, env={"OTA_TOKEN": house.tokens["viewer"]},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "firmware 1.10.0 (firmware-1.10.0.bin)\nx (not known), does not say what it runs\n"
    )


def test_help_says_what_each_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_command.main(["--help"], {}) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("0: it would get", "1: it would not", "2: wrong usage", "OTA_UPLOAD_TOKEN"):
        assert words in out
