"""The doctor's findings over plain HTTP, its own requests, its usage.

Each illness is a row; the healthy server from which it differs in one thing has no findings.
"""

from __future__ import annotations

import io
import re
import socket
import threading
from dataclasses import replace

import pytest

from ota_fleet import diagnosis, findings, probe
from ota_fleet.doctor import main
from ota_fleet.findings import CURES, WAITING, Finding
from ota_fleet.probe import Answer, Asked, Target, read_url, request
from tests.data.make_images import esp8266_image, gzip_image
from tests.devices import Esp32, Esp8266
from tests.fleet.sick import (
    NEW,
    NEW32,
    ROOT,
    Healthy,
    Reply,
    codes,
    codes_of,
    findings_of,
    md5,
    scripted,
)

HTML = b"<!DOCTYPE html><title>It works</title>"
OTHER_TIME = "Sat, 01 Jan 2000 00:00:00 GMT"

# -- 1. One illness each --------------------------------------------------------------------------


MOVED = Healthy(status="301 Moved", more=("Location: https://elsewhere/",))
VERSIONLESS = Healthy(
    status="400 Bad Request", image=b"no x-ESP8266-version or x-ESP32-version: which one runs?\n"
)
SICK: dict[str, Reply] = {
    "no-length": Healthy(without=("Content-Length",)),
    "compressed": Healthy(more=("Content-Encoding: gzip",)),
    "md5-missing": Healthy(without=("x-MD5",)),
    "md5-doubled": Healthy(more=(f"X-Md5: {md5(NEW)}",)),
    "md5-upper": Healthy(without=("x-MD5",), more=(f"x-MD5: {md5(NEW).upper()}",)),
    "md5-malformed": Healthy(without=("x-MD5",), more=(f'x-MD5: "{md5(NEW)}"',)),
    "md5-wrong": Healthy(without=("x-MD5",), more=(f"x-MD5: {md5(NEW32)}",)),
    "sha256-wrong": Healthy(without=("x-SHA256",), more=(f"x-SHA256: {'0' * 64}",)),
    "body-short": Healthy(cut=7),
    "body-long": Healthy(behind=b"\0"),
    "not-an-image": Healthy(image=HTML),
    "damaged": Healthy(image=NEW[:-20]),
    "wrong-chip": Healthy(image=NEW32),
    "redirect": MOVED,
    "unauthorized": Healthy(needs="t"),
    "forbidden": Healthy(status="403 Forbidden"),
    "not-found": Healthy(status="404 Not Found", image=b"no project 'blinds'\n"),
    "bad-request": Healthy(status="400 Bad Request", image=b"the head is strange\n"),
    "server-error": Healthy(status="502 Bad Gateway", image=HTML),
    "status": Healthy(status="204 No Content"),
    "interim": Healthy(before=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "not-http": lambda _: b"SSH-2.0-OpenSSH_9.2\r\n",
    "closed": lambda _: b"",
    "nothing-newer": Healthy(status="304 Not Modified", more=("X-OTA-Reason: too-big: no",)),
    "version-missing": Healthy(without=("x-version",)),
    "loop": Healthy(newest=False),
    "head": Healthy(head="405 Method Not Allowed"),
    "clock": Healthy(more=(f"Date: {OTHER_TIME}",)),
    "lost-request-header": VERSIONLESS,
}


@pytest.mark.parametrize("code", SICK)
def test_an_illness_is_found(code: str) -> None:
    assert code in codes(SICK[code], "--as", "esp8266")


def test_a_healthy_server_has_none_of_them() -> None:
    assert codes(Healthy(), "--as", "esp8266") == set()
    assert codes(Healthy(image=NEW32), "--as", "esp32") == set()
    assert codes(Healthy(image=gzip_image(NEW)), "--as", "esp8266") == set()
    assert codes(Healthy(image=NEW32), "--as", "esp-idf") == {"plain-http"}


def test_chunks_are_read_as_a_client_reads_them() -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (NEW[:99], NEW[99:], b""))
    chunked = Healthy(without=("Content-Length",), more=("Transfer-Encoding: chunked",))

    def reply(asked: bytes) -> bytes:
        head, _, rest = chunked(asked).partition(b"\r\n\r\n")
        return head + b"\r\n\r\n" + (body if rest else b"")

    assert codes(reply, "--as", "esp8266") == {"chunked"}


