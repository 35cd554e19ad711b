"""One latent for keys and values together, as XQuant-CL needs it for grouped-query attention (XQuant, section 3.3)."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.basis import down_projection, left_inverse
from xquant_vllm.projection.calibration import ProjectionStatistics


@dataclass(frozen=True)
class JointKVBasis:
    """A basis of the columns of ``[Wk|Wv]``.

    ``down @ lift`` projects on their span, so ``x @ down @ lift @ [Wk|Wv]`` is ``x @ [Wk|Wv]``, although it is not x.

    Attributes:
        down: ``[1, hidden_size, width]``, width being twice the key channels of all kv heads, in the dtype that will
            serve: orthonormal columns times channel scales times a rotation (orthonormal under C if calibrated).
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
    statistics: ProjectionStatistics | None = None,
) -> JointKVBasis:
    """Factorize the stacked projections.

    Args:
        key_weight: ``[num_kv_heads * head_size, hidden_size]``, as a linear layer stores it.
        value_weight: likewise.
        outlier_channels: leading channels that are left out of the rotation.
        rotate: whether to rotate the remaining channels.
        seed: seed of the rotation.
        dtype: dtype that the down-projection is served in.
        statistics: of the key heads followed by the value heads (moment of the stacked weight), or None.

    Returns:
        The basis, on the weights' device. If the input is narrower than the latent, surplus channels are zero.
    """
    weight = torch.cat((key_weight, value_weight))
    columns = weight.to(torch.float64).T.unsqueeze(0)
    down = down_projection(
        columns,
        outlier_channels=outlier_channels,
        rotate=rotate,
        seed=seed,
        dtype=dtype,
        statistics=None if statistics is None else _balanced(statistics),
    )
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device).unsqueeze(0)
    return JointKVBasis(down=down, lift=left_inverse(down, identity)[0].to(torch.float32))


def _balanced(statistics: ProjectionStatistics) -> ProjectionStatistics:
    """Give keys and values equal weight in sum: errors in scores and errors in outputs have no common unit."""
    importance = statistics.importance.clone()
    heads, head_size = importance.shape[0], importance.shape[1]
    blocks = statistics.moment.reshape(heads, head_size, heads, head_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    energy = (importance.mT @ blocks @ importance).diagonal(dim1=-2, dim2=-1).sum(-1)
    for half in (slice(0, heads // 2), slice(heads // 2, heads)):
        importance[half] /= energy[half].sum().clamp_min(torch.finfo(energy.dtype).tiny).sqrt()
    return ProjectionStatistics(statistics.moment, importance)
