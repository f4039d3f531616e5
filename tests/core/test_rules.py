"""Reports and rules: what a device says of itself, and which release it gets for it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_server import (
    ANY_ESP,
    ESP32_FAMILY,
    FILESYSTEMS,
    SAFETY,
    STATELESS,
    UNKNOWN_CHIP,
    UNKNOWN_ESP,
    UNVERSIONED,
    Event,
    Facts,
    Objection,
    Refused,
    Release,
    Report,
    Rule,
    Version,
    choose,
    enough_room,
    fit_unasked,
    log_decision,
    only_newer,
    read_report,
    recognised,
    right_chip,
    right_kind,
    same_image,
)

ADDRESS = "192.0.2.7"
MD5, SHA256 = "14cc0cfb6b4b2feab2c588b4ab77380c", "72c3342b" * 8

# The headers of one captured request each, names in lower case as parse_head() leaves them.
ESP8266_HEADERS = {
    "host": "127.0.0.1:18266",
    "user-agent": "ESP8266-http-Update",
    "connection": "close",
    "x-esp8266-chip-id": "12648430",
    "x-esp8266-sta-mac": "5C:CF:7F:12:34:56",
    "x-esp8266-ap-mac": "5E:CF:7F:12:34:56",
    "x-esp8266-free-space": "1794048",
    "x-esp8266-sketch-size": "299952",
    "x-esp8266-sketch-md5": MD5,
    "x-esp8266-chip-size": "4194304",
    "x-esp8266-sdk-version": "2.2.2-dev(38a443e)",
    "x-esp8266-mode": "sketch",
    "x-esp8266-version": "1.0",
    "content-length": "0",
}
ESP32_HEADERS = {
    "host": "127.0.0.1:18232",
    "user-agent": "ESP32-http-Update",
    "connection": "close",
    "cache-control": "no-cache",
    "x-esp32-base-mac": "24:6F:28:AA:BB:CC",
    "x-esp32-sta-mac": "24:6F:28:AA:BB:CC",
    "x-esp32-ap-mac": "24:6F:28:AA:BB:CD",
    "x-esp32-free-space": "1310720",
    "x-esp32-sketch-size": "399968",
    "x-esp32-sketch-md5": "df615266c370fbaa95e1f2ddc701fad7",
    "x-esp32-sketch-sha256": SHA256.upper(),
    "x-esp32-chip-size": "4194304",
    "x-esp32-sdk-version": "v5.3.2-282-gcfea4f7c98-dirty",
    "x-esp32-mode": "sketch",
    "x-esp32-version": "1.2.3",
}


def release(  # noqa: PLR0913 - each one is a fact that some rule looks at
    version: str,
    chip: str = "esp8266",
    *,
    size: int = 1000,
    flash_size: int = 0,
    kind: str = "sketch",
    running: Sequence[str] = (),
    packed: bool = False,
) -> Release:
    facts = Facts(chip, frozenset(running), flash_size, packed)
    name = f"app-{version}.bin"
    identity = (1, 2, size, 3, 4)
    return Release("app", Version.parse(version), kind, f"/srv/{name}", name, identity, facts)


def report(version: str = "", **told: object) -> Report:
    running = Version.parse(version) if version else None
    return Report("app", ADDRESS, version=running, **told)  # type: ignore[arg-type]


def said(outcome: Release | Objection) -> str:
    """The version that is offered, else the objection's code."""
    return str(outcome.version) if isinstance(outcome, Release) else outcome.code


# -- 1. Reports ------------------------------------------------------------------------------------


def test_report_of_an_esp8266() -> None:
    assert read_report("app", ESP8266_HEADERS, ADDRESS) == Report(
        project="app",
        address=ADDRESS,
        version=Version.parse("1.0.0"),
        device="5C:CF:7F:12:34:56",
        chip="esp8266",
        kind="sketch",
        free_space=1794048,
        chip_size=4194304,
        sketch_md5=MD5,
        sketch_sha256=None,
        sdk="2.2.2-dev(38a443e)",
    )


def test_report_of_an_esp32() -> None:
    assert read_report("app", ESP32_HEADERS, ADDRESS) == Report(
        project="app",
        address=ADDRESS,
        version=Version.parse("1.2.3"),
        device="24:6F:28:AA:BB:CC",
        chip=ESP32_FAMILY,
        kind="sketch",
        free_space=1310720,
        chip_size=4194304,
        sketch_md5="df615266c370fbaa95e1f2ddc701fad7",
        sketch_sha256=SHA256,
        sdk="v5.3.2-282-gcfea4f7c98-dirty",
    )


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"host": "ota", "user-agent": "curl/8.5.0", "accept": "*/*"}, id="curl"),
        pytest.param({"host": "ota", "connection": "close"}, id="MicroPython"),
    ],
)
def test_report_of_somebody_who_is_no_device_is_empty(headers: dict[str, str]) -> None:
    assert read_report("app", headers, ADDRESS) == Report("app", ADDRESS)


ESPHOME = "ESPHome/2026.6.5 (https://esphome.io)"


