"""The plan's blocks and tokens are those of vLLM's own allocator, for every cache, three models and five settings."""

import importlib
import importlib.util
from dataclasses import dataclass

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.plugin.test_checks import configure
from xquant_vllm.planning.caches import kinds, pages, refused_by
from xquant_vllm.planning.losses import nearest_losses
from xquant_vllm.planning.model_files import read_model
from xquant_vllm.planning.options import plan_option
from xquant_vllm.planning.page_groups import LayerPages, page_needs
from xquant_vllm.planning.planned_model import planned_model
from xquant_vllm.planning.serving import CPU_HEAD_SIZES, Serving

# vLLM 0.33 has a module of its own for it.
_KNOWN = importlib.util.find_spec("vllm.v1.core.kv_cache_planning") is not None
planning = importlib.import_module(f"vllm.v1.core.{'kv_cache_planning' if _KNOWN else 'kv_cache_utils'}")


@dataclass(frozen=True)
class Setting:
    memory: int
    context: int
    hot: float | int | None = None
    batched: int | None = None
    dtype: str = "bfloat16"


SETTINGS = [
    Setting(1 << 30, 2048),
    Setting(256 << 20, 1024, batched=512),
    Setting(3 << 30, 8192),
    Setting(1 << 30, 4096, hot=0.4),
    Setting(2 << 30, 3000, batched=8192, dtype="float32"),
]


def spec_of(layer: LayerPages):
    """What such a layer tells vLLM."""
    sizes = {
        "block_size": layer.block_size,
        "num_kv_heads": 1,
        "head_size": 64,
        "dtype": torch.uint8,
        "num_head_slots": 1,
        "state_content_bytes": layer.page_bytes // layer.block_size,
        "page_size_padded": layer.page_bytes if layer.page_bytes % layer.block_size else None,
    }
    if layer.window is None:
        return FullAttentionSpec(**sizes)
    return SlidingWindowSpec(**sizes, sliding_window=layer.window)


def vllm_tokens(config, layers, memory):
    """What vLLM makes of the layers' pages, and reports."""
    specs = {f"layers.{number}.attn": spec_of(layer) for number, layer in enumerate(layers)}
    # vLLM 0.33 is handed the groups.
    groups = (planning.get_global_kv_cache_groups(config, [specs]),) if _KNOWN else ()
    (found,) = planning.get_kv_cache_configs(config, [specs], [memory], *groups)
    return get_kv_cache_capacity(config, found)[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["smollm2", "smollm2_mha", "gemma3"])
def test_every_cache_holds_what_vllm_says(request, name, setting):
    folder = request.getfixturevalue(name)
    model = planned_model(read_model(str(folder)))
    batched = setting.batched or 2048
    config = configure(str(folder), max_model_len=setting.context, max_num_batched_tokens=batched)
    config.cache_config.kv_cache_layout = "LBNHC"
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting.dtype]
    serving = Serving(setting.memory, setting.context, setting.hot, 1, "cpu", dtype, setting.batched)
    assert serving.sequences.in_flight == config.max_in_flight_tokens
    compared = 0
    for kind in kinds(model):
        made, reason = refused_by(lambda kind=kind: pages(kind, model, serving))
        if made is None:
            assert reason
            continue
        option = plan_option(kind, model, serving, nearest_losses(model))
        plain = 2 * dtype.itemsize * model.kv_heads * model.head_size * model.layers
        left = setting.memory - option.hot_tokens * plain
        if not option.supported:
            with pytest.raises(ValueError, match="To serve at least one request"):
                vllm_tokens(config, made.layers, left)
            continue
        assert option.cache_tokens == vllm_tokens(config, made.layers, left), kind
        compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    "layers",
    [
        # Twelve windowed and thirteen full layers: the rarer kind is padded.
        [LayerPages(16, 4096, 128)] * 12 + [LayerPages(16, 4096)] * 13,
        # Two of five: cut into groups of two.
        [LayerPages(16, 4096, 64), LayerPages(16, 4096, 64), LayerPages(16, 4096)] * 2 + [LayerPages(16, 4096, 64)],
        # Three kinds.
        [LayerPages(32, 8192, 64)] * 4 + [LayerPages(32, 8192, 96)] * 2 + [LayerPages(32, 8192)] * 2,
        # Smaller pages that fill a larger one, and such that do not.
        [LayerPages(16, 1024, 64)] * 2 + [LayerPages(16, 4096)] * 2,
        [LayerPages(16, 1600, 64)] * 2 + [LayerPages(16, 4096)] * 2,
        # One kind, pages of several sizes.
        [LayerPages(16, 1600), LayerPages(16, 4096), LayerPages(16, 2048)],
        [LayerPages(16, 1600, 48)] * 3,
    ],
)
def test_layers_of_any_kinds_are_grouped_as_vllm_does(smollm2, layers):
    config = configure(str(smollm2), max_model_len=500, max_num_batched_tokens=200)
    config.cache_config.kv_cache_layout = "LBNHC"
    serving = Serving(0, 500, None, 1, "cpu", torch.bfloat16, 200)
    memory = 7_777_777
    assert page_needs(layers, serving.sequences).tokens(memory) == vllm_tokens(config, layers, memory)


def test_heads_that_can_be_hot_are_those_of_cpu_attn():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
