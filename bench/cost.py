"""What hardly varies: instructions and system calls for a check, memory, the start, many files.

Instructions come from valgrind's callgrind, system calls from strace; both are counted twice, with
3,000 and with 1,000 checks, and the difference is divided by 2,000, so the start does not count.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.checks import checks_work
from bench.load import Sample, alternate, check_head, lower_quartile, paired
from bench.report import Report, read_options, run_part
from bench.servers import (
    Running,
    cores,
    find,
    free_port,
    pinned,
    wait_for_answer,
    wait_until_listening,
    write_image,
)

MANY, FEW = 3_000, 1_000  # checks under a counting program
STARTS = 9
IMAGES = 500  # of 1 MB, for the start
FILES = (10, 1_000, 10_000)


def _measure(report: Report) -> None:
    _instructions(report)
    _system_calls(report)
    _idle(report)
    _start(report)
    _start_with_images(report)
    for layout in ("projects", "releases"):
        _many_files(report, layout)


# -- Counted ---------------------------------------------------------------------------------------


def _counted(report: Report, wrapper: Sequence[str], name: str, checks: int, at_once: int) -> None:
    """Runs a server under a counting program for so many checks."""
    port = free_port()
    command = report.bench.command(name, port, tls=False, firmware=report.bench.firmware)
    running = report.bench.launch(name, [*wrapper, *command], port)
    try:
        wait_until_listening(running)
        wait_for_answer(running)
        process = report.load.start(
            running,
            check_head(),
            mode="new",
            connections=at_once,
            count=checks,
            expect=304,
            timeout=60,
        )
        result = report.load.finish(process, 300)
        assert result.done == checks, f"{result.errors} errors under {wrapper[0]}"
        running.find_tree()
        for pid in running.pids[1:]:  # strace itself ends once the server does
            os.kill(pid, 15)
        if len(running.pids) == 1:  # valgrind is the server
            running.process.terminate()
        running.process.wait(60)
    finally:
        running.stop()


def _instructions(report: Report) -> None:
    valgrind = find("valgrind")
    if valgrind is None:
        report.leave_out("instructions: valgrind is missing")
        return
    rows = []
    for name in ("ours", "ours-info", "before", "stock-quiet"):
        if not report.can_start(name):
            continue
        counts = [_callgrind(report, valgrind, name, checks) for checks in (MANY, FEW)]
        each = (counts[0] - counts[1]) / (MANY - FEW)
        rows.append((name, f"{each:,.0f}"))
        if name == "ours":
            report.goal("user instructions a check", each, "<= 150,000", "{:,.0f}")
    report.table(("one connection at a time", "user instructions a check"), rows)


def _callgrind(report: Report, valgrind: str, name: str, checks: int) -> int:
    """User instructions of a server's whole life."""
    output = report.bench.folder / f"callgrind-{name}-{checks}"
    wrapper = [valgrind, "--tool=callgrind", f"--callgrind-out-file={output}", "-q"]
    _counted(report, wrapper, name, checks, 1)
    match = re.search(r"^(?:summary|totals): ([0-9]+)", output.read_text("latin-1"), re.MULTILINE)
    assert match
    return int(match[1])


def _system_calls(report: Report) -> None:
    strace = find("strace")
    if strace is None:
        report.leave_out("system calls: strace is missing")
        return
    rows = []
    for name in ("ours", "ours-info", "before", "stock-quiet", "nginx"):
        if not report.can_start(name):
            continue
        for at_once in (1, 16):
            many, few = (_strace(report, strace, name, n, at_once) for n in (MANY, FEW))
            each = {
                call: (number - few.get(call, 0)) / (MANY - FEW) for call, number in many.items()
            }
            whole = sum(each.values())
            most = sorted(each.items(), key=lambda item: -item[1])
            told = ", ".join(f"{call} {number:.2f}" for call, number in most if number > 0.05)
            rows.append((f"{name}, {at_once} at a time", f"{whole:.2f}", told))
            if name == "ours":
                report.goal(
                    f"system calls a check, {at_once} at a time", round(whole, 1), "<= 8", "{:.1f}"
                )
    report.table(("server", "system calls a check", "which"), rows)


