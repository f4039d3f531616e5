"""Pages of rollouts, groups and policies: what they show, what they change, and for whom.

Devices are emulators that ask the real server; the clock is the test's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_fleet import extend, plan_forms
from ota_fleet.accounts import ROLES
from ota_fleet.assignments import Assignments
from ota_fleet.attempts import USUAL_PATIENCE
from ota_fleet.grants import Grants
from ota_fleet.html import form, url
from ota_fleet.pages import Call
from ota_fleet.plan_forms import (
    COLUMNS,
    OWN,
    PRESETS,
    plan_fields,
    plan_given,
    seconds_of,
    span_text,
)
from ota_fleet.policy import NOTHING, Policy
from ota_fleet.registry import Registry
from ota_fleet.rollout import WATCHED, Plan, Stage, plan_of, read_plan, share_of
from ota_fleet.rollout_pages import ROWS
from ota_fleet.rollouts import Rollouts
from ota_fleet.stock import Stock
from ota_server import Site, Version, parse_head
from tests.conftest import put, site_of, wait_until
from tests.core.wire import Stand, request, standing
from tests.data.make_images import esp8266_image
from tests.devices import Esp8266
from tests.fleet import test_pages
from tests.fleet.test_device_pages import NOW, audit_of, link, mac, sighting
from tests.fleet.test_fleet import close
from tests.fleet.test_pages import MAC, XSS, Browser, House, Seen, check_page, fragment, state_of

furnished = test_pages.furnished

NEWEST = "1.10.0"
DEVICE = url("/admin/devices", MAC)
LIST, NEW, ONE = "/admin/rollouts", "/admin/rollouts/new", "/admin/rollouts/1"
GROUP, POLICY = "/admin/groups/attic", "/admin/projects/firmware/policy"
RELEASE = f"/admin/projects/firmware/releases/{NEWEST}"
PATHS = [LIST, ONE, "/admin/groups", GROUP, POLICY, RELEASE, DEVICE, "/admin"]


@dataclass
class Clock:
    """A time that goes on when somebody says so."""

    at: float = NOW

    def __call__(self) -> float:
        """UTC seconds."""
        return self.at


class Town(NamedTuple):
    """A house, a server in front of it, and devices that ask."""

    house: House
    clock: Clock
    stand: Stand

    @property
    def site(self) -> Site:
        """What is served."""
        return self.house.site

    @property
    def grants(self) -> Grants:
        """What was given to whom."""
        owner = getattr(self.site.grant, "__self__", None)
        assert isinstance(owner, Grants)
        return owner

    @property
    def rollouts(self) -> Rollouts:
        """Who gets what when."""
        return self.grants._rollouts

    @property
    def assignments(self) -> Assignments:
        """What people decided."""
        return self.grants._assignments

    @property
    def registry(self) -> Registry:
        """What is remembered."""
        return self.grants._registry

    def device(self, number: int, version: str = "1.9.0") -> Esp8266:
        """One that asks for the firmware."""
        return Esp8266(host="127.0.0.1", port=self.stand.port, path="/firmware", mac=mac(number),
                       image=esp8266_image("firmware", version))  # fmt: skip

    def update(self, device: Esp8266) -> bool:
        """Whether a device was given an image; what it says is written down."""
        self.clock.at += 1
        given = device.update()
        self.registry.flush()
        return given == "HTTP_UPDATE_OK"

    def wait(self, seconds: int) -> None:
        """Time passes; the server looks now and then who is silent."""
        for _ in range(0, seconds, 1800):
            self.clock.at += 1800
            self.grants.sweep()

    def fall_back(self, device: Esp8266) -> None:
        """It was given an image, and starts the old one again."""
        before = device.image
        assert self.update(device)
        device.image = before

    def begin(self, *stages: Stage, **more: Any) -> int:
        """A rollout of the newest version."""
        plan = Plan(stages or (Stage(),), **more)
        return self.rollouts.create("firmware", Version.parse(NEWEST), plan, "ada", NOW).id


@pytest.fixture
def town(folder: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[Town]:
    """`firmware` 1.0.0, 1.9.0 and 1.10.0; one device is known, with 1.9.0."""
    with built(folder, furnished) as town:
        yield town


@contextmanager
def built(folder: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[Town]:
    """The same over a folder."""
    state, clock = folder.parent / "state", Clock()
    state.mkdir()
    (state / "fleet.db").write_bytes(furnished[0].read_bytes())
    bare = site_of(folder)
    site = extend(replace(bare, config=replace(bare.config, state=str(state))), clock)
    people = (Browser(site, {"ota": furnished[1][role]}) for role in ROLES)
    try:
        with standing(site) as stand:
            yield Town(House(site, *people), clock, stand)
    finally:
        close(site)


def standings(seen: Seen) -> list[dict[str, int]]:
    """The bars of a rollout's page, from their keys."""
    lists = [each for each in seen.tree.iter("ul") if each.get("class") == "keys"]
    rows = [[" ".join("".join(item.itertext()).split()) for item in each] for each in lists]
    pairs = [[text.rpartition(" ") for text in row] for row in rows]
    return [{name: int(amount) for name, _, amount in row} for row in pairs]


def outcomes(seen: Seen) -> list[str]:
    """What attempts came to, in a word."""
    return [text.split()[0] for text in seen.texts("td", **{"data-label": "Outcome"})]


def notes(seen: Seen, kind: str) -> list[str]:
    """The sentences that stand out."""
    return seen.texts("p", **{"class": f"note {kind}"})


def buttons(seen: Seen) -> list[str]:
    """What can be pressed, but for signing out."""
    return [each for each in seen.texts("button", type="submit") if each != "Sign out"]


