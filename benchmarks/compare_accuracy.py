"""Accuracy per byte: 16 bit, KIVI, TurboQuant, the paper's XQuant and XQuant-CL, and ours, in one run.

    .venv/bin/python benchmarks/compare_accuracy.py --models models/smollm2-135m-instruct --texts python-docs LICENSE

Every method reads all attended tokens back from its cache, on the same windows of the same texts, offline on the
transformers model (FP32). Bytes are those of all layers, everything counted. Scores are kept in --resume as they are
found, so an interrupted run goes on where it stopped. Results go to benchmarks/results/accuracy/MODEL.json; with
--write the table of docs/accuracy.md and the plot beside it are made from all results that are there.
"""

import argparse
import contextlib
import gc
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import losses  # noqa: E402
from benchmarks.accuracy.held import HeldRows  # noqa: E402
from benchmarks.accuracy.plot import plot  # noqa: E402
from benchmarks.accuracy.table import write_table  # noqa: E402
from xquant_vllm.cli.main import main as xquant  # noqa: E402
from xquant_vllm.evaluation.engines.offline_engine import OfflineEngine  # noqa: E402
from xquant_vllm.evaluation.files import replace_json  # noqa: E402
from xquant_vllm.evaluation.model.logits import Rows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a name, and the options of ``xquant eval perplexity`` that make it."""

    name: str
    options: tuple[str, ...]


def candidates(gqa: bool, hybrid: bool, several_heads: bool) -> list[Candidate]:
    """What is compared on a model.

    Args:
        gqa: whether keys and values are narrower than the layer input.
        hybrid: whether layers are of several kinds, over which no chain is served.
        several_heads: whether there is more than one kv head, so that a data-free joint basis is another one.
    """
    rows = []
    for bits in (2, 4, 3):
        some = ("--bits", str(bits))
        rows += [
            Candidate(f"KIVI* {bits}", ("--method", "kivi-pre-rope", *some)),
            Candidate(f"TurboQuant {bits}", ("--method", "turboquant", *some)),
            Candidate(f"XQuant, as printed, {bits}", ("--method", "paper-xquant", *some)),
        ]
        if not hybrid:
            rows.append(Candidate(f"XQuant-CL, as printed, {bits}", ("--method", "paper-xquant-cl", *some)))
        if gqa:
            rows.append(Candidate(f"xquant, per head, {bits}", ("--method", "xquant", *some, "--basis", "head")))
        rows.append(Candidate(f"xquant, joint, {bits}", ("--method", "xquant", *some, "--basis", "joint")))
        if not hybrid:
            rows.append(Candidate(f"xquant-cl, {bits}", ("--method", "xquant-cl", *some)))
    for bits in (8, 4, 3, 2):
        untold = ("--bits", str(bits), "--calibration", "none")
        rows.append(Candidate(f"xquant, data-free, {bits}", ("--method", "xquant", *untold)))
        if bits == 8:  # nearly exact already
            continue
        if gqa and several_heads:
            rows.append(
                Candidate(f"xquant, data-free joint, {bits}", ("--method", "xquant", *untold, "--basis", "joint"))
            )
        if not hybrid:
            rows.append(Candidate(f"xquant-cl, data-free, {bits}", ("--method", "xquant-cl", *untold)))
    for bits in (4, 2):
        rows.append(Candidate(f"KIVI {bits}", ("--method", "kivi", "--bits", str(bits))))
        residual = ("--method", "kivi", "--bits", str(bits), "--residual", "128")
        rows.append(Candidate(f"KIVI {bits}, residual 128", residual))
    return rows


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--texts", nargs="+", default=["python-docs", str(ROOT / "LICENSE")], metavar="FILE")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2, help="of every text (default %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names; default: all")
    parser.add_argument("--resume", type=Path, default=ROOT / "logs" / "accuracy", metavar="DIR")
    parser.add_argument("--write", action="store_true", help="make docs/accuracy.md and its plot from all results")
    options = parser.parse_args()
    for model in options.models:
        with sixteen_bits_once():
            compare(model, options)
    if options.write:
        results = losses.results()
        write_table(results, ROOT / "docs" / "accuracy.md")
        plot(results, ROOT / "docs" / "pictures" / "accuracy.png")
        losses.LOSSES.write_text(losses.text())


def compare(model: str, options: argparse.Namespace) -> None:
    """All methods on one model."""
    config = json.loads((Path(model) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hybrid = len(set(config.get("layer_types") or ["one"])) > 1
    chosen = [
        row
        for row in candidates(kv_heads < heads, hybrid, kv_heads > 1)
        if not options.only or any(part in row.name for part in options.only)
    ]
    for row in tqdm(chosen, desc=Path(model).name, unit="method"):
        scores = []
        for text in options.texts:
            scores.append(evaluate(model, row, text, options))
            gc.collect()
        found = merge(row.name, scores)
        keep(Path(model).name, found, options)
        tqdm.write(json.dumps({key: found[key] for key in ("name", "bytes_per_token", "increase", "kl")}))


@contextlib.contextmanager
def sixteen_bits_once() -> Iterator[None]:
    """All rows have the same windows: the logits with the 16-bit cache are computed for the first row, and held."""
    compute, held = OfflineEngine.reference, HeldRows()

    def reference(engine: OfflineEngine, tokens: torch.Tensor, last: int | None = None) -> Rows:
        return held.of(tokens, last, lambda: compute(engine, tokens, last))

    OfflineEngine.reference = reference
    try:
        yield
    finally:
        OfflineEngine.reference = compute


def keep(model: str, row: dict, options: argparse.Namespace) -> None:
    """Put a row into the model's result file, in the place of an older one."""
    path = RESULTS / f"{model}.json"
    about = {
        "model": model,
        "texts": [Path(text).name for text in options.texts],
        "window": options.window,
        "windows": options.windows,
    }
    known: dict[str, dict] = {}
    if path.exists():
        content = json.loads(path.read_text())
        # Rows of other texts or windows do not stand beside these.
        if {key: content[key] for key in about} == about:
            known = {kept["name"]: kept for kept in content["rows"]}
    known[row["name"]] = row
    replace_json(path, about | {"rows": list(known.values())})


def evaluate(model: str, row: Candidate, text: str, options: argparse.Namespace) -> dict:
    """One method on one text, as ``xquant eval perplexity`` does it."""
    arguments = ["eval", "perplexity", model, *row.options, "--text", text, "--resume", str(options.resume)]
    arguments += ["--window", str(options.window), "--windows", str(options.windows), "--json"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = xquant(arguments)
    if status:
        raise SystemExit(status)
    return json.loads(printed.getvalue().splitlines()[-1])


def merge(name: str, scores: list[dict]) -> dict:
    """One row of several texts: means over texts of the increase, the divergence and the agreement."""
    first = scores[0]
    return {
        "name": name,
        "bytes_per_token": first["bytes_per_token"],
        "bytes_per_token_16bit": first["bytes_per_token_16bit"],
        "increase": sum(score["increase"] for score in scores) / len(scores),
        "kl": sum(score["kl"] for score in scores) / len(scores),
        "top1_agreement": sum(score["top1_agreement"] for score in scores) / len(scores),
        "texts": scores,
    }


if __name__ == "__main__":
    main()
