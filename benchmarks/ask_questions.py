"""Questions to a model that is served with every cache in turn: 16 bit, FP8, KIVI and ours, by lm-eval over HTTP.

    .venv/bin/python benchmarks/ask_questions.py --models models/smollm2-135m-instruct --lm-eval ~/lm-eval/bin/lm_eval

Every cache is served by examples/lm_eval/run.py, as `vllm serve` serves it to users, and answers the same questions. A
cache that has answered before is not asked again (--again: it is). Results go to
benchmarks/results/accuracy/questions-MODEL.json; with --write the tables of docs/evaluation-vllm.md are made of them.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.questions import BASELINE, write_tables  # noqa: E402
from benchmarks.cpu.machine import machine_facts  # noqa: E402
from benchmarks.files import read_json, write_json  # noqa: E402
from examples.lm_eval import run  # noqa: E402
from examples.lm_eval.makers.orders import QUESTIONS_PER_TEXT  # noqa: E402
from xquant_vllm.evaluation.methods.baselines.kivi import kivi_bytes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
PAGE = ROOT / "docs" / "evaluation-vllm.md"
SAMPLES = ROOT / "logs" / "questions"
# The one with long prompts first: bytes are counted there.
TASKS = ("xquant_orders", "xquant_world", "xquant_functions")
_GROUP_SIZE = 32  # KIVI's, as published


@dataclass(frozen=True)
class Cache:
    """One row of the table.

    Attributes:
        name: what the table calls it.
        backend: of attention.
        settings: of the backend.
        further: options of `vllm serve`.
    """

    name: str
    backend: str = "xquant"
    settings: tuple[tuple[str, Any], ...] = ()
    further: tuple[str, ...] = ()


def _kivi(bits: int, residual: int) -> Cache:
    # Else a prompt would not read its own tokens from the cache.
    settings = (("bits", bits), ("residual", residual), ("prompt", "cached"))
    return Cache(f"KIVI {bits}, residual {residual}", "kivi", settings)


def _ours(name: str, bits: int, **settings: Any) -> Cache:
    return Cache(f"{name}, {bits}", settings=(("bits", bits), *settings.items()))


CACHES = (
    Cache(BASELINE, "CPU_ATTN"),
    _ours("xquant, data-free", 4),
    _kivi(2, 32),
    _ours("xquant, per head", 2),
    Cache("FP8", "CPU_ATTN", further=("--kv-cache-dtype", "fp8")),
    _kivi(4, 32),
    _ours("xquant, per head", 3),
    _ours("xquant, joint", 2, basis="joint"),
    _ours("xquant, per head", 4, calibration="mixed-text"),
    _ours("xquant-cl", 2, method="xquant-cl"),
    _kivi(2, 128),
    Cache("16 bit, once more", "CPU_ATTN"),
)


def main() -> None:
    """Ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--lm-eval", metavar="COMMAND", default="lm_eval", help="default: lm_eval on the PATH")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names; default: all")
    parser.add_argument("--again", action="store_true", help="ask caches that have answered before, too")
    parser.add_argument("--write", action="store_true", help="make the tables of docs/evaluation-vllm.md")
    options = parser.parse_args()
    for model in options.models:
        for cache in CACHES:
            if not options.only or any(part in cache.name for part in options.only):
                ask(model, cache, options)
    if options.write:
        write_tables(read_json(results_of("smollm2-135m-instruct")), PAGE)


def results_of(model: str) -> Path:
    """The file of a model."""
    return RESULTS / f"questions-{model}.json"


def ask(model: Path, cache: Cache, options: argparse.Namespace) -> None:
    """Serve one cache, ask all questions, and put the answers into the model's file."""
    path = results_of(model.name)
    known = read_json(path) if path.exists() else {"rows": []}
    if not options.again and cache.name in {row["name"] for row in known["rows"]}:
        return
    print(cache.name, file=sys.stderr, flush=True)
    samples = SAMPLES / model.name / cache.name.replace(" ", "-").replace(",", "")
    words = [str(model), "--lm-eval", options.lm_eval, "--tasks", *TASKS, "--samples", str(samples)]
    words += ["--backend", cache.backend]
    if cache.settings:
        words += ["--settings", json.dumps(dict(cache.settings))]
    began = time.monotonic()
    found = run.serve_and_evaluate(run.parse([*words, "--", *cache.further]))
    seconds = time.monotonic() - began
    answers = {task: read_samples(samples / f"{task}.jsonl") for task in TASKS}
    lengths = {task: prompt_tokens(model, rows) for task, rows in answers.items()}
    row = {
        "name": cache.name,
        "backend": cache.backend,
        "settings": dict(cache.settings),
        "further": list(cache.further),
        "bytes_per_token": bytes_per_token(cache, found["bytes_per_token"], model, lengths[TASKS[0]]),
        "seconds": round(seconds),
        "right": {task: "".join(str(int(right(answer))) for answer in rows) for task, rows in answers.items()},
    }
    tasks = {
        task: {
            "questions": len(of_task),
            "together": QUESTIONS_PER_TEXT if task == "xquant_orders" else 1,
            "prompt_tokens": round(statistics.mean(of_task)),
        }
        for task, of_task in lengths.items()
    }
    about = {"model": model.name, "dtype": read_json(model / "config.json")["dtype"], "machine": machine_facts()}
    # Answers to other questions do not stand beside these.
    known_rows = known["rows"] if known.get("tasks") == tasks else []
    rows = {kept["name"]: kept for kept in known_rows} | {cache.name: row}
    kept = [rows[other.name] for other in CACHES if other.name in rows]
    write_json(path, {**about, "tasks": tasks, "rows": kept})


def read_samples(path: Path) -> list[dict[str, Any]]:
    """What lm-eval recorded of every question, in their order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def right(answer: dict[str, Any]) -> bool:
    """Whether an answer is right."""
    return bool(answer["exact_match"] if "exact_match" in answer else answer["acc"])


def prompt_tokens(model: Path, answers: list[dict[str, Any]]) -> list[int]:
    """Tokens of every prompt; of several choices the first one's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [answer["arguments"]["gen_args_0"] for answer in answers]
    return [len(tokenizer.encode(text["arg_0"])) for text in texts]


def bytes_per_token(cache: Cache, served: int | None, model: Path, lengths: list[int]) -> float:
    """Bytes of a token in all layers.

    Args:
        cache: which.
        served: what the server's log says, if it says it; of KIVI that is without the residual.
        model: the checkpoint's folder.
        lengths: of long prompts, in which KIVI's residual has its share.
    """
    config = read_json(model / "config.json")
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    channels = kv_heads * (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if cache.backend == "kivi":
        bits, residual = (dict(cache.settings)[name] for name in ("bits", "residual"))
        each = [kivi_bytes(channels, bits, _GROUP_SIZE, residual, tokens) for tokens in lengths]
        return round(layers * statistics.mean(each))
    if served is not None:
        return served
    return 2 * channels * layers * (1 if "fp8" in cache.further else 2)


if __name__ == "__main__":
    main()
