"""Who may ask for what: tokens, signed URLs, networks, and how many at once."""

from __future__ import annotations

import ast
import base64
import hashlib
import hmac
import html
import inspect
import json
import logging
import os
import re
import signal
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ota_server
from ota_server import (
    Access,
    Config,
    DirectoryCatalog,
    Image,
    Release,
    Reply,
    Report,
    Site,
    answer,
    parse_head,
)
from tests.conftest import put, wait_until
from tests.core.test_command_line import complaint, run
from tests.core.wire import dial, request, standing, started
from tests.data.make_images import esp32_image, esp8266_image, gzip_image

WORD = "t0ken"
KEY = b"0123456789abcdef0123456789abcdef"
SOON = 2_000_000_000  # UTC seconds, in 2033
PEER = "192.0.2.7"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW")
FORMS = (  # every way to ask for what belongs to a project; each must know which one that is
    "/{0}?version=0.1",
    "/{0}/?version=0.1",
    "/{0}//?version=0.1",
    "//{0}?version=0.1",
    "/{1}/{0}?version=0.1",
    "/{1}/{0}/?version=0.1",
    "/{0}.bin",
    "/{1}/{0}.bin",
    "/{0}.bin.md5",
    "/{0}/latest",
    "/{0}/latest.bin",
    "/{1}/{0}/latest.bin",
    "/{0}/latest.bin.sha256",
    "/{0}/versions",
    "/{0}/manifest.json",
    "/{0}/esp32fota.json",
    "/{1}/{0}/manifest.json",
    "/{0}-1.0.0.bin",
    "/{0}/{0}-1.0.0.bin",
    "/{1}/{0}-1.0.0.bin",
    "/{1}/x/{0}-1.0.0.bin",
    "/{1}/../{0}/{0}-1.0.0.bin",
    "/{1}/%2e%2e/{0}/{0}-1.0.0.bin",
    "/{1}%2F{0}%2F{0}-1.0.0.bin",
    "/%62%65%74%61/latest.bin",
    "/{0}-1.0.0.bin.md5",
    "/{1}/{0}-1.0.0.bin.sha256",
    "/firmware/{0}/{0}-1.0.0.bin",
    "//{0}//{0}-1.0.0.bin",
    "/update?dev={0}&ver=0.1",
    "/{1}/update?dev={0}&ver=0.1",
    "/update?ver=0.1&dev={0}&dev={1}",
    "/update?dev=%62%65%74%61&ver=0.1",
)
LISTS = ("/", "/_catalog", "/_catalog?op=list&path=/", "/esp32fota.json")
DEVICE = ("x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC",)


def site_with(folder: Path, **settings: Any) -> Site:
    """A site over a folder whose files are all checked, with these settings."""
    config = Config(dir=str(folder), host="127.0.0.1", port=0, **settings)
    catalog = DirectoryCatalog(config.dir, max_open=config.max_downloads)
    assert catalog.scan()
    return ota_server.build_site(config, catalog)


def ask(
    site: Site, target: str, *fields: str, method: str = "GET", peer: str = PEER, http: str = "1.1"
) -> Reply:
    """The reply to the bytes of a request; what the image holds stands in its body."""
    reply = answer(site, parse_head(request(target, *fields, method=method, http=http), peer))
    if not isinstance(reply.body, Image):
        return reply
    with reply.body.file as file:
        file.seek(reply.part.start)
        return reply._replace(body=file.read(len(reply.part)))


def text_of(reply: Reply) -> str:
    """The body of a reply."""
    assert isinstance(reply.body, bytes)
    return reply.body.decode()


def basic(user: str, password: str) -> str:
    """The field of RFC 7617."""
    coded = base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Authorization: Basic {coded}"


def bearer(token: str) -> str:
    """The field of RFC 6750."""
    return f"Authorization: Bearer {token}"


def with_token(target: str, token: str) -> str:
    """The target with ?token=."""
    return f"{target}{'&' if '?' in target else '?'}token={token}"


def signed(target: str, expires: int = SOON, key: bytes = KEY) -> str:
    """The target with its signature."""
    return ota_server.signed(key, f"http://ota{target}", expires).removeprefix("http://ota")


def refuses(reply: Reply) -> bool:
    """Whether this is the 401 that tells a client how to ask again."""
    challenge = ("WWW-Authenticate", 'Basic realm="ota-server"')
    return reply.status == 401 and challenge in reply.headers


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder of two projects, each in a folder of its own."""
    for project in ("alpha", "beta"):
        put(tmp_path / f"fw/{project}/{project}-1.0.0.bin", esp32_image(project, "1.0.0"))
    return tmp_path / "fw"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token for each project, and one for all."""
    path = tmp_path / "tokens.json"
    path.write_text('{"alpha": "a-token", "beta": "b-token", "*": "master"}')
    return path


@pytest.fixture
def site(shop: Path, tokens: Path) -> Site:
    """The shop, where each project has a token."""
    return site_with(shop, token_file=str(tokens))


# -- 1. Which token was given ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "fields", "status"),
    [
        pytest.param("", [bearer("t0ken")], 200, id="bearer"),
        pytest.param("", ["authorization: bEARER   t0ken"], 200, id="bearer-any-case-and-blanks"),
        pytest.param("", [basic("", "t0ken")], 200, id="basic-without-user"),
        pytest.param("", [basic("anybody", "t0ken")], 200, id="basic-any-user"),
        pytest.param("", [basic("\u00e4", "t0ken")], 200, id="basic-user-in-utf-8"),
        pytest.param("", [basic("u", "t0ken").replace("Basic", "bASIC")], 200, id="basic-any-case"),
        pytest.param("?token=t0ken", [], 200, id="query"),
        pytest.param("?token=%740k%65n", [], 200, id="query-percent-encoded"),
        pytest.param("?version=0.1&token=t0ken&x=1", [], 200, id="query-among-others"),
        pytest.param("?token=t0ken", [bearer("wrong")], 401, id="bearer-goes-before-the-query"),
        pytest.param("?token=wrong", [bearer("t0ken")], 200, id="bearer-wins-over-the-query"),
        pytest.param("?token=t0ken", [basic("u", "wrong")], 401, id="basic-goes-before-the-query"),
        pytest.param("?token=t0ken", ["Authorization: Digest x"], 200, id="other-scheme-and-query"),
        pytest.param("?token=wrong&token=t0ken", [], 401, id="first-of-two-counts"),
        pytest.param("?token=t0ken&token=wrong", [], 200, id="first-of-two-counts-too"),
        pytest.param("", [], 401, id="nothing"),
        pytest.param("", [bearer("T0KEN")], 401, id="other-case"),
        pytest.param("", [bearer("t0ke")], 401, id="prefix"),
        pytest.param("", [bearer("t0ken2")], 401, id="longer"),
        pytest.param("", [bearer("")], 401, id="bearer-empty"),
        pytest.param("", ["Authorization: Bearer"], 401, id="bearer-alone"),
        pytest.param("", ["Authorization: t0ken"], 401, id="token-without-scheme"),
        pytest.param("", ["Authorization: Token t0ken"], 401, id="unknown-scheme"),
        pytest.param("", [bearer("t\u00f6ken")], 401, id="bearer-latin-1"),
        pytest.param("", [basic("t0ken", "")], 401, id="basic-token-as-user"),
        pytest.param("", [basic("u:t0ken", "x")], 401, id="basic-two-colons"),
        pytest.param("", ["Authorization: Basic dDBrZW4="], 401, id="basic-without-colon"),
        pytest.param("", ["Authorization: Basic !"], 401, id="basic-no-base64"),
        pytest.param("", ["Authorization: Basic"], 401, id="basic-alone"),
        pytest.param("?token=", [], 401, id="query-empty"),
        pytest.param("?token", [], 401, id="query-without-value"),
        pytest.param("?Token=t0ken", [], 401, id="query-other-case"),
        pytest.param("?%74oken=t0ken", [], 401, id="query-coded-name"),
        pytest.param("?token=t0ken%00", [], 401, id="query-nul"),
        pytest.param("?token=%ff%fe", [], 401, id="query-no-utf-8"),
        pytest.param("?token=%ED%A0%80", [], 401, id="query-surrogate"),
    ],
)
def test_token_is_read_where_clients_put_it(
    query: str, fields: Sequence[str], status: int, shop: Path
) -> None:
    reply = ask(site_with(shop, token=WORD), f"/alpha/latest.bin{query}", *fields)
    assert reply.status == status
    assert refuses(reply) is (status == 401)


