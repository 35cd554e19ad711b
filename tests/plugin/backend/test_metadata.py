"""What the metadata builder makes once per step for all layers, from vLLM's own metadata."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.attention.attention_cases import Spec, make_plan
from xquant_vllm.attention import dispatch
from xquant_vllm.attention.gpu import kernels, staging
from xquant_vllm.attention.gpu.prefill.step import View
from xquant_vllm.plugin.backend.metadata import XQuantMetadataBuilder
from xquant_vllm.plugin.hot.gpu import HotGpuBatch, HotGpuRows

CPU = torch.device("cpu")
PLANS = [make_plan(Spec(kv_heads=2, window=window)) for window in (None, 9, None)]


def common_of(*lengths: tuple[int, int]) -> CommonAttentionMetadata:
    query_lens, seq_lens = (torch.tensor(of, dtype=torch.int32) for of in zip(*lengths, strict=True))
    starts = torch.cat((torch.zeros(1), query_lens.cumsum(0))).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.zeros(len(lengths), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        seq_lens_cpu_upper_bound=seq_lens,
    )


@pytest.fixture
def builder(monkeypatch):
    """Without an engine's configuration, for layers of the Triton kernels; ``sent`` is what goes to the device."""
    monkeypatch.setattr(dispatch._dispatch, "select", lambda device_type: kernels)
    monkeypatch.setattr(dispatch, "fix", lambda device: None)
    builder = object.__new__(XQuantMetadataBuilder)
    builder.device, builder.decode_tokens = CPU, 2
    builder._hot = builder._hot_gpu = None
    builder._some_without_pool = False
    builder._steps = dispatch.steps(PLANS, CPU)
    sent, send = [], staging.send
    monkeypatch.setattr(staging, "send", lambda numbers, device: sent.append(1) or send(numbers, device))
    builder.sent = sent
    return builder


def test_once_per_step(builder) -> None:
    batch = builder.build(0, common_of((1, 30), (2, 40), (20, 50))).batch
    assert [part.longest for plan in PLANS for part in batch.prefill.rounds(View.of(plan))] == [50, 28, 50]
    assert len(builder.sent) == 1
    assert builder.build(0, common_of((2, 30), (1, 40))).batch.prefill is None
    assert len(builder.sent) == 1


@pytest.mark.parametrize("drafts", [False, True])
def test_with_a_pool(builder, drafts: bool) -> None:
    """Of rows that are not hot, and of all rows for layers without a pool or where none is hot; not where all are."""
    builder._some_without_pool = drafts
    some = lambda batch: HotGpuBatch(None, HotGpuRows(batch, None, 50), replace(batch, lengths=((20, 0), (9, 9))))  # noqa: E731
    none = lambda batch: HotGpuBatch(None, None, batch)  # noqa: E731
    all_hot = lambda batch: HotGpuBatch(None, HotGpuRows(batch, None, 50), None)  # noqa: E731
    for hot_of, of_cold, of_all in ((some, [9], [50, 9] if drafts else None), (none, None, [50, 9]),
                                    (all_hot, None, [50, 9] if drafts else None)):  # fmt: skip
        builder._hot_gpu = SimpleNamespace(build=lambda common, batch, hot_of=hot_of: hot_of(batch))
        metadata = builder.build(0, common_of((20, 50), (9, 9)))
        cold = metadata.hot.cold if metadata.hot.hot is not None else None
        for batch, expected in ((cold, of_cold), (metadata.batch, of_all)):
            if batch is None or batch.prefill is None:
                assert expected is None
            else:
                (part,) = batch.prefill.rounds(View(None, None))
                assert list(part.whole.sequences.key_lens) == expected
