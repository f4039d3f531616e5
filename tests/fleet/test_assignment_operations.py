"""Who gets what, by the API: policies, groups, approvals, channels, and what devices then get."""

from __future__ import annotations

import re
import time
from contextlib import closing
from typing import Any

import pytest

from ota_fleet.assignments import Assignments
from ota_fleet.registry import Registry, Sighting
from tests.conftest import wait_until
from tests.fleet.test_api import DEVICE, LAMPS, MACS, NEW, House, is_part, named
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - a fixture
from tests.fleet.test_api import house as house  # noqa: PLC0414 - a fixture

OWN = f"devices/{MACS[1]}"  # a device of lamp
POLICY, SHELF, FIRM = "projects/lamp/policy", f"{LAMPS}/1.0.0/channel", "projects/firmware/policy"
NIGHT = "Mon-Fri 22:00-05:00 Europe/Berlin; Sun 00:00-24:00"
NOTHING = {"channel": "", "hold": "", "window": "", "approval": "", "floors": [], "plan": {}}
NOBODY = f"{DEVICE}/approvals/9.9.9"

DONE: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the answer holds
    ("viewer", "GET", f"{DEVICE}/policy", None, 200,
     {"hold": "", "window": "", "approval": "", "again": "",
      "holds": {"channel": "", "pin": "", "hold": "yes", "window": "", "approval": "",
                "floors": [], "again": ""}}),
    ("lamp", "GET", f"{OWN}/policy", None, 200, {"hold": ""}),
    ("publisher", "PUT", f"{DEVICE}/policy", {"hold": "no", "window": NIGHT}, 200,
     {"hold": "no", "window": NIGHT, "approval": "", "holds": {"hold": "no", "window": NIGHT}}),
    ("publisher", "PUT", f"{DEVICE}/policy", {"again": "v1.2"}, 200, {"again": "1.2.0"}),
    ("publisher", "PUT", f"{DEVICE}/policy", {}, 200, {"hold": ""}),
    ("viewer", "GET", "projects/bulb/policy", None, 200, {**NOTHING, "since": 0}),
    ("lamp", "PUT", "projects/bulb/policy", {"channel": "beta", "floors": ["2.0", "v1.0.0"]}, 200,
     {"channel": "beta", "floors": ["1.0.0", "2.0.0"], "plan": {}, "since": 0}),
    ("publisher", "PUT", POLICY, {"plan": {"stages": [{"count": 1}, {}], "pace": 5}}, 200,
     {"plan": {"stages": [{"count": 1, "percent": 100}, {"count": 0}], "pace": 5, "period": 3600}}),
    ("publisher", "PUT", POLICY, {"plan": {}}, 200, {"plan": {}}),
    ("viewer", "GET", "groups", None, 200,
     {"items": [{"name": "attic", "hold": "yes"}, {"name": "cellar", "hold": ""}], "next": None}),
    ("viewer", "GET", "groups?limit=1", None, 200, {"items": [{"name": "attic"}]}),
    ("viewer", "GET", "groups/attic", None, 200,
     {"name": "attic", "channel": "", "pin": "", "hold": "yes", "window": "", "approval": ""}),
    ("publisher", "PUT", "groups/attic", {"pin": "1.9", "channel": "nightly"}, 200,
     {"name": "attic", "pin": "1.9.0", "channel": "nightly", "hold": "yes"}),
    ("publisher", "PUT", "groups/new", {"approval": "yes"}, 200, {"approval": "yes"}),
    ("publisher", "PUT", "groups/new", {}, 200, {"name": "new", "hold": ""}),
    ("publisher", "DELETE", "groups/attic", None, 204, None),
    ("publisher", "DELETE", "groups/cellar", None, 204, None),
    ("viewer", "GET", f"{DEVICE}/approvals", None, 200,
     {"items": [{"device": MACS[0], "project": "firmware", "version": "1.9.0"}], "next": None}),
    ("lamp", "GET", f"{OWN}/approvals", None, 200, {"items": []}),
    ("publisher", "PUT", f"{DEVICE}/approvals/v1.10", None, 204, None),
    ("lamp", "PUT", f"{OWN}/approvals/1.0.0", None, 204, None),
    ("publisher", "DELETE", f"{DEVICE}/approvals/1.9.0", None, 204, None),
    ("viewer", "GET", SHELF, None, 200, {"channel": "stable"}),
    ("lamp", "PUT", SHELF, {"channel": "beta"}, 200, {"channel": "beta"}),
    ("publisher", "PUT", "projects/bulb/releases/v1.0/channel", {"channel": ""}, 200,
     {"channel": "stable"}),
]  # fmt: skip


