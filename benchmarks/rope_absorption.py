"""How much of a key's rematerialization block-wise absorption of slow RoPE pairs could save: docs/kernels-gpu.md.

    .venv/bin/python benchmarks/rope_absorption.py

Nothing of it is implemented or measured: counts of pairs, and of multiply-adds.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cost_model import ROWS, table

BLOCKS, ORDERS, ERRORS, GROUPS = (16, 32, 64), (0, 1, 2), (1e-2, 1e-3), (1, 4, 8)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model; ``factor`` is of ``rope_type: "llama3"``, 0 without.

    Its other parameters are those of Llama 3.1: low and high frequency factor 1 and 4, 8,192 original positions.
    """

    name: str
    head_size: int
    theta: float
    factor: float = 0.0

    def frequencies(self) -> list[float]:
        """Radians per position of every pair."""
        plain = [self.theta ** (-2 * pair / self.head_size) for pair in range(self.head_size // 2)]
        return [self._scaled(frequency) for frequency in plain] if self.factor else plain

    def _scaled(self, frequency: float) -> float:
        # Turns within the original positions: from 1 to 4 the scaling fades out.
        kept = min(max((8192 * frequency / (2 * math.pi) - 1) / 3, 0.0), 1.0)
        return kept * frequency + (1 - kept) * frequency / self.factor


ROPES = (
    Rope("Llama-3.1-8B", 128, 500_000.0, 8.0),
    Rope("Llama-2-7B", 128, 10_000.0),
    Rope("SmolLM2-135M", 64, 100_000.0),
)


def bound(frequency: float, block: int, order: int) -> float:
    """What a pair's score may be wrong by, relative to the lengths of its query and key, anywhere in a block."""
    return (frequency * block / 2) ** (order + 1) / math.factorial(order + 1)


def absorbable(rope: Rope, block: int, order: int, error: float) -> int:
    """Pairs whose bound is at most an error."""
    return sum(bound(frequency, block, order) <= error for frequency in rope.frequencies())


def products(rope: Rope, width: int, pairs: int, block: int, order: int, group: int, multiple: int = 1) -> float:
    """Multiply-adds for the scores of a token and kv head, over those of rematerializing its whole key.

    Args:
        rope: the embedding.
        width: channels of the latent.
        pairs: pairs that are absorbed, the slowest.
        block: positions of a block.
        order: of the expansion.
        group: queries that share the kv head, query tokens times query heads.
        multiple: rows of a product are padded to a multiple of this.
    """

    def padded(rows: int) -> int:
        return -(-rows // multiple) * multiple

    absorbed = 2 * pairs
    rest = (rope.head_size - absorbed) * (width + padded(group))
    # Queries are absorbed once per block, and score against every latent of it.
    rows = padded(group * (order + 1)) if pairs else 0
    return (rest + rows * width * (1 + absorbed / block)) / (rope.head_size * (width + padded(group)))


def pairs_table() -> str:
    """Absorbable pairs by error, block and order."""
    grid = [(block, order) for block in BLOCKS for order in ORDERS]
    head = ["pairs absorbable", "error", *(f"B {block}, p {order}" for block, order in grid)]
    rows = []
    for rope in ROPES:
        for error in ERRORS:
            name = f"{rope.name} (of {rope.head_size // 2})"
            rows.append([name, f"{error:g}", *(str(absorbable(rope, *at, error)) for at in grid)])
    return table(head, rows)


def savings_table() -> str:
    """What is left of the key products with the best block and order: counted, and with rows padded to 16."""
    head = ["key products left", "error"]
    for group in GROUPS:
        head += [f"G {group}, counted", f"G {group}, 16 rows"]
    rows = []
    for rope in ROPES:
        for error in ERRORS:
            row = [f"{rope.name}, w {rope.head_size}", f"{error:g}"]
            for group in GROUPS:
                for multiple in (1, ROWS):
                    choices = [
                        (products(rope, rope.head_size, pairs, block, order, group, multiple), block, order)
                        for block in BLOCKS
                        for order in ORDERS
                        for pairs in (0, absorbable(rope, block, order, error))
                    ]
                    left, block, order = min(choices)
                    row.append(f"{left:.2f}" if left >= 1 else f"{left:.2f} (B {block}, p {order})")
            rows.append(row)
    return table(head, rows)


def tables() -> list[str]:
    """Every table of the page that this script makes."""
    return [pairs_table(), savings_table()]


if __name__ == "__main__":
    print("\n\n".join(tables()))
