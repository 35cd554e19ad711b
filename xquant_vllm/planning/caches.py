"""The caches that a plan compares, and the pages that each makes: from the package's own formats and layouts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE, PageLayout
from xquant_vllm.errors import RefusedError, SettingsError
from xquant_vllm.kivi.pages import KIVI_BITS, ResidualLayout
from xquant_vllm.kivi.plugin.settings import KiviSettings
from xquant_vllm.planning.expected_allocation import expected_allocation
from xquant_vllm.planning.page_groups import LayerPages
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.planning.serving import Serving
from xquant_vllm.scheme.formats import LayerFormat, LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings

PLAIN = "16bit"
HEAD, JOINT, X, CHAIN, KIVI = "xquant", "joint", "x", "xquant-cl", "kivi"
DATA_FREE_BITS = (8, 4, 3, 2)

# What the server is told of each method, beside its bits.
_SETTINGS: dict[str, dict[str, Any]] = {
    HEAD: {"cache": "latent"},
    JOINT: {"cache": "latent", "basis": "joint"},
    X: {"cache": "x"},
    CHAIN: {"method": "xquant-cl"},
}
_NO_CHAIN = "a chain reads the pages of earlier layers, and layers with windows have block tables of their own"


@dataclass(frozen=True)
class Kind:
    """One row of a plan, before anything is computed.

    Attributes:
        method: its name.
        bits: per cached number.
        calibrated: whether the factors are fitted to a text.
    """

    method: str
    bits: int
    calibrated: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the server is told."""
        if self.method == KIVI:
            return {"bits": self.bits}
        return {} if self.calibrated else {"bits": self.bits, **_SETTINGS.get(self.method, {})}


@dataclass(frozen=True)
class Pages:
    """What a cache keeps on a rank.

    Attributes:
        layers: the pages of every layer, in order; of KIVI the residuals follow.
        bytes_per_token: of a token's slots in all layers.
        formats: of every layer; empty where no layer holds latents or X.
    """

    layers: tuple[LayerPages, ...]
    bytes_per_token: int
    formats: tuple[LayerFormat, ...] = field(default=())


def kinds(model: PlannedModel) -> Iterator[Kind]:
    """All caches that a plan for a model compares, the 16-bit cache first."""
    yield Kind(PLAIN, 16)
    # Multi-head attention: the layer input is narrower than keys and values.
    narrow = model.hidden_size < 2 * model.kv_heads * model.head_size
    for method in (HEAD, JOINT, *((X,) if narrow else ()), CHAIN):
        # Of a single head the joint basis of keys is that of the head.
        if method != JOINT or model.kv_heads > 1:
            yield from (Kind(method, bits) for bits in DATA_FREE_BITS)
        if method != X:
            yield from (Kind(method, bits, True) for bits in DATA_FREE_BITS)
    yield from (Kind(KIVI, bits) for bits in KIVI_BITS)


def pages(kind: Kind, model: PlannedModel, serving: Serving) -> Pages:
    """The pages of a cache.

    Raises:
        SettingsError: the server would refuse the settings.
        RefusedError: it would refuse the model, or ``xquant factorize`` would.
    """
    if kind.method == PLAIN:
        return _plain(model, serving)
    if model.problems:
        raise RefusedError(model.problems[0])
    _check(kind, model, serving)
    if kind.method == KIVI:
        return _kivi(kind, model, serving)
    shapes = layer_shapes(model, serving.ranks)
    allocations = None
    if kind.calibrated:
        joint_kv = kind.method != HEAD
        allocation = expected_allocation(model.hidden_size, model.kv_heads, model.head_size, kind.bits, joint_kv)
        # A rank has its own heads of a latent for each of them.
        mine = slice(None) if joint_kv else slice(model.kv_heads_of_rank(serving.ranks))
        allocations = dict.fromkeys(range(model.layers), tuple(stream[mine] for stream in allocation))
    formats = layer_formats(format_settings(kind), shapes, allocations)
    return of_formats(formats, model, serving)


def format_settings(kind: Kind) -> XQuantSettings:
    """The settings that decide what pages hold; those of a calibrated folder are built into it."""
    told: dict[str, Any] = {"bits": kind.bits, **_SETTINGS[kind.method]}
    return XQuantSettings.model_validate(told)


def layer_shapes(model: PlannedModel, ranks: int) -> list[LayerShape]:
    """Sizes of the layers of a rank."""
    sizes = model.hidden_size, model.kv_heads_of_rank(ranks), model.head_size
    return [LayerShape(index, *sizes, model.keys_normed_together) for index in range(model.layers)]


def of_formats(formats: tuple[LayerFormat, ...], model: PlannedModel, serving: Serving) -> Pages:
    """The pages of layers with these formats."""
    layers = []
    for form, window in zip(formats, model.windows, strict=True):
        layout = PageLayout(form.streams, serving.block_size)
        layers.append(LayerPages(serving.block_size, layout.page_bytes, window))
    return Pages(tuple(layers), sum(form.bytes_per_token for form in formats), formats)


def _check(kind: Kind, model: PlannedModel, serving: Serving) -> None:
    """Refuse what neither the formats nor the model refuse."""
    if model.with_states and kind.method in (CHAIN, KIVI):
        raise RefusedError("it is not served beside layers that keep a state")
    if kind.method == CHAIN and len(set(model.windows)) > 1:
        raise RefusedError(_NO_CHAIN)
    if not kind.calibrated:
        return
    if not model.calibratable:
        raise RefusedError("xquant factorize does not know these weights (quantized, or of another structure)")
    if serving.ranks > 1 and kind.method != HEAD:
        raise RefusedError("its latents do not shard, so it serves --tensor-parallel-size 1; calibrate per head")


def _plain(model: PlannedModel, serving: Serving) -> Pages:
    """Keys and values as the model computes them, or the latents of MLA."""
    if model.mla_width is not None:
        size = model.mla_width * serving.dtype.itemsize
        block = BLOCK_SIZE_MULTIPLE if serving.device == "cpu" else serving.block_size
        layers = [LayerPages(block, block * size, window) for window in model.windows]
        return Pages(tuple(layers), size * model.layers)
    layout = plain_layout(model, serving)
    layers = [LayerPages(layout.block_size, layout.page_bytes, window) for window in model.windows]
    return Pages(tuple(layers), layout.bytes_per_token * model.layers)


def plain_layout(model: PlannedModel, serving: Serving) -> ResidualLayout:
    """A layer's page of keys and values in the model's dtype."""
    kv_heads = model.kv_heads_of_rank(serving.ranks)
    return ResidualLayout(kv_heads, model.head_size, serving.dtype, serving.block_size)


def _kivi(kind: Kind, model: PlannedModel, serving: Serving) -> Pages:
    settings = KiviSettings(bits=kind.bits)
    kv_heads = model.kv_heads_of_rank(serving.ranks)
    quantized, residual = settings.layouts(kv_heads, model.head_size, serving.dtype, None)
    layers = [LayerPages(quantized.block_size, quantized.page_bytes, window) for window in model.windows]
    # Padded to a quantized page.
    layers += [LayerPages(residual.block_size, quantized.page_bytes, settings.residual)] * model.layers
    return Pages(tuple(layers), quantized.bytes_per_token * model.layers)


def refused_by(build: Callable[[], Pages]) -> tuple[Pages | None, str | None]:
    """Pages, or in one line why there are none."""
    try:
        return build(), None
    except (SettingsError, RefusedError) as error:
        return None, str(error).splitlines()[0].removeprefix("xquant: ").removeprefix("kivi: ")
