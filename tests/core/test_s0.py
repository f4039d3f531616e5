"""S0, the OTA Firmware Server: its commands, its folders and its URLs, with our script.

The commands are those of its README, with nothing but the script's name changed; what it says for
Windows (backslashes, `copy`) is said for a POSIX shell. They name fixed ports, so each runs in a
network namespace of its own. Where that is not possible (not as root, not on Linux), and only
there, the port in the command becomes 0.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import ota_server
from ota_server import DirectoryCatalog, Site
from tests.conftest import put
from tests.core.test_access import ask, bearer, refuses, text_of
from tests.core.wire import SCRIPT, Answer, Script, Wire, dial, launched, standing
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
)
from tests.devices import Esp32, Esp8266

FILE = "/firmware/projectA/firmware_v1.bin"
DUMMY = b"dummy firmware data\n"
QUICK_START = "python ota_server.py --no-certs --token mytoken --port 8070"
WITH_SSL = """python ota_server.py \\
    --cert certs/ca_cert.pem \\
    --key certs/ca_key.pem \\
    --token mytoken \\
    --host 0.0.0.0 \\
    --port 8070 \\
    --www-dir www \\
    --firmware-dir firmware \\
    --url-firmware firmware"""
BEHIND_APACHE = [
    "python ota_server.py --no-certs --token mytoken --port 8071",
    "python ota_server.py --no-certs --token mytoken --port 8072",
    "python ota_server.py --no-certs --token mytoken --port 8073",
]
FOLDERS = """\
mkdir -p www/firmware/projectA
echo "dummy firmware data" > www/firmware/projectA/firmware_v1.bin
cp my_favicon.ico www/favicon.ico
"""
OTHERS = {
    "lamp-1.0.0.littlefs.bin": littlefs_image(),
    "lamp-1.0.0.spiffs.bin": spiffs_image(),
    "lamp-1.0.0.zip": mongoose_zip("lamp", "1.0.0"),
}
ICON = b"\0\0\1\0 sixteen by sixteen"
CLONE_NEWNET = 0x40000000  # sched.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h


def has_namespaces() -> bool:
    """Whether a process here can have a network of its own that we may enter."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0


ALONE = has_namespaces()


def enter_network(pid: int) -> None:
    """Takes this thread into the network of a process, and switches its loopback on."""
    import fcntl  # noqa: PLC0415 - Windows has none

    with open(f"/proc/{pid}/ns/net", "rb") as network:
        assert ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


class Seed(Script):
    """The script as S0's reader starts it, perhaps in a network of its own."""

    @contextmanager
    def dial(self, *, receive_buffer: int = 0) -> Iterator[Wire]:
        """A connection to it, made by a thread in its network."""
        link = dial(self.port, self.ca, receive_buffer=receive_buffer)
        with ExitStack() as stack:
            with ThreadPoolExecutor(1) as thread:
                if ALONE:
                    thread.submit(enter_network, self.process.pid).result()
                wire = thread.submit(stack.enter_context, link).result()
            yield wire

    def ask(self, path: str, *fields: str, method: str = "GET") -> Answer:
        """The reply to one request on a connection of its own."""
        with self.dial() as wire:
            return wire.ask(path, *fields, method=method)


