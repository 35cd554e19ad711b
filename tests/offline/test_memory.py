"""What is said of a model that will not fit into memory."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.offline import memory
from xquant_vllm.offline.checkpoint import open_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama"))


def test_weights_are_counted_from_headers(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert memory.num_weights(checkpoint) == sum(parameter.numel() for parameter in model.parameters())


def test_the_machine_tells_what_is_free():
    assert 1e6 < memory.available_memory(CPU) < 1e15


def test_the_smaller_of_machine_and_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    assert memory.available_memory(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 60000\nactive_file 40000\n")
    assert memory.available_memory(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_memory(CPU) == 1000000 - 300000 + 100000


def test_what_does_not_fit_is_said_with_what_to_set(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(memory, "num_weights", lambda _: 8 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda _: 24 * 10**9)
    memory.warn_of_memory(checkpoint, torch.bfloat16, CPU, "evaluating", "Do not")
    assert capsys.readouterr().err == ""
    memory.warn_of_memory(checkpoint, torch.float32, CPU, "evaluating", "Set --dtype bfloat16")
    assert capsys.readouterr().err == (
        "xquant: warning: evaluating model in float32 takes about 42.6 GB of memory (8.0 billion weights of 4 bytes, "
        "and what computes with them), but 24.0 GB are free; it may be killed. Set --dtype bfloat16\n"
    )


def test_commands_warn_before_they_load(checkpoint, monkeypatch, capsys, tmp_path):
    from tests.factorizing import FakeTokenizer
    from xquant_vllm.offline.calibration import samples

    samples._last.clear()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    monkeypatch.setattr(memory, "available_memory", lambda _: 0)
    model = str(checkpoint.folder)
    assert main(["eval", "perplexity", model, "--window", "64", "--windows", "1", "--method", "16bit"]) == 0
    warning, loading = capsys.readouterr().err.splitlines()[:2]
    assert "warning: evaluating" in warning
    assert warning.endswith("Set --dtype bfloat16, or --device cuda")
    assert "loading" in loading
    options = ("--calibration", "python-docs", "--calibration-tokens", "64")
    assert main(["factorize", model, "--out", str(tmp_path / "out"), *options]) == 0
    assert "warning: calibrating" in capsys.readouterr().err.splitlines()[0]
    assert main(["factorize", model, "--out", str(tmp_path / "plain")]) == 0
    assert "warning" not in capsys.readouterr().err
