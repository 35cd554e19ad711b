"""What the norm of a model's keys computes: told from its weights, and from what it makes of numbers.

There are as many classes of norms as there are models. Instead of going by their names, what one computes is compared
with what an RMS norm or a LayerNorm with its weights would, for inputs of ordinary size and for such that eps decides.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    model_parallel_is_initialized,
    tensor_model_parallel_all_reduce,
)

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.norms.modules import NormModule
from xquant_vllm.projection.key_norm import KeyNorm, normalize

# Relative differences of outputs, by the weights' dtype: roundings.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def read_norm(who: str, norm: NormModule, num_kv_heads: int, head_size: int, *, has_bias: bool) -> KeyNorm:
    """Read the norm of an attention module's keys.

    Args:
        who: the module, for errors.
        norm: its norm; the weights are loaded.
        num_kv_heads: kv heads on this rank.
        head_size: channels of a head.
        has_bias: whether keys have a bias.

    Raises:
        UnsupportedError: it computes something else than an RMS norm or a LayerNorm of every head, or an RMS norm of
            all heads together.
    """
    ranks = get_tensor_model_parallel_world_size() if model_parallel_is_initialized() else 1
    weight, eps = norm.weight, _eps_of(norm)
    shapes = [(head_size,), (num_kv_heads, head_size), (num_kv_heads * ranks * head_size,)]
    bias = getattr(norm.module, "bias", None)
    found = None
    if weight is not None and tuple(weight.shape) not in shapes:
        problem = f"which do not belong to {num_kv_heads * ranks} heads of {head_size} channels"
    elif isinstance(bias, torch.Tensor) and bool(bias.count_nonzero()):
        problem = "and adds a bias to what is normalized"
    elif eps is None:
        problem = "and an eps that is not known"
    else:
        problem = "which is neither an RMS norm nor a LayerNorm"
        candidates = _candidates(weight, eps, head_size)
        # What is no number equals nothing; it is refused later, by name.
        finite = weight is None or bool(torch.isfinite(weight).all())
        found = next((one for one in candidates if not finite or _computes(norm, one)), None)
    if found is not None and found.channels is not None and has_bias:
        problem, found = "over all heads together, after a bias was added, which latents do not have", None
    if found is None:
        raise unsupported_model(
            f"{who} normalizes its keys by {type(norm.module).__name__} with weights "
            f"{[] if weight is None else list(weight.shape)} {problem}; supported are an RMS norm or a LayerNorm of "
            f"every head, and an RMS norm of all heads together"
        )
    return _of_rank(found, num_kv_heads, ranks)


def _eps_of(norm: NormModule) -> float | None:
    values = [getattr(norm.module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _candidates(weight: torch.Tensor | None, eps: float, head_size: int) -> Iterator[KeyNorm]:
    """What a norm may be, with all weights that the module has, ``[heads, head_size]``."""
    if weight is None:
        weight = torch.ones(head_size, dtype=torch.float32, device="cpu")
        yield KeyNorm(weight.unsqueeze(0), eps)
        yield KeyNorm(weight.unsqueeze(0), eps, centered=True)
        return
    heads = weight.float().reshape(-1, head_size)
    for factor in (heads, heads + 1.0):
        if weight.dim() == 1 and len(heads) > 1:
            yield KeyNorm(factor, eps, channels=weight.numel())
        else:
            yield KeyNorm(factor, eps)
            yield KeyNorm(factor, eps, centered=True)


def _computes(norm: NormModule, candidate: KeyNorm) -> bool:
    """Whether a module yields what a candidate would, for one token of every size."""
    dtype, own = norm.dtype, norm.weight
    small = max(candidate.eps**0.5, 16 * torch.finfo(dtype).tiny)
    sizes = torch.tensor([1.0, 30.0, small, 3 * small], dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(len(sizes), *candidate.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    # Not around zero, so that a mean matters.
    x = ((x + 1.5) * sizes.view(-1, 1, 1)).to(norm.device, dtype)
    try:
        result = norm.run(x.reshape(-1, *(candidate.weight.shape[1:] if own is None else own.shape)))
        actual = (result[0] if isinstance(result, tuple) else result).float().reshape(x.shape)
    except Exception:  # whatever a model's code may raise: it is not this norm
        return False
    expected = normalize(x.float(), replace(candidate, weight=candidate.weight.to(norm.device)))
    error = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    return bool((error <= _TOLERANCE.get(dtype, 0.0)).all())


def _of_rank(norm: KeyNorm, num_kv_heads: int, ranks: int) -> KeyNorm:
    """This rank's part of a norm that has the weights of all ranks, or of every head the same."""
    if norm.channels is None:
        return replace(norm, weight=norm.weight.expand(num_kv_heads, -1).contiguous())
    if ranks == 1:
        return norm
    first = get_tensor_model_parallel_rank() * num_kv_heads
    weight = norm.weight[first : first + num_kv_heads].contiguous()
    return replace(norm, weight=weight, sum_over_ranks=tensor_model_parallel_all_reduce)
