"""What a join takes in memory, in a process of its own: `python watched.py FOLDER DEVICES DIVISOR`.

Prints the bytes that the process holds at most beside the new adapter, over those of what all
devices return of the largest matrix. The workspace of LAPACK is in it, and mapped files are not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CAP = 64
WORKERS = 2


def peak_ratio(folder: Path, devices: int, divisor: int) -> float:
    """Run this file on a layer whose updates are in the folder; nan where Linux's /proc is not."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # Otherwise the C library keeps freed blocks of some megabytes, and what is held once more
        # and what never went back look alike.
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    command = [sys.executable, __file__, str(folder), str(devices), str(divisor)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(ran.stdout)


@contextmanager
def watched() -> Iterator[list[int]]:
    """The largest number of private bytes while it is open, looked at every millisecond."""
    from fedtune.devices.usage import own_memory_bytes

    peak, done = [own_memory_bytes() or 0], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_memory_bytes() or 0)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def main() -> int:
    import numpy as np

    from fedtune.aggregate.delta import Delta
    from fedtune.aggregate.modules import for_each
    from fedtune.devices.usage import own_memory_bytes
    from joins.cases import fleet_of, layers_of_7b, state_of

    folder, devices, divisor = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    shapes = layers_of_7b(1, divisor)
    rule, adapter = Delta(CAP, workers=WORKERS), state_of(shapes)
    fleet = fleet_of(folder, rule, adapter, shapes, devices, write=False)
    some = np.random.default_rng(0).standard_normal((512, 512))
    for_each(range(8), lambda _: np.linalg.svd(some @ some), WORKERS)  # the library's own buffers
    before = own_memory_bytes()
    if before is None:
        print("nan")
        return 0
    with fleet.opened() as contributions, watched() as peak:
        joined = rule.join(adapter, contributions)
    kept = sum(m.u.nbytes + m.sigma.nbytes + m.v.nbytes for m in joined.matrices.values())
    print((peak[0] - before - kept) / fleet.module_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
