"""Seams of vLLM's platform class: the check of a finished configuration, the first layer of a model, and backend
selection on the CPU.
"""

from pkgutil import resolve_name
from typing import Any

from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import BACKEND_NAME, BACKENDS, selected_backends

_WRAPPED = "_xquant_wrapped"


def wrap_platform() -> None:
    """Wrap the current platform's class methods, once per process."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if platform.__dict__.get(_WRAPPED):
        return
    setattr(platform, _WRAPPED, True)
    _wrap_config_check(platform)
    _wrap_layer_construction(platform)
    _wrap_page_alignment(platform)
    if current_platform.is_cpu():
        _wrap_cpu_selection(platform)


def _wrap_config_check(platform: Any) -> None:
    """Refuse impossible configurations where vLLM checks its own, so that the error comes before anything is loaded."""
    original = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(vllm_config)
        for name in selected_backends(vllm_config.attention_config):
            from xquant_vllm.plugin.ranks import write_facts

            with announced():
                resolve_name(BACKENDS[name].check)(vllm_config)
                write_facts(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_layer_construction(platform: Any) -> None:
    """Watch the weights of models whose configuration asks for a backend of this package, whoever serves their layers.

    Every attention layer asks its platform this question while it is built, in every process. A model may choose the
    backends of all of its layers itself: then nothing else of this package would be called.
    """
    original = platform.opaque_attention_op

    def opaque_attention_op(cls: Any) -> bool:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        for name in () if config is None else selected_backends(config.attention_config):
            resolve_name(BACKENDS[name].hook)()
        return original()

    platform.opaque_attention_op = classmethod(opaque_attention_op)


def _wrap_page_alignment(platform: Any) -> None:
    """Let vLLM align the states of hybrid models with pages as they are, and not with pages of keys and values.

    Every worker does so once its layers are loaded.
    """
    original = platform.update_block_size_for_backend

    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        if BACKEND_NAME not in selected_backends(vllm_config.attention_config):
            original(vllm_config)
            return
        from xquant_vllm.plugin.load.cache_spec import pages_beside_states

        with pages_beside_states(vllm_config):
            original(vllm_config)

    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)


def _wrap_cpu_selection(platform: Any) -> None:
    """Let the CPU platform select the backends of this package.

    It knows only its own: for any other it logs a line and silently serves the unquantized cache. What is validated
    here is what the CUDA platform validates for every backend.
    """
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if getattr(selected_backend, "name", None) not in BACKENDS:
            return original(selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            from vllm.config import get_current_vllm_config

            from xquant_vllm.plugin.checks import unsupported_model

            model = get_current_vllm_config().model_config
            with announced():
                raise unsupported_model(
                    f"{model.architecture} ({model.model}) has an attention layer that cannot be served: "
                    f"{'; '.join(reasons)} ({attn_selector_config})",
                    selected_backend.name,
                )
        return selected_backend.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
