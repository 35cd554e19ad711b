"""GPU kernels: checked against the FP32 reference first, then timed against what the device can do and against others.

    python benchmarks/gpu_suite.py --json --out benchmarks/results/gpu

Needs torch and Triton, and this repository on the path, nothing else of its environment. What it prints is explained in
docs/kernels/gpu.md. Without a GPU, TRITON_INTERPRET=1 runs --tiny: checks on small shapes, and every code path of the
timing.
Exit codes: 0, everything checked is right; 1, something is not; 2, it cannot run here.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything on the CPU
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu import report  # noqa: E402
from benchmarks.gpu.baselines import BASELINES  # noqa: E402
from benchmarks.gpu.checks import Check, plan_checks, run_check  # noqa: E402
from benchmarks.gpu.cost import Roofs  # noqa: E402
from benchmarks.gpu.kernels import KERNELS  # noqa: E402
from benchmarks.gpu.layers import FORMATS, Shape, shapes, tiny_shapes  # noqa: E402
from benchmarks.gpu.roofs import measure_roofs  # noqa: E402
from benchmarks.gpu.timed import Request, time_shape  # noqa: E402
from benchmarks.gpu.workers import Worker, WorkerError, each  # noqa: E402

INTERPRETER_LABEL = "interpreter, not a measurement"
TINY_LABEL = "tiny shapes, not a measurement"
# Of the time there is, for checks; a check that takes longer than this many seconds hangs.
_CHECKS_SHARE, _LONGEST_CHECK, _LONGEST_SHAPE = 0.4, 180.0, 600.0
# Kept for the report.
_MARGIN = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; returns the exit code."""
    options = _options(arguments)
    if not INTERPRETED and not torch.cuda.is_available():
        print(
            "gpu_suite: no GPU here: run it on a machine with one, or set TRITON_INTERPRET=1 to run --tiny on the CPU",
            file=sys.stderr,
        )
        return 2
    if INTERPRETED and not options.tiny:
        say("Triton's interpreter is only fast enough for --tiny: that is what runs")
        options.tiny = True
    results = run(options)
    print(report.text(results))
    if (written := keep(options, results)) is not None:
        say(f"wrote {written}")
    if options.json:
        print(report.as_json(results))
    wrong = [row for row in (*results["checks"], *results["timings"]) if is_failure(row)]
    return 1 if wrong else 0


def keep(options: argparse.Namespace, results: dict[str, Any]) -> Path | None:
    """Write what there is so far: a run that is cut off leaves that much."""
    return None if options.out is None else report.write(options.out, results)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object, the last line")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write them to FOLDER/DEVICE-NAME.json")
    parser.add_argument("--tiny", action="store_true", help="small checks and shapes that only prove the code path")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression: what to check and time")
    parser.add_argument("--minutes", type=float, help="stop in time, the most important first (default: do everything)")
    parser.add_argument("--seed", type=int, help="of all inputs (default: another in every run)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a page when timing (default %(default)s)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument("--processes", type=int, default=min(8, (os.cpu_count() or 2) // 2 or 1), help="for checks")
    return parser.parse_args(arguments)


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


_BEGAN = time.perf_counter()


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a check or a timing shows that one of our kernels is wrong or does not run."""
    ours = row.get("kind", "xquant") in ("xquant", "kivi")
    return ours and row["status"] in ("failed", "wrong")


class Deadline:
    """When to stop."""

    def __init__(self, minutes: float | None) -> None:
        """So many minutes from the start of the program; None: never."""
        self._ends = None if minutes is None else _BEGAN + 60 * minutes - _MARGIN

    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self._ends is None else self._ends - time.perf_counter()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one object."""
    seed = secrets.randbits(31) if options.seed is None else options.seed
    say(f"seed {seed}")
    label = INTERPRETER_LABEL if INTERPRETED else TINY_LABEL if options.tiny else None
    deadline, worker = Deadline(options.minutes), Worker(inline=INTERPRETED)
    results: dict[str, Any] = {
        "suite": "gpu",
        "label": label,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": worker.call(describe_device),
        "versions": versions(),
        "seed": seed,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "roofs": None,
        "baselines": worker.call(describe_baselines),
        "left_out": [],
        "timings": [],
        "targets": [],
        "complete": False,
    }
    if not INTERPRETED:
        say("measuring the roofs")
        results["roofs"] = worker.call(measure_roofs, options.tiny)
    results["checks"] = check_all(options, seed, deadline, results["left_out"])
    results["timings"] = time_all(options, seed, deadline, worker, label, results)
    worker.close()
    results["targets"] = report.targets(results["timings"])
    results["complete"] = not results["left_out"]
    results["seconds"] = time.perf_counter() - _BEGAN
    return results


def describe_device() -> dict[str, Any]:
    """The device that kernels run on."""
    if INTERPRETED:
        return {"name": "Triton interpreter", "machine": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def describe_baselines() -> dict[str, str]:
    """Which baselines there are, or why not."""
    return {baseline.name: baseline.unavailable() or "available" for baseline in BASELINES}


def versions() -> dict[str, str | None]:
    """Of what matters, without importing what might not be there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "vllm", "xformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_all(options: argparse.Namespace, seed: int, deadline: Deadline, left_out: list[str]) -> list[dict[str, Any]]:
    """All checks, in other processes side by side where there is a GPU."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    # The interpreter multiplies the bit patterns of BF16 numbers.
    dtypes = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16, torch.bfloat16])]
    planned = [
        (check, kernels)
        for check in plan_checks(seed, tiny=options.tiny, dtypes=dtypes)
        for kernels in options.kernels
        if re.search(options.only, f"check {check.name} ({kernels})")
    ]
    ends = deadline.left() * (1 - _CHECKS_SHARE)
    done = []

    def call(worker: Worker, item: tuple[Check, str]) -> dict[str, Any] | None:
        check, kernels = item
        if deadline.left() < ends:
            return None
        try:
            return worker.call(check_by_name, check, kernels, device, timeout=min(_LONGEST_CHECK, deadline.left()))
        except WorkerError as error:
            if deadline.left() < 1:
                return None
            reason = str(error).strip().splitlines()[-1]
            return {"name": check.name, "kernels": kernels, "status": "failed", "reason": reason}

    for (check, kernels), result in each(planned, call, processes=0 if INTERPRETED else options.processes):
        if result is None:
            left_out.append(f"check {check.name} ({kernels})")
            continue
        done.append(result)
        reason = f" ({result['reason']})" if "reason" in result else ""
        say(f"check {len(done)} of {len(planned)}: {check.name} ({kernels}): {result['status']}{reason}")
    return done


