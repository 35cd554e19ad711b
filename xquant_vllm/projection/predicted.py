"""A chain of latents in which every layer is predicted from the decoded ones before it, fitted on a little text.

The paper's chain for grouped-query attention (XQuant-CL; XQuant, section 3.3) passes an estimate of the layer input
from layer to layer, as wide as the model. Here nothing but what attention needs is passed on: with
``y = x [Wk Tk | Wv Tv]``, keys and values weighted by what errors in them do (see
:mod:`xquant_vllm.projection.calibration`), a layer's ``y_i`` is predicted by a linear map from the *decoded* ``y`` of
the layers before it in its group, and the residual is quantized in a basis of its own::

    p_i = [y^_a | ... | y^_{i-1}] P_i        s_i = Q((y_i - p_i) D_i)        y^_i = p_i + s_i U_i

``D_i`` and ``U_i`` come from the residual's second moment, keys and values apart, scaled and rotated like the basis of
a layer by itself. All of this is linear in what the layers have stored, so it unrolls into one matrix for every layer's
store (:attr:`PredictedLink.prediction`) and two for its attention (:attr:`PredictedLink.up_key`, ``up_value``).

The fit sees decoded predecessors: it shrinks what their quantization has made unreliable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.codec.quantizer import dequantize, quantize, to_fp16
from xquant_vllm.codec.rotation import random_rotation
from xquant_vllm.projection.basis import left_inverse
from xquant_vllm.projection.calibration import INPUT_RIDGE

_SEED = 10395
# Ridge on the predictor, relative to each decoded channel's energy. Of 1e-3 to 1e-1 the best on SmolLM2.
_PREDICTOR_RIDGE = 1e-2
# More predecessors predict a little better but need more text to fit, and rarely are there as many in a group.
_MOST_PREDECESSORS = 3


@dataclass(frozen=True)
class LinkFormat:
    """How a layer of the chain is quantized.

    Attributes:
        bits: bits per code; 16 for none.
        group_size: channels that share a scale and a zero point.
        outlier_channels: leading channels kept in FP16.
        anchor: whether the layer is stored by itself and starts a new group.
    """

    bits: int
    group_size: int
    outlier_channels: int
    anchor: bool


@dataclass(frozen=True)
class PredictedLink:
    """One layer of the chain, unrolled. The width w is ``2 * num_kv_heads * head_size``; n layers of the group so far.

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
    """Fits a chain layer after layer, keeping no more than one group's decoded text."""

    def __init__(self, rotate: bool, dtype: torch.dtype) -> None:
        """Start.

        Args:
            rotate: whether channels are rotated before they are quantized.
            dtype: of the down-projections.
        """
        self._rotate, self._dtype = rotate, dtype
        # Of the group's layers: decoded y [num_tokens, w], and how y unrolls, [width of all stored so far, w].
        self._decoded: list[torch.Tensor] = []
        self._unrolled: list[torch.Tensor] = []

    def add(
        self,
        hidden: torch.Tensor,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        importances: tuple[torch.Tensor, torch.Tensor],
        form: LinkFormat,
    ) -> PredictedLink:
        """Fit the next layer.

        Args:
            hidden: ``[num_tokens, hidden_size]``, the layer's inputs on the calibration text.
            key_weight: ``[num_kv_heads * head_size, hidden_size]``, as served.
            value_weight: likewise.
            importances: of key and of value channels, ``[num_kv_heads, head_size, head_size]``, FP64, invertible.
            form: how the layer is quantized.
        """
        if form.anchor:
            self._decoded, self._unrolled = [], []
        hidden = hidden.to(torch.float64)
        columns = torch.cat(
            [_weighted(weight, t) for weight, t in zip((key_weight, value_weight), importances, strict=True)], 1
        )
        exact = hidden @ columns
        predictor, predicted = self._predict(exact)
        down, basis = self._basis(hidden, columns, exact, exact - predicted, form)
        up = left_inverse(down.unsqueeze(0), columns.unsqueeze(0))[0]
        residual = hidden @ down.to(torch.float64) - predicted @ basis
        decoded = predicted + _round_trip(residual, form) @ up

        unrolled = up
        prediction = None
        if predictor is not None:
            stored = self._unroll(predictor)
            prediction = (stored @ basis).to(torch.float32).unsqueeze(0)
            unrolled = torch.cat((stored, up))
        self._decoded.append(decoded)
        self._unrolled.append(unrolled)
        kv_heads = importances[0].shape[0]
        ups = [
            _unweighted(part, t).to(torch.float32)
            for part, t in zip(unrolled.unflatten(1, (2, kv_heads, -1)).unbind(1), importances, strict=True)
        ]
        return PredictedLink(down.contiguous(), ups[0].contiguous(), ups[1].contiguous(), prediction)

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

    def _basis(
        self,
        hidden: torch.Tensor,
        columns: torch.Tensor,
        exact: torch.Tensor,
        residual: torch.Tensor,
        form: LinkFormat,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The down-projection from x, rounded, and the same from ``y`` ``[w, w]``, keys and values apart."""
        tokens, width = exact.shape
        half = width // 2
        mean_square = hidden.square().mean()
        basis = exact.new_zeros(width, width)
        for block, outliers in ((slice(0, half), form.outlier_channels), (slice(half, width), 0)):
            part, weights = residual[:, block], columns[:, block]
            # The ridge on the input's second moment, as far as the residual still is of the input's size.
            share = part.square().sum() / exact[:, block].square().sum().clamp_min(torch.finfo(part.dtype).tiny)
            moment = part.T @ part / tokens + INPUT_RIDGE * mean_square * share * (weights.T @ weights)
            values, vectors = torch.linalg.eigh(moment)
            values = values.flip(0).clamp_min(1e-9 * values.max().clamp_min(torch.finfo(values.dtype).tiny))
            scale = values**-0.25
            scale = scale / (scale * values.sqrt()).mean()
            channels = vectors.flip(1) * scale
            if self._rotate and half - outliers > 1:
                rotation = random_rotation(half - outliers, _SEED).to(channels.device)
                channels[:, outliers:] = channels[:, outliers:] @ rotation
            basis[block, block] = channels
        return (columns @ basis).to(self._dtype), basis


def _weighted(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """``W T`` ``[hidden_size, num_kv_heads * head_size]``, FP64."""
    heads = weight.to(torch.float64).unflatten(0, importance.shape[:2])
    return torch.einsum("hsd,hst->dht", heads, importance).flatten(1)


def _unweighted(part: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """``[n, num_kv_heads, head_size]`` times ``T^-1``, ``[num_kv_heads, n, head_size]``."""
    return torch.linalg.solve(importance, part.transpose(0, 1), left=False)


def _round_trip(latents: torch.Tensor, form: LinkFormat) -> torch.Tensor:
    """What is read back of latents ``[num_tokens, w]``, FP64."""
    if form.bits == 16:
        return to_fp16(latents.float()).to(torch.float64)
    return dequantize(*quantize(latents.float(), form.bits, form.group_size, form.outlier_channels)).to(torch.float64)


def link_shapes(
    hidden_size: int, num_kv_heads: int, head_size: int, layers_of_group: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of a link's tensors by name; ``layers_of_group`` counts this layer and those before it."""
    width = 2 * num_kv_heads * head_size
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
