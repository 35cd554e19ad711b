"""vLLM 0.33 has models that write to a layer's cache themselves."""

from types import SimpleNamespace

import pytest

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.backend.backend import PagedBackend
from xquant_vllm.plugin.backend.metadata import refuse_bypass


def test_refused_by_name() -> None:
    off, on = SimpleNamespace(kv_cache_update_bypass=False), SimpleNamespace(kv_cache_update_bypass=True)
    refuse_bypass({"a": off, "b": SimpleNamespace()})  # 0.32 has no such attribute
    with pytest.raises(UnsupportedError, match=r"keys and values of b .*kv_cache_update_bypass"):
        refuse_bypass({"a": off, "b": on})


def test_not_offered() -> None:
    """Models ask the backend first."""
    assert not getattr(PagedBackend, "supports_kv_cache_update_bypass", False)
