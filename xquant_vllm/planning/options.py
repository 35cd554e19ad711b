"""One cache of a plan with all that is said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.caches import KIVI, PLAIN, Kind, Pages, pages, plain_layout, refused_by
from xquant_vllm.planning.commands import command
from xquant_vllm.planning.flops import extra_flops
from xquant_vllm.planning.losses import Losses
from xquant_vllm.planning.page_groups import page_needs
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.planning.serving import CPU_HEAD_SIZES, Serving
from xquant_vllm.scheme.hot_pool import PageNeeds, pool_share, pool_tokens, wanted_bytes


@dataclass(frozen=True)
class Option:
    """One cache.

    Attributes:
        kind: which.
        bytes_per_token: on a rank, in pages; None where the server would refuse it.
        cache_tokens: what vLLM will report as the size of the cache; None likewise.
        hot_tokens: how many of them can be hot; 0 without a pool.
        requests: of the whole context that fit at the same time.
        loss: expected increase in perplexity, None if it was not measured.
        loss_kl: expected KL divergence, None likewise.
        extra_flops: see :func:`xquant_vllm.planning.flops.extra_flops`; 0 for caches that hold keys and values.
        reason: why it cannot be served, None if it can.
        command: to type.
    """

    kind: Kind
    bytes_per_token: int | None
    cache_tokens: int | None
    hot_tokens: int
    requests: float
    loss: float | None
    loss_kl: float | None
    extra_flops: int | None
    reason: str | None
    command: str | None

    @property
    def supported(self) -> bool:
        """Whether it can be served in this memory."""
        return self.reason is None

    def as_json(self) -> dict[str, Any]:
        """As ``xquant plan --json`` prints it."""
        return {
            "method": self.kind.method,
            "bits": self.kind.bits,
            "calibrated": self.kind.calibrated,
            "bytes_per_token": self.bytes_per_token,
            "cache_tokens": self.cache_tokens,
            "hot_tokens": self.hot_tokens,
            "requests": round(self.requests, 2),
            "loss": self.loss,
            "loss_kl": self.loss_kl,
            "extra_flops": self.extra_flops,
            "supported": self.supported,
            "reason": self.reason,
            "command": self.command,
        }


def plan_option(kind: Kind, model: PlannedModel, serving: Serving, losses: Losses) -> Option:
    """Work one cache out.

    Args:
        kind: which.
        model: the model.
        serving: how it is served.
        losses: of the measured model that is most like it.
    """
    loss = losses.of(kind)
    made, reason = refused_by(lambda: pages(kind, model, serving))
    return option_of(kind, made, reason, model, serving, None if loss is None else (loss.increase, loss.kl))


def option_of(
    kind: Kind,
    made: Pages | None,
    reason: str | None,
    model: PlannedModel,
    serving: Serving,
    loss: tuple[float, float] | None,
) -> Option:
    """An option of pages, or without them for a reason."""
    increase, divergence = loss or (None, None)
    if made is None:
        return Option(kind, None, None, 0, 0.0, increase, divergence, None, reason, None)
    needs = page_needs(made.layers, serving.sequences)
    hot, taken = _hot(kind, made, model, serving, needs)
    left = serving.memory - taken
    blocks = left // needs.block_bytes if left > 0 else 0
    if reason is None and left < needs.least:
        reason = _too_little(serving, needs, taken)
    return Option(
        kind,
        made.bytes_per_token,
        needs.tokens(left) if left > 0 else 0,
        hot,
        blocks / needs.sequence_blocks,
        increase,
        divergence,
        extra_flops(made.formats, max(1, model.heads // serving.ranks)),
        reason,
        None if reason is not None else command(kind, model, serving),
    )


def _too_little(serving: Serving, needs: PageNeeds, taken: int) -> str:
    pool = f" beside {taken / 2**30:.2f} GiB of hot blocks" if taken else ""
    return (
        f"one request of --context {serving.context:,} needs {needs.least / 2**30:.3g} GiB of pages{pool}, more than "
        "--memory; set a shorter --context, or more memory"
    )


def _hot(kind: Kind, made: Pages, model: PlannedModel, serving: Serving, needs: PageNeeds) -> tuple[int, int]:
    """Tokens of the pool of hot blocks and its bytes, as plugin/hot/budget.py decides."""
    if kind.method in (PLAIN, KIVI):
        return 0, 0
    share = pool_share(serving.hot, made.formats)
    if not share or (serving.hot is None and serving.device != "cpu"):  # on GPUs no default was measured
        return 0, 0
    if serving.device == "cpu" and model.head_size not in CPU_HEAD_SIZES:
        return 0, 0
    if wanted_bytes(share, serving.memory, None) >= serving.memory:
        raise RefusedError(f"xquant: --hot {share}: nothing of --memory would be left for pages; set less")
    wanted = wanted_bytes(share, serving.memory, needs.least if serving.hot is None else None)
    token_bytes = plain_layout(model, serving).bytes_per_token * model.layers
    tokens = pool_tokens(wanted, token_bytes, serving.block_size)
    return tokens, tokens * token_bytes


def by_kind(options: Sequence[Option], kind: Kind) -> Option | None:
    """The option of a kind, if there is one."""
    return next((option for option in options if option.kind == kind), None)
