"""Modules put into the model in place of its own."""

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding


class QueryOnlyRotary(nn.Module):
    """RoPE for queries alone; the key passes through, it is a latent and rotates after rematerialization.

    Wraps the model's module instead of changing it: vLLM shares one instance between layers.
    """

    def __init__(self, rotary_emb: nn.Module) -> None:
        """Wrap a rotary embedding."""
        super().__init__()
        self.rotary_emb = rotary_emb
        # This one insists on a key. Its first query head is given as one and the result dropped.
        self._needs_key = isinstance(rotary_emb, Phi3LongRoPEScaledRotaryEmbedding)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate ``query`` ``[num_tokens, num_heads * head_size]``; return ``key`` as it is."""
        stand_in = query[..., : self.rotary_emb.head_size] if self._needs_key else None
        query, _ = self.rotary_emb(positions, query, stand_in)
        return query, key


class DenseLinear(nn.Module):
    """A plain linear layer with the calling convention of vLLM's, which also return a bias to add later (here None).

    Replaces a quantized ``qkv_proj``, whose packed rows cannot be exchanged for down-projections.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Keep ``weight`` ``[out, in]`` and ``bias`` ``[out]``."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Project ``x`` ``[..., in]``."""
        return nn.functional.linear(x, self.weight, self.bias), None


class QueryAndInput(nn.Module):
    """In place of ``qkv_proj`` where pages hold the layer input: projects queries, passes the input on for the cache.

    The input is padded to whole heads, because the model's code and vLLM's ``Attention`` see heads in it.
    """

    def __init__(self, query_proj: nn.Module, padding: int) -> None:
        """Wrap the projection of the queries; ``padding`` channels complete the last head."""
        super().__init__()
        self.query_proj = query_proj
        self.padding = padding

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Queries and twice the input ``x`` ``[num_tokens, hidden_size]``, side by side."""
        query, _ = self.query_proj(x)
        padded = nn.functional.pad(x, (0, self.padding)) if self.padding else x
        return torch.cat((query, padded, padded), -1), None
