"""Options that all parts have, and their tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import Load, find_compiler
from bench.servers import ROOT, Bench, Running, can_start, cores

BUSY = 0.1  # the share of the cores used by others that is worth a line


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    rounds: int
    seconds: float  # of one slice
    server: Path  # the script under test
    before: Path | None  # an older one, for a comparison
    scale: float  # of counts such as 10,000 slow downloads


@dataclass(kw_only=True)
class Sheet:
    """What a part has found, printed as tables."""

    left_out: list[str] = field(default_factory=list)
    goals: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def leave_out(self, why: str) -> None:
        """Notes what is not measured."""
        if why not in self.left_out:
            self.left_out.append(why)

    def goal(
        self, what: str, measured: float | None, goal: str, form: str = "{:.2f}", note: str = ""
    ) -> None:
        """A row of the verdicts; `goal` begins with <= or >=; None: not measured."""
        if measured is None:
            self.goals.append((what, "-", goal, "not measured", note))
            return
        sign, number = goal.split(" ", 1)
        limit = float(number.split()[0].rstrip("x").replace(",", ""))
        met = measured <= limit if sign == "<=" else measured >= limit
        self.goals.append((what, form.format(measured), goal, "met" if met else "NOT met", note))

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table."""
        widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
        say("")
        for row in (headings, ["-" * width for width in widths], *rows):
            cells = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            say(f"| {' | '.join(cells)} |")

    def finish(self) -> int:
        """Prints the verdicts; the exit status, 1 if a goal is not met."""
        if self.goals:
            self.table(("what", "measured", "goal", "verdict", "note"), self.goals)
        for why in self.left_out:
            say(f"left out: {why}")
        say("")
        return int(any(row[3] == "NOT met" for row in self.goals))


@dataclass
class Report(Sheet):
    """The same of a part that measures servers."""

    title: str
    options: Options
    bench: Bench
    load: Load

    def start(self, *names: str, tls: bool = False) -> list[Running]:
        """Those of the servers that can be started; says which ones cannot."""
        return [self.bench.start(name, tls=tls) for name in names if self.can_start(name)]

    def can_start(self, name: str) -> bool:
        """Whether a server can be started; says why not."""
        why = can_start(name)
        if why:
            self.leave_out(f"{name}: {why}")
        return not why and (name != "before" or self.bench.has_before())

    def has_tls(self) -> bool:
        """Whether TLS can be measured; says why not."""
        if not self.load.has_tls:
            self.leave_out("TLS: OpenSSL's headers are missing (libssl-dev)")
        elif self.bench.certificate is None:
            self.leave_out("TLS: the openssl program is missing")
        return self.load.has_tls and self.bench.certificate is not None


def say(text: str) -> None:
    """One line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def read_options(description: str, *, rounds: int = 12, seconds: float = 0.5) -> Options:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"a slice ({seconds})")
    parser.add_argument("--scale", type=float, default=1.0, help="of large counts; 0.1: a tenth")
    parser.add_argument("--server", type=Path, default=ROOT / "ota_server.py", help="under test")
    parser.add_argument("--before", type=Path, help="an older ota_server.py, to compare with")
    given = parser.parse_args()
    return Options(max(1, given.rounds), given.seconds, given.server, given.before, given.scale)


@contextmanager
def reporting(title: str, options: Options) -> Iterator[Report]:
    """A part's report, with everything it needs started and ended."""
    with Bench(options.server, options.before) as bench:
        say(f"## {title}")
        same = " THE SAME CORE: figures mislead" if len(set(cores())) == 1 else ""
        busy = _busy()
        say(
            f"{options.rounds} rounds of {options.seconds} s; server on core {cores()[0]}, load on "
            f"core {cores()[1]}{same}; Python {platform.python_version()}, Linux "
            f"{platform.release().split('-')[0]}, {_processor()}"
        )
        if busy > BUSY:
            say(f"others kept the cores {busy:.0%} busy as it began: rates and latencies mislead")
        yield Report(title, options, bench, Load(bench))


def _busy() -> float:
    """The share of the two cores that others use just now."""

    def idle_and_all() -> tuple[int, int]:
        found = [0, 0]
        with Path("/proc/stat").open(encoding="utf-8") as lines:
            for words in map(str.split, lines):
                if words[0] in {f"cpu{core}" for core in cores()}:
                    found[0] += int(words[4]) + int(words[5])  # idle, iowait: proc(5)
                    found[1] += sum(map(int, words[1:9]))
        return found[0], found[1]

    idle, whole = idle_and_all()
    time.sleep(0.5)
    idle_then, whole_then = idle_and_all()
    return 1 - (idle_then - idle) / max(1, whole_then - whole)


def _processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return os.uname().machine


def run_part(description: str, options: Options, measure: Callable[[Report], None]) -> int:
    """Runs a part; the exit status: 0, 1 if a goal is not met, 2 if nothing can be measured."""
    if sys.platform != "linux" or find_compiler() is None:
        say("left out, all of it: this is no Linux, or a C compiler is missing (for load.c)")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # else the servers would outlive it
    with reporting(description.splitlines()[0].rstrip("."), options) as report:
        measure(report)
        return report.finish()
