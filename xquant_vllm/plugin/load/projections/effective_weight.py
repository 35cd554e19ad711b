"""What a quantized linear layer really multiplies by, whatever its format."""

import logging
from typing import Any

import torch

from xquant_vllm.plugin.load.modules import DenseLinear, whole_output

logger = logging.getLogger("vllm.xquant_vllm")

_ROWS = 256


def effective_linear(name: str, linear: Any) -> DenseLinear:
    """Probe a linear layer with the zero vector and the identity.

    Works for every format whose forward is linear up to rounding, because it asks the layer itself. Whether it was
    linear enough is checked afterwards, with the rest of the surgery.

    Args:
        name: the layer's name, for the log.
        linear: vLLM's linear layer, its weights post-processed.

    Returns:
        A dense layer in the dtype of the layer's output.
    """
    size, dtype = linear.input_size, linear.params_dtype
    device = next((p.device for p in linear.parameters()), torch.device("cpu"))
    with torch.no_grad():
        bias = whole_output(linear, torch.zeros(1, size, dtype=dtype, device=device))[0].float()
        columns = []
        for start in range(0, size, _ROWS):
            rows = torch.zeros(min(_ROWS, size - start), size, dtype=dtype, device=device)
            rows[:, start:].fill_diagonal_(1)
            columns.append(whole_output(linear, rows).float() - bias)
    weight = torch.cat(columns).T.contiguous().to(dtype)
    logger.debug("xquant: %s is quantized and was replaced by its effective weight in %s", name, dtype)
    return DenseLinear(weight, bias.to(dtype) if bias.any() else None, like=linear)
