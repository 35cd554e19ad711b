"""Models that give a token several positions (multimodal RoPE): text alone has the same one on all axes.

What a page holds is turned, when it is read, by the position that a token has in its sequence. Tokens of an image lie
on a grid instead, and the text behind them goes on from the grid's largest position: neither is in a page. Without
images all positions of a token are equal, and such a model's RoPE is plain RoPE.
"""

from collections.abc import Sequence
from typing import Any

import torch

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import images_problem, unsupported_model
from xquant_vllm.plugin.registration import BACKEND_NAME

_TOKENS_TRIED = 16


def position_axes(model_config: Any) -> int:
    """How many positions vLLM hands to a model for a token, as ``[axes, num_tokens]``; 0: one, as ``[num_tokens]``."""
    return int(model_config.mrope_num_dims) if getattr(model_config, "uses_mrope", False) else 0


def on_all_axes(positions: torch.Tensor, axes: int) -> torch.Tensor:
    """Positions ``[num_tokens]`` of text as a model gets them: the same, or ``[axes, num_tokens]``."""
    return positions.repeat(axes, 1) if axes else positions


def keep_text_positions(model: Any, vllm_config: Any, backend: str = BACKEND_NAME) -> None:
    """Let a model with multimodal RoPE give every token its place in the sequence, on all axes, whatever it is asked.

    Images are refused before a weight is loaded (``checks.py``), but some classes add multimodal RoPE to their
    configuration only when they are built (Isaac), and are refused here. vLLM refuses requests with images. What takes
    its place is the last line of defence: no request, however it came in, turns queries by other positions than keys.

    Args:
        model: the model; its ``get_mrope_input_positions``, which vLLM asks once per request, is replaced.
        vllm_config: vLLM's configuration.
        backend: name of the backend, for errors.

    Raises:
        UnsupportedError: the model reads images, has no such function, or gives text other positions.
    """
    axes = position_axes(vllm_config.model_config)
    if not axes:
        return
    if vllm_config.model_config.supports_multimodal_inputs:
        raise UnsupportedError(f"{backend.lower()}: {images_problem(vllm_config.model_config)}")

    def get_mrope_input_positions(input_tokens: Sequence[int], *_: Any, **__: Any) -> tuple[torch.Tensor, int]:
        return on_all_axes(torch.arange(len(input_tokens), device="cpu"), axes), 0

    who = f"{vllm_config.model_config.architecture} ({vllm_config.model_config.model})"
    original = getattr(model, "get_mrope_input_positions", None)
    if original is None:
        raise unsupported_model(f"{who} uses multimodal RoPE, but does not tell the positions of its tokens", backend)
    tokens = list(range(_TOKENS_TRIED))
    positions, delta = original(tokens, [])
    expected, _ = get_mrope_input_positions(tokens)
    if delta != 0 or positions.shape != expected.shape or not torch.equal(positions.cpu().long(), expected):
        raise unsupported_model(
            f"{who} uses multimodal RoPE and gives tokens of text other positions than their place in the sequence, "
            "which is not supported",
            backend,
        )
    model.get_mrope_input_positions = get_mrope_input_positions
