"""How long a simulated device takes to answer, beside what its plan predicts.

Devices of a real fleet are now and then much slower than they should be: another job, a weak link,
a laptop that is closed. Their times have a heavy tail, so the slowest of many is far from the rest.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
from flwr.app import Message

from fedtune.wire.flower import TRAIN, from_record
from fedtune.wire.messages import decode_train_instruction

DelayName = Literal["lognormal", "pareto"]


def delays(name: DelayName, spread: float, seed: int) -> Callable[[Message], float | None]:
    """Seconds of each instruction to train: those of its plan, times a factor drawn by the seed.

    What else a device is asked, it answers at once.
    """
    asked: Counter[tuple[str, int]] = Counter()

    def delay(message: Message) -> float | None:
        if message.metadata.message_type != TRAIN:
            return None
        body, _ = from_record(message.content, TRAIN)
        order = decode_train_instruction(body)
        device, round = order.plan.device, order.round
        asked[device, round] += 1
        times = asked[device, round]
        return order.plan.seconds * factor(name, spread, seed, device, round, times)

    return delay


def factor(
    name: DelayName, spread: float, seed: int, device: str, round: int, times: int = 1
) -> float:
    """How many times its predicted seconds a device takes in a round; the median is 1.

    `lognormal`: exp(spread z), z standard normal. `pareto`: the chance of more than x falls as
    x^(-1/spread); from a spread of 1 on it has no mean.

    Args:
        times: that the device has been asked in the round, this one included.
    """
    own = int.from_bytes(hashlib.sha256(device.encode("utf-8")).digest()[:8], "big")
    rng = np.random.default_rng([seed, round, 4, own, *([times] if times > 1 else [])])
    if name == "lognormal":
        return math.exp(spread * rng.normal())
    return float((2.0 * (1.0 - rng.random())) ** -spread)
