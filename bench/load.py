"""Compiles and starts the load (load.c); sets what it saw beside what the server used for it."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.servers import Bench, Running, device_head, find

SOURCE = Path(__file__).with_name("load.c")
SPARE_SECONDS = 120  # the longest a load may take beyond its own time
Setting = str | int | float


@dataclass(frozen=True)
class Result:
    """What the load saw; times in seconds."""

    done: int  # requests answered as expected
    seconds: float
    bytes: int  # of bodies
    cpu: float  # the load's own
    most: int  # connections open at once
    refused: int
    reset: int
    timed_out: int
    wrong: int  # other status, length or bytes
    shaken: int  # TLS handshakes
    reused: int  # of them resumed
    stall: float  # slow readers: the longest time without a byte
    p50: float  # latencies
    p99: float
    p999: float
    worst: float

    @property
    def errors(self) -> int:
        """Requests that were not answered as expected."""
        return self.refused + self.reset + self.timed_out + self.wrong


@dataclass(frozen=True)
class Sample:
    """One slice of load against one server."""

    result: Result
    cpu: float  # seconds of the server's whole process tree

    @property
    def micros(self) -> float:
        """Microseconds of CPU for each request."""
        return self.cpu / max(1, self.result.done) * 1e6

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.result.done / self.result.seconds

    @property
    def speed(self) -> float:
        """MB of bodies a second."""
        return self.result.bytes / self.result.seconds / 1e6

    @property
    def per_gigabyte(self) -> float:
        """Seconds of CPU for each GB of bodies."""
        return self.cpu / max(1, self.result.bytes) * 1e9

    @property
    def limit(self) -> str:
        """What kept it from being faster: the server, the load, or neither one's CPU."""
        busy = 0.9 * self.result.seconds
        if self.cpu > busy:
            return "server"
        return "load" if self.result.cpu > busy else "others"


class Load:
    """The compiled load; OSError: there is no C compiler."""

    def __init__(self, bench: Bench) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise OSError("a C compiler is missing")
        self._bench = bench
        self._program = bench.folder / "load"
        base = [compiler, "-O2", "-o", str(self._program), str(SOURCE)]
        with_tls = [*base, "-DTLS", "-lssl", "-lcrypto"]
        self.has_tls = subprocess.run(with_tls, capture_output=True, check=False).returncode == 0  # noqa: S603
        if not self.has_tls:
            subprocess.run(base, check=True)  # noqa: S603

    def start(self, running: Running, head: bytes, **settings: Setting) -> subprocess.Popen[bytes]:
        """A load under way; finish() waits for it."""
        with tempfile.NamedTemporaryFile(dir=self._bench.folder, delete=False) as file:
            file.write(head)
        command = [str(self._program), f"port={running.port}", f"head={file.name}"]
        command += [f"tls={int(running.tls)}"]
        command += [f"{name}={value}" for name, value in settings.items()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
        self._bench.adopt(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], seconds: float) -> Result:
        """What a load saw. TimeoutExpired: it hangs, and was ended."""
        try:
            output, _ = process.communicate(timeout=seconds + SPARE_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise OSError(f"the load ended with status {process.returncode}")
        return Result(**json.loads(output))

    def slice(self, running: Running, head: bytes, seconds: float, **settings: Setting) -> Sample:
        """One slice of load, and the server's CPU time for it."""
        before = running.cpu()
        process = self.start(running, head, seconds=seconds, **settings)
        result = self.finish(process, seconds)
        time.sleep(0.01)  # for what the server does once the last client has left
        return Sample(result, running.cpu() - before)


def find_compiler() -> str | None:
    """The C compiler of this machine."""
    return find("cc") or find("gcc") or find("clang")


Work = Callable[[Running], Sample]


def alternate(servers: Sequence[Running], work: Work, rounds: int) -> dict[str, list[Sample]]:
    """The samples of each server: each round measures all, and each begins with another one."""
    for server in servers:
        work(server)  # warm up
    samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
    for turn in range(rounds):
        first = turn % len(servers)
        for server in (*servers[first:], *servers[:first]):
            samples[server.name].append(work(server))
    return samples


def paired(
    samples: Mapping[str, Sequence[Sample]], over: str, under: str, what: Callable[[Sample], float]
) -> float:
    """The median of the ratios of each round, which a slow moment of the machine hardly moves."""
    pairs = zip(samples[over], samples[under], strict=True)
    return statistics.median(what(a) / max(1e-12, what(b)) for a, b in pairs)


def lower_quartile(values: Sequence[float]) -> float:
    """The p25: noise only ever adds, so it is steadier than the median."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def limit(samples: Sequence[Sample]) -> str:
    """What limited most of the samples; `others`: something else used the cores, or all waited."""
    return statistics.mode(each.limit for each in samples)


def has_wrk() -> bool:
    """Whether Debian's generator is there, for a second opinion."""
    return find("wrk") is not None


def check_head(*, keep_alive: bool = False) -> bytes:
    """The check of a device that has the newest version."""
    return device_head("update", keep_alive=keep_alive)
