"""Tiny random checkpoints of models that read images, with a tokenizer and an image processor."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

VOCABULARY = 320
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN = 310, 311, 312, 313
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START_TOKEN,
    "vision_end_token_id": END_TOKEN,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.12}


def _mrope(theta: float = 1e4, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6], **parameters}


def _qwen2_vl() -> Any:
    tower = {**_QWEN_TOWER, "embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2}
    text = {**_TEXT, "rope_parameters": _mrope()}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **_TOKENS)


def _qwen2_5_vl() -> Any:
    tower = {**_QWEN_TOWER, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128}
    text = {**_TEXT, "rope_parameters": _mrope()}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**tower, "fullatt_block_indexes": [1]}, **_TOKENS
    )


def _qwen3_vl() -> Any:
    tower = {**_QWEN_TOWER, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128}
    tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**_TEXT, "head_dim": 32, "rope_parameters": _mrope(mrope_interleaved=True)}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_TOKENS)


def _qwen3_5() -> Any:
    """A hybrid one: gated attention with multimodal RoPE of a part of the channels, beside gated delta rules."""
    tower = {**_QWEN_TOWER, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128}
    rope = {**_mrope(mrope_interleaved=True), "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.25}
    states = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    states |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = ["linear_attention", "full_attention"] * 2
    text = {**_TEXT, **states, "head_dim": 64, "num_hidden_layers": 4, "layer_types": kinds, "rope_parameters": rope}
    return transformers.Qwen3_5Config(
        text_config=text, vision_config={**tower, "num_position_embeddings": 16}, **_TOKENS
    )


def _llava() -> Any:
    tower = {**_TOWER, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "projection_dim": 32}
    text = {**_TEXT, "model_type": "llama"}
    return transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=16
    )


def _mistral3() -> Any:
    tower = {**_TOWER, "model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16}
    text = {**_TEXT, "model_type": "mistral", "head_dim": 32, "sliding_window": None}
    return transformers.Mistral3Config(
        vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=False
    )


def _gemma3() -> Any:
    tower = {**_TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}
    text = {**_TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48, "model_type": "gemma3_text"}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=START_TOKEN,
        eoi_token_index=END_TOKEN,
    )


FAMILIES = {
    "qwen2-vl": (_qwen2_vl, transformers.Qwen2VLForConditionalGeneration),
    "qwen2.5-vl": (_qwen2_5_vl, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3-vl": (_qwen3_vl, transformers.Qwen3VLForConditionalGeneration),
    "qwen3.5": (_qwen3_5, transformers.Qwen3_5ForConditionalGeneration),
    "llava": (_llava, transformers.LlavaForConditionalGeneration),
    "mistral3": (_mistral3, transformers.Mistral3ForConditionalGeneration),
    "gemma3": (_gemma3, transformers.Gemma3ForConditionalGeneration),
}


def save_tiny_multimodal(folder: Path, family: str) -> Path:
    """Write a checkpoint.

    Args:
        folder: where to write.
        family: a key of ``FAMILIES``; those in ``PROCESSORS`` have what it takes to read images.

    Returns:
        ``folder``.
    """
    config, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    if family in PROCESSORS:
        PROCESSORS[family]().save_pretrained(folder)
    return folder


def _tokenizer(**named: str) -> Any:
    """Every token is a word, ``w17`` for number 17, and those of images have their usual names."""
    names = {IMAGE_TOKEN: "<|image_pad|>", VIDEO_TOKEN: "<|video_pad|>", START_TOKEN: "<s>", END_TOKEN: "</s>"}
    names |= {int(token): name for name, token in named.items()}
    words = {names.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w0"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    return tokenizer


def _qwen_processor() -> Any:
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=sizes),
        tokenizer=_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(size=sizes),
    )


def _llava_processor() -> Any:
    edge = {"height": 28, "width": 28}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=edge),
        tokenizer=_tokenizer(**{"<image>": str(IMAGE_TOKEN)}),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _mistral3_processor() -> Any:
    names = {"[IMG]": IMAGE_TOKEN, "[IMG_BREAK]": VOCABULARY - 2, "[IMG_END]": VOCABULARY - 1}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14),
        tokenizer=_tokenizer(**{name: str(token) for name, token in names.items()}),
        patch_size=14,
        spatial_merge_size=2,
    )


PROCESSORS = {"qwen2-vl": _qwen_processor, "llava": _llava_processor, "mistral3": _mistral3_processor}
