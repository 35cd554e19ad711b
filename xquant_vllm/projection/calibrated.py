"""Calibrated bases of one layer by itself: a latent for every kv head, of keys and of values."""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.allocation import Runs, allocate
from xquant_vllm.projection.basis import LatentBasis, left_inverse
from xquant_vllm.projection.calibration import LayerSample, WeightedProjection, second_moment, weigh
from xquant_vllm.projection.channels import channel_basis, principal_channels

# The paper's groups, and bytes of their scale and zero.
_PAPER_GROUP, _PAPER_PARAMETERS = 128, 4


@dataclass(frozen=True)
class CalibratedHeads:
    """A layer's bases and what its channels are stored in.

    Attributes:
        key: basis of the keys, channels in the order of their importance.
        value: basis of the values, likewise.
        key_runs: bits of the channels of every key latent head.
        value_runs: likewise of values.
    """

    key: LatentBasis
    value: LatentBasis
    key_runs: tuple[Runs, ...]
    value_runs: tuple[Runs, ...]


def layer_budget(num_kv_heads: int, head_size: int, hidden_size: int, bits: int, *, joint_kv: bool) -> int:
    """Bytes per token of a layer: what the paper's pages take at these bits (XQuant, section 3).

    Keys have a scale and zero of 16 bits for 128 tokens of every channel, values and the layer input for 128 channels.

    Args:
        num_kv_heads: kv heads.
        head_size: channels of a head.
        hidden_size: channels of the layer input.
        bits: bits per channel.
        joint_kv: whether the layer input will do, where it is narrower than keys and values.
    """
    channels = num_kv_heads * head_size
    if joint_kv and hidden_size < 2 * channels:
        return hidden_size * bits // 8 + _PAPER_PARAMETERS * -(-hidden_size // _PAPER_GROUP)
    keys = channels * bits // 8 + _PAPER_PARAMETERS * channels // _PAPER_GROUP
    return keys + channels * bits // 8 + _PAPER_PARAMETERS * -(-channels // _PAPER_GROUP)


def fit_heads(
    sample: LayerSample,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    num_kv_heads: int,
    budget: int,
    dtype: torch.dtype,
) -> CalibratedHeads:
    """Fit a layer's bases to a text. The key and the value of a kv head share its part of the budget.

    Args:
        sample: what the text has shown of the layer.
        key_weight: ``[num_kv_heads * head_size, hidden_size]``, as served.
        value_weight: likewise.
        num_kv_heads: kv heads.
        budget: bytes per token of the layer.
        dtype: of the down-projections.
    """
    of_values = sample.hidden.to(torch.float64)
    of_keys = of_values if sample.key_factor is None else of_values * sample.key_factor.to(of_values).unsqueeze(1)
    mean_squares = [hidden.square().mean().item() for hidden in (of_keys, of_values)]
    fits: tuple[list[_Fit], list[_Fit]] = ([], [])
    gradients = [part.unflatten(1, (num_kv_heads, -1)) for part in (sample.key_gradient, sample.value_gradient)]
    for head in range(num_kv_heads):
        pair = []
        for weight, gradient, hidden, mean_square in zip(
            (key_weight, value_weight), gradients, (of_keys, of_values), mean_squares, strict=True
        ):
            columns = weight.to(hidden).unflatten(0, (num_kv_heads, -1))[head].T
            projection = weigh(columns, [gradient[:, head]])
            weighted = hidden @ projection.into
            channels = principal_channels(second_moment(weighted, projection.into, mean_square))
            pair.append((columns, projection, weighted, channels))
        codes = budget // num_kv_heads - 2  # but for two scales
        runs = allocate([channels.variances for *_, channels in pair], codes)
        for fit, of_runs, (columns, projection, weighted, channels) in zip(fits, runs, pair, strict=True):
            fit.append(_fit(columns, projection, channel_basis(channels, of_runs, weighted), of_runs, dtype))
    key, value = (
        LatentBasis(torch.stack([fit.down for fit in of_heads]), torch.stack([fit.up for fit in of_heads]))
        for of_heads in fits
    )
    key_runs, value_runs = (tuple(fit.runs for fit in of_heads) for of_heads in fits)
    return CalibratedHeads(key, value, key_runs, value_runs)


@dataclass(frozen=True)
class _Fit:
    down: torch.Tensor
    up: torch.Tensor
    runs: Runs


def _fit(
    columns: torch.Tensor, projection: WeightedProjection, basis: torch.Tensor, runs: Runs, dtype: torch.dtype
) -> _Fit:
    """Down-projection as served, and what best inverts it after its rounding."""
    down = (projection.into @ basis).to(dtype)
    up = left_inverse(down.unsqueeze(0), columns.unsqueeze(0))[0]
    return _Fit(down, up.to(torch.float32), runs)
