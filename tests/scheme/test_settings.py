"""Settings: defaults, forms, and errors that name the setting, the value, why, and what to set."""

import pytest

from xquant_vllm.errors import SettingsError
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.hot_share import pool_bytes
from xquant_vllm.scheme.settings import PerStream, parse_settings

CHAIN = {"method": "xquant-cl"}


def test_defaults_are_four_bits_with_one_basis_per_head():
    settings = parse_settings(None)
    assert settings.bits == PerStream(key=4, value=4)
    assert settings.basis == "head"
    assert settings.rotate
    assert settings.outlier_channels == PerStream(key=1, value=0)
    assert settings.method == "xquant"
    assert settings.first_layers is None
    assert settings == parse_settings({})


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_one_number_of_bits_for_all(bits):
    assert parse_settings({"bits": bits}).bits == PerStream(key=bits, value=bits)


def test_bits_of_keys_and_values_and_of_first_layers():
    settings = parse_settings({"bits": {"key": 4, "value": 2}, "first_layers": 3, "first_layers_bits": 8})
    assert settings.bits_of_layer(2) == PerStream(key=8, value=8)
    assert settings.bits_of_layer(3) == PerStream(key=4, value=2)
    fallback = parse_settings({"bits": {"key": 8, "value": 2}, "first_layers": 1})
    assert fallback.bits_of_layer(0) == PerStream(key=8, value=4)


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"bits": 5}, ["'bits'", "5", "no page format has 5-bit codes", "set 8, 4, 3 or 2"]),
        ({"bits": {"key": 4}}, ["'bits.value'", "set 8, 4, 3 or 2"]),
        ({"bits": "four"}, ["bits", "'four'", "set 8, 4, 3 or 2"]),
        ({"bits": None}, ["bits", "None"]),
        (
            {"bits": {"key": 4, "values": 2, "value": 2}},
            ["'bits'", "unknown setting 'values'", "did you mean 'value'?"],
        ),
        ({"group_size": 12}, ["'group_size'", "12", "whole bytes", "set a multiple of 8"]),
        ({"group_size": -8}, ["'group_size'", "-8", "set a multiple of 8"]),
        ({"outlier_channels": -1}, ["'outlier_channels'", "-1", "set 0"]),
        ({"first_layers": -2}, ["'first_layers'", "-2", "set 0"]),
        ({"first_layers_bits": 4}, ["first_layers_bits", "first_layers is 0", "set first_layers"]),
        ({"method": "xquant-dl"}, ["'method'", "'xquant-dl'", 'set "xquant" or "xquant-cl"']),
        ({"cache": "kv"}, ["'cache'", "'kv'", 'set "x" or "latent"']),
        ({"anchor_interval": 8}, ["anchor_interval", "'xquant'", 'set method to "xquant-cl"']),
        ({"method": "xquant-cl", "anchor_interval": -1}, ["'anchor_interval'", "-1", "set 0"]),
        (
            {**CHAIN, "anchor_interval": 0, "anchor_bits": 4},
            ["anchor_bits", "anchor_interval is 0", "first_layers_bits"],
        ),
        ({"skip_layers": [-1]}, ["'skip_layers'", "[-1]", "counted from 0"]),
        ({"skip_layers": "all"}, ["'skip_layers'", "'all'", "set a list of layers"]),
        ({"rotate": "maybe"}, ["'rotate'", "'maybe'", "set true or false"]),
        ({"prompt": "fresh"}, ["'prompt'", "'fresh'", 'set "cached" or "exact"']),
        ({"hot": "much"}, ["'hot'", "'much'", "no amount of memory", '"2GiB"', '"20%"', "0 for none"]),
        ({"hot": True}, ["'hot'", "True", "no amount of memory"]),
        ({"hot": -1}, ["'hot'", "-1", "less than nothing"]),
        ({"hot": "100%"}, ["'hot'", "'100%'", "nothing would be left"]),
        ({"hot": 1.5}, ["'hot'", "1.5", "less than 1"]),
        ({"hot": [1]}, ["'hot'", "[1]", "no amount of memory"]),
        ({"quality_probe": 2}, ["'quality_probe'", "2", "it is a share", "such as 0.001", "0 for none"]),
        ({"quality_probe": "often"}, ["'quality_probe'", "'often'", "set a share of the calls of layers"]),
        ({"basis": "shared"}, ["'basis'", "'shared'", 'set "head" or "joint"']),
        ({"bit": 4}, ["unknown setting 'bit'", "did you mean 'bits'?", "known are method, bits, cache, group_size"]),
        ([4], ["[4]", "not a table of settings"]),
    ],
)
def test_errors_name_setting_value_reason_and_remedy(raw, parts):
    with pytest.raises(SettingsError) as error:
        parse_settings(raw)
    for part in parts:
        assert part in str(error.value)


