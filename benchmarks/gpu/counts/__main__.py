"""``make gpu-counts``: prints a table, and as its last line one JSON object of the served default."""

import argparse
import json
import warnings
from functools import partial
from typing import Any

from benchmarks.gpu.counts import rows
from benchmarks.gpu.counts.count import PER, Counted, count, count_store
from benchmarks.gpu.counts.pipes import DEVICES, H100, PIPES
from benchmarks.gpu.counts.simulate import resident, simulate
from tests.attention.gpu.variants import variants

OF_MEMORY, ISSUED = 0.8, 2.5
"""What kernels are taken to reach of the bandwidth of memory, and warp instructions per clock, of 4."""

SIMULATION_IS_FAST = 1.25
"""What ``known`` found: by so much the simulation is too fast. Simulated figures are divided by it."""


def flash_clocks(head_size: int = rows.HEAD_SIZE) -> float:
    """Clocks of an SM of an H100 that 16-bit attention takes for 64 tokens of one kv head: memory binds it."""
    return PER * 2 * head_size * 2 / H100.bytes_per_clock(OF_MEMORY)


def speed(counted: Counted) -> float:
    """Over 16-bit attention, on an H100, if ``ISSUED`` instructions are issued per clock and memory is no slower."""
    memory = PER * counted.row.number_bytes / rows.KV_HEADS / H100.bytes_per_clock(OF_MEMORY)
    return flash_clocks(counted.row.head_size) / max(counted.instructions / ISSUED, memory)


def simulated(counted: Counted) -> str:
    """Clocks per 64 tokens and kv head in two cases: no load leaves L1, all come from device memory."""
    sm = DEVICES.get(counted.row.capability)
    if sm is None:
        return "-"
    programs = resident(sm, counted.warps, counted.registers, counted.shared)
    found = []
    for latency in (sm.near, sm.far):
        of = simulate(counted.trace, sm, programs, counted.warps, latency)
        found.append(of.clocks * SIMULATION_IS_FAST * PER / counted.tokens / programs)
    return f"{found[0]:,.0f} - {found[1]:,.0f}"


def line(row: rows.Row) -> tuple[str, dict[str, Any]]:
    """A row of the table, and what JSON has of the served default."""
    counted = count(row)
    programs = resident(DEVICES.get(row.capability, H100), counted.warps, counted.registers, counted.shared)
    cells = [
        row.name, counted.kernel, f"{counted.instructions:,.0f}", *(f"{of:,.0f}" for of in counted.by_pipe.values()),
        f"{counted.barriers:.0f}", str(counted.registers), str(counted.spilled), f"{counted.shared:,}", str(programs),
        f"{speed(counted):.2f}" if row.capability == H100.capability and row.kernel is None else "-",
        simulated(counted),
    ]  # fmt: skip
    facts = {
        "decode_warp_instructions": round(counted.instructions),
        "decode_registers": counted.registers,
        "decode_spills": counted.spilled,
        "decode_speed_ipc25": round(speed(counted), 3),
    }
    return "| " + " | ".join(cells) + " |", facts


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--served", action="store_true", help="only the served default")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    head = (
        "cache", "kernel", "warp instructions", *PIPES, "barriers", "registers", "spilled", "shared", "programs per SM",
        f"speed at {ISSUED} a clock", "simulated clocks",
    )  # fmt: skip
    print(
        f"Counted from machine code, nothing measured: per {PER} cached tokens and kv head, Llama-3.1-8B's heads, "
        f"BF16, sm_90 unless named otherwise.\n16-bit attention takes {flash_clocks():,.0f} clocks there.\n"
    )
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    text, facts = line(rows.served())
    print(text, flush=True)
    for name, row in rows.other_heads().items():
        text, of_row = line(row)
        print(text, flush=True)
        facts |= {f"{name}_{what}": of_row[f"decode_{what}"] for what in ("warp_instructions", "spills")}
    if not arguments.served:
        for row in rows.others():
            print(line(row)[0], flush=True)
    stored = {tokens: count_store(partial(rows.store_served, tokens), rows.KV_HEADS) for tokens in (1, 8192)}
    print(
        "\nStores of the served default, warp instructions per token: "
        f"{stored[1]:,.0f} of 1 token, {stored[8192]:,.0f} of 8192"
    )
    started, later = variants("latents")
    print(f"\nVariants compiled when an engine starts: {started}; beyond these while serving: {later}")
    print(json.dumps({**facts, "store_warp_instructions": round(stored[8192]), "jit_variants": sum(later.values())}))


if __name__ == "__main__":
    main()
