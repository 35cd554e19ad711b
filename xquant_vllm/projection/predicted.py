"""Joint latents of keys and values, calibrated; in a chain every layer is predicted from the decoded ones before it.

The paper's chain for grouped-query attention (XQuant-CL; XQuant, section 3.3) passes an estimate of the layer input
from layer to layer, as wide as the model. Here nothing but what attention needs is passed on: with
``y = x [Wk|Wv] T``, keys and values weighted by what errors in them do (see :mod:`.calibration`), a layer's ``y_i`` is
predicted by a linear map from the *decoded* ``y`` of the layers before it in its group, and the residual is quantized
in a basis of its own::

    p_i = [y^_a | ... | y^_{i-1}] P_i        s_i = Q((y_i - p_i) B_i)        y^_i = p_i + s_i B_i^-1

``B_i`` are the residual's principal channels, which get bits by their importance (:mod:`xquant_vllm.codec.allocation`).
All of this is linear in what the layers have stored, so it unrolls into one matrix for every layer's store
(:attr:`PredictedLink.prediction`) and two for its attention (:attr:`PredictedLink.up_key`, ``up_value``).

The fit sees decoded predecessors: it shrinks what their quantization has made unreliable. A layer that nothing predicts
has a joint latent by itself, which is what method ``"xquant"`` with basis ``"joint"`` has everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.codec.allocated import dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import Runs, allocate
from xquant_vllm.projection.basis import left_inverse
from xquant_vllm.projection.calibration import LayerSample, second_moment, weigh
from xquant_vllm.projection.channels import channel_basis, principal_channels
from xquant_vllm.projection.refit import refit_up

# Ridge on the predictor, relative to each decoded channel's energy. Of 1e-3 to 1e-1 the best on SmolLM2.
_PREDICTOR_RIDGE = 1e-2
# More predecessors predict a little better but need more text to fit, and rarely are there as many in a group.
_MOST_PREDECESSORS = 3


def joint_kv_width(hidden_size: int, num_kv_heads: int, head_size: int) -> int:
    """Channels of a joint latent: no more than the layer input has."""
    return min(hidden_size, 2 * num_kv_heads * head_size)


@dataclass(frozen=True)
class PredictedLink:
    """One layer, unrolled. w is :func:`joint_kv_width`; the group has n layers so far.

    Attributes:
        down: ``[hidden_size, w]``, in the serving dtype.
        up_key: ``[num_kv_heads, n * w, head_size]``, FP32, from what the group's layers store to this layer's keys.
        up_value: likewise, to its values.
        prediction: ``[1, (n - 1) * w, w]``, FP32, from what the earlier layers store to this layer's expected latent;
            None for an anchor.
    """

    down: torch.Tensor
    up_key: torch.Tensor
    up_value: torch.Tensor
    prediction: torch.Tensor | None


class PredictedChain:
    """Fits layer after layer, keeping no more than one group's decoded text."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Start.

        Args:
            dtype: of the down-projections.
        """
        self._dtype = dtype
        # Of the group's layers: decoded y [num_tokens, w], and how y unrolls, [width of all stored so far, w].
        self._decoded: list[torch.Tensor] = []
        self._unrolled: list[torch.Tensor] = []

    def add(
        self,
        sample: LayerSample,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        num_kv_heads: int,
        budget: int,
        anchor: bool,
    ) -> tuple[PredictedLink, Runs]:
        """Fit the next layer.

        Args:
            sample: what the text has shown of the layer.
            key_weight: ``[num_kv_heads * head_size, hidden_size]``, as served.
            value_weight: likewise.
            num_kv_heads: kv heads.
            budget: bytes per token of the layer.
            anchor: whether the layer is stored by itself and starts a new group.

        Returns:
            The link, and the bits of its channels.
        """
        if anchor:
            self._decoded, self._unrolled = [], []
        hidden = sample.hidden.to(torch.float64)
        columns = torch.cat([weight.to(hidden).T for weight in (key_weight, value_weight)], 1)
        projection = weigh(columns, sample.key_gradient, sample.value_gradient)
        exact = hidden @ projection.into
        predictor, predicted = self._predict(exact)

        residual = exact - predicted
        # The ridge on the input's second moment, as far as the residual still is of the input's size.
        left = residual.square().sum() / exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)
        mean_square = (hidden.square().mean() * left).item()
        channels = principal_channels(second_moment(residual, projection.into, mean_square))
        (runs,) = allocate([channels.variances], budget - 1)  # but for a scale
        basis = channel_basis(channels, runs, residual)
        down = (projection.into @ basis).to(self._dtype)
        up = left_inverse(down.unsqueeze(0), projection.into.unsqueeze(0))[0]
        stored = (hidden @ down.to(hidden) - predicted @ basis).float()
        gradient = torch.cat((sample.key_gradient, sample.value_gradient), 1).to(up) @ projection.back.T
        up = refit_up(up, stored, residual, gradient, runs)
        decoded = dequantize_allocated(*quantize_allocated(stored, runs), runs, stored.shape[1])
        self._decoded.append(predicted + decoded.to(up) @ up)

        unrolled, prediction = up, None
        if predictor is not None:
            earlier = self._unroll(predictor)
            prediction = (earlier @ basis).to(torch.float32).unsqueeze(0)
            unrolled = torch.cat((earlier, up))
        self._unrolled.append(unrolled)
        ups = (unrolled @ projection.back).unflatten(1, (2, num_kv_heads, -1)).to(torch.float32).unbind(1)
        key, value = (part.transpose(0, 1).contiguous() for part in ups)
        return PredictedLink(down.contiguous(), key, value, prediction), runs

    def _predict(self, exact: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The map from the decoded predecessors, and what it predicts ``[num_tokens, w]``."""
        if not self._decoded:
            return None, torch.zeros_like(exact)
        tokens, width = exact.shape
        # With fewer tokens than predictors the fit would be of noise.
        count = max(1, min(_MOST_PREDECESSORS, tokens // width))
        known = torch.cat(self._decoded[-count:], 1)
        gram = known.T @ known
        diagonal = gram.diagonal()
        diagonal += _PREDICTOR_RIDGE * diagonal + 1e-9 * diagonal.mean()
        predictor = torch.linalg.solve(gram, known.T @ exact)
        return predictor, known @ predictor

    def _unroll(self, predictor: torch.Tensor) -> torch.Tensor:
        """A predictor from decoded ``y`` as one from what the layers have stored, ``[width of all stored, w]``."""
        width = predictor.shape[1]
        parts = predictor.split(width)
        total = predictor.new_zeros(self._unrolled[-1].shape[0], width)
        for unrolled, part in zip(self._unrolled[-len(parts) :], parts, strict=True):
            total[: unrolled.shape[0]] += unrolled @ part
        return total


def link_shapes(
    hidden_size: int, num_kv_heads: int, head_size: int, layers_of_group: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of a link's tensors by name; ``layers_of_group`` counts this layer and those before it."""
    width = joint_kv_width(hidden_size, num_kv_heads, head_size)
    up = (torch.float32, (num_kv_heads, layers_of_group * width, head_size))
    shapes = {"down": (dtype, (hidden_size, width)), "up_key": up, "up_value": up}
    if layers_of_group > 1:
        shapes["prediction"] = (torch.float32, (1, (layers_of_group - 1) * width, width))
    return shapes


def link_tensors(link: PredictedLink) -> dict[str, torch.Tensor]:
    """A link's tensors by name."""
    tensors = {"down": link.down, "up_key": link.up_key, "up_value": link.up_value}
    if link.prediction is not None:
        tensors["prediction"] = link.prediction
    return tensors


def layers_of_groups(anchors: Sequence[bool]) -> list[int]:
    """For every layer, how many layers its group has so far, itself included."""
    counts: list[int] = []
    for anchor in anchors:
        counts.append(1 if anchor or not counts else counts[-1] + 1)
    return counts
