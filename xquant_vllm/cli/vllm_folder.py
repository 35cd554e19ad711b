"""The folder that vLLM serves in an evaluation: the model's, or one with factors that are calibrated for it."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xquant_vllm.evaluation.methods.calibration_source import calibration_source
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.served_settings import served_settings
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.factorize import FactorizeOptions, factorize


@contextlib.contextmanager
def vllm_folder(checkpoint: Checkpoint, method: Any, options: MethodOptions, dtype: Any) -> Iterator[Path]:
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
    folder = checkpoint.folder
    settings, header = served_settings(method, options, checkpoint)
    source = calibration_source(options, folder, settings, header)
    if source is None:
        yield folder
        return
    chained = method == "xquant-cl"
    with tempfile.TemporaryDirectory(prefix="xquant-eval-") as temporary:
        out = Path(temporary) / checkpoint.name
        factorize(
            FactorizeOptions(
                model=folder,
                out=out,
                calibration=source,
                calibration_tokens=options.calibration_tokens,
                bits=settings.bits.key,
                method=method,
                basis=settings.basis if "basis" in settings.model_fields_set and not chained else None,
                first_layers=settings.first_layers if chained else None,
                anchor_interval=settings.anchor_interval if chained else None,
                dtype=dtype,
            )
        )
        yield out
