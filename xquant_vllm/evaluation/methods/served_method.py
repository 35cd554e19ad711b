"""``xquant`` and ``xquant-cl``, settled as the server does it: the same settings, refusals, formats and factors."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.methods.method_options import (
    DEFAULT_CALIBRATION,
    DEFAULT_CALIBRATION_TOKENS,
    FEWEST_CALIBRATION_TOKENS,
    NO_CALIBRATION,
    MethodOptions,
)
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.methods.served_cache import ServedCache, layer_parameters
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.calibrated import CALIBRATED_BITS, CalibratedFactors, fit_layers, plan_calibration
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.samples import tokenize
from xquant_vllm.offline.texts import text_name
from xquant_vllm.plugin.checks import check_layer_kinds, check_layers
from xquant_vllm.projection.factor_file import DTYPES, dtype_name
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings

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
    header = factors_in(checkpoint.folder)
    settings = over_factors(parse_settings(options.served_settings(method)), checkpoint.folder, header)
    check_layers(settings, checkpoint.layers)
    if method == "xquant-cl":
        check_layer_kinds(checkpoint.layer_kinds)
    batch = _calibration_batch(options, checkpoint, settings, header)
    calibrated = CalibratedFactors()
    allocations: dict[int, LayerAllocation] = {}
    if batch is not None:
        plan = plan_calibration(checkpoint, settings)
        settings = settings.model_copy(update={"basis": "joint" if plan.joint_kv else "head", "cache": "latent"})
        calibrated.layers.update(enumerate(fit_layers(checkpoint, plan, batch, dtype, device)))
        allocations = calibrated.allocations
    elif header is not None:
        dtype = DTYPES[header.dtype]
        of_layers = {layer: header.allocation_of(layer, slice(None)) for layer in range(checkpoint.layers)}
        allocations = {layer: allocation for layer, allocation in of_layers.items() if allocation is not None}
    sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
    shapes = [LayerShape(layer, *sizes) for layer in range(checkpoint.layers)]
    formats = layer_formats(settings, shapes, allocations or None)
    settings = settings.for_chain("x" if formats[0].holds == "x" else "latent")
    needs_factors = any(form.holds != "x" for form in formats)
    described = settings.model_dump(mode="json", exclude={"factor_cache", "prompt", "fold_values", "hot"})
    described["factors"] = _describe(options, header, batch, dtype) if needs_factors else None

    def build(model: HookedModel) -> CacheMethod:
        parameters = [layer_parameters(model, layer, dtype) for layer in range(checkpoint.layers)]
        if batch is not None:
            return ServedCache(settings, formats, calibrated, parameters)
        provider = FactorProvider(settings, None if header is None else checkpoint.folder, header, None)
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
        if options.calibration is not None:
            raise RefusedError(
                f"xquant: --calibration {options.calibration} has no use: {folder} has factors, which are evaluated as "
                "they are; leave it out, or name the model that they were made from"
            )
        return None
    given = [name for name in _NOT_CALIBRATED if name in settings.model_fields_set]
    if settings.first_layers is not None and settings.method == "xquant":
        given.append("first_layers")
    if settings.bits.key != settings.bits.value or settings.bits.key not in CALIBRATED_BITS:
        given.append("bits")
    source = options.calibration or DEFAULT_CALIBRATION
    if source == NO_CALIBRATION or (given and options.calibration is None):
        return None
    if given:
        raise RefusedError(
            f"xquant: the setting {given[0]!r} cannot work with --calibration {source}, which decides what is "
            f"stored of every channel; leave it out, or set --calibration {NO_CALIBRATION}"
        )
    return source


def _calibration_batch(
    options: MethodOptions, checkpoint: Checkpoint, settings: XQuantSettings, header: FactorHeader | None
) -> torch.Tensor | None:
    """Tokens to calibrate on, or None."""
    source = calibration_source(options, checkpoint.folder, settings, header)
    if source is None:
        return None
    tokens = DEFAULT_CALIBRATION_TOKENS if options.calibration_tokens is None else options.calibration_tokens
    if tokens < FEWEST_CALIBRATION_TOKENS:
        raise RefusedError(
            f"xquant: --calibration-tokens {tokens} is too few to say anything about a model; set "
            f"{FEWEST_CALIBRATION_TOKENS} or more (2048 is plenty)"
        )
    return tokenize(checkpoint, source, tokens, FEWEST_CALIBRATION_TOKENS)


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
