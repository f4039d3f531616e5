"""Every route by answer(site, Request): newest images by their names, digests, manifests, lists."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ota_server import (
    ESP32_CHIPS,
    ROUTES,
    Config,
    DirectoryCatalog,
    Reply,
    Request,
    Site,
    answer,
    build_site,
    parse_head,
)
from tests.conftest import put, site_of
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
    tasmota32_image,
    tasmota_image,
)

PEER = "192.0.2.7"
ESP8266 = {"x-esp8266-version": "1.0.0", "user-agent": "ESP8266-http-Update"}
ESP32 = {"x-esp32-version": "1.0.0", "user-agent": "ESP32-http-Update"}
IDF = {"user-agent": "ESP32 HTTP Client/1.0"}
MONGOOSE = {"x-mgos-fw-version": "esp32 1.0.0 b", "x-mgos-device-id": "esp32_D AABBCCDDEEFF"}
Headers = Mapping[str, str]

# The name that ESPHome compares with its own, esp32/const.py VARIANT_FRIENDLY; those of ESP Web
# Tools, const.ts, are some of them. E22 has no name there yet.
FAMILIES = {
    "esp8266": "ESP8266", "esp32": "ESP32", "esp32s2": "ESP32-S2", "esp32c3": "ESP32-C3",
    "esp32s3": "ESP32-S3", "esp32c2": "ESP32-C2", "esp32c6": "ESP32-C6", "esp32h2": "ESP32-H2",
    "esp32p4": "ESP32-P4", "esp32c61": "ESP32-C61", "esp32c5": "ESP32-C5",
    "esp32h21": "ESP32-H21", "esp32h4": "ESP32-H4", "esp32e22": "ESP32-E22",
    "esp32s31": "ESP32-S31",
}  # fmt: skip


def ask(
    site: Site, target: str, headers: Headers | None = None, method: str = "GET"
) -> tuple[Reply, bytes]:
    """The reply and what would be sent behind its head; the file is closed."""
    path, _, query = target.partition("?")
    fields = {"host": "ota:8000"} | dict(headers or {})
    reply = answer(
        site, Request(method, unquote(path, errors="surrogateescape"), query, fields, PEER)
    )
    if isinstance(reply.body, bytes):
        return reply, reply.body
    with reply.body.file as file:
        return reply, file.read()[reply.part.start : reply.part.stop]


def name_of(site: Site, target: str, headers: Headers | None = None) -> str:
    """The name of the file that comes, else the status and why none does."""
    reply, _ = ask(site, target, headers)
    fields = dict(reply.headers)
    if reply.status == 200:
        return re.sub('.*filename="(.*?)".*', r"\1", fields["Content-Disposition"])
    return f"{reply.status} {fields.get('X-OTA-Reason', '').partition(':')[0]}"


def json_of(site: Site, target: str, headers: Headers | None = None) -> Any:
    """The object that comes; devices want its length."""
    reply, body = ask(site, target, headers)
    fields = dict(reply.headers)
    assert (reply.status, fields["Content-Type"]) == (200, "application/json"), body
    assert fields["Content-Length"] == str(len(body))
    assert body.isascii()
    return json.loads(body)


def reason_of(site: Site, target: str, status: int, headers: Headers | None = None) -> str:
    """Why that status comes."""
    reply, body = ask(site, target, headers)
    assert reply.status == status, body
    return body.decode().rstrip("\n")


def filled(folder: Path, files: Mapping[str, bytes], **settings: Any) -> Site:
    """A site over a folder with these files, the first the newest."""
    for age, (name, data) in enumerate(files.items(), 60):
        put(folder / name, data, age=age)
    folder.mkdir(exist_ok=True)
    return site_of(folder, **settings)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with `lamp` for the ESP8266, `node` for one ESP32, `gate` for Mongoose OS."""
    files = {
        "lamp-1.0.0.bin": esp8266_image("lamp", "1.0.0"),
        "lamp-1.10.0.bin": esp8266_image("lamp", "1.10.0"),
        "lamp-1.10.0.bin.gz": gzip_image(esp8266_image("lamp", "1.10.0", flash_mode=3)),
        "lamp-1.10.0.littlefs.bin": littlefs_image(2),
        "lamp-2.0.0.littlefs.bin": littlefs_image(2, seed=1),
        "lamp-1.10.0.md": b"* Warmer white\n",
        "lamp/blink.bin": esp8266_image("lamp", "0"),
        "lamp-minimal-1.0.0.bin.gz": gzip_image(esp8266_image("lamp", "1.0.0", flash_mode=3)),
        "lamp-safeboot-1.0.0.bin": esp32_image("lamp", "1.0.0"),
        "node-1.0.0.bin": esp32_image("node", "1.0.0"),
        "node-1.1.0.bin": esp32_image("node", "1.1.0"),
        "node-1.1.0.littlefs.bin": littlefs_image(2, seed=2),
        "node-1.1.0.spiffs.bin": spiffs_image(2),
        "gate-1.1.0.zip": mongoose_zip("gate", "1.1.0"),
    }
    return filled(tmp_path / "firmware", files)


