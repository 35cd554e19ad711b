"""The numbers of `make bench-cpu`, from its results."""

from typing import Any

METHOD = "xquant"
CONTEXTS = (512, 4096)
HOT_CONTEXTS = (512, 2048)
CHAIN = "xquant-cl-2"
CHAIN_PRESSURE = "chain-2-hot"
_COLD = {"x": "x", "cl": "chain-2"}

Result = dict[str, Any]


def default_numbers(decode: dict[int, Result], serving: Result) -> dict[str, Any]:
    """Of the default method; None of a method that this vLLM does not have.

    Args:
        decode: what bench_offline.py measured, by context.
        serving: what bench_serving.py measured.
    """
    short, long = CONTEXTS
    return {
        "decode_ratio_512": _decode_ratio(decode[short], METHOD, short),
        "decode_ratio_4096": _decode_ratio(decode[long], METHOD, long),
        "pressure_ratio": _median(serving["rows"], METHOD, "throughput_ratio"),
        "kivi_ratio_512": _decode_ratio(decode[short], "kivi", short),
    }


def operation_numbers(attention: Result) -> dict[str, Any]:
    """Of the attention operation alone: its share of the roof, and how fast it is against CPU_ATTN.

    Args:
        attention: what bench_decode_attention.py measured.
    """
    rows = [row for row in attention["rows"] if row["variant"].startswith("xquant")]
    speeds = {row["context"]: row["speed_of_baseline"]["median"] for row in rows if row["variant"] == "xquant 4 bits"}
    return {
        "roof_fraction": round(min(row["roof"] for row in rows), 3),
        **{f"attention_{context}": round(speeds[context], 3) for context in CONTEXTS},
    }


def hot_numbers(heads: Result, groups: Result, cold: Result, prefix: Result, serving: Result) -> dict[str, Any]:
    """Of hot blocks, and of what is cold.

    Args:
        heads: what bench_offline.py measured on the model with multi-head attention, hot.
        groups: on the one with grouped queries, hot.
        cold: on the one with multi-head attention, not hot.
        prefix: what bench_prefix_hit.py measured.
        serving: what bench_serving.py measured under the load for a chain at 2 bits.
    """
    of_result = {"x": (heads, "x-hot"), "cl": (heads, "chain-2-hot"), "chain": (groups, "chain-3-hot"),
                 "joint": (groups, "joint-4-hot"), "head": (groups, "xquant-hot")}  # fmt: skip
    found = {
        f"hot_{name}_{context}": _decode_ratio(result, method, context)
        for context in HOT_CONTEXTS
        for name, (result, method) in of_result.items()
    }
    short = HOT_CONTEXTS[0]
    found |= {f"cold_{name}_512": _decode_ratio(cold, method, short) for name, method in _COLD.items()}
    tokens = prefix["cache_tokens"]
    found["capacity_cl"] = round(tokens[CHAIN] / tokens["16bit"], 3) if CHAIN in tokens else None
    found["ttft_prefix_hit"] = _median(prefix["rows"], CHAIN, "ratio")
    found["pressure_cl"] = _median(serving["rows"], CHAIN_PRESSURE, "throughput_ratio")
    return found


def _decode_ratio(result: Result, method: str, context: int) -> float | None:
    return _median([row for row in result["rows"] if row["context"] == context], method, "decode_ratio")


def _median(rows: list[dict[str, Any]], method: str, key: str) -> float | None:
    found = [row[key]["median"] for row in rows if row["method"] == method]
    return round(found[0], 3) if found else None
