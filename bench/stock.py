"""The same work as most people would write it with the standard library: what ours is held against.

ThreadingHTTPServer and BaseHTTPRequestHandler as they come: a thread for each connection, a line
of log for each request. The folder is listed once a second at most and digests are kept, so that
no difference comes from work that anybody would keep out of a request.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = re.compile(r"(.+)-([0-9]+)\.([0-9]+)\.([0-9]+)\.bin")
Numbers = tuple[int, ...]


class StockServer(ThreadingHTTPServer):
    """Keeps what the handlers share."""

    daemon_threads = True
    request_queue_size = 4096  # 5, the standard, loses connections, which would hide what it costs

    def __init__(self, port: int, folder: str, *, quiet: bool) -> None:
        self.folder = folder
        self.quiet = quiet
        self._listed_at = float("-inf")
        self._newest: dict[str, tuple[Numbers, str]] = {}
        self._digests: dict[str, str] = {}
        super().__init__(("127.0.0.1", port), StockHandler)

    def newest(self, project: str) -> tuple[Numbers, str]:
        """Version and path of the project's newest file. KeyError: there is none."""
        now = time.monotonic()
        if now - self._listed_at > 1:
            found: dict[str, tuple[Numbers, str]] = {}
            for entry in os.scandir(self.folder):
                match = NAME.fullmatch(entry.name)
                if match:
                    version = tuple(map(int, match.group(2, 3, 4)))
                    found[match[1]] = max(found.get(match[1], ((), "")), (version, entry.path))
            self._newest, self._listed_at = found, now
        return self._newest[project]

    def md5(self, path: str) -> str:
        """The digest of a file, computed once."""
        if path not in self._digests:
            with open(path, "rb") as file:
                self._digests[path] = hashlib.file_digest(file, "md5").hexdigest()
        return self._digests[path]


class StockHandler(BaseHTTPRequestHandler):
    """Header, newest file, 304 or 200."""

    protocol_version = "HTTP/1.1"
    server: StockServer

    def do_GET(self) -> None:
        """Answers a device."""
        try:
            running = tuple(map(int, (self.headers["x-ESP8266-version"] or "").split(".")))
            version, path = self.server.newest(self.path.rpartition("/")[2])
        except (ValueError, KeyError):
            self.send_error(404)
            return
        if version <= running:
            self.send_response(304)
            self.end_headers()
            return
        with open(path, "rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            name = os.path.basename(path)
            self.send_header("Content-Disposition", f'attachment; filename="{name}"')
            self.send_header("x-MD5", self.server.md5(path))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """The base class's line, unless the server is to be quiet."""
        if not self.server.quiet:
            super().log_message(format, *args)


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--quiet", action="store_true", help="no line for each request")
    options = parser.parse_args()
    StockServer(options.port, options.dir, quiet=options.quiet).serve_forever()


if __name__ == "__main__":
    main()
