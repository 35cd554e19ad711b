"""What surgery does to the projections of an attention module, for every kind of pages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.integration.factors import FactorProvider, LayerWeights
from xquant_vllm.integration.formats import LayerFormat
from xquant_vllm.integration.layer_cache import LayerCache
from xquant_vllm.integration.modules import DenseLinear, QueryAndInput
from xquant_vllm.integration.recognize import AttentionParts
from xquant_vllm.integration.settings import XQuantSettings
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.chain import chain_prediction, chain_up_projection, input_up_projection
from xquant_vllm.projection.rematerialize import LayerProjection

# Of the rotation of X: one for all layers, so that deltas add up.
_INPUT_SEED = 2508


@dataclass
class Operation:
    """One module under surgery.

    Attributes:
        parts: its parts.
        form: what its pages shall hold.
        settings: the user's settings.
        factors: gives the bases of latents.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of ``qkv_proj``.
        in_place: whether ``dense`` shares its memory with ``qkv_proj``, or shall replace it.
        lifts: of the layers of a chain so far, by position in the model: ``[width, hidden_size]``.
        position: of this layer.
    """

    parts: AttentionParts
    form: LayerFormat
    settings: XQuantSettings
    factors: FactorProvider
    dense: DenseLinear
    in_place: bool
    lifts: dict[int, torch.Tensor]
    position: int

    @property
    def weight(self) -> torch.Tensor:
        """Of ``dense``."""
        return self.dense.weight.data

    @property
    def key_rows(self) -> slice:
        """Rows of the keys."""
        return slice(self.parts.q_size, self.parts.q_size + self.parts.kv_size)

    @property
    def value_rows(self) -> slice:
        """Rows of the values."""
        return slice(self.key_rows.stop, self.key_rows.stop + self.parts.kv_size)

    def bias_of(self, rows: slice) -> torch.Tensor | None:
        """Bias of key or value heads ``[num_kv_heads, head_size]``, FP32, a copy; None without."""
        shape = self.form.shape
        if self.dense.bias is None:
            return None
        return self.dense.bias.data[rows].float().view(shape.num_kv_heads, shape.head_size).clone()

    def projection(self, up_key: torch.Tensor, up_value: torch.Tensor) -> LayerProjection:
        """The up-projections with all else that the model does to its keys and values."""
        return LayerProjection(
            up_key=up_key,
            up_value=up_value,
            key_bias=self.bias_of(self.key_rows),
            value_bias=self.bias_of(self.value_rows),
            key_norm=self.parts.key_norm,
            rope=self.parts.rope,
        )

    def put(self, qkv_proj: nn.Module) -> None:
        """Replace ``qkv_proj``."""
        self.parts.module.qkv_proj = qkv_proj

    def write_rows(self, down: torch.Tensor) -> None:
        """Overwrite the key and value rows by ``down`` ``[2 * kv_size, hidden_size]``, their bias by 0."""
        rows = slice(self.key_rows.start, self.value_rows.stop)
        self.weight[rows] = down
        if self.dense.bias is not None:
            self.dense.bias.data[rows] = 0
        if not self.in_place:
            self.put(self.dense)


def layer_weights(parts: AttentionParts, form: LayerFormat, weight: torch.Tensor) -> LayerWeights:
    """The key and value rows of ``qkv_proj``'s weight ``[q_size + 2 * kv_size, hidden_size]``, not copied."""
    key, value = weight[parts.q_size :].split(parts.kv_size)
    return LayerWeights(form.shape.index, key, value, form.shape.num_kv_heads, together=form.holds == "joint")


def perform(operation: Operation) -> tuple[LayerCache, nn.Module]:
    """Replace the projections.

    Returns:
        How the layer's cache is written and read, and what stands in for ``qkv_proj`` when it cannot run yet.
    """
    if operation.form.holds == "latent":
        return _to_latents(operation), operation.dense
    if operation.form.holds == "joint":
        return _to_joint_latents(operation), operation.dense
    return _to_input(operation)


def _to_latents(operation: Operation) -> LayerCache:
    """Key and value rows become the down-projections of their own bases."""
    weights = layer_weights(operation.parts, operation.form, operation.weight)
    key, value = operation.factors.layer_factors(weights)
    projection = operation.projection(key.up, value.up)
    operation.write_rows(torch.cat([_rows_of(basis) for basis in (key, value)]))
    return LayerCache(operation.form, projection)


def _rows_of(basis: LatentBasis) -> torch.Tensor:
    """The down-projection as rows of a linear layer."""
    return basis.down.transpose(1, 2).flatten(0, 1)


def _to_joint_latents(operation: Operation) -> LayerCache:
    """Key and value rows become the down-projection of one basis for both; earlier layers of a chain predict it.

    The model folder's calibrated chain is taken if it has one, else the paper's, from the weights alone.
    """
    form, weight = operation.form, operation.weight
    weights = layer_weights(operation.parts, form, weight)
    link = operation.factors.layer_link(weights, len(form.reads) + 1)
    if link is not None:
        cache = LayerCache(form, operation.projection(link.up_key, link.up_value), prediction_matrix=link.prediction)
        operation.write_rows(link.down.T)
        return cache
    key, value = weight[operation.key_rows], weight[operation.value_rows]
    basis = operation.factors.joint_basis(weights)
    if not form.reads:
        operation.lifts.clear()  # nothing later reads what was before an anchor
    earlier = [operation.lifts[position] for position in form.reads]
    operation.lifts[operation.position] = basis.lift
    ups = [chain_up_projection([*earlier, basis.lift], rows, form.shape.num_kv_heads) for rows in (key, value)]
    cache = LayerCache(
        form,
        operation.projection(*ups),
        prediction_matrix=chain_prediction(earlier, basis.down[0]) if earlier else None,
    )
    operation.write_rows(basis.down[0].T)
    return cache


def _to_input(operation: Operation) -> tuple[LayerCache, nn.Module]:
    """Key and value rows go away: the layer input is stored as it is, and they become up-projections."""
    parts, shape, weight = operation.parts, operation.form.shape, operation.weight
    rotation = None
    if operation.settings.rotate:
        rotation = hadamard_rotation(shape.hidden_size, _INPUT_SEED).to(weight.device)
    ups = [
        input_up_projection(weight[rows], shape.num_kv_heads, rotation)
        for rows in (operation.key_rows, operation.value_rows)
    ]
    cache = LayerCache(operation.form, operation.projection(*ups), rotation=rotation)
    heads = -(-shape.hidden_size // shape.head_size)
    padding = heads * shape.head_size - shape.hidden_size
    queries = slice(0, parts.q_size)
    bias = None if operation.dense.bias is None else operation.dense.bias.data[queries].clone()
    dense = DenseLinear(weight[queries].clone(), bias)
    query_proj: Any = dense
    if operation.in_place:
        query_proj = parts.qkv_proj
        query_proj.weight, query_proj.bias = dense.weight, dense.bias
    operation.put(QueryAndInput(query_proj, padding))
    # The module's code and vLLM's split and shape what they take for keys and values by these.
    for owner, name, number in (
        (parts.module, "kv_size", heads * shape.head_size),
        (parts.module, "num_kv_heads", heads),
        (parts.attention, "num_kv_heads", heads),
    ):
        if hasattr(owner, name):
            setattr(owner, name, number)
    return cache, QueryAndInput(dense, padding)