def test_two_authorization_fields_are_no_request() -> None:
    with pytest.raises(ota_server.Refused) as refused:
        parse_head(request("/", bearer("a"), bearer("b")), PEER)
    assert refused.value.status == 400


def test_token_and_file_of_tokens_go_together(shop: Path, tokens: Path) -> None:
    site = site_with(shop, token=WORD, token_file=str(tokens))
    for token in (WORD, "master", "a-token"):
        assert ask(site, "/alpha/latest.bin", bearer(token)).status == 200
    assert ask(site, "/beta/latest.bin", bearer("a-token")).status == 401


def test_secrets_are_compared_in_constant_time_only() -> None:
    source = inspect.getsource(ota_server)
    assert "functools.partial(hmac.compare_digest, given)" in inspect.getsource(Access)
    assert "if fits(token.encode())" in inspect.getsource(Access)
    assert "hmac.compare_digest(given, signature(" in inspect.getsource(ota_server.is_signed)
    assert source.count("compare_digest") == 2
    for function in (Access, ota_server.is_signed, ota_server.given_token):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Compare):
                names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                assert names.isdisjoint({"token", "given", "text", "sig"}), ast.unparse(node)


# -- 2. Nothing without one -----------------------------------------------------------------------

SAMPLES = {  # paths that each endpoint answers
    "page": ["/"],
    "health": ["/healthz"],
    "icon": ["/favicon.ico"],
    "autoconnect": ["/_catalog"],
    "esp32fota_all": ["/esp32fota.json"],
    "esp32fota": ["/alpha/esp32fota.json", "/none/esp32fota.json"],
    "manifest": ["/alpha/manifest.json", "/x/alpha/manifest.json"],
    "versions": ["/alpha/versions", "/none/versions"],
    "digest_line": ["/alpha/latest.bin.md5", "/alpha-1.0.0.bin.sha256", "/none.bin.md5"],
    "download": ["/alpha-1.0.0.bin", "/alpha/latest", "/alpha.bin", "/none.bin"],
    "platform_update": ["/update", "/x/update"],
    "update": [
        "/alpha",
        "/none",
        "/alpha/",
        "//",
        "/..",
        "/healthz/",
        "/favicon.ico/x",
        "/HEALTHZ",
    ],
}
OPEN = {"health", "icon"}
PLACES = [(name, path) for name, paths in SAMPLES.items() for path in paths]


def test_samples_reach_every_route_and_two_are_open(site: Site) -> None:
    assert list(SAMPLES) == [route.endpoint.__name__ for route in ota_server.ROUTES]
    for name, path in PLACES:
        assert site.route(path).endpoint.__name__ == name
    assert {r.endpoint.__name__ for r in ota_server.ROUTES if not r.guarded} == OPEN


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", ["nothing", "a wrong one"])
@pytest.mark.parametrize("kind", ["token", "file", "key"])
def test_nothing_but_health_and_icon_is_reachable_without_a_token(
    method: str, given: str, kind: str, shop: Path, tokens: Path
) -> None:
    settings = {"token": "t0ken", "file": str(tokens), "key": KEY}[kind]
    name = {"token": "token", "file": "token_file", "key": "sign_key"}[kind]
    site = site_with(shop, **{name: settings})
    fields = [bearer("wrong")] if given != "nothing" else []
    device = ("x-ESP32-version: 0.1", "x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC")
    for name, path in PLACES:
        for target in (path, f"{path}?dev=alpha&ver=0.1"):
            reply = ask(site, target, *fields, *device, method=method)
            if name in OPEN:
                assert reply.status == (200 if method in {"GET", "HEAD"} else 405)
            else:
                assert refuses(reply), (method, target, reply)
            assert (reply.body == b"") is (method == "HEAD")


def test_options_is_open_and_tells_only_methods(site: Site) -> None:
    for _, path in PLACES:
        reply = ask(site, path, method="OPTIONS")
        assert (reply.status, reply.body) == (204, b"")
        assert dict(reply.headers) == {
            "Allow": "GET, HEAD, OPTIONS",
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Headers": "Authorization, Range",
        }


@pytest.mark.parametrize("target", ["/nothing", "/alpha/nothing.bin", "/x/versions", "/x.bin.md5"])
def test_wrong_token_is_said_before_anything_else(target: str, site: Site) -> None:
    assert refuses(ask(site, target, bearer("wrong")))
    assert refuses(ask(site, target))
    assert ask(site, target, bearer("master")).status in {400, 404}
    assert refuses(ask(site, target, method="POST"))
    assert ask(site, target, bearer("master"), method="POST").status == 405


def test_refusal_says_what_is_missing(site: Site) -> None:
    assert "a token, or a signed URL, is needed" in text_of(ask(site, "/alpha"))
    assert "the token does not open this" in text_of(ask(site, "/alpha", bearer("wrong")))


def test_without_settings_everything_is_open(shop: Path) -> None:
    site = site_with(shop)
    assert ask(site, "/").status == 200
    assert ask(site, "/alpha/latest.bin?token=any", bearer("any")).status == 200


# -- 3. One token per project ---------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_token_opens_its_project_and_no_other_by_any_url(form: str, site: Site, shop: Path) -> None:
    target = form.format("beta", "alpha")
    image = (shop / "beta/beta-1.0.0.bin").read_bytes()
    for token in ("b-token", "master"):
        for field in ((bearer(token),), (basic("alpha", token),)):
            assert ask(site, target, *field, *DEVICE).status == 200, target
        reply = ask(site, with_token(target, token), *DEVICE)
        assert reply.status == 200
        kind = dict(reply.headers)["Content-Type"]
        assert kind != "application/octet-stream" or reply.body == image
    for method in METHODS:
        assert refuses(ask(site, target, bearer("a-token"), *DEVICE, method=method)), target
    assert refuses(ask(site, with_token(target, "a-token"), *DEVICE))
    assert refuses(ask(site, target, *DEVICE))


@pytest.mark.parametrize("target", LISTS)
def test_lists_of_all_projects_need_the_token_for_all(target: str, site: Site) -> None:
    assert refuses(ask(site, target, bearer("a-token")))
    assert refuses(ask(site, with_token(target, "b-token")))
    assert ask(site, target, bearer("master")).status == 200