# -- 1. The newest image ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param("/lamp/latest.bin", "lamp-1.10.0.bin", id="latest.bin"),
        pytest.param("/lamp/latest", "lamp-1.10.0.bin", id="latest"),
        pytest.param("/lamp/latest.bin.gz", "lamp-1.10.0.bin.gz", id="latest.bin.gz"),
        pytest.param("/lamp.bin", "lamp-1.10.0.bin", id="project.bin"),
        pytest.param("/lamp.bin.gz", "lamp-1.10.0.bin.gz", id="project.bin.gz"),
        pytest.param("/ota/x/lamp/latest.bin", "lamp-1.10.0.bin", id="deeper"),
        pytest.param("/ota/x/lamp.bin.gz", "lamp-1.10.0.bin.gz", id="deeper, project.bin.gz"),
        pytest.param("//lamp.bin", "lamp-1.10.0.bin", id="two slashes"),
        pytest.param("/lamp/latest-minimal.bin.gz", "lamp-minimal-1.0.0.bin.gz", id="minimal"),
        pytest.param("/lamp-minimal.bin.gz", "lamp-minimal-1.0.0.bin.gz", id="minimal by name"),
        pytest.param("/lamp/latest-minimal.bin", "lamp-minimal-1.0.0.bin.gz", id="only packed"),
        pytest.param("/lamp/latest-safeboot.bin", "lamp-safeboot-1.0.0.bin", id="safeboot"),
        pytest.param("/lamp-safeboot.bin.gz", "lamp-safeboot-1.0.0.bin", id="only plain"),
        pytest.param("/firmware/lamp/latest", "lamp-1.10.0.bin", id="as S0 has it"),
        pytest.param("/node/latest.bin?version=0.9", "node-1.1.0.bin", id="version in the query"),
        pytest.param("/node/latest.bin?version=1.1.0", "304 not-newer", id="up to date"),
        pytest.param("/lamp/lamp-1.0.0.bin", "lamp-1.0.0.bin", id="a file"),
        pytest.param("/lamp-1.0.0.bin?version=2.0.0", "lamp-1.0.0.bin", id="file, also downwards"),
        pytest.param("/lamp/blink.bin", "blink.bin", id="file without a version"),
        pytest.param("/x/y/blink.bin", "404 no project 'y'", id="another project's file"),
        pytest.param("/lamp-2.0.0.littlefs.bin", "lamp-2.0.0.littlefs.bin", id="file system"),
        pytest.param("/gate-1.1.0.zip", "gate-1.1.0.zip", id="zip"),
        pytest.param("/lamp/latest.zip", "404 no file 'latest.zip' of 'lamp'", id="x"),
    ],
)
def test_name_of_the_newest_image_gives_it(site: Site, path: str, name: str) -> None:
    assert name_of(site, path).startswith(name)


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        pytest.param("/lamp.bin", ESP8266, "lamp-1.10.0.bin", id="goes up"),
        pytest.param("/lamp.bin.gz", ESP8266, "lamp-1.10.0.bin.gz", id="packed"),
        pytest.param("/lamp", ESP8266, "lamp-1.10.0.bin", id="plain before packed"),
        pytest.param(
            "/lamp", ESP8266 | {"x-esp8266-free-space": "5000"}, "lamp-1.10.0.bin.gz", id="small"
        ),
        pytest.param(
            "/lamp/latest.bin",
            ESP8266 | {"x-esp8266-version": "1.10.0"},
            "304 not-newer",
            id="same",
        ),
        pytest.param("/lamp.bin", ESP32, "403 wrong-chip", id="ESP32"),
        pytest.param("/lamp.bin", IDF, "403 wrong-chip", id="ESP-IDF"),
        pytest.param("/lamp/blink.bin", ESP32, "403 wrong-chip", id="a file for another chip"),
        pytest.param("/node/latest.bin", IDF, "node-1.1.0.bin", id="ESP-IDF without a version"),
        pytest.param("/node/latest.bin", ESP8266, "403 wrong-chip", id="ESP8266"),
        pytest.param(
            "/lamp",
            ESP8266 | {"x-esp8266-mode": "spiffs"},
            "lamp-2.0.0.littlefs.bin",
            id="updateFS",
        ),
        pytest.param(
            "/lamp.bin",
            ESP8266 | {"x-esp8266-mode": "spiffs"},
            "lamp-2.0.0.littlefs.bin",
            id="updateFS by another name",
        ),
        pytest.param(
            "/node", ESP32 | {"x-esp32-mode": "spiffs"}, "node-1.1.0.littlefs.bin", id="ESP32"
        ),
        pytest.param(
            "/node", ESP32 | {"x-esp32-mode": "fatfs"}, "304 wrong-kind", id="no such filesystem"
        ),
        pytest.param("/gate", MONGOOSE, "gate-1.1.0.zip", id="Mongoose OS"),
        pytest.param("/gate.zip", MONGOOSE, "gate-1.1.0.zip", id="Mongoose OS, by the name"),
        pytest.param("/gate/latest", MONGOOSE, "gate-1.1.0.zip", id="Mongoose OS, latest"),
        pytest.param("/node", MONGOOSE, "304 wrong-kind", id="Mongoose OS, a sketch"),
        pytest.param("/gate", ESP32, "304 wrong-kind", id="a zip for a sketch"),
        pytest.param(
            "/gate", MONGOOSE | {"x-mgos-fw-version": "esp32c3 1.0 b"}, "403 wrong-chip", id="C3"
        ),
    ],
)
def test_device_gets_its_newest_image_by_any_name(
    site: Site, path: str, headers: Headers, name: str
) -> None:
    assert name_of(site, path, headers) == name


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        pytest.param("/fan.bin", "no project 'fan'", id="project.bin"),
        pytest.param("/fan/latest.bin", "no project 'fan'", id="latest.bin"),
        pytest.param("/latest", "no project 'latest'", id="latest alone"),
        pytest.param("/latest.bin", "no project 'latest'", id="latest.bin alone"),
        pytest.param("/node/latest-minimal.bin", "no project 'node-minimal'", id="no minimal"),
        pytest.param("/node/node-9.0.0.bin", "no file 'node-9.0.0.bin' of 'node'", id="no file"),
        pytest.param("/node/latest.bin.md5.md5", "no ", id="digest of a digest"),
        pytest.param("/node/latest.bin.sha256.md5", "no ", id="digest of another digest"),
        pytest.param("/fan/manifest.json", "no project 'fan'", id="manifest"),
        pytest.param("/fan/esp32fota.json", "no project 'fan'", id="esp32FOTA"),
        pytest.param("/fan/versions", "no project 'fan'", id="versions"),
        pytest.param("/fan.bin.md5", "no project 'fan'", id="digest"),
    ],
)
def test_what_is_not_there_is_404_that_names_it(site: Site, path: str, reason: str) -> None:
    assert reason_of(site, path, 404).startswith(reason)


