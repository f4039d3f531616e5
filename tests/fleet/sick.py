"""Servers that are sick in one way each: scripts that say what they answer to a request.

A Healthy one does everything right and is changed in one thing. What the doctor finds wrong with it
is asked for by codes().
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ota_fleet import probe
from ota_fleet.doctor import check, read_options
from ota_fleet.findings import Finding
from tests.data.make_images import esp32_image, esp8266_image

ROOT = Path(__file__).parents[2]
NEW = esp8266_image("blinds", "1.1.0")
NEW32 = esp32_image("sensor", "1.1.0")

Reply = Callable[[bytes], bytes]  # what a scripted server says to a request


def md5(data: bytes) -> str:
    """The value of x-MD5."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Healthy:
    """A server that does everything right; a row changes one thing."""

    image: bytes = NEW
    status: str = "200 OK"
    without: tuple[str, ...] = ()  # fields that are not sent
    more: tuple[str, ...] = ()  # fields that are sent too
    before: bytes = b""  # the status line
    cut: int = 0  # bytes of the body that are missing
    behind: bytes = b""  # the body
    newest: bool = True  # a device on 1.1.0 gets 304
    newest_by_md5: bool = False  # the same for one that runs the image
    head: str = ""  # status of HEAD
    ranges: bool = True
    needs: str = ""  # the token without which it says 401
    schemes: tuple[str, ...] = ("Basic", "Bearer")  # in which it is taken
    challenge: bool = True

    def __call__(self, asked: bytes) -> bytes:
        """The bytes of the answer."""
        if not self.admits(asked):
            challenge = ("WWW-Authenticate: Basic realm=x",) if self.challenge else ()
            return self.answer(asked, "401 Unauthorized", challenge, b"")
        known = self.newest and b"ersion: 1.1.0" in asked
        if known or (self.newest_by_md5 and md5(self.image).encode() in asked):
            return b"HTTP/1.1 304 Not Modified\r\n\r\n"
        if self.head and asked.startswith(b"HEAD"):
            return self.answer(asked, self.head, (), b"")
        span = re.search(rb"Range: bytes=(\d+)-(\d+)", asked)
        if span and self.ranges:
            part = self.image[int(span[1]) : int(span[2]) + 1]
            where = f"bytes {int(span[1])}-{int(span[2])}/{len(self.image)}"
            return self.answer(asked, "206 Partial", (f"Content-Range: {where}", *self.more), part)
        return self.answer(asked, self.status, self.more, self.image)

    def admits(self, asked: bytes) -> bool:
        """Whether the token is there, in a scheme that is taken."""
        values = [probe.authorization(self.needs, scheme) for scheme in self.schemes]
        return not self.needs or any(value.encode() in asked for value in values)

    def answer(self, asked: bytes, status: str, more: tuple[str, ...], body: bytes) -> bytes:
        """One response."""
        fields = [f"Content-Length: {len(body)}", f"x-MD5: {md5(body)}", "x-version: 1.1.0"]
        fields.append(f"x-SHA256: {hashlib.sha256(body).hexdigest()}")
        kept = [field for field in fields if field.partition(":")[0] not in self.without]
        head = "\r\n".join((f"HTTP/1.1 {status}", *kept, *more)).encode()
        body = b"" if asked.startswith(b"HEAD") else body[: len(body) - self.cut] + self.behind
        return self.before + head + b"\r\n\r\n" + body


@contextlib.contextmanager
def scripted(
    reply: Reply, tls: ssl.SSLContext | None = None, *, piece: int = 2000
) -> Iterator[int]:
    """The port of a server that answers each connection by the script and ends it.

    It sends this many bytes at once, which makes a TLS record.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):  # a client that leaves when it has seen enough
                    plain, _ = listener.accept()
                    plain.settimeout(5)
                    with plain if tls is None else tls.wrap_socket(plain, True) as connection:
                        _serve_one(connection, reply, piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            with contextlib.suppress(OSError):  # wakes accept()
                socket.create_connection(listener.getsockname(), 1).close()
            thread.join(10)


def _serve_one(connection: socket.socket, reply: Reply, piece: int) -> None:
    asked = b""
    while b"\r\n\r\n" not in asked and asked[:1] != b"\x16" and (data := connection.recv(4096)):
        asked += data
    answer = reply(asked) if asked else b""
    for start in range(0, len(answer), piece):
        connection.sendall(answer[start : start + piece])
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(4096):
        pass


def findings_of(url: str, *options: str, now: float | None = None) -> list[Finding]:
    """What the doctor finds."""
    return list(check(read_options([*options, url]), time.time() if now is None else now))


def codes_of(found: list[Finding]) -> set[str]:
    """What is wrong, or might be."""
    return {finding.code for finding in found if finding.level != "ok"}


def levels_of(found: list[Finding], code: str) -> set[str]:
    """How bad this is."""
    return {finding.level for finding in found if finding.code == code}


def codes(reply: Reply, *options: str) -> set[str]:
    """What the doctor finds wrong with a scripted server over plain HTTP."""
    with scripted(reply) as port:
        return codes_of(findings_of(f"http://127.0.0.1:{port}/blinds", "--timeout", "2", *options))