def test_one_token_may_stand_for_several_projects(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{"alpha": "both", "beta": "both", "gamma": "other"}')
    site = site_with(shop, token_file=str(tmp_path / "t"))
    assert ask(site, "/alpha/latest.bin", bearer("both")).status == 200
    assert ask(site, "/beta/latest.bin", bearer("both")).status == 200
    assert refuses(ask(site, "/alpha/latest.bin", bearer("other")))
    assert ask(site, "/gamma/latest.bin", bearer("other")).status == 404


def test_file_in_a_projects_folder_is_of_that_project_whatever_its_name(
    shop: Path, tokens: Path
) -> None:
    stray = esp32_image("alpha", "3.0.0")
    put(shop / "alpha/beta-3.0.0.bin", stray)
    site = site_with(shop, token_file=str(tokens))
    assert ask(site, "/alpha/beta-3.0.0.bin", bearer("a-token")).body == stray
    assert refuses(ask(site, "/alpha/beta-3.0.0.bin", bearer("b-token")))
    assert refuses(ask(site, "/beta-3.0.0.bin", bearer("a-token")))
    assert ask(site, "/beta-3.0.0.bin", bearer("b-token")).status == 404


# Names that mean something in a URL, each a project with a token; what a guard takes for one of
# them must not be another one for an endpoint.
NAMES = (
    "alpha", "beta", "alpha-minimal", "x-minimal", "latest-minimal", "latest", "update", "versions",
    "esp32fota.json", "manifest.json", "_catalog", "healthz", "alpha.md5", "beta.bin", "a?b", "a%b",
)  # fmt: skip
PIECES = (
    *NAMES, "", ".", "..", "x", "latest.bin", "latest-minimal.bin", "latest.bin.gz", "favicon.ico",
    "alpha.bin", "latest-safeboot.bin", "alpha-1.0.0.bin", "x-minimal-1.3.0.bin", "beta-1.1.0.bin",
    "beta-1.1.0.bin.gz", "latest-minimal-1.4.0.bin", "alpha.zip", "1.1.0.bin",
)  # fmt: skip
QUERIES = ("", "version=0.1", "dev={0}&ver=0.1", "ver=0.1&dev={0}&dev={1}", "dev=&dev={0}&ver=0.1")
SPEAKERS: tuple[tuple[str, ...], ...] = (
    (),
    ("x-ESP8266-version: 0.1", "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56"),
    ("x-ESP8266-version: 0.1", "x-ESP8266-mode: version"),
    ("X-MGOS-FW-Version: esp8266 0.1 x", "X-MGOS-Device-ID: esp8266_AABBCC 5CCF7F123456"),
    ("Range: bytes=0-99",),
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, dict[str, set[str]]]:
    """A site with all these projects, and by project what must not leave for another one."""
    folder = tmp_path_factory.mktemp("many")
    secrets: dict[str, set[str]] = {}
    for index, name in enumerate(NAMES):
        version = f"1.{index}.0"
        stem = name.replace("/", "")
        image = esp8266_image(name, version, seed=index + 1)
        put(folder / name / f"{stem}-{version}.bin", image)
        put(folder / name / f"{stem}-{version}.bin.gz", gzip_image(image))
    put(folder / "alpha" / "beta-1.1.0.bin", esp8266_image("alpha", "1.1.0", seed=99))
    tokens = folder.parent / "tokens.json"
    tokens.write_text(json.dumps({name: f"token-{i}" for i, name in enumerate(NAMES)}))
    site = site_with(folder, token_file=str(tokens), sign_key=KEY)
    for name in NAMES:
        releases = site.catalog.releases(name)
        secrets[name] = {each.facts.sha256 for each in releases}
        secrets[name] |= {each.facts.md5 for each in releases}
    assert len(set().union(*secrets.values())) == sum(map(len, secrets.values()))
    return site, secrets


def told(reply: Reply) -> str:
    """All that a reply gives away, the digest of its body included."""
    body = reply.body if isinstance(reply.body, bytes) else b""
    return f"{reply.headers} {body.decode('latin-1')} {hashlib.sha256(body).hexdigest()}"


class Question(NamedTuple):
    """A request, as far as it is written by who asks."""

    target: str
    fields: tuple[str, ...] = ()
    method: str = "GET"


def question(pieces: list[str], end: str, query: str, names: tuple[str, str]) -> str:
    """The target of a request."""
    path = quote("/" + "/".join(pieces) + end)
    return f"{path}?{query.format(*map(quote, names))}"


QUESTIONS = st.builds(
    Question,
    target=st.builds(
        question,
        pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4),
        end=st.sampled_from(["", "/", "//", ".md5", ".sha256"]),
        query=st.sampled_from(QUERIES),
        names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    ),
    fields=st.sampled_from(SPEAKERS),
    method=st.sampled_from(["GET", "GET", "HEAD"]),
)


@settings(max_examples=300, deadline=None)  # the machine may be busy
@given(asked=QUESTIONS)
@example(asked=Question("/x/latest-minimal?version=0.1"))
@example(asked=Question("/x/latest-minimal/?version=0.1"))
@example(asked=Question("/esp32fota.json"))
@example(asked=Question("/_catalog"))
@example(asked=Question("/alpha/beta-1.1.0.bin"))
@example(asked=Question("/alpha/update?ver=0.1&dev=beta&dev=alpha", SPEAKERS[1]))
def test_only_what_belongs_to_a_tokens_project_leaves(
    asked: Question, many: tuple[Site, dict[str, set[str]]]
) -> None:
    site, secrets = many
    wire = parse_head(request(asked.target, *asked.fields, method=asked.method), PEER)
    endpoint = site.route(wire.path).endpoint.__name__
    owner = ota_server.read_path(site.catalog, wire).project
    for index, name in enumerate(NAMES):
        field = bearer(f"token-{index}")
        reply = ask(site, asked.target, field, *asked.fields, method=asked.method)
        assert reply.status < 500
        if reply.status == 401 or endpoint in OPEN:
            continue
        assert name == owner
        assert endpoint not in {"page", "autoconnect", "esp32fota_all"}
        given_away = told(reply)
        for other, digests in secrets.items():
            assert other == name or not any(digest in given_away for digest in digests)
        headers = dict(reply.headers)
        if reply.status == 200 and headers.get("Content-Type", "").endswith("octet-stream"):
            assert any(digest in given_away for digest in secrets[name])
        own = {f"1.{index}.0", "1.1.0" if name == "alpha" else "0.1.0", "0.1.0"}
        assert headers.get("x-version", "0.1.0") in own


# -- 4. The file of tokens ------------------------------------------------------------------------


def test_file_of_tokens_is_read_again_when_it_changes(site: Site, tokens: Path) -> None:
    assert ask(site, "/alpha/latest.bin", bearer("a-token")).status == 200
    tokens.write_text('{"alpha": "a-newer-token"}')
    assert refuses(ask(site, "/alpha/latest.bin", bearer("a-token")))
    assert refuses(ask(site, "/", bearer("master")))
    assert ask(site, "/alpha/latest.bin", bearer("a-newer-token")).status == 200


