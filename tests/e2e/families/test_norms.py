"""Models that normalize their keys in unusual ways: over all heads together, by a LayerNorm, or behind RoPE."""

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import EIGHT, ENGINE, TASKS, assert_close, difference
from tests.e2e.families.test_projections import logprobs, transformers_logprobs
from tests.factorizing import FakeTokenizer, factorize
from tests.family_coverage import LATENTS

pytestmark = pytest.mark.e2e

OLMOE, COMMAND_R, LLAMA4 = "OLMoE", "Command-R+", "Llama 4 without chunks"
FEATURES = ("qk-norm", "rope=default", "bits=8")


@pytest.fixture(scope="module")
def serve(engines, tiny):
    def serve(family, backend="xquant", tasks=TASKS, **settings):
        return engines.run(tiny(family), backend, tasks, **{**ENGINE, **settings})

    return serve


@pytest.fixture(scope="module")
def plain(engines):
    """Log-probabilities of the prompt: by transformers, which takes no engine, or in 16 bit where that wants chunks."""
    known = {}

    def plain(folder):
        if folder not in known:
            chunks = "attention_chunk_size" in json.loads((folder / "config.json").read_text())
            known[folder] = (
                logprobs(engines.run(folder, "CPU_ATTN", TASKS[-1:], **ENGINE))
                if chunks
                else transformers_logprobs(folder)
            )
        return known[folder]

    return plain


@pytest.fixture(scope="module")
def expected(plain, tiny):
    return lambda family: plain(tiny(family))


def without_norm(folder, target):
    """The same checkpoint with the norm of its keys changed: no weights, or none at all."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    norms = [name for name in weights if name.endswith("k_norm.weight")]
    for name in norms:
        weights[name].fill_(1.0)
    if not norms:
        config["use_qk_norm"] = False
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def served(family, name, *features):
    marks = pytest.mark.covers(name, *FEATURES, *LATENTS, "prefix caching", "chunked prefill", *features)
    return pytest.param(family, id=family, marks=marks)


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    "family",
    [
        served("olmoe", OLMOE),
        served("command-r-plus", COMMAND_R),
        served("llama4-whole", LLAMA4, "rope=none"),
    ],
)
def test_eight_bits_match_the_model(serve, plain, expected, tiny, tmp_path, family):
    ours = serve(family, xquant=EIGHT)
    assert_close(logprobs(ours), expected(family), 0.03)
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [192]
    (before,), (after,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(before[token] - after[token]) for token in before.keys() & after.keys()) <= 0.05
    # A norm without its weights is another model, which the bound must tell apart.
    distance = difference(expected(family), plain(without_norm(tiny(family), tmp_path / "broken")))
    print(f"mean absolute difference of log-probability to the model with another norm {distance:.4f}")
    assert distance > 0.1


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("command-r-plus", {"cache": "x"}, marks=pytest.mark.covers(COMMAND_R, "cache=x")),
        pytest.param(
            "command-r-plus",
            {"cache": "latent", "method": "xquant-cl", "first_layers": 1},
            marks=pytest.mark.covers(COMMAND_R, "method=xquant-cl"),
        ),
        pytest.param("llama4-whole", {"cache": "x"}, marks=pytest.mark.covers(LLAMA4, "cache=x")),
        pytest.param("olmoe", {"basis": "joint", "prompt": "exact"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_other_caches_match_it_too(serve, expected, family, settings):
    assert_close(logprobs(serve(family, xquant={"bits": 8, **settings})), expected(family), 0.06)


def test_a_norm_over_all_heads_has_latents_cached_by_default(serve, expected):
    """Although the layer input has fewer channels, which decides for all other models."""
    ours = serve("olmoe", xquant={"bits": 8})
    assert 'cache "latent" at key 8 / value 8 bits' in ours.log
    assert "3 layers normalize the keys of all heads together: their key latents are cached after it" in ours.log
    assert_close(logprobs(ours), expected("olmoe"), 0.03)


def test_what_keys_and_values_would_share_is_refused_by_name(serve):
    with pytest.raises(EngineFailed) as error:
        serve("olmoe", tasks=[], xquant={"method": "xquant-cl"})
    *_, last = error.value.log.strip().splitlines()
    assert "xquant: setting 'method': 'xquant-cl' cannot work on this model" in last
    assert "normalizes the keys of all heads together (layer 0)" in last
    assert last.endswith('set "method": "xquant"')


@pytest.mark.covers(OLMOE, "tensor parallel", *LATENTS, "bits=8")
@pytest.mark.nightly
def test_ranks_divide_by_the_norm_over_the_heads_of_all_of_them(engines, expected, tiny):
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(
        tiny("olmoe"), "xquant", TASKS, xquant=EIGHT, environment=binding, tensor_parallel_size=2, **ENGINE
    )
    assert_close(logprobs(ours), expected("olmoe"), 0.03)


def test_calibrated_factors_of_normalized_keys_are_served(engines, expected, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    options = ("--bits", "8", "--calibration", "python-docs", "--calibration-tokens", "256", "--dtype", "float32")
    assert factorize(tiny("olmoe-gqa"), tmp_path / "folder", *options, "--certificate-text", text) == 0
    calibrated = engines.run(tmp_path / "folder", "xquant", TASKS, **ENGINE)
    assert "(calibrated on 256 tokens)" in calibrated.log
    assert "xquant: measured loss of these factors on text.txt (511 tokens, not calibrated on): KL" in calibrated.log
    assert_close(logprobs(calibrated), expected("olmoe-gqa"), 0.06)
