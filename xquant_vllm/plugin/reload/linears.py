"""The linear layers that surgery works on, while new weights are loaded into them."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor


class _Waiting(UnquantizedLinearMethod):
    """In place of a layer's method while its weights are loaded: surgery comes before a kernel may pack them.

    Attributes:
        loaded: whether all elements of the layer's tensors have been loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weights as they were loaded."""
        info = get_layerwise_info(layer)
        self.loaded = info.load_numel >= (info.load_numel_total or 0)


class Linear:
    """A linear layer of an attention module that is not quantized."""

    def __init__(self, name: str, layer: Any) -> None:
        """Note the layer's tensors before surgery and before a kernel packs them: shapes, dtypes and loaders."""
        self.name = name
        self._layer = layer
        self._made = {name: to_meta_tensor(tensor) for name, tensor in layer._parameters.items() if tensor is not None}
        self._method: Any = layer.quant_method
        self._waiting: _Waiting | None = None
        self._kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    @property
    def loaded(self) -> bool:
        """Whether all of its weights were loaded since :meth:`open`."""
        return self._waiting is not None and self._waiting.loaded

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(tensor.device for tensor in self._layer._parameters.values() if tensor is not None)

    def open(self) -> None:
        """Make room for weights as the model has them; what is served now is kept beside it."""
        layer, device = self._layer, self.device
        self._kept = (dict(layer._parameters), {name: vars(layer)[name] for name in _plain(layer)})
        for name, made in self._made.items():
            room: Any = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=device)
            room.__class__ = made.__class__
            room.__dict__.update(made.__dict__)
            layer._parameters[name] = room
        self._waiting = _Waiting()
        layer.quant_method = self._waiting

    def close(self) -> None:
        """Surgery comes next: the layer has its own method again."""
        self._layer.quant_method = self._method

    def process(self) -> None:
        """Have a kernel take the weights, as after the first loading."""
        self._method.process_weights_after_loading(self._layer)
        if hasattr(self._layer, "update_param_tp_status"):
            self._layer.update_param_tp_status()

    def forget(self) -> None:
        """Free what was served before."""
        self._kept, self._waiting = ({}, {}), None

    def put_back(self) -> None:
        """Serve again what was served before."""
        layer = self._layer
        parameters, plain = self._kept
        layer._parameters.clear()
        layer._parameters.update(parameters)
        for name in _plain(layer):
            del vars(layer)[name]
        vars(layer).update(plain)
        self.forget()


def lost_weights(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Weights that a model says to have loaded, of layers that are being reloaded and got nothing.

    Args:
        model: the model.
        names: of parameters, as its ``load_weights`` returns them.
    """
    modules, lost = dict(model.named_modules()), []
    for name in names:
        module = modules.get(name.rpartition(".")[0])
        info = None if module is None else get_layerwise_info(module)
        if info is not None and info.can_load() and not info.load_numel:
            lost.append(name)
    return sorted(lost)


def _plain(layer: Any) -> list[str]:
    return [name for name in vars(layer) if name not in ("_parameters", "_buffers", "_modules")]
