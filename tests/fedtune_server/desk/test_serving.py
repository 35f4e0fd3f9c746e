"""The desk's port: TLS that may be rotated, health for everybody, reflection for the operator."""

from __future__ import annotations

import asyncio
import datetime
import socket
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from fedtune.deploy import channel
from fedtune.deploy.channel import open_channel, spoken_errors
from fedtune.errors import AccessError, DeploymentError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import RunServiceStub
from fedtune_server.desk import serving
from fedtune_server.desk.serving import Certificate, listen
from tests.fedtune_server.desk.office import OPERATOR_TOKEN, make_home, opened_office, until


class Authority:
    """A certificate authority that signs for localhost."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.pem = self._sign(self._name, self._key, ca=True)

    def issue(self, folder: Path) -> None:
        """Write a new server.key and server.crt."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        folder.mkdir(parents=True, exist_ok=True)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / "server.key").write_bytes(private)
        (folder / "server.crt").write_bytes(self._sign(name, key, ca=False))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def list_runs(address: str, ca: bytes, token: str = OPERATOR_TOKEN) -> int:
    channel = open_channel(address, ca, token)
    try:
        with spoken_errors(address):
            return len(RunServiceStub(channel).ListRuns(pb.ListRunsRequest(), timeout=5).runs)
    finally:
        channel.close()


def test_calls_are_encrypted_and_the_authority_is_pinned(tmp_path: Path) -> None:
    authority, other = Authority(), Authority()
    authority.issue(make_home(tmp_path / "home").path / "pki")
    with opened_office(tmp_path / "home", authority.pem) as office:
        assert list_runs(office.address, authority.pem) == 0
        with pytest.raises(DeploymentError, match="does not answer"):
            list_runs(office.address, other.pem)
        with pytest.raises(AccessError, match="neither the operator's nor"):
            list_runs(office.address, authority.pem, "wrong")
        plain = open_channel(office.address, b"", OPERATOR_TOKEN, insecure=True)
        with pytest.raises(grpc.RpcError):
            RunServiceStub(plain).ListRuns(pb.ListRunsRequest(), timeout=5)
        plain.close()


def test_a_rotated_certificate_is_used_for_new_connections(tmp_path: Path) -> None:
    old, new = Authority(), Authority()
    pki = make_home(tmp_path / "home").path / "pki"
    old.issue(pki)
    with opened_office(tmp_path / "home", old.pem) as office:
        assert list_runs(office.address, old.pem) == 0
        new.issue(pki)
        assert list_runs(office.address, new.pem) == 0


def test_half_a_rotation_changes_nothing(tmp_path: Path) -> None:
    authority = Authority()
    authority.issue(tmp_path)
    certificate = Certificate(tmp_path / "server.crt", tmp_path / "server.key")
    assert certificate.fetch() is None
    key = (tmp_path / "server.key").read_bytes()
    authority.issue(tmp_path)
    (tmp_path / "server.key").write_bytes(key)
    assert certificate.fetch() is None
    (tmp_path / "server.crt").write_bytes(b"half")
    assert certificate.fetch() is None
    authority.issue(tmp_path)
    assert certificate.fetch() is not None


def test_a_new_operator_token_counts_at_once(tmp_path: Path) -> None:
    with opened_office(tmp_path / "home") as office, office.channel() as before:
        RunServiceStub(before).ListRuns(pb.ListRunsRequest(), timeout=5)
        office.parts.home.operator_file.write_text('token = "another"\n')
        with pytest.raises(grpc.RpcError, match="neither the operator's"):
            RunServiceStub(before).ListRuns(pb.ListRunsRequest(), timeout=5)
        office.parts.home.operator_file.unlink()
        with office.channel("") as none, pytest.raises(grpc.RpcError):
            RunServiceStub(none).ListRuns(pb.ListRunsRequest(), timeout=5)


def test_health_is_for_everybody_and_reflection_for_the_operator(tmp_path: Path) -> None:
    with opened_office(tmp_path / "home") as office:
        with office.channel("nobody") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "fedtune.v1.RunService"):
                answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                ProtoReflectionDescriptorDatabase(channel).get_services()
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with office.channel() as channel:
            names = ProtoReflectionDescriptorDatabase(channel).get_services()
            assert "fedtune.v1.ArtifactService" in names


def test_callers_may_ping_as_often_as_they_do() -> None:
    """A server that minds ends a stream that is silent for a minute: `too_many_pings`.

    The names are gRPC's own; one that it does not know is ignored without a word.
    """
    allowed = dict(serving._OPTIONS)
    every_ms = dict(channel._OPTIONS)["grpc.keepalive_time_ms"]
    assert allowed["grpc.http2.min_ping_interval_without_data_ms"] < every_ms
    assert allowed["grpc.keepalive_permit_without_calls"] == 1


def test_a_port_that_is_taken_is_said() -> None:
    async def take(port: int) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(DeploymentError, match=r"cannot be listened on; .* change service_port"):
            listen(server, f"127.0.0.1:{port}", None)
        await server.stop(0)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(take(taken.getsockname()[1]))


def test_what_is_counted_is_written_for_prometheus(tmp_path: Path) -> None:
    with opened_office(tmp_path / "home") as office:
        path = office.parts.home.path / "state" / "desk.prom"
        until(path.exists)
        text = path.read_text()
    assert 'fedtune_sites{state="enrolled"} 2.0' in text
    assert 'fedtune_runs{state="queued"} 0.0' in text
