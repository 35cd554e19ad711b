"""Pages to the host's memory and back, as vLLM's OffloadingConnector moves them; its copies are played.

Imported by the engine's process (`engine_process.py`), not by tests. vLLM's worker of that connector finds out which
bytes of which tensors are the pages, and does so here, for a running engine. What it then has copied between a GPU and
its host is copied here from one place of memory to another, by the same addresses.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def move_pages(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """Fill pages, copy them out, destroy them, copy them back, and go on from the prefix cache.

    Args:
        llm: the engine, in this process.
        prompt: of several blocks.

    Returns:
        ``logits`` of the next token from the prefix cache, ``before`` and ``after``; ``destroyed``: with the destroyed
        pages; ``cached``: tokens that came from the prefix cache each time; ``bytes``: that a block of every group has
        in the connector's eyes, and ``expected``: in those of the layers.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
    from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs

    config = llm.llm_engine.vllm_config
    cache_config = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_cache_config
    layers = config.compilation_config.static_forward_context
    names = [name for group in cache_config.kv_cache_groups for name in group.layer_names]
    found: list[Any] = []
    # What the connector's own configuration would say of one rank.
    spec = SimpleNamespace(
        replicated_layout=False,
        config=SimpleNamespace(canonical_layout=False, parallel=SimpleNamespace(rank=0)),
        get_worker=found.append,
    )
    worker = OffloadingConnectorWorker(spec, config, cache_config)
    worker.register_kv_caches({name: layers[name].kv_cache for name in names})
    (pages,) = found

    blocks = np.arange(cache_config.num_blocks, dtype=np.int32)
    gpu = [tensor.tensor.view(torch.int8) for tensor in pages.tensors]
    host = [torch.zeros(len(blocks), tensor.page_size_bytes, dtype=torch.int8) for tensor in pages.tensors]

    def copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
        for refs in pages.group_data_refs:
            for ref in refs:
                addresses = []
                for tensors in (source, target):
                    pointers = np.empty(len(blocks), np.uint64)
                    compute_sub_block_ptrs(blocks, 1, pointers, tensors[ref.tensor_idx])
                    addresses.append(pointers.tolist())
                for at, to in zip(*addresses, strict=True):
                    ctypes.memmove(to, at, ref.page_size_bytes)

    llm.generate({"prompt_token_ids": prompt}, _sampling(1), use_tqdm=False)
    before = _next(llm, prompt)
    copy(gpu, host)
    for name in names:
        layers[name].kv_cache.fill_(0)
    destroyed = _next(llm, prompt)
    copy(host, gpu)
    after = _next(llm, prompt)
    return {
        "before": before[0],
        "destroyed": destroyed[0],
        "after": after[0],
        "cached": [before[1], destroyed[1], after[1]],
        "bytes": [sum(ref.page_size_bytes for ref in refs) for refs in pages.group_data_refs],
        "expected": [
            sum(layers[name].kv_cache[0].numel() * layers[name].kv_cache.element_size() for name in group.layer_names)
            for group in cache_config.kv_cache_groups
        ],
    }


def _sampling(logprobs: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, logprobs=logprobs, detokenize=False)


def _next(llm: Any, prompt: list[int]) -> tuple[dict[int, float], int]:
    """Logits of the next token, and tokens from the prefix cache."""
    (output,) = llm.generate({"prompt_token_ids": prompt}, _sampling(32), use_tqdm=False)
    (step,) = output.outputs[0].logprobs
    return {token: entry.logprob for token, entry in step.items()}, output.num_cached_tokens or 0
