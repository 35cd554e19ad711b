"""What a trace gains, as people read it, and as a picture."""

from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.report import label, table
from xquant_vllm.planning.traces.worth import TraceWorth

_COLORS = {"16bit": "#444444", "xquant": "#15803d", "joint": "#1d4ed8", "x": "#0d9488", "xquant-cl": "#c1121f"}


def worth_report(worth: TraceWorth) -> str:
    """A line for every cache."""
    trace = worth.trace
    shared = f" shared by {worth.instances} instances" if worth.instances > 1 else ""
    lines = [
        f"{trace.name}: {len(trace.requests):,} requests with {trace.prompt_tokens:,} prompt tokens{shared}; up to "
        f"{worth.peak_tokens:,} tokens under way at the same time",
        "",
    ]
    head = ("cache", "tokens per instance", "hit rate", "prefill", "instances", "waited", "too long")
    rows = [
        (
            label(row.option.kind),
            f"{row.option.cache_tokens:,}",
            f"{row.replayed.hit_rate:.3f}",
            f"{row.prefill:.2f}",
            str(row.instances),
            f"{row.replayed.waited:,}",
            f"{row.replayed.refused:,}",
        )
        for row in worth.rows
    ]
    plain = worth.rows[0].replayed.prefilled or 1
    endless = worth.endless
    rows.append(("endless", "", f"{endless.hit_rate:.3f}", f"{endless.prefilled / plain:.2f}", "", "", ""))
    lines += [
        table(head, rows),
        "",
        "hit rate: share of the prompts' tokens found in the cache. prefill: tokens left to compute, 16 bit being 1.",
        "instances: the fewest with no more to prefill, each, than with 16 bit. Decoding is not counted.",
    ]
    return "\n".join(lines)


def check_plot() -> None:
    """Refuse to draw before anything is computed.

    Raises:
        RefusedError: there is no matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RefusedError("xquant: --plot needs matplotlib: pip install matplotlib, or leave --plot out") from None


def plot(worth: TraceWorth, path: Path) -> None:
    """Hit rate against tokens of the cache, a point for every cache.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    methods: dict[str, list[Any]] = {}
    for row in worth.rows:
        methods.setdefault(row.option.kind.method, []).append(row)
    for method, rows in methods.items():
        points = sorted((row.option.cache_tokens or 0, row.replayed.hit_rate) for row in rows)
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "o-", label=method, color=_COLORS.get(method, "#b45309"), linewidth=1.3, markersize=4)
    axis.axhline(worth.endless.hit_rate, color="#999999", linestyle="--", linewidth=1)
    axis.annotate("endless cache", (0.01, worth.endless.hit_rate), xycoords=("axes fraction", "data"), va="bottom")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens in the cache of an instance")
    axis.set_ylabel("prompt tokens found in the cache")
    axis.set_title(f"{worth.trace.name}, {worth.instances} instance{'s' if worth.instances > 1 else ''}")
    axis.legend(frameon=False)
    axis.grid(color="#dddddd", linewidth=0.6)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)
