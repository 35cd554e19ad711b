"""Runs vLLM engines in a process of their own and answers lists of tasks; reads and writes JSON files.

Usage: python engine_process.py REQUEST.json RESULT.json
       python engine_process.py --serve
       python engine_process.py --fork

The request has ``engine`` (arguments of ``vllm.LLM``) and ``tasks``, each a table with ``kind`` and its arguments.
A result is written per task, and the capacity of the KV cache as vLLM allocated it: ``cache_tokens`` in all blocks, and
``capacity``, how many tokens it holds of sequences of ``max_model_len`` (the same, unless layers have windows).

With ``--serve``, engines run one after another: every line of the standard input names a request, a result and a log
file, tab separated; everything printed goes to that log, and the standard output gets one line when the engine is gone.
With ``--fork`` every line has environment variables as JSON behind it, and its engine a process of its own, which is
forked from one that has imported what engines import.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

NUM_LOGITS = 256
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent has ended


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy continuations of all prompts at once, with how many prompt tokens came from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


def prompt_logprobs(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probability of every prompt token but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "logprobs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, prompts, strict=True)
        ]
    }


def next_logits(llm: Any, prompts: list[list[int]], max_tokens: int = 1) -> dict[str, Any]:
    """The largest raw logits of each generated token by token id (engine argument ``logprobs_mode: raw_logits``)."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_LOGITS, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "logits": [
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


def preemptions(llm: Any) -> dict[str, Any]:
    """How often vLLM has preempted a request (engine argument ``disable_log_stats: false``)."""
    return {"count": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")}


def feature(llm: Any, name: str, **arguments: Any) -> dict[str, Any]:
    """A function of ``features/tasks.py``, beside this script."""
    from features import tasks

    return getattr(tasks, name)(llm, **arguments)


def hot_trace(llm: Any, **arguments: Any) -> dict[str, Any]:
    """See ``hot/trace.py``, beside this script."""
    from hot.trace import run_trace

    return run_trace(llm, **arguments)


def hot_turns(llm: Any, **arguments: Any) -> dict[str, Any]:
    """See ``hot/trace.py``, beside this script."""
    from hot.trace import take_turns

    return take_turns(llm, **arguments)


def offloaded(llm: Any, **arguments: Any) -> dict[str, Any]:
    """See ``connectors/offloaded.py``, beside this script."""
    from connectors.offloaded import move_pages

    return move_pages(llm, **arguments)


def hot_counts(llm: Any) -> dict[str, Any]:
    """Rows that were attended from pools of hot blocks and from pages, and tokens that were promoted, on "a GPU"."""
    from xquant_vllm.plugin.hot.gpu import hot_engine

    engine = hot_engine(llm.llm_engine.vllm_config)
    counts = [group.hot_map.counts for group in engine.groups.values()]
    return {
        "hot": sum(of.hot_rows for of in counts),
        "cold": sum(of.cold_rows for of in counts),
        "promoted": sum(of.promoted_tokens for of in counts),
    }


def warm_up(llm: Any) -> int:
    """What a GPU's worker calls before the first request; returns how many batches the layers took."""
    from xquant_vllm.plugin.backend.warm_up import WARM_UP

    config = llm.llm_engine.vllm_config
    batches = WARM_UP.get_warmup_keys(config)
    WARM_UP.compile_many(batches)
    return len(batches)


def gpu_worker(llm: Any) -> dict[str, Any]:
    """See ``gpu_worker/worker.py``, beside this script."""
    from gpu_worker.worker import report

    return report(llm)


def prompt_with_image(llm: Any, **arguments: Any) -> dict[str, Any]:
    """See ``families/images.py``, beside this script."""
    from families.images import prompt_with_image

    return prompt_with_image(llm, **arguments)


def prompt_with_features(llm: Any, **arguments: Any) -> dict[str, Any]:
    """See ``families/images.py``, beside this script."""
    from families.images import prompt_with_features

    return prompt_with_features(llm, **arguments)


KINDS = {
    f.__name__: f
    for f in (
        greedy,
        prompt_logprobs,
        next_logits,
        preemptions,
        feature,
        hot_trace,
        hot_turns,
        offloaded,
        hot_counts,
        warm_up,
        gpu_worker,
        prompt_with_image,
        prompt_with_features,
    )
}

# What an engine imports; none of it decides anything by what is in the environment.
IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)


