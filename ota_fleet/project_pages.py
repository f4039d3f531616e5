"""Pages about projects: which there are, what their devices get, and their settings.

    GET  -> Stock, History, lines.py -> Sheet
    POST -> Operations, as the API has them; rename() -> See

An alias leads to the page of its project.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ota_fleet import lines
from ota_fleet.accounts import allow
from ota_fleet.api import is_text
from ota_fleet.assignments import Assignments
from ota_fleet.history import History
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    badge,
    button,
    card,
    cards,
    check,
    choice,
    count,
    details,
    facts,
    field,
    form,
    hidden,
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
from ota_fleet.operations import Operations
from ota_fleet.outcomes import ROLLOUTS
from ota_fleet.pages import Call, Page, See, act_of, asked, may
from ota_fleet.policy_forms import absent_note
from ota_fleet.project_policy_pages import policy_path, policy_summary
from ota_fleet.projects import absent, chips_of, offered, rename
from ota_fleet.release_pages import (
    PROJECT,
    PROJECTS,
    badges,
    called,
    copied_lines,
    project_of,
    release_path,
    what_of,
)
from ota_fleet.rows import CHIPS, Project, Stocked
from ota_fleet.stock import Stock
from ota_fleet.upload_pages import upload_form
from ota_server import Refused, base_url, shown

MAX_ROWS = 100  # images in one list of releases
MAX_FIRST = 80  # characters of notes in a list
_NAME = {"required": True, "maxlength": 64, "autocomplete": "off", "spellcheck": "false"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}  # as partitions.csv of ESP-IDF has them


@dataclass(frozen=True, slots=True)
class ProjectPages:
    """The pages, and what they work on."""

    operations: Operations
    history: History
    assignments: Assignments

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(PROJECTS, "viewer", self.show_projects, self.make_project, link="Projects"),
            Page(PROJECT, "viewer", self.show_project, self.change_project),
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
        newest, _ = offered(self._stock, name)
        devices = sum(counts.values())
        releases = [each.release for each in self._images(name)]
        chips = sorted({each.facts.chip for each in releases})
        return (
            a(name, url(PROJECTS, name)) if is_text(name) else name,
            a(newest, release_path(name, newest)) if newest else badge("none", "warn"),
            len({each.version for each in releases}),
            a(f"{devices:,}", url("/admin/devices", project=name)) if devices else 0,
            f"{100 * counts.get(newest, 0) // devices} %" if newest and devices else "",
            ", ".join(project.chips or chips),
            self._admits(call, name),
        )

    def _admits(self, call: Call, project: str) -> Html:
        is_open = self._stock.is_open(project, call.site.config.admit)
        return badge("everybody") if is_open else badge("whitelist", "warn")

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
        self.operations.put_project(asked(call, {"project": name}))
        return See(url(PROJECTS, name), f"The project {name} is made.")

    # -- One project

    def show_project(self, call: Call) -> Sheet | See:
        """GET a project, by its name; an alias leads there."""
        project = project_of(self._stock, call)
        if project.name != call.names["project"] and call.request.method != "POST":
            return See(url(PROJECTS, project.name))
        changes = may(call.actor, "publisher")
        counts = self._devices().get(project.name, Counter[str]())
        return page(
            project.name,
            self._summary(call, project, counts),
            self._policy(project.name),
            self._releases(call, project, counts),
            card("Upload", upload_form(call.actor.csrf)) if changes else None,
            _lines_card(call, project.name, *self._seeds(project)),
            _settings(call, project) if changes else None,
            self._name_and_end(call, project, sum(counts.values())) if changes else None,
        )

    def _summary(self, call: Call, project: Project, counts: Mapping[str, int]) -> Html:
        newest, why = offered(self._stock, project.name)
        devices = sum(counts.values())
        room = f"{size_of(project.partition_size)} ({project.partition_size:,} bytes)"
        rows: list[tuple[object, object]] = [
            ("Devices get", a(newest, release_path(project.name, newest)) if newest else None),
            ("Devices", a(f"{devices:,}", url("/admin/devices", project=project.name))),
            ("Also called", join(*(badge(each) for each in project.aliases), between=" ")),
            ("For", ", ".join(project.chips)),
            ("Room for a sketch", room * bool(project.partition_size)),
            ("Admits", self._admits(call, project.name)),
        ]
        warning = note(why, kind="warn") if why else None
        return card("", warning, facts(row for row in rows if row[1]))

    def _policy(self, project: str) -> Html:
        own = self.assignments.own("project", project)
        more = join(a("In detail", policy_path(project)), " · ",
                    a("Rollouts", url(ROLLOUTS, project=project)))  # fmt: skip
        lacks = absent_note(project, absent(self._stock, project, own.floors))
        return card("Who gets it when", policy_summary(own), lacks, tag("p", more))

    def _releases(self, call: Call, project: Project, counts: Mapping[str, int]) -> Html:
        entries = self._stock.entries(project.name, call.asked("after"), MAX_ROWS)
        newest, _ = offered(self._stock, project.name)
        groups = [[*each] for _, each in groupby(entries, lambda each: each.release.version)]
        rows = [self._release_row(project.name, each, counts, newest) for each in groups]
        heads = "Version", "For", "Size", "Devices", "Published", "Notes"
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
            join(a(called(release.version), release_path(project, str(release.version))), " ",
                 badges(images, newest, self.assignments.channel(release))),
            tag("span", ", ".join(dict.fromkeys(map(what_of, images)))),
            ", ".join(dict.fromkeys(size_of(each.release.size) for each in images)),
            a(f"{devices:,}", whose) if devices else "",
            join(when(first.uploaded, now), f" by {first.who}" if first.who else ", in the folder"),
            _cut(lines_of_notes[0]),
        )  # fmt: skip

    def _seeds(self, project: Project) -> tuple[str, set[str]]:
        """A version that a sketch may say it is, and the chips that are meant."""
        newest, _ = offered(self._stock, project.name)
        return newest or "1.0.0", chips_of(self._stock, project.name)

    def _name_and_end(self, call: Call, project: Project, devices: int) -> Html:
        here, csrf = url(PROJECTS, project.name), call.actor.csrf
        renaming = form(
            here, csrf,
            field("New name", "name", call.given("name"), **_NAME,
                  hint=f"{project.name} keeps answering, as an alias."),
            button("Rename", name="do", value="rename"),
        )  # fmt: skip
        versions = {str(each.release.version) for each in self._images(project.name)}
        words = (
            f"Deletes the project with {count(len(versions), 'release')}, for which "
            f"{count(devices, 'device')} ask. Nobody can bring it back."
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
        project = project_of(self._stock, call)
        acts: Mapping[str, Callable[[Call, Project], See]] = {
            "save": self._save, "rename": self._rename, "delete": self._delete_project,
        }  # fmt: skip
        return act_of(acts, call)(call, project)

    def _save(self, call: Call, project: Project) -> See:
        settings = {
            "aliases": [*dict.fromkeys(re.findall(r"[^\s,]+", call.given("aliases")))],
            "chips": [*call.all_given("chips")],
            "partition_size": _bytes(call.given("partition_size")),
            "admit": call.given("admit"),
        }
        with self.operations.registry.writing():
            if _is_stale(call, project_of(self._stock, call)):
                raise Refused(409, "somebody changed the settings since: see what they are now")
            self.operations.put_project(asked(call, {"project": project.name}, settings))
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
            self.operations.delete_release(asked(call, path))
        self.operations.drop_project(asked(call, {"project": project.name}))
        return See(PROJECTS, f"The project {project.name} is deleted.")


# -- Parts -----------------------------------------------------------------------------------------


def _lines_card(call: Call, project: str, version: str, chips: set[str]) -> Html:
    """What to paste into a sketch, a configuration or a shell."""
    base = base_url(call.request)
    groups = lines.of_project(base, project, version)
    return card(
        "Lines to copy",
        *map(copied_lines, lines.of_sketches(base, project, version, chips)),
        *(details(heading, *map(copied_lines, found)) for heading, found in groups.items()),
    )


def _seen(project: Project) -> str:
    """The settings, as the form that shows them sends them back."""
    return repr((project.aliases, project.chips, project.partition_size, project.admit))


def _is_stale(call: Call, project: Project) -> bool:
    """Whether a form shows settings that are others by now."""
    return call.given("seen", _seen(project)) != _seen(project)


def _settings(call: Call, project: Project) -> Html:
    if _is_stale(call, project):
        call = call._replace(form={})  # what was filled in would take back what the other did
    again = call.given("do") == "save"
    chips = call.all_given("chips") if again else project.chips
    usual = f"as --admit says: {call.site.config.admit.lower()}"
    options = [("", usual), ("open", "everybody"), ("whitelist", "only devices that are admitted")]
    boxes = [check(chip, "chips", chip, checked=chip in chips) for chip in CHIPS]
    size = str(project.partition_size or "")
    body = form(
        url(PROJECTS, project.name), call.actor.csrf, hidden(seen=_seen(project)),
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


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIRST else f"{text[: MAX_FIRST - 1]}…"


def _bytes(text: str) -> int:
    """A size as people and partitions.csv write it; "": 0. Refused: 422, it is none."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,16})([kKmM]?)", text.strip())
    if match is None:
        if not text.strip():
            return 0
        raise Refused(422, f"{shown(text)} is no number of bytes such as 1310720 or 0x140000")
    return int(match[1], 16 if match[1][:2] in {"0x", "0X"} else 10) * _UNITS[match[2].lower()]
