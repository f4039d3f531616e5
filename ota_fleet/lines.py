"""Lines to copy: how devices ask for a project, and how people and programs do. Pure.

What is foreign stands in URLs only, where it is quoted: a project's name can hold anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple
from urllib.parse import quote

_ARDUINO = """#include <{header}.h>
{client} client;
{library}.update(client, "{url}", "{version}");  // the version of this very sketch"""
_ESP_IDF = """esp_http_client_config_t http = {{ .url = "{url}/latest.bin" }};
esp_https_ota_config_t ota = {{ .http_config = &http }};
esp_err_t result = esp_https_ota(&ota);"""
_FOTA = """#include <esp32FOTA.hpp>
esp32FOTA fota("{project}", "{version}");  // the version of this very sketch
fota.setManifestURL("{url}/esp32fota.json");
if (fota.execHTTPcheck()) fota.execOTA();"""
_ESPHOME = """http_request:
ota:
  - platform: http_request
update:
  - platform: http_request
    name: Firmware
    source: {url}/manifest.json"""
_CURL = (
    ("Would a device get a newer one?", "curl -i -H 'x-ESP8266-version: 0.0.1' '{url}'"),
    ("Download the newest", "curl -OJ '{url}/latest.bin'"),
    ("Which versions are there?", "curl '{url}/versions'"),
    (
        "Publish, with a publisher's token",
        'curl -H "Authorization: Bearer $OTA_UPLOAD_TOKEN" '
        "-F file=@firmware.bin '{api}/releases'",
    ),
)
_OTHERS = (
    ("ESP-IDF", _ESP_IDF),
    ("ESPHome", _ESPHOME),
    ("esp32FOTA", _FOTA),
    ("Tasmota", "OtaUrl {url}.bin"),
    ("Mongoose OS", '["update.url", "{url}"]'),
)
_URLS = (
    ("Newest image", "{url}/latest.bin"),
    ("ESPHome, ESP Web Tools", "{url}/manifest.json"),
    ("esp32FOTA", "{url}/esp32fota.json"),
    ("Versions", "{url}/versions"),
)


class Lines(NamedTuple):
    """Something to copy."""

    title: str
    text: str


def of_sketch(base: str, project: str, version: str, *, small: bool) -> Lines:
    """For Arduino; `small`: for the ESP8266."""
    secure = base.startswith("https:")
    client = f"{'BearSSL::' * (secure and small)}WiFiClient{'Secure' * secure}"
    header, library = ("ESP8266httpUpdate", "ESPhttpUpdate") if small else ("HTTPUpdate",) * 2
    if not small:
        library = "httpUpdate"
    text = _ARDUINO.format(
        header=header, library=library, client=client, url=_url(base, project), version=version
    )
    return Lines(f"Arduino, {'ESP8266' if small else 'ESP32'}", text)


def of_sketches(base: str, project: str, version: str, chips: Collection[str]) -> Iterator[Lines]:
    """For Arduino on these chips; none: nobody knows yet which."""
    for small in (True, False):
        others = {*chips} - {"esp8266"} if not small else {*chips} & {"esp8266"}
        if others or not chips:
            yield of_sketch(base, project, version, small=small)


def of_project(base: str, project: str, version: str) -> dict[str, list[Lines]]:
    """By heading: other frameworks, URLs, commands; `version` is what a sketch may be."""
    known = {
        "url": _url(base, project),
        "api": f"{base}/api/v1/projects/{quote(project, safe='', errors='surrogateescape')}",
        "project": quote(project, safe=" ", errors="surrogateescape"),
        "version": version,
    }
    groups = {"Other frameworks": _OTHERS, "URLs": _URLS, "On the command line": _CURL}
    return {
        heading: [Lines(title, text.format(**known)) for title, text in rows]
        for heading, rows in groups.items()
    }


def of_image(base: str, project: str, name: str) -> list[Lines]:
    """How to get one image, and how to check it."""
    url = f"{_url(base, project)}/{quote(name, safe='', errors='surrogateescape')}"
    return [
        Lines("Download it", f"curl -OJ '{url}'"),
        Lines("Check what was downloaded", f"curl -s '{url}.sha256' | sha256sum -c -"),
    ]


def _url(base: str, project: str) -> str:
    return f"{base}/{quote(project, safe='', errors='surrogateescape')}"
