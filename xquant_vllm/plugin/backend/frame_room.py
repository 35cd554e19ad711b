"""Room for the Python frames below a model's forward pass, so that no layer's calls map and unmap memory.

CPython up to 3.12 (and 3.13 and 3.14 before their fixes of https://github.com/python/cpython/issues/142183) keeps
frames in chunks of 16 KiB and gives a chunk back to the system as soon as its first frame returns. Where a chunk
happens to be full at the depth at which layers call their attention, every such call maps a new one, faults it in, and
unmaps it, for which all threads of the process are interrupted. Whether that happens depends on nothing but the sizes
of all frames above: one process is unlucky in every layer of every step, and the next one never. Measured on two cores,
8 sequences of 512 tokens, 30 layers: 150 page faults and 6 of 47 ms a step.
"""

import functools
from collections.abc import Callable
from typing import Any

# Words of the frame that makes room. A chunk grows to a power of two of bytes that holds its first frame and about a
# thousand words more, so this one leaves 60 KiB for everything that a forward pass calls.
_FRAME_WORDS = 8192


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under a frame that starts a chunk of 128 KiB, wherever it is called.

    Args:
        function: what is called with the same arguments.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Nothing else says how large a frame is.
    call.__code__ = call.__code__.replace(co_stacksize=_FRAME_WORDS)
    return functools.wraps(function)(call)


def give_forward_room() -> None:
    """Let vLLM's model runners call their models with room, once per process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # that of CPUs derives from it

    forward = GPUModelRunner._model_forward
    if not hasattr(forward, "__wrapped__"):
        GPUModelRunner._model_forward = with_room(forward)
