"""What an evaluation of needles finds: as JSON, and as tables to read."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from xquant_vllm.errors import counted
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.tasks.needle import NeedleScore
from xquant_vllm.evaluation.tasks.needle_prompts import NeedlePrompt
from xquant_vllm.evaluation.tasks.result import versions

Cell = Mapping[str, Any]


def needle_result(
    method: PreparedMethod,
    bytes_16bit: int,
    prompts: Sequence[NeedlePrompt],
    scores: Sequence[NeedleScore],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The result as JSON.

    Args:
        method: what was evaluated.
        bytes_16bit: bytes of a token's 16-bit keys and values in all layers.
        prompts: what was asked.
        scores: of every prompt.
        about: model and text.
    """
    by_cell: dict[tuple[int, float], list[NeedleScore]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        by_cell.setdefault((prompt.length, prompt.depth), []).append(score)
    whole = _means(scores)
    return {
        "task": "needle",
        "method": method.name,
        "bits": method.bits,
        **whole,
        "relative_accuracy": whole["accuracy"] / whole["accuracy_16bit"] if whole["accuracy_16bit"] else None,
        "bytes_per_token": method.bytes_per_token,
        "bytes_per_token_16bit": bytes_16bit,
        **about,
        "cells": [{"length": length, "depth": depth, **_means(cell)} for (length, depth), cell in by_cell.items()],
        "settings": method.settings,
        "versions": versions(),
    }


def _means(scores: Sequence[NeedleScore]) -> dict[str, float]:
    return {
        "prompts": len(scores),
        "accuracy": fmean(score.retrieved for score in scores),
        "accuracy_16bit": fmean(score.retrieved_16bit for score in scores),
        "nll": fmean(score.nll for score in scores),
        "nll_16bit": fmean(score.nll_16bit for score in scores),
    }


def needle_summary(result: Mapping[str, Any]) -> str:
    """The same as a table of accuracies and one of losses, a row per length and a column per depth."""
    relative = result["relative_accuracy"]
    share = "" if relative is None else f", {relative:.0%} of it"
    smaller = result["bytes_per_token_16bit"] / result["bytes_per_token"]
    return "\n".join(
        (
            f"{result['method']} on {result['model']}: a number to find in {result['text']}, "
            f"{counted(result['trials'], 'prompt')} per length and depth",
            "",
            "found, and with the 16-bit cache",
            *_table(result["cells"], lambda cell: f"{cell['accuracy']:.0%} ({cell['accuracy_16bit']:.0%})"),
            "",
            "mean negative log-likelihood of a token of the number, and with the 16-bit cache",
            *_table(result["cells"], lambda cell: f"{cell['nll']:.2f} ({cell['nll_16bit']:.2f})"),
            "",
            f"all: found {result['accuracy']:.1%} (16 bit {result['accuracy_16bit']:.1%}{share}), "
            f"{result['nll']:.3f} nats (16 bit {result['nll_16bit']:.3f})",
            f"bytes per token {result['bytes_per_token']:.0f} (16 bit {result['bytes_per_token_16bit']}, "
            f"{smaller:.2f} times fewer)",
        )
    )


def _table(cells: Sequence[Cell], text: Callable[[Cell], str]) -> list[str]:
    depths = list(dict.fromkeys(cell["depth"] for cell in cells))
    lines = [f"{'tokens':>8}" + "".join(f"{f'depth {depth:g}':>14}" for depth in depths)]
    for length in dict.fromkeys(cell["length"] for cell in cells):
        row = [text(cell) for cell in cells if cell["length"] == length]
        lines.append(f"{length:>8}" + "".join(f"{entry:>14}" for entry in row))
    return lines
