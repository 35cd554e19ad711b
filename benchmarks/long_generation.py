"""Long generations: what a quantized cache makes of a text that is written into it and read back for 1,024 tokens.

    python benchmarks/long_generation.py --methods xquant calibrated-4 calibrated-3 kivi

Every cache continues the same prompts, through vLLM as it is served. The model with its 16-bit cache then says how
likely it finds every text, its own ones too: errors that add up would make texts less and less likely. A row's
difference is taken prompt by prompt, with the 95% interval of the bootstrap over prompts.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.generations import row, same_tokens, scores, spread  # noqa: E402
from benchmarks.files import read_json, report, write_json  # noqa: E402
from benchmarks.methods import BASELINE, METHODS, Method  # noqa: E402
from benchmarks.models import served  # noqa: E402
from benchmarks.offline.engines import Engine, EngineError  # noqa: E402
from xquant_vllm.cli.eval_output import text_of  # noqa: E402
from xquant_vllm.evaluation.tasks.windows import cut_windows  # noqa: E402
from xquant_vllm.offline.checkpoint import open_checkpoint  # noqa: E402
from xquant_vllm.offline.tokenizer import load_tokenizer  # noqa: E402

_SEED = 1
# Parts of a text that are looked at one by one.
_PARTS = 4


class GenerationEngine(Engine):
    """An engine that generates and judges."""

    module = "benchmarks.offline.generation"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it printed."""
    options = _options(arguments)
    return report(run(options), text, options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Let every cache generate, and the 16-bit one judge."""
    tokenizer = load_tokenizer(open_checkpoint(options.model))
    about, name = text_of(options)
    prompts = cut_windows(tokenizer, about, name, options.prompt, options.prompts, options.prompt).tolist()
    order = {"prompts": prompts, "tokens": options.tokens, "temperature": options.temperature, "seed": _SEED}
    names = [BASELINE, *(name for name in options.methods if name != BASELINE)]
    kept = _Kept(options.keep, {"model": Path(options.model).name, "dtype": options.dtype, **order})
    made: dict[str, list[list[int]]] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            made[name] = kept.get(f"{name}-texts", lambda name=name: _generate(METHODS[name], options, order))
        except EngineError as error:
            absent[name] = str(error)
    judged = {}
    with contextlib.closing(_Judge(options, prompts)) as judge:
        for cache, texts in made.items():
            nll = kept.get(f"{cache}-nll", lambda texts=texts: judge.nll(texts))
            judged[cache] = scores(texts, nll, _PARTS, options.tokens)
    rows = []
    for cache, found in judged.items():
        same = [same_tokens(*pair) for pair in zip(made[cache], made[BASELINE], strict=True)]
        rows.append({"method": cache, **row(found, judged[BASELINE], same)})
    return {
        "benchmark": "long_generation",
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "text": name,
        "prompts": options.prompts,
        "prompt_tokens": options.prompt,
        "tokens": options.tokens,
        "temperature": options.temperature,
        "absent": absent,
        "rows": rows,
    }


def _engine(method: Method, options: argparse.Namespace) -> Engine:
    arguments = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": options.prompt + options.tokens + 1,
        "max_num_seqs": options.prompts,
        "kv_cache_memory_bytes": options.cache_mib << 20,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    return GenerationEngine(method, arguments, options.logs)


def _generate(method: Method, options: argparse.Namespace, order: dict[str, Any]) -> list[list[int]]:
    """The texts of a cache; its engine is gone then."""
    engine = _engine(served(method, Path(options.model)), options)
    try:
        engine.ready()
        texts: list[list[int]] = engine.run("generate", **order)["texts"]
    finally:
        engine.stop()
    print(f"{method.label}: {sum(map(len, texts)):,} tokens", file=sys.stderr)
    return texts


class _Judge:
    """The model with its 16-bit cache, which is started when the first text is to be judged."""

    def __init__(self, options: argparse.Namespace, prompts: list[list[int]]) -> None:
        self._options, self._prompts = options, prompts
        self._engine: Engine | None = None

    def nll(self, texts: list[list[int]]) -> list[list[float]]:
        """Of every token."""
        if self._engine is None:
            self._engine = _engine(METHODS[BASELINE], self._options)
            self._engine.ready()
        found: list[list[float]] = self._engine.run("judge", prompts=self._prompts, texts=texts)["nll"]
        return found

    def close(self) -> None:
        """End it."""
        if self._engine is not None:
            self._engine.stop()


class _Kept:
    """What is known already: generating takes minutes for every cache, and judging as long again."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder = folder / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def get(self, name: str, find: Callable[[], Any]) -> Any:
        """It, or what ``find`` finds, which is kept then."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            write_json(path, find())
        return read_json(path)


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['model']}, {result['prompts']} prompts, up to {result['tokens']} tokens each, temperature "
        f"{result['temperature']:g}; nats per token by the 16-bit model, differences prompt by prompt, 95% intervals",
        f"{'':32}{'nats':>7}  {'difference':24}{'repeated':>9}{'length':>8}{'same':>7}",
    ]
    for entry in result["rows"]:
        lines.append(
            f"{METHODS[entry['method']].label:32}{entry['nll']['mean']:7.3f}  {spread(entry['difference']['nll']):24}"
            f"{entry['repetition']['mean']:9.1%}{entry['length']['mean']:8.0f}{entry['same_tokens']:7.0f}"
        )
    lines += [f"not here: {why}" for why in result["absent"].values()]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["xquant", "calibrated-4", "calibrated-3"])
    parser.add_argument("--text", metavar="FILE", help="where prompts are from (default: Python's documentation)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS", help="of each (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="to generate at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--cache-mib", type=int, default=2048, help="of every engine")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "long_generation", metavar="DIR")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "logs" / "generations", metavar="DIR", help="of texts so far"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.set_defaults(dataset=None)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
