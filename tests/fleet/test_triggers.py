"""Triggers by the API: who may tell which devices to ask for their image, and what is queued."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ota_fleet import summons as summons_module
from ota_fleet import trigger_operations as operations_module
from ota_fleet.accounts import Accounts
from ota_fleet.api import Api, problem
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_fleet.summons import Summons
from ota_fleet.trigger_operations import TriggerOperations
from tests.conftest import site_of
from tests.fleet.test_api import MACS, NOW, Answer, House
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - a fixture


@dataclass
class Desk:
    """The API of triggers alone, over what is furnished: lamps 1 and 3, firmware 0, 2 and 4."""

    registry: Registry
    ledger: Ledger
    summons: Summons
    house: House

    def ask(self, who: str, body: object, method: str = "POST") -> Answer:
        """The reply to who wants devices told."""
        return self.house.ask(who, method, "triggers", body)

    def queued(self) -> list[tuple[str, int]]:
        """The devices, and how many seconds from now they are due."""
        rows = self.registry.rows("SELECT device, due FROM summons ORDER BY id")
        return [(device, due - NOW) for device, due in rows]

    def told(self) -> list[str]:
        """What the audit says of triggers."""
        found = (each for each in self.ledger.audit_log() if "trigger" in each.action)
        return [f"{each.who}: {each.action}: {each.what}" for each in found]


def desk_of(
    folder: Path, furnished: tuple[Path, dict[str, str]], registry: Registry, **settings: Any
) -> Desk:
    """One that is open."""
    ledger = Ledger(registry)
    summons = Summons(registry, settings.pop("template", "cmd/{mac}"))
    operations = TriggerOperations(
        **{"summons": summons, "ledger": ledger, "now": lambda: NOW + 0.5, **settings},
        members=lambda _, rollout: {1: [MACS[1], MACS[3]], 8: [MACS[4], MACS[1]]}.get(rollout, []),
        resolve=lambda project: {"bulb": "lamp"}.get(project, project),
    )
    api = Api(operations.table(), Accounts(ledger, secure=False), str, 0)
    site = replace(
        site_of(folder), routes=api.routes(), guards=(api.guard,), refusal=problem
    )  # fmt: skip
    return Desk(registry, ledger, summons, House(site, furnished[1]))


@pytest.fixture
def registry(tmp_path: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[Registry]:
    """A copy of what is furnished; a lamp and a firmware are in the attic, one has a label."""
    shutil.copy(furnished[0], tmp_path)
    registry = Registry(tmp_path / "fleet.db")
    for mac in MACS[:2]:
        registry.annotate(mac, group="attic")
    registry.annotate(MACS[3], labels=["new"])
    try:
        yield registry
    finally:
        registry.close()


@pytest.fixture
def desk(shelf: Path, furnished: tuple[Path, dict[str, str]], registry: Registry) -> Desk:
    """One with a broker."""
    return desk_of(shelf, furnished, registry)


DONE: list[tuple[str, dict[str, Any], list[tuple[str, int]]]] = [  # who, body, what is queued
    ("publisher", {"device": "5ccf7f000000"}, [(MACS[0], 0)]),
    ("admin", {"device": MACS[1], "stagger": 60}, [(MACS[1], 0)]),
    ("publisher", {"group": "attic"}, [(MACS[0], 0), (MACS[1], 5)]),
    ("publisher", {"group": "attic", "project": "bulb"}, [(MACS[1], 0)]),
    ("publisher", {"label": "new", "stagger": 0}, [(MACS[3], 0)]),
    ("publisher", {"rollout": 1, "stagger": 3_600}, [(MACS[1], 0), (MACS[3], 3_600)]),
    ("lamp", {"group": "attic"}, [(MACS[1], 0)]),
    ("lamp", {"device": MACS[3], "project": "bulb"}, [(MACS[3], 0)]),
    ("lamp", {"rollout": 1, "stagger": 0}, [(MACS[1], 0), (MACS[3], 0)]),
]


@pytest.mark.parametrize(
    ("who", "body", "queued"), DONE, ids=[f"{who} {body}" for who, body, _ in DONE]
)
def test_devices_are_told_one_after_the_other(
    who: str, body: dict[str, Any], queued: list[tuple[str, int]], desk: Desk
) -> None:
    answer = desk.ask(who, body)
    assert (answer.status, desk.queued()) == (202, queued)
    assert answer.data == {"triggers": len(queued), "until": NOW + queued[-1][1]}
    (entry,) = desk.told()
    by, value = next(iter(body.items()))
    assert f"({who}): trigger: {by} {value}, {body.get('stagger', 5)} s apart: " in entry


REFUSED: list[tuple[str, object, int, str]] = [  # who, body, status, reason
    ("publisher", {}, 422, "say one of device, group, label, rollout"),
    ("publisher", {"project": "lamp"}, 422, "say one of"),
    ("publisher", {"device": MACS[0], "group": "attic"}, 422, "and no other"),
    ("publisher", {"device": ""}, 422, "device is to have from 1"),
    ("publisher", {"device": MACS[0], "stagger": 3_601}, 422, "stagger is to be from 0 to 3600"),
    ("publisher", {"device": MACS[0], "stagger": -1}, 422, "stagger"),
    ("publisher", {"device": MACS[0], "url": "http://x"}, 422, "'url' is not known here"),
    ("publisher", {"rollout": True}, 422, "a whole number"),
    ("publisher", {"device": "unknown"}, 404, "no device is there by the device 'unknown'"),
    ("publisher", {"group": "cellar"}, 404, "by the group 'cellar'"),
    ("publisher", {"rollout": 7}, 404, "by the rollout '7'"),
    ("publisher", {"device": "nameless"}, 422, "never said of which project"),
    ("lamp", {"device": MACS[0]}, 403, "for 'lamp' only"),
    ("lamp", {"device": "nameless"}, 403, "for 'lamp' only"),
    ("lamp", {"device": MACS[1], "project": "firmware"}, 403, "for 'lamp' only"),
    ("viewer", {"device": MACS[0]}, 403, "the role publisher is needed"),
    ("", {"device": MACS[0]}, 401, ""),
]


@pytest.mark.parametrize(
    ("who", "body", "status", "reason"), REFUSED, ids=[f"{row[0]} {row[1]}" for row in REFUSED]
)
def test_what_is_refused_queues_nothing_and_says_why(
    who: str, body: object, status: int, reason: str, desk: Desk, registry: Registry
) -> None:
    registry.write(
        "INSERT INTO device (id, project, chip, version, image, sdk, address, first_seen,"
        " last_seen, downloads) VALUES ('nameless', '', '', '', '', '', '', 0, 0, 0)"
    )
    answer = desk.ask(who, body)
    assert answer.status == status
    assert reason in answer.detail
    assert (desk.queued(), desk.told()) == ([], [])


def test_who_never_said_its_project_is_told_which(desk: Desk, registry: Registry) -> None:
    registry.write("UPDATE device SET project = '' WHERE id = ?", MACS[0])
    assert desk.ask("publisher", {"device": MACS[0], "project": "lamp"}).status == 202
    (found,) = desk.summons.claim(NOW, 9)
    assert (found.device, found.project) == (MACS[0], "lamp")


def test_rollout_s_devices_are_those_that_may_have_it(desk: Desk) -> None:
    assert desk.ask("lamp", {"rollout": 8}).status == 202
    assert desk.queued() == [(MACS[1], 0)]
    assert desk.ask("publisher", {"rollout": 8}).status == 202
    assert [device for device, _ in desk.queued()] == [MACS[4], MACS[1]]
    assert desk.ask("publisher", {"rollout": 9}).status == 404


def test_too_many_devices_are_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summons_module, "MAX_TARGETS", 1)
    monkeypatch.setattr(operations_module, "MAX_TARGETS", 1)
    answer = desk.ask("publisher", {"group": "attic"})
    assert (answer.status, desk.queued()) == (422, [])
    assert "more than 1 devices" in answer.detail


def test_what_was_not_sent_can_be_taken_back(desk: Desk) -> None:
    assert desk.ask("publisher", {"group": "attic"}).status == 202
    assert desk.ask("lamp", None, "DELETE").data == {"triggers": 1}
    assert [device for device, _ in desk.queued()] == [MACS[0]]
    assert desk.ask("publisher", None, "DELETE").data == {"triggers": 1}
    assert desk.ask("publisher", None, "DELETE").data == {"triggers": 0}
    assert desk.ask("viewer", None, "DELETE").status == 403
    first, second = desk.told()[1:]
    assert first.endswith("(lamp): take back triggers: 1 of lamp")
    assert second.endswith("(publisher): take back triggers: 1 of all projects")


@pytest.mark.parametrize(("method", "body"), [("POST", {"group": "attic"}), ("DELETE", None)])
def test_without_a_broker_it_is_said_how_to_have_one(
    method: str,
    body: object,
    shelf: Path,
    furnished: tuple[Path, dict[str, str]],
    registry: Registry,
) -> None:
    answer = desk_of(shelf, furnished, registry, template="").ask("publisher", body, method)
    assert answer.status == 409
    assert "--mqtt" in answer.detail
