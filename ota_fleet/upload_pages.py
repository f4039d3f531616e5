"""The page of uploads: what is inside a file is shown before anybody publishes it.

    POST files -> Uploads.look_into() -> drafts -> GET: what each is, and what is wrong with it
    POST publish, discard, make -> the release, nothing, the project that it is for

A draft ends after a day. Whoever may publish sees all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO

from ota_fleet.api import read_number
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    area,
    badge,
    button,
    card,
    check,
    choice,
    code,
    facts,
    field,
    form,
    hidden,
    join,
    note,
    page,
    size_of,
    table,
    tag,
    url,
    when,
)
from ota_fleet.image import Description
from ota_fleet.operations import Operations
from ota_fleet.pages import Call, Page, See, act_of, asked, typed
from ota_fleet.rows import MAX_LONG, Draft, check_name
from ota_fleet.upload import Advised, Look, Upload
from ota_server import UNKNOWN_CHIP, Refused

UPLOAD = "/admin/upload"
MAX_SHOWN = 8  # drafts that are shown as a whole; the others are a list


@dataclass(frozen=True, slots=True)
class UploadPages:
    """The page, and what it works on."""

    operations: Operations

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        most = self.operations.uploads.max_body
        return (Page(UPLOAD, "publisher", self.show, self.act, link="Upload", most=most),)

    def show(self, call: Call) -> Sheet:
        """GET upload."""
        drafts = self.operations.uploads.drafts()
        chosen = call.asked("draft") or call.given("draft")
        first = [each for each in drafts if str(each.id) == chosen]
        drafts = first + [each for each in drafts if each not in first]
        return page(
            "Upload",
            card("", upload_form(call.actor.csrf)),
            [self._draft(call, each) for each in drafts[:MAX_SHOWN]],
            self._others(drafts[MAX_SHOWN:]),
        )

    def _others(self, drafts: Sequence[Draft]) -> Html | None:
        """Those that nobody wants to see just now: to look at all would take long."""
        now = self.operations.now()
        rows = [
            (a(each.name or "a file", url(UPLOAD, draft=each.id)), each.who, when(each.at, now))
            for each in drafts
        ]
        heads = "File", "By", "Looked at"
        return card("More files that wait", table(heads, rows, "Files that wait")) if rows else None

    def _draft(self, call: Call, draft: Draft) -> Html | None:
        """One draft: what it is, what is wrong, and what to do."""
        mine = call.given("draft") == str(draft.id)  # the form that is shown again
        upload = _upload(call) if mine else Upload()
        try:
            look = self.operations.uploads.look_again(draft.id, upload)
        except Refused as refused:
            return card(draft.name, note(refused.reason, kind="bad"))
        about = look.about
        state = badge("ready", "good") if not look.problems else None
        there = a(f"Settings of {look.project}", url("/admin/projects", look.project))
        rows: list[tuple[object, object]] = [
            ("Project", look.project or about.project or about.named_project),
            ("Version", look.version or about.version_text),
            *inside(about),
            ("Sent", join(when(draft.at, self.operations.now()), f" by {draft.who}")),
        ]
        return card(
            join(draft.name or "a file", " ", state),
            [note(each, kind="bad") for each in look.problems[:1]]
            if about.whole
            else [note(each, kind="warn") for each in look.problems],
            tag("p", there) if look.problems and look.project else None,
            facts(row for row in rows if row[1]),
            self._choices(call if mine else call._replace(form={}), look),
            id=f"draft-{draft.id}",
        )

    def _choices(self, call: Call, look: Look) -> Html:
        about, stock = look.about, self.operations.stock
        which = hidden(draft=look.draft.id)
        discard = button("Discard", "plain", name="do", value="discard", formnovalidate=True)
        if about.whole:
            return form(UPLOAD, call.actor.csrf, which, discard)
        unknown = self._unknown(call.given("project") or about.project or about.named_project)
        stuck = bool(unknown and about.project)  # no other project would do
        names = [("", "choose one"), *((each, each) for each in stock.projects())]
        version = field(
            "Version", "version", call.given("version", look.version),
            hint="As the sketch says it: a device compares it with its own.",
            autocomplete="off", spellcheck="false",
        )  # fmt: skip
        return form(
            UPLOAD, call.actor.csrf, which, hidden(make=unknown) if unknown else None,
            None if about.project else
            choice("Project", "project", names, call.given("project", look.project)),
            None if about.version else version,
            area("Notes", "notes", call.given("notes"), maxlength=MAX_LONG,
                 hint="What is new. ESPHome and Home Assistant show it."),
            check("Also if it is not higher than what is there", "replace",
                  checked=bool(call.given("replace"))),
            None if stuck else button("Publish", "main", name="do", value="publish"),
            button(f"Make the project {unknown}", "main" * stuck, name="do", value="make")
            if unknown else None,
            discard,
        )  # fmt: skip

    def _unknown(self, name: str) -> str:
        """The name of a project that is not there, but can be; else ""."""
        try:
            check_name(name)
        except Refused:
            return ""
        return "" if self.operations.stock.project(name) else name

    # -- What is done

    def act(self, call: Call) -> See:
        """POST upload: files, or what is to become of a draft."""
        if call.files or not call.given("do"):
            return self._look(call)
        draft = read_number(call.given("draft"))
        acts = {"discard": self._discard, "make": self._make, "publish": self._publish}
        return act_of(acts, call)(call, draft)

    def _look(self, call: Call) -> See:
        chosen = [each for each in call.files if each.filename or each.size]
        if not chosen:
            raise Refused(422, "choose a file first")
        body, uploads = call.request.body, self.operations.uploads
        assert body is not None
        with FileIO(body.fileno(), closefd=False) as file:
            looks = [uploads.look_into(file, each, call.actor.name) for each in chosen]
        return See(url(UPLOAD, draft=looks[-1].draft.id), "Nothing is published yet: look at it.")

    def _discard(self, _call: Call, draft: int) -> See:
        self.operations.uploads.discard(draft)
        return See(UPLOAD, "The file is discarded.")

    def _make(self, call: Call, draft: int) -> See:
        name = call.given("make")
        self.operations.put_project(asked(call, {"project": name}))
        return See(url(UPLOAD, draft=draft), f"The project {name} is made.")

    def _publish(self, call: Call, draft: int) -> See:
        uploads = self.operations.uploads
        try:
            stocked, new = uploads.publish_draft(draft, _upload(call), call.actor.name)
        except Advised as refused:
            raise Refused(refused.status, refused.sentence) from refused
        project, version = stocked.release.project, str(stocked.release.version)
        said = f"{project} {version} " + ("is published." if new else "was there already.")
        if any(each.who == call.actor.name for each in uploads.drafts()):
            return See(UPLOAD, said)
        return See(url("/admin/projects", project, "releases", version), said)


# -- Parts -----------------------------------------------------------------------------------------


def upload_form(csrf: str) -> Html:
    """Where a file is chosen; the script sends each by itself, with its progress."""
    return form(
        UPLOAD, csrf,
        field("Firmware", "file", None, type="file", multiple=True, required=True,
              accept=".bin,.gz,.zip",
              hint="Or drag it onto any page. What is inside is shown before it is published."),
        submit="Look inside", enctype="multipart/form-data", data_upload=True,
    )  # fmt: skip


def inside(about: Description) -> list[tuple[object, object]]:
    """What an image is and says of itself, as far as it does."""
    least, most = (f"{each / 100:.1f}" * bool(each) for each in
                   (about.min_revision, about.max_revision))  # fmt: skip
    megabytes, kilobytes = about.flash_size >> 20, about.flash_size >> 10
    room = f"{megabytes} MB" if megabytes else f"{kilobytes} KB"
    flash = f"{room} {about.flash_mode.upper()}".strip() if about.flash_size else ""
    rows: tuple[tuple[object, object], ...] = (
        ("Kind", about.kind + ", packed by gzip" * about.packed),
        ("Chip", about.chip if about.chip != UNKNOWN_CHIP else ""),
        ("Revision", f"{least or 'any'} to {most}" if most else least and f"from {least}"),
        (
            "Size",
            f"{size_of(about.size)} ({about.size:,} bytes)"
            if about.size >= 10_000
            else size_of(about.size),
        ),
        ("Built with", about.idf and f"ESP-IDF {about.idf}"),
        ("Built", about.built),
        ("Flash", flash),
        ("Signed", about.signed),
        ("Secure version", about.secure_version),
        ("MD5", code(about.md5)),
        ("SHA-256", code(about.sha256)),
    )
    return [row for row in rows if row[1]]


def _upload(call: Call) -> Upload:
    """What a form says of a draft."""
    return Upload(
        project=call.given("project"),
        version=call.given("version").strip(),
        notes=typed(call.given("notes")),
        replace=bool(call.given("replace")),
    )
