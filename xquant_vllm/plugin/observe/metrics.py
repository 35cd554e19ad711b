"""The metrics of this package on vLLM's ``/metrics``: names, kinds and what they count. The only list of them."""

from dataclasses import dataclass
from typing import Literal

LABELS = ("model_name", "engine", "rank")
"""Of every metric: as vLLM labels its own, and the rank within the engine that counted."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as it is scraped, without ``_total`` of a counter, ``_sum`` and ``_count`` of a summary.
        kind: of Prometheus.
        text: its help.
        layered: whether it has a label ``layer`` too.
    """

    name: str
    kind: Literal["gauge", "counter", "summary"]
    text: str
    layered: bool = False

    @property
    def samples(self) -> tuple[str, ...]:
        """The names under which it is scraped."""
        return {
            "gauge": (self.name,),
            "counter": (f"{self.name}_total",),
            "summary": (f"{self.name}_sum", f"{self.name}_count"),
        }[self.kind]


BYTES = Metric("xquant_bytes_per_token", "gauge", "Bytes that a token takes in the pages of the rank's layers.")
PLAIN_BYTES = Metric(
    "xquant_bytes_per_token_16bit", "gauge", "Bytes that a token would take in a 16-bit cache of the same layers."
)
CAPACITY = Metric("xquant_capacity_tokens", "gauge", "Tokens that the pages hold, as vLLM counts them.")
PLAIN_CAPACITY = Metric(
    "xquant_capacity_tokens_16bit",
    "gauge",
    "Tokens that a 16-bit cache would hold in the memory of pages and of hot blocks together.",
)
HOT_CAPACITY = Metric("xquant_hot_capacity_tokens", "gauge", "Tokens that the pool of hot blocks holds; 0 without.")
HOT = Metric("xquant_hot_tokens", "gauge", "Tokens that the last step attended to in the pool, mean over layers.")
COLD = Metric("xquant_cold_tokens", "gauge", "Tokens that the last step attended to in pages, mean over layers.")
PROMOTED = Metric(
    "xquant_promoted_tokens", "counter", "Tokens that were brought from pages into the pool, mean over layers."
)
REMATERIALIZED = Metric(
    "xquant_rematerialized_tokens",
    "counter",
    "Tokens that were read back from pages, to attend to them or to write them to the pool, mean over layers.",
)
KEY_ERROR = Metric(
    "xquant_probe_key_error", "summary", "Relative error of rematerialized keys, by the quality probe.", layered=True
)
VALUE_ERROR = Metric(
    "xquant_probe_value_error",
    "summary",
    "Relative error of rematerialized values, by the quality probe.",
    layered=True,
)
DIVERGENCE = Metric(
    "xquant_probe_attention_divergence",
    "summary",
    "Divergence (KL, nats) of attention weights from those with exact keys, by the quality probe.",
    layered=True,
)

METRICS = (
    BYTES,
    PLAIN_BYTES,
    CAPACITY,
    PLAIN_CAPACITY,
    HOT_CAPACITY,
    HOT,
    COLD,
    PROMOTED,
    REMATERIALIZED,
    KEY_ERROR,
    VALUE_ERROR,
    DIVERGENCE,
)
