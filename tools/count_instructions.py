"""Count the instructions of attention per tile of 64 tokens and kv head, with VNNI and with AMX.

    python tools/count_instructions.py

Decoding with SmolLM2's shape: latents per head, heads of 64 channels, three query heads per kv head. Counts, and no
times: what the processor would make of them is not known here. A processor without AMX will do, see amx_trap.py; it
must have AVX-512 with VNNI and BF16.
"""

import ctypes
import sys
import tempfile
from pathlib import Path

import amx_trap

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.cpu.layers import BLOCK_SIZE, MODELS, decode_batch, filled_pages, make_plan  # noqa: E402
from xquant_vllm.attention.cpu import kernels, library  # noqa: E402

_TILE, _TILES = 64, (4, 12)  # whole stretches, whose start is shared out to their tiles
SETS = {"VNNI": "vnni", "AMX": "amx-trapped"}


def per_tile(trap: ctypes.CDLL, bits: int) -> dict[str, float]:
    """Instructions of the set in use, by kinds, per tile and kv head."""
    model = MODELS["smollm2-135m"]
    totals = []
    for tiles in _TILES:
        batch = decode_batch(1, tiles * _TILE)
        plan = make_plan(model, "latents", bits, tiles * _TILE)
        pages = filled_pages(plan, tiles * _TILE // BLOCK_SIZE, 1)
        query = torch.randn(1, model.heads, model.head_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        output = torch.empty_like(query)
        kernels.paged_attention(query, pages, plan, batch, output)  # prepares the plan
        with amx_trap.counted(trap, library.LIBRARY_PATH) as counts:
            kernels.paged_attention(query, pages, plan, batch, output)
        totals.append(counts)
    share = model.kv_heads * (_TILES[1] - _TILES[0])
    return {kind: (totals[1][kind] - totals[0][kind]) / share for kind in amx_trap.KINDS}


def print_table(trap: ctypes.CDLL) -> None:
    """Of both instruction sets, at 4 and 2 bits."""
    print("| bits | set |", " | ".join(amx_trap.KINDS), "| all |")
    print("|---|---|" + "---|" * (len(amx_trap.KINDS) + 1))
    for bits in (4, 2):
        for name, isa in SETS.items():
            if not library.set_isa(isa):
                sys.exit(f"this processor or this build has no {isa}; build with `make kernels`")
            found = per_tile(trap, bits)
            cells = [f"{count:,.0f}" for count in (*found.values(), sum(found.values()))]
            print(f"| {bits} | {name} |", " | ".join(cells), "|")


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trap = amx_trap.build(Path(folder))
        with amx_trap.trapped(trap):
            print_table(trap)


if __name__ == "__main__":
    main()
