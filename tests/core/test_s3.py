"""S3, the ESP Update Server: its address /update?dev=<platform>&ver=v1.0.2, without whitelists.

The sketches are those of its README: the version stands in the URL, update() gets none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import Site, answer, parse_head
from tests.conftest import put, site_of
from tests.core.test_access import ask, bearer, refuses, site_with, text_of
from tests.core.wire import Answer, Stand, request, standing
from tests.data.make_images import esp32_image, esp8266_image, gzip_image
from tests.devices import Device, Esp32, Esp8266

OK, NO_UPDATES, FAILED = "HTTP_UPDATE_OK", "HTTP_UPDATE_NO_UPDATES", "HTTP_UPDATE_FAILED"
ESP8266 = "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56"
ESP32 = "x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC"
FAMILIES = [pytest.param(ESP8266, "bulb", id="esp8266"), pytest.param(ESP32, "lamp", id="esp32")]
SDK = b"esp-idf: v3.3.1 38eeba213a\0v9.9.9\0"  # what S3 took for the version of the image


def bulb(port: int, version: str = "v1.0.2", **options: Any) -> Device:
    """An ESP8266 with the sketch of the README."""
    path = f"/update?dev=bulb&ver={version}"
    image = esp8266_image("bulb", version[1:])
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": port, "path": path, "image": image}
    return Esp8266(**usual | {"tells_version": False} | options)


def lamp(port: int, version: str = "v1.0.2", **options: Any) -> Device:
    """An ESP32 with the sketch of the README."""
    path = f"/update?dev=lamp&ver={version}"
    image = esp32_image("lamp", version[1:])
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": port, "path": path, "image": image}
    return Esp32(**usual | {"tells_version": False} | options)


Make = Callable[..., Device]
MAKERS = [pytest.param(bulb, id="esp8266"), pytest.param(lamp, id="esp32")]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two versions for each of two platforms; the newer ones name an SDK inside."""
    folder = tmp_path / "bin"
    put(folder / "bulb-1.0.2.bin", esp8266_image("bulb", "1.0.2"))
    put(folder / "bulb-1.10.0.bin", esp8266_image("bulb", "1.10.0", payload=SDK))
    put(folder / "lamp-1.0.2.bin", esp32_image("lamp", "1.0.2"))
    put(folder / "lamp-v1.10.0.bin", esp32_image("lamp", "1.10.0", payload=SDK))
    return folder


@pytest.fixture
def site(shop: Path) -> Site:
    """A site with both."""
    return site_of(shop)


