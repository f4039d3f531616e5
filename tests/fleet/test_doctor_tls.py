"""The doctor's findings about TLS: real servers with certificates from the openssl command."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ota_fleet import diagnosis
from ota_fleet.diagnosis import is_named
from ota_fleet.handshake import Flight, client_hello, read_certificate, read_flight, records
from ota_fleet.probe import Target
from tests.fleet.sick import NEW32, Healthy, Reply, codes_of, findings_of, levels_of, scripted


@dataclass(frozen=True, slots=True)
class Shop:
    """A folder in which certificates are made."""

    folder: Path

    def make(
        self,
        name: str,
        *,
        signer: str = "",
        key: str = "-algorithm EC -pkeyopt ec_paramgen_curve:P-256",
        names: str = "DNS:127.0.0.1,IP:127.0.0.1",
        days: int = 30,
    ) -> Path:
        """Key and certificate in one PEM file; signed by itself or by another of this folder."""
        pem, config, wish = (self.folder / f"{name}{end}" for end in (".pem", ".cnf", ".csr"))
        config.write_text(f"basicConstraints=CA:{'FALSE' if names else 'TRUE'}\n")
        if names:
            config.write_text(f"subjectAltName={names}\n")
        self._run("genpkey", *key.split(), "-out", str(pem))
        self._run("req", "-new", "-key", str(pem), "-subj", f"/CN={name}", "-out", str(wish))
        by = self.folder / f"{signer or name}.pem"
        option = ("-CA", str(by), "-CAkey", str(by)) if signer else ("-signkey", str(pem))
        sign = ("x509", "-req", "-in", str(wish), *option, "-days", str(days), "-set_serial", "1")
        made = self._run(*sign, "-extfile", str(config))
        pem.write_bytes(pem.read_bytes() + made)
        return pem

    @staticmethod
    def _run(*arguments: str) -> bytes:
        return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A workshop with a root, an intermediate and a server's certificate."""
    made = Shop(tmp_path_factory.mktemp("shop"))
    made.make("root", names="")
    made.make("middle", signer="root", names="")
    made.make("leaf", signer="middle")
    return made


