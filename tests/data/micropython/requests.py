"""The `requests` of MicroPython 1.29, as far as a script can tell: micropython-lib ee4bb8ff.

Its rules, from requests/__init__.py:37, 159-184 and 215-267: HTTP/1.1, the caller's header fields
in the order of the dict (which is none in MicroPython), Host without a port, Connection: close, no
User-Agent; header names keep the server's spelling; a line that ends in a bare LF is a ValueError,
and so are a body that is too short and a Location where no redirect is. It runs in CPython and in
MicroPython.

`raw` gives at most 4 KB at a time, and `content` at most 4 KB in all: a board has no room for more.
"""

import socket

try:
    import tls  # type: ignore[import-not-found]
except ImportError:
    try:
        import ssl as tls  # CPython
    except ImportError:
        tls = None  # a MicroPython without

LIMIT = 4096  # bytes


class Body:
    """What is left of the body; the end of the connection before it ends is a ValueError."""

    def __init__(self, stream: object, left: int) -> None:
        self._stream, self._left = stream, left

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes; all when it is -1."""
        if count < 0 or count > self._left:
            count = self._left
        if count > LIMIT:
            raise MemoryError("memory allocation failed")
        data = self._stream.read(count) if count else b""  # type: ignore[attr-defined]
        self._left -= len(data)
        if count and not data:
            raise ValueError("Connection closed before Content-Length satisfied")
        return data

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()  # type: ignore[attr-defined]


class Response:
    """Status, header fields and body of an answer."""

    def __init__(self, raw: Body, status: int, headers: dict[str, str]) -> None:
        self.raw, self.status_code, self.headers = raw, status, headers

    @property
    def content(self) -> bytes:
        """All of the body."""
        data = b""
        while piece := self.raw.read():
            data += piece
        return data

    @property
    def text(self) -> str:
        """All of the body, as text."""
        return str(self.content, "utf-8")

    def close(self) -> None:
        """Ends the connection."""
        self.raw.close()


def get(url: str, headers: dict[str, str], timeout: float) -> Response:
    """The answer to a GET, after redirects; seconds to wait for anything."""
    given = dict(headers)
    scheme, _, host, path = url.split("/", 3)
    stream = _connect(scheme, host, timeout)
    given.setdefault("Host", host.split(":")[0])
    given.setdefault("Connection", "close")
    head = f"GET /{path} HTTP/1.1\r\n"
    head += "".join([f"{name}: {given[name]}\r\n" for name in given])
    stream.write((head + "\r\n").encode())  # type: ignore[attr-defined]
    status = int(stream.readline().split(None, 2)[1])  # type: ignore[attr-defined]
    fields = _read_headers(stream)
    location = [fields[name] for name in fields if name.lower() == "location"]
    if location and not 200 <= status <= 299:
        stream.close()  # type: ignore[attr-defined]
        if status not in (301, 302, 303, 307, 308):
            raise NotImplementedError(f"Redirect {status} not yet supported")
        return get(location[0], headers, timeout=timeout)
    lengths = [int(fields[name]) for name in fields if name.lower() == "content-length"]
    return Response(Body(stream, lengths[0] if lengths else 0), status, fields)


def _read_headers(stream: object) -> dict[str, str]:
    fields: dict[str, str] = {}
    while True:
        line = stream.readline()  # type: ignore[attr-defined]
        if not line or line == b"\r\n":
            return fields
        name, value = str(line, "utf-8").split(":", 1)
        fields[name] = value.strip()


def _connect(scheme: str, host: str, timeout: float) -> object:
    name, _, port = host.partition(":")
    number = int(port or {"http:": 80, "https:": 443}[scheme])
    info = socket.getaddrinfo(name, number, 0, socket.SOCK_STREAM)[0]
    connection = socket.socket(info[0], socket.SOCK_STREAM, info[2])
    connection.settimeout(timeout)
    connection.connect(info[-1])
    stream = _wrap(connection, name) if scheme == "https:" else connection
    return stream.makefile("rwb", 0) if hasattr(stream, "makefile") else stream


def _wrap(connection: object, name: str) -> object:
    """TLS without a look at the certificate, as the real one does."""
    context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    if hasattr(context, "check_hostname"):
        context.check_hostname = False
    context.verify_mode = tls.CERT_NONE
    return context.wrap_socket(connection, server_hostname=name)