# -- 2. Digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/lamp/latest.bin",
        "/lamp/latest.bin.gz",
        "/lamp/latest",
        "/lamp.bin",
        "/lamp/latest-minimal.bin.gz",
        "/lamp/lamp-1.0.0.bin",
        "/lamp-2.0.0.littlefs.bin",
        "/lamp/blink.bin",
        "/node/latest.bin",
        "/gate-1.1.0.zip",
        "/a/b/lamp.bin.gz",
    ],
)
@pytest.mark.parametrize("headers", [{}, IDF], ids=["anybody", "ESP32"])
def test_digest_is_that_of_what_the_url_gives(site: Site, path: str, headers: Headers) -> None:
    reply, image = ask(site, path, headers)
    for algorithm in ("md5", "sha256"):
        digest, body = ask(site, f"{path}.{algorithm}", headers)
        if reply.status != 200:
            assert digest.status == 404
            continue
        word, name = body.decode().rstrip("\n").split("  ")
        assert word == hashlib.new(algorithm, image, usedforsecurity=False).hexdigest()
        assert word == dict(reply.headers)["x-MD5" if algorithm == "md5" else "x-SHA256"]
        assert f'filename="{name}"' in dict(reply.headers)["Content-Disposition"]
        assert len(body) <= 512
        fields = dict(digest.headers)
        assert fields["Content-Type"].startswith("text/plain")
        assert fields["Access-Control-Allow-Origin"] == "*"


def test_digest_follows_the_newest_image(tmp_path: Path) -> None:
    site = filled(tmp_path, {"lamp-1.0.0.bin": esp8266_image("lamp", "1.0.0")})
    before = ask(site, "/lamp/latest.bin.md5")[1]
    put(tmp_path / "lamp-1.1.0.bin", esp8266_image("lamp", "1.1.0"))
    assert isinstance(site.catalog, DirectoryCatalog)
    site.catalog.scan()
    after = ask(site, "/lamp/latest.bin.md5")[1]
    assert before != after
    assert after.endswith(b"  lamp-1.1.0.bin\n")


def test_digest_of_a_name_that_is_no_text_is_sent_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9-1.0.0.bin")
    site = filled(tmp_path, {name: esp8266_image("x", "1.0.0")})
    reply, body = ask(site, "/caf%e9-1.0.0.bin.sha256")
    assert reply.status == 200
    assert re.fullmatch(rb"[0-9a-f]{64}  caf\\udce9-1\.0\.0\.bin\n", body)


# -- 3. esp32FOTA ----------------------------------------------------------------------------------


def fota_urls(entry: Mapping[str, Any]) -> dict[str, str]:
    """What the client fetches, by what it is; beside a "url" nothing: checkJSONManifest()."""
    if "url" in entry:
        return {"bin": entry["url"]}
    base = f"http{'s' * (entry['port'] in {443, 4433})}://{entry['host']}:{entry['port']}"
    kinds = ("bin", "littlefs", "spiffs", "fatfs")
    return {kind: f"{base}{entry[kind]}" for kind in kinds if kind in entry}


def test_manifest_of_esp32fota_has_the_filesystems_of_the_same_version(site: Site) -> None:
    entry = json_of(site, "/node/esp32fota.json")
    assert (entry["type"], entry["version"]) == ("node", "1.1.0")
    assert fota_urls(entry) == {
        "bin": "http://ota:8000/node/node-1.1.0.bin",
        "littlefs": "http://ota:8000/node/node-1.1.0.littlefs.bin",
        "spiffs": "http://ota:8000/node/node-1.1.0.spiffs.bin",
    }
    for url in fota_urls(entry).values():
        agent = {"user-agent": "ESP32HTTPClient"}
        assert ask(site, url.removeprefix("http://ota:8000"), agent)[0].status == 200


def test_filesystem_of_another_version_is_not_in_the_manifest(tmp_path: Path) -> None:
    image, disk = esp32_image("node", "1.1.0"), littlefs_image(2)
    files = {"node-1.1.0.bin": image, "node-1.2.0.littlefs.bin": disk, "node-1.0.spiffs.bin": disk}
    entry = json_of(filled(tmp_path, files), "/node/esp32fota.json")
    assert (sorted(entry), entry["version"]) == (["type", "url", "version"], "1.1.0")


def test_packed_filesystem_is_in_no_manifest_of_an_esp32(tmp_path: Path) -> None:
    disk = gzip_image(littlefs_image(2))
    files = {"node-1.0.0.bin": esp32_image("node", "1"), "node-1.0.0.littlefs.bin.gz": disk}
    assert "littlefs" not in json_of(filled(tmp_path, files), "/node/esp32fota.json")


def test_array_of_esp32fota_has_every_project_for_one_esp32(site: Site) -> None:
    entries = json_of(site, "/esp32fota.json")
    assert [entry["type"] for entry in entries] == ["lamp-safeboot", "node"]
    assert entries[1] == json_of(site, "/node/esp32fota.json")


def test_array_of_esp32fota_is_empty_where_nothing_is_for_it(tmp_path: Path) -> None:
    assert json_of(filled(tmp_path, {}), "/esp32fota.json") == []


def test_manifest_of_esp32fota_for_several_chips_is_404_that_says_so(tmp_path: Path) -> None:
    files = {
        "node/32-1.0.0.bin": esp32_image("node", "1.0.0"),
        "node/c3-1.0.0.bin": esp32_image("node", "1.0.0", chip_id=5),
        "lamp-1.0.0.bin": esp8266_image("lamp", "1.0.0"),
    }
    site = filled(tmp_path, files)
    assert "images for several chips" in reason_of(site, "/node/esp32fota.json", 404)
    assert "is for esp8266" in reason_of(site, "/lamp/esp32fota.json", 404)
    assert json_of(site, "/esp32fota.json") == []


