"""Up-projections that read sinks back: tokens with far larger gradients than others, whose codes repeat."""

import torch

from tests.projection.layer_texts import relative
from xquant_vllm.codec.allocated import dequantize_allocated, quantize_allocated
from xquant_vllm.projection.refit import refit_up

RUNS = ((4, 8), (2, 8))
TOKENS, WIDTH, OUT, SINKS = 400, 20, 12, 4


def text(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, an up-projection, what it makes of them, and gradients; the first tokens are nearly alike."""
    latents = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    latents[:SINKS] = 3 * latents[0] + 0.01 * latents[:SINKS]
    up = torch.randn(WIDTH, OUT, generator=generator, dtype=torch.float64)
    up[16:] = 0  # what is not stored carries nothing here
    gradient = torch.randn(TOKENS, OUT, generator=generator, dtype=torch.float64)
    gradient[:SINKS] *= 30
    return latents, up, latents @ up, gradient


def read(latents: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return dequantize_allocated(*quantize_allocated(latents, RUNS), RUNS, WIDTH).double() @ up


def test_sinks_read_back_better_and_other_tokens_about_as_well():
    generator = torch.Generator().manual_seed(0)
    latents, up, exact, gradient = text(generator)
    refitted = refit_up(up, latents, exact, gradient, RUNS)
    # A sink of another text: close to those that were seen, not the same.
    unseen = latents[:1] + 0.01 * torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    assert relative(read(unseen, refitted), unseen @ up) < 0.5 * relative(read(unseen, up), unseen @ up)
    others = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    assert relative(read(others, refitted), others @ up) < 1.05 * relative(read(others, up), others @ up)


def test_tokens_that_matter_about_alike_change_nothing():
    latents, up, exact, gradient = text(torch.Generator().manual_seed(0))
    gradient = gradient.sign()
    assert torch.equal(refit_up(up, latents, exact, gradient, RUNS), up)
    assert torch.equal(refit_up(up, latents, exact, torch.zeros_like(gradient), RUNS), up)


def test_channels_that_are_not_stored_stay_as_they_are():
    latents, up, exact, gradient = text(torch.Generator().manual_seed(0))
    refitted = refit_up(up, latents, exact, gradient, RUNS)
    assert torch.equal(refitted[16:], up[16:])
    assert not torch.equal(refitted[:16], up[:16])
