"""The page of admissions: who may have a project's images, and lists of them as CSV.

a CSV file, or what is pasted -> Lines -> what it would do, as a form -> it is done
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ota_fleet.api import read_cursor, write_cursor
from ota_fleet.device_lists import Line, read_lines
from ota_fleet.html import (
    KEEP,
    Html,
    Sheet,
    a,
    area,
    asking,
    badge,
    button,
    card,
    choice,
    code,
    field,
    figures,
    form,
    hidden,
    note,
    page,
    pager,
    table,
    tag,
    url,
    when,
)
from ota_fleet.ledger import Ledger
from ota_fleet.pages import Call, Page, See, act_of, may
from ota_fleet.rows import normal_id
from ota_fleet.stock import Stock
from ota_server import Refused, shown

DEVICES, ADMISSIONS = "/admin/devices", "/admin/admissions"
ROWS = 50  # of a page
SHOWN = 200  # lines of a list that are shown before it is taken
MAX_CSV = 2_000_000  # bytes of a file

Plan = Mapping[str, Sequence[str]]  # devices by project


@dataclass(frozen=True, slots=True)
class AdmissionPages:
    """The page, and what it works on."""

    ledger: Ledger
    stock: Stock
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        return (Page(ADMISSIONS, "viewer", self.show, self.act, most=MAX_CSV),)

    # -- Who is admitted

    def show(self, call: Call) -> Sheet:
        """GET admissions."""
        names = self.stock.projects()
        project = call.asked("project") or call.given("project") or next(iter(names), "")
        if not project:
            return page("Admissions", card("", tag("p", "There is no project yet.")))
        if self.stock.project(project) is None:
            raise Refused(404, f"there is no project {shown(project)}")
        return page(
            "Admissions",
            card("", self._policy(call, project), self._which(project)),
            card("", self._listed(call, project)),
            self._forms(call, project) if may(call.actor, "publisher") else None,
        )

    def _which(self, project: str) -> Html:
        return asking(ADMISSIONS, choice("Project", "project", self.stock.projects(), project))

    def _policy(self, call: Call, project: str) -> Html:
        """Whether admissions count."""
        if self.stock.is_open(project, call.site.config.admit):
            words = " is open: every device gets its images, admitted or not."
            return note(tag("b", project), words)
        return note("Only these devices get images of ", tag("b", project), ".")

    def _listed(self, call: Call, project: str) -> Html:
        (after,) = read_cursor(call.asked("cursor"), str) or [""]
        found = self.ledger.registry.admissions(project, after, ROWS + 1)
        changes = may(call.actor, "publisher")
        rows = [self._row(each, changes=changes) for each in found[:ROWS]]
        heads = "Device", "Runs", "Last seen", "Notes"
        inner = table(("", *heads) if changes else heads, rows, "Admissions", "Nobody is admitted.")
        more = write_cursor([found[ROWS - 1]]) if len(found) > ROWS else ""
        pages = pager(url(ADMISSIONS, project=project) if after else "",
                      url(ADMISSIONS, project=project, cursor=more) if more else "")  # fmt: skip
        if not (changes and rows):
            return tag("div", inner, pages)
        every = tag("input", type="checkbox", data_all="device", hidden=True,
                    aria_label="Select all of this page")  # fmt: skip
        tools = tag("div", every, button("Take back", name="do", value="expel"), class_="tools")
        here = url(ADMISSIONS, project=project, cursor=call.asked("cursor"))
        return tag("div", form(here, call.actor.csrf, hidden(project=project), tools, inner), pages)

    def _row(self, device: str, *, changes: bool) -> list[object]:
        known = self.ledger.registry.device(device)
        box = tag("input", type="checkbox", name="device", value=device,
                  aria_label=f"Select {device}")  # fmt: skip
        cells: list[object] = (
            [a(device, url(DEVICES, device)), known.version, when(known.last_seen, self.now()),
             known.notes[:80]]
            if known
            else [device, "", badge("never seen"), ""]
        )  # fmt: skip
        return [box, *cells] if changes else cells

    def _forms(self, call: Call, project: str) -> Html:
        names = [
            ("", "as the column project says"),
            *((each, each) for each in self.stock.projects()),
        ]
        where = choice("Project", "project", names, call.given("project", project))
        words = (
            "One MAC address a line; or CSV whose first line names its columns, of which ",
            code("device"), " (or ", code("mac"), "), ", code("project"), " and ", code("admitted"),
            " count. What it would do is shown first.",
        )  # fmt: skip
        look = button("Look at it", "main", name="do", value="look")
        return card(
            "Admit devices",
            tag("p", *words),
            form(ADMISSIONS, call.actor.csrf, area("MAC addresses", "text", call.given("text")),
                 where, look),
            form(ADMISSIONS, call.actor.csrf,
                 field("CSV file", "file", type="file", accept=".csv,.txt,text/csv", required=True),
                 where, look, enctype="multipart/form-data"),
        )  # fmt: skip

    # -- What is changed

    def act(self, call: Call) -> See | Sheet:
        """POST admissions: a list is looked at, then taken; or devices are expelled."""
        acts: Mapping[str, Callable[[Call], See | Sheet]] = {
            "look": self._look, "admit": self._admit, "expel": self._expel,
        }  # fmt: skip
        return act_of(acts, call)(call)

    def _look(self, call: Call) -> Sheet:
        """What a list would do. Refused: 413, 422."""
        lines = read_lines(_text(call), call.given("project"))
        if not lines:
            raise Refused(422, "there is no MAC address in it")
        lines = [*map(self._checked, lines)]
        new: dict[str, list[str]] = defaultdict(list)
        admitted = self.ledger.registry.admitted
        for each in dict.fromkeys(line._replace(number=0) for line in lines if not line.flaw):
            if each.device not in admitted(each.project):
                new[each.project].append(each.device)
        flawed = [each for each in lines if each.flaw]
        count = sum(map(len, new.values()))
        before = len(lines) - len(flawed) - count
        names = "To admit", "Not taken", "Admitted already, or twice"
        counts = figures(zip(names, (count, len(flawed), before), strict=True))
        return page(
            "Admit these devices?",
            card("", counts, self._confirm(call, new, count)),
            _flaws(flawed),
            self._wanted(new) if count else None,
        )._replace(keep=KEEP)

    def _checked(self, line: Line) -> Line:
        """The line, with its project's own name."""
        if line.flaw:
            return line
        project = self.stock.resolve(line.project)
        if not project:
            return line._replace(flaw="no project is said: choose one")
        if self.stock.project(project) is None:
            return line._replace(flaw=f"there is no project {shown(line.project)}")
        return line._replace(project=project)

    def _confirm(self, call: Call, new: Plan, count: int) -> Html:
        back = a("Back", ADMISSIONS)
        if not count:
            return tag("p", "There is nobody to admit. ", back)
        # Without the colons, each of which is three characters in a form
        plans = [hidden(plan=" ".join([project, *(each.replace(":", "") for each in devices)]))
                 for project, devices in new.items()]  # fmt: skip
        text = f"Admit {count:,}"
        return form(ADMISSIONS, call.actor.csrf, plans,
                    button(text, "main", name="do", value="admit"), back)  # fmt: skip

    def _wanted(self, new: Plan) -> Html:
        pairs = [(device, project) for project, devices in new.items() for device in devices]
        rows = [(device, project, badge("known" if self.ledger.registry.device(device)
                                        else "never seen"))
                for device, project in pairs[:SHOWN]]  # fmt: skip
        more = f"And {len(pairs) - SHOWN:,} more." if len(pairs) > SHOWN else None
        inner = table(("Device", "Project", "State"), rows, "Devices to admit")
        return card("To admit", inner, tag("p", more) if more else None)

    def _admit(self, call: Call) -> See:
        """Does what was shown; that it came back unchanged is not believed."""
        count, project = 0, ""
        with self.ledger.recording(call.actor.name, "admit device", int(self.now())) as (_, what):
            for project, devices in self._plans(call):
                for device in devices:
                    if self.ledger.registry.admit(project, device):
                        what.append(f"{device} to {project}")
            count = len(what)
        return See(url(ADMISSIONS, project=project), f"Admitted: {count:,}.")

    def _plans(self, call: Call) -> Iterator[tuple[str, Sequence[str]]]:
        for plan in call.all_given("plan"):
            project, *devices = plan.split(" ")
            lines = [self._checked(each) for each in read_lines("\n".join(devices), project)]
            if flaw := next((each.flaw for each in lines if each.flaw), ""):
                raise Refused(422, flaw)
            yield project, [each.device for each in lines]

    def _expel(self, call: Call) -> See:
        project, chosen = self.stock.resolve(call.given("project")), call.all_given("device")
        if not chosen:
            raise Refused(422, "tick the devices that are meant")
        with self.ledger.recording(call.actor.name, "expel device", int(self.now())) as (_, what):
            what.extend(f"{normal_id(each)} from {project}" for each in dict.fromkeys(chosen)
                        if self.ledger.registry.expel(project, each))  # fmt: skip
        return See(url(ADMISSIONS, project=project), f"Not admitted any more: {len(what):,}.")


def _flaws(flawed: Sequence[Line]) -> Html | None:
    if not flawed:
        return None
    rows = [(each.number, each.device, each.flaw) for each in flawed[:SHOWN]]
    more = f"And {len(flawed) - SHOWN:,} more." if len(flawed) > SHOWN else None
    inner = table(("Line", "Text", "Why not"), rows, "Lines that are not taken")
    return card("Not taken", inner, tag("p", more) if more else None)


def _text(call: Call) -> str:
    """What was pasted, or is in the file."""
    for part in call.files:
        if part.name == "file":
            body = call.request.body
            assert body is not None  # as it had parts
            body.seek(part.start)
            return body.read(part.size).decode("utf-8-sig", "replace")
    return call.given("text")
