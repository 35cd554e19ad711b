"""What a little text tells about a layer: which latent channels matter for attention's output.

The data-free basis makes every direction of the layer input and every channel of a key equally important. With the
second moment ``C = E[x x^T]`` of the input and a weight ``T`` of the channels of a head, the basis is the SVD of
``C^{1/2} W T = U S B^T`` instead, with the down-projection ``C^{-1/2} U``: latents are white before they are scaled,
and an error in a latent counts by what it does to scores and outputs (beyond XQuant, section 3.2, which is data-free).

Neither C nor its root is ever formed: ``C^{-1/2} U = W T B S^{-1}``, and B and S come from the small matrix
``T^T (W^T C W) T``. So all that is kept of the text is ``W^T C W``, the second moment of keys or values before bias.
"""

from dataclasses import dataclass

import torch

# Ridge on C, relative to its mean diagonal: directions that the calibration text never used keep some weight. Of 1e-3
# to 3e-1 the best at 2 bits on SmolLM2, per head and joint; at 3 and 4 bits all are alike.
INPUT_RIDGE = 0.1
# Smallest weight of a channel, relative to the root mean square of its head's, for the same reason.
_IMPORTANCE_FLOOR = 1e-2


@dataclass(frozen=True)
class ProjectionStatistics:
    """Statistics of one projection, all heads side by side.

    Attributes:
        moment: ``[num_heads * head_size, num_heads * head_size]``, FP64, ``W^T C W`` with the ridge of C in it.
        importance: ``[num_heads, head_size, head_size]``, FP64, the invertible weights T of every head's channels.
    """

    moment: torch.Tensor
    importance: torch.Tensor


class MomentAccumulator:
    """Sums ``W^T C W`` over batches of layer inputs, in FP64."""

    def __init__(self, weight: torch.Tensor, ridge: float = INPUT_RIDGE) -> None:
        """Start for a projection.

        Args:
            weight: ``[out_features, hidden_size]``, any dtype.
            ridge: added to C's diagonal, relative to its mean.
        """
        self._columns = weight.to(torch.float64).T
        self._ridge = ridge
        self._sum = torch.zeros(weight.shape[0], weight.shape[0], dtype=torch.float64, device=weight.device)
        self._square, self._tokens = 0.0, 0

    def add(self, hidden: torch.Tensor) -> None:
        """Take layer inputs ``[num_tokens, hidden_size]``, any dtype."""
        hidden = hidden.to(self._columns)
        projected = hidden @ self._columns
        self._sum += projected.T @ projected
        self._square += hidden.square().sum().item()
        self._tokens += hidden.shape[0]

    def moment(self) -> torch.Tensor:
        """``[out_features, out_features]``, FP64."""
        mean_diagonal = self._square / (self._tokens * self._columns.shape[0])
        return self._sum / self._tokens + self._ridge * mean_diagonal * (self._columns.T @ self._columns)


def rope_partners(head_size: int, rotary_size: int, interleaved: bool) -> torch.Tensor:
    """The channel that every channel of a head rotates with.

    Args:
        head_size: channels of a head.
        rotary_size: leading channels that rotate; the others are their own partner.
        interleaved: pairs ``(2i, 2i + 1)`` instead of ``(i, i + rotary_size / 2)``.

    Returns:
        ``[head_size]``, int64, its own inverse.
    """
    partners = torch.arange(head_size)
    half = rotary_size // 2
    if interleaved:
        partners[:rotary_size] = partners[:rotary_size] ^ 1
    else:
        partners[:rotary_size] = torch.cat((partners[half:rotary_size], partners[:half]))
    return partners


def key_importance(
    query_mean_square: torch.Tensor, partners: torch.Tensor, norm_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights of key channels: how large the queries are that meet them.

    RoPE turns a pair by an angle that differs from token to token, so both channels of a pair count by the mean of the
    two. A norm between projection and RoPE (Qwen3) multiplies an error in channel c by its weight first.

    Args:
        query_mean_square: ``[num_kv_heads, head_size]``, mean over tokens and over the queries that read a kv head.
        partners: ``[head_size]``, see :func:`rope_partners`.
        norm_weight: ``[head_size]``, or None.

    Returns:
        ``[num_kv_heads, head_size, head_size]``, FP64, diagonal.
    """
    square = query_mean_square.to(torch.float64)
    square = (square + square[:, partners]) / 2
    if norm_weight is not None:
        square = square * norm_weight.to(square).square()
    square = square.clamp_min(torch.finfo(torch.float32).tiny)
    floor = _IMPORTANCE_FLOOR**2 * square.mean(-1, keepdim=True)
    return torch.diag_embed(torch.maximum(square, floor).sqrt())


def value_importance(output_weight: torch.Tensor, num_kv_heads: int, head_size: int) -> torch.Tensor:
    """Weights of value channels: what the output projections of the heads that read them make of an error.

    Args:
        output_weight: ``[hidden_size, num_heads * head_size]``, as a linear layer stores it.
        num_kv_heads: kv heads.
        head_size: channels of a head.

    Returns:
        ``[num_kv_heads, head_size, head_size]``, FP64: ``(sum over the group of Wo_h^T Wo_h)^{1/2}``, symmetric.
    """
    grams = []
    for head in output_weight.split(head_size, 1):
        head = head.to(torch.float64)
        grams.append(head.T @ head)
    gram = torch.stack(grams).reshape(num_kv_heads, -1, head_size, head_size).sum(1)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(torch.finfo(torch.float32).tiny)
    floor = _IMPORTANCE_FLOOR**2 * values.mean(-1, keepdim=True)
    return vectors * torch.maximum(values, floor).sqrt().unsqueeze(-2) @ vectors.mT
