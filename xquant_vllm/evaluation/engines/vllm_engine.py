"""Logits from vLLM itself: real pages, and every attended token read back from them.

Two engines run one after the other, each in a process of its own: the one with the 16-bit cache first, whose final
hidden states (as wide as the model, not as the vocabulary) are kept on disk. The other one's head, which is the same,
makes logits of both, a few positions at a time.
"""

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from xquant_vllm.offline.progress import counted_bar, say
from xquant_vllm.plugin.evaluation.engine import EngineRequest
from xquant_vllm.plugin.evaluation.process import EngineProcess

_HIDDEN = "hidden_states"


class VllmLogits:
    """Logits ``[num_positions, vocabulary]`` that are computed where they are asked for: ``logits[start:stop]``."""

    device = torch.device("cpu")

    def __init__(self, engine: EngineProcess, hidden: torch.Tensor) -> None:
        """Keep what they are made of.

        Args:
            engine: whose head to use.
            hidden: final hidden states ``[num_positions, hidden_size]``.
        """
        self._engine, self._hidden = engine, hidden

    def __getitem__(self, positions: slice, /) -> torch.Tensor:
        """Of some positions, FP32."""
        return self._engine.logits(self._hidden[positions])


class VllmEngine:
    """One model with two caches.

    Attributes:
        bytes_per_token: of the quantized cache (or of the 16-bit one, if there is no other), in all layers, as vLLM
            allocates it.
    """

    def __init__(self, process: EngineProcess, kept: "KeptStates | None") -> None:
        """Take over.

        Args:
            process: the engine with the quantized cache, or with the 16-bit one if there is no other.
            kept: what an engine with the 16-bit cache has left, or None.
        """
        self._process, self._kept = process, kept
        self.bytes_per_token = process.bytes_per_token

    def reference(self, tokens: torch.Tensor, last: int | None = None) -> VllmLogits:
        """With the 16-bit cache; see :class:`xquant_vllm.evaluation.model.logits.Logits`."""
        if self._kept is None:
            return self.candidate(tokens, last)
        return self._logits(self._kept.load(tokens), last)

    def candidate(self, tokens: torch.Tensor, last: int | None = None) -> VllmLogits:
        """With the quantized cache."""
        return self._logits(self._process.hidden_states(tokens.tolist()), last)

    def _logits(self, hidden: torch.Tensor, last: int | None) -> VllmLogits:
        return VllmLogits(self._process, hidden if last is None else hidden[-last:])


class KeptStates:
    """Hidden states on disk, a file per window."""

    def __init__(self, folder: Path) -> None:
        """Keep them in a folder."""
        self._folder = folder

    def save(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep those of a window."""
        save_file({_HIDDEN: hidden}, self._path(tokens))

    def load(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those of a window that was kept."""
        return load_file(self._path(tokens))[_HIDDEN]

    def _path(self, tokens: torch.Tensor) -> Path:
        return self._folder / f"{hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}.safetensors"


def vllm_version() -> str | None:
    """The version of vLLM, whatever its distribution is called; None if it is not installed."""
    names = importlib.metadata.packages_distributions().get("vllm")
    return importlib.metadata.version(names[0]) if names else None


@contextmanager
def serve(
    model: Path,
    settings: Mapping[str, Any] | None,
    dtype: str,
    windows: Sequence[torch.Tensor],
    unit: str = "window",
) -> Iterator[VllmEngine]:
    """Run a model on windows.

    Args:
        model: a checkpoint's folder.
        settings: the xquant settings, as in ``--additional-config``; None for the 16-bit cache alone.
        dtype: as in vLLM's ``--dtype``.
        windows: ``[num_tokens]`` each; no others can be asked for.
        unit: what a window is called in the bar.

    Raises:
        SettingsError: the model or a setting is refused.
        EngineError: vLLM failed.
    """
    longest = max(len(window) for window in windows)
    plain = EngineRequest(str(model), None, dtype, longest)
    if settings is None:
        say("starting vLLM with the 16-bit cache")
        with EngineProcess(plain) as process:
            yield VllmEngine(process, None)
        return
    with tempfile.TemporaryDirectory(prefix="xquant-eval-") as folder:
        kept = KeptStates(Path(folder))
        say("starting vLLM with the 16-bit cache, first of two engines")
        with EngineProcess(plain) as process:
            for window in counted_bar(windows, len(windows), "16bit", unit):
                kept.save(window, process.hidden_states(window.tolist()))
        say("starting vLLM with the quantized cache")
        with EngineProcess(EngineRequest(str(model), settings, dtype, longest)) as process:
            yield VllmEngine(process, kept)
