"""What every layer's pages hold: chosen by width, chained from anchor to anchor, counted to the byte."""

import pytest

from xquant_vllm.integration.formats import LayerShape, layer_formats
from xquant_vllm.integration.settings import SettingsError, parse_settings

LONG = "- 0 01 012 0123 01234 012345 0123456"


def formats(settings, layers=8, hidden_size=576, kv_heads=9, head_size=64):
    shapes = [LayerShape(index, hidden_size, kv_heads, head_size) for index in range(layers)]
    return layer_formats(parse_settings(settings), shapes)


@pytest.mark.parametrize(
    ("settings", "kv_heads", "holds", "bytes_per_token"),
    [
        # Multi-head attention: X has half the channels. Groups of 96.
        ({}, 9, "x", 288 + 24),
        ({"cache": "latent"}, 9, "latent", 2 * 9 * (32 + 4) + 9 * 2),
        ({"bits": {"key": 4, "value": 2}}, 9, "latent", 9 * (32 + 16 + 8 + 2)),
        # Grouped queries: latents have fewer.
        ({}, 3, "latent", 2 * 3 * (32 + 4) + 3 * 2),
        ({"cache": "x", "bits": 2}, 3, "x", 144 + 24),
        ({"method": "xquant-cl", "bits": 2, "first_layers_bits": 2}, 3, "joint", 96 + 4 * 4 + 2),
        ({"method": "xquant-cl", "bits": 2, "first_layers_bits": 2, "cache": "x"}, 3, "x", 144 + 24),
        ({"bits": 16, "group_size": 64}, 9, "x", 1152),
    ],
)
def test_what_has_fewer_channels_is_cached_to_the_byte(settings, kv_heads, holds, bytes_per_token):
    for form in formats(settings, kv_heads=kv_heads):
        assert form.holds == holds
        assert form.bytes_per_token == bytes_per_token


def test_of_two_equally_wide_ones_each_method_takes_the_one_that_it_reads_faster():
    assert formats({}, hidden_size=512, kv_heads=4)[0].holds == "latent"
    assert formats({"method": "xquant-cl"}, hidden_size=512, kv_heads=4)[0].holds == "x"


@pytest.mark.parametrize(
    ("settings", "reads", "bits"),
    [
        ({}, "- - - 2 23 234 2345 23456", "44444444"),
        ({"bits": 2}, "- - - 2 23 234 2345 23456", "44422222"),
        ({"bits": 2, "first_layers": 1}, "- 0 01 012 0123 01234 012345 0123456", "42222222"),
        # A chain needs a base, which is an anchor.
        ({"bits": 2, "first_layers": 0}, "- 0 01 012 0123 01234 012345 0123456", "42222222"),
        ({"bits": 2, "first_layers": 1, "anchor_interval": 3}, "- 0 01 - 3 34 - 6", "42242242"),
        (
            {"bits": 2, "first_layers": 2, "anchor_interval": 4, "first_layers_bits": 8, "anchor_bits": 3},
            "- - 1 12 123 - 5 56",
            "88222322",
        ),
        ({"bits": 3, "first_layers": 1, "skip_layers": [3]}, "- 0 01 - 3 34 345 3456", "433F3333"),
        ({"bits": 2, "cache": "latent"}, "- 0 01 012 - 4 45 456", "42224222"),
        ({"bits": 2, "cache": "latent", "anchor_interval": 0, "anchor_bits": None}, LONG, "42222222"),
        ({"bits": 2, "cache": "latent", "anchor_bits": 3, "first_layers": 2}, "- - 1 12 123 - 5 56", "44222322"),
    ],
)
def test_chains_run_from_anchor_to_anchor(settings, reads, bits):
    forms = formats({"method": "xquant-cl", **settings})
    assert " ".join("".join(map(str, form.reads)) or "-" for form in forms) == reads
    assert "".join("F" if form.streams[0].bits == 16 else str(form.streams[0].bits) for form in forms) == bits


def test_layers_that_are_skipped_keep_fp16_latents():
    forms = formats({"bits": 2, "skip_layers": [0, 2]}, layers=3, kv_heads=3)
    assert [form.bytes_per_token for form in forms] == [768, 126, 768]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache": "x", "bits": {"key": 4, "value": 2}}, "'bits': key 4 / value 2 cannot work with 'cache': 'x'"),
        ({"method": "xquant-cl", "bits": {"key": 4, "value": 2}}, "cannot work with 'method': 'xquant-cl'"),
        ({"group_size": 128}, "'group_size': 128 cannot work: it does not divide the 576 channels of a layer input"),
        ({"method": "xquant-cl", "cache": "latent", "group_size": 80}, "1152 channels of a joint latent"),
        ({"method": "xquant-cl", "anchor_bits": 3}, "'anchor_bits': key 3 / value 3 cannot work: a chain of the layer"),
        ({"cache": "latent", "group_size": 96}, "64 channels of a latent head"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, named):
    with pytest.raises(SettingsError, match=named):
        formats(settings)
