"""What the metadata builder makes once per step for all layers, from vLLM's own metadata."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.attention.attention_cases import Spec, make_plan
from xquant_vllm.attention import dispatch
from xquant_vllm.attention.batch import AttentionBatch
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


def hot_batch(hot: str, batch: AttentionBatch) -> HotGpuBatch:
    rows = None if hot == "none" else HotGpuRows(batch, None, 50)
    cold = {"none": batch, "some": replace(batch, lengths=((20, 0), (9, 9))), "all": None}
    return HotGpuBatch(None, rows, cold[hot])


@pytest.mark.parametrize(
    ("hot", "without_pool", "of_cold", "of_all"),
    [
        ("none", False, None, (50, 9)),
        ("some", False, (9,), None),
        ("some", True, (9,), (50, 9)),
        ("all", False, None, None),
        ("all", True, None, (50, 9)),
    ],
)
def test_with_a_pool(builder, hot: str, without_pool: bool, of_cold, of_all) -> None:
    """Keys of the rows that are not hot, and of all rows if any layer attends to all of them from pages."""
    builder._some_without_pool = without_pool
    builder._hot_gpu = SimpleNamespace(build=lambda common, batch: hot_batch(hot, batch))
    metadata = builder.build(0, common_of((20, 50), (9, 9)))
    found = [None if batch is None or batch.prefill is None else batch.prefill.rounds(View(None, None))[0]
             for batch in (metadata.hot.cold if hot == "some" else None, metadata.batch)]  # fmt: skip
    assert [None if part is None else part.whole.sequences.key_lens for part in found] == [of_cold, of_all]
    assert len(builder.sent) == sum(of is not None for of in (of_cold, of_all))
