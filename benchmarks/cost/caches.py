"""Kinds of caches on paper: bytes, channels and FLOPs per cached token and layer, from the package's own formats.

Read by cost/model.py, which turns them into times; docs/kernels/cost.md explains both.
"""

from typing import Any, NamedTuple

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.planning.expected_allocation import expected_allocation
from xquant_vllm.scheme.formats import LayerFormat, LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings


class Unpack(NamedTuple):
    """Instructions per unpacked channel: of the load/store unit, integer, conversions, and of other pipes."""

    loads: float
    integers: float
    conversions: float
    others: float


# Four or two bits, eight or sixteen codes to a word; codes of one plane, or of two, by a table of bit addresses.
WORDS, TABLE, TWO_PLANES = Unpack(0.125, 1, 0, 0.5), Unpack(1, 5, 1, 0), Unpack(2, 10, 1, 0)


class Model(NamedTuple):
    """The attention of a model."""

    name: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int = 32


LLAMA_3 = Model("Llama-3.1-8B", 4096, 32, 8, 128)
LLAMA_2 = Model("Llama-2-7B", 4096, 32, 32, 128)
SMOLLM2 = Model("SmolLM2-135M", 576, 9, 3, 64, 30)


class Flops(NamedTuple):
    """FLOPs per cached token and layer, all heads."""

    keys: float
    scores: float
    values: float


class Cache(NamedTuple):
    """One kind of cache of a model. All numbers are per token and layer, means over the layers."""

    name: str  # what the tables call it
    model: Model
    stored: float  # bytes in a layer's own pages
    read: float  # bytes that its attention reads, those in earlier layers' pages included
    fetched: float  # the same, as often as kv heads fetch them
    key_width: float  # channels that a kv head's key is rematerialized from; 0: keys themselves are cached
    value_width: float  # channels that a kv head's values are read from
    unpacked: float  # channels unpacked, by all kv heads together
    unpack: Unpack  # by which instructions
    # Whether all kv heads read one latent. Sums of so many channels do not fit into registers, so values are
    # rematerialized like keys, not absorbed.
    shared: bool = False

    def rows(self, query_len: int, multiple: int) -> int:
        """Queries of a kv head, padded to a multiple."""
        return -(-self.model.heads // self.model.kv_heads * query_len // multiple) * multiple

    def flops(self, query_len: int = 1, multiple: int = 1) -> Flops:
        """FLOPs of a decode step's attention, its rows padded to a multiple."""
        kv_heads, size = self.model.kv_heads, self.model.head_size
        rows = self.rows(query_len, multiple)
        scores = 2.0 * kv_heads * rows * size
        values = 2.0 * kv_heads * rows * self.value_width
        if self.shared:
            values = 2.0 * kv_heads * self.value_width * size + scores
        return Flops(2.0 * kv_heads * self.key_width * size, scores, values)


def kv_cache(model: Model, bits: int) -> Cache:
    """Keys and values themselves: 16 bits; 8, FP8 without scales; or 4 with a scale and a zero point per head."""
    stream = StreamFormat(model.kv_heads, model.head_size, bits, model.head_size)
    size = 2 * stream.code_bytes if bits == 8 else PageLayout((stream, stream), 16).bytes_per_token
    name = {16: "16-bit KV", 8: "FP8 KV", 4: "int4 KV"}[bits]
    unpacked = 2 * model.kv_heads * model.head_size if bits == 4 else 0
    return Cache(name, model, size, size, size, 0, model.head_size, unpacked, WORDS)


def allocation(model: Model, bits: int) -> LayerAllocation:
    """The bits of a layer's channels: the package's budget, shared out as `xquant plan` expects it."""
    return expected_allocation(model.hidden_size, model.kv_heads, model.head_size, bits, joint_kv=False)


def latent_cache(name: str, model: Model, unpack: Unpack, *, calibrated: bool = False, **settings: Any) -> Cache:
    """A cache of this package, by its settings."""
    parsed = XQuantSettings.model_validate({"cache": "latent", **settings})
    shapes = [LayerShape(i, model.hidden_size, model.kv_heads, model.head_size) for i in range(model.layers)]
    runs = allocation(model, parsed.bits.key) if calibrated else None
    formats = layer_formats(parsed, shapes, None if runs is None else dict.fromkeys(range(model.layers), runs))

    def width(form: LayerFormat, stream: int) -> int:
        return form.streams[stream].width if runs is None else sum(channels for _, channels in runs[stream][0])

    shared = formats[0].streams[0].num_heads != model.kv_heads
    totals = [0.0] * 4
    for form in formats:
        # Terms that add (a chain of X) have scales of their own: each is multiplied by itself.
        terms = [form, *(formats[i] for i in form.reads)]
        widths = [sum(width(term, stream) for term in terms) for stream in (0, -1)]
        parts = (form.bytes_per_token, sum(term.bytes_per_token for term in terms), *widths)
        totals = [total + part / model.layers for total, part in zip(totals, parts, strict=True)]
    stored, read, key, value = totals
    # One stream is unpacked once for keys and values together.
    unpacked = model.kv_heads * (key if len(formats[0].streams) == 1 else key + value)
    fetched = model.kv_heads * read if shared else read
    return Cache(name, model, stored, read, fetched, key, value, unpacked, unpack, shared)


def caches(model: Model) -> list[Cache]:
    """All kinds that the page compares, the 16-bit cache first."""
    chain: dict[str, Any] = {"cache": "x", "method": "xquant-cl", "bits": 2, "anchor_interval": 4, "first_layers": 1}
    return [
        *(kv_cache(model, bits) for bits in (16, 8, 4)),
        latent_cache("per head, 4 bits, by words", model, WORDS),
        latent_cache("per head, 4 bits", model, TABLE),
        latent_cache("per head, calibrated 2", model, TWO_PLANES, calibrated=True, bits=2),
        latent_cache("joint, 4 bits", model, TABLE, basis="joint"),
        latent_cache("X, 4 bits", model, TABLE, cache="x"),
        latent_cache("chain of X, 2 bits", model, TABLE, **chain),
    ]
