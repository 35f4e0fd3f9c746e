"""`operator.toml`: all that an operator's machine needs to speak to a coordinator.

    server = "HOST:PORT"      Flower's link
    service = "HOST:PORT"     fedtune's gRPC
    token = "..."             the operator's
    ca = \"\"\"PEM\"\"\"            the coordinator's certificate authority

Whoever has the file is the operator: it is private.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.config import operator_file_from_environment
from fedtune.deploy.addresses import split_address
from fedtune.deploy.files import write_private
from fedtune.errors import DeploymentError, one_line

DEFAULT_COORDINATOR_HOME = Path("fedtune-server")
DEFAULT_SITE_HOME = Path("fedtune-site")

_KEYS = ("server", "service", "token", "ca")


@dataclass(frozen=True, slots=True)
class OperatorFile:
    """What stands in `operator.toml`.

    Attributes:
        server: HOST:PORT of the coordinator's link.
        service: HOST:PORT of its gRPC service.
        token: the operator's.
        ca: certificate of the coordinator's authority, PEM.
    """

    server: str
    service: str
    token: str = field(repr=False)
    ca: str = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> OperatorFile:
        """Read it.

        Raises:
            DeploymentError: it is missing, unreadable, or not such a file.
        """
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DeploymentError(
                f"operator file {path} cannot be read ({error.strerror}); name the coordinator's "
                "operator.toml with --coordinator FILE or FEDTUNE_OPERATOR, or make a coordinator "
                "with: fedtune server init"
            ) from None
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise DeploymentError(f"{path} is not valid TOML: {one_line(str(error))}") from None
        values = [tree.get(key) for key in _KEYS]
        for key, value in zip(_KEYS, values, strict=True):
            if not isinstance(value, str) or not value:
                raise DeploymentError(
                    f"{path}: expected a text under {key}, found {type(value).__name__}; copy the "
                    "coordinator's operator.toml again"
                )
        found = cls(*(str(value) for value in values))
        split_address(found.server, f"{path}: server")
        split_address(found.service, f"{path}: service")
        return found

    def write(self, path: Path) -> None:
        """Write it, readable by its owner alone.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        text = (
            "# Whoever has this file is the operator of the coordinator: keep it private.\n"
            "# Copy it to the machine you work on, and name it with --coordinator FILE or\n"
            "# FEDTUNE_OPERATOR.\n"
            f'server = "{self.server}"\n'
            f'service = "{self.service}"\n'
            f'token = "{self.token}"\n'
            f'ca = """\n{self.ca.strip()}\n"""\n'
        )
        write_private(path, text.encode("utf-8"))


def find_operator_file(given: Path | None) -> Path:
    """Where the operator file is: as given, else `FEDTUNE_OPERATOR`, else of the default home."""
    return given or operator_file_from_environment() or DEFAULT_COORDINATOR_HOME / "operator.toml"
