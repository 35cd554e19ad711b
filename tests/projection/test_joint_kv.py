"""The joint basis of keys and values: a projection that neither of them notices."""

import pytest
import torch

from xquant_vllm.projection.joint_kv import factorize_joint_kv

KV_HEADS, HEAD_SIZE = 2, 16
KV_SIZE = KV_HEADS * HEAD_SIZE


def weights(hidden: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(KV_SIZE, hidden, generator=generator) / hidden**0.5 for _ in range(2)]


@pytest.mark.parametrize("hidden", [96, 40], ids=["tall", "wide"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_keys_and_values_pass_through_the_latent(hidden, dtype, tolerance):
    key, value = weights(hidden)
    basis = factorize_joint_kv(key, value, outlier_channels=1, rotate=True, seed=0, dtype=dtype)
    assert basis.down.shape == (1, hidden, 2 * KV_SIZE)
    assert basis.down.dtype == dtype
    assert basis.lift.shape == (2 * KV_SIZE, hidden)
    assert basis.lift.dtype == torch.float32
    both = torch.cat((key, value)).T.double()
    passed = basis.down[0].double() @ basis.lift.double() @ both
    assert (passed - both).norm() / both.norm() < tolerance


def test_columns_are_orthonormal_but_for_scale_and_rotation():
    key, value = weights(96)
    basis = factorize_joint_kv(key, value, outlier_channels=1, rotate=False, seed=0, dtype=torch.float64)
    gram = basis.down[0].T @ basis.down[0]
    s = torch.linalg.svdvals(torch.cat((key, value)).double())
    assert torch.allclose(gram, torch.diag(s / s.mean()), atol=1e-9)
