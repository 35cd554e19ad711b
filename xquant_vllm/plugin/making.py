"""A configuration that is being made, and the arguments that it is made of, which its checks do not see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

Look = Callable[[Any, Any], None]
"""Called with vLLM's ``EngineArgs`` and the configuration that is made of them; may refuse them."""


@dataclass
class _Making:
    arguments: Any
    look: Look
    looked: bool = False

    def look_once(self, vllm_config: Any) -> None:
        if not self.looked:
            self.looked = True
            self.look(self.arguments, vllm_config)


_MAKING: ContextVar[_Making | None] = ContextVar("making", default=None)


@contextmanager
def making(arguments: Any, look: Look) -> Iterator[None]:
    """A configuration is made of these arguments, and is to be looked at once."""
    token = _MAKING.set(_Making(arguments, look))
    try:
        yield
    finally:
        _MAKING.reset(token)


def look_once(vllm_config: Any) -> None:
    """Look at the configuration that is being made, unless that was done; nothing where none is made of arguments."""
    made = _MAKING.get()
    if made is not None:
        made.look_once(vllm_config)
