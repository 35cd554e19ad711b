"""Logits of windows from vLLM itself: real pages, and every attended token read back from them.

Two engines run one after the other, each in a process of its own: the one with the 16-bit cache first, whose final
hidden states (as wide as the model, not as the vocabulary) are kept on disk. The other one's head, which is the same,
makes logits of both, a few positions at a time.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from xquant_vllm.integration.evaluation_engine import EngineRequest
from xquant_vllm.integration.evaluation_process import EngineProcess

_HIDDEN = "hidden_states"


class ServedLogits:
    """Logits of a window ``[num_tokens, vocabulary]``, computed where they are asked for: ``logits[start:stop]``."""

    device = torch.device("cpu")

    def __init__(self, engine: EngineProcess, hidden: torch.Tensor) -> None:
        """Keep what they are made of.

        Args:
            engine: whose head to use.
            hidden: final hidden states ``[num_tokens, hidden_size]``.
        """
        self._engine, self._hidden = engine, hidden

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        """Some positions, FP32."""
        return self._engine.logits(self._hidden[rows])


@dataclass(frozen=True)
class Served:
    """A model through vLLM.

    Attributes:
        reference: logits of a window ``[num_tokens]`` with the 16-bit cache.
        candidate: with the quantized cache; None if none was asked for.
        bytes_per_token: of the cache that is evaluated, in all layers, as vLLM allocates it.
        bytes_per_token_16bit: of 16-bit keys and values, likewise.
    """

    reference: Callable[[torch.Tensor], ServedLogits]
    candidate: Callable[[torch.Tensor], ServedLogits] | None
    bytes_per_token: int
    bytes_per_token_16bit: int


@contextmanager
def serve(
    model: Path, settings: Mapping[str, Any] | None, dtype: str, windows: Sequence[torch.Tensor]
) -> Iterator[Served]:
    """Run a model on windows.

    Args:
        model: a checkpoint's folder.
        settings: the xquant settings, as in ``--additional-config``; None for the 16-bit cache alone.
        dtype: as in vLLM's ``--dtype``.
        windows: ``[num_tokens]`` each; the only ones that may be asked for.

    Raises:
        SettingsError: the model or a setting is refused.
        RuntimeError: vLLM failed.
    """
    longest = max(len(window) for window in windows)
    with ExitStack() as stack:
        plain = EngineProcess(EngineRequest(str(model), None, dtype, longest))
        stack.callback(plain.close)
        if settings is None:
            yield Served(_asks(plain), None, plain.bytes_per_token, plain.bytes_per_token)
            return
        kept = _KeptStates(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xquant-eval-"))))
        for window in tqdm(windows, desc="16-bit cache", unit="window"):
            kept.save(window, plain.hidden_states(window.tolist()))
        bytes_per_token_16bit = plain.bytes_per_token
        plain.close()
        engine = EngineProcess(EngineRequest(str(model), settings, dtype, longest))
        stack.callback(engine.close)
        yield Served(
            lambda window: ServedLogits(engine, kept.load(window)),
            _asks(engine),
            engine.bytes_per_token,
            bytes_per_token_16bit,
        )


def _asks(engine: EngineProcess) -> Callable[[torch.Tensor], ServedLogits]:
    return lambda window: ServedLogits(engine, engine.hidden_states(window.tolist()))


class _KeptStates:
    """Hidden states on disk, a file per window."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, window: torch.Tensor, hidden: torch.Tensor) -> None:
        save_file({_HIDDEN: hidden}, self._path(window))

    def load(self, window: torch.Tensor) -> torch.Tensor:
        return load_file(self._path(window))[_HIDDEN]

    def _path(self, window: torch.Tensor) -> Path:
        return self._folder / f"{hashlib.sha256(window.numpy().tobytes()).hexdigest()}.safetensors"
