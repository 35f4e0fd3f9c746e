"""The backbones that this process holds, of all bases; and which go when another needs the room."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Final

import torch

from fedtune.model.backbone import BackboneShelf, Key
from fedtune.model.packed_cache import PackedCache

_Place = tuple[Path, torch.device, bool, torch.dtype, Path | None]
_MOST: Final = 8
_shelves: dict[_Place, BackboneShelf] = {}
"""Of this process; the one that was used last comes last."""

_log = logging.getLogger(__name__)


def shelf_of(
    folder: Path,
    torch_device: torch.device,
    shared: bool,
    compute: torch.dtype,
    cache_folder: Path | None,
) -> BackboneShelf:
    """One shelf per process, base, accelerator and dtype.

    Args:
        shared: several sites of this process use it.
        cache_folder: where finished matrices are kept between processes; None: nowhere.
    """
    place = (folder, torch_device, shared, compute, cache_folder)
    shelf = _shelves.pop(place, None)
    if shelf is None:
        packed = PackedCache(cache_folder / "packed") if cache_folder else None
        shelf = BackboneShelf(
            folder, torch_device, keep_base=shared, compute=compute, packed=packed
        )
    _shelves[place] = shelf
    while len(_shelves) > _MOST:
        del _shelves[next(iter(_shelves))]
    return shelf


def make_room(room_bytes: int, wanted: BackboneShelf, key: Key) -> None:
    """Let go of every backbone but one, unless all the others fit beside the work at hand.

    Args:
        room_bytes: what is allowed beyond the peak of the work at hand.
        wanted: the shelf of the backbone that stays, if it is there.
        key: that backbone's.
    """
    keep = {id(shelf): key if shelf is wanted else None for shelf in _shelves.values()}
    held = sum(shelf.other_bytes(keep[id(shelf)]) for shelf in _shelves.values())
    if not held or held <= room_bytes:
        return
    _log.info("%d bytes of other backbones make room for the work at hand", held)
    for shelf in _shelves.values():
        shelf.drop_others(keep[id(shelf)])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
