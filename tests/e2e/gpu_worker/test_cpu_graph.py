"""Graphs of the CPU: what they replay, and what they name as impossible."""

import pytest
import torch

from tests.e2e.gpu_worker.cpu_graph import CpuGraph, capture

KEPT = []


def captured(function, *tensors):
    graph = CpuGraph()
    with torch.inference_mode(), capture(graph):
        function(*tensors)
    return graph


def test_a_replay_reads_tensors_anew_and_keeps_the_hosts_numbers():
    given, result, number = torch.ones(3, 2), torch.zeros(3), [2]

    def step():
        # The first row of the transposed is no view, although reshaping may return one.
        rows = given.t().reshape(-1)[:4].view(2, 2)
        scratch = torch.empty(2)
        torch.sum(rows * number[0], 1, out=scratch)
        result[1:].copy_(scratch)
        result.add_(1)

    graph = captured(step)
    assert graph.faults == []
    assert result.tolist() == [1, 5, 5]
    given.fill_(10)
    number[0] = 100
    graph.replay()
    assert result.tolist() == [2, 41, 41]
    assert graph.replays == 1


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("aten::item", lambda x: x.sum().item()),
        ("aten::is_nonzero", lambda x: 1 if x.sum() > 0 else 2),
        ("aten::nonzero", lambda x: torch.nonzero(x)),
        ("aten::index.Tensor by a mask", lambda x: x[x > 0]),
        ("aten::equal", lambda x: torch.equal(x, x)),
        ("Tensor.tolist", lambda x: x.tolist()),
        ("Tensor.cpu", lambda x: x.cpu()),
        ("Tensor.numpy", lambda x: x.numpy()),
        ("torch.tensor", lambda x: x + torch.tensor([1.0])),
        ("memory of the graph is kept: what aten::add.Tensor returned", lambda x: KEPT.append(x + 1)),
    ],
)
def test_what_a_graph_cannot_hold_is_named(what, step):
    faults = captured(step, torch.ones(3)).faults
    assert any(fault.startswith(what) for fault in faults), faults


@pytest.mark.parametrize(("owner", "name"), [(torch.Tensor, "pin_memory"), (torch.cuda, "synchronize")])
def test_waits_are_named_although_nothing_waits_here(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args: None)
    graph = captured(lambda x: getattr(owner, name)(x), torch.ones(3))
    assert [fault.partition(" ")[0] for fault in graph.faults] == [name]
    captured_before = getattr(owner, name)
    captured(lambda x: None, torch.ones(3))
    assert getattr(owner, name) is captured_before


def test_memory_that_ends_with_the_capture_is_no_fault():
    assert captured(lambda x: (x + 1).view(-1)[:2].clone(), torch.ones(3)).faults == []