@pytest.mark.parametrize(
    ("code", "sick"),
    [
        pytest.param("range", Healthy(image=NEW32, ranges=False), id="range-ignored"),
        pytest.param(
            "range", Healthy(image=NEW32, more=("Content-Range: bytes 0-1/2",)), id="range-wrong"
        ),
        pytest.param("wrong-chip", Healthy(image=NEW), id="esp8266-image"),
        pytest.param("wrong-chip", Healthy(image=gzip_image(NEW)), id="packed"),
        pytest.param("version-needed", VERSIONLESS, id="needs-a-version"),
        pytest.param("redirect", MOVED, id="redirect"),
    ],
)
def test_an_illness_is_found_as_esp_idf(code: str, sick: Healthy) -> None:
    assert code in codes(sick, "--as", "esp-idf")


TOKEN = [
    pytest.param("token-wrong", Healthy(needs="other"), id="wrong"),
    pytest.param("token-basic", Healthy(needs="t", schemes=("Bearer",)), id="only-bearer"),
    pytest.param("token-bearer", Healthy(needs="t", schemes=("Basic",)), id="only-basic"),
    pytest.param("token-open", Healthy(), id="open"),
    pytest.param("no-challenge", Healthy(needs="t", challenge=False), id="no-challenge"),
]


@pytest.mark.parametrize(("code", "sick"), TOKEN)
def test_what_is_wrong_with_a_token_is_found(code: str, sick: Healthy) -> None:
    assert codes(sick, "--as", "esp8266", "--token", "t") == {code, "token-clear"}


def test_a_token_that_is_needed_and_taken_is_well() -> None:
    assert codes(Healthy(needs="t"), "--as", "esp8266", "--token", "t") == {"token-clear"}
    bearer = Healthy(image=NEW32, needs="t")
    assert codes(bearer, "--as", "esp-idf", "--token", "t") == {"token-clear", "plain-http"}
    only_basic = replace(bearer, schemes=("Basic",))
    found = codes(only_basic, "--as", "esp-idf", "--token", "t")
    assert found == {"token-bearer", "token-clear", "plain-http"}


def test_a_head_request_that_is_cut_off_is_a_finding_about_head() -> None:
    def reply(asked: bytes) -> bytes:
        return b"HTTP/1.1 200" if asked.startswith(b"HEAD") else Healthy()(asked)

    assert codes(reply, "--as", "esp8266") == {"head"}


def test_head_and_get_must_agree_about_the_length() -> None:
    def reply(asked: bytes) -> bytes:
        return Healthy(image=NEW + b"0" if asked.startswith(b"HEAD") else NEW)(asked)

    assert codes(reply, "--as", "esp8266") == {"head"}


def test_the_address_is_refused_unresolved_or_silent() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert codes_of(findings_of(f"http://127.0.0.1:{port}/x")) == {"refused"}
        assert codes_of(findings_of(f"https://127.0.0.1:{port}/x")) == {"refused"}
        bound.listen()
        assert codes_of(findings_of(f"http://127.0.0.1:{port}/x", "--timeout", ".05")) == {
            "timeout"
        }
        assert codes_of(findings_of(f"https://127.0.0.1:{port}/", "--timeout", ".05")) == {
            "timeout"
        }
    for host in ("no..name", "a!b"):
        assert codes_of(findings_of(f"http://{host}/x")) == {"name"}


@pytest.mark.parametrize("error", [ConnectionResetError(), OSError(113, "No route to host")])
def test_other_errors_have_a_code_too(error: OSError) -> None:
    finding = diagnosis.of_error(read_url("http://a/b"), error, 8)
    assert finding.code == ("closed" if isinstance(error, ConnectionError) else "unreachable")
    assert finding.level == "FAIL"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no x-ESP8266-version or x-ESP32-version: tell update() which one runs", True),
        ("Error: MAC is missing", True),
        ("?dev=<project>&ver=v1.2.3 and the MAC in x-ESP...-STA-MAC are needed", True),
        ("needs a version", True),
        ("MAC 5C:CF:7F:00:00:01 is not whitelisted", False),
        ("x-ESP8266-version: 'new' cannot be read", False),
    ],
)
def test_only_a_reason_that_misses_a_field_says_that_it_was_lost(text: str, code: bool) -> None:
    finding = diagnosis.of_status("esp8266", Answer(400, b"HTTP/1.1 400", (), text.encode()))
    assert finding.code == ("lost-request-header" if code else "bad-request")