def _strace(report: Report, strace: str, name: str, checks: int, at_once: int) -> dict[str, int]:
    """System calls of a server's whole life, by name."""
    output = report.bench.folder / f"strace-{name}-{checks}-{at_once}"
    wrapper = [strace, "-c", "-f", "-U", "name,calls", "-o", str(output)]
    _counted(report, wrapper, name, checks, at_once)
    lines = (line.split() for line in output.read_text().splitlines())
    return {
        words[0]: int(words[1])
        for words in lines
        if len(words) == 2 and words[1].isdigit() and words[0] != "total"
    }


# -- Memory and start ------------------------------------------------------------------------------


def _idle(report: Report) -> None:
    rows = []
    for name in ("ours", "before", "stock-quiet", "nginx"):
        for tls in (False, True):
            if not report.can_start(name) or (tls and (name != "ours" or not report.has_tls())):
                continue
            server = report.bench.start(name, tls=tls)
            server.wait_until_idle()
            cpu = server.cpu()
            time.sleep(2)
            cpu = (server.cpu() - cpu) / 2 * 1e3
            memory = server.memory()
            resident = memory.resident
            title = f"{name}{', TLS' * tls}"
            figures = f"{resident / 1e6:.1f}", f"{memory.shared_out / 1e6:.1f}", f"{cpu:.1f}"
            rows.append((title, *figures, str(server.threads())))
            if name == "ours":
                report.goal(f"{title}, idle: resident MB", resident / 1e6, "<= 24", "{:.1f}")
            server.stop()
    headings = ("idle", "resident MB (RSS)", "MB (PSS)", "CPU ms a second", "threads")
    report.table(headings, rows)


def _start(report: Report) -> None:
    """CPU until it listens, above that of a Python that does nothing."""
    bare = [_bare_python() for _ in range(STARTS)]
    rows = [("python3 -I -c pass", f"{statistics.median(bare) * 1e3:.0f}", "-")]
    for name in ("ours", "before", "stock-quiet"):
        if not report.can_start(name):
            continue
        starts = [_until_listening(report, name, report.bench.firmware) for _ in range(STARTS)]
        cpu = statistics.median(cpu for cpu, _ in starts) * 1e3
        wall = statistics.median(wall for _, wall in starts) * 1e3
        rows.append((name, f"{cpu:.0f}", f"{wall:.0f}"))
        if name == "ours":
            above = cpu - statistics.median(bare) * 1e3
            report.goal("start: CPU ms above bare Python", above, "<= 80", "{:.0f}")
    report.table(("start", "CPU ms, median", "ms until it listens"), rows)


def _bare_python() -> float:
    """CPU seconds of a Python that does nothing."""
    with pinned(cores()[0]):
        process = subprocess.Popen([sys.executable, "-I", "-c", "pass"])
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # wait4 has taken it
    return usage.ru_utime + usage.ru_stime


def _until_listening(report: Report, name: str, firmware: Path) -> tuple[float, float]:
    """CPU and wall-clock seconds from the start to the first connection."""
    port = free_port()
    command = report.bench.command(name, port, tls=False, firmware=firmware)
    began = time.monotonic()
    running = report.bench.launch(name, command, port)
    try:
        wait_until_listening(running)
        return running.cpu(), time.monotonic() - began
    finally:
        running.stop()


