"""``xquant`` and ``xquant-cl``, settled as the server does it: the same settings, refusals, formats and factors."""

import contextlib
import hashlib
from typing import Any

import torch

from xquant_vllm.evaluation.cache_method import CacheMethod
from xquant_vllm.evaluation.hooked_model import HookedModel
from xquant_vllm.evaluation.method_options import (
    DEFAULT_CALIBRATION,
    DEFAULT_CALIBRATION_TOKENS,
    FEWEST_CALIBRATION_TOKENS,
    NO_CALIBRATION,
    MethodOptions,
)
from xquant_vllm.evaluation.prepared_method import PreparedMethod
from xquant_vllm.evaluation.served_cache import ServedCache, layer_parameters
from xquant_vllm.integration.checks import check_layer_kinds, check_layers
from xquant_vllm.integration.factor_header import FactorHeader
from xquant_vllm.integration.factor_settings import factors_in, over_factors
from xquant_vllm.integration.factors import FactorProvider
from xquant_vllm.integration.formats import LayerShape, layer_formats
from xquant_vllm.integration.settings import XQuantSettings, parse_settings
from xquant_vllm.offline.calibrated import calibrate
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.refused import RefusedError
from xquant_vllm.offline.statistics import tokenize
from xquant_vllm.offline.texts import text_name
from xquant_vllm.projection.factor_file import DTYPES, dtype_name

# Of a chain that is fitted to a text, what `xquant factorize` has no option for, so that nothing could serve it.
_NOT_FITTED = ("skip_layers", "group_size", "first_layers_bits", "anchor_bits")


def prepare_served(method: str, options: MethodOptions, checkpoint: Checkpoint, dtype: torch.dtype) -> PreparedMethod:
    """Settle a method.

    Args:
        method: ``"xquant"`` or ``"xquant-cl"``.
        options: what the user says about it.
        checkpoint: the model; if its folder has factors, these are taken.
        dtype: in which it runs.

    Raises:
        RefusedError: an option cannot work.
        SettingsError: a setting cannot work.
        UnsupportedError: the server would refuse the method for this model.
    """
    header = factors_in(checkpoint.folder)
    settings = over_factors(parse_settings(options.served_settings(method)), checkpoint.folder, header)
    sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
    formats = layer_formats(settings, [LayerShape(layer, *sizes) for layer in range(checkpoint.layers)])
    check_layers(settings, checkpoint.layers)
    if method == "xquant-cl":
        check_layer_kinds(checkpoint.layer_kinds)
        settings = settings.for_chain("x" if formats[0].holds == "x" else "latent")
    needs_factors = any(form.holds != "x" for form in formats)
    batch = _calibration_batch(options, checkpoint, settings, header) if needs_factors else None
    if header is not None:
        dtype = DTYPES[header.dtype]
    described = settings.model_dump(mode="json", exclude={"factor_cache"})
    described["factors"] = _describe(options, header, batch, dtype) if needs_factors else None

    def build(model: HookedModel) -> CacheMethod:
        parameters = [layer_parameters(layer, dtype) for layer in model.layers]
        if batch is not None:
            calibrated = calibrate(checkpoint, settings, formats, batch, dtype, model.device)
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


def _calibration_batch(
    options: MethodOptions, checkpoint: Checkpoint, settings: XQuantSettings, header: FactorHeader | None
) -> torch.Tensor | None:
    """Tokens to calibrate on; None for bases from the weights alone, or from the folder."""
    if header is not None:
        if options.calibration is not None:
            raise RefusedError(
                f"xquant: --calibration {options.calibration} has no use: {checkpoint.folder} has factors, which are "
                "evaluated as they are; leave it out, or name the model that they were made from"
            )
        return None
    source = options.calibration or DEFAULT_CALIBRATION
    if source == NO_CALIBRATION:
        return None
    if settings.method == "xquant-cl":
        for name in _NOT_FITTED:
            if name in settings.model_fields_set and name in (options.settings or {}):
                raise RefusedError(
                    f"xquant: --settings {name!r} cannot work with a chain that is fitted to a text, because `xquant "
                    f"factorize` makes none with it; leave it out, or set --calibration {NO_CALIBRATION}"
                )
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