def test_file_of_tokens_may_be_replaced_by_rename(site: Site, tokens: Path) -> None:
    assert ask(site, "/alpha/latest.bin", bearer("a-token")).status == 200
    other = tokens.with_suffix(".new")
    other.write_text(tokens.read_text().replace("a-token", "A-token"))
    status = tokens.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    other.rename(tokens)
    assert refuses(ask(site, "/alpha/latest.bin", bearer("a-token")))
    assert ask(site, "/alpha/latest.bin", bearer("A-token")).status == 200


def test_file_may_hold_nothing_but_the_token(shop: Path, tokens: Path) -> None:
    tokens.write_text("  t0ken\n")
    site = site_with(shop, token_file=str(tokens))
    assert ask(site, "/", bearer("t0ken")).status == 200
    tokens.write_text('{"alpha": "a-token"}')
    assert refuses(ask(site, "/", bearer("t0ken")))


def remove(path: Path) -> None:
    """Deletes the file."""
    path.unlink()


BROKEN = [
    pytest.param(remove, id="removed"),
    pytest.param(lambda path: path.write_text(""), id="empty"),
    pytest.param(lambda path: path.write_text('{"alpha": "a-tok'), id="half-written"),
    pytest.param(lambda path: path.write_text('{"alpha": ""}'), id="empty-token"),
    pytest.param(lambda path: path.write_text('{"alpha": 5}'), id="number"),
    pytest.param(lambda path: path.write_text('{"alpha": ["a-token"]}'), id="list"),
    pytest.param(lambda path: path.write_text('{"alpha": "a token"}'), id="blank-inside"),
    pytest.param(lambda path: path.write_text('{"alpha": "t\u00f6ken"}'), id="not-ascii"),
    pytest.param(lambda path: path.write_text("two words"), id="two-words"),
    pytest.param(lambda path: path.write_bytes(b"\xff\xfe{}"), id="no-utf-8"),
]


