"""Up-projections before their fit: keys and values of exact latents are the model's own again."""

import pytest
import torch

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.methods import prepare_method
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.scheme.builder import SchemeBuilder
from xquant_vllm.scheme.unfitted import unfitted

TOKENS = 20


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Of every layer of a tiny model: scheme, down-projections, weights."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    layers = []
    build = SchemeBuilder.build

    def kept(self, position, parameters):
        scheme, down = build(self, position, parameters)
        layers.append((scheme, down, parameters))
        return scheme, down

    monkeypatch.setattr(SchemeBuilder, "build", kept)

    def built(family, method, **options):
        checkpoint = open_checkpoint(save_tiny_model(tmp_path / "model", family))
        prepared = prepare_method(method, MethodOptions(**options), checkpoint, torch.float32, 64)
        prepared.build(HookedModel(checkpoint, torch.float32, torch.device("cpu")))
        return layers

    return built


def difference(scheme, down, parameters):
    """Of keys and values before bias, norm and RoPE; whatever earlier layers of a chain have stored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, down.shape[1], generator=generator)
    projection = scheme.projection
    heads, _, size = projection.up_key.shape
    if scheme.format.holds == "latents":
        latents = (hidden @ down.T).unflatten(1, (2, heads, size)).permute(1, 2, 0, 3)
    else:
        width = scheme.format.streams[0].width
        earlier = torch.randn(TOKENS, projection.up_key.shape[1] - width, generator=generator)
        own = hidden @ down[:width].T
        if scheme.prediction_matrix is not None:
            own -= earlier @ scheme.prediction_matrix[0]
        latents = torch.cat((earlier, own), 1).expand(2, heads, -1, -1)
    worst = 0.0
    for up, of, weight in zip(
        (projection.up_key, projection.up_value), latents, (parameters.key, parameters.value), strict=True
    ):
        expected = (hidden @ weight.float().T).unflatten(1, (heads, size)).transpose(0, 1)
        worst = max(worst, ((of @ up - expected).norm() / expected.norm()).item())
    return worst


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "xquant", {"basis": "head"}),
        ("llama", "xquant", {"basis": "joint"}),
        ("mha", "xquant", {}),
        ("llama", "xquant-cl", {}),
    ],
)
def test_keys_and_values_are_the_models_own(built, family, method, options):
    layers = built(family, method, bits=(2,), calibration="python-docs", calibration_tokens=256, **options)
    fitted = []
    for scheme, down, parameters in layers:
        exact = unfitted(scheme, down, parameters)
        # Keys of latents per head have integers for up-projections, which are fitted, too.
        assert difference(exact, down, parameters) < 2e-4
        fitted.append(difference(scheme, down, parameters))
    assert max(fitted) > 1e-3


@pytest.mark.parametrize(("family", "settings"), [("llama", {"cache": "latent"}), ("mha", {})])
def test_what_is_not_calibrated_is_as_it_was(built, family, settings):
    for scheme, down, parameters in built(family, "xquant", bits=(4,), calibration="none", settings=settings):
        assert unfitted(scheme, down, parameters) is scheme
