"""Passages that a window says twice: what a cache loses where the model reads back what stood many tokens before.

The first tokens of a window are four passages. Each is said once more, in the place of other text, so that it stands an
eighth, a quarter, a half, or seven eighths of the window after the first time.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.evaluation.tasks.result import figures
from xquant_vllm.evaluation.tasks.scores import WindowScore, score_window, total

_EIGHTHS = (1, 2, 4, 7)
# A passage is so small a part of a window.
_PART = 32
# By so many tokens a model notices that a passage is said again. They are not looked at.
_NOTICE = 16


def repeated(windows: Iterable[torch.Tensor], ends: Sequence[int]) -> list[float]:
    """How much of ordinary windows is said twice: of every part the share of tokens in runs that stood there before.

    Args:
        windows: ``[num_tokens]`` each.
        ends: of parts, in predicted tokens from the start of the window.
    """
    seen_before = []
    for window in windows:
        tokens, runs, again = window.tolist(), set(), [False] * len(window)
        for start in range(len(tokens) - _NOTICE + 1):
            run = tuple(tokens[start : start + _NOTICE])
            if run in runs:
                again[start : start + _NOTICE] = [True] * _NOTICE
            runs.add(run)
        seen_before.append(again)
    return [
        statistics.fmean(again[token] for again in seen_before for token in range(start + 1, end + 1))
        for start, end in pairwise((0, *ends))
    ]


@dataclass(frozen=True)
class CopyWindow:
    """A window with copies in it.

    Attributes:
        tokens: ``[num_tokens]``, int64.
        starts: where the copy begins, for every distance.
        passage: tokens of each.
    """

    tokens: torch.Tensor
    starts: dict[int, int]
    passage: int


def copy_window(tokens: torch.Tensor, turn: int = 0) -> CopyWindow:
    """Put copies into a window.

    Args:
        tokens: ``[num_tokens]`` of any text.
        turn: which passage goes to which distance; another window may have another turn.
    """
    passage = len(tokens) // _PART
    copied, starts = tokens.clone(), {}
    for number, eighths in enumerate(_EIGHTHS):
        first = (number + turn) % len(_EIGHTHS) * passage
        distance = len(tokens) * eighths // 8
        copied[first + distance : first + distance + passage] = tokens[first : first + passage]
        starts[distance] = first + distance
    return CopyWindow(copied, starts, passage)


def score_copies(
    windows: Sequence[CopyWindow], reference: Callable[..., Rows], candidate: Callable[..., Rows]
) -> list[dict[str, Any]]:
    """Compare two models on what is said again.

    Args:
        windows: all of the same length.
        reference: with the 16-bit cache.
        candidate: with the quantized cache.

    Returns:
        For every distance ``length``, ``distance``, ``tokens``, and what ``figures`` says.
    """
    scores: dict[int, list[WindowScore]] = {}
    for window in windows:
        exact, read = reference(window.tokens), candidate(window.tokens)
        for distance, start in window.starts.items():
            # Row i predicts token i + 1.
            said = slice(start + _NOTICE - 1, start + window.passage - 1)
            tokens = window.tokens[said.start : said.stop + 1]
            scores.setdefault(distance, []).append(score_window(tokens, exact[said], read[said]))
    entries = []
    for distance, of_distance in scores.items():
        whole = total(of_distance)
        entry = {"length": len(windows[0].tokens), "distance": distance, "tokens": whole.predicted}
        entries.append({**entry, **figures(whole)})
    return entries
