"""Models that read images by multimodal RoPE: served with text alone, and nothing is served wrong."""

import pytest

from tests.e2e.families.test_families import EIGHT, ENGINE, PROMPT, TASKS, assert_close, difference
from tests.family_coverage import LATENTS
from tests.tiny_multimodal import IMAGE_TOKEN, save_isaac

pytestmark = pytest.mark.e2e

TEXT_ONLY = {"language_model_only": True, "skip_tokenizer_init": False}
IMAGE_PROMPT = [*PROMPT[:20], IMAGE_TOKEN, *PROMPT[20:180]]


@pytest.fixture(scope="module")
def serve(engines, tmp_path_factory):
    folders = {}

    def serve(interleaved, backend, tasks=TASKS, **settings):
        if interleaved not in folders:
            folders[interleaved] = save_isaac(tmp_path_factory.mktemp("isaac"), interleaved=interleaved)
        return engines.run(folders[interleaved], backend, tasks, **{**ENGINE, **TEXT_ONLY, **settings})

    return serve


@pytest.mark.alike(keep=1)
@pytest.mark.covers(
    "Isaac (multimodal RoPE as of Qwen2-VL and Qwen3-VL), text alone",
    *("qk-norm", "rope=multimodal", "prefix caching", "chunked prefill", "bits=8"),
    *LATENTS,
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_text_is_served_by_the_text_part(serve, interleaved):
    ours, expected = serve(interleaved, "xquant", xquant=EIGHT), serve(interleaved, "CPU_ATTN")
    assert "layers 0-2 are compressed, which is all" in ours.log
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [192]
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys()) <= 0.05
    assert_close(ours.tasks[2]["logprobs"][0], expected.tasks[2]["logprobs"][0], 0.03)


FEATURES = {"kind": "prompt_with_features", "prompt": IMAGE_PROMPT, "offset": 20, "grid": [1, 8, 8]}
GUARDED = [
    {"kind": "prompt_with_image", "prompt": IMAGE_PROMPT, "size": 112},
    {**FEATURES, "embeds": True},
    {**FEATURES, "embeds": False},
    {"kind": "prompt_logprobs", "prompts": [IMAGE_PROMPT]},
]


def test_no_image_passes_where_text_alone_is_served(serve):
    """vLLM refuses images, processed ones too. What passes as none, for it has no embeddings, does not move positions.

    Without this package's guard the tokens behind such an "image" would be turned by other positions than their keys.
    """
    ours = serve(False, "xquant", GUARDED, xquant={"bits": 16, "cache": "latent"})
    image, embeds, grid, text = ours.tasks
    assert "Multi-modal processor not available for text-only models" in image["error"]
    assert "exceeds the pre-allocated encoder cache size 0" in embeds["error"]
    assert_close(grid["logprobs"], text["logprobs"][0], 1e-4)
    # vLLM alone moves them: its model answers as if there were an image, and differently.
    plain = serve(False, "CPU_ATTN", GUARDED).tasks
    assert difference(plain[2]["logprobs"], plain[3]["logprobs"][0]) > 0.3
    assert_close(text["logprobs"][0], plain[3]["logprobs"][0], 0.002)