@pytest.fixture(params=["http", "https"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None over HTTP."""
    return certificate if request.param == "https" else None


@pytest.fixture
def stand(site: Site, ca: Path | None) -> Iterator[Stand]:
    """The server, by HTTP and by HTTPS."""
    with standing(site, ca) as running:
        yield running


def get(stand: Stand, target: str, *fields: str) -> Answer:
    """The reply to a device that closes."""
    with stand.dial() as wire:
        wire.send(request(target, *fields, http="1.0"))
        return wire.reply()


# -- 1. Whole devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_sketch_of_the_readme_is_updated_once(make: Make, stand: Stand) -> None:
    device = make(stand.port, tls_ca=stand.ca)
    assert not re.search(rb"x-ESP(32|8266)-version:", device.request())
    assert (device.update(), device.last_error) == (OK, 0)
    assert device.version == "1.10.0"
    newer = make(stand.port, "v1.10.0", image=device.image, tls_ca=stand.ca)
    assert (newer.update(), newer.last_status) == (NO_UPDATES, 304)


@pytest.mark.parametrize("make", MAKERS)
def test_sketch_that_still_says_the_old_version_does_not_loop(make: Make, stand: Stand) -> None:
    device = make(stand.port, tls_ca=stand.ca)
    assert device.update() == OK
    assert (device.update(), device.last_status) == (NO_UPDATES, 304)  # it says v1.0.2 again
    assert device.last_headers["x-ota-reason"].startswith("same-image")


@pytest.mark.parametrize("make", MAKERS)
def test_several_devices_share_a_platform(make: Make, stand: Stand) -> None:
    for last in range(3):
        device = make(stand.port, mac=f"5C:CF:7F:12:34:5{last}", tls_ca=stand.ca)
        assert device.update() == OK


def test_upload_of_a_newer_version_reaches_devices_and_the_old_one_stays(shop: Path) -> None:
    put(shop / "bulb-2.0.0.bin", esp8266_image("bulb", "2.0.0"))
    with standing(site_of(shop)) as stand:
        device = bulb(stand.port, "v1.10.0")
        assert (device.update(), device.version) == (OK, "2.0.0")
        assert get(stand, "/bulb/bulb-1.0.2.bin").status == 200


@pytest.mark.parametrize(
    ("make", "options", "status", "error"),
    [
        pytest.param(bulb, {"path": "/update?dev=none&ver=v1.0.2"}, 400, -104, id="unknown-8266"),
        pytest.param(lamp, {"path": "/update?dev=none&ver=v1.0.2"}, 400, -104, id="unknown-32"),
        pytest.param(bulb, {"path": "/update?dev=bulb"}, 400, -104, id="no-version-8266"),
        pytest.param(lamp, {"path": "/update?dev=lamp"}, 400, -104, id="no-version-32"),
        pytest.param(
            bulb, {"path": "/update?dev=lamp&ver=v1.0.2"}, 403, -103, id="other-chip-8266"
        ),
        pytest.param(lamp, {"path": "/update?dev=bulb&ver=v1.0.2"}, 403, -103, id="other-chip-32"),
        pytest.param(bulb, {"free_space": 4096}, 304, 0, id="no-room-8266"),
        pytest.param(lamp, {"mode": "spiffs"}, 304, 0, id="filesystem-32"),
    ],
)
def test_device_that_cannot_be_updated_runs_on(
    make: Make, options: dict[str, Any], status: int, error: int, stand: Stand
) -> None:
    device = make(stand.port, tls_ca=stand.ca, **options)
    before = device.image
    assert device.update() == (NO_UPDATES if status == 304 else FAILED)
    assert (device.last_status, device.last_error, device.image) == (status, error, before)


# -- 2. Its contract ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mac", "platform"), FAMILIES)
@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("v1.0.2", 200),
        ("1.0.2", 200),
        ("V1.0.2", 200),
        ("v1.9.9", 200),
        ("v0.0.1", 200),
        ("v1.0", 200),
        ("v1.10.0-rc.1", 200),
        ("v1.10.0", 304),
        ("v1.10.0+build.5", 304),
        ("v1.10.1", 304),
        ("v2.0.0", 304),
        ("v3.3.1", 304),  # what S3 read in the image of the SDK
        ("v99999999999999999999.0.0", 304),
    ],
)
def test_newer_image_is_sent_and_nothing_else(
    version: str, status: int, mac: str, platform: str, stand: Stand, shop: Path
) -> None:
    reply = get(stand, f"/update?dev={platform}&ver={version}", mac)
    assert reply.status == status
    if status == 304:
        assert reply.headers["x-ota-reason"].startswith("not-newer: 1.10.0 is not newer than ")
        return
    path = next(shop.glob(f"{platform}-*1.10.0.bin"))
    assert reply.body == path.read_bytes()
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-length"] == str(path.stat().st_size)
    assert reply.headers["content-disposition"] == f'attachment; filename="{path.name}"'
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-md5"])


@pytest.mark.parametrize(("mac", "platform"), FAMILIES)
@pytest.mark.parametrize(
    ("target", "fields"),
    [
        pytest.param("/update?dev={0}&ver=v1.0.2", [], id="no-mac"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{1}:"], id="empty-mac"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{1}: 12:34"], id="short-mac"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{1}: 5C:CF:7F:12:34:5G"], id="no-hex"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{1}: 5C:CF:7F:12:34:56:78"], id="long-mac"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{1}: ' or 1=1 --"], id="sql-for-mac"),
        pytest.param("/update?dev={0}", ["{2}"], id="no-ver"),
        pytest.param("/update?dev={0}&ver=", ["{2}"], id="empty-ver"),
        pytest.param("/update?dev={0}&ver=one", ["{2}"], id="odd-ver"),
        pytest.param("/update?dev={0}&ver=v1", ["{2}"], id="short-ver"),
        pytest.param("/update?dev={0}&ver=v1.0.2.3", ["{2}"], id="long-ver"),
        pytest.param("/update?dev={0}&ver=v01.0.2", ["{2}"], id="leading-zero"),
        pytest.param("/update?dev={0}&ver=v1.0.2%00", ["{2}"], id="nul-in-ver"),
        pytest.param("/update?dev={0}&ver=%FF%FE", ["{2}"], id="no-utf-8-in-ver"),
        pytest.param("/update?dev={0}&ver=" + "1." * 500, ["{2}"], id="endless-ver"),
        pytest.param("/update?ver=v1.0.2", ["{2}"], id="no-dev"),
        pytest.param("/update?dev=&ver=v1.0.2", ["{2}"], id="empty-dev"),
        pytest.param("/update?DEV={0}&ver=v1.0.2", ["{2}"], id="other-name"),
        pytest.param("/update?dev=none&ver=v1.0.2", ["{2}"], id="unknown-dev"),
        pytest.param("/update?dev={0}x&ver=v1.0.2", ["{2}"], id="longer-dev"),
        pytest.param("/update?dev=la&ver=v1.0.2", ["{2}"], id="prefix-of-dev"),
        pytest.param("/update?dev=../bin/{0}&ver=v1.0.2", ["{2}"], id="path-in-dev"),
        pytest.param("/update?dev=%2e%2e%2f{0}&ver=v1.0.2", ["{2}"], id="coded-path-in-dev"),
        pytest.param("/update?dev={0}-1.10.0.bin&ver=v1.0.2", ["{2}"], id="file-for-dev"),
        pytest.param("/update?dev={0}%00&ver=v1.0.2", ["{2}"], id="nul-in-dev"),
        pytest.param("/update?dev=%ED%A0%80&ver=v1.0.2", ["{2}"], id="surrogate-in-dev"),
        pytest.param("/update?dev=" + "x" * 4000 + "&ver=v1.0.2", ["{2}"], id="endless-dev"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{2}", "{3}-version: one"], id="odd-header"),
        pytest.param("/update?dev={0}&ver=v1.0.2", ["{2}", "{3}-free-space: x"], id="odd-space"),
    ],
)
def test_what_a_device_does_wrong_is_a_400_with_a_reason(
    target: str, fields: Sequence[str], mac: str, platform: str, site: Site
) -> None:
    name, prefix = mac.partition(":")[0], mac.partition("-STA")[0]
    said = [each.format("", name, mac, prefix) for each in fields]
    reply = ask(site, target.format(platform), *said, http="1.0")
    assert reply.status == 400
    assert re.fullmatch(r"[ -~]{10,300}\n", text_of(reply))
    assert dict(reply.headers)["X-OTA-Reason"].isascii()


@pytest.mark.parametrize(
    "mac", ["5C:CF:7F:12:34:56", "5c-cf-7f-12-34-56", "5CCF7F123456", " 5C:CF:7F:12:34:56 "]
)
def test_mac_is_read_with_and_without_separators(
    mac: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert ask(site, "/update?dev=bulb&ver=v1.0.2", f"x-ESP8266-STA-MAC: {mac}").status == 200
    assert caplog.messages == [f"{mac.strip().upper()} 192.0.2.7 bulb 1.0.2 -> 1.10.0"]


def test_platforms_are_told_apart_by_their_whole_name(tmp_path: Path) -> None:
    for name in ("smart-lamp", "SMART-LAMP", "SMART_LAMP", "smart-lamp-2"):
        put(tmp_path / f"{name}-1.1.0.bin", esp32_image(name, "1.1.0"))
    site = site_of(tmp_path)
    for name in ("smart-lamp", "SMART-LAMP", "SMART_LAMP", "smart-lamp-2"):
        reply = ask(site, f"/update?dev={name}&ver=v1.0.2", ESP32)
        assert dict(reply.headers)["Content-Disposition"].endswith(f'"{name}-1.1.0.bin"')
    assert ask(site, "/update?dev=Smart-Lamp&ver=v1.0.2", ESP32).status == 400


def test_order_and_number_of_parameters_do_not_matter(site: Site) -> None:
    for query in ("ver=v1.0.2&dev=bulb", "x=1&dev=bulb&y&ver=v1.0.2&z=", "dev=bulb&&ver=v1.0.2"):
        assert ask(site, f"/update?{query}", ESP8266).status == 200
    for path in ("/ota/update", "//update", "/update/"):
        assert ask(site, f"{path}?dev=bulb&ver=v1.0.2", ESP8266).status == 200
    head = ask(site, "/update?dev=bulb&ver=v1.0.2", ESP8266, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert ask(site, "/update?dev=bulb&ver=v1.0.2", ESP8266, method="POST").status == 405


def test_header_goes_before_the_query_as_for_everybody(site: Site) -> None:
    target = "/update?dev=bulb&ver=v1.0.2"
    assert ask(site, target, ESP8266, "x-ESP8266-version: 1.10.0").status == 304
    assert ask(site, "/update?dev=bulb", ESP8266, "x-ESP8266-version: 1.0.2").status == 200


def test_packed_image_goes_to_an_esp8266(shop: Path) -> None:
    packed = gzip_image(esp8266_image("bulb", "2.0.0", flash_mode=3))
    put(shop / "bulb-2.0.0.bin.gz", packed)
    with standing(site_of(shop)) as stand:
        device = bulb(stand.port, flash_mode=3)
        assert (device.update(), device.version) == (OK, "2.0.0")


def test_project_called_update_is_still_to_be_had(shop: Path) -> None:
    put(shop / "update-2.0.0.bin", esp8266_image("update", "2.0.0"))
    site = site_of(shop)
    for target in ("/update", "/x/update", "/update/latest.bin", "/update?dev=update&ver=v1.0.2"):
        reply = ask(site, target, "x-ESP8266-version: 1.0.2", ESP8266)
        assert dict(reply.headers)["x-version"] == "2.0.0", target


def test_file_that_has_just_gone_is_no_mistake_of_the_device(shop: Path, site: Site) -> None:
    (shop / "bulb-1.10.0.bin").unlink()
    reply = ask(site, "/update?dev=bulb&ver=v1.0.2", ESP8266)
    assert reply.status == 503
    assert dict(reply.headers)["Retry-After"] == "30"


def test_platform_needs_its_token(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text('{"bulb": "b", "lamp": "l"}')
    site = site_with(shop, token_file=str(tmp_path / "tokens"))
    for target in ("/update?dev=bulb&ver=v1.0.2", "/update?dev=bulb", "/update?ver=1&dev=bulb"):
        assert refuses(ask(site, target, ESP8266))
        assert refuses(ask(site, target, ESP8266, bearer("l")))
        assert ask(site, target, ESP8266, bearer("b")).status in {200, 400}
    assert refuses(ask(site, "/update?dev=none&ver=v1.0.2", ESP8266, bearer("b")))


# -- 3. Never 500 ---------------------------------------------------------------------------------

WORDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)


@settings(deadline=None)  # the machine may be busy
@given(
    query=st.one_of(
        st.builds("dev=bulb&ver={}".format, WORDS), st.builds("dev={}&ver=1.0".format, WORDS), WORDS
    ),
    names=st.lists(st.sampled_from(["STA-MAC", "version", "mode", "free-space", "sketch-md5"])),
    value=WORDS,
    family=st.sampled_from(["x-ESP8266", "x-ESP32"]),
)
def test_no_query_and_no_header_makes_a_500(
    query: str, names: list[str], value: str, family: str, small: Site
) -> None:
    fields = [f"{family}-{name}: {value}" for name in dict.fromkeys(names)]
    target = f"/update?{quote(query, safe='&=+%/') if '%' not in query else quote(query)}"
    if "STA-MAC" not in names:
        fields.append(ESP8266)
    reply = answer(small, parse_head(request(target, *fields), "192.0.2.7"))
    if not isinstance(reply.body, bytes):
        reply.body.file.close()
    named = re.search(r"[?&](dev|ver)=[^&]", target)  # else it is a project called update
    assert reply.status in {200, 304, 400, 403, 400 if named else 404}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site for many questions."""
    folder = tmp_path_factory.mktemp("small")
    put(folder / "bulb-1.10.0.bin", esp8266_image("bulb", "1.10.0"))
    return site_of(folder)


def test_400_answers_under_load_are_all_right(site: Site) -> None:
    with standing(site) as stand, ExitStack() as stack:
        wires = [stack.enter_context(stand.dial()) for _ in range(8)]
        for wire in wires:
            wire.send(request("/update?dev=bulb&ver=v1.10.0", ESP8266) * 50)
        statuses = [wire.reply().status for wire in wires for _ in range(50)]
    assert statuses == [304] * 400