@pytest.fixture
def furnace(house: House) -> House:
    """A group that is held, with a device; one with a device only; and an approval."""
    assert house.admin("PUT", "groups/attic", {"hold": "yes"}).status == 200
    assert house.admin("PATCH", DEVICE, {"group": "attic"}).status == 200
    assert house.admin("PATCH", OWN, {"group": "cellar"}).status == 200
    assert house.admin("PUT", f"{DEVICE}/approvals/1.9.0").status == 204
    return house


@pytest.mark.parametrize("row", DONE, ids=named)
def test_operation_does_what_it_says(row: tuple[Any, ...], furnace: House) -> None:
    who, method, path, body, status, wanted = row
    reply = furnace.ask(who, method, path, body)
    assert reply.status == status, reply.body
    assert is_part(wanted, reply.data if reply.body else None), reply.data


SILENT = [{}, {"plan": {}}, {"channel": ""}]  # bodies that change nothing here


@pytest.mark.parametrize("row", [row for row in DONE if row[1] != "GET"], ids=named)
def test_change_stands_in_the_audit_once_with_who_made_it(
    row: tuple[Any, ...], furnace: House
) -> None:
    who, method, path, body, *_ = row
    before = len(furnace.admin("GET", "audit").data["items"])
    furnace.ask(who, method, path, body)
    furnace.ask(who, method, path, body)  # a second time there is nothing to change
    entries = furnace.admin("GET", "audit").data["items"][before:]
    assert len(entries) == (body not in SILENT)
    for entry in entries:
        assert re.fullmatch(rf"token [0-9]+ \({who}\)", entry["who"])
        assert entry["action"]
        assert any(word in entry["what"] for word in (MACS[0], MACS[1], *path.split("/"), "lamp"))