@pytest.mark.parametrize(
    ("headers", "chip"),
    [
        pytest.param({"x-esp8266-version": "1.0.0"}, "esp8266", id="the one header of S1"),
        pytest.param({"x-esp8266-version": ""}, "esp8266", id="empty version"),
        pytest.param({"x-esp8266-sta-mac": "5C:CF:7F:12:34:56"}, "esp8266", id="no version"),
        pytest.param({"x-esp32-version": "1.0.0"}, ESP32_FAMILY, id="ESP32"),
        pytest.param(
            {"x-esp32-sta-mac": "24:6F:28:AA:BB:CC"}, ESP32_FAMILY, id="ESP32, no version"
        ),
        pytest.param({"user-agent": "ESP32-http-Update"}, ESP32_FAMILY, id="ESP32 user agent"),
        pytest.param({"user-agent": "ESP32 HTTP Client/1.0"}, ESP32_FAMILY, id="ESP-IDF"),
        pytest.param({"user-agent": "ESP8266-http-Update"}, "esp8266", id="redirected ESP8266"),
        pytest.param(
            {"user-agent": "ESP32 HTTP Client/1.0", "x-esp8266-version": "1.0.0"},
            ESP32_FAMILY,
            id="ESP-IDF that sends the header of S1",
        ),
        pytest.param(
            {"user-agent": "ESP32HTTPClient", "x-esp8266-version": "1.0.0"},
            ESP32_FAMILY,
            id="ESP32 sketch that sends the header of S1",
        ),
        pytest.param({"user-agent": ESPHOME}, ANY_ESP, id="ESPHome"),
        pytest.param(
            {"user-agent": ESPHOME, "x-esp8266-sta-mac": "5C:CF:7F:12:34:56"},
            "esp8266",
            id="ESPHome that says more",
        ),
    ],
)
def test_family_is_that_of_headers_or_user_agent(headers: dict[str, str], chip: str | None) -> None:
    assert read_report("app", headers, ADDRESS).chip == chip


def test_esp32_with_the_header_of_s1_has_the_version_it_says() -> None:
    headers = {"user-agent": "ESP32 HTTP Client/1.0", "x-esp8266-version": "1.9.0"}
    assert read_report("app", headers, ADDRESS).version == Version.parse("1.9.0")


@pytest.mark.parametrize(
    ("given", "device"), [(".", None), ("..", None), ("....", None), ("..1", "..1"), ("7.", "7.")]
)
def test_id_of_dots_only_has_no_page_and_is_none(given: str, device: str | None) -> None:
    assert read_report("app", {}, ADDRESS, f"id={given}").device == device


@pytest.mark.parametrize("prefix", ["x-esp8266-", "x-esp32-"])
@pytest.mark.parametrize(
    ("mac", "device"),
    [
        pytest.param("5C:CF:7F:12:34:56", "5C:CF:7F:12:34:56", id="as devices write it"),
        pytest.param("5c:cf:7f:ab:cd:ef", "5C:CF:7F:AB:CD:EF", id="lower case"),
        pytest.param("5C-CF-7F-12-34-56", "5C-CF-7F-12-34-56", id="hyphens"),
        pytest.param("5CCF7F123456", "5CCF7F123456", id="without separators"),
        pytest.param("", None, id="empty"),
        pytest.param("5C:CF:7F:12:34", None, id="too short"),
        pytest.param("5C:CF:7F:12:34:56:78", None, id="too long"),
        pytest.param("5C:CF:7F:12:34:5G", None, id="no hexadecimal digit"),
        pytest.param("5C:CF:7F:12:34:56 ", None, id="blank behind"),
        pytest.param("' OR 1=1 --", None, id="something else"),
    ],
)
def test_device_is_its_mac_address_or_nobody(prefix: str, mac: str, device: str | None) -> None:
    headers = {f"{prefix}sta-mac": mac, f"{prefix}version": "1.0.0"}
    assert read_report("app", headers, ADDRESS).device == device


@pytest.mark.parametrize("prefix", ["x-esp8266-", "x-esp32-"])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        pytest.param("sketch", "sketch", id="sketch"),
        pytest.param("version", "sketch", id="version: getAvailableVersion() of a sketch"),
        pytest.param("spiffs", "filesystem", id="spiffs"),
        pytest.param("littlefs", "littlefs", id="littlefs"),
        pytest.param("fatfs", "fatfs", id="fatfs"),
        pytest.param("flashfs", "filesystem", id="flashfs"),
        pytest.param(None, "sketch", id="not said"),
    ],
)
def test_kind_follows_from_the_mode(prefix: str, mode: str | None, kind: str) -> None:
    headers = {f"{prefix}version": "1.0.0"} | ({f"{prefix}mode": mode} if mode else {})
    assert read_report("app", headers, ADDRESS).kind == kind


@pytest.mark.parametrize("prefix", ["x-esp8266-", "x-esp32-"])
@pytest.mark.parametrize("name", ["free-space", "chip-size"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("-1", id="negative"),
        pytest.param("+1", id="plus"),
        pytest.param("1_000", id="underscore"),
        pytest.param("1.5", id="fraction"),
        pytest.param("1e6", id="exponent"),
        pytest.param("0x10", id="hexadecimal"),
        pytest.param("1794048, 1794048", id="two of them"),
        pytest.param("9" * 16, id="16 digits"),
        pytest.param("²", id="superscript"),
    ],
)
def test_malformed_number_is_400_that_names_the_header(prefix: str, name: str, text: str) -> None:
    headers = {f"{prefix}version": "1.0.0", f"{prefix}{name}": text}
    with pytest.raises(Refused) as caught:
        read_report("app", headers, ADDRESS)
    assert caught.value.status == 400
    assert f"{prefix}{name}" in caught.value.reason.lower()


