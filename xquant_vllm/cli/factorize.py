"""``xquant factorize``: from a checkpoint to a folder that is served without factorizing anything."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xquant_vllm import __version__
from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibrated import CalibrationPlan, fit_layers, plan_calibration
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.factorizer import Factorizer
from xquant_vllm.offline.output_folder import link_checkpoint, replaced_folder
from xquant_vllm.projection.ahead import AheadPool
from xquant_vllm.projection.basis import BasisKind
from xquant_vllm.projection.calibration import GRADIENT_RIDGE, INPUT_RIDGE
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
from xquant_vllm.projection.predicted import PredictedLink, link_shapes, link_tensors
from xquant_vllm.scheme.factor_header import (
    Calibration,
    ChainSettings,
    FactorHeader,
    FactorSettings,
    Source,
    Streams,
)
from xquant_vllm.scheme.factor_reader import Bases, joint_kv_name
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import spec_of
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

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
    if settings.method == "xquant-cl" and options.calibration is None:
        raise RefusedError(
            "xquant: --method xquant-cl fits a chain to a text: give --calibration TEXT_FILE (or python-docs); a chain "
            'from the weights alone needs no file, serve the model itself with the setting "method": "xquant-cl"'
        )
    if options.calibration is None:
        # Refuses what could not be served.
        shape = LayerShape(0, checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
        layer_formats(settings.model_copy(update={"cache": "latent"}), [shape])
    dtype = checkpoint.serving_dtype(options.dtype)
    with replaced_folder(options.out, checkpoint.folder, options.force) as folder:
        run = _Run(checkpoint, settings, dtype, torch.device(options.device), folder / FACTORS_FILE)
        if options.calibration is None:
            calibration = None
            run.data_free()
        else:
            from xquant_vllm.offline.samples import tokenize
            from xquant_vllm.offline.texts import text_name

            batch = tokenize(checkpoint, options.calibration, options.calibration_tokens, _FEWEST_TOKENS)
            calibration = Calibration(
                text=text_name(options.calibration),
                tokens=batch.numel(),
                ridge=INPUT_RIDGE,
                gradient_ridge=GRADIENT_RIDGE,
            )
            run.calibrated(batch)
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
            settings=run.factor_settings(options.bits is not None),
            dtype=dtype_name(dtype),
            calibration=calibration,
            checksums=run.writer.checksums,
        )
        write_json(folder / HEADER_FILE, header.model_dump())
        link_checkpoint(checkpoint.folder, folder, checkpoint.files)
    if options.calibration is None and checkpoint.hidden_size < 2 * checkpoint.kv_heads * checkpoint.head_size:
        print(
            "note: on one rank the layer input of this model is cached, which needs no factors; they serve the setting "
            '"cache": "latent", and several tensor-parallel ranks'
        )
    print(f"wrote {options.out}; serve it with: vllm serve {options.out} --attention-backend xquant")


class _Run:
    """Factorizes layers and writes them one after another."""

    def __init__(
        self, checkpoint: Checkpoint, settings: XQuantSettings, dtype: torch.dtype, device: torch.device, path: Path
    ) -> None:
        self.checkpoint, self.settings, self.dtype, self.device = checkpoint, settings, dtype, device
        self.path = path
        self.fingerprints: list[list[str]] = []
        self._spec = spec_of(settings, dtype)
        self._factorizer = Factorizer(checkpoint, self._spec, device)
        self._plan: CalibrationPlan | None = None
        self._allocations: list[LayerAllocation] = []

    def data_free(self) -> None:
        """All layers, side by side."""
        with self._writing(layer_shapes, self._spec.kind), AheadPool(self._data_free_layer) as pool:
            pool.announce(range(self.checkpoint.layers))
            for layer in range(self.checkpoint.layers):
                bases, fingerprints = pool.take(layer)
                self._write(layer_tensors(layer, *bases), fingerprints)

    def calibrated(self, batch: torch.Tensor) -> None:
        """All layers, fitted to token ids ``[sequences, length]``."""
        plan = self._plan = plan_calibration(self.checkpoint, self.settings)
        fitted = fit_layers(self.checkpoint, plan, batch, self.dtype, self.device)
        with self._writing(layer_shapes, "head") if not plan.joint_kv else self._writing(self._link_shapes):
            for layer, of_layer in enumerate(fitted):
                if isinstance(of_layer.factors, PredictedLink):
                    named = link_tensors(of_layer.factors)
                    tensors = {joint_kv_name(layer, name): tensor for name, tensor in named.items()}
                else:
                    tensors = layer_tensors(layer, *of_layer.factors)
                self._allocations.append(of_layer.allocation)
                self._write(tensors, self._fingerprints(layer))

    def factor_settings(self, bits_given: bool) -> FactorSettings:
        """What the header says of the settings."""
        settings, plan = self.settings, self._plan
        bits = Streams(key=settings.bits.key, value=settings.bits.value)
        outliers = settings.outlier_channels
        general = FactorSettings(
            bits=bits if bits_given or plan is not None else None,
            basis=settings.basis,
            rotate=settings.rotate,
            outlier_channels=Streams(key=outliers.key, value=outliers.value),
        )
        if plan is None:
            return general
        filled = settings.for_chain("latent")
        chain = None
        if filled.first_layers is not None and filled.anchor_interval is not None:
            chain = ChainSettings(first_layers=filled.first_layers, anchor_interval=filled.anchor_interval)
        allocation = [[[list(runs) for runs in stream] for stream in layer] for layer in self._allocations]
        return general.model_copy(
            update={"basis": "joint" if plan.joint_kv else "head", "allocation": allocation, "chain": chain}
        )

    def _link_shapes(self, layer: int, *shape_and_dtype: Any) -> Shapes:
        assert self._plan is not None
        *sizes, dtype = shape_and_dtype
        link = link_shapes(*sizes, self._plan.layers_of_groups[layer], dtype)  # type: ignore[call-arg]
        return {joint_kv_name(layer, name): form for name, form in link.items()}

    def _data_free_layer(self, layer: int) -> tuple[Bases, list[str]]:
        return self._factorizer.bases(layer), self._fingerprints(layer)

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
    def _writing(self, shapes_of: Callable[..., Shapes], *kind: BasisKind) -> Iterator[None]:
        """Open the file, show a bar with the time per layer and for all while layers are written, close the file."""
        checkpoint = self.checkpoint
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer in range(checkpoint.layers):
            sizes = (checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size)
            shapes |= shapes_of(layer, *sizes, *kind, self.dtype)
        self.writer = TensorWriter(self.path, shapes)
        self._start = time.perf_counter()
        with tqdm(total=checkpoint.layers, desc="factorize", unit="layer") as self._bar:
            yield
        self.writer.close()


def _settings(options: argparse.Namespace) -> XQuantSettings:
    if options.calibration is not None and (options.outlier_channels is not None or options.rotate is not None):
        option = "--rotate" if options.outlier_channels is None else "--outlier-channels"
        raise RefusedError(
            f"xquant: {option} has no use with --calibration, which decides what is stored of every channel; leave it "
            "out"
        )
    raw: dict[str, Any] = {}
    if options.basis is not None:
        raw["basis"] = options.basis
    if options.rotate is not None:
        raw["rotate"] = options.rotate
    if options.outlier_channels is not None:
        raw["outlier_channels"] = _streams("--outlier-channels", options.outlier_channels)
    if options.bits is not None:
        raw["bits"] = _streams("--bits", options.bits)
    if options.method == "xquant-cl":
        raw |= {
            "method": "xquant-cl",
            "first_layers": options.first_layers,
            "anchor_interval": options.anchor_interval,
        }
    return parse_settings(raw)


def _streams(option: str, numbers: list[int]) -> int | dict[str, int]:
    if len(numbers) > 2:
        raise RefusedError(f"xquant: {option} takes one number, or one for keys and one for values, not {numbers}")
    return numbers[0] if len(numbers) == 1 else {"key": numbers[0], "value": numbers[1]}
