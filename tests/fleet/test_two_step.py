"""S4, the FUOTA server: its device, the commands of its README, and its own bugs, each a row."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ota_server
from ota_fleet.accounts import Accounts
from ota_fleet.files import UNNAMED_SECONDS, Store
from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_fleet.two_step import Credentials
from ota_server import Image, Refused, Reply, Site, answer, parse_head, refusal, unnamed_file
from tests.clients import Esp32Fuota
from tests.conftest import wait_until
from tests.core.test_access import basic, bearer, text_of
from tests.core.test_faults import shell
from tests.core.wire import PATIENCE, Script, request, standing
from tests.data.make_images import esp32_image
from tests.fleet.test_fleet import close, fleet, registry_of, remembering, with_fleet
from tests.fleet.test_registry import by_hand, opened

USER, PASSWORD = "sesame", "öpen:sesame"
ENV = {"US_AUTH_USERNAME": USER, "US_AUTH_PASSWORD": PASSWORD, "PYTHONUTF8": "1"}
ASK = basic(USER, PASSWORD)
OLD, NEW = esp32_image("sensor", "1.0.0"), esp32_image("sensor", "1.1.0")
DEVICE = "24:6F:28:AA:BB:CC"


def line(*fields: str) -> bytes:
    """A line of CSV as the README writes it."""
    return ",".join(f'"{each}"' for each in fields).encode()


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    """A site that speaks S4."""
    with remembering(folder, us_username=USER, us_password=PASSWORD) as site:
        yield site


def ask(
    site: Site, method: str, target: str, body: bytes = b"", *fields: str, who: str = ASK
) -> Reply:
    """The reply to a request, without sockets; what the image holds stands in its body."""
    length = () if method in {"GET", "HEAD", "DELETE"} else (f"Content-Length: {len(body)}",)
    given = (who,) if who else ()
    try:
        head = parse_head(request(target, *given, *length, *fields, method=method), "192.0.2.9")
    except Refused as refused:
        return refusal(refused)
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.seek(0)
        reply = answer(site, head._replace(body=file) if length else head)
    if not isinstance(reply.body, Image):
        return reply
    with reply.body.file as image:
        image.seek(reply.part.start)
        return reply._replace(body=image.read(len(reply.part)))


def stored(site: Site) -> list[str]:
    """What lies in the folder of files."""
    return sorted(os.listdir(Path(site.config.state) / "files"))


def plan(site: Site, device: str = DEVICE, version: str = "1.0.0", path: str = "new.bin") -> None:
    """Uploads the new image and plans it for a device."""
    assert ask(site, "PUT", f"/files/{quote(path)}", NEW).status == 200
    row = ask(site, "PUT", f"/devices/{quote(device)}", line(device, version, path))
    assert (row.status, row.body) == (200, b"")


def digest(data: bytes) -> str:
    """As files are called."""
    return hashlib.sha256(data).hexdigest()


# -- 1. The device --------------------------------------------------------------------------------


@pytest.fixture
def served(folder: Path, certificate: Path) -> Iterator[Script]:
    """The real script with TLS, as S4 always is."""
    with fleet(folder, env=ENV, ca=certificate) as script:
        yield script
        assert "Traceback" not in script.log
        assert not re.search(f"{PASSWORD}|{ASK.rpartition(' ')[2]}|(?i:authorization)", script.log)


def put(script: Script, path: str, body: bytes) -> int:
    """The status of an upload."""
    with script.dial() as wire:
        length = f"Content-Length: {len(body)}"
        wire.send(request(path, ASK, length, method="PUT") + body)
        return wire.reply().status


def fuota(script: Script, **options: Any) -> Esp32Fuota:
    """The device, with an old image."""
    usual: dict[str, Any] = {
        "image": OLD, "device": DEVICE, "app_ver": "1.0.0", "tls_ca": script.ca,
        "user": f"{USER}:{PASSWORD}",
    }  # fmt: skip
    return Esp32Fuota(url=f"https://127.0.0.1:{script.port}", **usual | options)


def test_device_is_updated_once(served: Script) -> None:
    device = fuota(served)
    assert device.update() == "OTA_NO_UPDATE"  # 404: nobody knows it
    assert put(served, "/files/new.bin", NEW) == 200
    assert put(served, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", "new.bin")) == 200
    assert (device.update(), device.image) == ("OTA_UPDATED", NEW)
    device.app_ver = "1.1.0"
    assert device.update() == "OTA_NO_UPDATE"  # 204
    wait_until(lambda: f"{DEVICE} 127.0.0.1 - 1.0.0 -> new.bin" in served.log)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        pytest.param({"user": "sesame:wrong"}, "OTA_PARAM_ERR", id="wrong-password"),
        pytest.param({"user": ""}, "OTA_PARAM_ERR", id="no-credentials"),
        pytest.param({"app_ver": ""}, "OTA_PARAM_ERR", id="no-version"),
        pytest.param({"device": "other"}, "OTA_NO_UPDATE", id="unknown"),
        pytest.param({"app_ver": "1.0"}, "OTA_NO_UPDATE", id="other-text"),
        pytest.param({"tls_ca": None}, "OTA_CONN_ERR", id="no-certificate"),
        pytest.param({"chip": "esp32c3"}, "OTA_CONN_ERR", id="wrong-chip"),
    ],
)
def test_device_that_cannot_be_updated_runs_on(
    options: dict[str, Any], status: str, served: Script
) -> None:
    put(served, "/files/new.bin", NEW)
    put(served, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", "new.bin"))
    device = fuota(served, **options)
    assert (device.update(), device.image) == (status, OLD)


def test_longest_path_that_a_device_can_hold_works(served: Script) -> None:
    path = "p" * 251 + ".bin"
    put(served, f"/files/{path}", NEW)
    put(served, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", path))
    assert fuota(served).update() == "OTA_UPDATED"


# -- 2. The commands of the README, verbatim ------------------------------------------------------

CHECK = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request GET \\
       'https://<server_fqdn>:<server_port>/devices/<device_id>?app_ver=<app_version>'"""
