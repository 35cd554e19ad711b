"""Turns a GGUF file into a Hugging Face checkpoint in bfloat16 (imports torch and transformers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint  # first: it sets how transformers is to be imported

# isort: split
import torch
import transformers

from .console import say
from .recipe import PrepareError


def load(gguf: Path) -> Checkpoint:
    """Read model and tokenizer, the weights expanded to bfloat16."""
    transformers.logging.set_verbosity_error()
    say("reading the tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    say("reading the weights and expanding them to bfloat16")
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise PrepareError(f"weight {name} of {gguf.name} has values that are no numbers")
    # What only tells of this conversion's temporary files does not belong into the checkpoint.
    model.config._name_or_path = ""
    model.config.__dict__.pop("_model_name_or_path", None)
    for key in ("is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    return Checkpoint(model.eval(), tokenizer)


def split_digits(tokenizer: Any) -> None:
    """Make every digit a token of its own, before the byte-level splitting."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
