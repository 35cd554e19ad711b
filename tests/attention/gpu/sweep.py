"""Compile every configuration that serving can ask for, and say which do not fit a GPU; nothing is run.

``python -m tests.attention.gpu.sweep 80 90`` takes hours for a compute capability and can be stopped: what is compiled
stays in Triton's cache. ``--spread`` takes a tenth of the configurations, in which every format meets heads of every
size, and ``--served`` (`make cuda-check`) what GPUs run if nothing is set. It prints one line per kernel that does not
fit or spills more than it may, and fails if there is any.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from tests.attention.gpu.compiled import Compiled, compile_call
from tests.attention.gpu.sweep_cases import DTYPES, calls, configurations, rotated_stores, served
from xquant_vllm.attention.gpu.limits import SHARED_MEMORY

# Bytes of spilled registers that a thread of a kernel may have; 0 where it is not named. All of these keep 64 rows or
# two products in registers, of which they have 255 in use: with fewer rows they would read every byte more often.
SPILLS = {
    "attend": 256,
    "attend_heads": 64,
    "dense": 64,
    "kivi_attend": 1536,
    "merge": 64,
    "project_spans": 192,
    "rematerialize_pages": 288,
    "store_rotated": 384,
    "subtract_product": 16,
}
# Of ``attend_heads`` where codes are read as several fields, of which there are more than channels.
SPILLS_OF_FIELDS, OF_FIELDS = 512, ("allocated", "3 bits")
# On GPUs before Hopper products read their operands from registers, of which 64 rows or two products take most.
SPILLS_BEFORE_HOPPER = {"attend": 384, "rematerialize_pages": 448, "rotate": 448, "store_rotated": 448}
# In FP32 products are no tensor cores': it has to be right, not fast.
SPILLS_OF_FLOAT32 = 5632


def problem(kernel: Compiled) -> str | None:
    """What is wrong with a kernel, or None."""
    limit = SHARED_MEMORY[kernel.capability]
    spills = SPILLS_OF_FLOAT32 if "fp32" in kernel.case else SPILLS.get(kernel.kernel, 0)
    if kernel.capability < 90:
        spills = max(spills, SPILLS_BEFORE_HOPPER.get(kernel.kernel, 0))
    if kernel.kernel == "attend_heads" and any(form in kernel.case for form in OF_FIELDS):
        spills = max(spills, SPILLS_OF_FIELDS)
    if kernel.shared > limit:
        return f"takes {kernel.shared} bytes of shared memory of {limit}"
    if kernel.stack > spills:
        return f"spills {kernel.stack} bytes a thread, at most {spills} are allowed"
    return None


def refused_at_start(kernel: Compiled) -> bool:
    """Whether Triton refuses a kernel in FP32, which the package then says by name, and what to set instead."""
    return "fp32" in kernel.case and kernel.shared > SHARED_MEMORY[kernel.capability]


def cases(*, every: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and calls."""
    for of in configurations(every=every):
        yield from ((f"{name}: {of}", call) for name, call in calls(of))
    for dtype in DTYPES if every else ("bf16",):
        yield from ((f"{name} in {dtype}", call) for name, call in rotated_stores(dtype))


def main() -> int:
    """Compile, and return how many kernels have a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, nargs="+", choices=SHARED_MEMORY)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--spread", action="store_true", help="a tenth of the configurations")
    choice.add_argument("--served", action="store_true", help="what is served by default, every kernel printed")
    parser.add_argument("--only", nargs="+", default=[""], help="cases in whose names one of these is")
    parser.add_argument("--json", action="store_true", help="print every kernel, one line of JSON each")
    options = parser.parse_args()
    found: dict[str, str] = {}
    kernels = refused = 0
    for capability in options.capability:
        for name, call in served() if options.served else cases(every=not options.spread):
            if not any(part in name for part in options.only):
                continue
            try:
                compiled = compile_call(name, call, capability)
            except ValueError as error:  # at start-up, by name
                if "GPU" not in str(error):
                    raise  # the case is none that serving can ask for
                refused += 1
                print(f"{capability} refuses {name}: {error}", flush=True)
                continue
            for kernel in compiled:
                kernels += 1
                if options.served:
                    print(
                        f"sm_{capability:<3} {kernel.kernel:20} {kernel.registers:3} registers, {kernel.stack:3} bytes "
                        f"spilled, {kernel.shared:6} of shared memory  ({name})",
                        flush=True,
                    )
                if options.json:
                    print(json.dumps(asdict(kernel)), flush=True)
                text = problem(kernel)
                if refused_at_start(kernel):
                    refused += 1
                    print(f"{capability} refuses {kernel.kernel}, {name}: {text}", flush=True)
                elif text is not None:
                    line = f"{capability} {kernel.kernel}, {name}: {text}"
                    found[line] = text
                    print(line, flush=True)
    print(f"{kernels} kernels compiled, {len(found)} with a problem, {refused} calls refused")
    return 1 if found or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
