"""Which drafts are served, and which model is one."""

import pytest

from tests.plugin.test_checks import configure
from tests.tiny_models import save_tiny_model
from xquant_vllm.plugin.drafts import SPECULATIVE, is_draft, unsupported_speculation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


def test_drafts_keep_keys_and_values_or_are_compressed(tiny):
    draft = {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 2}
    configure(tiny, speculative_config=draft)
    config = configure(tiny, speculative_config={**draft, "attention_backend": "xquant"})
    assert is_draft(config, config.speculative_config.draft_model_config)
    assert not is_draft(config, config.model_config)
    config.speculative_config.parallel_drafting = True
    (problem,) = unsupported_speculation(config, SPECULATIVE)
    assert "parallel_drafting cannot be compressed" in problem
    config.speculative_config.attention_backend = None
    assert not list(unsupported_speculation(config, SPECULATIVE))
    config.speculative_config.method = "medusa"
    (problem,) = unsupported_speculation(config, SPECULATIVE)
    assert problem.endswith("use one of ngram, suffix, draft_model, eagle, eagle3")


def test_heads_are_not_compressed_by_the_factors_of_the_model(tiny, monkeypatch):
    draft = {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 2, "attention_backend": "xquant"}
    config = configure(tiny, speculative_config=draft)
    monkeypatch.setattr("xquant_vllm.plugin.drafts.factors_of", lambda config: (tiny, object()))
    assert not list(unsupported_speculation(config, SPECULATIVE))
    config.speculative_config.method = "eagle3"
    (problem,) = unsupported_speculation(config, SPECULATIVE)
    assert f"a head for 'eagle3' cannot be compressed beside a model with factors, which {tiny}" in problem
    assert 'leave "attention_backend" out of --speculative-config' in problem
