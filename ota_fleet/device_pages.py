"""The pages of devices: all of them, as far as somebody looks for them, and each by itself.

    ?q&project&state... -> Search -> a page of the table, or all of it as CSV
    a device -> what is known, what it will get and why not more, what was decided, what to change

Each change is told by the audit, in the same transaction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

from ota_fleet.api import file_reply, write_cursor
from ota_fleet.device_lists import (
    COLUMNS,
    DEVICES,
    SILENT,
    STATE_NAMES,
    asked,
    cells_of,
    counted,
    csv_line,
    heads_of,
    label_line,
    newest_first,
    place_of,
    search_of,
)
from ota_fleet.device_updates import DeviceUpdates
from ota_fleet.group_pages import GROUPS, group_path
from ota_fleet.history import DAY, MONTH, History, Visit
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
    cards,
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
    pager,
    size_of,
    table,
    tag,
    url,
    when,
)
from ota_fleet.ledger import Ledger
from ota_fleet.outlook import Outlook, outlook_of, verdict
from ota_fleet.pages import Call, Page, See, act_of, may, typed
from ota_fleet.registry import MAX_PAGE, Device, Search
from ota_fleet.rows import MAX_LONG, MAX_TEXT
from ota_fleet.stock import Stock
from ota_server import Refused, Reply, Site, shown

EXPORT, ADMISSIONS, ACTIVITY = (
    f"/admin/{name}" for name in ("devices.csv", "admissions", "activity")
)
ROWS = 50  # of a page
FAILING = 3  # times that a device was given what it does not run
DONE = {
    "group": "in the group",
    "admit": "admitted",
    "expel": "not admitted any more",
    "label": "labelled",
    "unlabel": "without the label",
    "forget": "forgotten",
}
BULK = join(  # the first is what Enter in the field does
    button(text, "danger" if do == "forget" else "", name="do", value=do)
    for text, do in (("Add label", "label"), ("Remove label", "unlabel"),
                     ("Set group", "group"), ("Admit", "admit"), ("Expel", "expel"),
                     ("Forget", "forget"))
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DevicePages:
    """The pages, and what they work on."""

    ledger: Ledger
    stock: Stock
    history: History
    updates: DeviceUpdates
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(DEVICES, "viewer", self.show_devices, self.change_devices, link="Devices"),
            Page(EXPORT, "viewer", self.export),
            Page(f"{DEVICES}/{{device}}", "viewer", self.show_device, self.change_device),
        )

    # -- All devices

    def show_devices(self, call: Call) -> Sheet:
        """GET devices."""
        words, now = asked(call), int(self.now())
        search = search_of(words, now)
        registry = self.ledger.registry
        found = registry.devices(search, place_of(call, search), ROWS + 1)
        count = registry.count(search)
        rows = [self._row(call, each, now) for each in found[:ROWS]]
        more = write_cursor(search.place(found[ROWS - 1])) if len(found) > ROWS else ""
        again = url(DEVICES, **words) if call.asked("cursor") else ""
        pages = pager(again, url(DEVICES, **words, cursor=more) if more else "", counted(count))
        heads = [*heads_of(words), "State", "Will get"]
        heads = ["", *heads] if may(call.actor, "publisher") else heads
        empty = "No device is like this." if words else "No device has asked yet."
        live = tag("div", table(heads, rows, "Devices", empty), id="devices", class_="live",
                   data_live=15)  # fmt: skip

        body = _bulk(call, words, live) if rows and may(call.actor, "publisher") else live
        return page("Devices", card("", self._filters(words)), card("", body, pages, _ways(words)))

    def _filters(self, words: Mapping[str, str]) -> Html:
        chips, labels = self.ledger.registry.words()
        versions = self.history.versions()
        return asking(
            DEVICES,
            field("Search", "q", words.get("q", ""), type="search",
                  hint="A MAC address, or any part."),
            choice("Project", "project", _any(self.stock.projects(), words.get("project", "")),
                   words.get("project", "")),
            choice("Runs", "version", _any(newest_first(versions), words.get("version", "")),
                   words.get("version", "")),
            choice("Chip", "chip", _any(chips, words.get("chip", "")), words.get("chip", "")),
            choice("State", "state", STATE_NAMES.items(), words.get("state", "")),
            choice("Label", "label", _any(labels, words.get("label", "")), words.get("label", "")),
            choice("Group", "group", _any(self.updates.groups(), words.get("group", "")),
                   words.get("group", "")),
            hidden(sort=words["sort"]) if "sort" in words else None,
            class_="filters",
        )  # fmt: skip

    def _row(self, call: Call, device: Device, now: int) -> list[object]:
        box = tag("input", type="checkbox", name="device", value=device.id,
                  aria_label=f"Select {device.id}")  # fmt: skip
        labels = [a(badge(each), url(DEVICES, label=each)) for each in device.labels]
        outlook = outlook_of(call.site, device)
        cells = [
            join(a(device.id, url(DEVICES, device.id)), labels, between=" "),
            _word(device.project),
            _word(device.version),
            when(device.last_seen, now),
            _word(device.chip),
            join(self._states(call.site, device, now), self._one(call, device), between=" "),
            tag("span", outlook.word, title=outlook.reason),
        ]
        return [box, *cells] if may(call.actor, "publisher") else [*cells]

    def _states(self, site: Site, device: Device, now: int) -> Iterator[Html]:
        """What is not as usual."""
        if self.updates.is_looping(device):
            yield badge("looping", "bad")
        if device.offers >= FAILING and device.last_seen >= now - MONTH:
            yield badge("failing", "bad")
        if device.last_seen < now - DAY:
            yield badge(SILENT, "warn")
        if not device.admitted and self._is_closed(site, device.project):
            yield badge("unknown", "warn")
        if device.pin:
            yield badge(f"pinned {device.pin}")
        if device.channel:
            yield badge(device.channel)
        if device.group:
            yield badge(device.group)

    def _one(self, call: Call, device: Device) -> Html | None:
        """What admits a device at once, where that is what somebody is about."""
        waits = call.asked("state") == "unknown" or self._is_closed(call.site, device.project)
        if device.admitted or not (waits and may(call.actor, "publisher")):
            return None
        label = f"Admit {device.id}"
        return button("Admit", name="admit", value=device.id, aria_label=label)

    def _is_closed(self, site: Site, project: str) -> bool:
        """Whether one must be admitted to a project."""
        return not self.stock.is_open(project, site.config.admit)

    def change_devices(self, call: Call) -> See | Sheet:
        """POST devices: something with all those that are ticked."""
        do, chosen = call.given("do"), list(dict.fromkeys(call.all_given("device")))
        if one := call.given("admit"):
            do, chosen = "admit", [one]
        else:
            act_of(DONE, call)
        found = [each for each in map(self.ledger.registry.device, chosen) if each]
        if not found:
            raise Refused(422, "tick the devices that are meant")
        here = url(DEVICES, **asked(call), cursor=call.asked("cursor"))
        if do == "forget" and not call.given("sure"):
            return _sure(call, here, found)
        done = self._all(call, do, found)
        left = f", {len(found) - done} were so before" if done < len(found) else ""
        return See(here, f"{counted(done)} {DONE[do]}{left}.")

    def _all(self, call: Call, do: str, found: Sequence[Device]) -> int:
        """How many devices were changed; ValueError: there is no such label."""
        if do in {"admit", "expel"}:
            return self._admit(call, found, do)
        if do == "forget":
            return self._forget(call, found)
        label = call.given("with").strip()
        if do == "group":
            return self._group(call, found, label)
        if not label:
            raise ValueError("fill in which label is meant")
        with self._recording(call, "annotate device") as what:
            for each in found:
                before = set(each.labels)
                after = before | {label} if do == "label" else before - {label}
                if after != before and self.ledger.registry.annotate(each.id, labels=after):
                    what.append(told(each, {"labels": sorted(after)}))
            return len(what)

    def _group(self, call: Call, found: Iterable[Device], group: str) -> int:
        """Puts devices into a group; "": into none."""
        with self._recording(call, "annotate device") as what:
            for each in found:
                if group != each.group and self.ledger.registry.annotate(each.id, group=group):
                    what.append(told(each, {"group": group}))
            return len(what)

    def _admit(self, call: Call, found: Iterable[Device], do: str) -> int:
        """Admits to the project that each asks for, or takes that back; how many it changed."""
        registry = self.ledger.registry
        change, word = (registry.admit, "to") if do == "admit" else (registry.expel, "from")
        with self._recording(call, f"{do} device") as what:
            for each in found:
                project = self.stock.resolve(each.project)
                if project and change(project, each.id):
                    what.append(f"{each.id} {word} {project}")
            return len(what)

    def _forget(self, call: Call, found: Iterable[Device]) -> int:
        with self._recording(call, "forget device") as what:
            what.extend(each.id for each in found if self.ledger.registry.forget(each.id))
            return len(what)

    @contextmanager
    def _recording(self, call: Call, action: str) -> Iterator[list[str]]:
        """A transaction, and what the audit says of it."""
        with self.ledger.recording(call.actor.name, action, int(self.now())) as (_, what):
            yield what

    def export(self, call: Call) -> Reply:
        """GET devices.csv: all that the same query finds."""
        search = search_of(asked(call), int(self.now()))
        folder, peer = call.site.config.state, call.request.peer
        kind = "text/csv; charset=utf-8; header=present"
        return file_reply(self._lines(search), folder, "devices.csv", peer, kind)

    def _lines(self, search: Search) -> Iterator[bytes]:
        yield csv_line(COLUMNS)
        after: Sequence[str | int] = ()
        while found := self.ledger.registry.devices(search, after, MAX_PAGE):
            for each in found:
                yield csv_line(cells_of(each))
            after = search.place(found[-1])

    # -- One device

    def show_device(self, call: Call) -> Sheet:
        """GET a device. Refused: 404."""
        device, now = self._device(call), int(self.now())
        states = tag("p", join(self._states(call.site, device, now), between=" "))
        outlook = _told(outlook_of(call.site, device))
        known = card("What it is", states, facts(self._facts(device, now)), id="facts",
                     data_live=10)  # fmt: skip
        offer = card("What it will get", *outlook, id="outlook", data_live=10)
        given = (
            self.updates.approval(call, device, now),
            self.updates.attempts(call, device, now),
            self.updates.why(call.site, device),
        )
        visits = card("What was decided", _visits(self.history.visits(device.id), now),
                      tag("p", a("In the activity", url(ACTIVITY, device=device.id))), id="visits",
                      data_live=10)  # fmt: skip
        if not may(call.actor, "publisher"):
            return page(device.id, cards(offer, known), given, visits)
        changes = self._notes(call, device), self.updates.ways(call, device), _end(call, device)
        return page(device.id, cards(offer, known), given, visits, cards(changes))

    def _facts(self, device: Device, now: int) -> Iterator[tuple[object, object]]:
        own = self.stock.resolve(device.project)
        named = f" (as {device.project})" if own != device.project else ""
        yield (
            "Project",
            join(a(own, url("/admin/projects", own)) if own else "it never said", named),
        )
        yield "Runs", device.version or "it never said"
        yield "Chip", device.chip or "it never said"
        if device.free_space is not None:
            yield "Free for an update", size_of(device.free_space)
        yield "SDK", device.sdk
        yield "Address", device.address
        yield "First seen", when(device.first_seen, now)
        yield "Last seen", when(device.last_seen, now)
        yield "Images given", f"{device.downloads:,}"
        if device.offers >= FAILING:
            given = f"{device.offers} times {device.offered}, and it does not run it"
            yield "Given in a row", given
        yield "Digest", code(device.image) if device.image else "it never said"
        yield "Admitted to", ", ".join(self._admissions(device.id)) or "no project"
        yield "Pinned to", device.pin or "no version"
        yield "Channel", device.channel or "as its group or project has it"
        yield "Group", a(device.group, group_path(device.group)) if device.group else "none"
        yield "Labels", join(map(badge, device.labels), between=" ") if device.labels else "none"
        if device.notes:
            yield "Notes", tag("span", device.notes, class_="text")

    def _admissions(self, device: str) -> list[str]:
        admitted = self.ledger.registry.admitted
        return [each for each in self.stock.projects() if device in admitted(each)]

    def _notes(self, call: Call, device: Device) -> Html:
        notes = area("Notes", "notes", call.given("notes", device.notes), maxlength=MAX_LONG)
        labels = field("Labels", "labels", call.given("labels", label_line(device)),
                       hint="With commas between them.")  # fmt: skip
        save = button("Save", "main", name="do", value="note")
        was = hidden(was_notes=call.given("was_notes", device.notes),
                     was_labels=call.given("was_labels", label_line(device)))  # fmt: skip
        here = url(DEVICES, device.id)
        return card("Notes", form(here, call.actor.csrf, was, notes, labels, save))

    def change_device(self, call: Call) -> See:
        """POST a device. Refused: 404, 422."""
        device, do = self._device(call), call.given("do")
        here = url(DEVICES, device.id)
        if do in {"admit", "expel"}:
            self._admit(call, [device], do)
            return See(here, f"The device is {DONE[do]}.")
        if do == "forget":
            if not call.given("sure"):
                raise Refused(422, "tick the box to say that you are sure")
            self._forget(call, [device])
            return See(DEVICES, f"{device.id} is forgotten.")
        return act_of({"note": self._note, **self.updates.acts()}, call)(call, device)

    def _note(self, call: Call, device: Device) -> See:
        change = _noted(call, device)
        with self._recording(call, "annotate device") as what:
            if change and self.ledger.registry.annotate(device.id, **change):
                what.append(told(device, change))
        return See(url(DEVICES, device.id), "It is saved.")

    def _device(self, call: Call) -> Device:
        """The device of the path. Refused: 404."""
        found = self.ledger.registry.device(call.names["device"])
        if found is None:
            raise Refused(404, f"the device {shown(call.names['device'])} is not known")
        return found


# -- All devices -----------------------------------------------------------------------------------


def _any(words: Iterable[str], chosen: str) -> list[tuple[str, str]]:
    return [("", "any"), *_words([*words, chosen])]


def _word(text: str) -> Html:
    """What is cut rather than broken, where there is no room."""
    return tag("span", text, class_="word", title=text)


def _words(words: Iterable[str]) -> list[tuple[str, str]]:
    """Each once, but for the empty one."""
    return [(each, each) for each in dict.fromkeys(words) if each]


def _ways(words: Mapping[str, str]) -> Html:
    """Where else one can go from a list."""
    export = a("Download these as CSV", url(EXPORT, **words))
    admissions = a("Admissions, and lists of them as CSV", ADMISSIONS)
    return tag("p", join(export, a("Groups", GROUPS), admissions, between=" · "))


def _bulk(call: Call, words: Mapping[str, str], rows: Html) -> Html:
    """The table, with what can be done with all that are ticked."""
    here = url(DEVICES, **words, cursor=call.asked("cursor"))
    every = tag("input", type="checkbox", data_all="device", hidden=True,
                aria_label="Select all of this page")  # fmt: skip
    label = tag("input", type="text", name="with", value=call.given("with"), maxlength=MAX_TEXT,
                placeholder="Label or group",
                aria_label="Label to add or remove, or group to set")  # fmt: skip
    return form(here, call.actor.csrf, tag("div", every, label, BULK, class_="tools"), rows)


def _sure(call: Call, here: str, found: Sequence[Device]) -> Sheet:
    """What is asked before devices are forgotten."""
    ids = [hidden(device=each.id) for each in found]
    names = tag("ul", [tag("li", code(each.id), f" {each.notes[:80]}") for each in found],
                class_="ids")  # fmt: skip
    return page(
        f"Forget {counted(len(found))}?",
        card(
            "",
            tag("p", "Their notes, labels, pins and history go. They come back when they ask "
                "again; their admissions stay."),
            names,
            form(here, call.actor.csrf, ids, hidden(sure=1),
                 button("Forget them", "danger", name="do", value="forget"), a("Back", here)),
        ),
    )._replace(keep=KEEP)  # fmt: skip


# -- One device ------------------------------------------------------------------------------------


def _end(call: Call, device: Device) -> Html:
    """What forgets a device."""
    inner = form(
        url(DEVICES, device.id), call.actor.csrf,
        check("Yes, with its notes and its history", "sure", required=True),
        button("Forget", "danger", name="do", value="forget"),
    )  # fmt: skip
    return card("Forget", tag("p", "It comes back when it asks; its admissions stay."), inner)


def _told(outlook: Outlook) -> tuple[Html, ...]:
    what = f"Version {outlook.version}" if outlook.version else f"Nothing: {outlook.code}"
    return (
        note(tag("b", what), ", as ", outlook.reason, kind=outlook.kind),
        tag("p", "So the rules say of what is known now. It may say something else when it asks.",
            class_="hint"),
    )  # fmt: skip


def _visits(visits: Sequence[Visit], now: int) -> Html:
    rows = [
        (when(each.at, now), each.project, each.version, verdict(each), each.reason)
        for each in visits
    ]
    heads = "When", "Project", "Ran", "Outcome", "Why"
    return table(heads, rows, "Decisions", "Nothing since this is kept.")


# -- What is changed -------------------------------------------------------------------------------


def told(device: Device, changes: Mapping[str, object]) -> str:
    """A change as the audit has it."""
    return f"{device.id} {json.dumps(changes, ensure_ascii=False)}"


class _Change(TypedDict, total=False):
    """What annotate() takes."""

    notes: str
    labels: list[str]


def _noted(call: Call, device: Device) -> _Change:
    """What a form changes of what it showed: the rest may be others' by now.

    A label with a comma in it, from the API, stays if no label changes.
    """
    was_line = call.given("was_labels", label_line(device))
    was = typed(call.given("was_notes", device.notes))
    line = call.given("labels", was_line)
    notes = typed(call.given("notes", was))
    change = _Change()
    if notes != was:
        change["notes"] = notes
    if line != was_line:
        change["labels"] = sorted({word for each in line.split(",") if (word := each.strip())})
    return change
