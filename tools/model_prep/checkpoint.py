"""A model with its tokenizer: checked and written as a Hugging Face checkpoint (imports torch and transformers)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the files at hand
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
        self.stop_at_the_end_token()

    def stop_at_the_end_token(self) -> None:
        """Write the tokenizer's special tokens, and nothing else, into what generation starts from."""
        self.model.generation_config = transformers.GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def begin_texts_with_bos(self) -> None:
        """Put the begin token before every text, as the model was trained."""
        self.tokenizer.add_bos_token = True
        tokens = self.tokenizer.encode("Hi")
        if tokens[:1] != [self.tokenizer.bos_token_id] or tokens.count(self.tokenizer.bos_token_id) != 1:
            raise PrepareError(f"the tokenizer makes {tokens} of 'Hi' instead of one begin token and the text")

    def check_config(self, published: Mapping[str, Any]) -> None:
        """Refuse a configuration that differs from the published one, in the settings that are given.

        What a conversion loses becomes the model class's default, and the model computes something else: often with
        short texts still right.
        """
        config = self.model.config.to_dict()
        for name, value in published.items():
            if not _equal(config.get(name), value):
                raise PrepareError(
                    f"the converted configuration has {name} = {config.get(name)!r}, but the published one has "
                    f"{value!r}; transformers {transformers.__version__} may read this checkpoint differently"
                )

    def check_continuation(self, prompt: str, expected: str) -> None:
        """Refuse weights that do not continue a prompt as the real model does, as weights read wrongly would not."""
        with torch.inference_mode():
            logits = self.model(**self.tokenizer(prompt, return_tensors="pt"), logits_to_keep=1).logits[0, -1]
        said = self.tokenizer.decode(logits.argmax())
        shown = prompt if len(prompt) <= 60 else f"{prompt[:30]} ... {prompt[-25:]}"
        if said != expected:
            raise PrepareError(
                f"the prepared model continues {shown!r} with {said!r} instead of {expected!r}; "
                f"transformers {transformers.__version__} may read this checkpoint differently"
            )
        say(f"check: {shown!r} goes on with {said!r}")

    def save(self, target: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer with its chat template."""
        say(f"writing {target.name}")
        self.tokenizer.model_max_length = self.model.config.max_position_embeddings
        self.model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        for path in target.iterdir():
            path.chmod(0o644)  # weights are written for their owner only


def _equal(found: Any, expected: Any) -> bool:
    """Equal, up to the rounding of numbers that were stored as 32-bit floats."""
    if isinstance(expected, Mapping):
        return isinstance(found, Mapping) and all(_equal(found.get(name), value) for name, value in expected.items())
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-6)
    return bool(found == expected)


def read(folder: Path) -> Checkpoint:
    """A finished checkpoint folder, in the dtype that it is in."""
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return Checkpoint(model.eval(), transformers.AutoTokenizer.from_pretrained(folder))
