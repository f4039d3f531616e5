"""Starts the servers that are compared, each on loopback with a free port, and reads what they use.

All of them run on one core, the load on another. A server's figures are those of its whole process
tree; CPU time comes from the kernel's clock of each process, which counts nanoseconds and includes
threads that have ended (utime and stime of /proc would be rounded to 10 ms).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.data.make_images import esp8266_image

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 120  # the longest a server may take until it answers
STOP_SECONDS = 20  # the longest it may take to end; then it is killed
IMAGES = {"update": 0, "small": 400_000, "medium": 1_000_000, "large": 4_000_000}  # bytes, about
NEWEST = "2.0.0"  # version of each image
STALE = "1.0.0"  # what a device runs that gets the image
FREE_SPACE = {"update": "1794048", "small": "1794048", "medium": "1794048", "large": "8388608"}

NGINX_HTTP = """
daemon off;
{user}worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections {connections}; multi_accept on; }}
http {{
    access_log {access_log};
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    server_tokens off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    map $http_x_esp8266_version $stays {{ default 0; "{newest}" 1; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096{ssl};
        {certificate}
        {locations}
    }}
}}
"""
NGINX_TLS = """ssl_certificate {pem};
        ssl_certificate_key {pem};
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:bench:10m;
        ssl_buffer_size {record};"""
NGINX_LOCATION = """location = /{project} {{
            if ($stays) {{ return 304; }}
            add_header x-MD5 {md5};
            add_header Content-Disposition 'attachment; filename="{name}"';
            alias {path};
        }}
        """


def device_head(
    project: str, *, version: str = NEWEST, keep_alive: bool = False, agent: str = ""
) -> bytes:
    """What ESP8266httpUpdate sends, byte for byte: 463 bytes for the project `update`.

    Args:
        project: the last part of the path.
        version: what the device runs.
        keep_alive: as HTTP/1.1 without `Connection: close`, which a device never does.
        agent: another User-Agent; ours sends smaller TLS records to a device.
    """
    lines = [
        f"GET /{project} HTTP/1.{int(keep_alive)}",
        "Host: 127.0.0.1:18266",
        f"User-Agent: {agent or 'ESP8266-http-Update'}",
        *(() if keep_alive else ("Connection: close",)),
        "x-ESP8266-Chip-ID: 12648430",
        "x-ESP8266-STA-MAC: 5C:CF:7F:12:34:56",
        "x-ESP8266-AP-MAC: 5E:CF:7F:12:34:56",
        f"x-ESP8266-free-space: {FREE_SPACE.get(project, '1794048')}",
        "x-ESP8266-sketch-size: 299952",
        "x-ESP8266-sketch-md5: 14cc0cfb6b4b2feab2c588b4ab77380c",
        "x-ESP8266-chip-size: 4194304",
        "x-ESP8266-sdk-version: 2.2.2-dev(38a443e)",
        "x-ESP8266-mode: sketch",
        f"x-ESP8266-version: {version}",
        "Content-Length: 0",
        "\r\n",
    ]
    return "\r\n".join(lines).encode()


def find(program: str) -> str | None:
    """The program's path; daemons lie outside a user's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def cores() -> tuple[int, int]:
    """The servers' core and the load's; the same one twice if there is only one."""
    allowed = sorted(ALLOWED)
    return allowed[0], allowed[-1]


ALLOWED = os.sched_getaffinity(0)  # before this process pins itself