def test_client_that_does_not_say_its_chip_gets_no_newest_of_several(tmp_path: Path) -> None:
    """ESPHome on an ESP8266 would take the image of an ESP32: nothing there compares chips."""
    files = {
        "node/32-1.1.0.bin": esp32_image("node", "1.1.0"),
        "node/8266-1.0.0.bin": esp8266_image("node", "1.0.0"),
    }
    site = filled(tmp_path, files)
    agent = {"user-agent": "ESPHome/2026.6.5 (https://esphome.io)"}
    assert "images for several chips" in reason_of(site, "/node/latest.bin", 403, agent)
    assert "images for several chips" in reason_of(site, "/node/latest.bin.md5", 404, agent)
    assert name_of(site, "/node/8266-1.0.0.bin", agent) == "8266-1.0.0.bin"
    assert [build["chipFamily"] for build in json_of(site, "/node/manifest.json")["builds"]] == [
        "ESP32"
    ]
    assert name_of(site, "/node/latest.bin", {"x-esp8266-version": "0.9"}) == "8266-1.0.0.bin"


def test_manifest_of_esp32fota_fits_into_its_buffer(tmp_path: Path) -> None:
    """DynamicJsonDocument(2048): esp32FOTA.cpp checkJSONManifest(); with rather long names."""
    name = "n" * 100
    files: dict[str, bytes] = {f"{name}/{name}-1.0.0.bin": esp32_image("n", "1.0.0")}
    for kind, make in (("littlefs", littlefs_image), ("spiffs", spiffs_image)):
        files[f"{name}/{name}-1.0.0.{kind}.bin"] = make(2)
    body = ask(filled(tmp_path, files), f"/{name}/esp32fota.json")[1]
    assert len(fota_urls(json.loads(body))) == 3
    assert len(body) <= 2048


# -- 4. ESPHome and ESP Web Tools ------------------------------------------------------------------


def test_manifest_says_what_esphome_and_a_browser_need(site: Site) -> None:
    image = "http://ota:8000/lamp/lamp-1.10.0.bin"
    md5 = dict(ask(site, "/lamp.bin")[0].headers)["x-MD5"]
    notes = {"summary": "* Warmer white", "release_url": "http://ota:8000/#lamp"}
    assert json_of(site, "/lamp/manifest.json") == {
        "name": "lamp",
        "version": "1.10.0",
        "new_install_prompt_erase": True,
        "builds": [
            {
                "chipFamily": "ESP8266",
                "ota": {"path": image, "md5": md5, **notes},
                "parts": [{"path": image, "offset": 0}],
            }
        ],
    }


def test_every_path_of_a_manifest_leads_to_that_image(site: Site) -> None:
    for project, prefix in itertools.product(("lamp", "node"), ("", "/ota", "/a/b c")):
        for build in json_of(site, f"{prefix}/{project}/manifest.json")["builds"]:
            url = urlsplit(build["ota"]["path"])
            assert (url.scheme, url.netloc) == ("http", "ota:8000")
            assert unquote(url.path).startswith(f"{prefix}/{project}/")
            reply, image = ask(site, url.path)
            assert reply.status == 200
            assert hashlib.md5(image, usedforsecurity=False).hexdigest() == build["ota"]["md5"]


@pytest.mark.parametrize("chip", ["esp8266", *ESP32_CHIPS.values()])
def test_family_has_the_name_that_esphome_gives_it(tmp_path: Path, chip: str) -> None:
    number = {name: number for number, name in ESP32_CHIPS.items()}.get(chip)
    image = esp32_image("n", "1.0.0", chip_id=number or 0) if number is not None else None
    site = filled(tmp_path, {"n-1.0.0.bin": image or esp8266_image("n", "1.0.0")})
    (build,) = json_of(site, "/n/manifest.json")["builds"]
    assert build["chipFamily"] == FAMILIES[chip]
    assert build["parts"][0]["offset"] == (0 if chip == "esp8266" else 0x10000)


def test_manifest_has_a_build_for_each_chip_of_the_newest_version(tmp_path: Path) -> None:
    files = {
        "n/8266-1.1.0.bin": esp8266_image("n", "1.1.0"),
        "n/32-1.1.0.bin": esp32_image("n", "1.1.0"),
        "n/c3-1.1.0.bin": esp32_image("n", "1.1.0", chip_id=5),
        "n/s3-1.0.0.bin": esp32_image("n", "1.0.0", chip_id=9),
        "n/fs-9.0.0.littlefs.bin": littlefs_image(2),
        "n/fs-1.1.0.littlefs.bin": littlefs_image(2),
        "n/mos-1.1.0.zip": mongoose_zip("n", "1.1.0"),
        "n/blink.bin": esp32_image("n", "0", chip_id=13),
    }
    found = json_of(filled(tmp_path, files), "/n/manifest.json")
    assert found["version"] == "1.1.0"
    families = [build["chipFamily"] for build in found["builds"]]
    assert sorted(families) == ["ESP32", "ESP32-C3", "ESP8266"]


@pytest.mark.parametrize("age", [1, 500])
def test_manifest_has_the_plain_image_and_not_its_packed_twin(tmp_path: Path, age: int) -> None:
    plain = esp8266_image("n", "1.0.0", flash_mode=3)
    put(tmp_path / "n-1.0.0.bin", plain, age=100)
    put(tmp_path / "n-1.0.0.bin.gz", gzip_image(plain), age=age)
    (build,) = json_of(site_of(tmp_path), "/n/manifest.json")["builds"]
    assert build["ota"]["path"].endswith("n-1.0.0.bin")


def test_packed_image_is_for_a_device_and_not_for_a_browser_that_would_write_it(
    tmp_path: Path,
) -> None:
    packed = gzip_image(esp8266_image("n", "1.0.0", flash_mode=3))
    site = filled(tmp_path, {"n-1.0.0.bin.gz": packed})
    (build,) = json_of(site, "/n/manifest.json")["builds"]
    assert build["ota"]["path"].endswith("n-1.0.0.bin.gz")
    assert build["parts"] == []


