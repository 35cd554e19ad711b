"""The command that serves what a plan has worked out."""

import json
import shlex
from typing import Any

from xquant_vllm.planning.caches import CHAIN, HEAD, JOINT, KIVI, PLAIN, Kind
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.planning.serving import Serving
from xquant_vllm.scheme.calibration.choice import NONE
from xquant_vllm.scheme.calibration.texts import MIXED_TEXT


def command(kind: Kind, model: PlannedModel, serving: Serving) -> str:
    """To type: `vllm serve`, or `xquant serve` where the first start is to calibrate.

    Args:
        kind: of the cache.
        model: the model.
        serving: how it is served.
    """
    if kind.calibrated:
        return _serve_calibrated(kind, model, serving)
    told = kind.settings
    if kind.method == HEAD and model.hidden_size >= 2 * model.kv_heads_of_rank(serving.ranks) * model.head_size:
        del told["cache"]  # is what is cached anyway
    if kind.method in (HEAD, JOINT, CHAIN) and kind.bits <= (3 if kind.method == HEAD else 4):
        told["calibration"] = NONE
    return _serve(model.name, kind, told, serving)


def serve_folder(folder: str, serving: Serving) -> str:
    """To serve a folder of factors, which has everything built in."""
    return _serve(folder, Kind(HEAD, 4, True), {}, serving)


def _serve_calibrated(kind: Kind, model: PlannedModel, serving: Serving) -> str:
    words = ["xquant", "serve", model.name, "--bits", str(kind.bits)]
    if kind.method == CHAIN:
        words += ["--method", "xquant-cl"]
    else:
        words += ["--basis", "head" if kind.method == HEAD else "joint"]
    words += ["--calibration", MIXED_TEXT]
    if serving.hot is not None:
        words += ["--additional-config", json.dumps({"xquant": {"hot": serving.hot}})]
    return shlex.join(words + _of_vllm(serving))


def _serve(model: str, kind: Kind, settings: dict[str, Any], serving: Serving) -> str:
    words = ["vllm", "serve", model]
    if kind.method != PLAIN:
        backend = "kivi" if kind.method == KIVI else "xquant"
        words += ["--attention-backend", backend]
        told = dict(settings)
        if serving.hot is not None and backend == "xquant":
            told["hot"] = serving.hot
        if told:
            words += ["--additional-config", json.dumps({backend: told})]
    return shlex.join(words + _of_vllm(serving))


def _of_vllm(serving: Serving) -> list[str]:
    words = ["--kv-cache-memory-bytes", str(serving.memory), "--max-model-len", str(serving.context)]
    if serving.ranks > 1:
        words += ["--tensor-parallel-size", str(serving.ranks)]
    if serving.batched_tokens is not None:
        words += ["--max-num-batched-tokens", str(serving.batched_tokens)]
    return words
