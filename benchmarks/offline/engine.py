"""A vLLM engine in a process of its own, which answers orders on its standard input, one JSON line each.

An order says what to measure: ``"decode"`` names sequences, context, steps and a seed, and the answer has the seconds
of the prefill of all prompts and of every decode step after it; ``"first_token"`` is in
:mod:`benchmarks.offline.first_token`.
The engine runs in the process itself, so a step is what the model and the scheduler take.
"""

import json
import os
import random
import sys
import time
from typing import Any

from benchmarks.offline.first_token import first_token
from benchmarks.offline.pool import counted_since, counts

# Decode steps before those that are timed.
_WARM_UP_STEPS = 2


def main() -> None:
    """Start the engine that the argument describes, say that it is ready, and answer."""
    arguments = json.loads(sys.argv[1])
    # Whatever vLLM prints goes to the log; only answers go where they are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from vllm import LLM

    llm = LLM(**arguments)
    # As vLLM counts them for sequences of max_model_len.
    cache_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(json.dumps({"cache_tokens": cache_tokens}), file=answers, flush=True)
    measures = {"decode": decode, "first_token": first_token}
    for line in sys.stdin:
        order = json.loads(line)
        answer = measures[order.pop("what")](llm.llm_engine, **order)
        print(json.dumps(answer), file=answers, flush=True)


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
    main()
