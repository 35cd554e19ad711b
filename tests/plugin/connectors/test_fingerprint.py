"""The fingerprint: everything that decides on what a page says."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.connectors import fingerprint
from xquant_vllm.plugin.connectors.fingerprint import fingerprint_of, fingerprint_parts, note_weights
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_scheme import LayerScheme
from xquant_vllm.scheme.settings import parse_settings


class Config(SimpleNamespace):
    """Can be weakly referenced, as vLLM's can."""


def engine(*, xquant=None, weight=None, up=None, connector="XQuantConnector", **model):
    """A configuration of a loaded engine with one layer."""
    settings = {"bits": 4, "cache": "latent", **(xquant or {})}
    form = layer_formats(parse_settings(settings), [LayerShape(0, 64, 2, 32)])[0]
    ups = torch.arange(2 * 32 * 32, dtype=torch.float32).view(2, 32, 32) if up is None else up
    scheme = LayerScheme(form, LayerProjection(ups, None))
    hf_config = {"rope_theta": 1e4, "_name_or_path": "here", "transformers_version": "5", **model}
    config = Config(
        additional_config={"xquant": settings},
        kv_transfer_config=SimpleNamespace(kv_connector=connector),
        compilation_config=SimpleNamespace(
            static_forward_context={
                "layer": SimpleNamespace(impl=SimpleNamespace(scheme=scheme)),
                "of another backend": SimpleNamespace(impl=SimpleNamespace()),
            }
        ),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: hf_config), dtype=torch.bfloat16, quantization=None
        ),
        parallel_config=SimpleNamespace(rank=0, world_size=1),
    )
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(16).view(4, 4) if weight is None else weight)
        linear.bias.zero_()
    linear.register_buffer("table", torch.ones(3))
    note_weights(config, linear)
    return config


def of(config, pages=((16, None, []),)):
    return fingerprint_of(fingerprint_parts(config, pages))


def changed(tensor, place):
    """One bit of one number."""
    bits = tensor.clone()
    bits.view(-1)[place] = torch.nextafter(bits.view(-1)[place], torch.tensor(1e4, dtype=bits.dtype))
    return bits


WEIGHT = torch.arange(16, dtype=torch.bfloat16).view(4, 4)
UP = torch.arange(2 * 32 * 32, dtype=torch.float32).view(2, 32, 32)


def test_engines_that_are_alike_have_the_same():
    assert of(engine()) == of(engine())
    assert len(of(engine())) == 16
    elsewhere = engine(_name_or_path="there", transformers_version="6", xquant={"hot": "10%", "factor_cache": False})
    assert of(elsewhere) == of(engine())


@pytest.mark.parametrize(
    "other",
    [
        {"weight": changed(WEIGHT, 7)},
        {"up": changed(UP, 5)},
        {"xquant": {"bits": 3}},
        {"xquant": {"outlier_channels": 0}},
        {"xquant": {"prompt": "exact"}},
        {"rope_theta": 1e6},
    ],
)
def test_whatever_differs_makes_another(other):
    assert of(engine(**other)) != of(engine())


def test_ranks_and_pages_make_others():
    config = engine()
    first = of(config)
    assert of(config, [[32, None, []]]) != first
    config.parallel_config.rank = 1
    assert of(config) != first


def test_the_parts_say_what_differs():
    ours, theirs = (fingerprint_parts(config, []) for config in (engine(), engine(weight=changed(WEIGHT, 0))))
    assert [name for name in ours if ours[name] != theirs[name]] == ["weights"]


def test_weights_are_looked_at_only_for_this_connector():
    for connector in (None, "OffloadingConnector"):
        config = engine(connector=connector)
        assert fingerprint.loaded_weights(config).digest == ""
    config = engine()
    config.kv_transfer_config = None
    note_weights(config, nn.Linear(2, 2))


def test_an_engine_without_such_layers_is_refused():
    config = engine()
    config.compilation_config.static_forward_context.clear()
    with pytest.raises(UnsupportedError, match="no layer of this model has any; set --attention-backend xquant"):
        fingerprint_parts(config, [])
