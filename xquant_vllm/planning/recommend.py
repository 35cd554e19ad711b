"""Which cache of a plan is recommended, and why."""

from collections.abc import Sequence

from xquant_vllm.planning.caches import CHAIN, HEAD, JOINT, KIVI, PLAIN, X
from xquant_vllm.planning.options import Option

# Increase in perplexity, on the measured model, up to which a cache is recommended: the default, 4 bits without
# calibration, loses 0.24 and 0.27.
MOST_LOSS = 0.3
# A simpler cache is recommended if it holds at least so much of what the largest one holds.
_NEARLY = 0.9
# What needs a text, and what reads slower where it is not hot, comes later.
_ORDER = {PLAIN: 0, HEAD: 1, X: 2, JOINT: 3, CHAIN: 4, KIVI: 5}


def recommend(options: Sequence[Option], most_loss: float = MOST_LOSS) -> Option | None:
    """The simplest of those that hold most, of those that lose little; None if nothing can be served.

    Caches whose loss was not measured are left out, and without a pool of hot blocks all that is slow in pages.

    Args:
        options: all of a plan.
        most_loss: increase in perplexity that is accepted.
    """
    able = [option for option in options if option.supported and option.cache_tokens]
    kept = [
        option
        for option in able
        if option.loss is not None and option.loss <= most_loss and (_fast_in_pages(option) or option.hot_tokens)
    ]
    if not kept:
        return able[0] if able else None
    largest = max(option.cache_tokens or 0 for option in kept)
    near = [option for option in kept if (option.cache_tokens or 0) >= _NEARLY * largest]
    return min(near, key=lambda option: (option.kind.calibrated, _ORDER[option.kind.method], option.loss))


def _fast_in_pages(option: Option) -> bool:
    return option.kind.method in (PLAIN, HEAD, KIVI)