def raise_file_limit() -> int:
    """Lets this process and those it starts open as many files as the system grants."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (65_536, hard):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, hard), max(wanted, hard)))
            break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(frozen=True)
class Memory:
    """Bytes of a process or of a tree."""

    resident: int  # RSS: libraries that other processes use too count in full
    shared_out: int  # PSS: they count by their share
    private: int  # they do not count; what a download adds is here, whatever else runs


@dataclass
class Running:
    """A server that has been started."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    tls: bool = False
    pids: list[int] = field(default_factory=list)  # of the whole tree

    def cpu(self) -> float:
        """Seconds of CPU time that the tree has used."""
        # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel's posix-timers.h
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)

    def memory(self) -> Memory:
        """What the tree occupies; a page that two of its processes share is resident twice."""
        found = [_memory(pid) for pid in self.pids]
        return Memory(
            sum(each.resident for each in found),
            sum(each.shared_out for each in found),
            sum(each.private for each in found),
        )

    def threads(self) -> int:
        """Threads of the tree."""
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids)

    def find_tree(self) -> None:
        """Looks for the server's processes; they are the same from its start to its end."""
        self.pids = [self.process.pid]
        for pid in self.pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            self.pids.extend(map(int, children.split()))

    def wait_until_idle(self) -> None:
        """Waits, bounded, until the tree has used hardly any CPU for half a second."""
        end = time.monotonic() + READY_SECONDS
        before = self.cpu()
        while time.monotonic() < end:
            time.sleep(0.5)
            after = self.cpu()
            if after - before < 0.1:
                return
            before = after

    def stop(self) -> None:
        """Ends it, by its handle."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _memory(pid: int) -> Memory:
    """Of one process: proc(5), smaps_rollup."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    of = {name: int(size) * 1024 for name, size in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}
    return Memory(of["Rss"], of["Pss"], of["Private_Clean"] + of["Private_Dirty"])


