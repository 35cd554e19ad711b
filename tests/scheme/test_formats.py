"""What every layer's pages hold: chosen by width, chained from anchor to anchor, counted to the byte."""

import pytest

from xquant_vllm.errors import SettingsError
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings

LONG = "- 0 01 012 0123 01234 012345 0123456"


def formats(settings, layers=8, hidden_size=576, kv_heads=9, head_size=64, first=0):
    shapes = [LayerShape(index, hidden_size, kv_heads, head_size) for index in range(first, first + layers)]
    return layer_formats(parse_settings(settings), shapes)


@pytest.mark.parametrize(
    ("settings", "kv_heads", "holds", "bytes_per_token"),
    [
        # Multi-head attention: X has half the channels. Groups of 96.
        ({}, 9, "x", 288 + 24),
        ({"cache": "latent"}, 9, "latents", 2 * 9 * (32 + 4) + 9 * 2),
        ({"bits": {"key": 4, "value": 2}}, 9, "latents", 9 * (32 + 16 + 8 + 2)),
        # Grouped queries: latents have fewer.
        ({}, 3, "latents", 2 * 3 * (32 + 4) + 3 * 2),
        ({"cache": "x", "bits": 2}, 3, "x", 144 + 24),
        ({"method": "xquant-cl", "bits": 2, "first_layers_bits": 2}, 3, "joint_kv", 96 + 4 * 4 + 2),
        ({"method": "xquant-cl", "bits": 2, "first_layers_bits": 2, "cache": "x"}, 3, "x", 144 + 24),
        ({"bits": 16, "group_size": 64}, 9, "x", 1152),
    ],
)
def test_what_has_fewer_channels_is_cached_to_the_byte(settings, kv_heads, holds, bytes_per_token):
    for form in formats(settings, kv_heads=kv_heads):
        assert form.holds == holds
        assert form.bytes_per_token == bytes_per_token


def test_of_two_equally_wide_ones_each_method_takes_the_one_that_it_reads_faster():
    assert formats({}, hidden_size=512, kv_heads=4)[0].holds == "latents"
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


@pytest.mark.parametrize(
    ("settings", "reads", "bits"),
    [
        # A chain begins anew on every rank of a pipeline: its first layer reads nothing, and has an anchor's bits.
        ({"bits": 2}, "- 0 01 012 0123 01234 012345 0123456", "42222222"),
        ({"bits": 2, "first_layers": 10, "first_layers_bits": 8}, "- - 1 12 123 1234 12345 123456", "88222222"),
        # Anchors after it are where they are on one rank: before layers 9 and 13; before 9, 12 and 15.
        ({"bits": 2, "cache": "latent", "anchor_interval": 4, "first_layers": 2}, "- - 1 12 123 - 5 56", "44222422"),
        ({"bits": 2, "cache": "latent", "anchor_interval": 3}, "- - 1 12 - 4 45 -", "44224224"),
        ({"bits": 2, "first_layers": 1, "skip_layers": [3, 10]}, "- 0 - 2 23 234 2345 23456", "42F22222"),
    ],
)
def test_a_rank_that_begins_in_the_middle_of_the_model(settings, reads, bits):
    """Layers 8 to 15 of a pipeline's second rank: settings count them from the model's first."""
    forms = formats({"method": "xquant-cl", **settings}, first=8)
    assert [form.shape.index for form in forms] == list(range(8, 16))
    assert " ".join("".join(map(str, form.reads)) or "-" for form in forms) == reads
    assert "".join("F" if form.streams[0].bits == 16 else str(form.streams[0].bits) for form in forms) == bits


def test_first_and_skipped_layers_are_counted_from_the_models_first():
    forms = formats({"bits": 2, "first_layers": 10, "skip_layers": [11], "cache": "latent"}, first=8)
    assert [form.streams[0].bits for form in forms] == [4, 4, 2, 16, 2, 2, 2, 2]


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


def allocated(allocations, settings=None, **sizes):
    sizes = {"hidden_size": 576, "kv_heads": 3, "head_size": 64, **sizes}
    shapes = [
        LayerShape(index, sizes["hidden_size"], sizes["kv_heads"], sizes["head_size"]) for index in sorted(allocations)
    ]
    return layer_formats(parse_settings(settings or {}), shapes, allocations)


def test_calibrated_layers_hold_what_their_factors_say():
    """Bits of the settings say nothing of them. Every head has codes and a scale."""
    few, many = ((4, 8), (2, 16)), ((8, 4), (4, 40), (3, 16))
    allocations = {0: ((few, many, few), (many,) * 3), 5: ((few,) * 3, (few,) * 3)}
    first, second = allocated(allocations, {"bits": 8})
    assert (first.shape.index, second.shape.index) == (0, 5)
    for form in (first, second):
        assert form.holds == "latents"
        assert form.reads == ()
        assert [(stream.width, stream.num_heads) for stream in form.streams] == [(64, 3)] * 2
    assert tuple(stream.runs for stream in first.streams) == allocations[0]
    of_few, of_many = 4 + 4 + 1, 4 + 20 + 6 + 1
    assert first.bytes_per_token == 2 * of_few + 4 * of_many
    assert second.bytes_per_token == 6 * of_few


@pytest.mark.parametrize(("hidden_size", "width"), [(576, 384), (256, 256)])
def test_a_calibrated_joint_latent_is_no_wider_than_the_layer_input(hidden_size, width):
    runs = ((4, 128), (2, 64))
    (form,) = allocated({0: ((runs,),)}, hidden_size=hidden_size)
    assert form.holds == "joint_kv"
    assert [(stream.width, stream.num_heads) for stream in form.streams] == [(width, 1)]
    assert form.bytes_per_token == 64 + 16 + 1


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"method": "xquant"}, "- - - - - -"),
        ({"method": "xquant-cl"}, "- 0 01 012 - 4"),
        ({"method": "xquant-cl", "first_layers": 2, "anchor_interval": 3}, "- - 1 12 - 4"),
        ({"method": "xquant-cl", "anchor_interval": 0}, "- 0 01 012 0123 01234"),
    ],
)
def test_calibrated_joint_latents_are_chained_as_the_settings_of_the_folder_say(settings, reads):
    forms = allocated(dict.fromkeys(range(6), ((((2, 64),),),)), settings)
    assert " ".join("".join(map(str, form.reads)) or "-" for form in forms) == reads
