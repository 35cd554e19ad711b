"""The losses that `xquant plan` expects, taken out of the result files: xquant_vllm/planning/losses.json.

    python benchmarks/accuracy/losses.py

A test fails where that file is not what this makes. `compare_accuracy.py --write` makes it, too.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
LOSSES = ROOT / "xquant_vllm" / "planning" / "losses.json"

# Of the models on which everything was measured: hidden size, query heads, kv heads, channels of a head, layers.
SHAPES = {
    "smollm2-135m-instruct": (576, 9, 3, 64, 30),
    "smollm2-135m-instruct-mha": (576, 9, 9, 64, 30),
    "gemma-3-270m": (640, 4, 1, 256, 18),
}
# Names of rows, and what a plan calls them: method, calibrated. With multi-head attention the data-free default is X.
ROWS = {
    "xquant, data-free, {}": ("xquant", False),
    "xquant, per head, {}": ("xquant", True),
    "xquant, data-free joint, {}": ("joint", False),
    "xquant, joint, {}": ("joint", True),
    "xquant-cl, data-free, {}": ("xquant-cl", False),
    "xquant-cl, {}": ("xquant-cl", True),
    "KIVI {}, residual 128": ("kivi", False),
}


def losses(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the package ships.

    Args:
        results: of every model, as benchmarks/results/accuracy has them.
    """
    return {"models": [_of_model(result) for result in results if result["model"] in SHAPES]}


def _of_model(result: dict[str, Any]) -> dict[str, Any]:
    hidden, heads, kv_heads, head_size, layers = SHAPES[result["model"]]
    rows = {row["name"]: row for row in result["rows"]}
    kept = []
    for pattern, (method, calibrated) in ROWS.items():
        for bits in (8, 4, 3, 2):
            row = rows.get(pattern.format(bits))
            if row is None:
                continue
            narrow = (method, calibrated) == ("xquant", False) and hidden < 2 * kv_heads * head_size
            kept.append(
                {
                    "method": "x" if narrow else method,
                    "bits": bits,
                    "calibrated": calibrated,
                    "increase": round(row["increase"], 4),
                    "kl": round(row["kl"], 5),
                }
            )
    return {
        "model": result["model"],
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "layers": layers,
        "rows": kept,
    }


def text(folder: Path = RESULTS) -> str:
    """The file as it should be."""
    return json.dumps(losses(results(folder)), indent=1) + "\n"


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What compare_accuracy.py has written, of every model; answers to questions are in the same folder."""
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith("questions-")]
    return [json.loads(path.read_text()) for path in paths]


if __name__ == "__main__":
    LOSSES.write_text(text())
    print(LOSSES)
    sys.exit(0)
