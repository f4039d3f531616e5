"""5,000 checks a second, whether the server keeps up or not, and 1,000 checks in flight.

The first is an open loop: latency counts from the moment a check was due, so a server that stalls
cannot hide it. The second is a closed one: 1,000 devices, each asks again once it has its answer.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from bench.load import Sample, Work, alternate, check_head, limit, paired
from bench.report import Report, read_options, run_part
from bench.servers import Running

RATE = 5_000  # checks a second
IN_FLIGHT = 1_000
WORST_SECONDS = 1.0  # a lost SYN is sent again after so long
Samples = Mapping[str, Sequence[Sample]]


def _measure(report: Report) -> None:
    servers = report.start("ours", "before", "nginx", "stock-quiet")
    load, seconds = report.load, report.options.seconds
    rate = RATE * report.options.scale

    def due(server: Running) -> Sample:
        return load.slice(
            server, check_head(), seconds, mode="open", rate=rate, connections=4_000, expect=304
        )

    def in_flight(server: Running) -> Sample:
        return load.slice(
            server, check_head(), seconds, mode="new", connections=IN_FLIGHT, expect=304
        )

    works: dict[str, Work] = {f"{rate:,.0f} a second": due, f"{IN_FLIGHT:,} in flight": in_flight}
    for title, work in works.items():
        samples = alternate(servers, work, report.options.rounds)
        _table(report, title, samples)
        _judge(report, title, samples)


def _table(report: Report, title: str, samples: Samples) -> None:
    def median(of: Sequence[Sample], what: Callable[[Sample], float]) -> str:
        return f"{statistics.median(map(what, of)) * 1e3:.2f}"

    rows = [
        (
            name,
            f"{statistics.median(each.rate for each in of):,.0f}",
            limit(of),
            median(of, lambda each: each.result.p50),
            median(of, lambda each: each.result.p99),
            median(of, lambda each: each.result.p999),
            f"{max(each.result.worst for each in of) * 1e3:.1f}",
            str(max(each.result.most for each in of)),
            str(sum(each.result.errors for each in of)),
        )
        for name, of in samples.items()
    ]
    headings = (title, "checks/s", "limited by", "p50 ms", "p99 ms", "p99.9 ms", "worst ms",
                "most at once", "errors")  # fmt: skip
    report.table(headings, rows)


def _judge(report: Report, title: str, samples: Samples) -> None:
    ours = samples["ours"]
    report.goal(f"{title}: errors", sum(each.result.errors for each in ours), "<= 0", "{:.0f}")
    worst = max(each.result.worst for each in ours)
    report.goal(f"{title}: worst s", worst, f"<= {WORST_SECONDS}", "{:.3f}")
    if "nginx" in samples:
        p99 = paired(samples, "ours", "nginx", lambda each: each.result.p99)
        p999 = paired(samples, "ours", "nginx", lambda each: each.result.p999)
        report.goal(f"{title}: p99 ours / nginx", p99, "<= 3x")
        report.goal(f"{title}: p99.9 ours / nginx", p999, "<= 2x")


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__, seconds=1.0), _measure)


if __name__ == "__main__":
    sys.exit(main())
