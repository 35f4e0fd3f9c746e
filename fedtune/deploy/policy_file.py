"""`policy.toml`: what a site accepts, whatever a coordinator asks; and the text of a new one.

The file is the site's own. A site without a policy that can be read accepts nothing.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from fedtune.deploy.setting_errors import first_error
from fedtune.errors import PolicyError
from fedtune.sections.section import Bytes, Section

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: Final[tuple[Weekday, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
"""In the order of `datetime.weekday()`."""

_CLOCK: Final = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_MOST_BYTES: Final = 1 << 20
Hours = Annotated[str, StringConstraints(pattern=rf"^{_CLOCK}-({_CLOCK}|24:00)$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class PolicySettings(Section):
    """`policy.toml`. Every key is asked before work starts; work that has begun goes on."""

    memory: Bytes = Field(0, description="most memory that a plan may take; 0: as client.toml says")
    hours: tuple[Hours, ...] = Field((), description="local hours of work; empty: all")
    weekdays: tuple[Weekday, ...] = Field((), description="days of work; empty: all")
    on_mains_only: bool = Field(False, description="not while running on battery")
    minimum_battery_percent: float = Field(0, ge=0, le=100, description="battery charge needed")
    maximum_temperature_c: float = Field(
        0, ge=0, description="hottest sensor, degrees Celsius; 0: no limit"
    )
    max_bytes_per_day: Bytes = Field(0, description="traffic of a day, both ways; 0: no limit")
    allowed_base_digests: tuple[Digest, ...] = Field((), description="bases; empty: any")
    allowed_runs: tuple[str, ...] = Field(("*",), description="names of runs, with * and ?")
    max_steps: int = Field(0, ge=0, description="optimiser steps of one round; 0: no limit")
    share_logs: bool = Field(False, description="the operator may read this site's log")


def read_policy(path: Path) -> PolicySettings:
    """What `policy.toml` says.

    Raises:
        PolicyError: it is not there, too large, or not right.
    """
    refusing = "so this site accepts nothing"
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"{path.name} cannot be read ({error.strerror}), {refusing}") from None
    if len(content) > _MOST_BYTES:
        raise PolicyError(f"{path.name} is larger than {_MOST_BYTES} bytes, {refusing}")
    try:
        tree = tomllib.loads(content.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise PolicyError(f"{path.name} is not valid TOML ({words}), {refusing}") from None
    try:
        return PolicySettings.model_validate(tree)
    except ValidationError as error:
        words = first_error(error, PolicySettings)
        raise PolicyError(f"{path.name}: {words}, {refusing}") from None


def minutes(clock: str) -> int:
    """Minutes after midnight of `HH:MM`."""
    hour, _, minute = clock.partition(":")
    return int(hour) * 60 + int(minute)


_COMMENT: Final = re.compile(r"^#(?=[a-z_]+ = )", re.MULTILINE)


def policy_template() -> str:
    """The text of a new site's `policy.toml`: every key, commented out, with its default."""
    return _TEMPLATE


def policy_example() -> str:
    """The template with its keys in force; all of them are valid."""
    return _COMMENT.sub("", _TEMPLATE)


_TEMPLATE: Final = """\
# What this site accepts, whatever the coordinator asks. It is read again when it changes, and
# asked before each piece of work; work that has begun goes on. A site whose policy.toml is missing
# or cannot be read accepts nothing. The operator sees what was refused, and why.

# Most memory that a plan may take, such as "6 GB". 0: what [device] memory of client.toml says.
#memory = 0

# Hours of work in local time; they may go over midnight, as in ["22:00-06:00", "12:00-13:00"].
#hours = []

# Days of work, as in ["mon", "tue", "wed", "thu", "fri"]; the day is that of the moment.
#weekdays = []

# Do not work while this machine runs on its battery, or with less charge than this many percent.
# A machine without a battery is not held back.
#on_mains_only = false
#minimum_battery_percent = 0

# Do not begin while a sensor reads more than this, in degrees Celsius, where sensors can be read.
# 0: no limit.
#maximum_temperature_c = 0

# Most traffic with the coordinator in a day, both ways together, such as "2 GB". 0: no limit.
# What is downloaded when the limit has been reached is still counted.
#max_bytes_per_day = 0

# Base models that may be tuned here, by their digests (fedtune prints them). Empty: any.
#allowed_base_digests = []

# Runs that this site takes part in, by name; * and ? stand for any characters and any one.
#allowed_runs = ["*"]

# Most optimiser steps of one round. 0: no limit.
#max_steps = 0

# Whether the operator may read this site's log lines.
#share_logs = false
"""
