"""schemathesis asks what the OpenAPI document lets it: no 500, and answers are as that says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.conftest import wait_until
from tests.core.wire import Stand
from tests.fleet.test_api import BASE, House, furnished, house, stand  # noqa: F401 - fixtures

SLOW = {"/setup", "/session", "/accounts", "/accounts/{account}"}  # each hashes a password
HERE = ["lamp", "firmware", "bulb", "1.0.0", "1", "5C:CF:7F:00:00:01"]  # some of what there is


def names(schema: Any) -> st.SearchStrategy[str]:
    """What stands in a path: often what there is, so that more than a 404 comes back."""
    return st.sampled_from(HERE) | st.text("ab1./% \x7fä\U0001f600", min_size=1, max_size=9)


def cases(operation: Any) -> st.SearchStrategy[Any]:
    """Requests as the document says, and others that it forbids."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    try:
        wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    except Exception:  # noqa: BLE001
        return right
    return right | wrong
