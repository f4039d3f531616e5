"""The registry: what it remembers, who waits for whom, and what it does when its file is ill."""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ota_fleet import ledger as ledger_module
from ota_fleet import registry as registry_module
from ota_fleet import schema, searches
from ota_fleet.assignments import Assignments
from ota_fleet.ledger import Ledger
from ota_fleet.registry import App, Device, Registry, Search, Sighting, normal_id
from ota_fleet.rows import Entry, Token, clean
from ota_fleet.tables import CROWD_OUT, SCRIPTS
from ota_server import ESP32_FAMILY, Version
from tests.conftest import wait_until
from tests.fleet.test_rooms import SQL_ROOMS
from tests.test_house import ROOT

MAC = "5C:CF:7F:12:34:56"
MD5 = "14cc0cfb6b4b2feab2c588b4ab77380c"
SHA256 = "72c3342b" * 8
NOW = 1_700_000_000  # UTC seconds


SIGHTING = Sighting(
    device=MAC,
    project="firmware",
    chip="esp8266",
    version="1.0.0",
    sketch_md5=MD5,
    sketch_sha256=None,
    free_space=1_794_048,
    sdk="2.2.2-dev(38a443e)",
    address="192.168.1.7",
    at=NOW,
    downloaded=False,
)
SILENT = SIGHTING._replace(
    chip=None, version=None, sketch_md5=None, free_space=None, sdk=None, address=""
)


