"""The process that calibrates: started, listened to, and ended with the server."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import xquant_vllm
from xquant_vllm.errors import RefusedError
from xquant_vllm.scheme.calibration.request import CalibrationRequest

logger = logging.getLogger("vllm.xquant_vllm")

# Not -m, which would look for modules in the folder that the server was started in.
_CODE = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv.pop(1)]; "
    "from xquant_vllm.offline.keep_factors import main; sys.exit(main(sys.argv[1:]))"
)


def calibrate(request: CalibrationRequest, folder: Path, device: str, *, must_fit: bool) -> None:
    """Run the process, and log what it says.

    Args:
        request: what to make.
        folder: where it is kept.
        device: ``"cpu"`` or ``"cuda"``.
        must_fit: refuse a model that will hardly fit into memory.

    Raises:
        RefusedError: it did not come about; the message is the reason alone.
    """
    words = {"factors": vars(request), "folder": str(folder), "device": device, "must_fit": must_fit}
    root = str(Path(xquant_vllm.__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, root, json.dumps(words)],
        # It ends when this is closed, which the system does for a server that is killed.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        text=True,
        errors="replace",
    )
    try:
        last = _listen(process)
        assert process.stdout is not None
        answer = process.stdout.read()
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    refused = _refusal(answer, status, last)
    if refused is not None:
        raise RefusedError(refused)


def _listen(process: "subprocess.Popen[str]") -> str:
    """Log the lines of this package; the last line of any."""
    last = ""
    assert process.stderr is not None
    for line in process.stderr:
        last = line.strip() or last
        if line.startswith("xquant: "):
            logger.info("xquant: calibration: %s", in_setting_words(line.strip()))
    return last


def _refusal(answer: str, status: int, last: str) -> str | None:
    """Why it failed, without the name of this package in front; None if it did not."""
    try:
        content: Any = json.loads(answer)
    except ValueError:
        # Linux kills what asks for more memory than there is.
        likely = ", which looks as if memory ran out" if status == -signal.SIGKILL else ""
        return f"the process that calibrates died with exit status {status}{likely} ({last})"
    return in_setting_words(content["refused"]) if "refused" in content else None


def in_setting_words(message: str) -> str:
    """What the command line would say, in the words of a server's settings."""
    for pattern, words in (
        (r"^xquant: ", ""),
        (r"leave --calibration out for bases from the weights alone", 'set "calibration": "none"'),
        (r"Set --device cuda, or do without calibration", 'Set "calibration": "none" to do without'),
        (r"(?:with )?--calibration ([^\s-]\S*)", r"the calibration text \1"),
        (r"with --calibration\b", "with calibration"),
        (r"set --method xquant --basis head", 'set "method": "xquant", "basis": "head"'),
        (r"--(method|basis|bits) ([\w-]+)", r"the setting '\1': \2"),
    ):
        message = re.sub(pattern, words, message)
    return message