FETCH = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request GET \\
       --output <local_update_file_path> \\
       'https://<server_fqdn>:<server_port>/files/<update_file_path>'"""
LIST = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request GET \\
       'https://<server_fqdn>:<server_port>/devices'"""
UPLOAD = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request PUT --data-binary @<local_update_file_path> \\
       --header "Content-Type: application/octet-stream" \\
       'https://<server_fqdn>:<server_port>/files/<update_file_path>'"""
PLAN = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request PUT --data '"<device_id>","<app_version>","<update_file_path>"' \\
       --header "Content-Type: text/csv" \\
       'https://<server_fqdn>:<server_port>/devices/<device_id>'"""
CANCEL = """curl -u <username>:<password> --cacert <ca_cert_pem_file_path> \\
       --verbose --request DELETE \\
       --header "Content-Type: text/csv" \\
       'https://<server_fqdn>:<server_port>/devices/<device_id>'"""


@dataclass(frozen=True, slots=True)
class Shell:
    """Somebody who types what the README says."""

    script: Script
    directory: Path

    def type(self, command: str, **words: str) -> tuple[int, str]:
        """The status that curl showed, and what it printed."""
        usual = {
            "username": USER, "password": PASSWORD, "ca_cert_pem_file_path": str(self.script.ca),
            "server_fqdn": "127.0.0.1", "server_port": str(self.script.port),
            "device_id": DEVICE, "app_version": "1.0.0", "update_file_path": "new.bin",
            "local_update_file_path": "local.bin",
        }  # fmt: skip
        for name, word in (usual | words).items():
            command = command.replace(f"<{name}>", word)
        done = subprocess.run(
            ["sh", "-c", command],
            capture_output=True,
            text=True,
            check=True,
            cwd=self.directory,
            timeout=PATIENCE,
        )
        return int(re.findall(r"^< HTTP/1\.1 (\d+)", done.stderr, re.MULTILINE)[-1]), done.stdout


