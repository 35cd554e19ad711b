"""Random layers, and sequences whose blocks come and go as vLLM's managers let them: freed memory is poisoned."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.cases import ABSURD_BLOCKS, MAX_POSITION
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.kivi import reference
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan
from xquant_vllm.projection.rope import RotaryTable

POISON = 0xFF  # NaN in FP16, BF16 and FP32


@dataclass(frozen=True)
class Spec:
    """What a layer is made of, and how many tokens its sequences come to."""

    lengths: tuple[int, ...] = (100,)
    kv_heads: int = 2
    group: int = 3
    head_size: int = 64
    bits: int = 4
    key_group_size: int = 32
    value_group_size: int = 32
    residual_tokens: int = 64
    block_size: int = 64
    residual_block_size: int = 16
    dtype: torch.dtype = torch.float32
    exact_step: bool = False
    window: int | None = None
    soft_cap: float | None = None
    rope: str = "none"
    rotary_size: int | None = None
    strided: bool = False
    seed: int = 0


def random_spec(seed: int) -> Spec:
    """Every option drawn evenly."""
    choose = random.Random(seed)
    head_size = choose.choice((8, 24, 64, 72, 128))
    key_group_size = choose.choice((16, 32, 32, 64))
    return Spec(
        lengths=tuple(choose.randint(1, 300) for _ in range(choose.randint(1, 3))),
        kv_heads=choose.randint(1, 3),
        group=choose.choice((1, 2, 3, 9)),
        head_size=head_size,
        bits=choose.choice((4, 2)),
        key_group_size=key_group_size,
        value_group_size=choose.choice([n for n in range(8, head_size + 1, 8) if head_size % n == 0]),
        residual_tokens=key_group_size * choose.choice((1, 2, 3)),
        block_size=key_group_size * choose.choice((1, 2, 3)),
        residual_block_size=choose.choice((16, 32, 48)),
        dtype=choose.choice((torch.float32, torch.bfloat16, torch.float16)),
        exact_step=choose.random() < 0.5,
        window=choose.choice((None, None, 1, 7, 40, 100)),
        soft_cap=choose.choice((None, None, 5.0)),
        rope=choose.choice(("none", "neox", "interleaved")),
        rotary_size=choose.choice((None, head_size // 2)),
        strided=choose.random() < 0.5,
        seed=seed,
    )


def make_plan(spec: Spec) -> KiviLayerPlan:
    heads, size, rope = spec.kv_heads, spec.head_size, None
    if spec.rope != "none":
        rotary_size = spec.rotary_size or size
        frequencies = 10000.0 ** (-torch.arange(0, rotary_size, 2) / rotary_size)
        angles = torch.arange(MAX_POSITION)[:, None] * frequencies
        rope = RotaryTable(angles.cos(), angles.sin(), spec.rope == "interleaved")
    return KiviLayerPlan(
        QuantizedLayout(heads, size, spec.bits, spec.key_group_size, spec.value_group_size, spec.block_size),
        ResidualLayout(heads, size, spec.dtype, spec.residual_block_size),
        num_heads=heads * spec.group,
        scale=2.0 * size**-0.5,
        residual_tokens=spec.residual_tokens,
        exact_step=spec.exact_step,
        sliding_window=spec.window,
        logits_soft_cap=spec.soft_cap,
        rope=rope,
    )


@dataclass
class _Blocks:
    """One kind of pages: memory, and every sequence's blocks by index."""

    memory: torch.Tensor
    page_bytes: int
    block_size: int
    window: int | None
    free: list[int]
    of: list[dict[int, int]]

    @property
    def pages(self) -> torch.Tensor:
        return self.memory[:, : self.page_bytes]

    def advance(self, seq: int, computed: int, new: int) -> None:
        """Free what is wholly behind the window of the next token, then allocate for the new ones."""
        oldest = 0 if self.window is None else max(0, computed - self.window + 1)
        owned = self.of[seq]
        for index in [index for index in owned if (index + 1) * self.block_size <= oldest]:
            block = owned.pop(index)
            self.memory[block] = POISON
            self.free.insert(0, block)
        for index in range(oldest // self.block_size, -(-(computed + new) // self.block_size)):
            if index not in owned:
                owned[index] = self.free.pop()

    def table(self, seqs: Sequence[int]) -> torch.Tensor:
        width = max((max(self.of[seq], default=0) for seq in seqs), default=0) + 2
        absurd = [ABSURD_BLOCKS[i % len(ABSURD_BLOCKS)] for i in range((len(seqs) + 1) * width)]
        table = torch.tensor(absurd, dtype=torch.int32).view(-1, width)
        for row, seq in enumerate(seqs):
            for index, block in self.of[seq].items():
                table[row, index] = block
        return table

    def slot(self, seq: int, position: int) -> int:
        return self.of[seq][position // self.block_size] * self.block_size + position % self.block_size


@dataclass(frozen=True)
class Step:
    """The arguments of one call of ``store`` and of ``paged_attention``."""

    batch: KiviBatch
    slot_mapping: torch.Tensor
    residual_slot_mapping: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor
    tokens: tuple[tuple[int, int, int], ...]  # sequence, first new token, its end


@dataclass
class Sequences:
    """Sequences in pages; every byte that no token has written, or whose token was freed, is poison."""

    spec: Spec
    plan: KiviLayerPlan = field(init=False)
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)
    queries: list[torch.Tensor] = field(init=False)
    quantized: _Blocks = field(init=False)
    residual: _Blocks = field(init=False)
    computed: list[int] = field(init=False)

    def __post_init__(self) -> None:
        spec, self.plan = self.spec, make_plan(self.spec)
        generator = torch.Generator().manual_seed(spec.seed)

        def normal(length: int, heads: int) -> torch.Tensor:
            return torch.randn(length, heads, spec.head_size, generator=generator).to(spec.dtype)

        self.keys = [normal(n, spec.kv_heads) for n in spec.lengths]
        self.values = [normal(n, spec.kv_heads) for n in spec.lengths]
        self.queries = [normal(n, spec.kv_heads * spec.group) for n in spec.lengths]
        plan = self.plan
        self.quantized = self._blocks(plan.quantized.page_bytes, spec.block_size, spec.window, generator)
        self.residual = self._blocks(
            plan.residual.page_bytes, spec.residual_block_size, spec.residual_tokens, generator
        )
        self.computed = [0] * len(spec.lengths)

    def _blocks(self, page_bytes: int, size: int, window: int | None, generator: torch.Generator) -> _Blocks:
        count = sum(-(-length // size) for length in self.spec.lengths) + 2
        row = page_bytes + (48 if self.spec.strided else 0)
        memory = torch.full((count, row), POISON, dtype=torch.uint8)
        free = torch.randperm(count, generator=generator).tolist()
        return _Blocks(memory, page_bytes, size, window, free, [{} for _ in self.spec.lengths])

    def step(self, new: Sequence[int]) -> Step:
        """The next step, with so many new tokens of every sequence."""
        seqs = [seq for seq, count in enumerate(new) if count]
        tokens = tuple((seq, self.computed[seq], self.computed[seq] + new[seq]) for seq in seqs)
        for seq, begin, end in tokens:
            for blocks in (self.quantized, self.residual):
                blocks.advance(seq, begin, end - begin)
            self.computed[seq] = end
        starts = torch.tensor([0, *(end - begin for _, begin, end in tokens)]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([end for _, _, end in tokens], dtype=torch.int32)

        def slots(blocks: _Blocks) -> torch.Tensor:
            mapped = [blocks.slot(seq, position) for seq, begin, end in tokens for position in range(begin, end)]
            return torch.tensor([*mapped, -1])

        def rows(of: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([of[seq][begin:end] for seq, begin, end in tokens])

        return Step(
            KiviBatch(AttentionBatch(starts, lengths, self.quantized.table(seqs)), self.residual.table(seqs)),
            slots(self.quantized),
            slots(self.residual),
            rows(self.keys),
            rows(self.values),
            rows(self.queries),
            tokens,
        )

    def run(self, steps: Sequence[Sequence[int]], kernels=reference) -> list[torch.Tensor]:
        """Store and attend step by step; returns every sequence's outputs ``[length, num_heads, head_size]``."""
        outputs = [torch.full_like(query, torch.nan) for query in self.queries]
        for new in steps:
            step = self.step(new)
            memory = self.quantized.pages, self.residual.pages
            kernels.store(
                *memory, self.plan, step.batch, step.slot_mapping, step.residual_slot_mapping, step.keys, step.values
            )
            output = torch.full_like(step.query, torch.nan)
            kernels.paged_attention(step.query, *memory, self.plan, step.batch, output)
            at = 0
            for seq, begin, end in step.tokens:
                outputs[seq][begin:end] = output[at : at + end - begin]
                at += end - begin
        return outputs


def at_once(spec: Spec) -> list[list[int]]:
    return [list(spec.lengths)]


def one_by_one(spec: Spec) -> list[list[int]]:
    return [[int(token < length) for length in spec.lengths] for token in range(max(spec.lengths))]


def random_steps(spec: Spec) -> list[list[int]]:
    """Chunks of any size, some of one token, at most 40 steps; sequences wait and finish."""
    choose, left, steps = random.Random(spec.seed), list(spec.lengths), []
    while any(left):
        longest = choose.choice((1, 2, 40, 200)) if len(steps) < 40 else 10**6
        new = [min(n, choose.randint(0 if len(steps) < 40 else longest, longest)) for n in left]
        left = [n - taken for n, taken in zip(left, new, strict=True)]
        if any(new):
            steps.append(new)
    return steps
