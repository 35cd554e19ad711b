"""Addresses of the pages that a layer reads, as tensors, so that one kernel takes any number of them."""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.gpu.device.unpack import Pages

_pointers: dict[tuple[tuple[int, int], ...], tuple[torch.Tensor, torch.Tensor]] = {}


def page_pointers(pages: Sequence[torch.Tensor], block_size: int) -> Pages:
    """Describe pages to a kernel.

    The tensors are made once per set of pages: vLLM allocates its cache once, and a copy to the device in every step
    would wait for it.

    Args:
        pages: ``[num_blocks, page_bytes]`` uint8 each, with contiguous bytes.
        block_size: tokens of a page.
    """
    at = tuple((of_layer.data_ptr(), of_layer.stride(0)) for of_layer in pages)
    found = _pointers.get(at)
    if found is None:
        numbers = torch.tensor(at, dtype=torch.int64).T.contiguous().to(pages[0].device)
        found = _pointers[at] = (numbers[0], numbers[1])
    return Pages(*found, block_size)
