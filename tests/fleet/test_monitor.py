"""/metrics and /readyz: what they say, to whom, and what they cost."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import ota_server
from ota_fleet import Known, remember
from ota_fleet import hooks as hooks_module
from ota_fleet import monitor as monitor_module
from ota_fleet import registry as registry_module
from ota_fleet.accounts import Accounts
from ota_fleet.history import DAY, History
from ota_fleet.hooks import Hooks
from ota_fleet.ledger import Ledger
from ota_fleet.monitor import (
    BOUNDS,
    KIND,
    MAX_PROJECTS,
    MAX_VERSIONS,
    OTHER,
    Counters,
    Family,
    Monitor,
    Sources,
    folded,
    gauge,
)
from ota_fleet.registry import Registry
from ota_fleet.rollout import STATES
from ota_server import Event, Image, Site, Transfer
from tests.conftest import put, site_of, wait_until
from tests.core.test_access import ask, basic, bearer, text_of
from tests.core.wire import request, standing
from tests.data.make_images import esp8266_image
from tests.devices import Esp8266
from tests.fleet.test_api import EMAIL, PASSWORD, House
from tests.fleet.test_api import furnished as furnished  # noqa: PLC0414 - fixtures
from tests.fleet.test_api import house as house  # noqa: PLC0414
from tests.fleet.test_api import opened as furnish
from tests.fleet.test_fleet import fleet, remembering
from tests.fleet.test_history import decided
from tests.fleet.test_registry import by_hand, mac, opened, quickest
from tests.test_house import ROOT

NOW = 1_700_000_000  # UTC seconds
TOKEN = "tok"  # noqa: S105
Values = dict[tuple[str, ...], float]  # by name and the labels' values


def parsed(text: str) -> dict[str, Metric]:
    """What Prometheus' own client reads."""
    found = [*text_string_to_metric_families(text)]
    assert len({each.name for each in found}) == len(found)
    return {each.name: each for each in found}


def values_of(text: str) -> Values:
    """All samples; none comes twice."""
    samples = [sample for family in parsed(text).values() for sample in family.samples]
    found = {(each.name, *each.labels.values()): each.value for each in samples}
    assert len(found) == len(samples)
    return found


def lines_of(*families: Family) -> str:
    """As they are written."""
    return "".join(line for family in families for line in family.lines())


def scrape(site: Site) -> Values:
    """What a site whose --token is TOKEN says."""
    reply = ask(site, "/metrics", bearer(TOKEN))
    assert (reply.status, dict(reply.headers)["Content-Type"]) == (200, KIND)
    return values_of(text_of(reply))


class Watch(NamedTuple):
    """A monitor over a registry, and a site that has its routes only."""

    site: Site
    registry: Registry
    known: Known
    history: History
    monitor: Monitor
    hooks: Hooks
    attempts: dict[str, int]
    rollouts: dict[str, int]

    def see(self, *events: Event, at: int = NOW) -> None:
        """Devices ask, and it is written."""
        for event in events:
            self.monitor.note(event)
            remember(self.known, self.history, str, event, functools.partial(float, at))
        self.registry.flush()

    def values(self, name: str) -> Values:
        """The samples of one name, by the labels' values."""
        return {key[1:]: value for key, value in scrape(self.site).items() if key[0] == name}


def own_name(project: str) -> str:
    """A project's name for its only alias."""
    return "lamp" if project == "bulb" else project


def watching(registry: Registry, folder: Path, now: int = NOW) -> Watch:
    """A monitor over a registry, at a time."""
    site = site_of(folder, token=TOKEN)
    history, hooks = History(registry), Hooks(registry, site.catalog)
    known = Known.of(registry, hooks.notify)
    attempts: dict[str, int] = {}
    rollouts: dict[str, int] = {}
    sources = Sources(registry, history, hooks, lambda: attempts, lambda: rollouts)
    accounts = Accounts(Ledger(registry), secure=False)
    monitor = Monitor(accounts, own_name, sources, lambda: now)
    site = replace(site, guards=(), routes=monitor.routes())
    return Watch(site, registry, known, history, monitor, hooks, attempts, rollouts)


