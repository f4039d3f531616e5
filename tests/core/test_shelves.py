"""The catalog of a folder with every kind of file: names, twins, notes, files for people only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ota_server import (
    MAX_NOTES,
    UNKNOWN_CHIP,
    UNVERSIONED,
    DirectoryCatalog,
    Facts,
    Refused,
    Release,
)
from tests.conftest import put
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    fatfs_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
)

IMAGE = esp8266_image("app", "1.0.0")
PACKED = gzip_image(IMAGE)
DISK = littlefs_image(2)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="makes links and pipes")


def scanned(folder: Path, *, any_file: bool = False, max_open: int = 0) -> DirectoryCatalog:
    catalog = DirectoryCatalog(str(folder), any_file=any_file, max_open=max_open)
    assert catalog.scan()
    return catalog


def names(catalog: DirectoryCatalog, project: str = "app") -> list[str]:
    """The names of the files on offer, in order."""
    try:
        return [release.name for release in catalog.releases(project)]
    except Refused:
        return []


def notes(catalog: DirectoryCatalog, project: str = "app") -> list[str]:
    """The notes of the releases, in order."""
    return [release.notes for release in catalog.releases(project)]


def refused(call: Callable[[], object]) -> tuple[int, str]:
    """Status and sentence of the refusal."""
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.status, caught.value.reason


# -- 1. Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "kind", "packed"),
    [
        pytest.param("app-1.0.0.bin", IMAGE, "sketch", False, id="sketch"),
        pytest.param("app-1.0.0.bin.gz", PACKED, "sketch", True, id="packed"),
        pytest.param("app-1.0.0.bin", PACKED, "sketch", True, id="packed, by another name"),
        pytest.param("app-1.0.0.bin.gz", IMAGE, "sketch", False, id="plain, by another name"),
        pytest.param("app-1.0.0.littlefs.bin", DISK, "littlefs", False, id="littlefs"),
        pytest.param(
            "app-1.0.0.littlefs.bin.gz", gzip_image(DISK), "littlefs", True, id="littlefs, packed"
        ),
        pytest.param("app-1.0.0.spiffs.bin", spiffs_image(2), "spiffs", False, id="spiffs"),
        pytest.param("app-1.0.0.fatfs.bin", fatfs_image(4), "fatfs", False, id="fatfs"),
        pytest.param("app-v1.0.littlefs.bin", DISK, "littlefs", False, id="v and two numbers"),
        pytest.param("app-1.0.0.zip", mongoose_zip("app", "1.0.0"), "zip", False, id="zip"),
        pytest.param("app/1.0.0.bin.gz", PACKED, "sketch", True, id="packed, in a folder"),
        pytest.param("app/1.0.0.littlefs.bin", DISK, "littlefs", False, id="folder, littlefs"),
        pytest.param("app/fs_1.0.0.spiffs.bin", spiffs_image(2), "spiffs", False, id="folder"),
        pytest.param("app/x-1.0.0.zip", mongoose_zip("x", "1.0.0"), "zip", False, id="folder, zip"),
    ],
)
def test_name_tells_what_kind_of_release_a_file_is(
    shelf: Path, name: str, data: bytes, kind: str, packed: bool
) -> None:
    put(shelf / name, data)
    (release,) = scanned(shelf).releases("app")
    assert (release.project, str(release.version), release.kind) == ("app", "1.0.0", kind)
    assert (release.name, release.facts.packed) == (Path(name).name, packed)
    assert release.size == len(data)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("app-1.0.0.littlefs", "does not end in .bin", id="no .bin"),
        pytest.param("app-1.0.0.gz", "does not end in .bin", id="no .bin before .gz"),
        pytest.param("app-1.0.0.bin.GZ", "does not end in .bin", id="upper case"),
        pytest.param("app-1.0.0.bin.gz.part", "does not end in .bin", id="still copied"),
        pytest.param("app-1.0.0.zip.gz", "does not end in .bin", id="packed zip"),
        pytest.param("app-1.0.0.bin.md5", "does not end in .bin", id="digest of another server"),
        pytest.param("app-1.0.0.ext4.bin", "whose version cannot be read", id="other file system"),
        pytest.param("app-1.0.0.littlefs.zip", "zip data is wrong", id="zip of a file system"),
        pytest.param("app-1.0.0.LittleFS.bin", "whose version cannot", id="capitals"),
        pytest.param("app.littlefs.bin", "has no version in its name", id="no version"),
        pytest.param("app.bin.gz", "has no version in its name", id="no version, packed"),
        pytest.param("1.0.0.littlefs.bin", "has no project in its name", id="no project"),
        pytest.param("app-1.0.0-rc.1.littlefs.bin", "is a pre-release", id="pre-release"),
        pytest.param(".littlefs.bin", "is a dot file", id="dot file"),
        pytest.param("app-1.0.0.littlefs.bin", "no littlefs image", id="sketch for littlefs"),
        pytest.param("app-1.0.0.spiffs.bin", "no spiffs image", id="sketch for spiffs"),
        pytest.param("app-1.0.0.fatfs.bin.gz", "no fatfs image", id="sketch for fatfs"),
        pytest.param("app-1.0.0.zip", "zip data is wrong", id="sketch for a zip"),
    ],
)
def test_file_with_another_name_or_content_is_told_once(
    shelf: Path, lines: Callable[[str], list[str]], name: str, reason: str
) -> None:
    put(shelf / name, IMAGE)
    catalog = scanned(shelf)
    catalog.scan()
    assert names(catalog) == []
    (line,) = lines("is not offered")
    assert reason in line


def test_zip_that_breaks_the_unpacker_keeps_no_other_file_from_being_checked(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    for number, compression in enumerate((0, 8, 12, 14)):
        zipped = bytearray(mongoose_zip("app", "1.0.0", compression=compression))
        zipped[len(zipped) // 2] ^= 0xFF
        put(shelf / f"app-9.0.{number}.zip", bytes(zipped))
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    assert names(catalog) == ["app-1.0.0.bin"]
    assert len(lines("is not offered")) == 4
    assert lines("failed") == []


# -- 2. Several files of one version ---------------------------------------------------------------


def test_kinds_and_chips_of_one_version_are_as_many_releases(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app" / "8266-1.0.0.bin", IMAGE)
    put(shelf / "app" / "8266-1.0.0.bin.gz", PACKED)
    put(shelf / "app" / "32-1.0.0.bin", esp32_image("app", "1.0.0"))
    put(shelf / "app" / "fs-1.0.0.littlefs.bin", DISK)
    put(shelf / "app" / "fs-1.0.0.littlefs.bin.gz", gzip_image(DISK))
    put(shelf / "app" / "fs-1.0.0.spiffs.bin", spiffs_image(2))
    put(shelf / "app" / "mos-1.0.0.zip", mongoose_zip("app", "1.0.0"))
    put(shelf / "app" / "mos8266-1.0.0.zip", mongoose_zip("app", "1.0.0", platform="esp8266"))
    assert len(names(scanned(shelf))) == 8
    assert lines("WARNING") == []


@pytest.mark.parametrize("older", ["plain", "packed"])
def test_plain_image_comes_before_its_packed_twin_whichever_is_newer(
    shelf: Path, older: str
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE, age=500 if older == "plain" else 100)
    put(shelf / "app-1.0.0.bin.gz", PACKED, age=300)
    put(shelf / "app-1.1.0.bin.gz", gzip_image(esp8266_image("app", "1.1.0")), age=900)
    expected = ["app-1.1.0.bin.gz", "app-1.0.0.bin", "app-1.0.0.bin.gz"]
    assert names(scanned(shelf)) == expected


def test_damaged_twin_leaves_the_other(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE[:-1])
    put(shelf / "app-1.0.0.bin.gz", PACKED)
    assert names(scanned(shelf)) == ["app-1.0.0.bin.gz"]


def test_newer_of_two_filesystems_of_a_version_wins(
    shelf: Path, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app-1.0.littlefs.bin", littlefs_image(2, seed=1), age=500)
    put(shelf / "app-1.0.0.littlefs.bin", DISK, age=100)
    assert names(scanned(shelf)) == ["app-1.0.0.littlefs.bin"]
    (line,) = lines("app-1.0.littlefs.bin is not offered")
    assert "has the version of app-1.0.0.littlefs.bin" in line


# -- 3. Files without a version --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("blink.bin", id="no version"),
        pytest.param("firmware_v1.bin", id="one number, as in the README of S0"),
        pytest.param("app-1.02.bin", id="odd version"),
        pytest.param("app-1.2.3.4.bin", id="four numbers"),
        pytest.param("app-0.0.0-unversioned.bin", id="the word for it"),
        pytest.param("latest.bin", id="latest"),
        pytest.param("fs.littlefs.bin", id="file system"),
    ],
)
def test_file_without_a_version_in_a_projects_folder_can_be_had_by_name(
    shelf: Path, name: str
) -> None:
    put(shelf / "app" / name, DISK if "littlefs" in name else IMAGE)
    (release,) = scanned(shelf).releases("app")
    assert (release.project, release.name, release.version) == ("app", name, UNVERSIONED)
    assert release.facts.sha256


def test_files_without_a_version_are_all_kept_and_come_last(shelf: Path) -> None:
    put(shelf / "app" / "b.bin", IMAGE, age=100)
    put(shelf / "app" / "a.bin", esp8266_image("app", "2.0.0"), age=200)
    put(shelf / "app" / "0.0.1.bin", IMAGE, age=900)
    catalog = scanned(shelf)
    assert names(catalog) == ["0.0.1.bin", "b.bin", "a.bin"]
    assert [str(version) for version in catalog.newest().values()] == ["0.0.1"]


def test_pre_release_stays_one_in_a_folder_too(shelf: Path) -> None:
    put(shelf / "app" / "app-1.0.0-rc.1.bin", IMAGE)
    assert names(scanned(shelf)) == []


# -- 4. Release notes ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "app/"])
def test_notes_appear_change_and_disappear_with_the_next_look(shelf: Path, folder: str) -> None:
    put(shelf / f"{folder}app-1.0.0.bin", IMAGE)
    put(shelf / f"{folder}app-1.1.0.bin", esp8266_image("app", "1.1.0"))
    catalog = scanned(shelf)
    assert notes(catalog) == ["", ""]
    path = put(shelf / f"{folder}app-1.0.0.md", b"* Warmer white\n")
    catalog.scan()
    assert notes(catalog) == ["", "* Warmer white"]
    put(path, b"* Colder white\n", age=30)
    catalog.scan()
    assert notes(catalog) == ["", "* Colder white"]
    path.rename(path.with_name("app-1.1.0.md"))
    catalog.scan()
    assert notes(catalog) == ["* Colder white", ""]
    path.with_name("app-1.1.0.md").unlink()
    catalog.scan()
    assert notes(catalog) == ["", ""]


def test_notes_do_not_have_images_checked_again(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf)
    before = catalog.releases("app")[0]
    put(shelf / "app-1.0.0.md", b"new")
    (shelf / "app-1.0.0.bin").chmod(0o400)  # would change the identity, and must not
    DirectoryCatalog(str(shelf))
    catalog.scan()
    after = catalog.releases("app")[0]
    assert after.notes == "new"
    assert after.facts == before.facts


def test_notes_belong_to_all_files_of_their_name(shelf: Path) -> None:
    for ending, data in {"bin": IMAGE, "bin.gz": PACKED, "littlefs.bin": DISK}.items():
        put(shelf / f"app-1.0.0.{ending}", data)
    put(shelf / "app-1.0.0.md", b"all")
    put(shelf / "app-1.0.md", b"not this one")
    assert notes(scanned(shelf)) == ["all"] * 3


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(b"", "", id="empty"),
        pytest.param(b" \n\n", "", id="blanks"),
        pytest.param("Grüße 🎉\n".encode(), "Grüße 🎉", id="UTF-8"),
        pytest.param(b"caf\xe9", "caf\ufffd", id="no UTF-8"),
        pytest.param(b"\xef\xbb\xbfx", "\ufeffx", id="byte order mark"),
        pytest.param(b"a\0b\x1b[31m", "a\0b\x1b[31m", id="control characters, as they are"),
        pytest.param(b"x" * MAX_NOTES, "x" * MAX_NOTES, id="as long as may be"),
        pytest.param(b"x" * (MAX_NOTES + 9), "x" * MAX_NOTES, id="too long"),
        pytest.param(b"x" + "ü".encode() * MAX_NOTES, "x" + "ü" * 8191 + "\ufffd", id="cut"),
    ],
)
def test_notes_are_text_whatever_is_in_the_file(shelf: Path, data: bytes, text: str) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    put(shelf / "app-1.0.0.md", data)
    assert notes(scanned(shelf)) == [text]


def _link(path: Path) -> None:
    put(path.parent.parent / "secret", b"secret")
    path.symlink_to("../secret")


def _inner_link(path: Path) -> None:
    put(path.parent / "builds" / "notes", b"inside")
    path.symlink_to("builds/notes")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_link, id="link that leaves the folder"),
        pytest.param(_inner_link, id="link, also inside"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="link to nothing"),
        pytest.param(lambda path: path.symlink_to(path.name), id="link to itself"),
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(Path.mkdir, id="folder"),
    ],
)
def test_notes_that_are_no_file_are_none_and_hide_nothing(
    shelf: Path, make: Callable[[Path], None], lines: Callable[[str], list[str]]
) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    make(shelf / "app-1.0.0.md")
    catalog = scanned(shelf)
    catalog.scan()
    assert notes(catalog) == [""]
    assert len(lines("app-1.0.0.md is not offered")) <= 1
    assert lines("failed") == []


def test_notes_of_nothing_are_no_project(shelf: Path) -> None:
    put(shelf / "README.md", b"# Firmware")
    put(shelf / "app" / "1.0.0.md", b"x")
    put(shelf / ".md", b"x")
    assert scanned(shelf).projects() == []


# -- 5. Files of any content -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("app/firmware_v1.bin", b"dummy firmware data\n", id="README of S0"),
        pytest.param("app-1.0.0.bin", IMAGE[:-1], id="half copied"),
        pytest.param("app/data.zip", b"x", id="zip"),
        pytest.param("app-1.0.0.littlefs.bin", b"", id="empty"),
        pytest.param("app-1.0.0.bin.gz", PACKED + b"x", id="would brick"),
    ],
)
def test_any_file_is_there_for_people_where_that_is_wanted(
    shelf: Path, name: str, data: bytes, lines: Callable[[str], list[str]]
) -> None:
    put(shelf / name, data)
    assert names(scanned(shelf)) == []
    assert len(lines("is not offered")) == 1
    catalog = scanned(shelf, any_file=True)
    (release,) = catalog.releases("app")
    assert release.facts == Facts(UNKNOWN_CHIP, md5=release.facts.md5, sha256=release.facts.sha256)
    image = catalog.open(release)
    with image.file as file:
        assert file.read() == data
    assert len(lines("is not offered")) == 1


def test_image_is_judged_as_ever_where_any_file_is_there(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    (release,) = scanned(shelf, any_file=True).releases("app")
    assert release.facts.chip == "esp8266"


def test_half_copied_file_is_an_image_once_it_is_whole(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE[:99])
    catalog = scanned(shelf, any_file=True)
    assert catalog.releases("app")[0].facts.chip == UNKNOWN_CHIP
    put(path, IMAGE, age=30)
    catalog.scan()
    assert catalog.releases("app")[0].facts.chip == "esp8266"


# -- 6. How many are open --------------------------------------------------------------------------


def test_no_more_images_are_open_than_may_be_and_one_that_closes_makes_room(shelf: Path) -> None:
    put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf, max_open=2)
    (release,) = catalog.releases("app")
    first, second = catalog.open(release), catalog.open(release)
    status, reason = refused(lambda: catalog.open(release))
    assert (status, reason) == (503, "2 downloads are on their way: ask again later")
    first.file.close()
    third = catalog.open(release)
    assert refused(lambda: catalog.open(release))[0] == 503
    second.file.close()
    third.file.close()
    for _ in range(5):
        catalog.open(release).file.close()


def test_image_that_cannot_be_opened_takes_no_place(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.bin", IMAGE)
    catalog = scanned(shelf, max_open=1)
    (release,) = catalog.releases("app")
    put(path, IMAGE + b"x", age=30)
    for _ in range(3):
        assert "is just being replaced" in refused(lambda: catalog.open(release))[1]
    path.unlink()
    for _ in range(3):
        assert "cannot be read" in refused(lambda: catalog.open(release))[1]
    put(path, IMAGE)
    catalog.scan()
    catalog.open(catalog.releases("app")[0]).file.close()


def test_release_says_its_size_and_time_in_whole_seconds(shelf: Path) -> None:
    path = put(shelf / "app-1.0.0.littlefs.bin", DISK)
    os.utime(path, ns=(0, 1_700_000_000_999_999_999))
    catalog = DirectoryCatalog(str(shelf))
    catalog.scan()
    release: Release = catalog.releases("app")[0]
    assert (release.size, release.modified) == (len(DISK), 1_700_000_000)
