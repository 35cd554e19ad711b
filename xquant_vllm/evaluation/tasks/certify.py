"""Measures what a folder of factors loses."""

import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.engines.offline_engine import OfflineEngine
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.methods import prepare_method
from xquant_vllm.evaluation.tasks.certificate import certificate_of, score_stretches
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.memory import memory_problem
from xquant_vllm.offline.progress import counted_bar
from xquant_vllm.projection.factor_file import DTYPES, dtype_name
from xquant_vllm.scheme.certificate import Certificate
from xquant_vllm.scheme.factor_header import FactorHeader


def certify(
    checkpoint: Checkpoint, header: FactorHeader, text: str, windows: torch.Tensor, device: torch.device
) -> Certificate:
    """Run the model with both caches.

    It computes in FP32, or, where the model does not fit like this, in the dtype that the factors are for.

    Args:
        checkpoint: the folder that the factors are in.
        header: theirs.
        text: name of the text.
        windows: token ids ``[windows, length]``.
        device: where to compute.

    Raises:
        RefusedError: the model cannot be run, or does not fit into memory.
    """
    dtype = _dtype(checkpoint, header, device)
    method = "xquant" if header.settings.chain is None else "xquant-cl"
    prepared = prepare_method(method, MethodOptions(), checkpoint, dtype, windows.shape[1], device)
    engine = OfflineEngine(checkpoint, prepared, dtype, device)
    # The folder has no name yet.
    engine.load("what was written")
    scores = []
    for window in counted_bar(iter(windows), len(windows), "measure", "window"):
        scores += score_stretches(window, engine.reference(window), engine.candidate(window))
    return certificate_of(scores, text, dtype_name(dtype), int(prepared.bytes_per_token))


def _dtype(checkpoint: Checkpoint, header: FactorHeader, device: torch.device) -> torch.dtype:
    problem = None
    for dtype in (torch.float32, DTYPES[header.dtype]):
        problem = memory_problem(checkpoint, dtype, device, "measuring")
        if problem is None:
            return dtype
    raise RefusedError(f"xquant: {problem}")