@contextmanager
def shell(directory: Path, command: str, ca: Path | None = None) -> Iterator[Seed]:
    """What a reader types in the folder, once it listens."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    if not (programs / "python").exists():
        (programs / "python").symlink_to(sys.executable)
    shutil.copy(SCRIPT, directory)
    before = ("unshare", "-n") if ALONE else ()
    text = command if ALONE else re.sub(r"--port [0-9]+", "--port 0", command)
    env = {"PATH": f"{programs}:{os.environ['PATH']}"}
    with launched(Seed, directory, [*before, "sh", "-c", f"exec {text}"], env, ca) as seed:
        yield seed


def lay_out(directory: Path, certificate: Path) -> Path:
    """The folder that S0's README describes, with what its later versions add."""
    (directory / "my_favicon.ico").write_bytes(ICON)
    subprocess.run(["sh", "-e", "-c", FOLDERS], cwd=directory, check=True)
    firmware = directory / "www/firmware"
    put(firmware / "projectA/firmware_v1.bin", (firmware / "projectA/firmware_v1.bin").read_bytes())
    put(firmware / "projectB/firmware_v1.bin", b"one")
    put(firmware / "projectB/firmware_v2.bin", b"two")
    put(firmware / "projectB/read me.zip", b"no image at all")
    for version in ("1.9.0", "1.10.0"):
        put(firmware / f"projectC/app-{version}.bin", esp8266_image("app", version))
        put(firmware / f"projectD/app-{version}.bin", esp32_image("app", version))
    put(firmware / "text/text-1.0.0.bin", b"no image, but a version")
    for name, image in OTHERS.items():
        put(firmware / "others" / name, image)
    put(directory / "www/secret-1.0.0.bin", esp8266_image("secret", "1.0.0"))
    put(directory / "www/secret.bin", b"not for you")
    key, begin, chain = certificate.read_text().partition("-----BEGIN CERTIFICATE")
    (directory / "certs").mkdir()
    (directory / "certs/ca_cert.pem").write_text(begin + chain)
    (directory / "certs/ca_key.pem").write_text(key)
    return directory


@pytest.fixture
def root(tmp_path: Path, certificate: Path) -> Path:
    """S0's folder."""
    return lay_out(tmp_path, certificate)


@pytest.fixture(scope="module", params=["quick-start", "with-ssl"])
def seed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: Path
) -> Iterator[Seed]:
    """A process that all tests ask which change nothing, by HTTP and by HTTPS."""
    secure = request.param == "with-ssl"
    root = lay_out(tmp_path_factory.mktemp("s0"), certificate)
    ca = root / "certs/ca_cert.pem" if secure else None
    with shell(root, WITH_SSL if secure else QUICK_START, ca) as started:
        files = [path for path in (root / "www/firmware").rglob("*") if path.is_file()]
        for path in files:  # which are checked one after the other
            started.wait_for(f"/{quote(path.relative_to(root / 'www').as_posix())}?token=mytoken")
        yield started


