"""What start-up runs before the first request: every kernel that serving needs, so that it compiles none later.

vLLM runs a model before it serves, but prompts not with every model runner, and never one that takes several rounds
through the kernels' workspace. So the layers take a few batches of their own: nothing is stored, and what is read is
the block that vLLM gives to nobody. vLLM calls this where it warms up its own kernels: when all memory is taken and
before CUDA graphs are captured, unless ``--enforce-eager`` or ``--kernel-config.enable_jit_warmup=False`` is set.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.v1.attention.backend import CommonAttentionMetadata, max_decode_query_len

from xquant_vllm.attention.start_up import Lengths, start_up_batches
from xquant_vllm.plugin.builders import builders_of


@dataclass(frozen=True, eq=False)
class WarmUpBatch:
    """One batch that the layers of an engine take.

    Attributes:
        vllm_config: the engine's.
        lengths: query tokens and cached tokens of every sequence.
    """

    vllm_config: Any
    lengths: Lengths


class WarmUp(VllmJitKernel[WarmUpBatch]):
    """All kernels of this package, as vLLM's registry of kernels to be compiled takes one."""

    CompileKey = WarmUpBatch

    def get_warmup_keys(self, vllm_config: Any) -> list[WarmUpBatch]:
        """The batches of an engine."""
        scheduler = vllm_config.scheduler_config
        batches = start_up_batches(
            decode_tokens=max_decode_query_len(vllm_config),
            tokens=scheduler.max_num_batched_tokens,
            sequences=scheduler.max_num_seqs,
            length=vllm_config.model_config.max_model_len,
        )
        return [WarmUpBatch(vllm_config, lengths) for lengths in batches]

    @torch.inference_mode()
    def compile(self, compile_key: WarmUpBatch) -> None:
        """Let every layer store and attend; what a launch reports is raised here."""
        config = compile_key.vllm_config
        layers = config.compilation_config.static_forward_context
        builders = list(builders_of(config.compilation_config).values())
        if not builders:
            return
        device = builders[0].device
        common = _common(compile_key.lengths, device)
        metadata = {
            name: of for builder in builders for of in [builder.build(0, common)] for name in builder.layer_names
        }
        slots = dict.fromkeys(metadata, common.slot_mapping)
        with override_forward_context(create_forward_context(metadata, config, slot_mapping=slots)):
            for name, of_layer in metadata.items():
                if isinstance(layers[name], Attention):
                    _run(layers[name], of_layer, common, config.model_config.dtype)
        if device.type != "cpu":
            torch.accelerator.synchronize()


def _common(lengths: Lengths, device: torch.device) -> CommonAttentionMetadata:
    """Metadata as vLLM makes it, of a batch whose tokens are not stored, in the block that vLLM gives to nobody."""
    query_lens, seq_lens = (torch.tensor(of, dtype=torch.int32) for of in zip(*lengths, strict=True))
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0).to(torch.int32)))
    tokens, longest = int(starts[-1]), int(seq_lens.max())
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        num_reqs=len(lengths),
        num_actual_tokens=tokens,
        max_query_len=int(query_lens.max()),
        max_seq_len=longest,
        # A block has a token or more.
        block_table_tensor=torch.zeros(len(lengths), longest, dtype=torch.int32, device=device),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=seq_lens,
    )


def _run(layer: Any, metadata: Any, common: CommonAttentionMetadata, dtype: torch.dtype) -> None:
    tokens, device = common.num_actual_tokens, common.slot_mapping.device
    query, output = (
        torch.zeros(tokens, layer.num_heads, layer.head_size, dtype=dtype, device=device) for _ in range(2)
    )
    key, value = (
        torch.zeros(tokens, layer.num_kv_heads, size, dtype=dtype, device=device)
        for size in (layer.head_size, layer.head_size_v)
    )
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, common.slot_mapping)
    layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, output)


WARM_UP = WarmUp()
"""Registered by every layer when it is made, which is where all of vLLM's model runners collect such kernels."""