@pytest.fixture
def watch(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """One that knows nothing yet, and looks each time it is asked."""
    monkeypatch.setattr(monitor_module, "KEPT", 0.0)
    with opened(tmp_path / "fleet.db") as registry:
        yield watching(registry, folder)


# -- 1. The format ---------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"))


@given(st.dictionaries(TEXTS, st.integers(0, 1 << 53), max_size=5), TEXTS)
def test_any_text_is_read_as_it_was_written(values: dict[str, int], about: str) -> None:
    about = " ".join(about.split())  # the parser takes spaces away
    text = lines_of(gauge("ota_x", about, values, "label"), gauge("ota_y", "", 1.5))
    families = parsed(text)
    assert families["ota_y"].samples[0].value == 1.5
    found = families["ota_x"]
    assert {each.labels["label"]: each.value for each in found.samples} == values
    assert (found.type, found.documentation) == ("gauge", about)


def test_text_ends_with_a_line_and_every_family_says_what_it_is(watch: Watch) -> None:
    watch.see(decided("2.0.0"))
    reply = ask(watch.site, "/metrics", bearer(TOKEN))
    assert dict(reply.headers)["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert dict(reply.headers)["Cache-Control"] == "no-store"
    text = text_of(reply)
    assert text.endswith("\n")
    assert "\n\n" not in text
    for family in parsed(text).values():
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge", "histogram"}
        assert re.fullmatch("ota_[a-z_]+|process_start_time_seconds", family.name)
    head = ask(watch.site, "/metrics", bearer(TOKEN), method="HEAD")
    assert (head.status, head.body) == (200, b"")


def test_every_metric_stands_in_the_operations(watch: Watch) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text.partition("| metric | what |")[2].partition("\n\n")[0]
    named = re.sub(r"`(ota_[a-z]+)(\w+)`, `\.\.\.(\w+)`, `\.\.\.(\w+)`",
                   r"`\1\2`, `\1\3`, `\1\4`", table)  # fmt: skip
    documented = set(re.findall(r"`((?:ota|process)_\w+)", named))
    text = text_of(ask(watch.site, "/metrics", bearer(TOKEN)))
    assert set(re.findall("^# TYPE ([a-z_]+)", text, re.MULTILINE)) == documented


# -- 2. Counters -----------------------------------------------------------------------------------


def test_decisions_are_counted_by_project_and_code(watch: Watch) -> None:
    watch.see(decided("2.0.0"), decided("2.0.0", project="bulb"), decided(), decided(device=None))
    watch.see(decided(project="door"))
    assert watch.values("ota_decisions_total") == {
        ("door", "not-newer"): 1,
        ("lamp", "not-newer"): 2,
        ("lamp", "update"): 2,
    }


def test_projects_that_are_too_many_count_together_and_no_counter_ever_falls(
    watch: Watch,
) -> None:
    before: Values = {}
    for turn in range(3):
        for number in range(MAX_PROJECTS + 50):
            watch.monitor.note(decided(project=f"p{number}"))
            watch.monitor.note(decided("2.0.0", project=f"p{(number * 7) % 300}"))
        found = watch.values("ota_decisions_total")
        assert all(found[key] >= value for key, value in before.items())
        assert sum(found.values()) == (turn + 1) * 2 * (MAX_PROJECTS + 50)
        assert len({project for project, _ in found}) == MAX_PROJECTS + 1
        before = found
    assert before[OTHER, "update"] > 0


def transfer(sent: int, size: int, *, over: bool = True) -> Transfer:
    """An image that leaves, or did."""
    with FileIO(__file__) as file:
        image = Image(file, size, "", "", (0, 0, 0, 0, 0))
    return Transfer("- 192.0.2.7", image, range(size), lambda: sent, over)


def test_downloads_are_whole_or_not_and_their_bytes_count(watch: Watch) -> None:
    for each in (
        transfer(0, 100, over=False),
        transfer(100, 100),
        transfer(0, 100, over=False),
        transfer(60, 100),
        transfer(0, 100, over=False),
    ):
        watch.monitor.carry(each)
    found = scrape(watch.site)
    assert found["ota_downloads_begun_total",] == 3
    assert found["ota_downloads_completed_total",] == 1
    assert found["ota_downloads_broken_off_total",] == 1
    assert found["ota_downloads_under_way",] == 1
    assert found["ota_sent_bytes_total",] == 160


@given(st.lists(st.floats(0, 10)))
def test_histogram_is_of_all_turns(turns: list[float]) -> None:
    counters = Counters(str)
    for seconds in turns:
        counters.pulse(seconds)
    found = values_of(lines_of(*counters.families()))
    for bound in BOUNDS:
        wanted = sum(seconds <= bound for seconds in turns)
        assert found["ota_loop_busy_seconds_bucket", str(bound)] == wanted
    assert found["ota_loop_busy_seconds_bucket", "+Inf"] == len(turns)
    assert found["ota_loop_busy_seconds_count",] == len(turns)
    assert found["ota_loop_busy_seconds_sum",] == pytest.approx(sum(turns))


def test_real_downloads_are_counted(folder: Path) -> None:
    put(folder / "big-1.0.0.bin", esp8266_image("big", "1.0.0", payload=bytes(8 << 20)))
    with remembering(folder, token=TOKEN) as site, standing(site) as stand:
        old = esp8266_image("firmware", "1.0.0")
        device = Esp8266(
            host="127.0.0.1", port=stand.port, path=f"/firmware?token={TOKEN}", image=old
        )
        assert device.update() == "HTTP_UPDATE_OK"
        with stand.dial(receive_buffer=4096) as wire:  # and leaves in the middle
            wire.send(request("/big?version=0.1.0", bearer(TOKEN)))
            assert wire.head().status == 200

        def found() -> Values:
            with stand.dial() as wire:
                return values_of(wire.ask("/metrics", bearer(TOKEN)).body.decode())

        wait_until(lambda: found()["ota_downloads_broken_off_total",] == 1)
        last = found()
    size = len(esp8266_image("firmware", "1.10.0"))
    assert last["ota_downloads_completed_total",] == 1
    assert last["ota_downloads_under_way",] == 0
    assert size < last["ota_sent_bytes_total",] < size + (8 << 20)
    assert last["ota_decisions_total", "firmware", "update"] == 1
    assert last["ota_loop_busy_seconds_count",] > 0
    assert 0 < last["ota_loop_busy_seconds_sum",] < 10


# -- 3. What SQL says ------------------------------------------------------------------------------


def test_devices_are_counted_by_project_and_version(watch: Watch) -> None:
    watch.registry.write("INSERT INTO alias (name, project) VALUES ('bulb', 'lamp')")
    for number, (project, version) in enumerate(
        [("lamp", "1.0.0"), ("bulb", "1.0.0"), ("lamp", "2.0.0"), ("door", "1.0.0")]
    ):
        watch.see(decided(device=mac(number), version=version, project=project))
    assert watch.values("ota_devices") == {
        ("door", "1.0.0"): 1,
        ("lamp", "1.0.0"): 2,
        ("lamp", "2.0.0"): 1,
    }


def test_devices_that_need_somebody_are_counted(watch: Watch) -> None:
    watch.see(*[decided("2.0.0", mac(0))] * 3, decided("2.0.0", mac(1)))
    watch.see(decided(device=mac(2)), at=NOW - 2 * DAY)
    watch.see(decided(device=mac(3), project="door"), at=NOW - 40 * DAY)
    watch.registry.admit("lamp", mac(0))
    assert watch.values("ota_devices_failing") == {("door",): 0, ("lamp",): 1}
    assert watch.values("ota_devices_silent") == {("door",): 0, ("lamp",): 1}
    assert watch.values("ota_devices_unknown") == {(): 3}


def test_devices_that_are_refused_what_they_got_in_vain_are_counted(watch: Watch) -> None:
    watch.registry.write("INSERT INTO alias (name, project) VALUES ('bulb', 'lamp')")
    watch.see(decided(device=mac(0)), decided(device=mac(1), project="door"))
    looping = "INSERT INTO loop (device, sha256, project, version, at) VALUES (?, ?, ?, '2.0.0', 1)"
    for number, sha256, project in (
        (0, "aa", "lamp"), (0, "bb", "lamp"), (2, "aa", "bulb"), (3, "cc", "gone"),
    ):  # fmt: skip
        watch.registry.write(looping, mac(number), sha256, project)
    assert watch.values("ota_devices_looping") == {("door",): 0, ("lamp",): 2, ("other",): 1}


def test_attempts_and_rollouts_are_those_that_are_told(watch: Watch) -> None:
    assert watch.values("ota_rollouts") == {(state,): 0 for state in STATES}
    assert watch.values("ota_attempts") == {}
    watch.attempts.update({"": 4, "proven": 7})
    watch.rollouts.update(halted=2)
    assert watch.values("ota_attempts") == {("open",): 4, ("proven",): 7}
    assert watch.values("ota_rollouts")[("halted",)] == 2


def test_what_waits_is_counted(watch: Watch) -> None:
    hooks = watch.hooks
    for _ in range(2):
        hooks.add("http://192.0.2.1/", (), "", "ada")
    with watch.registry.writing() as connection:
        hooks.notify(connection, "release.new", {})
    assert watch.values("ota_deliveries_waiting") == {(): 2}
    with watch.registry._lock:
        watch.history.note(decided(), NOW)
        remember(watch.known, watch.history, str, decided())
        assert watch.registry.waiting() == 1
    watch.registry.flush()
    assert watch.values("ota_checkins_waiting") == {(): 0}


def test_process_says_who_it_is_and_since_when(watch: Watch) -> None:
    found = scrape(watch.site)
    assert found["process_start_time_seconds",] == NOW
    ((name, version, _),) = [key for key in found if key[0] == "ota_build_info"]
    assert (found[name, version, _], version) == (1, ota_server.__version__)


NAMES = st.sampled_from([f"p{number}" for number in range(MAX_PROJECTS + 9)] + [OTHER])
VERSIONS = st.sampled_from([f"1.{number}.0" for number in range(MAX_VERSIONS + 9)] + [OTHER, ""])


@given(st.dictionaries(st.tuples(NAMES, VERSIONS), st.integers(1, 99), max_size=300))
def test_nobody_is_lost_among_the_others(devices: dict[tuple[str, str], int]) -> None:
    found = folded(devices)
    assert sum(found.values()) == sum(devices.values())
    assert len({project for project, _ in found}) <= MAX_PROJECTS + 1
    for name in {project for project, _ in found}:
        assert sum(project == name for project, _ in found) <= MAX_VERSIONS + 1
    kept = {project for project, _ in found} - {OTHER}
    gone = {project for project, _ in devices} - kept - {OTHER}
    totals = {name: sum(n for (p, _), n in devices.items() if p == name) for name in kept | gone}
    assert all(totals[left] <= totals[right] for left in gone for right in kept)


def test_made_up_projects_and_versions_make_no_endless_text(watch: Watch) -> None:
    events = (
        decided(device=mac(number), version=f"1.{number}.0", project=f"p{number % 150}")
        for number in range(6_000)
    )
    watch.see(*events)
    found = watch.values("ota_devices")
    assert len(found) <= (MAX_PROJECTS + 1) * (MAX_VERSIONS + 1)
    assert sum(found.values()) == 6_000
    assert found[OTHER, OTHER] == 50 * 40
    assert found["p0", OTHER] == 20
    text = text_of(ask(watch.site, "/metrics", bearer(TOKEN)))
    assert len(text) < 300_000
    assert not re.search("([0-9A-F]{2}:){5}", text)  # no device has a series


# -- 4. Who may ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "status"),
    [
        ("", 401), ("device", 403), ("lamp", 403), ("viewer", 200), ("publisher", 200),
        ("admin", 200),
    ],
)  # fmt: skip
def test_metrics_are_for_viewers_of_all_projects(who: str, status: int, house: House) -> None:
    reply = house.ask(who, "GET", "/metrics")
    assert reply.status == status
    if status == 401:
        assert reply.headers["www-authenticate"].startswith("Bearer ")
    if status == 200:
        assert parsed(reply.body.decode())["ota_ready"].samples[0].value == 1
    else:
        assert b"ota_" not in reply.body


def test_metrics_are_for_who_is_signed_in(house: House) -> None:
    signed = house.ask("", "POST", "session", {"email": EMAIL, "password": PASSWORD})
    cookie = f"Cookie: {signed.headers['set-cookie'].partition(';')[0]}"
    assert house.ask("", "GET", "/metrics", None, cookie).status == 200
    assert house.ask("", "GET", "/metrics", None, f"{cookie}x").status == 401


@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        ("/metrics", [bearer(TOKEN)], 200),
        ("/metrics", [basic("", TOKEN)], 200),
        ("/metrics", [bearer(f"{TOKEN}x")], 401),
        ("/metrics", [], 401),
        (f"/metrics?token={TOKEN}", [], 401),  # it would be in the logs of proxies
        ("/metrics/", [bearer(TOKEN)], 404),
    ],
)
def test_token_of_the_server_opens_metrics(
    target: str, fields: list[str], status: int, folder: Path, furnished: Any
) -> None:
    with furnish(folder, furnished, token=TOKEN) as house:
        assert house.ask("", "GET", target, None, *fields).status == status
        assert house.ask("viewer", "GET", "/metrics").status == 200


