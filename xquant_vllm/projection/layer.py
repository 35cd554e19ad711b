"""Both bases of one layer, as the command line, the cache and the server make them."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.basis import BasisKind, LatentBasis, factorize
from xquant_vllm.projection.calibration import ProjectionStatistics

_KEY_SEED, _VALUE_SEED = 2508, 10395


@dataclass(frozen=True)
class BasisSpec:
    """What determines the bases of given weights.

    Attributes:
        kind: one basis per kv head, or one for all.
        key_outliers: leading channels of every key latent head that stay out of the rotation.
        value_outliers: likewise of value latent heads.
        rotate: whether the other channels are rotated.
        dtype: of the down-projections.
    """

    kind: BasisKind
    key_outliers: int
    value_outliers: int
    rotate: bool
    dtype: torch.dtype


def factorize_layer(
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    num_kv_heads: int,
    spec: BasisSpec,
    statistics: tuple[ProjectionStatistics, ProjectionStatistics] | None = None,
) -> tuple[LatentBasis, LatentBasis]:
    """Factorize a layer's projections.

    Args:
        key_weight: ``[num_kv_heads * head_size, hidden_size]``.
        value_weight: likewise.
        num_kv_heads: kv heads of these weights.
        spec: what to make.
        statistics: of keys and values, or None for data-free bases.

    Returns:
        Key basis and value basis.
    """
    key_statistics, value_statistics = statistics or (None, None)
    key, value = (
        factorize(
            weight,
            num_kv_heads,
            spec.kind,
            outlier_channels=outliers,
            rotate=spec.rotate,
            seed=seed,
            dtype=spec.dtype,
            statistics=of_weight,
        )
        for weight, outliers, seed, of_weight in (
            (key_weight, spec.key_outliers, _KEY_SEED, key_statistics),
            (value_weight, spec.value_outliers, _VALUE_SEED, value_statistics),
        )
    )
    return key, value