# -- 1. Who may ------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ROLES)
def test_pages_are_whole_for_every_role(town: Town, who: str) -> None:
    town.begin(Stage(count=1), Stage(percent=10, group="attic"), Stage(), below="9.0.0", pace=3)
    town.fall_back(town.device(1))
    town.update(town.device(1))
    for path in [*PATHS, NEW] if who != "viewer" else PATHS:
        seen = town.house.by(who).get(path)
        check_page(seen)
        assert seen.status == 200


def test_who_only_looks_has_no_form(town: Town) -> None:
    town.begin()
    for path in PATHS:
        assert buttons(town.house.viewer.get(path)) == [], path
    assert town.house.viewer.get(NEW).status == 403


CHANGES: list[tuple[str, dict[str, Any]]] = [
    (NEW, {"release": f"firmware {NEWEST}", "stages": "careful"}),
    *((ONE, {"do": do, "reason": "x"}) for do in ("pause", "advance", "finish", "abort")),
    ("/admin/groups", {"name": "hall"}),
    (GROUP, {"do": "save", "hold": "yes"}),
    (GROUP, {"do": "delete", "sure": 1}),
    (POLICY, {"do": "save", "floors": "1.9.0"}),
    (POLICY, {"do": "plan", "stages": "careful"}),
    (RELEASE, {"do": "channel", "channel": "nightly"}),
    *((DEVICE, {"do": do, "version": "1.9.0"}) for do in ("again", "approve", "forgive")),
    (DEVICE, {"do": "pin", "hold": "yes", "group": "attic", "channel": "nightly"}),
    ("/admin/devices", {"do": "group", "with": "attic", "device": MAC}),
]


@pytest.mark.parametrize(("path", "words"), CHANGES)
def test_only_publishers_change_something_and_only_by_their_own_form(
    town: Town, path: str, words: dict[str, Any]
) -> None:
    town.begin(Stage(count=1), Stage())
    before = state_of(town.site)
    assert town.house.viewer.send(path, **words).status == 403
    assert Browser(town.site).send(path, **words).status == 401
    for csrf in ("", "0" * 64):
        assert town.house.publisher.send(path, **{**words, "csrf": csrf}).status == 403
    assert state_of(town.site) == before


# -- 2. A rollout is begun -------------------------------------------------------------------------


def test_rollout_is_begun_by_a_form(town: Town) -> None:
    seen = town.house.publisher.get(url(NEW, project="firmware", version="1.9.0"))
    chosen = [each.text for each in seen.control("release") if "selected" in each.attrib]
    assert chosen == ["firmware 1.9.0"]
    assert len(seen.texts("option")) == 3 + len(PRESETS) + 1
    seen = town.house.publisher.do(NEW, release=f"firmware {NEWEST}", stages="careful", pace="5",
                                   period="10 min", urgent="1")  # fmt: skip
    assert seen.said == f"The rollout of firmware {NEWEST} begins."
    assert seen.texts("h3") == ["1. The first device open", "2. 10 % of the devices",
                                "3. All devices"]  # fmt: skip
    assert "5 devices in 10 min" in seen.texts("dd")
    rollout, _ = town.rollouts.get(1)
    assert rollout.plan == Plan(PRESETS["careful"][1], pace=5, period=600, urgent=True)
    assert rollout.who == test_pages.PEOPLE["publisher"]
    assert audit_of(town.site)[-1][1:] == ("begin rollout", f"1 of firmware {NEWEST}, stages: 3")


def rows(*lines: str) -> dict[str, list[str]]:
    """Stages as they are filled in, one a line; columns are between bars."""
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    columns = zip(*cells, strict=True)
    return {f"stage_{name}": [*column] for name, column in zip(COLUMNS, columns, strict=True)}


def test_stages_of_its_own_are_filled_in(town: Town) -> None:
    town.house.publisher.do(
        NEW, release=f"firmware {NEWEST}", stages=OWN, below="v1.5", group="attic", label="a, b",
        at_once="2", patience="2 h", **rows(
            "    | 1 |      | 1 |        | 0  | 1",
            "    |   |      |   |        |    |  ",
            " 5  |   | hall | 3 | 90 min |    |  ",
            "100 |   |      | 1 | 1 d    | 33 | 9"),
    )  # fmt: skip
    rollout, _ = town.rollouts.get(1)
    assert rollout.plan == Plan(
        (Stage(count=1, proven=1, threshold=0, minimum=1),
         Stage(5, group="hall", proven=3, wait=5_400),
         Stage(proven=1, wait=86_400, threshold=33, minimum=9)),
        at_once=2, patience=7_200, below="1.5.0", group="attic", label="a, b",
    )  # fmt: skip


FLAWED: list[tuple[dict[str, Any], int, str]] = [
    ({"release": ""}, 422, "choose the release"),
    ({"release": "firmware one"}, 422, "one"),
    ({"release": "nothing 1.0.0"}, 404, "no project"),
    ({"release": "firmware 7.0.0"}, 422, "7.0.0"),
    ({"stages": "fast"}, 422, "choose the stages"),
    ({"stages": OWN}, 422, "fill in at least one"),
    (rows("50 | | | | | |"), 422, "choose 'As filled in below'"),
    ({"stages": OWN, **rows("fifty | | | | | |")}, 422, "stage 1, Percent: 'fifty' is no number"),
    (
        {"stages": OWN, "pace": "many", **rows("1 | | | | | |", "x | | | | soon | |")},
        422,
        "stage 2, Percent: 'x' is no number; stage 2, Open for: 'soon' is no time such as 90 s, "
        "30 min, 2 h or 7 d; devices in a period: 'many' is no number",
    ),
    ({"stages": OWN, **rows("500 | | | | | |")}, 422, "percent is 1 to 100"),
    ({"stages": OWN, **rows("50 | | | | soon | |")}, 422, "'soon' is no time such as"),
    ({"stages": OWN, **rows("50 | | | | | |", "10 | | | | | |")}, 422, "stage 2 has fewer"),
    ({"period": "0 h"}, 422, "period is 1 to"),
    ({"period": "hourly"}, 422, "the period: 'hourly' is no time"),
    ({"pace": "many"}, 422, "devices in a period: 'many' is no number"),
    ({"patience": "1 w"}, 422, "silent after"),
    ({"below": "latest"}, 422, "latest"),
]


