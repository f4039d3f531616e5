"""A release comes in: over HTTP into the stock, and out of it into a device."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_fleet.ledger import Ledger
from ota_fleet.registry import Registry
from ota_fleet.rows import Draft, Entry, Project, Token
from ota_fleet.stock import Stock
from ota_fleet.upload import DRAFT_SECONDS, FORM, Look, Upload, Uploads
from ota_server import (
    Refused,
    Reply,
    Site,
    Version,
    answer,
    parse_head,
    refusal,
    unnamed_file,
)
from tests.conftest import put, wait_until
from tests.core.test_access import ask, basic, bearer, text_of
from tests.core.test_faults import shell
from tests.core.wire import PATIENCE, Answer, Script, Stand, request, standing
from tests.data.make_images import (
    esp32_bootloader,
    esp32_image,
    esp8266_image,
    factory_image,
    fatfs_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    spiffs_image,
)
from tests.devices import Device, Esp32, Esp8266
from tests.fleet.test_fleet import fleet, registry_of, remembering

TOKEN = "ota_" + 32 * "t"
BEARER = f"Authorization: Bearer {TOKEN}"
NOW = 1_760_000_000  # UTC seconds
LAMP = esp8266_image("lamp", "1.2.0")
TO = "/projects/lamp/releases/1.2.0"
CHECK = "x-ESP8266-version: 0.0.1"


def admit(registry: Registry, project: str = "") -> None:
    """Lets a publisher's token in, if it is not yet."""
    if not Ledger(registry).tokens():
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        token = Token(0, "CI", "publisher", project, digest, "", NOW)
        Ledger(registry).add_token(token, "test")


def stock_of(site: Site) -> Stock:
    """The catalog of a site with a memory."""
    assert isinstance(site.catalog, Stock)
    return site.catalog


def uploads_of(site: Site, now: int = NOW) -> Uploads:
    """What takes uploads, on a day in 2025."""
    stock = stock_of(site)
    return Uploads(stock, Ledger(stock._registry), site.config, lambda: now)


@contextmanager
def publishing(folder: Path, project: str = "", **settings: Any) -> Iterator[Site]:
    """A site that takes uploads, with a project `lamp` beside what is in the folder."""
    with remembering(folder, **settings) as site:
        admit(stock_of(site)._registry, project)
        if stock_of(site).project("lamp") is None:
            stock_of(site).put_project(Project("lamp"))
        yield site


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    """A site that takes uploads."""
    with publishing(folder) as site:
        yield site


def publish(site: Site, path: str, body: bytes, *fields: str, method: str = "PUT") -> Reply:
    """The reply to an upload, without sockets."""
    length = f"Content-Length: {len(body)}"
    try:
        data = request(f"/api/v1{path}", BEARER, length, *fields, method=method)
        head = parse_head(data, "192.0.2.9")
    except Refused as refused:
        return refusal(refused)
    with unnamed_file(site.config.state) as file:
        file.write(body)
        file.seek(0)
        return answer(site, head._replace(body=file))


def send(
    where: Stand | Script, path: str, body: bytes, *fields: str, method: str = "PUT"
) -> Answer:
    """The reply to an upload, over a socket."""
    with where.dial() as wire:
        length = f"Content-Length: {len(body)}"
        wire.send(request(f"/api/v1{path}", BEARER, length, *fields, method=method) + body)
        return wire.reply()


def said(reply: Reply) -> dict[str, Any]:
    """The release in a reply."""
    assert reply.status in {200, 201}, reply.body
    assert isinstance(reply.body, bytes)
    found = json.loads(reply.body)
    assert isinstance(found, dict)
    return found


def got(site: Site, path: str, *fields: str) -> bytes:
    """The bytes that a path gives."""
    reply = ask(site, path, *fields)
    assert reply.status == 200, reply
    assert isinstance(reply.body, bytes)
    return reply.body


def gives(site: Site, path: str, body: bytes) -> bool:
    """Whether a path gives these bytes by now."""
    return ask(site, path).body == body


def form(body: bytes, filename: str = "lamp.bin", **fields: str) -> tuple[bytes, str]:
    """A form with a file, and its Content-Type."""
    line = b"--b0undary\r\nContent-Disposition: form-data; name="
    texts = [line + f'"{name}"\r\n\r\n{text}\r\n'.encode() for name, text in fields.items()]
    file = line + f'"file"; filename="{filename}"\r\n\r\n'.encode() + body
    data = b"".join(texts) + file + b"\r\n--b0undary--\r\n"
    return data, "Content-Type: multipart/form-data; boundary=b0undary"


def stored(site: Site) -> list[str]:
    """What lies in the folder of files."""
    return sorted(os.listdir(Path(site.config.state) / "files"))


def published(site: Site) -> list[Entry]:
    """What the audit says of uploads."""
    ledger = Ledger(stock_of(site)._registry)
    assert ledger.verify_audit()
    return [entry for entry in ledger.audit_log(limit=1000) if entry.action == "upload"]


def digest(data: bytes) -> str:
    """As files are called."""
    return hashlib.sha256(data).hexdigest()


# -- 1. From the upload to the device -------------------------------------------------------------


def esp8266(stand: Stand, version: str, path: str = "/lamp") -> Device:
    """A device that runs this version."""
    image = esp8266_image("lamp", version)
    return Esp8266(host="127.0.0.1", port=stand.port, path=path, image=image)


def esp32(stand: Stand, version: str, path: str = "/lamp") -> Device:
    """The same of the other family."""
    image = esp32_image("lamp", version)
    return Esp32(host="127.0.0.1", port=stand.port, path=path, image=image)


Make = Callable[[Stand, str], Device]
BOTH = pytest.mark.parametrize(
    ("make", "image"), [(esp8266, esp8266_image), (esp32, esp32_image)], ids=["esp8266", "esp32"]
)


@BOTH
def test_device_gets_what_was_uploaded_a_moment_ago(
    make: Make, image: Callable[..., bytes], site: Site
) -> None:
    with standing(site) as stand:
        device = make(stand, "1.0.0")
        assert (device.update(), device.last_status) == ("HTTP_UPDATE_FAILED", 404)
        for version in ("1.1.0", "1.2.0", "1.10.0"):
            body = image("lamp", version)
            reply = send(stand, f"/projects/lamp/releases/{version}", body)
            assert reply.status == 201
            assert (device.update(), device.version) == ("HTTP_UPDATE_OK", version)
            assert device.last_headers["x-md5"] == hashlib.md5(body).hexdigest()  # noqa: S324
            assert device.update() == "HTTP_UPDATE_NO_UPDATES"


def test_device_of_a_project_in_the_folder_gets_what_was_uploaded(site: Site) -> None:
    body = esp8266_image("firmware", "1.11.0")
    assert publish(site, "/projects/firmware/releases/1.11.0", body).status == 201
    assert got(site, "/firmware", "x-ESP8266-version: 1.10.0") == body
    versions = json.loads(text_of(ask(site, "/firmware/versions")))
    assert versions["versions"] == ["1.11.0", "1.10.0", "1.9.0", "1.0.0"]
    assert ask(site, "/firmware/firmware-1.9.0.bin").status == 200


