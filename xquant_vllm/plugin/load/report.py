"""What was made of a model when it was loaded, noted for the summary that the log has once memory is given out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from xquant_vllm.attention.per_object import per_object
from xquant_vllm.codec.layout import Stream, StreamFormat
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.settings import XQuantSettings

_WHAT = {
    "latents": "latents of keys and values",
    "x": "the layer input",
    "joint_kv": "joint latents of keys and values",
}
# Kinds of layers that have a line of their own.
_KINDS = 4


@dataclass(frozen=True)
class LoadedCache:
    """The layers of a model that are compressed: those of the model that is served, or of its draft.

    Attributes:
        settings: the user's.
        formats: of the layers on this rank, in order.
        factors: where the bases came from.
        folded: layers whose up-projection of values is in the output projection.
        quantized: names of the linear layers that had packed weights, one for each.
        coverage: which layers are compressed, and which are not.
    """

    settings: XQuantSettings
    formats: tuple[LayerFormat, ...]
    factors: str
    folded: int
    quantized: tuple[str, ...]
    coverage: str

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        return sum(form.bytes_per_token for form in self.formats)

    @property
    def plain_bytes_per_token(self) -> int:
        """In a 16-bit cache."""
        return sum(form.plain_bytes_per_token for form in self.formats)


@dataclass
class LoadNotes:
    """Of an engine.

    Attributes:
        caches: of the model that is served, then of its draft.
        remarks: what else is to be said.
    """

    caches: list[LoadedCache] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@per_object
def load_notes(compilation_config: Any) -> LoadNotes:
    """Of an engine, by vLLM's ``CompilationConfig``, which a model has in common with its draft."""
    return LoadNotes()


def note(impls: Sequence[Any], quantized: Sequence[str], factors: str, coverage: str) -> None:
    """Note what was made of a model.

    Args:
        impls: implementations of the layers, in order.
        quantized: see :class:`LoadedCache`.
        factors: likewise.
        coverage: likewise.
    """
    formats = tuple(impl.scheme.format for impl in impls)
    folded = sum(impl.scheme.projection.up_value is None for impl in impls)
    cache = LoadedCache(impls[0].settings, formats, factors, folded, tuple(quantized), coverage)
    load_notes(impls[0].vllm_config.compilation_config).caches.append(cache)


def describe_cache(cache: LoadedCache, *, alone: bool) -> Iterator[str]:
    """What is cached, in how many bytes.

    Args:
        cache: the layers.
        alone: whether they are on one rank.
    """
    settings, formats = cache.settings, cache.formats
    kinds = " and ".join(_quoted(kind) for kind in dict.fromkeys(_cache_setting(form) for form in formats))
    sizes = {stream.group_size for form in formats for stream in form.streams if isinstance(stream, StreamFormat)}
    groups = "groups of " + ", ".join(map(str, sorted(sizes))) if sizes else "shared out among channels"
    yield f"cache {kinds} at {settings.bits} bits, method {_quoted(settings.method)}, {groups}"
    yield cache.factors
    counted = Counter(map(_kind, formats)).most_common()
    for (holds, bits, size, deltas), count in counted[:_KINDS]:
        yield (
            f"{count} layers hold {'differences of ' if deltas else ''}{_WHAT[holds]} at {bits}, {size} bytes per "
            f"token each, {count * size} together"
        )
    if len(counted) > _KINDS:
        rest = sum(count for _, count in counted[_KINDS:])
        taken = sum(count * size for (_, _, size, _), count in counted[_KINDS:])
        yield f"{rest} more layers, of {len(counted) - _KINDS} more kinds, take {taken} bytes per token together"
    taken, plain = cache.bytes_per_token, cache.plain_bytes_per_token
    yield (
        f"{len(formats)} layers take {taken} bytes per token{'' if alone else ' on this rank'}, 16-bit keys and values "
        f"take {plain} ({plain / taken:.2f}x)"
    )


def describe_layers(cache: LoadedCache) -> Iterator[str]:
    """Which layers, and what was done to the model's projections."""
    yield cache.coverage
    if cache.settings.fold_values:
        yield (
            f"in {cache.folded} of {len(cache.formats)} layers the up-projection of values is folded into the output "
            "projection"
        )
    yield from _kept_apart(cache.formats)
    if cache.quantized:
        names = " and ".join(dict.fromkeys(cache.quantized))
        yield (
            f"{len(cache.quantized)} quantized {names} layers now hold their effective weight in the model's dtype, "
            "because packed rows cannot be exchanged for down-projections; the other layers stay quantized"
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
