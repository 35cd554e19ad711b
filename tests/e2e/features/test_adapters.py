"""Adapters (LoRA) over compressed layers: as merged into the checkpoint, or refused when they are loaded."""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import ENGINE, PROMPT, assert_close, difference
from tests.e2e.features.checkpoints import merge, save_adapter
from tests.tiny_models import quantize_tiny_model, save_tiny_model

pytestmark = pytest.mark.e2e

LOGPROBS = {"kind": "prompt_logprobs", "prompts": [PROMPT]}
LORA = {**ENGINE, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
FREE = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_adapter(folder, number=1):
    return {"kind": "feature", "name": "adapter", "folder": str(folder), "number": number, "prompt": PROMPT}


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("xquant", [{"bits": 8}, {"bits": 8, "method": "xquant-cl"}])
def test_adapters_of_queries_and_outputs(engines, tiny, tmp_path, xquant):
    """Beside requests without one. Refused ones leave the engine serving, also where one would replace another."""
    folder = tiny("mha")
    good = save_adapter(tmp_path / "good", folder, FREE)
    keys = save_adapter(tmp_path / "keys", folder, ("q_proj", "k_proj"))
    values = save_adapter(tmp_path / "values", folder, ("layers.1.self_attn.v_proj",))
    fresh = save_adapter(tmp_path / "fresh", folder, ("q_proj", "v_proj"), rows=slice(0))
    tasks = [LOGPROBS, with_adapter(good), with_adapter(keys, 2), with_adapter(values, 3)]
    tasks += [with_adapter(fresh, 4), with_adapter(good), LOGPROBS]
    ours = engines.run(folder, "xquant", tasks, xquant=xquant, **LORA)
    base, served, refused_keys, refused_values, nothing, again, after = ours.tasks
    assert "folded into the output projection" not in ours.log
    for refused, name in ((refused_keys, "keys"), (refused_values, "values")):
        assert f"xquant: the adapter '{name}'" in refused["error"]
        assert "merge it into the checkpoint" in refused["error"]
    assert "model.layers.0.self_attn.k_proj (and 2 more" in refused_keys["error"]
    assert "model.layers.1.self_attn.v_proj (and 0 more" in refused_values["error"]
    assert served["error"] is again["error"] is nothing["error"] is None
    assert again["logprobs"] == served["logprobs"]
    assert after == base
    assert nothing["logprobs"] == base["logprobs"][0]
    merged = engines.run(merge(folder, good, tmp_path / "merged"), "CPU_ATTN", [LOGPROBS], **ENGINE).tasks[0]
    assert_close(served["logprobs"], merged["logprobs"][0], 0.03)
    assert difference(served["logprobs"], base["logprobs"][0]) > 0.1


def test_one_projection_for_all_in_the_checkpoint(engines, tiny, tmp_path):
    folder = tiny("phi3")
    rows = slice(0, 128)
    queries = save_adapter(tmp_path / "queries", folder, ("qkv_proj", "o_proj"), rows=rows)
    keys = save_adapter(tmp_path / "keys", folder, ("qkv_proj",))
    tasks = [with_adapter(keys), with_adapter(queries, 2)]
    ours = engines.run(folder, "xquant", tasks, xquant={"bits": 8, "cache": "latent"}, **LORA)
    assert "qkv_proj (and" in ours.tasks[0]["error"]
    merged = engines.run(merge(folder, queries, tmp_path / "merged"), "CPU_ATTN", [LOGPROBS], **ENGINE)
    assert_close(ours.tasks[1]["logprobs"], merged.tasks[0]["logprobs"][0], 0.03)


def test_what_hides_the_queries_from_adapters_is_refused_at_start_up(engines, tiny, tmp_path):
    with pytest.raises(EngineFailed) as error:
        engines.run(tiny("llama"), "xquant", [], xquant={"cache": "x"}, **LORA)
    assert 'set "cache": "latent"' in error.value.log.strip().splitlines()[-1]
    quantized = quantize_tiny_model(save_tiny_model(tmp_path / "model", "llama"))
    with pytest.raises(EngineFailed) as error:
        engines.run(quantized, "xquant", [], xquant={"cache": "latent"}, **{**LORA, "dtype": "bfloat16"})
    assert "--enable-lora is not supported with a quantized qkv_proj" in error.value.log.strip().splitlines()[-1]
