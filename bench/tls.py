"""TLS with a P-256 certificate: full and resumed handshakes, downloads, slow downloads.

TLS 1.2 is what an ESP8266 speaks and resumes by session id; an ESP32 resumes by ticket.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from bench import slow
from bench.load import Sample, alternate, check_head, limit, lower_quartile, paired
from bench.report import Report, read_options, run_part
from bench.servers import STALE, Running, device_head

CONNECTIONS = 16  # at a time
SLOW = 1_000
Samples = Mapping[str, Sequence[Sample]]
HANDSHAKES = (  # title, version, how it is resumed
    ("full, TLS 1.2", 12, "none"),
    ("full, TLS 1.3", 13, "none"),
    ("by session id, TLS 1.2", 12, "id"),
    ("by ticket, TLS 1.2", 12, "ticket"),
    ("by ticket, TLS 1.3", 13, "ticket"),
)


def _measure(report: Report) -> None:
    if not report.has_tls():
        return
    servers = report.start("ours", "before", "nginx", "nginx-4k", tls=True)
    named = {server.name: server for server in servers}
    checked = [named[name] for name in ("ours", "before", "nginx") if name in named]
    for title, version, resume in HANDSHAKES:
        _handshakes(report, checked, title, version, resume)
    for agent, rival, title in (("bench", "nginx", "bulk, 16 KB records"),
                                ("", "nginx-4k", "bulk, a device's 4 KB records")):  # fmt: skip
        _bulk(report, [named[n] for n in ("ours", "before", rival) if n in named], agent, title)
    for server in servers:
        server.stop()
    _slow(report)


def _handshakes(
    report: Report, servers: Sequence[Running], title: str, version: int, resume: str
) -> None:
    def work(server: Running) -> Sample:
        return report.load.slice(
            server,
            check_head(),
            report.options.seconds,
            mode="new",
            connections=CONNECTIONS,
            expect=304,
            version=version,
            resume=resume,
        )

    samples = alternate(servers, work, report.options.rounds)
    rows = [
        (
            name,
            f"{lower_quartile([each.micros for each in of]):.0f}",
            f"{statistics.median(each.rate for each in of):,.0f}",
            limit(of),
            f"{_resumed(of):.1%}",
            str(sum(each.result.errors for each in of)),
        )
        for name, of in samples.items()
    ]
    headings = (title, "CPU us/check, p25", "checks/s", "limited by", "resumed", "errors")
    report.table(headings, rows)
    if "nginx" in samples:
        ratio = paired(samples, "ours", "nginx", lambda each: each.micros)
        goal = "<= 1.5x" if resume == "none" else "<= 1.8x"
        report.goal(f"ours / nginx, CPU, {title}", ratio, goal)
    if resume != "none":
        share = _resumed(samples["ours"]) * 100
        note = f"the first of {CONNECTIONS} connections in a slice cannot be"
        report.goal(f"% resumed {title}", share, ">= 95", "{:.1f}", note)


def _resumed(of: Sequence[Sample]) -> float:
    """The share of handshakes that were resumed, of those that could be: not a slice's first."""
    could = sum(each.result.shaken - CONNECTIONS for each in of)
    return sum(each.result.reused for each in of) / max(1, could)


def _bulk(report: Report, servers: Sequence[Running], agent: str, title: str) -> None:
    head = device_head("medium", version=STALE, agent=agent)

    def work(server: Running) -> Sample:
        return report.load.slice(
            server,
            head,
            report.options.seconds,
            mode="bulk",
            connections=4,
            expect=200,
            version=12,
            file=str(report.bench.image("medium")),
        )

    samples = alternate(servers, work, report.options.rounds)
    cost: Callable[[Sample], float] = lambda each: each.per_gigabyte  # noqa: E731
    rows = [
        (
            name,
            f"{statistics.median(each.speed for each in of):,.0f}",
            limit(of),
            f"{lower_quartile([cost(each) for each in of]):.2f}",
            str(sum(each.result.errors for each in of)),
        )
        for name, of in samples.items()
    ]
    report.table((title, "MB/s", "limited by", "CPU s/GB, p25", "errors"), rows)
    rival = servers[-1].name
    if rival.startswith("nginx"):
        note = ", ".join(f"{name} limited by {limit(samples[name])}" for name in ("ours", rival))
        speed = paired(samples, "ours", rival, lambda each: each.speed)
        report.goal(f"ours / nginx, MB/s, {title}", speed, ">= 0.9x", note=note)


def _slow(report: Report) -> None:
    count = max(10, int(SLOW * report.options.scale))
    rows = []
    for name in ("ours", "nginx"):
        if report.can_start(name):
            outcome = slow.measure(report, name, count, tls=True)
            rows.append(slow.row(name, count, outcome))
            if name == "ours":
                report.goal(f"{count:,} slow: complete", outcome.result.done, f">= {count}",
                            "{:.0f}")  # fmt: skip
                report.goal(f"{count:,} slow: resident KB each", outcome.each / 1024, "<= 40")
    report.table(slow.HEADINGS, rows)


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__), _measure)


if __name__ == "__main__":
    sys.exit(main())
