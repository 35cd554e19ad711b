"""A layer's key and value weights on one rank, and how bases are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from xquant_vllm.errors import RefusedError, counted
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


def refuse_non_finite(layer: int, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse weights that are no numbers: nothing can be factorized, and the model itself would answer nonsense.

    Args:
        layer: the layer, counted from the model's first.
        tensors: what makes its keys and values, by the names to be told, in the serving dtype; None is passed over.

    Raises:
        RefusedError: a tensor has NaN or infinity in it; the message names it, and what to do.
    """
    for name, tensor in tensors.items():
        if tensor is None or bool(torch.isfinite(tensor).all()):
            continue
        bad = ~torch.isfinite(tensor)
        first = ", ".join(map(str, bad.nonzero()[0].tolist()))
        dtype = str(tensor.dtype).removeprefix("torch.")
        remedy = (
            "serve it with --dtype bfloat16, since numbers beyond 65504 are infinite in float16; if that says the "
            "same, fetch the checkpoint anew"
            if tensor.dtype == torch.float16
            else "fetch the checkpoint anew: it is damaged, or was saved from a training that had diverged"
        )
        raise RefusedError(
            f"xquant: layer {layer} cannot be factorized: {name} has {counted(int(bad.sum()), 'element')} that "
            f"{'is' if bad.sum() == 1 else 'are'} NaN or infinite in {dtype}, the first at [{first}]; {remedy}"
        )


def spec_of(settings: XQuantSettings, dtype: torch.dtype) -> BasisSpec:
    """What settings make of weights served in ``dtype``."""
    outliers = settings.outlier_channels
    return BasisSpec(settings.basis, outliers.key, outliers.value, settings.rotate, dtype)
