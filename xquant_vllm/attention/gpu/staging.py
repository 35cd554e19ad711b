"""Numbers on their way to a device: pinned memory that is used again as soon as its copy is done."""

import torch

_LEAST = 1024
_kept: dict[torch.device, "Staging"] = {}


class _Buffer:
    """Memory of the host, and when its last copy is done."""

    def __init__(self, size: int, on_cuda: bool) -> None:
        with torch.inference_mode(False):  # else nothing else could be written to it outside of that mode
            self.numbers = torch.empty(size, dtype=torch.int32, pin_memory=on_cuda)
        self.copied = torch.cuda.Event() if on_cuda else None

    def free(self) -> bool:
        return self.copied is None or self.copied.query()


class Staging:
    """Buffers for one device: as many as copies are under way at the same time, so that the host never waits."""

    def __init__(self, device: torch.device) -> None:
        """There is no buffer yet."""
        self._device = device
        self._buffers: list[_Buffer] = []

    def send(self, numbers: list[int]) -> torch.Tensor:
        """An int32 tensor of these numbers on the device, in the order of its stream."""
        count = len(numbers)
        # Nothing is written over a copy under way.
        buffer = next((of for of in self._buffers if of.free()), None)
        if buffer is None or buffer.numbers.numel() < count:
            if buffer is not None:
                self._buffers.remove(buffer)
            buffer = _Buffer(max(_LEAST, 1 << (count - 1).bit_length()), self._device.type == "cuda")
            self._buffers.append(buffer)
        source = buffer.numbers[:count]
        source.copy_(torch.tensor(numbers, dtype=torch.int32))
        sent = torch.empty(count, dtype=torch.int32, device=self._device)
        sent.copy_(source, non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record(torch.cuda.current_stream(self._device))
        return sent


def send(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers as an int32 tensor on a device, without waiting for it: one copy, from memory that is kept."""
    if device not in _kept:
        _kept[device] = Staging(device)
    return _kept[device].send(numbers)
