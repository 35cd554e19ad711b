"""Lengths and prompts that are measured later stand beside those of before; YaRN stretches what a model reads."""

import json

import pytest
import transformers

from benchmarks.long_context import with_more, with_yarn
from tests.tiny_models import save_tiny_model


def _cell(length: int, found: float, prompts: int) -> dict[str, float]:
    return {
        "length": length,
        "depth": 0.5,
        "prompts": prompts,
        "accuracy": found,
        "accuracy_16bit": 1.0,
        "nll": 1 - found,
        "nll_16bit": 0.0,
    }


def test_they_add_up() -> None:
    first = with_more({"name": "some", "positions": {}, "needle": None}, {"8192": ["far"]}, [_cell(8192, 0.0, 1)])
    assert first["needle"]["accuracy"] == 0
    both = with_more(first, {"4096": ["near"]}, [_cell(4096, 1.0, 3)])
    assert list(both["positions"]) == ["4096", "8192"]
    assert [cell["length"] for cell in both["needle"]["cells"]] == [4096, 8192]
    assert (both["needle"]["accuracy"], both["needle"]["nll"]) == (0.75, 0.25)
    assert both["name"] == "some"


def test_without_prompts_there_is_no_needle() -> None:
    assert with_more({"positions": {}, "needle": None}, {"4096": []}, [])["needle"] is None


def test_yarn_is_all_that_changes(tmp_path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    before = json.loads((model / "config.json").read_text())
    folder = with_yarn(model, 4.0, tmp_path / "stretched")
    assert folder.name == "llama-yarn-4"
    after = json.loads((folder / "config.json").read_text())
    assert {name for name in after if after[name] != before[name]} == {"rope_parameters", "max_position_embeddings"}
    assert after["max_position_embeddings"] == 4 * before["max_position_embeddings"]
    rotary = transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(1.1386, abs=1e-4)
    assert (folder / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    assert with_yarn(model, 4.0, tmp_path / "stretched") == folder, "once more"
    with pytest.raises(SystemExit, match="yarn"):
        with_yarn(folder, 2.0, tmp_path)
