"""What bench_decode_attention.py and bench_store.py share: options, rows and the table."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.layers import MODELS
from benchmarks.cpu.machine import machine_facts
from benchmarks.cpu.timing import Spread, ratios
from benchmarks.cpu.work import Roofs, Work
from benchmarks.files import write_json

BASELINE = "CPU_ATTN BF16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of both."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2-135m"], help="whose layers")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2], help="bits of the codes (default 4 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one per core")
    parser.add_argument("--rounds", type=int, default=15, help="how often every variant is timed, in turns")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, too")


def variant_row(name: str, taken: dict[str, list[float]], layers: int, work: Work, roofs: Roofs) -> dict[str, Any]:
    """One line of the table: microseconds of a layer, speed relative to the baseline, share of the roof."""
    floor, binding = roofs.seconds(work)
    spread = Spread.of([seconds / layers for seconds in taken[name]])
    return {
        "variant": name,
        "microseconds": spread.scaled(1e6),
        "speed_of_baseline": ratios(taken, name, BASELINE).scaled(1),
        "roof": floor / spread.median,
        "binding": binding,
        "roofs": asdict(roofs),
        "bytes": work.bytes,
        "multiply_adds": {"fp32": work.fp32, "int16": work.int16, "int8": work.int8},
    }


def report(what: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Print and keep."""
    result = {
        "benchmark": what,
        "machine": machine_facts(),
        "rows": rows,
    }
    if options.out:
        write_json(options.out, result)
    if options.json:
        print(json.dumps(result))
        return result
    print(f"{what}: microseconds per layer (quartiles), on {options.threads} threads")
    for row in rows:
        time, speed = row["microseconds"], row["speed_of_baseline"]
        print(
            f"  {row['model']:14s} {row['shape']:12s} {row['variant']:14s} {time['median']:9.1f} "
            f"({time['low']:.1f}-{time['high']:.1f})  {speed['median']:.2f}x of {BASELINE} "
            f"({speed['low']:.2f}-{speed['high']:.2f})  {row['roof']:4.0%} of the {row['binding']} roof"
        )
    return result
