"""What the pool of hot blocks of an engine holds and has counted; zeros without a pool."""

from typing import Any


def pool_tokens(engine: Any) -> int:
    """Of every layer, that fit the pool."""
    from xquant_vllm.plugin.hot.budget import hot_memory

    return hot_memory(engine.vllm_config).tokens


def idle_steps() -> int:
    """Steps after which what nobody attended makes room for a promotion."""
    from xquant_vllm.attention.hot.policy import IDLE_STEPS

    return IDLE_STEPS + 1


def counts(engine: Any) -> dict[str, int]:
    """``hot_rows``, ``cold_rows`` and ``promoted_tokens`` by now."""
    from xquant_vllm.plugin.hot.budget import hot_memory

    names = ("promoted_tokens", "hot_rows", "cold_rows")
    counted = [found[0].counts for found in hot_memory(engine.vllm_config).maps.values()]
    return {name: sum(getattr(of_map, name) for of_map in counted) for name in names}


def counted_since(engine: Any, before: dict[str, int]) -> dict[str, int]:
    """What was counted since :func:`counts` said ``before``."""
    return {name: count - before[name] for name, count in counts(engine).items()}