@pytest.fixture
def typing(served: Script, tmp_path: Path) -> Shell:
    """A shell, in a folder with a file to upload."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "local.bin").write_bytes(NEW)
    return Shell(served, tmp_path)


def test_commands_of_the_readme_work(typing: Shell, tmp_path: Path) -> None:
    row = f'"{DEVICE}","1.0.0","new.bin"\n'
    assert typing.type(LIST) == (200, "")
    assert typing.type(CHECK) == (404, "unknown-device: no update was ever planned for it\n")
    assert typing.type(UPLOAD) == (200, "")
    assert typing.type(PLAN) == (200, "")
    assert typing.type(LIST) == (200, row)
    assert typing.type(CHECK) == (200, "new.bin")
    assert typing.type(CHECK, app_version="1.1.0") == (204, "")
    assert typing.type(FETCH, local_update_file_path="fetched.bin") == (200, "")
    assert (tmp_path / "fetched.bin").read_bytes() == NEW
    assert typing.type(PLAN, app_version="1.1.0") == (200, "")
    assert typing.type(LIST) == (200, row.replace("1.0.0", "1.1.0"))
    assert typing.type(CANCEL) == (200, "")
    assert typing.type(CANCEL)[0] == 404
    assert typing.type(LIST) == (200, "")


@pytest.mark.parametrize("command", [CHECK, FETCH, LIST, UPLOAD, PLAN, CANCEL])
@pytest.mark.parametrize("words", [{"password": "wrong"}, {"username": "other"}])
def test_command_with_wrong_credentials_is_403(
    command: str, words: dict[str, str], typing: Shell
) -> None:
    assert typing.type(command.replace("--output", "--etag-save"), **words)[0] == 403


def test_large_file_is_uploaded_by_curl_with_expect(typing: Shell, tmp_path: Path) -> None:
    data = hashlib.shake_128(b"large").digest(8 << 20)
    (tmp_path / "local.bin").write_bytes(data)
    assert typing.type(UPLOAD) == (200, "")
    assert typing.type(FETCH, local_update_file_path="fetched.bin")[0] == 200
    assert (tmp_path / "fetched.bin").read_bytes() == data


# -- 3. The contract, row by row ------------------------------------------------------------------

GET, PUT, DELETE = "GET", "PUT", "DELETE"
GOOD = line("dev", "2.0", "a.bin")


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1.0.0", b"", 200, id="update"),
        pytest.param(GET, f"/devices/{DEVICE}/?app_ver=1.0.0", b"", 200, id="slash"),
        pytest.param(GET, f"/devices/{DEVICE}?x=1&app_ver=1.0.0", b"", 200, id="other-parameter"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1%2E0.0", b"", 200, id="coded-version"),
        pytest.param(GET, f"/devices/{quote(DEVICE)}?app_ver=1.0.0", b"", 200, id="coded-id"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=v1.0.0", b"", 204, id="text-not-version"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1.0.0+1", b"", 204, id="build"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1.0", b"", 204, id="shorter"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=0.9.0", b"", 204, id="older"),
        pytest.param(GET, f"/devices/{DEVICE.lower()}?app_ver=1.0.0", b"", 404, id="case"),
        pytest.param(GET, "/devices/gone?app_ver=1.0.0", b"", 404, id="file-gone"),
        pytest.param(GET, "/devices/gone?app_ver=1.1.0", b"", 204, id="file-gone-not-wanted"),
        pytest.param(GET, f"/devices/{DEVICE}", b"", 400, id="no-version"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=", b"", 400, id="empty-version"),
        pytest.param(GET, f"/devices/{DEVICE}?ver=1.0.0", b"", 400, id="other-word"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1&app_ver=2", b"", 400, id="two-versions"),
        pytest.param(GET, f"/devices/{DEVICE}?app_ver=1%0A2", b"", 400, id="line-feed"),
        pytest.param(GET, f"/devices/{DEVICE}/x?app_ver=1.0.0", b"", 400, id="two-segments"),
        pytest.param(GET, f"/devices/{'x' * 255}?app_ver=1", b"", 404, id="id-255"),
        pytest.param(GET, f"/devices/{'x' * 256}?app_ver=1", b"", 400, id="id-256"),
        pytest.param(GET, f"/devices/x?app_ver={'1' * 256}", b"", 400, id="version-256"),
        pytest.param(GET, "/devices/%FF?app_ver=1", b"", 400, id="id-no-utf-8"),
        pytest.param(GET, "/devices/%C3%A9?app_ver=1", b"", 404, id="id-utf-8"),
        pytest.param(GET, "/devices/x%22?app_ver=1", b"", 400, id="id-quote"),
        pytest.param(GET, "/devices", b"", 200, id="list"),
        pytest.param(GET, "/devices/", b"", 200, id="list-slash"),
        pytest.param("HEAD", f"/devices/{DEVICE}?app_ver=1.0.0", b"", 200, id="head"),
        pytest.param(PUT, "/devices", GOOD, 400, id="put-no-id"),
        pytest.param(PUT, "/devices/dev", GOOD, 200, id="put"),
        pytest.param(PUT, "/devices/dev", GOOD + b"\r\n", 200, id="put-crlf"),
        pytest.param(PUT, "/devices/dev", GOOD + b"\n\n", 200, id="put-empty-lines"),
        pytest.param(PUT, "/devices/dev", b"dev,2.0,a.bin", 200, id="put-without-quotes"),
        pytest.param(PUT, "/devices/dev", line("dev", "", ""), 200, id="put-nothing-planned"),
        pytest.param(PUT, "/devices/dev", line("dev", "1,0", "a,b.bin"), 200, id="put-commas"),
        pytest.param(PUT, "/devices/dev", line("other", "2.0", "a.bin"), 400, id="put-other-id"),
        pytest.param(PUT, "/devices/dev", GOOD + b"\n" + GOOD, 400, id="put-two-lines"),
        pytest.param(PUT, "/devices/dev", b"", 400, id="put-nothing"),
        pytest.param(PUT, "/devices/dev", line("dev", "2.0"), 400, id="put-two-fields"),
        pytest.param(PUT, "/devices/dev", line("dev", "2", "a", "b"), 400, id="put-four-fields"),
        pytest.param(PUT, "/devices/dev", b'"dev","2.0","a.bin', 400, id="put-open-quote"),
        pytest.param(PUT, "/devices/dev", b'"dev","2.0","a""b"', 400, id="put-quote-in-path"),
        pytest.param(PUT, "/devices/dev", b'"dev","2\n0","a"', 400, id="put-line-feed"),
        pytest.param(PUT, "/devices/dev", b'"dev","2\x000","a"', 400, id="put-nul"),
        pytest.param(PUT, "/devices/dev", b'"dev","2","\xff"', 400, id="put-no-utf-8"),
        pytest.param(PUT, "/devices/dev", line("dev", "2", "p" * 255), 200, id="put-path-255"),
        pytest.param(PUT, "/devices/dev", line("dev", "2", "p" * 256), 400, id="put-path-256"),
        pytest.param(DELETE, f"/devices/{DEVICE}", b"", 200, id="delete"),
        pytest.param(DELETE, "/devices/none", b"", 404, id="delete-unknown"),
        pytest.param(DELETE, "/devices", b"", 400, id="delete-all"),
        pytest.param(DELETE, "/files/new.bin", b"", 405, id="delete-file"),
        pytest.param("POST", "/devices/dev", GOOD, 405, id="post"),
        pytest.param(GET, "/files/new.bin", b"", 200, id="file"),
        pytest.param("HEAD", "/files/new.bin", b"", 200, id="file-head"),
        pytest.param(GET, "/files/none.bin", b"", 404, id="no-file"),
        pytest.param(GET, "/files", b"", 400, id="no-path"),
        pytest.param(GET, "/files/", b"", 400, id="empty-path"),
        pytest.param(PUT, "/files/", NEW, 400, id="upload-no-path"),
        pytest.param(PUT, "/files/a.bin", NEW, 200, id="upload"),
        pytest.param(PUT, "/files/a/b/c.bin", NEW, 200, id="upload-folders"),
        pytest.param(PUT, "/files/any", b"any bytes", 200, id="upload-any-bytes"),
        pytest.param(PUT, "/files/a.bin", b"", 400, id="upload-empty"),
        pytest.param(PUT, "/files/a%22.bin", NEW, 400, id="upload-quote"),
        pytest.param(PUT, f"/files/{'p' * 256}", NEW, 400, id="upload-path-256"),
        pytest.param(PUT, "/files/%FF", NEW, 400, id="upload-no-utf-8"),
    ],
)
def test_status_is_what_the_contract_says(
    method: str, target: str, body: bytes, status: int, site: Site
) -> None:
    plan(site)
    ask(site, PUT, "/devices/gone", line("gone", "1.0.0", "never.bin"))
    reply = ask(site, method, target, body)
    assert reply.status == status
    if method != "HEAD" and status < 300:
        assert ("Content-Length", str(len(reply.body))) in reply.headers or status == 204  # type: ignore[arg-type]
    if "app_ver=" in target or status >= 400:  # every answer to a check says why
        assert dict(reply.headers)["X-OTA-Reason"]


@pytest.mark.parametrize("method", [GET, "HEAD", PUT, DELETE, "POST"])
@pytest.mark.parametrize("target", ["/devices", "/devices/x?app_ver=1", "/files/a", "/files"])
@pytest.mark.parametrize(
    "who",
    ["", basic(USER, "wrong"), basic("other", PASSWORD), basic(USER, ""), bearer(PASSWORD),
     "Authorization: Basic", "Authorization: Basic !!!", "Authorization: Digest username=sesame"],
)  # fmt: skip
def test_without_the_credentials_everything_is_403(
    method: str, target: str, who: str, site: Site
) -> None:
    assert ask(site, method, target, GOOD, who=who).status == 403


def test_other_paths_need_no_credentials_of_these(site: Site) -> None:
    assert ask(site, GET, "/firmware/latest.bin", who="").status == 200
    assert ask(site, GET, "/healthz", who="").status == 200


def test_token_and_credentials_each_open_their_own(folder: Path) -> None:
    both = {"token": "tok", "us_username": USER, "us_password": PASSWORD}
    with remembering(folder, **both) as site:
        assert ask(site, GET, "/devices").status == 200
        assert ask(site, GET, "/devices", who=bearer("tok")).status == 403
        assert ask(site, GET, "/firmware/latest.bin", who=bearer("tok")).status == 200
        assert ask(site, GET, "/firmware/latest.bin").status == 401


def test_credentials_open_nothing_to_who_may_not_ask(folder: Path) -> None:
    nets = ota_server.read_config(["--allow", "10.0.0.0/8"], {}).allow
    with remembering(folder, allow=nets, us_username=USER, us_password=PASSWORD) as site:
        reply = ask(site, GET, "/devices")
        assert (reply.status, "192.0.2.9 is in none of" in text_of(reply)) == (403, True)


@pytest.mark.parametrize("name", ["US_AUTH_USERNAME", "US_AUTH_PASSWORD"])
def test_half_a_pair_of_credentials_starts_nothing(name: str, folder: Path) -> None:
    directory = folder.parent
    command: list[str | Path] = [sys.executable, with_fleet(directory)]
    command += ["--dir", folder, "--state", directory / "s"]
    done = subprocess.run(
        command, check=False, env={name: "x"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "US_AUTH_USERNAME and US_AUTH_PASSWORD: set both, or none" in done.stderr
    assert not (directory / "s").exists()


def entries(site: Site) -> list[tuple[str, str, str]]:
    """The audit."""
    with registry_of(site) as registry:
        ledger = Ledger(registry)
        assert ledger.verify_audit()
        return [(each.who, each.action, each.what) for each in ledger.audit_log()]


def test_change_stands_in_the_audit_under_the_name_of_who_made_it(site: Site) -> None:
    plan(site)
    assert ask(site, "DELETE", "/devices/nobody").status == 404
    assert ask(site, PUT, f"/devices/{DEVICE}", b"x").status == 400
    assert ask(site, "DELETE", f"/devices/{DEVICE}").status == 200
    pair, file = "US_AUTH_USERNAME", f"new.bin {digest(NEW)}"
    assert entries(site)[-3:] == [
        (pair, "put file", file),
        (pair, "plan update", f"{DEVICE} from 1.0.0 to new.bin"),
        (pair, "cancel update", DEVICE),
    ]
    accounts = next(each for each in site.guards if isinstance(each, Credentials)).accounts
    token = accounts.mint("CI", "publisher", "", who="test")[1]
    assert ask(site, PUT, "/files/a", NEW, who=bearer(token)).status == 200
    assert entries(site)[-1] == ("token 1 (CI)", "put file", f"a {digest(NEW)}")


def test_change_that_cannot_be_entered_is_not_made(site: Site) -> None:
    plan(site)
    row = ask(site, GET, "/devices").body
    with by_hand(Path(site.config.state) / "fleet.db") as connection:
        connection.execute(
            "CREATE TRIGGER shut BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'shut'); END"
        )
    assert ask(site, PUT, "/files/a", OLD).status == 500
    assert ask(site, PUT, f"/devices/{DEVICE}", line(DEVICE, "2.0.0", "new.bin")).status == 500
    assert ask(site, "DELETE", f"/devices/{DEVICE}").status == 500
    assert ask(site, GET, "/devices").body == row
    assert ask(site, GET, "/files/a").status == 404
    assert stored(site) == [digest(NEW)]


def test_without_a_pair_nobody_has_it(folder: Path) -> None:
    with remembering(folder) as site:
        empty = basic("", "")
        for who in ("", empty, ASK, "Authorization: Basic", "Authorization: Basic Og=="):
            assert ask(site, GET, "/devices", who=who).status == 403
            assert ask(site, PUT, "/files/a", NEW, who=who).status == 403


@pytest.fixture
def keys(folder: Path) -> Iterator[tuple[Site, dict[str, str]]]:
    """A site without a shared pair, with a planned update and a token of each sort."""
    with remembering(folder) as site:
        guard = next(each for each in site.guards if isinstance(each, Credentials))
        accounts = guard.accounts
        sorts = {
            "viewer": ("viewer", "", ""), "publisher": ("publisher", "", ""),
            "publisher-of-one": ("publisher", "lamp", ""), "admin": ("admin", "", ""),
            "any-device": ("device", "", ""), "its": ("device", "", DEVICE.replace(":", "")),
            "others": ("device", "", "24:6F:28:AA:BB:CD"), "project": ("device", "sensor", ""),
            "other-project": ("device", "lamp", ""), "its-and-project": ("device", "lamp", DEVICE),
        }  # fmt: skip
        minted = {name: accounts.mint(name, *sort, who="ada")[1] for name, sort in sorts.items()}
        with registry_of(site) as other:
            other.admit("sensor", DEVICE)
            other.admit("lamp", "24:6F:28:AA:BB:CD")
            wait_until(lambda: bool(guard.admitted("lamp")))
        key = bearer(minted["publisher"])
        assert ask(site, PUT, "/files/new.bin", NEW, who=key).status == 200
        planned = line(DEVICE, "1.0.0", "new.bin")
        assert ask(site, PUT, f"/devices/{DEVICE}", planned, who=key).status == 200
        yield site, minted


ALL = frozenset(("list", "device", "file", "upload", "plan", "cancel"))
ITS = frozenset(("device", "file"))
NONE = frozenset[str]()
OPENED = {
    "viewer": NONE, "publisher": ALL, "publisher-of-one": NONE, "admin": ALL,
    "any-device": ITS, "its": ITS, "its-and-project": ITS, "project": ITS,
    "others": frozenset(("file",)), "other-project": frozenset(("file",)),
}  # fmt: skip


@pytest.mark.parametrize("how", [bearer, lambda token: basic("any", token)])
@pytest.mark.parametrize("name", OPENED)
def test_token_opens_what_is_its(
    name: str, how: Callable[[str], str], keys: tuple[Site, dict[str, str]]
) -> None:
    site, minted = keys
    asked = {
        "list": (GET, "/devices", b""), "device": (GET, f"/devices/{DEVICE}?app_ver=1.0.0", b""),
        "file": (GET, "/files/new.bin", b""), "upload": (PUT, "/files/new.bin", OLD),
        "plan": (PUT, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", "old.bin")),
        "cancel": (DELETE, f"/devices/{DEVICE}", b""),
    }  # fmt: skip
    got = {each: ask(site, *words, who=how(minted[name])).status for each, words in asked.items()}
    assert got == {each: 200 if each in OPENED[name] else 403 for each in asked}
    assert ask(site, "HEAD", "/files/new.bin", who=how(minted[name])).status == got["file"]


def test_device_with_a_token_of_its_own_is_updated(folder: Path, certificate: Path) -> None:
    with fleet(folder, env=ENV, ca=certificate) as script:
        assert put(script, "/files/new.bin", NEW) == 200
        assert put(script, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", "new.bin")) == 200
        with opened(folder.parent / "state" / "fleet.db") as other:
            accounts = Accounts(Ledger(other), secure=False)
            number, token = accounts.mint("door", "device", "", DEVICE, who="ada")
            device = fuota(script, user=f"door:{token}")
            wait_until(lambda: device.update() == "OTA_UPDATED")
            assert device.image == NEW
            accounts.revoke(number, who="ada")
            wait_until(lambda: device.update() == "OTA_PARAM_ERR")
        assert token not in script.log


def test_list_is_csv_with_every_row_on_a_line(site: Site) -> None:
    for device in ("b", "a", "ä,c"):
        ask(site, PUT, f"/devices/{quote(device)}", line(device, "1.0", "x.bin"))
    reply = ask(site, GET, "/devices")
    assert text_of(reply) == '"a","1.0","x.bin"\n"b","1.0","x.bin"\n"ä,c","1.0","x.bin"\n'
    assert ("Content-Type", "text/csv") in reply.headers


def test_path_is_answered_as_it_was_given(site: Site) -> None:
    plan(site, path="a folder/ö.bin")
    reply = ask(site, GET, f"/devices/{DEVICE}?app_ver=1.0.0")
    assert (reply.status, text_of(reply)) == (200, "a folder/ö.bin")
    assert ("Content-Type", "text/csv") in reply.headers


def test_path_in_the_table_may_be_as_in_a_url(site: Site) -> None:
    plan(site, path="a b.bin")
    ask(site, PUT, f"/devices/{DEVICE}", line(DEVICE, "1.0.0", "a%20b.bin"))
    reply = ask(site, GET, f"/devices/{DEVICE}?app_ver=1.0.0")
    assert (reply.status, text_of(reply)) == (200, "a%20b.bin")
    assert ask(site, GET, f"/files/{text_of(reply)}").body == NEW


def test_file_is_sent_like_an_image(site: Site) -> None:
    plan(site)
    reply = ask(site, GET, "/files/new.bin")
    fields = dict(reply.headers)
    assert (reply.body, fields["Content-Length"]) == (NEW, str(len(NEW)))
    assert (fields["x-SHA256"], fields["Content-Type"]) == (digest(NEW), "application/octet-stream")
    assert "x-version" not in fields
    part = ask(site, GET, "/files/new.bin", b"", "Range: bytes=5-9")
    assert (part.status, part.body) == (206, NEW[5:10])
    assert ask(site, GET, "/files/new.bin", b"", f"If-None-Match: {fields['ETag']}").status == 304
    assert ask(site, GET, "/files/new.bin", b"", "Range: bytes=99999999-").status == 416


def test_file_that_is_replaced_is_the_new_one_and_the_old_bytes_go(site: Site) -> None:
    plan(site)
    assert ask(site, PUT, "/files/new.bin", OLD).status == 200
    assert ask(site, GET, "/files/new.bin").body == OLD
    assert stored(site) == [digest(OLD)]


@pytest.mark.parametrize(
    ("promise", "status"),
    [
        (f"x-MD5: {hashlib.md5(NEW, usedforsecurity=False).hexdigest()}", 200),
        (f"x-SHA256: {digest(NEW)}", 200),
        (f"x-MD5: {'0' * 32}", 422),
        (f"x-SHA256: {digest(OLD)}", 422),
        (f"Repr-Digest: sha-256=:{b64encode(bytes(32)).decode()}:", 422),
        ("x-MD5: 0", 400),
    ],
)
def test_upload_is_what_was_promised_or_leaves_nothing(
    promise: str, status: int, site: Site
) -> None:
    assert ask(site, PUT, "/files/a.bin", OLD).status == 200
    assert ask(site, PUT, "/files/a.bin", NEW, promise).status == status
    assert stored(site) == [digest(NEW if status == 200 else OLD)]
    assert ask(site, GET, "/files/a.bin").body == (NEW if status == 200 else OLD)


def test_same_bytes_are_stored_once_until_the_last_path_lets_go(site: Site) -> None:
    for path in ("a.bin", "b.bin", "a.bin"):
        assert ask(site, PUT, f"/files/{path}", NEW).status == 200
    assert stored(site) == [digest(NEW)]
    ask(site, PUT, "/files/a.bin", OLD)
    assert ask(site, GET, "/files/b.bin").body == NEW
    ask(site, PUT, "/files/b.bin", OLD)
    assert stored(site) == [digest(OLD)]


@settings(max_examples=30, deadline=None)
@given(path=st.text(min_size=1, max_size=60), data=st.binary(min_size=1, max_size=4000))
def test_what_was_uploaded_comes_back_or_is_400(path: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name) / "firmware").mkdir()
        with remembering(folder, us_username=USER, us_password=PASSWORD) as site:
            target = f"/files/{quote(path, safe='', errors='replace')}"
            status = ask(site, PUT, target, data).status
            again = ask(site, GET, target)
            assert (status, again.status) in {(200, 200), (400, 400)}
            assert again.status == 400 or again.body == data
            assert len(stored(site)) == (status == 200)


# -- 4. Its bugs ----------------------------------------------------------------------------------

EVIL = [
    'x"or"1"="1', "x' or '1'='1", "x; DROP TABLE device_app", "x%' --", "*", "%", "_", "dev\\",
    "../../etc/passwd", "..", ".", "fleet.db", "devices.db", "x\0y", "x\ny", "é" * 10, "🦆",
    "null", "1", "{0}", "%s", "-rf", "CON", "a" * 255, "é" * 128, "\u202eexe",
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_text_of_a_request_is_only_ever_data(evil: str, site: Site) -> None:
    plan(site)
    coded = quote(evil, safe="")
    if coded.strip("."):
        assert ask(site, DELETE, f"/devices/{coded}").status in {400, 404}
    assert ask(site, GET, f"/files/{coded}").status in {400, 404}
    assert ask(site, GET, f"/devices/{coded}?app_ver=1").status in {400, 404}
    assert text_of(ask(site, GET, "/devices")) == f'"{DEVICE}","1.0.0","new.bin"\n'
    before = stored(site)
    ask(site, PUT, f"/files/{coded}", NEW)
    ask(site, PUT, f"/devices/{coded}", line(evil, "1", evil))
    assert stored(site) == before
    assert sorted(os.listdir(site.config.state)) == [
        "files", "fleet.db", "fleet.db-shm", "fleet.db-wal"
    ]  # fmt: skip
    assert ask(site, GET, "/files/new.bin").body == NEW


@pytest.mark.parametrize(
    "path",
    ["devices.db", "fleet.db", "../fleet.db", "%2e%2e/fleet.db", "..%2Ffleet.db", "fleet.db-wal",
     digest(NEW), f"../files/{digest(NEW)}", "/etc/passwd", "%2Fetc%2Fpasswd", ".", "..", "./"],
)  # fmt: skip
def test_nothing_but_what_was_uploaded_can_be_fetched(path: str, site: Site) -> None:
    plan(site)
    assert ask(site, GET, f"/files/{path}").status == 404


def test_credentials_are_in_no_log_and_no_database(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        plan(site)
        for who in (ASK, basic(USER, "wrong-one"), ""):
            ask(site, GET, f"/devices/{DEVICE}?app_ver=1.0.0", who=who)
    for word in (PASSWORD, ASK.rpartition(" ")[2], "wrong-one", "Basic c2"):
        assert word not in caplog.text
        for path in Path(site.config.state).glob("fleet.db*"):
            assert word.encode() not in path.read_bytes()


def test_device_is_remembered_by_its_own_id(site: Site) -> None:
    plan(site, device="lamp-7")
    ask(site, GET, "/devices/lamp-7?app_ver=1.0.0", b"", "User-Agent: ESP32 HTTP Client/1.0")
    ask(site, GET, "/devices/stranger?app_ver=build-42")
    close(site)
    with registry_of(site) as registry:
        known, stranger = registry.device("lamp-7"), registry.device("stranger")
    assert known is not None
    assert stranger is not None
    assert (known.version, known.downloads, known.address) == ("1.0.0", 1, "192.0.2.9")
    assert (stranger.version, stranger.downloads) == ("build-42", 0)


def test_empty_and_split_uploads_do_not_hang(served: Script) -> None:
    with served.dial() as wire:
        wire.send(request("/files/a.bin", ASK, "Content-Length: 0", method="PUT"))
        assert wire.reply().status == 400
        wire.send(request("/files/a.bin", ASK, f"Content-Length: {len(NEW)}", method="PUT"))
        for start in range(0, len(NEW), 700):
            wire.send(NEW[start : start + 700])
        assert wire.reply().status == 200
        wire.send(request("/files/a.bin", ASK, method="PUT"))
        assert wire.reply().status == 411


def test_memory_stays_where_it_was_while_200_mb_come_in(folder: Path) -> None:
    piece, count = bytes(range(256)) * 4096, 200
    with fleet(folder, "--max-image", "256", env=ENV) as script, script.dial() as wire:
        status = Path(f"/proc/{script.process.pid}/status")
        if not status.exists():
            pytest.skip("looks at Linux' /proc")
        assert put(script, "/files/first.bin", NEW) == 200
        before = peak(status)
        length = f"Content-Length: {len(piece) * count}"
        wire.send(request("/files/big.bin", ASK, length, method="PUT"))
        for _ in range(count):
            wire.send(piece)
        wire.link.settimeout(60)
        assert wire.reply().status == 200
        assert peak(status) - before < 6 * 1024
        wire.send(request("/files/big.bin", ASK, "Range: bytes=-3"))
        assert wire.reply().body == piece[-3:]


def peak(status: Path) -> int:
    """The most memory that a process has had, KB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1])