@contextmanager
def opened(path: Path, *, max_devices: int = 10_000) -> Iterator[Registry]:
    """A registry that is closed in the end."""
    registry = Registry(path, max_devices=max_devices)
    try:
        yield registry
    finally:
        registry.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the registry is, or will be."""
    return tmp_path / "fleet.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    """An empty one."""
    with opened(path) as registry:
        yield registry


def saw(registry: Registry, *sightings: Sighting) -> Device:
    """What is known of the last of them, once all are written."""
    for sighting in sightings:
        registry.seen(sighting)
    registry.flush()
    device = registry.device(sightings[-1].device)
    assert device is not None
    return device


def mac(number: int) -> str:
    """The MAC address of one of many devices."""
    return normal_id(f"5ccf7f{number:06x}")


def ids(registry: Registry, **wanted: Any) -> list[str]:
    """The ids of one page of devices."""
    return [device.id for device in registry.devices(Search(**wanted), limit=1000)]


def token(name: str, role: str, project: str, digest: str, number: int = 0) -> Token:
    """A token of no single device."""
    return Token(number, name, role, project, digest, "", NOW)


@contextmanager
def by_hand(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program at the same file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def five_entries(path: Path) -> None:
    """A registry whose audit has five entries."""
    with opened(path) as registry:
        for number in range(1, 6):
            Ledger(registry).audit("ada", "upload", f"firmware {number}.0.0", NOW + number)


def assert_sound(path: Path) -> None:
    """SQLite finds nothing wrong in the file."""
    with by_hand(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- 1. Check-ins ---------------------------------------------------------------------------------


def test_first_check_in_makes_the_device(registry: Registry) -> None:
    assert saw(registry, SIGHTING) == Device(
        id=MAC,
        project="firmware",
        chip="esp8266",
        version="1.0.0",
        image=MD5,
        free_space=1_794_048,
        sdk="2.2.2-dev(38a443e)",
        address="192.168.1.7",
        first_seen=NOW,
        last_seen=NOW,
        downloads=0,
        notes="",
        labels=(),
        pin="",
        admitted=False,
    )


def test_later_check_in_replaces_what_it_says_and_counts_downloads(registry: Registry) -> None:
    later = SIGHTING._replace(
        version=Version.parse("v1.1"),
        sketch_sha256=SHA256,
        free_space=7,
        sdk="3",
        address="::1",
        at=NOW + 5,
        downloaded=True,
    )
    device = saw(registry, SIGHTING, later, later)
    assert (device.version, device.image, device.free_space) == ("1.1.0", SHA256, 7)
    assert (device.sdk, device.address) == ("3", "::1")
    assert (device.first_seen, device.last_seen, device.downloads) == (NOW, NOW + 5, 2)


def test_what_a_device_does_not_say_stays(registry: Registry) -> None:
    first = saw(registry, SIGHTING)
    assert saw(registry, SILENT._replace(at=NOW + 9)) == replace(first, last_seen=NOW + 9)


@pytest.mark.parametrize(
    ("change", "version", "image"),
    [
        ({"version": "1.0.0"}, "1.0.0", MD5),
        ({"version": "2.0.0"}, "2.0.0", ""),
        ({"project": "other"}, "", ""),
        ({"project": "other", "version": "1.0.0"}, "1.0.0", ""),
        ({"project": ""}, "1.0.0", MD5),
        ({"sketch_md5": SHA256}, "1.0.0", SHA256),
    ],
)
def test_what_is_no_longer_true_goes(
    change: dict[str, str], version: str, image: str, registry: Registry
) -> None:
    device = saw(registry, SIGHTING, SILENT._replace(**change))  # type: ignore[arg-type]
    assert (device.version, device.image) == (version, image)
    assert device.project == (change.get("project") or "firmware")


def test_family_does_not_replace_the_chip_that_is_known(registry: Registry) -> None:
    vague, exact = SIGHTING._replace(chip=ESP32_FAMILY), SIGHTING._replace(chip="esp32c3")
    assert saw(registry, vague).chip == ESP32_FAMILY
    assert saw(registry, exact).chip == "esp32c3"
    assert saw(registry, vague).chip == "esp32c3"


def test_clock_that_jumps_back_does_not_freeze_a_device(registry: Registry) -> None:
    device = saw(registry, SIGHTING, SIGHTING._replace(version="2.0.0", at=NOW - 9999))
    assert (device.version, device.last_seen, device.first_seen) == ("2.0.0", NOW - 9999, NOW)


@pytest.mark.parametrize(
    "text",
    ["5C:CF:7F:12:34:56", "5c-cf-7f-12-34-56", "5ccf7f123456", " 5ccf.7f12.3456 "],
)
def test_mac_has_one_spelling(text: str, registry: Registry) -> None:
    saw(registry, SIGHTING._replace(device=text))
    assert ids(registry) == [MAC]
    assert registry.device(text) is not None
    assert ids(registry, text=text) == [MAC]


def test_other_ids_stay_as_they_are(registry: Registry) -> None:
    saw(registry, SIGHTING._replace(device="Pump-1"), SIGHTING._replace(device="pump-1"))
    assert ids(registry) == ["Pump-1", "pump-1"]


def test_nobody_is_not_remembered(registry: Registry) -> None:
    registry.seen(SIGHTING._replace(device=""))
    registry.flush()
    assert ids(registry) == []


HOSTILE = [
    "x'; DROP TABLE device; --",
    'x"or"1"="1',
    "%",
    "_",
    "!",
    "\\",
    "?",
    ":a",
    "\0",
    "a\0b",
    "\ud800",
    "\N{PILE OF POO}",
    "'" * 1000,
    "' OR 1=1 --",
]


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_whatever_a_device_says_is_kept_as_data(text: str, registry: Registry) -> None:
    saw(registry, SIGHTING)
    strange = SIGHTING._replace(
        device=text, project=text, chip=text, version=text, sketch_md5=text, sdk=text, address=text
    )
    device = saw(registry, strange._replace(free_space=10**30))
    kept = clean(text)
    assert (device.id, device.project, device.chip, device.version) == (kept, kept, kept, kept)
    assert (device.image, device.sdk, device.address) == (kept, kept, kept)
    assert device.free_space == (1 << 63) - 1
    assert ids(registry, project=text) == ids(registry, text=text) == [kept]
    assert len(ids(registry)) == 2


def test_check_in_that_no_database_takes_stops_no_others(registry: Registry) -> None:
    registry.seen(SIGHTING._replace(at=1 << 70))
    with pytest.raises(OverflowError):
        registry.flush()
    saw(registry, SIGHTING)


# -- 2. Lists --------------------------------------------------------------------------------------


def test_list_is_by_id_of_a_project_and_in_pages(registry: Registry) -> None:
    for number in range(25):
        registry.seen(SIGHTING._replace(device=mac(number), project=f"p{number % 2}"))
    registry.flush()
    assert ids(registry) == [mac(number) for number in range(25)]
    assert ids(registry, project="p1") == [mac(number) for number in range(1, 25, 2)]
    assert [device.id for device in registry.devices(after=[mac(3)], limit=2)] == [mac(4), mac(5)]
    assert [device.id for device in registry.devices(Search("p1"), after=[mac(3)], limit=1)] == [
        mac(5)
    ]
    assert len(registry.devices(limit=0)) == 1
    assert registry.devices(after=[mac(24)]) == registry.devices(Search("p2")) == []


@pytest.mark.parametrize(
    "search",
    ["7F:12", "7f:12", "firm", "ESP8266", "1.0.0", "168.1.7", "kitchen", "Attic", "5CCF7F123456"],
)
def test_search_looks_at_all_that_is_known(search: str, registry: Registry) -> None:
    saw(registry, SIGHTING._replace(device="other", project="", chip="", version="", address=""))
    saw(registry, SIGHTING)
    registry.annotate(MAC, notes="In the Kitchen", labels=["attic"])
    assert ids(registry, text=search) == ids(registry, project="firmware", text=search) == [MAC]
    assert ids(registry, text=f"{search}?") == []


@pytest.mark.parametrize("search", ["%", "_", "!", "firmware%", "esp_266", "firmware\tesp9"])
def test_search_has_no_wild_cards(search: str, registry: Registry) -> None:
    saw(registry, SIGHTING)
    assert ids(registry, text=search) == []


SORTS = [f"{down}{by}" for by in ("id", "project", "version", "last_seen") for down in ("", "-")]
MIXED = [  # version, project, last seen; versions in the order of SemVer, twice each but the first
    ("", "b", 3), ("2 (as it says)", "a", 1), ("2 (as it says)", "a", 1), ("1.0.0-rc.1", "b", 2),
    ("1.9.0", "", 5), ("1.9.0", "b", 2), ("1.10.0", "a", 9), ("1.10.0", "c", 1), ("10.0.0", "a", 4),
]  # fmt: skip


@pytest.mark.parametrize("limit", [1, 2, 4, 1000])
@pytest.mark.parametrize("sort", SORTS)
def test_pages_of_every_order_have_each_device_once(
    sort: str, limit: int, registry: Registry
) -> None:
    for number, (version, project, at) in enumerate(MIXED):
        seen = SIGHTING._replace(device=mac(number), version=version, project=project, at=at)
        registry.seen(seen)
    registry.flush()
    search, found = Search(sort=sort), list[Device]()
    while page := registry.devices(search, search.place(found[-1]) if found else (), limit):
        found += page
    column = {"project": 1, "last_seen": 2}.get(sort.strip("-"))
    order = [("" if column is None else row[column], mac(n)) for n, row in enumerate(MIXED)]
    wanted = sorted(order, reverse=sort[0] == "-")
    assert [device.id for device in found] == [device for _, device in wanted]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"chip": "esp8266"}, "a"), ({"chip": "esp"}, ""), ({"version": "1.10.0"}, "b"),
        ({"version": "1.1"}, ""), ({"label": "attic"}, "ab"), ({"label": "Attic"}, ""),
        ({"label": "att"}, ""), ({"label": ", "}, ""), ({"label": 'x", "y'}, "b"),
        ({"label": "x"}, ""), ({"label": "%"}, ""), ({"label": "ä"}, "a"), ({"label": "\n"}, "a"),
        ({"label": "attic", "chip": "esp32c3", "project": "q", "text": "Q"}, "b"),
    ],
)  # fmt: skip
def test_list_is_narrowed_by_each_word_exactly(
    wanted: dict[str, str], found: str, registry: Registry
) -> None:
    saw(registry, SIGHTING._replace(device="a"))
    saw(registry, SIGHTING._replace(device="b", project="q", chip="esp32c3", version="1.10.0"))
    registry.annotate("a", labels=["attic", "ä", "\n"])
    registry.annotate("b", labels=["attic", 'x", "y'])
    for sort in SORTS:
        assert sorted(ids(registry, sort=sort, **wanted)) == list(found)


def test_what_a_thread_writes_in_its_transaction_belongs_to_it(registry: Registry) -> None:
    with suppress(ValueError), registry.writing():
        assert registry.admit("firmware", MAC)
        raise ValueError
    assert registry.admitted("firmware") == frozenset()
    with registry.writing():
        registry.admit("firmware", MAC)
        registry.admit("other", MAC)
    assert registry.admitted("firmware") == registry.admitted("other") == {MAC}


def test_admissions_are_listed_in_pages(registry: Registry) -> None:
    for number in range(5):
        registry.admit("firmware", mac(number))
        registry.admit("other", mac(9))
    assert registry.admissions("firmware", limit=3) == [mac(0), mac(1), mac(2)]
    assert registry.admissions("firmware", mac(2)) == [mac(3), mac(4)]
    assert registry.admissions("firmware", mac(4)) == registry.admissions("none") == []


def test_page_has_at_most_a_thousand(registry: Registry) -> None:
    for number in range(1005):
        registry.seen(SIGHTING._replace(device=mac(number)))
    registry.flush()
    assert len(registry.devices(limit=10**30)) == 1000


def test_notes_and_labels_are_set_alone_and_survive_check_ins(registry: Registry) -> None:
    saw(registry, SIGHTING)
    assert registry.annotate(MAC.lower(), notes="behind the fridge")
    assert registry.annotate(MAC, labels=["b", "a", "b"])
    device = saw(registry, SIGHTING)
    assert (device.notes, device.labels) == ("behind the fridge", ("a", "b"))
    assert registry.annotate(MAC, notes="", labels=[])
    assert saw(registry, SIGHTING).labels == ()
    assert not registry.annotate("nobody", notes="x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"notes": "x" * 4097},
        {"labels": [""]},
        {"labels": ["x" * 256]},
        {"labels": map(str, range(33))},
    ],
    ids=["long-notes", "empty-label", "long-label", "many-labels"],
)
def test_notes_and_labels_have_bounds(wrong: dict[str, object], registry: Registry) -> None:
    before = saw(registry, SIGHTING)
    with pytest.raises(ValueError, match="at most"):
        registry.annotate(MAC, **wrong)  # type: ignore[arg-type]
    assert registry.device(MAC) == before


def test_forgotten_device_comes_back_as_a_new_one(registry: Registry) -> None:
    saw(registry, SIGHTING)
    registry.annotate(MAC, notes="old")
    assert registry.forget(MAC.lower())
    assert registry.device(MAC) is None
    assert not registry.forget(MAC)
    assert saw(registry, SIGHTING._replace(at=NOW + 1)).notes == ""


# -- 3. Admission, and how many are remembered -----------------------------------------------------


def test_admission_is_of_a_project_and_needs_no_check_in(registry: Registry) -> None:
    assert registry.admit("firmware", "5ccf7f123456")
    assert not registry.admit("firmware", MAC)
    assert registry.admitted("firmware") == {MAC}
    assert registry.admitted("other") == frozenset()
    assert saw(registry, SIGHTING).admitted
    assert not saw(registry, SIGHTING._replace(project="other")).admitted
    assert registry.expel("firmware", MAC)
    assert not registry.expel("firmware", MAC)
    assert registry.admitted("firmware") == frozenset()


def test_admission_outlives_the_process_and_the_device(path: Path) -> None:
    with opened(path) as registry:
        saw(registry, SIGHTING)
        registry.admit("firmware", MAC)
        registry.forget(MAC)
    with opened(path) as registry:
        assert registry.admitted("firmware") == {MAC}


def test_admission_by_another_process_is_known_within_a_moment(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        other.admit("firmware", MAC)
        wait_until(lambda: one.admitted("firmware") == {MAC})
        other.expel("firmware", MAC)
        wait_until(lambda: not one.admitted("firmware"))


def test_of_too_many_devices_the_oldest_unknown_goes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path, max_devices=5) as registry:
        for number in range(5):
            registry.seen(SIGHTING._replace(device=mac(number), at=NOW + number))
        registry.flush()
        registry.admit("anything", mac(0))
        registry.annotate(mac(1), notes="mine")
        registry.annotate(mac(2), labels=["mine"])
        saw(registry, SIGHTING._replace(device=mac(9), at=NOW + 9))
        assert ids(registry) == [mac(number) for number in (0, 1, 2, 4, 9)]
        for number in range(100, 200):
            registry.seen(SIGHTING._replace(device=mac(number), at=NOW + number))
        registry.flush()
        assert ids(registry) == [mac(number) for number in (0, 1, 2, 198, 199)]
    assert [record.getMessage() for record in caplog.records] == [
        "max-devices 5 is reached: unknown ones are forgotten"
    ]


def test_known_devices_never_go(path: Path) -> None:
    with opened(path, max_devices=3) as registry:
        for number in range(5):
            registry.admit("firmware", mac(number))
            registry.seen(SIGHTING._replace(device=mac(number)))
        registry.seen(SIGHTING._replace(device=mac(9)))
        registry.flush()
        assert ids(registry) == [mac(number) for number in range(5)]


# -- 4. The other tables ---------------------------------------------------------------------------


def test_table_of_the_two_step_protocol(registry: Registry) -> None:
    first, second = App("5ccf7f123456", "1.0", "a.bin"), App("Pump", "2.0", "b/c.bin")
    registry.put_app(second)
    registry.put_app(first)
    assert registry.apps() == [first, second]
    registry.put_app(replace(first, app_ver="1.1"))
    assert registry.app("5ccf7f123456") == replace(first, app_ver="1.1")
    assert registry.app(MAC) is None  # the ids of this protocol are not ours
    assert registry.delete_app("Pump")
    assert not registry.delete_app("Pump")
    assert len(registry.apps()) == 1


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_whatever_stands_in_a_request_is_data(text: str, registry: Registry) -> None:
    kept = clean(text, 4096)
    saw(registry, SIGHTING)
    bystander = App("bystander", "1", "x")
    registry.put_app(bystander)
    registry.put_app(App(text, text, text))
    assert registry.app(text) == App(kept, kept, kept)
    registry.admit(text, text)
    assert registry.admitted(clean(text)) == {clean(text)}
    assert registry.expel(text, text)
    Ledger(registry).add_token(token(text, text, text, text), text)
    assert Ledger(registry).tokens() == [token(kept[:255], kept[:255], kept[:255], kept[:255], 1)]
    registry.annotate(MAC, notes=text, labels=[text[:255]])
    Ledger(registry).audit(text, text, text, NOW)
    assert not registry.annotate(text, notes="")
    assert not registry.forget(text)
    assert registry.devices(Search(text, text), [text]) == []
    assert registry.delete_app(text)
    assert registry.apps() == [bystander]
    assert Ledger(registry).verify_audit()
    device = registry.device(MAC)
    assert device is not None
    assert (device.notes, device.labels) == (kept, (clean(text),))


# -- 5. Who waits for whom -------------------------------------------------------------------------


def is_held(lock: threading.RLock) -> bool:
    """Whether another thread holds it."""
    free = lock.acquire(blocking=False)
    if free:
        lock.release()
    return not free


def test_nobody_but_a_writer_waits_for_another_writer(path: Path) -> None:
    with opened(path) as registry, by_hand(path) as other:
        saw(registry, SIGHTING)
        registry.admit("firmware", MAC)
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE device SET version = '6.6.6'")
        writer = threading.Thread(target=registry.forget, args=("nobody",))
        writer.start()
        wait_until(lambda: is_held(registry._lock))
        began = time.perf_counter()
        for number in range(10_000):
            registry.seen(SIGHTING._replace(device=mac(number)))
        assert registry.devices()[0].version == "1.0.0"
        assert registry.device(MAC) is not None
        assert registry.admitted("firmware") == {MAC}
        assert Ledger(registry).audit_log() == []
        assert time.perf_counter() - began < schema.WAIT / 2
        assert writer.is_alive()  # it has waited all the time
        other.execute("ROLLBACK")
        writer.join(10)
        registry.flush()
        assert len(registry.devices(after=[mac(8999)], limit=1000)) >= 1000


def test_few_wait_for_a_locked_file_and_none_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "WAIT", 1.0)
    gone: list[float] = []

    def write() -> None:
        with pytest.raises(sqlite3.OperationalError) as caught:
            registry.admit("firmware", MAC)
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
        gone.append(time.monotonic() - began)

    with opened(path) as registry, by_hand(path) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with ThreadPoolExecutor(32) as pool:
            for done in [pool.submit(write) for _ in range(32)]:
                done.result()
        other.execute("ROLLBACK")
        assert sum(seconds < 0.9 for seconds in gone) >= 32 - 1 - registry_module.MAX_WAITING - 1
        assert max(gone) < 5.0
        assert registry.admit("firmware", MAC)


READ = """
import sys
from ota_fleet.registry import Registry
registry = Registry(sys.argv[1])
for _ in range(int(sys.argv[2])):
    versions = {device.version for device in registry.devices(limit=1000)}
    assert len(versions) == 1, versions