def site_of(root: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with S0's options, in its folder."""
    monkeypatch.chdir(root)
    config = ota_server.read_config([*options, "--host", "127.0.0.1", "--port", "0"], {})
    catalog = DirectoryCatalog(config.dir, any_file=bool(config.www_dir))
    assert catalog.scan()
    return ota_server.build_site(config, catalog)


# -- 1. The README's commands ---------------------------------------------------------------------


def test_command_of_the_readme_serves_its_file(seed: Seed) -> None:
    answer = seed.ask(f"{FILE}?token=mytoken")
    assert (answer.status, answer.body) == (200, DUMMY)
    assert answer.headers["content-length"] == str(len(DUMMY))
    assert seed.line.startswith(f"http{'s' * (seed.ca is not None)}://")
    if ALONE:
        assert seed.port == 8070


@pytest.mark.parametrize("command", BEHIND_APACHE)
def test_instance_behind_apache_starts_on_its_port(command: str, root: Path) -> None:
    with shell(root, command) as started:
        assert started.port == int(command[-4:]) or not ALONE
        assert started.wait_for(f"{FILE}?token=mytoken").body == DUMMY
        assert started.end(signal.SIGTERM) == 0
        assert "mytoken" not in started.log


@pytest.mark.parametrize("given", ["", "?token=mytoken", "?token=wrong"])
def test_with_no_token_none_is_used_even_if_it_is_supplied(
    given: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of(root, "--no-certs", "--no-token", "--token", "other", monkeypatch=monkeypatch)
    for fields in ((), (bearer("wrong"),)):
        assert ask(site, f"{FILE}{given}", *fields).body == DUMMY


def test_no_token_is_a_command_too(root: Path) -> None:
    with shell(root, "python ota_server.py --no-certs --no-token --port 8070") as started:
        assert started.wait_for(FILE).body == DUMMY


@pytest.mark.parametrize(
    ("command", "word"),
    [
        pytest.param("--no-certs --port 8070", "--no-token", id="without-token"),
        pytest.param("--token mytoken --www-dir www", "certs/ca_cert.pem", id="without-certs"),
        pytest.param("--no-certs --token t --www-dir none", "none/firmware", id="without-folder"),
        pytest.param("--no-certs --token t --firmware-dir x", "www/x", id="other-folder"),
    ],
)
def test_what_is_missing_is_said_in_one_line(command: str, word: str, root: Path) -> None:
    shutil.rmtree(root / "certs")
    shutil.copy(SCRIPT, root)
    argv = [sys.executable, "ota_server.py", *command.split()]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ota-server: [^\n]+\n", done.stderr)
    assert word in done.stderr


FLAGS: list[Any] = [
    pytest.param("--no-certs --no-token", {}, id="least"),
    pytest.param("--no-certs --token t", {"token": "t"}, id="token"),
    pytest.param("--no-certs --token-file f", {"token_file": "f"}, id="tokens"),
    pytest.param(
        "--no-token --www-dir /w",
        {
            "www_dir": "/w",
            "dir": "/w/firmware",
            "cert": "certs/ca_cert.pem",
            "key": "certs/ca_key.pem",
        },
        id="www-dir",
    ),
    pytest.param("--no-certs --no-token --firmware-dir fw", {"dir": "www/fw"}, id="firmware-dir"),
    pytest.param("--no-certs --no-token --url-firmware ota", {}, id="url-firmware"),
    pytest.param("--no-certs --no-token --port 80 --host ::1", {"port": 80, "host": "::1"}, id="a"),
    pytest.param("--no-certs --no-token --cert c --key k", {}, id="no-certs-wins"),
    pytest.param("--no-certs --no-token --token t --token-file f", {}, id="no-token-wins"),
    pytest.param("--no-token --cert c", {"cert": "c", "key": "certs/ca_key.pem"}, id="own-cert"),
    pytest.param("--no-certs --no-token --dir /fw", {"dir": "/fw"}, id="own-folder"),
]


@pytest.mark.parametrize(("command", "wanted"), FLAGS)
def test_flags_mean_what_they_meant(command: str, wanted: Mapping[str, Any]) -> None:
    config = ota_server.read_config(command.split(), {})
    plain = {"dir": "www/firmware", "port": 8070, "www_dir": "www", "host": ""}
    usual = dict.fromkeys(("cert", "key", "token", "token_file"), "")
    for name, value in {**plain, **usual, **wanted}.items():
        assert getattr(config, name) == value, name


def test_without_its_flags_nothing_of_it_holds() -> None:
    config = ota_server.read_config(["--token", "t", "--cert", "c"], {"HOME": "/h"})
    assert (config.port, config.www_dir, config.key) == (8000, "", "")


# -- 2. Its URLs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        pytest.param("", ["Authorization: Bearer mytoken"], 200, id="bearer"),
        pytest.param("?token=mytoken", [], 200, id="query"),
        pytest.param("?token=mytoken", ["Authorization: Bearer wrong"], 401, id="bearer-first"),
        pytest.param("?token=wrong", ["Authorization: Bearer mytoken"], 200, id="bearer-only"),
        pytest.param("", [], 401, id="none"),
        pytest.param("?token=wrong", [], 401, id="wrong"),
        pytest.param("?token=", [], 401, id="empty"),
    ],
)
def test_token_is_taken_by_bearer_and_by_query(
    target: str, fields: Sequence[str], status: int, seed: Seed
) -> None:
    for method in ("GET", "HEAD"):
        answer = seed.ask(f"{FILE}{target}", *fields, method=method)
        assert answer.status == status
        assert ("www-authenticate" in answer.headers) is (status == 401)


def test_wrong_token_comes_before_what_is_not_there(seed: Seed) -> None:
    for path in ("/firmware/none/x.bin", "/firmware/projectA/none.bin", "/none", "/"):
        assert seed.ask(f"{path}?token=wrong").status == 401
        assert seed.ask(path).status == 401
    assert seed.ask("/firmware/none/x.bin?token=mytoken").status == 404
    assert seed.ask("/firmware/projectA/none.bin?token=mytoken").status == 404


