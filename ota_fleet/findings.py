"""What the doctor says.

A finding has a level, a code that stays as it is, a sentence about this server, and a cure, which
belongs to the code.
"""

from __future__ import annotations

from typing import NamedTuple

CURES = {
    "name": "correct the host in the URL, or the entry in the name server",
    "refused": "start the server, open the port in the firewall, publish it (docker run -p)",
    "timeout": "ask from another network; look at firewall, router and the load of the server",
    "unreachable": "look at the route to the server",
    "closed": "read the log of the server and of the proxy before it",
    "https-port": "write https:// into the sketch and use a secure client",
    "http-port": "write http:// into the sketch, or give the server a certificate (--cert)",
    "tls-version": "allow TLS 1.2 (nginx: ssl_protocols TLSv1.2 TLSv1.3;)",
    "tls-handshake": "allow ECDHE with AES-GCM, and a key that is P-256 or RSA with 2048 bits",
    "tls-untrusted": "run this with --cacert and the very certificates that the sketch trusts",
    "tls-chain": "serve the whole chain (fullchain.pem), or name your own CA by --cacert",
    "tls-expired": "renew the certificate and let server and proxy read it again",
    "tls-not-yet-valid": "correct the clock of whoever made the certificate, and make it again",
    "tls-name": "put the host into subjectAltName; an address as DNS:1.2.3.4,IP:1.2.3.4",
    "tls-key": "make a certificate with a P-256 key, or RSA with 2048 or 3072 bits",
    "tls-chain-size": "use P-256 and leave out certificates a device does not need, the root first",
    "tls-record": "write smaller records (nginx: ssl_buffer_size 2k;)",
    "tls-fragment": "let OpenSSL end TLS, or give the sketch a receive buffer of 16 KB",
    "tls-client-certificate": "do not ask devices for certificates, or give each of them one",
    "tls-certificate": "make the certificate again, with openssl",
    "clock": "set the clock of the server and of this computer (NTP)",
    "not-http": "let HTTP/1.1 answer on this port, no HTTP/2 without a choice",
    "interim": "switch off what sends 1xx responses",
    "redirect": "put the URL where it leads into the sketch, or switch the redirect off",
    "unauthorized": "give the token that the device sends: --token",
    "token-wrong": "correct the token in the sketch, or let the proxy pass on Authorization",
    "token-basic": "let the server take Basic with the token as password",
    "token-bearer": "use Basic in the sketch, or let the server take Bearer too",
    "token-open": "start the server with --token or --token-file; look at caches in the proxy",
    "token-clear": "use https://",
    "no-challenge": "send WWW-Authenticate with a 401",
    "forbidden": "look at --allow, at signatures and at the project in the URL; with --admit "
    "whitelist, admit 00:00:5E:00:53:01 and 00:00:5E:00:53:02, as which this asks",
    "wrong-chip": "have a URL for each chip, or a server that looks at the device's fields",
    "not-found": "correct the path; the last part of the URL is the project",
    "bad-request": "read the reason; a wrong path and a strict proxy are the likely causes",
    "version-needed": "use /<project>/latest.bin, or put ?version= into the URL",
    "lost-request-header": "let the proxy pass on all x-ESP8266-* and x-ESP32-* fields",
    "server-error": "read the log of the server; a proxy says 502 or 504 when it does not reach it",
    "status": "let the path answer 200 with the image, or 304",
    "nothing-newer": "claim an older version (--version 0.0.1) or look for the image in the folder",
    "no-length": "send Content-Length; nginx: switch off sub_filter and gzip for this path",
    "chunked": "nginx: chunked_transfer_encoding off; and keep the server's Content-Length",
    "compressed": "switch compression off for this path (nginx: gzip off; Apache: no-gzip)",
    "md5-missing": "pass x-MD5 on (nginx: no proxy_hide_header; add_header after X-Accel-Redirect)",
    "md5-doubled": "add x-MD5 in one place: the server does, so the proxy need not",
    "md5-upper": "send lower-case hex",
    "md5-malformed": "send 32 lower-case hex digits without quotes, or nothing",
    "md5-wrong": "let nothing change the body on its way; empty the proxy's cache",
    "sha256-wrong": "let nothing change the body on its way; empty the proxy's cache",
    "body-short": "look for a proxy's limits of time and size; read the server's log",
    "body-long": "let Content-Length be the size of the body",
    "not-an-image": "look at what the path returns: a proxy's page, a login, a wrong file",
    "damaged": "copy the image again; let nothing change it on its way",
    "body-late": "let the proxy send head and body together (nginx: proxy_buffering on)",
    "head-late": "look at the load of the server and at the name servers of the proxy",
    "version-missing": "pass x-version on",
    "loop": "pass x-version and the device's fields on, cache nothing, raise the sketch's version",
    "head": "answer HEAD like GET, without the body",
    "range": "pass Range and If-Range on, or switch resuming off in the device",
    "url-long": "use a shorter path, or buffer_size_tx in esp_http_client_config_t",
    "plain-http": "use https://, or build with CONFIG_ESP_HTTPS_OTA_ALLOW_HTTP",
}

WAITING = {  # why a server with a memory gives nothing to a device that claims an older version
    "loop": "let the device try again, on its page, once it is known why it cannot run it",
    "halted": "the rollout stopped by itself: resume or abort it on its page",
    "paused": "somebody paused the rollout: resume it",
    "aborted": "somebody ended the rollout for good: begin another one",
    "waiting-for-stage": "all is well: the rollout has not come to this device yet",
    "paced": "all is well: ask again later, the rollout lets only so many download at a time",
    "on-hold": "somebody holds the device, its group or its project: release it",
    "outside-window": "all is well: ask again in the maintenance window",
    "waiting-for-approval": "all is well: approve the version for a device, on its page",
    "withdrawn": "somebody took the release back: restore it, or upload another one",
}


class Finding(NamedTuple):
    """One line for the operator. The levels: ok, warn, FAIL."""

    level: str
    code: str
    sentence: str
    advice: str = ""  # in the place of the cure that belongs to the code

    @property
    def cure(self) -> str:
        """How to mend it; empty where nothing is wrong."""
        return "" if self.level == "ok" else self.advice or CURES[self.code]


def fail(code: str, sentence: str) -> Finding:
    """No update, or a harmful one."""
    return Finding("FAIL", code, sentence)


def warn(code: str, sentence: str) -> Finding:
    """Some devices fail, or some day."""
    return Finding("warn", code, sentence)