# -- 5. Crashes and full disks --------------------------------------------------------------------


def test_upload_above_the_limit_is_413(folder: Path) -> None:
    with fleet(folder, "--max-image", "1", env=ENV) as script:
        assert put(script, "/files/a.bin", bytes(1 << 20)) == 200
        assert put(script, "/files/a.bin", bytes((1 << 20) + 1)) == 413


def test_who_has_no_credentials_is_told_before_the_body(served: Script) -> None:
    with served.dial() as wire:
        fields = ("Content-Length: 100000", "Expect: 100-continue")
        wire.send(request("/files/a.bin", *fields, method="PUT"))
        assert wire.reply().status == 403


def test_full_disk_is_507_and_nothing_is_lost(folder: Path) -> None:
    with fleet(folder, env=ENV, before=shell("ulimit -f 4000")) as script:  # 2 MB
        assert put(script, "/files/a.bin", NEW) == 200
        assert put(script, "/files/a.bin", bytes(4 << 20)) == 507
        with script.dial() as wire:
            assert wire.ask("/files/a.bin", ASK).body == NEW
        assert put(script, "/files/a.bin", OLD) == 200
    assert os.listdir(folder.parent / "state" / "files") == [digest(OLD)]


def test_disk_that_is_full_takes_neither_files_nor_rows_but_still_gives(
    folder: Path, small_disk: Path
) -> None:
    inside = Path(shutil.move(folder, small_disk / "firmware"))
    with remembering(inside, us_username=USER, us_password=PASSWORD) as site:
        assert ask(site, PUT, "/files/big.bin", bytes(1 << 20)).status == 507
        plan(site)
        before = stored(site)
        with suppress(OSError), (small_disk / "junk").open("wb", buffering=0) as junk:
            while True:
                junk.write(bytes(512))
        row = line("x" * 200, "y" * 200, "z" * 200)
        turns = (ask(site, PUT, f"/devices/{'x' * 200}", row).status for _ in range(2000))
        assert next(status for status in turns if status != 200) == 507
        assert ask(site, PUT, "/files/a.bin", OLD).status == 507
        assert ask(site, GET, "/files/new.bin").body == NEW
        assert ask(site, GET, f"/devices/{DEVICE}?app_ver=1.0.0").status == 200
        assert stored(site) == before
        (small_disk / "junk").unlink()
        assert ask(site, PUT, "/files/a.bin", OLD).status == 200


