"""A vLLM engine in this process that says what a model makes of token windows: final hidden states and their logits."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xquant_vllm.scheme.calibration.choice import NONE
from xquant_vllm.scheme.settings import CONFIG_KEY

# Prompt tokens that are computed in one step; longer windows take several. It bounds the memory of activations, and
# changes no logits: attention reads every token back from the pages, fresh or not.
_STEP_TOKENS = 512


@dataclass(frozen=True)
class EngineRequest:
    """The engine to start.

    Attributes:
        model: a checkpoint's folder.
        settings: the xquant settings; None for vLLM's own cache of keys and values.
        dtype: as in ``--dtype``.
        longest: tokens of the longest window.
    """

    model: str
    settings: Mapping[str, Any] | None
    dtype: str
    longest: int


class EvaluationEngine:
    """vLLM, eager, one window at a time through real pages.

    No prefix is shared between windows, so every token of a window is computed, written to a page and read back.
    """

    def __init__(self, request: EngineRequest) -> None:
        """Start the engine; once per process, because vLLM keeps much of its state per process.

        Raises:
            Exception: whatever vLLM refuses, in its own words.
        """
        # In this process, so that the model can be reached.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options: dict[str, Any] = {}
        if request.settings is not None:
            # Nothing is gained by a pool of hot blocks, and results stay comparable to the last bit.
            # What is to be calibrated was, and lies in the folder.
            settings = {**request.settings, "hot": 0, "calibration": NONE}
            options = {"attention_backend": "xquant", "additional_config": {CONFIG_KEY: settings}}
        self._llm = LLM(
            request.model,
            dtype=request.dtype,
            # One token more than the window, which vLLM insists on sampling.
            max_model_len=request.longest + 1,
            max_num_batched_tokens=min(request.longest + 1, _STEP_TOKENS),
            max_num_seqs=1,
            kv_cache_memory_bytes=_cache_bytes(request),
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )
        self._steps: list[torch.Tensor] = []
        self._llm.apply_model(self._watch)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in all layers' pages as vLLM allocates them; plain keys and values count with 16 bit."""
        (specs,) = self._llm.llm_engine.model_executor.get_kv_cache_specs()
        return sum(spec.unpadded_page_size_bytes // spec.block_size // _excess(spec) for spec in specs.values())

    def hidden_states(self, window: Sequence[int]) -> torch.Tensor:
        """What enters the language model head.

        Args:
            window: token ids, at most ``longest``.

        Returns:
            ``[tokens, hidden_size]`` in the model's dtype.

        Raises:
            RuntimeError: the model was not called in the way that is expected of it.
        """
        from vllm import SamplingParams

        self._steps.clear()
        sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self._llm.generate([{"prompt_token_ids": list(window)}], sampling, use_tqdm=False)
        seen = sum(step.shape[0] for step in self._steps)
        if seen != len(window):
            raise RuntimeError(f"xquant: of a window of {len(window)} tokens the model's forward was seen for {seen}")
        return torch.cat(self._steps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's head makes of hidden states.

        Args:
            hidden: ``[num_tokens, hidden_size]`` in the model's dtype, from any engine of the same model.

        Returns:
            ``[num_tokens, vocabulary]``, FP32.
        """
        (logits,) = self._llm.apply_model(
            lambda model: model.compute_logits(hidden.to(next(model.parameters()).device))
        )
        return logits.float()

    def _watch(self, model: torch.nn.Module) -> None:
        model.register_forward_hook(lambda _module, _inputs, output: self._steps.append(output.clone()))


def _excess(spec: Any) -> int:
    """How many times as large as with 16 bit a layer's pages are: an engine in FP32 keeps keys and values in FP32."""
    return 2 if spec.dtype == torch.float32 else 1


def _cache_bytes(request: EngineRequest) -> int:
    """Room for one window of keys and values in FP32, which no page format exceeds, and for a few blocks to spare."""
    from vllm.transformers_utils.config import get_config

    config = get_config(request.model, trust_remote_code=False).get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Layers of several kinds have block tables of their own, which share the memory.
    return 2 * (request.longest + 1024) * config.num_hidden_layers * 2 * kv_heads * head_size * 4