print("calm", flush=True)
registry.close()
"""


def test_readers_see_whole_batches_while_they_are_written(registry: Registry, path: Path) -> None:
    broken: list[object] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                assert len({device.version for device in registry.devices(limit=1000)}) == 1
        except BaseException as err:  # noqa: BLE001 - told by the test
            broken.append(err)

    def write(version: int) -> None:
        with registry._lock:  # in the middle of this the thread would begin a batch
            for number in range(300):
                registry.seen(SIGHTING._replace(device=mac(number), version=str(version)))
        registry.flush()

    write(0)
    command = [sys.executable, "-c", READ, str(path), "40"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    version = 0
    while process.poll() is None or version < 20:
        version += 1
        write(version)
    done.set()
    for thread in threads:
        thread.join(10)
    assert process.communicate()[0] == "calm\n"
    assert (process.returncode, broken) == (0, [])


def test_check_ins_are_written_without_anybody_asking(registry: Registry) -> None:
    registry.seen(SIGHTING)
    wait_until(lambda: registry.device(MAC) is not None)


def test_locked_file_delays_check_ins_and_is_told_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as registry, by_hand(path) as other:
        registry._often.execute("PRAGMA busy_timeout = 1")
        other.execute("BEGIN IMMEDIATE")
        registry.seen(SIGHTING)
        wait_until(lambda: "cannot be written" in caplog.text)
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                registry.flush()
        registry.seen(SIGHTING._replace(downloaded=True))
        other.execute("ROLLBACK")
        wait_until(lambda: "written again" in caplog.text)
        assert saw(registry, SIGHTING).downloads == 1
    assert caplog.text.count("cannot be written") == 1


def test_full_disk_loses_nothing_that_was_written(path: Path) -> None:
    with opened(path) as registry:
        saw(registry, SIGHTING)
        for connection in (registry._often, registry._surely):
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")
        for number in range(1000):
            registry.seen(SIGHTING._replace(device=mac(number)))
        with pytest.raises(sqlite3.OperationalError, match="full"):
            registry.flush()
        with pytest.raises(sqlite3.OperationalError, match="full"):
            registry.put_app(App("x", "1", "y" * 4096))
        assert ids(registry) == [MAC]
        for connection in (registry._often, registry._surely):
            connection.execute("PRAGMA max_page_count = 1000000")
        registry.flush()
        assert len(ids(registry)) == 1000
    assert_sound(path)


def test_queue_is_bounded_and_keeps_the_newest(path: Path) -> None:
    most = registry_module.MAX_QUEUED
    with opened(path, max_devices=most * 2) as registry, registry._lock:
        for number in range(most + 500):
            registry.seen(SIGHTING._replace(device=mac(number)))
        (pending,) = registry._pending
        assert len(pending.queue) <= most
        assert pending.queue[-1].device == mac(most + 499)


def test_closing_writes_what_is_queued(path: Path) -> None:
    registry = Registry(path)
    registry.seen(SIGHTING)
    registry.close()
    registry.close()
    with pytest.raises(RuntimeError, match="closed"):
        registry.device(MAC)
    assert sorted(os.listdir(path.parent)) == ["fleet.db"]  # all is in the one file
    with opened(path) as again:
        assert ids(again) == [MAC]


def test_closing_ends_even_if_the_file_is_locked(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(path)
    registry._often.execute("PRAGMA busy_timeout = 1")
    with by_hand(path) as other:
        other.execute("BEGIN IMMEDIATE")
        registry.seen(SIGHTING)
        registry.close()
    assert "the last check-ins are lost" in caplog.text
    assert not registry._thread.is_alive()


def test_connections_of_readers_do_not_pile_up(registry: Registry) -> None:
    barrier = threading.Barrier(20)

    def read() -> None:
        with registry.reading() as connection:
            barrier.wait(10)
            connection.execute("SELECT 1").fetchall()

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(registry._idle) <= registry_module.MAX_IDLE


def test_reading_connection_cannot_write(registry: Registry) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        registry.rows("DELETE FROM device")


# -- 6. A model of it ------------------------------------------------------------------------------

DEVICES = st.sampled_from([MAC, "5ccf7f123456", "pump", "door", "x'--", "%"])
PROJECTS = st.sampled_from(["", "a", "b", "_"])
TEXTS = st.sampled_from(["", "1.0.0", "esp8266", "some ESP32", "A", "%"])


class Fleet(RuleBasedStateMachine):
    """The registry beside dictionaries, which have no batches, files or statements."""

    most = 4

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = NOW
        self.model: dict[str, Device] = {}
        self.admissions: set[tuple[str, str]] = set()
        self.registry = Registry(self.folder / "fleet.db", max_devices=self.most)

    def teardown(self) -> None:
        """Ends the example."""
        self.registry.close()
        shutil.rmtree(self.folder)

    def known(self, device: Device) -> bool:
        """Somebody admitted it or wrote a note on it."""
        admitted = any(device.id == each for _, each in self.admissions)
        return admitted or bool(device.notes or device.labels)

    @rule(
        device=DEVICES, project=PROJECTS, chip=TEXTS, version=TEXTS, image=TEXTS, got=st.booleans()
    )
    def check_in(
        self, device: str, project: str, chip: str, version: str, image: str, *, got: bool
    ) -> None:
        """A device asks."""
        self.now += 1
        said = Sighting(device, project, chip, version, None, image, None, "", "", self.now, got)
        self.registry.seen(said)
        self.registry.flush()
        new = Device(
            normal_id(device), project, chip, version, image, None, "", "", self.now, self.now, got,
            "", (), "", admitted=False,
        )  # fmt: skip
        old = self.model.get(new.id)
        if old is not None:
            same = project in ("", old.project)
            keep = same and version in ("", old.version)
            vague = not chip or (chip.startswith("some ") and old.chip)
            new = replace(
                old,
                project=project or old.project,
                chip=old.chip if vague else chip,
                version=old.version if same and not version else version,
                image=old.image if keep and not image else image,
                last_seen=self.now,
                downloads=old.downloads + got,
            )
        self.model[new.id] = new
        strangers = [each for each in self.model.values() if not self.known(each)]
        for each in sorted(strangers, key=lambda each: each.last_seen)[
            : max(0, len(self.model) - self.most)
        ]:
            del self.model[each.id]

    @rule(device=DEVICES, project=PROJECTS)
    def admit(self, device: str, project: str) -> None:
        """Somebody lets it in."""
        new = (project, normal_id(device)) not in self.admissions
        assert self.registry.admit(project, device) == new
        self.admissions.add((project, normal_id(device)))

    @rule(device=DEVICES, project=PROJECTS)
    def expel(self, device: str, project: str) -> None:
        """Somebody does not let it in any more."""
        was = (project, normal_id(device)) in self.admissions
        assert self.registry.expel(project, device) == was
        self.admissions.discard((project, normal_id(device)))

    @rule(device=DEVICES, notes=st.none() | TEXTS, labels=st.none() | st.lists(st.just("x")))
    def annotate(self, device: str, notes: str | None, labels: list[str] | None) -> None:
        """Somebody writes something down."""
        old = self.model.get(normal_id(device))
        assert self.registry.annotate(device, notes=notes, labels=labels) == (old is not None)
        if old is not None:
            notes = old.notes if notes is None else notes
            kept = old.labels if labels is None else tuple(sorted(set(labels)))
            self.model[old.id] = replace(old, notes=notes, labels=kept)

    @rule(device=DEVICES)
    def forget(self, device: str) -> None:
        """Somebody deletes it."""
        was = self.model.pop(normal_id(device), None)
        assert self.registry.forget(device) == (was is not None)

    @precondition(lambda self: self.model)
    @rule()
    def restart(self) -> None:
        """The server is started again."""
        self.registry.close()
        self.registry = Registry(self.folder / "fleet.db", max_devices=self.most)

    @invariant()
    def lists_are_those_of_the_model(self) -> None:
        """Whole, by project, searched, in pages, one by one."""
        wanted = [
            replace(each, admitted=(each.project, each.id) in self.admissions)
            for _, each in sorted(self.model.items())
        ]
        assert self.registry.devices() == wanted
        for project in ("a", "_"):
            assert self.registry.devices(Search(project)) == [
                each for each in wanted if each.project == project
            ]
            ids = {device for name, device in self.admissions if name == project}
            assert self.registry.admitted(project) == ids
        assert self.registry.devices(Search(text="%")) == [
            each
            for each in wanted
            if "%" in (each.id + each.chip + each.version + each.notes + each.project)
        ]
        paged: list[Device] = []
        while page := self.registry.devices(after=[paged[-1].id] if paged else (), limit=2):
            paged += page
        assert paged == wanted
        assert [self.registry.device(each.id) for each in wanted] == wanted


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# -- 7. The file -----------------------------------------------------------------------------------


def test_file_is_for_its_owner_only(path: Path) -> None:
    old = os.umask(0)
    try:
        with opened(path) as registry:
            saw(registry, SIGHTING)
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
            assert modes == {"fleet.db": 0o600, "fleet.db-wal": 0o600, "fleet.db-shm": 0o600}
            registry.backup(path.with_name("copy"))
            assert stat.S_IMODE(path.with_name("copy").stat().st_mode) == 0o600
        path.chmod(0o644)
        with opened(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of somebody for whom the modes of files hold, who runs the test."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                os.seteuid(0)
        else:
            yield Path(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_backup_that_was_kept_read_only_can_be_copied_back(unprivileged: Path) -> None:
    path = unprivileged / "fleet.db"
    five_entries(path)
    path.chmod(0o400)
    with opened(path) as registry:
        registry.admit("firmware", MAC)
        modes = {each.name: each.stat().st_mode & 0o777 for each in unprivileged.iterdir()}
    assert modes == dict.fromkeys(("fleet.db", "fleet.db-wal", "fleet.db-shm"), 0o600)


def test_half_made_registry_of_a_kill_is_swept(path: Path) -> None:
    path.with_name("fleet.db.new").write_bytes(b"half")
    path.with_name("fleet.db.new-wal").write_bytes(b"half")
    with opened(path) as registry:
        assert ids(registry) == []
    assert os.listdir(path.parent) == ["fleet.db"]


BEGIN = """
import sys
from ota_fleet.registry import Registry
sys.stdin.readline()
registry = Registry(sys.argv[1])
registry.admit("p", sys.argv[2])
registry.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
@pytest.mark.parametrize("version", [0, 1], ids=["make", "migrate"])
def test_processes_that_start_at_once_have_one_registry(version: int, path: Path) -> None:
    if version:
        older(path, version)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(path), str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 6
    with opened(path) as registry:
        assert registry.admitted("p") >= set(map(str, range(6)))
    assert os.listdir(path.parent) == ["fleet.db"]


