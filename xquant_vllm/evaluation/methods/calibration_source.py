"""Which text a served method is calibrated on, if on any."""

from pathlib import Path

import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.methods.method_names import DEFAULT_CALIBRATION, NO_CALIBRATION
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.offline.calibration.calibration_tokens import tokenize
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.scheme.calibration.choice import CALIBRATED_BITS
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.settings import XQuantSettings

# What calibration decides, or has no use for.
_NOT_CALIBRATED = (
    "cache",
    "group_size",
    "rotate",
    "outlier_channels",
    "skip_layers",
    "first_layers_bits",
    "anchor_bits",
)


def calibration_source(
    options: MethodOptions, folder: Path, settings: XQuantSettings, header: FactorHeader | None
) -> str | None:
    """The text to calibrate on; None for bases from the weights alone, or from the folder, and for pages of X.

    Args:
        options: what the user says about the method.
        folder: the model's.
        settings: what that makes of the settings.
        header: of the folder's factors, if it has any.

    Raises:
        RefusedError: an option has no use, or contradicts a setting.
    """
    if header is not None:
        for option, value in (
            ("--calibration", options.calibration),
            ("--calibration-tokens", options.calibration_tokens),
        ):
            if value is not None:
                raise RefusedError(
                    f"xquant: {option} {value} has no use: {folder} has factors, which are evaluated as they are; "
                    "leave it out, or name the model that they were made from"
                )
        return None
    given = [name for name in _NOT_CALIBRATED if name in settings.model_fields_set]
    if settings.first_layers is not None and settings.method == "xquant":
        given.append("first_layers")
    if settings.bits.key != settings.bits.value or settings.bits.key not in CALIBRATED_BITS:
        given.append("bits")
    source = options.calibration or DEFAULT_CALIBRATION
    if source == NO_CALIBRATION:
        return None
    by_option = given and getattr(options, given[0], None) is not None
    what = f"--{given[0].replace('_', '-')}" if by_option else f"the setting {given[0]!r}" if given else ""
    if given and options.calibration is None:
        if options.calibration_tokens is not None:
            raise RefusedError(
                f"xquant: --calibration-tokens {options.calibration_tokens} has no use with {what}, with which nothing "
                "is calibrated; leave one of them out"
            )
        return None
    if given:
        raise RefusedError(
            f"xquant: {what} cannot work with --calibration {source}, which decides what is stored of every channel; "
            f"leave one of them out, or set --calibration {NO_CALIBRATION}"
        )
    return source


def calibration_batch(
    options: MethodOptions,
    checkpoint: Checkpoint,
    settings: XQuantSettings,
    header: FactorHeader | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Tokens to calibrate on, ``[sequences, length]``, or None.

    Raises:
        RefusedError: see :func:`calibration_source`; or the text cannot be used.
    """
    source = calibration_source(options, checkpoint.folder, settings, header)
    if source is None:
        return None
    return tokenize(checkpoint, source, options.calibration_tokens, device)
