"""Put the factors of several devices on a backbone at once, each for rows of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedtune.lora.linear import AdaptedLinear, Factors, FactorsSideBySide, Rows, attach, detach


@contextmanager
def attached_beside(
    layers: Mapping[str, AdaptedLinear], devices: Sequence[Mapping[str, Factors]]
) -> Iterator[Rows]:
    """Attach every device's factors for a while; hold the backbone's lock.

    Yields:
        Where the bounds of each pass go.

    Raises:
        KeyError: factors for a matrix that the backbone does not adapt.
    """
    rows = Rows()
    names = sorted({name for factors in devices for name in factors})
    attach(
        layers,
        {
            name: FactorsSideBySide(tuple(factors.get(name) for factors in devices), rows)
            for name in names
        },
    )
    try:
        yield rows
    finally:
        detach(layers)
