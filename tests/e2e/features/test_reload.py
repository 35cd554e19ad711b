"""New weights for a running engine: afterwards it answers as one does that was started with them."""

import re

import pytest
from demo import can_compile

from tests.e2e.families.test_families import ENGINE, PROMPT
from tests.e2e.features.checkpoints import with_other_weights
from tests.tiny_models import quantize_tiny_model, save_tiny_model
from xquant_vllm.cli.main import main

pytestmark = pytest.mark.e2e

LOGITS = {"kind": "next_logits", "prompts": [PROMPT], "max_tokens": 3}
# A cold prompt, and one of which the prefix cache has blocks: of the old weights, if they were not forgotten.
ANSWERS = [LOGITS, LOGITS]


def reload_by(way, folder=None, **which):
    return {"kind": "feature", "name": "reload_weights", "way": way, "folder": folder and str(folder), **which}


@pytest.fixture(scope="session")
def other(tiny, tmp_path_factory):
    """The same model with other weights."""
    folders = {}

    def other(family):
        if family not in folders:
            folders[family] = with_other_weights(tiny(family), tmp_path_factory.mktemp(family) / "b")
        return folders[family]

    return other


def answers_around_new_weights(engines, old, new, way, xquant, **engine):
    """What an engine answers before and after, and with its first weights again; and one that began with the new."""
    tasks = [*ANSWERS, reload_by(way, new), *ANSWERS, reload_by("iterator", old), *ANSWERS]
    settings = {**ENGINE, **engine, "xquant": xquant}
    ours = engines.run(old, "xquant", tasks, **settings)
    fresh = engines.run(new, "xquant", ANSWERS, **settings)
    first, then = ours.tasks[2], ours.tasks[5]
    assert [first["error"], then["error"]] == [None, None]
    assert first["model"] == str(new if way == "path" else old)
    assert ours.tasks[3:5] == fresh.tasks
    assert ours.tasks[0] != fresh.tasks[0]
    assert ours.tasks[6:] == ours.tasks[:2]
    assert ours.tasks[1]["cached"][0] > 0
    return ours


def nightly(*parameters, **name):
    return pytest.param(*parameters, marks=pytest.mark.nightly, **name)


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize(
    ("family", "xquant", "way"),
    [
        ("llama-bias", {"cache": "latent"}, "path"),
        ("qwen3", {"cache": "latent", "bits": 8}, "chunks"),
        ("llama-bias", {"cache": "x"}, "chunks"),
        nightly("mha", {"method": "xquant-cl"}, "path"),
        nightly("gemma2", {"cache": "latent", "fold_values": False}, "path"),
        nightly("llama", {"method": "xquant-cl", "cache": "latent", "factor_cache": False}, "iterator"),
        # Other layouts of projections.
        nightly("gpt2", {"cache": "latent"}, "path"),
        nightly("gpt2", {"cache": "x"}, "path"),
        nightly("falcon", {"cache": "latent"}, "path"),
        nightly("falcon-mqa", {"cache": "latent"}, "chunks"),
        # Those that run through vLLM's Transformers backend.
        nightly("arcee", {"cache": "latent"}, "path"),
        nightly("gpt-neox", {"cache": "latent"}, "path"),
        nightly("gpt-neox", {"cache": "x"}, "path"),
        nightly("smollm3", {"cache": "latent"}, "chunks"),
        nightly("smollm3", {"cache": "latent", "method": "xquant-cl", "first_layers": 1}, "path"),
    ],
)
def test_answers_are_those_of_an_engine_that_was_started_with_the_weights(engines, tiny, other, family, xquant, way):
    answers_around_new_weights(engines, tiny(family), other(family), way, xquant)


# Traced code finds its tensors as compiled code does, and takes no minute to make.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
COMPILED = {"enforce_eager": False}


@pytest.mark.parametrize(
    ("family", "xquant", "engine"),
    [
        # Other modules stand in for its own, later layers read its pages, and a pool holds what was made of them.
        pytest.param("mha", {"method": "xquant-cl"}, TRACED, id="traced chain of X, hot"),
        nightly("mha", {"method": "xquant-cl"}, COMPILED, id="chain of X, hot"),
        nightly("llama-bias", {"cache": "latent"}, COMPILED, id="latents"),
        nightly("llama-bias", {"cache": "x", "hot": 0}, COMPILED, id="X"),
        nightly("smollm3", {"cache": "latent"}, COMPILED, id="Transformers backend"),
    ],
)
def test_compiled_code_reads_the_new_matrices(engines, tiny, other, family, xquant, engine):
    if engine is COMPILED and not can_compile():
        pytest.skip("torch.compile needs Python.h, which python3-dev installs: vLLM itself cannot compile here")
    ours = answers_around_new_weights(engines, tiny(family), other(family), "path", xquant, **engine)
    assert "Warming up model for the compilation" in ours.log
    assert ("attended from the pool" in ours.log) == (family == "mha")