@pytest.mark.parametrize("prefix", ["x-esp8266-", "x-esp32-"])
@pytest.mark.parametrize("text", ["latest", "1", "1.2.3.4", "01.2.3", "x" * 200])
def test_unreadable_version_is_400_that_names_the_header(prefix: str, text: str) -> None:
    with pytest.raises(Refused) as caught:
        read_report("app", {f"{prefix}version": text}, ADDRESS)
    assert caught.value.status == 400
    assert f"{prefix}version" in caught.value.reason.lower()
    assert text[:50] in caught.value.reason
    assert "1.2.3" in caught.value.reason


@pytest.mark.parametrize("prefix", ["x-esp8266-", "x-esp32-"])
def test_digests_are_kept_in_lower_case(prefix: str) -> None:
    headers = {f"{prefix}version": "1.0", f"{prefix}sketch-md5": MD5.upper()}
    assert read_report("app", headers, ADDRESS).sketch_md5 == MD5


@pytest.mark.parametrize(
    ("headers", "query", "version"),
    [
        pytest.param({}, "version=1.2.3", "1.2.3", id="version"),
        pytest.param({}, "ver=v1.0.2", "1.0.2", id="ver, as S3 writes it"),
        pytest.param({}, "version=1.2", "1.2.0", id="two numbers"),
        pytest.param({}, "version=1.0.0+b.7", "1.0.0+b.7", id="plus as it is"),
        pytest.param({}, "version=1.0.0%2Bb.7", "1.0.0+b.7", id="plus coded"),
        pytest.param({}, "version=%31.0.0", "1.0.0", id="digits coded"),
        pytest.param({}, "x=1&version=1.0.0&version=2.0.0", "1.0.0", id="the first counts"),
        pytest.param({}, "ver=2.0.0&version=1.0.0", "1.0.0", id="version before ver"),
        pytest.param({}, "version=&ver=2.0.0", "2.0.0", id="empty says nothing"),
        pytest.param({}, "Version=1.0.0", None, id="names are as they are"),
        pytest.param({}, "version", None, id="no value"),
        pytest.param({}, "xversion=1.0.0", None, id="another name"),
        pytest.param({"x-esp8266-version": "3.0.0"}, "version=1.0.0", "3.0.0", id="field first"),
        pytest.param({"x-esp32-version": ""}, "version=1.0.0", "1.0.0", id="empty field"),
        pytest.param({}, "version=14.1.0(tasmota)", "14.1.0", id="Tasmota"),
    ],
)
def test_query_tells_the_version_where_no_field_does(
    headers: dict[str, str], query: str, version: str | None
) -> None:
    found = read_report("app", headers, ADDRESS, query)
    assert (found.version and str(found.version)) == version


@pytest.mark.parametrize(
    "query", ["version=latest", "ver=1", "version=%00", "version=%ff", "ver=%"]
)
def test_unreadable_version_in_the_query_is_400(query: str) -> None:
    with pytest.raises(Refused) as caught:
        read_report("app", {}, ADDRESS, query)
    assert caught.value.status == 400
    assert caught.value.reason.isascii()
    assert caught.value.reason.isprintable()


MONGOOSE = {
    "x-mgos-device-id": "esp32_DDEEFF AABBCCDDEEFF",
    "x-mgos-fw-version": "esp32 1.0.0 20260101-120000/g1234567-main",
    "user-agent": "gate/1.0.0 (MongooseOS/2.20.0; esp32)",
}


def test_report_of_mongoose_os() -> None:
    assert read_report("gate", MONGOOSE, ADDRESS) == Report(
        project="gate",
        address=ADDRESS,
        version=Version.parse("1.0.0"),
        device="AABBCCDDEEFF",
        chip="esp32",
        kind="zip",
    )


@pytest.mark.parametrize(
    ("text", "chip", "version"),
    [
        pytest.param("esp8266 1.0 b", "esp8266", "1.0.0", id="ESP8266"),
        pytest.param("ESP8266 1.0 b", "esp8266", "1.0.0", id="upper case"),
        pytest.param("esp32c3 2.0.0 b", "esp32c3", "2.0.0", id="the very chip"),
        pytest.param("stm32 1.0 b", "stm32", "1.0.0", id="no ESP, which gets nothing"),
        pytest.param("esp32", "esp32", None, id="no version"),
        pytest.param("esp32  1.0", "esp32", "1.0.0", id="no build"),
        pytest.param("esp32 1.0 b c d", "esp32", "1.0.0", id="too many words"),
        pytest.param("", "", None, id="empty"),
        pytest.param("\x9b31m 1.0", "\\x9b31m", "1.0.0", id="for a terminal"),
        pytest.param("a" * 5000, "a" * 64, None, id="long"),
    ],
)
def test_mongoose_os_names_its_chip(text: str, chip: str, version: str | None) -> None:
    found = read_report("gate", MONGOOSE | {"x-mgos-fw-version": text}, ADDRESS)
    assert (found.chip, found.version and str(found.version)) == (chip, version)
    assert found.kind == "zip"


def test_mongoose_os_with_an_odd_version_is_400() -> None:
    with pytest.raises(Refused) as caught:
        read_report("gate", MONGOOSE | {"x-mgos-fw-version": "esp32 latest b"}, ADDRESS)
    assert caught.value.status == 400


@pytest.mark.parametrize("mac", ["", "esp32_DDEEFF", "esp32_DDEEFF x", "x AABBCCDDEEFF "])
def test_mongoose_os_without_an_address_is_nobody(mac: str) -> None:
    assert read_report("gate", MONGOOSE | {"x-mgos-device-id": mac}, ADDRESS).device is None


