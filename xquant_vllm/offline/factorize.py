"""From a checkpoint to a folder that is served without factorizing anything: ``xquant factorize`` as a function."""

from collections.abc import Callable
from pathlib import Path

import torch

from xquant_vllm import __version__
from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.calibration.calibration_plan import CalibrationPlan, plan_calibration
from xquant_vllm.offline.calibration.calibration_tokens import tokenize
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.factor_layers import calibrated_layers, data_free_layers
from xquant_vllm.offline.factor_writer import WrittenFactors, write_factors
from xquant_vllm.offline.factorize_options import FactorizeOptions
from xquant_vllm.offline.output_folder import check_output, link_checkpoint, replaced_folder
from xquant_vllm.projection.calibration import GRADIENT_RIDGE, INPUT_RIDGE
from xquant_vllm.projection.factor_file import FACTORS_FILE, FORMAT_VERSION, HEADER_FILE, dtype_name, write_json
from xquant_vllm.scheme.calibration.texts import text_name
from xquant_vllm.scheme.factor_header import (
    Calibration,
    ChainSettings,
    FactorHeader,
    FactorSettings,
    Source,
    header_checksum,
)
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import spec_of
from xquant_vllm.scheme.settings import XQuantSettings

__all__ = ["FactorizeOptions", "Finish", "factorize", "write_calibrated", "write_header"]


Finish = Callable[[Path, FactorHeader], FactorHeader]
"""Called with a whole folder before it takes its name, and its header; returns the header that the folder then has."""


def factorize(options: FactorizeOptions, finish: Finish | None = None, kept: Path | None = None) -> FactorHeader:
    """Write a copy of a checkpoint with its key and value projections factorized.

    What it is doing is shown on standard error. The folder takes its name when it is whole; after an error or an
    interruption there is none.

    Args:
        options: what to make, of what, where.
        finish: what is to be done last; an error of it leaves no folder.
        kept: see :func:`xquant_vllm.offline.calibration.calibrated.fit_layers`.

    Returns:
        What the folder's header says of its factors.

    Raises:
        RefusedError: the model, the text, the folder or an option cannot be used.
        SettingsError: an option does not fit the model.
        OSError: the disk is full, or the like.
    """
    settings = options.settings()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("xquant: --device cuda: PyTorch sees no GPU; leave the option out to compute on the CPU")
    # Before a model is fetched from the hub.
    check_output(options.out, options.force)
    checkpoint = open_checkpoint(options.model)
    _check_fit(options, settings, checkpoint)
    with replaced_folder(options.out, checkpoint.folder, options.force) as folder:
        header = _write(folder, options, settings, checkpoint, kept)
        link_checkpoint(checkpoint.folder, folder, checkpoint.files)
        if finish is not None:
            header = finish(folder, header)
    return header


def write_calibrated(folder: Path, options: FactorizeOptions, checkpoint: Checkpoint, kept: Path) -> FactorHeader:
    """Write calibrated factors alone, in a way that can be interrupted.

    Args:
        folder: where to, not there yet.
        options: what to make; ``out`` and ``force`` say nothing here.
        checkpoint: the model.
        kept: see :func:`xquant_vllm.offline.calibration.calibrated.fit_layers`.

    Returns:
        What the folder's header says of its factors.

    Raises:
        RefusedError: the model, the text or an option cannot be used.
        OSError: the disk is full, or the like.
    """
    settings = options.settings()
    _check_fit(options, settings, checkpoint)
    folder.mkdir()
    return _write(folder, options, settings, checkpoint, kept)


def _write(
    folder: Path, options: FactorizeOptions, settings: XQuantSettings, checkpoint: Checkpoint, kept: Path | None
) -> FactorHeader:
    """Write factors and their header."""
    dtype, device = checkpoint.serving_dtype(options.dtype), torch.device(options.device)
    plan = batch = None
    if options.calibration is None:
        factors = data_free_layers(checkpoint, spec_of(settings, dtype), device)
    else:
        for layer in range(checkpoint.layers):
            # Looked at now, since the model runs over the text before a layer is fitted.
            checkpoint.served_key_value(layer, dtype)
        plan = plan_calibration(checkpoint, settings)
        batch = tokenize(checkpoint, options.calibration, options.calibration_tokens, device)
        factors = calibrated_layers(checkpoint, plan, batch, dtype, device, kept)
    written = write_factors(folder / FACTORS_FILE, factors, checkpoint.layers)
    header = FactorHeader(
        format=FORMAT_VERSION,
        package=__version__,
        source=Source(
            architecture=checkpoint.architecture,
            layers=checkpoint.layers,
            hidden_size=checkpoint.hidden_size,
            kv_heads=checkpoint.kv_heads,
            head_size=checkpoint.head_size,
            fingerprints=written.fingerprints,
        ),
        settings=_factor_settings(settings, options.bits is not None, plan, written),
        dtype=dtype_name(dtype),
        calibration=None if batch is None else _calibration(options, batch),
        checksums=written.checksums,
    )
    return write_header(folder, header)


def write_header(folder: Path, header: FactorHeader) -> FactorHeader:
    """Write a header with its checksum.

    Args:
        folder: where to.
        header: whatever its checksum is.

    Returns:
        What was written.
    """
    header = header.model_copy(update={"checksum": header_checksum(header.model_dump(mode="json"))})
    write_json(folder / HEADER_FILE, header.model_dump())
    return header


def _check_fit(options: FactorizeOptions, settings: XQuantSettings, checkpoint: Checkpoint) -> None:
    """Refuse what could not be served."""
    if options.calibration is None:
        sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
        shape = LayerShape(0, *sizes, keys_normed_together=checkpoint.keys_normed_together(0))
        layer_formats(settings.model_copy(update={"cache": "latent"}), [shape])
    if (options.first_layers or 0) > checkpoint.layers:
        raise RefusedError(
            f"xquant: --first-layers {options.first_layers} cannot work: the model has "
            f"{counted(checkpoint.layers, 'layer')}; set {checkpoint.layers} or fewer"
        )


def _calibration(options: FactorizeOptions, batch: torch.Tensor) -> Calibration:
    assert options.calibration is not None
    return Calibration(
        text=text_name(options.calibration),
        tokens=batch.numel(),
        ridge=INPUT_RIDGE,
        gradient_ridge=GRADIENT_RIDGE,
    )


def _factor_settings(
    settings: XQuantSettings, bits_given: bool, plan: CalibrationPlan | None, written: WrittenFactors
) -> FactorSettings:
    """What the header says of the settings."""
    general = FactorSettings(
        bits=settings.bits if bits_given or plan is not None else None,
        basis=settings.basis,
        rotate=settings.rotate,
        outlier_channels=settings.outlier_channels,
    )
    if plan is None:
        return general
    filled = settings.for_chain("latent")
    chain = None
    if filled.first_layers is not None and filled.anchor_interval is not None:
        chain = ChainSettings(first_layers=filled.first_layers, anchor_interval=filled.anchor_interval)
    allocation = [[[list(runs) for runs in stream] for stream in layer or ()] for layer in written.allocations]
    return general.model_copy(
        update={"basis": "joint" if plan.joint_kv else "head", "allocation": allocation, "chain": chain}
    )