def test_a_request_that_runs_goes_on_with_the_new_weights(engines, tiny, other):
    """Its pages are made anew; the tokens that it has stay."""
    settings = {**ENGINE, "xquant": {"cache": "latent"}}
    running = {
        "kind": "feature",
        "name": "generate_across_reload",
        "prompt": PROMPT[:60],
        "before": 4,
        "total": 12,
        "folder": str(other("llama-bias")),
    }
    (ours,) = engines.run(tiny("llama-bias"), "xquant", [running], **settings).tasks
    cut, tokens = ours["cut"], ours["tokens"]
    # A step that was under way when they came has computed one more token with the old ones.
    for known in (cut, cut + 1):
        rest = {"kind": "greedy", "prompts": [PROMPT[:60] + tokens[:known]], "max_tokens": 12 - known}
        (fresh,) = engines.run(other("llama-bias"), "xquant", [rest], **settings).tasks
        if fresh["tokens"][0] == tokens[known:]:
            return
    pytest.fail(f"{tokens} after {cut}, {fresh}")


def test_weights_of_no_attention_layer_alone(engines, tiny, tmp_path):
    both = with_other_weights(tiny("llama-bias"), tmp_path / "both", only=".mlp.")
    settings = {**ENGINE, "xquant": {"cache": "latent"}}
    tasks = [LOGITS, reload_by("iterator", both, names=[".mlp."]), LOGITS]
    ours = engines.run(tiny("llama-bias"), "xquant", tasks, **settings).tasks
    (fresh,) = engines.run(both, "xquant", [LOGITS], **settings).tasks
    assert ours[1]["error"] is None
    assert ours[2] == fresh != ours[0]


CANNOT = "xquant: new weights cannot be loaded into a running model: "
KEEPS = "it keeps the weights that it has"


def test_what_is_refused_leaves_the_engine_serving(engines, tiny, other, tmp_path):
    """And what breaks off half-way too: loaded once more, all weights are what they were."""
    folder = tiny("llama-bias")
    (tmp_path / "no").mkdir()
    refused = {
        "path": [CANNOT, f"{tiny('llama-linear')} is of another model", "rope_parameters", KEEPS],
        "kernel": [CANNOT, "is_checkpoint_format=False", KEEPS],
        "model": [CANNOT, "use reload_weights", KEEPS],
    }
    tasks = [
        LOGITS,
        reload_by("path", tiny("llama-linear")),
        reload_by("kernel", other("llama-bias")),
        reload_by("model", other("llama-bias")),
        reload_by("path", tmp_path / "no"),
        reload_by("iterator", other("llama-bias"), names=["layers.1.self_attn.q_proj", "layers.2.self_attn"]),
        reload_by("iterator", other("llama-bias"), breaks_after=0),
        LOGITS,
        reload_by("iterator", other("llama-bias"), breaks_after=12),
        LOGITS,
        {"kind": "feature", "name": "sleep"},
        reload_by("own"),
        LOGITS,
    ]
    ours = engines.run(folder, "xquant", tasks, xquant={"cache": "latent"}, **ENGINE)
    answers, said = ours.tasks, [task.get("error") for task in ours.tasks]
    for number, parts in enumerate(refused.values(), 1):
        for part in parts:
            assert part in said[number]
    assert "cannot be read" in said[4]
    assert "lack model.layers.0.self_attn.qkv_proj (and" in said[5]
    assert "load all of them, or none" in said[5]
    assert said[6] == said[8] == "the trainer is gone"
    assert said[11] is None
    assert {task["model"] for task in answers if "model" in task} == {str(folder)}
    assert answers[7] == answers[0] == answers[12]
    assert re.search(r"ERROR .*xquant: new weights cannot be loaded", ours.log)


def test_factors_of_the_old_weights_are_not_served_with_new_ones(engines, tiny, other, tmp_path):
    folder = tmp_path / "factors"
    options = ["--dtype", "float32", "--no-certificate"]
    assert main(["factorize", str(tiny("llama-bias")), "--out", str(folder), *options]) == 0
    tasks = [LOGITS, reload_by("iterator", other("llama-bias")), reload_by("path", folder), reload_by("own"), LOGITS]
    ours = engines.run(folder, "xquant", tasks, **ENGINE).tasks
    assert "has factors, which are made for the weights beside them" in ours[1]["error"]
    assert [task["error"] for task in ours[2:4]] == [None, None]
    assert ours[4] == ours[0]


def test_quantized_projections_keep_their_weights(engines, tmp_path):
    folder = quantize_tiny_model(save_tiny_model(tmp_path / "model", "llama"))
    settings = {**ENGINE, "dtype": "bfloat16", "xquant": {"cache": "latent"}}
    ours = engines.run(folder, "xquant", [LOGITS, reload_by("own"), LOGITS], **settings).tasks
    assert "were quantized, and their packed weights are gone" in ours[1]["error"]
    assert ours[2]["logits"] == ours[0]["logits"]


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("pre_rope", [False, True])
def test_kivi_takes_new_weights(engines, tiny, pre_rope):
    """It changes none: the same ones loaded again give the same."""
    logprobs = {"kind": "prompt_logprobs", "prompts": [PROMPT]}
    kivi = {"bits": 4, "residual": 128, "pre_rope": pre_rope}
    settings = {**ENGINE, "kivi": kivi, "block_size": None}
    ours = engines.run(tiny("llama-bias"), "kivi", [logprobs, reload_by("own"), logprobs], **settings).tasks
    assert ours[1]["error"] is None
    assert ours[0] == ours[2]
