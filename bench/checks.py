"""Checks that end in 304: a new connection each, keep-alive, pipelined.

The measure is CPU time of the server's whole process tree for each request; requests a second are
shown too, and marked where the load was at its limit.
"""

from __future__ import annotations

import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from bench.load import (
    Load,
    Sample,
    Work,
    alternate,
    check_head,
    has_wrk,
    limit,
    lower_quartile,
    paired,
)
from bench.report import Report, read_options, run_part
from bench.servers import Running, device_head

CONNECTIONS = 32  # at a time
DEPTH = 16  # pipelined requests
WRK_ROUNDS = 3  # it takes whole seconds
Samples = Mapping[str, Sequence[Sample]]

WRK_SCRIPT = """
local number = 0
local head = [==[%s]==]
request = function()
  number = number + 1
  local tail = string.format("%%02X:%%02X:%%02X", number / 65536 %% 256, number / 256 %% 256,
    number %% 256)
  return (head:gsub("12:34:56", tail))
end
"""


def table(report: Report, title: str, samples: Samples) -> None:
    """A row for each server."""
    rows = [
        (
            name,
            f"{lower_quartile([each.micros for each in of]):.1f}",
            f"{statistics.median(each.rate for each in of):,.0f}",
            limit(of),
            f"{statistics.median(each.result.p50 for each in of) * 1e3:.2f}",
            f"{statistics.median(each.result.p99 for each in of) * 1e3:.2f}",
            str(sum(each.result.errors for each in of)),
        )
        for name, of in samples.items()
    ]
    headings = (
        title,
        "CPU us/request, p25",
        "requests/s",
        "limited by",
        "p50 ms",
        "p99 ms",
        "errors",
    )
    report.table(headings, rows)


def ratio(samples: Samples, over: str, under: str) -> float | None:
    """Of CPU per request, or None without one of the two."""
    if over not in samples or under not in samples:
        return None
    return paired(samples, over, under, lambda each: each.micros)


def checks_work(load: Load, seconds: float) -> Work:
    """A slice of checks with a new connection each."""

    def work(server: Running) -> Sample:
        return load.slice(
            server, check_head(), seconds, mode="new", connections=CONNECTIONS, expect=304
        )

    return work


def new_connections(report: Report) -> None:
    """A new connection for each check."""
    names = ("ours", "before", "ours-info", "stock", "stock-quiet", "nginx", "nginx-log", "uvicorn")
    servers = report.start(*names)
    work = checks_work(report.load, report.options.seconds)
    samples = alternate(servers, work, report.options.rounds)
    table(report, "a new connection each", samples)
    report.goal("stock / ours, CPU, no line per request", ratio(samples, "stock-quiet", "ours"),
                ">= 7x")  # fmt: skip
    report.goal("stock / ours, CPU, both write a line", ratio(samples, "stock", "ours-info"),
                ">= 7x")  # fmt: skip
    report.goal("stock as it comes / ours --log error, CPU", ratio(samples, "stock", "ours"),
                ">= 7x")  # fmt: skip
    report.goal("ours / nginx, CPU, no line per request", ratio(samples, "ours", "nginx"),
                "<= 1.6x")  # fmt: skip
    report.goal("ours / nginx, CPU, both write a line", ratio(samples, "ours-info", "nginx-log"),
                "<= 1.6x")  # fmt: skip
    if "nginx" in samples:
        rate = paired(samples, "ours", "nginx", lambda each: each.rate)
        note = ", ".join(f"{name} limited by {limit(samples[name])}" for name in ("ours", "nginx"))
        report.goal("ours / nginx, requests/s", rate, ">= 0.8x", note=note)
    _compare_before(report, samples, "new connections")
    _second_opinion(report, [each for each in servers if each.name in {"ours", "nginx"}])
    _stop(servers)


def keep_alive(report: Report, depth: int) -> None:
    """Connections that stay, with `depth` requests under way on each."""
    servers = report.start("ours", "before", "stock-quiet", "nginx")

    def work(server: Running) -> Sample:
        return report.load.slice(
            server,
            check_head(keep_alive=True),
            report.options.seconds,
            mode="keep",
            connections=CONNECTIONS,
            depth=depth,
            expect=304,
        )

    samples = alternate(servers, work, report.options.rounds)
    title = "keep-alive" if depth == 1 else f"pipelined, {depth} at a time"
    table(report, title, samples)
    report.goal(f"ours / nginx, CPU, {title}", ratio(samples, "ours", "nginx"), "<= 2.5x")
    _compare_before(report, samples, title)
    if depth > 1:
        wrong = _out_of_order(next(each for each in servers if each.name == "ours"))
        report.goal("pipelined replies out of order, of 200", wrong, "<= 0", "{:.0f}")
    _stop(servers)


def _compare_before(report: Report, samples: Samples, title: str) -> None:
    change = ratio(samples, "ours", "before")
    if change is not None:
        report.goal(f"ours / before, CPU, {title}", change, "<= 1x", "{:.3f}")


def _out_of_order(server: Running) -> int:
    """How many of 200 pipelined requests get another's answer: each says another version."""
    versions = [f"{3 + i % 7}.{i}.{i * 31 % 101}" for i in range(200)]
    heads = [device_head("update", version=each, keep_alive=True) for each in versions]
    reply = b""
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(b"".join(heads))
        while reply.count(b"\r\n\r\n") < len(heads) and (more := client.recv(65536)):
            reply += more
    found = re.findall(r"than ([0-9.]+), which", reply.decode("latin-1"))
    right: int = sum(a == b for a, b in zip(versions, found, strict=False))
    return len(versions) - right


def _second_opinion(report: Report, servers: Sequence[Running]) -> None:
    """The same checks by wrk, which is another generator."""
    if not has_wrk():
        report.leave_out("the second opinion: wrk is missing")
        return
    rows = []
    for title, alive in (("new connections", False), ("keep-alive", True)):
        micros: dict[str, list[float]] = {server.name: [] for server in servers}
        for _ in range(min(WRK_ROUNDS, report.options.rounds)):
            for server in servers:
                micros[server.name].append(_wrk(report, server, keep_alive=alive))
        rows += [(f"{name}, {title}", f"{lower_quartile(of):.1f}") for name, of in micros.items()]
    report.table(("by wrk", "CPU us/request, p25"), rows)


def _wrk(report: Report, server: Running, *, keep_alive: bool) -> float:
    """CPU microseconds for each request of one second by wrk."""
    script = report.bench.folder / "wrk.lua"
    # LF: a Lua string takes CR LF for one line end
    head = check_head(keep_alive=keep_alive).decode().replace("\r\n", "\\r\\n")
    script.write_text((WRK_SCRIPT % head).replace("[==[", '"').replace("]==]", '"'))
    before = server.cpu()
    url = f"http://127.0.0.1:{server.port}/update"
    done = subprocess.run(  # noqa: S603
        ["wrk", "-t1", f"-c{CONNECTIONS}", "-d1s", "-s", str(script), url],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    time.sleep(0.05)
    match = re.search(r"([0-9]+) requests in", done.stdout)
    assert match
    return (server.cpu() - before) / max(1, int(match[1])) * 1e6


def _stop(servers: Sequence[Running]) -> None:
    for server in servers:
        server.stop()


def _measure(report: Report) -> None:
    new_connections(report)
    keep_alive(report, 1)
    keep_alive(report, DEPTH)


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__), _measure)


if __name__ == "__main__":
    sys.exit(main())