def check_by_name(check: Check, kernels: str, device: torch.device) -> dict[str, Any]:
    """:func:`run_check`, in another process."""
    return run_check(check, KERNELS[kernels](), device)


def time_all(
    options: argparse.Namespace,
    seed: int,
    deadline: Deadline,
    worker: Worker,
    label: str | None,
    results: dict[str, Any],
) -> list[dict[str, Any]]:
    """All shapes, one after another, while there is time."""
    found = results["roofs"]
    roofs = None if found is None else Roofs(found["copy_bytes_per_second"], found["matrix_flops_per_second"])
    rows: list[dict[str, Any]] = []
    chosen = [
        (shape, formats)
        for shape in (tiny_shapes() if options.tiny else shapes())
        if (formats := _formats(shape, lambda name: bool(re.search(options.only, name))))
    ]
    taken: list[float] = []
    for index, (shape, formats) in enumerate(chosen):
        # A shape takes about as long as those before it; the first also compiles.
        expected = max(taken[-3:], default=30.0 if options.minutes else 0.0)
        if deadline.left() < expected:
            results["left_out"] += [shape.name for shape, _ in chosen[index:]]
            say(f"out of time: {len(chosen) - index} shapes are left out")
            break
        say(f"timing {index + 1} of {len(chosen)}: {shape.name}")
        began = time.perf_counter()
        request = Request(
            shape=shape,
            formats=formats,
            kernels=tuple(options.kernels),
            baselines=tuple(name for name, state in results["baselines"].items() if state == "available"),
            roofs=roofs,
            block_size=options.block_size,
            layer_seed=seed,
            seed=(seed + index) % 2**31,
            label=label,
        )
        before = len(rows)
        rows += time_one(request, worker, deadline, results["left_out"])
        taken.append(time.perf_counter() - began)
        for row in rows[before:]:
            say("  " + report.line(row))
        results["timings"] = rows
        keep(options, results)
    return rows


def time_one(request: Request, worker: Worker, deadline: Deadline, left_out: list[str]) -> list[dict[str, Any]]:
    """One shape; once more without baselines where that left no result, because one of them may be at fault."""
    rows: list[dict[str, Any]] = []
    name = request.shape.name
    for attempt in (request, replace(request, baselines=())):
        try:
            return rows + worker.call(time_shape, attempt, timeout=min(_LONGEST_SHAPE, deadline.left()))
        except WorkerError as error:
            reason = str(error).strip().splitlines()[-1]
        if deadline.left() < 1:
            left_out.append(name)
            break
        say(f"  lost: {reason}")
        kind = "baselines" if attempt.baselines else "xquant"
        rows.append({"shape": name, "variant": "all", "kind": kind, "status": "failed", "reason": reason})
        if not attempt.baselines:
            break
    return rows


def _formats(shape: Shape, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(name for name in FORMATS[shape.model.name] if wanted(f"{shape.name}, {name}"))


if __name__ == "__main__":
    sys.exit(main())
