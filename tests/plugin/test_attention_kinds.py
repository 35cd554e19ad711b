"""Only vLLM's plain attention layers are served; every other kind that the installed vLLM has is known by name.

What vLLM has is read from its syntax, model files included: most of them cannot be imported here.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import subclass_attention_backend, subclass_attention_backend_with_overrides

from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.kivi.plugin.backend import KiviBackend
from xquant_vllm.kivi.plugin.metadata import KiviMetadataBuilder
from xquant_vllm.plugin.attention_kinds import REFUSED_LAYERS, REFUSED_WRAPPERS, layer_problem, wrapper_problem
from xquant_vllm.plugin.backend.backend import XQuantBackend
from xquant_vllm.plugin.backend.metadata import XQuantMetadataBuilder
from xquant_vllm.plugin.load.weight_hook import backend_layers

WRAP = ("subclass_attention_backend", "subclass_attention_backend_with_overrides")


@cache
def _trees():
    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    texts = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    names = ("Attention", *WRAP)
    return {path: ast.parse(text) for path, text in texts.items() if any(name in text for name in names)}


def built_on(root: str) -> set[str]:
    """Names of all classes of vLLM that are built on a class of this name, directly or not."""
    bases = {}
    for tree in _trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                named = [getattr(base, "id", getattr(base, "attr", "")) for base in node.bases]
                bases.setdefault(node.name, set()).update(named)
    found = {root}
    while True:
        more = {name for name, of in bases.items() if of & found} - found
        if not more:
            return found - {root}
        found |= more


def wrapping_functions() -> dict[str, ast.FunctionDef]:
    """The functions of vLLM that derive a backend from another."""
    return {
        node.name: node
        for tree in _trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(call, ast.Call) and getattr(call.func, "id", "") in WRAP for call in ast.walk(node))
    }


def _prefix(function: ast.FunctionDef) -> str | None:
    """The first letters of the names that a function gives; None where its caller says them."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "prefix":
            value = node.value.values[0] if isinstance(node.value, ast.JoinedStr) else node.value
            return value.value
    return None


def test_every_layer_that_vllm_builds_on_its_attention_is_known():
    assert built_on("Attention") == set(REFUSED_LAYERS)


def test_every_function_of_vllm_that_derives_backends_gives_a_known_name():
    functions = wrapping_functions()
    assert len(functions) >= 6
    prefixes = {name: _prefix(function) for name, function in functions.items()}
    # Its callers name it FastPrefill.
    prefixes["create_fast_prefill_custom_backend"] = "FastPrefill"
    unknown = [name for name, prefix in prefixes.items() if not prefix or "not known" in wrapper_problem(prefix + "X")]
    assert not unknown
    known = {f"{layer}_" for layer in REFUSED_LAYERS} | set(REFUSED_WRAPPERS)
    assert all(any(prefix.startswith(start) for start in known) for prefix in prefixes.values())


def test_what_is_not_known_is_named_by_its_class():
    assert "NewAttention, built on vLLM's Attention" in layer_problem(type("NewAttention", (), {}))
    assert "by New_XQuantBackend, in a way" in wrapper_problem("New_XQuantBackend")


def configure(folder, backend, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    given = {"skip_tokenizer_init": True, "max_model_len": 256, "attention_backend": backend, **arguments}
    return EngineArgs(model=str(folder), **given).create_engine_config()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


BACKENDS = [(XQuantBackend, XQuantMetadataBuilder), (KiviBackend, KiviMetadataBuilder)]


@pytest.mark.parametrize(("backend", "builder"), BACKENDS, ids=["xquant", "kivi"])
@pytest.mark.parametrize(
    ("prefix", "problem"),
    [("ChunkedLocalAttention_128_", "attention within chunks"), ("New_", "New_.*in a way not known here")],
)
def test_derived_backends_are_refused_when_the_layer_is_built(tiny, backend, builder, prefix, problem):
    named = rf"{backend.get_name().lower()}: LlamaForCausalLM \(.*\) uses .*{problem}.*not supported"
    derived = type("Derived", (builder,), {"__module__": "vllm.new"})
    with set_current_vllm_config(configure(tiny, backend.get_name())):
        with pytest.raises(UnsupportedError, match=named):
            subclass_attention_backend(prefix, backend, derived)
        with pytest.raises(UnsupportedError, match=named):
            subclass_attention_backend_with_overrides(prefix, backend, {})


@pytest.mark.parametrize(("backend", "builder"), BACKENDS, ids=["xquant", "kivi"])
def test_derived_builders_are_refused(tiny, backend, builder):
    """Also where somebody derives a backend without us noticing."""
    derived = type("ChunkedLocalAttention_Builder", (builder,), {"__module__": "vllm.new"})
    config = configure(tiny, backend.get_name())
    with (
        set_current_vllm_config(config),
        pytest.raises(UnsupportedError, match=r"LlamaForCausalLM .* attention within chunks"),
    ):
        derived(None, ["layer"], config, None)


class Owner(nn.Module):
    """An attention module as far as the search for layers looks at it."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention


def layer(kind=Attention, **arguments):
    return kind(4, 32, 1.0, num_kv_heads=2, prefix="model.layers.0.self_attn.attn", **arguments)


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_classes_built_on_attention_are_refused_and_plain_ones_found(tiny, backend):
    class NewAttention(Attention):
        pass

    with set_current_vllm_config(configure(tiny, backend)):
        (found,) = backend_layers(Owner(layer()), backend.upper())
        assert found[0] == ""
    with set_current_vllm_config(configure(tiny, backend)):
        model = Owner(layer(NewAttention))
        with pytest.raises(UnsupportedError, match=rf"{backend}: attn uses layers of the class NewAttention"):
            backend_layers(model, backend.upper())


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_models_that_choose_all_backends_themselves_are_refused(tiny, backend):
    """As MiMo-V2 and openPangu do, whatever their configuration says."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with set_current_vllm_config(configure(tiny, backend)):
        model = Owner(layer(attn_backend=CPUAttentionBackend))
        named = (
            rf"{backend}: attn \(Attention\) was given the backend CPU_ATTN although {backend.upper()} was asked for"
        )
        with pytest.raises(UnsupportedError, match=named):
            backend_layers(model, backend.upper())
    with set_current_vllm_config(configure(tiny, "CPU_ATTN", block_size=32)):
        assert backend_layers(Owner(layer()), backend.upper()) == []


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_weights_are_watched_as_soon_as_a_layer_is_built(tiny, backend, monkeypatch):
    """Also where none of the layers is ours: nothing else of this package would be called."""
    from vllm.model_executor.model_loader import base_loader, utils
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setattr(base_loader, "process_weights_after_loading", utils.process_weights_after_loading)
    with set_current_vllm_config(configure(tiny, "CPU_ATTN", block_size=32)):
        layer()
        assert base_loader.process_weights_after_loading is utils.process_weights_after_loading
    with set_current_vllm_config(configure(tiny, backend)):
        model = Owner(layer(attn_backend=CPUAttentionBackend))
        with pytest.raises(UnsupportedError, match="although"):
            base_loader.process_weights_after_loading(model, None, None)
