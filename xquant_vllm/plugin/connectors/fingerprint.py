"""What tells the pages of an engine from those of any other that would read them differently.

Bytes of a page mean nothing without the matrices and formats that they were made with, and tokens mean other pages in
another model. All of that is hashed as it is once the model is loaded, bit by bit: not what a model is called, nor what
was asked for. Two engines exchange pages if and only if their fingerprints are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xquant_vllm import __version__
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.connectors.names import SHARING_CONNECTORS
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.projection.factor_file import tensor_bytes
from xquant_vllm.scheme.layer_scheme import LayerScheme

# Settings that change nothing about what pages hold.
_NOT_OF_PAGES = {"hot", "factor_cache", "calibration", "quality_probe"}
# Of a model's configuration, what says where it was found and who wrote it.
_NOT_OF_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version")
FINGERPRINT_BYTES = 16


@dataclass
class LoadedWeights:
    """What was seen of an engine's weights.

    Attributes:
        digest: of all of them, in hexadecimal digits; empty until they are there.
    """

    digest: str = ""

    def add(self, module: nn.Module) -> None:
        """Look at parameters and buffers of a module; the order of modules counts."""
        digest = hashlib.sha256(self.digest.encode())
        digest.update(_digest_of({**dict(module.named_parameters()), **dict(module.named_buffers())}))
        self.digest = digest.hexdigest()


@per_object
def loaded_weights(vllm_config: Any) -> LoadedWeights:
    """Of an engine."""
    return LoadedWeights()


def note_weights(vllm_config: Any, *modules: nn.Module) -> None:
    """Look at parameters and buffers, if pages of this engine go by what they are.

    Args:
        vllm_config: vLLM's configuration.
        modules: their owners, in an order that is the same in every engine.
    """
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None or transfer.kv_connector not in SHARING_CONNECTORS:
        return
    for module in modules:
        loaded_weights(vllm_config).add(module)


def fingerprint_parts(vllm_config: Any, pages: Iterable[Any]) -> dict[str, str]:
    """What a fingerprint is made of, each in a form that people can compare.

    Args:
        vllm_config: vLLM's configuration, with the loaded layers.
        pages: what is known of the pages of every KV cache group, as JSON has it.

    Raises:
        UnsupportedError: no layer of this engine is one of this package.
    """
    weights = loaded_weights(vllm_config).digest
    layers = vllm_config.compilation_config.static_forward_context
    schemes = {name: scheme for name, layer in layers.items() if (scheme := _scheme_of(layer)) is not None}
    if not weights or not schemes:
        raise UnsupportedError(
            f"xquant: the connector {vllm_config.kv_transfer_config.kv_connector} moves the pages of "
            "--attention-backend xquant, and no layer of this model has any; set --attention-backend xquant, or leave "
            "--kv-transfer-config out"
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    settings = settings_of(vllm_config).model_dump(mode="json", exclude=_NOT_OF_PAGES)
    return {
        "version": __version__,
        "model": _short({key: x for key, x in model.hf_config.to_dict().items() if key not in _NOT_OF_THE_MODEL}),
        "dtype": f"{model.dtype}, {model.quantization}",
        "weights": weights[:32],
        "factors": _short({name: _digest_of_scheme(scheme) for name, scheme in schemes.items()}),
        "settings": json.dumps(settings, sort_keys=True),
        "pages": _short(list(pages)),
        "rank": f"{parallel.rank} of {parallel.world_size}",
    }


def fingerprint_of(parts: Mapping[str, str]) -> bytes:
    """The fingerprint, ``[16]``."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).digest()[:FINGERPRINT_BYTES]


def different_parts(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Names of the parts that are not the same, for people."""
    return ", ".join(sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)))


def _scheme_of(layer: Any) -> LayerScheme | None:
    return getattr(getattr(layer, "impl", None), "scheme", None)


def _digest_of_scheme(scheme: LayerScheme) -> str:
    """Of the format and of all that latents are multiplied by; bias, norm and RoPE are in the model's own weights."""
    rotation = scheme.rotation
    tensors = {
        "up_key": scheme.projection.up_key,
        "up_value": scheme.projection.up_value,
        "prediction": scheme.prediction_matrix,
        "signs": None if rotation is None else rotation.signs,
        "mix": None if rotation is None else rotation.mix,
    }
    digest = hashlib.sha256(repr(scheme.format).encode())
    digest.update(_digest_of({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    return digest.hexdigest()


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Of names, shapes, dtypes and all bytes, in the order of the names."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        digests = list(threads.map(lambda name: _digest_of_tensor(tensors[name]), names))
    whole = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        whole.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype} ".encode())
        whole.update(digest)
    return whole.digest()


def _digest_of_tensor(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(tensor)).digest()


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
