"""The metadata builders of an engine, for what looks at all of its layers."""

import weakref
from collections.abc import Sequence
from typing import Any

from xquant_vllm.attention.per_object import per_object


@per_object
def builders_of(compilation_config: Any) -> "weakref.WeakValueDictionary[Sequence[str], Any]":
    """The metadata builders of an engine by the names of their layers; of those vLLM makes twice, the last."""
    return weakref.WeakValueDictionary()
