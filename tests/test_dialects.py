"""Every dialect against our server, plain and over TLS: who asks gets the newest and runs it.

The emulators stand in devices.py and clients.py; this file says what must become of them here. A
fault of the server shows as a device that keeps its old version, loops, or raises Bricked.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ota_server
from ota_server import Server
from tests.clients import (
    AutoConnect,
    Esp32Fota,
    EspHome,
    EspIdf,
    MongooseOs,
    Tasmota,
    Tasmota32,
    WebTools,
)
from tests.conftest import put, running, site_of
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    fatfs_image,
    fatfs_wl_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
    tasmota32_image,
    tasmota_image,
)
from tests.devices import Device, Esp32, Esp32Newest, Esp8266

OK, NO_UPDATES, FAILED = "HTTP_UPDATE_OK", "HTTP_UPDATE_NO_UPDATES", "HTTP_UPDATE_FAILED"
VERSIONS = ("1.0.0", "1.9.0", "1.10.0")
PAYLOAD = bytes(range(256)) * 40  # a little more than two blocks of flash
TOKEN = "T0ken"  # noqa: S105
NOTES = "# Faster\n\nStarts in half the time.\n"


@dataclass(slots=True)
class Place:
    """Where the server is, and what to trust."""

    server: Server
    port: int
    tls_ca: Path | None
    token: str

    @property
    def scheme(self) -> str:
        """As in URLs."""
        return "https" if self.tls_ca else "http"

    def url(self, path: str) -> str:
        """An absolute URL; with the token in front of the host where there is one."""
        user = f"x:{self.token}@" if self.token else ""
        return f"{self.scheme}://{user}127.0.0.1:{self.port}{path}"

    def bare(self, path: str) -> str:
        """An absolute URL without the token."""
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    @property
    def device(self) -> dict[str, Any]:
        """Host, port and trust, as Device takes them."""
        user = f"x:{self.token}" if self.token else ""
        return {"host": "127.0.0.1", "port": self.port, "tls_ca": self.tls_ca, "user": user}


@contextmanager
def serve(folder: Path, pem: Path | None, **settings: Any) -> Iterator[Place]:
    """The server over this folder; with a certificate over TLS."""
    tls = {"tls": ota_server.tls_context(str(pem), "")} if pem else {}
    with running(site_of(folder, **settings), **tls) as server:
        yield Place(server, server.server_address[1], pem, str(settings.get("token", "")))


@pytest.fixture(params=["plain", "tls"])
def serving(request: pytest.FixtureRequest, certificate: Path) -> Callable[..., Any]:
    """Starts the server, once plain and once over TLS."""
    return functools.partial(serve, pem=certificate if request.param == "tls" else None)


@pytest.fixture
def plain() -> Callable[..., Any]:
    """Starts the server for a client that knows no TLS, or not on any port."""
    return functools.partial(serve, pem=None)


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """Three versions of a project for each chip, all in one folder, with notes for the newest."""
    folder = tmp_path / "firmware"
    for version in VERSIONS:
        put(folder / f"blinds-{version}.bin", esp8266_image("blinds", version))
        image = esp32_image("sensor", version, payload=PAYLOAD)
        put(folder / "sensor" / f"sensor-{version}.bin", image)
        put(folder / f"c3-{version}.bin", esp32_image("c3", version, chip_id=5, payload=PAYLOAD))
        put(folder / f"lamp-{version}.zip", mongoose_zip("lamp", version))
    for name in ("blinds-1.10.0.md", "sensor/sensor-1.10.0.md", "c3-1.10.0.md"):
        put(folder / name, NOTES.encode())
    return folder


def esp8266(place: Place, path: str, version: str = "1.0.0", **options: Any) -> Esp8266:
    """An ESP8266 that runs this version."""
    return Esp8266(path=path, image=esp8266_image("blinds", version), **place.device, **options)


def esp32(place: Place, path: str, version: str = "1.0.0", **options: Any) -> Esp32:
    """An ESP32 that runs this version."""
    image = esp32_image("sensor", version, payload=PAYLOAD)
    return Esp32(path=path, image=image, **place.device, **options)


def newest(place: Place, path: str, version: str = "1.0.0", **options: Any) -> Esp32Newest:
    """An ESP32 with the newest core."""
    image = esp32_image("sensor", version, payload=PAYLOAD)
    return Esp32Newest(path=path, image=image, **place.device, **options)


def idf(place: Place, path: str, version: str = "1.0.0", **options: Any) -> EspIdf:
    """An ESP32 with ESP-IDF."""
    image = esp32_image("sensor", version, payload=PAYLOAD)
    options = {"user": f"x:{place.token}" if place.token else "", **options}
    return EspIdf(url=place.bare(path), tls_ca=place.tls_ca, image=image, **options)


# -- Arduino: ESPhttpUpdate and HTTPUpdate --------------------------------------------------------

ARDUINO = [
    pytest.param(esp8266, "/blinds", id="esp8266"),
    pytest.param(esp8266, "/fw/blinds/latest.bin", id="esp8266-latest"),
    pytest.param(esp32, "/sensor", id="esp32"),
    pytest.param(newest, "/any/where/sensor", id="esp32-newest"),
]


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize(("make", "path"), ARDUINO)
def test_arduino_goes_to_the_newest_and_stays_there(
    serving: Any, firmware: Path, make: Callable[..., Device], path: str, token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = make(place, path)
        assert (device.update(), device.version) == (OK, "1.10.0")
        assert device.update() == NO_UPDATES


def test_arduino_without_its_token_is_told_so(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        place.token = "wrong"  # noqa: S105
        sketch, other = esp8266(place, "/blinds"), esp32(place, "/sensor")
        assert (sketch.update(), sketch.last_error) == (FAILED, -108)
        assert (other.update(), other.last_error) == (FAILED, -104)


def test_arduino_takes_the_token_in_the_query(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        device = esp8266(place, f"/blinds?token={TOKEN}")
        device.user = ""
        assert device.update() == OK


@pytest.mark.parametrize(
    ("make", "path", "error"),
    [(esp8266, "/sensor", -103), (esp8266, "/lamp", -103), (esp32, "/blinds", -103)],
)
@pytest.mark.parametrize("ending", ["", "/latest.bin"])
def test_arduino_never_gets_an_image_of_the_other_family(
    serving: Any, firmware: Path, make: Callable[..., Device], path: str, error: int, ending: str
) -> None:
    with serving(firmware) as place:
        device = make(place, path + ending)
        outcome = (device.update(), device.last_error)
    assert outcome in {(FAILED, error), (NO_UPDATES, 0)}
    assert device.version == "1.0.0"


def test_arduino_finds_an_image_of_another_esp32_before_it_starts_it(
    serving: Any, firmware: Path
) -> None:
    with serving(firmware) as place:  # no field says which ESP32 it is
        device = esp32(place, "/c3")
        assert (device.update(), device.last_error, device.version) == (FAILED, 9, "1.0.0")


def test_an_esp8266_asks_which_version_there_is(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        assert esp8266(place, "/blinds").get_available_version() == "1.10.0"
        assert esp8266(place, "/blinds", "1.10.0").get_available_version() == "1.10.0"


def test_an_esp8266_without_room_for_the_plain_image_gets_the_packed_one(
    serving: Any, tmp_path: Path
) -> None:
    image = esp8266_image("blinds", "1.10.0", flash_mode=3, payload=bytes(60000))
    put(tmp_path / "blinds-1.10.0.bin", image)
    put(tmp_path / "blinds-1.10.0.bin.gz", gzip_image(image))
    with serving(tmp_path) as place:
        device = esp8266(place, "/blinds", flash_mode=3, free_space=40960)
        assert (device.update(), device.version) == (OK, "1.10.0")
    assert int(device.last_headers["content-length"]) < 40960


@pytest.mark.parametrize("kind", ["littlefs", "spiffs", "fatfs"])
@pytest.mark.parametrize(
    ("make", "project"), [(esp8266, "blinds"), (esp32, "sensor"), (newest, "sensor")]
)
def test_a_file_system_is_updated_beside_the_sketch(
    serving: Any, firmware: Path, make: Callable[..., Any], project: str, kind: str
) -> None:
    images = {"littlefs": littlefs_image(8), "spiffs": spiffs_image(8), "fatfs": fatfs_wl_image(8)}
    put(firmware / f"{project}-1.9.0.{kind}.bin", images[kind])
    with serving(firmware) as place:
        device = make(place, f"/{project}", mode="spiffs")
        if isinstance(device, Esp32Newest):
            device.mode, device.partitions = kind, (kind,)
        assert device.update() == OK
        assert device.filesystem == images[kind]
        assert device.version == "1.0.0"
        device.image = make(place, "", "1.9.0").image
        assert device.update() == NO_UPDATES


def test_a_file_system_that_is_cut_off_or_another_one_is_not_offered(
    serving: Any, tmp_path: Path
) -> None:
    put(tmp_path / "blinds-1.0.1.bin", esp8266_image("blinds", "1.0.1"))
    put(tmp_path / "blinds-2.0.0.littlefs.bin", littlefs_image(8)[:-4096])
    put(tmp_path / "blinds-2.1.0.spiffs.bin", spiffs_image(8)[:-4096])
    put(tmp_path / "blinds-2.2.0.fatfs.bin", fatfs_image(16)[:-4096])
    put(tmp_path / "blinds-2.3.0.littlefs.bin", spiffs_image(8))
    put(tmp_path / "blinds-2.4.0.littlefs.bin", esp8266_image("blinds", "2.4.0"))
    with serving(tmp_path) as place:
        device = esp8266(place, "/blinds", mode="spiffs")
        assert device.update() == NO_UPDATES
    assert device.filesystem == b""


def test_the_newest_core_reads_the_digest_beside_the_image(serving: Any, firmware: Path) -> None:
    with serving(firmware) as place:
        device = newest(place, "/sensor", sha256_path="/sensor/latest.bin.sha256")
        assert device.update() == OK
    assert device.sidecar == hashlib.sha256(device.image).hexdigest()


# -- ESP-IDF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole"),
        pytest.param({"partial": True, "piece": 4096}, id="pieces"),
        pytest.param({"partial": True, "piece": 4096, "persistent": False}, id="pieces-anew"),
        pytest.param({"partial": True}, id="one-piece"),
        pytest.param({"resume": True}, id="may-resume"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/sensor/latest.bin", "/sensor/sensor-1.10.0.bin", "/sensor/latest"]
)
def test_esp_idf_goes_to_the_newest(
    serving: Any, firmware: Path, path: str, options: dict[str, Any], token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = idf(place, path, **options)
        assert (device.update(), device.version) == ("ESP_OK", "1.10.0")
        assert device.update() == "same version"
        assert device.received < len(device.image) + 4096  # the second time it stopped at once


def test_esp_idf_that_says_its_version_is_told_that_there_is_no_newer(
    serving: Any, firmware: Path
) -> None:
    with serving(firmware) as place:
        device = idf(place, "/sensor/latest.bin?version=1.10.0", compares=False)
        assert device.update() == "ESP_ERR_HTTP_NOT_MODIFIED"
        assert device.check() == 304
        device.url = place.url("/sensor/latest.bin?version=1.9.0")
        assert device.check() == 200
        device.url, device.headers = place.url("/sensor"), {"x-ESP32-version": "1.10.0"}
        assert device.update() == "ESP_ERR_HTTP_NOT_MODIFIED"


def test_esp_idf_in_pieces_has_to_look_before_it_begins(serving: Any, firmware: Path) -> None:
    """It takes 304 for an error, so the example asks by a HEAD of its own first."""
    with serving(firmware) as place:
        device = idf(place, "/sensor/latest.bin?version=1.10.0", partial=True)
        assert device.check() == 304
        assert device.update() == "ESP_FAIL"


@pytest.mark.parametrize("partial", [False, True])
def test_esp_idf_with_a_foreign_chip_stops_at_once(
    serving: Any, firmware: Path, partial: bool
) -> None:
    with serving(firmware) as place:
        foreign = idf(place, "/c3/latest.bin", partial=partial)
        assert foreign.update() == "ESP_ERR_INVALID_VERSION"
        other = idf(place, "/blinds/latest.bin", partial=partial)
        assert other.update() == "ESP_FAIL"  # 403, as its User-Agent says ESP32
    assert (foreign.received, other.received) == (1024, 0)


@pytest.mark.parametrize("if_range", [False, True])
def test_esp_idf_goes_on_where_it_stopped(serving: Any, firmware: Path, if_range: bool) -> None:
    image = (firmware / "sensor" / "sensor-1.10.0.bin").read_bytes()
    etag = f'"{hashlib.sha256(image).hexdigest()[:32]}"' if if_range else ""
    with serving(firmware) as place:
        device = idf(place, "/sensor/latest.bin", resume=True, written=image[:4096])
        device.if_range = etag
        assert (device.update(), device.version) == ("ESP_OK", "1.10.0")
    assert device.received == len(image) - 4096


def test_esp_idf_begins_again_when_there_is_another_image_meanwhile(
    serving: Any, firmware: Path
) -> None:
    old = (firmware / "sensor" / "sensor-1.9.0.bin").read_bytes()
    with serving(firmware) as place:
        device = idf(place, "/sensor/latest.bin", resume=True, written=old[:4096])
        device.if_range = f'"{hashlib.sha256(old).hexdigest()[:32]}"'
        assert (device.update(), device.version) == ("ESP_OK", "1.10.0")


def test_esp_idf_in_pieces_uses_one_connection(serving: Any, firmware: Path) -> None:
    with serving(firmware) as place:
        device = idf(place, "/sensor/latest.bin", partial=True, piece=2048)
        assert device.update() == "ESP_OK"
    assert len(device.requests) == 1 + -(-len(device.image) // 2048)


# -- Manifests ------------------------------------------------------------------------------------


def fota(place: Place, path: str, version: str = "1.0.0", **options: Any) -> Esp32Fota:
    """An ESP32 with esp32FOTA, for the project sensor unless told."""
    image = esp32_image("sensor", version, payload=PAYLOAD)
    basic = base64.b64encode(f"x:{place.token}".encode()).decode()
    headers = [f"Authorization: Basic {basic}"] if place.token else []
    options = {"name": "sensor", "headers": headers, **options}
    return Esp32Fota(url=place.bare(path), tls_ca=place.tls_ca, image=image, **options)


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("path", ["/sensor/esp32fota.json", "/esp32fota.json"])
def test_esp32fota_goes_to_the_newest_and_stays_there(
    serving: Any, firmware: Path, path: str, token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = fota(place, path, device_id="77")
        assert device.exec_http_check()
        assert device.exec_ota(), device.reason
        assert device.version == "1.10.0"
        assert not device.exec_http_check()


def test_esp32fota_takes_the_token_in_the_query_along(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        device = fota(place, f"/sensor/esp32fota.json?token={TOKEN}", headers=())
        assert device.exec_http_check()
        assert device.exec_ota(), device.reason


def test_esp32fota_with_a_key_gets_a_signed_url(
    serving: Any, firmware: Path, tmp_path: Path
) -> None:
    with serving(firmware, token=TOKEN, sign_key=b"k" * 32) as place:
        device = fota(place, f"/sensor/esp32fota.json?token={TOKEN}", headers=())
        assert device.exec_http_check()
        assert "sig=" in device.firmware_url
        assert TOKEN not in device.firmware_url
        assert device.exec_ota(), device.reason


@pytest.mark.parametrize("kind", ["littlefs", "spiffs", "fatfs"])
def test_esp32fota_brings_the_file_system_of_the_same_version(
    plain: Any, firmware: Path, kind: str
) -> None:
    """With a file system it speaks TLS only to the ports 443 and 4433."""
    files = {"littlefs": littlefs_image(8), "spiffs": spiffs_image(8), "fatfs": fatfs_wl_image(8)}
    put(firmware / "sensor" / f"sensor-1.10.0.{kind}.bin", files[kind])
    with plain(firmware) as place:
        device = fota(place, "/sensor/esp32fota.json")
        assert device.exec_http_check()
        assert device.exec_ota(), device.reason
    assert (device.version, device.filesystem) == ("1.10.0", files[kind])


def test_esp32fota_leaves_what_is_for_another_chip(serving: Any, firmware: Path) -> None:
    with serving(firmware) as place:
        other = fota(place, "/blinds/esp32fota.json", name="blinds")
        assert not other.exec_http_check()
        foreign = fota(place, "/c3/esp32fota.json", name="c3")
        assert foreign.exec_http_check()  # nothing says which ESP32 it is
        assert not foreign.exec_ota()
    assert foreign.version == "1.0.0"


def home(place: Place, path: str, version: str = "1.0.0", **options: Any) -> EspHome:
    """An ESP32 with ESPHome."""
    image = esp32_image("sensor", version, payload=PAYLOAD)
    options = {"user": f"x:{place.token}" if place.token else "", **options}
    return EspHome(url=place.bare(path), tls_ca=place.tls_ca, image=image, **options)


@pytest.mark.parametrize("token", ["", TOKEN])
def test_esphome_shows_an_update_and_its_notes_and_installs_it(
    serving: Any, firmware: Path, token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = home(place, "/sensor/manifest.json")
        assert device.check() == "UPDATE_STATE_AVAILABLE"
        assert (device.title, device.latest_version) == ("sensor", "1.10.0")
        assert "Starts in half the time." in device.summary
        assert device.perform() == "OTA_RESPONSE_OK"
        assert device.version == "1.10.0"
        assert device.check() == "UPDATE_STATE_NO_UPDATE"


def test_esphome_takes_the_token_in_the_query_along(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        device = home(place, f"/sensor/manifest.json?token={TOKEN}", user="")
        assert device.check() == "UPDATE_STATE_AVAILABLE"
        assert device.perform() == "OTA_RESPONSE_OK"


def test_esphome_finds_the_notes_behind_the_link(serving: Any, firmware: Path) -> None:
    with serving(firmware) as place:
        device = home(place, "/sensor/manifest.json")
        device.check()
        page = fetch(place, device.release_url.partition("#")[0])
    assert b"Starts in half the time." in page
    assert f'id="{device.release_url.partition("#")[2]}"'.encode() in page


@pytest.mark.parametrize("token", ["", TOKEN])
def test_esphome_without_a_manifest_takes_the_digest_from_beside_the_image(
    serving: Any, firmware: Path, token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = home(place, "/sensor/latest.bin.md5")
        device.md5_url = device.url
        assert device.flash(device.url.removesuffix(".md5")) == "OTA_RESPONSE_OK"
    assert device.version == "1.10.0"


@pytest.mark.parametrize(
    ("project", "family", "chip"),
    [("blinds", "ESP8266", ""), ("c3", "ESP32-C3", "esp32c3"), ("sensor", "ESP32", "esp32")],
)
def test_esphome_finds_the_build_of_its_chip_and_no_other(
    serving: Any, firmware: Path, project: str, family: str, chip: str
) -> None:
    with serving(firmware) as place:
        device = home(place, f"/{project}/manifest.json", family=family, chip=chip)
        assert device.check() == "UPDATE_STATE_AVAILABLE"
        assert device.perform() == "OTA_RESPONSE_OK"
        stranger = home(place, f"/{project}/manifest.json", family="ESP32-S3", chip="esp32s3")
        assert stranger.check() == "Failed to parse manifest JSON"


def test_esphome_finds_its_chip_among_several_in_one_project(serving: Any, tmp_path: Path) -> None:
    for chip, number in (("esp32", 0), ("esp32c3", 5), ("esp32s3", 9)):
        image = esp32_image("multi", "2.0.0", chip_id=number)
        put(tmp_path / "multi" / f"{chip}-2.0.0.bin", image)
    with serving(tmp_path) as place:
        for family, chip in (("ESP32", "esp32"), ("ESP32-C3", "esp32c3"), ("ESP32-S3", "esp32s3")):
            device = home(place, "/multi/manifest.json", family=family, chip=chip)
            assert device.check() == "UPDATE_STATE_AVAILABLE"
            assert device.perform() == "OTA_RESPONSE_OK"


@pytest.mark.parametrize("family", ["ESP8266", "ESP32"])
@pytest.mark.parametrize("newest", ["ESP8266", "ESP32"])
def test_esphome_without_a_manifest_gets_no_image_of_another_family(
    serving: Any, tmp_path: Path, family: str, newest: str
) -> None:
    """An ESP8266 starts whatever begins with 0xE9, once, and nobody had asked for its chip."""
    versions = {"ESP8266": "1.0.0", "ESP32": "1.0.0", newest: "2.0.0"}
    put(tmp_path / "mix" / f"a-{versions['ESP8266']}.bin", esp8266_image("mix", "2.0.0"))
    put(tmp_path / "mix" / f"b-{versions['ESP32']}.bin", esp32_image("mix", "2.0.0"))
    with serving(tmp_path) as place:
        device = home(place, "/mix/manifest.json", family=family)
        device.md5_url = place.bare("/mix/latest.bin.md5")
        assert device.flash(place.bare("/mix/latest.bin")) == "OTA_CONNECTION_ERROR"
        if family == newest:
            assert device.check() == "UPDATE_STATE_AVAILABLE"
            assert device.perform() == "OTA_RESPONSE_OK"


@pytest.mark.parametrize("project", ["httpbin", "lamp-http"])
def test_a_project_with_http_in_its_name_is_no_trap(
    serving: Any, tmp_path: Path, project: str
) -> None:
    put(tmp_path / f"{project}-1.1.0.bin", esp32_image(project, "1.1.0"))
    with serving(tmp_path) as place:
        device = home(place, f"/{project}/manifest.json")
        device.check()
        assert device.perform() == "OTA_RESPONSE_OK"


@pytest.mark.parametrize(
    ("project", "family", "offset"), [("sensor", "ESP32", 0x10000), ("blinds", "ESP8266", 0)]
)
def test_a_browser_on_another_site_may_install(
    serving: Any, firmware: Path, project: str, family: str, offset: int
) -> None:
    with serving(firmware) as place:
        browser = WebTools(url=place.url(f"/{project}/manifest.json"), tls_ca=place.tls_ca)
        browser.family = family
        assert browser.install() == f"{project} 1.10.0"
    assert list(browser.flash) == [offset]


@pytest.mark.parametrize(
    ("cors", "expected"),
    [
        ("*", "sensor 1.10.0"),
        ("https://installer.example", "sensor 1.10.0"),
        ("https://other.example", "Failed to fetch"),
        ("off", "Failed to fetch"),
    ],
)
def test_a_browser_is_let_in_as_told(
    serving: Any, firmware: Path, cors: str, expected: str
) -> None:
    with serving(firmware, cors=cors) as place:
        browser = WebTools(url=place.url("/sensor/manifest.json"), tls_ca=place.tls_ca)
        assert browser.install() == expected


def test_a_browser_takes_a_token_along(serving: Any, firmware: Path) -> None:
    with serving(firmware, token=TOKEN) as place:
        url = place.bare(f"/sensor/manifest.json?token={TOKEN}")
        assert WebTools(url=url, tls_ca=place.tls_ca).install() == "sensor 1.10.0"


# -- AutoConnect ----------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", [".", "", "/", "/fw"])
@pytest.mark.parametrize(("make", "project"), [(esp8266, "blinds"), (esp32, "sensor")])
def test_autoconnect_shows_what_fits_and_installs_it(
    plain: Any, firmware: Path, make: Callable[..., Any], project: str, uri: str
) -> None:
    with plain(firmware) as place:
        device = AutoConnect(url=place.url(""), uri=uri, device=make(place, ""))
        names = device.catalog()
        other = {"blinds": "sensor", "sensor": "blinds"}[project]
        assert not [name for name in names if other in name or "lamp" in name]
        name = next(name for name in names if f"{project}-1.9.0" in name)
        assert (device.update(name), device.version) == (OK, "1.9.0")


def test_autoconnect_may_also_go_back(plain: Any, firmware: Path) -> None:
    with plain(firmware) as place:
        device = AutoConnect(url=place.url(""), device=esp8266(place, "", "1.10.0"))
        name = next(name for name in device.catalog() if "1.0.0" in name)
        assert (device.update(name), device.version) == (OK, "1.0.0")


# -- Mongoose OS ----------------------------------------------------------------------------------


def mongoose(place: Place, path: str = "/lamp", **options: Any) -> MongooseOs:
    """A lamp that runs 1.0.0."""
    archive = mongoose_zip("lamp", "1.0.0", platform=options.get("arch", "esp32"))
    return MongooseOs(
        url=place.url(path), app="lamp", archive=archive, tls_ca=place.tls_ca, **options
    )


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("path", ["/lamp", "/fw/lamp/latest", "/lamp-1.10.0.zip"])
def test_mongoose_os_goes_to_the_newest_and_stays_there(
    serving: Any, firmware: Path, path: str, token: str
) -> None:
    with serving(firmware, token=token) as place:
        device = mongoose(place, path)
        assert (device.update(), device.version) == ("Update applied, finalizing", "1.10.0")
        if path.endswith(".zip"):
            assert device.update() == "Version is the same as current"
        else:
            assert device.update() == "Not Modified"


@pytest.mark.parametrize(
    ("arch", "platform"),
    [("esp32", "esp8266"), ("esp8266", "esp32"), ("esp32", "esp32c3"), ("esp32c3", "esp32")],
)
def test_mongoose_os_is_not_even_sent_what_is_for_another_chip(
    serving: Any, tmp_path: Path, arch: str, platform: str
) -> None:
    put(tmp_path / "lamp-1.10.0.zip", mongoose_zip("lamp", "1.10.0", platform=platform))
    with serving(tmp_path) as place:
        assert mongoose(place, arch=arch).update() == "Invalid HTTP response code"


def test_mongoose_os_finds_its_chip_among_several(serving: Any, tmp_path: Path) -> None:
    for platform in ("esp32", "esp32c3", "esp8266"):
        image = mongoose_zip("lamp", "1.10.0", platform=platform)
        put(tmp_path / "lamp" / f"{platform}-1.10.0.zip", image)
    with serving(tmp_path) as place:
        for arch in ("esp32", "esp32c3", "esp8266"):
            assert mongoose(place, arch=arch).update() == "Update applied, finalizing"


@pytest.mark.parametrize("damage", ["deflated", "corrupt", "no-manifest", "cut-off"])
def test_a_zip_that_mongoose_os_cannot_take_is_not_offered(
    serving: Any, tmp_path: Path, damage: str
) -> None:
    good = mongoose_zip("lamp", "1.10.0")
    bad = {
        "deflated": mongoose_zip("lamp", "1.10.0", compression=8),
        "corrupt": good[:300] + b"\0" + good[301:],
        "no-manifest": good.replace(b"manifest.json", b"maniface.json"),
        "cut-off": good[:-40],
    }[damage]
    put(tmp_path / "lamp-1.5.0.zip", mongoose_zip("lamp", "1.5.0"))
    put(tmp_path / "lamp-1.10.0.zip", bad)
    with serving(tmp_path) as place:
        device = mongoose(place)
        assert (device.update(), device.version) == ("Update applied, finalizing", "1.5.0")


# -- Tasmota --------------------------------------------------------------------------------------


@pytest.fixture
def tasmotas(tmp_path: Path) -> Path:
    """A folder as somebody fills it with Tasmota's own names."""
    folder = tmp_path / "firmware"
    full = tasmota_image("14.2.0", payload=bytes(60000))
    put(folder / "tasmota-14.2.0.bin", full)
    put(folder / "tasmota-14.2.0.bin.gz", gzip_image(full))
    put(folder / "tasmota-minimal-14.2.0.bin", tasmota_image("14.2.0", "minimal"))
    put(folder / "tasmota-minimal-14.2.0.bin.gz", gzip_image(tasmota_image("14.2.0", "minimal")))
    put(folder / "tasmota32-14.2.0.bin", tasmota32_image("14.2.0"))
    put(folder / "tasmota32-safeboot-14.2.0.bin", tasmota32_image("14.2.0", "safeboot"))
    return folder