def test_what_is_known_is_said_when_a_later_answer_does_not_come() -> None:
    def reply(asked: bytes) -> bytes:
        return Healthy()(asked) if b"x-ESP8266" in asked else b"HTTP/1.1 200 OK\r\n"

    assert codes(reply) == {"closed"}  # the head has no end
    with scripted(reply) as port:
        found = findings_of(f"http://127.0.0.1:{port}/blinds")
    assert ("ok", "image") in {(finding.level, finding.code) for finding in found}


def test_what_is_late_is_found() -> None:
    image = Answer(200, b"", (("Content-Length", str(len(NEW32))),), NEW32)
    late = replace(image, head_seconds=4.5, body_seconds=0.15)
    assert {"head-late", "body-late"} <= codes_of(list(diagnosis.of_answer("esp32", late)))
    assert "body-late" not in codes_of(list(diagnosis.of_answer("esp-idf", late)))
    assert not {"head-late", "body-late"} & codes_of(list(diagnosis.of_answer("esp32", image)))


def test_head_and_large_body_that_come_at_once_are_told_apart() -> None:
    large = esp8266_image("blinds", "1.1.0", payload=bytes(30_000))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(Healthy(image=large)(b"GET / HTTP/1.0"))
        theirs.shutdown(socket.SHUT_WR)
        answer = probe._read(probe.Link(ours), b"GET / HTTP/1.0", 0.0, 1e9)
    assert answer.status == 200
    assert answer.body == large


def test_the_time_between_head_and_body_is_measured() -> None:
    waiting = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            head, mark, body = Healthy()(b"GET").partition(b"\r\n\r\n")
            connection.sendall(head + mark)
            waiting.wait(0.11)  # what is measured
            connection.sendall(body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        target = read_url(f"http://127.0.0.1:{listener.getsockname()[1]}/blinds")
        answer = probe.ask(target, request("esp32", target, Asked()), 5)
        thread.join(10)
    assert answer.body == NEW
    assert answer.head_seconds < 0.1 < answer.body_seconds


def test_a_body_that_stalls_is_too_short() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(Healthy(cut=1)(b"GET"))
                done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        target = read_url(f"http://127.0.0.1:{listener.getsockname()[1]}/blinds")
        answer = probe.ask(target, request("esp32", target, Asked()), 0.1)
        done.set()
        thread.join(10)
    assert not answer.whole


def test_long_and_plain_urls_are_a_matter_of_esp_idf() -> None:
    long = read_url("https://host/" + "x" * 600)
    assert codes_of(list(diagnosis.of_url("esp-idf", long, ""))) == {"url-long"}
    assert codes_of(list(diagnosis.of_url("esp32", long, ""))) == set()
    query = read_url("http://host/blinds?token=t")
    assert codes_of(list(diagnosis.of_url("esp32", query, ""))) == {"token-clear"}


def test_no_sentence_holds_the_query_or_the_token() -> None:
    with scripted(Healthy(status="302 Found", more=("Location: http://x/?token=s3cret",))) as port:
        url = f"http://127.0.0.1:{port}/blinds?token=s3cret"
        out = io.StringIO()
        assert main(["--token", "s3cret", url], {}, out) == 1
    assert "redirect" in out.getvalue()
    assert "s3cret" not in out.getvalue()


# -- 2. What is sent ------------------------------------------------------------------------------


def names_of(head: bytes) -> list[bytes]:
    """The request line and the names of the fields, in their order."""
    first, *lines = head.split(b"\r\n")
    return [first, *(line.partition(b":")[0] for line in lines)]


def test_it_sends_what_the_emulated_devices_send() -> None:
    """Names, order and line ends; values that belong to one device differ."""
    target = read_url("https://127.0.0.1:8443/update")
    asked = Asked("1.0.0", probe.authorization("t", "Basic"))
    esp8266 = Esp8266(
        host="127.0.0.1", port=8443, image=esp8266_image("a", "1.0.0"), user="ota:t"
    ).request()
    esp32 = Esp32(host="127.0.0.1", port=8443, image=NEW32, user="ota:t").request()
    assert names_of(request("esp8266", target, asked)) == names_of(esp8266)
    assert names_of(request("esp32", target, asked)) == names_of(esp32)
    for line in (b"Host: 127.0.0.1:8443", b"Authorization: Basic b3RhOnQ=", b"Connection: close"):
        assert line in request("esp8266", target, asked).split(b"\r\n")
        assert line in esp8266.split(b"\r\n")


def test_esp_idf_sends_only_what_its_client_sends() -> None:
    sent = request("esp-idf", read_url("http://ota.example/b?version=1"), Asked("1.0.0"))
    assert sent == (
        b"GET /b?version=1 HTTP/1.1\r\nUser-Agent: ESP32 HTTP Client/1.0\r\n"
        b"Host: ota.example\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://ota.example", Target(False, "ota.example", 80, "/")),
        ("https://OTA.example/a?b=c#d", Target(True, "ota.example", 443, "/a?b=c")),
        ("http://[::1]:8000/a", Target(False, "::1", 8000, "/a")),
        ("http://bücher.example/a", Target(False, "xn--bcher-kva.example", 80, "/a")),
    ],
)
def test_a_url_is_taken_apart(url: str, target: Target) -> None:
    assert read_url(url) == target


