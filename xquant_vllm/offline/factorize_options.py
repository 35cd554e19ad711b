"""What ``xquant factorize`` is told, and what it refuses before it opens a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration.calibration_tokens import check_calibration_tokens
from xquant_vllm.offline.option_values import at_least, bits_value, numbers_of, per_stream_value
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings

OneOrTwo = int | tuple[int, ...]


@dataclass(frozen=True)
class FactorizeOptions:
    """The options of ``xquant factorize``. Errors call a field by the option's name: ``--bits`` for ``bits``.

    Attributes:
        model: folder of a safetensors checkpoint, or its name on the Hugging Face hub.
        out: folder to write; must not be there yet, unless ``force`` is set.
        calibration: a text file (UTF-8), ``"mixed-text"`` for that of this package, or ``"python-docs"`` for half of
            the text that ships with Python. None computes the bases from the weights alone.
        calibration_tokens: tokens of the text to read, at least 64; None for 8192, or fewer for large models on a
            CPU. Only with ``calibration``.
        bits: 16, 8, 4, 3 or 2, or two of them, for keys and for values: what the folder is served with if the server
            is told nothing else. With ``calibration`` one number, 8, 4, 3 or 2, which is built in. None for 4.
        method: ``"xquant"``, every layer by itself, or ``"xquant-cl"``, a chain of layers; needs ``calibration``.
        anchor_interval: layers from one that is stored by itself to the next, 0 for the first alone; None for 4. Only
            with ``"xquant-cl"``.
        first_layers: layers at the start that are stored by themselves; None for 1. Only with ``"xquant-cl"``.
        basis: ``"head"`` for one basis per kv head, ``"joint"`` for one for all of them. None for ``"head"``, but with
            ``calibration`` for ``"joint"`` where the layer input is narrower than keys and values. Only with
            ``"xquant"``.
        outlier_channels: channels kept in FP16: of keys, or of keys and of values; None for 1. Only without
            ``calibration``.
        rotate: whether to rotate the other channels; None for True. Only without ``calibration``.
        dtype: to serve in: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"`` for what vLLM takes by itself.
        device: where to compute, ``"cpu"`` or ``"cuda"``.
        force: replace ``out`` if :func:`xquant_vllm.offline.factorize.factorize` wrote it.
    """

    model: str | Path
    out: Path
    calibration: str | None = None
    calibration_tokens: int | None = None
    bits: OneOrTwo | None = None
    method: Literal["xquant", "xquant-cl"] = "xquant"
    anchor_interval: int | None = None
    first_layers: int | None = None
    basis: Literal["head", "joint"] | None = None
    outlier_channels: OneOrTwo | None = None
    rotate: bool | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    force: bool = False

    def settings(self) -> XQuantSettings:
        """The settings of a server that they are for.

        Raises:
            RefusedError: an option cannot work, or has no use with the others.
        """
        self._check()
        raw: dict[str, Any] = {"method": self.method}
        if self.bits is not None:
            raw["bits"] = bits_value("--bits", self.bits)
        if self.outlier_channels is not None:
            raw["outlier_channels"] = per_stream_value("--outlier-channels", self.outlier_channels)
        for name in ("basis", "rotate", "anchor_interval", "first_layers"):
            if getattr(self, name) is not None:
                raw[name] = getattr(self, name)
        return parse_settings(raw)

    def _check(self) -> None:
        check_calibration_tokens(self.calibration_tokens)
        for number in () if self.outlier_channels is None else numbers_of(self.outlier_channels):
            at_least("--outlier-channels", number, 0, " (0 for none; 1 suits every model tried)")
        at_least("--anchor-interval", self.anchor_interval, 0, " (0 for a single chain)")
        at_least("--first-layers", self.first_layers, 0, " (0 for none)")
        chained = self.method == "xquant-cl"
        if chained and self.calibration is None:
            raise RefusedError(
                "xquant: --method xquant-cl fits a chain to a text: give --calibration TEXT_FILE (or mixed-text); a "
                "chain from the weights alone needs no file, serve the model itself with the setting "
                '"method": "xquant-cl"'
            )
        of_chains = "with --method xquant, whose layers do not build on each other; set --method xquant-cl"
        rotate = "--rotate" if self.rotate else "--no-rotate"
        calibrated = "with --calibration, which decides what is stored of every channel"
        for option, value, useful, why in (
            ("--anchor-interval", self.anchor_interval, chained, of_chains),
            ("--first-layers", self.first_layers, chained, of_chains),
            ("--basis", self.basis, not chained, "with --method xquant-cl, whose latents are joint in any case"),
            ("--outlier-channels", self.outlier_channels, self.calibration is None, calibrated),
            (rotate, self.rotate, self.calibration is None, calibrated),
            (
                "--calibration-tokens",
                self.calibration_tokens,
                self.calibration is not None,
                "without --calibration; give a text to calibrate on",
            ),
        ):
            if value is not None and not useful:
                joined = ", or leave it out" if ";" in why else "; leave it out"
                raise RefusedError(f"xquant: {option} has no use {why}{joined}")
