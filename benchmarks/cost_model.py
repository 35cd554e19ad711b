"""What attention over each kind of cache costs on paper: the tables of docs/kernels-gpu.md, as Markdown.

    .venv/bin/python benchmarks/cost_model.py

Bytes and widths come from the package's own formats (cost_caches.py), rates are the constants below. Nothing of it is
measured.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cost_caches import LLAMA_2, LLAMA_3, SMOLLM2, Cache, Model, Unpack, caches  # noqa: E402

MODELS = (LLAMA_3, LLAMA_2, SMOLLM2)
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
# Rows of the tables that would say the same of others.
SHORT = (
    *("16-bit KV", "int4 KV", "per head, 4 bits, by words", "per head, 4 bits", "per head, calibrated 2"),
    *("joint, 4 bits", "X, 4 bits"),
)


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and its bandwidth in bytes/s; all else is the same."""

    name: str
    memory: float
    bandwidth: float


H100, H200 = Gpu("H100", 80e9, 3.35e12), Gpu("H200", 141e9, 4.8e12)


@dataclass(frozen=True)
class Time:
    """Seconds: if memory, tensor cores and vector units work at the same time, and if they take turns."""

    least: float
    most: float


def clocks(unpack: Unpack) -> float:
    """Clocks of an SM per unpacked channel: its busiest pipe."""
    issued = unpack.loads + unpack.integers + unpack.conversions + unpack.others
    return max(unpack.loads / LOADS, unpack.integers / INTEGERS, unpack.conversions / CONVERSIONS, issued / ISSUED)


def roofs(cache: Cache, gpu: Gpu, query_len: int = 1) -> dict[str, float]:
    """Seconds per cached token and layer that each roof alone allows."""
    model = cache.model
    keys_and_values = cache.key_width + (cache.value_width if cache.shared else 0)
    up = 2.0 * keys_and_values * model.head_size
    streamed = model.kv_heads * up / TILE if up > SHARED else 0.0
    vector = cache.unpacked * clocks(cache.unpack) + model.kv_heads * cache.rows(query_len, ROWS) * SOFTMAX / ISSUED
    if cache.key_width:
        vector += model.kv_heads * model.head_size * KEY_EPILOGUE / ISSUED
    return {
        "HBM": cache.read / (gpu.bandwidth * OF_BANDWIDTH),
        "L2": (cache.fetched + streamed) / L2,
        "tensor": cache.flops(query_len, ROWS).total / (TENSOR * OF_TENSOR),
        "vector": vector / (SMS * CLOCK),
    }


def time(cache: Cache, gpu: Gpu, query_len: int = 1) -> Time:
    """Predicted time per cached token and layer."""
    of = roofs(cache, gpu, query_len)
    return Time(max(of.values()), max(of["HBM"], of["L2"]) + of["tensor"] + of["vector"])


def some_caches(model: Model) -> list[Cache]:
    """Those of the shorter tables."""
    return [cache for cache in caches(model) if cache.name in SHORT]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def costs_table() -> str:
    """Bytes and FLOPs per cached token and layer, one query token."""
    head = ["per cached token and layer"]
    for model in MODELS:
        head += [f"{model.name}: bytes (read)", "kFLOP K + QK + PV"]
    rows = [[cache.name] for cache in caches(LLAMA_3)]
    for model in MODELS:
        for row, cache in zip(rows, caches(model), strict=True):
            flops = cache.flops()
            read = "" if cache.read == cache.stored else f" ({cache.read:,.0f})"
            parts = (flops.keys, flops.scores, flops.values)
            row += [f"{cache.stored:,.0f}{read}", " + ".join(f"{part / 1e3:,.0f}" for part in parts)]
    return table(head, rows)


def binding_table() -> str:
    """Which roof binds on an H100, by query heads per kv head and query length, and the speed over 16 bits."""
    shapes = [(group, query_len) for group in (1, 4, 8) for query_len in (1, 4)]
    head = ["hidden size 4,096, 32 heads of 128", *(f"G {group}, q {query_len}" for group, query_len in shapes)]
    rows = [[cache.name] for cache in some_caches(LLAMA_3)]
    for group, query_len in shapes:
        of_shape = some_caches(Model("", 4096, 32, 32 // group, 128))
        plain = time(of_shape[0], H100, query_len).least
        for row, cache in zip(rows, of_shape, strict=True):
            of = roofs(cache, H100, query_len)
            row.append(f"{max(of, key=of.__getitem__)} {plain / time(cache, H100, query_len).least:.2f}")
    return table(head, rows)


def times_table() -> str:
    """Predicted time per cached token and layer, and speed over 16 bits; decode."""
    head = ["ns; speed over 16 bits"]
    rows = [[cache.name] for cache in caches(LLAMA_3)]
    for gpu in (H100, H200):
        for model in MODELS:
            head.append(f"{model.name}, {gpu.name}")
            of_model = caches(model)
            plain = time(of_model[0], gpu).least
            for row, cache in zip(rows, of_model, strict=True):
                of = time(cache, gpu)
                speed = f"{plain / of.most:.2f}-{plain / of.least:.2f}x"
                ns = f"{_number(of.least * 1e9)}-{_number(of.most * 1e9)}"
                row.append(_number(plain * 1e9) if cache is of_model[0] else f"{ns}, {speed}")
    return table(head, rows)


def batches_table(model: Model, gpu: Gpu) -> str:
    """Predicted microseconds per layer by batch and context, everything overlapping; what does not fit is marked."""
    batches = [(batch, context) for batch in (1, 16, 128) for context in (1, 4, 64)]
    rows = []
    for cache in some_caches(model):
        row = [cache.name]
        for batch, context in batches:
            tokens = batch * context * 1024
            fits = tokens * cache.stored * model.layers <= room(model, gpu)
            row.append(_number(tokens * time(cache, gpu).least * 1e6) + ("" if fits else "\\*"))
        rows.append(row)
    head = [f"{model.name}, {gpu.name}, us per layer", *(f"{batch} x {context}K" for batch, context in batches)]
    return table(head, rows)


def room(model: Model, gpu: Gpu) -> float:
    """Bytes for the cache: nine tenths of the memory, less the weights."""
    return 0.9 * gpu.memory - model.weight_bytes


def full_table(context: int) -> str:
    """Sequences that fit, and predicted tokens per second with all of them decoding."""
    head = [f"{context:,} tokens of context"]
    rows = [[cache.name] for cache in some_caches(LLAMA_3)]
    for model in (LLAMA_3, LLAMA_2):
        head += [f"{model.name}: sequences", "tokens/s"]
        for row, cache in zip(rows, some_caches(model), strict=True):
            batch = int(room(model, H100) / (cache.stored * model.layers * context))
            # A weight of two bytes is one multiply-add per sequence.
            products = batch * model.weight_bytes / (TENSOR * OF_TENSOR)
            rest = max(model.weight_bytes / (H100.bandwidth * OF_BANDWIDTH), products)
            of = time(cache, H100)
            slow, fast = (batch / (rest + s * batch * context * model.layers) for s in (of.most, of.least))
            row += [str(batch), f"{slow:,.0f}-{fast:,.0f}"]
    return table(head, rows)


def tables() -> list[str]:
    """Every table of the page that this script makes."""
    return [costs_table(), binding_table(), times_table(), batches_table(LLAMA_3, H100), full_table(4096)]


if __name__ == "__main__":
    print("\n\n".join(tables()))
