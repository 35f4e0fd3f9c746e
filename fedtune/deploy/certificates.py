"""The coordinator's own certificate authority, its server's certificate, and the keys of sites.

A federation has one authority, made with it: sites pin it when they join and believe nobody else.
Keys are elliptic curves of NIST, P-384, which every TLS library takes and Flower wants for its
nodes. Certificates are valid from a day before they are made, because clocks differ.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import DeploymentError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
"""The longest that Apple's TLS accepts of a server: support.apple.com/en-us/103769."""

_LOCAL_NAMES = ("localhost",)
_LOCAL_ADDRESSES = ("127.0.0.1", "::1")
_MOST_PEM_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and what certifies its public half, both in PEM."""

    key: bytes
    certificate: bytes


def make_authority(name: str, now: datetime.datetime | None = None) -> KeyPair:
    """A new certificate authority.

    Args:
        name: what the certificate says of itself, such as the coordinator's host.
        now: time of making; None: the clock's.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([_common_name(f"fedtune CA of {name}")])
    builder = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return KeyPair(_private_pem(key), _pem(builder.sign(key, hashes.SHA384())))


def make_server_certificate(
    authority: KeyPair, host: str, now: datetime.datetime | None = None
) -> KeyPair:
    """A new key for the coordinator's server, certified for a host and for this machine itself.

    Args:
        authority: who certifies it.
        host: name or address that sites connect to.
        now: time of making; None: the clock's.

    Raises:
        DeploymentError: the host is neither name nor address, or the authority cannot be read.
    """
    issuer = read_certificate(authority.certificate, "the CA certificate")
    issuer_key = read_private_key(authority.key, "the CA key")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([_common_name(host)])
    builder = (
        _builder(subject, issuer.subject, key.public_key(), SERVER_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    return KeyPair(_private_pem(key), _pem(builder.sign(issuer_key, hashes.SHA384())))


def fingerprint(certificate_pem: bytes) -> bytes:
    """SHA-256 of a certificate, 32 bytes, as browsers and `openssl x509 -fingerprint` show it.

    Raises:
        DeploymentError: it is not one certificate in PEM.
    """
    return read_certificate(certificate_pem, "the CA certificate").fingerprint(hashes.SHA256())


def certificate_end(path: Path) -> datetime.datetime | None:
    """When a certificate ends, UTC; None where none can be read."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def days_left(path: Path, now: datetime.datetime | None = None) -> float | None:
    """Days until a certificate ends, negative once it has; None where none can be read.

    Args:
        now: UTC; None: the clock's.
    """
    end = certificate_end(path)
    return None if end is None else (end - (now or _now())).total_seconds() / 86_400


def read_pair(certificate: Path, key: Path) -> KeyPair:
    """A server's key and certificate as they lie on the disk, if they belong together.

    Any kind of key will do, and a certificate may have those of its issuers behind it.

    Raises:
        DeploymentError: they do not, or cannot be read; such as in the middle of a rotation.
    """
    remedy = "make new ones with: fedtune server rotate"
    try:
        pair = KeyPair(key.read_bytes(), certificate.read_bytes())
        public = x509.load_pem_x509_certificate(pair.certificate).public_key()
        private = serialization.load_pem_private_key(pair.key, password=None)
    except OSError as error:
        raise DeploymentError(
            f"{error.filename} cannot be read ({error.strerror}); restore it, or {remedy}"
        ) from None
    except (ValueError, TypeError):
        raise DeploymentError(
            f"{certificate} and {key}: expected a certificate and a private key without password "
            f"in PEM, found something else; {remedy}"
        ) from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*form) != private.public_key().public_bytes(*form):
        raise DeploymentError(f"{certificate} is not of the key {key}; {remedy}")
    return pair


def certified_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that a server's certificate is made for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )


def read_certificate(content: bytes, what: str) -> x509.Certificate:
    """One certificate in PEM.

    Args:
        what: how an error calls it.

    Raises:
        DeploymentError: it is something else.
    """
    try:
        if len(content) > _MOST_PEM_BYTES:
            raise ValueError(f"{len(content)} bytes")
        found = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise DeploymentError(
            f"{what}: expected a certificate in PEM, found something else ({_line(error)})"
        ) from None
    if len(found) != 1:
        raise DeploymentError(f"{what}: expected one certificate, found {len(found)}")
    return found[0]


def read_private_key(content: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """An elliptic private key, in PEM or in OpenSSH's form.

    Args:
        what: how an error calls it; the key itself is never shown.

    Raises:
        DeploymentError: it is something else.
    """
    load = (
        serialization.load_ssh_private_key
        if b"OPENSSH" in content[:64]
        else serialization.load_pem_private_key
    )
    try:
        key = load(content, password=None)
    except (ValueError, TypeError):
        raise DeploymentError(f"{what}: expected a private key without password in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeploymentError(f"{what}: expected an elliptic key, found another kind")
    return key


# ---------------------------------------------------------------- sites' keys


@dataclass(frozen=True, slots=True)
class NodeKey:
    """What proves who a site is.

    Attributes:
        private: in OpenSSH's form, as Flower's node reads it.
        public: in PEM, as Flower's coordinator keeps it.
    """

    private: bytes
    public: bytes


def make_node_key() -> NodeKey:
    """A new key of a site."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return NodeKey(private, public_pem(key.public_key()))


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as Flower writes it in its headers and its database."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def read_public_key(content: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a site; anything but a P-384 key in PEM is refused.

    Raises:
        DeploymentError: it is something else.
    """
    expected = "expected the public key of a site, P-384 in PEM"
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, TypeError):
        raise DeploymentError(f"{expected}; found something else") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise DeploymentError(f"{expected}; found a key of another kind")
    return key


def prove(private: bytes, secret: bytes, authority_sha256: bytes) -> bytes:
    """A signature that shows that the sender of a join code holds the private key.

    Args:
        private: the site's key.
        secret: of the join code.
        authority_sha256: fingerprint of the authority that the site sees, so that a proof that
            was given to an impostor is worth nothing at the coordinator.
    """
    key = read_private_key(private, "the site's key")
    return key.sign(_claim(secret, authority_sha256), ec.ECDSA(hashes.SHA384()))


def proves(public: bytes, secret: bytes, authority_sha256: bytes, proof: bytes) -> bool:
    """Whether a proof was made by the private half of a key, for this code and authority.

    Raises:
        DeploymentError: the public key is not one of a site.
    """
    try:
        read_public_key(public).verify(
            proof, _claim(secret, authority_sha256), ec.ECDSA(hashes.SHA384())
        )
    except InvalidSignature:
        return False
    return True


def _claim(secret: bytes, authority_sha256: bytes) -> bytes:
    return b"fedtune join 1\n" + hashlib.sha256(secret).digest() + authority_sha256


# ---------------------------------------------------------------- parts


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime.datetime | None,
) -> x509.CertificateBuilder:
    start = now or _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - datetime.timedelta(days=1))
        .not_valid_after(start + datetime.timedelta(days=days - 1))
    )


def _common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text[:64])  # 64: RFC 5280, ub-common-name


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(host: str) -> list[x509.GeneralName]:
    names = dict.fromkeys((host, *_LOCAL_NAMES, *_LOCAL_ADDRESSES))
    return [_general_name(name) for name in names]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