def switch(place: Place, path: str, version: str = "14.1.0", **options: Any) -> Tasmota:
    """A switch with Tasmota, which on an ESP8266 has no TLS for updates."""
    image = tasmota_image(version, payload=bytes(60000))
    options = {"flash_mode": 3, **options}
    return Tasmota(ota_url=place.url(path), image=image, **options)


PATHS = [
    "/tasmota.bin.gz",
    "/tasmota.bin",
    "/tasmota/latest.bin.gz",
    "/api/tasmota/latest.bin",
    "/tasmota",
]


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("path", PATHS)
def test_a_tasmota_goes_to_the_newest(plain: Any, tasmotas: Path, path: str, token: str) -> None:
    with plain(tasmotas, token=token) as place:
        device = switch(place, path)
        assert device.upgrade() == "Successful. Restarting"
        assert (device.version, device.restarts) == ("14.2.0(tasmota)", 1)
        assert device.upgrade() == "Successful. Restarting"  # what 304 means to it
        assert (device.last_status, device.restarts) == (304, 2)


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("path", PATHS[:4])
def test_a_tasmota_without_room_goes_by_way_of_the_minimal_image(
    plain: Any, tasmotas: Path, path: str, token: str
) -> None:
    for image in tasmotas.glob("*.gz"):
        if "minimal" not in image.name:
            image.unlink()
    with plain(tasmotas, token=token) as place:
        device = switch(place, path, room=100_000)
        assert device.upgrade() == "Successful. Restarting", device.asked
        assert (device.version, device.restarts) == ("14.2.0(tasmota)", 2)
    assert any("-minimal" in url for url in device.asked)


