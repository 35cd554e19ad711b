"""What passes between an evaluation and its engine's process, and how the process ends."""

import os

import pytest
import torch

from xquant_vllm.errors import EngineError, SettingsError
from xquant_vllm.plugin.evaluation.engine import EngineRequest
from xquant_vllm.plugin.evaluation.process import EngineProcess

REQUEST = EngineRequest("model", None, "bfloat16", 4)
HEAD = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.125]])


class FakeEngine:
    """Makes hidden states of tokens; prints, as vLLM does."""

    bytes_per_token = 252

    def __init__(self, request):
        print("started", request.model)

    def hidden_states(self, window):
        if len(window) > REQUEST.longest:
            raise ValueError(
                "1 validation error for VllmConfig\n  Value error, xquant: too long; set less [type=value]"
            )
        return torch.tensor(window, dtype=torch.bfloat16)[:, None] + torch.tensor([0.0, 0.5], dtype=torch.bfloat16)

    def logits(self, hidden):
        return hidden.float() @ HEAD


def end_at_once(request):
    os._exit(3)


def test_tensors_pass_both_ways_and_a_refusal_passes_as_one_line(capfd):
    with EngineProcess(REQUEST, FakeEngine) as process:
        assert process.bytes_per_token == 252
        hidden = process.hidden_states([3, 7])
        assert torch.equal(hidden, torch.tensor([[3, 3.5], [7, 7.5]], dtype=torch.bfloat16))
        assert torch.equal(process.logits(hidden), hidden.float() @ HEAD)
        assert torch.equal(process.logits(hidden[1:]), hidden[1:].float() @ HEAD)
        with pytest.raises(SettingsError, match=r"^xquant: too long; set less"):
            process.hidden_states(range(5))
    output = capfd.readouterr()
    assert "started model" in output.err
    assert "started" not in output.out


def test_a_process_that_dies_is_told_by_its_exit_status():
    with pytest.raises(EngineError, match="died with exit status 3"):
        EngineProcess(REQUEST, end_at_once)
