"""Layers that prefill by one step, and by a library's attention, under Triton's interpreter, against the reference."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.attention.gpu.test_paged_attention import assert_close, short, with_lengths
from tests.attention.whole_attention import WholeAttention
from xquant_vllm.attention import reference
from xquant_vllm.attention.gpu import launch, staging
from xquant_vllm.attention.gpu.prefill.step import PrefillSteps

SMALL = Spec(kv_heads=1, group=2, head_size=16, hidden_size=32, key_group=16, value_group=16, key_outliers=0)


def by(case: Case, attend_whole: WholeAttention) -> Case:
    return replace(case, plan=replace(case.plan, attend_whole=attend_whole))


def test_layers_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows and without, with exact prompts and without: described once, attended to by each in its way."""
    seqs = ((30, 1), (33, 9), (7, 7), (2, 1))
    kinds = ({}, {"window": 10}, {"exact_from": 2}, {"window": 15, "exact_from": 2})
    cases = [with_lengths(make_case(replace(SMALL, seqs=seqs, bias=True, **kind))) for kind in kinds]
    sent, send = [], staging.send
    monkeypatch.setattr(staging, "send", lambda numbers, device: sent.append(1) or send(numbers, device))
    step = PrefillSteps([case.plan for case in cases], room=32).make(cases[0].batch)
    for case in cases:
        # All but the pages' places is the same.
        assert case.batch.lengths == cases[0].batch.lengths
        case = replace(case, batch=replace(case.batch, prefill=step))
        assert_close(case.run(launch), case.run(reference))
    assert len(sent) == 1


@pytest.mark.parametrize(
    "seed", [100, 101, 102, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(103, 115))]
)
def test_whole_sequences_by_a_library(seed: int) -> None:
    """Whatever FlashAttention takes: windows, soft caps, sinks, groups, folded values, exact prompts."""
    spec = short(random_spec(seed))
    spec = replace(spec, seqs=(*spec.seqs, (40, 17)), dtype=torch.float16, exact_from=(None, 2)[seed % 2])
    print(spec)
    case = with_lengths(make_case(spec))
    library = WholeAttention()
    assert_close(by(case, library).run(launch), case.run(reference))
    assert len(library.calls) == 1


def test_sequences_between_others() -> None:
    """Those that decode get nothing of the library's; those that another call attends for are left to it."""
    case = with_lengths(make_case(replace(SMALL, seqs=((20, 10), (13, 1), (15, 12), (15, 9)), dtype=torch.float16)))
    library = WholeAttention()
    expected = case.run(reference)
    assert_close(by(case, library).run(launch), expected)
    assert library.calls[0].key_lens == (20, 0, 15, 15)
    assert case.batch.lengths is not None
    lengths = tuple((new, 0 if new == 12 else length) for new, length in case.batch.lengths)
    seq_lens = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    batch = replace(case.batch, lengths=lengths, seq_lens=seq_lens)
    actual = by(replace(case, batch=batch), library).run(launch)
    assert library.calls[1].key_lens == (20, 0, 0, 15)
    others = torch.ones(len(expected), dtype=torch.bool)
    others[11:23] = False
    assert_close(actual[others], expected[others])


def test_parts_of_sequences_are_left_to_our_kernel() -> None:
    """And FP32 is."""
    case = with_lengths(make_case(replace(SMALL, seqs=((60, 20), (12, 12)), dtype=torch.float16)))
    library = WholeAttention()
    batch = replace(case.batch, prefill=PrefillSteps([case.plan], room=40).make(case.batch))
    assert_close(by(replace(case, batch=batch), library).run(launch), case.run(reference))
    assert [of.key_lens for of in library.calls] == [(12,)]
    case = with_lengths(make_case(replace(SMALL, seqs=((6, 6),))))
    assert_close(by(case, library).run(launch), case.run(reference))
    assert len(library.calls) == 1