def test_a_tasmota_with_the_token_in_its_query_finds_the_minimal_image(
    plain: Any, tasmotas: Path
) -> None:
    for image in tasmotas.glob("*.gz"):
        if "minimal" not in image.name:
            image.unlink()
    with plain(tasmotas, token=TOKEN) as place:
        device = switch(place, "", room=100_000)
        device.ota_url = place.bare(f"/tasmota.bin.gz?token={TOKEN}")
        assert device.upgrade() == "Successful. Restarting", device.asked
        assert device.version == "14.2.0(tasmota)"


@pytest.mark.parametrize("safeboot", ["", "14.0.0"])
@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("path", ["/tasmota32.bin", "/tasmota32/latest.bin"])
def test_a_tasmota_on_an_esp32_goes_to_the_newest(
    serving: Any, tasmotas: Path, path: str, token: str, safeboot: str
) -> None:
    with serving(tasmotas, token=token) as place:
        device = Tasmota32(
            ota_url=place.url(path), image=tasmota32_image("14.1.0"), tls_ca=place.tls_ca
        )
        device.safeboot = tasmota32_image(safeboot, "safeboot") if safeboot else b""
        assert device.upgrade() == "Successful. Restarting"
        assert device.version == "14.2.0(tasmota32)"
        assert device.upgrade_safeboot() == OK
    assert b"14.2.0(safeboot)" in device.safeboot


