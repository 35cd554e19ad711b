"""``xquant factorize``, then serve: the same model without the work, or a better one from a little text."""

import math
import os
import pydoc_data.topics
import shutil
import statistics
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import ENGINE, TASKS
from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main

pytestmark = pytest.mark.e2e

# Tiny models have few hidden channels, so that most would cache the layer input by themselves.
LATENT = {"cache": "latent"}


def factorize(model, out, *options):
    command = [sys.executable, "-m", "xquant_vllm.cli", "factorize", str(model), "--out", str(out), *options]
    command.append("--no-certificate")
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert process.returncode == 0, process.stderr
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model of two kv heads and its factors; copy before changing."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "model", "qwen3")
    return model, factorize(model, folder / "factors", "--dtype", "float32", "--bits", "8")


@pytest.fixture(scope="module")
def serve(engines, documentation):
    """Log-probabilities of a text of 900 tokens, and the log."""
    tasks = [{"kind": "prompt_logprobs", "prompts": [documentation[:900]]}]

    def serve(model, bits=None, **settings):
        xquant = None if bits is None else {"bits": bits, **settings}
        result = engines.run(model, "xquant", tasks, xquant=xquant, dtype="bfloat16")
        return result.tasks[0]["logprobs"][0], result.log

    return serve


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> str:
    """A file of pages of the same documentation, but not those that are evaluated."""
    evaluated = ("assignment", "compound", "operator-summary")
    text = tmp_path_factory.mktemp("text") / "other.txt"
    text.write_text("\n".join(page for name, page in pydoc_data.topics.topics.items() if name not in evaluated))
    return str(text)


def test_factors_serve_what_the_model_alone_serves(serve, smollm2, tmp_path):
    folder = factorize(smollm2, tmp_path / "smollm2")
    # Other tests may have left the factors in the cache.
    alone, log = serve(smollm2, 8, factor_cache=False)
    assert "factors computed in" in log
    ours, log = serve(folder, 8)
    assert f"factors read from {folder}/xquant_factors.safetensors (data-free)" in log
    assert max(abs(p - q) for p, q in zip(ours, alone, strict=True)) < 1e-3


def perplexity(logprobs):
    return math.exp(-statistics.mean(logprobs))


@pytest.mark.nightly
def test_calibrated_latents_lose_less_on_other_text_in_fewer_bytes(engines, serve, smollm2, other_text, tmp_path):
    options = ("--calibration", other_text, "--calibration-tokens", "1024", "--bits", "2")
    per_head, log = serve(factorize(smollm2, tmp_path / "head", *options))
    assert "(calibrated on 1024 tokens)" in log
    # 110 are the paper's; 2 do not divide among 3 kv heads.
    assert (
        "30 layers hold latents of keys and values at 0 to 8 bits, as channels matter, 108 bytes per token each" in log
    )
    # Joint latents: every fourth by itself, the others predicted.
    chain, log = serve(factorize(smollm2, tmp_path / "chain", *options, "--method", "xquant-cl"))
    assert (
        "22 layers hold differences of joint latents of keys and values at 0 to 8 bits, as channels matter, 109" in log
    )
    serve(smollm2, 8)
    data_free, log = serve(smollm2, 2)
    # The server before left its factors behind; they are the same at all bits.
    assert "factors cached, read in" in log
    assert "126 bytes per token each" in log
    found = [perplexity(logprobs) for logprobs in (data_free, per_head, chain)]
    print("perplexity at 2 bits: data-free {:.2f}, per head {:.2f}, chain {:.2f}".format(*found))
    # The 16-bit cache has 12.6.
    assert found[1] < 0.6 * found[0]
    assert found[2] < 1.1 * 12.6
    with pytest.raises(EngineFailed, match=r"is made with bits key 2 / value 2, but the setting 'bits' asks for"):
        serve(tmp_path / "chain", 4)


@pytest.mark.nightly
def test_tensor_parallel_ranks_take_their_heads_from_one_file(engines, tiny):
    _, folder = tiny
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(folder, "xquant", TASKS, xquant=LATENT, environment=binding, tensor_parallel_size=2, **ENGINE)
    alone = engines.run(folder, "xquant", TASKS, xquant=LATENT, **ENGINE)
    assert ours.log.count("factors read from") == 1  # the first rank speaks
    pairs = zip(ours.tasks[-1]["logprobs"][0], alone.tasks[-1]["logprobs"][0], strict=True)
    assert statistics.mean(abs(p - q) for p, q in pairs) < 1e-3


def test_tensor_parallel_ranks_share_calibrated_heads_out(engines, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    options = ("--calibration", "python-docs", "--calibration-tokens", "256", "--bits", "8", "--basis", "head")
    assert main(["factorize", str(tiny[0]), "--out", str(tmp_path / "out"), "--dtype", "float32", *options]) == 0
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(tmp_path / "out", "xquant", TASKS, environment=binding, tensor_parallel_size=2, **ENGINE)
    alone = engines.run(tmp_path / "out", "xquant", TASKS, **ENGINE)
    pairs = zip(ours.tasks[-1]["logprobs"][0], alone.tasks[-1]["logprobs"][0], strict=True)
    assert statistics.mean(abs(p - q) for p, q in pairs) < 1e-3


def test_weights_that_changed_under_their_factors_are_refused(engines, tiny, tmp_path):
    folder = shutil.copytree(tiny[1], tmp_path / "stale")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineFailed, match=r"is stale: the key and value weights of layer 1 are not .*--force"):
        engines.run(folder, "xquant", TASKS, xquant=LATENT, **ENGINE)


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("options", [(), ("--calibration", "python-docs", "--calibration-tokens", "256")])
def test_factors_of_a_model_with_attention_sinks(engines, tmp_path, monkeypatch, options):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    model, out = save_tiny_model(tmp_path / "model", "gpt-oss"), tmp_path / "out"
    assert main(["factorize", str(model), "--out", str(out), "--dtype", "float32", "--bits", "8", *options]) == 0
    ours = engines.run(out, "xquant", TASKS, xquant=LATENT, **ENGINE)
    assert f"factors read from {out}" in ours.log
    expected = engines.run(model, "CPU_ATTN", TASKS, **ENGINE)
    pairs = zip(ours.tasks[-1]["logprobs"][0], expected.tasks[-1]["logprobs"][0], strict=True)
    error = statistics.mean(abs(p - q) for p, q in pairs)
    print(f"mean absolute change of log-probability {error:.4f}")
    # Without its sinks the model is 0.8 away.
    assert error <= 0.1
