"""``xquant`` and ``xquant-cl``, settled as the server does it: the same settings, refusals, formats and factors."""

import contextlib
import hashlib
from typing import Any

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.methods.calibration_source import calibration_batch
from xquant_vllm.evaluation.methods.method_names import DEFAULT_CALIBRATION
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.methods.served_cache import ServedCache, layer_parameters
from xquant_vllm.evaluation.methods.served_settings import served_settings
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.calibration.calibrated import CalibratedFactors, fit_layers
from xquant_vllm.offline.calibration.calibration_plan import plan_calibration
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.progress import counted_bar
from xquant_vllm.plugin.checks import check_layer_kinds, check_layers
from xquant_vllm.projection.factor_file import DTYPES, dtype_name
from xquant_vllm.scheme.calibration.texts import text_name
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats

# Settings that change nothing about what is measured.
_NOT_DESCRIBED = {"factor_cache", "prompt", "fold_values", "hot", "quality_probe"}


def prepare_served(
    method: str, options: MethodOptions, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> PreparedMethod:
    """Settle a method, and calibrate it if it is to be.

    Args:
        method: ``"xquant"`` or ``"xquant-cl"``.
        options: what the user says about it.
        checkpoint: the model; if its folder has factors, these are taken.
        dtype: in which it runs.
        device: where to calibrate.

    Raises:
        RefusedError: an option cannot work.
        SettingsError: a setting cannot work.
        UnsupportedError: the server would refuse the method for this model.
    """
    settings, header = served_settings(method, options, checkpoint)
    check_layers(settings, checkpoint.layers)
    if method == "xquant-cl":
        check_layer_kinds(checkpoint.layer_kinds)
    batch = calibration_batch(options, checkpoint, settings, header, device)
    calibrated = CalibratedFactors()
    allocations: dict[int, LayerAllocation] = {}
    if batch is not None:
        plan = plan_calibration(checkpoint, settings)
        settings = settings.model_copy(update={"basis": "joint" if plan.joint_kv else "head", "cache": "latent"})
        fitted = fit_layers(checkpoint, plan, batch, dtype, device)
        calibrated.layers.update(enumerate(counted_bar(fitted, checkpoint.layers, "fit", "layer")))
        allocations = calibrated.allocations
    elif header is not None:
        dtype = DTYPES[header.dtype]
        of_layers = {layer: header.allocation_of(layer, slice(None)) for layer in range(checkpoint.layers)}
        allocations = {layer: allocation for layer, allocation in of_layers.items() if allocation is not None}
    sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
    shapes = [
        LayerShape(layer, *sizes, keys_normed_together=checkpoint.keys_normed_together(layer))
        for layer in range(checkpoint.layers)
    ]
    formats = layer_formats(settings, shapes, allocations or None)
    if options.basis is not None and header is None and all(form.holds == "x" for form in formats):
        raise RefusedError(
            f"xquant: --basis {options.basis} has no use: of this model the layer input is cached, which has no basis; "
            'leave it out, or set --settings \'{"cache": "latent"}\''
        )
    settings = settings.for_chain("x" if formats[0].holds == "x" else "latent")
    needs_factors = any(form.holds != "x" for form in formats)
    described = settings.model_dump(mode="json", exclude=_NOT_DESCRIBED)
    described["factors"] = _describe(options, header, batch, dtype) if needs_factors else None

    def build(model: HookedModel) -> CacheMethod:
        parameters = [layer_parameters(model, layer, dtype) for layer in range(checkpoint.layers)]
        if batch is not None:
            return ServedCache(settings, formats, calibrated, parameters)
        folder = None if header is None else checkpoint.folder
        provider = FactorProvider(settings, folder, header, None, checkpoint.name)
        with provider if needs_factors else contextlib.nullcontext():
            provider.announce(
                layer.weights(form) for layer, form in zip(parameters, formats, strict=True) if form.holds != "x"
            )
            return ServedCache(settings, formats, provider, parameters)

    bits = settings.bits
    return PreparedMethod(
        name=method,
        bits=bits.key if bits.key == bits.value else bits.model_dump(),
        settings=described,
        bytes_per_token=sum(form.bytes_per_token for form in formats),
        build=build,
    )


def _describe(
    options: MethodOptions, header: FactorHeader | None, batch: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Where the factors come from, precisely enough to tell whether they are the same."""
    described: dict[str, Any] = {"dtype": dtype_name(dtype), "calibration": None}
    if header is not None:
        digest = hashlib.sha256(header.model_dump_json().encode()).hexdigest()
        described |= {"from": "folder", "sha256": digest}
        if header.calibration is not None:
            described["calibration"] = {"text": header.calibration.text, "tokens": header.calibration.tokens}
    elif batch is not None:
        described |= {"from": "calibration", "sha256": hashlib.sha256(batch.numpy().tobytes()).hexdigest()}
        described["calibration"] = {
            "text": text_name(options.calibration or DEFAULT_CALIBRATION),
            "tokens": batch.numel(),
        }
    else:
        described["from"] = "weights"
    return described