# -- MicroPython, curl and wget -------------------------------------------------------------------

BOARD = Path(__file__).parent / "data" / "micropython"
EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAM = """
import json, esp32, ota
esp32.RUNNING_IMAGE[12] = {chip}
ota.TOKEN = {token!r}
error = ""
try:
    ota.check({url!r}, {version!r})
except ValueError as failure:
    error = str(failure)
print(json.dumps([esp32.EVENTS[-1:], esp32.digest({size}), error]))
"""


def on_board(place: Place, path: str, version: str, chip: int = 0, size: int = 1) -> list[Any]:
    """Last event, SHA-256 of what was written, error; of the example script."""
    url = place.bare(path)
    program = PROGRAM.format(url=url, version=version, chip=chip, size=size, token=place.token)
    folders = [str(BOARD), str(EXAMPLES / "micropython")]
    program = f"import sys; sys.path[:0] = {folders!r}\n{program}"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], check=True, capture_output=True, text=True
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_board_with_micropython_goes_to_the_newest(
    serving: Any, firmware: Path, token: str
) -> None:
    image = (firmware / "sensor" / "sensor-1.10.0.bin").read_bytes()
    with serving(firmware, token=token) as place:
        path, size = "/sensor/latest.bin", len(image)
        digest = hashlib.sha256(image).hexdigest()
        assert on_board(place, path, "1.0.0", size=size) == [["reset"], digest, ""]
        assert on_board(place, path, "1.10.0")[0] == []
        assert on_board(place, "/c3/latest.bin", "1.0.0")[2] == "an image for another chip"
        assert on_board(place, "/blinds/latest.bin", "1.0.0")[2] == "the server says 403"


