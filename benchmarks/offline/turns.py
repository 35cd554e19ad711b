"""A vLLM engine whose two groups of sequences take turns; answers orders as :mod:`benchmarks.offline.engine` does.

An order names a group, its sequences, their tokens and how many more are decoded. Prompts are the same every time, so
from the second turn on they are in the prefix cache. The answer has the seconds from submission to the last token.
"""

import random
import time
from typing import Any

from benchmarks.offline.orders import answer_orders


def turn(llm: Any, *, group: int, sequences: int, context: int, decoded: int) -> dict[str, Any]:
    """Continue all sequences of a group."""
    from vllm import SamplingParams

    drawn = random.Random(group)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": drawn.choices(range(vocabulary // 2), k=context)} for _ in range(sequences)]
    sampling = SamplingParams(max_tokens=decoded, ignore_eos=True, temperature=0, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - began,
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }


if __name__ == "__main__":
    answer_orders({"turn": turn})
