"""Long contexts: loss by distance from the start, and numbers found in long texts, of every cache beside 16 bit.

    python benchmarks/long_context.py --model models/smollm2-135m-instruct --lengths 4096 8192

What is read are windows of a text, and prompts that hide a number in it, as `xquant eval perplexity --position-buckets`
and `xquant eval needle` make them: in FP32, every attended token read back from the cache. With --copies windows also
say passages twice, at several distances (benchmarks/accuracy/copies.py). The 16-bit model runs once
for all caches. A result is written after every cache, so an interrupted run has lost no more than one. What the file
has is not computed again: other caches, lengths and prompts are put beside it.

    python benchmarks/long_context.py --yarn 2 --lengths 12288 --prompts 12288 --depths 0.5

reads farther than the model was made for: its RoPE is stretched by YaRN, as config.json would say it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.copies import copy_window, repeated, score_copies  # noqa: E402
from benchmarks.accuracy.held import HeldRows  # noqa: E402
from benchmarks.files import read_json, write_json  # noqa: E402
from xquant_vllm.cli.eval_output import text_of  # noqa: E402
from xquant_vllm.evaluation.methods.method_options import MethodOptions  # noqa: E402
from xquant_vllm.evaluation.methods.methods import prepare_method  # noqa: E402
from xquant_vllm.evaluation.model.cache_method import CacheMethod  # noqa: E402
from xquant_vllm.evaluation.model.hooked_model import HookedModel  # noqa: E402
from xquant_vllm.evaluation.model.logits import Rows  # noqa: E402
from xquant_vllm.evaluation.tasks.needle import evaluate_needles  # noqa: E402
from xquant_vllm.evaluation.tasks.needle_prompts import needle_prompts  # noqa: E402
from xquant_vllm.evaluation.tasks.needle_result import needle_result  # noqa: E402
from xquant_vllm.evaluation.tasks.positions import bucket_ends, position_table, score_positions  # noqa: E402
from xquant_vllm.evaluation.tasks.windows import cut_windows  # noqa: E402
from xquant_vllm.offline.checkpoint import open_checkpoint  # noqa: E402
from xquant_vllm.offline.tokenizer import load_tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "accuracy" / "long-context"
STRETCHED = ROOT / "logs" / "yarn"
_BUCKETS = 8
_OF_NEEDLES = ("accuracy", "accuracy_16bit", "nll", "nll_16bit")
# What rows are called, and the method with its bits and further options.
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "xquant, per head, 4": ("xquant", {"bits": (4,), "basis": "head"}),
    "xquant, per head, 3": ("xquant", {"bits": (3,), "basis": "head"}),
    "xquant, per head, 2": ("xquant", {"bits": (2,), "basis": "head"}),
    "xquant, joint, 2": ("xquant", {"bits": (2,), "basis": "joint"}),
    "xquant-cl, 2": ("xquant-cl", {"bits": (2,)}),
    "xquant, data-free, 4": ("xquant", {"bits": (4,), "calibration": "none"}),
    "KIVI* 4": ("kivi-pre-rope", {"bits": (4,)}),
    "KIVI* 3": ("kivi-pre-rope", {"bits": (3,)}),
    "KIVI* 2": ("kivi-pre-rope", {"bits": (2,)}),
    "KIVI 2, residual 128": ("kivi", {"bits": (2,), "residual": 128}),
    "TurboQuant 4": ("turboquant", {"bits": (4,)}),
}


def _logits(model: HookedModel, method: CacheMethod) -> Callable[..., Rows]:
    def run(tokens: torch.Tensor, last: int | None = None) -> Rows:
        return model.rows(tokens, method) if last is None else model.logits(tokens, method, last)

    return run


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    folder = options.model if options.yarn is None else str(with_yarn(Path(options.model), options.yarn))
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    text, name = text_of(options)
    out = options.out or RESULTS / f"{checkpoint.name}.json"
    about = {
        "model": checkpoint.name,
        "text": name,
        "windows": options.windows,
        "depths": options.depths,
        "trials": options.trials,
    }
    result = read_json(out) if out.exists() else {}
    if {key: result.get(key) for key in about} != about:
        result = {"benchmark": "long_context", **about, "rows": []}
    model = HookedModel(checkpoint, torch.float32, torch.device("cpu"))
    windows = {
        length: cut_windows(tokenizer, text, name, length, options.windows, length) for length in options.lengths
    }
    of_text = {str(length): repeated(some, bucket_ends(length, _BUCKETS)) for length, some in windows.items()}
    result["repeated"] = result.get("repeated", {}) | of_text
    prompts = []
    if options.prompts:
        prompts = list(needle_prompts(tokenizer, text, name, options.prompts, options.depths, options.trials))
    copies = {
        length: [
            copy_window(tokens, turn)
            for turn, tokens in enumerate(cut_windows(tokenizer, text, name, length, options.windows, length))
        ]
        for length in options.copies
    }
    run, held = _logits(model, CacheMethod()), HeldRows()

    def exact(tokens: torch.Tensor, last: int | None = None) -> Rows:
        return held.of(tokens, last, lambda: run(tokens, last))

    rows = {row["name"]: row for row in result["rows"]}
    for row in options.caches or CACHES:
        known = rows.get(row, {"name": row, "positions": {}, "needle": None, "copies": []})
        asked = {cell["length"] for cell in (known["needle"] or {"cells": []})["cells"]}
        new_windows = {length: some for length, some in windows.items() if str(length) not in known["positions"]}
        new_prompts = [prompt for prompt in prompts if prompt.length not in asked]
        copied = {entry["length"] for entry in known.get("copies", [])}
        new_copies = {length: some for length, some in copies.items() if length not in copied}
        if not new_windows and not new_prompts and not new_copies:
            continue
        method, settings = CACHES[row]
        longest = max([*options.lengths, *options.prompts, *options.copies])
        prepared = prepare_method(method, MethodOptions(**settings), checkpoint, torch.float32, longest)
        read = _logits(model, prepared.build(model))
        positions = {}
        for length, of_length in new_windows.items():
            scores = [score_positions(tokens, exact(tokens), read(tokens), _BUCKETS) for tokens in of_length]
            positions[str(length)] = position_table(scores, length)
        cells = []
        if new_prompts:
            found = list(evaluate_needles(new_prompts, exact, read))
            cells = needle_result(prepared, 0, new_prompts, found, {})["cells"]
        of_copies = [entry for some in new_copies.values() for entry in score_copies(some, exact, read)]
        rows[row] = with_more({"bytes_per_token": prepared.bytes_per_token, **known}, positions, cells, of_copies)
        result["rows"] = list(rows.values())
        write_json(out, result)
        print(_text(rows[row]), flush=True)
    write_json(out, result)


def with_yarn(model: Path, factor: float, folder: Path = STRETCHED) -> Path:
    """A folder of the same weights, whose config.json says that RoPE is stretched by YaRN.

    Args:
        model: the checkpoint's folder, with plain RoPE of one kind.
        factor: by how much more than the positions it has.
        folder: where such folders are.
    """
    config = read_json(model / "config.json")
    rope, positions = config["rope_parameters"], config["max_position_embeddings"]
    if rope.get("rope_type") != "default":
        raise SystemExit(f"{model} has RoPE {rope}, and --yarn needs one of the type 'default'")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": positions}
    config |= {"rope_parameters": rope | yarn, "max_position_embeddings": round(factor * positions)}
    copy = folder / f"{model.resolve().name}-yarn-{factor:g}"
    copy.mkdir(parents=True, exist_ok=True)
    write_json(copy / "config.json", config)
    for path in model.iterdir():
        if path.name != "config.json" and not (copy / path.name).exists():
            (copy / path.name).symlink_to(path.resolve())
    return copy


def with_more(
    row: dict[str, Any], positions: dict[str, Any], cells: list[dict[str, Any]], copies: list[dict[str, Any]]
) -> dict[str, Any]:
    """A row with more windows, more prompts that hide a number, and more copies.

    Args:
        row: what is known.
        positions: scores by position, for every length.
        cells: of needles, for every length and depth.
        copies: scores of what is said again, for every length and distance.
    """
    all_copies = sorted([*row.get("copies", []), *copies], key=lambda entry: (entry["length"], entry["distance"]))
    by_length = sorted((row["positions"] | positions).items(), key=lambda entry: int(entry[0]))
    all_cells = [*(row["needle"] or {"cells": []})["cells"], *cells]
    all_cells.sort(key=lambda cell: (cell["length"], cell["depth"]))
    needle = None
    if all_cells:
        prompts = sum(cell["prompts"] for cell in all_cells)
        means = {name: sum(cell["prompts"] * cell[name] for cell in all_cells) / prompts for name in _OF_NEEDLES}
        needle = {**means, "cells": all_cells}
    return row | {"positions": dict(by_length), "needle": needle, "copies": all_copies}


def _text(row: dict[str, Any]) -> str:
    lines = [row["name"]]
    for length, table in row["positions"].items():
        lines.append(f"  {length:>6} KL by position: " + " ".join(f"{bucket['kl']:.4f}" for bucket in table))
    for entry in row["copies"]:
        lines.append(
            f"  {entry['length']:>6} copies from {entry['distance']} tokens before: KL {entry['kl']:.4f}, perplexity "
            f"{entry['perplexity']:.3f} ({entry['perplexity_16bit']:.3f})"
        )
    if row["needle"] is not None:
        needle = row["needle"]
        lines.append(
            f"         found {needle['accuracy']:.0%} ({needle['accuracy_16bit']:.0%}), nats {needle['nll']:.3f} "
            f"({needle['nll_16bit']:.3f})"
        )
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="stretch RoPE by YaRN, so many times")
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096, 8192], help="tokens of windows")
    parser.add_argument("--windows", type=int, default=1, help="of every length (default %(default)s)")
    parser.add_argument("--prompts", nargs="*", type=int, help="tokens of prompts with numbers (default: as windows)")
    parser.add_argument("--copies", nargs="*", type=int, default=[], help="tokens of windows with copies")
    parser.add_argument("--depths", nargs="*", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="of numbers")
    parser.add_argument("--trials", type=int, default=1, help="prompts per length and depth")
    parser.add_argument("--caches", nargs="+", choices=CACHES, metavar="NAME", help="default: all")
    parser.add_argument("--text", metavar="FILE", help="default: Python's documentation")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.set_defaults(dataset=None)
    options = parser.parse_args(arguments)
    options.prompts = options.lengths if options.prompts is None else options.prompts
    return options


if __name__ == "__main__":
    main()
