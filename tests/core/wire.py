"""What the dialogues share: a client that reads replies strictly, the real script as a process."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ota_server
from ota_server import Limits, Server, Site
from tests.conftest import running, wait_until

PATIENCE = 10.0  # seconds that a client waits for anything
PATIENT = Limits(tick=0.02)  # no deadline comes near a test; the clock is looked at often
SCRIPT = Path(ota_server.__file__)


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply as it came."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    @property
    def closes(self) -> bool:
        """Whether the server announced that it closes."""
        return self.headers["connection"] == "close"


@dataclass(slots=True)
class Wire:
    """A client that writes what it is told and reads replies as RFC 9112 says, never chunked."""

    link: socket.socket
    buffer: bytes = b""  # received, not yet read

    def send(self, data: bytes) -> None:
        """Sends these bytes."""
        self.link.sendall(data)

    def ask(self, path: str = "/healthz", *fields: str, method: str = "GET") -> Answer:
        """The reply to one request of HTTP/1.1."""
        self.send(request(path, *fields, method=method))
        return self.reply(method)

    def check(self, version: str = "1.0.0") -> Answer:
        """The reply to an update check for /firmware."""
        return self.ask("/firmware", f"x-ESP8266-version: {version}")

    def head(self) -> Answer:
        """The next reply without its body. EOFError: the connection ended before it."""
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a field came twice: {lines}"
        assert "transfer-encoding" not in headers, "devices do not read chunks"
        assert headers["connection"] in {"close", "keep-alive"}
        return Answer(int(first[9:12]), headers)

    def reply(self, method: str = "GET") -> Answer:
        """The next reply with its body. EOFError: the connection ended before it."""
        head = self.head()
        if method == "HEAD" or head.status in {204, 304}:
            return head
        return Answer(head.status, head.headers, self.read(int(head.headers["content-length"])))

    def read(self, count: int) -> bytes:
        """Exactly that many bytes. EOFError: the connection ended before."""
        while len(self.buffer) < count:
            self._fill()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def rest(self) -> bytes:
        """All bytes until the server ends the connection, however it does. TimeoutError: never."""
        pieces = [self.buffer]
        self.buffer = b""
        while piece := self._receive():
            pieces.append(piece)
        return b"".join(pieces)

    def _fill(self) -> None:
        piece = self._receive()
        if not piece:
            raise EOFError(self.buffer[:200])
        self.buffer += piece

    def _receive(self) -> bytes:
        try:
            return self.link.recv(65536)
        except (ConnectionError, ssl.SSLEOFError):
            return b""


def request(path: str = "/healthz", *fields: str, method: str = "GET", http: str = "1.1") -> bytes:
    """The bytes of one request."""
    lines = (f"{method} {path} HTTP/{http}", "Host: ota", *fields, "", "")
    return "\r\n".join(lines).encode("latin-1")


@contextmanager
def dial(
    port: int, ca: Path | None = None, *, receive_buffer: int = 0, host: str = "127.0.0.1"
) -> Iterator[Wire]:
    """A connection, by TLS if there is a certificate to trust, closed at the end.

    With a small `receive_buffer` (bytes) a client that does not read stops the server soon.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as link:
        link.settimeout(PATIENCE)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        link.connect((host, port))
        if ca is None:
            yield Wire(link)
            return
        with client_context(ca).wrap_socket(link, server_hostname=host) as secure:
            yield Wire(secure)


def client_context(ca: Path) -> ssl.SSLContext:
    """A strict client's: it trusts only this certificate, and only for its names."""
    return ssl.create_default_context(cafile=ca)


@dataclass(frozen=True, slots=True)
class Stand:
    """A running server, and how to reach it."""

    server: Server
    ca: Path | None  # None: plain HTTP

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.server_port

    @contextmanager
    def dial(self, *, receive_buffer: int = 0) -> Iterator[Wire]:
        """A connection to it."""
        with dial(self.port, self.ca, receive_buffer=receive_buffer) as wire:
            yield wire

    def is_fine(self) -> bool:
        """Whether a device that asks now gets its image."""
        with self.dial() as wire:
            return wire.check().status == 200


@contextmanager
def standing(site: Site, ca: Path | None = None, **options: Any) -> Iterator[Stand]:
    """A server in this process, by TLS if there is a certificate; `options` go to Server."""
    options.setdefault("limits", PATIENT)
    tls = ota_server.tls_context(str(ca), "") if ca else None
    with running(site, tls=tls, **options) as server:
        yield Stand(server, ca)


@dataclass(slots=True)
class Script:
    """ota_server.py, running as a process of its own."""

    process: subprocess.Popen[str]
    log_path: Path
    line: str = ""  # the one it prints at start
    ca: Path | None = None
    port: int = field(default=0)

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self.log_path.read_text(errors="surrogateescape")

    @contextmanager
    def dial(self, *, receive_buffer: int = 0) -> Iterator[Wire]:
        """A connection to it."""
        with dial(self.port, self.ca, receive_buffer=receive_buffer) as wire:
            yield wire

    def wait_for(self, path: str, *fields: str, status: int = 200) -> Answer:
        """The first reply with this status, as files are checked while the server runs."""
        answers: list[Answer] = []

        def came() -> bool:
            with self.dial() as wire:
                answers.append(wire.ask(path, *fields))
            return answers[-1].status == status

        wait_until(came)
        return answers[-1]

    def end(self, signal: int) -> int:
        """Sends the signal; gives back the exit status."""
        self.process.send_signal(signal)
        return self.process.wait(PATIENCE)


S = TypeVar("S", bound=Script)


def copy_of_script(directory: Path) -> Path:
    """The script alone in an empty folder, as on a Pi."""
    folder = directory / "alone"
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(SCRIPT, folder))


@contextmanager
def launched(
    kind: type[S],
    directory: Path,
    command: Sequence[str],
    env: Mapping[str, str],
    ca: Path | None = None,
) -> Iterator[S]:
    """What a command starts, once it has said where it listens."""
    log_path = directory / "log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="surrogateescape",
            cwd=directory,
        )
    with process:
        try:
            assert process.stdout is not None
            script = kind(process, log_path, process.stdout.readline(), ca)
            assert script.line, script.log
            port = script.line.partition("/ serves ")[0].rpartition(":")[2]
            script.port = int(port) if port.isdecimal() else 0  # a unix socket has none
            yield script
        finally:
            process.kill()


@contextmanager
def started(
    directory: Path,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    ca: Path | None = None,
) -> Iterator[Script]:
    """The real script, copied alone into `directory`, once it has said where it listens.

    `before` comes before the command; without `env` there is no environment at all.
    """
    command = [*before, sys.executable, "-I", str(copy_of_script(directory)), *map(str, options)]
    with launched(Script, directory, command, env or {}, ca) as script:
        yield script


def descriptors() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/dev/fd"))