@pytest.mark.parametrize("spoil", BROKEN)
def test_broken_file_of_tokens_opens_nothing_until_it_is_whole(
    spoil: Callable[[Path], object], site: Site, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tokens.read_text()
    spoil(tokens)
    for fields in ((), (bearer("a-token"),), (bearer("master"),), (bearer(""),)):
        reply = ask(site, "/alpha/latest.bin", *fields)
        assert reply.status == 503
        assert dict(reply.headers)["Retry-After"] == "30"
        assert "the tokens cannot be read" in text_of(reply)
    assert ask(site, "/healthz").status == 200
    tokens.write_text(whole)
    assert ask(site, "/alpha/latest.bin", bearer("a-token")).status == 200
    assert refuses(ask(site, "/beta/latest.bin", bearer("a-token")))
    assert f"--token-file {tokens}" in caplog.text
    assert "a-tok" not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("spoil", BROKEN)
def test_server_does_not_start_with_a_broken_file_of_tokens(
    spoil: Callable[[Path], object], shop: Path, tokens: Path
) -> None:
    spoil(tokens)
    with pytest.raises((OSError, ValueError)) as wrong:
        site_with(shop, token_file=str(tokens))
    assert "a-tok" not in str(wrong.value)


def test_file_with_no_project_in_it_opens_nothing(shop: Path, tokens: Path) -> None:
    tokens.write_text("{}")
    site = site_with(shop, token_file=str(tokens))
    assert refuses(ask(site, "/", bearer("")))
    assert refuses(ask(site, "/alpha/latest.bin?token="))


WRONG = [
    pytest.param(("--token", ""), "--token", id="empty"),
    pytest.param(("--token=",), "--token", id="empty-after-sign"),
    pytest.param(("--token", "--port", "0"), "--token", id="forgotten"),
    pytest.param(("--token-file", ""), "--token-file", id="no-name-of-a-file"),
    pytest.param(("--sign-key-file=",), "--sign-key-file", id="no-name-of-a-key"),
    pytest.param(("--allow", ""), "--allow", id="no-networks"),
    pytest.param(("--token-file", "empty.txt"), "empty.txt", id="empty-file"),
    pytest.param(("--token-file", "none.txt"), "none.txt", id="no-file"),
    pytest.param(("--token-file", "broken.txt"), "broken.txt", id="broken-file"),
    pytest.param(("--sign-key-file", "empty.txt"), "empty.txt", id="empty-key"),
    pytest.param(("--sign-key-file", "none.txt"), "none.txt", id="no-key"),
    pytest.param(("--no-certs", "--token", ""), "--token", id="s0-empty"),
    pytest.param(("--no-certs",), "--token", id="s0-none"),
    pytest.param(("--allow", "10.0.0.300"), "10.0.0.300", id="allow"),
    pytest.param(("--trust-proxy", "proxy.example"), "proxy.example", id="trust-proxy"),
    pytest.param(("--max-downloads", "few"), "'few'", id="max-downloads"),
    pytest.param(("--listing", "maybe"), "'maybe'", id="listing"),
    pytest.param(("--accel", "caddy"), "'caddy'", id="accel"),
    pytest.param(("--accel", "nginx:fw"), "'nginx:fw'", id="accel-without-slash"),
]


@pytest.mark.parametrize(("options", "word"), WRONG)
def test_what_would_leave_the_door_open_is_refused_at_start(
    options: Sequence[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.txt").write_text('{"alpha": "t0ken')
    here = [str(tmp_path / each) if each.endswith(".txt") else each for each in options]

    def start() -> None:
        config = ota_server.read_config([*here, "--dir", str(tmp_path)], {})
        ota_server._start(config, lambda: None)

    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("ota-server: ")
    assert said.count("\n") == 1
    assert word in said
    assert "t0ken" not in said


@pytest.mark.parametrize("name", ["TOKEN", "TOKEN_FILE", "SIGN_KEY_FILE", "ALLOW"])
def test_empty_guard_in_the_environment_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """OTA_TOKEN="$UNSET" would let everybody in."""
    with pytest.raises(SystemExit) as end:
        ota_server.read_config([], {f"OTA_{name}": ""})
    assert end.value.code == 2
    assert f"--{name.lower().replace('_', '-')}" in capsys.readouterr().err


def test_token_comes_from_the_environment_and_no_token_forgets_it(tmp_path: Path) -> None:
    environ = {"OTA_TOKEN": "t0ken", "OTA_TOKEN_FILE": "/x"}
    config = ota_server.read_config([], environ)
    assert (config.token, config.token_file) == ("t0ken", "/x")
    config = ota_server.read_config(["--no-token", "--no-certs"], environ)
    assert (config.token, config.token_file) == ("", "")
    key = tmp_path / "key"
    key.write_bytes(KEY + b"\n")
    assert ota_server.read_config([], {"OTA_SIGN_KEY_FILE": str(key)}).sign_key == KEY


# -- 5. Secrets stay inside -----------------------------------------------------------------------

SECRET = "".join(("s3cret", "/+~"))
CODED = "s3cret%2F%2B~"
BASIC = base64.b64encode(b"u:s3cret").decode()[4:]
HIDDEN = ("s3cret", BASIC, KEY.decode())


def failing(_report: Report, _release: Release) -> NoReturn:
    """A rule with a bug."""
    raise KeyError("a bug")


def no_secret_in(text: str) -> bool:
    """Whether none of the secrets stands there in any form."""
    return not any(secret in text for secret in HIDDEN)


def test_no_log_line_at_any_level_holds_a_token(
    shop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site = site_with(shop, token=SECRET, sign_key=KEY)
    broken = replace(site, rules=(failing,))
    signature = signed("/alpha/latest.bin", 1).rpartition("sig=")[2]
    with standing(site) as stand, standing(broken) as other:
        for field in (bearer(SECRET), basic("u", SECRET), bearer("s3cret"), "X: s3cret"):
            for _, path in PLACES:
                for target in (path, f"{path}?token={CODED}", f"{path}?dev=x&token={CODED}&sig=0"):
                    reply = ask(site, target, field)
                    assert "s3cret" not in str(reply.headers)
        for where in (stand, other):
            for target in ("/alpha", "/alpha/latest.bin", "/", "/alpha/manifest.json", "/none"):
                for method in ("GET", "HEAD", "POST", "OPTIONS"):
                    with where.dial() as wire:
                        query = f"?version=0.1&token={CODED}"
                        wire.ask(f"{target}{query}", "x-ESP32-version: 0.1", method=method)
            for raw in (
                f"GET /?token={CODED} HTTP/2.0\r\nHost: a\r\n\r\n",
                f"GET /?token={CODED} HTTP/1.1\r\n{bearer(SECRET)}\r\n{bearer(SECRET)}\r\n\r\n",
                f"GET /?token={CODED} HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n",
                f"GET /?token={CODED}\nHost: a\n\n",
                f"GET /?token={CODED} HTTP/1.1\r\nBad Field: s3cret\r\n\r\n",
                f"s3cret {'s3cret' * 2000}",
            ):
                with where.dial() as wire:
                    wire.send(raw.encode())
                    assert wire.reply().status in {400, 413, 431, 505}
    assert ask(site, f"/alpha/latest.bin?expires=1&sig={signature}").status == 403
    assert ask(broken, "/alpha", bearer(SECRET), "x-ESP32-version: 0.1").status == 500
    assert "KeyError" in caplog.text
    assert "refused, 401" in caplog.text
    assert no_secret_in(caplog.text)
    assert signature not in caplog.text


def test_no_repr_holds_a_secret(shop: Path) -> None:
    site = site_with(shop, token=SECRET, sign_key=KEY)
    for each in (site.config, site, Access(site.config, site.catalog), *site.guards):
        assert no_secret_in(repr(each))
        assert no_secret_in(f"{each}")


def test_real_process_that_debugs_logs_no_secret(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    options = ("--token", SECRET, "--sign-key-file", tmp_path / "key", "--log", "debug")
    place = ("--dir", shop, "--host", "127.0.0.1", "--port", "0")
    with started(tmp_path, *place, *options) as script:
        script.wait_for(f"/alpha/latest.bin?token={CODED}")
        with script.dial() as wire:
            assert wire.ask("/", bearer("wrong")).status == 401
            assert wire.ask(f"/nothing?token={CODED}").status == 404
            assert wire.ask("/alpha/manifest.json", bearer(SECRET)).status == 200
        assert script.end(signal.SIGTERM) == 0
        assert "refused, 401" in script.log
        assert no_secret_in(script.log + script.line)


# -- 6. Signed URLs -------------------------------------------------------------------------------


@pytest.fixture
def signing(shop: Path) -> Site:
    """The shop, where a URL must be signed or a token be given; it is in 2001."""
    site = site_with(shop, token=WORD, sign_key=KEY)
    return replace(site, guards=(Access(site.config, site.catalog, now=lambda: 1e9),))


GOOD = signed("/alpha/alpha-1.0.0.bin", 1_000_000_060)
SIG = GOOD.rpartition("&sig=")[2]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        pytest.param(GOOD, 200, id="good"),
        pytest.param(signed("/alpha/latest.bin?version=0.1"), 200, id="with-a-query"),
        pytest.param(signed("/update?dev=alpha&ver=0.1"), 200, id="s3"),
        pytest.param(signed("/alpha/alpha%2D1.0.0.bin"), 200, id="percent-encoded"),
        pytest.param(signed("/%61lpha/latest.bin").replace("%61", "a"), 200, id="decoded-later"),
        pytest.param(signed("/alpha/latest.bin").replace("/a", "/%61", 1), 200, id="coded-later"),
        pytest.param(signed("/alpha/latest.bin", 1_000_000_000), 200, id="last-second"),
        pytest.param(signed("/", 999_999_999), 403, id="expired"),
        pytest.param(signed("/", 0), 403, id="expired-for-ages"),
        pytest.param(signed("/nothing"), 404, id="good-but-nothing-there"),
        pytest.param(signed("/", key=b"another key of some length"), 403, id="other-key"),
        pytest.param(GOOD.replace("alpha-1", "beta-1"), 403, id="altered-path"),
        pytest.param(GOOD.replace("/alpha/", "/alpha//"), 403, id="altered-slashes"),
        pytest.param(GOOD.replace("/alpha/", "/Alpha/"), 403, id="altered-case"),
        pytest.param(GOOD.replace(".bin?", ".bin.md5?"), 403, id="altered-ending"),
        pytest.param(GOOD.replace("0060", "9960"), 403, id="altered-expires"),
        pytest.param(GOOD.replace("expires=1", "expires=%31"), 403, id="recoded-expires"),
        pytest.param(GOOD.replace("&sig", "&expires=2000000000&sig"), 403, id="second-expires"),
        pytest.param(GOOD.replace("?", "?expires=2000000000&"), 403, id="expires-in-front"),
        pytest.param(GOOD.replace("?", "?x=1&"), 403, id="parameter-in-front"),
        pytest.param(f"{GOOD}&x=1", 403, id="parameter-behind"),
        pytest.param(f"{GOOD}&token=wrong", 403, id="token-behind"),
        pytest.param(f"{GOOD}&", 403, id="ampersand-behind"),
        pytest.param(f"{GOOD}%00", 403, id="nul-behind"),
        pytest.param(f"{GOOD}&sig={SIG}", 403, id="sig-doubled"),
        pytest.param(f"{GOOD}&sig=", 403, id="empty-sig-behind"),
        pytest.param(GOOD.replace("sig=", "sig=0&sig="), 403, id="wrong-sig-in-front"),
        pytest.param(f"{GOOD[:-64]}{SIG.upper()}", 403, id="upper-case"),
        pytest.param(GOOD[:-1], 403, id="cut"),
        pytest.param(f"{GOOD[:-64]}{'0' * 64}", 403, id="zeros"),
        pytest.param(GOOD[:-64], 403, id="empty"),
        pytest.param(f"/alpha/alpha-1.0.0.bin?sig={SIG}&expires=1000000060", 401, id="sig-moved"),
        pytest.param(f"/alpha/alpha-1.0.0.bin?sig={SIG}", 401, id="sig-alone"),
        pytest.param(f"/alpha/alpha-1.0.0.bin?&sig={SIG}", 401, id="sig-of-nothing"),
        pytest.param(GOOD.replace("&sig", "&SIG"), 401, id="other-name"),
        pytest.param(GOOD.replace("&sig=", "&%73ig="), 401, id="coded-name"),
        pytest.param(f"{GOOD}?", 403, id="question-mark-behind"),
        pytest.param(signed("/update?dev=alpha").replace("alpha", "beta"), 403, id="other-dev"),
        pytest.param(GOOD.replace("alpha/alpha-1.0.0.bin", "update") + "&dev=beta", 403, id="dev"),
        pytest.param(GOOD.replace("?", "%3F"), 401, id="query-in-the-path"),
    ],
)
def test_signed_url_opens_what_was_signed_and_nothing_else(
    target: str, status: int, signing: Site
) -> None:
    device = ("x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC",)
    for method in ("GET", "HEAD"):
        reply = ask(signing, target, *device, method=method)
        assert reply.status == status
        assert refuses(reply) is (status == 401)
    if status == 200:
        assert ask(signing, target, *device, method="POST").status == 405


def test_bad_signature_is_said_even_to_who_has_a_token(signing: Site) -> None:
    reply = ask(signing, f"/alpha/latest.bin?expires=5&sig={'0' * 64}", bearer(WORD))
    assert reply.status == 403
    assert "does not belong to this URL" in text_of(reply)
    assert "was good until Sat, 01 Jan 2000" in text_of(ask(signing, signed("/", 946684800)))


def test_signature_of_a_script_without_time_is_not_taken(signing: Site) -> None:
    for query in ("x=1", "expires=", "expires=soon", "expires=-1", "expires=9&x", "x=expires=99"):
        code = ota_server.signature(KEY, "/alpha/latest.bin", query)
        reply = ask(signing, f"/alpha/latest.bin?{query}&sig={code}")
        assert reply.status == 403, query


def test_without_a_key_a_signature_means_nothing(shop: Path) -> None:
    assert ask(site_with(shop), f"{GOOD[:-3]}000").status == 200
    assert refuses(ask(site_with(shop, token=WORD), GOOD))
    assert ask(site_with(shop, token=WORD), f"{GOOD}&token=t0ken").status == 200


def test_key_alone_closes_everything_else(shop: Path) -> None:
    site = site_with(shop, sign_key=KEY)
    assert refuses(ask(site, "/alpha/latest.bin"))
    assert refuses(ask(site, "/alpha/latest.bin", bearer("")))
    assert ask(site, signed("/alpha/latest.bin")).status == 200


def test_signature_is_the_hmac_that_the_protocols_name() -> None:
    code = hmac.new(KEY, b"/lamp/latest.bin?version=1.0&expires=5", "sha256").hexdigest()
    url = ota_server.signed(KEY, "https://ota.example/lamp/latest.bin?version=1.0#top", 5)
    assert url == f"https://ota.example/lamp/latest.bin?version=1.0&expires=5&sig={code}"


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h", "/"),
        ("http://h?", "/"),
        ("http://h/", "/"),
        ("http://h//x//y", "//x//y"),
        ("https://[::1]:8000/a/b?c=d&e=f", "/a/b"),
        ("http://h/a;b?x", "/a;b"),
        ("http://h/%C3%A4%2Fb", "/%C3%A4/b"),
        ("http://h/%FF", "/%FF"),
        ("http://h/a?&x=1", "/a"),
    ],
)
def test_every_url_can_be_signed(url: str, target: str, shop: Path) -> None:
    result = ota_server.signed(KEY, url, SOON)
    query = result.partition("?")[2]
    assert ask(site_with(shop, sign_key=KEY), f"{target}?{query}").status in {200, 400, 404}


def test_signed_link_of_one_project_opens_no_other_by_a_question_mark_in_its_folder(
    shop: Path, tokens: Path
) -> None:
    # Whoever may read alpha's manifest chooses the folder in front of it, and gets it signed.
    site = site_with(shop, token_file=str(tokens), sign_key=KEY)
    for folder in ("/beta/latest.bin%3Fx=", "/beta%3F", "/update%3Fdev=beta&ver=0.1&x="):
        reply = ask(site, f"{folder}/alpha/manifest.json", bearer("a-token"))
        link = json.loads(text_of(reply))["builds"][0]["ota"]["path"].removeprefix("http://ota")
        assert ask(site, link).status == 200
        forged = ask(
            site, link.replace("?", "%26").replace("%3F", "?").replace("%26", "?"), *DEVICE
        )
        assert forged.status in {401, 403}, link


def test_no_host_breaks_a_signed_link(shop: Path) -> None:
    site = site_with(shop, token=WORD, sign_key=KEY)
    for host in ("[:]", "[1.2.3.4]", "a%zz", "-", "=", "[::1]:", "a,b"):
        for path in ("/alpha/manifest.json", "/", "/esp32fota.json", "/alpha/esp32fota.json"):
            head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{bearer('t0ken')}\r\n\r\n".encode()
            assert answer(site, parse_head(head, PEER)).status == 200, host


@settings(deadline=None)
@given(
    path=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x17F), max_size=12),
    query=st.text("ab=&?%/+", max_size=12),
)
def test_two_urls_share_a_signature_only_if_they_mean_the_same(path: str, query: str) -> None:
    whole = f"/{path}?{query}"
    splits = [
        (whole[:index], whole[index + 1 :]) for index, each in enumerate(whole) if each == "?"
    ]
    codes = {ota_server.signature(KEY, *split) for split in splits}
    assert len(codes) == len(set(splits))


