"""Random inputs of modules."""

import torch


def random_input(tokens: int, channels: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers ``[tokens, channels]``, the same on every device before they are rounded."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # Loading happens under the default dtype of the model: name every dtype.
    numbers = torch.randn(tokens, channels, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.to(device, dtype)
