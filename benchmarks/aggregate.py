"""How fast, how exactly and in how much memory unequal adapters become one.

    python benchmarks/aggregate.py [--quick] [--json] [--rates]

The matrices of Llama 2 7B (seven a layer: q, k, v, o of 4096 x 4096, gate and up of 11008 x 4096,
down of 4096 x 11008). Ten devices of ranks 4, 8, 8, 16, 16, 16, 32, 32, 48 and 64 were sent the
leading directions of a state of rank 64, moved along directions that they share and along some of
their own, and their updates lie on the disk; a hundred devices repeat those ranks ten times. The
join is `delta` with a cap of 64. FlexLoRA's join is what its paper says: the mean of the products
as one dense float32 matrix, and its SVD, on one core or on both, whichever is faster.

`relative error` is of the joined product where the cap cuts nothing, against the sum of products in
float64; `before it is stored` is the same before u, sigma and v are rounded to float32. Memory is
the most private bytes of a fresh process that joins one layer on two cores, without the new adapter
and what was held before, over the float32 bytes of what all devices return of the largest matrix.
Files that are mapped in are not in it.

The table of routes holds processor seconds of one thread, in brackets the modelled ones; the route
that the model picks is in bold. Routes that the model puts at eight times the least, and over four
seconds, are not run (-).

`--quick` takes one layer, and for FlexLoRA matrices of a quarter of the side, whose seconds it
multiplies by 64: an SVD of twice the side takes at least eight times as long. `--rates` measures
the kernels that the cost model of the routes is made of, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("OMP_NUM_THREADS", "1")

CAP = 64
WORKERS = 2


def seconds_of_join(rule: Any, adapter: Any, fleet: Any) -> float:
    with fleet.opened() as contributions:
        started = time.perf_counter()
        rule.join(adapter, contributions)
        return time.perf_counter() - started


def traced_peak(rule: Any, adapter: Any, fleet: Any) -> int:
    """Peak bytes that Python and numpy allocate for a join."""
    with fleet.opened() as contributions:
        tracemalloc.start()
        rule.join(adapter, contributions)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def seconds_of_flexlora(rows: int, columns: int) -> float:
    """The mean of ten products as a dense float32 matrix, and its SVD, on one core or on all,
    whichever is faster."""
    import numpy as np
    from joins.cases import RANKS
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((rows, r), np.float32), rng.standard_normal((r, columns), np.float32))
        for r in RANKS
    ]

    def join() -> float:
        started = time.perf_counter()
        mean = np.zeros((rows, columns), np.float32)
        for b, a in pairs:
            mean += np.float32(1 / len(pairs)) * (b @ a)
        np.linalg.svd(mean, full_matrices=False)
        return time.perf_counter() - started

    found = []
    for threads in (1, WORKERS):
        with threadpool_limits(limits=threads, user_api="blas"):
            found.append(join())
    return min(found)


def flexlora_layer(divisor: int) -> float:
    """Seconds of the seven matrices of a layer, from one of each shape; down is up turned over."""
    square = seconds_of_flexlora(4096 // divisor, 4096 // divisor)
    tall = seconds_of_flexlora(11008 // divisor, 4096 // divisor)
    return (4 * square + 3 * tall) * float(divisor**3)


def relative_errors(divisor: int, folder: Path) -> tuple[float, float]:
    """Of the joined product where nothing is cut: as stored, and before it is stored."""
    import numpy as np
    from joins.cases import fleet_of, layers_of_7b, state_of

    from fedtune.aggregate.delta import Delta
    from fedtune.aggregate.singular import factored
    from fedtune.aggregate.stack import stack_of

    shapes = [layers_of_7b(1, divisor)[4]]
    adapter = state_of(shapes)
    rule = Delta(512)
    fleet = fleet_of(folder, rule, adapter, shapes, 10)
    name = shapes[0].name
    expected = adapter.matrices[name].product()
    left, right, weights = [], [], []
    with fleet.opened() as contributions:
        joined = rule.join(adapter, contributions).matrices[name]
        for each in contributions:
            share = each.weight / len(contributions)
            for factors, sign in ((each.update.factors[name], 1), (each.sent.trained[name], -1)):
                expected += sign * share * factors.product()
                left.append(factors.b)
                right.append(factors.a.T)
                weights.append(np.full(factors.rank, sign * share))
    state = adapter.matrices[name]
    stack = stack_of(
        np.concatenate([state.u, *left], axis=1),
        np.concatenate([state.v, *right], axis=1),
        np.concatenate([state.sigma.astype(np.float64), *weights]),
    )
    core = factored(stack, 512)
    norm = np.linalg.norm(expected)
    stored = np.linalg.norm(joined.product() - expected) / norm
    return float(stored), float(np.linalg.norm((core.u * core.sigma) @ core.v.T - expected) / norm)


def route_rows(sizes: Any) -> tuple[list[dict[str, object]], float]:
    """The table of routes, and the largest loss of the picked one."""
    from joins.routes import timed

    rows, worst = [], 0.0
    for size in sizes:
        found = timed(size)
        worst = max(worst, found.loss)
        row: dict[str, object] = {
            "out x in": f"{size[0]} x {size[1]}",
            "columns": size[2] or "dense",
            "cap": size[3],
        }
        for route in ("factored", "multiplied", "gram", "krylov"):
            row[route] = "-"
            if route in found.seconds:
                cell = f"{found.seconds[route]:.3g} ({found.modelled[route]:.3g})"
                row[route] = f"**{cell}**" if route == found.picked else cell
        row["picked over best"] = f"{found.loss:.2f}"
        rows.append(row)
    return rows, worst


def join_row(
    devices: int, layers: int, flexlora: float, folder: Path, divisor: int = 1
) -> dict[str, Any]:
    """One fleet on some layers: seconds, speedup, memory."""
    from joins.cases import fleet_of, layers_of_7b, state_of
    from joins.watched import peak_ratio

    from fedtune.aggregate.delta import Delta

    shapes = layers_of_7b(layers, divisor)
    rule, adapter = Delta(CAP, workers=WORKERS), state_of(shapes)
    fleet = fleet_of(folder, rule, adapter, shapes, devices)
    seconds = seconds_of_join(rule, adapter, fleet)
    for file in fleet.files:
        file.unlink()
    one = layers_of_7b(1, divisor)
    fleet_of(folder, rule, state_of(one), one, devices)
    ratio = peak_ratio(folder, devices, divisor)
    return {
        "devices": devices,
        "stacked columns": sum(plan.matrices[0].rank for plan in fleet.plans) + CAP,
        "layers": layers,
        "seconds a layer": seconds / layers,
        "FlexLoRA, seconds a layer": flexlora,
        "speedup": flexlora * layers / seconds,
        "peak memory over the largest factors": ratio,
    }


def constant_memory(folder: Path) -> list[dict[str, object]]:
    """Peak bytes of one matrix of 1024 x 1024, over its size in float64, for growing fleets."""
    from joins.cases import fleet_of, state_of

    from fedtune.aggregate.delta import Delta
    from fedtune.records import MatrixShape

    shapes = [MatrixShape("w", 1024, 1024, 0)]
    adapter, rule, rows = state_of(shapes), Delta(CAP, workers=1), []
    for devices in (10, 100, 1000):
        fleet = fleet_of(folder / str(devices), rule, adapter, shapes, devices)
        peak = traced_peak(rule, adapter, fleet)
        rows.append(
            {
                "devices": devices,
                "their factors over the dense matrix": round(fleet.module_bytes() / 2**23, 2),
                "peak over the dense matrix": round(peak / 2**23, 2),
            }
        )
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """The table of joins, numbers rounded for a reader."""
    return table(
        [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    )


def report(rows: list[Any], errors: tuple[float, float], routes: str, memory: str) -> str:
    text = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
    found = f"Relative error {errors[0]:.1e}; before it is stored {errors[1]:.1e}."
    parts = [text, shown(rows), found, "### Routes", routes, "### Many devices"]
    words = (
        "One matrix of 1024 x 1024, whose float64 form takes 8 MiB, joined for fleets that grow: "
        "where the stack would be larger than the matrix, it is multiplied out as updates are read."
    )
    return "\n\n".join([*parts, words, memory])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", action="store_true", help="measure the kernels and stop")
    parser.add_argument("--smoke", action="store_true", help="sides of a sixteenth; for the tests")


def main() -> int:
    arguments = parse_arguments(__doc__ or "", options)
    from joins.routes import SIZES, rates

    if arguments.rates:
        print(table(rates()))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.quick:
            divisor = 16 if arguments.smoke else 1
            dense = flexlora_layer(4 * divisor) / divisor**3
            rows = [join_row(10, 1, dense, folder, divisor)]
            errors = relative_errors(4 * min(divisor, 4), folder)
            print(f"{shown(rows)}\n\nrelative error {errors[0]:.1e}, unstored {errors[1]:.1e}")
        else:
            dense = flexlora_layer(1)
            rows = [join_row(10, 32, dense, folder), join_row(100, 1, dense, folder)]
            errors = relative_errors(1, folder)
            route_table, worst = route_rows(SIZES)
            words = f"The picked route takes at most {worst:.2f} times the best."
            routes = f"{table(route_table)}\n\n{words}"
            body = report(rows, errors, routes, table(constant_memory(folder)))
            print(body)
            publish("Joining", "python benchmarks/aggregate.py", body)
    if arguments.json:
        print_json(
            {
                "speedup_vs_flexlora": round(rows[0]["speedup"], 1),
                "relative_error": errors[0],
                "peak_ratio": round(rows[0]["peak memory over the largest factors"], 2),
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
