"""The page of webhooks: who is told of what, whether that works, and what is shown once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ota_fleet.accounts import ROLES
from ota_fleet.deliveries import EVENTS
from ota_fleet.hook_pages import WEBHOOKS, WORDS
from ota_fleet.hooks import Hooks
from ota_server import Site
from tests.conftest import wait_until
from tests.fleet import test_pages
from tests.fleet.test_device_pages import audit_of
from tests.fleet.test_pages import XSS, Browser, House, Seen, check_page, living, state_of

furnished = test_pages.furnished

NOWHERE = "http://127.0.0.1:1/hook?key=abc"  # a port that nobody listens at


@pytest.fixture
def house(folder: Path, furnished: tuple[Path, dict[str, str]]) -> Iterator[House]:
    """As in test_pages."""
    with living(folder, furnished) as house:
        yield house


def hooks_of(site: Site) -> Hooks:
    """What the page works on."""
    owners = (getattr(each, "__self__", None) for each in site.closers)
    return next(each for each in owners if isinstance(each, Hooks))


def cells(seen: Seen, label: str) -> list[str]:
    """A column."""
    return seen.texts("td", **{"data-label": label})


@pytest.mark.parametrize("who", ROLES)
def test_page_is_for_administrators(house: House, who: str) -> None:
    seen = house.by(who).get(WEBHOOKS)
    check_page(seen)
    assert seen.status == (200 if who == "admin" else 403)
    before = state_of(house.site)
    for csrf in {house.by(who).csrf, ""} if who != "admin" else {"", "0" * 64}:
        sent = house.by(who).send(WEBHOOKS, do="add", url=NOWHERE, csrf=csrf)
        assert sent.status == 403
    assert Browser(house.site).send(WEBHOOKS, do="add", url=NOWHERE).status == 401
    assert state_of(house.site) == before


def test_every_event_has_words() -> None:
    assert [*WORDS] == [*EVENTS]


def test_webhook_is_made_and_its_secret_is_shown_once(house: House) -> None:
    seen = house.admin.send(WEBHOOKS, do="add", url=f" {NOWHERE} ", events=[*EVENTS[:2]])
    check_page(seen)
    (made,) = hooks_of(house.site).webhooks()
    assert (made.url, made.events, made.who) == (NOWHERE, EVENTS[:2][::-1], "admin@example.org")
    assert seen.texts("pre") == [made.secret]
    again = house.admin.get(WEBHOOKS)
    assert made.secret not in again.text
    assert (cells(again, "Where to"), cells(again, "Told of")) == (
        [NOWHERE], [", ".join(made.events)]
    )  # fmt: skip
    assert audit_of(house.site)[-1][1:] == (
        "add webhook", f"{made.name} for {', '.join(made.events)}"
    )  # fmt: skip


def test_webhook_that_cannot_be_reached_says_so_and_is_removed(house: House) -> None:
    house.admin.send(WEBHOOKS, do="add", url=NOWHERE, secret="s" * 20)
    assert cells(house.admin.get(WEBHOOKS), "To be told") == ["nothing"]
    seen = house.admin.do(WEBHOOKS, do="test", id=1)
    assert seen.said == "It is told of a ping."
    wait_until(lambda: "fails" in cells(house.admin.get(WEBHOOKS), "To be told")[0])
    seen = house.admin.send(WEBHOOKS, do="remove", id=1)
    assert (seen.status, "tick the box" in seen.alert) == (422, True)
    seen = house.admin.do(WEBHOOKS, do="remove", id=1, sure=1)
    assert seen.texts("p", **{"class": "empty"}) == ["There is no webhook yet."]
    assert [entry[1] for entry in audit_of(house.site)] == [
        "add webhook", "test webhook", "remove webhook"
    ]  # fmt: skip


FLAWED: list[tuple[dict[str, Any], int]] = [
    ({"do": "add"}, 422),
    ({"do": "add", "url": "ftp://example.org"}, 422),
    ({"do": "add", "url": XSS[1]}, 422),
    ({"do": "add", "url": NOWHERE, "secret": "short"}, 422),
    ({"do": "add", "url": NOWHERE, "events": ["ping"]}, 422),
    ({"do": "test", "id": "7"}, 404),
    ({"do": "test"}, 404),
    ({"do": "remove", "id": "x", "sure": 1}, 404),
    ({"do": "sell"}, 422),
    ({}, 422),
]


@pytest.mark.parametrize(("words", "status"), FLAWED)
def test_form_that_cannot_be_is_shown_again(
    house: House, words: dict[str, Any], status: int
) -> None:
    seen = house.admin.send(WEBHOOKS, **words)
    check_page(seen)
    assert (seen.status, bool(seen.alert)) == (status, True)
    for name in ("url", "secret"):
        assert seen.control(name).get("value") == words.get(name, "")
    assert hooks_of(house.site).webhooks() == []
    assert audit_of(house.site) == []
