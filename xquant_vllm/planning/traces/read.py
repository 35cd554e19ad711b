"""A trace from a file, whichever of the known forms it has."""

from itertools import chain
from pathlib import Path

from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.traces.hashed import HASHED_BLOCK, hashed_requests
from xquant_vllm.planning.traces.kv_events import event_requests, is_events
from xquant_vllm.planning.traces.lines import read_lines
from xquant_vllm.planning.traces.request_log import is_request, log_requests
from xquant_vllm.planning.traces.requests import Trace, sorted_trace


def read_trace(path: Path, model: str, block_size: int) -> Trace:
    """Read a trace.

    Args:
        path: JSON lines, all of the form of the first.
        model: whose tokenizer a log of texts is read with.
        block_size: tokens of a block, for such a log.

    Raises:
        RefusedError: the file cannot be read, or has a line that is not of its form; it names the line.
    """
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise RefusedError(f"xquant: --trace {path} is empty; name a file with one JSON object a line")
    every, value = chain([first], lines), first.value
    if isinstance(value, dict) and "hash_ids" in value:
        return sorted_trace(path.name, HASHED_BLOCK, True, hashed_requests(every))
    if is_events(value):
        requests, size, timed = event_requests(every)
        return sorted_trace(path.name, size, timed, requests)
    if is_request(value):
        requests, timed = log_requests(every, model, block_size)
        return sorted_trace(path.name, block_size, timed, requests)
    raise first.refuse(
        "is of no known form", "write hash_ids, vLLM's KV cache events, or messages or prompts (see docs/plan.md)"
    )
