"""A vLLM engine with a connector, which answers orders as :mod:`benchmarks.offline.engine` does."""

import dataclasses
import random
import time
from typing import Any

from benchmarks.offline.orders import answer_orders


def hit(llm: Any, *, prefix: int, question: int, seed: int) -> dict[str, Any]:
    """Serve a prompt three times: computed, from files, and from the engine's own cache.

    Each time a request for one token, with another question behind the prefix. The engine's own cache is emptied
    before it reads from files.

    Args:
        llm: the engine, with prefix caching.
        prefix: tokens that are shared, whole blocks of them.
        question: tokens behind them.
        seed: of the tokens.

    Returns:
        ``computed``, ``files`` and ``own``: seconds until the token came; ``read_seconds`` and ``written_seconds`` of
        them in the connector; ``read_bytes`` and ``written_bytes``, and the tokens that these are of.

    Raises:
        RuntimeError: another number of tokens was found.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    moved = get_kv_transfer_group().worker.moved
    drawn = random.Random(seed)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size() // 2
    beginning = [drawn.randrange(vocabulary) for _ in range(prefix)]

    def serve(expected: int) -> float:
        from vllm import SamplingParams

        prompt = beginning + [drawn.randrange(vocabulary) for _ in range(question)]
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        if output.num_cached_tokens != expected:
            raise RuntimeError(f"{output.num_cached_tokens} tokens of {prefix} were found instead of {expected}")
        return seconds

    before = dataclasses.asdict(moved)
    computed = serve(0)
    if not llm.reset_prefix_cache():
        raise RuntimeError("the engine's own cache could not be emptied")
    files = serve(prefix)
    own = serve(prefix)
    more = {name: value - before[name] for name, value in dataclasses.asdict(moved).items()}
    kept = ("read_seconds", "written_seconds", "read_bytes", "written_bytes")
    return {"computed": computed, "files": files, "own": own, "tokens": prefix, **{name: more[name] for name in kept}}


if __name__ == "__main__":
    answer_orders({"hit": hit})
