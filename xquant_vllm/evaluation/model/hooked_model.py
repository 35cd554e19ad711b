"""A transformers model whose attention reads keys and values back from a cache method, and is otherwise its own.

Only key and value tensors are replaced: projections, norms, RoPE, masks, windows, caps and sinks are the model's.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from xquant_vllm.evaluation.model.cache_method import AttendedMethod, CacheMethod, InputMethod, ProjectedMethod
from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.evaluation.model.projections import Projections
from xquant_vllm.offline.calibration.attention_modules import attention_modules
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.split_run import SplitRun

_ATTENTION = "xquant_evaluation"
_READER = "xquant_reader"
# Logits of a window that are all in memory: 1 GB in FP32.
_AT_ONCE = 1 << 28
# Queries that are attended together. Of a long window most of them see a part of the keys: those before, or near.
_QUERIES = 1024


class HookedModel:
    """A model on which cache methods are tried out."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Load the model.

        Args:
            checkpoint: the checkpoint.
            dtype: of the weights and the computation.
            device: where to run.

        Raises:
            RefusedError: transformers cannot run the model, or its attention is not recognized.
        """
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, _mask)
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=dtype, attn_implementation=_ATTENTION
            )
        except Exception as error:  # whatever a model's own code raises
            raise checkpoint.cannot_run(error) from None
        self._model = model.to(device).eval()
        self.layers = [
            Projections(checkpoint, layer, module)
            for layer, module in enumerate(attention_modules(self._model, checkpoint))
        ]

    def logits(self, tokens: torch.Tensor, method: CacheMethod, last: int | None = None) -> torch.Tensor:
        """Run a sequence by itself.

        Args:
            tokens: ``[num_tokens]``, int64.
            method: what is cached.
            last: of how many positions to return logits, counted from the end; None for all.

        Returns:
            ``[num_positions, vocabulary]`` in the model's dtype, on its device.
        """
        with torch.no_grad(), self._hooked(method):
            method.start(len(tokens))
            batch = tokens.to(self.device).unsqueeze(0)
            result: torch.Tensor = self._model(input_ids=batch, use_cache=False, logits_to_keep=last or 0).logits[0]
        return result

    def rows(self, tokens: torch.Tensor, method: CacheMethod) -> Rows:
        """The same of all positions, where they would take much memory computed only as they are asked for.

        Args:
            tokens: ``[num_tokens]``, int64.
            method: what is cached.
        """
        if len(tokens) * self._model.config.get_text_config().vocab_size <= _AT_ONCE:
            return self.logits(tokens, method)
        with torch.no_grad(), self._hooked(method):
            method.start(len(tokens))
            run = SplitRun(self._model, tokens.to(self.device))
        if run.hidden is None:
            assert run.whole is not None
            return run.whole
        return _HeldRows(run, run.hidden)

    @contextmanager
    def _hooked(self, method: CacheMethod) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in self.layers:
                if isinstance(method, InputMethod):
                    layer.hook_input(hooks, method.rematerialize, keys_are_normed=method.keys_are_normed)
                elif isinstance(method, ProjectedMethod):
                    layer.hook_projected(hooks, method.keys, method.values)
                elif isinstance(method, AttendedMethod):
                    setattr(layer.module, _READER, method)
                    hooks.callback(delattr, layer.module, _READER)
            yield


class _HeldRows:
    """Logits of which only what they are made of is in memory."""

    def __init__(self, run: SplitRun, hidden: torch.Tensor) -> None:
        self._run, self._hidden, self.device = run, hidden, hidden.device

    def __getitem__(self, positions: slice, /) -> torch.Tensor:
        with torch.no_grad():
            return self._run.logits(self._hidden[:, positions])


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """A mask in any case: where keys come in versions, ``is_causal`` cannot say what is seen."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Any:
    """The model's attention over what is read back. Heads are ``[1, heads, num_tokens, head_size]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    method = getattr(module, _READER, None)
    if method is not None:
        versions = method.read(key[0].transpose(0, 1).float(), value[0].transpose(0, 1).float())
        # Versions lie side by side, as if there were more tokens; a query sees each token in one of them.
        key, value = (
            torch.cat([heads.transpose(0, 1) for heads in side], 1).unsqueeze(0).to(query.dtype)
            for side in ([v.keys for v in versions], [v.values for v in versions])
        )
        mask = torch.cat([mask if v.seen is None else mask & v.seen for v in versions], -1)
    if options.get("softcap") is None and options.get("s_aux") is None:
        if options.get("position_bias") is not None or query.shape[2] <= _QUERIES:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        blocks = []
        for some, seen_by in zip(query.split(_QUERIES, 2), mask.split(_QUERIES, 2), strict=True):
            seen = seen_by.flatten(0, -2).any(0)
            keys, values = key[:, :, seen], value[:, :, seen]
            blocks.append(sdpa_attention_forward(module, some, keys, values, seen_by[..., seen], **options)[0])
        return torch.cat(blocks, 1), None
    # Caps and sinks are what PyTorch's attention does not do, and the model's own file does.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, added, **options)
