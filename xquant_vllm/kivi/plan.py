"""What a KIVI attention call is given, in vLLM's terms but without vLLM, and which tokens a query sees exactly."""

from dataclasses import dataclass

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout
from xquant_vllm.projection.rope import RotaryTable


@dataclass(frozen=True)
class KiviBatch:
    """A batch of sequences, each with some query tokens at the end of its cached tokens.

    Attributes:
        sequences: the sequences; their block table is that of the quantized pages.
        residual_block_table: ``[num_seqs, max_residual_blocks]`` int32, ids of residual pages; entries wholly before
            the last ``residual`` tokens of the first query are arbitrary and never read.
    """

    sequences: AttentionBatch
    residual_block_table: torch.Tensor


@dataclass(frozen=True)
class KiviLayerPlan:
    """Everything about one layer that does not change from call to call.

    Attributes:
        quantized: layout of the layer's quantized pages.
        residual: layout of its residual pages, with the same heads.
        num_heads: query heads; a multiple of the kv heads, which they share in consecutive groups.
        scale: factor on the scores.
        residual_tokens: R: keys are read quantized R at a time, and the last R values exactly; a multiple of the
            key groups.
        exact_step: whether a query sees the tokens of its own step exactly whatever R says, as published for prompts
            (``prompt: "exact"``); False: by R alone, so that outputs do not depend on how a prompt was cut.
        sliding_window: keys a query sees, itself included, or None for all.
        logits_soft_cap: scores become ``cap * tanh(score / cap)``, or None.
        rope: rotates keys when they are read (KIVI*: all pages hold keys before RoPE); None: pages hold them after it.
    """

    quantized: QuantizedLayout
    residual: ResidualLayout
    num_heads: int
    scale: float
    residual_tokens: int
    exact_step: bool = True
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    rope: RotaryTable | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        quantized, residual = self.quantized, self.residual
        if (quantized.num_kv_heads, quantized.head_size) != (residual.num_kv_heads, residual.head_size):
            raise ValueError("quantized and residual pages must hold the same heads")
        if self.num_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} kv heads")
        group = quantized.key_group_size
        if self.residual_tokens <= 0 or self.residual_tokens % group:
            raise ValueError(
                f"residual = {self.residual_tokens} does not fit groups of {group} keys, which are quantized whole: "
                f"set a positive multiple of {group}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Kv heads of this rank."""
        return self.quantized.num_kv_heads

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.quantized.head_size

    def first_exact(self, positions: torch.Tensor, step_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens whose keys, and whose values, a query finds exact; it finds all before them quantized.

        A query at position p sees ``l = p + 1`` cached tokens, of which the last ``l mod R`` keys and the last R values
        are exact (KIVI, algorithm 1). Values are never exact later than keys.

        Args:
            positions: ``[n]`` integer, positions of queries of one sequence.
            step_start: position of the first query token of the sequence in this step.

        Returns:
            First exact key and first exact value, ``[n]``, of the dtype of ``positions``.
        """
        cached = positions + 1
        keys, values = cached - cached % self.residual_tokens, (cached - self.residual_tokens).clamp(min=0)
        return (keys.clamp(max=step_start), values.clamp(max=step_start)) if self.exact_step else (keys, values)
