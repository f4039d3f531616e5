"""The folder's releases and the uploaded ones as one catalog, and the rules that know of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_fleet.files import Store
from ota_fleet.image import describe
from ota_fleet.ledger import Ledger
from ota_fleet.policy import Policy, channel_of
from ota_fleet.registry import Registry, Sighting
from ota_fleet.rows import CHIPS, Project, Stocked, StoredRelease, Token, check_name
from ota_fleet.rules import fit_for, fits_partition, not_again, towards_target, withdrawn
from ota_fleet.stock import Stock
from ota_server import (
    SAFETY,
    UNVERSIONED,
    DirectoryCatalog,
    Facts,
    Objection,
    Refused,
    Release,
    Report,
    Version,
    choose,
    only_newer,
)
from tests.conftest import put, wait_until
from tests.core.test_access import ask, text_of
from tests.core.wire import standing
from tests.data.make_images import esp8266_image, gzip_image, littlefs_image
from tests.devices import Esp8266
from tests.fleet.test_upload import NOW, digest, publish, publishing, stock_of, stored

MAC = "5C:CF:7F:12:34:56"


def image(version: str, seed: int = 0) -> bytes:
    """An image that does not say what it is."""
    return esp8266_image("lamp", version, seed=seed)


def nothing() -> None:
    """What else belongs to an upload."""


class Bench:
    """A stock over a folder, with the rooms that it needs."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.state = state
        self.folder = DirectoryCatalog(str(folder))
        self.folder.scan()
        self.registry = Registry(state / "fleet.db")
        self.store = Store(str(state / "files"), self.registry, time.time())
        self.stock = Stock(self.folder, self.registry, self.store)

    def close(self) -> None:
        """As the program does."""
        self.stock.close()
        self.registry.close()
        self.store.close()

    def add(self, version: str, body: bytes = b"", **values: Any) -> Stocked:
        """Adds an image that may be offered; of `lamp` unless told."""
        body = body or image(version)
        with tempfile.TemporaryFile(dir=self.state) as file:
            file.write(body)
            file.seek(0)
            with FileIO(file.fileno(), closefd=False) as raw:
                about = describe(raw)
            usual: dict[str, Any] = {"project": "lamp", "notes": "", "uploaded": NOW, "who": "me"}
            usual |= {"name": f"lamp-{version}.bin" + ".gz" * about.packed}
            row = StoredRelease(
                version=version, kind=about.kind, chip=about.chip, packed=about.packed,
                sha256=about.sha256, md5=about.md5, size=about.size, **usual | values,
            )  # fmt: skip
            return self.stock.add(file, row, nothing)

    def offered(self, project: str = "lamp") -> list[str]:
        """Names of what is offered, newest first."""
        with suppress(Refused):
            return [release.name for release in self.stock.releases(project)]
        return []

    def versions(self) -> list[str]:
        """Versions of `lamp` that were uploaded, newest first."""
        found = (each for each in self.stock.entries("lamp") if each.source == "upload")
        return [str(each.release.version) for each in found]

    def file(self, body: bytes) -> Path:
        """Where bytes are stored."""
        return self.state / "files" / digest(body)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A folder for the fleet."""
    state = tmp_path / "state"
    state.mkdir()
    return state


@pytest.fixture
def bench(folder: Path, state: Path) -> Iterator[Bench]:
    """A stock with a project `lamp`, and `firmware` in the folder."""
    with closing(Bench(folder, state)) as bench:
        bench.stock.put_project(Project("lamp"))
        yield bench


def refused(call: Callable[[], object]) -> tuple[int, str]:
    """With what a call is refused."""
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.status, caught.value.reason


# -- 1. One catalog -------------------------------------------------------------------------------


def test_project_that_nobody_touched_is_the_folders(bench: Bench) -> None:
    assert bench.stock.releases("firmware") is bench.folder.releases("firmware")
    assert refused(lambda: bench.stock.releases("none")) == refused(
        lambda: bench.folder.releases("none")
    )


def test_project_without_a_release_says_so(bench: Bench) -> None:
    reason = "the project 'lamp' has no release yet: upload one"
    assert refused(lambda: bench.stock.releases("lamp")) == (404, reason)
    assert list(bench.stock.projects()) == ["firmware", "lamp"]
    assert dict(bench.stock.newest()) == {"firmware": Version.parse("1.10.0")}


def test_folder_and_uploads_are_one_list_newest_first(bench: Bench) -> None:
    for version in ("1.9.5", "2.0.0", "0.9.0"):
        bench.add(version, project="firmware", name=f"firmware-{version}.bin")
    wanted = ["2.0.0", "1.10.0", "1.9.5", "1.9.0", "1.0.0", "0.9.0"]
    assert bench.offered("firmware") == [f"firmware-{version}.bin" for version in wanted]
    assert bench.stock.newest()["firmware"] == Version.parse("2.0.0")


@pytest.mark.parametrize(("age", "wins"), [(60.0, "upload"), (-60.0, "folder")])
def test_newer_one_of_the_same_version_wins(
    age: float, wins: str, folder: Path, state: Path
) -> None:
    here = image("3.0.0", seed=1)
    put(folder / "lamp-3.0.0.bin", here, age=age)
    with closing(Bench(folder, state)) as bench:
        there = image("3.0.0", seed=2)
        bench.add("3.0.0", there, uploaded=int((folder / "lamp-3.0.0.bin").stat().st_mtime + age))
        (release,) = bench.stock.releases("lamp")
        assert release.facts.sha256 == digest(there if wins == "upload" else here)


def test_plain_image_comes_before_a_packed_one(bench: Bench) -> None:
    bench.add("1.0.0", gzip_image(image("1.0.0")))
    bench.add("1.0.0")
    assert bench.offered() == ["lamp-1.0.0.bin", "lamp-1.0.0.bin.gz"]


def test_list_is_the_same_object_until_something_changes(bench: Bench) -> None:
    bench.add("1.0.0")
    first = bench.stock.releases("lamp")

    def stays() -> bool:
        """Whether it does when something else is written."""
        nonlocal first
        before, first = first, bench.stock.releases("lamp")
        bench.registry.admit("lamp", MAC) or bench.registry.expel("lamp", MAC)
        return before is first is bench.stock.releases("lamp")

    wait_until(stays)  # the thread that checks may still be at it
    bench.add("1.1.0")
    assert bench.stock.releases("lamp") is not first


def test_file_that_comes_into_the_folder_is_seen(bench: Bench, folder: Path) -> None:
    bench.add("1.0.0")
    assert bench.offered() == ["lamp-1.0.0.bin"]
    put(folder / "lamp-2.0.0.bin", image("2.0.0"))
    bench.folder.scan()
    assert bench.offered() == ["lamp-2.0.0.bin", "lamp-1.0.0.bin"]


def test_alias_is_the_project(bench: Bench) -> None:
    bench.stock.put_project(Project("lamp", aliases=("lampe", "light")))
    bench.add("1.0.0")
    assert bench.stock.releases("lampe") is bench.stock.releases("lamp")
    assert bench.stock.releases("light")[0].project == "lamp"
    assert "lampe" not in bench.stock.projects()
    bench.stock.put_project(Project("firmware", aliases=("old",)))
    assert bench.stock.releases("old") == bench.stock.releases("firmware")
    bench.stock.put_project(Project("firmware"))
    assert refused(lambda: bench.stock.releases("old"))[0] == 404


def test_files_win_over_an_alias_and_the_log_says_so_once(
    bench: Bench, folder: Path, lines: Callable[[str], list[str]]
) -> None:
    bench.stock.put_project(Project("lamp", aliases=("bulb",)))
    bench.add("1.0.0")
    assert bench.offered("bulb") == ["lamp-1.0.0.bin"]
    put(folder / "bulb-9.0.0.bin", image("9.0.0"))
    bench.folder.scan()
    assert bench.offered("bulb") == bench.offered("bulb") == ["bulb-9.0.0.bin"]
    assert bench.stock.project("bulb") == Project("bulb", made=False)
    (told,) = lines("bulb is files in the folder, and an alias of lamp: its devices get these")
    assert "ERROR" in told
    bench.stock.put_project(Project("lamp", ("esp8266",), ("bulb",)))  # no alias is a new one
    bench.stock.put_project(Project("lamp"))
    assert bench.offered("bulb") == ["bulb-9.0.0.bin"]


def test_folder_that_is_away_does_not_take_the_uploads_with_it(bench: Bench, folder: Path) -> None:
    bench.add("1.0.0")
    bench.add("2.0.0", project="firmware", name="firmware-2.0.0.bin")
    bench.stock.put_project(Project("bulb"))
    folder.rename(folder.with_name("away"))
    bench.folder.scan()
    assert bench.offered() == ["lamp-1.0.0.bin"]
    assert bench.offered("firmware") == ["firmware-2.0.0.bin"]
    for call in (bench.stock.projects, lambda: bench.stock.releases("bulb")):
        assert refused(call)[0] == 503
    assert refused(lambda: bench.stock.entries("firmware"))[0] == 503
    assert len(bench.stock.entries("lamp")) == 1


def test_open_gives_the_bytes_that_were_checked(bench: Bench) -> None:
    bench.add("1.0.0")
    found = bench.stock.open(bench.stock.releases("lamp")[0])
    with found.file as file:
        assert file.read() == image("1.0.0")
    assert found.sha256 == digest(image("1.0.0"))


def test_bytes_of_several_projects_are_offered_by_each(bench: Bench) -> None:
    bench.stock.put_project(Project("bulb"))
    bench.add("1.0.0")
    bench.add("1.0.0", project="bulb")
    assert bench.offered() == bench.offered("bulb") == ["lamp-1.0.0.bin"]
    assert bench.stock.delete("lamp", Version.parse("1.0.0"))
    assert refused(lambda: bench.stock.releases("lamp"))[0] == 404
    assert bench.offered("bulb") == ["lamp-1.0.0.bin"]


# -- 2. What is stored, and what became of it -----------------------------------------------------


def harmed(bench: Bench, harm: str, body: bytes) -> None:
    """Harms what is stored."""
    path = bench.file(body)
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(body[:-1])
    elif harm == "another":
        path.write_bytes(image("6.6.6"))
    else:
        path.write_bytes(body[:5000] + b"X" + body[5001:])


HARMS = pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "another"])


@HARMS
def test_harmed_file_is_not_offered_after_a_start_and_the_older_one_is(
    harm: str, folder: Path, state: Path, lines: Callable[[str], list[str]]
) -> None:
    with closing(Bench(folder, state)) as bench:
        bench.add("1.0.0")
        bench.add("2.0.0")
        harmed(bench, harm, image("2.0.0"))
    with closing(Bench(folder, state)) as again:
        wait_until(lambda: again.offered() == ["lamp-1.0.0.bin"])
        assert lines("lamp/lamp-2.0.0.bin is not offered: it is")
        broken = again.stock.entries("lamp")[0]
        assert (broken.flaw[:3], broken.release.path) == ("is ", "")
        assert "ERROR" in lines("is not offered")[0]
        again.stock.delete("lamp", Version.parse("1.0.0"))
        status, reason = refused(lambda: again.stock.releases("lamp"))
        assert status == 404
        assert reason.startswith("no file of 'lamp' can be offered: lamp-2.0.0.bin is")
        again.add("2.0.0", uploaded=NOW + 1)
        assert again.offered() == ["lamp-2.0.0.bin"]
        assert again.file(image("2.0.0")).read_bytes() == image("2.0.0")


@HARMS
def test_file_that_is_harmed_while_the_server_runs_is_never_sent(harm: str, bench: Bench) -> None:
    bench.add("1.0.0")
    bench.add("2.0.0")
    release = bench.stock.releases("lamp")[0]
    harmed(bench, harm, image("2.0.0"))
    assert refused(lambda: bench.stock.open(release))[0] == 503
    wait_until(lambda: bench.offered() == ["lamp-1.0.0.bin"])


def test_file_with_another_ctime_is_offered_again_in_a_moment(bench: Bench) -> None:
    bench.add("1.0.0")
    os.link(bench.file(image("1.0.0")), bench.state / "backup")
    release = bench.stock.releases("lamp")[0]
    assert refused(lambda: bench.stock.open(release))[0] == 503
    wait_until(lambda: bench.stock.releases("lamp")[0] != release)
    bench.stock.open(bench.stock.releases("lamp")[0]).file.close()


def test_while_uploads_are_not_checked_it_is_503_and_what_is_whole_is_offered(
    folder: Path, state: Path
) -> None:
    with closing(Bench(folder, state)) as bench:
        bench.add("1.0.0")
        bench.add("2.0.0", project="firmware", name="firmware-2.0.0.bin")
    with closing(Bench(folder, state)) as again:
        with again.stock._checking:
            again.stock._found.clear()
            again.stock._sort()
            status, reason = refused(lambda: again.stock.releases("lamp"))
            assert (status, "is not checked yet: ask again" in reason) == (503, True)
            assert again.offered("firmware")[0] == "firmware-1.10.0.bin"
            assert again.stock.entries("lamp")[0].flaw == "is not checked yet"
        again.stock._wake.set()
        wait_until(lambda: again.offered("firmware")[0] == "firmware-2.0.0.bin")
        wait_until(lambda: again.stock.entries("lamp")[0].flaw == "")


def test_newest_of_each_project_is_checked_first(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Bench(folder, state)) as bench:
        for project in ("a", "b"):
            for version in ("1.0.0", "10.0.0", "9.0.0"):
                bench.add(version, image(version, seed=ord(project)), project=project)
    asked: list[str] = []
    look = Store.look

    def noted(store: Store, sha256: str, *rest: Any) -> Any:
        asked.append(sha256)
        return look(store, sha256, *rest)

    monkeypatch.setattr(Store, "look", noted)
    with closing(Bench(folder, state)):
        wait_until(lambda: len(asked) >= 6)
    order = [digest(image(v, seed=ord(p))) for v in ("10.0.0", "9.0.0", "1.0.0") for p in "ab"]
    assert asked[:2] in (order[:2], order[1::-1])
    assert sorted(asked[:6]) == sorted(order)


def test_release_that_goes_while_it_is_looked_at_is_no_error(
    bench: Bench, lines: Callable[[str], list[str]]
) -> None:
    bench.add("1.0.0")
    row = bench.stock._rows("lamp", Version.parse("1.0.0"))[0]
    bench.stock.delete("lamp", Version.parse("1.0.0"))
    bench.stock._check(row)
    assert lines("not offered") == []


def test_file_that_cannot_be_read_just_now_is_tried_again(
    bench: Bench, lines: Callable[[str], list[str]]
) -> None:
    bench.add("1.0.0")
    release = bench.stock.releases("lamp")[0]
    path, kept = bench.file(image("1.0.0")), bench.state / "kept"
    (bench.state / "loop").symlink_to(path)  # which will lead to itself
    os.link(path, kept)
    os.replace(bench.state / "loop", path)
    assert refused(lambda: bench.stock.open(release))[0] == 503
    wait_until(lambda: bool(lines("cannot be read: Too many levels of symbolic links")))
    assert bench.offered() == ["lamp-1.0.0.bin"]
    os.replace(kept, path)
    bench.stock._wake.set()
    wait_until(lambda: bench.stock.releases("lamp")[0] != release)
    bench.stock.open(bench.stock.releases("lamp")[0]).file.close()


# -- 3. Withdrawn, noted, deleted, kept -----------------------------------------------------------


def test_withdrawn_release_is_known_by_its_bytes(bench: Bench) -> None:
    bench.add("1.0.0")
    bench.add("1.1.0")
    bench.stock.withdraw("lamp", Version.parse("1.1"), "it loops", "ada", NOW)
    newest, older = bench.stock.releases("lamp")
    assert bench.stock.why_withdrawn(newest) == "it loops"
    assert bench.stock.why_withdrawn(older) is None
    assert [each.withdrawn for each in bench.stock.entries("lamp")] == ["it loops", None]
    bench.stock.withdraw("lamp", Version.parse("1.1.0"), "", "ada", NOW)
    assert bench.stock.entries("lamp")[0].withdrawn == ""
    bench.stock.restore("lamp", Version.parse("1.1.0"))
    assert bench.stock.why_withdrawn(newest) is None


def test_release_of_the_folder_is_withdrawn_as_well(bench: Bench) -> None:
    bench.stock.withdraw("firmware", Version.parse("1.10.0"), "", "ada", NOW)
    releases = bench.stock.releases("firmware")
    found = [each for each in releases if bench.stock.why_withdrawn(each) is not None]
    assert [each.name for each in found] == ["firmware-1.10.0.bin"]


def test_withdrawn_release_is_no_projects_newest(bench: Bench) -> None:
    for version in ("1.0.0", "1.1.0"):
        bench.add(version)
    for version in ("1.1.0", "1.0.0"):
        bench.stock.withdraw("lamp", Version.parse(version), "", "ada", NOW)
        newest = bench.stock.newest().get("lamp")
        assert newest == (Version.parse("1.0.0") if version == "1.1.0" else None)
    bench.stock.withdraw("firmware", Version.parse("1.10.0"), "", "ada", NOW)
    assert bench.stock.newest() == {"firmware": Version.parse("1.9.0")}
    assert list(bench.stock.projects()) == ["firmware", "lamp"]


@pytest.mark.parametrize(
    ("running", "target", "fields", "status"),
    [
        pytest.param("1.0.0", "/lamp", (), 200, id="older-one"),
        pytest.param("1.1.0", "/lamp", (), 304, id="runs-the-older-one"),
        pytest.param("1.2.0", "/lamp", (), 304, id="runs-it"),
        pytest.param("1.0.0", "/lamp/lamp-1.2.0.bin", (), 304, id="by-name"),
        pytest.param("", "/lamp/lamp-1.2.0.bin", (), 404, id="by-name-for-people"),
        pytest.param("", "/lamp/lamp-1.2.0.bin.sha256", (), 404, id="digest"),
        pytest.param("", "/lamp/lamp-1.1.0.bin", (), 200, id="older-by-name"),
        pytest.param("", "/lamp/latest.bin", (), 200, id="latest"),
        pytest.param("", "/lamp/manifest.json", (), 200, id="manifest"),
    ],
)
def test_nobody_gets_what_was_withdrawn(
    running: str, target: str, fields: tuple[str, ...], status: int, folder: Path
) -> None:
    with publishing(folder) as site:
        for version in ("1.1.0", "1.2.0"):
            publish(site, f"/projects/lamp/releases/{version}", image(version))
        stock_of(site).withdraw("lamp", Version.parse("1.2.0"), "it loops", "ada", NOW)
        check = (f"x-ESP8266-version: {running}",) if running else ()
        reply = ask(site, target, *check, *fields)
        assert reply.status == status, reply
        if status == 304:
            reason = dict(reply.headers)["X-OTA-Reason"]
            assert reason == "withdrawn: 1.2.0 was withdrawn: it loops" or running == "1.2.0"
        if target.endswith("json"):
            assert json.loads(text_of(reply))["version"] == "1.1.0"


def test_device_gets_the_older_one_when_the_newest_is_withdrawn(folder: Path) -> None:
    with publishing(folder) as site, standing(site) as stand:
        for version in ("1.1.0", "1.2.0"):
            publish(site, f"/projects/lamp/releases/{version}", image(version))
        stock_of(site).withdraw("lamp", Version.parse("1.2.0"), "", "ada", NOW)
        device = Esp8266(host="127.0.0.1", port=stand.port, path="/lamp", image=image("1.0.0"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.1.0")
        assert device.update() == "HTTP_UPDATE_NO_UPDATES"
        stock_of(site).restore("lamp", Version.parse("1.2.0"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.2.0")


def test_notes_are_what_people_read(bench: Bench) -> None:
    bench.add("1.0.0", notes="first")
    assert bench.stock.releases("lamp")[0].notes == "first"
    bench.stock.note("lamp", Version.parse("1.0.0"), "Zürich\n")
    assert bench.stock.releases("lamp")[0].notes == "Zürich\n"


@pytest.mark.parametrize(
    ("call", "status", "sentence"),
    [
        (lambda stock, v: stock.withdraw("lamp", v, "", "me", NOW), 404, "there is no 9.0.0"),
        (lambda stock, v: stock.withdraw("none", v, "", "me", NOW), 404, "there is no 9.0.0"),
        (lambda stock, v: stock.restore("lamp", v), 404, "there is no 9.0.0 of 'lamp'"),
        (lambda stock, v: stock.note("lamp", v, "x"), 404, "there is no 9.0.0 of 'lamp'"),
        (lambda stock, v: stock.note("lamp", v, "x" * 5000), 422, "at most 4096 characters"),
        (lambda stock, _: stock.note("firmware", Version.parse("1.0"), "x"), 409, "lies in the"),
        (lambda stock, _: stock.delete("firmware", Version.parse("1.0")), 409, "change it there"),
        (lambda stock, _: stock.entries("none"), 404, "there is no project 'none'"),
        (lambda stock, _: stock.entries("firmware", "x"), 422, "'x' is no cursor"),
        (lambda stock, _: stock.drop_project("full"), 409, "'full' has releases: delete them"),
    ],
)
def test_what_is_not_there_is_refused_with_a_sentence(
    call: Callable[[Stock, Version], object], status: int, sentence: str, bench: Bench
) -> None:
    bench.add("1.0.0", project="full")
    found = refused(lambda: call(bench.stock, Version.parse("9.0.0")))
    assert (found[0], sentence in found[1]) == (status, True), found


def test_deleted_release_is_gone_with_its_bytes(bench: Bench) -> None:
    bench.add("1.0.0")
    bench.add("1.1.0")
    assert bench.stock.delete("lamp", Version.parse("1.1.0"))
    assert not bench.stock.delete("lamp", Version.parse("1.1.0"))
    assert bench.offered() == ["lamp-1.0.0.bin"]
    assert os.listdir(bench.state / "files") == [digest(image("1.0.0"))]


def test_what_is_withdrawn_stays_so_when_it_comes_again(bench: Bench) -> None:
    bench.add("1.0.0")
    bench.stock.withdraw("lamp", Version.parse("1.0.0"), "", "me", NOW)
    bench.stock.delete("lamp", Version.parse("1.0.0"))
    assert bench.add("1.0.0").withdrawn == ""


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_entries_come_page_by_page(limit: int, bench: Bench, folder: Path) -> None:
    for version in ("1.9.0", "0.1.0", "1.0.1", "3.0.0"):
        bench.add(version, image(version, 1), project="firmware", name=f"firmware-{version}.b.bin")
    bench.add("3.0.0", littlefs_image(), project="firmware", name="firmware-3.0.0.littlefs.bin")
    found: list[Stocked] = []
    while page := bench.stock.entries("firmware", found[-1].cursor if found else "", limit):
        found += page
        assert len(page) <= limit
    names = [(str(each.release.version), each.source) for each in found]
    assert names == [
        ("3.0.0", "upload"), ("3.0.0", "upload"), ("1.10.0", "folder"), ("1.9.0", "upload"),
        ("1.9.0", "folder"), ("1.0.1", "upload"), ("1.0.0", "folder"), ("0.1.0", "upload"),
    ]  # fmt: skip


def test_page_goes_on_where_the_last_one_ended_though_that_entry_is_gone(bench: Bench) -> None:
    for number in range(6):
        bench.add(f"1.{number}.0")
    first = bench.stock.entries("lamp", limit=3)
    bench.stock.delete("lamp", first[-1].release.version)
    rest = bench.stock.entries("lamp", first[-1].cursor)
    assert [str(each.release.version) for each in rest] == ["1.2.0", "1.1.0", "1.0.0"]


# -- 4. --keep ------------------------------------------------------------------------------------


def runs(bench: Bench, **values: Any) -> None:
    """Lets a device be seen."""
    usual: dict[str, Any] = {
        "device": MAC, "project": "lamp", "chip": "esp8266", "version": "0.0.1",
        "sketch_md5": None, "sketch_sha256": None, "free_space": None, "sdk": None,
        "address": "192.0.2.1", "at": NOW, "downloaded": False,
    }  # fmt: skip
    bench.registry.seen(Sighting(**usual | values))


def running_md5(version: str) -> str:
    """What an ESP8266 with another flash mode reports of its sketch."""
    body = image(version)
    return hashlib.md5(body[:2] + b"\0" + body[3:]).hexdigest()  # noqa: S324


def pin(bench: Bench) -> None:
    """Pins a device to 1.0.0."""
    runs(bench)
    bench.registry.flush()
    bench.registry.annotate(MAC, pin="1.0")


@pytest.mark.parametrize(
    ("needs", "left"),
    [
        pytest.param(lambda _: None, ["1.4.0", "1.3.0"], id="nobody"),
        pytest.param(lambda b: runs(b, version="1.1.0"), ["1.4.0", "1.3.0", "1.1.0"], id="version"),
        pytest.param(lambda b: runs(b, version="1.1"), ["1.4.0", "1.3.0", "1.1.0"], id="short"),
        pytest.param(lambda b: runs(b, version="1.1.0+b7"), ["1.4.0", "1.3.0", "1.1.0"],
            id="build"),
        pytest.param(lambda b: runs(b, version="x", sketch_md5=running_md5("1.2.0")),
            ["1.4.0", "1.3.0", "1.2.0"], id="digest"),
        pytest.param(lambda b: runs(b, version="1.1.0", project="lampe"),
            ["1.4.0", "1.3.0", "1.1.0"], id="alias"),
        pytest.param(lambda b: runs(b, version="1.1.0", project="bulb"), ["1.4.0", "1.3.0"],
            id="of-another-project"),
        pytest.param(pin, ["1.4.0", "1.3.0", "1.0.0"], id="pin"),
        pytest.param(lambda b: b.stock.withdraw("lamp", Version.parse("1.4.0"), "", "me", NOW),
            ["1.4.0", "1.3.0", "1.2.0"], id="withdrawn-does-not-count"),
        pytest.param(lambda b: b.stock.withdraw("lamp", Version.parse("1.1.0"), "", "me", NOW),
            ["1.4.0", "1.3.0"], id="old-and-withdrawn"),
    ],
)  # fmt: skip
def test_keep_leaves_the_newest_and_what_devices_need(
    needs: Callable[[Bench], None], left: list[str], bench: Bench
) -> None:
    bench.stock.put_project(Project("lamp", aliases=("lampe",)))
    for number in range(5):
        bench.add(f"1.{number}.0")
    needs(bench)
    bench.stock.prune("lampe", 2)
    assert bench.versions() == left
    assert sorted(os.listdir(bench.state / "files")) == sorted(digest(image(v)) for v in left)


def test_keep_counts_each_kind_chip_and_pre_releases_for_themselves(bench: Bench) -> None:
    for number in range(4):
        body = littlefs_image()[:-1] + bytes([number])
        bench.add(f"1.{number}.0")
        bench.add(f"1.{number}.0", body, name=f"lamp-1.{number}.0.littlefs.bin")
        bench.add(f"2.0.0-rc.{number}")
        bench.add(f"1.{number}.0", gzip_image(image(f"1.{number}.0")))
    bench.stock.prune("lamp", 2)
    assert bench.versions() == [
        "2.0.0-rc.3", "2.0.0-rc.2", "1.3.0", "1.3.0", "1.3.0", "1.2.0", "1.2.0", "1.2.0",
    ]  # fmt: skip


def test_upload_prunes_and_leaves_the_folder_alone(folder: Path) -> None:
    with publishing(folder, keep=1) as site:
        for version in ("1.11.0", "1.12.0", "1.13.0"):
            path = f"/projects/firmware/releases/{version}"
            assert publish(site, path, image(version)).status == 201
            check = "x-ESP8266-version: 1.11.0", f"x-ESP8266-STA-MAC: {MAC}"
            assert ask(site, "/firmware", *check).status in {200, 304}
        names = [release.name for release in site.catalog.releases("firmware")]
        assert names == [
            "firmware-1.13.0.bin", "firmware-1.11.0.bin", "firmware-1.10.0.bin",
            "firmware-1.9.0.bin", "firmware-1.0.0.bin",
        ]  # fmt: skip
        assert len(stored(site)) == 2


def test_what_was_just_published_is_not_pruned(folder: Path) -> None:
    with publishing(folder, keep=1) as site:
        assert publish(site, "/projects/lamp/releases/2.0.0", image("2.0.0")).status == 201
        for version in ("1.0.0", "1.1.0"):
            path = f"/projects/lamp/releases/{version}"
            assert publish(site, f"{path}?replace=1", image(version)).status == 201
            found = [str(each.release.version) for each in stock_of(site).entries("lamp")]
            assert found == ["2.0.0", version]


def test_what_cannot_be_deleted_now_waits_for_the_next_time(
    bench: Bench, lines: Callable[[str], list[str]]
) -> None:
    for number in range(3):
        bench.add(f"1.{number}.0")
    path = bench.file(image("1.0.0"))
    path.unlink()
    path.mkdir()  # what unlink() refuses
    bench.stock.prune("lamp", 2)
    assert "old releases of lamp cannot be deleted" in lines("cannot be deleted")[0]
    path.rmdir()


# -- 5. Projects ----------------------------------------------------------------------------------


def test_project_is_made_changed_and_dropped(bench: Bench) -> None:
    stock = bench.stock
    assert stock.project("bulb") is None
    stock.put_project(Project("bulb", ("esp32", "esp32"), ("b2", "b1"), NOW))
    assert stock.project("bulb") == Project("bulb", ("esp32",), ("b1", "b2"), NOW)
    assert stock.project("b1") == stock.project("bulb")
    stock.put_project(Project("bulb", ("esp8266",), ("b2",), NOW + 9))
    assert stock.project("bulb") == Project("bulb", ("esp8266",), ("b2",), NOW)
    assert stock.project("b1") is None
    assert stock.drop_project("bulb")
    assert (stock.project("bulb"), stock.project("b2")) == (None, None)
    assert not stock.drop_project("bulb")


def test_project_takes_its_admissions_with_it_unless_files_keep_it_alive(bench: Bench) -> None:
    for name in ("lamp", "firmware"):
        bench.stock.put_project(Project(name))
        bench.registry.admit(name, MAC)
        assert bench.stock.drop_project(name)
    assert bench.registry.admitted("lamp") == frozenset()
    assert bench.registry.admitted("firmware") == {MAC}


@pytest.mark.parametrize("of", ["lamp", "bulb"])
def test_project_with_tokens_stays(of: str, bench: Bench) -> None:
    bench.stock.put_project(Project("lamp", (), ("bulb",)))
    bench.registry.admit("lamp", MAC)
    ledger = Ledger(bench.registry)
    numbers = [
        ledger.add_token(Token(0, "CI", "viewer", project, project, "", NOW), "me")
        for project in (of, "")
    ]
    reason = f"'lamp' has tokens: revoke them first, {numbers[0]}"
    assert refused(lambda: bench.stock.drop_project("bulb")) == (409, reason)
    assert bench.registry.admitted("lamp") == {MAC}
    ledger.revoke_token(numbers[0], "me", NOW)
    assert bench.stock.drop_project("bulb")


def test_two_who_give_one_name_at_once_do_not_both_have_it(folder: Path, state: Path) -> None:
    with (
        closing(Bench(folder, state)) as here,
        closing(Bench(folder, state)) as there,
        there.stock._sorting,  # it reads no more what the other one writes
    ):
        here.stock.put_project(Project("door"))
        here.stock.put_project(Project("gate", (), ("porch",)))
        assert there.stock.project("door") is there.stock.project("porch") is None
        for project, sentence in (
            (Project("shed", (), ("door",)), "door is the project 'door' already"),
            (Project("shed", (), ("porch",)), "porch is an alias of 'gate' already"),
            (Project("porch"), "porch is an alias of 'gate' already"),
        ):
            assert refused(functools.partial(there.stock.put_project, project)) == (409, sentence)


def test_project_says_how_large_its_partition_is_and_who_is_admitted(bench: Bench) -> None:
    stock = bench.stock
    stock.put_project(Project("lamp", ("esp8266",), ("bulb",), partition_size=7, admit="open"))
    found = stock.project("bulb")
    assert found is not None
    assert (found.partition_size, found.admit) == (7, "open")
    assert (stock.partition_size("lamp"), stock.admit("lamp")) == (7, "open")
    assert (stock.partition_size("firmware"), stock.admit("firmware")) == (0, "")
    stock.put_project(Project("lamp"))
    assert (stock.partition_size("lamp"), stock.admit("lamp")) == (0, "")


def test_project_of_the_folder_is_known_and_not_made(bench: Bench) -> None:
    assert bench.stock.project("firmware") == Project("firmware", made=False)
    bench.stock.put_project(Project("firmware", ("esp8266",)))
    assert bench.stock.project("firmware") == Project("firmware", ("esp8266",))


@pytest.mark.parametrize(
    ("project", "status", "sentence"),
    [
        (Project("has blank"), 422, "'has blank' is no name for a project: 1 to 64 of"),
        (Project("bulb", ("esp9",)), 422, f"no chip is called 'esp9', but {', '.join(CHIPS)}"),
        (Project("bulb", (), ("a b",)), 422, "'a b' is no name"),
        (Project("bulb", (), tuple(f"a{n}" for n in range(33))), 422, "at most 32 aliases"),
        (Project("bulb", (), ("lamp",)), 409, "lamp is the project 'lamp' already"),
        (Project("bulb", (), ("firmware",)), 409, "firmware is the project 'firmware' already"),
        (Project("bulb", (), ("bulb",)), 409, "bulb is the project 'bulb' already"),
        (Project("bulb", (), ("lampe",)), 409, "lampe is an alias of 'lamp' already"),
        (Project("bulb", (), ("x", "x")), 409, "or stands there twice"),
        (Project("lampe"), 409, "lampe is an alias of 'lamp'"),
        (Project("bulb", partition_size=-1), 422, "a partition has 1 to 1073741824 bytes"),
        (Project("bulb", partition_size=(1 << 30) + 1), 422, "a partition has"),
        (Project("bulb", admit="OPEN"), 422, "'OPEN' is neither open nor whitelist"),
    ],
)
def test_project_that_cannot_be_is_refused_and_nothing_changes(
    project: Project, status: int, sentence: str, bench: Bench
) -> None:
    bench.stock.put_project(Project("lamp", (), ("lampe",)))
    found = refused(lambda: bench.stock.put_project(project))
    assert (found[0], sentence in found[1]) == (status, True), found
    assert list(bench.stock.projects()) == ["firmware", "lamp"]
    assert bench.stock.project("lampe") == Project("lamp", (), ("lampe",))


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "-x", "_x", ".x", "a/b", "a b", "ä", "a\0", "a\n", "a" * 65, "latest",
        "Latest", "latest-minimal", "latest-safeboot", "api", "ADMIN", "devices", "files",
        "update", "versions", "healthz", "readyz", "metrics", "favicon.ico", "manifest.json",
        "esp32fota.json",
        "x.bin", "x.BIN", "x.gz", "x.zip", "x.md5", "x.sha256",
    ],
)  # fmt: skip
def test_name_that_a_url_needs_is_no_projects(name: str) -> None:
    assert refused(lambda: check_name(name))[0] == 422


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_any_other_name_is_one(name: str) -> None:
    if not re.search(
        r"(?i)\.(bin|gz|zip|json|ico|md5|sha256)$|^(api|latest.*|update|metrics|readyz)$", name
    ):
        check_name(name)


# -- 6. Rules -------------------------------------------------------------------------------------


def release(version: str, **facts: Any) -> Release:
    """A release for the ESP8266."""
    known = Facts("esp8266", **facts)
    return Release("lamp", Version.parse(version), "sketch", "", "x", (0,) * 5, known)


def report(version: str | None, device: str | None = MAC, **values: Any) -> Report:
    """What a device says."""
    running = Version.parse(version) if version else None
    return Report("lamp", "192.0.2.1", running, device, "esp8266", **values)


def code(objection: Objection | None) -> tuple[str, bool]:
    """Which one it is, and whether it is final."""
    return (objection.code, objection.final) if objection else ("", False)


@pytest.mark.parametrize(
    ("pinned", "running", "offered", "wanted"),
    [
        ("", "1.0.0", "1.1.0", ("", False)),
        ("", "1.1.0", "1.1.0", ("not-newer", True)),
        ("", "1.2.0", "1.1.0", ("not-newer", True)),
        ("", None, "1.1.0", ("", False)),
        ("1.1.0", "1.0.0", "1.1.0", ("", False)),
        ("1.1.0", "1.0.0", "1.2.0", ("pinned", False)),
        ("1.1.0", "1.2.0", "1.1.0", ("", False)),
        ("1.1.0", "1.2.0", "1.3.0", ("pinned", False)),
        ("1.1.0", "1.1.0", "1.1.0", ("not-newer", True)),
        ("1.1.0", "1.1.0", "1.2.0", ("not-newer", True)),
        ("1.1.0", "1.1.0+b7", "1.2.0", ("not-newer", True)),
        ("1.1.0", None, "1.1.0", ("", False)),
        ("1.1.0", None, "1.0.0", ("pinned", False)),
        ("1.1.0+b7", "1.0.0", "1.1.0", ("", False)),
    ],
)
def test_device_goes_up_or_to_its_pin(
    pinned: str, running: str | None, offered: str, wanted: tuple[str, bool]
) -> None:
    rule = towards_target(lambda *_: Policy(pin=pinned))
    assert code(rule(report(running), release(offered))) == wanted


@pytest.mark.parametrize("device", [None, "5C:CF:7F:00:00:00"])
@pytest.mark.parametrize(("running", "offered"), [("1.0.0", "1.1.0"), ("1.1.0", "1.1.0")])
def test_without_a_pin_it_is_only_newer(device: str | None, running: str, offered: str) -> None:
    rule = towards_target(lambda device, _: Policy(pin="9.9.9" * (device == MAC)))
    asked = report(running, device), release(offered)
    assert rule(*asked) == only_newer(*asked)


@pytest.mark.parametrize(
    ("pinned", "offered", "runs_it", "wanted"),
    [
        ("", "1.1.0", True, ("same-image", True)),
        ("", "1.1.0", False, ("", False)),
        ("1.1.0", "1.1.0", True, ("same-image", True)),
        ("1.0.0", "1.1.0", True, ("same-image", False)),
        ("1.0.0", "1.1.0", False, ("", False)),
    ],
)
def test_device_never_gets_the_image_it_runs(
    pinned: str, offered: str, runs_it: bool, wanted: tuple[str, bool]
) -> None:
    rule = not_again(lambda *_: Policy(pin=pinned), lambda _: frozenset())
    asked = report("1.0.0", sketch_md5="a" * 32)
    found = rule(asked, release(offered, running=frozenset(("a" * 32,) * runs_it)))
    assert code(found) == wanted


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        (None, ""),
        ("", "1.1.0 was withdrawn"),
        ("it loops", "1.1.0 was withdrawn: it loops"),
        (" it\r\nloops ", "1.1.0 was withdrawn: it loops"),
        ("x" * 999, f"1.1.0 was withdrawn: {'x' * 120}"),
    ],
)
def test_what_was_withdrawn_is_objected_to_with_the_reason(reason: str | None, wanted: str) -> None:
    found = withdrawn(lambda _: reason)(report("1.0.0"), release("1.1.0"))
    assert (found.reason if found else "") == wanted
    assert found is None or found == Objection("withdrawn", wanted, usual=True)


@pytest.mark.parametrize(
    ("kind", "size", "room", "wanted"),
    [
        ("sketch", 1000, 0, ""),
        ("sketch", 1000, 1000, ""),
        ("sketch", 1001, 1000, "too-big"),
        ("littlefs", 1001, 1000, ""),
    ],
)
def test_sketch_goes_only_where_the_partition_has_room(
    kind: str, size: int, room: int, wanted: str
) -> None:
    offered = dataclasses.replace(release("1.1.0"), kind=kind, identity=(0, 0, size, 0, 0))
    found = fits_partition({"lamp": room}.__getitem__)(report("1.0.0"), offered)
    assert code(found) == (wanted, False)
    assert found is None or (found.deny, found.foreign) == (False, False)


def test_device_gets_the_older_release_that_fits(folder: Path) -> None:
    small, large = image("1.1.0"), esp8266_image("lamp", "1.2.0", payload=bytes(9999))
    with publishing(folder) as site:
        publish(site, "/projects/lamp/releases/1.1.0", small)
        publish(site, "/projects/lamp/releases/1.2.0", large)
        stock_of(site).put_project(Project("lamp", partition_size=len(small)))
        reply = ask(site, "/lamp", "x-ESP8266-version: 1.0.0")
        assert (reply.status, reply.body) == (200, small)
        assert "too-big" in text_of(ask(site, "/lamp/lamp-1.2.0.bin"))
        later = publish(site, "/projects/lamp/releases/1.3.0", image("1.3.0") + large)
        assert later.status == 422
        again = esp8266_image("lamp", "1.3.0", payload=bytes(9999))
        later = publish(site, "/projects/lamp/releases/1.3.0", again)
        assert (later.status, "no device could take it" in text_of(later)) == (409, True)


@pytest.mark.parametrize(
    ("usual", "admit", "known", "status"),
    [
        ("OPEN", "", False, 200),
        ("OPEN", "open", False, 200),
        ("OPEN", "whitelist", False, 403),
        ("OPEN", "whitelist", True, 200),
        ("WHITELIST", "", False, 403),
        ("WHITELIST", "", True, 200),
        ("WHITELIST", "whitelist", False, 403),
        ("WHITELIST", "open", False, 200),
    ],
)
def test_project_may_admit_otherwise_than_the_others(
    usual: str, admit: str, known: bool, status: int, folder: Path
) -> None:
    who = f"x-ESP8266-STA-MAC: {MAC}"
    with publishing(folder, admit=usual) as site:
        stock_of(site).put_project(Project("firmware", admit=admit))
        if known:
            stock_of(site)._registry.admit("firmware", MAC)
        assert ask(site, "/firmware", "x-ESP8266-version: 1.0.0", who).status == status
        nobody = 200 if "open" in {admit, usual.lower() * (not admit)} else 403
        assert ask(site, "/firmware", "x-ESP8266-version: 1.0.0").status == nobody


VERSIONS = [f"1.{minor}.0" for minor in range(6)]


@given(
    st.sampled_from(VERSIONS), st.sampled_from(["", *VERSIONS]), st.sets(st.sampled_from(VERSIONS)),
    st.booleans(),
)  # fmt: skip
def test_pinned_device_gets_its_version_or_nothing(
    running: str, pinned: str, gone: set[str], says_its_digest: bool
) -> None:
    releases = [release(v, running=frozenset((v,))) for v in reversed(VERSIONS)]
    policy = Policy(pin=pinned)
    rules = [towards_target(lambda *_: policy), not_again(lambda *_: policy, lambda _: frozenset())]
    rules.append(withdrawn(lambda each: "" if str(each.version) in gone else None))
    asked = report(running, sketch_md5=running if says_its_digest else None)
    outcome = choose(asked, releases, [*rules, *SAFETY[1:]])
    higher = [v for v in reversed(VERSIONS) if v > running and v not in gone]
    wanted = ([pinned] if pinned not in {running, *gone} else []) if pinned else higher
    if wanted:
        assert isinstance(outcome, Release)
        assert str(outcome.version) == wanted[0]
    else:
        assert isinstance(outcome, Objection)


def test_pre_release_goes_to_who_is_pinned_to_it_and_to_nobody_else(folder: Path) -> None:
    with publishing(folder) as site, standing(site) as stand:
        for version in ("1.1.0", "2.0.0-rc.1"):
            publish(site, f"/projects/lamp/releases/{version}", image(version))
        start = functools.partial(Esp8266, host="127.0.0.1", port=stand.port, path="/lamp")
        other = start(image=image("1.0.0"), mac="5C:CF:7F:00:00:02")
        assert (other.update(), other.version) == ("HTTP_UPDATE_OK", "1.1.0")
        device = start(image=image("1.1.0"))
        assert device.update() == "HTTP_UPDATE_NO_UPDATES"
        wait_until(lambda: stock_of(site)._registry.annotate(device.mac, pin="2.0.0-rc.1"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "2.0.0-rc.1")
        assert device.update() == "HTTP_UPDATE_NO_UPDATES"
        assert other.update() == "HTTP_UPDATE_NO_UPDATES"


@pytest.mark.parametrize(
    ("pin", "channel", "offered", "wanted"),
    [
        ("", "", "2.0.0-rc.1", ("by-name-only", False)),
        ("", "beta", "2.0.0-rc.1", ("", False)),
        ("", "beta", "2.0.0", ("", False)),
        ("", "beta", str(UNVERSIONED), ("by-name-only", False)),
        ("2.0.0-rc.1", "", "2.0.0-rc.1", ("", False)),
        ("2.0.0-rc.2", "", "2.0.0-rc.1", ("by-name-only", False)),
    ],
)
def test_pre_release_fits_the_beta_channel_and_its_pin(
    pin: str, channel: str, offered: str, wanted: tuple[str, bool]
) -> None:
    policy = Policy(pin=pin, channel=channel)
    rule = fit_for(lambda *_: policy, lambda each: channel_of(each.version, ""))
    assert code(rule(report("1.0.0", MAC), release(offered))) == wanted


def test_device_on_the_beta_channel_gets_pre_releases_and_what_follows_them(folder: Path) -> None:
    with publishing(folder) as site, standing(site) as stand:
        for version in ("1.1.0", "2.0.0-rc.1"):
            publish(site, f"/projects/lamp/releases/{version}", image(version))
        start = functools.partial(Esp8266, host="127.0.0.1", port=stand.port, path="/lamp")
        stable = start(image=image("1.0.0"), mac="5C:CF:7F:00:00:02")
        device = start(image=image("1.0.0"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.1.0")
        wait_until(lambda: stock_of(site)._registry.annotate(device.mac, channel="beta"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "2.0.0-rc.1")
        assert (stable.update(), stable.version) == ("HTTP_UPDATE_OK", "1.1.0")
        assert stable.update() == "HTTP_UPDATE_NO_UPDATES"
        publish(site, "/projects/lamp/releases/2.0.0", image("2.0.0"))
        for each in (device, stable):
            assert (each.update(), each.version) == ("HTTP_UPDATE_OK", "2.0.0")


def test_pinned_device_goes_down_and_stays_there(folder: Path) -> None:
    with publishing(folder) as site, standing(site) as stand:
        for version in ("1.1.0", "1.2.0", "1.3.0"):
            publish(site, f"/projects/lamp/releases/{version}", image(version))
        device = Esp8266(host="127.0.0.1", port=stand.port, path="/lamp", image=image("1.2.0"))
        registry = stock_of(site)._registry
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.3.0")
        wait_until(lambda: registry.annotate(device.mac, pin="1.1.0"))
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.1.0")
        assert device.update() == "HTTP_UPDATE_NO_UPDATES"
        registry.annotate(device.mac, pin="")
        assert (device.update(), device.version) == ("HTTP_UPDATE_OK", "1.3.0")
