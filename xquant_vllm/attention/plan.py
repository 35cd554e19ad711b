"""What an attention call needs to know of its layer."""

from dataclasses import dataclass
from typing import Protocol

import torch

from xquant_vllm.attention.batch import WholeSequences
from xquant_vllm.attention.latents import LatentTerm, Prediction, check_terms
from xquant_vllm.codec.layout import PageLayout
from xquant_vllm.codec.rotation import HadamardRotation
from xquant_vllm.projection.rematerialize import LayerProjection


class WholeAttention(Protocol):
    """Causal attention of sequences whose keys and values are there as such."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        sequences: WholeSequences,
        plan: "AttentionLayerPlan",
    ) -> None:
        """Attend; a sequence's last query token is its last key.

        Args:
            query: ``[tokens, num_heads, head_size]``, after RoPE.
            keys: ``[keys, num_kv_heads, head_size]``, in the queries' dtype.
            values: likewise.
            output: like the query; written.
            sequences: the sequences.
            plan: the layer's plan: scale, window, soft cap, sinks.
        """


@dataclass(frozen=True)
class AttentionLayerPlan:
    """Everything about one layer that does not change from call to call.

    Attributes:
        layouts: layouts of the pages handed to a call: the layer's own first, then those of the earlier layers that it
            reads too (XQuant-CL). All have one block size and go by one block table.
        projection: from latents to keys and values.
        num_heads: query heads; a multiple of the kv heads, which they share in consecutive groups.
        scale: factor on the scores.
        sliding_window: keys a query sees, itself included, or None for all.
        logits_soft_cap: scores become ``cap * tanh(score / cap)``, or None.
        key_terms: what the key latents are read from.
        value_terms: what the value latents are read from; the same as ``key_terms`` where pages hold X.
        rotation: applied to the first stream's input before anything else, or None.
        prediction: of the first stream, whose pages then hold the difference from it, or None.
        sinks: ``[num_heads]``, FP32: of every query head the score of a key that has no value, so that weights need not
            add up to 1; or None.
        kernel_device: where the kernels run, if the projection's matrices were left on the host: kernels that have
            matrices of their own read them once.
        exact_from: a sequence with at least so many query tokens attends to these as they were computed, not as they
            are cached: a prompt. None: all tokens are read from pages, so that an output does not depend on how its
            prompt was cut into steps.
        attend_whole: what attends to rematerialized keys and values in 16 bits, handed in by who has something better
            than PyTorch has; it takes whatever else the plan says. None: nothing.
    """

    layouts: tuple[PageLayout, ...]
    projection: LayerProjection
    num_heads: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    key_terms: tuple[LatentTerm, ...] = (LatentTerm(0, 0),)
    value_terms: tuple[LatentTerm, ...] = (LatentTerm(0, 1),)
    rotation: HadamardRotation | None = None
    prediction: Prediction | None = None
    sinks: torch.Tensor | None = None
    kernel_device: torch.device | None = None
    exact_from: int | None = None
    attend_whole: WholeAttention | None = None

    def __post_init__(self) -> None:
        """Refuse terms that do not fit together."""
        if len({layout.block_size for layout in self.layouts}) != 1:
            raise ValueError("the pages of a layer and of those it reads too must have one block size")
        projection = self.projection
        for what, terms, width in (
            ("key", self.key_terms, projection.up_key.shape[1]),
            ("value", self.value_terms, projection.value_width),
        ):
            check_terms(what, self.layouts, terms, width, projection.num_kv_heads)
        if self.prediction is not None:
            own = self.layout.streams[0]
            matrix = self.prediction.matrix
            width = own.width if matrix is None else matrix.shape[1]
            check_terms("prediction", self.layouts, self.prediction.terms, width, own.num_heads)
            if matrix is not None and matrix.shape != (own.num_heads, width, own.width):
                raise ValueError(
                    f"the prediction's matrix must be [{own.num_heads}, {width}, {own.width}], not {list(matrix.shape)}"
                )

    @property
    def key_bias_matters(self) -> bool:
        """Whether a bias of keys without norm and RoPE can be seen in the output.

        It moves all scores of a query alike, which softmax does not see, but a soft cap and a sink do.
        """
        return self.projection.key_bias is not None and (bool(self.logits_soft_cap) or self.sinks is not None)

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        return self.kernel_device or self.projection.up_key.device

    @property
    def layout(self) -> PageLayout:
        """Layout of the layer's own pages."""
        return self.layouts[0]