@pytest.mark.parametrize(
    "notes",
    [
        pytest.param("x" * 255, id="255 characters"),
        pytest.param("x" * 256, id="256 characters"),
        pytest.param("🎉" * 300, id="as many that take two UTF-16 units"),
        pytest.param('line\nline\t"quoted" \\ </script> \u2028', id="special ones"),
    ],
)
def test_summary_is_the_beginning_of_the_notes(tmp_path: Path, notes: str) -> None:
    files = {"n-1.0.0.bin": esp8266_image("n", "1"), "n-1.0.0.md": notes.encode()}
    (build,) = json_of(filled(tmp_path, files), "/n/manifest.json")["builds"]
    assert build["ota"]["summary"] == notes.strip()[:255]


def test_manifest_without_notes_has_no_summary(site: Site) -> None:
    (build,) = json_of(site, "/node/manifest.json")["builds"]
    assert sorted(build["ota"]) == ["md5", "path"]


@pytest.mark.parametrize("files", ["littlefs", "zip", "unversioned"])
def test_manifest_of_a_project_without_sketches_is_404(tmp_path: Path, files: str) -> None:
    name, data = {
        "littlefs": ("n-1.0.0.littlefs.bin", littlefs_image(2)),
        "zip": ("n-1.0.0.zip", mongoose_zip("n", "1.0.0")),
        "unversioned": ("n/x.bin", esp32_image("n", "1")),
    }[files]
    site = filled(tmp_path, {name: data})
    for about in ("manifest.json", "esp32fota.json"):
        assert re.match("wrong-kind: |by-name-only: ", reason_of(site, f"/n/{about}", 404))


# -- 5. Lists --------------------------------------------------------------------------------------


def test_versions_are_those_of_what_devices_run(site: Site) -> None:
    """Whoever compares `latest` with its own version must get just that one for it."""
    lamp = {"count": 2, "latest": "1.10.0", "versions": ["1.10.0", "1.0.0"]}
    assert json_of(site, "/lamp/versions") == json_of(site, "/firmware/lamp/versions") == lamp
    assert json_of(site, "/gate/versions") == {"count": 1, "latest": "1.1.0", "versions": ["1.1.0"]}


@pytest.mark.parametrize("name", ["n/blink.bin", "n-1.0.0.littlefs.bin"])
def test_versions_of_a_project_without_any_are_none(tmp_path: Path, name: str) -> None:
    data = littlefs_image(2) if "littlefs" in name else esp32_image("n", "1")
    found = json_of(filled(tmp_path, {name: data}), "/n/versions")
    assert found == {"count": 0, "latest": None, "versions": []}


@pytest.mark.parametrize(
    ("agent", "chips"),
    [
        pytest.param("ESP8266HTTPClient", {"8266"}, id="ESP8266"),
        pytest.param("ESP32HTTPClient", {"32", "c3"}, id="ESP32, which cannot say more"),
        pytest.param("Mozilla/5.0", {"8266", "32", "c3"}, id="browser"),
    ],
)
def test_catalog_has_the_images_of_the_chip_that_asks(
    tmp_path: Path, agent: str, chips: set[str]
) -> None:
    files = {
        "n/8266-1.0.0.bin": esp8266_image("n", "1.0.0"),
        "n/32-1.0.0.bin": esp32_image("n", "1.0.0"),
        "n/c3-1.0.0.bin": esp32_image("n", "1.0.0", chip_id=5),
        "n/fs-1.0.0.littlefs.bin": littlefs_image(2),
        "n/mos-1.0.0.zip": mongoose_zip("n", "1.0.0"),
    }
    site = filled(tmp_path, files)
    entries = json_of(site, "/_catalog?op=list&path=/", {"user-agent": agent})
    assert {entry["name"] for entry in entries} == {f"n/{chip}-1.0.0.bin" for chip in chips}
    for entry in entries:
        assert entry["type"] == "bin"
        assert re.fullmatch(r"\d\d/\d\d/\d\d \d\d:\d\d:\d\d", f"{entry['date']} {entry['time']}")
        reply, image = ask(site, f"/{entry['name']}", {"user-agent": agent})
        assert (reply.status, len(image)) == (200, entry["size"])


@pytest.mark.parametrize("length", [50, 80, 90, 100, 200])
def test_catalog_has_no_entry_that_a_device_has_no_room_for(tmp_path: Path, length: int) -> None:
    """256 bytes for each: AutoConnectUpdate.cpp."""
    name = "n" * length
    files = {
        f"{name}/{name}-1.0.0.bin": esp8266_image("n", "1"),
        "é-1.0.0.bin": esp8266_image("n", "2"),
    }
    body = ask(filled(tmp_path, files), "/_catalog?op=list&path=/")[1]
    objects = re.findall(rb"\{[^}]*\}", body)
    assert max(map(len, objects)) <= 256
    assert len(objects) == (2 if length <= 80 else 1)


def test_lists_can_be_switched_off(tmp_path: Path) -> None:
    files = {"n-1.0.0.bin": esp32_image("n", "1")}
    site = filled(tmp_path, files, listing=False)
    for path in ("/", "/_catalog", "/esp32fota.json"):
        assert reason_of(site, path, 404) == "the list of projects is switched off"
    for path in ("/n/versions", "/n/manifest.json", "/n/esp32fota.json", "/n/latest.bin.md5"):
        assert ask(site, path)[0].status == 200


# -- 6. Files for people only ----------------------------------------------------------------------


