"""What reading a cache computes beyond a 16-bit one: keys, and values of wide latents, made again at every step."""

from collections.abc import Sequence

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import Stream
from xquant_vllm.scheme.formats import LayerFormat


def extra_flops(formats: Sequence[LayerFormat], heads: int) -> int:
    """FLOPs more than a 16-bit cache per cached token that a step attends to, in all layers; where it is not hot.

    Keys are made of latents by every kv head. Values of latents per head are not made: the latents are weighed, and the
    sum multiplied once. Those of wide latents are. A calibrated latent has at most the channels counted here, since
    some are not stored. Unpacking is not counted.

    Args:
        formats: of the layers on a rank.
        heads: query heads on a rank.
    """
    total = 0
    for form in formats:
        kv_heads, size = form.shape.num_kv_heads, form.shape.head_size
        terms = [form, *(formats[position] for position in form.reads)]
        key_width = sum(_width(term.streams[0]) for term in terms)
        value_width = sum(_width(term.streams[-1]) for term in terms)
        total += 2 * kv_heads * key_width * size
        if form.holds != "latents" or form.streams[0].num_heads < kv_heads:
            total += 2 * kv_heads * value_width * size
        else:
            # Weighing latents instead of values of a head's width.
            total += 2 * heads * (value_width - size)
    return total


def _width(stream: Stream) -> int:
    """Channels that are multiplied, of one latent head."""
    if isinstance(stream, AllocatedFormat):
        return sum(channels for _, channels in stream.runs[0])
    return stream.width