def context_of(pem: Path, *, more: Path | None = None) -> ssl.SSLContext:
    """A server's context; `more` is a certificate to send behind its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if more is not None:
        both = pem.with_suffix(".chain")
        both.write_bytes(pem.read_bytes() + _certificate_in(more))
        pem = both
    context.load_cert_chain(pem)
    return context


def _certificate_in(pem: Path) -> bytes:
    begin = b"-----BEGIN CERTIFICATE"
    return begin + pem.read_bytes().partition(begin)[2]


def tls_codes(context: ssl.SSLContext, *options: str, reply: Reply | None = None) -> set[str]:
    """What the doctor finds wrong with a scripted server behind TLS."""
    with scripted(reply or Healthy(), context) as port:
        url = f"https://127.0.0.1:{port}/blinds"
        return codes_of(findings_of(url, "--as", "esp8266", "--timeout", "5", *options))


def test_a_good_certificate_has_no_findings(shop: Shop) -> None:
    leaf, root = shop.folder / "leaf.pem", shop.folder / "root.pem"
    context = context_of(leaf, more=shop.folder / "middle.pem")
    assert tls_codes(context, "--cacert", str(root)) == set()
    rsa = shop.make("rsa", key="-algorithm RSA -pkeyopt rsa_keygen_bits:2048")
    context = context_of(rsa)
    assert tls_codes(context, "--cacert", str(rsa)) == set()
    context.set_ciphers("AES128-SHA256")  # old, but devices have it
    assert tls_codes(context, "--cacert", str(rsa)) == set()


def test_a_missing_intermediate_is_found(shop: Shop) -> None:
    context, root = context_of(shop.folder / "leaf.pem"), shop.folder / "root.pem"
    assert tls_codes(context, "--cacert", str(root)) == {"tls-chain"}
    middle = shop.folder / "middle.pem"  # whatever a sketch trusts ends its chain
    assert tls_codes(context, "--cacert", str(middle)) == set()


def test_an_untrusted_certificate_is_found(shop: Shop, certificate: Path) -> None:
    context, root = context_of(certificate), shop.folder / "root.pem"
    assert tls_codes(context, "--cacert", str(root)) == {"tls-untrusted"}
    with scripted(Healthy(), context) as port:
        found = findings_of(f"https://127.0.0.1:{port}/blinds", "--as", "esp8266")
    assert levels_of(found, "tls-untrusted") == {"warn"}  # nobody said what the sketch trusts


def test_dates_are_found(shop: Shop) -> None:
    old = shop.make("old", days=-1)
    assert tls_codes(context_of(old), "--cacert", str(old)) == {"tls-expired"}
    soon = shop.make("soon", days=3)
    with scripted(Healthy(), context_of(soon)) as port:
        url, options = (
            f"https://127.0.0.1:{port}/blinds",
            ("--as", "esp8266", "--cacert", str(soon)),
        )
        assert levels_of(findings_of(url, *options), "tls-expired") == {"warn"}
        early = codes_of(findings_of(url, *options, now=time.time() - 1e6))
    assert early == {"tls-not-yet-valid"}


@pytest.mark.parametrize("names", ["DNS:ota.example", "IP:127.0.0.1"])
def test_a_wrong_name_is_found(shop: Shop, names: str) -> None:
    pem = shop.make("named", names=names)
    with scripted(Healthy(image=NEW32), context_of(pem)) as port:
        url, cacert = f"https://127.0.0.1:{port}/blinds", ("--cacert", str(pem))
        assert "tls-name" in codes_of(findings_of(url, "--as", "esp8266", *cacert))
        found = codes_of(findings_of(url, "--as", "esp32", *cacert))
    assert found == (set() if names.startswith("IP") else {"tls-name"})


@pytest.mark.parametrize(
    ("kind", "host", "named"),
    [
        ("esp8266", "ota.example", True),
        ("esp8266", "OTA.example", True),
        ("esp8266", "a.lan", True),
        ("esp8266", "a.b.lan", False),
        ("esp8266", "lan", False),
        ("esp8266", "127.0.0.1", False),
        ("esp32", "127.0.0.1", True),
        ("esp-idf", "0:0::1", True),
    ],
)
def test_names_are_compared_as_the_device_does(kind: str, host: str, named: bool) -> None:
    names = [("DNS", "ota.example"), ("DNS", "*.lan"), ("IP", "127.0.0.1"), ("IP", "::1")]
    assert is_named(kind, names, host) is named
    assert is_named(kind, [("CN", host)], host)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("-algorithm Ed25519", "Ed25519"),
        ("-algorithm Ed448", "Ed448"),
        ("-algorithm EC -pkeyopt ec_paramgen_curve:secp256k1", "OID 2b8104000a"),
    ],
)
def test_a_key_that_devices_cannot_use_is_found(shop: Shop, key: str, name: str) -> None:
    pem = shop.make("strange", key=key)
    der = ssl.PEM_cert_to_DER_cert(_certificate_in(pem).decode())
    assert read_certificate(der).key == name
    flight = Flight(True, 0x0303, True, (der,))
    target = Target(True, "127.0.0.1", 443, "/")
    found = list(diagnosis.of_flight(["esp8266"], target, flight, time.time()))
    assert codes_of(found) == {"tls-key"}


def test_a_server_with_an_ed25519_key_is_found(shop: Shop) -> None:
    pem = shop.make("edwards", key="-algorithm Ed25519")
    assert tls_codes(context_of(pem), "--cacert", str(pem)) == {"tls-key"}


def test_a_large_rsa_key_is_found(shop: Shop) -> None:
    der = ssl.PEM_cert_to_DER_cert(_certificate_in(shop.folder / "leaf.pem").decode())
    certificate = replace(read_certificate(der), key="RSA 8192")
    assert codes_of(list(diagnosis.of_certificate(certificate, time.time()))) == {"tls-key"}


def test_large_certificates_are_found(shop: Shop) -> None:
    names = ",".join(f"DNS:{number:060}.example" for number in range(60))
    pem = shop.make("many", names=f"DNS:127.0.0.1,{names}")
    assert tls_codes(context_of(pem), "--cacert", str(pem)) == {"tls-chain-size"}


def test_large_records_are_found(certificate: Path) -> None:
    cacert = ("--cacert", str(certificate), "--timeout", "5")
    with scripted(Healthy(), context_of(certificate), piece=1 << 20) as port:
        url = f"https://127.0.0.1:{port}/blinds"
        assert codes_of(findings_of(url, "--as", "esp8266", *cacert)) == {"tls-record"}
        found = codes_of(findings_of(url, "--as", "esp32", *cacert))
    assert found == {"wrong-chip"}  # its buffers hold any record


def test_tls_1_3_alone_is_found(certificate: Path) -> None:
    context = context_of(certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    assert tls_codes(context) == {"tls-version"}


def test_older_tls_alone_is_found() -> None:
    flight = Flight(True, 0x0302, certificates=(b"",))
    target = Target(True, "127.0.0.1", 443, "/")
    assert codes_of(list(diagnosis.of_flight([], target, flight, 0))) == {"tls-version"}


def test_ciphers_that_no_device_has_are_found(certificate: Path) -> None:
    context = context_of(certificate)
    context.set_ciphers("ECDHE-ECDSA-AES256-CCM8")
    assert tls_codes(context) == {"tls-handshake"}


def test_a_demand_for_a_certificate_is_found(certificate: Path) -> None:
    context = context_of(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificate)
    found = tls_codes(context, "--cacert", str(certificate))
    assert found == {"tls-client-certificate", "tls-handshake"}


def test_the_wrong_kind_of_port_is_found(certificate: Path) -> None:
    with scripted(Healthy(), context_of(certificate)) as port:
        assert codes_of(findings_of(f"http://127.0.0.1:{port}/blinds")) == {"https-port"}
    with scripted(Healthy()) as port:  # ends the connection
        assert codes_of(findings_of(f"https://127.0.0.1:{port}/blinds")) == {"http-port"}
    with scripted(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:  # answers in HTTP
        assert codes_of(findings_of(f"https://127.0.0.1:{port}/blinds")) == {"http-port"}
    with scripted(lambda _: b"") as port:
        assert codes_of(findings_of(f"https://127.0.0.1:{port}/blinds")) == {"closed"}


def flight_of(context: ssl.SSLContext, hello: bytes) -> bytes:
    """What OpenSSL says to this hello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(hello)
    with contextlib.suppress(ssl.SSLError):
        server.do_handshake()
    return outgoing.read()