@pytest.fixture
def people(tmp_path: Path) -> Site:
    """A site of S0: `app` has 1.0.0 for an ESP8266, and 2.0.0 that is half copied."""
    put(tmp_path / "app-1.0.0.bin", esp8266_image("app", "1.0.0"))
    put(tmp_path / "app-2.0.0.bin", esp8266_image("app", "2.0.0")[:-1])
    put(tmp_path / "app" / "firmware_v1.bin", b"dummy firmware data\n")
    config = Config(dir=str(tmp_path), host="127.0.0.1", port=0, www_dir=str(tmp_path))
    catalog = DirectoryCatalog(config.dir, any_file=True)
    assert catalog.scan()
    return build_site(config, catalog)


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        pytest.param("/firmware/app/firmware_v1.bin", {}, "firmware_v1.bin", id="README of S0"),
        pytest.param("/app/app-2.0.0.bin", {}, "app-2.0.0.bin", id="half copied, by name"),
        pytest.param("/app/latest.bin", {}, "app-1.0.0.bin", id="newest"),
        pytest.param("/app/latest.bin?version=0.9", {}, "app-1.0.0.bin", id="MicroPython goes up"),
        pytest.param("/app?version=1.0.0", {}, "304 not-newer", id="MicroPython stays"),
        pytest.param("/app/app-2.0.0.bin", ESP8266, "403 wrong-chip", id="ESP8266, by name"),
        pytest.param("/app/app-2.0.0.bin", IDF, "403 wrong-chip", id="ESP-IDF, by name"),
        pytest.param("/app/firmware_v1.bin", ESP32, "403 wrong-chip", id="ESP32, by name"),
        pytest.param("/app", ESP8266, "304 not-newer", id="ESP8266 stays"),
    ],
)
def test_what_is_no_image_is_had_by_its_name_and_by_no_device(
    people: Site, path: str, headers: Headers, name: str
) -> None:
    assert name_of(people, path, headers) == name


def test_what_is_no_image_is_in_no_list_that_devices_read(people: Site) -> None:
    assert json_of(people, "/app/versions")["versions"] == ["1.0.0"]
    found = json_of(people, "/app/manifest.json")
    assert (found["version"], len(found["builds"])) == ("1.0.0", 1)
    entries = json_of(people, "/_catalog", {"user-agent": "ESP8266HTTPClient"})
    assert [entry["name"] for entry in entries] == ["app/app-1.0.0.bin"]
    assert "wrong-chip" in reason_of(people, "/app/esp32fota.json", 404)
    assert json_of(people, "/esp32fota.json") == []


# -- 7. URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "/ota", "/ota/v1", "/a b", "/ä", "//", "/node", "/http:", "/%41"]
)
def test_urls_stay_below_the_path_that_was_asked_for(site: Site, prefix: str) -> None:
    """/%41 stands for a path whose name has a percent sign."""
    path = prefix.replace("%", "%25")
    (build,) = json_of(site, f"{path}/node/manifest.json")["builds"]
    fota = fota_urls(json_of(site, f"{path}/node/esp32fota.json"))
    assert len(fota) == 3
    for url in (build["ota"]["path"], build["parts"][0]["path"], *fota.values()):
        assert unquote(url).startswith(f"http://ota:8000{prefix}/node/node-1.1.0.")
        assert ask(site, url.removeprefix("http://ota:8000"))[0].status == 200


@pytest.mark.parametrize(
    ("lines", "base"),
    [
        pytest.param("Host: ota.example", "http://ota.example", id="name"),
        pytest.param("Host: 192.0.2.1:8000", "http://192.0.2.1:8000", id="IPv4"),
        pytest.param("Host: [2001:db8::1]:8000", "http://[2001:db8::1]:8000", id="IPv6"),
        pytest.param("Host: [::1]", "http://[::1]", id="IPv6 without a port"),
        pytest.param("", "http://ota-server", id="HTTP/1.0 without one"),
        pytest.param(
            "Host: o\r\nX-Forwarded-Host: evil.example\r\nX-Forwarded-Proto: https",
            "http://o",
            id="no proxy that is trusted",
        ),
        pytest.param("Host: a'b&c", "http://a'b&c", id="odd"),
    ],
)
@pytest.mark.parametrize("secure", [False, True])
def test_urls_begin_as_the_client_reached_the_server(
    site: Site, lines: str, base: str, *, secure: bool
) -> None:
    expected = base.replace("http:", "https:") if secure else base
    for path in ("/node/manifest.json", "/lamp-safeboot/esp32fota.json", "/"):
        head = f"GET {path} HTTP/1.0\r\n{lines}".rstrip() + "\r\n\r\n"
        reply = answer(site, parse_head(head.encode(), PEER, secure=secure))
        assert isinstance(reply.body, bytes)
        assert re.search(f"{re.escape(expected)}/(node|lamp)", html.unescape(reply.body.decode()))
        assert b"evil" not in reply.body


PROJECTS = [
    "my lamp", "Gerät", "ランプ", 'a"b', "a'b", "a&b", "a<b>", "a%41b", "a#b", "a?b", "a+b", "a\\b",
    "http", "http:", "a;b", "100%", "~x", "manifest.json", "versions", "latest", "update", "a.bin",
    os.fsdecode(b"caf\xe9"),
]  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS, ids=ascii)
def test_project_may_have_any_name(
    tmp_path: Path, project: str, said: Callable[[], list[str]]
) -> None:
    image = esp32_image("x", "1.0.0")
    put(tmp_path / project / f"{project}-1.0.0.bin", image)
    put(tmp_path / project / f"{project}-1.0.0.md", b"notes")
    put(tmp_path / project / f"{project}-1.0.0.littlefs.bin", littlefs_image(2))
    site = site_of(tmp_path)
    coded = "".join(f"%{byte:02X}" for byte in os.fsencode(project))
    (build,) = json_of(site, f"/{coded}/manifest.json")["builds"]
    entry = json_of(site, f"/{coded}/esp32fota.json")
    (listed,) = json_of(site, "/esp32fota.json")
    (offered,) = json_of(site, "/_catalog")
    assert entry == listed
    name = unquote(offered["name"], errors="surrogateescape")  # asked as it is
    assert offered["name"].isascii()
    assert name == f"{project}/{project}-1.0.0.bin"
    assert entry["type"] == project
    page = ask(site, "/")[1].decode()
    links = [html.unescape(link) for link in re.findall('href="(http[^"]*)"', page)]
    assert len(links) == 2
    for url in (build["ota"]["path"], *fota_urls(entry).values(), *links):
        assert url.isascii()
        assert not re.search(r'[\s"<>\\]', url)
        target = url.removeprefix("http://ota:8000")
        head = f"GET {target} HTTP/1.1\r\nHost: ota:8000\r\n\r\n"
        reply = answer(site, parse_head(head.encode(), PEER))
        assert reply.status == 200, url
        assert not isinstance(reply.body, bytes)
        reply.body.file.close()
    anchor = unquote(urlsplit(build["ota"]["release_url"]).fragment, errors="surrogateescape")
    ids = [html.unescape(found) for found in re.findall('<h2 id="([^"]*)">', page)]
    assert ids == [anchor.encode("utf-8", "replace").decode()]
    assert ask(site, f"/{coded}/latest.bin.sha256")[0].status == 200
    assert not [line for line in said() if line.startswith("ERROR")]


