"""A layer's key and value weights on one rank, and how bases are made of them."""

from dataclasses import dataclass, field

import torch

from xquant_vllm.projection.layer import BasisSpec
from xquant_vllm.scheme.settings import XQuantSettings


@dataclass(frozen=True)
class LayerWeights:
    """A layer's projections on this rank. Equal if they are of the same layer.

    Attributes:
        layer_index: the layer, counted from the model's first.
        key: ``[num_kv_heads * head_size, hidden_size]`` in the serving dtype; not written before its bases are there.
        value: likewise.
        num_kv_heads: kv heads on this rank.
        together: whether one basis for keys and values is wanted.
    """

    layer_index: int
    key: torch.Tensor = field(compare=False)
    value: torch.Tensor = field(compare=False)
    num_kv_heads: int = field(compare=False)
    together: bool = False

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.key.shape[0] // self.num_kv_heads


@dataclass(frozen=True)
class HeadShard:
    """Which of the model's kv heads this rank holds: ``first`` and those after it; replicated heads have several."""

    first: int
    total: int

    @staticmethod
    def of_rank(rank: int, ranks: int, total: int) -> "HeadShard":
        """The shard of a tensor parallel rank, as vLLM cuts a fused ``qkv_proj``."""
        return HeadShard(rank * (total // ranks) if total >= ranks else rank // (ranks // total), total)


def spec_of(settings: XQuantSettings, dtype: torch.dtype) -> BasisSpec:
    """What settings make of weights served in ``dtype``."""
    outliers = settings.outlier_channels
    return BasisSpec(settings.basis, outliers.key, outliers.value, settings.rotate, dtype)
