"""The folder that vLLM serves in an evaluation: the model's, or one with calibrated factors beside it."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.cli.factorize import factorize_checkpoint
from xquant_vllm.evaluation.method_options import DEFAULT_CALIBRATION, DEFAULT_CALIBRATION_TOKENS
from xquant_vllm.evaluation.prepared_method import PreparedMethod
from xquant_vllm.offline.checkpoint import Checkpoint


@contextlib.contextmanager
def served_folder(checkpoint: Checkpoint, method: PreparedMethod, options: argparse.Namespace) -> Iterator[Path]:
    """A folder as ``xquant factorize`` writes it if the method is calibrated, for as long as it is served.

    Args:
        checkpoint: the model.
        method: what is served.
        options: of the command.

    Raises:
        RefusedError: the model cannot be factorized.
    """
    factors = method.settings.get("factors")
    if factors is None or factors["from"] != "calibration":
        yield checkpoint.folder
        return
    settings = method.settings
    with tempfile.TemporaryDirectory(prefix="xquant-eval-") as folder:
        out = Path(folder) / checkpoint.folder.resolve().name
        arguments = argparse.Namespace(
            model=str(checkpoint.folder),
            out=out,
            force=False,
            calibration=options.calibration or DEFAULT_CALIBRATION,
            calibration_tokens=options.calibration_tokens or DEFAULT_CALIBRATION_TOKENS,
            method=method.name,
            bits=[settings["bits"]["key"], settings["bits"]["value"]],
            basis=settings["basis"],
            outlier_channels=[settings["outlier_channels"]["key"], settings["outlier_channels"]["value"]],
            rotate=settings["rotate"],
            first_layers=settings["first_layers"],
            anchor_interval=settings["anchor_interval"],
            dtype=options.dtype,
            device=options.device,
        )
        # What it says of the folder is of no use here.
        with contextlib.redirect_stdout(sys.stderr):
            factorize_checkpoint(arguments)
        yield out
