"""Calibrated factors for a server's first start: ``python -m xquant_vllm.offline.keep_factors REQUEST``.

A process of its own, which the server starts before it loads a weight: the memory that calibration takes is free again
when the model is loaded. REQUEST is JSON, see :class:`KeepRequest`. What it does is on standard error, in lines; the
last line of standard output is JSON: ``{}``, or ``{"refused": why}``. It ends when standard input does, which is its
server's.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError, XQuantError, cause_of
from xquant_vllm.offline.progress import in_lines, say
from xquant_vllm.scheme.calibration.kept import write_about
from xquant_vllm.scheme.calibration.request import CalibrationRequest, is_whole

_FAILED = 1


@dataclass(frozen=True)
class KeepRequest:
    """What to make, and where.

    Attributes:
        factors: what to make.
        folder: where it is kept.
        device: ``"cpu"``, or ``"cuda"`` for the first GPU if the model fits it, else the CPU.
        must_fit: refuse a model that will hardly fit into memory, instead of a warning.
    """

    factors: CalibrationRequest
    folder: Path
    device: str = "cpu"
    must_fit: bool = True

    def as_json(self) -> str:
        """For the command line."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @staticmethod
    def from_json(text: str) -> "KeepRequest":
        """Back again."""
        content = json.loads(text)
        factors = CalibrationRequest(**content.pop("factors"))
        return KeepRequest(factors, Path(content.pop("folder")), **content)


def keep_factors(request: KeepRequest) -> None:
    """Calibrate, unless that was done before; while another process does it, wait for that one.

    What a killed calibration has found is taken by the next one.

    Args:
        request: what to make.

    Raises:
        RefusedError: the model or the text cannot be used.
        OSError: the folder cannot be written.
    """
    folder = request.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f".{folder.name}.lock")):
        if is_whole(folder):
            return
        work = folder.with_name(f".{folder.name}.work")
        new = work / "new"
        shutil.rmtree(new, ignore_errors=True)
        work.mkdir(exist_ok=True)
        _calibrate(request, new, work)
        write_about(
            new, request.factors.model, {k: v for k, v in asdict(request.factors).items() if k != "model" and v}
        )
        # Half of one: a damaged file was removed.
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def _calibrate(request: KeepRequest, new: Path, work: Path) -> None:
    import torch

    from xquant_vllm.offline.calibration.samples import weights_dtype
    from xquant_vllm.offline.checkpoint import open_checkpoint
    from xquant_vllm.offline.factorize import FactorizeOptions, write_calibrated
    from xquant_vllm.offline.memory import memory_problem

    factors = request.factors
    checkpoint = open_checkpoint(Path(factors.model))
    device, problem = torch.device("cpu"), None
    for name in ("cuda", "cpu") if request.device == "cuda" and torch.cuda.is_available() else ("cpu",):
        device = torch.device(name)
        problem = memory_problem(checkpoint, weights_dtype(checkpoint, device), device, "calibrating")
        if problem is None:
            break
    if problem is not None and request.must_fit:
        raise RefusedError(f"xquant: {problem}")
    options: dict[str, Any] = {
        "calibration": factors.text,
        "bits": factors.bits,
        "method": factors.method,
        "basis": factors.basis,
        "first_layers": factors.first_layers,
        "anchor_interval": factors.anchor_interval,
        "dtype": factors.dtype,
        "device": device.type,
    }
    # A GPU computes in another dtype.
    samples = work / f"samples-{device.type}"
    write_calibrated(new, FactorizeOptions(checkpoint.folder, request.folder, **options), checkpoint, samples)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the system takes the lock from one that dies."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is calibrating this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str]) -> int:
    """Run; the exit status is 0 also where it refuses, which standard output says."""
    # What libraries print is no answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_server, daemon=True).start()
    in_lines()
    refused = None
    try:
        keep_factors(KeepRequest.from_json(arguments[0]))
    except XQuantError as error:
        refused = str(error)
    except OSError as error:
        refused = f"xquant: {error}"
    except Exception as error:  # whatever a model's own code raises
        refused = f"xquant: {type(error).__name__}: {cause_of(error)}"
    with answer:
        json.dump({} if refused is None else {"refused": refused}, answer)
    return 0


def _end_with_server() -> None:
    # Not by sys.stdin, whose lock a thread would hold when this process ends by itself.
    while os.read(0, 1):
        pass
    os._exit(_FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
