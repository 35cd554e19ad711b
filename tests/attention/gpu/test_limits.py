"""What a GPU has, and what is said where a kernel takes more."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from xquant_vllm.attention.gpu import limits
from xquant_vllm.attention.gpu.limits import (
    SHARED_MEMORY,
    refuse_wide_float32,
    refusing_what_does_not_fit,
    shared_memory,
)

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU says it itself")
def test_without_a_gpu() -> None:
    assert shared_memory(torch.device("cpu")) > max(SHARED_MEMORY.values())


def test_says_what_to_set_instead() -> None:
    @refusing_what_does_not_fit
    def launch() -> None:
        raise OutOfResources(180224, 101376, "shared memory")

    with pytest.raises(ValueError, match=r"it takes 180,224 of 101,376 \(shared memory\).*--dtype bfloat16"):
        launch()


@pytest.mark.parametrize(
    ("dtype", "columns", "capability", "refused"),
    [
        (torch.float32, 256, 86, True),
        (torch.float32, 256, 80, False),
        (torch.float32, 128, 86, False),
        (torch.bfloat16, 256, 89, False),
    ],
)
def test_wide_float32(monkeypatch, dtype: torch.dtype, columns: int, capability: int, refused: bool) -> None:
    monkeypatch.setattr(limits, "shared_memory", lambda _: SHARED_MEMORY[capability])
    if refused:
        with pytest.raises(ValueError, match=r"--dtype float32 .* 101,376; set --dtype bfloat16"):
            refuse_wide_float32(dtype, columns, CPU)
    else:
        refuse_wide_float32(dtype, columns, CPU)
