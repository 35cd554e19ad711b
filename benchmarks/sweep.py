"""Serving benchmarks of models x methods x loads, spread over a Ray cluster, resumable.

    python benchmarks/sweep.py --models models/smollm2-135m-instruct --methods 16bit xquant --traces pressure arrivals
    python benchmarks/sweep.py --ray-address auto --out /shared/sweep ...

A point is one model under one load with all methods, because only methods that were measured on the same machine in
turns can be compared. Every point is a file in ``--out``; points that are there are not measured again. Options of
bench_serving.py are passed on. Without ``--ray-address`` Ray starts on this machine alone and takes one point after the
other: a point needs all cores. On a cluster the repository and the models must lie at the same paths everywhere.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.files import write_json  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402

TRACES = ("pressure", "arrivals")
_RAY_MISSING = "bench sweep: Ray is not installed; install it with: pip install 'xquant-vllm[bench]'"


@dataclass(frozen=True)
class Point:
    """One model under one load."""

    model: str
    trace: str
    methods: tuple[str, ...]

    def file(self, folder: Path) -> Path:
        """Where its result is kept: another set of methods is another point."""
        return folder / f"{Path(self.model).name}--{self.trace}--{'+'.join(self.methods)}.json"


def points(models: Iterable[str], traces: Iterable[str], methods: Iterable[str]) -> list[Point]:
    """All of them."""
    chosen = tuple(methods)
    return [Point(model, trace, chosen) for model, trace in itertools.product(models, traces)]


def missing(of: Iterable[Point], folder: Path) -> list[Point]:
    """Those without a result."""
    return [point for point in of if not point.file(folder).exists()]


def measure(point: Point, options: list[str]) -> dict[str, Any]:
    """Run bench_serving.py for a point, on whatever machine this is called."""
    from benchmarks import bench_serving

    arguments = ["--model", point.model, "--trace", point.trace, "--methods", *point.methods, *options]
    return bench_serving.run(bench_serving.parse(arguments))


def run(todo: list[Point], folder: Path, results: Iterable[tuple[Point, Callable[[], dict[str, Any]]]]) -> int:
    """Keep results as they come; returns how many points failed."""
    failed = 0
    for done, (point, result) in enumerate(results, 1):
        try:
            write_json(point.file(folder), result())
            print(f"{done} of {len(todo)}: {point.file(folder)}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{done} of {len(todo)}: {point.model} under {point.trace} failed: {error}", file=sys.stderr)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "models" / "smollm2-135m-instruct")])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["16bit", "kivi", "xquant"])
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "sweep", help="folder of the results")
    parser.add_argument("--ray-address", help="of a running cluster (default: Ray on this machine alone)")
    options, passed_on = parser.parse_known_args(arguments)
    todo = missing(points(options.models, options.traces, options.methods), options.out)
    print(f"{len(todo)} points to measure", flush=True)
    if not todo:
        return 0
    try:
        import ray
    except ImportError:
        print(_RAY_MISSING, file=sys.stderr)
        return 2
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(address=options.ray_address, runtime_env=environment, include_dashboard=False, log_to_driver=True)
    try:
        # All cores of a machine, or two points would measure each other.
        cores = int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))
        task = ray.remote(num_cpus=cores, max_retries=0)(measure)
        pending = {task.remote(point, passed_on): point for point in todo}
        return 1 if run(todo, options.out, _finished(ray, pending)) else 0
    finally:
        ray.shutdown()


def _finished(ray: Any, pending: dict[Any, Point]) -> Iterable[tuple[Point, Callable[[], dict[str, Any]]]]:
    while pending:
        (reference, *_), _ = ray.wait(list(pending))
        yield pending.pop(reference), lambda reference=reference: ray.get(reference)


if __name__ == "__main__":
    sys.exit(main())
