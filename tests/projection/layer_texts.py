"""Synthetic layers and what a text shows of them: skewed inputs, and gradients that care about few directions."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.calibration import GRADIENT_RIDGE, LARGEST_GRADIENT, LayerSample


@dataclass(frozen=True)
class LayerText:
    """One layer.

    Attributes:
        key: ``[kv_heads * head_size, hidden_size]``.
        value: likewise.
        seen: what is fitted to.
        unseen: more of the same text.
    """

    key: torch.Tensor
    value: torch.Tensor
    seen: LayerSample
    unseen: LayerSample


def layer_texts(
    layers: int,
    hidden_size: int,
    rows: int,
    *,
    tokens: int = 400,
    change: float = 0.3,
    key_gradient: float = 1.0,
    value_gradient: float = 1.0,
    seed: int = 0,
) -> list[LayerText]:
    """Layers whose inputs change from one to the next by ``change`` of their size; ``rows`` are those of a weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def inputs() -> torch.Tensor:
        return normal(2 * tokens, hidden_size) * torch.logspace(0.5, -0.5, hidden_size) @ mixing

    mixing = torch.linalg.qr(normal(hidden_size, hidden_size))[0]
    hidden, texts = inputs(), []
    for _ in range(layers):
        gradients = [
            scale * normal(2 * tokens, rows) * torch.logspace(0.5, -0.5, rows) @ torch.linalg.qr(normal(rows, rows))[0]
            for scale in (key_gradient, value_gradient)
        ]
        halves = [
            LayerSample(hidden[half], gradients[0][half], gradients[1][half])
            for half in (slice(tokens), slice(tokens, None))
        ]
        weights = (normal(rows, hidden_size) / hidden_size**0.5 for _ in range(2))
        texts.append(LayerText(*weights, *halves))
        hidden = (1 - change**2) ** 0.5 * hidden + change * inputs()
    return texts


def fisher(gradient: torch.Tensor) -> torch.Tensor:
    """``E[g g^T]`` of ``[num_tokens, n]``, with its ridge."""
    gradient = gradient.double()
    moment = gradient.T @ gradient / len(gradient)
    return moment + GRADIENT_RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def limited(gradient: torch.Tensor) -> torch.Tensor:
    """Gradients ``[num_tokens, n]`` in FP64, of which no token has more than its share."""
    gradient = gradient.double()
    squares = gradient.square().sum(1)
    shares = [(LARGEST_GRADIENT * squares.mean() / square).clamp_max(1).sqrt() for square in squares]
    return torch.stack([share * of_token for share, of_token in zip(shares, gradient, strict=True)])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference."""
    return ((actual - expected).norm() / expected.norm()).item()