def test_answer_is_the_release(site: Site) -> None:
    reply = publish(site, TO, LAMP)
    found = said(reply)
    assert abs(found.pop("uploaded") - time.time()) < 60
    assert found == {
        "project": "lamp", "version": "1.2.0", "kind": "sketch", "chip": "esp8266",
        "packed": False, "name": "lamp-1.2.0.bin", "size": len(LAMP), "sha256": digest(LAMP),
        "md5": hashlib.md5(LAMP).hexdigest(), "notes": "", "source": "upload",  # noqa: S324
        "who": "token 1 (CI)", "withdrawn": None, "flaw": "",
    }  # fmt: skip
    assert dict(reply.headers)["Location"] == "/api/v1/projects/lamp/releases/1.2.0"
    assert reply.status == 201


def test_upload_is_in_the_audit(site: Site) -> None:
    publish(site, TO, LAMP)
    (entry,) = published(site)
    assert (entry.who, entry.action) == ("token 1 (CI)", "upload")
    assert entry.what == f"lamp 1.2.0 lamp-1.2.0.bin {digest(LAMP)}"


def test_same_upload_again_is_200_and_changes_nothing(site: Site) -> None:
    first = said(publish(site, TO, LAMP))
    again = publish(site, TO, LAMP)
    assert (again.status, said(again)) == (200, first)
    assert publish(site, "/releases", LAMP, 'Content-Disposition: x; filename="lamp-1.2.0.bin"',
                   method="POST").status == 200  # fmt: skip
    assert len(published(site)) == 1


def test_what_lies_in_the_folder_already_is_200(site: Site) -> None:
    body = esp8266_image("firmware", "1.9.0")
    reply = publish(site, "/projects/firmware/releases/1.9.0", body)
    assert (reply.status, said(reply)["source"]) == (200, "folder")
    assert stored(site) == []


