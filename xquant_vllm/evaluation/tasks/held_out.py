"""The text that a certificate is measured on: what calibration did not take of the user's, or another one."""

import torch

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.calibration.calibration_tokens import calibration_sequences, sequences_of, spread
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.texts import python_docs_to_evaluate, read_file
from xquant_vllm.scheme.calibration.texts import BUILT_IN, PYTHON_DOCS, text_name

_WINDOWS = 8


def held_out(
    checkpoint: Checkpoint,
    given: str | None,
    calibration: str | None,
    calibration_tokens: int | None,
    device: torch.device,
) -> tuple[str, torch.Tensor]:
    """Windows of a text that the factors have not seen.

    Args:
        checkpoint: the model.
        given: a file to measure on, or None: what is left of a calibration text of the user's own, or, where that is
            too short, the half of CPython's documentation that nothing is calibrated on.
        calibration: the calibration text, None for factors from the weights alone.
        calibration_tokens: how many tokens of it were read, None for the default.
        device: where the model ran over it.

    Returns:
        The text's name, and token ids ``[windows, length]``.

    Raises:
        RefusedError: the text cannot be read, is too short, or there is no tokenizer.
    """
    if given is not None:
        rows = sequences_of(checkpoint, read_file("--certificate-text", given))
        if not rows:
            raise RefusedError(f"xquant: --certificate-text {given} is too short; give a text of a few thousand words")
        return text_name(given), _spread(rows)
    if calibration is not None and calibration not in BUILT_IN:
        left = calibration_sequences(checkpoint, calibration, calibration_tokens, device).left
        if len(left) >= _WINDOWS // 2:
            windows = _spread(left)
            return f"{counted(len(windows), 'sequence')} of {text_name(calibration)}", windows
    return PYTHON_DOCS, _spread(sequences_of(checkpoint, python_docs_to_evaluate()))


def _spread(rows: list[list[int]]) -> torch.Tensor:
    """So many, evenly over the text."""
    return torch.tensor([rows[index] for index in spread(len(rows), _WINDOWS)])
