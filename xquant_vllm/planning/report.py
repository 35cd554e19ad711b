"""A plan as people read it."""

from collections.abc import Sequence

from xquant_vllm.planning.caches import PLAIN, Kind
from xquant_vllm.planning.options import Option
from xquant_vllm.planning.plan import Plan

_LABELS = {
    PLAIN: "16 bit",
    "xquant": "xquant, per head",
    "joint": "xquant, joint",
    "x": "xquant, X",
    "xquant-cl": "xquant-cl",
    "kivi": "kivi",
}
_DEVICES = {"cpu": "on CPUs", "cuda": "on a GPU"}


def label(kind: Kind) -> str:
    """What a table calls a cache."""
    if kind.method == PLAIN:
        return _LABELS[PLAIN]
    return f"{_LABELS[kind.method]}, {kind.bits} bits{', calibrated' if kind.calibrated else ''}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(plan: Plan) -> str:
    """What is printed without ``--json``."""
    model, serving = plan.model, plan.serving
    ranks = f" on each of {serving.ranks} ranks" if serving.ranks > 1 else ""
    weights = "" if model.weight_bytes is None else f"; its weights take {model.weight_bytes / 2**30:.2f} GiB beside it"
    lines = [
        f"{model.name} ({model.architecture}): {model.layers} attention layers, {model.kv_heads} kv heads of "
        f"{model.head_size} channels, layer input {model.hidden_size}",
        f"{serving.memory / 2**30:.4g} GiB for the cache{ranks} {_DEVICES[serving.device]}, requests of up to "
        f"{serving.context:,} tokens{weights}",
        "",
        options_table(plan),
        "",
        *_footnotes(plan),
        *(f"Note: {note}." for note in model.notes),
        "",
        *_recommendation(plan),
    ]
    return "\n".join(lines)


def options_table(plan: Plan) -> str:
    """All caches, a line each."""
    plain = plan.plain.bytes_per_token or 0
    head = ("cache", "bytes/token", "tokens", "x 16 bit", "hot tokens", "requests", "loss", "kFLOP")
    rows = [_row(option, plain, plan.plain.cache_tokens or 0) for option in plan.options if option.bytes_per_token]
    lines = [table(head, rows)]
    refused = [option for option in plan.options if not option.supported]
    for reason in dict.fromkeys(option.reason for option in refused):
        kinds = [label(option.kind) for option in refused if option.reason == reason]
        lines.append(f"\nnot possible: {'; '.join(kinds)}: {reason}")
    return "\n".join(lines)


def _row(option: Option, plain_bytes: int, plain_tokens: int) -> tuple[str, ...]:
    tokens = option.cache_tokens or 0
    return (
        label(option.kind),
        f"{option.bytes_per_token:,}",
        f"{tokens:,}",
        f"{tokens / plain_tokens:.2f}" if plain_tokens else "",
        f"{option.hot_tokens:,}" if option.hot_tokens else "",
        f"{option.requests:.1f}",
        "?" if option.loss is None else f"{option.loss:+.2f}",
        "?" if option.extra_flops is None else f"{option.extra_flops / 1e3:,.0f}",
    )


def _footnotes(plan: Plan) -> list[str]:
    return [
        f"loss: increase in perplexity of {plan.losses.model}, {plan.losses.relation}; ? is not measured. Measure your "
        "model with xquant eval perplexity.",
        "kFLOP: computed beyond 16 bit per cached token that a step attends to, where it is not hot.",
    ]


def _recommendation(plan: Plan) -> list[str]:
    chosen = plan.recommended
    if chosen is None or chosen.command is None:
        return ["Nothing can be served like this."]
    times = (chosen.cache_tokens or 0) / (plan.plain.cache_tokens or 1)
    loss = "" if chosen.loss is None else f", loss {chosen.loss:+.2f}"
    said = [f"Recommended: {label(chosen.kind)}, {times:.2f} times the tokens of 16 bit{loss}:"]
    return [*said, *(f"  {part}" for part in chosen.command.replace(" && ", "\n").splitlines())]
