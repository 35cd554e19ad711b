"""What a server says when it refuses: a line at level ERROR, and the same as the last line, with flag and remedy."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import ENGINE, PROMPT, assert_close
from tests.tiny_models import quantize_tiny_model, save_paligemma, save_tiny_model

pytestmark = pytest.mark.e2e

LOGPROBS = [{"kind": "prompt_logprobs", "prompts": [PROMPT]}]
LATENTS = {"bits": 8, "cache": "latent"}


def refusal(engines, folder, backend="xquant", **settings) -> str:
    """The line that an engine ends with, which is also in its log."""
    with pytest.raises(EngineFailed) as error:
        engines.run(folder, backend, [], **{**ENGINE, **settings})
    lines = error.value.log.strip().splitlines()
    own = re.search(r"xquant_vllm\.errors\.\w+: ((?:xquant|kivi): .*)$", lines[-1])
    assert own, lines[-3:]
    said = [number for number, line in enumerate(lines) if re.search(r"ERROR .*\] (?:xquant|kivi): ", line)]
    assert len(said) == 1
    assert lines[said[0]].endswith(own[1])
    traceback = next(number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line)
    assert said[0] < traceback
    return own[1]


def change(folder, name, change):
    """Write a tensor of a checkpoint anew."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def put(value):
    def change(tensor):
        tensor[3, 5] = value
        return tensor

    return change


K, V = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.v_proj.weight"


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("cache", ["latent", "x"])
@pytest.mark.parametrize(("name", "value", "layer"), [(K, float("nan"), 1), (V, float("inf"), 2)])
def test_weights_that_are_no_numbers(engines, tmp_path, name, value, layer, cache):
    folder = change(save_tiny_model(tmp_path / "model", "llama"), name, put(value))
    said = refusal(engines, folder, xquant={"bits": 4, "cache": cache})
    for part in (f"layer {layer} cannot", name, "1 element that is NaN or infinite", "[3, 5]", "checkpoint anew"):
        assert part in said


def test_weights_that_the_cast_to_float16_makes_infinite(engines, tmp_path):
    folder = change(save_tiny_model(tmp_path / "model", "llama"), K, lambda weight: weight * 1e6)
    said = refusal(engines, folder, xquant=LATENTS, dtype="float16")
    for part in ("layer 1 cannot be factorized", K, "infinite in float16", "--dtype bfloat16"):
        assert part in said
    engines.run(folder, "xquant", [], xquant=LATENTS, **{**ENGINE, "dtype": "bfloat16"})


def test_keys_that_are_infinite_in_float16(engines, tmp_path):
    """The weights themselves fit."""
    folder = change(save_tiny_model(tmp_path / "model", "llama"), K, lambda weight: weight * 9e4)
    said = refusal(engines, folder, xquant=LATENTS, dtype="float16")
    for part in ("the keys of model.layers.1.self_attn are NaN or infinite in float16", "--dtype bfloat16"):
        assert part in said


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_offloading_is_refused_by_its_flag(engines, tmp_path, backend):
    folder = save_tiny_model(tmp_path / "model", "llama")
    said = refusal(engines, folder, backend, kv_offloading_size=0.1, block_size=None)
    assert said.startswith(f"{backend}: --kv-offloading-size 0.1 is not supported")
    assert "leave it out" in said


def test_a_checkpoint_that_asks_for_a_cache_of_its_own(engines, tmp_path):
    """With the remedy of the message it is served, as the same checkpoint is that does not ask."""
    plain = quantize_tiny_model(save_tiny_model(tmp_path / "plain", "llama"))
    asking = quantize_tiny_model(save_tiny_model(tmp_path / "asking", "llama"))
    config = json.loads((asking / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (asking / "config.json").write_text(json.dumps(config))
    # Rounding the inputs to INT8 is more than the check of a model in float32 allows.
    engine = {**ENGINE, "dtype": "bfloat16"}
    said = refusal(engines, asking, xquant=LATENTS, dtype="bfloat16")
    assert "kv_cache_scheme" in said
    assert said.endswith("set --kv-cache-dtype bfloat16")
    ours = engines.run(asking, "xquant", LOGPROBS, xquant=LATENTS, kv_cache_dtype="bfloat16", **engine)
    expected = engines.run(plain, "xquant", LOGPROBS, xquant=LATENTS, **engine)
    assert ours.tasks == expected.tasks


def test_a_model_with_images_is_served_without_them(engines, tmp_path):
    folder = save_paligemma(tmp_path / "model")
    said = refusal(engines, folder, xquant=LATENTS)
    assert "PaliGemmaForConditionalGeneration" in said
    assert "serve its text part with --language-model-only" in said
    text_only = {**ENGINE, "language_model_only": True}
    ours = engines.run(folder, "xquant", LOGPROBS, xquant=LATENTS, **text_only)
    expected = engines.run(folder, "CPU_ATTN", LOGPROBS, **text_only)
    assert_close(ours.tasks[0]["logprobs"][0], expected.tasks[0]["logprobs"][0], 0.03)


def test_what_is_found_once_the_model_is_there_is_said_in_the_same_way(engines, tmp_path):
    said = refusal(engines, save_tiny_model(tmp_path / "model", "llama-dynamic"), max_model_len=512)
    assert said.endswith("set --max-model-len 256 or less")
