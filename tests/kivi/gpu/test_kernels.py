"""KIVI's Triton kernels, under Triton's interpreter, against the reference: outputs, and every byte of the pages."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.checks import TOLERANCE, relative_errors
from tests.kivi.kivi_cases import POISON, Sequences, Spec, random_spec
from xquant_vllm.attention.dispatch import OVERRIDE_VARIABLE
from xquant_vllm.attention.gpu import tiling, workspace
from xquant_vllm.kivi import dispatch, reference
from xquant_vllm.kivi.gpu import kernels, store
from xquant_vllm.kivi.gpu.kivi_gpu_plan import _kivi_gpu_plan
from xquant_vllm.kivi.plan import KiviBatch

CPU = torch.device("cpu")


class Triton:
    """The kernels, with what the host knows of a batch: all lengths, or as in decoding, the most query tokens.

    It takes sequences for longer than they are, as it does where drafted tokens were not kept.
    """

    def __init__(self, lengths: bool = True, decode_tokens: int = 1) -> None:
        self.lengths, self.decode_tokens = lengths, decode_tokens

    def paged_attention(self, query, pages, residual_pages, plan, batch, output) -> None:
        kernels.paged_attention(query, pages, residual_pages, plan, self._known(batch), output)

    def store(self, pages, residual_pages, plan, batch, *tensors) -> None:
        kernels.store(pages, residual_pages, plan, self._known(batch), *tensors)

    def _known(self, batch: KiviBatch) -> KiviBatch:
        of = batch.sequences
        new = (of.query_start_loc[1:] - of.query_start_loc[:-1]).tolist()
        lengths = tuple(zip(new, (of.seq_lens + 7).tolist(), strict=True)) if self.lengths else None
        known = replace(of, max_query_len=max(new), lengths=lengths, decode_tokens=self.decode_tokens)
        return replace(batch, sequences=known)


def check(spec: Spec, steps: list[list[int]], triton: Triton) -> None:
    actual, expected = Sequences(spec), Sequences(spec)
    outputs = zip(actual.run(steps, triton), expected.run(steps), strict=True)
    for kind in ("quantized", "residual"):
        assert torch.equal(getattr(actual, kind).memory, getattr(expected, kind).memory), kind
    for output, right in outputs:
        error, worst = relative_errors(output, right)
        assert error <= TOLERANCE[spec.dtype][0]
        assert worst <= TOLERANCE[spec.dtype][1]


@pytest.fixture
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes tens of milliseconds for a program: fewer splits, and soon several tokens to store."""
    monkeypatch.setattr(store, "_MANY_TOKENS", 8)
    monkeypatch.setattr(tiling, "_PROGRAMS", 6)


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize("seed", range(12))
def test_as_the_reference(seed: int) -> None:
    """A prompt in two chunks beside another one, then single tokens and several."""
    choose = random.Random(seed)
    spec = random_spec(seed)
    spec = replace(
        spec,
        lengths=(choose.randint(60, 100), choose.randint(4, 30)),
        kv_heads=choose.choice((1, 1, 2)),
        residual_tokens=spec.key_group_size * choose.choice((1, 1, 2)),
    )
    print(spec)
    first = choose.randint(10, spec.lengths[0] - 5)
    steps = [[first, 0], [spec.lengths[0] - first - 4, spec.lengths[1] - 1], [1, 1], [3, 0]]
    check(spec, steps, Triton())


SPECS = {
    "many tokens of decoding": (Spec((70,), kv_heads=1, group=2, window=40), [[50], [17], [3]]),
    "a group is completed by any token": (Spec((40, 35, 20), kv_heads=1, key_group_size=16, residual_tokens=16),
                                          [[30, 25, 10], [2, 7, 6], [8, 3, 4]]),
    "two bits, groups of 48": (Spec((100,), kv_heads=1, bits=2, key_group_size=48, residual_tokens=48, block_size=48),
                               [[95], [1], [4]]),
    "head of 256": (Spec((70,), kv_heads=1, group=1, head_size=256, value_group_size=64), [[66], [3], [1]]),
    "head of 80": (Spec((70,), kv_heads=1, group=2, head_size=80, value_group_size=16, rope="neox"), [[69], [1]]),
    "16 queries per kv head": (Spec((70,), kv_heads=1, group=16), [[69], [1]]),
}  # fmt: skip


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize("name", SPECS)
def test_special(name: str) -> None:
    """Where the host knows nothing of lengths but the most query tokens."""
    check(*SPECS[name], Triton(lengths=False))


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize(("drafted", "group"), [pytest.param(16, 4, marks=pytest.mark.nightly), (1, 48)])
def test_long_drafts(drafted: int, group: int) -> None:
    """More rows than a tile has decode, alone and beside a prompt."""
    new = 1 + drafted
    spec = Spec((40 + 2 * new, 29 + 2 * new, new + 5), kv_heads=1, group=group)
    check(spec, [[40, 29, 0], [new, new, 0], [new, new, new + 5]], Triton(decode_tokens=new))


