"""The proof that a module under surgery still makes the keys and values that it made before."""

from collections.abc import Iterator, Sequence

import torch

from xquant_vllm.attention.latents import combine
from xquant_vllm.codec.layout import Stream
from xquant_vllm.errors import RefusedError
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values
from xquant_vllm.scheme.layer_scheme import LayerScheme

# Relative error of rematerialized against original keys and values, by the dtype they are computed in. An unforeseen
# treatment of keys is wrong by a large part of their size; quantized activations of a quantized layer are not.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def differences(before: Sequence[torch.Tensor], rebuilt: Sequence[torch.Tensor]) -> Iterator[tuple[str, float, float]]:
    """Which of queries, keys and values are not what they were: name, relative error, tolerance.

    Args:
        before: queries, keys and values ``[num_tokens, ...]`` of the untouched module, in its dtype.
        rebuilt: the same after surgery, FP32.
    """
    tolerance = TOLERANCE[before[0].dtype]
    for what, expected, actual in zip(("queries", "keys", "values"), before, rebuilt, strict=True):
        error = ((actual - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
        if not error <= tolerance:
            yield what, error, tolerance


def prove_keys_and_values(
    parts: AttentionParts,
    scheme: LayerScheme,
    earlier: Sequence[Stream],
    positions: torch.Tensor,
    before: tuple[torch.Tensor, ...],
    after: tuple[torch.Tensor, ...],
) -> None:
    """Refuse a module whose rematerialized keys and values are not its own.

    Args:
        parts: the module's parts.
        scheme: what surgery made of its cache.
        earlier: streams of the layers that are read too.
        positions: ``[num_tokens]``, of the tokens that the module was run on.
        before: queries, keys and values that the untouched module handed to attention.
        after: queries and latents (or layer inputs) that it hands over now.

    Raises:
        UnsupportedError: they differ by more than rounding.
    """
    _refuse_overflow(parts, before)
    key_latents, value_latents = _exact_latents(scheme, earlier, after[1], after[2])
    keys = rematerialize_keys(key_latents, positions, scheme.projection)
    if scheme.query_weight is not None:
        keys = keys * scheme.query_weight
    rebuilt = (
        after[0].float(),
        keys.flatten(1),
        rematerialize_values(value_latents, scheme.projection).flatten(1),
    )
    shape = scheme.format.shape
    for what, error, tolerance in differences(before, rebuilt):
        raise unsupported_model(
            f"{type(parts.module).__name__} at {parts.name} is not recognized: its rematerialized {what} "
            f"({shape.num_kv_heads} kv heads of {shape.head_size}) differ from its own by {error:.1e} (relative, "
            f"tolerance {tolerance:.0e}), so it treats them in a way that is not supported"
        )


def _refuse_overflow(parts: AttentionParts, before: Sequence[torch.Tensor]) -> None:
    """Refuse a module that leaves the range of its dtype by itself: no cache makes up for that."""
    for what, tensor in zip(("queries", "keys", "values"), before, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            remedy = "serve it with --dtype bfloat16" if tensor.dtype == torch.float16 else "fetch the checkpoint anew"
            raise RefusedError(
                f"xquant: the {what} of {parts.name} are NaN or infinite in {dtype} for an input of ordinary numbers; "
                f"{remedy}"
            )


def _exact_latents(
    scheme: LayerScheme, earlier: Sequence[Stream], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value latents ``[num_tokens, heads, width]`` if nothing were quantized.

    What earlier layers of a chain have stored may be anything: the own stream makes good what they do not say.
    """
    inputs = [x.flatten(1).float() for x in scheme.inputs(key, value)]
    if scheme.rotation is not None:
        inputs[0] = scheme.rotation.apply(inputs[0])
    own = [
        x.unflatten(1, (stream.num_heads, stream.width))
        for x, stream in zip(inputs, scheme.format.streams, strict=True)
    ]
    if scheme.format.holds == "latents":
        return own[0], own[1]
    generator = torch.Generator(device="cpu").manual_seed(1)
    stored = [
        torch.randn(own[0].shape[0], stream.num_heads, stream.width, generator=generator, device="cpu").to(own[0])
        for stream in earlier
    ]
    prediction = scheme.prediction
    if prediction is not None:
        predicted = combine(prediction.terms, stored)
        own[0] = own[0] - (predicted if prediction.matrix is None else predicted @ prediction.matrix)
    latent = combine(scheme.key_terms, [*stored, own[0]])
    return latent, latent
