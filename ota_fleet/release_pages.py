"""Pages about projects and their releases: what devices get, what it is, what is done about it.

GET  -> Stock, History -> Sheet
POST -> Operations, as the API has them, so that both mean and note the same -> See
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from ota_fleet import lines
from ota_fleet.accounts import allow
from ota_fleet.api import Call as Asked
from ota_fleet.api import is_text
from ota_fleet.history import History
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    area,
    badge,
    button,
    card,
    cards,
    check,
    choice,
    code,
    copied,
    details,
    facts,
    field,
    form,
    join,
    note,
    page,
    pager,
    size_of,
    table,
    tag,
    url,
    when,
)
from ota_fleet.image import described
from ota_fleet.operations import Operations
from ota_fleet.pages import Call, Page, See, may
from ota_fleet.projects import needing, offered, rename
from ota_fleet.rows import CHIPS, MAX_LONG, Project, Stocked
from ota_fleet.stock import Stock
from ota_fleet.upload_pages import inside, upload_form
from ota_server import UNVERSIONED, Refused, Reply, Version, base_url, image_reply, shown

PROJECTS = "/admin/projects"
PROJECT = PROJECTS + "/{project}"
RELEASE = PROJECT + "/releases/{version}"
MAX_ROWS = 100  # images in one list of releases
MAX_NEEDS = 20  # devices in a list of who needs a release
MAX_FIRST = 80  # characters of notes in a list
_NAME = {"required": True, "maxlength": 64, "autocomplete": "off", "spellcheck": "false"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}  # as partitions.csv of ESP-IDF has them


@dataclass(frozen=True, slots=True)
class ReleasePages:
    """The pages, and what they work on."""

    operations: Operations
    history: History

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(PROJECTS, "viewer", self.show_projects, self.make_project, link="Projects"),
            Page(PROJECT, "viewer", self.show_project, self.change_project),
            Page(RELEASE, "viewer", self.show_release, self.change_release),
            Page(RELEASE + "/{name}", "viewer", self.download),
        )

    @property
    def _stock(self) -> Stock:
        return self.operations.stock

    # -- All projects

    def show_projects(self, call: Call) -> Sheet:
        """GET projects."""
        counts = self._devices()
        rows = [self._row(call, name, counts.get(name, {})) for name in self._stock.projects()]
        heads = "Project", "Newest release", "Releases", "Devices", "On the newest", "For", "Admits"
        new = form(
            PROJECTS, call.actor.csrf,
            field("Name", "name", call.given("name"),
                  hint="As devices are to ask for it: letters, digits and . _ -", **_NAME),
            submit="Make it",
        )  # fmt: skip
        return page(
            "Projects",
            card("", table(heads, rows, "Projects", "There is no project yet.")),
            card("Make a project", new) if may(call.actor, "publisher") else None,
        )

    def _row(self, call: Call, name: str, counts: Mapping[str, int]) -> tuple[object, ...]:
        project = self._stock.project(name) or Project(name)
        newest, why = offered(self._stock, name)
        devices = sum(counts.values())
        chips = sorted({each.release.facts.chip for each in self._images(name)})
        return (
            a(name, url(PROJECTS, name)) if is_text(name) else name,
            a(newest, _path(name, newest)) if newest else badge("none", "warn"),
            len({each.release.version for each in self._images(name)}),
            a(f"{devices:,}", url("/admin/devices", project=name)) if devices else 0,
            f"{100 * counts.get(newest, 0) // devices} %" if newest and devices else "",
            ", ".join(project.chips or chips),
            _admits(call, project),
        )

    def _images(self, project: str) -> list[Stocked]:
        try:
            return [*self._stock.images(project)]
        except Refused:  # the folder's cannot be known just now
            return []

    def _devices(self) -> dict[str, Counter[str]]:
        """How many devices of each project run which version."""
        found: dict[str, Counter[str]] = {}
        for each in self.history.counts(int(self.operations.now())):
            found.setdefault(each.project, Counter())[each.version] += each.devices
        return found

    def make_project(self, call: Call) -> See:
        """POST projects."""
        name = call.given("name").strip()
        if self._stock.project(name):
            raise Refused(409, f"there is a project {shown(name)} already")
        self.operations.put_project(_asked(call, {"project": name}))
        return See(url(PROJECTS, name), f"The project {name} is made.")

    # -- One project

    def show_project(self, call: Call) -> Sheet | See:
        """GET a project, by its name; an alias leads there."""
        project = self._project(call)
        if project.name != call.names["project"]:
            return See(url(PROJECTS, project.name))
        changes = may(call.actor, "publisher")
        return page(
            project.name,
            self._summary(call, project),
            self._releases(call, project),
            card("Upload", upload_form(call.actor.csrf)) if changes else None,
            _lines_card(call, project.name, *self._seeds(project)),
            _settings(call, project) if changes else None,
            self._name_and_end(call, project) if changes else None,
        )

    def _project(self, call: Call) -> Project:
        found = self._stock.project(call.names["project"])
        if found is None:
            raise Refused(404, f"there is no project {shown(call.names['project'])}")
        return found

    def _summary(self, call: Call, project: Project) -> Html:
        newest, why = offered(self._stock, project.name)
        counts = self._devices().get(project.name, Counter[str]())
        devices = sum(counts.values())
        room = f"{size_of(project.partition_size)} ({project.partition_size:,} bytes)"
        rows: list[tuple[object, object]] = [
            ("Devices get", a(newest, _path(project.name, newest)) if newest else None),
            ("Devices", a(f"{devices:,}", url("/admin/devices", project=project.name))),
            ("Also called", join(*(badge(each) for each in project.aliases), between=" ")),
            ("For", ", ".join(project.chips)),
            ("Room for a sketch", room * bool(project.partition_size)),
            ("Admits", _admits(call, project)),
        ]
        warning = note(why, kind="warn") if why else None
        return card("", warning, facts(row for row in rows if row[1]))

    def _releases(self, call: Call, project: Project) -> Html:
        entries = self._stock.entries(project.name, call.asked("after"), MAX_ROWS)
        counts = self._devices().get(project.name, Counter[str]())
        newest, _ = offered(self._stock, project.name)
        groups = [[*each] for _, each in groupby(entries, lambda each: each.release.version)]
        rows = [self._release_row(project.name, each, counts, newest) for each in groups]
        heads = "Version", "For", "Size", "Devices", "Since", "By", "Notes"
        more = len(entries) == MAX_ROWS
        here = url(PROJECTS, project.name)
        following = url(PROJECTS, project.name, after=entries[-1].cursor) if more else ""
        pages = pager(here if call.asked("after") else "", following)
        empty = "No release yet: upload one."
        return card("Releases", table(heads, rows, f"Releases of {project.name}", empty),
                    pages if more or call.asked("after") else None)  # fmt: skip

    def _release_row(
        self, project: str, images: Sequence[Stocked], counts: Mapping[str, int], newest: str
    ) -> tuple[object, ...]:
        first = images[0]
        release, now = first.release, self.operations.now()
        devices = counts.get(str(release.version), 0)
        whose = url("/admin/devices", project=project, version=str(release.version))
        lines_of_notes = release.notes.strip().splitlines() or [""]
        return (
            join(a(_called(release.version), _path(project, str(release.version))), " ",
                 _badges(images, newest)),
            tag("span", ", ".join(dict.fromkeys(map(_what, images)))),
            ", ".join(dict.fromkeys(size_of(each.release.size) for each in images)),
            a(f"{devices:,}", whose) if devices else "",
            when(first.uploaded, now),
            first.who or badge("folder"),
            _cut(lines_of_notes[0]),
        )  # fmt: skip

    def _seeds(self, project: Project) -> tuple[str, set[str]]:
        """A version that a sketch may say it is, and the chips that are meant."""
        newest, _ = offered(self._stock, project.name)
        images = self._images(project.name)
        return newest or "1.0.0", {*project.chips, *(each.release.facts.chip for each in images)}

    def _name_and_end(self, call: Call, project: Project) -> Html:
        here, csrf = url(PROJECTS, project.name), call.actor.csrf
        renaming = form(
            here, csrf,
            field("New name", "name", call.given("name"), **_NAME,
                  hint=f"{project.name} keeps answering, as an alias."),
            button("Rename", name="do", value="rename"),
        )  # fmt: skip
        versions = {str(each.release.version) for each in self._images(project.name)}
        devices = sum(self._devices().get(project.name, Counter()).values())
        words = (
            f"Deletes the project with its {len(versions)} releases; {devices:,} devices ask for it. "
            "Nobody can bring it back."
        )
        ending = form(
            here, csrf,
            field("Type the name of the project", "sure", hint=words, **_NAME),
            button("Delete the project", "danger", name="do", value="delete"),
        )  # fmt: skip
        end = card("Delete", ending) if may(call.actor, "admin") else None
        return cards(card("Rename", renaming), end)

    def change_project(self, call: Call) -> See:
        """POST a project."""
        project = self._project(call)
        acts: Mapping[str, Callable[[Call, Project], See]] = {
            "save": self._save, "rename": self._rename, "delete": self._delete_project,
        }  # fmt: skip
        return _act(acts, call)(call, project)

    def _save(self, call: Call, project: Project) -> See:
        settings = {
            "aliases": [*dict.fromkeys(re.findall(r"[^\s,]+", call.given("aliases")))],
            "chips": [*call.all_given("chips")],
            "partition_size": _bytes(call.given("partition_size")),
            "admit": call.given("admit"),
        }
        self.operations.put_project(_asked(call, {"project": project.name}, settings))
        return See(url(PROJECTS, project.name), "The settings are saved.")

    def _rename(self, call: Call, project: Project) -> See:
        new, at = call.given("name").strip(), int(self.operations.now())
        rename(self._stock, self.operations.ledger, project.name, new, call.actor.name, at)
        return See(
            url(PROJECTS, new), f"{project.name} is {new} now; the old name keeps answering."
        )

    def _delete_project(self, call: Call, project: Project) -> See:
        allow(call.actor, "admin")
        if call.given("sure") != project.name:
            raise Refused(422, f"type {project.name} to say that you are sure")
        images = [*self._stock.images(project.name)]
        if any(each.source == "folder" for each in images):
            raise Refused(409, "it has files in the firmware folder: remove them there first")
        for version in sorted({str(each.release.version) for each in images}):
            path = {"project": project.name, "version": version}
            self.operations.delete_release(_asked(call, path))
        self.operations.drop_project(_asked(call, {"project": project.name}))
        return See(PROJECTS, f"The project {project.name} is deleted.")

    # -- One release

    def show_release(self, call: Call) -> Sheet:
        """GET a version."""
        project, version, images = self._version(call)
        newest, _ = offered(self._stock, project)
        state = _badges(images, newest)
        back = tag("p", a(project, url(PROJECTS, project)), " ", state)
        now = self.operations.now()
        changes = may(call.actor, "publisher")
        return page(
            f"{project} {_called(version)}",
            back,
            *(note("Withdrawn: ", each, kind="bad") for each in _reasons(images)),
            cards(_image(project, each, now) for each in images),
            self._notes(call, images),
            card("Lines to copy", *(_copied(each) for image in images for each in
                                    lines.of_image(base_url(call.request), project,
                                                   image.release.name))),
            self._needs(call, project, version),
            self._ends(call, images) if changes else None,
        )  # fmt: skip

    def _version(self, call: Call) -> tuple[str, Version, list[Stocked]]:
        """Project, version and its images. Refused: 404."""
        project = self._project(call).name
        try:
            version = Version.parse(call.names["version"])
        except ValueError as err:
            raise Refused(404, str(err)) from err
        found = [each for each in self._stock.images(project) if each.release.version == version]
        if not found:
            raise Refused(404, f"there is no {version} of {shown(project)}")
        return project, version, sorted(found, key=Stocked.place)

    def _notes(self, call: Call, images: Sequence[Stocked]) -> Html | None:
        texts = [*dict.fromkeys(each.release.notes for each in images if each.release.notes)]
        if not may(call.actor, "publisher") or not any(each.who for each in images):
            return card("Notes", *(tag("pre", text) for text in texts)) if texts else None
        text = call.given("notes", texts[0] if texts else "")
        editor = form(
            call.request.path, call.actor.csrf,
            area("What is new", "notes", text, maxlength=MAX_LONG,
                 hint="ESPHome and Home Assistant show the first 255 characters."),
            button("Save the notes", name="do", value="notes"),
        )  # fmt: skip
        return card("Notes", editor)

    def _needs(self, call: Call, project: str, version: Version) -> Html:
        found = needing(self._stock, self.operations.ledger, project, version)
        if not found:
            return card("Who needs it", tag("p", "No device runs it or is pinned to it.",
                                            class_="empty"))  # fmt: skip
        rows = [
            (a(each.device, url("/admin/devices", each.device)),
             join(badge("runs it") if each.runs else None, " ",
                  badge("is pinned to it", "warn") if each.pinned else None))
            for each in found[:MAX_NEEDS]
        ]  # fmt: skip
        pinned = sum(each.pinned for each in found)
        words = f"{len(found):,} devices run it or are pinned to it; {pinned:,} are pinned."
        rest = url("/admin/devices", project=project, version=str(version))
        more = tag("p", a("All that run it", rest)) if len(found) > MAX_NEEDS else None
        return card("Who needs it", tag("p", words),
                    table(("Device", "Why"), rows, "Devices that need it"), more)  # fmt: skip

    def _ends(self, call: Call, images: Sequence[Stocked]) -> Html:
        here, csrf = call.request.path, call.actor.csrf
        if all(each.withdrawn is not None for each in images):
            words = "Devices may get it again."
            first = card("Restore", tag("p", words),
                         form(here, csrf, button("Restore", "main", name="do", value="restore")))  # fmt: skip
        else:
            words = "No device gets it any more. Who runs it keeps it, and gets the next one."
            first = card("Withdraw", tag("p", words), form(
                here, csrf,
                field("Why", "reason", call.given("reason"), maxlength=MAX_LONG),
                button("Withdraw", "danger", name="do", value="withdraw"),
            ))  # fmt: skip
        if not may(call.actor, "admin") or not any(each.who for each in images):
            return cards(first)
        sure = check("Yes, nobody can bring it back", "sure", required=True)
        last = form(here, csrf, sure, button("Delete", "danger", name="do", value="delete"))
        return cards(first, card("Delete", tag("p", "Deletes its files from the disk."), last))

    def change_release(self, call: Call) -> See:
        """POST a version."""
        project, version, _ = self._version(call)
        names = {"project": project, "version": str(version)}
        what = f"{project} {_called(version)}"
        do = call.given("do")
        if do == "delete":
            allow(call.actor, "admin")
            if not call.given("sure"):
                raise Refused(422, "tick the box to say that you are sure")
            self.operations.delete_release(_asked(call, names))
            return See(url(PROJECTS, project), f"{what} is deleted.")
        changes: Mapping[str, tuple[dict[str, object], str]] = {
            "notes": ({"notes": _text(call.given("notes"))}, "The notes are saved."),
            "withdraw": ({"withdrawn": True, "reason": call.given("reason")},
                         f"{what} is withdrawn."),
            "restore": ({"withdrawn": False}, f"{what} is offered again."),
        }  # fmt: skip
        body, said = _act(changes, call)
        self.operations.change_release(_asked(call, names, body))
        return See(_path(project, str(version)), said)

    def download(self, call: Call) -> Reply:
        """GET an image, also one that no device gets."""
        _, version, images = self._version(call)
        for each in images:
            if each.release.name == call.names["name"] and not each.flaw:
                image = self._stock.open(each.release)
                reply = None
                try:
                    reply = image_reply(call.request, each.release, image, "no-store")
                finally:
                    if reply is None or reply.body is not image:
                        image.file.close()
                return reply
        raise Refused(404, f"{version} has no file {shown(call.names['name'])}")


# -- Parts -----------------------------------------------------------------------------------------


def _lines_card(call: Call, project: str, version: str, chips: set[str]) -> Html:
    """What to paste into a sketch, a configuration or a shell."""
    base = base_url(call.request)
    small = [lines.of_sketch(base, project, version, small=True)] * ("esp8266" in chips)
    large = [lines.of_sketch(base, project, version, small=False)] * (chips != {"esp8266"})
    groups = lines.of_project(base, project, version)
    return card(
        "Lines to copy",
        *(_copied(each) for each in (*small, *large)),
        *(details(heading, *map(_copied, found)) for heading, found in groups.items()),
    )


def _copied(each: lines.Lines) -> Html:
    return join(tag("h3", each.title), copied(each.text, each.title))


def _settings(call: Call, project: Project) -> Html:
    again = call.given("do") == "save"
    chips = call.all_given("chips") if again else project.chips
    usual = f"as --admit says: {call.site.config.admit}"
    options = [("", usual), ("open", "everybody"), ("whitelist", "only devices that are admitted")]
    boxes = [check(chip, "chips", chip, checked=chip in chips) for chip in CHIPS]
    size = str(project.partition_size or "")
    body = form(
        url(PROJECTS, project.name), call.actor.csrf,
        field("Also called", "aliases", call.given("aliases", " ".join(project.aliases)),
              hint="Other names that devices or images use, with spaces between.",
              spellcheck="false"),
        field("Room for a sketch", "partition_size", call.given("partition_size", size),
              hint="Bytes of the partition, also as 0x140000 or 1280K; empty: not known.",
              spellcheck="false"),
        choice("Who gets its images", "admit", options, call.given("admit", project.admit)),
        tag("fieldset", tag("legend", "Chips it is for"), *boxes,
            tag("small", "None: those of its earlier images.")),
        button("Save", "main", name="do", value="save"),
    )  # fmt: skip
    return card("Settings", body)


def _image(project: str, stocked: Stocked, now: float) -> Html:
    """What is known of one image."""
    release = stocked.release
    source = f"uploaded by {stocked.who}" if stocked.who else "in the firmware folder"
    rows: list[tuple[object, object]] = [
        ("Since", join(when(stocked.uploaded, now), ", ", source)),
        ("File", code(release.name)),
    ]
    if stocked.flaw:
        known = facts([*rows, ("SHA-256", code(release.facts.sha256))])
        return card(_what(stocked), note(f"{release.name} {stocked.flaw}", kind="bad"), known)
    try:
        about = described(release.path, release.name)
    except FileNotFoundError:
        return card(_what(stocked), note(f"{release.name} is gone from the disk", kind="bad"))
    there = url(_path(project, str(release.version)), release.name)
    get = a("Download", there, class_="button", download=True) if is_text(release.name) else None
    return card(_what(stocked), facts([*rows, *inside(about)]), get)


def _badges(images: Sequence[Stocked], newest: str) -> Html:
    version = images[0].release.version
    withdrawn = sum(each.withdrawn is not None for each in images)
    early = version.prerelease and version != UNVERSIONED
    partly = "withdrawn" if withdrawn == len(images) else "partly withdrawn"
    found = (
        badge("newest", "good") if str(version) == newest else None,
        badge("pre-release") if early else None,
        badge(partly, "bad") if withdrawn else None,
        badge("damaged", "bad") if any(each.flaw for each in images) else None,
    )
    return join(*filter(None, found), between=" ")


def _reasons(images: Sequence[Stocked]) -> list[str]:
    reasons = (each.withdrawn for each in images if each.withdrawn is not None)
    return [*dict.fromkeys(each or "nobody said why" for each in reasons)]


def _what(stocked: Stocked) -> str:
    """What an image is for: esp8266, esp32 littlefs..."""
    release = stocked.release
    words = (
        release.facts.chip,
        release.kind * (release.kind != "sketch"),
        "gzip" * (release.facts.packed),
    )
    return " ".join(filter(None, words)) or "any chip"


def _admits(call: Call, project: Project) -> Html:
    open_ = (project.admit or call.site.config.admit.lower()) == "open"
    return badge("everybody") if open_ else badge("whitelist", "warn")


def _called(version: Version) -> str:
    return "without a version" if version == UNVERSIONED else str(version)


def _path(project: str, version: str) -> str:
    return url(PROJECTS, project, "releases", version)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIRST else f"{text[: MAX_FIRST - 1]}…"


# -- What forms say --------------------------------------------------------------------------------


def _asked(call: Call, names: Mapping[str, str], body: Mapping[str, object] | None = None) -> Asked:
    """The same as the API's operations are asked it."""
    return Asked(call.site, call.request, call.actor, names, {}, body or {})


T = TypeVar("T")


def _act(acts: Mapping[str, T], call: Call) -> T:
    """What the button that was pressed stands for. Refused: 422, nothing."""
    if call.given("do") not in acts:
        raise Refused(422, "the form does not say what to do")
    return acts[call.given("do")]


def _text(text: str) -> str:
    """As it was typed: a form has line ends of its own."""
    return text.replace("\r\n", "\n")


def _bytes(text: str) -> int:
    """A size as people and partitions.csv write it; "": 0. Refused: 422, it is none."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,16})([kKmM]?)", text.strip())
    if match is None:
        if not text.strip():
            return 0
        raise Refused(422, f"{shown(text)} is no number of bytes such as 1310720 or 0x140000")
    return int(match[1], 16 if match[1][:2] in {"0x", "0X"} else 10) * _UNITS[match[2].lower()]
