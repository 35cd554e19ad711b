"""What a quantized linear layer really multiplies by, whatever its format."""

import logging
from typing import Any

import torch

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.modules import DenseLinear, whole_output
from xquant_vllm.plugin.load.random_input import random_input

logger = logging.getLogger("vllm.xquant_vllm")

_ROWS = 256
# Of the output for random inputs, relative. Inputs rounded to 8 bits cost 1%.
_TOLERANCE = 5e-2


def effective_linear(name: str, linear: Any) -> DenseLinear:
    """Probe a linear layer with the zero vector and the identity.

    Works for every format whose forward is linear up to rounding, because it asks the layer itself. NaN and infinite
    weights pass; the caller looks for them.

    Args:
        name: the layer's name, for the log.
        linear: vLLM's linear layer, its weights post-processed.

    Returns:
        A dense layer in the dtype of the layer's output.

    Raises:
        UnsupportedError: the layer is not linear.
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
    dense = DenseLinear(weight, bias.to(dtype) if bias.any() else None, like=linear)
    _check_linear(name, linear, dense)
    return dense


@torch.no_grad()
def _check_linear(name: str, linear: Any, dense: DenseLinear) -> None:
    x = random_input(16, linear.input_size, dense.weight.dtype, dense.weight.device)
    expected = whole_output(linear, x).float()
    error = ((whole_output(dense, x).float() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if error > _TOLERANCE:
        raise unsupported_model(
            f"the quantized {name} is not linear: what it makes of random inputs differs by {error:.1e} from what its "
            f"answers to single channels add up to (relative, tolerance {_TOLERANCE:.0e})"
            + (" (INT8 products overflow on x86 processors without VNNI)" if x.device.type == "cpu" else "")
            + ", so its weight cannot be known; serve a checkpoint whose attention projections are not quantized"
        )
