"""Turns a GGUF file into a Hugging Face checkpoint in bfloat16 (imports torch and transformers)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the GGUF
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, a progress bar is hundreds of lines

import torch
import transformers

from .console import say
from .recipe import PrepareError


@dataclass
class Checkpoint:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    def check_chat(self, stop: str) -> None:
        """Refuse a checkpoint that cannot chat: no template, or one that does not end turns on `stop`.

        A server takes the token to stop at from generation_config.json; a model that ends its turns on another one
        would ramble on to the length limit.
        """
        stop_id = self.tokenizer.convert_tokens_to_ids(stop)
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if f"Hi{stop}" not in prompt:
            raise PrepareError(f"the chat template does not close a turn with {stop!r}; it renders {prompt!r}")
        if self.tokenizer.eos_token_id != stop_id:
            raise PrepareError(f"the tokenizer's end token is {self.tokenizer.eos_token!r} instead of {stop!r}")
        self.model.generation_config = transformers.GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=stop_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def check_continuation(self, prompt: str, expected: str) -> None:
        """Refuse weights that do not continue a prompt as the real model does, as weights read wrongly would not."""
        with torch.inference_mode():
            logits = self.model(**self.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        said = self.tokenizer.decode(logits.argmax())
        if said != expected:
            raise PrepareError(
                f"the converted model continues {prompt!r} with {said!r} instead of {expected!r}; "
                f"transformers {transformers.__version__} may read this GGUF differently"
            )
        say(f"check: {prompt!r} goes on with {said!r}")

    def save(self, target: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer with its chat template."""
        say(f"writing {target.name}")
        self.tokenizer.model_max_length = self.model.config.max_position_embeddings
        self.model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        for path in target.iterdir():
            path.chmod(0o644)  # weights are written for their owner only


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