@pytest.mark.parametrize(("words", "status", "why"), FLAWED)
def test_rollout_that_cannot_be_is_shown_again_as_it_was_filled_in(
    town: Town, words: dict[str, Any], status: int, why: str
) -> None:
    usual = {"release": f"firmware {NEWEST}", "stages": "careful", "period": "1 h", "pace": "7",
             "label": XSS[1], "urgent": "1", "untouched": "[]"}  # fmt: skip
    seen = town.house.publisher.send(NEW, **{**usual, **words})
    check_page(seen)
    assert (seen.status, why in seen.alert) == (status, True), seen.alert
    for name in ("pace", "period", "label", "below", "patience"):
        assert seen.control(name).get("value") == {**usual, **words}.get(name, ""), name
    assert "checked" in seen.control("urgent").attrib
    for name, cells in words.items():
        if name.startswith("stage_"):
            shown = [
                each.get("value") for each in seen.tree.iter("input") if each.get("name") == name
            ]
            assert shown[: len(cells)] == cells
    assert town.rollouts.listed() == []
    assert audit_of(town.site) == []


def test_second_rollout_of_a_version_waits_for_the_first(town: Town) -> None:
    words = {"release": f"firmware {NEWEST}", "stages": "careful"}
    town.house.publisher.do(NEW, **words)
    seen = town.house.publisher.send(NEW, **words)
    assert (seen.status, seen.alert) == (
        409, f"the rollout of {NEWEST} is running: abort or finish it first"
    )  # fmt: skip
    town.house.publisher.do(ONE, do="abort", reason="too slow")
    seen = town.house.publisher.do(NEW, **words)
    later = town.house.viewer.get(ONE)
    assert notes(later, "warn") == ["A later rollout of this version counts: 2"]
    assert link(later, "2") == "/admin/rollouts/2"


def test_withdrawn_release_is_not_offered_for_a_rollout(town: Town) -> None:
    stock = town.site.catalog
    assert isinstance(stock, Stock)
    stock.withdraw("firmware", Version.parse(NEWEST), "bad", who="ada", at=NOW)
    assert f"firmware {NEWEST}" not in town.house.publisher.get(NEW).texts("option")


# -- 3. Plans in forms, without a site -------------------------------------------------------------


def call_of(site: Site, fields: dict[str, list[str]]) -> Call:
    """A form that was sent."""
    actor = Browser(site)
    head = parse_head(request(NEW, method="POST"), actor.peer)
    return Call(site, head, None, {}, {}, fields)  # type: ignore[arg-type]


def sent_by(tree: Element) -> dict[str, list[str]]:
    """What a browser sends of the controls in a tree, if nobody touches them."""
    found: dict[str, list[str]] = {}
    for each in tree.iter():
        name, value = each.get("name"), each.get("value", "")
        if each.tag == "select":
            value = next(o.get("value", "") for o in each.iter("option") if "selected" in o.attrib)
        if each.tag not in {"input", "select"} or not name:
            continue
        if each.get("type") != "checkbox" or "checked" in each.attrib:
            found.setdefault(name, []).append(value)
    return found


AMOUNTS = st.integers(0, 9_999)
WORDS = st.sampled_from(["", "attic", "hall"])
STAGES = st.builds(
    Stage, percent=st.just(100), count=AMOUNTS, group=WORDS, proven=AMOUNTS, wait=AMOUNTS,
    threshold=st.integers(0, 100), minimum=AMOUNTS,
)  # fmt: skip
PLANS = st.builds(
    Plan,
    st.lists(STAGES, min_size=1, max_size=20).map(
        lambda found: tuple(sorted(found, key=lambda each: each.count or 10_000))
    ),
    pace=AMOUNTS, period=st.integers(1, 999_999), at_once=AMOUNTS, patience=AMOUNTS,
    below=st.sampled_from(["", "1.2.3", "2.0.0-rc.1"]), group=WORDS,
    label=st.sampled_from(["", "attic", XSS[1]]), urgent=st.booleans(),
)  # fmt: skip


@settings(deadline=None)  # 20 stages are a large form
@given(PLANS | st.sampled_from([Plan(stages) for _, stages in PRESETS.values()]))
def test_form_of_a_plan_that_is_sent_as_it_is_gives_the_same_plan(plan: Plan) -> None:
    plan = read_plan(asdict(plan))
    bare = call_of(None, {})  # type: ignore[arg-type]
    shown = fragment(form("/x", "", plan_fields(bare, plan, ["attic"])))
    call = bare._replace(form=sent_by(shown.tree))
    assert plan_given(call) == plan
    again = fragment(form("/x", "", plan_fields(call, WATCHED, ["attic"])))
    assert sent_by(again.tree) == call.form


@given(st.integers(0, 10**8))
def test_time_is_read_as_it_is_written(seconds: int) -> None:
    assert seconds_of(span_text(seconds), "it") == seconds


