"""Rollouts by the API: begun, watched, halted; what became of devices; two who act at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_fleet import rollout as pure
from ota_fleet.rollout import (
    FINISHED,
    RUNNING,
    Asker,
    Counts,
    Plan,
    Rollout,
    Stage,
    advance,
    missing,
    objection,
)
from ota_server import Transfer
from tests.conftest import site_of, wait_until
from tests.core.wire import PATIENCE, standing
from tests.data.make_images import esp32_image, esp8266_image
from tests.fleet.test_api import MACS, NEW, Answer, House, is_part, named
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - a fixture
from tests.fleet.test_api import house as house  # noqa: PLC0414 - a fixture
from tests.fleet.test_fleet import close
from tests.test_house import ROOT

FIRST, SECOND, THIRD = (f"24:6F:28:00:00:0{number}" for number in range(3))
ROLLOUTS = "projects/firmware/rollouts"
STAGES = [{"count": 1}, {"percent": 50, "proven": 2, "wait": 60}, {}]
PLAN = {"version": "1.10.0", "stages": STAGES}
CALM = {"open": 0, "proven": 0, "returned": 0, "broken": 0, "silent": 0}
OWN = f"devices/{MACS[1]}"  # a device of lamp


@pytest.fixture
def going(house: House) -> House:
    """With rollout 1: 1.10.0 of firmware, in three stages, of which the first is one device."""
    assert house.admin("POST", ROLLOUTS, PLAN).status == 201
    return house


def check(house: House, device: str, version: str = "1.0.0") -> Answer:
    """What an ESP8266 is told."""
    fields = f"x-ESP8266-version: {version}", f"x-ESP8266-STA-MAC: {device}"
    return house.ask("", "GET", "/firmware", None, *fields)


def download(house: House, device: str) -> None:
    """What the loop tells of an image that left whole."""
    with (image := house.site.catalog.open(house.site.catalog.releases("firmware")[0])).file:
        for carry in house.site.carriers:
            part = range(image.size)
            carry(Transfer(f"{device} 192.0.2.9", image, part, lambda: image.size, over=True))


def update(house: House, device: str, then: str = "1.10.0") -> None:
    """A device gets 1.10.0 whole, and comes back with a version."""
    assert check(house, device).headers["x-version"] == "1.10.0"
    download(house, device)
    check(house, device, then)


def counts(house: House, stage: int = 1) -> Mapping[str, int]:
    """Of a stage of rollout 1, by what became of its devices."""
    found: Mapping[str, int] = house.admin("GET", "rollouts/1").data["stages"][stage - 1]["counts"]
    return found


def control(house: House, do: str, **more: str) -> Answer:
    """Does something with rollout 1."""
    return house.ask("publisher", "POST", "rollouts/1/control", {"do": do, **more})


# -- 1. What the operations do ---------------------------------------------------------------------

DONE: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the answer holds
    ("viewer", "GET", "rollouts", None, 200, {"items": [{"id": 1, "project": "firmware"}]}),
    ("viewer", "GET", "rollouts?project=firmware", None, 200, {"items": [{"id": 1}]}),
    ("viewer", "GET", "rollouts?project=bulb", None, 200, {"items": [], "next": None}),
    ("lamp", "GET", "rollouts", None, 200, {"items": []}),
    ("viewer", "GET", "rollouts/1", None, 200,
     {"version": "1.10.0", "state": "running", "stage": 1, "watched": False, "reason": "",
      "missing": "1 more device has to prove it", "pace": 0, "who": "token 3 (admin)",
      "stages": [{"count": 1, "counts": CALM}, {"percent": 50, "wait": 60},
                                    {"percent": 100, "threshold": 10, "minimum": 5}]}),
    ("publisher", "POST", "projects/bulb/rollouts", {"version": "v1.0"}, 201,
     {"id": 2, "project": "lamp", "version": "1.0.0", "stages": [{"percent": 100, "proven": 5}]}),
    ("lamp", "POST", "projects/lamp/rollouts",
     {"version": "1.0.0", "pace": 5, "period": 60, "at_once": 2, "patience": 900, "below": "v0.9",
      "group": "attic", "label": "x", "urgent": True, "stages": [{"group": "attic"}, {}]}, 201,
     {"pace": 5, "period": 60, "at_once": 2, "patience": 900, "below": "0.9.0", "group": "attic",
      "label": "x", "urgent": True, "stages": [{"group": "attic"}, {"group": ""}]}),
    ("publisher", "POST", "rollouts/1/control", {"do": "pause", "reason": "lunch"}, 200,
     {"state": "paused", "reason": "lunch", "missing": ""}),
    ("publisher", "POST", "rollouts/1/control", {"do": "abort"}, 200, {"state": "aborted"}),
    ("publisher", "POST", "rollouts/1/control", {"do": "finish"}, 200, {"state": "finished"}),
    ("publisher", "POST", "rollouts/1/control", {"do": "advance"}, 200, {"stage": 2}),
    ("viewer", "GET", "rollouts/1/devices", None, 200, {"items": [], "next": None}),
    ("viewer", "GET", "rollouts/1/devices?stage=2", None, 200, {"items": []}),
    ("viewer", "GET", "rollouts/1/attempts", None, 200, {"items": [], "next": None}),
    ("lamp", "GET", f"{OWN}/attempts", None, 200, {"items": []}),
    ("publisher", "POST", f"{OWN}/forgive", None, 204, None),
]  # fmt: skip


@pytest.mark.parametrize("row", DONE, ids=named)
def test_operation_does_what_it_says(row: tuple[Any, ...], going: House) -> None:
    who, method, path, body, status, wanted = row
    reply = going.ask(who, method, path, body)
    assert reply.status == status, reply.body
    assert is_part(wanted, reply.data if reply.body else None), reply.data


@pytest.mark.parametrize("row", [row for row in DONE if row[1] == "POST"], ids=named)
def test_change_stands_in_the_audit_with_who_made_it(row: tuple[Any, ...], going: House) -> None:
    who, method, path, body, *_ = row
    before = len(going.admin("GET", "audit").data["items"])
    going.ask(who, method, path, body)
    (entry,) = going.admin("GET", "audit").data["items"][before:]
    assert re.fullmatch(rf"token [0-9]+ \({who}\)", entry["who"])
    assert entry["what"].startswith(OWN.removeprefix("devices/") if "forgive" in path else
                                    ("1 of firmware 1.10.0", "2 of lamp 1.0.0"))  # fmt: skip


REFUSED: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the sentence says
    ("admin", "POST", "projects/none/rollouts", PLAN, 404, "no project 'none'"),
    ("admin", "POST", ROLLOUTS, {}, 422, "version is missing"),
    ("admin", "POST", ROLLOUTS, {"version": "new"}, 422, "'new' is no version"),
    ("admin", "POST", ROLLOUTS, {"version": "9.9.9"}, 422, "there is no 9.9.9 of 'firmware'"),
    ("admin", "POST", ROLLOUTS, PLAN, 409, "is running: abort or finish it first"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "speed": 1}, 422, "'speed' is not known here"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "stages": []}, 422, "1 to 20 stages"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "stages": [{}] * 21}, 422, "more than 20"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "stages": [{"percent": 0}]}, 422,
     "stages[0].percent is to be from 1 to 100"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "stages": [{}, {"percent": 5}]}, 422, "fewer devices"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "below": "old"}, 422, "'old' is no version"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "period": 0}, 422, "period is to be from 1"),
    ("admin", "POST", ROLLOUTS, {**PLAN, "urgent": 1}, 422, "urgent is to be true or false"),
    ("lamp", "POST", ROLLOUTS, PLAN, 403, "'lamp' only"),
    ("lamp", "GET", "rollouts?project=firmware", None, 403, "'lamp' only"),
    ("lamp", "GET", "rollouts/1", None, 403, "'lamp' only"),
    ("lamp", "POST", "rollouts/1/control", {"do": "abort"}, 403, "'lamp' only"),
    ("lamp", "GET", "rollouts/1/devices", None, 403, "'lamp' only"),
    ("lamp", "GET", "rollouts/1/attempts", None, 403, "'lamp' only"),
    ("lamp", "GET", f"devices/{MACS[0]}/attempts", None, 403, "'lamp' only"),
    ("lamp", "POST", f"{OWN}/forgive", None, 403, "'lamp' only"),
    ("admin", "GET", "rollouts/9", None, 404, "no rollout 9"),
    ("admin", "GET", "rollouts/last", None, 404, "'last' is no number"),
    ("admin", "POST", "rollouts/9/control", {"do": "abort"}, 404, "no rollout 9"),
    ("admin", "POST", "rollouts/1/control", {}, 422, "do is missing"),
    ("admin", "POST", "rollouts/1/control", {"do": "stop"}, 422, "do is to be one of pause"),
    ("admin", "POST", "rollouts/1/control", {"do": "resume"}, 409, "is running has nothing to"),
    ("admin", "GET", "rollouts/9/devices", None, 404, "no rollout 9"),
    ("admin", "GET", "rollouts/1/devices?stage=0", None, 422, "?stage is to be from 1 to 20"),
    ("admin", "GET", "rollouts?cursor=x", None, 422, "cursor"),
    ("admin", "GET", "devices/none/attempts", None, 404, "'none' is not known"),
    ("admin", "POST", "devices/none/forgive", None, 404, "'none' is not known"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=named)
def test_refusal_says_what_is_wrong(row: tuple[Any, ...], going: House) -> None:
    who, method, path, body, status, why = row
    before = going.admin("GET", "audit").data["items"]
    reply = going.ask(who, method, path, body)
    assert (reply.status, why in reply.detail) == (status, True), reply.detail
    assert going.admin("GET", "audit").data["items"] == before


def test_plan_that_was_read_can_be_begun_again(going: House) -> None:
    found = going.admin("GET", "rollouts/1").data
    wish = {each: found[each] for each in ("pace", "period", "at_once", "patience", "urgent")}
    wish["stages"] = [{**stage} for stage in found["stages"]]
    for stage in wish["stages"]:
        del stage["counts"]
    control(going, "abort")
    again = going.admin("POST", ROLLOUTS, {"version": "1.10.0", **wish}).data
    assert again["stages"] == found["stages"]
    assert [each["id"] for each in going.admin("GET", "rollouts").data["items"]] == [2, 1]


def test_rollout_is_of_the_release_whatever_is_said_of_its_build(house: House) -> None:
    image = esp8266_image("firmware", "2.0.0")
    assert house.admin("PUT", "projects/firmware/releases/2.0.0+b7", image).status == 201
    reply = house.admin("POST", ROLLOUTS, {"version": "2.0.0", "stages": [{"group": "none"}]})
    assert reply.data["version"] == "2.0.0+b7"
    assert check(house, FIRST).headers["x-version"] == "1.10.0"


# -- 2. A rollout is watched -----------------------------------------------------------------------


def test_second_stage_opens_once_the_first_device_has_proven_it(going: House) -> None:
    assert check(going, FIRST).headers["x-version"] == "1.10.0"
    assert counts(going) == {**CALM, "open": 1}
    assert check(going, SECOND).headers["x-version"] == "1.9.0"  # one place, which is taken
    download(going, FIRST)
    check(going, FIRST, "1.10.0")
    wait_until(lambda: counts(going)["proven"] == 1)
    found = going.admin("GET", "rollouts/1").data
    assert (found["stage"], found["stages"][0]["counts"]) == (2, {**CALM, "proven": 1})
    assert re.fullmatch(
        r"2 more devices have to prove it, it stays open until \S+ \d\d:\d\d UTC", found["missing"]
    )


def test_devices_and_attempts_tell_what_became_of_them(going: House) -> None:
    update(going, FIRST)
    wait_until(lambda: counts(going)["proven"] == 1)
    control(going, "advance")
    update(going, SECOND, then="1.0.0")  # and is given it once more
    check(going, THIRD)
    wait_until(lambda: counts(going, 3)["returned"] == 1)
    members = going.admin("GET", "rollouts/1/devices").data["items"]
    assert [(each["device"], each["stage"], each["outcome"]) for each in members] == [
        (FIRST, 1, "proven"), (SECOND, 3, "returned"), (THIRD, 3, ""),
    ]  # fmt: skip
    assert going.admin("GET", "rollouts/1/devices?stage=1").data["items"] == members[:1]
    attempts = going.admin("GET", "rollouts/1/attempts").data["items"]
    assert [(each["device"], each["outcome"], each["before"]) for each in attempts] == [
        (THIRD, "", "1.0.0"), (SECOND, "", "1.0.0"), (SECOND, "returned", "1.0.0"),
        (FIRST, "proven", "1.0.0"),
    ]  # fmt: skip
    (own,) = going.admin("GET", f"devices/{FIRST}/attempts").data["items"]
    assert own == attempts[-1]
    assert own["sent"] == own["size"] > 0


def test_bad_release_halts_and_who_resumes_puts_up_with_it(going: House) -> None:
    update(going, FIRST, then="1.0.0")
    wait_until(lambda: counts(going)["returned"] == 1)
    found = going.admin("GET", "rollouts/1").data
    assert (found["state"], found["missing"]) == ("halted", "")
    assert found["reason"] == "1 of 1 devices of stage 1 failed (1 returned), more than 10 %"
    assert check(going, FIRST).headers["x-version"] == "1.9.0"
    assert control(going, "resume", reason="it was the power").data["state"] == "running"
    assert check(going, FIRST).headers["x-version"] == "1.10.0"


@pytest.mark.parametrize(
    ("do", "offered"), [("pause", "1.9.0"), ("abort", "1.9.0"), ("finish", "1.10.0")]
)
def test_what_somebody_does_holds_for_the_next_device(do: str, offered: str, going: House) -> None:
    control(going, do)
    assert check(going, FIRST).headers["x-version"] == offered


def test_device_that_loops_has_it_again_once_somebody_says_so(house: House) -> None:
    for _ in range(3):
        update(house, FIRST, then="1.0.0")
    wait_until(lambda: "loop" in check(house, FIRST).headers.get("x-ota-reason", ""))
    assert house.ask("publisher", "POST", f"devices/{FIRST}/forgive").status == 204
    assert check(house, FIRST).headers["x-version"] == "1.10.0"


def test_token_of_a_project_sees_no_attempt_of_a_device_in_another(house: House) -> None:
    assert check(house, FIRST).status == 200
    wait_until(lambda: house.admin("GET", f"devices/{FIRST}").status == 200)
    assert house.admin("PUT", "projects/lamp/releases/2.0.0", NEW).status == 201
    fields = "x-ESP32-version: 2.0.0", f"x-ESP32-STA-MAC: {FIRST}"
    house.ask("", "GET", "/lamp", None, *fields)
    wait_until(lambda: house.ask("lamp", "GET", f"devices/{FIRST}").status == 200)
    assert house.ask("lamp", "GET", f"devices/{FIRST}/attempts").data["items"] == []
    assert len(house.admin("GET", f"devices/{FIRST}/attempts").data["items"]) == 1


# -- 3. Lists --------------------------------------------------------------------------------------


@pytest.fixture
def long(house: House) -> House:
    """Nine rollouts, of which the last is for all, and nine devices that were given its release."""
    for number in range(9):
        assert house.admin("POST", ROLLOUTS, {"version": "1.10.0"}).status == 201
        if number < 8:
            house.admin("POST", f"rollouts/{number + 1}/control", {"do": "abort"})
    for number in range(9):
        assert check(house, f"24:6F:28:00:01:0{number}").status == 200
    for _ in range(9):  # one device that has tried often
        check(house, FIRST)
        check(house, FIRST, "1.9.0")
    return house


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("rollouts", "id"),
        ("rollouts?project=firmware", "id"),
        ("rollouts/9/devices", "device"),
        ("rollouts/9/attempts", "id"),
    ],
)
def test_pages_of_a_list_are_the_list(path: str, key: str, long: House) -> None:
    join = "&" if "?" in path else "?"
    whole = [each[key] for each in long.admin("GET", f"{path}{join}limit=1000").data["items"]]
    assert len(whole) >= 9
    assert whole == sorted(whole, reverse=key == "id")
    for limit in (1, 2, 4, len(whole)):
        found: list[object] = []
        target = f"{path}{join}limit={limit}"
        while True:
            page = long.admin("GET", target).data
            found += [each[key] for each in page["items"]]
            if page["next"] is None:
                break
            target = f"{path}{join}limit={limit}&cursor={page['next']}"
        assert found == whole


# -- 4. Two at once --------------------------------------------------------------------------------


@contextmanager
def another(house: House) -> Iterator[House]:
    """A second server with the same memory."""
    site = site_of(house.state.parent / "firmware", state=str(house.state))
    try:
        yield House(site, house.tokens)
    finally:
        close(site)


def at_once(*asked: partial[Answer]) -> list[Answer]:
    """What several are told who ask at the same moment."""
    start, found = threading.Barrier(len(asked)), list[Answer]()

    def ask(each: partial[Answer]) -> None:
        start.wait(10)
        found.append(each())

    threads = [threading.Thread(target=ask, args=(each,)) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


@pytest.mark.parametrize("pair", [("abort", "abort"), ("abort", "finish"), ("pause", "pause")])
@pytest.mark.parametrize("servers", [1, 2])
def test_of_two_administrators_one_is_too_late(
    servers: int, pair: Sequence[str], going: House
) -> None:
    with another(going) as beside:
        houses = (going, beside if servers == 2 else going)
        found = at_once(
            *(partial(control, house, do) for house, do in zip(houses, pair, strict=True))
        )
        done, late = sorted(found, key=lambda each: each.status)
        assert (done.status, late.status) == (200, 409)
        assert re.search(r"a rollout that is \w+ has nothing to \w+", late.detail)
        wait_until(lambda: beside.admin("GET", "rollouts/1").data["state"] == done.data["state"])
        acts = [each["action"] for each in going.admin("GET", "audit").data["items"]]
        assert sum(each.endswith(" rollout") for each in acts) == 2  # it was begun, too


@pytest.mark.parametrize("servers", [1, 2])
def test_a_version_has_one_rollout_under_way(servers: int, house: House) -> None:
    with another(house) as beside:
        houses = (house, beside if servers == 2 else house)
        begun = at_once(*(partial(each.admin, "POST", ROLLOUTS, PLAN) for each in houses))
        assert sorted(each.status for each in begun) == [201, 409]
        assert len(house.admin("GET", "rollouts").data["items"]) == 1


# -- 5. What is missing, in a sentence -------------------------------------------------------------

amounts = st.integers(0, 12)
stages = st.builds(
    Stage,
    percent=st.sampled_from([50, 100]),
    count=st.sampled_from([0, 0, 5]),
    proven=amounts,
    wait=st.sampled_from([0, 100]),
    threshold=amounts,
)
plans = st.builds(Plan, st.lists(stages, min_size=1, max_size=3).map(tuple), urgent=st.booleans())
results = st.dictionaries(st.integers(0, 2), st.builds(Counts, *[amounts] * 5))


@given(plans, results, st.sampled_from(["running", "paused"]), amounts.map(lambda at: at * 20))
def test_something_is_missing_as_long_as_the_stage_stays(
    plan: Plan, found: Mapping[int, Counts], state: str, now: int
) -> None:
    rollout = advance(Rollout(1, "p", "1.0.0", plan, state), found, now)
    said = missing(rollout, found, now)
    assert bool(said) == (rollout.state == "running")
    assert not said or all(part.strip() for part in said.split(","))


@pytest.mark.parametrize(
    ("stage", "found", "sentence"),
    [
        (Stage(proven=3), Counts(), "3 more devices have to prove it"),
        (Stage(proven=3), Counts(proven=2), "1 more device has to prove it"),
        (Stage(wait=3600), Counts(proven=5), "it stays open until 1970-01-01 01:00 UTC"),
        (Stage(count=2, proven=9), Counts(proven=1), "1 more device has to prove it"),
        (
            Stage(),
            Counts(open=3, proven=9),
            "no more than 10 % may have failed, with the 3 of which nobody knows yet",
        ),
        (Stage(), Counts(proven=5), ""),
    ],
)
def test_what_is_missing_is_a_sentence(stage: Stage, found: Counts, sentence: str) -> None:
    assert missing(Rollout(1, "p", "1.0.0", Plan((stage, Stage()))), {0: found}, 0) == sentence


def test_last_stage_that_is_not_for_all_waits_for_somebody() -> None:
    rollout = Rollout(1, "p", "1.0.0", Plan((Stage(count=2),)))
    assert missing(rollout, {0: Counts(proven=2)}, 0) == "somebody has to finish it"
    assert missing(rollout, {0: Counts(proven=1)}, 0) == "1 more device has to prove it"


@given(plans, results, st.integers(0, 2), st.sampled_from([FINISHED, RUNNING]), st.text())
def test_whoever_may_have_it_is_told_why(
    plan: Plan, found: Mapping[int, Counts], stage: int, state: str, device: str
) -> None:
    at = min(stage, len(plan.stages) - 1)
    rollout = Rollout(1, "p", "1.0.0", plan, state, at)
    asker = Asker(device, is_member=device == "0")
    if objection(rollout, found, asker) is None:
        said = pure.standing(rollout, found, asker)
        for share in re.findall(r"it is in the 50 % that may have it: ([0-9.]+) %", said):
            assert float(share) < 50
        for taken in re.findall("([0-9]+) of 5 places are taken", said):
            assert int(taken) < 5
        assert said.startswith(("the rollout of 1.0.0 ", "1.0.0 has no stages"))


@pytest.mark.parametrize(
    ("stages", "more", "sentence"),
    [
        ([{"count": 1}, {}], {}, "1 more device has to prove it"),
        ([{"proven": 2, "count": 5}, {}], {}, "2 more devices have to prove it"),
        ([{"proven": 20}, {}], {},
         "20 more devices have to prove it; only 3 of the 3 devices known are in this stage: open "
         "the next one by hand, or begin anew with a smaller number"),
        ([{"proven": 20}], {},
         "20 more devices have to prove it; only 3 of the 3 devices known are in this stage: "
         "finish it by hand, or begin anew with a smaller number"),
        ([{"count": 1}], {"below": "0.1.0"},
         "1 more device has to prove it; none of the 3 devices known is in this stage: "
         "finish it by hand, or begin anew with a smaller number"),
        ([{"count": 1, "group": "attic"}, {}], {},
         "1 more device has to prove it; no device is in the group 'attic'"),
        ([{"count": 1}, {"group": "attic"}], {}, "1 more device has to prove it"),
    ],
)  # fmt: skip
def test_stage_that_waits_for_ever_says_why(
    stages: list[Any], more: dict[str, str], sentence: str, house: House
) -> None:
    plan = {"version": "1.10.0", "stages": stages, **more}
    assert house.admin("POST", ROLLOUTS, plan).data["missing"] == sentence
    assert house.admin("GET", "rollouts/1").data["missing"] == sentence
    assert (
        house.admin("GET", "rollouts").data["items"][0]["missing"]
        == sentence.split(";", maxsplit=1)[0]
    )


# -- 6. As the README says -------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_of_the_readme_do_what_they_say(house: House) -> None:
    text = (ROOT / "README.md").read_text()
    section = text.partition("\n## Rollouts\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^    ((?:curl|api=|rollout=|  \"stages).*)$", section, re.MULTILINE)
    assert len(lines) > 12
    device = "5C:CF:7F:12:34:56"
    assert house.admin("PUT", "projects/lamp/releases/1.10.0", esp32_image("lamp", "1.10.0")).status
    house.ask("", "GET", "/lamp", None, "x-ESP32-version: 1.10.0", f"x-ESP32-STA-MAC: {device}")
    wait_until(lambda: house.admin("GET", f"devices/{device}").status == 200)
    with standing(house.site) as stand:
        script = "\n".join(["set -e", 'curl() { command curl -sS --fail-with-body "$@"; }', *lines])
        script = script.replace(":8000", f":{stand.port}").replace("rollout=3 ", "rollout=1 ")
        done = subprocess.run(
            ["bash", "-c", script], check=False, capture_output=True, text=True,
            timeout=PATIENCE * 3, env={**os.environ, "OTA_UPLOAD_TOKEN": house.tokens["publisher"]},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert house.admin("GET", "rollouts/1").data["state"] == "paused"
    assert house.admin("GET", "groups/attic").data["hold"] == "yes"
    said = house.admin("GET", "projects/lamp/policy").data
    assert (said["floors"], said["approval"]) == (["7.2.0"], "yes")
    small = re.findall(r"^    (\"stages.*)$", section, re.MULTILINE)
    assert [len(pure.read_plan(json.loads(f"{{{each}}}")).stages) for each in small] == [3]
