"""``xquant factorize --max-kl``: the fewest bytes whose loss is known to be small enough."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.cli.certify import certifying
from xquant_vllm.errors import RefusedError, UnsupportedError
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.factorize import FactorizeOptions, factorize
from xquant_vllm.offline.progress import say
from xquant_vllm.scheme.calibration.choice import CALIBRATED_BITS, ModelShape
from xquant_vllm.scheme.certificate import Certificate
from xquant_vllm.scheme.factor_header import FactorHeader


class _TooMuchError(RefusedError):
    """A candidate loses more than is allowed."""

    def __init__(self, found: Certificate) -> None:
        super().__init__(found.describe())
        self.found = found


def search(options: FactorizeOptions, most: float, text: str | None, *, chosen: bool) -> FactorHeader:
    """Calibrate caches, those of fewest bytes first, until one loses little enough.

    That is so when the upper end of the interval of its divergence is within the bound: a cache that was lucky with its
    text is not taken.

    Args:
        options: what is the same in all of them.
        most: the bound on the Kullback-Leibler divergence, in nats.
        text: to measure on, see :func:`xquant_vllm.cli.certify.certifying`.
        chosen: whether the user has chosen the method or the basis, so that only bits are searched.

    Returns:
        The header of the folder that was written.

    Raises:
        RefusedError: no cache is good enough, or the model, the text or an option cannot be used.
    """

    def judge(found: Certificate) -> None:
        if found.kl.high > most:
            raise _TooMuchError(found)

    checkpoint = open_checkpoint(options.model)
    best: tuple[float, str] | None = None
    # What the model shows on the text is the same for all.
    with tempfile.TemporaryDirectory(prefix="xquant-samples-") as kept:
        for candidate in _candidates(options, checkpoint, chosen):
            name = _name(candidate)
            try:
                return factorize(candidate, certifying(candidate, text, demanded=True, judge=judge), Path(kept))
            except _TooMuchError as error:
                say(f"{name}: {error}: more than --max-kl {most:g}")
                if best is None or error.found.kl.high < best[0]:
                    best = error.found.kl.high, name
            except UnsupportedError as error:
                say(f"{name}: {str(error).removeprefix('xquant: ')}")
    least = "" if best is None else f"; the best was {best[1]}, whose divergence may be {best[0]:.2g}"
    raise RefusedError(
        f"xquant: --max-kl {most:g} cannot be met: no cache is known to lose so little{least}; set more, or give a "
        "longer --certificate-text, which makes the interval narrower"
    )


def _candidates(options: FactorizeOptions, checkpoint: Checkpoint, chosen: bool) -> Iterator[FactorizeOptions]:
    """By bytes, and among those of the same bits what is read fastest first."""
    narrow = ModelShape(checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size).narrow
    for bits in sorted(CALIBRATED_BITS):
        plain = dataclasses.replace(options, bits=bits)
        if chosen:
            yield plain
            continue
        if not narrow:
            yield dataclasses.replace(plain, basis="head")
        if narrow or checkpoint.kv_heads > 1:
            yield dataclasses.replace(plain, basis="joint")
        if len(set(checkpoint.layer_kinds)) < 2:
            yield dataclasses.replace(plain, method="xquant-cl")


def _name(options: FactorizeOptions) -> str:
    basis = f", basis {options.basis}" if options.basis else ""
    return f"{options.bits} bits, method {options.method}{basis}"