@pytest.mark.parametrize(
    ("project", "running", "version"),
    [
        pytest.param("tasmota", "14.1.0(tasmota)", "14.1.0", id="ESP8266"),
        pytest.param("tasmota32", "14.1.0(tasmota32)", "14.1.0", id="ESP32"),
        pytest.param("tasmota", "14.1.0.2(release-tasmota32)", "14.1.0", id="four numbers"),
        pytest.param("tasmota", "14.1.0(lite)", "14.1.0", id="another variant"),
        pytest.param("tasmota", "14.1.0()", "14.1.0", id="no variant"),
        pytest.param("tasmota", "14.1.0(my-minimalist)", "14.1.0", id="not minimal"),
        pytest.param("tasmota", "14.1.0(minimal)", "0.0.0-0", id="minimal runs"),
        pytest.param("tasmota", "14.1.0(release-minimal)", "0.0.0-0", id="some minimal runs"),
        pytest.param("tasmota32", "14.1.0(safeboot)", "0.0.0-0", id="safeboot runs"),
        pytest.param("tasmota-minimal", "14.1.0(tasmota)", "0.0.0-0", id="minimal asked for"),
        pytest.param("tasmota32-safeboot", "14.1.0(tasmota32)", "0.0.0-0", id="safeboot"),
        pytest.param("minimal", "14.1.0(tasmota)", "0.0.0-0", id="a folder for it"),
    ],
)
@pytest.mark.parametrize("family", ["esp8266", "esp32"])
def test_tasmota_says_its_version_in_a_way_of_its_own(
    family: str, project: str, running: str, version: str
) -> None:
    """The one that runs only to get another counts as the lowest of all; room is not judged."""
    headers = {f"x-{family}-version": running, f"x-{family}-free-space": "400000"}
    found = read_report(project, headers | {f"x-{family}-chip-size": "1048576"}, ADDRESS)
    assert str(found.version) == version
    assert (found.free_space, found.chip_size) == (None, None)
    assert found.chip == ("esp8266" if family == "esp8266" else ESP32_FAMILY)


@pytest.mark.parametrize(
    "text", ["14.1(tasmota)", "14(tasmota)", "tasmota(14.1.0)", "(tasmota)", "14.1.0 (x)", "1.0.0)"]
)
def test_other_text_in_brackets_is_no_version(text: str) -> None:
    with pytest.raises(Refused) as caught:
        read_report("tasmota", {"x-esp8266-version": text}, ADDRESS)
    assert caught.value.status == 400


# -- 2. One rule at a time -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "offered", "code"),
    [
        pytest.param("1.0.0", "1.0.1", None, id="newer"),
        pytest.param("1.9.0", "1.10.0", None, id="1.10 is newer than 1.9"),
        pytest.param("1.0.0-rc.1", "1.0.0", None, id="release after its candidate"),
        pytest.param("", "0.0.1", None, id="not said"),
        pytest.param("1.0.0", "1.0.0", "not-newer", id="same"),
        pytest.param("1.0.0+1", "1.0.0+2", "not-newer", id="other build"),
        pytest.param("2.0.0", "1.9.9", "not-newer", id="older"),
        pytest.param("1.10.0", "1.9.0", "not-newer", id="1.9 is older than 1.10"),
    ],
)
def test_only_newer(running: str, offered: str, code: str | None) -> None:
    objection = only_newer(report(running), release(offered))
    assert (objection and objection.code) == code
    if objection:
        assert (objection.deny, objection.final) == (False, True)
        assert offered in objection.reason
        assert running in objection.reason


@pytest.mark.parametrize(
    ("told", "objects"),
    [
        pytest.param({}, False, id="nothing said"),
        pytest.param({"sketch_md5": MD5}, True, id="MD5"),
        pytest.param({"sketch_sha256": SHA256}, True, id="SHA-256"),
        pytest.param({"sketch_md5": "0" * 32, "sketch_sha256": SHA256}, True, id="one of two"),
        pytest.param({"sketch_md5": "0" * 32}, False, id="another image"),
        pytest.param({"sketch_md5": MD5[:-1]}, False, id="beginning of a digest"),
    ],
)
def test_same_image(told: dict[str, str], objects: bool) -> None:
    objection = same_image(report("0.1.0", **told), release("9.0.0", running=[MD5, SHA256]))
    if not objects:
        assert objection is None
        return
    assert objection is not None
    assert (objection.code, objection.deny, objection.final) == ("same-image", False, True)
    assert "9.0.0" in objection.reason


@pytest.mark.parametrize(
    ("told", "size", "flash_size", "objects"),
    [
        pytest.param({}, 10**9, 1 << 24, False, id="nothing said"),
        pytest.param({"free_space": 1000}, 1000, 0, False, id="just fits"),
        pytest.param({"free_space": 999}, 1000, 0, True, id="one byte too much"),
        pytest.param({"free_space": 0}, 1000, 0, True, id="no space at all"),
        pytest.param({"chip_size": 1 << 22}, 1000, 1 << 22, False, id="flash as built for"),
        pytest.param({"chip_size": 1 << 23}, 1000, 1 << 22, False, id="larger flash"),
        pytest.param({"chip_size": 1 << 20}, 1000, 1 << 22, True, id="smaller flash"),
        pytest.param({"chip_size": 1 << 20}, 1000, 0, False, id="nobody compares the flash"),
        pytest.param(
            {"free_space": 10**6, "chip_size": 1 << 20}, 1000, 1 << 22, True, id="space, no flash"
        ),
    ],
)
def test_enough_room(told: dict[str, int], size: int, flash_size: int, objects: bool) -> None:
    offered = release("1.1.0", size=size, flash_size=flash_size)
    objection = enough_room(report("1.0.0", **told), offered)
    if not objects:
        assert objection is None
        return
    assert objection is not None
    assert (objection.code, objection.deny, objection.final) == ("too-big", False, False)
    assert "1.1.0" in objection.reason