# -- 8. The page -----------------------------------------------------------------------------------


def test_notes_on_the_page_are_text(tmp_path: Path) -> None:
    notes = "<script>alert(1)</script> <img src=x onerror=y> \"q\" 'r' & </td></table> Grüße"
    files = {"n-1.0.0.bin": esp8266_image("n", "1"), "n-1.0.0.md": notes.encode()}
    page = ask(filled(tmp_path, files), "/")[1].decode()
    assert html.escape(notes) in page
    assert page.count("<script") == page.count("<img") == 0
    assert page.count("</table>") == 1


def test_page_shows_every_kind_with_its_name(site: Site) -> None:
    page = ask(site, "/")[1].decode()
    for word in ("littlefs ", "spiffs ", "zip esp32", "esp8266, gzip", ">blink.bin</a>", "1.10.0"):
        assert word in page
    assert "unversioned" not in page


# -- 9. Tasmota ------------------------------------------------------------------------------------


@pytest.fixture
def tasmota(tmp_path: Path) -> Site:
    """A site with Tasmota's images, as its users have them."""
    files = {
        "tasmota-14.1.0.bin": tasmota_image("14.1.0", payload=bytes(9000)),
        "tasmota-14.2.0.bin": tasmota_image("14.2.0", payload=bytes(9000)),
        "tasmota-14.2.0.bin.gz": gzip_image(tasmota_image("14.2.0", payload=bytes(9000))),
        "tasmota-minimal-14.2.0.bin.gz": gzip_image(tasmota_image("14.2.0", "minimal")),
        "tasmota32-14.2.0.bin": tasmota32_image("14.2.0", payload=bytes(9000)),
        "tasmota32-safeboot-14.2.0.bin": tasmota32_image("14.2.0", "safeboot"),
    }
    return filled(tmp_path, files)


def says(running: str, family: str = "esp8266", free: int = 10) -> Headers:
    """The headers of a Tasmota with little room."""
    mac = {f"x-{family}-sta-mac": "5C:CF:7F:12:34:56", f"x-{family}-mode": "sketch"}
    room = {f"x-{family}-free-space": str(free), f"x-{family}-chip-size": "1048576"}
    return (
        {"user-agent": f"{family.upper()}-http-Update", f"x-{family}-version": running} | mac | room
    )


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        pytest.param("/tasmota.bin", says("14.1.0(tasmota)"), "tasmota-14.2.0.bin", id="up"),
        pytest.param("/tasmota.bin.gz", says("14.1.0(tasmota)"), "tasmota-14.2.0.bin.gz", id="gz"),
        pytest.param("/tasmota.bin.gz", says("14.2.0(tasmota)"), "304 not-newer", id="stays"),
        pytest.param("/tasmota.bin", says("14.2.0.1(tasmota)"), "304 not-newer", id="four numbers"),
        pytest.param(
            "/tasmota-minimal.bin.gz",
            says("14.2.0(tasmota)"),
            "tasmota-minimal-14.2.0.bin.gz",
            id="-",
        ),
        pytest.param(
            "/tasmota/latest-minimal.bin.gz",
            says("14.2.0(tasmota)"),
            "tasmota-minimal-14.2.0.bin.gz",
            id="latest-minimal",
        ),
        pytest.param(
            "/tasmota.bin.gz", says("14.2.0(minimal)"), "tasmota-14.2.0.bin.gz", id="back"
        ),
        pytest.param("/tasmota", says("14.2.0(minimal)"), "tasmota-14.2.0.bin", id="no ending"),
        pytest.param(
            "/tasmota32.bin", says("14.1.0(tasmota32)", "esp32"), "tasmota32-14.2.0.bin", id="ESP32"
        ),
        pytest.param(
            "/tasmota32.bin",
            says("14.2.0(safeboot)", "esp32"),
            "tasmota32-14.2.0.bin",
            id="safeboot",
        ),
        pytest.param(
            "/tasmota32-safeboot.bin",
            says("14.2.0(tasmota32)", "esp32"),
            "tasmota32-safeboot-14.2.0.bin",
            id="to safeboot",
        ),
        pytest.param(
            "/tasmota32.bin", says("14.1.0(tasmota)"), "403 wrong-chip", id="ESP32 to an ESP8266"
        ),
        pytest.param(
            "/tasmota.bin", says("14.1.0(tasmota32)", "esp32"), "403 wrong-chip", id="the other way"
        ),
        pytest.param(
            "/tasmota32.bin", says("14.2.0(minimal)"), "403 wrong-chip", id="minimal, wrong chip"
        ),
        pytest.param(
            "/tasmota.bin", says("14.1.0"), "304 too-big", id="no Tasmota has room judged"
        ),
    ],
)
def test_tasmota_gets_what_it_asks_for_and_says_itself_that_it_is_too_big(
    tasmota: Site, path: str, headers: Headers, name: str
) -> None:
    assert name_of(tasmota, path, headers) == name


@pytest.mark.parametrize("path", ["/lamp", "/lamp.bin", "/lamp/latest", "/lamp/lamp-1.10.0.bin"])
@pytest.mark.parametrize("running", ["1.0.0", "1.10.0"])
def test_version_of_the_newest_is_told_without_an_image_at_any_url(
    site: Site, path: str, running: str
) -> None:
    """getAvailableVersion() knows only 200: ESP8266httpUpdate.cpp."""
    asks = ESP8266 | {"x-esp8266-version": running, "x-esp8266-mode": "version"}
    reply, body = ask(site, path, asks)
    fields = dict(reply.headers)
    assert (reply.status, body, fields["Content-Length"]) == (200, b"", "0")
    assert fields["x-version"] == "1.10.0"