def test_every_problem_is_named_at_once():
    with pytest.raises(SettingsError) as error:
        parse_settings({"bits": 7, "grup_size": 64, "basis": 3})
    assert len(str(error.value).splitlines()) == 3


def test_settings_come_from_the_configuration_alone(monkeypatch):
    monkeypatch.setenv("XQUANT_SETTINGS", '{"bits": 2}')
    assert parse_settings({"bits": 8, "rotate": False}).bits == PerStream(key=8, value=8)


@pytest.mark.parametrize(
    ("raw", "kv_heads", "head_size", "group_size", "bytes_per_token"),
    [
        # codes + (scale, zero) per group + outlier channel per key head, by hand
        ({}, 3, 64, 64, 3 * 64 + 6 * 4 + 3 * 2),
        ({"bits": 2}, 3, 64, 64, 3 * 32 + 6 * 4 + 3 * 2),
        ({"bits": 3, "outlier_channels": 0}, 8, 128, 128, 8 * 96 + 16 * 4),
        ({"basis": "joint"}, 3, 64, 96, 3 * 64 + 4 * 4 + 2),
        ({"bits": {"key": 8, "value": 2}}, 1, 256, 128, 256 + 64 + 4 * 4 + 2),
        ({"group_size": 16}, 2, 80, 16, 2 * 80 + 20 * 4 + 2 * 2),
    ],
)
def test_formats_count_every_byte(raw, kv_heads, head_size, group_size, bytes_per_token):
    # So wide that X would take more.
    shape = LayerShape(0, 64 * kv_heads * head_size, kv_heads, head_size)
    (form,) = layer_formats(parse_settings(raw), [shape])
    assert form.holds == "latents"
    assert {stream.group_size for stream in form.streams} == {group_size}
    assert form.bytes_per_token == bytes_per_token


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"group_size": 48}, ["'group_size'", "48", "does not divide the 64 channels", "set one of 8, 16, 32, 64"]),
        ({"outlier_channels": 64}, ["'outlier_channels'", "64 (key)", "set 0 to 63"]),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(raw, parts):
    with pytest.raises(SettingsError) as error:
        layer_formats(parse_settings({"cache": "latent", **raw}), [LayerShape(0, 576, 3, 64)])
    for part in parts:
        assert part in str(error.value)


def test_a_head_that_cannot_be_packed_is_refused():
    with pytest.raises(SettingsError, match="12 channels cannot be packed"):
        layer_formats(parse_settings({}), [LayerShape(0, 576, 3, 12)])


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (0, 0),
        ("0", 0),
        (0.0, 0),
        (1 << 30, 1 << 30),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("3MB", 3_000_000),
        ("20%", 0.2),
        (0.25, 0.25),
        ("0.25", 0.25),
        (None, None),
    ],
)
def test_memory_of_hot_blocks(raw, value):
    hot = parse_settings({"hot": raw}).hot
    assert hot == value
    assert type(hot) is type(value)


def test_bytes_of_the_pool_are_a_share_or_bytes():
    assert pool_bytes(0.25, 1000) == 250
    assert pool_bytes(300, 1000) == 300
