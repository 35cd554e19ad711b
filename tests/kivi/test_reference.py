"""The reference against the offline baseline, whose attention is written down token by token in FP64."""

from itertools import pairwise

import pytest
import torch

from tests.kivi.kivi_cases import POISON, Sequences, Spec, at_once, one_by_one, random_spec, random_steps
from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_token
from xquant_vllm.evaluation.methods.baselines.kivi import Kivi, KiviPreRope
from xquant_vllm.kivi import reference
from xquant_vllm.kivi.codec import load_key_groups, load_values
from xquant_vllm.projection.rope import apply_rope

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _expected(sequences: Sequences, seq: int, steps: list[tuple[int, int]]) -> torch.Tensor:
    """A sequence's outputs by what ``Kivi.read`` says that every query reads, ``[length, num_heads, head_size]``."""
    spec, plan = sequences.spec, sequences.plan
    keys, values = sequences.keys[seq].float(), sequences.values[seq].float()
    oldest, values_only, newest = Kivi(spec.bits, spec.key_group_size, spec.residual_tokens).read(keys, values)
    quantized_keys, exact_keys, exact_values = oldest.keys, newest.seen, values_only.seen | newest.seen
    quantized_values = per_token(values.flatten(1), spec.bits, spec.value_group_size).view_as(values)
    positions = torch.arange(keys.shape[0])
    if spec.exact_step:
        for begin, end in steps:
            exact_keys[begin:end, begin:] = exact_values[begin:end, begin:] = True
    if plan.rope is not None:
        keys, quantized_keys = (apply_rope(x, positions, plan.rope) for x in (keys, quantized_keys))
    outputs = torch.empty_like(sequences.queries[seq], dtype=torch.float64)
    for query in range(keys.shape[0]):
        first = max(0, query - spec.window + 1) if spec.window else 0
        seen = slice(first, query + 1)
        k = torch.where(exact_keys[query, seen, None, None], keys[seen], quantized_keys[seen]).double()
        v = torch.where(exact_values[query, seen, None, None], values[seen], quantized_values[seen]).double()
        for head in range(plan.num_heads):
            scores = k[:, head // spec.group] @ sequences.queries[seq][query, head].double() * plan.scale
            if spec.soft_cap:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            outputs[query, head] = scores.softmax(0) @ v[:, head // spec.group]
    return outputs


def _check(spec: Spec, steps: list[list[int]]) -> None:
    sequences = Sequences(spec)
    outputs = sequences.run(steps)
    for seq, output in enumerate(outputs):
        ends = torch.tensor([[0] * len(spec.lengths), *steps])[:, seq].cumsum(0).tolist()
        expected = _expected(sequences, seq, list(pairwise(ends)))
        tolerance = TOLERANCE[spec.dtype]
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(40))
def test_outputs_are_those_of_the_baseline(seed):
    spec = random_spec(seed)
    _check(spec, random_steps(spec))


@pytest.mark.parametrize("exact_step", [True, False])
@pytest.mark.parametrize("residual_tokens", [32, 128])
@pytest.mark.parametrize("cut", [at_once, one_by_one, random_steps])
def test_as_published(cut, residual_tokens, exact_step):
    spec = Spec((161, 30), group=1, residual_tokens=residual_tokens, exact_step=exact_step, block_size=128)
    _check(spec, cut(spec))


@pytest.mark.parametrize("seed", range(10))
def test_outputs_do_not_depend_on_how_a_prompt_was_cut(seed):
    spec = Spec((290, 70), group=1, bits=2, head_size=24, value_group_size=24, window=(None, 100)[seed % 2], seed=seed)
    expected = Sequences(spec).run(at_once(spec))
    for actual, whole in zip(Sequences(spec).run(random_steps(spec)), expected, strict=True):
        torch.testing.assert_close(actual, whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("cut", [at_once, one_by_one, random_steps])
def test_pages_hold_what_the_baseline_reads(cut):
    spec = Spec((150, 97), bits=2, key_group_size=16, residual_tokens=32, block_size=48, strided=True)
    sequences = Sequences(spec)
    sequences.run(cut(spec))
    plan, pages, size = sequences.plan, sequences.quantized.pages, spec.key_group_size
    for seq, length in enumerate(spec.lengths):
        blocks = torch.tensor([sequences.quantized.of[seq][index] for index in range(-(-length // spec.block_size))])
        groups = torch.arange(length // size)
        keys = load_key_groups(pages, plan.quantized, blocks[groups * size // spec.block_size], groups % 3)
        baseline = KiviPreRope(spec.bits, size)
        expected = baseline.keys(sequences.keys[seq].flatten(1))[: len(groups) * size]
        assert torch.equal(keys.flatten(0, 1).flatten(1), expected)
        slots = torch.tensor([sequences.quantized.slot(seq, position) for position in range(length)])
        values = load_values(pages, plan.quantized, slots)
        assert torch.equal(values.flatten(1), per_token(sequences.values[seq].flatten(1), spec.bits, 32))
    assert (sequences.quantized.memory[:, plan.quantized.page_bytes :] == POISON).all()


def test_a_group_with_a_refused_draft_is_quantized_again():
    spec = Spec((64,), residual_tokens=32, group=1)
    sequences, clean = Sequences(spec), Sequences(spec)
    drafted = sequences.keys[0].clone()
    drafted[60:] = 9.0
    sequences.keys, kept = [drafted], sequences.keys
    sequences.run([[58], [6]])
    sequences.keys, sequences.computed = kept, [60]
    (actual,) = sequences.run([[1], [3]])
    (expected,) = clean.run([[58], [6]])
    torch.testing.assert_close(actual[60:], expected[60:])
    assert torch.equal(sequences.quantized.memory, clean.quantized.memory)


def test_a_group_is_quantized_per_channel():
    spec = Spec((32,), head_size=8, value_group_size=8)
    sequences = Sequences(spec)
    sequences.keys[0][:, :, 3] *= 100  # of KIVI's outlier channels others must not notice anything
    sequences.run(at_once(spec))
    block = torch.tensor([sequences.quantized.of[0][0]])
    keys = load_key_groups(sequences.quantized.pages, sequences.plan.quantized, block, torch.tensor([0]))[0]
    assert torch.equal(keys.flatten(1), per_channel(sequences.keys[0].flatten(1), spec.bits, 32))
    error = (keys - sequences.keys[0]).abs()
    assert error[:, :, :3].max() < 0.3


def test_padding_is_not_stored():
    sequences = Sequences(Spec((20,)))
    step = sequences.step([20])
    padded = [torch.cat((x, torch.full_like(x[:3], torch.nan))) for x in (step.keys, step.values)]
    slots = [torch.cat((x[:20], torch.full((4,), -1))) for x in (step.slot_mapping, step.residual_slot_mapping)]
    memory = sequences.quantized.pages, sequences.residual.pages
    reference.store(*memory, sequences.plan, step.batch, *slots, *padded)
    actual = [pages.clone() for pages in memory]
    reference.store(
        *memory, sequences.plan, step.batch, step.slot_mapping, step.residual_slot_mapping, step.keys, step.values
    )
    for pages, before in zip(memory, actual, strict=True):
        assert torch.equal(pages, before)