@pytest.mark.parametrize(
    ("path", "method", "name", "fields"),
    [
        pytest.param(TO, "PUT", "", {}, id="url"),
        pytest.param("/projects/lamp/releases", "POST", "", {"version": "v1.2.0"}, id="version"),
        pytest.param("/projects/lamp/releases", "POST", "x-1.2.bin", {}, id="version-of-the-name"),
        pytest.param("/releases", "POST", "", {"project": "lamp", "version": "1.2"}, id="fields"),
        pytest.param("/releases", "POST", "lamp-1.2.0.bin", {}, id="name"),
        pytest.param("/releases", "POST", "C:\\fakepath\\lamp-1.2.0.bin", {}, id="path"),
        pytest.param(TO, "PUT", "other-9.9.9.bin", {}, id="name-does-not-count"),
        pytest.param("/projects/lampe/releases/1.2.0", "PUT", "", {}, id="alias"),
        pytest.param("/releases", "POST", "lampe_1.2.0.bin", {}, id="alias-in-the-name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [LAMP, gzip_image(LAMP)], ids=["plain", "packed"])
def test_project_and_version_may_stand_in_many_places(
    path: str, method: str, name: str, fields: dict[str, str], body: bytes, site: Site
) -> None:
    stock_of(site).put_project(Project("lamp", aliases=("lampe",)))
    data, kind = form(body, name, **fields)
    found = said(publish(site, path, data, kind, method=method))
    assert (found["project"], found["version"], found["sha256"]) == ("lamp", "1.2.0", digest(body))
    if not fields:
        disposition = f'Content-Disposition: attachment; filename="{name}"'
        assert publish(site, path, body, disposition, method=method).status == 200


def test_image_says_itself_what_it_is(site: Site) -> None:
    body = esp32_image("lamp", "1.2.0")
    assert said(publish(site, "/releases", body, method="POST"))["version"] == "1.2.0"
    data, kind = form(esp32_image("lamp", "1.3.0"), notes="Zürich", replace="1")
    found = said(publish(site, "/releases", data, kind, method="POST"))
    assert (found["version"], found["notes"]) == ("1.3.0", "Zürich")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "options",
    [
        ("-T", "{file}", "{base}/projects/lamp/releases/1.2.0"),
        ("--data-binary", "@{file}", "-X", "PUT", "{base}/projects/lamp/releases/1.2.0"),
        ("-F", "file=@{file}", "{base}/releases"),
        ("-F", "file=@{file}", "-F", "version=1.2.0", "-F", "notes=<{file}.md",
         "{base}/projects/lamp/releases"),
        ("-H", "Expect: 100-continue", "-T", "{file}", "{base}/projects/lamp/releases/1.2.0"),
    ],
)  # fmt: skip
def test_curl_publishes(options: tuple[str, ...], site: Site, tmp_path: Path) -> None:
    file = put(tmp_path / "lamp-1.2.0.bin", LAMP)
    put(tmp_path / "lamp-1.2.0.bin.md", b"What is new")
    with standing(site) as stand:
        base = f"http://127.0.0.1:{stand.port}/api/v1"
        words = ["-H", BEARER, *(word.format(file=file, base=base) for word in options)]
        done = subprocess.run(["curl", "-sS", *words], capture_output=True, check=True)
        assert json.loads(done.stdout)["sha256"] == digest(LAMP)
        assert esp8266(stand, "1.0.0").update() == "HTTP_UPDATE_OK"


def test_upload_under_tls_reaches_a_device(site: Site, certificate: Path) -> None:
    with standing(site, certificate) as stand:
        assert send(stand, TO, LAMP).status == 201
        device = Esp8266(
            host="127.0.0.1", port=stand.port, path="/lamp", tls_ca=certificate,
            image=esp8266_image("lamp", "1.0.0"),
        )  # fmt: skip
        wait_until(lambda: device.update() == "HTTP_UPDATE_OK")


@pytest.mark.parametrize(
    ("body", "name", "kind", "chip"),
    [
        (LAMP, "lamp-2.0.0.bin", "sketch", "esp8266"),
        (gzip_image(LAMP), "lamp-2.0.0.bin.gz", "sketch", "esp8266"),
        (littlefs_image(), "lamp-2.0.0.littlefs.bin", "littlefs", ""),
        (gzip_image(littlefs_image()), "lamp-2.0.0.littlefs.bin.gz", "littlefs", "esp8266"),
        (spiffs_image(), "lamp-2.0.0.spiffs.bin", "spiffs", ""),
        (fatfs_image(), "lamp-2.0.0.fatfs.bin", "fatfs", ""),
        (esp32_image("lamp", "2.0.0", chip_id=5), "lamp-2.0.0.bin", "sketch", "esp32c3"),
    ],
)
def test_every_kind_is_published_and_had_by_its_name(
    body: bytes, name: str, kind: str, chip: str, site: Site
) -> None:
    found = said(publish(site, "/projects/lamp/releases/2.0.0", body))
    assert (found["name"], found["kind"], found["chip"]) == (name, kind, chip)
    assert got(site, f"/lamp/{name}") == body
    assert text_of(ask(site, f"/lamp/{name}.sha256")) == f"{digest(body)}  {name}\n"


def test_mongoose_zip_says_itself_what_it_is(site: Site) -> None:
    body = mongoose_zip("lamp", "1.4.0")
    found = said(publish(site, "/releases", body, method="POST"))
    assert (found["name"], found["kind"], found["version"]) == ("lamp-1.4.0.zip", "zip", "1.4.0")


def test_one_version_may_be_for_several_chips(site: Site) -> None:
    stock_of(site).put_project(Project("lamp", ("esp32", "esp32c3", "esp8266")))
    bodies = {
        "lamp-1.2.0.bin": LAMP,
        "lamp-esp32-1.2.0.bin": esp32_image("lamp", "1.2.0"),
        "lamp-esp32c3-1.2.0.bin": esp32_image("lamp", "1.2.0", chip_id=5),
        "lamp-1.2.0.littlefs.bin": littlefs_image(),
        "lamp-1.2.0.bin.gz": gzip_image(LAMP),
    }
    for name, body in bodies.items():
        assert said(publish(site, TO, body))["name"] == name
    for name, body in bodies.items():
        assert got(site, f"/lamp/{name}") == body
    assert got(site, "/lamp", CHECK) == LAMP


def test_name_that_a_file_of_the_folder_has_is_not_given_again(folder: Path) -> None:
    put(folder / "lamp-1.2.0.bin", esp32_image("lamp", "1.2.0"))
    with publishing(folder) as site:
        stock_of(site).put_project(Project("lamp", ("esp32", "esp8266")))
        assert said(publish(site, TO, LAMP))["name"] == "lamp-esp8266-1.2.0.bin"
        assert got(site, "/lamp/lamp-esp8266-1.2.0.bin") == LAMP
        assert got(site, "/lamp", CHECK) == LAMP


def test_pre_release_is_had_by_its_name_only(site: Site) -> None:
    body = esp8266_image("lamp", "2.0.0-rc.1")
    publish(site, TO, LAMP)
    publish(site, "/projects/lamp/releases/2.0.0-rc.1", body)
    assert got(site, "/lamp", CHECK) == LAMP
    assert got(site, "/lamp/lamp-2.0.0-rc.1.bin") == body
    later = esp8266_image("lamp", "1.3.0")
    assert publish(site, "/projects/lamp/releases/1.3.0", later).status == 201


def test_replaced_release_is_gone_and_its_bytes_too(site: Site) -> None:
    publish(site, TO, LAMP)
    again = esp8266_image("lamp", "1.2.0", seed=1)
    assert publish(site, TO, again).status == 409
    assert said(publish(site, f"{TO}?replace=1", again))["name"] == "lamp-1.2.0.bin"
    assert stored(site) == [digest(again)]
    assert got(site, "/lamp/lamp-1.2.0.bin") == again
    data, kind = form(LAMP, replace="on")
    assert publish(site, TO, data, kind).status == 201
    assert stored(site) == [digest(LAMP)]


def test_file_of_the_folder_is_replaced_by_a_newer_upload(folder: Path) -> None:
    body = esp8266_image("firmware", "1.10.0", seed=1)
    path = "/projects/firmware/releases/1.10.0"
    with remembering(folder) as plain:
        uploads = Uploads(stock_of(plain), Ledger(stock_of(plain)._registry), plain.config)
        with tempfile.TemporaryFile(dir=plain.config.state) as file:
            file.write(body)
            file.seek(0)
            upload = Upload(project="firmware", version="1.10", replace=True)
            assert uploads.take(file, upload, "me")[1]
        assert got(plain, "/firmware/firmware-1.10.0.bin") == body
        assert got(plain, "/firmware", CHECK) == body
        admit(stock_of(plain)._registry)
        assert publish(plain, path, body).status == 200


def test_same_bytes_are_stored_once(folder: Path) -> None:
    who = basic("sesame", "open")
    with publishing(folder, us_username="sesame", us_password="open") as site:  # noqa: S106
        stock_of(site).put_project(Project("bulb"))
        body = littlefs_image()
        for project in ("lamp", "bulb"):
            assert publish(site, f"/projects/{project}/releases/1.0.0", body).status == 201
        with tempfile.TemporaryFile() as file:
            file.write(body)
            file.seek(0)
            head = request("/files/a.bin", who, f"Content-Length: {len(body)}", method="PUT")
            assert answer(site, parse_head(head, "::1")._replace(body=file)).status == 200
        assert stored(site) == [digest(body)]
        for project in ("lamp", "bulb"):
            assert stock_of(site).delete(project, Version.parse("1.0.0"))
            assert stored(site) == [digest(body)]
        assert got(site, "/files/a.bin", who) == body


# -- 2. Refusals ----------------------------------------------------------------------------------

OTHER = esp32_image("other", "1.2.0")
SAYS = esp32_image("lamp", "1.2.0")


def b64(data: bytes, algorithm: str) -> str:
    """A digest as header fields write it."""
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


def text(reply: Reply | Answer) -> str:
    """Why a request was refused."""
    assert isinstance(reply.body, bytes)
    return str(json.loads(reply.body)["detail"])


REFUSALS = [
    # path, body, fields, status, sentence
    pytest.param(TO, b"", (), 422, "the file is empty", id="empty"),
    pytest.param(TO, LAMP[:-1], (), 422, "the file is", id="cut-off"),
    pytest.param(TO, LAMP[:5000] + b"X" + LAMP[5001:], (), 422, "is damaged", id="damaged"),
    pytest.param(TO, gzip_image(LAMP)[:-9], (), 422, "is cut off", id="cut-off-gzip"),
    pytest.param(TO, gzip_image(SAYS), (), 422, "only an ESP8266 unpacks", id="packed-esp32"),
    pytest.param(TO, factory_image(SAYS), (), 422, "merged factory image", id="factory"),
    pytest.param(TO, esp32_bootloader(), (), 422, "boot loader", id="boot-loader"),
    pytest.param(TO, b"<!DOCTYPE html><html>", (), 422, "web page", id="web-page"),
    pytest.param(TO, b"\x7fELF" + bytes(100), (), 422, "ELF file", id="elf"),
    pytest.param(TO, LAMP, ("x-MD5: " + "0" * 32,), 422, "x-MD5 promises 000", id="x-md5"),
    pytest.param(TO, LAMP, ("X-SHA256: " + "0" * 64,), 422, "x-SHA256 promises", id="x-sha256"),
    pytest.param(TO, LAMP, (f"Content-MD5: {b64(SAYS, 'md5')}",), 422, "Content-MD5 promises",
        id="content-md5"),
    pytest.param(TO, LAMP, (f"Digest: SHA-256={b64(SAYS, 'sha256')}",), 422, "Digest promises",
        id="digest"),
    pytest.param(TO, LAMP, (f"Repr-Digest: sha-256=:{b64(SAYS, 'sha256')}:",), 422,
        "Repr-Digest promises", id="repr-digest"),
    pytest.param(TO, LAMP, (f"Content-Digest: sha-512=:eA==:, sha-256=:{b64(SAYS, 'sha256')}:",),
        422, "Content-Digest promises", id="content-digest-of-several"),
    pytest.param(TO, LAMP, ("x-MD5: 00",), 400, "is no digest by md5", id="short-digest"),
    pytest.param(TO, LAMP, ("x-MD5: " + "x" * 32,), 400, "is no digest by md5", id="no-hex"),
    pytest.param(TO, LAMP, ("Repr-Digest: sha-256=eA==",), 400, "no digest by sha256", id="no-b64"),
    pytest.param(TO, LAMP, ("Content-Disposition: attachment; x",), 400, "name=value",
        id="disposition"),
    pytest.param("/releases", LAMP, (), 422, "nothing says which project this is: publish has "
        "--project and --version", id="no-project"),
    pytest.param("/projects/lamp/releases", LAMP, (), 422, "nothing says which version this is: "
        "publish has", id="no-version"),
    pytest.param("/projects/lamp/releases", esp32_image("lamp", "build-7"), (), 422,
        "the image calls itself 'build-7'", id="no-readable-version"),
    pytest.param("/projects/lamp/releases/newest", LAMP, (), 422, "'newest' is no version",
        id="no-such-version"),
    pytest.param("/projects/lamp/releases/01.2.0", LAMP, (), 422, "is no version", id="zeros"),
    pytest.param("/projects/lamp/releases/1.3.0", SAYS, (), 422, "the image says it is 1.2.0, not "
        "1.3.0", id="other-version"),
    pytest.param(TO, OTHER, (), 422, "the image says it is 'other', not 'lamp': upload it there, "
        "or give 'lamp' that alias", id="other-project"),
    pytest.param("/projects/bulb/releases/1.0.0", LAMP, (), 404, "there is no project bulb: "
        "create it first, PUT /api/v1/projects/bulb", id="unknown-project"),
    pytest.param("/releases", OTHER, (), 404, "there is no project other", id="unknown-by-image"),
    pytest.param("/projects/../releases/1.0.0", LAMP, (), 422, "'..' is no name", id="dots"),
    pytest.param("/projects/api/releases/1.0.0", LAMP, (), 422, "'api' is no name", id="reserved"),
    pytest.param("/projects/firmware/releases/1.10.0", LAMP, (), 409, "1.10.0 of 'firmware' is "
        "there already: choose a higher one, or ?replace=1", id="same-version"),
    pytest.param("/projects/firmware/releases/1.10", LAMP, (), 409, "there already", id="short"),
    pytest.param("/projects/firmware/releases/1.9.1", LAMP, (), 409, "1.9.1 of 'firmware' is lower "
        "than 1.10.0: choose a higher one, or ?replace=1", id="lower-version"),
    pytest.param("/projects/firmware/releases/1.10.0-rc.1", LAMP, (), 409, "is lower", id="rc"),
    pytest.param("/projects/firmware/releases/2.0.0", esp32_image("firmware", "2.0.0"), (), 409,
        "the image is for esp32, 'firmware' for esp8266: if that is meant, PUT "
        "/api/v1/projects/firmware with all of its \"chips\" first", id="other-chip"),
    pytest.param("/projects/firmware/releases/2.0.0?replace=1", esp32_image("firmware", "2.0.0"),
        (), 409, "the image is for esp32", id="other-chip-replaced"),
    pytest.param("/projects/strict/releases/1.0.0", LAMP, (), 409, "for esp8266, 'strict' for "
        "esp32, esp32c3", id="chip-that-was-not-allowed"),
    pytest.param(f"{TO}?replace=perhaps", LAMP, (), 422, "?replace is to be one of 0, 1",
        id="replace"),
    pytest.param(TO, bytes((1 << 20) + FORM + 1), (), 413, "the image has 1114113 bytes, at most "
        "1048576 are taken", id="big-body"),
    pytest.param(TO, bytes((1 << 20) + 1), (), 413, "the image has 1048577 bytes, at most 1048576",
        id="big-image"),
]  # fmt: skip


@pytest.fixture
def strict(folder: Path) -> Iterator[Site]:
    """A site that takes images of 1 MB, with a project for two chips."""
    with publishing(folder, max_image=1) as site:
        stock_of(site).put_project(Project("strict", ("esp32c3", "esp32")))
        yield site


@pytest.mark.parametrize(("path", "body", "fields", "status", "sentence"), REFUSALS)
def test_wrong_upload_is_refused_with_a_sentence_and_leaves_nothing(
    path: str, body: bytes, fields: tuple[str, ...], status: int, sentence: str, strict: Site
) -> None:
    before = {name: list(stock_of(strict).images(name)) for name in strict.catalog.projects()}
    with standing(strict) as stand:
        method = "POST" if path.endswith("releases") else "PUT"
        reply = send(stand, path, body, *fields, method=method)
    assert (reply.status, sentence in text(reply)) == (status, True), reply.body
    assert stored(strict) == []
    after = {name: list(stock_of(strict).images(name)) for name in strict.catalog.projects()}
    assert after == before
    assert published(strict) == []


FORMS = [
    pytest.param({}, LAMP, 201, "", id="file-alone"),
    pytest.param({"version": "1.2.0"}, LAMP, 201, "", id="same-version"),
    pytest.param(
        {"version": "1.3.0"}, LAMP, 422, "URL and form differ in the version", id="differ"
    ),
    pytest.param({"project": "bulb"}, LAMP, 422, "URL and form differ in the project", id="other"),
    pytest.param({"colour": "red"}, LAMP, 422, "but only project, version, notes", id="unknown"),
    pytest.param({"notes": "x" * 5000}, LAMP, 400, "more than 4096 bytes", id="long"),
    pytest.param({"replace": "perhaps"}, LAMP, 422, "replace is 1 or 0", id="replace"),
    pytest.param({}, b"", 422, "is empty", id="empty-file"),
]


@pytest.mark.parametrize(("fields", "body", "status", "sentence"), FORMS)
def test_form_is_published_or_refused_with_a_sentence(
    fields: dict[str, str], body: bytes, status: int, sentence: str, site: Site
) -> None:
    data, kind = form(body, **fields)
    reply = publish(site, TO, data, kind)
    assert reply.status == status, reply.body
    assert status == 201 or sentence in text(reply)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (form(b"", "")[0], "one file is needed"),
        (form(LAMP)[0].replace(b'; filename="lamp.bin"', b""), "one file is needed"),
        (form(LAMP)[0].replace(b"--b0undary--", form(LAMP)[0]), "one file is needed"),
        (form(LAMP, notes="1")[0].replace(b'"file"; filename="lamp.bin"', b'"notes"'), "needed"),
    ],
)
def test_form_needs_one_file(data: bytes, sentence: str, site: Site) -> None:
    reply = publish(site, TO, data, form(b"")[1])
    assert (reply.status, sentence in text(reply)) == (422, True)


