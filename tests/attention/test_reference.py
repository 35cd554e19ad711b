"""The reference against attention as one would write it down, in FP64 and without pages."""

import pytest
import torch

from tests.attention.attention_cases import Spec, make_case, make_plan
from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.codec.quantizer import dequantize, quantize


def _rotated(x: torch.Tensor, position: int, spec: Spec) -> torch.Tensor:
    """RoPE of one head as a multiplication of complex numbers."""
    if spec.rope == "none":
        return x
    size = spec.rotary_size or spec.head_size
    pairs = [(2 * i, 2 * i + 1) if spec.rope == "interleaved" else (i, i + size // 2) for i in range(size // 2)]
    result = x.clone()
    for index, (a, b) in enumerate(pairs):
        angle = torch.tensor(position * 10000.0 ** (-2 * index / size), dtype=torch.float64)
        turned = torch.complex(x[a], x[b]) * torch.polar(torch.ones_like(angle), angle)
        result[a], result[b] = turned.real, turned.imag
    return result


def _dense(spec: Spec, plan, query: torch.Tensor, latents: list[torch.Tensor]) -> torch.Tensor:
    """Attention of the last tokens of one sequence, one query and head at a time."""
    projection, streams = plan.projection, plan.layout.streams
    exact = [
        dequantize(*quantize(x, stream.bits, stream.group_size, stream.outlier_channels)).double()
        for x, stream in zip(latents, streams, strict=True)
    ]
    length, past = exact[0].shape[0], exact[0].shape[0] - query.shape[0]
    result = torch.empty_like(query, dtype=torch.float64)
    for head in range(plan.num_heads):
        kv_head = head // spec.group
        latent_head = 0 if spec.joint else kv_head
        keys = exact[0][:, latent_head] @ projection.up_key[kv_head].double()
        values = exact[1][:, latent_head] @ projection.up_value[kv_head].double()
        if spec.bias:
            keys, values = keys + projection.key_bias[kv_head], values + projection.value_bias[kv_head]
        if spec.norm:
            norm = projection.key_norm
            keys = keys / (keys.pow(2).mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight
        keys = torch.stack([_rotated(key, position, spec) for position, key in enumerate(keys)])
        for index in range(query.shape[0]):
            position = past + index
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            scores = keys[first : position + 1] @ query[index, head].double() * plan.scale
            if spec.soft_cap:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            result[index, head] = torch.softmax(scores, 0) @ values[first : position + 1]
    assert length == past + query.shape[0]
    return result


SPECS = {
    "head basis": Spec(),
    "joint basis": Spec(joint=True, key_group=32, value_group=128, key_bits=3, value_bits=2, head_size=64),
    "bias and norm": Spec(bias=True, norm=True, head_size=24, key_group=24, value_group=8),
    "interleaved partial RoPE": Spec(rope="interleaved", rotary_size=16, value_outliers=2),
    "no RoPE, soft cap": Spec(rope="none", soft_cap=3.0, key_bits=8, value_bits=8),
    "sliding window": Spec(window=9, block_size=32),
    "window of one": Spec(window=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_dense(name: str) -> None:
    spec = SPECS[name]
    plan = make_plan(spec)
    torch.manual_seed(0)
    length, new = 40, 3
    latents = [torch.randn(length, stream.num_heads, stream.width) for stream in plan.layout.streams]
    block_size = spec.block_size
    blocks = torch.randperm(8)[: -(-length // block_size)].int()
    pages = torch.zeros(8, plan.layout.page_bytes, dtype=torch.uint8)
    positions = torch.arange(length)
    slots = blocks[positions // block_size].long() * block_size + positions % block_size
    reference.store(pages, plan, slots, *latents)
    query = torch.randn(new, plan.num_heads, spec.head_size)
    output = torch.empty_like(query)
    batch = AttentionBatch(torch.tensor([0, new]).int(), torch.tensor([length]).int(), blocks[None])
    reference.paged_attention(query, pages, plan, batch, output)
    expected = _dense(spec, plan, query, latents)
    torch.testing.assert_close(output.double(), expected, atol=5e-6, rtol=1e-5)


def test_reads_nothing_unused() -> None:
    case = make_case(Spec(seqs=((100, 4), (50, 0), (33, 33)), window=20))
    output = case.run(reference)
    assert output[:37].isfinite().all()
    assert (output[37:] == 77).all()
