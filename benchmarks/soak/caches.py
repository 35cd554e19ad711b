"""The caches that are soaked, in turn, and the tiny checkpoint that all of them serve."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL = "16bit"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class SoakedCache:
    """One cache, and what is tried with it beside the load.

    Attributes:
        name: what options and results call it.
        settings: of the plugin; None for vLLM's own cache.
        calibrated: serves the folder that `xquant factorize --calibration --basis joint` makes.
        speculates: drafts by n-grams; asked for greedy answers only, as vLLM cannot sample behind drafts on CPUs.
        is_killed: its engine core is killed in the middle of requests, and the server started again.
        hot: holds hot blocks, whose keys round to 16 bits: the probe may differ by that.
    """

    name: str
    settings: dict[str, Any] | None = field(default_factory=dict)
    calibrated: bool = False
    speculates: bool = False
    is_killed: bool = False
    hot: bool = False

    def flags(self) -> list[str]:
        """Options of `vllm serve`."""
        flags = []
        if self.settings is not None:
            settings = self.settings | ({} if self.hot else {"hot": 0})
            flags += ["--attention-backend", "xquant", "--additional-config", json.dumps({"xquant": settings})]
        if self.speculates:
            drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
            flags += ["--speculative-config", json.dumps(drafts)]
        return flags


CACHES = {
    cache.name: cache
    for cache in (
        SoakedCache(CONTROL, None),
        SoakedCache("latent", {"bits": 4}, is_killed=True),
        SoakedCache("x", {"bits": 4, "cache": "x"}, speculates=True),
        SoakedCache("chain", {"bits": 4, "method": "xquant-cl", "calibration": "none"}),
        SoakedCache("joint", {}, calibrated=True),
        SoakedCache("x-hot", {"bits": 4, "cache": "x", "hot": "50%"}, hot=True),
    )
}


def make_model(folder: Path, tokenizer: Path) -> Path:
    """Write a random Llama of three layers with the tokenizer of another checkpoint; returns ``folder``."""
    import torch
    import transformers

    vocabulary = transformers.AutoConfig.from_pretrained(tokenizer).vocab_size
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        initializer_range=0.12,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def calibrated_joint(model: Path, folder: Path) -> Path:
    """What `xquant factorize` makes of the model, calibrated, with one latent for keys and values; ``folder``."""
    command = [sys.executable, "-m", "xquant_vllm.cli", "factorize", str(model), "--out", str(folder), "--force",
               "--calibration", "python-docs", "--calibration-tokens", "1024", "--basis", "joint", "--bits", "4",
               "--dtype", "float32", "--no-certificate"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
