"""The tokenizer of a checkpoint."""

from typing import Any

from xquant_vllm.errors import RefusedError, cause_of
from xquant_vllm.offline.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        RefusedError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:  # whatever a tokenizer's own files and libraries raise
        raise RefusedError(
            f"xquant: {checkpoint.folder} has no tokenizer that transformers can read ({cause_of(error)}); "
            "copy tokenizer.json and tokenizer_config.json of the model into the folder"
        ) from None