# What each script made room for, as its release wrote it.
FIRST = Entry(1, NOW, "ada", "upload", "x")
ROWS: dict[int, list[tuple[str, tuple[object, ...]]]] = {
    1: [
        (
            "INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (MAC, "p", "esp8266", "1.0.0", MD5, 7, "2", "::", NOW, NOW, 3, "mine", '["a"]'),
        ),
        ("INSERT INTO admission VALUES (?, ?)", ("p", MAC)),
    ],
    2: [("INSERT INTO device_app VALUES (?, ?, ?)", ("Pump", "1.0", "a.bin"))],
    3: [("INSERT INTO token VALUES (?, ?, ?, ?, ?)", (7, "CI", "publisher", "p", SHA256))],
    4: [
        ("INSERT INTO audit VALUES (1, ?, 'ada', 'upload', 'x', ?)", (NOW, FIRST.follows(""))),
        ("UPDATE audit_head SET number = 1, digest = ?", (FIRST.follows(""),)),
    ],
    5: [("INSERT INTO stored_file VALUES (?, ?, ?, ?)", ("a.bin", SHA256, MD5, 7))],
    6: [
        ("INSERT INTO account VALUES (3, ?, 'admin', 'scrypt', ?)", ("ada@example.org", NOW)),
        ("INSERT INTO session VALUES (?, 3, ?, ?)", (SHA256, NOW, NOW + 1)),
    ],
    7: [
        ("INSERT INTO project VALUES ('p', '[]', ?)", (NOW,)),
        ("INSERT INTO alias VALUES ('old', 'p')", ()),
        (
            "INSERT INTO release VALUES ('p', '1.0.0', 'sketch', 'esp8266', 0, 'p-1.0.0.bin', "
            "?, ?, 7, '', ?, 'ada')",
            (SHA256, MD5, NOW),
        ),
        ("INSERT INTO withdrawal VALUES ('p', ?, ?, 'ada', 'it loops')", (SHA256, NOW)),
    ],
    8: [
        ("INSERT INTO tally VALUES (?, 'p', 7, 3)", (NOW // 3600,)),
        ("INSERT INTO spread VALUES (?, 'p', '1.0.0', 1)", (NOW // 86400,)),
        (
            "INSERT INTO visit VALUES (1, ?, ?, 'p', '1.0.0', '', 'not-newer', 'It is.')",
            (MAC, NOW),
        ),
        ("INSERT INTO draft VALUES (1, ?, 'a.bin', 'ada', ?)", (SHA256, NOW)),
        ("UPDATE project SET partition_size = 1310720, admit = 'open'", ()),
    ],
    9: [("UPDATE device SET channel = 'beta'", ())],
    10: [("UPDATE device SET team = 'attic', interval = 3600", ())],
}


def older(path: Path, version: int) -> None:
    """A registry as the release that knew only the first scripts left it."""
    with by_hand(path) as connection:
        for number in range(1, version + 1):
            connection.executescript(SCRIPTS[number - 1])
            for statement, values in ROWS[number]:
                connection.execute(statement, values)
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)


@pytest.mark.parametrize("version", range(1, len(SCRIPTS) + 1))
def test_registry_of_every_earlier_release_is_brought_up_to_date(version: int, path: Path) -> None:
    older(path, version)
    for _ in range(2):
        with opened(path) as registry:
            device = registry.device(MAC)
            assert device is not None
            assert (device.downloads, device.labels, device.admitted) == (3, ("a",), True)
            assert device.channel == Assignments(registry).policy(MAC, "").channel
            assert device.channel == "beta" * (version >= 9)
            assert [app.device_id for app in registry.apps()] == ["Pump"][: version >= 2]
            assert [token.id for token in Ledger(registry).tokens()] == [7][: version >= 3]
            assert len(Ledger(registry).audit_log()) == (version >= 4)
            assert len(registry.file_digests()) == (version >= 5)
            assert Ledger(registry).verify_audit()
    with by_hand(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(SCRIPTS),)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_every_script_has_its_rows_and_its_number() -> None:
    assert list(ROWS) == list(range(1, len(SCRIPTS) + 1))
    for number, script in enumerate(SCRIPTS, 1):
        assert script.startswith("\nBEGIN IMMEDIATE;")
        assert script.endswith(f"PRAGMA user_version = {number};\nCOMMIT;\n")


def test_script_that_fails_leaves_the_registry_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    five_entries(path)
    before = path.read_bytes()
    bad = "BEGIN IMMEDIATE; DELETE FROM audit; INSERT INTO nowhere VALUES (1); COMMIT;"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCRIPTS", (*SCRIPTS, bad))
        with pytest.raises(RuntimeError, match="no such table: nowhere"):
            Registry(path)
    assert path.read_bytes() == before
    with opened(path) as registry:
        assert Ledger(registry).verify_audit()


def test_migration_that_cannot_be_written_is_no_damage(path: Path) -> None:
    older(path, 2)
    with by_hand(path) as other:
        other.execute("BEGIN IMMEDIATE")
        before = path.read_bytes()
        with pytest.raises(RuntimeError, match="cannot be opened: database is locked"):
            Registry(path)
        assert path.read_bytes() == before
    with opened(path) as registry:
        assert len(registry.apps()) == 1


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(20_000))  # noqa: S311 - the same every time


def stub(path: Path) -> None:
    os.truncate(path, 50)


def no_magic(path: Path) -> None:
    path.write_bytes(b"s" + path.read_bytes()[1:])


def no_page_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:16] + b"\x33\x33" + path.read_bytes()[18:])


