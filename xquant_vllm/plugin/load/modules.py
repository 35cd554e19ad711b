"""Modules put into the model in place of its own."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding, Phi3LongRoPEScaledRotaryEmbedding


class QueryOnlyRotary(nn.Module):
    """RoPE for queries alone; the key passes through, it is a latent and rotates after rematerialization.

    Wraps the model's module instead of changing it: vLLM shares one instance between layers.
    """

    def __init__(self, rotary_emb: nn.Module) -> None:
        """Wrap a rotary embedding."""
        super().__init__()
        self.rotary_emb = rotary_emb
        # These insist on a key. A head of zeros is given as one, and the result dropped: not a part of the queries,
        # which some of them turn in place.
        self._needs_key = isinstance(rotary_emb, (Phi3LongRoPEScaledRotaryEmbedding, MRotaryEmbedding))

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate ``query`` ``[num_tokens, num_heads * head_size]``; return ``key`` as it is.

        Args:
            positions: ``[num_tokens]``, or ``[axes, num_tokens]`` with multimodal RoPE.
            query: queries.
            key: latents, or the layer input.
        """
        stand_in = torch.zeros_like(query[..., : self.rotary_emb.head_size]) if self._needs_key else None
        query, _ = self.rotary_emb(positions, query, stand_in)
        return query, key


class DenseLinear(nn.Module):
    """A plain linear layer that is called and answers like one of vLLM's.

    Replaces a quantized linear layer, whose packed rows cannot be exchanged for down-projections, and stands in for one
    that cannot run yet.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        return_bias: whether the answer is a pair of the output and a bias to be added later (None without one).
        skip_bias_add: whether the bias is left to the caller.
    """

    tp_rank, tp_size = 0, 1

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, like: Any = None) -> None:
        """Keep ``weight`` ``[out, in]`` and ``bias`` ``[out]``; answer as the linear layer ``like`` does."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.return_bias = True if like is None else like.return_bias
        self.skip_bias_add = False if like is None else like.skip_bias_add

    @property
    def input_size(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1]

    @property
    def output_size(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of inputs and weights."""
        return self.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, nn.Parameter | None]:
        """Project ``x`` ``[..., in]``."""
        output = nn.functional.linear(x, self.weight, None if self.skip_bias_add else self.bias)
        if not self.return_bias:
            return output
        return output, self.bias if self.skip_bias_add else None


def whole_output(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer of vLLM's makes of ``x`` ``[..., in]``, its bias added, whichever way it hands it out."""
    answer = linear(x)
    if isinstance(answer, torch.Tensor):
        return answer
    output, bias = answer
    return output if bias is None else output + bias


class _Passing(nn.Module):
    """In place of a linear layer whose input passes through; answers as that does, with a bias of zeros if any."""

    def __init__(self, like: Any, rows: int) -> None:
        super().__init__()
        self.return_bias = like.return_bias
        self.later: torch.Tensor | None
        zeros = torch.zeros(rows, dtype=like.weight.dtype, device=like.weight.device)
        self.register_buffer("later", zeros if like.skip_bias_add and like.bias is not None else None, persistent=False)

    def answer(self, output: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        return (output, self.later) if self.return_bias else output


class QueryAndInput(_Passing):
    """In place of a fused projection where pages hold the layer input: projects queries, passes the input on.

    The input is padded to whole heads, because the model's code and vLLM's ``Attention`` see heads in it.
    """

    def __init__(self, query_proj: Any, padding: int) -> None:
        """Wrap the projection of the queries; ``padding`` channels complete the last head."""
        rows, channels = query_proj.weight.shape
        super().__init__(query_proj, rows + 2 * (channels + padding))
        self.query_proj = query_proj
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Queries and twice the input ``x`` ``[..., hidden_size]``, side by side."""
        query = whole_output(self.query_proj, x)
        padded = nn.functional.pad(x, (0, self.padding)) if self.padding else x
        return self.answer(torch.cat((query, padded, padded), -1))


class InputInRows(_Passing):
    """In place of a projection of any layout where pages hold the layer input: it takes the places of keys and values.

    All other rows are projected. Every output channel is one of these, or of the input, or zero.
    """

    def __init__(self, other_rows: Any, order: torch.Tensor, like: Any) -> None:
        """Put channels in order.

        Args:
            other_rows: the projection of the rows that are neither keys nor values, or None without any.
            order: ``[rows]``, int64: which channel of the other rows' output, then of the input, then of a zero.
            like: the linear layer whose place it takes.
        """
        super().__init__(like, order.numel())
        self.other_rows = other_rows
        self.order: torch.Tensor
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Arrange what is made of ``x`` ``[..., hidden_size]`` to ``[..., rows]``."""
        others = [] if self.other_rows is None else [whole_output(self.other_rows, x)]
        zero = torch.zeros_like(x[..., :1])
        return self.answer(torch.cat((*others, x, zero), -1).index_select(-1, self.order))
