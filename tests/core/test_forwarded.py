"""Behind a proxy: who it says that asks, and images that it sends itself."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ota_server
from ota_server import Request, Site, forwarded, parse_head
from tests.conftest import put, running
from tests.core.test_access import ask, site_with, text_of
from tests.core.test_systemd import dial_file
from tests.core.wire import PATIENT, request, standing
from tests.data.make_images import esp32_image

PROXIES = ota_server._networks("10.0.0.0/8, fd00::/8")
PROXY, OTHER = "10.0.0.1", "192.0.2.1"


def came(*fields: str, peer: str = PROXY, secure: bool = False) -> Request:
    """A request as it comes to us."""
    return parse_head(request("/lamp", *fields), peer, secure=secure)


# -- 1. Who asks ----------------------------------------------------------------------------------

WHO = [
    pytest.param(OTHER, ["X-Forwarded-For: 203.0.113.5"], OTHER, id="no-proxy-of-ours"),
    pytest.param("fd00::1", ["X-Forwarded-For: 203.0.113.5"], "203.0.113.5", id="v6-proxy"),
    pytest.param(PROXY, [], PROXY, id="says-nothing"),
    pytest.param(PROXY, ["X-Forwarded-For:"], PROXY, id="empty"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.5"], "203.0.113.5", id="one"),
    pytest.param(PROXY, ["x-forwarded-for:203.0.113.5 "], "203.0.113.5", id="any-case-and-blanks"),
    pytest.param(PROXY, ["X-Forwarded-For: 2001:db8::7"], "2001:db8::7", id="v6-client"),
    pytest.param(PROXY, ["X-Forwarded-For: 1.1.1.1, 203.0.113.5"], "203.0.113.5", id="forged"),
    pytest.param(
        PROXY, ["X-Forwarded-For: 10.0.0.9, 203.0.113.5"], "203.0.113.5", id="forged-as-our-proxy"
    ),
    pytest.param(
        PROXY, ["X-Forwarded-For: 203.0.113.5, 10.0.0.2"], "203.0.113.5", id="chain-of-two"
    ),
    pytest.param(
        PROXY, ["X-Forwarded-For: 203.0.113.5,10.0.0.3,fd00::2"], "203.0.113.5", id="chain-of-three"
    ),
    pytest.param(
        PROXY,
        ["X-Forwarded-For: 203.0.113.5, 198.51.100.1, 10.0.0.2"],
        "198.51.100.1",
        id="foreign-proxy-in-the-chain",
    ),
    pytest.param(
        PROXY,
        ["X-Forwarded-For: 203.0.113.5", "X-Forwarded-For: 198.51.100.1"],
        "198.51.100.1",
        id="two-fields",
    ),
    pytest.param(PROXY, ["X-Forwarded-For: 10.0.0.2, 10.0.0.3"], "10.0.0.2", id="all-ours"),
    pytest.param(PROXY, ["X-Forwarded-For: garbage"], PROXY, id="garbage"),
    pytest.param(PROXY, ["X-Forwarded-For: unknown"], PROXY, id="unknown"),
    pytest.param(PROXY, ["X-Forwarded-For: _hidden, 10.0.0.2"], "10.0.0.2", id="hidden-in-chain"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.5, garbage"], PROXY, id="garbage-behind"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.5, "], PROXY, id="nothing-behind"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.5:4711"], PROXY, id="with-port"),
    pytest.param(PROXY, ["X-Forwarded-For: [2001:db8::7]"], PROXY, id="in-brackets"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.0/24"], PROXY, id="a-network"),
    pytest.param(PROXY, ["X-Forwarded-For: 0x7f.1"], PROXY, id="odd-number"),
    pytest.param(PROXY, ["X-Forwarded-For: 1"], PROXY, id="bare-number"),
    pytest.param(PROXY, ["X-Forwarded-For: unix"], PROXY, id="unix"),
    pytest.param(PROXY, ["X-Forwarded-For: fe80::1%eth0"], PROXY, id="zone"),
    pytest.param(PROXY, ["X-Forwarded-For: fe80::1%\x9b31m a b"], PROXY, id="zone-for-the-log"),
    pytest.param(PROXY, ["X-Forwarded-For: 203.0.113.5, unix"], PROXY, id="unix-behind"),
    pytest.param(PROXY, ["Forwarded: for=203.0.113.5"], PROXY, id="the-other-field"),
    pytest.param(PROXY, ["X-Real-IP: 203.0.113.5"], PROXY, id="nginx-own-field"),
    pytest.param("unix", ["X-Forwarded-For: 203.0.113.5"], "203.0.113.5", id="unix-peer"),
    pytest.param("unix", ["X-Forwarded-For: 1.1.1.1, 10.0.0.2"], "1.1.1.1", id="unix-and-chain"),
    pytest.param("unix", [], "unix", id="unix-says-nothing"),
]


@pytest.mark.parametrize(("peer", "fields", "client"), WHO)
def test_who_asks_is_the_last_address_that_is_no_proxy_of_ours(
    peer: str, fields: Sequence[str], client: str
) -> None:
    assert forwarded(came(*fields, peer=peer), PROXIES).peer == client


def test_without_trusted_proxies_only_a_unix_socket_is_believed() -> None:
    said = ("X-Forwarded-For: 203.0.113.5", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil")
    asked = came(*said)
    assert forwarded(asked, ()) is asked
    local = forwarded(came(*said, peer="unix"), ())
    assert (local.peer, local.secure, local.headers["host"]) == ("203.0.113.5", True, "evil")


@pytest.mark.parametrize(
    ("fields", "secure", "found"),
    [
        pytest.param([], False, False, id="plain"),
        pytest.param([], True, True, id="tls-to-us"),
        pytest.param(["X-Forwarded-Proto: https"], False, True, id="https"),
        pytest.param(["X-Forwarded-Proto: HTTPS"], False, True, id="upper-case"),
        pytest.param(["X-Forwarded-Proto: http"], True, False, id="http-before-tls-to-us"),
        pytest.param(["X-Forwarded-Proto: https, http"], False, False, id="last-of-two"),
        pytest.param(["X-Forwarded-Proto: http, https"], False, True, id="last-of-two-too"),
        pytest.param(["X-Forwarded-Proto: http", "X-Forwarded-Proto: https"], False, True, id="2"),
        pytest.param(["X-Forwarded-Proto:"], True, True, id="empty"),
        pytest.param(["X-Forwarded-Proto: ftp"], False, False, id="other"),
        pytest.param(["X-Forwarded-Proto: httpsx"], False, False, id="longer"),
    ],
)
def test_proxy_tells_whether_it_was_https(
    fields: Sequence[str], *, secure: bool, found: bool
) -> None:
    assert forwarded(came(*fields, secure=secure), PROXIES).secure is found
    assert forwarded(came(*fields, peer=OTHER, secure=secure), PROXIES).secure is secure


@pytest.mark.parametrize(
    ("fields", "host"),
    [
        pytest.param([], "ota", id="says-nothing"),
        pytest.param(["X-Forwarded-Host: ota.example"], "ota.example", id="one"),
        pytest.param(["X-Forwarded-Host: ota.example:8443"], "ota.example:8443", id="with-port"),
        pytest.param(["X-Forwarded-Host: [2001:db8::1]:80"], "[2001:db8::1]:80", id="v6"),
        pytest.param(["X-Forwarded-Host: evil, ota.example"], "ota.example", id="last-of-two"),
        pytest.param(["X-Forwarded-Host: a", "X-Forwarded-Host: b"], "b", id="two-fields"),
        pytest.param(["X-Forwarded-Host:"], "ota", id="empty"),
        pytest.param(["X-Forwarded-Host: a/b"], "ota", id="with-path"),
        pytest.param(["X-Forwarded-Host: a b"], "ota", id="two-words"),
        pytest.param(["X-Forwarded-Host: a@b"], "ota", id="with-user"),
        pytest.param(['X-Forwarded-Host: a"><script>'], "ota", id="markup"),
    ],
)
def test_proxy_tells_which_host_was_asked(fields: Sequence[str], host: str) -> None:
    assert forwarded(came(*fields), PROXIES).headers["host"] == host
    assert forwarded(came(*fields, peer=OTHER), PROXIES).headers["host"] == "ota"


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.sampled_from(["10.0.0.2", "fd00::9", "203.0.113.5", "2001:db8::1", "x", ""])),
    st.sampled_from([PROXY, OTHER, "fd00::1", "::1"]),
)
def test_what_stands_before_a_foreign_address_never_counts(hops: list[str], peer: str) -> None:
    forged = ", ".join(["6.6.6.6", *hops])
    asked = came(f"X-Forwarded-For: {forged}, 203.0.113.5", peer=peer)
    assert forwarded(asked, PROXIES).peer == ("203.0.113.5" if peer in {PROXY, "fd00::1"} else peer)


def test_log_names_the_client_and_not_the_proxy(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    site = site_with(folder, trust_proxy=ota_server._networks("127.0.0.1"))
    with standing(site) as stand, stand.dial() as wire:
        said = ("X-Forwarded-For: 203.0.113.5", "x-ESP8266-version: 1.0.0")
        assert wire.ask("/firmware", *said).status == 200
        assert wire.ask("/none", *said).status == 404
    assert "- 203.0.113.5 firmware 1.0.0 -> 1.10.0" in caplog.messages
    assert any(line.startswith("- 203.0.113.5 was sent ") for line in caplog.messages)
    assert any(line.startswith("203.0.113.5 refused, 404") for line in caplog.messages)


def test_urls_in_manifests_are_those_of_the_proxy(folder: Path) -> None:
    site = site_with(folder, trust_proxy=PROXIES)
    said = ("X-Forwarded-Host: ota.example", "X-Forwarded-Proto: https")
    url = "/firmware/firmware-1.10.0.bin"
    for path in ("/", "/firmware/manifest.json", "/firmware/esp32fota.json"):
        believed, forged = (ask(site, path, *said, peer=peer) for peer in (PROXY, OTHER))
        if believed.status == 200:  # an esp32fota.json has nothing for an ESP8266
            assert f"https://ota.example{url}" in text_of(believed)
            assert f"http://ota{url}" in text_of(forged)
            assert "ota.example" not in text_of(forged)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no unix sockets")
def test_unix_socket_is_a_proxy_who_has_to_say_for_whom_it_asks(folder: Path) -> None:
    site = site_with(folder, allow=ota_server._networks("203.0.113.0/24"))
    check = "x-ESP8266-version: 1.0.0"
    with tempfile.TemporaryDirectory() as short:
        path = Path(short) / "socket"
        site = replace(site, config=replace(site.config, host=f"unix:{path}"))
        with running(site, limits=PATIENT), dial_file(path) as wire:
            assert wire.check().status == 403
            for unread in ("203.0.113.9:4711", "[2001:db8::1]:4711", "unknown", ""):
                assert wire.ask("/firmware", check, f"X-Forwarded-For: {unread}").status == 403
            assert wire.ask("/healthz").status == 200
            assert wire.ask("/firmware", check, "X-Forwarded-For: 203.0.113.9").status == 200
            assert wire.ask("/firmware", check, "X-Forwarded-For: 9.9.9.9").status == 403
            both = "X-Forwarded-For: 203.0.113.9, 9.9.9.9"
            assert wire.ask("/firmware", check, both).status == 403


# -- 2. Images that the proxy sends ---------------------------------------------------------------


@pytest.fixture
def odd(folder: Path, tmp_path: Path) -> Path:
    """The firmware folder with a folder in it, names that need coding, and a link."""
    put(folder / "lamp/lamp 1.0.0.bin", esp32_image("lamp", "1.0.0"))
    put(folder / "%/%41-1.0.0.bin", esp32_image("odd", "1.0.0"))
    put(folder / "q/a?b#c&d;e+f-1.0.0.bin", esp32_image("odd", "1.0.0", payload=b"1"))
    (folder / "linked-2.0.0.bin").symlink_to(folder / "lamp/lamp 1.0.0.bin")
    return folder


WHERE = [  # URL, path of the file below the folder
    pytest.param("/firmware/latest.bin", "firmware-1.10.0.bin", id="root"),
    pytest.param("/firmware-1.9.0.bin", "firmware-1.9.0.bin", id="by-name"),
    pytest.param("/lamp/latest.bin", "lamp/lamp%201.0.0.bin", id="folder-and-blank"),
    pytest.param("/%25/%2541-1.0.0.bin", "%25/%2541-1.0.0.bin", id="percent-in-names"),
    pytest.param("/q/latest", "q/a%3Fb%23c%26d%3Be%2Bf-1.0.0.bin", id="question-mark"),
    pytest.param("/linked/latest.bin", "lamp/lamp%201.0.0.bin", id="what-a-link-stands-for"),
    pytest.param("/firmware?version=1.0.0", "firmware-1.10.0.bin", id="update"),
]


def accelerated(folder: Path, accel: str, **settings: Any) -> Site:
    """A site whose images the proxy sends."""
    return site_with(folder, accel=accel, **settings)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("target", "path"), WHERE)
@pytest.mark.parametrize("accel", ["nginx:/_fw/", "nginx:/", "nginx:/a/b/", "apache"])
def test_proxy_gets_the_head_alone_and_where_the_bytes_are(
    accel: str, target: str, path: str, method: str, odd: Path
) -> None:
    reply = ask(accelerated(odd, accel), target, method=method)
    headers = dict(reply.headers)
    assert len(headers) == len(reply.headers)
    assert (reply.status, reply.body, headers["Content-Length"]) == (200, b"", "0")
    whole = dict(ask(site_with(odd), target).headers)
    if accel == "apache":  # whose module decodes nothing
        assert headers.pop("X-Sendfile") == f"{os.path.realpath(odd)}/{unquote(path)}"
    else:
        assert headers.pop("X-Accel-Redirect") == f"{accel.removeprefix('nginx:')}{path}"
    assert whole.pop("Accept-Ranges") == "bytes"  # the proxy says so
    assert (odd / unquote(path)).is_file()
    assert headers | {"Content-Length": ""} == whole | {"Content-Length": ""}
    assert {"x-MD5", "x-SHA256", "x-version", "ETag", "Content-Disposition"} <= headers.keys()
    assert "Content-Range" not in headers


@pytest.mark.parametrize("fields", [["Range: bytes=0-9"], ["Range: bytes=9-", 'If-Range: "x"']])
@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
def test_ranges_are_left_to_the_proxy(accel: str, fields: Sequence[str], odd: Path) -> None:
    site = accelerated(odd, accel)
    assert ask(site, "/firmware/latest.bin", *fields) == ask(site, "/firmware/latest.bin")
    late = ask(site, "/firmware/latest.bin", "Range: bytes=99999999-")
    assert late.status == 200  # the proxy says 416


@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        pytest.param("/firmware/latest.bin", ["If-None-Match: {etag}"], 304, id="same-etag"),
        pytest.param("/firmware/latest.bin", ["If-Modified-Since: {date}"], 304, id="same-date"),
        pytest.param("/firmware/latest.bin", ['If-Match: "x"'], 412, id="other-etag"),
        pytest.param("/firmware?version=1.10.0", [], 304, id="nothing-newer"),
        pytest.param("/lamp?version=0.1", ["x-ESP8266-version: 0.1"], 403, id="wrong-chip"),
        pytest.param("/firmware", [], 400, id="by-name-only"),
        pytest.param("/none/latest.bin", [], 404, id="nothing"),
        pytest.param("/firmware/versions", [], 200, id="versions"),
        pytest.param("/firmware/latest.bin.md5", [], 200, id="digest"),
        pytest.param("/firmware/manifest.json", [], 200, id="manifest"),
        pytest.param("/", [], 200, id="page"),
        pytest.param("/healthz", [], 200, id="health"),
    ],
)
@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
def test_everything_but_an_image_is_as_without_a_proxy(
    accel: str, target: str, fields: Sequence[str], status: int, odd: Path
) -> None:
    whole = dict(ask(site_with(odd), "/firmware/latest.bin").headers)
    said = [each.format(etag=whole["ETag"], date=whole["Last-Modified"]) for each in fields]
    reply = ask(accelerated(odd, accel), target, *said)
    assert reply == ask(site_with(odd), target, *said)
    assert reply.status == status
    assert not dict(reply.headers).keys() & {"X-Accel-Redirect", "X-Sendfile"}


@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
@pytest.mark.parametrize("name", ["\u00e4", 'a"b', "a\\b", "a\u2028b", "a\x01b"])
def test_what_no_field_can_name_is_sent_by_ourselves(name: str, accel: str, odd: Path) -> None:
    image = esp32_image("odd", "1.0.0", payload=b"2")
    put(odd / "plain" / f"{name}-1.0.0.bin", image)
    reply = ask(accelerated(odd, accel), "/plain/latest.bin")
    assert (reply.status, reply.body) == (200, image)
    assert not dict(reply.headers).keys() & {"X-Accel-Redirect", "X-Sendfile", "Set-Cookie"}
    assert all(text.isascii() and text.isprintable() for _, text in reply.headers)
    part = ask(accelerated(odd, accel), "/plain/latest.bin", "Range: bytes=1-3")
    assert (part.status, part.body) == (206, image[1:4])


@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
def test_who_may_not_ask_learns_no_path(accel: str, odd: Path) -> None:
    site = accelerated(odd, accel, allow=PROXIES)
    for method in ("GET", "HEAD", "OPTIONS"):
        reply = ask(site, "/firmware/latest.bin", method=method, peer=OTHER)
        assert reply.status in {403, 204}
        assert not dict(reply.headers).keys() & {"X-Accel-Redirect", "X-Sendfile"}


def test_file_that_has_gone_is_not_promised_to_the_proxy(odd: Path) -> None:
    site = accelerated(odd, "apache")
    (odd / "firmware-1.10.0.bin").unlink()
    assert ask(site, "/firmware/latest.bin").status == 503


def test_link_that_leaves_the_folder_is_promised_to_nobody(odd: Path, tmp_path: Path) -> None:
    outside = put(tmp_path / "outside/evil-1.0.0.bin", esp32_image("evil", "1.0.0"))
    (odd / "evil-1.0.0.bin").symlink_to(outside)
    (odd / "evil").symlink_to(outside.parent)
    site = accelerated(odd, "nginx:/_fw/")
    for target in ("/evil/latest.bin", "/evil-1.0.0.bin", "/evil/evil-1.0.0.bin"):
        assert ask(site, target).status == 404


def test_folder_that_is_a_link_itself_is_named_as_it_is(odd: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(odd)
    for folder in (link, Path(os.path.relpath(odd))):
        reply = ask(accelerated(folder, "nginx:/_fw/"), "/lamp/latest.bin")
        assert dict(reply.headers)["X-Accel-Redirect"] == "/_fw/lamp/lamp%201.0.0.bin"
        reply = ask(accelerated(folder, "apache"), "/lamp/latest.bin")
        path = dict(reply.headers)["X-Sendfile"]
        assert path == os.path.realpath(odd / "lamp/lamp 1.0.0.bin")


@pytest.mark.parametrize("accel", ["nginx:/_fw/", "apache"])
def test_head_for_the_proxy_goes_over_the_wire_and_the_connection_stays(
    accel: str, odd: Path
) -> None:
    with standing(accelerated(odd, accel)) as stand, stand.dial() as wire:
        for method in ("GET", "HEAD", "GET"):
            answer = wire.ask("/firmware/latest.bin", "Range: bytes=0-9", method=method)
            assert (answer.status, answer.body, answer.closes) == (200, b"", False)
            assert answer.headers["content-length"] == "0"
            assert answer.headers["content-type"] == "application/octet-stream"