@pytest.mark.parametrize(
    ("device", "image", "objects"),
    [
        pytest.param(None, "esp8266", False, id="unknown device, esp8266"),
        pytest.param(None, "esp32", False, id="unknown device, esp32"),
        pytest.param("esp8266", "esp8266", False, id="esp8266"),
        pytest.param("esp8266", "esp32", True, id="esp32 image to an esp8266"),
        pytest.param("esp8266", "esp32c3", True, id="esp32c3 image to an esp8266"),
        pytest.param(ESP32_FAMILY, "esp8266", True, id="esp8266 image to an ESP32"),
        pytest.param(ESP32_FAMILY, "esp32", False, id="some ESP32"),
        pytest.param(ESP32_FAMILY, "esp32c3", False, id="some ESP32, which could be a C3"),
        pytest.param(ESP32_FAMILY, "esp32-id-77", False, id="some ESP32 of the future"),
        pytest.param("esp32c3", "esp32c3", False, id="known to be a C3"),
        pytest.param("esp32c3", "esp32", True, id="known to be a C3, gets no esp32"),
        pytest.param("esp32", "esp8266", True, id="known to be an esp32"),
        pytest.param(None, "", False, id="unknown device, for any chip"),
        pytest.param("esp8266", "", False, id="file system for any chip"),
        pytest.param(ESP32_FAMILY, "", False, id="file system for any chip, ESP32"),
        pytest.param(UNKNOWN_ESP, "", False, id="file system for any chip, which one ever"),
        pytest.param(UNKNOWN_ESP, "esp32", True, id="one of several chips"),
        pytest.param("esp8266", UNKNOWN_CHIP, True, id="no image to an esp8266"),
        pytest.param(ANY_ESP, "esp8266", False, id="either family: esp8266"),
        pytest.param(ANY_ESP, "esp32c3", False, id="either family: esp32c3"),
        pytest.param(ANY_ESP, UNKNOWN_CHIP, True, id="no image to ESPHome"),
        pytest.param(ESP32_FAMILY, UNKNOWN_CHIP, True, id="no image to an ESP32"),
        pytest.param(UNKNOWN_ESP, UNKNOWN_CHIP, True, id="no image to one of several"),
        pytest.param("esp32c3", UNKNOWN_CHIP, True, id="no image to a C3"),
        pytest.param("", UNKNOWN_CHIP, True, id="no image to who says an empty chip"),
        pytest.param("", "esp32", True, id="nothing to who says an empty chip"),
        pytest.param(None, UNKNOWN_CHIP, False, id="no image, by name, to a person"),
    ],
)
def test_right_chip(device: str | None, image: str, objects: bool) -> None:
    objection = right_chip(report("1.0.0", chip=device), release("1.1.0", image))
    if not objects:
        assert objection is None
        return
    assert objection is not None
    assert (objection.code, objection.deny, objection.final) == ("wrong-chip", True, False)
    assert image in objection.reason
    assert str(device) in objection.reason


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        pytest.param("sketch", {"sketch"}, id="sketch"),
        pytest.param("filesystem", set(FILESYSTEMS), id="any file system"),
        pytest.param("littlefs", {"littlefs"}, id="littlefs"),
        pytest.param("fatfs", {"fatfs"}, id="fatfs"),
        pytest.param("zip", {"zip"}, id="zip"),
    ],
)
@pytest.mark.parametrize("offered", ["sketch", *FILESYSTEMS, "zip"])
def test_right_kind(asked: str, taken: set[str], offered: str) -> None:
    objection = right_kind(report(kind=asked), release("1.0.0", kind=offered))
    assert (objection is None) == (offered in taken)
    if objection:
        assert (objection.code, objection.deny, objection.foreign) == ("wrong-kind", False, True)
        assert offered in objection.reason


@pytest.mark.parametrize(
    ("family", "mode", "taken"),
    [
        pytest.param("esp8266", "sketch", "sketch", id="ESP8266"),
        pytest.param("esp8266", "spiffs", "littlefs spiffs fatfs", id="ESP8266, its word for all"),
        pytest.param("esp32", "spiffs", "littlefs spiffs fatfs", id="ESP32, older cores"),
        pytest.param("esp32", "littlefs", "littlefs", id="ESP32, newer cores"),
        pytest.param("esp32", "fatfs", "fatfs", id="ESP32, newer cores"),
        pytest.param("esp32", "flashfs", "littlefs spiffs fatfs", id="ESP32, whatever is there"),
        pytest.param("esp32", "", "sketch", id="empty mode"),
    ],
)
def test_mode_of_the_request_decides_which_kinds_fit(family: str, mode: str, taken: str) -> None:
    headers = {f"x-{family}-version": "1.0.0", f"x-{family}-mode": mode}
    device = read_report("app", headers, ADDRESS)
    kinds = ("sketch", *FILESYSTEMS, "zip")
    fits = [kind for kind in kinds if not right_kind(device, release("2.0.0", "", kind=kind))]
    assert sorted(fits) == sorted(taken.split())


def test_mongoose_os_gets_nothing_but_its_zip() -> None:
    device = read_report("app", MONGOOSE, ADDRESS)
    kinds = ("sketch", *FILESYSTEMS, "zip")
    fits = [kind for kind in kinds if not right_kind(device, release("2.0.0", "", kind=kind))]
    assert fits == ["zip"]


