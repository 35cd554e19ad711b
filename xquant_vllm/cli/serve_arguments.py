"""Arguments of ``xquant serve``; all others are vLLM's."""

import argparse
from typing import Any

from xquant_vllm.cli.help_format import examples


def add_serve(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model with a quantized cache: vllm serve, with everything set that it needs",
        description="Serve a model with a quantized cache. What is to be calibrated is calibrated at the first start. "
        "The model comes first; options that are not named here are those of vllm serve.",
        usage="xquant serve MODEL [--bits N] [--method M] [--basis B] [--calibration TEXT] [any option of vllm serve]",
        allow_abbrev=False,
        **examples(
            "xquant serve models/smollm2-135m-instruct",
            "xquant serve MODEL --bits 2 --port 8001 --max-model-len 8192",
            "xquant serve MODEL --bits 3 --calibration my_text.txt",
        ),
    )
    parser.set_defaults(command=_run, passes_on=True)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="bits per cached number: 16, 8, 4, 3 or 2, or one for keys and one for values (default 4)",
    )
    parser.add_argument(
        "--method",
        choices=["xquant", "xquant-cl"],
        help="xquant: every layer by itself (default); xquant-cl: a chain of layers, which loses less and is slower",
    )
    parser.add_argument(
        "--basis", choices=["head", "joint"], help="one basis per kv head, or one for all (default: by the model)"
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="auto: calibrate where that loses less (default); none; or a text file to calibrate on, mixed-text or "
        "python-docs",
    )


def _run(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.serve import run

    run(options)
