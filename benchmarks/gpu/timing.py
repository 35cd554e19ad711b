"""Timing of several variants in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# A sample is at least so long: events resolve about half a microsecond.
_SAMPLE_SECONDS = 2e-3
_WARM_UP_SECONDS = 20e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: of the samples.
        fastest: likewise.
        slowest: likewise.
        samples: how many; each is of many calls.
        method: ``"graph"`` (replays of a CUDA graph), ``"events"`` (calls between two events: launches are in it where
            they take longer than the kernels), or ``"clock"`` (of the host, under the interpreter).
    """

    median: float
    fastest: float
    slowest: float
    samples: int
    method: str


Calls = Sequence[Callable[[], Any]]


def measure(
    variants: Mapping[str, Calls], *, samples: int, seconds: float, graphs: bool = True
) -> dict[str, Timing | Exception]:
    """Time all variants, sample after sample of each in turn.

    A sample goes through all calls of a variant, which are over different inputs, so that the cache holds none of them.

    Args:
        variants: by name, the same call over several sets of inputs.
        samples: of every variant, fewer where they would take too long, but at least three.
        seconds: how long all samples may take together.
        graphs: whether calls may be captured; what cannot be is timed without.

    Returns:
        By name a timing, or why there is none.
    """
    if not torch.cuda.is_available():
        return {name: _by_clock(calls) for name, calls in variants.items()}
    results: dict[str, Timing | Exception] = {}
    # All of them before any is captured: buffers that kernels share may still grow and move.
    for name, calls in variants.items():
        try:
            _warm_up(calls)
        except Exception as error:
            results[name] = error
    runners = {name: _runner(calls, graphs) for name, calls in variants.items() if name not in results}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    often: dict[str, int] = {}
    for name, (run, _, _) in runners.items():
        once = _sample(run, 1)
        often[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-6)))
        began = time.perf_counter()
        while time.perf_counter() - began < min(_WARM_UP_SECONDS, seconds / 10):
            _sample(run, often[name])
    ends = time.perf_counter() + seconds
    for index in range(samples):
        if index >= 3 and time.perf_counter() > ends:
            break
        for name, (run, count, _) in runners.items():
            taken[name].append(_sample(run, often[name]) / (often[name] * count))
    for name, (_, _, method) in runners.items():
        results[name] = _timing(taken[name], method)
    return results


def _timing(taken: list[float], method: str) -> Timing:
    return Timing(statistics.median(taken), min(taken), max(taken), len(taken), method)


def _by_clock(calls: Calls) -> Timing | Exception:
    taken = []
    try:
        for call in calls:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    except Exception as error:
        return error
    return _timing(taken, "clock")


def _sample(run: Callable[[], None], times: int) -> float:
    """Seconds of so many runs on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _warm_up(calls: Calls) -> None:
    """Compile, allocate, and show what does not work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _runner(calls: Calls, graphs: bool) -> tuple[Callable[[], None], int, str]:
    """What goes through all calls, how many these are, and how."""

    def run() -> None:
        for call in calls:
            call()

    if not graphs:
        return run, len(calls), "events"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:
        torch.cuda.synchronize()
        return run, len(calls), "events"
    return graph.replay, len(calls), "graph"
