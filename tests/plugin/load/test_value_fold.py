"""Folding the up-projection of values into o_proj, on modules with vLLM's own output projection."""

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

from tests.plugin.load.test_surgery import Plain, operate, parts_of
from tests.plugin.load.trace.layouts import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, Q_SIZE, Grouped, linear
from xquant_vllm.plugin.load.capture import module_output
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.probe import make_probe
from xquant_vllm.plugin.load.projections.rows import dense_stand_in, dense_stand_ins
from xquant_vllm.plugin.load.value_fold import fold, output_projection
from xquant_vllm.projection.rematerialize import rematerialize_values
from xquant_vllm.scheme.layer_scheme import LayerScheme

SETTINGS = {"cache": "latent"}


pytestmark = pytest.mark.usefixtures("one_rank")


class WithOutput(Plain):
    """Projects what its attention returns."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, bias: bool = False) -> None:
        super().__init__()
        self.qkv_proj = DenseLinear(self.qkv_proj.weight.data.to(dtype), None)
        self.o_proj = RowParallelLinear(Q_SIZE, HIDDEN, bias, params_dtype=dtype, disable_tp=True)
        for parameter in self.o_proj.parameters():
            parameter.data.normal_()

    def forward(self, positions, hidden_states):
        output, _ = self.o_proj(self.attn(*self.split(hidden_states)))
        return output


class Gates(WithOutput):
    """Multiplies attention outputs by a gate."""

    def forward(self, positions, hidden_states):
        gate = hidden_states.sum(-1, keepdim=True).sigmoid() * torch.linspace(0.5, 2, Q_SIZE)
        output, _ = self.o_proj(gate * self.attn(*self.split(hidden_states)))
        return output


class AddsItsValues(WithOutput):
    """Uses values besides attention."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        attended = self.attn(query, key, value)
        output, _ = self.o_proj(attended + value.repeat_interleave(HEADS // KV_HEADS, 1))
        return output


class ReturnsTwo(WithOutput):
    """Returns nothing besides its output."""

    def forward(self, positions, hidden_states):
        return super().forward(positions, hidden_states), None


class ReturnsItsBias(WithOutput):
    """Leaves the bias of its output to others (Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = RowParallelLinear(
            Q_SIZE, HIDDEN, True, skip_bias_add=True, params_dtype=torch.float32, disable_tp=True
        )
        for parameter in self.o_proj.parameters():
            parameter.data.normal_()

    def forward(self, positions, hidden_states):
        return self.o_proj(self.attn(*self.split(hidden_states)))


class ReturnsItsValues(WithOutput):
    """Returns values, too."""

    def forward(self, positions, hidden_states):
        return super().forward(positions, hidden_states), self.split(hidden_states)[2]


class OtherOutput(Grouped):
    """Other names, and groups of heads; a second output projection is not called, another is of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = linear(self.mixer.output_size)
        self.mixer.bias = None
        self.gate = RowParallelLinear(HIDDEN, HIDDEN, False, params_dtype=torch.float32, disable_tp=True)
        self.dense = ReplicatedLinear(
            Q_SIZE, HIDDEN, False, params_dtype=torch.float32, return_bias=False, disable_tp=True
        )
        self.unused = RowParallelLinear(Q_SIZE, HIDDEN, False, params_dtype=torch.float32, disable_tp=True)
        for layer in (self.gate, self.dense, self.unused):
            layer.weight.data.normal_()

    def forward(self, positions, hidden_states):
        output = self.dense(self.kernel(*self.split(hidden_states)))
        return output + self.gate(output)[0]


class WholeLayer(WithOutput):
    """Takes a residual, like a decoder layer that owns its attention."""

    def forward(self, positions, hidden_states, residual):
        return super().forward(positions, hidden_states)


class WithTwo(WithOutput):
    """Has two output projections."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj_2 = RowParallelLinear(Q_SIZE, HIDDEN, False, params_dtype=torch.float32, disable_tp=True)
        self.o_proj_2.weight.data.normal_()

    def forward(self, positions, hidden_states):
        attended = self.attn(*self.split(hidden_states))
        return self.o_proj(attended)[0] + self.o_proj_2(attended)[0]


def answer(module: WithOutput, attended: torch.Tensor) -> torch.Tensor:
    """The module's output for an output of its attention."""
    hidden = torch.ones(attended.shape[0], HIDDEN).to(attended)
    stand_in = {"o_proj": dense_stand_in(module.o_proj)}  # which runs before vLLM has processed it
    return module_output(module, "attn", hidden, torch.arange(len(hidden)), attended, stand_in)


def folded(cache: LayerScheme) -> bool:
    return cache.projection.up_value is None


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_module_takes_latents_for_values(dtype, allowed, bias):
    module = WithOutput(dtype, bias=bias)
    plain, before = WithOutput(dtype, bias=bias), module.qkv_proj.weight.data.clone()
    plain.load_state_dict(module.state_dict())
    unfolded = operate(parts_of(plain), SETTINGS | {"fold_values": False}).projection
    cache = operate(parts_of(module), SETTINGS)
    assert folded(cache)
    assert unfolded.up_value is not None
    assert not torch.equal(module.qkv_proj.weight.data, before)
    latents = torch.randn(9, KV_HEADS, HEAD_SIZE)
    values, same = rematerialize_values(latents, unfolded), rematerialize_values(latents, cache.projection)
    assert torch.equal(same, latents)
    expected, actual = (
        answer(of, x.repeat_interleave(HEADS // KV_HEADS, 1).flatten(1).to(dtype)).float()
        for of, x in ((plain, values), (module, latents))
    )
    assert (actual - expected).norm() <= allowed * expected.norm()


def test_the_fold_is_rounded_once():
    weight, up = torch.randn(HIDDEN, Q_SIZE).bfloat16(), torch.randn(KV_HEADS, HEAD_SIZE, HEAD_SIZE)
    actual = fold(weight, up)
    for head in range(HEADS):
        columns = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        exact = weight[:, columns].double() @ up[head // (HEADS // KV_HEADS)].double().T
        assert torch.equal(actual[:, columns], exact.bfloat16())


@pytest.mark.parametrize("kind", [ReturnsTwo, ReturnsItsBias, OtherOutput])
def test_the_output_projection_is_found_whatever_its_name(kind):
    module = kind()
    weights = {name: x.clone() for name, x in module.state_dict().items()}
    assert folded(operate(parts_of(module), SETTINGS))
    changed = {name for name, x in module.state_dict().items() if not torch.equal(x, weights[name])}
    assert changed == (
        {"mixer.weight", "dense.weight"} if kind is OtherOutput else {"qkv_proj.weight", "o_proj.weight"}
    )


@pytest.mark.parametrize("kind", [Gates, AddsItsValues, ReturnsItsValues, WholeLayer, WithTwo, Plain])
def test_a_module_that_does_more_with_its_values_is_not_folded(kind):
    module = kind()
    weights = {name: x.clone() for name, x in module.state_dict().items() if name.startswith("o_proj")}
    assert not folded(operate(parts_of(module), SETTINGS))
    for name, weight in weights.items():
        assert torch.equal(
            module.state_dict()[name],
            weight,
        ), name


@pytest.mark.parametrize("settings", [{"cache": "x"}, {"basis": "joint"}, {"method": "xquant-cl"}])
def test_only_square_up_projections_are_folded(settings):
    module = WithOutput()
    weight = module.o_proj.weight.data.clone()
    assert not folded(operate(parts_of(module), SETTINGS | settings))
    assert torch.equal(module.o_proj.weight.data, weight)


def test_values_with_a_bias_are_not_folded():
    module = WithOutput()
    module.qkv_proj.bias = nn.Parameter(torch.randn(module.qkv_proj.weight.shape[0]), requires_grad=False)
    assert not folded(operate(parts_of(module), SETTINGS))


def test_output_projections_that_cannot_be_exchanged():
    """Quantized, packed, gathering its input, or a subclass."""
    module = WithOutput()
    parts, o_proj = parts_of(module), module.o_proj

    def found():
        probe = make_probe(parts, HIDDEN, torch.empty(0))
        return output_projection(parts, probe, dense_stand_ins(parts.linears))

    assert found() == "o_proj"
    o_proj.input_is_parallel, o_proj.tp_size = False, 2
    assert found() is None
    o_proj.input_is_parallel = True
    method, o_proj.quant_method = o_proj.quant_method, object()
    assert found() is None
    o_proj.quant_method = method
    assert found() == "o_proj"
    o_proj.weight = nn.Parameter(torch.zeros(HIDDEN, Q_SIZE, dtype=torch.int8), requires_grad=False)
    assert found() is None
    del o_proj.weight
    assert found() is None
    module.o_proj = type("Own", (RowParallelLinear,), {})(Q_SIZE, HIDDEN, params_dtype=torch.float32, disable_tp=True)
    assert found() is None