class Nulled(Triton):
    """Block tables as vLLM leaves them: entries behind a window are a block that no sequence has, with any bytes."""

    def __init__(self, sequences: Sequences) -> None:
        super().__init__()
        self.sequences, self.nulled = sequences, 0

    def _known(self, batch: KiviBatch) -> KiviBatch:
        tables = []
        for table, blocks in (
            (batch.sequences.block_table, self.sequences.quantized),
            (batch.residual_block_table, self.sequences.residual),
        ):
            owned = torch.tensor([block for of in blocks.of for block in of.values()])
            there = torch.isin(table, owned)
            assert (blocks.pages[blocks.free[0]] == POISON).all()
            self.nulled += int((~there[:, 0]).sum())
            tables.append(torch.where(there, table, blocks.free[0]).int())
        batch = super()._known(batch)
        return KiviBatch(replace(batch.sequences, block_table=tables[0]), tables[1])


@pytest.mark.usefixtures("_few_programs")
def test_nulled_entries() -> None:
    spec = Spec((100, 70), kv_heads=1, group=2, window=20)
    actual, expected = Sequences(spec), Sequences(spec)
    steps = [[90, 60], [6, 9], [3, 1], [1, 0]]
    triton = Nulled(actual)
    for output, right in zip(actual.run(steps, triton), expected.run(steps), strict=True):
        assert relative_errors(output, right)[0] <= TOLERANCE[spec.dtype][0]
    assert triton.nulled > 6


@pytest.fixture
def _chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These kernels are chosen for the CPU, too."""
    monkeypatch.setenv(OVERRIDE_VARIABLE, "triton")
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()
    workspace.release(CPU)


@pytest.mark.usefixtures("_chosen")
def test_what_is_reserved_suffices() -> None:
    spec = Spec((65, 3), kv_heads=1, group=2)
    sequences = Sequences(spec)
    sequences.run([[62, 0]])
    workspace.release(CPU)
    dispatch.reserve(sequences.plan, 8, 2, spec.dtype, CPU)
    dispatch.fix(CPU)
    assert dispatch.select("cpu") is kernels
    sequences.run([[1, 1], [2, 2]], Triton(lengths=False))
    with pytest.raises(RuntimeError, match="bytes of workspace, but only"):
        workspace.take(CPU, ((1 << 30,), torch.uint8))


def test_padding_is_left_alone() -> None:
    """Tokens after the last sequence's, and sequences without tokens, as in a CUDA graph of a larger batch."""
    sequences, clean = Sequences(Spec((40, 33), kv_heads=1)), Sequences(Spec((40, 33), kv_heads=1))
    for of in (sequences, clean):
        of.run([[31, 32]])
    step, expected = sequences.step([1, 1]), clean.step([1, 1])
    batch = step.batch.sequences
    padded = KiviBatch(
        replace(
            batch,
            query_start_loc=torch.cat((batch.query_start_loc, torch.tensor([2, 2], dtype=torch.int32))),
            seq_lens=torch.cat((batch.seq_lens, torch.zeros(2, dtype=torch.int32))),
            block_table=torch.cat((batch.block_table, batch.block_table)),
            max_query_len=1,
        ),
        torch.cat((step.batch.residual_block_table, step.batch.residual_block_table)),
    )
    slots = (torch.cat((of[:2], torch.tensor([-1, -1]))) for of in (step.slot_mapping, step.residual_slot_mapping))
    query, keys, values = (torch.cat((x, x)) for x in (step.query, step.keys, step.values))
    pages, output = (sequences.quantized.pages, sequences.residual.pages), torch.full_like(query, torch.nan)
    kernels.store(*pages, sequences.plan, padded, *slots, keys, values)
    kernels.paged_attention(query, *pages, sequences.plan, padded, output)

    pages, right = (clean.quantized.pages, clean.residual.pages), torch.empty_like(expected.query)
    slots = expected.slot_mapping, expected.residual_slot_mapping
    reference.store(*pages, clean.plan, expected.batch, *slots, expected.keys, expected.values)
    reference.paged_attention(expected.query, *pages, clean.plan, expected.batch, right)
    assert relative_errors(output[:2], right)[0] <= TOLERANCE[torch.float32][0]
    assert output[2:].isnan().all()
    assert torch.equal(sequences.quantized.memory, clean.quantized.memory)
    assert torch.equal(sequences.residual.memory, clean.residual.memory)
    assert (sequences.residual.memory == POISON).any()


def test_refuses_large_heads() -> None:
    sequences = Sequences(Spec((1,), kv_heads=1, group=1, head_size=264, value_group_size=24))
    with pytest.raises(ValueError, match="head_size = 264 is not supported"):
        kernels.reserve(sequences.plan, 1, 1, torch.float32, CPU)


def test_forgets_dead_plans() -> None:
    before = len(_kivi_gpu_plan.kept)
    sequences = Sequences(Spec((8,), kv_heads=1, group=1))
    kernels.reserve(sequences.plan, 1, 1, torch.float32, CPU)
    assert len(_kivi_gpu_plan.kept) == before + 1
    del sequences
    assert len(_kivi_gpu_plan.kept) == before
