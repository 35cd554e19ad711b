"""The loop of an engine's process: orders on its standard input, answers on its standard output, a JSON line each."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer_orders(measures: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Start the engine that the argument describes, say that it is ready, and answer.

    Args:
        measures: by what an order names, called with vLLM's ``LLM`` and the rest of the order.
    """
    arguments = json.loads(sys.argv[1])
    # Whatever vLLM prints goes to the log; only answers go where they are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from vllm import LLM

    llm = LLM(**arguments)
    # As vLLM counts them for sequences of max_model_len.
    cache_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(json.dumps({"cache_tokens": cache_tokens}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = measures[order.pop("what")](llm, **order)
        print(json.dumps(answer), file=answers, flush=True)
