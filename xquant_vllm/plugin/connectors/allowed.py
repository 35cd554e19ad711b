"""Which KV connectors are served: those of which it is known what they do to pages. Any other is refused by name.

A connector that moves keys and values must know what a page is. And pages mean nothing without the factors that they
were made with, so none may hand them to another engine without asking for those: this package's own does, and vLLM's
NixlConnector in the form that this package gives it.
"""

import os
from collections.abc import Iterator
from typing import Any

from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.connectors.names import (
    NIXL_CONNECTOR,
    NIXL_CONNECTOR_MODULE,
    OFFLOADING_CONNECTOR,
    XQUANT_CONNECTOR,
    XQUANT_CONNECTOR_MODULE,
)
from xquant_vllm.plugin.connectors.settings import connector_settings
from xquant_vllm.plugin.drafts import WITHOUT_DRAFT_LAYERS

_INSTEAD = (
    'share pages through a folder, in memory or on a disk, with --kv-transfer-config \'{"kv_connector": '
    f'"{XQUANT_CONNECTOR}", "kv_role": "kv_both", "kv_connector_extra_config": {{"folder": "/dev/shm/pages"}}}}\''
)
# Where vLLM's own connector keeps pages for no other engine; what it calls "tiers" goes by the tokens alone.
_OWN_MEMORY = "CPUOffloadingSpec"
_KNOWN_SETTINGS = ("spec_name", "cpu_bytes_to_use", "block_size", "blocks_per_chunk", "eviction_policy",
                   "store_threshold", "max_tracker_size")  # fmt: skip
# Of vLLM's NixlConnector, what changes nothing about what is read; and what turns its comparison of engines off.
_NIXL_SETTINGS = ("backends", "num_threads", "kv_lease_duration", "engine_ttl", "kv_recompute_threshold")
_NIXL_COMPARES = "enforce_handshake_compat"


def connector_problems(vllm_config: Any) -> Iterator[str]:
    """What about the connector that is asked for is not supported, each with what to do.

    Raises:
        SettingsError: a setting of this package's connector cannot work.
    """
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if getattr(cache, "kv_offloading_size", None) is not None:
        # vLLM makes a connector of it, but later than this is asked.
        yield from _offloading_option(cache)
        return
    name = None if transfer is None else transfer.kv_connector
    if name == XQUANT_CONNECTOR:
        yield from _own(vllm_config, transfer)
    elif name == NIXL_CONNECTOR:
        yield from _nixl(vllm_config, transfer)
    elif name == OFFLOADING_CONNECTOR and not transfer.kv_connector_module_path:
        yield from _offloading(f"the KV connector {name}", transfer.kv_connector_extra_config)
    elif name is not None:
        yield (
            f"the KV connector {name} is not supported: it does not know what pages of this backend hold, nor which "
            f"engines may read them; {_INSTEAD}"
        )


