"""Which tokens are exact, against the baseline's rule, and plans that are refused."""

from dataclasses import replace

import pytest
import torch

from tests.kivi.kivi_cases import Spec, make_plan
from xquant_vllm.evaluation.methods.baselines.kivi import recent


@pytest.mark.parametrize("residual", [32, 96, 128])
def test_recent_tokens_are_exact_by_the_baselines_rule(residual):
    plan, positions = make_plan(Spec(residual_tokens=residual)), torch.arange(400)
    for first, expected in zip(plan.first_exact(positions, 0), recent(400, residual, positions.device), strict=True):
        assert torch.equal(positions >= first[:, None], expected)


def test_tokens_of_the_step_are_exact_where_prompts_are():
    plan = make_plan(Spec(residual_tokens=64, exact_step=True))
    keys, values = plan.first_exact(torch.arange(200, 330), 200)
    assert keys.tolist() == [min(200, (p + 1) // 64 * 64) for p in range(200, 330)]
    assert values.tolist() == [min(200, p + 1 - 64) for p in range(200, 330)]


def test_values_are_exact_no_later_than_keys():
    for exact_step in (True, False):
        keys, values = make_plan(Spec(exact_step=exact_step)).first_exact(torch.arange(77, 500), 77)
        assert (values <= keys).all()


def test_what_does_not_fit_is_refused():
    plan = make_plan(Spec())
    with pytest.raises(
        ValueError, match=r"residual = 48 does not fit groups of 32 keys.*: set a positive multiple of 32"
    ):
        replace(plan, residual_tokens=48)
    with pytest.raises(ValueError, match="residual = 0"):
        replace(plan, residual_tokens=0)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 kv heads"):
        replace(plan, num_heads=5)
    with pytest.raises(ValueError, match="the same heads"):
        replace(plan, residual=replace(plan.residual, head_size=32))