@pytest.mark.parametrize(
    "text", ["5", "-1 h", "1 week", "1.5 h", "h", "٣ h", "1  h", "9999999999 s"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no time such as"):
        seconds_of(text, "it")


SAID: list[tuple[Stage, str, str]] = [
    (Stage(), "All devices", "Over when 5 devices have proven it; halts when more than 10 %, of 5 "
     "or more, fail."),
    (Stage(count=1), "The first device", "Over when 1 device has proven it; halts when it fails."),
    (Stage(count=1, threshold=100), "The first device",
     "Over when 1 device has proven it; halts when more than 100 % fail."),
    (Stage(count=4, threshold=0), "The first 4 devices",
     "Over when 4 devices have proven it; halts when one fails."),
    (Stage(count=4), "The first 4 devices",
     "Over when 4 devices have proven it; halts when more than 10 %, of all, fail."),
    (Stage(count=1_000, proven=9), "The first 1,000 devices",
     "Over when 9 devices have proven it; halts when more than 10 %, of 5 or more, fail."),
    (Stage(5, group="attic", proven=1, wait=90, minimum=1), "5 % of the devices of the group attic",
     "Over when 1 device has proven it and it was open for 90 s; halts when more than 10 % fail."),
    (Stage(5, 20), "5 % of the devices, 20 at most", "Over when 5 devices have proven it; halts "
     "when more than 10 %, of 5 or more, fail."),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "who", "terms"), SAID)
def test_stage_is_said_in_words(stage: Stage, who: str, terms: str) -> None:
    assert (plan_forms.stage_words(stage), plan_forms.stage_terms(stage)) == (who, terms)


@pytest.mark.parametrize("name", PRESETS)
def test_every_plan_to_choose_can_be_and_begins_small(name: str) -> None:
    stages = PRESETS[name][1]
    assert read_plan({"stages": [*map(asdict, stages)]}) == Plan(stages)
    assert name == "watched" or stages[0].count == 1 or stages[0].percent <= 10
    assert stages[-1].percent == 100


# -- 4. A rollout is watched -----------------------------------------------------------------------


def page_of(town: Town) -> Seen:
    """That of the first rollout."""
    return town.house.viewer.get(ONE)


def test_bars_show_what_devices_came_to(town: Town) -> None:
    town.begin(Stage(count=1), Stage(threshold=100, minimum=99))
    usual = {"proven": 0, "returned": 0, "broken off": 0, "silent": 0, "open": 0}
    assert standings(page_of(town)) == [usual]
    assert "Before stage 2 opens: 1 more device has to prove it." in page_of(town).texts("p")
    first, second, third = map(town.device, (1, 2, 3))
    assert town.update(first)
    assert not town.update(second)
    assert standings(page_of(town)) == [{**usual, "open": 1}]
    town.update(first)
    assert standings(page_of(town)) == [{**usual, "proven": 1}, usual]
    assert page_of(town).texts("h3") == ["1. The first device over", "2. All devices open"]
    town.fall_back(second)
    assert town.update(third)
    assert standings(page_of(town))[1] == {**usual, "open": 2}
    town.update(second)  # it says that it runs the old image, and is given it again
    assert standings(page_of(town))[1] == {**usual, "returned": 1, "open": 1}
    town.wait(USUAL_PATIENCE)
    town.update(first)
    assert standings(page_of(town))[1] == {**usual, "silent": 2}
    seen = page_of(town)
    assert seen.texts("td", **{"data-label": "Device"})[:2] == [second.mac, third.mac]
    assert outcomes(seen) == ["silent"] * 4 + ["returned", "proven"]
    assert link(seen, second.mac) == url("/admin/devices", second.mac)


def test_rollout_that_halts_says_why_and_goes_on_when_somebody_says_so(town: Town) -> None:
    town.begin(Stage(threshold=0, minimum=1))
    first, second = town.device(1), town.device(2)
    town.fall_back(first)
    town.update(first)
    seen = town.house.publisher.get(ONE)
    assert notes(seen, "bad") == [
        "Halted: 1 of 1 devices of stage 1 failed (1 returned), more than 0 %"
    ]
    assert "Go on" in buttons(seen)
    assert "Halt" not in buttons(seen)
    assert not town.update(second)
    seen = town.house.publisher.do(ONE, do="resume")
    assert seen.said == f"The rollout of firmware {NEWEST} goes on."
    assert town.update(second)
    assert audit_of(town.site)[-1][1:] == ("resume rollout", f"1 of firmware {NEWEST}")


def test_halted_by_hand_the_next_device_gets_nothing(town: Town) -> None:
    town.begin()
    assert town.update(town.device(1))
    seen = town.house.publisher.do(ONE, do="pause")
    assert seen.said == f"The rollout of firmware {NEWEST} is halted: nobody else gets it."
    assert not town.update(town.device(2))
    town.house.publisher.do(ONE, do="resume")
    assert town.update(town.device(2))


def test_next_stage_is_opened_for_a_fleet_too_small_for_the_first(town: Town) -> None:
    few = next(n for n in range(99) if share_of(mac(n), "firmware", NEWEST) >= 10)
    town.registry.forget(MAC)
    town.begin(Stage(10, proven=1), Stage(proven=1))
    device = town.device(few)
    assert not town.update(device)
    seen = town.house.publisher.get(ONE)
    known = (
        "none of 1 known is in this stage: open the next one by hand, or begin anew with a smaller "
        "number."
    )
    assert notes(seen, "warn") == [known]
    town.house.publisher.do(ONE, do="advance")
    assert notes(town.house.publisher.get(ONE), "warn") == []
    assert town.update(device)


NOBODY: list[tuple[dict[str, str], Policy, str]] = [
    ({}, NOTHING, ""),
    ({"pin": "1.9.0"}, NOTHING, "none of 1 known"),
    ({}, Policy(hold="yes"), "none of 1 known"),
    ({}, Policy(channel="nightly"), ""),
]


@pytest.mark.parametrize(("row", "policy", "why"), NOBODY)
def test_devices_that_somebody_keeps_back_are_none_for_a_stage(
    town: Town, row: dict[str, str], policy: Policy, why: str
) -> None:
    town.begin(Stage(proven=1), Stage())
    town.registry.annotate(MAC, group="attic", **row)
    town.assignments.put("group", "attic", policy)
    found = notes(town.house.viewer.get(ONE), "warn")
    assert bool(found) == bool(why)
    assert all(each.startswith(why) for each in found)


def test_release_on_another_channel_finds_nobody_until_a_device_is_on_it(town: Town) -> None:
    town.house.publisher.do(RELEASE, do="channel", channel="nightly")
    town.begin(Stage(proven=1), Stage())
    assert notes(town.house.viewer.get(ONE), "warn")
    town.registry.annotate(MAC, channel="nightly")
    assert notes(town.house.viewer.get(ONE), "warn") == []


def test_stage_with_too_few_devices_says_how_many_there_are(town: Town) -> None:
    town.begin(Stage(proven=3), Stage())
    assert town.update(town.device(1))
    assert notes(town.house.viewer.get(ONE), "warn") == [
        "only 2 of the 2 devices known are in this stage: open the next one by hand, or begin anew "
        "with a smaller number."
    ]


@pytest.mark.parametrize("more", [{"group": "nobody"}, {}])
def test_stage_for_a_group_without_devices_says_so(town: Town, more: dict[str, str]) -> None:
    town.begin(Stage(count=1, group="" if more else "nobody"), Stage(), **more)
    said = "no device is in the group 'nobody'"
    assert notes(town.house.viewer.get(ONE), "warn") == [f"{said}."]
    town.registry.annotate(MAC, group="nobody")
    assert notes(town.house.viewer.get(ONE), "warn") == []


REFUSED: list[tuple[str, dict[str, str], int, str]] = [
    ("running", {"do": "abort"}, 422, "say why"),
    ("running", {"do": "abort", "reason": "  "}, 422, "say why"),
    ("running", {"do": "advance"}, 409, "last stage is open already"),
    ("running", {"do": "resume"}, 409, "a rollout that is running has nothing to resume"),
    ("running", {"do": "explode"}, 422, "does not say what to do"),
    ("running", {}, 422, "does not say what to do"),
    ("paused", {"do": "pause"}, 409, "a rollout that is paused has nothing to pause"),
    ("aborted", {"do": "resume"}, 409, "a rollout that is aborted has nothing to resume"),
]


@pytest.mark.parametrize(("state", "words", "status", "why"), REFUSED)
def test_what_cannot_be_done_with_a_rollout_is_told(
    town: Town, state: str, words: dict[str, str], status: int, why: str
) -> None:
    number = town.begin()
    do = {"paused": "pause", "aborted": "abort"}.get(state)
    if do:
        town.rollouts.control(number, do, "no", NOW)
    seen = town.house.publisher.send(ONE, **words)
    check_page(seen)
    assert (seen.status, why in seen.alert) == (status, True), seen.alert
    assert town.rollouts.get(number)[0].state == state
    assert audit_of(town.site) == []


STATES: list[tuple[str, list[str]]] = [
    ("", ["Halt", "Open the next stage", "Finish: it is good", "Abort"]),
    ("pause", ["Go on", "Finish: it is good", "Abort"]),
    ("abort", []),
    ("finish", []),
]


@pytest.mark.parametrize(("do", "offered"), STATES)
def test_page_offers_what_can_be_done(town: Town, do: str, offered: list[str]) -> None:
    number = town.begin(Stage(count=1), Stage())
    if do:
        town.rollouts.control(number, do, "", NOW)
    assert buttons(town.house.publisher.get(ONE)) == offered


def test_reason_of_an_end_is_told_as_text(town: Town) -> None:
    town.begin()
    seen = town.house.publisher.do(ONE, do="abort", reason=XSS[1])
    assert notes(seen, "bad") == [f"Aborted: {XSS[1]}"]
    assert audit_of(town.site)[-1][1:] == ("abort rollout", f"1 of firmware {NEWEST}: {XSS[1]}")


@pytest.mark.parametrize("number", ["0", "7", "x", "9" * 18, "9" * 30, "-1"])
def test_rollout_that_is_not_there_is_not_found(town: Town, number: str) -> None:
    for method in (town.house.publisher.get, town.house.publisher.send):
        assert method(f"{LIST}/{number}").status in {404, 422}


def test_download_under_way_says_how_much_has_left(
    folder: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    large = esp8266_image("firmware", "2.0.0", payload=bytes(900_000))
    put(folder / "firmware-2.0.0.bin", large)
    with built(folder, furnished) as town, town.stand.dial(receive_buffer=1024) as wire:
        device = town.device(1)
        wire.send(device.request())
        wire.head()
        wait_until(lambda: town.grants.live().get(device.mac, (0, 0))[0] > 0)
        town.registry.flush()
        seen = town.house.viewer.get(url("/admin/devices", device.mac))
        assert re.fullmatch(r"\d+ % of 905 KB", seen.texts("td", **{"data-label": "Sent"})[0])
        wire.read(len(large))
        wait_until(lambda: not town.grants.live())
        town.registry.flush()
        seen = town.house.viewer.get(url("/admin/devices", device.mac))
        assert seen.texts("td", **{"data-label": "Sent"}) == ["all of 905 KB"]


# -- 5. Lists --------------------------------------------------------------------------------------


def releases(seen: Seen) -> list[str]:
    """Those of a list of rollouts."""
    return seen.texts("td", **{"data-label": "Release"})


def test_list_has_plans_and_what_is_only_watched_on_demand(town: Town) -> None:
    assert town.update(town.device(1))
    seen = town.house.viewer.get(LIST)
    assert releases(seen) == []
    every = town.house.viewer.get(link(seen, "All, with those that are only watched"))
    assert releases(every) == [f"firmware {NEWEST}"]
    assert every.texts("td", **{"data-label": "State"}) == ["watched"]
    town.begin(Stage(count=1), Stage())
    assert releases(town.house.viewer.get(LIST)) == [f"firmware {NEWEST}"]
    assert town.house.viewer.get(LIST).texts("td", **{"data-label": "Stage"}) == ["1 of 2"]


def test_watched_release_that_halts_is_in_the_list_and_on_the_overview(town: Town) -> None:
    devices = [town.device(number) for number in range(10)]
    for each in devices:
        town.fall_back(each)
        town.update(each)
    seen = town.house.viewer.get(LIST)
    assert seen.texts("td", **{"data-label": "State"}) == ["halted"]
    home = town.house.viewer.get("/admin")
    assert "Rollouts" in home.texts("h2")
    assert releases(home) == [f"firmware {NEWEST}"]
    assert any("10 returned" in text for text in home.texts("td"))


def test_long_list_of_rollouts_has_pages(town: Town) -> None:
    for _ in range(ROWS + 1):
        town.rollouts.control(town.begin(), "abort", "no", NOW)
    first = town.house.viewer.get(LIST)
    second = town.house.viewer.get(link(first, "Next page"))
    check_page(second)
    assert (len(releases(first)), len(releases(second))) == (ROWS, 1)
    assert link(second, "First page") == LIST
    assert town.house.viewer.get(f"{LIST}?before=x").status == 404


def test_list_of_one_project_has_no_others(town: Town) -> None:
    town.begin()
    assert releases(town.house.viewer.get(f"{LIST}?project=firmware"))
    assert not releases(town.house.viewer.get(f"{LIST}?project=other"))


# -- 6. Devices ------------------------------------------------------------------------------------


def test_device_says_what_became_of_what_it_was_given(town: Town) -> None:
    town.begin()
    device = town.device(1)
    here = url("/admin/devices", device.mac)
    town.fall_back(device)
    assert town.update(device)
    assert outcomes(town.house.viewer.get(here))[:2] == ["open", "returned"]
    assert not town.update(device)
    seen = town.house.viewer.get(here)
    assert outcomes(seen)[:2] == ["proven", "returned"]
    assert seen.texts("td", **{"data-label": "From → to"}) == [f"1.9.0 → {NEWEST}"] * 2
    assert link(seen, "1") == ONE


def looping(town: Town) -> Esp8266:
    """A device that was given the newest three times, and does not start it."""
    device = town.device(1)
    for _ in range(3):
        town.fall_back(device)
    assert not town.update(device)
    return device


def test_device_that_loops_is_shown_and_may_try_again(town: Town) -> None:
    device = looping(town)
    here = url("/admin/devices", device.mac)
    seen = town.house.publisher.get(here)
    assert notes(seen, "bad")[0].startswith(f"looping {NEWEST} was given to it in full")
    found = town.house.viewer.get("/admin/devices?state=looping")
    assert [each.split()[0] for each in found.texts("td", **{"data-label": "Device"})] == [
        device.mac
    ]
    assert "looping" in found.texts("span", **{"class": "badge bad"})
    home = town.house.viewer.get("/admin")
    assert [home.texts("td", **{"data-label": "Was given"}), link(home, device.mac)] == [
        [NEWEST], here
    ]  # fmt: skip
    seen = town.house.publisher.do(here, do="forgive")
    assert seen.said == "It may try again."
    assert not notes(seen, "bad")
    assert audit_of(town.site)[-1][1:] == ("forgive device", device.mac)
    assert town.update(device)
    assert town.house.viewer.get("/admin").texts("td", **{"data-label": "Was given"}) == []


def test_device_waits_for_an_approval_which_somebody_gives_and_takes_back(town: Town) -> None:
    device = town.device(1)
    here = url("/admin/devices", device.mac)
    town.assignments.put("project", "firmware", Policy(approval="yes"))
    assert not town.update(device)
    seen = town.house.publisher.get(here)
    assert f"{NEWEST} waits for an approval." in notes(seen, "warn")
    seen = town.house.publisher.do(here, do="approve", version=NEWEST)
    assert seen.texts("td", **{"data-label": "Version"})[:1] == [NEWEST]
    seen = town.house.publisher.do(here, do="disapprove", version=NEWEST)
    assert not town.update(device)
    assert town.house.publisher.send(here, do="disapprove", version=NEWEST).status == 404
    town.house.publisher.do(here, do="approve", version=NEWEST)
    assert town.update(device)
    assert [entry[1] for entry in audit_of(town.site)] == [
        "approve",
        "take back approval",
        "approve",
    ]


def test_what_is_said_of_a_device_is_saved_whole_or_not_at_all(town: Town) -> None:
    seen = town.house.publisher.do(DEVICE, do="pin", pin="1.0.0", channel="nightly", group="attic",
                                   hold="no", window="Mon 22:00-23:00", approval="yes")  # fmt: skip
    assert seen.said == "It is saved."
    device = town.registry.device(MAC)
    assert device
    assert (device.pin, device.channel, device.group) == ("1.0.0", "nightly", "attic")
    own = Policy(hold="no", window="Mon 22:00-23:00", approval="yes")
    assert town.assignments.own("device", MAC) == own
    assert link(seen, "attic") == GROUP
    assert {"nightly", "attic"} <= {each.get("value") for each in seen.tree.iter("option")}
    before = state_of(town.site)
    for words in ({"pin": "1.9.0", "hold": "maybe"}, {"pin": "one", "hold": "yes"},
                  {"group": "at/tic", "window": "always"}):  # fmt: skip
        seen = town.house.publisher.send(DEVICE, do="pin", **words)
        assert seen.status == 422
        for name, text in words.items():
            if seen.control(name).tag == "input":
                assert seen.control(name).get("value") == text
    assert state_of(town.site) == before


def test_form_of_a_device_takes_back_nothing_that_others_said_meanwhile(town: Town) -> None:
    was = sent_by(town.house.publisher.get(DEVICE).tree)
    shown = {name: texts[-1] for name, texts in was.items() if name.startswith("was_")}
    town.assignments.put("device", MAC, Policy(hold="yes", window="always"))
    town.registry.annotate(MAC, channel="beta")
    town.house.publisher.do(DEVICE, do="pin", **shown, pin="", channel="", group="hall", hold="",
                            window="", approval="yes")  # fmt: skip
    own = Policy(hold="yes", window="always", approval="yes")
    assert town.assignments.own("device", MAC) == own
    device = town.registry.device(MAC)
    assert device
    assert (device.channel, device.group) == ("beta", "hall")


def test_device_is_given_the_same_version_once_more(town: Town) -> None:
    device = town.device(1, NEWEST)
    here = url("/admin/devices", device.mac)
    assert not town.update(device)
    assert "Give it 1.10.0 again" in buttons(town.house.publisher.get(here))
    seen = town.house.publisher.do(here, do="again", version=NEWEST)
    assert seen.said == f"It gets {NEWEST} once more."
    assert "Do not give it 1.10.0 again" in buttons(seen)
    town.house.publisher.do(here, do="again", version="")
    assert not town.update(device)
    town.house.publisher.do(here, do="again", version=NEWEST)
    assert town.update(device)


def test_page_says_what_each_rule_says(town: Town) -> None:
    town.registry.seen(sighting(MAC, version="1.9.0"))
    town.registry.flush()
    town.begin(Stage(count=1))
    town.assignments.put("device", MAC, Policy(hold="yes"))
    seen = town.house.viewer.get(DEVICE)
    names = ("Checked", "Says", "Because")
    columns = (seen.texts("td", **{"data-label": name}) for name in names)
    table = {name: (says, why) for name, says, why in zip(*columns, strict=True)}
    assert len(table) == len(town.site.rules)
    assert table["hold"] == ("on-hold", "somebody holds the device, its group or its project")
    assert table["version"][0] == "fine"
    assert "1.10.0 is newer than 1.9.0" in table["version"][1]
    assert "stage 1 of 1" in table["rollout"][1]
    assert f"Each rule, of {NEWEST}" in seen.texts("summary")


def test_version_without_a_release_is_told_where_it_is_named(town: Town) -> None:
    pages = DEVICE, POLICY, "/admin/projects/firmware"
    town.registry.annotate(MAC, pin="1.0.0")
    town.assignments.put("project", "firmware", Policy(floors=("1.9.0",)))
    assert [notes(town.house.viewer.get(page), "warn") for page in pages[1:]] == [[], []]
    assert not any("no release" in each for each in notes(town.house.publisher.get(DEVICE), "warn"))
    town.registry.annotate(MAC, pin="7.0.0")
    town.assignments.put("device", MAC, Policy(again="7.1.0"))
    town.assignments.put("project", "firmware", Policy(floors=("1.9.0", "7.2.0")))
    for page, versions in zip(pages, ("7.0.0 and no 7.1.0", "7.2.0", "7.2.0"), strict=True):
        found = notes(town.house.publisher.get(page), "warn")
        assert any(each.startswith(f"firmware has no release {versions},") for each in found), page


def test_devices_are_put_into_a_group_together_and_found_by_it(town: Town) -> None:
    for number in range(3):
        town.registry.seen(sighting(mac(number)))
    town.registry.flush()
    ids = [mac(0), mac(2)]
    seen = town.house.publisher.do("/admin/devices", do="group", device=ids, **{"with": "attic"})
    assert seen.said == "2 devices in the group."
    found = town.house.viewer.get("/admin/devices?group=attic")
    assert [each.split()[0] for each in found.texts("td", **{"data-label": "Device"})] == ids
    seen = town.house.publisher.do("/admin/devices", do="group", device=[mac(0), mac(1)],
                                   **{"with": ""})  # fmt: skip
    assert seen.said == "1 device in the group, 1 were so before."
    assert town.assignments.sizes() == {"attic": 1}
    refused = town.house.publisher.send("/admin/devices", do="group", device=ids,
                                        **{"with": "no group"})  # fmt: skip
    assert (refused.status, "is no name for a group" in refused.alert) == (422, True)
    assert [json.loads(what.partition(" ")[2]) for *_, what in audit_of(town.site)[1:]] == [
        {"group": ""}
    ]


# -- 7. Groups and projects ------------------------------------------------------------------------


def test_group_is_made_by_what_is_said_of_it_and_deleted(town: Town) -> None:
    seen = town.house.publisher.do("/admin/groups", name="attic")
    assert seen.texts("h1") == ["attic"]
    assert town.assignments.groups() == []
    seen = town.house.publisher.do(GROUP, do="save", pin="v1.0", channel="nightly", hold="no",
                                   window="always", approval="yes")  # fmt: skip
    assert town.assignments.own("group", "attic") == Policy(
        "nightly", "1.0.0", "no", "always", "yes"
    )
    town.registry.annotate(MAC, group="attic")
    seen = town.house.viewer.get("/admin/groups")
    assert seen.texts("td", **{"data-label": "What is said of it"}) == [
        "Channel: nightly; Pinned to: 1.0.0; Held: no; Maintenance window: always; "
        "Approval needed: yes"
    ]
    assert link(seen, "1") == "/admin/devices?group=attic"
    seen = town.house.publisher.send(GROUP, do="delete")
    assert (seen.status, "tick the box" in seen.alert) == (422, True)
    town.house.publisher.do(GROUP, do="delete", sure=1)
    assert town.assignments.groups() == []
    device = town.registry.device(MAC)
    assert device
    assert device.group == ""
    assert [entry[1] for entry in audit_of(town.site)] == ["put group policy", "drop group"]


GROUPS: list[tuple[dict[str, Any], str]] = [
    ({"do": "save", "pin": "newest"}, "newest"),
    ({"do": "save", "channel": "a b"}, "is no name for a channel"),
    ({"do": "save", "window": "22:00"}, "is no span"),
    ({"do": "save", "window": "22:00-23:00 Mars/Base"}, "no time zone"),
    ({"do": "save", "hold": "maybe"}, "hold is yes, no, or nothing"),
    ({"do": "sell"}, "does not say what to do"),
]


@pytest.mark.parametrize(("words", "why"), GROUPS)
def test_group_that_cannot_be_is_shown_again(town: Town, words: dict[str, Any], why: str) -> None:
    seen = town.house.publisher.send(GROUP, **words)
    check_page(seen)
    assert (seen.status, why in seen.alert) == (422, True), seen.alert
    for name in ("pin", "channel", "window"):
        assert seen.control(name).get("value") == words.get(name, "")
    assert town.assignments.groups() == []


@pytest.mark.parametrize("name", ["", " ", "a b", "<b>", "x" * 65, "-x"])
def test_name_of_no_group_is_refused(town: Town, name: str) -> None:
    seen = town.house.publisher.send("/admin/groups", name=name)
    assert (seen.status, "is no name for a group" in seen.alert) == (422, True)
    assert seen.control("name").get("value") == name
    if name.strip():
        assert town.house.viewer.get(url("/admin/groups", name)).status == 404


def test_project_says_what_holds_for_all_and_new_releases_go_by_its_plan(
    folder: Path, furnished: tuple[Path, dict[str, str]]
) -> None:
    with built(folder, furnished) as town:
        seen = town.house.publisher.do(POLICY, do="save", floors="1.10.0, v1.9", channel="beta",
                                       window="always")  # fmt: skip
        assert "1.9.0, 1.10.0" in seen.texts("dd")
        town.house.publisher.do(POLICY, do="plan", stages="few", pace="3")
        own = town.assignments.own("project", "firmware")
        assert (own.floors, own.channel) == (("1.9.0", "1.10.0"), "beta")
        assert plan_of(own.plan) == Plan(PRESETS["few"][1], pace=3)
        assert own.since == int(town.clock())
        project = town.house.viewer.get("/admin/projects/firmware")
        plan = (
            "The first device, then the first 10 devices, then all devices; pace 3 devices in 1 h"
        )
        assert plan in project.texts("dd")
        town.house.publisher.do(POLICY, do="save", floors="", channel="", window="")
        town.house.publisher.do(POLICY, do="plan", stages="none")
        assert town.assignments.own("project", "firmware") == NOTHING


PROJECTS: list[tuple[dict[str, Any], str]] = [
    ({"do": "save", "floors": "1.0.0 latest"}, "latest"),
    ({"do": "save", "floors": " ".join(f"1.{n}.0" for n in range(40))}, "at most 32 floors"),
    ({"do": "plan", "stages": OWN}, "fill in at least one"),
    ({"do": "plan", "stages": "none", **rows("50 | | | | | |")}, "choose 'As filled in below'"),
    ({"do": "plan", "stages": "few", "pace": "x"}, "is no number"),
    ({"do": "drop"}, "does not say what to do"),
]


@pytest.mark.parametrize(("words", "why"), PROJECTS)
def test_policy_of_a_project_that_cannot_be_is_shown_again(
    town: Town, words: dict[str, Any], why: str
) -> None:
    seen = town.house.publisher.send(POLICY, **words)
    check_page(seen)
    assert (seen.status, why in seen.alert) == (422, True), seen.alert
    assert seen.control("floors").get("value") == words.get("floors", "")
    assert town.assignments.own("project", "firmware") == NOTHING


def test_release_says_on_which_channel_it_is_and_how_it_goes_out(town: Town) -> None:
    seen = town.house.publisher.get(RELEASE)
    assert link(seen, "Begin a rollout") == url(NEW, project="firmware", version=NEWEST)
    town.house.publisher.do(RELEASE, do="channel", channel="nightly")
    seen = town.house.publisher.get("/admin/projects/firmware")
    assert "nightly" in seen.texts("span", **{"class": "badge"})
    device = town.device(1)
    assert not town.update(device)
    town.registry.annotate(device.mac, channel="nightly")
    assert town.update(device)
    seen = town.house.publisher.do(RELEASE, do="channel", channel="")
    assert seen.control("channel").get("value") == ""
    assert link(seen, "Its rollout") == ONE
    refused = town.house.publisher.send(RELEASE, do="channel", channel="a b")
    assert (refused.status, refused.control("channel").get("value")) == (422, "a b")
    town.begin()
    assert link(town.house.publisher.get(RELEASE), "Begin a rollout") == ""