REFUSED: list[tuple[Any, ...]] = [  # role, method, path, body, status, what the sentence says
    ("admin", "GET", "devices/none/policy", None, 404, "'none' is not known"),
    ("admin", "PUT", "devices/none/policy", {}, 404, "'none' is not known"),
    ("admin", "PUT", f"{DEVICE}/policy", {"pin": "1.0.0"}, 422, "'pin' is not known here"),
    ("admin", "PUT", f"{DEVICE}/policy", {"hold": "maybe"}, 422, 'is to be one of "", yes, no'),
    ("admin", "PUT", f"{DEVICE}/policy", {"window": "at night"}, 422, "is no span such as"),
    ("admin", "PUT", f"{DEVICE}/policy", {"window": "22:00-05:00 Mars/Base"}, 422, "no time zone"),
    ("admin", "PUT", f"{DEVICE}/policy", {"window": "x" * 256}, 422, "from 0 to 255"),
    ("admin", "PUT", f"{DEVICE}/policy", {"again": "that"}, 422, "'that' is no version"),
    ("lamp", "GET", f"{DEVICE}/policy", None, 403, "'lamp' only"),
    ("lamp", "PUT", f"{OWN}/policy", {"hold": "yes"}, 403, "'lamp' only"),
    ("admin", "GET", "projects/none/policy", None, 404, "no project 'none'"),
    ("admin", "PUT", "projects/none/policy", {}, 404, "no project 'none'"),
    ("admin", "PUT", POLICY, {"channel": "every night"}, 422, "is no name for a channel"),
    ("admin", "PUT", POLICY, {"floors": ["low"]}, 422, "'low' is no version"),
    ("admin", "PUT", POLICY, {"floors": ["1.0.0"] * 33}, 422, "more than 32"),
    ("admin", "PUT", POLICY, {"plan": {"stages": []}}, 422, "1 to 20 stages"),
    ("admin", "PUT", POLICY, {"plan": {"version": "1.0.0"}}, 422, "'version' is not known here"),
    ("admin", "PUT", POLICY, {"plan": ""}, 422, "plan is to be an object"),
    ("admin", "PUT", POLICY, {"since": 1}, 422, "'since' is not known here"),
    ("lamp", "GET", FIRM, None, 403, "'lamp' only"),
    ("lamp", "PUT", FIRM, {"hold": "yes"}, 403, "'lamp' only"),
    ("admin", "GET", "groups/none", None, 404, "there is no group 'none'"),
    ("admin", "DELETE", "groups/none", None, 404, "there is no group 'none'"),
    ("admin", "PUT", "groups/-", {}, 422, "'-' is no name for a group"),
    ("admin", "PUT", "groups/attic", {"pin": "old"}, 422, "'old' is no version"),
    ("admin", "PUT", "groups/attic", {"floors": []}, 422, "'floors' is not known here"),
    ("lamp", "GET", "groups", None, 403, "'lamp' only"),
    ("lamp", "GET", "groups/attic", None, 403, "'lamp' only"),
    ("lamp", "PUT", "groups/attic", {"hold": "no"}, 403, "'lamp' only"),
    ("lamp", "DELETE", "groups/attic", None, 403, "'lamp' only"),
    ("admin", "PUT", NOBODY, None, 404, "there is no 9.9.9 of 'firmware'"),
    ("admin", "DELETE", NOBODY, None, 404, f"nobody approved 9.9.9 for {MACS[0]}"),
    ("admin", "PUT", f"{DEVICE}/approvals/new", None, 404, "'new' is no version"),
    ("admin", "PUT", "devices/none/approvals/1.0.0", None, 404, "'none' is not known"),
    ("lamp", "PUT", f"{DEVICE}/approvals/1.9.0", None, 403, "'lamp' only"),
    ("lamp", "DELETE", f"{DEVICE}/approvals/1.9.0", None, 403, "'lamp' only"),
    ("lamp", "GET", f"{DEVICE}/approvals", None, 403, "'lamp' only"),
    ("admin", "GET", f"{LAMPS}/9.9.9/channel", None, 404, "there is no 9.9.9 of 'lamp'"),
    ("admin", "PUT", f"{LAMPS}/9.9.9/channel", {"channel": "beta"}, 404, "there is no 9.9.9"),
    ("admin", "PUT", SHELF, {"channel": "!"}, 422, "'!' is no name for a channel"),
    ("admin", "PUT", SHELF, {}, 422, "channel is missing"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=named)
def test_refusal_says_what_is_wrong_and_changes_nothing(
    row: tuple[Any, ...], furnace: House
) -> None:
    who, method, path, body, status, why = row
    before = furnace.admin("GET", "audit").data["items"]
    reply = furnace.ask(who, method, path, body)
    assert (reply.status, why in reply.detail) == (status, True), reply.detail
    assert furnace.admin("GET", "audit").data["items"] == before


def test_device_that_said_no_project_has_nothing_approved(house: House) -> None:
    silent = "AB:AB:AB:AB:AB:AB"
    with closing(Registry(house.state / "fleet.db")) as registry:
        seen = None, None, None, None, None, None, "", 1
        registry.seen(Sighting(silent, "", *seen, downloaded=False))
    reply = house.admin("PUT", f"devices/{silent}/approvals/1.0.0")
    wanted = 409, f"{silent} has not said yet of which project it is"
    assert (reply.status, reply.detail) == wanted


# -- What holds then -------------------------------------------------------------------------------


def offered(house: House, number: int = 0, running: str = "1.0.0") -> str:
    """The version that a device of firmware gets, or the code of why it gets none."""
    fields = f"x-ESP8266-version: {running}", f"x-ESP8266-STA-MAC: {MACS[number]}"
    reply = house.ask("", "GET", "/firmware", None, *fields)
    return reply.headers.get("x-version") or reply.headers["x-ota-reason"].partition(":")[0]


SELF, GROUP = f"{DEVICE}/policy", "groups/attic"
BETA = "projects/firmware/releases/1.10.0/channel", {"channel": "beta"}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ([], "1.10.0"),
        ([(FIRM, {"hold": "yes"})], "on-hold"),
        ([(FIRM, {"hold": "yes"}), (SELF, {"hold": "no"})], "1.10.0"),
        ([(GROUP, {"hold": "no"}), (FIRM, {"hold": "yes"})], "1.10.0"),
        ([(GROUP, {"hold": "yes"}), (SELF, {"hold": "no"})], "1.10.0"),
        ([(SELF, {"hold": "yes"}), (SELF, {"hold": ""})], "1.10.0"),
        ([(GROUP, {"pin": "1.9.0"})], "1.9.0"),
        ([(FIRM, {"floors": ["1.9.0"]})], "1.9.0"),
        ([(FIRM, {"approval": "yes"})], "waiting-for-approval"),
        ([BETA], "1.9.0"),
        ([BETA, (FIRM, {"channel": "beta"})], "1.10.0"),
        ([BETA, (GROUP, {"channel": "beta"})], "1.10.0"),
        ([(SELF, {"again": "1.0.0"})], "1.0.0"),
    ],
    ids=str,
)
def test_what_is_said_holds_for_the_next_device(
    said: list[tuple[str, object]], wanted: str, house: House
) -> None:
    house.admin("PATCH", DEVICE, {"group": "attic"})
    for path, words in said:
        assert house.admin("PUT", path, words).status == 200
    assert offered(house) == wanted


