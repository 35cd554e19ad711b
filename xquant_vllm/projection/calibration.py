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

# Ridge on E[x x^T], relative to its mean diagonal: directions that the text never used keep some variance. On texts of
# other kinds 0.1 loses a tenth more, per head and joint, at 2 and at 4 bits.
INPUT_RIDGE = 0.3
# Ridge on F, relative to its mean diagonal over keys, or over values, for the same reason.
GRADIENT_RIDGE = 0.05
# An error in a key costs more than the mean gradient says: large keys have large errors, and large gradients, too.
# Without these two, 2 bits lose a fifth more; with twice as much of both, 4 bits do.
KEY_GRADIENT_RIDGE = 0.17
KEY_WORTH = 1.35
# A token's squared gradient counts as at most so many times the mean one. 1 is as good; 10 loses a twentieth more.
LARGEST_GRADIENT = 2.0


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


def weigh(
    columns: torch.Tensor, key_gradient: torch.Tensor | None, value_gradient: torch.Tensor | None
) -> WeightedProjection:
    """Weight a projection by the Fisher information of its outputs.

    Args:
        columns: ``[hidden_size, n]``, FP64, the projection: keys and behind them values, or either alone.
        key_gradient: of keys, ``[num_tokens, number of keys]``.
        value_gradient: of values, likewise.
    """
    parts, ridges = [], []
    for gradient, ridge, worth in (
        (key_gradient, KEY_GRADIENT_RIDGE, KEY_WORTH),
        (value_gradient, GRADIENT_RIDGE, 1.0),
    ):
        if gradient is not None:
            parts.append(worth**0.5 * _limited(gradient.to(columns)))
            mean_square = parts[-1].square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            ridges.append((ridge * mean_square).expand(gradient.shape[1]))
    joined = torch.cat(parts, 1)
    fisher = joined.T @ joined / joined.shape[0] + torch.diag(torch.cat(ridges))
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


def _limited(gradient: torch.Tensor) -> torch.Tensor:
    """Gradients ``[num_tokens, n]``, those of single tokens cut to what :data:`LARGEST_GRADIENT` says.

    Attention sinks (the first token, some newlines) have gradients so large that the Fisher information of a text would
    be theirs, and what is fitted to it would fit all other tokens badly. What rounding does to sinks is made good
    elsewhere: see :mod:`.refit`.
    """
    squares = gradient.square().sum(1, keepdim=True)
    largest = (LARGEST_GRADIENT * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return gradient * (largest / squares.clamp_min(largest)).sqrt()
