"""The tokens that a model is calibrated on."""

import torch

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.texts import calibration_text, opening_tokens
from xquant_vllm.offline.tokenizer import load_tokenizer

DEFAULT_CALIBRATION_TOKENS = 2048
_FEWEST_TOKENS = 64
# One sequence's activations and logits are in memory at a time.
_SEQUENCE = 512


def calibration_tokens(given: int | None) -> int:
    """How many tokens to calibrate on.

    Args:
        given: by ``--calibration-tokens``; None for the default.

    Raises:
        RefusedError: they are too few.
    """
    tokens = DEFAULT_CALIBRATION_TOKENS if given is None else given
    if tokens < _FEWEST_TOKENS:
        raise RefusedError(
            f"xquant: --calibration-tokens {tokens} is too few to say anything about a model; set {_FEWEST_TOKENS} or "
            f"more ({DEFAULT_CALIBRATION_TOKENS} is plenty)"
        )
    return tokens


def tokenize(checkpoint: Checkpoint, calibration: str, tokens: int) -> torch.Tensor:
    """Sequences spread evenly over the text.

    Args:
        checkpoint: whose tokenizer to use.
        calibration: a file, or ``python-docs``.
        tokens: how many to take at most.

    Returns:
        ``[sequences, length]``, int64. Each begins as the tokenizer begins a text.

    Raises:
        RefusedError: the text cannot be read or is too short, or there is no tokenizer.
    """
    text = calibration_text(calibration)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    opening = opening_tokens(tokenizer)
    if len(ids) < _FEWEST_TOKENS:
        raise RefusedError(
            f"xquant: --calibration {calibration} has {counted(len(ids), 'token')}, too few to say anything about a "
            "model; give a text of a few thousand words"
        )
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    length = min(_SEQUENCE, tokens, len(ids) + len(opening), text_config.get("max_position_embeddings") or _SEQUENCE)
    step = length - len(opening)
    available = len(ids) // step
    count = max(1, min(tokens // length, available))
    starts = [step * (available * i // count) for i in range(count)]
    return torch.tensor([opening + ids[start : start + step] for start in starts])