def test_plan_is_for_releases_that_come_later(house: House) -> None:
    now = time.time()
    wait_until(lambda: time.time() >= int(now) + 1)
    plan = {"plan": {"stages": [{"group": "none"}]}}
    assert house.admin("PUT", FIRM, plan).status == 200
    assert offered(house) == "1.10.0"


def test_approval_lets_one_device_have_one_version_until_it_is_taken_back(house: House) -> None:
    house.admin("PUT", FIRM, {"approval": "yes"})
    path = f"{DEVICE}/approvals/1.9.0"
    assert house.admin("PUT", path).status == 204
    assert [offered(house, number) for number in (0, 2)] == ["1.9.0", "waiting-for-approval"]
    assert house.admin("DELETE", path).status == 204
    assert offered(house) == "waiting-for-approval"


def test_group_that_is_taken_away_leaves_its_devices_in_none(house: House) -> None:
    house.admin("PATCH", DEVICE, {"group": "attic"})
    house.admin("PUT", GROUP, {"hold": "yes"})
    assert offered(house) == "on-hold"
    assert house.admin("DELETE", "groups/attic").status == 204
    assert house.admin("GET", DEVICE).data["group"] == ""
    assert house.admin("GET", "groups").data["items"] == []
    assert offered(house) == "1.10.0"


def test_plan_holds_for_releases_that_come_later(house: House) -> None:
    before = int(time.time())
    plan = {"stages": [{"group": "attic"}, {}]}
    since = house.admin("PUT", POLICY, {"plan": plan}).data["since"]
    assert before <= since <= int(time.time())
    assert house.admin("PUT", POLICY, {"hold": "no"}).data["since"] == since
    assert house.admin("PUT", LAMPS + "/2.0.0", NEW).status == 201
    fields = "x-ESP32-version: 1.0.0", f"x-ESP32-STA-MAC: {MACS[1]}"
    reply = house.ask("", "GET", "/lamp", None, *fields)
    assert reply.headers["x-ota-reason"].startswith("waiting-for-stage")
    assert house.admin("PUT", POLICY, {"plan": {}}).data["since"] == 0
    assert house.ask("", "GET", "/lamp", None, *fields).headers["x-version"] == "2.0.0"


def test_pages_of_groups_and_approvals_are_the_list(house: House) -> None:
    names = [f"group-{number}" for number in range(7)]
    for name in reversed(names):
        house.admin("PUT", f"groups/{name}", {"hold": "no"})
    versions = ["1.0.0", "1.10.0", "1.9.0"]
    for version in versions:
        house.admin("PUT", f"{DEVICE}/approvals/{version}")
    for path, key, whole in (
        ("groups", "name", names),
        (f"{DEVICE}/approvals", "version", versions),
    ):
        for limit in (1, 2, 3, 7):
            found, target = [], f"{path}?limit={limit}"
            for _ in range(9):
                page = house.admin("GET", target).data
                found += [each[key] for each in page["items"]]
                if page["next"] is None:
                    break
                target = f"{path}?limit={limit}&cursor={page['next']}"
            assert found == whole


def test_what_two_say_of_one_project_holds_both(house: House) -> None:
    """What another server has just written of other fields stays, read or not."""
    with closing(Registry(house.state / "fleet.db")) as registry:
        beside = Assignments(registry)
        house.admin("PUT", FIRM, {"hold": "no"})
        assert beside.change("project", "firmware", {"channel": "beta"}, 1)
        assert not beside.change("project", "firmware", {"channel": "beta"}, 1)
        house.admin("PUT", FIRM, {"approval": "no"})
        wanted = {"hold": "no", "channel": "beta", "approval": "no"}
        assert is_part(wanted, house.admin("GET", FIRM).data)
