"""The base model's tokenizer; the one place where a coordinator's command may need transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, from disk alone and without running the folder's code.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: the folder holds no tokenizer that can be read.
    """
    try:
        # Imported here: it takes seconds, and a coordinator does without it.
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("transformers", "train", "reading a tokenizer") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"no tokenizer can be read from {folder}: {reason}; expected tokenizer.json and "
            "tokenizer_config.json beside config.json"
        ) from None


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch; where a tokenizer has none, any will do, and 0 is one.

    Padding carries no loss and stands behind the text, so its value never matters.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in ids if i is not None), 0)
