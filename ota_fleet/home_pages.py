"""The overview: how each project's devices are, how busy the server is, and who needs a look."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from ota_fleet import lines
from ota_fleet.grants import Grants
from ota_fleet.history import DAY, HOUR, Count, History, Share, Trouble
from ota_fleet.html import (
    COLOURS,
    Html,
    Series,
    Sheet,
    a,
    badge,
    bars,
    card,
    cards,
    chart,
    code,
    copied,
    details,
    figures,
    join,
    note,
    page,
    table,
    tag,
    url,
    when,
)
from ota_fleet.outcomes import ROLLOUTS, rollout_row
from ota_fleet.pages import HOME, Call, Page, may
from ota_fleet.projects import chips_of, offered
from ota_fleet.registry import Registry, Search
from ota_fleet.rollouts import Rollouts
from ota_fleet.stock import Stock
from ota_server import Site, base_url

MAX_TROUBLES = 6  # rows of a list of devices; all of them are on the page of devices
MAX_CARDS = 24  # projects that are shown, those with the most devices
MAX_CHARTS = 6  # projects with a chart: each is a question to the database
SPREAD = 30 * DAY  # seconds
UNSAID, OTHERS = "not told", "others"


@dataclass(frozen=True, slots=True)
class HomePages:
    """The page, and what it looks at."""

    history: History
    stock: Stock
    registry: Registry
    rollouts: Rollouts
    grants: Grants
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        return (Page(HOME, "viewer", self.show, link="Overview"),)

    def show(self, call: Call) -> Sheet:
        """GET the overview."""
        now = int(self.now())
        counts = self.history.counts(now)
        by_project = {name: [*each] for name, each in groupby(counts, attrgetter("project"))}
        devices = {name: sum(each.devices for each in found) for name, found in by_project.items()}
        names = sorted({*self.stock.projects(), *by_project}, key=lambda x: (-devices.get(x, 0), x))
        return page(
            "Overview",
            card("", _totals(counts, len(names), self._waiting(call.site, names)), id="totals",
                 data_live=10),
            self._rollouts(),
            self._troubles(now),
            None if by_project else self._first_steps(call, names[0] if names else "firmware"),
            cards(self._project(name, by_project.get(name, ()), now, number < MAX_CHARTS)
                  for number, name in enumerate(names[:MAX_CARDS])),
            tag("p", a(f"All {len(names):,} projects", "/admin/projects"))
            if len(names) > MAX_CARDS else None,
            card("The last 24 hours", self._day(now), id="day", data_live=60),
        )  # fmt: skip

    def _waiting(self, site: Site, names: Sequence[str]) -> Html | None:
        """How many devices are not admitted where they must be; None: they must nowhere."""
        usual = site.config.admit
        closed = [each for each in names if not self.stock.is_open(each, usual)]
        if not closed:
            return None
        of = closed if len(closed) < len(names) else [""]
        found = {name: self.registry.count(Search(name, state="unknown")) for name in of}
        one = [name for name in of if found[name]] if sum(found.values()) else of
        where = one[0] if len(one) == 1 else ""
        there = url("/admin/devices", project=where, state="unknown")
        return a(f"{sum(found.values()):,}", there)

    def _rollouts(self) -> Html | None:
        """Those that go on, and those that do not."""
        found = self.rollouts.under_way()
        if not found:
            return None
        heads = "Release", "State", "Stage", "Devices"
        some = self.rollouts.with_results(found[:MAX_TROUBLES])
        rows = [rollout_row(*each) for each in some]
        more = tag("p", a("All rollouts", ROLLOUTS)) if len(found) > MAX_TROUBLES else None
        return card("Rollouts", table(heads, rows, "Rollouts"), more, id="rollouts", data_live=10)

    def _looping(self, now: int) -> Html | None:
        found = self.grants.loops(MAX_TROUBLES + 1)
        if not found:
            return None
        rows = [
            (a(each.device, url("/admin/devices", each.device)), each.project, each.version,
             when(each.at, now))
            for each in found[:MAX_TROUBLES]
        ]  # fmt: skip
        heads = "Device", "Project", "Was given", "Since"
        words = "Were given it in full again and again, and do not run it: they get it no more."
        more = tag("p", a("All of them", url("/admin/devices", state="looping")))
        return card(badge("Looping", "bad"), tag("p", words), table(heads, rows, "Looping"),
                    more if len(found) > MAX_TROUBLES else None, id="looping",
                    data_live=30)  # fmt: skip

    def _troubles(self, now: int) -> Html:
        failing = self.history.failing(now, MAX_TROUBLES + 1)
        silent = self.history.silent(now, MAX_TROUBLES + 1)
        return join(
            self._looping(now),
            _trouble("Failing", "Were given the same version again and again, but do not run it.",
                     failing, "failing", now),
            _trouble("Silent", "Not seen for more than a day.", silent, "silent", now),
        )  # fmt: skip

    def _first_steps(self, call: Call, project: str) -> Html:
        """What to do while no device has come yet."""
        newest, _ = offered(self.stock, project)
        found = lines.of_sketches(base_url(call.request), project, newest or "1.0.0",
                                  chips_of(self.stock, project))  # fmt: skip
        upload = a("Upload a firmware", "/admin/upload") if may(call.actor, "publisher") else None
        return card(
            "No device has asked yet",
            tag("p", "A sketch asks with lines like these, for the project ", code(project), ":"),
            *(join(tag("h3", each.title), copied(each.text, each.title)) for each in found),
            tag("p", upload),
        )

    def _project(self, name: str, counts: Sequence[Count], now: int, drawn: bool) -> Html:
        newest, why = offered(self.stock, name)
        devices = sum(each.devices for each in counts)
        current = sum(each.devices for each in counts if each.version == newest)
        title = a(name, url("/admin/projects", name))
        if not devices:
            return card(title, _offer(newest, why), tag("p", "No device yet.", class_="empty"))
        share = f"{100 * current // devices} % of {devices:,} devices run it."
        spread = self.history.spread(name, now - SPREAD) if drawn else ()
        versions = coloured(counts, newest)
        over_time = details("The last 30 days", spread_chart(spread, versions)) if spread else None
        return card(
            title,
            _offer(newest, why),
            tag("p", share) if newest else None,
            bars(shares(counts, versions), f"Devices of {name} by version"),
            over_time,
        )

    def _day(self, now: int) -> Html:
        first = now // HOUR - 23
        found = {each.at // HOUR: each for each in self.history.hours(since=first * HOUR)}
        hours = range(first, first + 24)
        checks = [found[hour].checks if hour in found else 0 for hour in hours]
        downloads = [found[hour].downloads if hour in found else 0 for hour in hours]
        moments = [time.strftime("%H:00 UTC", time.gmtime(hour * HOUR)) for hour in hours]
        series = Series("Checks", checks), Series("Downloads", downloads)
        return chart("Checks and downloads of each hour", moments, series)


# -- Parts -----------------------------------------------------------------------------------------


def _totals(counts: Sequence[Count], projects: int, waiting: Html | None) -> Html:
    day = sum(each.day for each in counts)
    last = (("Not admitted", waiting),) if waiting else ()
    return figures(
        (
            ("Projects", f"{projects:,}"),
            ("Devices", f"{sum(each.devices for each in counts):,}"),
            ("Seen in the last hour", f"{sum(each.hour for each in counts):,}"),
            ("Seen in the last day", f"{day:,}"),
            ("Silent", f"{sum(each.month for each in counts) - day:,}"),
            ("Failing", f"{sum(each.failing for each in counts):,}"),
            *last,
        )
    )


def _trouble(title: str, why: str, found: Sequence[Trouble], state: str, now: int) -> Html | None:
    """A list of devices, as far as it is short."""
    if not found:
        return None
    given = state == "failing"
    heads = "Device", "Project", "Runs", *("Was given",) * given, "Last seen"
    rows = [
        (a(each.device, url("/admin/devices", each.device)), each.project, each.version or UNSAID,
         *(f"{each.offered} ({each.offers} times)",) * given, when(each.last_seen, now))
        for each in found[:MAX_TROUBLES]
    ]  # fmt: skip
    more = tag("p", a("All of them", url("/admin/devices", state=state)))
    parts = tag("p", why), table(heads, rows, title), more if len(found) > MAX_TROUBLES else None
    return card(badge(title, "bad" if given else "warn"), *parts, id=state, data_live=30)


def _offer(newest: str, why: str) -> Html:
    return tag("p", "Newest release ", tag("b", newest)) if newest else note(why, kind="warn")


# -- Versions --------------------------------------------------------------------------------------


def coloured(counts: Iterable[Count], newest: str) -> list[str]:
    """The versions that have a colour of their own: the newest release, and the most used."""
    devices = {each.version: each.devices for each in counts}
    most = sorted(devices, key=lambda version: -devices[version])
    others = [version for version in most if not newest or version != newest]
    return [newest] * bool(newest) + others[: COLOURS - 2]


def shares(counts: Iterable[Count], versions: Sequence[str]) -> list[tuple[str, float]]:
    """The shares of a bar: of these versions, and of the rest as one."""
    devices = {each.version: each.devices for each in counts}
    found = [(version or UNSAID, float(devices.get(version, 0))) for version in versions]
    rest = sum(devices.values()) - sum(amount for _, amount in found)
    return found + [(OTHERS, rest)] * (rest > 0)


def spread_chart(spread: Iterable[Share], versions: Sequence[str]) -> Html:
    """How many devices ran which of these versions, day by day."""
    days: dict[int, dict[str, int]] = defaultdict(dict)
    for each in spread:
        days[each.at][each.version] = each.devices
    series = [
        Series(version or UNSAID, [float(day.get(version, 0)) for day in days.values()])
        for version in versions
    ]
    rests = [
        float(sum(count for version, count in day.items() if version not in versions))
        for day in days.values()
    ]
    if any(rests):
        series.append(Series(OTHERS, rests))
    moments = [time.strftime("%Y-%m-%d", time.gmtime(day)) for day in days]
    return chart("Devices by version, each day", moments, series, stacked=True)
