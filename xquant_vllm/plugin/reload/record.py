"""What is known of a model that was operated on: enough to take surgery back, and to put it in place again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import set_default_torch_dtype

from xquant_vllm.errors import RefusedError
from xquant_vllm.plugin.reload.changes import Changes
from xquant_vllm.plugin.reload.linears import Linear

_RECORD = "_xquant_record"


class Record:
    """Made before a model is operated on for the first time, and kept with it.

    Attributes:
        vllm_config: vLLM's configuration.
        quantized: whether layers that surgery works on had packed weights, which are gone.
        own_folder: whether the weights that are loaded next are those of the folder that is served.
        model: the model.
        open: whether surgery is taken back, and weights are being loaded.
    """

    def __init__(self, model: nn.Module, owners: Mapping[str, nn.Module], vllm_config: Any, *, quantized: bool) -> None:
        """Note how the model is.

        Args:
            model: the model, its weights loaded, and nothing else done with them.
            owners: the attention modules that will be operated on, by name.
            vllm_config: vLLM's configuration.
            quantized: whether their projections are packed.
        """
        self.vllm_config, self.quantized = vllm_config, quantized
        self.own_folder = self.open = False
        self.model = model
        self._changes = Changes(model)
        linears, others = [], {}
        for owner_name, owner in owners.items():
            for name, module in owner.named_modules():
                if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
                    linears.append(Linear(f"{owner_name}.{name}", module))
                else:
                    others.update({f"{owner_name}.{name}.{of}": x for of, x in module.named_parameters(recurse=False)})
        self._linears, self._others = linears, others
        self._operate: Callable[[], None] = _nothing
        self._impls: list[Any] = []
        self._served: list[Any] = []
        self._values: dict[str, torch.Tensor] = {}

    def close(self, impls: Iterable[Any], operate: Callable[[], None]) -> None:
        """The model has been operated on for the first time.

        Args:
            impls: implementations of the layers.
            operate: operates on the model anew once surgery was taken back and weights were loaded.
        """
        self._changes.close()
        self._impls, self._operate = list(impls), operate
        vars(self.model)[_RECORD] = self

    def take_back(self) -> None:
        """Leave the model as vLLM made it, with room for weights; what is served now is kept."""
        self.open = True
        self._served = [impl.served for impl in self._impls]
        self._values = {name: tensor.detach().clone() for name, tensor in self._others.items()}
        self._changes.exchange()
        for linear in self._linears:
            linear.open()

    def put_back(self) -> None:
        """Serve again what was served before."""
        for linear in self._linears:
            linear.put_back()
        self._changes.exchange()
        for impl, served in zip(self._impls, self._served, strict=True):
            impl.served = served
        for name, value in self._values.items():
            self._others[name].data.copy_(value)
        self._forget()

    def operate(self) -> None:
        """Operate on the model with its new weights; without any, what was served is put back.

        Raises:
            RefusedError: weights of attention modules came in part. What was served is put back.
            XQuantError: the new weights cannot be served. Likewise.
        """
        for linear in self._linears:
            linear.close()
        missing = [linear.name for linear in self._linears if not linear.loaded]
        changed = [name for name, value in self._values.items() if not torch.equal(self._others[name], value)]
        if missing and len(missing) == len(self._linears) and not changed:
            self.put_back()
            return
        try:
            if missing:
                raise RefusedError(
                    f"xquant: the weights that were loaded lack {missing[0]} (and {len(missing) - 1} more projections "
                    "of attention layers), which are factorized together: load all of them, or none"
                )
            self._operate_on_loaded()
        except BaseException:
            self.put_back()
            raise
        self._forget()

    def _operate_on_loaded(self) -> None:
        config, changes = self.vllm_config, Changes(self.model)
        device = self._linears[0].device
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), device:
            try:
                self._operate()
                changes.close()
                for linear in self._linears:
                    linear.process()
            except BaseException:
                changes.close()
                changes.exchange()
                raise
        self._changes = changes

    def _forget(self) -> None:
        for linear in self._linears:
            linear.forget()
        self._served, self._values = [], {}
        self.open = self.own_folder = False


def _nothing() -> None:
    """Nothing was operated on yet."""


def record_of(model: nn.Module) -> Record | None:
    """The record of a model or of the part of it that was operated on; None where nothing was."""
    records = (vars(part).get(_RECORD) for part in model.modules())
    return next((record for record in records if record is not None), None)
