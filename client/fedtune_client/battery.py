"""Charge and temperature of this machine, where the system tells."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Battery:
    """Attributes:
    on_mains: None where the system does not say.
    """

    percent: float
    on_mains: bool | None


def battery() -> Battery | None:
    """This machine's battery; None without one."""
    # psutil has the function only on systems that can tell.
    read = getattr(psutil, "sensors_battery", None)
    try:
        found = None if read is None else read()
    except (OSError, RuntimeError):  # a container without /sys
        return None
    return None if found is None else Battery(float(found.percent), found.power_plugged)


def temperature_c() -> float | None:
    """The hottest sensor, in degrees Celsius; None where none can be read."""
    read = getattr(psutil, "sensors_temperatures", None)
    try:
        sensors = {} if read is None else read()
    except (OSError, RuntimeError):
        return None
    # A sensor that is not connected reads 0, or a figure that no chip survives.
    found = [s.current for group in sensors.values() for s in group if s.current]
    return max((value for value in found if 0 < value < 150), default=None)
