"""Methods by name."""

import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.methods.baselines.kivi import (
    PRE_ROPE_GROUP_SIZE,
    PUBLISHED_GROUP_SIZE,
    Kivi,
    KiviPreRope,
    kivi_bytes,
)
from xquant_vllm.evaluation.methods.baselines.paper_xquant import DenseLayer, PaperXQuant, xquant_bytes
from xquant_vllm.evaluation.methods.baselines.paper_xquant_cl import PaperXQuantCL, xquant_cl_bytes
from xquant_vllm.evaluation.methods.baselines.turboquant import TurboQuant, turboquant_bytes
from xquant_vllm.evaluation.methods.method_names import SERVED_METHODS
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.methods.served_method import prepare_served
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import Checkpoint


def prepare_method(
    method: str,
    options: MethodOptions,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    num_tokens: int,
    device: torch.device | None = None,
) -> PreparedMethod:
    """Settle a method for a model.

    Args:
        method: one of :data:`xquant_vllm.evaluation.methods.method_names.METHODS`.
        options: what the user says about it.
        checkpoint: the model.
        dtype: in which it runs.
        num_tokens: tokens of a window, at whose end bytes are counted.
        device: where to calibrate; None for the CPU.

    Raises:
        RefusedError: an option cannot work.
        SettingsError: a setting of the server cannot work.
        UnsupportedError: the server would refuse the method for this model.
    """
    options.check(method)
    if method in SERVED_METHODS:
        return prepare_served(method, options, checkpoint, dtype, device or torch.device("cpu"))
    if method == "16bit":
        if options.bits not in (None, (16,)):
            raise RefusedError("xquant: --bits has no use with --method 16bit; leave it out")
        return PreparedMethod(method, 16, {}, bytes_16bit(checkpoint), lambda _: CacheMethod())
    bits, layers = options.baseline_bits(method), checkpoint.layers
    hidden_size, head_size = checkpoint.hidden_size, checkpoint.head_size
    channels = checkpoint.kv_heads * head_size
    if method == "turboquant":
        size = layers * turboquant_bytes(channels, head_size, bits)
        return PreparedMethod(method, bits, {}, size, lambda model: TurboQuant(bits, head_size, model.device))
    if method == "paper-xquant":
        size = layers * xquant_bytes(hidden_size, channels, bits)
        return PreparedMethod(method, bits, {}, size, lambda model: PaperXQuant(dense_layers(model), bits))
    if method == "paper-xquant-cl":
        size = xquant_cl_bytes(hidden_size, channels, bits, layers)
        return PreparedMethod(method, bits, {}, size, lambda model: PaperXQuantCL(dense_layers(model), bits))
    residual = options.residual or 0
    group_size = options.group_size or (PUBLISHED_GROUP_SIZE if method == "kivi" else PRE_ROPE_GROUP_SIZE)
    size = layers * kivi_bytes(channels, bits, group_size, residual, num_tokens)
    if method == "kivi":
        settings = {"group_size": group_size, "residual": residual}
        return PreparedMethod(method, bits, settings, size, lambda _: Kivi(bits, group_size, residual))
    return PreparedMethod(method, bits, {"group_size": group_size}, size, lambda _: KiviPreRope(bits, group_size))


def bytes_16bit(checkpoint: Checkpoint) -> int:
    """Bytes that a token's 16-bit keys and values take in all layers."""
    return 2 * 2 * checkpoint.kv_heads * checkpoint.head_size * checkpoint.layers


def dense_layers(model: HookedModel) -> list[DenseLayer]:
    """A model's projections in FP32."""
    layers = []
    for layer in model.layers:
        key, value = (weight.float().T for weight in layer.weights)
        zeros = key.new_zeros(key.shape[1])
        key_bias, value_bias = (zeros if bias is None else bias.flatten() for bias in layer.biases)
        layers.append(DenseLayer(key, value, key_bias, value_bias))
    return layers
