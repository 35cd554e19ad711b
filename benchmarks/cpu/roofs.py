"""What this machine reaches: bandwidth of a large copy, rates of large matrix products."""

import torch

from benchmarks.cpu.timing import in_turns
from benchmarks.cpu.work import Roofs

_COPIED_BYTES = 2**28
_MATRIX_SIZE = 1536
_ROUNDS = 5


def measure_roofs(rounds: int = _ROUNDS) -> Roofs:
    """With torch's threads, as many as it is set to; the fastest of each, as a roof is what can be reached."""
    generator = torch.Generator().manual_seed(0)
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    size = _MATRIX_SIZE
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    small, other = (torch.randint(-127, 128, (size, size), dtype=torch.int8, generator=generator) for _ in range(2))
    taken = in_turns(
        {
            "copy": lambda: target.copy_(source),
            "fp32": lambda: torch.mm(left, right, out=product),
            "int8": lambda: torch._int_mm(small, other),
        },
        rounds,
    )
    return Roofs(2 * _COPIED_BYTES / min(taken["copy"]), size**3 / min(taken["fp32"]), size**3 / min(taken["int8"]))
