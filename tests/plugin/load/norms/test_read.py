"""Which norms are read, whatever their class, and that what looks like one but computes something else is not."""

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.models import commandr

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.norms.modules import KeyPassesThrough, NormModule
from xquant_vllm.plugin.load.norms.read import read_norm
from xquant_vllm.projection.key_norm import normalize

HEADS, HEAD_SIZE = 3, 16
EPS = 1e-3
CPU = torch.device("cpu")


class Weighted(nn.Module):
    """Some treatment of keys with weights."""

    def __init__(self, *shape: int, eps: float | None = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        if eps is not None:
            self.eps = eps


class OfItsOwn(nn.Module):
    """An RMS norm that a model brings along (Muse Glimmer), without weights or with such that are added to one."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.register_parameter("weight", None if size is None else nn.Parameter(torch.ones(size)))
        self.eps = EPS

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed if self.weight is None else normed * (1 + self.weight.float())).type_as(x)


class UnitLength(Weighted):
    def forward(self, x):
        return self.weight * x / (x.norm(dim=-1, keepdim=True) + self.eps)


class EpsBehindTheRoot(Weighted):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class OtherEps(Weighted):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps)


class NoEps(Weighted):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class HeadsOfItsOwn(Weighted):
    """Weights for all heads, but each is normalized by itself."""

    def forward(self, x):
        heads = x.unflatten(-1, (HEADS, HEAD_SIZE))
        return self.weight * (heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)


def vllm_norm(kind, *arguments, **options):
    with set_current_vllm_config(VllmConfig()):
        return kind(*arguments, eps=EPS, **options)


def filled(norm: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = (torch.rand(parameter.shape, generator=generator) + 0.5).to(dtype)
    return norm.requires_grad_(False)


def read(norm: nn.Module, has_bias: bool = False):
    return read_norm("Attention at layers.0", NormModule(norm, CPU), HEADS, HEAD_SIZE, has_bias=has_bias)


# Centered, over all heads together, and how the module likes its inputs.
OF_HEADS = (-1, HEAD_SIZE)
SERVED = {
    "RMS": (lambda: vllm_norm(RMSNorm, HEAD_SIZE), False, False, OF_HEADS),
    "Gemma": (lambda: vllm_norm(GemmaRMSNorm, HEAD_SIZE), False, False, OF_HEADS),
    "without weights": (lambda: vllm_norm(RMSNorm, HEAD_SIZE, has_weight=False), False, False, OF_HEADS),
    "a model's own, without weights": (lambda: OfItsOwn(None), False, False, OF_HEADS),
    "a model's own": (lambda: OfItsOwn(HEAD_SIZE), False, False, OF_HEADS),
    "all heads": (lambda: vllm_norm(RMSNorm, HEADS * HEAD_SIZE), False, True, (-1, HEADS * HEAD_SIZE)),
    "Gemma, all heads": (lambda: vllm_norm(GemmaRMSNorm, HEADS * HEAD_SIZE), False, True, (-1, HEADS * HEAD_SIZE)),
    "Command-R": (lambda: commandr.LayerNorm((HEADS, HEAD_SIZE), EPS), True, False, (-1, HEADS, HEAD_SIZE)),
    "Command-R, RMS": (lambda: commandr.RMSNorm((HEADS, HEAD_SIZE), EPS), False, False, (-1, HEADS, HEAD_SIZE)),
    "LayerNorm": (lambda: nn.LayerNorm(HEAD_SIZE, EPS, bias=False), True, False, OF_HEADS),
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_read_as_it_computes(name, dtype):
    make, centered, together, form = SERVED[name]
    norm = filled(make(), dtype)
    found = read(norm)
    assert (found.centered, found.channels is not None) == (centered, together)
    assert found.weight.shape == (HEADS, HEAD_SIZE)
    assert found.weight.dtype == torch.float32
    keys = torch.randn(5, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(1)) * 0.03
    keys = keys.to(dtype if found.weight.unique().numel() > 1 else torch.float32)
    with torch.compiler.set_stance("force_eager"):
        actual = norm(keys.reshape(form))
    actual = (actual[0] if isinstance(actual, tuple) else actual).reshape(keys.shape).float()
    error = (normalize(keys.float(), found) - actual).norm() / actual.norm()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[keys.dtype]


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (UnitLength(HEAD_SIZE), "UnitLength with weights \\[16\\] which is neither an RMS norm nor a LayerNorm"),
        (EpsBehindTheRoot(HEAD_SIZE), "neither"),
        (OtherEps(HEAD_SIZE), "neither"),
        (NoEps(HEAD_SIZE, eps=None), "an eps that is not known"),
        (HeadsOfItsOwn(HEADS * HEAD_SIZE), "neither"),
        (UnitLength(7), "\\[7\\] which do not belong to 3 heads of 16 channels"),
        (nn.LayerNorm(HEAD_SIZE, EPS), "adds a bias"),
        (nn.LayerNorm(HEADS * HEAD_SIZE, EPS, bias=False), "neither"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_computes_something_else_is_refused_by_name(norm, why):
    with pytest.raises(UnsupportedError, match=rf"Attention at layers\.0 normalizes its keys by .*{why}.*; supported "):
        read(filled(norm))


def test_a_norm_over_all_heads_behind_a_bias_is_refused():
    norm = filled(vllm_norm(RMSNorm, HEADS * HEAD_SIZE))
    with pytest.raises(UnsupportedError, match="over all heads together, after a bias was added"):
        read(norm, has_bias=True)


@pytest.mark.parametrize("name", SERVED)
def test_what_takes_its_place_returns_what_it_is_given_as_the_norm_would(name):
    norm, form = filled(SERVED[name][0]()), SERVED[name][3]
    passes = KeyPassesThrough(NormModule(norm, CPU), HEAD_SIZE)
    x = torch.randn(4, HEADS, HEAD_SIZE).reshape(form)
    with torch.compiler.set_stance("force_eager"):
        pair = isinstance(norm(x), tuple)
    assert isinstance(passes(x), tuple) == pair
    assert (passes(x)[0] if pair else passes(x)) is x
    assert pair == name.startswith("Command-R")
