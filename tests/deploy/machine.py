"""A machine within this one: own network, own /etc, /run, /srv and /var/log, gone with the test.

There a proxy listens on port 443, with its file where the file's own words put it, and nobody else
notices. What a test starts runs inside; its own sockets are inside as long as it has entered().
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .test_install import ROOT, program

ADDRESS = "192.0.2.1"  # of the machine, and of every device in it: RFC 5737
CLONE_NEWNET = 0x40000000  # sched.h
# Buffers of the kernel stay small, so that nobody has sent what nobody has read.
SETUP = f"""set -e
mount -t tmpfs tmpfs "$0/etc"
cp -a /etc/. "$0/etc"
mount --bind "$0/etc" /etc
for place in /run /srv /var/log; do mount -t tmpfs tmpfs "$place"; done
mkdir -p /run/lock /run/home /srv/firmware /var/log/nginx /var/log/apache2
mount --bind "$0/firmware" /srv/firmware
echo 4096 16384 65536 | tee /proc/sys/net/ipv4/tcp_rmem > /proc/sys/net/ipv4/tcp_wmem
ip link set lo up
ip address add {ADDRESS} dev lo
echo ready
exec cat"""


@dataclass(slots=True)
class Machine:
    """The inner machine, and what was started in it."""

    folder: Path  # firmware/ is its /srv/firmware; what its programs log lies here
    holder: subprocess.Popen[str]  # keeps the namespaces
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def firmware(self) -> Path:
        """Its firmware folder, from outside."""
        return self.folder / "firmware"

    def path(self, inside: str) -> Path:
        """A file of it, as seen from outside: `var/log/...`."""
        return Path(f"/proc/{self.holder.pid}/root/{inside}")

    def command(self, *words: str) -> list[str]:
        """That command, run inside, from the root of the project."""
        outlive = ["setpriv", "--pdeathsig=TERM", "--"]  # never the tests that started it
        inside = ["nsenter", f"--target={self.holder.pid}", "--net", "--mount", "--"]
        shell = ["env", "HOME=/run/home", "sh", "-ec", 'cd "$0"; exec "$@"', str(ROOT)]
        return [*outlive, *inside, *shell, *words]

    def run(self, script: str) -> None:
        """Runs lines of shell as a user's terminal would; `sudo` is not needed."""
        lines = f'sudo() {{ "$@"; }}\n{script}'
        done = subprocess.run(
            self.command("sh", "-ec", lines), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def start(self, *words: str, log: str) -> subprocess.Popen[str]:
        """Starts a program that stays in the foreground; its standard error goes to folder/log."""
        with (self.folder / log).open("a") as errors:
            process = subprocess.Popen(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.started.append(process)
        return process

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and those it starts meanwhile, open their sockets inside."""
        with _network("thread-self") as before, _network(str(self.holder.pid)) as inner:
            _enter(inner)
            try:
                yield
            finally:
                _enter(before)


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """A new machine; skips the test where Linux or the rights for it are missing."""
    if not sys.platform.startswith("linux") or os.getuid() != 0:
        pytest.skip("needs root on Linux")
    for name in ("unshare", "nsenter", "setpriv", "mount", "ip"):
        program(name)
    for name in ("etc", "firmware"):
        (folder / name).mkdir()
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "--propagation=private", "sh", "-c", SETUP, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        inner = Machine(folder, holder)
        try:
            assert holder.stdout
            assert holder.stderr
            if holder.stdout.readline() != "ready\n":
                pytest.skip(f"no namespaces here: {holder.stderr.read().strip()}")
            yield inner
        finally:
            for process in inner.started:
                process.terminate()
            for process in inner.started:
                _ended(process)
            holder.terminate()


def _ended(process: subprocess.Popen[str]) -> None:
    with process, suppress(subprocess.TimeoutExpired):
        process.wait(5)
        return
    process.kill()


@contextmanager
def _network(process: str) -> Iterator[int]:
    descriptor = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(descriptor: int) -> None:
    """os.setns() of Python 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def lines_to_type(text: str) -> list[str]:
    """The commands in the comment that opens a file: its lines indented by four and more."""
    comment = [line for line in text.partition("\n\n")[0].splitlines() if line.startswith("#")]
    return [line[1:].strip() for line in comment if line.startswith("#     ")]


def words(line: str) -> Sequence[str]:
    """A command line of Python as words, with the Python that runs the tests."""
    first, *rest = shlex.split(line)
    assert first == "python3"
    return [sys.executable, *rest]
