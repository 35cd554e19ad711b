"""What names this package in other options than ``--additional-config``, in the environment, or on disk."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_vllm.plugin.connectors.names import NIXL_CONNECTOR_MODULE, XQUANT_CONNECTOR, XQUANT_CONNECTOR_MODULE
from xquant_vllm.plugin.drafts import WITHOUT_DRAFT_LAYERS
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.plugin.unread.names import KEYS, Lost, keys_inside, named
from xquant_vllm.plugin.unread.variables import about_unread, about_variable, asked_by_variable, unread_variables
from xquant_vllm.projection.factor_file import HEADER_FILE

_XQUANT = BACKEND_NAME.lower()


def lost_elsewhere(arguments: Any, vllm_config: Any, read: Sequence[str], instead: str) -> Iterator[Lost]:
    """What is meant for a backend of this package, and is not read.

    Args:
        arguments: vLLM's ``EngineArgs``, which hold the options as they were given.
        vllm_config: what became of them.
        read: keys of the backends that serve; empty where none does.
        instead: what serves where none does, for the message.
    """
    for name in unread_variables(os.environ):
        yield Lost(about_unread(name), certain=False)
    asked = asked_by_variable(os.environ, KEYS)
    if asked is not None and asked not in read:
        yield Lost(about_variable(asked), certain=False)
    yield from _other_tables(arguments)
    yield from _draft(vllm_config)
    if _XQUANT in read:
        return
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and (
        transfer.kv_connector == XQUANT_CONNECTOR
        or transfer.kv_connector_module_path in (XQUANT_CONNECTOR_MODULE, NIXL_CONNECTOR_MODULE)
    ):
        yield Lost(
            f"the KV connector {transfer.kv_connector} moves pages of this package's backend, but {instead}; add "
            f"--attention-backend {_XQUANT}, or leave the connector out",
            certain=False,
        )
    model = getattr(vllm_config.model_config, "model", None)
    if isinstance(model, str) and os.path.lexists(Path(model) / HEADER_FILE):
        yield Lost(
            f"the factors in {model} have no effect, since {instead}; add --attention-backend {_XQUANT} to serve with "
            "them",
            certain=False,
        )


def _other_tables(arguments: Any) -> Iterator[Lost]:
    """Settings in an option that takes any table, such as ``--hf-overrides``."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name, None)
        if field.name == "additional_config" or not isinstance(value, Mapping | list | tuple):
            continue
        for word in keys_inside(value):
            yield Lost(
                f"{word!r} in --{field.name.replace('_', '-')} is not read; settings are given by --additional-config "
                f"'{{\"{named(word)}\": {{...}}}}'",
                certain=True,
            )


def _draft(vllm_config: Any) -> Iterator[Lost]:
    """A backend for the layers of a draft that has none."""
    speculative = vllm_config.speculative_config
    backend = getattr(getattr(speculative, "attention_backend", None), "name", "").lower()
    if backend in KEYS and speculative.method in WITHOUT_DRAFT_LAYERS:
        yield Lost(
            f'"attention_backend": "{backend}" in --speculative-config has no effect, because drafts by '
            f"{speculative.method!r} have no layers; leave it out",
            certain=False,
        )