def test_field_that_stands_twice_is_refused(site: Site) -> None:
    data, kind = form(LAMP, version="1.2.0")
    line, _, rest = data.partition(b"1.2.0\r\n")
    reply = publish(site, TO, line + b"1.2.0\r\n" + line + b"1.3.0\r\n" + rest, kind)
    assert (reply.status, "'version' is in the form, twice" in text(reply)) == (422, True)


@pytest.mark.parametrize(
    "fields",
    [
        (f"x-MD5: {hashlib.md5(LAMP).hexdigest()}",),  # noqa: S324
        (f"x-MD5: {hashlib.md5(LAMP).hexdigest().upper()}",),  # noqa: S324
        (f"X-SHA256: {digest(LAMP)}", f"Content-MD5: {b64(LAMP, 'md5')}"),
        (f"Digest: MD5={b64(LAMP, 'md5')},SHA-256={b64(LAMP, 'sha256')},UNIXsum=30637",),
        (f"Repr-Digest: sha-256=:{b64(LAMP, 'sha256')}:, sha-512=:eA==:",),
    ],
)
def test_promise_that_is_kept_is_fine(fields: tuple[str, ...], site: Site) -> None:
    assert publish(site, TO, LAMP, *fields).status == 201


def test_promise_about_an_image_holds_in_a_form_and_one_about_a_body_does_not(site: Site) -> None:
    data, kind = form(LAMP)
    wrong = publish(site, TO, data, kind, f"X-SHA256: {digest(SAYS)}")
    assert (wrong.status, "x-SHA256 promises" in text(wrong)) == (422, True)
    assert publish(site, TO, data, kind, f"Content-MD5: {b64(data, 'md5')}").status == 201


