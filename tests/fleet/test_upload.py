"""A release comes in: over HTTP into the stock, and out of it into a device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_fleet.rows import Project
from ota_fleet.stock import Stock
from ota_fleet.upload import Uploads
from ota_server import Reply, Request, Route, Site
from tests.core.wire import Answer, Stand, request, standing
from tests.data.make_images import esp32_image, esp8266_image
from tests.devices import Esp32, Esp8266
from tests.fleet.test_fleet import registry_of, remembering

PATHS = re.compile(r"/api/v1/projects/([^/]+)/releases(?:/([^/]+))?|/api/v1/releases")
NOW = 1_760_000_000  # UTC seconds


class Actor(NamedTuple):
    """Who uploads; as accounts.Actor."""

    name: str = "token 1 (CI)"
    project: str = ""


def with_uploads(site: Site, registry: Registry, actor: Actor = Actor()) -> Site:
    """The site with the paths of uploads, for everybody."""
    uploads = Uploads(stock_of(site), Ledger(registry), site.config, lambda: NOW)

    def publish(site: Site, request: Request) -> Reply:
        match = PATHS.fullmatch(request.path)
        assert match is not None
        return uploads.put(site, request, actor, *match.groups(""))

    route = Route(PATHS, publish, ("PUT", "POST"), blocking=True, body=uploads.max_body)
    return dataclasses.replace(site, routes=(route, *site.routes))


def stock_of(site: Site) -> Stock:
    """The catalog of a site with a memory."""
    assert isinstance(site.catalog, Stock)
    return site.catalog


@contextmanager
def publishing(folder: Path, actor: Actor = Actor(), **settings: Any) -> Iterator[Site]:
    """A site that takes uploads, with a project `lamp` beside what is in the folder."""
    with remembering(folder, **settings) as site, registry_of(site) as registry:
        stock_of(site).put_project(Project("lamp"))
        yield with_uploads(site, registry, actor)


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    """A site that takes uploads."""
    with publishing(folder) as site:
        yield site


def send(stand: Stand, path: str, body: bytes, *fields: str, method: str = "PUT") -> Answer:
    """The reply to an upload over a socket."""
    with stand.dial() as wire:
        length = f"Content-Length: {len(body)}"
        wire.send(request(f"/api/v1{path}", length, *fields, method=method) + body)
        return wire.reply()


@pytest.mark.parametrize("make", ["esp8266", "esp32"])
def test_device_gets_what_was_uploaded_a_moment_ago(make: str, site: Site) -> None:
    kind, image = (Esp8266, esp8266_image) if make == "esp8266" else (Esp32, esp32_image)
    with standing(site) as stand:
        where: dict[str, Any] = {"host": "127.0.0.1", "port": stand.port, "path": "/lamp"}
        device = kind(image=image("lamp", "1.0.0"), **where)  # type: ignore[operator]
        assert device.update() == "HTTP_UPDATE_FAILED"
        answer = send(stand, "/projects/lamp/releases/1.1.0", image("lamp", "1.1.0"))  # type: ignore[operator]
        assert answer.status == 201, answer.body
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.1.0")
        assert device.update() == "HTTP_UPDATE_NO_UPDATES"
