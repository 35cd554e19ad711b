"""A GPU's worker on tensors of the CPU, for a process of its own: start-up, model runner V2 and graphs are vLLM's own.

vLLM takes its CPU worker here, which leaves out what a GPU does at start-up: a pass that profiles, a throw-away cache
to capture graphs on, the warm-up of kernels, and the capture. They are put back as the GPU's worker has them. Triton
kernels, vLLM's and this package's, run in Triton's interpreter, and CUDA graphs are those of ``cpu_graph.py``.
"""

import os
from typing import Any

VARIABLE = "XQUANT_TEST_GPU_WORKER"
"""Asks ``engine_process.py`` for such a worker: how many graphs it captures, of one sequence and of four."""
ENVIRONMENT = {
    VARIABLE: "2",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "XQUANT_ATTENTION_KERNELS": "triton",
}
STEPS: list[str] = []
"""What start-up did, in order."""
START_UP = [
    "profile",
    "small cache",
    "capture of a sample",
    "teardown",
    "cache",
    "warm-up",
    "capture",
]
"""What a GPU's worker does."""


def let_vllm_take_triton() -> None:
    """Name a driver for the CPU, without which vLLM leaves Triton aside; the interpreter needs none."""
    import triton.backends

    from xquant_vllm.attention.gpu.limits import SHARED_MEMORY

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

        @staticmethod
        def get_current_device() -> int:
            return 0

        class utils:
            @staticmethod
            def get_device_properties(device: int) -> dict[str, int]:
                return {"max_shared_mem": SHARED_MEMORY[90]}

    class Backend:
        compiler, driver = None, Driver

    triton.backends.backends["cpu"] = Backend


def become_gpu_worker() -> None:
    """Make vLLM's CPU worker do what the GPU's does; before an engine starts."""
    let_vllm_take_triton()
    _let_scalars_mask()
    import torch
    from gpu_worker.cpu_graph import CpuGraph, capture
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    torch.cuda.CUDAGraph, torch.cuda.graph = CpuGraph, capture
    CpuPlatform.graph_pool_handle = classmethod(lambda cls: (0, len(STEPS)))
    init_device = CPUWorker.init_device

    def init_gpu_device(self: Any) -> None:
        init_device(self)
        _prepare(self)

    CPUWorker.init_device = init_gpu_device
    CPUWorker.determine_available_memory = _determine_available_memory
    del CPUWorker.compile_or_warm_up_model
    _note_steps()


def _let_scalars_mask() -> None:
    """Let a comparison of scalars stay one when it meets a block, as vLLM's kernels for drafted tokens need it.

    Triton 3.9's interpreter makes a block of the type that was compared from it, and refuses that as a mask.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype == np.bool_:
            return TensorHandle(np.full(ret_ty.shape, arg.data.item()), tl.int1)
        return original(self, ret_ty, arg)

    InterpreterBuilder.create_splat = create_splat


def _prepare(worker: Any) -> None:
    """What ``Worker.init_device`` does on a GPU, and a configuration that has graphs."""
    from types import SimpleNamespace

    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.workspace import init_workspace_manager

    from xquant_vllm.attention.gpu import tiling

    # One after another: of a GPU's many programs for few sequences the interpreter needs a minute.
    tiling._PROGRAMS, tiling._MOST_SPLITS = 8, 2
    init_workspace_manager(worker.device, 1)
    worker.init_snapshot = SimpleNamespace(free_memory=0)
    config = worker.vllm_config
    tokens = 1 + config.num_speculative_tokens
    sizes = [count * tokens for count in (1, 4)[: int(os.environ[VARIABLE])]]
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sizes, sizes[-1]
    # Only the worker reads it from now on: whether to capture.
    worker.model_config.enforce_eager = False
    config.kernel_config.enable_jit_warmup = True
    worker._maybe_activate_jit_monitor = lambda: None


def _determine_available_memory(self: Any) -> int:
    """As without ``kv_cache_memory_bytes``, but for the sum of what is free: a profile of graphs follows on a GPU."""
    from vllm.v1.worker.gpu_worker import Worker

    total = Worker.determine_available_memory(self)
    self.model_runner.profile_cudagraph_memory()
    return total


def _note_steps() -> None:
    """Note the steps of start-up in :data:`STEPS`."""
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu import cudagraph_utils, structured_outputs
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def noting(owner: Any, name: str, text: Any) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            STEPS.append(text(kwargs))
            return original(*args, **kwargs)

        setattr(owner, name, noted)

    noting(GPUModelRunner, "profile_run", lambda kwargs: "profile")
    noting(
        GPUModelRunner,
        "initialize_kv_cache",
        lambda kwargs: "small cache" if kwargs.get("is_profiling") else "cache",
    )
    noting(
        GPUModelRunner,
        "capture_model",
        lambda kwargs: "capture of a sample" if kwargs.get("profile_only") else "capture",
    )
    noting(cudagraph_utils, "_teardown_profiling_state", lambda kwargs: "teardown")
    # Kernels of other backends and of some models, whose modules ask for libraries that only they need.
    gpu_worker.kernel_warmup = lambda worker: None
    # Warm-up samples, too. The interpreter does not take the kernels of grammars and of the k likeliest tokens.
    structured_outputs.StructuredOutputsWorker.apply_grammar_bitmask = lambda *args: None
    likeliest = topk_topp_sampler.apply_top_k_top_p_pytorch
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_: likeliest(logits, k, p)
    noting(gpu_worker, "warmup_kernels", lambda kwargs: "warm-up")


def report(llm: Any) -> dict[str, Any]:
    """What the worker did so far."""
    from gpu_worker.cpu_graph import CpuGraph

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    return {
        "runner": type(runner).__mro__[1].__module__,
        "steps": STEPS,
        "graphs": sorted(desc.num_tokens for desc in runner.cudagraph_manager.graphs),
        "replays": sum(graph.replays for graph in CpuGraph.captured),
        "faults": sorted({fault for graph in CpuGraph.captured for fault in graph.faults}),
    }
