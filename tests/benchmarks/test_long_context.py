"""Lengths and prompts that are measured later stand beside those of before; YaRN stretches what a model reads."""

import json

import pytest
import torch
import transformers

from benchmarks.accuracy.copies import copy_window, repeated, score_copies
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
    new = {"name": "some", "positions": {}, "needle": None}
    first = with_more(new, {"8192": ["far"]}, [_cell(8192, 0.0, 1)], [{"length": 8192, "distance": 4096}])
    assert first["needle"]["accuracy"] == 0
    nearer = [{"length": 8192, "distance": 1024}]
    both = with_more(first, {"4096": ["near"]}, [_cell(4096, 1.0, 3)], nearer)
    assert [entry["distance"] for entry in both["copies"]] == [1024, 4096]
    assert list(both["positions"]) == ["4096", "8192"]
    assert [cell["length"] for cell in both["needle"]["cells"]] == [4096, 8192]
    assert (both["needle"]["accuracy"], both["needle"]["nll"]) == (0.75, 0.25)
    assert both["name"] == "some"


def test_without_prompts_there_is_no_needle() -> None:
    assert with_more({"positions": {}, "needle": None}, {"4096": []}, [], [])["needle"] is None


@pytest.mark.parametrize("turn", range(5))
def test_copies_are_said_again_at_their_distances(turn) -> None:
    window = copy_window(torch.arange(256), turn)
    assert sorted(window.starts) == [32, 64, 128, 224]
    firsts = set()
    for distance, start in window.starts.items():
        said = window.tokens[start : start + window.passage]
        assert torch.equal(said, window.tokens[start - distance : start - distance + window.passage])
        firsts.add(start - distance)
    assert firsts == {0, 8, 16, 24}, "every passage once"


def test_what_is_scored_of_copies_is_what_the_second_time_says() -> None:
    windows = [copy_window(torch.arange(1024)), copy_window(torch.arange(1024), 1)]
    exact = torch.nn.functional.one_hot

    def sure(tokens: torch.Tensor, wrong: int = 0) -> torch.Tensor:
        return exact((tokens.roll(-1) + wrong) % 1024, 1024) * 50.0

    def worse(tokens: torch.Tensor) -> torch.Tensor:
        logits, copied = sure(tokens), torch.arange(1024) >= 896
        return torch.where(copied[:, None], sure(tokens, wrong=1), logits)

    scores = {entry["distance"]: entry for entry in score_copies(windows, sure, worse)}
    assert [scores[distance]["kl"] for distance in (128, 256, 512)] == pytest.approx([0, 0, 0], abs=1e-4)
    assert scores[896]["kl"] == pytest.approx(50, rel=1e-3)
    assert scores[896]["tokens"] == 2 * (32 - 16)
    assert scores[896]["top1_agreement"] == 0


def test_what_a_text_says_twice_is_told_by_position() -> None:
    tokens = torch.arange(101)
    tokens[51:81] = tokens[1:31]
    assert repeated([tokens, torch.arange(101)], (50, 100)) == [0.0, 0.5 * 30 / 50]


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