class Bench(AbstractContextManager["Bench"]):
    """A folder with firmware, a certificate and copies of the servers; ends what it started."""

    def __init__(self, server: Path, before: Path | None = None) -> None:
        self._stack = ExitStack()
        folder = tempfile.TemporaryDirectory(prefix="ota-bench-")
        self.folder = Path(self._stack.enter_context(folder))
        self.firmware = self.folder / "firmware"
        self.firmware.mkdir()
        for project, size in IMAGES.items():
            write_image(self.firmware / f"{project}-{NEWEST}.bin", project, size)
        for name, path in (("ours", server), ("before", before)):
            if path is not None:  # somebody may edit it meanwhile
                (self.folder / name).mkdir()
                shutil.copy(path, self.folder / name / "ota_server.py")
        shutil.copytree(ROOT / "ota_fleet", self.folder / "ours" / "ota_fleet")
        self.certificate = self._make_certificate()
        self.files = raise_file_limit()
        os.sched_setaffinity(0, {cores()[1]})

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        os.sched_setaffinity(0, ALLOWED)

    def image(self, project: str) -> Path:
        """The file that a device with an older version gets."""
        return self.firmware / f"{project}-{NEWEST}.bin"

    def has_before(self) -> bool:
        """Whether there is an older ours to compare with."""
        return (self.folder / "before").is_dir()

    def start(self, name: str, *, tls: bool = False, firmware: Path | None = None) -> Running:
        """The server once it answers; it ends with the bench.

        Args:
            name: ours, ours-info, ours-state, before, stock, stock-quiet, nginx, nginx-log,
                nginx-4k, uvicorn.
            tls: with the certificate.
            firmware: another folder of images.
        """
        port = free_port()
        command = self.command(name, port, tls=tls, firmware=firmware or self.firmware)
        running = self.launch(name, command, port, tls=tls)
        wait_until_listening(running)
        wait_for_answer(running)
        running.find_tree()
        return running

    def launch(self, name: str, command: Sequence[str], port: int, *, tls: bool = False) -> Running:
        """Starts a command on the servers' core; it need not answer yet."""
        errors = self._stack.enter_context((self.folder / f"{name}-{port}.log").open("wb"))
        environment = os.environ | {
            "OTA_BENCH_DIR": str(self.firmware),
            "PYTHONHASHSEED": "0",  # the same work each time, for the count of instructions
        }
        with pinned(cores()[0]):
            process = subprocess.Popen(  # noqa: S603 - a command this file has built
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                cwd=self.folder,
            )
        running = Running(name, process, port, tls=tls, pids=[process.pid])
        self._stack.callback(running.stop)
        return running

    def adopt(self, process: subprocess.Popen[bytes]) -> None:
        """Kills a process with the bench, if it is not over by then."""
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def command(self, name: str, port: int, *, tls: bool, firmware: Path) -> list[str]:
        """How to start a server."""
        if name.startswith("nginx"):
            return [find("nginx") or "nginx", "-c", self._nginx(name, port, tls=tls)]
        if name.startswith("stock"):
            script, options = str(ROOT / "bench" / "stock.py"), ["--quiet"] * name.endswith("quiet")
        elif name == "uvicorn":
            script = "-m"
            options = ["uvicorn", "bench.asgi:app", "--no-access-log", "--log-level", "error"]
            return [sys.executable, script, *options, "--app-dir", str(ROOT), "--port", str(port)]
        else:
            folder = "before" if name == "before" else "ours"
            script = str(self.folder / folder / "ota_server.py")
            options = ["--host", "127.0.0.1", "--log", "info" if name == "ours-info" else "error"]
        if name == "ours-state":
            options += ["--state", str(self.folder / "state")]
        if tls:
            options += ["--cert", str(self.certificate)]
        return [sys.executable, script, "--dir", str(firmware), "--port", str(port), *options]

    def _nginx(self, name: str, port: int, *, tls: bool) -> str:
        """The path of a configuration with the same answers."""
        folder = self.folder / f"{name}-{port}"
        folder.mkdir()
        buffered = f"{folder}/access.log combined buffer=64k flush=1s"
        record = "4k" if name == "nginx-4k" else "16k"
        text = NGINX_HTTP.format(
            user="user root;\n" * (os.geteuid() == 0),  # else its worker could not read our folder
            files=self.files,
            connections=min(40_000, self.files // 2),
            folder=folder,
            access_log=buffered if name == "nginx-log" else "off",
            newest=NEWEST,
            port=port,
            ssl=" ssl" * tls,
            certificate=NGINX_TLS.format(pem=self.certificate, record=record) if tls else "",
            locations="".join(map(self._location, IMAGES)),
        )
        path = folder / "nginx.conf"
        path.write_text(text)
        return str(path)

    def _location(self, project: str) -> str:
        path = self.image(project)
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        return NGINX_LOCATION.format(project=project, md5=md5, name=path.name, path=path)

    def _make_certificate(self) -> Path | None:
        """A P-256 certificate with its key, or None without the openssl program."""
        openssl = find("openssl")
        if openssl is None:
            return None
        path = self.folder / "ota.pem"
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        where = ["-keyout", str(path), "-out", str(path)]
        subprocess.run(  # noqa: S603 - a command this file has built
            [openssl, "req", "-x509", *kind, "-days", "30", "-subj", "/CN=ota", *where],
            check=True,
            capture_output=True,
        )
        return path


def can_start(name: str) -> str:
    """Why a server cannot be started here; empty: it can."""
    if name.startswith("nginx") and find("nginx") is None:
        return "nginx is missing"
    if name == "uvicorn" and importlib.util.find_spec("uvicorn") is None:
        return "uvicorn is missing in this Python"
    return ""


def write_image(path: Path, project: str, size: int, version: str = NEWEST) -> None:
    """An image of about `size` bytes, or the smallest possible; long settled by its date."""
    filler = bytes(range(251)) * (size // 251)
    path.write_bytes(esp8266_image(project, version, payload=filler, crc=not size))
    settled = time.time() - 3600
    os.utime(path, (settled, settled))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """What is started meanwhile runs on this core: a child inherits it from its first moment."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def free_port() -> int:
    """A port that was free a moment ago, outside the range that clients are given."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port
    raise OSError("no free port")


_GIVEN: set[int] = set()  # by free_port(), whose callers bind later


def wait_until_listening(running: Running) -> None:
    """Returns at the first connection that succeeds."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if running.process.poll() is not None:
            raise OSError(f"{running.name} ended with status {running.process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", running.port)):
            return
        time.sleep(0.001)
    raise TimeoutError(f"{running.name} does not listen")


def wait_for_answer(running: Running) -> None:
    """Returns once a check is answered by 304: the images have been looked at."""
    end = time.monotonic() + READY_SECONDS
    reply = b""
    while time.monotonic() < end:
        reply = ask(running, device_head("update"))
        if reply.split(b" ", 2)[1:2] == [b"304"]:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{running.name} answers {reply[:80]!r}")


def ask(running: Running, request: bytes) -> bytes:
    """All that the server sends until it closes."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 10))
        if running.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            client = stack.enter_context(context.wrap_socket(client))
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))
