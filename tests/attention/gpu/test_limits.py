"""What a GPU has, and what is said where a kernel takes more."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from xquant_vllm.attention.gpu.limits import SHARED_MEMORY, refusing_what_does_not_fit, shared_memory


def test_the_interpreter_has_the_least() -> None:
    assert shared_memory(torch.device("cpu")) == min(SHARED_MEMORY.values()) == 99 * 1024


def test_says_what_to_set_instead() -> None:
    @refusing_what_does_not_fit
    def launch() -> None:
        raise OutOfResources(180224, 101376, "shared memory")

    with pytest.raises(ValueError, match=r"it takes 180,224 of 101,376 \(shared memory\).*--dtype bfloat16"):
        launch()
