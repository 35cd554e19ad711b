"""Writes the factors of all layers to a file, with a bar that says how long a layer takes."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.offline.factor_layers import FactorLayers
from xquant_vllm.offline.progress import bar
from xquant_vllm.projection.factor_file import TensorWriter


@dataclass(frozen=True)
class WrittenFactors:
    """What the header of the file says of its layers.

    Attributes:
        checksums: SHA-256 of every tensor.
        fingerprints: of the weights, per layer and kv head.
        allocations: bits of the channels, per layer; None where all have the same.
    """

    checksums: dict[str, str]
    fingerprints: list[list[str]]
    allocations: list[LayerAllocation | None]


def write_factors(path: Path, factors: FactorLayers, num_layers: int) -> WrittenFactors:
    """Compute and write layer after layer.

    Args:
        path: the file.
        factors: what to write.
        num_layers: how many there are.

    Raises:
        RefusedError: a weight cannot be used.
        OSError: the file cannot be written.
    """
    writer = TensorWriter(path, factors.shapes)
    fingerprints: list[list[str]] = []
    allocations: list[LayerAllocation | None] = []
    start = time.perf_counter()
    # Closed when a write fails, too: it has threads.
    with contextlib.closing(factors.layers) as layers, bar(num_layers, "factorize", "layer") as shown:
        for layer in layers:
            writer.write(layer.tensors)
            fingerprints.append(layer.fingerprints)
            allocations.append(layer.allocation)
            shown.update()
            # Not the bar's own count: users may have turned it off (TQDM_DISABLE).
            seconds = (time.perf_counter() - start) / len(fingerprints)
            shown.set_postfix_str(f"{seconds:.2f} s per layer, {seconds * num_layers:.0f} s in all")
    writer.close()
    return WrittenFactors(writer.checksums, fingerprints, allocations)
