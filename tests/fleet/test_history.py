"""What was decided, over time: what stays of it, for how long, and what it costs to ask."""

from __future__ import annotations

import functools
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_fleet import Known, remember
from ota_fleet import history as history_module
from ota_fleet import registry as registry_module
from ota_fleet.history import DAY, HOUR, MONTH, RECENT, VISITS, Count, History, Share
from ota_fleet.registry import Registry, normal_id
from ota_fleet.rows import clean
from ota_fleet.tables import FORGET
from ota_server import Event, Objection, Release, Report, Version
from tests.conftest import wait_until
from tests.core.test_access import ask
from tests.core.test_s3 import ESP8266
from tests.fleet.test_fleet import registry_of, remembering
from tests.fleet.test_registry import MAC, by_hand, mac, older, opened, quickest

NOW = 1_700_000_000 // DAY * DAY  # UTC seconds, when a day begins
FINE = Objection("not-newer", "2.0.0 is not newer than 2.0.0, which the device runs", final=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the registry is."""
    return tmp_path / "fleet.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    """An empty one."""
    with opened(path) as registry:
        yield registry


@pytest.fixture
def history(registry: Registry) -> History:
    """One that writes into the registry."""
    return History(registry)


def release(version: str, project: str = "lamp") -> Release:
    """An image that is offered."""
    return Release(project, Version.parse(version), "sketch", "", "a.bin", (0, 0, 0, 0, 0))


def decided(
    outcome: str | Objection = FINE,
    device: str | None = MAC,
    version: str = "1.0.0",
    project: str = "lamp",
) -> Event:
    """A device was told something: that there is a version, or what is wrong."""
    report = Report(project, "192.0.2.7", Version.parse(version), device)
    return Event(report, outcome if isinstance(outcome, Objection) else release(outcome, project))


def told(registry: Registry, history: History, *events: Event, at: int = NOW) -> None:
    """Notes events, a second between them, as the server does, and waits until they are written."""
    known = Known.of(registry)
    for second, event in enumerate(events, at):
        remember(known, history, str, event, functools.partial(float, second))
    registry.flush()


# -- 1. Hours and days -----------------------------------------------------------------------------


def test_every_decision_counts_in_its_hour(registry: Registry, history: History) -> None:
    told(registry, history, decided(), decided("2.0.0"), decided(device=None))
    told(registry, history, decided("2.0.0"), at=NOW + HOUR - 1)
    told(registry, history, decided(), decided(project="door"), at=NOW + HOUR)
    assert history.hours() == [(NOW, 4, 2), (NOW + HOUR, 2, 0)]
    assert history.hours("lamp") == [(NOW, 4, 2), (NOW + HOUR, 1, 0)]
    assert history.hours("door", NOW + HOUR) == [(NOW + HOUR, 1, 0)]
    assert history.hours("door", NOW + 2 * HOUR) == history.hours("nobody") == []


def test_what_devices_call_by_an_alias_is_the_project(registry: Registry, history: History) -> None:
    registry.write("INSERT INTO alias (name, project) VALUES ('bulb', 'lamp')")
    told(registry, history, decided(), decided("2.0.0", mac(1), project="bulb"))
    assert history.hours("lamp") == [(NOW, 2, 1)]
    assert history.spread("lamp") == [Share(NOW, "1.0.0", 2)]
    assert [(each.project, each.devices) for each in history.counts(NOW)] == [("lamp", 2)]


def test_day_has_the_versions_that_devices_ended_it_with(
    registry: Registry, history: History
) -> None:
    told(registry, history, *(decided(device=mac(number)) for number in range(3)))
    told(registry, history, decided(device=mac(0), version="2.0.0"), at=NOW + 599)
    assert history.spread("lamp") == [Share(NOW, "1.0.0", 3)]  # it is not looked at so often
    told(registry, history, decided(device=mac(1), version="2.0.0"), at=NOW + 603)
    told(registry, history, decided(device=mac(2), version="2.0.0"), at=NOW + DAY)
    assert history.spread("lamp") == [
        Share(NOW, "2.0.0", 2),
        Share(NOW, "1.0.0", 1),
        Share(NOW + DAY, "2.0.0", 3),
    ]
    assert history.spread("lamp", NOW + DAY) == [Share(NOW + DAY, "2.0.0", 3)]
    assert history.spread("door") == []


def test_device_that_is_gone_for_a_month_counts_no_more(
    registry: Registry, history: History
) -> None:
    told(registry, history, decided(), decided(device=mac(1)))
    told(registry, history, decided(device=mac(1)), at=NOW + MONTH + 1)
    assert history.spread("lamp")[-1].devices == 1


def test_hours_end_after_31_days_and_days_after_400(registry: Registry, history: History) -> None:
    for day in (0, 1, 30, 31, 32, 399, 400, 401):
        told(registry, history, decided(), at=NOW + day * DAY)
    assert [hour.at for hour in history.hours()] == [NOW + day * DAY for day in (399, 400, 401)]
    assert [each.at // DAY - NOW // DAY for each in history.spread("lamp")] == [
        1, 30, 31, 32, 399, 400, 401
    ]  # fmt: skip


def test_clock_that_jumps_back_is_followed(registry: Registry, history: History) -> None:
    told(registry, history, decided(), at=NOW + 10 * DAY)
    told(registry, history, decided())
    assert [each.at for each in history.spread("lamp")] == [NOW, NOW + 10 * DAY]


def test_devices_that_make_up_versions_do_not_fill_the_disk(
    registry: Registry, history: History
) -> None:
    many = [decided(device=mac(number), version=f"1.0.{number}") for number in range(900)]
    told(registry, history, *many, *(decided(device=f"d{n}", version="2.0.0") for n in range(9)))
    found = history.spread("lamp")
    assert (len(found), found[0]) == (500, Share(NOW, "2.0.0", 9))


# -- 2. Visits -------------------------------------------------------------------------------------


def visits(history: History, device: str = MAC) -> list[str]:
    """What stays of a device, the oldest first."""
    return [f"{each.version} {each.offered or each.code}" for each in history.visits(device)[::-1]]


def test_visit_like_the_one_before_is_not_kept_but_every_offer_is(
    registry: Registry, history: History
) -> None:
    events = (
        decided(), decided(), decided("2.0.0"), decided("2.0.0"), decided(version="2.0.0"),
        decided(version="2.0.0"), decided(),
    )  # fmt: skip
    told(registry, history, *events[:2])
    told(registry, history, *events[2:])
    assert visits(history) == [
        "1.0.0 not-newer", "1.0.0 2.0.0", "1.0.0 2.0.0", "2.0.0 not-newer", "1.0.0 not-newer",
    ]  # fmt: skip


def test_visit_tells_what_was_said_and_when(registry: Registry, history: History) -> None:
    told(registry, history, decided(), decided("2.0.0"))
    offer, first = history.visits(MAC.lower().replace(":", "-"))
    assert (first.at, first.project, first.reason) == (NOW, "lamp", FINE.reason)
    assert (offer.at, offer.offered, offer.code, offer.reason) == (NOW + 1, "2.0.0", "", "")
    assert offer.number > first.number
    assert history.visits(MAC, 1) == [offer]


def test_another_reason_or_project_is_another_visit(registry: Registry, history: History) -> None:
    other = FINE._replace(reason="2.1.0 was withdrawn")
    told(registry, history, decided(), decided(other), decided(other, project="door"))
    assert len(history.visits(MAC)) == 3


def test_the_last_visits_of_each_device_stay(registry: Registry, history: History) -> None:
    told(registry, history, decided(device=mac(1)))
    told(registry, history, *(decided(f"2.0.{number}") for number in range(VISITS + 5)))
    assert visits(history) == [f"1.0.0 2.0.{number}" for number in range(5, VISITS + 5)]
    told(registry, history, decided("3.0.0"))
    assert visits(history)[-2:] == [f"1.0.0 2.0.{VISITS + 4}", "1.0.0 3.0.0"]
    assert len(visits(history)) == VISITS
    assert visits(history, mac(1)) == ["1.0.0 not-newer"]


def test_who_does_not_say_who_it_is_has_no_visits(registry: Registry, history: History) -> None:
    told(registry, history, decided(device=None), decided(device=""))
    assert registry.rows("SELECT * FROM visit") == history.visits("") == []


def test_visits_end_when_a_device_is_forgotten(registry: Registry, history: History) -> None:
    told(registry, history, decided(), decided(device=mac(1)))
    assert registry.forget(MAC)
    assert (visits(history), len(visits(history, mac(1)))) == ([], 1)
    told(registry, history, decided())
    assert len(visits(history)) == 1


def test_visits_end_when_a_device_is_crowded_out(path: Path) -> None:
    with opened(path, max_devices=3) as registry:
        history = History(registry)
        for number in range(9):
            told(registry, history, decided(device=mac(number)), at=NOW + number)
            registry.refresh()  # as each second
        told(registry, history, *(decided(device=mac(n)) for n in range(20, 29)), at=NOW + 20)
        known = {device.id for device in registry.devices()}
        rows = registry.rows("SELECT device FROM visit")
        registry.refresh()
        told(registry, history, decided(device=mac(20)), at=NOW + 60)
        assert len(visits(history, mac(20))) == 1  # it is back, and says what it said before
    assert (len(known), {device for (device,) in rows}) == (3, known)


def test_visits_of_nobody_end_with_the_day(registry: Registry, history: History) -> None:
    history.note(decided(device=mac(7)), NOW)  # its check-in was lost
    registry.flush()
    told(registry, history, decided(), at=NOW + DAY)
    assert (visits(history, mac(7)), len(visits(history))) == ([], 1)


ANY = st.text(st.characters(exclude_categories=()), min_size=1) | st.sampled_from("'%\0\ud800")


@settings(max_examples=25, deadline=None)
@given(ANY, ANY, ANY)
def test_whatever_is_said_is_data(device: str, project: str, reason: str) -> None:
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "fleet.db") as registry:
        history = History(registry)
        event = Event(Report(project, "::1", None, device), Objection("x", reason))
        told(registry, history, event, decided(device=mac(1), project="a b"))
        assert len(history.visits(device)) == bool(normal_id(device))
        assert [hour.checks for hour in history.hours(project)] == [1]
        assert history.recent()[1].reason == clean(reason)


def test_old_registry_gets_its_history(path: Path) -> None:
    older(path, 7)
    with opened(path) as registry:
        history = History(registry)
        told(registry, history, decided("2.0.0"))
        assert (len(history.visits(MAC)), len(history.failing(NOW))) == (1, 0)


# -- 3. As it happens ------------------------------------------------------------------------------


def test_last_decisions_are_there_at_once_newest_first(history: History) -> None:
    for number, event in enumerate((decided(), decided("2.0.0", mac(1)), decided(device=None))):
        history.note(event, NOW + number)
    nobody, offer, fine = history.recent()
    assert (nobody.device, nobody.code, nobody.address) == ("", "not-newer", "192.0.2.7")
    assert (offer.device, offer.offered, offer.reason, offer.at) == (mac(1), "2.0.0", "", NOW + 1)
    assert history.recent(device=MAC.lower()) == [fine]
    assert history.recent(fine.number) == [nobody, offer]
    assert history.recent(nobody.number) == []
    assert history.recent(limit=1) == history.recent(limit=0) == [nobody]


def test_the_last_thousand_are_kept(history: History) -> None:
    for number in range(RECENT + 7):
        history.note(decided(device=mac(number)), NOW)
    found = history.recent(limit=2 * RECENT)
    assert (len(found), found[0].device, found[-1].device) == (RECENT, mac(RECENT + 6), mac(7))


def test_numbers_rise_whatever_the_clock_does_and_across_a_restart(registry: Registry) -> None:
    before, after = History(registry), History(registry)
    for at in (NOW, NOW, NOW - 9, NOW + 1):
        before.note(decided(), at)
    after.note(decided(), NOW + 2)
    numbers = [each.number for each in (*before.recent()[::-1], *after.recent())]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < 1 << 53  # JavaScript counts that far


def test_many_threads_may_note_at_once(registry: Registry, history: History) -> None:
    def work() -> None:
        for _ in range(200):
            history.note(decided(), NOW)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    registry.flush()
    assert history.hours() == [(NOW, 1600, 0)]
    numbers = [each.number for each in history.recent(limit=RECENT)]
    assert numbers == list(range(numbers[0], numbers[0] - RECENT, -1))


# -- 4. Batches ------------------------------------------------------------------------------------


def test_noting_waits_for_nobody_and_a_locked_file_loses_and_doubles_nothing(
    path: Path, registry: Registry, history: History
) -> None:
    registry._often.execute("PRAGMA busy_timeout = 1")
    with by_hand(path) as other:
        other.execute("BEGIN IMMEDIATE")
        told_locked = pytest.raises(sqlite3.OperationalError, match="locked")
        with told_locked:
            told(registry, history, decided("2.0.0"), decided(device=None))
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                registry.flush()
        history.note(decided(), NOW)
        other.execute("ROLLBACK")
    registry.flush()
    assert (history.hours(), visits(history)) == (
        [(NOW, 3, 1)], ["1.0.0 2.0.0", "1.0.0 not-newer"]
    )  # fmt: skip


def test_what_cannot_be_written_at_all_stops_neither_check_ins_nor_others(
    registry: Registry, history: History
) -> None:
    def fail(_connection: sqlite3.Connection, _items: list[int]) -> None:
        raise ValueError("a mistake")

    put = registry.in_batches(fail)
    with registry._lock:  # the thread that writes would take it
        put(1)
        with pytest.raises(ValueError, match="a mistake"):
            registry.flush()
        told(registry, history, decided())
    assert visits(history) == ["1.0.0 not-newer"]


def test_queue_is_bounded(registry: Registry, history: History) -> None:
    most = registry_module.MAX_QUEUED
    with registry._lock:
        for number in range(most + 500):
            history.note(decided(device=None), NOW + number)
        assert len(registry._pending[1].queue) <= most
    registry.flush()
    assert most <= sum(hour.checks for hour in history.hours()) <= most + 500


def test_decisions_are_written_without_anybody_asking(history: History) -> None:
    history.note(decided(), NOW)
    wait_until(lambda: len(history.hours()) == 1)


def test_several_servers_count_together(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        told(one, History(one), decided())
        told(other, History(other), decided())
        assert History(one).hours() == [(NOW, 2, 0)]
        assert visits(History(one)) == ["1.0.0 not-newer"]


# -- 5. The fleet ----------------------------------------------------------------------------------


def test_projects_are_counted_by_version_and_when_devices_were_seen(
    registry: Registry, history: History
) -> None:
    now = NOW + 2 * MONTH
    for number, age in enumerate((0, HOUR, HOUR + 1, DAY, DAY + 1, MONTH, MONTH + 1)):
        told(registry, history, decided(device=mac(number)), at=now - age)
    told(registry, history, decided(device="x", version="2.0.0", project="door"), at=now)
    assert history.counts(now) == [
        Count("door", "2.0.0", devices=1, hour=1, day=1, month=1, failing=0),
        Count("lamp", "1.0.0", devices=7, hour=2, day=4, month=6, failing=0),
    ]


def test_silent_devices_are_those_of_a_month_but_not_of_a_day(
    registry: Registry, history: History
) -> None:
    now = NOW + 2 * MONTH
    for number, age in enumerate((0, DAY, DAY + 1, 2 * DAY, MONTH, MONTH + 1)):
        told(registry, history, decided(device=mac(number)), at=now - age)
    assert [each.device for each in history.silent(now)] == [mac(2), mac(3), mac(4)]
    (first,) = history.silent(now, 1)
    assert (first.project, first.version, first.last_seen) == ("lamp", "1.0.0", now - DAY - 1)


@pytest.mark.parametrize(
    ("events", "offers"),
    [
        pytest.param([], 0, id="never-offered"),
        pytest.param([decided("2.0.0")] * 2, 2, id="twice"),
        pytest.param([decided("2.0.0")] * 3, 3, id="three-times"),
        pytest.param([decided("2.0.0")] * 5, 5, id="five-times"),
        pytest.param([decided("2.0.0")] * 3 + [decided(version="2.0.0")], 0, id="runs-it-now"),
        pytest.param([decided("2.0.0")] * 3 + [decided()], 0, id="withdrawn-meanwhile"),
        pytest.param([decided("2.0.0")] * 3 + [decided("2.1.0")], 1, id="another-release"),
        pytest.param(
            [decided("2.0.0"), decided("2.0.0", version="1.1.0")] * 3, 1, id="other-versions-run"
        ),
        pytest.param([decided("2.0.0")] * 3 + [decided("2.0.0", project="door")], 1, id="project"),
        pytest.param(
            [decided("2.0.0")] * 3 + [Event(Report("lamp", "", None, MAC), release("2.1.0"))],
            3,
            id="does-not-say-what-it-runs",
        ),
    ],
)
def test_device_is_failing_that_gets_the_same_again_and_again(
    events: list[Event], offers: int, registry: Registry, history: History
) -> None:
    told(registry, history, decided(), *events)
    failing = history.failing(NOW)
    assert [(each.device, each.offered, each.offers) for each in failing] == [
        (MAC, "2.0.0", offers)
    ] * (offers >= 3)
    assert sum(each.failing for each in history.counts(NOW)) == (offers >= 3)
    assert registry.rows("SELECT offers FROM device") == [(offers,)]


def test_devices_that_fail_are_listed_the_last_first_for_a_month(
    registry: Registry, history: History
) -> None:
    for number in range(3):
        told(registry, history, *[decided("2.0.0", mac(number))] * 3, at=NOW + 10 * number)
    assert [each.device for each in history.failing(NOW)] == [mac(2), mac(1), mac(0)]
    assert [each.device for each in history.failing(NOW, 1)] == [mac(2)]
    assert history.failing(NOW + MONTH + 30) == []


# -- 6. A site with a memory -----------------------------------------------------------------------


def test_server_remembers_what_it_decides(folder: Path) -> None:
    with remembering(folder) as site, registry_of(site) as registry:
        for version in ("1.0.0", "1.10.0", "1.10.0"):
            ask(site, "/firmware", f"x-ESP8266-version: {version}", ESP8266)
        ask(site, "/firmware", "x-ESP8266-version: 1.0.0")
        ask(site, "/nothing", "x-ESP8266-version: 1.0.0", ESP8266)
        history = History(registry)
        wait_until(lambda: sum(hour.checks for hour in history.hours()) == 4)
        assert visits(history) == ["1.0.0 1.10.0", "1.10.0 not-newer"]
        assert sum(hour.downloads for hour in history.hours("firmware")) == 2


# -- 7. Many devices -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """10,000 devices of 20 projects, with all visits that are kept of some, and a year of days."""
    with opened(tmp_path_factory.mktemp("many") / "fleet.db") as registry:
        known, history = Known.of(registry), History(registry)
        for number in range(10_000):
            event = decided(
                device=mac(number), version=f"1.{number % 9}.0", project=f"p{number % 20}"
            )
            remember(known, history, str, event, functools.partial(float, NOW + number))
        registry.flush()
        told(registry, history, *[decided("2.0.0", mac(7), project="p7")] * 40, at=NOW + 10_000)
        with registry.writing() as connection:
            hours = [(NOW // HOUR - hour, f"p{n}") for hour in range(744) for n in range(20)]
            connection.executemany("INSERT INTO tally VALUES (?, ?, 7, 3)", hours[40:])
            days = [(NOW // DAY - day, f"p{n}") for day in range(1, 400) for n in range(20)]
            connection.executemany("INSERT INTO spread VALUES (?, ?, '1.0.0', 9)", days)
        yield registry


def test_questions_about_the_fleet_are_quicker_than_reading_it(many: Registry) -> None:
    history = History(many)
    whole = quickest(
        lambda: [many.devices(after=[mac(n)], limit=1000) for n in range(0, 9999, 1000)]
    )
    assert len(history.counts(NOW)) == 180
    assert quickest(lambda: history.counts(NOW)) < whole / 4
    for work in (
        lambda: history.visits(mac(7)),
        lambda: history.failing(NOW),
        lambda: history.silent(NOW + DAY + HOUR),
        lambda: history.hours("p7", NOW - DAY),
        lambda: history.hours("", NOW - DAY),
        lambda: history.spread("p7", NOW - MONTH),
    ):
        assert work()
        assert quickest(work) < whole / 10


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (history_module._VISITS, "visit_by_device"),
        (history_module._LAST, "visit_by_device"),
        (history_module._OLD_VISITS, "visit_by_device"),
        (history_module._FAILING, "device_failing"),
        (history_module._SILENT, "device_by_age"),
        (history_module._HOURS + history_module._BY_HOUR, "sqlite_autoindex_tally_1"),
        (FORGET[0], "visit_by_device"),
    ],
)
def test_statement_uses_its_index(statement: str, index: str, many: Registry) -> None:
    values = [0] * statement.count("?")
    plan = "\n".join(row[3] for row in many.rows("EXPLAIN QUERY PLAN " + statement, *values))
    assert re.search(index, plan), plan
    assert "TEMP B-TREE" not in plan


def test_note_costs_its_caller_next_to_nothing(many: Registry) -> None:
    history = History(many)
    events = [decided(device=mac(number)) for number in range(10_000)]

    def tell() -> None:
        for event in events:
            history.note(event, NOW)

    def write() -> None:
        tell()
        many.flush()

    assert quickest(tell) < quickest(write) / 5
