"""What the end of a process says to its supervisor."""

from __future__ import annotations

from typing import Final

EXIT_WANTED: Final = 0
"""The end was asked for."""
EXIT_RESTART: Final = 75
"""Please start me again (EX_TEMPFAIL of sysexits.h)."""
EXIT_CONFIG: Final = 78
"""Do not start me again: a person must act first (EX_CONFIG of sysexits.h)."""
