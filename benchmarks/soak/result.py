"""What a soak says in the end."""

import collections
from typing import Any

from benchmarks.soak.caches import CACHES, CONTROL
from benchmarks.soak.life import Turn


def of_turn(turn: Turn) -> dict[str, Any]:
    """The numbers of one cache."""
    failures = [outcome for outcome in turn.outcomes if outcome.failure]
    grown = sum(kinds["total"] for kinds in turn.growth.values())
    return {
        "requests": len(turn.outcomes),
        "aborted": sum(outcome.aborted for outcome in turn.outcomes),
        "failed": len(failures),
        "failures": [f"{outcome.kind}: {outcome.failure}" for outcome in failures][:10],
        "kinds": dict(sorted(collections.Counter(o.kind.partition(":")[0] for o in turn.outcomes).items())),
        "preemptions": turn.preemptions,
        "leaked_blocks": turn.leaked_blocks,
        "drift": turn.drift,
        "rss_growth_mb": round(grown, 1),
        "rss_growth_mb_by_quarter": turn.growth_by_step,
        "rss_growth_mb_by_process": turn.growth,
    } | ({"after_kill": turn.after_kill} if turn.after_kill else {})


def summary(turns: dict[str, Turn]) -> dict[str, Any]:
    """All caches together.

    Returns:
        Sums over the caches of requests, aborted and failed ones and leaked blocks; ``drift``, the largest of those
        whose probe is read from pages, and ``drift_hot`` of those with hot blocks; ``rss_growth_mb``, the largest
        but the control's, and ``rss_growth_mb_16bit``, the control's (None if it was left out); ``caches``, each alone.
    """
    numbers = {name: of_turn(turn) for name, turn in turns.items()}

    def largest(key: str, names: list[str]) -> float | None:
        return max((numbers[name][key] for name in names), default=None)

    hot = [name for name in numbers if CACHES[name].hot]
    return {
        **{key: sum(of[key] for of in numbers.values()) for key in ("requests", "aborted", "failed", "leaked_blocks")},
        "drift": largest("drift", [name for name in numbers if name not in hot]),
        "drift_hot": largest("drift", hot),
        "rss_growth_mb": largest("rss_growth_mb", [name for name in numbers if name != CONTROL]),
        "rss_growth_mb_16bit": largest("rss_growth_mb", [name for name in numbers if name == CONTROL]),
        "caches": numbers,
    }


def faults(result: dict[str, Any], more_than_control_mb: float) -> list[str]:
    """What of a summary must not be.

    Args:
        result: of :func:`summary`.
        more_than_control_mb: by how much a cache's processes may grow more than those of the 16-bit cache.
    """
    found = [f"{name}: {failure}" for name, numbers in result["caches"].items() for failure in numbers["failures"]]
    if result["leaked_blocks"]:
        found.append(f"{result['leaked_blocks']} blocks are in use when nothing runs")
    if result["drift"]:
        found.append(f"the same question is answered otherwise after the load: {result['drift']} of a log-probability")
    for name, numbers in result["caches"].items():
        if not numbers["preemptions"]:
            found.append(f"{name}: no request was preempted: the cache was not tight")
    grown, control = result["rss_growth_mb"], result["rss_growth_mb_16bit"]
    if grown is not None and control is not None and grown > control + more_than_control_mb:
        found.append(f"processes grew by {grown} MB, those of the 16-bit cache by {control}")
    return found
