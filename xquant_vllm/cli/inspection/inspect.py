"""``xquant inspect``: what a folder of factors holds, in words, as JSON, and as a picture."""

import argparse
import json
import sys

from xquant_vllm.diagnosis.factors.described import describe_factors
from xquant_vllm.diagnosis.factors.picture import in_words
from xquant_vllm.diagnosis.factors.plot import plot_bits
from xquant_vllm.offline.writable import check_file


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.inspection.arguments` parsed.

    Returns:
        The exit status: 0 if the factors are whole, 1 if not.

    Raises:
        RefusedError: there are no factors, or they cannot be read; or a picture cannot be drawn.
        OSError: the picture cannot be written.
    """
    check_file("--plot", options.plot)
    facts = describe_factors(options.folder)
    lines = [json.dumps(facts)] if options.json else in_words(facts, sys.stdout.encoding)
    print("\n".join(lines), flush=True)
    if options.plot is not None:
        plot_bits(facts, options.plot)
    return 1 if facts["problems"] else 0