def torn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    path.write_bytes(data)


def by_statement(statement: str) -> Callable[[Path], None]:
    """What another program does to it."""

    def change(path: Path) -> None:
        with by_hand(path) as connection:
            connection.executescript(statement)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    return change


def of_others(path: Path) -> None:
    path.unlink()
    with by_hand(path) as connection:
        connection.execute("CREATE TABLE device_app (device_id TEXT PRIMARY KEY)")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "damaged"),
    "emptied": (emptied, "is empty"),
    "garbage": (garbage, "no SQLite file"),
    "stub": (stub, "damaged"),
    "magic": (no_magic, "no SQLite file"),
    "page-size": (no_page_size, "damaged"),
    "torn": (torn, "damaged"),
    "foreign": (of_others, "of another program"),
    "newer": (by_statement("PRAGMA user_version = 99"), "written by a newer ota-server"),
    "version-lost": (by_statement("PRAGMA user_version = 0"), "damaged"),
    "version-negative": (by_statement("PRAGMA user_version = -3"), "damaged"),
    "version-lower": (by_statement("PRAGMA user_version = 3"), "already exists"),
    "table-lost": (by_statement("DROP TABLE token"), r"token \w+ is missing"),
    "index-lost": (by_statement("DROP INDEX device_by_age"), "device_by_age is missing"),
    "column-renamed": (
        by_statement("ALTER TABLE audit RENAME who TO whom"),
        "audit who is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_registry_is_refused_and_left_as_it_is(name: str, path: Path) -> None:
    damage, sentence = DAMAGES[name]
    five_entries(path)
    damage(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=sentence) as caught:
            Registry(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_every_truncation_is_refused(path: Path) -> None:
    five_entries(path)
    with opened(path) as registry:  # the last page ends with something, too
        saw(registry, SIGHTING)
        registry.annotate(MAC, group="attic")
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 1777):
        path.write_bytes(whole[:size])
        with pytest.raises(RuntimeError, match="damaged"):
            Registry(path)
        assert path.read_bytes() == whole[:size]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_flipped_bit_does_more_than_refuse(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.db"
        five_entries(path)
        flipped = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, 99) | st.integers(0, len(flipped) - 1))
        flipped[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
        try:
            with opened(path):
                pass
        except RuntimeError as err:
            assert str(path) in str(err)  # noqa: PT017 - it may be raised
            assert path.read_bytes() == flipped


def test_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(RuntimeError, match="is no file"):
        Registry(path)
    assert path.is_dir()


def test_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be opened: No such file"):
        Registry(tmp_path / "typo" / "fleet.db")
    assert os.listdir(tmp_path) == []


def test_link_that_leads_nowhere_is_refused(path: Path) -> None:
    path.symlink_to("nowhere")
    with pytest.raises(RuntimeError, match="cannot be opened: No such file"):
        Registry(path)
    assert path.is_symlink()


def test_registry_that_vanished_under_its_log_is_not_made_anew(path: Path) -> None:
    path.with_name("fleet.db-wal").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"it is gone, but its fleet\.db-wal is there"):
        Registry(path)
    assert os.listdir(path.parent) == ["fleet.db-wal"]


