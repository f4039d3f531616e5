"""Searches for bytes that the readers of `ota_server.py` neither read nor refuse.

    python3 -m bench.fuzz [TARGET] [--seconds N]

Needs atheris (PyPI), a fuzzer that goes by coverage. The promise: only Refused or ValueError comes
out, and 64 KB take less than a second. To see what grows faster than its input, one in 16 is
stretched to 64 KB by a piece that repeats.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from bench.report import say
from bench.servers import ROOT, device_head
from tests.data.make_images import esp32_image, esp8266_image, esp8266_signed, gzip_image

LONGEST = 64 * 1024  # bytes of an input
LIMIT = 1.0  # seconds of processor time for one of them
HANG = 20  # seconds after which libFuzzer ends the process
CHILD = "import sys; from bench.fuzz import fuzz; fuzz(*sys.argv[1:])"
PIECES = b" |\t|\r\n|\r\n |0|9|a|.|-|+|,|:|/|%41".split(b"|")

HEAD = device_head("firmware")
FIELDS = HEAD.partition(b"\r\n")[2]
ABSOLUTE = b"\r\nGET http://[::1]:80/a%20b/c?x=%41 HTTP/1.1\r\nHost: a\r\nTE: a\r\nTE: b\r\n\r\n"
BODY = b"OPTIONS * HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
ESP8266, ESP32 = esp8266_image("fuzz", "1.0.0"), esp32_image("fuzz", "1.0.0")
OLD, BARE = esp8266_image("a", "1", crc=False), esp32_image("a", "1", hash_appended=False)
SEEDS = {
    "head": (HEAD, ABSOLUTE, BODY),
    "range": (b"bytes=0-99", b"Bytes=-5", b" bytes=100-", b"bytes=0-1,5-", b"bytes=9999-9"),
    "report": (FIELDS, FIELDS.replace(b"ESP8266", b"ESP32"), b"User-Agent:ESP8266-http-Update"),
    "version": (b"1.2.3", b"v1.2", b"1.2.3-rc.1+b.1", b"0.0.0", b"10.20.30-0a.b+c"),
    "image": (ESP8266, OLD, ESP32, BARE, esp8266_signed(ESP8266), *map(gzip_image, (OLD, ESP32))),
}


def read_head(ota: Any, data: bytes) -> None:
    """As it comes from a socket; the parser is held to the promise beyond the longest head, too."""
    with suppress(ota.Refused):
        ota.split_head(data)
    ota.parse_head(data, "192.0.2.1")


def read_fields(ota: Any, data: bytes) -> None:
    """A report of header fields, one a line."""
    pairs = (line.partition(":") for line in data.decode("latin-1").split("\r\n"))
    fields = {name.lower(): value.strip() for name, _, value in pairs}
    ota.read_report("firmware", fields, "192.0.2.1")


def read_image(ota: Any, data: bytes) -> None:
    """An inspection of a file."""
    with tempfile.TemporaryFile(buffering=0) as file:
        assert isinstance(file, FileIO)
        file.write(data)
        file.seek(0)
        ota.inspect(file)


TARGETS: dict[str, Callable[[Any, bytes], object]] = {
    "head": read_head,
    "range": lambda ota, data: ota.parse_range(data.decode("latin-1"), 1000),
    "report": read_fields,
    "version": lambda ota, data: ota.Version.parse(data.decode("utf-8", "surrogateescape")),
    "image": read_image,
}


def stretch(data: bytes) -> bytes:
    """The input as it is, or one in 16 made longer; by its CRC, so that it happens again."""
    dice, others = divmod(zlib.crc32(data), 16)
    if others:
        return data
    dice, which = divmod(dice, 2 * len(PIECES))
    start = dice % (len(data) + 1)
    piece = PIECES[which // 2] if which % 2 else data[start : start + which // 2 + 1] or b"\0"
    return data[:start] + piece * ((LONGEST - len(data)) // len(piece)) + data[start:]


def fuzz(name: str, *options: str) -> None:
    """Never returns: libFuzzer ends the process, and leaves what broke the promise in a file."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["ota_server"]):
        ota: Any = importlib.import_module("ota_server")

    def attempt(invented: bytes) -> None:
        data = stretch(invented)
        begun = time.thread_time()
        with suppress(ota.Refused, ValueError):
            TARGETS[name](ota, data)
        if (took := time.thread_time() - begun) > LIMIT:
            raise TimeoutError(f"{len(data)} bytes took {took:.2f} s")

    atheris.Setup([name, *options], attempt)
    atheris.Fuzz()


def hunt(name: str, seconds: int) -> bool:
    """Whether a target kept the promise for so long; says what came of it."""
    folder = Path(tempfile.mkdtemp(prefix=f"ota-fuzz-{name}-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    limits = f"-max_total_time={seconds}", f"-timeout={HANG}", f"-max_len={LONGEST}"
    options = *limits, f"-artifact_prefix={folder}/", str(corpus)
    command = sys.executable, "-c", CHILD, name, *options
    child = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)  # noqa: S603
    said = (child.stderr + child.stdout).decode(errors="backslashreplace")
    done = re.search(r"Done ([0-9]+) runs in ([0-9]+)", said)
    shutil.rmtree(corpus)
    if done and child.returncode == 0:
        folder.rmdir()
        say(f"{name}: {int(done[1]):,} inputs in {done[2]} s, all read or refused")
        return True
    say(said[-3000:])  # the trace
    for path in list(folder.iterdir()):
        data = stretch(path.read_bytes())
        (folder / "input").write_bytes(data)
        say(f"{name}: BROKEN by {folder / 'input'}, {len(data)} bytes: {data[:200]!r}")
    return False


def main() -> int:
    """The exit status: 1 if the promise is broken, 2 without atheris."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", nargs="?", choices=TARGETS, help="default: all of them")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        say("atheris is missing: pip install atheris, into an environment of its own")
        return 2
    names = [given.target] if given.target else list(TARGETS)
    broken = [name for name in names if not hunt(name, max(1, given.seconds))]
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