@pytest.mark.parametrize("kind", [*FILESYSTEMS, "zip"])
def test_room_of_the_sketch_does_not_count_for_another_kind(kind: str) -> None:
    """A filesystem has a partition of its own, which the device compares: HTTPUpdate.cpp."""
    assert enough_room(report(free_space=1, chip_size=1), release("1.1.0", kind=kind)) is None


@pytest.mark.parametrize(
    ("version", "chip", "code"),
    [
        pytest.param("1.0.0", "esp8266", None, id="release"),
        pytest.param("1.0.0", "", None, id="release for any chip"),
        pytest.param(str(UNVERSIONED), "esp8266", "by-name-only", id="no version"),
        pytest.param("9.0.0", UNKNOWN_CHIP, "by-name-only", id="no image"),
    ],
)
def test_fit_unasked(version: str, chip: str, code: str | None) -> None:
    objection = fit_unasked(report("0.1.0"), release(version, chip))
    assert (objection and objection.code) == code
    if objection:
        assert (objection.deny, objection.final, objection.foreign) == (False, False, True)
        assert f"app-{version}.bin" in objection.reason


def test_objection_reads_as_code_and_sentence() -> None:
    assert str(Objection("too-big", "it is too big")) == "too-big: it is too big"


# -- 3. Choosing -----------------------------------------------------------------------------------

MIXED = (release("2.0.0", "esp32"), release("1.0.0"))
KINDS = (
    release("4.0.0", "esp32c3", kind="zip"),
    release("3.0.0", "", kind="littlefs"),
    release("2.0.0", "", kind="fatfs"),
    release("1.0.0"),
)


@pytest.mark.parametrize(
    ("device", "releases", "expected"),
    [
        pytest.param(
            report("1.0.0", chip="esp8266"),
            (release("1.10.0"), release("1.9.0"), release("1.0.0")),
            "1.10.0",
            id="newest of all",
        ),
        pytest.param(
            report("1.10.0", chip="esp8266"),
            (release("1.10.0"), release("1.9.0")),
            "not-newer",
            id="runs the newest",
        ),
        pytest.param(
            report("2.0.0", chip="esp8266"),
            (release("1.10.0"),),
            "not-newer",
            id="runs a newer one",
        ),
        pytest.param(report("0.9.0", chip="esp8266"), MIXED, "1.0.0", id="mixed, esp8266 goes up"),
        pytest.param(
            report("1.0.0", chip="esp8266"), MIXED, "not-newer", id="mixed, esp8266 stays"
        ),
        pytest.param(report("3.0.0", chip="esp8266"), MIXED, "not-newer", id="mixed, newer still"),
        pytest.param(report("1.0.0", chip=ESP32_FAMILY), MIXED, "2.0.0", id="mixed, ESP32 goes up"),
        pytest.param(
            report("2.0.0", chip=ESP32_FAMILY), MIXED, "not-newer", id="mixed, ESP32 stays"
        ),
        pytest.param(
            report("1.0.0", chip="esp8266"), (release("2.0.0", "esp32"),), "wrong-chip", id="wrong"
        ),
        pytest.param(
            report("1.0.0", chip="esp32c3"),
            (release("3.0.0", "esp32"), release("2.0.0", "esp32c3")),
            "2.0.0",
            id="another chip of the family",
        ),
        pytest.param(
            report("1.0.0", sketch_md5=MD5),
            (release("1.10.0", running=[MD5]), release("1.9.0")),
            "same-image",
            id="forgot to bump: not down to 1.9.0 either",
        ),
        pytest.param(
            report("1.0.0", sketch_md5=MD5),
            (release("1.10.0"), release("1.9.0", running=[MD5])),
            "1.10.0",
            id="forgot to bump the one before",
        ),
        pytest.param(
            report("1.0.0", free_space=1000),
            (release("3.0.0", size=3000), release("2.0.0", size=1000)),
            "2.0.0",
            id="a lower one fits",
        ),
        pytest.param(
            report("1.0.0", free_space=1000),
            (release("3.0.0", size=3000), release("1.0.0", size=1000)),
            "too-big",
            id="the one that fits is what runs",
        ),
        pytest.param(
            report("1.0.0", free_space=10),
            (release("3.0.0"), release("2.0.0")),
            "too-big",
            id="none fits",
        ),
        pytest.param(
            report("1.0.0", chip="esp8266", free_space=10),
            (release("3.0.0", "esp32"), release("2.0.0")),
            "too-big",
            id="too big says more than wrong chip",
        ),
        pytest.param(
            report("1.0.0", kind="filesystem"), (release("2.0.0"),), "wrong-kind", id="filesystem"
        ),
        pytest.param(report(), (release("1.0.0"),), "1.0.0", id="says nothing"),
        pytest.param(report("1.0.0", chip="esp8266"), KINDS, "not-newer", id="no sketch is newer"),
        pytest.param(report("0.9.0", chip="esp8266"), KINDS, "1.0.0", id="the sketch"),
        pytest.param(
            report("1.0.0", chip="esp8266", kind="filesystem"), KINDS, "3.0.0", id="some filesystem"
        ),
        pytest.param(
            report("1.0.0", chip=ESP32_FAMILY, kind="fatfs"), KINDS, "2.0.0", id="that filesystem"
        ),
        pytest.param(
            report("2.0.0", chip=ESP32_FAMILY, kind="fatfs"), KINDS, "not-newer", id="has it"
        ),
        pytest.param(
            report("1.0.0", chip="esp32c3", kind="zip"), KINDS, "4.0.0", id="zip for Mongoose OS"
        ),
        pytest.param(
            report("1.0.0", chip="esp32", kind="zip"), KINDS, "wrong-chip", id="zip, other chip"
        ),
        pytest.param(report("1.0.0", kind="spiffs"), KINDS, "wrong-kind", id="no such filesystem"),
        pytest.param(
            report(chip="esp8266"),
            (release("1.0.0", UNKNOWN_CHIP), release(str(UNVERSIONED))),
            "wrong-chip",
            id="nothing but files for people",
        ),
        pytest.param(
            report(), (release(str(UNVERSIONED)),), "by-name-only", id="no version, says nothing"
        ),
        pytest.param(
            report(),
            (release("9.0.0", UNKNOWN_CHIP), release("1.0.0")),
            "1.0.0",
            id="no image, says nothing",
        ),
        pytest.param(
            report("1.0.0"),
            (release("9.0.0", UNKNOWN_CHIP), release("1.0.0"), release(str(UNVERSIONED))),
            "not-newer",
            id="no image, up to date",
        ),
        pytest.param(
            report("0.0.0-0", chip="esp8266"),
            (release("0.0.1"), release(str(UNVERSIONED))),
            "0.0.1",
            id="the lowest of all",
        ),
        pytest.param(
            report("0.0.0-0", chip="esp8266"),
            (release(str(UNVERSIONED)),),
            "by-name-only",
            id="the lowest of all, no version",
        ),
    ],
)
def test_device_gets_the_newest_right_release_or_the_reason_that_says_most(
    device: Report, releases: Sequence[Release], expected: str
) -> None:
    assert said(choose(device, releases, STATELESS)) == expected


