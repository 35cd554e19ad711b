"""What passes between an evaluation and its engine's process, and how the process ends."""

import os
import signal
import time

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


def fail_to_start(request):
    raise KeyError("no such kernel\nand a second line")


def end_without_memory(request):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failure_is_one_line_with_the_cause_and_where_the_traceback_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(EngineError) as error:
        EngineProcess(REQUEST, fail_to_start)
    (line,) = str(error.value).splitlines()
    (log,) = tmp_path.glob("xquant-engine-*.log")
    assert line.startswith("xquant: the vLLM engine failed: KeyError: 'no such kernel")
    assert f"; the traceback is in {log}, and VLLM_LOGGING_LEVEL=INFO shows more" in line
    assert "in fail_to_start" in log.read_text()


def test_a_process_without_memory_is_told_as_such():
    with pytest.raises(EngineError, match="died with exit status -9, which looks as if memory ran out; what it"):
        EngineProcess(REQUEST, end_without_memory)


class SlowEngine(FakeEngine):
    """Computes for a minute, whatever happens to the other end."""

    def hidden_states(self, window):
        time.sleep(60)


def test_an_interrupted_evaluation_ends_the_process_at_once_and_in_silence(capfd):
    def interrupted():
        with EngineProcess(REQUEST, SlowEngine) as process:
            os.kill(process._process.pid, signal.SIGINT)  # as a terminal sends it to all
            process._connection.send(("hidden_states", [1]))
            time.sleep(0.5)
            assert process._process.is_alive()
            ended.append((process._process, time.monotonic()))
            raise KeyboardInterrupt

    ended: list = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ((process, start),) = ended
    assert time.monotonic() - start < 5
    assert not process.is_alive()
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_dies_is_told_by_its_exit_status():
    with pytest.raises(EngineError, match="died with exit status 3"):
        EngineProcess(REQUEST, end_at_once)
