"""vLLM's class of workers on this machine."""

from typing import Any


def worker_class() -> Any:
    """The class that the platform's workers have; that of CPUs derives from that of GPUs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker
