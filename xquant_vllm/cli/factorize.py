"""``xquant factorize``: from a checkpoint to a folder that is served without factorizing anything."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from xquant_vllm import __version__
from xquant_vllm.cli.output import link_checkpoint, replaced_folder
from xquant_vllm.integration.factor_header import (
    Calibration,
    ChainSettings,
    FactorHeader,
    FactorSettings,
    Source,
    Streams,
)
from xquant_vllm.integration.factors import Bases
from xquant_vllm.integration.formats import LayerFormat, LayerShape, layer_formats
from xquant_vllm.integration.settings import XQuantSettings, parse_settings
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.factorizer import ChainFactorizer, Factorizer, Statistics
from xquant_vllm.offline.refused import RefusedError
from xquant_vllm.projection.ahead import AheadPool
from xquant_vllm.projection.calibration import INPUT_RIDGE
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
from xquant_vllm.projection.layer import BasisSpec
from xquant_vllm.projection.predicted import link_shapes, link_tensors

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
    formats = layer_formats(settings, [LayerShape(layer, *sizes) for layer in range(checkpoint.layers)])
    chained = settings.method == "xquant-cl"
    if chained and options.calibration is None:
        raise RefusedError(
            "xquant: --method xquant-cl fits a chain to a text: give --calibration TEXT_FILE (or python-docs); a chain "
            'from the weights alone needs no file, serve the model itself with the setting "method": "xquant-cl"'
        )
    outliers = settings.outlier_channels
    dtype = checkpoint.serving_dtype(options.dtype)
    spec = BasisSpec(settings.basis, outliers.key, outliers.value, settings.rotate, dtype)
    with replaced_folder(options.out, checkpoint.folder, options.force) as folder:
        run = _Run(checkpoint, spec, torch.device(options.device), folder / FACTORS_FILE, formats if chained else None)
        if options.calibration is None:
            calibration = None
            run.data_free()
        else:
            from xquant_vllm.offline.statistics import collect_statistics, tokenize
            from xquant_vllm.offline.texts import text_name

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
                chain=_chain_settings(settings, formats) if chained else None,
            ),
            dtype=dtype_name(dtype),
            calibration=calibration,
            checksums=run.writer.checksums,
        )
        write_json(folder / HEADER_FILE, header.model_dump())
        link_checkpoint(checkpoint.folder, folder, checkpoint.files)
    if any(form.holds == "x" for form in formats):
        print(
            "note: on one rank the layer input of this model is cached, which needs no factors; they serve the setting "
            '"cache": "latent", and several tensor-parallel ranks'
        )
    print(f"wrote {options.out}; serve it with: vllm serve {options.out} --attention-backend xquant")


class _Run:
    """Factorizes layers and writes them one after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: BasisSpec,
        device: torch.device,
        path: Path,
        chain: Sequence[LayerFormat] | None,
    ) -> None:
        """Start a file; ``chain`` are the formats of a chain's layers, None for layers by themselves."""
        self.checkpoint, self.device = checkpoint, device
        self.fingerprints: list[list[str]] = []
        self._factorizer = Factorizer(checkpoint, spec, device)
        self._chain = None if chain is None else ChainFactorizer(self._factorizer, chain, spec)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer in range(checkpoint.layers):
            shape = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
            if chain is None:
                shapes |= layer_shapes(layer, *shape, spec.kind, spec.dtype)
            else:
                link = link_shapes(*shape, len(chain[layer].reads) + 1, spec.dtype)
                shapes |= {_chain_name(layer, name): form for name, form in link.items()}
        self.writer = TensorWriter(path, shapes)

    def data_free(self) -> None:
        """All layers, side by side."""
        with self.progress(), AheadPool(self._data_free_layer) as pool:
            pool.announce(range(self.checkpoint.layers))
            for layer in range(self.checkpoint.layers):
                bases, fingerprints = pool.take(layer)
                self._write(layer_tensors(layer, *bases), fingerprints)

    def calibrated(self, layer: int, statistics: Statistics, hidden: torch.Tensor) -> None:
        """The next layer, from the statistics of a text, or, in a chain, from the layer's inputs ``hidden``."""
        if self._chain is None:
            tensors = layer_tensors(layer, *self._factorizer.bases(layer, statistics))
        else:
            link = self._chain.link(layer, statistics, hidden)
            tensors = {_chain_name(layer, name): tensor for name, tensor in link_tensors(link).items()}
        self._write(tensors, self._fingerprints(layer))

    def _data_free_layer(self, layer: int) -> tuple[Bases, list[str]]:
        return self._factorizer.bases(layer, None), self._fingerprints(layer)

    def _fingerprints(self, layer: int) -> list[str]:
        return head_fingerprints(*self._factorizer.weights(layer), self.checkpoint.kv_heads)

    def _write(self, tensors: Mapping[str, torch.Tensor], fingerprints: list[str]) -> None:
        self.writer.write(tensors)
        self.fingerprints.append(fingerprints)
        self._bar.update()
        # Not the bar's own count: users may have turned it off (TQDM_DISABLE).
        seconds = (time.perf_counter() - self._start) / len(self.fingerprints)
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
    if options.method == "xquant-cl":
        raw |= {
            "method": "xquant-cl",
            "cache": "latent",
            "first_layers": options.first_layers,
            "anchor_interval": options.anchor_interval,
        }
    return parse_settings(raw)


def _chain_settings(settings: XQuantSettings, formats: Sequence[LayerFormat]) -> ChainSettings:
    settings = settings.for_chain("latent")
    assert settings.first_layers is not None
    assert settings.anchor_interval is not None
    first = settings.bits_of_first_layers.key
    return ChainSettings(
        bits=settings.bits.key,
        group_size=formats[0].streams[0].group_size,
        first_layers=settings.first_layers,
        first_layers_bits=first,
        anchor_interval=settings.anchor_interval,
        anchor_bits=first,
    )


def _chain_name(layer: int, name: str) -> str:
    return f"layers.{layer}.chain.{name}"


def _streams(option: str, numbers: list[int]) -> int | dict[str, int]:
    if len(numbers) > 2:
        raise RefusedError(f"xquant: {option} takes one number, or one for keys and one for values, not {numbers}")
    return numbers[0] if len(numbers) == 1 else {"key": numbers[0], "value": numbers[1]}
