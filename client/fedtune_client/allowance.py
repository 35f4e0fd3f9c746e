"""How much memory a site lets a plan take: its limit, or less while the machine has less."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedtune.devices.memory import free_memory
from fedtune.devices.usage import own_memory_bytes, resident_bytes
from fedtune.records import DeviceProfile


@dataclass(frozen=True, slots=True)
class Idle:
    """What a site's process holds before it loads a base; None where the system does not say.

    Attributes:
        own_bytes: of its private memory.
        resident_bytes: with the pages of mapped files.
    """

    own_bytes: int | None
    resident_bytes: int | None


def idle_now() -> Idle:
    """What this process holds at this moment."""
    return Idle(own_memory_bytes(), resident_bytes())


class Allowance:
    """What plans may take on one site.

    Args:
        profile: its budget is the site's limit.
        measured: whether what is really free counts; a simulated device has its class's budget.
        idle: of the site's process; None: it has not loaded a base, and is idle now.
    """

    def __init__(self, profile: DeviceProfile, measured: bool, idle: Idle | None = None) -> None:
        self._profile, self._measured = profile, measured
        self._idle_bytes = (idle or idle_now()).own_bytes if measured else None

    def bytes_now(self) -> int:
        """The site's limit, or what is free with what its training holds already, if that is less.

        Where the system does not say how much this process holds, it is the limit: without it a
        device at work would look like one that has no memory left.
        """
        limit = self._profile.budget_bytes
        if not self._measured:
            return limit
        if self._profile.accelerator != "cpu":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            return max(1, min(limit, free))
        held = own_memory_bytes()
        if held is None or self._idle_bytes is None:
            return limit
        free = free_memory().free_bytes + max(0, held - self._idle_bytes)
        return max(1, min(limit, free))

    def profile_now(self) -> DeviceProfile:
        """The site's profile, with what plans may take now as its budget."""
        if self._profile.accelerator != "cpu":
            return replace(self._profile, accelerator_memory_bytes=self.bytes_now())
        return replace(self._profile, memory_bytes=self.bytes_now())
