"""What a little text tells about a layer: which inputs there are, and what an error in its keys and values does.

An error e in a token's keys and values moves the model's predictions by ``e^T F e / 2`` nats (Kullback-Leibler
divergence), to second order, where ``F = E[g g^T]`` and g is the gradient of the log-probability of tokens drawn from
the model's own predictions: the Fisher information. It knows of everything that follows a key: its norm, RoPE, which
queries meet it, how sharp the softmax is, what the output projection and all later layers make of it. And it has one
unit for keys, values, heads and layers, so that bits can be shared out among them (the same weights, diagonal, are used
for keys by KVQuant, arXiv 2401.18079).

Weighted by a root T of F, ``y = x W T``, an error of any direction counts alike. The principal channels of y over the
text are then those that matter, in order.
"""

from dataclasses import dataclass

import torch

# Ridge on E[x x^T], relative to its mean diagonal: directions that the text never used keep some variance. Of 1e-3 to
# 3e-1 the best on SmolLM2 at 2 bits, per head and joint; at 3 and 4 bits all are alike.
INPUT_RIDGE = 0.1
# Ridge on F, relative to its mean diagonal over keys, or over values, for the same reason. 0.01 to 0.3 are alike.
GRADIENT_RIDGE = 0.05


@dataclass(frozen=True)
class LayerSample:
    """What a text has shown of one layer.

    Attributes:
        hidden: ``[num_tokens, hidden_size]``, inputs of the key and value projections, any float dtype.
        key_gradient: ``[num_tokens, num_kv_heads * head_size]``, of the log-probability of drawn tokens with respect to
            what the key projection yields (before bias, norm and RoPE).
        value_gradient: likewise of values.
        key_factor: ``[num_tokens]``, what a norm over all key heads together multiplies a token's keys by, before its
            weights. Latents of keys are cached after it, and ``key_gradient`` is of what it yields. None without one.
    """

    hidden: torch.Tensor
    key_gradient: torch.Tensor
    value_gradient: torch.Tensor
    key_factor: torch.Tensor | None = None


@dataclass(frozen=True)
class WeightedProjection:
    """A projection W ``[hidden_size, n]`` whose outputs are turned so that an error of any direction counts alike.

    Attributes:
        into: ``[hidden_size, m]``, FP64, to ``y = x @ into``; m is the smaller of hidden_size and n.
        back: ``[m, n]``, FP64: ``x @ into @ back`` is ``x @ W``.
    """

    into: torch.Tensor
    back: torch.Tensor


def weigh(columns: torch.Tensor, gradients: list[torch.Tensor]) -> WeightedProjection:
    """Weight a projection by the Fisher information of its outputs.

    Args:
        columns: ``[hidden_size, n]``, FP64, the projection.
        gradients: of its outputs, ``[num_tokens, n_i]`` each, side by side of width n; one for keys, one for values, or
            one alone. Each has a ridge of its own.
    """
    joined = torch.cat([gradient.to(columns) for gradient in gradients], 1)
    fisher = joined.T @ joined / joined.shape[0]
    ridges = [part.diagonal().mean().expand(part.shape[0]) for part in _blocks(fisher, gradients)]
    ridge = torch.cat(ridges).clamp_min(torch.finfo(torch.float32).tiny)
    fisher += GRADIENT_RIDGE * torch.diag(ridge)
    if columns.shape[1] <= columns.shape[0]:
        root = torch.linalg.cholesky(fisher)
        identity = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
        return WeightedProjection(columns @ root, torch.linalg.solve_triangular(root, identity, upper=False))
    # Fewer inputs than outputs: what an error in x costs says the same in fewer channels.
    cost = columns @ fisher @ columns.T
    cost += 1e-9 * cost.diagonal().mean() * torch.eye(cost.shape[0], dtype=cost.dtype, device=cost.device)
    root = torch.linalg.cholesky(cost)
    return WeightedProjection(root, torch.linalg.solve_triangular(root, columns, upper=False))


def second_moment(weighted: torch.Tensor, into: torch.Tensor, mean_square: float) -> torch.Tensor:
    """``E[y y^T]`` with the ridge on the input's second moment in it.

    Args:
        weighted: ``[num_tokens, m]``, FP64, y, or what a prediction has left of it.
        into: ``[hidden_size, m]``, FP64.
        mean_square: of the input's channels (as far as it is left).

    Returns:
        ``[m, m]``, FP64.
    """
    return weighted.T @ weighted / weighted.shape[0] + INPUT_RIDGE * mean_square * (into.T @ into)


def _blocks(matrix: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The diagonal blocks as wide as the parts."""
    blocks, start = [], 0
    for part in parts:
        end = start + part.shape[1]
        blocks.append(matrix[start:end, start:end])
        start = end
    return blocks
