"""vLLM's NixlConnector for pages of this package: an engine reads the pages of another one out of its memory.

Before it does, vLLM compares a hash of both engines: of the model's name, its shapes, and the name of the backend.
Pages mean nothing without the factors that they were made with, so here what is compared has the parts of the
fingerprint beside vLLM's hash. All else is vLLM's own.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import (
    NixlBaseConnector,
    NixlPullConnector,
    NixlPullConnectorScheduler,
    NixlPullConnectorWorker,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, group_kernel_blocks

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.connectors.fingerprint import different_parts, fingerprint_parts
from xquant_vllm.plugin.connectors.groups import PageGroup, page_groups, pages_of
from xquant_vllm.plugin.connectors.names import NIXL_CONNECTOR, XQUANT_CONNECTOR
from xquant_vllm.plugin.refusals import announced

# Where vLLM's own hash is among the parts.
_VLLM = "vllm"
_MISMATCH = re.compile(r"compatibility hash mismatch.* Remote: (.*)\. Prefill and decode instances", re.DOTALL)


class NixlConnector(NixlPullConnector):
    """vLLM's, of the same name, whose workers ask for the fingerprint."""

    @announced()
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Prepare one of the two sides.

        Raises:
            UnsupportedError: a layer keeps something else than a page for every block of tokens, or blocks have
                several sizes.
        """
        groups = _groups(kv_cache_config)
        # Not the pull connector's own, which would make a worker of vLLM's, and that one an agent of NIXL.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = NixlPullConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = FingerprintedWorker(vllm_config, self.engine_id, kv_cache_config, groups)


class FingerprintedWorker(NixlPullConnectorWorker):
    """Reads pages only from a rank with the same fingerprint."""

    # vLLM's.
    compat_hash: Any
    xfer_handshake_metadata: Any

    def __init__(
        self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig, groups: Sequence[PageGroup] = ()
    ) -> None:
        """As vLLM's; ``groups`` are the engine's groups of layers."""
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._groups = groups

    @announced()
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the layers' caches; the model is loaded.

        Raises:
            UnsupportedError: none of its layers is one of this package.
        """
        super().register_kv_caches(kv_caches)
        blocks = {name: group_kernel_blocks(cache, self._logical_num_blocks) for name, cache in kv_caches.items()}
        parts = fingerprint_parts(self.vllm_config, pages_of(self._groups, blocks))
        self.compat_hash = compared({_VLLM: self.compat_hash, **parts})
        self.xfer_handshake_metadata = dataclasses.replace(
            self.xfer_handshake_metadata, compatibility_hash=self.compat_hash
        )

    @announced()
    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        """Meet another engine.

        Raises:
            UnsupportedError: its pages say something else; the message names what differs.
        """
        try:
            return super()._nixl_handshake(host, port, *args, **kwargs)
        except RuntimeError as error:
            found = _MISMATCH.search(str(error))
            if found is None:
                raise
            refusal = refusal_of(f"{host}:{port}", self.compat_hash, found.group(1))
        raise refusal


def _groups(kv_cache_config: KVCacheConfig) -> Sequence[PageGroup]:
    groups = page_groups(kv_cache_config, NIXL_CONNECTOR)
    sizes = sorted({group.block_size for group in groups})
    if len(sizes) > 1:
        raise UnsupportedError(
            f"xquant: the connector {NIXL_CONNECTOR} does not support layers with blocks of {sizes[0]} and {sizes[-1]} "
            f"tokens beside each other; leave backend_per_kind out, or use {XQUANT_CONNECTOR}"
        )
    return groups


def compared(parts: Mapping[str, Any]) -> str:
    """What vLLM compares in place of its hash."""
    return json.dumps(parts, sort_keys=True)


def refusal_of(peer: str, ours: str, theirs: str) -> UnsupportedError:
    """Why the pages of another engine are not read.

    Args:
        peer: where it is.
        ours: what this engine is compared by, see :func:`compared`.
        theirs: the other's; a plain hash if it is an engine of vLLM's with another backend.
    """
    try:
        differ = f"which has other: {different_parts(json.loads(ours), json.loads(theirs))}"
    except ValueError:
        differ = "which does not run with --attention-backend xquant"
    return UnsupportedError(
        f"xquant: no pages are read from the engine at {peer}, {differ}; start both with the same model, settings, "
        "--block-size, dtype, number of ranks, and versions"
    )
