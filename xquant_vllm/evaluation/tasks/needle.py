"""How well a model finds a number in a long text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from xquant_vllm.evaluation.model.logits import Logits
from xquant_vllm.evaluation.tasks.kept_scores import KeptScores
from xquant_vllm.evaluation.tasks.needle_prompts import NeedlePrompt


@dataclass(frozen=True)
class NeedleScore:
    """What a model says to one prompt.

    Attributes:
        retrieved: whether greedy decoding yields the number.
        nll: mean negative log-likelihood of the number's tokens, each given those before it, in nats.
        retrieved_16bit: the same with the 16-bit cache.
        nll_16bit: likewise.
    """

    retrieved: bool
    nll: float
    retrieved_16bit: bool
    nll_16bit: float

    def of_16bit(self) -> "NeedleScore":
        """The 16-bit cache's own score."""
        return NeedleScore(self.retrieved_16bit, self.nll_16bit, self.retrieved_16bit, self.nll_16bit)


def evaluate_needles(
    prompts: Iterable[NeedlePrompt],
    reference: Logits,
    candidate: Logits | None,
    kept: KeptScores[NeedleScore] | None = None,
) -> Iterator[NeedleScore]:
    """Score prompts, yielding each score as soon as it is there.

    Args:
        prompts: the prompts.
        reference: with the 16-bit cache.
        candidate: with the quantized cache; None to score the 16-bit cache itself.
        kept: scores to take and to add to, or None.
    """
    for prompt in prompts:
        score = kept.load(prompt.tokens) if kept is not None else None
        if score is None:
            score = score_needle(prompt, reference, candidate)
            if kept is not None:
                kept.save(prompt.tokens, score)
        yield score


def score_needle(prompt: NeedlePrompt, reference: Logits, candidate: Logits | None) -> NeedleScore:
    """Ask for one needle.

    Args:
        prompt: the prompt.
        reference: with the 16-bit cache.
        candidate: with the quantized cache; None to score the 16-bit cache itself.
    """
    exact = _answer(prompt, reference)
    read = exact if candidate is None else _answer(prompt, candidate)
    return NeedleScore(*read, *exact)


def _answer(prompt: NeedlePrompt, logits: Logits) -> tuple[bool, float]:
    answer = prompt.answer
    predicted = logits(prompt.window, len(answer))[:].float().cpu()
    # Greedy decoding leaves the answer at the first token that is not the most likely one.
    retrieved = bool(torch.equal(predicted.argmax(-1), answer))
    return retrieved, functional.cross_entropy(predicted, answer).item()
