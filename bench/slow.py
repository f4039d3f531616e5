"""Slow downloads, thousands at a time: all complete, and what each one costs in memory.

The readers receive as a device does (MSS 1460, window 5,744), 10 to 50 KB a second each, and every
byte is compared with the file. Meanwhile another process asks for checks at a steady rate, from the
same core as the readers, so its latencies include what it waits for them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from bench.load import Result, check_head
from bench.report import Options, Report, read_options, run_part
from bench.servers import STALE, Running, device_head

COUNTS = (1_000, 5_000, 10_000)
SPEEDS = (10_000, 50_000)  # bytes a second; each reader has its own
OPENED_A_SECOND = 2_500
SHAKEN_A_SECOND = 300  # the same under TLS, where each costs a full handshake
CHECKS_A_SECOND = 100
STALL_SECONDS = 60  # a device gives up after so long without a byte
SPARE_FILES = 400  # for the checks and for what a server has open anyway
STOCK_MOST = 1_000  # each of its downloads is a thread


@dataclass(frozen=True)
class Outcome:
    """One server under slow readers; memory in bytes."""

    result: Result
    checks: Result
    each: float  # private resident for each download
    whole: int  # resident at most
    threads: int  # more than before
    cpu: float  # seconds


def measure(report: Report, name: str, count: int, *, tls: bool = False) -> Outcome:
    """One server, started for this and ended."""
    server = report.bench.start(name, tls=tls)
    try:
        return _under_readers(report, server, count)
    finally:
        server.stop()


def _under_readers(report: Report, server: Running, count: int) -> Outcome:
    report.load.slice(
        server, check_head(), 0.2, mode="new", expect=304
    )  # warm, before it is weighed
    idle, threads, cpu = server.memory(), server.threads(), server.cpu()
    ramp = max(1.0, count / (SHAKEN_A_SECOND if server.tls else OPENED_A_SECOND))
    seconds = report.bench.image("small").stat().st_size / SPEEDS[0] + ramp
    readers = report.load.start(
        server,
        device_head("small", version=STALE),
        mode="slow",
        connections=count,
        low=SPEEDS[0],
        high=SPEEDS[1],
        ramp=ramp,
        timeout=STALL_SECONDS,
        expect=200,
        file=str(report.bench.image("small")),
    )
    checks = report.load.start(
        server,
        check_head(),
        mode="open",
        rate=CHECKS_A_SECOND,
        seconds=seconds - 1,
        connections=1_000,
        expect=304,
    )
    resident, private, threads_then = _watch(server, readers, seconds + STALL_SECONDS)
    result = report.load.finish(readers, seconds)
    return Outcome(
        result,
        report.load.finish(checks, seconds),
        (private - idle.private) / max(1, result.most),
        resident,
        threads_then - threads,
        server.cpu() - cpu,
    )


def _watch(
    server: Running, readers: subprocess.Popen[bytes], seconds: float
) -> tuple[int, int, int]:
    """The most bytes resident, bytes private and threads, while the readers are at it."""
    end = time.monotonic() + seconds
    resident = private = threads = 0
    while readers.poll() is None and time.monotonic() < end:
        memory = server.memory()
        resident, private = max(resident, memory.resident), max(private, memory.private)
        threads = max(threads, server.threads())
        time.sleep(0.5)
    return resident, private, threads


def row(name: str, count: int, outcome: Outcome) -> tuple[str, ...]:
    """A row of the table."""
    result, checks = outcome.result, outcome.checks
    return (
        f"{name}, {count:,}",
        f"{result.done:,}",
        str(result.errors),
        f"{result.most:,}",
        f"{outcome.each / 1024:.1f}",
        f"{outcome.whole / 1e6:.1f}",
        str(outcome.threads),
        f"{result.bytes / result.seconds / 1e6:.0f}",
        f"{result.stall:.2f}",
        f"{outcome.cpu / result.bytes * 1e9:.2f}",
        f"{checks.p99 * 1e3:.1f}",
        f"{checks.worst * 1e3:.0f}",
        str(checks.errors),
        f"{result.cpu / result.seconds * 100:.0f} %",
    )


HEADINGS = (
    "slow downloads", "complete", "errors", "at once", "KB each", "whole MB", "more threads",
    "MB/s", "worst stall s", "CPU s/GB", "check p99 ms", "worst ms", "check errors", "readers' CPU",
)  # fmt: skip


def _measure(report: Report) -> None:
    rows = []
    for full in COUNTS:
        count = max(10, int(full * report.options.scale))
        room = (report.bench.files - SPARE_FILES) // 2  # a download takes two: socket and file
        if count > room:
            report.leave_out(f"{count:,}: {room:,} instead, for {report.bench.files:,} open files")
            count = room
        for name in ("ours", "nginx", "stock-quiet"):
            if count > STOCK_MOST and name == "stock-quiet":
                report.leave_out(f"{name} with {count:,}: a thread for each")
                continue
            if not report.can_start(name):
                continue
            outcome = measure(report, name, count)
            rows.append(row(name, count, outcome))
            if name == "ours":
                _judge(report, count, outcome)
    report.table(HEADINGS, rows)


def _judge(report: Report, count: int, outcome: Outcome) -> None:
    result = outcome.result
    report.goal(f"{count:,}: complete", result.done, f">= {count}", "{:.0f}")
    report.goal(f"{count:,}: threads for them", outcome.threads, "<= 0", "{:.0f}")
    report.goal(f"{count:,}: resident KB each", outcome.each / 1024, "<= 2.5")
    report.goal(f"{count:,}: whole process MB", outcome.whole / 1e6, "<= 50", "{:.1f}")
    busy = result.cpu / result.seconds > 0.7
    note = "shares its core with busy readers" if busy else ""
    report.goal(f"{count:,}: checks p99 ms", outcome.checks.p99 * 1e3, "<= 10", "{:.1f}", note)


def read_slow_options(description: str) -> Options:
    """The options of the command line; rounds and slices mean nothing here."""
    return read_options(description, rounds=1)


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_slow_options(__doc__), _measure)


if __name__ == "__main__":
    sys.exit(main())