def test_killed_upload_leaves_nothing_and_acknowledged_ones_stay(folder: Path) -> None:
    kept: dict[str, bytes] = {}
    files = folder.parent / "state" / "files"
    for turn in range(6):
        with fleet(folder, env=ENV) as script:
            for path, data in kept.items():
                with script.dial() as wire:
                    assert wire.ask(f"/files/{path}", ASK).body == data
            assert set(os.listdir(files)) == set(map(digest, kept.values()))
            path, data = f"{turn}.bin", hashlib.shake_128(bytes([turn])).digest(300_000)
            assert put(script, f"/files/{path}", data) == 200
            kept[path] = data
            with script.dial() as wire:
                head = request("/files/0.bin", ASK, "Content-Length: 300000", method="PUT")
                wire.send(head + bytes(turn * 60_000))
                if turn == 5:
                    wire.reply()
                    kept["0.bin"] = bytes(300_000)
                script.process.kill()
                script.process.wait(PATIENCE)


def test_leftovers_of_a_crash_are_swept(site: Site, folder: Path) -> None:
    plan(site)
    files = Path(site.config.state) / "files"
    for name in (digest(OLD), f"{digest(OLD)}.part", "README"):
        (files / name).write_bytes(OLD)
    (files / "lost+found").mkdir()
    close(site)
    with remembering(folder, us_username=USER, us_password=PASSWORD) as again:
        left = ["README", digest(NEW), "lost+found", f"{digest(OLD)}.unnamed"]
        assert stored(again) == sorted(left)
        assert ask(again, GET, "/files/new.bin").body == NEW


