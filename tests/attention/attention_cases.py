"""Random layers and batches: those of benchmarks/gpu/cases.py, which the GPU suite checks kernels on, too."""

import random

import torch

from benchmarks.gpu.cases import (
    ABSURD_BLOCKS,
    MAX_POSITION,
    Case,
    Spec,
    make_case,
    make_plan,
    random_latents,
    random_runs,
)

__all__ = [
    "ABSURD_BLOCKS",
    "MAX_POSITION",
    "Case",
    "Spec",
    "make_case",
    "make_plan",
    "random_latents",
    "random_runs",
    "random_spec",
]


def random_spec(seed: int) -> Spec:
    """Every option drawn evenly. (Hypothesis varies few of them at a time and left bugs of rare pairs unseen.)"""
    choose = random.Random(seed)
    kv_heads, head_size = choose.randint(1, 3), choose.choice((8, 16, 24, 64, 72, 80, 128))
    joint = choose.random() < 0.5
    width = kv_heads * head_size if joint else head_size
    groups = [size for size in range(8, width + 1, 8) if width % size == 0]
    bits = (16, 8, 8, 4, 4, 3, 3, 2, 2)
    kind = choose.choice(("latent", "latent", "x", "deltas", "chain"))
    hidden_size = choose.choice((64, 72, 192, 320, 520))
    if kind in ("x", "deltas"):
        joint, groups = True, [size for size in range(8, hidden_size + 1, 8) if hidden_size % size == 0]
    if kind == "chain":
        head_size = -(-head_size // 16) * 16  # terms that others follow are multiples of 16
        width = kv_heads * head_size if joint else head_size
        groups = [size for size in range(8, width + 1, 8) if width % size == 0]
    seqs = []
    for _ in range(choose.randint(1, 4)):
        past, new = (
            choose.choice((0, choose.randint(0, 40), choose.randint(0, 600))),
            choose.choice((1, 1, 0, 2, 17, 70)),
        )
        seqs.append((past + new, new))
    return Spec(
        seqs=tuple(seqs),
        kv_heads=kv_heads,
        group=choose.choice((1, 2, 3, 4, 7, 9)),
        head_size=head_size,
        joint=joint,
        kind=kind,
        earlier=tuple(choose.choice(bits) for _ in range(choose.randint(1, 4))),
        hidden_size=hidden_size,
        key_bits=choose.choice(bits),
        value_bits=choose.choice(bits),
        key_group=choose.choice(groups),
        value_group=choose.choice(groups),
        key_outliers=choose.randint(0, 3),
        value_outliers=choose.randint(0, 3),
        block_size=choose.choice((16, 32, 48, 128)),
        dtype=choose.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        bias=choose.random() < 0.5,
        norm=choose.random() < 0.5,
        rope=choose.choice(("neox", "interleaved", "none")),
        rotary_size=choose.choice((None, head_size // 2, 2)),
        window=choose.choice((None, None, 1, 7, 16, 100, 300)),
        soft_cap=choose.choice((None, None, 5.0, 30.0)),
        strided=choose.random() < 0.5,
        seed=seed,
        allocated=choose.choice((0.0, 0.0, 0.6, 1.0)),
        sinks=choose.random() < 0.3,
        folded=choose.random() < 0.4,
    )
