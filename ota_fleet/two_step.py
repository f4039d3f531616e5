"""S4, the FUOTA server of esp32-fuota: what /devices and /files answer.

A device first asks GET /devices/<id>?app_ver=<version it runs>, which names a file, then fetches
GET /files/<name>: fuota_b.c ota_update_b(). People fill the table and bring the files with curl:

    PUT, GET, DELETE /devices... <-> Registry: device, version to update from, path of the file
    PUT, GET /files/<path> <-> Store: the bytes, which a path of a request never leads to
"""

from __future__ import annotations

import base64
import csv
import functools
import hmac
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import unquote

from ota_fleet.files import Store, room
from ota_fleet.registry import App, Registry
from ota_server import (
    NAMED,
    UNCACHED,
    UNVERSIONED,
    Event,
    Facts,
    Image,
    Objection,
    Refused,
    Release,
    Reply,
    Request,
    Route,
    Site,
    Version,
    body_reply,
    identity_of,
    image_reply,
    read_report,
    shown,
)

MAX_TEXT = 255  # bytes of a device's id, version and path: fuota_b.c has room for no more
MAX_LINE = 4096  # bytes of a line about a device, of three such texts
DONE = Reply(200, (("Content-Length", "0"), UNCACHED))
PATHS = re.compile("(?s)/(?:devices|files)(?:/.*)?")

log = logging.getLogger("ota.two_step")


# -- 1. Credentials --------------------------------------------------------------------------------

Guard = Callable[[Request], None]


def by_credentials(username: str, password: str) -> Guard:
    """The guard of these paths, which take these credentials and no tokens."""
    pair = f"{username}:{password}".encode("utf-8", "surrogateescape")
    return functools.partial(only_with, pair)


def only_with(pair: bytes, request: Request) -> None:
    """The guard of these paths: username:password, by Basic; the same for all.

    Raises:
        Refused: 403, they are missing or wrong; S4 has no 401.
    """
    if PATHS.fullmatch(request.path) is None:
        return
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    given = b""
    if scheme.lower() == "basic":
        with suppress(ValueError):
            given = base64.b64decode(text.strip(), validate=True)
    if not hmac.compare_digest(given, pair):
        reason = "the credentials are wrong" if given else "credentials are missing"
        raise Refused(403, f"{reason}: user name and password, by Basic")


# -- 2. Words of requests --------------------------------------------------------------------------


def checked(name: str, text: str) -> str:
    """A text that fits a device's memory and a line between quotes. Refused: 400."""
    if not text.isprintable() or '"' in text:  # surrogates, from what is no UTF-8, are not, either
        raise Refused(400, f"{name} {shown(text)} has a double quote or what cannot be printed")
    if len(text.encode()) > MAX_TEXT:
        raise Refused(400, f"{name} {shown(text)} has more than {MAX_TEXT} bytes")
    return text


def running(query: str) -> str:
    """The one app_ver of a query. Refused: 400."""
    pairs = (each.partition("=") for each in query.split("&"))
    values = [unquote(value) for key, _, value in pairs if key == "app_ver" and value]
    if len(values) != 1:
        raise Refused(400, "one ?app_ver=<version that runs> is needed")
    return checked("app_ver", values[0])


