"""The doctor beside real servers: ours, which is well, and an nginx that is set up wrongly."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ota_server
from ota_fleet.doctor import main
from tests.conftest import put, running, site_of, wait_until
from tests.fleet.sick import NEW32, Healthy, codes_of, findings_of, levels_of, scripted


def test_our_server_is_well(folder: Path, certificate: Path) -> None:
    tls = ota_server.tls_context(str(certificate), "")
    both: tuple[tuple[dict[str, Any], str], ...] = (({}, "http"), ({"tls": tls}, "https"))
    for options, scheme in both:
        with running(site_of(folder), **options) as server:
            out = io.StringIO()
            url = f"{scheme}://127.0.0.1:{server.server_port}/firmware"
            assert main(["--cacert", str(certificate), url], {}, out) == 0
        *lines, last = out.getvalue().splitlines()
        assert {line.split()[0] for line in lines} == {"ok"}
        assert last == f"ok: {len(lines)}, warn: 0, FAIL: 0"


def test_our_server_is_asked_for_the_wrong_thing(folder: Path, certificate: Path) -> None:
    tls = ota_server.tls_context(str(certificate), "")
    with running(site_of(folder)) as plain, running(site_of(folder), tls=tls) as secure:
        base = f"127.0.0.1:{plain.server_port}"
        fixed = findings_of(f"http://{base}/firmware/firmware-1.0.0.bin", "--as", "esp8266")
        assert levels_of(fixed, "loop") == {"warn"}  # its digest ends the updates
        assert codes_of(findings_of(f"http://{base}/firmwear")) == {"not-found"}
        newest = findings_of(f"http://{base}/firmware", "--version", "9.0.0", "--as", "esp8266")
        assert codes_of(newest) == {"nothing-newer"}
        assert codes_of(findings_of(f"http://{base}/firmware", "--as", "esp32")) == {"forbidden"}
        assert codes_of(findings_of(f"https://{base}/firmware")) == {"http-port"}
        port = secure.server_port
        assert codes_of(findings_of(f"http://127.0.0.1:{port}/firmware")) == {"https-port"}


def test_our_server_with_a_token_is_well(folder: Path, certificate: Path) -> None:
    tls = ota_server.tls_context(str(certificate), "")
    put(folder / "sensor-1.1.0.bin", NEW32)
    with running(site_of(folder, token="t0ken"), tls=tls) as server:  # noqa: S106
        base, cacert = f"https://127.0.0.1:{server.server_port}", ("--cacert", str(certificate))
        url, idf = f"{base}/firmware", f"{base}/sensor/latest.bin"
        assert codes_of(findings_of(url, *cacert, "--token", "t0ken")) == set()
        assert codes_of(findings_of(idf, *cacert, "--token", "t0ken", "--as", "esp-idf")) == set()
        assert codes_of(findings_of(f"{idf}?token=t0ken", *cacert, "--as", "esp-idf")) == set()
        assert codes_of(findings_of(url, *cacert, "--token", "other")) == {"token-wrong"}
        assert codes_of(findings_of(url, *cacert)) == {"unauthorized"}


def test_the_command_asks_a_server(folder: Path) -> None:
    with running(site_of(folder)) as server:
        url = f"http://127.0.0.1:{server.server_port}/firmware"
        command = [sys.executable, ota_server.__file__, "check", url]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("ok: 3, warn: 0, FAIL: 0\n")


def test_a_file_server_gives_any_chip_anything(folder: Path) -> None:
    """Without --as the URL may be for the other kind: a warning. With it: a failure."""
    image = Healthy(image=NEW32)
    with scripted(image) as port:
        url = f"http://127.0.0.1:{port}/sensor"
        assert levels_of(findings_of(url), "wrong-chip") == {"warn"}
        assert levels_of(findings_of(url, "--as", "esp8266"), "wrong-chip") == {"FAIL"}


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  ssl_certificate {pem}; ssl_certificate_key {pem};
  server {{
    listen 127.0.0.1:{plain}; listen 127.0.0.1:{secure} ssl;
    location /good/ {{ proxy_pass http://{backend}; }}
    location /hidden/ {{ proxy_pass http://{backend}; proxy_hide_header x-MD5; }}
    location /doubled/ {{ proxy_pass http://{backend}; add_header x-MD5 $upstream_http_x_md5; }}
    location /filtered/ {{ proxy_pass http://{backend}; sub_filter_types *; sub_filter zzzz x; }}
    location /dropped/ {{
      proxy_pass http://{backend}; proxy_set_header x-ESP8266-version "";
    }}
    location /cached/ {{
      proxy_pass http://{backend}; proxy_set_header x-ESP8266-version 1.0.0;
    }}
    location /ranges/ {{ proxy_pass http://{backend}; max_ranges 0; proxy_set_header Range ""; }}
    location /moved/ {{ return 301 https://127.0.0.1/firmware; }}
    location /locked/ {{ return 401; }}
    location /away/ {{ proxy_pass http://127.0.0.1:9; }}
    location /page/ {{ default_type text/html; return 200 "<html>It works</html>"; }}
  }}
}}
"""
PROXIED = {
    "good": set[str](),
    "hidden": {"md5-missing"},
    "doubled": {"md5-doubled"},
    "filtered": {"no-length"},
    "dropped": {"lost-request-header"},
    "cached": {"loop"},
    "moved": {"redirect"},
    "locked": {"unauthorized"},
    "away": {"server-error"},
    "page": {"not-an-image", "md5-missing", "version-missing"},
}


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def nginx(folder: Path, pem: Path, backend: int) -> Iterator[tuple[int, int]]:
    """The ports, plain and TLS, of an nginx that is set up in many wrong ways."""
    plain, secure = free_port(), free_port()
    values = {"folder": folder, "pem": pem, "backend": f"127.0.0.1:{backend}"}
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(plain=plain, secure=secure, **values))
    command = ["nginx", "-p", str(folder), "-c", str(config), "-e", "stderr"]
    process = subprocess.Popen(command)

    def listens() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", secure), 1).close()
            return True
        return False

    try:
        wait_until(listens)
        yield plain, secure
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_a_real_nginx_set_up_wrongly_is_found_out(
    folder: Path, tmp_path: Path, certificate: Path
) -> None:
    put(folder / "sensor-1.1.0.bin", NEW32)
    with (
        running(site_of(folder)) as server,
        nginx(tmp_path, certificate, server.server_port) as (plain, secure),
    ):
        for place, wrong in PROXIED.items():
            found = findings_of(f"http://127.0.0.1:{plain}/{place}/firmware", "--as", "esp8266")
            assert codes_of(found) == wrong, place
        url = f"https://127.0.0.1:{secure}/good/firmware"
        options = ("--as", "esp8266", "--cacert", str(certificate))
        assert codes_of(findings_of(url, *options)) == {"tls-record"}  # 16 KB by default
        port = findings_of(f"http://127.0.0.1:{secure}/good/firmware")
        assert codes_of(port) == {"https-port"}  # nginx answers 400 in plain text
        image = f"http://127.0.0.1:{plain}/ranges/sensor/sensor-1.1.0.bin"
        assert "range" in codes_of(findings_of(image, "--as", "esp-idf"))
