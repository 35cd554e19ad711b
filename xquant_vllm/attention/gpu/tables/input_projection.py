"""What turns the inputs of a step into its keys and values: the up-projection as a dense matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from xquant_vllm.attention.exact import own_channels
from xquant_vllm.attention.gpu.tables.pairs import arranged
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan


class InputProjection(NamedTuple):
    """Of keys or of values.

    Attributes:
        stream: which of the inputs.
        heads: latent heads of the stream.
        up: ``[num_kv_heads, width of the stream, columns]``, in the dtype of the products.
    """

    stream: int
    heads: int
    up: torch.Tensor


def of_inputs(
    plan: AttentionLayerPlan,
    terms: Sequence[LatentTerm],
    up: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> InputProjection:
    """Take out of an up-projection what multiplies the layer's own input.

    Args:
        plan: the layer's plan.
        terms: its key terms or its value terms.
        up: ``[num_kv_heads, width, head_size]``, FP32: what their latent is multiplied by.
        columns: ``[columns]``: channels of a head in the kernels' order.
        dtype: of the products' operands.
    """
    index, channels = own_channels(plan, terms)
    up = up.to(plan.device)[:, channels]
    if plan.rotation is not None and index == 0:
        # Inputs come as the model has them: what is rotated for the pages need not be rotated here.
        up = plan.rotation.to(plan.device).invert(up.transpose(1, 2)).transpose(1, 2)
    return InputProjection(index, plan.layout.streams[index].num_heads, arranged(up, columns).to(dtype).contiguous())
