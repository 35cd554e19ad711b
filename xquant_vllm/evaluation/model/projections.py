"""The key and value projections of an attention module: their weights, and hooks on what they yield."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration.attention_modules import norm_eps
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.projection.key_norm import KeyNorm

Rematerialize = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
ReadBack = Callable[[torch.Tensor], torch.Tensor]


class Projections:
    """Of one layer: ``k_proj`` and ``v_proj``, or the last rows of a fused ``qkv_proj``."""

    def __init__(self, checkpoint: Checkpoint, layer: int, module: Any) -> None:
        """Look at a module.

        Args:
            checkpoint: its model.
            layer: which layer it is.
            module: the attention module.
        """
        self.layer, self.module = layer, module
        self._heads, self._head_size = checkpoint.kv_heads, checkpoint.head_size
        self._rows = checkpoint.kv_heads * checkpoint.head_size
        self._fused: Any = getattr(module, "qkv_proj", None)
        self._joint_norm: Any = module.k_norm if checkpoint.keys_normed_together(layer) else None

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of keys and of values, ``[num_kv_heads * head_size, hidden_size]``, in the model's dtype."""
        if self._fused is not None:
            return self._last_rows(self._fused.weight.data)
        return self.module.k_proj.weight.data, self.module.v_proj.weight.data

    @property
    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of keys and of values, ``[num_kv_heads, head_size]``, FP32; None without."""
        if self._fused is not None:
            both: Any = (None, None) if self._fused.bias is None else self._last_rows(self._fused.bias.data)
        else:
            both = (self.module.k_proj.bias, self.module.v_proj.bias)
        key, value = (None if bias is None else bias.data.float().view(self._heads, self._head_size) for bias in both)
        return key, value

    @property
    def key_norm(self) -> KeyNorm | None:
        """The norm over all key heads together; None without one."""
        norm = self._joint_norm
        if norm is None:
            return None
        weight = norm.weight.data.float().view(self._heads, self._head_size)
        return KeyNorm(weight, norm_eps(norm), channels=weight.numel())

    def hook_input(self, hooks: ExitStack, rematerialize: Rematerialize, *, keys_are_normed: bool) -> None:
        """Replace what the projections yield by something made of what enters them.

        Args:
            hooks: removes the hooks.
            rematerialize: given the layer and its input, yields keys and values.
            keys_are_normed: whether the keys are those behind a norm over all heads, if there is one.
        """
        norm = self._joint_norm if keys_are_normed else None
        waiting: dict[str, torch.Tensor] = {}

        def yields(name: str) -> Any:
            def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                # Whichever projection runs first reads the cache for both.
                if name not in waiting:
                    waiting["key"], waiting["value"] = rematerialize(self.layer, inputs[0][0])
                if name == "key" and norm is not None:
                    return output
                return waiting.pop(name).to(output.dtype).reshape(output.shape)

            return hook

        def normed(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return waiting.pop("key").to(output.dtype).reshape(output.shape)

        def fused(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            key, value = rematerialize(self.layer, inputs[0][0])
            if norm is not None:
                waiting["key"] = key
            return self._with_last(output, key, value)

        if norm is not None:
            hooks.enter_context(_hook(norm, normed))
        if self._fused is not None:
            hooks.enter_context(_hook(self._fused, fused))
        else:
            hooks.enter_context(_hook(self.module.k_proj, yields("key")))
            hooks.enter_context(_hook(self.module.v_proj, yields("value")))

    def hook_projected(self, hooks: ExitStack, keys: ReadBack, values: ReadBack) -> None:
        """Replace keys before RoPE, and values, by what is read back of them ``[num_tokens, heads * head_size]``."""
        norm = getattr(self.module, "k_norm", None)

        def after_norm(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return self._read_heads(output, keys)

        def flat(read: ReadBack) -> Any:
            return lambda _, __, output: read(output[0].float()).to(output.dtype).unsqueeze(0)

        def fused(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            key, value = self._last_rows(output[0].T)
            return self._with_last(output, key.T if norm else keys(key.T.float()), values(value.T.float()))

        if norm is not None:
            hooks.enter_context(_hook(norm, after_norm))
        if self._fused is not None:
            hooks.enter_context(_hook(self._fused, fused))
            return
        if norm is None:
            hooks.enter_context(_hook(self.module.k_proj, flat(keys)))
        hooks.enter_context(_hook(self.module.v_proj, flat(values)))

    def _read_heads(self, output: torch.Tensor, read: ReadBack) -> torch.Tensor:
        """Read back what a norm yields: ``[1, tokens, heads, size]``, ``[1, heads, tokens, size]`` or flat."""
        heads = output[0].float()
        if heads.shape[:2] == (self._heads, self._heads):
            raise RefusedError(
                f"xquant: --window {self._heads} is also the number of kv heads, so that keys could not be told from "
                "tokens; set another"
            )
        heads_first = heads.dim() == 3 and heads.shape[1] != self._heads
        if heads_first:
            heads = heads.transpose(0, 1)
        result = read(heads.reshape(heads.shape[0], -1)).reshape(heads.shape)
        return (result.transpose(0, 1) if heads_first else result).to(output.dtype).unsqueeze(0)

    def _last_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key rows and value rows of the fused projection."""
        return rows[-2 * self._rows : -self._rows], rows[-self._rows :]

    def _with_last(self, output: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The fused projection's output with other keys and values."""
        queries = output[..., : -2 * self._rows]
        return torch.cat((queries, torch.cat((key, value), -1).to(output.dtype).unsqueeze(0)), -1)


def _hook(module: nn.Module, hook: Any) -> Any:
    """Hook a module's forward; the handle, a context, takes the hook away."""
    return module.register_forward_hook(hook)