def test_head_and_conditions_and_ranges_are_understood(seed: Seed) -> None:
    target = f"{FILE}?token=mytoken"
    with seed.dial() as wire:
        head = wire.ask(target, method="HEAD")
        etag, date = head.headers["etag"], head.headers["last-modified"]
        assert (head.status, head.headers["content-length"]) == (200, str(len(DUMMY)))
        assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
        assert head.headers["accept-ranges"] == "bytes"
        assert wire.ask(target, f"If-None-Match: {etag}").status == 304
        assert wire.ask(target, f"If-Modified-Since: {date}").status == 304
        assert wire.ask(target, 'If-None-Match: "other"').status == 200
        assert wire.ask(target, "If-Modified-Since: Sat, 01 Jan 2000 00:00:00 GMT").status == 200
        assert wire.ask(target, 'If-Match: "other"').status == 412
        part = wire.ask(target, "Range: bytes=6-13")
        assert (part.status, part.body) == (206, b"firmware")
        assert part.headers["content-range"] == f"bytes 6-13/{len(DUMMY)}"
        assert wire.ask(target, "Range: bytes=-5").body == DUMMY[-5:]
        assert wire.ask(target, "Range: bytes=6-13", f"If-Range: {etag}").status == 206
        assert wire.ask(target, "Range: bytes=6-13", 'If-Range: "other"').body == DUMMY
        assert wire.ask(target, "Range: bytes=99-").status == 416


def test_every_file_of_a_project_is_had_by_its_name(seed: Seed) -> None:
    for name, body in (("firmware_v1.bin", b"one"), ("firmware_v2.bin", b"two")):
        answer = seed.ask(f"/firmware/projectB/{name}?token=mytoken")
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert seed.ask("/firmware/projectB/read%20me.zip?token=mytoken").body == b"no image at all"
    assert seed.ask("/projectB/firmware_v2.bin?token=mytoken").body == b"two"
    assert seed.ask("/a/b/projectB/firmware_v2.bin?token=mytoken").body == b"two"


def test_other_images_than_sketches_are_had_by_their_name(seed: Seed) -> None:
    for name, body in OTHERS.items():
        with seed.dial() as wire:
            for fields in ((), ("User-Agent: ESP32HTTPClient",)):
                answer = wire.ask(f"/firmware/others/{name}?token=mytoken", *fields)
                assert (answer.status, answer.body) == (200, body)
            digest = wire.ask(f"/firmware/others/{name}.sha256?token=mytoken")
            assert digest.body == f"{hashlib.sha256(body).hexdigest()}  {name}\n".encode()
            for mode in ("sketch", "fatfs"):
                said = ("x-ESP32-version: 0.1", f"x-ESP32-mode: {mode}")
                answer = wire.ask(f"/firmware/others/{name}?token=mytoken", *said)
                assert answer.headers["x-ota-reason"].startswith("wrong-")


def test_latest_and_versions_are_by_semantic_versions(seed: Seed) -> None:
    latest = seed.ask("/firmware/projectC/latest?token=mytoken")
    assert latest.headers["content-disposition"] == 'attachment; filename="app-1.10.0.bin"'
    assert latest.body == esp8266_image("app", "1.10.0")
    versions = seed.ask("/firmware/projectC/versions?token=mytoken")
    assert versions.body == b'{"count":2,"latest":"1.10.0","versions":["1.10.0","1.9.0"]}'
    none = seed.ask("/firmware/projectB/versions?token=mytoken")
    assert none.body == b'{"count":0,"latest":null,"versions":[]}'
    for path in ("latest", "versions"):
        assert seed.ask(f"/firmware/none/{path}?token=mytoken").status == 404
        assert seed.ask(f"/firmware/projectC/{path}").status == 401


