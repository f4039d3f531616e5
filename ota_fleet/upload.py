"""A release comes in: what may be published, and as what.

    body, as it is or in a form -> image.describe() -> is it whole, and what was promised?
        -> project and version, as the URL, the form, the image or its name say
        -> newer than what there is, and for the same chip? -> Stock.add() -> audit, --keep
    look(body) -> the same questions, nothing published -> a draft -> publish_draft(), discard()

The image itself is asked first of all: what it will say of itself once it runs is what the server
will see. A wrong upload is refused with a sentence that says what to do, and leaves nothing.
"""

from __future__ import annotations

import functools
import os
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import quote

from ota_fleet.files import PIECE, room
from ota_fleet.forms import Part, is_form, parameters, read_form, text_of
from ota_fleet.image import Description, describe, described
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Turn
from ota_fleet.rows import MAX_LONG, Draft, Stocked, StoredRelease, check_name, clean
from ota_fleet.stock import Stock
from ota_server import (
    UNKNOWN_CHIP,
    Config,
    Refused,
    Reply,
    Request,
    Site,
    Version,
    json_reply,
    parameter,
    printable,
    shown,
    unnamed_file,
)

FORM = 64 * 1024  # bytes of a form beside its file, at most
DRAFT_SECONDS = 86_400  # that a draft stays
FIELDS = ("project", "version", "notes", "replace")  # of a form
SWITCHES = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True}
SWITCHES |= {"yes": True, "on": True}
HOW = (
    "publish has --project and --version, a form fields of these names, the API PUT "
    "/api/v1/projects/<project>/releases/<version>; or call the file <project>-<version>.bin"
)
_OF_IMAGES = ("x-MD5", "x-SHA256")  # the other fields are about a body, which may be a form
_LENGTHS = {"md5": 16, "sha256": 32}  # bytes
_ALGORITHMS = {"md5": "md5", "sha-256": "sha256"}  # as those fields call them
_ENDINGS = {"sketch": ".bin", "zip": ".zip"}  # any other kind: .<kind>.bin

ADDING_SECONDS = 60.0  # that an upload waits for others
MAX_ADDING = 20  # uploads that wait so, of 32 threads


class Promise(NamedTuple):
    """What somebody says about the bytes of an image."""

    algorithm: str  # "md5" | "sha256"
    digest: str  # lower-case hex
    field: str  # where it stood


@dataclass(frozen=True, slots=True)
class Upload:
    """What is said of an image beside it. "": nothing."""

    name: str = ""  # of the file
    project: str = ""
    version: str = ""
    notes: str = ""
    replace: bool = False  # also a version that is not higher
    promised: tuple[Promise, ...] = ()
    only: str = ""  # the one project that it may go to; "": any


NOTHING = Upload()


class Look(NamedTuple):
    """What somebody sees of an image before it is published."""

    draft: Draft
    about: Description  # if `whole` is not "", it can never be published
    project: str  # that it would go to; "": nobody knows
    version: str  # that it would be
    problems: tuple[str, ...]  # sentences: why it cannot be published like this


class Advised(Refused):
    """A refusal with advice for programs; a person reads the sentence alone, and sees a page."""

    def __init__(self, status: int, sentence: str, advice: str) -> None:
        super().__init__(status, f"{sentence}: {advice}")
        self.sentence = sentence


class Publisher(Protocol):
    """Who uploads: accounts.Actor."""

    @property
    def name(self) -> str:
        """For the audit."""

    @property
    def project(self) -> str:
        """The only one that is allowed; "": all."""


