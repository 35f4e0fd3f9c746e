"""How long a device may take for a round: by its plan, its link and what it took before.

    slack * (compute + bytes down / down speed + bytes up / up speed) + Flower's own seconds

The planned seconds of computing are those of the calibrated plan. A device that has been measured
may take `slack` times the longest that it took, if that is more. One that has not yet loaded its
base gets time for that. What a plan does not count, such as measuring the held-out loss of many
rows, shows in a device that answers late or not at all: its allowance doubles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedtune.records import DevicePlan, DeviceProfile

FLOWER_S = 20.0
"""Seconds of an exchange that nobody computes or transfers in: a node polls every 3 s, an executor
and a coordinator every second, and a whole exchange of 1 MB took 4.6 to 6.7 s with Flower 1.41 on
loopback, on two busy cores; three times that."""

LOADING_S = 180.0
"""For the first round: reading, quantising and placing the base, which no plan counts; chosen."""

UNMEASURED_BYTES_PER_S = 125_000.0
"""A link that nobody has measured: 1 Mbit/s, the slowest that a site is expected to have."""

_MOST_DOUBLED = 8


class Allowances:
    """The seconds that each device may take.

    Args:
        slack: times that a device may take what is expected of it; at least 1.
        longest_s: in any case (`run.round_deadline_s`).
    """

    def __init__(self, slack: float, longest_s: float) -> None:
        self._slack, self._longest_s = slack, longest_s
        self._took: dict[str, float] = {}
        self._doubled: dict[str, int] = {}

    def seconds(self, plan: DevicePlan, profile: DeviceProfile) -> float:
        """From when a device is sent its work to when it has answered."""
        took = self._took.get(plan.device)
        allowed = self._slack * expected_seconds(plan, profile) + FLOWER_S
        if took is None:
            allowed += LOADING_S
        else:
            allowed = max(allowed, self._slack * took)
        return min(allowed * 2.0 ** self._doubled.get(plan.device, 0), self._longest_s)

    def learn(self, took: Mapping[str, float], silent: Iterable[str] = ()) -> None:
        """Take a round into account.

        Args:
            took: device -> seconds from being asked to its update.
            silent: devices that did not answer in the time that they had.
        """
        for device, seconds in took.items():
            self._took[device] = max(seconds, self._took.get(device, 0.0))
            self._doubled.pop(device, None)
        for device in silent:
            self._doubled[device] = min(_MOST_DOUBLED, self._doubled.get(device, 0) + 1)


def expected_seconds(plan: DevicePlan, profile: DeviceProfile) -> float:
    """Of computing and transferring, by a plan and a link."""
    both = plan.download_bytes + plan.upload_bytes
    if profile.link_bytes_per_s > 0:
        return plan.seconds  # the planner counted the link
    return plan.seconds + both / UNMEASURED_BYTES_PER_S