@pytest.mark.parametrize("rules", [STATELESS, STATELESS[::-1]], ids=["", "reversed"])
@pytest.mark.parametrize(
    "newer",
    [
        pytest.param(release("9.0.0", "", kind="littlefs"), id="file system"),
        pytest.param(release("9.0.0", "esp32", kind="zip"), id="zip"),
        pytest.param(release("9.0.0", "esp32"), id="other chip"),
        pytest.param(release("9.0.0", UNKNOWN_CHIP), id="no image"),
        pytest.param(release("9.0.0", "esp8266", kind="spiffs", packed=True), id="packed"),
    ],
)
def test_release_for_others_does_not_hide_why_a_device_stays(
    rules: Sequence[Rule], newer: Release, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ota")
    for version in ("1.0.0", "2.0.0"):
        device = report(version, chip="esp8266")
        outcome = choose(device, (newer, release("1.0.0")), rules)
        assert said(outcome) == "not-newer"
        log_decision(Event(device, outcome))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    small = report("0.9.0", chip="esp8266", free_space=1)
    assert said(choose(small, (newer, release("1.0.0")), rules)) == "too-big"


def test_release_for_other_chips_only_is_denied() -> None:
    outcome = choose(report("1.0.0", chip="esp8266"), MIXED[:1], STATELESS)
    assert isinstance(outcome, Objection)
    assert outcome.deny


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "3.0.0"])
def test_release_for_other_chips_only_is_denied_whatever_runs(version: str) -> None:
    outcome = choose(report(version, chip="esp8266"), MIXED[:1], STATELESS)
    assert said(outcome) == "wrong-chip"


def test_denial_of_the_image_that_runs_is_no_way_down_from_it() -> None:
    def withdrawn(_: Report, offered: Release) -> Objection | None:
        objection = Objection("withdrawn", "it was bad", deny=True)
        return objection if str(offered.version) == "2.0.0" else None

    releases = (release("2.0.0", running=[MD5]), release("1.5.0"))
    device = report("1.0.0", sketch_md5=MD5)  # forgot to bump
    assert said(choose(device, releases, STATELESS)) == "same-image"
    assert isinstance(choose(device, releases, (*STATELESS, withdrawn)), Objection)


def test_without_rules_the_first_release_is_chosen() -> None:
    assert said(choose(report("9.0.0"), MIXED, ())) == "2.0.0"


def test_final_denial_ends_the_search_and_says_most() -> None:
    def banned(_: Report, offered: Release) -> Objection | None:
        objection = Objection("banned", "not you", deny=True, final=True)
        return objection if str(offered.version) == "2.0.0" else None

    releases = (release("3.0.0", size=9999), release("2.0.0"), release("1.5.0"))
    device = report("1.0.0", free_space=1000)
    assert said(choose(device, releases, (*STATELESS, banned))) == "banned"


def test_rule_that_raises_is_not_swallowed() -> None:
    def broken(_: Report, __: Release) -> Objection | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        choose(report("1.0.0"), MIXED, (broken,))


def test_recognised_is_that_of_the_release_whose_digest_the_device_reports() -> None:
    releases = (
        release("3.0.0", "esp32", running=["0" * 64]),
        release("2.0.0", "esp32c3", running=[MD5, SHA256]),
    )
    some = report("2.0.0", chip=ESP32_FAMILY, sketch_sha256=SHA256)
    exact = recognised(some, releases, releases)
    assert exact.chip == "esp32c3"
    assert said(choose(exact, releases, STATELESS)) == "not-newer"
    assert said(choose(exact, releases[:1], SAFETY)) == "wrong-chip"


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(report("2.0.0", chip=ESP32_FAMILY), id="no digest"),
        pytest.param(
            report("2.0.0", chip=ESP32_FAMILY, sketch_sha256="1" * 64), id="of an unknown image"
        ),
        pytest.param(report("2.0.0", chip="esp8266", sketch_md5=MD5), id="ESP8266"),
    ],
)
def test_recognised_leaves_other_reports_alone(device: Report) -> None:
    releases = [release("2.0.0", "esp32c3", running=[SHA256])]
    assert recognised(device, releases, releases) == device


