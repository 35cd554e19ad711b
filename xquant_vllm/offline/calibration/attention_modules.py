"""The attention modules of a transformers model."""

from typing import Any

from torch import nn

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.checkpoint import Checkpoint


def norm_eps(norm: Any) -> float:
    """What a norm of a transformers model adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def attention_modules(model: nn.Module, checkpoint: Checkpoint) -> list[Any]:
    """The attention modules by layer: they have ``k_proj`` and ``v_proj``, or a fused ``qkv_proj``.

    Raises:
        RefusedError: there is not one for every layer.
    """
    modules = {}
    for name, module in model.named_modules():
        if name.endswith(".self_attn") and (hasattr(module, "k_proj") or hasattr(module, "qkv_proj")):
            modules[int(name.split(".")[-2])] = module
    if sorted(modules) != list(range(checkpoint.layers)):
        raise RefusedError(
            f"xquant: {checkpoint.architecture} cannot be run here: {counted(len(modules), 'attention module')} "
            f"recognized in {counted(checkpoint.layers, 'layer')}; serve the checkpoint itself, with "
            "bases from the weights alone"
        )
    return [modules[layer] for layer in range(checkpoint.layers)]


def decoder_layers(model: nn.Module, modules: list[Any]) -> list[nn.Module]:
    """The layers that attention modules are parts of."""
    names = {id(module): name for name, module in model.named_modules()}
    return [model.get_submodule(names[id(module)].rpartition(".")[0]) for module in modules]
