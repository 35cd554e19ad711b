"""What attention over each kind of cache should cost: the tables of docs/kernels/cost.md, as Markdown.

    .venv/bin/python -m benchmarks.cost.model

Bytes and widths come from the package's own formats (cost_caches.py), rates are the constants below. Nothing of it is
measured.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.cost.caches import LLAMA_2, LLAMA_3, SMOLLM2, Cache, Model, Unpack, caches

# Per SM and clock: lanes of the load/store unit, of integer operations, of conversions; lanes that issue.
LOADS, INTEGERS, CONVERSIONS, ISSUED = 32, 64, 64, 128
SMS, CLOCK = 132, 1.83e9
# BF16 FLOP/s without sparsity, and bytes/s from L2.
TENSOR, L2 = 989e12, 5.5e12
# What kernels are taken to reach of the peaks of memory and tensor cores.
OF_BANDWIDTH, OF_TENSOR = 0.8, 0.5
# Rows that a tensor core multiplies at least; tokens of a tile; bytes of up-projections that stay in shared memory.
ROWS, TILE, SHARED = 16, 128, 128 * 1024
# Instructions per channel of a rematerialized key (scale, zero point, RoPE, to BF16), and per score (its exponential is
# one of 16 per clock).
KEY_EPILOGUE, SOFTMAX = 4.5, 8.0
# Memory bandwidth in bytes/s; all else is the same.
GPUS = {"H100": 3.35e12, "H200": 4.8e12}


class Time(NamedTuple):
    """Seconds: if memory, tensor cores and vector units work at the same time, and if they take turns."""

    least: float
    most: float


def clocks(unpack: Unpack) -> float:
    """Clocks of an SM per unpacked channel: its busiest pipe."""
    lanes = (unpack.loads / LOADS, unpack.integers / INTEGERS, unpack.conversions / CONVERSIONS)
    return max(*lanes, sum(unpack) / ISSUED)


def roofs(cache: Cache, gpu: str, query_len: int = 1) -> dict[str, float]:
    """Seconds per cached token and layer that each roof alone allows."""
    kv_heads, size = cache.model.kv_heads, cache.model.head_size
    up = 2.0 * (cache.key_width + (cache.value_width if cache.shared else 0)) * size
    streamed = kv_heads * up / TILE if up > SHARED else 0.0
    of_token = cache.rows(query_len, ROWS) * SOFTMAX + (size * KEY_EPILOGUE if cache.key_width else 0)
    vector = cache.unpacked * clocks(cache.unpack) + kv_heads * of_token / ISSUED
    return {
        "HBM": cache.read / (GPUS[gpu] * OF_BANDWIDTH),
        "L2": (cache.fetched + streamed) / L2,
        "tensor": sum(cache.flops(query_len, ROWS)) / (TENSOR * OF_TENSOR),
        "vector": vector / (SMS * CLOCK),
    }


def binding(cache: Cache, gpu: str, query_len: int = 1) -> str:
    """The roof that takes the most time."""
    of = roofs(cache, gpu, query_len)
    return max(of, key=of.__getitem__)


def time(cache: Cache, gpu: str, query_len: int = 1) -> Time:
    """Predicted time per cached token and layer."""
    of = roofs(cache, gpu, query_len)
    return Time(max(of.values()), max(of["HBM"], of["L2"]) + of["tensor"] + of["vector"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def costs_table(models: Sequence[Model]) -> str:
    """Bytes and FLOPs per cached token and layer, one query token."""
    head = ["per cached token and layer"]
    rows = [[cache.name] for cache in caches(LLAMA_3)]
    for model in models:
        head += [f"{model.name}: bytes (read)", "kFLOP K + QK + PV"]
        for row, cache in zip(rows, caches(model), strict=True):
            read = "" if cache.read == cache.stored else f" ({cache.read:,.0f})"
            row += [f"{cache.stored:,.0f}{read}", " + ".join(f"{part / 1e3:,.0f}" for part in cache.flops())]
    return table(head, rows)


def times_table(cases: Sequence[tuple[Model, str]]) -> str:
    """Predicted time per cached token and layer, speed over 16 bits, and what binds; decode, one query token."""
    head = ["ns; speed over 16 bits; what binds"]
    rows = [[cache.name] for cache in caches(LLAMA_3)]
    for model, gpu in cases:
        head.append(f"{model.name}, {gpu}")
        of_model = caches(model)
        plain = time(of_model[0], gpu).least
        for row, cache in zip(rows, of_model, strict=True):
            of = time(cache, gpu)
            entry = f"{of.least * 1e9:.3g}-{of.most * 1e9:.3g}; {plain / of.most:.2f}-{plain / of.least:.2f}x"
            row.append(f"{plain * 1e9:.3g}; HBM" if cache is of_model[0] else f"{entry}; {binding(cache, gpu)}")
    return table(head, rows)


def tables() -> list[str]:
    """Every table of the page that this script makes."""
    return [
        costs_table((LLAMA_3, LLAMA_2, SMOLLM2)),
        times_table(((LLAMA_3, "H100"), (LLAMA_3, "H200"), (LLAMA_2, "H100"), (SMOLLM2, "H100"))),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
