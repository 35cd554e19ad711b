"""The last step of ``xquant factorize``: what the folder loses is measured and written into its header."""

from collections.abc import Callable
from pathlib import Path

import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.tasks.certify import certify
from xquant_vllm.evaluation.tasks.held_out import held_out
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.offline.factorize import FactorizeOptions, Finish, write_header
from xquant_vllm.offline.progress import say
from xquant_vllm.scheme.certificate import Certificate
from xquant_vllm.scheme.factor_header import FactorHeader


def certifying(
    options: FactorizeOptions,
    text: str | None,
    *,
    demanded: bool,
    judge: Callable[[Certificate], None] = lambda _: None,
) -> Finish:
    """What measures a folder before it takes its name.

    Args:
        options: that the folder is made with.
        text: a file to measure on; None for what the calibration text has left, or the package's own.
        demanded: refuse where it cannot be measured, instead of saying so.
        judge: called with what was found; may refuse it.
    """

    def finish(folder: Path, header: FactorHeader) -> FactorHeader:
        try:
            checkpoint = open_checkpoint(folder)
            device = torch.device(options.device)
            name, windows = held_out(checkpoint, text, options.calibration, options.calibration_tokens, device)
            found = certify(checkpoint, header, name, windows, device)
        except RefusedError as error:
            if demanded:
                raise
            reason = str(error).removeprefix("xquant: ")
            say(f"what it loses was not measured: {reason}")
            return header
        judge(found)
        return write_header(folder, header.model_copy(update={"certificate": found}))

    return finish
