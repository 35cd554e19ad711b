"""What factors were measured to lose, as their header says it."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A part of a header: nothing in it is unknown, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(StrictModel):
    """A mean, and the ends of its 95% interval over stretches of the text."""

    mean: float
    low: float
    high: float


class Certificate(StrictModel):
    """What a cache loses on a text that its factors have not seen, against a 16-bit cache.

    Attributes:
        text: name of the text.
        tokens: that were predicted.
        dtype: that the model computed in.
        bytes_per_token: of all layers, on one rank.
        kl: Kullback-Leibler divergence of the next token's distribution, in nats.
        increase: in perplexity.
        perplexity_16bit: of the text.
        top1: share of tokens at which both find the same token most likely.
    """

    text: str
    tokens: int
    dtype: str
    bytes_per_token: int
    kl: Measured
    increase: Measured
    perplexity_16bit: float
    top1: Measured

    def describe(self) -> str:
        """In one line."""
        return (
            f"on {self.text} ({self.tokens:,} tokens, not calibrated on): KL divergence {_digits(self.kl.mean)} "
            f"({_digits(self.kl.low)} to {_digits(self.kl.high)}), perplexity {self.increase.mean:+.2f} "
            f"({self.increase.low:+.2f} to {self.increase.high:+.2f}) beside {self.perplexity_16bit:.2f}, the same "
            f"most likely token {self.top1.mean:.1%} ({self.top1.low:.1%} to {self.top1.high:.1%})"
        )


def _digits(divergence: float) -> str:
    """Four digits behind the point, or six of a small one."""
    return f"{divergence:.4f}" if divergence >= 0.001 else f"{divergence:.6f}"
