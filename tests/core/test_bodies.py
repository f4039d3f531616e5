"""Bodies that a route takes: received by the loop into a file without a name."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ota_server import Limits, Refused, Reply, Request, Route, Site, text_reply, unnamed_file
from tests.conftest import site_of, wait_until
from tests.core.test_access import basic, bearer, site_with
from tests.core.wire import PATIENT, Stand, Wire, descriptors, request, standing

MOST = 1 << 20  # bytes
BODY = hashlib.shake_128(b"body").digest(200_000)
HURRIED = Limits(progress=0.3, linger=0.3, tick=0.02)


def told(body: bytes) -> str:
    """What the endpoint says of a body."""
    return f"{len(body)} {hashlib.sha256(body).hexdigest()}\n"


def take(_site: Site, request: Request) -> Reply:
    """An endpoint that looks at what came."""
    if request.body is None:
        return text_reply(200, "no body")
    body = request.body.read()
    assert len(body) == request.body_size
    return text_reply(200, told(body).strip())


def with_bodies(site: Site, state: Path) -> Site:
    """The site with a route that takes bodies, and a folder for them."""
    state.mkdir()
    methods = ("GET", "HEAD", "PUT", "DELETE")
    route = Route(re.compile("/take"), take, methods, blocking=True, body=MOST)
    config = replace(site.config, state=str(state))
    return replace(site, config=config, routes=(route, *site.routes))


@pytest.fixture(params=["http", "https"])
def ca(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    """The certificate to trust; None over HTTP."""
    return certificate if request.param == "https" else None


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Where bodies lie as long as they have no name."""
    return tmp_path / "state"


@pytest.fixture
def site(folder: Path, state: Path) -> Site:
    """A site that takes bodies."""
    return with_bodies(site_of(folder), state)


@contextmanager
def talking(site: Site, ca: Path | None = None, limits: Limits = PATIENT) -> Iterator[Wire]:
    """A connection to a server that ends with it, in whose folder nothing stays."""
    before = descriptors()
    with standing(site, ca, limits=limits) as stand:
        with stand.dial() as wire:
            yield wire
        assert stand.is_fine()
    assert os.listdir(site.config.state) == []
    wait_until(lambda: descriptors() <= before)


def head(*fields: str, size: int | None = len(BODY), method: str = "PUT") -> bytes:
    """The head of a request with a body."""
    length = () if size is None else (f"Content-Length: {size}",)
    return request("/take", *length, *fields, method=method)


# -- 1. Bodies that come --------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 1000, 8192, 65536, len(BODY)])
def test_body_arrives_whole_in_whatever_pieces_it_came(
    piece: int, site: Site, ca: Path | None
) -> None:
    body = BODY[: min(len(BODY), 1000 * piece)]
    with talking(site, ca) as wire:
        wire.send(head(size=len(body)))
        for start in range(0, len(body), piece):
            wire.send(body[start : start + piece])
        assert wire.reply().body.decode() == told(body)


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, MOST])
def test_body_of_any_size_up_to_the_most_is_taken(size: int, site: Site, ca: Path | None) -> None:
    body = bytes(size)
    with talking(site, ca) as wire:
        wire.send(head(size=size) + body)
        answer = wire.reply()
        assert (answer.status, answer.body.decode(), answer.closes) == (200, told(body), False)


def test_request_behind_a_body_is_the_next_one(site: Site, ca: Path | None) -> None:
    with talking(site, ca) as wire:
        bodies = [BODY[:5], BODY[:100_000], b"", BODY[:1]]
        wire.send(b"".join(head(size=len(body)) + body for body in bodies) + request("/firmware/"))
        assert [wire.reply().body.decode() for _ in bodies] == [told(body) for body in bodies]
        assert wire.reply().status == 400  # a check without a version


def test_client_that_expects_100_continue_is_told_to_send(site: Site, ca: Path | None) -> None:
    with talking(site, ca) as wire:
        wire.send(head("Expect: 100-continue"))
        assert wire.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(BODY)
        answer = wire.reply()
        assert (answer.status, answer.body.decode()) == (200, told(BODY))


def test_check_is_answered_while_a_body_is_still_coming(site: Site) -> None:
    with standing(site) as stand, stand.dial() as wire:
        wire.send(head() + BODY[:100])
        assert stand.is_fine()
        wire.send(BODY[100:])
        assert wire.reply().body.decode() == told(BODY)


