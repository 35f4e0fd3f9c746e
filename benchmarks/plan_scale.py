"""How long it takes to plan large fleets of a large model.

    python benchmarks/plan_scale.py [--quick] [--json]

A Llama shape of 7 billion parameters: 224 matrices, ranks up to 32, six formats of 2 to 16 bits.
Devices are drawn by a seed, of 6 to 80 GB, with rates and links that spread over a factor of a
hundred; no two of the hundred are alike, and the ten thousand are of twenty kinds. The errors of
the forms are drawn too, around those that the formats have. Rounds are planned by gain and
makespan, and the ranks and forms of devices of few bits by mixed-integer programs, as a run's
defaults have it. `objective gain` is what the programs add to the greedy plan, in the unit of the
coverage of ranks, over the devices of few bits whose programs there was time to solve. Seconds are
of one process; they include everything from profiles to plans.

`--quick` plans the same fleets once; in full, the least of three times counts.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("OMP_NUM_THREADS", "1")

FORMATS = ("bf16", "int8", "q8", "q4", "q3", "q2")
SQUARED_ERROR = {"bf16": 1e-6, "int8": 4e-5, "q8": 3e-5, "q4": 0.008, "q3": 0.03, "q2": 0.12}
"""Of a weight's variance: what the formats lose on Gaussian weights, to one digit."""


def seven_billion() -> Any:  # ModelShapes
    """The shapes of Llama 2 7B, by hand."""
    from fedtune.records import MatrixShape, ModelShapes

    hidden, inner, layers, vocabulary = 4096, 11008, 32, 32000
    sides = {
        **dict.fromkeys(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            (hidden, hidden),
        ),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    matrices = tuple(
        MatrixShape(f"model.layers.{layer}.{name}", *side, layer)
        for layer in range(layers)
        for name, side in sides.items()
    )
    other = 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    return ModelShapes("7b", "llama", hidden, inner, layers, 32, vocabulary, matrices, other)


def fleet(devices: int, kinds: int) -> list[Any]:  # DeviceProfile
    """Devices of as many kinds, each kind in turn."""
    import numpy as np

    from fedtune.records import DeviceProfile

    rng = np.random.default_rng(7)
    found = []
    for kind in range(kinds):
        memory, rate = rng.uniform(6e9, 80e9), 10 ** rng.uniform(12, 14)
        found.append(
            DeviceProfile(
                name="any",
                device_class=f"kind-{kind:03d}",
                cpu_threads=8,
                memory_bytes=int(memory),
                accelerator="cuda",
                accelerator_memory_bytes=int(memory),
                matmul_flops_per_s={"fp32": rate / 2, "bf16": rate},
                memory_bandwidth_bytes_per_s=10 ** rng.uniform(10.5, 12.5),
                link_bytes_per_s=10 ** rng.uniform(6, 8),
                formats=FORMATS,  # type: ignore[arg-type]
            )
        )
    return [replace(found[i % kinds], name=f"site-{i:05d}") for i in range(devices)]


def distortion(shapes: Any) -> Any:  # ModelShapes -> DistortionTable
    """Errors of every matrix in every form, drawn around those of the formats."""
    import numpy as np

    from fedtune.plan.mixing import candidate_forms
    from fedtune.records import DistortionTable

    rng = np.random.default_rng(8)
    forms = candidate_forms(FORMATS, 16)  # type: ignore[arg-type]
    errors = {}
    for matrix in shapes.matrices:
        size = matrix.parameters * rng.lognormal()
        repaired = [1 - 0.004 * form.correction_rank for form in forms]
        lost = [SQUARED_ERROR[form.format] for form in forms]
        spread = rng.uniform(0.9, 1.1, len(forms))
        errors[matrix.name] = tuple(size * np.array(lost) * np.array(repaired) * spread)
    return DistortionTable(shapes.digest, forms, errors, "none")


def settings(solver: str) -> Any:  # PlanSettings
    from fedtune.plan.settings import PlanSettings

    return PlanSettings(
        rank_max=32,
        rank_cap=64,
        tail=32,
        batch_size=16,
        local_steps=10,
        sequence_length=512,
        correction_rank=16,
        compute_itemsize=2,
        makespan_weight=1.0,
        solver=solver,  # type: ignore[arg-type]
    )


def planned(devices: int, kinds: int, solver: str, times: int) -> tuple[float, Any]:
    """Least seconds of some times, and the plan."""
    from fedtune.plan.solve import plan_fleet

    shapes, profiles = seven_billion(), fleet(devices, kinds)
    errors = distortion(shapes)
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        plan = plan_fleet(profiles, shapes, settings(solver), distortion=errors)
        seconds.append(time.perf_counter() - started)
    return min(seconds), plan


def objective_gain(greedy: Any, refined: Any) -> tuple[float, int]:
    """Mean gain of the programs over the kinds that have one, and how many those are."""
    from fedtune.plan.candidates import ENOUGH_GAIN

    shapes = seven_billion()
    errors = distortion(shapes)
    place = {form: column for column, form in enumerate(errors.forms)}

    def coverage(plan: Any) -> float:  # DevicePlan; by the prior
        return sum(1 / i for rank in plan.ranks().values() for i in range(1, rank + 1))

    def lost(plan: Any) -> float:
        return sum(errors.errors[m.name][place[m.form]] for m in plan.matrices)

    gains = []
    for before, after in zip(greedy.devices, refined.devices, strict=True):
        few_bits = any(m.format in ("q4", "q3", "q2") for m in before.matrices)
        if few_bits and "solver limit" not in after.binding:
            more = coverage(after) / coverage(before) - 1
            gains.append(more + (1 - ENOUGH_GAIN) * (1 - lost(after) / lost(before)))
    return (sum(gains) / len(gains) if gains else 0.0), len(gains)


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    times = 1 if arguments.quick else 3
    hundred, plan = planned(100, 100, "milp", times)
    greedy_hundred, greedy = planned(100, 100, "greedy", times)
    gain, programs = objective_gain(greedy, plan)
    thousands, many = planned(10_000, 20, "milp", times)
    rows = [
        {
            "fleet": "100 devices, no two alike",
            "seconds": f"{hundred:.1f}",
            "of them for programs": f"{max(0.0, hundred - greedy_hundred):.1f}",
            "programs": programs,
            "objective gain": f"{gain:+.3f}",
        },
        {
            "fleet": "10,000 devices of 20 kinds",
            "seconds": f"{thousands:.1f}",
            "of them for programs": "",
            "programs": "",
            "objective gain": "",
        },
    ]
    found = table(rows)
    print(found)
    span = max(device.seconds for device in many.devices)
    print(f"\nmakespan of the 10,000: {span:.0f} s")
    if not arguments.quick:
        text = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        publish("Planning at scale", "python benchmarks/plan_scale.py", f"{text}\n\n{found}")
    if arguments.json:
        print_json(
            {
                "seconds_7b_100": round(hundred, 2),
                "seconds_7b_10000": round(thousands, 2),
                "milp_gain": round(gain, 4),
                "milp_programs": programs,
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
