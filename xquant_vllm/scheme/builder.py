"""From a model's key and value weights to how its layers' caches are written and read. Knows no module of any model.

The server exchanges rows of its modules for what this yields, the offline evaluation multiplies by it: both serve the
same function.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.chain import chain_prediction, chain_up_projection, input_up_projection
from xquant_vllm.projection.integer_up import with_integer_up
from xquant_vllm.projection.joint_kv import JointKVBasis
from xquant_vllm.projection.key_norm import KeyNorm
from xquant_vllm.projection.key_scale import KeyScale
from xquant_vllm.projection.predicted import PredictedLink
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.projection.rope import RotaryTable
from xquant_vllm.scheme.factor_reader import Bases
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.layer_scheme import LayerScheme
from xquant_vllm.scheme.layer_weights import LayerWeights
from xquant_vllm.scheme.settings import XQuantSettings

# Of the rotation of X: one for all layers, so that deltas add up.
_INPUT_SEED = 2508


class Factors(Protocol):
    """Gives layers their bases; :class:`xquant_vllm.scheme.factor_provider.FactorProvider` is the server's."""

    def layer_factors(self, layer: LayerWeights) -> Bases:
        """Key basis and value basis of a layer."""

    def joint_kv_basis(self, layer: LayerWeights) -> JointKVBasis:
        """The data-free basis of a layer's keys and values together."""

    def layer_link(self, layer: LayerWeights, layers_of_group: int) -> PredictedLink | None:
        """A layer's calibrated joint latent, or None if there is none."""


@dataclass(frozen=True)
class LayerParameters:
    """What a model makes a layer's keys and values with.

    Attributes:
        key: ``[num_kv_heads * head_size, hidden_size]``, as a linear layer stores it, in the serving dtype.
        value: likewise.
        key_bias: ``[num_kv_heads, head_size]``, FP32, or None.
        value_bias: likewise.
        key_norm: norm of the keys, or None.
        rope: rotary table, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    key_norm: KeyNorm | None = None
    rope: RotaryTable | None = None

    def weights(self, form: LayerFormat) -> LayerWeights:
        """The weights, as factors are asked for them."""
        return layer_weights(form, self.key, self.value)

    def up_key(self, up: torch.Tensor) -> torch.Tensor:
        """A key up-projection ``[num_kv_heads, width, head_size]`` with what of the norm goes into it."""
        return up if self.key_norm is None else self.key_norm.into_up(up)

    def projection(self, up_key: torch.Tensor, up_value: torch.Tensor) -> LayerProjection:
        """The up-projections, that of keys from :meth:`up_key`, with all else that is left to do."""
        norm = self.key_norm
        key_bias = self.key_bias if norm is None else norm.into_bias(self.key_bias)
        of_heads = None if norm is None else norm.of_heads
        return LayerProjection(up_key, up_value, key_bias, self.value_bias, of_heads, self.rope)

    @property
    def query_weight(self) -> torch.Tensor | None:
        """What queries are multiplied by, ``[num_kv_heads, head_size]`` FP32, or None."""
        return None if self.key_norm is None else self.key_norm.query_weight


def layer_weights(form: LayerFormat, key: torch.Tensor, value: torch.Tensor) -> LayerWeights:
    """Weights ``[num_kv_heads * head_size, hidden_size]`` of a layer with these pages, not copied."""
    return LayerWeights(form.shape.index, key, value, form.shape.num_kv_heads, together=form.holds == "joint_kv")


class SchemeBuilder:
    """Builds layer after layer, in the order in which they run: later ones may build on earlier ones."""

    def __init__(self, settings: XQuantSettings, formats: Sequence[LayerFormat], factors: Factors) -> None:
        """Prepare for layers of these formats."""
        self._settings, self._formats, self._factors = settings, formats, factors
        # Of the layers of a chain so far, by position in the model: [width, hidden_size].
        self._lifts: dict[int, torch.Tensor] = {}

    def build(self, position: int, parameters: LayerParameters) -> tuple[LayerScheme, torch.Tensor | None]:
        """Build the next layer.

        Args:
            position: of the layer, in the sequence of formats.
            parameters: its weights and what follows them; nothing of them is kept but bias, norm and RoPE.

        Returns:
            How the layer's cache is written and read, and the down-projections that take the place of the key and value
            weights: ``[2 * num_kv_heads * head_size, hidden_size]`` in their dtype; None where pages hold the layer
            input, which goes into the cache as it is.
        """
        form = self._formats[position]
        if form.holds == "latents":
            scheme, down = self._latents(form, parameters)
        elif form.holds == "joint_kv":
            scheme, down = self._joint_kv(position, form, parameters)
        else:
            scheme, down = self._input(form, parameters), None
        return replace(scheme, query_weight=parameters.query_weight), down

    def _latents(self, form: LayerFormat, parameters: LayerParameters) -> tuple[LayerScheme, torch.Tensor | None]:
        """Keys and values have bases of their own."""
        key, value = self._factors.layer_factors(parameters.weights(form))
        key = with_integer_up(LatentBasis(key.down, parameters.up_key(key.up)), form.streams[0])
        scale = KeyScale.of(parameters.key_norm, key.down, parameters.key)
        scheme = LayerScheme(form, parameters.projection(key.up, value.up), key_scale=scale)
        return scheme, torch.cat([_rows_of(basis) for basis in (key, value)])

    def _joint_kv(
        self, position: int, form: LayerFormat, parameters: LayerParameters
    ) -> tuple[LayerScheme, torch.Tensor | None]:
        """One basis for keys and values; earlier layers of a chain predict it.

        Calibrated ones are taken if there are any, else those of the paper's chain, from the weights alone.
        """
        weights = parameters.weights(form)
        link = self._factors.layer_link(weights, len(form.reads) + 1)
        if link is not None:
            projection = parameters.projection(parameters.up_key(link.up_key), link.up_value)
            rows = 2 * form.shape.num_kv_heads * form.shape.head_size
            down = torch.nn.functional.pad(link.down, (0, rows - link.down.shape[1]))
            return LayerScheme(form, projection, prediction_matrix=link.prediction), down.T
        basis = self._factors.joint_kv_basis(weights)
        if not form.reads:
            self._lifts.clear()  # nothing later reads what was before an anchor
        earlier = [self._lifts[before] for before in form.reads]
        self._lifts[position] = basis.lift
        up_key, up_value = (
            chain_up_projection([*earlier, basis.lift], rows, form.shape.num_kv_heads)
            for rows in (parameters.key, parameters.value)
        )
        scheme = LayerScheme(
            form,
            parameters.projection(parameters.up_key(up_key), up_value),
            prediction_matrix=chain_prediction(earlier, basis.down[0]) if earlier else None,
        )
        return scheme, basis.down[0].T

    def _input(self, form: LayerFormat, parameters: LayerParameters) -> LayerScheme:
        """The layer input is stored, and the weights become up-projections."""
        shape = form.shape
        rotation = None
        if self._settings.rotate:
            rotation = hadamard_rotation(shape.hidden_size, _INPUT_SEED).to(parameters.key.device)
        up_key, up_value = (
            input_up_projection(rows, shape.num_kv_heads, rotation) for rows in (parameters.key, parameters.value)
        )
        return LayerScheme(form, parameters.projection(parameters.up_key(up_key), up_value), rotation=rotation)


def _rows_of(basis: LatentBasis) -> torch.Tensor:
    """The down-projection as rows of a linear layer."""
    return basis.down.transpose(1, 2).flatten(0, 1)
