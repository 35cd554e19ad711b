"""What surgery changes about the modules of a model, found by comparison, so that it can be taken back."""

from collections.abc import MutableMapping
from typing import Any

from torch import nn

# PyTorch's own tables. Tensors are not compared: vLLM exchanges and overwrites them by itself.
_TABLES = ("_parameters", "_buffers", "_modules")
_MISSING: Any = object()


class Changes:
    """The attributes and children that were exchanged between two moments, in all modules of a model.

    It does not matter what surgery does to a kind of modules, as long as it exchanges objects.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note how the model is now."""
        self._seen: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            own = {name: value for name, value in vars(module).items() if name not in _TABLES}
            self._seen += [(vars(module), own), (module._modules, dict(module._modules))]
        self._changed: list[tuple[MutableMapping[str, Any], str, Any]] = []

    def close(self) -> None:
        """Note what is another object by now, and forget the rest."""
        for table, before in self._seen:
            for name in {*before, *table} - set(_TABLES):
                if table.get(name, _MISSING) is not before.get(name, _MISSING):
                    self._changed.append((table, name, before.get(name, _MISSING)))
        self._seen.clear()

    def exchange(self) -> None:
        """Put back what was there at the other of the two moments."""
        exchanged = []
        for table, name, other in self._changed:
            exchanged.append((table, name, table.get(name, _MISSING)))
            if other is _MISSING:
                table.pop(name, None)
            else:
                table[name] = other
        self._changed = exchanged
