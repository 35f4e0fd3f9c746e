"""A server takes a renewed certificate when it is whole, and when it may."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fedtune.deploy.certificates import KeyPair, make_authority, make_server_certificate
from fedtune_server.link.serving import _SameAuthority
from fedtune_server.renewing import RenewingServer

AUTHORITY = make_authority("localhost")


async def app(scope: Any, receive: Any, send: Any) -> None:
    return


def write(folder: Path, pair: KeyPair) -> None:
    (folder / "server.key").write_bytes(pair.key)
    (folder / "server.crt").write_bytes(pair.certificate)


def new_pair() -> KeyPair:
    return make_server_certificate(AUTHORITY, "localhost")


def server_in(folder: Path, **more: Any) -> RenewingServer:
    files = {"ssl_certfile": folder / "server.crt", "ssl_keyfile": folder / "server.key"}
    config = uvicorn.Config(app, ws="none", log_config=None, **files)
    config.load()
    return RenewingServer(config, **more)


def shown(server: RenewingServer) -> bytes:
    """The certificate that a handshake with the server's context shows, DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(back, there)
    assert server.config.ssl is not None
    side = server.config.ssl.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for each in (client, side):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue
    found = client.getpeercert(binary_form=True)
    assert found is not None
    return found


def der(pair: KeyPair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.decode("ascii"))


def test_a_renewed_certificate_is_shown(tmp_path: Path) -> None:
    first, second = new_pair(), new_pair()
    write(tmp_path, first)
    server = server_in(tmp_path)
    server.renew()
    assert shown(server) == der(first)
    write(tmp_path, second)
    server.renew()
    assert shown(server) == der(second)


def test_half_a_renewal_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = new_pair(), new_pair()
    write(tmp_path, first)
    server = server_in(tmp_path)
    (tmp_path / "server.key").write_bytes(second.key)
    server.renew()
    assert shown(server) == der(first)
    assert "is not of the key" in caplog.text
    (tmp_path / "server.crt").write_bytes(second.certificate)
    server.renew()
    assert shown(server) == der(second)


def test_the_link_keeps_its_certificate_when_the_authority_is_another(tmp_path: Path) -> None:
    """Its own processes trust the authority that they began with, until all start anew."""
    first, other = new_pair(), make_authority("localhost")
    write(tmp_path, first)
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.certificate)
    server = server_in(tmp_path, may_renew=_SameAuthority(tmp_path / "ca.crt"))
    (tmp_path / "ca.crt").write_bytes(other.certificate)
    write(tmp_path, make_server_certificate(other, "localhost"))
    server.renew()
    assert shown(server) == der(first)
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.certificate)
    second = new_pair()
    write(tmp_path, second)
    os.utime(tmp_path / "server.crt")
    server.renew()
    assert shown(server) == der(second)