@pytest.mark.parametrize("query", ["", "?replace=1"])
@pytest.mark.parametrize("there", ["upload", "folder"])
def test_no_other_image_of_a_withdrawn_version_is_taken(
    there: str, query: str, folder: Path
) -> None:
    if there == "folder":
        put(folder / "lamp-1.2.0.bin", LAMP)
    with publishing(folder) as site:
        assert publish(site, TO, LAMP).status == (201 if there == "upload" else 200)
        stock_of(site).withdraw("lamp", Version.parse("1.2.0"), "", "ada", NOW)
        for body in (gzip_image(LAMP), esp8266_image("lamp", "1.2.0", seed=9)):
            reply = publish(site, TO + query, body)
            reason = "1.2.0 of 'lamp' is withdrawn: restore it first, or choose a higher one"
            assert (reply.status, text(reply)) == (409, reason)
            with unnamed_file(site.config.state) as file:
                file.write(body)
                file.seek(0)
                found = uploads_of(site).look(file, "lamp-1.2.0.bin", "ada")
            assert reason in found.problems
        assert ask(site, "/lamp", CHECK).status == 304
        assert publish(site, TO, LAMP).status == 200  # that is the one that is withdrawn
        stock_of(site).restore("lamp", Version.parse("1.2.0"))
        assert publish(site, TO, gzip_image(LAMP)).status == 201


def test_location_is_ascii_whatever_the_project_is_called(folder: Path) -> None:
    put(folder / "lämp-1.0.0.bin", LAMP)
    with publishing(folder) as site, standing(site) as stand:
        body = esp8266_image("lamp", "2.0.0+b1")
        answer = send(stand, "/projects/l%C3%A4mp/releases/2.0.0+b1", body)
        assert answer.status == 201
        assert answer.headers["location"] == "/api/v1/projects/l%C3%A4mp/releases/2.0.0%2Bb1"


def test_token_of_a_project_that_is_an_alias_now_publishes_nothing(folder: Path) -> None:
    with publishing(folder, "bulb") as site:
        stock_of(site).put_project(Project("lamp", (), ("bulb",)))
        name = 'Content-Disposition: attachment; filename="lamp-1.2.0.bin"'
        reply = publish(site, "/releases", LAMP, name, method="POST")
        assert (reply.status, "for 'bulb'" in text(reply)) == (403, True)


def test_token_of_one_project_publishes_nothing_else(folder: Path) -> None:
    with publishing(folder, "firmware") as site:
        reply = publish(site, TO, LAMP)
        assert (reply.status, text(reply)) == (
            403, "token 1 (CI) is for 'firmware' only",
        )  # fmt: skip
        said_by_image = publish(site, "/releases", SAYS, method="POST")
        assert (said_by_image.status, text(said_by_image)) == (
            403, "this token is for 'firmware', not 'lamp'",
        )  # fmt: skip
        assert publish(site, "/projects/firmware/releases/2.0.0", LAMP).status == 201


def test_nothing_is_taken_for_a_project_whose_files_are_not_checked_yet(folder: Path) -> None:
    path = "/projects/firmware/releases/1.0.1"
    with publishing(folder) as site:
        away = folder.rename(folder.with_name("away"))
        stock_of(site)._folder.scan()  # type: ignore[attr-defined]
        assert publish(site, path, LAMP).status == 503
        away.rename(folder)
        stock_of(site)._folder.scan()  # type: ignore[attr-defined]
        assert publish(site, path, LAMP).status == 409


def test_packed_and_plain_stand_side_by_side_and_each_only_once(site: Site) -> None:
    assert publish(site, TO, LAMP).status == 201
    assert publish(site, TO, gzip_image(LAMP)).status == 201
    again = publish(site, TO, gzip_image(esp8266_image("lamp", "1.2.0", seed=1)))
    assert (again.status, "there already" in text(again)) == (409, True)


def test_lower_version_is_taken_if_that_is_meant(site: Site) -> None:
    assert publish(site, TO, LAMP).status == 201
    older = esp8266_image("lamp", "1.1.0")
    assert publish(site, "/projects/lamp/releases/1.1.0", older).status == 409
    assert publish(site, "/projects/lamp/releases/1.1.0?replace=1", older).status == 201
    assert got(site, "/lamp", CHECK) == LAMP
    assert got(site, "/lamp/lamp-1.1.0.bin") == older


# -- 3. Whatever comes ----------------------------------------------------------------------------


