"""The settings: defaults as published, and errors that say what to set."""

import pytest
import torch

from xquant_vllm.errors import SettingsError
from xquant_vllm.kivi.plugin.settings import parse_settings


def test_defaults_are_as_published():
    settings = parse_settings(None)
    assert (settings.bits, settings.tokens_per_group, settings.residual, settings.prompt) == (4, 32, 128, "exact")
    assert not settings.pre_rope
    assert parse_settings({"pre_rope": True}).tokens_per_group == 128


@pytest.mark.parametrize(
    ("head_size", "group", "expected"), [(64, 32, 32), (80, 32, 16), (64, 128, 64), (256, 128, 128), (72, 32, 24)]
)
def test_groups_of_channels_divide_a_head(head_size, group, expected):
    assert parse_settings({"group_size": group}).channels_per_group(head_size) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bits": 3}, "kivi: setting 'bits': 3 cannot work: no page format has 3-bit codes; set 4 or 2"),
        ({"bits": "low"}, "kivi: setting 'bits': 'low' cannot work: .*; set 4 or 2"),
        ({"group_size": 24}, "kivi: setting 'group_size': 24 cannot work: .*; set a multiple of 16"),
        ({"residual": 100}, "kivi: residual is 100, but .* groups of 32; set residual to a positive multiple of 32"),
        ({"residual": 0}, "kivi: residual is 0"),
        ({"pre_rope": True, "residual": 64}, "kivi: residual is 64, but .* groups of 128"),
        ({"prompt": "quick"}, "kivi: setting 'prompt': 'quick' cannot work: .*; set \"exact\" or \"cached\""),
        ({"bit": 4}, "kivi: unknown setting 'bit'; did you mean 'bits'"),
        ([4], "is not a table of settings; set for example"),
    ],
)
def test_settings_that_cannot_work_are_explained(raw, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings(raw)


def test_pages_that_cannot_be_made_are_explained():
    with pytest.raises(SettingsError, match=r"^kivi: heads of 60 channels cannot be packed"):
        parse_settings(None).layouts(2, 60, torch.bfloat16, None)
    with pytest.raises(SettingsError, match=r"^kivi: block_size = 16 would split a group of keys"):
        parse_settings(None).layouts(2, 64, torch.bfloat16, 16)
