"""Up-projections that read attention sinks back as they are, although their latents were rounded like all others.

Nearly all queries attend to a few tokens: the first one of a sequence, some newlines. What rounding does to them
happens to every token's output, in the same direction. There are few of them, and they look alike: the layers' inputs
at a first token hardly depend on the text. So the same codes come out again and again, and the up-projection can learn
what they stand for. It is a least squares fit from decoded latents to exact keys or values, in which a token counts by
what of its squared gradient :data:`.calibration.LARGEST_GRADIENT` has cut off; most tokens do not count at all. A ridge
towards the up-projection there was keeps what it makes of them.
"""

import torch

from xquant_vllm.codec.allocated import dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import Runs
from xquant_vllm.projection.calibration import LARGEST_GRADIENT

# Relative to a latent channel's mean square. 1 to 10 are alike; 0.1 loses a tenth more at 2 and at 4 bits.
_RIDGE = 3.0


def refit_up(
    up: torch.Tensor, latents: torch.Tensor, exact: torch.Tensor, gradient: torch.Tensor, runs: Runs
) -> torch.Tensor:
    """Fit the rows of stored channels to what a text's latents read back as.

    Args:
        up: ``[width, n]``, FP64, which inverts the down-projection.
        latents: ``[num_tokens, width]``, before they are quantized; channels have root mean square 1.
        exact: ``[num_tokens, n]``, FP64, the keys or values.
        gradient: of them, ``[num_tokens, n]``.
        runs: how latents are stored.

    Returns:
        ``[width, n]``, FP64. Rows of channels that are not stored are those of ``up``.
    """
    stored = sum(channels for _, channels in runs)
    read = dequantize_allocated(*quantize_allocated(latents, runs), runs, stored).to(up)
    worth = gradient.to(up).square().sum(1, keepdim=True)
    worth /= worth.mean().clamp_min(torch.finfo(torch.float32).tiny)
    worth = (worth - LARGEST_GRADIENT).clamp_min(0)
    missing = exact - read @ up[:stored]
    gram = read.T @ (worth * read) / len(read)
    gram.diagonal().add_(_RIDGE)
    change = torch.linalg.solve(gram, read.T @ (worth * missing) / len(read))
    return torch.cat((up[:stored] + change, up[stored:]))