def test_what_was_uploaded_comes_back_byte_for_byte(site: Site) -> None:
    stock_of(site).put_project(Project("lamp", ("esp32", "esp8266")))
    numbers = iter(range(1, 10_000))

    @given(st.binary(max_size=3000), st.sampled_from("8g3l"), st.booleans())
    @settings(max_examples=60, deadline=None)
    def comes_back(payload: bytes, kind: str, in_a_form: bool) -> None:
        version = f"1.{next(numbers)}.0"
        payload += bytes(-len(payload) % 4)
        body = esp8266_image("lamp", version, payload=payload)
        if kind == "g":
            body = gzip_image(body)
        if kind == "3":
            body = esp32_image("lamp", version, payload=payload)
        if kind == "l":
            body = littlefs_image()[: -len(payload) or None] + payload
        data, fields = form(body) if in_a_form else (body, "X-Nothing: 1")
        found = said(publish(site, f"/projects/lamp/releases/{version}", data, fields))
        assert got(site, f"/lamp/{found['name']}") == body
        assert (found["sha256"], found["size"]) == (digest(body), len(body))

    comes_back()


def test_no_damaged_form_is_a_500(site: Site) -> None:
    whole, kind = form(LAMP, notes="x", version="1.2.0")
    publish(site, TO, LAMP)

    @given(
        st.integers(0, len(whole)),
        st.integers(0, 600),
        st.sampled_from([b"", b"--b0undary", b"\r\n--b0undary--\r\n", b"\r\n\r\n", b'"', b"\0"])
        | st.binary(max_size=40),
        st.sampled_from([kind, kind[:-1], kind + '"', "Content-Type: multipart/form-data"]),
    )
    @settings(max_examples=300, deadline=None)
    def answers(start: int, count: int, junk: bytes, content_type: str) -> None:
        data = whole[:start] + junk + whole[start + count :]
        reply = publish(site, TO, data, content_type)
        assert reply.status in {200, 400, 404, 409, 422}, reply
        assert stored(site) == [digest(LAMP)]

    answers()


def test_no_head_is_a_500(site: Site) -> None:
    field = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
    names = ["Content-Disposition", "Content-Type", "Digest", "Repr-Digest", "x-MD5", "Content-MD5"]

    @given(st.sampled_from(names), field, st.text(max_size=20))
    @settings(max_examples=200, deadline=None)
    def answers(name: str, value: str, version: str) -> None:
        path = f"/projects/lamp/releases/{quote(version, safe='')}"
        reply = publish(site, path, LAMP, f"{name}: {value}".encode("latin-1").decode("latin-1"))
        assert reply.status in {200, 201, 400, 404, 405, 409, 422, 431}, reply

    answers()


# -- 4. Several at once ---------------------------------------------------------------------------


def test_many_may_publish_at_once_and_one_of_each_version_wins(site: Site) -> None:
    images = [esp8266_image("lamp", "1.0.0", seed=seed) for seed in range(4)]
    names = [f"p{number}" for number in range(3)]
    for name in names:
        stock_of(site).put_project(Project(name))
    with standing(site) as stand, ThreadPoolExecutor(12) as pool:

        def upload(turn: int) -> tuple[str, int, bytes]:
            name, body = names[turn % 3], images[turn % 4]
            return name, send(stand, f"/projects/{name}/releases/1.0.0", body).status, body

        done = list(pool.map(upload, range(36)))
    for name in names:
        won = {body for each, status, body in done if each == name and status == 201}
        again = {body for each, status, body in done if each == name and status == 200}
        assert len(won) == 1
        assert again <= won
        assert got(site, f"/{name}", CHECK) in won
    assert {status for _, status, _ in done} <= {200, 201, 409}
    with registry_of(site) as registry:
        assert set(stored(site)) == registry.file_digests()
        assert Ledger(registry).verify_audit()
    assert len(published(site)) == 3


def test_pruning_stands_in_the_audit(folder: Path) -> None:
    with publishing(folder, keep=1) as site:
        for minor in range(3):
            path = f"/projects/lamp/releases/1.{minor}.0"
            assert publish(site, path, esp8266_image("lamp", f"1.{minor}.0")).status == 201
        entries = Ledger(stock_of(site)._registry).audit_log()
    old = [digest(esp8266_image("lamp", f"1.{minor}.0")) for minor in range(2)]
    assert [(each.who, each.what) for each in entries if each.action == "prune releases"] == [
        ("token 1 (CI)", f"lamp 1.0.0 {old[0]}"),
        ("token 1 (CI)", f"lamp 1.1.0 {old[1]}"),
    ]


def test_two_servers_see_what_the_other_one_was_sent(folder: Path) -> None:
    with publishing(folder) as here, publishing(folder) as there:
        assert publish(here, TO, LAMP).status == 201
        wait_until(lambda: ask(there, "/lamp", CHECK).body == LAMP, 2)
        assert publish(there, TO, LAMP).status == 200
        later = esp8266_image("lamp", "1.3.0")
        assert publish(there, "/projects/lamp/releases/1.3.0", later).status == 201
        wait_until(lambda: ask(here, "/lamp", CHECK).body == later, 2)
        stock_of(here).withdraw("lamp", Version.parse("1.3.0"), "loops", "me", NOW)
        wait_until(lambda: ask(there, "/lamp", CHECK).body == LAMP, 2)
        assert stock_of(here).delete("lamp", Version.parse("1.2.0"))
        wait_until(lambda: ask(there, "/lamp", CHECK).status == 304, 2)
        assert stored(there) == [digest(later)]


def test_second_server_sweeps_nothing_of_the_first(folder: Path, said: Any) -> None:
    with publishing(folder) as here:
        assert publish(here, TO, LAMP).status == 201
        files = Path(here.config.state) / "files"
        put(files / digest(b"x"), b"x")
        with publishing(folder):
            assert len(stored(here)) == 2
        with publishing(folder):
            assert len(stored(here)) == 2
    with publishing(folder) as again:
        assert stored(again) == sorted([digest(LAMP), f"{digest(b'x')}.unnamed"])
    assert any(f"nothing needs {files / digest(b'x')}: it is removed" in line for line in said())


def test_same_version_at_two_servers_is_one_release(folder: Path) -> None:
    bodies = [esp8266_image("lamp", "1.2.0", seed=seed) for seed in range(2)]
    with publishing(folder) as here, publishing(folder) as there, ThreadPoolExecutor(2) as pool:
        for turn in range(10):
            path = f"/projects/lamp/releases/1.{turn}.0"
            replies = list(pool.map(publish, (here, there), (path, path), bodies))
            won = [body for body, each in zip(bodies, replies, strict=True) if each.status == 201]
            assert (len(won), {each.status for each in replies}) == (1, {201, 409})
            for site in (here, there):
                name = f"/lamp/lamp-1.{turn}.0.bin"
                wait_until(functools.partial(gives, site, name, won[0]), 2)
        with registry_of(here) as registry:
            assert set(stored(here)) == registry.file_digests()