def start_ray() -> None:
    """Start Ray with two devices, without what an engine does not need."""
    import ray

    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=True)


def run(request_path: str, result_path: str) -> None:
    """Start an engine and answer."""
    if "XQUANT_TEST_GPU_WORKER" in os.environ:
        from gpu_worker.worker import become_gpu_worker

        become_gpu_worker()
    from vllm import LLM

    inspect_here()
    with open(request_path) as file:
        request = json.load(file)
    if request["engine"].get("distributed_executor_backend") == "ray":
        start_ray()
    llm = LLM(**request["engine"])
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "capacity": cache.kv_cache_size_tokens,
        "tasks": [KINDS[task.pop("kind")](llm, **task) for task in request["tasks"]],
    }
    with open(result_path, "w") as file:
        json.dump(result, file)


def clean_up() -> None:
    """Forget the last engine: what vLLM keeps per process must not reach the next one."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from vllm.model_executor.layers import rotary_embedding

    ensure_kv_transfer_shutdown()
    destroy_model_parallel()
    destroy_distributed_environment()
    # LongRoPE decides by the length of the model it was built for.
    rotary_embedding._ROPE_DICT.clear()
    gc.collect()


def inspect_here() -> None:
    """Have vLLM look at model classes in this process: in one of its own it imports all of vLLM again for each.

    That is for GPUs, which must not be touched so early.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def keep_what_all_engines_share() -> None:
    """Have garbage collections, of which every engine makes a dozen, leave out all that is there now.

    That is all of PyTorch and vLLM: to look at them takes longer than the rest of a tiny engine. vLLM itself freezes
    and unfreezes engines; what it freezes here would never be freed. Its CPU kernels for Triton's are registered once,
    and stay: to look for the others in all modules takes as long.
    """
    from vllm.triton_utils import dispatcher

    gc.unfreeze, unfreeze = (lambda: None), gc.unfreeze
    gc.freeze, freeze = (lambda: None), gc.freeze
    unfreeze()
    gc.collect()
    freeze()
    dispatcher.register_kernels = lambda overrides: None


def print_to(log_path: str) -> None:
    """Have everything that is printed from here on go to a file."""
    with open(log_path, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def try_to_run(request_path: str, result_path: str) -> bool:
    """Run an engine, print its error if there is one; whether there was none."""
    try:
        run(request_path, result_path)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return True


def serve() -> None:
    """Run engines one after another in this process."""
    first = True
    with os.fdopen(os.dup(1), "w") as done:
        for line in sys.stdin:
            request_path, result_path, log_path = line.rstrip("\n").split("\t")
            print_to(log_path)
            try_to_run(request_path, result_path)
            clean_up()
            if first:
                keep_what_all_engines_share()
                first = False
            print("done", file=done, flush=True)


def fork() -> None:
    """Run engines one after another, each in a process of its own."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with os.fdopen(os.dup(1), "w") as done:
        for line in sys.stdin:
            request_path, result_path, log_path, environment = line.rstrip("\n").split("\t")
            child = os.fork()
            if not child:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                os.environ.update(json.loads(environment))
                print_to(log_path)
                os._exit(0 if try_to_run(request_path, result_path) else 1)
            _, status = os.waitpid(child, 0)
            print("done", status, file=done, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] in (["--serve"], ["--fork"]):
        serve() if sys.argv[1] == "--serve" else fork()
    else:
        run(*sys.argv[1:])
