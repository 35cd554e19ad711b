"""Traces of requests as clients of an OpenAI-style server send them: ``messages`` or ``prompt``, tokenized here.

A line is such a request, or an object that has it under ``body``, as files for batches do. Beside it may stand
``timestamp`` or ``created`` (seconds, or a date in ISO 8601), and ``usage`` with ``completion_tokens``; without it
``max_tokens`` counts.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from xquant_vllm.errors import RefusedError, cause_of
from xquant_vllm.planning.traces.lines import Line
from xquant_vllm.planning.traces.requests import TracedRequest

_TIMES = ("timestamp", "created", "time")
_OUTPUTS = ("output_tokens", "max_completion_tokens", "max_tokens")


def is_request(value: Any) -> bool:
    """Whether a line is of this form."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(table, dict) and ("messages" in table or "prompt" in table) for table in _tables(value))


def log_requests(lines: Iterable[Line], model: str, block_size: int) -> tuple[list[TracedRequest], bool]:
    """Requests of a log, and whether it has times.

    Args:
        lines: of the log.
        model: whose tokenizer is taken: a folder, or a name on the hub.
        block_size: tokens of a block.

    Raises:
        RefusedError: a line is not of this form, or there is no tokenizer.
    """
    tokenizer = _tokenizer(model)
    found: list[tuple[float | None, list[int], int]] = []
    first: Line | None = None
    for line in lines:
        if not is_request(line.value):
            raise line.refuse("has neither messages nor a prompt", "all lines of a trace must be of one form")
        time = _time(line)
        first = first or line
        if found and (time is None) != (found[0][0] is None):
            raise line.refuse(
                f"has {'no' if time is None else 'a'} time, unlike the first", "give all a timestamp, or none"
            )
        found += [(time, tokens, _output(line.value)) for tokens in _prompts(line, tokenizer)]
    timed = bool(found) and found[0][0] is not None
    start = min((time for time, *_ in found if time is not None), default=0.0)
    return [
        TracedRequest((time or start) - start, len(tokens), output, block_names(tokens, block_size))
        for time, tokens, output in found
        if tokens
    ], timed


def block_names(tokens: list[int], block_size: int) -> tuple[bytes, ...]:
    """A name for every whole block, which says all tokens up to its end."""
    names, digest = [], hashlib.blake2b(digest_size=16)
    for end in range(block_size, len(tokens) + 1, block_size):
        digest.update(repr(tokens[end - block_size : end]).encode())
        names.append(digest.digest())
    return tuple(names)


def _tokenizer(model: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # whatever a library or the hub raises
        raise RefusedError(
            f"xquant: --trace holds texts, and the tokenizer of {model} cannot be loaded ({cause_of(error)}); name a "
            "folder with tokenizer.json, or write a trace with hash_ids"
        ) from None


def _tables(value: Mapping[str, Any]) -> list[Any]:
    return [value, value.get("body"), value.get("request")]


def _prompts(line: Line, tokenizer: Any) -> list[list[int]]:
    table = next(
        table for table in _tables(line.value) if isinstance(table, dict) and {"messages", "prompt"} & {*table}
    )
    try:
        if "messages" in table:
            if not isinstance(table["messages"], list):
                raise TypeError("messages are no list")
            text = tokenizer.apply_chat_template(table["messages"], add_generation_prompt=True, tokenize=False)
            return [tokenizer.encode(text, add_special_tokens=False)]
        prompt = table["prompt"]
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return [prompt]
        return [tokenizer.encode(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    except Exception as error:  # of a chat template, or of a tokenizer
        raise line.refuse(f"cannot be tokenized ({cause_of(error)})", "write messages or a prompt of text") from None


def _time(line: Line) -> float | None:
    value = next((line.value[name] for name in _TIMES if line.value.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        except ValueError:
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise line.refuse(f"has the time {value!r}", "set seconds, or a date such as 2026-01-31T12:00:00Z")


def _output(value: Mapping[str, Any]) -> int:
    usage = value.get("usage")
    counts = [usage.get("completion_tokens")] if isinstance(usage, dict) else []
    for table in _tables(value):
        counts += [table.get(name) for name in _OUTPUTS] if isinstance(table, dict) else []
    return next((count for count in counts if isinstance(count, int) and count >= 0), 0)
