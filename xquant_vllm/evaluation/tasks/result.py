"""What an evaluation finds: as JSON, and as a few lines to read."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_vllm import __version__
from xquant_vllm.errors import counted
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.tasks.scores import WindowScore, total


def versions() -> dict[str, str]:
    """Of what computes."""
    import torch
    import transformers

    return {
        "xquant_vllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def figures(whole: WindowScore) -> dict[str, float]:
    """What a score says, per predicted token."""
    return {
        "perplexity": whole.perplexity,
        "perplexity_16bit": whole.perplexity_16bit,
        "increase": whole.perplexity - whole.perplexity_16bit,
        "kl": whole.kl / whole.predicted,
        "top1_agreement": whole.agreements / whole.predicted,
    }


def perplexity_result(
    method: PreparedMethod, bytes_16bit: int, scores: Sequence[WindowScore], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The result as JSON.

    Args:
        method: what was evaluated.
        bytes_16bit: bytes of a token's 16-bit keys and values in all layers.
        scores: of every window.
        about: model, text and windows.
    """
    whole = total(scores)
    return {
        "task": "perplexity",
        "method": method.name,
        "bits": method.bits,
        **figures(whole),
        "bytes_per_token": method.bytes_per_token,
        "bytes_per_token_16bit": bytes_16bit,
        **about,
        "tokens": whole.predicted,
        "settings": method.settings,
        "window_perplexities": [score.perplexity for score in scores],
        "window_perplexities_16bit": [score.perplexity_16bit for score in scores],
        "versions": versions(),
    }


def summary(result: Mapping[str, Any]) -> str:
    """The same in a few lines."""
    bits = result["bits"]
    if isinstance(bits, Mapping):
        bits = f"{bits['key']}/{bits['value']}"
    rows = (
        ("", f"{bits} bits", "16 bit", ""),
        (
            "perplexity",
            f"{result['perplexity']:.3f}",
            f"{result['perplexity_16bit']:.3f}",
            f"{result['increase']:+.3f}",
        ),
        (
            "bytes per token",
            f"{result['bytes_per_token']:.0f}",
            str(result["bytes_per_token_16bit"]),
            f"{result['bytes_per_token_16bit'] / result['bytes_per_token']:.2f} times fewer",
        ),
    )
    lines = [
        f"{result['method']} on {result['model']}: {counted(result['windows'], 'window')} of "
        f"{counted(result['window'], 'token')} of {result['text']}"
    ]
    lines += [f"{name:16}{here:>12}{there:>12}  {note}".rstrip() for name, here, there, note in rows]
    lines.append(f"KL divergence {result['kl']:.5f} nats, the same most likely token {result['top1_agreement']:.1%}")
    return "\n".join(lines)
