"""Tiny random checkpoints of models that read images, of classes that vLLM can import without torchvision."""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models

from tests.tiny_models import save_tiny_model

VOCABULARY = 320
IMAGE_TOKEN = 310


def save_isaac(folder: Path, *, interleaved: bool) -> Path:
    """Write an Isaac: a Qwen3 with multimodal RoPE behind a vision tower, whose weights are left out.

    It stands for Qwen2-VL and later: vLLM gives all of them one rotary module. It serves text alone.

    Args:
        folder: where to write.
        interleaved: whether the sections of the channels are interleaved (Qwen3-VL), or follow each other (Qwen2-VL).

    Returns:
        ``folder``.
    """
    save_tiny_model(folder, "qwen3", head_dim=64)
    config = json.loads((folder / "config.json").read_text())
    text = {name: value for name, value in config.items() if name not in ("architectures", "transformers_version")}
    # As the class sets them itself: a half for the time, and a quarter each for rows and columns.
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8], "mrope_interleaved": interleaved}
    text |= {"model_type": "qwen3", "rope_parameters": rope}
    config |= {
        "architectures": ["IsaacForConditionalGeneration"],
        "model_type": "isaac",
        "rope_parameters": rope,
        "text_config": text,
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "vision_token": "<image>",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Every token is a word, ``w17`` for number 17, but for that of images."""
    words = {"<image>" if token == IMAGE_TOKEN else f"w{token}": token for token in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w0"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer
