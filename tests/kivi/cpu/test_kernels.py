"""The C++ kernels of KIVI against the reference."""

import functools
from dataclasses import replace

import pytest
import torch

from tests.attention.stored_pages import SPECIAL
from tests.cpu_kernels import assert_close, bits, has_kernels
from tests.kivi.kivi_cases import Sequences, Spec, Step, at_once, random_spec, random_steps
from xquant_vllm.kivi import reference
from xquant_vllm.kivi.pages import QuantizedLayout

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from xquant_vllm.attention.cpu.library import INTEGER_ISAS
from xquant_vllm.kivi.cpu import kernels as cpu
from xquant_vllm.kivi.cpu import plan as cpu_plan


def assert_same_pages(actual: Sequences, expected: Sequences) -> None:
    """Codes and residuals byte for byte; FP16 sections by value: a NaN is a NaN, and a minimum is either zero."""
    layout: QuantizedLayout = expected.plan.quantized
    assert torch.equal(actual.residual.memory, expected.residual.memory)
    codes, halves = slice(0, layout.key_scales_at), slice(layout.key_scales_at, layout.content_bytes)
    x, y = actual.quantized.memory, expected.quantized.memory
    assert torch.equal(x[:, codes], y[:, codes])
    assert torch.equal(x[:, layout.content_bytes :], y[:, layout.content_bytes :])
    x, y = (pages[:, halves].contiguous().view(torch.float16) for pages in (x, y))
    torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)


@functools.cache
def expected_of(spec: Spec) -> tuple[Sequences, list[torch.Tensor]]:
    sequences = Sequences(spec)
    return sequences, sequences.run(random_steps(spec))


def check(spec: Spec) -> None:
    print(spec)
    (expected, expected_outputs), sequences = expected_of(spec), Sequences(spec)
    for actual, output in zip(sequences.run(random_steps(spec), cpu), expected_outputs, strict=True):
        assert_close(actual, output)
    assert_same_pages(sequences, expected)


@pytest.mark.parametrize("seed", range(30))
def test_random_layers(isa: str, seed: int) -> None:
    check(random_spec(seed))


LARGE = {
    "as published": Spec((700, 30, 257), group=3, residual_tokens=128, block_size=128, exact_step=True),
    "2 bits before RoPE": Spec(
        (600,), bits=2, key_group_size=128, residual_tokens=128, block_size=128, rope="neox", exact_step=True
    ),
    "wide heads": Spec((300, 60), kv_heads=1, head_size=256, value_group_size=64, dtype=torch.bfloat16, soft_cap=20.0),
    "groups across tiles": Spec((400,), key_group_size=48, residual_tokens=96, block_size=144, window=200),
    "many queries per kv head": Spec((90,), kv_heads=1, group=211, head_size=8, value_group_size=8),
}


@pytest.mark.parametrize("name", LARGE)
def test_large(isa: str, name: str) -> None:
    check(LARGE[name])


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extreme_scores(isa: str, scale: float) -> None:
    """All scores equal, and so far apart that most weights underflow."""
    spec, outputs = Spec((300,), group=1), []
    for kernels in (reference, cpu):
        sequences = Sequences(spec)
        sequences.plan = replace(sequences.plan, scale=scale)
        outputs += sequences.run(at_once(spec), kernels)
    # Scores of some hundred have an FP32 step of 3e-5, and with VNNI they are of queries in 16 bits.
    atol = 1e-5 + scale * (5e-4 if isa in INTEGER_ISAS else 1e-4)
    torch.testing.assert_close(outputs[1], outputs[0], atol=atol, rtol=0)


