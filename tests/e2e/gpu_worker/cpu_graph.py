"""What a CUDA graph is, on tensors of the CPU: calls are written down with their arguments, and made again on a replay.

Numbers of the host are those of the capture, tensors are read anew, and no Python runs: what a replay computes is what
a graph of the same calls would compute. What a graph cannot hold is named: reading a tensor on the host, making a
tensor of the host's numbers, shapes that depend on data, and memory of the graph that something else keeps.
"""

import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_READ_ON_HOST = {
    torch.Tensor.tolist: "Tensor.tolist",
    torch.Tensor.numpy: "Tensor.numpy",
    torch.Tensor.cpu: "Tensor.cpu",
    torch.tensor: "torch.tensor",
    torch.as_tensor: "torch.as_tensor",
    torch.from_numpy: "torch.from_numpy",
}
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Those that PyTorch does not mark as data dependent, among them what it makes of others.
_FROM_OR_TO_HOST = ("aten::lift_fresh", "aten::_pin_memory", "aten::item", "aten::is_nonzero", "aten::nonzero_numpy")
_MAKE_NO_NUMBERS = ("aten::empty", "aten::new_empty")


class CpuGraph:
    """In place of ``torch.cuda.CUDAGraph``.

    Attributes:
        calls: what a replay does.
        memory: what calls made, which a graph keeps as long as it lives.
        faults: what a CUDA graph could not hold, with where it was asked for.
        replays: how often the graph was replayed.
    """

    captured: list["CpuGraph"] = []

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.memory: list[torch.Tensor] = []
        self.faults: list[str] = []
        self.replays = 0
        CpuGraph.captured.append(self)

    @torch.inference_mode()
    def replay(self) -> None:
        """Make all calls again."""
        self.replays += 1
        for call in self.calls:
            call()


@contextmanager
def capture(graph: CpuGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of ``torch.cuda.graph``: write down what is called meanwhile."""
    recorder = _Recorder(graph)
    with _patched_triton(recorder), _patched_waits(recorder), _Host(recorder), recorder:
        yield
    gc.collect()
    for name, tensor in recorder.made:
        if tensor() is not None:
            graph.faults.append(f"memory of the graph is kept: what {name} returned")


class _Recorder(TorchDispatchMode):
    """Writes down operations of PyTorch; those that are written in Python are looked into."""

    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()
        self.graph, self.paused = graph, False
        self.made: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def fault(self, what: str) -> None:
        """Note what a graph cannot hold."""
        frames = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in _callers()]
        self.graph.faults.append(f"{what} ({' < '.join(frames)})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.namespace.startswith("vllm"):
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        if reason := _cannot_be_held(func, args):
            self.fault(reason)
        result = func(*args, **kwargs)
        self._write_down(func, args, kwargs, result)
        return result

    def _write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [_storage(tensor) not in given for tensor in _tensors(result)]
        self.made += [
            (func.name(), weakref.ref(tensor)) for tensor, new in zip(_tensors(result), fresh, strict=True) if new
        ]
        kept = _tensors(_alias(result))
        self.graph.memory += kept
        computed = any(fresh) and not func.name().startswith(_MAKE_NO_NUMBERS)
        # What returns a view of memory that is there, as reshaping may, has nothing to compute.
        if not computed and not func._schema.is_mutable:
            return
        args, kwargs = _alias(args), _alias(kwargs)

        def again() -> None:
            for old, new, own in zip(kept, _tensors(func(*args, **kwargs)), fresh, strict=True):
                if own:
                    old.copy_(new)

        self.graph.calls.append(again)


class _Host(TorchFunctionMode):
    """Notes what never becomes an operation: on a CPU a tensor's memory is simply read."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.paused and func in _READ_ON_HOST:
            self._recorder.fault(_READ_ON_HOST[func])
        if not self._recorder.paused and (kwargs or {}).get("pin_memory"):
            self._recorder.fault("pinned memory")
        return func(*args, **(kwargs or {}))


@contextmanager
def _patched_triton(recorder: _Recorder) -> Iterator[None]:
    """Write down launches of interpreted Triton kernels, and not what the interpreter does."""
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder.paused = True
        try:
            original(self, *args, **kwargs)
            args, kwargs = _alias(args), _alias(kwargs)
        finally:
            recorder.paused = False
        recorder.graph.calls.append(lambda: original(self, *args, **kwargs))

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = original


@contextmanager
def _patched_waits(recorder: _Recorder) -> Iterator[None]:
    """Note what vLLM makes nothing of on a CPU."""
    places = ((torch.Tensor, "pin_memory"), (torch.accelerator, "synchronize"), (torch.cuda, "synchronize"))
    originals = [getattr(owner, name) for owner, name in places]

    def noting(name: str, original: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            recorder.fault(name)
            return original(*args, **kwargs)

        return noted

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, noting(name, original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _cannot_be_held(func: Any, args: Any) -> str | None:
    """Why a graph cannot hold a call, or None."""
    if func.name().startswith(_FROM_OR_TO_HOST):
        return func.name()
    if func.name() in ("aten::index.Tensor", "aten::index_put_", "aten::index_put"):
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return f"{func.name()} by a mask" if masks else None
    return func.name() if _DATA_DEPENDENT.intersection(func.tags) else None


def _callers() -> list[traceback.FrameSummary]:
    """The innermost lines of this package, or of vLLM where none is of this package."""
    stack = traceback.extract_stack()
    for part in ("/xquant_vllm/", "/vllm/"):
        if frames := [frame for frame in reversed(stack) if part in frame.filename]:
            return frames[:2]
    return []


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _alias(tree: Any) -> Any:
    """The same memory as other objects, so that it is seen whether somebody keeps the first ones."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), tree)
