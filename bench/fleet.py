"""What remembering costs: a check that ends in 304, without --state and with 10,000 known devices.

Both are the same script. The MAC addresses of the load are among the known ones; CPU time includes
the thread that writes what they said, once a second.
"""

from __future__ import annotations

import sys

from bench.checks import checks_work, ratio, table
from bench.load import Sample, Work, alternate, check_head
from bench.report import Report, read_options, run_part
from bench.servers import Running
from ota_fleet.registry import Registry, Sighting

KNOWN = 10_000  # devices
CONNECTIONS = 32  # at a time


def _remember(report: Report) -> None:
    """Fills the registry before the server opens it."""
    state = report.bench.folder / "state"
    state.mkdir()
    registry = Registry(state / "fleet.db", max_devices=KNOWN)
    for number in range(1, KNOWN + 1):
        low = f"{number:06x}"
        mac = f"5C:CF:7F:{low[:2]}:{low[2:4]}:{low[4:]}"
        said = Sighting(
            mac, "update", "esp8266", "2.0.0", None, None, None, "2.2.2", "", number, False
        )
        registry.seen(said)
    registry.flush()
    registry.close()


def _measure(report: Report) -> None:
    _remember(report)
    servers = report.start("ours", "ours-state")
    load, seconds = report.load, report.options.seconds

    def kept(server: Running) -> Sample:
        head = check_head(keep_alive=True)
        return load.slice(
            server, head, seconds, mode="keep", connections=CONNECTIONS, depth=1, expect=304
        )

    works: dict[str, Work] = {
        "a new connection each": checks_work(load, seconds),
        "keep-alive": kept,
    }
    for title, work in works.items():
        samples = alternate(servers, work, report.options.rounds)
        table(report, title, samples)
        what = f"with {KNOWN:,} known devices / without --state, CPU, {title}"
        report.goal(what, ratio(samples, "ours-state", "ours"), "<= 2x")


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__, seconds=1.0), _measure)


if __name__ == "__main__":
    sys.exit(main())
