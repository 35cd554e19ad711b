"""Models that read images, served with `--language-model-only`."""

from pathlib import Path

from tests.model_hub.family import HubFamily, Shape
from tests.tiny_models import COMMON
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_multimodal import save_isaac

_TEXT_ONLY: Shape = {"language_model_only": True}
_SIGLIP: Shape = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
_PIXTRAL: Shape = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "head_dim": 16}  # fmt: skip
_CLIP: Shape = {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32, "num_hidden_layers": 2}
_QWEN: Shape = {"depth": 1, "hidden_size": 128, "num_heads": 2, "patch_size": 14}


def _text(model_type: str, **settings: object) -> Shape:
    return {**COMMON, "model_type": model_type, **settings}


def _mrope(sections: list[int]) -> Shape:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}


def _isaac(folder: Path) -> None:
    save_isaac(folder, interleaved=False)


IMAGES = (
    HubFamily("Isaac", ("PerceptronAI/Isaac-0.1",), "IsaacForConditionalGeneration", "Qwen3Config",
              made_as="Qwen3ForCausalLM", edit=_isaac, engine={**_TEXT_ONLY, "skip_tokenizer_init": False}),
    HubFamily("Gemma 3 with images", ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
              "Gemma3ForConditionalGeneration", "Gemma3Config",
              {"text_config": _text("gemma3_text", **TINY["gemma3"][1]), "vision_config": _SIGLIP,
               "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302},
              engine=_TEXT_ONLY),
    HubFamily("PaliGemma", ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224"),
              "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
              {"text_config": _text("gemma", head_dim=32, num_image_tokens=4),
               "vision_config": {**_SIGLIP, "projection_dim": 128},
               "image_token_index": 300, "projection_dim": 128, "hidden_size": 128},
              engine=_TEXT_ONLY),
    HubFamily("Mistral 3", ("mistralai/Mistral-Small-3.1-24B-Instruct-2503",
                                    "mistralai/Mistral-Small-3.2-24B-Instruct-2506"),
              "Mistral3ForConditionalGeneration", "Mistral3Config",
              {"text_config": _text("mistral", head_dim=32, sliding_window=None), "vision_config": _PIXTRAL,
               "image_token_index": 300, "tie_word_embeddings": False},
              engine=_TEXT_ONLY),
    HubFamily("LLaVA", ("llava-hf/llava-1.5-7b-hf", "mistral-community/pixtral-12b"),
              "LlavaForConditionalGeneration", "LlavaConfig",
              {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 300},
              engine=_TEXT_ONLY),
    HubFamily("Qwen2-VL", ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
              "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
              {"text_config": _text("qwen2_vl_text", rope_parameters=_mrope([4, 6, 6])),
               "vision_config": {**_QWEN, "embed_dim": 32, "mlp_ratio": 2}, "image_token_id": 300,
               "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303},
              engine=_TEXT_ONLY),
    HubFamily("Qwen2.5-VL", ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct"),
              "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
              {"text_config": _text("qwen2_5_vl_text", rope_parameters=_mrope([4, 6, 6])),
               "vision_config": {**_QWEN, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128,
                                 "fullatt_block_indexes": [0]},
               "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302,
               "vision_end_token_id": 303},
              engine=_TEXT_ONLY),
    HubFamily("Qwen3-VL", ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"),
              "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
              {"text_config": _text("qwen3_vl_text", head_dim=32,
                                    rope_parameters={**_mrope([4, 6, 6]), "mrope_interleaved": True}),
               "vision_config": {**_QWEN, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128,
                                 "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
               "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302,
               "vision_end_token_id": 303},
              engine=_TEXT_ONLY),
)  # fmt: skip
