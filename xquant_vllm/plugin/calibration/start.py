"""The setting ``"calibration"`` when an engine starts: what `xquant factorize --calibration` does, done once.

It is done where the configuration is made, in one process and before ranks are started: they find the folder in the
configuration. What cannot be calibrated is served with factors from the weights alone, which a warning says, unless the
user has named a text: then it is refused.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xquant_vllm.errors import FactorFileError, RefusedError, cause_of
from xquant_vllm.plugin.calibration.child import calibrate
from xquant_vllm.plugin.drafts import HEADS
from xquant_vllm.plugin.kept_folder import write_kept_folder
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.projection.factor_file import dtype_name
from xquant_vllm.scheme.calibration.choice import (
    AUTO,
    CalibrationChoice,
    ModelShape,
    cannot_calibrate,
    choose_calibration,
    why_not_calibrated,
)
from xquant_vllm.scheme.calibration.kept import touch
from xquant_vllm.scheme.calibration.request import CalibrationRequest, is_whole
from xquant_vllm.scheme.calibration.texts import text_name
from xquant_vllm.scheme.factor_header import read_header
from xquant_vllm.scheme.settings import XQuantSettings

logger = logging.getLogger("vllm.xquant_vllm")

# Ways to load that take the weights in the model's safetensors files, as they are.
_LOADS = ("auto", "hf", "safetensors", "instanttensor", "fastsafetensors", "runai_streamer")
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def calibrate_at_start(vllm_config: Any, settings: XQuantSettings) -> bool:
    """Have an engine's factors calibrated if its settings ask for that, and note where they are.

    Args:
        vllm_config: vLLM's configuration, of a model whose folder has no factors.
        settings: the user's.

    Returns:
        Whether there are factors now that there were not before.

    Raises:
        SettingsError: the user has named a text, and calibration is not possible.
    """
    model = vllm_config.model_config
    shape = ModelShape(
        model.get_hidden_size(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        vllm_config.parallel_config.tensor_parallel_size,
    )
    choice = choose_calibration(settings, shape)
    if choice is None:
        return False
    try:
        reason = why_not_calibrated(settings, shape) or next(_reasons(vllm_config, settings), None)
        if reason is not None:
            raise RefusedError(reason)
        folder = _factors(vllm_config, settings, choice)
    except (RefusedError, OSError) as error:
        reason = str(error).removeprefix("xquant: ")
        if settings.calibration != AUTO:
            raise cannot_calibrate(settings.calibration, reason) from None
        logger.warning(
            "xquant: not calibrated: factors are computed from the weights alone, which lose more at %s bits: %s",
            settings.bits,
            reason,
        )
        return False
    write_kept_folder(vllm_config, folder)
    return True


def _factors(vllm_config: Any, settings: XQuantSettings, choice: CalibrationChoice) -> Path:
    """The folder of the factors, which are made if they are not there."""
    model = vllm_config.model_config
    chained = settings.method == "xquant-cl"
    request = CalibrationRequest(
        model=str(_model_folder(vllm_config)),
        text=choice.text,
        bits=settings.bits.key,
        method=settings.method,
        basis=choice.basis,
        dtype=dtype_name(model.dtype),
        first_layers=settings.first_layers if chained else None,
        anchor_interval=settings.anchor_interval if chained else None,
    )
    folder = request.folder()
    if folder is None:
        raise RefusedError("there is no home folder to keep factors in; set HOME or XDG_CACHE_HOME")
    if not os.access(_nearest(folder), os.W_OK) and not is_whole(folder):
        raise RefusedError(f"factors cannot be kept in {folder.parent}; make it writable, or set XDG_CACHE_HOME")
    what = f"{request.bits} bits, method {request.method!r}"
    touch(folder)
    if _can_be_read(folder):
        logger.info("xquant: calibrated before (%s, on %s): factors in %s", what, text_name(choice.text), folder)
        return folder
    logger.info(
        'xquant: calibrating %s (%s) on %s, once; later starts find the result in %s. "calibration": "none" does '
        "without",
        model.model,
        what,
        text_name(choice.text),
        folder,
    )
    calibrate(request, folder, _device(), must_fit=settings.calibration == AUTO)
    logger.info("xquant: calibrated: factors in %s", folder)
    return folder


def _can_be_read(folder: Path) -> bool:
    """Whether kept factors are there; the header of damaged ones is removed, so that they are made anew."""
    try:
        return is_whole(folder) and read_header(folder) is not None
    except FactorFileError as error:
        logger.warning("xquant: the calibrated factors in %s are made anew, because the header %s", folder, error)
        for path in folder.iterdir():
            path.unlink()
        return False


def _nearest(folder: Path) -> Path:
    """The nearest folder that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _device() -> str:
    from vllm.platforms import current_platform

    return "cuda" if current_platform.is_cuda() else "cpu"


def _model_folder(vllm_config: Any) -> Path:
    """The checkpoint's folder; a model on the hub is fetched, as vLLM would do a moment later."""
    model = vllm_config.model_config
    if Path(model.model).is_dir():
        return Path(model.model)
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=vllm_config.load_config.download_dir,
            allow_patterns=_FILES,
        )
    except Exception as error:  # the hub has many errors of its own
        raise RefusedError(
            f"{model.model} is no folder of a safetensors checkpoint, and the Hugging Face hub has none of that name "
            f"that can be fetched ({cause_of(error)})"
        ) from None
    return Path(found)


def _reasons(vllm_config: Any, settings: XQuantSettings) -> Iterator[str]:
    """Why an engine's factors cannot be calibrated, as far as its configuration tells."""
    model, parallel, load = vllm_config.model_config, vllm_config.parallel_config, vllm_config.load_config
    if parallel.nnodes > 1 or parallel.use_ray or parallel.data_parallel_backend == "ray":
        yield (
            "ranks may be on other machines, where the result would not be found; run xquant factorize, and give every "
            "machine the folder"
        )
    if model.quantization is not None:
        yield f"the checkpoint is quantized ({model.quantization}), which is not run for calibration"
    if load.load_format not in _LOADS:
        yield f"with --load-format {load.load_format} the weights are not those of the model's safetensors files"
    if model.hf_overrides:
        yield "with --hf-overrides the model is not the one in its folder"
    if model.is_hybrid:
        yield f"{model.architecture} has other layers than attention, which calibration does not know"
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        yield "with --weight-transfer-config the weights change, and calibrated factors are for one set of weights"
    speculative = vllm_config.speculative_config
    if (
        speculative is not None
        and speculative.method in HEADS
        and getattr(speculative.attention_backend, "name", None) == BACKEND_NAME
    ):
        yield f"the compressed layers of a head for {speculative.method!r} are not in the factors of its model"
    if settings.method == "xquant-cl" and parallel.pipeline_parallel_size > 1:
        yield from _cuts(vllm_config, settings)


def _cuts(vllm_config: Any, settings: XQuantSettings) -> Iterator[str]:
    """A chain that a pipeline would cut where no rank can begin."""
    from xquant_vllm.plugin.engine_factors import cut_links

    cut = cut_links(vllm_config, vllm_config.model_config.get_total_num_hidden_layers(), settings.for_chain("latent"))
    if cut:
        yield (
            f"--pipeline-parallel-size {vllm_config.parallel_config.pipeline_parallel_size} would cut the chain before "
            f"layer {cut[0]}, which builds on those before it"
        )
