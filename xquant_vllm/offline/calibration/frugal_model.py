"""A transformers model that needs little more memory than its checkpoint while gradients go through it.

Weights stay in the dtype that they are stored in, and are converted to the dtype of the computation a few rows at a
time. What a layer computes on the way forwards is forgotten, and computed again on the way back. Logits, which are as
wide as the vocabulary, are there for a few tokens at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as forgetting

from xquant_vllm.offline.split_run import SplitRun

# Numbers of a weight that are converted at once.
_CONVERTED = 1 << 24
# Tokens whose logits are there at once.
_LOGIT_TOKENS = 128


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let a model compute in a dtype, with the large weights in the one that they have.

    Args:
        model: of transformers, in any dtype, with frozen weights; it computes as if ``model.to(dtype)``.
        dtype: of activations.
    """
    large, tokens = [], model.get_input_embeddings()
    for module in model.modules():
        if module is tokens and isinstance(module, nn.Embedding):
            _convert_embeddings(module, dtype)
        elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        else:
            continue
        large.append(module.weight)
    kept = {id(weight) for weight in large}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def forget_activations(layers: list[nn.Module]) -> None:
    """Have layers compute again, on the way back, what they would have kept."""
    for layer in layers:
        layer.forward = partial(  # type: ignore[method-assign]
            forgetting, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def loss_gradient(
    model: Any, sequence: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model on a sequence, and its head on a few tokens after another.

    Args:
        model: a causal language model of transformers.
        sequence: token ids ``[length]``.
        loss: from logits ``[tokens, vocabulary]``, FP32, of a few tokens to a scalar; those of all tokens are summed.

    Returns:
        What to differentiate, and its gradient: the last hidden state ``[1, length, hidden_size]``, or a scalar where
        the model is not made of a body and a head.
    """
    run = SplitRun(model, sequence)
    if run.hidden is None:
        assert run.whole is not None
        whole = loss(run.whole.float())
        return whole, torch.ones_like(whole)
    gradients = []
    for piece in run.hidden.detach().split(_LOGIT_TOKENS, 1):
        piece.requires_grad_(True)
        gradients.append(torch.autograd.grad(loss(run.logits(piece).float()), piece)[0])
    return run.hidden, torch.cat(gradients, 1)


def _convert_embeddings(embedding: nn.Embedding, dtype: torch.dtype) -> None:
    """Those of the tokens that are asked for. A subclass may look at its weight's dtype, and sees this one."""
    forward = embedding.forward
    embedding.padding_idx = None  # speaks of gradients alone, and of a row that may not be there

    def convert(ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        whole = embedding.weight
        if whole.dtype == dtype:
            return forward(ids, *arguments, **options)
        rows, places = ids.unique(return_inverse=True)
        embedding.weight = nn.Parameter(whole[rows].to(dtype), requires_grad=False)
        try:
            return forward(places, *arguments, **options)
        finally:
            embedding.weight = whole

    embedding.forward = convert  # type: ignore[method-assign, assignment]


def _linear(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    if module.weight.dtype == inputs.dtype:
        return nn.functional.linear(inputs, module.weight, module.bias)
    output: torch.Tensor = _Converted.apply(inputs, module.weight)  # type: ignore[no-untyped-call]
    return output if module.bias is None else output + module.bias.to(output.dtype)


class _Converted(torch.autograd.Function):
    """A linear layer whose frozen weight is converted a few rows at a time, forwards and again backwards."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        output = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
        for rows in _pieces(weight):
            output[..., rows] = inputs @ weight[rows].to(inputs.dtype).T
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        result = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for rows in _pieces(weight):
            result += gradient[..., rows] @ weight[rows].to(gradient.dtype)
        return result, None


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CONVERTED // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
