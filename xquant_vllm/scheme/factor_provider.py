"""Where a layer's bases come from: the model folder's factor file, the user's cache, or a computation."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.projection.ahead import AheadPool
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.factor_file import (
    FACTORS_FILE,
    HEADER_FILE,
    bases_from,
    dtype_name,
    head_fingerprints,
    layer_shapes,
    layer_tensors,
)
from xquant_vllm.projection.joint_kv import JointKVBasis, factorize_joint_kv
from xquant_vllm.projection.layer import factorize_layer
from xquant_vllm.projection.predicted import PredictedLink
from xquant_vllm.scheme.factor_cache import FactorCache, Shapes
from xquant_vllm.scheme.factor_cache_folder import cache_folder
from xquant_vllm.scheme.factor_conflicts import refuse_factors
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.factor_reader import Bases, read_layer, read_link
from xquant_vllm.scheme.layer_weights import HeadShard, LayerWeights, spec_of
from xquant_vllm.scheme.settings import XQuantSettings

# Of the rotation of every joint latent.
_JOINT_KV_SEED = 10395


class FactorProvider:
    """Gives every layer its bases.

    Use as a context to have announced layers prepared ahead, in threads of their own.
    """

    def __init__(
        self,
        settings: XQuantSettings,
        folder: Path | None,
        header: FactorHeader | None,
        shard: HeadShard | None,
        model: str | None = None,
    ) -> None:
        """Prepare.

        Args:
            settings: the settings, with the folder's defaults in them.
            folder: the model's folder if it has factors.
            header: their header, or None.
            shard: this rank's kv heads; None if it holds all.
            model: what the user calls the model, noted in the cache.
        """
        self._model = model
        self._settings, self._folder, self._header, self._shard = settings, folder, header, shard
        self._cache = FactorCache(cache_folder()) if settings.factor_cache else None
        self._origins: Counter[str] = Counter()
        self._pool: AheadPool[LayerWeights, Bases | JointKVBasis] = AheadPool(self._produce)

    def __enter__(self) -> "FactorProvider":
        """Start the threads. PyTorch computes with one thread until they are stopped."""
        self._pool.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the threads."""
        self._pool.__exit__(*exception)

    def announce(self, layers: Iterable[LayerWeights]) -> None:
        """Name the layers that will be asked for, in order, so that they can be prepared ahead."""
        self._pool.announce(layer for layer in layers if not (layer.together and self._holds_joint_kv))

    def layer_factors(self, layer: LayerWeights) -> Bases:
        """Key basis and value basis of a layer, on the device of its weights.

        Raises:
            SettingsError: the model folder has factors, but not of these weights.
        """
        bases = self._pool.take(layer)
        assert isinstance(bases, tuple)
        return bases

    def joint_kv_basis(self, layer: LayerWeights) -> JointKVBasis:
        """The data-free basis of a layer's keys and values together, on the device of its weights."""
        basis = self._pool.take(layer)
        assert isinstance(basis, JointKVBasis)
        return basis

    def allocation(self, layer_index: int, num_kv_heads: int) -> LayerAllocation | None:
        """Bits of a layer's channels on this rank if the model folder's factors are calibrated, else None."""
        if self._header is None or layer_index >= self._header.source.layers:
            return None
        return self._header.allocation_of(layer_index, self._heads(num_kv_heads))

    @property
    def _holds_joint_kv(self) -> bool:
        return self._header is not None and self._header.joint_kv

    def layer_link(self, layer: LayerWeights, layers_of_group: int) -> PredictedLink | None:
        """A layer's calibrated joint latent, on the device of its weights; None if the model folder has none.

        Args:
            layer: the layer's weights.
            layers_of_group: layers of the chain's group so far, this one included.

        Raises:
            SettingsError: the model folder has such latents, but not of these weights.
        """
        if self._header is None or self._folder is None or not self._header.joint_kv:
            return None
        self._check(layer, self._header)
        link = read_link(self._folder, layer.layer_index, layers_of_group, self._header)
        self._origins["read"] += 1
        device = layer.key.device
        return PredictedLink(
            link.down.to(device),
            link.up_key.to(device),
            link.up_value.to(device),
            None if link.prediction is None else link.prediction.to(device),
        )

    def describe(self, seconds: float) -> str:
        """Where the factors came from, for the log."""
        if self._header is not None and self._folder is not None and self._origins["read"]:
            calibration = self._header.calibration
            how = "data-free" if calibration is None else f"calibrated on {calibration.tokens} tokens"
            return f"factors read from {self._folder / FACTORS_FILE} ({how}) in {seconds:.1f} s"
        cached, computed = self._origins["cached"], self._origins["computed"]
        if cached and computed:
            return f"factors of {cached} layers cached, of {computed} computed in {seconds:.1f} s"
        if not cached and not computed:  # pages of X
            return f"weights prepared in {seconds:.1f} s"
        return f"factors cached, read in {seconds:.1f} s" if cached else f"factors computed in {seconds:.1f} s"

    def _produce(self, layer: LayerWeights) -> Bases | JointKVBasis:
        device = layer.key.device
        with torch.no_grad():
            if layer.together:
                joint = self._joint_kv(layer)
                return JointKVBasis(joint.down.to(device), joint.lift.to(device))
            bases = self._data_free(layer) if self._header is None else self._from_file(layer, self._header)
        key, value = (LatentBasis(basis.down.to(device), basis.up.to(device)) for basis in bases)
        return key, value

    def _data_free(self, layer: LayerWeights) -> Bases:
        spec, heads = spec_of(self._settings, layer.key.dtype), layer.num_kv_heads
        shapes = layer_shapes(0, layer.key.shape[1], heads, layer.head_size, spec.kind, spec.dtype)
        tensors = self._cached(
            layer,
            f"{spec} {heads}",
            shapes,
            lambda: layer_tensors(0, *factorize_layer(layer.key, layer.value, heads, spec)),
        )
        return bases_from(0, tensors)

    def _joint_kv(self, layer: LayerWeights) -> JointKVBasis:
        outliers, rotate = self._settings.outlier_channels.key, self._settings.rotate
        hidden_size, width, dtype = layer.key.shape[1], 2 * layer.key.shape[0], layer.key.dtype
        shapes = {"down": (dtype, (1, hidden_size, width)), "lift": (torch.float32, (width, hidden_size))}

        def compute() -> dict[str, torch.Tensor]:
            basis = factorize_joint_kv(
                layer.key, layer.value, outlier_channels=outliers, rotate=rotate, seed=_JOINT_KV_SEED, dtype=dtype
            )
            return {"down": basis.down, "lift": basis.lift}

        tensors = self._cached(layer, f"joint {outliers} {rotate}", shapes, compute)
        return JointKVBasis(tensors["down"], tensors["lift"])

    def _cached(
        self, layer: LayerWeights, recipe: str, shapes: Shapes, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Tensors from the cache, or computed and kept there."""
        path = None
        if self._cache is not None:
            path = self._cache.path(recipe, layer.key, layer.value)
            cached = None if path is None else self._cache.load(path, shapes)
            if cached is not None:
                self._origins["cached"] += 1
                return cached
        tensors = compute()
        if self._cache is not None and path is not None:
            self._cache.store(path, tensors, self._about(layer))
        self._origins["computed"] += 1
        return tensors

    def _about(self, layer: LayerWeights) -> dict[str, Any]:
        """What an entry of the cache is of, for people."""
        settings = self._settings
        made_with = {
            "basis": "joint, keys and values" if layer.together else settings.basis,
            "outlier_channels": settings.outlier_channels.model_dump(),
            "rotate": settings.rotate,
            "dtype": dtype_name(layer.key.dtype),
        }
        if layer.together:
            made_with["outlier_channels"] = {"key": settings.outlier_channels.key, "value": 0}
        return {"model": self._model, "layer": layer.layer_index, "settings": made_with}

    def _from_file(self, layer: LayerWeights, header: FactorHeader) -> Bases:
        assert self._folder is not None
        heads = self._check(layer, header)
        key, value = read_layer(self._folder, layer.layer_index, header)
        self._origins["read"] += 1
        if layer.num_kv_heads == header.source.kv_heads:
            return key, value
        return _of_heads(key, heads), _of_heads(value, heads)

    def _heads(self, num_kv_heads: int) -> slice:
        """Which of the model's kv heads this rank holds."""
        first = 0 if self._shard is None else self._shard.first
        return slice(first, first + num_kv_heads)

    def _check(self, layer: LayerWeights, header: FactorHeader) -> slice:
        """Refuse weights that the file is not made from; which of its kv heads this rank holds."""
        assert self._folder is not None
        index, source = layer.layer_index, header.source
        shard = self._shard or HeadShard(0, layer.num_kv_heads)
        here = (shard.total, layer.head_size, layer.key.shape[1])
        made_of = (source.kv_heads, source.head_size, source.hidden_size)
        if here != made_of or index >= source.layers:
            raise refuse_factors(
                self._folder / HEADER_FILE,
                f"is of another model: it is made of {source.layers} layers with {made_of[0]} kv heads of {made_of[1]} "
                f"and hidden size {made_of[2]}, but layer {index} has {here[0]} of {here[1]} and {here[2]}",
                header,
            )
        heads = self._heads(layer.num_kv_heads)
        if head_fingerprints(layer.key, layer.value, layer.num_kv_heads) != source.fingerprints[index][heads]:
            raise refuse_factors(
                self._folder / HEADER_FILE,
                f"is stale: the key and value weights of layer {index} are not those that it is made from",
                header,
            )
        return heads


def _of_heads(basis: LatentBasis, heads: slice) -> LatentBasis:
    return LatentBasis(basis.down[heads].contiguous(), basis.up[heads].contiguous())