def test_what_a_restored_backup_does_not_name_stays_for_a_month(
    site: Site, folder: Path, lines: Callable[[str], list[str]]
) -> None:
    state = Path(site.config.state)
    files, late = state / "files", f"{digest(NEW)}.unnamed"
    ask(site, PUT, "/files/old.bin", OLD)
    close(site)
    shutil.copy(state / "fleet.db", state / "backup")
    with remembering(folder, us_username=USER, us_password=PASSWORD) as later:
        plan(later)
    os.utime(files / digest(NEW), (0, 0))  # it came long ago
    shutil.copy(state / "fleet.db", state / "newer")
    for database, kept in (("backup", late), ("backup", late), ("newer", digest(NEW))):
        shutil.copy(state / database, state / "fleet.db")
        with remembering(folder, us_username=USER, us_password=PASSWORD) as again:
            assert stored(again) == sorted([digest(OLD), kept])
            assert ask(again, GET, "/files/new.bin").status == (404 if kept == late else 200)
    assert len(lines(f"nothing needs {files / digest(NEW)}: it is removed after 30 days")) == 1
    shutil.copy(state / "backup", state / "fleet.db")
    with remembering(folder, us_username=USER, us_password=PASSWORD):
        pass
    month_ago = time.time() - UNNAMED_SECONDS - 9
    os.utime(files / late, (month_ago, month_ago))
    with remembering(folder, us_username=USER, us_password=PASSWORD) as again:
        assert stored(again) == [digest(OLD)]


