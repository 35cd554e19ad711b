"""One latent for keys and values together, as XQuant-CL needs it for grouped-query attention (XQuant, section 3.3)."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.basis import down_projection, left_inverse


@dataclass(frozen=True)
class JointKVBasis:
    """A basis of the columns of ``[Wk|Wv]``.

    ``down @ lift`` projects on the space of these columns: ``x @ down @ lift @ [Wk|Wv]`` is ``x @ [Wk|Wv]``, although
    ``x @ down @ lift`` is not x.

    Attributes:
        down: ``[1, hidden_size, width]``, width being twice the key channels of all kv heads, in the dtype that will
            serve: orthonormal columns times channel scales times a rotation.
        lift: ``[width, hidden_size]``, FP32, the left inverse of ``down`` after its rounding.
    """

    down: torch.Tensor
    lift: torch.Tensor


def factorize_joint_kv(
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    *,
    outlier_channels: int,
    rotate: bool,
    seed: int,
    dtype: torch.dtype,
) -> JointKVBasis:
    """Factorize the stacked projections.

    Args:
        key_weight: ``[num_kv_heads * head_size, hidden_size]``, as a linear layer stores it.
        value_weight: likewise.
        outlier_channels: leading channels that are left out of the rotation.
        rotate: whether to rotate the remaining channels.
        seed: seed of the rotation.
        dtype: dtype that the down-projection is served in.

    Returns:
        The basis, on the weights' device. If the input is narrower than the latent, surplus channels are zero.
    """
    weight = torch.cat((key_weight, value_weight))
    columns = weight.to(torch.float64).T.unsqueeze(0)
    down = down_projection(columns, outlier_channels=outlier_channels, rotate=rotate, seed=seed, dtype=dtype)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device).unsqueeze(0)
    return JointKVBasis(down=down, lift=left_inverse(down, identity)[0].to(torch.float32))
