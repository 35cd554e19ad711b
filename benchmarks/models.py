"""Checkpoints that benchmarks make themselves: SmolLM2 and its likes, and calibrated copies of a model.

They stay where they are for the next run: checkpoints in ``models/``, calibrated copies in ``logs/calibrated``.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

from benchmarks.methods import Method

ROOT = Path(__file__).resolve().parent.parent
CALIBRATED = ROOT / "logs" / "calibrated"
# Half of the text that ships with Python; loads are made of the other half.
_TEXT = "python-docs"


class ModelError(Exception):
    """A checkpoint could not be made; the message is what the command said."""


def checkpoint(name: str) -> Path:
    """The folder of one of the models of tools/prepare_model.py, made if it is missing.

    Raises:
        ModelError: it could not be made.
    """
    said = _run([str(ROOT / "tools" / "prepare_model.py"), "--model", name])
    return Path(said.splitlines()[-1])


def served(method: Method, model: Path, folder: Path = CALIBRATED) -> Method:
    """The method as it is served: one that wants a calibrated copy of the model names its folder.

    The copy is calibrated in some minutes (SmolLM2), and kept.

    Args:
        method: any.
        model: the checkpoint's folder.
        folder: where copies are.

    Raises:
        ModelError: the copy could not be made.
    """
    if method.calibrated is None:
        return method
    copy = folder / "-".join((model.name, *(word.lstrip("-") for word in method.calibrated)))
    if not copy.is_dir():  # it is moved there whole
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-certificate", "--calibration", _TEXT, *method.calibrated]
        _run(["-m", "xquant_vllm.cli", "factorize", str(model), "--out", str(copy), *options])
    return dataclasses.replace(method, engine={**method.engine, "model": str(copy)})


def _run(arguments: list[str]) -> str:
    """What a command of Python's prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise ModelError(f"{' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout
