"""Every configuration that serving can ask for, as calls whose kernels are compiled; see sweep.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from tests.attention.attention_cases import Spec
from tests.attention.gpu.compile_cases import attention_call, hot_call, store_call
from tests.kivi.gpu.compile_cases import attention_call as kivi_attention_call
from tests.kivi.gpu.compile_cases import store_call as kivi_store_call
from tests.kivi.kivi_cases import Spec as KiviSpec

HEAD_SIZES = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 7, 8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Channels of layer inputs: of Llama-3.2-1B, Llama-3.2-3B, Qwen2.5-7B, Llama-3.1-8B, Qwen3-14B and Llama-3.1-70B.
HIDDEN_SIZES = (2048, 3072, 3584, 4096, 5120, 8192)

_CHAIN: dict[str, Any] = {"kind": "chain", "joint": True, "key_bits": 2, "earlier": (4, 4, 4)}
_X: dict[str, Any] = {"kind": "x", "key_outliers": 0}
# What attention reads. "4 bits" is what is served if nothing is said: one outlier channel of keys, values folded.
_FORMATS = {
    "4 bits": Spec(folded=True),
    "2 bits": Spec(key_bits=2, value_bits=2, folded=True),
    "3 bits": Spec(key_bits=3, value_bits=3, folded=True),
    "8 bits": Spec(key_bits=8, value_bits=8, folded=True),
    "16 bits": Spec(key_bits=16, value_bits=16, folded=True),
    "no outlier": Spec(key_outliers=0),
    "outliers of both": Spec(value_outliers=1),
    "3 bits, 2 of values": Spec(key_bits=3, value_bits=2),
    "norm": Spec(folded=True, norm=True),
    "norm and bias": Spec(norm=True, bias=True),
    "window, cap, sinks": Spec(folded=True, window=100, soft_cap=30.0, sinks=True),
    "no rope": Spec(rope="none"),
    "allocated": Spec(allocated=1.0, folded=True, seed=1),
    "joint": Spec(joint=True),
    "joint allocated": Spec(joint=True, allocated=1.0, seed=2),
    "X": Spec(**_X),
    "X, 3 bits": Spec(**(_X | {"key_bits": 3})),
    "X-CL": Spec(kind="deltas", key_bits=2, earlier=(4, 4, 4)),
    "chain": Spec(**_CHAIN),
    "chain allocated": Spec(**_CHAIN, allocated=1.0, seed=2),
}
_STARRED: dict[str, Any] = {"bits": 2, "block_size": 128, "residual_tokens": 128, "key_group_size": 128, "rope": "neox"}
_KIVI_FORMATS = {
    "KIVI 4": KiviSpec(bits=4),
    "KIVI 2": KiviSpec(bits=2),
    "KIVI* 2": KiviSpec(**_STARRED, value_group_size=64),
}
FORMATS = (*_FORMATS, *_KIVI_FORMATS)


@dataclass(frozen=True)
class Configuration:
    """A layer of a model: its heads, query heads of a kv head, the model's dtype and the cache's format."""

    head_size: int
    group: int
    dtype: str
    form: str

    def __str__(self) -> str:
        return f"{self.form}, heads of {self.head_size} by {self.group} in {self.dtype}"


def configurations(*, every: bool) -> Iterator[Configuration]:
    """All of them, or as many as have every format with heads of every size, groups and dtypes in turn."""
    for (i, form), (j, head_size) in product(enumerate(FORMATS), enumerate(HEAD_SIZES)):
        if every:
            yield from (Configuration(head_size, group, dtype, form) for group, dtype in product(GROUPS, DTYPES))
        else:
            dtype = list(DTYPES)[(i + 2 * j) % len(DTYPES)]
            yield Configuration(head_size, GROUPS[(i + j) % len(GROUPS)], dtype, form)


def calls(of: Configuration) -> Iterator[tuple[str, Callable[[], None]]]:
    """What serving calls for a layer: one query token of a sequence, as many as decode, prompts, stores, hot blocks."""
    most = 64 // (1 << (of.group - 1).bit_length())
    lengths = {"decode": [1] * 4, "drafts": [most] * 4, "prefill": [256]}
    if of.form in _KIVI_FORMATS:
        kivi = _kivi(of)
        yield from ((name, kivi_attention_call(kivi, of_name)) for name, of_name in lengths.items())
        yield from ((f"store {tokens}", kivi_store_call(kivi, tokens)) for tokens in (4, 256))
        return
    spec = _spec(of)
    for name, of_name in lengths.items():
        exact_from = 2 if name == "prefill" and spec.rope != "none" else None
        yield name, attention_call(replace(spec, exact_from=exact_from), of_name)
    for tokens in (4, 256):
        yield f"store {tokens}", store_call(spec, tokens)
        yield f"hot {tokens}", hot_call(spec, tokens)


def served() -> Iterator[tuple[str, Callable[[], None]]]:
    """What a GPU runs most if nothing is set, for a model like Llama-3.1-8B: a minute for all GPUs."""
    spec = _spec(Configuration(128, 4, "bf16", "4 bits"))
    yield "decode", attention_call(spec, [1] * 4)
    yield "prefill", attention_call(spec, [256])
    yield from ((f"store {tokens}", store_call(spec, tokens)) for tokens in (4, 256))


def rotated_stores(dtype: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Stores of layer inputs of models of all sizes."""
    for form, hidden_size, tokens in product(("X", "X-CL"), HIDDEN_SIZES, (4, 256)):
        spec = replace(_spec(Configuration(128, 4, dtype, form)), hidden_size=hidden_size)
        yield f"store {tokens} {form} of {hidden_size}", store_call(spec, tokens)


def _largest_group(width: int) -> int:
    """What ``group_size`` is by default."""
    return next(size for size in range(min(width, 128), 0, -1) if width % size == 0)


def _spec(of: Configuration) -> Spec:
    """With few heads and channels: kernels are not compiled for how many there are."""
    spec, kv_heads, hidden_size = _FORMATS[of.form], 2, 1024
    width = hidden_size if spec.kind in ("x", "deltas") else kv_heads * of.head_size if spec.joint else of.head_size
    group_size = _largest_group(width)
    return replace(
        spec, kv_heads=kv_heads, group=of.group, head_size=of.head_size, hidden_size=hidden_size, key_group=group_size,
        value_group=group_size, dtype=DTYPES[of.dtype],
    )  # fmt: skip


def _kivi(of: Configuration) -> KiviSpec:
    spec = _KIVI_FORMATS[of.form]
    sizes = [size for size in (16, 32, 64) if of.head_size % size == 0 and size <= spec.value_group_size]
    heads = {"head_size": of.head_size, "group": of.group, "value_group_size": max(sizes)}
    return replace(spec, dtype=DTYPES[of.dtype], exact_step=True, **heads)