def fetch(place: Place, url: str) -> bytes:
    """The body of a GET by the standard library."""
    context = ssl.create_default_context(cafile=str(place.tls_ca)) if place.tls_ca else None
    with urllib.request.urlopen(url, context=context, timeout=10) as response:
        return bytes(response.read())


@pytest.mark.parametrize("program", ["curl", "wget"])
@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_person_downloads_with_what_there_is(
    serving: Any, firmware: Path, tmp_path: Path, program: str, token: str
) -> None:
    if not shutil.which(program):
        pytest.skip(f"the program {program} is not installed")
    image = (firmware / "sensor" / "sensor-1.10.0.bin").read_bytes()
    with serving(firmware, token=token) as place:
        url = place.bare("/sensor/latest.bin")
        for ending, expected in (("", image), (".sha256", None)):
            target = tmp_path / f"got{ending}"
            command = {
                "curl": ["curl", "-sSf", "-o", str(target), url + ending],
                "wget": ["wget", "-q", "-O", str(target), url + ending],
            }[program]
            if place.tls_ca:
                option = {"curl": "--cacert", "wget": "--ca-certificate"}[program]
                command += [option, str(place.tls_ca)]
            if token:
                command += ["--header", f"Authorization: Bearer {token}"]
            subprocess.run(command, check=True, capture_output=True)
            if expected:
                assert target.read_bytes() == expected
    digest, name = (tmp_path / "got.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(image).hexdigest(), "sensor-1.10.0.bin")


def test_the_notes_are_on_the_page(serving: Any, firmware: Path) -> None:
    with serving(firmware) as place:
        assert b"Starts in half the time." in fetch(place, place.url("/"))
