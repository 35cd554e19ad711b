"""What engines are asked for by the tests of features, in the engine's process: see ``engine_process.py``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def reload_weights(llm: Any, way: str = "own", folder: str | None = None, **which: Any) -> dict[str, Any]:
    """Ask the running engine to load weights; what it answers, and which folder it names afterwards.

    Args:
        llm: the engine.
        way: ``"own"`` (those of its folder), ``"path"`` (those of another), ``"iterator"``, ``"chunks"`` (as engines
            for weight transfer do), ``"kernel"`` (single parameters in the form that kernels read), or ``"model"`` (its
            own ``load_weights``).
        folder: where the weights are.
        which: see ``_weights``.
    """
    from vllm.model_executor.model_loader import reload

    def in_chunks(model: Any) -> None:
        weights = list(_weights(folder, **which))
        reload.initialize_layerwise_reload(model)
        for part in (weights[::2], weights[1::2]):
            model.load_weights(part)
        reload.finalize_layerwise_reload(model, llm.llm_engine.vllm_config.model_config)

    try:
        if way in ("own", "path"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder} if way == "path" else {})
        elif way in ("iterator", "kernel"):
            arguments = {"weights_iterator": _weights(folder, **which), "is_checkpoint_format": way == "iterator"}
            llm.collective_rpc("reload_weights", kwargs=arguments)
        elif way == "model":
            llm.apply_model(lambda model: model.load_weights(_weights(folder, **which)) and None)
        else:
            llm.apply_model(in_chunks)
        error = None
    except Exception as raised:
        error = str(raised)
    return {"error": error, "model": llm.llm_engine.vllm_config.model_config.model}


def _weights(folder: str | None, names: list[str] | None = None, breaks_after: int | None = None) -> Iterator[Any]:
    """Weights of a checkpoint, as a trainer sends them.

    Args:
        folder: the checkpoint.
        names: parts of names, one of which a weight must have.
        breaks_after: raise after so many.
    """
    from safetensors.torch import load_file

    weights = load_file(Path(folder or "") / "model.safetensors")
    for number, (name, weight) in enumerate(weights.items()):
        if number == breaks_after:
            raise ConnectionError("the trainer is gone")
        if names is None or any(part in name for part in names):
            yield name, weight


def generate_across_reload(llm: Any, prompt: list[int], before: int, total: int, folder: str) -> dict[str, Any]:
    """Greedy tokens of a request that is running while new weights come, after ``before`` of them."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request(
        "running",
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0, max_tokens=total, ignore_eos=True, detokenize=False),
    )
    tokens: list[int] = []
    cut = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
        if cut is None and len(tokens) >= before:
            cut = len(tokens)
            assert reload_weights(llm, "path", folder)["error"] is None
    return {"tokens": tokens, "cut": cut}


def sleep(llm: Any, level: int = 1) -> dict[str, Any]:
    """Sleep and wake up."""
    llm.sleep(level=level)
    llm.wake_up()
    return {}


def adapter(llm: Any, folder: str, number: int, prompt: list[int]) -> dict[str, Any]:
    """Load an adapter; the log-probabilities of a prompt's tokens with it, or what the engine says if it refuses."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(Path(folder).name, number, folder)
    try:
        llm.llm_engine.add_lora(request)
    except Exception as error:
        return {"error": str(error), "logprobs": None}
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False, lora_request=request)
    pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    return {"error": None, "logprobs": [entry[token].logprob for entry, token in pairs]}


def drafted(llm: Any) -> dict[str, Any]:
    """How many tokens were drafted and accepted (engine argument ``disable_log_stats: false``)."""
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        "drafted": counts.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
