"""``xquant factorize``: from a checkpoint to a folder that is served without factorizing anything."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from xquant_vllm import __version__
from xquant_vllm.cli.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.cli.output import link_checkpoint, replaced_folder
from xquant_vllm.cli.refused import RefusedError
from xquant_vllm.integration.factor_header import Calibration, FactorHeader, FactorSettings, Source, Streams
from xquant_vllm.integration.formats import LayerShape, layer_formats
from xquant_vllm.integration.settings import XQuantSettings, parse_settings
from xquant_vllm.projection.ahead import AheadPool
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.calibration import INPUT_RIDGE, ProjectionStatistics
from xquant_vllm.projection.factor_file import (
    FACTORS_FILE,
    FORMAT_VERSION,
    HEADER_FILE,
    TensorWriter,
    dtype_name,
    head_fingerprints,
    layer_shapes,
    layer_tensors,
    write_json,
)
from xquant_vllm.projection.layer import BasisSpec, factorize_layer

Statistics = tuple[ProjectionStatistics, ProjectionStatistics]
Factorized = tuple[tuple[LatentBasis, LatentBasis], list[str]]

_FEWEST_TOKENS = 64


def factorize_checkpoint(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.main` parsed.

    Raises:
        RefusedError: the model, the text or the folder cannot be used.
        SettingsError: a setting cannot work.
    """
    settings = _settings(options)
    if options.calibration_tokens < _FEWEST_TOKENS:
        raise RefusedError(
            f"xquant: --calibration-tokens {options.calibration_tokens} is too few to say anything about a model; set "
            f"{_FEWEST_TOKENS} or more (2048 is plenty)"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("xquant: --device cuda: PyTorch sees no GPU; leave the option out to compute on the CPU")
    checkpoint = open_checkpoint(options.model)
    sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
    layer_formats(settings, [LayerShape(layer, *sizes) for layer in range(checkpoint.layers)])
    outliers = settings.outlier_channels
    dtype = checkpoint.serving_dtype(options.dtype)
    spec = BasisSpec(settings.basis, outliers.key, outliers.value, settings.rotate, dtype)
    with replaced_folder(options.out, checkpoint.folder, options.force) as folder:
        run = _Run(checkpoint, spec, torch.device(options.device), folder / FACTORS_FILE)
        if options.calibration is None:
            calibration = None
            run.data_free()
        else:
            from xquant_vllm.cli.statistics import collect_statistics, text_name, tokenize

            batch = tokenize(checkpoint, options.calibration, options.calibration_tokens, _FEWEST_TOKENS)
            calibration = Calibration(text=text_name(options.calibration), tokens=batch.numel(), ridge=INPUT_RIDGE)
            with run.progress():
                collect_statistics(checkpoint, batch, run.device, run.calibrated)
        header = FactorHeader(
            format=FORMAT_VERSION,
            package=__version__,
            source=Source(
                architecture=checkpoint.architecture,
                layers=checkpoint.layers,
                hidden_size=checkpoint.hidden_size,
                kv_heads=checkpoint.kv_heads,
                head_size=checkpoint.head_size,
                fingerprints=run.fingerprints,
            ),
            settings=FactorSettings(
                bits=None if options.bits is None else Streams(key=settings.bits.key, value=settings.bits.value),
                basis=settings.basis,
                rotate=settings.rotate,
                outlier_channels=Streams(key=outliers.key, value=outliers.value),
            ),
            dtype=dtype_name(dtype),
            calibration=calibration,
            checksums=run.writer.checksums,
        )
        write_json(folder / HEADER_FILE, header.model_dump())
        link_checkpoint(checkpoint.folder, folder, checkpoint.files)
    print(f"wrote {options.out}; serve it with: vllm serve {options.out} --attention-backend xquant")


class _Run:
    """Factorizes layers and writes them one after another."""

    def __init__(self, checkpoint: Checkpoint, spec: BasisSpec, device: torch.device, path: Path) -> None:
        self.checkpoint, self.spec, self.device = checkpoint, spec, device
        self.fingerprints: list[list[str]] = []
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer in range(checkpoint.layers):
            shape = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
            shapes |= layer_shapes(layer, *shape, spec.kind, spec.dtype)
        self.writer = TensorWriter(path, shapes)

    def data_free(self) -> None:
        """All layers, side by side."""
        with self.progress(), AheadPool(partial(self._factorize, statistics=None)) as pool:
            pool.announce(range(self.checkpoint.layers))
            for layer in range(self.checkpoint.layers):
                self._write(layer, pool.take(layer))

    def calibrated(self, layer: int, statistics: Statistics) -> None:
        """The next layer."""
        self._write(layer, self._factorize(layer, statistics))

    def _factorize(self, layer: int, statistics: Statistics | None) -> Factorized:
        # Rounded first, because that is what a server has: with or without a file, it serves the same latents.
        key, value = (weight.to(self.spec.dtype) for weight in self.checkpoint.key_value(layer))
        kv_heads = self.checkpoint.kv_heads
        fingerprints = head_fingerprints(key, value, kv_heads)
        with torch.no_grad():
            bases = factorize_layer(key.to(self.device), value.to(self.device), kv_heads, self.spec, statistics)
        return bases, fingerprints

    def _write(self, layer: int, factorized: Factorized) -> None:
        bases, fingerprints = factorized
        self.writer.write(layer_tensors(layer, *bases))
        self.fingerprints.append(fingerprints)
        self._bar.update()
        seconds = (time.perf_counter() - self._start) / self._bar.n
        self._bar.set_postfix_str(f"{seconds:.2f} s per layer, {seconds * self.checkpoint.layers:.0f} s in all")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show a bar with the time per layer and for all while layers are written; then close the file."""
        self._start = time.perf_counter()
        with tqdm(total=self.checkpoint.layers, desc="factorize", unit="layer") as self._bar:
            yield
        self.writer.close()


def _settings(options: argparse.Namespace) -> XQuantSettings:
    raw = {
        "basis": options.basis,
        "rotate": options.rotate,
        "outlier_channels": _streams("--outlier-channels", options.outlier_channels),
    }
    if options.bits is not None:
        raw["bits"] = _streams("--bits", options.bits)
    return parse_settings(raw)


def _streams(option: str, numbers: list[int]) -> int | dict[str, int]:
    if len(numbers) > 2:
        raise RefusedError(f"xquant: {option} takes one number, or one for keys and one for values, not {numbers}")
    return numbers[0] if len(numbers) == 1 else {"key": numbers[0], "value": numbers[1]}
