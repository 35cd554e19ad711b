"""The command that serves what a plan has worked out."""

import json
import shlex
from pathlib import Path
from typing import Any

from xquant_vllm.planning.caches import CHAIN, HEAD, KIVI, PLAIN, Kind
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.planning.serving import Serving
from xquant_vllm.scheme.factor_header import PYTHON_DOCS


def command(kind: Kind, model: PlannedModel, serving: Serving) -> str:
    """To type: `vllm serve`, and before it what makes a calibrated folder.

    Args:
        kind: of the cache.
        model: the model.
        serving: how it is served.
    """
    if not kind.calibrated:
        told = kind.settings
        if kind.method == HEAD and model.hidden_size >= 2 * model.kv_heads_of_rank(serving.ranks) * model.head_size:
            del told["cache"]  # is what is cached anyway
        return _serve(model.name, kind, told, serving)
    folder = f"{Path(model.name.rstrip('/')).name}-{kind.method}-{kind.bits}"
    words = ["xquant", "factorize", model.name, "--out", folder, "--calibration", PYTHON_DOCS]
    words += ["--bits", str(kind.bits)]
    if kind.method == CHAIN:
        words += ["--method", "xquant-cl"]
    else:
        words += ["--basis", "head" if kind.method == HEAD else "joint"]
    return f"{shlex.join(words)} && {_serve(folder, kind, {}, serving)}"


def serve_folder(folder: str, serving: Serving) -> str:
    """To serve a folder of factors, which has everything built in."""
    return _serve(folder, Kind(HEAD, 4, True), {}, serving)


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
    words += ["--kv-cache-memory-bytes", str(serving.memory), "--max-model-len", str(serving.context)]
    if serving.ranks > 1:
        words += ["--tensor-parallel-size", str(serving.ranks)]
    if serving.batched_tokens is not None:
        words += ["--max-num-batched-tokens", str(serving.batched_tokens)]
    return shlex.join(words)