def test_body_that_says_it_is_as_it_is_is_taken(site: Site) -> None:
    with talking(site) as wire:
        wire.send(head("Content-Encoding: Identity", size=3) + b"abc")
        assert wire.reply().body.decode() == told(b"abc")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_body_that_means_nothing_is_dropped(method: str, site: Site, ca: Path | None) -> None:
    with talking(site, ca) as wire:
        wire.send(head(size=44, method=method) + bytes(44))
        assert wire.reply().body == b"no body\n"
        wire.send(head(size=None, method=method))
        assert wire.reply().body == b"no body\n"


def test_body_lies_in_a_file_without_a_name(tmp_path: Path) -> None:
    with unnamed_file(str(tmp_path)) as file:
        file.write(b"abc")
        file.seek(0)
        assert (file.read(), os.listdir(tmp_path)) == (b"abc", [])


@pytest.mark.skipif(sys.platform != "linux", reason="needs O_TMPFILE")
def test_file_without_a_name_can_be_given_one(tmp_path: Path) -> None:
    with unnamed_file(str(tmp_path)) as file:
        file.write(b"abc")
        file.flush()
        os.link(f"/proc/self/fd/{file.fileno()}", tmp_path / "named", src_dir_fd=file.fileno())
    assert (tmp_path / "named").read_bytes() == b"abc"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc takes no file anywhere")
def test_folder_that_takes_no_file_is_an_error() -> None:
    with pytest.raises(OSError, match=r"\w"):
        unnamed_file("/proc/self")


