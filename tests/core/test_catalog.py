"""The catalog of a folder: what is offered, what is not, and what changes while it runs."""

from __future__ import annotations

import collections
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest

import ota_server
from ota_server import DirectoryCatalog, Facts, Refused, read_name
from tests.conftest import put, wait_until
from tests.data.make_images import esp32_image, esp8266_image

IMAGE = esp8266_image("app", "1.0.0")
NEXT = esp8266_image("app", "1.1.0")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="makes links, pipes and owners")


def scanned(folder: Path) -> DirectoryCatalog:
    catalog = DirectoryCatalog(str(folder))
    assert catalog.scan()
    return catalog


def offered(catalog: DirectoryCatalog, project: str = "app") -> list[str]:
    """The versions on offer, newest first."""
    try:
        return [str(release.version) for release in catalog.releases(project)]
    except Refused:
        return []


def refused(call: Callable[[], object]) -> tuple[int, str]:
    """Status and sentence of the refusal."""
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.status, caught.value.reason


# -- 1. Names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "project", "version"),
    [
        pytest.param("firmware-1.2.3", "firmware", "1.2.3", id="plain"),
        pytest.param("firmware-0.1", "firmware", "0.1.0", id="two numbers"),
        pytest.param("firmware-0.1.0", "firmware", "0.1.0", id="three numbers"),
        pytest.param("my-app-1.0.0", "my-app", "1.0.0", id="hyphen in the name"),
        pytest.param("esp32-1.0.0", "esp32", "1.0.0", id="digits in the name"),
        pytest.param("sensor2-0.1", "sensor2", "0.1.0", id="digit at the end of the name"),
        pytest.param("2-1.0.0", "2", "1.0.0", id="a digit for a name"),
        pytest.param("app.v2-1.0.0", "app.v2", "1.0.0", id="dot in the name"),
        pytest.param("my-app-2.0-1.2.3", "my-app-2.0", "1.2.3", id="version in the name"),
        pytest.param("app-esp32-2-1.2.3", "app-esp32-2", "1.2.3", id="number before the version"),
        pytest.param("firmware-v1.2.3", "firmware", "1.2.3", id="v"),
        pytest.param("firmware_1.2.3", "firmware", "1.2.3", id="underscore"),
        pytest.param("my app 1.2.3", "my app", "1.2.3", id="blanks"),
        pytest.param("1.2.3", "", "1.2.3", id="version alone"),
        pytest.param("v1.2", "", "1.2.0", id="v and version alone"),
        pytest.param("app-1.2.3-rc.1", "app", "1.2.3-rc.1", id="pre-release"),
        pytest.param("app-0.1-alpha", "app", "0.1.0-alpha", id="pre-release of two numbers"),
        pytest.param("my-app-1.2.3-rc.1", "my-app", "1.2.3-rc.1", id="pre-release, hyphen"),
        pytest.param("app-1.2.3+7", "app", "1.2.3+7", id="build"),
        pytest.param("app-1.2.3-rc.1+7", "app", "1.2.3-rc.1+7", id="pre-release and build"),
        pytest.param("Gerät-1.0.0", "Gerät", "1.0.0", id="umlaut"),
    ],
)
def test_project_and_version_are_read_from_a_name(stem: str, project: str, version: str) -> None:
    found, read = read_name(stem)
    assert (found, str(read)) == (project, version)


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        pytest.param("firmware", "has no version in its name", id="no version"),
        pytest.param("", "has no version in its name", id="nothing"),
        pytest.param("firmware-1", "has no version in its name", id="one number"),
        pytest.param("firmware1.0.0", "has no version in its name", id="no separator"),
        pytest.param("firmware.1.0", "has no version in its name", id="dot for a separator"),
        pytest.param("app-1.2.3.4", "whose version cannot be read: '1.2.3.4'", id="four numbers"),
        pytest.param("app-01.2.3", "whose version cannot be read: '01.2.3'", id="leading zero"),
        pytest.param("app-1.02", "whose version cannot be read: '1.02'", id="date"),
        pytest.param("app-1.2.3(2)", "whose version cannot be read", id="downloaded twice"),
        pytest.param("app-1.2.3 (2)", "whose version cannot be read", id="with a blank"),
        pytest.param("app-\N{ARABIC-INDIC DIGIT ONE}.2", "has no version", id="other digits"),
    ],
)
def test_name_without_a_readable_version_is_refused(stem: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_name(stem)


@pytest.mark.parametrize(
    ("path", "project"),
    [
        pytest.param("app-1.0.0.bin", "app", id="in the folder"),
        pytest.param("app/1.0.0.bin", "app", id="version alone in a project's folder"),
        pytest.param("app/v1.0.0.bin", "app", id="v"),
        pytest.param("app/app-1.0.0.bin", "app", id="its name again"),
        pytest.param("app/other-1.0.0.bin", "app", id="the folder's name counts"),
        pytest.param("my app 2.0/1.0.0.bin", "my app 2.0", id="folder with blanks and dots"),
        pytest.param("app-1.0.0/firmware-1.0.0.bin", "app-1.0.0", id="folder with a version"),
    ],
)
def test_file_is_offered_for_its_project(shelf: Path, path: str, project: str) -> None:
    put(shelf / path, IMAGE)
    catalog = scanned(shelf)
    assert catalog.projects() == [project]
    (release,) = catalog.releases(project)
    assert (release.project, str(release.version), release.kind) == (project, "1.0.0", "sketch")
    assert (release.name, release.size) == (Path(path).name, len(IMAGE))
    assert release.modified == int((shelf / path).stat().st_mtime)


def test_file_name_that_is_no_utf_8_is_offered(shelf: Path) -> None:
    name = os.fsdecode(b"caf\xe9-1.0.0.bin")
    put(shelf / name, IMAGE)
    assert offered(scanned(shelf), os.fsdecode(b"caf\xe9")) == ["1.0.0"]


def test_newest_comes_first_and_1_10_is_newer_than_1_9(folder: Path) -> None:
    put(folder / "firmware" / "1.2.bin", esp8266_image("firmware", "1.2"))
    assert offered(scanned(folder), "firmware") == ["1.10.0", "1.9.0", "1.2.0", "1.0.0"]


def test_newest_version_of_each_project_is_known_before_any_check(shelf: Path) -> None:
    for name in ("b-1.0.0", "b-1.10.0", "b-1.9.0", "a-0.1"):
        put(shelf / f"{name}.bin", b"not looked at")
    newest = DirectoryCatalog(str(shelf)).newest()
    assert [f"{name} {version}" for name, version in newest.items()] == ["a 0.1.0", "b 1.10.0"]


def test_project_is_never_found_by_the_start_of_its_name(shelf: Path) -> None:
    put(shelf / "sensor2-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    for project in ("sensor", "sensor2-", "SENSOR2", "sensor2-1.0.0", "", ".", "..", "/"):
        assert refused(lambda name=project: catalog.releases(name))[0] == 404  # type: ignore[misc]


# -- 2. Two files of one version -------------------------------------------------------------------


def test_newer_file_of_a_version_wins_and_the_log_warns_once(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE, age=500)
    put(shelf / "app-1.0.bin", esp8266_image("app", "1.0.0", seed=1), age=100)
    put(shelf / "app" / "v1.0.0.bin", esp8266_image("app", "1.0.0", seed=2), age=300)
    catalog = scanned(shelf)
    catalog.scan()
    assert [release.name for release in catalog.releases("app")] == ["app-1.0.bin"]
    for loser in ("/app-1.0.0.bin", "/v1.0.0.bin"):
        (line,) = lines(f"{loser} is not offered")
        assert line.startswith("WARNING")
        assert line.endswith("it has the version of app-1.0.bin, which is newer")


def test_older_file_of_a_version_stands_in_for_a_damaged_newer_one(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE, age=500)
    put(shelf / "app-1.0.bin", IMAGE[:-1], age=100)
    assert [release.name for release in scanned(shelf).releases("app")] == ["app-1.0.0.bin"]


def test_one_version_for_two_chips_is_two_releases(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app" / "app-esp8266-1.0.0.bin", IMAGE)
    put(shelf / "app" / "app-esp32-1.0.0.bin", esp32_image("app", "1.0.0"))
    catalog = scanned(shelf)
    chips = {release.facts.chip for release in catalog.releases("app")}
    assert chips == {"esp32", "esp8266"}
    assert lines("WARNING") == []


def test_newer_file_wins_among_those_of_its_chip_whatever_lies_between(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app" / "a-1.0.0.bin", IMAGE, age=100)
    put(shelf / "app" / "b-1.0.0.bin", esp32_image("app", "1.0.0"), age=200)
    put(shelf / "app" / "c-1.0.0.bin", esp8266_image("app", "1.0.0", seed=1), age=300)
    names = [release.name for release in scanned(shelf).releases("app")]
    assert names == ["a-1.0.0.bin", "b-1.0.0.bin"]
    assert len(lines("/c-1.0.0.bin is not offered: it has the version of a-1.0.0.bin")) == 1


# -- 3. What is not offered ------------------------------------------------------------------------


def _file(name: str, data: bytes = IMAGE) -> Callable[[Path], object]:
    return lambda folder: put(folder / name, data)


def _link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target)


def _outside(folder: Path) -> None:
    put(folder.parent / "secret" / "key-1.0.0.bin", IMAGE)
    (folder / "app-9.0.0.bin").symlink_to(folder.parent / "secret" / "key-1.0.0.bin")


def _outside_folder(folder: Path) -> None:
    put(folder.parent / "secret" / "key-1.0.0.bin", IMAGE)
    (folder / "app2").symlink_to(folder.parent / "secret")


def _up(folder: Path) -> None:
    put(folder.parent / "firmware2" / "key-1.0.0.bin", IMAGE)
    (folder / "app-9.0.0.bin").symlink_to("../firmware2/key-1.0.0.bin")


@pytest.mark.parametrize(
    ("make", "told", "reason"),
    [
        pytest.param(_file("app-9.0.0.bin.part"), ".part", "does not end in .bin", id="part"),
        pytest.param(_file("app-9.0.0.bin.tmp"), ".tmp", "does not end in .bin", id="tmp"),
        pytest.param(_file("app-9.0.0.zip"), ".zip", "zip data is wrong", id="zip"),
        pytest.param(_file("app-9.0.0.BIN"), ".BIN", "does not end in .bin", id="upper case"),
        pytest.param(_file(".app-9.0.0.bin"), "/.app", "is a dot file", id="dot file"),
        pytest.param(_file("app/.9.0.0.bin"), "/.9", "is a dot file", id="dot file of a project"),
        pytest.param(_file(".git/app-9.0.0.bin"), "/.git", "is a dot file", id="dot folder"),
        pytest.param(
            _file("app-9.0.0-rc.1.bin"), "rc.1", "is a pre-release, 9.0.0-rc.1", id="pre-release"
        ),
        pytest.param(_file("app.bin"), "app.bin", "has no version in its name", id="no version"),
        pytest.param(_file("9.0.0.bin"), "/9.0.0", "has no project in its name", id="no project"),
        pytest.param(_file("app-9.0.0.0.bin"), "9.0.0.0", "cannot be read", id="four numbers"),
        pytest.param(_file("app/a/9.0.0.bin"), "app/a", "does not end in .bin", id="too deep"),
        pytest.param(_file("app-9.0.0.bin", b"PK\3\4"), "9.0.0", "is no image", id="zip inside"),
        pytest.param(_file("app-9.0.0.bin", b""), "9.0.0", "is no image", id="empty"),
        pytest.param(_file("app-9.0.0.bin", IMAGE[:-9]), "9.0.0", "is cut off", id="cut off"),
        pytest.param(
            lambda folder: os.mkfifo(folder / "app-9.0.0.bin"), "9.0.0", "is no file", id="pipe"
        ),
        pytest.param(
            lambda folder: (folder / "app" / "9.0.0.bin").mkdir(parents=True),
            "9.0.0.bin",
            "is no file",
            id="folder that is called like a file",
        ),
        pytest.param(_outside, "app-9.0.0", "is a link that leaves the firmware", id="link out"),
        pytest.param(_up, "app-9.0.0", "is a link that leaves", id="link to a similar folder"),
        pytest.param(_outside_folder, "key-1.0.0", "is a link that leaves", id="folder link out"),
        pytest.param(
            _link("app-9.0.0.bin", "/dev/zero"), "app-9.0.0", "is a link that leaves", id="device"
        ),
        pytest.param(
            _link("app-9.0.0.bin", "gone"), "app-9.0.0", "cannot be read", id="link to none"
        ),
        pytest.param(_link("app-9.0.0.bin", "app-9.0.0.bin"), "9.0.0", "cannot be", id="loop"),
        pytest.param(_link("app2", "app-1.0.0.bin/x"), "app2", "", id="link through a file"),
    ],
)
def test_file_is_not_offered_and_the_log_says_once_why(
    shelf: Path,
    lines: Callable[[str], list[str]],
    make: Callable[[Path], object],
    told: str,
    reason: str,
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    make(shelf)
    catalog = scanned(shelf)
    catalog.scan()
    catalog.scan()
    assert offered(catalog) == ["1.0.0"]
    assert [offered(catalog, name) for name in catalog.projects() if name != "app"] == []
    (line,) = lines("is not offered")
    path, _, said = line.partition(" is not offered: it ")
    assert told in path
    assert reason in said


def test_folder_called_like_a_file_is_a_project_and_no_release(shelf: Path) -> None:
    (shelf / "app-9.0.0.bin").mkdir()
    put(shelf / "app-1.0.0.bin", IMAGE)
    assert offered(scanned(shelf)) == ["1.0.0"]


@pytest.mark.parametrize("target", ["builds/7.image", "../firmware/builds/7.image"])
def test_link_that_stays_inside_is_offered(shelf: Path, target: str) -> None:
    put(shelf / "builds" / "7.image", IMAGE)
    (shelf / "app-1.0.0.bin").symlink_to(target)
    catalog = scanned(shelf)
    (release,) = catalog.releases("app")
    with catalog.open(release).file as file:
        assert file.read() == IMAGE


def test_link_to_a_folder_inside_is_another_project(shelf: Path) -> None:
    put(shelf / "app" / "1.0.0.bin", IMAGE)
    (shelf / "alias").symlink_to("app")
    catalog = scanned(shelf)
    assert offered(catalog, "app") == offered(catalog, "alias") == ["1.0.0"]


def test_link_for_the_folder_itself_can_be_turned_while_running(shelf: Path) -> None:
    put(shelf / "1" / "app-1.0.0.bin", IMAGE)
    put(shelf / "2" / "app-1.1.0.bin", NEXT)
    (shelf / "now").symlink_to("1")
    catalog = scanned(shelf / "now")
    assert offered(catalog) == ["1.0.0"]
    (shelf / "then").symlink_to("2")
    (shelf / "then").replace(shelf / "now")
    catalog.scan()
    assert offered(catalog) == ["1.1.0"]


@pytest.fixture
def powerless() -> Iterator[Path]:
    """An empty folder of a user who, unlike root, is kept out by permissions."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_unreadable_file_is_told_once_and_offered_once_it_can_be_read(
    powerless: Path, lines: Callable[[str], list[str]]
) -> None:
    put(powerless / "app-1.0.0.bin", IMAGE)
    secret = put(powerless / "app-1.1.0.bin", NEXT)
    secret.chmod(0)
    catalog = scanned(powerless)
    catalog.scan()
    assert offered(catalog) == ["1.0.0"]
    (line,) = lines("is not offered")
    expected = f"app-1.1.0.bin is not offered: it cannot be read by uid {os.getuid()}"
    assert expected in line
    assert "Permission denied" in line
    secret.chmod(stat.S_IRUSR)
    catalog.scan()
    assert offered(catalog) == ["1.1.0", "1.0.0"]


def test_unreadable_project_folder_is_told_once_and_hides_no_other(
    powerless: Path, lines: Callable[[str], list[str]]
) -> None:
    put(powerless / "app-1.0.0.bin", IMAGE)
    put(powerless / "closed" / "1.0.0.bin", IMAGE)
    (powerless / "closed").chmod(0)
    catalog = scanned(powerless)
    catalog.scan()
    assert catalog.projects() == ["app"]
    (line,) = lines("is not offered")
    assert "closed is not offered: it cannot be read" in line
    (powerless / "closed").chmod(0o700)
    catalog.scan()
    assert offered(catalog, "closed") == ["1.0.0"]


def test_link_into_a_folder_nobody_may_enter_hides_no_other_project(powerless: Path) -> None:
    put(powerless / "app" / "1.0.0.bin", IMAGE)
    (powerless / "closed" / "inside").mkdir(parents=True)
    (powerless / "link").symlink_to("closed/inside")
    (powerless / "closed").chmod(0)
    catalog = scanned(powerless)
    (powerless / "closed").chmod(0o700)
    assert offered(catalog) == ["1.0.0"]


def test_unreadable_folder_is_an_error_at_the_start(powerless: Path) -> None:
    (powerless / "firmware").mkdir(0)
    with pytest.raises(PermissionError):
        DirectoryCatalog(str(powerless / "firmware"))


def test_file_name_cannot_forge_a_line_of_the_log(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "x\nERROR all is lost", b"")
    scanned(shelf)
    (line,) = lines("is not offered")
    assert "\n" not in line


# -- 4. Changes ------------------------------------------------------------------------------------


def test_half_copied_file_is_not_offered_and_the_lower_one_stands_in(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    put(shelf / "app-1.1.0.bin", NEXT[: len(NEXT) // 2])
    catalog = scanned(shelf)
    assert offered(catalog) == ["1.0.0"]
    put(shelf / "app-1.1.0.bin", NEXT, age=30)
    catalog.scan()
    assert offered(catalog) == ["1.1.0", "1.0.0"]
    assert len(lines("app-1.1.0.bin is not offered: it is cut off")) == 1


def test_added_renamed_and_removed_files_are_seen_by_the_next_scan(shelf: Path) -> None:
    catalog = scanned(shelf)
    assert catalog.projects() == []
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog.scan()
    assert offered(catalog) == ["1.0.0"]
    (shelf / "app-1.0.0.bin").rename(shelf / "app-2.0.0.bin")
    catalog.scan()
    assert offered(catalog) == ["2.0.0"]
    (shelf / "app-2.0.0.bin").rename(shelf / "other-2.0.0.bin")
    catalog.scan()
    assert catalog.projects() == ["other"]
    (shelf / "other-2.0.0.bin").unlink()
    catalog.scan()
    assert catalog.projects() == []


def test_replaced_file_is_seen_by_the_next_scan(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    before = catalog.releases("app")[0]
    put(shelf / ".new", NEXT).replace(path)
    catalog.scan()
    after = catalog.releases("app")[0]
    assert before.facts.sha256 != after.facts.sha256
    with catalog.open(after).file as file:
        assert file.read() == NEXT


def test_file_rewritten_in_place_is_seen_by_the_next_scan(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    inode = path.stat().st_ino
    put(path, esp8266_image("app", "1.0.0", seed=1), age=30)
    assert (path.stat().st_ino, path.stat().st_size) == (inode, len(IMAGE))
    before = catalog.releases("app")[0].facts
    catalog.scan()
    after = catalog.releases("app")[0].facts
    assert before.md5 != after.md5


def test_file_that_became_something_else_is_withdrawn(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    path = put(shelf / "app-1.1.0.bin", NEXT)
    catalog = scanned(shelf)
    put(path, b"oh no", age=30)
    catalog.scan()
    assert offered(catalog) == ["1.0.0"]


def test_running_catalog_sees_changes_within_two_seconds(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = DirectoryCatalog(str(shelf))
    catalog.start()
    try:
        wait_until(lambda: offered(catalog) == ["1.0.0"], 2.0)
        added = put(shelf / "app-1.1.0.bin", NEXT, age=0)
        wait_until(lambda: offered(catalog) == ["1.1.0", "1.0.0"], 2.0)
        added.unlink()
        wait_until(lambda: offered(catalog) == ["1.0.0"], 2.0)
    finally:
        catalog.close()


def test_catalog_that_never_started_can_be_closed(shelf: Path) -> None:
    DirectoryCatalog(str(shelf)).close()


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were checked, in order; they are really checked."""
    names: list[str] = []
    real = ota_server.inspect

    def counting(file: FileIO, kind: str) -> Facts:
        names.append(Path(str(file.name)).name)
        return real(file, kind)

    monkeypatch.setattr(ota_server, "inspect", counting)
    return names


def test_each_file_is_checked_once(shelf: Path, inspected: list[str]) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    put(shelf / "app-1.1.0.bin", b"broken")
    catalog = DirectoryCatalog(str(shelf))
    assert inspected == []
    for _ in range(4):
        catalog.scan()
    put(shelf / "other-1.0.0.bin", IMAGE)
    for _ in range(4):
        catalog.scan()
    expected = {"app-1.0.0.bin": 1, "app-1.1.0.bin": 1, "other-1.0.0.bin": 1}
    assert collections.Counter(inspected) == expected
    assert offered(catalog) == ["1.0.0"]


def test_rewrite_that_keeps_size_and_mtime_is_seen(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    (release,) = catalog.releases("app")
    before = path.stat()
    path.write_bytes(bytes(len(IMAGE)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync --times and cp -p do
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(Refused, match="being replaced"):
        catalog.open(release)
    catalog.scan()
    with pytest.raises(Refused, match="no file of 'app' can be offered"):
        catalog.releases("app")


def test_file_that_changes_while_it_is_checked_is_not_offered(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    real = ota_server.inspect

    def rewriting(file: FileIO, kind: str) -> Facts:
        facts = real(file, kind)
        put(path, bytes(len(IMAGE)))
        return facts

    monkeypatch.setattr(ota_server, "inspect", rewriting)
    with pytest.raises(Refused, match="not checked yet"):
        scanned(shelf).releases("app")


def test_want_of_descriptors_says_nothing_of_the_folder(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit of open files")
    put(shelf / "lamp" / "1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert catalog.scan() is True
        assert catalog.scan() is True
        names = [release.name for release in catalog.releases("lamp")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert names == ["1.0.0.bin"]
    assert len(lines("Too many open files")) == 1


@pytest.mark.parametrize(
    "stem",
    ["app-1.0.0+build-5.1", "sensor-1.2.3-rc-1.2", "1.0.0-1.2", "sensor-1.0.0-idf-5.1"],
)
def test_name_with_two_versions_promises_neither(stem: str) -> None:
    with pytest.raises(ValueError, match="two versions"):
        read_name(stem)


def test_newest_of_every_project_is_checked_first(shelf: Path, inspected: list[str]) -> None:
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        put(shelf / f"a-{version}.bin", IMAGE)
        put(shelf / f"b-{version}.bin", IMAGE)
    scanned(shelf)
    assert set(inspected[:2]) == {"a-1.10.0.bin", "b-1.10.0.bin"}
    assert set(inspected[2:4]) == {"a-1.9.0.bin", "b-1.9.0.bin"}


def test_file_that_may_still_be_written_is_not_offered_until_it_settles(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, inspected: list[str]
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    put(shelf / "app-1.1.0.bin", NEXT, age=0)
    with monkeypatch.context() as patch:
        patch.setattr(ota_server, "SETTLE_NS", 30_000_000_000)
        catalog = scanned(shelf)
        assert offered(catalog) == ["1.0.0"]
    wait_until(lambda: catalog.scan() and offered(catalog) == ["1.1.0", "1.0.0"], 2.0)
    assert inspected == ["app-1.0.0.bin", "app-1.1.0.bin"]


def test_file_from_the_future_is_offered(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE, age=-86400)
    assert offered(scanned(shelf)) == ["1.0.0"]


# -- 5. Opening ------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _rewrite(path: Path) -> None:
    put(path, esp8266_image("app", "1.0.0", seed=1), age=30)


def _swap(path: Path) -> None:
    put(path.parent / ".new", NEXT).replace(path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_away(path: Path) -> None:
    put(path.parent / ".old", b"").unlink()
    path.rename(path.parent / ".old")
    path.symlink_to(".old")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_swap, id="replaced"),
        pytest.param(_cut, id="cut off"),
        pytest.param(_rewrite, id="rewritten in place, same size"),
        pytest.param(Path.unlink, id="removed"),
        pytest.param(_pipe, id="became a pipe"),
        pytest.param(_directory, id="became a folder"),
        pytest.param(_link_away, id="became a link"),
    ],
)
def test_file_changed_since_its_check_is_refused_with_503(
    shelf: Path, change: Callable[[Path], None]
) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    (release,) = catalog.releases("app")
    change(path)
    status, reason = refused(lambda: catalog.open(release))
    assert status == 503
    assert reason.startswith("app-1.0.0.bin ")
    assert str(shelf) not in reason


def test_open_image_is_that_of_the_release(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    (release,) = catalog.releases("app")
    image = catalog.open(release)
    with image.file as file:
        assert file.read() == IMAGE
        assert image.is_unchanged()
    assert (image.size, image.md5, image.sha256) == (
        len(IMAGE),
        release.facts.md5,
        release.facts.sha256,
    )


def test_open_image_goes_on_with_its_bytes_when_the_file_is_replaced_or_removed(
    shelf: Path,
) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    image = catalog.open(catalog.releases("app")[0])
    with image.file as file:
        start = file.read(1000)
        put(shelf / ".new", NEXT).replace(path)
        path.unlink()
        assert image.is_unchanged()
        assert start + file.read() == IMAGE


@pytest.mark.parametrize("change", [_cut, _rewrite], ids=["cut off", "rewritten"])
def test_open_image_notices_that_it_is_rewritten_in_place(
    shelf: Path, change: Callable[[Path], None]
) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    image = catalog.open(catalog.releases("app")[0])
    with image.file:
        change(path)
        assert not image.is_unchanged()


# -- 6. Refusals -----------------------------------------------------------------------------------


def test_unknown_project_is_404_with_a_sentence(folder: Path) -> None:
    catalog = scanned(folder)
    status, reason = refused(lambda: catalog.releases("toaster"))
    assert status == 404
    assert "no project 'toaster'" in reason
    assert "name-1.2.3.bin" in reason


def test_project_not_yet_checked_is_503(folder: Path) -> None:
    catalog = DirectoryCatalog(str(folder))
    status, reason = refused(lambda: catalog.releases("firmware"))
    assert status == 503
    assert "not checked yet" in reason
    assert catalog.projects() == ["firmware"]


def test_project_without_a_whole_file_is_404_that_names_each_and_why(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE[:-1])
    put(shelf / "app-1.1.0.bin", b"hello")
    status, reason = refused(lambda: scanned(shelf).releases("app"))
    assert status == 404
    assert "app-1.0.0.bin is cut off" in reason
    assert "app-1.1.0.bin is no image" in reason
    assert str(shelf) not in reason


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("missing", FileNotFoundError, id="missing"),
        pytest.param("app-1.0.0.bin", NotADirectoryError, id="a file"),
    ],
)
def test_folder_that_is_none_is_an_error_at_the_start(
    shelf: Path, name: str, error: type[OSError]
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    with pytest.raises(error):
        DirectoryCatalog(str(shelf / name))


def test_folder_that_vanishes_is_503_until_it_is_back(
    folder: Path, lines: Callable[[str], list[str]]
) -> None:
    catalog = scanned(folder)
    away = folder.rename(folder.parent / "away")
    catalog.scan()
    catalog.scan()
    for call in (catalog.projects, lambda: catalog.releases("firmware")):
        status, reason = refused(call)
        assert status == 503
        assert "cannot be read just now" in reason
        assert str(folder) not in reason
    assert len(lines(f"ERROR the firmware folder {folder} cannot be read")) == 1
    away.rename(folder)
    catalog.scan()
    assert offered(catalog, "firmware") == ["1.10.0", "1.9.0", "1.0.0"]
    assert len(lines(f"WARNING the firmware folder {folder} is back")) == 1


def test_running_catalog_heals_when_its_folder_is_back(folder: Path) -> None:
    catalog = DirectoryCatalog(str(folder))
    catalog.start()
    try:
        wait_until(lambda: offered(catalog, "firmware") != [])
        away = folder.rename(folder.parent / "away")
        wait_until(lambda: offered(catalog, "firmware") == [], 2.0)
        away.rename(folder)
        wait_until(lambda: offered(catalog, "firmware") != [], 2.0)
    finally:
        catalog.close()
