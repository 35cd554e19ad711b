"""Layers whose key up-projection is exact in integers, so that kernels that multiply by such lose nothing."""

from dataclasses import replace

import torch

from tests.attention.attention_cases import Case
from xquant_vllm.attention.cpu.integers import segments
from xquant_vllm.attention.cpu.prepared import PreparedPlan
from xquant_vllm.projection.integer_up import LARGEST_BYTE


def on_integers(case: Case) -> Case:
    """The case with every column of every segment rounded to integers of 8 bits."""
    projection = case.plan.projection
    up = projection.up_key.double()
    prepared = PreparedPlan(case.plan)  # owns what its structs point to
    for kv_head in range(up.shape[0]):
        for segment in segments(prepared.struct.key, kv_head):
            rows = slice(segment.first, segment.first + len(segment.step))
            step = segment.step.unsqueeze(-1)
            weighted = up[kv_head, rows] * step
            unit = (weighted.abs().amax(0) / LARGEST_BYTE).clamp_min(1e-30)
            rounded = (weighted / unit).round() * unit / step.clamp_min(1e-30)
            up[kv_head, rows] = torch.where(step > 0, rounded, up[kv_head, rows])
    return replace(case, plan=replace(case.plan, projection=replace(projection, up_key=up.float())))
