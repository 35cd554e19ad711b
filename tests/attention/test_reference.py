"""The reference against attention as one would write it down, in FP64 and without pages."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Spec, make_case, make_plan
from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.layout import Stream
from xquant_vllm.codec.pages import store_latents
from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.codec.rotation import HadamardRotation


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


def _rounded(x: torch.Tensor, stream: Stream) -> torch.Tensor:
    """What a stream reads back, without pages."""
    if isinstance(stream, AllocatedFormat):
        heads = [
            dequantize_allocated(*quantize_allocated(x[:, head], runs), runs, stream.width)
            for head, runs in enumerate(stream.runs)
        ]
        return torch.stack(heads, 1).double()
    if stream.bits == 16:
        return x.half().double()
    return dequantize(*quantize(x, stream.bits, stream.group_size, stream.outlier_channels)).double()


def _rotation_matrix(rotation: HadamardRotation) -> torch.Tensor:
    """``[d, d]``, FP64, for row vectors: by Sylvester's construction, not by the fast transform."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < rotation.block:
        hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), hadamard)
    return (torch.kron(rotation.mix.double().contiguous(), hadamard.contiguous()) * rotation.signs.double()).T


def _exact(spec: Spec, plan, layers: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Key and value latents, from what every layer (the own one last) is given."""
    streams = [layout.streams for layout in (*plan.layouts[1:], plan.layout)]
    if spec.kind == "latent":
        return [_rounded(x, stream) for x, stream in zip(layers[-1], streams[-1], strict=True)]
    *earlier, (own,) = layers
    if plan.rotation is not None:
        own = own.double() @ _rotation_matrix(plan.rotation)
    terms = [_rounded(x, stream) for (x,), (stream,) in zip(earlier, streams[:-1], strict=True)]
    if spec.kind == "x":
        latent = _rounded(own, streams[-1][0])
    elif spec.kind == "deltas":
        latent = sum(terms) + _rounded(own - sum(terms), streams[-1][0])
    else:
        before = torch.cat(terms, -1)
        predicted = torch.stack([before[:, i] @ m.double() for i, m in enumerate(plan.prediction.matrix)], 1)
        latent = torch.cat([before, _rounded(own - predicted, streams[-1][0])], -1)
    return [latent, latent]


def _as_computed(spec: Spec, plan, layers: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Key and value latents of tokens that are attended to exactly: the own input, and nothing of earlier layers."""
    if spec.kind == "latent":
        return [x.double() for x in layers[-1]]
    (own,) = layers[-1]
    latent = own.double() if plan.rotation is None else own.double() @ _rotation_matrix(plan.rotation)
    if spec.kind == "chain":
        latent = torch.cat([torch.zeros_like(latent)] * len(spec.earlier) + [latent], -1)
    return [latent, latent]


def _dense(spec: Spec, plan, query: torch.Tensor, exact: list[torch.Tensor]) -> torch.Tensor:
    """Attention of the last tokens of one sequence, one query and head at a time."""
    projection = plan.projection
    length, past = exact[0].shape[0], exact[0].shape[0] - query.shape[0]
    result = torch.empty_like(query, dtype=torch.float64)
    for head in range(plan.num_heads):
        kv_head = head // spec.group
        latent_head = 0 if exact[0].shape[1] == 1 else kv_head
        keys = exact[0][:, latent_head] @ projection.up_key[kv_head].double()
        values = exact[1][:, latent_head]
        if projection.up_value is not None:
            values = values @ projection.up_value[kv_head].double()
        if spec.bias:
            keys, values = keys + projection.key_bias[kv_head], values + projection.value_bias[kv_head]
        if spec.norm:
            norm = projection.key_norm
            keys = keys / (keys.pow(2).mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight[kv_head]
        keys = torch.stack([_rotated(key, position, spec) for position, key in enumerate(keys)])
        for index in range(query.shape[0]):
            position = past + index
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            scores = keys[first : position + 1] @ query[index, head].double() * plan.scale
            if spec.soft_cap:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            weights = scores.exp()
            sink = plan.sinks[head].double().exp() if spec.sinks else 0.0
            result[index, head] = weights @ values[first : position + 1] / (weights.sum() + sink)
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
    "sinks": Spec(sinks=True, bias=True, soft_cap=30.0),
    "16 bits": Spec(key_bits=16, value_bits=16),
    "X": Spec(kind="x", hidden_size=72, key_group=24),
    "X of a power of two": Spec(kind="x", hidden_size=128, key_group=32, key_outliers=2),
    "deltas of X": Spec(kind="deltas", hidden_size=96, key_group=24, earlier=(4, 8, 16), bias=True),
    "chain of latents": Spec(kind="chain", earlier=(4, 3), head_size=16, key_group=16),
    "runs": Spec(allocated=1.0, seed=1),
    "chain of runs": Spec(kind="chain", earlier=(4, 3), head_size=16, key_group=16, allocated=1.0, seed=2),
    "chain of joint latents": Spec(kind="chain", earlier=(16, 3), joint=True, head_size=24, key_group=24),
}


@pytest.mark.parametrize("exact_from", [None, 3])
@pytest.mark.parametrize("name", SPECS)
def test_dense(name: str, exact_from: int | None) -> None:
    spec = replace(SPECS[name], exact_from=exact_from)
    plan = make_plan(spec)
    torch.manual_seed(0)
    length, new = 40, 3
    layers = [
        [torch.randn(length, stream.num_heads, stream.width) for stream in layout.streams]
        for layout in (*plan.layouts[1:], plan.layout)
    ]
    block_size = spec.block_size
    blocks = torch.randperm(8)[: -(-length // block_size)].int()
    pages = [torch.zeros(8, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    positions = torch.arange(length)
    slots = blocks[positions // block_size].long() * block_size + positions % block_size
    for layout, written, latents in zip(plan.layouts[1:], pages[1:], layers[:-1], strict=True):
        store_latents(written, layout, slots, tuple(latents))
    reference.store(pages, plan, slots, layers[-1])
    query = torch.randn(new, plan.num_heads, spec.head_size)
    output = torch.empty_like(query)
    batch = AttentionBatch(torch.tensor([0, new]).int(), torch.tensor([length]).int(), blocks[None])
    reference.paged_attention(query, pages, plan, batch, output, [x[-new:] for x in layers[-1]])
    latents = _exact(spec, plan, layers)
    if exact_from is not None:
        computed = _as_computed(spec, plan, layers)
        latents = [torch.cat((x[:-new], y[-new:])) for x, y in zip(latents, computed, strict=True)]
    expected = _dense(spec, plan, query, latents)
    torch.testing.assert_close(output.double(), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["latent", "x", "deltas", "chain"])
def test_exact_tokens_are_those_that_pages_would_hold(kind: str) -> None:
    """Unquantized pages and tokens as they were computed say the same, also where pages hold a difference."""
    spec = Spec(seqs=((40, 1), (30, 30), (50, 20)), kind=kind, key_bits=16, value_bits=16, earlier=(16, 16))
    exact, cached = make_case(replace(spec, exact_from=20)), make_case(spec)
    plan = cached.plan
    if kind == "chain":
        # Up-projections of a chain multiply what earlier layers stored as the prediction and then the own one do.
        matrix = plan.prediction.matrix
        before = matrix.shape[1]
        ups = (plan.projection.up_key, plan.projection.up_value)
        key, value = (torch.cat((matrix @ up[:, before:], up[:, before:]), 1) for up in ups)
        projection = replace(plan.projection, up_key=key, up_value=value)
        exact, cached = (replace(of, plan=replace(of.plan, projection=projection)) for of in (exact, cached))
    expected, output = cached.run(reference)[:51], exact.run(reference)[:51]
    assert torch.equal(output[0], expected[0])
    torch.testing.assert_close(output, expected, atol=4e-3, rtol=0)
    assert not torch.equal(output[1:], expected[1:])


def test_reads_nothing_unused() -> None:
    case = make_case(Spec(seqs=((100, 4), (50, 0), (33, 33)), window=20))
    output = case.run(reference)
    assert output[:37].isfinite().all()
    assert (output[37:] == 77).all()
