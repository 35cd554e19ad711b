"""What the log says of the cache at start-up."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from xquant_vllm.attention import dispatch, reference
from xquant_vllm.codec.layout import Stream, StreamFormat
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.settings import XQuantSettings

logger = logging.getLogger("vllm.xquant_vllm")

_WHAT = {
    "latents": "latents of keys and values",
    "x": "the layer input",
    "joint_kv": "joint latents of keys and values",
}


def report(impls: Sequence[Any], quantized: Sequence[str], factors: str) -> None:
    """Say what is cached, in how many bytes, and by which kernels it is read.

    Args:
        impls: implementations of the layers, in order.
        quantized: names of the linear layers that had packed weights, one for each.
        factors: where the bases came from.
    """
    settings = impls[0].settings
    formats = [impl.scheme.format for impl in impls]
    config = impls[0].vllm_config
    parallel = config.parallel_config
    for line in _lines(settings, formats, factors, alone=parallel.world_size == 1):
        logger.info("xquant: %s", line)
    if settings.fold_values:
        folded = sum(impl.scheme.projection.up_value is None for impl in impls)
        logger.info(
            "xquant: in %d of %d layers the up-projection of values is folded into the output projection",
            folded,
            len(impls),
        )
    ranks, total_kv_heads = parallel.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    for line in (*_kept_apart(formats), *tensor_parallel(formats, ranks, total_kv_heads)):
        logger.info("xquant: %s", line)
    if quantized:
        logger.info(
            "xquant: %d quantized %s layers now hold their effective weight in the model's dtype, because packed "
            "rows cannot be exchanged for down-projections; the other layers stay quantized",
            len(quantized),
            " and ".join(dict.fromkeys(quantized)),
        )
    device = config.device_config.device_type
    fast = dispatch.select(device) is not reference
    logger.log(logging.INFO if fast else logging.WARNING, "xquant: %s", dispatch.describe(device))


def _lines(settings: XQuantSettings, formats: Sequence[LayerFormat], factors: str, *, alone: bool) -> Iterator[str]:
    taken = sum(form.bytes_per_token for form in formats)
    plain = sum(form.plain_bytes_per_token for form in formats)
    kinds = " and ".join(_quoted(kind) for kind in dict.fromkeys(_cache_setting(form) for form in formats))
    sizes = {stream.group_size for form in formats for stream in form.streams if isinstance(stream, StreamFormat)}
    groups = "groups of " + ", ".join(map(str, sorted(sizes))) if sizes else "shared out among channels"
    yield (
        f"cache {kinds} at {settings.bits} bits, method {_quoted(settings.method)}, {groups}; {len(formats)} "
        f"layers take {taken} bytes per token{'' if alone else ' on this rank'}, 16-bit keys and values take {plain} "
        f"({plain / taken:.2f}x); {factors}"
    )
    for (holds, bits, size, deltas), count in Counter(map(_kind, formats)).items():
        yield (
            f"{count} layers hold {'differences of ' if deltas else ''}{_WHAT[holds]} at {bits}, {size} bytes per "
            "token each"
        )


def _cache_setting(form: LayerFormat) -> str:
    return "x" if form.holds == "x" else "latent"


def _kind(form: LayerFormat) -> tuple[str, str, int, bool]:
    return form.holds, _bits(form.streams), form.bytes_per_token, bool(form.reads)


def _bits(streams: Sequence[Stream]) -> str:
    """Bits of the channels."""
    bits = [stream.bits for stream in streams if isinstance(stream, StreamFormat)]
    if not bits:
        return "0 to 8 bits, as channels matter"
    return f"key {bits[0]} / value {bits[1]} bits" if len(bits) > 1 else f"{bits[0]} bits"


def _quoted(kind: str) -> str:
    return f'"{kind}"'


def _kept_apart(formats: Sequence[LayerFormat]) -> Iterator[str]:
    """Why latents are cached where the layer input would have fewer channels."""
    shapes = [form.shape for form in formats if form.shape.keys_normed_together]
    if shapes:
        text = f"{len(shapes)} layers normalize the keys of all heads together: their key latents are cached after it"
        narrow = any(shape.hidden_size < 2 * shape.num_kv_heads * shape.head_size for shape in shapes)
        yield text + (", which the layer input, although it has fewer channels, could not be" if narrow else "")


def tensor_parallel(formats: Sequence[LayerFormat], ranks: int, total_kv_heads: int) -> Iterator[str]:
    """What cutting the kv heads over ranks does to pages, in lines for the log.

    Args:
        formats: of this rank's layers.
        ranks: of tensor parallelism.
        total_kv_heads: kv heads of the model, in parts or, if they are fewer than ranks, several times on the ranks.
    """
    if ranks == 1:
        return
    form, parts = formats[-1], min(ranks, total_kv_heads)
    shape = form.shape
    latents = 2 * shape.num_kv_heads * shape.head_size
    if parts < ranks:
        yield (
            f"with --tensor-parallel-size {ranks} each of the model's kv heads ({total_kv_heads}) is on "
            f"{ranks // parts} ranks, which all keep what is cached of it, as they do with a 16-bit cache"
        )
    if form.holds == "x":
        smaller = f": the saving over 16 bit is {parts} times smaller than on one rank" if parts > 1 else ""
        yield (
            f"with --tensor-parallel-size {ranks} every rank keeps the whole layer input, {shape.hidden_size} channels "
            f"instead of the {latents} of its own keys and values{smaller}"
        )
    elif parts > 1 and shape.hidden_size < latents * parts and not shape.keys_normed_together:
        yield (
            f"with --tensor-parallel-size {ranks} a rank has latents of {latents} channels; the layer input has "
            f"{shape.hidden_size}, which every rank would keep whole, so latents are cached; on one rank the layer "
            "input would take fewer bytes"
        )
