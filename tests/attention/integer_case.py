"""Layers whose key up-projection is exact in integers, so that kernels that multiply by such lose nothing."""

from dataclasses import replace

import torch

from tests.attention.attention_cases import Case
from xquant_vllm.attention.cpu.integers import scale_groups
from xquant_vllm.attention.cpu.plan import CpuPlan
from xquant_vllm.projection.integer_up import LARGEST_BYTE


def on_integers(case: Case) -> Case:
    """The case with every column of every scale group rounded to integers of 8 bits."""
    projection = case.plan.projection
    up = projection.up_key.double()
    cpu_plan = CpuPlan(case.plan)  # owns what its structs point to
    for kv_head in range(up.shape[0]):
        for scale_group in scale_groups(cpu_plan.struct.key, kv_head):
            rows = slice(scale_group.first, scale_group.first + len(scale_group.step))
            step = scale_group.step.unsqueeze(-1)
            weighted = up[kv_head, rows] * step
            unit = (weighted.abs().amax(0) / LARGEST_BYTE).clamp_min(1e-30)
            rounded = (weighted / unit).round() * unit / step.clamp_min(1e-30)
            up[kv_head, rows] = torch.where(step > 0, rounded, up[kv_head, rows])
    return replace(case, plan=replace(case.plan, projection=replace(projection, up_key=up.float())))