OPEN = "import sys; from ota_fleet.registry import Registry; Registry(sys.argv[1])"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_unreadable_registry_is_refused(path: Path) -> None:
    five_entries(path)
    path.chmod(0)
    before = path.stat()
    code = f"{OPEN}"
    if os.geteuid() == 0:  # whom no mode stops
        code = f"import os, ota_fleet.registry; os.setgid(65534); os.setuid(65534); {OPEN}"
    for folder in (path.parent, *path.parent.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (
        f"RuntimeError: the registry {path} cannot be opened: Operation not permitted"
        in done.stderr
    )
    assert path.stat().st_mtime_ns == before.st_mtime_ns


# -- 8. Copies and kills ---------------------------------------------------------------------------


def test_backup_while_others_write_is_sound(path: Path) -> None:
    done = threading.Event()
    written: list[int] = []

    def write(registry: Registry) -> None:
        while not done.is_set():
            for number in range(200):
                registry.seen(SIGHTING._replace(device=mac(number)))
            Ledger(registry).audit("ada", "upload", "x" * 100, NOW)
            written.append(1)
            registry.flush()

    with opened(path) as registry:
        thread = threading.Thread(target=write, args=(registry,))
        thread.start()
        try:
            for number in range(10):
                wait_until(lambda least=number * 3: len(written) > least)  # type: ignore[misc]
                before = len(written)
                copy = path.with_name(f"copy{number % 2}")  # the old one is replaced
                registry.backup(copy)
                with opened(copy) as restored:
                    assert len(Ledger(restored).audit_log(limit=1000)) >= before
                    assert Ledger(restored).verify_audit()
        finally:
            done.set()
            thread.join(10)
    assert not list(path.parent.glob("*.part*"))


def test_backup_never_takes_the_place_of_the_registry(path: Path) -> None:
    with opened(path) as registry:
        saw(registry, SIGHTING)
        link = path.with_name("link")
        link.symlink_to(path)
        for file in (path, link):
            with pytest.raises(RuntimeError, match="the registry itself"):
                registry.backup(file)
        assert ids(registry) == [MAC]


def test_backup_that_fails_leaves_the_old_one(path: Path) -> None:
    with opened(path) as registry:
        saw(registry, SIGHTING)
        folder = path.with_name("folder")
        folder.mkdir()
        with pytest.raises(IsADirectoryError):
            registry.backup(folder)
        with pytest.raises(FileNotFoundError):
            registry.backup(path.with_name("nowhere") / "copy")
    assert sorted(os.listdir(path.parent)) == ["fleet.db", "folder"]


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("DELETE FROM sqlite_master WHERE name = 'device_by_age'", RuntimeError),
        ("UPDATE sqlite_master SET rootpage = 3 WHERE name LIKE 'device%'", sqlite3.DatabaseError),
    ],
    ids=["unsound", "unreadable"],
)
def test_rotten_backup_does_not_replace_the_old_one(
    statement: str, error: type[Exception], path: Path
) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(b"old")
    with opened(path) as registry:
        saw(registry, SIGHTING)
        with by_hand(path) as connection:
            connection.execute("PRAGMA writable_schema = 1")
            connection.execute(statement)
        with pytest.raises(error, match=r"damaged|malformed"):
            registry.backup(copy)
    assert sorted(os.listdir(path.parent)) == ["copy", "fleet.db"]
    assert copy.read_bytes() == b"old"


