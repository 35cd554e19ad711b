"""Frames of a forward pass do not fall between chunks of CPython's stack, at whatever depth it is called."""

import resource
from collections.abc import Callable

import pytest
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from xquant_vllm.plugin.backend.frame_room import give_forward_room, with_room

_CALLS = 200


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _layer(query: int, key: int, value: int) -> int:
    product = query * key
    total = product + value
    return total


def _forward() -> int:
    return sum(_layer(layer, 2, 3) for layer in range(_CALLS))


def _faults_at(depth: int, function: Callable[[], int]) -> int:
    """Page faults of a call under ``depth`` more frames."""
    if depth:
        return _faults_at(depth - 1, function)
    before = _page_faults()
    function()
    return _page_faults() - before


def _worst(function: Callable[[], int]) -> int:
    # Deeper than a chunk of 16 KiB, a frame at a time.
    return max(min(_faults_at(depth, function) for _ in range(3)) for depth in range(250))


def test_no_depth_faults_in_every_call() -> None:
    roomy = with_room(_forward)
    assert roomy() == _forward()
    assert _worst(roomy) < _CALLS / 10


def test_passes_arguments_and_errors() -> None:
    roomy = with_room(divmod)
    assert roomy(7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        roomy(1, 0)


def test_runners_are_wrapped_once() -> None:
    give_forward_room()
    forward = GPUModelRunner._model_forward
    give_forward_room()
    assert GPUModelRunner._model_forward is forward
    assert forward.__code__.co_stacksize > 4096