def read_line(device: str, body: BinaryIO) -> App:
    """The one line of CSV about this device. Refused: 400."""
    try:
        text = io.StringIO(body.read(MAX_LINE).decode(), newline="")
        rows = [row for row in csv.reader(text, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as err:
        raise Refused(400, f"the body is no CSV in UTF-8: {err}") from err
    if len(rows) != 1 or len(rows[0]) != 3:
        raise Refused(400, 'the body is not one line "<device_id>","<app_version>","<file path>"')
    name, version, path = map(checked, ("device_id", "app_version", "file path"), rows[0])
    if name != device:
        raise Refused(400, f"the line is about {shown(name)}, the URL about {shown(device)}")
    return App(name, version, path)


def _segment(path: str) -> str:
    """What stands behind /devices/ or /files/."""
    return path.strip("/").partition("/")[2]


# -- 3. What the paths answer ----------------------------------------------------------------------


class TwoStep:
    """The endpoints; each runs in a thread."""

    def __init__(self, registry: Registry, store: Store, max_image: int) -> None:
        self._registry = registry
        self._store = store
        self._max_image = max_image  # MB

    def routes(self) -> tuple[Route, ...]:
        """Both paths, with all that is below them."""
        devices, files = re.compile("(?s)/devices(?:/.*)?"), re.compile("(?s)/files(?:/.*)?")
        reading, most = ("GET", "HEAD"), self._max_image << 20
        return (
            Route(devices, self.devices, (*reading, "PUT", "DELETE"), blocking=True, body=MAX_LINE),
            Route(files, self.files, (*reading, "PUT"), blocking=True, body=most),
        )

    def devices(self, site: Site, request: Request) -> Reply:
        """/devices, the table; /devices/<id>, one device: a question, or a change of its row."""
        device = checked("device_id", _segment(request.path))
        if "/" in device or (not device and request.method not in {"GET", "HEAD"}):
            raise Refused(400, "the path is not /devices/<device_id>")
        if request.method == "PUT":
            return self._plan(request, device)
        if request.method == "DELETE":
            return self._cancel(request, device)
        return self._planned(site, request, device) if device else self._table()

    def files(self, _site: Site, request: Request) -> Reply:
        """/files/<path>: the bytes, or new ones."""
        path = checked("file path", _segment(request.path))
        if not path:
            raise Refused(400, "the path is not /files/<update_file_path>")
        if request.method == "PUT":
            return self._upload(request, path)
        found = self._release(path)
        if found is None:
            raise Refused(404, f"there is no file {shown(path)}")
        release, image = found
        reply = None
        try:
            reply = image_reply(request, release, image, NAMED)
        finally:
            if reply is None or reply.body is not image:
                image.file.close()
        return reply._replace(recipient=f"- {request.peer}")

    def _table(self) -> Reply:
        line = '"{0.device_id}","{0.app_ver}","{0.update_file_path}"\n'.format
        text = "".join(map(line, self._registry.apps()))
        return body_reply(200, "text/csv", text.encode(), UNCACHED)

    def _plan(self, request: Request, device: str) -> Reply:
        assert request.body is not None
        app = read_line(device, request.body)
        with room():
            self._registry.put_app(app)
        planned = app.app_ver, app.update_file_path
        log.info("%s %s: from %r it is to get %r", device, request.peer, *planned)
        return DONE

    def _cancel(self, request: Request, device: str) -> Reply:
        with room():
            known = self._registry.delete_app(device)
        if not known:
            raise Refused(404, f"the device {shown(device)} is not known")
        log.info("%s %s: its update is taken back", device, request.peer)
        return DONE

    def _planned(self, site: Site, request: Request, device: str) -> Reply:
        """Which file this device is to fetch; listeners hear of it, also of unknown devices."""
        version = running(request.query)
        app = self._registry.app(device)
        outcome = self._outcome(app, version)
        report = read_report("", request.headers, request.peer)
        # Texts, not numbers: they are compared with nothing but the row.
        text = Version(UNVERSIONED.precedence, version)
        for listener in site.listeners:
            listener(Event(report._replace(device=device, version=text), outcome))
        if isinstance(outcome, Release) and app is not None:
            return body_reply(200, "text/csv", app.update_file_path.encode(), UNCACHED)
        assert isinstance(outcome, Objection)
        if outcome.deny:
            raise Refused(404, str(outcome))
        return Reply(204, (UNCACHED,))

    def _outcome(self, app: App | None, version: str) -> Release | Objection:
        if app is None:
            return Objection(
                "unknown-device", "no update was ever planned for it", deny=True, final=True
            )
        if app.app_ver != version:
            reason = f"an update is planned from {app.app_ver!r} only, not from {version!r}"
            return Objection("nothing-planned", reason, final=True)
        path = app.update_file_path
        found = self._release(path) or self._release(unquote(path))  # a device puts it into a URL
        if found is None:
            return Objection("no-file", f"there is no file {shown(path)}", deny=True)
        found[1].file.close()
        return found[0]

    def _release(self, path: str) -> tuple[Release, Image] | None:
        """What is stored under this path; the caller closes the image."""
        found = self._store.open(path)
        if found is None:
            return None
        stored, file = found
        identity = identity_of(os.fstat(file.fileno()))
        facts = Facts(md5=stored.md5, sha256=stored.sha256)
        version = Version(UNVERSIONED.precedence, path)
        name = path.rpartition("/")[2]
        release = Release("", version, "sketch", file.name, name, identity, facts)
        return release, Image(file, stored.size, stored.md5, stored.sha256, identity)

    def _upload(self, request: Request, path: str) -> Reply:
        assert request.body is not None
        if not request.body_size:
            raise Refused(400, "the file is empty")
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise Refused(400, "send the file itself, as curl --data-binary does, not a form")
        with room():
            stored = self._store.put(path, request.body)
        log.info("%s stored %s: %d bytes, %s", request.peer, path, stored.size, stored.sha256)
        return DONE