# -- 7. The command that signs --------------------------------------------------------------------


def test_sign_prints_a_url_that_opens_one_image_of_a_real_server(
    shop: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    place = ("--dir", shop, "--host", "127.0.0.1", "--port", "0")
    with started(tmp_path, *place, "--sign-key-file", tmp_path / "key") as script:
        base = f"http://127.0.0.1:{script.port}"
        options = ("sign", f"{base}/alpha/latest.bin", "--sign-key-file", str(tmp_path / "key"))
        now = time.time()
        printed = run(tmp_path, *options)
        assert (printed.returncode, printed.stderr) == (0, "")
        url = printed.stdout.removesuffix("\n")
        match = re.fullmatch(r".+/alpha/latest\.bin\?expires=([0-9]+)&sig=[0-9a-f]{64}", url)
        assert match is not None
        assert 3600 - 60 < int(match[1]) - now < 3600 + 60
        target = url.removeprefix(base)
        image = (shop / "alpha/alpha-1.0.0.bin").read_bytes()
        assert script.wait_for(target).body == image
        with script.dial() as wire:
            assert wire.ask(target, method="HEAD").headers["content-length"] == str(len(image))
            assert wire.ask(target.replace("alpha", "beta")).status == 403
            assert wire.ask("/alpha/latest.bin").status == 401


def test_sign_takes_its_key_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(KEY)
    environ = {"OTA_SIGN_KEY_FILE": str(tmp_path / "key")}
    assert ota_server.sign(["https://h/a?b=c#d", "--seconds", "9"], environ) == 0
    url = capsys.readouterr().out
    expires = int(url.partition("expires=")[2].partition("&")[0])
    assert url == ota_server.signed(KEY, "https://h/a?b=c", expires) + "\n"
    assert 0 < expires - time.time() <= 9


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param((), "url", id="no-url"),
        pytest.param(("http://h/a",), "--sign-key-file", id="no-key"),
        pytest.param(("http://h/a", "--sign-key-file", "none"), "none", id="missing-key"),
        pytest.param(("http://h/a", "--sign-key-file", "short"), "openssl rand", id="short-key"),
        pytest.param(("/a", "--sign-key-file", "key"), "http://", id="path-only"),
        pytest.param(("ftp://h/a", "--sign-key-file", "key"), "http://", id="other-scheme"),
        pytest.param(("http://h/a", "--seconds", "-5"), "--seconds", id="negative"),
        pytest.param(("http://h/a", "--seconds", "soon"), "'soon'", id="word"),
        pytest.param(("http://h/a", "http://h/b"), "http://h/b", id="two-urls"),
        pytest.param(("http://h/a", "--key", "key"), "--key", id="unknown-option"),
    ],
)
def test_sign_says_in_one_line_what_is_wrong(
    options: Sequence[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "short").write_bytes(b"too short")
    here = [str(tmp_path / each) if each in {"key", "short", "none"} else each for each in options]
    with pytest.raises(SystemExit) as end:
        ota_server.sign(here, {})
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert re.fullmatch(r"ota-server: [^\n]+\n", said.err)
    assert word in said.err
    assert "too short" not in said.err


def test_sign_as_a_process_fails_with_a_line_and_status_2(tmp_path: Path) -> None:
    assert "--sign-key-file" in complaint(run(tmp_path, "sign", "http://h/a"))


# -- 8. Networks ----------------------------------------------------------------------------------


def allowed(text: str, **settings: Any) -> dict[str, Any]:
    """The settings of --allow, and of --trust-proxy."""
    found: dict[str, Any] = {"allow": ota_server._networks(text)}
    return found | {name: ota_server._networks(value) for name, value in settings.items()}


@pytest.mark.parametrize(
    ("networks", "peer", "status"),
    [
        pytest.param("192.0.2.0/24", "192.0.2.7", 200, id="v4"),
        pytest.param("192.0.2.7", "192.0.2.7", 200, id="v4-one-address"),
        pytest.param("192.0.2.9/24", "192.0.2.7", 200, id="v4-with-host-bits"),
        pytest.param("10.0.0.0/8, 192.0.2.0/24", "192.0.2.7", 200, id="second-of-two"),
        pytest.param("192.0.2.0/24", "192.0.3.7", 403, id="v4-outside"),
        pytest.param("2001:db8::/32", "2001:db8::1", 200, id="v6"),
        pytest.param("2001:db8::/32", "2001:db9::1", 403, id="v6-outside"),
        pytest.param("2001:db8::/32", "192.0.2.7", 403, id="v4-in-v6"),
        pytest.param("0.0.0.0/0", "2001:db8::1", 403, id="v6-in-v4"),
        pytest.param("fe80::/10", "fe80::1%eth0", 200, id="link-local-with-zone"),
        pytest.param("192.0.2.0/24", "::ffff:192.0.2.7", 200, id="v4-mapped"),
        pytest.param("192.0.2.0/24", "::ffff:192.0.3.7", 403, id="v4-mapped-outside"),
        pytest.param("192.0.2.0/24", "unix", 403, id="unix-socket-that-names-nobody"),
        pytest.param("192.0.2.0/24", "garbage", 403, id="no-address"),
    ],
)
def test_only_allowed_networks_may_ask(networks: str, peer: str, status: int, shop: Path) -> None:
    site = site_with(shop, **allowed(networks))
    for _, path in PLACES:
        open_ = path in {"/healthz", "/favicon.ico"}
        found = ask(site, path, peer=peer).status
        assert (found == 403) is (status == 403 and not open_), path
        assert ask(site, path, peer=peer, method="OPTIONS").status == 204
        assert (ask(site, path, peer=peer, method="PUT").status == 403) is (
            status == 403 and not open_
        )
    assert ask(site, "/alpha/latest.bin", peer=peer).status == status


@pytest.mark.parametrize(
    ("forwarded", "peer", "status"),
    [
        ("192.0.2.7", "10.0.0.1", 200),
        ("198.51.100.1", "10.0.0.1", 403),
        ("192.0.2.7, 198.51.100.1", "10.0.0.1", 403),  # the first one was written by the client
        ("198.51.100.1, 192.0.2.7", "10.0.0.1", 200),
        ("198.51.100.1, 192.0.2.7, 10.0.0.2", "10.0.0.1", 200),  # two proxies
        ("::ffff:192.0.2.7", "10.0.0.1", 200),  # nginx that listens on [::] writes it so
        ("192.0.2.7", "198.51.100.1", 403),  # no proxy of ours
        ("", "10.0.0.1", 403),  # the proxy itself
        ("garbage", "10.0.0.1", 403),
    ],
)
def test_networks_are_those_of_who_asked_the_proxy(
    forwarded: str, peer: str, status: int, shop: Path
) -> None:
    site = site_with(shop, **allowed("192.0.2.0/24", trust_proxy="10.0.0.0/8"))
    fields = [f"X-Forwarded-For: {forwarded}"] if forwarded else []
    assert ask(site, "/alpha/latest.bin", *fields, peer=peer).status == status


def test_allowed_peer_of_a_socket_for_both_families_is_known_by_its_v4_address(shop: Path) -> None:
    site = site_with(shop, **allowed("127.0.0.0/8"))
    site = replace(site, config=replace(site.config, host=""))
    with standing(site) as stand, dial(stand.port) as wire:
        assert wire.ask("/alpha/latest.bin").status == 200
    site = replace(site, guards=site_with(shop, **allowed("10.0.0.0/8")).guards)
    with standing(site) as stand, dial(stand.port) as wire:
        refused = wire.ask("/alpha/latest.bin")
    assert refused.status == 403
    assert refused.body == b"127.0.0.1 is in none of the networks that may ask\n"


def test_both_guards_must_be_passed(shop: Path) -> None:
    site = site_with(shop, token=WORD, sign_key=KEY, **allowed("192.0.2.0/24"))
    inside, outside = "192.0.2.7", "198.51.100.1"
    assert ask(site, "/alpha/latest.bin", bearer("t0ken"), peer=inside).status == 200
    assert ask(site, signed("/alpha/latest.bin"), peer=inside).status == 200
    assert ask(site, "/alpha/latest.bin", peer=inside).status == 401
    for target in ("/alpha/latest.bin", signed("/alpha/latest.bin"), "/nothing"):
        assert ask(site, target, bearer("t0ken"), peer=outside).status == 403


# -- 9. Links -------------------------------------------------------------------------------------


def links_in(reply: Reply) -> list[str]:
    """The targets of all links to images in a manifest or page."""
    found = re.findall(r'"(http://ota/[^"]+\.bin[^"]*)"', html.unescape(text_of(reply)))
    assert found
    return [url.removeprefix("http://ota") for url in found]


@pytest.fixture
def rich(shop: Path) -> Path:
    """The shop with release notes and names that need coding."""
    put(shop / "alpha/alpha-1.0.0.md", b"What is new")
    for name in ("a b", "\u00e4", "50%", "a&b", "q\"'<", "a?b", "a#b", "a+b"):
        put(shop / name / f"{name}-1.0.0.bin", esp32_image("odd", "1.0.0"))
    return shop


PAGES = ("/", "/x/alpha/manifest.json", "/alpha/esp32fota.json", "/esp32fota.json")


@pytest.mark.parametrize("path", PAGES)
def test_links_carry_a_signature_and_open(path: str, rich: Path) -> None:
    site = site_with(rich, token=WORD, sign_key=KEY)
    for reply in (ask(site, path, bearer("t0ken")), ask(site, f"{path}?token=t0ken")):
        for link in links_in(reply):
            assert "t0ken" not in link
            assert re.search(r"\?expires=[0-9]+&sig=[0-9a-f]{64}$", link)
            assert ask(site, link).status == 200
            assert ask(site, link.replace("-1.0.0", "-2.0.0")).status == 403
    assert all(ask(site, link).status == 200 for link in links_in(ask(site, signed(path))))


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("token", ["t0ken", "a&b=c%20/+?#d'\"<>"])
def test_links_carry_the_token_that_was_used_and_open(path: str, token: str, rich: Path) -> None:
    site = site_with(rich, token=token)
    for link in links_in(ask(site, f"{path}?x=1&token={quote(token)}")):
        assert link.endswith(f"?token={quote(token)}")
        assert ask(site, link).status == 200
    for link in links_in(ask(site, path, bearer(token))):
        assert "?" not in link
        assert ask(site, link, bearer(token)).status == 200


def test_release_url_of_a_manifest_carries_no_token(rich: Path) -> None:
    for access in ({"token": "t0ken"}, {"token": "t0ken", "sign_key": KEY}):
        reply = ask(site_with(rich, **access), "/alpha/manifest.json?token=t0ken")
        ota = json.loads(text_of(reply))["builds"][0]["ota"]
        assert ota["release_url"] == "http://ota/#alpha"
        assert ota["summary"] == "What is new"


def test_replies_with_signed_links_are_kept_by_no_cache(rich: Path) -> None:
    site = site_with(rich, token=WORD, sign_key=KEY)
    for path in PAGES:
        headers = dict(ask(site, path, bearer("t0ken")).headers)
        assert headers["Cache-Control"] in {"no-store", "no-cache"}


# -- 10. How many at once -------------------------------------------------------------------------


@pytest.fixture
def large(shop: Path) -> Path:
    """The shop with an image that no kernel buffers whole."""
    put(shop / "big-1.0.0.bin", esp32_image("big", "1.0.0", payload=bytes(1 << 20)))
    return shop


def test_only_so_many_downloads_run_at_once(large: Path) -> None:
    size = (large / "big-1.0.0.bin").stat().st_size
    with standing(site_with(large, max_downloads=2)) as stand, ExitStack() as stack:
        slow = [stack.enter_context(stand.dial(receive_buffer=4096)) for _ in range(2)]
        for wire in slow:
            wire.send(request("/big/latest.bin"))
            assert wire.head().status == 200
        with stand.dial() as wire:
            for target in ("/big/latest.bin", "/alpha/latest.bin", "/big-1.0.0.bin"):
                refused = wire.ask(target)
                assert (refused.status, refused.headers["retry-after"]) == (503, "30")
                assert "2 downloads are on their way" in refused.headers["x-ota-reason"]
            assert wire.ask("/healthz").status == 200
            assert wire.ask("/").status == 200
            assert wire.ask("/alpha/manifest.json").status == 200
            assert wire.ask("/alpha?version=1.0.0").status == 304
            slow[0].read(size)
            assert wire.ask("/alpha/latest.bin").status == 200  # one has ended
            assert wire.ask("/alpha/latest.bin").status == 200
            slow[0].send(request("/big/latest.bin"))
            assert slow[0].head().status == 200
            assert wire.ask("/alpha/latest.bin").status == 503
            slow[1].link.close()
            wait_until(lambda: wire.ask("/alpha/latest.bin").status == 200)  # one has broken off
            slow[0].read(size)


def test_what_sends_no_bytes_takes_no_turn(large: Path) -> None:
    site = site_with(large, max_downloads=1)
    for _ in range(3):
        etag = dict(ask(site, "/alpha/latest.bin", method="HEAD").headers)["ETag"]
        assert ask(site, "/alpha/latest.bin", f"If-None-Match: {etag}").status == 304
        assert ask(site, "/alpha/latest.bin", 'If-Match: "x"').status == 412
        assert ask(site, "/alpha/latest.bin", "Range: bytes=9999999-").status == 416
        assert ask(site, "/alpha/latest.bin").status == 200
    accel = site_with(large, max_downloads=1, accel="apache")
    assert [ask(accel, "/alpha/latest.bin").status for _ in range(3)] == [200] * 3


def test_failing_download_gives_its_turn_back(large: Path) -> None:
    with standing(site_with(large, max_downloads=1)) as stand:
        with stand.dial(receive_buffer=4096) as wire:
            wire.send(request("/big/latest.bin"))
            assert wire.head().status == 200
            (large / "big-1.0.0.bin").write_bytes(b"another one")
            wire.rest()
        with stand.dial() as wire:
            wait_until(lambda: wire.ask("/alpha/latest.bin").status == 200)


# -- 11. Pages of others, and lists ---------------------------------------------------------------

SHARED = (
    "/alpha/latest.bin", "/alpha/alpha-1.0.0.bin", "/alpha/latest.bin.md5", "/alpha/manifest.json",
    "/alpha/esp32fota.json", "/esp32fota.json", "/alpha/versions", "/alpha?version=0.1",
)  # fmt: skip


@pytest.mark.parametrize("origin", ["*", "https://web.esphome.io", ""])
def test_pages_of_others_may_read_images_and_manifests_unless_switched_off(
    origin: str, shop: Path
) -> None:
    site = site_with(shop, cors=origin)
    for target in SHARED:
        for method in ("GET", "HEAD", "OPTIONS"):
            headers = dict(ask(site, target, method=method).headers)
            assert headers.get("Access-Control-Allow-Origin", "") == origin
    for target in ("/", "/healthz", "/favicon.ico"):
        assert "Access-Control-Allow-Origin" not in dict(ask(site, target).headers)


def test_browser_may_ask_whether_it_may_send_a_token(shop: Path) -> None:
    site = site_with(shop, token=WORD, cors="https://flash.example")
    preflight = (
        "Origin: https://flash.example",
        "Access-Control-Request-Method: GET",
        "Access-Control-Request-Headers: authorization",
    )
    headers = dict(ask(site, "/alpha/manifest.json", *preflight, method="OPTIONS").headers)
    assert headers["Access-Control-Allow-Origin"] == "https://flash.example"
    assert "Authorization" in headers["Access-Control-Allow-Headers"]
    with standing(site) as stand, stand.dial() as wire:
        assert wire.ask("/alpha/manifest.json", *preflight, method="OPTIONS").status == 204
        assert wire.ask("/alpha/manifest.json", bearer("t0ken")).status == 200


@pytest.mark.parametrize("target", LISTS)
def test_lists_can_be_switched_off(target: str, shop: Path, tokens: Path) -> None:
    site = site_with(shop, listing=False)
    assert (ask(site, target).status, "switched off" in text_of(ask(site, target))) == (404, True)
    closed = site_with(shop, listing=False, token_file=str(tokens))
    assert ask(closed, target).status == 401
    assert ask(closed, target, bearer("master")).status == 404


def test_without_lists_everything_else_is_there(shop: Path) -> None:
    site = site_with(shop, listing=False)
    for target in (*SHARED[:5], *SHARED[6:], "/healthz", "/favicon.ico"):
        assert ask(site, target).status == 200


@pytest.mark.parametrize(
    ("options", "cors", "listing"),
    [
        ((), "*", True),
        (("--cors", "off", "--listing", "off"), "", False),
        (("--cors", "https://a.example", "--listing", "ON"), "https://a.example", True),
    ],
)
def test_cors_and_listing_are_options(options: Sequence[str], cors: str, *, listing: bool) -> None:
    config = ota_server.read_config(options, {})
    assert (config.cors, config.listing) == (cors, listing)
