"""Bits of channels, and the bytes that layers take, are those that a server would store."""

import pytest

from tests.factorizing import factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.diagnosis.factors.described import channel_bits, describe_factors


def test_bits_of_uniform_channels():
    assert channel_bits(StreamFormat(2, 16, 4, 8, outlier_channels=1)) == [16.0] + [4.0] * 15
    assert channel_bits(StreamFormat(1, 8, 16, 8)) == [16.0] * 8


def test_bits_of_allocated_channels_are_means_over_heads():
    stream = AllocatedFormat(16, (((8, 4), (2, 8)), ((4, 4),)))
    assert channel_bits(stream) == [6.0] * 4 + [1.0] * 8 + [0.0] * 4


@pytest.mark.parametrize(("family", "holds"), [("llama", "latents"), ("mha", "x"), ("mqa", "latents")])
def test_data_free_factors_as_they_would_be_served(tmp_path, family, holds):
    assert factorize(save_tiny_model(tmp_path / "model", family), tmp_path / "out", "--bits", 4, 2) == 0
    facts = describe_factors(tmp_path / "out")
    if holds == "x":  # bits of their own for keys and values are those of latents
        holds = "latents"
    assert {layer["holds"] for layer in facts["layers"]} == {holds}
    assert facts["bits"] == {"key": 4, "value": 2}
    assert not facts["bits_built_in"]
    for layer in facts["layers"]:
        assert [stream["of"] for stream in layer["streams"]] == ["keys", "values"]
        assert layer["bytes_per_token"] == sum(stream["bytes_per_token"] for stream in layer["streams"])


def test_a_model_whose_input_is_cached_needs_no_factors(tmp_path):
    assert factorize(save_tiny_model(tmp_path / "model", "mha"), tmp_path / "out") == 0
    (stream,) = describe_factors(tmp_path / "out")["layers"][0]["streams"]
    assert (stream["of"], stream["heads"], len(stream["bits"])) == ("layer input", 1, 128)
