"""How well a model finds a number in a long text, by its depth and the text's length."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from xquant_vllm.evaluation.needle_prompts import NeedlePrompt

# Given a window [num_tokens] and a number n, yields logits of its last n positions [n, vocabulary].
LastLogits = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class NeedleScore:
    """What a model says to one prompt.

    Attributes:
        retrieved: whether greedy decoding yields the number.
        nll: mean negative log-likelihood of the number's tokens, each given the ones before it, in nats.
        retrieved_16bit: the same with the 16-bit cache.
        nll_16bit: likewise.
    """

    retrieved: bool
    nll: float
    retrieved_16bit: bool
    nll_16bit: float


def score_needle(prompt: NeedlePrompt, reference: LastLogits, candidate: LastLogits | None) -> NeedleScore:
    """Ask for one needle.

    Args:
        prompt: the prompt.
        reference: with the 16-bit cache.
        candidate: with the quantized cache; None to score the 16-bit cache itself.
    """
    exact = _answer(prompt, reference)
    read = exact if candidate is None else _answer(prompt, candidate)
    return NeedleScore(*read, *exact)


def _answer(prompt: NeedlePrompt, logits: LastLogits) -> tuple[bool, float]:
    answer = prompt.answer
    predicted = logits(prompt.window, len(answer)).float().cpu()
    # The first token that is not the most likely one is where greedy decoding leaves the answer.
    retrieved = bool((predicted.argmax(-1) == answer).all())
    return retrieved, functional.cross_entropy(predicted, answer).item()
