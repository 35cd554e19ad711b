"""The part of bench_cpu.py that measures hot blocks, and the same caches cold."""

from pathlib import Path
from typing import Any

from benchmarks import bench_offline, bench_prefix_hit, bench_serving
from benchmarks.cpu.summary import CHAIN, CHAIN_PRESSURE, HOT_CONTEXTS, hot_numbers
from benchmarks.files import read_json
from benchmarks.models import checkpoint

# Half of it, the pool, holds 8 sequences of the longer context and what they decode.
_HEADS_MIB, _GROUPS_MIB = 2816, 1024
# Cold caches need no pool, and are too slow for many steps and rounds.
_COLD_MIB, _COLD_STEPS, _COLD_ROUNDS = 512, 6, 3
# The same for all engines: a model is compiled once per method and length.
_MAX_MODEL_LEN = 2304
# Half of it, the pool, holds the two requests under way (14 blocks of 128 tokens each), and one more block.
_PRESSURE_MIB = 512
_PRESSURE_CONCURRENCY = 2
# With half of the memory as pool the chain holds 6.3 times the tokens of 16 bit; a part as large as with the default
# method is used.
_PRESSURE_TIMES = 5.5


class PartError(Exception):
    """A part could not be measured."""


def measure(out: Path, model: str, mha_model: str | None, rounds: int, repeats: int) -> dict[str, Any]:
    """Run all of it and keep the results.

    Args:
        out: folder of the results.
        model: one with grouped queries.
        mha_model: one with multi-head attention; None: SmolLM2 with its kv heads repeated, made if it is missing.
        rounds: of decoding, and of prefix hits.
        repeats: of the pressure load.

    Raises:
        PartError: the server failed under the load.
    """
    heads = mha_model or str(checkpoint("smollm2-mha"))
    contexts = [str(context) for context in HOT_CONTEXTS]

    def offline(name: str, model: str, methods: list[str], mib: int, *more: str) -> dict[str, Any]:
        arguments = ["--rounds", str(rounds), "--model", model, "--methods", *methods, "--cache-mib", str(mib)]
        arguments += ["--max-model-len", str(_MAX_MODEL_LEN), "--out", str(out / f"{name}.json"), *more]
        return bench_offline.main(arguments)

    # New prompts at the short context, where prefill is measured too; at the long one it would take most of the time.
    both = ["--contexts", *contexts, "--same-prompts", contexts[-1]]
    hot = offline("hot-mha", heads, ["x-hot", "chain-2-hot"], _HEADS_MIB, *both)
    few = ["--contexts", contexts[0], "--steps", str(_COLD_STEPS), "--rounds", str(min(rounds, _COLD_ROUNDS))]
    cold = offline("cold-mha", heads, ["x", "chain-2"], _COLD_MIB, *few)
    methods = ["chain-3-hot", "joint-4-hot", "xquant-hot"]
    groups = offline("hot-gqa", model, methods, _GROUPS_MIB, *both)
    arguments = ["--model", heads, "--methods", CHAIN, "--rounds", str(rounds)]
    arguments += ["--max-model-len", str(_MAX_MODEL_LEN), "--out", str(out / "prefix-hit.json")]
    prefix = bench_prefix_hit.main(arguments)
    file = out / "serving-pressure-chain.json"
    arguments = ["--model", heads, "--quick", "--methods", "16bit", CHAIN_PRESSURE, "--cache-mib", str(_PRESSURE_MIB)]
    arguments += ["--pressure", str(_PRESSURE_TIMES), "--concurrency", str(_PRESSURE_CONCURRENCY)]
    if bench_serving.main([*arguments, "--repeats", str(repeats), "--out", str(file)]):
        raise PartError("the pressure load of the chain failed")
    return hot_numbers(hot, groups, cold, prefix, read_json(file))
