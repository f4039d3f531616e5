"""S4, the FUOTA server of esp32-fuota: what /devices and /files answer.

A device first asks GET /devices/<id>?app_ver=<version it runs>, which names a file, then fetches
GET /files/<name>: fuota_b.c ota_update_b(). People fill the table and bring the files with curl:

    PUT, GET, DELETE /devices... <-> Registry: device, version to update from, path of the file
    PUT, GET /files/<path> <-> Store: the bytes, which a path of a request never leads to
"""

from __future__ import annotations

import base64
import csv
import hmac
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote

from ota_fleet.accounts import DEVICE, Accounts, Actor
from ota_fleet.files import Store, room
from ota_fleet.ledger import Ledger
from ota_fleet.registry import App, StoredFile, normal_id
from ota_fleet.upload import check_promises, promises
from ota_server import (
    NAMED,
    UNCACHED,
    UNVERSIONED,
    Config,
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
    reason_field,
    shown,
)

MAX_TEXT = 255  # bytes of a device's id, version and path: fuota_b.c has room for no more
MAX_LINE = 4096  # bytes of a line about a device, of three such texts
DONE = Reply(200, (("Content-Length", "0"), UNCACHED))
PAIR = Actor("US_AUTH_USERNAME", "publisher")  # who has the shared pair
PATHS = re.compile("(?s)/(?:devices|files)(?:/.*)?")

log = logging.getLogger("ota.two_step")


# -- 1. Credentials --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Credentials:
    """The guard of these paths, where a device's token opens less than that of who fills them."""

    accounts: Accounts
    admitted: Callable[[str], frozenset[str]]  # the ids of a project's devices, from memory
    pair: bytes = b""  # S4's own, the same for all: username:password; b"": there is none

    def __call__(self, request: Request) -> None:
        """Refused: 403, see actor()."""
        if PATHS.fullmatch(request.path):
            self.actor(request)

    def actor(self, request: Request) -> Actor:
        """Who asks, and may. Refused: 403, also where nothing is given, as S4 has no 401."""
        if self._is_pair(request):
            return PAIR
        actor = self.accounts.actor(request)
        if actor is None:
            given = "wrong" if "authorization" in request.headers else "missing"
            raise Refused(403, f"credentials are {given}: a token, as password of Basic or Bearer")
        if actor.role == DEVICE:
            self._allow_device(actor, request)
            return actor
        try:
            return self.accounts.require(request, "publisher")  # S4 knows no projects
        except Refused as refused:
            raise Refused(403, refused.reason) from refused

    def _is_pair(self, request: Request) -> bool:
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        if not self.pair or scheme.lower() != "basic":
            return False
        with suppress(ValueError):
            return hmac.compare_digest(base64.b64decode(text.strip(), validate=True), self.pair)
        return False

    def _allow_device(self, actor: Actor, request: Request) -> None:
        """Refused: 403. A token of a project is for the devices that were admitted to it."""
        if request.method not in {"GET", "HEAD"}:
            raise Refused(403, f"{actor.name} is a device's, which only reads here")
        if request.path.startswith("/files"):
            return
        device = normal_id(_segment(request.path))
        mine = {actor.device} if actor.device else self.admitted(actor.project)
        everybody = not (actor.device or actor.project)
        if not (device and (everybody or device in mine)):
            raise Refused(403, f"{actor.name} is not for the device {shown(device)}")


def pair_of(config: Config) -> bytes:
    """The shared pair of the settings; b"": there is none. ValueError: half of one."""
    user, password = config.us_username, config.us_password
    if bool(user) != bool(password):
        raise ValueError("US_AUTH_USERNAME and US_AUTH_PASSWORD: set both, or none")
    return f"{user}:{password}".encode("utf-8", "surrogateescape") if user and password else b""


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

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        who: Callable[[Request], Actor],
        max_image: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`max_image` is MB, `now` UTC seconds; `who` may raise Refused."""
        self._ledger = ledger
        self._registry = ledger.registry
        self._store = store
        self._who = who
        self._max_image = max_image
        self._now = now

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
        planned = app.app_ver, app.update_file_path
        with room(), self._recording(request, "plan update") as what:
            self._registry.put_app(app)
            what.append("{} from {} to {}".format(device, *planned))
        log.info("%s %s: from %r it is to get %r", device, request.peer, *planned)
        return DONE

    def _cancel(self, request: Request, device: str) -> Reply:
        with room(), self._recording(request, "cancel update") as what:
            if not self._registry.delete_app(device):
                raise Refused(404, f"the device {shown(device)} is not known")
            what.append(device)
        log.info("%s %s: its update is taken back", device, request.peer)
        return DONE

    def _planned(self, site: Site, request: Request, device: str) -> Reply:
        """Which file this device is to fetch; listeners hear of it, also of unknown devices."""
        version = running(request.query)
        app = self._registry.app(device)
        outcome = self._outcome(app, version)
        report = read_report("", request.headers, request.peer)
        # Texts, not numbers: they are compared with nothing but the row.
        report = report._replace(device=device, version=Version(UNVERSIONED.precedence, version))
        for listener in site.listeners:
            listener(Event(report, outcome))
        why = reason_field(report, outcome)
        if isinstance(outcome, Release) and app is not None:
            return body_reply(200, "text/csv", app.update_file_path.encode(), UNCACHED, why)
        assert isinstance(outcome, Objection)
        if outcome.deny:
            raise Refused(404, str(outcome))
        return Reply(204, (UNCACHED, why))

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

    @contextmanager
    def _recording(self, request: Request, action: str) -> Iterator[list[str]]:
        """A transaction, and what its entry in the audit says."""
        who = self._who(request).name
        with self._ledger.recording(who, action, int(self._now())) as (_, what):
            yield what

    def _upload(self, request: Request, path: str) -> Reply:
        assert request.body is not None
        if not request.body_size:
            raise Refused(400, "the file is empty")
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise Refused(400, "send the file itself, as curl --data-binary does, not a form")
        promised = tuple(promises(request.headers))
        words = self._who(request).name, "put file"
        at = int(self._now())

        def note(found: StoredFile) -> None:
            """In the transaction, so that nothing stays of what is something else."""
            check_promises(promised, found.md5, found.sha256)
            self._ledger.audit(*words, f"{path} {found.sha256}", at)

        with room():
            stored = self._store.put(path, request.body, note)
        log.info("%s stored %s: %d bytes, %s", request.peer, path, stored.size, stored.sha256)
        return DONE
