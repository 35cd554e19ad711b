"""Runs one vLLM engine in a process of its own and answers a list of tasks; reads and writes JSON files.

Usage: python engine_process.py REQUEST.json RESULT.json

The request has ``engine`` (arguments of ``vllm.LLM``) and ``tasks``, each a table with ``kind`` and its arguments.
A result is written per task, and ``cache_tokens``: the capacity of the KV cache as vLLM allocated it.
"""

import json
import sys
from typing import Any

NUM_LOGITS = 256


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy continuations of all prompts at once, with how many prompt tokens came from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


def prompt_logprobs(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probability of every prompt token but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "logprobs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, prompts, strict=True)
        ]
    }


def next_logits(llm: Any, prompts: list[list[int]], max_tokens: int = 1) -> dict[str, Any]:
    """The largest raw logits of each generated token by token id (engine argument ``logprobs_mode: raw_logits``)."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_LOGITS, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "logits": [
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


def preemptions(llm: Any) -> dict[str, Any]:
    """How often vLLM has preempted a request (engine argument ``disable_log_stats: false``)."""
    return {"count": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")}


def reload_weights(llm: Any) -> dict[str, Any]:
    """Ask the running engine to load its weights anew; what it answers."""
    try:
        llm.collective_rpc("reload_weights")
    except Exception as error:
        return {"error": str(error)}
    return {"error": None}


KINDS = {f.__name__: f for f in (greedy, prompt_logprobs, next_logits, preemptions, reload_weights)}


def main(request_path: str, result_path: str) -> None:
    """Start the engine and answer."""
    from vllm import LLM

    with open(request_path) as file:
        request = json.load(file)
    llm = LLM(**request["engine"])
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "tasks": [KINDS[task.pop("kind")](llm, **task) for task in request["tasks"]],
    }
    with open(result_path, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