class Uploads:
    """Everything that publishes a release comes through here; each call blocks."""

    def __init__(
        self, stock: Stock, ledger: Ledger, config: Config, now: Callable[[], float] = time.time
    ) -> None:
        """`now` is UTC seconds."""
        self._stock = stock
        self._ledger = ledger
        self._config = config
        self._now = now
        # What is found out about versions holds until one is added.
        self._adding = Turn(ADDING_SECONDS, MAX_ADDING)
        self.max_body = (config.max_image << 20) + FORM  # bytes, of a route

    def put(
        self,
        _site: Site,
        request: Request,
        actor: Publisher,
        project: str = "",
        version: str = "",
    ) -> Reply:
        """Publishes the body of a request, a form or the image itself; the release as JSON.

        Project and version are those of the URL, if they stand there. 201: it is published; 200:
        these very bytes are that release already.
        """
        assert request.body is not None
        with room(), ExitStack() as opened:
            body, upload = request.body, _from_fields(request)
            if is_form(request.headers.get("content-type", "")):
                body, upload = self._from_form(request, upload, opened)
            upload = replace(
                upload,
                project=_agreed("project", project, upload.project),
                version=_agreed("version", version, upload.version),
                only=actor.project,
            )
            stocked, new = self.take(body, upload, actor.name)
        path = f"/api/v1/projects/{stocked.release.project}/releases/{stocked.release.version}"
        reply = json_reply(stocked.as_json(), ("Location", quote(path)))
        return reply._replace(status=201 if new else 200)

    def take(self, body: BinaryIO, upload: Upload, who: str) -> tuple[Stocked, bool]:
        """Publishes an image. False: these very bytes are that release already.

        Raises:
            Refused: it is not published; the sentence says what to do.
            OSError, sqlite3.Error: it cannot be kept; nothing changed.
        """
        with FileIO(body.fileno(), closefd=False) as file:
            about = describe(file, upload.name)
        self._check_bytes(about, upload)
        project = self._project(about, upload)
        version = _version(about, upload)
        with self._adding:
            if twin := self._twin(about, project, version):
                return twin, False
            self._check_withdrawn(project, version)
            self._check_chip(about, project)
            self._check_partition(about, project)
            if not upload.replace:
                self._check_order(about, project, version)
            row = self._row(about, project, version, upload, who)
            what = f"{project} {version} {row.name} {row.sha256}"
            told = functools.partial(self._ledger.audit, who, "upload", what, row.uploaded)
            stocked = self._stock.add(body, row, told)
        if self._config.keep:
            told = functools.partial(self._ledger.audit, who, "prune releases", at=row.uploaded)
            self._stock.prune(project, self._config.keep, row.sha256, told)
        return stocked, True

    # -- Drafts ------------------------------------------------------------------------------------

    def look(self, body: BinaryIO, name: str, who: str) -> Look:
        """Keeps an image for a day, and says what is inside; nothing is published.

        Raises:
            Refused: 413, it is too big; 507, the disk is full.
        """
        self._check_size(os.fstat(body.fileno()).st_size)
        with room():
            draft = self._stock.store.put_draft(body, name, who, int(self._now()))
        return self.look_again(draft.id)

    def look_into(self, form: FileIO, part: Part, who: str) -> Look:
        """look() at a file of a form."""
        self._check_size(part.size)
        with room(), unnamed_file(self._config.state) as body:
            _copy(form, part, body)
            return self.look(body, part.filename or "", who)

    def look_again(self, draft: int, upload: Upload = NOTHING) -> Look:
        """What is inside a draft, and what publish_draft() would say.

        Raises:
            Refused: 404, it is gone; 503, what the folder has is not to be known just now.
        """
        found = self._draft(draft)
        try:
            about = described(self._stock.store.path(found.sha256), found.name)
        except FileNotFoundError as err:
            raise _gone() from err
        project, version, problems = self._problems(about, _of_draft(upload, found))
        return Look(found, about, project, version, tuple(problems))

    def drafts(self) -> list[Draft]:
        """All of the last day, the newest first; older ones end here."""
        self._stock.store.drop_drafts(int(self._now()) - DRAFT_SECONDS)
        return self._stock.store.drafts()

    def publish_draft(self, draft: int, upload: Upload, who: str) -> tuple[Stocked, bool]:
        """take() of a draft, which ends with it; the file's name is the draft's."""
        found = self._draft(draft)
        try:
            body = FileIO(self._stock.store.path(found.sha256))
        except FileNotFoundError as err:
            raise _gone() from err
        with body:
            done = self.take(body, _of_draft(upload, found), who)
        self._stock.store.drop_draft(draft)
        return done

    def discard(self, draft: int) -> None:
        """Ends a draft. Refused: 404, there is none."""
        if not self._stock.store.drop_draft(self._draft(draft).id):
            raise _gone()

    def _draft(self, draft: int) -> Draft:
        found = {each.id: each for each in self.drafts()}
        if draft not in found:
            raise _gone()
        return found[draft]

    def _problems(self, about: Description, upload: Upload) -> tuple[str, str, list[str]]:
        """Project and version that an image would have, "" if nobody knows, and what is wrong."""
        found: list[str] = []
        project, version = "", None
        with _noted(found):
            self._check_bytes(about, upload)
        with _noted(found):
            project = self._project(about, upload)
        with _noted(found):
            version = _version(about, upload)
        if project and version and self._twin(about, project, version):
            found.append(f"these very bytes are {version} of {shown(project)} already")
        elif project:
            with _noted(found):
                self._check_withdrawn(project, version)
            with _noted(found):
                self._check_chip(about, project)
            with _noted(found):
                self._check_partition(about, project)
            with _noted(found):
                if version and not upload.replace:
                    self._check_order(about, project, version)
        return project, str(version or ""), found

    # -- What may be published ---------------------------------------------------------------------

    def _twin(self, about: Description, project: str, version: Version) -> Stocked | None:
        """The release that these very bytes are already, whole."""
        for each in self._stock.images(project):
            same = each.release.facts.sha256 == about.sha256 and not each.flaw
            if same and each.release.version == version:
                return each
        return None

    def _check_size(self, size: int) -> None:
        """Refused: 413, that many bytes are not taken."""
        most = self._config.max_image << 20
        if size > most:
            raise Refused(413, f"the image has {size} bytes, at most {most} are taken")

    def _check_bytes(self, about: Description, upload: Upload) -> None:
        """Refused: 413 or 422, these bytes are never offered, or are not those that were sent."""
        self._check_size(about.size)
        check_promises(upload.promised, about.md5, about.sha256)
        if about.whole:
            raise Refused(422, f"{printable(upload.name[-64:]) or 'the file'} {about.whole}")

    def _project(self, about: Description, upload: Upload) -> str:
        """The project's own name. Refused: 403, 404 or 422."""
        wanted = upload.project or about.project or about.named_project
        if not wanted:
            raise Advised(422, "nothing says which project this is", HOW)
        project = self._stock.project(wanted)
        if project is None:
            check_name(wanted)
            advice = f"create it first, PUT /api/v1/projects/{wanted}"
            raise Advised(404, f"there is no project {wanted}", advice)
        if upload.only not in {"", project.name}:
            raise Refused(403, f"this token is for {shown(upload.only)}, not {shown(wanted)}")
        if about.project and self._stock.resolve(about.project) != project.name:
            reason = (
                f"the image says it is {shown(about.project)}, not {shown(wanted)}: upload it "
                f"there, or give {shown(project.name)} that alias"
            )
            raise Refused(422, reason)
        if clean(project.name) != project.name:
            raise Refused(422, f"{shown(project.name)} is no UTF-8: rename it in the folder")
        return project.name

    def _check_withdrawn(self, project: str, version: Version | None) -> None:
        """Refused: 409, this version was taken back, and this would be one more image of it."""
        for each in self._stock.images(project):
            if each.release.version == version and each.withdrawn is not None:
                reason = f"{version} of {shown(project)} is withdrawn: restore it first"
                raise Refused(409, f"{reason}, or choose a higher one")

    def _check_chip(self, about: Description, project: str) -> None:
        """Refused: 409, the project is for other chips."""
        found = self._stock.project(project)
        images = (each.release.facts.chip for each in self._stock.images(project))
        allowed = (found.chips if found else ()) or sorted(set(images) - {"", UNKNOWN_CHIP})
        if about.chip and allowed and about.chip not in allowed:
            reason = f"the image is for {about.chip}, {shown(project)} for {', '.join(allowed)}"
            advice = f'PUT /api/v1/projects/{project} with all of its "chips" first'
            raise Advised(409, reason, f"if that is meant, {advice}")

    def _check_partition(self, about: Description, project: str) -> None:
        """Refused: 409, no device of the project has room for it."""
        most = self._stock.partition_size(project)
        if most and about.kind == "sketch" and about.size > most:
            reason = f"the image has {about.size} bytes, the partition of {shown(project)} {most}"
            raise Refused(409, f"{reason}: no device could take it")

    def _check_order(self, about: Description, project: str, version: Version) -> None:
        """Refused: 409, no device would be given this version, or not this image of it.

        A release need not be higher than a pre-release. Packed and as it is, both may be there.
        """
        rivals = [
            each.release.version
            for each in self._stock.images(project)
            if (each.release.kind, each.release.facts.chip) == (about.kind, about.chip)
            and (version.prerelease or not each.release.version.prerelease)
            and (each.release.version != version or each.release.facts.packed == about.packed)
        ]
        newest = max(rivals, default=version)
        if newest in rivals and version <= newest:
            there = "is there already" if version == newest else f"is lower than {newest}"
            reason = f"{version} of {shown(project)} {there}"
            raise Advised(409, reason, "choose a higher one, or ?replace=1")

    def _row(
        self, about: Description, project: str, version: Version, upload: Upload, who: str
    ) -> StoredRelease:
        """What is remembered of it."""
        row = StoredRelease(
            project=project,
            version=str(version),
            kind=about.kind,
            chip=about.chip,
            packed=about.packed,
            name="",
            sha256=about.sha256,
            md5=about.md5,
            size=about.size,
            notes=clean(upload.notes, MAX_LONG),
            uploaded=int(self._now()),
            who=clean(who),
        )
        taken = {
            each.release.name
            for each in self._stock.images(project)
            if (each.release.version, each.release.kind, each.release.facts.chip)
            != (version, about.kind, about.chip)
            or each.release.facts.packed != about.packed
        }
        return replace(row, name=next(name for name in _names(row) if name not in taken))

    def _from_form(
        self, request: Request, upload: Upload, opened: ExitStack
    ) -> tuple[BinaryIO, Upload]:
        """The file in a form, and what else the form says. Refused: 400 or 422."""
        assert request.body is not None
        form = opened.enter_context(FileIO(request.body.fileno(), closefd=False))
        parts = read_form(form, request.headers["content-type"])
        files = [part for part in parts if part.filename is not None]
        chosen = [part for part in files if part.filename or part.size]
        if len(chosen) != 1:
            raise Refused(422, "one file is needed in the form: curl -F file=@firmware.bin")
        texts = _texts(form, [part for part in parts if part.filename is None])
        body = opened.enter_context(unnamed_file(self._config.state))
        _copy(form, chosen[0], body)
        promised = tuple(each for each in upload.promised if each.field in _OF_IMAGES)
        return body, Upload(
            chosen[0].filename or "",
            texts.get("project", ""),
            texts.get("version", ""),
            texts.get("notes", ""),
            upload.replace or _switch(texts.get("replace", "")),
            promised,
        )


