"""Time to the first token: of a prompt that is new, and of one whose beginning is in the prefix cache, but not hot."""

import math
import random
import time
from typing import Any

from benchmarks.offline.pool import counted_since, counts, idle_steps, pool_tokens


def first_token(engine: Any, *, prefix: int, question: int, hit: bool, seed: int) -> dict[str, Any]:
    """Send a random prompt and wait for one token.

    For a prefix hit the prompt's beginning was served before, and nothing of it is in the pool of hot blocks any more:
    other prompts of the same length came after it, as many as fill the pool, and then one more sequence decoded until
    the pool counted all that as idle.

    Args:
        engine: vLLM's, with prefix caching.
        prefix: tokens at the beginning, whole blocks of them.
        question: tokens behind them, never seen before.
        hit: whether the prefix was served before.
        seed: of the tokens.

    Returns:
        ``seconds``; ``cached``, prompt tokens that the prefix cache had; and of the pool ``pool_tokens``, how many it
        holds, ``promoted_tokens``, ``hot_rows`` and ``cold_rows`` of the steps until the token came.

    Raises:
        RuntimeError: the prefix cache had more or fewer tokens than meant, or there is a pool and nothing was promoted.
    """
    drawn = random.Random(seed)
    vocabulary = engine.vllm_config.model_config.get_vocab_size() // 2

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(vocabulary) for _ in range(count)]

    beginning, end = tokens(prefix), tokens(question)
    pool = pool_tokens(engine)
    if hit:
        _serve(engine, beginning + tokens(question), 1)
        for _ in range(math.ceil(pool / prefix)):
            _serve(engine, tokens(prefix), 1)
        if pool:
            _serve(engine, tokens(1), idle_steps())
    before = counts(engine)
    seconds, cached = _serve(engine, beginning + end, 1)
    counted = counted_since(engine, before)
    if cached != (prefix if hit else 0):
        raise RuntimeError(f"the prefix cache had {cached} tokens of {prefix}")
    if hit and pool and not counted["promoted_tokens"]:
        raise RuntimeError(f"nothing was promoted, though the pool holds {pool} tokens")
    return {"seconds": seconds, "cached": cached, "pool_tokens": pool, **counted}


def _serve(engine: Any, prompt: list[int], count: int) -> tuple[float, int]:
    """Seconds until a request has ended, and how many of its prompt's tokens were in the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0, detokenize=False)
    began = time.perf_counter()
    engine.add_request(f"request-{time.monotonic_ns()}", {"prompt_token_ids": prompt}, sampling)
    cached = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            cached = output.num_cached_tokens
    return time.perf_counter() - began, cached
