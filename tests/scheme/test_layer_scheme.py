"""A layer's cache whose up-projections stay on the host."""

import torch

from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.scheme.formats import LayerFormat, LayerShape
from xquant_vllm.scheme.layer_scheme import LayerScheme


def test_on_host() -> None:
    projection = LayerProjection(torch.randn(2, 32, 32), torch.randn(2, 32, 32))
    form = LayerFormat(LayerShape(0, 64, 2, 32), "latent", (StreamFormat(2, 32, 4, 32),) * 2)
    cache = LayerScheme(form, projection)
    moved = cache.on_host()
    arguments = {"num_heads": 4, "scale": 1.0, "sliding_window": None, "logits_soft_cap": None}
    sinks = torch.randn(4)
    assert cache.plan(16, [], **arguments).sinks is None
    plan = moved.plan(16, [], **arguments, sinks=sinks)
    assert plan.sinks is sinks
    assert plan.device == projection.up_key.device
    assert plan.projection.up_key.device.type == plan.projection.up_value.device.type == "cpu"
    expected = GpuPlan(cache.plan(16, [], **arguments), torch.bfloat16)
    assert torch.equal(GpuPlan(plan, torch.bfloat16).key.up, expected.key.up)
