"""Quantization in groups against a loop over groups, and bytes against what such a loop would write."""

import pytest
import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_channel_bytes, per_token, per_token_bytes

X = torch.randn(150, 200, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 200)


def read_back(group: torch.Tensor, bits: int) -> torch.Tensor:
    """One group as published: minimum, step and codes."""
    zero = group.min().half()
    scale = ((group.max() - zero.float()) / (2**bits - 1)).half()
    return ((group - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1) * scale.float() + zero.float()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group_size", [128, 32, 25])
def test_they_are_those_of_a_loop_over_groups(bits, group_size):
    tokens = [torch.cat([read_back(group, bits) for group in token.split(group_size)]) for token in X]
    assert torch.equal(per_token(X, bits, group_size), torch.stack(tokens))
    channels = [torch.cat([read_back(group, bits) for group in channel.split(group_size)]) for channel in X.T]
    assert torch.equal(per_channel(X, bits, group_size), torch.stack(channels, 1))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 32), (2, 25)])
def test_every_group_has_a_scale_and_a_zero_point(bits, group_size):
    token = sum(len(group) * bits / 8 + 2 + 2 for group in X[0].split(group_size))
    assert per_token_bytes(200, bits, group_size) == pytest.approx(token)
    full_group = 200 * (group_size * bits / 8 + 2 + 2)
    assert per_channel_bytes(200, bits, group_size) == pytest.approx(full_group / group_size)
