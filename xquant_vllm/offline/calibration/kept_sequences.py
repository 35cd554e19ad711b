"""What sequences of a text have shown, in files: a calibration that was killed goes on after the last of them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from xquant_vllm.projection.calibration import LayerSample

_FACTOR = "key_factor"


class KeptSequences:
    """A folder with a file per sequence. It belongs to one model, one text and one device."""

    def __init__(self, folder: Path) -> None:
        """Keep files in ``folder``, which is made."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, sequence: int) -> bool:
        """Whether a sequence was kept; a file that cannot be read is removed."""
        from safetensors import SafetensorError, safe_open

        path = self._path(sequence)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return bool(file.keys())
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                path.unlink()
            return False

    def keep(self, sequence: int, samples: Sequence[LayerSample]) -> None:
        """Write what a sequence has shown of all layers; the file takes its name when it is whole.

        Raises:
            OSError: the disk is full, or the like.
        """
        from safetensors.torch import save_file

        tensors = {}
        for layer, sample in enumerate(samples):
            for name in (*_NAMES, *(() if sample.key_factor is None else (_FACTOR,))):
                tensors[f"{layer}.{name}"] = getattr(sample, name).contiguous().cpu()
        temporary = self._path(sequence).with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, self._path(sequence))

    def samples(self, sequences: int, layers: int, device: torch.device) -> Iterator[LayerSample]:
        """What all sequences have shown, layer by layer: one layer is in memory at a time.

        Args:
            sequences: how many there are.
            layers: likewise.
            device: where to put them.
        """
        from safetensors import safe_open

        with contextlib.ExitStack() as opened:
            files = [
                opened.enter_context(safe_open(self._path(sequence), framework="pt", device="cpu"))
                for sequence in range(sequences)
            ]
            names = set(files[0].keys())
            for layer in range(layers):
                parts = {
                    name: torch.cat([file.get_tensor(f"{layer}.{name}") for file in files]).to(device)
                    for name in (*_NAMES, _FACTOR)
                    if f"{layer}.{name}" in names
                }
                yield LayerSample(**parts)

    def _path(self, sequence: int) -> Path:
        return self._folder / f"sequence-{sequence}.safetensors"


_NAMES = ("hidden", "key_gradient", "value_gradient")
