"""What a cache is expected to lose: what it lost on the measured model that is most alike. No more than a hint.

``losses.json`` beside this file is made from the accuracy results of the repository (benchmarks/accuracy/losses.py),
which docs/accuracy.md describes: increase in perplexity and KL divergence in FP32, means over a window of 1,024 tokens
of documentation and one of news.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_vllm.planning.caches import PLAIN, Kind
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.scheme.certificate import Certificate

_FILE = Path(__file__).with_name("losses.json")


@dataclass(frozen=True)
class Loss:
    """Of one cache.

    Attributes:
        increase: in perplexity.
        kl: divergence of the next token's distribution from that with a 16-bit cache.
    """

    increase: float
    kl: float


@dataclass(frozen=True)
class Losses:
    """Of one measured model.

    Attributes:
        model: its name.
        alike: whether the planned model has its very shape.
        rows: losses that were measured.
        own: whether they are those of the planned model's own factors.
    """

    model: str
    alike: bool
    rows: dict[Kind, Loss]
    own: bool = False

    @property
    def relation(self) -> str:
        """What that model is to the planned one."""
        if self.own:
            return "measured when its factors were made"
        return "which has this very shape" if self.alike else "the measured model that is most like this one"

    def of(self, kind: Kind) -> Loss | None:
        """Of a cache; None where it was not measured."""
        return Loss(0.0, 0.0) if kind.method == PLAIN else self.rows.get(kind)


def certified_losses(name: str, kind: Kind, certificate: Certificate) -> Losses:
    """What a folder's own certificate says of the cache that is built into it.

    Args:
        name: of the model.
        kind: of that cache.
        certificate: the folder's.
    """
    loss = Loss(certificate.increase.mean, certificate.kl.mean)
    return Losses(f"{name} on {certificate.text}", True, {kind: loss}, own=True)


@functools.cache
def _measured() -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))["models"]
    return models


def nearest_losses(model: PlannedModel) -> Losses:
    """Losses of the measured model that is most like another one.

    Multi-head attention, whose layer input is narrower than keys and values, is compared with multi-head attention;
    among the rest the numbers of kv heads and the sizes of heads decide.
    """

    def distance(measured: dict[str, Any]) -> tuple[bool, float]:
        narrow = measured["hidden_size"] < 2 * measured["kv_heads"] * measured["head_size"]
        ours = model.hidden_size < 2 * model.kv_heads * model.head_size
        sizes = ((model.kv_heads, measured["kv_heads"]), (model.head_size, measured["head_size"]))
        return narrow != ours, sum(abs(math.log2(own / other)) for own, other in sizes)

    best = min(_measured(), key=distance)
    shape = (model.hidden_size, model.heads, model.kv_heads, model.head_size, model.layers)
    alike = shape == tuple(best[name] for name in ("hidden_size", "heads", "kv_heads", "head_size", "layers"))
    rows = {
        Kind(row["method"], row["bits"], row["calibrated"]): Loss(row["increase"], row["kl"]) for row in best["rows"]
    }
    return Losses(best["model"], alike, rows)
