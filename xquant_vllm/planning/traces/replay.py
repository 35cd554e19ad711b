"""A trace replayed on instances with caches of one size: what is found, and what is left to prefill."""

import heapq
from collections import deque
from dataclasses import dataclass
from itertools import count

from xquant_vllm.planning.traces.block_cache import BlockCache, Held
from xquant_vllm.planning.traces.requests import Trace, TracedRequest

# An instance takes no more requests while it has prefilled so much more than the others have on average.
_MOST_LOAD = 1.1


@dataclass(frozen=True)
class Rates:
    """How long a request holds its blocks.

    Attributes:
        prefill: tokens per second of a prompt, those found aside.
        decode: tokens per second of an answer.
        at_once: requests that an instance runs at the same time at most (``--max-num-seqs``); None: any number.
    """

    prefill: float = 20_000.0
    decode: float = 40.0
    at_once: int | None = None

    def seconds(self, prefilled: int, output: int) -> float:
        """Of a request."""
        return prefilled / self.prefill + output / self.decode


@dataclass(frozen=True)
class Replayed:
    """What a replay showed.

    Attributes:
        hit_tokens: of prompts, that were found.
        prompt_tokens: of all prompts.
        waited: requests that could not begin when they came.
        refused: requests that are larger than the cache.
    """

    hit_tokens: int
    prompt_tokens: int
    waited: int
    refused: int

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of prompts."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def prefilled(self) -> int:
        """Tokens that were computed."""
        return self.prompt_tokens - self.hit_tokens


class _Instance:
    def __init__(self, blocks: int | None, block_size: int) -> None:
        self.cache = BlockCache(blocks, block_size)
        self.waiting: deque[TracedRequest] = deque()
        self.prefilled = 0
        self.running = 0


class _Replay:
    def __init__(self, trace: Trace, tokens: int | None, instances: int, rates: Rates) -> None:
        self._trace, self._rates = trace, rates
        self._blocks = None if tokens is None else tokens // trace.block_size
        self._instances = [_Instance(self._blocks, trace.block_size) for _ in range(instances)]
        # When requests end: seconds, a number that makes ties fair, where, what they hold, which they are.
        self._ends: list[tuple[float, int, _Instance, Held, TracedRequest]] = []
        self._numbers = count()
        self._longest = max(request.prompt for request in trace.requests)
        self.hit_tokens = self.prompt_tokens = self.waited = self.refused = 0

    def run(self) -> Replayed:
        for request in self._trace.requests:
            self._end_until(request.time if self._trace.timed else float("inf"))
            blocks = -(-(request.prompt + request.output) // self._trace.block_size)
            if self._blocks is not None and blocks > self._blocks:
                self.refused += 1
                continue
            instance = self._route(request)
            if instance.waiting or not self._start(instance, request, request.time):
                self.waited += 1
                instance.waiting.append(request)
        self._end_until(float("inf"))
        return Replayed(self.hit_tokens, self.prompt_tokens, self.waited, self.refused)

    def _route(self, request: TracedRequest) -> _Instance:
        """The longest prefix wins, among instances that have not done far more than the others."""
        instances = self._instances
        if len(instances) == 1:
            return instances[0]
        most = _MOST_LOAD * sum(instance.prefilled for instance in instances) / len(instances) + self._longest
        able = [instance for instance in instances if instance.prefilled <= most]
        return max(
            able, key=lambda instance: (instance.cache.match(request.blocks, request.prompt), -instance.prefilled)
        )

    def _start(self, instance: _Instance, request: TracedRequest, now: float) -> bool:
        most = self._rates.at_once
        if most is not None and instance.running >= most:
            return False
        held = instance.cache.admit(request.blocks, request.prompt)
        if held is None:
            return False
        instance.running += 1
        self.hit_tokens += held.hit
        self.prompt_tokens += request.prompt
        computed = request.prompt - held.hit
        instance.prefilled += computed
        end = now + self._rates.seconds(computed, request.output)
        heapq.heappush(self._ends, (end, next(self._numbers), instance, held, request))
        return True

    def _end_until(self, time: float) -> None:
        ends = self._ends
        while ends and ends[0][0] <= time:
            now, _, instance, held, request = heapq.heappop(ends)
            instance.cache.finish(held, request.output, request.answers)
            instance.running -= 1
            while instance.waiting and self._start(instance, instance.waiting[0], now):
                instance.waiting.popleft()


def replay(trace: Trace, tokens: int | None, instances: int = 1, rates: Rates | None = None) -> Replayed:
    """Replay a trace.

    Args:
        trace: the requests.
        tokens: that the cache of an instance holds; None for any number.
        instances: how many share the requests. A router knows what each holds and sends a request where most of its
            prompt is, unless that instance has already computed a tenth more than the others.
        rates: how long requests take.
    """
    return _Replay(trace, tokens, instances, rates or Rates()).run()


def peak_tokens(trace: Trace, rates: Rates | None = None) -> int:
    """The most tokens, prompts and answers, of requests under way at the same time, were nothing found or waiting.

    Args:
        trace: the requests.
        rates: how long requests take.
    """
    rates = rates or Rates()
    if not trace.timed:
        return max(request.prompt + request.output for request in trace.requests)
    changes = []
    for request in trace.requests:
        tokens = request.prompt + request.output
        changes += [(request.time, tokens), (request.time + rates.seconds(request.prompt, request.output), -tokens)]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
