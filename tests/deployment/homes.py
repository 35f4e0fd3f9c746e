"""Homes of a coordinator and of sites for tests: certificates, keys and settings, on free ports."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.deploy.homes import CoordinatorHome, SiteHome

OPERATOR_TOKEN = "operator-token-of-tests"
_DAY = datetime.timedelta(days=1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def make_coordinator(path: Path, port: int, more: str = "") -> CoordinatorHome:
    """A home with a CA, a certificate for localhost, the operator's file and settings."""
    home = CoordinatorHome(path)
    home.ca_certificate.parent.mkdir(parents=True)
    ca_key, ca = _certificate("ca", None)
    key, certificate = _certificate("localhost", (ca_key, ca))
    home.ca_certificate.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    home.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    home.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    home.operator_file.write_text(f'token = "{OPERATOR_TOKEN}"\n', encoding="utf-8")
    home.settings_file.write_text(
        f'host = "localhost"\nbind = "127.0.0.1"\nport = {port}\n{more}', encoding="utf-8"
    )
    (path / "test_sites.json").write_text("[]", encoding="utf-8")
    return home


def _certificate(
    name: str, signer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[1].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 30 * _DAY)
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
    )
    if signer is not None:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return key, builder.sign(signer[0] if signer else key, hashes.SHA256())


def make_site(
    path: Path, name: str, coordinator: CoordinatorHome, port: int, *, enrol: bool = True
) -> SiteHome:
    """A site's home with its key, registered at the coordinator."""
    home = SiteHome(path)
    path.mkdir(parents=True)
    home.ca_certificate.write_bytes(coordinator.ca_certificate.read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    home.node_key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    home.settings_file.write_text(
        f'[site]\nname = "{name}"\nserver = "localhost:{coordinator.settings().port}"\n'
        f'service = "localhost:1"\nnode_port = {port}\n',
        encoding="utf-8",
    )
    if enrol:
        set_site(coordinator, name, public_pem(key), "enrolled")
    return home


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half, as Flower's header holds it."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    )


def load_key(home: SiteHome) -> ec.EllipticCurvePrivateKey:
    """A site's key."""
    key = serialization.load_ssh_private_key(home.node_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def set_site(coordinator: CoordinatorHome, name: str, public_key: str, state: str) -> None:
    """Put a site into the tests' registry, or change it there."""
    file = coordinator.path / "test_sites.json"
    sites = [site for site in json.loads(file.read_text("utf-8")) if site["name"] != name]
    sites.append(
        {"name": name, "public_key": public_key, "state": state, "token": f"token-of-{name}"}
    )
    made = file.with_suffix(".new")
    made.write_text(json.dumps(sites), encoding="utf-8")
    made.replace(file)