def test_an_ipv6_address_stands_in_brackets_in_host() -> None:
    assert read_url("http://[::1]:8000/a").authority == "[::1]:8000"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ota.example/blinds"],
        ["ftp://ota.example/blinds"],
        ["http://user:pass@ota.example/"],
        ["http://ota.example/a b"],
        ["http://ota.example:99999/"],
        ["http://" + "ü" * 70 + "/"],
        ["--version", "new", "http://ota.example/"],
        ["--token", "ü", "http://ota.example/"],
        ["--token", "a\nb: c", "http://ota.example/"],
        ["--timeout", "0", "http://ota.example/"],
        ["--as", "avr", "http://ota.example/"],
        ["--cacert", "/nonexistent", "http://ota.example/"],
        ["--ca", "/nonexistent", "http://ota.example/"],
        ["--cacert", str(ROOT / "README.md"), "http://ota.example/"],
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    assert main(arguments, {}, out) == 2
    assert out.getvalue() == ""
    assert re.fullmatch("ota-server: .+\n", capsys.readouterr().err)


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == 0
    assert "--cacert" in capsys.readouterr().out


# -- 3. Promises ----------------------------------------------------------------------------------


def test_the_manual_names_every_code() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("## Ask as a device would")[2]
    named = {
        code
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for code in re.findall("`([a-z0-9-]+)`", row)
    }
    assert named == set(CURES)


def test_every_cure_belongs_to_a_finding_and_reverse() -> None:
    source = (ROOT / "ota_fleet" / "diagnosis.py").read_text()
    source += (ROOT / "ota_fleet" / "doctor.py").read_text()
    made = set(re.findall(r"""(?:fail|warn|level)\(\s*f?"([a-z0-9{}.()-]+)\"""", source))
    assert {code for code in made if "{" not in code} <= set(CURES)
    assert set(CURES) - {code for code in CURES if f'"{code}"' in source} == {
        "token-basic", "token-bearer",
    }  # fmt: skip


@pytest.mark.parametrize("code", [*WAITING, "not-newer"])
def test_what_the_rollout_says_has_a_cure_of_its_own(code: str) -> None:
    asked = Healthy(status="304 Not Modified", more=(f"X-OTA-Reason: {code}: no",))
    with scripted(asked) as port:
        (found,) = findings_of(f"http://127.0.0.1:{port}/lamp", "--as", "esp8266")
    assert found.code == "nothing-newer"
    assert found.cure == WAITING.get(code, CURES["nothing-newer"])


def test_a_cure_of_its_own_is_for_a_reason_that_there_is() -> None:
    reasons = re.findall("^\\| `([a-z-]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(WAITING) <= set(reasons)


def test_a_good_finding_has_no_cure() -> None:
    assert Finding("ok", "image", "fine").cure == ""
    assert findings.warn("loop", "again").cure == CURES["loop"]