def test_zip_for_another_chip_makes_no_project_of_several_chips() -> None:
    releases = (release("2.0.0", "esp32c3", kind="zip"), release("1.1.0", "esp32"))
    device = report("1.0.0", chip=ESP32_FAMILY)
    exact = recognised(device, releases, releases)
    assert said(choose(exact, releases, STATELESS)) == "1.1.0"


# -- 4. Properties ---------------------------------------------------------------------------------

VERSIONS = st.sampled_from(
    ["0.9.0", "1.0.0", "1.9.0", "1.10.0", "2.0.0", "2.0.0-rc.1", str(UNVERSIONED)]
)
CHIPS = st.sampled_from(["esp8266", "esp32", "esp32c3", "", UNKNOWN_CHIP])
DIGESTS = st.sampled_from([MD5, SHA256, "0" * 32])
REPORTS = st.builds(
    report,
    st.one_of(st.just(""), VERSIONS),
    chip=st.one_of(st.none(), CHIPS, st.sampled_from([ESP32_FAMILY, ANY_ESP, UNKNOWN_ESP])),
    kind=st.sampled_from(["sketch", "sketch", "filesystem", "littlefs", "fatfs", "zip"]),
    free_space=st.one_of(st.none(), st.integers(0, 2000)),
    chip_size=st.one_of(st.none(), st.sampled_from([1 << 20, 1 << 22])),
    sketch_md5=st.one_of(st.none(), DIGESTS),
    sketch_sha256=st.one_of(st.none(), DIGESTS),
)
RELEASES = st.lists(
    st.builds(
        release,
        VERSIONS,
        CHIPS,
        size=st.integers(1, 2000),
        flash_size=st.sampled_from([0, 1 << 20, 1 << 22]),
        running=st.lists(DIGESTS, max_size=2),
        kind=st.sampled_from(["sketch", "sketch", *FILESYSTEMS, "zip"]),
        packed=st.booleans(),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: sorted(found, key=lambda each: each.version, reverse=True))
OBJECTIONS = st.builds(
    Objection,
    st.just("some"),
    st.just("reason"),
    deny=st.booleans(),
    final=st.booleans(),
    foreign=st.booleans(),
)


@st.composite
def random_rules(draw: st.DrawFn) -> Rule:
    """A rule that objects to some sizes, for no reason."""
    table = draw(st.lists(st.one_of(st.none(), OBJECTIONS), min_size=1, max_size=5))
    return lambda _, offered: table[offered.size % len(table)]


RULES = st.one_of(st.sampled_from(STATELESS), random_rules())


def rank(outcome: Release | Objection, releases: Sequence[Release]) -> int:
    """How far down the list a release was chosen; behind its end if none was."""
    if isinstance(outcome, Objection):
        return len(releases)
    return next(at for at, each in enumerate(releases) if each is outcome)


@settings(deadline=None, max_examples=300)
@given(REPORTS, RELEASES, st.lists(RULES, max_size=4), RULES, st.integers(0, 4))
def test_one_more_rule_only_takes_releases_away(
    device: Report, releases: Sequence[Release], rules: list[Rule], more: Rule, at: int
) -> None:
    before = choose(device, releases, rules)
    after = choose(device, releases, [*rules[:at], more, *rules[at:]])
    assert rank(after, releases) >= rank(before, releases)
    if isinstance(after, Release):
        assert more(device, after) is None


@settings(deadline=None)
@given(REPORTS, RELEASES, st.lists(RULES, min_size=2, max_size=4))
def test_order_of_rules_does_not_change_what_is_chosen(
    device: Report, releases: Sequence[Release], rules: list[Rule]
) -> None:
    ranks = {
        rank(choose(device, releases, order), releases) for order in itertools.permutations(rules)
    }
    assert len(ranks) == 1


@settings(deadline=None, max_examples=300)
@given(REPORTS, RELEASES)
def test_what_is_chosen_is_newer_fits_and_is_for_the_chip(
    device: Report, releases: Sequence[Release]
) -> None:
    outcome = choose(device, releases, STATELESS)
    if isinstance(outcome, Objection):
        return
    assert device.version is None or outcome.version > device.version
    fits = device.free_space is None or outcome.size <= device.free_space
    assert fits or outcome.kind != "sketch"
    assert (device.chip == "esp8266") <= (outcome.facts.chip in {"esp8266", ""})
    assert outcome.facts.chip != UNKNOWN_CHIP
    assert outcome.version != UNVERSIONED
    assert outcome.kind == device.kind or {"filesystem", outcome.kind} <= {
        device.kind,
        *FILESYSTEMS,
    }
    assert outcome.facts.running.isdisjoint({device.sketch_md5, device.sketch_sha256})


VALUES = (*ESP8266_HEADERS.values(), *MONGOOSE.values(), "14.1.0(minimal)", "1.0.0(", ")", "(")


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*ESP8266_HEADERS, *ESP32_HEADERS, *MONGOOSE})),
        st.one_of(st.text(max_size=20), st.sampled_from(sorted({*VALUES}))),
    ),
    st.one_of(st.text(max_size=20), st.sampled_from(["version=1.0.0", "ver=", "version=%"])),
)
def test_any_headers_are_a_report_or_a_400(headers: dict[str, str], query: str) -> None:
    status = 400
    try:
        read_report("app", headers, ADDRESS, query)
    except Refused as refused:
        status = refused.status
    assert status == 400
