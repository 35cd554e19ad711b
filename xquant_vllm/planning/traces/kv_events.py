"""Traces of vLLM's KV cache events, which say what was stored and, by the block before, behind which prefix.

A line is a batch as vLLM publishes it, in JSON: ``[ts, [event, ...], rank]``, or ``{"ts": ..., "events": [...]}``, or
one event. Of events ``{"type": "BlockStored", "block_hashes": [...], "parent_block_hash": ..., "block_size": ...}`` are
read. Others do not matter here: what is evicted is what the replay finds out. Every request shows as the blocks that it
stored; those before them, back to the first, are its prefix. What a request found whole is not told.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from xquant_vllm.planning.traces.lines import Line
from xquant_vllm.planning.traces.requests import TracedRequest

KINDS = ("BlockStored", "BlockRemoved", "AllBlocksCleared")
# Seconds between two events of one request at most. Later blocks behind the same prefix are the next request's.
_SAME_REQUEST = 5.0


@dataclass
class _Open:
    """A request that may store more: blocks of its first event, and of later ones, which its answer has filled."""

    time: float
    last: float
    prompt: list[Hashable]
    answer: list[Hashable] = field(default_factory=list)


def is_events(value: Any) -> bool:
    """Whether a line is of this form."""
    if isinstance(value, list):
        return len(value) >= 2 and isinstance(value[1], list)
    return isinstance(value, dict) and (value.get("type") in KINDS or isinstance(value.get("events"), list))


def event_requests(lines: Iterable[Line]) -> tuple[list[TracedRequest], int, bool]:
    """Requests behind events, the tokens of a block, and whether events have times.

    Raises:
        RefusedError: a line is not of this form, or blocks differ in size.
    """
    before: dict[Hashable, Hashable | None] = {}
    by_tail: dict[Hashable, _Open] = {}
    found: list[_Open] = []
    size, timed = 0, True
    for line in lines:
        for time, event in _events(line):
            timed &= time is not None
            if event.get("type") != "BlockStored" or event.get("group_idx") or event.get("medium") not in (None, "GPU"):
                continue
            hashes, tokens = _stored(line, event)
            if size and tokens != size:
                raise line.refuse(f"has blocks of {tokens} tokens after blocks of {size}", "write one engine's events")
            size = tokens
            parent, now = event.get("parent_block_hash"), time or 0.0
            for name in hashes:
                before.setdefault(name, parent)
                parent = name
            parent = event.get("parent_block_hash")
            known = by_tail.pop(parent, None) if parent is not None else None
            if known is not None and now - known.last <= _SAME_REQUEST:
                known.answer += hashes
            else:
                known = _Open(now, now, [*_chain(before, parent), *hashes])
                found.append(known)
            known.last = now
            by_tail[hashes[-1]] = known
    start = min((request.time for request in found), default=0.0)
    return [_request(request, start, size) for request in found], size, timed


def _request(request: _Open, start: float, size: int) -> TracedRequest:
    return TracedRequest(
        request.time - start,
        len(request.prompt) * size,
        len(request.answer) * size,
        tuple(request.prompt),
        tuple(request.answer),
    )


def _events(line: Line) -> Iterator[tuple[float | None, dict[str, Any]]]:
    value = line.value
    if not is_events(value):
        raise line.refuse("is no batch of KV cache events", "all lines of a trace must be of one form")
    if isinstance(value, list):
        time, events = value[0], value[1]
    else:
        time, events = value.get("ts"), value.get("events", [value])
    if time is not None and (isinstance(time, bool) or not isinstance(time, (int, float))):
        raise line.refuse(f"has the time {time!r}", "set seconds")
    for event in events:
        if not isinstance(event, dict) or event.get("type") not in KINDS:
            raise line.refuse("has an event without a known type", f"write {', '.join(KINDS)}")
        yield time, event


def _stored(line: Line, event: dict[str, Any]) -> tuple[list[Hashable], int]:
    hashes, tokens = event.get("block_hashes"), event.get("block_size")
    if not isinstance(hashes, list) or not hashes or not all(isinstance(name, (int, str)) for name in hashes):
        raise line.refuse(f"has 'block_hashes': {hashes!r}", "write the hashes of the blocks that were stored")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise line.refuse(f"has 'block_size': {tokens!r}", "write the tokens of a block")
    return hashes, tokens


def _chain(before: dict[Hashable, Hashable | None], last: Hashable | None) -> list[Hashable]:
    """A block and those before it, the first one first."""
    names: list[Hashable] = []
    seen = set()
    while last is not None and last not in seen:
        names.append(last)
        seen.add(last)
        last = before.get(last)
    return names[::-1]
