"""Serving benchmarks of models x methods x loads, spread over a Ray cluster, resumable.

    python benchmarks/sweep.py --models models/smollm2-135m-instruct --methods 16bit xquant --traces pressure arrivals
    python benchmarks/sweep.py --ray-address auto --out /shared/sweep ...

A point is one model under one load with all methods, because only methods that were measured on the same machine in
turns can be compared. Every point is a file in ``--out``; points that are there are not measured again. Options of
bench_serving.py are passed on. Without ``--ray-address`` Ray starts on this machine alone. A machine takes one point
after the other: a point needs all its cores. The repository and the models must lie at the same paths on all of them.
"""

import argparse
import concurrent.futures
import os
import queue
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import bench_serving  # noqa: E402
from benchmarks.files import read_json, write_json  # noqa: E402
from benchmarks.methods import UNCALIBRATED  # noqa: E402
from benchmarks.serving import report  # noqa: E402
from benchmarks.serving.points import Point, PointError, missing, points  # noqa: E402

TRACES = ("pressure", "arrivals")
_RAY_MISSING = "Ray is not installed; install it with: pip install 'xquant-vllm[bench]'"

Machine = Callable[[Point], dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "models" / "smollm2-135m-instruct")])
    parser.add_argument("--methods", nargs="+", choices=UNCALIBRATED, default=["16bit", "kivi", "xquant"])
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "sweep", help="folder of the results")
    parser.add_argument("--ray-address", help="of a running cluster (default: Ray on this machine alone)")
    options, passed_on = parser.parse_known_args(arguments)
    bench_serving.parse(passed_on)  # ends here where an option is wrong, not on every machine
    try:
        chosen = points(options.models, options.traces, options.methods, passed_on)
        todo = missing(chosen, options.out)
        print(f"{len(todo)} of {len(chosen)} points to measure", flush=True)
        failed = _measure_on_cluster(todo, options.out, options.ray_address) if todo else 0
    except PointError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    for point in chosen:
        if point.file(options.out).exists():
            result = read_json(point.file(options.out))
            print(f"\n{result['model']}, load '{point.trace}', {result['cache_mib']} MiB of cache each\n")
            print(report.table(result))
    return 1 if failed else 0


def spread(todo: Sequence[Point], machines: Sequence[Machine], folder: Path) -> int:
    """Measure points, each machine one at a time, and keep results as they come; returns how many points failed."""
    idle: queue.SimpleQueue[Machine] = queue.SimpleQueue()
    for machine in machines:
        idle.put(machine)

    def measure_on_idle(point: Point) -> dict[str, Any]:
        machine = idle.get()
        try:
            return machine(point)
        finally:
            idle.put(machine)

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(len(machines)) as pool:
        running = {pool.submit(measure_on_idle, point): point for point in todo}
        for done, future in enumerate(concurrent.futures.as_completed(running), 1):
            point = running[future]
            try:
                write_json(point.file(folder), future.result() | point.identity())
                print(f"{done} of {len(todo)}: {point.file(folder)}", flush=True)
            except Exception as error:
                failed += 1
                # Ray's own error has the whole traceback of the other process in its text.
                reason = getattr(error, "cause", None) or error
                print(f"{done} of {len(todo)}: {point.model} under {point.trace} failed: {reason}", file=sys.stderr)
    return failed


def measure(point: Point) -> dict[str, Any]:
    """Run bench_serving.py for a point, on whatever machine this is called."""
    # Ray's, which is not what a user's server has; torch reads it when it is imported.
    os.environ.pop("OMP_NUM_THREADS", None)
    from benchmarks import bench_serving

    arguments = ["--model", point.model, "--trace", point.trace, "--methods", *point.methods, *point.options]
    return bench_serving.run(bench_serving.parse(arguments))


def _measure_on_cluster(todo: Sequence[Point], folder: Path, address: str | None) -> int:
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise PointError(_RAY_MISSING) from None

    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, include_dashboard=False)
    task = ray.remote(max_retries=0)(measure)

    def on_node(node: dict[str, Any], point: Point) -> dict[str, Any]:
        # All cores of this very node, or two points would measure each other.
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        cores = node["Resources"]["CPU"]
        result: dict[str, Any] = ray.get(task.options(num_cpus=cores, scheduling_strategy=where).remote(point))
        return result

    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        return spread(todo, [partial(on_node, node) for node in nodes], folder)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
