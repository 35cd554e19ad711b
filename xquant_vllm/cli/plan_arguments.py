"""Arguments of ``xquant plan``."""

import argparse
import re
from pathlib import Path
from typing import Any

from xquant_vllm.cli.help_format import examples

# What imports torch, which takes seconds, is imported when the command runs: not for --help.

_UNITS = {"": 1, "B": 1} | {f"{letter}iB": 1 << 10 * (i + 1) for i, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}B": 10 ** (3 * (i + 1)) for i, letter in enumerate("KMGT")}
_TIMES = {"": 1, "k": 1 << 10, "m": 1 << 20}


def add_plan(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="how many tokens every cache of a model holds in some memory, and what a trace of requests gains from it",
        description="From config.json and the headers of the weights: what every cache takes per token, how many "
        "tokens and requests fit, what it is expected to lose, and one that is recommended, with the command that "
        "serves it. With --trace also what a larger cache is worth on your requests.",
        **examples(
            "xquant plan MODEL --memory 24GiB --context 32k",
            "xquant plan MODEL --memory 24GiB --context 32k --trace requests.jsonl --instances 4",
        ),
    )
    parser.set_defaults(command=_run)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")
    _add_serving(parser.add_argument_group("how it is served"))
    _add_choice(parser.add_argument_group("recommendation"))
    _add_trace(parser.add_argument_group("requests"))
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print the plan as one line of JSON"
    )


def _add_serving(group: Any) -> None:
    group.add_argument(
        "--memory",
        type=_bytes,
        required=True,
        metavar="SIZE",
        help="for the KV cache alone, such as 24GiB, on each rank: on CPUs what VLLM_CPU_KVCACHE_SPACE or "
        "--kv-cache-memory-bytes says, on GPUs what weights and activations leave of --gpu-memory-utilization",
    )
    group.add_argument(
        "--context",
        type=_tokens,
        metavar="N",
        help="tokens of the longest request, --max-model-len; 32k is 32,768 (default: the model's longest)",
    )
    group.add_argument(
        "--hot",
        metavar="SHARE",
        help='memory for hot blocks, as the setting "hot": 20%%, 2GiB, 0 (default: on CPUs 20%% for X, joint latents '
        "and chains, else none)",
    )
    group.add_argument("--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism (default 1)")
    group.add_argument(
        "--device", choices=["cpu", "cuda"], help="where it is served (default: cuda where PyTorch sees a GPU)"
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="of the model (default auto)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=_tokens,
        metavar="N",
        help="of the server; counts for models with sliding windows (default: vLLM's, 2048; GPUs of 70 GiB have 8192)",
    )


def _add_choice(group: Any) -> None:
    group.add_argument(
        "--max-loss",
        type=float,
        metavar="INCREASE",
        help="increase in perplexity that a recommended cache may have on the measured model (default 0.3)",
    )


def _add_trace(group: Any) -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="requests as JSON lines, to find out what a larger cache gains: with hash_ids, vLLM's KV events, or "
        "messages or prompts (docs/plan.md has the forms)",
    )
    group.add_argument("--instances", type=int, default=1, metavar="N", help="servers that share them (default 1)")
    group.add_argument(
        "--prefill-rate", type=float, metavar="TOKENS/S", help="of a request, to know when it ends (default 20000)"
    )
    group.add_argument("--decode-rate", type=float, metavar="TOKENS/S", help="likewise (default 40)")
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="requests that an instance runs at once (default: any number)"
    )
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw hit rates against tokens (needs matplotlib)")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B|)\s*", text, re.IGNORECASE)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; set for example 24GiB")
    return int(float(match[1]) * units[match[2].lower()])


def _tokens(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+)\s*([km]?)\s*", text, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; set for example 32k")
    return int(match[1]) * _TIMES[match[2].lower()]


def _run(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.plan import run

    run(options)