def test_small_records_are_asked_for_and_their_lack_is_found(certificate: Path) -> None:
    context, hello = context_of(certificate), client_hello("ota.example", bytes(32))
    honoured = read_flight(flight_of(context, hello))
    assert (honoured.tls, honoured.version, honoured.fragment) == (True, 0x0303, True)
    unknown = hello.replace(b"\0\1\0\1\2", b"\x5a\x5a\0\1\2")  # an extension nobody has
    ignored = read_flight(flight_of(context, unknown))
    assert not ignored.fragment
    target = Target(True, "127.0.0.1", 443, "/")
    for flight, wrong in ((honoured, set()), (ignored, {"tls-fragment"})):
        found = diagnosis.of_flight(["esp8266"], target, flight, time.time())
        assert codes_of(list(found)) == wrong


def test_a_flight_is_read_from_any_part_of_it(certificate: Path) -> None:
    data = flight_of(context_of(certificate), client_hello("a", bytes(32)))
    for size in range(len(data)):
        assert not read_flight(data[:size]).ended
    flight = read_flight(data)
    assert flight.ended
    assert b"".join(flight.certificates) == ssl.PEM_cert_to_DER_cert(
        _certificate_in(certificate).decode()
    )
    assert sum(5 + len(content) for _, content in records(data)) == len(data)


def test_no_broken_certificate_is_more_than_a_finding(certificate: Path) -> None:
    """Whatever is cut off or changed is read or is a ValueError."""
    der = ssl.PEM_cert_to_DER_cert(_certificate_in(certificate).decode())
    for position in range(len(der)):
        with contextlib.suppress(ValueError):
            read_certificate(der[:position])
        for byte in (0, 0x80, 0xFF):
            with contextlib.suppress(ValueError):
                read_certificate(der[:position] + bytes([byte]) + der[position + 1 :])
    found = diagnosis.of_flight(
        [], Target(True, "a", 1, "/"), Flight(True, 0x0303, True, (b"0",)), 0
    )
    assert codes_of(list(found)) == {"tls-certificate"}
