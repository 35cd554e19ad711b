"""Taking back what was exchanged in a model, and putting it in place again."""

import torch
from torch import nn

from xquant_vllm.plugin.reload.changes import Changes


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        self.size = 1000

    def answer(self):
        return "class"


def test_what_was_exchanged_goes_back_and_forth():
    model = nn.Sequential(Part(), Part())
    first, second = model
    names, inner, norm = list(first._modules), first.inner, first.norm
    changes = Changes(model)
    first.inner, first.norm, second.size = nn.Sequential(first.inner), nn.Identity(), 2000
    second.answer = lambda: "instance"
    first.inner[0].note = "new"
    changes.close()
    wrapped = first.inner
    for _ in range(2):
        changes.exchange()
        assert (first.inner, first.norm, second.size, second.answer()) == (inner, norm, 1000, "class")
        assert list(first._modules) == names
        assert not hasattr(inner, "note")
        changes.exchange()
        assert (first.inner, second.size, second.answer()) == (wrapped, 2000, "instance")
        assert isinstance(first.norm, nn.Identity)
        assert inner.note == "new"


def test_what_happens_later_and_to_tensors_is_left_alone():
    model = nn.Sequential(Part())
    changes = Changes(model)
    model[0].size = 3
    changes.close()
    model[0].cache = torch.zeros(1)
    model[0].inner.weight = nn.Parameter(torch.ones(3, 3))
    changes.exchange()
    assert model[0].size == 1000
    assert model[0].cache is not None
    assert model[0].inner.weight.shape == (3, 3)
