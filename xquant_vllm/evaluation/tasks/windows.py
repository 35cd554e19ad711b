"""Windows of a text: what a model reads at once, from its first token."""

from typing import Any

import torch

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.texts import opening_tokens


def cut_windows(tokenizer: Any, text: str, name: str, window: int, windows: int, stride: int) -> torch.Tensor:
    """The first windows of a text.

    Args:
        tokenizer: of the model.
        text: the text.
        name: what it is called, for the error.
        window: tokens per window. Where the tokenizer begins texts with a BOS token, so does every window.
        windows: how many.
        stride: tokens of the text from the start of one window to the start of the next.

    Returns:
        ``[windows, window]``, int64.

    Raises:
        RefusedError: the text is too short, or a number makes no sense.
    """
    for option, value, least in (("--window", window, 2), ("--windows", windows, 1), ("--stride", stride, 1)):
        if value < least:
            raise RefusedError(f"xquant: {option} {value} cannot work; set {least} or more")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    opening = opening_tokens(tokenizer)
    taken = window - len(opening)
    needed = (windows - 1) * stride + taken
    if len(ids) < needed:
        fit = (len(ids) - taken) // stride + 1
        fewer = f"--windows {fit}" if fit >= 1 else f"--windows 1 and --window {len(ids) + len(opening)}"
        instead = f"set {fewer}, or give a longer text" if len(ids) > 1 else "give a longer text"
        every = f" every {stride}" if windows > 1 else ""
        raise RefusedError(
            f"xquant: the text {name} has {counted(len(ids), 'token')}, but {counted(windows, 'window')} of {window} "
            f"tokens{every} {'needs' if windows == 1 else 'need'} {needed}; {instead}"
        )
    return torch.tensor([opening + ids[k * stride : k * stride + taken] for k in range(windows)])
