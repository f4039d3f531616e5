"""schemathesis makes requests of the OpenAPI document: none is a 500, and answers are as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.openapi.checks import UndefinedContentType, UndefinedStatusCode

from tests.core.wire import Stand, standing
from tests.fleet.test_api import BASE, House, furnished, house  # noqa: F401 - fixtures
