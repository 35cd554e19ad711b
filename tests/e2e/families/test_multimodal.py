"""Models that read images: which are served with images, which with text alone, and that nothing is served wrong."""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import EIGHT, ENGINE, PROMPT, TASKS, assert_close, assert_far, difference
from tests.family_coverage import LATENTS
from tests.tiny_multimodal import END_TOKEN, IMAGE_TOKEN, START_TOKEN, save_tiny_multimodal

pytestmark = pytest.mark.e2e

TEXT_ONLY = {"language_model_only": True}
WITH_IMAGES = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
# An image, then more text than a sliding block; all of it is more than one chunk and one block.
IMAGE_PROMPT = [*PROMPT[:20], START_TOKEN, IMAGE_TOKEN, END_TOKEN, *PROMPT[20:180]]


@pytest.fixture(scope="module")
def serve(engines, tmp_path_factory):
    folders = {}

    def serve(family, backend, tasks=TASKS, **settings):
        if family not in folders:
            folders[family] = save_tiny_multimodal(tmp_path_factory.mktemp(family), family)
        return engines.run(folders[family], backend, tasks, **{**ENGINE, **settings})

    return serve


def text_only(family, name, *features):
    marks = pytest.mark.covers(name, *features, *LATENTS, "bits=8", "prefix caching", "chunked prefill")
    return pytest.param(family, id=family, marks=marks)


@pytest.mark.parametrize(
    "family",
    [
        text_only("qwen2-vl", "Qwen2-VL, text alone", "bias", "rope=multimodal"),
        text_only("qwen2.5-vl", "Qwen2.5-VL, text alone", "bias", "rope=multimodal"),
        text_only("qwen3-vl", "Qwen3-VL, text alone", "qk-norm", "rope=multimodal"),
        text_only("gemma3", "Gemma 3 with images, text alone", "qk-norm", "sliding window", "rope=default"),
    ],
)
def test_text_is_served_by_the_text_part(serve, family):
    ours = serve(family, "xquant", xquant=EIGHT, **TEXT_ONLY)
    expected = serve(family, "CPU_ATTN", **TEXT_ONLY)
    assert "layers 0-2 are compressed, which is all" in ours.log
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [192]
    assert_close(warm["logits"][0][0].values(), cold["logits"][0][0].values(), 0.05)
    assert_close(ours.tasks[2]["logprobs"][0], expected.tasks[2]["logprobs"][0], 0.03)


@pytest.mark.covers("Qwen3-VL, text alone", "cache=x", "bits=8")
def test_pages_of_the_layer_input(serve):
    ours = serve("qwen3-vl", "xquant", xquant={"bits": 8, "cache": "x"}, **TEXT_ONLY)
    expected = serve("qwen3-vl", "CPU_ATTN", **TEXT_ONLY)
    assert_close(ours.tasks[2]["logprobs"][0], expected.tasks[2]["logprobs"][0], 0.06)


FEATURES = {"kind": "prompt_with_features", "prompt": IMAGE_PROMPT, "offset": 21, "grid": [1, 8, 8]}
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
    ours = serve("qwen2-vl", "xquant", GUARDED, xquant={"bits": 16, "cache": "latent"}, **TEXT_ONLY)
    image, embeds, grid, text = ours.tasks
    assert "At most 0 image(s) may be provided in one prompt" in image["error"]
    assert "exceeds the pre-allocated encoder cache size 0" in embeds["error"]
    assert_close(grid["logprobs"], text["logprobs"][0], 1e-4)
    # vLLM alone moves them: its model answers as if there were an image, and differently.
    plain = serve("qwen2-vl", "CPU_ATTN", GUARDED, **TEXT_ONLY).tasks
    assert_far(plain[2]["logprobs"][22:], plain[3]["logprobs"][0][22:])
    assert_close(text["logprobs"][0], plain[3]["logprobs"][0], 0.002)


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl"])
def test_images_with_positions_of_their_own_are_refused_by_name(serve, family):
    with pytest.raises(EngineFailed, match="uses multimodal RoPE, several positions per token of an image") as error:
        serve(family, "xquant", [], **WITH_IMAGES)
    assert "serve its text part with --language-model-only" in error.value.log.strip().splitlines()[-1]


def with_image(family, size, more, name):
    """A family, the edge of an image, and how many tokens it has beyond the placeholder."""
    features = ("images", "rope=default", "prefix caching", "chunked prefill")
    return pytest.param(family, size, more, id=family, marks=pytest.mark.covers(name, *features, *LATENTS, "bits=8"))


@pytest.mark.parametrize(
    ("family", "size", "more"), [with_image("llava", 28, 15, "LLaVA"), with_image("mistral3", 56, 5, "Mistral 3")]
)
def test_an_image_of_plain_positions_is_served(serve, family, size, more):
    """Its tokens are embeddings like any other, and the text model is Llama or Mistral."""
    tasks = [{"kind": "prompt_with_image", "prompt": IMAGE_PROMPT, "size": size, "seed": seed} for seed in (0, 1)]
    ours, other = serve(family, "xquant", tasks, xquant=EIGHT, **WITH_IMAGES).tasks
    expected, _ = serve(family, "CPU_ATTN", tasks, **WITH_IMAGES).tasks
    assert ours["length"] == expected["length"] == len(IMAGE_PROMPT) + more
    assert ours["cached"] >= 128
    assert ours["next"][0] == ours["next"][1]
    assert_close(ours["logprobs"], expected["logprobs"], 0.03)
    # The model sees the image: of another one it says something else.
    distance = difference(ours["logprobs"], other["logprobs"])
    print(f"another image is {distance:.4f} away")
    assert distance > 0.1


@pytest.mark.parametrize("settings", [{}, {"pre_rope": True}])
def test_kivi_serves_images_whose_keys_it_does_not_turn(serve, settings):
    """It caches keys as the model has turned them, so positions are no business of its."""
    tasks = [{"kind": "prompt_with_image", "prompt": IMAGE_PROMPT, "size": 112}]
    engine = {**WITH_IMAGES, "block_size": None}
    if settings:
        with pytest.raises(EngineFailed, match=r"kivi: Qwen2VL.* uses multimodal RoPE, several positions"):
            serve("qwen2-vl", "kivi", tasks, kivi=settings, **engine)
        return
    (ours,) = serve("qwen2-vl", "kivi", tasks, **engine).tasks
    (expected,) = serve("qwen2-vl", "CPU_ATTN", tasks, **engine).tasks
    assert ours["length"] == expected["length"] == len(IMAGE_PROMPT) + 15
    assert_close(ours["logprobs"], expected["logprobs"], 0.35)