def test_without_a_token_of_the_server_none_is_as_good(house: House) -> None:
    for field in (bearer(""), basic("", ""), "Authorization: Bearer"):
        assert house.ask("", "GET", "/metrics", None, field).status == 401


def test_networks_hold_for_metrics_and_not_for_readyz(folder: Path, furnished: Any) -> None:
    nets = ota_server.read_config(["--allow", "10.0.0.0/8"], {}).allow
    with furnish(folder, furnished, allow=nets) as house:
        assert house.ask("viewer", "GET", "/metrics").status == 403
        assert house.ask("", "GET", "/readyz").status == 200


def test_scrape_of_a_registry_that_is_ill_is_a_500_and_the_next_ones_go_on(watch: Watch) -> None:
    with by_hand(watch.registry._path) as other:
        other.execute("ALTER TABLE delivery RENAME TO gone")
        for _ in range(2):  # whoever fails keeps nobody out
            assert ask(watch.site, "/metrics", bearer(TOKEN)).status == 500
        other.execute("ALTER TABLE gone RENAME TO delivery")
    assert scrape(watch.site)["ota_deliveries_waiting",] == 0


# -- 5. /readyz ------------------------------------------------------------------------------------


def readiness(site: Site) -> tuple[int, list[str]]:
    """Status and lines."""
    reply = ask(site, "/readyz")
    assert dict(reply.headers)["Cache-Control"] == "no-store"
    return reply.status, text_of(reply).splitlines()


