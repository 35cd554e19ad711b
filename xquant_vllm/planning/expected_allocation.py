"""The bits of calibrated channels before there is a calibration: how many bytes they will take, not which they will be.

A budget is shared out by :func:`xquant_vllm.codec.allocation.allocate`, as calibration does it, over variances that
fall like a power of the channel's number. Whatever they are, the budget is spent but for a remainder of a few bits, so
the bytes are those of a real calibration; a test compares them with calibrated rows of the accuracy results.
"""

import torch

from xquant_vllm.codec.allocation import LayerAllocation, allocate
from xquant_vllm.errors import RefusedError
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.predicted import joint_kv_width

# Of keys and values. With these SmolLM2 at 2 bits stores about as many channels as its real calibration does.
_KEY_POWER, _VALUE_POWER, _VALUE_SHARE = 1.5, 0.7, 0.3


def expected_allocation(
    hidden_size: int, num_kv_heads: int, head_size: int, bits: int, joint_kv: bool
) -> LayerAllocation:
    """Runs of every stream and latent head of a layer.

    Args:
        hidden_size: channels of the layer input.
        num_kv_heads: kv heads, of all ranks.
        head_size: channels of a head.
        bits: per channel, on average.
        joint_kv: whether keys and values share one latent.

    Raises:
        RefusedError: the channels cannot be packed.
    """
    budget = layer_budget(num_kv_heads, head_size, hidden_size, bits, joint_kv=joint_kv)
    try:
        if joint_kv:
            width = joint_kv_width(hidden_size, num_kv_heads, head_size)
            return ((allocate([_falling(width, _KEY_POWER)], budget - 1)[0],),)  # but for a scale
        variances = [_falling(head_size, _KEY_POWER), _VALUE_SHARE * _falling(head_size, _VALUE_POWER)]
        keys, values = allocate(variances, budget // num_kv_heads - 2)
    except (ValueError, RuntimeError):
        raise RefusedError(f"latents of heads of {head_size} channels cannot be packed at {bits} bits") from None
    return (keys,) * num_kv_heads, (values,) * num_kv_heads


def _falling(channels: int, power: float) -> torch.Tensor:
    return torch.arange(1, channels + 1, dtype=torch.float64) ** -power
