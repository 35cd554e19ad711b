"""What this device reaches: bandwidth of a large copy and rate of a large matrix product."""

from typing import Any

import torch

from benchmarks.gpu.timing import Timing, measure


def measure_roofs(tiny: bool) -> dict[str, Any]:
    """Copy bandwidth, counting bytes read and written, and BF16 products of random matrices with FP32 sums.

    Returns:
        ``copy_bytes_per_second``, ``matrix_flops_per_second``, each with the slowest and the fastest sample, and what
        was done.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    copied = 2**24 if tiny else min(2**31, torch.cuda.mem_get_info()[0] // 4)
    size = 1024 if tiny else 8192
    source = torch.randint(256, (copied,), dtype=torch.uint8, device="cuda", generator=generator)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    found = measure(
        {"copy": [lambda: target.copy_(source)], "matrix": [lambda: torch.mm(left, right, out=product)]},
        samples=15,
        seconds=3.0,
    )
    result: dict[str, Any] = {"copied_bytes": copied, "matrix_size": size}
    for name, work, key in (
        ("copy", 2 * copied, "copy_bytes_per_second"),
        ("matrix", 2 * size**3, "matrix_flops_per_second"),
    ):
        timing = found[name]
        if not isinstance(timing, Timing):
            raise timing
        result[key] = work / timing.median
        result[f"{key}_range"] = [work / timing.slowest, work / timing.fastest]
    return result
