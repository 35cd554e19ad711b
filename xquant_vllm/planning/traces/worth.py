"""What the caches of a plan are worth on a trace: hit rates, what is left to prefill, how many instances it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xquant_vllm.planning.options import Option
from xquant_vllm.planning.plan import Plan
from xquant_vllm.planning.traces.replay import Rates, Replayed, peak_tokens, replay
from xquant_vllm.planning.traces.requests import Trace


@dataclass(frozen=True)
class Worth:
    """Of one cache.

    Attributes:
        option: the cache.
        replayed: what was found.
        prefill: what is left to prefill, that of 16 bit being 1.
        instances: the fewest of which none has more to prefill, nor less room for requests under way, than with 16 bit.
    """

    option: Option
    replayed: Replayed
    prefill: float
    instances: int

    def as_json(self) -> dict[str, Any]:
        """As ``xquant plan --json`` prints it."""
        return {
            "method": self.option.kind.method,
            "bits": self.option.kind.bits,
            "calibrated": self.option.kind.calibrated,
            "cache_tokens": self.option.cache_tokens,
            "hit_rate": round(self.replayed.hit_rate, 4),
            "prefill": round(self.prefill, 4),
            "instances": self.instances,
            "waited": self.replayed.waited,
            "refused": self.replayed.refused,
        }


@dataclass(frozen=True)
class TraceWorth:
    """Of all caches.

    Attributes:
        trace: the requests.
        instances: how many share them.
        peak_tokens: of requests under way at the same time.
        endless: what a cache of any size would find.
        rows: of the caches, the 16-bit one first.
    """

    trace: Trace
    instances: int
    peak_tokens: int
    endless: Replayed
    rows: tuple[Worth, ...]

    def as_json(self) -> dict[str, Any]:
        """As ``xquant plan --json`` prints it."""
        return {
            "file": self.trace.name,
            "requests": len(self.trace.requests),
            "prompt_tokens": self.trace.prompt_tokens,
            "block_size": self.trace.block_size,
            "instances": self.instances,
            "peak_tokens": self.peak_tokens,
            "endless_hit_rate": round(self.endless.hit_rate, 4),
            "rows": [row.as_json() for row in self.rows],
        }


def worth_of(plan: Plan, trace: Trace, instances: int, rates: Rates) -> TraceWorth:
    """Replay a trace on every cache of a plan that can be served.

    Args:
        plan: the caches.
        trace: the requests.
        instances: how many share them.
        rates: how long requests take.
    """
    known: dict[tuple[int, int], Replayed] = {}

    def replayed(tokens: int, count: int) -> Replayed:
        key = tokens // trace.block_size, count
        if key not in known:
            known[key] = replay(trace, tokens, count, rates)
        return known[key]

    peak = peak_tokens(trace, rates)
    plain_tokens = plan.plain.cache_tokens or 0
    plain = replayed(plain_tokens, instances)
    rows = []
    for option in plan.options:
        if not option.supported or not option.cache_tokens:
            continue
        own = replayed(option.cache_tokens, instances)
        prefill = own.prefilled / plain.prefilled if plain.prefilled else 1.0
        fewest = instances
        if option is not plan.plain:
            fewest = _fewest(option.cache_tokens, plain_tokens, plain, instances, peak, replayed)
        rows.append(Worth(option, own, prefill, fewest))
    return TraceWorth(trace, instances, peak, replay(trace, None, instances, rates), tuple(rows))


def _fewest(
    tokens: int,
    plain_tokens: int,
    plain: Replayed,
    instances: int,
    peak: int,
    replayed: Callable[[int, int], Replayed],
) -> int:
    """Instances, see :class:`Worth`."""
    needed = min(peak, plain_tokens * instances)
    most = plain.prefilled / instances
    for count in range(instances - 1, 0, -1):
        if count * tokens < needed:
            return count + 1
        found = replayed(tokens, count)
        if found.prefilled / count > most or found.refused > plain.refused:
            return count + 1
    return 1
