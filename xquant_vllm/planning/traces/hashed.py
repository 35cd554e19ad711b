"""Traces that name the blocks of prompts: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``."""

from collections.abc import Iterable

from xquant_vllm.planning.traces.lines import Line
from xquant_vllm.planning.traces.requests import TracedRequest

# Tokens of a block.
HASHED_BLOCK = 512


def hashed_requests(lines: Iterable[Line]) -> list[TracedRequest]:
    """Requests of lines with ``hash_ids``, one for every 512 tokens of the prompt begun.

    The last one is dropped unless its block is full: vLLM finds whole blocks alone.

    Raises:
        RefusedError: a line is not of this form.
    """
    requests = []
    for line in lines:
        value = line.value
        if not isinstance(value, dict) or not isinstance(value.get("hash_ids"), list):
            raise line.refuse("has no hash_ids", "all lines of a trace must be of one form")
        prompt = line.whole_number("input_length", least=1)
        output = line.whole_number("output_length")
        time = value.get("timestamp")
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not time >= 0:
            raise line.refuse(f"has 'timestamp': {time!r}", "set milliseconds since the first request")
        ids = value["hash_ids"]
        begun = -(-prompt // HASHED_BLOCK)
        if len(ids) != begun or not all(isinstance(name, (int, str)) for name in ids):
            raise line.refuse(
                f"has {len(ids)} hash_ids for {prompt:,} tokens", f"name every {HASHED_BLOCK} tokens: {begun} ids"
            )
        requests.append(TracedRequest(time / 1e3, prompt, output, tuple(ids[: prompt // HASHED_BLOCK])))
    return requests
