"""Both bases of one layer, as the command line, the cache and the server make them."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.basis import BasisKind, LatentBasis, factorize

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
) -> tuple[LatentBasis, LatentBasis]:
    """Factorize a layer's projections, from the weights alone.

    Args:
        key_weight: ``[num_kv_heads * head_size, hidden_size]``.
        value_weight: likewise.
        num_kv_heads: kv heads of these weights.
        spec: what to make.

    Returns:
        Key basis and value basis.
    """
    key, value = (
        factorize(
            weight,
            num_kv_heads,
            spec.kind,
            outlier_channels=outliers,
            rotate=spec.rotate,
            seed=seed,
            dtype=spec.dtype,
        )
        for weight, outliers, seed in (
            (key_weight, spec.key_outliers, _KEY_SEED),
            (value_weight, spec.value_outliers, _VALUE_SEED),
        )
    )
    return key, value
