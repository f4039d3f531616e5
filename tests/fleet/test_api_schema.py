"""schemathesis asks what the OpenAPI document lets it: no 500, and answers are as that says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from ota_fleet.openapi import BASE
from tests.conftest import put
from tests.core.wire import standing
from tests.data.make_images import esp8266_image
from tests.fleet.test_api import FIRST, LAMP, MAY, opened
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - a fixture

SLOW = {"POST /setup", "POST /session", "POST /accounts", "PATCH /accounts/{account}"}
# Some of what there is, else nearly all paths would lead to a 404.
HERE = ["lamp", "firmware", "bulb", "1.0.0", "1", "2", "5C:CF:7F:00:00:01", "attic"]
WORDS = {"device", "project", "version", "running"}  # of queries
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


class Street(NamedTuple):
    """A running server, as schemathesis sees it."""

    schema: Any
    token: str  # an administrator's


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory, furnished: Any) -> Iterator[Street]:
    """One server for all operations: what one has changed, the next ones find."""
    folder = tmp_path_factory.mktemp("street") / "firmware"
    put(folder / "firmware-1.0.0.bin", esp8266_image("firmware", "1.0.0"))
    with opened(folder, furnished) as house:
        house.admin("PUT", "projects/lamp", {"aliases": ["bulb"]})
        assert house.admin("PUT", FIRST, LAMP).status == 201
        assert house.admin("POST", "projects/lamp/rollouts", {"version": "1.0.0"}).status == 201
        assert house.admin("PUT", "groups/attic", {"hold": "no"}).status == 200
        for _ in range(20):  # the last one's number is hit by no chance
            token = house.admin("POST", "tokens", {"name": "x", "role": "admin"}).data["token"]
        with standing(house.site) as stand:
            url = f"http://127.0.0.1:{stand.port}{BASE}/openapi.json"
            yield Street(schemathesis.openapi.from_url(url), token)


@st.composite
def cases(draw: st.DrawFn, operation: Any) -> Any:
    """A request that the document allows or forbids, often about what there is."""
    mode = draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    case = draw(operation.as_strategy(generation_mode=mode))
    for name in case.path_parameters or ():
        if draw(st.booleans()):
            case.path_parameters[name] = draw(st.sampled_from(HERE))
    for name in {*(case.query or ())} & WORDS if mode is GenerationMode.POSITIVE else ():
        if draw(st.booleans()):
            case.query[name] = draw(st.sampled_from(HERE))
    return case


@pytest.mark.parametrize("operation", MAY)
def test_nothing_that_the_document_allows_is_a_500(operation: str, street: Street) -> None:
    method, _, path = operation.partition(" ")
    found = street.schema[BASE + path][method]

    @settings(
        max_examples=3 if operation in SLOW else 25,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(found))
    def ask(case: Any) -> None:
        given = {"Authorization": f"Bearer {street.token}"}
        case.validate_response(case.call(headers=given, timeout=10), checks=CHECKS)

    ask()


def test_administrator_still_is_one(street: Street) -> None:
    case = street.schema[f"{BASE}/session"]["GET"].Case()
    reply = case.call(headers={"Authorization": f"Bearer {street.token}"}, timeout=10)
    assert reply.status_code == 200