def test_token_of_a_project_opens_no_upload_of_another(folder: Path, tmp_path: Path) -> None:
    tokens = put(tmp_path / "tokens", b'{"firmware": "one", "lamp": "two"}')
    with publishing(folder, token_file=str(tokens)) as site:
        with unnamed_file(site.config.state) as file:
            file.write(LAMP)
            file.seek(0)
            uploads_of(site).take(file, Upload(project="lamp", version="1.2.0"), "me")
        for path in ("/lamp/lamp-1.2.0.bin", "/lamp-1.2.0.bin", "/firmware/lamp-1.2.0.bin"):
            assert ask(site, path, bearer("one")).status == 401, path
            assert ask(site, path, bearer("two")).body == LAMP


# -- 5. Drafts -------------------------------------------------------------------------------------


def look(site: Site, body: bytes, name: str = "lamp-1.2.0.bin") -> Look:
    """What is inside an image, and why it cannot be published."""
    with unnamed_file(site.config.state) as file:
        file.write(body)
        file.seek(0)
        return uploads_of(site).look(file, name, "ada")


def test_what_is_inside_is_shown_and_nothing_is_published(site: Site) -> None:
    found = look(site, LAMP)
    assert (found.project, found.version, found.problems) == ("lamp", "1.2.0", ())
    assert (found.about.chip, found.about.size) == ("esp8266", len(LAMP))
    assert found.draft == Draft(1, digest(LAMP), "lamp-1.2.0.bin", "ada", NOW)
    assert ask(site, "/lamp", CHECK).status == 404
    assert (stored(site), published(site)) == ([digest(LAMP)], [])
    assert uploads_of(site).drafts() == [found.draft]
    assert uploads_of(site).look_again(found.draft.id) == found


def test_draft_is_published_and_ends(site: Site) -> None:
    draft = look(site, LAMP).draft.id
    stocked, new = uploads_of(site).publish_draft(draft, Upload(notes="better"), "ada")
    assert (str(stocked.release.version), stocked.release.notes, new) == ("1.2.0", "better", True)
    assert got(site, "/lamp", CHECK) == LAMP
    assert [entry.who for entry in published(site)] == ["ada"]
    assert (uploads_of(site).drafts(), stored(site)) == ([], [digest(LAMP)])
    gone = r"there is no such draft any more: upload the file again"
    for call in (uploads_of(site).look_again, uploads_of(site).discard):
        with pytest.raises(Refused, match=gone):
            call(draft)


def test_draft_that_is_refused_stays_and_can_be_published_otherwise(site: Site) -> None:
    draft = look(site, littlefs_image(), "x.bin").draft.id
    with pytest.raises(Refused, match="nothing says which project"):
        uploads_of(site).publish_draft(draft, Upload(), "ada")
    said_so = Upload(project="lamp", version="2.0.0")
    assert uploads_of(site).look_again(draft, said_so).problems == ()
    stocked, _ = uploads_of(site).publish_draft(draft, said_so, "ada")
    assert stocked.release.name == "lamp-2.0.0.littlefs.bin"


LARGE = esp8266_image("lamp", "1.3.0", payload=bytes(99_999))


@pytest.mark.parametrize(
    ("body", "name", "sentences"),
    [
        (LAMP, "lamp-1.2.0.bin", ["these very bytes are 1.2.0 of 'lamp' already"]),
        (esp8266_image("lamp", "1.1.0"), "lamp-1.1.0.bin", ["1.1.0 of 'lamp' is lower than 1.2.0"]),
        (
            esp8266_image("lamp", "1.2.0", seed=9),
            "lamp-1.2.0.bin",
            ["1.2.0 of 'lamp' is there already"],
        ),
        (esp32_image("lamp", "1.3.0"), "", ["for esp32, 'lamp' for esp8266"]),
        (esp32_image("lamp", "1.1.0"), "", ["for esp32, 'lamp' for esp8266"]),
        (
            esp8266_image("door", "1.0.0"),
            "door-1.0.0.bin",
            ["there is no project door"],
        ),
        (littlefs_image(), "", ["nothing says which project", "nothing says which version"]),
        (LARGE, "lamp-1.3.0.bin", ["no device could take it"]),
        (b"", "x.bin", ["x.bin is empty", "which project", "which version"]),
        (LAMP[:-9], "", ["the file is cut off", "which project", "which version"]),
    ],
)
def test_all_that_is_wrong_with_a_draft_is_said_at_once(
    body: bytes, name: str, sentences: list[str], site: Site
) -> None:
    assert publish(site, TO, LAMP).status == 201
    stock_of(site).put_project(Project("lamp", partition_size=99_999))
    problems = look(site, body, name).problems
    for sentence, problem in zip(sentences, problems, strict=True):
        assert sentence in problem


def test_lower_version_is_no_problem_if_that_is_meant(site: Site) -> None:
    publish(site, TO, LAMP)
    draft = look(site, esp8266_image("lamp", "1.1.0"), "lamp-1.1.0.bin").draft.id
    assert len(uploads_of(site).look_again(draft).problems) == 1
    assert uploads_of(site).look_again(draft, Upload(replace=True)).problems == ()


def test_discarded_draft_leaves_nothing_but_what_others_need(site: Site) -> None:
    one, other = look(site, LAMP).draft.id, look(site, LAMP).draft.id
    uploads_of(site).discard(one)
    assert stored(site) == [digest(LAMP)]
    publish(site, TO, LAMP)
    uploads_of(site).discard(other)
    assert got(site, "/lamp", CHECK) == LAMP
    uploads_of(site).discard(look(site, esp32_image("lamp", "1.0.0")).draft.id)
    assert stored(site) == [digest(LAMP)]


def test_draft_outlives_a_restart_but_not_a_day(folder: Path) -> None:
    with publishing(folder) as site:
        draft = look(site, LAMP).draft
    with publishing(folder) as site:
        assert uploads_of(site, NOW + DRAFT_SECONDS).drafts() == [draft]
        for late in (NOW + DRAFT_SECONDS + 1, NOW):
            with pytest.raises(Refused, match="no such draft"):
                uploads_of(site, late).publish_draft(draft.id, Upload(), "ada")
        assert stored(site) == []


def test_release_that_a_draft_became_outlives_it(site: Site) -> None:
    publish(site, TO, LAMP)
    draft = look(site, LAMP).draft
    assert not uploads_of(site).publish_draft(draft.id, Upload(), "ada")[1]
    assert stock_of(site).delete("lamp", Version.parse("1.2.0"))
    assert stored(site) == []


def test_release_may_go_while_its_bytes_are_a_draft(site: Site) -> None:
    publish(site, TO, LAMP)
    draft = look(site, LAMP).draft
    assert stock_of(site).delete("lamp", Version.parse("1.2.0"))
    assert uploads_of(site).publish_draft(draft.id, Upload(), "ada")[1]
    assert got(site, "/lamp", CHECK) == LAMP