# -- 2. Bodies that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(head(size=None), 411, id="no-length"),
        pytest.param(head("Content-Range: bytes 0-1/9"), 400, id="a-part"),
        pytest.param(head("Content-Encoding: gzip"), 415, id="packed"),
        pytest.param(head("Expect: 100-continue", "content-encoding: x"), 415, id="odd-coding"),
        pytest.param(head(size=MOST + 1), 413, id="too-long"),
        pytest.param(head("Expect: 100-continue", size=MOST + 1), 413, id="too-long-and-expects"),
        pytest.param(head("Expect: 100-continue", size=None), 411, id="no-length-and-expects"),
        pytest.param(head(size=MOST + 1) + bytes(MOST + 1), 413, id="too-long-and-sent"),
        pytest.param(head("Transfer-Encoding: chunked", size=None), 501, id="chunked"),
        pytest.param(head("Transfer-Encoding: chunked"), 400, id="chunked-with-length"),
        pytest.param(head("Content-Length: 3"), 400, id="two-lengths"),
        pytest.param(head(size=-1), 400, id="negative"),
        pytest.param(request("/take", "Content-Length: 9", method="POST"), 405, id="no-method"),
        pytest.param(request("/take", "Content-Length: 9", method="BREW"), 405, id="odd-method"),
        pytest.param(
            request("/healthz", "Content-Length: 9000", method="PUT"), 413, id="elsewhere"
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_readably(
    sent: bytes, status: int, site: Site, ca: Path | None
) -> None:
    with talking(site, ca, HURRIED) as wire:
        wire.send(sent if status != 405 else sent + bytes(9))
        assert wire.reply().status == status


@pytest.mark.parametrize(
    ("fields", "settings", "status"),
    [
        pytest.param((), {"token": "good"}, 401, id="no-token"),
        pytest.param((bearer("bad"),), {"token": "good"}, 401, id="wrong-token"),
        pytest.param((basic("any", "bad"),), {"token": "good"}, 401, id="wrong-password"),
        pytest.param((), {"allow": ()}, 200, id="open"),
        pytest.param((bearer("good"),), {"token": "good"}, 200, id="token"),
    ],
)
def test_who_may_not_ask_is_told_before_the_body(
    fields: tuple[str, ...],
    settings: dict[str, Any],
    status: int,
    folder: Path,
    state: Path,
) -> None:
    site = with_bodies(site_with(folder, **settings), state)
    with standing(site, limits=HURRIED) as stand, stand.dial() as wire:
        wire.send(head("Expect: 100-continue", *fields))
        if status == 200:
            assert wire.read(25).startswith(b"HTTP/1.1 100 ")
            wire.send(BODY)
        assert wire.reply().status == status


def test_guard_that_forbids_is_asked_before_the_body(site: Site) -> None:
    def forbid(_: Request) -> None:
        raise Refused(403, "not you")

    shut = replace(site, guards=(forbid,))
    with standing(shut, limits=HURRIED) as stand, stand.dial() as wire:
        wire.send(head())
        assert wire.reply().status == 403


# -- 3. Bodies that never come whole --------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, 9000], ids=lambda sent: f"after-{sent}")
def test_body_that_stops_coming_is_given_up(sent: int, site: Site, ca: Path | None) -> None:
    with standing(site, ca, limits=HURRIED) as stand, stand.dial() as wire:
        wire.send(head() + BODY[:sent])
        assert wire.rest() == b""
        assert stand.is_fine()
    assert os.listdir(site.config.state) == []


def test_body_that_trickles_is_cut_at_its_deadline(site: Site) -> None:
    with standing(site, limits=HURRIED) as stand, stand.dial() as wire:
        wire.send(head(size=1000))
        wire.link.settimeout(0.05)  # a byte in that time is progress, but less than MIN_RATE
        for _ in range(200):
            with suppress(TimeoutError, ConnectionError):
                wire.send(b"x")
                if wire.link.recv(1) == b"":
                    break
                pytest.fail("there was an answer")
            if ended(wire.link):
                break
        else:
            pytest.fail("it was never cut")
        assert stand.is_fine()


def ended(link: socket.socket) -> bool:
    """Whether the server has ended the connection."""
    try:
        link.sendall(b"x")
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("sent", [0, 1, 9000, len(BODY) - 1], ids=lambda sent: f"after-{sent}")
def test_body_that_breaks_off_leaves_nothing(sent: int, site: Site, ca: Path | None) -> None:
    with talking(site, ca) as wire:
        wire.send(head() + BODY[:sent])
        if isinstance(wire.link, ssl.SSLSocket):
            with suppress(OSError):
                wire.link.unwrap()
        else:
            wire.link.shutdown(socket.SHUT_WR)
            assert wire.reply().status == 400


def test_server_that_ends_drops_what_is_coming(site: Site) -> None:
    with standing(site) as stand, stand.dial() as wire:
        wire.send(head() + BODY[:9000])
        assert stand.is_fine()
    assert os.listdir(site.config.state) == []


# -- 4. A full disk -------------------------------------------------------------------------------


def put(stand: Stand, body: bytes) -> int:
    """The status for a body on a connection of its own."""
    with stand.dial() as wire:
        wire.send(head(size=len(body)) + body)
        return wire.reply().status


def test_full_disk_is_507_and_room_comes_back(
    folder: Path, small_disk: Path, ca: Path | None
) -> None:
    site = with_bodies(site_of(folder), small_disk / "state")
    with standing(site, ca) as stand:
        for _ in range(3):
            assert put(stand, bytes(MOST)) == 507
            assert put(stand, bytes(100_000)) == 200
        assert os.statvfs(small_disk).f_bavail >= 60
        assert stand.is_fine()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of this kind")
def test_limit_of_file_sizes_is_507(site: Site) -> None:
    import resource  # noqa: PLC0415 - Windows has none

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    with standing(site) as stand:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            assert put(stand, BODY) == 507
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert put(stand, BODY) == 200


# -- 5. A folder that is gone ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, len(BODY)])
def test_folder_that_is_gone_is_503_and_told_once(
    size: int, site: Site, state: Path, lines: Callable[[str], list[str]]
) -> None:
    state.rmdir()
    with standing(site) as stand:
        for _ in range(3):
            with stand.dial() as wire:
                wire.send(head(size=size) + BODY[:size])
                answer = wire.reply()
                assert (answer.status, answer.headers["retry-after"]) == (503, "30")
                assert answer.body == b"the state folder cannot be written: see the log\n"
        assert stand.is_fine()
        (line,) = lines("ERROR")
        assert line.startswith("ERROR the state folder cannot be written: [Errno 2] No such file")
        state.mkdir()
        assert put(stand, BODY) == 200


def test_short_body_of_a_route_of_short_ones_needs_no_disk(site: Site, state: Path) -> None:
    notes = Route(re.compile("/notes"), take, ("PUT",), body=1 << 16)
    state.rmdir()
    with standing(replace(site, routes=(notes, *site.routes))) as stand, stand.dial() as wire:
        for size in (0, 1, 8192):
            wire.send(request("/notes", f"Content-Length: {size}", method="PUT") + BODY[:size])
            assert wire.reply().body.decode() == told(BODY[:size])


# -- 6. What comes behind -------------------------------------------------------------------------


def test_refused_line_is_not_answered_in_the_form_of_the_path_before(site: Site) -> None:
    def refusal(refused: Refused, path: str) -> Reply:
        return text_reply(refused.status, f"for {path or 'nobody'}")

    with talking(replace(site, refusal=refusal)) as wire:
        assert wire.ask("/firmware").body == b"for /firmware\n"
        wire.send(b"GET /firmware HTTP/1.1\r\n\r\n")
        assert wire.reply().body == b"for nobody\n"