def _of_draft(upload: Upload, draft: Draft) -> Upload:
    """With the name that the draft has; its bytes are to be those that came."""
    promise = Promise("sha256", draft.sha256, "the draft")
    return replace(upload, name=draft.name, promised=(promise,))


def _gone() -> Refused:
    return Refused(404, "there is no such draft any more: upload the file again")


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Makes a refusal one of the problems."""
    try:
        yield
    except Refused as refused:
        problems.append(refused.sentence if isinstance(refused, Advised) else refused.reason)


# -- What a request says ---------------------------------------------------------------------------


def _from_fields(request: Request) -> Upload:
    """What head and query say. Refused: 400 or 422."""
    field = request.headers.get("content-disposition", "")
    said = parameters(field.encode("latin-1").decode("utf-8", "replace"))
    name = said.get("filename*", said.get("filename", ""))
    again = _switch(parameter(request.query, "replace"))
    return Upload(name, replace=again, promised=tuple(promises(request.headers)))


def check_promises(promised: Iterable[Promise], md5: str, sha256: str) -> None:
    """Refused: 422, these are the digests of something else."""
    for algorithm, digest, field in promised:
        found = md5 if algorithm == "md5" else sha256
        if digest != found:
            reason = f"{field} promises {digest}, what arrived has {found}: send it again"
            raise Refused(422, reason)


def promises(headers: Mapping[str, str]) -> Iterator[Promise]:
    """The digests in x-MD5, x-SHA256, Content-MD5, Digest (RFC 3230), *-Digest (RFC 9530).

    Refused: 400, something there is no digest.
    """
    for field, algorithm in zip(_OF_IMAGES, _LENGTHS, strict=True):
        if text := headers.get(field.lower()):
            yield _promise(algorithm, field, text, bytes.fromhex)
    decoded = functools.partial(b64decode, validate=True)
    if text := headers.get("content-md5"):
        yield _promise("md5", "Content-MD5", text, decoded)
    for field in ("Digest", "Repr-Digest", "Content-Digest"):
        for each in headers.get(field.lower(), "").split(","):
            name, _, text = each.strip().partition("=")
            if algorithm := _ALGORITHMS.get(name.lower(), ""):
                text = text if field == "Digest" else re.sub(r"\A:(.*):\Z", r"\1", text)
                yield _promise(algorithm, field, text, decoded)


def _promise(algorithm: str, field: str, text: str, read: Callable[[str], bytes]) -> Promise:
    """Refused: 400, it is no such digest."""
    try:
        digest = read(text)
    except ValueError:  # binascii.Error is one
        digest = b""
    if len(digest) != _LENGTHS[algorithm]:
        raise Refused(400, f"{field}: {shown(text)} is no digest by {algorithm}")
    return Promise(algorithm, digest.hex(), field)


def _agreed(what: str, *said: str) -> str:
    """The one thing that URL and form say, or "". Refused: 422, they differ."""
    found = set(said) - {""}
    if len(found) > 1:
        raise Refused(422, f"URL and form differ in the {what}: {' and '.join(map(shown, said))}")
    return found.pop() if found else ""


def _switch(text: str) -> bool:
    """Refused: 422, it is neither yes nor no."""
    if text.lower() not in SWITCHES:
        raise Refused(422, f"replace is 1 or 0, not {shown(text)}")
    return SWITCHES[text.lower()]


def _texts(form: FileIO, parts: list[Part]) -> dict[str, str]:
    """The fields of a form. Refused: 400 or 422."""
    texts: dict[str, str] = {}
    for part in parts:
        if part.name not in FIELDS or part.name in texts:
            twice = "twice" if part.name in texts else f"but only {', '.join(FIELDS)} can be"
            raise Refused(422, f"{shown(part.name)} is in the form, {twice}")
        texts[part.name] = text_of(form, part)
    return texts


def _copy(form: FileIO, part: Part, body: BinaryIO) -> None:
    """Copies a file out of a form."""
    form.seek(part.start)
    left = part.size
    while left and (piece := form.read(min(left, PIECE))):
        body.write(piece)
        left -= len(piece)
    body.seek(0)  # writes what is buffered, too


def _version(about: Description, upload: Upload) -> Version:
    """The version that is meant. Refused: 422, nobody says it, or they differ."""
    if not upload.version:
        if version := about.version or about.named_version:
            return version
        own = f"; the image calls itself {shown(about.version_text)}" * bool(about.version_text)
        raise Advised(422, "nothing says which version this is", HOW + own)
    try:
        version = Version.parse(upload.version)
    except ValueError as err:
        raise Refused(422, str(err)) from err
    if about.version and about.version != version:
        reason = f"the image says it is {about.version}, not {version}: a device would never stop"
        raise Refused(422, f"{reason} updating. Build it with that version, or publish it as that")
    return version


def _names(row: StoredRelease) -> Iterator[str]:
    """What a file may be called, the best name first."""
    end = _ENDINGS.get(row.kind, f".{row.kind}.bin") + ".gz" * row.packed
    middles = (row.project, f"{row.project}-{row.chip}", f"{row.project}-{row.sha256[:8]}")
    for middle in middles:
        if not middle.endswith("-"):
            yield f"{middle}-{row.version}{end}"
