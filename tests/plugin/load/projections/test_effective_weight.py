"""What a linear layer really multiplies by, whichever way it hands out its bias."""

from types import SimpleNamespace

import pytest
import torch

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.modules import DenseLinear, whole_output
from xquant_vllm.plugin.load.projections.effective_weight import effective_linear

CONVENTIONS = [
    SimpleNamespace(return_bias=pair, skip_bias_add=apart)
    for pair, apart in [(True, False), (True, True), (False, False)]
]


class Scaled(DenseLinear):
    """Keeps its weight in another form, like a quantized layer."""

    def forward(self, x):
        answer = super().forward(2 * x)
        return answer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_dense_layer_answers_like_the_probed_one(convention, bias):
    layer = Scaled(torch.randn(24, 300), torch.randn(24) if bias else None, like=convention)
    dense = effective_linear("x", layer)
    torch.testing.assert_close(dense.weight.data, 2 * layer.weight.data)
    x = torch.randn(3, 300)
    expected, actual = layer(x), dense(x)
    torch.testing.assert_close(whole_output(dense, x), whole_output(layer, x), atol=1e-4, rtol=1e-4)
    assert isinstance(actual, tuple) == isinstance(expected, tuple) == convention.return_bias
    if convention.return_bias:
        assert (actual[1] is None) == (expected[1] is None)
        torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)


class Overflowing(DenseLinear):
    """Adds up products two by two and cuts the sums off, as 8-bit products are on processors without VNNI."""

    def forward(self, x):
        products = x[:, None, :] * self.weight
        pairs = products.unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-self.most, self.most).sum(-1), None


@pytest.mark.parametrize("most", [2.0, 100.0])
def test_a_layer_that_is_not_linear_is_refused(most):
    layer = Overflowing(torch.randn(24, 300), None)
    layer.most = most
    if most == 100:
        torch.testing.assert_close(effective_linear("x", layer).weight.data, layer.weight.data)
        return
    with pytest.raises(
        UnsupportedError, match=r"the quantized layer\.qkv is not linear: .* projections are not quantized"
    ):
        effective_linear("layer.qkv", layer)
