"""How large the loads are."""

from dataclasses import dataclass
from typing import Any

from benchmarks.serving.trace import RunningText, Trace, arrivals, pressure

PRESSURE = 3.0
"""All histories of a pressure load, as multiples of what a 16-bit cache of the same memory holds. An xquant cache of 4
bits holds 3.45 for SmolLM2; the rest is for blocks that are not full and for answers, which nobody asks for again."""

CONCURRENCY = 4
"""Requests of a pressure load that are under way."""


@dataclass(frozen=True)
class Sizes:
    """Of both loads.

    Attributes:
        cache_mib: memory of every cache, where it is not said.
        pressure: arguments of :func:`benchmarks.serving.trace.pressure`; how many users there are follows from the
            memory.
        arrivals: arguments of :func:`benchmarks.serving.trace.arrivals`.
    """

    cache_mib: int
    pressure: dict[str, int]
    arrivals: dict[str, float]


# The longest history and its answer fill a number of blocks of 128 tokens, vLLM's on CPUs.
QUICK = Sizes(
    80,
    {"turns": 7, "history_tokens": 1536, "turn_tokens": 40, "output_tokens": 8},
    {"requests": 16, "rate": 1.0, "prompt_tokens": 192, "output_tokens": 16},
)
FULL = Sizes(
    192,
    {"turns": 8, "history_tokens": 1504, "turn_tokens": 40, "output_tokens": 12},
    {"requests": 96, "rate": 1.0, "prompt_tokens": 384, "output_tokens": 64},
)


def make_trace(
    name: str,
    sizes: Sizes,
    text: RunningText,
    plain_tokens: int,
    seed: int,
    times: float = PRESSURE,
    concurrency: int = CONCURRENCY,
) -> tuple[Trace, dict[str, Any]]:
    """A load, and what a result says of it.

    Args:
        name: ``"pressure"`` or ``"arrivals"``.
        sizes: how large.
        text: that prompts are made of.
        plain_tokens: that a 16-bit cache holds in the memory of every cache.
        seed: of the repeat.
        times: see :data:`PRESSURE`.
        concurrency: see :data:`CONCURRENCY`.
    """
    if name == "arrivals":
        trace, about = arrivals(text, seed=seed, **sizes.arrivals), dict(sizes.arrivals)  # type: ignore[arg-type]
    else:
        users = pressure_users(sizes.pressure, plain_tokens, times)
        trace = pressure(text, users=users, concurrency=concurrency, seed=seed, **sizes.pressure)
        about = {"users": users, "concurrency": concurrency, **sizes.pressure}
        about["tokens_of_all_histories"] = users * last_turn_tokens(sizes.pressure)
    return trace, {"name": name, "requests": len(trace.prompts), **about}


def last_turn_tokens(sizes: dict[str, int]) -> int:
    """Tokens of a user's last prompt and its answer."""
    return sizes["history_tokens"] + (sizes["turns"] - 1) * sizes["turn_tokens"] + sizes["output_tokens"]


def pressure_users(sizes: dict[str, int], plain_tokens: int, times: float = PRESSURE) -> int:
    """As many users as make the pressure, but more than one."""
    return max(2, int(times * plain_tokens / last_turn_tokens(sizes)))


def plain_cache_tokens(config: Any, cache_bytes: int, item_bytes: int) -> int:
    """Tokens whose keys and values fit into some memory, in all layers alike.

    Args:
        config: the model's, of transformers.
        cache_bytes: the memory.
        item_bytes: of one number of a key or value.
    """
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token: int = 2 * text.num_hidden_layers * kv_heads * head_size * item_bytes
    return cache_bytes // per_token