def prepare_connector(vllm_config: Any) -> None:
    """Say where a connector is that this package has a class of, if it is asked for, before vLLM looks for it."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector == NIXL_CONNECTOR:
        transfer.kv_connector_module_path = NIXL_CONNECTOR_MODULE
    elif transfer is not None and transfer.kv_connector == XQUANT_CONNECTOR:
        transfer.kv_connector_module_path = XQUANT_CONNECTOR_MODULE
        # Of a bad file the tokens are computed; vLLM's default is that the request ends with an error.
        transfer.kv_load_failure_policy = "recompute"


def any_connector(vllm_config: Any) -> str | None:
    """The option by which a connector is asked for, or None."""
    if getattr(vllm_config.cache_config, "kv_offloading_size", None) is not None:
        return f"--kv-offloading-size {vllm_config.cache_config.kv_offloading_size}"
    transfer = vllm_config.kv_transfer_config
    named = None if transfer is None else transfer.kv_connector
    return None if named is None else f"the KV connector {named}"


def _own(vllm_config: Any, transfer: Any) -> Iterator[str]:
    yield from _elsewhere(transfer, XQUANT_CONNECTOR_MODULE)
    folder = connector_settings(vllm_config).folder
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise SettingsError(
            f"xquant: kv_connector_extra_config: setting 'folder': {str(folder)!r} cannot work: {existing} is no "
            "folder; set the path of one, or of one that can be made"
        )
    needs = os.X_OK | (os.W_OK if transfer.is_kv_producer else os.R_OK)
    if not os.access(existing, needs):
        raise SettingsError(
            f"xquant: kv_connector_extra_config: setting 'folder': {str(folder)!r} cannot work: this user may not "
            f"{'write to' if needs & os.W_OK else 'read'} {existing}; set another folder, or give the right to this one"
        )
    yield from _with_draft_layers(vllm_config, XQUANT_CONNECTOR)


def _elsewhere(transfer: Any, module: str) -> Iterator[str]:
    """A class of the same name that is none of this package."""
    if transfer.kv_connector_module_path not in (None, module):
        yield (
            f"kv_connector_module_path {transfer.kv_connector_module_path} is not where {transfer.kv_connector} is; "
            "leave it out"
        )


def _with_draft_layers(vllm_config: Any, name: str) -> Iterator[str]:
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in WITHOUT_DRAFT_LAYERS:
        yield (
            f"the KV connector {name} is not supported with speculative decoding by {speculative.method!r}, whose "
            f"draft layers have pages that end a token later; use one of {', '.join(WITHOUT_DRAFT_LAYERS)}"
        )


def _nixl(vllm_config: Any, transfer: Any) -> Iterator[str]:
    """The connector of vLLM between the memories of two engines."""
    from vllm.distributed.nixl_utils import is_nixl_available
    from vllm.platforms import current_platform

    what, settings = f"the KV connector {NIXL_CONNECTOR}", transfer.kv_connector_extra_config
    yield from _elsewhere(transfer, NIXL_CONNECTOR_MODULE)
    if not is_nixl_available():
        yield f"{what} needs the package nixl; install it with `pip install nixl`, or {_INSTEAD}"
    if not settings.get(_NIXL_COMPARES, True):
        yield (
            f"{what} with {_NIXL_COMPARES} false is not supported: engines with other factors would exchange pages; "
            "leave it out"
        )
    for name in sorted(set(settings) - {*_NIXL_SETTINGS, _NIXL_COMPARES}):
        yield f"{what} with {name} is not supported, because it is not known what it does to pages; leave it out"
    device = current_platform.device_type
    if transfer.kv_buffer_device != device:
        yield (
            f"{what} with kv_buffer_device {transfer.kv_buffer_device} is not supported: pages are read from where "
            f"they are; set {device}, or leave it out"
        )
    if transfer.enable_permute_local_kv:
        yield f"{what} with enable_permute_local_kv is not supported: it turns keys, and pages have none; leave it out"
    for option in ("tensor_parallel_size", "pipeline_parallel_size"):
        ranks = getattr(vllm_config.parallel_config, option)
        if ranks > 1:
            flag = f"--{option.replace('_', '-')} {ranks}"
            yield f"{what} is not supported with {flag}, which nobody has tried yet; set 1, or {_INSTEAD}"
    if vllm_config.lora_config is not None:
        yield (
            f"{what} is not supported with --enable-lora: pages of a request depend on its adapter, which another "
            "engine may have in another form; leave one of them out"
        )
    yield from _with_draft_layers(vllm_config, NIXL_CONNECTOR)


def _offloading_option(cache: Any) -> Iterator[str]:
    option = f"--kv-offloading-size {cache.kv_offloading_size}"
    backend = getattr(cache, "kv_offloading_backend", "native")
    if backend != "native":
        yield f"{option} with --kv-offloading-backend {backend} is not supported; leave both out, and {_INSTEAD}"
        return
    from vllm import envs

    if envs.VLLM_USE_SIMPLE_KV_OFFLOAD:
        yield f"{option} with VLLM_USE_SIMPLE_KV_OFFLOAD=1 is not supported; unset VLLM_USE_SIMPLE_KV_OFFLOAD"
        return
    yield from _offloading(option, {})


def _offloading(what: str, settings: Any) -> Iterator[str]:
    """The connector of vLLM between a GPU and its host's memory."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield (
            f"{what} is not supported on CPUs: vLLM's offloading copies between a GPU and its host, and does not start "
            f"on CPUs with a 16-bit cache either; leave it out, and {_INSTEAD}"
        )
        return
    spec = settings.get("spec_name", _OWN_MEMORY)
    if spec != _OWN_MEMORY:
        yield (
            f"{what} with spec_name {spec} is not supported: it hands pages to engines whose factors may be others; "
            f"leave spec_name out, or {_INSTEAD}"
        )
    for name in sorted(set(settings) - set(_KNOWN_SETTINGS)):
        yield f"{what} with {name} is not supported, because it is not known what it does to pages; leave it out"
