"""Every exception that fedtune raises on purpose.

    FedtuneError
    ├── ConfigError            a run file, command-line value or environment value is wrong
    ├── DataError              a data file, site or sample cannot be used
    ├── ModelError             a base model cannot be found, read or adapted
    ├── PlanError              no plan fits a device
    ├── KernelError            a GPU kernel cannot be loaded, launched or given these tensors
    ├── MissingExtraError      an optional package is needed; names the extra to install
    ├── ProtocolError          bytes of a message are not what they must be
    │   ├── RefusedUpdateError a device's update is refused; the round goes on without it
    │   └── PolicyError        a site's own policy does not allow what it was asked
    ├── DeploymentError        a home, process, certificate or connection is not as it must be
    │   └── AccessError        somebody unknown, revoked, expired or replayed is refused
    ├── StoppedError           the operator has stopped the run
    ├── RoundError             too few devices reported for a round to count
    └── RunError               a run folder cannot be created, read or continued

A message says what was expected, what was found and what to do, in the user's own names.
"""

from __future__ import annotations


class FedtuneError(Exception):
    """Any error that fedtune raises on purpose; the text is one line for a person."""


class ConfigError(FedtuneError):
    """A run file, a command-line value or an environment value is wrong."""


class DataError(FedtuneError):
    """A data file, a site or a sample cannot be used."""


class ModelError(FedtuneError):
    """A base model cannot be found, read or adapted."""


class PlanError(FedtuneError):
    """No plan fits a device within its limits."""


class KernelError(FedtuneError):
    """A GPU kernel cannot be loaded, launched, or given these tensors."""


class MissingExtraError(FedtuneError):
    """A package of an optional extra is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}; install it with: "
            f"pip install 'fedtune[{extra}]' (in a clone: pip install -e '.[{extra}]')"
        )


class ProtocolError(FedtuneError):
    """The bytes of a message are not what they must be."""


class RefusedUpdateError(ProtocolError):
    """A device's update is refused; the round goes on without it."""


class PolicyError(ProtocolError):
    """A site's own policy does not allow what it was asked."""


class DeploymentError(FedtuneError):
    """A coordinator's or site's home, process, certificate or connection is not as it must be."""


class AccessError(DeploymentError):
    """Somebody who is unknown, revoked, expired or replayed asked for something; it is refused."""


class StoppedError(FedtuneError):
    """The operator has stopped the run."""


class RoundError(FedtuneError):
    """Too few devices reported for a round to count."""


class RunError(FedtuneError):
    """A run folder cannot be created, read or continued."""


def one_line(text: str, longest: int = 1500) -> str:
    """A message that quotes what came from outside: one line, of bounded length, all printable."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