@pytest.mark.parametrize(
    "path", ["/lamp?version=1.0.0", "/lamp/latest.bin", "/lamp/lamp-1.10.0.bin"]
)
@pytest.mark.parametrize("running", ["1.0.0", "1.10.0"])
def test_no_shared_cache_may_hand_an_image_to_the_next_device(
    site: Site, path: str, running: str
) -> None:
    """It would give an ESP8266 what an ESP32 has asked for: it does not know our rules."""
    reply, _ = ask(site, path, ESP8266 | {"x-esp8266-version": running})
    assert "private" in dict(reply.headers)["Cache-Control"].split(", ")


def test_version_is_told_to_a_device_that_has_none(site: Site) -> None:
    """The field is absent where the sketch passes an empty version."""
    asks = {"user-agent": "ESP8266-http-Update", "x-esp8266-mode": "version"}
    reply, body = ask(site, "/lamp", asks)
    assert (reply.status, body, dict(reply.headers)["x-version"]) == (200, b"", "1.10.0")


def test_version_of_nothing_is_not_told(site: Site) -> None:
    asks = {"user-agent": "ESP8266-http-Update", "x-esp8266-mode": "version"}
    assert name_of(site, "/node/latest.bin", asks) == "403 wrong-chip"


# -- 10. S3 ----------------------------------------------------------------------------------------

MAC = {"x-esp8266-sta-mac": "5C:CF:7F:12:34:56"}


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        pytest.param("/update?dev=lamp&ver=v1.0.2", MAC, 200, id="older"),
        pytest.param("/update?ver=v1.0.2&dev=lamp", MAC, 200, id="the other way round"),
        pytest.param("/x/update?dev=lamp&ver=1.0", MAC, 200, id="deeper"),
        pytest.param("/update?dev=lamp&ver=v1.10.0", MAC, 304, id="same"),
        pytest.param("/update?dev=lamp&ver=v9.0.0", MAC, 304, id="newer"),
        pytest.param("/update?dev=lamp", MAC | {"x-esp8266-version": "1.0"}, 200, id="field"),
        pytest.param("/update?dev=node&ver=v1.0.2", MAC, 403, id="other chip"),
        pytest.param("/update?dev=fan&ver=v1.0.2", MAC, 400, id="unknown"),
        pytest.param("/update?dev=&ver=v1.0.2", MAC, 400, id="empty"),
        pytest.param("/update?ver=v1.0.2", MAC, 400, id="no dev"),
        pytest.param("/update?dev=lamp", MAC, 400, id="no ver"),
        pytest.param("/update?dev=lamp&ver=", MAC, 400, id="empty ver"),
        pytest.param("/update?dev=lamp&ver=one", MAC, 400, id="odd ver"),
        pytest.param("/update?dev=lamp&ver=v1.0.2", {}, 400, id="no MAC"),
        pytest.param("/update?dev=lamp&ver=1.0", {"x-esp8266-sta-mac": "x"}, 400, id="odd MAC"),
        pytest.param("/update?dev=..%2flamp&ver=1.0", MAC, 400, id="path"),
        pytest.param("/update?dev=lamp%00&ver=1.0", MAC, 400, id="NUL"),
        pytest.param("/update", MAC, 404, id="a project called update"),
        pytest.param("/update/?dev=lamp&ver=v1.0.2", MAC, 404, id="slash"),
    ],
)
def test_address_of_s3_answers_as_s3_does(
    site: Site, target: str, headers: Headers, status: int
) -> None:
    reply, _ = ask(site, target, headers)
    if target.startswith("/update/"):  # both readings are harmless
        assert reply.status in {200, 400, 404}
        return
    assert reply.status == status


# -- 11. Every route -------------------------------------------------------------------------------

TARGETS = [
    "/", "/healthz", "/favicon.ico", "/_catalog", "/esp32fota.json", "/node/esp32fota.json",
    "/node/manifest.json", "/node/versions", "/node/latest.bin.md5", "/lamp.bin.gz.sha256",
    "/node/node-1.0.0.bin", "/node/latest", "/gate-1.1.0.zip", "/update?dev=node&ver=1.0",
    "/node?version=1.0.0",
]  # fmt: skip


def test_every_route_is_asked_below() -> None:
    paths = [target.partition("?")[0] for target in TARGETS]
    first = [next(route for route in ROUTES if route.pattern.fullmatch(path)) for path in paths]
    assert set(first) == set(ROUTES)


@pytest.mark.parametrize("target", TARGETS)
def test_get_and_head_agree_and_nothing_else_is_possible(site: Site, target: str) -> None:
    headers = {"x-esp32-sta-mac": "24:6F:28:AA:BB:CC"} if "update" in target else {}
    got, body = ask(site, target, headers)
    head, nothing = ask(site, target, headers, "HEAD")
    assert got.status == 200
    assert (head.status, head.headers, nothing) == (200, got.headers, b"")
    assert dict(got.headers)["Content-Length"] == str(len(body))
    options, nothing = ask(site, target, headers, "OPTIONS")
    assert (options.status, nothing) == (204, b"")
    assert dict(options.headers)["Allow"] == "GET, HEAD, OPTIONS"
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "get", "X"):
        refused, _ = ask(site, target, headers, method)
        assert refused.status == 405
        assert dict(refused.headers)["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("cors", ["*", "https://app.example", ""])
def test_other_origins_may_read_what_a_browser_installs_from(tmp_path: Path, cors: str) -> None:
    site = filled(tmp_path, {"node-1.1.0.bin": esp32_image("node", "1.1.0")}, cors=cors)
    for target in ("/node/manifest.json", "/node/latest.bin", "/node/latest.bin.md5"):
        for method in ("GET", "HEAD", "OPTIONS"):
            fields = dict(ask(site, target, None, method)[0].headers)
            assert fields.get("Access-Control-Allow-Origin", "") == cors
    assert "Access-Control-Allow-Origin" not in dict(ask(site, "/")[0].headers)