def test_draft_that_rotted_is_not_published(site: Site) -> None:
    draft = look(site, littlefs_image(), "").draft
    path = Path(stock_of(site).store.path(draft.sha256))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Refused, match="the draft promises"):
        uploads_of(site).publish_draft(draft.id, Upload(project="lamp", version="1.0.0"), "ada")
    path.unlink()
    with pytest.raises(Refused, match="upload the file again"):
        uploads_of(site).look_again(draft.id)


def test_draft_is_not_larger_than_an_upload(folder: Path) -> None:
    with publishing(folder, max_image=1) as site:
        with pytest.raises(Refused, match="at most 1048576 are taken"):
            look(site, bytes((1 << 20) + 1))
        assert (stored(site), uploads_of(site).drafts()) == ([], [])


def test_full_disk_takes_no_draft(folder: Path, small_disk: Path) -> None:
    inside = Path(shutil.move(folder, small_disk / "firmware"))
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    with publishing(inside) as site, tempfile.TemporaryFile() as elsewhere:
        elsewhere.write(bytes(2 << 20))
        elsewhere.seek(0)
        with pytest.raises(Refused, match="no room left"):
            uploads_of(site).look(elsewhere, "", "ada")
        assert (stored(site), uploads_of(site).drafts()) == ([], [])


# -- 6. Full disks and kills ----------------------------------------------------------------------


def test_disk_that_is_full_takes_no_release_and_still_gives_the_others(
    folder: Path, small_disk: Path
) -> None:
    inside = Path(shutil.move(folder, small_disk / "firmware"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    with publishing(inside) as site, standing(site) as stand:
        assert send(stand, TO, LAMP).status == 201
        junk = small_disk / "junk"
        statuses: set[int] = set()
        for number in range(30):
            body = esp8266_image("lamp", f"2.{number}.0")
            junk.unlink(missing_ok=True)
            free = os.statvfs(small_disk).f_bavail * 4096
            with suppress(OSError):
                junk.write_bytes(bytes(max(free - 4096 * (number % 20), 0)))
            before = stored(site)
            status = send(stand, f"/projects/lamp/releases/2.{number}.0", body).status
            statuses.add(status)
            assert stored(site) == sorted([*before, *[digest(body)] * (status == 201)])
            assert got(site, "/lamp/lamp-1.2.0.bin") == LAMP
            if status == 201:
                assert got(site, "/lamp", CHECK) == body
                junk.unlink()  # a row that goes needs room, too
                assert stock_of(site).delete("lamp", Version.parse(f"2.{number}.0"))
        assert statuses == {201, 507}
        junk.unlink(missing_ok=True)
        assert send(stand, "/projects/lamp/releases/3.0.0", LAMP).status == 201
        with registry_of(site) as registry:
            assert Ledger(registry).verify_audit()


def test_file_that_may_not_grow_is_507(folder: Path, state: Path) -> None:
    with fleet(folder, before=shell("ulimit -f 4000")) as script:  # 2 MB
        assert send(script, "/projects/p0/releases/1.0.0", LAMP).status == 201
        large = esp8266_image("p0", "1.1.0", payload=bytes(4 << 20))
        assert send(script, "/projects/p0/releases/1.1.0", large).status == 507
        with script.dial() as wire:
            assert wire.ask("/p0", CHECK).body == LAMP
    assert os.listdir(state / "files") == [digest(LAMP)]


PROJECTS = ("p0", "p1", "p2")


@pytest.fixture
def state(folder: Path) -> Path:
    """Where the real program will find a token, and three projects."""
    state = folder.parent / "state"
    state.mkdir()
    with closing(Registry(state / "fleet.db")) as registry:
        admit(registry)
        for name in PROJECTS:
            registry.write("INSERT INTO project (name, created) VALUES (?, ?)", name, NOW)
    return state


class Uploader:
    """Somebody who publishes versions of one project, and knows what was acknowledged."""

    def __init__(self, project: str, dice: random.Random) -> None:
        self.project, self.dice = project, dice
        self.may: dict[str, list[bytes | None]] = {}  # what each version may be now; None: missing
        self.acknowledged = 0

    def work(self, script: Script) -> None:
        """Publishes and replaces, and lets a device ask, until the server is gone."""
        with suppress(OSError, EOFError), script.dial() as wire:
            for number in range(1, 1000):
                known = sorted(self.may)
                again = len(known) >= 12 or self.dice.random() < 0.25 * bool(known)
                version = self.dice.choice(known) if again else f"1.{len(known)}.0"
                payload = self.dice.randbytes(self.dice.choice((0, 4_000, 60_000, 400_000)))
                body = esp8266_image(self.project, version, payload=payload, seed=number)
                now = self.may.setdefault(version, [None])
                now.append(body)
                path = f"/api/v1/projects/{self.project}/releases/{version}?replace=1"
                length = f"Content-Length: {len(body)}"
                wire.send(request(path, BEARER, length, method="PUT") + body)
                assert wire.reply().status in {200, 201}
                now[:] = [body]
                self.acknowledged += 1
                mac = f"x-ESP8266-STA-MAC: 5C:CF:7F:{number >> 8:02X}:{number & 255:02X}:00"
                wire.ask(f"/{self.project}", "x-ESP8266-version: 99.0.0", mac)

    def is_offered(self, script: Script) -> bool:
        """Whether each version is now one of those that it may be; settles which."""
        with script.dial() as wire:
            for version, now in self.may.items():
                answer = wire.ask(f"/{self.project}/{self.project}-{version}.bin")
                body = answer.body if answer.status == 200 else None
                if body not in now:
                    return False
                assert body is None or answer.headers["x-sha256"] == digest(body)
        return True


def sound(state: Path) -> set[str]:
    """The digests that a database names, which is whole after a kill, with its audit."""
    with closing(sqlite3.connect(state / "fleet.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with closing(Registry(state / "fleet.db")) as registry:
        assert Ledger(registry).verify_audit()
        return set(registry.file_digests())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9")
def test_kill_at_any_moment_loses_no_release_that_was_acknowledged(
    folder: Path, state: Path
) -> None:
    kills = int(os.environ.get("OTA_KILLS", "12"))
    dice = random.Random(kills)  # noqa: S311 - the same moments each time
    uploaders = [Uploader(name, random.Random(name)) for name in PROJECTS]  # noqa: S311
    for turn in range(kills + 1):
        with fleet(folder) as script, ThreadPoolExecutor(3) as pool:
            for each in uploaders:
                wait_until(functools.partial(each.is_offered, script))
            digests = sound(state)
            left = {name for name in os.listdir(state / "files") if not name.endswith(".unnamed")}
            assert not digests or left == digests
            assert "Traceback" not in script.log
            if turn == kills:
                break
            timer = threading.Timer(dice.uniform(0.0, 0.3), script.process.kill)
            timer.start()
            for done in [pool.submit(each.work, script) for each in uploaders]:
                done.result(PATIENCE)
            assert script.process.wait(PATIENCE) == -signal.SIGKILL
        sound(state)
    assert sum(each.acknowledged for each in uploaders) > kills