def test_server_that_works_is_ready_and_nobody_needs_a_token(folder: Path) -> None:
    with remembering(folder, token=TOKEN) as site:
        assert readiness(site) == (200, ["ok"])
        assert not site.route("/readyz").blocking  # no thread that hangs can hold it up
        assert ask(site, "/readyz", method="HEAD").status == 200


def test_without_a_memory_there_is_neither(folder: Path) -> None:
    assert ask(site_of(folder), "/readyz").status == 404


def test_folder_that_is_away_is_said(watch: Watch, folder: Path) -> None:
    assert readiness(watch.site) == (200, ["ok"])
    folder.rename(folder.with_name("away"))
    watch.site.catalog.scan()  # type: ignore[attr-defined]
    assert readiness(watch.site) == (
        503,
        ["the firmware folder cannot be read just now: ask again later"],
    )
    assert scrape(watch.site)["ota_ready",] == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not work for a moment does not work."""
    monkeypatch.setattr(registry_module, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(registry_module, "STALE", 0.2)
    monkeypatch.setattr(hooks_module, "PAUSE", 0.01)
    monkeypatch.setattr(hooks_module, "STALE", 0.2)


@contextmanager
def locked(watch: Watch) -> Iterator[None]:
    """Another program writes, for ever."""
    for connection in (watch.registry._often, watch.registry._surely):
        connection.execute("PRAGMA busy_timeout = 10")
    with by_hand(watch.registry._path) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def stuck(watch: Watch) -> Iterator[None]:
    """The disk hangs in the middle of a write: whoever else wants to write waits."""
    with watch.registry._lock:
        yield


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("trouble", [locked, stuck])
def test_check_ins_that_cannot_be_written_are_said_until_it_is_over(
    trouble: Callable[[Watch], Any], tmp_path: Path, folder: Path
) -> None:
    with opened(tmp_path / "fleet.db") as registry:
        watch = watching(registry, folder)
        watch.hooks.start()
        wait_until(lambda: readiness(watch.site) == (200, ["ok"]))
        done = threading.Event()

        def spoil() -> None:
            with trouble(watch):
                remember(watch.known, watch.history, str, decided())
                done.wait(10)

        thread = threading.Thread(target=spoil)
        thread.start()
        wait_until(lambda: readiness(watch.site)[0] == 503)
        ((status, (line, *_)),) = [readiness(watch.site)]
        assert line == "check-ins cannot be written just now: the log says why, or the disk hangs"
        done.set()
        thread.join()
        wait_until(lambda: readiness(watch.site) == (200, ["ok"]))
        watch.hooks.close()
        assert status == 503


@pytest.mark.usefixtures("impatient")
def test_registry_that_cannot_be_read_is_said(watch: Watch) -> None:
    watch.hooks.start()
    wait_until(lambda: readiness(watch.site) == (200, ["ok"]))
    with by_hand(watch.registry._path) as other:
        other.execute("ALTER TABLE delivery RENAME TO gone")
        wait_until(lambda: readiness(watch.site)[0] == 503)
        line = "the registry cannot be read just now: the log says why, or the disk hangs"
        assert readiness(watch.site) == (503, [line])
        other.execute("ALTER TABLE gone RENAME TO delivery")
    wait_until(lambda: readiness(watch.site) == (200, ["ok"]))
    watch.hooks.close()


@pytest.mark.usefixtures("impatient")
def test_all_that_is_wrong_is_said(watch: Watch, folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    watch.site.catalog.scan()  # type: ignore[attr-defined]
    with stuck(watch):  # and nobody looks what is due
        wait_until(lambda: len(readiness(watch.site)[1]) == 3)
        assert readiness(watch.site)[0] == 503


def test_scrapes_of_a_disk_that_hangs_wait_for_one_only_and_say_what_was(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.see(decided())
    before = scrape(watch.site)
    hanging, over = threading.Event(), threading.Event()

    def hang(_now: int) -> list[Any]:
        hanging.set()
        over.wait(10)
        return []

    monkeypatch.setattr(watch.history, "counts", hang)
    first = threading.Thread(target=scrape, args=(watch.site,))
    first.start()
    assert hanging.wait(10)
    watch.monitor.note(decided())
    meanwhile = scrape(watch.site)
    over.set()
    first.join()
    assert meanwhile["ota_devices", "lamp", "1.0.0"] == before["ota_devices", "lamp", "1.0.0"] == 1
    assert meanwhile["ota_decisions_total", "lamp", "not-newer"] == 2


def test_sql_is_not_asked_at_every_scrape(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "KEPT", 60.0)
    watch.see(decided())
    assert watch.values("ota_devices") == {("lamp", "1.0.0"): 1}
    watch.see(decided(device=mac(1)))
    assert watch.values("ota_devices") == {("lamp", "1.0.0"): 1}
    assert watch.values("ota_decisions_total") == {("lamp", "not-newer"): 2}


def test_real_server_is_ready_and_measured(folder: Path) -> None:
    with fleet(folder, "--token", TOKEN) as script:
        assert script.wait_for("/readyz").body == b"ok\n"
        with script.dial() as wire:
            reply = wire.ask("/metrics", bearer(TOKEN))
        assert values_of(reply.body.decode())["ota_ready",] == 1


# -- 6. Many devices -------------------------------------------------------------------------------


def test_scrape_of_ten_thousand_devices_is_quicker_than_reading_them(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "KEPT", 0.0)
    with opened(tmp_path / "fleet.db") as registry:
        watch = watching(registry, folder, NOW + DAY)
        for number in range(10_000):
            event = decided(
                device=mac(number), version=f"1.{number % 9}.0", project=f"p{number % 20}"
            )
            remember(watch.known, watch.history, str, event, functools.partial(float, NOW + number))
        registry.flush()
        with registry.writing() as connection:
            rows = [(f"p{number % 20}", mac(number)) for number in range(0, 10_000, 2)]
            connection.executemany("INSERT INTO admission VALUES (?, ?)", rows)
        whole = quickest(
            lambda: [registry.devices(after=[mac(n)], limit=1000) for n in range(0, 9999, 1000)]
        )
        values = scrape(watch.site)
        assert sum(value for key, value in values.items() if key[0] == "ota_devices") == 10_000
        assert values["ota_devices_unknown",] == 5_000
        assert quickest(lambda: ask(watch.site, "/metrics", bearer(TOKEN))) < whole


def test_what_is_told_costs_the_loop_next_to_nothing(watch: Watch) -> None:
    event, left = decided(), transfer(100, 100)

    def each(tell: Callable[[Any], object], what: object) -> float:
        return quickest(lambda: [tell(what) for _ in range(10_000)])

    remembered = each(functools.partial(remember, watch.known, watch.history, str), event)
    assert each(watch.monitor.note, event) < remembered  # some 0.6 of 2.5 us
    assert each(watch.monitor.carry, left) < remembered
    assert each(watch.monitor.pulse, 0.002) < remembered
