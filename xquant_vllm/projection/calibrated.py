"""Calibrated bases of one layer by itself: a latent for every kv head, of keys and of values."""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.allocation import Runs, allocate
from xquant_vllm.projection.basis import LatentBasis, left_inverse
from xquant_vllm.projection.calibration import LayerSample, second_moment, weigh
from xquant_vllm.projection.channels import channel_basis, principal_channels
from xquant_vllm.projection.refit import refit_up

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
    weights = [weight.to(of_values).unflatten(0, (num_kv_heads, -1)).mT for weight in (key_weight, value_weight)]
    gradients = [part.unflatten(1, (num_kv_heads, -1)) for part in (sample.key_gradient, sample.value_gradient)]
    fits: tuple[list[_Fit], list[_Fit]] = ([], [])
    for head in range(num_kv_heads):
        pair = [
            _Part(of_keys, weights[0][head], gradients[0][:, head], are_keys=True),
            _Part(of_values, weights[1][head], gradients[1][:, head], are_keys=False),
        ]
        codes = budget // num_kv_heads - 2  # but for two scales
        runs = allocate([part.channels.variances for part in pair], codes)
        for fits_of_part, part, of_runs in zip(fits, pair, runs, strict=True):
            fits_of_part.append(part.fit(of_runs, dtype))
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


class _Part:
    """The keys, or the values, of one kv head."""

    def __init__(self, hidden: torch.Tensor, columns: torch.Tensor, gradient: torch.Tensor, *, are_keys: bool) -> None:
        """Weight what is projected, and find its principal channels.

        Args:
            hidden: ``[num_tokens, hidden_size]``, FP64, the inputs.
            columns: ``[hidden_size, head_size]``, FP64, the projection.
            gradient: ``[num_tokens, head_size]``, of its outputs.
            are_keys: whether these are keys.
        """
        self._hidden, self._columns, self._gradient = hidden, columns, gradient
        self._into = (weigh(columns, gradient, None) if are_keys else weigh(columns, None, gradient)).into
        self._weighted = hidden @ self._into
        self.channels = principal_channels(second_moment(self._weighted, self._into, hidden.square().mean().item()))

    def fit(self, runs: Runs, dtype: torch.dtype) -> _Fit:
        """Down-projection as served, and what best inverts it after its rounding and that of the latents."""
        down = (self._into @ channel_basis(self.channels, runs, self._weighted)).to(dtype)
        up = left_inverse(down.unsqueeze(0), self._columns.unsqueeze(0))[0]
        latents = self._hidden @ down.to(self._hidden)
        up = refit_up(up, latents, self._hidden @ self._columns, self._gradient, runs)
        return _Fit(down, up.to(torch.float32), runs)
