"""Logits of two engines that ran one after the other."""

import pytest
import torch

from xquant_vllm.evaluation.engines import vllm_engine as vllm_engine
from xquant_vllm.evaluation.engines.vllm_engine import serve, vllm_version

HEAD = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.125]])
WINDOWS = [torch.tensor([4, 5, 6]), torch.tensor([7, 8])]


@pytest.fixture
def started(monkeypatch):
    """Requests of the engines that were started; how many run at once is checked."""
    requests, running = [], []

    class FakeProcess:
        def __init__(self, request):
            assert not running
            self.request, self.bytes_per_token = request, 46080 if request.settings is None else 3780
            requests.append(request)

        def __enter__(self):
            running.append(self)
            return self

        def __exit__(self, *_):
            running.remove(self)

        def hidden_states(self, window):
            offset = 0 if self.request.settings is None else 100
            return torch.tensor(window)[:, None] + offset + torch.tensor([0.0, 0.5])

        def logits(self, hidden):
            return hidden @ HEAD

    monkeypatch.setattr(vllm_engine, "EngineProcess", FakeProcess)
    return requests


def test_both_caches_are_asked_through_one_head(started, tmp_path):
    with serve(tmp_path, {"bits": 2}, "float32", WINDOWS) as engine:
        assert [(request.settings, request.longest) for request in started] == [(None, 3), ({"bits": 2}, 3)]
        assert engine.bytes_per_token == 3780
        for window in WINDOWS:
            exact, read = (window[:, None] + offset + torch.tensor([0.0, 0.5]) for offset in (0, 100))
            assert torch.equal(engine.reference(window)[:], exact @ HEAD)
            assert torch.equal(engine.candidate(window)[1:2], read[1:2] @ HEAD)
            assert torch.equal(engine.candidate(window, 2)[:], read[-2:] @ HEAD)
            assert torch.equal(engine.reference(window, 1)[:], exact[-1:] @ HEAD)


def test_the_16_bit_cache_alone_needs_one_engine(started, tmp_path):
    with serve(tmp_path, None, "float32", WINDOWS) as engine:
        assert torch.equal(engine.reference(WINDOWS[0])[:1], torch.tensor([[4, 4.5]]) @ HEAD)
    assert [request.settings for request in started] == [None]


def test_vllm_is_found_under_whatever_name_it_was_installed():
    assert vllm_version().startswith("0.")
