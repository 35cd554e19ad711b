"""The tokens that a model is calibrated on."""

from dataclasses import dataclass

import torch

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.memory import num_weights
from xquant_vllm.offline.texts import calibration_text, opening_tokens
from xquant_vllm.offline.tokenizer import load_tokenizer

# A quarter of it loses a fifth to a quarter more (docs/accuracy.md); more of it gains little.
DEFAULT_CALIBRATION_TOKENS = 8192
# On a CPU large models take fewer, or their first start would take hours: as many as one of a billion weights does in
# the same time, but never less than this.
_LEAST_BY_DEFAULT, _LARGE = 2048, 10**9
_FEWEST_TOKENS = 64
# One sequence's activations and logits are in memory at a time.
_SEQUENCE = 512


def check_calibration_tokens(given: int | None) -> None:
    """Refuse what says nothing about a model.

    Args:
        given: by ``--calibration-tokens``; None for the default.

    Raises:
        RefusedError: they are too few.
    """
    if given is not None and given < _FEWEST_TOKENS:
        raise RefusedError(
            f"xquant: --calibration-tokens {given} is too few to say anything about a model; set {_FEWEST_TOKENS} or "
            f"more ({DEFAULT_CALIBRATION_TOKENS} is plenty)"
        )


def default_tokens(checkpoint: Checkpoint, device: torch.device) -> int:
    """How many tokens to calibrate on where nothing is said.

    Args:
        checkpoint: the model.
        device: where it runs.
    """
    weights = num_weights(checkpoint)
    if device.type != "cpu" or weights <= _LARGE:
        return DEFAULT_CALIBRATION_TOKENS
    return max(_LEAST_BY_DEFAULT, DEFAULT_CALIBRATION_TOKENS * _LARGE // weights // _SEQUENCE * _SEQUENCE)


@dataclass(frozen=True)
class CalibrationSequences:
    """A text in sequences of tokens, each of which begins as the tokenizer begins a text.

    Attributes:
        taken: to calibrate on, spread evenly over the text.
        left: the others.
    """

    taken: list[list[int]]
    left: list[list[int]]


def calibration_sequences(
    checkpoint: Checkpoint, calibration: str, tokens: int | None, device: torch.device
) -> CalibrationSequences:
    """Cut a text.

    Args:
        checkpoint: whose tokenizer to use.
        calibration: a file, or one of :data:`xquant_vllm.scheme.calibration.texts.BUILT_IN`.
        tokens: how many to take at most; None for the default.
        device: where the model runs, which the default depends on.

    Raises:
        RefusedError: the text cannot be read or is too short, or there is no tokenizer.
    """
    check_calibration_tokens(tokens)
    wanted = default_tokens(checkpoint, device) if tokens is None else tokens
    text = calibration_text(calibration)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(ids) < _FEWEST_TOKENS:
        raise RefusedError(
            f"xquant: --calibration {calibration} has {counted(len(ids), 'token')}, too few to say anything about a "
            "model; give a text of a few thousand words"
        )
    rows = _cut(checkpoint, ids, opening_tokens(tokenizer), wanted)
    taken = spread(len(rows), max(1, wanted // len(rows[0])))
    return CalibrationSequences(
        [rows[index] for index in taken], [row for index, row in enumerate(rows) if index not in taken]
    )


def spread(available: int, count: int) -> list[int]:
    """So many numbers below ``available``, or all of them, evenly apart."""
    count = min(count, available)
    return [available * index // count for index in range(count)]


def sequences_of(checkpoint: Checkpoint, text: str) -> list[list[int]]:
    """A text in sequences like those; none where it is too short.

    Args:
        checkpoint: whose tokenizer to use.
        text: the text.

    Raises:
        RefusedError: there is no tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return _cut(checkpoint, ids, opening_tokens(tokenizer), _SEQUENCE) if len(ids) >= _FEWEST_TOKENS else []


def _cut(checkpoint: Checkpoint, ids: list[int], opening: list[int], longest: int) -> list[list[int]]:
    """Sequences of equal length, without a rest at the end, no longer than the model has positions."""
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    positions = text_config.get("max_position_embeddings") or _SEQUENCE
    step = min(_SEQUENCE, longest, len(ids) + len(opening), positions) - len(opening)
    return [opening + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]


def tokenize(checkpoint: Checkpoint, calibration: str, tokens: int | None, device: torch.device) -> torch.Tensor:
    """Sequences spread evenly over the text.

    Args:
        checkpoint: see :func:`calibration_sequences`.
        calibration: likewise.
        tokens: likewise.
        device: likewise.

    Returns:
        ``[sequences, length]``, int64.

    Raises:
        RefusedError: likewise.
    """
    return torch.tensor(calibration_sequences(checkpoint, calibration, tokens, device).taken)
