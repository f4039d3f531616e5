"""Downloads of 0.4, 1 and 4 MB at full speed: MB a second, and CPU seconds for each GB.

The load drops the bytes in the kernel instead of copying them, as a network card would carry them
away; what it checks is status and length. bench.slow compares every byte.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

from bench.load import Sample, alternate, limit, lower_quartile, paired
from bench.report import Report, read_options, run_part
from bench.servers import STALE, Running, device_head

CONNECTIONS = 4  # at a time
Samples = Mapping[str, Sequence[Sample]]


def table(report: Report, title: str, samples: Samples) -> None:
    """A row for each server."""
    rows = [
        (
            name,
            f"{statistics.median(each.speed for each in of):,.0f}",
            limit(of),
            f"{lower_quartile([each.per_gigabyte for each in of]):.3f}",
            f"{statistics.median(each.rate for each in of):,.0f}",
            str(sum(each.result.errors for each in of)),
        )
        for name, of in samples.items()
    ]
    headings = (title, "MB/s", "limited by", "CPU s/GB, p25", "downloads/s", "errors")
    report.table(headings, rows)


def _measure(report: Report) -> None:
    servers = report.start("ours", "before", "stock-quiet", "nginx")
    for project, size in (("small", "0.4 MB"), ("medium", "1 MB"), ("large", "4 MB")):
        head = device_head(project, version=STALE)

        def work(server: Running, head: bytes = head, project: str = project) -> Sample:
            return report.load.slice(
                server,
                head,
                report.options.seconds,
                mode="bulk",
                connections=CONNECTIONS,
                expect=200,
                file=str(report.bench.image(project)),
            )

        samples = alternate(servers, work, report.options.rounds)
        table(report, f"downloads of {size}", samples)
        _judge(report, size, samples)


def _judge(report: Report, size: str, samples: Samples) -> None:
    def cost(over: str, under: str) -> float | None:
        if over not in samples or under not in samples:
            return None
        return paired(samples, over, under, lambda each: each.per_gigabyte)

    if "nginx" in samples:
        note = ", ".join(f"{name} limited by {limit(samples[name])}" for name in ("ours", "nginx"))
        speed = paired(samples, "ours", "nginx", lambda each: each.speed)
        report.goal(f"ours / nginx, MB/s, {size}", speed, ">= 0.7x", note=note)
    report.goal(f"ours / nginx, CPU per GB, {size}", cost("ours", "nginx"), "<= 2.2x")
    report.goal(f"stock / ours, CPU per GB, {size}", cost("stock-quiet", "ours"), ">= 3x")
    if "before" in samples:
        report.goal(f"ours / before, CPU per GB, {size}", cost("ours", "before"), "<= 1x", "{:.3f}")


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__), _measure)


if __name__ == "__main__":
    sys.exit(main())
