"""A vLLM engine in a process of its own, which answers orders on its standard input, one JSON line each.

An order says what to measure: ``"decode"`` names sequences, context, steps and a seed, and the answer has the seconds
of the prefill of all prompts and of every decode step after it; ``"first_token"`` is in
:mod:`benchmarks.offline.first_token`.
The engine runs in the process itself, so a step is what the model and the scheduler take.
"""

import random
import time
from typing import Any

from benchmarks.offline.first_token import first_token
from benchmarks.offline.orders import answer_orders
from benchmarks.offline.pool import counted_since, counts

# Decode steps before those that are timed.
_WARM_UP_STEPS = 2


def decode(engine: Any, *, sequences: int, context: int, steps: int, seed: int) -> dict[str, Any]:
    """Prefill and decode random prompts of ``context`` tokens, all sequences together."""
    from vllm import SamplingParams

    # No prompt begins like a shorter one of another order.
    drawn = random.Random(f"{seed}-{context}")
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    # The first sequences decode while the last ones are prefilled: nobody may be done before all are timed.
    room = engine.vllm_config.model_config.max_model_len - context
    sampling = SamplingParams(max_tokens=room, ignore_eos=True, temperature=0, detokenize=False)
    names = []
    for index in range(sequences):
        prompt = [drawn.randrange(vocabulary // 2) for _ in range(context)]
        names.append(f"{seed}-{context}-{index}-{time.monotonic_ns()}")
        engine.add_request(names[-1], {"prompt_token_ids": prompt}, sampling)
    began = time.perf_counter()
    started: set[str] = set()
    while len(started) < sequences:
        started |= {output.request_id for output in engine.step()}
    prefill = time.perf_counter() - began
    for _ in range(_WARM_UP_STEPS):
        engine.step()
    taken, before = [], counts(engine)
    for _ in range(steps):
        began = time.perf_counter()
        finished = engine.step()
        taken.append(time.perf_counter() - began)
        if len(finished) != sequences:
            raise RuntimeError(f"{len(finished)} of {sequences} sequences decoded in one step: the cache is too small")
    rows = counted_since(engine, before)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return {"prefill": prefill, "steps": taken, "hot_rows": rows["hot_rows"], "cold_rows": rows["cold_rows"]}


if __name__ == "__main__":
    answer_orders(
        {
            "decode": lambda llm, **order: decode(llm.llm_engine, **order),
            "first_token": lambda llm, **order: first_token(llm.llm_engine, **order),
        }
    )