def _start_with_images(report: Report) -> None:
    count = max(5, int(IMAGES * report.options.scale))
    firmware = report.bench.folder / "images"
    firmware.mkdir()
    write_image(firmware / "update-2.0.0.bin", "update", 1_000_000)
    image = (firmware / "update-2.0.0.bin").read_bytes()
    settled = time.time() - 3600
    for number in range(count - 1):
        path = firmware / f"project{number % 50}-1.{number}.0.bin"
        path.write_bytes(image)
        os.utime(path, (settled, settled))
    starts = [_until_listening(report, "ours", firmware) for _ in range(3)]
    wall = statistics.median(wall for _, wall in starts)
    report.goal(f"s until it listens, {count} images of 1 MB", wall, "<= 0.5")
    began = time.monotonic()
    server = report.bench.start("ours", firmware=firmware)
    first = time.monotonic() - began
    server.wait_until_idle()
    rows = [(f"{count} images of 1 MB", f"{wall:.2f}", f"{first:.2f}", f"{server.cpu():.2f}")]
    headings = ("start", "s until it listens", "s until 304", "CPU s until all are checked")
    report.table(headings, rows)
    server.stop()
    for path in firmware.iterdir():
        path.unlink()


# -- Many files ------------------------------------------------------------------------------------


def _many_files(report: Report, layout: str) -> None:
    """The cost of a check, whatever lies in the folder."""
    servers: list[Running] = []
    counts = [max(10, int(count * report.options.scale)) for count in FILES]
    for count in dict.fromkeys(counts):
        firmware = report.bench.folder / f"{layout}-{count}"
        firmware.mkdir()
        write_image(firmware / "update-2.0.0.bin", "update", 0)
        image = (firmware / "update-2.0.0.bin").read_bytes()
        settled = time.time() - 3600
        for number in range(count - 1):
            project = f"project{number}" if layout == "projects" else "update"
            path = firmware / f"{project}-0.{number}.0.bin"
            path.write_bytes(image)
            os.utime(path, (settled, settled))
        server = report.bench.start("ours", firmware=firmware)
        server.name = f"{count:,} {layout}"
        server.wait_until_idle()
        servers.append(server)
    work = checks_work(report.load, report.options.seconds)
    samples = alternate(servers, work, report.options.rounds)
    idle = {server.name: _idle_share(server) for server in servers}
    rows = [_files_row(report, server, servers[0], samples, idle) for server in servers]
    for server in servers:
        server.stop()
    title = "a project each" if layout == "projects" else "releases of one project"
    headings = (title, "CPU us/check, p25", "ratio", "without looks", "idle CPU ms/s", "MB")
    report.table(headings, rows)


def _idle_share(server: Running) -> float:
    """The share of a core it uses while nobody asks: for its looks at the folder."""
    cpu = server.cpu()
    time.sleep(2)
    return (server.cpu() - cpu) / 2


def _files_row(
    report: Report,
    server: Running,
    fewest: Running,
    samples: Mapping[str, Sequence[Sample]],
    idle: Mapping[str, float],
) -> tuple[str, ...]:
    """A row of the table, and its verdict."""

    def without_looks(name: str) -> list[float]:
        of = samples[name]
        return [(s.cpu - idle[name] * s.result.seconds) / max(1, s.result.done) for s in of]

    ratio = paired(samples, server.name, fewest.name, lambda each: each.micros)
    pairs = zip(without_looks(server.name), without_looks(fewest.name), strict=True)
    net = statistics.median(a / b for a, b in pairs)
    if server is not fewest:
        note = f"{net:.3f} without the looks at the folder, {idle[server.name] * 1e3:.0f} ms/s"
        what = f"{server.name}: CPU per check / {fewest.name}"
        report.goal(what, ratio, "<= 1.1x", "{:.3f}", note)
    micros = lower_quartile([each.micros for each in samples[server.name]])
    resident = server.memory().resident / 1e6
    figures = f"{ratio:.3f}", f"{net:.3f}", f"{idle[server.name] * 1e3:.1f}", f"{resident:.1f}"
    return (server.name, f"{micros:.1f}", *figures)


def main() -> int:
    """The exit status: 1 if a goal is not met."""
    assert __doc__
    return run_part(__doc__, read_options(__doc__), _measure)


if __name__ == "__main__":
    sys.exit(main())