WORK = """
import sys
from ota_fleet.ledger import Ledger
from ota_fleet.registry import App, Registry, Sighting
from ota_fleet.rows import Token
registry, start = Registry(sys.argv[1]), int(sys.argv[2])
ledger = Ledger(registry)
for n in range(start, start + 100_000):
    for each in range(50):
        device = f"device-{each}"
        registry.seen(Sighting(device, "p", None, str(n), "", "", n, "", "::", n, True))
    registry.admit("p", f"device-{n}")
    registry.put_app(App(f"app-{n}", str(n), "x"))
    ledger.add_token(Token(0, str(n), "device", "", f"digest-{n}", "", n), "ada")
    ledger.audit("ada", "admit", str(n), n)
    print(n, flush=True)
    if n % 7 == 0:
        registry.flush()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9")
def test_kill_at_any_moment_loses_nothing_that_was_acknowledged(path: Path) -> None:
    chance, last = random.Random(5), 0  # noqa: S311 - the same every time
    for _ in range(20):
        command = [sys.executable, "-c", WORK, str(path), str(last + 1)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as told:
            for _ in range(chance.randrange(1, 40)):
                last = int(told.readline())
            process.kill()
            last = max([last, *map(int, re.findall(r"\d+(?=\n)", told.read()))])
        process.wait()
        with opened(path) as registry:
            numbers = set(range(1, last + 1))
            assert {f"device-{n}" for n in numbers} <= registry.admitted("p")
            assert {f"app-{n}" for n in numbers} <= {app.device_id for app in registry.apps()}
            assert {str(n) for n in numbers} <= {token.name for token in Ledger(registry).tokens()}
            entries: list[Entry] = []
            while page := Ledger(registry).audit_log(len(entries), 1000):
                entries += page
            assert {str(n) for n in numbers} <= {entry.what for entry in entries}
            assert Ledger(registry).verify_audit()
            for app in registry.apps():  # what was not acknowledged may be there: clear it
                if int(app.app_ver) > last:
                    registry.delete_app(app.device_id)
            for token in Ledger(registry).tokens():
                if int(token.name) > last:
                    Ledger(registry).revoke_token(token.id, "ada", NOW)
        assert_sound(path)


# -- 9. Many devices -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """10,000 devices of 20 projects."""
    with opened(tmp_path_factory.mktemp("many") / "fleet.db") as registry:
        for number in range(10_000):
            project = f"p{number % 20}"
            registry.seen(SIGHTING._replace(device=mac(number), project=project, at=NOW + number))
        registry.flush()
        yield registry


def quickest(work: Callable[[], object]) -> float:
    """Seconds that it takes when nobody else is at work: the best of a few."""

    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(once() for _ in range(7))


def test_page_costs_the_same_wherever_it_is(many: Registry) -> None:
    whole = quickest(
        lambda: [many.devices(after=[mac(n)], limit=1000) for n in range(0, 9999, 1000)]
    )
    for project, search, after in (
        ("", "", ()),
        ("", "", [mac(9000)]),
        ("p7", "", ()),
        ("p7", "", [mac(7000)]),
        ("", "7F:00", ()),
    ):
        page = functools.partial(many.devices, Search(project, search), after)
        assert len(page()) == 100
        assert quickest(page) < whole / 10  # of 100 pages that size, this is one
    assert quickest(lambda: many.device(mac(5000))) < whole / 100


def test_search_that_finds_nothing_is_quicker_than_reading_all(many: Registry) -> None:
    whole = quickest(
        lambda: [many.devices(after=[mac(n)], limit=1000) for n in range(0, 9999, 1000)]
    )
    assert quickest(lambda: many.devices(Search(text="nowhere"))) < whole * 2
    assert quickest(lambda: many.devices(Search("p7", "nowhere"))) < whole / 4


_SORTED = searches.SORTED
_PAGE = searches.DEVICES + searches.FOUND
_OF_P7 = searches.DEVICES + searches.OF_PROJECT + searches.FOUND


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (_PAGE + "".join(_SORTED["id"]), "PRIMARY KEY|sqlite_autoindex_device_1"),
        (_PAGE + "".join(_SORTED["-id"]), "PRIMARY KEY|sqlite_autoindex_device_1"),
        (_PAGE + "".join(_SORTED["project"]), "device_by_project"),
        (_PAGE + "".join(_SORTED["-last_seen"]), "device_by_age"),
        (_OF_P7 + "".join(_SORTED["id"]), "device_by_project"),
        (searches.DEVICES + "id = ?", "sqlite_autoindex_device_1"),
        (CROWD_OUT, "device_by_age"),
        (CROWD_OUT, "admission_by_device"),
        (registry_module._APPS + "WHERE device_id = ?", "sqlite_autoindex_device_app_1"),
        (ledger_module._TOKENS + "WHERE digest = ?", "sqlite_autoindex_token_1"),
        (ledger_module._ENTRIES, "sqlite_autoindex_audit_1"),
    ],
)
def test_statement_uses_its_index(statement: str, index: str, many: Registry) -> None:
    values = [""] * statement.count("?")
    plan = "\n".join(row[3] for row in many.rows("EXPLAIN QUERY PLAN " + statement, *values))
    assert re.search(index, plan), plan
    assert "TEMP B-TREE" not in plan


def test_check_in_costs_its_caller_next_to_nothing(many: Registry) -> None:
    sightings = [SIGHTING._replace(device=mac(number)) for number in range(10_000)]

    def tell() -> None:
        for sighting in sightings:
            many.seen(sighting)

    def write() -> None:
        tell()
        many.flush()

    assert quickest(tell) < quickest(write) / 5


# -- 10. The house ---------------------------------------------------------------------------------

SQL = re.compile(
    r"\b(SELECT\b.+\bFROM|INSERT INTO|UPDATE\b.+\bSET|DELETE FROM|PRAGMA)\b", re.DOTALL
)


def test_all_sql_is_in_the_registry_its_schema_and_the_table_of_files() -> None:
    rooms = [*(ROOT / "ota_fleet").glob("*.py"), ROOT / "ota_server.py"]
    speaking = set()
    for room in rooms:
        tree = ast.parse(room.read_text())
        words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        if any(isinstance(word, str) and SQL.search(word) for word in words):
            speaking.add(room.name)
        if re.search(r"^\s*(import|from) sqlite3", room.read_text(), re.MULTILINE):
            speaking.add(room.name)
    assert speaking == SQL_ROOMS


def test_registry_has_no_clock() -> None:
    for name in ("files.py", "history.py", "registry.py", "rows.py", "schema.py", "stock.py"):
        text = (ROOT / "ota_fleet" / name).read_text()
        stopwatch = "from time import monotonic\n"  # tells no time of day
        text = text.replace(stopwatch, "")
        assert not re.search(r"import (time|datetime)|from (time|datetime)", text)
        assert not re.search(r"CURRENT_|strftime|unixepoch|datetime\(", text)


def test_values_of_an_entry_are_exported_as_they_were_signed(registry: Registry) -> None:
    Ledger(registry).audit("ada", "upload", "x", NOW)
    entry = Ledger(registry).audit_log()[0]
    again = Entry(**json.loads(json.dumps({
        "number": entry.number, "at": entry.at, "who": entry.who, "action": entry.action,
        "what": entry.what,
    })))  # fmt: skip
    assert again.follows("") == entry.digest
