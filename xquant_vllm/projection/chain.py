"""Keys and values of a layer that is stored as a difference from earlier ones (XQuant-CL; XQuant, section 3.3).

What layers of a chain store is worth a sum in terms of the layer input x::

    x_hat_i = s_a L_a + ... + s_i L_i

``s_j [width_j]`` is what layer j stores (the anchor a its latent, later layers residuals) and ``L_j [width_j,
hidden_size]`` its *lift*. The paper accumulates ``x_hat`` from layer to layer and multiplies it by ``Wk`` and ``Wv``.
Here the lifts are multiplied into the weights once: ``k_i = [s_a | ... | s_i] [L_a Wk; ...; L_i Wk]``, the same
function without an accumulator as wide as the model.
"""

from collections.abc import Sequence

import torch

from xquant_vllm.codec.rotation import HadamardRotation


def input_up_projection(weight: torch.Tensor, num_kv_heads: int, rotation: HadamardRotation | None) -> torch.Tensor:
    """What turns the rotated layer input into keys or values.

    Args:
        weight: ``[num_kv_heads * head_size, hidden_size]``, as a linear layer stores it.
        num_kv_heads: kv heads of this weight.
        rotation: of the layer input, or None.

    Returns:
        ``[num_kv_heads, hidden_size, head_size]``, FP32.
    """
    rows = weight.to(torch.float64)
    if rotation is not None:
        # (x R) (R^T w) = x w, and R^T w, as a row, is w^T R.
        rows = rotation.apply(rows)
    return rows.to(torch.float32).unflatten(0, (num_kv_heads, -1)).transpose(1, 2).contiguous()


def chain_up_projection(lifts: Sequence[torch.Tensor], weight: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """What turns the stored latents of a chain, side by side, into the last layer's keys or values.

    Args:
        lifts: of every layer of the chain, the last layer's own included, ``[width, hidden_size]``.
        weight: the last layer's, ``[num_kv_heads * head_size, hidden_size]``.
        num_kv_heads: kv heads of this weight.

    Returns:
        ``[num_kv_heads, sum of widths, head_size]``, FP32.
    """
    columns = weight.to(torch.float64).T
    up = torch.cat([lift.to(torch.float64) @ columns for lift in lifts])
    return up.to(torch.float32).unflatten(1, (num_kv_heads, -1)).transpose(0, 1).contiguous()


def chain_prediction(lifts: Sequence[torch.Tensor], down: torch.Tensor) -> torch.Tensor:
    """What turns the stored latents of earlier layers, side by side, into the next layer's expected latent.

    Args:
        lifts: of the earlier layers, ``[width, hidden_size]``.
        down: the next layer's, ``[hidden_size, width]``.

    Returns:
        ``[1, sum of widths, width]``, FP32.
    """
    down = down.to(torch.float64)
    return torch.cat([lift.to(torch.float64) @ down for lift in lifts]).to(torch.float32).unsqueeze(0)
