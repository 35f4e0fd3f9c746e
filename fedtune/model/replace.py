"""Which modules of a model an adapter can stand in for, and how each of them stores its matrix.

Two kinds of module multiply by one matrix and add a bias: torch's `Linear`, which stores
(out, in), and transformers' `Conv1D` (GPT-2 and its kin), which stores (in, out). The rest of the
program knows one orientation, (out, in); it is decided here, and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.lora.linear import AdaptedLinear

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def linear_at(model: nn.Module, path: str, name: str) -> nn.Module:
    """The module at `path`, which holds matrix `name` and can carry an adapter.

    A subclass that computes something else than its parent does (a router, the output of torch's
    fused attention) is not taken for a linear layer: what it adds would be lost.

    Raises:
        ModelError: it is neither a plain `Linear` nor a plain `Conv1D`.
    """
    module = model.get_submodule(path)
    if not _is_plain(module):
        raise ModelError(
            f"matrix {name} is a {type(module).__name__}, and only linear layers can be "
            "adapted; leave it out of lora.targets"
        )
    return module


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its matrix as (in, out)."""
    return isinstance(module, _conv1d())


def oriented(weight: Float[Tensor, "rows columns"], module: nn.Module) -> Float[Tensor, "out in"]:
    """A view of the module's stored matrix as (out, in); writing to it writes to the module."""
    return weight.t() if is_transposed(module) else weight


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of a model is adapted and what is left as it was.

    Attributes:
        adapted: paths of the modules that were replaced.
        left: path -> class of every other module that holds a matrix, such as an embedding.
    """

    adapted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        """One line; the same module of several blocks is named once, with N for the block."""
        kinds = Counter(_NUMBER.sub("N", path) for path in self.adapted)
        rest = Counter(_NUMBER.sub("N", f"{p} ({kind})") for p, kind in self.left.items())
        return f"adapted: {_listed(kinds)}; left: {_listed(rest)}"


def coverage(model: nn.Module) -> Coverage:
    """Say which modules with a matrix were replaced and which were not."""
    adapted = tuple(p for p, module in model.named_modules() if isinstance(module, AdaptedLinear))
    left = {
        path: type(module).__name__
        for path, module in model.named_modules()
        if not isinstance(module, AdaptedLinear) and any(p.ndim >= 2 for p in _own(module))
    }
    return Coverage(adapted, left)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _listed(counts: Counter[str]) -> str:
    shown = (f"{n} x {name}" if n > 1 else name for name, n in counts.items())
    return ", ".join(shown) or "nothing"


def _is_plain(module: nn.Module) -> bool:
    kinds: Iterable[type[nn.Module]] = (nn.Linear, _conv1d())
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # torch's fused attention reads its weight, and never calls it
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _conv1d() -> type[nn.Module]:
    # Imported here: only a process that has built a transformers model comes this way.
    from transformers.pytorch_utils import Conv1D

    found: type[nn.Module] = Conv1D
    return found
