"""Certificates and keys: what TLS and Flower make of them, and what is refused."""

from __future__ import annotations

import datetime
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from shutil import which

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.certificates import (
    KeyPair,
    certified_names,
    days_left,
    fingerprint,
    make_authority,
    make_node_key,
    make_server_certificate,
    prove,
    proves,
    public_pem,
    read_certificate,
    read_pair,
    read_private_key,
    read_public_key,
)
from fedtune.errors import DeploymentError

AUTHORITY = make_authority("fed.example.org")
NOW = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC)


def lay_out(folder: Path, pair: KeyPair) -> tuple[Path, Path]:
    certificate, key = folder / "server.crt", folder / "server.key"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    return certificate, key


def handshake(folder: Path, pair: KeyPair, trusted: KeyPair, name: str) -> str:
    """The TLS version that a client agrees on with a server of this certificate."""
    server_side, client_side = socket.socketpair()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*lay_out(folder, pair))

    def serve() -> None:
        try:
            serving.wrap_socket(server_side, server_side=True).close()
        except OSError:
            server_side.close()

    thread = threading.Thread(target=serve)
    thread.start()
    asking = ssl.create_default_context(cadata=trusted.certificate.decode())
    asking.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    try:
        with asking.wrap_socket(client_side, server_hostname=name) as connection:
            return str(connection.version())
    finally:
        client_side.close()
        thread.join(10)


@pytest.mark.parametrize("name", ["fed.example.org", "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_that_pins_the_authority_takes_the_server(
    tmp_path: Path, name: str
) -> None:
    pair = make_server_certificate(AUTHORITY, "fed.example.org")
    assert handshake(tmp_path, pair, AUTHORITY, name) == "TLSv1.3"


def test_another_authority_and_another_name_are_not_taken(tmp_path: Path) -> None:
    pair = make_server_certificate(AUTHORITY, "10.0.0.5")
    assert handshake(tmp_path, pair, AUTHORITY, "10.0.0.5") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(tmp_path, pair, make_authority("fed.example.org"), "10.0.0.5")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path, pair, AUTHORITY, "10.0.0.6")


def test_a_server_cannot_make_certificates(tmp_path: Path) -> None:
    """Who steals the server's key cannot be another host."""
    pair = make_server_certificate(AUTHORITY, "fed.example.org")
    forged = make_server_certificate(pair, "other.example.org")
    chained = KeyPair(forged.key, forged.certificate + pair.certificate)
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        handshake(tmp_path, chained, AUTHORITY, "other.example.org")


@pytest.mark.skipif(which("openssl") is None, reason="openssl is not installed")
def test_openssl_finds_the_chain_right(tmp_path: Path) -> None:
    certificate, _ = lay_out(tmp_path, make_server_certificate(AUTHORITY, "fed.example.org"))
    authority = tmp_path / "ca.crt"
    authority.write_bytes(AUTHORITY.certificate)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    done = subprocess.run(
        [*command, "-CAfile", authority, certificate], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_days_are_counted_to_the_end(tmp_path: Path) -> None:
    certificate, _ = lay_out(tmp_path, make_server_certificate(AUTHORITY, "a.example", NOW))
    assert days_left(certificate, NOW) == 824
    assert days_left(certificate, NOW + datetime.timedelta(days=830)) == -6
    made = read_certificate(make_authority("a", NOW).certificate, "it")
    assert (made.not_valid_after_utc - made.not_valid_before_utc).days == 3650
    assert days_left(tmp_path / "none") is None
    certificate.write_text("no certificate", encoding="utf-8")
    assert days_left(certificate) is None


def test_names_fingerprint_and_pair_are_read_back(tmp_path: Path) -> None:
    pair = make_server_certificate(AUTHORITY, "10.0.0.5")
    made = read_certificate(pair.certificate, "it")
    assert certified_names(made) == ("localhost", "10.0.0.5", "127.0.0.1", "::1")
    assert len(fingerprint(AUTHORITY.certificate)) == 32
    certificate, key = lay_out(tmp_path, pair)
    assert read_pair(certificate, key) == pair
    key.write_bytes(AUTHORITY.key)
    with pytest.raises(DeploymentError, match=r"is not of the key .* fedtune server rotate"):
        read_pair(certificate, key)
    key.write_text("no key", encoding="utf-8")
    with pytest.raises(DeploymentError, match=r"expected a certificate and .* server rotate"):
        read_pair(certificate, key)
    with pytest.raises(DeploymentError, match=r"cannot be read .* fedtune server rotate"):
        read_pair(tmp_path / "none", key)


def test_a_sites_key_is_as_flower_reads_it() -> None:
    key = make_node_key()
    private = serialization.load_ssh_private_key(key.private, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert public_pem(private.public_key()) == key.public
    assert key.public.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert read_private_key(key.private, "it").private_numbers() == private.private_numbers()


def test_a_proof_holds_for_one_key_code_and_authority() -> None:
    key, other = make_node_key(), make_node_key()
    proof = prove(key.private, b"secret", b"a" * 32)
    assert proves(key.public, b"secret", b"a" * 32, proof)
    assert not proves(other.public, b"secret", b"a" * 32, proof)
    assert not proves(key.public, b"Secret", b"a" * 32, proof)
    assert not proves(key.public, b"secret", b"b" * 32, proof)
    assert not proves(key.public, b"secret", b"a" * 32, b"")


def test_keys_of_other_kinds_are_refused() -> None:
    small = public_pem(ec.generate_private_key(ec.SECP256R1()).public_key())
    for content, words in ((small, "a key of another kind"), (b"no", "something else")):
        with pytest.raises(DeploymentError, match=f"P-384 in PEM; found {words}"):
            read_public_key(content)
    with pytest.raises(DeploymentError, match="it: expected a private key without password"):
        read_private_key(b"-----BEGIN", "it")
    for content in (b"", b"x" * 70_000, AUTHORITY.key):
        with pytest.raises(DeploymentError, match="it: expected a certificate in PEM"):
            read_certificate(content, "it")
    with pytest.raises(DeploymentError, match="it: expected one certificate, found 2"):
        read_certificate(AUTHORITY.certificate * 2, "it")


def test_a_long_host_stands_in_the_names_alone() -> None:
    host = ".".join(["long"] * 30) + ".example"
    made = read_certificate(make_server_certificate(AUTHORITY, host).certificate, "it")
    assert host in certified_names(made)
    assert isinstance(made, x509.Certificate)