@pytest.mark.parametrize(
    "path",
    [
        "/firmware/%2e%2e/secret.bin",
        "/firmware/%2e%2e/secret-1.0.0.bin",
        "/firmware/../secret-1.0.0.bin",
        "/firmware/projectA/%2e%2e/%2e%2e/secret-1.0.0.bin",
        "/firmware/%2e%2e%2fsecret-1.0.0.bin",
        "/firmware/projectA/..%2f..%2fsecret.bin",
        "/firmware/projectA/..%5c..%5csecret.bin",
        "/firmware/%252e%252e/secret-1.0.0.bin",
        "/firmware/%2e%2e/%2e%2e/ota_server.py",
        "/firmware/%2e%2e/favicon.ico",
        "/firmware/projectA//../../secret-1.0.0.bin",
        "/%2e%2e/certs/ca_key.pem",
        "/certs/ca_key.pem",
        "/etc/passwd",
        "//etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_folder(path: str, seed: Seed) -> None:
    assert seed.ask(path).status == 401
    answer = seed.ask(f"{path}?token=mytoken")
    assert answer.status == 404
    assert b"PRIVATE KEY" not in answer.body


def test_favicon_is_the_readers_own_and_needs_no_token(seed: Seed) -> None:
    answer = seed.ask("/favicon.ico")
    assert (answer.status, answer.body) == (200, ICON)
    assert answer.headers["content-type"] == "image/x-icon"
    assert seed.ask("/favicon.ico", method="HEAD").headers["content-length"] == str(len(ICON))


def test_without_favicon_there_is_one_of_ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "www/favicon.ico").unlink()
    site = site_of(root, "--no-certs", "--no-token", monkeypatch=monkeypatch)
    reply = ask(site, "/favicon.ico")
    assert (reply.status, dict(reply.headers)["Content-Type"]) == (200, "image/svg+xml")


def test_silent_client_freezes_nobody(seed: Seed) -> None:
    with seed.dial() as idle, seed.dial() as wire:
        idle.send(b"GET ")
        assert wire.ask(f"{FILE}?token=mytoken").status == 200


def test_token_stands_in_no_line_of_the_log(seed: Seed) -> None:
    seed.ask(f"{FILE}?token=mytoken")
    seed.ask(f"/none?token=mytoken{'x' * 20}")
    seed.ask(f"{FILE}?token=wrong", "Authorization: Bearer mytoken")
    assert "mytoken" not in seed.log


# -- 3. One token for each project ----------------------------------------------------------------


def test_each_project_has_its_token_and_the_file_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "tokens.json").write_text('{"projectA": "a", "projectB": "b"}')
    site = site_of(root, "--no-certs", "--token-file", "tokens.json", monkeypatch=monkeypatch)
    other = "/firmware/projectB/firmware_v1.bin"
    assert ask(site, f"{FILE}?token=a").body == DUMMY
    assert ask(site, other, bearer("b")).body == b"one"
    for target in (other, "/firmware/projectB/versions", "/firmware/projectB/latest"):
        assert refuses(ask(site, f"{target}?token=a"))
    assert refuses(ask(site, f"{FILE}?token=b"))
    assert refuses(ask(site, "/firmware/projectC/latest?token=a"))
    (root / "tokens.json").write_text('{"projectA": "newer", "projectB": "b"}')
    assert refuses(ask(site, f"{FILE}?token=a"))
    assert ask(site, f"{FILE}?token=newer").body == DUMMY


def test_instances_behind_a_balancer_say_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [site_of(root, "--no-certs", "--no-token", monkeypatch=monkeypatch) for _ in range(3)]
    for target in (FILE, "/firmware/projectC/latest", "/firmware/projectC/versions"):
        first, *others = [ask(site, target) for site in sites]
        assert others == [first, first]


# -- 4. What is no image goes to no device --------------------------------------------------------

