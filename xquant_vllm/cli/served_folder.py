"""The folder that vLLM serves in an evaluation: the model's, or one with factors that are calibrated for it."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.cli.factorize import factorize_checkpoint
from xquant_vllm.evaluation.methods.method_options import DEFAULT_CALIBRATION_TOKENS, MethodOptions
from xquant_vllm.evaluation.methods.served_method import calibration_source
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors
from xquant_vllm.scheme.settings import parse_settings


@contextlib.contextmanager
def served_folder(checkpoint: Checkpoint, method: str, options: MethodOptions, dtype: str) -> Iterator[Path]:
    """A folder as ``xquant factorize`` writes it if the method is calibrated, for as long as it is served.

    Args:
        checkpoint: the model.
        method: ``"xquant"`` or ``"xquant-cl"``.
        options: what the user says about it.
        dtype: in which it is served.

    Raises:
        RefusedError: an option cannot work, or the model cannot be calibrated.
        SettingsError: a setting cannot work.
    """
    folder, header = checkpoint.folder, factors_in(checkpoint.folder)
    settings = over_factors(parse_settings(options.served_settings(method)), folder, header)
    source = calibration_source(options, folder, settings, header)
    if source is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="xquant-eval-") as temporary:
        out = Path(temporary) / folder.resolve().name
        tokens = options.calibration_tokens
        arguments = argparse.Namespace(
            model=str(folder),
            out=out,
            force=False,
            calibration=source,
            calibration_tokens=DEFAULT_CALIBRATION_TOKENS if tokens is None else tokens,
            method=method,
            bits=[settings.bits.key],
            basis=settings.basis if "basis" in settings.model_fields_set else None,
            outlier_channels=None,
            rotate=None,
            first_layers=settings.first_layers,
            anchor_interval=settings.anchor_interval,
            dtype=dtype,
            device="cpu",
        )
        # What it says of the folder is of no use here.
        with contextlib.redirect_stdout(sys.stderr):
            factorize_checkpoint(arguments)
        yield out