def test_new_database_does_not_sweep_old_files(site: Site, folder: Path) -> None:
    plan(site)
    close(site)
    for path in Path(site.config.state).glob("fleet.db*"):
        path.unlink()
    with remembering(folder, us_username=USER, us_password=PASSWORD) as again:
        assert stored(again) == [digest(NEW)]
        assert ask(again, GET, "/files/new.bin").status == 404
        assert ask(again, PUT, "/files/new.bin", NEW).status == 200


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_file_that_is_harmed_is_404_and_the_next_upload_heals_it(harm: str, site: Site) -> None:
    plan(site)
    path = Path(site.config.state) / "files" / digest(NEW)
    path.unlink()
    if harm == "cut":
        path.write_bytes(NEW[:-1])
    assert ask(site, GET, "/files/new.bin").status == 404
    assert ask(site, GET, f"/devices/{DEVICE}?app_ver=1.0.0").status == 404
    assert ask(site, PUT, "/files/new.bin", NEW).status == 200
    assert ask(site, GET, "/files/new.bin").body == NEW
    path.unlink()
    assert ask(site, PUT, "/files/new.bin", OLD).status == 200


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of its own."""
    with closing(Registry(tmp_path / "fleet.db")) as registry:
        yield registry


def holds(store: Store, path: str, data: bytes) -> bool:
    """Whether these bytes are stored under the path, with their own digest and size."""
    found = store.open(path)
    if found is None:
        return False
    with found[1] as file:
        return file.read() == data and (found[0].sha256, found[0].size) == (digest(data), len(data))


@pytest.mark.skipif(sys.platform != "linux", reason="needs O_TMPFILE")
def test_upload_is_named_and_not_copied(tmp_path: Path, registry: Registry) -> None:
    store = Store(str(tmp_path / "files"), registry, time.time())
    with unnamed_file(str(tmp_path)) as body:
        body.write(NEW)
        body.seek(0)
        store.put("a", body)
        assert (tmp_path / "files" / digest(NEW)).stat().st_ino == os.fstat(body.fileno()).st_ino
    assert holds(store, "a", NEW)


def test_upload_that_cannot_be_named_is_copied(tmp_path: Path, registry: Registry) -> None:
    store = Store(str(tmp_path / "files"), registry, time.time())
    with tempfile.TemporaryFile(dir=tmp_path) as body:  # with O_EXCL, so it can never be linked
        body.write(NEW)
        body.seek(0)
        store.put("a", body)
    assert holds(store, "a", NEW)
    assert os.listdir(tmp_path / "files") == [digest(NEW)]


def test_many_may_upload_and_fetch_at_once(site: Site) -> None:
    images = [hashlib.shake_128(bytes([each])).digest(50_000) for each in range(4)]
    plan(site)
    with standing(site) as stand, ThreadPoolExecutor(8) as pool:

        def upload(turn: int) -> int:
            body = images[turn % 4]
            with stand.dial() as wire:
                length = f"Content-Length: {len(body)}"
                wire.send(request(f"/files/{turn % 3}.bin", ASK, length, method="PUT") + body)
                return wire.reply().status

        def fetch(turn: int) -> bool:
            with stand.dial() as wire:
                answer = wire.ask(f"/files/{turn % 3}.bin", ASK)
            return answer.status == 404 or answer.body in images

        statuses = pool.map(upload, range(60))
        fetched = pool.map(fetch, range(120))
        assert set(statuses) == {200}
        assert all(fetched)
    with registry_of(site) as registry:
        assert set(stored(site)) == registry.file_digests()