DEVICES = [
    pytest.param(["x-ESP8266-version: 1.0.0"], id="ESPhttpUpdate"),
    pytest.param(["x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56"], id="ESPhttpUpdate-without-version"),
    pytest.param(["User-Agent: ESP8266-http-Update"], id="ESP8266-after-a-redirect"),
    pytest.param(["x-ESP32-version: 1.0.0"], id="HTTPUpdate"),
    pytest.param(["User-Agent: ESP32-http-Update"], id="ESP32-after-a-redirect"),
    pytest.param(["User-Agent: ESP32 HTTP Client/1.0"], id="esp_https_ota"),
    pytest.param(["X-MGOS-FW-Version: esp32 1.0 x"], id="Mongoose-OS"),
]
PATHS = (
    FILE, "/firmware/projectB/read%20me.zip", "/firmware/text/latest", "/firmware/text.bin",
    "/firmware/text/text-1.0.0.bin", "/firmware/text/latest.bin", "/firmware/text",
)  # fmt: skip


@pytest.mark.parametrize("fields", DEVICES)
def test_device_never_gets_what_is_no_image(
    fields: Sequence[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of(root, "--no-certs", "--no-token", monkeypatch=monkeypatch)
    for path in PATHS:
        for target in (path, f"{path}?version=0.1"):
            for method in ("GET", "HEAD"):
                reply = ask(site, target, *fields, method=method)
                assert reply.status in {400, 403, 304}, target
                assert reply.status == 403 or "image" not in text_of(reply)
    listed = text_of(ask(site, "/_catalog", *fields))
    assert "text" not in listed
    assert "firmware_v1" not in listed


def test_manifests_name_no_build_of_what_is_no_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of(root, "--no-certs", "--no-token", monkeypatch=monkeypatch)
    reply = ask(site, "/firmware/text/manifest.json")
    assert reply.status in {200, 404}
    assert "chipFamily" not in text_of(reply)
    assert ask(site, "/firmware/text/esp32fota.json").status == 404
    assert "text" not in text_of(ask(site, "/esp32fota.json"))
    assert "projectD" in text_of(ask(site, "/esp32fota.json"))


def test_name_of_a_file_makes_no_second_line_in_the_log(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    put(root / "www/firmware/odd/a\n5C:CF:7F:12:34:56 is a liar.bin", b"no image")
    site = site_of(root, "--no-certs", "--no-token", monkeypatch=monkeypatch)
    for target in ("/odd/latest", "/odd?version=0.1", "/odd/manifest.json", "/odd"):
        assert ask(site, target).status in {304, 400, 404}
    assert "is a liar" in caplog.text
    assert not any("\n" in line for line in caplog.messages)


def test_page_lists_every_file_by_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(root, "--no-certs", "--token", "t", monkeypatch=monkeypatch)
    page = text_of(ask(site, "/?token=t"))
    for name in ("firmware_v1.bin", "read me.zip"):
        assert f">{name}</a>" in page
    link = re.findall(r'href="http://ota(/projectA/[^"]+)"', page)[0]
    assert ask(site, link).body == DUMMY


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_device_gets_a_real_image_by_name_and_as_the_latest(
    *, secure: bool, root: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = root / "certs/ca_cert.pem" if secure else None
    site = site_of(root, "--no-certs", "--token", "mytoken", monkeypatch=monkeypatch)
    where: dict[str, Any] = {"host": "127.0.0.1", "tls_ca": ca}
    with standing(site, certificate if secure else None) as stand:
        for path in ("projectC/app-1.10.0.bin", "projectC/latest", "projectC"):
            device = Esp8266(image=esp8266_image("app", "1.9.0"), port=stand.port, **where)
            device.path = f"/firmware/{path}?token=mytoken"
            assert device.update() == "HTTP_UPDATE_OK"
            assert device.version == "1.10.0"
            device.path = f"/firmware/{path.replace('projectC', 'projectD')}?token=mytoken"
            assert device.update() != "HTTP_UPDATE_OK"  # the image of another chip
        other = Esp32(image=esp32_image("app", "1.9.0"), port=stand.port, **where)
        other.path = "/firmware/projectD/latest?token=mytoken"
        assert (other.update(), other.version) == ("HTTP_UPDATE_OK", "1.10.0")
        other.path = f"{FILE}?token=mytoken"
        assert (other.update(), other.last_status) == ("HTTP_UPDATE_FAILED", 403)