INVARIANT = {
    "4 bits": Spec((600, 70, 290)),
    "2 bits, window": Spec((600, 70), bits=2, window=150, soft_cap=5.0, dtype=torch.bfloat16, value_group_size=16),
    "before RoPE": Spec((400, 150), kv_heads=1, head_size=72, value_group_size=24, rope="interleaved"),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits(isa: str, name: str) -> None:
    """However a prompt is cut, whatever else is in the batch, and on any number of threads."""
    spec = INVARIANT[name]
    alone = [[n if i == j else 0 for j, n in enumerate(spec.lengths)] for i in range(len(spec.lengths))]
    torch.set_num_threads(1)
    expected = Sequences(spec).run(at_once(spec), cpu)
    for threads, steps in ((1, alone), (1, random_steps(spec)), (2, random_steps(spec)), (7, at_once(spec))):
        torch.set_num_threads(threads)
        for actual, output in zip(Sequences(spec).run(steps, cpu), expected, strict=True):
            assert torch.equal(bits(actual), bits(output))


def test_same_bits_beside_others_where_a_step_is_exact(isa: str) -> None:
    spec = Spec((500, 70), exact_step=True)
    expected = Sequences(spec).run([[400, 50], [50, 20], [50, 0]], cpu)
    alone = Sequences(spec).run([[400, 0], [0, 50], [50, 0], [0, 20], [50, 0]], cpu)
    for actual, output in zip(alone, expected, strict=True):
        assert torch.equal(bits(actual), bits(output))


@pytest.mark.parametrize("what", ["queries", "keys"])
def test_nan(isa: str, what: str) -> None:
    """A NaN reaches the queries that it reaches in the reference: of a key those that see it, or its group's codes."""
    spec, outputs = Spec((300,), group=1), []
    for kernels in (reference, cpu):
        sequences = Sequences(spec)
        getattr(sequences, what)[0][70, 0, 5] = torch.nan
        outputs += sequences.run([[100], [200]], kernels)
    assert outputs[0].isnan().any()
    assert torch.equal(outputs[1].isnan(), outputs[0].isnan())
    finite = ~outputs[0].isnan().any(-1)
    assert_close(outputs[1][finite], outputs[0][finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_of_special_numbers(isa: str, dtype: torch.dtype) -> None:
    spec = Spec((120,), head_size=24, value_group_size=8, key_group_size=16, block_size=48, dtype=dtype)
    both = Sequences(spec), Sequences(spec)
    generator = torch.Generator().manual_seed(0)
    for x in (both[0].keys[0], both[0].values[0]):
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape, generator=generator)]
        x.copy_(torch.where(torch.rand(x.shape, generator=generator) < 0.05, chosen, (x * 4).round()))
        x[40:60, :, 3] = 2.5  # constant groups
    both[1].keys, both[1].values = both[0].keys, both[0].values
    for sequences, kernels in zip(both, (cpu, reference), strict=True):
        for new in ([7], [30], [1], [82]):
            _store(sequences, sequences.step(new), kernels)
    assert_same_pages(*both)


def _store(sequences: Sequences, step: Step, kernels=cpu, **changes) -> None:
    arguments = {
        "pages": sequences.quantized.pages,
        "residual_pages": sequences.residual.pages,
        "plan": sequences.plan,
        "batch": step.batch,
        "slot_mapping": step.slot_mapping,
        "residual_slot_mapping": step.residual_slot_mapping,
        "keys": step.keys,
        "values": step.values,
    }
    kernels.store(**(arguments | changes))


def _attend(sequences: Sequences, step: Step, **changes) -> None:
    arguments = {
        "query": step.query,
        "pages": sequences.quantized.pages,
        "residual_pages": sequences.residual.pages,
        "plan": sequences.plan,
        "batch": step.batch,
        "output": torch.empty_like(step.query),
    }
    cpu.paged_attention(**(arguments | changes))


def test_strides(isa: str) -> None:
    """Keys and values as parts of one tensor, query and output as parts of others, and a residual of another dtype."""
    spec = Spec((90,), dtype=torch.bfloat16)
    both = Sequences(spec), Sequences(spec)
    steps = [sequences.step([90]) for sequences in both]
    packed = torch.cat((steps[0].keys.flatten(1), steps[0].values.flatten(1)), 1).float()
    keys, values = (x.unflatten(1, (2, 64)) for x in packed.chunk(2, 1))
    _store(both[0], steps[0], keys=keys, values=values)
    _store(both[1], steps[1])
    assert_same_pages(*both)
    query = torch.zeros(90, 8, 80, dtype=torch.bfloat16)
    output = torch.full_like(query, 5.0)
    query[:, 1:7, 8:72] = steps[0].query
    _attend(both[0], steps[0], query=query[:, 1:7, 8:72], output=output[:, 1:7, 8:72])
    expected = torch.empty_like(steps[1].query)
    _attend(both[1], steps[1], output=expected)
    assert torch.equal(output[:, 1:7, 8:72], expected)
    output[:, 1:7, 8:72] = 5.0
    assert (output == 5.0).all()


def test_nothing_to_do(isa: str) -> None:
    """Padding is not stored, and sequences without queries are passed over."""
    sequences = Sequences(Spec((20, 30)))
    step = sequences.step([20, 30])
    before = sequences.quantized.memory.clone(), sequences.residual.memory.clone()
    batch = step.batch.sequences
    nobody = torch.zeros_like(batch.query_start_loc)
    idle = replace(step.batch, sequences=replace(batch, query_start_loc=nobody))
    padding = torch.full_like(step.slot_mapping, -1)
    _store(sequences, step, batch=idle, slot_mapping=padding, residual_slot_mapping=padding)
    assert torch.equal(sequences.quantized.memory, before[0])
    assert torch.equal(sequences.residual.memory, before[1])
    output = torch.full_like(step.query, 7.0)
    _attend(sequences, step, batch=idle, output=output)
    assert (output == 7.0).all()


@pytest.fixture
def stored() -> tuple[Sequences, Step]:
    sequences = Sequences(Spec((70, 20), rope="neox"))
    step = sequences.step([70, 20])
    _store(sequences, step)
    return sequences, step


def test_refuses_wrong_tensors(stored: tuple[Sequences, Step]) -> None:
    sequences, step = stored
    batch = step.batch.sequences
    wrong_everywhere = {
        "pages must be uint8": {"pages": sequences.quantized.pages[:, :-1]},
        "pages must be": {"residual_pages": sequences.residual.pages.view(torch.int8)},
        "seq_lens must be": {"batch": replace(step.batch, sequences=replace(batch, seq_lens=batch.seq_lens.long()))},
        "rows of block_table do not fit": {
            "batch": replace(step.batch, sequences=replace(batch, block_table=batch.block_table[:1]))
        },
        "residual_block_table must be": {
            "batch": replace(step.batch, residual_block_table=step.batch.residual_block_table.t())
        },
        "rows of residual_block_table do not fit": {
            "batch": replace(step.batch, residual_block_table=step.batch.residual_block_table[:1])
        },
    }
    for message, changes in wrong_everywhere.items():
        for call in (_store, _attend):
            with pytest.raises(ValueError, match=message):
                call(sequences, step, **changes)
    for message, changes in {
        "slot_mapping must be": {"slot_mapping": step.slot_mapping.int()},
        "residual_slot_mapping must be": {"residual_slot_mapping": step.residual_slot_mapping.int()},
        "do not fit together": {"residual_slot_mapping": step.residual_slot_mapping[:80]},
        "keys must hold 128 numbers per token": {"keys": step.keys[:, :1]},
        "values must be FP32": {"values": step.values.double()},
        "90 keys, 89 values": {"values": step.values[1:]},
    }.items():
        with pytest.raises(ValueError, match=message):
            _store(sequences, step, **changes)
    for message, changes in {
        "query must be": {"query": step.query[:, :-1]},
        "output must be like query": {"output": torch.empty_like(step.query).half()},
    }.items():
        with pytest.raises(ValueError, match=message):
            _attend(sequences, step, **changes)


def test_refuses_indices_out_of_range(stored: tuple[Sequences, Step]) -> None:
    sequences, step = stored
    batch = step.batch.sequences
    table, residual_table = batch.block_table.clone(), step.batch.residual_block_table.clone()
    table[0, 0], residual_table[0, 1] = len(sequences.quantized.memory), -3
    for message, changed in {
        "a block table names a block": replace(step.batch, sequences=replace(batch, block_table=table)),
        "names a block that its pages do not have": replace(step.batch, residual_block_table=residual_table),
        "must count the query tokens": replace(
            step.batch, sequences=replace(batch, seq_lens=torch.tensor([60, 20], dtype=torch.int32))
        ),
        "longer than its row of block_table": replace(
            step.batch, sequences=replace(batch, block_table=batch.block_table[:, :1])
        ),
        "longer than its row of the residual's block_table": replace(
            step.batch, residual_block_table=step.batch.residual_block_table[:, :4]
        ),
    }.items():
        for call in (_store, _attend):
            with pytest.raises(ValueError, match=message):
                call(sequences, step, batch=changed)
    for which in ("slot_mapping", "residual_slot_mapping"):
        with pytest.raises(ValueError, match="names a slot"):
            _store(sequences, step, **{which: getattr(step, which) + 10**6})
    rope = sequences.plan.rope
    assert rope is not None
    short = replace(sequences.plan, rope=replace(rope, cos=rope.cos[:64], sin=rope.sin[:64]))
    with pytest.raises(ValueError, match="rotary table"):
        _attend(sequences, step, plan=short)


def test_forgets_dead_plans() -> None:
    before = len(cpu_plan.prepare.kept)
    sequences = Sequences(Spec((20,)))
    sequences.run([[20]], cpu)
    assert len(cpu_plan.prepare.kept) == before + 1
    del sequences
    assert len(cpu_plan.prepare.kept) == before
