"""How one layer's cache is written and read: what surgery leaves behind and the implementation works with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from xquant_vllm.attention.latents import LatentTerm, Prediction
from xquant_vllm.attention.plan import AttentionLayerPlan, WholeAttention
from xquant_vllm.codec.layout import PageLayout
from xquant_vllm.codec.rotation import HadamardRotation
from xquant_vllm.projection.key_scale import KeyScale
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.scheme.formats import LayerFormat


@dataclass(frozen=True)
class LayerScheme:
    """One layer's cache, except for the block size, which vLLM decides on later.

    Attributes:
        format: what its pages hold.
        projection: from latents to keys and values.
        rotation: of the layer input before it is stored, or None.
        prediction_matrix: ``[1, width of the earlier layers' streams, width of the own]``, FP32, for a chain of
            latents; None for a chain of X, whose earlier layers add up to the prediction.
        kernel_device: where the kernels run, if the up-projections were left on the host.
        key_scale: divides key latents before they are cached; None where no norm is over all key heads together.
        query_weight: ``[num_kv_heads, head_size]``, FP32, that query heads are multiplied by, or None.
        folded_value: the up-projection of values that went into the output projection, as
            ``LayerProjection.up_value``, for those who look at values; None: there is none, or nobody looks.
        in_values: whether all that is cached comes as values, because the model changes what it takes for keys.
    """

    format: LayerFormat
    projection: LayerProjection
    rotation: HadamardRotation | None = None
    prediction_matrix: torch.Tensor | None = None
    kernel_device: torch.device | None = None
    key_scale: KeyScale | None = None
    query_weight: torch.Tensor | None = None
    in_values: bool = False
    folded_value: torch.Tensor | None = None

    def on_host(self) -> "LayerScheme":
        """The same with its up-projections on the host, for kernels that arrange them once and keep the result.

        They are in FP32 and, where pages hold X, as many as the rows of ``qkv_proj`` that they replace: memory that
        the cache can use.
        """
        projection = self.projection
        up_value = None if projection.up_value is None else projection.up_value.cpu()
        moved = replace(projection, up_key=projection.up_key.cpu(), up_value=up_value)
        return replace(self, projection=moved, kernel_device=projection.up_key.device)

    @property
    def earlier_terms(self) -> tuple[LatentTerm, ...]:
        """What is read from the pages of earlier layers."""
        adds = self.format.holds == "x"
        return tuple(LatentTerm(page + 1, 0, adds=adds and page > 0) for page in range(len(self.format.reads)))

    @property
    def key_terms(self) -> tuple[LatentTerm, ...]:
        """What key latents are read from."""
        earlier = self.earlier_terms
        return (*earlier, LatentTerm(0, 0, adds=bool(earlier) and self.format.holds == "x"))

    @property
    def value_terms(self) -> tuple[LatentTerm, ...]:
        """What value latents are read from."""
        return (LatentTerm(0, 1),) if self.format.holds == "latents" else self.key_terms

    @property
    def prediction(self) -> Prediction | None:
        """What the own stream is expected to be, or None."""
        return Prediction(self.earlier_terms, self.prediction_matrix) if self.format.reads else None

    def inputs(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What vLLM passes as key and value ``[num_tokens, heads, head_size]``, one tensor for every stream."""
        if self.in_values:
            # X, or the latents of keys and of values side by side.
            key, value = (value, value) if self.format.holds == "x" else value.chunk(2, 1)
        if self.format.holds == "latents":
            return (key if self.key_scale is None else self.key_scale.apply(key)), value
        if self.format.holds == "x":
            # Padded to whole heads on its way through the model's code, or begun in the key and continued in the value.
            x, width = key.flatten(1), self.format.shape.hidden_size
            return ((x if x.shape[1] >= width else torch.cat((x, value.flatten(1)), 1))[:, :width],)
        # As wide as keys and values together; a latent of no more channels than the layer input has may be narrower.
        return (torch.cat((key.flatten(1), value.flatten(1)), 1)[:, : self.format.streams[0].width],)

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """What attends for queries ``[num_tokens, num_heads, head_size]``, in their dtype."""
        if self.query_weight is None:
            return query
        kv_heads = self.query_weight.shape[0]
        weighted = query.unflatten(1, (kv_heads, -1)).float() * self.query_weight.unsqueeze(1)
        return weighted.flatten(1, 2).to(query.dtype)

    def plan(
        self,
        block_size: int,
        earlier: Sequence[LayerFormat],
        *,
        num_heads: int,
        scale: float,
        sliding_window: int | None,
        logits_soft_cap: float | None,
        sinks: torch.Tensor | None = None,
        exact_from: int | None = None,
        attend_whole: WholeAttention | None = None,
    ) -> AttentionLayerPlan:
        """The plan for pages of a block size.

        Args:
            block_size: slots per page.
            earlier: formats of the layers that are read too.
            num_heads: query heads.
            scale: factor on the scores.
            sliding_window: keys a query sees, or None.
            logits_soft_cap: cap of the scores, or None.
            sinks: ``[num_heads]``, FP32, on the kernels' device: a score of every query head without a value, or None.
            exact_from: query tokens from which on a sequence attends to them exactly, or None.
            attend_whole: see ``AttentionLayerPlan.attend_whole``.
        """
        return AttentionLayerPlan(
            layouts=tuple(PageLayout(form.streams, block_size) for form in (self.format, *earlier)),
            projection=self.projection,
            num_heads=num_heads,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            key_terms=self.key_terms,
            value_terms=self.value_terms,
            rotation=self.rotation,
            prediction=self.prediction,
            sinks=sinks,
            kernel_device=self.kernel_device,
            exact_from=exact_from,
            attend_whole=attend_whole,
        )
